"""Quantizers are compared with their formulas. Binary layers, networks and binarize_()."""

import math
from argparse import Namespace
from fractions import Fraction

import numpy as np
import pytest
import replay_networks
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import models
import quantizers
import runs
import train_sibnn

shapes = st.sampled_from([(1,), (7,), (3, 5), (4, 3, 3, 3), (2, 1, 1, 1), (5, 2, 1, 3)])
scales = st.sampled_from([1e-30, 1e-6, 1e-2, 1.0, 30.0, 1e4])


def weights(shape, scale, seed):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    flat = w.view(-1)
    flat[:: max(1, flat.numel() // 2)] = 0.0  # zeros must become +1
    return w


@given(shapes, scales, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_weight_quantizers_equal_their_formulas(shape, scale, seed):
    w = weights(shape, scale, seed).requires_grad_()
    signs = torch.tensor([1.0 if x >= 0 else -1.0 for x in w.flatten().tolist()]).view(shape).double()
    alpha = torch.stack([f.abs().mean() for f in w.detach()]).view(-1, *[1] * (w.dim() - 1))
    for quantizer, expected in (
        (quantizers.sign, signs),
        (quantizers.dorefa, signs),
        (quantizers.bwn_f, alpha * signs),
    ):
        out = quantizer(w)
        assert torch.allclose(out, expected, rtol=1e-12, atol=0)
        g = torch.randn_like(out)
        assert torch.equal(torch.autograd.grad(out, w, g)[0], g), "the gradient must reach the latent weight unchanged"


@given(shapes, st.sampled_from([1e-6, 1e-2, 1.0, 3.0]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_dorefa_rounds_its_pre_quantized_weight_and_the_calibration_is_its_derivative(shape, scale, seed):
    w = weights(shape, scale, seed)
    pre = quantizers.pre_quantize(w, "dorefa")
    if w.abs().max() == 0:
        assert torch.all(pre == 0.5)
        return
    assert pre.min() >= 0 and pre.max() <= 1
    clear = pre != 0.5  # round(½) is 0, but sign(0) is +1
    assert torch.equal((2 * pre.round() - 1)[clear], quantizers.dorefa(w)[clear])
    assert torch.all(quantizers.dorefa(w)[w == 0] == 1)
    # Without the rounding Ŵ = 2·A(W) − 1, so D = 2 ∂A/∂W, with the maximum of the layer held constant.
    top = torch.tanh(w).abs().max()
    top = 1 if top < 1e-3 else top  # a layer of nearly zeros would have no bound
    h = 1e-6 * max(scale, 1e-3)
    slope = (torch.tanh(w + h) - torch.tanh(w - h)) / (2 * h) / top
    assert torch.allclose(quantizers.calibration(w, "dorefa"), slope, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["bwn", "bwn-f"])
def test_bwn_is_not_pre_quantized(kind):
    w = torch.randn(4, 3)
    assert torch.equal(quantizers.pre_quantize(w, kind), w)
    assert torch.equal(quantizers.calibration(w, kind), torch.ones(4, 3))


@pytest.mark.parametrize("kind", ["dorefa", "bwn", "bwn-f"])
def test_pre_quantized_weight_and_calibration_are_constants(kind):
    w = nn.Parameter(torch.randn(4, 3))
    assert not quantizers.pre_quantize(w, kind).requires_grad
    assert not quantizers.calibration(w, kind).requires_grad


def test_an_all_zero_layer_has_finite_values():
    w = torch.zeros(3, 3)
    assert torch.all(quantizers.dorefa(w) == 1)
    for function in (quantizers.pre_quantize, quantizers.calibration):
        assert torch.isfinite(function(w, "dorefa")).all()
        with pytest.raises(ValueError, match="dorefa"):
            function(w, "ternary")


@pytest.mark.parametrize("start", [0.0, 1e-30, 1e-6])
@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.Adam(p, 0.01)])
def test_a_layer_of_nearly_zeros_learns(start, optimizer):
    """With DoReFa's gradient D ⊙ ĝ: it finds the signs of the target, and its weights stay of order 1."""
    torch.manual_seed(0)
    target, x = torch.randn(16, 32).sign(), torch.randn(256, 32)
    w = nn.Parameter(start * torch.randn(16, 32))
    step = optimizer([w])
    for _ in range(60):
        step.zero_grad()
        F.mse_loss(F.linear(x, quantizers.dorefa(w)), F.linear(x, target)).backward()
        D = quantizers.calibration(w, "dorefa")
        assert D.max() <= 1000
        w.grad *= D
        step.step()
    assert (quantizers.dorefa(w) == target).float().mean() > 0.99 and w.abs().max() < 10


# ---------------------------------------------------------------------------------------------------------------------
# The quantizers of the other papers are compared with their formulas in float64.


def tied_weights(shape, scale, seed):
    """Weights of which many are equal, with zeros of both signs."""
    w = weights(shape, 1.0, seed)
    kind = seed % 3
    w = w if kind == 0 else (w * 2).round() / 2 if kind == 1 else torch.zeros_like(w)
    return (w * scale * torch.where(torch.rand_like(w) < 0.5, -1.0, 1.0)).float()


filters = st.sampled_from([(1, 1), (3, 5), (4, 3, 3, 3), (2, 7, 1, 1), (5, 2, 1, 3), (3, 64), (1, 257), (7,)])
shares = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0]) | st.integers(0, 1000).map(lambda k: k / 1000)


def exactly(share):
    """The decimal fraction that the user wrote: 0.9 is 9/10."""
    return Fraction(repr(share))


@given(filters, scales, shares, st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_bihalf_ranks_each_filter_and_has_the_exact_ratio(shape, scale, ratio, seed):
    w = tied_weights(shape, scale, seed).requires_grad_()
    out = quantizers.bihalf(w, ratio)
    assert out.shape == w.shape and out.dtype == w.dtype and set(out.unique().tolist()) <= {-1.0, 1.0}
    n = w[0].numel()
    minus = math.floor((1 - exactly(ratio)) * n)
    for row, bits in zip(w.detach().reshape(len(w), -1), out.detach().reshape(len(w), -1), strict=True):
        assert (bits < 0).sum() == minus
        if 0 < minus < n:
            assert row[bits < 0].max() <= row[bits > 0].min(), "no −1 above a +1"
    g = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, w, g)[0], g)


@given(filters, scales, shares, st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_bihalf_prune_zeroes_the_middle_ranks(shape, scale, prune, seed):
    w = tied_weights(shape, scale, seed).requires_grad_()
    out = quantizers.bihalf_prune(w, prune)
    n = w[0].numel()
    i, j = (math.floor((1 + sign * exactly(prune)) / 2 * n) for sign in (-1, 1))
    for row, bits in zip(w.detach().reshape(len(w), -1), out.detach().reshape(len(w), -1), strict=True):
        assert [(bits == b).sum().item() for b in (-1, 0, 1)] == [i, j - i, n - j]
        for lower, upper in ((-1, 0), (0, 1), (-1, 1)):
            if (bits == lower).any() and (bits == upper).any():
                assert row[bits == lower].max() <= row[bits == upper].min()
    g = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, w, g)[0], g)
    if prune == 0:
        assert torch.equal(out, quantizers.bihalf(w, 0.5))


@pytest.mark.parametrize("n, prune", [(4608, 0.99), (576, 0.99), (1000, 0.01), (4608, 0.5)])
def test_bihalf_prune_is_exact_for_thousands_of_equal_weights(n, prune):
    i, j = (math.floor((1 + sign * exactly(prune)) / 2 * n) for sign in (-1, 1))
    for w in (torch.zeros(2, n), (torch.randn(2, n) * 2).round()):
        for bits in quantizers.bihalf_prune(w, prune):
            assert [(bits == b).sum().item() for b in (-1, 0, 1)] == [i, j - i, n - j]


@given(shapes, st.sampled_from([1e-6, 1e-2, 0.3, 1.0, 3.0]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_sibnn_passes_the_gradient_through_the_scale(shape, scale, seed):
    """Element by element, from ∂(α_f s_i)/∂W_j with the sign's own derivative replaced by 1 where |W| ≤ 1."""
    w = weights(shape, scale, seed).requires_grad_()
    out = quantizers.sibnn(w)
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (grad,) = torch.autograd.grad(out, w, g)
    for row, bits, ghat, found in zip(
        *(t.detach().reshape(len(w), -1).tolist() for t in (w, out, g, grad)), strict=True
    ):
        n, signs = len(row), [(x > 0) - (x < 0) for x in row]
        alpha, through = sum(map(abs, row)) / n, sum(s * x for s, x in zip(signs, ghat, strict=True)) / n
        for i in range(n):
            assert math.isclose(bits[i], alpha * signs[i], rel_tol=1e-12, abs_tol=1e-300)
            expected = (ghat[i] * (1 - 1 / n) if abs(row[i]) <= 1 else 0) + signs[i] * through
            assert math.isclose(found[i], expected, rel_tol=1e-9, abs_tol=1e-12)


def test_bihalf_of_distinct_weights_by_hand():
    w = torch.tensor([[0.3, -2.0, 0.1, 5.0, 0.2], [9.0, 8.0, 7.0, 6.0, 5.0]])
    assert quantizers.bihalf(w).tolist() == [[1, -1, -1, 1, 1], [1, 1, 1, -1, -1]]  # ⌊5/2⌋ = 2 are −1
    assert quantizers.bihalf(w, 0.2).tolist() == [[-1, -1, -1, 1, -1], [1, -1, -1, -1, -1]]
    assert quantizers.bihalf_prune(w, 0.6).tolist() == [[0, -1, 0, 1, 0], [1, 0, 0, 0, -1]]
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            quantizers.bihalf(w, bad)
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            quantizers.bihalf_prune(w, bad)


def closed_form(x, mu):
    """SS_μ as in the paper."""
    s = torch.sigmoid(mu * x)
    return 2 * s * (1 + mu * x * (1 - s)) - 1


@given(
    shapes,
    st.sampled_from([1e-30, 1e-3, 0.1, 1.0, 3.0]),
    st.sampled_from([0.5, 5.0, 17.3, 30.0]),
    st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_sign_swish_and_its_gradient_equal_the_closed_form_and_autograd(shape, scale, mu, seed):
    x = weights(shape, scale, seed).requires_grad_()
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = closed_form(x, mu)
    (slope,) = torch.autograd.grad(expected, x, g)
    for mu_ in (mu, torch.tensor(mu, dtype=torch.float64)):
        out = quantizers.sign_swish(x, mu_)
        assert torch.allclose(out, expected, rtol=1e-9, atol=1e-12)
        assert torch.allclose(torch.autograd.grad(out, x, g)[0], slope, rtol=1e-7, atol=1e-9 * mu)
        hard = quantizers.sign_with_swish_gradient(x, mu_)
        assert torch.equal(hard, quantizers.sign(x))
        assert torch.allclose(torch.autograd.grad(hard, x, g)[0], slope, rtol=1e-7, atol=1e-9 * mu)


def test_sign_swish_of_huge_values_is_sign_with_no_gradient():
    x = torch.tensor([-3e38, -1e10, -50.0, 50.0, 1e10, 3e38], requires_grad=True)
    for mu in (5.0, 30.0, 1e5):
        out = quantizers.sign_swish(x, mu)
        assert torch.equal(out, x.sign())
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros(6))
    near = torch.tensor([-1.0, -1e-3, 1e-3, 1.0])
    assert torch.allclose(quantizers.sign_swish(near, 1e6), near.sign()), "BNN++ tends to sign as μ grows"


@given(shapes, scales, st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0, 10.0]), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_linear_quantizer_equals_its_formula(shape, scale, rho, seed):
    w = weights(shape, scale, seed).requires_grad_()
    expected = [math.copysign(min(1, abs(x) + rho), x if x else 1.0) for x in w.flatten().tolist()]
    for rho_ in (rho, torch.tensor(rho, dtype=torch.float64)):
        out = quantizers.linear_quantizer(w, rho_)
        assert torch.allclose(out, torch.tensor(expected, dtype=torch.float64).view(shape), rtol=1e-12, atol=0)
        g = torch.randn_like(out)
        assert torch.equal(torch.autograd.grad(out, w, g)[0], g)
    if rho >= 1:
        assert torch.equal(out, quantizers.sign(w))


def test_bnn_cuts_the_gradient_of_large_weights():
    w = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.5], requires_grad=True)
    out = quantizers.sign_with_cut(w)
    assert out.tolist() == [-1, -1, 1, 1, 1]
    assert torch.autograd.grad(out, w, torch.full_like(w, 3.0))[0].tolist() == [0, 3, 3, 3, 0]


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_step_activation_equals_its_formula(batch, channels, rho, conv, seed):
    """Values, and gradients of x, θ and Δ, element by element."""
    torch.manual_seed(seed)
    shape = (batch, channels, 2, 3) if conv else (batch, channels)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    theta, delta = (t.double().requires_grad_() for t in (torch.randn(channels) / 2, 1 + torch.randn(channels) / 3))
    broadcast = (-1, 1, 1) if conv else (-1,)
    out = quantizers.step_activation(x, theta.view(broadcast), delta.view(broadcast), rho)
    g = torch.randn_like(out)
    dx, dtheta, ddelta = torch.autograd.grad(out, (x, theta, delta), g)
    expected = torch.zeros(2, channels, dtype=torch.float64)
    x, theta, delta = x.detach(), theta.detach(), delta.detach()
    for index in torch.cartesian_prod(*map(torch.arange, shape)):
        at, c = tuple(index.tolist()), index[1].item()
        y = (x[at] - theta[c]).item() * delta[c].item()
        assert out[at] == (1 if y >= 0 else 0)
        through = g[at].item() if -rho < y < 1 else 0.0
        assert math.isclose(dx[at], through * delta[c], abs_tol=1e-12)
        expected[0, c] -= through * delta[c].item()
        expected[1, c] += through * (x[at] - theta[c]).item()
    assert torch.allclose(torch.stack([dtheta, ddelta]), expected, rtol=1e-9, atol=1e-12)


def test_si_layers_have_theta_and_delta_per_channel():
    net = models.build("birealnet8", 10, "bwn-f", "si")
    for name, layer in zip(models.binary_layer_names(net), models.binary_layers(net), strict=True):
        assert layer.theta.flatten().tolist() == [0.0] * layer.in_channels
        assert layer.delta.flatten().tolist() == [1.0] * layer.in_channels
        assert {f"{name}.theta", f"{name}.delta"} <= net.state_dict().keys()
    layer.theta.data.fill_(0.5)
    assert layer.binary_input(torch.tensor([0.4, 0.6]).view(1, 1, 1, 2)).unique().tolist() == [0.0, 1.0]
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(layer.theta.grad is not None and layer.delta.grad is not None for layer in models.binary_layers(net))


def test_unit_and_scale():
    layer = models.binary_layers(models.build("resnet8", 10, "pc"))[0]
    layer.options, layer.unit, layer.scale = {"rho": 0.25}, 0.5, 3.0
    expected = 3 * quantizers.linear_quantizer(layer.weight / 0.5, 0.25)
    assert torch.allclose(layer.binary_weight(), expected)
    layer.binary_weight().sum().backward()
    assert torch.allclose(layer.weight.grad, torch.full_like(layer.weight, 6.0)), (
        "the gradient skips L_ρ, but not unit and scale"
    )


def test_sign_activation_cuts_the_gradient_outside_one():
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0], requires_grad=True)
    a = quantizers.sign_activation(x)
    assert a.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    a.backward(torch.full_like(x, 3.0))
    assert x.grad.tolist() == [0, 0, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("quantizer", ["dorefa", "bwn", "bwn-f"])
@pytest.mark.parametrize("act", ["none", "sign"])
def test_layers_compute_with_the_binary_weight_and_its_gradient_is_in_grad(quantizer, act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(20, 6))
    net.append(nn.Linear(6, 2))
    models.binarize_(net, quantizer, act, scale=1.0)
    conv, linear = models.binary_layers(net)
    for layer, x in ((conv, torch.randn(2, 4, 4, 4)), (linear, torch.randn(2, 20))):
        q = quantizers.WEIGHT_QUANTIZERS[quantizer](layer.weight.detach()).requires_grad_()
        a = quantizers.sign_activation(x) if act == "sign" else x
        plain = F.conv2d(a, q, conv.bias, 2, 1) if layer is conv else F.linear(a, q, linear.bias)
        out = layer(x)
        assert torch.allclose(out, plain)
        g = torch.randn_like(out)
        plain.backward(g)
        out.backward(g)
        assert torch.allclose(layer.weight.grad, q.grad), "weight.grad must be ∂L/∂Ŵ"


def test_binarize_keeps_weights_and_modules_and_skips_first_and_last():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    before = {k: v.clone() for k, v in net.state_dict().items()}
    objects = list(net.modules())
    assert models.binarize_(net) is net
    assert all(a is b for a, b in zip(net.modules(), objects, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert models.binary_layers(net) == [net[2], net[4]]
    assert models.binary_layers(models.binarize_(net, "bwn", first=True, last=True)) == [net[0], net[2], net[4], net[5]]
    assert net[4].quantizer == "bwn"
    assert not models.binary_layers(models.binarize_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "none"))
    for bad in ({"quantizer": "ternary"}, {"act": "relu7"}):
        with pytest.raises(ValueError, match="use one of"):
            models.binarize_(nn.Sequential(nn.Linear(2, 2)), **bad)
    with pytest.raises(ValueError, match="nothing to binarize"):
        models.binarize_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize("arch, count", [("resnet20", 269_824), ("resnet32", 464_384), ("resnet110", 1_728_000)])
def test_cifar_resnets_have_the_published_sizes(arch, count):
    net = models.build(arch, 10)
    depth = int(arch[6:])
    n = (depth - 2) // 6
    assert len(models.binary_layers(net)) == 6 * n + 2  # 6n convolutions and two projection shortcuts
    binary = sum(layer.weight.numel() for layer in models.binary_layers(net))
    stages = 16 * 16 * 9 * 2 * n + (16 * 32 + 32 * 32 * (2 * n - 1)) * 9 + (32 * 64 + 64 * 64 * (2 * n - 1)) * 9
    assert binary == stages + 16 * 32 + 32 * 64
    assert math.isclose(binary, count, rel_tol=0.005)


@pytest.mark.parametrize("arch, million", [("resnet18", 11.69), ("resnet34", 21.80)])
def test_imagenet_resnets_have_the_published_sizes(arch, million):
    with torch.device("meta"):
        net = models.build(arch, 1000)
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - million) < 0.01
    assert net(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_the_papers_resnets():
    """What distinguishes them, from the modules that they are made of."""
    with torch.device("meta"):
        nets = {arch: models.build(arch, 1000, "bwn", "sign") for arch in models.RESNETS}
    parameters = {arch: sum(p.numel() for p in net.parameters()) for arch, net in nets.items()}
    layers = {arch: len(models.binary_layers(net)) for arch, net in nets.items()}
    for arch in (*models.CIFAR_RESNETS, *models.IMAGENET_RESNETS):
        fsg, metaquant = nets[arch], nets[f"{arch}-metaquant"]
        assert fsg.state_dict().keys() - metaquant.state_dict().keys() == {
            f"bn_fc.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        }
        projections = 2 if arch in models.CIFAR_RESNETS else 3
        binary = 0 if arch in models.CIFAR_RESNETS else projections  # FSG's for ImageNet are in full precision
        assert layers[f"{arch}-metaquant"] - layers[arch] == binary
    with torch.device("meta"):
        si = models.build("resnet18-sibnn", 1000, "sibnn", "si")
    assert sum(p.numel() for p in si.parameters()) == 11_703_080
    assert [name.split(".")[-1] for name, _ in si.layer1[0].conv1.named_parameters()] == ["delta", "theta", "weight"]
    assert isinstance(si.relu_last, nn.ReLU) and isinstance(si.relu, nn.Identity)
    assert parameters["resnet20-irnet"] == 269_850 + 990 * 65 and layers["resnet20-irnet"] == 18
    prelus = [m for m in nets["resnet18-equalbits"].modules() if isinstance(m, nn.PReLU)]
    assert len(prelus) == 1 + 8, "one a block"


def test_equal_bits_stem_is_another_one_for_imagenet():
    """CIFAR: PReLU after the BatchNorm, 1×1 convolutions of stride 2. ImageNet: PReLU first, an average pool."""
    for size in (32, 64, 224):
        net = models.build("resnet8-equalbits" if size == 32 else "resnet18-equalbits", 10, image_size=size).eval()
        net.bn1.bias.data.fill_(-1.0)
        net.relu.weight.data.zero_()  # a ReLU
        seen = []
        net.maxpool.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0]))
        net(torch.randn(1, 3, size, size))
        assert (seen[0].min() < 0) == (size == 224)
        projection = net.layer2[0].downsample
        assert projection[0].stride == ((1, 1) if size == 224 else (2, 2)) and len(projection) == 2 + (size == 224)


def test_zero_padded_shortcut():
    x = torch.randn(2, 3, 5, 6)
    y = models.ZeroPadded(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3) and torch.equal(y[:, 2:5], x[:, :, ::2, ::2]) and y[:, :2].abs().sum() == 0
    assert y[:, 5:].abs().sum() == 0 and not list(models.ZeroPadded(3, 8, 2).parameters())


@pytest.mark.parametrize("name", ["sibnn", "equalbits", "irnet"])
def test_networks_are_the_authors(name):
    """Blocks, gradients, running statistics, parameters, starts and schedules, against the authors' own modules."""
    file = ROOT.parent / "shared" / "golden" / f"{name}.npz"
    if not file.exists():
        pytest.skip(f"the golden vectors ../shared/golden/{name}.npz are not here")
    with np.load(file, allow_pickle=False) as npz:
        errors = getattr(replay_networks, f"replay_{name}")(npz)
    assert len(errors) > 10 and {kind: error for kind, error in errors.items() if not error <= 1e-10} == {}


def test_a_replay_notices_what_is_wrong(monkeypatch):
    file = ROOT.parent / "shared" / "golden" / "sibnn.npz"
    if not file.exists():
        pytest.skip("the golden vectors ../shared/golden/sibnn.npz are not here")
    monkeypatch.setitem(models.WEIGHT_QUANTIZERS, "sibnn", quantizers.bwn_f)
    monkeypatch.setattr(models, "initialise", lambda net, arch: None)  # PyTorch's default start
    monkeypatch.setattr(train_sibnn, "THRESHOLDS", (".theta",))
    with np.load(file, allow_pickle=False) as npz:
        errors = replay_networks.replay_sibnn(npz)
    wrong = {kind for kind, error in errors.items() if not error <= 1e-10}
    assert {"gradients", "gradients of weights", "initial standard deviation", "initial mean", "weight decay"} >= wrong
    assert wrong >= {"gradients", "initial standard deviation", "weight decay"}


def test_pretrained_files_may_lack_the_batchnorm_before_the_classifier(tmp_path, capsys):
    """A fresh one changes nothing in eval mode, and the run says that it is fresh."""
    theirs = models.build("resnet8-metaquant", 10, "none").eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = models.build("resnet8", 10, "none").eval()
    ours.bn_fc.weight.data.fill_(1.0)
    args = Namespace(arch="resnet8", pretrained=str(tmp_path / "theirs.pth"), resume=None, eval_only=False)
    runs.load_weights(ours, args, None)
    assert "bn_fc" in (said := capsys.readouterr().out) and said.count("\n") == 1
    x = torch.randn(4, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    args.arch = "resnet8-metaquant"
    runs.load_weights(models.build("resnet8-metaquant", 10), args, None)
    assert capsys.readouterr().out == ""
    state = theirs.state_dict()
    del state["fc.bias"]
    torch.save(state, args.pretrained)
    with pytest.raises(runs.RunError, match=r"fc\.bias"):
        runs.load_weights(ours, args, None)


@pytest.mark.parametrize("depth, dataset, classes", [(20, 10, 10), (32, 10, 10), (44, 10, 10), (56, 100, 100)])
def test_the_full_precision_networks_of_fsgs_authors_load_as_they_are(depth, dataset, classes):
    file = ROOT.parent / "shared" / "reference" / "pretrained" / f"ResNet{depth}-CIFAR{dataset}-pretrain.pth"
    if not file.exists():
        pytest.skip("the full-precision networks of ../shared/reference/pretrained are not here")
    for arch in (f"resnet{depth}", f"resnet{depth}-metaquant"):
        net = models.build(arch, classes)
        runs.load_weights(net, Namespace(arch=arch, pretrained=str(file), resume=None, eval_only=False), None)
        assert torch.equal(net.fc.weight, torch.load(file, "cpu", weights_only=True)["fc.weight"])


@pytest.mark.parametrize("act", ["none", "sign"])
@pytest.mark.parametrize("binarize_all", [False, True])
def test_build(act, binarize_all):
    torch.manual_seed(0)
    net = models.build("resnet8", 7, "dorefa", act, binarize_all, in_channels=1)
    layers = models.binary_layers(net)
    assert (layers[0] is net.conv1) == binarize_all and (layers[-1] is net.fc) == binarize_all
    x = torch.randn(4, 1, 8, 8)
    assert net(x).shape == (4, 7)
    seen = []
    layers[2].register_forward_hook(lambda m, inputs, out: seen.append(m.binary_input(inputs[0])))
    net(x).sum().backward()
    if act == "sign":
        assert set(seen[0].unique().tolist()) == {-1.0, 1.0}, "both signs must occur; after a ReLU all would be +1"
    full = models.build("resnet8", 7, "none", in_channels=1)
    full.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="resnet20"):
        models.build("vgg", 10)


@pytest.mark.parametrize("arch", models.ARCHS)
@pytest.mark.parametrize("size", [1, 28])
def test_every_network_accepts_small_images(arch, size):
    with torch.device("meta"):
        if arch == "alexnet":
            with pytest.raises(models.ModelError, match="at least 63×63 pixels"):
                models.build(arch, 7, image_size=size)
        else:
            assert models.build(arch, 7, image_size=size)(torch.empty(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("arch", models.ARCHS)
@pytest.mark.parametrize("act", ["none", "sign", "si"])
def test_every_network_accepts_every_activation(arch, act):
    with torch.device("meta"):
        net = models.build(arch, 7, "bwn", act, image_size=64)
        assert net(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    names = models.binary_layer_names(net)
    first = "features.0" if arch in models.PLAIN_NETS else "conv1"
    last = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    assert names and first not in names and last not in names
    if arch in models.BIREAL_NETS:
        assert not [n for n in names if "downsample" in n], "Bi-Real Net's shortcuts are full precision"
        assert ("prelu" in arch) == any(isinstance(m, nn.PReLU) for m in net.modules())


@pytest.mark.parametrize("arch, million", [("alexnet", 62.4), ("birealnet18", 11.69), ("birealnet34-prelu", 21.8)])
def test_imagenet_networks_at_224_pixels(arch, million):
    with torch.device("meta"):
        net = models.build(arch, 1000)
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        if arch == "alexnet":
            assert net.features(torch.empty(2, 3, 224, 224)).shape[1:] == (256, 6, 6), "as in Krizhevsky et al."
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - million) < 0.05


def test_conv_nets_have_the_published_sizes():
    """Frankle and Carbin, ICLR 2019, figure 2: the number of weights without biases, in thousands."""
    for arch, thousand in (("conv2", 4300), ("conv4", 2400)):
        with torch.device("meta"):
            net = models.build(arch, 10)
        assert abs(sum(p.numel() for p in net.parameters()) / 1e3 / thousand - 1) < 0.05


def test_a_network_without_normalisation_keeps_the_scale_of_its_activations():
    """The scale √2/√fan_in keeps the variance through ReLUs, as He's initialisation does."""
    torch.manual_seed(0)
    for quantizer in ("bihalf", "bwn", "dorefa"):
        net = models.build("conv8", 10, quantizer)
        assert 0.05 < net(torch.randn(8, 3, 32, 32)).std() < 5


def test_weight_signs():
    net = models.build("resnet8", 10)
    layers = models.binary_layers(net)
    signs = models.weight_signs(layers)
    positive = torch.cat([layer.weight.detach().flatten() >= 0 for layer in layers])
    assert signs.dtype == torch.int8 and torch.equal(signs, 2 * positive.char() - 1)
    assert len(models.weight_signs([])) == 0
    for layer in layers:
        layer.quantizer, layer.options = "bihalf-prune", {"prune": 0.5}
    assert models.weight_signs(layers).unique().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("flag", ["--num-classes", "--in-channels", "--image-size"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_wrong_sizes_on_the_command_line(capsys, flag, value):
    with pytest.raises(SystemExit) as e:
        models.main(["resnet8", flag, value])
    assert e.value.code == 2 and f"{flag} must be at least 1; it is {value}" in capsys.readouterr().err
