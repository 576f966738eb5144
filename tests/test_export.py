"""Packed bits, and every format of every trainer's networks against PyTorch; files from others, damaged or hostile."""

import importlib.util
import json
import shutil
import struct
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

import data
import export
import export_c
import models
import runs
import train_bihalf
import train_fsg
import train_proxconnect
import train_sibnn

DIGITS = ["--dataset", "digits", "--batch-size", "64", "--device", "cpu", "--epochs", "1"]
# One of each paper and of each kind of layer: shortcuts, pools, biases, PReLUs, binary linear layers, three values.
NETWORKS = {
    "fsg": (train_fsg, "--arch resnet8 --grad ste"),
    "fsg, all layers, both binary": (
        train_fsg,
        "--arch resnet8 --grad ste --quantizer bwn-f --act sign --binarize-all",
    ),
    "sibnn": (train_sibnn, "--arch resnet8-sibnn"),
    "sibnn, birealnet": (train_sibnn, "--arch birealnet8"),
    "sibnn, pools": (train_sibnn, "--arch lenet"),
    "sibnn, floats": (train_sibnn, "--arch lenet --act none"),
    "bnn++": (train_proxconnect, "--arch resnet8"),
    "proxquant": (train_proxconnect, "--arch birealnet8 --act sign --method pq"),
    "bihalf": (train_bihalf, "--arch resnet8-equalbits"),
    "bihalf, birealnet": (train_bihalf, "--arch birealnet8-prelu"),
    "bihalf, irnet": (train_bihalf, "--arch resnet8-irnet"),
    "irnet, floats": (train_fsg, "--arch resnet8-irnet --grad ste"),
    "bihalf, no BatchNorm": (train_bihalf, "--arch conv4 --act sign"),
    "pruned": (train_bihalf, "--arch resnet8 --prune 0.4"),
    "pruned, both binary": (train_bihalf, "--arch birealnet8 --prune 0.4"),
}
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler (cc) here")


def trained(folder, trainer, extra, steps=4):
    """A run's folder. Its BatchNorms and thresholds are made as uneven as long training would."""
    argv = [*DIGITS, "--limit-steps", str(steps), "--out", str(folder), "--name", "run", *extra.split()]
    assert trainer.main(argv) == 0
    path = folder / "run" / "best.pt"
    checkpoint = torch.load(path, weights_only=True)
    rng = torch.Generator().manual_seed(1)
    for name, value in checkpoint["model"].items():
        if value.dim() in (1, 3) and value.is_floating_point() and not name.endswith(("running_mean", "running_var")):
            value += 1.2 * torch.randn(value.shape, generator=rng)  # some factors become negative
            if name.endswith(("relu.weight", "relu1.weight", "relu2.weight")):
                value.abs_()
    torch.save(checkpoint, path)
    return folder / "run"


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def network(request, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("network"), *NETWORKS[request.param])


@pytest.fixture(scope="module")
def binary_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("network"), train_fsg, "--arch resnet8 --grad ste --act sign")


def sentence(*argv):
    """What the command says instead of working."""
    with pytest.raises(runs.RunError) as error:
        export.main([str(a) for a in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def images_of(found):
    return torch.cat([images for images, _ in export.load_test(found, None).epoch()])


# ---------------------------------------------------------------------------------------------------------------------
# Bits.


@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**32))
@settings(deadline=None)
def test_packing_and_back_for_any_shape(rows, n, seed):
    bits = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = export.pack(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-n // 64) * 8)
    assert torch.equal(export.unpack(packed, n), bits)
    for row, found in zip(bits.tolist(), packed, strict=True):
        words = struct.unpack(f"<{-(-n // 64)}Q", bytes(found.tolist()))
        assert [words[i // 64] >> (i % 64) & 1 for i in range(n)] == row, "as the file's description says"
        assert sum(word.bit_count() for word in words) == sum(row), "the padding is 0"


@pytest.mark.parametrize("act", ["sign", "si"])
def test_binary_layers_sum_whole_numbers_when_tested(act):
    """So their results are the same in every order of summation, here that of float64; training is as ever."""
    torch.manual_seed(0)
    net = models.binarize_(
        torch.nn.Sequential(torch.nn.Conv2d(200, 8, 3), torch.nn.Flatten(), torch.nn.Linear(72, 5)),
        "bwn-f",
        act,
        True,
        True,
    )
    for layer, x in ((net[0], torch.randn(16, 200, 5, 5)), (net[2], torch.randn(16, 72))):
        function = layer._conv_forward if layer is net[0] else F.linear
        bits, w, bias = layer.binary_input(x).double(), layer.binary_weight().detach(), layer.bias.detach()
        scale = w.abs().flatten(1).amax(1)
        shape = (-1, 1, 1) if layer is net[0] else (-1,)
        sums = function(bits, w.sign().double(), None).float()
        exact = sums * scale.view(shape) + bias.view(shape)
        assert torch.equal(layer.eval()(x), exact)
        trained_with = layer.train()(x)
        assert torch.equal(trained_with, function(bits.float(), w, bias)) and torch.allclose(
            trained_with, exact, atol=1e-5
        )


# ---------------------------------------------------------------------------------------------------------------------
# Every format of every paper's networks.


def test_bits_are_the_checkpoint_bit_for_bit(network, capsys):
    assert export.main([str(network), "--to", "bits"]) == 0
    out = capsys.readouterr().out
    assert "359 of 359 test images" in out and "differ by 0.0e+00" in out and "in all" in out
    # The checkpoint's network as its trainer tests it, past all of export.py.
    checkpoint = torch.load(network / "best.pt", weights_only=True)
    args = Namespace(**checkpoint["args"])
    trainer = importlib.import_module(args.script.removesuffix(".py"))
    net = trainer.network(args, 10, (1, 8, 8)).eval()
    net.load_state_dict(checkpoint["model"])
    layers = models.binary_layers(net)
    if trainer is train_proxconnect:
        for layer in layers:
            layer.quantizer, layer.options = "bwn", {}
    images = images_of(export.read(network))
    with torch.no_grad():
        assert torch.equal(net(images), export.load(network / "run.safetensors")(images))
    weights = sum(layer.weight.numel() for layer in layers)
    planes = 2 if getattr(args, "prune", 0) else 1
    rest = sum(v.numel() * v.element_size() for v in net.state_dict().values()) - 4 * weights
    padding_and_scales = sum(len(layer.weight) for layer in layers) * (8 * planes + 4)
    size = (network / "run.safetensors").stat().st_size
    assert size < weights * planes / 8 + padding_and_scales + rest + 12_000, "and a header"


def test_onnx_predicts_the_same(network, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert export.main([str(network), "--to", "onnx"]) == 0
    found = capsys.readouterr().out
    assert "359 of 359 test images" in found
    assert float(found.split("differ by ")[1].split()[0]) < 2e-3, "a bit that differs would show"
    graph = onnx.load(network / "run.onnx").graph
    kinds = [node.op_type for node in graph.node]
    layers = export.read(network).layers().values()
    assert kinds.count("DequantizeLinear") == len(layers) and "BatchNormalization" not in kinds
    weights = [onnx.numpy_helper.to_array(v) for v in graph.initializer if v.data_type == onnx.TensorProto.INT8]
    weights = [w for w in weights if w.ndim == 4]
    assert sum(w.size for w in weights) == sum(layer.weight.numel() for layer in layers)
    assert {-1, 1} <= set(np.concatenate([np.unique(w) for w in weights])) <= {-1, 0, 1}
    assert all(not node.domain for node in graph.node), "no custom operators"


@needs_compiler
def test_c_predicts_the_same(network, capsys, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-O1")  # which compiles faster than -O3
    assert export.main([str(network), "--to", "c"]) == 0
    found = capsys.readouterr().out
    assert "359 of 359 test images" in found
    assert float(found.split("differ by ")[1].split()[0]) < 2e-3, "a bit that differs would show"
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", str(network / "run.c")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_batchnorm_before_a_binary_activation_is_a_comparison_of_sums(tmp_path):
    """In a ResNet's blocks between the two convolutions; at the blocks' ends the shortcut is in between."""
    found = export.read(trained(tmp_path, train_fsg, "--arch resnet8 --grad ste --act sign"))
    calls = export.c_source(found).split("static void net_run(")[1]
    assert calls.count("_low, ") == 3 and calls.count("net_pack(out") == 3
    for group in export_c.fuse(ops := export_c.operations(found.net, found.shape)):
        for activation in [op for op in export_c.consumers(ops)[group.result] if op.kind == "sign"]:
            where = export_c.interval(group, activation)
            if where is None:
                continue
            bn = found.net.get_submodule(group.ops[1].name.removesuffix("_batchnorm").replace("_", "."))
            assert (bn.weight < 0).any() and (bn.weight > 0).any()
            sums = torch.arange(-group.max_sum, group.max_sum + 1.0).view(-1, 1, 1, 1).expand(-1, len(bn.weight), 1, 1)
            expected = bn(sums).flatten(1) >= 0
            assert torch.equal((sums.flatten(1) >= where[0]) & (sums.flatten(1) <= where[1]), expected)


def test_half(network, capsys):
    whole, half = network / "whole.safetensors", network / "half.safetensors"
    assert export.main([str(network), "--to", "bits", "--out", str(whole)]) == 0
    assert export.main([str(network), "--to", "bits", "--half", "--out", str(half)]) == 0
    assert half.stat().st_size < whole.stat().st_size
    for a, b in zip(export.read(whole).layers().values(), export.read(half).layers().values(), strict=True):
        assert torch.equal(a.weight, b.weight), "bits and scales are the same"


def test_a_packed_file_is_exported_like_a_checkpoint(binary_run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    file = tmp_path / "a.safetensors"
    assert export.main([str(binary_run), "--to", "bits", "--out", str(file)]) == 0
    assert export.main([str(file), "--to", "onnx", "--out", str(tmp_path / "a.onnx")]) == 0
    assert capsys.readouterr().out.count("359 of 359") == 2


def test_transformers_have_bits_alone(tmp_path, capsys):
    if not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed")
    folder = trained(tmp_path, train_proxconnect, "--arch test_vit --patch-size 2", steps=2)
    assert export.main([str(folder), "--to", "bits"]) == 0
    assert "differ by 0.0e+00" in capsys.readouterr().out
    assert "--to bits only" in sentence(folder, "--to", "c")
    assert "--to bits only" in sentence(folder, "--to", "onnx")


@needs_compiler
def test_bench_measures(binary_run, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export_c, "IMAGENET_LAYERS", ((64, 14),))
    results = export.bench(export.read(binary_run), 1)
    assert {(row["cores"], row["batch"]) for row in results["networks"]} >= {(1, 1), (1, 32)}
    assert all(row[name] > 0 for row in results["networks"] for name in ("pytorch", "onnxruntime", "ours"))
    assert [64, 14, 14] in [row["input"] for row in results["layers"]]
    assert "PyTorch" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence that says what to do.


def test_bad_input(binary_run, tmp_path, monkeypatch, capsys):
    assert "--to bits" in sentence(binary_run, "--to", "tflite") and "--bench" in sentence(binary_run)
    assert "there is no checkpoint" in sentence(tmp_path / "nothing.pt", "--to", "bits")
    assert "full-precision" in sentence(trained(tmp_path, train_fsg, "--arch resnet8 --quantizer none"), "--to", "c")
    (tmp_path / "fp").mkdir()
    fp = trained(tmp_path / "fp", train_proxconnect, "--arch resnet8 --method fp")
    assert "full-precision" in sentence(fp, "--to", "bits")
    (tmp_path / "empty").mkdir()
    assert "train it first" in sentence(tmp_path / "empty", "--to", "bits")
    shutil.copy(binary_run / "last.pt", tmp_path / "empty")
    assert "go on with it (--resume" in sentence(tmp_path / "empty", "--to", "bits")
    torch.save({"model": {}}, tmp_path / "state.pt")
    assert "not a checkpoint of a run" in sentence(tmp_path / "state.pt", "--to", "onnx")
    old = torch.load(binary_run / "best.pt", weights_only=True)
    del old["shape"]
    torch.save(old, tmp_path / "old.pt")
    assert "images' shape" in sentence(tmp_path / "old.pt", "--to", "bits")
    torch.save(old | {"shape": (1, 8, 8), "args": old["args"] | {"script": "os"}}, tmp_path / "foreign.pt")
    assert "only runs of train_fsg.py" in sentence(tmp_path / "foreign.pt", "--to", "bits")
    whole = tmp_path / "whole.safetensors"
    assert export.main([str(binary_run), "--to", "bits", "--out", str(whole)]) == 0
    for size in (0, 5, 300, whole.stat().st_size - 100):
        (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:size])
        assert "export it again" in sentence(tmp_path / "cut.safetensors", "--to", "c")
    assert "there is no file" in sentence(tmp_path / "none.safetensors", "--to", "c")
    assert "--half" in sentence(binary_run, "--to", "c", "--half")
    assert "--images" in sentence(binary_run, "--to", "c", "--images", "0")
    assert "could not be written" in sentence(binary_run, "--to", "bits", "--out", tmp_path / "no" / "folder")
    assert "could not be written" in sentence(binary_run, "--to", "bits", "--out", tmp_path / ("x" * 300))
    assert "name of a file" in sentence(binary_run, "--to", "bits", "--out", "/")

    def no_data(*_):
        raise data.DataError("no images")

    with monkeypatch.context() as patch:
        patch.setattr(export, "load_test", no_data)
        for kind in ("bits", "c"):
            assert export.main([str(binary_run), "--to", kind, "--out", str(tmp_path / f"net.{kind}")]) == 0
            assert "is not checked: no images" in capsys.readouterr().out and (tmp_path / f"net.{kind}").exists()
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    capsys.readouterr()
    assert export.main([str(binary_run), "--to", "c", "--out", str(tmp_path / "a.c")]) == 0
    assert "is not checked" in capsys.readouterr().out and (tmp_path / "a.c").exists()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx" in sentence(binary_run, "--to", "onnx")


def test_the_command_ends_with_a_sentence(tmp_path):
    result = subprocess.run(
        [sys.executable, "export.py", str(tmp_path), "--to", "bits"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Networks that were never trained: checkpoints made by hand.


def checkpoint(path, trainer, shape, *flags):
    """A checkpoint of a fresh network, its BatchNorms' statistics not the initial ones."""
    torch.manual_seed(0)
    args = trainer.flags().parse_args(["--dataset", "folder", *flags])
    trainer.complete(args)
    net = trainer.network(args, 4, shape)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(1, 9)
    normalisation = [[0.02] * shape[0], [-2.5] * shape[0]]
    known = {"args": vars(args), "num_classes": 4, "shape": shape, "normalisation": normalisation}
    torch.save({**known, "model": net.state_dict()}, path)
    return path


@pytest.mark.parametrize("size", [65, 98])
def test_onnx_of_large_images_whose_pools_leave_out_the_rest(tmp_path, size):
    pytest.importorskip("onnxruntime")
    path = checkpoint(tmp_path / "last.pt", train_fsg, (3, size, size), "--arch", "resnet18", "--grad", "ste")
    found = export.read(path)
    export.write_onnx(found, tmp_path / "net.onnx")
    images = torch.randn(2, 3, size, size)
    (logits,) = export.onnx_session(tmp_path / "net.onnx").run(None, {"image": images.numpy()})
    with torch.no_grad():
        expected = found.net(images)
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_numbers_that_are_not_finite_are_refused(tmp_path, capsys):
    path = checkpoint(tmp_path / "last.pt", train_fsg, (1, 8, 8), "--arch", "resnet8", "--grad", "ste")
    state = torch.load(path, weights_only=True)
    state["model"]["bn1.running_var"][0] = torch.inf
    torch.save(state, path)
    with pytest.raises(runs.RunError, match=r"NaN or infinite in bn1\.running_var"):
        export.read(path)


def test_half_keeps_what_float16_cannot_hold(tmp_path):
    path = checkpoint(tmp_path / "last.pt", train_fsg, (1, 8, 8), "--arch", "resnet8", "--grad", "ste")
    state = torch.load(path, weights_only=True)
    state["model"]["bn1.running_var"][0] = 1e6
    torch.save(state, path)
    export.write_bits(export.read(path), tmp_path / "net.safetensors", half=True)
    assert export.load(tmp_path / "net.safetensors").bn1.running_var[0] == 1e6


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    """A .safetensors file of packed bits: its metadata and tensors, to be changed and written again with `crafted`."""
    folder = tmp_path_factory.mktemp("packed")
    path = checkpoint(folder / "last.pt", train_fsg, (1, 8, 8), "--arch", "resnet8", "--grad", "ste", "--act", "sign")
    export.write_bits(export.read(path), folder / "net.safetensors")
    with safe_open(folder / "net.safetensors", "pt") as f:
        return f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def crafted(path, metadata, tensors):
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("change", ["bits", "scale", "args", "normalisation"])
def test_a_file_whose_parts_do_not_fit_is_refused(packed_file, tmp_path, change):
    metadata, tensors = dict(packed_file[0]), dict(packed_file[1])
    if change in metadata:
        metadata[change] = "{"
    else:
        name = next(name for name in tensors if name.endswith(f".weight.{change}"))
        tensors[name] = tensors[name][..., :8]
    with pytest.raises(runs.RunError, match="export it again"):
        export.load(crafted(tmp_path / "net.safetensors", metadata, tensors))


INJECTION = "resnet8 */ int injected = 1; /*"
HOSTILE_METADATA = {
    "arch": [INJECTION, "resnet20", ""],
    "quantizer": [INJECTION, "bwn", "dorefa\n"],
    "act": [INJECTION, "none"],
    "shape": ["[1, 8]", "[1, 8, 8, 8]", '"188"', "8", "null", "[1, 0, 8]", "[1, -8, 8]", "[1, 8.0, 8]", "[true, 8, 8]"],
    "num_classes": ["0", "-4", "5", "65536", "1e9", "NaN", "true", '"4"', "[4]", "9" * 4000, "9" * 5000],
    "normalisation": ["[[1], [NaN]]", "[[1], [1e999]]", "[[1]]", "[[1, 1], [0, 0]]", '[["1"], [0]]', "[1, 0]", "{}"],
    "args": ["[]", "null", "{}", "[" * 100_000, "{", '{"script": ["train_fsg.py"]}', '{"script": "train_fsg.py"}'],
}
HOSTILE_FLAGS = {
    "script": ["os", "export.py", "../train_fsg.py", None, 5, [], {}, "train_fsg.py\n"],
    "arch": [
        INJECTION,
        "hf-hub:someone/net",
        "local-dir:/tmp",
        "../resnet8",
        "/resnet8",
        8,
        None,
        ["resnet8"],
        "nothing",
    ],
    "quantizer": [INJECTION, "none", "nothing", 3, None, ["dorefa"], {"dorefa": 1}],
    "act": [INJECTION, "nothing", 3, {}],
    "dataset": ["/etc", "nothing", 3, {}],
    "binarize_all": ["yes", {}, True],
    "seed": ["*/", {}, {"a": {}}],
}
HOSTILE_TENSORS = {
    "layer1.0.conv1.weight.bits": [None, torch.zeros(16, 24, dtype=torch.int8), torch.zeros(16, 16, dtype=torch.uint8)],
    "layer1.0.conv1.weight.scale": [None, -torch.ones(16), torch.full((16,), torch.nan), torch.ones(16).double()],
    "layer1.0.conv1.weight.nonzero": [torch.zeros(16, 1, dtype=torch.uint8)],
    "bn1.running_var": [None, torch.full((16,), torch.inf), torch.ones(17), torch.ones(16).long(), torch.ones(16, 1)],
    "bn1.num_batches_tracked": [torch.tensor(1.0), torch.tensor([1])],
    "layer1.0.conv1.weight": [torch.ones(16, 16, 3, 3)],
    "no_such_layer.weight": [torch.ones(1)],
}
HOSTILE = [
    *[("metadata", name, value) for name, values in HOSTILE_METADATA.items() for value in [None, *values]],
    *[("metadata", "comment", "a field that is not known")],
    *[("flag", name, value) for name, values in HOSTILE_FLAGS.items() for value in values],
    *[("tensor", name, value) for name, values in HOSTILE_TENSORS.items() for value in values],
]


@pytest.mark.parametrize(
    "place, name, value", HOSTILE, ids=lambda value: "" if torch.is_tensor(value) else f"{value}"[:20]
)
def test_a_hostile_file_is_refused(packed_file, tmp_path, place, name, value):
    """With one sentence, and before anything of it reaches a C file. None: the field is left out."""
    metadata, tensors = dict(packed_file[0]), dict(packed_file[1])
    if place == "flag":
        flags = json.loads(metadata["args"]) | {name: value}
        metadata["args"] = json.dumps(flags)
        if name in metadata and isinstance(value, str):
            metadata[name] = value  # so that they do not contradict each other
    else:
        fields = metadata if place == "metadata" else tensors
        fields[name] = value
        if value is None:
            del fields[name]
    file = crafted(tmp_path / "net.safetensors", metadata, tensors)
    said = sentence(file, "--to", "c")
    assert "export it again" in said or "can be exported" in said or "full-precision" in said or "packed bits" in said
    assert said.isprintable() and len(said) < 500
    assert list(tmp_path.iterdir()) == [file]


def test_a_small_file_cannot_name_a_huge_network(packed_file, tmp_path):
    metadata, tensors = packed_file
    flags = json.loads(metadata["args"]) | {"arch": "vgg16", "binarize_all": False}
    changed = metadata | {"args": json.dumps(flags), "arch": "vgg16", "num_classes": "65536"}
    assert "too small for a network of this size" in sentence(
        crafted(tmp_path / "a.safetensors", changed, tensors), "--bench"
    )


def test_a_file_does_not_say_where_data_are(packed_file, tmp_path):
    metadata, tensors = packed_file
    assert not {"data_dir", "out", "resume", "pretrained"} & json.loads(metadata["args"]).keys()
    flags = json.loads(metadata["args"]) | {"data_dir": "/etc"}
    file = crafted(tmp_path / "net.safetensors", metadata | {"args": json.dumps(flags)}, tensors)
    assert export.read(file).args.data_dir == train_fsg.flags().get_default("data_dir")


def test_text_of_a_checkpoint_does_not_reach_the_c_file(packed_file, tmp_path):
    path = checkpoint(tmp_path / "last.pt", train_fsg, (1, 8, 8), "--arch", "resnet8", "--grad", "ste")
    state = torch.load(path, weights_only=True)
    for name in ("arch", "act", "quantizer", "script", "dataset"):
        torch.save(state | {"args": state["args"] | {name: INJECTION}}, path)
        assert "injected" not in sentence(path, "--to", "c").replace(INJECTION, "")
        assert not (tmp_path / "last.c").exists()


def test_values_that_become_nan_are_refused(packed_file, tmp_path):
    """A negative variance is a finite number, but BatchNorm divides by its square root."""
    metadata, tensors = packed_file
    file = crafted(tmp_path / "net.safetensors", metadata, tensors | {"bn1.running_var": -torch.ones(16)})
    assert "NaN or infinite values in bn1" in sentence(file, "--to", "c")
    assert "NaN or infinite values in bn1" in sentence(file, "--to", "onnx")


@given(seed=st.integers(0, 2**32), count=st.integers(1, 4), cut=st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_ends_with_a_sentence(packed_file, tmp_path, seed, count, cut):
    file = crafted(tmp_path / "net.safetensors", *packed_file)
    contents, rng = bytearray(file.read_bytes()), np.random.default_rng(seed)
    header = 8 + int.from_bytes(contents[:8], "little")
    for _ in range(count):  # half of them in the header
        contents[rng.integers(header if rng.random() < 0.5 else len(contents))] = rng.integers(256)
    file.write_bytes(contents[: rng.integers(len(contents))] if cut else contents)
    try:
        export.load(file)  # a weight that has changed cannot be noticed
    except runs.RunError as e:
        assert str(e).isprintable()


# ---------------------------------------------------------------------------------------------------------------------
# Files that others write at the same time, and files that must not be overwritten.


def test_exporting_a_checkpoint_while_its_run_saves(binary_run, tmp_path):
    """The run has written half of last.pt when the export of the old one begins and ends."""
    last = tmp_path / "last.pt"
    shutil.copy(binary_run / "last.pt", last)
    contents = last.read_bytes()
    with runs.replacing(last, "wb") as f:
        f.write(contents[:1000])
        f.flush()
        for to in ("bits", "c"):
            assert export.main([str(last), "--to", to]) == 0
        f.write(contents[1000:])
    assert last.read_bytes() == contents
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.c", "last.pt", "last.safetensors"]
    assert (tmp_path / "last.c").read_text().startswith("/* resnet8") and export.load(tmp_path / "last.safetensors")


def test_two_exports_at_once(tmp_path):
    with runs.replacing(tmp_path / "net.c", "wb") as f:
        f.write(b"first, which ends last")
        export.write(tmp_path / "net.c", b"second")
        export.write(tmp_path / "net.onnx", b"another format")
    assert (tmp_path / "net.c").read_bytes() == b"first, which ends last"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.c", "net.onnx"]


def test_a_checkpoint_is_never_overwritten(binary_run, tmp_path):
    new, old = tmp_path / "best.pt", tmp_path / "weights"
    shutil.copy(binary_run / "best.pt", new)
    torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    for file in (new, old):
        contents = file.read_bytes()
        for to in ("bits", "onnx", "c"):
            assert "is a checkpoint" in sentence(binary_run, "--to", to, "--out", file)
        assert file.read_bytes() == contents
    export.write(tmp_path / "net.c", b"/* an older export */")
    export.write(tmp_path / "net.c", b"/* a newer export */")
    assert (tmp_path / "net.c").read_bytes() == b"/* a newer export */"


def test_a_file_that_predicts_other_classes_ends_with_an_error(binary_run, tmp_path, monkeypatch):
    real = export.check
    monkeypatch.setattr(export, "check", lambda *args: (real(*args)[0] - 1, *real(*args)[1:]))
    with pytest.raises(runs.RunError, match="disagree on 1 of 359 images"):
        export.main([str(binary_run), "--to", "bits", "--out", str(tmp_path / "net.safetensors")])


def test_the_file_is_named_after_the_run_or_the_checkpoint(binary_run, monkeypatch):
    monkeypatch.chdir(binary_run)
    assert export.main([".", "--to", "bits"]) == 0 and (binary_run / f"{binary_run.name}.safetensors").exists()
    assert export.main(["last.pt", "--to", "bits"]) == 0 and (binary_run / "last.safetensors").exists()
