"""The fused scan against float64 (golden vectors, the recurrence by the book), extreme inputs, and no compiler."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hypernet import mamba_by_the_book, relative

import selective_scan
from hypernet import FSG, SlowMamba
from models import binarize_, binary_layers

problem = selective_scan.why_not(torch.device("cpu"), torch.float32, 6)
pytestmark = pytest.mark.skipif(problem is not None, reason=str(problem))


@pytest.mark.parametrize("case", ["per_weight", "per_weight_odd", "per_weight_short"])
def test_golden(golden, case):
    prefix = f"{case}/param/"
    params = {k[len(prefix) :]: torch.tensor(golden[k]) for k in golden if k.startswith(prefix)}
    d_inner, d_state = params["A_log"].shape
    net = SlowMamba(d_state, params["conv1d.weight"].shape[-1], d_inner, "fused")
    net.load_state_dict(params)
    u = torch.tensor(golden[f"{case}/u"], dtype=torch.float32).requires_grad_()
    y = net.last(u)
    assert relative(y, golden[f"{case}/y"][:, -1, 0]) < 1e-5
    y.backward(torch.tensor(golden[f"{case}/cotangent"], dtype=torch.float32)[:, -1, 0])
    for name, p in net.named_parameters():
        assert relative(p.grad, golden[f"{case}/grad/{name}"]) < 1e-5, name
    assert relative(u.grad, golden[f"{case}/grad_u"]) < 1e-5


def pair(d_inner, d_state, d_conv, seed, dt_shift=0.0):
    """A fused net in float32, and the same one in float64 for the recurrence."""
    torch.manual_seed(seed)
    net = SlowMamba(d_state, d_conv, d_inner, "fused")
    net.dt_proj.bias.data += dt_shift
    book = SlowMamba(d_state, d_conv, d_inner, "reference").double()
    book.load_state_dict(net.state_dict())
    return net, book


sizes = st.tuples(*(st.integers(1, n) for n in (128, 32, 8, 80)))  # d_inner, d_state, d_conv, rows: beyond a block
lengths = st.sampled_from([1, 2, 4, 6, 9])  # each is compiled once


def by_the_book(net, u, v):
    """mamba_by_the_book in u's precision: y [rows], and the gradients of each v_i y_i for u and the parameters,
    [rows, …] each."""
    book = SlowMamba(net.d_state, net.d_conv, net.d_inner, "reference").to(u.dtype)
    book.load_state_dict(net.state_dict())
    u = u.detach().requires_grad_()
    y, inputs = mamba_by_the_book(book, u)[:, -1, 0], [u, *book.parameters()]
    each = torch.diag(v.to(u.dtype))
    found = torch.autograd.grad(y, inputs, each, is_grads_batched=True, allow_unused=True, materialize_grads=True)
    return y.detach(), found


def check(net, u, v):
    """net.last(u) and its gradients for the cotangent v are within 1e-5 of float64, relative to the largest output, and
    to the sum of the rows' absolute gradients. Where terms within a row cancel so far that float32 cannot hold that,
    they are as good as the recurrence in float32."""
    u.requires_grad_()
    y = net.last(u)
    ours = torch.autograd.grad(y, [u, *net.parameters()], v)
    y64, exact = by_the_book(net, u.double(), v)
    y32, rounded = by_the_book(net, u, v)
    assert (y - y64).abs().max() <= 1e-5 * y64.abs().max() + 3 * (y32 - y64).abs().max()
    for (name, _), a, b, c in zip([("u", u), *net.named_parameters()], ours, exact, rounded, strict=True):
        error, mass = (a.double() - b.sum(0)).abs().max(), b.abs().sum(0).max()
        assert error <= 1e-5 * mass + 3 * (c - b).abs().sum(0).max() + 1e-30, (name, error.item(), mass.item())


@given(sizes, lengths, st.sampled_from([1e-4, 1.0, 30.0]), st.sampled_from([-3.0, 0.0, 3.0]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_equals_the_recurrence_for_any_shape(size, length, scale, dt_shift, seed):
    *shape, rows = size
    net, _ = pair(*shape, seed, dt_shift)
    check(net, torch.randn(rows, length, 1) * scale, torch.randn(rows))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e8])
@pytest.mark.parametrize("dt_shift", [-50.0, 0.0, 50.0, 1e4])
def test_no_nan_where_float64_has_none(scale, dt_shift):
    net, book = pair(7, 5, 4, 0, dt_shift)
    u = (torch.randn(40, 6, 1) * scale).requires_grad_()
    y = net.last(u)
    y64 = mamba_by_the_book(book, u.detach().double())[:, -1, 0]
    finite = y64.isfinite() & (y64.abs() < 1e35)
    assert y[finite].isfinite().all()
    if finite.all() and y64.abs().max() > 1e-30:
        assert relative(y, y64) < 1e-4
    grads = torch.autograd.grad(y, [u, *net.parameters()], torch.ones_like(y))
    largest = max(g.abs().max() for g in torch.autograd.grad(book.last(u.detach().double()).sum(), book.parameters()))
    if largest < 1e30:
        assert all(g.isfinite().all() for g in grads)


def test_two_runs_give_the_same_bits_and_threads_only_reorder_sums():
    net, _ = pair(20, 16, 8, 0)
    u, v = torch.randn(5000, 6, 1), torch.randn(5000)
    threads = torch.get_num_threads()
    found = {}
    try:
        for count in (1, 1, 3, 3):
            torch.set_num_threads(count)
            y = net.last(u)
            result = [y, *torch.autograd.grad(y, net.parameters(), v)]
            before = found.setdefault(count, result)
            assert all(torch.equal(a, b) for a, b in zip(before, result, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1][0], found[3][0])
    assert all(relative(a, b) < 1e-5 for a, b in zip(found[1], found[3], strict=True))


def test_what_auto_takes():
    net = SlowMamba(3, 4, 5)
    assert net.backend("cpu", torch.float32, 6) == net.backend("cpu", torch.float32, None) == "fused"
    assert net.backend("cpu", torch.float64, 6) == net.backend("cpu", torch.float64, None) == "reference"
    assert net.backend("cpu", torch.float32, selective_scan.MOST_TOKENS + 1) == "reference"
    fused = SlowMamba(3, 4, 5, "fused")
    for arguments in ((torch.float64, 6), (torch.float64, None), (torch.float32, 99)):
        with pytest.raises(RuntimeError, match="fused"):
            fused.backend("cpu", *arguments)
    layers = binary_layers(binarize_(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))))
    assert FSG(layers).backend() == "fused" and FSG(layers, history="flat").backend() == "fused"


def test_without_a_compiler_auto_falls_back_and_fused_says_why(tmp_path):
    code = """
import torch, hypernet
u = torch.randn(3, 6, 1)
print(hypernet.SlowMamba(2, 2, 2, "auto").backend("cpu", torch.float32, 6), hypernet.SlowMamba(2, 2, 2).last(u).shape)
try: hypernet.SlowMamba(2, 2, 2, "fused").last(u)
except RuntimeError as e: print(e)
"""
    env = {
        "PATH": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "CXX": "no-such-compiler",
        "HOME": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.strip().splitlines()[0], result.stdout.strip().splitlines()[-1]
    assert first == "reference torch.Size([3])" and "needs a C++ compiler" in second
