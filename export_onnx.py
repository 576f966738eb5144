"""Write a network with binary activations as ONNX, so that a runtime computes the bits that PyTorch computes.

    model = onnx_model(operations(net, shape), example)     # operations: of export_c.py; example: a batch of inputs

A binary activation compares a float with a threshold, so the last digit of the float can change the bit. Runtimes round
in their own ways: onnxruntime, for example, multiplies a BatchNorm into the weights before it. In these graphs, little
is left to round:

- A convolution of bits sums −1, 0 and +1, which is exact. If a binary activation follows, with or without scale and
  BatchNorm between them, it is a comparison of the sum with an integer `low`, and becomes a bias and a Clip:
  clip(2 sum − 2 low + 1, −1, 1) is +1 where sum ≥ low, and −1 elsewhere.
- Elsewhere a BatchNorm of a sum, αx + β, is A + B. A is exact in float32, and B is so small that its rounding seldom
  matters (see `split`). A BatchNorm of anything else is computed in float64. Both round once, as PyTorch does.
- What a BatchNorm, a hard tanh, … and then a binary activation make of a float is a comparison with one other float.
- The first convolution takes all channels of a pixel before the next pixel, as PyTorch's convolution does on x86.

Comparisons, scales and biases are depthwise 1×1 convolutions. onnxruntime computes convolutions in a memory layout of
their own, and changes the layout before and after most other operators.

Copy with: export_c.py, kernels.c, models.py, binarize.py, quantizers.py, runs.py.
"""

import math

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

import export_c
from export_c import BINARY_ACTIVATIONS, ELEMENTWISE, Group, Op

OPSET, IR_VERSION = 17, 8
SMALLEST = 2.0**-100  # of constants that are not 0
HUGE = 2.0**126


def onnx_model(ops: list[Op], example: Tensor):
    """The ONNX model of a network: 'image', float32, as the example but of any batch size -> 'logits'.

    Returns None for a network without binary activations, for which torch.onnx makes a faster graph, and for one with
    constants that nearly underflow.
    """
    export_c.check_logits(ops)
    constants = torch.cat([torch.ones(1), *(constant.detach().flatten() for op in ops for constant in op.constants)])
    underflows = ((constants != 0) & (constants.abs() < SMALLEST)).any()
    if underflows or not any(op.kind in BINARY_ACTIVATIONS for op in ops):
        return None
    return OnnxWriter(ops, example).model()


# ---------------------------------------------------------------------------------------------------------------------
# Constants.


def half_line(is_one, channels: int) -> tuple[Tensor, Tensor]:
    """Where a monotone condition holds, by channel: (rises [C], bool; bound [C], float32).

    is_one: x [1, C] -> [1, C], bool. It holds for x ≥ bound where rises, for x ≤ bound elsewhere; always or never if
    the bound is infinite.
    """

    def number(key: Tensor) -> Tensor:  # keys are integers in the order of the floats
        return key.abs().int().view(torch.float32) * key.sign()

    high = torch.tensor(2.0**100).view(torch.int32).long().expand(1, channels)
    low = -high
    at_low, at_high = is_one(number(low)), is_one(number(high))
    for _ in range(32):
        middle = (low + high) // 2
        is_low = is_one(number(middle)) == at_low
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    bound = torch.where(at_low, number(low), number(high))
    bound = torch.where(at_low == at_high, torch.where(at_low, -torch.inf, torch.inf), bound)
    return (at_high | ~at_low)[0], bound[0]


def comparison(rises: Tensor, bound: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Factors K and shifts b, by channel, so that clip(Kx + b, 0, 1) is 1 where x ≥ bound (or x ≤ bound), 0 elsewhere.

    K is a power of two, so that Kx is exact. b is −K times the float next to the bound, so that the sum is at most 0 on
    one side and at least 1 on the other, however it is rounded. A bound of nearly 0 is 0.
    """
    sign, bound = np.where(rises, 1.0, -1.0), bound.numpy()
    _, exponent = np.frexp(np.where(np.isfinite(bound), bound, 1))
    factor = sign * np.exp2(25.0 - exponent)
    shift = -factor * np.nextafter(bound, np.where(rises, -np.inf, np.inf).astype(np.float32)).astype(float)
    is_zero, is_constant = np.abs(bound) < SMALLEST, np.isinf(bound)
    factor = np.where(is_constant, 0, np.where(is_zero, sign * HUGE, factor))
    return factor, np.where(is_constant, sign * bound < 0, np.where(is_zero, 1, shift))


def split(alpha: np.ndarray, beta: np.ndarray, max_sum: int) -> tuple[np.ndarray, ...] | None:
    """Constants a, b, m, n for which αs + β = A + B, with A = as + b and B = mA + n, for all integers |s| ≤ max_sum.

    a and b are α and β rounded to multiples of a unit, of which αs + β is less than 2²⁴, so that float32 holds A and
    all parts of the sum exactly. B is what the rounding left out: less than max_sum units, and its own rounding errors
    are about a thousandth of a unit at most. Returns None if this does not hold because an α is small beside its β.
    """
    largest = np.abs(alpha) * max_sum + np.abs(beta)
    if (np.abs(alpha) * 2**15 < largest)[alpha != 0].any():
        return None
    unit = np.exp2(np.ceil(np.log2(np.maximum(largest, SMALLEST))) - 23)
    a, b = np.round(alpha / unit) * unit, np.round(beta / unit) * unit
    m = np.divide(alpha - a, a, out=np.zeros_like(a), where=a != 0)
    return a, b, m, beta - b - b * m


def averaging_matrix(size: int, out_size: int) -> Tensor:
    """[out_size, size]: row i averages elements ⌊i·size/out_size⌋ to ⌈(i + 1)·size/out_size⌉."""
    matrix = torch.zeros(out_size, size)
    for i in range(out_size):
        begin, end = i * size // out_size, math.ceil((i + 1) * size / out_size)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


# ---------------------------------------------------------------------------------------------------------------------
# The graph.


class OnnxWriter:
    """The nodes and constants of a graph. A value is the name of a float32 tensor [batch, C, H, W]."""

    def __init__(self, ops: list[Op], example: Tensor):
        import onnx
        from onnx import helper, numpy_helper

        self.onnx, self.helper, self.as_tensor = onnx, helper, numpy_helper.from_array
        self.ops, self.example, self.uses = ops, example, export_c.consumers(ops)
        self.nodes, self.initializers, self.values = [], [], {}
        self.shifted = set()  # values of convolutions that add a shift
        self.decides = set()  # operations whose results change bits
        for op in reversed(ops):
            if op.kind in BINARY_ACTIVATIONS or op in self.decides:
                self.decides |= set(op.inputs)

    def model(self):
        for group in export_c.fuse(self.ops):
            self.write_group(group)
        helper, types, shape = self.helper, self.onnx.TensorProto, list(self.example.shape[1:])
        self.nodes.append(helper.make_node("Flatten", [self.values[self.ops[-1]]], ["logits"]))
        image = helper.make_tensor_value_info("image", types.FLOAT, ["batch", *shape])
        logits = helper.make_tensor_value_info("logits", types.FLOAT, ["batch", self.ops[-1].shape[0]])
        graph = helper.make_graph(self.nodes, "network", [image], [logits], self.initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="export.py")

    def node(self, operator: str, *inputs: str, **attributes) -> str:
        """Add a node. Returns its result."""
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values, dtype=np.float32) -> str:
        values = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(self.as_tensor(np.ascontiguousarray(values, dtype), name))
        return name

    def cast(self, x: str, to: str) -> str:
        return self.node("Cast", x, to=getattr(self.onnx.TensorProto, to))

    def clip(self, x: str, low: float, high: float) -> str:
        return self.node("Clip", x, self.constant(low), self.constant(high))

    def per_channel(self, x: str, factor, shift=None) -> str:
        """x·factor + shift, both [C], each rounded."""
        return self.conv(x, self.constant(np.reshape(factor, (-1, 1, 1, 1))), shift, group=len(factor))

    def conv(self, x: str, weight: str, shift=None, **attributes) -> str:
        """A Conv node, which adds shift, [C_out], if it is given."""
        if shift is None:
            return self.node("Conv", x, weight, **attributes)
        result = self.node("Conv", x, weight, self.constant(shift), **attributes)
        self.shifted.add(result)
        return result

    # Operations.

    def write_group(self, group: Group) -> None:
        """The nodes of a group, and of the binary activations that follow.

        If only these take its result, its operations from number `tail` on become a part of their comparisons.
        """
        uses = self.uses[group.result]
        activations = [op for op in uses if op.kind in BINARY_ACTIVATIONS]
        tail = len(group.ops)
        if activations and activations == uses:
            adds = [i for i, op in enumerate(group.ops) if op.kind == "add"]
            first_elementwise = 0 if group.ops[0].kind in ELEMENTWISE else 1
            tail = max([first_elementwise, *(i + 1 for i in adds)])
        if len(uses) == len(activations) == 1 and tail == 1 and self.compared_sums(group, activations[0]):
            return
        if tail < len(group.ops) and not all(self.is_monotone(group.ops[tail:], op) for op in activations):
            tail = len(group.ops)
        if tail == 0:
            x = self.values[group.ops[0].inputs[0]]
        else:
            x = self.value(group, group.ops[:tail])
        if tail == len(group.ops):
            self.values[group.result] = x
        for op in activations:
            self.values[op] = self.compared(x, group.ops[tail:], op)

    def compared_sums(self, group: Group, activation: Op) -> bool:
        """The bits behind a convolution of bits, or behind a max pool of its sums. False if it has no such form."""
        interval, n = export_c.interval(group, activation), group.max_sum
        if interval is None:
            return False
        low, high = (bound.double().numpy() for bound in interval)
        rises, never = high == n, low > high
        if not (rises | never | (low == -n)).all():
            return False
        sign = np.where(rises, 1.0, -1.0)
        shift = np.where(never, -2.0 * n, np.where(rises, -low, high))  # sign · sum + shift is at least 0 for a 1
        lowest, factor = (-1, 2) if activation.kind == "sign" else (0, 1)
        shift = factor * shift + 1
        first = group.ops[0]
        if first.kind == "conv":
            x = self.convolution(first, sign, factor, shift)
        else:
            x = self.per_channel(self.first_operation(first), factor * sign, shift)
        self.values[activation] = self.clip(x, lowest, 1)
        return True

    def is_monotone(self, ops: list[Op], activation: Op) -> bool:
        slopes = [op.constants[0] for op in ops if op.kind == "prelu"]
        by_element = any(constant.dim() > 1 for constant in activation.constants)
        return not by_element and all((slope >= 0).all() for slope in slopes)

    def compared(self, x: str, ops: list[Op], activation: Op) -> str:
        """The bits of a binary activation behind elementwise operations of x."""
        if any(constant.dim() > 1 for constant in activation.constants):  # a step by element
            theta, delta = (self.constant(constant) for constant in activation.constants)
            difference = self.node("Mul", self.node("Sub", x, theta), delta)
            return self.cast(self.node("GreaterOrEqual", difference, self.constant(0)), "FLOAT")
        channels = activation.shape[0]
        if not ops and activation.kind == "sign":  # as below, in one operation
            return self.clip(self.per_channel(x, np.full(channels, HUGE), np.ones(channels)), -1, 1)
        rises, bound = half_line(lambda v: export_c.is_one(ops, activation, v), channels)
        bits = self.clip(self.per_channel(x, *comparison(rises, bound)), 0, 1)
        return bits if activation.kind == "step" else self.per_channel(bits, np.full(channels, 2), -np.ones(channels))

    def value(self, group: Group, ops: list[Op]) -> str:
        """The result of the first operations of a group."""
        first, done = ops[0], 1
        kinds = [op.kind for op in ops[1:3]]
        if first.kind in ELEMENTWISE:
            x, done = self.values[first.inputs[0]], 0
        elif first.sums_bits and first in self.decides and kinds in (["batchnorm"], ["batchnorm", "add"]):
            x, done = self.normalised_sums(group, ops)
        elif first.kind == "conv" and kinds[:1] == ["bias"]:
            x, done = self.convolution(first, shift=ops[1].constants[0]), 2
        else:
            x = self.first_operation(first)
        for i in range(done, len(ops)):
            x = self.elementwise(ops[i], x, first, ops[i - 1] if i else first.inputs[0])
        # A convolution brings x into the layout of the values that it is added to.
        return self.per_channel(x, np.ones(ops[-1].shape[0])) if x.startswith("Cast") else x

    def normalised_sums(self, group: Group, ops: list[Op]) -> tuple[str, int]:
        """A convolution of bits, its BatchNorm and, if it is next, an addition; and how many operations this is."""
        alpha, beta = (constant.detach().double().numpy() for constant in ops[1].constants)
        constants = split(alpha, beta, group.max_sum)
        if constants is None:
            return self.elementwise(ops[1], self.first_operation(ops[0]), ops[0], ops[0]), 2
        a, b, m, n = constants
        exact = self.convolution(ops[0], np.sign(a), np.abs(a), b)
        rest = self.per_channel(exact, m, n)
        if len(ops) > 2:
            return self.node("Sum", exact, rest, self.values[export_c.summand(ops[2], ops[0], ops[1])]), 3
        return self.node("Add", exact, self.guarded(rest)), 2

    def elementwise(self, op: Op, x: str, first: Op, before: Op) -> str:
        """The result of an elementwise operation of x, which is the value of the operation before in first's group."""
        constants = [constant.detach() for constant in op.constants]
        if op.kind == "scale":
            return self.per_channel(x, constants[0])
        if op.kind == "bias":
            return self.per_channel(x, torch.ones_like(constants[0]), constants[0])
        if op.kind == "batchnorm":
            ones, zeros = np.ones(len(constants[0])), np.zeros(len(constants[0]))
            dtype = np.float64 if op in self.decides else np.float32
            constants = [self.constant(values, dtype) for values in (*constants, zeros, ones)]
            if op not in self.decides:
                return self.node("BatchNormalization", x, *constants, epsilon=0.0)
            x = self.node("BatchNormalization", self.cast(x, "DOUBLE"), *constants, epsilon=0.0)
            return self.cast(x, "FLOAT")
        if op.kind == "relu":
            return self.node("Relu", x)
        if op.kind == "hardtanh":
            if not x.startswith("Conv"):  # onnxruntime computes a Clip as a part of the convolution before it
                x = self.per_channel(x, np.ones(op.shape[0]))
            return self.clip(x, -1, 1)
        if op.kind == "prelu":
            return self.node("PRelu", x, self.constant(constants[0].view(-1, 1, 1)))
        return self.node("Add", self.guarded(x), self.guarded(self.values[export_c.summand(op, first, before)]))

    def guarded(self, x: str) -> str:
        """The same value, so that a sum with it is added behind its shift.

        onnxruntime adds the other summand before the shift, unless there is a Clip. This one changes nothing.
        """
        return self.clip(x, -HUGE, HUGE) if x in self.shifted else x

    def first_operation(self, op: Op) -> str:
        """The result of an operation that is not elementwise."""
        if op.kind == "image":
            if self.example.dim() == 4:
                return "image"
            return self.node("Reshape", "image", self.constant((-1, *op.shape), np.int64))
        if op.kind == "conv":
            return self.convolution(op)
        x, (_, *sizes), (_, *out_sizes) = self.values[op.inputs[0]], op.inputs[0].shape, op.shape
        pairs = list(zip(sizes, out_sizes, strict=True))
        if op.kernel:
            # Pixels of padding behind the last one, which do not count, where the last window is cut off.
            ends = [op.stride * (n - 1) + op.kernel - op.padding - size for size, n in pairs]
            pads = [op.padding] * 2 + [max(end, 0) for end in ends]
            window = {"kernel_shape": [op.kernel] * 2, "strides": [op.stride] * 2, "pads": pads}
            return self.node("MaxPool" if op.kind == "maxpool" else "AveragePool", x, **window)
        if out_sizes == [1, 1]:
            return self.node("GlobalAveragePool", x)
        if all(size % n == 0 for size, n in pairs):
            kernel = [size // n for size, n in pairs]
            return self.node("AveragePool", x, kernel_shape=kernel, strides=kernel)
        rows, columns = (averaging_matrix(size, n) for size, n in pairs)
        return self.node("MatMul", self.node("MatMul", self.constant(rows), x), self.constant(columns.T))

    def convolution(self, op: Op, sign=None, factor=1, shift=None) -> str:
        """A convolution whose weights are multiplied by sign and factor, and shift, [C_out] or numbers, is added."""
        weight, x, (c, h, w) = op.weight.detach(), self.values[op.inputs[0]], op.inputs[0].shape
        k, stride, padding = op.kernel, op.stride, op.padding
        attributes = {"kernel_shape": [k, k], "strides": [stride] * 2, "pads": [padding] * 4}
        if weight.dtype == torch.int8:
            weight = weight.numpy() * (1 if sign is None else np.reshape(sign, (-1, 1, 1, 1)))
            weight = self.cast(self.constant(weight, np.int8), "FLOAT")
            if np.any(factor != 1):
                weight = self.node("Mul", weight, self.constant(np.reshape(factor, (-1, 1, 1, 1))))
        elif op.inputs[0].kind == "image":  # one channel, in which the pixels' channels lie side by side
            x = self.node("Transpose", x, perm=[0, 2, 3, 1])
            x = self.node("Reshape", x, self.constant((-1, 1, h, w * c), np.int64))
            weight = self.constant(rearrange(weight, "f c ky kx -> f 1 ky (kx c)"))
            pads = [padding, padding * c] * 2
            attributes = {"kernel_shape": [k, k * c], "strides": [stride, stride * c], "pads": pads}
        else:
            weight = self.constant(weight)
        return self.conv(x, weight, shift, **attributes)
