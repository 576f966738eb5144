"""Every format of every trainer's networks and of networks of one's own against PyTorch; files on disk."""

import csv
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import data
import export
import export_bits
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
    return torch.cat([images for images, _ in export.load_test(found).epoch()])


# ---------------------------------------------------------------------------------------------------------------------
# Bits.


@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**32))
@settings(deadline=None)
def test_packing_and_back_for_any_shape(rows, n, seed):
    bits = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = export_bits.pack(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-n // 64) * 8)
    assert torch.equal(export_bits.unpack(packed, n), bits)
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
    assert "359 of 359 test images" in out and "differ by 0.0e+00" in out and "total" in out
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
        assert torch.equal(net(images), export.load_bits(network / "run.safetensors")(images))
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
    assert "359 of 359 test images" in capsys.readouterr().out
    session, net = export.onnx_session(network / "run.onnx"), export.read(network).net
    images = torch.cat([x for x, _ in data.load("digits")[2].epoch()]).contiguous()
    with torch.no_grad():
        difference = (net(images) - torch.from_numpy(session.run(None, {"image": images.numpy()})[0])).abs().amax(1)
    assert difference.max() < 2e-3, "a bit that differs would show"
    graph = onnx.load(network / "run.onnx").graph
    layers = models.named_binary_layers(export.read(network).net).values()
    weights = [onnx.numpy_helper.to_array(v) for v in graph.initializer if v.data_type == onnx.TensorProto.INT8]
    assert sum(w.size for w in weights) == sum(layer.weight.numel() for layer in layers)
    assert {-1, 1} <= set(np.concatenate([np.unique(w) for w in weights])) <= {-1, 0, 1}
    assert all(not node.domain for node in graph.node), "no custom operators"
    kinds = {node.op_type for node in graph.node}
    assert "DequantizeLinear" not in kinds, "onnxruntime computes it at every call"
    known = {prop.key: prop.value for prop in onnx.load(network / "run.onnx").metadata_props}
    assert known["inference_precision"] == "float32" and "INFERENCE_PRECISION_HINT" in known["note"]


@pytest.fixture(autouse=True)
def compiled_fast(monkeypatch):
    """C files are compiled without a warning, and without optimisation where a test does not want it."""
    monkeypatch.setenv("CFLAGS", "-O0 -Wall -Wextra -Werror -pedantic")


@needs_compiler
def test_c_predicts_the_same(network, capsys):
    assert export.main([str(network), "--to", "c"]) == 0
    found = capsys.readouterr().out
    assert "359 of 359 test images" in found
    assert all(f"{network / 'run'}.{ending}: " in found for ending in "ch")
    assert f"bytes of RAM besides the image (64 bytes) and about {export_c.STACK_BYTES['microcontroller']:,}" in found
    assert float(found.split("differ by ")[1].split()[0]) < 2e-3, "a bit that differs would show"


def test_a_batchnorm_before_a_binary_activation_is_a_comparison_of_sums(tmp_path):
    """In a ResNet's blocks between the two convolutions; at the blocks' ends the shortcut is in between."""
    found = export.read(trained(tmp_path, train_fsg, "--arch resnet8 --grad ste --act sign"))
    text = export_c.c_source(*export.c_operations(found.net, found.example(), found.normalisation), "")
    calls = text.split("static void net_run(")[1]
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
    if export.read(network).act != "none":
        assert "would change binary activations" in sentence(network, "--to", "bits", "--half", "--out", half)
        assert not half.exists()
        return
    assert export.main([str(network), "--to", "bits", "--half", "--out", str(half)]) == 0
    assert half.stat().st_size < whole.stat().st_size
    layers = [models.named_binary_layers(export.load_bits(file)).values() for file in (whole, half)]
    for a, b in zip(*layers, strict=True):
        assert torch.equal(a.weight, b.weight), "bits and scales are the same"


def test_a_packed_file_is_exported_like_a_checkpoint(binary_run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    file = tmp_path / "a.safetensors"
    assert export.main([str(binary_run), "--to", "bits", "--out", str(file)]) == 0
    digits = ["--dataset", "digits"]
    assert export.main([str(file), "--to", "onnx", "--out", str(tmp_path / "a.onnx"), *digits]) == 0
    assert capsys.readouterr().out.count("359 of 359") == 2
    assert "name them with --dataset" in sentence(file, "--to", "onnx", "--out", tmp_path / "b.onnx")


def test_transformers_of_a_run(tmp_path, capsys):
    if not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed")
    folder = trained(tmp_path, train_proxconnect, "--arch test_vit --patch-size 2", steps=2)
    assert export.main([str(folder), "--to", "bits"]) == 0
    assert "differ by 0.0e+00" in capsys.readouterr().out
    assert export.main([str(folder), "--to", "onnx"]) == 0
    assert "359 of 359" in capsys.readouterr().out
    said = sentence(folder, "--to", "c")
    assert "blocks.0.norm1 (LayerNorm)" in said and "blocks.1.mlp.act (GELU)" in said
    assert "names no network of models.build" in sentence(folder / "run.safetensors", "--to", "onnx")


@needs_compiler
def test_bench_measures(binary_run, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export_c, "IMAGENET_LAYERS", ((64, 14),))
    results = export.bench(export.read(binary_run), 1)
    assert {(row["cores"], row["batch"]) for row in results["networks"]} >= {(1, 1), (1, 64)}
    for row in results["networks"]:
        assert all(time > 0 for name in ("pytorch", "float32", "int8", "onnx", "ours") for time in row[name])
    assert [64, 14, 14] in [row["input"] for row in results["layers"]]
    assert "PyTorch" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What the check compares.


def write_images(folder, low, high, size=(8, 8), classes="ab"):
    """Six random images of each class and split, with pixels from `low` to `high`."""
    rng = np.random.default_rng(low)
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(low, high, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_other_images_are_normalised_as_in_training(tmp_path, capsys):
    """A network of dark images is checked on bright ones: by its own mean and deviation."""
    pytest.importorskip("onnxruntime")
    write_images(tmp_path / "dark", 0, 90)
    write_images(tmp_path / "bright", 150, 256)
    images = ["--dataset", "folder", "--data-dir", str(tmp_path / "dark"), "--batch-size", "4"]
    folder = trained(tmp_path, train_fsg, " ".join(["--arch resnet8 --grad ste --act sign", *images]))
    for to in ("bits", "onnx"):
        assert export.main([str(folder), "--to", to, "--data-dir", str(tmp_path / "bright")]) == 0
        assert "12 of 12 test images" in capsys.readouterr().out
    assert export.read(folder).normalisation[1] == pytest.approx(
        export.load_test(export.read(folder), "folder", tmp_path / "bright").shift.flatten().tolist()
    )
    write_images(tmp_path / "three", 0, 90, classes="abc")
    assert "3 classes, and the network is for" in sentence(folder, "--to", "bits", "--data-dir", tmp_path / "three")


@needs_compiler
def test_c_of_other_images_which_are_large(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "dark", 0, 90, (120, 110))
    write_images(tmp_path / "bright", 150, 256, (98, 98))
    images = ["--dataset", "folder", "--data-dir", str(tmp_path / "dark"), "--image-size", "98", "--batch-size", "4"]
    folder = trained(tmp_path, train_fsg, " ".join(["--arch resnet8 --grad ste --workers 0", *images]), steps=1)
    assert export.main([str(folder), "--to", "c", "--images", "3", "--data-dir", str(tmp_path / "bright")]) == 0
    assert "3 of 3 test images" in capsys.readouterr().out


def test_a_run_with_another_image_size(tmp_path, capsys):
    folder = trained(tmp_path, train_fsg, "--arch resnet8 --grad ste --image-size 12")
    assert export.main([str(folder), "--to", "bits"]) == 0
    assert "359 of 359 test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "trainer, flags",
    [(train_proxconnect, "--method bnn++"), (train_fsg, "--grad ste --ema 0.9")],
    ids=["relaxed weights", "moving average"],
)
def test_what_is_exported_is_what_was_tested(tmp_path, capsys, trainer, flags):
    """The true signs with their BatchNorm statistics, and the moving average of the weights."""
    argv = [*DIGITS, "--arch", "resnet8", "--out", str(tmp_path), "--name", "run", *flags.split()]
    assert trainer.main([*argv, "--epochs", "2"]) == 0
    rows = csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines())
    accuracy = list(rows)[-1]["test_acc"]
    capsys.readouterr()
    assert export.main([str(tmp_path / "run" / "last.pt"), "--to", "bits"]) == 0
    said = capsys.readouterr().out
    assert float(said.split("test accuracy ")[1].split()[0]) == pytest.approx(100 * float(accuracy), abs=0.006)
    if trainer is train_proxconnect:
        state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
        torch.save(state | {"batch": 3}, tmp_path / "within.pt")  # as --save-every writes it, within an epoch
        assert "export best.pt" in sentence(tmp_path / "within.pt", "--to", "bits")


def test_half_that_changes_predictions_is_refused(tmp_path, monkeypatch):
    folder = trained(tmp_path, train_fsg, "--arch resnet8 --grad ste")
    real = export.check
    monkeypatch.setattr(export, "check", lambda *args: dataclasses.replace(found := real(*args), equal=found.count - 4))
    assert "disagree on 4 of 359 images" in sentence(folder, "--to", "bits", "--half")


# ---------------------------------------------------------------------------------------------------------------------
# --to hub-folder.


def test_hub_folder(binary_run, tmp_path, capsys, monkeypatch):
    assert export.main([str(binary_run), "--to", "hub-folder", "--out", str(tmp_path / "hub")]) == 0
    said = capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "hub").iterdir()) == ["README.md", "model.safetensors"]
    card, file = (tmp_path / "hub" / "README.md").read_text(), tmp_path / "hub" / "model.safetensors"
    assert card.startswith("---\n") and "# resnet8 with binary weights" in card and "dorefa" in card
    accuracy = said.split("test accuracy ")[1].split()[0]
    assert f"| {accuracy} % of 359 images of digits |" in card and f"{file.stat().st_size:,} bytes" in card
    assert f"| SHA-256 | {hashlib.sha256(file.read_bytes()).hexdigest()} |" in card
    # The code in the card computes what the network computes.
    code = card.split("```python\n")[1].split("```")[0]
    pixels = torch.randint(256, (5, 1, 8, 8)).float()
    monkeypatch.chdir(file.parent)
    names = {"pixels": pixels}
    exec(code, names)
    found = export.read(binary_run)
    factor, shift = export.factor_and_shift(found)
    assert torch.allclose(names["logits"], found.net(pixels * factor + shift), atol=1e-4)
    # Written again, it replaces what it wrote; a README of someone else stays.
    assert export.main([str(binary_run), "--to", "hub-folder", "--out", str(tmp_path / "hub")]) == 0
    (tmp_path / "README.md").write_text("mine")
    assert "has another README.md" in sentence(binary_run, "--to", "hub-folder", "--out", tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "model.safetensors").exists()
    assert "cannot be made" in sentence(binary_run, "--to", "hub-folder", "--out", tmp_path / "README.md" / "a")
    monkeypatch.setattr(export, "load_test", no_data)
    assert "needs the test accuracy" in sentence(binary_run, "--to", "hub-folder", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def no_data(*_):
    raise data.DataError("no images")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence that says what to do.


def test_bad_input(binary_run, tmp_path, monkeypatch):
    assert "--to bits" in sentence(binary_run, "--to", "tflite") and "--bench" in sentence(binary_run)
    assert "there is no checkpoint" in sentence(tmp_path / "nothing.pt", "--to", "bits")
    assert "full-precision" in sentence(trained(tmp_path, train_fsg, "--arch resnet8 --quantizer none"), "--to", "c")
    (tmp_path / "fp").mkdir()
    fp = trained(tmp_path / "fp", train_proxconnect, "--arch resnet8 --method fp")
    assert "full-precision" in sentence(fp, "--to", "bits")
    (tmp_path / "empty").mkdir()
    assert "train it first" in sentence(tmp_path / "empty", "--to", "bits")
    shutil.copy(binary_run / "last.pt", tmp_path / "empty")
    assert "continue it (--resume" in sentence(tmp_path / "empty", "--to", "bits")
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
    assert "could not be written" in sentence(binary_run, "--to", "bits", "--out", tmp_path / ("x" * 300))
    assert "name of a file" in sentence(binary_run, "--to", "bits", "--out", "/")

    with monkeypatch.context() as patch:
        patch.setattr(export, "load_test", no_data)
        for kind in ("bits", "c"):
            said = sentence(binary_run, "--to", kind, "--out", tmp_path / f"net.{kind}")
            assert "could not be checked: no images" in said and (tmp_path / f"net.{kind}").exists()
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert "could not be checked" in sentence(binary_run, "--to", "c", "--out", tmp_path / "a.c")
    assert (tmp_path / "a.c").exists() and (tmp_path / "a.h").exists()
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
    export.to_onnx(found.net, tmp_path / "net.onnx", found.example())
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


@pytest.mark.parametrize(
    "name, value",
    [
        (name, value)
        for name in ("normalisation", "shape", "num_classes", "ema", "data_dir")
        for value in (None, [], "", [1, 2], {1: 2}, 0, float("nan"))
        if (name, value) != ("data_dir", "")  # that is a folder
    ],
)
def test_a_checkpoint_with_a_wrong_field_is_refused(tmp_path, name, value):
    path = checkpoint(tmp_path / "last.pt", train_fsg, (1, 8, 8), "--arch", "resnet8", "--grad", "ste")
    contents = torch.load(path, weights_only=True)
    (contents["args"] if name == "data_dir" else contents)[name] = value
    torch.save(contents, path)
    with pytest.raises(runs.RunError, match=r"is damaged .* give another checkpoint"):
        export.read(path)


def test_a_message_that_quotes_a_checkpoint_is_one_printable_line(tmp_path):
    path = checkpoint(tmp_path / "last.pt", train_fsg, (1, 8, 8), "--arch", "resnet8", "--grad", "ste")
    state = torch.load(path, weights_only=True)
    state["model"]["bn1.\x1b[31m\n\x00"] = torch.ones(1)
    torch.save(state, path)
    with pytest.raises(runs.RunError, match="another network") as error:
        export.read(path)
    assert str(error.value).isprintable()


def test_half_keeps_what_float16_cannot_hold(tmp_path):
    path = checkpoint(tmp_path / "last.pt", train_fsg, (1, 8, 8), "--arch", "resnet8", "--grad", "ste")
    state = torch.load(path, weights_only=True)
    state["model"]["bn1.running_var"][0] = 1e6
    torch.save(state, path)
    found = export.read(path)
    export.save_bits(found.net, tmp_path / "net.safetensors", build=found.build, half=True)
    assert export.load_bits(tmp_path / "net.safetensors").bn1.running_var[0] == 1e6


# ---------------------------------------------------------------------------------------------------------------------
# Files that others write at the same time, and files that must not be overwritten.


def test_exporting_a_checkpoint_while_its_run_saves(binary_run, tmp_path, monkeypatch):
    """The run has written half of last.pt when the export of the old one begins and ends."""
    monkeypatch.delenv("CFLAGS")  # the C file is optimised, as users' files are
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
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.c", "last.h", "last.pt", "last.safetensors"]
    assert (tmp_path / "last.c").read_text().startswith("/* resnet8") and export.load_bits(
        tmp_path / "last.safetensors"
    )


def test_two_exports_at_once(tmp_path):
    with runs.replacing(tmp_path / "net.c", "wb") as f:
        f.write(b"first, which ends last")
        export.write(tmp_path / "net.c", b"second")
        export.write(tmp_path / "net.onnx", b"another format")
    assert (tmp_path / "net.c").read_bytes() == b"first, which ends last"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.c", "net.onnx"]


def test_a_missing_folder_is_made(tmp_path):
    export.write(tmp_path / "missing" / "dir" / "net.c", b"made")
    assert (tmp_path / "missing" / "dir" / "net.c").read_bytes() == b"made"
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "net.c", tmp_path / "file" / "dir" / "net.c", tmp_path / ("x" * 255)):
        with pytest.raises(runs.RunError, match=r"could not be written.*: (give another folder|make room)") as error:
            export.write(path, b"")
        assert ".tmp" not in str(error.value) and "Errno" not in str(error.value)


def full_disk(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))


def test_a_c_file_and_its_header_are_written_together(tmp_path, monkeypatch):
    net, image = models.build("resnet8", 10, "bwn-f", "sign", in_channels=1, image_size=8), torch.zeros(1, 1, 8, 8)
    (tmp_path / "net.h").write_text("/* of a user */")
    with pytest.raises(runs.RunError, match=r"net\.h was not written by export\.py"):
        export.to_c(net, tmp_path / "net.c", image)
    (tmp_path / "folder.h").mkdir()
    (tmp_path / "other.c").mkdir()
    for name in ("folder.c", "other.c"):
        with pytest.raises(runs.RunError, match="is a folder"):
            export.to_c(net, tmp_path / name, image)
    for ending, results in (("h", [28]), ("c", [0, 28])):  # the disk is full at the first file, at the second one
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda f, left=results: full_disk(left.pop(0)))
            with pytest.raises(runs.RunError, match=rf"full\.{ending} could not be written \(No space left on device"):
                export.to_c(net, tmp_path / "full.c", image)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.h", "net.h", "other.c"]
    for _ in range(2):  # it replaces its own header
        export.to_c(net, tmp_path / "last.v2", image)
    assert (tmp_path / "last.v2").read_text().startswith((tmp_path / "last.v2.h").read_text())


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
    monkeypatch.setattr(export, "check", lambda *args: dataclasses.replace(found := real(*args), equal=found.equal - 1))
    with pytest.raises(runs.RunError, match="disagree on 1 of 359 images"):
        export.main([str(binary_run), "--to", "bits", "--out", str(tmp_path / "net.safetensors")])


def test_the_file_is_named_after_the_run_or_the_checkpoint(binary_run, monkeypatch):
    monkeypatch.chdir(binary_run)
    assert export.main([".", "--to", "bits"]) == 0 and (binary_run / f"{binary_run.name}.safetensors").exists()
    assert export.main(["last.pt", "--to", "bits"]) == 0 and (binary_run / "last.safetensors").exists()
