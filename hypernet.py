"""Gradient generators for binary networks: FSG (fast and slow gradients, AAAI 2025) and the baselines of its paper.

Copy this file alone: it needs nothing but torch (with selective_scan.py, selective_scan_cpu.cpp and
selective_scan_triton.py beside it, Mamba is many times faster). Three lines turn a training loop into FSG's:

    fsg = FSG(layers)                       # layers: modules with a `.weight` and a `.quantizer` (models.binary_layers)
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()      # w.grad = ĝ, the gradient at the binary weight
        fsg.generate()                                         # w.grad = G, what the optimizer should use
        optimizer.step(), optimizer.zero_grad()                # any torch.optim optimizer

The problem. A binary weight Ŵ = sign(W̃), W̃ = A(W), has no useful derivative: the step function's is 0. The
straight-through estimator (STE) pretends that it is 1 and updates the latent weight W with D ⊙ ĝ, where
ĝ_t = ∂L/∂Ŵ is the gradient at the binary weight at step t and D = ∂Ŵ/∂W, as if there were no step, the
*calibration*. MetaQuant (NeurIPS 2019) and FSG (AAAI 2025) learn the missing factor: small *hypernetworks* with
parameters φ turn ĝ into G,

    fast_t = ĝ_t ⊙ MLP(W̃_t)                                  the fast-net sees the present
    slow_t = SlowNet(LRE(layer), ĝ_{t−l+1}, …, ĝ_t)           the slow-net sees each weight's own past
    G_t    = D_t ⊙ ((1 − β)·fast_t + β·slow_t)                what the optimizer gets

The last l gradients of every weight are the *historical gradient storage* (HGS). The *layer recognition embedding*
(LRE) is one learned number a layer, put in front of the history as its first token, that tells layers apart.
`FSG` is that. `GatedHistory` has two such terms in closed form, and trains better (README).

How φ learns. G_{t−1} moved the weights to where ĝ_t is measured, by −lr·G_{t−1} to first order, which changed the loss
by −lr·⟨D_t ⊙ ĝ_t, G_{t−1}⟩. So one step later the loss's gradient with respect to G_{t−1} is known, up to a factor:
v = −D_t ⊙ ĝ_t. It is sent back through the graph that made G_{t−1}, into φ alone. Nothing touches the main network's
graph: no second derivative, no functional copy of the model.

Everything per weight lives in flat tensors of length N, the number of binary weights, layer after layer.
"""

import itertools
import math
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import selective_scan  # the fused scan
except ImportError:
    selective_scan = None

# ---------------------------------------------------------------------------------------------------------------------
# Memory. N is 270,000 for a ResNet-20 and 11 million for a ResNet-18, and a slow-net of the paper's size makes 1,600
# numbers a token. So the nets below run chunk by chunk, keep none of a chunk's intermediate tensors, and compute them
# again in the backward pass: what fits the caches of a CPU at a time, or what keeps a GPU busy.
# (torch.utils.checkpoint, called in a loop, does the same, but what it keeps for each call lies scattered between the
# large freed blocks, and glibc's allocator then cannot reuse them: gigabytes of holes.)


def numbers_at_once(device: torch.device) -> int:
    """About how many numbers the largest tensors of a chunk may hold."""
    return 2**21 if device.type == "cpu" else 2**27


class _Chunked(torch.autograd.Function):
    """carry, out_k = function(carry, *chunk_k) for k = 0, 1, …; see `in_chunks`."""

    @staticmethod
    def forward(ctx, function, size, dim, count, carry, *tensors):
        # tensors: `count` inputs to be cut along `dim`, then the parameters that `function` uses.
        inputs, length = tensors[:count], tensors[0].shape[dim]
        starts, out = range(0, length, size), None
        carries = carry.new_empty(len(starts), *carry.shape)  # before each chunk
        for k, i in enumerate(starts):
            carries[k] = carry
            carry, part = function(carry, *(x.narrow(dim, i, min(size, length - i)) for x in inputs))
            if out is None:
                out = part.new_empty(*part.shape[:dim], length, *part.shape[dim + 1 :])
            out.narrow(dim, i, part.shape[dim]).copy_(part)
        ctx.save_for_backward(carries, *tensors)
        ctx.function, ctx.size, ctx.dim, ctx.count = function, size, dim, count
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        carries, *tensors = ctx.saved_tensors
        inputs, parameters = tensors[: ctx.count], tensors[ctx.count :]
        wanted = ctx.needs_input_grad[5:]
        length, grad_carry = inputs[0].shape[ctx.dim], torch.zeros_like(carries[0])
        grads = [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        for k in reversed(range(len(carries))):
            at = ctx.dim, k * ctx.size, min(ctx.size, length - k * ctx.size)
            chunk = [x.narrow(*at).detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=False)]
            carry = carries[k].detach().requires_grad_()
            with torch.enable_grad():
                outputs = ctx.function(carry, *chunk)
            sources = [t for t, w in zip([*chunk, *parameters], wanted, strict=True) if w]
            found = torch.autograd.grad(
                outputs, [carry, *sources], (grad_carry, grad.narrow(*at)), allow_unused=True, materialize_grads=True
            )
            grad_carry, found = found[0], iter(found[1:])
            for j, g in enumerate(grads):
                if g is not None:
                    (g.narrow(*at) if j < ctx.count else g).add_(next(found))
        return None, None, None, None, None, *grads


def in_chunks(function, size: int, parameters, *inputs: Tensor) -> Tensor:
    """torch.cat([function(*chunk) for each chunk of `size` rows of the inputs]), in the memory of one chunk.

    parameters: the tensors that `function` uses besides its arguments and that may want a gradient.
    """
    none = inputs[0].new_empty(0)
    step = lambda carry, *chunk: (carry, function(*chunk))
    return _Chunked.apply(step, max(1, size), 0, len(inputs), none, *inputs, *parameters)


# ---------------------------------------------------------------------------------------------------------------------
# The fast-net.


class FastNet(nn.Module):
    """The fast-net: a small MLP applied to every weight alone, 1 → hidden → … → 1.  forward(w [M]) -> [M].

    hidden: width. depth: number of linear layers (3 in FSG and MultiFC, 2 in FCGrad).
    act: 'none' (the released default), 'relu' or 'tanh', between the linear layers. bias: whether they have biases.

    Without biases and non-linearity the net is one number, c = W_3 W_2 W_1, times its input. With ReLU it is two, for
    its input's two signs, because relu(s·x) = s·relu(x) for s > 0. Both are computed that way, for the price of a
    multiplication per weight, with the gradients of the full net. Raises ValueError for an unknown `act`.
    """

    def __init__(self, hidden: int = 100, act: str = "none", bias: bool = False, depth: int = 3):
        super().__init__()
        if act not in ("none", "relu", "tanh"):
            raise ValueError(f"no fast-net non-linearity is called {act!r}: use none, relu or tanh")
        self.act = {"none": nn.Identity(), "relu": nn.ReLU(), "tanh": nn.Tanh()}[act]
        self.collapses = act != "tanh" and not bias
        widths = [1] + [hidden] * (depth - 1) + [1]
        self.register_buffer("ends", torch.tensor([1.0, -1.0]), persistent=False)
        self.linears = nn.ModuleList(nn.Linear(i, o, bias) for i, o in itertools.pairwise(widths))

    def features(self, x: Tensor) -> Tensor:
        """x [M, 1] -> the last hidden layer's activations [M, hidden]."""
        for linear in self.linears[:-1]:
            x = self.act(linear(x))
        return x

    def mlp(self, w: Tensor) -> Tensor:
        """The net as it is written down: w [M] -> [M]."""
        return self.linears[-1](self.features(w.unsqueeze(1))).squeeze(1)

    def forward(self, w: Tensor) -> Tensor:
        if not self.collapses:
            return in_chunks(self.mlp, numbers_at_once(w.device) // self.linears[0].out_features, self.parameters(), w)
        # f(w) = w · f(1) for w > 0 and w · (−f(−1)) for w < 0; without the ReLU both factors are the same.
        at_ends = self.mlp(self.ends)
        if isinstance(self.act, nn.Identity):
            return at_ends[0] * w
        return torch.where(w > 0, at_ends[0], -at_ends[1]) * w

    @torch.no_grad()
    def start_at(self, points: dict[float, float]) -> None:
        """Choose the last layer so that the net maps each key to its value (the smallest such weights).

        Where the hidden layers do not allow it (few ReLUs can all be off), they are drawn again. Raises ValueError when
        that does not help.
        """
        last = self.linears[-1]
        x = last.weight.new_tensor(list(points)).unsqueeze(1)
        y = last.weight.new_tensor(list(points.values())).unsqueeze(1)
        target = y if last.bias is None else y - last.bias
        for _ in range(100):
            last.weight.copy_((torch.linalg.pinv(self.features(x)) @ target).T)
            if torch.allclose(self.mlp(x.squeeze(1)), y.squeeze(1), rtol=0.2, atol=0):
                return
            for linear in self.linears[:-1]:
                linear.reset_parameters()
        raise ValueError(f"a fast-net of width {last.in_features} cannot start as STE: make it wider (--hidden)")


# ---------------------------------------------------------------------------------------------------------------------
# The slow-nets. A sequence is a weight's history: u [B, L, 1], B weights, L tokens, one number a token.


class SlowLSTM(nn.Module):
    """The slow-net as an LSTM: nn.LSTM(1, hidden), then a linear layer hidden → 1, which starts at 0.

    (A random one would add a constant of the gradient's own size and of random sign to every weight's update. Mamba's
    first outputs are a few percent of its input's size.)
    """

    def __init__(self, hidden: int = 100):
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, u: Tensor) -> Tensor:
        """u [B, L, 1] -> [B, L, 1], one output a token."""
        return self.out(self.lstm(u)[0])

    def last(self, u: Tensor) -> Tensor:
        """u [B, L, 1] -> [B]: `forward(u)[:, -1, 0]`, chunk by chunk."""
        numbers = 16 * self.lstm.hidden_size * u.shape[1]  # a sequence's gates and states, and their gradients
        return in_chunks(self._last, numbers_at_once(u.device) // numbers, self.parameters(), u)

    def _last(self, u: Tensor) -> Tensor:
        _, (h, _) = self.lstm(u)  # h [1, B, hidden], the hidden state after the last token
        return self.out(h[0]).squeeze(1)


def mamba_ssm_scan():
    """The mamba-ssm package's CUDA selective scan, or None where the package (or its CUDA extension) is missing."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


class SlowMamba(nn.Module):
    """The slow-net as one Mamba block (Gu & Dao, 2023) on scalar tokens: d_model 1, d_inner = expand, dt_rank 1.

    d_state: numbers of state a channel (n below); d_conv: taps of the causal convolution; expand: channels (d below).
    Names, shapes and initialisation of the parameters are those of `mamba_ssm.Mamba`; state dicts interchange.
    scan: 'reference' is plain PyTorch; 'fused' is selective_scan.py's kernels in float32, for `last` and `tails`, on a
    CPU or a GPU (`forward` and `tail` then take the reference); 'mamba-ssm' calls that package's CUDA kernel; 'auto'
    takes the first of fused, mamba-ssm, reference that runs.
    Raises ValueError for another name, and RuntimeError, when called, where the one that was asked for cannot run.

    The block, token by token (t), with u_t its scalar input; ⊙ is per channel:
        x_t, z_t    = in_proj u_t                                       [d], [d]
        x_t         ← silu(Σ_k conv_k ⊙ x_{t−k} + conv_bias)            causal, depthwise
        dt, B_t, C_t = x_proj x_t                                       [1], [n], [n]
        Δ_t         = softplus(dt_proj dt + dt_bias)                    [d], the step size: what to remember
        h_t         = exp(Δ_t A) ⊙ h_{t−1} + Δ_t x_t B_tᵀ               [d, n], the state; A = −exp(A_log)
        y_t         = (h_t C_t + D ⊙ x_t) ⊙ silu(z_t)                   [d]
        output      = out_proj y_t                                      scalar
    """

    def __init__(self, d_state: int = 16, d_conv: int = 8, expand: int = 100, scan: str = "auto"):
        super().__init__()
        if scan not in ("auto", "fused", "mamba-ssm", "reference"):
            raise ValueError(f"no scan is called {scan!r}: use auto, fused, mamba-ssm or reference")
        self.scan, self.d_state, self.d_conv, self.d_inner = scan, d_state, d_conv, expand
        self.in_proj = nn.Linear(1, 2 * expand, bias=False)
        self.conv1d = nn.Conv1d(expand, expand, d_conv, groups=expand, padding=d_conv - 1)
        self.x_proj = nn.Linear(expand, 1 + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(1, expand)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(expand, 1))  # A = −1 … −n
        self.D = nn.Parameter(torch.ones(expand))
        self.out_proj = nn.Linear(expand, 1, bias=False)
        # Mamba's initial step sizes: softplus(dt_bias) log-uniform in [1e-3, 1e-1], through softplus's inverse.
        nn.init.uniform_(self.dt_proj.weight, -1.0, 1.0)
        with torch.no_grad():
            dt = torch.exp(torch.rand(expand) * math.log(0.1 / 1e-3) + math.log(1e-3)).clamp_min(1e-4)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def backend(self, device: torch.device | str, dtype: torch.dtype = torch.float32, tokens: int | None = None) -> str:
        """The scan that runs for such tensors: 'fused', 'mamba-ssm' or 'reference'.

        tokens: their number, where only the last output is wanted (`last`: per-weight histories); None for `tails`.
        """
        device = torch.device(device)
        if self.scan in ("auto", "fused"):
            problem = self.why_not_fused(device, dtype, tokens)
            if problem is None:
                return "fused"
            if self.scan == "fused":
                raise RuntimeError(problem)
        return self.unfused_backend(device)

    @staticmethod
    def why_not_fused(device: torch.device, dtype: torch.dtype, tokens: int | None) -> str | None:
        """None where the fused scan runs for such tensors, else one sentence that says why it does not."""
        if selective_scan is None:
            return "the fused scan needs selective_scan.py and its kernels beside hypernet.py"
        return selective_scan.why_not(device, dtype, tokens)

    def unfused_backend(self, device: torch.device) -> str:
        """The scan that gives all outputs there: 'mamba-ssm' or 'reference'."""
        if self.scan == "mamba-ssm":
            if mamba_ssm_scan() is None:
                raise RuntimeError(
                    "--scan mamba-ssm needs the mamba-ssm package with its CUDA extension: install it on a CUDA "
                    "machine with `pip install --no-build-isolation -r requirements-cuda.txt`, or use --scan auto"
                )
            if device.type != "cuda":
                raise RuntimeError(
                    "--scan mamba-ssm runs on CUDA devices only: use one (--device cuda), or --scan auto"
                )
        wanted = self.scan in ("auto", "mamba-ssm") and device.type == "cuda"
        return "mamba-ssm" if wanted and mamba_ssm_scan() else "reference"

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that the recurrence needs: u [B, L, 1] -> x [B, L, d], Δ [B, L, d], B [B, L, n], C [B, L, n]."""
        length = u.shape[1]
        x = F.linear(u, self.in_proj.weight[: self.d_inner])  # [B, L, d]
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :length]).transpose(1, 2)  # cut what looks ahead
        dt, B, C = self.x_proj(x).split([1, self.d_state, self.d_state], dim=-1)
        return x, F.softplus(self.dt_proj(dt)), B, C

    def gate(self, y: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """(h C + D x) silu(z), then out_proj: y = h C [..., d], x [..., d], u [..., 1] -> [..., 1]."""
        z = F.linear(u, self.in_proj.weight[self.d_inner :])
        return self.out_proj((y + self.D * x) * F.silu(z))

    # -- the last output of many short sequences: FSG's per-weight layout ---------------------------------------------

    def last(self, u: Tensor) -> Tensor:
        """u [B, L, 1] -> [B]: `forward(u)[:, -1, 0]`, chunk by chunk, computing that output alone."""
        per_sequence = u.shape[1] * self.d_inner * self.d_state
        backend = self.backend(u.device, u.dtype, u.shape[1])
        if backend == "fused":
            return selective_scan.last(u.squeeze(-1), *self._in_order())
        if backend == "mamba-ssm":
            function = lambda u: self._forward(u)[:, -1, 0]
            return in_chunks(function, numbers_at_once(u.device) // per_sequence, self.parameters(), u)
        return in_chunks(self._last, numbers_at_once(u.device) // per_sequence, self.parameters(), u)

    def _in_order(self) -> tuple[Tensor, ...]:
        """The parameters, in selective_scan's order."""
        conv, x_proj, dt_proj = self.conv1d, self.x_proj, self.dt_proj
        first = (self.in_proj.weight, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias)
        return *first, self.A_log, self.D, self.out_proj.weight

    def _last(self, u: Tensor) -> Tensor:
        # Here the sequences run along the last axis, c, so that every operation is one long vector loop.
        d, u = self.d_inner, u.squeeze(-1).T.contiguous()  # u [L, c]
        # in_proj and the convolution are one matrix on the d_conv latest tokens, because a token is one number.
        lags = F.pad(u, (0, 0, self.d_conv - 1, 0)).unfold(0, self.d_conv, 1).transpose(1, 2)  # [L, d_conv, c]
        x = F.silu(self.conv1d.weight[:, 0] * self.in_proj.weight[:d] @ lags + self.conv1d.bias[:, None])  # [L, d, c]
        dt, B, C = (self.x_proj.weight @ x).split([1, self.d_state, self.d_state], dim=1)  # [L, 1 | n | n, c]
        delta = F.softplus(self.dt_proj.weight * dt + self.dt_proj.bias[:, None])  # [L, d, c]
        A = -torch.exp(self.A_log).unsqueeze(-1)  # [d, n, 1]
        # Unrolled, the last output needs no recurrence. Token t's contribution to h_L decays by Δ_{t+1} + … + Δ_L:
        #     h_L C_L = Σ_t Δ_t x_t Σ_n exp(A_n S_t) B_tn C_Ln   with   S_t = Σ_{s>t} Δ_s
        drive, BC = delta * x, B * C[-1]
        y = drive[-1] * BC[-1].sum(0)  # [d, c]; S_L = 0: no decay
        S = torch.zeros_like(y)
        for t in range(len(u) - 2, -1, -1):
            S = S + delta[t + 1]
            y = y + drive[t] * (torch.exp(A * S.unsqueeze(1)) * BC[t]).sum(1)  # Σ over n of [d, n, c]
        z = F.silu(self.in_proj.weight[d:] * u[-1])  # [d, c]
        return (self.out_proj.weight @ ((y + self.D[:, None] * x[-1]) * z)).squeeze(0)

    # -- all outputs, and the last ones of one long sequence: FSG's flat layout ---------------------------------------

    def forward(self, u: Tensor) -> Tensor:
        """u [B, L, 1] -> [B, L, 1]."""
        rows = numbers_at_once(u.device) // (min(u.shape[1], 64) * self.d_inner * self.d_state)
        return in_chunks(self._forward, rows, self.parameters(), u) if u.shape[0] > max(1, rows) else self._forward(u)

    def tails(self, past: Tensor, sizes: list[int], first: Tensor | None) -> Tensor:
        """past [l, N] -> [N]: its columns are layers, `sizes` of them together, and each layer is one sequence,
        [first_i (where there is first [layers]), its part of past[0], …, of past[l − 1]]; the block's last n_i outputs.
        """
        if self.backend(past.device, past.dtype, None) == "fused":
            return selective_scan.tails(past, sizes, first, *self._in_order())
        found = []
        for i, part in enumerate(past.split(sizes, dim=1)):  # [l, n]
            u = part.reshape(1, -1, 1)
            if first is not None:
                u = torch.cat([first[i].view(1, 1, 1), u], dim=1)
            found.append(self.tail(u, part.shape[1]))
        return torch.cat(found)

    def tail(self, u: Tensor, count: int) -> Tensor:
        """The last `count` outputs of one sequence: u [1, L, 1] -> [count], `forward(u)[0, -count:, 0]`.

        Tokens whose influence has decayed below the floating-point resolution when the first of these outputs is due
        are not scanned.
        """
        start = self.first_needed(u, u.shape[1] - count)
        # One chunk, so that no tensor [L, d] is kept for the backward pass.
        return in_chunks(lambda u: self._forward(u)[:, -count:, 0], 1, self.parameters(), u[:, start:])[0]

    @torch.no_grad()
    def first_needed(self, u: Tensor, position: int) -> int:
        """The first token of u [1, L, 1] that the outputs from `position` on can feel, for the actual Δ and A.

        Between tokens s and t the state decays by exp(A Σ Δ). Walks back from `position`, block by block, until every
        state has decayed below the resolution of the data type (with a margin of e⁵).
        """
        slowest = torch.exp(self.A_log).amin(dim=1)  # [d]
        enough = 5 - math.log(torch.finfo(u.dtype).eps)
        gone = torch.zeros_like(slowest)
        while position > 0:
            block = max(0, position - 4096)
            context = max(0, block - self.d_conv + 1)  # what the convolution looks back to
            delta = self.project(u[:, context:position])[1][0, block - context :]  # [block, d]
            decayed = (gone + delta.flip(0).cumsum(0)) * slowest  # [block, d], latest token first
            enough_at = (decayed.amin(dim=1) > enough).nonzero()
            if len(enough_at):
                # The tokens before this one are not felt; the convolution's context goes with it.
                return max(0, position - 1 - int(enough_at[0]) - self.d_conv + 1)
            gone, position = gone + delta.sum(0), block
        return 0

    def _forward(self, u: Tensor) -> Tensor:
        x, delta, B, C = self.project(u)
        if self.unfused_backend(u.device) == "mamba-ssm":
            # The kernel wants the time axis last: [B, d, L] and [B, n, L].
            x_, delta_, B_, C_ = (v.transpose(1, 2).contiguous() for v in (x, delta, B, C))
            y = mamba_ssm_scan()(x_, delta_, -torch.exp(self.A_log), B_, C_, delta_softplus=False).transpose(1, 2)
        else:
            # Segment by segment, handing on the state h: small enough for the cache, long enough for vector loops.
            tokens = numbers_at_once(u.device) // (16 * u.shape[0] * self.d_inner * self.d_state)
            tokens = min(max(64, tokens), 4096)
            h = u.new_zeros(u.shape[0], self.d_inner, self.d_state)
            y = _Chunked.apply(self._segment, tokens, 1, 4, h, x, delta, B, C, self.A_log)
        return self.gate(y, x, u)

    def _segment(self, h: Tensor, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """h_t = a_t h_{t−1} + b_t for T tokens at once: h [B, d, n] before them -> h after them, h C [B, T, d].

        Two steps make one: h_t = (a_t a_{t−1}) h_{t−2} + (a_t b_{t−1} + b_t). Doubling the stride log2(T) times
        reaches every earlier token (a parallel prefix scan).
        """
        a = torch.exp(delta.unsqueeze(-1) * -torch.exp(self.A_log))  # [B, T, d, n]
        b = (delta * x).unsqueeze(-1) * B.unsqueeze(2)  # [B, T, d, n]
        b = torch.cat([b[:, :1] + a[:, :1] * h.unsqueeze(1), b[:, 1:]], dim=1)
        stride = 1
        while stride < x.shape[1]:
            b = torch.cat([b[:, :stride], torch.addcmul(b[:, stride:], a[:, stride:], b[:, :-stride])], dim=1)
            a = torch.cat([a[:, :stride], a[:, stride:] * a[:, :-stride]], dim=1)
            stride *= 2
        return b[:, -1], torch.einsum("btdn,btn->btd", b, C)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient generators. All have generate(), which turns every `w.grad` from ĝ into G, and state_dict / load_state_dict,
# which hold all that the next generate() depends on.


class Generator(nn.Module):
    """What the generators share: flat copies of W and ĝ, the calibration D, and handing G back.

    layers: modules with a `.weight` (the latent weight, on its final device) and a `.quantizer` ('dorefa', 'bwn' or
    'bwn-f'; one kind for all). Raises ValueError when there is none, or for another kind.

    Several processes (torch.distributed, as DistributedDataParallel uses it): each is given 1/K of the N weights, in
    all that is flat below N stands for that part, and what the processes made is gathered into G. Every process calls
    generate() and state_dict(). The latter, the same in all, is of all weights: any number of processes can load it.
    """

    keeps_latent = False  # whether the last step's weights are state, part of a checkpoint
    # Buffers that processes have parts of; along which axis.
    SHARED: ClassVar = {"latent": 0, "past": 0, "history": 1, "state": 1}

    def __init__(self, layers: list[nn.Module], shared: bool = False, whole_layers: bool = False):
        super().__init__()
        kinds = sorted({layer.quantizer for layer in layers})
        if not layers:
            raise ValueError("there is no binary layer to generate gradients for: binarize_() the model first")
        if len(kinds) > 1 or kinds[0] not in ("dorefa", "bwn", "bwn-f"):
            raise ValueError(f"all layers must share one quantizer, dorefa, bwn or bwn-f; they have {', '.join(kinds)}")
        self.kind = kinds[0]
        self.weights = [layer.weight for layer in layers]  # a plain list: they are the model's parameters, not ours
        like = self.weights[0].detach()
        count = [w.numel() for w in self.weights]
        # This process's part is [begin, end) of all weights, laid end to end; sizes are the layers' parts of it.
        self.processes = dist.get_world_size() if shared and dist.is_available() and dist.is_initialized() else 1
        self.cuts = shares(count, self.processes, whole_layers)
        self.begin, self.end = self.cuts[dist.get_rank() if self.processes > 1 else 0]
        ends = itertools.accumulate(count, initial=0)
        self.sizes = [max(0, min(b, self.end) - max(a, self.begin)) for a, b in itertools.pairwise(ends)]
        n, sizes = self.end - self.begin, torch.tensor(self.sizes, device=like.device)
        self.register_buffer("layer_of", torch.arange(len(layers), device=like.device).repeat_interleave(sizes), False)
        self.register_buffer("layer_size", torch.tensor(count, device=like.device), False)  # of the whole layers
        self.register_buffer("ghat", like.new_zeros(n), False)
        self.register_buffer("G", like.new_zeros(sum(count)), False)  # of all weights
        self.register_buffer("latent", like.new_zeros(n), self.keeps_latent)
        self.register_buffer("top", like.new_zeros(len(layers)), self.keeps_latent)  # max|W| of each layer
        self._make_views()

    def _make_views(self) -> None:
        """Windows into the flat buffer with each weight's shape: copying in and out is one call for all layers."""
        parts = self.G.split([w.numel() for w in self.weights])
        self._G_views = [part.as_strided(w.shape, w.stride()) for part, w in zip(parts, self.weights, strict=True)]

    def _apply(self, fn, recurse=True):  # .to(), .double(): the buffers are new ones, so are their windows
        super()._apply(fn, recurse)
        self._make_views()
        return self

    def calibrate(self) -> tuple[Tensor, Tensor]:
        """D and W̃ of the flat latent weights, [N] each: quantizers.calibration and pre_quantize, all layers at once."""
        if self.kind != "dorefa":
            return torch.ones_like(self.latent), self.latent.clone()
        top = self.top.tanh()  # tanh is monotonic: max|tanh W| = tanh(max|W|)
        top = top.clamp_min(torch.finfo(top.dtype).tiny)[self.layer_of]  # [N]
        t = torch.tanh(self.latent)
        return (1 - t.square()) / top, t / (2 * top) + 0.5

    @torch.no_grad()
    def collect(self) -> None:
        """Copy every layer's gradient ĝ and latent weight W into the flat buffers."""
        grads = [w.grad for w in self.weights]
        if any(g is None for g in grads):
            missing = next(i for i, g in enumerate(grads) if g is None)
            raise RuntimeError(f"binary layer {missing} has no gradient: call loss.backward() before generate()")
        self._flatten(grads, self.ghat)
        self.collect_weights()

    @torch.no_grad()
    def collect_weights(self) -> None:
        self._flatten(self.weights, self.latent)
        # The largest |W| of a layer is its ∞-norm.
        self.top.copy_(torch.stack(torch._foreach_norm([w.detach() for w in self.weights], math.inf)))

    def _flatten(self, tensors: list[Tensor], out: Tensor) -> None:
        torch._foreach_copy_(self._G_views, tensors)  # G is free until the new one is made
        out.copy_(self.G[self.begin : self.end])

    def hand_back(self) -> None:
        """Let every `w.grad` be its window of the flat buffer G."""
        for w, view in zip(self.weights, self._G_views, strict=True):
            w.grad = view

    @torch.no_grad()
    def measure(self, lr: float) -> dict[str, float]:
        """What the last step did, to be called after optimizer.step() with its learning rate, now and then: training
        does not depend on it. Every process calls it.

        cosine: between G and D ⊙ ĝ, the straight-through gradient. step: mean |ΔW| / lr. Where G has two terms (see
        `terms`), fast_rms and slow_rms: the RMS of each; slow_share: the slow one's share of their energy,
        Σ slow² / Σ (slow² + fast²).
        """
        straight, G, now = self.calibrate()[0] * self.ghat, self.G.clone(), torch.empty_like(self.latent)
        self._flatten(self.weights, now)
        self.G.copy_(G)
        G, change = G[self.begin : self.end], now - self.latent
        sums = [(G * straight).sum(), G.square().sum(), straight.square().sum(), change.abs().sum()]
        sums += [term.square().sum() for term in self.terms()]
        dot, ours, theirs, moved, *energy = self.total(torch.stack(sums)).tolist()
        n = len(self.G)
        found = {"cosine": dot / max(math.sqrt(ours * theirs), 1e-300), "step": moved / (n * max(lr, 1e-300))}
        if energy:
            fast, slow = energy
            found |= {"fast_rms": math.sqrt(fast / n), "slow_rms": math.sqrt(slow / n)}
            found["slow_share"] = slow / max(fast + slow, 1e-300)
        return found

    def terms(self) -> tuple[Tensor, ...]:
        """The fast and the slow term of G, [N] each with all that they are multiplied by; () where G is one term."""
        return ()

    # -- several processes ---------------------------------------------------------------------------------------------

    def gather(self, part: Tensor) -> None:
        """G <- the processes' parts [N] of it."""
        self.G[self.begin : self.end] = part
        if self.processes > 1:
            work = [dist.broadcast(self.G[a:b], rank, async_op=True) for rank, (a, b) in enumerate(self.cuts)]
            for one in work:
                one.wait()

    def total(self, part: Tensor) -> Tensor:
        """The sum of the processes' tensors, in place."""
        if self.processes > 1:
            dist.all_reduce(part)
        return part

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.processes > 1:
            for name, dim in self.SHARED.items():
                if prefix + name in destination:
                    destination[prefix + name] = self._whole(destination[prefix + name], dim)

    def _whole(self, part: Tensor, dim: int) -> Tensor:
        pieces = []
        for rank, (a, b) in enumerate(self.cuts):
            shape = [*part.shape[:dim], b - a, *part.shape[dim + 1 :]]
            pieces.append(part.contiguous() if a == self.begin else part.new_empty(shape))
            dist.broadcast(pieces[-1], rank)
        return torch.cat(pieces, dim)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = dict(state_dict)
        for name, dim in self.SHARED.items():
            if self.processes > 1 and prefix + name in own:
                own[prefix + name] = own[prefix + name].narrow(dim, self.begin, self.end - self.begin)
        super()._load_from_state_dict(own, prefix, *args)


def shares(sizes: list[int], processes: int, whole_layers: bool) -> list[tuple[int, int]]:
    """[begin, end) of each process's part of layers with so many weights, about equal; whole_layers: of none a half.

    Raises ValueError where a process would get nothing.
    """
    total = sum(sizes)
    cuts = [total * rank // processes for rank in range(processes + 1)]
    if whole_layers:
        ends = [0, *itertools.accumulate(sizes)]
        cuts = [min(ends, key=lambda end, cut=cut: abs(end - cut)) for cut in cuts]
    if len(set(cuts)) <= processes:
        raise ValueError(
            f"{len(sizes)} layers of {total} weights cannot be shared by {processes} processes: use fewer of them"
            + (", or --history per-weight" if whole_layers else "")
        )
    return list(itertools.pairwise(cuts))


class STE(Generator):
    """The straight-through estimator: G = D ⊙ ĝ. Nothing is learned."""

    def generate(self) -> None:
        """`weight.grad` ← D ⊙ ĝ for every layer."""
        self.collect()
        self.gather(self.calibrate()[0] * self.ghat)
        self.hand_back()


class GatedHistory(Generator):
    """Fast and slow gradients without networks, of the present and of the past since the weight's last flip.

        G    = D ⊙ (fast + slow)
        h_t  = ĝ_t + λ·[sign W_t = sign W_{t−1}]·h_{t−1}      the history; a flip (a change of sign) shuts the gate
        fast = ĝ_t / (ε + r)                                  r = |W| / RMS(W), the RMS over the weight's layer
        slow = (h_t − ĝ_t) / (ε + r)

    *Near the threshold a weight leaps.* r is how far a weight is from W = 0, where its sign changes. With 1 / (ε + r)
    one that comes close leaps to the other side instead of trembling about the threshold. (Adam divides out what scales
    a weight's gradient for good; what counts is that the factor grows as a weight comes near.)
    *A flip forgets.* Averaging over past gradients cancels noise. But those from before a flip were measured at the
    weight's other sign: carried on, they push it further the way that they pushed it across, before anything has been
    measured on this side. h is the smallest selective state space there is, one state a weight, whose decay is λ or, at
    a flip, 0. It is momentum enough: use it with an optimizer that has none of its own (Adam with β₁ = 0).
    (That the history helps, and the leap, is measured over seeds; how much the forgetting does, is not. See README.)

    λ and ε were found by comparing whole training runs (README). FSG's objective would not find them. It asks whether
    G_{t−1} lowers the loss at the very next step, and so prefers small or even reversed steps where noise and curvature
    make successive gradients *anti*-correlated (short-horizon bias; Wu et al., ICLR 2018).

    layers: as everywhere. memory: λ in [0, 1); 0 is no history. epsilon: ε > 0.
    Raises ValueError for others. Memory: about 11 N numbers, 6 N of them between the steps.
    """

    keeps_latent = True

    def __init__(self, layers: list[nn.Module], memory: float = 0.8, epsilon: float = 0.35):
        if not 0 <= memory < 1 or not epsilon > 0:
            raise ValueError(f"memory must be at least 0 and below 1, epsilon above 0; they are {memory} and {epsilon}")
        super().__init__(layers, shared=True)
        self.memory, self.epsilon = memory, epsilon
        self.register_buffer("past", torch.zeros_like(self.latent))  # h_t

    @torch.no_grad()
    def generate(self) -> None:
        """`weight.grad` ← G for every layer."""
        positive = self.latent >= 0  # one step ago; sign(0) is +1
        self.collect()
        self.past.mul_((self.latent >= 0) == positive).mul_(self.memory).add_(self.ghat)
        self.gather(self.scale() * self.past)
        self.hand_back()

    def scale(self) -> Tensor:
        """D / (ε + r): [N]. The threshold is W = 0 under all quantizers."""
        norms = torch.stack(torch._foreach_norm(self.latent.split(self.sizes)))
        rms = (self.total(norms.square()) / self.layer_size).sqrt().clamp_min(torch.finfo(norms.dtype).tiny)
        return self.calibrate()[0] / (self.epsilon + self.latent.abs() / rms[self.layer_of])

    def terms(self) -> tuple[Tensor, ...]:
        scale = self.scale()
        return scale * self.ghat, scale * (self.past - self.ghat)


class Learned(Generator):
    """A generator with hypernetworks φ: the ring buffer of past gradients (HGS) and the training of φ.

    A subclass has φ's learning rate `lr` (or `parameter_groups()` of its own) and `transform(D, W̃)` -> G with its
    graph, a function of the buffers alone, so that after loading a checkpoint the last step's graph can be built again.
    """

    keeps_latent = True  # to build the last step's graph again

    def __init__(self, layers: list[nn.Module], length: int = 1, whole_layers: bool = False):
        if length < 1:
            raise ValueError(f"length, the number of gradients in the history, must be at least 1; it is {length}")
        super().__init__(layers, shared=True, whole_layers=whole_layers)
        self.length, self.t = length, 0  # t counts generate() calls
        self.register_buffer("history", self.latent.new_zeros(length, len(self.latent)))  # slot t % length: ĝ_t
        self._graph = None  # G_{t−1}, or the part of it that φ is trained on, with the graph that made it
        self._chosen = None  # which part: weights' indices [M], or None for all of them; _upscale: their N / M
        self._make_views()
        self.register_load_state_dict_post_hook(lambda self, _: self._rebuild())

    def _apply(self, fn, recurse=True):
        if self.t:
            raise RuntimeError(
                "move a gradient generator before its first generate(), or load its state into a new one"
            )
        return super()._apply(fn, recurse)

    def start(self) -> None:
        """The subclass has made its nets: move them to the weights' device and make φ's optimizer."""
        self.to(device=self.latent.device, dtype=self.latent.dtype)
        if self.processes > 1:
            for p in self.parameters():
                dist.broadcast(p.detach(), 0)
        self.optimizer = torch.optim.Adam(self.parameter_groups())

    def parameter_groups(self) -> list[dict]:
        """φ for Adam: all of it at one rate, unless a subclass knows better."""
        return [{"params": list(self.parameters()), "lr": self.lr}]

    @property
    def newest(self) -> Tensor:
        """ĝ_t, the gradient stored last: [N]."""
        return self.history[(self.t - 1) % self.length]

    def train_phi(self, D: Tensor) -> None:
        """One Adam step on φ for G_{t−1}, from the cotangent v = −D_t ⊙ ĝ_t (module docstring, "How φ learns").

        Adam does not care for the scale of v, but its eps does, so v is normalised.
        """
        v = -D * self.ghat
        v /= self.total(v.square().sum()).sqrt().clamp_min(torch.finfo(v.dtype).tiny)
        if self._chosen is not None:
            v = v[self._chosen] * self._upscale
        self.optimizer.zero_grad()
        self._graph.backward(v)
        if self.processes > 1:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            whole = self.total(torch.cat([g.flatten() for g in grads])).split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [g.view_as(old) for g, old in zip(whole, grads, strict=True)])
        self.optimizer.step()
        self._graph = None

    def store(self) -> None:
        """Push ĝ_t into the history, over the oldest gradient."""
        self.history[self.t % self.length].copy_(self.ghat)
        self.t += 1

    @torch.no_grad()
    def generate(self) -> None:
        """Train φ on the last step's G, store ĝ, and set every `weight.grad` to the new G."""
        self.collect()
        D, pre = self.calibrate()
        if self._graph is not None:
            self.train_phi(D)
        self.store()
        self.gather(D * self.ghat if self.t == 1 else self.build(D, pre))  # the very first step is plain STE
        self.hand_back()

    def build(self, D: Tensor, pre: Tensor) -> Tensor:
        """G_t; the graph that made it is kept for the next step."""
        with torch.enable_grad():
            self._graph = self.transform(D, pre)
        return self._graph.detach()

    def _rebuild(self) -> None:
        self._graph = None
        if self.t > 1:
            self.build(*self.calibrate())

    def get_extra_state(self) -> dict:
        return {"t": self.t, "optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict) -> None:
        self.t = state["t"]
        self.optimizer.load_state_dict(state["optimizer"])


# Where the MLP of W̃ starts: at 1 for the mean of W̃, so that training begins as STE does. The linear and the ReLU net
# are c·W̃; under dorefa W̃ averages ½, hence c = 2.
def start_as_ste(net: FastNet, kind: str) -> None:
    net.start_at({0.5: 1.0} if kind == "dorefa" else {-0.1: 1.0, 0.0: 1.0, 0.1: 1.0})


def fast_net(kind: str, hidden: int, act: str | None) -> FastNet:
    """The MLP of W̃ for a quantizer. Under bwn W̃ = W is signed and centred at 0, where a net without biases would
    vanish, with the wrong sign on one side; so there the default has biases and a tanh."""
    if kind == "dorefa":
        return FastNet(hidden, act or "none")
    return FastNet(hidden, act or "tanh", bias=True)


class MultiFC(Learned):
    """MetaQuant's MultiFC (NeurIPS 2019): G = D ⊙ ĝ ⊙ MLP(W̃), the MLP 1 → hidden → hidden → 1.

    hidden, act: see FastNet (act None: none under dorefa, tanh under bwn). lr: Adam's learning rate for φ.
    """

    def __init__(self, layers: list[nn.Module], hidden: int = 100, act: str | None = None, lr: float = 1e-3):
        super().__init__(layers)
        self.lr = lr
        self.fast = fast_net(self.kind, hidden, act)
        start_as_ste(self.fast, self.kind)
        self.start()

    def transform(self, D: Tensor, pre: Tensor) -> Tensor:
        return D * self.newest * self.fast(pre)


class FCGrad(Learned):
    """MetaQuant's FCGrad: G = D ⊙ FC(ĝ), the net 1 → hidden → 1. Arguments as MultiFC's."""

    def __init__(self, layers: list[nn.Module], hidden: int = 100, act: str | None = None, lr: float = 1e-3):
        super().__init__(layers)
        self.lr = lr
        self.fast = FastNet(hidden, act or "none", depth=2)
        self.fast.start_at({1e-3: 1e-3, -1e-3: -1e-3})  # the identity: STE
        self.start()

    def transform(self, D: Tensor, pre: Tensor) -> Tensor:
        return D * self.fast(self.newest)


class LSTMFC(Learned):
    """MetaQuant's LSTMFC: G = D ⊙ ĝ ⊙ FC(LSTM(W̃)); every weight carries its own LSTM state from step to step.

    hidden: size of the state, 2·hidden numbers a weight, in up to three copies. lr: Adam's learning rate for φ.
    """

    def __init__(self, layers: list[nn.Module], hidden: int = 100, lr: float = 1e-3):
        super().__init__(layers)
        self.lr, self.hidden = lr, hidden
        self.cell = nn.LSTMCell(1, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.ones_(self.out.bias)  # starts about as STE
        # The state that went into the last step; what came out of it is `self._next`, and can be recomputed from it.
        self.register_buffer("state", self.latent.new_zeros(2, len(self.latent), hidden))
        self._next = self.state
        self.start()

    def step(self, pre: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """W̃ [M], h and c [M, hidden] -> [M, 1 + 2·hidden]: the net's output, and the new state."""
        h, c = self.cell(pre.unsqueeze(1), (h, c))
        return torch.cat([self.out(h), h.detach(), c.detach()], dim=1)

    def store(self) -> None:
        super().store()
        if self._next is not self.state:
            self.state.copy_(self._next)

    def transform(self, D: Tensor, pre: Tensor) -> Tensor:
        out = in_chunks(self.step, numbers_at_once(pre.device) // self.hidden, self.parameters(), pre, *self.state)
        self._next = out[:, 1:].detach().unflatten(1, (2, self.hidden)).transpose(0, 1)
        return D * self.newest * out[:, 0]


ALL = slice(None)  # as an index: every weight
RELEASED_OPTIONS = {"history": "flat", "normalize": "none", "fast_act": "none", "beta": 0.9, "length": 5}


class FSG(Learned):
    """Fast and Slow Gradient generation (AAAI 2025): G = D ⊙ ((1 − β)·fast + β·slow). See the module docstring.

    layers: modules with `.weight` and `.quantizer`, e.g. models.binary_layers(model), on their final device.
    hgs: the slow-net, 'mamba' or 'lstm'. length: l, gradients of history a weight. beta: β in [0, 1].
    history: 'per-weight' (every weight is a sequence [LRE, ĝ_{t−l+1}, …, ĝ_t]; the slow gradient is the net's last
        output) or 'flat' (the released code: every *layer* is one sequence, [LRE, all n gradients of the oldest step,
        …, all n of the newest]; the slow gradient is the last n outputs), or 'newest' (per-weight with zeros in place
        of all older gradients: what does the history do?).
    normalize: 'layer-rms' divides the history by its RMS over the layer and multiplies the slow-net's output by it, so
        that slow scales as the gradient does (an SSM is polynomial in its input, and gradients are 1e-3 to 1e-6);
        'none' does not.
    lre: whether there is a layer recognition embedding; `self.lre` is the nn.Embedding(layers, 1), or None.
    hidden: width of the fast-net and of the LSTM. fast_act: see FastNet (None: none under dorefa, tanh under bwn).
    d_state, d_conv, expand, scan: see SlowMamba. lr_fast, lr_slow: Adam's learning rates for φ.
    hyper_sample: share of the weights, drawn anew each step (with replacement), that φ is trained on (1: all). φ has
        some 8,000 parameters and its gradient is a sum over hundreds of thousands of weights, so a part of them is an
        unbiased estimate of it at a part of the backward pass's price. Every weight still gets its G. Per-weight
        history only.
    preset: 'released' does what the authors' code does and the paper's text does not say. The network runs forward and
        backward at the look-ahead point W − lr·((1 − β)·D·fast + β·slow), made of the gradient of the step before
        (call `look_ahead(lr)` before the forward pass); the persistent update uses D·fast alone, of that same older
        gradient, so the slow gradient never enters it; and the fast-net starts where nn.Linear does. Give it
        RELEASED_OPTIONS too for the whole of it.

    Attributes: fast (FastNet), slow (SlowMamba or SlowLSTM), lre, history [length, N].
    Raises ValueError for an impossible argument. Memory: about (2·length + 16) N numbers and one chunk of the slow-net;
    with the fused flat scan up to 256 MB between the steps.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        hgs: str = "mamba",
        length: int = 5,
        beta: float = 0.9,
        history: str = "per-weight",
        normalize: str = "layer-rms",
        lre: bool = True,
        hidden: int = 100,
        fast_act: str | None = None,
        d_state: int = 16,
        d_conv: int = 8,
        expand: int = 100,
        scan: str = "auto",
        lr_fast: float = 1e-2,
        lr_slow: float = 1e-3,
        hyper_sample: float = 1.0,
        preset: str = "none",
    ):
        for name, value, known in (
            ("slow-net (hgs)", hgs, ("mamba", "lstm")),
            ("history layout", history, ("per-weight", "flat", "newest")),
            ("normalisation", normalize, ("layer-rms", "none")),
            ("preset", preset, ("none", "released")),
        ):
            if value not in known:
                raise ValueError(f"no {name} is called {value!r}: use {' or '.join(known)}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is the share of the slow gradient and must lie in [0, 1]; it is {beta}")
        if hgs == "lstm" and history == "flat":
            raise ValueError(
                "an LSTM cannot run over the flat history (one sequence of up to hundreds of thousands of steps): "
                "use --history per-weight, or --hgs mamba"
            )
        if not 0 < hyper_sample <= 1:
            raise ValueError(
                f"hyper_sample is the share of weights φ is trained on, above 0 and at most 1; it is {hyper_sample}"
            )
        if hyper_sample < 1 and history == "flat":
            raise ValueError(
                "a part of the weights cannot be left out of the flat history, where all are one sequence: "
                "use --history per-weight, or --hyper-sample 1"
            )
        if hyper_sample < 1 and preset == "released":
            raise ValueError("preset 'released' trains φ on all weights: leave out hyper_sample, or the preset")
        super().__init__(layers, length, whole_layers=history == "flat")
        self.hyper_sample, self.sample_seed = hyper_sample, torch.initial_seed() % 2**31
        self.beta, self.layout, self.normalize, self.released = beta, history, normalize, preset == "released"
        self.lr_fast, self.lr_slow = lr_fast, lr_slow
        self.fast = FastNet(hidden, fast_act or "none") if self.released else fast_net(self.kind, hidden, fast_act)
        if not self.released:
            start_as_ste(self.fast, self.kind)
        self.slow = SlowMamba(d_state, d_conv, expand, scan) if hgs == "mamba" else SlowLSTM(hidden)
        self.lre = nn.Embedding(len(layers), 1) if lre else None
        self._displaced = None  # the persistent weights, while the model stands at the look-ahead point
        self.start()

    def parameter_groups(self) -> list[dict]:
        slow = [*self.slow.parameters(), *(self.lre.parameters() if self.lre else ())]
        return [{"params": list(self.fast.parameters()), "lr": self.lr_fast}, {"params": slow, "lr": self.lr_slow}]

    def _make_views(self) -> None:
        super()._make_views()
        if "history" in self._buffers:
            self._history_views = [part for row in self.history for part in row.split(self.sizes)]

    def backend(self) -> str:
        """The scan that the slow-net runs, see SlowMamba.backend; 'nn.LSTM' for an LSTM."""
        return "nn.LSTM" if isinstance(self.slow, SlowLSTM) else self.slow.backend(*self._tensors())

    def backend_and_why(self) -> str:
        """`backend()`, and why it is not the fused scan where --scan auto would have preferred that."""
        backend = self.backend()
        if backend in ("nn.LSTM", "fused") or self.slow.scan != "auto":
            return backend
        return f"{backend} ({self.slow.why_not_fused(*self._tensors())})"

    def _tensors(self) -> tuple[torch.device, torch.dtype, int | None]:
        """What the slow-net runs on, as SlowMamba.backend wants to know it."""
        tokens = None if self.layout == "flat" else self.length + (self.lre is not None)
        return self.latent.device, self.latent.dtype, tokens

    def layer_rms(self) -> Tensor:
        """Root mean square of the stored window of each layer, unfilled slots counting as 0: [layers]."""
        norms = torch.stack(torch._foreach_norm(self._history_views)).view(self.length, -1)
        if self.layout == "newest":
            norms = norms[(self.t - 1) % self.length].unsqueeze(0)
        rms = (self.total(norms.square().sum(0)) / (self.length * self.layer_size)).sqrt()
        return rms.clamp_min(torch.finfo(rms.dtype).tiny)

    def slow_gradient(self, at=ALL) -> Tensor:
        """SlowNet(LRE, history): [N], or [M] for the weights `at`, with the graph to φ."""
        oldest = self.t % self.length
        past = torch.cat([self.history[oldest:, at], self.history[:oldest, at]])  # [l, N], oldest first
        if self.layout == "newest":
            past[:-1] = 0
        rms, first = None, None if self.lre is None else self.lre.weight[:, 0]  # [layers]
        if self.normalize == "layer-rms":
            rms = self.layer_rms()[self.layer_of[at]]  # [N]
            past = past / rms
        if self.layout != "flat":
            if first is not None:
                if at is ALL:  # what nn.Embedding gives, whose backward pass is slow on a CPU
                    token = torch.cat([e.expand(n) for e, n in zip(first, self.sizes, strict=True)])
                else:
                    token = self.lre(self.layer_of[at])[:, 0]
                past = torch.cat([token.unsqueeze(0), past])  # [1 + l, N]
            slow = self.slow.last(past.T.unsqueeze(-1))
        else:
            here = [i for i, size in enumerate(self.sizes) if size]  # one sequence a layer
            slow = self.slow.tails(past, [self.sizes[i] for i in here], None if first is None else first[here])
        return slow if rms is None else slow * rms

    def build(self, D: Tensor, pre: Tensor) -> Tensor:
        if self.hyper_sample == 1:
            return super().build(D, pre)
        # The draw depends on the step alone, so that a resumed run makes the same one.
        random = torch.Generator(D.device).manual_seed(self.sample_seed + self.t)
        count = max(1, round(self.hyper_sample * len(self.G)))
        at = torch.randint(len(self.G), (count,), device=D.device, generator=random)
        at = at.sort().values  # a layer's weights together, which the fused scan is faster with
        if self.processes > 1:  # all draw the same ones, and each takes those of its part
            at = at[(at >= self.begin) & (at < self.end)] - self.begin
        self._chosen, self._upscale = at, len(self.G) / count
        with torch.enable_grad():
            self._graph = self.transform(D[at], pre[at], at)
        with torch.no_grad():
            return self.transform(D, pre)

    def transform(self, D: Tensor, pre: Tensor, at=ALL) -> Tensor:
        fast = self.newest[at] * self.fast(pre)
        slow = self.slow_gradient(at)
        if self.released:
            self._terms = fast, slow  # look_ahead() mixes them, with the calibration of the weights it finds
            return fast
        return D * ((1 - self.beta) * fast + self.beta * slow)

    def terms(self) -> tuple[Tensor, ...]:
        D, pre = self.calibrate()
        return (1 - self.beta) * D * self.newest * self.fast(pre), self.beta * D * self.slow_gradient()

    def measure(self, lr: float) -> dict[str, float]:
        """As Generator's. Empty for the preset 'released', which measures ĝ elsewhere than where the weights are."""
        return {} if self.released else super().measure(lr)

    # -- the released code's look-ahead -------------------------------------------------------------------------------

    @torch.no_grad()
    def look_ahead(self, lr: float) -> None:
        """Before the forward pass, with preset 'released' only: move the weights to the look-ahead point.

        generate() moves them back. Does nothing before the first generate().
        """
        if self._displaced is not None:
            raise RuntimeError("look_ahead() was called twice: call it once before each forward pass")
        if not self.released or self._graph is None:
            return
        self.collect_weights()
        D, _ = self.calibrate()
        fast, slow = self._terms
        with torch.enable_grad():
            self._graph = (1 - self.beta) * D * fast + self.beta * slow  # what φ is trained on at the next step
        self._persistent_G = D * fast.detach()
        self._displaced = [w.detach().clone() for w in self.weights]
        self.gather(self._graph.detach())
        torch._foreach_sub_([w.detach() for w in self.weights], torch._foreach_mul(self._G_views, lr))

    @torch.no_grad()
    def generate(self) -> None:
        """Train φ on the last step's G, store ĝ, and set every `weight.grad` to the new G."""
        if not self.released:
            return super().generate()
        if self.t and self._displaced is None:
            raise RuntimeError("preset 'released' wants look_ahead(lr) before every forward pass")
        self.collect()
        D, pre = self.calibrate()  # at the look-ahead point, where ĝ was measured
        if self._displaced is None:
            self.gather(D * self.ghat)  # the first step: plain STE
        else:
            self.train_phi(D)
            self.gather(self._persistent_G)
            torch._foreach_copy_([w.detach() for w in self.weights], self._displaced)
            self._displaced = None
        self.store()
        self.build(D, pre)
        self.hand_back()

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "sample_seed": self.sample_seed}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.sample_seed = state.get("sample_seed", self.sample_seed)

    def _rebuild(self) -> None:
        if self.released and self.t == 1:
            self.build(*self.calibrate())
        else:
            super()._rebuild()
