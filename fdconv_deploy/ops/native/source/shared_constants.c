/* Constants that equal layers share: those of other sizes and batches, and equal maps. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "node.h"

typedef struct Shared {
    void *data;
    size_t bytes, users;
    struct Shared *next;
} Shared;

static Shared *all;
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;

void *share(void *made, size_t bytes) {
    Shared *added = malloc(sizeof *added);
    pthread_mutex_lock(&changing);
    Shared *found = all;
    while (found && (found->bytes != bytes || memcmp(found->data, made, bytes)))
        found = found->next;
    if (!found && added) {
        *added = (Shared){made, bytes, 0, all};
        found = all = added;
    }
    if (found) found->users++;
    pthread_mutex_unlock(&changing);
    if (found != added) free(added);
    if (!found || found->data != made) free(made);
    return found ? found->data : NULL;
}

void unshare(void *data) {
    pthread_mutex_lock(&changing);
    Shared **place = &all;
    while (*place && (*place)->data != data) place = &(*place)->next;
    Shared *found = *place;
    int last = !found || !--found->users;
    if (last && found) *place = found->next;
    pthread_mutex_unlock(&changing);
    if (!last) return;
    free(data);
    free(found);
}
