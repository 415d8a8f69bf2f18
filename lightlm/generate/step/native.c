// The forward pass of a few tokens: a list of operations that all threads walk through together.
//
// native.py compiles this file, program.py makes the list. Activations are fp32 whatever the weights are. Threads share
// the rows of a matrix between them, always in the same way, and wait for one another where an operation has `wait`.
//
// Shapes: N tokens, D features in, F features out, H query heads, G key and value heads, K head size, E experts,
// X experts of a token.

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_VECTORS  // of 16 fp32 numbers; compilers convert int8 in more steps than are needed
#ifdef __AVX512BF16__
#define HAS_PAIRS  // products of pairs of bf16 numbers, twice as many at a time as of fp32 numbers
#endif
#endif

// Declared here, since omp.h is not installed beside every compiler.
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

enum { FLOAT32, BFLOAT16, INT8 };                        // Matrix.type
enum { EMBED, NORM, LINEAR, SWIGLU, HEADS, ATTEND, ROUTE };  // Op.kind
enum { NOTHING, GELU, RELU2, GELU_ERF };                 // Op.mode of LINEAR
enum { RMS, LAYER };                                     // Op.mode of NORM
enum { SIGMOID, SOFTMAX, SIGMOID_NORMALIZED, SOFTMAX_NORMALIZED };  // Op.mode of ROUTE
enum { BLOCK = 4 };                                      // rows of a matrix that are multiplied together
enum { FETCHED_AHEAD = 8192 };                           // bytes; 4,096 to 10,000 are equally good

typedef struct {
    const void *numbers;  // (F, D)
    const float *scale;   // (F), of int8
    const float *bias;    // (F) or null
    int64_t type, rows, columns;
} Matrix;

typedef struct {
    int64_t kind, mode, wait;
    int64_t layer, window;        // HEADS, ATTEND
    int64_t routed;               // LINEAR, SWIGLU: one matrix per expert
    int64_t add;                  // LINEAR: add to `out` what others overwrite it with
    const Matrix *matrices;       // EMBED: tokens and positions; ROUTE: the router
    const float *weight, *bias;   // NORM: (D); HEADS: norms (H + G, K) or null; ROUTE: (E) added for the choice or null
    const float *frequencies;     // HEADS: (K / 2), or null without rotary positions
    float *in, *out;              // rows of tokens; null means the thread's own, which NORM writes
    float factor, eps;
} Op;

typedef struct {
    int64_t tokens, width, heads, groups, size, gated, experts, choices, threads;
    const int64_t *ids, *rows, *positions;  // (N): tokens, their rows in the cache and their positions
    char *cache;                            // (layers, rows, 2, G, slots, K)
    int64_t cache_type, layer_step, row_step, pair_step, group_step;  // steps in elements
    float *own;                             // what each thread needs for itself
    int64_t own_step, widest;
} Call;

// A thread's own memory.
typedef struct {
    float *x;          // (N, D): normalized
    float *decoded;    // (BLOCK, D): rows of a matrix
    uint16_t *pairs;   // (N X, D up to whole vectors): what `block` multiplies, in bf16
    float *gate, *up;  // (N X, BLOCK)
    float *scores;     // (slots) or (E)
    float *weights;    // (N X): of each choice, sorted by expert
    int32_t *tokens, *choices, *starts;  // (N X), (N X), (E + 1): rows of tokens and of choices, sorted by expert
    int thread, threads;
} Own;

static inline float from_bfloat16(uint16_t number) {
    uint32_t bits = (uint32_t)number << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Within 2e-7 of exp, relatively; the compiler turns it into vector code.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float power = rintf(x * 1.44269504f);
    float y = (x - power * 0.693359375f) + power * 2.12194440e-4f;
    float sum = 1 / 5040.0f;  // of y^k / k!
    sum = 1 / 720.0f + y * sum, sum = 1 / 120.0f + y * sum, sum = 1 / 24.0f + y * sum, sum = 1 / 6.0f + y * sum;
    sum = 0.5f + y * sum, sum = 1 + y * sum, sum = 1 + y * sum;
    int32_t bits = ((int32_t)power + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return sum * scale;
}

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

static void activate(float *x, int64_t count, int64_t mode) {
    if (mode == RELU2) {
        for (int64_t i = 0; i < count; i++) x[i] = x[i] <= 0 ? 0 : x[i] * x[i];
    } else if (mode == GELU) {
        for (int64_t i = 0; i < count; i++) x[i] *= sigmoid(1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    } else if (mode == GELU_ERF) {
        for (int64_t i = 0; i < count; i++) x[i] *= 0.5f * (1 + erff(0.7071067812f * x[i]));
    }
}

// The part of `count` that a thread works on: [*first, *last), in whole blocks.
static void share(int64_t count, int64_t block, const Own *own, int64_t *first, int64_t *last) {
    int64_t blocks = (count + block - 1) / block;
    *first = blocks * own->thread / own->threads * block;
    *last = blocks * (own->thread + 1) / own->threads * block;
    if (*last > count) *last = count;
}

// Ask early for rows that come later: rows are too short for the processor to notice that memory is read in order.
static inline void fetch(const void *rows, int64_t bytes) {
    const char *ahead = (const char *)rows + FETCHED_AHEAD;
    for (int64_t place = 0; place < bytes; place += 64) __builtin_prefetch(ahead + place);
}

// BLOCK rows of a matrix times one vector.
#define DOTS(NAME, TYPE, VALUE)                                                                                \
    static void NAME(const TYPE *a, const TYPE *b, const TYPE *c, const TYPE *d, int64_t columns,              \
                     const float *restrict x, float *restrict out) {                                          \
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                                  \
        for (int64_t i = 0; i < columns; i++) {              \
            float v = x[i];                                                                                    \
            s0 += VALUE(a[i]) * v, s1 += VALUE(b[i]) * v, s2 += VALUE(c[i]) * v, s3 += VALUE(d[i]) * v;        \
        }                                                                                                      \
        out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;                                                    \
    }
#define SAME(number) (number)
DOTS(dots_float32, float, SAME)
#ifdef HAS_VECTORS
static inline __m512 widened_int8(const int8_t *from, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from)));
}

static inline __m512 widened_bfloat16(const uint16_t *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

static inline __mmask16 mask_of(int64_t left) { return left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0; }

// Two sums per row, so that additions need not wait for one another.
#define VECTOR_DOTS(NAME, TYPE, WIDENED)                                                                       \
    static void NAME(const TYPE *a, const TYPE *b, const TYPE *c, const TYPE *d, int64_t columns,              \
                     const float *x, float *out) {                                                             \
        const TYPE *w[BLOCK] = {a, b, c, d};                                                                   \
        __m512 sums[BLOCK], others[BLOCK];                                                                     \
        for (int i = 0; i < BLOCK; i++) sums[i] = others[i] = _mm512_setzero_ps();                             \
        int64_t at = 0;                                                                                        \
        for (; at + 32 <= columns; at += 32) {                                                                 \
            __m512 v = _mm512_loadu_ps(x + at), u = _mm512_loadu_ps(x + at + 16);                              \
            for (int i = 0; i < BLOCK; i++) {                                                                  \
                sums[i] = _mm512_fmadd_ps(WIDENED(w[i] + at, 0xffff), v, sums[i]);                             \
                others[i] = _mm512_fmadd_ps(WIDENED(w[i] + at + 16, 0xffff), u, others[i]);                    \
            }                                                                                                  \
        }                                                                                                      \
        for (; at < columns; at += 16) {                                                                       \
            __mmask16 mask = mask_of(columns - at);                                                            \
            __m512 v = _mm512_maskz_loadu_ps(mask, x + at);                                                    \
            for (int i = 0; i < BLOCK; i++) sums[i] = _mm512_fmadd_ps(WIDENED(w[i] + at, mask), v, sums[i]);   \
        }                                                                                                      \
        for (int i = 0; i < BLOCK; i++) out[i] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i], others[i]));      \
    }
VECTOR_DOTS(dots_bfloat16, uint16_t, widened_bfloat16)
VECTOR_DOTS(dots_int8, int8_t, widened_int8)
#else
DOTS(dots_bfloat16, uint16_t, from_bfloat16)
DOTS(dots_int8, int8_t, SAME)
#endif

// BLOCK rows of a matrix times two vectors; numbers in registers are used twice.
static void dots_of_two(const float *const w[BLOCK], int64_t columns, const float *restrict x, const float *restrict y,
                        float *restrict out) {
    const float *a = w[0], *b = w[1], *c = w[2], *d = w[3];
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
    for (int64_t i = 0; i < columns; i++) {
        float v = x[i], u = y[i];
        s0 += a[i] * v, s1 += b[i] * v, s2 += c[i] * v, s3 += d[i] * v;
        t0 += a[i] * u, t1 += b[i] * u, t2 += c[i] * u, t3 += d[i] * u;
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
    out[4] = t0, out[5] = t1, out[6] = t2, out[7] = t3;
}

#ifdef HAS_PAIRS
// BLOCK rows of a bf16 matrix times `count` (a constant, at most 4) bf16 vectors, which lie `step` numbers apart.
static inline __attribute__((always_inline)) void dots_of_pairs(const uint16_t *const w[BLOCK], int64_t columns,
                                                                const uint16_t *x, int64_t step, const int count,
                                                                float *out) {
    __m512 sums[4][BLOCK];
    for (int n = 0; n < count; n++)
        for (int i = 0; i < BLOCK; i++) sums[n][i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < columns; c += 32) {
        __mmask32 mask = columns - c >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (columns - c)) - 1;
        __m512bh rows[BLOCK];
        for (int i = 0; i < BLOCK; i++) rows[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[i] + c);
        for (int n = 0; n < count; n++) {
            __m512bh v = (__m512bh)_mm512_loadu_si512(x + n * step + c);
            for (int i = 0; i < BLOCK; i++) sums[n][i] = _mm512_dpbf16_ps(sums[n][i], rows[i], v);
        }
    }
    for (int n = 0; n < count; n++)
        for (int i = 0; i < BLOCK; i++) out[n * BLOCK + i] = _mm512_reduce_add_ps(sums[n][i]);
}
#endif

static int64_t bytes_of(int64_t type) { return type == INT8 ? 1 : type == BFLOAT16 ? 2 : 4; }

static void decode(const Matrix *m, int64_t row, float *restrict out) {
    int64_t columns = m->columns;
    if (m->type == INT8) {
        const int8_t *from = (const int8_t *)m->numbers + row * columns;
        for (int64_t i = 0; i < columns; i++) out[i] = from[i];
    } else if (m->type == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)m->numbers + row * columns;
        for (int64_t i = 0; i < columns; i++) out[i] = from_bfloat16(from[i]);
    } else {
        memcpy(out, (const float *)m->numbers + row * columns, columns * sizeof(float));
    }
}

// What `block` multiplies: rows of fp32 numbers, or their copy in bf16 where such products are faster.
typedef struct {
    const float *x;        // (lines, D)
    const int32_t *lines;  // which rows, or null for the first ones
    int64_t count;
    int in_pairs;
} Vectors;

static int64_t whole(int64_t columns) { return (columns + 31) / 32 * 32; }

static Vectors vectors(const Matrix *m, const float *x, const int32_t *lines, int64_t count, const Own *own) {
    Vectors v = {x, lines, count, 0};
#ifdef HAS_PAIRS
    if (count > 1 && m->type != FLOAT32) {
        int64_t columns = m->columns;
        v.in_pairs = 1;
        for (int64_t n = 0; n < count; n++) {
            const float *from = x + (lines ? lines[n] : n) * columns;
            uint16_t *to = own->pairs + n * whole(columns);
            for (int64_t c = 0; c < whole(columns); c += 16) {
                __m512 numbers = _mm512_maskz_loadu_ps(mask_of(columns - c), from + c);
                _mm256_storeu_si256((__m256i *)(to + c), (__m256i)_mm512_cvtneps_pbh(numbers));
            }
        }
    }
#else
    (void)m, (void)own;
#endif
    return v;
}

static void dots_in_pairs(const Matrix *m, const int64_t *r, const Vectors *v, float *out, const Own *own) {
#ifdef HAS_PAIRS
    int64_t columns = m->columns, step = whole(columns), n = 0;
    const uint16_t *w[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        w[i] = (const uint16_t *)m->numbers + r[i];
        if (m->type == INT8) {
            const int8_t *from = (const int8_t *)m->numbers + r[i];
            uint16_t *to = (uint16_t *)own->decoded + i * step;
            for (int64_t c = 0; c < columns; c += 16) {
                __m512 numbers = widened_int8(from + c, mask_of(columns - c));
                _mm256_storeu_si256((__m256i *)(to + c), (__m256i)_mm512_cvtneps_pbh(numbers));
            }
            w[i] = to;
        }
    }
    const uint16_t *x = own->pairs;
    for (; n + 4 <= v->count; n += 4) dots_of_pairs(w, columns, x + n * step, step, 4, out + n * BLOCK);
    if (v->count - n == 3) dots_of_pairs(w, columns, x + n * step, step, 3, out + n * BLOCK);
    if (v->count - n == 2) dots_of_pairs(w, columns, x + n * step, step, 2, out + n * BLOCK);
    if (v->count - n == 1) dots_of_pairs(w, columns, x + n * step, step, 1, out + n * BLOCK);
#else
    (void)m, (void)r, (void)v, (void)out, (void)own;
#endif
}

static void dots_in_floats(const Matrix *m, const int64_t *r, const Vectors *v, float *out, const Own *own) {
    int64_t columns = m->columns, n = 0;
    const int32_t *lines = v->lines;
    const float *w[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        w[i] = (const float *)m->numbers + r[i];
        if (m->type != FLOAT32) {
            float *to = own->decoded + i * columns;
            decode(m, r[i] / columns, to);
            w[i] = to;
        }
    }
    for (; n + 1 < v->count; n += 2) {
        const float *first = v->x + (lines ? lines[n] : n) * columns;
        const float *second = v->x + (lines ? lines[n + 1] : n + 1) * columns;
        dots_of_two(w, columns, first, second, out + n * BLOCK);
    }
    if (n < v->count) {
        const float *x = v->x + (lines ? lines[n] : n) * columns;
        dots_float32(w[0], w[1], w[2], w[3], columns, x, out + n * BLOCK);
    }
}

// Multiply rows [row, row + BLOCK) of a matrix by vectors: out (count, BLOCK). Rows past `last` repeat the one before.
static void block(const Matrix *m, int64_t row, int64_t last, const Vectors *v, float *out, const Own *own) {
    int64_t columns = m->columns, bytes = bytes_of(m->type), f[BLOCK], r[BLOCK];
    for (int i = 0; i < BLOCK; i++) f[i] = row + i < last ? row + i : last - 1, r[i] = f[i] * columns;
    fetch((const char *)m->numbers + r[0] * bytes, BLOCK * columns * bytes);
    if (v->in_pairs) {
        dots_in_pairs(m, r, v, out, own);
    } else if (v->count > 1 || m->type == FLOAT32) {
        dots_in_floats(m, r, v, out, own);
    } else {
        const float *x = v->x + (v->lines ? v->lines[0] : 0) * columns;
        if (m->type == INT8) {
            const int8_t *w = m->numbers;
            dots_int8(w + r[0], w + r[1], w + r[2], w + r[3], columns, x, out);
        } else {
            const uint16_t *w = m->numbers;
            dots_bfloat16(w + r[0], w + r[1], w + r[2], w + r[3], columns, x, out);
        }
    }
    if (!m->scale && !m->bias) return;
    for (int i = 0; i < BLOCK; i++) {
        float scale = m->scale ? m->scale[f[i]] : 1, bias = m->bias ? m->bias[f[i]] : 0;
        for (int64_t n = 0; n < v->count; n++) out[n * BLOCK + i] = out[n * BLOCK + i] * scale + bias;
    }
}

static void embed(const Call *call, const Op *op, const Own *own) {
    int64_t first, last, width = call->width;
    share(call->tokens, 1, own, &first, &last);
    for (int64_t n = first; n < last; n++) {
        float *out = op->out + n * width;
        decode(&op->matrices[0], call->ids[n], out);
        for (int64_t i = 0; i < width; i++) out[i] *= op->factor;
        if (op->matrices[1].numbers) {
            float position[width];
            decode(&op->matrices[1], call->positions[n], position);
            for (int64_t i = 0; i < width; i++) out[i] += position[i];
        }
    }
}

static void normalize(const float *x, const float *weight, const float *bias, int64_t width, float eps, int64_t mode,
                      float *out) {
    float mean = 0, square = 0;
    if (mode == LAYER) {
        for (int64_t i = 0; i < width; i++) mean += x[i];
        mean /= width;
    }
    for (int64_t i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(square / width + eps);
    for (int64_t i = 0; i < width; i++) out[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
}

static void norm(const Call *call, const Op *op, const Own *own) {
    int64_t first = 0, last = call->tokens;  // each thread needs all of them
    if (op->out) share(call->tokens, 1, own, &first, &last);
    float *out = op->out ? op->out : own->x;
    for (int64_t n = first; n < last; n++)
        normalize(op->in + n * call->width, op->weight, op->bias, call->width, op->eps, op->mode, out + n * call->width);
}

static void linear(const Call *call, const Op *op, const Own *own) {
    const float *in = op->in ? op->in : own->x;
    int64_t first, last, rows = op->matrices[0].rows, experts = op->routed ? call->experts : 1;
    share(rows, BLOCK, own, &first, &last);
    for (int64_t e = 0; e < experts; e++) {
        int64_t start = op->routed ? own->starts[e] : 0, count = op->routed ? own->starts[e + 1] - start : call->tokens;
        if (count == 0) continue;
        Vectors v = vectors(&op->matrices[e], in, op->routed ? own->choices + start : 0, count, own);
        for (int64_t f = first; f < last; f += BLOCK) {
            block(&op->matrices[e], f, last, &v, own->gate, own);
            if (op->mode != NOTHING) activate(own->gate, count * BLOCK, op->mode);
            int64_t part = last - f < BLOCK ? last - f : BLOCK;
            for (int64_t n = 0; n < count; n++) {
                float *out = op->out + (op->routed ? own->tokens[start + n] : n) * rows + f;
                const float *y = own->gate + n * BLOCK;
                if (op->add) {
                    for (int64_t i = 0; i < part; i++) out[i] += op->factor * y[i];
                } else {
                    for (int64_t i = 0; i < part; i++) out[i] = op->factor * y[i];
                }
            }
        }
    }
}

// silu(gate) * up; the rows of `up` follow those of `gate`.
static void swiglu(const Call *call, const Op *op, const Own *own) {
    const float *in = op->in ? op->in : own->x;
    int64_t first, last, rows = op->matrices[0].rows / 2, experts = op->routed ? call->experts : 1;
    share(rows, BLOCK, own, &first, &last);
    for (int64_t e = 0; e < experts; e++) {
        int64_t start = op->routed ? own->starts[e] : 0, count = op->routed ? own->starts[e + 1] - start : call->tokens;
        if (count == 0) continue;
        Vectors v = vectors(&op->matrices[e], in, op->routed ? own->tokens + start : 0, count, own);
        for (int64_t f = first; f < last; f += BLOCK) {
            block(&op->matrices[e], f, last, &v, own->gate, own);
            block(&op->matrices[e], rows + f, rows + last, &v, own->up, own);
            int64_t part = last - f < BLOCK ? last - f : BLOCK;
            for (int64_t n = 0; n < count; n++) {
                float *out = op->out + (op->routed ? own->choices[start + n] : n) * rows + f;
                float factor = op->routed ? own->weights[start + n] : 1;
                for (int64_t i = 0; i < part; i++) {
                    float gate = own->gate[n * BLOCK + i];
                    out[i] = gate * sigmoid(gate) * own->up[n * BLOCK + i] * factor;
                }
            }
        }
    }
}

// Normalize and rotate queries and keys (N, H + 2 G [+ H], K) in place; store keys and values.
static void heads(const Call *call, const Op *op, const Own *own) {
    int64_t first, last, size = call->size, half = size / 2, queries = call->heads, groups = call->groups;
    int64_t stored = queries + 2 * groups, all = stored + (call->gated ? queries : 0);
    share(call->tokens * stored, 1, own, &first, &last);
    for (int64_t item = first; item < last; item++) {
        int64_t n = item / stored, head = item % stored;
        float *x = op->in + (n * all + head) * size;
        if (head < queries + groups) {
            if (op->weight) normalize(x, op->weight + head * size, 0, size, op->eps, RMS, x);
            if (op->frequencies) {
                for (int64_t i = 0; i < half; i++) {
                    float angle = (float)call->positions[n] * op->frequencies[i];
                    float cosine = cosf(angle), sine = sinf(angle), a = x[i], b = x[i + half];
                    x[i] = a * cosine - b * sine;
                    x[i + half] = b * cosine + a * sine;
                }
            }
        }
        if (head >= queries) {
            int64_t pair = head >= queries + groups, group = head - queries - pair * groups;
            int64_t place = op->layer * call->layer_step + call->rows[n] * call->row_step + pair * call->pair_step +
                            group * call->group_step + call->positions[n] * size;
            if (call->cache_type == FLOAT32) {
                memcpy((float *)call->cache + place, x, size * sizeof(float));
            } else {
                uint16_t *out = (uint16_t *)call->cache + place;
                for (int64_t i = 0; i < size; i++) out[i] = to_bfloat16(x[i]);
            }
        }
    }
}

#define ATTENTION(NAME, TYPE, VALUE)                                                                                \
    static void NAME(const TYPE *keys, const TYPE *values, int64_t count, int64_t size, const float *q,             \
                     float *restrict scores, float *restrict out) {                                                \
        float most = -INFINITY, sum = 0, scale = 1 / sqrtf((float)size);                                            \
        for (int64_t s = 0; s < count; s++) {                                                                       \
            float dot = 0;                                                                                          \
            const TYPE *key = keys + s * size;                                                                      \
            for (int64_t i = 0; i < size; i++) dot += q[i] * VALUE(key[i]);  \
            scores[s] = dot * scale;                                                                                \
        }                                                                                                           \
        for (int64_t s = 0; s < count; s++) most = scores[s] > most ? scores[s] : most;                             \
        for (int64_t s = 0; s < count; s++) {                                \
            scores[s] = exponential(scores[s] - most);                                                              \
            sum += scores[s];                                                                                       \
        }                                                                                                           \
        for (int64_t i = 0; i < size; i++) out[i] = 0;                                                              \
        for (int64_t s = 0; s < count; s++) {                                                                       \
            const TYPE *value = values + s * size;                                                                  \
            float share = scores[s] / sum;                                                                          \
            for (int64_t i = 0; i < size; i++) out[i] += share * VALUE(value[i]);                                   \
        }                                                                                                           \
    }
ATTENTION(attention_float32, float, SAME)
ATTENTION(attention_bfloat16, uint16_t, from_bfloat16)

static void attend(const Call *call, const Op *op, const Own *own) {
    int64_t first, last, size = call->size, queries = call->heads, shared = queries / call->groups;
    int64_t all = queries + 2 * call->groups + (call->gated ? queries : 0);
    share(call->tokens * queries, 1, own, &first, &last);
    for (int64_t item = first; item < last; item++) {
        int64_t n = item / queries, head = item % queries, end = call->positions[n] + 1;
        int64_t begin = op->window && end > op->window ? end - op->window : 0;
        int64_t place = op->layer * call->layer_step + call->rows[n] * call->row_step +
                        head / shared * call->group_step + begin * size;
        const float *x = op->in + n * all * size;
        float *out = op->out + (n * queries + head) * size;
        if (call->cache_type == FLOAT32) {
            const float *keys = (const float *)call->cache + place;
            attention_float32(keys, keys + call->pair_step, end - begin, size, x + head * size, own->scores, out);
        } else {
            const uint16_t *keys = (const uint16_t *)call->cache + place;
            attention_bfloat16(keys, keys + call->pair_step, end - begin, size, x + head * size, own->scores, out);
        }
        if (call->gated) {
            const float *gate = x + (queries + 2 * call->groups + head) * size;
            for (int64_t i = 0; i < size; i++) out[i] *= sigmoid(gate[i]);
        }
    }
}

// Choose experts for each token and sort the choices by expert. Every thread does it for itself.
static void route(const Call *call, const Op *op, const Own *own) {
    int64_t experts = call->experts, choices = call->choices, pairs = call->tokens * choices;
    int32_t chosen[pairs];
    float weights[pairs], choice[experts], *scores = own->scores;
    for (int64_t n = 0; n < call->tokens; n++) {
        float sum = 0, most = -INFINITY;
        for (int64_t e = 0; e < experts; e += BLOCK) {
            float part[BLOCK];
            Vectors v = {own->x + n * call->width, 0, 1, 0};
            block(op->matrices, e, experts, &v, part, own);
            for (int64_t i = 0; i < BLOCK && e + i < experts; i++) scores[e + i] = part[i];
        }
        for (int64_t e = 0; e < experts; e++) most = scores[e] > most ? scores[e] : most;
        for (int64_t e = 0; e < experts; e++) {
            int soft = op->mode == SOFTMAX || op->mode == SOFTMAX_NORMALIZED;
            scores[e] = soft ? exponential(scores[e] - most) : sigmoid(scores[e]);
            sum += soft ? scores[e] : 0;
        }
        for (int64_t e = 0; e < experts && sum > 0; e++) scores[e] /= sum;
        for (int64_t e = 0; e < experts; e++) choice[e] = scores[e] + (op->bias ? op->bias[e] : 0);
        sum = 0;
        for (int64_t k = 0; k < choices; k++) {
            int64_t best = -1;
            for (int64_t e = 0; e < experts; e++)
                if (choice[e] > -INFINITY && (best < 0 || choice[e] > choice[best])) best = e;
            if (best < 0) best = k;  // all are NaN
            choice[best] = -INFINITY;
            chosen[n * choices + k] = best;
            weights[n * choices + k] = scores[best];
            sum += scores[best];
        }
        float factor = op->factor;
        if (op->mode == SIGMOID_NORMALIZED || op->mode == SOFTMAX_NORMALIZED) factor /= sum + 1e-20f;
        for (int64_t k = 0; k < choices; k++) weights[n * choices + k] *= factor;
    }
    int32_t place = 0;
    for (int64_t e = 0; e < experts; e++) {
        own->starts[e] = place;
        for (int64_t pair = 0; pair < pairs; pair++) {
            if (chosen[pair] != e) continue;
            own->tokens[place] = pair / choices;
            own->choices[place] = pair;
            own->weights[place++] = weights[pair];
        }
    }
    own->starts[experts] = place;
}

static void (*const operations[])(const Call *, const Op *, const Own *) = {
    [EMBED] = embed,   [NORM] = norm,     [LINEAR] = linear, [SWIGLU] = swiglu,
    [HEADS] = heads,   [ATTEND] = attend, [ROUTE] = route,
};

static Own own_of(const Call *call, int thread, int threads) {
    Own own = {.thread = thread, .threads = threads};
    int64_t choices = call->choices > 0 ? call->choices : 1, pairs = call->tokens * choices;
    float *next = call->own + thread * call->own_step;
    own.x = next, next += call->tokens * call->width;
    own.decoded = next, next += BLOCK * whole(call->widest);
    own.pairs = (uint16_t *)next, next += pairs * whole(call->widest) / 2;
    own.gate = next, next += pairs * BLOCK;
    own.up = next, next += pairs * BLOCK;
    own.weights = next, next += pairs;
    own.tokens = (int32_t *)next, next += pairs;
    own.choices = (int32_t *)next, next += pairs;
    own.starts = (int32_t *)next, next += call->experts + 1;
    own.scores = next;  // the rest
    return own;
}

// Return 1, without computing anything, if a token is not in the table.
int run(const Op *ops, int64_t count, const Call *call) {
    for (int64_t n = 0; n < call->tokens && ops[0].kind == EMBED; n++)
        if (call->ids[n] < 0 || call->ids[n] >= ops[0].matrices[0].rows) return 1;
#pragma omp parallel num_threads((int)call->threads)
    {
        Own own = own_of(call, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t i = 0; i < count; i++) {
            operations[ops[i].kind](call, &ops[i], &own);
            if (ops[i].wait) {
#pragma omp barrier
            }
        }
    }
    return 0;
}
