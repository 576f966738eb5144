"""The Triton kernels against float64 (golden vectors, the recurrence by the book), extreme inputs, several blocks a
program; on a GPU where there is one, else in Triton's interpreter (conftest.py). And that they compile for GPUs."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_selective_scan import check, check_golden, check_no_nan, fused, golden_net

import selective_scan_cuda

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
problem = selective_scan_cuda.why_not(device, torch.float32, 6)
pytestmark = [
    pytest.mark.skipif(problem is not None, reason=str(problem)),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of an overflow: on purpose
]


def on_triton(net):
    """The net with its last() on the kernels under test."""
    net.to(device)
    net.last = lambda u: selective_scan_cuda.last(u.squeeze(-1), *net._in_order())
    return net


@pytest.mark.parametrize("case", ["per_weight", "per_weight_odd", "per_weight_short"])
def test_golden(golden, case):
    check_golden(on_triton(golden_net(golden, case)), golden, case)


# Beyond a block of channels, of sequences, and of all programs' sequences; states that are no power of two.
sizes = st.tuples(*(st.integers(1, n) for n in (40, 20, 8, 80)))  # d_inner, d_state, d_conv, rows
lengths = st.sampled_from([1, 2, 4, 6, 9])


@given(sizes, lengths, st.sampled_from([1e-4, 1.0, 30.0]), st.sampled_from([-3.0, 0.0, 3.0]), st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_equals_the_recurrence_for_any_shape(size, length, scale, dt_shift, seed):
    *shape, rows = size
    net = on_triton(fused(*shape, seed, dt_shift))
    check(net, torch.randn(rows, length, 1, device=device) * scale, torch.randn(rows, device=device))


@pytest.mark.parametrize("shape, length", [((17, 16, 8), 6), ((5, 33, 3), 16)])
def test_equals_the_recurrence_over_several_blocks_a_program(monkeypatch, shape, length):
    net = on_triton(fused(*shape, 0))
    monkeypatch.setattr(selective_scan_cuda, "_programs", lambda device: 2)
    rows = 5 * selective_scan_cuda.BLOCK_B + 1
    check(net, torch.randn(rows, length, 1, device=device), torch.randn(rows, device=device))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e8])
@pytest.mark.parametrize("dt_shift", [-50.0, 0.0, 50.0, 1e4])
def test_no_nan_where_float64_has_none(scale, dt_shift):
    check_no_nan(on_triton(fused(7, 5, 4, 0, dt_shift)), scale, 20)


def test_two_runs_give_the_same_bits():
    net = on_triton(fused(20, 16, 8, 0))
    rows = 70 if device.type == "cpu" else 100_000
    u, v = torch.randn(rows, 6, 1, device=device).requires_grad_(), torch.randn(rows, device=device)
    first, second = ([y := net.last(u), *torch.autograd.grad(y, [u, *net.parameters()], v)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_why_not():
    why_not, most = selective_scan_cuda.why_not, selective_scan_cuda.MOST_TOKENS
    assert "float64" in why_not(device, torch.float64, 6) and str(most) in why_not(device, torch.float32, most + 1)
    assert "meta" in why_not(torch.device("meta"), torch.float32, 6)
    code = "import selective_scan_cuda as s, torch; print(s.why_not(torch.device('cpu'), torch.float32, 6))"
    for hide, words in (
        ("", "CUDA devices; this is cpu"),
        ("import sys; sys.modules['triton'] = None; ", "triton pack"),
    ):
        result = without_interpreter(hide + code)
        assert words in result.stdout, result.stdout + result.stderr


def without_interpreter(code, *arguments, **variables):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


COMPILE = """
import sys, triton, selective_scan_cuda as s
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
constants = dict(L=6, K=6, n=16, N=16, BLOCK_D=s.BLOCK_D, BLOCK_B=s.BLOCK_B)
for kernel in (s._forward, s._backward):
    kind = lambda name: "constexpr" if name in constants else "i32" if name in ("rows", "d") else "*fp32"
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    built = triton.compile(source, target=target, options=dict(num_warps=1, enable_fp_fusion=True))
    open(sys.argv[2] + kernel.__name__, "wb").write(built.asm["cubin"])
    print(kernel.__name__, built.asm["ptx"].count("ex2.approx"))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_a_gpu_without_waste(tmp_path, capability):
    """At the paper's size. Exponentials: (L − 1) n of the scan, L in each loop for silu, L for softplus, 1 of the gate.
    Nothing spills forward. Backward, B and C may, which wait for the second loop, and about a third of that again."""
    import triton

    found = without_interpreter(COMPILE, str(capability), str(tmp_path / "_"), TRITON_CACHE_DIR=str(tmp_path))
    assert found.returncode == 0, found.stderr
    scan, silu, softplus, gate = 5 * 16, 6, 6, 1
    exponentials = {name: int(count) for name, count in map(str.split, found.stdout.splitlines())}
    assert exponentials == {
        "_forward": scan + 2 * silu + softplus + gate,
        "_backward": scan + 3 * silu + softplus + gate,
    }
    for name, registers, stack in (("_forward", 224, 0), ("_backward", 255, 1280)):
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / f"_{name}"]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
        used = [int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK")]
        assert used[0] <= registers and used[1] <= stack, (name, used)
