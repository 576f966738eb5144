"""The fused scans on a CPU: results and gradients against float64, extreme inputs, and the compiler's cache.

float64 means golden vectors of the public Mamba block, or the recurrence as it is defined.
"""

import functools
import importlib.metadata
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_hypernet import mamba_by_the_book, relative
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import selective_scan
from hypernet import FSG, SlowMamba
from models import binarize_, binary_layers

problem = selective_scan.why_not(torch.device("cpu"), torch.float32, 6)
compiler = shutil.which(os.environ.get("CXX", "c++"))  # if there is one, the scan must work
pytestmark = pytest.mark.skipif(problem is not None and not compiler, reason=str(problem))


# ---------------------------------------------------------------------------------------------------------------------
# last: per-weight histories. The functions called check_… are for test_triton.py too.


def golden_net(golden, case):
    prefix = f"{case}/param/"
    params = {k[len(prefix) :]: torch.tensor(golden[k]) for k in golden if k.startswith(prefix)}
    d_inner, d_state = params["A_log"].shape
    net = SlowMamba(d_state, params["conv1d.weight"].shape[-1], d_inner, "fused")
    net.load_state_dict(params)
    return net


def check_golden(net, golden, case):
    tensor = lambda name: torch.tensor(golden[f"{case}/{name}"], dtype=torch.float32, device=net.D.device)
    u = tensor("u").requires_grad_()
    y = net.last(u)
    assert relative(y.cpu(), golden[f"{case}/y"][:, -1, 0]) < 1e-5
    y.backward(tensor("cotangent")[:, -1, 0])
    for name, p in net.named_parameters():
        assert relative(p.grad.cpu(), golden[f"{case}/grad/{name}"]) < 1e-5, name
    assert relative(u.grad.cpu(), golden[f"{case}/grad_u"]) < 1e-5


def fused(d_inner, d_state, d_conv, seed, dt_shift=0.0):
    torch.manual_seed(seed)
    net = SlowMamba(d_state, d_conv, d_inner, "fused")
    net.dt_proj.bias.data += dt_shift
    return net


def double(net):
    """The same net in float64."""
    book = SlowMamba(net.d_state, net.d_conv, net.d_inner, "reference").to(net.D.device).double()
    book.load_state_dict(net.state_dict())
    return book


sizes = st.tuples(*(st.integers(1, n) for n in (128, 32, 8, 80)))  # d_inner, d_state, d_conv, rows: beyond a block
lengths = st.sampled_from([1, 2, 4, 6, 9])  # each is compiled once


def by_the_book(net, u, v):
    """Outputs and gradients of mamba_by_the_book, in u's precision and on its device.

    Returns y [rows], and for u and each parameter the gradients of v_i y_i, one per row i: [rows, …].
    """
    book = double(net).to(u)
    u = u.detach().requires_grad_()
    y, inputs = mamba_by_the_book(book, u)[:, -1, 0], [u, *book.parameters()]
    each = torch.diag(v.to(u))
    found = torch.autograd.grad(y, inputs, each, is_grads_batched=True, allow_unused=True, materialize_grads=True)
    return y.detach(), found


def shaken(tensors, rounding):
    """The tensors in float64. If `rounding` is 2**-24, their last digits in float32 are changed at random."""
    return [t.double() * (1 + rounding * torch.randn_like(t.double())) for t in tensors]


def check(net, u, v):
    """Compare net.last(u) and its gradients for the cotangent v with float64. The bound is 1e-5.

    It is relative to the largest output, and for gradients to the sum of the rows' absolute gradients. If terms within
    a row cancel, float32 may not be able to meet it. Then the bound is eight times the change in the exact result when
    the last digit of the input and of the parameters changes.
    """
    u.requires_grad_()
    y = net.last(u)
    ours = [y, *torch.autograd.grad(y, [u, *net.parameters()], v)]

    def exact(rounding=0.0):
        book, (inputs, *parameters) = double(net), shaken([u.detach(), *net.parameters()], rounding)
        vector_to_parameters(parameters_to_vector(parameters), book.parameters())
        y, each = by_the_book(book, inputs, v)
        return [y.unsqueeze(0), *each]  # [1 or rows, …], to be summed over rows

    found, rounded = exact(), functools.cache(lambda: [exact(2**-24) for _ in range(4)])
    for i, name in enumerate(["y", "u", *dict(net.named_parameters())]):
        expected, mass = found[i].sum(0), found[i].abs().sum(0).max()
        error = (ours[i].double() - expected).abs().max()
        if not error <= 1e-5 * mass + 1e-30:
            noise = max((other[i].sum(0) - expected).abs().max() for other in rounded())
            assert error <= 1e-5 * mass + 8 * noise, (name, error.item(), mass.item(), noise.item())


def check_no_nan(net, scale, rows):
    """The results are finite if those in float64 are."""
    book, u = double(net), (torch.randn(rows, 6, 1, device=net.D.device) * scale).requires_grad_()
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


@pytest.mark.parametrize("case", ["per_weight", "per_weight_odd", "per_weight_short"])
def test_golden(golden, case):
    check_golden(golden_net(golden, case), golden, case)


@given(sizes, lengths, st.sampled_from([1e-4, 1.0, 30.0]), st.sampled_from([-3.0, 0.0, 3.0]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_equals_the_recurrence_for_any_shape(size, length, scale, dt_shift, seed):
    *shape, rows = size
    net, u = fused(*shape, seed, dt_shift), torch.randn(rows, length, 1) * scale
    if seed % 2:  # as with a layer embedding
        u[:, 0] = 0.3 * scale
    check(net, u, torch.randn(rows))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e8])
@pytest.mark.parametrize("dt_shift", [-50.0, 0.0, 50.0, 1e4])
def test_no_nan_if_float64_has_none(scale, dt_shift):
    check_no_nan(fused(7, 5, 4, 0, dt_shift), scale, 40)


@pytest.mark.parametrize("name", dict(SlowMamba().named_parameters()))
def test_nan_in_a_parameter_reaches_the_output(name):
    net = fused(20, 16, 8, 0)
    dict(net.named_parameters())[name].data.flatten()[3] = torch.nan
    assert net.last(torch.randn(40, 6, 1)).isnan().all()
    assert net.tails(torch.randn(5, 40), [40], None).isnan().all()


def test_blocks_that_begin_with_the_same_token():
    """The kernel keeps what depends on the first token alone for the next block. In random order it cannot."""
    net = fused(20, 16, 8, 0)
    u, v, order = torch.randn(240, 6, 1), torch.randn(240), torch.randperm(240)
    u[:, 0, 0] = torch.tensor([0.3, -0.2, 0.3]).repeat_interleave(torch.tensor([100, 50, 90]))
    check(net, u, v)
    found = []
    for rows in (torch.arange(240), order):
        mine = u[rows].detach().requires_grad_()
        y = net.last(mine)
        found.append((y, *torch.autograd.grad(y, mine, v[rows])))
    assert all(relative(b, a[order]) < 1e-6 for a, b in zip(*found, strict=True))
    u = u.detach().clone()
    u[:32, 0] = torch.nan
    y = net.last(u)
    assert y[:32].isnan().all() and torch.equal(y[32:], found[0][0][32:])


def exponents(net, u):
    """How far S is from the S̄ of the sequence with the same first token, followed by zeros: [rows, d].

    The distance is the largest exponent of 2 in exp(A (S − S̄)), over all states and tokens.
    """
    zeros = torch.zeros_like(u)
    zeros[:, 0] = u[:, 0]
    S, centre = (net.project(v)[1].flip(1).cumsum(1)[:, :-1] for v in (u, zeros))  # [rows, L - 1, d]
    return (S - centre).abs().amax(1) * net.A_log.exp().amax(1) / math.log(2)


def check_known(net, u, v):
    """net.last(u) and net.last(u, known=net.last(u)) have the same bits and the same gradients."""
    u.requires_grad_()
    y = net.last(u)
    again = net.last(u, known=y.detach())
    gradients = (torch.autograd.grad(out, [u, *net.parameters()], v) for out in (y, again))
    assert torch.equal(again, y) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_known_outputs_have_the_same_gradients():
    check_known(fused(30, 16, 8, 0), torch.randn(100, 6, 1), torch.randn(100))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.03, 0.3, 1.0, 3.0, 10.0, 30.0])
def test_near_and_far_from_the_sequence_without_gradients(scale):
    """The kernel computes decays from that sequence's, with a polynomial whose degree depends on the distance. The
    error must not depend on the degree."""
    net = fused(30, 16, 8, 0)
    u, v = torch.randn(100, 6, 1) * scale, torch.randn(100)
    u[:, 0] = torch.tensor([0.3, -2.0]).repeat_interleave(50)[:, None]
    far = exponents(net, u).amax(1)
    assert far.max() < 0.03 if scale <= 0.03 else far.max() > 2 if scale >= 3 else 0.135 < far.max() < 1.07
    check(net, u, v)
    net.D.data.zero_()  # so that the output depends on the decays and the last token alone
    assert relative(net.last(u), double(net).last(u.double())) < 3e-6


@pytest.mark.parametrize("bias", [-4.0, -1.0])
def test_the_rows_beside_it_change_a_row_in_its_last_digits_only(bias):
    """Every other row of a block is ordinary; those between have decays beyond float32's exponents."""
    net = fused(12, 16, 8, 0)
    net.x_proj.weight.data[0].abs_()  # dt > 0 if the input is large
    net.dt_proj.weight.data.fill_(1.0)
    net.dt_proj.bias.data.fill_(bias)
    u, v = torch.randn(64, 6, 1), torch.randn(64)
    beside = u.clone()
    beside[1::2] *= 100

    def found(u):
        u = u.detach().requires_grad_()
        y = net.last(u)
        return y[::2], torch.autograd.grad(y, u, v)[0][::2]

    decay = lambda u: net.project(u)[1][:, 1:].sum(1) * net.A_log[0, -1].exp() / math.log(2)  # [rows, d]
    assert decay(u).max() < 60 and (decay(beside).amax(1) > 500).sum() > 8
    assert all(relative(a, b) < 1e-6 for a, b in zip(found(u), found(beside), strict=True))
    check(net, beside, v)


def test_two_runs_give_the_same_bits_and_threads_only_reorder_sums():
    net = fused(20, 16, 8, 0)
    u, v = torch.randn(5000, 6, 1), torch.randn(5000)
    u[1000:3000, 0] = 3.0  # some blocks begin alike; a block's bits must not depend on the block before
    u.requires_grad_()
    threads = torch.get_num_threads()
    found = {}
    try:
        for count in (1, 1, 3, 3):
            torch.set_num_threads(count)
            y = net.last(u)
            result = [y, *torch.autograd.grad(y, [u, *net.parameters()], v)]
            before = found.setdefault(count, result)
            assert all(torch.equal(a, b) for a, b in zip(before, result, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found[1][:2], found[3][:2], strict=True))  # y, ∂/∂u
    assert all(relative(a, b) < 1e-5 for a, b in zip(found[1], found[3], strict=True))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="all tests run without vector units")
def test_without_vector_units():
    chosen = "near_and_far or two_segments"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# tails: the flat layout.


def check_tails_golden(net, golden, case, count):
    u = torch.tensor(golden[f"{case}/u"], dtype=torch.float32, device=net.D.device)[0, :, 0]
    first = u[:1].clone().requires_grad_()
    y = net.tails(u[1:].view(-1, count), [count], first)
    assert relative(y.cpu(), golden[f"{case}/y"][0, -count:, 0]) < 1e-5
    y.backward(torch.tensor(golden[f"{case}/cotangent"]).to(y)[0, -count:, 0])
    for name, p in net.named_parameters():
        assert relative(p.grad.cpu(), golden[f"{case}/grad/{name}"]) < 1e-5, name
    assert abs(first.grad.item() - golden[f"{case}/grad_u"][0, 0, 0]) < 1e-5 * abs(golden[f"{case}/grad_u"]).max()


@pytest.mark.parametrize("case, count", [("flat", 90), ("flat_odd", 33)])
def test_tails_golden(golden, case, count):
    check_tails_golden(golden_net(golden, case), golden, case, count)


def flat_by(function, past, layers, first):
    """What `tails` returns, from a function that maps u [1, L, 1] to all outputs [1, L, 1]."""
    found = []
    for i, part in enumerate(past.split(layers, dim=1)):
        u = part.reshape(1, -1, 1)
        u = u if first is None else torch.cat([first[i].view(1, 1, 1), u], dim=1)
        found.append(function(u)[0, -part.shape[1] :, 0])
    return torch.cat(found)


def check_tails(net, past, layers, first, v, function=mamba_by_the_book, tolerance=1e-5):
    """Compare net.tails and its gradients for the cotangent v with `function` in float64. The bound is 1e-5.

    It is relative to the largest output, and for gradients to the sum of the absolute gradients of 16 parts of v. If
    terms within a part cancel, float32 may not be able to meet it. Then the bound is eight times the change in the
    result of `function` when the last digit of the inputs and of the parameters changes, or when it computes in
    float32. tolerance: the bound for gradients; with a function other than mamba_by_the_book it is relative to the
    gradient itself, which is smaller because terms cancel.
    """
    first = [] if first is None else [first.requires_grad_()]
    y = net.tails(past, layers, *(first or [None]))
    ours = torch.autograd.grad(y, [*first, *net.parameters()], v)
    part_of = torch.arange(len(v), device=v.device).remainder(16)[None]
    parts = torch.zeros(min(len(v), 16), len(v), device=v.device).scatter_(0, part_of, v[None])

    def result(rounding=0.0, dtype=torch.float64):
        book = double(net).to(dtype)
        values = [x.to(dtype) for x in shaken([past, *first, *net.parameters()], rounding)]
        vector_to_parameters(parameters_to_vector(values[1 + len(first) :]), book.parameters())
        f = [x.detach().requires_grad_() for x in values[1 : 1 + len(first)]]
        out = flat_by(lambda u: function(book, u), values[0], layers, *(f or [None]))
        inputs, options = [*f, *book.parameters()], {"allow_unused": True, "materialize_grads": True}
        if function is mamba_by_the_book:
            grads = torch.autograd.grad(out, inputs, parts.to(dtype), is_grads_batched=True, **options)
        else:
            grads = [g[None] for g in torch.autograd.grad(out, inputs, v.to(dtype), **options)]
        return [out.detach()[None], *grads]  # [1 or parts, …], to be summed over parts

    rounded = functools.cache(lambda: [result(dtype=torch.float32), *(result(2**-24) for _ in range(4))])
    found = result()
    for i, name in enumerate(["y", *(["first"] if first else []), *dict(net.named_parameters())]):
        expected, mass = found[i].sum(0), found[i].abs().sum(0).max()
        error = ([y, *ours][i].double() - expected).abs().max()
        # If the first token has decayed far below the outputs' resolution, its gradient need not be precise.
        least = 1e-15 * v.abs().max() if name == "first" else 1e-30
        bound = (1e-5 if name == "y" else tolerance) * mass + least
        if not error <= bound:
            noise = max((other[i].sum(0) - expected).abs().max() for other in rounded())
            assert error <= bound + 8 * noise, (name, error.item(), mass.item(), noise.item())
    return y, ours


@given(
    st.tuples(*(st.integers(1, n) for n in (40, 20, 8))),  # d_inner, d_state, d_conv
    st.lists(st.sampled_from([1, 2, 5, 17, 40, 63, 64, 65, 90]), min_size=1, max_size=3),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([1e-4, 1.0, 10.0]),
    st.sampled_from([-3.0, 0.0, 3.0]),
    st.integers(0, 2**31),
)
@example((2, 6, 1), [17], 7, False, 1e-4, 0.0, 1)  # terms cancel to an 80th
@example((1, 1, 1), [63], 3, True, 1.0, 3.0, 1)
@example((12, 1, 1), [17], 3, True, 10.0, 3.0, 1787)
@settings(max_examples=14, deadline=None)
def test_tails_equals_the_recurrence_for_any_shape(shape, layers, length, has_first, scale, dt_shift, seed):
    net = fused(*shape, seed, dt_shift)
    length = min(length, 250 // max(layers) + 1)
    past, first = torch.randn(length, sum(layers)) * scale, torch.randn(len(layers)) * scale
    # The rounding errors of the decays between two tokens can add up over the whole sequence.
    tolerance = max(1e-5, length * max(layers) * 2**-24)
    check_tails(net, past, layers, first if has_first else None, torch.randn(sum(layers)), tolerance=tolerance)


@pytest.mark.parametrize("shape", [(100, 16, 8), (128, 32, 1), (128, 3, 5), (1, 1, 1)])
def test_tails_equals_the_reference_at_full_size(shape):
    """SlowMamba's reference scan is faster than mamba_by_the_book and tested against it."""
    net = fused(*shape, 0)
    layers = [300, 1, 130]
    check_tails(
        net, torch.randn(5, 431), layers, torch.randn(3), torch.randn(431), lambda book, u: book(u), tolerance=1e-4
    )


def test_tails_skips_what_is_forgotten_and_nothing_else():
    """Channels remember for 3 to 1000 tokens; layers are 500 and 7,500 tokens long."""
    net = fused(40, 4, 4, 0)
    net.dt_proj.bias.data = torch.linspace(-4, 4, 40)[torch.randperm(40)]
    layers, length = [100, 1500], 5
    past, first, v = torch.randn(length, 1600), torch.randn(2), torch.randn(1600)
    _, (at_first, *_) = check_tails(net, past, layers, first, v, lambda book, u: book(u), tolerance=1e-4)
    assert at_first[1] == 0, "the outputs 6000 tokens later do not depend on it"
    assert at_first[0] != 0, "the outputs 400 tokens later do"
    # Nothing is skipped if the channels do not forget.
    net.dt_proj.bias.data -= 14
    _, (at_first, *_) = check_tails(net, past, layers, first, v, lambda book, u: book(u), tolerance=1e-4)
    assert at_first.all()


def test_tails_of_a_layer_with_two_segments():
    net = fused(3, 2, 2, 0, 2.0)
    layers = [2**18 + 100, 7]
    past = torch.randn(1, sum(layers))
    check_tails(net, past, layers, None, torch.randn(sum(layers)), lambda book, u: book(u), tolerance=1e-3)


def test_tails_saves_the_states_or_recomputes_them(monkeypatch):
    net = fused(20, 5, 3, 0)
    past, first, v = torch.randn(5, 500), torch.randn(2), torch.randn(500)
    results = []
    for most in (selective_scan.MOST_KEPT, 0):
        monkeypatch.setattr(selective_scan, "MOST_KEPT", most)
        y = net.tails(past, [300, 200], first)
        results.append([y, *torch.autograd.grad(y, net.parameters(), v)])
    with torch.no_grad():
        assert torch.equal(net.tails(past, [300, 200], first), y)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tails_gives_the_same_bits_for_any_number_of_threads():
    net = fused(20, 16, 8, 0)
    layers = [500, 40, 700, 260]
    past, v, first = torch.randn(5, 1500), torch.randn(1500), torch.randn(4).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 8):
            torch.set_num_threads(count)
            y = net.tails(past, layers, first)
            results.append([y, *torch.autograd.grad(y, [first, *net.parameters()], v)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def check_tails_no_nan(net, scale, length, layers):
    """The results are finite if those in float64 are."""
    book, device = double(net), net.D.device
    past = torch.randn(length, sum(layers), device=device) * scale
    first = torch.randn(len(layers), device=device) * scale
    past[0, 7] = past[1, -5] = 1e3 * scale  # later tokens are small compared with it
    y = net.tails(past, layers, first)
    y64 = flat_by(lambda u: book(u), past.double(), layers, first.double())
    finite = y64.isfinite() & (y64.abs() < 1e35)
    assert y[finite].isfinite().all()
    if finite.all() and y64.abs().max() > 1e-30:
        assert relative(y, y64) < 1e-4
    grads = torch.autograd.grad(y, net.parameters(), torch.ones_like(y))
    exact = torch.autograd.grad(y64.sum(), book.parameters())
    if max(g.abs().max() for g in exact) < 1e30:
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e8])
@pytest.mark.parametrize("dt_shift", [-50.0, 0.0, 50.0, 1e4])
def test_tails_has_no_nan_if_float64_has_none(scale, dt_shift):
    check_tails_no_nan(fused(7, 5, 4, 0, dt_shift), scale, 3, [50, 10])


@pytest.mark.parametrize(
    "options",
    [{"history": "flat"}, {"history": "flat", "lre": False, "normalize": "none"}, {"hyper_sample": 0.5}],
)
def test_fsg_is_the_same_with_either_scan(options):
    found = {}
    for scan in ("fused", "reference"):
        torch.manual_seed(0)
        net = binarize_(torch.nn.Sequential(*(torch.nn.Linear(20, 20, bias=False) for _ in range(4))))
        layers = binary_layers(net)
        gen = FSG(layers, **options, d_state=4, expand=10, scan=scan)
        assert gen.backend() == scan
        generator, steps = torch.Generator().manual_seed(1), []
        for _ in range(8):
            for layer in layers:
                layer.weight.grad = torch.randn(layer.weight.shape, generator=generator)
            gen.generate()
            steps.append(torch.cat([layer.weight.grad.flatten() for layer in layers]))
        found[scan] = steps
    for a, b in zip(found["fused"], found["reference"], strict=True):
        assert relative(a, b) < 1e-4


def test_which_scan_auto_chooses():
    net = SlowMamba(3, 4, 5)
    assert net.backend("cpu", torch.float32, 6) == net.backend("cpu", torch.float32, None) == "fused"
    assert net.backend("cpu", torch.float64, 6) == net.backend("cpu", torch.float64, None) == "reference"
    assert net.backend("cpu", torch.float32, selective_scan.MOST_TOKENS + 1) == "reference"
    fused = SlowMamba(3, 4, 5, "fused")
    for arguments in ((torch.float64, 6), (torch.float64, None), (torch.float32, 99)):
        with pytest.raises(RuntimeError, match="fused"):
            fused.backend("cpu", *arguments)
    layers = binary_layers(binarize_(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))))
    assert FSG(layers).backend() == "fused" and FSG(layers, history="flat").backend_and_why() == "fused"
    long = FSG(layers, length=17, scan="auto").backend_and_why()
    assert long == "reference (the fused scan is for histories of up to 16 tokens; these have 18)"
    assert FSG(layers, length=17, scan="reference").backend_and_why() == "reference", "asked for"
    assert FSG(layers, hgs="lstm").backend_and_why() == "nn.LSTM"


# ---------------------------------------------------------------------------------------------------------------------
# The compiler and its cache, with a stand-in source.

load = selective_scan.library.__wrapped__  # compiles or loads, without remembering it in this process


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a source that compiles at once."""
    source = tmp_path / "selective_scan_cpu.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(selective_scan, "SOURCE", source)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch):
    """A compiler that creates the file `started`, and then its output in two halves, in about 0.3 seconds."""
    script = tmp_path / "slow-c++"
    script.write_text(f"""#!/bin/sh
for out; do :; done
touch {tmp_path}/started
{compiler} "$@" || exit 1
mv "$out" "$out.whole"; head -c 3000 "$out.whole" > "$out"; sleep 0.2; tail -c +3001 "$out.whole" >> "$out"
""")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path / "started"


def process():
    """A started process that loads the library, calls it, and exits with 0 if the answer is right."""
    started = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(load(None).answer() - 42))
    started.start()
    return started


def loads():
    last = process()
    last.join(60)
    return last.exitcode == 0


def test_a_run_killed_while_it_compiles_does_not_harm_the_next(cache, slow_compiler):
    for _ in range(4):
        killed = process()
        while not slow_compiler.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.5))
        killed.kill()
        killed.join(60)
        assert loads(), "after a kill"
        shutil.rmtree(cache)
        slow_compiler.unlink()


def test_what_killed_compilations_left_is_deleted_once_it_is_old(cache, tmp_path):
    old, young, other = (cache / name for name in ("selective_scan_build_a", "selective_scan_build_b", "else"))
    (tmp_path / "kept").mkdir()
    for folder in (old, young, other):
        folder.mkdir(parents=True)
        (folder / "library.so").write_text("half")
    (cache / "selective_scan_build_link").symlink_to(tmp_path / "kept")
    for path in (old, other, tmp_path / "kept"):
        os.utime(path, (time.time() - 7200,) * 2)
    assert loads()
    assert not old.exists() and young.exists() and other.exists() and (tmp_path / "kept").exists()


def test_two_processes_compile_at_once(cache, slow_compiler):
    both = [process(), process()]
    for each in both:
        each.join(60)
    assert [each.exitcode for each in both] == [0, 0]
    assert all(file.suffix == ".so" for file in cache.iterdir()), "nothing else is left behind"


def test_a_truncated_library_is_compiled_again(cache):
    assert loads()
    (file,) = cache.glob("*.so")
    whole = file.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert loads() and file.read_bytes() == whole, length


def test_a_cache_that_can_only_be_read_is_used_without_a_compiler(cache, monkeypatch, capfd):
    assert loads() and "compiling the fused selective scan" in capfd.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler")
    cache.chmod(0o555)
    assert loads() and capfd.readouterr().err == ""


def test_another_source_is_compiled(cache):
    assert loads()
    selective_scan.SOURCE.write_text('extern "C" int answer() { return 43; }')
    assert not loads() and len([*cache.glob("*.so")]) == 2


def test_what_is_wrong_is_said_in_one_sentence(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert "needs a C++ compiler, and the one that CXX names, no-such-compiler, is not found" in load(None)
    monkeypatch.delenv("CXX")
    selective_scan.SOURCE.write_text("#error not today")
    assert load(6).endswith("error: #error not today")
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    problem = load(None)
    assert str(cache) in problem and "TORCH_EXTENSIONS_DIR" in problem
    selective_scan.SOURCE.unlink()
    assert load(None) == "the fused scan cannot be compiled: copy selective_scan_cpu.cpp next to selective_scan.py"
    monkeypatch.setenv("PATH", "")
    selective_scan.SOURCE.touch()
    assert "install g++ or clang++" in load(None)
    errors = capsys.readouterr().err.splitlines()
    assert sum("the reference scan is many times slower" in line for line in errors) == 5


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


# ---------------------------------------------------------------------------------------------------------------------
# Names, and the GPU's file.

WELL_KNOWN = """
    mamba_ssm selective_scan_cuda selective_scan_cuda_core selective_scan_cuda_oflex selective_scan_cuda_ndstate
    causal_conv1d causal_conv1d_cuda flash_attn flash_attn_2_cuda apex amp_C xformers bitsandbytes deepspeed
    torch torchgen functorch torchvision torchaudio torchmetrics torchao torchdata torchtext ignite
    lightning pytorch_lightning lightning_fabric accelerate transformers datasets diffusers peft huggingface_hub
    einops timm triton rich onnx onnxruntime onnxscript sklearn safetensors tensorboard tensorboardX wandb mlflow
    tensorflow keras larq larq_zoo jax jaxlib flax optax brevitas numpy scipy pandas matplotlib seaborn cv2 PIL tqdm
    yaml hydra omegaconf fire click ray optuna pytest hypothesis ninja packaging setuptools wheel pip
"""


def test_no_module_has_the_name_of_a_known_package():
    """A file beside the script is imported before a package of the same name."""
    taken = {*WELL_KNOWN.split(), *importlib.metadata.packages_distributions(), *sys.stdlib_module_names}
    ours = {file.stem.lower() for file in ROOT.glob("*.py")}
    assert not ours & {name.lower() for name in taken}


@pytest.mark.parametrize("copied", ["selective_scan.py", "*.py"])
def test_mamba_ssm_finds_its_own_extension(tmp_path, copied):
    """mamba-ssm imports a compiled top-level module, selective_scan_cuda. The stand-in is imported in the same way."""
    package, ours = tmp_path / "site-packages", tmp_path / "ours"
    (package / "mamba_ssm" / "ops").mkdir(parents=True)
    (package / "selective_scan_cuda.py").write_text("fwd = lambda: 'from the extension'")
    interface = "import selective_scan_cuda\nselective_scan_fn = lambda: selective_scan_cuda.fwd()"
    (package / "mamba_ssm" / "ops" / "selective_scan_interface.py").write_text(interface)
    ours.mkdir()
    for file in ROOT.glob(copied):
        shutil.copy(file, ours)
    code = """if True:
        import selective_scan, torch
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        print(selective_scan_fn())
"""
    if copied == "selective_scan.py":
        code += "        print(selective_scan.why_not(torch.device('cuda'), torch.float32, 6))"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ours, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "from the extension"
    if copied == "selective_scan.py":
        assert "needs selective_scan_triton.py: copy it next to selective_scan.py" in result.stdout


def test_an_error_while_the_gpu_file_is_imported_is_shown(tmp_path, monkeypatch):
    (tmp_path / "selective_scan_triton.py").write_text("import math; math.knobs")
    monkeypatch.delitem(sys.modules, "selective_scan_triton", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = selective_scan.why_not(torch.device("cuda"), torch.float32, 6)
    assert problem.endswith("(AttributeError: module 'math' has no attribute 'knobs')")
    assert "needs Triton 3.6 or newer" in problem
