/* The functions that a network's C file is made of: convolutions of bits and of floats, binary activations, pooling.

   export_c.py copies this text into every C file that it writes, with the network's name in place of "bnn", so several
   networks can be parts of one program. It is C99. On x86-64 (gcc, clang) the main functions have three versions, for
   AVX-512 with VPOPCNTDQ, for AVX2 and in plain C, and bnn_unit selects one. 64-bit ARM uses NEON, all other machines
   plain C. All versions give equal bits.

   Bits       [height][width][bytes]: channel c of a pixel is bit c % 8 of byte c / 8. Bits past the last channel are 0.
   Floats     [height][width][channels].
   Weights    [block of 16 filters][ky][kx ...][16 filters]. A vector register contains 16 filters, and the values of a
              pixel are broadcast to all of them, so no sum runs across a register.

   The bits of the pixels under one row of a kernel are contiguous. They are read as words of 32 bits, of which the last
   one is used in part. The weights of a convolution of bits are [block][ky][word][plane][16]. The mode says what a bit
   means:

       XNOR     activation 1: +1, 0: -1     weight 1: +1, 0: -1
       AND      activation 1: +1, 0:  0     weight 1: +1, 0: -1
       MASKED   as XNOR, and the weights have a second plane, in which 0 means that the weight is 0

   The results are integers. For activations a, weights w, second plane m and n taps inside the image:

       XNOR     sum = n channels - 2 popcount(a ^ w)
       AND      sum = 2 popcount(a & w) - popcount(a)
       MASKED   sum = popcount(m) - 2 popcount((a ^ w) & m)

   Padding is neither +1 nor -1. Taps outside the image are left out, so n depends on the pixel. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __GNUC__
#define BNN_FUNCTION static __attribute__((unused))
#define BNN_SEPARATE static __attribute__((noinline, unused))
#define BNN_INLINE static inline __attribute__((always_inline, unused))
#else
#define BNN_FUNCTION static
#define BNN_INLINE static inline
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define BNN_UNROLL _Pragma("GCC unroll 8")
#else
#define BNN_UNROLL
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define BNN_X86
#include <immintrin.h>
#define BNN_ALIGNED __attribute__((aligned(64))) /* a load that crosses a cache line takes twice the time */
#define BNN_AVX2 __attribute__((target("avx2,fma")))
#define BNN_AVX512_UNITS "avx512f,avx512vl,avx512dq,avx512bw,avx512vpopcntdq,avx2,fma,popcnt"
#ifdef __clang__
#define BNN_AVX512 __attribute__((target(BNN_AVX512_UNITS)))
#else /* with -march=native, gcc may prefer vectors of 256 bits or tune for a processor without AVX-512 */
#define BNN_AVX512 __attribute__((target(BNN_AVX512_UNITS ",prefer-vector-width=512,tune=generic")))
#endif
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define BNN_NEON
#include <arm_neon.h>
#endif
#ifndef BNN_ALIGNED
#define BNN_ALIGNED
#endif

enum { BNN_PLAIN, BNN_WITH_AVX2, BNN_WITH_AVX512 };

/* The kinds of convolutions: three modes of bits (see above), and three kinds of weights for activations that are
   floats. Only the kinds in BNN_KINDS are compiled. */
enum { BNN_XNOR, BNN_AND, BNN_MASKED, BNN_FLOAT, BNN_SIGN, BNN_SIGN_OR_0 };
#ifndef BNN_KINDS
#define BNN_KINDS 63
#endif
#define BNN_HAS(kind) (BNN_KINDS >> (kind) & 1)

/* The best unit of this machine. */
BNN_FUNCTION int bnn_best_unit(void) {
#ifdef BNN_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return BNN_WITH_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return BNN_WITH_AVX2;
#endif
    return BNN_PLAIN;
}

static int bnn_unit = -1; /* the unit in use. -1: not yet set by bnn_best_unit() */

/* Make a function for each unit from the inline function name_on(unit, ...), and one that calls the one of bnn_unit. */
#ifdef BNN_X86
#define BNN_FOR_EACH_UNIT(name, parameters, ...)                                                     \
    BNN_FUNCTION BNN_AVX512 void name##_avx512 parameters { name##_on(BNN_WITH_AVX512, __VA_ARGS__); } \
    BNN_FUNCTION BNN_AVX2 void name##_avx2 parameters { name##_on(BNN_WITH_AVX2, __VA_ARGS__); }       \
    BNN_FUNCTION void name parameters {                                                              \
        if (bnn_unit == BNN_WITH_AVX512)                                                             \
            name##_avx512(__VA_ARGS__);                                                              \
        else if (bnn_unit == BNN_WITH_AVX2)                                                          \
            name##_avx2(__VA_ARGS__);                                                                \
        else                                                                                         \
            name##_on(BNN_PLAIN, __VA_ARGS__);                                                       \
    }
#else
#define BNN_FOR_EACH_UNIT(name, parameters, ...) \
    BNN_FUNCTION void name parameters { name##_on(BNN_PLAIN, __VA_ARGS__); }
#endif

/* a * b + c, rounded once, as PyTorch's convolutions and BatchNorms compute it on most machines. If the network has
   binary activations, one rounding is needed, because the last digit of a result can change a bit. Otherwise
   (BNN_ONE_ROUNDING is 0) a machine without such an instruction may round twice. gcc defines __FP_FAST_FMAF even if
   the C library does not define FP_FAST_FMAF. */
#ifndef BNN_ONE_ROUNDING
#define BNN_ONE_ROUNDING 1
#endif
BNN_INLINE float bnn_muladd(const int unit, float a, float b, float c) {
#if defined(FP_FAST_FMAF) || defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
    return (void)unit, fmaf(a, b, c);
#else
    if (unit != BNN_PLAIN) return fmaf(a, b, c);
#if BNN_ONE_ROUNDING
    return (float)((double)a * b + c);
#else
    return a * b + c;
#endif
#endif
}

/* ----------------------------------------------------------------------------------------------------------------- */

typedef struct {
    int height, width, channels;          /* of the input */
    int filters, kernel, stride, padding; /* filters: the channels of the output */
    int mode;                             /* what the bits mean: BNN_XNOR, BNN_AND or BNN_MASKED */
} bnn_Conv;

BNN_FUNCTION int bnn_output_size(const bnn_Conv *s, int size) {
    return (size + 2 * s->padding - s->kernel) / s->stride + 1;
}

/* The taps [*from, *to) of output `at` that are inside the image, in one of its two directions. */
BNN_FUNCTION void bnn_taps_inside(const bnn_Conv *s, int size, int at, int *from, int *to) {
    const int start = at * s->stride - s->padding;
    *from = start < 0 ? -start : 0;
    *to = start + s->kernel > size ? size - start : s->kernel;
    if (*to < *from) *to = *from;
}

/* A rectangle of the output whose pixels have the same taps [ky0, ky1) x [kx0, kx1) inside the image. */
typedef struct {
    int y, x, lines, pixels, ky0, ky1, kx0, kx1;
    int end_y, end_x, inner_y0, inner_y1, inner_x0, inner_x1; /* inner: all taps are inside */
} bnn_Region;

BNN_FUNCTION void bnn_inner(const bnn_Conv *s, int size, int *from, int *to) {
    *from = (s->padding + s->stride - 1) / s->stride;
    *to = size + s->padding >= s->kernel ? (size + s->padding - s->kernel) / s->stride + 1 : 0;
}

/* The state before the first region of rows [y0, y1) of the output, for bnn_next. */
BNN_FUNCTION bnn_Region bnn_before(const bnn_Conv *s, int y0, int y1) {
    bnn_Region g;
    memset(&g, 0, sizeof g);
    g.y = y0, g.end_y = y1, g.x = g.end_x = bnn_output_size(s, s->width);
    bnn_inner(s, s->height, &g.inner_y0, &g.inner_y1);
    bnn_inner(s, s->width, &g.inner_x0, &g.inner_x1);
    return g;
}

/* Go on to the next region. Returns 0 after the last one. */
BNN_FUNCTION int bnn_next(const bnn_Conv *s, bnn_Region *g) {
    g->x += g->pixels;
    if (g->x >= g->end_x) {
        g->x = 0, g->y += g->lines, g->lines = 1;
        if (g->y >= g->end_y) return 0;
        if (g->y >= g->inner_y0 && g->y < g->inner_y1) {
            g->lines = (g->inner_y1 < g->end_y ? g->inner_y1 : g->end_y) - g->y;
        }
        bnn_taps_inside(s, s->height, g->y, &g->ky0, &g->ky1);
    }
    g->pixels = g->x >= g->inner_x0 && g->x < g->inner_x1 ? g->inner_x1 - g->x : 1;
    bnn_taps_inside(s, s->width, g->x, &g->kx0, &g->kx1);
    return 1;
}

/* ----------------------------------------------------------------------------------------------------------------- */
/* Convolutions of bits. */

/* A region, in the form for the units' kernels. Distances of x are in bytes, those of w in words of 32 bits. */
typedef struct {
    const uint8_t *x;  /* the first word inside the image, of the first pixel */
    const uint32_t *w; /* its weights in the first block */
    ptrdiff_t x_row, w_row, w_block;   /* between rows of taps, and between blocks */
    ptrdiff_t x_pixel, x_line;         /* between pixels, and between lines of pixels */
    ptrdiff_t out_pixel, out_line;     /* likewise in the output, in pixels */
    int pixels, lines;
    int rows, words, mode; /* rows of taps inside the image, and words in each */
    int masked;            /* whether some words are used only in part: */
    uint32_t first, last;  /* the used bits of the first and of the last word of a row */
    int32_t base;          /* XNOR: the term of the sum that is equal for all filters */
    const int32_t *bases;  /* AND: this term for each pixel of a line */
    int filters;
    float *sums;           /* [pixels][filters], or NULL: */
    uint8_t *bits;         /* [pixels][bits_pixel] */
    const int32_t *low;    /* [filters, rounded up to 16] */
    const uint32_t *range; /* the bit of a filter is 1 if low <= sum <= low + range */
    int bits_pixel;
} bnn_Bits;

/* Four bytes from any address. Compilers make one instruction of it if the machine has one. */
BNN_INLINE uint32_t bnn_load32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* The used bits of word i. */
BNN_INLINE uint32_t bnn_mask(const bnn_Bits *r, int i) {
    return (i == 0 ? r->first : ~(uint32_t)0) & (i == r->words - 1 ? r->last : ~(uint32_t)0);
}

BNN_INLINE uint32_t bnn_nibbles(uint32_t v) { /* the number of bits in each nibble */
    v -= v >> 1 & 0x55555555u;
    return (v & 0x33333333u) + (v >> 2 & 0x33333333u);
}

BNN_INLINE uint32_t bnn_bytes(uint32_t nibbles) { return (nibbles & 0x0f0f0f0fu) + (nibbles >> 4 & 0x0f0f0f0fu); }

BNN_INLINE int32_t bnn_popcount(uint32_t v) { return (int32_t)(bnn_bytes(bnn_nibbles(v)) * 0x01010101u >> 24); }

/* The number of used bits that are 1 among the activations of a pixel. */
BNN_INLINE int32_t bnn_ones(const bnn_Bits *r, const uint8_t *x) {
    int32_t n = 0;
    for (int row = 0; row < r->rows; row++)
        for (int i = 0; i < r->words; i++) n += bnn_popcount(bnn_load32(x + row * r->x_row + 4 * i) & bnn_mask(r, i));
    return n;
}

/* Write the results of n <= 16 filters of one pixel. */
BNN_INLINE void bnn_write(const bnn_Bits *r, int block, ptrdiff_t pixel, const int32_t *sum) {
    const int from = 16 * block, n = r->filters - from < 16 ? r->filters - from : 16;
    if (r->sums) {
        float *out = r->sums + pixel * r->filters + from;
        for (int f = 0; f < n; f++) out[f] = (float)sum[f];
    } else {
        uint32_t bits = 0;
        for (int f = 0; f < n; f++)
            bits |= (uint32_t)((uint32_t)sum[f] - (uint32_t)r->low[from + f] <= r->range[from + f]) << f;
        uint8_t *out = r->bits + pixel * r->bits_pixel + 2 * block;
        out[0] = (uint8_t)bits;
        if (n > 8) out[1] = (uint8_t)(bits >> 8);
    }
}

/* Plain C. A full adder reduces three words to two. The popcounts of 16 filters are collected in bytes: one byte of
   three words has 24 bits, which can be added ten times. */
BNN_INLINE void bnn_tile_plain(const int mode, const bnn_Bits *r, int block, const uint8_t *x0, ptrdiff_t out) {
    int32_t sum[16];
    const int32_t base = mode == BNN_AND ? -bnn_ones(r, x0) : r->base, sign = mode == BNN_AND ? 2 : -2;
    for (int f = 0; f < 16; f++) sum[f] = mode == BNN_MASKED ? 0 : base;
    for (int row = 0; row < r->rows; row++) {
        const uint8_t *x = x0 + row * r->x_row;
        const uint32_t *w = r->w + block * r->w_block + row * r->w_row;
        for (int i = 0; i < r->words;) {
            uint32_t bytes[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
            for (int n = 0; n < 10 && i < r->words; n++) {
                if (mode != BNN_MASKED && i + 3 <= r->words) {
                    const uint8_t *at = x + 4 * i;
                    const uint32_t a = bnn_load32(at), b = bnn_load32(at + 4), c = bnn_load32(at + 8);
                    const uint32_t am = bnn_mask(r, i), bm = bnn_mask(r, i + 1), cm = bnn_mask(r, i + 2);
                    for (int f = 0; f < 16; f++) {
                        const uint32_t u = (mode == BNN_AND ? a & w[f] : a ^ w[f]) & am;
                        const uint32_t v = (mode == BNN_AND ? b & w[16 + f] : b ^ w[16 + f]) & bm;
                        const uint32_t t = (mode == BNN_AND ? c & w[32 + f] : c ^ w[32 + f]) & cm;
                        const uint32_t ones = u ^ v ^ t, twos = (u & v) | ((u ^ v) & t);
                        bytes[f] += bnn_bytes(bnn_nibbles(ones) + 2 * bnn_nibbles(twos));
                    }
                    i += 3, w += 48;
                } else {
                    const uint32_t a = bnn_load32(x + 4 * i), mask = bnn_mask(r, i);
                    for (int f = 0; f < 16; f++) {
                        uint32_t v = (mode == BNN_AND ? a & w[f] : a ^ w[f]) & mask;
                        if (mode == BNN_MASKED) v &= w[16 + f], sum[f] += bnn_popcount(w[16 + f] & mask);
                        bytes[f] += bnn_bytes(bnn_nibbles(v));
                    }
                    i += 1, w += mode == BNN_MASKED ? 32 : 16;
                }
            }
            for (int f = 0; f < 16; f++) {
                const uint32_t pairs = (bytes[f] & 0x00ff00ffu) + (bytes[f] >> 8 & 0x00ff00ffu);
                sum[f] += sign * (int32_t)((pairs + (pairs >> 16)) & 0xffffu);
            }
        }
    }
    bnn_write(r, block, out, sum);
}

BNN_FUNCTION void bnn_bits_plain(const bnn_Bits *r, int block, int blocks) {
    for (int b = block; b < block + blocks; b++)
        for (int line = 0; line < r->lines; line++)
            for (int p = 0; p < r->pixels; p++) {
                const uint8_t *x = r->x + line * r->x_line + p * r->x_pixel;
                const ptrdiff_t out = line * r->out_line + p * r->out_pixel;
                if (BNN_HAS(BNN_XNOR) && r->mode == BNN_XNOR) bnn_tile_plain(BNN_XNOR, r, b, x, out);
                if (BNN_HAS(BNN_AND) && r->mode == BNN_AND) bnn_tile_plain(BNN_AND, r, b, x, out);
                if (BNN_HAS(BNN_MASKED) && r->mode == BNN_MASKED) bnn_tile_plain(BNN_MASKED, r, b, x, out);
            }
}

#ifdef BNN_X86
/* In mode BNN_XNOR, low <= base - 2 count <= low + range is a condition for the count alone, from <= count <= to. For
   bits, counting starts at -from, and the bit is 1 if the result is at most to - from, as unsigned numbers. */
typedef struct {
    __m512i start, most;
} bnn_Limits_avx512;

BNN_INLINE BNN_AVX512 bnn_Limits_avx512 bnn_limits_avx512(const int mode, const bnn_Bits *r, int block) {
    bnn_Limits_avx512 limits = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    if (mode == BNN_XNOR && r->bits) {
        const __m512i one = _mm512_set1_epi32(1), never = _mm512_set1_epi32(-(1 << 30));
        const __m512i high = _mm512_sub_epi32(_mm512_set1_epi32(r->base), _mm512_loadu_si512(r->low + 16 * block));
        const __m512i low = _mm512_sub_epi32(high, _mm512_loadu_si512(r->range + 16 * block));
        const __m512i from = _mm512_srai_epi32(_mm512_add_epi32(low, one), 1), to = _mm512_srai_epi32(high, 1);
        const __mmask16 is_empty = _mm512_cmpgt_epi32_mask(from, to);
        limits.start = _mm512_mask_mov_epi32(_mm512_sub_epi32(limits.start, from), is_empty, never);
        limits.most = _mm512_maskz_sub_epi32((__mmask16)~is_empty, to, from);
    }
    return limits;
}

/* The results of a block for one pixel. count: the popcounts, from limits.start on. present: those of the mask, in mode
   BNN_MASKED. */
BNN_INLINE BNN_AVX512 void bnn_write_avx512(const int mode, const bnn_Bits *r, int block, ptrdiff_t out, int32_t base,
                                            __m512i count, __m512i present, __m512i most) {
    const int from = 16 * block, n = r->filters - from;
    const __m512i twice = _mm512_add_epi32(count, count), start = _mm512_set1_epi32(base);
    __m512i sum;
    if (mode == BNN_AND)
        sum = _mm512_add_epi32(start, twice);
    else
        sum = _mm512_sub_epi32(mode == BNN_MASKED ? present : start, twice);
    if (r->sums) {
        const __mmask16 some = (__mmask16)(n < 16 ? (1 << n) - 1 : 0xffff);
        _mm512_mask_storeu_ps(r->sums + out * r->filters + from, some, _mm512_cvtepi32_ps(sum));
    } else {
        uint8_t *bits = r->bits + out * r->bits_pixel + 2 * block;
        uint16_t set;
        if (mode == BNN_XNOR) {
            set = (uint16_t)_mm512_cmple_epu32_mask(count, most);
        } else {
            const __m512i above = _mm512_sub_epi32(sum, _mm512_loadu_si512(r->low + from));
            set = (uint16_t)_mm512_cmple_epu32_mask(above, _mm512_loadu_si512(r->range + from));
        }
        if (n > 8)
            memcpy(bits, &set, 2);
        else
            *bits = (uint8_t)set;
    }
}

BNN_INLINE BNN_AVX512 __m512i bnn_count_avx512(const int mode, const int masked, __m512i a, __m512i w, __m512i mask) {
    __m512i v;
    if (mode == BNN_AND)
        v = _mm512_and_si512(a, w);
    else
        v = _mm512_xor_si512(a, w);
    return _mm512_popcnt_epi32(masked ? _mm512_and_si512(v, mask) : v);
}

enum { BNN_AHEAD = 16 }; /* how many words ahead the prefetch into the cache is */

/* B blocks of filters by P pixels, all of whose counts are kept in registers. The pixels are neighbours in a line or,
   if square, 2 x 2. masked: r->masked. */
BNN_INLINE BNN_AVX512 void bnn_tile_avx512(const int mode, const int masked, const int B, const int P, const int square,
                                           const bnn_Bits *r, int block, int line, int pixel,
                                           const bnn_Limits_avx512 *limits) {
    const int words = r->words, step = mode == BNN_MASKED ? 32 : 16;
    const ptrdiff_t w_block = r->w_block, x_pixel = r->x_pixel, out = line * r->out_line + pixel * r->out_pixel;
    const ptrdiff_t x_pair = square ? r->x_line : 2 * x_pixel, out_pair = square ? r->out_line : 2 * r->out_pixel;
    __m512i count[4][4], present[4];
    BNN_UNROLL for (int b = 0; b < B; b++) {
        present[b] = _mm512_setzero_si512();
        BNN_UNROLL for (int p = 0; p < P; p++) count[p][b] = limits[b].start;
    }
    for (int row = 0; row < r->rows; row++) {
        const uint8_t *x = r->x + line * r->x_line + pixel * x_pixel + row * r->x_row;
        const uint32_t *w = r->w + block * w_block + row * r->w_row;
        for (int i = 0; i < words; i++, x += 4, w += step) {
            __m512i weight[4], mask[4];
            BNN_UNROLL for (int b = 0; b < B; b++) {
                weight[b] = _mm512_loadu_si512(w + b * w_block);
                if (P == 4) _mm_prefetch((const char *)(w + b * w_block + 16 * BNN_AHEAD), _MM_HINT_T0);
                mask[b] = _mm512_set1_epi32(masked ? (int)bnn_mask(r, i) : 0);
                if (mode == BNN_MASKED) {
                    mask[b] = _mm512_and_si512(mask[b], _mm512_loadu_si512(w + b * w_block + 16));
                    present[b] = _mm512_add_epi32(present[b], _mm512_popcnt_epi32(mask[b]));
                }
            }
            BNN_UNROLL for (int p = 0; p < P; p++) {
                const __m512i a = _mm512_set1_epi32((int)bnn_load32(x + (p & 1) * x_pixel + (p >> 1) * x_pair));
                BNN_UNROLL for (int b = 0; b < B; b++)
                    count[p][b] =
                        _mm512_add_epi32(count[p][b], bnn_count_avx512(mode, masked, a, weight[b], mask[b]));
            }
        }
    }
    BNN_UNROLL for (int p = 0; p < P; p++) {
        const int32_t base = mode == BNN_AND ? r->bases[pixel + p] : r->base;
        const ptrdiff_t to = out + (p & 1) * r->out_pixel + (p >> 1) * out_pair;
        BNN_UNROLL for (int b = 0; b < B; b++)
            bnn_write_avx512(mode, r, block + b, to, base, count[p][b], present[b], limits[b].most);
    }
}

/* One block whose weights stay in registers for all pixels. rows, words: constants, r->rows and r->words. */
BNN_INLINE BNN_AVX512 void bnn_few_words_avx512(
    const int mode, const int masked, const int rows, const int words, const bnn_Bits *r, int block) {
    const bnn_Limits_avx512 limits = bnn_limits_avx512(mode, r, block);
    const __m512i zero = _mm512_setzero_si512();
    __m512i weight[18], mask[6];
    BNN_UNROLL for (int i = 0; i < words; i++) mask[i] = _mm512_set1_epi32((int)bnn_mask(r, i));
    BNN_UNROLL for (int row = 0; row < rows; row++)
        BNN_UNROLL for (int i = 0; i < words; i++)
            weight[row * words + i] = _mm512_loadu_si512(r->w + block * r->w_block + row * r->w_row + 16 * i);
    for (int line = 0; line < r->lines; line++) {
        const uint8_t *x = r->x + line * r->x_line;
        ptrdiff_t out = line * r->out_line;
        for (int p = 0; p < r->pixels; p++, x += r->x_pixel, out += r->out_pixel) {
            __m512i count = limits.start, other = zero;
            BNN_UNROLL for (int row = 0; row < rows; row++)
                BNN_UNROLL for (int i = 0; i < words; i++) {
                    const __m512i a = _mm512_set1_epi32((int)bnn_load32(x + row * r->x_row + 4 * i));
                    const __m512i n = bnn_count_avx512(mode, masked, a, weight[row * words + i], mask[i]);
                    if ((row * words + i) & 1)
                        other = _mm512_add_epi32(other, n);
                    else
                        count = _mm512_add_epi32(count, n);
                }
            const int32_t base = mode == BNN_AND ? r->bases[p] : r->base;
            bnn_write_avx512(mode, r, block, out, base, _mm512_add_epi32(count, other), zero, limits.most);
        }
    }
}

BNN_INLINE BNN_AVX512 void bnn_blocks_avx512(
    const int mode, const int masked, const int B, const bnn_Bits *r, int block) {
    const int rest = r->pixels & ~3;
    int line = 0;
    bnn_Limits_avx512 limits[4];
    BNN_UNROLL for (int b = 0; b < B; b++) limits[b] = bnn_limits_avx512(mode, r, block + b);
    for (; line < r->lines; line++)
        for (int p = 0; p < rest; p += 4) bnn_tile_avx512(mode, masked, B, 4, 0, r, block, line, p, limits);
    line = 0;
    if (r->pixels & 2) {
        if (mode != BNN_AND) /* in mode AND, a region has one line */
            for (; line + 2 <= r->lines; line += 2)
                bnn_tile_avx512(mode, masked, B, 4, 1, r, block, line, rest, limits);
        for (; line < r->lines; line++) bnn_tile_avx512(mode, masked, B, 2, 0, r, block, line, rest, limits);
    }
    if (r->pixels & 1)
        for (line = 0; line < r->lines; line++)
            bnn_tile_avx512(mode, masked, B, 1, 0, r, block, line, r->pixels - 1, limits);
}

/* A function for each kind of convolution, so that the compiler does not mix their registers. */
#define BNN_FEW_WORDS(mode, masked, words)                                                                    \
    BNN_SEPARATE BNN_AVX512 void mode##_##masked##_##words##_words_avx512(const bnn_Bits *region, int block) { \
        const bnn_Bits r = *region;                                                                           \
        bnn_few_words_avx512(mode, masked, 3, words, &r, block);                                              \
    }
#define BNN_BLOCKS(mode, masked, B)                                                                           \
    BNN_SEPARATE BNN_AVX512 void mode##_##masked##_##B##_blocks_avx512(const bnn_Bits *region, int block) {    \
        const bnn_Bits r = *region;                                                                           \
        bnn_blocks_avx512(mode, masked, B, &r, block);                                                        \
    }
#define BNN_KIND(mode, masked)                                                                                \
    BNN_BLOCKS(mode, masked, 1) BNN_BLOCKS(mode, masked, 2) BNN_BLOCKS(mode, masked, 4)                       \
    BNN_FUNCTION void mode##_##masked##_avx512(const bnn_Bits *r, int block, int blocks) {                     \
        int b = block;                                                                                        \
        for (; b + 4 <= block + blocks; b += 4) mode##_##masked##_4_blocks_avx512(r, b);                      \
        for (; b + 2 <= block + blocks; b += 2) mode##_##masked##_2_blocks_avx512(r, b);                      \
        for (; b < block + blocks; b++) mode##_##masked##_1_blocks_avx512(r, b);                              \
    }
BNN_KIND(BNN_XNOR, 0)
BNN_KIND(BNN_XNOR, 1)
BNN_KIND(BNN_AND, 0)
BNN_KIND(BNN_AND, 1)
BNN_KIND(BNN_MASKED, 1)
BNN_FEW_WORDS(BNN_XNOR, 1, 2) /* 3x3 on 16 channels */
BNN_FEW_WORDS(BNN_XNOR, 0, 3) /* 32 */
BNN_FEW_WORDS(BNN_XNOR, 0, 6) /* 64 */
BNN_FEW_WORDS(BNN_AND, 1, 2)
BNN_FEW_WORDS(BNN_AND, 0, 3)
BNN_FEW_WORDS(BNN_AND, 0, 6)

BNN_FUNCTION void bnn_region_avx512(const bnn_Bits *r, int block, int blocks) {
    void (*few)(const bnn_Bits *, int) = NULL;
    const int has_three_rows = r->rows == 3 && r->pixels > 1;
    if (BNN_HAS(BNN_XNOR) && r->mode == BNN_XNOR) {
        if (has_three_rows && r->masked && r->words == 2) few = BNN_XNOR_1_2_words_avx512;
        if (has_three_rows && !r->masked && r->words == 3) few = BNN_XNOR_0_3_words_avx512;
        if (has_three_rows && !r->masked && r->words == 6) few = BNN_XNOR_0_6_words_avx512;
        if (!few) (r->masked ? BNN_XNOR_1_avx512 : BNN_XNOR_0_avx512)(r, block, blocks);
    }
    if (BNN_HAS(BNN_AND) && r->mode == BNN_AND) {
        if (has_three_rows && r->masked && r->words == 2) few = BNN_AND_1_2_words_avx512;
        if (has_three_rows && !r->masked && r->words == 3) few = BNN_AND_0_3_words_avx512;
        if (has_three_rows && !r->masked && r->words == 6) few = BNN_AND_0_6_words_avx512;
        if (!few) (r->masked ? BNN_AND_1_avx512 : BNN_AND_0_avx512)(r, block, blocks);
    }
    if (BNN_HAS(BNN_MASKED) && r->mode == BNN_MASKED) BNN_MASKED_1_avx512(r, block, blocks);
    for (int b = block; few && b < block + blocks; b++) few(r, b);
}

BNN_FUNCTION BNN_AVX512 void bnn_bits_avx512(const bnn_Bits *region, int block, int blocks) {
    enum { MOST = 64 };
    int32_t bases[MOST];
    bnn_Bits r = *region;
    if (r.mode != BNN_AND) {
        bnn_region_avx512(&r, block, blocks);
        return;
    }
    r.lines = 1, r.bases = bases;
    for (int line = 0; line < region->lines; line++)
        for (int from = 0; from < region->pixels; from += MOST) {
            const ptrdiff_t out = line * r.out_line + from * r.out_pixel;
            r.x = region->x + line * r.x_line + from * r.x_pixel;
            r.sums = region->sums ? region->sums + out * r.filters : NULL;
            r.bits = region->bits ? region->bits + out * r.bits_pixel : NULL;
            r.pixels = region->pixels - from < MOST ? region->pixels - from : MOST;
            const uint32_t not_first = r.masked ? ~bnn_mask(&r, 0) : 0;
            const uint32_t not_last = r.masked ? ~bnn_mask(&r, r.words - 1) : 0;
            for (int p = 0; p < r.pixels; p++) {
                int64_t n = 0;
                for (int row = 0; row < r.rows && r.words > 0; row++) {
                    const uint8_t *x = r.x + p * r.x_pixel + row * r.x_row;
                    int i = 0;
                    for (; i + 2 <= r.words; i += 2) {
                        uint64_t v;
                        memcpy(&v, x + 4 * i, 8);
                        n += _mm_popcnt_u64(v);
                    }
                    if (i < r.words) n += _mm_popcnt_u32(bnn_load32(x + 4 * i));
                    if (not_first) n -= _mm_popcnt_u32(bnn_load32(x) & not_first);
                    if (not_last && r.words > 1) n -= _mm_popcnt_u32(bnn_load32(x + 4 * (r.words - 1)) & not_last);
                }
                bases[p] = (int32_t)-n;
            }
            bnn_region_avx512(&r, block, blocks);
        }
}

/* AVX2 has no popcount. Two table look-ups count the bits of each byte. A block of filters takes two registers. */
BNN_INLINE BNN_AVX2 __m256i bnn_popcount_avx2(__m256i v) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi8(15));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
}

BNN_INLINE BNN_AVX2 __m256i bnn_add_bytes_avx2(__m256i sum, __m256i bytes) { /* the four bytes of each 32-bit element */
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* Half a block by P pixels. */
BNN_INLINE BNN_AVX2 void bnn_tile_avx2(
    const int mode, const int masked, const int P, const bnn_Bits *r, int half, const uint8_t *x0, ptrdiff_t to) {
    const __m256i zero = _mm256_setzero_si256();
    const int step = mode == BNN_MASKED ? 32 : 16;
    __m256i count[4], present = zero;
    BNN_UNROLL for (int p = 0; p < P; p++) count[p] = zero;
    for (int row = 0; row < r->rows; row++) {
        const uint8_t *x = x0 + row * r->x_row;
        const uint32_t *w = r->w + (half >> 1) * r->w_block + (half & 1) * 8 + row * r->w_row;
        for (int from = 0; from < r->words; from += 31) { /* 31 times 8 fits in a byte */
            const int to = from + 31 < r->words ? from + 31 : r->words;
            __m256i bytes[4], present_bytes = zero;
            BNN_UNROLL for (int p = 0; p < P; p++) bytes[p] = zero;
            for (int i = from; i < to; i++) {
                const __m256i weight = _mm256_loadu_si256((const __m256i *)(w + i * step));
                __m256i mask = zero;
                if (masked) mask = _mm256_set1_epi32((int)bnn_mask(r, i));
                if (mode == BNN_MASKED) {
                    mask = _mm256_and_si256(mask, _mm256_loadu_si256((const __m256i *)(w + i * step + 16)));
                    present_bytes = _mm256_add_epi8(present_bytes, bnn_popcount_avx2(mask));
                }
                BNN_UNROLL for (int p = 0; p < P; p++) {
                    const __m256i a = _mm256_set1_epi32((int)bnn_load32(x + p * r->x_pixel + 4 * i));
                    __m256i v;
                    if (mode == BNN_AND)
                        v = _mm256_and_si256(a, weight);
                    else
                        v = _mm256_xor_si256(a, weight);
                    if (masked) v = _mm256_and_si256(v, mask);
                    bytes[p] = _mm256_add_epi8(bytes[p], bnn_popcount_avx2(v));
                }
            }
            present = bnn_add_bytes_avx2(present, present_bytes);
            BNN_UNROLL for (int p = 0; p < P; p++) count[p] = bnn_add_bytes_avx2(count[p], bytes[p]);
        }
    }
    const int at = 8 * half, n = r->filters - at;
    BNN_UNROLL for (int p = 0; p < P; p++) {
        const __m256i base = _mm256_set1_epi32(mode == BNN_AND ? -bnn_ones(r, x0 + p * r->x_pixel) : r->base);
        const ptrdiff_t pixel = to + p * r->out_pixel;
        const __m256i twice = _mm256_add_epi32(count[p], count[p]);
        __m256i sum;
        if (mode == BNN_AND)
            sum = _mm256_add_epi32(base, twice);
        else
            sum = _mm256_sub_epi32(mode == BNN_MASKED ? present : base, twice);
        if (r->sums) {
            const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            float *out = r->sums + pixel * r->filters + at;
            _mm256_maskstore_ps(out, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), _mm256_cvtepi32_ps(sum));
        } else {
            const __m256i above = _mm256_sub_epi32(sum, _mm256_loadu_si256((const __m256i *)(r->low + at)));
            const __m256i range = _mm256_loadu_si256((const __m256i *)(r->range + at));
            const __m256i set = _mm256_cmpeq_epi32(_mm256_max_epu32(above, range), range);
            r->bits[pixel * r->bits_pixel + half] = (uint8_t)_mm256_movemask_ps(_mm256_castsi256_ps(set));
        }
    }
}

BNN_INLINE BNN_AVX2 void bnn_mode_avx2(const int mode, const int masked, const bnn_Bits *r, int block, int blocks) {
    for (int half = 2 * block; half < 2 * (block + blocks) && 8 * half < r->filters; half++)
        for (int line = 0; line < r->lines; line++) {
            const uint8_t *x = r->x + line * r->x_line;
            const ptrdiff_t out = line * r->out_line, step = r->x_pixel;
            int p = 0;
            for (; p + 4 <= r->pixels; p += 4)
                bnn_tile_avx2(mode, masked, 4, r, half, x + p * step, out + p * r->out_pixel);
            for (; p < r->pixels; p++) bnn_tile_avx2(mode, masked, 1, r, half, x + p * step, out + p * r->out_pixel);
        }
}

BNN_FUNCTION BNN_AVX2 void bnn_bits_avx2(const bnn_Bits *r, int block, int blocks) {
    if (BNN_HAS(BNN_MASKED) && r->mode == BNN_MASKED) bnn_mode_avx2(BNN_MASKED, 1, r, block, blocks);
    if (BNN_HAS(BNN_AND) && r->mode == BNN_AND) bnn_mode_avx2(BNN_AND, 1, r, block, blocks);
    if (BNN_HAS(BNN_XNOR) && r->mode == BNN_XNOR && r->masked) bnn_mode_avx2(BNN_XNOR, 1, r, block, blocks);
    if (BNN_HAS(BNN_XNOR) && r->mode == BNN_XNOR && !r->masked) bnn_mode_avx2(BNN_XNOR, 0, r, block, blocks);
}
#endif

#ifdef BNN_NEON
/* A block by P pixels. */
BNN_INLINE void bnn_tile_neon(
    const int mode, const int masked, const int P, const bnn_Bits *r, int block, const uint8_t *x0, ptrdiff_t out) {
    uint16x8_t count[2][4], present[4];
    uint32x4_t total[2][4], total_present[4];
    int added = 0; /* words since `count` was added to `total` */
    for (int q = 0; q < 4; q++) {
        present[q] = vdupq_n_u16(0), total_present[q] = vdupq_n_u32(0);
        for (int p = 0; p < P; p++) count[p][q] = vdupq_n_u16(0), total[p][q] = vdupq_n_u32(0);
    }
    for (int row = 0; row < r->rows; row++) {
        const uint8_t *x = x0 + row * r->x_row;
        const uint32_t *w = r->w + block * r->w_block + row * r->w_row;
        for (int i = 0; i < r->words; i++, x += 4, w += mode == BNN_MASKED ? 32 : 16) {
            if (++added > 4095) { /* a word adds 16 at most, and 16 bits hold 65535 */
                for (int q = 0; q < 4; q++) {
                    total_present[q] = vpadalq_u16(total_present[q], present[q]), present[q] = vdupq_n_u16(0);
                    for (int p = 0; p < P; p++)
                        total[p][q] = vpadalq_u16(total[p][q], count[p][q]), count[p][q] = vdupq_n_u16(0);
                }
                added = 1;
            }
            const uint32x4_t edge = vdupq_n_u32(bnn_mask(r, i));
            uint32x4_t a[2];
            for (int p = 0; p < P; p++) a[p] = vdupq_n_u32(bnn_load32(x + p * r->x_pixel));
            for (int q = 0; q < 4; q++) {
                const uint32x4_t weight = vld1q_u32(w + 4 * q);
                uint32x4_t mask = edge;
                if (mode == BNN_MASKED) {
                    mask = vandq_u32(edge, vld1q_u32(w + 16 + 4 * q));
                    present[q] = vpadalq_u8(present[q], vcntq_u8(vreinterpretq_u8_u32(mask)));
                }
                for (int p = 0; p < P; p++) {
                    uint32x4_t v = mode == BNN_AND ? vandq_u32(a[p], weight) : veorq_u32(a[p], weight);
                    if (masked) v = vandq_u32(v, mask);
                    count[p][q] = vpadalq_u8(count[p][q], vcntq_u8(vreinterpretq_u8_u32(v)));
                }
            }
        }
    }
    for (int p = 0; p < P; p++) {
        int32_t sum[16];
        const int32_t base = mode == BNN_AND ? -bnn_ones(r, x0 + p * r->x_pixel) : r->base;
        for (int q = 0; q < 4; q++) {
            const int32x4_t n = vreinterpretq_s32_u32(vpadalq_u16(total[p][q], count[p][q]));
            const int32x4_t m = vreinterpretq_s32_u32(vpadalq_u16(total_present[q], present[q]));
            const int32x4_t start = vdupq_n_s32(base), twice = vaddq_s32(n, n);
            const int32x4_t from = mode == BNN_MASKED ? m : start;
            vst1q_s32(sum + 4 * q, mode == BNN_AND ? vaddq_s32(from, twice) : vsubq_s32(from, twice));
        }
        bnn_write(r, block, out + p * r->out_pixel, sum);
    }
}

BNN_INLINE void bnn_mode_neon(const int mode, const int masked, const bnn_Bits *r, int block, int blocks) {
    for (int b = block; b < block + blocks; b++)
        for (int line = 0; line < r->lines; line++) {
            const uint8_t *x = r->x + line * r->x_line;
            const ptrdiff_t out = line * r->out_line, step = r->x_pixel;
            int p = 0;
            for (; p + 2 <= r->pixels; p += 2)
                bnn_tile_neon(mode, masked, 2, r, b, x + p * step, out + p * r->out_pixel);
            for (; p < r->pixels; p++) bnn_tile_neon(mode, masked, 1, r, b, x + p * step, out + p * r->out_pixel);
        }
}

BNN_FUNCTION void bnn_bits_neon(const bnn_Bits *r, int block, int blocks) {
    if (BNN_HAS(BNN_MASKED) && r->mode == BNN_MASKED) bnn_mode_neon(BNN_MASKED, 1, r, block, blocks);
    if (BNN_HAS(BNN_AND) && r->mode == BNN_AND) bnn_mode_neon(BNN_AND, 1, r, block, blocks);
    if (BNN_HAS(BNN_XNOR) && r->mode == BNN_XNOR && r->masked) bnn_mode_neon(BNN_XNOR, 1, r, block, blocks);
    if (BNN_HAS(BNN_XNOR) && r->mode == BNN_XNOR && !r->masked) bnn_mode_neon(BNN_XNOR, 0, r, block, blocks);
}
#endif

/* Rows [y0, y1) of a convolution of bits: sums [y1 - y0][width][filters] or, if sums is NULL, the bits of the binary
   activation that follows, [y1 - y0][width][bytes]. low, range: see bnn_Bits.
   Four bytes before and after x must be readable, because whole words are read. */
BNN_FUNCTION void bnn_binary_conv(const bnn_Conv *s, const uint8_t *x, const uint32_t *w, int y0, int y1, float *sums,
                                  uint8_t *bits, const int32_t *low, const uint32_t *range) {
    const int pixel = (s->channels + 7) / 8, blocks = (s->filters + 15) / 16, width = bnn_output_size(s, s->width);
    const int words = (s->kernel * pixel + 3) / 4, planes = s->mode == BNN_MASKED ? 2 : 1;
    bnn_Bits r;
    memset(&r, 0, sizeof r);
    r.x_row = (ptrdiff_t)s->width * pixel;
    r.w_row = (ptrdiff_t)words * planes * 16, r.w_block = s->kernel * r.w_row;
    r.x_pixel = (ptrdiff_t)s->stride * pixel, r.x_line = s->stride * r.x_row, r.out_pixel = 1, r.out_line = width;
    r.mode = s->mode, r.filters = s->filters, r.bits_pixel = (s->filters + 7) / 8;
    r.low = low, r.range = range, r.bases = NULL;
    /* Blocks are the outermost loop, so that their weights stay in the cache. The region inside comes first: its tiles
       compute longest with each weight, which gives time to fetch the next weights. */
    for (int i = 0; i < (blocks + 3) / 4 * 2; i++) {
        const int block = i / 2 * 4, is_inside = i % 2 == 0;
        bnn_Region g = bnn_before(s, y0, y1);
        while (bnn_next(s, &g)) {
            if ((g.ky1 - g.ky0 == s->kernel && g.kx1 - g.kx0 == s->kernel) != is_inside) continue;
            const int from = g.kx0 * pixel, to = g.kx1 * pixel, word = from / 4; /* from, to: bytes of a row */
            const int top = g.y * s->stride - s->padding + g.ky0, left = g.x * s->stride - s->padding;
            const ptrdiff_t at = (ptrdiff_t)(g.y - y0) * width + g.x;
            const int n = blocks - block < 4 ? blocks - block : 4;
            bnn_Bits q = r;
            q.x = x + (top * r.x_row + left * pixel + 4 * word);
            q.w = w + (g.ky0 * r.w_row + word * planes * 16);
            q.pixels = g.pixels, q.lines = g.lines;
            if (g.pixels == 1) { /* a column becomes a line */
                q.pixels = g.lines, q.lines = 1;
                q.x_pixel = r.x_line, q.out_pixel = r.out_line;
            }
            q.rows = g.ky1 - g.ky0, q.words = from < to ? (to + 3) / 4 - word : 0;
            q.masked = (from | to) % 4 != 0;
            q.first = ~(uint32_t)0 << from % 4 * 8;
            q.last = ~(uint32_t)0 >> (4 - to % 4) % 4 * 8;
            q.base = s->mode == BNN_XNOR ? q.rows * (g.kx1 - g.kx0) * s->channels : 0;
            q.sums = sums ? sums + at * s->filters : NULL;
            q.bits = bits ? bits + at * r.bits_pixel : NULL;
#if defined(BNN_X86)
            if (bnn_unit == BNN_WITH_AVX512)
                bnn_bits_avx512(&q, block, n);
            else if (bnn_unit == BNN_WITH_AVX2)
                bnn_bits_avx2(&q, block, n);
            else
                bnn_bits_plain(&q, block, n);
#elif defined(BNN_NEON)
            bnn_bits_neon(&q, block, n);
#else
            bnn_bits_plain(&q, block, n);
#endif
        }
    }
}

/* ----------------------------------------------------------------------------------------------------------------- */
/* Convolutions of floats. The weights of a tap and channel are 16 floats or, if they are binary, 16 bits. Products are
   added tap by tap and, in each tap, channel by channel, which is PyTorch's order. */

/* A line of a region, in the form for the units' kernels. Distances of x are in floats, of weights in groups of 16. */
typedef struct {
    const float *x;           /* the first tap inside the image, of the first pixel */
    ptrdiff_t x_row, x_pixel; /* between rows of taps, and between pixels */
    ptrdiff_t w, w_row, w_block;
    ptrdiff_t out_pixel;      /* between pixels of the output, in floats */
    int rows, length, pixels, filters; /* length: taps and channels in a row */
    float *out;                        /* [pixels][filters] */
    const float *weights;              /* or NULL: */
    const uint16_t *bits;              /* 1: +1, 0: -1 */
    const uint16_t *present;           /* 0: the weight is 0. NULL if there are none */
} bnn_Floats;

/* 16 filters of one pixel. */
BNN_FUNCTION void bnn_floats_plain(const bnn_Floats *r, int block) {
    const int n = r->filters - 16 * block < 16 ? r->filters - 16 * block : 16;
    for (int p = 0; p < r->pixels; p++) {
        float acc[16];
        for (int f = 0; f < 16; f++) acc[f] = 0;
        for (int row = 0; row < r->rows; row++) {
            const float *x = r->x + p * r->x_pixel + row * r->x_row;
            const ptrdiff_t at = r->w + block * r->w_block + row * r->w_row;
            if (r->weights) {
                const float *w = r->weights + 16 * at;
                for (int i = 0; i < r->length; i++, w += 16)
                    for (int f = 0; f < 16; f++) acc[f] = bnn_muladd(BNN_PLAIN, x[i], w[f], acc[f]);
            } else
                for (int i = 0; i < r->length; i++) {
                    const unsigned bits = r->bits[at + i], present = r->present ? r->present[at + i] : 0xffffu;
                    for (int f = 0; f < 16; f++)
                        if (present >> f & 1) acc[f] += bits >> f & 1 ? x[i] : -x[i];
                }
        }
        for (int f = 0; f < n; f++) r->out[p * r->out_pixel + 16 * block + f] = acc[f];
    }
}

#ifdef BNN_X86
/* B blocks of filters by P pixels. */
BNN_INLINE BNN_AVX512 void bnn_floats_tile_avx512(
    const int kind, const int B, const int P, const bnn_Floats *r, int block, int pixel) {
    __m512 acc[8][4];
    BNN_UNROLL for (int p = 0; p < P; p++)
        BNN_UNROLL for (int b = 0; b < B; b++) acc[p][b] = _mm512_setzero_ps();
    for (int row = 0; row < r->rows; row++) {
        const float *x = r->x + pixel * r->x_pixel + row * r->x_row;
        ptrdiff_t at = r->w + block * r->w_block + row * r->w_row;
        for (int i = 0; i < r->length; i++, at++) {
            __m512 w[4];
            BNN_UNROLL for (int b = 0; b < B; b++) {
                const ptrdiff_t j = at + b * r->w_block;
                if (kind == BNN_FLOAT)
                    w[b] = _mm512_loadu_ps(r->weights + 16 * j);
                else
                    w[b] = _mm512_mask_blend_ps((__mmask16)r->bits[j], _mm512_set1_ps(-1), _mm512_set1_ps(1));
                if (kind == BNN_SIGN_OR_0) w[b] = _mm512_maskz_mov_ps((__mmask16)r->present[j], w[b]);
            }
            BNN_UNROLL for (int p = 0; p < P; p++) {
                const __m512 a = _mm512_set1_ps(x[p * r->x_pixel + i]);
                BNN_UNROLL for (int b = 0; b < B; b++) acc[p][b] = _mm512_fmadd_ps(a, w[b], acc[p][b]);
            }
        }
    }
    BNN_UNROLL for (int p = 0; p < P; p++)
        BNN_UNROLL for (int b = 0; b < B; b++) {
            const int from = 16 * (block + b), n = r->filters - from;
            float *out = r->out + (pixel + p) * r->out_pixel + from;
            _mm512_mask_storeu_ps(out, (__mmask16)(n < 16 ? (1 << n) - 1 : 0xffff), acc[p][b]);
        }
}

/* As many tiles of P pixels as there are room for, from pixel *p on. */
BNN_INLINE BNN_AVX512 void bnn_floats_tiles_avx512(
    const int kind, const int B, const int P, const bnn_Floats *r, int block, int *p) {
    for (; *p + P <= r->pixels; *p += P) bnn_floats_tile_avx512(kind, B, P, r, block, *p);
}

BNN_INLINE BNN_AVX512 void bnn_floats_kind_avx512(const int kind, const bnn_Floats *r, int block, int blocks) {
    int b = block, p;
    for (; b + 4 <= block + blocks; b += 4) {
        p = 0;
        bnn_floats_tiles_avx512(kind, 4, 4, r, b, &p);
        bnn_floats_tiles_avx512(kind, 4, 2, r, b, &p);
        bnn_floats_tiles_avx512(kind, 4, 1, r, b, &p);
    }
    for (; b + 2 <= block + blocks; b += 2) {
        p = 0;
        bnn_floats_tiles_avx512(kind, 2, 6, r, b, &p);
        bnn_floats_tiles_avx512(kind, 2, 4, r, b, &p);
        bnn_floats_tiles_avx512(kind, 2, 2, r, b, &p);
        bnn_floats_tiles_avx512(kind, 2, 1, r, b, &p);
    }
    for (; b < block + blocks; b++) {
        p = 0;
        bnn_floats_tiles_avx512(kind, 1, 8, r, b, &p);
        bnn_floats_tiles_avx512(kind, 1, 6, r, b, &p);
        bnn_floats_tiles_avx512(kind, 1, 4, r, b, &p);
        bnn_floats_tiles_avx512(kind, 1, 2, r, b, &p);
        bnn_floats_tiles_avx512(kind, 1, 1, r, b, &p);
    }
}

BNN_SEPARATE BNN_AVX512 void bnn_floats_0_avx512(const bnn_Floats *r, int block, int blocks) {
    bnn_floats_kind_avx512(BNN_FLOAT, r, block, blocks);
}

BNN_SEPARATE BNN_AVX512 void bnn_floats_1_avx512(const bnn_Floats *r, int block, int blocks) {
    bnn_floats_kind_avx512(BNN_SIGN, r, block, blocks);
}

BNN_SEPARATE BNN_AVX512 void bnn_floats_2_avx512(const bnn_Floats *r, int block, int blocks) {
    bnn_floats_kind_avx512(BNN_SIGN_OR_0, r, block, blocks);
}

BNN_FUNCTION void bnn_floats_avx512(const bnn_Floats *r, int block, int blocks) {
    if (BNN_HAS(BNN_FLOAT) && r->weights) bnn_floats_0_avx512(r, block, blocks);
    if (BNN_HAS(BNN_SIGN) && r->bits && !r->present) bnn_floats_1_avx512(r, block, blocks);
    if (BNN_HAS(BNN_SIGN_OR_0) && r->bits && r->present) bnn_floats_2_avx512(r, block, blocks);
}

/* 8 elements, all bits set where bit 0 to 7 is. */
BNN_INLINE BNN_AVX2 __m256 bnn_spread_avx2(unsigned bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), bit), bit));
}

/* 8 elements, -1 or +1, from bit 0 to 7. */
BNN_INLINE BNN_AVX2 __m256 bnn_signs_avx2(unsigned bits) {
    const __m256i places = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    const __m256 first = _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32((int)bits), places));
    return _mm256_or_ps(_mm256_andnot_ps(first, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1));
}

/* A block by P pixels. */
BNN_INLINE BNN_AVX2 void bnn_floats_tile_avx2(const int kind, const int P, const bnn_Floats *r, int block, int pixel) {
    __m256 acc[6][2];
    BNN_UNROLL for (int p = 0; p < P; p++) acc[p][0] = acc[p][1] = _mm256_setzero_ps();
    for (int row = 0; row < r->rows; row++) {
        const float *x = r->x + pixel * r->x_pixel + row * r->x_row;
        ptrdiff_t at = r->w + block * r->w_block + row * r->w_row;
        for (int i = 0; i < r->length; i++, at++) {
            __m256 w[2];
            BNN_UNROLL for (int h = 0; h < 2; h++) {
                if (kind == BNN_FLOAT)
                    w[h] = _mm256_loadu_ps(r->weights + 16 * at + 8 * h);
                else
                    w[h] = bnn_signs_avx2((unsigned)r->bits[at] >> 8 * h);
                if (kind == BNN_SIGN_OR_0)
                    w[h] = _mm256_and_ps(w[h], bnn_spread_avx2((unsigned)r->present[at] >> 8 * h));
            }
            BNN_UNROLL for (int p = 0; p < P; p++) {
                const __m256 a = _mm256_set1_ps(x[p * r->x_pixel + i]);
                BNN_UNROLL for (int h = 0; h < 2; h++) acc[p][h] = _mm256_fmadd_ps(a, w[h], acc[p][h]);
            }
        }
    }
    const int n = r->filters - 16 * block;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    BNN_UNROLL for (int p = 0; p < P; p++) {
        float *out = r->out + (pixel + p) * r->out_pixel + 16 * block;
        _mm256_maskstore_ps(out, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), acc[p][0]);
        if (n > 8) _mm256_maskstore_ps(out + 8, _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane), acc[p][1]);
    }
}

BNN_INLINE BNN_AVX2 void bnn_floats_kind_avx2(const int kind, const bnn_Floats *r, int block, int blocks) {
    for (int b = block; b < block + blocks; b++) {
        int p = 0;
        for (; p + 6 <= r->pixels; p += 6) bnn_floats_tile_avx2(kind, 6, r, b, p);
        for (; p + 2 <= r->pixels; p += 2) bnn_floats_tile_avx2(kind, 2, r, b, p);
        for (; p < r->pixels; p++) bnn_floats_tile_avx2(kind, 1, r, b, p);
    }
}

BNN_FUNCTION BNN_AVX2 void bnn_floats_avx2(const bnn_Floats *r, int block, int blocks) {
    if (BNN_HAS(BNN_FLOAT) && r->weights) bnn_floats_kind_avx2(BNN_FLOAT, r, block, blocks);
    if (BNN_HAS(BNN_SIGN) && r->bits && !r->present) bnn_floats_kind_avx2(BNN_SIGN, r, block, blocks);
    if (BNN_HAS(BNN_SIGN_OR_0) && r->bits && r->present) bnn_floats_kind_avx2(BNN_SIGN_OR_0, r, block, blocks);
}
#endif

#ifdef BNN_NEON
/* A block by P pixels. */
BNN_INLINE void bnn_floats_tile_neon(const int kind, const int P, const bnn_Floats *r, int block, int pixel) {
    static const uint32_t powers[4] = {1, 2, 4, 8};
    const uint32x4_t bit = vld1q_u32(powers);
    float32x4_t acc[4][4];
    for (int p = 0; p < P; p++)
        for (int q = 0; q < 4; q++) acc[p][q] = vdupq_n_f32(0);
    for (int row = 0; row < r->rows; row++) {
        const float *x = r->x + pixel * r->x_pixel + row * r->x_row;
        ptrdiff_t at = r->w + block * r->w_block + row * r->w_row;
        for (int i = 0; i < r->length; i++, at++) {
            float32x4_t w[4];
            for (int q = 0; q < 4; q++) {
                if (kind == BNN_FLOAT)
                    w[q] = vld1q_f32(r->weights + 16 * at + 4 * q);
                else
                    w[q] = vbslq_f32(
                        vtstq_u32(vdupq_n_u32((uint32_t)r->bits[at] >> 4 * q), bit), vdupq_n_f32(1), vdupq_n_f32(-1));
                if (kind == BNN_SIGN_OR_0)
                    w[q] = vbslq_f32(
                        vtstq_u32(vdupq_n_u32((uint32_t)r->present[at] >> 4 * q), bit), w[q], vdupq_n_f32(0));
            }
            for (int p = 0; p < P; p++)
                for (int q = 0; q < 4; q++) acc[p][q] = vfmaq_n_f32(acc[p][q], w[q], x[p * r->x_pixel + i]);
        }
    }
    for (int p = 0; p < P; p++) {
        float out[16];
        const int n = r->filters - 16 * block < 16 ? r->filters - 16 * block : 16;
        for (int q = 0; q < 4; q++) vst1q_f32(out + 4 * q, acc[p][q]);
        memcpy(r->out + (pixel + p) * r->out_pixel + 16 * block, out, (size_t)n * sizeof(float));
    }
}

BNN_INLINE void bnn_floats_kind_neon(const int kind, const bnn_Floats *r, int block) {
    int p = 0;
    for (; p + 4 <= r->pixels; p += 4) bnn_floats_tile_neon(kind, 4, r, block, p);
    for (; p < r->pixels; p++) bnn_floats_tile_neon(kind, 1, r, block, p);
}

BNN_FUNCTION void bnn_floats_neon(const bnn_Floats *r, int block) {
    if (BNN_HAS(BNN_FLOAT) && r->weights) bnn_floats_kind_neon(BNN_FLOAT, r, block);
    if (BNN_HAS(BNN_SIGN) && r->bits && !r->present) bnn_floats_kind_neon(BNN_SIGN, r, block);
    if (BNN_HAS(BNN_SIGN_OR_0) && r->bits && r->present) bnn_floats_kind_neon(BNN_SIGN_OR_0, r, block);
}
#endif

/* Rows [y0, y1) of a convolution of floats: out [y1 - y0][width][filters]. */
BNN_FUNCTION void bnn_float_conv(const bnn_Conv *s, const float *x, const float *weights, const uint16_t *bits,
                                 const uint16_t *present, int y0, int y1, float *out) {
    const int c = s->channels, blocks = (s->filters + 15) / 16, width = bnn_output_size(s, s->width);
    bnn_Floats r;
    r.x_row = (ptrdiff_t)s->width * c;
    r.w_row = (ptrdiff_t)s->kernel * c, r.w_block = s->kernel * r.w_row;
    r.filters = s->filters, r.weights = weights, r.bits = bits, r.present = present;
    for (int block = 0; block < blocks; block += 4) {
        bnn_Region g = bnn_before(s, y0, y1);
        while (bnn_next(s, &g)) {
            const int is_column = g.pixels == 1, lines = is_column ? 1 : g.lines; /* a column becomes a line */
            r.pixels = is_column ? g.lines : g.pixels;
            r.x_pixel = is_column ? s->stride * r.x_row : (ptrdiff_t)s->stride * c;
            r.out_pixel = is_column ? (ptrdiff_t)width * s->filters : s->filters;
            for (int y = g.y; y < g.y + lines; y++) {
                const int n = blocks - block < 4 ? blocks - block : 4;
                const int top = y * s->stride - s->padding + g.ky0, left = g.x * s->stride - s->padding + g.kx0;
                r.rows = g.ky1 - g.ky0, r.length = (g.kx1 - g.kx0) * c;
                r.x = x + (top * r.x_row + left * c);
                r.w = g.ky0 * r.w_row + g.kx0 * c;
                r.out = out + ((ptrdiff_t)(y - y0) * width + g.x) * s->filters;
#if defined(BNN_X86)
                if (bnn_unit == BNN_WITH_AVX512)
                    bnn_floats_avx512(&r, block, n);
                else if (bnn_unit == BNN_WITH_AVX2)
                    bnn_floats_avx2(&r, block, n);
                else
                    for (int b = block; b < block + n; b++) bnn_floats_plain(&r, b);
#elif defined(BNN_NEON)
                for (int b = block; b < block + n; b++) bnn_floats_neon(&r, b);
#else
                for (int b = block; b < block + n; b++) bnn_floats_plain(&r, b);
#endif
            }
        }
    }
}

/* ----------------------------------------------------------------------------------------------------------------- */
/* Binary activations and pooling. */

/* bits [pixels][bytes]: 1 where x [pixels][channels] is at least 0. */
BNN_FUNCTION void bnn_pack_plain(const float *x, int pixels, int channels, uint8_t *bits) {
    for (int p = 0; p < pixels; p++, x += channels)
        for (int from = 0; from < channels; from += 8) {
            const int n = channels - from < 8 ? channels - from : 8;
            unsigned set = 0;
            for (int c = 0; c < n; c++) set |= (unsigned)(x[from + c] >= 0) << c;
            *bits++ = (uint8_t)set;
        }
}

#ifdef BNN_X86
BNN_FUNCTION BNN_AVX512 void bnn_pack_avx512(const float *x, int pixels, int channels, uint8_t *bits) {
    for (int p = 0; p < pixels; p++, x += channels)
        for (int from = 0; from < channels; from += 16) {
            const int n = channels - from;
            const __mmask16 some = (__mmask16)(n < 16 ? (1 << n) - 1 : 0xffff);
            const __m512 v = _mm512_maskz_loadu_ps(some, x + from);
            unsigned set = _mm512_mask_cmp_ps_mask(some, v, _mm512_setzero_ps(), _CMP_GE_OQ);
            __asm__("" : "+r"(set)); /* clang would store and load it to take its bytes */
            *bits++ = (uint8_t)set;
            if (n > 8) *bits++ = (uint8_t)(set >> 8);
        }
}

BNN_FUNCTION BNN_AVX2 void bnn_pack_avx2(const float *x, int pixels, int channels, uint8_t *bits) {
    if (channels % 8) {
        bnn_pack_plain(x, pixels, channels, bits);
        return;
    }
    for (int i = 0; i < pixels * channels; i += 8) {
        const __m256 set = _mm256_cmp_ps(_mm256_loadu_ps(x + i), _mm256_setzero_ps(), _CMP_GE_OQ);
        *bits++ = (uint8_t)_mm256_movemask_ps(set);
    }
}
#endif

BNN_FUNCTION void bnn_pack(const float *x, int pixels, int channels, uint8_t *bits) {
#ifdef BNN_X86
    if (bnn_unit == BNN_WITH_AVX512)
        bnn_pack_avx512(x, pixels, channels, bits);
    else if (bnn_unit == BNN_WITH_AVX2)
        bnn_pack_avx2(x, pixels, channels, bits);
    else
#endif
        bnn_pack_plain(x, pixels, channels, bits);
}

/* A row of a pooling. x is the rows [y0, y1) of the input, [y1 - y0][width][channels]. */
typedef struct {
    int width, channels, out_width;
    int kernel, stride, padding; /* kernel 0: adaptive, output i of n is made of inputs i W / n to (i + 1) W / n */
} bnn_Pool;

BNN_INLINE void bnn_window(const bnn_Pool *s, int at, int *from, int *to) {
    if (s->kernel == 0) {
        *from = at * s->width / s->out_width;
        *to = ((at + 1) * s->width + s->out_width - 1) / s->out_width;
    } else {
        *from = at * s->stride - s->padding, *to = *from + s->kernel;
        if (*from < 0) *from = 0;
        if (*to > s->width) *to = s->width;
    }
}

/* n <= 16 channels of a window of x, from the channel at x on. */
BNN_INLINE void bnn_maximum_part(
    const bnn_Pool *s, const int n, const float *x, int rows, int from, int to, float *out) {
    float most[16];
    for (int f = 0; f < n; f++) most[f] = x[from * s->channels + f];
    for (int y = 0; y < rows; y++)
        for (int i = from; i < to; i++) {
            const float *v = x + ((ptrdiff_t)y * s->width + i) * s->channels;
            for (int f = 0; f < n; f++) most[f] = v[f] > most[f] ? v[f] : most[f];
        }
    for (int f = 0; f < n; f++) out[f] = most[f];
}

BNN_INLINE void bnn_average_part(
    const bnn_Pool *s, const int n, const float *x, int rows, int from, int to, float *out) {
    float sum[16];
    for (int f = 0; f < n; f++) sum[f] = 0;
    for (int y = 0; y < rows; y++)
        for (int i = from; i < to; i++) {
            const float *v = x + ((ptrdiff_t)y * s->width + i) * s->channels;
            for (int f = 0; f < n; f++) sum[f] += v[f];
        }
    for (int f = 0; f < n; f++) out[f] = sum[f] / (float)(rows * (to - from));
}

BNN_INLINE void bnn_maximum_on(const int unit, const bnn_Pool *s, const float *x, int rows, float *out) {
    (void)unit;
    for (int at = 0; at < s->out_width; at++, out += s->channels) {
        int from, to, c = 0;
        bnn_window(s, at, &from, &to);
        for (; c + 16 <= s->channels; c += 16) bnn_maximum_part(s, 16, x + c, rows, from, to, out + c);
        if (c < s->channels) bnn_maximum_part(s, s->channels - c, x + c, rows, from, to, out + c);
    }
}

BNN_INLINE void bnn_average_on(const int unit, const bnn_Pool *s, const float *x, int rows, float *out) {
    (void)unit;
    for (int at = 0; at < s->out_width; at++, out += s->channels) {
        int from, to, c = 0;
        bnn_window(s, at, &from, &to);
        for (; c + 16 <= s->channels; c += 16) bnn_average_part(s, 16, x + c, rows, from, to, out + c);
        if (c < s->channels) bnn_average_part(s, s->channels - c, x + c, rows, from, to, out + c);
    }
}

BNN_FOR_EACH_UNIT(bnn_maximum, (const bnn_Pool *s, const float *x, int rows, float *out), s, x, rows, out)
BNN_FOR_EACH_UNIT(bnn_average, (const bnn_Pool *s, const float *x, int rows, float *out), s, x, rows, out)

/* Rows [y0, y1) of an image [channels][height][width] of floats or, if floats is NULL, of bytes: out = factor x +
   shift, [y1 - y0][width][channels]. */
BNN_FUNCTION void bnn_normalise(const float *floats, const uint8_t *bytes, int channels, int height, int width,
                                const float *factor, const float *shift, int y0, int y1, float *out) {
    for (int y = y0; y < y1; y++)
        for (int x = 0; x < width; x++)
            for (int c = 0; c < channels; c++) {
                const ptrdiff_t i = ((ptrdiff_t)c * height + y) * width + x;
                *out++ = bnn_muladd(BNN_PLAIN, floats ? floats[i] : (float)bytes[i], factor[c], shift[c]);
            }
}
