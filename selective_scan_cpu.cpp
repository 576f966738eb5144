// The last output of many short Mamba sequences of scalar tokens, forward and backward, on a CPU's vector units.
// selective_scan.py, which compiles this file at first use, derives the equations; the names here are the ones there.
//
// Compiled for one sequence length, -DTOKENS=L, so that the loops over tokens unroll and their values stay in registers.
// The sequences run along the lanes of a vector V of W floats: one block is W sequences, and every line below does the
// same to all of them. A block's intermediate values (x and its derivative, [d, L], 80 KB at the paper's size and W = 16)
// stay in the L2 cache; main memory sees the L input tokens, one output, and L input gradients a sequence.
//
// Per sequence, with d channels, n states a channel and L tokens, forward: (L - 1) d n exponentials and multiply-adds of
// the scan, (L (n + 1) + n) d multiply-adds of the projections, some 3 L d exponentials of silu and softplus.
// Backward: all of it again, and about 4 more multiply-adds for each exponential.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
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
static inline V vmax(V a, V b) { return a > b ? a : b; }
static inline V vmin(V a, V b) { return a < b ? a : b; }

// 2^x, x <= 127; relative error 2e-7. Minimax polynomial of 2^f on [-0.5, 0.5], times 2^(the integer part).
static inline V exp2v(V x) {
#ifdef __AVX512F__
  V r = (V)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = vmax(x, splat(-126.f));
  const V magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  V shifted = x + magic, r = shifted - magic;
#endif
  V f = x - r;
  V p = splat(1.327646909e-3f);
  p = p * f + 9.675541311e-3f;
  p = p * f + 5.550713282e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  p = p * f + 1.000000072e+0f;
#ifdef __AVX512F__
  return (V)_mm512_scalef_ps((__m512)p, (__m512)r);
#else
  return (V)((I)p + ((I)shifted << 23));
#endif
}
constexpr float LOG2E = 1.44269504f;
static inline V expv(V x) { return exp2v(vmin(x * LOG2E, splat(126.f))); }
static inline V sigmoid(V x) { return 1.f / (1.f + expv(-x)); }

struct Params {  // row-major
  int64_t d, n, k;
  const float *in_x, *in_z;     // [d]
  const float *conv, *conv_b;   // [d, k], [d]
  const float *xproj;           // [1 + 2n, d]
  const float *dt_w, *dt_b;     // [d]
  const float *A2;              // [d, n]: -exp(A_log) * log2(e)
  const float *D, *out;         // [d]
};

// log(1 + e) for e in [0, 1]: atanh series through s = e / (2 + e), log(1 + e) = 2 atanh(s), s <= 1/3. Relative 1e-7.
static inline V log1pv(V e) {
  V s = e / (2.f + e), q = s * s;
  V p = splat(2.f / 17);
  p = p * q + 2.f / 15;
  p = p * q + 2.f / 13;
  p = p * q + 2.f / 11;
  p = p * q + 2.f / 9;
  p = p * q + 2.f / 7;
  p = p * q + 2.f / 5;
  p = p * q + 2.f / 3;
  p = p * q + 2.f;
  return p * s;
}
static inline V softplus(V x) { return vmax(x, splat(0.f)) + log1pv(expv(vmin(x, -x))); }

// What one block of W sequences needs besides the parameters; all [.., W], in the L1 and L2 caches.
struct Work {
  std::vector<float> buf;
  float *x, *sg, *dt, *B, *C, *BC, *sumBC, *dx, *ddt, *dBC, *dC;
  Work(int64_t d, int64_t n) {
    int64_t sizes[] = {L * d, L * d, L, L * n, n, L * n, 1, L * d, L, L * n, n}, total = 0;
    for (auto s : sizes) total += s;
    buf.resize(total * W + 16);
    float *p = (float *)(((uintptr_t)buf.data() + 63) & ~(uintptr_t)63);
    float **targets[] = {&x, &sg, &dt, &B, &C, &BC, &sumBC, &dx, &ddt, &dBC, &dC};
    for (int i = 0; i < 11; i++) { *targets[i] = p; p += sizes[i] * W; }
  }
};

// x_t = silu(conv), all tokens and channels, and its projections dt_t, B_t, C_L.
static void project(const Params &P, const V *u, Work &w) {
  const int64_t d = P.d, n = P.n, K = P.k;
  for (int64_t c = 0; c < d; c++) {
    const float *conv = P.conv + c * K;
    for (int t = 0; t < L; t++) {
      V a = splat(0.f);
      for (int s = t; s >= 0 && t - s < K; s--) a += conv[K - 1 - (t - s)] * u[s];
      a = a * P.in_x[c] + P.conv_b[c];
      V g = sigmoid(a);
      store(w.sg + (c * L + t) * W, g + a * g * (1.f - g));  // silu'
      store(w.x + (c * L + t) * W, a * g);
    }
  }
  auto rows = [&](const float *weight, int count, float *out) {  // out [count, L, W] = weight [count, d] x
    int r = 0;
    for (; r + 2 <= count; r += 2) {
      V a0[L], a1[L];
      for (int t = 0; t < L; t++) a0[t] = a1[t] = splat(0.f);
      const float *w0 = weight + r * d, *w1 = w0 + d;
      for (int64_t c = 0; c < d; c++)
        for (int t = 0; t < L; t++) {
          V x = load(w.x + (c * L + t) * W);
          a0[t] += w0[c] * x;
          a1[t] += w1[c] * x;
        }
      for (int t = 0; t < L; t++) store(out + (r * L + t) * W, a0[t]), store(out + ((r + 1) * L + t) * W, a1[t]);
    }
    for (; r < count; r++) {
      V a0[L];
      for (int t = 0; t < L; t++) a0[t] = splat(0.f);
      for (int64_t c = 0; c < d; c++)
        for (int t = 0; t < L; t++) a0[t] += weight[r * d + c] * load(w.x + (c * L + t) * W);
      for (int t = 0; t < L; t++) store(out + (r * L + t) * W, a0[t]);
    }
  };
  rows(P.xproj, 1, w.dt);
  rows(P.xproj + d, n, w.B);
  for (int64_t r = 0; r < n; r++) {
    V a = splat(0.f);
    const float *weight = P.xproj + (1 + n + r) * d;
    for (int64_t c = 0; c < d; c++) a += weight[c] * load(w.x + (c * L + L - 1) * W);
    store(w.C + r * W, a);
  }
  V sum = splat(0.f);
  for (int64_t r = 0; r < n; r++) {
    for (int t = 0; t < L; t++) store(w.BC + (r * L + t) * W, load(w.B + (r * L + t) * W) * load(w.C + r * W));
    sum += load(w.BC + (r * L + L - 1) * W);
  }
  store(w.sumBC, sum);
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
      project(P, tok, w);
      V total = splat(0.f);
      for (int64_t c = 0; c < d; c++) {
        V delta[L], S[L], acc[L];
        for (int t = 0; t < L; t++) delta[t] = softplus(P.dt_w[c] * load(w.dt + t * W) + P.dt_b[c]), acc[t] = splat(0.f);
        S[L - 1] = splat(0.f);
        for (int t = L - 2; t >= 0; t--) S[t] = vmin(S[t + 1] + delta[t + 1], splat(1e30f));  // A S stays finite
        const float *A = P.A2 + c * n;
        for (int64_t r = 0; r < n; r++)
          for (int t = 0; t < L - 1; t++)
            acc[t] += exp2v(A[r] * S[t]) * load(w.BC + (r * L + t) * W);
        acc[L - 1] = load(w.sumBC);
        V xl = load(w.x + (c * L + L - 1) * W), yc = P.D[c] * xl;
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

// gy [rows] -> du [L, rows], and grads: [in_x d | in_z d | conv d k | conv_b d | xproj (1 + 2n) d | dt_w d | dt_b d |
// A d n | D d | out d], A's with respect to A = -exp(A_log).
extern "C" void mamba_last_backward(const Params *params, int64_t rows, const float *u, const float *gy, float *du,
                                    float *grads, int threads) {
  const Params &P = *params;
  const int64_t d = P.d, n = P.n, K = P.k, blocks = (rows + W - 1) / W;
  const int64_t size = 7 * d + d * K + (1 + 2 * n) * d + d * n;
  std::vector<std::vector<float>> parts(threads);  // each thread's sums, lane by lane; added up in order at the end
  on_threads(threads, blocks, [&](int thread, int64_t first, int64_t last) {
    Work w(d, n);
    std::vector<float> &part = parts[thread];
    part.resize(size * W + 16);
    float *g = (float *)(((uintptr_t)part.data() + 63) & ~(uintptr_t)63);
    float *g_in_x = g, *g_in_z = g_in_x + d * W, *g_conv = g_in_z + d * W, *g_conv_b = g_conv + d * K * W,
          *g_xproj = g_conv_b + d * W, *g_dt_w = g_xproj + (1 + 2 * n) * d * W, *g_dt_b = g_dt_w + d * W,
          *g_A = g_dt_b + d * W, *g_D = g_A + d * n * W, *g_out = g_D + d * W;
    auto add = [](float *p, V v) { store(p, load(p) + v); };
    for (int64_t b = first; b < last; b++) {
      V tok[L], dtok[L], go;
      load_tokens(u, rows, b * W, tok);
      {
        float lane[W] = {};
        std::memcpy(lane, gy + b * W, std::min<int64_t>(rows - b * W, W) * sizeof(float));
        go = load(lane);
      }
      project(P, tok, w);
      for (int t = 0; t < L; t++) dtok[t] = splat(0.f), store(w.ddt + t * W, splat(0.f));
      std::memset(w.dBC, 0, L * n * W * sizeof(float));
      V dsum = splat(0.f);  // of sumBC
      for (int64_t c = 0; c < d; c++) {
        V delta[L], sp[L], S[L], acc[L], accA[L], cc[L], cS[L], x[L];
        V z = P.in_z[c] * tok[L - 1], sz = sigmoid(z), silu = z * sz;
        V dy = go * P.out[c] * silu;
        for (int t = 0; t < L; t++) {
          V a = P.dt_w[c] * load(w.dt + t * W) + P.dt_b[c];
          delta[t] = softplus(a), sp[t] = sigmoid(a);
          x[t] = load(w.x + (c * L + t) * W);
          acc[t] = accA[t] = splat(0.f);
        }
        S[L - 1] = splat(0.f);
        for (int t = L - 2; t >= 0; t--) S[t] = vmin(S[t + 1] + delta[t + 1], splat(1e30f));  // A S stays finite
        for (int t = 0; t < L; t++) cc[t] = dy * delta[t] * x[t], cS[t] = cc[t] * S[t];
        const float *A = P.A2 + c * n;
        for (int64_t r = 0; r < n; r++) {
          V dA = splat(0.f);
          for (int t = 0; t < L - 1; t++) {
            V E = exp2v(A[r] * S[t]);
            float *dbc = w.dBC + (r * L + t) * W;
            store(dbc, load(dbc) + cc[t] * E);
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
          ddelta[t] = ddrive * x[t] + carry;      // S_s for every s < t contains delta_t
          carry += cc[t] * accA[t] * ln2;         // dS_t; A2 is in units of log2(e)
        }
        dx[L - 1] += dy * P.D[c];
        add(g_D + c * W, dy * x[L - 1]);
        V gyc = go * yc;
        add(g_out + c * W, gyc * silu);
        V dz = gyc * P.out[c] * (sz + z * sz * (1.f - sz));
        add(g_in_z + c * W, dz * tok[L - 1]);
        dtok[L - 1] += dz * P.in_z[c];
        V gw = splat(0.f), gb = splat(0.f);
        for (int t = 0; t < L; t++) {
          V da = ddelta[t] * sp[t];
          gw += da * load(w.dt + t * W), gb += da;
          add(w.ddt + t * W, da * P.dt_w[c]);
          store(w.dx + (c * L + t) * W, dx[t]);
        }
        add(g_dt_w + c * W, gw), add(g_dt_b + c * W, gb);
      }
      for (int64_t r = 0; r < n; r++) {
        float *dbc = w.dBC + r * L * W;
        store(dbc + (L - 1) * W, dsum);
        V dC = splat(0.f), C = load(w.C + r * W);
        for (int t = 0; t < L; t++) {
          V v = load(dbc + t * W);
          dC += v * load(w.B + (r * L + t) * W);
          store(dbc + t * W, v * C);  // now dB
        }
        store(w.dC + r * W, dC);
      }
      for (int64_t c = 0; c < d; c++) {
        V dx[L], x[L];
        for (int t = 0; t < L; t++) dx[t] = load(w.dx + (c * L + t) * W), x[t] = load(w.x + (c * L + t) * W);
        V a = splat(0.f);
        for (int t = 0; t < L; t++) a += load(w.ddt + t * W) * x[t], dx[t] += P.xproj[c] * load(w.ddt + t * W);
        add(g_xproj + c * W, a);
        for (int64_t r = 0; r < n; r++) {
          a = splat(0.f);
          const float wB = P.xproj[(1 + r) * d + c], wC = P.xproj[(1 + n + r) * d + c];
          for (int t = 0; t < L; t++) {
            V v = load(w.dBC + (r * L + t) * W);
            a += v * x[t], dx[t] += wB * v;
          }
          add(g_xproj + ((1 + r) * d + c) * W, a);
          V v = load(w.dC + r * W);
          add(g_xproj + ((1 + n + r) * d + c) * W, v * x[L - 1]);
          dx[L - 1] += wC * v;
        }
        V gb = splat(0.f), gin = splat(0.f);
        const float *conv = P.conv + c * K;
        float *gc = g_conv + c * K * W;
        for (int t = 0; t < L; t++) {
          V da = dx[t] * load(w.sg + (c * L + t) * W);
          gb += da;
          V dx_in = da * P.in_x[c];
          for (int s = t; s >= 0 && t - s < K; s--) {
            const int64_t k = K - 1 - (t - s);
            add(gc + k * W, dx_in * tok[s]);
            dtok[s] += dx_in * conv[k];
            gin += da * conv[k] * tok[s];
          }
        }
        add(g_conv_b + c * W, gb), add(g_in_x + c * W, gin);
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
