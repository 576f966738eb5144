"""train_proxconnect.py: the methods' weights and schedules, BatchNorm of the tested signs, networks of timm."""

import copy
import csv
import functools
import math
import random
import sys

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data
import export
import models
import quantizers
import runs
import train_proxconnect

SMALL = ["--dataset", "digits", "--arch", "resnet8", "--batch-size", "64", "--device", "cpu"]
METHODS = list(train_proxconnect.METHODS)
RELAXED = ("bnn++", "pc", "rpc", "pq", "parq")
VIT = ["--arch", "test_vit", "--patch-size", "2"]


def train(out, name, *extra):
    """One run in this process; its metrics, a dictionary an epoch."""
    assert train_proxconnect.main([*SMALL, "--out", str(out), "--name", name, *extra]) == 0
    with open(out / name / "metrics.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def network(folder, file="last.pt"):
    """The network in a run's checkpoint, in eval mode."""
    state = torch.load(folder / file, weights_only=True)
    args = train_proxconnect.flags().parse_args([])
    vars(args).update(state["args"])
    net = train_proxconnect.network(args, 10, (1, 8, 8))
    net.load_state_dict(state["model"])
    return net.eval()


def latents(net):
    return torch.cat([(layer.weight / layer.unit).flatten() for layer in models.binary_layers(net)]).detach()


# ---------------------------------------------------------------------------------------------------------------------
# Weights and schedules.


@pytest.mark.parametrize("method", METHODS)
def test_true_signs_are_tested_and_the_relaxed_network_too(tmp_path, method):
    row = train(tmp_path, "run", "--epochs", "3", "--method", method)[-1]
    images, labels = (torch.cat(x) for x in zip(*data.load("digits")[2].epoch(), strict=True))
    net = network(tmp_path / "run")
    assert bool(models.binary_layers(net)) == (method != "fp")

    def loss():
        return F.cross_entropy(net(images), labels).item()

    # The checkpoint contains the statistics of the signs; those of the relaxed weights are estimated again.
    with train_proxconnect.true_signs(models.binary_layers(net)):
        assert math.isclose(row["test_loss"], loss(), rel_tol=1e-3)
    assert ("relaxed_loss" in row) == (method in RELAXED)
    if method not in RELAXED:
        return
    for layer in models.binary_layers(net):
        layer.options = {"bnn++": {"mu": 30.0}, "pc": {"rho": 10.0}}.get(method, {})  # the schedules' ends
    batches = data.load("digits", batch_size=64)[0]
    with runs.reestimate_batchnorm(net, batches, torch.device("cpu"), amp=False):
        assert math.isclose(row["relaxed_loss"], loss(), rel_tol=1e-3)
    if method == "bnn++":
        assert row["relaxed_loss"] != row["test_loss"]


@pytest.mark.parametrize("method", RELAXED)
def test_the_relaxed_network_ends_binary(tmp_path, method):
    epochs = "8" if method == "bnn++" else "4"
    row = train(tmp_path, "run", "--epochs", epochs, "--method", method)[-1]
    assert row["test_acc"] > 0.85
    assert abs(row["relaxed_acc"] - row["test_acc"]) < 0.02


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fp"])
def test_weights_are_of_order_one_in_their_unit(method):
    args = train_proxconnect.flags().parse_args([*SMALL, "--method", method])
    train_proxconnect.complete(args)
    net = train_proxconnect.network(args, 10, (1, 8, 8))
    for layer in models.binary_layers(net):
        assert layer.unit == layer.scale == models.he_scale(layer)
    assert 0.5 < latents(net).std() < 1.5


@pytest.mark.parametrize("method", ["bnn+", "bnn++"])
def test_swish_methods_start_where_their_gradient_is_positive(tmp_path, method):
    train(tmp_path, "fp", "--method", "fp", "--epochs", "2")
    keep = ["--method", method, "--lr", "0", "--limit-steps", "1"]
    train(tmp_path, "a", *keep, "--pretrained", str(tmp_path / "fp" / "best.pt"))
    weights = torch.load(tmp_path / "fp" / "best.pt", weights_only=True)["model"]
    net = network(tmp_path / "a")
    for name, layer in zip(models.binary_layer_names(net), models.binary_layers(net), strict=True):
        w = layer.weight / layer.unit
        assert w.square().mean().sqrt().item() == pytest.approx(1 / 5, rel=1e-4)
        assert F.cosine_similarity(w.flatten(), weights[f"{name}.weight"].flatten(), dim=0) > 0.9999
    train(tmp_path, "b", *keep, "--pretrained", str(tmp_path / "a" / "best.pt"))
    assert torch.equal(latents(network(tmp_path / "b")), latents(net)), "weights of such a run are kept"


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("method, name, ends", [("bnn++", "mu", (5, 30)), ("pc", "rho", (0.01, 10))])
def test_schedules_begin_and_end_at_their_values(tmp_path, monkeypatch, method, name, ends, steps):
    seen = []
    count = runs.Run.count

    def record(self, *args):
        seen.append(models.binary_layers(self.state["model"])[0].options[name].item())
        count(self, *args)

    monkeypatch.setattr(runs.Run, "count", record)
    train(tmp_path, "run", "--method", method, "--limit-steps", str(steps))
    even = [ends[0] + (ends[1] - ends[0]) * i / max(1, steps - 1) for i in range(steps)]
    assert seen == pytest.approx(even if steps > 1 else [ends[1]])


def test_the_default_schedules_are_those_that_the_help_shows(tmp_path):
    """5 30 and 5.0 30.0 are the same μ: it rises evenly, not in whole numbers."""
    given = train(tmp_path, "given", "--limit-steps", "22", "--mu", "5", "30")
    default = train(tmp_path, "default", "--limit-steps", "22")
    assert given[0]["train_loss"] == default[0]["train_loss"]


def test_parq_clips_each_filter_at_its_mean_magnitude():
    w = torch.tensor([[-3.0, -1.0, 0.0, 0.5, 1.5], [10.0, 0.0, 0.0, 0.0, -2.5]], requires_grad=True)  # means 1.2, 2.5
    soft = quantizers.parq(w, torch.tensor(0.5))
    assert torch.equal(soft, torch.tensor([[-1.2, -1.2, 0.0, 1.0, 1.2], [2.5, 0.0, 0.0, 0.0, -2.5]]))
    grad = torch.randn(2, 5)
    soft.backward(grad)
    assert torch.equal(w.grad, grad)
    assert torch.equal(quantizers.parq(w, 1.0)[0], w[0].clamp(-1.2, 1.2))
    hard = quantizers.parq(w)
    assert torch.equal(hard, quantizers.bwn_f(w)) and torch.equal(hard, quantizers.parq(w, torch.tensor(0.0)))


def test_parq_is_binary_from_90_percent_of_the_run_on(tmp_path, monkeypatch):
    seen = []
    count = runs.Run.count

    def record(self, *args):
        layer = models.binary_layers(self.state["model"])[0]
        w = layer.binary_weight().detach().flatten(1).abs()
        seen.append((layer.options["inverse_slope"].item(), torch.allclose(w, w[:, :1].expand_as(w))))
        count(self, *args)

    monkeypatch.setattr(runs.Run, "count", record)
    train(tmp_path, "run", "--method", "parq", "--limit-steps", "21")
    slopes, binary = zip(*seen, strict=True)
    assert slopes[0] == 1 and slopes[9] == pytest.approx(0.5) and list(slopes) == sorted(slopes, reverse=True)
    assert all(slope > 0 for slope in slopes[:18]) and slopes[18:] == (0, 0, 0)
    assert binary == (False,) * 18 + (True,) * 3


def test_parq_equals_torchaos():
    """A latent weight that SGD moves by the gradient at the quantized weight, over the whole schedule."""
    theirs = pytest.importorskip("torchao.prototype.parq.optim")
    lsbq = pytest.importorskip("torchao.prototype.parq.quant").LSBQuantizer
    torch.manual_seed(0)
    start, target, steps = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3), 40
    p, latent = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([{"params": [p], "quant_bits": 1}], 0.1)
    prox = theirs.ProxPARQ(0, round(train_proxconnect.PARQ_END * steps))
    optimizer = theirs.QuantOptimizer(sgd, lsbq(), prox, quant_period=1, quant_per_channel=True)
    ours = torch.optim.SGD([latent], 0.1)
    w = latent  # theirs computes the first gradient at the latent weight
    for step in range(steps):
        for one, value in ((optimizer, p), (ours, w)):
            one.zero_grad()
            F.mse_loss(value, target, reduction="sum").backward()
            one.step()
        w = quantizers.parq(latent, train_proxconnect.inverse_slope(step / steps / train_proxconnect.PARQ_END))
        assert torch.allclose(w, p, rtol=1e-5, atol=1e-6), step
    assert (w.flatten(1).abs().std(1) < 1e-6).all()


def test_proxquant_ends_binary(tmp_path):
    train(tmp_path, "run", "--epochs", "3", "--method", "pq")
    assert torch.allclose(latents(network(tmp_path / "run")).abs(), torch.ones(()))


# ---------------------------------------------------------------------------------------------------------------------
# BatchNorm.


def test_reestimation_is_reproducible_and_leaves_everything_as_it_was():
    torch.manual_seed(0)
    net = models.build("resnet8", 10, "bwn", in_channels=1)
    net.bn_fc = torch.nn.Sequential(net.bn_fc, torch.nn.Dropout(0.5))
    batches = data.load("digits", batch_size=64)[0]
    device = torch.device("cpu")
    net.train()
    net(next(iter(batches.epoch()))[0])
    before, momenta = copy.deepcopy(net.state_dict()), [m.momentum for m in net.modules() if hasattr(m, "momentum")]
    rng, python, arrays = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    states = []
    for _ in range(2):
        with runs.reestimate_batchnorm(net, batches, device, amp=False, count=10):
            assert net.training and all(m.training for m in net.modules())
            states.append(copy.deepcopy(net.state_dict()))
    assert all(torch.equal(states[0][k], states[1][k]) for k in before)
    changed = {k for k in before if not torch.equal(before[k], states[0][k])}
    assert changed == {k for k in before if k.endswith(("running_mean", "running_var"))}
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert momenta == [m.momentum for m in net.modules() if hasattr(m, "momentum")]
    assert torch.equal(rng, torch.get_rng_state()) and python == random.getstate()
    assert (arrays == numpy.random.get_state()[1]).all()
    # The same as torch.optim.swa_utils, which has no eval mode.
    twin = copy.deepcopy(net)
    images = [x for (x, _), _ in zip(batches.epoch(), range(10), strict=False)]
    torch.optim.swa_utils.update_bn(images, twin)
    for k in changed:
        assert torch.allclose(states[0][k], twin.state_dict()[k], rtol=1e-4, atol=1e-5), k


def test_reestimation_restores_after_an_error():
    net = models.build("resnet8", 10, "bwn", in_channels=1)
    before = copy.deepcopy(net.state_dict())
    batches = data.load("digits", batch_size=64)[0]
    with pytest.raises(KeyError), runs.reestimate_batchnorm(net, batches, torch.device("cpu"), False, 2):
        raise KeyError
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_checkpoints_and_exports_contain_what_was_tested(tmp_path, capsys):
    rows = train(tmp_path, "run", "--epochs", "4", "--method", "bnn++")
    test = data.load("digits")[2]
    for file, accuracy in (("best.pt", rows[-1]["test_acc"]), ("last.pt", rows[-1]["test_acc"])):
        net = export.read(tmp_path / "run" / file).net
        found = runs.evaluate(net, test, torch.device("cpu"), amp=False)["acc"]
        assert found == pytest.approx(accuracy, abs=1e-6)
        capsys.readouterr()
        assert train_proxconnect.main(["--eval-only", "--resume", str(tmp_path / "run" / file)]) == 0
        assert f"{100 * accuracy:.2f} %" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate and optimizer.


def test_the_warmup_is_linear(tmp_path):
    args = ["--method", "bc", "--schedule", "none", "--lr", "0.01", "--epochs", "3", "--limit-steps", "50"]
    seen, real = [], runs.Run.set_learning_rate

    def record(self, *arguments):
        seen.append(real(self, *arguments))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "set_learning_rate", record)
        train(tmp_path, "run", *args, "--warmup", "2", "--opt", "adamw")
    assert seen == pytest.approx([0.01 * min(1, (i + 1) / 45) for i in range(50)])  # 2 epochs of 22 steps


# ---------------------------------------------------------------------------------------------------------------------
# timm.


@pytest.fixture
def timm():
    data.torchvision_module("models")
    return pytest.importorskip("timm")


def test_transformers(tmp_path, monkeypatch, timm):
    vit = [*VIT, "--epochs", "5"]
    rows = train(tmp_path, "bc", *vit, "--method", "bc")
    assert rows[-1]["train_loss"] < 0.97 * rows[0]["train_loss"] and rows[0]["flip_ratio"] > 0.01
    assert train_proxconnect.main(["--resume", str(tmp_path / "bc"), "--epochs", "6"]) == 0
    args = train_proxconnect.flags().parse_args([*vit, "--method", "bc"])
    net = train_proxconnect.network(args, 10, (1, 8, 8))
    blocks = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear) and name.startswith("blocks")]
    assert models.binary_layer_names(net) == blocks, "all linear layers of the blocks, and nothing else"
    w = models.binary_layers(net)[0]
    assert torch.allclose(w.binary_weight().abs(), torch.full_like(w.weight, (2 / 64) ** 0.5)), "±√2/√fan_in"

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    def sentence(argv):
        with pytest.raises(runs.RunError) as e:
            train_proxconnect.main(argv)
        return str(e.value)

    monkeypatch.setattr("timm.create_model", no_network)
    says = sentence([*SMALL, *vit, "--pretrained-timm", "--out", str(tmp_path)])
    assert "with its weights" in says and "no route to host" in says and "leave out --pretrained-timm" in says
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in sentence([*SMALL, *vit, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "arch, sizes, heads",
    [
        ("swinv2_tiny_window8_256", {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}, ["head.fc"]),
        ("beit_base_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 2}, ["head"]),
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 2}, ["head", "head_dist"]),
    ],
)
def test_transformers_that_read_weights_or_have_two_heads(tmp_path, monkeypatch, timm, arch, sizes, heads):
    monkeypatch.setattr("timm.create_model", functools.partial(timm.create_model, **sizes))
    small = ["--arch", arch, "--patch-size", "2", "--limit-steps", "3", "--lr", "0.02"]
    assert train(tmp_path, "run", *small)[-1]["flip_ratio"] > 0
    net = network(tmp_path / "run")
    linear = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    assert models.binary_layer_names(net) == [name for name in linear if name not in heads]
    with train_proxconnect.true_signs(models.binary_layers(net)):
        assert not models.latent_readers(net, torch.randn(2, 1, 8, 8))
    if len(heads) == 1:
        with pytest.raises(runs.RunError, match=rf"{arch}, or --act none.*qkv without calling"):
            train(tmp_path, "sign", *small, "--act", "sign")
    else:
        train(tmp_path, "sign", *small, "--act", "sign")


@pytest.mark.parametrize("flag", ["--mixup", "--cutmix"])
def test_images_and_labels_are_mixed_as_timm_mixes_them(tmp_path, monkeypatch, timm, flag):
    seen = {}

    def record(name):
        loss = F.cross_entropy

        def cross_entropy(logits, target, **options):
            seen[name].append((target, options.get("label_smoothing", 0.0)))
            return loss(logits, target, **options)

        return cross_entropy

    images = {}
    real = train_proxconnect.Mixup.__call__

    def keep(self, x, y, step):
        given = x.clone(), y.clone()
        images[step] = (*given, *real(self, x, y, step))
        return images[step][2:]

    monkeypatch.setattr(train_proxconnect.Mixup, "__call__", keep)
    numpy_state = numpy.random.get_state()[1].copy()
    for name in ("one", "two"):
        seen[name] = []
        with monkeypatch.context() as patch:
            patch.setattr(F, "cross_entropy", record(name))
            options = ["--limit-steps", "3", "--accumulate", "2", "--label-smoothing", "0.1", "--batch-size", "10"]
            train(tmp_path, name, *options, flag, "0.8")
    assert (numpy.random.get_state()[1] == numpy_state).all(), "the global random numbers are as they were"
    for (a, _), (b, _) in zip(seen["one"], seen["two"], strict=True):
        assert torch.equal(a, b), "the seed decides"
    assert [smoothing for _, smoothing in seen["one"][:6]] == [0.1] * 6 and seen["one"][0][0].shape == (5, 10)
    shares = set()
    for x, y, mixed, target in images.values():
        share = target.gather(1, y[:, None])[:, 0]
        other = target.gather(1, y.flip(0)[:, None])[:, 0]
        apart = y != y.flip(0)
        assert torch.allclose(target.sum(1), torch.ones(10)) and torch.allclose((share + other)[apart], torch.ones(()))
        lam = share[apart][0].item()
        shares.add(round(lam, 5))
        if flag == "--mixup":
            assert torch.allclose(mixed, lam * x + (1 - lam) * x.flip(0), atol=1e-5)
        else:
            own = (mixed == x).all(1)  # of each pixel
            assert (own | (mixed == x.flip(0)).all(1)).all() and own.float().mean().item() >= lam - 1e-6
    assert len(shares) == 3, "another share in every step"


def test_mixing_wants_pairs_and_timm(tmp_path, monkeypatch, timm):
    def sentence(*extra):
        with pytest.raises(runs.RunError) as e:
            train_proxconnect.main([*SMALL, "--out", str(tmp_path), *extra])
        return str(e.value)

    assert "even part per process" in sentence("--mixup", "1", "--batch-size", "15")
    assert "--cutmix must be at least 0" in sentence("--cutmix", "-1")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm, or leave them out" in sentence("--mixup", "1")
    assert not list(tmp_path.iterdir())


def completed(*argv):
    args = train_proxconnect.flags().parse_args(argv)
    train_proxconnect.complete(args)
    return args


def test_transformers_are_trained_as_deit(timm):
    a = completed("--arch", "vit_base_patch16_224", "--dataset", "imagenet")
    assert (a.opt, a.epochs, a.warmup, a.weight_decay, a.schedule) == ("adamw", 300, 5, 0.05, "cosine")
    a = completed("--arch", "vit_base_patch16_224", "--pretrained-timm", "--epochs", "2")
    assert a.warmup == 0.1 and a.epochs == 2
    a = completed("--arch", "resnet20")
    assert (a.opt, a.warmup, a.weight_decay) == ("sgdm", 0, 0)
    a = completed(*VIT, "--method", "bnn++")
    net = train_proxconnect.network(a, 10, (1, 8, 8))
    decays, rest = train_proxconnect.optimizer_groups(net, a)
    latent = {layer.weight for layer in models.binary_layers(net)}
    assert latent <= set(rest["params"]) and rest["weight_decay"] == 0 and net.head.weight in set(decays["params"])
    not_decayed = {net.get_parameter(name) for name in ("cls_token", "pos_embed")}  # as in DeiT
    assert not_decayed <= set(rest["params"]) and all(p.dim() > 1 for p in decays["params"])
    assert len(decays["params"]) + len(rest["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize("arch", ["vit_base_patch16_224", "deit_tiny_patch16_224", "test_vit"])
def test_transformers_have_timms_data_configuration(timm, arch):
    args = completed("--arch", arch, "--dataset", "imagenet", "--no-flip")
    options = train_proxconnect.data_options(args)
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(arch).to_dict())
    assert options["mean"] == config["mean"] and options["std"] == config["std"]
    if arch == "vit_base_patch16_224":
        assert options["mean"] == (0.5, 0.5, 0.5)
    size = config["input_size"][-1]
    assert args.image_size == size
    image = Image.effect_noise((300, 260), 80).convert("RGB")
    expected = timm.data.create_transform(**config)(image)
    assert torch.equal(options["transforms"][1](image), expected) and expected.shape == (3, size, size)
    once = []
    for _ in range(2):
        torch.manual_seed(1)
        once.append(options["transforms"][0](image))
    assert torch.equal(*once) and once[0].shape == (3, size, size), "PyTorch's seed is the only one"
    assert not torch.equal(options["transforms"][0](image), once[0])


def test_transformers_of_small_images_have_timms_normalisation(timm, tmp_path):
    train(tmp_path, "run", *VIT, "--limit-steps", "2")
    scale, shift = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["normalisation"]
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("test_vit").to_dict())
    mean, std = sum(config["mean"]) / 3, sum(config["std"]) / 3
    assert scale == pytest.approx([1 / (255 * std)]) and shift == pytest.approx([-mean / std])
