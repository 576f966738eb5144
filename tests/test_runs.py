"""runs.py, through the trainers: what is selected, what is tested, what a run keeps, and what its flags do."""

import argparse
import copy
import csv
import functools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import types

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data
import models
import plot
import runs
import train_bihalf
import train_fsg
import train_proxconnect
import train_sibnn

SMALL = ["--dataset", "digits", "--arch", "resnet8", "--batch-size", "64", "--device", "cpu"]
CPU = torch.device("cpu")


def train(out, *extra, name="run", trainer=train_fsg):
    grad = ["--grad", "ste"] if trainer is train_fsg and "--grad" not in extra else []
    assert trainer.main([*SMALL, *grad, "--out", str(out), "--name", name, *extra]) == 0
    with open(out / name / "metrics.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def network(file):
    net = models.build("resnet8", 10, in_channels=1)
    net.load_state_dict(torch.load(file, weights_only=True)["model"])
    return net


# ---------------------------------------------------------------------------------------------------------------------
# What is selected and what is tested.


def test_the_validation_images_select_the_best_network(tmp_path, monkeypatch, capsys):
    # The accuracies that evaluate() returns: validation, test, for each epoch.
    scripted = iter([0.5, 0.9, 0.7, 0.1, 0.7, 0.8, 0.6, 0.95])
    monkeypatch.setattr(runs, "evaluate", lambda *args: {"loss": 1.0, "acc": next(scripted)})
    rows = train(tmp_path, "--epochs", "4", "--val", "100")
    assert [(row["val_acc"], row["test_acc"]) for row in rows] == [(0.5, 0.9), (0.7, 0.1), (0.7, 0.8), (0.6, 0.95)]
    steps = len(data.load("digits", batch_size=64, val=100)[0])
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"] == 2 * steps, "the first of two"
    assert "Test accuracy 10.00 % in epoch 2, best by validation accuracy (70.00 %)" in capsys.readouterr().out


def test_without_validation_images_best_is_the_last(tmp_path, monkeypatch, capsys):
    scripted = iter([0.9, 0.3, 0.2])
    monkeypatch.setattr(runs, "evaluate", lambda *args: {"loss": 1.0, "acc": next(scripted)})
    train(tmp_path, "--epochs", "3", "--limit-steps", "50")  # the third epoch is not complete
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"] == 50
    assert "Test accuracy 20.00 % in epoch 3, the last (--val would choose" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", [train_fsg, train_sibnn, train_bihalf])
def test_batchnorm_is_estimated_again_beside_the_running_statistics(tmp_path, trainer):
    plain = train(tmp_path, "--epochs", "2", name="plain", trainer=trainer)
    rows = train(tmp_path, "--epochs", "2", "--bn-batches", "5", trainer=trainer)
    for row, without in zip(rows, plain, strict=True):
        assert {k: v for k, v in row.items() if k in without and k not in ("seconds", "images_per_s")}.items() >= {
            k: v for k, v in without.items() if k not in ("seconds", "images_per_s") and not k.startswith("zeros")
        }.items(), "it changes nothing else"
    if trainer is train_fsg:
        net = network(tmp_path / "run" / "best.pt")
        loaded, _, test = data.load("digits", batch_size=64)
        with runs.reestimate_batchnorm(net, loaded, CPU, False, 5):
            assert rows[-1]["test_acc_bn"] == pytest.approx(runs.evaluate(net, test, CPU, False)["acc"], abs=1e-5)
        assert rows[-1]["test_acc"] == pytest.approx(runs.evaluate(net, test, CPU, False)["acc"], abs=1e-5)


def test_nothing_of_the_training_sees_the_held_out_images(tmp_path, monkeypatch):
    """Training steps, normalisation and BatchNorm's statistics are the same whatever the held-out images contain."""
    (images, labels), test, classes = data.digits()

    def digits(noise):
        _, val, _ = data.load("digits", val=200, batch_size=64)
        other = images.clone()
        for held_out in val.images:
            other[(images == held_out).flatten(1).all(1)] = noise
        return lambda: ((other, labels), (torch.full_like(test[0], noise), test[1]), classes)

    twins = []
    for noise in (0, 200):
        with monkeypatch.context() as patch:
            patch.setattr(data, "digits", digits(noise))
            train(tmp_path, "--epochs", "1", "--val", "200", "--bn-batches", "4", name=str(noise))
            twins.append(torch.load(tmp_path / str(noise) / "last.pt", weights_only=True))
    same = lambda key: all(torch.equal(twins[0][key][k], twins[1][key][k]) for k in twins[0][key])
    assert same("model") and twins[0]["normalisation"] == twins[1]["normalisation"]
    assert twins[0]["rows"][0]["val_loss"] != twins[1]["rows"][0]["val_loss"], "they were other images"


def test_top5_where_there_are_many_classes():
    logits = torch.randn(200, 60)
    labels = torch.randint(60, (200,))
    batches = types.SimpleNamespace(
        num_classes=60, size=200, epoch=lambda: [(logits[:120], labels[:120]), (logits[120:], labels[120:])]
    )
    found = runs.evaluate(torch.nn.Identity(), batches, CPU, False)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found["acc"] == (rank == 0).double().mean() and found["top5"] == (rank < 5).double().mean()
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The data of a run.


def folder(root, classes=("ant", "bee"), count=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(40 + 150 * label, 60 + 150 * label, (8, 8, 3), generator=rng, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def trained(tmp_path):
    root = folder(tmp_path / "images")
    flags = ["--dataset", "folder", "--data-dir", str(root), "--batch-size", "8", "--grad", "ste"]
    train(tmp_path, *flags, "--epochs", "2", "--lr", "1e-2")
    return tmp_path


def test_renamed_classes_are_refused(trained):
    for split in ("train", "test"):
        (trained / "images" / split / "ant").rename(trained / "images" / split / "cat")
    for flags in (
        ["--resume", str(trained / "run"), "--epochs", "3"],
        ["--resume", str(trained / "run"), "--eval-only"],
    ):
        with pytest.raises(runs.RunError, match=r"trained on other classes .* knows 'ant'"):
            train_fsg.main(flags)
    best = ["--pretrained", str(trained / "run" / "best.pt"), "--arch", "resnet8"]
    data_flags = ["--dataset", "folder", "--data-dir", str(trained / "images"), "--grad", "ste", "--batch-size", "8"]
    with pytest.raises(runs.RunError, match="trained on other classes"):
        train_fsg.main([*best, *data_flags, "--eval-only"])
    # Fine-tuning may have other classes.
    assert train_fsg.main([*best, *data_flags, "--epochs", "1", "--out", str(trained), "--name", "fine"]) == 0


def test_a_network_is_tested_with_its_own_normalisation(trained, capsys):
    (trained / "run" / "metrics.csv").read_text()
    before = torch.load(trained / "run" / "best.pt", weights_only=True)["normalisation"]
    other = folder(trained / "other", count=7, seed=5)
    for file in (other / "train" / "ant").glob("*.png"):  # other training images: another mean
        Image.new("RGB", (8, 8), (255, 255, 255)).save(file)
    seen = []

    class Spy(data.ResidentBatches):
        def epoch(self, *args):
            seen.append((self.scale.flatten().tolist(), self.shift.flatten().tolist()))
            return super().epoch(*args)

    data_class, data.ResidentBatches = data.ResidentBatches, Spy
    try:
        capsys.readouterr()
        assert (
            train_fsg.main(["--eval-only", "--resume", str(trained / "run" / "best.pt"), "--data-dir", str(other)]) == 0
        )
    finally:
        data.ResidentBatches = data_class
    assert seen == [tuple(before)]
    out = capsys.readouterr().out
    assert f"{other} has 14 training images" in out and "trained with 24" in out and "test accuracy" in out


def test_a_run_keeps_the_size_of_its_images(trained, capsys):
    """Also with a folder of larger images, where the default of --image-size is another."""
    larger = folder(trained / "larger")
    for file in larger.rglob("*.png"):
        Image.open(file).resize((16, 16)).save(file)
    flags = ["--data-dir", str(larger)]
    seen, real = [], runs.match_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "match_data", lambda *given: (seen.append(given[2].shape), real(*given)))
        assert train_fsg.main(["--eval-only", "--resume", str(trained / "run" / "best.pt"), *flags]) == 0
        assert train_fsg.main(["--resume", str(trained / "run"), "--epochs", "3", *flags]) == 0
    assert seen == [(3, 8, 8)] * 2
    arch = ["--dataset", "folder", "--arch", "resnet8", "--grad", "ste", "--pretrained", str(trained / "run")]
    with pytest.raises(runs.RunError, match=r"images of 3×8×8 .* have 3×16×16: add --image-size 8"):
        train_fsg.main([*arch, *flags, "--eval-only"])
    assert train_fsg.main([*arch, *flags, "--eval-only", "--image-size", "8"]) == 0


@pytest.mark.parametrize("how", ["added", "renamed"])
def test_a_run_with_validation_images_does_not_continue_with_other_images(trained, how, capsys):
    argv = ["--dataset", "folder", "--data-dir", str(trained / "images"), "--arch", "resnet8", "--grad", "ste"]
    argv += ["--batch-size", "6", "--val", "8", "--out", str(trained), "--name", "val"]
    assert train_fsg.main([*argv, "--epochs", "1"]) == 0
    (trained / "images").rename(trained / "moved")
    moved = ["--data-dir", str(trained / "moved"), "--resume", str(trained / "val")]
    assert train_fsg.main([*moved, "--epochs", "2"]) == 0
    source = trained / "moved" / "train" / "ant" / "0.png"
    source.with_stem("new").write_bytes(source.read_bytes())
    if how == "renamed":
        source.unlink()
    with pytest.raises(runs.RunError, match=r"would hold out images that the network has seen: .*--pretrained"):
        train_fsg.main([*moved, "--epochs", "3"])
    capsys.readouterr()
    assert train_fsg.main([*moved, "--eval-only"]) == 0
    assert capsys.readouterr().out.count("so other images are held out") == 1


def test_names_that_are_not_utf8(trained):
    """Of files: they are ignored, or used as images. Of the run: one sentence."""
    (trained / "images" / "train" / "ant" / os.fsdecode(b"caf\xe9.txt")).write_text("no image")
    source = trained / "images" / "train" / "ant" / "0.png"
    source.rename(source.with_stem(os.fsdecode(b"z\xe9")))
    argv = ["--dataset", "folder", "--data-dir", str(trained / "images"), "--arch", "resnet8", "--grad", "ste"]
    argv += ["--batch-size", "6", "--epochs", "1", "--val", "8"]
    assert train_fsg.main([*argv, "--out", str(trained), "--name", "new"]) == 0
    assert r"caf\udce9.txt" in (trained / "new" / "log.txt").read_text()
    bad = os.fsdecode(b"caf\xe9")
    for flags in (["--out", str(trained / bad)], ["--out", str(trained), "--name", bad]):
        with pytest.raises(runs.RunError, match="must be valid UTF-8"):
            train_fsg.main([*argv, *flags])


def test_tiny_images_become_images_of_8_pixels(trained):
    for file in (trained / "images").rglob("*.png"):
        Image.open(file).resize((6, 6)).save(file)
    argv = ["--dataset", "folder", "--data-dir", str(trained / "images"), "--arch", "resnet8", "--grad", "ste"]
    assert train_fsg.main([*argv, "--batch-size", "6", "--epochs", "1", "--out", str(trained), "--name", "tiny"]) == 0
    assert train_fsg.main(["--resume", str(trained / "tiny"), "--epochs", "2"]) == 0


def test_a_finished_run_says_which_flag_lets_it_go_on(tmp_path):
    train(tmp_path, "--epochs", "2", "--limit-steps", "3")
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(runs.RunError, match="give a larger --limit-steps"):
        train_fsg.main([*resume, "--epochs", "5"])
    assert train_fsg.main([*resume, "--limit-steps", "100"]) == 0
    with pytest.raises(runs.RunError, match="give more --epochs"):
        train_fsg.main(resume)


def test_another_number_of_threads_is_said(tmp_path, capsys):
    train(tmp_path, "--epochs", "1")
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    checkpoint["threads"] += 3
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    assert train_fsg.main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert "does not continue bit for bit" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Flags of the training step.


def test_label_smoothing_is_that_of_the_loss(tmp_path, monkeypatch):
    seen = []
    loss = F.cross_entropy
    record = lambda *args, label_smoothing=0.0, **kw: (
        seen.append(label_smoothing) or loss(*args, label_smoothing=label_smoothing, **kw)
    )
    for trainer in (train_fsg, train_sibnn, train_proxconnect, train_bihalf):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(F, "cross_entropy", record)
            train(tmp_path, "--limit-steps", "2", "--label-smoothing", "0.25", name=trainer.__name__, trainer=trainer)
        assert seen[:2] == [0.25, 0.25] and set(seen[2:]) == {0.0}, "the test loss is not smoothed"


@pytest.mark.parametrize("trainer", [train_fsg, train_sibnn, train_proxconnect, train_bihalf])
def test_clipping_bounds_the_step(tmp_path, trainer):
    """With SGD, one step moves the weights by the learning rate times the norm of the clipped gradients."""
    flags = ["--opt", "sgd", "--lr", "0.5", "--schedule", "none", "--weight-decay", "0", "--clip", "0.01"]
    if trainer is train_proxconnect:  # the schedule of bnn++ depends on the number of steps
        flags += ["--method", "bc"]
    for steps in (1, 2):
        train(tmp_path, *flags, "--limit-steps", str(steps), name=str(steps), trainer=trainer)
    one, two = (torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in "12")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    moved = sum((two[k] - one[k]).double().square().sum() for k in one if not k.endswith(statistics)).sqrt()
    assert moved.item() == pytest.approx(0.5 * 0.01, rel=0.02)


def test_ema_is_the_average_of_the_weights_and_is_what_is_tested(tmp_path, capsys):
    flags = ["--schedule", "none", "--ema", "0.5"]
    average = None
    for steps in range(1, 5):
        train(tmp_path, *flags, "--limit-steps", str(steps), name=str(steps))
        last = torch.load(tmp_path / str(steps) / "last.pt", weights_only=True)["model"]["fc.weight"]
        average = last if average is None else 0.5 * average + 0.5 * last
    best = tmp_path / "4" / "best.pt"
    assert torch.allclose(torch.load(best, weights_only=True)["model"]["fc.weight"], average, atol=1e-6)
    rows = train(tmp_path, *flags, "--epochs", "2", name="whole")
    images, _, test = data.load("digits", batch_size=64)
    net = network(tmp_path / "whole" / "best.pt")
    tested = runs.evaluate(net, test, CPU, False)
    assert tested["loss"] == pytest.approx(rows[-1]["test_loss"], rel=1e-4)
    with runs.reestimate_batchnorm(net, images, CPU, False):
        assert runs.evaluate(net, test, CPU, False) == pytest.approx(tested, rel=1e-4), "its own BatchNorm statistics"
    # A resumed run is the same run.
    train(tmp_path, *flags, "--epochs", "2", "--limit-steps", "30", name="parts")
    assert train_fsg.main(["--resume", str(tmp_path / "parts"), "--limit-steps", "44"]) == 0
    whole, parts = (torch.load(tmp_path / n / "best.pt", weights_only=True)["model"] for n in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    # The folder and last.pt stand for the average too.
    for file in ("whole", "whole/last.pt"):
        for flags in (["--resume", str(tmp_path / file)], [*SMALL, "--pretrained", str(tmp_path / file)]):
            capsys.readouterr()
            assert train_fsg.main([*flags, "--eval-only"]) == 0
            assert f"test accuracy {100 * tested['acc']:.2f} %" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flag, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_amp_is_the_number_format_of_the_network_in_training_and_tests(tmp_path, flag, dtype):
    seen = {True: set(), False: set()}
    hook = lambda m, _, out: seen[m.training].add(out.dtype) if isinstance(m, torch.nn.Conv2d) else None
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        train(tmp_path, "--amp", flag, "--limit-steps", "1", "--batch-size", "8")
    finally:
        handle.remove()
    assert seen == {True: {dtype}, False: {dtype}}
    assert json.loads((tmp_path / "run" / "args.json").read_text())["amp"] == flag


def test_amp_takes_bfloat16_where_the_device_has_it(tmp_path, monkeypatch):
    train(tmp_path, "--amp", "--limit-steps", "1", "--batch-size", "8")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["amp"] == "bf16"
    again = ["--resume", str(tmp_path / "run"), "--limit-steps", "2", "--amp"]
    with pytest.raises(runs.RunError, match="--amp cannot change within a run"):
        train_fsg.main([*again, "fp16"])
    assert train_fsg.main(again) == 0
    train(tmp_path, "--limit-steps", "1", name="float32")
    with pytest.raises(runs.RunError, match="--amp cannot change within a run"):
        train_fsg.main(["--resume", str(tmp_path / "float32"), "--limit-steps", "2", "--amp"])
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert runs.pick_amp("auto", torch.device("cuda")) == ("bf16" if has else "fp16")
        assert [runs.pick_amp(amp, torch.device("cuda")) for amp in ("bf16", "fp16", None)] == ["bf16", "fp16", None]


FLOAT16 = ["--amp", "fp16", "--batch-size", "8", "--val", "1000"]  # float16 is slow on a CPU


@pytest.mark.parametrize(
    "trainer, extra",
    [
        (train_fsg, ["--grad", "fsg", "--expand", "2", "--d-state", "2", "--ema", "0.9", "--opt", "sgdm"]),
        (train_fsg, ["--grad", "gate"]),
        (train_fsg, ["--grad", "multifc", "--preset", "released"]),
        (train_sibnn, []),
        (train_proxconnect, ["--method", "bc"]),
        (train_bihalf, []),
    ],
    ids=lambda x: x.__name__ if hasattr(x, "__name__") else "-".join(x[1:2]),
)
def test_an_overflow_in_float16_skips_the_step_and_leaves_no_trace(tmp_path, monkeypatch, trainer, extra):
    states, begin, scale = [], runs.Run.set_learning_rate, torch.amp.GradScaler.scale

    def record(self, *args):  # at the beginning of each step
        states.append(copy.deepcopy({name: part.state_dict() for name, part in self.state.items()}))
        return begin(self, *args)

    def overflow(self, loss):
        return scale(self, loss) * (math.inf if len(states) == 4 else 1)

    monkeypatch.setattr(runs.Run, "set_learning_rate", record)
    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflow)
    train(tmp_path, *FLOAT16, "--limit-steps", "6", "--accumulate", "2", "--clip", "1", *extra, trainer=trainer)

    def trained(state):
        """What a step changes, by name, without what a skipped one may change."""
        tensors = {f"model.{k}": v for k, v in state["model"].items() if "running" not in k and "num_b" not in k}
        tensors |= {
            f"optimizer.{i}.{k}": torch.as_tensor(v)
            for i, s in state["optimizer"]["state"].items()
            for k, v in s.items()
            if v is not None
        }
        generator = dict(state.get("generator", {}))
        phi = generator.pop("_extra_state", {}).get("optimizer", {"state": {}})
        tensors |= {f"phi.{i}.{k}": torch.as_tensor(v) for i, s in phi["state"].items() for k, v in s.items()}
        return tensors | {f"generator.{k}": v for k, v in generator.items()}

    before, after, later = map(trained, states[3:])
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert any(not torch.equal(after[k], later[k]) for k in after if k.startswith("model."))
    if "fsg" in extra or "gate" in extra:
        history = "generator.history" if "fsg" in extra else "generator.past"
        assert not torch.equal(after[history], later[history])
    scales = [state["scaler"]["scale"] for state in states]
    assert scales[4] == scales[3] / 2 == scales[5]


def test_a_run_in_float16_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    """With a scale that overflows in the first steps, and later grows every second step."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**36, growth_interval=2, backoff_factor=2.0**-12)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    flags = [*FLOAT16, "--grad", "gate", "--ema", "0.5", "--schedule", "none"]
    train(tmp_path, *flags, "--limit-steps", "7", name="whole")
    train(tmp_path, *flags, "--limit-steps", "4", name="parts")
    assert train_fsg.main(["--resume", str(tmp_path / "parts"), "--limit-steps", "7"]) == 0
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["scaler"] == parts["scaler"] and math.log2(whole["scaler"]["scale"]) % 12 > 0, (
        "it has fallen and grown"
    )
    for part in ("model", "ema", "generator"):
        tensors = {k: v for k, v in whole[part].items() if isinstance(v, torch.Tensor)}
        assert all(torch.equal(v, parts[part][k]) for k, v in tensors.items())


def test_gradients_that_no_scale_helps_end_the_run_with_a_sentence(tmp_path, monkeypatch):
    scale = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: scale(self, loss) * math.nan)
    monkeypatch.setattr(runs.FiniteCheck, "SMALLEST_SCALE", 2.0**15)
    with pytest.raises(runs.RunError, match=r"gradients in float16.* NaN or infinite by step [23].* --amp bf16"):
        train(tmp_path, *FLOAT16, "--limit-steps", "3")


# ---------------------------------------------------------------------------------------------------------------------
# The run folder and the trackers.


def test_the_folder_says_what_the_run_depended_on_and_printed(tmp_path, capsys):
    train(tmp_path, "--epochs", "1")
    environment = json.loads((tmp_path / "run" / "args.json").read_text())["environment"]
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    assert environment["world_size"] == 1 and environment["command"]
    assert environment["commit"] is None or len(environment["commit"]) == 40
    assert (tmp_path / "run" / "log.txt").read_text() == capsys.readouterr().out
    assert train_fsg.main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.endswith(capsys.readouterr().out) and log.count("parameters") == 2


def test_an_error_is_in_the_log(tmp_path):
    with pytest.raises(runs.RunError, match="NaN or infinite"):
        train(tmp_path, "--opt", "sgd", "--lr", "1e30")
    assert "error: the loss" in (tmp_path / "run" / "log.txt").read_text().splitlines()[-1].replace(
        "latent", "the loss"
    )


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train(tmp_path, "--epochs", "2", "--tensorboard")
    assert train_fsg.main(["--resume", str(tmp_path / "run"), "--epochs", "3"]) == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("accuracy/test_acc")]
    assert [step for step, _ in found] == [22, 44, 66]
    assert [v for _, v in found[:2]] == pytest.approx([row["test_acc"] for row in rows], rel=1e-4)
    assert set(events.Tags()["scalars"]) == {
        *("accuracy/train_acc", "accuracy/test_acc", "loss/train_loss", "loss/test_loss"),
        *("weights/flip_ratio", "weights/plus_ratio"),
        *("progress/epoch", "progress/lr", "progress/seconds", "progress/images_per_s"),
        *("gradient/cosine", "gradient/step"),
    }
    last = runs.load(tmp_path / "run" / "last.pt")["rows"][-1]
    shares = [value for column, value in last.items() if column.startswith("plus/")]
    histogram = events.Histograms("layers/plus")[-1].histogram_value
    assert (histogram.num, histogram.min) == (len(shares), pytest.approx(min(shares), rel=1e-4))
    assert sum(count > 0 for count in histogram.bucket) > 2, "the layers are told apart"
    assert "layers/flips" in events.Tags()["histograms"]


def test_wandb_gets_every_row(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda row, step: calls.append((row, step)), finish=lambda: calls.append("finish"))
    fake.init = lambda **options: calls.append(options) or run
    fake.Histogram = sorted
    monkeypatch.setitem(sys.modules, "wandb", fake)
    rows = train(tmp_path, "--epochs", "2", "--wandb", "bits")
    assert calls[0]["project"] == "bits" and calls[0]["config"]["grad"] == "ste" and calls[-1] == "finish"
    assert [step for _, step in calls[1:-1]] == [22, 44]
    for (sent, _), row in zip(calls[1:-1], rows, strict=True):
        assert {name: sent[name] for name in row} == pytest.approx(row, rel=1e-4)
        flips = [value for name, value in row.items() if name.startswith("flips/")]
        assert sent["layers/flips"] == pytest.approx(sorted(flips), rel=1e-4) and "layers/plus" in sent


@pytest.mark.parametrize("flag, module", [(["--tensorboard"], "torch.utils.tensorboard"), (["--wandb", "x"], "wandb")])
def test_trackers_that_are_missing(tmp_path, monkeypatch, flag, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(runs.RunError, match=r"needs its package.*: pip install (tensorboard|wandb)"):
        train(tmp_path, *flag)


# ---------------------------------------------------------------------------------------------------------------------
# The machine.


def test_main_works_in_a_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path, "--epochs", "1")))
    thread.start()
    thread.join(120)
    assert len(results) == 1 and len(results[0]) == 1


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_the_signals_of_clusters_and_terminals_save_the_run(tmp_path, monkeypatch, name, capsys):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    which = getattr(signal, name)
    count, calls = runs.Run.count, []

    def interrupt(self, *args):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), which)
        count(self, *args)

    monkeypatch.setattr(runs.Run, "count", interrupt)
    out = tmp_path / "a folder"
    before = signal.signal(which, signal.SIG_DFL)  # under nohup, SIGHUP is ignored
    try:
        code = train_fsg.main([*SMALL, "--grad", "ste", "--out", str(out), "--name", "run"])
    finally:
        signal.signal(which, before)
    assert code == 128 + which and torch.load(out / "run" / "last.pt", weights_only=True)["step"] == 5
    assert f"--resume '{out / 'run'}'" in capsys.readouterr().out, "the path is quoted"


def test_an_ignored_signal_stays_ignored():
    """As SIGHUP under nohup."""
    for which in (signal.SIGHUP, signal.SIGINT):
        before = signal.signal(which, signal.SIG_IGN)
        try:
            with runs.Interrupt() as interrupt:
                os.kill(os.getpid(), which)
                assert not interrupt
            assert signal.getsignal(which) == signal.SIG_IGN
        finally:
            signal.signal(which, before)


def test_a_resumed_run_stays_in_its_folder(tmp_path):
    train(tmp_path, "--limit-steps", "1", "--batch-size", "8")
    again = ["--resume", str(tmp_path / "run"), "--limit-steps", "2"]
    for flags in (["--name", "other"], ["--out", str(tmp_path / "other")]):
        with pytest.raises(runs.RunError, match="stays in its folder"):
            train_fsg.main([*again, *flags])
    assert train_fsg.main([*again, "--name", "run", "--out", str(tmp_path)]) == 0


def test_images_that_the_pretrained_network_has_seen_are_no_validation(tmp_path, capsys):
    train(tmp_path, "--val", "100", "--limit-steps", "1", "--batch-size", "8", name="start")
    seen = [["--val", "100", "--seed", "1"], ["--val", "99"], ["--val", "98", "--data-dir", "elsewhere"]]
    for flags, is_said in ((["--val", "100"], False), *((flags, True) for flags in seen)):
        capsys.readouterr()
        more = ["--limit-steps", "1", "--batch-size", "8", "--pretrained", str(tmp_path / "start")]
        train(tmp_path, *flags, *more, name="".join(flags).replace("--", ""))
        assert ("the validation accuracy is too high" in " ".join(capsys.readouterr().out.split())) == is_said


def test_a_folder_is_the_same_however_it_is_written(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    for i, data_dir in enumerate((str(trained / "images"), "images", "./images/")):
        argv = ["--dataset", "folder", "--data-dir", data_dir, "--arch", "resnet8", "--grad", "ste", "--val", "8"]
        argv += ["--batch-size", "6", "--epochs", "1", "--limit-steps", "1", "--pretrained", "run", "--name", f"new{i}"]
        capsys.readouterr()
        assert train_fsg.main([*argv, "--out", "."]) == 0
        assert "the validation accuracy is too high" in " ".join(capsys.readouterr().out.split()), data_dir


@pytest.mark.parametrize(
    "before, now, is_said",
    [
        ({"dataset": "cifar10", "data_dir": "a"}, {"dataset": "cifar10", "data_dir": "b", "val": 9}, True),
        ({"dataset": "imagenet", "data_dir": "a"}, {"dataset": "folder", "data_dir": "a", "val": 9}, True),
        ({"dataset": "folder", "data_dir": "a"}, {"dataset": "folder", "data_dir": "b", "val": 9}, False),
        ({"dataset": "cifar10", "data_dir": "a"}, {"dataset": "cifar100", "data_dir": "a", "val": 9}, False),
        ({"dataset": "cifar10", "data_dir": "a"}, {"dataset": "cifar10", "data_dir": "a", "val": 0}, False),
    ],
)
def test_which_images_the_pretrained_network_has_seen(tmp_path, before, now, is_said, capsys):
    net = torch.nn.Linear(1, 1)
    torch.save({"args": {"val": 0, "seed": 0, **before}, "model": net.state_dict()}, tmp_path / "best.pt")
    args = argparse.Namespace(pretrained=str(tmp_path / "best.pt"), resume=None, eval_only=False, arch="x", seed=0)
    vars(args).update(now)
    runs.load_weights(net, args, None)
    assert ("the validation accuracy is too high" in " ".join(capsys.readouterr().out.split())) == is_said


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_out_of_memory_is_one_sentence(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as e:
        runs.command(main)
    assert str(e.value).startswith("error: out of memory") and "--batch-size" in str(e.value)


@pytest.mark.parametrize(
    "part, value",
    [
        ("args", [1]),
        ("args", {3: 1}),
        ("classes", 3),
        ("normalisation", None),
        ("images", 3),
        ("model", None),
        ("rows", ""),
        ("shape", 8),
    ],
)
def test_a_checkpoint_with_parts_of_another_type_is_damaged(tmp_path, part, value):
    whole = {"args": {}, "model": {}, "images": {}, "classes": [], "normalisation": [[], []], "rows": []}
    torch.save(whole, tmp_path / "whole.pt")
    torch.save(whole | {part: value}, tmp_path / "damaged.pt")
    assert runs.load(tmp_path / "whole.pt") == whole
    with pytest.raises(runs.RunError, match=f"is damaged .its part {part}"):
        runs.load(tmp_path / "damaged.pt")


def test_a_name_that_is_too_long():
    with pytest.raises(SystemExit, match=r"^error: a name is too long .*: use a shorter one$"):
        runs.command(lambda: os.stat("x" * 300))


def test_a_warmup_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(runs.RunError, match="--warmup 2 must be less than --epochs, which is 2"):
        train(tmp_path, "--epochs", "2", "--warmup", "2")


@pytest.mark.parametrize("size, rank", [("x", "0"), ("2", None), ("2", "9"), ("2", "x")])
def test_processes_that_cannot_start(monkeypatch, size, rank):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(runs.RunError, match="start them with torchrun"):
        runs.start_processes(CPU)


@pytest.mark.parametrize("seconds", [0.01, 10])
def test_a_process_says_what_it_waits_for(monkeypatch, capsys, seconds):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "PATIENCE", seconds)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: time.sleep(0.5))
    runs.start_processes(CPU)
    assert capsys.readouterr().out == "process 0 waits for 2 processes at here:1\n" * (seconds < 1)


def test_a_command_names_torchrun(monkeypatch):
    assert runs.command_line("train_fsg.py", "--resume", "runs/a b") == "python train_fsg.py --resume 'runs/a b'"
    monkeypatch.setattr(runs, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert runs.command_line("train_fsg.py").startswith("torchrun --nproc_per_node=2 train_fsg.py")


def test_the_plots_read_what_runs_write(tmp_path):
    train(tmp_path, "--epochs", "2", "--val", "100", "--bn-batches", "2")
    assert plot.main([str(tmp_path / "run"), "--out", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").exists()
    shutil.rmtree(tmp_path / "run")
