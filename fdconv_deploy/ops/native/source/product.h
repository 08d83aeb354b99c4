/* Matrix products of small matrices that lie in a core's cache; included once per instruction set.
 *
 * c (m × n) = a (m × k) · b (k × n), added to what c holds where `add` is set. Rows of b and c are
 * padded, and b's and c's addresses aligned, to whole vectors; n counts the padding.
 */

#if WIDTH == 16
enum { TALL = 8 };
#else
enum { TALL = 4 };
#endif

#define BLOCK(NAME, ROWS, VECTORS)                                                            \
    INLINE void NAME(int k, const float *a, size_t a_step, const float *b, size_t b_step,     \
                     float *c, size_t c_step, int add)                                        \
    {                                                                                         \
        Vector sum[ROWS][VECTORS];                                                            \
        UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < VECTORS; v++)        \
            sum[i][v] = all(0);                                                               \
        if (add)                                                                              \
            UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < VECTORS; v++)    \
                sum[i][v] = load(c + i * c_step + v * WIDTH);                                 \
        for (int j = 0; j < k; j++, b += b_step) {                                            \
            Vector right[VECTORS];                                                            \
            UNROLL for (int v = 0; v < VECTORS; v++)                                          \
                right[v] = (Vector)*(const Unaligned *)(b + v * WIDTH);                       \
            UNROLL for (int i = 0; i < ROWS; i++) {                                           \
                Vector left = all(a[i * a_step + j]);                                         \
                UNROLL for (int v = 0; v < VECTORS; v++) sum[i][v] += left * right[v];        \
            }                                                                                 \
        }                                                                                     \
        UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < VECTORS; v++)        \
            store(c + i * c_step + v * WIDTH, sum[i][v]);                                     \
    }

BLOCK(block_tall_two, TALL, 2)
BLOCK(block_tall_one, TALL, 1)
BLOCK(block_half_two, TALL / 2, 2)
BLOCK(block_half_one, TALL / 2, 1)
#if WIDTH == 16
BLOCK(block_half_four, TALL / 2, 4)
#endif
BLOCK(block_one_two, 1, 2)
BLOCK(block_one_one, 1, 1)

static void product(int m, int n, int k, const float *a, size_t a_step, const float *b,
                    size_t b_step, float *c, size_t c_step, int add)
{
    int column = 0;
#if WIDTH == 16
    if (m == TALL / 2)
        for (; column + 4 * WIDTH <= n; column += 4 * WIDTH)
            block_half_four(k, a, a_step, b + column, b_step, c + column, c_step, add);
#endif
    for (; column < n; column += 2 * WIDTH) {
        int two = n - column > WIDTH, row = 0;
        for (; row + TALL <= m || (row < m && m > TALL && !add); row += TALL) {
            /* The last block overlaps the one before rather than leave single rows. */
            if (row + TALL > m) row = m - TALL;
            const float *left = a + row * a_step;
            float *to = c + row * c_step + column;
            if (two)
                block_tall_two(k, left, a_step, b + column, b_step, to, c_step, add);
            else
                block_tall_one(k, left, a_step, b + column, b_step, to, c_step, add);
        }
        for (; row + TALL / 2 <= m; row += TALL / 2) {
            const float *left = a + row * a_step;
            float *to = c + row * c_step + column;
            if (two)
                block_half_two(k, left, a_step, b + column, b_step, to, c_step, add);
            else
                block_half_one(k, left, a_step, b + column, b_step, to, c_step, add);
        }
        for (; row < m; row++) {
            const float *left = a + row * a_step;
            float *to = c + row * c_step + column;
            if (two)
                block_one_two(k, left, a_step, b + column, b_step, to, c_step, add);
            else
                block_one_one(k, left, a_step, b + column, b_step, to, c_step, add);
        }
    }
}
