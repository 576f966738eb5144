"""The fused scans in Triton: results and gradients against float64, extreme inputs, and what the kernels compile to.

The tests run on a GPU if there is one, else in Triton's interpreter, which conftest.py turns on. float64 means golden
vectors of the public Mamba block, or the recurrence as it is defined.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_selective_scan import (
    check,
    check_golden,
    check_known,
    check_no_nan,
    check_tails,
    check_tails_golden,
    check_tails_no_nan,
    fused,
    golden_net,
)

import selective_scan
import selective_scan_triton

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
problem = selective_scan_triton.why_not(device, torch.float32, 6)
pytestmark = [
    pytest.mark.skipif(problem is not None, reason=str(problem)),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of overflows
]


def on_triton(net):
    """The net with last() and tails() replaced by the kernels under test, in chunks of 16 tokens."""
    net.to(device)
    net.tails = lambda *inputs: selective_scan_triton.tails(*inputs, *net.in_kernel_order(), chunk=16)
    net.last = lambda u, known=None: selective_scan_triton.last(u.squeeze(-1), *net.in_kernel_order(), known=known)
    return net


@pytest.mark.parametrize("case", ["per_weight", "per_weight_odd", "per_weight_short"])
def test_golden(golden, case):
    check_golden(on_triton(golden_net(golden, case)), golden, case)


# Up to more than one block of channels and of sequences, more than one block per program, and any number of states.
sizes = st.tuples(*(st.integers(1, n) for n in (40, 20, 8, 80)))  # d_inner, d_state, d_conv, rows
lengths = st.sampled_from([1, 2, 4, 6, 9])


@given(sizes, lengths, st.sampled_from([1e-4, 1.0, 30.0]), st.sampled_from([-3.0, 0.0, 3.0]), st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_equals_the_recurrence_for_any_shape(size, length, scale, dt_shift, seed):
    *shape, rows = size
    net = on_triton(fused(*shape, seed, dt_shift))
    check(net, torch.randn(rows, length, 1, device=device) * scale, torch.randn(rows, device=device))


# A block of channels and a channel. The interpreter is slow: it gets fewer states than the paper's 16.
ON_GPU = device.type == "cuda"
MODEST = (17, 16, 8) if ON_GPU else (17, 3, 4)


@pytest.mark.parametrize("shape, length", [(MODEST, 6), ((5, 33, 3), 16)])
def test_equals_the_recurrence_with_several_blocks_per_program(monkeypatch, shape, length):
    net = on_triton(fused(*shape, 0))
    monkeypatch.setattr(selective_scan_triton, "_programs", lambda device: 2)
    rows = 5 * selective_scan_triton.BLOCK_B + 1
    check(net, torch.randn(rows, length, 1, device=device), torch.randn(rows, device=device))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e8])
@pytest.mark.parametrize("dt_shift", [-50.0, 0.0, 50.0, 1e4])
def test_no_nan_if_float64_has_none(scale, dt_shift):
    check_no_nan(on_triton(fused(7, 5, 4, 0, dt_shift)), scale, 20)


def test_two_runs_give_the_same_bits():
    net = on_triton(fused(*MODEST, 0))
    rows = 100_000 if ON_GPU else 33
    u, v = torch.randn(rows, 6, 1, device=device).requires_grad_(), torch.randn(rows, device=device)
    first, second = ([y := net.last(u), *torch.autograd.grad(y, [u, *net.parameters()], v)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_known_outputs_have_the_same_gradients():
    check_known(on_triton(fused(*MODEST, 0)), torch.randn(70, 6, 1, device=device), torch.randn(70, device=device))


def test_why_not():
    why_not, most = selective_scan_triton.why_not, selective_scan_triton.MOST_TOKENS
    assert "float64" in why_not(device, torch.float64, 6) and str(most) in why_not(device, torch.float32, most + 1)
    assert "meta" in why_not(torch.device("meta"), torch.float32, 6)
    assert why_not(device, torch.float32, None) is None and "float64" in why_not(device, torch.float64, None)
    if device.type == "cuda":
        assert selective_scan.why_not(device, torch.float32, None) is None
    code = "import selective_scan_triton as s, torch; print(s.why_not(torch.device('cpu'), torch.float32, 6))"
    for hide, words in (
        ("", "CUDA devices; this is cpu"),
        ("import sys; sys.modules['triton'] = None; ", "triton pack"),
    ):
        result = without_interpreter(hide + code)
        assert words in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("wrong", [torch.float64, "meta"])
def test_parameters_of_another_kind_are_refused(wrong):
    net = fused(3, 2, 2, 0).to(device)
    parameters = [*net.in_kernel_order()]
    for i in (3, 8):
        mixed = [p.to(wrong) if k == i else p for k, p in enumerate(parameters)]
        for run in (
            lambda: selective_scan_triton.last(torch.ones(4, 3, device=device), *mixed),  # noqa: B023
            lambda: selective_scan_triton.tails(torch.ones(2, 5, device=device), [5], None, *mixed),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="needs its input and parameters in float32 and on one device"):
                run()
    with pytest.raises(ValueError, match="needs its input and parameters"):
        selective_scan_triton.tails(torch.ones(2, 5, device=device), [5], torch.ones(1).double(), *parameters)


# ---------------------------------------------------------------------------------------------------------------------
# tails: the flat layout, in chunks of 16 tokens, with two programs and blocks of 16 channels.


def randn(*shape):
    return torch.randn(shape, device=device)


def test_tails_golden(golden):
    check_tails_golden(on_triton(golden_net(golden, "flat_odd")), golden, "flat_odd", 33)


@pytest.mark.parametrize(
    "shape, length, layers, has_first",
    [
        ((5, 3, 4), 2, [1, 9, 20], True),  # less than one chunk, more than one, three
        ((17, 5, 8), 1, [16, 3], False),  # exactly one chunk; two blocks of channels
        ((3, 16, 8), 1, [16], True),  # a chunk and one token, which the next chunk's convolution needs
        ((1, 1, 1), 4, [1, 2], False),
        ((4, 9, 2), 3, [13, 1], True),
    ],
)
def test_tails_equals_the_recurrence(shape, length, layers, has_first):
    net = on_triton(fused(*shape, 0))
    first = randn(len(layers)) if has_first else None
    check_tails(net, randn(length, sum(layers)), layers, first, randn(sum(layers)))


def test_tails_does_not_read_what_is_forgotten():
    """All channels forget within 3 tokens. Then one remembers, and nothing is skipped."""
    net = on_triton(fused(18, 2, 3, 0, 9.0))
    past, v, first = randn(4, 24), randn(24), randn(1).requires_grad_()
    _, exact = check_tails(net, past, [24], first, v, lambda book, u: book(u), tolerance=1e-4)
    assert exact[0].item() == 0, "the gradient of `first`"
    y = net.tails(past, [24], first)
    past.view(-1)[:46] = torch.nan  # needed: tokens 49 to 96, three chunks, and 47 and 48 for their convolution
    poisoned = net.tails(past, [24], first)
    assert torch.equal(poisoned, y)
    for a, b in zip(exact, torch.autograd.grad(poisoned, [first, *net.parameters()], v), strict=True):
        assert torch.equal(a, b)
    net.dt_proj.bias.data[7] = -20
    net.dt_proj.weight.data[7] = 0
    assert net.tails(past, [24], first).isnan().all()


@pytest.mark.parametrize("scale, dt_shift", [(0.0, 0.0), (1e8, -50.0), (1e4, 50.0), (1e8, 1e4)])
def test_tails_has_no_nan_if_float64_has_none(scale, dt_shift):
    check_tails_no_nan(on_triton(fused(7, 5, 4, 0, dt_shift)), scale, 2, [13, 6])


def test_tails_gives_the_same_bits_twice_and_if_it_saves_nothing(monkeypatch):
    net = on_triton(fused(17, 3, 2, 0))
    layers = [18] if device.type == "cpu" else [50_000, 5]
    past, first, v = randn(1, sum(layers)), randn(len(layers)).requires_grad_(), randn(sum(layers))
    results = []
    for most in (selective_scan_triton.MOST_KEPT, selective_scan_triton.MOST_KEPT, 0):
        monkeypatch.setattr(selective_scan_triton, "MOST_KEPT", most)
        y = net.tails(past, layers, first)
        results.append([y, *torch.autograd.grad(y, [first, *net.parameters()], v)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def without_interpreter(code, *arguments):
    """Run this. Triton has a cache of the kernels that it has compiled: of the same source, for the same GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


COMPILE = """
import sys, triton, selective_scan_triton as s
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
integers = ("rows", "d", "scratch_size", "chunks", "weights", "steps", "T")
n, only = int(sys.argv[3]), sys.argv[4:]
last = dict(L=6, K=6, n=n, N=triton.next_power_of_2(n), BLOCK_D=s.BLOCK_D, BLOCK_B=s.BLOCK_B)
tails = dict(K=8, n=n, N=s._padded_states(n), LAYERS=32, BLOCKS=8, FIRST=1)
stages = {  # None for the arguments that a stage does not have
    name: (s._tails, dict(tails, STAGE=i) | dict.fromkeys(("states", "adjoints", "y", "gfirst", "sums")[used:]))
    for i, (name, used) in enumerate(zip(STAGES, (0, 1, 3, 3, 5)))
}
stages["OUTPUTS"][1]["adjoints"] = None
kernels = {"_forward": (s._forward, last), "_backward": (s._backward, last), "_plan": (s._plan, tails), **stages}
for name, (kernel, constants) in dict(kernels, _carry=(s._carry, dict(tails, BACK=True))).items():
    if only and name not in only: continue
    constants = {a: value for a, value in constants.items() if a in kernel.arg_names}
    others = dict.fromkeys(integers, "i32") | dict(layers="*i64", plan="*i32") | dict.fromkeys(constants, "constexpr")
    arguments = {a: others.get(a, "*fp32") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(arguments) if arguments[a][0] == "*" or a == "T"}
    source = ASTSource(kernel, arguments, constants, aligned if constants.get("LAYERS") else None)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    options = dict(num_warps=1, enable_fp_fusion=True) | (dict(num_stages=1) if "LAYERS" in constants else {})
    built = triton.compile(source, target=target, options=options)
    open(sys.argv[2] + name, "wb").write(built.asm["cubin"])
    print(name, built.asm["ptx"].count("ex2.approx"))
"""
STAGES = ("MEANS", "ENDS", "OUTPUTS", "ADJOINT", "BACKWARD")


def test_the_flat_kernels_compile_for_a_gpu_with_few_states(tmp_path):
    """The interpreter accepts matrix products that are too small for tensor cores; the compiler does not."""
    code = f"STAGES = {STAGES}{COMPILE}"
    stages = "ENDS", "BACKWARD"  # both ways in which matrix products are used
    found = without_interpreter(code, "90", str(tmp_path / "_"), "3", *stages)
    assert found.returncode == 0, found.stderr
    assert [line.split()[0] for line in found.stdout.splitlines()] == [*stages]


def test_the_kernels_compile_for_a_gpu_without_waste(tmp_path):
    """For an H100 (compute capability 9.0), at the paper's size.

    The number of exponentials is (L − 1) n for the scan, L in each loop for silu, L for softplus, and 1 for the gate.
    Registers must not spill in the forward pass of `last`. In its backward pass B and C may, which the second loop
    needs, and about a third as much again. In `tails`, only BACKWARD may spill more than a few registers: its pointers.
    """
    import triton

    code = f"STAGES = {STAGES}{COMPILE}"
    found = without_interpreter(code, "90", str(tmp_path / "_"), "16")
    assert found.returncode == 0, found.stderr
    scan, silu, softplus, gate = 5 * 16, 6, 6, 1
    exponentials = {name: int(count) for name, count in map(str.split, found.stdout.splitlines())}
    tile, four = 16 * 16 // 32, 4 * 16 * 16 // 32  # per thread: a tile; four tokens of the scan
    assert exponentials == {
        "_forward": scan + 2 * silu + softplus + gate,
        "_backward": scan + 3 * silu + softplus + gate,
        "_plan": tile,
        "_carry": four,
        "MEANS": tile,  # silu
        "ENDS": 3 * tile + four,  # silu, silu, softplus
        "OUTPUTS": 5 * tile + four,  # silu, silu, softplus, silu, gate
        "ADJOINT": 4 * tile + four,  # silu, silu, softplus, gate
        "BACKWARD": 8 * tile + 2 * four,  # as ADJOINT; silu, softplus, gate; silu
    }
    limits = [("_forward", 224, 0), ("_backward", 255, 1280), ("_plan", 128, 0), ("_carry", 255, 0), ("MEANS", 160, 0)]
    limits += [("ENDS", 255, 64), ("OUTPUTS", 255, 64), ("ADJOINT", 255, 64), ("BACKWARD", 255, 1024)]
    for name, registers, stack in limits:
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / f"_{name}"]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
        used = [int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK")]
        assert used[0] <= registers and used[1] <= stack, (name, used)
