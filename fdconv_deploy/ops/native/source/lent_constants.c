/* Constants that whoever opens a session lends to its operators while it is made.
 *
 * An assembly lays its spectrum out anew. As inputs of a node, the runtime would keep what it was
 * laid out from as long as the session, and never read it again.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "node.h"

typedef struct Loan {
    int64_t number;
    Tensor tensors[LENT];
    struct Loan *next;
} Loan;

static Loan *loans;
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;

#define VISIBLE __attribute__((visibility("default")))
VISIBLE int fdconv_lend(int64_t number, const Tensor *tensors);
VISIBLE void fdconv_take_back(int64_t number);

int fdconv_lend(int64_t number, const Tensor *tensors) {
    Loan *loan = malloc(sizeof *loan);
    if (!loan) return -1;
    loan->number = number;
    memcpy(loan->tensors, tensors, sizeof loan->tensors);
    pthread_mutex_lock(&changing);
    loan->next = loans;
    loans = loan;
    pthread_mutex_unlock(&changing);
    return 0;
}

void fdconv_take_back(int64_t number) {
    pthread_mutex_lock(&changing);
    for (Loan **place = &loans; *place; place = &(*place)->next)
        if ((*place)->number == number) {
            Loan *loan = *place;
            *place = loan->next;
            free(loan);
            break;
        }
    pthread_mutex_unlock(&changing);
}

const Tensor *lent(int64_t number) {
    pthread_mutex_lock(&changing);
    Loan *loan = loans;
    while (loan && loan->number != number) loan = loan->next;
    pthread_mutex_unlock(&changing);
    return loan ? loan->tensors : NULL;
}
