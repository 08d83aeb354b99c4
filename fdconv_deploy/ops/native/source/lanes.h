/* Vectors of WIDTH floats, the processor's own width; included once per instruction set. */

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
/* In memory, among plain floats. */
typedef float Stored __attribute__((vector_size(4 * WIDTH), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

typedef struct {
    Vector re, im;
} Complex;

#define INLINE static inline __attribute__((always_inline))

INLINE Vector load(const float *at) { return *(const Stored *)at; }
INLINE Vector load_anywhere(const float *at) { return (Vector)*(const Unaligned *)at; }
INLINE void store(float *at, Vector x) { *(Stored *)at = x; }
INLINE void store_anywhere(float *at, Vector x) { *(Unaligned *)at = x; }
/* Minus zero, unlike plus zero, changes no number: compilers drop it. */
INLINE Vector all(float x) { return x - (Vector){0}; }

INLINE Complex load_complex(const float *at) { return (Complex){load(at), load(at + LANES)}; }
INLINE void store_complex(float *at, Complex x) {
    store(at, x.re);
    store(at + LANES, x.im);
}
INLINE Complex add(Complex a, Complex b) { return (Complex){a.re + b.re, a.im + b.im}; }
INLINE Complex subtract(Complex a, Complex b) { return (Complex){a.re - b.re, a.im - b.im}; }
INLINE Complex times_i(Complex a) { return (Complex){-a.im, a.re}; }
INLINE Complex turn(Complex a, const float *by) {
    return (Complex){a.re * by[0] - a.im * by[1], a.re * by[1] + a.im * by[0]};
}

/* x, held between -limit and limit; not-a-number stays what it is. */
INLINE Vector held(Vector x, float limit) {
#if WIDTH == 16
    __m512 below = _mm512_min_ps((__m512)all(limit), (__m512)x);
    return (Vector)_mm512_max_ps((__m512)all(-limit), below);
#elif WIDTH == 8
    __m256 below = _mm256_min_ps((__m256)all(limit), (__m256)x);
    return (Vector)_mm256_max_ps((__m256)all(-limit), below);
#else
    Integers high = x > limit, low = x < -limit;
    Integers inside = (Integers)x & ~(high | low);
    Integers outside = ((Integers)all(limit) & high) | ((Integers)all(-limit) & low);
    return (Vector)(inside | outside);
#endif
}

/* 1 / x, where x is at least 1, to within 2e-7 of itself: an estimate and one step of Newton's
 * where the processor has estimates, since it divides slowly. */
INLINE Vector inverse(Vector x) {
#if WIDTH == 16
    Vector estimate = (Vector)_mm512_rcp14_ps((__m512)x);
    return estimate * (2.0f - x * estimate);
#elif WIDTH == 8
    Vector estimate = (Vector)_mm256_rcp_ps((__m256)x);
    return estimate * (2.0f - x * estimate);
#else
    return 1.0f / x;
#endif
}

/* exp(x) to within 2e-7 of itself, of x held within ±87. */
INLINE Vector exponential(Vector x) {
    /* exp(x) = 2^z; beyond ±126 float32 has no exponents. */
    Vector z = held(x * 1.44269504088896f, 126.0f);
    /* Adding 1.5·2^23 rounds to an integer, which is left in the lowest bits. */
    Vector rounded = z + 12582912.0f;
    Vector rest = z - (rounded - 12582912.0f);
    /* Chebyshev fit of 2^rest on -0.5 ... 0.5. */
    Vector power = all(0.000154531629f);
    power = power * rest + 0.00133908634f;
    power = power * rest + 0.00961808256f;
    power = power * rest + 0.0555035711f;
    power = power * rest + 0.240226508f;
    power = power * rest + 0.693147188f;
    power = power * rest + 1.0f;
    return (Vector)((Integers)power + ((Integers)rounded << 23));
}

/* 1 / (1 + exp(-x)) to within 2e-7 of the largest value, 1; beyond ±87 that is 0 or 1 anyway. */
INLINE Vector sigmoid(Vector x) { return inverse(exponential(-x) + 1.0f); }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Integers){__VA_ARGS__})
#endif

/* LOW and HIGH interleave two vectors' halves: a network of log2(WIDTH) such steps transposes. */
#if WIDTH == 16
#define LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif WIDTH == 8
#define LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif

/* WIDTH vectors, transposed in place. Each step interleaves vector i with vector i + WIDTH/2. */
INLINE void transpose(Vector *v) {
    Vector other[WIDTH];
    for (int step = 1; step < WIDTH; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH / 2; i++) {
            other[2 * i] = LOW(v[i], v[i + WIDTH / 2]);
            other[2 * i + 1] = HIGH(v[i], v[i + WIDTH / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) v[i] = other[i];
    }
}
