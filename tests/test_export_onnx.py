"""The bits of ONNX files, in onnxruntime, are PyTorch's. (test_export.py has every trainer's networks.)"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import export
import export_c
import export_onnx
import models

floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@given(floats, st.booleans(), st.lists(floats, min_size=1, max_size=20))
@settings(deadline=None)
def test_a_comparison_is_exact(bound, rises, others):
    """Also for the floats next to the bound, and however Kx + b is rounded."""
    bound = np.float32(bound if abs(bound) >= export_onnx.SMALLEST else 0)
    factor, shift = (np.float32(v[0]) for v in export_onnx.comparison(torch.tensor([rises]), torch.tensor([bound])))
    neighbours = [np.nextafter(bound, np.float32(side)) for side in (-np.inf, np.inf)]
    if bound == 0:
        neighbours = [np.float32(-1e-37), np.float32(1e-37)]
    x = np.array([bound, *neighbours, *others, -3e38, 3e38], np.float32)
    expected = (x >= bound) if rises else (x <= bound)
    with np.errstate(over="ignore"):
        rounded_twice, rounded_once = factor * x + shift, (factor.astype(float) * x + shift).astype(np.float32)
    for value in (rounded_twice, rounded_once):
        assert np.array_equal(np.clip(value, 0, 1), expected)


@given(floats, floats, floats, st.sampled_from(["sign", "step"]))
@settings(deadline=None)
def test_what_precedes_a_binary_activation_is_a_comparison(alpha, beta, theta, kind):
    """The bound is where the result changes between two neighbouring floats."""
    ops = [export_c.Op("batchnorm", "", [], (1, 1, 1), [torch.tensor([alpha]), torch.tensor([beta])])]
    constants = [torch.tensor([theta]), torch.tensor([1 - alpha])] if kind == "step" else []
    activation = export_c.Op(kind, "", [], (1, 1, 1), constants)
    is_one = lambda x: export_c.is_one(ops, activation, x)
    rises, bound = export_onnx.half_line(is_one, 1)
    xs = torch.cat([torch.randn(50) * 10.0**k for k in range(-6, 7)])
    if bound.isfinite():
        side = -torch.inf if rises else torch.inf
        outside = torch.nextafter(bound, torch.tensor(side))
        assert is_one(bound) and not is_one(outside)
    assert torch.equal(is_one(xs[:, None])[:, 0], xs >= bound if rises else xs <= bound)


def test_constants_that_nearly_underflow_are_left_to_the_tracer():
    """HUGE times such a number would not be 1 or more."""
    pytest.importorskip("onnx")
    image = export_c.Op("image", "", [], (1, 1, 1))
    for beta in (0.5, -1e-38):
        norm = export_c.Op("batchnorm", "", [image], (1, 1, 1), [torch.ones(1), torch.tensor([beta])])
        ops = [image, norm, export_c.Op("sign", "", [norm], (1, 1, 1))]
        ops.append(export_c.Op("conv", "", [ops[-1]], (1, 1, 1), weight=torch.ones(1, 1, 1, 1, dtype=torch.int8)))
        assert (export_onnx.onnx_model(ops, torch.zeros(1, 1, 1, 1)) is None) == (beta < 0)


@pytest.mark.parametrize("max_sum", [144, 576, 4608])
def test_a_split_batchnorm_rounds_as_one(max_sum):
    rng = np.random.default_rng(0)
    alpha, beta = (rng.standard_normal(64).astype(np.float32).astype(float) * size for size in (0.1, 1))
    alpha[0] = 0
    a, b, m, n = (v.astype(np.float32) for v in export_onnx.split(alpha, beta, max_sum))
    sums = np.arange(-max_sum, max_sum + 1, dtype=np.float32)[:, None]
    exact = a * sums + b
    assert np.array_equal(exact, a.astype(float) * sums + b), "A is exact in float32"
    found, expected = exact + (m * exact + n), (alpha * sums + beta).astype(np.float32)
    assert np.mean(found != expected) < 0.01 and np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    two_roundings = (alpha.astype(np.float32) * sums + beta.astype(np.float32)) != expected
    assert two_roundings.mean() > 0.1, "which the split is there to avoid"
    assert export_onnx.split(np.array([1e-9]), np.array([1.0]), max_sum) is None


class Layers(nn.Module):
    """Convolutions with biases, groups, strides and even kernels; pools; a shortcut with a bias; slopes below 0."""

    def __init__(self, groups: int):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 5, 2, 2), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 24, 3, 1, 1, bias=False, groups=groups), nn.BatchNorm2d(24)
        self.conv2, self.slopes = nn.Conv2d(24, 24, 3, 1, 1), nn.PReLU(24)
        self.conv3, self.norm3 = nn.Conv2d(24, 24, 2, 1, 0), nn.BatchNorm2d(24)
        self.shortcut = models.FloatConv2d(24, 40, 3, 2, 1)
        self.conv4, self.norm4 = nn.Conv2d(24, 40, 3, 2, 1), nn.BatchNorm2d(40)
        self.pool, self.norm5 = nn.MaxPool2d(3, 2, ceil_mode=True), nn.BatchNorm2d(40)
        self.conv5, self.average = nn.Conv2d(40, 8, 3), nn.AvgPool2d(2, 2)
        self.hidden, self.norm6, self.fc = nn.LazyLinear(32), nn.BatchNorm1d(32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm0(self.stem(x))
        x = self.conv2(self.norm1(self.conv1(x))) + self.norm1(self.conv1(x))
        x = self.norm3(self.conv3(self.slopes(x)))
        x = self.shortcut(x) + self.norm4(self.conv4(x))
        x = self.average(self.conv5(self.norm5(self.pool(x))))
        return self.fc(self.norm6(self.hidden(x.flatten(1))))


@pytest.mark.parametrize(
    "groups, act, quantizer",
    [(1, "sign", "dorefa"), (1, "sign", "bwn-f"), (1, "si", "bwn-f"), (4, "sign", "bwn-f"), (4, "si", "bwn")],
)
def test_networks_compute_the_same_bits(tmp_path, groups, act, quantizer):
    """A bit that differs would change a logit by more than rounding does. export_c.py has no rule for groups."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = Layers(groups)
    images = torch.randn(64, 3, 40, 40)
    net(images[:2])
    models.binarize_(net, quantizer, act, quiet=True)
    for name, value in net.named_parameters():
        if value.dim() in (1, 3):
            value.data += (0.1 if "theta" in name else 0.8) * torch.randn(value.shape)
    for _ in range(20):
        net(images)  # for the statistics
    net.eval()
    export.to_onnx(net, tmp_path / "net.onnx", images[:1])
    session = export.onnx_session(tmp_path / "net.onnx", 1)
    with torch.no_grad():
        expected = net(images)
    (logits,) = session.run(None, {"image": images.numpy()})
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-5 * expected.abs().max()
