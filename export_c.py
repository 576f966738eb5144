"""Write a binary network as one C99 file, compile it, and call the kernel for convolutions of bits.

    ops = operations(net, shape)                        # the network as a list of operations (ONNX is made of it too)
    text = c_source(ops, normalisation, about)          # the C file: void predict(const float *image, float *logits)
    library = compile_library(file, folder)             # needs a C compiler
    logits = predict(library, images, num_classes)

The command line is in export.py, which imports this file. Copy this file with binary_conv.cpp, models.py, quantizers.py
and runs.py.
"""

import ctypes
import functools
import math
import operator
import os
import re
import shlex
import shutil
import statistics
import subprocess
import tempfile
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

KERNEL_FILE = Path(__file__).with_name("binary_conv.cpp")


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

    kind: what it computes of its inputs, by channel c. The operation's constants stand in brackets.
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
    weight: of conv, [C_out, C_in, k, k]: float32, or int8 (−1, 0, +1) in a binary layer, whose filters' scales are then
        the 'scale' operation that follows.
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


class LeafTracer(fx.Tracer):
    """Traces down to the modules that contain no others."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return next(module.children(), None) is None


@torch.no_grad()
def operations(net: nn.Module, shape: tuple[int, int, int]) -> list[Op]:
    """The operations of a network in eval mode, each after its inputs, the logits last.

    shape: [C, H, W] of an image. A binary layer has `signs` (int8) and `filter_scale` beside its weight; layers without
    them are convolutions of floats. Raises RunError if there is an operation of another kind.
    """
    try:
        traced = fx.GraphModule(net, LeafTracer().trace(net))
        ShapeProp(traced).propagate(torch.zeros(1, *shape))
    except Exception as e:  # control flow that depends on values, a call that cannot be traced, …
        raise not_convolutional(f"it cannot be traced: {str(e).splitlines()[0][:100]}") from None
    ops, op_of = [], {}
    for node in traced.graph.nodes:
        if node.op == "output":
            break
        if "tensor_meta" not in node.meta:
            raise not_convolutional(f"there is no rule for {node.target}")
        inputs = [op_of[arg] for arg in node.args if isinstance(arg, fx.Node)]
        result_shape = tuple(node.meta["tensor_meta"].shape[1:])
        result_shape += (1,) * (3 - len(result_shape))
        new = convert(node, traced, inputs, result_shape)
        ops += new
        op_of[node] = new[-1] if new else inputs[0]
    ops = share_signs(ops)
    for op in ops:
        if not all(constant.isfinite().all() for constant in op.constants):
            raise RunError(f"the network computes with NaN or infinite values in {op.name}: it cannot be exported")
    return ops


def not_convolutional(reason: str) -> RunError:
    return RunError(
        f"this network can be exported --to bits only ({reason}): --to onnx and --to c are for convolutional networks"
    )


def convert(node: fx.Node, traced: fx.GraphModule, inputs: list[Op], shape: tuple[int, int, int]) -> list[Op]:
    """The operations of one node of the graph; none where it passes its input on. shape: [C, H, W] of its result."""
    module = traced.get_submodule(node.target) if node.op == "call_module" else None
    pools_to_size = isinstance(module, nn.AdaptiveAvgPool2d) or (
        node.target == "mean" and node.kwargs == {"dim": (2, 3)}
    )
    fields = {}
    if node.op == "placeholder":
        kind = "image"
    elif isinstance(module, nn.Conv2d | nn.Linear):
        return convert_layer(module, node.name, inputs[0], shape)
    elif isinstance(module, models.ZeroPadded):
        # A 1×1 convolution of floats that copies the channels of its input.
        weight = torch.zeros(shape[0], inputs[0].shape[0], 1, 1)
        channels = torch.arange(inputs[0].shape[0])
        weight[module.before + channels, channels] = 1
        kind, fields = "conv", {"weight": weight, "stride": module.stride}
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        # α and β are rounded as PyTorch rounds them on a CPU.
        alpha = torch.rsqrt(module.running_var + module.eps) * module.weight
        beta = (module.bias.double() - module.running_mean.double() * alpha.double()).float()
        kind, fields = "batchnorm", {"constants": [alpha, beta]}
    elif isinstance(module, nn.ReLU):
        kind = "relu"
    elif isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (-1, 1):
        kind = "hardtanh"
    elif isinstance(module, nn.PReLU):
        kind, fields = "prelu", {"constants": [module.weight.expand(shape[0])]}
    elif isinstance(module, nn.MaxPool2d):
        fields = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
        kind = "maxpool"
    elif isinstance(module, nn.AvgPool2d) and averages_whole_windows(module):
        kind, fields = "avgpool", {"kernel": module.kernel_size, "stride": module.stride}
    elif pools_to_size and shape != inputs[0].shape:
        kind, fields = "avgpool", {"kernel": 0}
    elif node.target is operator.add and len(inputs) == 2:
        kind = "add"
    elif (
        pools_to_size
        or isinstance(module, nn.Identity | nn.Dropout)
        or (node.target == "flatten" and node.args[1:] == (1,))
    ):
        return []
    else:
        raise not_convolutional(f"there is no rule for {type(module).__name__ if module else node.target}")
    return [Op(kind, f"{node.name}_{kind}", inputs, shape, **fields)]


def averages_whole_windows(pool: nn.AvgPool2d) -> bool:
    """Whether windows lie side by side and a window over the edge is averaged over what is inside the image."""
    return pool.kernel_size == pool.stride and pool.padding == 0 and not pool.count_include_pad


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
    weight = getattr(layer, "signs", layer.weight)
    conv = Op("conv", f"{name}_conv", [ops[-1] if ops else x], shape)
    if isinstance(layer, nn.Linear):
        c, h, w = x.shape
        conv.weight, conv.kernel = rearrange(weight, "f (c h w) -> f c h w", c=c, h=h, w=w), h
    else:
        conv.weight, conv.kernel = weight, layer.kernel_size[0]
        conv.stride, conv.padding = layer.stride[0], layer.padding[0]
    ops.append(conv)
    if hasattr(layer, "signs") and (layer.filter_scale != 1).any():
        ops.append(Op("scale", f"{name}_scale", [conv], shape, [layer.filter_scale]))
    if layer.bias is not None:
        ops.append(Op("bias", f"{name}_bias", [ops[-1]], shape, [layer.bias]))
    return ops


def share_signs(ops: list[Op]) -> list[Op]:
    """Layers with the same input share its sign: one operation instead of one for each layer."""
    sign_of = {}
    for op in ops:
        if op.kind == "sign":
            sign_of.setdefault(op.inputs[0], op)
    for op in ops:
        op.inputs = [sign_of[x.inputs[0]] if x.kind == "sign" else x for x in op.inputs]
    return [op for op in ops if op.kind != "sign" or sign_of[op.inputs[0]] is op]


def consumers(ops: list[Op]) -> dict[Op, list[Op]]:
    """For each operation, those that take its result."""
    return {op: [other for other in ops if op in other.inputs] for op in ops}


@dataclass(eq=False)
class Group:
    """An operation and the elementwise operations that follow it, which are computed together.

    result: the operation whose result the group leaves.
    max_sum: where the first operation makes sums of bits (integers), the largest magnitude that a sum can have.
    leaves_sums: the group's result are those sums, as integers.
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
            # `group` can compute op if nothing else takes its result and op's other input is computed before it.
            is_latest = all(groups.index(other) <= groups.index(group) for other in inputs)
            if group.result in op.inputs and uses[group.result] == [op] and is_latest:
                host = group
        if host is None:
            host = Group([], op, max_sum=op.weight[0].numel() if op.sums_bits else None)
            groups.append(host)
        host.ops.append(op)
        host.result, group_of[op] = op, host
        if op.kind == "maxpool" and inputs[0].max_sum and uses[inputs[0].result] == [op]:
            # A scale is positive, so it can follow the maximum, as can a bias: the maximum is then one of integers.
            conv, *after = inputs[0].ops
            if all(each.kind in ("scale", "bias") for each in after):
                inputs[0].ops, inputs[0].leaves_sums = [conv], True
                host.ops, host.max_sum = [op, *after], inputs[0].max_sum
    return groups


def interval(group: Group, activation: Op) -> tuple[Tensor, Tensor] | None:
    """The sums for which the binary activation behind a group is 1: low ≤ sum ≤ high, int32 [C] each.

    It is found by trying every sum in PyTorch's arithmetic. Returns None if the group makes no sums of bits, if a
    shortcut is added to them, or if in some channel the sums are not one interval (after a PReLU).
    """
    constants = [v.detach() for v in activation.constants]
    if not group.max_sum or any(op.kind == "add" for op in group.ops) or any(v.dim() > 1 for v in constants):
        return None
    sums = torch.arange(-group.max_sum, group.max_sum + 1, dtype=torch.float32)[:, None]
    v = sums.expand(-1, activation.shape[0])  # [sum, C]
    for op in group.ops[1:]:
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
    is_one = v >= 0 if activation.kind == "sign" else (v - constants[0]) * constants[1] >= 0
    low = torch.where(is_one, sums, group.max_sum + 1).amin(0)
    high = torch.where(is_one, sums, -group.max_sum - 1).amax(0)
    is_interval = is_one.sum(0) == (high - low + 1).clamp_min(0)
    return (low.int(), high.int()) if is_interval.all() else None


# ---------------------------------------------------------------------------------------------------------------------
# The C file. Images are [height][width][channels] in memory. Each group of operations is one loop over the rows of its
# result. A group that only binary activations follow stores their bits and nothing else.

C_RUNTIME = r"""
#include <math.h>
#include <string.h>

/* a * b + c, rounded once, as PyTorch's convolutions and BatchNorms compute it on most machines. One rounding is needed
   where a result is compared with a threshold, because its last digit can change the bit. Elsewhere two do. */
#ifndef ONE_ROUNDING
#define MULADD(a, b, c) ((a) * (b) + (c))
#elif defined(FP_FAST_FMAF)
#define MULADD(a, b, c) fmaf(a, b, c)
#else
#define MULADD(a, b, c) ((float)((double)(a) * (b) + (c)))
#endif

#ifdef _OPENMP /* threads share the rows of a layer */
#define PARALLEL _Pragma("omp parallel for")
#else
#define PARALLEL
#endif

#ifdef BINARY_CONV /* linked with binary_conv.cpp, which uses the machine's vector unit */
void binary_conv_row(const ConvShape *, const uint64_t *, const uint64_t *, int, int32_t *);
void binary_conv_threshold(const int32_t *, int, int, const int32_t *, const int32_t *, uint64_t *);
#define SUMS_ROW binary_conv_row
#define THRESHOLD binary_conv_threshold
#else
#define SUMS_ROW sums_row_portable
#define THRESHOLD threshold_portable
#endif

enum { LANES = 16 }; /* a convolution of floats computes so many filters at a time */

/* w [n][16]: the weights of 16 filters as floats. bits [n]: 1 is +1, 0 is -1. present [n]: 0 makes the weight 0. It is
   NULL if no weight is 0. */
static inline void unpack_signs(const uint16_t *bits, const uint16_t *present, int n, float *w) {
#define FOUR(b) {b & 1 ? 1 : -1, b & 2 ? 1 : -1, b & 4 ? 1 : -1, b & 8 ? 1 : -1}
    static const float four[16][4] = {FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8),
        FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)};
    for (int i = 0; i < n; i++)
        for (int f = 0; f < LANES; f += 4) memcpy(w + i * LANES + f, four[bits[i] >> f & 15], sizeof four[0]);
    for (int i = 0; present && i < n; i++)
        for (int f = 0; f < LANES; f++) w[i * LANES + f] *= (float)(present[i] >> f & 1);
}

/* acc [4 pixels][16] += x [4 pixels][channels] times w [channels][16], channel by channel. The pixels are `step` floats
   apart. */
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

/* The same for one pixel. */
static inline void multiply_1(const float *x, const float *w, int channels, float *acc) {
    float a[LANES];
    memcpy(a, acc, sizeof a);
    for (int i = 0; i < channels; i++)
        for (int f = 0; f < LANES; f++) a[f] = MULADD(x[i], w[i * LANES + f], a[f]);
    memcpy(acc, a, sizeof a);
}

/* One row of a convolution of floats, out [width][filters]. Products are added tap by tap and, in each tap, channel by
   channel, which is PyTorch's order. The weights [block of 16 filters][ky][kx][channel] are w (float [16] each) or, if
   w is NULL, `bits` and `present` (see unpack_signs). */
static inline void floats_row(const ConvShape *s, const float *x, const float *w, const uint16_t *bits,
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
                if (!w) unpack_signs(bits + tap, present ? present + tap : 0, channels, unpacked);
                /* columns [column, end): those whose input at this tap is inside the image */
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

/* bits [pixels][words]: 1 where x [pixels][channels] is at least 0. */
static inline void pack_signs(const float *x, int pixels, int channels, uint64_t *bits) {
    const int words = (channels + 63) / 64;
    for (int i = 0; i < pixels; i++)
        for (int word = 0; word < words; word++) {
            const int n = channels - 64 * word < 64 ? channels - 64 * word : 64;
            const float *from = x + i * channels + 64 * word;
            uint64_t set = 0;
            for (int c = 0; c < n; c++) set |= (uint64_t)(from[c] >= 0) << c;
            bits[i * words + word] = set;
        }
}

/* out [channels]: the maximum of x [height][width][channels] by channel, over rows [y0, y1) and columns [x0, x1). */
#define MAXIMUM(name, type)                                                                                         \
    static inline void name(const type *x, int width, int channels, int y0, int y1, int x0, int x1, type *out) {    \
        for (int c = 0; c < channels; c++) out[c] = x[(y0 * width + x0) * channels + c];                            \
        for (int y = y0; y < y1; y++)                                                                               \
            for (int i = (y * width + x0) * channels; i < (y * width + x1) * channels; i += channels)               \
                for (int c = 0; c < channels; c++) out[c] = x[i + c] > out[c] ? x[i + c] : out[c];                  \
    }
MAXIMUM(maximum, float)
MAXIMUM(maximum_of_sums, int32_t)

/* The same for the average. */
static inline void average(const float *x, int width, int channels, int y0, int y1, int x0, int x1, float *out) {
    for (int c = 0; c < channels; c++) out[c] = 0;
    for (int y = y0; y < y1; y++)
        for (int i = y * width + x0; i < y * width + x1; i++)
            for (int c = 0; c < channels; c++) out[c] += x[i * channels + c];
    for (int c = 0; c < channels; c++) out[c] /= (float)((y1 - y0) * (x1 - x0));
}

static inline int at_least_0(int i) { return i > 0 ? i : 0; }
static inline int at_most(int i, int most) { return i < most ? i : most; }
"""

ELEMENTWISE_C = {  # {0}, {1}: the names of the operation's constants
    "scale": "v *= {0}[c];",
    "bias": "v += {0}[c];",
    "batchnorm": "v = MULADD(v, {0}[c], {1}[c]);",
    "relu": "v = v > 0 ? v : 0;",
    "hardtanh": "v = v < -1 ? -1 : v > 1 ? 1 : v;",
    "prelu": "v = v > 0 ? v : v * {0}[c];",
}
BUFFER_TYPES = {"floats": "float", "bits": "uint64_t", "sums": "int32_t"}
NOT_PLAIN = re.compile(r"[^A-Za-z0-9 .,:;+_-]")


def binary_weights(signs: Tensor) -> np.ndarray:
    """A binary layer's signs, int8 [C_out, C_in, k, k], in the layout of binary_conv.cpp: uint64, flat."""
    planes = [pad_filters(signs > 0, 8)]
    if (signs == 0).any():
        planes.append(pad_filters(signs != 0, 8))
    k = signs.shape[-1]
    words = pack_words(rearrange(planes, "plane filter c ky kx -> (plane filter ky kx) c"))
    layout = "(plane block lane ky kx) word -> (block ky kx word plane lane)"
    return rearrange(words, layout, plane=len(planes), lane=8, ky=k, kx=k)


def pad_filters(weight: Tensor, multiple: int) -> Tensor:
    """Weights [C_out, C_in, k, k], with filters of 0 added until their number is a multiple."""
    return nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % multiple))


def blocks_of_16(weight: Tensor) -> Tensor:
    """Weights [C_out, C_in, k, k] -> [⌈C_out/16⌉, ky, kx, C_in, 16], padded with 0."""
    return rearrange(pad_filters(weight, 16), "(block lane) c ky kx -> block ky kx c lane", lane=16)


def bits_of_16(bits: Tensor) -> np.ndarray:
    """The same for bits [C_out, C_in, k, k] bool, 16 of which make an element: uint16 [⌈C_out/16⌉, ky, kx, C_in]."""
    return (blocks_of_16(bits.long()) << torch.arange(16)).sum(-1).numpy().astype(np.uint16)


def c_source(ops: list[Op], normalisation: list[list[float]], about: str) -> str:
    """The C file of a network.

    normalisation: per channel the factors for pixels of 0 to 255, and what is added to the products.
    about: a few words for the comment at the top of the file. All but letters, digits, spaces and . , : ; + _ - become
        underscores, so the comment cannot be closed.
    """
    writer = CWriter(ops, normalisation)
    c, h, w = ops[0].shape
    header = f"""/* {NOT_PLAIN.sub("_", about[:200])}. Written by export.py.

   void predict(const float *image, float *logits);

   image: [{c}][{h}][{w}] (channel, row, column), pixels from 0 to 255 as in the image file. They are normalised here.
   logits: [{ops[-1].shape[0]}]. The index of the largest one is the predicted class.
   Buffers are static: do not call predict() from several threads at once. The file is C99 and needs libc and libm:

       cc -O3 -std=c99 -c FILE.c      (-march=native: use this machine's vector unit; -fopenmp: use all cores)
*/
#include <stddef.h>
#include <stdint.h>"""
    define = "#define ONE_ROUNDING" if any(op.sums_bits for op in ops) else ""
    kernel = KERNEL_FILE.read_text().split("#include <stdint.h>", 1)[1].split("// ----", 1)[0]
    buffers = [f"static {BUFFER_TYPES[name.split('_')[0]]} {name}[{n}];" for name, n in writer.buffer_sizes.items()]
    signature = "void predict(const float *image, float *logits)"
    code = "\n".join(f"    {line}" for line in writer.code)
    function = f"{signature};\n\n{signature} {{\n{code}\n}}\n"
    return "\n".join([header, define, kernel, C_RUNTIME, *writer.definitions, "", *buffers, "", function])


class CWriter:
    """Collects the parts of a C file: definitions of constants, sizes of buffers, and the code of predict()."""

    def __init__(self, ops: list[Op], normalisation: list[list[float]]):
        self.logits, self.uses = ops[-1], consumers(ops)
        self.normalisation = normalisation
        self.definitions, self.code = [], []
        self.buffer_sizes = {}  # name of a buffer -> elements
        self.free_buffers = []  # names of buffers whose contents are not needed any more
        self.buffer_of = {}  # operation -> name of the buffer that holds its result
        groups = fuse(ops)
        for i, group in enumerate(groups):
            self.write_group(group)
            needed_later = {x for later in groups[i + 1 :] for op in later.ops for x in op.inputs}
            for op in [op for op in self.buffer_of if op not in needed_later]:
                self.free_buffers.append(self.buffer_of.pop(op))

    def define(self, c_type: str, name: str, values: Tensor | np.ndarray) -> str:
        """Define a constant array. Returns its name."""
        formats = {"float": "{:.9g}", "int32_t": "{}", "uint16_t": "{:#x}", "uint64_t": "{:#x}"}
        values = values.detach().numpy() if isinstance(values, Tensor) else values
        texts = [formats[c_type].format(value) for value in values.ravel().tolist()]
        lines = ",\n".join("    " + ", ".join(texts[i : i + 8]) for i in range(0, len(texts), 8))
        self.definitions.append(f"static const {c_type} {name}[{len(texts)}] = {{\n{lines}}};")
        return name

    def define_constants(self, op: Op) -> list[str]:
        """Define an operation's constants, channels last. Returns their names."""
        names = []
        for i, constant in enumerate(op.constants):
            if constant.dim() == 3:
                constant = rearrange(constant, "c h w -> h w c")
            names.append(self.define("float", f"{op.name}_{i}", constant))
        return names

    def buffer(self, op: Op, prefix: str, size: int) -> str:
        """The name of a buffer for an operation's result: the free one of the nearest size, or a new one.

        prefix: one of BUFFER_TYPES.
        """
        free = [name for name in self.free_buffers if name.startswith(prefix)]
        if free:
            name = min(free, key=lambda name: abs(self.buffer_sizes[name] - size))
            self.free_buffers.remove(name)
        else:
            name = f"{prefix}_{sum(other.startswith(prefix) for other in self.buffer_sizes)}"
        self.buffer_sizes[name] = max(size, self.buffer_sizes.get(name, 0))
        self.buffer_of[op] = name
        return name

    def write_group(self, group: Group) -> None:
        """The loop of a group: each row of its result, and of the binary activations that follow."""
        first, (c, h, w) = group.ops[0], group.ops[0].shape
        uses = self.uses[group.result]
        activations = [op for op in uses if op.kind in BINARY_ACTIVATIONS]
        padded, words = math.ceil(c / 8) * 8, math.ceil(c / 64)
        row = []  # the code for row y
        if group.leaves_sums:
            row.append(f"int32_t *sums = {self.buffer(group.result, 'sums', h * w * padded)} + y * {w * padded};")
        elif group.max_sum:
            row.append(f"int32_t sums[{w * padded}];")
        if first.kind == "conv":
            row.append(self.convolution(first))
        elif first.kind in ("maxpool", "avgpool"):
            row += self.pooling(first, of_sums=group.max_sum is not None)

        only_bits_are_needed = bool(activations) and activations == uses
        intervals = [interval(group, op) for op in activations] if only_bits_are_needed else [None]
        if all(intervals):
            for op, (low, high) in zip(activations, intervals, strict=True):
                low = self.define("int32_t", f"{op.name}_low", low)
                high = self.define("int32_t", f"{op.name}_high", high)
                bits = self.buffer(op, "bits", h * w * words)
                row.append(f"THRESHOLD(sums, {w}, {c}, {low}, {high}, {bits} + y * {w * words});")
        elif not group.leaves_sums:
            if only_bits_are_needed:
                row.insert(0, f"float out[{w * c}];")
            else:
                name = "logits" if group.result is self.logits else self.buffer(group.result, "floats", h * w * c)
                row.insert(0, f"float *out = {name} + y * {w * c};")
            row += self.elementwise(group)
            for op in activations:
                row += self.binary_activation(op)
        self.code += [
            f"/* {', '.join(op.name for op in group.ops + activations)}: {h} x {w} x {c} */",
            "PARALLEL",
            f"for (int y = 0; y < {h}; y++) {{",
            *[f"    {line}" for line in row],
            "}",
        ]

    def convolution(self, op: Op) -> str:
        """The call for row y of a convolution."""
        (c, h, w), x = op.inputs[0].shape, self.buffer_of[op.inputs[0]]
        is_binary = op.weight.dtype == torch.int8
        has_zeros = is_binary and bool((op.weight == 0).any())
        mode = "AND" if op.inputs[0].kind == "step" else "MASKED" if has_zeros else "XNOR"
        sizes = f"{h}, {w}, {c}, {op.shape[0]}, {op.kernel}, {op.stride}, {op.padding}, {mode}"
        self.definitions.append(f"static const ConvShape {op.name}_shape = {{{sizes}}};")
        if op.sums_bits:
            weights = self.define("uint64_t", f"{op.name}_bits", binary_weights(op.weight))
            return f"SUMS_ROW(&{op.name}_shape, {x}, {weights}, y, sums);"
        floats = bits = present = "NULL"
        if not is_binary:
            floats = self.define("float", f"{op.name}_weights", blocks_of_16(op.weight))
        else:
            bits = self.define("uint16_t", f"{op.name}_bits", bits_of_16(op.weight > 0))
        if has_zeros:
            present = self.define("uint16_t", f"{op.name}_present", bits_of_16(op.weight != 0))
        return f"floats_row(&{op.name}_shape, {x}, {floats}, {bits}, {present}, y, out);"

    def pooling(self, op: Op, of_sums: bool) -> list[str]:
        """The code for row y of a pooling: a call per column x, with the window [y0, y1) × [x0, x1) in the input."""
        (c, h, w), (_, h_in, w_in), x = op.shape, op.inputs[0].shape, self.buffer_of[op.inputs[0]]
        edges = f"{window(op, 'y', h_in, h)}, {window(op, 'x', w_in, w)}"
        if op.kind == "avgpool":
            call = f"average({x}, {w_in}, {c}, {edges}, out + x * {c});"
        elif of_sums:
            padded = math.ceil(c / 8) * 8
            call = f"maximum_of_sums({x}, {w_in}, {padded}, {edges}, sums + x * {padded});"
        else:
            call = f"maximum({x}, {w_in}, {c}, {edges}, out + x * {c});"
        return [f"for (int x = 0; x < {w}; x++)", f"    {call}"]

    def elementwise(self, group: Group) -> list[str]:
        """The code for row y of a group's elementwise operations, from what its first operation has made to `out`."""
        first, (c, h, w) = group.ops[0], group.ops[0].shape
        chain, source = group.ops[1:], first
        if group.max_sum:
            start = f"(float)sums[x * {math.ceil(c / 8) * 8} + c]"
        elif first.kind == "image":
            factor, shift = [
                self.define("float", f"image_{name}", torch.tensor(values))
                for name, values in zip(("factor", "shift"), self.normalisation, strict=True)
            ]
            start = f"MULADD(image[(c * {h} + y) * {w} + x], {factor}[c], {shift}[c])"
        elif first.kind in ELEMENTWISE:
            chain, source = group.ops, first.inputs[0]
            start = f"{self.buffer_of[source]}[(y * {w} + x) * {c} + c]"
        else:
            start = f"out[x * {c} + c]"
            if not chain:
                return []
        code = [f"float v = {start};"]
        for op in chain:
            if op.kind == "add":
                other = op.inputs[1] if op.inputs[0] is source else op.inputs[0]
                code.append(f"v += {self.buffer_of[other]}[(y * {w} + x) * {c} + c];")
            else:
                code.append(ELEMENTWISE_C[op.kind].format(*self.define_constants(op)))
            source = op
        code.append(f"out[x * {c} + c] = v;")
        return [
            f"for (int x = 0; x < {w}; x++)",
            f"    for (int c = 0; c < {c}; c++) {{",
            *[f"        {line}" for line in code],
            "    }",
        ]

    def binary_activation(self, op: Op) -> list[str]:
        """The code for row y of a binary activation of `out`."""
        c, h, w = op.shape
        code, compared = [], "out"
        if op.kind == "step":
            compared, (theta, delta) = op.name, self.define_constants(op)
            index = f"i % {c}" if op.constants[0].dim() == 1 else f"y * {w * c} + i"
            code = [
                f"float {op.name}[{w * c}];",
                f"for (int i = 0; i < {w * c}; i++)",
                f"    {op.name}[i] = (out[i] - {theta}[{index}]) * {delta}[{index}];",
            ]
        words = math.ceil(c / 64)
        bits = self.buffer(op, "bits", h * w * words)
        return [*code, f"pack_signs({compared}, {w}, {c}, {bits} + y * {w * words});"]


def window(op: Op, index: str, size: int, out_size: int) -> str:
    """The begin and end, as C expressions, of what result `index` of a pooling is made of, in one direction."""
    if op.kernel == 0:
        return f"{index} * {size} / {out_size}, (({index} + 1) * {size} + {out_size - 1}) / {out_size}"
    begin = f"{index} * {op.stride} - {op.padding}"
    return f"at_least_0({begin}), at_most({begin} + {op.kernel}, {size})"


# ---------------------------------------------------------------------------------------------------------------------
# Compiling and calling.


def compile_library(source: Path, folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile a C file, or a .cpp file as C++, to a library in a folder, and load it.

    The compilers are $CC (with $CFLAGS) and $CXX, by default those that are found. Raises RunError if it fails.
    """
    is_cpp = source.suffix == ".cpp"
    variable, names = ("CXX", ("c++", "g++", "clang++")) if is_cpp else ("CC", ("cc", "gcc", "clang"))
    compiler = os.environ.get(variable) or next(filter(shutil.which, names), None)
    if compiler is None:
        raise RunError(f"there is no {'C++' if is_cpp else 'C'} compiler here ({names[0]}): install one, such as gcc")
    library = folder / f"{source.stem}.so"
    options = ["-O3", "-shared", "-fPIC", "-std=c++17" if is_cpp else "-std=c99"]
    if not is_cpp:
        options += shlex.split(os.environ.get("CFLAGS", ""))
    inputs = ["-x", "c++" if is_cpp else "c", str(source.resolve()), "-x", "none"]  # the name may end with anything
    command = [*shlex.split(compiler), *options, *inputs, "-o", str(library), *flags, "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(library))
    except (subprocess.CalledProcessError, OSError) as e:  # OSError also for a library of another machine
        lines = (getattr(e, "stderr", None) or str(e)).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])[:150]
        raise RunError(
            f"{source} could not be compiled by {compiler} ({reason}): name another one with {variable}=…"
        ) from None


def pointer(array: np.ndarray | Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data)


def predict(library: ctypes.CDLL, images: Tensor, num_classes: int) -> Tensor:
    """Call a compiled C file on images [N, C, H, W] with pixels of 0 to 255. Returns the logits [N, num_classes]."""
    images, logits = images.float().contiguous(), torch.empty(len(images), num_classes)
    for image, out in zip(images, logits, strict=True):
        library.predict(pointer(image), pointer(out))
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# The kernel, binary_conv.cpp.

XNOR, AND, MASKED = range(3)
VECTOR_UNITS = ("portable", "AVX2", "AVX-512 VPOPCNTDQ")


class ConvShape(ctypes.Structure):
    """The ConvShape of binary_conv.cpp. mode: XNOR, AND or MASKED."""

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
    """binary_conv.cpp, compiled at the first call. Raises RunError if it cannot be compiled."""
    folder = tempfile.TemporaryDirectory()
    library = compile_library(KERNEL_FILE, Path(folder.name), "-w")
    library.folder = folder  # the file lives as long as the library: C files are linked with it
    return library


def packed_activations(bits: Tensor) -> np.ndarray:
    """bits [C, H, W] bool -> [H, W, words] uint64, the layout of binary_conv.cpp."""
    h = bits.shape[1]
    return rearrange(pack_words(rearrange(bits, "c h w -> (h w) c")), "(h w) word -> h w word", h=h)


def binary_conv2d(
    bits: Tensor, signs: Tensor, *, stride: int = 1, padding: int = 0, mode: int = XNOR, unit: int = 2
) -> Tensor:
    """F.conv2d of one image by the kernel: bits [C, H, W] bool, signs int8 [F, C, k, k] -> int32 [F, H', W'].

    mode: XNOR or, if some signs are 0, MASKED: a bit is +1 or −1. AND: a bit is 1 or 0.
    unit: an index of VECTOR_UNITS. A machine without it uses the best that it has.
    """
    (c, h, w), (filters, _, k, _) = bits.shape, signs.shape
    shape = ConvShape(h, w, c, filters, k, stride, padding, mode)
    sums = np.empty((*shape.output_size(), math.ceil(filters / 8) * 8), dtype=np.int32)
    x, weights = packed_activations(bits), binary_weights(signs)
    kernel().binary_conv_use(unit)
    kernel().binary_conv_sums(ctypes.byref(shape), pointer(x), pointer(weights), pointer(sums))
    kernel().binary_conv_use(len(VECTOR_UNITS))
    return rearrange(torch.from_numpy(sums[..., :filters]), "h w f -> f h w")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark of single convolutions. That of whole networks is in export.py.

# 3×3 layers of a ResNet-18 on images of 224 pixels: C_in = C_out, height = width.
IMAGENET_LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))


def seconds_per_call(function, at_least: float = 0.02) -> float:
    """The mean over as many calls as take `at_least` seconds."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < at_least:
        function()
        calls += 1
    return (time.perf_counter() - start) / calls


def compare_speed(functions: dict, rounds: int) -> dict[str, float]:
    """Median seconds of a call of each function. They take turns, and one more round before does not count."""
    seconds = {name: [] for name in functions}
    for r in range(rounds + 1):
        for name, function in functions.items():
            function()
            time.sleep(0.01)  # until the threads of the function before have stopped waiting for work
            if r > 0:
                seconds[name].append(seconds_per_call(function))
    return {name: statistics.median(values) for name, values in seconds.items()}


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
    unit = VECTOR_UNITS[lib.binary_conv_best()]
    if unit == VECTOR_UNITS[-1]:
        n = 10**7
        peak = n / min(seconds_per_call(lambda: lib.binary_conv_peak(ctypes.c_int64(n))) for _ in range(5))
    title = f"binary convolutions, {unit}, one core, batch 1 (median of {rounds}, in turn)"
    table = Table(title=title, title_justify="left")
    for column in ("input", "filters", "PyTorch float32 ms", "ours ms", "ratio", "G bit operations/s", "of the peak"):
        table.add_column(column, justify="right")
    rows = []
    for size in sizes:
        shape = ConvShape(*size, XNOR)
        times = compare_speed(convolutions_to_time(shape), rounds)
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
            f"the peak: {peak / 1e9:.2f} G vectors of 512 bits per second, each exclusive-or, popcount and addition"
        )
    return rows


def convolutions_to_time(shape: ConvShape) -> dict:
    """Two functions without arguments, 'pytorch' and 'ours', that compute a convolution of random bits."""
    c, filters, k = shape.channels, shape.filters, shape.kernel
    bits = torch.rand(c, shape.height, shape.width) < 0.5
    signs = torch.randint(2, (filters, c, k, k), dtype=torch.int8) * 2 - 1
    low, high = torch.zeros(filters, dtype=torch.int32), torch.full((filters,), 2**30, dtype=torch.int32)
    arrays = [packed_activations(bits), binary_weights(signs), low, high]
    arrays.append(np.empty((*shape.output_size(), math.ceil(filters / 64)), dtype=np.uint64))  # the result
    lib, arguments = kernel(), [ctypes.byref(shape), *map(pointer, arrays)]
    x = (bits[None].float() * 2 - 1).contiguous(memory_format=torch.channels_last)
    w = signs.float().contiguous(memory_format=torch.channels_last)
    return {
        "pytorch": lambda: nn.functional.conv2d(x, w, None, shape.stride, shape.padding),
        "ours": lambda arrays=arrays: lib.binary_conv_bits(*arguments),  # arrays: to keep them alive
    }


def vectors_inside(shape: ConvShape) -> int:
    """How many vectors of 8 filters × 64 channels a convolution counts. Taps outside the image are left out."""
    taps = []
    for size, out_size in zip((shape.height, shape.width), shape.output_size(), strict=True):
        starts = [o * shape.stride - shape.padding for o in range(out_size)]
        taps.append(sum(0 <= start + tap < size for start in starts for tap in range(shape.kernel)))
    return math.prod(taps) * math.ceil(shape.filters / 8) * math.ceil(shape.channels / 64)
