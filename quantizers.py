"""Weight and activation quantizers of binary neural networks: one short function per paper.

    w = torch.randn(16, 3, 3, 3, requires_grad=True)
    bits = dorefa(w)                  # same shape, every element is -1 or +1
    bits.sum().backward()             # w.grad is the gradient with respect to `bits`

Copy this file alone (it needs torch and einops), or together with binarize.py.

Notation of all files:

    W                the latent, full-precision weight of a layer; the optimizer updates it
    W̃ = A(W)         the pre-quantized weight
    Ŵ = Q(W̃)         the binary weight; the layer computes with it
    ĝ = ∂L/∂Ŵ        the gradient at the binary weight
    D = ∂Ŵ/∂W        the calibration, computed as if Q were the identity

Q has a derivative of 0 almost everywhere, so every function here replaces its gradient. Most weight quantizers pass
the gradient to W unchanged: after `loss.backward()` the parameter's `.grad` is ĝ. The classical straight-through
estimator (STE) then updates W with D ⊙ ĝ, and FSG generates another gradient from ĝ. The quantizers of BNN, BNN+, BNN++
and Si-BNN change the gradient, as their docstrings say.

sign(0) = +1, so a binary weight is never 0. The exceptions are `bihalf_prune`, which makes zeros, and `sibnn`, in which
sign(0) = 0 as in the authors' code. In the authors' codes of Equal Bits and MetaQuant, sign(0) = 0 too.
"""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# What the quantizers share.


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def _transformed() -> bool:
    """Whether a tracer, a compiler or torch.func runs, which need functions without writes and without _Masked."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced or torch._C._are_functorch_transforms_active()


def straight_through(x: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return `value`, whose gradient goes to x unchanged, or multiplied by `mask`.

    The straight-through estimator: Bengio et al., 2013, https://arxiv.org/abs/1308.3432. All three tensors have the
    same shape. `value` and `mask` receive no gradient.
    """
    if _transformed():
        zero = (x - x.detach()).nan_to_num()  # 0 where x is infinite too
        return value.detach() + (zero if mask is None else zero * mask)
    if mask is not None:
        return _Masked.apply(x, value, mask)
    out = x.clone()
    out.detach().copy_(value)  # autograd does not see it, so the gradient of `out` still goes to x
    return out


def _signs(x: Tensor) -> Tensor:
    """The signs of x, written over x itself, a new tensor. Their gradient goes where that of x goes."""
    if _transformed():
        return straight_through(x, (x >= 0).to(x.dtype).mul_(2).sub_(1))
    x.detach().ge_(0).mul_(2).sub_(1)  # without a tensor of bool, which would take several times as long
    return x


def per_filter(values: Tensor, w: Tensor) -> Tensor:
    """values [C_out], one per filter -> [C_out, 1, ..., 1] with as many dimensions as w, so that they broadcast."""
    return rearrange(values, "f -> f" + " 1" * (w.dim() - 1))


def _mean_of_each_filter(w: Tensor) -> Tensor:
    return rearrange(w, "f ... -> f (...)").mean(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Weights. w is the latent weight of one layer, [C_out, ...]; dimension 0 counts the filters. The result has its shape.


def sign(w: Tensor) -> Tensor:
    """BinaryConnect: the sign of every weight.

        Ŵ = +1 where W ≥ 0, else −1
        ∂L/∂W := ∂L/∂Ŵ

    Courbariaux et al., NeurIPS 2015, eq. 1, https://arxiv.org/abs/1511.00363
    """
    return _signs(w.clone())


def dorefa(w: Tensor) -> Tensor:
    """DoReFa-Net with 1-bit weights.

        A(W) = tanh(W) / (2 max|tanh(W)|) + ½          the maximum is taken over the layer
        Ŵ = 2 round(A(W)) − 1 = sign(W)
        ∂L/∂W := ∂L/∂Ŵ

    A maps the layer to [0, 1], and A(W) ≥ ½ exactly where W ≥ 0. So the rounded value is the sign, and the function
    computes the sign. (At W = 0 the formula rounds ½; here the result is +1.) DoReFa differs from `sign` in its
    gradient with respect to W, which is D ⊙ ĝ: see `calibration`.

    Zhou et al., 2016, eq. 9, https://arxiv.org/abs/1606.06160
    """
    return _signs(w.clone())


def bwn_f(w: Tensor) -> Tensor:
    """Binary-Weight-Network: the sign, times one scale per filter.

        α_f = mean|W_f|
        Ŵ_f = α_f sign(W_f)
        ∂L/∂W := ∂L/∂Ŵ

    The backward pass treats α as a constant, and does not multiply the gradient by it.

    Rastegari et al. (XNOR-Net), ECCV 2016, section 3.1, eq. 6, https://arxiv.org/abs/1603.05279
    """
    scale = per_filter(_mean_of_each_filter(w.detach().abs()), w)
    return straight_through(w, torch.where(w >= 0, scale, -scale))


def bwn_l(w: Tensor) -> Tensor:
    """MetaQuant's BWN: the sign, times one scale per layer.

        α = mean|W|
        Ŵ = α sign(W)
        ∂L/∂W := ∂L/∂Ŵ

    The backward pass treats α as a constant, and does not multiply the gradient by it.

    Chen et al. (MetaQuant), NeurIPS 2019,
    https://papers.nips.cc/paper_files/paper/2019/hash/f8e59f4b2fe7c5705bf878bbd494ccdf-Abstract.html
    """
    scale = w.detach().abs().mean()
    return straight_through(w, torch.where(w >= 0, scale, -scale))


def parq(w: Tensor, inverse_slope: float | Tensor = 0.0) -> Tensor:
    """PARQ with 1 bit: the proximal map of a piecewise affine regularizer, which becomes steeper during training.

        α_f = mean|W_f|                              the mean over filter f; constant in the backward pass
        Ŵ_f = clip(W_f / r, −α_f, α_f)               α_f sign(W_f) where r = 0
        ∂L/∂W := ∂L/∂Ŵ

    inverse_slope: r in [0, 1]; it may be a 0-dimensional tensor.

    Jin et al., ICML 2025, https://arxiv.org/abs/2503.15748
    """
    u = w.detach()
    scale = per_filter(_mean_of_each_filter(u.abs()), u)
    magnitude = torch.where(u.abs() < inverse_slope * scale, u.abs() / inverse_slope, scale)
    return straight_through(w, torch.where(u >= 0, magnitude, -magnitude))


def sibnn(w: Tensor) -> Tensor:
    """Si-BNN: the values of `bwn_f`, with a gradient that passes through the scale as well.

        α_f = mean|W_f|                                              n weights in filter f
        Ŵ_f = α_f sign(W_f)                                          sign(0) = 0
        ∂L/∂W_f := (1 − 1/n) ĝ_f + sign(W_f) mean(sign(W_f) ĝ_f)     the first term is 0 where |W| > 1

    Clamp W to [−1, 1] after each step of the optimizer, as Si-BNN does. Then the first term is never 0 for this reason.

    The rule is that of the authors' code, https://github.com/peiswang/SiBNN.
    Wang et al., AAAI 2020, https://doi.org/10.1609/aaai.v34i07.6900
    """
    return _SiBNN.apply(w)


class _SiBNN(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor) -> Tensor:
        return w.sign() * per_filter(_mean_of_each_filter(w.abs()), w)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        signs, n = w.sign(), w[0].numel()
        through_the_scale = signs * per_filter(_mean_of_each_filter(signs * grad), w)
        return torch.where(w.abs() <= 1, grad * (1 - 1 / n), 0) + through_the_scale


def bihalf(w: Tensor, ratio: float = 0.5) -> Tensor:
    """Equal Bits: in every filter, the fraction `ratio` of largest weights becomes +1, the others −1.

        Ŵ_f = −1 for the ⌊(1 − ratio) n⌋ smallest of the n weights of a filter, +1 for the others
        ∂L/∂W := ∂L/∂Ŵ

    This is the optimal transport of a filter's weights onto a Bernoulli distribution. In one dimension transport keeps
    the order, so only the ranks of the weights matter. With ratio ½ (bi-half) the bits have the largest entropy.
    Between equal weights the choice is arbitrary, but the counts are exact.

    Raises ValueError if ratio is outside [0, 1].

    Li et al., AAAI 2022, eqs. 4 to 7, https://arxiv.org/abs/2112.03406
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is the fraction of +1 in a filter and must be in [0, 1]; it is {ratio}")
    n = w[0].numel()
    minus = _floor((1 - ratio) * n)
    return straight_through(w, _by_rank(w.detach(), minus=minus, plus=n - minus))


def bihalf_prune(w: Tensor, prune: float) -> Tensor:
    """Equal Bits with pruning: in every filter, the fraction `prune` of the weights, in the middle, becomes 0.

        i = ⌊(1 − prune)/2 · n⌋,  j = ⌊(1 + prune)/2 · n⌋
        Ŵ_f = −1 for the i smallest of the n weights of a filter, +1 for the n − j largest, 0 for the others
        ∂L/∂W := ∂L/∂Ŵ

    The products are rounded down exactly. The authors' code rounds them in floating point and can be one off.

    Raises ValueError if prune is outside [0, 1].

    Li et al., AAAI 2022, section on bi-half with pruning, https://arxiv.org/abs/2112.03406
    """
    if not 0 <= prune <= 1:
        raise ValueError(f"prune is the fraction of zeros in a filter and must be in [0, 1]; it is {prune}")
    n = w[0].numel()
    i, j = _floor((1 - prune) / 2 * n), _floor((1 + prune) / 2 * n)
    return straight_through(w, _by_rank(w.detach(), minus=i, plus=n - j))


def _by_rank(w: Tensor, minus: int, plus: int) -> Tensor:
    """In each filter the `minus` smallest weights become −1, the `plus` largest +1, and the others 0."""
    filters = rearrange(w, "f ... -> f (...)")
    # topk takes five times less time than sorting, and always returns exactly k elements, also among equal ones.
    values, indices = filters.topk(filters.shape[1] - minus, sorted=False)
    bits = torch.full_like(filters, -1)
    if values.shape[1] == plus:
        bits.scatter_(1, indices, 1.0)
    else:
        largest = indices.gather(1, values.topk(plus, sorted=False).indices)
        bits.scatter_(1, indices, 0.0).scatter_(1, largest, 1.0)
    return bits.view_as(w)


def _floor(x: float) -> int:
    """⌊x⌋, where x may be a whole number with a rounding error: (1 − 0.9) · 10 is 0.9999999999999998."""
    return math.floor(x + 1e-12 * max(1.0, x))


# ProxConnect++ (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2402.17710) describes a method by two functions: the
# forward quantizer F, with Ŵ = F(W), and the backward quantizer B, with ∂L/∂W := B(W) ⊙ ∂L/∂Ŵ.


def linear_quantizer(w: Tensor, rho: float | Tensor) -> Tensor:
    """ProxConnect: a piecewise linear function between the clipped identity (ρ = 0) and the sign (ρ ≥ 1).

        F(w) = L_ρ(w) = sign(w) · min(1, |w| + ρ)
        B(w) = 1

    On [−1, 1], L_ρ is the proximal map of ρ times the distance to {−1, +1}. rho may be a 0-dimensional tensor.

    Dockhorn et al., NeurIPS 2021, https://arxiv.org/abs/2110.13220
    """
    magnitude = (w.detach().abs() + rho).clamp_max_(1.0)
    return straight_through(w, torch.where(w >= 0, magnitude, -magnitude))


def sign_with_cut(w: Tensor) -> Tensor:
    """BNN: the sign; large weights receive no gradient.

        F(w) = sign(w)
        B(w) = 1 where |w| ≤ 1, else 0

    Hubara et al., NeurIPS 2016, https://arxiv.org/abs/1602.02830
    """
    return straight_through(w, _signs(w.detach().clone()), mask=w.abs() <= 1)


def sign_swish(x: Tensor, mu: float | Tensor) -> Tensor:
    """BNN++: the sign-Swish, which approaches the sign as μ grows.

        F(x) = SS_μ(x)  = 2σ(μx) (1 + μx (1 − σ(μx))) − 1
        B(x) = SS′_μ(x) = μ (2 − μx tanh(μx/2)) / (1 + cosh(μx))

    SS rises to 1.2 at μx = 2.4 and then falls to 1: SS′ is negative for |μx| > 2.4. mu may be a 0-dimensional tensor.

    Lu et al., NeurIPS 2023, https://arxiv.org/abs/2402.17710
    """
    return _SignSwish.apply(x, torch.as_tensor(mu, dtype=x.dtype, device=x.device), False)


def sign_with_swish_gradient(x: Tensor, mu: float | Tensor = 5.0) -> Tensor:
    """BNN+: the sign, with the derivative of the sign-Swish as its gradient.

        F(x) = sign(x)
        B(x) = SS′_μ(x)          see `sign_swish`

    Darabi et al., 2018, https://arxiv.org/abs/1812.11800
    """
    return _SignSwish.apply(x, torch.as_tensor(mu, dtype=x.dtype, device=x.device), True)


class _SignSwish(torch.autograd.Function):
    """Forward: SS_μ(x), or sign(x) if `hard`. Backward: multiplies by SS′_μ(x). mu is a tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mu: Tensor, hard: bool) -> Tensor:
        if hard:
            return _signs(x.clone())
        z = (mu * x).clamp_(-1e3, 1e3)  # beyond, SS is constant, and ∞ · 0 could occur
        t = torch.tanh(z / 2)  # 2σ(z) − 1
        return t + z * (1 - t * t) / 2

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, mu, _ = inputs
        ctx.save_for_backward(x, mu)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        x, mu = ctx.saved_tensors
        z = (mu * x).abs_().clamp_max_(1e3)  # SS′ is an even function
        e = torch.exp(-z)  # 1 / (1 + cosh z) = 2e / (1 + e)², which cannot overflow
        return grad * (mu * (2 - z * torch.tanh(z / 2)) * 2 * e / (1 + e).square()), None, None


def identity(w: Tensor) -> Tensor:
    """Full precision: F(w) = w, B(w) = 1."""
    return w


# The names that layers use (binarize.py). Arguments after w, such as ratio and mu, are the layer's `options`.
# 'bwn' has no scale, as in FSG's code. 'bwn-l' is MetaQuant's BWN.
WEIGHT_QUANTIZERS = {
    "dorefa": dorefa,
    "bwn": sign,
    "bwn-f": bwn_f,
    "bwn-l": bwn_l,
    "sibnn": sibnn,
    "bihalf": bihalf,
    "bihalf-prune": bihalf_prune,
    "bnn": sign_with_cut,
    "bnn+": sign_with_swish_gradient,
    "bnn++": sign_swish,
    "pc": linear_quantizer,
    "parq": parq,
    "identity": identity,
}


# ---------------------------------------------------------------------------------------------------------------------
# What a gradient generator needs to know about a weight quantizer (MetaQuant, Chen et al., NeurIPS 2019, section 2.1,
# https://papers.nips.cc/paper_files/paper/2019/hash/f8e59f4b2fe7c5705bf878bbd494ccdf-Abstract.html).


@torch.no_grad()
def pre_quantize(w: Tensor, kind: str) -> Tensor:
    """W̃ = A(W), the value that Q rounds to a bit; same shape as w, no gradient.

        kind 'dorefa'           A(W) = tanh(W) / (2 max|tanh(W)|) + ½, in [0, 1]; ½ everywhere if W = 0
        kind 'bwn…'             A(W) = W

    w is the weight of one layer, over which the maximum is taken. For 'bwn', 'bwn-f' and 'bwn-l' the result shares the
    memory of w.
    Raises ValueError for another kind.
    """
    if kind == "dorefa":
        t = torch.tanh(w)
        return t / (2 * t.abs().max().clamp_min(torch.finfo(w.dtype).tiny)) + 0.5
    _check_kind(kind)
    return w.detach()


SMALLEST_MAXIMUM = 1e-3  # of |tanh(W)| in a layer; the networks of models.py start at 1e-3 and above


@torch.no_grad()
def calibration(w: Tensor, kind: str) -> Tensor:
    """D = ∂Ŵ/∂W with Q replaced by the identity; same shape as w, no gradient.

        kind 'dorefa'           D = 2 ∂A/∂W = (1 − tanh²(W)) / m,   m = max|tanh(W)| held constant
                                D = 1 − tanh²(W)                    where m < 0.001
        kind 'bwn…'             D = 1

    w is the weight of one layer, over which the maximum is taken. As W tends to 0, 1/m grows without bound, and a layer
    of zeros would either stay there or explode. The second line bounds D by 1000: such a layer learns as with 'bwn'
    until its weights are of a usual size.
    Raises ValueError for another kind.
    """
    if kind == "dorefa":
        t = torch.tanh(w)
        m = t.abs().max()
        return (1 - t.square()) / torch.where(m < SMALLEST_MAXIMUM, 1, m)
    _check_kind(kind)
    return torch.ones_like(w)


def _check_kind(kind: str) -> None:
    if kind not in ("bwn", "bwn-f", "bwn-l"):
        known = "dorefa, bwn, bwn-f, bwn-l"
        raise ValueError(f"gradients cannot be generated for the quantizer {kind!r}: use one of {known}")


# ---------------------------------------------------------------------------------------------------------------------
# Activations.


def sign_activation(x: Tensor) -> Tensor:
    """BNN: the sign of every activation, with the gradient of the hard tanh.

        a = +1 where x ≥ 0, else −1
        ∂L/∂x := ∂L/∂a where |x| < 1, else 0

    After a ReLU every x is ≥ 0 and every a is +1, so do not place a ReLU before it. At x = ±1 the gradient is 0, as in
    the code of Equal Bits; in BNN's eq. 4 it passes there.

    Hubara et al., NeurIPS 2016, eq. 4, https://arxiv.org/abs/1602.02830
    """
    return _signs(F.hardtanh(x))  # whose gradient is that of the formula


def step_activation(x: Tensor, theta: Tensor, delta: Tensor, rho: float) -> Tensor:
    """Si-BNN: activations 0 and 1, with a trainable threshold.

        y = (x − θ) Δ
        a = 1 where y ≥ 0, else 0
        ∂L/∂y := ∂L/∂a where −ρ < y < 1, else 0

    theta and delta have one element per channel and a shape that broadcasts with x. Both are trained: θ moves the
    threshold, Δ the width of the window that the gradient passes. The window 0 < y < 1 is that of a ReLU clipped at 1;
    with ρ in (0, 1] inputs slightly below the threshold receive a gradient too. The authors' code gives a = 0.5 at
    y = 0.

    Wang et al., AAAI 2020, eqs. 5 to 9, https://doi.org/10.1609/aaai.v34i07.6900
    """
    y = (x - theta) * delta
    return straight_through(y, (y >= 0).to(y.dtype), mask=(y > -rho) & (y < 1))


# The names that layers use. 'si' is `step_activation`; θ and Δ are parameters of the layer (binarize.py).
ACTIVATION_QUANTIZERS = {"none": identity, "sign": sign_activation, "si": step_activation}
