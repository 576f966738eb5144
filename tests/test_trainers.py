"""The trainers as users meet them: runs, resuming, interruption, bad input. Small networks on real digits."""

import argparse
import csv
import functools
import itertools
import json
import math
import os
import re
import signal
import statistics
import time
from fractions import Fraction

import pytest
import torch
from PIL import Image
from programs import Program
from torch.utils._pytree import tree_map

import data
import fsg_released
import gate
import hypernet
import models
import plot
import runs
import train_bihalf
import train_fsg
import train_proxconnect
import train_sibnn

SMALL = ["--dataset", "digits", "--arch", "resnet8", "--batch-size", "64", "--device", "cpu"]
TINY_NETS = ["--expand", "2", "--d-state", "2", "--hidden", "3"]  # FSG with Mamba
GRADS = {
    "ste": ["--grad", "ste"],
    "fcgrad": ["--grad", "fcgrad"],
    "multifc": ["--grad", "multifc"],
    "lstmfc": ["--grad", "lstmfc"],
    "gate": ["--grad", "gate"],
    "gate-newest": ["--grad", "gate", "--memory", "0"],
    "fsg-mamba": ["--grad", "fsg", "--hgs", "mamba"],
    "fsg-mamba-unbalanced": ["--balance", "none"],
    "fsg-lstm": ["--grad", "fsg", "--hgs", "lstm"],
}
TRAINERS = {t.__name__: t for t in (train_fsg, train_sibnn, train_proxconnect, train_bihalf)}
METHODS = [(train_proxconnect, ["--method", method]) for method in train_proxconnect.METHODS]
SIBLINGS = [
    *[(train_sibnn, ["--arch", "birealnet8"]), (train_sibnn, ["--arch", "lenet", "--act", "sign"])],
    *METHODS,
    *[(train_bihalf, ["--arch", "birealnet8-prelu"]), (train_bihalf, ["--prune", "0.4"])],
    *[(train_bihalf, ["--ratio", "0.3"]), (train_bihalf, ["--quantizer", "sign", "--arch", "conv4", "--lr", "0.1"])],
]
each_trainer = pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)


def name_of(value):
    return value.__name__ if hasattr(value, "__name__") else " ".join(value)


def small(trainer, flags=()):
    """SMALL, with those of TINY_NETS that the method has."""
    value = dict(itertools.pairwise(flags))
    if trainer is not train_fsg or value.get("--quantizer") == "none" or {"gate", "ste"} & set(flags):
        return SMALL
    if value.get("--grad", "fsg") != "fsg" or value.get("--hgs") == "lstm":
        return [*SMALL, "--hidden", "3"]
    return SMALL + TINY_NETS


def train(out, name, *extra, trainer=train_fsg):
    """One run in this process; its metrics, a dictionary an epoch."""
    code = trainer.main([*small(trainer, extra), "--out", str(out), "--name", name, *extra])
    assert code == 0
    return metrics(out / name)


def metrics(folder):
    with open(folder / "metrics.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def test_fsg_learns_digits_and_leaves_a_whole_run_folder(tmp_path, capsys):
    rows = train(tmp_path, "run", "--epochs", "6", "--schedule", "cosine", "--lr", "3e-3")
    assert rows[-1]["test_acc"] > 0.85 and rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    measured = [f"gradient/{name}" for name in ("cosine", "step", "fast_rms", "slow_rms", "slow_share")]
    net = models.build("resnet8", 10, in_channels=1)
    layers = [f"{kind}/{name}" for kind in ("flips", "plus") for name in models.binary_layer_names(net)]
    assert list(rows[0]) == [*runs.METRICS, *measured, *layers]
    assert [r["epoch"] for r in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["step"] == 6 * 22
    for r in rows:
        assert 0 < r["flip_ratio"] < 0.5 and 0.3 < r["plus_ratio"] < 0.7 and r["seconds"] > 0
        assert math.isclose(r["images_per_s"], 22 * 64 / r["seconds"], rel_tol=1e-3)
    assert rows[0]["lr"] > rows[-1]["lr"] > 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["schedule"] == "cosine"
    out = capsys.readouterr().out
    assert "slow-net: mamba, " in out and "best" in out and "--eval-only" in out

    best = rows[-1]["test_acc"]  # without --val, best.pt is the last network
    argv = [*SMALL, "--eval-only", "--pretrained", str(tmp_path / "run" / "best.pt")]
    assert train_fsg.main(argv) == 0
    shown = float(re.search(r"test accuracy ([\d.]+) %", capsys.readouterr().out)[1])
    assert math.isclose(shown, 100 * best, abs_tol=0.01)
    assert train_fsg.main(["--eval-only", "--resume", str(tmp_path / "run" / "best.pt")]) == 0
    assert f"{shown:.2f} %" in capsys.readouterr().out, "with --resume the run's own flags are used"


def test_flip_and_plus_ratio_are_those_of_the_weights(tmp_path):
    train(tmp_path, "a", "--epochs", "1", "--seed", "3")
    train(tmp_path, "b", "--epochs", "2", "--seed", "3")

    def bits(name):
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)
        net = models.build("resnet8", 10, in_channels=1)
        net.load_state_dict(state["model"])
        return models.weight_signs(models.binary_layers(net))

    row = metrics(tmp_path / "b")[1]
    assert math.isclose(row["flip_ratio"], (bits("a") != bits("b")).double().mean().item(), rel_tol=1e-4)
    assert math.isclose(row["plus_ratio"], (bits("b") > 0).double().mean().item(), rel_tol=1e-4)


@pytest.mark.parametrize("trainer, extra", SIBLINGS, ids=name_of)
def test_the_sibling_papers_learn_digits(tmp_path, trainer, extra, capsys):
    epochs = "3" if trainer is train_proxconnect or {"lenet", "conv4"} & set(extra) else "5"
    rows = train(tmp_path, "run", "--epochs", epochs, "--schedule", "cosine", *extra, trainer=trainer)
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    assert rows[-1]["test_acc"] > 0.55
    assert tuple(rows[0])[: len(runs.METRICS)] == runs.METRICS
    if "fp" not in extra:
        assert 0 < rows[0]["flip_ratio"] < 0.3 and 0.2 < rows[0]["plus_ratio"] < 0.8
    assert f"python {trainer.__name__}.py --eval-only --resume" in capsys.readouterr().out

    best = rows[-1]["test_acc"]
    assert trainer.main(["--eval-only", "--resume", str(tmp_path / "run" / "best.pt")]) == 0
    shown = float(re.search(r"test accuracy ([\d.]+) %", capsys.readouterr().out)[1])
    assert math.isclose(shown, 100 * best, abs_tol=0.01)
    assert plot.main([str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("grad", GRADS)
def test_sgd_trains_with_every_generator(tmp_path, grad):
    steps = {"fsg-lstm": 88, "lstmfc": 100, "multifc": 250, "fcgrad": 250}.get(grad, 150)
    rows = train(tmp_path, "run", *GRADS[grad], "--opt", "sgd", "--limit-steps", str(steps), "--epochs", "99")
    assert rows[-1]["step"] == steps
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    # Three epochs at a time: the last one may be of four batches, whose losses vary by a half.
    smooth = [statistics.mean(r["train_loss"] for r in rows[i : i + 3]) for i in range(len(rows) - 2)]
    assert smooth[-1] < 1.3 * min(smooth), "no late divergence"


@pytest.mark.parametrize(
    "extra",
    [
        ["--quantizer", "bwn", "--opt", "sgdm"],
        ["--quantizer", "bwn-f", "--history", "flat", "--normalize", "none", "--no-lre"],
        ["--act", "sign", "--fast-act", "relu", "--length", "3", "--beta", "0.2", "--hyper-sample", "0.25"],
        ["--binarize-all", "--fast-act", "tanh", "--no-crop", "--amp"],
        ["--preset", "released"],
        ["--quantizer", "none", "--opt", "sgdm", "--schedule", "none"],
    ],
)
def test_flags_in_combination(tmp_path, extra):
    rows = train(tmp_path, "run", "--epochs", "2", "--batch-size", "128", *extra)
    assert rows[-1]["step"] == 22 and math.isfinite(rows[-1]["test_loss"])
    if extra[0] != "--preset":
        assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    if "none" in extra[:2]:
        assert math.isnan(rows[-1]["flip_ratio"])


def complete(*argv):
    args = train_fsg.flags().parse_args(argv)
    train_fsg.complete(args)
    return args


def generator(*argv):
    return train_fsg.make_generator(complete(*argv), models.binary_layers(models.build("resnet8", 10)))


def test_the_preset_sets_what_it_says():
    args, fsg = complete("--preset", "released"), generator("--preset", "released")
    assert (args.grad, args.hgs, args.beta, args.length, args.lr) == ("fsg", "mamba", 0.9, 5, 1e-3)
    assert args.binarize_all
    assert isinstance(fsg, fsg_released.ReleasedFSG)
    assert (fsg.layout, fsg.normalize, fsg.balance) == ("flat", "none", "none")
    assert isinstance(fsg.fast.act, torch.nn.Identity) and fsg.beta == 0.9 and len(fsg.history) == 5


def test_fsg_with_mamba_is_the_default_and_no_hyper_parameter_changes_the_method_or_the_learning_rate():
    for flags in (
        [],
        ["--beta", "0.9"],
        ["--beta", "0"],
        ["--expand", "7"],
        ["--length", "5"],
        ["--length", "9"],
        ["--lr-slow", "1e-2"],
        ["--no-lre"],
        ["--history", "flat"],
        ["--history", "newest"],
        ["--balance", "none"],
        ["--hyper-sample", "0.5"],
    ):
        args = complete(*flags)
        assert (args.grad, args.hgs, args.preset, args.lr) == ("fsg", "mamba", "none", 1e-3), flags
        made = generator(*flags)
        assert type(made) is hypernet.FSG and isinstance(made.slow, hypernet.SlowMamba), flags
    args = complete("--hgs", "lstm", "--hidden", "3")
    assert (args.grad, args.hgs, args.lr) == ("fsg", "lstm", 1e-3)
    assert isinstance(generator("--hgs", "lstm", "--hidden", "3").slow, hypernet.SlowLSTM)
    # A learning rate that was measured with one generator is no default for another.
    for flags in ([], ["--memory", "0"], ["--epsilon", "1"]):
        assert complete("--grad", "gate", *flags).lr == 6e-3
        assert type(generator("--grad", "gate", *flags)) is gate.GatedHistory
    assert complete("--grad", "gate", "--pretrained", "full.pt").lr == 1e-3
    for grad in ("ste", "fcgrad", "multifc", "lstmfc"):
        assert complete("--grad", grad).lr == 1e-3
    assert complete("--quantizer", "none").lr == 1e-3


def test_the_gate_has_its_two_constants():
    default, other = generator("--grad", "gate"), generator("--grad", "gate", "--memory", "0", "--epsilon", "1")
    assert (default.memory, default.epsilon) == (0.8, 0.35) and (other.memory, other.epsilon) == (0, 1)


def test_under_the_gate_latent_weights_have_no_other_momentum(tmp_path):
    betas = {}
    for name, flags in (("gate", ["--grad", "gate"]), ("mamba", ["--hgs", "mamba"])):
        train(tmp_path, name, *flags, "--limit-steps", "2")
        groups = torch.load(tmp_path / name / "last.pt", weights_only=True)["optimizer"]["param_groups"]
        betas[name] = [(group["betas"], len(group["params"])) for group in groups]
    count = len(models.binary_layers(models.build("resnet8", 10)))
    (all_betas, total), *none = betas["mamba"]
    assert not none and betas["gate"] == [((0.0, all_betas[1]), count), (all_betas, total - count)]


def test_same_seed_same_run_and_other_seed_another(tmp_path):
    a, b, c = (train(tmp_path, n, "--limit-steps", "10", "--seed", s) for n, s in (("a", "1"), ("b", "1"), ("c", "2")))
    assert a[0]["train_loss"] == b[0]["train_loss"] != c[0]["train_loss"]


def test_pretrained_starts_from_full_precision(tmp_path):
    fp = train(tmp_path, "fp", "--quantizer", "none", "--epochs", "6")
    best = str(tmp_path / "fp" / "best.pt")
    start = train(tmp_path, "from-fp", "--pretrained", best, "--limit-steps", "22")
    scratch = train(tmp_path, "scratch", "--limit-steps", "22")
    assert fp[-1]["test_acc"] > 0.85
    assert start[0]["train_loss"] < 0.8 * scratch[0]["train_loss"]


def test_names_are_made_and_never_reused(tmp_path, capsys):
    argv = [*SMALL, *TINY_NETS, "--out", str(tmp_path), "--limit-steps", "2"]
    for _ in range(2):
        train_fsg.main(argv)
    assert {p.name for p in tmp_path.iterdir()} == {
        "fsg-mamba-resnet8-digits-adam-seed0",
        "fsg-mamba-resnet8-digits-adam-seed0-2",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on.


def same_bits(a, b, where=""):
    """Two checkpoints are the same to the bit, times aside."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            if k not in ("seconds", "images_per_s", "args"):
                same_bits(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same_bits(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or (a != a and b != b), where


FSG_VARIANTS = [
    *GRADS.values(),
    ["--preset", "released"],
    ["--preset", "released", "--hgs", "lstm"],
    ["--preset", "released", "--grad", "multifc", "--quantizer", "bwn"],
    ["--quantizer", "none"],
]


@pytest.fixture
def few_digits(monkeypatch):
    """A third of the digits, 480 and 120, for runs that need not learn them."""
    train, test, classes = data.digits()
    monkeypatch.setattr(data, "digits", lambda: ([t[::3] for t in train], [t[::3] for t in test], classes))


def interrupt_after(monkeypatch, steps):
    """Ctrl-C during that step."""
    real = runs.Run.count

    def count(self, *args):
        real(self, *args)
        if self.step == steps and not self.interrupt:  # once, though there are several micro-batches
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs.Run, "count", count)


# Flags that change the training. (tests/test_runs.py resumes a run with --amp fp16, which is slow here.)
OPTIONS = [
    "--opt adamw --betas 0.8 0.95 --weight-decay 0.1 --lr 2e-3 --schedule cosine --warmup 1.5 --label-smoothing 0.1 "
    "--clip 1 --ema 0.9 --val 25 --bn-batches 2 --seed 3 --deterministic --tensorboard",
    "--opt sgdm --accumulate 3 --no-crop --no-flip --image-size 12 --save-every 0 --amp bf16 --act sign --binarize-all",
    "--opt sgd --schedule none --hyper-sample 0.5 --fast-act tanh --quantizer bwn",
]
WITH_OPTIONS = [(train_fsg, options.split()) for options in OPTIONS]
WITH_OPTIONS += [(train_sibnn, OPTIONS[0].split()), (train_bihalf, OPTIONS[1].split())]
MIXED = " --mixup 0.8 --cutmix 1"  # timm's
WITH_OPTIONS += [(train_proxconnect, OPTIONS[0].replace("--ema 0.9", MIXED).split())]


def test_every_common_flag_that_changes_the_training_is_resumed_with():
    tested = {word for _, options in WITH_OPTIONS for word in options if word.startswith("--")}
    common = {runs.option(name) for name in vars(runs.common_flags("", "").parse_args([]))} - {"--script"}
    not_the_training = ["--arch", "--dataset", "--data-dir", "--workers", "--epochs", "--limit-steps", "--batch-size"]
    not_the_training += ["--milestones", "--pretrained", "--device", "--compile", "--wandb", "--out", "--name"]
    assert common - tested == {*not_the_training, "--resume", "--eval-only"}


@pytest.mark.parametrize(
    "trainer, extra", [*((train_fsg, v) for v in FSG_VARIANTS), *SIBLINGS, *WITH_OPTIONS], ids=name_of
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, few_digits, trainer, extra):
    argv = [*small(trainer, extra), *extra, "--out", str(tmp_path)]
    argv += ["--epochs", "3", "--batch-size", "90", "--limit-steps", "12"]
    argv += [] if "--schedule" in extra else ["--schedule", "step", "--milestones", "1"]
    assert trainer.main([*argv, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)  # within the second epoch
        assert trainer.main([*argv, "--name", "parts"]) == 128 + signal.SIGINT
    folder = tmp_path / "parts"
    assert [r["step"] for r in metrics(folder)] == [5]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        assert trainer.main(["--resume", str(folder)]) == 128 + signal.SIGINT
    assert trainer.main(["--resume", str(folder / "last.pt")]) == 0
    assert [r["step"] for r in metrics(folder)] == [5, 10, 12]
    same_bits(*(torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts")))
    same_bits(*(torch.load(tmp_path / n / "best.pt", weights_only=True) for n in ("whole", "parts")))
    for a, b in zip(metrics(tmp_path / "whole"), metrics(folder), strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("grad", ["ste", "gate"])
def test_the_memory_format_of_a_checkpoint_does_not_matter(tmp_path, grad):
    """A checkpoint whose tensors are all contiguous goes on as the run's own does, whose weights are channels_last."""
    contiguous = lambda x: tree_map(lambda t: t.contiguous() if torch.is_tensor(t) else t, x)
    ends = []
    for convert in (lambda x: x, contiguous):
        folder = tmp_path / str(len(ends))
        train(folder, "run", "--grad", grad, "--epochs", "1", "--limit-steps", "3")
        last = folder / "run" / "last.pt"
        torch.save(convert(torch.load(last, weights_only=True)), last)
        assert train_fsg.main(["--resume", str(folder / "run"), "--limit-steps", "6"]) == 0
        ends.append(torch.load(last, weights_only=True)["model"])
        best = torch.load(folder / "run" / "best.pt", weights_only=True)["model"]
        assert all(t.is_contiguous() for t in best.values()), "safetensors saves no others"
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))


@each_trainer
def test_a_run_that_ended_within_an_epoch_goes_on_with_more_steps(tmp_path, few_digits, trainer):
    extra = ["--method", "bnn+"] if trainer is train_proxconnect else []  # nothing that depends on the number of steps
    common = [*extra, "--epochs", "3", "--batch-size", "90", "--schedule", "step", "--milestones", "1"]
    train(tmp_path, "whole", *common, "--limit-steps", "12", trainer=trainer)
    rows = train(tmp_path, "parts", *common, "--limit-steps", "7", trainer=trainer)
    assert [r["step"] for r in rows] == [5, 7]
    assert trainer.main(["--resume", str(tmp_path / "parts"), "--limit-steps", "12"]) == 0
    assert [r["step"] for r in metrics(tmp_path / "parts")] == [5, 10, 12]
    same_bits(*(torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts")))


def test_a_resumed_run_says_that_its_cosine_schedule_has_another_length(tmp_path, few_digits, capsys):
    common = ["--grad", "ste", "--epochs", "2", "--schedule"]
    for schedule, says in (("cosine", True), ("none", False)):
        train(tmp_path, schedule, *common, schedule, "--limit-steps", "3")
        capsys.readouterr()
        assert train_fsg.main(["--resume", str(tmp_path / schedule), "--limit-steps", "6"]) == 0
        out = capsys.readouterr().out
        assert ("was a run of 3 steps, now it is one of 6: its learning rate continues" in out) == says


def start_process(out, name, *extra, trainer=train_fsg):
    argv = [f"{trainer.__name__}.py", *small(trainer, extra), "--out", str(out), "--name", name, *extra]
    return Program(*argv, together=True)


SIGNALS = [(trainer, signal.SIGINT if trainer is train_fsg else signal.SIGTERM) for trainer in TRAINERS.values()]


@pytest.mark.parametrize("trainer, which", SIGNALS)
def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path, trainer, which):
    # Nothing that depends on the number of steps, which --limit-steps changes.
    common = ["--epochs", "40", "--schedule", "none", "--val", "900"]
    common += ["--method", "bnn"] if trainer is train_proxconnect else []
    process = start_process(tmp_path, "cut", *common, trainer=trainer)
    while not (tmp_path / "cut" / "best.pt").exists():
        assert process.poll() is None, process.end().stdout
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.process.pid, which)
    ended = process.end()
    out = ended.stdout
    assert ended.returncode == 128 + which and "Traceback" not in out
    stopped = int(re.search(r"stopped after step ([\d,]+)", out)[1].replace(",", ""))
    assert f"python {trainer.__name__}.py --resume {tmp_path / 'cut'}" in out
    state = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert state["step"] == stopped
    more = str(stopped + 5)
    assert trainer.main(["--resume", str(tmp_path / "cut"), "--limit-steps", more]) == 0
    train(tmp_path, "whole", *common, "--limit-steps", more, trainer=trainer)
    same_bits(*(torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "cut")))


def test_an_interruption_while_testing_waits_for_the_end_of_the_epoch(tmp_path, monkeypatch, few_digits):
    before = signal.getsignal(signal.SIGINT)
    whole = train(tmp_path, "whole", "--grad", "ste", "--epochs", "2")
    real = runs.evaluate

    def evaluate(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    argv = [*SMALL, "--grad", "ste", "--epochs", "2", "--out", str(tmp_path), "--name", "cut"]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", evaluate)
        assert train_fsg.main(argv) == 128 + signal.SIGINT
    assert [r["step"] for r in metrics(tmp_path / "cut")] == [7]
    assert signal.getsignal(signal.SIGINT) is before, "outside of training Ctrl-C is what it was"
    assert train_fsg.main(["--resume", str(tmp_path / "cut")]) == 0
    for a, b in zip(whole, metrics(tmp_path / "cut"), strict=True):
        same_bits(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, a non-zero exit, nothing lost.


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "run", "--limit-steps", "24", "--epochs", "2")
    return folder / "run"


def sentence(argv, trainer=train_fsg):
    """The sentence that a command ends with."""
    with pytest.raises((runs.RunError, data.DataError, models.ModelError)) as e:
        trainer.main(argv)
    text = str(e.value)
    assert text and "\n" not in text and len(text) < 400
    return text


def test_the_command_line_ends_with_one_sentence(tmp_path):
    ended = start_process(tmp_path, "x", "--beta", "1.5").end()
    assert ended.returncode == 1
    assert ended.stdout == "error: beta is the weight of the slow gradient and must lie in [0, 1]; it is 1.5\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "extra, says",
    [
        (["--hgs", "lstm", "--history", "flat"], "--history per-weight"),
        (["--beta", "-0.5"], r"\[0, 1\]"),
        (["--grad", "gate", "--memory", "1"], "memory must be at least 0 and below 1"),
        (["--grad", "gate", "--epsilon", "0"], "epsilon above 0"),
        (["--hyper-sample", "1.5"], "at most 1"),
        (["--hyper-sample", "0.5", "--history", "flat"], "per-weight"),
        (["--hyper-sample", "0.5", "--grad", "ste"], "--grad fsg"),
        (["--hyper-sample", "0.5", "--preset", "released"], "leave it out"),
        (["--length", "0"], "at least 1"),
        (["--expand", "0"], "--expand must be at least 1"),
        (["--hidden", "99999999999999999999"], "at most 100,000"),
        (["--pretrained", ""], "--pretrained is empty"),
        (["--resume", ""], "--resume is empty"),
        (["--arch", "resnet21"], "resnet20"),
        (["--device", "cuda:99"], "--device cpu"),
        (["--device", "abacus"], "--device cpu"),
        (["--scan", "mamba-ssm"], "requirements-cuda.txt|CUDA devices only"),
        (["--preset", "released", "--grad", "ste"], "leave it out"),
        (["--quantizer", "none", "--act", "sign"], "full precision"),
        (["--name", ".."], "--name is the name of a folder"),
        (["--name", "a/b"], "--name is the name of a folder"),
        (["--milestones", "-5"], "--milestones are epochs"),
        (["--schedule", "cosine", "--milestones", "1"], "--milestones is for --schedule step"),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1"),
        (["--ema", "1"], "--ema must be at least 0 and below 1"),
        (["--clip", "0"], "--clip must be a positive number"),
        (["--val", "-1"], "--val must be a number of at least 0"),
        (["--val", "1438"], "."),
        (["--epochs", "0"], "--epochs must be a number of at least 1"),
        (["--lr", "nan"], "--lr must be a number"),
        (
            ["--opt", "sgd", "--betas", "0.9", "0.99"],
            "^--betas is for --opt adam or adamw: leave it out with --opt sgd$",
        ),
        (["--betas", "0.9", "1"], "--betas must be at least 0 and below 1"),
        (["--eval-only"], "--pretrained"),
        (["--pretrained", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["--resume", "nowhere"], "no checkpoint at .*nowhere"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_flags(tmp_path, extra, says):
    assert re.search(says, sentence([*small(train_fsg, extra), "--out", str(tmp_path), *extra]))
    assert not list(tmp_path.iterdir()), "nothing was begun"


# The methods of train_fsg.py, and for each flag of a generator a value and the methods that have it.
METHODS_OF_FSG = {
    "mamba": [],
    "mamba, tanh": ["--fast-act", "tanh"],
    "lstm": ["--hgs", "lstm"],
    "gate": ["--grad", "gate"],
    "ste": ["--grad", "ste"],
    "fcgrad": ["--grad", "fcgrad"],
    "multifc": ["--grad", "multifc"],
    "lstmfc": ["--grad", "lstmfc"],
    "released mamba": ["--preset", "released"],
    "released lstm": ["--preset", "released", "--hgs", "lstm"],
    "released fcgrad": ["--preset", "released", "--grad", "fcgrad"],
    "released multifc": ["--preset", "released", "--grad", "multifc"],
    "released lstmfc": ["--preset", "released", "--grad", "lstmfc"],
    "full precision": ["--quantizer", "none"],
}
FSG = ["mamba", "mamba, tanh", "lstm"]
FSG_OF_AUTHORS = ["released mamba", "released lstm"]
LEARNED = METHODS_OF_FSG.keys() - {"gate", "ste", "full precision"}
MAMBA = ["mamba", "mamba, tanh", "released mamba"]
GENERATOR_FLAGS = {
    "hgs": ("mamba", FSG + FSG_OF_AUTHORS),
    "preset": ("none", LEARNED),
    "history": ("newest", FSG),
    "balance": ("layer-rms", FSG),
    "normalize": ("none", FSG),
    "no_lre": (None, FSG),
    "hyper_sample": ("0.5", FSG),
    "length": ("9", [*FSG, "released mamba"]),
    "beta": ("0.5", FSG + FSG_OF_AUTHORS),
    "lr_slow": ("0.1", FSG + FSG_OF_AUTHORS),
    "d_state": ("2", MAMBA),
    "d_conv": ("2", MAMBA),
    "expand": ("2", MAMBA),
    "scan": ("reference", MAMBA),
    "fast_act": ("tanh", [*FSG, "fcgrad", "multifc"]),
    "hidden": ("3", LEARNED),
    "lr_fast": ("0.1", LEARNED - {"mamba", "lstm"}),
    "memory": ("0.5", ["gate"]),
    "epsilon": ("0.5", ["gate"]),
}


def typed(flag):
    value = GENERATOR_FLAGS[flag][0]
    return [runs.option(flag), value] if value else [runs.option(flag)]


def refusal(flag, argv):
    """Check that a command is refused because of this flag, in a sentence that says what to do."""
    text = sentence([*argv, "--limit-steps", "9"])
    because = r"is for (--\S+) .*: leave it out with \2 \S+|has no effect with .*: leave it out, or use .*"
    assert re.fullmatch(f"{runs.option(flag)} ({because})", text), text


def test_every_flag_of_a_generator_is_in_the_table():
    own = vars(train_fsg.flags().parse_args([])).keys() - vars(runs.common_flags("", "").parse_args([])).keys()
    assert own - {"quantizer", "act", "binarize_all", "grad"} == GENERATOR_FLAGS.keys()


@pytest.mark.parametrize("flag", GENERATOR_FLAGS)
def test_a_flag_that_the_generator_does_not_have_is_refused(tmp_path, flag):
    owners = GENERATOR_FLAGS[flag][1]
    for method, argv in METHODS_OF_FSG.items():
        if method in owners:
            assert flag in complete(*argv, *typed(flag))
        else:
            refusal(flag, [*SMALL, "--out", str(tmp_path), *argv, *typed(flag)])
    refusal("grad", [*SMALL, "--out", str(tmp_path), "--quantizer", "none", "--grad", "ste"])
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize("method", METHODS_OF_FSG)
def test_a_run_of_every_generator_holds_its_own_flags_alone(tmp_path, method, capsys):
    argv, folder = METHODS_OF_FSG[method], tmp_path / "run"
    train(tmp_path, "run", "--limit-steps", "2", *argv)
    started = capsys.readouterr().out
    written = json.loads((folder / "args.json").read_text())
    own = {flag for flag, (_, owners) in GENERATOR_FLAGS.items() if method in owners}
    assert written.keys() & GENERATOR_FLAGS.keys() == own and ("grad" in written) == (method != "full precision")
    assert all(written[flag] is not None for flag in own), "with the values that were used"
    assert f", learning rate {written['lr']:g}; gradients: " in started
    assert ("this learning rate is the default of --grad gate" in started) == (method == "gate")

    assert train_fsg.main(["--resume", str(folder), "--limit-steps", "3"]) == 0
    resumed = json.loads((folder / "args.json").read_text())
    assert resumed == written | {"limit_steps": 3, "resume": str(folder)}
    for flag in GENERATOR_FLAGS.keys() - own:
        refusal(flag, ["--resume", str(folder), *typed(flag)])

    capsys.readouterr()
    best = str(folder / "best.pt")
    # The network is tested without the flags of its generator, unless they decide which layers are binary.
    network_flags = argv if method.startswith(("released", "full")) else []
    for how in (
        ["--resume", best],
        [*SMALL, "--pretrained", best, *argv],
        [*SMALL, "--pretrained", best, *network_flags],
    ):
        assert train_fsg.main(["--eval-only", *how]) == 0
    assert len(set(capsys.readouterr().out.splitlines()[-3:])) == 1


@pytest.mark.parametrize(
    "trainer, extra, says",
    [
        (train_sibnn, ["--rho", "1.5"], r"\[0, 1\]"),
        (train_sibnn, ["--arch", "resnet21"], "birealnet20"),
        (train_proxconnect, ["--arch", "no_such_vit"], "is not known"),
        (train_proxconnect, ["--arch", "test_convnext"], "choose another vision transformer"),
        (train_proxconnect, ["--arch", "test_vit"], "another vision transformer or --patch-size"),
        (train_proxconnect, ["--arch", "test_vit", "--patch-size", "0"], "at least 1"),
        (train_proxconnect, ["--method", "fp", "--act", "sign"], "full precision"),
        (train_sibnn, ["--arch", "alexnet"], "at least 63×63 pixels"),
        (train_sibnn, ["--device", "meta"], "--device cpu"),
        (train_bihalf, ["--device", "hpu"], "--device cpu"),
        (train_proxconnect, ["--patch-size", "4"], "are for transformers"),
        (train_proxconnect, ["--pretrained-timm"], "are for transformers"),
        (train_proxconnect, ["--arch", "test_vit", "--pretrained-timm", "--pretrained", "x.pt"], "give one of them"),
        (train_proxconnect, ["--mu", "0", "30"], "positive"),
        (train_proxconnect, ["--method", "pc", "--rho", "1", "nan"], "two positive numbers"),
        (train_proxconnect, ["--method", "bnn++", "--mu", "5"], "two positive numbers"),
        (train_proxconnect, ["--method", "bnn+", "--mu", "5", "30"], "one positive number"),
        (train_proxconnect, ["--rho", "1", "2"], r"^--rho is for --method pc or pq or rpc: leave it out .* bnn\+\+$"),
        (
            train_proxconnect,
            ["--method", "bc", "--mu", "5", "30"],
            r"^--mu is for --method bnn\+ or bnn\+\+: leave it out",
        ),
        (train_proxconnect, ["--method", "fp", "--rho", "0.01", "10"], "^--rho is for --method"),
        (
            train_proxconnect,
            ["--betas", "0.9", "0.99"],
            "^--betas is for --opt adam or adamw: leave it out with --opt sgdm$",
        ),
        (train_sibnn, ["--act", "sign", "--rho", "0.3"], "^--rho is for --act si: leave it out with --act sign$"),
        (train_bihalf, ["--quantizer", "sign", "--ratio", "0.5"], "^--ratio is for --quantizer bihalf: leave it out"),
        (train_bihalf, ["--quantizer", "sign", "--prune", "0"], "^--prune is for --quantizer bihalf: leave it out"),
        (train_bihalf, ["--ratio", "1.01"], r"\[0, 1\]"),
        (train_bihalf, ["--prune", "1"], "use a smaller fraction"),
        (train_proxconnect, ["--mu", "30", "5"], "--mu grows during training"),
        (train_proxconnect, ["--bn-batches", "0"], "--bn-batches must be at least 1"),
        (train_proxconnect, ["--ema", "0.9"], "leave it out"),
        (train_bihalf, ["--prune", "-0.1"], r"\[0, 1\]"),
        (train_bihalf, ["--prune", "0.2", "--ratio", "0.3"], "leave out --ratio"),
        (train_bihalf, ["--prune", "0.2", "--quantizer", "sign"], "leave it out"),
        (train_bihalf, ["--arch", "conv5"], "conv4"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_flags_of_the_siblings(tmp_path, trainer, extra, says):
    assert re.search(says, sentence([*SMALL, "--out", str(tmp_path), *extra], trainer))
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize(
    "trainer, extra, used, unused",
    [
        (train_proxconnect, ["--method", "bc"], {}, ["mu", "rho", "milestones"]),
        (train_proxconnect, ["--method", "bnn+"], {"mu": [5.0]}, ["rho"]),
        (train_proxconnect, ["--method", "bnn++"], {"mu": [5.0, 30.0], "lr": 0.01}, ["rho"]),
        (train_proxconnect, ["--method", "rpc", "--rho", "1", "2"], {"rho": [1.0, 2.0]}, ["mu"]),
        (train_sibnn, ["--act", "sign"], {"milestones": [40, 80]}, ["rho"]),
        (train_sibnn, [], {"rho": 0.3}, []),
        (train_bihalf, ["--quantizer", "sign"], {"epochs": 400}, ["ratio", "prune", "milestones"]),
        (train_bihalf, ["--prune", "0.4"], {"prune": 0.4, "ratio": 0.5}, []),
    ],
    ids=name_of,
)
def test_args_json_holds_the_flags_that_the_run_used(tmp_path, trainer, extra, used, unused, capsys):
    train(tmp_path, "run", "--limit-steps", "2", *extra, trainer=trainer)
    written = json.loads((tmp_path / "run" / "args.json").read_text())
    assert used.items() <= written.items() and not set(unused) & written.keys()
    assert f", learning rate {written['lr']:g}; " in capsys.readouterr().out.splitlines()[0]
    # The same for a run that is resumed, which still refuses the flags of other methods.
    assert trainer.main(["--resume", str(tmp_path / "run"), "--limit-steps", "3"]) == 0
    resumed = json.loads((tmp_path / "run" / "args.json").read_text())
    assert written.keys() == resumed.keys() and used.items() <= resumed.items()
    for name in {"mu", "rho", "ratio", "prune"} & set(unused):
        values = ["0.5"] * (2 if trainer is train_proxconnect else 1)
        text = sentence(["--resume", str(tmp_path / "run"), "--limit-steps", "4", f"--{name}", *values], trainer)
        assert text.startswith(f"--{name} is for ")


@each_trainer
@pytest.mark.parametrize("opt, kind", [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD"), ("sgdm", "SGD")])
def test_every_optimizer_has_a_learning_rate_and_is_made(trainer, opt, kind):
    args = trainer.flags().parse_args(["--opt", opt, "--arch", "resnet8"])
    trainer.complete(args)
    runs.complete_betas(args)
    optimizer = runs.make_optimizer(torch.nn.Linear(2, 2).parameters(), args)
    assert type(optimizer) is getattr(torch.optim, kind) and 0 < optimizer.defaults["lr"] == args.lr
    assert optimizer.defaults.get("momentum", 0) == (0.9 if opt == "sgdm" else 0)


def test_a_schedule_that_needs_milestones_has_them_after_a_resume(tmp_path):
    train(tmp_path, "run", "--limit-steps", "2", "--schedule", "none", trainer=train_sibnn)
    again = ["--resume", str(tmp_path / "run"), "--limit-steps", "3", "--schedule", "step"]
    assert train_sibnn.main(again) == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["milestones"] == [40, 80]
    for number, flags in enumerate((["--milestones", "3"], ["--schedule", "cosine"], ["--schedule", "step"]), 4):
        assert train_sibnn.main(["--resume", str(tmp_path / "run"), "--limit-steps", str(number), *flags]) == 0
        args = json.loads((tmp_path / "run" / "args.json").read_text())
        assert args.get("milestones") == [[3], None, [40, 80]][number - 4]
    text = sentence(["--resume", str(tmp_path / "run"), "--schedule", "none", "--milestones", "3"], train_sibnn)
    assert text.startswith("--milestones is for --schedule step")


def test_only_for_and_fill_chain():
    args = argparse.Namespace(quantizer="none", grad=None, length=None, plain=False)
    runs.only_for(args, "quantizer", {"grad": ("dorefa",), "length": ("dorefa",), "plain": ("dorefa",)})
    runs.fill(args, grad="fsg", length=5)
    assert vars(args) == {"quantizer": "none"}, "what was removed is not filled"
    args = argparse.Namespace(quantizer="dorefa", grad="ste", length=None, zero=0)
    runs.only_for(args, "quantizer", {"grad": ("dorefa",), "length": ("dorefa",)})
    runs.only_for(args, "grad", {"length": ("fsg",)})
    assert vars(args) == {"quantizer": "dorefa", "grad": "ste", "zero": 0}
    with pytest.raises(runs.RunError, match=r"^--zero is for --grad fsg or gate: leave it out with --grad ste$"):
        runs.only_for(args, "grad", {"zero": ("fsg", "gate")})


@each_trainer
def test_wrong_flags_of_all(tmp_path, trainer):
    argv = [*small(trainer), "--out", str(tmp_path)]
    for extra, says in (
        *((["--device", "abacus"], "--device cpu"), (["--epochs", "0"], "--epochs must be a number of at least 1")),
        *((["--lr", "nan"], "--lr must be a number"), (["--eval-only"], "--pretrained")),
        *((["--pretrained", "nowhere.pt"], "no checkpoint at"), (["--resume", "nowhere"], "no checkpoint at")),
    ):
        assert says in sentence([*argv, *extra], trainer)
    assert not list(tmp_path.iterdir()), "nothing was begun"


@each_trainer
def test_a_run_of_another_trainer(tmp_path, trainer):
    other = train_fsg if trainer is train_sibnn else train_sibnn
    train(tmp_path, "run", "--limit-steps", "2", trainer=other)
    assert f"python {other.__name__}.py" in sentence(["--resume", str(tmp_path / "run")], trainer)
    argv = [*small(trainer), "--eval-only", "--pretrained", str(tmp_path / "run" / "best.pt")]
    assert f"script {other.__name__}.py" in sentence(argv, trainer)


@pytest.mark.parametrize(
    "trainer, extra, name",
    [
        (train_bihalf, ["--ratio", "0.2"], "ratio"),
        (train_bihalf, ["--prune", "0.2"], "prune"),
        (train_proxconnect, ["--method", "bc"], "method"),
        (train_sibnn, ["--act", "none"], "act"),
    ],
)
def test_a_test_is_of_the_network_that_the_sibling_trained(tmp_path, trainer, extra, name):
    train(tmp_path, "run", "--limit-steps", "2", *extra, trainer=trainer)
    best = str(tmp_path / "run" / "best.pt")
    assert f"trained with {name}" in sentence([*SMALL, "--eval-only", "--pretrained", best], trainer)


def test_the_siblings_start_from_full_precision_too(tmp_path):
    train(tmp_path, "fp", "--quantizer", "none", "--epochs", "4")
    best = ["--pretrained", str(tmp_path / "fp" / "best.pt"), "--limit-steps", "22", "--opt", "adam", "--lr", "1e-3"]
    for trainer in (train_sibnn, train_proxconnect, train_bihalf):
        extra = ["--act", "none"] if trainer is train_bihalf else []
        start = train(tmp_path, trainer.__name__, *best, *extra, trainer=trainer)
        scratch = train(tmp_path, f"{trainer.__name__}-scratch", *best[2:], *extra, trainer=trainer)
        assert start[0]["train_loss"] < scratch[0]["train_loss"]


@each_trainer
def test_wrong_data(tmp_path, monkeypatch, trainer):
    argv = ["--arch", "resnet8", "--out", str(tmp_path / "runs")]

    ends = functools.partial(sentence, trainer=trainer)
    assert "train/CLASS" in ends([*argv, "--dataset", "folder", "--data-dir", str(tmp_path / "none")])
    root = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / split / name / "0.png")
    broken = root / "train" / "dog" / "0.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    assert str(broken) in ends([*argv, "--dataset", "folder", "--data-dir", str(root)])
    broken.write_bytes(whole)
    (root / "test" / "dog" / "0.png").unlink()
    (root / "test" / "dog").rmdir()
    assert "'dog'" in ends([*argv, "--dataset", "folder", "--data-dir", str(root)])

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    assert "--dataset digits" in ends([*argv, "--dataset", "cifar10", "--data-dir", str(tmp_path / "empty")])
    assert not (tmp_path / "runs").exists()


@each_trainer
def test_wrong_checkpoints(tmp_path, trainer):
    train(tmp_path / "runs", "run", "--limit-steps", "24", "--epochs", "2", trainer=trainer)
    a_run = tmp_path / "runs" / "run"
    argv = [*small(trainer), "--out", str(tmp_path)]

    ends = functools.partial(sentence, trainer=trainer)
    best = str(a_run / "best.pt")
    assert "--arch resnet8" in ends([*argv, "--arch", "resnet20", "--pretrained", best])
    root = tmp_path / "images"
    for split in ("train", "test"):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), 100).save(root / split / name / "0.png")
    other = ["--dataset", "folder", "--data-dir", str(root), "--arch", "resnet8", "--out", str(tmp_path)]
    assert "number of classes" in ends([*other, "--pretrained", best])
    for size in (0, 100, 20_000):
        cut = tmp_path / "cut.pt"
        cut.write_bytes((a_run / "last.pt").read_bytes()[:size])
        assert "damaged" in ends([*argv, "--resume", str(cut)])
        assert "damaged" in ends([*argv, "--pretrained", str(cut)])
    torch.save([1, 2], cut)
    assert "not a checkpoint" in ends([*argv, "--pretrained", str(cut)])
    assert "resume last.pt" in ends(["--resume", best])
    assert "give a larger --limit-steps to go on" in ends(["--resume", str(a_run)])
    assert "already" in ends([*argv, "--out", str(a_run.parent), "--name", a_run.name])
    assert [r["step"] for r in metrics(a_run)] == [22, 24], "and the run is as it was"


DAMAGE = [  # (the place in the checkpoint, its wrong values)
    ("args", [None, 5, {1: 2}]),
    ("args.lr", [[], "x", True]),
    ("args.betas", [5, [], [0.9]]),
    ("args.opt", [[], "lion", 7]),
    ("args.dataset", ["svhn", 5]),
    ("args.milestones", [5, ["x"]]),
    ("shape", [(), (1, 8), (1, 0, 8), "x"]),
    ("images", [{"training": "x"}, 5]),
    ("normalisation", [[], [[1.0]], [[1.0], ["x"]], [[1.0], [1.0, 2.0]]]),
    ("step", [None, -1, 2.5, torch.zeros(2)]),
    ("batch", [-1, "x"]),
    ("seconds", ["x", -1.0, math.inf]),
    ("threads", [torch.zeros(2), None]),
    ("signs", [None, torch.zeros(5).char()]),
    ("rows", [[5], [{}], [{"step": 5}]]),
    ("optimizer", [5, {"state": {}}]),
    ("optimizer.state.*", [None, {}, {"step": 1}]),
    ("optimizer.state.*.exp_avg", [torch.zeros(3), 5, None]),
    ("optimizer.state.*.step", [torch.zeros(0), "x"]),
    ("generator.latent", [5, torch.zeros(3)]),
    ("generator._extra_state", [5, {}]),
    ("generator._extra_state.t", ["x", None]),
    ("generator._extra_state.strides", [[], [(1,)], 5]),
    ("generator._extra_state.optimizer.state.*.exp_avg_sq", [torch.zeros(1)]),
]


@pytest.mark.parametrize("place, values", DAMAGE, ids=[place for place, _ in DAMAGE])
def test_a_damaged_part_of_a_checkpoint(a_run, tmp_path, place, values):
    """PyTorch's fused optimizers write beyond the memory of averages that are too short."""
    for value in values:
        checkpoint = part = torch.load(a_run / "last.pt", weights_only=True)
        *path, last = place.split(".")  # *: the first
        for key in path:
            part = part[next(iter(part)) if key == "*" else key]
        last = next(iter(part)) if last == "*" else last
        assert last in part
        part[last] = value
        torch.save(checkpoint, tmp_path / "last.pt")
        text = sentence(["--resume", str(tmp_path), "--limit-steps", "26"])
        assert re.search(r"is damaged|is not a run of this trainer|is not the checkpoint of a whole run", text), text
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_an_older_checkpoint_does_not_replace_the_later_ones(tmp_path):
    train(tmp_path, "run", "--grad", "ste", "--limit-steps", "2")
    (tmp_path / "run" / "copy.pt").write_bytes((tmp_path / "run" / "last.pt").read_bytes())
    copy = str(tmp_path / "run" / "copy.pt")
    assert "copy it to another folder as last.pt" in sentence(["--resume", copy, "--limit-steps", "4"])
    assert train_fsg.main(["--resume", copy, "--eval-only"]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "copy.pt").rename(tmp_path / "other" / "last.pt")
    assert train_fsg.main(["--resume", str(tmp_path / "other"), "--limit-steps", "4"]) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 2 and metrics(tmp_path / "other")[-1]["step"] == 4


def test_a_folder_with_another_best_does_not_change(tmp_path):
    train(tmp_path, "run", "--grad", "ste", "--limit-steps", "44", "--epochs", "3")
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "last.pt").rename(tmp_path / "other" / "last.pt")
    mine = {"best.pt": "mine", "metrics.csv": "mine", "args.json": "mine"}
    for name, text in mine.items():
        (tmp_path / "other" / name).write_text(text)
    assert "damaged or not a checkpoint" in sentence(["--resume", str(tmp_path / "other"), "--limit-steps", "50"])
    assert {name: (tmp_path / "other" / name).read_text() for name in mine} == mine


def test_a_test_of_weights_that_are_not_finite_fails(a_run, tmp_path):
    checkpoint = torch.load(a_run / "best.pt", weights_only=True)
    checkpoint["model"]["conv1.weight"].fill_(math.nan)
    torch.save(checkpoint, tmp_path / "nan.pt")
    assert "not finite" in sentence(["--eval-only", "--resume", str(tmp_path / "nan.pt")])


def test_control_characters_of_a_file_do_not_reach_the_terminal(a_run, tmp_path, capsys):
    checkpoint = torch.load(a_run / "best.pt", weights_only=True)
    checkpoint["args"]["arch"] = "a\x1b[2J\nb"
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(SystemExit) as e:
        runs.command(lambda: train_fsg.main([*SMALL, "--pretrained", str(tmp_path / "best.pt")]))
    assert "is of a?[2J?b, not of resnet8" in e.value.code and e.value.code.isprintable()


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another --out" in sentence([*SMALL, *TINY_NETS, "--out", str(tmp_path / "file")])


def test_a_failed_save_keeps_the_checkpoint_before_it(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    runs.save(path, {"step": 1})

    def full_disk(state, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(runs.RunError, match=r"No space left on device.*the old file has not changed"):
        runs.save(path, {"step": 2})
    monkeypatch.undo()
    assert runs.load(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@each_trainer
def test_a_loss_that_becomes_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, trainer):
    extra = ["--grad", "ste"] if trainer is train_fsg else ["--opt", "sgd"]
    train(tmp_path, "run", *extra, "--epochs", "1", trainer=trainer)
    last = tmp_path / "run" / "last.pt"
    good = last.read_bytes()
    text = sentence(["--resume", str(last), "--epochs", "3", "--lr", "1e30"], trainer)
    assert re.search(r"became NaN or infinite in step \d+, epoch 2", text) and str(last) in text
    assert last.read_bytes() == good
    text = sentence([*SMALL, *extra, "--out", str(tmp_path), "--name", "new", "--lr", "1e30"], trainer)
    assert "no checkpoint yet" in text and not (tmp_path / "new" / "last.pt").exists()


def test_latent_weights_that_become_nan_are_noticed_though_their_signs_are_not(tmp_path):
    """sign(NaN) is −1, so the loss stays finite; it is φ, without bounds, that does this first."""
    argv = [*SMALL, *TINY_NETS, "--out", str(tmp_path), "--name", "run", "--opt", "sgd", "--lr-fast", "1e30"]
    argv += ["--balance", "none"]
    assert "weight became NaN" in sentence([*argv, "--epochs", "3"])
    assert not (tmp_path / "run" / "last.pt").exists()
    assert "weight became NaN" in sentence([*argv, "--epochs", "3"]), "the name of a run that left nothing is free"


@pytest.mark.parametrize(
    "flags",
    [["--batch-size", "32"], ["--opt", "sgd"], ["--quantizer", "none"], ["--weight-decay", "0.5"], ["--lr-slow", "1"]],
    ids=" ".join,
)
def test_a_run_stays_the_same_run(a_run, flags):
    text = sentence(["--resume", str(a_run), "--limit-steps", "40", *flags])
    assert f"{flags[0]} cannot change" in text and "--pretrained" in text


def test_resuming_from_within_the_run_folder(tmp_path, monkeypatch):
    train(tmp_path, "run", "--grad", "ste", "--limit-steps", "3")
    monkeypatch.chdir(tmp_path / "run")
    assert train_fsg.main(["--resume", ".", "--limit-steps", "5"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and metrics(tmp_path / "run")[-1]["step"] == 5


def test_a_test_is_of_the_network_that_was_trained(tmp_path):
    train(tmp_path, "run", "--grad", "ste", "--quantizer", "bwn-f", "--act", "sign", "--limit-steps", "3")
    best = str(tmp_path / "run" / "best.pt")
    assert f"--resume {best}" in sentence([*SMALL, "--eval-only", "--pretrained", best])
    assert train_fsg.main(["--eval-only", "--resume", best]) == 0


@pytest.mark.parametrize(
    "flags",
    [
        *(["--limit-steps", "-5"], ["--limit-steps", "0"], ["--weight-decay", "-1"], ["--image-size", "0"]),
        *(
            ["--workers", "-1"],
            ["--seed", str(2**70)],
            ["--batch-size", "1"],
            ["--lr-fast", "nan"],
            ["--lr-slow", "-1"],
        ),
    ],
    ids=" ".join,
)
def test_numbers_out_of_range(tmp_path, flags):
    assert flags[0] in sentence([*SMALL, *TINY_NETS, "--out", str(tmp_path), *flags])


def test_names_with_brackets_and_colons(tmp_path, capsys):
    train(tmp_path, "a[b]:x:[-c]", "--grad", "ste", "--limit-steps", "2")
    assert "a[b]:x:[-c]" in capsys.readouterr().out


LARGE = [
    (train_fsg, ["--arch", "resnet8", "--grad", "ste", "--image-size", "64"]),
    (train_sibnn, ["--arch", "birealnet8", "--image-size", "64"]),
    (train_proxconnect, ["--arch", "test_vit"]),  # at 160 pixels, timm's size for it
    (train_bihalf, ["--arch", "birealnet8-prelu", "--image-size", "64"]),
]


@pytest.mark.parametrize("trainer, extra", LARGE, ids=name_of)
def test_large_images_are_streamed_resumed_and_bit_for_bit_the_same(tmp_path, monkeypatch, trainer, extra):
    """The path of ImageNet: DataLoader workers, RandomResizedCrop; stopped and resumed within an epoch."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (110, 130, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.jpg")
    common = ["--dataset", "imagenet", "--data-dir", str(tmp_path / "data"), *extra, "--out", str(tmp_path)]
    common += ["--batch-size", "4", "--epochs", "2", "--workers", "2", "--device", "cpu"]
    assert trainer.main([*common, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        assert trainer.main([*common, "--name", "parts"]) == 128 + signal.SIGINT
    assert trainer.main(["--resume", str(tmp_path / "parts")]) == 0
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        same_bits(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# What is particular to a paper.


def network(folder, trainer, quantizer, act="none", arch="resnet8"):
    """The network in a run's last checkpoint, with that quantizer."""
    state = torch.load(folder / "last.pt", weights_only=True)
    net = models.build(arch, 10, quantizer, act, in_channels=1, image_size=8)
    net.load_state_dict(state["model"])
    return net.eval()


def digits():
    return data.load("digits", device="cpu")[2]


def test_sibnn_logs_the_zeros_of_each_layer_and_keeps_latent_weights_in_bounds(tmp_path):
    others = ["--val", "100", "--bn-batches", "2"]  # in these images they are not counted
    row = train(tmp_path, "run", "--epochs", "2", "--lr", "0.1", "--rho", "0.6", *others, trainer=train_sibnn)[-1]
    net = network(tmp_path / "run", train_sibnn, "bwn-f", "si")
    names, layers = models.binary_layer_names(net), models.binary_layers(net)
    zeros = {name: [] for name in names}
    for name, layer in zip(names, layers, strict=True):
        assert layer.weight.abs().max() == 1, "at this learning rate some weight has hit the bound"
        layer.register_forward_pre_hook(
            lambda layer, x, name=name: zeros[name].append((layer.binary_input(x[0]) == 0).double().mean().item())
        )
    test = data.load("digits", device="cpu", val=100)[2]
    net(torch.cat([images for images, _ in test.epoch()]))
    for name, (share,) in zeros.items():
        assert math.isclose(row[f"zeros/{name}"], share, rel_tol=1e-4) and 0 < share < 1
    assert math.isclose(row["zeros"], sum(z for (z,) in zeros.values()) / len(names), rel_tol=1e-4)
    signed = train(tmp_path, "signed", "--limit-steps", "2", "--act", "sign", trainer=train_sibnn)[-1]
    assert signed["zeros"] == 0


def test_sibnn_clamps_the_weights_that_it_starts_from(tmp_path):
    train(tmp_path, "first", "--limit-steps", "2", trainer=train_sibnn)
    best = tmp_path / "first" / "best.pt"
    checkpoint = torch.load(best, weights_only=True)
    weights = [key for key in checkpoint["model"] if key.endswith(".delta")]
    weights = [key.replace("delta", "weight") for key in weights]
    for key in weights:
        checkpoint["model"][key] *= 1e4
    torch.save(checkpoint, best)
    frozen = ["--pretrained", str(best), "--opt", "sgd", "--lr", "1e-30", "--weight-decay", "0", "--limit-steps", "1"]
    train(tmp_path, "run", *frozen, trainer=train_sibnn)
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for key in weights:
        assert torch.equal(trained[key], checkpoint["model"][key].clamp(-1, 1)) and trained[key].abs().max() == 1
    row = metrics(tmp_path / "run")[0]
    assert row["flip_ratio"] == 0


def test_sibnn_decays_no_thresholds(tmp_path):
    """With nothing but weight decay moving them, weights shrink and thresholds do not."""
    extra = ["--limit-steps", "2", "--opt", "sgd", "--lr", "1e-4", "--weight-decay", "1000"]
    train(tmp_path, "run", *extra, trainer=train_sibnn)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert all((state[k] - 1).abs().max() < 0.01 for k in state if k.endswith(".delta"))
    assert all((state[k] - 0.81).abs().max() < 0.01 for k in state if "bn1.weight" in k)


@pytest.mark.parametrize(
    "extra, plus, zero", [([], 0.5, 0), (["--ratio", "0.7"], 0.7, 0), (["--prune", "0.6"], 0.2, 0.6)]
)
def test_bihalf_has_exactly_the_requested_bits_in_every_filter(tmp_path, extra, plus, zero):
    first, row = train(tmp_path, "run", "--limit-steps", "30", "--epochs", "2", *extra, trainer=train_bihalf)
    assert first["flip_ratio"] > 0
    net = network(tmp_path / "run", train_bihalf, "bihalf-prune" if zero else "bihalf")
    for name, layer in zip(models.binary_layer_names(net), models.binary_layers(net), strict=True):
        layer.options = {"prune": zero} if zero else {"ratio": plus}
        bits = layer.binary_weight().flatten(1)
        n = bits.shape[1]
        pluses = (bits > 0).sum(1).unique().item()  # the same in every filter
        zeros = (bits == 0).sum(1).unique().item()
        share = Fraction(repr(zero or 1 - plus)).limit_denominator(1000)
        if zero:
            i, j = (math.floor((1 + sign * share) / 2 * n) for sign in (-1, 1))
            assert (pluses, zeros) == (n - j, j - i)
        else:
            assert (pluses, zeros) == (n - math.floor(share * n), 0)
        assert row[f"plus/{name}"] == float(f"{pluses / n:.6g}")


def test_bihalf_recipes_are_the_papers_and_flags_go_before_them():
    def recipe(*argv):
        args = train_bihalf.flags().parse_args(argv)
        train_bihalf.complete(args)
        return args

    a = recipe("--dataset", "cifar100", "--arch", "vgg16")
    assert (a.epochs, a.weight_decay, a.schedule, a.milestones, a.act) == (350, 5e-4, "step", [150, 250, 320], "none")
    a = recipe("--dataset", "imagenet", "--arch", "birealnet34-prelu", "--epochs", "7")
    assert (a.epochs, a.batch_size, a.milestones, a.act, a.lr) == (7, 256, [30, 60, 90], "sign", 0.1)
    a = recipe("--arch", "conv6", "--weight-decay", "0")
    assert (a.epochs, a.weight_decay, a.schedule, a.batch_size) == (100, 0, "cosine", 128)


def test_the_toy_example(tmp_path, capsys):
    assert train_bihalf.main(["--toy", "--out", str(tmp_path)]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert ["6", "924", "432", "66"] in rows and ["any", "4,096", "1,704", "76"] in rows
    with Image.open(tmp_path / "toy.png") as image:
        assert len(set(image.convert("RGB").tobytes())) > 50, "it is not blank"
    (tmp_path / "file").write_text("")
    assert "choose another --out" in sentence(["--toy", "--out", str(tmp_path / "file")], train_bihalf)


def test_the_toys_networks_are_the_ones_the_paper_counts():
    points = torch.randn(5, 2, dtype=torch.float64)
    units, networks, plus = train_bihalf.all_networks(points)
    found = {tuple(row) for row in units[networks].sum(1).mul(1e9).round().long().tolist()}
    for bits in itertools.product([-1.0, 1.0], repeat=12):
        w = torch.tensor(bits, dtype=torch.float64)
        hidden = torch.sigmoid(points @ w[:6].view(2, 3) + w[6:9])
        assert tuple((hidden @ w[9:]).mul(1e9).round().long().tolist()) in found
    assert torch.equal(plus.bincount(), torch.tensor([math.comb(12, k) for k in range(13)]))
