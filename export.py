"""Export a binary network as packed bits, as ONNX, or as one C file.

In your own code, for any network made with binarize_() or models.build():

    export.save_bits(net, "net.safetensors")     # 1 bit per binary weight
    net = export.load_bits("net.safetensors", MyNetwork())     # after binarize_(); the same logits, bit for bit
    export.to_onnx(net, "net.onnx", example)     # example: a batch of inputs    (pip install onnx onnxruntime)
    export.to_c(net, "net.c", example)           # one C99 file: void net_predict(const float *image, float *logits);
                                                 # and its header, net.h

For a run of a trainer, use the command. It checks the file on the test images. It exits with 0 only if the file and
PyTorch make equal predictions (with ONNX and C for 99.9 % of the images, because other machines round in other ways
than PyTorch; with --half for 99 %):

    python export.py runs/NAME --to bits         # runs/NAME/NAME.safetensors
    python export.py runs/NAME --to onnx
    python export.py runs/NAME --to c            # runs/NAME/NAME.c and its header NAME.h
    python export.py runs/NAME --to hub-folder   # runs/NAME/hub: the packed bits and a model card
    python export.py runs/NAME --bench           # ms per image: PyTorch, onnxruntime (float32 and int8), the C file

Instead of a run's folder (its best.pt), give any checkpoint, or a .safetensors file of packed bits. The exported
network is the one that the trainer tests; for ProxConnect++'s methods, the one with true signs.

Copy this file with export_bits.py, export_c.py, export_onnx.py, kernels.c, models.py, binarize.py, quantizers.py,
data.py, runs.py and the trainers whose runs you export: train_fsg.py (with hypernet.py, metaquant.py, gate.py,
fsg_released.py), train_sibnn.py, train_proxconnect.py, train_bihalf.py.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib
import io
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange, repeat
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import data
import export_bits
import export_c
import export_onnx
import models
import runs
from export_bits import frozen, load_bits, one_line, read_bits, save_bits, write, write_all
from runs import RunError

# ---------------------------------------------------------------------------------------------------------------------
# What the formats share.


def on_cpu(example: Tensor) -> Tensor:
    """The example on the device and in the precision of a frozen network."""
    example = example.detach().cpu()
    return example.float() if example.is_floating_point() else example


def failing_layers(net: nn.Module, example: Tensor, attempt: Callable) -> str:
    """The layers for which attempt(layer, its input) raises an error, with their types, for a message.

    The message of a RunError, such as "dilation=2", is given as the reason.
    """
    inputs, failing = {}, []
    names = {m: name for name, m in net.named_modules() if next(m.children(), None) is None}

    def keep(m, arguments):
        if arguments:
            inputs.setdefault(m, arguments[0])

    hooks = [m.register_forward_pre_hook(keep) for m in names]
    try:
        with torch.no_grad():
            net(example)
    except Exception as e:
        raise RunError(
            f"the network cannot take the example, {list(example.shape)} ({one_line(e)}): give another example"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    for m, x in inputs.items():
        try:
            attempt(m, x)
        except RunError as e:
            failing.append(f"{names[m]} ({type(m).__name__} with {e})")
        except Exception:  # any type, from a converter or from PyTorch
            failing.append(f"{names[m]} ({type(m).__name__})")
    return ", ".join(failing)


# ---------------------------------------------------------------------------------------------------------------------
# ONNX. export_onnx.py writes networks with binary activations, if export_c.py has rules for all of their layers. For
# others, torch.onnx traces a copy of the network in which some modules compute in another form:
# - The weight of a binary layer is int8, followed by Cast and, if its input is not binary, by Mul with the scales. A
#   runtime computes both once, when it loads the file. (The usual operator is DequantizeLinear. onnxruntime computes it
#   at each call, which takes 1.5 to 2 times as long.)
# - If its input is binary, the convolution adds integers, and the scale follows. As in PyTorch, the sums are exact.
#   Scales and BatchNorms are computed in float64 and then rounded, as in PyTorch. This also keeps a runtime from
#   multiplying them into the weights.
# - An adaptive pool with windows of different sizes becomes two matrix products.

FLOAT32_NOTE = (
    "Run this network in float32. With binary activations, bfloat16 or float16 changes many predictions. OpenVINO's "
    'default on recent CPUs is bfloat16: compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).'
)


def import_onnx(name: str = "onnx"):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RunError(f"this needs {name}: pip install onnx onnxruntime") from None


def to_onnx(net: nn.Module, path: Path | str, example: Tensor, normalisation: list[list[float]] | None = None) -> None:
    """Write an ONNX file with the input 'image', float32, normalised as in training, and the output 'logits'.

    The file accepts any batch size.

    example: a batch of inputs, [B, C, H, W] for images. The network is traced with it: if a branch depends on values,
        the file contains only the branch that the example takes.
    normalisation: written to the file's metadata as 'scale' and 'shift', see `save_bits`.

    Raises RunError if onnx is not installed, if the file cannot be written, or if ONNX lacks some layers, which the
    message names.
    """
    onnx, net, example = import_onnx(), frozen(net), on_cpu(example)
    try:
        model = export_onnx.onnx_model(export_c.operations(net, tuple(example.shape[1:])), example)
    except RunError:  # it has layers for which there is no rule
        model = None
    try:
        model = model or onnx.load_from_string(traced(for_onnx(net), example))
    except Exception as e:  # the exporter raises many types
        layers = failing_layers(net, example, lambda m, x: traced(for_onnx(m), x))
        raise RunError(
            f"this network cannot be exported as ONNX ({layers or one_line(e)}): use packed bits or other layers"
        ) from None
    notes = {"inference_precision": "float32", "note": FLOAT32_NOTE}
    if normalisation:
        notes |= {name: json.dumps(values) for name, values in zip(("scale", "shift"), normalisation, strict=True)}
    for key, value in notes.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    write(path, model.SerializeToString())


def traced(net: nn.Module, example: Tensor) -> bytes:
    """torch.onnx.export by tracing, which does not change the operations on constants."""
    file, fast_attention = io.BytesIO(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operator, which ONNX does not have
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns that it is deprecated
            torch.onnx.export(
                net,
                (example,),
                file,
                input_names=["image"],
                output_names=["logits"],
                dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
                opset_version=17,
                do_constant_folding=False,  # it would turn the int8 weights into floats
                dynamo=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    return file.getvalue()


def for_onnx(net: nn.Module) -> nn.Module:
    """A copy of a frozen network with modules in the form for ONNX, see above."""
    net = copy.deepcopy(net)
    has_binary_activations = any(layer.act != "none" for layer in models.binary_layers(net))
    for name, layer in models.named_binary_layers(net).items():
        for factor in ("signs", "filter_scale"):  # the trace keeps operations on buffers
            net.register_buffer(f"{name}_{factor}".replace(".", "_"), getattr(layer, factor))
        layer.binary_weight = functools.partial(onnx_weight, layer)
        if sums(layer):
            layer.forward = functools.partial(onnx_forward, layer)
    for m in net.modules():
        if isinstance(m, nn.AdaptiveAvgPool2d):
            m.forward = functools.partial(adaptive_average, m)
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and has_binary_activations:
            alpha, beta = (constant.detach().double() for constant in export_c.batchnorm_constants(m))
            m.forward = functools.partial(onnx_batchnorm, alpha, beta)
    return net


def onnx_batchnorm(alpha: Tensor, beta: Tensor, x: Tensor) -> Tensor:
    """αx + β, rounded once."""
    per_channel = [-1] + [1] * (x.dim() - 2)
    return (x.double() * alpha.view(per_channel) + beta.view(per_channel)).float()


def sums(layer: nn.Module) -> bool:
    """Whether a layer is a plain Linear or Conv, which sums exactly if its inputs are binary."""
    plain = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return getattr(models.plain_class(layer), "forward", None) in plain


def layer_function(layer: nn.Module) -> Callable:
    """The layer's convolution or matrix product: a function of its input, weight and bias."""
    return F.linear if isinstance(layer, nn.Linear) else layer._conv_forward


def onnx_weight(layer: nn.Module) -> Tensor:
    """Ŵ of a frozen binary layer, as the product of its int8 signs and its scales."""
    scale, shape, groups = layer.filter_scale, layer.signs.shape, getattr(layer, "groups", 1)
    if models.has_inputs_first(layer):
        scale = repeat(scale, "(g o) -> (g i) o", g=groups, i=shape[0] // groups)
    return layer.signs.float() * scale.view(*scale.shape, *[1] * (len(shape) - scale.dim()))


def onnx_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """What a frozen Linear or Conv computes."""
    function = layer_function(layer)
    if layer.act == "none":
        return function(x, onnx_weight(layer), layer.bias)
    if layer.act == "sign":
        x = torch.where(x >= 0, 1.0, -1.0)
    else:
        x = ((x - layer.theta) * layer.delta >= 0).float()
    y, per_channel = function(x, layer.signs.float(), None), [-1] + [1] * (layer.signs.dim() - 2)
    if (layer.filter_scale != 1).any():
        scale = layer.filter_scale.view(per_channel)
        y = y * scale if isinstance(layer, nn.Linear) else (y.double() * scale.double()).float()
    return y if layer.bias is None else y + layer.bias.view(per_channel)


def adaptive_average(pool: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    height, width = (int(size) for size in x.shape[-2:])
    sizes = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2
    rows, columns = sizes[0] or height, sizes[1] or width
    if height % rows == width % columns == 0:  # ONNX has these pools
        return F.adaptive_avg_pool2d(x, (rows, columns))
    return export_onnx.averaging_matrix(height, rows) @ x @ export_onnx.averaging_matrix(width, columns).T


def onnx_session(path: Path, threads: int = 0):
    """onnxruntime with a file, on a number of CPU threads (0: all)."""
    ort = import_onnx("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------------------------------------------------------
# C. export_c.py makes the file.


def to_c(
    net: nn.Module,
    path: Path | str,
    example: Tensor,
    normalisation: list[list[float]] | None = None,
    about: str = "a binary network",
    name: str = "net",
) -> tuple[int, int]:
    """Write one C99 file with the function NAME_predict(const float *image, float *logits), and its header beside it.

    example: a batch of inputs, [B, C, H, W] for images.
    normalisation: see `save_bits`. With it, net_predict() takes pixels of 0 to 255. Without it, net_predict() takes the
        inputs of the network.
    about: a few words for the comment at the top of the file.
    name: the prefix of all names in the file, so that a program can contain several networks.

    Returns the bytes of its constants (flash, besides the code) and of its buffers (RAM, besides the image and the
    stack). Raises RunError if a file cannot be written, if the header would replace a file that this script did not
    write, or if export_c.py has no rule for some layers.
    """
    ops, normalisation = c_operations(frozen(net), on_cpu(example), normalisation)
    source, header = export_c.c_source(ops, normalisation, about, name), header_path(path)
    with contextlib.suppress(OSError):  # there is none, or write_all will say what is wrong
        if "Written by export.py" not in header.read_text(errors="replace"):
            raise RunError(f"{header} was not written by export.py: give the C file another name (--out)")
    write_all({header: export_c.c_header(source).encode(), path: source.encode()})
    return export_c.memory(ops, normalisation)


def header_path(path: Path | str) -> Path:
    """The header of a C file: FILE.h of FILE.c."""
    return Path(str(path).removesuffix(".c") + ".h")


def c_operations(net: nn.Module, example: Tensor, normalisation: list[list[float]] | None) -> tuple[list, list]:
    """The operations of a frozen network, and its normalisation."""
    layers = failing_layers(net, example, check_rule)
    if layers:
        raise RunError(f"the C generator has no rule for {layers}: use --to onnx, or other layers")
    ops = export_c.operations(net, tuple(example.shape[1:]))
    channels = ops[0].shape[0]
    return ops, normalisation or [[1.0] * channels, [0.0] * channels]


def check_rule(layer: nn.Module, x: Tensor) -> None:
    """Raises an error unless export_c.py has a rule for a layer with the input x. A RunError names the properties."""
    properties = export_c.without_rule(layer, x)
    if properties:
        raise RunError(properties)
    try:
        export_c.operations(nn.Sequential(layer), tuple(x.shape[1:]))
    except RunError as e:
        raise ValueError(e) from None


# ---------------------------------------------------------------------------------------------------------------------
# Runs of the trainers.

SUFFIXES = {"bits": ".safetensors", "onnx": ".onnx", "c": ".c", "hub-folder": ""}
TRAINERS = ("train_fsg.py", "train_sibnn.py", "train_proxconnect.py", "train_bihalf.py")
# These quantizers are relaxed in training. The final network has true signs (train_proxconnect.py).
RELAXED_QUANTIZERS = ("bnn", "bnn+", "bnn++", "pc", "identity")
ARCH_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}")  # not a path, and not an address to download from


@dataclass
class Trained:
    """A trained network, frozen, with the facts that exports and checks need.

    net: see `frozen`. path: the file that it was read from. shape: [C, H, W] of an image.
    normalisation, build: see `save_bits`. build is None for a transformer.
    make: returns a network with these layers, for load_bits.
    dataset, data_dir: of the test images, or None. data_options: arguments of data.load.
    """

    net: nn.Module
    path: Path
    arch: str
    quantizer: str
    act: str
    num_classes: int
    shape: tuple[int, int, int]
    normalisation: list[list[float]]
    build: dict | None
    make: Callable[[], nn.Module] | None = None
    dataset: str | None = None
    data_dir: str | None = None
    data_options: dict | None = None

    def example(self) -> Tensor:
        return torch.zeros(1, *self.shape)

    def about(self) -> str:
        return f"{self.arch}, weights binarized by {self.quantizer}, activations: {self.act}"


def read(path: Path | str) -> Trained:
    """The network of a run's folder (its best.pt), a checkpoint or a .safetensors file.

    Raises RunError if the file does not exist, is damaged, or contains no binary network.
    """
    path = Path(path)
    if os.path.isdir(path):
        if not (path / "best.pt").exists():
            advice = f"continue it (--resume {path})" if (path / "last.pt").exists() else "train it first"
            raise RunError(f"{path} has no best.pt, because no epoch of this run has been tested yet: {advice}")
        path = path / "best.pt"
    if path.suffix != ".safetensors":
        try:
            return read_checkpoint(path)
        except RunError as e:  # it can quote the file
            raise RunError(export_bits.printable(str(e), 900)) from None
    net, known = read_bits(path)
    build, shape, normalisation = known["build"], known["shape"], known["normalisation"]
    if shape is None or normalisation is None:
        raise RunError(f"{path} lacks the images' shape or normalisation: use save_bits(…, shape=…, normalisation=…)")
    names = {name: build[name] for name in ("arch", "quantizer", "act", "num_classes")}
    return Trained(frozen(net), path, **names, shape=tuple(shape), normalisation=normalisation, build=build)


@torch.no_grad()
def read_checkpoint(path: Path) -> Trained:
    checkpoint = runs.load(path)
    if not {"args", "model", "num_classes"} <= checkpoint.keys():
        raise RunError(f"{path} is not a checkpoint of a run: give a run's folder, or its best.pt or last.pt")
    if not {"shape", "normalisation"} <= checkpoint.keys():
        raise RunError(
            f"{path} lacks the images' shape and normalisation: train one more epoch, which writes a complete "
            f"checkpoint (--resume {path.parent} --epochs N)"
        )
    try:
        shape, normalisation, num_classes = (checkpoint[name] for name in ("shape", "normalisation", "num_classes"))
        export_bits.check_shape(shape, normalisation)
        if normalisation is None or not export_bits.is_size(num_classes):
            raise ValueError("the normalisation or the number of classes is wrong")
        args, trainer = flags_of(checkpoint["args"], path)
        net = trained_network(trainer, args, num_classes, tuple(shape), path)
        layers = models.binary_layers(net)
        if not layers:
            raise RunError(f"{path} is a full-precision network, which has no bits: give a run with binary weights")
        runs.load_model(net, runs.tested_weights(checkpoint, path), path)
        bad = export_bits.bad_tensors(net, net.state_dict())
        if bad:
            raise ValueError(f"some elements are NaN or infinite in {', '.join(bad)}, or a variance is negative")
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise RunError(f"{path} is damaged ({one_line(e)}): give another checkpoint") from None
    quantizer = layers[0].quantizer
    relaxed = [layer for layer in layers if layer.quantizer in RELAXED_QUANTIZERS]
    other = "the true signs" if relaxed and args.method in trainer.RELAXED else "the averages" if args.ema else None
    if other and checkpoint.get("batch"):
        raise RunError(
            f"{path} was saved within an epoch, so its BatchNorm statistics are not those of {other}: export best.pt"
        )
    for layer in relaxed:  # the statistics in the checkpoint are those of the true signs
        layer.quantizer, layer.options = "bwn", {}
    build = None
    if args.arch in models.ARCHS:
        build = {"arch": args.arch, "num_classes": num_classes, "quantizer": quantizer, "act": args.act}
        build |= {"binarize_all": args.binarize_all, "in_channels": shape[0], "image_size": shape[1]}
    mean = [-shift / factor / 255 for factor, shift in zip(*normalisation, strict=True)]
    options = {"mean": tuple(mean), "std": tuple(1 / factor / 255 for factor in normalisation[0])}
    options |= getattr(trainer, "data_options", lambda args: {})(args)
    return Trained(
        frozen(net),
        path,
        args.arch,
        quantizer,
        args.act,
        num_classes,
        tuple(shape),
        normalisation,
        build,
        make=lambda: trainer.network(args, num_classes, tuple(shape)),
        dataset=args.dataset,
        data_dir=args.data_dir,
        data_options=options,
    )


def flags_of(flags: dict, path: Path) -> tuple[argparse.Namespace, object]:
    """The flags of a checkpoint, and the module of its trainer. Flags that the trainer does not have are ignored.

    Raises RunError for a file of another script, and ValueError for an unknown network or data set.
    """
    script = flags.get("script") if isinstance(flags, dict) else None
    if script not in TRAINERS:
        raise RunError(f"{path} was written by {script!r:.40}: only runs of {', '.join(TRAINERS)} can be exported")
    trainer = importlib.import_module(Path(script).stem)
    args = trainer.flags().parse_args([])
    vars(args).update({name: flags[name] for name in vars(args) if name in flags})
    if args.dataset not in data.DATASETS or not ARCH_NAME.fullmatch(args.arch):
        raise ValueError("the data set or the network's name is unknown")
    if not isinstance(args.data_dir, str):
        raise ValueError("the folder of the images is not a text")
    return args, trainer


def trained_network(trainer, args: argparse.Namespace, num_classes: int, shape: tuple, path: Path) -> nn.Module:
    """The network before training that a trainer makes from its flags.

    Raises ValueError for flags that make no network, or a network for which the file is too small.
    """
    try:
        with torch.device("meta"):  # allocates no memory
            elements = sum(value.numel() for value in trainer.network(args, num_classes, shape).state_dict().values())
        if elements > 8 * path.stat().st_size:  # each has at least a bit
            raise ValueError("it is too small for a network of this size")
        return trainer.network(args, num_classes, shape)
    except RunError:  # a package is missing
        raise
    except Exception as e:  # a network's constructor can raise any type for wrong arguments
        raise ValueError(f"its flags do not make a network: {one_line(e)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Checks on the test images.

# The fraction of the test images for which a file must predict what PyTorch predicts. PyTorch's convolutions in full
# precision can add in another order on other machines. This changes the last digit of a float, and may change a bit.
LEAST_EQUAL = {"bits": 1.0, "half": 0.99, "onnx": 0.999, "c": 0.999}


def load_test(trained: Trained, dataset: str | None = None, data_dir: str | None = None):
    """The test batches of the data set that the network was trained with, normalised as in training.

    dataset, data_dir: the user's flags, or None. Raises DataError or RunError if there are no such images.
    """
    dataset, folder = dataset or trained.dataset, data_dir or trained.data_dir or "data"
    if dataset is None:
        raise RunError("a .safetensors file does not name its test images: name them with --dataset and --data-dir")
    options = trained.data_options or {}
    test = data.load(dataset, folder, image_size=trained.shape[1], log=say, **options)[-1]
    if test.shape != trained.shape or test.num_classes != trained.num_classes:
        raise RunError(
            f"{folder} has images of {test.shape} and {test.num_classes} classes, and the network is for images of "
            f"{trained.shape} and {trained.num_classes} classes: name the folder of its images with --data-dir"
        )
    test.scale, test.shift = factor_and_shift(trained)
    return test


def factor_and_shift(trained: Trained) -> list[Tensor]:
    """The normalisation as tensors [C, 1, 1]."""
    return [rearrange(torch.tensor(values), "c -> c 1 1") for values in trained.normalisation]


def say(text: str) -> None:
    """Print a line as it is, with brackets."""
    runs.console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class Comparison:
    """Of `count` images, `equal` have equal predictions, and the file predicts `correct` correctly.

    largest: the largest difference of a logit.
    """

    equal: int = 0
    count: int = 0
    largest: float = 0.0
    correct: int = 0


def check(trained: Trained, test, to: str, path: Path, limit: int | None, name: str = "net") -> Comparison:
    """Compare the file that was written with the network, and print the result."""
    with tempfile.TemporaryDirectory() as folder:
        if to == "bits":
            logits_of = load_bits(path, None if trained.build else trained.make())
        elif to == "onnx":
            session = onnx_session(path)
            logits_of = lambda images: torch.from_numpy(session.run(None, {"image": images.contiguous().numpy()})[0])
        else:
            library = export_c.compile_library(path, Path(folder))
            factor, shift = factor_and_shift(trained)
            logits_of = lambda images: export_c.predict(
                library, ((images - shift) / factor).round(), trained.num_classes, name
            )
        found = compare(trained.net, test, logits_of, limit)
    say(
        f"{path}: {found.equal:,} of {found.count:,} test images get PyTorch's prediction; logits differ by "
        f"{found.largest:.1e} at most; test accuracy {100 * found.correct / found.count:.2f} %"
    )
    return found


@torch.no_grad()
def compare(net: nn.Module, test, logits_of: Callable, limit: int | None) -> Comparison:
    """Compare the logits of a network with logits_of(images). limit: the number of images to use, None for all."""
    found, limit = Comparison(), min(test.size, limit or test.size)
    with Progress(console=runs.console, transient=True, disable=not runs.console.is_terminal) as bar:
        task = bar.add_task("checking", total=limit)
        for images, labels in test.epoch():
            images, labels = images[: limit - found.count], labels[: limit - found.count]
            if not len(images):
                break
            expected, logits = net(images), logits_of(images)
            same = (expected.argmax(1) == logits.argmax(1)) & logits.isfinite().all(1)
            found.equal += same.sum().item()
            found.correct += (logits.argmax(1) == labels).sum().item()
            found.largest = max(found.largest, (expected - logits).abs().nan_to_num(math.inf).max().item())
            found.count += len(images)
            bar.update(task, completed=found.count)
    return found


def size_table(trained: Trained, half: bool) -> Table:
    """Bytes of the weights before (float32) and after packing, of each layer and in total."""
    table = Table(title=f"{trained.arch}, weights by {trained.quantizer}", title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("weights", "float32 bytes", "packed bytes", "ratio", "+1 %", "0 %"):
        table.add_column(column, justify="right")
    rows = []  # name, weights, float32 bytes, packed bytes, percentages
    packed_names = export_bits.packed_parameters(trained.net)
    for name, layer in models.named_binary_layers(trained.net).items():
        signs = export_bits.rows_of(layer, layer.signs)
        planes = 2 if (signs == 0).any() else 1
        packed = len(signs) * (planes * math.ceil(signs.shape[1] / 64) * 8 + 4)
        shares = [f"{100 * (signs == value).double().mean().item():.1f}" for value in (1, 0)]
        rows.append([name, signs.numel(), 4 * signs.numel(), packed, *shares])
    others = [value for name, value in trained.net.state_dict().items() if name not in packed_names]
    count = sum(value.numel() for value in others if value.is_floating_point())
    rows.append(["other, float16" if half else "other", count, 4 * count, (2 if half else 4) * count])
    rows.append(["total", *[sum(row[i] for row in rows) for i in (1, 2, 3)]])
    for row in rows:
        name, count, before, after, *shares = row
        style = "bold" if row is rows[-1] else None
        table.add_row(name, f"{count:,}", f"{before:,}", f"{after:,}", f"{before / after:.1f}", *shares, style=style)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# --to hub-folder.

CARD_MARK = "<!-- written by export.py -->"


def write_card(trained: Trained, path: Path, found: Comparison, dataset: str) -> None:
    """Write the model card, README.md, beside the packed bits at `path`."""
    layers = models.binary_layers(trained.net)
    bits, elements = sum(m.weight.numel() for m in layers), sum(p.numel() for p in trained.net.parameters())
    load = f'load_bits("{path.name}"{"" if trained.build else ", net"})'
    c, h, w = trained.shape
    text = f"""---
library_name: pytorch
pipeline_tag: image-classification
tags:
- binary-neural-network
---
{CARD_MARK}

# {trained.arch} with binary weights

| | |
| --- | --- |
| network | {trained.arch}, {len(layers)} binary layers |
| weights | binarized by `{trained.quantizer}` |
| activations | `{trained.act}`: {export_bits.ACTIVATIONS[trained.act]} |
| parameters | {elements:,}, of which {bits:,} are binary |
| size | {path.stat().st_size:,} bytes; in float32 {4 * elements:,} bytes |
| images | {c}×{h}×{w}, {trained.num_classes} classes |
| test accuracy | {100 * found.correct / found.count:.2f} % of {found.count:,} images of {dataset} |
| SHA-256 | {hashlib.sha256(path.read_bytes()).hexdigest()} |

The file `{path.name}` contains one bit per binary weight; its format is described at the top of `export_bits.py`. With
that file and those that it names (or from an address, with `from_pretrained` of `hubconf.py`):

```python
import torch
from export_bits import load_bits

net = {load}
factor, shift = torch.tensor({trained.normalisation})[..., None, None]
logits = net(factor * pixels + shift)  # pixels: float32 [B, {c}, {h}, {w}], from 0 to 255
```
"""
    write(path.with_name("README.md"), text.encode())


def check_card_folder(folder: Path) -> None:
    """Raises RunError if a folder has a README.md that is not a model card of this script."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if CARD_MARK not in (folder / "README.md").read_text(errors="replace"):
            raise RunError(f"{folder} has another README.md: give another folder with --out")


# ---------------------------------------------------------------------------------------------------------------------
# --bench.


def plain_network(net: nn.Module) -> nn.Module:
    """The network in ordinary PyTorch: Ŵ are float32 weights, and activations are binarized."""
    net = copy.deepcopy(net).to(memory_format=torch.channels_last)
    for layer in models.binary_layers(net):
        layer.forward = lambda x, m=layer: layer_function(m)(m.binary_input(x), m.latent(), m.bias)
    return net


def plain_sessions(net: nn.Module, example: Tensor, folder: Path, threads: int) -> tuple:
    """onnxruntime with the full-precision network, in float32 and in int8: the alternatives to a binary network.

    For int8 the file is prepared as onnxruntime's documentation says, which folds the BatchNorms into the convolutions.
    Weights are quantized per channel, activations per tensor (QDQ), and calibrated on random images.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"image": torch.randn_like(example).numpy()} for _ in range(8)])

        def get_next(self):
            return next(self.batches, None)

    files = [folder / f"{name}.onnx" for name in ("float32", "prepared", "int8")]
    files[0].write_bytes(traced(models.binarize_(copy.deepcopy(net), "none", quiet=True), example))
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "quant_format": QuantFormat.QDQ}
    logging.disable(logging.WARNING)  # the quantizer warns about layers that stay in float32
    try:
        quant_pre_process(str(files[0]), str(files[1]))
        quantize_static(files[1], files[2], Images(), per_channel=True, **kinds)
    finally:
        logging.disable(logging.NOTSET)
    return onnx_session(files[0], threads), onnx_session(files[2], threads)


@torch.inference_mode()
def bench(trained: Trained, rounds: int) -> dict:
    """Time the network in PyTorch, onnxruntime and C, and its binary convolutions one by one. Prints two tables.

    With several cores, each computes its part of the batch with the C file. "float32" and "int8" are the network in
    full precision, in onnxruntime; "ONNX" is the file of `to_onnx`.

    Returns {"networks": rows, "layers": rows}. In rows of networks, {name: [wall, CPU]} are ms per image; CPU is the
    time of all cores together.
    """
    results = {"networks": [], "layers": []}
    title = f"{trained.arch}, ms per image, and in brackets ms of CPU time if more (median of {rounds}, in turn)"
    table = Table(title=title, title_justify="left")
    for column in ("cores", "batch", "PyTorch", "float32", "int8", "ONNX", "C", "float32 / C", "int8 / C"):
        table.add_column(column, justify="right")
    net, threads_before = plain_network(trained.net), torch.get_num_threads()
    factor, shift = factor_and_shift(trained)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        to_onnx(trained.net, folder / "network.onnx", trained.example())
        ops, normalisation = c_operations(trained.net, trained.example(), trained.normalisation)
        (folder / "network.c").write_text(export_c.c_source(ops, normalisation, trained.about()), "utf-8")
        library, ram = export_c.compile_library(folder / "network.c", folder), export_c.memory(ops, normalisation)[1]
        for threads in sorted({1, os.cpu_count() or 1}):
            session = onnx_session(folder / "network.onnx", threads)
            float32, int8 = plain_sessions(trained.net, trained.example(), folder, threads)
            torch.set_num_threads(threads)
            for batch in (1, 64):
                pixels = torch.randint(256, (batch, *trained.shape)).float()
                images = pixels * factor + shift
                x, feed = images.contiguous(memory_format=torch.channels_last), {"image": images.numpy()}
                functions = {"pytorch": functools.partial(net, x)}
                for name, its in (("float32", float32), ("int8", int8), ("onnx", session)):
                    functions[name] = functools.partial(its.run, None, feed)
                use = {"threads": threads, "ram": ram} if min(threads, batch) > 1 else {}
                functions["ours"] = functools.partial(export_c.predict, library, pixels, trained.num_classes, **use)
                times = export_c.compare_speed(functions, rounds)
                ms = {name: [1e3 * seconds / batch for seconds in both] for name, both in times.items()}
                results["networks"].append({"cores": threads, "batch": batch, **ms})
                cells = [f"{wall:.3f}" + (f" ({cpu:.3f})" if cpu > 1.1 * wall else "") for wall, cpu in ms.values()]
                ratios = [f"{ms[name][0] / ms['ours'][0]:.1f}" for name in ("float32", "int8")]
                table.add_row(str(threads), str(batch), *cells, *ratios)
    runs.console.print(table)
    torch.set_num_threads(1)
    results["layers"] = export_c.bench_convolutions(ops, rounds)
    torch.set_num_threads(threads_before)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="a run's folder, a checkpoint, or a .safetensors file of this script")
    parser.add_argument("--to", metavar="FORMAT", help=f"format of the export: {', '.join(SUFFIXES)}")
    parser.add_argument("--out", help="the file or folder to write (default: in the run's folder, with its name)")
    parser.add_argument("--name", default="net", help="prefix of the names in the C file (default: %(default)s)")
    parser.add_argument("--half", action="store_true", help="bits: other values in float16 (with float activations)")
    parser.add_argument("--dataset", help="data set of the test images (default: the run's)")
    parser.add_argument("--data-dir", help="folder of the test images (default: the run's)")
    parser.add_argument("--images", type=int, help="number of test images to check (default: all)")
    parser.add_argument("--bench", action="store_true", help="time the network against PyTorch and onnxruntime")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of --bench (default: 9)")
    return parser


def main(argv=None) -> int:
    args = flags().parse_args(argv)
    if args.bench == bool(args.to) or (args.to and args.to not in SUFFIXES):
        raise RunError(f"give one of --to {', --to '.join(SUFFIXES)} and --bench")
    for name in ("images", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise RunError(f"--{name} must be at least 1; it is {getattr(args, name)}")
    if args.half and args.to not in ("bits", "hub-folder"):
        raise RunError("--half is for packed bits (--to bits, --to hub-folder): leave it out")
    if args.dataset is not None and args.dataset not in data.DATASETS:
        raise RunError(f"no data set is called {args.dataset!r}: use one of {', '.join(data.DATASETS)}")
    trained = read(args.run)
    if args.bench:
        bench(trained, args.rounds)
        return 0
    source = trained.path.resolve()
    name = source.parent.name if source.name == "best.pt" else source.stem
    path = Path(args.out) if args.out else source.with_name(f"{name}{SUFFIXES[args.to]}")
    is_hub = args.to == "hub-folder"
    to = "bits" if is_hub else args.to
    test = reason = None
    try:
        test = load_test(trained, args.dataset, args.data_dir)
    except (data.DataError, RunError) as e:
        reason = str(e)
    if is_hub:
        if test is None:
            raise RunError(f"a model card needs the test accuracy, and there are no test images: {reason}")
        folder = Path(args.out) if args.out else source.with_name("hub")
        check_card_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError(f"the folder {folder} cannot be made ({e}): give another one with --out") from None
        path = folder / "model.safetensors"

    if to == "bits":
        described = {name: getattr(trained, name) for name in ("build", "shape", "normalisation")}
        save_bits(trained.net, path, **described, half=args.half)
        runs.console.print(size_table(trained, args.half))
    elif to == "onnx":
        to_onnx(trained.net, path, trained.example(), trained.normalisation)
    else:
        flash, ram = to_c(trained.net, path, trained.example(), trained.normalisation, trained.about(), args.name)
        image, stack = math.prod(trained.shape), export_c.STACK_BYTES["microcontroller"]
        say(
            f"on a microcontroller: {flash:,} bytes of constants besides the code, {ram:,} bytes of RAM "
            f"besides the image ({image:,} bytes) and about {stack:,} bytes of stack"
        )
    for file in [header_path(path), path] if to == "c" else [path]:
        say(f"{file}: {file.stat().st_size:,} bytes")

    try:
        if test is None:
            raise RunError(reason)
        found = check(trained, test, to, path, args.images, args.name)
    except RunError as e:
        raise RunError(f"{path} was written, but could not be checked: {e}") from None
    if found.equal < found.count * LEAST_EQUAL["half" if args.half else to]:
        differing = found.count - found.equal
        raise RunError(
            f"{path} and {args.run} disagree on {differing:,} of {found.count:,} images: do not use the file"
        )
    if is_hub:
        write_card(trained, path, found, args.dataset or trained.dataset)
        say(f"{path.with_name('README.md')}: the model card")
    return 0


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
