"""The hypernetworks and the gradient generators against the golden vectors, a by-the-book recurrence in float64, the
equations recomputed layer by layer, and finite differences."""

import copy
import gc
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import Program
from torch import nn
from torch.nn import functional as F

import hypernet
import models
import quantizers
import selective_scan
from fsg_released import ReleasedFSG, ReleasedFSGLSTM
from gate import GatedHistory
from hypernet import FSG, STE, FastNet, SlowLSTM, SlowMamba
from metaquant import LSTMFC, AuthorsAdam, FCGrad, MultiFC, ReleasedFCGrad, ReleasedLSTMFC, ReleasedMultiFC


def relative(a, b):
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()


# ---------------------------------------------------------------------------------------------------------------------
# SlowMamba.


@pytest.mark.parametrize("case", ["per_weight", "per_weight_odd", "per_weight_short", "flat", "flat_odd"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("path", ["forward", "specialised"])
def test_mamba_equals_the_golden_vectors(golden, case, dtype, tolerance, path):
    prefix = f"{case}/param/"
    params = {k[len(prefix) :]: torch.tensor(golden[k]) for k in golden if k.startswith(prefix)}
    d_inner, d_state = params["A_log"].shape
    net = SlowMamba(d_state, params["conv1d.weight"].shape[-1], d_inner, "reference").to(dtype)
    net.load_state_dict(params)  # the package's names and shapes, unchanged
    u = torch.tensor(golden[f"{case}/u"], dtype=dtype).requires_grad_()
    y, cotangent = golden[f"{case}/y"], torch.tensor(golden[f"{case}/cotangent"], dtype=dtype)
    if path == "forward":
        out = net(u)
        assert relative(out, y) < tolerance
        out.backward(cotangent)
    elif case.startswith("per_weight"):
        out = net.last(u)
        assert relative(out, y[:, -1, 0]) < tolerance
        out.backward(cotangent[:, -1, 0])
    else:
        count = {"flat": 90, "flat_odd": 33}[case]
        out = net.tail(u, count)
        assert relative(out, y[0, -count:, 0]) < tolerance
        out.backward(cotangent[0, -count:, 0])
    for name, p in net.named_parameters():
        assert relative(p.grad, golden[f"{case}/grad/{name}"]) < tolerance, name
    assert relative(u.grad, golden[f"{case}/grad_u"]) < tolerance


def mamba_by_the_book(net, u):
    """The block of SlowMamba's docstring, token by token, in plain loops over [B, d] and [B, d, n]."""
    p = dict(net.named_parameters())
    A, h, xs, ys = -torch.exp(p["A_log"]), 0, [], []
    for t in range(u.shape[1]):
        x, z = (u[:, t] @ p["in_proj.weight"].T).chunk(2, dim=1)
        xs.append(x)
        x = p["conv1d.bias"].expand_as(x)
        for k in range(net.d_conv):
            if t - k >= 0:
                x = x + p["conv1d.weight"][:, 0, net.d_conv - 1 - k] * xs[t - k]
        x = x * torch.sigmoid(x)
        dt, B, C = (x @ p["x_proj.weight"].T).split([1, net.d_state, net.d_state], dim=1)
        delta = torch.log1p(torch.exp(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
        h = torch.exp(delta[:, :, None] * A) * h + (delta * x)[:, :, None] * B[:, None, :]
        y = (h * C[:, None, :]).sum(-1) + p["D"] * x
        ys.append((y * z * torch.sigmoid(z)) @ p["out_proj.weight"].T)
    return torch.stack(ys, dim=1)


sizes = st.tuples(*(st.integers(1, n) for n in (12, 9, 5, 8, 20)))  # d_inner, L, d_state, d_conv, B


@given(sizes, st.sampled_from([1e-4, 1.0, 20.0]), st.sampled_from([-3.0, 0.0, 3.0]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mamba_equals_the_recurrence_for_any_shape(monkeypatch, size, scale, dt_shift, seed):
    d_inner, length, d_state, d_conv, rows = size
    torch.manual_seed(seed)
    net = SlowMamba(d_state, d_conv, d_inner, "reference").double()
    net.dt_proj.bias.data += dt_shift
    u = (torch.randn(rows, length, 1, dtype=torch.float64) * scale).requires_grad_()
    expected = mamba_by_the_book(net, u)
    monkeypatch.setattr(hypernet, "elements_at_once", lambda device: 3 * d_inner * d_state)  # forces several chunks
    cotangent, half = torch.randn_like(expected), (length + 1) // 2
    inputs = [u, *net.parameters()]
    for out, book, v in (
        (net(u), expected, cotangent),
        (net.last(u), expected[:, -1, 0], cotangent[:, -1, 0]),
        (net.tail(u[:1], half), expected[0, -half:, 0], cotangent[0, :half, 0]),
    ):
        assert relative(out, book) < 1e-9
        ours = torch.autograd.grad(out, inputs, v, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(book, inputs, v, retain_graph=True, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            a, b = (torch.zeros(1) if g is None else g for g in (a, b))
            assert torch.allclose(a.double(), b.double(), rtol=1e-7, atol=1e-9 * float(b.abs().max() + 1e-12))


def test_tail_leaves_out_forgotten_tokens_and_nothing_else():
    torch.manual_seed(0)
    net = SlowMamba(d_state=3, d_conv=4, expand=5)
    net.dt_proj.bias.data += 3  # large steps: short memory
    u = torch.randn(1, 3001, 1, requires_grad=True)
    start = selective_scan.first_needed(net, u, 2900)
    assert 0 < start < 2890, "with this memory most of the sequence is forgotten, but not all before the tail"
    cut, whole = net.tail(u, 101), net(u)[0, -101:, 0]
    assert relative(cut, whole) < 1e-6
    v = torch.randn(101)
    a, b = (torch.autograd.grad(y, u, v)[0][0, :, 0] for y in (cut, whole))
    assert (a - b).abs().max() < 1e-6 * b.abs().max()
    assert torch.all(a[:start] == 0) and b[:start].abs().max() < 1e-6 * b.abs().max()
    # Another Δ, another cut: the decision comes from the actual values.
    net.dt_proj.bias.data -= 2
    assert selective_scan.first_needed(net, u, 2900) < start


def test_the_flat_layout_forgets():
    """l windows of n unit-variance gradients and the LRE before them; how strongly the slow gradient (the
    last n outputs, randomly projected) depends on each window, relative to the newest. Medians over initialisations,
    within an order of magnitude of the documented figures."""
    for n, documented in ((432, (4e-2, 3e-5, 7e-8)), (2304, (2e-2, 3e-7, 6e-12))):
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            net, length = SlowMamba(scan="reference").double(), 5
            u = torch.randn(1, 1 + length * n, 1, dtype=torch.float64, requires_grad=True)
            net(u)[0, -n:, 0].backward(torch.randn(n, dtype=torch.float64))
            grad = u.grad[0, :, 0]
            windows = grad[1:].view(length, n).norm(dim=1)
            assert torch.all(windows.diff() > 0), "the older, the weaker"
            found.append(torch.stack([windows[-2], windows[-3], grad[0].abs()]) / windows[-1])
        for name, value, figure in zip(
            ("window before last", "older", "LRE"),
            torch.stack(found).median(0).values.tolist(),
            documented,
            strict=True,
        ):
            assert figure / 12 < value < figure * 12, (n, name, value)


def test_memory_stays_bounded_for_resnet110():
    """1.7 million weights, 6 tokens each, forward and backward, in a process of its own."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads the peak memory of a process from /proc")
    code = """
import torch, hypernet
net, u = hypernet.SlowMamba(d_state=4, expand=8, scan="reference"), torch.randn(1_730_000, 6, 1)
y = net.last(u); y.backward(torch.ones_like(y))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(out) / 2**20 < 1.0, "GB; a single [tokens, d_inner, d_state] tensor would take 1.3"


def test_initialisation_is_mambas():
    torch.manual_seed(0)
    net = SlowMamba()
    assert torch.allclose(torch.exp(net.A_log), torch.arange(1.0, 17).repeat(100, 1), rtol=1e-6)
    assert torch.all(net.D == 1)
    dt = F.softplus(net.dt_proj.bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and dt.log().std() > 1  # log-uniform over two decades
    assert net.dt_proj.weight.abs().max() <= 1 and net.dt_proj.weight.std() > 0.4
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert shapes == {
        **{"A_log": (100, 16), "D": (100,), "in_proj.weight": (200, 1), "conv1d.weight": (100, 1, 8)},
        **{"conv1d.bias": (100,), "x_proj.weight": (33, 100), "dt_proj.weight": (100, 1), "dt_proj.bias": (100,)},
        **{"out_proj.weight": (1, 100)},
    }


# mamba-ssm's own layout: a package, and its compiled extension as a top-level module of another name. The stand-ins do
# what the package's kernels do, in plain PyTorch, and check how they are called.
EXTENSION = """
import torch
calls = []
def fwd(u, delta, A, B, C):
    assert all(v.stride(-1) == 1 for v in (u, delta, B, C)), "the kernel wants the time axis contiguous"
    calls.append(tuple(u.shape))
    h, ys = 0, []
    for t in range(u.shape[-1]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta * u)[..., t, None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(ys, dim=-1)
"""
INTERFACE = """
import selective_scan_cuda
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **others):
    assert D is None and z is None and delta_bias is None and not delta_softplus and not others
    return selective_scan_cuda.fwd(u, delta, A, B, C)
"""
BACKEND = """
import torch, hypernet
from hypernet import SlowMamba
torch.manual_seed(0)
net, u = SlowMamba(3, 4, 5, "mamba-ssm"), torch.randn(11, 6, 1)
try: net.last(u)
except RuntimeError as e: assert "CUDA devices only" in str(e), e
else: raise AssertionError
assert SlowMamba(3, 4, 5, "auto").backend("cpu", torch.float64) == "reference"
assert SlowMamba(3, 4, 5, "reference").backend("cuda") == "reference"
fused, hypernet.selective_scan = hypernet.selective_scan, None
assert SlowMamba(3, 4, 5, "auto").backend("cuda") == "mamba-ssm"
hypernet.selective_scan = fused
reference = SlowMamba(3, 4, 5, "reference")
reference.load_state_dict(net.state_dict())
for name in ("backend", "unfused_backend"): setattr(SlowMamba, name, lambda self, *_: self.scan)
for method in (lambda n: n.last(u), lambda n: n(u)[:, :, 0], lambda n: n.tail(u[:1], 4)):
    ours, theirs = method(net), method(reference)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    v = torch.randn_like(ours)
    found = [torch.autograd.grad(y, n.parameters(), v) for y, n in ((ours, net), (theirs, reference))]
    for a, b in zip(*found, strict=True): assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
import selective_scan_cuda
assert selective_scan_cuda.calls and selective_scan_cuda.__file__.startswith(SITE)
print("all right")
"""


def site_with_mamba_ssm(tmp_path, extension=EXTENSION):
    """A folder of installed packages with stand-ins for mamba-ssm."""
    site = tmp_path / "site"
    (site / "mamba_ssm" / "ops").mkdir(parents=True)
    for package in ("mamba_ssm", "mamba_ssm/ops"):
        (site / package / "__init__.py").write_text("")
    (site / "mamba_ssm" / "ops" / "selective_scan_interface.py").write_text(INTERFACE)
    (site / "selective_scan_cuda.py").write_text(extension)
    return site


def with_site(site, *command):
    """A Python command in the repository's folder, with `site` after it on the path, as installed packages are."""
    return Program(*command, env={**os.environ, "PYTHONPATH": str(site)}).end()


def test_mamba_ssm_is_reached_through_its_own_import(tmp_path):
    site = site_with_mamba_ssm(tmp_path)
    result = with_site(site, "-c", f"SITE = {str(site)!r}\n{BACKEND}")
    assert result.stdout == "all right\n", result.stdout + result.stderr


@pytest.mark.parametrize(
    "extension, words",
    [
        (None, "ModuleNotFoundError: No module named 'mamba_ssm'"),
        ("raise ImportError('libcudart.so.11.0: cannot open shared object file')", "libcudart.so.11.0: cannot open"),
        ("raise AttributeError('undefined symbol')", "AttributeError: undefined symbol"),
    ],
)
def test_where_importing_mamba_ssm_fails_its_own_message_is_shown(tmp_path, extension, words):
    site = tmp_path if extension is None else site_with_mamba_ssm(tmp_path, extension)
    command = "train_fsg.py --dataset digits --arch resnet8 --scan mamba-ssm --limit-steps 2 --out"
    result = with_site(site, *command.split(), str(tmp_path))
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr and "requirements-cuda.txt" in result.stderr


def test_a_balanced_fsg_is_made_before_its_scan_can_run(monkeypatch):
    """FSG is made on the CPU and moved: choosing its start must not call the GPU's scan."""
    monkeypatch.setattr(hypernet, "mamba_ssm_scan", lambda: None)
    FSG(models.binary_layers(network()), d_state=2, d_conv=3, expand=4, scan="mamba-ssm")


def test_scan_names():
    with pytest.raises(ValueError, match="use auto, fused, mamba-ssm or reference"):
        SlowMamba(scan="cuda")


def test_lstm_last_is_its_last_output():
    torch.manual_seed(0)
    net = SlowLSTM(7).double()
    u = torch.randn(50, 6, 1, dtype=torch.float64)
    v = torch.randn(50, dtype=torch.float64)
    whole = torch.autograd.grad(net(u)[:, -1, 0], net.parameters(), v)
    for a, b in zip(torch.autograd.grad(net.last(u), net.parameters(), v), whole, strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(net.last(u), net(u)[:, -1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# FastNet.


@pytest.mark.parametrize("act", ["none", "relu", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [2, 3])
def test_fast_net_equals_the_network_it_collapses(act, bias, depth):
    torch.manual_seed(0)
    net = FastNet(20, act, bias, depth).double()
    assert len(net.linears) == depth and net.linears[0].in_features == net.linears[-1].out_features == 1
    w = torch.cat([torch.randn(99, dtype=torch.float64), torch.zeros(1)]).requires_grad_()
    x = w.unsqueeze(1)
    for i, linear in enumerate(net.linears):
        x = F.linear(x, linear.weight, linear.bias)
        if i < depth - 1:
            x = {"none": lambda x: x, "relu": torch.relu, "tanh": torch.tanh}[act](x)
    out = net(w)
    assert torch.allclose(out, x.squeeze(1), rtol=1e-10, atol=1e-12)
    v = torch.randn_like(out)
    ours = torch.autograd.grad(out, net.parameters(), v)
    theirs = torch.autograd.grad(x.squeeze(1), net.parameters(), v)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_fast_net_starts_as_ste():
    torch.manual_seed(0)
    layers = models.binary_layers(models.build("resnet8", 10))
    fast = FSG(layers, expand=2, d_state=1).fast
    w = torch.linspace(0, 1, 11)
    assert torch.allclose(fast(w), 2 * w, atol=1e-5), "c = 2"
    assert not torch.allclose(ReleasedFSG(layers, expand=2, d_state=1).fast(w), 2 * w, atol=1e-2)
    assert torch.allclose(MultiFC(layers).fast(w), 2 * w, atol=1e-5)
    g = torch.randn(20) * 1e-4
    for act in ("none", "relu", "tanh"):
        assert torch.allclose(FCGrad(layers, act=act).fast(g), g, rtol=1e-2, atol=1e-9)
    bwn = models.binary_layers(models.build("resnet8", 10, "bwn"))
    near = FSG(bwn, expand=2, d_state=1).fast(torch.linspace(-0.1, 0.1, 5))
    assert torch.allclose(near, torch.ones(5), atol=0.05), "positive on both sides of 0, and not vanishing there"
    with pytest.raises(ValueError, match="tanh"):
        FastNet(act="gelu")


# ---------------------------------------------------------------------------------------------------------------------
# Generators, on a small network with convolutions and a linear layer.


def network(quantizer="dorefa", dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 1)),
        *(nn.Flatten(), nn.Linear(27, 6, bias=False), nn.ReLU(), nn.Linear(6, 4)),
    )
    return models.binarize_(net, quantizer, scale=1.0).to(dtype)


def backward(net, seed):
    g = torch.Generator().manual_seed(seed)
    p = next(net.parameters())
    x = torch.randn(8, 3, 5, 5, generator=g, dtype=torch.float64).to(p.dtype)
    y = torch.randint(4, (8,), generator=g)
    for parameter in net.parameters():
        parameter.grad = None
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    return loss


def small_fsg(layers, **kwargs):
    options = {"d_state": 2, "d_conv": 3, "expand": 4, "hidden": 6, "length": 3, "hyper_sample": 1.0, **kwargs}
    return FSG(layers, **options)


def small_released(layers):
    return ReleasedFSG(layers, d_state=2, d_conv=3, expand=4, hidden=6, length=3)


def nudge(module, seed=1):
    """Move φ off its special starting point, so that no term of the formula is trivially 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


MAKERS = {
    "fsg-mamba": lambda layers: small_fsg(layers),
    "fsg-lstm": lambda layers: small_fsg(layers, hgs="lstm"),
    "fsg-flat": lambda layers: small_fsg(layers, history="flat"),
    "fsg-layer-rms": lambda layers: small_fsg(layers, balance="layer-rms"),
    "fsg-as-written": lambda layers: small_fsg(layers, balance="none"),
    "fsg-raw-no-lre": lambda layers: small_fsg(
        layers, normalize="none", balance="none", lre=False, fast_act="relu", beta=0.4
    ),
    "fsg-newest": lambda layers: small_fsg(layers, history="newest"),
    "fsg-tanh": lambda layers: small_fsg(layers, fast_act="tanh", length=1),
    "fsg-sampled": lambda layers: small_fsg(layers, hyper_sample=0.3),
    "fcgrad": lambda layers: FCGrad(layers, 6, "tanh"),
    "multifc": lambda layers: MultiFC(layers, 6),
    "lstmfc": lambda layers: LSTMFC(layers, 6),
}
UNLEARNED = {"ste": STE, "gate": GatedHistory}
RELEASED = {
    "released": small_released,
    "released-lstm": lambda layers: ReleasedFSGLSTM(layers, hidden=6),
    "released-fcgrad": lambda layers: ReleasedFCGrad(layers, 6),
    "released-multifc": lambda layers: ReleasedMultiFC(layers, 6),
    "released-lstmfc": lambda layers: ReleasedLSTMFC(layers, 6),
}


def formula(name, gen, layers, latents, grads, states=None, sampled=None):
    """The equations in hypernet.py's docstrings, restated layer by layer.

    latents [steps][layer], grads [steps][layer] -> [G of each layer].
    The newest step is the last one; states: LSTMFC's (h, c) before it, [layer] each. sampled: the weights that the
    terms are balanced over, [layer] indices; None: all.
    """
    out = []
    for i, layer in enumerate(layers):
        W, g = latents[-1][i], grads[-1][i]
        D = quantizers.calibration(W, layer.quantizer)
        pre = quantizers.pre_quantize(W, layer.quantizer)
        if name == "fcgrad":
            out.append(D * gen.fast.mlp(g.flatten()).view_as(W))
            continue
        if name == "lstmfc":
            h, _ = gen.cell(pre.reshape(-1, 1), states[i])
            out.append(D * g * gen.out(h).view_as(W))
            continue
        fast = g * gen.fast.mlp(pre.flatten()).view_as(W)
        if name == "multifc":
            out.append(D * fast)
            continue
        past = [step[i] for step in grads[-gen.length :]]
        past = [torch.zeros_like(g)] * (gen.length - len(past)) + past  # unfilled slots are zero
        if gen.layout == "newest":
            past = [torch.zeros_like(g)] * (gen.length - 1) + past[-1:]
        past = torch.stack([p.flatten() for p in past])  # [l, n]
        rms = past.square().mean().clamp_min(1e-300).sqrt() if gen.normalize == "layer-rms" else torch.ones(())
        sign = torch.where(g >= 0, 1.0, -1.0).to(g.dtype) if gen.balance != "none" else torch.ones_like(g)
        past = past / rms * sign.flatten()
        token = gen.lre.weight[i].view(1, 1) if gen.lre is not None else None
        if gen.layout != "flat":
            u = past.T if token is None else torch.cat([token.expand(past.shape[1], 1), past.T], dim=1)
            slow = gen.slow(u.unsqueeze(-1))[:, -1, 0]
        else:
            u = past.reshape(-1, 1) if token is None else torch.cat([token, past.reshape(-1, 1)])
            slow = gen.slow(u.unsqueeze(0))[0, -past.shape[1] :, 0]
        slow = (slow * rms).view_as(W) * sign
        if gen.balance != "none":
            at = slice(None) if sampled is None else sampled[i]  # the RMS is that of the sampled weights
            fast = g * gen.fast.mlp(pre.flatten()).abs().view_as(W)
            fast, slow = (balanced(term.flatten(), g, at) for term in (fast, slow))
            mean = past.mean(0) * sign.flatten() * (gen.balance == "keep-mean")
            kept = ((g.flatten() - slow) * mean)[at].sum() / mean[at].square().sum().clamp_min(1e-300)
            fast, slow = fast.view_as(W), balanced(slow + kept * mean, g, at).view_as(W)
        out.append(D * ((1 - gen.beta) * fast + gen.beta * slow))
    return out


def balanced(term, g, at=slice(None)):
    """`term` at the RMS of g, amplified at most a thousandfold; 0 where g is 0."""
    if not g.any():
        return 0 * term
    target, rms = (x.square().mean().clamp_min(1e-300).sqrt() for x in (g, term[at]))
    return term * target / torch.maximum(rms, 1e-3 * target)


def record(net, gen, layers, seed, latents, grads):
    """One backward and generate(); what went in is appended, what came out is in weight.grad."""
    backward(net, seed)
    latents.append([layer.weight.detach().clone() for layer in layers])
    grads.append([layer.weight.grad.clone() for layer in layers])
    gen.generate()
    return [layer.weight.grad.clone() for layer in layers]


def lstm_states(gen, layers):
    """LSTMFC's state before its newest step, [layer] of (h, c)."""
    return [tuple(part.clone()) for part in gen.state.split([layer.weight.numel() for layer in layers], dim=1)]


@pytest.mark.parametrize("quantizer", ["dorefa", "bwn", "bwn-f"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_second_step_equals_the_formula(name, quantizer):
    net = network(quantizer)
    layers = models.binary_layers(net)
    gen = MAKERS[name](layers)
    nudge(gen)
    latents, grads = [], []
    first = record(net, gen, layers, 0, latents, grads)
    for G, W, g, layer in zip(first, latents[0], grads[0], layers, strict=True):
        assert torch.allclose(G, quantizers.calibration(W, layer.quantizer) * g, rtol=1e-12), "the first step is STE"
    for layer, G in zip(layers, first, strict=True):
        layer.weight.data -= 0.1 * G
    second = record(net, gen, layers, 1, latents, grads)
    states = lstm_states(gen, layers) if name == "lstmfc" else None
    for G, expected in zip(second, formula(name, gen, layers, latents, grads, states), strict=True):
        assert relative(G, expected) < 1e-10


@pytest.mark.parametrize("name", MAKERS)
def test_later_steps_train_phi_with_the_gradient_of_v_times_the_previous_G(name):
    """φ's gradient at step t is that of ⟨v, G_{t−1}⟩, v = −D_t ⊙ ĝ_t / ‖…‖: finite differences, every tensor of φ."""
    net = network()
    layers = models.binary_layers(net)
    gen = MAKERS[name](layers)
    nudge(gen)
    latents, grads = [], []
    for t in range(5):  # the history of length 3 is full
        if t == 4:
            before = copy.deepcopy(dict(gen.named_parameters()))
            sample = gen.sample
            states = lstm_states(gen, layers) if name == "lstmfc" else None
        for layer, G in zip(layers, record(net, gen, layers, t, latents, grads), strict=True):
            layer.weight.data -= 0.02 * G
    found = {k: p.grad.clone() for k, p in gen.named_parameters() if p.requires_grad}
    after = {k: p.detach().clone() for k, p in gen.named_parameters()}

    v = [-quantizers.calibration(W, "dorefa") * g for W, g in zip(latents[4], grads[4], strict=True)]
    norm = torch.stack([x.norm() for x in v]).norm()
    sampled = None
    if name == "fsg-sampled":  # ⟨v, G⟩ over the sampled weights, each with the number of weights that it stands for
        begins = torch.tensor([0, *gen.sizes[:-1]]).cumsum(0)
        sampled = [at - begin for at, begin in zip(sample.at.split(sample.sizes), begins, strict=True)]
        for x, at, weight in zip(v, sampled, sample.stands_for.split(sample.sizes), strict=True):
            stands_for = torch.zeros(x.numel(), dtype=x.dtype).index_add(0, at, weight.to(x.dtype))
            x *= stands_for.view_as(x)

    def objective():
        G = formula(name, gen, layers, latents[:4], grads[:4], states, sampled)
        return sum((a * b).sum() for a, b in zip(v, G, strict=True)).item() / norm.item()

    with torch.no_grad():
        for k, p in gen.named_parameters():
            p.copy_(before[k])
        for k, p in gen.named_parameters():
            flat, g = p.view(-1), found[k].view(-1) if k in found else torch.zeros(p.numel())  # not trained
            for i in range(0, len(flat), max(1, len(flat) // 4)):
                h, keep = 1e-5, flat[i].item()
                flat[i] = keep + h
                up = objective()
                flat[i] = keep - h
                down = objective()
                flat[i] = keep
                assert math.isclose((up - down) / (2 * h), g[i].item(), rel_tol=2e-4, abs_tol=1e-8), (k, i)
    moved = [k for k in found if not torch.equal(after[k], before[k])]
    assert len(moved) == len(found), "Adam has moved every tensor of φ"


def test_the_sampled_gradient_of_phi_is_unbiased():
    """Its mean over many draws is the whole gradient, within the draws' standard error."""
    net = network()
    layers = models.binary_layers(net)
    gen = small_fsg(layers, hyper_sample=0.1, balance="none")
    nudge(gen)
    for t in range(3):
        backward(net, t)
        gen.generate()
    torch.manual_seed(0)
    v = torch.randn_like(gen.ghat)
    D, pre = gen.calibrate()

    def gradient(graph, cotangent):
        found = torch.autograd.grad(graph, [*gen.parameters()], cotangent)
        return torch.cat([g.flatten() for g in found])

    draws = []
    for seed in range(400):
        gen.sample_seed = seed
        G = gen.make(D, pre)
        assert relative(G[gen.sample.at], gen.last_G) < 1e-12
        assert gen.sample.sizes == [max(1, round(0.1 * size)) for size in gen.sizes]
        draws.append(gradient(gen.last_G, v[gen.sample.at] * gen.sample.stands_for))
    draws, whole = torch.stack(draws), gradient(gen.gradient(gen.seen(D, pre)), v)
    error = (draws.mean(0) - whole).abs() / (draws.std(0) / len(draws) ** 0.5 + 1e-12 * whole.abs().max())
    assert error.square().mean() < 3 and (draws[0] - whole).norm() > 0.05 * whole.norm()


def test_phi_moves_at_its_learning_rates():
    net = network()
    layers = models.binary_layers(net)
    gen = small_fsg(layers, lr_fast=3e-2, lr_slow=2e-3, fast_act="tanh")
    for t in range(2):
        backward(net, t)
        gen.generate()
    before = copy.deepcopy(dict(gen.named_parameters()))
    backward(net, 2)
    gen.generate()
    for k, p in gen.named_parameters():  # Adam's first step is ±lr wherever there is a gradient
        used = p.grad.abs() > 1e-5  # far above eps
        step = (p.detach() - before[k])[used]
        lr = 3e-2 if k.startswith("fast") else 2e-3
        assert torch.allclose(step, -lr * p.grad[used].sign(), rtol=2e-3), k


@pytest.mark.parametrize("quantizer", ["dorefa", "bwn", "bwn-f"])
@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_the_gate_sums_the_gradients_since_the_last_flip(quantizer, memory):
    """The docstring's formula, as a sum over the steps in which a weight had the sign that it has now."""
    net = network(quantizer)
    layers = models.binary_layers(net)
    gen = GatedHistory(layers, memory=memory, epsilon=0.5)
    scales = [layer.weight.detach().square().mean().sqrt() for layer in layers]
    layers[-1].weight.data.zero_()
    latents, grads, lengths = [], [], set()
    for t in range(8):
        G = record(net, gen, layers, t, latents, grads)
        for i, layer in enumerate(layers):
            W = latents[-1][i]
            expected, same, age = torch.zeros_like(W), torch.ones_like(W, dtype=bool), torch.zeros_like(W)
            for k in range(t + 1):
                same &= (latents[t - k][i] >= 0) == (W >= 0)
                expected += torch.where(same, memory**k * grads[t - k][i], 0)
                age += same
            r = W.abs() / W.square().mean().sqrt().clamp_min(1e-300)
            expected *= quantizers.calibration(W, quantizer) / (0.5 + r)
            assert relative(G[i], expected) < 1e-12
            lengths |= set(age.flatten().int().tolist())
            if t:
                layer.weight.data += 0.5 * scales[i] * torch.randn(W.shape, dtype=W.dtype)
                layer.weight.data.view(-1)[t % W.numel()] = 0.0  # sign(0) is +1
    assert lengths == set(range(1, 9)), "some weights have just flipped, some never"


@pytest.mark.parametrize("beta", [0.3, 0.9])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"hgs": "lstm"}, {"history": "flat"}, {"hyper_sample": 0.3}, {"history": "newest"}, {"balance": "layer-rms"}],
)
def test_balanced_beta_is_the_slow_terms_share(kwargs, beta):
    """In every layer both terms have the RMS of ĝ, whatever the scale of φ; D is 1 under bwn."""
    net = network("bwn")
    layers = models.binary_layers(net)
    gen = small_fsg(layers, beta=beta, **kwargs)
    nudge(gen)
    for p in gen.slow.parameters():
        p.data *= 3
    for t in range(4):
        backward(net, t)
        gen.generate()
    fast, slow = (term.detach() for term in gen.terms())
    for layer, f, s in zip(layers, fast.split(gen.sizes), slow.split(gen.sizes), strict=True):
        g = gen.ghat.split(gen.sizes)[layers.index(layer)].square().mean().sqrt()
        assert math.isclose(f.square().mean().sqrt(), (1 - beta) * g, rel_tol=1e-9)
        assert math.isclose(s.square().mean().sqrt(), beta * g, rel_tol=1e-9)
    share = gen.measure(1.0)["slow_share"]
    assert math.isclose(share, beta**2 / (beta**2 + (1 - beta) ** 2), rel_tol=1e-9)
    assert torch.all(fast * gen.ghat >= 0), "the fast term keeps the gradient's sign"


@pytest.mark.parametrize("kwargs", [{}, {"hgs": "lstm"}, {"history": "flat"}, {"hyper_sample": 0.3}])
def test_balanced_flipping_all_gradients_flips_G(kwargs):
    net = network("bwn")
    layers = models.binary_layers(net)
    found = []
    for sign in (1, -1):
        torch.manual_seed(1)
        gen = small_fsg(layers, **kwargs)
        nudge(gen)
        for t in range(4):
            backward(net, t)
            for layer in layers:
                layer.weight.grad *= sign
            gen.generate()
        found.append(torch.cat([layer.weight.grad.flatten() for layer in layers]))
    assert relative(found[1], -found[0]) < 1e-9


@pytest.mark.parametrize(
    "kwargs, least",
    [
        (dict(d_state=4, expand=8), 0),
        (dict(d_state=4, expand=8, history="flat"), 0),
        (dict(hgs="lstm", hidden=16), 0.85),
        (dict(hgs="lstm", hidden=16, length=9, lre=False), 0.8),
        (dict(hgs="lstm", hidden=1), 0.3),
    ],
)
def test_balanced_training_begins_along_the_gradient(kwargs, least):
    """Before φ has learned much, the cosine of G and D ⊙ ĝ."""
    for seed in range(5):
        torch.manual_seed(seed)
        layers = models.binary_layers(network("bwn"))
        gen = FSG(layers, **kwargs)
        for _ in range(3):
            for layer in layers:
                layer.weight.grad = torch.randn_like(layer.weight)
            straight = torch.cat([layer.weight.grad.flatten() for layer in layers])
            gen.generate()
        G = torch.cat([layer.weight.grad.flatten() for layer in layers])
        assert F.cosine_similarity(G, straight, dim=0) > least


@pytest.mark.parametrize(
    "kwargs", [{}, {"hgs": "lstm"}, {"history": "flat"}, {"hyper_sample": 0.3}, {"history": "newest"}, {"length": 1}]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_balanced_a_gradient_that_stays_the_same_is_not_reversed(kwargs, sign):
    """Whatever the slow-net is: a part of at most the gradient's norm, orthogonal to it, is added."""
    layers = models.binary_layers(network("bwn"))
    gen = small_fsg(layers, beta=1.0, **kwargs)
    nudge(gen)
    for p in (gen.slow.out if "hgs" in kwargs else gen.slow.out_proj).parameters():
        p.data *= 10 * sign
    gradients = [torch.randn_like(layer.weight) for layer in layers]
    for _ in range(5):
        for layer, g in zip(layers, gradients, strict=True):
            layer.weight.grad = g.clone()
        gen.generate()
        for layer, g in zip(layers, gradients, strict=True):
            cosine = (layer.weight.grad * g).sum() / layer.weight.grad.norm() / g.norm()
            assert cosine > 0.7 - 1e-9


def test_a_slow_net_that_starts_at_zero_stays_finite_and_learns():
    net = network()
    layers = models.binary_layers(net)
    gen = small_fsg(layers, hgs="lstm", balance="layer-rms")
    for t in range(6):
        backward(net, t)
        gen.generate()
        assert all(p.isfinite().all() for p in gen.parameters())
        assert all(layer.weight.grad.isfinite().all() for layer in layers)
    assert gen.measure(1.0)["slow_share"] > 0.9


def test_the_history_is_the_last_gradients_oldest_first():
    net = network()
    layers = models.binary_layers(net)
    gen = small_fsg(layers)
    assert torch.all(gen.history == 0)
    seen = []
    for t in range(7):
        backward(net, t)
        seen.append(torch.cat([layer.weight.grad.flatten() for layer in layers]))
        gen.generate()
        for age in range(3):
            row = gen.history[-1 - age]
            assert torch.equal(row, seen[t - age] if t >= age else torch.zeros_like(row))


def test_ste():
    net = network()
    layers = models.binary_layers(net)
    gen = STE(layers)
    for t in range(3):
        backward(net, t)
        expected = [quantizers.calibration(x.weight.detach(), "dorefa") * x.weight.grad for x in layers]
        others = [p.grad.clone() for p in net.parameters() if all(p is not x.weight for x in layers)]
        gen.generate()
        assert all(relative(x.weight.grad, e) < 1e-12 for x, e in zip(layers, expected, strict=True))
        rest = [p.grad for p in net.parameters() if all(p is not x.weight for x in layers)]
        assert all(torch.equal(a, b) for a, b in zip(others, rest, strict=True)), "only binary weights are touched"


@pytest.mark.parametrize("name", [*UNLEARNED, *MAKERS])
def test_what_is_measured_of_a_step(name):
    net = network()
    layers = models.binary_layers(net)
    gen = (UNLEARNED | MAKERS)[name](layers)
    nudge(gen)
    for t in range(3):
        backward(net, t)
        latents, ghats = [w.weight.detach().clone() for w in layers], [w.weight.grad.clone() for w in layers]
        gen.generate()
        for layer in layers:
            layer.weight.data -= 0.1 * layer.weight.grad
    G = [layer.weight.grad.clone() for layer in layers]
    found = gen.measure(0.1)
    assert all(torch.equal(layer.weight.grad, g) for layer, g in zip(layers, G, strict=True)), "nothing is touched"
    flat = lambda tensors: torch.cat([t.flatten() for t in tensors])
    D = flat(quantizers.calibration(w, "dorefa") for w in latents)
    expected = {
        "cosine": F.cosine_similarity(flat(G), D * flat(ghats), dim=0),
        "step": flat(G).abs().mean(),  # as ΔW = −lr G here
    }
    if isinstance(gen, FSG | GatedHistory):
        with torch.no_grad():
            if isinstance(gen, FSG):
                slow = (
                    gen.beta
                    * D
                    * gen.slow_gradient(gen.seen(D, flat(quantizers.pre_quantize(w, "dorefa") for w in latents)))
                )
            else:
                slow = flat(G) * (1 - flat(ghats) / gen.past)
        fast = flat(G) - slow
        expected |= {"fast_rms": fast.square().mean().sqrt(), "slow_rms": slow.square().mean().sqrt()}
        expected["slow_share"] = slow.square().sum() / (slow.square().sum() + fast.square().sum())
        assert 0 < found["slow_share"] < 1
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert math.isclose(found[key], value, rel_tol=1e-9), key


@pytest.mark.parametrize("name", ["ste", "fsg-mamba", "fsg-flat", "multifc"])
def test_how_gradients_are_kept_does_not_matter(name):
    """zero_grad to None or to zeros, weights in channels_last from the start or later, or as a part of a larger tensor.

    Each step has two backward passes. The fused optimizer takes a gradient's memory as it is, in whatever order its
    elements are.
    """
    results = []
    for variant in ("none", "zeros", "channels_last", "channels_last later", "part"):
        net = network()
        if variant == "channels_last":
            net = net.to(memory_format=torch.channels_last)
        layers = models.binary_layers(net)
        for layer in layers if variant == "part" else []:  # as pruned channels are
            w = layer.weight.detach()
            layer.weight = nn.Parameter(torch.cat([w, w], 1)[:, : w.shape[1]])
        torch.manual_seed(1)
        gen = (UNLEARNED | MAKERS)[name](layers)
        if variant == "channels_last later":
            net = net.to(memory_format=torch.channels_last)
        # PyTorch's fused optimizers compute wrong values for weights that are a part of a tensor.
        optimizer = torch.optim.Adam(net.parameters(), 1e-2, fused=variant != "part")
        for t in range(4):
            optimizer.zero_grad(set_to_none=variant != "zeros")
            for half in range(2):
                g = torch.Generator().manual_seed(10 * t + half)
                x = torch.randn(8, 3, 5, 5, generator=g, dtype=torch.float64)
                F.cross_entropy(net(x), torch.randint(4, (8,), generator=g)).backward()
            gen.generate()
            optimizer.step()
        results.append([x.weight.grad.clone() for x in layers])
    for other in results[1:]:
        assert all(relative(a, b) < 1e-10 for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", [*UNLEARNED, *MAKERS, *RELEASED])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_state_dict_holds_all_that_matters(name, steps):
    """Saved, loaded into fresh objects, and continued: the same bits as without the interruption."""

    def fresh():
        net = network(dtype=torch.float32)
        layers = models.binary_layers(net)
        return net, (UNLEARNED | MAKERS | RELEASED)[name](layers)

    def train(net, gen, first, last):
        for t in range(first, last):
            if name in RELEASED:
                gen.look_ahead(0.01)
            backward(net, t)
            gen.generate()
            for layer in models.binary_layers(net):
                layer.weight.data -= 0.01 * layer.weight.grad
                if layer.bias is not None:
                    layer.bias.data -= 0.01 * layer.bias.grad

    net, gen = fresh()
    train(net, gen, 0, steps)
    saved = copy.deepcopy((net.state_dict(), gen.state_dict()))
    train(net, gen, steps, steps + 4)
    net2, gen2 = fresh()
    nudge(gen2)
    net2.load_state_dict(saved[0])
    gen2.load_state_dict(saved[1])
    train(net2, gen2, steps, steps + 4)
    for a, b in zip([*net.parameters(), *gen.parameters()], [*net2.parameters(), *gen2.parameters()], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_step_is_the_chain_rule_through_the_look_ahead(name):
    """Each step, restated layer by layer: the look-ahead weights and biases, φ's gradient and the update."""
    net = network()
    layers = models.binary_layers(net)
    gen = RELEASED[name](layers)
    optimizer = AuthorsAdam(net.parameters(), 0.02, weight_decay=1e-2)
    with_bias = [layer for layer in layers if layer.bias is not None]
    lrs, grads, pres, states = [0.02, 0.02, 0.01, 0.03, 0.03], [], [], None
    refined, bias_refined = [], []
    for t, lr in enumerate(lrs):
        persistent = copy.deepcopy(net.state_dict())
        latents = [layer.weight.detach().clone() for layer in layers]
        gen.look_ahead(lr)
        stood = [layer.weight.detach().clone() for layer in layers]
        biases = [layer.bias.detach().clone() for layer in with_bias]
        if t == 0:
            assert all(torch.equal(value, persistent[key]) for key, value in net.state_dict().items())
        backward(net, t)
        ghat, bias_grads = [x.weight.grad.clone() for x in layers], [x.bias.grad.clone() for x in with_bias]
        if t > 0:
            mixes, updates, new_states = [], [], []
            for i, W in enumerate(latents):
                D, g, pre = quantizers.calibration(W, "dorefa"), grads[-1][i], pres[-1][i]
                if name.endswith(("lstm", "lstmfc")):
                    new_states.append(gen.cell(pre.reshape(-1, 1), None if states is None else states[i]))
                    carried = g * gen.out(new_states[-1][0]).view_as(g)
                if name == "released-fcgrad":
                    fast = gen.fast.mlp(g.flatten()).view_as(g)
                elif name == "released-lstmfc":
                    fast = carried
                else:
                    fast = g * gen.fast.mlp(pre.flatten()).view_as(g)
                updates.append((D * fast).detach())
                if name == "released":
                    past = [step[i].flatten() for step in grads[-3:]]  # the window grows, without zeros before it
                    u = torch.cat([gen.lre.weight[i], *past]).view(1, -1, 1)
                    mixes.append(0.1 * D * fast + 0.9 * gen.slow(u)[0, -g.numel() :, 0].view_as(g))
                else:
                    mixes.append(0.1 * D * fast + 0.9 * carried if name == "released-lstm" else D * fast)
                along = mixes[i] if name in ("released", "released-lstm") else refined[i]
                assert relative(stood[i], W - lr * along) < 1e-10
            states = [(h.detach(), c.detach()) for h, c in new_states]
            for layer, bias, along in zip(with_bias, biases, bias_refined, strict=True):
                before = persistent[next(k for k, v in net.named_parameters() if v is layer.bias)]
                assert relative(bias, before - lr * along) < 1e-10
            v = [-lr * quantizers.calibration(w, "dorefa") * g for w, g in zip(stood, ghat, strict=True)]
            expected = torch.autograd.grad(mixes, list(gen.parameters()), v)
        gen.generate()
        for key, p in net.named_parameters():
            assert torch.equal(p, persistent[key]), "back where it was"
        if t > 0:
            assert all(relative(p.grad, e) < 1e-9 for p, e in zip(gen.parameters(), expected, strict=True))
            assert all(relative(x.weight.grad, u) < 1e-10 for x, u in zip(layers, updates, strict=True))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            refined = [(w - x.weight.detach()) / lr for x, w in zip(layers, latents, strict=True)]
            names = {id(p): key for key, p in net.named_parameters()}
            bias_refined = [(persistent[names[id(x.bias)]] - x.bias.detach()) / lr for x in with_bias]
        else:
            refined = [quantizers.calibration(w, "dorefa") * g for w, g in zip(latents, ghat, strict=True)]
            assert all(relative(x.weight.grad, r) < 1e-12 for x, r in zip(layers, refined, strict=True))
            bias_refined = bias_grads
        grads.append(ghat)
        pres.append([quantizers.pre_quantize(w, "dorefa") for w in stood])
    assert gen.measure(lr) == {}, "what it would measure is of another place"


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_generator_wants_its_two_calls_in_turn(name):
    net = network()
    gen = RELEASED[name](models.binary_layers(net))
    backward(net, 0)
    gen.generate()
    with pytest.raises(RuntimeError, match="look_ahead"):
        gen.generate()
    gen.look_ahead(0.0)  # a learning rate of 0 moves nothing
    with pytest.raises(RuntimeError, match="twice"):
        gen.look_ahead(0.1)
    backward(net, 1)
    gen.generate()
    gen.look_ahead(0.1)
    assert all(p.isfinite().all() for p in net.parameters())


def test_metaquants_bwn_has_a_scale_per_layer_which_its_gradient_carries_to_phi_alone():
    net = network("bwn-l")
    layers = models.binary_layers(net)
    layers[0].weight.data[0, 0, 0, 0] = 1.5  # beyond the gate
    for layer in layers:
        bits = layer.binary_weight()
        assert torch.equal(bits.sign(), torch.where(layer.weight >= 0, 1.0, -1.0).double())
        assert relative(bits.abs(), layer.weight.abs().mean().expand_as(bits)) < 1e-12
    gen = ReleasedMultiFC(layers, 6)
    backward(net, 0)
    gen.generate()
    g, before = [layer.weight.grad.clone() for layer in layers], [layer.weight.detach().clone() for layer in layers]
    gen.look_ahead(0.01)
    for layer, w, first in zip(layers, before, g, strict=True):
        path = w.abs().mean() * (w.abs() <= 1)
        assert relative(layer.weight, w - 0.01 * path * first) < 1e-12


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_the_authors_adam(eps):
    """Without ε it is torch's; with ε, which stands before the bias correction, it is torch's with a larger one."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64)) for _ in range(2))
    a = AuthorsAdam([{"params": [ours]}], 0.1, (0.8, 0.9), eps, weight_decay=0.3)
    b = torch.optim.Adam([theirs], 0.1, (0.8, 0.9), eps, weight_decay=0.3)
    for t in range(1, 6):
        for p in (ours, theirs):
            p.grad = torch.sin(3 * t * torch.arange(1, 8, dtype=torch.float64))
        b.param_groups[0]["eps"] = eps / math.sqrt(1 - 0.9**t)
        if t == 3:  # from its state on
            state = copy.deepcopy(a.state_dict())
            a = AuthorsAdam([ours], 1.0)
            a.load_state_dict(state)
        a.step(), b.step()
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("name", [*UNLEARNED, *MAKERS, *RELEASED])
def test_the_generator_follows_its_network_to_another_dtype(name):
    """After net.double() it goes on as a new generator for that network with the same state."""
    net = network(dtype=torch.float32)
    gen = (UNLEARNED | MAKERS | RELEASED)[name](models.binary_layers(net))

    def step(net, gen, t):
        if name in RELEASED:
            gen.look_ahead(0.01)
        backward(net, t)
        gen.generate()
        for layer in models.binary_layers(net):
            layer.weight.data -= 0.01 * layer.weight.grad

    for t in range(3):
        step(net, gen, t)
    net.double()
    other = copy.deepcopy(net)
    new = (UNLEARNED | MAKERS | RELEASED)[name](models.binary_layers(other))
    new.load_state_dict(copy.deepcopy(gen.state_dict()))
    for t in range(3, 6):
        step(net, gen, t), step(other, new, t)
    for a, b in zip([*net.parameters(), *gen.parameters()], [*other.parameters(), *new.parameters()], strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b) and (a.grad is None or a.grad.dtype == torch.float64)


@pytest.mark.parametrize("name", UNLEARNED)
def test_the_generator_follows_its_network_to_another_device(name):
    """After the first step too. 'meta' stands for a GPU."""
    for steps in (0, 1):
        net = network(dtype=torch.float32)
        gen = UNLEARNED[name](models.binary_layers(net))
        for t in range(steps):
            backward(net, t)
            gen.generate()
        net.to("meta")
        for layer in models.binary_layers(net):
            layer.weight.grad = torch.zeros_like(layer.weight)
        gen.generate()
        assert all(layer.weight.grad.is_meta for layer in models.binary_layers(net))


def test_samples_do_not_depend_on_the_default_device():
    shard = hypernet.Shard([5, 70, 1], False, False)
    expected = hypernet.Sampler(shard, 0.2).draw(3, torch.device("cpu"))
    with torch.device("meta"):
        found = hypernet.Sampler(shard, 0.2).draw(3, torch.device("cpu"))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", ["fsg-lstm", "fsg-mamba", "multifc", "released"])
def test_autocast_does_not_change_what_is_generated(name):
    found = []
    for enabled in (True, False):
        net = network(dtype=torch.float32)
        gen = (MAKERS | RELEASED)[name](models.binary_layers(net))
        for t in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                if name in RELEASED:
                    gen.look_ahead(0.01)
            backward(net, t)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                gen.generate()
        found.append([*(layer.weight.grad for layer in models.binary_layers(net)), *gen.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_after_an_error_in_the_backward_pass_of_phi_training_goes_on():
    net = network()
    gen = small_fsg(models.binary_layers(net), fast_act="tanh")

    def fail(grad):
        raise torch.OutOfMemoryError("no memory")

    for t in range(6):
        backward(net, t)
        if t == 3:
            handle = next(gen.fast.parameters()).register_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                gen.generate()
            handle.remove()
        else:
            gen.generate()
    assert all(layer.weight.grad.isfinite().all() for layer in gen.layers)


@pytest.mark.parametrize("name", MAKERS | UNLEARNED | RELEASED)
def test_a_generator_that_is_no_longer_used_is_freed(name):
    """The graph of the last step has no reference to the generator, which the garbage collector would not find."""
    net = network()
    gen = (UNLEARNED | MAKERS | RELEASED)[name](models.binary_layers(net))
    for t in range(4):
        if name in RELEASED:
            gen.look_ahead(0.01)
        backward(net, t)
        gen.generate()
    parts = [weakref.ref(part) for part in (gen, gen.layers[0])]
    del gen, net
    gc.collect()
    assert [part() for part in parts] == [None, None]


def test_zero_gradients_are_harmless():
    net = network()
    layers = models.binary_layers(net)
    gen = small_fsg(layers)
    for _ in range(4):
        for x in layers:
            x.weight.grad = torch.zeros_like(x.weight)
        gen.generate()
        assert all(torch.isfinite(x.weight.grad).all() for x in layers)
        assert all(torch.isfinite(p).all() for p in gen.parameters())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"beta": 1.5}, r"beta .* \[0, 1\]"),
        ({"beta": -0.1}, r"beta .* \[0, 1\]"),
        ({"hgs": "lstm", "history": "flat"}, "per-weight"),
        ({"hgs": "gru"}, "mamba or lstm"),
        ({"length": 0}, "at least 1"),
        ({"hyper_sample": 0.0}, "above 0 and at most 1"),
        ({"hyper_sample": 0.5, "history": "flat"}, "per-weight"),
        ({"normalize": "batch"}, "layer-rms"),
        ({"balance": "global"}, "keep-mean, layer-rms or none"),
    ],
)
def test_impossible_arguments(kwargs, message):
    layers = models.binary_layers(network())
    with pytest.raises(ValueError, match=message):
        small_fsg(layers, **kwargs)


@pytest.mark.parametrize(
    "kwargs, message",
    [({"memory": 1.0}, "below 1"), ({"memory": -0.1}, "at least 0"), ({"epsilon": 0.0}, "above 0")],
)
def test_impossible_arguments_of_the_gate(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GatedHistory(models.binary_layers(network()), **kwargs)


def test_impossible_layers():
    with pytest.raises(ValueError, match="no binary layer"):
        STE([])
    a, b = models.binary_layers(network("dorefa")), models.binary_layers(network("bwn"))
    with pytest.raises(ValueError, match="share one quantizer"):
        STE([*a, *b])
    with pytest.raises(RuntimeError, match="backward"):
        STE(a).generate()


def test_a_growing_gradient_is_adam_with_shorter_averages_and_a_larger_step():
    """What a learned scale c_t = c_0·ρ^t of the gradient does under Adam(β₁, β₂) with ε → 0.

    With b₁ = β₁/ρ and b₂ = β₂/ρ², and m′, v′ the averages of Adam(b₁, b₂) on the unscaled gradients g:

        m_t = (1 − β₁) Σ_k β₁^(t−k)·c_k·g_k  = c_t·(1 − β₁) Σ_k b₁^(t−k)·g_k   = c_t·(1 − β₁)/(1 − b₁)·m′_t
        v_t = (1 − β₂) Σ_k β₂^(t−k)·c_k²·g_k² = c_t²·(1 − β₂) Σ_k b₂^(t−k)·g_k² = c_t²·(1 − β₂)/(1 − b₂)·v′_t

    because c_k = c_t·ρ^(k−t). The bias corrections divide m by 1 − β₁^t, v by 1 − β₂^t, m′ by 1 − b₁^t and v′ by
    1 − b₂^t. In the step lr·m̂/√v̂ the scale c_t cancels, and what remains is the step of Adam(b₁, b₂) times

        F_t = f_t(β₁, b₁) / √f_t(β₂, b₂)    with    f_t(β, b) = (1 − β)/(1 − b) · (1 − b^t)/(1 − β^t)

    F_1 = 1, and F_t tends to (1 − β₁)/(1 − β₁/ρ)·√((1 − β₂/ρ²)/(1 − β₂)).
    """
    torch.manual_seed(0)
    rho, lr, beta1, beta2 = 1.0135, 1e-3, 0.9, 0.999
    b1, b2 = beta1 / rho, beta2 / rho**2
    scaled, plain = (nn.Parameter(torch.zeros(100, dtype=torch.float64)) for _ in range(2))
    adam = torch.optim.Adam([scaled], lr, betas=(beta1, beta2), eps=0)
    other = torch.optim.Adam([plain], lr, betas=(b1, b2), eps=0)
    f = lambda beta, b, t: (1 - beta) / (1 - b) * (1 - b**t) / (1 - beta**t)
    factor = lambda t: f(beta1, b1, t) / math.sqrt(f(beta2, b2, t))
    for t in range(1, 51):
        before = scaled.detach().clone(), plain.detach().clone()
        g = torch.randn(100, dtype=torch.float64)
        scaled.grad, plain.grad = 3e-4 * rho**t * g, g
        adam.step(), other.step()
        moved, expected = scaled.detach() - before[0], plain.detach() - before[1]
        assert torch.allclose(moved, factor(t) * expected, rtol=1e-9, atol=1e-15)
    limit = (1 - beta1) / (1 - b1) * math.sqrt((1 - b2) / (1 - beta2))
    assert factor(1) == 1 < factor(50) < limit and math.isclose(factor(100_000), limit, rel_tol=1e-12)
    assert math.isclose(limit, 4.677, rel_tol=1e-3)
