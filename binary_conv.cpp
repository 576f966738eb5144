// Convolution of bits with bits: exclusive-or (or and) and popcount in place of multiply and add, for networks whose
// weights and activations are binary. export.py, which compiles this file at first use, is its only caller.
//
// Activations are packed [height][width][words], channel c of a pixel being bit c % 64 of word c / 64; a set bit is +1,
// a clear one -1 (XNOR, MASKED) or 0 (AND). Bits past the last channel are 0. Weights are packed
// [block of 8 filters][ky][kx][word][plane][8 filters], so that a vector register holds one word of 8 filters, and one
// word of a pixel, broadcast, meets all of them; no sum runs across a register. A set bit is +1, a clear one -1. MASKED
// weights, which may be 0, have a second plane, set where the weight is not 0; bits past the last channel are 0 there.
//
// What comes out are whole numbers, the same on every machine. With n taps inside the image, a the pixel, w the weight:
//
//     XNOR     sum = n channels - 2 popcount(a ^ w)
//     AND      sum = 2 popcount(a & w) - popcount(a)           (a is 0 or 1)
//     MASKED   sum = popcount(m) - 2 popcount((a ^ w) & m)
//
// The zeros that a convolution is padded with are neither +1 nor -1: taps outside the image are left out, and n is
// counted for each pixel.
//
// From here to the mark below the text is C99 and C++ at once: export.py copies it into the C files that it writes.
#include <stdint.h>

typedef struct {
    int height, width, channels;           // of the input
    int filters, kernel, stride, padding;  // filters: channels of the output
    int kind;                              // of the weights and activations
} Shape;

enum { XNOR, AND, MASKED };

static inline int output_size(const Shape *s, int size) { return (size + 2 * s->padding - s->kernel) / s->stride + 1; }

// The taps [*from, *to) of output `at` that lie inside the image, in one of its two directions.
static inline void taps_inside(const Shape *s, int size, int at, int *from, int *to) {
    const int start = at * s->stride - s->padding;
    *from = start < 0 ? -start : 0;
    *to = start + s->kernel > size ? size - start : s->kernel;
    if (*to < *from) *to = *from;
}

static inline int popcount(uint64_t v) {
#if defined(__POPCNT__) || defined(__aarch64__)
    return __builtin_popcountll(v);
#else  // sums of 2, of 4, of 8 neighbouring bits; then all bytes at once
    v -= (v >> 1) & 0x5555555555555555u;
    v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
    return (int)((((v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
#endif
}

// One row of the output: sums [width of the output][filters, rounded up to a multiple of 8].
static inline void sums_row_portable(const Shape *s, const uint64_t *x, const uint64_t *w, int row, int32_t *sums) {
    const int words = (s->channels + 63) / 64, blocks = (s->filters + 7) / 8, width = output_size(s, s->width);
    const int planes = s->kind == MASKED ? 2 : 1;
    int y0, y1, x0, x1;
    taps_inside(s, s->height, row, &y0, &y1);
    for (int column = 0; column < width; column++) {
        taps_inside(s, s->width, column, &x0, &x1);
        const int length = (x1 - x0) * words;  // the taps of one row lie side by side
        for (int block = 0; block < blocks; block++) {
            int32_t sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            for (int ky = y0; ky < y1; ky++) {
                const int at = (row * s->stride - s->padding + ky) * s->width + column * s->stride - s->padding + x0;
                const uint64_t *a = x + at * words;
                const uint64_t *b = w + ((block * s->kernel + ky) * s->kernel + x0) * words * planes * 8;
                for (int i = 0; i < length; i++) {
                    if (s->kind == XNOR)
                        for (int f = 0; f < 8; f++) sum[f] -= 2 * popcount(a[i] ^ b[8 * i + f]);
                    else if (s->kind == AND)
                        for (int f = 0; f < 8; f++) sum[f] += 2 * popcount(a[i] & b[8 * i + f]) - popcount(a[i]);
                    else
                        for (int f = 0; f < 8; f++)
                            sum[f] += popcount(b[16 * i + 8 + f])
                                - 2 * popcount((a[i] ^ b[16 * i + f]) & b[16 * i + 8 + f]);
                }
            }
            const int n = s->kind == XNOR ? (y1 - y0) * (x1 - x0) * s->channels : 0;
            for (int f = 0; f < 8; f++) sums[(column * blocks + block) * 8 + f] = n + sum[f];
        }
    }
}

// What follows a convolution up to the next binary activation, as an interval of its sum:
// bits [pixels][words], set where low <= sum <= high. sums [pixels][filters, rounded up to a multiple of 8].
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
// ---- The end of what C files get. Below: the same with vector units, chosen when the program runs.

#include <algorithm>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>

// B blocks of filters by P pixels of one row, whose counts are all kept in registers.
struct Tile {
    const uint64_t *x, *w;             // the first tap inside the image: of the first pixel, of the first block
    int rows, length;                  // kernel rows inside; words of taps in each
    int64_t x_row, x_pixel;            // words from one kernel row to the next, from one pixel to the next
    int64_t w_row, w_block;            // from one kernel row to the next, from one block to the next
    int32_t *sums;
    int64_t stride;                    // of sums, from one pixel to the next
    const int32_t *base;               // what no filter changes of each pixel's sums
};

#define AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx512vpopcntdq")))
#define AVX2 __attribute__((target("avx2")))

struct Avx512 {
    static constexpr int BLOCKS = 4, PIXELS = 4;

    template <int KIND, int B, int P>
    AVX512 static void tile(const Tile &t) {
        __m512i count[P][B], present[B];
        for (int b = 0; b < B; b++) {
            present[b] = _mm512_setzero_si512();
            for (int p = 0; p < P; p++) count[p][b] = _mm512_setzero_si512();
        }
        for (int row = 0; row < t.rows; row++) {
            const uint64_t *x = t.x + row * t.x_row, *w = t.w + row * t.w_row;
            for (int i = 0; i < t.length; i++, w += KIND == MASKED ? 16 : 8) {
                __m512i weight[B], mask[B];
                for (int b = 0; b < B; b++) {
                    weight[b] = _mm512_loadu_si512(w + b * t.w_block);
                    if (KIND == MASKED) {
                        mask[b] = _mm512_loadu_si512(w + b * t.w_block + 8);
                        present[b] = _mm512_add_epi64(present[b], _mm512_popcnt_epi64(mask[b]));
                    }
                }
                for (int p = 0; p < P; p++) {
                    const __m512i a = _mm512_set1_epi64((long long)x[p * t.x_pixel + i]);
                    for (int b = 0; b < B; b++) {
                        __m512i v = KIND == AND ? _mm512_and_si512(a, weight[b]) : _mm512_xor_si512(a, weight[b]);
                        if (KIND == MASKED) v = _mm512_and_si512(v, mask[b]);
                        count[p][b] = _mm512_add_epi64(count[p][b], _mm512_popcnt_epi64(v));
                    }
                }
            }
        }
        for (int p = 0; p < P; p++)
            for (int b = 0; b < B; b++) {
                const __m256i n = _mm512_cvtepi64_epi32(count[p][b]), twice = _mm256_add_epi32(n, n);
                const __m256i base =
                    KIND == MASKED ? _mm512_cvtepi64_epi32(present[b]) : _mm256_set1_epi32(t.base[p]);
                const __m256i sum = KIND == AND ? _mm256_add_epi32(base, twice) : _mm256_sub_epi32(base, twice);
                _mm256_storeu_si256((__m256i *)(t.sums + p * t.stride + 8 * b), sum);
            }
    }
};

// AVX2 has no popcount: two table look-ups count the bits of each byte. A block of 8 filters is two registers.
struct Avx2 {
    static constexpr int BLOCKS = 1, PIXELS = 4;

    AVX2 static inline __m256i popcount_bytes(__m256i v) {
        const __m256i table = _mm256_setr_epi8(
            0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
        const __m256i low = _mm256_and_si256(v, _mm256_set1_epi8(15));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
        return _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
    }

    template <int KIND, int B, int P>
    AVX2 static void tile(const Tile &t) {
        const __m256i zero = _mm256_setzero_si256();
        for (int half = 0; half < 2 * B; half++) {
            __m256i count[P], present = zero;
            for (int p = 0; p < P; p++) count[p] = zero;
            for (int row = 0; row < t.rows; row++) {
                const uint64_t *x = t.x + row * t.x_row;
                const uint64_t *w = t.w + row * t.w_row + half / 2 * t.w_block + half % 2 * 4;
                for (int from = 0; from < t.length; from += 31) {  // 31 · 8 is the most that a byte can hold
                    __m256i bytes[P], present_bytes = zero;
                    for (int p = 0; p < P; p++) bytes[p] = zero;
                    for (int i = from; i < std::min(from + 31, t.length); i++, w += KIND == MASKED ? 16 : 8) {
                        const __m256i weight = _mm256_loadu_si256((const __m256i *)w);
                        __m256i mask = zero;
                        if (KIND == MASKED) {
                            mask = _mm256_loadu_si256((const __m256i *)(w + 8));
                            present_bytes = _mm256_add_epi8(present_bytes, popcount_bytes(mask));
                        }
                        for (int p = 0; p < P; p++) {
                            const __m256i a = _mm256_set1_epi64x((long long)x[p * t.x_pixel + i]);
                            __m256i v = KIND == AND ? _mm256_and_si256(a, weight) : _mm256_xor_si256(a, weight);
                            if (KIND == MASKED) v = _mm256_and_si256(v, mask);
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
                    const int64_t base = KIND == MASKED ? m[f] : t.base[p];
                    t.sums[p * t.stride + 4 * half + f] = (int32_t)(KIND == AND ? base + 2 * n[f] : base - 2 * n[f]);
                }
            }
        }
    }
};

template <class Unit, int KIND, int B>
static void any_tile(const Tile &t, bool several) {
    several ? Unit::template tile<KIND, B, Unit::PIXELS>(t) : Unit::template tile<KIND, B, 1>(t);
}

// A few blocks of filters, whose weights then stay in the cache, for all pixels of the row. Where the kernel reaches
// over the image's edge a pixel is a tile of its own.
template <class Unit, int KIND>
static void sums_row(const Shape *s, const uint64_t *x, const uint64_t *w, int row, int32_t *sums) {
    const int words = (s->channels + 63) / 64, blocks = (s->filters + 7) / 8, width = output_size(s, s->width);
    const int word = KIND == MASKED ? 16 : 8;
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
        base[column] = KIND == XNOR ? t.rows * (to[column] - from[column]) * s->channels : 0;
        for (int ky = 0; KIND == AND && ky < t.rows; ky++)
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
            b == 1 ? any_tile<Unit, KIND, 1>(t, p > 1) : any_tile<Unit, KIND, Unit::BLOCKS>(t, p > 1);
        }
    }
}

template <class Unit>
static void sums_row(const Shape *s, const uint64_t *x, const uint64_t *w, int row, int32_t *sums) {
    (s->kind == XNOR ? sums_row<Unit, XNOR> : s->kind == AND ? sums_row<Unit, AND> : sums_row<Unit, MASKED>)(
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

// What a kernel does for each vector, on registers alone: n times exclusive-or, popcount and addition.
AVX512 static int64_t peak(int64_t n) {
    __m512i count[12], weight[12], a = _mm512_set1_epi64(n);
    for (int i = 0; i < 12; i++) count[i] = weight[i] = _mm512_set1_epi64(3 * i + n);
    for (int64_t done = 0; done < n; done += 12) {
        for (int i = 0; i < 12; i++)
            count[i] = _mm512_add_epi64(count[i], _mm512_popcnt_epi64(_mm512_xor_si512(a, weight[i])));
        asm volatile("" : "+v"(a));  // or the compiler would see that nothing changes
    }
    for (int i = 1; i < 12; i++) count[0] = _mm512_add_epi64(count[0], count[i]);
    return _mm512_reduce_add_epi64(count[0]);
}
#endif

extern "C" {
// What this machine can do: 0 portable, 1 AVX2, 2 AVX-512 with VPOPCNTDQ.
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

static int level = binary_conv_best();
void binary_conv_use(int wanted) { level = std::min(wanted, binary_conv_best()); }

// See peak(); 0 where there is no AVX-512.
int64_t binary_conv_peak(int64_t n) {
#if defined(__x86_64__)
    if (binary_conv_best() == 2) return peak(n);
#endif
    return 0 * n;
}

void binary_conv_row(const Shape *s, const uint64_t *x, const uint64_t *w, int row, int32_t *sums) {
#if defined(__x86_64__)
    if (level == 2) return sums_row<Avx512>(s, x, w, row, sums);
    if (level == 1) return sums_row<Avx2>(s, x, w, row, sums);
#endif
    sums_row_portable(s, x, w, row, sums);
}

void binary_conv_threshold(
    const int32_t *sums, int pixels, int filters, const int32_t *low, const int32_t *high, uint64_t *bits) {
#if defined(__x86_64__)
    if (level == 2) return threshold_avx512(sums, pixels, filters, low, high, bits);
#endif
    threshold_portable(sums, pixels, filters, low, high, bits);
}

// A whole layer. sums [height][width][filters, rounded up to a multiple of 8] of the output.
void binary_conv_sums(const Shape *s, const uint64_t *x, const uint64_t *w, int32_t *sums) {
    const int height = output_size(s, s->height), stride = output_size(s, s->width) * ((s->filters + 7) / 8 * 8);
    for (int row = 0; row < height; row++) binary_conv_row(s, x, w, row, sums + (int64_t)row * stride);
}

// A whole layer and the next binary activation: bits in, bits out.
void binary_conv_bits(
    const Shape *s, const uint64_t *x, const uint64_t *w, const int32_t *low, const int32_t *high, uint64_t *bits) {
    const int height = output_size(s, s->height), width = output_size(s, s->width);
    std::vector<int32_t> sums((size_t)width * ((s->filters + 7) / 8 * 8));
    for (int row = 0; row < height; row++) {
        binary_conv_row(s, x, w, row, sums.data());
        binary_conv_threshold(sums.data(), width, s->filters, low, high, bits + row * width * ((s->filters + 63) / 64));
    }
}
}
