/* 16 inverse transforms side by side; included once per instruction set.
 *
 * Input and output are `length` complex vectors. Pass by pass: butterfly p of place q reads
 * vectors q + stride·(p + k·count), and writes q + stride·(radix·p + j) times its twiddle.
 */

#define EACH_VECTOR for (int h = 0; h < LANES; h += WIDTH)

INLINE void butterfly2(Complex *x) {
    Complex a = x[0], b = x[1];
    x[0] = add(a, b);
    x[1] = subtract(a, b);
}

INLINE void butterfly3(Complex *x) {
    const float sine = 0.866025403784438647f;
    Complex sum = add(x[1], x[2]), difference = subtract(x[1], x[2]);
    Complex middle = {x[0].re - sum.re * 0.5f, x[0].im - sum.im * 0.5f};
    Complex side = {difference.im * -sine, difference.re * sine};
    x[0] = add(x[0], sum);
    x[1] = add(middle, side);
    x[2] = subtract(middle, side);
}

INLINE void butterfly4(Complex *x) {
    Complex a = add(x[0], x[2]), b = subtract(x[0], x[2]);
    Complex c = add(x[1], x[3]), d = times_i(subtract(x[1], x[3]));
    x[0] = add(a, c);
    x[1] = add(b, d);
    x[2] = subtract(a, c);
    x[3] = subtract(b, d);
}

INLINE void butterfly5(Complex *x) {
    const float cos1 = 0.309016994374947424f, cos2 = -0.809016994374947424f;
    const float sin1 = 0.951056516295153572f, sin2 = 0.587785252292473129f;
    Complex s1 = add(x[1], x[4]), d1 = subtract(x[1], x[4]);
    Complex s2 = add(x[2], x[3]), d2 = subtract(x[2], x[3]);
    Complex a = {x[0].re + s1.re * cos1 + s2.re * cos2, x[0].im + s1.im * cos1 + s2.im * cos2};
    Complex b = {x[0].re + s1.re * cos2 + s2.re * cos1, x[0].im + s1.im * cos2 + s2.im * cos1};
    Complex c = {-(d1.im * sin1 + d2.im * sin2), d1.re * sin1 + d2.re * sin2};
    Complex d = {-(d1.im * sin2 - d2.im * sin1), d1.re * sin2 - d2.re * sin1};
    x[0] = add(x[0], add(s1, s2));
    x[1] = add(a, c);
    x[2] = add(b, d);
    x[3] = subtract(b, d);
    x[4] = subtract(a, c);
}

INLINE void butterfly8(Complex *x) {
    const float half = 0.707106781186547524f;
    Complex even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
    butterfly4(even);
    butterfly4(odd);
    odd[1] = (Complex){(odd[1].re - odd[1].im) * half, (odd[1].re + odd[1].im) * half};
    odd[2] = times_i(odd[2]);
    odd[3] = (Complex){(odd[3].re + odd[3].im) * -half, (odd[3].re - odd[3].im) * half};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        x[j] = add(even[j], odd[j]);
        x[j + 4] = subtract(even[j], odd[j]);
    }
}

/* The first butterfly of a pass has no twiddles, so the last pass has none at all. */
#define PASS(RADIX)                                                                           \
    static void pass##RADIX(const Pass *pass, const float *restrict from, float *restrict to) \
    {                                                                                         \
        int stride = pass->stride, count = pass->count;                                       \
        size_t apart = (size_t)stride * count * PAIR, step = (size_t)stride * PAIR;           \
        for (int q = 0; q < stride; q++) EACH_VECTOR {                                        \
            Complex values[RADIX];                                                            \
            UNROLL for (int k = 0; k < RADIX; k++)                                            \
                values[k] = load_complex(from + q * PAIR + k * apart + h);                    \
            butterfly##RADIX(values);                                                         \
            UNROLL for (int j = 0; j < RADIX; j++)                                            \
                store_complex(to + q * PAIR + j * step + h, values[j]);                       \
        }                                                                                     \
        for (int p = 1; p < count; p++) {                                                     \
            const float *turns = pass->turns + (size_t)p * 2 * (RADIX - 1);                   \
            const float *x = from + (size_t)p * step;                                         \
            float *y = to + (size_t)p * step * RADIX;                                         \
            for (int q = 0; q < stride; q++, x += PAIR, y += PAIR) EACH_VECTOR {              \
                Complex values[RADIX];                                                        \
                UNROLL for (int k = 0; k < RADIX; k++)                                        \
                    values[k] = load_complex(x + k * apart + h);                              \
                butterfly##RADIX(values);                                                     \
                store_complex(y + h, values[0]);                                              \
                UNROLL for (int j = 1; j < RADIX; j++)                                        \
                    store_complex(y + j * step + h, turn(values[j], turns + 2 * (j - 1)));    \
            }                                                                                 \
        }                                                                                     \
    }
#define UNROLL _Pragma("GCC unroll 8")

PASS(2)
PASS(3)
PASS(4)
PASS(5)
PASS(8)

/* Any radix: a dense product. */
static void pass_any(const Pass *pass, const float *restrict from, float *restrict to) {
    static const float none[2] = {1, 0};
    int stride = pass->stride, count = pass->count, radix = pass->radix;
    size_t apart = (size_t)stride * count * PAIR;
    for (int p = 0; p < count; p++)
        for (int q = 0; q < stride; q++) {
            const float *x = from + ((size_t)p * stride + q) * PAIR;
            float *y = to + ((size_t)p * stride * radix + q) * PAIR;
            for (int j = 0; j < radix; j++) {
                const float *turns = j ? pass->turns + ((size_t)p * (radix - 1) + j - 1) * 2 : none;
                EACH_VECTOR {
                    Complex sum = load_complex(x + h);
                    for (int k = 1, root = j; k < radix; k++) {
                        const float *by = pass->roots + 2 * root;
                        sum = add(sum, turn(load_complex(x + k * apart + h), by));
                        root = root + j >= radix ? root + j - radix : root + j;
                    }
                    store_complex(y + (size_t)j * stride * PAIR + h, turn(sum, turns));
                }
            }
        }
}

/* Returns where the result is: either buffer. */
static float *invert(const Transform *transform, float *data, float *other) {
    for (int i = 0; i < transform->passes; i++) {
        const Pass *pass = &transform->pass[i];
        switch (pass->radix) {
        case 2: pass2(pass, data, other); break;
        case 3: pass3(pass, data, other); break;
        case 4: pass4(pass, data, other); break;
        case 5: pass5(pass, data, other); break;
        case 8: pass8(pass, data, other); break;
        default: pass_any(pass, data, other);
        }
        float *result = other;
        other = data;
        data = result;
    }
    return data;
}
