"""What the trainers' flags do, where no other test shows it."""

import csv
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
import runs
import train_bihalf
import train_fsg
import train_proxconnect
import train_sibnn

TRAINERS = {t.__name__: t for t in (train_fsg, train_sibnn, train_proxconnect, train_bihalf)}
each_trainer = pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
SMALL = ["--dataset", "digits", "--arch", "resnet8", "--batch-size", "250", "--device", "cpu"]


def completed(trainer, *argv):
    args = trainer.flags().parse_args(argv)
    trainer.complete(args)
    return args


def train(trainer, out, *extra):
    grad = ["--grad", "ste"] if trainer is train_fsg else []
    assert trainer.main([*SMALL, *grad, "--out", str(out), "--name", "run", *extra]) == 0
    with open(out / "run" / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


# ---------------------------------------------------------------------------------------------------------------------
# The generators of train_fsg.py.


def generated(*argv):
    """What a generator makes of six given gradients: G of the last step, for all weights."""
    args = completed(train_fsg, *argv)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(7, 5)]
    for layer in layers:
        layer.quantizer = args.quantizer
    targets = [torch.randn_like(layer.weight) for layer in layers]
    generator = train_fsg.make_generator(args, layers)
    for _ in range(6):
        for layer, target in zip(layers, targets, strict=True):
            layer.weight.grad = (layer.weight.detach() - target) * (1 + torch.sin(10 * target)) / 100
        generator.generate()
        for layer in layers:
            layer.weight.data -= 0.05 * layer.weight.grad
    return torch.cat([layer.weight.grad.flatten() for layer in layers])


@functools.cache
def generated_by_default(*argv):
    return generated(*argv)


TANH, LSTM = ("--fast-act", "tanh"), ("--hgs", "lstm")


@pytest.mark.parametrize(
    "base, flag",
    [
        *(((), flag) for flag in ("--hgs lstm", "--history newest", "--history flat", "--length 3", "--beta 0.2")),
        *(((), flag) for flag in ("--balance none", "--normalize none", "--no-lre", "--hyper-sample 0.5")),
        *(((), flag) for flag in ("--lr-slow 0.1", "--d-state 3", "--d-conv 3", "--expand 3")),
        (("--quantizer", "bwn"), "--fast-act relu"),
        *(((), flag) for flag in ("--grad gate", "--grad ste", "--grad fcgrad", "--grad multifc", "--grad lstmfc")),
        *((TANH, flag) for flag in ("--lr-fast 0.1", "--hidden 5")),
        *((LSTM, flag) for flag in ("--hidden 5", "--length 3", "--no-lre", "--beta 0.2", "--lr-slow 0.1")),
        *((("--grad", "gate"), flag) for flag in ("--memory 0.5", "--epsilon 1")),
        *((("--grad", "multifc"), flag) for flag in ("--lr-fast 0.1", "--fast-act tanh", "--hidden 5")),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else x,
)
def test_a_flag_of_the_generator_changes_the_gradients(base, flag):
    """The scan's backends must make the same gradients: see below."""
    without, with_it = generated_by_default(*base), generated(*base, *flag.split())
    assert with_it.isfinite().all() and (with_it - without).norm() > 1e-6 * without.norm()


def test_the_backend_of_the_scan_does_not_change_the_gradients():
    assert torch.allclose(generated("--scan", "reference"), generated_by_default(), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The network.


@each_trainer
def test_binarize_all_and_act_are_those_of_the_network(trainer):
    def layers(*argv):
        net = trainer.network(completed(trainer, "--arch", "resnet8", *argv), 10, (3, 32, 32))
        return dict(zip(models.binary_layer_names(net), models.binary_layers(net), strict=True))

    some, every = layers(), layers("--binarize-all")
    assert every.keys() - some.keys() == {"conv1", "fc"} and some.keys() < every.keys()
    for act in ("sign", "none"):
        assert {layer.act for layer in layers("--act", act).values()} == {act}


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer.


@pytest.mark.parametrize(
    "trainer, flags, expected",
    [
        (train_fsg, "--schedule none", [1, 1, 1, 1, 1, 1]),
        (train_sibnn, "--schedule step --milestones 1 2", [1, 1, 0.1, 0.1, 0.01, 0.01]),
        (train_bihalf, "--schedule cosine", [1, 0.93301, 0.75, 0.5, 0.25, 0.06699]),  # ½ (1 + cos(πt / 6))
        (train_proxconnect, "--schedule none --warmup 1.5", [0.25, 0.5, 0.75, 1, 1, 1]),
    ],
)
def test_the_learning_rate_of_every_step(tmp_path, monkeypatch, trainer, flags, expected):
    seen = []
    real = runs.Run.count

    def record(self, *args):
        seen.append([group["lr"] for group in self.state["optimizer"].param_groups])
        real(self, *args)

    monkeypatch.setattr(runs.Run, "count", record)
    rows = train(trainer, tmp_path, *flags.split(), "--batch-size", "600", "--epochs", "3", "--lr", "0.001")
    for share, rates in zip(expected, seen, strict=True):
        assert rates == pytest.approx([0.001 * share] * len(rates), rel=1e-4)
    assert float(rows[-1]["lr"]) == pytest.approx(0.001 * expected[-1], rel=1e-4)


def test_weight_decay_and_betas_are_the_optimizers(tmp_path):
    """Without a gradient, AdamW shrinks a weight by the learning rate times the decay; Adam moves it by about lr."""
    shrunk = {}
    for opt in ("adam", "adamw", "sgd"):
        flags = ["--opt", opt, "--lr", "0.01", "--weight-decay", "0.5"]
        args = completed(train_sibnn, *flags, *(["--betas", "0.5", "0.6"] if opt != "sgd" else []))
        runs.complete_betas(args)
        w = torch.nn.Parameter(torch.tensor([2.0]))
        optimizer = runs.make_optimizer([w], args)
        w.grad = torch.zeros(1)
        optimizer.step()
        shrunk[opt] = 2 - w.item()
        assert opt == "sgd" or tuple(optimizer.param_groups[0]["betas"]) == (0.5, 0.6)
    assert shrunk == pytest.approx({"adam": 0.01, "adamw": 0.01 * 0.5 * 2, "sgd": 0.01 * 0.5 * 2}, rel=1e-3)


def test_the_recipes_of_sibnn():
    paper, code = (completed(train_sibnn, "--recipe", name) for name in ("paper", "code"))
    assert (paper.weight_decay, paper.schedule, paper.milestones) == (1e-6, "step", [40, 80])
    assert (code.weight_decay, code.schedule) == (1e-5, "cosine")
    assert completed(train_sibnn, "--recipe", "code", "--schedule", "none").schedule == "none", "a flag goes before it"


# ---------------------------------------------------------------------------------------------------------------------
# Images and machine.


@each_trainer
def test_augmentation_can_be_switched_off(tmp_path, monkeypatch, trainer):
    """Images whose right half is white and whose border is grey: a flip and a shift are both visible."""
    image = Image.new("RGB", (16, 16), (0, 0, 0))
    image.paste((255, 255, 255), (8, 0, 16, 16))
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                image.save(tmp_path / split / name / f"{i}.png")
    seen = []
    real = runs.Run.batches

    def batches(self):
        for images, labels in real(self):
            scale, shift = self.train.scale, self.train.shift
            seen.append(((images - shift) / scale).round())
            yield images, labels

    monkeypatch.setattr(runs.Run, "batches", batches)
    first = {}
    for flags in ((), ("--no-crop",), ("--no-flip",), ("--no-crop", "--no-flip")):
        folder = ["--dataset", "folder", "--data-dir", str(tmp_path), "--batch-size", "16", "--limit-steps", "1"]
        train(trainer, tmp_path / "-".join(("out", *flags)), *folder, *flags)
        first[flags] = seen.pop()[:, 0]
    plain = torch.tensor(bytearray(image.tobytes())).float().view(16, 16, 3)[..., 0]
    is_plain = {flags: [torch.equal(x, plain) for x in images] for flags, images in first.items()}
    assert all(is_plain["--no-crop", "--no-flip"])
    flipped = [torch.equal(x, plain.flip(-1)) for x in first["--no-crop",]]
    assert any(flipped) and all(a != b for a, b in zip(flipped, is_plain["--no-crop",], strict=True))
    assert not all(is_plain["--no-flip",]) and all((x[:, -3:] > 0).sum() >= x[:, :3].sum() for x in first["--no-flip",])


def test_deterministic_sets_torchs_switches():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        for deterministic in (True, False):
            runs.pick_device("cpu", deterministic)
            assert torch.backends.cudnn.deterministic == deterministic
            assert torch.backends.cudnn.benchmark != deterministic
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 != deterministic
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before
        torch.backends.cuda.matmul.allow_tf32 = tf32


LARGE_PAGES = """
import sys
import torch, runs
runs.pick_device("cpu")
middle, inside = torch.ones(2**24).data_ptr() + 2**25, False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first:
        begin, end = (int(x, 16) for x in first.split("-"))
        inside = begin <= middle < end
    elif inside and first == "VmFlags:":
        print("hg" in line.split())
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_large_tensors_ask_for_large_pages_unless_the_user_does_not_want_them():
    """VmFlags of a tensor's memory: hg is the advice to use huge pages."""
    for set_by_user, expected in (({}, "True"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "False")):
        environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | set_by_user
        command = [sys.executable, "-c", LARGE_PAGES]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(runs.__file__).parent)
        assert ran.stdout.split() == [expected], ran.stderr
