// The CPU kernels of selective_scan.py: a Mamba block on scalar tokens, forward and backward, with vector instructions.
// selective_scan.py gives the equations and compiles this file at first use. The recurrence is
//
//     h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t,    Y_t = h_t C_t + D x_t,    output_t = Σ_channels out Y_t silu(in_z u_t)
//
// The file is compiled in two ways:
//
//     with -DTOKENS=L    `last`: many sequences of L tokens, the last output of each; vector lanes are sequences
//     without            `tails`: a few long sequences, the last outputs of each; vector lanes are channels
//
// It needs the vector extensions of GCC or Clang. Constants: W floats are one vector.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(TOKENS) && !defined(__clang__)  // interleaves the independent operations of the unrolled loops
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));

static inline V splat(float a) { return a - (V){}; }
static inline V load(const float *p) { V v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, V v) { std::memcpy(p, &v, sizeof v); }
// The larger and the smaller of a and b; b if either is NaN.
#if defined(__AVX512F__)  // one instruction; GCC compiles the comparison below to two
static inline V vmax(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
static inline V vmin(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline V vmax(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
static inline V vmin(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline V vmax(V a, V b) { return a > b ? a : b; }
static inline V vmin(V a, V b) { return a < b ? a : b; }
#endif
static inline bool all_less(V a, float b) {  // whether a < b in every lane
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_LT_OQ) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_set1_ps(b), _CMP_LT_OQ)) == 0xff;
#else
  bool all = true;
  for (int i = 0; i < W; i++) all &= a[i] < b;
  return all;
#endif
}

// exp2_products: out = 2^(a x) for N vectors x.
//
// The relative error is 2e-7 to 4e-7 and has either sign, so it averages out in products of many decays. Each stage is
// a loop over the N vectors, because the operations of one stage do not depend on each other.
//
// AVX-512: a x is rounded to a multiple of 1/STEPS. 2^(its fraction) is looked up in two registers; `scalef` applies
//   its integer part. 2^(the rest r) is a parabola, c ((r + k)^2 + m). Completing the square with k = 23/16 lets the
//   rounding step add k, and the table contains c. a x may be between -1e24, which gives 0, and 127.
// AVX2: a x is rounded to a multiple of 1/4, whose four powers fit into one lookup. 2^(the rest) is a quartic in y = r
//   + k: c (((y^2 + m) y + n) y + q). The integer part is added to the exponent bits, so a x must be between LOWEST and
//   127. FAR: smaller values are allowed and count as LOWEST, for two more operations.
// Others: a minimax polynomial on [-1/2, 1/2] times 2^(the integer part). Values below -126 count as -126.
constexpr float LOWEST = -115.f;
#ifdef __AVX512F__
constexpr int STEPS = 32;
constexpr float PARABOLA_K = 23.f / 16, PARABOLA_C = 0.2410995f, PARABOLA_M = 2.08125856f;
struct Table {
  alignas(64) float p[STEPS];
  Table() {
    for (int i = 0; i < STEPS; i++) {
      const float x = i / (float)STEPS;
      p[i] = PARABOLA_C * std::exp2(x - std::floor(x - PARABOLA_K));
    }
  }
};
static const Table TABLE;
template <int N, bool FAR = false, class A>
static inline void exp2_products(A a, const V *x, V *out) {
  constexpr float MAGIC = 12582912.f / STEPS;  // 1.5 * 2^23 / STEPS: adding it rounds; the low bits then count steps
  V shifted[N], rounded[N], r[N];              // r is the formula's r + k
  for (int i = 0; i < N; i++) shifted[i] = a * x[i] + MAGIC;
  for (int i = 0; i < N; i++) rounded[i] = shifted[i] - (MAGIC + PARABOLA_K);
  for (int i = 0; i < N; i++) r[i] = a * x[i] - rounded[i];
  for (int i = 0; i < N; i++)  // the index is the lowest 5 bits
    shifted[i] = (V)_mm512_permutex2var_ps(_mm512_load_ps(TABLE.p), (__m512i)shifted[i], _mm512_load_ps(TABLE.p + 16));
  for (int i = 0; i < N; i++) r[i] = (r[i] * r[i] + PARABOLA_M) * shifted[i];
  for (int i = 0; i < N; i++) out[i] = (V)_mm512_scalef_ps((__m512)r[i], (__m512)rounded[i]);
}
static inline V reciprocal(V x) {
  V r = (V)_mm512_rcp14_ps((__m512)x);
  return r * (1.f - x * r) + r;  // one Newton step
}
#elif defined(__AVX2__)
struct { float k, m, n, q, c; } constexpr QUARTIC = {1.4438232f, 12.4764975f, 24.0222368f, 38.9645007f, 0.00961512103f};
struct Table {
  alignas(32) float p[8];
  Table() {
    for (int i = 0; i < 8; i++) {
      const float power = QUARTIC.c * std::exp2(i % 4 / 4.f);
      int32_t bits;
      std::memcpy(&bits, &power, sizeof bits);
      bits -= i % 4 << 21;  // cancels what the shift in exp2_products adds to the mantissa
      std::memcpy(p + i, &bits, sizeof bits);
    }
  }
};
static const Table TABLE;
template <int N, bool FAR = false, class A>
static inline void exp2_products(A a, const V *x, V *out) {
  constexpr float MAGIC = 12582912.f / 4;  // 1.5 * 2^23 / 4: adding it rounds; the low bits then count quarters
  V shifted[N], y[N];
  for (int i = 0; i < N; i++) {
    shifted[i] = a * x[i] + MAGIC;
    if (FAR) shifted[i] = vmax(splat(MAGIC + LOWEST), shifted[i]);
  }
  for (int i = 0; i < N; i++) {
    y[i] = a * x[i] - (shifted[i] - MAGIC) + QUARTIC.k;
    if (FAR) y[i] = vmax(splat(QUARTIC.k - 0.125f), y[i]);
  }
  for (int i = 0; i < N; i++) {
    V table = (V)_mm256_permutevar_ps(_mm256_load_ps(TABLE.p), (__m256i)shifted[i]);
    V power = (V)((I)table + ((I)shifted[i] << 21));
    out[i] = (((y[i] * y[i] + QUARTIC.m) * y[i] + QUARTIC.n) * y[i] + QUARTIC.q) * power;
  }
}
static inline V reciprocal(V x) {
  V r = (V)_mm256_rcp_ps((__m256)x);
  return r * (1.f - x * r) + r;  // one Newton step
}
#else
template <int N, bool FAR = false, class A>
static inline void exp2_products(A a, const V *x, V *out) {
  const V magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  for (int i = 0; i < N; i++) {
    V v = vmax(splat(-126.f), a * x[i]), shifted = v + magic, r = shifted - magic;
    V f = v - r;
    V p = splat(1.333353875e-3f);
    p = p * f + 9.666245476e-3f;
    p = p * f + 5.550500214e-2f;
    p = p * f + 2.402235134e-1f;
    p = p * f + 6.931471435e-1f;
    p = p * f + 1.f;
    out[i] = (V)((I)p + ((I)shifted << 23));
  }
}
static inline V reciprocal(V x) { return 1.f / x; }
#endif

// powers_near: out = 2^(a x) for N vectors x that are near x0, with `known` = 2^(a x0). It takes DEGREE + 1 operations
// instead of the 7 to 13 of exp2_products.
//
// 2^(a (x - x0)) is a minimax polynomial with an error of 4e-7 as long as |a (x - x0)| <= MINIMAX<DEGREE>.reach. It is
// evaluated in v = a y + shift with y = (x - x0) * scale, which the caller passes. There it reads v^DEGREE + c_0
// v^(DEGREE - 2) + c_1 v^(DEGREE - 3) + …: scale makes the leading coefficient 1, shift the second one 0.
struct Minimax { float reach, scale, shift, c[5]; };
template <int DEGREE> constexpr Minimax MINIMAX = {};
template <> constexpr Minimax MINIMAX<2> = {0.03066f, 0.490122153f, 0.707156687f, {0.499929426f}};
template <> constexpr Minimax MINIMAX<3> = {0.135f, 0.381397872f, 0.550883864f, {0.906968575f, 0.333186851f}};
template <> constexpr Minimax MINIMAX<4> = {
    0.3438f, 0.312979276f, 0.454205928f, {1.21462111f, 0.736463537f, 0.372352871f}};
template <> constexpr Minimax MINIMAX<6> = {
    1.079f, 0.230853721f, 0.34663583f, {1.58679897f, 1.4768933f, 1.61116872f, 1.05880455f, 0.353230783f}};
template <int DEGREE, int N> static inline void powers_near(const float *known, float a, const V *y, V *out) {
  constexpr Minimax P = MINIMAX<DEGREE>;
  V v[N], p[N];
  for (int i = 0; i < N; i++) v[i] = a * y[i] + P.shift;
  for (int i = 0; i < N; i++) p[i] = v[i] * v[i] + P.c[0];
  for (int k = 1; k < DEGREE - 1; k++)
    for (int i = 0; i < N; i++) p[i] = p[i] * v[i] + P.c[k];
  for (int i = 0; i < N; i++) out[i] = p[i] * known[i];
}

constexpr float LOG2E = 1.44269504f;
template <int N> static inline void sigmoids(const V *x, V *out) {
  V e[N];
  for (int i = 0; i < N; i++) e[i] = vmax(splat(-79.f), vmin(splat(79.f), x[i]));
  exp2_products<N>(-LOG2E, e, e);  // e^-x
  for (int i = 0; i < N; i++) out[i] = reciprocal(1.f + e[i]);
}

// softpluses: out = log(1 + e^x) and, if SLOPE, its derivative sigmoid(x).
//
// With e = e^-|x|, between 0 and 1, softplus is max(x, 0) + log(1 + e), and log(1 + e) is e times a minimax polynomial
// with an error of 3e-8. If x < -1.61 in all N vectors, then e < 0.2, and a shorter polynomial has an error of 7e-8.
// That is the usual case: the steps Δ of a new Mamba are between 0.001 and 0.1.
template <int N, bool SLOPE> static inline void softpluses(const V *x, V *out, V *slope) {
  constexpr float LOW[] = {0.135555684f, -0.239698414f, 0.332629516f, -0.499982846f, 0.999999932f};
  constexpr float ANY[] = {0.0052326943f, -0.0295052389f, 0.0782259521f, -0.136632458f, 0.191060068f,
                           -0.248429822f, 0.333190968f,   -0.499994931f, 0.99999997f};
  V e[N], p[N], most = x[0];
  for (int i = 1; i < N; i++) most = vmax(x[i], most);
  for (int i = 0; i < N; i++) e[i] = vmax(splat(-79.f), (V)((I)x[i] | INT32_MIN));
  exp2_products<N>(LOG2E, e, e);
  auto polynomial = [&](const auto &c) {
    for (int i = 0; i < N; i++) p[i] = splat(c[0]);
    for (size_t k = 1; k < std::size(c); k++)
      for (int i = 0; i < N; i++) p[i] = p[i] * e[i] + c[k];
  };
  if (all_less(most, -1.61f)) {
    polynomial(LOW);
    for (int i = 0; i < N; i++) {
      if (SLOPE) slope[i] = e[i] * reciprocal(1.f + e[i]);
      out[i] = p[i] * e[i];
    }
    return;
  }
  polynomial(ANY);
  for (int i = 0; i < N; i++) {
    if (SLOPE) {
      V r = reciprocal(1.f + e[i]);
      slope[i] = (I)x[i] < 0 ? e[i] * r : r;
    }
    out[i] = vmax(splat(0.f), x[i]) + p[i] * e[i];
  }
}
static inline V sigmoid(V x) { sigmoids<1>(&x, &x); return x; }
static inline V softplus(V x) { softpluses<1, false>(&x, &x, nullptr); return x; }

// The parameters, row-major: d channels, n states per channel, k taps of the convolution.
struct Params {
  int64_t d, n, k;
  const float *conv, *conv_b;   // [d, k], multiplied by in_x, because a token is a scalar; [d]
  const float *in_z;            // [d]
  const float *xproj;           // [d, 1 + 2n]: the columns are dt, B, C
  const float *dt_w, *dt_b;     // [d]
  const float *A2;              // [d, n]: A log2(e), so that exp(A S) = 2^(A2 S)
  const float *D, *out;         // [d]
};

// Call body(thread, first block, end block) on every thread, with an equal number of blocks each. std::thread and not
// OpenMP, because PyTorch has an OpenMP pool of its own and two pools of spinning threads compete for the cores.
static void on_threads(int threads, int64_t blocks, const std::function<void(int, int64_t, int64_t)> &body) {
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; i++) pool.emplace_back(body, i, blocks * i / threads, blocks * (i + 1) / threads);
  body(0, 0, blocks / threads);
  for (auto &thread : pool) thread.join();
}

// For bench.py, to measure the peak: `count` vector multiply-adds on each thread, in 12 independent chains. Returns W.
extern "C" int multiply_adds(int64_t count, int threads) {
  on_threads(threads, threads, [&](int, int64_t, int64_t) {
    V sums[12], factor = splat(0.999f), term = splat(0.001f);
    for (V &s : sums) s = term;
    asm volatile("" : "+m"(factor), "+m"(term));
    for (int64_t i = 0; i < count; i += 12)
      for (V &s : sums) s = s * factor + term;
    for (V &s : sums) asm volatile("" : : "m"(s));
  });
  return W;
}

struct Array {  // initialised with zeros, aligned to a cache line
  std::vector<float> data;
  float *p;
  explicit Array(int64_t size) : data(size + 16), p((float *)(((uintptr_t)data.data() + 63) & ~(uintptr_t)63)) {}
  Array(const Array &) = delete;
  operator float *() const { return p; }
};
static inline void add(float *p, V v) { store(p, load(p) + v); }

#ifdef TOKENS
// =====================================================================================================================
// last: the last output of many short sequences
// =====================================================================================================================
//
// The equations, from selective_scan.py. With S_t = Δ_{t+1} + … + Δ_L,
//
//     h_L C_L = Σ_t Δ_t x_t Σ_n exp(A_n S_t) B_tn C_Ln
//
// What makes it fast:
//
// 1. L is a compile-time constant, so loops over tokens are unrolled and their values stay in registers.
// 2. A block is W sequences, one per lane. Its intermediate values, [d, L] vectors of x and the like, stay in the L2
//    cache (80 KB at the paper's size with W = 16). Main memory sees L tokens, one output and L gradients per sequence.
// 3. Most exponentials are computed from known ones. The steps Δ = softplus(dt_w dt + dt_b) depend little on the
//    sequence, because dt is small. So S is near the S̄ of another sequence, the centre: a block's first token,
//    followed by zeros. (If the sequences of a block do not begin alike, the centre begins with 0.) 2^(A2 S̄) is
//    computed once per thread for all consecutive blocks with the same first token, which are a layer's weights. Then
//    2^(A2 S) = 2^(A2 S̄) 2^(A2 (S - S̄)), and a polynomial computes the second factor. Its degree is chosen per
//    channel and block, for the largest exponent. If that is too large for every degree, the exponential is computed
//    directly.
// 4. If consecutive blocks have the same first token, what depends on it alone is kept for the next block.
//
// The number of multiplications and multiply-adds per sequence, forward:
//
//     scan            (L - 1) d n exponentials and as many multiply-adds. An exponential is degree + 1 operations, in a
//                     new net mostly 3 or 4; computed directly 4 with AVX-512, else 6
//     projections     (L (n + 1) + n) d
//     convolution     L (L + 1) / 2 d, if k >= L
//     silu, softplus  L d times 17 with AVX-512, else 21; 4 more if Δ > 0.18
//     gate            d times a silu
//
// Backward repeats all of it and adds 3 per exponential of the scan, 4 per silu and softplus, and twice the projections
// and the convolution.

constexpr int L = TOKENS;

// The centre: the sequence token0, 0, 0, …
struct Centre {
  float token0;
  bool found = false;
  Array S, powers;  // S̄ [d, L - 1]; 2^(A2 S̄) [d, n, L - 1]
  Array unit;       // [d]: the |S - S̄| for which the channel's largest |A2 (S - S̄)| is 1
  explicit Centre(const Params &P) : S(P.d * (L - 1)), powers(P.d * P.n * (L - 1)), unit(P.d) {
    for (int64_t c = 0; c < P.d; c++) unit[c] = -1.f / *std::min_element(P.A2 + c * P.n, P.A2 + (c + 1) * P.n);
  }
};

// The intermediate values of one block. The last axis of every array is W, the sequences.
struct Work {
  V token0;                  // the first token that x, slope, dtB, delta and dslope are valid for
  bool filled = false;
  Array x, slope;            // [d, L]: x = silu(conv), and the derivative of that silu
  Array dtB, C;              // [1 + n, L]: dt and B of each token; [n]: C of the last token
  Array delta, dslope;       // [d, L]: Δ, and the derivative of its softplus
  Array BC, sumBC;           // [n, L]: B C; [1]: its sum over n at the last token, for which E = 1
  Array dx, ddtB, dC, dBC;   // gradients of x, dtB, C, BC
  Work(int64_t d, int64_t n)
      : x(d * L * W), slope(d * L * W), dtB((1 + n) * L * W), C(n * W), delta(d * L * W), dslope(d * L * W),
        BC(n * L * W), sumBC(W), dx(d * L * W), ddtB((1 + n) * L * W), dC(n * W), dBC(n * L * W) {}
};

// The projections are small matrix products. A tile of COUNT tokens and ROWS rows (or channels) keeps its sums in
// registers, because a processor multiplies faster than it loads: SUMS of the 32 registers of AVX-512, else of 16.
constexpr int SUMS = W == 16 ? 24 : 12;
template <int COUNT> constexpr int TILE = COUNT > SUMS ? 1 : SUMS / COUNT > 8 ? 8 : SUMS / COUNT;

// out [rows, stride_out] = x [d, L] projected by `rows` columns of xproj [d, stride], for COUNT tokens.
template <int ROWS, int COUNT>
static void project_tile(const float *weight, int64_t stride, int64_t d, const float *x, float *out, int stride_out) {
  V sum[ROWS][COUNT];
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < COUNT; t++) sum[r][t] = splat(0.f);
  for (int64_t c = 0; c < d; c++, weight += stride, x += L * W)
    for (int t = 0; t < COUNT; t++) {
      V v = load(x + t * W);
      for (int r = 0; r < ROWS; r++) sum[r][t] += weight[r] * v;
    }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < COUNT; t++) store(out + (r * stride_out + t) * W, sum[r][t]);
}
template <int COUNT>
static void project_rows(const float *weight, int64_t rows, int64_t stride, int64_t d, const float *x, float *out,
                         int stride_out) {
  int64_t r = 0;
  for (; r + TILE<COUNT> <= rows; r += TILE<COUNT>)
    project_tile<TILE<COUNT>, COUNT>(weight + r, stride, d, x, out + r * stride_out * W, stride_out);
  for (; r < rows; r++) project_tile<1, COUNT>(weight + r, stride, d, x, out + r * stride_out * W, stride_out);
}

// Compute x_t, dt_t, B_t and Δ_t of the tokens FROM <= t < TO; if SLOPE, the derivatives of silu and softplus too.
template <bool SLOPE, int FROM, int TO>
static inline void project_tokens(const Params &P, const V *u, Work &w) {
  const int64_t d = P.d, n = P.n, K = P.k;
  constexpr int N = TO - FROM;
  V a[N], g[N], slope[N];
  for (int64_t c = 0; c < d; c++) {
    const float *conv = P.conv + c * K;
    for (int i = 0, t = FROM; i < N; i++, t++) {
      a[i] = splat(P.conv_b[c]);
      for (int s = t; s >= 0 && t - s < K; s--) a[i] += conv[K - 1 - (t - s)] * u[s];
    }
    sigmoids<N>(a, g);
    for (int i = 0, t = FROM; i < N; i++, t++) {
      V x = a[i] * g[i];
      store(w.x + (c * L + t) * W, x);
      if (SLOPE) store(w.slope + (c * L + t) * W, g[i] + x * (1.f - g[i]));
    }
  }
  project_rows<N>(P.xproj, 1 + n, 1 + 2 * n, d, w.x + FROM * W, w.dtB + FROM * W, L);
  for (int64_t c = 0; c < d; c++) {
    for (int i = 0; i < N; i++) a[i] = P.dt_w[c] * load(w.dtB + (FROM + i) * W) + P.dt_b[c];
    softpluses<N, SLOPE>(a, g, slope);
    for (int i = 0, t = FROM; i < N; i++, t++) {
      store(w.delta + (c * L + t) * W, g[i]);
      if (SLOPE) store(w.dslope + (c * L + t) * W, slope[i]);
    }
  }
}

// Uses w as scratch memory.
static void find_centre(const Params &P, float token0, Work &w, Centre &centre) {
  const V tokens[L] = {splat(token0)};
  w.filled = false;
  if constexpr (L > 1) project_tokens<false, 1, L>(P, tokens, w);
  for (int64_t c = 0; c < P.d; c++) {
    float S = 0.f;
    for (int t = L - 2; t >= 0; t--) {
      centre.S[c * (L - 1) + t] = S = std::min(1e18f, S + w.delta[(c * L + t + 1) * W]);
      for (int64_t r = c * P.n; r < (c + 1) * P.n; r++)
        centre.powers[r * (L - 1) + t] = std::exp2(std::max(P.A2[r] * S, LOWEST));  // keeps NaN
    }
  }
  centre.token0 = token0, centre.found = true;
}

// Compute x, dt, B, C, B C and Δ of a block, and its centre.
//
// What depends on the first token alone is kept from the block before if the first tokens are the same. With a layer
// embedding, they are in all blocks of a layer. The result of a block does not depend on other blocks, bit for bit.
template <bool SLOPE> static void project(const Params &P, const V *u, Work &w, Centre &centre) {
  const int64_t n = P.n;
  bool alike = L > 1;
  for (int i = 1; i < W; i++) alike &= u[0][i] == u[0][0];
  const float token0 = alike ? u[0][0] : 0.f;
  if (!centre.found || centre.token0 != token0) find_centre(P, token0, w, centre);
  if (!w.filled || std::memcmp(&u[0], &w.token0, sizeof(V))) project_tokens<SLOPE, 0, 1>(P, u, w);
  w.token0 = u[0], w.filled = true;
  if constexpr (L > 1) project_tokens<SLOPE, 1, L>(P, u, w);
  project_rows<1>(P.xproj + 1 + n, n, 1 + 2 * n, P.d, w.x + (L - 1) * W, w.C, 1);
  V sum = splat(0.f);
  for (int64_t r = 0; r < n; r++) {
    V C = load(w.C + r * W);
    for (int t = 0; t < L; t++) store(w.BC + (r * L + t) * W, load(w.dtB + ((1 + r) * L + t) * W) * C);
    sum += load(w.BC + (r * L + L - 1) * W);
  }
  store(w.sumBC, sum);
}

// Call scan(powers) for channel c, with a function powers(r, E) that computes E_t = 2^(A2_cr S_t) for t < L - 1. `scan`
// is compiled once for each of the ways to compute them.
template <class Scan>
static inline void scan_with_powers(const Params &P, const Centre &centre, int64_t c, const V *S, Scan scan) {
  const float *A = P.A2 + c * P.n, *S_centre = centre.S + c * (L - 1), *known = centre.powers + c * P.n * (L - 1);
  const float unit = centre.unit[c];
  V y[L], far = splat(0.f);
  for (int t = 0; t < L - 1; t++) y[t] = S[t] - S_centre[t], far = vmax((V)((I)y[t] & INT32_MAX), far);
  auto near = [&](auto degree) {
    for (int t = 0; t < L - 1; t++) y[t] *= MINIMAX<degree.value>.scale;
    scan([&](int64_t r, V *E) { powers_near<degree.value, L - 1>(known + r * (L - 1), A[r], y, E); });
  };
  if (all_less(far, MINIMAX<2>.reach * unit)) return near(std::integral_constant<int, 2>());
  if (all_less(far, MINIMAX<3>.reach * unit)) return near(std::integral_constant<int, 3>());
  if (all_less(far, MINIMAX<4>.reach * unit)) return near(std::integral_constant<int, 4>());
  // With AVX-512, degree 6 would take as many operations as exp2_products.
  if (W < 16 && all_less(far, MINIMAX<6>.reach * unit)) return near(std::integral_constant<int, 6>());
  scan([&](int64_t r, V *E) { exp2_products<L - 1, true>(A[r], S, E); });
}

// The backward pass of the projections for channels c to c + TILED: adds to dx, and to xproj's gradient g [d, 1 + 2n].
template <int TILED> static void project_back(const Params &P, int64_t c, Work &w, float *g) {
  const int64_t n = P.n, stride = 1 + 2 * n;
  const float *weight = P.xproj + c * stride;
  float *x = w.x + c * L * W, *dx = w.dx + c * L * W;
  V a[TILED][L];
  for (int i = 0; i < TILED; i++)
    for (int t = 0; t < L; t++) a[i][t] = load(dx + (i * L + t) * W);
  for (int64_t r = 0; r <= n; r++)
    for (int t = 0; t < L; t++) {
      V v = load(w.ddtB + (r * L + t) * W);
      for (int i = 0; i < TILED; i++) a[i][t] += weight[i * stride + r] * v;
    }
  for (int64_t r = 0; r < n; r++)
    for (int i = 0; i < TILED; i++) a[i][L - 1] += weight[i * stride + 1 + n + r] * load(w.dC + r * W);
  for (int i = 0; i < TILED; i++)
    for (int t = 0; t < L; t++) store(dx + (i * L + t) * W, a[i][t]), a[i][t] = load(x + (i * L + t) * W);
  g += c * stride * W;
  for (int64_t r = 0; r <= n; r++) {
    V sum[TILED];
    for (int i = 0; i < TILED; i++) sum[i] = load(g + (i * stride + r) * W);
    for (int t = 0; t < L; t++) {
      V v = load(w.ddtB + (r * L + t) * W);
      for (int i = 0; i < TILED; i++) sum[i] += v * a[i][t];
    }
    for (int i = 0; i < TILED; i++) store(g + (i * stride + r) * W, sum[i]);
  }
  for (int64_t r = 0; r < n; r++)
    for (int i = 0; i < TILED; i++) {
      float *p = g + (i * stride + 1 + n + r) * W;
      store(p, load(p) + load(w.dC + r * W) * a[i][L - 1]);
    }
}

static void load_tokens(const float *u, int64_t sequences, int64_t first, V *out) {  // u [L, sequences]
  const int64_t count = std::min<int64_t>(sequences - first, W);
  for (int t = 0; t < L; t++) {
    float lane[W] = {};
    std::memcpy(lane, u + t * sequences + first, count * sizeof(float));
    out[t] = load(lane);
  }
}

// u [L, sequences] -> y [sequences], each sequence's last output.
extern "C" void mamba_last_forward(const Params *params, int64_t sequences, const float *u, float *y, int threads) {
  const Params &P = *params;
  const int64_t blocks = (sequences + W - 1) / W;
  on_threads(threads, blocks, [&](int, int64_t first, int64_t last) {
    const int64_t d = P.d, n = P.n;  // local copies, which the compiler knows no store can change
    Work w(d, n);
    Centre centre(P);
    for (int64_t b = first; b < last; b++) {
      V tok[L];
      load_tokens(u, sequences, b * W, tok);
      project<false>(P, tok, w, centre);
      V total = splat(0.f);
      for (int64_t c = 0; c < d; c++) {
        V delta[L], S[L], acc[L];
        for (int t = 0; t < L; t++) {
          delta[t] = load(w.delta + (c * L + t) * W);
          acc[t] = splat(0.f);
        }
        S[L - 1] = splat(0.f);
        for (int t = L - 2; t >= 0; t--) S[t] = vmin(splat(1e18f), S[t + 1] + delta[t + 1]);  // A S stays finite
        scan_with_powers(P, centre, c, S, [&](auto powers) {
          for (int64_t r = 0; r < n; r++) {
            V E[L];
            powers(r, E);
            for (int t = 0; t < L - 1; t++) acc[t] += E[t] * load(w.BC + (r * L + t) * W);
          }
        });
        acc[L - 1] = load(w.sumBC);
        V yc = P.D[c] * load(w.x + (c * L + L - 1) * W);
        for (int t = 0; t < L; t++) yc += delta[t] * load(w.x + (c * L + t) * W) * acc[t];
        V z = P.in_z[c] * tok[L - 1];
        total += P.out[c] * yc * z * sigmoid(z);
      }
      float lane[W];
      store(lane, total);
      std::memcpy(y + b * W, lane, std::min<int64_t>(sequences - b * W, W) * sizeof(float));
    }
  });
}

// gy [sequences] -> du [L, sequences], unless null, and the parameters' gradients, one after another in Params' order:
// [conv d k | conv_b d | in_z d | xproj d (1 + 2n) | dt_w d | dt_b d | A d n | D d | out d]. A is A, not A2.
extern "C" void mamba_last_backward(const Params *params, int64_t sequences, const float *u, const float *gy, float *du,
                                    float *grads, int threads) {
  const Params &P = *params;
  const int64_t d = P.d, n = P.n, K = P.k, blocks = (sequences + W - 1) / W;
  const int64_t size = d * K + d + d + d * (1 + 2 * n) + d + d + d * n + d + d;
  Array parts(threads * size * W);  // each thread's sums, one per lane; added up in a fixed order at the end
  on_threads(threads, blocks, [&](int thread, int64_t first, int64_t last) {
    const int64_t d = P.d, n = P.n, K = P.k;
    Work w(d, n);
    Centre centre(P);
    float *g_conv = parts + thread * size * W, *g_conv_b = g_conv + d * K * W, *g_in_z = g_conv_b + d * W,
          *g_xproj = g_in_z + d * W, *g_dt_w = g_xproj + d * (1 + 2 * n) * W, *g_dt_b = g_dt_w + d * W,
          *g_A = g_dt_b + d * W, *g_D = g_A + d * n * W, *g_out = g_D + d * W;
    for (int64_t b = first; b < last; b++) {
      V tok[L], dtok[L], go;
      load_tokens(u, sequences, b * W, tok);
      {
        float lane[W] = {};
        std::memcpy(lane, gy + b * W, std::min<int64_t>(sequences - b * W, W) * sizeof(float));
        go = load(lane);
      }
      project<true>(P, tok, w, centre);
      for (int t = 0; t < L; t++) dtok[t] = splat(0.f);
      std::memset(w.ddtB, 0, L * W * sizeof(float));
      std::memset(w.dBC, 0, L * n * W * sizeof(float));
      V dsum = splat(0.f);  // the gradient of sumBC
      for (int64_t c = 0; c < d; c++) {
        V delta[L], S[L], acc[L], accA[L], cc[L], cS[L], x[L];
        V z = P.in_z[c] * tok[L - 1], sz = sigmoid(z), silu = z * sz;
        V dy = go * P.out[c] * silu;
        for (int t = 0; t < L; t++) {
          delta[t] = load(w.delta + (c * L + t) * W);
          x[t] = load(w.x + (c * L + t) * W);
          acc[t] = accA[t] = splat(0.f);
        }
        S[L - 1] = splat(0.f);
        for (int t = L - 2; t >= 0; t--) S[t] = vmin(splat(1e18f), S[t + 1] + delta[t + 1]);  // A S stays finite
        for (int t = 0; t < L; t++) cc[t] = dy * delta[t] * x[t], cS[t] = cc[t] * S[t];
        const float *A = P.A2 + c * n;
        scan_with_powers(P, centre, c, S, [&](auto powers) {
          for (int64_t r = 0; r < n; r++) {
            V E[L], dA = splat(0.f);
            powers(r, E);
            for (int t = 0; t < L - 1; t++) add(w.dBC + (r * L + t) * W, cc[t] * E[t]);
            for (int t = 0; t < L - 1; t++) {
              V q = E[t] * load(w.BC + (r * L + t) * W);
              acc[t] += q;
              accA[t] += A[r] * q;
              dA += cS[t] * q;
            }
            add(g_A + (c * n + r) * W, dA);
          }
        });
        acc[L - 1] = load(w.sumBC);
        dsum += cc[L - 1];
        // The channel's part of the output is out silu(z) (Σ_t Δ_t x_t acc_t + D x_L).
        V yc = P.D[c] * x[L - 1], dx[L], ddelta[L], carry = splat(0.f);
        const float ln2 = 0.693147181f;
        for (int t = 0; t < L; t++) {
          yc += delta[t] * x[t] * acc[t];
          V ddrive = dy * acc[t];
          dx[t] = ddrive * delta[t];
          ddelta[t] = ddrive * x[t] + carry;  // S_s contains Δ_t for every s < t
          carry += cc[t] * accA[t] * ln2;     // the gradient of S_t; ln 2 because accA uses A2
        }
        dx[L - 1] += dy * P.D[c];
        add(g_D + c * W, dy * x[L - 1]);
        V gyc = go * yc;
        add(g_out + c * W, gyc * silu);
        V dz = gyc * P.out[c] * (sz + silu * (1.f - sz));
        add(g_in_z + c * W, dz * tok[L - 1]);
        dtok[L - 1] += dz * P.in_z[c];
        V gw = splat(0.f), gb = splat(0.f);
        for (int t = 0; t < L; t++) {
          V da = ddelta[t] * load(w.dslope + (c * L + t) * W);
          gw += da * load(w.dtB + t * W), gb += da;
          add(w.ddtB + t * W, da * P.dt_w[c]);
          store(w.dx + (c * L + t) * W, dx[t]);
        }
        add(g_dt_w + c * W, gw), add(g_dt_b + c * W, gb);
      }
      for (int64_t r = 0; r < n; r++) {  // the gradients of B and C from that of B C
        store(w.dBC + (r * L + L - 1) * W, dsum);
        V dC = splat(0.f), C = load(w.C + r * W);
        for (int t = 0; t < L; t++) {
          V v = load(w.dBC + (r * L + t) * W);
          dC += v * load(w.dtB + ((1 + r) * L + t) * W);
          store(w.ddtB + ((1 + r) * L + t) * W, v * C);
        }
        store(w.dC + r * W, dC);
      }
      int64_t c = 0;
      for (; c + TILE<L> <= d; c += TILE<L>) project_back<TILE<L>>(P, c, w, g_xproj);
      for (; c < d; c++) project_back<1>(P, c, w, g_xproj);
      for (c = 0; c < d; c++) {
        const float *conv = P.conv + c * K;
        V da[L], gb = splat(0.f);
        for (int t = 0; t < L; t++) gb += da[t] = load(w.dx + (c * L + t) * W) * load(w.slope + (c * L + t) * W);
        add(g_conv_b + c * W, gb);
        for (int lag = 0; lag < L && lag < K; lag++) {
          V sum = splat(0.f);
          for (int t = lag; t < L; t++) sum += da[t] * tok[t - lag], dtok[t - lag] += da[t] * conv[K - 1 - lag];
          add(g_conv + (c * K + K - 1 - lag) * W, sum);
        }
      }
      for (int t = 0; t < L && du; t++) {
        float lane[W];
        store(lane, dtok[t]);
        std::memcpy(du + t * sequences + b * W, lane, std::min<int64_t>(sequences - b * W, W) * sizeof(float));
      }
    }
  });
  for (int64_t i = 0; i < size; i++) {
    double sum = 0;
    for (int64_t thread = 0; thread < threads; thread++)
      for (int lane = 0; lane < W; lane++) sum += parts[(thread * size + i) * W + lane];
    grads[i] = (float)sum;
  }
}

#else
// =====================================================================================================================
// tails: the last outputs of a few long sequences
// =====================================================================================================================
//
// There is one sequence per layer: u = [first,] past[0], …, past[l-1] of that layer. The outputs at its last tokens are
// wanted, one per weight of the layer. Forward, with h [d, n]; a, x, Δ, Y [d]; B, C [n]; u, dt scalar:
//
//     a_t = conv * u + bias              x_t = silu(a_t)
//     dt_t, B_t, C_t = proj x_t          Δ_t = softplus(dt_w dt_t + dt_b)
//     h_t = E_t h_{t-1} + Δ_t x_t B_t    E_t = exp(A Δ_t)
//     Y_t = h_t C_t + D x_t              output_t = Σ_d out Y_t silu(z_t)
//
// Backward, with g_t the gradient of output_t and gy_t = g_t out silu(z_t) that of h_t C_t. The gradient of h_t, called
// the adjoint G_t, is a recurrence backwards in time:
//
//     G_t = gy_t C_t + E_{t+1} G_{t+1}
//
// Everything else follows from it, with λ_t = E_t G_t h_{t-1}, the gradient of A Δ_t:
//
//     ∂/∂(Δ_t x_t) = Σ_n G_t B_t         ∂/∂B_t = Σ_d G_t Δ_t x_t
//     ∂/∂Δ_t      += Σ_n A λ_t           ∂/∂C_t = Σ_d gy_t h_t
//     ∂/∂A        += Δ_t λ_t
//
// How it is computed:
//
// - A block is W channels, one per lane. A chunk is T consecutive tokens. Chunks are counted from the end of the
//   sequence: chunk j has the tokens length - (j + 1) T <= t < length - j T. If the sequence is too short to fill the
//   last chunk, the tokens before its start have x = 0 and Δ = 0, which leaves h at 0.
// - Within a chunk, a group of R states at a time goes through all tokens, with h in registers.
// - The arrays of a chunk stay in the L2 cache: [blocks][T][W] for x and the like, [rows][T] for the projections, where
//   the rows are dt, B and C. Those of one block stay near the L1 cache.
// - Backward, the chunks are processed from the last to the first. Each computes x, the projections and Δ again, then
//   the states from the h saved before the chunk, then the adjoint and all gradients.
//
// Which tokens are skipped:
//
// - A state decays between two tokens by exp(A Σ Δ). An output does not depend on what has decayed by e^-18 or more:
//   that is float32's resolution and a margin.
// - So each group of states of each block starts at a chunk of its own, with h = 0. `plan_unit` finds it. It walks back
//   from the first chunk with an output. It does not need Δ, only dt: softplus is convex, so over a chunk
//   Σ Δ >= T softplus(dt_w mean(dt) + dt_b).
// - Blocks are made of channels that forget about equally fast. In a new net, A = -1, …, -n and Δ is between 1e-3 and
//   1e-1, so only a few states start early.
// - Chunks without outputs need no C and no y, and B only for the states that have started.
//
// What it costs:
//
//     per token, channel and state    forward an exponential and 3 multiply-adds; backward the exponential and 11. The
//                                     exponential is 4 multiply-adds if the exponent is small, else 6 with AVX2
//     per token and channel           forward 2n + 1 multiply-adds of the projections, k of the convolution, silu twice
//                                     and softplus once; backward all of that, the projections twice more and the
//                                     convolution once more
//     main memory                     4 bytes per token and output; 4 d n / T per token for h, written once and read once
//
// The work is divided into units of up to SEGMENT outputs of a layer. Each unit has its own sums of gradients, which
// are added up in a fixed order. So the result does not depend on the number of threads, bit for bit.

constexpr int T = 64, R = 2;
constexpr int64_t SEGMENT = 1 << 18;
constexpr float FORGOTTEN = 18 * LOG2E;
static_assert(T % W == 0 && T % 8 == 0, "chunks are whole vectors of tokens");

// The history of all layers.
struct Sequences {
  int64_t length, weights, layers, has_first;
  const int64_t *sizes;  // [layers]: the number of weights of each, `weights` together
  const float *past;     // [length, weights]
  const float *first;    // [layers], if has_first
};

// The outputs start <= i < start + outputs of a layer. They are the last outputs of a sequence of `length` tokens.
struct Unit {
  int64_t layer, offset, weights;  // the layer's columns are past[:, offset : offset + weights]
  int64_t start, outputs, length, chunks;
};

static std::vector<Unit> units_of(const Sequences &s) {
  std::vector<Unit> units;
  for (int64_t i = 0, offset = 0; i < s.layers; offset += s.sizes[i++])
    for (int64_t start = 0, weights = s.sizes[i]; start < weights; start += SEGMENT) {
      const int64_t outputs = std::min(SEGMENT, weights - start);
      const int64_t length = s.has_first + (s.length - 1) * weights + start + outputs;
      units.push_back({i, offset, weights, start, outputs, length, (length + T - 1) / T});
    }
  return units;
}

// u [count] = the tokens of a unit's sequence from position `from` on; 0 before its start.
static void tokens_of(const Sequences &s, const Unit &unit, int64_t from, int64_t count, float *u) {
  for (int64_t i = 0, run; i < count; i += run) {
    const int64_t t = from + i, w = t - s.has_first, row = w / unit.weights, column = w % unit.weights;
    run = 1;
    if (t < 0) u[i] = 0.f;
    else if (w < 0) u[i] = s.first[unit.layer];
    else {
      run = std::min(count - i, unit.weights - column);
      std::memcpy(u + i, s.past + row * s.weights + unit.offset + column, run * sizeof(float));
    }
  }
}

// The parameters, laid out by blocks of channels. The channels are sorted by how fast they forget, slowest first.
// Unused lanes of the last block, and states beyond P.n, have the Δ and A of a real one, but all weights to and from
// them are 0.
struct Net {
  const Params &P;
  int64_t blocks, groups;        // of W channels; of R states
  int64_t n, lags, rows, lanes;  // groups * R; k rounded up to a multiple of 4; 1 + 2n; blocks * W
  std::vector<int64_t> channel;  // of each lane; -1 if it is unused
  Array conv;                    // [blocks][lags][W], multiplied by in_x
  Array conv_b, in_z, dt_w, dt_b, D, out;  // [lanes]
  Array A2, fastest;             // [blocks][groups][R][W]; [blocks][groups][W]: the smallest A2 of a group
  Array proj;                    // [rows][blocks][W]

  explicit Net(const Params &P)
      : P(P), blocks((P.d + W - 1) / W), groups((P.n + R - 1) / R), n(groups * R), lags((P.k + 3) / 4 * 4),
        rows(1 + 2 * n), lanes(blocks * W), channel(lanes, -1), conv(blocks * lags * W), conv_b(lanes), in_z(lanes),
        dt_w(lanes), dt_b(lanes), D(lanes), out(lanes), A2(n * lanes), fastest(groups * lanes), proj(rows * lanes) {
    std::vector<std::pair<float, int64_t>> order;
    for (int64_t c = 0; c < P.d; c++) {
      const float decay = *std::max_element(P.A2 + c * P.n, P.A2 + (c + 1) * P.n) * std::log1p(std::exp(P.dt_b[c]));
      order.push_back({decay < 0 ? decay : 0.f, c});  // NaN cannot be sorted
    }
    std::sort(order.begin(), order.end(), std::greater<>());
    for (int64_t i = 0; i < lanes; i++) {
      const int64_t c = order[std::min(i, P.d - 1)].second, b = i / W, lane = i % W;
      dt_w[i] = P.dt_w[c], dt_b[i] = P.dt_b[c];
      for (int64_t r = 0; r < n; r++) A2[(b * n + r) * W + lane] = P.A2[c * P.n + std::min(r, P.n - 1)];
      for (int64_t g = 0; g < groups; g++) {
        float &a = fastest[(b * groups + g) * W + lane] = 0.f;
        for (int r = 0; r < R; r++) a = std::min(a, A2[(b * n + g * R + r) * W + lane]);
      }
      if (i >= P.d) continue;
      channel[i] = c;
      conv_b[i] = P.conv_b[c], in_z[i] = P.in_z[c], D[i] = P.D[c], out[i] = P.out[c];
      for (int64_t k = 0; k < P.k; k++) conv[(b * lags + k) * W + lane] = P.conv[c * P.k + P.k - 1 - k];
      for (int64_t r = 0; r < 1 + 2 * P.n; r++) proj[row(r) * lanes + i] = P.xproj[c * (1 + 2 * P.n) + r];
    }
  }
  int64_t row(int64_t r) const { return r <= P.n ? r : r + n - P.n; }  // proj's row for row r of x_proj
};

template <int... M>
static inline V pick(V a, V b) {  // lane i is lane M[i] of a and b concatenated
#ifdef __clang__
  return __builtin_shufflevector(a, b, M...);
#else
  return __builtin_shuffle(a, b, (I){M...});
#endif
}
// One step of summing the lanes of two vectors: lane i is a[i] + a[i ^ S] if i has no bit S, else b[i] + b[i ^ S].
template <int S, int... i>
static inline V halve(V a, V b, std::integer_sequence<int, i...>) {
  return pick<(i & S ? W + i : i)...>(a, b) + pick<(i & S ? W + (i ^ S) : (i ^ S))...>(a, b);
}
// Sum the lanes of N vectors v. With N = W and S = 1, lane i of the result is the sum of the lanes of v[i]. The same
// can be done in two steps: N = 4 and S = 1 for each 4 of the vectors, then N = W / 4 and S = 4 for the results.
template <int N = W, int S = 1>
static inline V lane_sums(const V *v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    V half[N / 2];
    for (int i = 0; i < N / 2; i++) half[i] = halve<S>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, W>());
    return lane_sums<N / 2, 2 * S>(half);
  }
}
static void add_lane_sums(const float *v, float *to) {  // to [T] += the sums over the lanes of v [T][W]
  for (int t0 = 0; t0 < T; t0 += W) {
    V part[W];
    for (int t = 0; t < W; t++) part[t] = load(v + (t0 + t) * W);
    add(to + t0, lane_sums(part));
  }
}

// The range of the exponents A2 Δ of a group in a chunk: at least -0.5, at least LOWEST, or any.
enum Reach { NEAR, MID, FAR };

// The decay E = 2^(a delta) of a state in one step. NEAR returns E - 1 instead, with a relative error of 9e-7, as a
// polynomial in delta. If E is close to 1, a state remembers about 1 / (1 - E) tokens, and rounding E to float32 would
// change that number.
template <Reach REACH> struct Decay {
  V a, c[5];
  explicit Decay(V a) : a(a) {
    c[1] = a * 6.931465670e-1f, c[2] = a * a * 2.401881232e-1f, c[3] = a * a * a * 5.512203524e-2f;
    c[4] = a * a * a * a * 8.376760769e-3f;
  }
  V operator()(V delta) const {
    if (REACH == NEAR) return (((c[4] * delta + c[3]) * delta + c[2]) * delta + c[1]) * delta;
    V E;
    exp2_products<1, REACH == FAR>(a, &delta, &E);
    return E;
  }
};
template <Reach REACH>
static inline V times(V decay, V h, V b) {  // E h + b, with the result of Decay
  return REACH == NEAR ? decay * h + (h + b) : decay * h + b;
}

// Scan a chunk with one group of states of a block.
// A2 [R][W]; delta = Δ and drive = Δ x [T][W]; B, C [R][T]; h [R][W] before the chunk -> after [R][W].
// OUT: y [T][W] += h C. KEEP: store the decay and the h before each token in decays, states [T][R][W].
template <Reach REACH, bool OUT, bool KEEP>
static void scan(const float *A2, const float *delta, const float *drive, const float *B, const float *C,
                 const float *h, float *after, float *y, float *decays, float *states) {
  static_assert(R == 2, "the constructor calls below are written out");
  const Decay<REACH> decay[R] = {Decay<REACH>(load(A2)), Decay<REACH>(load(A2 + W))};
  V s[R];
  for (int r = 0; r < R; r++) s[r] = load(h + r * W);
  for (int t = 0; t < T; t++) {
    V dt = load(delta + t * W), in = load(drive + t * W), sum = splat(0.f);
    for (int r = 0; r < R; r++) {
      V e = decay[r](dt);
      if (KEEP) store(decays + (t * R + r) * W, e), store(states + (t * R + r) * W, s[r]);
      s[r] = times<REACH>(e, s[r], in * B[r * T + t]);
      if (OUT) sum += s[r] * C[r * T + t];
    }
    if (OUT) add(y + t * W, sum);
  }
  for (int r = 0; r < R; r++) store(after + r * W, s[r]);
}
template <bool OUT, bool KEEP>
constexpr auto scan_for(Reach reach) {
  return reach == NEAR ? scan<NEAR, OUT, KEEP> : reach == MID ? scan<MID, OUT, KEEP> : scan<FAR, OUT, KEEP>;
}

// The backward pass of `scan`. h [R][W] is the state after the chunk. carry [R][W] is E G of the token after the chunk
// and becomes that of the chunk's first token. Adds to the gradients ddrive [T][W], dB and dC [R][T], dA [R][W], and to
// ddelta [T][W], which is in units of ln 2.
template <bool NEAR, bool OUT>
static void scan_back(const float *A2, const float *delta, const float *drive, const float *B, const float *C,
                      const float *h, const float *gy, const float *decays, const float *states, float *carry,
                      float *ddrive, float *ddelta, float *dA, float *dB, float *dC) {
  V a[R], s[R], eG[R], sumA[R];
  for (int r = 0; r < R; r++) a[r] = load(A2 + r * W), s[r] = load(h + r * W), eG[r] = load(carry + r * W);
  for (V &sum : sumA) sum = splat(0.f);
  for (int t0 = T - W; t0 >= 0; t0 -= W) {
    V forB[R][W / 4], forC[R][W / 4];  // partial lane sums; spreads the shuffles over the multiply-adds
    for (int i = W - 4; i >= 0; i -= 4) {
      V fourB[R][4], fourC[R][4];
#pragma GCC unroll 4
      for (int k = 3; k >= 0; k--) {
        const int t = t0 + i + k;
        V dt = load(delta + t * W), in = load(drive + t * W), g = OUT ? load(gy + t * W) : splat(0.f);
        V sum_in = load(ddrive + t * W), sum_dt = load(ddelta + t * W);
        for (int r = 0; r < R; r++) {
          V e = load(decays + (t * R + r) * W), before = load(states + (t * R + r) * W), G = eG[r];
          if (OUT) G += g * C[r * T + t], fourC[r][k] = g * s[r];
          fourB[r][k] = G * in;
          sum_in += G * B[r * T + t];
          eG[r] = NEAR ? e * G + G : e * G;
          V lambda = eG[r] * before;
          sum_dt += a[r] * lambda;
          sumA[r] += dt * lambda;
          s[r] = before;
        }
        store(ddrive + t * W, sum_in), store(ddelta + t * W, sum_dt);
      }
      for (int r = 0; r < R; r++) {
        forB[r][i / 4] = lane_sums<4>(fourB[r]);
        if (OUT) forC[r][i / 4] = lane_sums<4>(fourC[r]);
      }
    }
    for (int r = 0; r < R; r++) {
      add(dB + r * T + t0, lane_sums<W / 4, 4>(forB[r]));
      if (OUT) add(dC + r * T + t0, lane_sums<W / 4, 4>(forC[r]));
    }
  }
  for (int r = 0; r < R; r++) store(carry + r * W, eG[r]), add(dA + r * W, sumA[r]);
}

// The gradients of one unit, in Net's layout. `first` is one vector, to be summed over its lanes.
struct Sums {
  float *conv, *conv_b, *in_z, *dt_w, *dt_b, *D, *out, *A, *proj, *first;
  static int64_t size(const Net &m) { return (m.lags + 6 + m.n + m.rows) * m.lanes + W; }
  Sums(const Net &m, float *p)
      : conv(p), conv_b(conv + m.lags * m.lanes), in_z(conv_b + m.lanes), dt_w(in_z + m.lanes), dt_b(dt_w + m.lanes),
        D(dt_b + m.lanes), out(D + m.lanes), A(out + m.lanes), proj(A + m.n * m.lanes),
        first(proj + m.rows * m.lanes) {}
};

// The memory in which a thread processes one chunk.
struct Chunk {
  const Net &m;
  const Sequences &s;
  Array tokens;                               // [lags - 1 + T]
  Array x, slope, dx;                         // [blocks][T][W]: x, the derivative of its silu, its gradient
  Array projected, dprojected;                // [rows][T]: dt, B and C, and their gradients
  Array delta, sigma, drive;                  // [T][W], of one block: Δ, the derivative of its softplus, Δ x
  Array y, gy, ddelta, ddrive, gate, dgate;   // [T][W], of one block: h C and its gradient; …; silu(z), its derivative
  Array lanewise;                             // [T][W]: outputs, or the gradient of dt, to be summed over the lanes
  Array decays, states;                       // [T][R][W]: E (or E - 1) and the h before each token, of one group
  Array carry;                                // [blocks][groups][R][W]: E G of the token after the chunk
  float *u;                                   // the chunk's first token in `tokens`
  int64_t base;                               // its position in the sequence; negative before the start
  std::vector<int64_t> active;                // the rows of proj that are needed

  Chunk(const Net &m, const Sequences &s, bool back)
      : m(m), s(s), tokens(m.lags + T), x(m.lanes * T), slope(back ? m.lanes * T : 0), dx(back ? m.lanes * T : 0),
        projected(m.rows * T), dprojected(back ? m.rows * T : 0), delta(T * W), sigma(T * W), drive(T * W), y(T * W),
        gy(T * W), ddelta(T * W), ddrive(T * W), gate(T * W), dgate(T * W), lanewise(T * W), decays(T * R * W), states(T * R * W),
        carry(back ? m.n * m.lanes : 0), u(tokens + m.lags - 1) {}

  // Compute x = silu(conv u) of chunk j, and if SLOPE, the derivative of silu.
  template <bool SLOPE>
  void inputs(const Unit &unit, int64_t j) {
    base = unit.length - (j + 1) * T;
    tokens_of(s, unit, base - (m.lags - 1), m.lags - 1 + T, tokens);
    for (int64_t b = 0; b < m.blocks; b++)
      for (int t = 0; t < T; t += 8) {
        V a[8];
        for (int i = 0; i < 8; i++) a[i] = load(m.conv_b + b * W);
        for (int64_t k = 0; k < m.lags; k++) {
          V w = load(m.conv + (b * m.lags + k) * W);
          for (int i = 0; i < 8; i++) a[i] += w * u[t + i - k];
        }
        V g[8];
        sigmoids<8>(a, g);
        for (int i = 0; i < 8; i++) {
          V v = a[i] * g[i];
          store(x + (b * T + t + i) * W, v);
          if (SLOPE) store(slope + (b * T + t + i) * W, g[i] + v * (1.f - g[i]));
        }
      }
    for (int64_t b = 0; b < m.blocks; b++)
      for (int64_t t = 0; t < std::min<int64_t>(T, -base); t++) store(x + (b * T + t) * W, splat(0.f));
  }

  // Compute dt, and B of the groups of states that have started; if `out`, dt and all of B and C.
  void project(const int32_t *plan, int64_t j, bool out) {
    active.assign(1, 0);
    for (int64_t r = 0; r < m.P.n; r++) {
      bool started = out;
      for (int64_t b = 0; b < m.blocks && !started; b++) started = j < plan[b * m.groups + r / R];
      if (started) active.push_back(1 + r);
    }
    for (int64_t r = 0; r < m.P.n && out; r++) active.push_back(1 + m.n + r);
    for (int64_t row : active)
      for (int t = 0; t < T; t += W) {
        V a[W];
        for (int i = 0; i < W; i++) a[i] = splat(0.f);
        for (int64_t b = 0; b < m.blocks; b++) {
          V w = load(m.proj + row * m.lanes + b * W);
          for (int i = 0; i < W; i++) a[i] += w * load(x + (b * T + t + i) * W);
        }
        store(projected + row * T + t, lane_sums(a));
      }
  }

  // Compute Δ and Δ x of a block, and if SLOPE, the derivative of softplus. Returns the largest Δ.
  template <bool SLOPE>
  V steps(int64_t b) {
    V w = load(m.dt_w + b * W), bias = load(m.dt_b + b * W), most = splat(0.f);
    for (int t0 = 0; t0 < T; t0 += 8) {
      V a[8], d[8], slope[8];
      for (int i = 0; i < 8; i++) a[i] = w * projected[t0 + i] + bias;
      softpluses<8, SLOPE>(a, d, slope);
      for (int i = 0, t = t0; i < 8; i++, t++) {
        d[i] = base + t < 0 ? splat(0.f) : vmin(splat(1e18f), d[i]);  // A Δ stays finite
        if (SLOPE) store(sigma + t * W, slope[i]);
        most = vmax(most, d[i]);
        store(delta + t * W, d[i]), store(drive + t * W, d[i] * load(x + (b * T + t) * W));
      }
    }
    return most;
  }
  Reach reach(int64_t group, V most) const {
    float x[W];
    store(x, load(m.fastest + group * W) * most);
    bool near = true, mid = true;
    for (int i = 0; i < W; i++) near &= x[i] >= -0.5f, mid &= x[i] >= LOWEST;
    return near ? NEAR : mid ? MID : FAR;
  }

  // Compute silu(z) of a block, its derivative, and gy from the outputs' gradients g [T].
  void gates(int64_t b, const float *g) {
    V w = load(m.out + b * W), in_z = load(m.in_z + b * W);
    for (int t = 0; t < T; t++) {
      V z = in_z * u[t], s = sigmoid(z), silu = z * s;
      store(gate + t * W, silu), store(dgate + t * W, s + silu * (1.f - s)), store(gy + t * W, g[t] * w * silu);
    }
  }

  // Gradients of D, out and in_z.
  void outputs_back(int64_t b, const float *g, const Sums &sum) {
    V D = load(m.D + b * W), sum_D = splat(0.f), sum_out = sum_D, sum_z = sum_D;
    for (int t = 0; t < T; t++) {
      V v = load(x + (b * T + t) * W), Y = g[t] * (load(y + t * W) + D * v);
      sum_D += load(gy + t * W) * v;
      sum_out += Y * load(gate + t * W);
      sum_z += Y * load(dgate + t * W) * u[t];
    }
    add(sum.D + b * W, sum_D), add(sum.out + b * W, sum_out), add(sum.in_z + b * W, sum_z * load(m.out + b * W));
  }

  // From the gradients of Δ and Δ x to those of dt_w, dt_b, x, and dt (in lanewise).
  void steps_back(int64_t b, bool out, const Sums &sum) {
    V w = load(m.dt_w + b * W), D = load(m.D + b * W), sum_w = splat(0.f), sum_b = sum_w;
    for (int t = 0; t < T; t++) {
      V into = load(ddrive + t * W), v = into * load(delta + t * W);
      V da = (load(ddelta + t * W) * 0.693147181f + into * load(x + (b * T + t) * W)) * load(sigma + t * W);
      sum_w += da * projected[t], sum_b += da;
      add(lanewise + t * W, da * w);
      if (out) v += load(gy + t * W) * D;
      store(dx + (b * T + t) * W, v);
    }
    add(sum.dt_w + b * W, sum_w), add(sum.dt_b + b * W, sum_b);
  }

  // From the gradients of N active rows to that of proj.
  template <int N>
  void rows_back(int64_t b, size_t first, const Sums &sum) {
    V part[N] = {};
    const float *from[N];
    for (int i = 0; i < N; i++) from[i] = dprojected + active[first + i] * T;
    for (int t = 0; t < T; t++) {
      V v = load(x + (b * T + t) * W);
      for (int i = 0; i < N; i++) part[i] += v * from[i][t];
    }
    for (int i = 0; i < N; i++) add(sum.proj + active[first + i] * m.lanes + b * W, part[i]);
  }

  // From the gradients of dt, B and C to those of proj and x.
  void project_back(const Sums &sum) {
    for (int64_t b = 0; b < m.blocks; b++) {
      float *dxb = dx + b * T * W;
      size_t first = 0;
      for (; first + 11 <= active.size(); first += 11) rows_back<11>(b, first, sum);
      for (; first + 3 <= active.size(); first += 3) rows_back<3>(b, first, sum);
      for (; first < active.size(); first++) rows_back<1>(b, first, sum);
      for (int t = 0; t < T; t += 8) {
        V v[8];
        for (int i = 0; i < 8; i++) v[i] = load(dxb + (t + i) * W);
        for (int64_t row : active) {
          V w = load(m.proj + row * m.lanes + b * W);
          for (int i = 0; i < 8; i++) v[i] += w * dprojected[row * T + t + i];
        }
        for (int i = 0; i < 8; i++) store(dxb + (t + i) * W, v[i]);
      }
    }
  }

  // From the gradient of x to those of conv, conv_b and `first`.
  void inputs_back(const Sums &sum) {
    for (int64_t b = 0; b < m.blocks; b++) {
      float *da = dx + b * T * W;
      V sum_b = splat(0.f);
      for (int t = 0; t < T; t++) {
        V v = load(da + t * W) * load(slope + (b * T + t) * W);
        sum_b += v;
        store(da + t * W, v);
      }
      add(sum.conv_b + b * W, sum_b);
      for (int64_t k = 0; k < m.lags; k += 4) {
        V part[4] = {};
        for (int t = 0; t < T; t++) {
          V v = load(da + t * W);
          for (int i = 0; i < 4; i++) part[i] += v * u[t - k - i];
        }
        for (int i = 0; i < 4; i++) add(sum.conv + (b * m.lags + k + i) * W, part[i]);
      }
      if (s.has_first)  // token 0 reaches a_t through tap t
        for (int64_t t = std::max<int64_t>(0, -base); t < T && base + t < m.lags; t++)
          add(sum.first, load(da + t * W) * load(m.conv + (b * m.lags + base + t) * W));
    }
  }

  const float *B(int64_t g) const { return projected + (1 + g * R) * T; }
  const float *C(int64_t g) const { return projected + (1 + m.n + g * R) * T; }
};

// plan [blocks][groups] = for each group of states, the number of chunks to scan, counted from the end.
static void plan_unit(Chunk &c, const Unit &unit, int32_t *plan) {
  const Net &m = c.m;
  const int64_t count = m.blocks * m.groups;
  std::vector<float> elapsed(m.lanes, 0.f);  // a lower bound of Σ Δ from chunk j up to the first output
  std::fill(plan, plan + count, 0);
  int64_t j = (unit.outputs + T - 1) / T, open = count;
  for (; j < unit.chunks; j++) {
    c.inputs<false>(unit, j);
    V dt = splat(0.f);
    for (int64_t b = 0; b < m.blocks; b++) {
      V sum = splat(0.f);
      for (int t = 0; t < T; t++) sum += load(c.x + (b * T + t) * W);
      dt += sum * load(m.proj + b * W) * (1.f / T);
    }
    float mean = 0;
    for (int i = 0; i < W; i++) mean += dt[i];
    for (int64_t b = 0; b < m.blocks; b++) {
      V total = load(elapsed.data() + b * W) + (float)T * softplus(load(m.dt_w + b * W) * mean + load(m.dt_b + b * W));
      store(elapsed.data() + b * W, total);
      for (int64_t g = 0; g < m.groups; g++) {
        if (plan[b * m.groups + g]) continue;
        bool felt = false;
        for (int r = 0; r < R; r++) {
          V decayed = load(m.A2 + ((b * m.groups + g) * R + r) * W) * total;
          for (int i = 0; i < W; i++) felt |= !(decayed[i] < -FORGOTTEN);
        }
        if (!felt) plan[b * m.groups + g] = j + 1, open--;
      }
    }
    if (!open) return;
  }
  for (int64_t i = 0; i < count; i++)
    if (!plan[i]) plan[i] = j;
}

// The h before each chunk. If `all`, every chunk's is kept, [chunks][R][W] per group, else only the latest, [R][W].
struct States {
  float *p;
  bool all;
  std::vector<int64_t> at;
  States(const Net &m, const int32_t *plan, float *p, bool all) : p(p), all(all), at(m.blocks * m.groups + 1, 0) {
    for (int64_t i = 0; i < m.blocks * m.groups; i++) at[i + 1] = at[i] + (all ? plan[i] : 1) * R * W;
  }
  float *of(int64_t group, int64_t j) const { return p + at[group] + (all ? j * R * W : 0); }
};

// Compute h before each chunk and, unless y is null, y [outputs].
static void forward_unit(Chunk &c, const Unit &unit, const int32_t *plan, const States &h, float *y) {
  const Net &m = c.m;
  const int64_t count = m.blocks * m.groups, chunks = *std::max_element(plan, plan + count);
  for (int64_t i = 0; i < count; i++) std::memset(h.of(i, plan[i] - 1), 0, R * W * sizeof(float));
  for (int64_t j = chunks - 1; j >= 0; j--) {
    const bool out = y && j * T < unit.outputs;
    c.inputs<false>(unit, j);
    c.project(plan, j, out);
    std::memset(c.lanewise, 0, T * W * sizeof(float));
    for (int64_t b = 0; b < m.blocks; b++) {
      if (j >= *std::max_element(plan + b * m.groups, plan + (b + 1) * m.groups)) continue;
      V most = c.steps<false>(b);
      std::memset(c.y, 0, T * W * sizeof(float));
      for (int64_t g = 0; g < m.groups; g++) {
        const int64_t i = b * m.groups + g;
        if (j >= plan[i]) continue;
        float last[R * W];
        auto run = out ? scan_for<true, false>(c.reach(i, most)) : scan_for<false, false>(c.reach(i, most));
        run(m.A2 + i * R * W, c.delta, c.drive, c.B(g), c.C(g), h.of(i, j), j ? h.of(i, j - 1) : last, c.y, nullptr,
            nullptr);
      }
      if (!out) continue;
      V D = load(m.D + b * W), w = load(m.out + b * W), in_z = load(m.in_z + b * W);
      for (int t = 0; t < T; t++) {
        V z = in_z * c.u[t], Y = load(c.y + t * W) + D * load(c.x + (b * T + t) * W);
        add(c.lanewise + t * W, w * Y * z * sigmoid(z));
      }
    }
    if (!out) continue;
    float sums[T] = {};
    add_lane_sums(c.lanewise, sums);
    const int64_t skip = std::max<int64_t>(0, (j + 1) * T - unit.outputs);
    std::memcpy(y + unit.outputs - (j + 1) * T + skip, sums + skip, (T - skip) * sizeof(float));
  }
}

// From the outputs' gradients gy [outputs] to the sums of the parameters' gradients.
static void backward_unit(Chunk &c, const Unit &unit, const int32_t *plan, const States &h, const float *gy,
                          const Sums &sum) {
  const Net &m = c.m;
  const int64_t count = m.blocks * m.groups, chunks = *std::max_element(plan, plan + count);
  std::memset(c.carry, 0, count * R * W * sizeof(float));
  for (int64_t j = 0; j < chunks; j++) {
    const bool out = j * T < unit.outputs;
    float g[T] = {};
    const int64_t skip = std::max<int64_t>(0, (j + 1) * T - unit.outputs);
    if (out) std::memcpy(g + skip, gy + unit.outputs - (j + 1) * T + skip, (T - skip) * sizeof(float));
    c.inputs<true>(unit, j);
    c.project(plan, j, out);
    std::memset(c.dprojected, 0, m.rows * T * sizeof(float));
    std::memset(c.lanewise, 0, T * W * sizeof(float));  // the gradient of dt
    for (int64_t b = 0; b < m.blocks; b++) {
      if (j >= *std::max_element(plan + b * m.groups, plan + (b + 1) * m.groups)) {
        std::memset(c.dx + b * T * W, 0, T * W * sizeof(float));
        continue;
      }
      V most = c.steps<true>(b);
      if (out) c.gates(b, g);
      for (float *p : {c.y.p, c.ddelta.p, c.ddrive.p}) std::memset(p, 0, T * W * sizeof(float));
      for (int64_t group = 0; group < m.groups; group++) {
        const int64_t i = b * m.groups + group;
        if (j >= plan[i]) continue;
        for (int k = 0; k < R * W && j + 1 < plan[i]; k += 16) __builtin_prefetch(h.of(i, j + 1) + k);
        const Reach reach = c.reach(i, most);
        float state[R * W], *dB = c.dprojected + (1 + group * R) * T, *dC = dB + m.n * T;
        auto again = out ? scan_for<true, true>(reach) : scan_for<false, true>(reach);
        again(m.A2 + i * R * W, c.delta, c.drive, c.B(group), c.C(group), h.of(i, j), state, c.y, c.decays, c.states);
        auto back = reach == NEAR ? (out ? scan_back<true, true> : scan_back<true, false>)
                                  : (out ? scan_back<false, true> : scan_back<false, false>);
        back(m.A2 + i * R * W, c.delta, c.drive, c.B(group), c.C(group), state, c.gy, c.decays, c.states,
             c.carry + i * R * W, c.ddrive, c.ddelta, sum.A + i * R * W, dB, dC);
      }
      if (out) c.outputs_back(b, g, sum);
      c.steps_back(b, out, sum);
    }
    add_lane_sums(c.lanewise, c.dprojected);
    c.project_back(sum);
    c.inputs_back(sum);
  }
}

// Process all units on `threads` threads, the longest first. Each thread calls body() once; the function that it
// returns processes one unit.
static void on_units(const std::vector<Unit> &units, int threads,
                     const std::function<std::function<void(int64_t)>()> &body) {
  std::vector<int64_t> order(units.size());
  std::iota(order.begin(), order.end(), 0);
  auto longer = [&](int64_t a, int64_t b) { return units[a].outputs > units[b].outputs; };
  std::stable_sort(order.begin(), order.end(), longer);
  std::atomic<size_t> next{0};
  threads = std::min<int64_t>(threads, units.size());
  on_threads(threads, threads, [&](int, int64_t, int64_t) {
    auto run = body();
    for (size_t i; (i = next++) < order.size();) run(order[i]);
  });
}

// The position of each unit's first h, as a number of [R][W] arrays.
static std::vector<int64_t> starts_of(const int32_t *plan, size_t units, int64_t count) {
  std::vector<int64_t> at(1, 0);
  for (size_t i = 0; i < units; i++, plan += count) at.push_back(std::accumulate(plan, plan + count, at.back()));
  return at;
}

// Returns the number of entries of plan [units][blocks][groups].
extern "C" int64_t mamba_tails_plan_size(const Params *params, const Sequences *s) {
  Net m(*params);
  return units_of(*s).size() * m.blocks * m.groups;
}

// Writes plan. Returns the number of elements of h before all chunks.
extern "C" int64_t mamba_tails_plan(const Params *params, const Sequences *s, int32_t *plan, int threads) {
  Net m(*params);
  const auto units = units_of(*s);
  const int64_t count = m.blocks * m.groups;
  on_units(units, threads, [&] {
    auto c = std::make_shared<Chunk>(m, *s, false);
    return [&, c](int64_t i) { plan_unit(*c, units[i], plan + i * count); };
  });
  return std::accumulate(plan, plan + units.size() * count, (int64_t)0) * R * W;
}

// Writes y [weights] and, unless h is null, the h before all chunks, for mamba_tails_backward.
extern "C" void mamba_tails_forward(const Params *params, const Sequences *s, const int32_t *plan, float *h, float *y,
                                    int threads) {
  Net m(*params);
  const auto units = units_of(*s);
  const int64_t count = m.blocks * m.groups;
  const std::vector<int64_t> at = starts_of(plan, units.size(), count);
  on_units(units, threads, [&] {
    auto c = std::make_shared<Chunk>(m, *s, false);
    auto latest = std::make_shared<Array>(h ? 0 : count * R * W);
    return [&, c, latest](int64_t i) {
      const Unit &unit = units[i];
      const int32_t *p = plan + i * count;
      States states(m, p, h ? h + at[i] * R * W : latest->p, h);
      forward_unit(*c, unit, p, states, y + unit.offset + unit.start);
    };
  });
}

// gy [weights] -> gfirst [layers], if has_first, and the parameters' gradients, one after another in Params' order:
// [conv d k | conv_b d | in_z d | xproj d (1 + 2n) | dt_w d | dt_b d | A d n | D d | out d]. A is A, not A2. h: what mamba_tails_forward wrote; if
// null, it is computed again.
extern "C" void mamba_tails_backward(const Params *params, const Sequences *s, const int32_t *plan, float *h,
                                     const float *gy, float *gfirst, float *grads, int threads) {
  const Params &P = *params;
  Net m(P);
  const auto units = units_of(*s);
  const int64_t count = m.blocks * m.groups, size = Sums::size(m), d = P.d, n = P.n, K = P.k;
  const std::vector<int64_t> at = starts_of(plan, units.size(), count);
  Array parts(units.size() * size);
  on_units(units, threads, [&] {
    auto c = std::make_shared<Chunk>(m, *s, true);
    return [&, c](int64_t i) {
      const Unit &unit = units[i];
      const int32_t *p = plan + i * count;
      Array own(h ? 0 : (at[i + 1] - at[i]) * R * W);
      States states(m, p, h ? h + at[i] * R * W : own.p, true);
      if (!h) forward_unit(*c, unit, p, states, nullptr);
      backward_unit(*c, unit, p, states, gy + unit.offset + unit.start, Sums(m, parts + i * size));
    };
  });
  std::vector<double> total(size, 0.);
  for (int64_t i = 0; i < s->layers * s->has_first; i++) gfirst[i] = 0;
  for (size_t i = 0; i < units.size(); i++) {
    const float *part = parts + i * size;
    for (int64_t k = 0; k < size; k++) total[k] += part[k];
    if (s->has_first) gfirst[units[i].layer] += std::accumulate(part + size - W, part + size, 0.);
  }
  const Sums at0(m, nullptr);  // for the offsets of its arrays
  auto from = [&](const float *p) { return total.data() + (p - at0.conv); };
  float *conv = grads, *conv_b = conv + d * K, *in_z = conv_b + d, *xproj = in_z + d, *dt_w = xproj + (1 + 2 * n) * d,
        *dt_b = dt_w + d, *A = dt_b + d, *D = A + d * n, *out = D + d;
  for (int64_t i = 0; i < m.lanes; i++) {
    const int64_t c = m.channel[i], b = i / W, lane = i % W;
    if (c < 0) continue;
    for (int64_t k = 0; k < K; k++) conv[c * K + K - 1 - k] = from(at0.conv)[(b * m.lags + k) * W + lane];
    conv_b[c] = from(at0.conv_b)[i], in_z[c] = from(at0.in_z)[i], dt_w[c] = from(at0.dt_w)[i];
    dt_b[c] = from(at0.dt_b)[i], D[c] = from(at0.D)[i], out[c] = from(at0.out)[i];
    for (int64_t r = 0; r < 1 + 2 * n; r++) xproj[c * (1 + 2 * n) + r] = from(at0.proj)[m.row(r) * m.lanes + i];
    for (int64_t r = 0; r < n; r++) A[c * n + r] = from(at0.A)[(b * m.n + r) * W + lane];
  }
}
#endif
