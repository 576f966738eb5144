"""The trained bits: a binary network as one packed file, as ONNX, or as one C file, each checked against PyTorch.

    python export.py runs/NAME --to bits        # runs/NAME/NAME.safetensors: 1 bit a weight; export.load(file) reads it
    python export.py runs/NAME --to onnx        # int8 weights, DequantizeLinear, no BatchNorm  (pip install onnx
    python export.py runs/NAME --to c           # one C99 file: void predict(const float *image, float *logits)
    python export.py runs/NAME --bench          # ms an image: PyTorch, onnxruntime, C with binary_conv.cpp

Instead of a run's folder (its best.pt) any checkpoint may be given, or a .safetensors file that was written here. The
network is the one that is tested in training: of ProxConnect++'s methods the one with true signs.

A .safetensors file holds, for each binary layer L with weights [C_out, C_in, k, k] or [F_out, F_in],
    L.weight.bits      uint8 [C_out, 8·words]: a row is a filter, its n weights in PyTorch's order (C_in, then ky, kx),
                       weight i being bit i % 8 (the lowest first) of byte i // 8; 1 is +1, 0 is −1. Rows are padded
                       with 0 to whole words of 64 bits: as little-endian uint64, it is bit i % 64 of word i // 64
    L.weight.nonzero   the same, only where some weights are 0 (pruned): 1 where the weight is not 0. 2 bits a weight
    L.weight.scale     float32 [C_out]; Ŵ = scale · (±1 or 0), exactly
and all other parameters and buffers under their names, in float32 or, with --half, float16. Metadata: arch, quantizer,
act, shape (of an image), num_classes, normalisation (of pixels 0…255, by channel: factors, then what is added), args
(the trainer's flags, JSON), format. The PyTorch model and the ONNX file take normalised images, the C file 0…255.
With --half logits differ a little, and where activations are binary some bits do.

Copy with: binary_conv.cpp, models.py, quantizers.py, data.py, runs.py, and the trainers whose runs are exported:
train_fsg.py (with hypernet.py), train_sibnn.py, train_proxconnect.py, train_bihalf.py.
"""

import argparse
import copy
import ctypes
import functools
import hashlib
import importlib
import json
import math
import operator
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import data
import models
import runs

FORMATS = {"bits": ".safetensors", "onnx": ".onnx", "c": ".c"}
TRAINERS = ("train_fsg.py", "train_sibnn.py", "train_proxconnect.py", "train_bihalf.py")
KERNELS = Path(__file__).with_name("binary_conv.cpp")
# Quantizers that are signs in the end, whatever they relax to while they train (train_proxconnect.py).
SIGNS_IN_THE_END = ("bnn", "bnn+", "bnn++", "pc", "identity")
RunError = runs.RunError


# ---------------------------------------------------------------------------------------------------------------------
# Bits.


def pack(bits: Tensor) -> Tensor:
    """bits [rows, n] bool -> uint8 [rows, 8·⌈n/64⌉]: bit i of a row is bit i % 8 of byte i // 8; padded with 0."""
    padded = np.zeros((len(bits), -(-bits.shape[1] // 64) * 64), dtype=bool)
    padded[:, : bits.shape[1]] = bits.numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little"))


def unpack(packed: Tensor, n: int) -> Tensor:
    """What `pack` was given: packed [rows, bytes] uint8, n bits a row -> [rows, n] bool."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=n, bitorder="little")).bool()


def words(bits: Tensor) -> np.ndarray:
    """bits [rows, n] bool -> [rows, ⌈n/64⌉] uint64, bit i of a row being bit i % 64 of word i // 64."""
    return pack(bits).numpy().view("<u8")


# ---------------------------------------------------------------------------------------------------------------------
# The trained network.


@dataclass
class Trained:
    """A trained network whose binary layers have constant weights, and what is known about it.

    net: in eval mode; its binary layers hold Ŵ itself as `weight` (their quantizer is the identity), and once more its
    factors, `signs` (int8, of −1, 0, +1) and `filter_scale` [C_out]: Ŵ = filter_scale · signs.
    """

    net: nn.Module
    args: argparse.Namespace
    num_classes: int
    shape: tuple[int, int, int]
    normalisation: list[list[float]]
    quantizer: str
    path: Path

    def layers(self) -> dict[str, nn.Module]:
        return dict(zip(models.binary_layer_names(self.net), models.binary_layers(self.net), strict=True))


def read(path: Path | str) -> Trained:
    """The network of a run's folder (its best.pt), a checkpoint or a .safetensors file.

    Raises RunError where there is none, where it is damaged, and where it is not binary.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "best.pt").exists():
            go_on = f"go on with it (--resume {path})" if (path / "last.pt").exists() else "train it first"
            raise RunError(f"{path} has no best.pt, so no epoch of this run has been tested yet: {go_on}")
        path = path / "best.pt"
    if path.suffix == ".safetensors":
        return read_bits(path)
    checkpoint = runs.load(path)
    if not {"args", "model", "num_classes"} <= checkpoint.keys():
        raise RunError(f"{path} is not a checkpoint of a run: give a run's folder, or its best.pt or last.pt")
    if not {"shape", "normalisation"} <= checkpoint.keys():
        raise RunError(
            f"{path} is from before checkpoints held the images' shape and normalisation: go on with the run for an "
            f"epoch (--resume {path.parent} --epochs N), which writes it anew"
        )
    args = argparse.Namespace(**checkpoint["args"])
    net = rebuild(args, checkpoint["num_classes"], checkpoint["shape"], path)
    runs.load_model(net, checkpoint["model"], path)
    broken = [name for name, v in net.state_dict().items() if not v.isfinite().all()]
    if broken:
        raise RunError(f"{path} has numbers that are NaN or infinite in {broken[0]}: give another checkpoint")
    layers = models.binary_layers(net)
    if not layers:
        raise RunError(f"{path} is a full-precision network, which has no bits: give a run with binary weights")
    quantizer = layers[0].quantizer
    for layer in layers:
        if layer.quantizer in SIGNS_IN_THE_END:
            layer.quantizer, layer.options = "bwn", {}
    with torch.no_grad():
        for name, layer in zip(models.binary_layer_names(net), layers, strict=True):
            freeze(layer, *factors(layer.binary_weight(), name))
    shape, normalisation = tuple(checkpoint["shape"]), checkpoint["normalisation"]
    return Trained(net.eval(), args, checkpoint["num_classes"], shape, normalisation, quantizer, path)


def rebuild(args, num_classes: int, shape: tuple[int, int, int], path: Path) -> nn.Module:
    """The network that the trainer named in args.script trains with these flags."""
    script = getattr(args, "script", None)
    if script not in TRAINERS:
        raise RunError(f"{path} was written by {script}: only runs of {', '.join(TRAINERS)} can be exported")
    trainer = importlib.import_module(Path(script).stem)
    flags = vars(trainer.flags().parse_args([])) | vars(args)  # an older run lacks the newer flags
    try:
        return trainer.network(argparse.Namespace(**flags), num_classes, tuple(shape))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise RunError(f"{path} is damaged: its flags do not make a network ({e})") from None


def factors(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Ŵ as signs (int8, shape of weight) and the scale of each filter [C_out]. Raises RunError where it is not that."""
    rows = weight.flatten(1)
    scale = rows.abs().amax(1)
    signs = torch.where(scale[:, None] == 0, 1, rows.sign()).to(torch.int8)  # a filter of scale 0 needs no zeros
    if not torch.equal(signs * scale[:, None], rows):
        raise RunError(f"the weights of {name} are not −1, 0 and +1 times one scale a filter: it cannot be packed")
    return signs.view(weight.shape), scale


def freeze(layer: nn.Module, signs: Tensor, scale: Tensor) -> None:
    """The layer computes with the constant Ŵ = scale · signs from now on."""
    layer.weight = nn.Parameter(signs * scale.view(-1, *[1] * (signs.dim() - 1)), requires_grad=False)
    layer.signs, layer.filter_scale = signs, scale
    layer.quantizer, layer.options, layer.unit, layer.scale = "identity", {}, 1.0, 1.0


# ---------------------------------------------------------------------------------------------------------------------
# --to bits.


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise RunError("--to bits needs safetensors: pip install safetensors") from None
    return safetensors


def write_bits(trained: Trained, path: Path, half: bool = False) -> None:
    """The .safetensors file that the top of this file describes."""
    layers = trained.layers()
    tensors = {}
    for name, value in trained.net.state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            fits = half and value.is_floating_point() and value.half().isfinite().all()
            tensors[name] = value.half() if fits else value
            continue
        rows = layer.signs.flatten(1)
        tensors[f"{name}.bits"], tensors[f"{name}.scale"] = pack(rows > 0), layer.filter_scale
        if (rows == 0).any():
            tensors[f"{name}.nonzero"] = pack(rows != 0)
    flags = {k: v for k, v in vars(trained.args).items() if k not in runs.MAY_CHANGE}
    metadata = {
        **{"format": "bnn-bits-1", "arch": trained.args.arch, "quantizer": trained.quantizer},
        **{"act": trained.args.act, "shape": json.dumps(trained.shape), "num_classes": str(trained.num_classes)},
        "normalisation": json.dumps(trained.normalisation),
        "args": json.dumps(flags),
    }
    contents = safetensors().torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata)
    write(path, contents)


def write(path: Path, contents: bytes) -> None:
    """`path` is at any moment the old file or the new one, whole."""
    if not path.name:
        raise RunError(f"--out {path} is a folder: give the name of a file")
    with runs.replacing(path, "wb") as f:
        f.write(contents)


def read_bits(path: Path | str) -> Trained:
    """The network in a file that `write_bits` wrote. Raises RunError for a file that is damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        with safetensors().safe_open(path, "pt") as f:
            metadata, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (safetensors().SafetensorError, OSError) as e:
        raise RunError(f"{path} is damaged or not a .safetensors file ({e}): export it again") from None
    if metadata.get("format") != "bnn-bits-1":
        raise RunError(f"{path} is a .safetensors file, but not one of packed bits: export one with --to bits")
    try:
        args = argparse.Namespace(**json.loads(metadata["args"]))
        shape, num_classes = tuple(json.loads(metadata["shape"])), int(metadata["num_classes"])
        normalisation, quantizer = json.loads(metadata["normalisation"]), metadata["quantizer"]
        net = rebuild(args, num_classes, shape, path)
        for name, layer in zip(models.binary_layer_names(net), models.binary_layers(net), strict=True):
            bits, nonzero = (tensors.pop(f"{name}.weight.{part}", None) for part in ("bits", "nonzero"))
            n, rows = layer.weight[0].numel(), len(layer.weight)
            scale = tensors.pop(f"{name}.weight.scale")
            planes = [bits, *([] if nonzero is None else [nonzero])]
            if any(p.dtype != torch.uint8 or p.shape != (rows, -(-n // 64) * 8) for p in planes):
                raise ValueError
            if scale.dtype != torch.float32 or scale.shape != (rows,):
                raise ValueError
            signs = unpack(bits, n).to(torch.int8) * 2 - 1
            if nonzero is not None:
                signs *= unpack(nonzero, n)
            freeze(layer, signs.view(layer.weight.shape), scale)
            tensors[f"{name}.weight"] = layer.weight
        net.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise RunError(f"{path} is damaged, or not of the network that it names: export it again") from None
    return Trained(net.eval(), args, num_classes, shape, normalisation, quantizer, path)


def load(path: Path | str) -> nn.Module:
    """The PyTorch model in a .safetensors file of --to bits, in eval mode: images [B, *shape] -> logits.

    Written without --half, its logits are the checkpoint's, bit for bit. Raises RunError as `read_bits` does.
    """
    return read_bits(path).net


def sizes(trained: Trained, half: bool) -> Table:
    """Bytes before (float32) and after, by layer and in all."""
    table = Table(title=f"{trained.args.arch}, weights by {trained.quantizer}", title_justify="left")
    for column in ("", "weights", "float32 bytes", "packed bytes", "ratio", "+1 %", "0 %"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")

    def row(name: str, count: int, before: int, after: int, *shares: float, **style) -> None:
        shares = [f"{100 * share:.1f}" for share in shares] or ["", ""]
        table.add_row(name, f"{count:,}", f"{before:,}", f"{after:,}", f"{before / after:.1f}", *shares, **style)

    state, total = trained.net.state_dict(), np.zeros(3, dtype=int)
    for name, layer in trained.layers().items():
        signs = layer.signs.flatten(1)
        planes = 2 if (signs == 0).any() else 1
        counts = signs.numel(), 4 * signs.numel(), planes * len(signs) * -(-signs.shape[1] // 64) * 8 + 4 * len(signs)
        row(name, *counts, (signs > 0).double().mean().item(), (signs == 0).double().mean().item())
        total += counts
        del state[f"{name}.weight"]
    rest = [value for value in state.values() if value.is_floating_point()]
    counts = sum(v.numel() for v in rest), 4 * sum(v.numel() for v in rest)
    row("all else" + (", float16" if half else ""), *counts, counts[1] // (2 if half else 1))
    total += (*counts, counts[1] // (2 if half else 1))
    row("in all", *total, style="bold")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The network as a list of operations, from which ONNX and C are written.


@dataclass(eq=False)
class Op:
    """One operation. kind: 'image' (the input), 'sign' and 'step' (binary activations), 'conv', 'times' (a factor for
    each channel), 'plus' (a bias), 'affine' (a BatchNorm), 'relu', 'hardtanh', 'prelu', 'max', 'average', 'add'.

    shape: [C, H, W] of its result; linear layers are convolutions, with results [C, 1, 1].
    Of 'conv' weight is [C_out, C_in, k, k], float32 or, of a binary layer, int8: its signs, the scale being the 'times'
    that follows. numbers: the other kinds' constants, [C]: θ and Δ, factor, bias, factor and bias (of 'affine': α and β
    in αx + β), slope.
    """

    kind: str
    name: str
    inputs: list["Op"]
    shape: tuple[int, int, int]
    numbers: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None
    kernel: int = 1
    stride: int = 1
    padding: int = 0

    @property
    def is_binary(self) -> bool:
        """A convolution of bits with bits."""
        return self.kind == "conv" and self.inputs[0].kind in ("sign", "step")


ELEMENTWISE = ("times", "plus", "affine", "relu", "hardtanh", "prelu", "add")


class Leaves(fx.Tracer):
    """Traces down to the modules that hold no others."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return next(m.children(), None) is None


@torch.no_grad()
def operations(trained: Trained) -> list[Op]:
    """The network's operations, each after its inputs, the logits last. Raises RunError for one of another kind."""
    net, ops = trained.net, {}
    try:
        traced = fx.GraphModule(net, Leaves().trace(net))
        ShapeProp(traced).propagate(torch.zeros(1, *trained.shape))
    except Exception as e:  # control flow that depends on values, a call that tracing does not know, …
        raise unknown(trained, f"it cannot be traced: {str(e).splitlines()[0][:100]}") from None
    found = []

    def new(kind: str, node, inputs: list[Op], shape=None, **constants) -> Op:
        for other in found:
            if kind == "sign" == other.kind and other.inputs == inputs:  # which another layer takes already
                return other
        op = Op(kind, f"{node.name}_{kind}", inputs, shape or inputs[0].shape, **constants)
        found.append(op)
        return op

    for node in traced.graph.nodes:
        inputs = [ops[arg] for arg in node.args if isinstance(arg, fx.Node)]
        if node.op == "output":
            return found
        if "tensor_meta" not in node.meta:
            raise unknown(trained, f"there is no rule for {node.target}")
        shape = tuple(node.meta["tensor_meta"].shape[1:])
        shape += (1,) * (3 - len(shape))
        m = traced.get_submodule(node.target) if node.op == "call_module" else None
        if node.op == "placeholder":
            ops[node] = new("image", node, [], shape)
        elif isinstance(m, nn.Conv2d | nn.Linear):
            ops[node] = convolution(m, functools.partial(new, node=node), inputs[0], shape)
        elif isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            # As PyTorch computes it on a CPU, rounding where it rounds.
            alpha = torch.rsqrt(m.running_var + m.eps) * m.weight
            beta = (m.bias.double() - m.running_mean.double() * alpha.double()).float()
            ops[node] = new("affine", node, inputs, numbers=[alpha, beta])
        elif isinstance(m, nn.ReLU):
            ops[node] = new("relu", node, inputs)
        elif isinstance(m, nn.Hardtanh) and (m.min_val, m.max_val) == (-1, 1):
            ops[node] = new("hardtanh", node, inputs)
        elif isinstance(m, nn.PReLU):
            ops[node] = new("prelu", node, inputs, numbers=[m.weight.expand(shape[0])])
        elif isinstance(m, nn.MaxPool2d):
            ops[node] = new("max", node, inputs, shape, kernel=m.kernel_size, stride=m.stride, padding=m.padding)
        elif isinstance(m, nn.AvgPool2d) and m.kernel_size == m.stride and m.padding == 0 and not m.count_include_pad:
            ops[node] = new("average", node, inputs, shape, kernel=m.kernel_size, stride=m.stride)
        elif isinstance(m, nn.AdaptiveAvgPool2d) or (node.target == "mean" and node.kwargs == {"dim": (2, 3)}):
            # kernel 0: output i of n is the average from ⌊i·H/n⌋ to ⌈(i + 1)·H/n⌉. From H to H that is nothing.
            ops[node] = inputs[0] if shape == inputs[0].shape else new("average", node, inputs, shape, kernel=0)
        elif node.target is operator.add and len(inputs) == 2:
            ops[node] = new("add", node, inputs)
        elif isinstance(m, nn.Identity | nn.Dropout) or (node.target == "flatten" and node.args[1:] == (1,)):
            ops[node] = inputs[0]
        else:
            raise unknown(trained, f"there is no rule for {type(m).__name__ if m else node.target}")
    raise unknown(trained, "it has no output")


def unknown(trained: Trained, reason: str) -> RunError:
    return RunError(f"{trained.args.arch} can be exported --to bits only ({reason}): ONNX and C are for convolutions")


def convolution(m: nn.Module, new, x: Op, shape: tuple[int, int, int]) -> Op:
    """A Conv2d's or a Linear's operations: binary activation, convolution, scale, bias. x: its input; new makes one."""
    if getattr(m, "act", "none") != "none":
        # Of flattened [C, S, S] each number has its own θ and Δ.
        whole = x.shape if m.act == "si" and len(m.theta) > x.shape[0] else (-1,)
        thresholds = [v.view(whole) for v in (m.theta, m.delta)] if m.act == "si" else []
        x = new("step" if thresholds else "sign", inputs=[x], numbers=thresholds)
    weight = getattr(m, "signs", m.weight)
    if isinstance(m, nn.Linear):  # of a flattened [C, S, S]: a convolution whose kernel covers it
        sizes = dict(kernel=x.shape[1])
        weight = weight.reshape(-1, *x.shape)
    else:
        sizes = dict(kernel=m.kernel_size[0], stride=m.stride[0], padding=m.padding[0])
    y = new("conv", inputs=[x], shape=shape, weight=weight, **sizes)
    if hasattr(m, "signs") and (m.filter_scale != 1).any():
        y = new("times", inputs=[y], numbers=[m.filter_scale])
    return y if m.bias is None else new("plus", inputs=[y], numbers=[m.bias])


def consumers(ops: list[Op]) -> dict[Op, list[Op]]:
    """Who takes each operation's result."""
    return {op: [other for other in ops if op in other.inputs] for op in ops}


@dataclass(eq=False)
class Group:
    """An operation and the elementwise ones that follow it, with nothing else in between: a loop of the C file.

    result: the operation whose result it leaves. most: where its first operation makes sums of bits (whole numbers),
    the largest there may be. raw: it leaves the sums as they are, to a maximum.
    """

    ops: list[Op]
    result: Op
    most: int | None = None
    raw: bool = False


def fused(ops: list[Op]) -> list[Group]:
    """The operations in groups, in order. Binary activations belong to whoever makes what they compare."""
    uses, groups, group_of = consumers(ops), [], {}
    for op in ops:
        if op.kind in ("sign", "step"):
            continue
        host, made = None, [group_of[x] for x in op.inputs if x in group_of]
        for group in made if op.kind in ELEMENTWISE else []:
            others_are_there = all(groups.index(other) < groups.index(group) for other in made if other is not group)
            if uses[group.result] == [op] and group.result in op.inputs and others_are_there:
                host = group
        if host is None:
            host = Group([], op, op.weight[0].numel() if op.is_binary else None)
            groups.append(host)
        host.ops.append(op)
        host.result, group_of[op] = op, host
        if op.kind == "max" and made[0].most and uses[made[0].result] == [op]:
            # A scale, which is positive, and a bias may as well follow the maximum, which is then one of sums.
            conv, *after = made[0].ops
            if all(each.kind in ("times", "plus") for each in after):
                made[0].ops, made[0].raw = [conv], True
                host.ops, host.most = [op, *after], made[0].most
    return groups


def interval(group: Group, activation: Op) -> tuple[Tensor, Tensor] | None:
    """For which sums the binary activation that follows the group is 1: where low <= sum <= high, [C] int32 each.

    Every sum is tried, in PyTorch's arithmetic. None where there are no sums, where something else is added to them,
    and where in some channel it is not one interval (after a PReLU).
    """
    numbers = [v.detach() for v in activation.numbers]
    if not group.most or any(op.kind == "add" for op in group.ops) or any(v.dim() > 1 for v in numbers):
        return None
    sums = torch.arange(-group.most, group.most + 1, dtype=torch.float32)[:, None]
    v = sums.expand(-1, activation.shape[0])
    for op in group.ops[1:]:
        if op.kind == "times":
            v = v * op.numbers[0]
        elif op.kind == "plus":
            v = v + op.numbers[0]
        elif op.kind == "affine":  # with one rounding
            v = (v.double() * op.numbers[0].double() + op.numbers[1].double()).float()
        elif op.kind == "relu":
            v = v.clamp_min(0)
        elif op.kind == "hardtanh":
            v = v.clamp(-1, 1)
        else:
            v = torch.where(v > 0, v, v * op.numbers[0])
    on = v >= 0 if activation.kind == "sign" else (v - numbers[0]) * numbers[1] >= 0
    low, high = torch.where(on, sums, group.most + 1).amin(0), torch.where(on, sums, -group.most - 1).amax(0)
    is_one = on.sum(0) == (high - low + 1).clamp_min(0)
    return (low.int(), high.int()) if is_one.all() else None


# ---------------------------------------------------------------------------------------------------------------------
# --to onnx.


def onnx_module(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RunError(f"this needs {name}: pip install onnx onnxruntime") from None


def write_onnx(trained: Trained, path: Path) -> None:
    """The network as ONNX: 'image' float32 [B, C, H, W], normalised as in training -> 'logits' [B, num_classes].

    Binary weights are int8, with a DequantizeLinear. If activations are floats, its scale is the filter's times the
    factor of the BatchNorm that follows, whose other half is the convolution's bias.

    If they are binary, a rounding may change a bit. So then scales are 1, convolutions sum whole numbers, exactly, and
    BatchNorm and binary activation are a comparison of such a sum; or, where a shortcut is added in between, BatchNorm
    is a Mul and an Add rounded once (in double), and the few convolutions of floats have three dimensions, channels the
    last: then onnxruntime adds in PyTorch's order.
    """
    onnx, helper = onnx_module("onnx"), onnx_module("onnx.helper")
    ops, nodes, constants, result = operations(trained), [], {}, {}  # operation -> name of its result
    uses, exact = consumers(ops), any(op.is_binary for op in ops)

    def constant(name: str, value: Tensor) -> str:
        constants[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value.detach().numpy()), name)
        return name

    def node(kind: str, *inputs: str, name: str, **attributes) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def numbers(op: Op, double: bool = False) -> list[str]:
        wide = [v if v.dim() == 3 else v.reshape(-1, 1, 1) for v in op.numbers]
        return [constant(f"{op.name}_{i}", v.double() if double else v) for i, v in enumerate(wide)]

    def activation(op: Op, bit: str) -> None:
        if op.kind == "sign":
            result[op] = node("Where", bit, one, minus_one, name=op.name)
        else:
            result[op] = node("Cast", bit, name=op.name, to=onnx.TensorProto.FLOAT)

    def convolution(op: Op, after: list[Op]) -> str:
        """With those of the operations behind it that it can take in, which are removed from `after`."""
        scale, bias = torch.ones(op.shape[0]), None
        while not exact and after and after[0].kind in ("times", "plus", "affine"):
            folded = after.pop(0)
            if folded.kind != "plus":
                scale = scale * folded.numbers[0]
                bias = None if bias is None else bias * folded.numbers[0]
            if folded.kind != "times":
                bias = folded.numbers[-1] if bias is None else bias + folded.numbers[-1]
        x, k, s, p = result[op.inputs[0]], op.kernel, op.stride, op.padding
        extra = [] if bias is None else [constant(f"{op.name}_bias", bias)]
        if op.weight.dtype == torch.int8:
            zeros = constant(f"{op.name}_zero_point", torch.zeros(len(scale), dtype=torch.int8))
            weight, scale = constant(f"{op.name}_weight", op.weight), constant(f"{op.name}_scale", scale)
            weight = node("DequantizeLinear", weight, scale, zeros, name=f"{op.name}_dequantized", axis=0)
        elif exact:
            x = node("Transpose", x, name=f"{op.name}_channels_last", perm=[0, 2, 3, 1])
            x = node("Unsqueeze", x, constant("axis_1", torch.tensor([1])), name=f"{op.name}_three_dimensions")
            weight = constant(f"{op.name}_weight", op.weight.permute(0, 2, 3, 1)[:, None])
            sizes = dict(kernel_shape=[k, k, op.inputs[0].shape[0]], strides=[s, s, 1], pads=[p, p, 0] * 2)
            x = node("Conv", x, weight, name=f"{op.name}_sums", **sizes)
            return node("Squeeze", x, constant("axis_4", torch.tensor([4])), name=op.name)
        else:
            weight = constant(f"{op.name}_weight", op.weight * scale.view(-1, 1, 1, 1))
        return node("Conv", x, weight, *extra, name=op.name, kernel_shape=[k, k], strides=[s, s], pads=[p] * 4)

    def pool(op: Op) -> str:
        whole = (op.inputs[0].shape[1] + 2 * op.padding - op.kernel) // max(op.stride, 1) + 1  # without a part window
        sizes = dict(kernel_shape=[op.kernel] * 2, strides=[op.stride] * 2, ceil_mode=int(op.shape[1] != whole))
        x = result[op.inputs[0]]
        if op.kind == "max":
            return node("MaxPool", x, name=op.name, pads=[op.padding] * 4, **sizes)
        if op.kernel:
            return node("AveragePool", x, name=op.name, **sizes)
        if op.shape[1:] == (1, 1):
            return node("GlobalAveragePool", x, name=op.name)
        # ONNX has no adaptive pooling; averages over rows and over columns are two products with matrices.
        rows, columns = (averaging(i, o) for i, o in zip(op.inputs[0].shape[1:], op.shape[1:], strict=True))
        y = node("MatMul", constant(f"{op.name}_rows", rows), x, name=f"{op.name}_by_rows")
        return node("MatMul", y, constant(f"{op.name}_columns", columns.T), name=op.name)

    def elementwise(op: Op, x: str, others: list[str]) -> str:
        if op.kind == "relu":
            return node("Relu", x, name=op.name)
        if op.kind == "hardtanh":
            return node("Clip", x, minus_one, one, name=op.name)
        if op.kind == "add":
            return node("Add", x, *others, name=op.name)
        if op.kind != "affine":
            return node({"times": "Mul", "plus": "Add", "prelu": "PRelu"}[op.kind], x, *numbers(op), name=op.name)
        factor, shift = numbers(op, double=exact)
        if exact:
            x = node("Cast", x, name=f"{op.name}_double", to=onnx.TensorProto.DOUBLE)
        y = node("Add", node("Mul", x, factor, name=f"{op.name}_times"), shift, name=f"{op.name}_plus")
        return node("Cast", y, name=op.name, to=onnx.TensorProto.FLOAT) if exact else y

    zero, one, minus_one = (constant(k, torch.tensor(v)) for k, v in (("zero", 0.0), ("one", 1.0), ("minus_one", -1.0)))
    for group in fused(ops):
        source, *after = group.ops
        if source.kind == "image":
            y = "image"
        elif source.kind == "conv":
            y = convolution(source, after)
        elif source.kind in ("max", "average"):
            y = pool(source)
        else:
            after, y = group.ops, result[source.inputs[0]]
        sums = y
        before = source.inputs[0] if after and after[0] is source else source
        for op in after:
            y = elementwise(op, y, [result[x] for x in op.inputs if x in result and x is not before])
            before = op
        result[group.result] = y
        for op in uses[group.result]:
            where = interval(group, op) if op.kind in ("sign", "step") else None
            if where:
                low, high = (constant(f"{op.name}_{i}", v.float().reshape(-1, 1, 1)) for i, v in enumerate(where))
                bit = node("GreaterOrEqual", sums, low, name=f"{op.name}_bit")
                if (where[1] < group.most).any():
                    bit = node(
                        "And", bit, node("LessOrEqual", sums, high, name=f"{op.name}_high"), name=f"{op.name}_bits"
                    )
                activation(op, bit)
            elif op.kind in ("sign", "step"):
                y = result[group.result]
                if op.kind == "step":
                    theta, delta = numbers(op)
                    y = node("Mul", node("Sub", y, theta, name=f"{op.name}_less"), delta, name=f"{op.name}_y")
                activation(op, node("GreaterOrEqual", y, zero, name=f"{op.name}_bit"))
    node("Flatten", result[ops[-1]], name="logits", axis=1)

    needed, kept = {"logits"}, []
    for each in reversed(nodes):  # where sums are compared, what would have followed them is not needed
        if each.output[0] in needed:
            needed.update(each.input)
            kept.insert(0, each)
    value = lambda name, *shape: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
    io = [value("image", *trained.shape)], [value("logits", trained.num_classes)]
    graph = helper.make_graph(kept, trained.args.arch, *io, [v for name, v in constants.items() if name in needed])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for name, values in zip(("scale", "shift"), trained.normalisation, strict=True):  # of pixels 0…255
        model.metadata_props.add(key=name, value=json.dumps(values))
    onnx.checker.check_model(model)
    write(path, model.SerializeToString())


def averaging(size: int, out: int) -> Tensor:
    """[out, size]: row i averages from ⌊i·size/out⌋ to ⌈(i + 1)·size/out⌉."""
    matrix = torch.zeros(out, size)
    for i in range(out):
        begin, end = i * size // out, -(-(i + 1) * size // out)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def onnx_session(path: Path, threads: int = 0):
    """onnxruntime on the file, on so many CPU threads (0: all)."""
    ort = onnx_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------------------------------------------------------
# --to c. Images lie in memory as [height][width][channels]; operations of one number each are fused into the loop of
# the convolution or pooling before them, and what ends in a binary activation leaves nothing but its bits.

C_RUNTIME = r"""
#include <math.h>
#include <string.h>

/* A product and a sum with one rounding, as PyTorch's convolutions and BatchNorms have on most machines. Where numbers
   are compared with a threshold it decides, now and then, which bit comes out; elsewhere two roundings are as good. */
#ifndef ONE_ROUNDING
#define MULADD(a, b, c) ((a) * (b) + (c))
#elif defined(FP_FAST_FMAF)
#define MULADD(a, b, c) fmaf(a, b, c)
#else
#define MULADD(a, b, c) ((float)((double)(a) * (b) + (c)))
#endif

#ifdef _OPENMP /* rows of a layer by several threads */
#define PARALLEL _Pragma("omp parallel for")
#else
#define PARALLEL
#endif

#ifdef BINARY_CONV /* linked with binary_conv.cpp, for its vector units */
void binary_conv_row(const Shape *, const uint64_t *, const uint64_t *, int, int32_t *);
void binary_conv_threshold(const int32_t *, int, int, const int32_t *, const int32_t *, uint64_t *);
#define SUMS_ROW binary_conv_row
#define THRESHOLD binary_conv_threshold
#else
#define SUMS_ROW sums_row_portable
#define THRESHOLD threshold_portable
#endif

enum { LANES = 16 }; /* filters at a time, of the convolutions of floats */

/* Weights of 16 filters as bits, 1 for +1 and 0 for -1 (or 0 where `present`, unless it is NULL, has 0) -> floats. */
static inline void signs(const uint16_t *bits, const uint16_t *present, int n, float *w) {
#define FOUR(b) {b & 1 ? 1 : -1, b & 2 ? 1 : -1, b & 4 ? 1 : -1, b & 8 ? 1 : -1}
    static const float four[16][4] = {FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8),
        FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)};
    for (int i = 0; i < n; i++)
        for (int f = 0; f < LANES; f += 4) memcpy(w + i * LANES + f, four[bits[i] >> f & 15], sizeof four[0]);
    for (int i = 0; present && i < n; i++)
        for (int f = 0; f < LANES; f++) w[i * LANES + f] *= (float)(present[i] >> f & 1);
}

/* acc [pixels][16] += x [pixels][channels] times w [channels][16], channel by channel; of four pixels, or of one. */
static inline void multiply_4(const float *x, int step, const float *w, int channels, float *acc) {
    float a[LANES], b[LANES], c[LANES], d[LANES];
    memcpy(a, acc, sizeof a), memcpy(b, acc + LANES, sizeof b);
    memcpy(c, acc + 2 * LANES, sizeof c), memcpy(d, acc + 3 * LANES, sizeof d);
    for (int i = 0; i < channels; i++, x++, w += LANES)
        for (int f = 0; f < LANES; f++) {
            a[f] = MULADD(x[0], w[f], a[f]);
            b[f] = MULADD(x[step], w[f], b[f]);
            c[f] = MULADD(x[2 * step], w[f], c[f]);
            d[f] = MULADD(x[3 * step], w[f], d[f]);
        }
    memcpy(acc, a, sizeof a), memcpy(acc + LANES, b, sizeof b);
    memcpy(acc + 2 * LANES, c, sizeof c), memcpy(acc + 3 * LANES, d, sizeof d);
}

static inline void multiply_1(const float *x, const float *w, int channels, float *acc) {
    float a[LANES];
    memcpy(a, acc, sizeof a);
    for (int i = 0; i < channels; i++)
        for (int f = 0; f < LANES; f++) a[f] = MULADD(x[i], w[i * LANES + f], a[f]);
    memcpy(acc, a, sizeof a);
}

/* One row of a convolution of floats, out [width][filters]: tap by tap, and in each channel by channel, the order that
   PyTorch's has too. The weights [block of 16 filters][ky][kx][channel] are floats [16], or 16 bits: then w is NULL. */
static inline void floats_row(const Shape *s, const float *x, const float *w, const uint16_t *bits,
                              const uint16_t *present, int row, float *out) {
    const int width = output_size(s, s->width), channels = s->channels;
    int y0, y1;
    taps_inside(s, s->height, row, &y0, &y1);
    for (int block = 0; block * LANES < s->filters; block++) {
        float acc[width * LANES], unpacked[w ? 1 : channels * LANES];
        for (int i = 0; i < width * LANES; i++) acc[i] = 0;
        for (int ky = y0; ky < y1; ky++)
            for (int kx = 0; kx < s->kernel; kx++) {
                const int tap = ((block * s->kernel + ky) * s->kernel + kx) * channels, left = s->padding - kx;
                const float *t = w ? w + tap * LANES : unpacked;
                if (!w) signs(bits + tap, present ? present + tap : 0, channels, unpacked);
                /* the columns whose input kx - padding further right exists */
                int column = left > 0 ? (left + s->stride - 1) / s->stride : 0;
                int end = (s->width - 1 + left) / s->stride + 1;
                if (s->width - 1 + left < 0) end = 0;
                if (end > width) end = width;
                const int in = ((row * s->stride - s->padding + ky) * s->width - left) * channels;
                const int step = s->stride * channels;
                for (; column + 4 <= end; column += 4)
                    multiply_4(x + (in + column * step), step, t, channels, acc + column * LANES);
                for (; column < end; column++) multiply_1(x + (in + column * step), t, channels, acc + column * LANES);
            }
        for (int column = 0; column < width; column++)
            for (int f = 0; f < LANES && block * LANES + f < s->filters; f++)
                out[column * s->filters + block * LANES + f] = acc[column * LANES + f];
    }
}

/* bits [pixels][words]: 1 where v [pixels][channels] is at least 0. */
static inline void pack(const float *v, int pixels, int channels, uint64_t *bits) {
    const int words = (channels + 63) / 64;
    for (int i = 0; i < pixels; i++)
        for (int word = 0; word < words; word++) {
            const int n = channels - 64 * word < 64 ? channels - 64 * word : 64;
            const float *from = v + i * channels + 64 * word;
            uint64_t set = 0;
            for (int c = 0; c < n; c++) set |= (uint64_t)(from[c] >= 0) << c;
            bits[i * words + word] = set;
        }
}

/* The maximum of each channel over the window [y0, y1) x [x0, x1) of x [height][width][channels]. */
#define MAXIMUM(name, type)                                                                                         \
    static inline void name(const type *x, int width, int channels, int y0, int y1, int x0, int x1, type *out) {    \
        for (int c = 0; c < channels; c++) out[c] = x[(y0 * width + x0) * channels + c];                            \
        for (int y = y0; y < y1; y++)                                                                               \
            for (int i = (y * width + x0) * channels; i < (y * width + x1) * channels; i += channels)               \
                for (int c = 0; c < channels; c++) out[c] = x[i + c] > out[c] ? x[i + c] : out[c];                  \
    }
MAXIMUM(maximum, float)
MAXIMUM(maximum_of_sums, int32_t)

static inline int at_least_0(int i) { return i > 0 ? i : 0; }
static inline int at_most(int i, int most) { return i < most ? i : most; }

static inline void average(const float *x, int width, int channels, int y0, int y1, int x0, int x1, float *out) {
    for (int c = 0; c < channels; c++) out[c] = 0;
    for (int y = y0; y < y1; y++)
        for (int i = y * width + x0; i < y * width + x1; i++)
            for (int c = 0; c < channels; c++) out[c] += x[i * channels + c];
    for (int c = 0; c < channels; c++) out[c] /= (float)((y1 - y0) * (x1 - x0));
}
"""


def binary_weights(signs: Tensor) -> np.ndarray:
    """A binary layer's signs [C_out, C_in, k, k] as binary_conv.cpp wants them, uint64, flat."""
    planes = [signs > 0, signs != 0] if (signs == 0).any() else [signs > 0]
    f, c, k, _ = signs.shape
    packed = np.zeros((len(planes), -(-f // 8) * 8, k, k, -(-c // 64)), dtype=np.uint64)
    for plane, bits in zip(packed, planes, strict=True):
        plane[:f] = words(bits.permute(0, 2, 3, 1).reshape(-1, c)).reshape(f, k, k, -1)
    packed = packed.reshape(len(planes), -1, 8, *packed.shape[2:])
    return packed.transpose(1, 3, 4, 5, 0, 2).ravel()  # [block, ky, kx, word, plane, filter]


def weights_by_16(weight: Tensor) -> Tensor:
    """[C_out, C_in, k, k] -> [⌈C_out/16⌉, ky, kx, C_in, 16], padded with 0."""
    f = len(weight)
    padded = torch.cat([weight, weight.new_zeros(-f % 16, *weight.shape[1:])])
    return padded.reshape(-1, 16, *weight.shape[1:]).permute(0, 3, 4, 2, 1)


def bits_by_16(bits: Tensor) -> np.ndarray:
    """The same for bits, of which 16 are one number: [C_out, C_in, k, k] bool -> uint16, flat."""
    return (weights_by_16(bits.long()) << torch.arange(16)).sum(-1).numpy().astype(np.uint16).ravel()


IN_C = {
    "times": "v *= {0}[c];",
    "plus": "v += {0}[c];",
    "affine": "v = MULADD(v, {0}[c], {1}[c]);",
    "relu": "v = v > 0 ? v : 0;",
    "hardtanh": "v = v < -1 ? -1 : v > 1 ? 1 : v;",
    "prelu": "v = v > 0 ? v : v * {0}[c];",
}


class CFile:
    """The C file of a network."""

    def __init__(self, trained: Trained):
        self.ops = operations(trained)
        self.uses, groups = consumers(self.ops), fused(self.ops)
        self.normalisation = [torch.tensor(values) for values in trained.normalisation]
        self.constants, self.code = [], []
        self.buffers, self.free = {}, []  # name -> how many numbers it holds; those that are unused now
        self.value = {}  # operation -> where its result is
        for at, group in enumerate(groups):
            self.loop(group)
            to_come = {x for later in groups[at + 1 :] for op in later.ops for x in op.inputs}
            for op in set(self.value) - to_come:
                self.free.append(self.value.pop(op))
        self.trained = trained

    def array(self, kind: str, name: str, numbers: Tensor | np.ndarray) -> str:
        """A constant; its name."""
        form = {"float": "{:.9g}", "int32_t": "{}"}.get(kind, "{:#x}")
        numbers = numbers.detach().numpy() if isinstance(numbers, Tensor) else numbers
        text = [form.format(n) for n in numbers.ravel().tolist()]
        lines = ",\n".join("    " + ", ".join(text[i : i + 8]) for i in range(0, len(text), 8))
        self.constants.append(f"static const {kind} {name}[{len(text)}] = {{\n{lines}}};")
        return name

    def arrays(self, op: Op) -> list[str]:
        last = lambda v: v.permute(1, 2, 0) if v.dim() == 3 else v  # channels
        return [self.array("float", f"{op.name}_{i}", last(numbers)) for i, numbers in enumerate(op.numbers)]

    def buffer(self, op: Op, kind: str, length: int) -> str:
        """Memory for an operation's result, of which nothing is needed any more: floats_0, bits_0, sums_0, …"""
        name = min(
            (n for n in self.free if n.startswith(kind)), key=lambda n: abs(self.buffers[n] - length), default=None
        )
        if name:
            self.free.remove(name)
        else:
            name = f"{kind}_{sum(n.startswith(kind) for n in self.buffers)}"
        self.buffers[name] = max(length, self.buffers.get(name, 0))
        self.value[op] = name
        return name

    def loop(self, group: Group) -> None:
        """The code of a group: row by row what its operations make, and the binary activations that follow."""
        source, (c, h, w) = group.ops[0], group.ops[0].shape
        activations = [op for op in self.uses[group.result] if op.kind in ("sign", "step")]
        is_last = group.result is self.ops[-1]
        of_sums = group.most is not None
        padded, words = -(-c // 8) * 8, -(-c // 64)
        row = self.convolve(source) if source.kind == "conv" else []
        if of_sums:
            where = f"[{w * padded}]"
            if group.raw:
                where = f" = {self.buffer(group.result, 'sums', h * w * padded)} + y * {w * padded}"
            row.insert(0, f"int32_t {'*' if group.raw else ''}sums{where};")
        if source.kind in ("max", "average"):
            row += self.pool(source, of_sums)

        intervals = [None]
        if activations and len(activations) == len(self.uses[group.result]):
            intervals = [interval(group, op) for op in activations]
        if all(intervals):
            for op, (low, high) in zip(activations, intervals, strict=True):
                low, high = self.array("int32_t", f"{op.name}_low", low), self.array("int32_t", f"{op.name}_high", high)
                bits = self.buffer(op, "bits", h * w * words)
                row.append(f"THRESHOLD(sums, {w}, {c}, {low}, {high}, {bits} + y * {w * words});")
        elif not group.raw:
            if is_last or len(activations) < len(self.uses[group.result]):
                name = "logits" if is_last else self.buffer(group.result, "floats", h * w * c)
                row.insert(0, f"float *out = {name} + y * {w * c};")
            else:
                row.insert(0, f"float out[{w * c}];")
            row += self.elementwise(group, of_sums)
            for op in activations:
                compared = "out"
                if op.kind == "step":
                    compared, (theta, delta) = op.name, self.arrays(op)
                    at = f"i % {c}" if op.numbers[0].dim() == 1 else f"y * {w * c} + i"
                    row += [f"float {op.name}[{w * c}];", f"for (int i = 0; i < {w * c}; i++)"]
                    row.append(f"    {op.name}[i] = (out[i] - {theta}[{at}]) * {delta}[{at}];")
                row.append(f"pack({compared}, {w}, {c}, {self.buffer(op, 'bits', h * w * words)} + y * {w * words});")
        self.code += [f"/* {', '.join(op.name for op in [*group.ops, *activations])}: {h} x {w} x {c} */"]
        self.code += ["PARALLEL", f"for (int y = 0; y < {h}; y++) {{", *(f"    {line}" for line in row), "}"]

    def convolve(self, op: Op) -> list[str]:
        (c_in, h_in, w_in), x = op.inputs[0].shape, self.value[op.inputs[0]]
        has_bits = op.weight.dtype == torch.int8
        has_zeros = has_bits and bool((op.weight == 0).any())
        kind = "AND" if op.inputs[0].kind == "step" else "MASKED" if has_zeros else "XNOR"
        sizes = f"{h_in}, {w_in}, {c_in}, {op.shape[0]}, {op.kernel}, {op.stride}, {op.padding}, {kind}"
        self.constants.append(f"static const Shape {op.name}_shape = {{{sizes}}};")
        if op.is_binary:
            bits = self.array("uint64_t", f"{op.name}_bits", binary_weights(op.weight))
            return [f"SUMS_ROW(&{op.name}_shape, {x}, {bits}, y, sums);"]
        weights = ["NULL", "NULL", "NULL"]
        if has_bits:
            weights[1] = self.array("uint16_t", f"{op.name}_bits", bits_by_16(op.weight > 0))
        else:
            weights[0] = self.array("float", f"{op.name}_weights", weights_by_16(op.weight))
        if has_zeros:
            weights[2] = self.array("uint16_t", f"{op.name}_present", bits_by_16(op.weight != 0))
        return [f"floats_row(&{op.name}_shape, {x}, {', '.join(weights)}, y, out);"]

    def pool(self, op: Op, of_sums: bool) -> list[str]:
        """Row y of the output: from which rows and columns of the input each number comes, and the call."""
        (c, h, w), (_, h_in, w_in), x = op.shape, op.inputs[0].shape, self.value[op.inputs[0]]

        def window(i: str, size: int, out: int) -> list[str]:
            if op.kernel == 0:  # adaptive
                return [f"{i} * {size} / {out}", f"(({i} + 1) * {size} + {out - 1}) / {out}"]
            begin = f"{i} * {op.stride} - {op.padding}"
            return [f"at_least_0({begin})", f"at_most({begin} + {op.kernel}, {size})"]

        edges = ", ".join(window("y", h_in, h) + window("x", w_in, w))
        if op.kind == "average":
            call = f"average({x}, {w_in}, {c}, {edges}, out + x * {c});"
        elif of_sums:
            padded = -(-c // 8) * 8
            call = f"maximum_of_sums({x}, {w_in}, {padded}, {edges}, sums + x * {padded});"
        else:
            call = f"maximum({x}, {w_in}, {c}, {edges}, out + x * {c});"
        return [f"for (int x = 0; x < {w}; x++)", f"    {call}"]

    def elementwise(self, group: Group, of_sums: bool) -> list[str]:
        """out = the group's elementwise operations on what its first one has made."""
        source, (c, h, w) = group.ops[0], group.ops[0].shape
        start, chain = "out[x * {c} + c]", group.ops[1:]
        if of_sums:
            start = f"(float)sums[x * {-(-c // 8) * 8} + c]"
        elif source.kind == "image":
            factor, shift = (
                self.array("float", f"image_{name}", v)
                for name, v in zip(("factor", "shift"), self.normalisation, strict=True)
            )
            start = f"MULADD(image[(c * {h} + y) * {w} + x], {factor}[c], {shift}[c])"
        elif source.kind in ELEMENTWISE:
            start = f"{self.value[source.inputs[0]]}[(y * {w} + x) * {c} + c]"
            chain = group.ops
        elif not chain:
            return []
        lines = [
            f"for (int x = 0; x < {w}; x++)",
            f"    for (int c = 0; c < {c}; c++) {{",
            f"        float v = {start.format(c=c)};",
        ]
        before = source.inputs[0] if chain and chain[0] is source else source
        for op in chain:
            if op.kind == "add":
                other = op.inputs[1] if op.inputs[0] is before else op.inputs[0]
                lines.append(f"        v += {self.value[other]}[(y * {w} + x) * {c} + c];")
            else:
                lines.append("        " + IN_C[op.kind].format(*self.arrays(op)))
            before = op
        return [*lines, f"        out[x * {c} + c] = v;", "    }"]

    def text(self) -> str:
        args, (c, h, w) = self.trained.args, self.trained.shape
        kinds = {"floats": "float", "bits": "uint64_t", "sums": "int32_t"}
        buffers = [f"static {kinds[name.split('_')[0]]} {name}[{size}];" for name, size in self.buffers.items()]
        portable = KERNELS.read_text().split("#include <stdint.h>", 1)[1].split("// ----", 1)[0]
        about = f"""/* {args.arch}, binary weights by {self.trained.quantizer}, activations: {args.act}. By export.py.

   void predict(const float *image, float *logits);

   image: {c} x {h} x {w} numbers (channel, row, column) from 0 to 255, as in the image's file: the training images'
   mean and deviation are in here. logits: {self.trained.num_classes} numbers; the largest one's place is the class.
   Memory between layers is static, so one call at a time. C99, with libc and libm:

       cc -O3 -std=c99 -c {args.arch}.c      (-march=native: the machine's vector units; -fopenmp: all cores)
*/
#include <stddef.h>
#include <stdint.h>"""
        define = "#define ONE_ROUNDING" if any(op.is_binary for op in self.ops) else ""
        code = "\n".join(f"    {line}" for line in self.code)
        signature = "void predict(const float *image, float *logits)"
        function = f"{signature};\n\n{signature} {{\n{code}\n}}\n"
        return "\n".join([about, define, portable, C_RUNTIME, *self.constants, "", *buffers, "", function])


def compiled(source: Path, *flags: str) -> ctypes.CDLL:
    """A C file of ours as a library, by the C compiler here ($CC, $CFLAGS). Raises RunError where there is none."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise RunError("there is no C compiler here (cc): install one, such as gcc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "network.so"
        options = ["-O3", "-std=c99", "-shared", "-fPIC", *os.environ.get("CFLAGS", "").split()]
        inputs = ["-x", "c", str(source.resolve()), "-x", "none"]  # whatever its name ends with
        command = [*shlex.split(compiler), *options, *inputs, "-o", str(library), *flags, "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(library))
        except (subprocess.CalledProcessError, OSError) as e:  # the latter also for a library of another machine
            lines = (getattr(e, "stderr", None) or str(e)).splitlines()
            reason = next((line for line in lines if "error:" in line), lines[0])[:150]
            raise RunError(f"{source} could not be compiled by {compiler} ({reason}): try another one, CC=…") from None


def predict(library: ctypes.CDLL, images: Tensor, num_classes: int) -> Tensor:
    """What a compiled C file says of images [N, C, H, W], 0…255: logits [N, num_classes]."""
    images, logits = images.float().contiguous(), torch.empty(len(images), num_classes)
    for image, out in zip(images, logits, strict=True):
        library.predict(ctypes.c_void_p(image.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# binary_conv.cpp.


class Shape(ctypes.Structure):
    """binary_conv.cpp's Shape. kind: XNOR, AND or MASKED."""

    names = ("height", "width", "channels", "filters", "kernel", "stride", "padding", "kind")
    _fields_ = tuple((name, ctypes.c_int) for name in names)


XNOR, AND, MASKED = range(3)
LEVELS = ("portable", "AVX2", "AVX-512 VPOPCNTDQ")


@functools.cache
def kernels() -> ctypes.CDLL:
    """binary_conv.cpp, compiled at first use by torch's extension loader. Raises RunError where that cannot be."""
    path = os.environ.get("PATH", os.defpath)
    # ninja, which the loader calls, lies beside python in a virtual environment, activated or not.
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    try:
        from torch.utils.cpp_extension import load

        name = f"binary_conv_{hashlib.sha256(KERNELS.read_bytes()).hexdigest()[:8]}"
        return ctypes.CDLL(load(name, [str(KERNELS)], extra_cflags=["-O3", "-w"], is_python_module=False))
    except Exception as e:  # no compiler, no ninja, an unwritable cache, …: each its own kind of error
        lines = str(e).splitlines() or [repr(e)]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[0]).strip()[:150]
        raise RunError(
            f"binary_conv.cpp needs a C++ compiler and ninja, and could not be compiled ({reason})"
        ) from None
    finally:
        os.environ["PATH"] = path


def pointer(array: np.ndarray | Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data)


def packed_activations(bits: Tensor) -> np.ndarray:
    """bits [C, H, W] bool -> [H, W, words] uint64, the layout of binary_conv.cpp."""
    c, h, w = bits.shape
    return words(bits.permute(1, 2, 0).reshape(-1, c)).reshape(h, w, -1)


def binary_conv2d(bits: Tensor, signs: Tensor, stride: int = 1, padding: int = 0, kind: int = XNOR, level: int = 2):
    """F.conv2d of one image, with whole numbers: bits [C, H, W] bool, signs [F, C, k, k] int8 -> [F, H', W'] int32.

    kind: XNOR or MASKED (signs with zeros): a bit is +1 or −1; AND: 1 or 0. level: of LEVELS, where the machine has it.
    """
    (c, h, w), (f, _, k, _) = bits.shape, signs.shape
    shape = Shape(h, w, c, f, k, stride, padding, kind)
    out_h, out_w = ((size + 2 * padding - k) // stride + 1 for size in (h, w))
    sums = np.empty((out_h, out_w, -(-f // 8) * 8), dtype=np.int32)
    x, weights = packed_activations(bits), binary_weights(signs)
    kernels().binary_conv_use(level)
    kernels().binary_conv_sums(ctypes.byref(shape), pointer(x), pointer(weights), pointer(sums))
    kernels().binary_conv_use(len(LEVELS))
    return torch.from_numpy(sums[..., :f]).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Checks.


def load_test(trained: Trained, data_dir: str | None):
    """The test batches that the network was trained for. Raises DataError where they are not there."""
    args = trained.args
    where = data_dir or getattr(args, "data_dir", "data")
    size = trained.shape[1] if args.dataset in ("folder", "imagenet") else None
    test = data.load(args.dataset, where, image_size=size, log=runs.console.print)[1]
    if test.shape != trained.shape or test.num_classes != trained.num_classes:
        raise RunError(
            f"{where} has images of {test.shape}, {test.num_classes} classes, and the network is for "
            f"{trained.shape}, {trained.num_classes}: give its own --data-dir"
        )
    return test


@torch.no_grad()
def compare(trained: Trained, test, other, what: str, limit: int | None) -> tuple[int, int, float]:
    """Print, and return: how many of the test images get the same prediction from `other` (a batch's images and its
    place among all images -> logits), of how many, and the largest difference of logits."""
    equal = count = 0
    largest = 0.0
    with Progress(console=runs.console, transient=True, disable=not runs.console.is_terminal) as bar:
        task = bar.add_task(f"checking {what}", total=min(test.size, limit or test.size))
        for images, _ in test.epoch():
            images = images[: max(0, (limit or test.size) - count)]
            if not len(images):
                break
            ours, theirs = trained.net(images), other(images, slice(count, count + len(images)))
            equal += ((ours.argmax(1) == theirs.argmax(1)) & theirs.isfinite().all(1)).sum().item()
            largest = max(largest, (ours - theirs).abs().nan_to_num(math.inf).max().item())
            count += len(images)
            bar.update(task, completed=count)
    runs.console.print(
        f"{what}: {equal:,} of {count:,} test images get PyTorch's prediction; logits differ by {largest:.1e} at most"
    )
    return equal, count, largest


def check(trained: Trained, test, kind: str, path: Path, limit: int | None) -> tuple[int, int, float]:
    """The written file against the network that it was written from."""
    if kind == "bits":
        net = load(path)
        other = lambda images, at: net(images)
    elif kind == "onnx":
        session = onnx_session(path)
        other = lambda images, at: torch.from_numpy(session.run(None, {"image": images.contiguous().numpy()})[0])
    else:
        library = compiled(path)
        other = lambda images, at: predict(library, test.images[at], trained.num_classes)
    return compare(trained, test, other, str(path), limit)


# ---------------------------------------------------------------------------------------------------------------------
# --bench.

# C_in = C_out, side: 3×3 layers of a ResNet-18 on images of 224 pixels.
IMAGENET_LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))


def seconds(function, at_least: float = 0.02) -> float:
    """Of one call, over as many as take 20 ms."""
    calls, began = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - began < at_least:
        function()
        calls += 1
    return (time.perf_counter() - began) / calls


def alternating(functions: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each function, called in turn, after a round that does not count: {name: seconds}."""
    found = {name: [] for name in functions}
    for r in range(rounds + 1):
        for name, function in functions.items():
            function()
            time.sleep(0.01)  # until the threads of the one before have stopped waiting for work
            found[name] += [seconds(function)] if r else []
    return {name: statistics.median(times) for name, times in found.items()}


def plain(trained: Trained) -> nn.Module:
    """The network as a user of PyTorch would run it: Ŵ are ordinary float32 weights, activations are binarized."""
    net = copy.deepcopy(trained.net).to(memory_format=torch.channels_last)
    for layer in models.binary_layers(net):
        function = layer._conv_forward if isinstance(layer, nn.Conv2d) else nn.functional.linear
        layer.forward = lambda x, m=layer, f=function: f(m.binary_input(x), m.weight, m.bias)
    return net


@torch.inference_mode()
def bench(trained: Trained, rounds: int) -> dict:
    """Print, and return, how fast the network is, and its binary layers by themselves."""
    library_path, cores = kernels()._name, os.cpu_count() or 1
    results: dict = {"networks": [], "layers": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_onnx(trained, folder / "network.onnx")
        (folder / "network.c").write_text(CFile(trained).text())
        scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in trained.normalisation)
        ours = compiled(folder / "network.c", "-march=native", "-fopenmp", "-DBINARY_CONV", library_path)
        net, before = plain(trained), torch.get_num_threads()
        table = Table(title=f"{trained.args.arch}, ms an image (median of {rounds}, in turn)", title_justify="left")
        others = "PyTorch float32", "onnxruntime", "ours", "PyTorch / ours", "onnxruntime / ours"
        for column in ("cores", "batch", *others):
            table.add_column(column, justify="right")
        for threads in sorted({1, cores}):
            session = onnx_session(folder / "network.onnx", threads)
            torch.set_num_threads(threads)
            ours.omp_set_num_threads(threads)
            for batch in (1, 32):
                pixels = torch.randint(256, (batch, *trained.shape)).float()
                images = (pixels * scale + shift).contiguous(memory_format=torch.channels_last)
                feed = {"image": images.contiguous().numpy()}
                times = alternating(
                    {
                        "pytorch": lambda images=images: net(images),
                        "onnxruntime": lambda feed=feed, session=session: session.run(None, feed),
                        "ours": lambda pixels=pixels: predict(ours, pixels, trained.num_classes),
                    },
                    rounds,
                )
                ms = {name: 1e3 * value / batch for name, value in times.items()}
                results["networks"].append({"cores": threads, "batch": batch, **ms})
                ratios = ms["pytorch"] / ms["ours"], ms["onnxruntime"] / ms["ours"]
                cells = *(f"{value:.3f}" for value in ms.values()), *(f"{ratio:.1f}" for ratio in ratios)
                table.add_row(str(threads), str(batch), *cells)
        torch.set_num_threads(1)
        runs.console.print(table)
        bench_layers(trained, rounds, results)
        torch.set_num_threads(before)
    return results


def bench_layers(trained: Trained, rounds: int, results: dict) -> None:
    """Each size of binary convolution, bits to bits, on one core, one image, against F.conv2d of the same numbers."""
    convs = [op for op in operations(trained) if op.is_binary]
    if not convs:
        runs.console.print("no layer has binary activations (W1A32), so none is a convolution of bits")
        return
    sizes = dict.fromkeys((op.inputs[0].shape, *op.weight.shape[::2], op.stride, op.padding) for op in convs)
    sizes |= dict.fromkeys(((c, side, side), c, 3, 1, 1) for c, side in IMAGENET_LAYERS)
    lib, n = kernels(), 10**7
    peak = (
        n / min(seconds(lambda: lib.binary_conv_peak(ctypes.c_int64(n))) for _ in range(5))
        if lib.binary_conv_best() == 2
        else None
    )
    title = f"binary convolutions, {LEVELS[lib.binary_conv_best()]}, one core, batch 1 (median of {rounds}, in turn)"
    table = Table(title=title, title_justify="left")
    for column in ("input", "filters", "PyTorch float32 ms", "ours ms", "ratio", "G bit operations/s", "of the bound"):
        table.add_column(column, justify="right")
    for (c, h, w), filters, k, stride, padding in sizes:
        bits, signs = torch.rand(c, h, w) < 0.5, torch.randint(2, (filters, c, k, k), dtype=torch.int8) * 2 - 1
        shape = Shape(h, w, c, filters, k, stride, padding, XNOR)
        x, weights = packed_activations(bits), binary_weights(signs)
        sides = [(size, (size + 2 * padding - k) // stride + 1) for size in (h, w)]
        out_h, out_w = (out for _, out in sides)
        low, high = torch.zeros(filters, dtype=torch.int32), torch.full((filters,), 2**30, dtype=torch.int32)
        out = np.empty((out_h, out_w, -(-filters // 64)), dtype=np.uint64)
        arguments = ctypes.byref(shape), *(pointer(a) for a in (x, weights, low, high, out))
        floats, float_signs = (
            t.contiguous(memory_format=torch.channels_last) for t in (bits[None].float() * 2 - 1, signs.float())
        )
        times = alternating(
            {
                "pytorch": lambda: nn.functional.conv2d(floats, float_signs, None, stride, padding),  # noqa: B023
                "ours": lambda: lib.binary_conv_bits(*arguments),  # noqa: B023
            },
            rounds,
        )
        # Of 8 filters by 64 channels: what there is to count, without the taps that lie outside.
        inside = [
            sum(0 <= o * stride - padding + tap < size for o in range(out) for tap in range(k)) for size, out in sides
        ]
        vectors = math.prod(inside) * -(-filters // 8) * -(-c // 64)
        share = f"{100 * vectors / times['ours'] / peak:.0f} %" if peak else ""
        results["layers"].append({"input": [c, h, w], "filters": filters, "kernel": k, "stride": stride, **times})
        table.add_row(
            *(f"{c}×{h}×{w}", f"{filters}, {k}×{k}" + (f" /{stride}" if stride > 1 else "")),
            *(f"{1e3 * times['pytorch']:.3f}", f"{1e3 * times['ours']:.4f}", f"{times['pytorch'] / times['ours']:.1f}"),
            *(f"{2e-9 * out_h * out_w * filters * c * k * k / times['ours']:,.0f}", share),
        )
    runs.console.print(table)
    if peak:
        runs.console.print(
            f"the bound: {peak / 1e9:.2f} G vectors of 512 bits a second, exclusive-or, popcount and addition"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("export.py", description=__doc__, formatter_class=runs.Help, allow_abbrev=False)
    parser.add_argument("run", help="a run's folder, a checkpoint, or a .safetensors file that was written here")
    parser.add_argument("--to", metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--out", metavar="FILE", help="(default: in the run's folder, under its name)")
    parser.add_argument("--half", action="store_true", help="bits: all that is not binary in float16")
    parser.add_argument(
        "--data-dir",
        help="where the test images are (default: where they were in training; for a .safetensors file, data)",
    )
    parser.add_argument("--images", type=int, help="check on the first so many test images (default: all)")
    parser.add_argument("--bench", action="store_true", help="how fast it is, against PyTorch and onnxruntime")
    parser.add_argument("--rounds", type=int, default=9, help="of --bench (default: 9)")
    return parser


def main(argv=None) -> int:
    args = flags().parse_args(argv)
    if args.bench == bool(args.to) or (args.to and args.to not in FORMATS):
        raise RunError(f"say what to make, --to {', --to '.join(FORMATS)}, or else --bench")
    for name in ("images", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise RunError(f"--{name} must be at least 1; it is {getattr(args, name)}")
    if args.half and args.to != "bits":
        raise RunError("--half is for --to bits: leave it out")
    trained = read(args.run)
    if args.to == "c" or args.bench:
        check_is_small(trained)
    if args.bench:
        bench(trained, args.rounds)
        return 0
    source = trained.path.resolve()
    name = source.parent.name if source.name == "best.pt" else source.stem
    path = Path(args.out) if args.out else source.with_name(f"{name}{FORMATS[args.to]}")
    test = reason = None
    try:
        test = load_test(trained, args.data_dir)
    except data.DataError as e:
        reason = str(e)
    if args.to == "bits":
        write_bits(trained, path, args.half)
        runs.console.print(sizes(trained, args.half))
    elif args.to == "onnx":
        write_onnx(trained, path)
    else:
        write(path, CFile(trained).text().encode())
    runs.console.print(f"{path}: {path.stat().st_size:,} bytes")
    equal = count = 0
    try:
        if test is None:
            raise RunError(reason)
        equal, count, _ = check(trained, test, args.to, path, args.images)
    except RunError as e:
        runs.console.print(f"{path} is not checked: {e}")
    if equal < count and not args.half:
        raise RunError(f"{path} says something else than {args.run} of {count - equal:,} images: do not use it")
    return 0


def check_is_small(trained: Trained) -> None:
    if trained.shape[1] > data.RESIDENT_UP_TO:
        raise RunError(
            f"--to c and --bench are for networks of small images, up to {data.RESIDENT_UP_TO} pixels a side"
        )


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
