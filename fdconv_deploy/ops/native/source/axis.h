/* One axis of a feature map, and the Fourier vectors that a band modulation takes along it.
 *
 * Each such vector is even or odd under n -> -n, and under n -> n + length/2. So positions fall
 * into orbits of up to four; sums and differences over them split the product with all vectors
 * into four, by classes of vectors, of a quarter of the length each.
 *
 * Class c is odd under the reflection where c & 1 is set, under the shift where c & 2 is. Where
 * rows are complex a position has two parts, and the imaginary ones change sign as they are
 * reflected, which exchanges c and c ^ 1.
 */
#ifndef FDCONV_AXIS_H
#define FDCONV_AXIS_H

#include <stddef.h>

enum { CLASSES = 4, MEMBERS = 4, ORBITS_AT_ONCE = 4 };

/* members: of each orbit n, -n, n + length/2 and length/2 - n; distinct: bit m where member m is
 * at no earlier member's place. Vectors are ordered by class: first[c] ... first[c + 1] are of
 * class c. order: where each was. forward: (vectors, orbits·parts), orbits of fewer than four
 * places counted as often as they are met. */
typedef struct {
    int length, parts, orbits, vectors, first[CLASSES + 1];
    ptrdiff_t (*members)[MEMBERS];
    unsigned char *distinct;
    int *order;
    float *forward;
} Axis;

/* Vectors (count, length·parts). `paired`: vector i + count/2 is the imaginary part of i, which
 * is of an even class. NULL, or why it cannot be done. */
const char *axis_make(Axis *axis, int length, int parts, const float *vectors, int count,
                      int paired);
void axis_free(Axis *axis);

/* Matrices of a band that takes leading vectors back to positions, by class: (orbits·parts,
 * count[c]), orbits padded with zeros to a multiple of ORBITS_AT_ONCE. */
typedef struct {
    int count[CLASSES], first[CLASSES + 1];
    float *matrix[CLASSES];
} AxisBand;

/* `vectors`: (all, length·parts), of which the band has vector v at place[v], or not (-1). */
const char *axis_band_make(AxisBand *band, const Axis *axis, const float *vectors,
                           const int *place);
void axis_band_free(AxisBand *band);

#endif
