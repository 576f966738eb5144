"""The fused selective scan on a GPU: SlowMamba.last() of hypernet.py as two Triton kernels, forward and backward.

Copy this file next to selective_scan.py. It wants the triton package, which comes with torch's CUDA builds on Linux;
without it the file can still be imported, and `why_not` says what is missing. selective_scan.py derives the equations;
in short, for the last of L tokens, with S_t = Δ_{t+1} + … + Δ_L and E = exp(A_n S_t), per channel and state n,

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

Two runs on one device give the same bits: each program adds up its own blocks in order, and torch adds the programs'.
"""
# ruff: noqa: RUF005  (Triton does not know [*a, b])

import functools
import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_TOKENS = 16  # all loops over tokens are unrolled

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


def why_not(device: torch.device, dtype: torch.dtype, tokens: int) -> str | None:
    """None where `last` runs for tensors of that kind, else one sentence that says why it does not."""
    if dtype != torch.float32 or tokens > MOST_TOKENS:
        return f"the fused scan is for float32, up to {MOST_TOKENS} tokens; this is {dtype}, {tokens}"
    if triton is None:
        return "the fused scan on a GPU needs the triton package, which is not installed"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the Triton kernels of the fused scan run on CUDA devices; this is {device}"
    return _problem(device)


@functools.cache
def _problem(device: torch.device) -> str | None:
    """Triton compiles at the first call, with a C compiler's help: whether the smallest call works."""
    one = lambda *shape: torch.ones(shape, device=device)
    tiny = one(2, 1), one(1, 1, 1), one(1), one(3, 1), one(1, 1), one(1), one(1, 1), one(1), one(1, 1)
    try:
        last(one(1, 1), *tiny)
    except Exception as e:  # no compiler, a GPU too old, …: each its own kind of error
        return f"Triton cannot compile the fused scan here ({' '.join(str(e).split())[:150]})"
    return None


def last(u: Tensor, *parameters: Tensor) -> Tensor:
    """SlowMamba.last: u [B, L] float32 on a GPU -> [B], with gradients for u and all parameters.

    parameters: in_proj.weight [2d, 1], conv1d.weight [d, 1, k], conv1d.bias [d], x_proj.weight [1 + 2n, d],
    dt_proj.weight [d, 1], dt_proj.bias [d], A_log [d, n], D [d], out_proj.weight [1, d].
    Only where `why_not` gives None.
    """
    in_proj, conv, conv_b, x_proj, dt_w, dt_b, A_log, D, out = parameters
    d, n = A_log.shape
    K = min(conv.shape[-1], u.shape[1])
    in_x, in_z = in_proj.view(2, d)
    # A token is one number: in_proj's x half and the convolution are one convolution.
    taps = (in_x[:, None] * conv[:, 0]).flip(1)[:, :K]
    A2 = torch.exp(A_log) * -math.log2(math.e)  # exp(A S) = 2^(A2 S)
    rows = [conv_b, in_z, dt_w, dt_b, D, out, x_proj[:1], taps.T, x_proj[1:], A2.T]
    # Autograd takes the table's gradient apart again.
    return _Last.apply(u, torch.cat([row.reshape(-1, d) for row in rows]), K, n)


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
    """Of the backward pass: 8 on each multiprocessor, as many as its registers hold."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _constants(u: Tensor, K: int, n: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    sizes = dict(L=len(u), K=K, n=n, N=triton.next_power_of_2(n), BLOCK_D=BLOCK_D, BLOCK_B=BLOCK_B)
    return dict(sizes, num_warps=1, enable_fp_fusion=True)
