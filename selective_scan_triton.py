"""The fused selective scan on a GPU: SlowMamba.last() and .tails() of hypernet.py, forward and backward, in Triton.

Copy this file next to selective_scan.py. It wants the triton package, which comes with torch's CUDA builds on Linux;
without it the file can still be imported, and `why_not` says what is missing. selective_scan.py derives the equations.

`last`, for per-weight histories. In short, for the last of L tokens, with S_t = Δ_{t+1} + … + Δ_L and E = exp(A_n S_t),
per channel and state n,

    h_L C_L = Σ_t Δ_t x_t Σ_n E B_tn C_Ln        no step waits for another: (L − 1)·d·n exponentials a sequence

Shapes. L tokens, d channels, n states a channel (N: n rounded up to a power of two), K convolution taps (those that L
tokens can meet), P = 7 + K + 3n parameters a channel. In memory, float32:
    u, du [L, sequences], y, gy [sequences]    inputs and outputs, and their gradients
    table [P, d]                               all parameters; column c is channel c's
    sums [programs, P, d]                      the table's gradient, one copy a program, so that none waits for another
In a kernel every tensor has three axes, [states, channels, sequences], each the full block N, BLOCK_D, BLOCK_B, or 1:
    A2 [N, BLOCK_D, 1]    u_t, dt_t [1, 1, BLOCK_B]    x_t, Δ_t, S_t [1, BLOCK_D, BLOCK_B]    B_t, C [N, 1, BLOCK_B]
Tokens are Python lists of such tensors: the loops over them are unrolled, and Triton has no other way to index them.

How it maps to the GPU. A Triton program is one warp here, 32 threads, and BLOCK_D · BLOCK_B = 32. Triton deals out
threads along the last axes first, so each has one channel of one sequence with all its N states, in registers. A sum
over states then needs no other thread; one over sequences or channels takes log2(BLOCK) exchanges between threads. The
gradients of the parameters are summed over sequences, those of dt, B and C over channels; 4 × 8 balances the two.

Costs per token for d = 100, n = 16, L = 6, counted in the machine code for an H100. Exponentials and reciprocals, 16 a
cycle on each multiprocessor: 1,333 of the scan and 530 of silu and softplus forward, 2,200 in all backward. The other
instructions, 128 a cycle: 12,000 forward, which run beside the exponentials, and 42,000 backward, which are what the
backward pass waits for. FLOPs among them: 13,000 and 41,000. Main memory: 4 bytes forward (u), 8 backward (u, du), and
4 a sequence (y, gy); `sums` stays in the L2 cache. No tensor [tokens, d] exists.

`tails`, for the flat layout: a sequence a layer, of up to millions of tokens, and of its outputs the last ones. The
recurrence, and its adjoint, which selective_scan_cpu.cpp derives, are computed as they are written, token by token, in
chunks of T tokens that are counted from each sequence's end. A program takes one chunk after another, through all its
channels, and one launch takes all layers. What a chunk hands on is linear in what it got, so a scan has two passes:

    MEANS, _plan       which chunks are not needed, see below
    ENDS               every chunk, as if it got h = 0: what it hands on, and its Σ_t Δ_t
    _carry             one chunk after another: h <- exp(A Σ Δ) h + what it hands on
    OUTPUTS            every chunk with outputs, from the h that it gets
    ADJOINT, _carry    the same for the adjoint, exp(A Δ_t) ∂/∂h_t, which goes backwards in time
    BACKWARD           every chunk, from the h and the adjoint that it gets: its h once more, then all gradients

In memory, float32: h, and backward its adjoint, [chunks, n, d]; Σ Δ [chunks, d]; `layers`, which says where each
layer's chunks are; `table` and `sums` as above; and for each program 227 T numbers of scratch, which should stay in the
caches, see `_scratch`. T grows as the square root of the number of tokens, which balances the two. No tensor [tokens,
d] or [tokens, n] exists. In a kernel, what is beside the scan are tiles of tokens and channels, [BT, BD]; in the scan
it is [HI, N, LO], HI · LO = BD channels: a thread has N / 4 states of HI channels in registers, so that sums over
states and sums over channels both take few exchanges between threads.

What is not computed. Between two tokens a state decays by exp(A Σ Δ), and behind a decay of e^-18, float32's resolution
and a margin, an output does not feel it. A bound of Σ Δ needs no Δ, only dt, which MEANS averages: softplus is convex,
so over a chunk Σ Δ >= T softplus(dt_w mean(dt) + dt_b). `_plan` adds these up, from the first chunk without outputs
back to where the slowest state of the slowest channel of a block has decayed; blocks are of channels that forget about
equally fast. The plan stays on the GPU: programs read it and leave out what is forgotten.

Costs per scanned token for d = 100, n = 16, T = 64, counted in the machine code for an H100. Exponentials of the scan:
1,792 in each of ENDS, OUTPUTS and ADJOINT (d is rounded up to 112) and 3,584 in BACKWARD. Instructions, 128 a cycle,
for which it waits: 4,000 in MEANS, 36,000 ENDS, 50,000 OUTPUTS, 41,000 ADJOINT, 170,000 BACKWARD. Main memory: 4 d n /
T = 100 bytes each time that h or its adjoint is read or written.

Two runs on one device give the same bits: each program adds up its own blocks in order, and torch adds the programs'.
"""
# ruff: noqa: RUF005, SIM109  (Triton does not know [*a, b] and a in (b, c))

import functools
import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_TOKENS = 16  # of `last`: all its loops over tokens are unrolled
MOST_KEPT = 2**26  # numbers that `tails` keeps for its backward pass; where it is more, they are computed again

if triton is not None:
    # With TRITON_INTERPRET=1 Triton runs the kernels in NumPy on CPU tensors: slow, for tests. Wide blocks help there.
    INTERPRETED = triton.knobs.runtime.interpret
    BLOCK_D, BLOCK_B = (16, 16) if INTERPRETED else (4, 8)

    # Rows of the table. From TAPS on: K taps (row k meets the token k steps back), n of x_proj for B, n for C, n of A2.
    CONV_B, IN_Z, DT_W, DT_B, SKIP, OUT, DT, TAPS = (tl.constexpr(row) for row in range(8))
    LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))

    @triton.jit
    def _rows(table, first, channel, d, n: tl.constexpr, N: tl.constexpr):
        """Pointers to n rows of the table, [N, BLOCK_D], and which of them exist."""
        row = tl.arange(0, N)[:, None]
        return table + (first + row) * d + channel[None, :], (row < n) & (channel < d)[None, :]

    @triton.jit
    def _get(table, first, channel, d, n: tl.constexpr = 1, N: tl.constexpr = 1):
        """n rows of the table, as [N, BLOCK_D, 1]. Rows and channels that do not exist read as 0, and so do nothing."""
        at, exists = _rows(table, first, channel, d, n, N)
        return tl.load(at, mask=exists, other=0.0)[:, :, None]

    @triton.jit
    def _add(sums, first, channel, d, value, n: tl.constexpr = 1, N: tl.constexpr = 1):
        """Adds value [N, BLOCK_D, BLOCK_B], summed over the sequences, to this program's n rows of the gradient."""
        at, exists = _rows(sums, first, channel, d, n, N)
        tl.store(at, tl.load(at, mask=exists, other=0.0) + tl.sum(value, axis=2), mask=exists)

    @triton.jit
    def _silu(a):
        """silu(a) = a σ(a) and its derivative. exp(−|a|) cannot overflow."""
        e = tl.exp2(tl.abs(a) * -LOG2E)
        sigmoid = tl.where(a < 0, e, 1.0) / (1.0 + e)
        return a * sigmoid, sigmoid * (1.0 + a * (1.0 - sigmoid))

    @triton.jit
    def _softplus(a):
        """softplus(a) = max(a, 0) + log(1 + exp(−|a|)) and its derivative σ(a). log(1 + e) = e p(e), p a polynomial
        fitted on [0, 1] with relative error 3e-8: 1 + e, rounded, would have lost a small e."""
        e = tl.exp2(tl.abs(a) * -LOG2E)
        p = (0.00525345793 * e - 0.0295885075) * e + 0.0783616677
        p = ((p * e - 0.136747703) * e + 0.191114306) * e - 0.248443693
        p = ((p * e + 0.333192706) * e - 0.499995023) * e + 1.0
        return tl.maximum(a, 0.0) + p * e, tl.where(a < 0, e, 1.0) / (1.0 + e)

    @triton.jit
    def _tokens(u, sequence, rows, L: tl.constexpr):
        """The block's L tokens, [1, 1, BLOCK_B] each; 0 beyond the last sequence."""
        tokens = []
        for _ in tl.static_range(L):
            tokens = tokens + [tl.load(u + sequence, mask=sequence < rows, other=0.0)[None, None, :]]
            u += rows
        return tokens

    @triton.jit
    def _conv(table, channel, d, u, K: tl.constexpr):
        """The K taps, x_t = silu(conv u) and the derivative of that silu, for all tokens."""
        taps = []
        for k in tl.static_range(K):
            taps = taps + [_get(table, TAPS + k, channel, d)]
        bias = _get(table, CONV_B, channel, d)
        x = []
        slope = []
        for t in tl.static_range(len(u)):
            a = bias
            for k in tl.static_range(K):
                if k <= t:
                    a = a + taps[k] * u[t - k]
            a, da = _silu(a)
            x = x + [a]
            slope = slope + [da]
        return taps, x, slope

    @triton.jit
    def _conv_backward(taps, sums, channel, d, da, u, du):
        """Adds what the gradients da_t of the convolution's outputs mean for its parameters and the tokens: -> du."""
        L: tl.constexpr = len(u)
        _add(sums, CONV_B, channel, d, _dot(da))
        for k in tl.static_range(len(taps)):
            _add(sums, TAPS + k, channel, d, _dot(da[k:], u[: L - k]))
        found = []
        for s in tl.static_range(L):
            total = du[s]
            for k in tl.static_range(len(taps)):
                if s + k < L:
                    total += taps[k] * da[s + k]
            found = found + [total]
        return found

    @triton.jit
    def _dot(a, b=None):
        """Σ_t a_t b_t over two lists; Σ_t a_t over one."""
        total = a[0] if b is None else a[0] * b[0]
        for t in tl.static_range(1, len(a)):
            total += a[t] if b is None else a[t] * b[t]
        return total

    @triton.jit
    def _plus(sums, w, x):
        """sums_t + w x_t for all tokens."""
        found = []
        for t in tl.static_range(len(x)):
            found = found + [sums[t] + w * x[t]]
        return found

    @triton.jit
    def _project(table, d, u, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr):
        """dt_t [1, 1, BLOCK_B], B_t [N, 1, BLOCK_B] for all tokens and C [N, 1, BLOCK_B] of the last one."""
        L: tl.constexpr = len(u)
        BLOCK_B: tl.constexpr = u[0].shape[2]
        dt = [tl.zeros([1, BLOCK_D, BLOCK_B], tl.float32)] * L  # a thread's own channels, until the end
        B = [tl.zeros([N, BLOCK_D, BLOCK_B], tl.float32)] * L
        C = tl.zeros([N, BLOCK_D, BLOCK_B], tl.float32)
        for first in range(0, d, BLOCK_D):
            channel = first + tl.arange(0, BLOCK_D)
            _, x, _ = _conv(table, channel, d, u, K)
            dt = _plus(dt, _get(table, DT, channel, d), x)
            B = _plus(B, _get(table, TAPS + K, channel, d, n, N), x)
            C += _get(table, TAPS + K + n, channel, d, n, N) * x[L - 1]
        return _over_channels(dt), _over_channels(B), tl.sum(C, axis=1, keep_dims=True)

    @triton.jit
    def _over_channels(values):
        return [tl.sum(value, axis=1, keep_dims=True) for value in values]

    @triton.jit
    def _over_states(value):
        return tl.sum(value, axis=0, keep_dims=True)

    @triton.jit
    def _steps(table, channel, d, dt):
        """Δ_t and its derivative through softplus for all tokens, S_t for all but the last."""
        w, b = _get(table, DT_W, channel, d), _get(table, DT_B, channel, d)
        delta = []
        slope = []
        for t in tl.static_range(len(dt)):
            a, da = _softplus(w * dt[t] + b)
            delta = delta + [a]
            slope = slope + [da]
        S = [delta[len(dt) - 1]]  # summed from the end: a difference of two sums would cancel
        for i in tl.static_range(2, len(dt)):
            S = [S[0] + delta[len(dt) - i]] + S
        return delta, slope, [tl.minimum(value, 1e30) for value in S]  # A S stays finite

    @triton.jit
    def _forward(
        u, y, table, rows, d, L: tl.constexpr, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    ):  # fmt: skip
        """One block of sequences: u [L, rows] -> y [rows]."""
        sequence = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        u = _tokens(u, sequence, rows, L)
        dt, B, C = _project(table, d, u, K, n, N, BLOCK_D)
        BC = [Bt * C for Bt in B]
        total = tl.zeros([1, BLOCK_D, BLOCK_B], tl.float32)
        for first in range(0, d, BLOCK_D):
            channel = first + tl.arange(0, BLOCK_D)
            _, x, _ = _conv(table, channel, d, u, K)
            delta, _, S = _steps(table, channel, d, dt)
            A2 = _get(table, TAPS + K + 2 * n, channel, d, n, N)
            hC = delta[L - 1] * x[L - 1] * _over_states(BC[L - 1])
            for t in tl.static_range(L - 1):
                hC += delta[t] * x[t] * _over_states(tl.exp2(A2 * S[t]) * BC[t])
            gate, _ = _silu(_get(table, IN_Z, channel, d) * u[L - 1])
            total += _get(table, OUT, channel, d) * (hC + _get(table, SKIP, channel, d) * x[L - 1]) * gate
        tl.store(y + sequence, tl.sum(tl.sum(total, axis=1), axis=0), mask=sequence < rows)

    @triton.jit
    def _backward(
        u_at, gy_at, du_at, table, sums, rows, d, L: tl.constexpr, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    ):  # fmt: skip
        """Blocks pid, pid + programs, …: u, gy [rows] -> du, and the table's gradient is added to `sums`."""
        sums += tl.program_id(0) * d * (TAPS + K + 3 * n)  # this program's own
        for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_B), tl.num_programs(0)):
            sequence = block * BLOCK_B + tl.arange(0, BLOCK_B)
            u = _tokens(u_at, sequence, rows, L)
            gy = _tokens(gy_at, sequence, rows, 1)[0]
            dt, B, C = _project(table, d, u, K, n, N, BLOCK_D)
            BC = [Bt * C for Bt in B]
            at_end = _over_states(BC[L - 1])  # S_L = 0, E = 1
            # Through the gate, the scan and Δ. What reaches x_t directly goes on through the convolution at once, what
            # reaches it through dt, B and C in the next loop, once those gradients are complete.
            dBC = [tl.zeros([N, BLOCK_D, BLOCK_B], tl.float32)] * (L - 1)
            dat_end = tl.zeros([1, BLOCK_D, BLOCK_B], tl.float32)
            ddt = [tl.zeros([1, BLOCK_D, BLOCK_B], tl.float32)] * L
            du = [tl.zeros([1, BLOCK_D, BLOCK_B], tl.float32)] * L
            for first in range(0, d, BLOCK_D):
                channel = first + tl.arange(0, BLOCK_D)
                taps, x, x_slope = _conv(table, channel, d, u, K)
                delta, delta_slope, S = _steps(table, channel, d, dt)
                A2 = _get(table, TAPS + K + 2 * n, channel, d, n, N)
                in_z, out = _get(table, IN_Z, channel, d), _get(table, OUT, channel, d)
                skip = _get(table, SKIP, channel, d)
                gate, gate_slope = _silu(in_z * u[L - 1])
                g = gy * out * gate  # ∂y/∂(h_L C_L)
                hC = delta[L - 1] * x[L - 1] * at_end
                dA2 = tl.zeros([N, BLOCK_D, BLOCK_B], tl.float32)
                later = tl.zeros([1, BLOCK_D, BLOCK_B], tl.float32)  # Σ_{s<t} ∂/∂S_s: each of those S contains Δ_t
                da = []  # for the arguments of softplus
                dconv = []  # for those of the first silu
                added = []  # dBC with this block of channels
                for t in tl.static_range(L - 1):
                    E = tl.exp2(A2 * S[t])
                    q = E * BC[t]
                    sum_q = _over_states(q)
                    c = g * delta[t] * x[t]
                    hC += delta[t] * x[t] * sum_q
                    added = added + [dBC[t] + c * E]
                    dA2 += (c * S[t]) * q
                    da = da + [(g * sum_q * x[t] + later) * delta_slope[t]]
                    dconv = dconv + [g * sum_q * delta[t] * x_slope[t]]
                    later += c * _over_states(A2 * q) * LN2
                dBC = added
                _add(sums, TAPS + K + 2 * n, channel, d, dA2 * LN2, n, N)
                dat_end += g * delta[L - 1] * x[L - 1]
                da = da + [(g * at_end * x[L - 1] + later) * delta_slope[L - 1]]
                dconv = dconv + [g * (at_end * delta[L - 1] + skip) * x_slope[L - 1]]
                y = gy * (hC + skip * x[L - 1])
                dz = y * out * gate_slope
                ddt = _plus(ddt, _get(table, DT_W, channel, d), da)
                du = _conv_backward(taps, sums, channel, d, dconv, u, du)
                du = du[: L - 1] + [du[L - 1] + in_z * dz]
                _add(sums, IN_Z, channel, d, dz * u[L - 1])
                _add(sums, DT_W, channel, d, _dot(da, dt))
                _add(sums, DT_B, channel, d, _dot(da))
                _add(sums, SKIP, channel, d, g * x[L - 1])
                _add(sums, OUT, channel, d, y * gate)
            # Through the projections.
            ddt = _over_channels(ddt)
            dBC = _over_channels(dBC + [dat_end])
            dB = [dBCt * C for dBCt in dBC]
            dC = _dot(dBC, B)
            tl.debug_barrier()  # `sums` has been written before it is read again
            for first in range(0, d, BLOCK_D):
                channel = first + tl.arange(0, BLOCK_D)
                taps, x, x_slope = _conv(table, channel, d, u, K)
                w_dt = _get(table, DT, channel, d)
                w_B = _get(table, TAPS + K, channel, d, n, N)
                w_C = _get(table, TAPS + K + n, channel, d, n, N)
                dconv = []
                for t in tl.static_range(L):
                    dx = w_dt * ddt[t] + _over_states(w_B * dB[t])
                    if t == L - 1:
                        dx += _over_states(w_C * dC)
                    dconv = dconv + [dx * x_slope[t]]
                du = _conv_backward(taps, sums, channel, d, dconv, u, du)
                _add(sums, DT, channel, d, _dot(ddt, x))
                _add(sums, TAPS + K, channel, d, _dot(dB, x), n, N)
                _add(sums, TAPS + K + n, channel, d, dC * x[L - 1], n, N)
            tl.debug_barrier()
            at = du_at + sequence
            for t in tl.static_range(L):
                tl.store(at, tl.sum(tl.sum(du[t], axis=1), axis=0), mask=sequence < rows)
                at += rows

    # `tails`, from here on.

    MEANS, ENDS, OUTPUTS, ADJOINT, BACKWARD = (tl.constexpr(stage) for stage in range(5))  # see _tails
    HI, LO, BD = tl.constexpr(2), tl.constexpr(8), tl.constexpr(16)  # a block of channels: BD = HI · LO
    BT, S = tl.constexpr(16), tl.constexpr(4)  # tokens of a tile; tokens at a time of a scan
    FORGOTTEN = tl.constexpr(18 * math.log2(math.e))

    @triton.jit
    def _scratch(scratch, T, size, K: tl.constexpr, N: tl.constexpr):
        """This program's own memory: u [T + K], dt [T], B, C [T, N], Δ, Δ x, h C, gy [T, BD]; gradients of dt, B,
        C, Δ and Δ x; h before each S tokens [T / S, N, BD]."""
        u = scratch + tl.program_id(0).to(tl.int64) * size
        dt = u + T + K
        B = dt + T
        C = B + T * N
        delta = C + T * N
        drive = delta + T * BD
        hC = drive + T * BD
        gy = hC + T * BD
        ddt = gy + T * BD
        dB = ddt + T
        dC = dB + T * N
        ddelta = dC + T * N
        ddrive = ddelta + T * BD
        return u, dt, B, C, delta, drive, hC, gy, ddt, dB, dC, ddelta, ddrive, ddrive + T * BD

    @triton.jit
    def _place(layers, chunk, T, steps, FIRST: tl.constexpr, LAYERS: tl.constexpr):
        """A chunk's layer, that one's number of weights and first column, the chunk's number in it, counted from the
        end, and the position of its first token: negative where the sequence is too short to fill it."""
        layer = tl.sum((tl.load(layers + tl.arange(0, LAYERS)) <= chunk).to(tl.int32), axis=0)
        begin, size = tl.load(layers + LAYERS + layer), tl.load(layers + 2 * LAYERS + layer)
        j = chunk - begin
        return layer, begin, size, tl.load(layers + 3 * LAYERS + layer), j, size * steps + FIRST - (j + 1) * T

    @triton.jit
    def _fetch(u, past, first, weights, layer, size, column, base, T, FIRST: tl.constexpr, K: tl.constexpr):
        """The chunk's tokens and the K − 1 before them, 0 before the sequence's start -> u [T + K − 1]."""
        for i0 in range(0, T + K - 1, BT):
            i = i0 + tl.arange(0, BT)
            t = base - (K - 1) + i
            w = tl.maximum(t - FIRST, 0)
            exists = (t >= FIRST) & (i < T + K - 1)
            value = tl.load(past + w // size * weights + column + w % size, mask=exists, other=0.0)
            if FIRST:
                value = tl.where(t == 0, tl.load(first + layer), value)
            tl.store(u + i, value, mask=i < T + K - 1)
        tl.debug_barrier()

    @triton.jit
    def _row(table, row, channel, d):
        return tl.load(table + row * d + channel, mask=channel < d, other=0.0)[None, :]

    @triton.jit
    def _add_row(sums, row, channel, d, value):
        """Adds value [BT, BD], summed over tokens, to this program's row of the gradient."""
        at = sums + row * d + channel
        tl.store(at, tl.load(at, mask=channel < d, other=0.0) + tl.sum(value, axis=0), mask=channel < d)

    @triton.jit
    def _matrix(table, row, channel, d, n: tl.constexpr, N: tl.constexpr):
        """n rows of the table: [N, BD]."""
        at, exists = _rows(table, row, channel, d, n, N)
        return tl.load(at, mask=exists, other=0.0)

    @triton.jit
    def _matmul(a, b, c):
        """a b + c. Three products on tensor cores, which together are as good as one in float32."""
        return tl.dot(a, b, c, input_precision="tf32x3")

    @triton.jit
    def _x(u, table, channel, d, base, t, K: tl.constexpr):
        """x_t = silu(conv u) and the derivative of that silu, [BT, BD]; 0 before the sequence's start."""
        a = _row(table, CONV_B, channel, d)
        for k in tl.static_range(K):
            a = a + _row(table, TAPS + k, channel, d) * tl.load(u + t + (K - 1 - k))[:, None]
        x, slope = _silu(a)
        exists = (base + t >= 0)[:, None]
        return tl.where(exists, x, 0.0), tl.where(exists, slope, 0.0)

    @triton.jit
    def _delta(dt, table, channel, d, base, t):
        """Δ_t and its derivative through softplus, [BT, BD]; 0 before the sequence's start."""
        a = _row(table, DT_W, channel, d) * tl.load(dt + t)[:, None] + _row(table, DT_B, channel, d)
        delta, slope = _softplus(a)
        exists = (base + t >= 0)[:, None]
        return tl.where(exists, tl.minimum(delta, 1e18), 0.0), tl.where(exists, slope, 0.0)  # A Δ stays finite

    @triton.jit
    def _project_chunk(
        u, dt_at, B_at, C_at, ddt_at, dB_at, dC_at, table, d, base, T,
        STAGE: tl.constexpr, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """-> dt [T], B, C [T, N], and zeros to their gradients. Returns Σ_t dt_t."""
        total = tl.zeros([BT], tl.float32)
        for t0 in range(0, T, BT):
            t = t0 + tl.arange(0, BT)
            dt = tl.zeros([BT, BD], tl.float32)
            B = tl.zeros([BT, N], tl.float32)
            C = tl.zeros([BT, N], tl.float32)
            for c0 in range(0, d, BD):
                channel = c0 + tl.arange(0, BD)
                x, _ = _x(u, table, channel, d, base, t, K)
                dt += x * _row(table, DT, channel, d)
                if STAGE != MEANS:
                    B = _matmul(x, _matrix(table, TAPS + K, channel, d, n, N).T, B)
                    C = _matmul(x, _matrix(table, TAPS + K + n, channel, d, n, N).T, C)
            dt = tl.sum(dt, axis=1)
            total += dt
            at = t[:, None] * N + tl.arange(0, N)[None, :]
            tl.store(dt_at + t, dt)
            tl.store(B_at + at, B)
            tl.store(C_at + at, C)
            if STAGE == BACKWARD:
                tl.store(ddt_at + t, tl.zeros([BT], tl.float32))
                tl.store(dB_at + at, tl.zeros([BT, N], tl.float32))
                tl.store(dC_at + at, tl.zeros([BT, N], tl.float32))
        tl.debug_barrier()
        return tl.sum(total, axis=0)

    @triton.jit
    def _gate(u, table, channel, d, t, K: tl.constexpr):
        """u_t [BT, 1], silu(z_t) and its derivative [BT, BD]."""
        now = tl.load(u + t + (K - 1))[:, None]
        gate, slope = _silu(_row(table, IN_Z, channel, d) * now)
        return now, gate, slope

    @triton.jit
    def _chunk_steps(
        u, dt, delta_at, drive_at, gy_at, g_at, table, channel, d, out, base, T, STAGE: tl.constexpr, K: tl.constexpr
    ):
        """-> Δ, Δ x [T, BD] and, of the outputs' gradients g, gy = g out silu(z). Returns Σ_t Δ_t [BD]."""
        total = tl.zeros([BT, BD], tl.float32)
        for t0 in range(0, T, BT):
            t = t0 + tl.arange(0, BT)
            at = t[:, None] * BD + tl.arange(0, BD)[None, :]
            x, _ = _x(u, table, channel, d, base, t, K)
            delta, _ = _delta(dt, table, channel, d, base, t)
            tl.store(delta_at + at, delta)
            tl.store(drive_at + at, delta * x)
            total += delta
            if STAGE == ADJOINT or STAGE == BACKWARD:
                g = tl.load(g_at + out + t, mask=out + t >= 0, other=0.0)[:, None]
                _, gate, _ = _gate(u, table, channel, d, t, K)
                tl.store(gy_at + at, g * _row(table, OUT, channel, d) * gate)
        tl.debug_barrier()
        return tl.sum(total, axis=0)

    @triton.jit
    def _chunk_outputs(u, hC, y, table, c0, d, out, base, T, K: tl.constexpr):
        """Adds what a block of channels gives to the chunk's outputs; the first block writes them."""
        channel = c0 + tl.arange(0, BD)
        for t0 in range(0, T, BT):
            t = t0 + tl.arange(0, BT)
            x, _ = _x(u, table, channel, d, base, t, K)
            _, gate, _ = _gate(u, table, channel, d, t, K)
            Y = tl.load(hC + t[:, None] * BD + tl.arange(0, BD)[None, :]) + _row(table, SKIP, channel, d) * x
            value = tl.sum(_row(table, OUT, channel, d) * Y * gate, axis=1)
            if c0 > 0:
                value += tl.load(y + out + t, mask=out + t >= 0, other=0.0)
            tl.store(y + out + t, value, mask=out + t >= 0)

    @triton.jit
    def _lanes():
        return tl.arange(0, HI)[:, None, None] * LO + tl.arange(0, LO)[None, None, :]

    @triton.jit
    def _states(c0, d, n: tl.constexpr, N: tl.constexpr):
        """Where a block of channels is in an array [n, d], and which of it exists: [HI, N, LO]."""
        channel, state = c0 + _lanes(), tl.arange(0, N)[None, :, None]
        return state * d + channel, (state < n) & (channel < d)

    @triton.jit
    def _step(a, h, b):
        """2^a h + b for a <= 0. Near 0 as h + b and h times a polynomial for 2^a − 1, relative error 9e-7: a state that
        forgets slowly remembers for 1 / (1 − E) tokens, and rounding E would be rounding how long."""
        p = ((8.376760769e-3 * a + 5.512203524e-2) * a + 2.401881232e-1) * a + 6.931465670e-1
        near = a > -0.5
        return tl.where(near, p * a, tl.exp2(a)) * h + (tl.where(near, h, 0.0) + b)

    @triton.jit
    def _some(at, t0, stride, offset):
        """S rows of an array, from t0 on: loaded together, so that the scan waits once."""
        rows = []
        for i in tl.static_range(S):
            rows = rows + [tl.load(at + (t0 + i) * stride + offset)]
        return rows

    @triton.jit
    def _scan(A2, h, delta, drive, B, C, hC, kept, T, N: tl.constexpr, OUT: tl.constexpr, KEEP: tl.constexpr):
        """h [HI, N, LO] before the chunk -> after it. OUT: -> h C. KEEP: -> h before each S tokens."""
        lane, state = _lanes(), tl.arange(0, N)[None, :, None]
        for t0 in range(0, T, S):
            if KEEP:
                tl.store(kept + t0 // S * (N * BD) + state * BD + lane, h)
            deltas, drives, Bs = _some(delta, t0, BD, lane), _some(drive, t0, BD, lane), _some(B, t0, N, state)
            if OUT:
                Cs = _some(C, t0, N, state)
            for i in tl.static_range(S):
                h = _step(A2 * deltas[i], h, drives[i] * Bs[i])
                if OUT:
                    tl.store(hC + (t0 + i) * BD + lane, tl.sum(h * Cs[i], axis=1, keep_dims=True))
        return h

    @triton.jit
    def _scan_adjoint(A2, eG, delta, C, gy, T, N: tl.constexpr):
        """E_t G_t of the chunk's first token, from eG, that of the token after the chunk."""
        lane, state = _lanes(), tl.arange(0, N)[None, :, None]
        for back in range(S, T + S, S):
            deltas, gys = _some(delta, T - back, BD, lane), _some(gy, T - back, BD, lane)
            Cs = _some(C, T - back, N, state)
            for i in tl.static_range(S - 1, -1, -1):
                eG = _step(A2 * deltas[i], eG + gys[i] * Cs[i], 0.0)
        return eG

    @triton.jit
    def _scan_back(A2, eG, delta, drive, B, C, gy, kept, ddelta, ddrive, dB, dC, T, N: tl.constexpr):
        """The same, and the gradients: -> of Δ (in units of ln 2) and Δ x, added to those of B and C; returns A2's (in
        units of ln 2)."""
        lane, state = _lanes(), tl.arange(0, N)[None, :, None]
        dA2 = tl.zeros([HI, N, LO], tl.float32)
        for back in range(S, T + S, S):
            t0 = T - back
            h = tl.load(kept + t0 // S * (N * BD) + state * BD + lane)
            deltas, drives, gys = _some(delta, t0, BD, lane), _some(drive, t0, BD, lane), _some(gy, t0, BD, lane)
            Bs, dBs = _some(B, t0, N, state), _some(dB, t0, N, state)
            Cs, dCs = _some(C, t0, N, state), _some(dC, t0, N, state)
            hs = [h]  # before each token, and after the last
            for i in tl.static_range(S):
                hs = hs + [_step(A2 * deltas[i], hs[i], drives[i] * Bs[i])]
            for i in tl.static_range(S - 1, -1, -1):
                G = eG + gys[i] * Cs[i]
                eG = _step(A2 * deltas[i], G, 0.0)
                into_AD = eG * hs[i]  # λ
                dA2 += deltas[i] * into_AD
                tl.store(ddelta + (t0 + i) * BD + lane, tl.sum(A2 * into_AD, axis=1, keep_dims=True))
                tl.store(ddrive + (t0 + i) * BD + lane, tl.sum(G * Bs[i], axis=1, keep_dims=True))
                tl.store(dB + (t0 + i) * N + state, dBs[i] + _over_block(G * drives[i]))
                tl.store(dC + (t0 + i) * N + state, dCs[i] + _over_block(gys[i] * hs[i + 1]))
        return dA2

    @triton.jit
    def _over_block(value):
        return tl.sum(tl.sum(value, axis=0, keep_dims=True), axis=2, keep_dims=True)

    @triton.jit
    def _steps_back(
        u, dt, hC, gy, ddt, ddelta, ddrive, g_at, gfirst, table, sums, channel, d, out, base, T,
        FIRST: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """A block's gradients beside the scan: from the outputs to D, out and in_z, from Δ and Δ x to dt_w, dt_b and
        dt. What reaches x directly goes on through the convolution at once."""
        for t0 in range(0, T, BT):
            t = t0 + tl.arange(0, BT)
            at = t[:, None] * BD + tl.arange(0, BD)[None, :]
            x, x_slope = _x(u, table, channel, d, base, t, K)
            delta, delta_slope = _delta(dt, table, channel, d, base, t)
            now, gate, gate_slope = _gate(u, table, channel, d, t, K)
            skip, into_hC, into = _row(table, SKIP, channel, d), tl.load(gy + at), tl.load(ddrive + at)
            gY = tl.load(g_at + out + t, mask=out + t >= 0, other=0.0)[:, None] * (tl.load(hC + at) + skip * x)
            da = (tl.load(ddelta + at) * LN2 + into * x) * delta_slope
            _add_row(sums, SKIP, channel, d, into_hC * x)
            _add_row(sums, OUT, channel, d, gY * gate)
            _add_row(sums, IN_Z, channel, d, gY * _row(table, OUT, channel, d) * gate_slope * now)
            _add_row(sums, DT_W, channel, d, da * tl.load(dt + t)[:, None])
            _add_row(sums, DT_B, channel, d, da)
            tl.store(ddt + t, tl.load(ddt + t) + tl.sum(da * _row(table, DT_W, channel, d), axis=1))
            _taps_back(u, (into * delta + into_hC * skip) * x_slope, gfirst, table, sums, channel, d, base, t, FIRST, K)
            tl.debug_barrier()

    @triton.jit
    def _taps_back(u, da, gfirst, table, sums, channel, d, base, t, FIRST: tl.constexpr, K: tl.constexpr):
        """From the convolution's outputs to its parameters and `first`, which token t < K sees with lag t."""
        _add_row(sums, CONV_B, channel, d, da)
        for k in tl.static_range(K):
            _add_row(sums, TAPS + k, channel, d, da * tl.load(u + t + (K - 1 - k))[:, None])
        if FIRST:
            t = base + t
            if tl.min(t, axis=0) < K:
                sees = (t >= 0) & (t < K)
                tap_exists = sees[:, None] & (channel < d)[None, :]
                tap = tl.load(table + (t + TAPS)[:, None] * d + channel[None, :], mask=tap_exists, other=0.0)
                value = tl.load(gfirst + t, mask=sees, other=0.0) + tl.sum(da * tap, axis=1)
                tl.store(gfirst + t, value, mask=sees)

    @triton.jit
    def _inputs_back(
        u, ddt_at, dB_at, dC_at, gfirst, table, sums, d, base, T,
        FIRST: tl.constexpr, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """From dt, B and C to x_proj, and through x, silu and the convolution."""
        for c0 in range(0, d, BD):
            channel = c0 + tl.arange(0, BD)
            B_at, exists = _rows(sums, TAPS + K, channel, d, n, N)
            for t0 in range(0, T, BT):
                t = t0 + tl.arange(0, BT)
                x, slope = _x(u, table, channel, d, base, t, K)
                at = t[:, None] * N + tl.arange(0, N)[None, :]
                ddt, dB, dC = tl.load(ddt_at + t)[:, None], tl.load(dB_at + at), tl.load(dC_at + at)
                dx = _matmul(dB, _matrix(table, TAPS + K, channel, d, n, N), ddt * _row(table, DT, channel, d))
                dx = _matmul(dC, _matrix(table, TAPS + K + n, channel, d, n, N), dx)
                _taps_back(u, dx * slope, gfirst, table, sums, channel, d, base, t, FIRST, K)
                _add_row(sums, DT, channel, d, ddt * x)
                tl.store(B_at, _matmul(dB.T, x, tl.load(B_at, mask=exists, other=0.0)), mask=exists)
                C_at = B_at + n * d
                tl.store(C_at, _matmul(dC.T, x, tl.load(C_at, mask=exists, other=0.0)), mask=exists)
                tl.debug_barrier()

    @triton.jit
    def _tails(
        past, first, table, layers, plan, states, totals, adjoints, y, gfirst, sums, scratch, scratch_size,
        chunks, weights, steps, T, d, STAGE: tl.constexpr, FIRST: tl.constexpr, LAYERS: tl.constexpr,
        BLOCKS: tl.constexpr, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """Chunks pid, pid + programs, …: a stage of the computation (all chunks that are scanned, unless it says else).
        MEANS      the mean of dt -> totals [chunks]; only chunks without outputs
        ENDS       h after the chunk, were it 0 before -> states; Σ Δ -> totals
        OUTPUTS    from h before the chunk, `states` -> y; only chunks with outputs
        ADJOINT    E G of the chunk's first token, were G 0 after it -> adjoints; y holds ∂/∂y. Only chunks with outputs
        BACKWARD   from h before the chunk, `states`, and E G after it, `adjoints`: all gradients -> gfirst, sums
        """
        u, dt, B, C, delta, drive, hC, gy, ddt, dB, dC, ddelta, ddrive, kept = _scratch(scratch, T, scratch_size, K, N)
        if STAGE == BACKWARD:
            sums += tl.program_id(0) * d * (TAPS + K + 3 * n)
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            layer, begin, size, column, j, base = _place(layers, chunk, T, steps, FIRST, LAYERS)
            if STAGE == MEANS:
                wanted = j * T >= size
            elif STAGE == OUTPUTS or STAGE == ADJOINT:
                wanted = j * T < size
            else:
                wanted = j < tl.max(tl.load(plan + layer * BLOCKS + tl.arange(0, BLOCKS)), axis=0)
            if wanted:
                _fetch(u, past, first, weights, layer, size, column, base, T, FIRST, K)
                total = _project_chunk(u, dt, B, C, ddt, dB, dC, table, d, base, T, STAGE, K, n, N)
                out = base - size * (steps - 1) - FIRST  # which output the first token has; negative: none
                y_at = y + column if STAGE >= OUTPUTS else y
                gfirst_at = gfirst + layer * K if STAGE == BACKWARD and FIRST else gfirst
                if STAGE == MEANS:
                    tl.store(totals + chunk, total / T)
                else:
                    for c0 in range(0, d, BD):
                        if j < tl.load(plan + layer * BLOCKS + c0 // BD):
                            _block(
                                u, dt, B, C, delta, drive, hC, gy, ddt, dB, dC, ddelta, ddrive, kept,
                                table, states, totals, adjoints, y_at, gfirst_at, sums, begin + j, c0, d, out, base, T,
                                STAGE, FIRST, K, n, N,
                            )  # fmt: skip
                if STAGE == BACKWARD:
                    _inputs_back(u, ddt, dB, dC, gfirst_at, table, sums, d, base, T, FIRST, K, n, N)
                tl.debug_barrier()

    @triton.jit
    def _block(
        u, dt, B, C, delta, drive, hC, gy, ddt, dB, dC, ddelta, ddrive, kept, table, states,
        totals, adjoints, y, gfirst, sums, chunk, c0, d, out, base, T,
        STAGE: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """What `_tails` does with one block of channels of a chunk."""
        channel = c0 + tl.arange(0, BD)
        total = _chunk_steps(u, dt, delta, drive, gy, y, table, channel, d, out, base, T, STAGE, K)
        at, exists = _states(c0, d, n, N)
        A2_at = (TAPS + K + 2 * n) * d + at
        A2 = tl.load(table + A2_at, mask=exists, other=0.0)
        if STAGE == ENDS or STAGE == ADJOINT:
            none = tl.zeros([HI, N, LO], tl.float32)
        else:
            h = tl.load(states + chunk * n * d + at, mask=exists, other=0.0)
        if STAGE == ENDS:
            h = _scan(A2, none, delta, drive, B, C, hC, kept, T, N, False, False)
            tl.store(states + chunk * n * d + at, h, mask=exists)
            tl.store(totals + chunk * d + channel, total, mask=channel < d)
        elif STAGE == OUTPUTS:
            _scan(A2, h, delta, drive, B, C, hC, kept, T, N, True, False)
            tl.debug_barrier()
            _chunk_outputs(u, hC, y, table, c0, d, out, base, T, K)
        elif STAGE == ADJOINT:
            tl.store(adjoints + chunk * n * d + at, _scan_adjoint(A2, none, delta, C, gy, T, N), mask=exists)
        else:
            _scan(A2, h, delta, drive, B, C, hC, kept, T, N, True, True)
            tl.debug_barrier()
            eG = tl.load(adjoints + chunk * n * d + at, mask=exists, other=0.0)
            dA2 = _scan_back(A2, eG, delta, drive, B, C, gy, kept, ddelta, ddrive, dB, dC, T, N)
            tl.store(sums + A2_at, tl.load(sums + A2_at, mask=exists, other=0.0) + dA2 * LN2, mask=exists)
            tl.debug_barrier()
            _steps_back(u, dt, hC, gy, ddt, ddelta, ddrive, y, gfirst, table, sums, channel, d, out, base, T, FIRST, K)
        tl.debug_barrier()

    @triton.jit
    def _carry(
        values, totals, plan, table, layers, T, d, BACK: tl.constexpr, LAYERS: tl.constexpr, BLOCKS: tl.constexpr,
        K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """Hands h (BACK: the adjoint) on from chunk to chunk of one layer and block of channels. values [chunks, n, d]:
        what each chunk hands on had it got 0 -> what it gets."""
        layer, block = tl.program_id(0), tl.program_id(1)
        begin = tl.load(layers + LAYERS + layer)
        end = begin + tl.load(plan + layer * BLOCKS + block)
        at, exists = _states(block * BD, d, n, N)
        A2 = tl.load(table + (TAPS + K + 2 * n) * d + at, mask=exists, other=0.0)
        channel = block * BD + _lanes()
        last = begin + tl.cdiv(tl.load(layers + 2 * LAYERS + layer), T) if BACK else end  # that hands on anything new
        start = tl.zeros([1, 1, 1], tl.int64) + (begin if BACK else end - 1)
        got = tl.zeros([HI, N, LO], tl.float32)
        for i0 in range(0, end - begin, 4):  # four at a time, so that it waits for memory once
            own = []
            total = []
            for i in tl.static_range(4):
                chunk = start + i0 + i if BACK else start - i0 - i
                here = (chunk >= begin) & (chunk < end)
                own = own + [tl.load(values + chunk * n * d + at, mask=exists & here & (chunk < last), other=0.0)]
                total = total + [tl.load(totals + chunk * d + channel, mask=(channel < d) & here, other=0.0)]
            for i in tl.static_range(4):
                chunk = start + i0 + i if BACK else start - i0 - i
                tl.store(values + chunk * n * d + at, got, mask=exists & (chunk >= begin) & (chunk < end))
                got = _step(A2 * total[i], got, own[i])

    @triton.jit
    def _plan(
        table, layers, means, plan, T, d, LAYERS: tl.constexpr, BLOCKS: tl.constexpr,
        K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """How many chunks, from the end, one layer and block of channels is scanned over -> plan [layers, BLOCKS]."""
        layer, block = tl.program_id(0), tl.program_id(1)
        begin = tl.load(layers + LAYERS + layer)
        count, j = tl.load(layers + layer) - begin, tl.cdiv(tl.load(layers + 2 * LAYERS + layer), T)
        channel = block * BD + tl.arange(0, BD)
        at, exists = _rows(table, TAPS + K + 2 * n, channel, d, n, N)
        slowest = tl.max(tl.load(at, mask=exists, other=-float("inf")), axis=0)[None, :]
        gone = tl.zeros([1, BD], tl.float32)  # Σ Δ of the chunks without outputs so far, at least
        found = count
        while (j < count) & (found == count):
            i = j + tl.arange(0, BT)
            mean = tl.load(means + begin + i, mask=i < count, other=0.0)[:, None]
            delta, _ = _softplus(_row(table, DT_W, channel, d) * mean + _row(table, DT_B, channel, d))
            forgotten = slowest * (gone + tl.cumsum(delta * T, axis=0)) < -FORGOTTEN  # NaN: not
            felt = tl.sum(((channel < d)[None, :] & ~forgotten).to(tl.int32), axis=1)
            found = tl.minimum(found, tl.min(tl.where(felt == 0, i + 1, count), axis=0))
            gone += tl.sum(delta * T, axis=0)[None, :]
            j += BT
        tl.store(plan + layer * BLOCKS + block, found.to(tl.int32))


def why_not(device: torch.device, dtype: torch.dtype, tokens: int | None) -> str | None:
    """None where `last` (or `tails`, for tokens None) runs for tensors of that kind, else one sentence that says why it
    does not."""
    if dtype != torch.float32 or (tokens or 0) > MOST_TOKENS:
        return f"the fused scan is for float32, up to {MOST_TOKENS} tokens; this is {dtype}, {tokens}"
    if triton is None:
        return "the fused scan on a GPU needs the triton package, which is not installed"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the Triton kernels of the fused scan run on CUDA devices; this is {device}"
    return _problem(device, tokens is None)


@functools.cache
def _problem(device: torch.device, flat: bool) -> str | None:
    """Triton compiles at the first call, with a C compiler's help: whether the smallest call works."""
    one = lambda *shape: torch.ones(shape, device=device)
    tiny = one(2, 1), one(1, 1, 1), one(1), one(3, 1), one(1, 1), one(1), one(1, 1), one(1), one(1, 1)
    try:
        tails(one(1, 1), [1], None, *tiny) if flat else last(one(1, 1), *tiny)
    except Exception as e:  # no compiler, a GPU too old, …: each its own kind of error
        return f"Triton cannot compile the fused scan here ({' '.join(str(e).split())[:150]})"
    return None


def last(u: Tensor, *parameters: Tensor) -> Tensor:
    """SlowMamba.last: u [B, L] float32 on a GPU -> [B], with gradients for u and all parameters.

    parameters: in_proj.weight [2d, 1], conv1d.weight [d, 1, k], conv1d.bias [d], x_proj.weight [1 + 2n, d],
    dt_proj.weight [d, 1], dt_proj.bias [d], A_log [d, n], D [d], out_proj.weight [1, d].
    Only where `why_not` gives None.
    """
    K, n = min(parameters[1].shape[-1], u.shape[1]), parameters[6].shape[1]
    return _Last.apply(u, _table(u, K, parameters), K, n)


def _table(u: Tensor, K: int, parameters: tuple[Tensor, ...], *others: Tensor) -> Tensor:
    """The parameters as the kernels want them, [P, d]. Autograd takes the gradient apart again."""
    if any(p.dtype != torch.float32 or p.device != u.device for p in (u, *parameters, *others)):
        raise ValueError("the fused scan wants its parameters in float32 and where its input is")
    in_proj, conv, conv_b, x_proj, dt_w, dt_b, A_log, D, out = parameters
    d = len(A_log)
    in_x, in_z = in_proj.view(2, d)
    # A token is one number: in_proj's x half and the convolution are one convolution.
    taps = (in_x[:, None] * conv[:, 0]).flip(1)[:, :K]
    A2 = torch.exp(A_log) * -math.log2(math.e)  # exp(A S) = 2^(A2 S)
    rows = [conv_b, in_z, dt_w, dt_b, D, out, x_proj[:1], taps.T, x_proj[1:], A2.T]
    return torch.cat([row.reshape(-1, d) for row in rows])


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, table: Tensor, K: int, n: int) -> Tensor:
        u = u.T.contiguous()  # [L, B]: neighbouring threads read neighbouring sequences
        ctx.save_for_backward(u, table)
        ctx.K, ctx.n = K, n
        y = u.new_empty(u.shape[1])
        with torch.cuda.device_of(u):
            _forward[(triton.cdiv(len(y), BLOCK_B),)](u, y, table, len(y), table.shape[1], **_constants(u, K, n))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy: Tensor):
        u, table = ctx.saved_tensors
        sums = table.new_zeros(min(_programs(u.device), triton.cdiv(len(gy), BLOCK_B)), *table.shape)
        du = torch.empty_like(u)
        constants = _constants(u, ctx.K, ctx.n)
        with torch.cuda.device_of(u):
            _backward[(len(sums),)](u, gy.contiguous(), du, table, sums, len(gy), table.shape[1], **constants)
        return du.T, sums.sum(0), None, None


def _programs(device: torch.device) -> int:
    """Of kernels that go on from block to block: 8 on each multiprocessor, as many as its registers hold."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _constants(u: Tensor, K: int, n: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    sizes = dict(L=len(u), K=K, n=n, N=triton.next_power_of_2(n), BLOCK_D=BLOCK_D, BLOCK_B=BLOCK_B)
    return dict(sizes, num_warps=1, enable_fp_fusion=True)


def tails(
    past: Tensor, sizes: list[int], first: Tensor | None, *parameters: Tensor, chunk: int | None = None
) -> Tensor:
    """SlowMamba.tails: past [l, N] float32 on a GPU -> [N], with gradients for `first` and all parameters.

    Arguments as selective_scan.tails'; chunk: tokens of a chunk, a multiple of 16, where that is not to be chosen here.
    Only where `why_not` gives None. Keeps up to MOST_KEPT numbers for the backward pass.
    """
    if chunk is None:  # the memory of all h goes with 1 / chunk, that of the programs with chunk
        chunk = 64
        while 512 * chunk**2 < past.numel():
            chunk *= 2
    K, n = parameters[1].shape[-1], parameters[6].shape[1]
    table = _table(past, K, parameters, *(() if first is None else (first,)))
    return _Tails.apply(past, first, table, (tuple(sizes), chunk, K, n))


class _Tails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, past: Tensor, first: Tensor | None, table: Tensor, shape: tuple) -> Tensor:
        n = shape[-1]  # channels that forget about equally fast make a block
        speed = table[-n:].amax(0) * torch.nn.functional.softplus(table[DT_B.value])
        order = torch.argsort(speed, descending=True, stable=True)
        table, first = table[:, order].contiguous(), None if first is None else first.contiguous()
        kernels = _Flat(past.contiguous(), first, table, *shape)
        plan, y = kernels.plan(), past.new_empty(past.shape[1])
        starts = kernels.starts(plan)
        kernels.run(OUTPUTS, plan, *starts, y=y)
        starts = starts if starts[0].numel() <= MOST_KEPT else (None, None)
        ctx.save_for_backward(kernels.past, first, table, order, plan, *starts)
        ctx.shape = shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy: Tensor):
        past, first, table, order, plan, *starts = ctx.saved_tensors
        kernels, gy = _Flat(past, first, table, *ctx.shape), gy.contiguous()
        states, totals = kernels.starts(plan) if starts[0] is None else starts
        adjoints, sums = torch.empty_like(states), table.new_zeros(kernels.programs, *table.shape)
        gfirst = None if first is None else past.new_zeros(len(first), ctx.shape[2])
        kernels.run(ADJOINT, plan, states, totals, adjoints=adjoints, y=gy)
        kernels.carry(adjoints, totals, plan, True)
        kernels.run(BACKWARD, plan, states, totals, adjoints=adjoints, y=gy, gfirst=gfirst, sums=sums)
        return None, None if first is None else gfirst.sum(1), sums.sum(0)[:, torch.argsort(order)], None


class _Flat:
    """The kernels of `tails` for some arguments, table's columns sorted, and the memory they work in."""

    def __init__(self, past, first, table, sizes, T, K, n):
        (steps, weights), d, N = past.shape, table.shape[1], max(8, triton.next_power_of_2(n))  # 8: for tl.dot
        layers, self.chunks = _layers(sizes, steps, first is not None, T, past.device)
        self.past, self.layers, blocks = past, len(sizes), triton.cdiv(d, BD.value)
        self.grid, self.programs = (len(sizes), blocks), min(_programs(past.device), self.chunks)
        scratch = past.new_empty(self.programs, T * (3 + 4 * N + (6 + N // S.value) * BD.value) + K)
        self.net = dict(table=table, layers=layers, T=T, d=d, LAYERS=layers.shape[1], K=K, n=n, N=N)
        # num_stages: a loop's loads must not overtake the stores of its round before.
        self.net |= dict(BLOCKS=triton.next_power_of_2(blocks), num_warps=1, num_stages=1, enable_fp_fusion=True)
        self.tokens = dict(past=past, first=first, weights=weights, steps=steps, FIRST=int(first is not None))
        self.tokens |= dict(scratch=scratch, scratch_size=scratch.shape[1], chunks=self.chunks, **self.net)

    def plan(self) -> Tensor:
        means = self.past.new_empty(self.chunks)
        plan = torch.zeros(self.layers, self.net["BLOCKS"], dtype=torch.int32, device=self.past.device)
        self.run(MEANS, plan, None, means)
        with torch.cuda.device_of(self.past):
            _plan[self.grid](means=means, plan=plan, **self.net)
        return plan

    def run(self, stage, plan, states, totals, adjoints=None, y=None, gfirst=None, sums=None) -> None:
        outputs = dict(plan=plan, states=states, totals=totals, adjoints=adjoints, y=y, gfirst=gfirst, sums=sums)
        with torch.cuda.device_of(self.past):
            _tails[(self.programs,)](STAGE=stage.value, **outputs, **self.tokens)

    def carry(self, values: Tensor, totals: Tensor, plan: Tensor, back: bool) -> None:
        with torch.cuda.device_of(self.past):
            _carry[self.grid](values=values, totals=totals, plan=plan, BACK=back, **self.net)

    def starts(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """h before each chunk [chunks, n, d], and each one's Σ Δ [chunks, d]; of chunks that are scanned."""
        d = self.net["d"]
        states, totals = self.past.new_empty(self.chunks, self.net["n"], d), self.past.new_empty(self.chunks, d)
        self.run(ENDS, plan, states, totals)
        self.carry(states, totals, plan, False)
        return states, totals


@functools.lru_cache(maxsize=8)
def _layers(sizes: tuple[int, ...], steps: int, has_first: bool, T: int, device: torch.device) -> tuple[Tensor, int]:
    """Each layer's end and beginning among the chunks, number of weights, and first column: [4, a power of two]; and
    the number of chunks. Kept, so that no step waits for the copy to the GPU."""
    rows, chunk, column = [], 0, 0
    for size in sizes:
        count = triton.cdiv(has_first + steps * size, T) if size else 0
        rows.append((chunk + count, chunk, size, column))
        chunk, column = chunk + count, column + size
    rows += [(2**62, 0, 0, 0)] * (triton.next_power_of_2(len(rows)) - len(rows))
    return torch.tensor(rows, device=device).T.contiguous(), chunk
