// The last output of many short Mamba sequences of scalar tokens, forward and backward, on a CPU's vector units.
// selective_scan.py, which compiles this file at first use, derives the equations; the names here are the ones there.
//
// Compiled for one sequence length, -DTOKENS=L, so that loops over tokens unroll and their values stay in registers.
// The sequences run along the lanes of a vector V of W floats: one block is W sequences, and every line below does the
// same to all of them. A block's intermediate values (x and its slope, [d, L], 80 KB at the paper's size and W = 16)
// stay in the L2 cache; main memory sees the L input tokens, one output, and L input gradients a sequence.
//
// Per sequence, with d channels, n states a channel and L tokens, forward: (L - 1) d n exponentials (5 multiplications or
// multiply-adds each) and as many multiply-adds of the scan, (L (n + 1) + n) d multiply-adds of the projections, and
// 2 L d exponentials of silu and softplus with some 20 operations each. Backward: all of it again, 3 more
// multiply-adds for each exponential of the scan, and twice the projections' once more, for x and for the weights.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

constexpr int L = TOKENS;
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));

static inline V splat(float a) { return a - (V){}; }
static inline V load(const float *p) { V v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, V v) { std::memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)  // one instruction each; the compiler makes two of the comparison below
static inline V vmax(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
static inline V vmin(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
static inline V vmax(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
static inline V vmin(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline V vmax(V a, V b) { return a > b ? a : b; }
static inline V vmin(V a, V b) { return a < b ? a : b; }
#endif

// 2^x. AVX-512: x is rounded to sixteenths, whose fractional part a register of 16 numbers looks up and whose integer
// part scalef applies; a parabola does the rest, |r| <= 1/32. Relative error 4e-7, any x down to -1e24 (gives 0).
// Elsewhere: a minimax polynomial on [-1/2, 1/2], times 2^(the integer part), x >= -126 or taken for it. Error 2e-7.
#ifdef __AVX512F__
alignas(64) static const float SIXTEENTHS[16] = {
    1.f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
    1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
static inline V exp2_rounded(V shifted, V rounded, V r) {
  V p = (r * 2.402194625e-1f + 6.931878314e-1f) * r + 1.f;
  V table = (V)_mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(SIXTEENTHS));  // by the lowest 4 bits
  return (V)_mm512_scalef_ps((__m512)(p * table), (__m512)rounded);
}
constexpr float MAGIC = 786432.f;  // 1.5 * 2^19: adding it rounds to sixteenths, and leaves them in the lowest bits
static inline V exp2v(V x) {
  V shifted = x + MAGIC, rounded = shifted - MAGIC;
  return exp2_rounded(shifted, rounded, x - rounded);
}
static inline V exp2_product(float a, V s) {  // 2^(a s); written out so that the product becomes part of the additions
  V shifted = a * s + MAGIC, rounded = shifted - MAGIC;
  return exp2_rounded(shifted, rounded, a * s - rounded);
}
static inline V reciprocal(V x) {
  V r = (V)_mm512_rcp14_ps((__m512)x);
  return r * (1.f - x * r) + r;  // one Newton step
}
#else
static inline V exp2v(V x) {
  x = vmax(x, splat(-126.f));
  const V magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  V shifted = x + magic, r = shifted - magic;
  V f = x - r;
  V p = splat(1.327646909e-3f);
  p = p * f + 9.675541311e-3f;
  p = p * f + 5.550713282e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  p = p * f + 1.000000072e+0f;
  return (V)((I)p + ((I)shifted << 23));
}
static inline V exp2_product(float a, V s) { return exp2v(a * s); }
static inline V reciprocal(V x) { return 1.f / x; }
#endif
constexpr float LOG2E = 1.44269504f;
static inline V expv(V x) { return exp2v(vmax(vmin(x * LOG2E, splat(126.f)), splat(-126.f))); }
static inline V sigmoid(V x) { return reciprocal(1.f + expv(-x)); }

// log(1 + e) for e in [0, 1]: e times a minimax polynomial. Relative error 5e-8.
static inline V log1pv(V e) {
  V p = splat(5.232693586e-3f);
  p = p * e - 2.950523606e-2f;
  p = p * e + 7.822594745e-2f;
  p = p * e - 1.366324542e-1f;
  p = p * e + 1.910600658e-1f;
  p = p * e - 2.484298217e-1f;
  p = p * e + 3.331909680e-1f;
  p = p * e - 4.999949314e-1f;
  p = p * e + 9.999999699e-1f;
  return p * e;
}
static inline V softplus(V x) { return vmax(x, splat(0.f)) + log1pv(expv(vmin(x, -x))); }
static inline V softplus(V x, V &slope) {  // and its derivative, the sigmoid
  V e = expv(vmin(x, -x)), r = reciprocal(1.f + e);
  slope = x > 0.f ? r : e * r;
  return vmax(x, splat(0.f)) + log1pv(e);
}

struct Params {  // row-major
  int64_t d, n, k;
  const float *conv, *conv_b;   // [d, k], in_proj multiplied in, as a token is one number; [d]
  const float *in_z;            // [d]
  const float *xproj;           // [d, 1 + 2n]: to dt, B, C
  const float *dt_w, *dt_b;     // [d]
  const float *A2;              // [d, n]: -exp(A_log) * log2(e)
  const float *D, *out;         // [d]
};

// What one block of W sequences needs besides the parameters; all [.., W], in the L1 and L2 caches.
struct Work {
  std::vector<float> buf;
  float *x, *slope;   // [d, L]: x = silu(conv), and silu's derivative there
  float *dtB, *C;     // [1 + n, L]: dt and B of every token; [n]: C of the last one
  float *BC, *sumBC;  // [n, L]: B C; [1]: its sum over n at the last token, which does not decay
  float *dx, *ddtB, *dC, *dBC;  // gradients
  Work(int64_t d, int64_t n) {
    int64_t sizes[] = {L * d, L * d, L * (1 + n), n, L * n, 1, L * d, L * (1 + n), n, L * n}, total = 0;
    for (auto s : sizes) total += s;
    buf.resize(total * W + 16);
    float *p = (float *)(((uintptr_t)buf.data() + 63) & ~(uintptr_t)63);
    float **targets[] = {&x, &slope, &dtB, &C, &BC, &sumBC, &dx, &ddtB, &dC, &dBC};
    for (int i = 0; i < 10; i++) { *targets[i] = p; p += sizes[i] * W; }
  }
};

// The projections are small matrix products. They run in tiles that keep two dozen sums in registers (a dozen where
// there are 16 registers), because a processor multiplies faster than it loads.
constexpr int SUMS = W == 16 ? 24 : 12, TILE = L > SUMS ? 1 : SUMS / L > 8 ? 8 : SUMS / L;

// out [rows, T] = the last T tokens of x [d, L], times `rows` columns of xproj [d, stride] from `weight` on.
template <int ROWS, int T>
static void project_tile(const float *weight, int64_t stride, int64_t d, const float *x, float *out) {
  V sum[ROWS][T];
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < T; t++) sum[r][t] = splat(0.f);
  for (int64_t c = 0; c < d; c++, weight += stride, x += L * W)
    for (int t = 0; t < T; t++) {
      V v = load(x + (L - T + t) * W);
      for (int r = 0; r < ROWS; r++) sum[r][t] += weight[r] * v;
    }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < T; t++) store(out + (r * T + t) * W, sum[r][t]);
}
template <int ROWS, int T>
static void project_rows(const float *weight, int64_t rows, int64_t stride, int64_t d, const float *x, float *out) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) project_tile<ROWS, T>(weight + r, stride, d, x, out + r * T * W);
  for (; r < rows; r++) project_tile<1, T>(weight + r, stride, d, x, out + r * T * W);
}

// x_t = silu(conv), all tokens and channels, and its projections dt_t, B_t, C_L. SLOPE: silu's derivative too.
template <bool SLOPE> static void project(const Params &P, const V *u, Work &w) {
  const int64_t d = P.d, n = P.n, K = P.k, stride = 1 + 2 * n;
  for (int64_t c = 0; c < d; c++) {
    const float *conv = P.conv + c * K;
    V a[L];
    for (int t = 0; t < L; t++) {
      a[t] = splat(P.conv_b[c]);
      for (int s = t; s >= 0 && t - s < K; s--) a[t] += conv[K - 1 - (t - s)] * u[s];
    }
    for (int t = 0; t < L; t++) {
      V g = sigmoid(a[t]), x = a[t] * g;
      store(w.x + (c * L + t) * W, x);
      if (SLOPE) store(w.slope + (c * L + t) * W, g + x * (1.f - g));
    }
  }
  project_rows<TILE, L>(P.xproj, 1 + n, stride, d, w.x, w.dtB);
  project_rows<8, 1>(P.xproj + 1 + n, n, stride, d, w.x, w.C);
  V sum = splat(0.f);
  for (int64_t r = 0; r < n; r++) {
    V C = load(w.C + r * W);
    for (int t = 0; t < L; t++) store(w.BC + (r * L + t) * W, load(w.dtB + ((1 + r) * L + t) * W) * C);
    sum += load(w.BC + (r * L + L - 1) * W);
  }
  store(w.sumBC, sum);
}

// The way back for TILED channels from c on: dx [.., L] += xproj (ddt, dB, dC), and g [.., 1 + 2n] += xproj's gradient.
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

static void load_tokens(const float *u, int64_t rows, int64_t first, V *out) {  // u [L, rows]
  const int64_t count = std::min<int64_t>(rows - first, W);
  for (int t = 0; t < L; t++) {
    float lane[W] = {};
    std::memcpy(lane, u + t * rows + first, count * sizeof(float));
    out[t] = load(lane);
  }
}

// body(thread, first block, one past the last) on every thread, an equal share of the blocks each. Plain threads rather
// than OpenMP: PyTorch brings an OpenMP of its own, and two pools of spinning threads fight for the cores.
static void on_threads(int threads, int64_t blocks, const std::function<void(int, int64_t, int64_t)> &body) {
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; i++) pool.emplace_back(body, i, blocks * i / threads, blocks * (i + 1) / threads);
  body(0, 0, blocks / threads);
  for (auto &thread : pool) thread.join();
}

// u [L, rows] -> y [rows].
extern "C" void mamba_last_forward(const Params *params, int64_t rows, const float *u, float *y, int threads) {
  const Params &P = *params;
  const int64_t d = P.d, n = P.n, blocks = (rows + W - 1) / W;
  on_threads(threads, blocks, [&](int, int64_t first, int64_t last) {
    Work w(d, n);
    for (int64_t b = first; b < last; b++) {
      V tok[L];
      load_tokens(u, rows, b * W, tok);
      project<false>(P, tok, w);
      V total = splat(0.f);
      for (int64_t c = 0; c < d; c++) {
        V delta[L], S[L], acc[L];
        for (int t = 0; t < L; t++) {
          delta[t] = softplus(P.dt_w[c] * load(w.dtB + t * W) + P.dt_b[c]);
          acc[t] = splat(0.f);
        }
        S[L - 1] = splat(0.f);
        for (int t = L - 2; t >= 0; t--) S[t] = vmin(S[t + 1] + delta[t + 1], splat(1e18f));  // A S stays finite
        const float *A = P.A2 + c * n;
        for (int64_t r = 0; r < n; r++)
          for (int t = 0; t < L - 1; t++) acc[t] += exp2_product(A[r], S[t]) * load(w.BC + (r * L + t) * W);
        acc[L - 1] = load(w.sumBC);
        V yc = P.D[c] * load(w.x + (c * L + L - 1) * W);
        for (int t = 0; t < L; t++) yc += delta[t] * load(w.x + (c * L + t) * W) * acc[t];
        V z = P.in_z[c] * tok[L - 1];
        total += P.out[c] * yc * z * sigmoid(z);
      }
      float lane[W];
      store(lane, total);
      std::memcpy(y + b * W, lane, std::min<int64_t>(rows - b * W, W) * sizeof(float));
    }
  });
}

// gy [rows] -> du [L, rows], and grads, in Params' order: [conv d k | conv_b d | in_z d | xproj d (1 + 2n) | dt_w d |
// dt_b d | A d n | D d | out d], A's with respect to A = -exp(A_log).
extern "C" void mamba_last_backward(const Params *params, int64_t rows, const float *u, const float *gy, float *du,
                                    float *grads, int threads) {
  const Params &P = *params;
  const int64_t d = P.d, n = P.n, K = P.k, blocks = (rows + W - 1) / W;
  const int64_t size = d * K + d + d + d * (1 + 2 * n) + d + d + d * n + d + d;
  std::vector<std::vector<float>> parts(threads);  // each thread's sums, lane by lane; added up in order at the end
  on_threads(threads, blocks, [&](int thread, int64_t first, int64_t last) {
    Work w(d, n);
    std::vector<float> &part = parts[thread];
    part.resize(size * W + 16);
    float *g = (float *)(((uintptr_t)part.data() + 63) & ~(uintptr_t)63);
    float *g_conv = g, *g_conv_b = g_conv + d * K * W, *g_in_z = g_conv_b + d * W, *g_xproj = g_in_z + d * W,
          *g_dt_w = g_xproj + d * (1 + 2 * n) * W, *g_dt_b = g_dt_w + d * W, *g_A = g_dt_b + d * W,
          *g_D = g_A + d * n * W, *g_out = g_D + d * W;
    auto add = [](float *p, V v) { store(p, load(p) + v); };
    for (int64_t b = first; b < last; b++) {
      V tok[L], dtok[L], go;
      load_tokens(u, rows, b * W, tok);
      {
        float lane[W] = {};
        std::memcpy(lane, gy + b * W, std::min<int64_t>(rows - b * W, W) * sizeof(float));
        go = load(lane);
      }
      project<true>(P, tok, w);
      for (int t = 0; t < L; t++) dtok[t] = splat(0.f);
      std::memset(w.ddtB, 0, L * W * sizeof(float));
      std::memset(w.dBC, 0, L * n * W * sizeof(float));
      V dsum = splat(0.f);  // of sumBC
      for (int64_t c = 0; c < d; c++) {
        V delta[L], slope[L], S[L], acc[L], accA[L], cc[L], cS[L], x[L];
        V z = P.in_z[c] * tok[L - 1], sz = sigmoid(z), silu = z * sz;
        V dy = go * P.out[c] * silu;
        for (int t = 0; t < L; t++) {
          delta[t] = softplus(P.dt_w[c] * load(w.dtB + t * W) + P.dt_b[c], slope[t]);
          x[t] = load(w.x + (c * L + t) * W);
          acc[t] = accA[t] = splat(0.f);
        }
        S[L - 1] = splat(0.f);
        for (int t = L - 2; t >= 0; t--) S[t] = vmin(S[t + 1] + delta[t + 1], splat(1e18f));  // A S stays finite
        for (int t = 0; t < L; t++) cc[t] = dy * delta[t] * x[t], cS[t] = cc[t] * S[t];
        const float *A = P.A2 + c * n;
        for (int64_t r = 0; r < n; r++) {
          V dA = splat(0.f);
          for (int t = 0; t < L - 1; t++) {
            V E = exp2_product(A[r], S[t]);
            add(w.dBC + (r * L + t) * W, cc[t] * E);
            V q = E * load(w.BC + (r * L + t) * W);
            acc[t] += q;
            accA[t] += A[r] * q;
            dA += cS[t] * q;
          }
          add(g_A + (c * n + r) * W, dA);
        }
        acc[L - 1] = load(w.sumBC);
        dsum += cc[L - 1];
        // y_c = sum_t drive_t acc_t + D x_L, times silu(z), times out
        V yc = P.D[c] * x[L - 1], dx[L], ddelta[L], carry = splat(0.f);
        const float ln2 = 0.693147181f;
        for (int t = 0; t < L; t++) {
          yc += delta[t] * x[t] * acc[t];
          V ddrive = dy * acc[t];
          dx[t] = ddrive * delta[t];
          ddelta[t] = ddrive * x[t] + carry;  // S_s for every s < t contains delta_t
          carry += cc[t] * accA[t] * ln2;     // dS_t; A2 is in units of log2(e)
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
          V da = ddelta[t] * slope[t];
          gw += da * load(w.dtB + t * W), gb += da;
          add(w.ddtB + t * W, da * P.dt_w[c]);
          store(w.dx + (c * L + t) * W, dx[t]);
        }
        add(g_dt_w + c * W, gw), add(g_dt_b + c * W, gb);
      }
      for (int64_t r = 0; r < n; r++) {  // from B C to B and C
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
      for (; c + TILE <= d; c += TILE) project_back<TILE>(P, c, w, g_xproj);
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
      for (int t = 0; t < L; t++) {
        float lane[W];
        store(lane, dtok[t]);
        std::memcpy(du + t * rows + b * W, lane, std::min<int64_t>(rows - b * W, W) * sizeof(float));
      }
    }
  });
  for (int64_t i = 0; i < size; i++) {
    double sum = 0;
    for (auto &part : parts) {
      const float *g = (const float *)(((uintptr_t)part.data() + 63) & ~(uintptr_t)63);
      for (int lane = 0; lane < W; lane++) sum += g[i * W + lane];
    }
    grads[i] = (float)sum;
  }
}

// For bench.py, the machine's bound: `count` vector multiply-adds on each thread, 12 chains at a time, as each waits
// for itself. Returns W.
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
