"""The fused selective scan of a Mamba block on scalar tokens: SlowMamba.last() of hypernet.py in one kernel.

Copy this file with selective_scan_cpu.cpp, next to hypernet.py, which finds them there and does without otherwise.

What is computed. SlowMamba on a sequence u_1 … u_L of scalars, and of its outputs only the last. Per channel d and
state n, with x_t = silu(conv u), its projections dt_t, B_t, C_t, and Δ_t = softplus(dt_w dt_t + dt_b), the recurrence

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t,    y = out · ((h_L C_L + D x_L) silu(z_L))

unrolls to a sum in which no step waits for another, S_t being the Δ that come after token t:

    h_L C_L = Σ_t Δ_t x_t Σ_n exp(A_n S_t) B_tn C_Ln,    S_t = Δ_{t+1} + … + Δ_L

With E = exp(A_n S_t), q = E · B_tn C_Ln, g = ∂y/∂(h_L C_L) and c_t = g Δ_t x_t, the gradients need the same E again:

    ∂/∂(B_tn C_Ln) += c_t E      ∂/∂A_n += c_t S_t q      ∂/∂S_t += c_t A_n q      ∂/∂(Δ_t x_t) += g Σ_n q
    ∂/∂Δ_s += Σ_{t<s} ∂/∂S_t, and from there through softplus, the projections, silu and the convolution.

So (L − 1)·d·n exponentials a sequence are the cost, forward and once more backward; the rest is multiply-adds. For a
ResNet-20 at the paper's size (270,000 weights, L = 6, d = 100, n = 16) that is 2.2 billion each way. Nothing is kept
for the backward pass but the input.

The CPU kernel is C++, compiled at first use by torch's extension loader for the machine's vector units and for one L
(seconds; kept in torch's extension folder). Two runs with the same number of threads give the same bits.
"""

import ctypes
import functools
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("selective_scan_cpu.cpp")
VECTOR_FLAGS = {  # by torch's own name for what the processor can do
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


class _Params(ctypes.Structure):
    """selective_scan_cpu.cpp's Params."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "dnk"),
        *((name, ctypes.c_void_p) for name in ("conv", "conv_b", "in_z", "xproj")),
        *((name, ctypes.c_void_p) for name in ("dt_w", "dt_b", "A2", "D", "out")),
    )


MOST_TOKENS = 16  # all loops over tokens are unrolled


@functools.cache
def library(tokens: int) -> ctypes.CDLL | str:
    """The kernels for sequences of that many tokens; where they cannot be compiled, the sentence that says why, which
    is printed too, once."""
    from torch.utils.cpp_extension import load

    capability = torch.backends.cpu.get_cpu_capability()
    name = f"selective_scan_cpu_{tokens}_{capability.lower()}"
    flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", f"-DTOKENS={tokens}", *VECTOR_FLAGS.get(capability, [])]
    path = os.environ["PATH"]
    # ninja, which the loader calls, lies beside python in a virtual environment, activated or not.
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    try:
        if not _is_built(name):
            print(f"compiling the fused selective scan for {tokens} tokens and {capability}, once …", file=sys.stderr)
        file = load(name, [str(SOURCE)], extra_cflags=flags, extra_ldflags=["-pthread"], is_python_module=False)
    except Exception as e:  # no compiler, no ninja, an unwritable cache, …: each its own kind of error
        reason = " ".join(str(e).split())[:150]
        problem = f"the fused scan needs a C++ compiler and ninja, and could not be compiled ({reason})"
        print(f"{problem}; the reference scan is many times slower", file=sys.stderr)
        return problem
    finally:
        os.environ["PATH"] = path
    return ctypes.CDLL(file)


def _is_built(name: str) -> bool:
    from torch.utils.cpp_extension import _get_build_directory

    return (Path(_get_build_directory(name, False)) / f"{name}.so").exists()


def why_not(device: torch.device, dtype: torch.dtype, tokens: int) -> str | None:
    """None where `last` runs for tensors of that kind, else one sentence that says why it does not."""
    if device.type != "cpu" or dtype != torch.float32 or tokens > MOST_TOKENS:
        return (
            f"the fused scan is for float32 on a CPU, up to {MOST_TOKENS} tokens; this is {dtype}, {device}, {tokens}"
        )
    found = library(tokens)
    return found if isinstance(found, str) else None


def last(u: Tensor, *parameters: Tensor) -> Tensor:
    """SlowMamba.last: u [B, L] float32 on the CPU -> [B], with gradients for u and all parameters.

    parameters: in_proj.weight [2d, 1], conv1d.weight [d, 1, k], conv1d.bias [d], x_proj.weight [1 + 2n, d],
    dt_proj.weight [d, 1], dt_proj.bias [d], A_log [d, n], D [d], out_proj.weight [1, d].
    Only where `why_not` gives None.
    """
    return _Last.apply(u, *parameters)


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, *parameters: Tensor) -> Tensor:
        u = u.T.contiguous()  # [L, B]: sequences along vector lanes
        ctx.save_for_backward(u, *parameters)
        y = u.new_empty(u.shape[1])
        _call("mamba_last_forward", parameters, u, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        u, *parameters = ctx.saved_tensors
        in_proj, conv, _, x_proj, _, _, A_log, D, _ = parameters
        du, d = torch.empty_like(u), len(D)
        sizes = [conv.numel(), d, d, x_proj.numel(), d, d, A_log.numel(), d, d]
        grads = u.new_empty(sum(sizes))
        _call("mamba_last_backward", parameters, u, grad.contiguous(), du, grads)
        folded, conv_b, in_z, x_proj, dt_w, dt_b, A, D, out = grads.split(sizes)
        # The kernel knows conv · in_x and A = −exp(A_log) only.
        in_x, folded = in_proj[:d], folded.view(d, -1)
        in_proj = torch.cat([(folded * conv[:, 0]).sum(1), in_z])
        A = A.view_as(A_log) * -torch.exp(A_log)
        found = (in_proj, folded * in_x, conv_b, x_proj.view(d, -1).T, dt_w, dt_b, A, D, out)
        return du.T, *(g.reshape(p.shape) for g, p in zip(found, parameters, strict=True))


def _call(function: str, parameters: tuple[Tensor, ...], u: Tensor, *tensors: Tensor) -> None:
    in_proj, conv, conv_b, x_proj, dt_w, dt_b, A_log, D, out = (p.detach().contiguous() for p in parameters)
    d, n = A_log.shape
    A2 = torch.exp(A_log) * -math.log2(math.e)  # exp(A S) = 2^(A2 S)
    arrays = (conv[:, 0] * in_proj[:d], conv_b, in_proj[d:], x_proj.T.contiguous(), dt_w, dt_b, A2, D, out)
    params = _Params(d, n, conv.shape[-1], *(a.data_ptr() for a in arrays))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (u, *tensors)]
    run = getattr(library(u.shape[0]), function)
    run(ctypes.byref(params), ctypes.c_int64(u.shape[1]), *pointers, ctypes.c_int(torch.get_num_threads()))
