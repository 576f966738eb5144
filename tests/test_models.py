"""Quantizers against a plain restatement of their formulas; binary layers, networks and binarize_()."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import models
import quantizers

shapes = st.sampled_from([(1,), (7,), (3, 5), (4, 3, 3, 3), (2, 1, 1, 1), (5, 2, 1, 3)])
scales = st.sampled_from([1e-30, 1e-6, 1e-2, 1.0, 30.0, 1e4])


def weights(shape, scale, seed):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    flat = w.view(-1)
    flat[:: max(1, flat.numel() // 2)] = 0.0  # zeros are the interesting case
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
    clear = pre != 0.5  # at ½ exactly, rounding to even would go down; sign(0) is +1
    assert torch.equal((2 * pre.round() - 1)[clear], quantizers.dorefa(w)[clear])
    assert torch.all(quantizers.dorefa(w)[w == 0] == 1)
    # Ŵ = 2·A(W) − 1 straight through the rounding: D = 2 ∂A/∂W with the layer's maximum held constant.
    top = torch.tanh(w).abs().max()
    h = 1e-6 * max(scale, 1e-3)
    slope = (torch.tanh(w + h) - torch.tanh(w - h)) / (2 * h) / top
    assert torch.allclose(quantizers.calibration(w, "dorefa"), slope, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["bwn", "bwn-f"])
def test_bwn_is_not_pre_quantized(kind):
    w = torch.randn(4, 3)
    assert torch.equal(quantizers.pre_quantize(w, kind), w)
    assert torch.equal(quantizers.calibration(w, kind), torch.ones(4, 3))


def test_an_all_zero_layer_has_finite_values():
    w = torch.zeros(3, 3)
    assert torch.all(quantizers.dorefa(w) == 1)
    for function in (quantizers.pre_quantize, quantizers.calibration):
        assert torch.isfinite(function(w, "dorefa")).all()
        with pytest.raises(ValueError, match="dorefa"):
            function(w, "ternary")


def test_sign_activation_cuts_the_gradient_outside_one():
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0], requires_grad=True)
    a = quantizers.sign_activation(x)
    assert a.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    a.backward(torch.full_like(x, 3.0))
    assert x.grad.tolist() == [0, 3, 3, 3, 3, 3, 0]


@pytest.mark.parametrize("quantizer", ["dorefa", "bwn", "bwn-f"])
@pytest.mark.parametrize("act", ["none", "sign"])
def test_layers_compute_with_the_binary_weight_and_leave_g_hat_in_grad(quantizer, act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(20, 6))
    net.append(nn.Linear(6, 2))
    models.binarize_(net, quantizer, act)
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


def test_binarize_keeps_weights_and_objects_and_skips_the_ends():
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
        assert set(seen[0].unique().tolist()) == {-1.0, 1.0}, "both signs must occur: a ReLU would leave +1 alone"
    full = models.build("resnet8", 7, "none", in_channels=1)
    full.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="resnet20"):
        models.build("vgg", 10)


def test_sign_bits():
    net = models.build("resnet8", 10)
    layers = models.binary_layers(net)
    bits = models.sign_bits(layers)
    assert bits.dtype == torch.bool
    assert torch.equal(bits, torch.cat([layer.weight.detach().flatten() >= 0 for layer in layers]))
    assert len(models.sign_bits([])) == 0
