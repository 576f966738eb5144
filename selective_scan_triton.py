"""The fused selective scan on a CUDA GPU, in Triton: `last` and `tails` of selective_scan.py, forward and backward.

Copy this file next to selective_scan.py. It needs the triton package, which torch's CUDA builds for Linux include. The
file can be imported without it; `why_not` then says what is missing. The recurrence is

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t,    Y_t = h_t C_t + D x_t,    output_t = Σ_d out Y_t silu(in_z u_t)

and selective_scan.py gives all equations. Two runs on one device give equal bits: each program adds up its blocks in
order, and torch adds up the programs' sums.

last: many short sequences, the last output of each
---------------------------------------------------
With S_t = Δ_{t+1} + … + Δ_L and E = exp(A_n S_t),

    h_L C_L = Σ_t Δ_t x_t Σ_n E B_tn C_Ln

Sizes: L tokens; d channels; n states per channel, rounded up to a power of two N; K taps of the convolution, at most L;
P = 7 + K + 3n parameters per channel.

In memory, float32:
    u, du [L, sequences]; y, gy [sequences]    inputs, outputs, and their gradients
    table [P, d]                               all parameters; column c is of channel c
    sums [programs, P, d]                      the gradient of table; each program adds to a separate copy

In a kernel, every tensor has the axes [states, channels, sequences]. The size of an axis is that of a block (N, BLOCK_D
or BLOCK_B) or 1:
    A2 [N, BLOCK_D, 1]; u_t, dt_t [1, 1, BLOCK_B]; x_t, Δ_t, S_t [1, BLOCK_D, BLOCK_B]; B_t, C [N, 1, BLOCK_B]
Tokens are Python lists of such tensors, because Triton cannot index a tensor. Loops over tokens are unrolled.

What makes it fast:
- A program is one warp of 32 threads, and BLOCK_D · BLOCK_B = 32. Triton distributes threads over the last axes first.
  So each thread has one channel of one sequence, with all N states in registers.
- A sum over states needs no other thread. A sum over sequences or channels takes log2(BLOCK) exchanges between threads.
  The parameters' gradients are summed over sequences, those of dt, B and C over channels; 4 × 8 balances the two.
- Main memory is read and written for u and du, 4 bytes per token forward and 8 backward, and for y and gy, 4 per
  sequence. `sums` stays in the L2 cache. No tensor [tokens, d] exists.

Cost per token for d = 100, n = 16, L = 6, counted in the machine code for an H100:
    exponentials and reciprocals    forward 1,333 for the scan and 530 for silu and softplus; backward 2,200. A
                                    multiprocessor computes 16 per cycle
    other instructions              forward 12,000, which overlap with the exponentials; backward 42,000, which are the
                                    bottleneck. A multiprocessor executes 128 per cycle
    floating-point operations       forward 13,000; backward 41,000

tails: a few long sequences, the last outputs of each
-----------------------------------------------------
There is one sequence per layer, of up to millions of tokens. The recurrence is computed as it is written, token by
token. So is its adjoint, which selective_scan_cpu.cpp derives. A sequence is divided into chunks of T tokens, counted
from its end. Chunks run in parallel, because the h after a chunk is linear in the h before it:

    MEANS, _plan       find the chunks that are not needed, see below
    ENDS               for every chunk: the h after it if the h before it is 0, and Σ_t Δ_t
    _carry             from chunk to chunk: the h before it becomes exp(A Σ Δ) h + the h of ENDS
    OUTPUTS            for every chunk with outputs: the outputs, from the h before it
    ADJOINT, _carry    like ENDS and _carry, for the adjoint exp(A Δ_t) ∂/∂h_t, backwards in time
    BACKWARD           for every chunk: h again and all gradients, from the h before it and the adjoint after it

One launch processes all layers. A program takes one chunk after another, and of each chunk all channels.

In memory, float32:
    states, adjoints [chunks, n, d]    h before each chunk, and the adjoint after it
    totals [chunks, d]                 Σ_t Δ_t
    layers                             where the chunks of each layer are
    table, sums                        as above
    scratch [programs, 227 T]          for n = 16; see `_scratch`; it should stay in the caches
No tensor [tokens, d] or [tokens, n] exists. T grows with the square root of the number of tokens, which balances
`states` and `scratch`.

In a kernel, the scan itself works on tensors [HI, N, LO] with HI · LO = BD channels. A thread has N / 4 states of HI
channels in registers, so that both sums over states and sums over channels take few exchanges between threads.
Everything else works on tiles [BT, BD] of tokens and channels.

Which chunks are skipped: between two tokens a state decays by exp(A Σ Δ). An output does not depend on what has decayed
by e^-18 or more, which is float32's resolution and a margin. A lower bound of Σ Δ needs dt only, not Δ: softplus is
convex, so over a chunk Σ Δ >= T softplus(dt_w mean(dt) + dt_b). MEANS computes the means. `_plan` adds up the bounds,
from the first chunk without outputs backwards, until the slowest state of a block of channels has decayed. A block has
channels that forget about equally fast. The plan stays on the GPU, where the programs read it.

Cost per scanned token for d = 100, n = 16, T = 64, counted in the machine code for an H100:
    exponentials of the scan    1,792 in each of ENDS, OUTPUTS and ADJOINT, with d rounded up to 112; 3,584 in BACKWARD
    instructions                4,000 in MEANS, 36,000 in ENDS, 50,000 in OUTPUTS, 41,000 in ADJOINT and 170,000 in
                                BACKWARD. They are the bottleneck
    main memory                 4 d n / T = 100 bytes whenever h or its adjoint is read or written
"""
# ruff: noqa: RUF005, SIM109  (Triton does not know [*a, b] and a in (b, c))

import functools
import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as e:
    triton, import_error = None, e

MOST_TOKENS = 16  # of `last`, because its loops over tokens are unrolled
MOST_KEPT = 2**26  # elements of h that `tails` saves for its backward pass; if there are more, it recomputes them

if triton is not None:
    # For tests without a GPU: with TRITON_INTERPRET=1, Triton runs the kernels in NumPy on CPU tensors. Wide blocks are
    # faster there.
    INTERPRETED = triton.knobs.runtime.interpret
    BLOCK_D, BLOCK_B = (16, 16) if INTERPRETED else (4, 8)

    # Rows of the table. From TAPS on there are K taps (row k is multiplied by the token k steps back), n rows of x_proj
    # for B, n for C, and n rows of A2.
    CONV_B, IN_Z, DT_W, DT_B, SKIP, OUT, DT, TAPS = (tl.constexpr(row) for row in range(8))
    LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))

    @triton.jit
    def _rows(table, first, channel, d, n: tl.constexpr, N: tl.constexpr):
        """Return pointers to n rows of the table, [N, BLOCK_D], and a mask of those that exist."""
        row = tl.arange(0, N)[:, None]
        return table + (first + row) * d + channel[None, :], (row < n) & (channel < d)[None, :]

    @triton.jit
    def _get(table, first, channel, d, n: tl.constexpr = 1, N: tl.constexpr = 1):
        """Load n rows of the table: [N, BLOCK_D, 1]. Rows and channels that do not exist are 0, which has no effect."""
        at, exists = _rows(table, first, channel, d, n, N)
        return tl.load(at, mask=exists, other=0.0)[:, :, None]

    @triton.jit
    def _add(sums, first, channel, d, value, n: tl.constexpr = 1, N: tl.constexpr = 1):
        """Add value [N, BLOCK_D, BLOCK_B], summed over the sequences, to n rows of this program's gradient."""
        at, exists = _rows(sums, first, channel, d, n, N)
        tl.store(at, tl.load(at, mask=exists, other=0.0) + tl.sum(value, axis=2), mask=exists)

    @triton.jit
    def _silu(a):
        """Return silu(a) = a σ(a) and its derivative. It uses exp(−|a|), which cannot overflow."""
        e = tl.exp2(tl.abs(a) * -LOG2E)
        sigmoid = tl.where(a < 0, e, 1.0) / (1.0 + e)
        return a * sigmoid, sigmoid * (1.0 + a * (1.0 - sigmoid))

    @triton.jit
    def _softplus(a):
        """Return softplus(a) = max(a, 0) + log(1 + e) with e = exp(−|a|), and its derivative σ(a).

        log(1 + e) is e times a polynomial, with a relative error of 3e-8. Rounding 1 + e would lose a small e.
        """
        e = tl.exp2(tl.abs(a) * -LOG2E)
        p = (0.00525345793 * e - 0.0295885075) * e + 0.0783616677
        p = ((p * e - 0.136747703) * e + 0.191114306) * e - 0.248443693
        p = ((p * e + 0.333192706) * e - 0.499995023) * e + 1.0
        return tl.maximum(a, 0.0) + p * e, tl.where(a < 0, e, 1.0) / (1.0 + e)

    @triton.jit
    def _tokens(u, sequence, rows, L: tl.constexpr):
        """Load the L tokens of a block, [1, 1, BLOCK_B] each; 0 beyond the last sequence."""
        tokens = []
        for _ in tl.static_range(L):
            tokens = tokens + [tl.load(u + sequence, mask=sequence < rows, other=0.0)[None, None, :]]
            u += rows
        return tokens

    @triton.jit
    def _conv(table, channel, d, u, K: tl.constexpr):
        """Return the K taps, and for all tokens x_t = silu(conv u) and the derivative of that silu."""
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
        """Backward pass of the convolution: from the gradients da_t of its outputs to its parameters' and the tokens'.

        Returns du with the tokens' gradients added.
        """
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
        """Return Σ_t a_t b_t for two lists, Σ_t a_t for one."""
        total = a[0] if b is None else a[0] * b[0]
        for t in tl.static_range(1, len(a)):
            total += a[t] if b is None else a[t] * b[t]
        return total

    @triton.jit
    def _plus(sums, w, x):
        """Return sums_t + w x_t for all tokens."""
        found = []
        for t in tl.static_range(len(x)):
            found = found + [sums[t] + w * x[t]]
        return found

    @triton.jit
    def _project(table, d, u, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr):
        """Return dt_t [1, 1, BLOCK_B] and B_t [N, 1, BLOCK_B] of all tokens, and C [N, 1, BLOCK_B] of the last one."""
        L: tl.constexpr = len(u)
        BLOCK_B: tl.constexpr = u[0].shape[2]
        dt = [tl.zeros([1, BLOCK_D, BLOCK_B], tl.float32)] * L  # sums over a thread's own channels
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
        """Return Δ_t and the derivative of its softplus for all tokens, and S_t for all but the last."""
        w, b = _get(table, DT_W, channel, d), _get(table, DT_B, channel, d)
        delta = []
        slope = []
        for t in tl.static_range(len(dt)):
            a, da = _softplus(w * dt[t] + b)
            delta = delta + [a]
            slope = slope + [da]
        S = [delta[len(dt) - 1]]  # summed from the end, because a difference of two sums would lose digits
        for i in tl.static_range(2, len(dt)):
            S = [S[0] + delta[len(dt) - i]] + S
        return delta, slope, [tl.minimum(value, 1e30) for value in S]  # A S stays finite

    @triton.jit
    def _forward(
        u, y, table, rows, d, L: tl.constexpr, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    ):  # fmt: skip
        """Forward pass of one block of sequences. u [L, rows] -> y [rows], where rows is the number of sequences."""
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
        """Backward pass of the blocks pid, pid + programs, …: u [L, rows], gy [rows] -> du [L, rows].

        The gradient of the table is added to `sums`.
        """
        sums += tl.program_id(0) * d * (TAPS + K + 3 * n)  # this program's copy
        for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_B), tl.num_programs(0)):
            sequence = block * BLOCK_B + tl.arange(0, BLOCK_B)
            u = _tokens(u_at, sequence, rows, L)
            gy = _tokens(gy_at, sequence, rows, 1)[0]
            dt, B, C = _project(table, d, u, K, n, N, BLOCK_D)
            BC = [Bt * C for Bt in B]
            at_end = _over_states(BC[L - 1])  # S_L = 0, E = 1
            # Backward through the gate, the scan and Δ. The part of x_t's gradient that comes from the scan goes on
            # through the convolution here. The part that comes from dt, B and C follows in the next loop, when their
            # gradients are complete.
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
                later = tl.zeros([1, BLOCK_D, BLOCK_B], tl.float32)  # Σ_{s<t} ∂/∂S_s, because these S contain Δ_t
                da = []  # gradients of softplus's arguments
                dconv = []  # gradients of the convolution's outputs
                added = []  # dBC, with this block of channels added
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
            # Backward through the projections.
            ddt = _over_channels(ddt)
            dBC = _over_channels(dBC + [dat_end])
            dB = [dBCt * C for dBCt in dBC]
            dC = _dot(dBC, B)
            tl.debug_barrier()  # all of `sums` is written before it is read again
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

    # -- tails --------------------------------------------------------------------------------------------------------

    MEANS, ENDS, OUTPUTS, ADJOINT, BACKWARD = (tl.constexpr(stage) for stage in range(5))  # see _tails
    HI, LO, BD = tl.constexpr(2), tl.constexpr(8), tl.constexpr(16)  # channels of a block: BD = HI · LO
    BT, S = tl.constexpr(16), tl.constexpr(4)  # tokens of a tile; tokens that the scan loads together
    FORGOTTEN = tl.constexpr(18 * math.log2(math.e))

    @triton.jit
    def _scratch(scratch, T, size, K: tl.constexpr, N: tl.constexpr):
        """Return pointers into this program's scratch memory.

        u [T + K]; dt [T]; B, C [T, N]; Δ, Δ x, h C, gy [T, BD]; the gradients of dt, B, C, Δ and Δ x; and h before
        every S tokens [T / S, N, BD].
        """
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
        """Return where a chunk is.

        Its layer; the layer's first chunk, number of weights and first column; the chunk's index in the layer, counted
        from the end; and the position of its first token, which is negative if the sequence begins later.
        """
        layer = tl.sum((tl.load(layers + tl.arange(0, LAYERS)) <= chunk).to(tl.int32), axis=0)
        begin, size = tl.load(layers + LAYERS + layer), tl.load(layers + 2 * LAYERS + layer)
        j = chunk - begin
        return layer, begin, size, tl.load(layers + 3 * LAYERS + layer), j, size * steps + FIRST - (j + 1) * T

    @triton.jit
    def _fetch(u, past, first, weights, layer, size, column, base, T, FIRST: tl.constexpr, K: tl.constexpr):
        """Copy the chunk's tokens and the K − 1 before them to u [T + K − 1]; 0 before the sequence's start."""
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
        """Add value [BT, BD], summed over the tokens, to a row of this program's gradient."""
        at = sums + row * d + channel
        tl.store(at, tl.load(at, mask=channel < d, other=0.0) + tl.sum(value, axis=0), mask=channel < d)

    @triton.jit
    def _matrix(table, row, channel, d, n: tl.constexpr, N: tl.constexpr):
        """Load n rows of the table: [N, BD]."""
        at, exists = _rows(table, row, channel, d, n, N)
        return tl.load(at, mask=exists, other=0.0)

    @triton.jit
    def _matmul(a, b, c):
        """Return a b + c, as three products on tensor cores that together are as precise as float32."""
        return tl.dot(a, b, c, input_precision="tf32x3")

    @triton.jit
    def _x(u, table, channel, d, base, t, K: tl.constexpr):
        """Return x_t = silu(conv u) and the derivative of that silu, [BT, BD]; 0 before the sequence's start."""
        a = _row(table, CONV_B, channel, d)
        for k in tl.static_range(K):
            a = a + _row(table, TAPS + k, channel, d) * tl.load(u + t + (K - 1 - k))[:, None]
        x, slope = _silu(a)
        exists = (base + t >= 0)[:, None]
        return tl.where(exists, x, 0.0), tl.where(exists, slope, 0.0)

    @triton.jit
    def _delta(dt, table, channel, d, base, t):
        """Return Δ_t and the derivative of its softplus, [BT, BD]; 0 before the sequence's start."""
        a = _row(table, DT_W, channel, d) * tl.load(dt + t)[:, None] + _row(table, DT_B, channel, d)
        delta, slope = _softplus(a)
        exists = (base + t >= 0)[:, None]
        return tl.where(exists, tl.minimum(delta, 1e18), 0.0), tl.where(exists, slope, 0.0)  # A Δ stays finite

    @triton.jit
    def _project_chunk(
        u, dt_at, B_at, C_at, ddt_at, dB_at, dC_at, table, d, base, T,
        STAGE: tl.constexpr, K: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """Store dt [T] and B, C [T, N] of the chunk, and zeros in their gradients. Return Σ_t dt_t."""
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
        """Return u_t [BT, 1], and silu(z_t) and its derivative [BT, BD]."""
        now = tl.load(u + t + (K - 1))[:, None]
        gate, slope = _silu(_row(table, IN_Z, channel, d) * now)
        return now, gate, slope

    @triton.jit
    def _chunk_steps(
        u, dt, delta_at, drive_at, gy_at, g_at, table, channel, d, out, base, T, STAGE: tl.constexpr, K: tl.constexpr
    ):
        """Store Δ, Δ x and, from the outputs' gradients g, gy = g out silu(z): [T, BD]. Return Σ_t Δ_t [BD]."""
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
        """Add the contribution of a block of channels to the chunk's outputs. The first block initialises them."""
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
        """Return the offsets of a block of channels in an array [n, d], and a mask of those that exist: [HI, N, LO]."""
        channel, state = c0 + _lanes(), tl.arange(0, N)[None, :, None]
        return state * d + channel, (state < n) & (channel < d)

    @triton.jit
    def _step(a, h, b):
        """Return 2^a h + b for a <= 0.

        For a near 0 it is h + b + (2^a − 1) h, where a polynomial computes 2^a − 1 with a relative error of 9e-7. A
        state with E = 2^a remembers about 1 / (1 − E) tokens, and rounding E to float32 would change that number.
        """
        p = ((8.376760769e-3 * a + 5.512203524e-2) * a + 2.401881232e-1) * a + 6.931465670e-1
        near = a > -0.5
        return tl.where(near, p * a, tl.exp2(a)) * h + (tl.where(near, h, 0.0) + b)

    @triton.jit
    def _some(at, t0, stride, offset):
        """Load S rows of an array from t0 on, together, so that the scan waits for memory once."""
        rows = []
        for i in tl.static_range(S):
            rows = rows + [tl.load(at + (t0 + i) * stride + offset)]
        return rows

    @triton.jit
    def _scan(A2, h, delta, drive, B, C, hC, kept, T, N: tl.constexpr, OUT: tl.constexpr, KEEP: tl.constexpr):
        """Scan a chunk: return h [HI, N, LO] after it, from h before it.

        OUT: store h C. KEEP: store h before every S tokens.
        """
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
        """Return E_t G_t of the chunk's first token, from eG, which is that of the token after the chunk."""
        lane, state = _lanes(), tl.arange(0, N)[None, :, None]
        for back in range(S, T + S, S):
            deltas, gys = _some(delta, T - back, BD, lane), _some(gy, T - back, BD, lane)
            Cs = _some(C, T - back, N, state)
            for i in tl.static_range(S - 1, -1, -1):
                eG = _step(A2 * deltas[i], eG + gys[i] * Cs[i], 0.0)
        return eG

    @triton.jit
    def _scan_back(A2, eG, delta, drive, B, C, gy, kept, ddelta, ddrive, dB, dC, T, N: tl.constexpr):
        """Scan a chunk backwards, from eG, the E G of the token after it.

        Store the gradients of Δ and Δ x, add to those of B and C, and return that of A2. Those of Δ and A2 are in units
        of ln 2.
        """
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
        """Add the gradients of D, out, in_z, dt_w, dt_b and dt for one block of channels.

        The part of x's gradient that does not come from dt, B and C goes on through the convolution.
        """
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
        """From the gradients da of the convolution's outputs to its parameters' and `first`'s.

        `first` is token 0, which reaches token t through tap t.
        """
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
        """From the gradients of dt, B and C to x_proj's, and on through x, silu and the convolution."""
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
        """One stage of the computation, for the chunks pid, pid + programs, …

        MEANS      chunks without outputs: the mean of dt -> totals [chunks]
        ENDS       all planned chunks: h after the chunk if it is 0 before -> states; Σ Δ -> totals
        OUTPUTS    chunks with outputs: from the h before the chunk, in `states` -> y
        ADJOINT    chunks with outputs: E G of the first token if G is 0 after the chunk -> adjoints; y is ∂/∂y
        BACKWARD   all planned chunks: from the h before it and the E G after it, in `adjoints` -> gfirst, sums
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
                out = (
                    base - size * (steps - 1) - FIRST
                )  # the index of the first token's output; negative if it has none
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
        """One stage of the computation, for one block of channels of one chunk."""
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
        """Carry h from chunk to chunk, for one layer and block of channels; BACK: the adjoint, backwards in time.

        values [chunks, n, d]: the h after each chunk if the h before it is 0. The h before each chunk replaces it.
        """
        layer, block = tl.program_id(0), tl.program_id(1)
        begin = tl.load(layers + LAYERS + layer)
        end = begin + tl.load(plan + layer * BLOCKS + block)
        at, exists = _states(block * BD, d, n, N)
        A2 = tl.load(table + (TAPS + K + 2 * n) * d + at, mask=exists, other=0.0)
        channel = block * BD + _lanes()
        last = (
            begin + tl.cdiv(tl.load(layers + 2 * LAYERS + layer), T) if BACK else end
        )  # chunks from `last` on add nothing
        start = tl.zeros([1, 1, 1], tl.int64) + (begin if BACK else end - 1)
        got = tl.zeros([HI, N, LO], tl.float32)
        for i0 in range(0, end - begin, 4):  # loads four chunks together, to wait for memory once
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
        """plan [layers, BLOCKS] = for one layer and block of channels, the number of chunks to scan, from the end."""
        layer, block = tl.program_id(0), tl.program_id(1)
        begin = tl.load(layers + LAYERS + layer)
        count, j = tl.load(layers + layer) - begin, tl.cdiv(tl.load(layers + 2 * LAYERS + layer), T)
        channel = block * BD + tl.arange(0, BD)
        at, exists = _rows(table, TAPS + K + 2 * n, channel, d, n, N)
        slowest = tl.max(tl.load(at, mask=exists, other=-float("inf")), axis=0)[None, :]
        gone = tl.zeros([1, BD], tl.float32)  # a lower bound of Σ Δ over the chunks without outputs so far
        found = count
        while (j < count) & (found == count):
            i = j + tl.arange(0, BT)
            mean = tl.load(means + begin + i, mask=i < count, other=0.0)[:, None]
            delta, _ = _softplus(_row(table, DT_W, channel, d) * mean + _row(table, DT_B, channel, d))
            forgotten = slowest * (gone + tl.cumsum(delta * T, axis=0)) < -FORGOTTEN  # False for NaN
            felt = tl.sum(((channel < d)[None, :] & ~forgotten).to(tl.int32), axis=1)
            found = tl.minimum(found, tl.min(tl.where(felt == 0, i + 1, count), axis=0))
            gone += tl.sum(delta * T, axis=0)[None, :]
            j += BT
        tl.store(plan + layer * BLOCKS + block, found.to(tl.int32))


def why_not(device: torch.device, dtype: torch.dtype, tokens: int | None) -> str | None:
    """Return None if the kernels run for such tensors, else one sentence that says why they do not.

    tokens: the sequence length, for `last`; None for `tails`.
    """
    if dtype != torch.float32 or (tokens or 0) > MOST_TOKENS:
        return f"the fused scan is for float32, up to {MOST_TOKENS} tokens; this is {dtype}, {tokens}"
    if triton is None:
        return f"the fused scan on a GPU needs the triton package, which cannot be imported ({import_error})"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the Triton kernels of the fused scan run on CUDA devices; this is {device}"
    return _problem(device, tokens is None)


@functools.cache
def _problem(device: torch.device, flat: bool) -> str | None:
    """Triton compiles at the first call and needs a C compiler for it. Try the smallest call."""
    one = lambda *shape: torch.ones(shape, device=device)
    tiny = one(2, 1), one(1, 1, 1), one(1), one(3, 1), one(1, 1), one(1), one(1, 1), one(1), one(1, 1)
    try:
        tails(one(1, 1), [1], None, *tiny) if flat else last(one(1, 1), *tiny)
    except Exception as e:  # no compiler, a GPU that is too old, …: the types of the errors differ
        return f"Triton cannot compile the fused scan here ({' '.join(str(e).split())[:150]})"
    return None


def last(u: Tensor, *parameters: Tensor, known: Tensor | None = None) -> Tensor:
    """Return SlowMamba's output at the last token of each sequence, differentiable in u and all parameters.

    u: [B, L] float32, B sequences of L tokens. Returns [B].
    known: [B], the result of an earlier call with the same arguments. It is then returned, with its graph.
    parameters: in_proj.weight [2d, 1], conv1d.weight [d, 1, k], conv1d.bias [d], x_proj.weight [1 + 2n, d],
        dt_proj.weight [d, 1], dt_proj.bias [d], A_log [d, n], D [d], out_proj.weight [1, d].
    Call it only if `why_not` returns None. Raises ValueError if a parameter has another dtype or device than u.
    """
    K, n = min(parameters[1].shape[-1], u.shape[1]), parameters[6].shape[1]
    return _Last.apply(u, known, _table(u, K, parameters), K, n)


def _table(u: Tensor, K: int, parameters: tuple[Tensor, ...], *others: Tensor) -> Tensor:
    """The parameters as the kernels take them, [P, d]. Autograd splits the gradient."""
    if any(p.dtype != torch.float32 or p.device != u.device for p in (u, *parameters, *others)):
        raise ValueError("the fused scan needs its input and parameters in float32 and on one device")
    in_proj, conv, conv_b, x_proj, dt_w, dt_b, A_log, D, out = parameters
    d = len(A_log)
    in_x, in_z = in_proj.view(2, d)
    # in_x and the convolution are one convolution, because a token is a scalar.
    taps = (in_x[:, None] * conv[:, 0]).flip(1)[:, :K]
    A2 = torch.exp(A_log) * -math.log2(math.e)  # exp(A S) = 2^(A2 S)
    rows = [conv_b, in_z, dt_w, dt_b, D, out, x_proj[:1], taps.T, x_proj[1:], A2.T]
    return torch.cat([row.reshape(-1, d) for row in rows])


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, known: Tensor | None, table: Tensor, K: int, n: int) -> Tensor:
        u = u.T.contiguous()  # [L, B], so that neighbouring threads read neighbouring sequences
        ctx.save_for_backward(u, table)
        ctx.K, ctx.n = K, n
        if known is not None:
            return known.clone()
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
        return du.T, None, sums.sum(0), None, None


def _programs(device: torch.device) -> int:
    """The number of programs of the kernels that loop over blocks: 8 per multiprocessor, which fills its registers."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _constants(u: Tensor, K: int, n: int) -> dict[str, int]:
    """The constants and options that _forward and _backward are compiled for."""
    sizes = dict(L=len(u), K=K, n=n, N=triton.next_power_of_2(n), BLOCK_D=BLOCK_D, BLOCK_B=BLOCK_B)
    return dict(sizes, num_warps=1, enable_fp_fusion=True)


def tails(
    past: Tensor, sizes: list[int], first: Tensor | None, *parameters: Tensor, chunk: int | None = None
) -> Tensor:
    """Return SlowMamba's last outputs on one sequence per layer, differentiable in `first` and all parameters.

    past, sizes, first, parameters: as for selective_scan.tails, on a GPU. Returns [N].
    chunk: the number of tokens of a chunk, a multiple of 16; by default it grows with the number of tokens.
    Call it only if `why_not` returns None. Raises ValueError if a tensor has another dtype or device than past.
    Saves up to MOST_KEPT elements for the backward pass.
    """
    if chunk is None:  # the memory for all h is proportional to 1 / chunk, that for the programs to chunk
        chunk = 64
        while 512 * chunk**2 < past.numel():
            chunk *= 2
    K, n = parameters[1].shape[-1], parameters[6].shape[1]
    table = _table(past, K, parameters, *(() if first is None else (first,)))
    return _Tails.apply(past, first, table, (tuple(sizes), chunk, K, n))


class _Tails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, past: Tensor, first: Tensor | None, table: Tensor, shape: tuple) -> Tensor:
        n = shape[-1]  # sorts the channels, so that those of a block forget about equally fast
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
    """The kernels of `tails` with their common arguments and scratch memory. The columns of table are sorted."""

    def __init__(self, past, first, table, sizes, T, K, n):
        (steps, weights), d, N = past.shape, table.shape[1], _padded_states(n)
        layers, self.chunks = _layers(sizes, steps, first is not None, T, past.device)
        self.past, self.layers, blocks = past, len(sizes), triton.cdiv(d, BD.value)
        self.grid, self.programs = (len(sizes), blocks), min(_programs(past.device), self.chunks)
        scratch = past.new_empty(self.programs, T * (3 + 4 * N + (6 + N // S.value) * BD.value) + K)
        self.net = dict(table=table, layers=layers, T=T, d=d, LAYERS=layers.shape[1], K=K, n=n, N=N)
        # num_stages=1, because an iteration's loads must not be moved before the stores of the previous one.
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
        """Return h before each chunk [chunks, n, d], and each chunk's Σ Δ [chunks, d], for the planned chunks."""
        d = self.net["d"]
        states, totals = self.past.new_empty(self.chunks, self.net["n"], d), self.past.new_empty(self.chunks, d)
        self.run(ENDS, plan, states, totals)
        self.carry(states, totals, plan, False)
        return states, totals


def _padded_states(n: int) -> int:
    """N of the kernels of `tails`: on a GPU, tl.dot sums over at least 16 elements."""
    return max(16, triton.next_power_of_2(n))


@functools.lru_cache(maxsize=8)
def _layers(sizes: tuple[int, ...], steps: int, has_first: bool, T: int, device: torch.device) -> tuple[Tensor, int]:
    """Return a tensor [4, number of layers, rounded up to a power of two], and the number of chunks.

    Its rows are each layer's end and beginning among the chunks, number of weights, and first column. The result is
    cached, so that a training step does not wait for the copy to the GPU.
    """
    rows, chunk, column = [], 0, 0
    for size in sizes:
        count = triton.cdiv(has_first + steps * size, T) if size else 0
        rows.append((chunk + count, chunk, size, column))
        chunk, column = chunk + count, column + size
    rows += [(2**62, 0, 0, 0)] * (triton.next_power_of_2(len(rows)) - len(rows))
    return torch.tensor(rows, device=device).T.contiguous(), chunk
