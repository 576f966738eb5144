"""Replays of the golden files of networks: Si-BNN, Equal Bits and IR-Net. tests/replay.py calls these functions.

Each function takes an opened .npz file and returns the worst error of each kind. Numbers are relative to the largest
element of the stored array. What must be equal, such as shapes and bits, counts 0 if it is and infinity if not. Initial
statistics count how far they are beyond five standard errors. All sizes are read from the file.

sign(0) is +1 here and 0 in the authors' codes, and Si-BNN's step gives 1 at its threshold and 0.5 in the authors'
code. Such elements are left out.
"""

import math
from argparse import Namespace
from fractions import Fraction

import numpy as np
import torch

import models
import quantizers
import runs
import train_bihalf
import train_sibnn

torch_of = lambda array: torch.from_numpy(np.asarray(array))


class Errors(dict):
    """The largest error of each name."""

    def add(self, name: str, error: float) -> None:
        self[name] = max(self.get(name, 0.0), math.inf if math.isnan(error) else float(error))

    def compare(self, name: str, ours: torch.Tensor, theirs: np.ndarray, where: torch.Tensor | None = None) -> None:
        theirs = torch_of(theirs).to(ours.dtype)
        if ours.shape != theirs.shape:
            return self.add(name, math.inf)
        difference, largest = (ours.detach() - theirs).abs(), theirs.abs().max().item()
        difference = difference if where is None else difference[where]
        self.add(name, difference.max().item() / (largest or 1.0) if difference.numel() else 0.0)

    def equal(self, name: str, ours, theirs) -> None:
        self.add(name, 0.0 if ours == theirs else math.inf)


def under(npz, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): npz[name] for name in npz.files if name.startswith(prefix)}


def groups(npz, prefix: str) -> list[str]:
    """The first parts of the names that follow the prefix: groups(npz, "block_") is ["block_down/", "block_plain/"]."""
    return sorted({f"{prefix}{n.removeprefix(prefix).split('/')[0]}/" for n in npz.files if n.startswith(prefix)})


def load(module: torch.nn.Module, arrays: dict[str, np.ndarray], rename) -> None:
    module.load_state_dict({rename(name): torch_of(array) for name, array in arrays.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Blocks.


def binary_block(kind: type, npz, block: str, weight: str, act: str, **kwargs) -> torch.nn.Module:
    """A block of the sizes in the file, in float64, whose 3×3 convolutions are binary."""
    c_out, c_in = npz[f"{block}init/conv1.weight"].shape[:2]
    outputs = next(array for name, array in under(npz, block).items() if name.endswith("output"))
    stride = round(npz[f"{block}input"].shape[2] / outputs.shape[2])
    net = kind(c_in, c_out, stride, **kwargs).double()
    return models.binarize_(net, weight, act, first=True, last=True)


def replay_block(errors: Errors, net, npz, block: str, case: str, rename) -> None:
    """A pass in training mode with its gradients and running statistics, and one in evaluation mode.

    case: the prefix of the results, such as "block_plain/half/". rename: the authors' name of a parameter -> ours.
    """
    theirs, binary = under(npz, case), {}

    def keep_binary_weight(name, layer):
        def binary_weight():
            binary[name] = type(layer).binary_weight(layer)
            binary[name].retain_grad()
            return binary[name]

        layer.binary_weight = binary_weight

    for name in ("conv1", "conv2"):
        keep_binary_weight(name, net.get_submodule(name))
    x = torch_of(npz[f"{block}input"]).requires_grad_()
    output = net.train()(x)
    output.backward(torch_of(npz[f"{block}cotangent"]))
    errors.compare("output", output, theirs["output"])
    errors.compare("input gradient", x.grad, theirs["grad/input"])
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    for name, array in theirs.items():
        kind, _, rest = name.partition("/")
        if kind == "grad" and rest != "input":
            errors.compare("gradients", parameters[rename(rest)].grad, array)
        elif kind == "after":
            errors.compare("running statistics", buffers[rename(rest)], array)
        elif kind == "binary_weight":
            errors.compare("binary weights", binary[rest], array)
        elif kind == "ghat":
            errors.compare("gradients at the binary weights", binary[rest].grad, array)
    for name in ("conv1", "conv2"):
        del net.get_submodule(name).binary_weight
    with torch.no_grad():
        errors.compare("output in evaluation mode", net.eval()(x), theirs["output_eval"])


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks: lists of parameters, and how they start.


def resnet(npz, network: str, arch: str, act: str, quantizer: str) -> torch.nn.Module:
    """The network of that name, with blocks, widths, stem and number of classes as in the file."""
    names, shapes = npz[f"{network}parameter_names"].tolist(), npz[f"{network}parameter_shapes"].tolist()
    shape_of = {name: tuple(map(int, shape.split(","))) for name, shape in zip(names, shapes, strict=True)}
    widths = [shape_of[name][0] for name in npz[f"{network}binary_parameters"].tolist()]
    stages = list(dict.fromkeys(widths))
    first, stem = shape_of[names[0]], "imagenet" if shape_of[names[0]][-1] == 7 else "cifar"
    net = models.ResNet(
        [widths.count(width) // 2 for width in stages],
        stages,
        shape_of[names[-1]][0],
        first[1],
        stem=stem,
        **models.resnet_design(arch, act, stem),
    )
    models.initialise(net, arch)
    return models.binarize_(net, quantizer, act)


def compare_parameters(errors: Errors, net, npz, network: str) -> dict[str, torch.nn.Parameter]:
    """Compare the lists of parameters, by their order. Returns our parameters by the authors' names."""
    ours = dict(net.named_parameters())
    shapes = [",".join(map(str, p.shape)) for p in ours.values()]
    errors.equal("parameter shapes", shapes, npz[f"{network}parameter_shapes"].tolist())
    errors.equal("parameter count", sum(p.numel() for p in ours.values()), int(npz[f"{network}parameter_count"]))
    errors.equal("length of the state dict", len(net.state_dict()), len(npz[f"{network}state_dict_names"]))
    by_their_name = dict(zip(npz[f"{network}parameter_names"].tolist(), ours.values(), strict=False))
    theirs = [id(by_their_name[name]) for name in npz[f"{network}binary_parameters"].tolist()]
    errors.equal("binary parameters", [id(layer.weight) for layer in models.binary_layers(net)], theirs)
    return by_their_name


def compare_start(errors: Errors, parameters: dict, names: list[str], stds: list[float]) -> None:
    """Compare means and standard deviations of fresh parameters with those they are drawn with."""
    for name, std in zip(names, stds, strict=True):
        w, n = parameters[name].detach().double(), parameters[name].numel()
        errors.add("initial standard deviation", max(0.0, abs(w.std().item() / std - 1) - 5 / math.sqrt(2 * n)))
        errors.add("initial mean", max(0.0, abs(w.mean().item()) / std - 5 / math.sqrt(n)))


def compare_constants(errors: Errors, parameters: dict, constants: list[str]) -> None:
    """constants: "name=value", parameters whose elements all start with that value."""
    for constant in constants:
        name, value = constant.split("=")
        errors.equal("initial constants", bool((parameters[name] == float(value)).all()), True)


def rates(args: Namespace, steps: list[tuple[int, int]], total_steps: int) -> torch.Tensor:
    """The learning rates at the steps (epoch, step)."""
    found = [runs.learning_rate(args, epoch, step, total_steps) for epoch, step in steps]
    return torch.tensor(found, dtype=torch.float64)


def recipe(trainer, *argv: str) -> Namespace:
    """The flags of a trainer, complete."""
    args = trainer.flags().parse_args(argv)
    trainer.complete(args)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Si-BNN.


def replay_sibnn(npz) -> dict[str, float]:
    errors, rho = Errors(), float(npz["hyper/rho"])
    sibnn_names = {"grad_scale": "delta", "grad_bias": "theta"}

    def rename(name: str) -> str:
        module, _, parameter = name.rpartition(".")
        module = module.replace("gs", "conv").replace("fp32_downsample", "downsample")
        return f"{module}.{sibnn_names.get(parameter, parameter)}"

    for block in groups(npz, "block_"):
        kwargs = {"nonlinearity": models.no_nonlinearity, "shortcut": models.pooled_projection}
        net = binary_block(models.SiBNNBlock, npz, block, "sibnn", "si", **kwargs)
        load(net, under(npz, f"{block}init/"), rename)
        for name in ("conv1", "conv2"):
            layer = net.get_submodule(name)
            layer.rho = rho
            layer.weight.data.clamp_(-1, 1)
            errors.compare("clamped weights", layer.weight, npz[f"{block}clamped_weight/{name}"])
        replay_block(errors, net, npz, block, block, rename)

    for i in range(int(npz["weight/count"])):
        file = under(npz, f"weight/{i}/")
        latent, ghat = torch_of(file["latent"]), torch_of(file["ghat"])
        for w, grad in ((latent.clamp(-1, 1), "grad"), (latent.clone(), "grad_without_clamping")):
            binary = quantizers.sibnn(w.requires_grad_())
            binary.backward(ghat)
            if grad == "grad":
                errors.compare("binary weights", binary, file["binary"])
            errors.compare("gradients of weights", w.grad, file[grad])

    for group in groups(npz, "activation/"):
        file = under(npz, group)
        x = torch_of(file["input"]).requires_grad_()
        a = quantizers.step_activation(x, torch.zeros_like(x[:1]), torch.ones_like(x[:1]), rho)
        a.backward(torch_of(file["cotangent"]))
        errors.compare("activations", a, file["output"], where=x != 0)
        errors.compare("gradients of activations", x.grad, file["grad"])
    file = under(npz, "scaled_activation/")
    x, theta, delta = (torch_of(file[name]).requires_grad_() for name in ("input", "theta", "delta"))
    a = quantizers.step_activation(x, theta, delta, rho)
    a.backward(torch_of(file["cotangent"]))
    errors.compare("activations", a, file["output"], where=x != theta)
    for name, tensor in (("input", x), ("theta", theta), ("delta", delta)):
        errors.compare("gradients of activations", tensor.grad, file[f"grad_{name}"])

    net = resnet(npz, "network/", "resnet18-sibnn", "si", "sibnn")
    parameters = compare_parameters(errors, net, npz, "network/")
    exempt = [name.endswith(train_sibnn.THRESHOLDS) for name, _ in net.named_parameters()]
    errors.equal("weight decay", exempt, npz["network/weight_decay_exempt"].tolist())
    compare_start(errors, parameters, npz["init/names"].tolist(), npz["init/std_as_set"].tolist())
    compare_constants(errors, parameters, npz["init/constants"].tolist())

    epochs, steps = int(npz["hyper/epochs"]), int(npz["schedule/iterations_per_epoch"])
    flags = ("--lr", str(float(npz["hyper/lr"])))
    code, paper = recipe(train_sibnn, "--recipe", "code", *flags), recipe(train_sibnn, "--recipe", "paper", *flags)
    first = [(epoch, epoch * steps) for epoch in range(epochs)]
    last = [(epoch, epoch * steps + steps - 1) for epoch in range(epochs)]
    for name, args, at in (
        ("cosine_first_iteration_of_epoch", code, first),
        ("cosine_last_iteration_of_epoch", code, last),
        ("step_option", paper, first),
    ):
        errors.compare("schedule", rates(args, at, epochs * steps), npz[f"schedule/{name}"])
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# Equal Bits.


def equalbits_quantizer(name: str) -> tuple[str, dict]:
    """The quantizer of models.py and its options: "half", "halfmask_0.3", "sign"."""
    if name == "sign":
        return "bwn", {}
    kind, _, share = name.partition("_")
    return ("bihalf", {}) if kind == "half" else ("bihalf-prune", {"prune": float(share)})


def counts(bits: torch.Tensor) -> list[list[int]]:
    """For each filter, how many weights are −1, 0 and +1."""
    return torch.stack([(bits.flatten(1) == b).sum(1) for b in (-1, 0, 1)], dim=1).tolist()


def exact_counts(n: int, prune: float = 0.0) -> list[int]:
    """How many of a filter's n weights become −1, 0 and +1, in exact arithmetic."""
    share = Fraction(repr(prune))
    i, j = math.floor((1 - share) / 2 * n), math.floor((1 + share) / 2 * n)
    return [i, j - i, n - j]


def replay_equalbits(npz) -> dict[str, float]:
    errors = Errors()
    rename = lambda name: name.replace("nonlinear", "relu").replace("shortcut", "downsample")
    for block in groups(npz, "block_"):
        for case in groups(npz, block):
            if f"{case}output_eval" not in npz.files:
                continue
            quantizer, options = equalbits_quantizer(case.split("/")[1])
            kwargs = {"nonlinearity": torch.nn.PReLU, "shortcut": models.float_projection}
            net = binary_block(models.EqualBitsBlock, npz, block, quantizer, "sign", **kwargs)
            load(net, under(npz, f"{block}init/"), rename)
            for name in ("conv1", "conv2"):
                layer = net.get_submodule(name)
                layer.options, layer.scale = options, float(npz[f"{block}rescale/{name}"])
                errors.add("scale", abs(np.float32(models.he_scale(layer)) - layer.scale))
            replay_block(errors, net, npz, block, case, rename)

    for group in groups(npz, "quantizer/"):
        if f"{group}latent" not in npz.files:
            continue
        latent, cotangent = torch_of(npz[f"{group}latent"]), torch_of(npz[f"{group}cotangent"])
        for case in groups(npz, group):
            if f"{case}output" not in npz.files:
                continue
            kind, options = equalbits_quantizer(case.split("/")[2])
            bits = models.WEIGHT_QUANTIZERS[kind](w := latent.clone().requires_grad_(), **options)
            bits.backward(cotangent)
            exact = exact_counts(latent[0].numel(), **options)
            errors.equal("counts", counts(bits), [exact] * len(latent))
            theirs = npz[f"{case}counts_minus_zero_plus"].tolist()
            if theirs == [exact] * len(latent):
                errors.compare("bits", bits, npz[f"{case}output"], where=~torch_of(npz[f"{case}undetermined"]))
            else:  # their float64 product was rounded to the other side of a whole number, so one weight differs
                errors.add("counts", max(0, np.abs(np.subtract(theirs, exact)).max() - 1))
            errors.compare("gradients of weights", w.grad, npz[f"{group}cotangent"])
    for group in groups(npz, "sign/"):
        latent = torch_of(npz[f"{group}latent"])
        errors.compare("bits", quantizers.sign(latent), npz[f"{group}output"], where=latent != 0)
    for i, n in enumerate(npz["ranks/filter_sizes"].tolist()):
        w = torch.randn(1, n)
        for j, share in enumerate(npz["ranks/prune_rates"].tolist()):
            exact = npz["ranks/counts_in_exact_arithmetic"][i, j].tolist()
            errors.equal("counts", counts(quantizers.bihalf_prune(w, share)), [exact])
        minus, _, plus = counts(quantizers.bihalf(w))[0]
        errors.equal("counts", [minus, plus], npz["ranks/half_counts_minus_plus"][i].tolist())

    x = torch_of(npz["activation/input"]).requires_grad_()
    a = quantizers.sign_activation(x)
    a.backward(torch_of(npz["activation/cotangent"]))
    errors.compare("activations", a, npz["activation/output"], where=x != 0)
    errors.compare("gradients of activations", x.grad, npz["activation/grad"])

    for network in groups(npz, "network/"):
        if f"{network}parameter_shapes" not in npz.files:
            continue
        net = resnet(npz, network, "resnet18-equalbits", "sign", "bihalf")
        parameters = compare_parameters(errors, net, npz, network)
        scales = torch.tensor([models.he_scale(layer) for layer in models.binary_layers(net)]).double()
        errors.compare("scale", scales, npz[f"{network}rescale"])
        errors.equal("weight decay", bool(npz[f"{network}weight_decay_exempt"].any()), False)
        start = under(npz, f"{network}init/")
        compare_start(errors, parameters, start["names"].tolist(), start["std_as_set"].tolist())
        for name, bound in zip(start["names"].tolist(), start["uniform_bound_as_set"].tolist(), strict=True):
            largest = parameters[name].abs().max().item()
            errors.add("initial bound", max(0.0, largest / bound - 1 - 1e-6))  # the bound is rounded to float32
        compare_constants(errors, parameters, start["constants"].tolist())

    for dataset, extra in (("cifar", []), ("imagenet", ["--milestones", "30", "60", "80", "95"])):
        theirs, lr = npz[f"schedule/{dataset}"], str(float(npz[f"hyper/{dataset}/lr"]))
        flags = ["--arch", "resnet18-equalbits", "--dataset", dataset.replace("cifar", "cifar10"), "--lr", lr, *extra]
        steps = [(epoch, epoch) for epoch in range(len(theirs))]
        errors.compare("schedule", rates(recipe(train_bihalf, *flags), steps, len(theirs)), theirs)
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# IR-Net.


@torch.no_grad()
def replay_irnet(npz) -> dict[str, float]:
    errors = Errors()
    ours = {"linear": "fc", "bn2": "bn_fc"}

    def rename(name: str) -> str:
        module, _, rest = name.partition(".")
        return f"{ours.get(module, module)}.{rest}"

    for kind, act in (("1w1a", "sign"), ("1w32a", "none")):
        network = f"network/{kind}/"
        net = resnet(npz, network, "resnet20-irnet", act, "bwn")
        parameters = compare_parameters(errors, net, npz, network)
        stds = dict(zip(parameters, npz[f"{network}init_std_of_kaiming_normal"].tolist(), strict=True))
        drawn = [name for name, std in stds.items() if std > 0]
        compare_start(errors, parameters, drawn, [stds[name] for name in drawn])

        load(net.double(), under(npz, "init/"), rename)
        results, stored = {}, under(npz, f"eval/{kind}/")
        for name in [name for name in stored if name.startswith("after_")]:
            module = net.get_submodule(ours.get(name.removeprefix("after_"), name.removeprefix("after_")))
            module.register_forward_hook(lambda m, x, y, n=name, into=results: into.update({n: y.clone()}))
        results["output"] = net.eval()(torch_of(npz["input"]))
        for name, tensor in results.items():
            errors.compare(name.replace("_", " "), tensor, stored[name])
    return errors
