"""The selective scan of a Mamba block on scalar tokens, fused into one kernel: SlowMamba of hypernet.py, faster.

Copy this file next to hypernet.py, together with selective_scan_cpu.cpp (for CPUs) and selective_scan_triton.py (for
CUDA GPUs). Without it, hypernet.py uses plain PyTorch.

There are two fused functions, one for each of FSG's history layouts:

    last     per-weight: many short sequences; returns the last output of each. SlowMamba.last
    tails    flat: a few sequences of up to millions of tokens; returns the last outputs of each. SlowMamba.tails

At the end of the file are these ideas in plain PyTorch: `last_unrolled`, `first_needed` and `in_segments`.

The definition (Mamba, https://arxiv.org/abs/2312.00752)
--------------------------------------------------------
u_t is the scalar token at step t. There are d channels and n states per channel; A = −exp(A_log).

    x_t            = silu(conv(in_x u)_t + conv_b)       [d]
    dt_t, B_t, C_t = x_proj x_t                          scalar, [n], [n]
    Δ_t            = softplus(dt_w dt_t + dt_b)          [d]
    h_t            = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t    [d, n], h_0 = 0
    Y_t            = h_t C_t + D x_t                     [d]
    y_t            = Σ_d out Y_t silu(in_z u_t)          scalar, the output

What `last` computes instead
----------------------------
Only h_L is needed, where L is the last token. If the recurrence is inserted into itself, h_L becomes a sum. Each term
decays by the steps Δ that follow it:

    h_L C_L = Σ_t Δ_t x_t Σ_n exp(A_n S_t) B_tn C_Ln,    S_t = Δ_{t+1} + … + Δ_L,    S_L = 0

The terms do not depend on each other, so they can be computed in any order. The backward pass needs the exponentials
of the forward pass. With E = exp(A_n S_t), q = E B_tn C_Ln, g = ∂y/∂(h_L C_L) and c_t = g Δ_t x_t:

    ∂/∂(B_tn C_Ln) += c_t E      ∂/∂A_n += c_t S_t q      ∂/∂S_t += c_t A_n q      ∂/∂(Δ_t x_t) += g Σ_n q
    ∂/∂Δ_s         += Σ_{t<s} ∂/∂S_t

The gradients of Δ, x, B and C then go back through softplus, the projections, silu and the convolution as usual.

What `tails` computes instead
-----------------------------
The recurrence as written above, token by token. A token is skipped if its effect on the state decays below float32's
resolution before the first wanted output. Each state starts at another token, because states forget at different rates.
selective_scan_cpu.cpp derives the backward pass.

What makes it fast
------------------
- No tensor of shape [tokens, d] or [tokens, n] goes through main memory, and no [tokens, d, n] exists.
- For its backward pass, `last` saves only the input and recomputes the rest. `tails` also saves one h per chunk of
  tokens.
- The cost is one exponential per token, channel and state in each direction. For `last` on a ResNet-20 at the paper's
  size (270,000 weights, L = 6, d = 100, n = 16) that is (L − 1) d n per weight, 2.2 billion in each direction. The CPU
  kernel replaces most of them by a short polynomial around a known exponential.
- The CPU kernel is compiled at first use, in a few seconds, for the vector instructions of the machine. `last` is
  compiled for each L, which unrolls its loops over tokens.

Two runs with equal numbers of threads give equal bits. `tails` gives equal bits for any number of threads.

The compiled CPU kernels are kept in ~/.cache/torch_extensions, or in the folder that the environment variable
TORCH_EXTENSIONS_DIR names. The compiler is the one that CXX names, else c++, g++ or clang++.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_TOKENS = 16  # of `last`, because its loops over tokens are unrolled
MOST_KEPT = 2**26  # elements of h that `tails` saves for its backward pass; if there are more, it recomputes them

SOURCE = Path(__file__).with_name("selective_scan_cpu.cpp")
COMPILER_FLAGS = ["-shared", "-fPIC", "-pthread", "-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno"]
VECTOR_FLAGS = {  # for what torch.backends.cpu.get_cpu_capability() returns
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


class _Params(ctypes.Structure):
    """The struct Params of selective_scan_cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("d", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("conv", "conv_b", "in_z", "xproj", "dt_w", "dt_b", "A2", "D", "out")),
    ]


class _Sequences(ctypes.Structure):
    """The struct Sequences of selective_scan_cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("length", "weights", "layers", "has_first")),
        *((name, ctypes.c_void_p) for name in ("sizes", "past", "first")),
    ]


@functools.cache
def library(tokens: int | None) -> ctypes.CDLL | str:
    """Load the CPU kernels, after compiling them if necessary.

    tokens: the sequence length for `last`; None for `tails`.
    If the kernels cannot be compiled, print one sentence that says why, and return it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    flags = COMPILER_FLAGS + VECTOR_FLAGS.get(capability, [])
    if tokens is not None:
        flags = [*flags, f"-DTOKENS={tokens}"]
    try:
        if not SOURCE.exists():
            raise RuntimeError(f"copy {SOURCE.name} next to selective_scan.py")
        built_from = repr([SOURCE.read_bytes(), flags, platform.system(), platform.machine()])
        name = f"selective_scan_cpu_{tokens or 'flat'}_{capability.lower()}_{_digest(built_from.encode())}"
        found = _find(name)
        if found is None:
            what = "the flat layout" if tokens is None else f"{tokens} tokens"
            print(f"compiling the fused selective scan for {what} and {capability}, once …", file=sys.stderr)
            found = _compile(name, flags)
    except (OSError, RuntimeError) as e:
        problem = f"the fused scan cannot be compiled: {e}"
        print(f"{problem}; the reference scan is many times slower", file=sys.stderr)
        return problem
    return found


def _cache() -> Path:
    """The folder of the compiled kernels."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if folder:
        return Path(folder).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch_extensions").absolute()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _find(name: str) -> ctypes.CDLL | None:
    """The library of that name in the cache, or None.

    A file's name ends with the digest of its content, so that a damaged file is never loaded.
    """
    for file in sorted(_cache().glob(f"{name}_*.so")):
        try:
            if file.stem == f"{name}_{_digest(file.read_bytes())}":
                return ctypes.CDLL(str(file))
        except OSError:  # not readable, or compiled for another system: compile it again
            continue
    return None


def _compile(name: str, flags: list[str]) -> ctypes.CDLL:
    """Compile SOURCE into the cache, and load it. Raises RuntimeError with the reason if that fails.

    The file gets its final name when it is complete. So several processes may compile at once, and each may be killed
    at any moment.
    """
    compiler, folder = _compiler(), _cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("selective_scan_build_*"):  # by a process that was killed while it compiled
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:
                    shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix="selective_scan_build_", dir=folder) as build:
            built = Path(build, "library.so")
            _run([*compiler, *flags, str(SOURCE), "-o", str(built)])
            file = folder / f"{name}_{_digest(built.read_bytes())}.so"
            os.replace(built, file)
        return ctypes.CDLL(str(file))
    except OSError as e:
        raise RuntimeError(
            f"the folder {folder} cannot be used ({e.strerror or e}); set the environment variable "
            "TORCH_EXTENSIONS_DIR to a folder where files can be written and loaded"
        ) from e


def _compiler() -> list[str]:
    """The command of the C++ compiler."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and not shutil.which(named[0]):
        raise RuntimeError(f"it needs a C++ compiler, and the one that CXX names, {named[0]}, is not found")
    found = next((command for command in ("c++", "g++", "clang++") if shutil.which(command)), None)
    if not named and not found:
        raise RuntimeError("it needs a C++ compiler; install g++ or clang++, or set CXX to the compiler's command")
    return named or [found]


def _run(command: list[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C"}  # messages in English
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    except OSError as e:
        raise RuntimeError(f"it needs a C++ compiler, and {command[0]} cannot be run ({e.strerror or e})") from e
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error:" in line or "failed" in line), lines[0]).strip()[:150]
        raise RuntimeError(
            f"it needs a C++ compiler that supports C++20 and vector extensions, and {command[0]} says: {reason}"
        )


def why_not(device: torch.device, dtype: torch.dtype, tokens: int | None) -> str | None:
    """Return None if the fused scan runs for such tensors, else one sentence that says why it does not.

    tokens: the sequence length, for `last`; None for `tails`.
    """
    if device.type not in ("cpu", "cuda") or dtype != torch.float32:
        return f"the fused scan is for float32 on a CPU or a CUDA GPU; this is {dtype} on {device}"
    if tokens is not None and tokens > MOST_TOKENS:
        return f"the fused scan is for histories of up to {MOST_TOKENS} tokens; these have {tokens}"
    if device.type == "cpu":
        found = library(tokens)
        return found if isinstance(found, str) else None
    try:
        import selective_scan_triton
    except Exception as e:  # whatever a broken or an old Triton raises
        if isinstance(e, ModuleNotFoundError) and e.name == "selective_scan_triton":
            return "the fused scan on a GPU needs selective_scan_triton.py: copy it next to selective_scan.py"
        return (
            "the fused scan on a GPU needs Triton 3.6 or newer, and selective_scan_triton.py cannot be imported "
            f"({type(e).__name__}: {e})"
        )
    return selective_scan_triton.why_not(device, dtype, tokens)


def last(u: Tensor, *parameters: Tensor, known: Tensor | None = None) -> Tensor:
    """Return SlowMamba's output at the last token of each sequence, differentiable in u and all parameters.

    u: [B, L] float32, B sequences of L tokens. Returns [B].
    known: [B], the result of an earlier call with the same arguments. It is then returned, with its graph.
    parameters: in_proj.weight [2d, 1], conv1d.weight [d, 1, k], conv1d.bias [d], x_proj.weight [1 + 2n, d],
        dt_proj.weight [d, 1], dt_proj.bias [d], A_log [d, n], D [d], out_proj.weight [1, d].
    Call it only if `why_not` returns None. Raises ValueError if a parameter has another dtype or device than u.
    """
    if u.is_cuda:
        import selective_scan_triton

        return selective_scan_triton.last(u, *parameters, known=known)
    return _Last.apply(u, known, *parameters)


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, known: Tensor | None, *parameters: Tensor) -> Tensor:
        u = u.T.contiguous()  # [L, B], the layout of FSG's history: vector lanes are neighbouring sequences
        ctx.save_for_backward(u, *parameters)
        if known is not None:
            return known.clone()
        y = u.new_empty(u.shape[1])
        _call_last("mamba_last_forward", parameters, u, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        u, *parameters = ctx.saved_tensors
        du, grads = torch.empty_like(u) if ctx.needs_input_grad[0] else None, _new_grads(parameters)
        _call_last("mamba_last_backward", parameters, u, grad.contiguous(), du, grads)
        return du if du is None else du.T, None, *_split_grads(grads, parameters)


def _call_last(function: str, parameters: tuple[Tensor, ...], u: Tensor, *tensors: Tensor) -> None:
    params, _owners = _params(parameters, u)
    run = getattr(library(u.shape[0]), function)
    run(ctypes.byref(params), ctypes.c_int64(u.shape[1]), *map(_pointer, (u, *tensors)), torch.get_num_threads())


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _params(parameters: tuple[Tensor, ...], *inputs: Tensor) -> tuple[_Params, tuple[Tensor, ...]]:
    """The parameters in the form for the kernels, and the tensors that own the memory. inputs: are checked too."""
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in (*parameters, *inputs)):
        raise ValueError("the fused scan needs its input and parameters in float32 and on one device")
    in_proj, conv, conv_b, x_proj, dt_w, dt_b, A_log, D, out = (p.detach().contiguous() for p in parameters)
    d, n = A_log.shape
    in_x, in_z = in_proj[:d], in_proj[d:]
    folded = conv[:, 0] * in_x  # [d, k]: in_x and the convolution in one, because a token is a scalar
    A2 = torch.exp(A_log) * -math.log2(math.e)  # exp(A S) = 2^(A2 S)
    owners = (folded, conv_b, in_z, x_proj.T.contiguous(), dt_w, dt_b, A2, D, out)
    return _Params(d, n, conv.shape[-1], *(tensor.data_ptr() for tensor in owners)), owners


def _new_grads(parameters: tuple[Tensor, ...]) -> Tensor:
    """Memory for the gradients of the fields of _Params, in their order: all parameters, but in_x is part of conv."""
    d = len(parameters[7])
    return parameters[0].new_empty(sum(p.numel() for p in parameters) - d)


def _split_grads(grads: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients of the parameters from those of the fields of _Params. The gradient of A2 is given as that of A."""
    in_proj, conv, _, x_proj, _, _, A_log, D, _ = parameters
    d = len(D)
    sizes = [conv.numel(), d, d, x_proj.numel(), d, d, A_log.numel(), d, d]
    folded, conv_b, in_z, x_proj, dt_w, dt_b, A, D, out = grads.split(sizes)
    in_x, folded = in_proj[:d], folded.view(d, -1)
    in_proj = torch.cat([(folded * conv[:, 0]).sum(1), in_z])
    A_log = A.view_as(A_log) * -torch.exp(A_log)
    found = (in_proj, folded * in_x, conv_b, x_proj.view(d, -1).T, dt_w, dt_b, A_log, D, out)
    return [g.reshape(p.shape) for g, p in zip(found, parameters, strict=True)]


def tails(past: Tensor, sizes: list[int], first: Tensor | None, *parameters: Tensor) -> Tensor:
    """Return SlowMamba's last outputs on one sequence per layer, differentiable in `first` and all parameters.

    past: [l, N] float32. Layer i has the next sizes[i] columns. Its sequence is [first[i],] its columns of past[0], of
        past[1], …, of past[l − 1].
    sizes: the number of weights of each layer, N together.
    first: [layers], or None.
    parameters: as for `last`.
    Returns [N]: for each layer, the outputs at the last sizes[i] tokens.
    Call it only if `why_not` returns None. Raises ValueError if the sizes do not add up to N, or if a parameter has
    another dtype or device than past. Saves up to MOST_KEPT elements for the backward pass.
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
        sizes = torch.tensor(sizes, device="cpu")
        inputs, threads = (past, sizes, first, parameters), torch.get_num_threads()
        plan = torch.empty(_call_tails("mamba_tails_plan_size", *inputs), dtype=torch.int32, device="cpu")
        elements = _call_tails("mamba_tails_plan", *inputs, _pointer(plan), threads)
        states = past.new_empty(elements) if keep and elements <= MOST_KEPT else None
        y = past.new_empty(past.shape[1])
        _call_tails("mamba_tails_forward", *inputs, *map(_pointer, (plan, states, y)), threads)
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
    params, _owners = _params(parameters, past, *(() if first is None else (first,)))
    pointers = (None if t is None else t.data_ptr() for t in (sizes, past, first))
    sequences = _Sequences(*past.shape, len(sizes), first is not None, *pointers)
    run = getattr(library(None), function)
    run.restype = ctypes.c_int64
    return run(ctypes.byref(params), ctypes.byref(sequences), *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Without the fused scan: these two ideas in plain PyTorch, for any device and data type.


def last_unrolled(u: Tensor, *parameters: Tensor) -> Tensor:
    """`last` without a kernel, for u [B, L, 1]: [B]. See "What `last` computes instead".

    The sequences run along the last axis (b), so that every operation is one long vector loop.
    """
    in_proj, conv, conv_b, x_proj, dt_w, dt_b, A_log, D, out = parameters
    (d, n), taps, u = A_log.shape, conv.shape[-1], u.squeeze(-1).T.contiguous()  # u [L, b]
    # A token is one scalar, so in_proj and the convolution are one matrix applied to the latest tokens.
    lags = F.pad(u, (0, 0, taps - 1, 0)).unfold(0, taps, 1).transpose(1, 2)  # [L, taps, b]
    x = F.silu(conv[:, 0] * in_proj[:d] @ lags + conv_b[:, None])  # [L, d, b]
    dt, B, C = (x_proj @ x).split([1, n, n], dim=1)  # [L, 1 | n | n, b]
    delta = F.softplus(dt_w * dt + dt_b[:, None])  # [L, d, b]
    A = -torch.exp(A_log).unsqueeze(-1)  # [d, n, 1]
    drive, BC = delta * x, B * C[-1]
    y = drive[-1] * BC[-1].sum(0)  # [d, b]; S_L = 0: no decay
    S = torch.zeros_like(y)
    for t in range(len(u) - 2, -1, -1):
        S = S + delta[t + 1]
        y = y + drive[t] * (torch.exp(A * S.unsqueeze(1)) * BC[t]).sum(1)  # the sum over n of [d, n, b]
    z = F.silu(in_proj[d:] * u[-1])  # [d, b]
    return (out @ ((y + D[:, None] * x[-1]) * z)).squeeze(0)


@torch.no_grad()
def first_needed(net, u: Tensor, position: int) -> int:
    """The first token of u [1, L, 1] that influences the outputs of `net`, a SlowMamba, from `position` on.

    Between two tokens the state decays by exp(A Σ Δ). The search walks back from `position`, with the actual Δ and A,
    until every state has decayed below the resolution of the data type, with a margin of e⁵.
    """
    slowest = torch.exp(net.A_log).amin(dim=1)  # [d]
    enough = 5 - math.log(torch.finfo(u.dtype).eps)
    gone = torch.zeros_like(slowest)
    while position > 0:
        block = max(0, position - 4096)
        context = max(0, block - net.d_conv + 1)  # what the convolution looks back to
        delta = net.project(u[:, context:position])[1][0, block - context :]  # [block, d]
        decayed = (gone + delta.flip(0).cumsum(0)) * slowest  # [block, d], latest token first
        enough_at = (decayed.amin(dim=1) > enough).nonzero()
        if len(enough_at):
            # The tokens before this one have no influence; the convolution's context is kept.
            return max(0, position - 1 - int(enough_at[0]) - net.d_conv + 1)
        gone, position = gone + delta.sum(0), block
    return 0


def in_segments(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, elements: int) -> Tensor:
    """hypernet.selective_scan_loop for long sequences: segment by segment, each a parallel prefix scan.

    elements: about how many the largest tensors may have.
    """
    tokens = elements // (16 * x.shape[0] * A.numel())
    return _Segments.apply(min(max(64, tokens), 4096), x, delta, B, C, A)  # in the cache, and long vector loops


def _segment(h: Tensor, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """One segment of T tokens: h [B, d, n] before it -> h after it, y [B, T, d].

    h_t = a_t h_{t−1} + b_t. Two steps combine to one: h_t = (a_t a_{t−1}) h_{t−2} + (a_t b_{t−1} + b_t). Doubling the
    stride log2(T) times reaches every earlier token.
    """
    a = torch.exp(delta.unsqueeze(-1) * A)  # [B, T, d, n]
    b = (delta * x).unsqueeze(-1) * B.unsqueeze(2)  # [B, T, d, n]
    b = torch.cat([b[:, :1] + a[:, :1] * h.unsqueeze(1), b[:, 1:]], dim=1)
    stride = 1
    while stride < x.shape[1]:
        b = torch.cat([b[:, :stride], torch.addcmul(b[:, stride:], a[:, stride:], b[:, :-stride])], dim=1)
        a = torch.cat([a[:, :stride], a[:, stride:] * a[:, :-stride]], dim=1)
        stride *= 2
    return b[:, -1], torch.einsum("btdn,btn->btd", b, C)


class _Segments(torch.autograd.Function):
    """Keeps the h before each segment, and computes everything else again in the backward pass."""

    @staticmethod
    def forward(ctx, tokens: int, *tensors: Tensor) -> Tensor:
        x, A = tensors[0], tensors[-1]
        h, y = x.new_zeros(-(-x.shape[1] // tokens), x.shape[0], *A.shape), torch.empty_like(x)
        for k in range(len(h)):
            at = slice(k * tokens, (k + 1) * tokens)
            after, y[:, at] = _segment(h[k], *(v[:, at] for v in tensors[:-1]), A)
            if k + 1 < len(h):
                h[k + 1] = after
        ctx.save_for_backward(h, *tensors)
        ctx.tokens = tokens
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        h, *tensors = ctx.saved_tensors
        grads, grad_h = [torch.zeros_like(v) for v in tensors], torch.zeros_like(h[0])
        for k in reversed(range(len(h))):
            at = slice(k * ctx.tokens, (k + 1) * ctx.tokens)
            inputs = [v.detach().requires_grad_() for v in (h[k], *(v[:, at] for v in tensors[:-1]), tensors[-1])]
            with torch.enable_grad():
                outputs = _segment(*inputs)
            grad_h, *parts, grad_A = torch.autograd.grad(outputs, inputs, (grad_h, grad[:, at]))
            for total, part in zip(grads[:-1], parts, strict=True):
                total[:, at] = part
            grads[-1] += grad_A
        return None, *grads
