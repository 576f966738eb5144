// Convolution of bits with bits, for networks whose weights and activations are binary: exclusive-or (or and) and
// popcount take the place of multiply and add. export_c.py compiles this file when it first needs it, and calls it.
//
// Activations: [height][width][words]. Channel c of a pixel is bit c % 64 of word c / 64. Bits past the last channel
// are 0.
// Weights: [block of 8 filters][ky][kx][word][plane][8 filters]. A vector register holds one word of 8 filters, and one
// word of a pixel is broadcast to all of them, so no sum runs across a register.
// What a bit means depends on the mode:
//
//     XNOR     activation 1: +1, 0: -1     weight 1: +1, 0: -1
//     AND      activation 1: +1, 0:  0     weight 1: +1, 0: -1
//     MASKED   as XNOR, and the weights have a second plane, in which 0 means that the weight is 0. Bits past the last
//              channel are 0 in this plane.
//
// The results are integers and the same on every machine. For activations a, weights w, second plane m and n taps
// inside the image:
//
//     XNOR     sum = n channels - 2 popcount(a ^ w)
//     AND      sum = 2 popcount(a & w) - popcount(a)
//     MASKED   sum = popcount(m) - 2 popcount((a ^ w) & m)
//
// Padding is neither +1 nor -1: taps outside the image are left out, so n depends on the pixel.
//
// From here to the line "// ----" the text is both C99 and C++. export_c.py copies it into the C files that it writes.
#include <stdint.h>

typedef struct {
    int height, width, channels;           // of the input
    int filters, kernel, stride, padding;  // filters: the channels of the output
    int mode;                              // what the bits mean: XNOR, AND or MASKED
} ConvShape;

enum { XNOR, AND, MASKED };

static inline int output_size(const ConvShape *s, int size) { return (size + 2 * s->padding - s->kernel) / s->stride + 1; }

// The taps [*from, *to) of output `at` that are inside the image, in one of its two directions.
static inline void taps_inside(const ConvShape *s, int size, int at, int *from, int *to) {
    const int start = at * s->stride - s->padding;
    *from = start < 0 ? -start : 0;
    *to = start + s->kernel > size ? size - start : s->kernel;
    if (*to < *from) *to = *from;
}

static inline int popcount(uint64_t v) {
#if defined(__POPCNT__) || defined(__aarch64__)
    return __builtin_popcountll(v);
#else  // the sums of 2, then 4, then 8 neighbouring bits; a multiplication adds up the bytes
    v -= (v >> 1) & 0x5555555555555555u;
    v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
    return (int)((((v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
#endif
}

// One row of the output: sums [width of the output][filters, rounded up to a multiple of 8].
static inline void sums_row_portable(const ConvShape *s, const uint64_t *x, const uint64_t *w, int row, int32_t *sums) {
    const int words = (s->channels + 63) / 64, blocks = (s->filters + 7) / 8, width = output_size(s, s->width);
    const int planes = s->mode == MASKED ? 2 : 1;
    int y0, y1, x0, x1;
    taps_inside(s, s->height, row, &y0, &y1);
    for (int column = 0; column < width; column++) {
        taps_inside(s, s->width, column, &x0, &x1);
        const int length = (x1 - x0) * words;  // the taps of a row are contiguous
        for (int block = 0; block < blocks; block++) {
            int32_t sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            for (int ky = y0; ky < y1; ky++) {
                const int at = (row * s->stride - s->padding + ky) * s->width + column * s->stride - s->padding + x0;
                const uint64_t *a = x + at * words;
                const uint64_t *b = w + ((block * s->kernel + ky) * s->kernel + x0) * words * planes * 8;
                for (int i = 0; i < length; i++) {
                    if (s->mode == XNOR)
                        for (int f = 0; f < 8; f++) sum[f] -= 2 * popcount(a[i] ^ b[8 * i + f]);
                    else if (s->mode == AND)
                        for (int f = 0; f < 8; f++) sum[f] += 2 * popcount(a[i] & b[8 * i + f]) - popcount(a[i]);
                    else
                        for (int f = 0; f < 8; f++)
                            sum[f] += popcount(b[16 * i + 8 + f])
                                - 2 * popcount((a[i] ^ b[16 * i + f]) & b[16 * i + 8 + f]);
                }
            }
            const int n = s->mode == XNOR ? (y1 - y0) * (x1 - x0) * s->channels : 0;
            for (int f = 0; f < 8; f++) sums[(column * blocks + block) * 8 + f] = n + sum[f];
        }
    }
}

// The binary activation after a convolution, as an interval of its sum: bits [pixels][words] are 1 where
// low <= sum <= high. sums [pixels][filters, rounded up to a multiple of 8], low and high [filters].
static inline void threshold_portable(
    const int32_t *sums, int pixels, int filters, const int32_t *low, const int32_t *high, uint64_t *bits) {
    const int words = (filters + 63) / 64, stride = (filters + 7) / 8 * 8;
    for (int i = 0; i < pixels; i++)
        for (int word = 0; word < words; word++) {
            const int n = filters - 64 * word < 64 ? filters - 64 * word : 64;
            const int32_t *s = sums + i * stride + 64 * word, *lo = low + 64 * word, *hi = high + 64 * word;
            uint64_t v = 0;
            for (int f = 0; f < n; f++) v |= (uint64_t)((s[f] >= lo[f]) & (s[f] <= hi[f])) << f;
            bits[i * words + word] = v;
        }
}
// ---- End of the part for C files. Below is the same for vector units, one of which is chosen at run time.

#include <algorithm>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>

// B blocks of filters by P pixels of one row. All their counts are kept in registers.
struct Tile {
    const uint64_t *x, *w;   // the first tap inside the image, of the first pixel and of the first block
    int rows, length;        // kernel rows inside the image, and words of taps in each
    int64_t x_row, x_pixel;  // distance in words between kernel rows and between pixels
    int64_t w_row, w_block;  // distance in words between kernel rows and between blocks
    int32_t *sums;
    int64_t stride;       // distance between pixels in sums
    const int32_t *base;  // per pixel, the part of the sum that is the same for all filters
};

#define AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx512vpopcntdq")))
#define AVX2 __attribute__((target("avx2")))

struct Avx512 {
    static constexpr int BLOCKS = 4, PIXELS = 4;

    template <int MODE, int B, int P>
    AVX512 static void tile(const Tile &t) {
        __m512i count[P][B], present[B];
        for (int b = 0; b < B; b++) {
            present[b] = _mm512_setzero_si512();
            for (int p = 0; p < P; p++) count[p][b] = _mm512_setzero_si512();
        }
        for (int row = 0; row < t.rows; row++) {
            const uint64_t *x = t.x + row * t.x_row, *w = t.w + row * t.w_row;
            for (int i = 0; i < t.length; i++, w += MODE == MASKED ? 16 : 8) {
                __m512i weight[B], mask[B];
                for (int b = 0; b < B; b++) {
                    weight[b] = _mm512_loadu_si512(w + b * t.w_block);
                    if (MODE == MASKED) {
                        mask[b] = _mm512_loadu_si512(w + b * t.w_block + 8);
                        present[b] = _mm512_add_epi64(present[b], _mm512_popcnt_epi64(mask[b]));
                    }
                }
                for (int p = 0; p < P; p++) {
                    const __m512i a = _mm512_set1_epi64((long long)x[p * t.x_pixel + i]);
                    for (int b = 0; b < B; b++) {
                        __m512i v = MODE == AND ? _mm512_and_si512(a, weight[b]) : _mm512_xor_si512(a, weight[b]);
                        if (MODE == MASKED) v = _mm512_and_si512(v, mask[b]);
                        count[p][b] = _mm512_add_epi64(count[p][b], _mm512_popcnt_epi64(v));
                    }
                }
            }
        }
        for (int p = 0; p < P; p++)
            for (int b = 0; b < B; b++) {
                const __m256i n = _mm512_cvtepi64_epi32(count[p][b]), twice = _mm256_add_epi32(n, n);
                const __m256i base =
                    MODE == MASKED ? _mm512_cvtepi64_epi32(present[b]) : _mm256_set1_epi32(t.base[p]);
                const __m256i sum = MODE == AND ? _mm256_add_epi32(base, twice) : _mm256_sub_epi32(base, twice);
                _mm256_storeu_si256((__m256i *)(t.sums + p * t.stride + 8 * b), sum);
            }
    }
};

// AVX2 has no popcount. Two table look-ups count the bits of each byte. A block of 8 filters takes two registers.
struct Avx2 {
    static constexpr int BLOCKS = 1, PIXELS = 4;

    AVX2 static inline __m256i popcount_bytes(__m256i v) {
        const __m256i table = _mm256_setr_epi8(
            0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
        const __m256i low = _mm256_and_si256(v, _mm256_set1_epi8(15));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
        return _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
    }

    template <int MODE, int B, int P>
    AVX2 static void tile(const Tile &t) {
        const __m256i zero = _mm256_setzero_si256();
        for (int half = 0; half < 2 * B; half++) {
            __m256i count[P], present = zero;
            for (int p = 0; p < P; p++) count[p] = zero;
            for (int row = 0; row < t.rows; row++) {
                const uint64_t *x = t.x + row * t.x_row;
                const uint64_t *w = t.w + row * t.w_row + half / 2 * t.w_block + half % 2 * 4;
                for (int from = 0; from < t.length; from += 31) {  // 31 · 8 = 248 fits in a byte, 32 · 8 does not
                    __m256i bytes[P], present_bytes = zero;
                    for (int p = 0; p < P; p++) bytes[p] = zero;
                    for (int i = from; i < std::min(from + 31, t.length); i++, w += MODE == MASKED ? 16 : 8) {
                        const __m256i weight = _mm256_loadu_si256((const __m256i *)w);
                        __m256i mask = zero;
                        if (MODE == MASKED) {
                            mask = _mm256_loadu_si256((const __m256i *)(w + 8));
                            present_bytes = _mm256_add_epi8(present_bytes, popcount_bytes(mask));
                        }
                        for (int p = 0; p < P; p++) {
                            const __m256i a = _mm256_set1_epi64x((long long)x[p * t.x_pixel + i]);
                            __m256i v = MODE == AND ? _mm256_and_si256(a, weight) : _mm256_xor_si256(a, weight);
                            if (MODE == MASKED) v = _mm256_and_si256(v, mask);
                            bytes[p] = _mm256_add_epi8(bytes[p], popcount_bytes(v));
                        }
                    }
                    present = _mm256_add_epi64(present, _mm256_sad_epu8(present_bytes, zero));
                    for (int p = 0; p < P; p++)
                        count[p] = _mm256_add_epi64(count[p], _mm256_sad_epu8(bytes[p], zero));
                }
            }
            int64_t n[4], m[4];
            _mm256_storeu_si256((__m256i *)m, present);
            for (int p = 0; p < P; p++) {
                _mm256_storeu_si256((__m256i *)n, count[p]);
                for (int f = 0; f < 4; f++) {
                    const int64_t base = MODE == MASKED ? m[f] : t.base[p];
                    t.sums[p * t.stride + 4 * half + f] = (int32_t)(MODE == AND ? base + 2 * n[f] : base - 2 * n[f]);
                }
            }
        }
    }
};

template <class Unit, int MODE, int B>
static void any_tile(const Tile &t, bool several) {
    several ? Unit::template tile<MODE, B, Unit::PIXELS>(t) : Unit::template tile<MODE, B, 1>(t);
}

// One row. The outer loop runs over groups of blocks, so that their weights stay in the cache for all pixels. At the
// left and right edge, where taps are outside the image, a tile is a single pixel.
template <class Unit, int MODE>
static void sums_row(const ConvShape *s, const uint64_t *x, const uint64_t *w, int row, int32_t *sums) {
    const int words = (s->channels + 63) / 64, blocks = (s->filters + 7) / 8, width = output_size(s, s->width);
    const int word = MODE == MASKED ? 16 : 8;
    int y0, y1;
    taps_inside(s, s->height, row, &y0, &y1);
    std::vector<int> from(width), to(width), base(width);
    Tile t;
    t.rows = y1 - y0;
    t.x_row = (int64_t)s->width * words, t.x_pixel = (int64_t)s->stride * words;
    t.w_row = (int64_t)s->kernel * words * word, t.w_block = s->kernel * t.w_row;
    t.stride = blocks * 8;
    x += (row * s->stride - s->padding + y0) * t.x_row - s->padding * words;
    for (int column = 0; column < width; column++) {
        taps_inside(s, s->width, column, &from[column], &to[column]);
        base[column] = MODE == XNOR ? t.rows * (to[column] - from[column]) * s->channels : 0;
        for (int ky = 0; MODE == AND && ky < t.rows; ky++)
            for (int i = from[column] * words; i < to[column] * words; i++)
                base[column] -= __builtin_popcountll(x[ky * t.x_row + column * t.x_pixel + i]);
    }
    for (int block = 0, b; block < blocks; block += b) {
        b = block + Unit::BLOCKS <= blocks ? Unit::BLOCKS : 1;
        for (int column = 0, p; column < width; column += p) {
            const int last = column + Unit::PIXELS - 1;
            p = last < width && from[column] == from[last] && to[column] == to[last] ? Unit::PIXELS : 1;
            t.length = (to[column] - from[column]) * words;
            t.x = x + column * t.x_pixel + from[column] * words;
            t.w = w + block * t.w_block + y0 * t.w_row + from[column] * words * word;
            t.sums = sums + column * t.stride + block * 8;
            t.base = &base[column];
            b == 1 ? any_tile<Unit, MODE, 1>(t, p > 1) : any_tile<Unit, MODE, Unit::BLOCKS>(t, p > 1);
        }
    }
}

template <class Unit>
static void sums_row(const ConvShape *s, const uint64_t *x, const uint64_t *w, int row, int32_t *sums) {
    (s->mode == XNOR ? sums_row<Unit, XNOR> : s->mode == AND ? sums_row<Unit, AND> : sums_row<Unit, MASKED>)(
        s, x, w, row, sums);
}

AVX512 static void threshold_avx512(
    const int32_t *sums, int pixels, int filters, const int32_t *low, const int32_t *high, uint64_t *bits) {
    const int words = (filters + 63) / 64, stride = (filters + 7) / 8 * 8;
    for (int i = 0; i < pixels; i++)
        for (int f = 0; f < filters; f += 16) {
            const __mmask16 some = (__mmask16)(filters - f < 16 ? (1 << (filters - f)) - 1 : 0xffff);
            const __m512i sum = _mm512_maskz_loadu_epi32(some, sums + i * stride + f);
            const __mmask16 reaches = _mm512_mask_cmpge_epi32_mask(some, sum, _mm512_maskz_loadu_epi32(some, low + f));
            const uint64_t set = _mm512_mask_cmple_epi32_mask(reaches, sum, _mm512_maskz_loadu_epi32(some, high + f));
            uint64_t *word = bits + i * words + f / 64;
            *word = (f % 64 ? *word : 0) | set << f % 64;
        }
}

// What the kernel does per vector, without memory accesses: n times exclusive-or, popcount and addition.
AVX512 static int64_t peak(int64_t n) {
    __m512i count[12], weight[12], a = _mm512_set1_epi64(n);
    for (int i = 0; i < 12; i++) count[i] = weight[i] = _mm512_set1_epi64(3 * i + n);
    for (int64_t done = 0; done < n; done += 12) {
        for (int i = 0; i < 12; i++)
            count[i] = _mm512_add_epi64(count[i], _mm512_popcnt_epi64(_mm512_xor_si512(a, weight[i])));
        asm volatile("" : "+v"(a));  // otherwise the compiler sees that the result is constant
    }
    for (int i = 1; i < 12; i++) count[0] = _mm512_add_epi64(count[0], count[i]);
    return _mm512_reduce_add_epi64(count[0]);
}
#endif

extern "C" {
// The best vector unit of this machine: 0 portable, 1 AVX2, 2 AVX-512 with VPOPCNTDQ.
int binary_conv_best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

// The unit that the functions below use. binary_conv_use() is for tests.
static int unit = binary_conv_best();
void binary_conv_use(int wanted) { unit = std::min(wanted, binary_conv_best()); }

// See peak(). Returns 0 without AVX-512.
int64_t binary_conv_peak(int64_t n) {
#if defined(__x86_64__)
    if (binary_conv_best() == 2) return peak(n);
#endif
    return 0 * n;
}

void binary_conv_row(const ConvShape *s, const uint64_t *x, const uint64_t *w, int row, int32_t *sums) {
#if defined(__x86_64__)
    if (unit == 2) return sums_row<Avx512>(s, x, w, row, sums);
    if (unit == 1) return sums_row<Avx2>(s, x, w, row, sums);
#endif
    sums_row_portable(s, x, w, row, sums);
}

void binary_conv_threshold(
    const int32_t *sums, int pixels, int filters, const int32_t *low, const int32_t *high, uint64_t *bits) {
#if defined(__x86_64__)
    if (unit == 2) return threshold_avx512(sums, pixels, filters, low, high, bits);
#endif
    threshold_portable(sums, pixels, filters, low, high, bits);
}

// All rows of a layer. sums [height][width][filters, rounded up to a multiple of 8] of the output.
void binary_conv_sums(const ConvShape *s, const uint64_t *x, const uint64_t *w, int32_t *sums) {
    const int height = output_size(s, s->height), stride = output_size(s, s->width) * ((s->filters + 7) / 8 * 8);
    for (int row = 0; row < height; row++) binary_conv_row(s, x, w, row, sums + (int64_t)row * stride);
}

// All rows of a layer and the binary activation after it, from bits to bits.
void binary_conv_bits(
    const ConvShape *s, const uint64_t *x, const uint64_t *w, const int32_t *low, const int32_t *high, uint64_t *bits) {
    const int height = output_size(s, s->height), width = output_size(s, s->width);
    std::vector<int32_t> sums((size_t)width * ((s->filters + 7) / 8 * 8));
    for (int row = 0; row < height; row++) {
        binary_conv_row(s, x, w, row, sums.data());
        binary_conv_threshold(sums.data(), width, s->filters, low, high, bits + row * width * ((s->filters + 63) / 64));
    }
}
}
