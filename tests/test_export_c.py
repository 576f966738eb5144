"""The kernel for convolutions of bits against F.conv2d, and what may stand in a C file."""

import ctypes
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import export_c
from runs import RunError

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler (cc) here")


@needs_compiler
@given(
    channels=st.integers(1, 140),
    filters=st.integers(1, 40),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    mode=st.sampled_from([export_c.XNOR, export_c.AND, export_c.MASKED]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_binary_convolution_is_conv2d(channels, filters, kernel, stride, padding, height, width, mode, seed):
    """With every vector unit of this machine. Zero padding is neither −1 nor +1."""
    if min(height, width) + 2 * padding < kernel:
        return
    rng = torch.Generator().manual_seed(seed)
    bits = torch.rand(channels, height, width, generator=rng) < 0.5
    least = -1 if mode == export_c.MASKED else 0
    signs = torch.randint(least, 2, (filters, channels, kernel, kernel), generator=rng, dtype=torch.int8)
    signs = signs if mode == export_c.MASKED else signs * 2 - 1
    signs.view(-1)[0] = 0 if mode == export_c.MASKED else 1
    x = bits.float() if mode == export_c.AND else bits.float() * 2 - 1
    expected = F.conv2d(x[None], signs.float(), None, stride, padding)[0].int()
    for unit in range(export_c.kernel().best_unit() + 1):
        found = export_c.binary_conv2d(bits, signs, stride=stride, padding=padding, mode=mode, unit=unit)
        assert torch.equal(found, expected), export_c.VECTOR_UNITS[unit]


@needs_compiler
@pytest.mark.parametrize("filters", [5, 64, 100])
def test_bits_in_bits_out(filters):
    """A layer with its thresholds, by every vector unit of this machine."""
    bits, signs = torch.rand(70, 9, 7) < 0.5, torch.randint(2, (filters, 70, 3, 3), dtype=torch.int8) * 2 - 1
    low = torch.randint(-20, 10, (filters,), dtype=torch.int32)
    high = low + torch.randint(0, 60, (filters,), dtype=torch.int32)
    low[0], high[0] = 1, 0  # never
    sums = F.conv2d(bits[None].float() * 2 - 1, signs.float(), padding=1)[0]
    expected = (sums >= low.view(-1, 1, 1)) & (sums <= high.view(-1, 1, 1))
    shape = export_c.ConvShape(9, 7, 70, filters, 3, 1, 1, export_c.XNOR)
    x, weights, lib = export_c.packed_activations(bits), export_c.binary_weights(signs), export_c.kernel()
    low, extent = export_c.thresholds(low, high)
    for unit in range(lib.best_unit() + 1):
        out = np.empty((9, 7, math.ceil(filters / 8)), dtype=np.uint8)
        lib.use_unit(unit)
        lib.binary_conv(ctypes.byref(shape), *map(export_c.pointer, (x, weights, None, out, low, extent)))
        assert np.array_equal(out, export_c.packed_activations(expected)), export_c.VECTOR_UNITS[unit]
    lib.use_unit(len(export_c.VECTOR_UNITS))


@needs_compiler
def test_nothing_in_the_comment_of_a_c_file_is_compiled(tmp_path):
    ops = export_c.operations(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2)).eval(), (1, 2, 2))
    about = "net */ int injected = 1; /* \\\n?" + "?/\n" + "é" + "x" * 1000
    text = export_c.c_source(ops, [[1.0], [0.0]], about)
    (tmp_path / "net.c").write_text(text)
    library = export_c.compile_library(tmp_path / "net.c", tmp_path)
    assert not hasattr(library, "injected") and hasattr(library, "net_predict")
    assert len(text.splitlines()[0]) < 300 and text.splitlines()[0].isascii()


def test_a_compiler_that_fails_ends_with_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "net.c").write_text("this is not C")
    for compiler in ("cc", str(tmp_path / "nothing"), "false"):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(RunError, match=r"could not be compiled by .* CC=") as error:
            export_c.compile_library(tmp_path / "net.c", tmp_path)
        assert "\n" not in str(error.value)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no C compiler here"):
        export_c.compile_library(tmp_path / "net.c", tmp_path)


def test_what_is_no_convolutional_network_is_refused():
    with pytest.raises(RunError, match=r"--to bits only .*Softmax"):
        export_c.operations(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.Softmax(1)), (1, 2, 2))
