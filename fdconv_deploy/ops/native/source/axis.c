/* Classes of Fourier vectors, found in the numbers themselves. */
#include "axis.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "node.h"

static int member(int n, int which, int length) {
    int shift = length % 2 ? 0 : length / 2; /* odd lengths have no half */
    return ((which & 1 ? length - n : n) + (which & 2 ? shift : 0)) % length;
}

/* What a vector has of a class at (n, part). */
static double of_class(const float *vector, int class, int n, int part, int length, int parts) {
    double sum = 0;
    for (int m = 0; m < MEMBERS; m++) {
        int odd = (m & 1 && (class ^ part) & 1) != (m & 2 && class & 2);
        double value = vector[(size_t)member(n, m, length) * parts + part];
        sum += odd ? -value : value;
    }
    return sum / MEMBERS;
}

static int is_of_class(const float *vector, int class, int length, int parts, double largest) {
    for (int n = 0; n < length; n++)
        for (int part = 0; part < parts; part++) {
            double value = vector[(size_t)n * parts + part];
            if (!(fabs(value - of_class(vector, class, n, part, length, parts)) <= 1e-4 * largest))
                return 0;
        }
    return 1;
}

enum { NOTHING = -1, NO_CLASS = -2 };

/* A vector's class; NOTHING of zeros alone. */
static int class_of(const float *vector, int length, int parts) {
    double largest = 0;
    for (int i = 0; i < length * parts; i++) largest = fmax(largest, fabs(vector[i]));
    if (largest < 1e-6) return NOTHING;
    for (int class = 0; class < CLASSES; class++)
        if (is_of_class(vector, class, length, parts, largest)) return class;
    return NO_CLASS;
}

static void make_orbits(Axis *axis) {
    for (int n = 0; n < axis->orbits; n++)
        for (int m = 0; m < MEMBERS; m++) {
            ptrdiff_t *members = axis->members[n];
            int earlier = 0;
            members[m] = member(n, m, axis->length);
            while (members[earlier] != members[m]) earlier++;
            if (earlier == m) axis->distinct[n] |= (unsigned char)(1 << m);
        }
}

const char *axis_make(Axis *axis, int length, int parts, const float *vectors, int count,
                      int paired) {
    axis->length = length;
    axis->parts = parts;
    axis->orbits = (length % 2 ? length / 2 : length / 4) + 1;
    size_t places = (size_t)axis->orbits * parts, size = (size_t)length * parts;
    axis->members = malloc(axis->orbits * sizeof *axis->members);
    axis->distinct = calloc(axis->orbits, 1);
    axis->order = malloc(count * sizeof *axis->order);
    axis->forward = malloc(count * places * sizeof(float));
    int *classes = malloc(count * sizeof *classes);
    const char *problem = NULL;
    if (!axis->members || !axis->distinct || !axis->order || !axis->forward || !classes)
        problem = no_memory;
    else
        make_orbits(axis);
    for (int v = 0; v < count && !problem; v++) {
        classes[v] = class_of(vectors + v * size, length, parts);
        if (paired && v >= count / 2) {
            int real = classes[v - count / 2];
            if (classes[v] == NOTHING) classes[v] = real ^ 1;
            if (real < 0 || real & 1 || classes[v] != (real ^ 1)) problem = unknown;
        }
        if (classes[v] == NO_CLASS) problem = unknown;
    }
    for (int class = 0; class < CLASSES && !problem; class++) {
        axis->first[class] = axis->vectors;
        for (int v = 0; v < count; v++) {
            if (classes[v] != class) continue;
            float *to = axis->forward + axis->vectors * places;
            for (int n = 0; n < axis->orbits; n++)
                for (int part = 0; part < parts; part++)
                    to[n * parts + part] =
                        (float)(of_class(vectors + v * size, class, n, part, length, parts) *
                                __builtin_popcount(axis->distinct[n]) / MEMBERS);
            axis->order[axis->vectors++] = v;
        }
    }
    axis->first[CLASSES] = axis->vectors;
    free(classes);
    return problem;
}

void axis_free(Axis *axis) {
    free(axis->members);
    free(axis->distinct);
    free(axis->order);
    free(axis->forward);
}

const char *axis_band_make(AxisBand *band, const Axis *axis, const float *vectors,
                           const int *place) {
    size_t orbits = (axis->orbits + ORBITS_AT_ONCE - 1) / ORBITS_AT_ONCE * ORBITS_AT_ONCE;
    for (int class = 0; class < CLASSES; class++) {
        const int *order = axis->order + axis->first[class];
        int all = axis->first[class + 1] - axis->first[class], count = 0;
        while (count < all && place[order[count]] >= 0) count++;
        for (int i = count; i < all; i++)
            if (place[order[i]] >= 0) return unknown; /* it takes no leading vectors */
        band->count[class] = count;
        band->first[class + 1] = band->first[class] + count;
        float *to = calloc(orbits * axis->parts * (count ? count : 1), sizeof(float));
        band->matrix[class] = to;
        if (!to) return no_memory;
        for (int i = 0; i < count; i++) {
            const float *from = vectors + (size_t)place[order[i]] * axis->length * axis->parts;
            double largest = 0;
            for (int n = 0; n < axis->length * axis->parts; n++)
                largest = fmax(largest, fabs(from[n]));
            if (!is_of_class(from, class, axis->length, axis->parts, largest)) return unknown;
            for (int n = 0; n < axis->orbits; n++)
                for (int part = 0; part < axis->parts; part++)
                    to[(size_t)(n * axis->parts + part) * count + i] =
                        (float)of_class(from, class, n, part, axis->length, axis->parts);
        }
    }
    return NULL;
}

void axis_band_free(AxisBand *band) {
    for (int class = 0; class < CLASSES; class++) free(band->matrix[class]);
}
