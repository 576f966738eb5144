"""Weight and activation quantizers: one short function per paper, the gradient beside the forward.

Copy this file alone, or with models.py.

Notation, as in all files here: W is a layer's latent (full-precision) weight, the one the optimizer moves;
A(W) = W̃ is the *pre-quantized* weight; Ŵ = Q(W̃) is the binary weight that the layer computes with;
D = ∂Ŵ/∂W, taken straight through Q (as if Q were the identity), is the *calibration*.

Most weight quantizers hand the incoming gradient ∂L/∂Ŵ to the latent weight unchanged. So after `loss.backward()` a
latent weight's `.grad` is ĝ = ∂L/∂Ŵ, and whoever updates the weight decides what to make of it: D ⊙ ĝ is the classical
straight-through estimator (STE); FSG learns something else (hypernet.py). The exceptions are BNN's, BNN+'s and BNN++'s
quantizers, whose backward pass is part of the method; their docstrings say what it is.
sign(0) is +1 everywhere, so a binary weight is never 0 (a pruned one may be: `bihalf_prune`).
"""

import math

import torch
from torch import Tensor


def _signs(x: Tensor) -> Tensor:
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)


class _Sign(torch.autograd.Function):
    """Forward: +1 where x ≥ 0, else −1. Backward: the identity."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _signs(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _ScaledSign(torch.autograd.Function):
    """Forward: scale · sign(x). Backward: the identity in x."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        return torch.where(x >= 0, scale, -scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SignWithCut(torch.autograd.Function):
    """Forward: +1 where x ≥ 0, else −1. Backward: the gradient passes where |x| ≤ 1 and is 0 elsewhere."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)
        return _signs(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return grad * inside


# ---------------------------------------------------------------------------------------------------------------------
# Weights. w is one layer's latent weight, of any shape; the result has the same shape.


def sign(w: Tensor) -> Tensor:
    """Ŵ = sign W ∈ {−1, +1}, sign(0) = +1; ∂L/∂W := ∂L/∂Ŵ. BinaryConnect (Courbariaux et al., NeurIPS 2015)."""
    return _Sign.apply(w)


def dorefa(w: Tensor) -> Tensor:
    """1-bit DoReFa: Ŵ = 2·round(A(W)) − 1 with A(W) = tanh W / (2 max|tanh W|) + ½; ∂L/∂W := ∂L/∂Ŵ.

    DoReFa-Net (Zhou et al., 2016), eq. 9 with k = 1. A maps the layer onto [0, 1] and keeps every sign, so rounding it
    is nothing but the sign of W, and that is what is computed. What DoReFa adds to `sign` is in the gradient: its
    W̃ = A(W) and D = 2 ∂A/∂W (see `pre_quantize` and `calibration`), which a gradient generator uses.
    """
    return _Sign.apply(w)


def bwn_f(w: Tensor) -> Tensor:
    """Ŵ = α_f · sign W with the scale α_f = mean|W| of each filter (dimension 0), held constant in the backward pass.

    Binary-Weight-Network (Rastegari et al., XNOR-Net, ECCV 2016), eq. 6; ∂L/∂W := ∂L/∂Ŵ.
    """
    scale = w.detach().abs().reshape(len(w), -1).mean(dim=1).view(-1, *[1] * (w.dim() - 1))
    # The scale multiplies the *value* only: the product rule would also multiply the gradient by it.
    return _ScaledSign.apply(w, scale)


# Equal Bits (Li, Pintea, van Gemert, AAAI 2022): the share of +1 is prescribed, not learned.


class _Ranked(torch.autograd.Function):
    """Forward: of each row of w [rows, n], the `low` smallest become −1, the `high` largest +1, and those between 0.
    Backward: the identity."""

    @staticmethod
    def forward(ctx, w: Tensor, low: int, high: int) -> Tensor:
        # A selection costs a fifth of sorting. topk takes exactly as many as it is told, also among equal weights.
        values, at = w.topk(w.shape[1] - low, sorted=False)
        if values.shape[1] == high:
            return torch.full_like(w, -1).scatter_(1, at, 1.0)
        largest = at.gather(1, values.topk(high, sorted=False).indices)
        return torch.full_like(w, -1).scatter_(1, at, 0.0).scatter_(1, largest, 1.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def _floor(x: float) -> int:
    """⌊x⌋ for an x that is a whole number but for rounding: (1 − 0.9)·10 is 0.9999999999999998."""
    return math.floor(x + 1e-12 * max(1.0, x))


def bihalf(w: Tensor, ratio: float = 0.5) -> Tensor:
    """Per filter (dimension 0) the share `ratio` of largest weights becomes +1, the rest −1; ∂L/∂W := ∂L/∂Ŵ.

    Equal Bits, eqs. 4 to 7: the optimal transport of a filter's n latent weights onto a Bernoulli prior. In one
    dimension transport keeps the order, so it is a matter of ranks: the n_minus = ⌊(1 − ratio)·n⌋ smallest become −1.
    With ratio ½ (bi-half) the bits have the greatest entropy. Of equal weights any may be chosen, but exactly n_minus.
    Raises ValueError for a ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the ratio is a filter's share of +1, in [0, 1]; it is {ratio}")
    rows = w.reshape(len(w), -1)
    low = _floor((1 - ratio) * rows.shape[1])
    return _Ranked.apply(rows, low, rows.shape[1] - low).view_as(w)


def bihalf_prune(w: Tensor, prune: float) -> Tensor:
    """Per filter (dimension 0) the share `prune` in the middle becomes 0, what is below −1, above +1; ∂L/∂W := ∂L/∂Ŵ.

    Equal Bits, section "bi-half with pruning". Of n ranks 0 … n − 1: below i = ⌊(1 − prune)/2·n⌋ −1, from i to j − 1
    with j = ⌊(1 + prune)/2·n⌋ 0, from j on +1. Raises ValueError for a prune outside [0, 1].
    """
    if not 0 <= prune <= 1:
        raise ValueError(f"prune is a filter's share of zeros, in [0, 1]; it is {prune}")
    rows = w.reshape(len(w), -1)
    n = rows.shape[1]
    low, first_plus = _floor((1 - prune) / 2 * n), _floor((1 + prune) / 2 * n)
    return _Ranked.apply(rows, low, n - first_plus).view_as(w)


# ---------------------------------------------------------------------------------------------------------------------
# ProxConnect++ (Lu, Yu, Li, Partovi Nia, NeurIPS 2023): a forward quantizer F, and a backward one B, so that the latent
# weight w gets B(w) ⊙ ∂L/∂F(w).


class _SignSwish(torch.autograd.Function):
    """Forward: SS_μ(x), or sign x. Backward: times SS′_μ(x)."""

    @staticmethod
    def forward(ctx, x: Tensor, mu, hard: bool) -> Tensor:
        mu = torch.as_tensor(mu, dtype=x.dtype, device=x.device)
        ctx.save_for_backward(x, mu)
        if hard:
            return _signs(x)
        z = (mu * x).clamp_(-1e3, 1e3)  # where both formulas are at their limits
        t = torch.tanh(z / 2)  # 2σ(z) − 1
        return t + z * (1 - t * t) / 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        x, mu = ctx.saved_tensors
        z = (mu * x).abs_().clamp_max_(1e3)  # SS′ is even
        e = torch.exp(-z)  # 1 / (1 + cosh z) = 2e / (1 + e)², which never overflows
        return grad * (mu * (2 - z * torch.tanh(z / 2)) * 2 * e / (1 + e).square()), None, None


def sign_swish(x: Tensor, mu: float | Tensor) -> Tensor:
    """BNN++: F = SS_μ, B = SS′_μ, with SS_μ(x) = 2σ(μx)·(1 + μx(1 − σ(μx))) − 1, the sign-Swish, which tends to sign.

    SS′_μ(x) = μ(2 − μx·tanh(μx/2)) / (1 + cosh μx). Past |μx| ≈ 2.4 it is negative: SS overshoots ±1 a little.
    """
    return _SignSwish.apply(x, mu, False)


def sign_with_swish_gradient(x: Tensor, mu: float | Tensor = 5.0) -> Tensor:
    """BNN+ (Darabi et al., 2018): F = sign, B = SS′_μ (see `sign_swish`)."""
    return _SignSwish.apply(x, mu, True)


def sign_with_cut(w: Tensor) -> Tensor:
    """BNN (Hubara et al., NeurIPS 2016): F = sign, B = 1 where |w| ≤ 1, else 0."""
    return _SignWithCut.apply(w)


class _LinearQuantizer(torch.autograd.Function):
    """Forward: L_ρ(w). Backward: the identity."""

    @staticmethod
    def forward(ctx, w: Tensor, rho) -> Tensor:
        size = (w.abs() + rho).clamp_max_(1.0)
        return torch.where(w >= 0, size, -size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def linear_quantizer(w: Tensor, rho: float | Tensor) -> Tensor:
    """ProxConnect (Dockhorn et al., NeurIPS 2021): F = L_ρ, B = 1, with L_ρ(w) = sign(w)·min(1, |w| + ρ).

    The proximal map of the distance to {−1, +1}, with equal horizontal and vertical shifts. Between the clipped
    identity, ρ → 0, and sign, ρ ≥ 1.
    """
    return _LinearQuantizer.apply(w, rho)


def identity(w: Tensor) -> Tensor:
    """F = the identity, B = 1: full precision."""
    return w


# By name, as layers of models.py know them. What stands behind w (ratio, mu, …) is the layer's `options`.
WEIGHT_QUANTIZERS = {
    **{"dorefa": dorefa, "bwn": sign, "bwn-f": bwn_f, "bihalf": bihalf, "bihalf-prune": bihalf_prune},
    **{"bnn": sign_with_cut, "bnn+": sign_with_swish_gradient, "bnn++": sign_swish, "pc": linear_quantizer},
    "identity": identity,
}


def pre_quantize(w: Tensor, kind: str) -> Tensor:
    """W̃ = A(W), the value that is rounded to a bit (MetaQuant, NeurIPS 2019, section 2.1).

    kind 'dorefa': tanh W / (2 max|tanh W|) + ½, in [0, 1], the maximum taken over the layer (½ everywhere if W is 0).
    kind 'bwn' and 'bwn-f': W itself. Raises ValueError for another kind.
    """
    if kind == "dorefa":
        t = torch.tanh(w)
        return t / (2 * t.abs().max().clamp_min(torch.finfo(w.dtype).tiny)) + 0.5
    if kind in ("bwn", "bwn-f"):
        return w
    raise ValueError(f"no weight quantizer is called {kind!r}: use one of {', '.join(WEIGHT_QUANTIZERS)}")


def calibration(w: Tensor, kind: str) -> Tensor:
    """D = ∂Ŵ/∂W taken straight through the rounding, the layer's maximum held constant; same shape as w.

    kind 'dorefa': (1 − tanh² W) / max|tanh W|. kind 'bwn' and 'bwn-f': 1. Raises ValueError for another kind.
    """
    if kind == "dorefa":
        t = torch.tanh(w)
        return (1 - t.square()) / t.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
    if kind in ("bwn", "bwn-f"):
        return torch.ones_like(w)
    raise ValueError(f"no weight quantizer is called {kind!r}: use one of {', '.join(WEIGHT_QUANTIZERS)}")


# ---------------------------------------------------------------------------------------------------------------------
# Activations.


def sign_activation(x: Tensor) -> Tensor:
    """a = sign x ∈ {−1, +1}, sign(0) = +1; the gradient passes where |x| ≤ 1 (hard-tanh estimator).

    Binarized Neural Networks (Hubara et al., NeurIPS 2016), eq. 4. Mind what stands in front of it: after a ReLU every
    input is ≥ 0, and every output +1.
    """
    return _SignWithCut.apply(x)


class _Step(torch.autograd.Function):
    """Forward: 1 where y ≥ 0, else 0. Backward: the gradient passes where −ρ < y < 1 and is 0 elsewhere."""

    @staticmethod
    def forward(ctx, y: Tensor, rho: float) -> Tensor:
        ctx.save_for_backward((y > -rho) & (y < 1))
        return (y >= 0).to(y.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def step_activation(x: Tensor, theta: Tensor, delta: Tensor, rho: float) -> Tensor:
    """a = 1 where y ≥ 0, else 0, with y = (x − θ)·Δ; the gradient passes where −ρ < y < 1.

    Si-BNN (Wang et al., AAAI 2020), eqs. 5 to 9. θ and Δ (broadcast against x, one number a channel) are trained: θ
    moves the threshold, Δ the width of the window through which the gradient passes. The window is that of a ReLU
    clipped at 1, of which the step is a 1-bit version; ρ in [0, 1] lets inputs just below the threshold learn too.
    A channel that is 0 costs nothing at inference, hence "sparsity-inducing".
    """
    return _Step.apply((x - theta) * delta, rho)


# By name. 'si' is `step_activation`, whose θ and Δ belong to a layer (models.py).
ACTIVATION_QUANTIZERS = {"none": identity, "sign": sign_activation, "si": step_activation}
