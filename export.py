"""Export a trained binary network as packed bits, as ONNX, or as one C file. The result is checked against PyTorch.

    python export.py runs/NAME --to bits        # runs/NAME/NAME.safetensors: 1 bit per binary weight; load() reads it
    python export.py runs/NAME --to onnx        # binary weights are int8       (pip install onnx onnxruntime)
    python export.py runs/NAME --to c           # one C99 file: void predict(const float *image, float *logits)
    python export.py runs/NAME --bench          # ms per image: PyTorch, onnxruntime, the C file

Instead of a run's folder (its best.pt), give any checkpoint, or a .safetensors file that this script has written. The
exported network is the one that the trainer tests; for ProxConnect++'s methods, the one with true signs.

A .safetensors file contains, for each binary layer L with weights [C_out, C_in, k, k] or [F_out, F_in],
    L.weight.bits      uint8 [C_out, 8·words]. A row is a filter with n weights in PyTorch's order (C_in, then ky, kx).
                       Weight i is bit i % 8 (0 is the lowest) of byte i // 8: 1 is +1, 0 is −1. A row is padded with 0
                       to words of 64 bits: read as little-endian uint64, weight i is bit i % 64 of word i // 64.
    L.weight.nonzero   The same layout, only if some weights are 0 (pruned): 1 where the weight is not 0.
    L.weight.scale     float32 [C_out]. Ŵ = scale · (±1 or 0), exactly.
and all other parameters and buffers under their names, in float32 or, with --half, float16. The metadata are strings:
    format             "bnn-bits-1"
    arch, quantizer, act, num_classes
    shape              [C, H, W] of an image, as JSON
    normalisation      two lists by channel, as JSON: x = factor · pixel + shift, for pixels of 0 to 255
    args               the trainer's flags, as JSON
The PyTorch model and the ONNX file take normalised images, the C file takes pixels of 0 to 255. With --half the logits
differ a little. If activations are binary, some of their bits differ.

Copy this file with export_c.py, kernels.c, models.py, quantizers.py, data.py, runs.py and the trainers whose runs
you export: train_fsg.py (with hypernet.py, metaquant.py, gate.py, fsg_released.py), train_sibnn.py,
train_proxconnect.py, train_bihalf.py.
"""

import argparse
import copy
import importlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import data
import export_c
import models
import runs
from export_c import BINARY_ACTIVATIONS, Group, Op
from runs import RunError

SUFFIXES = {"bits": ".safetensors", "onnx": ".onnx", "c": ".c"}
TRAINERS = ("train_fsg.py", "train_sibnn.py", "train_proxconnect.py", "train_bihalf.py")
# These quantizers are relaxed in training. The final network has true signs (train_proxconnect.py).
RELAXED_QUANTIZERS = ("bnn", "bnn+", "bnn++", "pc", "identity")


# ---------------------------------------------------------------------------------------------------------------------
# The trained network.


@dataclass
class Trained:
    """A trained network whose binary layers have constant weights.

    net: the network in eval mode. `freeze` has been applied to its binary layers.
    args: the trainer's flags. shape: [C, H, W] of an image. path: the file that it was read from.
    normalisation: two lists with an element per channel, factors and shifts for pixels of 0 to 255.
    """

    net: nn.Module
    args: argparse.Namespace
    num_classes: int
    shape: tuple[int, int, int]
    normalisation: list[list[float]]
    quantizer: str
    path: Path

    def layers(self) -> dict[str, nn.Module]:
        """The binary layers by name."""
        return named_binary_layers(self.net)


def named_binary_layers(net: nn.Module) -> dict[str, nn.Module]:
    return dict(zip(models.binary_layer_names(net), models.binary_layers(net), strict=True))


def freeze(layer: nn.Module, signs: Tensor, scale: Tensor) -> None:
    """Make Ŵ = scale · signs the layer's constant weight, and keep both factors as `signs` and `filter_scale`.

    signs: int8 (−1, 0, +1), with the shape of the weight. scale: [C_out], not negative.
    """
    weight = (signs.flatten(1) * scale[:, None]).view(signs.shape)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.signs, layer.filter_scale = signs, scale
    layer.quantizer, layer.options, layer.unit, layer.scale = "identity", {}, 1.0, 1.0


def factorize(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Ŵ as signs (int8, the shape of weight) and the scale of each filter [C_out].

    name: the layer's, for the RunError that is raised if Ŵ does not have this form.
    """
    rows = weight.flatten(1)
    scale = rows.abs().amax(1)
    signs = torch.where(scale[:, None] == 0, 1, rows.sign()).to(torch.int8)  # if a filter is all 0, its scale says so
    if not torch.equal(signs * scale[:, None], rows):
        raise RunError(f"the weights of {name} are not −1, 0 and +1 times one scale per filter: they cannot be packed")
    return signs.view(weight.shape), scale


def read(path: Path | str) -> Trained:
    """The network of a run's folder (its best.pt), a checkpoint or a .safetensors file.

    Raises RunError if the file does not exist, is damaged, or contains no binary network.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "best.pt").exists():
            advice = f"go on with it (--resume {path})" if (path / "last.pt").exists() else "train it first"
            raise RunError(f"{path} has no best.pt, because no epoch of this run has been tested yet: {advice}")
        path = path / "best.pt"
    return read_bits(path) if path.suffix == ".safetensors" else read_checkpoint(path)


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
        shape, normalisation = tuple(checkpoint["shape"]), checkpoint["normalisation"]
        check_description(shape, checkpoint["num_classes"], normalisation)
        args, net = build(checkpoint["args"], checkpoint["num_classes"], shape, path)
        quantizer = binary_quantizer(net, path)
        runs.load_model(net, checkpoint["model"], path)
        check_finite(net.state_dict())
    except (TypeError, ValueError) as e:
        raise RunError(f"{path} is damaged ({e}): give another checkpoint") from None
    for name, layer in named_binary_layers(net).items():
        if layer.quantizer in RELAXED_QUANTIZERS:
            layer.quantizer, layer.options = "bwn", {}
        freeze(layer, *factorize(layer.binary_weight(), name))
    return Trained(net.eval(), args, checkpoint["num_classes"], shape, normalisation, quantizer, path)


def binary_quantizer(net: nn.Module, path: Path) -> str:
    layers = models.binary_layers(net)
    if not layers:
        raise RunError(f"{path} is a full-precision network, which has no bits: give a run with binary weights")
    return layers[0].quantizer


# ---------------------------------------------------------------------------------------------------------------------
# Files from others are data. What they say is checked before it is used: names must be known, sizes must fit the file.

LARGEST = 2**16  # of classes, channels and pixels per side
ARCH_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}")  # not a path, and not an address to download from


def check_description(shape, num_classes, normalisation) -> None:
    """Raises ValueError unless the fields have the types and sizes that the class Trained describes."""
    if len(shape) != 3 or not all(is_size(value) for value in (*shape, num_classes)):
        raise ValueError("the images' shape or the number of classes is wrong")
    if len(normalisation) != 2 or any(len(values) != shape[0] for values in normalisation):
        raise ValueError("the normalisation must be two lists with an element per channel")
    for value in (*normalisation[0], *normalisation[1]):
        if not isinstance(value, int | float) or not -1e30 < value < 1e30:
            raise ValueError("the normalisation is not of finite numbers")


def is_size(value) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def check_finite(tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"some elements are NaN or infinite in {name}")


def build(
    flags: dict, num_classes: int, shape: tuple[int, int, int], path: Path
) -> tuple[argparse.Namespace, nn.Module]:
    """The flags of a file, checked, and the network that its trainer makes of them, freshly initialised.

    Flags that the trainer does not have are ignored. Raises RunError for a file of another script, and ValueError for
    flags that make no network or one for which the file is too small.
    """
    script = flags.get("script") if isinstance(flags, dict) else None
    if script not in TRAINERS:
        raise RunError(f"{path} was written by {script!r:.40}: only runs of {', '.join(TRAINERS)} can be exported")
    trainer = importlib.import_module(Path(script).stem)
    args = trainer.flags().parse_args([])
    for name, default in vars(args).items():
        if not is_flag(flags.get(name, default), default):
            raise ValueError(f"the flag {name} has a value of another type")
        setattr(args, name, flags.get(name, default))
    if args.dataset not in data.DATASETS or not ARCH_NAME.fullmatch(args.arch):
        raise ValueError("the data set or the network's name is unknown")
    try:
        with torch.device("meta"):  # allocates no memory
            elements = sum(value.numel() for value in trainer.network(args, num_classes, shape).state_dict().values())
        if elements > 8 * path.stat().st_size:  # each has at least a bit
            raise ValueError("it is too small for a network of this size")
        return args, trainer.network(args, num_classes, shape)
    except RunError:  # a package is missing
        raise
    except Exception as e:  # what a network's constructor raises for wrong arguments can be anything
        raise ValueError(f"its flags do not make a network: {one_line(e)}") from None


def one_line(error: Exception) -> str:
    """The first line of an error's message. It can quote a file, so what could control a terminal is replaced."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return "".join(c if c.isprintable() else "?" for c in line[:100])


def is_flag(value, default) -> bool:
    """Whether a value is of the same type as a flag's default. None and lists can take the place of any other."""
    if isinstance(value, list | tuple):
        return all(isinstance(element, int | float | str) for element in value)
    if value is None or default is None:
        return isinstance(value, int | float | str | None)
    if isinstance(default, int | float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))


# ---------------------------------------------------------------------------------------------------------------------
# --to bits.

FORMAT = "bnn-bits-1"
FIELDS = {"format", "arch", "quantizer", "act", "shape", "num_classes", "normalisation", "args"}
NOT_WRITTEN = ("data_dir", "out", "name", "resume", "pretrained")  # flags that are paths on this machine


def pack(bits: Tensor) -> Tensor:
    """bits [rows, n] bool -> uint8 [rows, 8·⌈n/64⌉]: bit i of a row is bit i % 8 of byte i // 8, padded with 0."""
    return torch.from_numpy(export_c.pack_words(bits).view(np.uint8))


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: packed [rows, bytes] uint8 with n bits in a row -> [rows, n] bool."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=n, bitorder="little")).bool()


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise RunError("--to bits needs safetensors: pip install safetensors") from None
    return safetensors


def write_bits(trained: Trained, path: Path, half: bool = False) -> None:
    """Write the .safetensors file that the top of this file describes.

    half: write what is not binary in float16, except tensors with elements that float16 cannot hold.
    """
    tensors = trained.net.state_dict()
    for name, value in tensors.items():
        if half and value.is_floating_point() and value.half().isfinite().all():
            tensors[name] = value.half()
    for name, layer in trained.layers().items():
        del tensors[f"{name}.weight"]
        rows = layer.signs.flatten(1)
        tensors[f"{name}.weight.bits"] = pack(rows > 0)
        tensors[f"{name}.weight.scale"] = layer.filter_scale
        if (rows == 0).any():
            tensors[f"{name}.weight.nonzero"] = pack(rows != 0)
    metadata = {
        "format": FORMAT,
        "arch": trained.args.arch,
        "quantizer": trained.quantizer,
        "act": trained.args.act,
        "num_classes": str(trained.num_classes),
        "shape": json.dumps(trained.shape),
        "normalisation": json.dumps(trained.normalisation),
        "args": json.dumps({name: value for name, value in vars(trained.args).items() if name not in NOT_WRITTEN}),
    }
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    write(path, import_safetensors().torch.save(contiguous, metadata))


def write(path: Path, contents: bytes) -> None:
    """Write a file. At any moment `path` is the old file or the complete new one. Checkpoints are never overwritten."""
    if not path.name:
        raise RunError(f"--out {path} is a folder: give the name of a file")
    if is_checkpoint(path):
        raise RunError(f"{path} is a checkpoint, which an export would overwrite: give another name with --out")
    with runs.replacing(path, "wb") as f:
        f.write(contents)


def is_checkpoint(path: Path) -> bool:
    """Whether a file exists that torch.save has written: a zip archive, or in old versions a pickle."""
    try:
        with open(path, "rb") as f:
            return f.read(8).startswith((b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9c"))
    except OSError:  # it does not exist
        return False


@torch.no_grad()
def read_bits(path: Path | str) -> Trained:
    """The network of a file that `write_bits` has written. Raises RunError for a damaged or another file."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, "pt") as f:
            metadata, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as e:
        raise RunError(f"{path} is damaged or not a .safetensors file ({one_line(e)}): export it again") from None
    if metadata.get("format") != FORMAT:
        raise RunError(f"{path} is a .safetensors file, but not one of packed bits: export one with --to bits")
    try:
        if metadata.keys() != FIELDS:
            raise ValueError("its metadata have other fields")
        shape, num_classes = tuple(json.loads(metadata["shape"])), json.loads(metadata["num_classes"])
        normalisation, flags = json.loads(metadata["normalisation"]), json.loads(metadata["args"])
        check_description(shape, num_classes, normalisation)
        if isinstance(flags, dict):
            flags = {name: value for name, value in flags.items() if name not in NOT_WRITTEN}
        args, net = build(flags, num_classes, shape, path)
        quantizer = binary_quantizer(net, path)
        if (metadata["arch"], metadata["act"], metadata["quantizer"]) != (args.arch, args.act, quantizer):
            raise ValueError("its metadata contradict each other")
        check_finite(tensors)
        unpack_into(net, tensors)
    except (TypeError, ValueError, RecursionError) as e:
        raise RunError(f"{path} is damaged ({e}): export it again") from None
    return Trained(net.eval(), args, num_classes, shape, normalisation, quantizer, path)


def unpack_into(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of a .safetensors file. Raises ValueError unless they are exactly those of the network."""
    tensors = dict(tensors)
    layers = named_binary_layers(net)
    for name, layer in layers.items():
        rows, n = len(layer.weight), layer.weight[0].numel()
        packed_shape = (rows, math.ceil(n / 64) * 8)
        bits = take(tensors, f"{name}.weight.bits", packed_shape, torch.uint8)
        scale = take(tensors, f"{name}.weight.scale", (rows,), torch.float32)
        signs = unpack(bits, n).to(torch.int8) * 2 - 1
        if f"{name}.weight.nonzero" in tensors:
            signs *= unpack(take(tensors, f"{name}.weight.nonzero", packed_shape, torch.uint8), n)
        if (scale < 0).any():
            raise ValueError(f"{name}.weight.scale has negative elements")
        freeze(layer, signs.view(layer.weight.shape), scale)
    packed = {f"{name}.weight" for name in layers}
    for name, value in net.state_dict().items():
        if name not in packed:
            dtypes = (torch.float32, torch.float16) if value.is_floating_point() else (value.dtype,)
            value.copy_(take(tensors, name, value.shape, *dtypes))
    if tensors:
        raise ValueError(f"the network has no {next(iter(tensors))!r:.100}")


def take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """Remove and return a tensor. Raises ValueError if it does not exist or has another shape or dtype."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    value = tensors.pop(name)
    if value.shape != shape or value.dtype not in dtypes:
        raise ValueError(f"{name} must have the shape {list(shape)} and {dtypes[0]}")
    return value


def load(path: Path | str) -> nn.Module:
    """The PyTorch model in a .safetensors file of --to bits, in eval mode: images [B, *shape] -> logits.

    Written without --half, its logits are the checkpoint's, bit for bit. Raises RunError as `read_bits` does.
    """
    return read_bits(path).net


def size_table(trained: Trained, half: bool) -> Table:
    """Bytes of the weights before (float32) and after packing, by layer and in all."""
    table = Table(title=f"{trained.args.arch}, weights by {trained.quantizer}", title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("weights", "float32 bytes", "packed bytes", "ratio", "+1 %", "0 %"):
        table.add_column(column, justify="right")
    rows = []  # name, weights, float32 bytes, packed bytes, percentages
    state = trained.net.state_dict()
    for name, layer in trained.layers().items():
        signs = layer.signs.flatten(1)
        planes = 2 if (signs == 0).any() else 1
        packed = len(signs) * (planes * math.ceil(signs.shape[1] / 64) * 8 + 4)
        shares = [f"{100 * (signs == value).double().mean().item():.1f}" for value in (1, 0)]
        rows.append([name, signs.numel(), 4 * signs.numel(), packed, *shares])
        del state[f"{name}.weight"]
    count = sum(value.numel() for value in state.values() if value.is_floating_point())
    rows.append(["all else, float16" if half else "all else", count, 4 * count, (2 if half else 4) * count])
    rows.append(["in all", *[sum(row[i] for row in rows) for i in (1, 2, 3)]])
    for row in rows:
        name, count, before, after, *shares = row
        style = "bold" if row is rows[-1] else None
        table.add_row(name, f"{count:,}", f"{before:,}", f"{after:,}", f"{before / after:.1f}", *shares, style=style)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# --to onnx.


def import_onnx(name: str = "onnx"):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RunError(f"this needs {name}: pip install onnx onnxruntime") from None


def write_onnx(trained: Trained, path: Path) -> None:
    """Write an ONNX file: 'image' float32 [B, C, H, W], normalised as in training -> 'logits' [B, num_classes]."""
    onnx = import_onnx()
    writer = OnnxWriter(export_c.operations(trained.net, trained.shape))
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", *trained.shape])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", trained.num_classes])
    nodes, constants = writer.needed_for("logits")
    graph = onnx.helper.make_graph(nodes, trained.args.arch, [image], [logits], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    for name, values in zip(("scale", "shift"), trained.normalisation, strict=True):
        model.metadata_props.add(key=name, value=json.dumps(values))
    onnx.checker.check_model(model)
    write(path, model.SerializeToString())


class OnnxWriter:
    """Makes the nodes and constants of an ONNX graph.

    Binary weights are int8 and followed by DequantizeLinear. If activations are floats, its scale is the filter's scale
    times the factor of the BatchNorm that follows, and the BatchNorm's shift is the convolution's bias.

    If activations are binary, a rounding can change a bit. The graph is then `exact`:
    - Scales are 1, so convolutions of bits add integers. A binary activation compares such a sum with two integers,
      which include the BatchNorm before it.
    - If a shortcut is added in between, the BatchNorm is a Mul and an Add in double, rounded once.
    - The few convolutions of floats have three dimensions, channels the last. onnxruntime then adds in PyTorch's order.
    """

    def __init__(self, ops: list[Op]):
        self.onnx = import_onnx()
        self.nodes, self.constants = [], {}
        self.result = {}  # operation -> the name of its result in the graph
        self.uses = export_c.consumers(ops)
        self.exact = any(op.sums_bits for op in ops)
        self.zero = self.constant("zero", torch.tensor(0.0))
        self.one = self.constant("one", torch.tensor(1.0))
        self.minus_one = self.constant("minus_one", torch.tensor(-1.0))
        for group in export_c.fuse(ops):
            self.write_group(group)
        self.node("Flatten", self.result[ops[-1]], name="logits", axis=1)

    def constant(self, name: str, value: Tensor) -> str:
        array = np.ascontiguousarray(value.detach().numpy())
        self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def channel_constants(self, op: Op, dtype: torch.dtype = torch.float32) -> list[str]:
        """An operation's constants, each [C, 1, 1] or [C, H, W]. Returns their names."""
        names = []
        for i, value in enumerate(op.constants):
            value = value if value.dim() == 3 else rearrange(value, "c -> c 1 1")
            names.append(self.constant(f"{op.name}_{i}", value.to(dtype)))
        return names

    def node(self, op_type: str, *inputs: str, name: str, **attributes) -> str:
        """Add a node whose only output has the node's name. Returns the name."""
        self.nodes.append(self.onnx.helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def needed_for(self, name: str) -> tuple[list, list]:
        """The nodes and constants on which a node depends. Where sums are compared, other nodes are left over."""
        needed, nodes = {name}, []
        for node in reversed(self.nodes):
            if node.output[0] in needed:
                needed.update(node.input)
                nodes.insert(0, node)
        return nodes, [value for constant, value in self.constants.items() if constant in needed]

    def write_group(self, group: Group) -> None:
        first, *after = group.ops
        source = first  # the operation whose result is y
        if first.kind == "image":
            y = "image"
        elif first.kind == "conv":
            y = self.convolution(first, after)
        elif first.kind in ("maxpool", "avgpool"):
            y = self.pooling(first)
        else:
            after, source = group.ops, first.inputs[0]
            y = self.result[source]
        sums = y
        for op in after:
            others = [self.result[x] for x in op.inputs if x in self.result and x is not source]
            y, source = self.elementwise(op, y, others), op
        self.result[group.result] = y
        for op in self.uses[group.result]:
            if op.kind in BINARY_ACTIVATIONS:
                self.result[op] = self.binary_activation(op, y, sums, group)

    def convolution(self, op: Op, after: list[Op]) -> str:
        """A convolution, together with the operations of `after` that it can include. They are removed from it."""
        scale, bias = torch.ones(op.shape[0]), None
        while not self.exact and after and after[0].kind in ("scale", "bias", "batchnorm"):
            folded = after.pop(0)
            if folded.kind != "bias":
                scale = scale * folded.constants[0]
                bias = None if bias is None else bias * folded.constants[0]
            if folded.kind != "scale":
                bias = folded.constants[-1] if bias is None else bias + folded.constants[-1]
        x, k, s, p = self.result[op.inputs[0]], op.kernel, op.stride, op.padding
        if op.weight.dtype == torch.int8:
            zero_point = self.constant(f"{op.name}_zero_point", torch.zeros(len(scale), dtype=torch.int8))
            weight = self.constant(f"{op.name}_weight", op.weight)
            scale = self.constant(f"{op.name}_scale", scale)
            weight = self.node("DequantizeLinear", weight, scale, zero_point, name=f"{op.name}_dequantized", axis=0)
        elif self.exact:
            return self.convolution_in_three_dimensions(op)
        else:
            weight = self.constant(f"{op.name}_weight", op.weight * rearrange(scale, "f -> f 1 1 1"))
        inputs = [x, weight]
        if bias is not None:
            inputs.append(self.constant(f"{op.name}_bias", bias))
        return self.node("Conv", *inputs, name=op.name, kernel_shape=[k, k], strides=[s, s], pads=[p] * 4)

    def convolution_in_three_dimensions(self, op: Op) -> str:
        """A convolution of floats over [1, H, W, C], whose kernel [1, k, k, C] covers all channels."""
        k, s, p = op.kernel, op.stride, op.padding
        x = self.node("Transpose", self.result[op.inputs[0]], name=f"{op.name}_channels_last", perm=[0, 2, 3, 1])
        x = self.node("Unsqueeze", x, self.constant("axis_1", torch.tensor([1])), name=f"{op.name}_unsqueezed")
        weight = self.constant(f"{op.name}_weight", rearrange(op.weight, "f c ky kx -> f 1 ky kx c"))
        y = self.node(
            "Conv",
            x,
            weight,
            name=f"{op.name}_sums",
            kernel_shape=[k, k, op.inputs[0].shape[0]],
            strides=[s, s, 1],
            pads=[p, p, 0, p, p, 0],
        )
        return self.node("Squeeze", y, self.constant("axis_4", torch.tensor([4])), name=op.name)

    def pooling(self, op: Op) -> str:
        x, k, s, p = self.result[op.inputs[0]], op.kernel, op.stride, op.padding
        if op.kernel == 0 and op.shape[1:] == (1, 1):
            return self.node("GlobalAveragePool", x, name=op.name)
        if op.kernel == 0:  # ONNX has no adaptive pooling: two matrices average over rows and over columns
            rows, columns = map(averaging_matrix, op.inputs[0].shape[1:], op.shape[1:])
            y = self.node("MatMul", self.constant(f"{op.name}_rows", rows), x, name=f"{op.name}_by_rows")
            return self.node("MatMul", y, self.constant(f"{op.name}_columns", columns.T), name=op.name)
        whole_windows = (op.inputs[0].shape[1] + 2 * p - k) // s + 1
        sizes = {"kernel_shape": [k, k], "strides": [s, s], "ceil_mode": int(op.shape[1] != whole_windows)}
        if op.kind == "maxpool":
            return self.node("MaxPool", x, name=op.name, pads=[p] * 4, **sizes)
        return self.node("AveragePool", x, name=op.name, **sizes)

    def elementwise(self, op: Op, x: str, others: list[str]) -> str:
        """others: the second summand of 'add'."""
        if op.kind == "relu":
            return self.node("Relu", x, name=op.name)
        if op.kind == "hardtanh":
            return self.node("Clip", x, self.minus_one, self.one, name=op.name)
        if op.kind == "add":
            return self.node("Add", x, *others, name=op.name)
        if op.kind == "batchnorm":
            return self.batchnorm(op, x)
        op_type = {"scale": "Mul", "bias": "Add", "prelu": "PRelu"}[op.kind]
        return self.node(op_type, x, *self.channel_constants(op), name=op.name)

    def batchnorm(self, op: Op, x: str) -> str:
        alpha, beta = self.channel_constants(op, torch.float64 if self.exact else torch.float32)
        if not self.exact:
            return self.node("Add", self.node("Mul", x, alpha, name=f"{op.name}_product"), beta, name=op.name)
        x = self.node("Cast", x, name=f"{op.name}_double", to=self.onnx.TensorProto.DOUBLE)
        product = self.node("Mul", x, alpha, name=f"{op.name}_product")
        y = self.node("Add", product, beta, name=f"{op.name}_sum")
        return self.node("Cast", y, name=op.name, to=self.onnx.TensorProto.FLOAT)

    def binary_activation(self, op: Op, y: str, sums: str, group: Group) -> str:
        """The binary activation of a group's result y, or, where that is possible, of the sums that it starts with."""
        bounds = export_c.interval(group, op)
        if bounds:
            low, high = [rearrange(bound, "c -> c 1 1").float() for bound in bounds]
            low_name, high_name = self.constant(f"{op.name}_low", low), self.constant(f"{op.name}_high", high)
            bit = self.node("GreaterOrEqual", sums, low_name, name=f"{op.name}_is_high")
            if (high < group.max_sum).any():
                is_low = self.node("LessOrEqual", sums, high_name, name=f"{op.name}_is_low")
                bit = self.node("And", bit, is_low, name=f"{op.name}_bit")
        else:
            if op.kind == "step":
                theta, delta = self.channel_constants(op)
                difference = self.node("Sub", y, theta, name=f"{op.name}_difference")
                y = self.node("Mul", difference, delta, name=f"{op.name}_product")
            bit = self.node("GreaterOrEqual", y, self.zero, name=f"{op.name}_bit")
        if op.kind == "sign":
            return self.node("Where", bit, self.one, self.minus_one, name=op.name)
        return self.node("Cast", bit, name=op.name, to=self.onnx.TensorProto.FLOAT)


def averaging_matrix(size: int, out_size: int) -> Tensor:
    """[out_size, size]: row i averages elements ⌊i·size/out_size⌋ to ⌈(i + 1)·size/out_size⌉."""
    matrix = torch.zeros(out_size, size)
    for i in range(out_size):
        begin, end = i * size // out_size, math.ceil((i + 1) * size / out_size)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def onnx_session(path: Path, threads: int = 0):
    """onnxruntime with a file, on a number of CPU threads (0: all)."""
    ort = import_onnx("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------------------------------------------------------
# --to c.


def c_source(trained: Trained) -> str:
    """The C file of a network."""
    args = trained.args
    about = f"{args.arch}, weights binarized by {trained.quantizer}, activations: {args.act}"
    return export_c.c_source(export_c.operations(trained.net, trained.shape), trained.normalisation, about)


# ---------------------------------------------------------------------------------------------------------------------
# Checks.


def load_test(trained: Trained, data_dir: str | None):
    """The test batches of the data set that the network was trained with. Raises DataError if it is not there."""
    args, folder = trained.args, data_dir or trained.args.data_dir
    image_size = trained.shape[1] if args.dataset in ("folder", "imagenet") else None
    test = data.load(args.dataset, folder, image_size=image_size, log=runs.console.print)[-1]
    if test.shape != trained.shape or test.num_classes != trained.num_classes:
        raise RunError(
            f"{folder} has images of {test.shape} and {test.num_classes} classes, and the network is for images of "
            f"{trained.shape} and {trained.num_classes} classes: say with --data-dir where its own are"
        )
    return test


def check(trained: Trained, test, to: str, path: Path, limit: int | None) -> tuple[int, int, float]:
    """Compare the file that was written with the network. Prints and returns the result of `compare`."""
    with tempfile.TemporaryDirectory() as folder:
        if to == "bits":
            net = load(path)
            logits_of = lambda images, at: net(images)
        elif to == "onnx":
            session = onnx_session(path)
            logits_of = lambda images, at: torch.from_numpy(
                session.run(None, {"image": images.contiguous().numpy()})[0]
            )
        else:
            library = export_c.compile_library(path, Path(folder))
            logits_of = lambda images, at: export_c.predict(library, test.images[at], trained.num_classes)
        equal, count, largest = compare(trained, test, logits_of, limit)
    runs.console.print(
        f"{path}: {equal:,} of {count:,} test images get PyTorch's prediction; logits differ by {largest:.1e} at most"
    )
    return equal, count, largest


@torch.no_grad()
def compare(trained: Trained, test, logits_of: Callable, limit: int | None) -> tuple[int, int, float]:
    """Compare the network's logits with others: those of logits_of(images of a batch, its slice of the test images).

    Returns the number of images with the same prediction, the number of images, and the largest difference of logits.
    limit: compare only so many images.
    """
    equal = count = 0
    largest, limit = 0.0, min(test.size, limit or test.size)
    with Progress(console=runs.console, transient=True, disable=not runs.console.is_terminal) as bar:
        task = bar.add_task("checking", total=limit)
        for images, _ in test.epoch():
            images = images[: limit - count]
            if not len(images):
                break
            expected, logits = trained.net(images), logits_of(images, slice(count, count + len(images)))
            same = (expected.argmax(1) == logits.argmax(1)) & logits.isfinite().all(1)
            equal += same.sum().item()
            largest = max(largest, (expected - logits).abs().nan_to_num(math.inf).max().item())
            count += len(images)
            bar.update(task, completed=count)
    return equal, count, largest


# ---------------------------------------------------------------------------------------------------------------------
# --bench.


def plain_network(trained: Trained) -> nn.Module:
    """The network as a user of PyTorch would run it: Ŵ are ordinary float32 weights, activations are binarized."""
    net = copy.deepcopy(trained.net).to(memory_format=torch.channels_last)
    for layer in models.binary_layers(net):
        function = layer._conv_forward if isinstance(layer, nn.Conv2d) else nn.functional.linear
        layer.forward = lambda x, m=layer, f=function: f(m.binary_input(x), m.weight, m.bias)
    return net


@torch.inference_mode()
def bench(trained: Trained, rounds: int) -> dict:
    """Time the network, in PyTorch, onnxruntime and C, and its binary convolutions one by one. Prints two tables.

    Returns {"networks": rows, "layers": rows}; the times of networks are ms per image.
    """
    results = {"networks": [], "layers": []}
    title = f"{trained.args.arch}, ms per image (median of {rounds}, in turn)"
    table = Table(title=title, title_justify="left")
    for column in ("cores", "batch", "PyTorch float32", "onnxruntime", "ours", "PyTorch / ours", "onnxruntime / ours"):
        table.add_column(column, justify="right")
    net, threads_before = plain_network(trained), torch.get_num_threads()
    factor, shift = [rearrange(torch.tensor(values), "c -> c 1 1") for values in trained.normalisation]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_onnx(trained, folder / "network.onnx")
        (folder / "network.c").write_text(c_source(trained))
        flags = ["-march=native", "-fopenmp", "-DBINARY_CONV", export_c.kernel()._name]
        library = export_c.compile_library(folder / "network.c", folder, *flags)
        for threads in sorted({1, os.cpu_count() or 1}):
            session = onnx_session(folder / "network.onnx", threads)
            torch.set_num_threads(threads)
            library.omp_set_num_threads(threads)
            for batch in (1, 32):
                pixels = torch.randint(256, (batch, *trained.shape)).float()
                images = pixels * factor + shift
                functions = functions_to_time(trained, net, session, library, pixels=pixels, images=images)
                ms = {name: 1e3 * s / batch for name, s in export_c.compare_speed(functions, rounds).items()}
                results["networks"].append({"cores": threads, "batch": batch, **ms})
                ratios = [ms["pytorch"] / ms["ours"], ms["onnxruntime"] / ms["ours"]]
                cells = [f"{value:.3f}" for value in ms.values()] + [f"{ratio:.1f}" for ratio in ratios]
                table.add_row(str(threads), str(batch), *cells)
    runs.console.print(table)
    torch.set_num_threads(1)
    results["layers"] = export_c.bench_convolutions(export_c.operations(trained.net, trained.shape), rounds)
    torch.set_num_threads(threads_before)
    return results


def functions_to_time(trained: Trained, net: nn.Module, session, library, *, pixels: Tensor, images: Tensor) -> dict:
    """Functions without arguments that predict a batch. images: the pixels, normalised."""
    channels_last, feed = images.contiguous(memory_format=torch.channels_last), {"image": images.numpy()}
    return {
        "pytorch": lambda: net(channels_last),
        "onnxruntime": lambda: session.run(None, feed),
        "ours": lambda: export_c.predict(library, pixels, trained.num_classes),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="a run's folder, a checkpoint, or a .safetensors file that this script has written")
    parser.add_argument("--to", metavar="FORMAT", help=f"one of {', '.join(SUFFIXES)}")
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: in the run's folder, with its name)")
    parser.add_argument("--half", action="store_true", help="with --to bits: what is not binary in float16")
    parser.add_argument(
        "--data-dir",
        help="folder of the test images (default: the run's; for a .safetensors file, the trainer's default)",
    )
    parser.add_argument("--images", type=int, help="check only the first so many test images (default: all)")
    parser.add_argument("--bench", action="store_true", help="time the network against PyTorch and onnxruntime")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of --bench (default: 9)")
    return parser


def main(argv=None) -> int:
    args = flags().parse_args(argv)
    if args.bench == bool(args.to) or (args.to and args.to not in SUFFIXES):
        raise RunError(f"say what to make, --to {', --to '.join(SUFFIXES)}, or else --bench")
    for name in ("images", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise RunError(f"--{name} must be at least 1; it is {getattr(args, name)}")
    if args.half and args.to != "bits":
        raise RunError("--half is for --to bits: leave it out")
    trained = read(args.run)
    if (args.to == "c" or args.bench) and trained.shape[1] > data.RESIDENT_UP_TO:
        raise RunError(
            f"--to c and --bench are for networks of images with at most {data.RESIDENT_UP_TO} pixels a side"
        )
    if args.bench:
        bench(trained, args.rounds)
        return 0
    source = trained.path.resolve()
    name = source.parent.name if source.name == "best.pt" else source.stem
    path = Path(args.out) if args.out else source.with_name(f"{name}{SUFFIXES[args.to]}")
    test = reason = None
    try:
        test = load_test(trained, args.data_dir)
    except data.DataError as e:
        reason = str(e)
    if args.to == "bits":
        write_bits(trained, path, args.half)
        runs.console.print(size_table(trained, args.half))
    elif args.to == "onnx":
        write_onnx(trained, path)
    else:
        write(path, c_source(trained).encode())
    runs.console.print(f"{path}: {path.stat().st_size:,} bytes")
    equal = count = 0
    try:
        if test is None:
            raise RunError(reason)
        equal, count, _ = check(trained, test, args.to, path, args.images)
    except RunError as e:
        runs.console.print(f"{path} is not checked: {e}")
    if equal < count and not args.half:
        raise RunError(f"{path} and {args.run} disagree on {count - equal:,} of {count:,} images: do not use the file")
    return 0


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
