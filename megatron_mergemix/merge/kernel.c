/* A weighted sum in one pass over memory: fp32 accumulator in the cache, one rounding at the end.
 *
 * torch has no such operation: its own take a pass over memory per source and convert bfloat16
 * element by element. The arithmetic is that of torch (first a product, then fused multiply-adds,
 * rounding to nearest even), so the result is the same bit for bit.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* The loader picks the widest vectors that the processor has. */
#define ON_EVERY_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__FP_FAST_FMAF)
#define ON_EVERY_PROCESSOR
#else
#error "without fused multiply-add this is slower than torch, which is used instead"
#endif

enum dtype { FLOAT32 = 0, BFLOAT16 = 1 };

/* Elements per pass: the accumulator and a piece of one source stay in the first-level cache. */
#define BLOCK 2048

static inline float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t round_to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded; /* NaN stays NaN */
}

ON_EVERY_PROCESSOR
static void multiply(float *restrict total, const void *restrict source, int dtype, float weight,
                     size_t count)
{
    const float *floats = source;
    const uint16_t *halves = source;
    if (dtype == FLOAT32)
        for (size_t i = 0; i < count; i++)
            total[i] = weight * floats[i];
    else
        for (size_t i = 0; i < count; i++)
            total[i] = weight * from_bits((uint32_t)halves[i] << 16);
}

ON_EVERY_PROCESSOR
static void multiply_add(float *restrict total, const void *restrict source, int dtype,
                         float weight, size_t count)
{
    const float *floats = source;
    const uint16_t *halves = source;
    if (dtype == FLOAT32)
        for (size_t i = 0; i < count; i++)
            total[i] = __builtin_fmaf(weight, floats[i], total[i]);
    else
        for (size_t i = 0; i < count; i++)
            total[i] = __builtin_fmaf(weight, from_bits((uint32_t)halves[i] << 16), total[i]);
}

ON_EVERY_PROCESSOR
static void store(void *restrict out, int dtype, const float *restrict total, size_t count)
{
    uint16_t *halves = out;
    if (dtype == FLOAT32)
        memcpy(out, total, count * sizeof *total);
    else
        for (size_t i = 0; i < count; i++)
            halves[i] = round_to_bfloat16(total[i]);
}

/* out[i] = sum_k weights[k] * sources[k][i]; out overlaps no source. */
void weighted_sum(void *out, int out_dtype, const void *const *sources, const int *dtypes,
                  const float *weights, int num_sources, size_t count)
{
    static const size_t bytes[] = {4, 2};
    float total[BLOCK];
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t size = count - start < BLOCK ? count - start : BLOCK;
        for (int k = 0; k < num_sources; k++) {
            const char *source = (const char *)sources[k] + start * bytes[dtypes[k]];
            (k == 0 ? multiply : multiply_add)(total, source, dtypes[k], weights[k], size);
        }
        store((char *)out + start * bytes[out_dtype], out_dtype, total, size);
    }
}

/* Whether no element is NaN or infinite. */
ON_EVERY_PROCESSOR
int all_finite(const void *values, int dtype, size_t count)
{
    const uint32_t *words = values;
    const uint16_t *halves = values;
    uint32_t bad = 0;
    if (dtype == FLOAT32)
        for (size_t i = 0; i < count; i++)
            bad |= (words[i] & 0x7f800000) == 0x7f800000;
    else
        for (size_t i = 0; i < count; i++)
            bad |= (halves[i] & 0x7f80) == 0x7f80;
    return !bad;
}
