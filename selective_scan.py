"""The fused selective scan of a Mamba block on scalar tokens: SlowMamba.last() and .tails() of hypernet.py.

Copy this file with selective_scan_cpu.cpp (for CPUs) and selective_scan_triton.py (for CUDA GPUs) next to hypernet.py,
which finds them there and does without otherwise.

`last`, for per-weight histories. SlowMamba on a sequence u_1 … u_L of scalars, and of its outputs only the last. Per
channel d and state n, with x_t = silu(conv u), its projections dt_t, B_t, C_t, and Δ_t = softplus(dt_w dt_t + dt_b),
the recurrence

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t,    y = out · ((h_L C_L + D x_L) silu(z_L))

unrolls to a sum in which no step waits for another, S_t being the Δ that come after token t:

    h_L C_L = Σ_t Δ_t x_t Σ_n exp(A_n S_t) B_tn C_Ln,    S_t = Δ_{t+1} + … + Δ_L

With E = exp(A_n S_t), q = E · B_tn C_Ln, g = ∂y/∂(h_L C_L) and c_t = g Δ_t x_t, the gradients need the same E again:

    ∂/∂(B_tn C_Ln) += c_t E      ∂/∂A_n += c_t S_t q      ∂/∂S_t += c_t A_n q      ∂/∂(Δ_t x_t) += g Σ_n q
    ∂/∂Δ_s += Σ_{t<s} ∂/∂S_t, and from there through softplus, the projections, silu and the convolution.

So (L − 1)·d·n exponentials a sequence are the cost, forward and once more backward; the rest is multiply-adds. For a
ResNet-20 at the paper's size (270,000 weights, L = 6, d = 100, n = 16) that is 2.2 billion each way. On a CPU few are
left: Δ depends little on the gradients, so most are near those of another sequence, a short polynomial away. Nothing is
kept for the backward pass but the input.

`tails`, for the flat layout. SlowMamba on a few sequences of up to millions of tokens, and of its outputs the last n of
each. There the recurrence is computed as it is written, token by token, vector lanes being channels; the backward pass
starts each stretch of tokens from a kept h. What has been forgotten when the first wanted output is due is not scanned,
which is decided state by state: few remember long. selective_scan_cpu.cpp derives the adjoint.

On a GPU both are selective_scan_triton.py's, in Triton. The CPU kernels are C++, compiled at first use by torch's
extension loader for the machine's vector units, and `last` for one L (seconds; kept in torch's extension folder). Two
runs with the same number of threads give the same bits; `tails` gives the same ones for any number of threads.
"""

import ctypes
import functools
import hashlib
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


class _Sequences(ctypes.Structure):
    """selective_scan_cpu.cpp's Sequences."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("length", "weights", "layers", "has_first")),
        *((name, ctypes.c_void_p) for name in ("sizes", "past", "first")),
    )


MOST_TOKENS = 16  # of `last`, whose loops over tokens are unrolled
MOST_KEPT = 2**26  # numbers that `tails` keeps for its backward pass; where it is more, that runs forward again


@functools.cache
def library(tokens: int | None) -> ctypes.CDLL | str:
    """The kernels of `last` for sequences of that many tokens, or of `tails` (None); where they cannot be compiled, the
    sentence that says why, which is printed too, once."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", *VECTOR_FLAGS.get(capability, [])]
    if tokens is not None:
        flags.append(f"-DTOKENS={tokens}")
    path = os.environ["PATH"]
    # ninja, which the loader calls, lies beside python in a virtual environment, activated or not.
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    try:
        from torch.utils.cpp_extension import load

        version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]  # copies keep out of each other's way
        name = f"selective_scan_cpu_{tokens or 'flat'}_{capability.lower()}_{version}"
        if not _is_built(name):
            what = "the flat layout" if tokens is None else f"{tokens} tokens"
            print(f"compiling the fused selective scan for {what} and {capability}, once …", file=sys.stderr)
        file = load(name, [str(SOURCE)], extra_cflags=flags, extra_ldflags=["-pthread"], is_python_module=False)
    except Exception as e:  # no compiler, no ninja, an unwritable cache, …: each its own kind of error
        lines = str(e).splitlines() or [repr(e)]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[0]).strip()[:150]
        problem = f"the fused scan needs a C++ compiler and ninja, and could not be compiled ({reason})"
        print(f"{problem}; the reference scan is many times slower", file=sys.stderr)
        return problem
    finally:
        os.environ["PATH"] = path
    return ctypes.CDLL(file)


def _is_built(name: str) -> bool:
    from torch.utils.cpp_extension import _get_build_directory

    return (Path(_get_build_directory(name, False)) / f"{name}.so").exists()


def why_not(device: torch.device, dtype: torch.dtype, tokens: int | None) -> str | None:
    """None where `last` (or `tails`, for tokens None) runs for tensors of that kind, else one sentence that says why it
    does not."""
    if device.type not in ("cpu", "cuda") or dtype != torch.float32:
        return f"the fused scan is for float32 on a CPU or a CUDA GPU; this is {dtype} on {device}"
    if tokens is not None and tokens > MOST_TOKENS:
        return f"the fused scan is for histories of up to {MOST_TOKENS} tokens; these have {tokens}"
    if device.type == "cuda":
        try:
            import selective_scan_triton
        except ImportError:
            return "the fused scan on a GPU needs selective_scan_triton.py beside selective_scan.py"
        except AttributeError:
            return "the fused scan on a GPU needs Triton 3.6 or newer"
        return selective_scan_triton.why_not(device, dtype, tokens)
    found = library(tokens)
    return found if isinstance(found, str) else None


def last(u: Tensor, *parameters: Tensor) -> Tensor:
    """SlowMamba.last: u [B, L] float32 -> [B], with gradients for u and all parameters.

    parameters: in_proj.weight [2d, 1], conv1d.weight [d, 1, k], conv1d.bias [d], x_proj.weight [1 + 2n, d],
    dt_proj.weight [d, 1], dt_proj.bias [d], A_log [d, n], D [d], out_proj.weight [1, d].
    Only where `why_not` gives None.
    """
    if u.is_cuda:
        import selective_scan_triton

        return selective_scan_triton.last(u, *parameters)
    return _Last.apply(u, *parameters)


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, *parameters: Tensor) -> Tensor:
        u = u.T.contiguous()  # [L, B]: sequences along vector lanes. FSG's history lies in memory like this already
        ctx.save_for_backward(u, *parameters)
        y = u.new_empty(u.shape[1])
        _call("mamba_last_forward", parameters, u, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        u, *parameters = ctx.saved_tensors
        du, grads = torch.empty_like(u) if ctx.needs_input_grad[0] else None, _new_grads(parameters)
        _call("mamba_last_backward", parameters, u, grad.contiguous(), du, grads)
        return du if du is None else du.T, *_split_grads(grads, parameters)


def _call(function: str, parameters: tuple[Tensor, ...], u: Tensor, *tensors: Tensor) -> None:
    params, _owners = _params(parameters)
    run = getattr(library(u.shape[0]), function)
    run(ctypes.byref(params), ctypes.c_int64(u.shape[1]), *map(_pointer, (u, *tensors)), torch.get_num_threads())


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _params(parameters: tuple[Tensor, ...]) -> tuple[_Params, tuple[Tensor, ...]]:
    """The parameters as the kernels want them, and the tensors that own the memory."""
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in parameters):
        raise ValueError("the fused scan wants its parameters in float32 and where its input is")
    in_proj, conv, conv_b, x_proj, dt_w, dt_b, A_log, D, out = (p.detach().contiguous() for p in parameters)
    d, n = A_log.shape
    A2 = torch.exp(A_log) * -math.log2(math.e)  # exp(A S) = 2^(A2 S)
    arrays = (conv[:, 0] * in_proj[:d], conv_b, in_proj[d:], x_proj.T.contiguous(), dt_w, dt_b, A2, D, out)
    return _Params(d, n, conv.shape[-1], *(a.data_ptr() for a in arrays)), arrays


def _new_grads(parameters: tuple[Tensor, ...]) -> Tensor:
    """Room for the kernels' gradients, in the order of _Params."""
    return parameters[0].new_empty(sum(p.numel() for p in parameters) - len(parameters[7]))  # in_x is part of conv


def _split_grads(grads: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """The kernels' gradients as those of the parameters. The kernels know conv · in_x and A = −exp(A_log) only."""
    in_proj, conv, _, x_proj, _, _, A_log, D, _ = parameters
    d = len(D)
    sizes = [conv.numel(), d, d, x_proj.numel(), d, d, A_log.numel(), d, d]
    folded, conv_b, in_z, x_proj, dt_w, dt_b, A, D, out = grads.split(sizes)
    in_x, folded = in_proj[:d], folded.view(d, -1)
    in_proj = torch.cat([(folded * conv[:, 0]).sum(1), in_z])
    A = A.view_as(A_log) * -torch.exp(A_log)
    found = (in_proj, folded * in_x, conv_b, x_proj.view(d, -1).T, dt_w, dt_b, A, D, out)
    return [g.reshape(p.shape) for g, p in zip(found, parameters, strict=True)]


def tails(past: Tensor, sizes: list[int], first: Tensor | None, *parameters: Tensor) -> Tensor:
    """SlowMamba.tails: past [l, N] float32 -> [N], with gradients for `first` and all parameters.

    Layer i, sizes[i] columns of `past`, is one sequence: [first[i],] its columns of past[0], of past[1], …; the block's
    outputs at its last sizes[i] tokens. first: [layers], or None. parameters: as for `last`; only where `why_not` gives
    None. Keeps up to MOST_KEPT numbers for the backward pass.
    """
    if sum(sizes) != past.shape[1]:
        raise ValueError(f"the layers have {sum(sizes)} weights together, and their history {past.shape[1]} columns")
    if past.is_cuda:
        import selective_scan_triton

        return selective_scan_triton.tails(past, sizes, first, *parameters)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (first, *parameters))
    return _Tails.apply(past, sizes, first, keep, *parameters)


class _Tails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, past: Tensor, sizes: list[int], first: Tensor | None, keep: bool, *parameters: Tensor) -> Tensor:
        past, first = past.contiguous(), None if first is None else first.contiguous()
        sizes = torch.tensor(sizes)
        inputs = past, sizes, first, parameters
        plan = torch.empty(_call_tails("mamba_tails_plan_size", *inputs), dtype=torch.int32)
        numbers = _call_tails("mamba_tails_plan", *inputs, _pointer(plan), torch.get_num_threads())
        states = past.new_empty(numbers) if keep and numbers <= MOST_KEPT else None
        y = past.new_empty(past.shape[1])
        _call_tails("mamba_tails_forward", *inputs, *map(_pointer, (plan, states, y)), torch.get_num_threads())
        ctx.save_for_backward(past, sizes, first, plan, states, *parameters)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        past, sizes, first, plan, states, *parameters = ctx.saved_tensors
        grads, gfirst = _new_grads(parameters), None if first is None else torch.empty_like(first)
        grad = grad.contiguous()
        pointers = map(_pointer, (plan, states, grad, gfirst, grads))
        _call_tails("mamba_tails_backward", past, sizes, first, parameters, *pointers, torch.get_num_threads())
        return None, None, gfirst, None, *_split_grads(grads, parameters)


def _call_tails(function: str, past: Tensor, sizes: Tensor, first: Tensor | None, parameters, *arguments) -> int:
    params, _owners = _params(parameters)
    pointers = (None if t is None else t.data_ptr() for t in (sizes, past, first))
    sequences = _Sequences(*past.shape, len(sizes), first is not None, *pointers)
    run = getattr(library(None), function)
    run.restype = ctypes.c_int64
    return run(ctypes.byref(params), ctypes.byref(sequences), *arguments)
