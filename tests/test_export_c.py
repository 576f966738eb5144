"""The kernels of a C file against F.conv2d; the file on every vector unit, compiler and processor; its RAM and text."""

import ctypes
import functools
import math
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import export_bits
import export_c
import models
from runs import RunError

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler (cc) here")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFLAGS", "-O0")  # which compiles faster than -O3
        yield


def for_neon(text):
    """The text of a C file, so that any machine compiles the part for ARM's NEON (with arm_neon.h of this folder)."""
    ours, theirs = "defined(__GNUC__) && defined(__x86_64__)", "defined(__aarch64__) && defined(__ARM_NEON)"
    assert ours in text and theirs in text
    return text.replace(ours, "0").replace(theirs, "1")


HEADERS = f"-I{Path(__file__).parent}"


@functools.cache
def neon():
    """export_c.kernel() with emulated NEON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "neon.c")
        file.write_text(for_neon(export_c.KERNELS.read_text("utf-8") + export_c.CALL_KERNELS), "utf-8")
        return export_c.compile_library(file, Path(folder), HEADERS)


def units():
    """The name, the compiled kernels and the number of every vector unit: those of this machine, and emulated NEON."""
    found = [(export_c.VECTOR_UNITS[i], export_c.kernel(), i) for i in range(export_c.kernel().best_unit() + 1)]
    return [*found, ("NEON", neon(), 0)]


# ---------------------------------------------------------------------------------------------------------------------
# The kernels.


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
    """With every vector unit. Zero padding is neither −1 nor +1."""
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
    for name, lib, unit in units():
        with mock.patch.object(export_c, "kernel", lambda lib=lib: lib):
            found = export_c.binary_conv2d(bits, signs, stride=stride, padding=padding, mode=mode, unit=unit)
        assert torch.equal(found, expected), name


@needs_compiler
@pytest.mark.parametrize("mode", [export_c.XNOR, export_c.AND, export_c.MASKED])
@pytest.mark.parametrize("channels, size", [(140_000, 1), (130, 40)])
def test_sums_of_a_large_linear_layer(channels, size, mode):
    """Whose largest sums need more than 16 bits, also of one row."""
    signs = torch.full((3, channels, size, size), -1, dtype=torch.int8)
    signs[0], signs[1, ::2], signs[2, 0, 0, 0] = 1, 1, 0 if mode == export_c.MASKED else 1
    bits = torch.ones(channels, size, size, dtype=torch.bool)
    expected = signs.sum(dim=(1, 2, 3), dtype=torch.int32)
    for name, lib, unit in units():
        with mock.patch.object(export_c, "kernel", lambda lib=lib: lib):
            found = export_c.binary_conv2d(bits, signs, mode=mode, unit=unit)
        assert torch.equal(found[:, 0, 0], expected), name


@needs_compiler
@pytest.mark.parametrize("mode", [export_c.XNOR, export_c.AND, export_c.MASKED])
@pytest.mark.parametrize("channels, filters", [(16, 5), (32, 64), (64, 24), (70, 100)])
def test_bits_in_bits_out(channels, filters, mode):
    """A layer with its thresholds, by every vector unit."""
    bits = torch.rand(channels, 9, 7) < 0.5
    signs = torch.randint(2, (filters, channels, 3, 3), dtype=torch.int8) * 2 - 1
    if mode == export_c.MASKED:
        signs *= torch.rand(signs.shape) < 0.7
    low = torch.randint(-20, 10, (filters,), dtype=torch.int32)
    high = low + torch.randint(0, 60, (filters,), dtype=torch.int32)
    low[0], high[0] = 1, 0  # never
    low[1], high[1] = -(2**30), 2**30  # always
    low[2], high[2] = 1, 1  # in mode XNOR only where the number of taps is odd
    x = bits[None].float() if mode == export_c.AND else bits[None].float() * 2 - 1
    sums = F.conv2d(x, signs.float(), padding=1)[0]
    expected = (sums >= low.view(-1, 1, 1)) & (sums <= high.view(-1, 1, 1))
    shape = export_c.ConvShape(9, 7, channels, filters, 3, 1, 1, mode)
    x, weights = export_c.packed_activations(bits), export_c.binary_weights(signs)
    low, extent = export_c.thresholds(low, high)
    for name, lib, unit in units():
        out = np.empty((9, 7, math.ceil(filters / 8)), dtype=np.uint8)
        lib.use_unit(unit)
        lib.binary_conv(ctypes.byref(shape), *map(export_c.pointer, (x, weights, None, out, low, extent)))
        lib.use_unit(len(export_c.VECTOR_UNITS))
        assert np.array_equal(out, export_c.packed_activations(expected)), name


@needs_compiler
@given(
    channels=st.integers(1, 40),
    filters=st.integers(1, 70),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 17),
    weights=st.sampled_from(["floats", "signs", "signs and 0"]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_convolution_of_floats_is_conv2d(channels, filters, kernel, stride, padding, height, width, weights, seed):
    if min(height, width) + 2 * padding < kernel:
        return
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(channels, height, width, generator=rng)
    w = torch.randn(filters, channels, kernel, kernel, generator=rng)
    arrays = [export_c.blocks_of_16(w).contiguous(), None, None]
    if weights != "floats":
        w = w.sign() * (w.abs() > 0.5) if weights == "signs and 0" else w.sign()
        arrays = [None, export_c.bits_of_16(w > 0), export_c.bits_of_16(w != 0) if weights == "signs and 0" else None]
    expected = F.conv2d(x[None], w, None, stride, padding)[0]
    shape = export_c.ConvShape(height, width, channels, filters, kernel, stride, padding, 0)
    pixels = x.permute(1, 2, 0).contiguous()
    for name, lib, unit in units():
        out = torch.empty(*shape.output_size(), filters)
        lib.use_unit(unit)
        lib.float_conv(ctypes.byref(shape), *map(export_c.pointer, (pixels, *arrays, out)))
        lib.use_unit(len(export_c.VECTOR_UNITS))
        assert torch.allclose(out.permute(2, 0, 1), expected, atol=1e-4), name


# ---------------------------------------------------------------------------------------------------------------------
# The C file.

NORMALISATION = [[0.02], [-2.1]]
NETWORKS = {  # arch and activations
    "W1A1": ("birealnet8", "sign"),
    "steps": ("resnet8-sibnn", "si"),
    "W1A32": ("resnet8-irnet", "none"),
    "pruned": ("resnet8", "sign"),
}


def operations(arch, act, *, pruned=False, size=8, channels=1):
    """The operations of a network with binary weights whose BatchNorms are uneven, and the network."""
    torch.manual_seed(0)
    net = models.build(arch, 10, "bwn-f", act, in_channels=channels, image_size=size)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(1, 9)
    with torch.no_grad():
        for layer in models.binary_layers(net.eval()):
            signs, scale = export_bits.factorize(export_bits.rows_of(layer, layer.binary_weight()))
            export_bits.freeze(layer, signs * (torch.rand(signs.shape) < 0.6) if pruned else signs, scale)
    return export_c.operations(net, (channels, size, size)), net


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """The text of a C file, images of bytes, and PyTorch's logits."""
    ops, net = operations(*NETWORKS[request.param], pruned=request.param == "pruned")
    images = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    with torch.no_grad():
        logits = net(images.float() * NORMALISATION[0][0] + NORMALISATION[1][0])
    return export_c.c_source(ops, NORMALISATION, request.param), images, logits


@needs_compiler
def test_every_vector_unit_predicts_what_pytorch_predicts(network, tmp_path):
    text, images, logits = network
    use_unit = "void use_unit(int unit);\nvoid use_unit(int unit) { net_unit = unit; }\n"
    (tmp_path / "net.c").write_text(text + use_unit)
    library = export_c.compile_library(tmp_path / "net.c", tmp_path)
    for unit in range(export_c.kernel().best_unit() + 1):
        library.use_unit(unit)
        found = export_c.predict(library, images, 10)
        assert torch.equal(found, export_c.predict(library, images.float(), 10)), "bytes and floats"
        assert torch.allclose(found, logits, atol=1e-4), export_c.VECTOR_UNITS[unit]
    (tmp_path / "neon.c").write_text(for_neon(text))
    library = export_c.compile_library(tmp_path / "neon.c", tmp_path, HEADERS)
    assert torch.allclose(export_c.predict(library, images, 10), logits, atol=1e-4), "NEON, emulated"


@needs_compiler
def test_threads_compute_at_the_same_time(network, tmp_path):
    """Each with memory of its own, of as many bytes as the file says."""
    text, images, _ = network
    (tmp_path / "net.c").write_text(text)
    library, images = export_c.compile_library(tmp_path / "net.c", tmp_path), images.repeat(50, 1, 1, 1)
    ram = int(text.split("#define NET_RAM_BYTES ")[1].split()[0])
    for kind in (images, images.float()):
        expected = export_c.predict(library, kind, 10)
        for threads in (1, 4):
            assert torch.equal(export_c.predict(library, kind, 10, threads=threads, ram=ram), expected)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("flags", ["", "-m32", "-march=native", "-mno-avx512f", "-mno-avx2 -mno-sse4.1"])
def test_compilers_do_not_warn(network, tmp_path, compiler, flags):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    (tmp_path / "empty.c").write_text("#include <stdio.h>\nint main(void) { return 0; }\n")
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", *flags.split()]
    if subprocess.run([*command, "-fsyntax-only", str(tmp_path / "empty.c")], capture_output=True).returncode:
        pytest.skip(f"{compiler} cannot compile with {flags}")
    (tmp_path / "net.c").write_text(network[0])
    result = subprocess.run([*command, "-fsyntax-only", str(tmp_path / "net.c")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


ARM_M = "arm-none-eabi-gcc -mthumb --specs=rdimon.specs -Wl,--section-start=.vectors=0"
RUN_ARM_M = "qemu-system-arm -nographic -semihosting-config enable=on,target=native"
PROCESSORS = {  # compiler, emulator
    "64-bit ARM with NEON": ("aarch64-linux-gnu-gcc -static", "qemu-aarch64"),
    "Cortex-M4F": (
        f"{ARM_M} -mcpu=cortex-m4 -mfloat-abi=hard -mfpu=fpv4-sp-d16 -Werror=double-promotion",
        f"{RUN_ARM_M} -M mps2-an386 -kernel",
    ),
    "Cortex-M0+": (f"{ARM_M} -mcpu=cortex-m0plus", f"{RUN_ARM_M} -M mps2-an385 -kernel"),
}
MAIN = r"""
#include <stdio.h>
int main(void) {
    for (int i = 0; i < IMAGES; i++) {
        float logits[10];
        net_predict_uint8(images[i], logits);
        for (int k = 0; k < 10; k++) {
            uint32_t bits;
            memcpy(&bits, logits + k, 4);
            printf("%08lx ", (unsigned long)bits);
        }
    }
    return 0;
}
#ifdef __thumb__ /* what a processor does after its reset: enable the FPU, go to the C library's start */
void _start(void);
void reset(void);
void reset(void) {
#ifdef __ARM_FP
    *(volatile uint32_t *)0xE000ED88 |= 0xfu << 20;
#endif
    _start();
}
__attribute__((section(".vectors"), used)) static void *const vectors[16] = {(void *)0x20300000, (void *)reset};
#endif
"""


@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors_predict_what_pytorch_predicts(network, tmp_path, processor):
    compiler, emulator = PROCESSORS[processor]
    name, *flags = compiler.split()
    name = next(filter(shutil.which, (name, f"{name}-12")), None)
    if name is None or not shutil.which(emulator.split()[0]):
        pytest.skip(f"a compiler or an emulator for {processor} is not installed")
    text, images, logits = network
    images, logits = images[:2], logits[:2]
    rows = ["{" + ", ".join(map(str, image.flatten().tolist())) + "}" for image in images]
    table = f"enum {{ IMAGES = {len(images)} }};\nstatic const uint8_t images[][64] = {{{', '.join(rows)}}};\n"
    (tmp_path / "main.c").write_text(text + table + MAIN)
    program = tmp_path / "main"
    options = ["-O1", "-std=gnu99", "-Wall", "-Wextra", *flags, str(tmp_path / "main.c"), "-o", str(program), "-lm"]
    subprocess.run([name, *options], check=True)
    command = [*emulator.split(), str(program)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    found = torch.tensor([struct.unpack("!f", bytes.fromhex(word))[0] for word in output.split()]).view(-1, 10)
    assert torch.allclose(found, logits, atol=1e-4)


@needs_compiler
def test_two_networks_in_one_program(tmp_path):
    """In one file: their names do not collide."""
    texts, expected = [], []
    images = torch.randint(256, (3, 1, 8, 8)).byte()
    for name, act in (("first", "sign"), ("second", "none")):
        ops, net = operations("resnet8", act)
        texts.append(export_c.c_source(ops, NORMALISATION, name, name))
        with torch.no_grad():
            expected.append(net(images.float() * NORMALISATION[0][0] + NORMALISATION[1][0]))
    (tmp_path / "both.c").write_text("\n".join(texts))
    library = export_c.compile_library(tmp_path / "both.c", tmp_path)
    for name, logits in zip(("first", "second"), expected, strict=True):
        assert torch.allclose(export_c.predict(library, images, 10, name), logits, atol=1e-4)


MAIN_WITH_HEADERS = r"""
#include "first.h"
#include "second.h"
#include <stdio.h>
static float ram[FIRST_RAM_BYTES / 4];
int main(void) {
    static const uint8_t images[2][FIRST_IMAGE_SIZE] = {IMAGES};
    float logits[3][FIRST_LOGITS_SIZE];
    first_predict_uint8_in(ram, images[0], 2, logits[0]);
    second_predict_uint8(images[0], logits[2]);
    for (int i = 0; i < 3 * FIRST_LOGITS_SIZE; i++) printf("%.9g ", logits[0][i]);
    return 0;
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="gcc and g++ are not installed")
def test_a_program_includes_the_headers_of_two_networks(tmp_path):
    """In C and in C++. The C files compile alone, and after their headers."""
    images, expected = torch.randint(256, (2, 1, 8, 8)).byte(), []
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{tmp_path}"]
    for name, act, count in (("first", "sign", 2), ("second", "none", 1)):
        ops, net = operations("resnet8", act)
        text = export_c.c_source(ops, NORMALISATION, name, name)
        (tmp_path / f"{name}.c").write_text(text)
        (tmp_path / f"{name}.h").write_text(export_c.c_header(text))
        build = ["gcc", "-std=c99", *strict, "-c", f"{name}.c", "-o", f"{name}.o"]
        subprocess.run([*build, "-include", f"{name}.h", "-fsyntax-only"], check=True, cwd=tmp_path)
        subprocess.run(build, check=True, cwd=tmp_path)
        with torch.no_grad():
            expected.append(net(images[:count].float() * NORMALISATION[0][0] + NORMALISATION[1][0]))
    rows = ", ".join("{" + ", ".join(map(str, image.flatten().tolist())) + "}" for image in images)
    for compiler, file in ((("gcc", "-std=c99"), "main.c"), (("g++", "-std=c++11"), "main.cpp")):
        (tmp_path / file).write_text(MAIN_WITH_HEADERS.replace("IMAGES}", f"{rows}}}"))
        command = [*compiler, *strict, file, "first.o", "second.o", "-o", "main", "-lm"]
        subprocess.run(command, check=True, cwd=tmp_path)
        output = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True).stdout
        found = torch.tensor([float(word) for word in output.split()]).view(3, 10)
        assert torch.allclose(found, torch.cat(expected), atol=1e-4), file


def test_the_sizes_in_the_header_are_those_of_the_c_file(network):
    header, _, code = network[0].partition(export_c.END_OF_HEADER)
    assert header + export_c.END_OF_HEADER == export_c.c_header(network[0])
    sizes = dict(line.split()[1:] for line in header.splitlines() if re.match(r"#define \w+ \d+$", line))
    image, logits = network[1][0].numel(), network[2].shape[1]
    assert sizes.pop("NET_RAM_BYTES") == str(4 * int(re.search(r"float net_ram\[(\d+)\]", code)[1]))
    arrays = re.findall(r"static const (\w+) net_\w+\[(\d+)\]", code)
    assert sizes.pop("NET_CONSTANT_BYTES") == str(sum((2 if t == "uint16_t" else 4) * int(n) for t, n in arrays))
    assert sizes == {"NET_IMAGE_SIZE": str(image), "NET_LOGITS_SIZE": str(logits)}
    assert f"images += {image}, logits += {logits})" in code


def deepest_stack(graph: str) -> int:
    """The bytes of the deepest calls in a file of gcc's -fcallgraph-info=su."""
    own = {name: int(n) for name, n in re.findall(r'node: { title: "([^"]+)" label: "[^"]*?\\n(\d+) bytes', graph)}
    calls = re.findall(r'edge: { sourcename: "([^"]+)" targetname: "([^"]+)"', graph)
    called = {callee for _, callee in calls}
    for name in own:
        if ":" in name and name not in called:  # static, so it is called through a pointer
            calls.append(("__indirect_call", name))

    @functools.cache
    def stack(name):
        return own.get(name, 0) + max((stack(callee) for caller, callee in calls if caller == name), default=0)

    assert stack("net_predict") > 100
    return max(map(stack, own))


@pytest.mark.parametrize(
    "network, processor",
    [("pruned", "x86-64"), *((name, processor) for name in NETWORKS for processor in ("Cortex-M4F", "Cortex-M0+"))],
    indirect=["network"],
)
def test_the_stack_is_bounded(network, tmp_path, processor):
    flags = [flag for flag in PROCESSORS.get(processor, ("",))[0].split()[1:] if flag.startswith("-m")]
    compiler = "gcc" if processor == "x86-64" else "arm-none-eabi-gcc"
    if not shutil.which(compiler) or (compiler == "gcc" and platform.machine() != "x86_64"):
        pytest.skip(f"a compiler for {processor} is not installed")
    (tmp_path / "net.c").write_text(network[0])
    command = [compiler, *flags, "-O2", "-std=c99", "-fstack-usage", "-fcallgraph-info=su", "-S", "net.c"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "-fcallgraph-info" in result.stderr:
        pytest.skip("this compiler does not know the stack")
    assert result.returncode == 0, result.stderr
    frames = [line.split("\t")[2] for line in (tmp_path / "net.su").read_text().splitlines()]
    assert not {"dynamic"} & set(frames), "a frame of any size"
    bound = export_c.STACK_BYTES["x86-64" if processor == "x86-64" else "microcontroller"]
    assert deepest_stack((tmp_path / "net.ci").read_text()) <= bound
    assert f"about {export_c.STACK_BYTES['microcontroller']:,} bytes of stack" in network[0]


@pytest.mark.parametrize("arch, kilobytes", [("resnet20", 100), ("birealnet20", 160)])
def test_ram_of_a_microcontroller(arch, kilobytes):
    ops, _ = operations(arch, "sign", size=32, channels=3)
    flash, ram = export_c.memory(ops, [[1.0] * 3, [0.0] * 3])
    assert ram <= 1000 * kilobytes
    weights = sum(op.weight.numel() for op in ops if op.sums_bits)
    floats = 4 * sum(op.weight.numel() for op in ops if op.kind == "conv" and not op.sums_bits)
    assert weights / 8 + floats < flash < 1.6 * (weights / 8 + floats)
    text = export_c.c_source(ops, [[1.0] * 3, [0.0] * 3], arch)
    assert f"#define NET_RAM_BYTES {ram}\n" in text and f"#define NET_CONSTANT_BYTES {flash}\n" in text


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=14),
)
@settings(deadline=None)
def test_buffers_that_are_needed_at_once_do_not_overlap(buffers):
    made = [export_c.Buffer(str(i), "bits", size, at, at + n) for i, (size, at, n) in enumerate(buffers)]
    total = export_c.place(made)
    for i, a in enumerate(made):
        assert a.offset >= 0 and a.offset + a.size <= total
        for b in made[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


@needs_compiler
def test_nothing_in_the_comment_of_a_c_file_is_compiled(tmp_path):
    ops = export_c.operations(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2)).eval(), (1, 2, 2))
    about = "net */ int injected = 1; /* \\\n?" + "?/\n" + "é" + "x" * 1000
    text = export_c.c_source(ops, [[1.0], [0.0]], about)
    (tmp_path / "net.c").write_text(text)
    library = export_c.compile_library(tmp_path / "net.c", tmp_path)
    assert not hasattr(library, "injected") and hasattr(library, "net_predict")
    assert len(text.splitlines()[0]) < 300 and text.splitlines()[0].isascii()


@pytest.mark.parametrize("name", ["", "a b", "1net", "net;", "nét", "x" * 100, "a\nb", "*/"])
def test_the_names_in_a_c_file_are_identifiers(name):
    ops = export_c.operations(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2)).eval(), (1, 2, 2))
    with pytest.raises(RunError, match="letters, digits and underscores"):
        export_c.c_source(ops, [[1.0], [0.0]], "net", name)


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
    with pytest.raises(RunError, match=r"cannot be written as C .*Softmax"):
        export_c.operations(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.Softmax(1)), (1, 2, 2))
