"""FSG: Fast and Slow Gradient generation for binary neural networks (AAAI 2025, https://arxiv.org/abs/2412.11777).

Copy this file alone; it needs only torch (2.11 or newer). With selective_scan.py, selective_scan_cpu.cpp and
selective_scan_triton.py beside it, Mamba runs many times faster. FSG needs two lines, one of them in the training loop:

    fsg = FSG(layers)                                          # binarize.binary_layers(model)
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()      # w.grad = ĝ, the gradient at the binary weight
        fsg.generate()                                         # w.grad = G, the gradient for the latent weight
        optimizer.step(), optimizer.zero_grad()                # any torch.optim optimizer

A layer is a module with a `.weight`, a `.quantizer` ('dorefa', 'bwn', …) and a forward pass that computes with the
binary weights and passes their gradient to `.weight` unchanged, as models.BinaryConv2d does. `Learned.generate` says
how it treats micro-batches, frozen layers and gradients that are not finite. With a GradScaler, call
scaler.unscale_(optimizer) before generate(). With several processes, all call fsg.gather() before fsg.state_dict().

The problem. The optimizer moves latent weights W. The network computes with binary weights Ŵ = Q(W̃), where W̃ = A(W) is
the pre-quantized weight and Q rounds it to −1 or +1. The derivative of the rounding is 0 almost everywhere. The
straight-through estimator (STE) replaces it by 1: it updates W with D ⊙ ĝ_t, where

    ĝ_t = ∂L/∂Ŵ at step t      the gradient at the binary weights
    D_t = ∂Ŵ/∂W                the calibration, with the rounding's derivative taken as 1

The method. Two hypernetworks with parameters φ generate the gradient instead:

    fast_t = ĝ_t ⊙ MLP(W̃_t)                                   the fast-net sees the present
    slow_t = SlowNet(LRE, ĝ_{t−l+1}, …, ĝ_t)                   the slow-net sees the past of each weight
    G_t    = D_t ⊙ ((1 − β)·fast_t + β·slow_t)                 the optimizer's gradient

The last l gradients of a weight, ĝ_t included, are the historical gradient storage (HGS). The layer recognition
embedding (LRE) is one learned value per layer; it is the first token of every sequence and tells the layers apart.

The balance. With `balance='none'` these are the paper's formulas as written. The objective of φ below is linear in G,
so a larger term always lowers it: the terms grow, and one soon outgrows the other. The other balances scale both terms
to the RMS of ĝ_t in each layer, and β sets the mix of their amplitudes. 'keep-mean', the default, also keeps ĝ_t's
component along the mean of the history, so that the slow-net cannot reverse what stays the same in a layer's gradient:

    m    = (ĝ_{t−l+1} + … + ĝ_t) / l
    slow ← slow + m·⟨ĝ_t − slow, m⟩ / ⟨m, m⟩                   the inner products of each layer; then scaled again

How φ learns. The optimizer moves W by −lr·G_{t−1}, and ĝ_t is measured at the new weights. To first order

    L(W_t) − L(W_{t−1}) = −lr·⟨D_t ⊙ ĝ_t, G_{t−1}⟩

so the gradient of the loss with respect to G_{t−1} is lr·v with v = −D_t ⊙ ĝ_t. It is known one step later, and is
back-propagated through the graph that made G_{t−1}, into φ only. (Under Adam the move has another factor for each
weight, which FSG ignores.) No second derivative is needed.

This objective looks one step ahead. The steps along the last gradients make ĝ_t smaller in their directions, the more
so the larger the learning rate is. So the slow-net learns to oppose the last gradients. With 'layer-rms', training from
random weights is then much slower than with STE (see results/README.md). With 'keep-mean' it is not.

`FSG.generate()` has three steps: train φ on v, store ĝ_t, generate G_t. G_1, which has no history, is the
straight-through gradient. So φ is trained for the first time in step 3.
MetaQuant's generators are in metaquant.py, the gated history in gate.py, the authors' released step in fsg_released.py.
"""

import functools
import itertools
import math
import warnings
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

try:
    import selective_scan  # the fused scan
except ImportError:
    selective_scan = None


# ---------------------------------------------------------------------------------------------------------------------
# The fast-net.


class FastNet(nn.Module):
    """A small MLP applied to each weight: 1 → hidden → … → 1.  forward(w [M]) -> [M].

    hidden: width. depth: number of linear layers: 3 in FSG and MultiFC, 2 in FCGrad.
    act: 'none' (as released), 'relu' or 'tanh', between the linear layers. bias: whether the linear layers have biases.
    Raises ValueError for an unknown `act`.

    Without biases the MLP with act 'none' is one learned factor times its input. With 'relu' it is two factors, one for
    each sign of the input, because relu(s·x) = s·relu(x) for s > 0. So `forward` evaluates the MLP only at +1 and −1
    and multiplies. The gradients are those of the full MLP.
    """

    def __init__(self, hidden: int = 100, act: str = "none", bias: bool = False, depth: int = 3):
        super().__init__()
        check_choice("fast-net non-linearity", act, "none", "relu", "tanh")
        self.act = {"none": nn.Identity(), "relu": nn.ReLU(), "tanh": nn.Tanh()}[act]
        self.collapses = act != "tanh" and not bias
        widths = [1] + [hidden] * (depth - 1) + [1]
        self.linears = nn.ModuleList(nn.Linear(i, o, bias) for i, o in itertools.pairwise(widths))
        self.register_buffer("ends", torch.tensor([1.0, -1.0]), persistent=False)

    def features(self, x: Tensor) -> Tensor:
        """x [M, 1] -> the last hidden layer's activations [M, hidden]."""
        for linear in self.linears[:-1]:
            x = self.act(linear(x))
        return x

    def mlp(self, w: Tensor) -> Tensor:
        """The MLP as written down: w [M] -> [M]."""
        return self.linears[-1](self.features(w.unsqueeze(1))).squeeze(1)

    def forward(self, w: Tensor) -> Tensor:
        if not self.collapses:
            return in_chunks(self.mlp, elements_at_once(w.device) // self.linears[0].out_features, self.parameters(), w)
        at_one, at_minus_one = self.mlp(self.ends)
        if isinstance(self.act, nn.Identity):
            return at_one * w
        return torch.where(w > 0, at_one, -at_minus_one) * w

    @torch.no_grad()
    def start_at(self, points: dict[float, float]) -> None:
        """Choose the last layer's weights so that the MLP maps each key to its value (least squares, smallest norm).

        The hidden layers are drawn again if they do not allow it, for instance because all ReLUs are off.
        Raises ValueError if 100 draws do not help.
        """
        last = self.linears[-1]
        x, y = last.weight.new_tensor([list(points), list(points.values())]).unsqueeze(2)  # [M, 1] each
        target = y if last.bias is None else y - last.bias
        for _ in range(100):
            last.weight.copy_((torch.linalg.pinv(self.features(x)) @ target).T)
            if torch.allclose(self.mlp(x.squeeze(1)), y.squeeze(1), rtol=0.2, atol=0):
                return
            for linear in self.linears[:-1]:
                linear.reset_parameters()
        raise ValueError(f"a fast-net of width {last.in_features} cannot start as STE: make it wider (--hidden)")


def fast_net(kind: str, hidden: int, act: str | None) -> FastNet:
    """The MLP of W̃ for a quantizer. It starts near 1, where the fast gradient is the straight-through one.

    kind: 'dorefa', 'bwn', 'bwn-f' or 'bwn-l'. act: see FastNet; None is 'none' under dorefa, else 'tanh'.
    Under dorefa W̃ lies in [0, 1], and the MLP starts at 1 for W̃ = ½. Under bwn W̃ = W is about 0, where an MLP without
    biases is 0 and has the sign of W. So there it has biases, and starts at 1 for W̃ = −0.1, 0 and 0.1.
    """
    dorefa = kind == "dorefa"
    net = FastNet(hidden, act or ("none" if dorefa else "tanh"), bias=not dorefa)
    net.start_at({0.5: 1.0} if dorefa else {-0.1: 1.0, 0.0: 1.0, 0.1: 1.0})
    return net


# ---------------------------------------------------------------------------------------------------------------------
# The slow-nets. u [B, L, 1] is B sequences of L scalar tokens. In the per-weight layout a sequence is one weight's
# history.


class SlowLSTM(nn.Module):
    """The slow-net as an LSTM: nn.LSTM(1, hidden), then a linear layer hidden → 1.

    The linear layer starts at 0, or as `start_along` chooses it. A random one would add one offset, as large as the
    gradient, to all weights.
    """

    def __init__(self, hidden: int = 100):
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def start_along(self, length: int) -> None:
        """Choose the linear layer so that the last output is about the last token, if this is not negative.

        length: of the sequences, whose tokens are random, of variance 1.
        """
        u = torch.randn(4096, length, 1, device="cpu", generator=torch.Generator().manual_seed(0)).to(self.out.weight)
        u *= signs(u[:, -1:])  # as FSG's balance does
        h = self.lstm(u)[1][0][0]  # [4096, hidden]
        square = h.T @ h
        square.diagonal().add_(0.01 * square.trace())  # ridge regression: exact fits have large weights
        self.out.weight.copy_(torch.linalg.solve(square, h.T @ u[:, -1]).T)

    def forward(self, u: Tensor) -> Tensor:
        """u [B, L, 1] -> [B, L, 1], one output per token."""
        return self.out(self.lstm(u)[0])

    def last(self, u: Tensor, known: Tensor | None = None) -> Tensor:
        """u [B, L, 1] -> [B]: the value of `forward(u)[:, -1, 0]`, computed in chunks. `known` is not used."""
        elements = 16 * self.lstm.hidden_size * u.shape[1]  # gates and states of a sequence, and their gradients
        last = lambda u: self.out(self.lstm(u)[1][0][0]).squeeze(1)  # of the hidden state after the last token
        return in_chunks(last, elements_at_once(u.device) // elements, self.parameters(), u)


def selective_scan_loop(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The selective scan of a Mamba block, token by token. This loop is the definition; every other scan equals it.

        h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t x_t) B_tᵀ          the state [d, n]; h_0 = 0
        y_t = h_t C_t                                          [d]

    x, delta [batch, L, d], A [d, n], B, C [batch, L, n] -> y [batch, L, d]; d channels, n states per channel.
    """
    h = x.new_zeros(x.shape[0], *A.shape)  # [batch, d, n]
    y = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(y, dim=1)


class SlowMamba(nn.Module):
    """The slow-net as one Mamba block on scalar tokens (https://arxiv.org/abs/2312.00752): d_model 1, dt_rank 1.

    d_state: n, states per channel. d_conv: taps of the causal convolution. expand: d, channels.
    The parameters have the names, shapes and initialisation of `mamba_ssm.Mamba`; state dicts interchange.

        x, z      = in_proj u                                          [d], [d] per token
        x         = silu(conv1d x)                                     causal, depthwise
        dt, B, C  = x_proj x                                           [1], [n], [n]
        Δ         = softplus(dt_proj dt)                               [d], the step size; A = −exp(A_log)
        y         = selective_scan_loop(x, Δ, A, B, C)                 [d]
        output    = out_proj ((y + D ⊙ x) ⊙ silu(z))                   scalar

    scan: the implementation of the scan. 'fused' is selective_scan.py's, float32 on a CPU or a CUDA GPU. 'mamba-ssm' is
        that package's CUDA kernel. 'reference' is plain PyTorch. 'auto' takes the first of these that can run.
    Raises ValueError for an unknown `scan`, and RuntimeError in a call where the requested scan cannot run.
    """

    def __init__(self, d_state: int = 16, d_conv: int = 8, expand: int = 100, scan: str = "auto"):
        super().__init__()
        check_choice("scan", scan, "auto", "fused", "mamba-ssm", "reference")
        self.scan, self.d_state, self.d_conv, self.d_inner = scan, d_state, d_conv, expand
        self.in_proj = nn.Linear(1, 2 * expand, bias=False)
        self.conv1d = nn.Conv1d(expand, expand, d_conv, groups=expand, padding=d_conv - 1)
        self.x_proj = nn.Linear(expand, 1 + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(1, expand)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(expand, 1))  # A = −1 … −n
        self.D = nn.Parameter(torch.ones(expand))
        self.out_proj = nn.Linear(expand, 1, bias=False)
        # Mamba's initial step sizes: softplus(dt_proj.bias) is log-uniform in [1e-3, 1e-1].
        nn.init.uniform_(self.dt_proj.weight, -1.0, 1.0)
        dt = torch.exp(torch.rand(expand) * math.log(0.1 / 1e-3) + math.log(1e-3)).clamp_min(1e-4)
        self.dt_proj.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    @torch.no_grad()
    def start_positive(self, length: int) -> None:
        """Choose the sign of out_proj so that the sequence 0, …, 0, 1 of that length has a positive last output."""
        u = self.D.new_zeros(1, length, 1)
        u[:, -1] = 1.0
        x, delta, B, C = self.project(u)
        y = selective_scan_loop(x, delta, -torch.exp(self.A_log), B, C)
        if self.output(y, x, u)[0, -1, 0] < 0:
            self.out_proj.weight.neg_()

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inputs of the scan: u [B, L, 1] -> x [B, L, d], Δ [B, L, d], B [B, L, n], C [B, L, n]."""
        # A token is one scalar, so in_proj and the convolution are one matrix applied to the d_conv latest tokens.
        latest = F.pad(u.squeeze(-1), (self.d_conv - 1, 0)).unfold(1, self.d_conv, 1)  # [B, L, d_conv]
        both = self.conv1d.weight[:, 0] * self.in_proj.weight[: self.d_inner]  # [d, d_conv]
        x = F.silu(F.linear(latest, both, self.conv1d.bias))
        dt, B, C = self.x_proj(x).split([1, self.d_state, self.d_state], dim=-1)
        return x, F.softplus(self.dt_proj(dt)), B, C

    def output(self, y: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """out_proj((y + D ⊙ x) ⊙ silu(z)): y, x [..., d], u [..., 1] -> [..., 1]."""
        z = F.linear(u, self.in_proj.weight[self.d_inner :])
        return self.out_proj((y + self.D * x) * F.silu(z))

    def block(self, u: Tensor) -> Tensor:
        """The block as in the class docstring: u [B, L, 1] -> [B, L, 1]."""
        x, delta, B, C = self.project(u)
        A = -torch.exp(self.A_log)
        if self.unfused_backend(u.device) == "mamba-ssm":
            # Its kernel takes the time axis last: [B, d, L] and [B, n, L].
            x_t, delta_t, B_t, C_t = (v.transpose(1, 2).contiguous() for v in (x, delta, B, C))
            y = mamba_ssm_scan()(x_t, delta_t, A, B_t, C_t, delta_softplus=False).transpose(1, 2)
        elif u.shape[1] <= 64 or selective_scan is None:
            y = selective_scan_loop(x, delta, A, B, C)
        else:
            y = selective_scan.in_segments(x, delta, A, B, C, elements_at_once(u.device))
        return self.output(y, x, u)

    def forward(self, u: Tensor) -> Tensor:
        """u [B, L, 1] -> [B, L, 1], one output per token."""
        rows = elements_at_once(u.device) // (min(u.shape[1], 64) * self.d_inner * self.d_state)
        return in_chunks(self.block, rows, self.parameters(), u) if u.shape[0] > max(1, rows) else self.block(u)

    def last(self, u: Tensor, known: Tensor | None = None) -> Tensor:
        """The per-weight layout: u [B, L, 1] -> [B], the value of `forward(u)[:, -1, 0]`.

        known [B]: this value, if it is known. Then the fused scan computes the gradients only.
        """
        backend = self.backend(u.device, u.dtype, u.shape[1])
        if backend == "fused":
            return selective_scan.last(u.squeeze(-1), *self.in_kernel_order(), known=known)
        function = lambda u: self.block(u)[:, -1, 0]
        if backend == "reference" and selective_scan:
            function = lambda u: selective_scan.last_unrolled(u, *self.in_kernel_order())
        rows = elements_at_once(u.device) // (u.shape[1] * self.d_inner * self.d_state)
        return in_chunks(function, rows, self.parameters(), u)

    def tails(self, past: Tensor, sizes: list[int], first: Tensor | None) -> Tensor:
        """The flat layout: past [l, N] -> [N].

        Layer i has sizes[i] columns of `past`, in order. They are one sequence: its part of past[0], …, its part of
        past[l − 1], after first[i] if `first` [layers] is given. Returns the last sizes[i] outputs of each sequence.
        """
        if self.backend(past.device, past.dtype, None) == "fused":
            return selective_scan.tails(past, sizes, first, *self.in_kernel_order())
        found = []
        for i, part in enumerate(past.split(sizes, dim=1)):  # [l, n]
            token = [] if first is None else [first[i : i + 1]]
            found.append(self.tail(torch.cat([*token, *part]).view(1, -1, 1), part.shape[1]))
        return torch.cat(found)

    # Which scan runs.

    def backend(self, device: torch.device | str, dtype: torch.dtype = torch.float32, tokens: int | None = None) -> str:
        """The scan that runs for such tensors: 'fused', 'mamba-ssm' or 'reference'.

        tokens: the length of the sequences for `last`; None for `tails`.
        """
        device = torch.device(device)
        if self.scan in ("auto", "fused"):
            problem = self.why_not_fused(device, dtype, tokens)
            if problem is None:
                return "fused"
            if self.scan == "fused":
                raise RuntimeError(problem)
        return self.unfused_backend(device)

    def why_not_fused(self, device: torch.device, dtype: torch.dtype, tokens: int | None) -> str | None:
        """None if the fused scan runs for such tensors, else one sentence that says why it does not."""
        if selective_scan is None:
            return "the fused scan needs selective_scan.py and its kernels beside hypernet.py"
        return selective_scan.why_not(device, dtype, tokens)

    def unfused_backend(self, device: torch.device) -> str:
        """The scan of `block` on that device: 'mamba-ssm' or 'reference'."""
        if self.scan == "reference" or (self.scan != "mamba-ssm" and device.type != "cuda"):
            return "reference"
        try:
            mamba_ssm_scan()
        except RuntimeError:
            if self.scan == "mamba-ssm":
                raise
            return "reference"
        if device.type != "cuda":
            raise RuntimeError("--scan mamba-ssm runs on CUDA devices only: use --device cuda, or --scan auto")
        return "mamba-ssm"

    def in_kernel_order(self) -> tuple[Tensor, ...]:
        """The parameters in the order of selective_scan.py."""
        first = (self.in_proj.weight, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight)
        return *first, self.dt_proj.bias, self.A_log, self.D, self.out_proj.weight

    def tail(self, u: Tensor, count: int) -> Tensor:
        """The last `count` outputs of one sequence: u [1, L, 1] -> [count], the value of `forward(u)[0, -count:, 0]`.

        Tokens that are forgotten before the first of these outputs are left out, given selective_scan.py.
        """
        start = selective_scan.first_needed(self, u, u.shape[1] - count) if selective_scan else 0
        # One chunk, so that no [L, d] tensor is kept for the backward pass.
        return in_chunks(lambda u: self.block(u)[:, -count:, 0], 1, self.parameters(), u[:, start:])[0]


def mamba_ssm_scan():
    """mamba_ssm's selective_scan_fn. Raises RuntimeError, with the error of the import, if mamba_ssm cannot be used."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as e:  # the package or its compiled extension is missing, or does not fit the installed torch
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        pip = "pip install --no-build-isolation -r requirements-cuda.txt"
        what = f"--scan mamba-ssm: importing mamba_ssm failed ({reason}); install it on a CUDA machine with `{pip}`"
        raise RuntimeError(f"{what}, or use --scan auto") from None
    return selective_scan_fn


# ---------------------------------------------------------------------------------------------------------------------
# Gradient generators. generate() turns every `weight.grad` from ĝ into G. A state_dict() contains all that the next
# generate() depends on. Per-weight tensors are flat, [N], layer after layer.

SMALLEST = 1e-18  # A layer's gradient with a smaller RMS counts as 0, because its squares would underflow.


def exact(method):
    """Decorate a method of a generator: no autograd, and within torch.autocast no lower precision."""

    @functools.wraps(method)
    def decorated(self, *arguments):
        with torch.no_grad(), torch.autocast(self.weights[0].device.type, enabled=False):
            return method(self, *arguments)

    return decorated


class Generator(nn.Module):
    """The base class of all generators: it reads ĝ and W, computes the calibration, and sets `weight.grad` to G.

    layers: modules with a `.weight` (the latent weight) and a `.quantizer`: 'dorefa', 'bwn', 'bwn-f' or 'bwn-l', one
        for all layers. If the network gets more layers later, make a new generator. Raises ValueError if there is no
        layer, or for another quantizer.
    sharded: whether the processes of torch.distributed, if there are several, share the work (see Shard). Each process
        then has N / world_size elements of every per-weight tensor but G, and all processes call generate(), measure()
        and, before state_dict(), gather(). A state_dict is of all N weights; any number of processes can load it.
    whole_layers: whether a process gets whole layers only.

    .to(), .double() and load_state_dict(assign=True) of the network may be called later: the generator follows. (Where
    layers share a weight, assign=True separates them: make a new generator then.) It computes in float32 where the
    weights are float16 or bfloat16, whose squares underflow, and in which small updates of φ are lost.
    """

    keeps_latent = False  # whether a checkpoint needs W of the last step
    SHARDED: ClassVar = {"latent": 0, "past": 0, "history": 1, "state": 1}  # buffers [.., N, ..], and the axis of N
    ATTRIBUTES = ("strides",)  # what a state_dict contains besides parameters and buffers

    def __init__(self, layers: list[nn.Module], sharded: bool = False, whole_layers: bool = False):
        super().__init__()
        layers = layers if isinstance(layers, list) else list(layers)
        kinds = sorted({layer.quantizer for layer in layers})
        if not layers:
            raise ValueError("there is no binary layer to generate gradients for: binarize_() the model first")
        known = ("dorefa", "bwn", "bwn-f", "bwn-l")
        if len(kinds) > 1 or kinds[0] not in known:
            raise ValueError(f"all layers must share one quantizer of {', '.join(known)}; they have {', '.join(kinds)}")
        self.kind = kinds[0]
        self.layers = layers  # a list, so that their parameters are the model's, not ours
        self.shapes = [w.shape for w in self.weights]
        # The order of a weight's elements in a flat tensor: that in memory; the logical one where layers are sequences.
        self.strides = [(w.contiguous() if whole_layers else torch.empty_like(w)).stride() for w in self.weights]
        like = self.weights[0].new_empty(0, dtype=torch.promote_types(self.weights[0].dtype, torch.float32))
        counts = [w.numel() for w in self.weights]
        self.shard = Shard(counts, sharded, whole_layers)
        self.sizes = self.shard.sizes  # this process's weights in each layer
        n, sizes = sum(self.sizes), torch.tensor(self.sizes, device=like.device)
        self.register_buffer("layer_of", torch.arange(len(layers), device=like.device).repeat_interleave(sizes), False)
        self.register_buffer("lengths", sizes, False)  # `sizes` as a tensor
        self.register_buffer("layer_size", torch.tensor(counts, device=like.device), False)  # over all processes
        self.register_buffer("latent", like.new_zeros(n), self.keeps_latent)  # W_t
        self.register_buffer("ghat", like.new_zeros(n), False)  # ĝ_t
        self.given = [False] * len(layers)  # which layers had a gradient in the last step, see collect()
        self.register_buffer("new", torch.zeros_like(sizes, dtype=torch.bool), False)  # which had a finite one
        self.gathered = None  # see gather()

    @property
    def weights(self) -> list[nn.Parameter]:
        """The latent weights of all layers."""
        return [layer.weight for layer in self.layers]

    def collect(self) -> Tensor:
        """Read ĝ_t and W_t. Returns whether each weight has a new gradient: bool [N], or [] if it is equal for all.

        The weights of a layer have none if `weight.grad` is None or the weight is frozen. No weight has one if the norm
        of ĝ_t over all layers is not finite. `ghat` is 0 for weights without a gradient. With `keeps_latent`, `latent`
        does not change for weights without a new one.
        Raises RuntimeError if no layer got a gradient since the last generate().
        """
        self.follow()
        weights, self.gathered = self.weights, None
        made = [getattr(w.grad, "made_at", -1) == getattr(w.grad, "_version", None) for w in weights]
        self.given = [w.requires_grad and w.grad is not None and not m for w, m in zip(weights, made, strict=True)]
        i = next((i for i, w in enumerate(weights) if w.requires_grad), None)
        if i is not None and not any(self.given):
            since = " since the last generate()" * any(made)
            what = f"no binary layer has a gradient{since}, the first of them being layer {i}, {self.layers[i]}"
            raise RuntimeError(f"{what}: call loss.backward() before each generate()")
        self.ghat = self.flatten(self.gradients())
        finite = self.shard.all_reduce(torch.linalg.vector_norm(self.ghat)).isfinite()
        self.new = torch.stack([finite if given else torch.zeros_like(finite) for given in self.given])  # [layers]
        new = finite if all(self.given) else self.spread(self.new)
        W = self.flatten(weights)
        self.latent = where(new, W, self.latent) if self.keeps_latent else W
        return new

    def follow(self) -> None:
        """Move to the device and the data type of the weights.

        Raises RuntimeError if they have several, or if the layers are not those that the generator was made for.
        """
        places = [(w.device, w.dtype) for w in self.weights]
        if [w.shape for w in self.weights] != self.shapes:
            raise RuntimeError("the binary layers have changed since the gradient generator was made: make a new one")
        for i, place in enumerate(places):
            if place != places[0]:
                what = f"layer {i}, {self.layers[i]}, has another device or data type than the first layer"
                raise RuntimeError(f"{what}: move the whole network")
        device, dtype = places[0][0], torch.promote_types(places[0][1], torch.float32)
        if (device, dtype) != (self.latent.device, self.latent.dtype):
            self.to(device, dtype)

    def spread(self, values: Tensor) -> Tensor:
        """values [layers] -> [N]: for each weight, the value of its layer."""
        if values.is_cuda:  # one kernel for all layers
            return values.index_select(0, self.layer_of)
        return torch.cat([value.expand(size) for value, size in zip(values, self.sizes, strict=True)])

    def gradients(self) -> list[Tensor]:
        """The `.grad` of each layer's weight; 0 if the layer had no gradient in the last step."""
        return [w.grad if given else torch.zeros_like(w) for w, given in zip(self.weights, self.given, strict=True)]

    def calibrate(self, pre: bool = True) -> tuple[Tensor, Tensor | None]:
        """D and W̃ of the latent weights, [N] each: quantizers.calibration and pre_quantize for all layers at once.

        Without `pre`, W̃ is not computed, and is None.

        dorefa:      D = (1 − tanh² W) / max|tanh W|,   W̃ = tanh W / (2 max|tanh W|) + ½      (max over the layer)
                     D = 1 − tanh² W                    where the maximum is below 0.001, so that D is bounded
        bwn, -f, -l: D = 1,                             W̃ = W
        """
        if self.kind != "dorefa":
            return torch.ones_like(self.latent), self.latent.clone() if pre else None
        top = per_layer(self.latent.abs(), self.sizes, self.lengths, "max")
        top = self.shard.all_reduce(top, "MAX").tanh()  # max|tanh W| = tanh(max|W|)
        t = torch.tanh(self.latent)
        pre = (t / self.spread(2 * top.clamp_min(torch.finfo(top.dtype).tiny))).add_(0.5) if pre else None
        D = torch.addcmul(t.new_ones(()), t, t, value=-1, out=t)  # 1 − t²
        return D.div_(self.spread(torch.where(top < 1e-3, 1, top))), pre

    def hand_back(self, G: Tensor) -> None:
        """Set the `weight.grad` of each layer that had one to its part of G [N]. Every process gets all of G."""
        for w, part, given in zip(self.weights, self.layer_views(self.shard.all_gather(G)), self.given, strict=True):
            if given:
                # PyTorch's fused optimizers compute wrong values on CPUs if the strides differ from the weight's.
                fits = part.stride() == w.stride() and part.dtype == w.dtype
                part = part.data if fits else torch.empty_like(w).copy_(part)
                # A mark that is valid until this gradient is written to. (`.data` has its own version counter.)
                w.grad, part.made_at = part, part._version

    def layer_views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor of all weights, each with the shape of its layer's weight."""
        parts = flat.split(self.shard.counts)
        return [p.as_strided(*how) for p, *how in zip(parts, self.shapes, self.strides, strict=True)]

    def flatten(self, tensors: list[Tensor]) -> Tensor:
        """This process's part [N] of all layers' tensors, laid end to end."""
        flat = self.latent.new_empty(self.shard.count)
        torch._foreach_copy_(self.layer_views(flat), [t.detach() for t in tensors])
        return flat if self.shard.world_size == 1 else flat[self.shard.begin : self.shard.end].clone()

    def rms(self, x: Tensor) -> Tensor:
        """RMS of each layer's part of x [rows, N], over all rows and processes: [layers], at least SMALLEST."""
        squares = per_layer(x.square().sum(0) if len(x) > 1 else x[0].square(), self.sizes, self.lengths)
        mean = self.shard.all_reduce(squares) / (len(x) * self.layer_size)
        return mean.sqrt().clamp_min(SMALLEST)

    @exact
    def measure(self, lr: float) -> dict[str, float]:
        """What the last step did. Call it after optimizer.step() and before zero_grad(), with the step's learning rate.

        cosine: between G and D ⊙ ĝ, the straight-through gradient. step: mean |ΔW| / lr. Where G has two terms (see
        `terms`): fast_rms and slow_rms, the RMS of each, and slow_share, Σ slow² / Σ (slow² + fast²).
        """
        straight, G = self.calibrate(pre=False)[0] * self.ghat, self.flatten(self.gradients())
        change = (self.flatten(self.weights) - self.latent) * self.spread(self.new)
        sums = [(G * straight).sum(), G.square().sum(), straight.square().sum(), change.abs().sum()]
        sums += [term.square().sum() for term in self.terms()]
        dot, ours, theirs, moved, *energy = self.shard.all_reduce(torch.stack(sums)).tolist()
        n = self.shard.count
        found = {"cosine": dot / max(math.sqrt(ours * theirs), 1e-300), "step": moved / (n * max(lr, 1e-300))}
        if energy:
            fast, slow = energy
            share = slow / max(fast + slow, 1e-300)
            found |= {"fast_rms": math.sqrt(fast / n), "slow_rms": math.sqrt(slow / n), "slow_share": share}
        return found

    def terms(self) -> tuple[Tensor, ...]:
        """The fast and the slow term of G, [N] each, with all their factors; () where G has one term."""
        return ()

    def gather(self) -> None:
        """Collect the state of all N weights for state_dict(). All processes call it; a single process need not.

        It is valid until the next generate(). Until then any process may call state_dict(), which does not wait.
        """
        buffers = [(name, axis) for name, axis in self.SHARDED.items() if name in self._buffers]
        self.gathered = {name: self.shard.all_gather(getattr(self, name), axis) for name, axis in buffers}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard.world_size > 1:
            if self.gathered is None:
                raise RuntimeError("call gather() in all processes before state_dict() of a gradient generator")
            destination.update({prefix + name: whole for name, whole in self.gathered.items()})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("assign_to_params_buffers"):
            raise RuntimeError("load the state of a gradient generator without assign=True")
        own, self.gathered = dict(state_dict), None
        for name, axis in self.SHARDED.items():
            if prefix + name in own and own[prefix + name].shape[axis] == self.shard.count:
                own[prefix + name] = own[prefix + name].narrow(axis, self.shard.begin, sum(self.sizes))
        super()._load_from_state_dict(own, prefix, local_metadata, *args)

    def get_extra_state(self) -> dict:
        return {name: getattr(self, name) for name in self.ATTRIBUTES}

    def set_extra_state(self, state: dict) -> None:
        for name in self.ATTRIBUTES:
            if tree_map(type, state[name]) != tree_map(type, getattr(self, name)):
                raise TypeError(f"the state of the gradient generator is damaged or of other layers (its part {name})")
            setattr(self, name, state[name])


class STE(Generator):
    """The straight-through estimator (https://arxiv.org/abs/1308.3432): G = D ⊙ ĝ. Nothing is learned."""

    @torch.no_grad()
    def generate(self) -> None:
        """`weight.grad` ← D ⊙ ĝ for every layer with a gradient. If ĝ is not finite, nothing changes."""
        # collect() is called first
        self.hand_back(where(self.collect(), self.calibrate(pre=False)[0].mul_(self.ghat), self.ghat))


class Seen(NamedTuple):
    """What G_t is made of, for n weights (all of them, or a sample), layer after layer."""

    D: Tensor  # [n] calibration
    pre: Tensor  # [n] W̃_t
    ghat: Tensor  # [n] ĝ_t
    history: Tensor  # [l, n] the HGS, oldest first
    layer_of: Tensor  # [n] the number of each weight's layer
    sizes: list[int]  # how many of the n weights each layer has
    lengths: Tensor  # `sizes` as a tensor
    history_rms: Tensor | None = None  # [layers] RMS of the layer's history, for FSG
    ghat_rms: Tensor | None = None  # [layers] RMS of the layer's ĝ_t, for FSG
    slow: Tensor | None = None  # [n] the slow-net's outputs, if they are known


class Learned(Generator):
    """A generator with hypernetworks φ: the history (HGS) and the training of φ.

    A subclass has `gradient(seen)` -> G [n] with its graph to φ, and φ's learning rate `lr` (or `parameter_groups()`).
    `gradient` depends on `seen` and on buffers only, so that the last step's graph can be built from a checkpoint.
    length: l.
    """

    keeps_latent = True  # to build the last step's graph again
    ATTRIBUTES = (*Generator.ATTRIBUTES, "t")

    def __init__(self, layers: list[nn.Module], length: int = 1, whole_layers: bool = False):
        super().__init__(layers, sharded=True, whole_layers=whole_layers)
        self.length, self.t = length, 0  # t counts generate() calls
        # The history starts as zeros and is oldest first. steps [layers]: how many gradients each layer has stored.
        self.register_buffer("history", self.latent.new_zeros(length, len(self.latent)))
        self.register_buffer("steps", torch.zeros_like(self.layer_size))
        self.last_G = self.sample = None  # G_{t−1} [n] with its graph to φ; the sampled weights, None for all

    def start(self) -> None:
        """Move φ to the device of the weights and make φ's optimizer. Call it when all nets are made."""
        self.to(device=self.latent.device, dtype=self.latent.dtype)
        self.shard.broadcast(self.parameters())
        self.optimizer = torch.optim.Adam(self.parameter_groups(), fused=True)

    def parameter_groups(self) -> list[dict]:
        """φ's parameters and learning rates, for Adam."""
        return [{"params": list(self.parameters()), "lr": self.lr}]

    @exact
    def generate(self) -> None:
        """Set every `weight.grad` from ĝ_t to G_t. The first gradient of a layer becomes D ⊙ ĝ, as under STE.

        Call it once after one or several backward(). optimizer.step() may be skipped, as a GradScaler does if another
        layer has a gradient that is not finite; the history still gets ĝ_t. The state of a layer without a gradient
        does not change. If any element of ĝ_t is not finite, neither the history nor φ changes, and ĝ_t stays in
        `weight.grad`. The host does not wait for the device.
        Raises RuntimeError if no layer got a gradient since the last call, and none has been written to.
        """
        if self.last_G is None:  # the first steps, or after load_state_dict(), copy.deepcopy() or pickle.load()
            self.rebuild()
        new = self.collect()
        D, pre = self.calibrate()
        straight = D * self.ghat
        if self.last_G is not None:
            learned = self.learned()
            v = torch.where(self.spread(learned), -straight, 0)
            v /= self.shard.all_reduce(v.square().sum()).sqrt().clamp_min(SMALLEST)
            self.train_phi(v, learned.any())  # 1. train φ: G_{t−1} led to where ĝ_t was measured
        self.push(new)  # 2. store ĝ_t in the history
        self.t += 1
        # 3. generate G_t, and keep its graph for the next step
        G = torch.where(self.spread(self.steps > 1), self.make(D, pre), straight) if self.t > 1 else straight
        self.hand_back(where(new, G, self.ghat))

    def learned(self) -> Tensor:
        """[layers] bool: the layers that have a new gradient and whose G_{t−1} was made by φ."""
        return self.new & (self.steps > 1)

    def rebuild(self) -> None:
        """Build the graph of G_{t−1} again."""
        if self.t > 1:
            self.make(*self.calibrate())

    def train_phi(self, v: Tensor, wanted: Tensor) -> None:
        """One Adam step on φ. v [N] is the loss's gradient with respect to G_{t−1}, up to a positive factor.

        generate() normalises it to ‖v‖ = 1: Adam divides out its scale, but Adam's eps does not.
        wanted [] bool: if it is false, φ and the state of Adam do not change.
        """
        self.optimizer.zero_grad()
        last_G, self.last_G = self.last_G, None  # also after an error in backward()
        last_G.backward(v if self.sample is None else v[self.sample.at] * self.sample.stands_for)
        if self.shard.world_size > 1:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            nn.utils.vector_to_parameters(self.shard.all_reduce(nn.utils.parameters_to_vector(grads)), grads)
        self.optimizer.found_inf = (~wanted).float()  # as torch.amp.GradScaler does to skip a step
        self.optimizer.step()

    def push(self, new: Tensor) -> None:
        """Store ĝ_t in the history and drop the oldest gradient, for the weights for which `new` [N] is true."""
        self.history = where(new, torch.cat([self.history[1:], self.ghat.unsqueeze(0)]), self.history)
        self.steps = self.steps + self.new

    def make(self, D: Tensor, pre: Tensor) -> Tensor:
        """G_t [N]. `self.last_G` keeps its graph."""
        with torch.enable_grad():
            self.last_G = self.gradient(self.seen(D, pre))
        return self.last_G.detach()

    def seen(self, D: Tensor, pre: Tensor) -> Seen:
        """What G_t of all weights is made of."""
        return Seen(D, pre, self.history[-1], self.history, self.layer_of, self.sizes, self.lengths)

    @torch.no_grad()
    def _apply(self, fn, recurse=True):  # .to(), .double()
        super()._apply(fn, recurse)
        if self.t:
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # moves Adam's averages
            self.rebuild()
        return self

    def __getstate__(self):  # copy.deepcopy(), pickle.dump(): a graph cannot be copied, generate() builds it again
        return {**self.__dict__, "last_G": None, "sample": None}

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.last_G = None  # generate() builds it again
        self.optimizer.load_state_dict(state["optimizer"])


class FSG(Learned):
    """Fast and Slow Gradient generation (AAAI 2025, https://arxiv.org/abs/2412.11777), as in the module docstring.

    layers: modules with `.weight` and `.quantizer`, e.g. binarize.binary_layers(model), on their final device.
    hgs: the slow-net, 'mamba' or 'lstm'. length: l, gradients of history per weight. beta: β in [0, 1].
    history: the layout. 'per-weight': every weight is one sequence [LRE, ĝ_{t−l+1}, …, ĝ_t]; the slow gradient is the
        slow-net's last output. 'flat' (as released, Mamba only): every layer is one sequence, [LRE, all n gradients of
        the oldest step, …, all n of the newest]; the slow gradient is the last n outputs. 'newest': per-weight with
        zeros in place of all older gradients, to measure what the history contributes.
    normalize: 'layer-rms' divides the history by its RMS in the layer and multiplies the slow-net's output by it, so
        that `slow` scales as the gradient does. 'none' does not.
    balance: 'none' is the formula as written. 'layer-rms' scales `fast` and `slow` to the RMS of ĝ_t in each layer. It
        uses |MLP(W̃)|, so that the fast term keeps the sign of ĝ_t. It uses s·SlowNet(LRE, s·history) with s = sign ĝ_t
        of each weight, because the slow-net could otherwise move all weights of a layer in one direction. 'keep-mean'
        does all this and keeps ĝ_t's component along the mean of the history, as in the module docstring. Under dorefa,
        the balanced fast term with `fast_act` 'none' or 'relu' does not depend on φ, because W̃ >= 0; its MLP is not
        trained.
    lre: whether there is a layer recognition embedding; `self.lre` is an nn.Embedding(layers, 1) or None. It starts at
        0, or with balance 'none' at nn.Embedding's random values.
    hidden: width of the fast-net and of the LSTM. fast_act: see fast_net. d_state, d_conv, expand, scan: see SlowMamba.
    lr_fast, lr_slow: Adam's learning rates for φ: the fast-net's; the slow-net's and the LRE's.
    hyper_sample: the fraction of the weights that φ is trained on, a new sample in each step. None is 1/8, or 1 for the
        flat history, which cannot be sampled. φ's gradient is a sum over all weights, which a sample estimates in less
        time. Every weight gets its G.

    Attributes: fast, slow, lre, history [length, N]. Raises ValueError for an argument with a wrong value.
    Memory: (3·length + 16) N elements and a chunk of the slow-net; with the fused flat scan up to 256 MB more.
    """

    ATTRIBUTES = (*Learned.ATTRIBUTES, "sample_seed")

    def __init__(
        self,
        layers: list[nn.Module],
        hgs: str = "mamba",
        length: int = 5,
        beta: float = 0.9,
        history: str = "per-weight",
        normalize: str = "layer-rms",
        balance: str = "keep-mean",
        lre: bool = True,
        hidden: int = 100,
        fast_act: str | None = None,
        d_state: int = 16,
        d_conv: int = 8,
        expand: int = 100,
        scan: str = "auto",
        lr_fast: float = 1e-2,
        lr_slow: float = 1e-3,
        hyper_sample: float | None = None,
    ):
        check_choice("slow-net (hgs)", hgs, "mamba", "lstm")
        check_choice("history layout", history, "per-weight", "flat", "newest")
        check_choice("normalisation", normalize, "layer-rms", "none")
        check_choice("balance", balance, "keep-mean", "layer-rms", "none")
        flat, sequence = history == "flat", "the flat history, where a layer is one sequence: use --history per-weight"
        if hyper_sample is None:
            hyper_sample = 1.0 if flat else 0.125
        for wrong, what in (
            (not 0 <= beta <= 1, f"beta is the weight of the slow gradient and must lie in [0, 1]; it is {beta}"),
            (not 0 < hyper_sample <= 1, f"hyper_sample must be above 0 and at most 1; it is {hyper_sample}"),
            (flat and hgs == "lstm", f"an LSTM cannot run over {sequence}, or --hgs mamba"),
            (flat and hyper_sample < 1, f"a sample of weights cannot be taken from {sequence}, or --hyper-sample 1"),
            (length < 1, f"length, the number of gradients in the history, must be at least 1; it is {length}"),
        ):
            if wrong:
                raise ValueError(what)
        super().__init__(layers, length, whole_layers=flat)
        self.beta, self.layout, self.normalize, self.balance = beta, history, normalize, balance
        self.lr_fast, self.lr_slow = lr_fast, lr_slow
        seed = torch.tensor(torch.initial_seed() % 2**31, device=self.latent.device)
        self.shard.broadcast([seed])  # all processes draw the same sample
        self.hyper_sample, self.sample_seed = hyper_sample, int(seed)
        self.sampler = Sampler(self.shard, hyper_sample) if hyper_sample < 1 else None
        self.fast = fast_net(self.kind, hidden, fast_act)
        self.slow = SlowMamba(d_state, d_conv, expand, scan) if hgs == "mamba" else SlowLSTM(hidden)
        self.lre = nn.Embedding(len(layers), 1) if lre else None
        if balance != "none":  # begin along the gradient
            if hgs == "mamba":
                self.slow.start_positive(length + lre)
            elif balance == "keep-mean" and normalize == "layer-rms":
                self.slow.start_along(length + lre)  # with an output of 0 the slow term would be the history's mean
            if lre:
                nn.init.zeros_(self.lre.weight)
            # The balance divides out all that an MLP of one or two factors could learn where W̃ >= 0.
            self.fast.requires_grad_(not (self.fast.collapses and self.kind == "dorefa"))
        self.start()
        if selective_scan is None and self.latent.dtype == torch.float32 and self.backend() == "reference" != scan:
            files = "selective_scan.py, selective_scan_cpu.cpp and selective_scan_triton.py"
            warnings.warn(f"copy {files} beside hypernet.py: without them Mamba is many times slower", stacklevel=2)

    def parameter_groups(self) -> list[dict]:
        slow = [*self.slow.parameters(), *(() if self.lre is None else self.lre.parameters())]
        return [{"params": list(self.fast.parameters()), "lr": self.lr_fast}, {"params": slow, "lr": self.lr_slow}]

    def gradient(self, seen: Seen) -> Tensor:
        """G = D ⊙ ((1 − β)·fast + β·slow): [n], with its graph to φ."""
        fast, slow = self.fast_gradient(seen), self.slow_gradient(seen)
        return seen.D * ((1 - self.beta) * fast + self.beta * slow)

    def fast_gradient(self, seen: Seen) -> Tensor:
        """ĝ ⊙ MLP(W̃): [n]."""
        gain = self.fast(seen.pre)
        if self.balance == "none":
            return seen.ghat * gain
        return _Balanced.apply(seen.ghat * gain.abs(), seen, self.shard)

    def slow_gradient(self, seen: Seen) -> Tensor:
        """SlowNet(LRE, history), with `balance` applied: [n]."""
        slow = self.slow_output(seen) if seen.slow is None else seen.slow
        if self.normalize == "layer-rms":
            slow = slow * seen.history_rms.index_select(0, seen.layer_of)
        if self.balance == "none":
            return slow
        slow = _Balanced.apply(slow * signs(seen.ghat), seen, self.shard)
        if self.balance == "keep-mean":
            mean = seen.history.mean(0) / seen.history_rms.index_select(0, seen.layer_of)
            square = self.shard.all_reduce(per_layer(mean.square(), seen.sizes, seen.lengths)).clamp_min(SMALLEST)
            slow = slow + component(seen.ghat - slow.detach(), mean, square, seen, self.shard)
            if slow.requires_grad:  # φ does not change that component. (A hook with self would keep it in memory.)
                slow.register_hook(lambda g, shard=self.shard: g - component(g, mean, square, seen, shard))
            slow = _Balanced.apply(slow, seen, self.shard)
        return slow

    def slow_output(self, seen: Seen, known: Tensor | None = None) -> Tensor:
        """The slow-net's outputs for its normalised inputs: [n]. known: see SlowMamba.last."""
        past, lre = seen.history, None if self.lre is None else self.lre.weight[:, 0]  # [l, n], [layers]
        if self.balance != "none":
            past = past * signs(seen.ghat)
        if self.normalize == "layer-rms":
            past = past / seen.history_rms.index_select(0, seen.layer_of)
        if self.layout == "flat":
            here = [i for i, size in enumerate(seen.sizes) if size]  # one sequence per layer
            first = None if lre is None else lre[here[0] : here[-1] + 1]
            return self.slow.tails(past, [seen.sizes[i] for i in here], first)
        if lre is not None:
            token = _Spread.apply(lre, seen.layer_of, seen.sizes, seen.lengths)  # each weight's embedding
            past = torch.cat([token.unsqueeze(0), past])  # [1 + l, n]
        return self.slow.last(past.T.unsqueeze(-1), known)  # one sequence per weight: [n, 1 + l, 1] -> [n]

    def seen(self, D: Tensor, pre: Tensor) -> Seen:
        return super().seen(D, pre)._replace(history_rms=self.rms(self.history), ghat_rms=self.rms(self.history[-1:]))

    def push(self, new: Tensor) -> None:
        super().push(new)
        if self.layout == "newest":
            self.history[:-1] = 0

    def make(self, D: Tensor, pre: Tensor) -> Tensor:
        if self.hyper_sample == 1:
            return super().make(D, pre)
        self.sample, every = self.sampler.draw(self.sample_seed + self.t, D.device), self.seen(D, pre)
        every = every._replace(slow=self.slow_output(every))
        with torch.enable_grad():  # these outputs again, with their graph
            some = self.sample.of(every)
            self.last_G = self.gradient(some._replace(slow=self.slow_output(some, known=some.slow)))
        return self.gradient(every)

    def terms(self) -> tuple[Tensor, ...]:
        if self.t < 2:
            return ()  # G_1 is the straight-through gradient
        seen = self.seen(*self.calibrate())
        return (1 - self.beta) * seen.D * self.fast_gradient(seen), self.beta * seen.D * self.slow_gradient(seen)

    def backend(self) -> str:
        """The scan that the slow-net runs, see SlowMamba.backend; 'nn.LSTM' for an LSTM."""
        return self.backend_and_why().split(" (")[0]

    def backend_and_why(self) -> str:
        """`backend()`, with the reason if `scan='auto'` could not take the fused scan."""
        if isinstance(self.slow, SlowLSTM):
            return "nn.LSTM"
        tokens = None if self.layout == "flat" else self.length + (self.lre is not None)
        tensors = self.latent.device, self.latent.dtype, tokens
        backend = self.slow.backend(*tensors)
        return backend if backend in ("fused", self.slow.scan) else f"{backend} ({self.slow.why_not_fused(*tensors)})"


# ---------------------------------------------------------------------------------------------------------------------
# Besides the equations: sums per layer, balancing, sampling, several processes, memory.


def per_layer(x: Tensor, sizes: list[int], lengths: Tensor, reduce: str = "sum") -> Tensor:
    """The sum or the maximum of each layer's part of x [n] (for "max", x >= 0): [layers].

    sizes, and lengths on the device of x: the number of elements of each layer.
    """
    if x.is_cuda:  # one kernel for all layers
        return torch.segment_reduce(x.detach(), reduce, lengths=lengths, unsafe=True)
    parts = x.detach().split(sizes)  # torch.sum is more precise than segment_reduce here, which adds in order
    return torch.stack([p.sum() if reduce == "sum" or not p.numel() else p.amax() for p in parts])


def check_choice(name: str, value: str, *known: str) -> None:
    """Raise ValueError if `value` is not one of the known names of what `name` says."""
    if value not in known:
        raise ValueError(f"no {name} is called {value!r}: use {', '.join(known[:-1])} or {known[-1]}")


def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """torch.where(condition, x, y); x or y itself where the condition is one answer that need not be waited for."""
    known = condition.dim() == 0 and condition.device.type == "cpu"
    return (x if condition else y) if known else torch.where(condition, x, y)


class _Spread(torch.autograd.Function):
    """values [layers] -> values[layer_of] [n], with a fast backward pass."""

    @staticmethod
    def forward(ctx, values: Tensor, layer_of: Tensor, sizes: list[int], lengths: Tensor) -> Tensor:
        ctx.sizes, ctx.lengths = sizes, lengths
        return values.index_select(0, layer_of)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return per_layer(grad, ctx.sizes, ctx.lengths), None, None, None


class _Balanced(torch.autograd.Function):
    """y = term ⊙ target / RMS(term), the RMS of each layer; target is the RMS of ĝ_t in the layer.

    The factor is at most 1000, so that a term that is 0 (the LSTM at its start) gives 0 and finite gradients.
    Backward: ∂/∂term = factor·(g − y·⟨g, y⟩ / ⟨y, y⟩), because y cannot change along itself.
    """

    @staticmethod
    def forward(ctx, term: Tensor, seen: Seen, shard: "Shard") -> Tensor:
        target = seen.ghat_rms
        sums = torch.stack([per_layer(term.square(), seen.sizes, seen.lengths), seen.lengths.to(term.dtype)])
        square, count = shard.all_reduce(sums)
        rms, least = (square / count.clamp_min(1)).sqrt(), 1e-3 * target
        there = target > SMALLEST  # otherwise ĝ counts as 0: the term is 0 and has no gradient
        scale = torch.where(there, target / torch.maximum(rms, least), 0)
        y = term * scale.index_select(0, seen.layer_of)
        # ⟨y, y⟩ of each layer; infinite where the factor is at its limit, which switches the projection off.
        energy = torch.where(there & (rms > least), target.square() * count, math.inf)
        ctx.save_for_backward(y, scale, energy)
        ctx.seen, ctx.shard = seen, shard
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (y, scale, energy), seen = ctx.saved_tensors, ctx.seen
        term = (grad - component(grad, y, energy, seen, ctx.shard)) * scale.index_select(0, seen.layer_of)
        return term, None, None


def component(x: Tensor, direction: Tensor, square: Tensor, seen: Seen, shard: "Shard") -> Tensor:
    """The component of x [n] along `direction` [n] in each layer. square [layers]: ⟨direction, direction⟩."""
    dot = shard.all_reduce(per_layer(x * direction, seen.sizes, seen.lengths))
    return direction * (dot / square).index_select(0, seen.layer_of)


def signs(x: Tensor) -> Tensor:
    """+1 where x >= 0, else −1; of the type of x."""
    return x.detach().clone().ge_(0).mul_(2).sub_(1)


class Sample(NamedTuple):
    """Some of this process's weights."""

    at: Tensor  # [n] which weights, ascending
    stands_for: Tensor  # [n] how many weights each of them stands for
    layer_of: Tensor  # [n] the number of each weight's layer
    sizes: list[int]  # how many of the n weights each layer has
    lengths: Tensor  # `sizes` as a tensor

    def of(self, seen: Seen) -> Seen:
        """The sampled weights of `seen`."""
        history, slow = seen.history[:, self.at], None if seen.slow is None else seen.slow[self.at]
        rows = {"D": seen.D[self.at], "pre": seen.pre[self.at], "ghat": history[-1], "history": history, "slow": slow}
        return seen._replace(**rows, layer_of=self.layer_of, sizes=self.sizes, lengths=self.lengths)


class Sampler:
    """Draws stratified samples: each layer is cut into equal intervals, and one weight of each interval is drawn.

    shard: the weights of this process. share: the fraction of the weights in a sample, which has at least one weight of
        each layer that is not empty.
    """

    def __init__(self, shard: "Shard", share: float):
        counts = torch.tensor(shard.counts, dtype=torch.float64, device="cpu")
        draws = (share * counts).round().clamp_min(1).minimum(counts).long()
        ends, of_layer = counts.cumsum(0), torch.arange(len(counts), device="cpu").repeat_interleave(draws)
        place = (of_layer >= 0).cumsum(0) - 1 - (draws.cumsum(0) - draws)[of_layer]  # 0, 1, … within the layer
        self.width = (counts / draws)[of_layer]
        self.begin = (ends - counts)[of_layer] + place * self.width
        self.most, self.of_layer, self.shard = ends[of_layer] - 1, of_layer, shard

    def draw(self, seed: int, device: torch.device) -> Sample:
        """The sample of a seed. It is drawn on the CPU: it does not depend on the device, and its sizes are known."""
        random = torch.empty_like(self.width).uniform_(generator=torch.Generator().manual_seed(seed))
        at = (self.begin + random * self.width).clamp_max(self.most).long()
        mine = slice(*torch.searchsorted(at, at.new_tensor([self.shard.begin, self.shard.end])).tolist())
        of_layer = self.of_layer[mine]
        lengths = of_layer.bincount(minlength=len(self.shard.counts))
        tensors = at[mine] - self.shard.begin, self.width[mine].float(), of_layer
        there = lambda x: (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
        return Sample(*map(there, tensors), lengths.tolist(), there(lengths))


class Shard:
    """A process's part of all weights: the slice [begin, end) of all layers' weights in order. One process has all.

    counts: the number of weights in each layer. sizes: how many of them this process has.
    whole_layers: no layer is divided between processes. Raises ValueError if a process would get no weight.
    """

    def __init__(self, counts: list[int], sharded: bool, whole_layers: bool):
        several = sharded and dist.is_available() and dist.is_initialized()
        self.world_size, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
        self.counts, self.count = counts, sum(counts)
        ends = [0, *itertools.accumulate(counts)]
        cuts = [self.count * r // self.world_size for r in range(self.world_size + 1)]
        if whole_layers:
            cuts = [min(ends, key=lambda end, cut=cut: abs(end - cut)) for cut in cuts]
        if len(set(cuts)) <= self.world_size:
            what = f"{len(counts)} layers of {self.count} weights cannot be divided between {self.world_size} processes"
            raise ValueError(f"{what}: use fewer of them" + ", or --history per-weight" * whole_layers)
        self.rank_counts = [b - a for a, b in itertools.pairwise(cuts)]  # weights of each process
        self.begin, self.end = cuts[rank], cuts[rank + 1]
        self.sizes = [max(0, min(b, self.end) - max(a, self.begin)) for a, b in itertools.pairwise(ends)]

    def all_gather(self, part: Tensor, axis: int = 0) -> Tensor:
        """All processes' parts, joined along `axis`."""
        if self.world_size == 1:
            return part
        part = part.movedim(axis, 0)
        padded = part.new_zeros(max(self.rank_counts), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in self.rank_counts]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, self.rank_counts, strict=True)]).movedim(0, axis).contiguous()

    def all_reduce(self, x: Tensor, how: str = "SUM") -> Tensor:
        """The sum of all processes' tensors, or with "MAX" their elementwise maximum, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, getattr(dist.ReduceOp, how))
        return x

    def broadcast(self, tensors) -> None:
        """Give all processes rank 0's tensors, in place."""
        for p in tensors if self.world_size > 1 else ():
            dist.broadcast(p.detach(), 0)


# Memory. N is 270,000 for a ResNet-20, and a Mamba of the paper's size has 1,600 state elements per token. So the nets
# above run chunk by chunk, and compute the tensors of a chunk again in the backward pass. (torch.utils.checkpoint does
# so too, but the small tensors that it keeps between large freed blocks fragment the CPU's heap by gigabytes.)


def elements_at_once(device: torch.device) -> int:
    """About how many elements the largest tensors of a chunk may have: what fits a CPU's caches, or fills a GPU."""
    return 2**21 if device.type == "cpu" else 2**27


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, size, count, *tensors):
        inputs, out = tensors[:count], None  # then the parameters that `function` uses
        for i in range(0, max(1, len(inputs[0])), size):  # at least one chunk, so that there is an output
            part = function(*(x[i : i + size] for x in inputs))
            out = part.new_empty(len(inputs[0]), *part.shape[1:]) if out is None else out
            out[i : i + size] = part
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.size, ctx.count = function, size, count
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = ctx.needs_input_grad[3:]
        grads = [torch.zeros_like(t) if w else None for t, w in zip(ctx.saved_tensors, wanted, strict=True)]
        for i in range(0, len(inputs[0]), ctx.size):
            at = slice(i, i + ctx.size)
            chunk = [x[at].detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=False)]
            with torch.enable_grad():
                part = ctx.function(*chunk)
            sources = [t for t, w in zip([*chunk, *parameters], wanted, strict=True) if w]
            found = iter(torch.autograd.grad(part, sources, grad[at], allow_unused=True, materialize_grads=True))
            for k, total in enumerate(grads):
                if total is not None:
                    (total[at] if k < ctx.count else total).add_(next(found))
        return None, None, None, *grads


def in_chunks(function, size: int, parameters, *inputs: Tensor) -> Tensor:
    """torch.cat([function(*chunk) for each chunk of `size` rows of the inputs]), in the memory of one chunk.

    parameters: the tensors that `function` uses besides its arguments and that may need a gradient.
    """
    return _InChunks.apply(function, max(1, size), len(inputs), *inputs, *parameters)
