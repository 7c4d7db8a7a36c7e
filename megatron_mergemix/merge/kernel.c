/* A weighted sum in one pass over memory: fp32 sums in registers, one rounding at the end.
 *
 * torch has no such operation: its own take a pass over memory per source and convert bfloat16
 * element by element. The arithmetic is that of torch (first a product, then fused multiply-adds,
 * rounding to nearest even), so the result is the same bit for bit.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <emmintrin.h>
/* The loader picks the widest vectors that the processor has. */
#define ON_EVERY_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__FP_FAST_FMAF)
#define ON_EVERY_PROCESSOR
#else
#error "without fused multiply-add this is slower than torch, which is used instead"
#endif

#define INLINE static inline __attribute__((always_inline))

enum dtype { FLOAT32 = 0, BFLOAT16 = 1 };
static const size_t BYTES[] = {4, 2};

/* Vectors of a width that processors have. Wider ones do not become several: the compiler keeps
 * them in memory, and a sum comes at a sixth of the speed. */
#ifdef __x86_64__
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float floats __attribute__((vector_size(WIDTH)));
typedef uint32_t words __attribute__((vector_size(WIDTH)));
typedef uint16_t halves __attribute__((vector_size(WIDTH / 2)));

/* Elements of a step, and the vectors that hold them: as many sums as hide the latency of a
 * multiply-add. */
#define STEP 64
#define LANES (WIDTH / 4)
#define VECTORS (STEP / LANES)

/* How the elements of a step lie in its vectors. In order; or, where all are bfloat16, every second
 * one in a vector of its own, so that none has to change its place to become fp32 and back. */
enum order { ORDER_FLOAT32 = FLOAT32, ORDER_BFLOAT16 = BFLOAT16, EVEN_AND_ODD };

/* Sources that are read at the same time. The processor fetches ahead for about a dozen streams;
 * with more of them, sums wait in the first-level cache, a block at a time. */
#define STREAMS 10
#define BLOCK 2048

#define UPPER 0xffff0000u

/* bfloat16 in the upper half of every word: rounded to nearest even, the lower half is rubbish. */
INLINE words rounded(floats values)
{
    words bits = (words)values;
    words is_nan = (words)((bits & 0x7fffffff) > 0x7f800000); /* NaN stays NaN */
    return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~is_nan) | (0x7fc00000 & is_nan);
}

/* sums += weight * source */
INLINE void add_step(floats sums[VECTORS], const void *source, enum order order, float weight)
{
    for (int v = 0; v < VECTORS; v++) {
        if (order == ORDER_FLOAT32) {
            floats values;
            memcpy(&values, (const float *)source + v * LANES, sizeof values);
            sums[v] = weight * values + sums[v];
        } else if (order == ORDER_BFLOAT16) {
            halves values;
            memcpy(&values, (const uint16_t *)source + v * LANES, sizeof values);
            sums[v] = weight * (floats)(__builtin_convertvector(values, words) << 16) + sums[v];
        } else if (v % 2 == 0) {
            words pairs;
            memcpy(&pairs, (const uint16_t *)source + v * LANES, sizeof pairs);
            sums[v] = weight * (floats)(pairs << 16) + sums[v];
            sums[v + 1] = weight * (floats)(pairs & UPPER) + sums[v + 1];
        }
    }
}

/* Write around the cache, whose lines would first be read from memory, or through it. */
INLINE void write(void *to, const void *from, size_t bytes, int past_cache)
{
#ifdef __x86_64__
    if (past_cache) {
        for (size_t i = 0; i < bytes; i += sizeof(__m128i))
            _mm_stream_si128((__m128i *)((char *)to + i),
                             *(const __m128i *)((const char *)from + i));
        return;
    }
#endif
    memcpy(to, from, bytes);
}

INLINE void store_step(void *out, enum order order, const floats sums[VECTORS], int past_cache)
{
    if (order == ORDER_FLOAT32) {
        write(out, sums, STEP * sizeof(float), past_cache);
        return;
    }
    halves in_order[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        if (order == ORDER_BFLOAT16) {
            in_order[v] = __builtin_convertvector(rounded(sums[v]) >> 16, halves);
        } else if (v % 2 == 0) {
            words pairs = (rounded(sums[v]) >> 16) | (rounded(sums[v + 1]) & UPPER);
            memcpy(in_order + v, &pairs, sizeof pairs);
        }
    }
    write(out, in_order, sizeof in_order, past_cache);
}

/* The same for what is left of less than a step. */
INLINE void sum_rest(void *out, int out_dtype, const void *const *sources, const int *dtypes,
                     const float *weights, int num_sources, size_t start, size_t count)
{
    char padded[STEP * sizeof(float)] = {0};
    floats sums[VECTORS];
    size_t rest = count - start;
    for (int v = 0; v < VECTORS; v++)
        sums[v] = -(floats){0};
    for (int k = 0; k < num_sources; k++) {
        size_t bytes = BYTES[dtypes[k]];
        memcpy(padded, (const char *)sources[k] + start * bytes, rest * bytes);
        add_step(sums, padded, dtypes[k], weights[k]);
    }
    store_step(padded, out_dtype, sums, 0);
    memcpy((char *)out + start * BYTES[out_dtype], padded, rest * BYTES[out_dtype]);
}

INLINE void sum_whole_steps(void *out, enum order out_order, const void *const *sources,
                            const int *orders, int all_even_and_odd, const float *weights,
                            int num_sources, size_t whole, const size_t *widths, size_t out_width)
{
    floats waiting[BLOCK / LANES], sums[VECTORS];
    for (size_t start = 0; start < whole; start += BLOCK) {
        size_t stop = whole - start < BLOCK ? whole : start + BLOCK;
        for (int first = 0; first < num_sources; first += STREAMS) {
            int last = num_sources - first < STREAMS ? num_sources : first + STREAMS;
            for (size_t at = start; at < stop; at += STEP) {
                floats *kept = waiting + (at - start) / LANES;
                for (int v = 0; v < VECTORS; v++)
                    sums[v] = first == 0 ? -(floats){0} : kept[v];
                for (int k = first; k < last; k++)
                    add_step(sums, (const char *)sources[k] + at * widths[k],
                             all_even_and_odd ? EVEN_AND_ODD : (enum order)orders[k], weights[k]);
                if (last == num_sources)
                    store_step((char *)out + at * out_width, out_order, sums, 0);
                else
                    memcpy(kept, sums, sizeof sums);
            }
        }
    }
}

/* out[i] = sum_k weights[k] * sources[k][i]; out overlaps no source. Multiply and add are fused
 * by the compiler, see setup.py; a sum begins at -0, which adds nothing to any number. */
ON_EVERY_PROCESSOR
void weighted_sum(void *out, int out_dtype, const void *const *sources, const int *dtypes,
                  const float *weights, int num_sources, size_t count)
{
    size_t whole = count - count % STEP, widths[num_sources];
    int all_bfloat16 = out_dtype == BFLOAT16;
    for (int k = 0; k < num_sources; k++) {
        widths[k] = BYTES[dtypes[k]];
        all_bfloat16 &= dtypes[k] == BFLOAT16;
    }
    if (all_bfloat16)
        sum_whole_steps(out, EVEN_AND_ODD, sources, dtypes, 1, weights, num_sources, whole, widths,
                        BYTES[out_dtype]);
    else
        sum_whole_steps(out, (enum order)out_dtype, sources, dtypes, 0, weights, num_sources, whole,
                        widths, BYTES[out_dtype]);
    if (whole < count)
        sum_rest(out, out_dtype, sources, dtypes, weights, num_sources, whole, count);
}

/* Flat copies of a model, interleaved: a block of the first copy, the same block of the second, and
 * so on. However many copies are summed, memory is read from one place to the next; copies that lie
 * apart come at half the speed or less. */
struct copies {
    const char *memory;
    int dtype, num; /* num: of copies, also those that are not summed */
};

/* Bytes of a block, and how many copies are read at the same time: with more of them the processor
 * fetches too little ahead, with fewer it sums too slowly. Sums of the copies before wait in the
 * first-level cache. */
#define COPY_BLOCK 8192
#define AT_ONCE 5

#define CACHE_LINE 64

INLINE void fetch(const char *from, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += CACHE_LINE)
        __builtin_prefetch(from + i, 0, 2); /* to read, into the second-level cache */
}

/* count is at most a block and a multiple of STEP; to_next: bytes to the next block of a copy. */
INLINE void sum_block(void *out, enum order order, size_t width, const void *const *sources,
                      const float *weights, int num_sources, size_t count, size_t to_next)
{
    floats sums[VECTORS], waiting[COPY_BLOCK / sizeof(uint16_t) / LANES];
    int groups = (num_sources + AT_ONCE - 1) / AT_ONCE;
    int in_group = (num_sources + groups - 1) / groups;
    for (int first = 0; first < num_sources; first += in_group) {
        int last = num_sources - first < in_group ? num_sources : first + in_group;
        for (size_t at = 0; at < count; at += STEP) {
            floats *kept = waiting + at / LANES;
            for (int v = 0; v < VECTORS; v++)
                sums[v] = first == 0 ? -(floats){0} : kept[v];
            for (int k = first; k < last; k++) {
                const char *source = (const char *)sources[k] + at * width;
                fetch(source + to_next, STEP * width);
                add_step(sums, source, order, weights[k]);
            }
            if (last == num_sources)
                store_step((char *)out + at * width, order, sums, (uintptr_t)out % 16 == 0);
            else
                for (int v = 0; v < VECTORS; v++)
                    kept[v] = sums[v];
        }
    }
}

/* Write sums of copies into many tensors. Tensor i has counts[i] elements at outs[i]; in a copy it
 * begins at element starts[i], a multiple of STEP. chosen and weights say which copies are summed. */
ON_EVERY_PROCESSOR
void weighted_sums(void *const *outs, const size_t *starts, const size_t *counts, int num_outs,
                   struct copies copies, const int *chosen, const float *weights, int num_chosen)
{
    size_t bytes = BYTES[copies.dtype], size = COPY_BLOCK / bytes;
    const void *sources[num_chosen];
    int dtypes[num_chosen];
    for (int i = 0; i < num_outs; i++)
        for (size_t done = 0; done < counts[i];) {
            size_t block = (starts[i] + done) / size, at = (starts[i] + done) % size;
            size_t count = size - at;
            if (count > counts[i] - done)
                count = counts[i] - done;
            size_t whole = count - count % STEP;
            char *out = (char *)outs[i] + done * bytes;
            for (int k = 0; k < num_chosen; k++) {
                size_t place = (block * copies.num + chosen[k]) * size + at;
                sources[k] = copies.memory + place * bytes;
                dtypes[k] = copies.dtype;
            }
            if (copies.dtype == FLOAT32)
                sum_block(out, ORDER_FLOAT32, sizeof(float), sources, weights, num_chosen, whole,
                          copies.num * COPY_BLOCK);
            else
                sum_block(out, EVEN_AND_ODD, sizeof(uint16_t), sources, weights, num_chosen, whole,
                          copies.num * COPY_BLOCK);
            if (whole < count)
                sum_rest(out, copies.dtype, sources, dtypes, weights, num_chosen, whole, count);
            done += count;
        }
#ifdef __x86_64__
    _mm_sfence(); /* before another thread reads */
#endif
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
