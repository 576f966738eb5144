"""Write a binary network as one C99 file, compile it, and call it.

    ops = operations(net, shape)                        # the network as a list of operations
    text = c_source(ops, normalisation, about)          # the C file
    header = c_header(text)                             # its header
    flash, ram = memory(ops, normalisation)             # bytes of its constants and of its buffers
    library = compile_library(file, folder)             # needs a C compiler
    logits = predict(library, images, num_classes)

The command line is in export.py, which imports this file. Copy this file with kernels.c, models.py, binarize.py,
quantizers.py and runs.py.
"""

import contextlib
import ctypes
import functools
import io
import math
import operator
import os
import re
import shlex
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from rich.table import Table
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import models
import runs
from runs import RunError

KERNELS = Path(__file__).with_name("kernels.c")
XNOR, AND, MASKED, FLOAT, SIGN, SIGN_OR_0 = range(6)  # kinds of convolutions, see kernels.c


def pack_words(bits: np.ndarray | Tensor) -> np.ndarray:
    """bits [rows, n] bool -> [rows, ⌈n/64⌉] uint64: bit i of a row is bit i % 64 of word i // 64, padded with 0."""
    rows, n = bits.shape
    padded = np.zeros((rows, math.ceil(n / 64) * 64), dtype=bool)
    padded[:, :n] = bits
    return np.packbits(padded, axis=1, bitorder="little").view("<u8")


# ---------------------------------------------------------------------------------------------------------------------
# The network as a list of operations.

BINARY_ACTIVATIONS = ("sign", "step")
ELEMENTWISE = ("scale", "bias", "batchnorm", "relu", "hardtanh", "prelu", "add")


@dataclass(eq=False)
class Op:
    """One operation of the network.

    kind: the function of its inputs, by channel c. The operation's constants are in brackets.
        image       the network's input
        sign        x ≥ 0 ? +1 : −1
        step        (x − θ)·Δ ≥ 0 ? 1 : 0                           [θ, Δ: each [C], or [C, H, W]]
        conv        a convolution without a bias. A linear layer is one whose kernel covers its input.
        scale       x·factor                                        [factor [C]]
        bias        x + bias                                        [bias [C]]
        batchnorm   αx + β, rounded once                            [α [C], β [C]]
        relu, hardtanh, prelu                                       [prelu: slope [C]]
        maxpool     padding does not count
        avgpool     kernel 0: adaptive, output i of n averages inputs ⌊i·H/n⌋ to ⌈(i + 1)·H/n⌉
        add         the sum of two inputs
    shape: [C, H, W] of the result; [C, 1, 1] after a linear layer.
    weight: of conv, [C_out, C_in, k, k]: float32, or int8 (−1, 0, +1) in a binary layer. The scales of the filters are
        the next operation, 'scale'.
    """

    kind: str
    name: str
    inputs: list["Op"]
    shape: tuple[int, int, int]
    constants: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None
    kernel: int = 1
    stride: int = 1
    padding: int = 0

    @property
    def sums_bits(self) -> bool:
        """Whether this is a convolution of binary weights with binary activations. Its result is an integer."""
        return self.kind == "conv" and self.inputs[0].kind in BINARY_ACTIVATIONS


class Traced(fx.Proxy):
    """A value while a network is traced. It records `x += y` as an operation that overwrites x."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class LeafTracer(fx.Tracer):
    """Traces the modules that contain no others as single calls."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return next(module.children(), None) is None

    def proxy(self, node: fx.Node) -> Traced:
        return Traced(node, self)


@torch.no_grad()
def operations(net: nn.Module, shape: tuple[int, int, int]) -> list[Op]:
    """The operations of a network in eval mode, each after its inputs, the logits last.

    shape: [C, H, W] of an image. A binary layer has `signs` (int8) and `filter_scale` beside its weight; layers without
    them are convolutions of floats. Raises RunError if there is an operation of another kind.
    """
    try:
        traced = fx.GraphModule(net, LeafTracer().trace(net))
        with contextlib.redirect_stderr(io.StringIO()):  # it prints the traceback of an error
            ShapeProp(traced).propagate(torch.zeros(1, *shape))
    except Exception as e:  # control flow that depends on values, a call that cannot be traced, …
        reason = (str(e).splitlines() or [type(e).__name__])[0][:100]
        raise not_convolutional(f"it cannot be traced: {reason}") from None
    ops, op_of = [], {}
    for node in traced.graph.nodes:
        if node.op == "output":
            result = op_of.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            break
        if "tensor_meta" not in node.meta:
            raise not_convolutional(f"there is no rule for {called(node)}")
        if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
            raise not_convolutional(f"there is no rule for {called(node)} with named inputs")
        inputs = [op_of[arg] for arg in node.args if isinstance(arg, fx.Node)]
        result_shape = tuple(node.meta["tensor_meta"].shape[1:])
        result_shape += (1,) * (3 - len(result_shape))
        new = convert(node, traced, inputs, result_shape)
        for op in new:
            if op.kind in ELEMENTWISE and any(x.shape != op.shape for x in op.inputs):  # broadcast, or behind a Flatten
                raise not_convolutional(
                    f"there is no rule for {op.kind} of {shapes(op.inputs)} that makes {shapes([op])}"
                )
        ops += new
        op_of[node] = new[-1] if new else inputs[0]
        if writes_in_place(node, traced):  # operations that read the overwritten tensor get the result
            op_of = {other: op_of[node] if op is inputs[0] else op for other, op in op_of.items()}
    if result is None:
        raise not_convolutional("it does not return one tensor")
    needed = {result}
    for op in reversed(ops):
        needed |= set(op.inputs) if op in needed else set()
    ops = share_signs([op for op in ops if op in needed])
    for op in ops:
        if not all(constant.isfinite().all() for constant in op.constants):
            raise RunError(f"the network computes with NaN or infinite values in {op.name}: it cannot be exported")
    return ops


def not_convolutional(reason: str) -> RunError:
    return RunError(f"this network cannot be written as C ({reason}): use --to onnx or --to bits")


def check_logits(ops: list[Op]) -> None:
    """Raises RunError if a network's output is not a vector per image."""
    if ops[-1].shape[1:] != (1, 1):
        raise not_convolutional(f"its output has the shape {shapes(ops[-1:])}")


def shapes(ops: list[Op]) -> str:
    """The shapes of results, for a message: "8×4×4 and 8×1×1"."""
    return " and ".join("×".join(map(str, op.shape)) for op in ops)


def called(node: fx.Node) -> str:
    """The name of what a node of the graph calls, for a message."""
    return getattr(node.target, "__name__", str(node.target))


ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (nn.functional.relu, torch.relu, torch.relu_, "relu", "relu_")


def writes_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a node of the graph overwrites its first input."""
    if node.op == "call_module":
        return getattr(traced.get_submodule(node.target), "inplace", False)
    return node.target in (operator.iadd, "add_", torch.relu_, "relu_") or bool(node.kwargs.get("inplace"))


# The classes of PyTorch whose layers `convert` has rules for.
LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
LAYERS += (nn.ReLU, nn.Hardtanh, nn.PReLU, nn.LeakyReLU, nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd)


def without_rule(layer: nn.Module, x: Tensor) -> str:
    """The properties of a layer with input x for which there is no rule, such as "dilation=2". "" if there are none."""
    found = own_forward(layer)
    usual = {"groups": 1, "padding_mode": "zeros", "return_indices": False, "divisor_override": None}
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        for name in ("kernel_size", "stride", "padding", "dilation"):
            value = getattr(layer, name, 1)
            if value == "same" and square(layer.kernel_size) % 2 == 0:  # it pads one side more than the other
                found[name] = value
            if (isinstance(value, tuple) and len(set(value)) > 1) or (name == "dilation" and square(value) != 1):
                found[name] = value
    if isinstance(layer, nn.AvgPool2d) and square(layer.padding):
        usual["count_include_pad"] = False
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        usual["track_running_stats"] = True
    elif isinstance(layer, nn.Hardtanh):
        usual |= {"min_val": -1, "max_val": 1}
    elif isinstance(layer, nn.Flatten):
        usual |= {"start_dim": 1, "end_dim": -1}
    elif isinstance(layer, nn.Linear) and x.dim() != 2:
        found["inputs of shape"] = list(x.shape)
    found |= {name: getattr(layer, name) for name, value in usual.items() if getattr(layer, name, value) != value}
    return ", ".join(f"{name}={value!r}" for name, value in found.items())


def own_forward(layer: nn.Module) -> dict:
    """What a call of a layer does besides the forward of a class with a rule, as properties: its own forward, hooks."""
    forward, hooks = models.plain_class(layer).forward, layer._forward_hooks or layer._forward_pre_hooks
    derived = isinstance(layer, LAYERS) and not forward.__module__.startswith("torch.nn.modules.")
    return ({"forward": forward.__qualname__} if derived else {}) | ({"hooks": True} if hooks else {})


def square(size: int | tuple[int, int]) -> int:
    """The size of a square, which PyTorch writes as one number or as two."""
    return size if isinstance(size, int) else size[0]


def convert(node: fx.Node, traced: fx.GraphModule, inputs: list[Op], shape: tuple[int, int, int]) -> list[Op]:
    """The operations of one node of the graph; [] if its result is its input. shape: [C, H, W] of its result."""
    module = traced.get_submodule(node.target) if node.op == "call_module" else None
    function = None if module else node.target  # or the name of a method; a module can have that name too
    properties = without_rule(module, torch.empty(1, *node.args[0].meta["tensor_meta"].shape[1:])) if module else ""
    if properties:
        raise not_convolutional(f"there is no rule for {type(module).__name__} with {properties}")
    pools_to_size = isinstance(module, nn.AdaptiveAvgPool2d) or (function == "mean" and node.kwargs == {"dim": (2, 3)})
    fields = {}
    if node.op == "placeholder":
        kind = "image"
    elif isinstance(module, nn.Conv2d | nn.Linear):
        _, h, w = inputs[0].shape
        if isinstance(module, nn.Linear) and h != w:
            raise not_convolutional(f"there is no rule for {node.target}, a Linear on {h}×{w} pixels: make them square")
        return convert_layer(module, node.name, inputs[0], shape)
    elif isinstance(module, models.ZeroPadded):
        # A 1×1 convolution of floats that copies the channels of its input.
        weight = torch.zeros(shape[0], inputs[0].shape[0], 1, 1)
        channels = torch.arange(inputs[0].shape[0])
        weight[module.before + channels, channels] = 1
        kind, fields = "conv", {"weight": weight, "stride": module.stride}
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        kind, fields = "batchnorm", {"constants": batchnorm_constants(module)}
    elif isinstance(module, nn.ReLU) or function in RELUS:
        kind = "relu"
    elif isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        kind = "hardtanh"
    elif isinstance(module, nn.PReLU | nn.LeakyReLU):
        slope = torch.tensor(module.negative_slope) if isinstance(module, nn.LeakyReLU) else module.weight
        kind, fields = "prelu", {"constants": [slope.expand(shape[0])]}
    elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        sizes = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
        kind = "maxpool" if isinstance(module, nn.MaxPool2d) else "avgpool"
        fields = {name: square(size) for name, size in sizes.items()}
    elif pools_to_size and shape != inputs[0].shape:
        kind, fields = "avgpool", {"kernel": 0}
    elif function in ADDITIONS and len(inputs) == 2 and not node.kwargs:
        kind = "add"
    elif (
        pools_to_size
        or isinstance(module, nn.Identity | nn.Flatten | nn.modules.dropout._DropoutNd)
        or (function in ("flatten", torch.flatten) and node.args[1:] == (1,))
    ):
        return []
    else:
        raise not_convolutional(f"there is no rule for {type(module).__name__ if module else called(node)}")
    return [Op(kind, f"{node.name}_{kind}", inputs, shape, **fields)]


def batchnorm_constants(module: nn.BatchNorm2d | nn.BatchNorm1d) -> list[Tensor]:
    """α and β, [C], for which the result is αx + β, rounded as PyTorch rounds them on a CPU."""
    alpha, bias = torch.rsqrt(module.running_var + module.eps), 0.0
    if module.affine:
        alpha, bias = alpha * module.weight, module.bias.double()
    return [alpha, (bias - module.running_mean.double() * alpha.double()).float()]


def convert_layer(layer: nn.Conv2d | nn.Linear, name: str, x: Op, shape: tuple[int, int, int]) -> list[Op]:
    """The operations of a Conv2d or Linear with input x: binary activation, convolution, scale, bias."""
    ops = []
    act = getattr(layer, "act", "none")
    if act == "sign":
        ops.append(Op("sign", f"{name}_sign", [x], x.shape))
    elif act == "si":
        theta, delta = layer.theta.flatten(), layer.delta.flatten()
        if len(theta) > x.shape[0]:  # the layer's input is flattened: θ and Δ belong to elements, not to channels
            theta, delta = theta.view(x.shape), delta.view(x.shape)
        ops.append(Op("step", f"{name}_step", [x], x.shape, [theta, delta]))
    constants = getattr(layer, "leader", None) or layer  # a layer that shares its weight has the leader's signs
    weight = getattr(constants, "signs", layer.weight)
    conv = Op("conv", f"{name}_conv", [ops[-1] if ops else x], shape)
    if isinstance(layer, nn.Linear):
        c, h, w = x.shape
        conv.weight, conv.kernel = rearrange(weight, "f (c h w) -> f c h w", c=c, h=h, w=w), h
    else:
        conv.weight, conv.kernel, conv.stride = weight, square(layer.kernel_size), square(layer.stride)
        padding = {"valid": 0, "same": conv.kernel // 2}
        conv.padding = padding[layer.padding] if layer.padding in padding else square(layer.padding)
    ops.append(conv)
    if hasattr(constants, "signs") and (constants.filter_scale != 1).any():
        ops.append(Op("scale", f"{name}_scale", [conv], shape, [constants.filter_scale]))
    if layer.bias is not None:
        ops.append(Op("bias", f"{name}_bias", [ops[-1]], shape, [layer.bias]))
    return ops


def share_signs(ops: list[Op]) -> list[Op]:
    """Merge the signs of one input for several layers into one operation."""
    sign_of = {}
    for op in ops:
        if op.kind == "sign":
            sign_of.setdefault(op.inputs[0], op)
    for op in ops:
        op.inputs = [sign_of[x.inputs[0]] if x.kind == "sign" else x for x in op.inputs]
    return [op for op in ops if op.kind != "sign" or sign_of[op.inputs[0]] is op]


def consumers(ops: list[Op]) -> dict[Op, list[Op]]:
    """For each operation, the operations that read its result."""
    return {op: [other for other in ops if op in other.inputs] for op in ops}


@dataclass(eq=False)
class Group:
    """An operation and the elementwise operations that follow it, which are computed together.

    result: the last operation, whose result is that of the group.
    max_sum: if the first operation makes sums of bits (integers), the largest magnitude of a sum.
    leaves_sums: whether the result of the group is these sums, as integers.
    """

    ops: list[Op]
    result: Op
    max_sum: int | None = None
    leaves_sums: bool = False


def fuse(ops: list[Op]) -> list[Group]:
    """The operations in groups, in order. Binary activations are in no group: the group before them computes them."""
    uses, groups, group_of = consumers(ops), [], {}
    for op in ops:
        if op.kind in BINARY_ACTIVATIONS:
            continue
        inputs = [group_of[x] for x in op.inputs if x in group_of]
        host = None
        for group in inputs if op.kind in ELEMENTWISE else []:
            # `group` can compute op if only op reads its result and op's other input is computed before it.
            is_latest = all(groups.index(other) <= groups.index(group) for other in inputs)
            is_only_use = uses[group.result] == [op] and len({*op.inputs}) == len(op.inputs)  # not x + x
            if group.result in op.inputs and is_only_use and is_latest:
                host = group
        if host is None:
            host = Group([], op, max_sum=op.weight[0].numel() if op.sums_bits else None)
            groups.append(host)
        host.ops.append(op)
        host.result, group_of[op] = op, host
        if op.kind == "maxpool" and inputs[0].max_sum and uses[inputs[0].result] == [op]:
            # A scale is positive, so it can follow the maximum. So can a bias. Then the maximum is that of integers.
            conv, *after = inputs[0].ops
            if all(each.kind in ("scale", "bias") for each in after):
                inputs[0].ops, inputs[0].leaves_sums = [conv], True
                host.ops, host.max_sum = [op, *after], inputs[0].max_sum
    return groups


def summand(op: Op, first: Op, before: Op) -> Op:
    """What an addition adds to the value of the operation before it, in the group that begins with `first`.

    `before` may be a scale or bias that `fuse` has moved behind `first`, a max pool. Then the addition names `first`.
    """
    return op.inputs[1] if op.inputs[0] in (first, before) else op.inputs[0]


def is_one(ops: list[Op], activation: Op, v: Tensor) -> Tensor:
    """The bits of a binary activation after elementwise operations on v, [n, C], in PyTorch's arithmetic."""
    for op in ops:
        if op.kind == "scale":
            v = v * op.constants[0]
        elif op.kind == "bias":
            v = v + op.constants[0]
        elif op.kind == "batchnorm":
            v = (v.double() * op.constants[0].double() + op.constants[1].double()).float()
        elif op.kind == "relu":
            v = v.clamp_min(0)
        elif op.kind == "hardtanh":
            v = v.clamp(-1, 1)
        else:
            v = torch.where(v > 0, v, v * op.constants[0])
    return v >= 0 if activation.kind == "sign" else (v - activation.constants[0]) * activation.constants[1] >= 0


def interval(group: Group, activation: Op) -> tuple[Tensor, Tensor] | None:
    """The sums for which the binary activation after a group is 1: low ≤ sum ≤ high, int32 [C] each.

    It is found by trying every sum in PyTorch's arithmetic. Returns None if the group makes no sums of bits, if a
    shortcut is added to them, or if in some channel the sums are not one interval (after a PReLU).
    """
    by_element = any(constant.dim() > 1 for constant in activation.constants)
    if not group.max_sum or by_element or any(op.kind == "add" for op in group.ops):
        return None
    sums = torch.arange(-group.max_sum, group.max_sum + 1, dtype=torch.float32)[:, None]
    bits = is_one(group.ops[1:], activation, sums.expand(-1, activation.shape[0]))  # [sum, C]
    low = torch.where(bits, sums, group.max_sum + 1).amin(0)
    high = torch.where(bits, sums, -group.max_sum - 1).amax(0)
    is_interval = bits.sum(0) == (high - low + 1).clamp_min(0)
    return (low.int(), high.int()) if is_interval.all() else None


# ---------------------------------------------------------------------------------------------------------------------
# The C file: the functions of kernels.c, and the code of net_run(). Images are [height][width][channels] in memory. A
# group of operations is one loop over the rows of its result. If only binary activations follow, it stores only their
# bits.

ELEMENTWISE_C = {  # of v, channel c of element i. {0}, {1}: the operation's constants or, of 'add', the other summand
    "scale": "v *= {0}[c];",
    "bias": "v += {0}[c];",
    "batchnorm": "v = bnn_muladd(unit, v, {0}[c], {1}[c]);",
    "relu": "v = v > 0 ? v : 0;",
    "hardtanh": "v = v > -1 ? v : -1; v = v < 1 ? v : 1;",
    "prelu": "const float {0}v = v * {0}[c]; v = v > 0 ? v : {0}v;",
    "add": "v += {0}[i];",
    # binary activations: the result is at least 0 where the bit is 1
    "step": "v = (v - {0}[c]) * {1}[c];",
    "step_by_element": "v = (v - {0}[i]) * {1}[i];",
    "interval": "const float d = {1}[c] - v; v = v - {0}[c] < d ? v - {0}[c] : d;",
}
ROWS_AT_ONCE = (
    4096  # bytes of rows that an operation of a group makes before the next one takes them, or an eighth of all
)
LARGE_WEIGHTS = 32768  # with more bytes of weights all rows are made at once, so that the weights are read only once
NOT_PLAIN = re.compile(r"[^A-Za-z0-9 .,:;+_-]")
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
END_OF_HEADER = "#endif /* end of the header */\n"
# Bytes of stack of the deepest calls: the largest sum that gcc 12 -fcallgraph-info=su gives, and a margin for libc. For
# 13 networks (-O2; some with -O3 and -Os), the sums were 488 to 928 on Cortex-M4F, 520 to 1,384 on Cortex-M0+, and 904
# to 3,464 on x86-64. They do not grow with the network: ResNet-110 takes as much as ResNet-20.
STACK_BYTES = {"microcontroller": 2048, "x86-64": 4096}


def binary_weights(signs: Tensor) -> np.ndarray:
    """A binary layer's signs, int8 [C_out, C_in, k, k], in the layout of kernels.c: uint32, flat."""
    planes = [signs > 0, signs != 0] if (signs == 0).any() else [signs > 0]
    bits = torch.stack([pad_filters(plane, 16) for plane in planes])
    c, k = signs.shape[1], signs.shape[-1]
    bits = nn.functional.pad(bits, (0, 0, 0, 0, 0, -c % 8))  # a pixel has whole bytes
    bits = rearrange(bits, "plane filter c ky kx -> (plane filter ky) (kx c)")
    bits = nn.functional.pad(bits, (0, -bits.shape[1] % 32))
    words = np.packbits(bits.numpy(), axis=1, bitorder="little").view("<u4")
    layout = "(plane block lane ky) word -> (block ky word plane lane)"
    return rearrange(words, layout, plane=len(planes), lane=16, ky=k)


def pad_filters(weight: Tensor, multiple: int) -> Tensor:
    """Weights [C_out, C_in, k, k], with filters of 0 added until their number is a multiple."""
    return nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % multiple))


def blocks_of_16(weight: Tensor) -> Tensor:
    """Weights [C_out, C_in, k, k] -> [⌈C_out/16⌉, ky, kx, C_in, 16], padded with 0."""
    return rearrange(pad_filters(weight, 16), "(block lane) c ky kx -> block ky kx c lane", lane=16)


def bits_of_16(bits: Tensor) -> np.ndarray:
    """The same for bits [C_out, C_in, k, k] bool, 16 of which make an element: uint16 [⌈C_out/16⌉, ky, kx, C_in]."""
    return (blocks_of_16(bits.long()) << torch.arange(16)).sum(-1).numpy().astype(np.uint16)


def c_source(ops: list[Op], normalisation: list[list[float]], about: str, name: str = "net") -> str:
    """The C file of a network.

    normalisation: per channel the factors for pixels of 0 to 255, and what is added to the products.
    about: a few words for the comment at the top of the file. All but letters, digits, spaces and . , : ; + _ - become
        underscores, so the comment cannot be closed.
    name: the prefix of all names in the file. Raises RunError unless it consists of letters, digits and underscores.
    """
    if not IDENTIFIER.fullmatch(name):
        raise RunError(f"{name!r:.80} cannot begin the names in a C file: use letters, digits and underscores")
    check_logits(ops)
    writer = CWriter(ops, normalisation)
    (c, h, w), upper, classes, size = ops[0].shape, name.upper(), ops[-1].shape[0], math.prod(ops[0].shape)
    unit, (stack, stack_x86) = "pixels from 0 to 255, normalised here", STACK_BYTES.values()
    if all(value == 1 for value in normalisation[0]) and all(value == 0 for value in normalisation[1]):
        unit = "inputs of the network, not normalised here"
    header = f"""/* {NOT_PLAIN.sub("_", about[:200])}. Written by export.py.

   image: [{c}][{h}][{w}] (channel, row, column): {unit}
   logits: [{classes}]. The index of the largest one is the predicted class.
   The constants take {writer.flash:,} bytes of flash, besides the code. The buffers take {writer.ram:,} bytes of RAM,
   besides the image ({size:,} bytes, or {4 * size:,} of floats) and about {stack:,} bytes of stack ({stack_x86:,} on
   x86-64).

   To use several cores, give each thread a part of the images and call the functions that end in _in. This text is the
   header, and also the beginning of the C file, which compiles without the header. It is C99 and needs libc and libm:

       cc -O3 -std=c99 -c FILE.c

   On x86-64 the functions for AVX-512, AVX2 or neither are chosen when the program runs.
*/
#ifndef {upper}_PREDICT_H
#define {upper}_PREDICT_H
#include <stdint.h>

/* Bytes of the buffers and of the constants; elements of an image and of its logits. */
#define {upper}_RAM_BYTES {writer.ram}
#define {upper}_CONSTANT_BYTES {writer.flash}
#define {upper}_IMAGE_SIZE {size}
#define {upper}_LOGITS_SIZE {classes}

#ifdef __cplusplus
extern "C" {{
#endif
/* Writes logits[{classes}] of image[{c}][{h}][{w}]: {unit}. Only one thread at a time. */
void {name}_predict(const float *image, float *logits);
/* The same for an image of bytes. */
void {name}_predict_uint8(const uint8_t *image, float *logits);
/* Writes logits[count][{classes}] of images[count][{c}][{h}][{w}], with {upper}_RAM_BYTES at ram, one thread's own. */
void {name}_predict_in(float *ram, const float *images, int count, float *logits);
/* The same for images of bytes. */
void {name}_predict_uint8_in(float *ram, const uint8_t *images, int count, float *logits);
#ifdef __cplusplus
}}
#endif
{END_OF_HEADER}"""
    defines = f"""#define BNN_KINDS {sum(1 << kind for kind in writer.kinds)}
#define BNN_ONE_ROUNDING {int(any(op.sums_bits for op in ops))}
"""
    text = "\n".join([defines, KERNELS.read_text("utf-8"), *writer.functions(), *writer.definitions, writer.predict()])
    return header + text.replace("BNN_", f"{upper}_").replace("bnn_", f"{name}_")


def c_header(source: str) -> str:
    """The header of a C file: the part with which it begins, so that both agree."""
    return source.partition(END_OF_HEADER)[0] + END_OF_HEADER


@dataclass(eq=False)
class Buffer:
    """A part of the network's RAM.

    kind: "floats" or "bits". size: bytes. first, last: the steps between which its contents are needed.
    """

    name: str
    kind: str
    size: int
    first: int
    last: int
    offset: int = 0


def place(buffers: list[Buffer]) -> int:
    """Set the offsets so that buffers in use at one time do not overlap. Returns the bytes of all buffers."""
    placed = []
    for buffer in sorted(buffers, key=lambda b: -b.size):
        busy = [b for b in placed if b.first <= buffer.last and buffer.first <= b.last]
        for other in sorted(busy, key=lambda b: b.offset):
            if buffer.offset + buffer.size <= other.offset:
                break
            buffer.offset = max(buffer.offset, other.offset + other.size)
        placed.append(buffer)
    return max((b.offset + b.size for b in buffers), default=0) or 64


class CWriter:
    """The parts of a C file. flash, ram: bytes of constants and of buffers."""

    def __init__(self, ops: list[Op], normalisation: list[list[float]]):
        self.ops, self.uses = ops, consumers(ops)
        self.normalisation = normalisation
        self.definitions, self.code = [], []
        self.kinds = set()  # of convolutions: XNOR, AND, …
        self.chains = {}  # kinds of elementwise operations -> the name of the function that computes them
        self.buffers = []
        self.buffer_of = {}  # operation -> the buffer of its result
        self.flash = 0
        groups = fuse(ops)
        self.group_of = {group.result: group for group in groups}
        inside = {inner for inner in map(self.pooled, groups) if inner}  # these are computed by the pooling after them
        steps = [group for group in groups if group not in inside]
        self.last_use = {}  # operation -> the last step that needs its result
        for i, group in enumerate(steps):
            inner = self.pooled(group)
            for op in [*group.ops, *(inner.ops if inner else [])]:
                for x in op.inputs:
                    self.last_use[x] = i
        for self.step, group in enumerate(steps):
            self.write_group(group)
        self.ram = place(self.buffers)

    def pooled(self, group: Group) -> Group | None:
        """The group whose rows a pooling reads at once, if its windows do not overlap and only it reads the group."""
        pool = group.ops[0]
        if pool.kind not in ("maxpool", "avgpool") or not pool.kernel or pool.kernel != pool.stride or pool.padding:
            return None
        inner = self.group_of.get(pool.inputs[0])
        is_only_use = inner and self.uses[inner.result] == [pool]
        return inner if is_only_use and inner.ops[0].kind not in ("maxpool", "avgpool", "image") else None

    # Constants.

    def define(self, c_type: str, name: str, values: Tensor | np.ndarray) -> str:
        """Define a constant array. Returns its name."""
        formats = {"float": float_constant, "int32_t": str, "uint16_t": "{:#x}".format, "uint32_t": "{:#x}u".format}
        values = values.detach().numpy() if isinstance(values, Tensor) else values
        texts = [formats[c_type](value) for value in values.ravel().tolist()]
        lines = ",\n".join("    " + ", ".join(texts[i : i + 8]) for i in range(0, len(texts), 8))
        self.definitions.append(f"static const {c_type} bnn_{name}[{len(texts)}] BNN_ALIGNED = {{\n{lines}}};")
        self.flash += len(texts) * {"uint16_t": 2}.get(c_type, 4)
        return f"bnn_{name}"

    def define_constants(self, op: Op) -> list[str]:
        """Define an operation's constants, channels last. Returns their names."""
        names = []
        for i, constant in enumerate(op.constants):
            if constant.dim() == 3:
                constant = rearrange(constant, "c h w -> h w c")
            names.append(self.define("float", f"{op.name}_{i}", constant))
        return names

    # Buffers.

    def buffer(self, kind: str, size: int, op: Op | None = None) -> str:
        """A new buffer for an operation's result, or only for this step. size: elements of floats, bytes of bits.

        Returns its name.
        """
        # Words that are read in part may begin 3 bytes before the bits and end 3 bytes after them.
        size = 4 * size if kind == "floats" else size + 8
        last = self.last_use.get(op, self.step)
        new = Buffer(f"{kind}_{len(self.buffers)}", kind, math.ceil(size / 64) * 64, self.step, last)
        self.buffers.append(new)
        if op:
            self.buffer_of[op] = new
        return new.name

    def take_over(self, op: Op, other: Op) -> str:
        """Let the result of op replace that of another operation in its buffer."""
        buffer = self.buffer_of[op] = self.buffer_of[other]
        buffer.last = self.last_use.get(op, self.step)
        return buffer.name

    def can_take_over(self, group: Group) -> Op | None:
        """The operation whose result the group can overwrite: it is read here for the last time, element by element."""
        read_elsewhere = set() if group.ops[0].kind in ELEMENTWISE else set(group.ops[0].inputs)
        inner = self.pooled(group)
        if inner:
            read_elsewhere |= {x for op in inner.ops for x in op.inputs}
        for op in group.ops:
            for x in op.inputs if op.kind in ELEMENTWISE else []:
                buffer = self.buffer_of.get(x)
                if buffer and buffer.last == self.step and x.shape == group.result.shape and x not in read_elsewhere:
                    return x
        return None

    # Code.

    def write_group(self, group: Group) -> None:
        """The loop of a group: rows of its result, and of the binary activations that follow."""
        first, (c, h, w) = group.ops[0], group.result.shape
        uses, inner = self.uses[group.result], self.pooled(group)
        activations = [op for op in uses if op.kind in BINARY_ACTIVATIONS]
        only_bits_are_needed = bool(activations) and activations == uses
        intervals = [interval(group, op) for op in activations] if only_bits_are_needed else [None]
        sums_are_compared = all(intervals)
        if sums_are_compared and first.sums_bits and len(activations) == 1:
            low, extent = thresholds(*intervals[0])
            bounds = [
                self.define("int32_t", f"{activations[0].name}_low", low),
                self.define("uint32_t", f"{activations[0].name}_range", extent),
            ]
            bits = self.buffer("bits", h * w * math.ceil(c / 8), activations[0])
            self.code += [
                f"/* {', '.join(op.name for op in [*group.ops, *activations])}: {h} x {w} x {c} */",
                self.convolution(first, "0", h, f"NULL, {bits}, {', '.join(bounds)}"),
            ]
            return

        chain = [] if sums_are_compared else self.chain_of(group)
        # The results go to the logits, to a buffer that is kept, or to one that the next rows reuse.
        rows = 1 if inner else self.rows_at_once(first, w * c, h)
        is_last = group.result is self.ops[-1]
        replaced = None if only_bits_are_needed or is_last else self.can_take_over(group)
        if is_last:
            out = "logits"
        elif only_bits_are_needed:
            out = self.buffer("floats", rows * w * c)
        elif replaced:
            out = self.take_over(group.result, replaced)
        else:
            out = self.buffer("floats", h * w * c, group.result)
        begin = "" if only_bits_are_needed else f" + y * {w * c}"
        source, code = "out", []
        if first.kind in ELEMENTWISE:
            source = f"{self.buffer_of[chain[0].inputs[0]].name} + y * {w * c}"
        else:
            if replaced:  # the overwritten result is still read after the first operation has made its rows
                source = self.buffer("floats", rows * w * c)
            code += self.first_operation(group, inner, rows, source)
        if chain:
            code.append(self.chain(chain, source, "out", rows * w, first))
        elif source != "out":
            code.append(f"memcpy(out, {source}, {rows * w * c} * sizeof(float));")
        for op, bounds in zip(activations, intervals if sums_are_compared else [None] * len(activations), strict=True):
            compared, n = "out", math.ceil(c / 8)
            if op.kind == "step" or bounds:
                if not (only_bits_are_needed and len(activations) == 1):
                    compared = self.buffer("floats", rows * w * c)
                code.append(self.compared(op, bounds, compared, rows * w))
            bits = self.buffer("bits", h * w * n, op)
            code.append(f"bnn_pack({compared}, {rows * w}, {c}, {bits} + y * {w * n});")
        names = [op.name for op in [*(inner.ops if inner else []), *group.ops, *activations]]
        self.code += [
            f"/* {', '.join(names)}: {h} x {w} x {c} */",
            f"for (int y = 0; y < {h}; y += {rows}) {{",
            f"    float *const out = {out}{begin};",
            *[f"    {line}" for line in code],
            "}",
        ]

    def rows_at_once(self, first: Op, row: int, height: int) -> int:
        """How many rows a group computes at once, a divisor of the height. row: elements of one."""
        if first.kind == "conv" and weight_bytes(first) > LARGE_WEIGHTS:
            return height
        most = max(ROWS_AT_ONCE, 4 * height * row // 8)
        return max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or 4 * n * row <= most))

    def first_operation(self, group: Group, inner: Group | None, rows: int, to: str) -> list[str]:
        """The code that writes rows [y, y + rows) of a group's first operation, which is not elementwise."""
        first = group.ops[0]
        c, h, w = first.shape
        if first.kind == "image":
            constants = [
                self.define("float", f"image_{name}", torch.tensor(values))
                for name, values in zip(("factor", "shift"), self.normalisation, strict=True)
            ]
            return [f"bnn_normalise(floats, bytes, {c}, {h}, {w}, {', '.join(constants)}, y, y + {rows}, {to});"]
        if first.kind == "conv":
            return [self.convolution(first, "y", rows, to)]
        _, h_in, w_in = first.inputs[0].shape
        sizes = f"{w_in}, {c}, {w}, {first.kernel}, {first.stride}, {first.padding}"
        self.definitions.append(f"static const bnn_Pool bnn_{first.name}_shape = {{{sizes}}};")
        call = {"maxpool": "bnn_maximum", "avgpool": "bnn_average"}[first.kind]
        if inner is None:
            begin, end = window(first, "row", h_in, h)
            x = f"{self.buffer_of[first.inputs[0]].name} + from * {w_in * c}"
            return [
                f"for (int row = y; row < y + {rows}; row++) {{",
                f"    const int from = {begin}, to = {end};",
                f"    {call}(&bnn_{first.name}_shape, {x}, to - from, {to} + (row - y) * {w * c});",
                "}",
            ]
        k, scratch = first.kernel, self.buffer("floats", first.kernel * w_in * c)
        chain, source = self.chain_of(inner), scratch
        code = [f"for (int y_in = {k} * y, row = 0; row < {k} && y_in < {h_in}; row++, y_in++) {{"]
        to_row = f"{scratch} + row * {w_in * c}"
        inner_first = inner.ops[0]
        if inner_first.kind == "conv":
            code.append("    " + self.convolution(inner_first, "y_in", 1, to_row))
            source = to_row
        else:
            source = f"{self.buffer_of[chain[0].inputs[0]].name} + y_in * {w_in * c}"
        if chain:
            code.append("    " + self.chain(chain, source, to_row, w_in, inner_first, "y_in"))
        rows_in = f"{h_in} - {k} * y < {k} ? {h_in} - {k} * y : {k}"
        return [*code, "}", f"{call}(&bnn_{first.name}_shape, {scratch}, {rows_in}, {to});"]

    def convolution(self, op: Op, y: str, rows: int, to: str) -> str:
        """The call for rows [y, y + rows) of a convolution. to: the last arguments."""
        (c, h, w), x = op.inputs[0].shape, self.buffer_of[op.inputs[0]].name
        is_binary = op.weight.dtype == torch.int8
        has_zeros = is_binary and bool((op.weight == 0).any())
        if has_zeros and op.inputs[0].kind == "step":
            raise not_convolutional(f"there is no rule for {op.name}: its weights have 0, and its inputs are 0 and 1")
        mode = AND if op.inputs[0].kind == "step" else MASKED if has_zeros else XNOR
        weights = SIGN_OR_0 if has_zeros else SIGN if is_binary else FLOAT
        self.kinds.add(mode if op.sums_bits else weights)
        sizes = f"{h}, {w}, {c}, {op.shape[0]}, {op.kernel}, {op.stride}, {op.padding}, {mode}"
        self.definitions.append(f"static const bnn_Conv bnn_{op.name}_shape = {{{sizes}}};")
        of_rows = f"{y}, {rows}" if y == "0" else f"{y}, {y} + {rows}"
        if op.sums_bits:
            weights = self.define("uint32_t", f"{op.name}_bits", binary_weights(op.weight))
            to = to if "NULL" in to else f"{to}, NULL, NULL, NULL"
            return f"bnn_binary_conv(&bnn_{op.name}_shape, {x}, {weights}, {of_rows}, {to});"
        floats = bits = present = "NULL"
        if not is_binary:
            floats = self.define("float", f"{op.name}_weights", blocks_of_16(op.weight))
        else:
            bits = self.define("uint16_t", f"{op.name}_bits", bits_of_16(op.weight > 0))
        if has_zeros:
            present = self.define("uint16_t", f"{op.name}_present", bits_of_16(op.weight != 0))
        return f"bnn_float_conv(&bnn_{op.name}_shape, {x}, {floats}, {bits}, {present}, {of_rows}, {to});"

    def chain_of(self, group: Group) -> list[Op]:
        return group.ops if group.ops[0].kind in ELEMENTWISE else group.ops[1:]

    def chain(self, ops: list[Op], source: str, to: str, pixels: int, first: Op, y: str = "y") -> str:
        """The call that computes elementwise operations of rows that begin with row y."""
        c, _, w = ops[-1].shape  # that of ops[0] may be larger: a scale can follow the max pool that it was before
        before, arguments = (first if ops[0] is not first else first.inputs[0]), []
        for op in ops:
            if op.kind == "add":
                other = summand(op, first, before)
                arguments.append(f"{self.buffer_of[other].name} + {y} * {w * c}")
            else:
                arguments += self.define_constants(op)
            before = op
        return self.call(tuple(op.kind for op in ops), source, to, pixels, c, arguments)

    def compared(self, op: Op, bounds: tuple[Tensor, Tensor] | None, to: str, pixels: int) -> str:
        """The call that computes, from the rows at `out`, the values that a binary activation compares with 0."""
        c, _, w = op.shape
        if bounds:
            arguments = [
                self.define("float", f"{op.name}_{side}", bound.float())
                for side, bound in zip(("low", "high"), bounds, strict=True)
            ]
            return self.call(("interval",), "out", to, pixels, c, arguments)
        arguments = self.define_constants(op)
        if op.constants[0].dim() == 1:
            return self.call(("step",), "out", to, pixels, c, arguments)
        return self.call(("step_by_element",), "out", to, pixels, c, [f"{a} + y * {w * c}" for a in arguments])

    def call(self, kinds: tuple[str, ...], source: str, to: str, pixels: int, channels: int, arguments: list) -> str:
        """The call of the function for these kinds of elementwise operations."""
        function = self.chains.setdefault(kinds, f"bnn_chain_{len(self.chains)}")
        return f"{function}({', '.join([source, to, str(pixels), str(channels), *arguments])});"

    def functions(self) -> list[str]:
        """The functions that compute elementwise operations."""
        texts = []
        for kinds, function in self.chains.items():
            body, names = [], []
            for i, kind in enumerate(kinds):
                own = [f"{letter}{i}" for letter in "ab" if f"{{{'ab'.index(letter)}}}" in ELEMENTWISE_C[kind]]
                names += own
                body.append(ELEMENTWISE_C[kind].format(*own))
            constants = "".join(f", const float *{name}" for name in names)
            pointers = f"const float *in, float *out{constants}"
            parameters = f"const float *in, float *out, int pixels, int channels{constants}"
            passed = "".join(f", {name}" for name in names)
            lines = "\n".join(f"        {line}" for line in body)
            texts.append(f"""
/* {", ".join(kinds)}, of n <= 16 channels from channel `from` on, element `at`. `out` may be `in`: all values are read
   before the first one is written. */
BNN_INLINE void {function}_part(const int unit, const int n, int at, int from, {pointers}) {{
    float values[16];
    (void)unit;
    for (int f = 0; f < n; f++) values[f] = in[at + f];
    for (int f = 0; f < n; f++) {{
        const int i = at + f, c = from + f;
        float v = values[f];
{lines}
        values[f] = v;
        (void)i, (void)c;
    }}
    for (int f = 0; f < n; f++) out[at + f] = values[f];
}}

BNN_INLINE void {function}_on(const int unit, {parameters}) {{
    for (int i = 0; i < pixels * channels; i += channels) {{
        int c = 0;
        for (; c + 16 <= channels; c += 16) {function}_part(unit, 16, i + c, c, in, out{passed});
        if (c < channels) {function}_part(unit, channels - c, i + c, c, in, out{passed});
    }}
}}

BNN_FOR_EACH_UNIT({function}, ({parameters}), in, out, pixels, channels{passed})""")
        return texts

    def predict(self) -> str:
        """The buffers, and the functions that a program calls."""
        pointers = []
        for buffer in self.buffers:
            if buffer.kind == "floats":
                pointers.append(f"float *const {buffer.name} = ram + {buffer.offset // 4};")
            else:
                pointers.append(f"uint8_t *const {buffer.name} = (uint8_t *)ram + {buffer.offset + 4};")
        code = "\n".join(f"    {line}" for line in [*pointers, *self.code])
        pixels, classes = math.prod(self.ops[0].shape), self.ops[-1].shape[0]
        return f"""
/* One of floats and bytes is the image, the other one is NULL. */
static void bnn_run(float *ram, const float *floats, const uint8_t *bytes, float *logits) {{
    if (bnn_unit < 0) bnn_unit = bnn_best_unit();
{code}
}}

static float bnn_ram[{self.ram // 4}] BNN_ALIGNED;

void bnn_predict(const float *image, float *logits) {{ bnn_run(bnn_ram, image, NULL, logits); }}
void bnn_predict_uint8(const uint8_t *image, float *logits) {{ bnn_run(bnn_ram, NULL, image, logits); }}

void bnn_predict_in(float *ram, const float *images, int count, float *logits) {{
    for (; count > 0; count--, images += {pixels}, logits += {classes}) bnn_run(ram, images, NULL, logits);
}}

void bnn_predict_uint8_in(float *ram, const uint8_t *images, int count, float *logits) {{
    for (; count > 0; count--, images += {pixels}, logits += {classes}) bnn_run(ram, NULL, images, logits);
}}
"""


def float_constant(value: float) -> str:
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def weight_bytes(conv: Op) -> int:
    bits = 32 if conv.weight.is_floating_point() else 1
    return conv.weight.numel() * bits // 8


def window(op: Op, index: str, size: int, out_size: int) -> tuple[str, str]:
    """The begin and end of a pooling's window `index` in one direction, as C expressions."""
    if op.kernel == 0:
        return f"{index} * {size} / {out_size}", f"(({index} + 1) * {size} + {out_size - 1}) / {out_size}"
    begin = f"{index} * {op.stride} - {op.padding}" if op.padding else f"{index} * {op.stride}"
    end = f"{begin} + {op.kernel}"
    return (f"{begin} > 0 ? {begin} : 0" if op.padding else begin), f"{end} < {size} ? {end} : {size}"


def memory(ops: list[Op], normalisation: list[list[float]]) -> tuple[int, int]:
    """Bytes that the C file of a network needs: its constants (flash, besides the code) and its buffers (RAM)."""
    writer = CWriter(ops, normalisation)
    return writer.flash, writer.ram


# ---------------------------------------------------------------------------------------------------------------------
# Compiling and calling.


def compile_library(source: Path, folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile a C file to a library in a folder, and load it.

    The compiler is $CC (with $CFLAGS), by default the one that is found. Raises RunError if it fails.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise RunError("there is no C compiler here (cc): install one, such as gcc")
    library = folder / f"{source.stem}.so"
    options = ["-O3", "-shared", "-fPIC", "-std=c99", *shlex.split(os.environ.get("CFLAGS", ""))]
    inputs = ["-x", "c", str(source.resolve()), "-x", "none"]  # the name may have any ending
    command = [*shlex.split(compiler), *options, *inputs, "-o", str(library), *flags, "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(library))
    except (subprocess.CalledProcessError, OSError) as e:  # OSError also for a library of another machine
        lines = (getattr(e, "stderr", None) or str(e)).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])[:150]
        raise RunError(f"{source} could not be compiled by {compiler} ({reason}): name another one with CC=…") from None


def pointer(array: np.ndarray | Tensor | None) -> ctypes.c_void_p:
    if array is None:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data)


def predict(
    library: ctypes.CDLL, images: Tensor, num_classes: int, name: str = "net", *, threads: int = 1, ram: int = 0
) -> Tensor:
    """Call a compiled C file on images [N, C, H, W] with pixels of 0 to 255. Returns the logits [N, num_classes].

    images: uint8, or any type of floats. name: the prefix of the names in the file.
    ram: the file's NAME_RAM_BYTES, for the memory of each thread. With 0, the file's own buffers are used.
    threads: the number of threads, each with a part of the images. More than one thread needs ram.
    """
    is_bytes = images.dtype == torch.uint8
    function = getattr(library, f"{name}_predict{'_uint8' if is_bytes else ''}{'_in' if ram else ''}")
    images = (images if is_bytes else images.float()).contiguous()
    logits = torch.empty(len(images), num_classes)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *([ctypes.c_int, ctypes.c_void_p] if ram else [])]
    if not ram:
        sizes = [array.stride(0) * array.element_size() for array in (images, logits)]
        for i in range(len(images)):
            function(images.data_ptr() + i * sizes[0], logits.data_ptr() + i * sizes[1])
        return logits

    def compute(images: Tensor, logits: Tensor) -> None:  # ctypes lets other threads run during the call
        room = np.empty(ram + 64, dtype=np.uint8)
        begin = room.ctypes.data + -room.ctypes.data % 64
        function(begin, images.data_ptr(), len(images), logits.data_ptr())

    own, *others = zip(images.tensor_split(threads), logits.tensor_split(threads), strict=True)
    others = [threading.Thread(target=compute, args=share) for share in others]
    for thread in others:
        thread.start()
    compute(*own)
    for thread in others:
        thread.join()
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# The kernels alone.

VECTOR_UNITS = ("portable", "AVX2", "AVX-512 VPOPCNTDQ")
CALL_KERNELS = """
int best_unit(void);
int best_unit(void) { return bnn_best_unit(); }

void use_unit(int unit);
void use_unit(int unit) { bnn_unit = unit < bnn_best_unit() ? unit : bnn_best_unit(); }

void binary_conv(const bnn_Conv *, const uint8_t *, const uint32_t *, float *, uint8_t *, const int32_t *,
                 const uint32_t *);
void binary_conv(const bnn_Conv *s, const uint8_t *x, const uint32_t *w, float *sums, uint8_t *bits,
                 const int32_t *low, const uint32_t *range) {
    bnn_binary_conv(s, x, w, 0, bnn_output_size(s, s->height), sums, bits, low, range);
}

void float_conv(const bnn_Conv *, const float *, const float *, const uint16_t *, const uint16_t *, float *);
void float_conv(const bnn_Conv *s, const float *x, const float *weights, const uint16_t *bits, const uint16_t *present,
                float *out) {
    bnn_float_conv(s, x, weights, bits, present, 0, bnn_output_size(s, s->height), out);
}

/* The work of a unit per vector, without memory accesses: n times exclusive-or, popcount and addition. */
int64_t peak(int64_t);
#ifdef BNN_X86
BNN_AVX512 int64_t peak(int64_t n) {
    __m512i count[8], weight[8], a = _mm512_set1_epi64(n); /* 8: BNN_UNROLL keeps them in registers */
    BNN_UNROLL for (int i = 0; i < 8; i++) count[i] = weight[i] = _mm512_set1_epi32(3 * i);
    for (int64_t done = 0; done < n; done += 8) {
        BNN_UNROLL for (int i = 0; i < 8; i++)
            count[i] = _mm512_add_epi32(count[i], _mm512_popcnt_epi32(_mm512_xor_si512(a, weight[i])));
        __asm__ volatile("" : "+v"(a)); /* otherwise the compiler sees that the result is constant */
    }
    for (int i = 1; i < 8; i++) count[0] = _mm512_add_epi32(count[0], count[i]);
    return _mm512_reduce_add_epi32(count[0]);
}
#else
int64_t peak(int64_t n) { return n; }
#endif
"""


class ConvShape(ctypes.Structure):
    """The bnn_Conv of kernels.c. mode: XNOR, AND or MASKED."""

    _fields_ = [
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("filters", ctypes.c_int),
        ("kernel", ctypes.c_int),
        ("stride", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("mode", ctypes.c_int),
    ]

    def output_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        added = 2 * self.padding - self.kernel
        return (self.height + added) // self.stride + 1, (self.width + added) // self.stride + 1


@functools.cache
def kernel() -> ctypes.CDLL:
    """kernels.c, compiled at the first call, with the functions of CALL_KERNELS. Raises RunError if that fails."""
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "kernels.c"
    file.write_text(KERNELS.read_text("utf-8") + CALL_KERNELS, "utf-8")
    library = compile_library(file, Path(folder.name))
    library.folder = folder  # the file lives as long as the library
    library.use_unit(len(VECTOR_UNITS))
    return library


def packed_activations(bits: Tensor) -> np.ndarray:
    """bits [C, H, W] bool -> [H, W, ⌈C/8⌉] uint8, the layout of kernels.c, with 4 more bytes before and after."""
    packed = np.packbits(rearrange(bits, "c h w -> h w c").numpy(), axis=-1, bitorder="little")
    room = np.zeros(packed.size + 8, dtype=np.uint8)
    room[4:-4] = packed.ravel()
    return room[4:-4].reshape(packed.shape)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that is a multiple of 64, as the constants in a C file are."""
    room = np.empty(array.nbytes + 64, dtype=np.uint8)
    begin = -room.ctypes.data % 64
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def thresholds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The constants `low` and `range` of kernels.c for low ≤ sum ≤ high, int32 [C] -> int32 [C rounded up to 16]."""
    never = low > high
    extent = torch.where(never, 0, high - low)
    low = torch.where(never, 2**30, low)
    more = (0, -len(low) % 16)
    return nn.functional.pad(low, more, value=2**30).int(), nn.functional.pad(extent, more).int()


def binary_conv2d(
    bits: Tensor, signs: Tensor, *, stride: int = 1, padding: int = 0, mode: int = XNOR, unit: int = 2
) -> Tensor:
    """F.conv2d of one image by kernels.c: bits [C, H, W] bool, signs int8 [F, C, k, k] -> int32 [F, H', W'].

    mode: XNOR or, if some signs are 0, MASKED: a bit is +1 or −1. AND: a bit is 1 or 0.
    unit: an index of VECTOR_UNITS. A machine without it uses the best that it has.
    """
    (c, h, w), (filters, _, k, _) = bits.shape, signs.shape
    shape = ConvShape(h, w, c, filters, k, stride, padding, mode)
    sums = np.empty((*shape.output_size(), filters), dtype=np.float32)
    arrays = [packed_activations(bits), binary_weights(signs), sums, None, None, None]
    kernel().use_unit(unit)
    kernel().binary_conv(ctypes.byref(shape), *map(pointer, arrays))
    kernel().use_unit(len(VECTOR_UNITS))
    return rearrange(torch.from_numpy(sums), "h w f -> f h w").int()


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark of single convolutions. That of whole networks is in export.py.

# 3×3 layers of a ResNet-18 on images of 224 pixels: C_in = C_out, height = width.
IMAGENET_LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))


def seconds_per_call(function, at_least: float = 0.02) -> tuple[float, float]:
    """Mean seconds of a call over `at_least` seconds of calls: by the clock, and CPU time of all threads."""
    calls, start, cpu = 0, time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - start < at_least:
        function()
        calls += 1
    return (time.perf_counter() - start) / calls, (time.process_time() - cpu) / calls


def compare_speed(functions: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a call of each function, as in seconds_per_call. They take turns, after a warm-up round."""
    seconds = {name: [] for name in functions}
    for r in range(rounds + 1):
        for name, function in functions.items():
            function()
            time.sleep(0.01)  # until the threads of the function before have stopped waiting for work
            if r > 0:
                seconds[name].append(seconds_per_call(function))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in seconds.items()}


def bench_convolutions(ops: list[Op], rounds: int) -> list[dict]:
    """Time each size of binary convolution, from bits to bits, on one core and one image, against F.conv2d in float32.

    The sizes are those of a network's operations and those of IMAGENET_LAYERS. Prints a table and returns its rows.
    """
    convs = [op for op in ops if op.sums_bits]
    if not convs:
        runs.console.print("no layer has binary activations (W1A32), so there is no convolution of bits to time")
        return []
    sizes = {}  # a dictionary keeps the order and drops duplicates
    for op in convs:
        c, h, w = op.inputs[0].shape
        sizes[h, w, c, op.shape[0], op.kernel, op.stride, op.padding] = None
    for c, side in IMAGENET_LAYERS:
        sizes[side, side, c, c, 3, 1, 1] = None
    lib, peak = kernel(), None
    unit = VECTOR_UNITS[lib.best_unit()]
    if unit == VECTOR_UNITS[-1]:
        n = 10**7
        peak = n / min(seconds_per_call(lambda: lib.peak(ctypes.c_int64(n)))[0] for _ in range(5))
    title = f"binary convolutions, {unit}, one core, batch 1 (median of {rounds}, in turn)"
    table = Table(title=title, title_justify="left")
    for column in ("input", "filters", "PyTorch float32 ms", "ours ms", "ratio", "G bit operations/s", "of the peak"):
        table.add_column(column, justify="right")
    rows = []
    for size in sizes:
        shape = ConvShape(*size, XNOR)
        times = {name: both[0] for name, both in compare_speed(convolutions_to_time(shape), rounds).items()}
        row = {
            "input": [shape.channels, shape.height, shape.width],
            "filters": shape.filters,
            "kernel": shape.kernel,
            "stride": shape.stride,
            **times,
        }
        rows.append(row)
        bit_operations = math.prod(shape.output_size()) * shape.filters * shape.channels * shape.kernel**2
        stride = f" /{shape.stride}" if shape.stride > 1 else ""
        table.add_row(
            f"{shape.channels}×{shape.height}×{shape.width}",
            f"{shape.filters}, {shape.kernel}×{shape.kernel}{stride}",
            f"{1e3 * times['pytorch']:.3f}",
            f"{1e3 * times['ours']:.4f}",
            f"{times['pytorch'] / times['ours']:.1f}",
            f"{2e-9 * bit_operations / times['ours']:,.0f}",
            f"{100 * vectors_inside(shape) / times['ours'] / peak:.0f} %" if peak else "",
        )
    runs.console.print(table)
    if peak:
        runs.console.print(
            f"the peak: {peak / 1e9:.2f} G vectors of 512 bits per second, each with exclusive-or, popcount, addition"
        )
    return rows


def convolutions_to_time(shape: ConvShape) -> dict:
    """Two functions without arguments, 'pytorch' and 'ours', that compute a convolution of random bits."""
    c, filters, k = shape.channels, shape.filters, shape.kernel
    bits = torch.rand(c, shape.height, shape.width) < 0.5
    signs = torch.randint(2, (filters, c, k, k), dtype=torch.int8) * 2 - 1
    low, extent = thresholds(torch.zeros(filters, dtype=torch.int32), torch.full((filters,), 2**30, dtype=torch.int32))
    result = np.empty((*shape.output_size(), math.ceil(filters / 8)), dtype=np.uint8)
    arrays = [packed_activations(bits), aligned(binary_weights(signs)), None, result, low, extent]
    lib, arguments = kernel(), [ctypes.byref(shape), *map(pointer, arrays)]
    x = (bits[None].float() * 2 - 1).contiguous(memory_format=torch.channels_last)
    w = signs.float().contiguous(memory_format=torch.channels_last)
    return {
        "pytorch": lambda: nn.functional.conv2d(x, w, None, shape.stride, shape.padding),
        "ours": lambda arrays=arrays: lib.binary_conv(*arguments),  # `arrays` keeps the arrays alive
    }


def vectors_inside(shape: ConvShape) -> int:
    """How many vectors of 16 filters × 32 bits a convolution counts. Taps outside the image are left out."""
    taps = []
    for size, out_size in zip((shape.height, shape.width), shape.output_size(), strict=True):
        starts = [o * shape.stride - shape.padding for o in range(out_size)]
        taps.append(sum(0 <= start + tap < size for start in starts for tap in range(shape.kernel)))
    return math.prod(taps) * math.ceil(shape.filters / 16) * math.ceil(shape.channels / 8) / 4
