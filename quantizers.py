"""Weight and activation quantizers: one short function per paper, the gradient beside the forward.

Copy this file alone, or with models.py.

Notation, as in all files here: W is a layer's latent (full-precision) weight, the one the optimizer moves;
A(W) = W̃ is the *pre-quantized* weight; Ŵ = Q(W̃) is the binary weight that the layer computes with;
D = ∂Ŵ/∂W, taken straight through Q (as if Q were the identity), is the *calibration*.

Every weight quantizer here hands the incoming gradient ∂L/∂Ŵ to the latent weight unchanged. So after
`loss.backward()` a latent weight's `.grad` is ĝ = ∂L/∂Ŵ, and whoever updates the weight decides what to make of it:
D ⊙ ĝ is the classical straight-through estimator (STE); FSG learns something else (hypernet.py).
sign(0) is +1 everywhere, so a binary weight is never 0.
"""

import torch
from torch import Tensor


class _Sign(torch.autograd.Function):
    """Forward: +1 where x ≥ 0, else −1. Backward: the identity."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype).mul_(2).sub_(1)

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
        return (x >= 0).to(x.dtype).mul_(2).sub_(1)

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


WEIGHT_QUANTIZERS = {"dorefa": dorefa, "bwn": sign, "bwn-f": bwn_f}


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


ACTIVATION_QUANTIZERS = {"none": lambda x: x, "sign": sign_activation}
