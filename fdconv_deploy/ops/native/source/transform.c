/* Tables of one length's inverse transform. */
#include <math.h>
#include <stdlib.h>

#include "assembly.h"

static const double TAU = 6.283185307179586476925286766559;

/* Radices with butterflies of their own first, the largest first; what is left are primes. */
static int next_radix(int length) {
    if (length % 16 == 8 || length % 64 == 0) return 8;
    if (length % 4 == 0) return 4;
    for (int radix = 2; (int64_t)radix * radix <= length; radix++)
        if (length % radix == 0) return radix;
    return length;
}

int transform_make(Transform *transform, int length) {
    size_t floats = 0;
    transform->length = length;
    transform->passes = 0;
    transform->table = NULL;
    for (int left = length, stride = 1; left > 1;) {
        if (transform->passes == MOST_PASSES) return -1;
        Pass *pass = &transform->pass[transform->passes++];
        pass->radix = next_radix(left);
        pass->stride = stride;
        left /= pass->radix;
        stride *= pass->radix;
        pass->count = left;
        floats += 2 * (size_t)(pass->radix - 1) * pass->count + 2 * (size_t)pass->radix;
    }
    transform->table = malloc((floats + 1) * sizeof(float));
    if (!transform->table) return -1;
    float *at = transform->table;
    for (int i = 0; i < transform->passes; i++) {
        Pass *pass = &transform->pass[i];
        int span = pass->radix * pass->count;
        pass->turns = at;
        for (int p = 0; p < pass->count; p++)
            for (int j = 1; j < pass->radix; j++) {
                double angle = TAU * ((int64_t)j * p % span) / span;
                *at++ = (float)cos(angle);
                *at++ = (float)sin(angle);
            }
        pass->roots = at;
        for (int j = 0; j < pass->radix; j++) {
            *at++ = (float)cos(TAU * j / pass->radix);
            *at++ = (float)sin(TAU * j / pass->radix);
        }
    }
    return 0;
}

void transform_free(Transform *transform) {
    free(transform->table);
    transform->table = NULL;
}
