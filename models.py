"""Binary layers, the networks of the papers, and `binarize_()`, which makes any network binary in place.

    model = build("resnet20", num_classes=10)                     # a CIFAR ResNet with binary weights
    model = binarize_(my_network, quantizer="dorefa")             # or your own network
    for layer in binary_layers(model): print(layer.weight.shape)  # the layers that FSG(layers) in hypernet.py takes

Copy with: quantizers.py.
"""

import argparse
import contextlib
import copyreg
import functools
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, per_filter, step_activation


class ModelError(ValueError):
    """The network cannot be built. The message is one sentence that says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Binary layers. A binary layer computes with Ŵ = Q(W) in place of W. Its parameter `weight` is the latent weight W, so
# optimizers, initialisation and state dicts work as with nn.Conv2d and nn.Linear, and full-precision checkpoints load.
#
# `layer.weight` is W, except within a forward pass, where it is Ŵ. Many networks do not call their layers: Swin, BEiT
# and the fast path of nn.TransformerEncoderLayer pass `layer.weight` to a function. So the forward pass begins with the
# `forward` of any module that contains binary layers (_Scoped), and `weight` is a property (_readable). This needs
# neither an example input nor a list of such networks. With torch.nn.utils.parametrize, `layer.weight` would be Ŵ for
# optimizers too, and the names in the state dict would change.


class _ForwardPasses(threading.local):
    """depth: how many calls of `forward` of modules with binary layers are under way in this thread."""

    depth = 0


_passes = _ForwardPasses()


def _readable(name: str) -> property:
    """The attribute `name` of a module: its parameter, or Ŵ within forward passes if the parameter is binary."""

    def read(module: nn.Module) -> Tensor | None:
        if name not in module._parameters and name not in module.__dict__:
            raise AttributeError(name)
        layer = module if isinstance(module, _Binary) else module.projections.get(name)
        return module._parameters[name] if layer is None else layer.read()

    def write(module: nn.Module, value: Tensor) -> None:  # nn.DataParallel does this to the copies that it makes
        module.__dict__[name] = value

    return property(read, write)


class _Scoped:
    """Mixed into the class of a module that contains binary layers: within its `forward`, their `weight` is Ŵ."""

    def forward(self, *args, **kwargs):
        _passes.depth += 1
        try:
            return super().forward(*args, **kwargs)
        finally:
            _passes.depth -= 1


class _Binary:
    """What all binary layers have in common. This class is mixed into the class of the layer.

    quantizer, act: names of a weight quantizer and an activation quantizer (quantizers.py).
    options: keyword arguments of the weight quantizer, such as {"ratio": 0.5}.
    unit, scale: constants, Ŵ = scale · Q(W / unit).
    leader: the layer with which this one shares its weight. Its quantizer, options, unit and scale count for both.
    With act 'si' the layer has the parameters theta and delta, [C_in, 1, 1] or [F_in], and the constant rho: see
    `step_activation`.
    """

    quantizer: str
    act: str
    options: dict = {}  # noqa: RUF012 (assigned to a layer, never modified)
    unit = scale = 1.0
    rho = 0.3
    leader = None
    layer_name = "a layer"  # in the network, for messages
    reading = False  # whether the layer's own forward is under way
    checked = False  # whether the sign of the inputs has been looked at

    weight = _readable("weight")

    def latent(self) -> Tensor:
        """W, also within forward passes."""
        return self._parameters["weight"] if "weight" in self._parameters else self.__dict__["weight"]

    def read(self) -> Tensor:
        """What `weight` is: W, or Ŵ within forward passes."""
        if not _passes.depth:
            return self.latent()
        if self.act != "none" and not self.reading:
            raise ModelError(
                f"the network reads the weight of {self.layer_name} without calling the layer, so that the layer "
                f"cannot quantize its input: use act='none', or skip=[{self.layer_name!r}]"
            )
        return self.binary_weight()

    def binary_weight(self) -> Tensor:
        """Ŵ, the weight that the layer computes with. Same shape as `weight`."""
        if self.leader is not None:
            return self.leader.binary_weight()
        w = self.latent() if self.unit == 1 else self.latent() / self.unit
        by_input = _has_inputs_first(self)  # quantizers take [C_out, ...]
        groups = getattr(self, "groups", 1)
        w = rearrange(w, "(g i) o ... -> (g o) i ...", g=groups) if by_input else w
        w = WEIGHT_QUANTIZERS[self.quantizer](w, **self.options)
        w = rearrange(w, "(g o) i ... -> (g i) o ...", g=groups) if by_input else w
        return w if self.scale == 1 else w * self.scale

    def binary_input(self, x: Tensor) -> Tensor:
        """The quantized input. Same shape as x; x itself with act 'none'."""
        if self.act == "sign" and not self.checked and not torch.compiler.is_compiling() and not x.is_meta:
            self.checked = True
            if x.numel() >= 64 and bool((x >= 0).all()):
                warnings.warn(
                    f"all inputs of {self.layer_name} are ≥ 0, so all their signs are +1: replace the ReLU in front of "
                    "it by nn.Hardtanh, nn.PReLU or nn.Identity, or centre the inputs",
                    stacklevel=2,
                )
        if self.act != "si":
            return ACTIVATION_QUANTIZERS[self.act](x)
        return step_activation(x, self.theta, self.delta, self.rho)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The forward of the layer's own class, in which `weight` is Ŵ."""
        x = self.binary_input(x)
        self.reading, _passes.depth = True, _passes.depth + 1
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.reading, _passes.depth = False, _passes.depth - 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantizer={self.quantizer}, act={self.act}"


class _Summing(_Binary):
    """A binary layer that sums exactly in eval mode: nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d."""

    def per_channel(self, v: Tensor) -> Tensor:
        """One value per channel, [C], in a shape that broadcasts with the layer's output."""
        return v.view(-1, *[1] * (self.latent().dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's convolution or matrix product of the binary input with Ŵ.

        In eval mode with binary activations, the layer sums the signs first and multiplies the sums by the scale of
        each filter afterwards. A sum of −1, 0 and +1 is exact in any order of summation, a sum of ±0.0123 is not. So
        the next binary activation sees the same values with any batch size, library and machine, and in every format
        that export.py writes.
        """
        function = F.linear if isinstance(self, nn.Linear) else self._conv_forward
        x, w = self.binary_input(x), self.binary_weight()
        if self.training or self.act == "none":
            return function(x, w, self.bias)
        scale = w.detach().abs().flatten(1).amax(1).clamp_min(torch.finfo(w.dtype).tiny)
        exact = torch.promote_types(w.dtype, torch.float32)  # bfloat16 cannot represent large sums exactly
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            outputs = function(x.to(exact), (w / per_filter(scale, w)).to(exact), None)
        outputs = outputs * self.per_channel(scale)
        outputs = outputs if self.bias is None else outputs + self.per_channel(self.bias)
        return outputs.to(w.dtype)


class BinaryConv2d(_Summing, nn.Conv2d):
    """nn.Conv2d with binary weights: x [B, C_in, H, W] -> [B, C_out, H', W']."""

    plain = nn.Conv2d


class BinaryLinear(_Summing, nn.Linear):
    """nn.Linear with binary weights: x [..., F_in] -> [..., F_out]."""

    plain = nn.Linear


class FloatConv2d(nn.Conv2d):
    """A convolution that `binarize_` leaves in full precision."""


PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention


class _Attention(_Scoped):
    """Mixed into nn.MultiheadAttention. projections: its binary parameters, as layers (Projection)."""

    in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight = map(_readable, PROJECTIONS)
    projections: dict = {}  # noqa: RUF012 (assigned to an attention, never modified here)


class Projection(_Binary, nn.Module):
    """A projection of the inputs of an nn.MultiheadAttention, as a layer: `weight` is the attention's parameter.

    It is not a submodule, so that the names in the state dict stay as they are.
    """

    def __init__(self, attention: nn.MultiheadAttention, parameter: str):
        super().__init__()
        self.__dict__.update(attention=attention, parameter=parameter)  # past nn.Module, which would register it

    def latent(self) -> Tensor:
        return self.attention._parameters[self.parameter]

    weight = property(_Binary.read)

    def register_parameter(self, name: str, value: nn.Parameter | None) -> None:
        """`projection.weight = value` sets the attention's parameter."""
        self.attention.register_parameter(self.parameter, value)


@functools.cache
def _twin(cls: type, mixin: type) -> type:
    """The class of that name with `mixin` in front. Objects of `cls` become binary, or scoped, by taking it."""
    if mixin is _Binary:
        if cls in (nn.Conv2d, nn.Linear):
            return {nn.Conv2d: BinaryConv2d, nn.Linear: BinaryLinear}[cls]
        known = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward)
        bases = (_Summing if cls.forward in known else _Binary, cls)
    else:
        bases = (mixin, cls)

    def __reduce_ex__(self, protocol):  # copy and pickle find a class by its name, and this one has none
        make, args, *state = super(made, self).__reduce_ex__(protocol)
        return (_new, (cls, mixin), *state) if make is copyreg.__newobj__ else (make, args, *state)

    fields = {"plain": cls, "__reduce_ex__": __reduce_ex__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    if mixin is not _Binary:  # some libraries look at the arguments of `forward`
        fields["forward"] = functools.wraps(cls.forward)(lambda self, *args, **kw: mixin.forward(self, *args, **kw))
    made = type(f"Binary{cls.__name__}" if mixin is _Binary else cls.__name__, bases, fields)
    return made


def _new(cls: type, mixin: type) -> nn.Module:
    twin = _twin(cls, mixin)
    return twin.__new__(twin)


def _has_inputs_first(layer: nn.Module) -> bool:
    """Whether dimension 0 of the weight counts input channels, and dimension 1 filters (of each group)."""
    return isinstance(layer, nn.modules.conv._ConvTransposeNd) or _is_conv1d(layer)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is a linear layer with a weight [F_in, F_out], as GPT-2 has (Conv1D of transformers)."""
    w, b = module._parameters.get("weight"), module._parameters.get("bias")
    is_linear = w is not None and b is not None and w.dim() == 2 and b.shape == w.shape[1:]
    return is_linear and _plain(module).__name__ == "Conv1D"


def _plain(module: nn.Module) -> type:
    """The class of a module before `binarize_`."""
    return getattr(type(module), "plain", type(module))


def named_binary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The binary layers of a model by name, in the order of `model.modules()`. A shared weight counts once."""
    found, weights = {}, set()
    for name, m in model.named_modules():
        layers = {name: m} if isinstance(m, _Binary) else m.projections if isinstance(m, _Attention) else {}
        for key, layer in layers.items():
            if id(layer.latent()) not in weights:
                weights.add(id(layer.latent()))
                found[key if layer is m else _joined(name, key.removesuffix("_weight"))] = layer
    return found


def _joined(name: str, rest: str) -> str:
    return f"{name}.{rest}" if name else rest


def binary_layers(model: nn.Module) -> list[nn.Module]:
    """The binary layers of a model, in the order of `model.modules()`. A shared weight counts once."""
    return list(named_binary_layers(model).values())


def binary_layer_names(model: nn.Module) -> list[str]:
    """The names of the binary layers, in the same order. An nn.MultiheadAttention `a` has the layer `a.in_proj`."""
    return list(named_binary_layers(model))


# ---------------------------------------------------------------------------------------------------------------------
# Any network.


def binarize_(
    model: nn.Module,
    quantizer: str = "dorefa",
    act: str = "none",
    first: bool = False,
    last: bool = False,
    *,
    skip: Iterable[str] | Callable[[str, nn.Module], bool] = (),
    scale: float | None = None,
    example=None,
    quiet: bool = False,
) -> nn.Module:
    """Make the layers of a model binary, in place, and return the model.

    These layers become binary: nn.Linear, convolutions and transposed convolutions in 1, 2 and 3 dimensions, classes
    derived from them, nn.MultiheadAttention (its projections of the inputs are the layer `in_proj`) and transformers'
    Conv1D. All else keeps full precision: embeddings, LSTM and GRU, normalisation, biases, and layers whose weight is
    computed from other parameters (weight_norm, spectral_norm, pruning). One line on stderr says what, `summary` lists
    all.

    quantizer: one of WEIGHT_QUANTIZERS (quantizers.py). 'none' makes binary layers full-precision layers again. Set the
        arguments of a quantizer afterwards: for layer in binary_layers(model): layer.options = {"ratio": 0.5}.
    act: how the inputs of the binary layers are quantized. 'none' keeps full precision, 'sign' gives −1 and +1, 'si'
        gives 0 and 1 (Si-BNN). With 'sign' do not place a ReLU right before such a layer, since every input would
        become +1; use Hardtanh, PReLU or nothing. 'si' adds the parameters theta and delta to each layer, so create
        the optimizer afterwards. The inputs of nn.MultiheadAttention keep full precision.
    first, last: whether the first and the last layer become binary too. By default they keep full precision, as in
        most papers. The last layers are timm's `get_classifier()`, transformers' `get_output_embeddings()`, or else the
        last layer in the order of `model.modules()`. With `example` they are found in the graph, all of them.
    skip: layers that keep full precision: names of layers or of modules that contain them, or a function of the layer's
        name and its module.
    scale: constant that multiplies the binary weights. None is `he_scale` where no BatchNorm, GroupNorm or
        InstanceNorm follows the layer, since the outputs would grow from layer to layer; and 1 for quantizers that have
        a scale, and for the networks of this file, which are defined without.
    example: an input of the model: a tensor, a tuple of arguments, or a dict of keyword arguments. The model then runs
        on it a few times, in eval mode and in training mode, to find the first and the last layers and to check that
        it computes with nothing of the latent weights but their signs.
    quiet: do not print the line.

    The modules stay the same objects with the same parameters. Hooks and optimizers that refer to them keep working.
    Raises ModelError for an unknown name, if there is no layer to make binary, and if the check fails.
    """
    if quantizer != "none" and quantizer not in WEIGHT_QUANTIZERS:
        raise ModelError(f"no quantizer is called {quantizer!r}: use one of none, {', '.join(WEIGHT_QUANTIZERS)}")
    if act not in ACTIVATION_QUANTIZERS:
        raise ModelError(f"no activation is called {act!r}: use one of {', '.join(ACTIVATION_QUANTIZERS)}")
    if quantizer == "none":
        for m in model.modules():
            _undo(m)
        return model
    weights = _weights(model)
    reasons = _reasons(model, weights, first, last, skip, example)
    chosen = {name: weights[name] for name in weights if name not in reasons}
    if not chosen:
        kept = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5]) or "it has no such layer"
        raise ModelError(f"nothing to binarize: no Linear or convolution of the model can become binary ({kept})")
    stay = {m for m, _ in chosen.values()} if act == "si" else set()
    for m in model.modules():
        _undo(m, keep_thresholds=m in stay)
    leaders, normalised = {}, _normalised(model)
    for name, (m, parameter) in chosen.items():
        layer = _convert(m, parameter)
        layer.layer_name, layer.quantizer, layer.act = name, quantizer, act
        if isinstance(layer, Projection) or f"{name.rpartition('.')[0]}.in_proj" in weights:
            layer.act = "none"  # nn.MultiheadAttention reads the weights of its layers
        if layer.act == "si" and not hasattr(layer, "theta"):
            _add_thresholds(layer)
        needs_scale = quantizer not in SCALED and m not in normalised and not isinstance(model, ResNet | PlainNet)
        layer.scale = scale if scale is not None else he_scale(layer) if needs_scale else 1.0
        layer.unit = layer.scale if quantizer in UNITS else 1.0
        leader = leaders.setdefault(id(layer.latent()), layer)
        layer.__dict__["leader"] = None if leader is layer else leader  # past nn.Module, which would register it
    for m in model.modules():
        _scope(m, act)
    for name, reason in reasons.items():
        m, parameter = weights[name]
        m.__dict__.setdefault("why_float", {})[parameter] = reason
    if example is not None and (names := latent_readers(model, example)):
        binarize_(model, "none")
        raise ModelError(
            f"the network computes with the latent weights of {_shortened(names)}, not with the signs: leave them in "
            f"full precision with skip={names[:3]}"
        )
    if not quiet:
        print(describe(model), file=sys.stderr)
    return model


SCALED = ("bwn-f", "bwn-l", "sibnn", "identity")  # quantizers whose Ŵ is of the order of W
UNITS = ("bnn", "bnn+", "bnn++", "pc")  # quantizers that compare |W| with 1


def _weights(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The weights that can become binary, by the layer's name: the module and the name of its parameter."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.conv._ConvNd | nn.Linear) or _is_conv1d(m):
            found[name] = m, "weight"
        elif isinstance(m, nn.MultiheadAttention):
            for parameter in PROJECTIONS:
                if m._parameters.get(parameter) is not None:
                    found[_joined(name, parameter.removesuffix("_weight"))] = m, parameter
    return found


def _reasons(model: nn.Module, weights: dict, first: bool, last: bool, skip, example) -> dict[str, str]:
    """The layers that keep full precision, by name, and why."""
    start = next(m for m in model.modules() if isinstance(m, nn.Embedding) or m in {m for m, _ in weights.values()})
    firsts, lasts, unused = [] if isinstance(start, nn.Embedding) else list(weights)[:1], list(weights)[-1:], []
    name_of = {id(m): name for name, (m, _) in weights.items()}
    for method in ("get_classifier", "get_output_embeddings"):
        heads = getattr(model, method)() if hasattr(model, method) else ()
        heads = [name_of[id(m)] for m in (heads if isinstance(heads, tuple | list) else [heads]) if id(m) in name_of]
        lasts = heads or lasts
    if example is not None:
        firsts, lasts, unused = _ends(model, weights, example)
    skip = tuple(skip) if not callable(skip) else skip
    if not callable(skip):
        unknown = [s for s in skip if not any(f"{name}.".startswith(f"{s}.") for name in weights)]
        if unknown or isinstance(skip, str):
            raise ModelError(f"skip names no layer: {unknown}; the layers are {_shortened(list(weights), 12)}")
    reasons = {}
    for name, (m, parameter) in weights.items():
        if callable(skip):
            skipped = skip(name, m)
        else:
            skipped = any(f"{name}.".startswith(f"{s}.") for s in skip)
        w = m._parameters.get(parameter)
        own = [a for a in (*SETTINGS, "theta", "delta") if hasattr(m, a)]
        if isinstance(m, FloatConv2d):
            reasons[name] = "full precision by design"
        elif w is None:
            reasons[name] = "its weight is computed (weight_norm, spectral_norm, pruning): remove that first"
        elif name in unused:
            reasons[name] = "not used on the example"
        elif name in firsts and not first:
            reasons[name] = "first layer"
        elif name in lasts and not last:
            reasons[name] = "last layer"
        elif skipped:
            reasons[name] = "skipped"
        elif isinstance(w, nn.parameter.UninitializedTensorMixin):
            reasons[name] = "lazy: run the model on an input first"
        elif not w.is_floating_point():
            reasons[name] = f"its weight is {str(w.dtype).removeprefix('torch.')}"
        elif own and not isinstance(m, _Binary):
            reasons[name] = f"its class has another attribute `{own[0]}`"
    # A weight that several modules share is binary in all of them or in none.
    binary = {(id(m), parameter) for name, (m, parameter) in weights.items() if name not in reasons}
    float_in = {
        id(p): name or "the model"
        for name, m in model.named_modules()
        for key, p in m._parameters.items()
        if p is not None and (id(m), key) not in binary
    }
    for name, (m, parameter) in weights.items():
        if name not in reasons and (other := float_in.get(id(m._parameters[parameter]))):
            reasons[name] = f"its weight is also that of {other}, which keeps full precision"
    return reasons


def _normalised(model: nn.Module) -> set[nn.Module]:
    """The layers whose outputs a BatchNorm, GroupNorm or InstanceNorm takes, by the order of the modules."""
    norms = nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm | nn.GroupNorm
    found = set()
    for parent in model.modules():
        layer, width = None, None
        for child in parent.children():
            if isinstance(child, norms):
                if layer is not None and width == getattr(child, "num_features", getattr(child, "num_channels", None)):
                    found.add(layer)
                layer = None
            elif isinstance(child, nn.modules.conv._ConvNd | nn.Linear):
                layer, width = child, getattr(child, "out_channels", getattr(child, "out_features", None))
            elif not isinstance(child, nn.PReLU) and next(child.parameters(), None) is not None:
                layer = None
    return found


def _convert(module: nn.Module, parameter: str) -> nn.Module:
    """Make a parameter of a module binary. Returns the binary layer: the module, or the Projection of an attention."""
    if parameter == "weight":
        module.__class__ = _twin(type(module), _Binary)
        return module
    if not isinstance(module, _Attention):
        module.__class__ = _twin(type(module), _Attention)
    module.__dict__.setdefault("projections", {})
    return module.projections.setdefault(parameter, Projection(module, parameter))


def _scope(module: nn.Module, act: str) -> None:
    """Let Ŵ be read within the module's forward, unless it only calls its layers or has none that are binary."""
    calls_layers = (
        _plain(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict) or _plain(module).__module__ == __name__
    )
    if calls_layers or isinstance(module, _Binary) or not named_binary_layers(module):
        return
    if not isinstance(module, _Scoped):
        module.__class__ = _twin(type(module), _Attention if isinstance(module, nn.MultiheadAttention) else _Scoped)
    if isinstance(module, nn.TransformerEncoderLayer) and act != "none":
        module.__dict__["fast_path"] = module.activation_relu_or_gelu
        module.activation_relu_or_gelu = 0  # the fast path does not call the layers, which quantize their inputs


def _undo(module: nn.Module, keep_thresholds: bool = False) -> None:
    """Undo what `binarize_` did to a module (not to its submodules)."""
    if "fast_path" in module.__dict__:
        module.activation_relu_or_gelu = module.__dict__.pop("fast_path")
    if isinstance(module, _Binary) and "theta" in module._parameters and not keep_thresholds:
        del module.theta, module.delta
    if isinstance(module, _Binary | _Scoped):
        module.__class__ = _plain(module)
        for key in (*SETTINGS, "layer_name", "checked", "projections"):
            module.__dict__.pop(key, None)
    module.__dict__.pop("why_float", None)


SETTINGS = ("quantizer", "act", "options", "unit", "scale", "rho", "leader")


def _add_thresholds(layer: nn.Module) -> None:
    """Give a layer the parameters delta and theta. They come before `weight`, as in Si-BNN's code."""
    weight, bias = layer.weight, layer.bias
    channels = weight.shape[0] if _has_inputs_first(layer) else weight.shape[1] * getattr(layer, "groups", 1)
    shape = (channels, *[1] * (weight.dim() - 2))
    del layer.weight, layer.bias  # the order of a module's parameters is the order in which they are set
    layer.delta, layer.theta = nn.Parameter(weight.new_ones(shape)), nn.Parameter(weight.new_zeros(shape))
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)


def _call(model: nn.Module, example) -> list[Tensor]:
    """The tensors that model(example) returns. example: see `binarize_`."""
    if isinstance(example, dict):
        outputs = model(**example)
    else:
        outputs = model(*example) if isinstance(example, tuple) else model(example)
    outputs = vars(outputs) if hasattr(outputs, "__dataclass_fields__") else outputs
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


@contextlib.contextmanager
def _trial(model: nn.Module, training: bool = False):
    """Within `with _trial(model)`, the model can run: mode, buffers and random numbers are restored at the end."""
    modes, buffers = [(m, m.training) for m in model.modules()], [(b, b.clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield model.train(training)
    finally:
        for m, mode in modes:
            m.training = mode
        for b, value in buffers:
            b.data.copy_(value)


def _ends(model: nn.Module, weights: dict, example) -> tuple[set[str], set[str], set[str]]:
    """The first layers, the last layers and those not used, in the autograd graph of model(example).

    A layer is where something that depends on the input meets something that depends on the weight alone. It is first
    if no layer is before it on the way from the input, and last if none is behind it. Embeddings count as inputs.
    """
    inputs, tokens = set(), any(isinstance(m, nn.Embedding) for m in model.modules())

    def as_input(t):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        t = t.detach().clone().requires_grad_()
        inputs.add(id(t))
        return t

    example = tree_map(as_input, example)
    names = {id(m._parameters.get(key)): name for name, (m, key) in reversed(weights.items())}
    trained = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    outputs = []  # of the modules too: what is computed from them may be detached
    hooks = [m.register_forward_hook(lambda m, x, y: outputs.extend(tree_leaves(y))) for m in model.modules()]
    try:
        for p, _ in trained:
            p.requires_grad_()
        with _trial(model), torch.enable_grad():
            outputs += _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in trained:
            p.requires_grad_(flag)
    # For each node of the graph: whether it depends on the input; the weights it depends on, if it does not; and the
    # weights of the nearest layers at it or before it, if it does.
    depends, alone, nearest = {}, {}, {}
    firsts, used, followed = set(), set(), set()
    stack = [t.grad_fn for t in outputs if isinstance(t, Tensor) and t.grad_fn is not None]
    while stack:
        node = stack[-1]
        before = [n for n, _ in node.next_functions if n is not None]
        waiting = [n for n in before if n not in depends]
        if node in depends or waiting:
            stack.pop() if node in depends else stack.extend(waiting)
            continue
        variable = id(getattr(node, "variable", None))
        is_table = "Embedding" in node.name()
        depends[node] = variable in inputs or is_table or any(depends[n] for n in before)
        own = {variable} & names.keys() | {w for n in before if not depends[n] and not is_table for w in alone[n]}
        passed = {w for n in before if depends[n] for w in nearest[n]}
        alone[node], nearest[node] = own, own or passed
        if depends[node] and own:
            used |= own
            followed |= passed
            firsts |= set() if passed or tokens else own
    ids = {name: id(m._parameters.get(key)) for name, (m, key) in weights.items()}
    firsts, lasts = ({name for name in ids if ids[name] in found} for found in (firsts, used - followed))
    return firsts, lasts, {name for name in ids if ids[name] not in used}


@torch.no_grad()
def latent_readers(model: nn.Module, example) -> list[str]:
    """The binary layers, by name, whose latent weights change model(example) while their signs stay the same.

    There should be none. The model runs in eval mode with and without gradients and, where it can run on the example,
    in training mode. example: see `binarize_`.
    """
    layers = named_binary_layers(model)
    settings = [(layer, layer.quantizer, layer.options) for layer in layers.values()]

    def results() -> list[Tensor]:
        found = []
        for training, grad in ((False, False), (False, True), (True, True)):
            with _trial(model, training), torch.set_grad_enabled(grad):
                try:
                    found += [t.detach().clone() for t in _call(model, example)]
                except (ValueError, AssertionError, TypeError):  # no targets, a BatchNorm of a single element, …
                    if not training:
                        raise
        return found

    def changed(names) -> bool:
        latent = {name: layers[name].latent() for name in names}
        values = {name: w.clone() for name, w in latent.items()}
        for w in latent.values():
            w.mul_(0.5 + torch.rand_like(w))
        after = results()
        for name, w in latent.items():
            w.copy_(values[name])
        return not all(torch.allclose(a, b, 1e-3, 1e-5, equal_nan=True) for a, b in zip(after, before, strict=True))

    for layer, *_ in settings:
        layer.quantizer, layer.options = "bwn", {}  # Ŵ depends on the signs alone
    try:
        before = results()
        return [name for name in layers if changed([name])] if changed(layers) else []
    finally:
        for layer, quantizer, options in settings:
            layer.quantizer, layer.options = quantizer, options


# ---------------------------------------------------------------------------------------------------------------------
# What is binary.


def _rows(model: nn.Module) -> list[tuple[str, nn.Module, Tensor, nn.Module | None, str]]:
    """The matrices and kernels of a model: name, module, parameter, binary layer or None, and why it is not binary."""
    weights = {id(m._parameters.get(key)): name for name, (m, key) in reversed(_weights(model).items())}
    binary, seen, rows = named_binary_layers(model), set(), []
    for name, m in model.named_modules():
        for key, p in m._parameters.items():
            if p is None or id(p) in seen or p.dim() < 2 or key in ("theta", "delta"):
                continue
            seen.add(id(p))
            known = weights.get(id(p))
            if isinstance(m, nn.Embedding | nn.EmbeddingBag):
                reason = "a lookup table"
            else:
                reason = m.__dict__.get("why_float", {}).get(key) or ("" if known else "no rule for this class")
            label = known or _joined(name, key if known else key.removesuffix(".weight"))
            rows.append((label, m, p, binary.get(known), reason))
    return rows


def _shortened(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def describe(model: nn.Module) -> str:
    """One line: how many layers and weights are binary, and what is not."""
    rows = _rows(model)
    layers = [layer for *_, layer, _ in rows if layer is not None]
    total = sum(p.numel() for p in model.parameters())
    share = 100 * sum(layer.latent().numel() for layer in layers) / total
    kept: dict[str, list[str]] = {}
    for name, m, _, layer, reason in rows:
        if layer is None:
            kept.setdefault(reason if reason != "no rule for this class" else _plain(m).__name__, []).append(name)
    kinds = _shortened(sorted({layer.quantizer for layer in layers}))
    line = f"binarize_: {len(layers)} layers, {share:.1f} % of {total:,} parameters, are binary ({kinds}"
    scaled = sum(layer.scale != 1 for layer in layers)
    line += f"; {scaled} scaled by √(2/fan-in))" if scaled else ")"
    unquantized = [layer for layer in layers if layer.act == "none"]
    if 0 < len(unquantized) < len(layers):
        line += f"; the inputs of {len(unquantized)} of them, in attention, keep full precision"
    return line + "".join(f"; {reason or 'not chosen'}: {_shortened(names)}" for reason, names in kept.items())


def summary(model: nn.Module, example=None):
    """A table (rich) with a row for each matrix or kernel: weights, memory, and whether it is binary or why not.

    With `example` (see `binarize_`; a batch of one) the table also has the multiply-accumulate operations (MACs). Where
    the inputs are binary as well they are bit operations, XNOR and popcount. Layers whose weights are read, not called,
    have no count.

    print it with rich.print(summary(model)).
    """
    from rich.table import Table

    counts = _count_macs(model, example) if example is not None else {}
    table = Table(title=f"{_plain(model).__name__}: binary layers", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for column in ("weights", "MACs", "1-bit MACs", "kB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("binary, or why not", overflow="fold")
    rows, rest = [], sum(p.numel() * p.element_size() for p in model.parameters())
    others = sum(p.numel() for p in model.parameters())
    for name, _, p, layer, reason in _rows(model):
        size = p.numel() / 8 if layer is not None else p.numel() * p.element_size()
        macs, bits = counts.get(name), layer is not None and layer.act != "none"
        state = reason or "not chosen"
        if layer is not None:
            state = f"[green]binary[/], {layer.quantizer}" + (f", inputs {layer.act}" if bits else "")
        rows.append([name, p.numel(), macs, macs if bits else 0, size, state])
        others, rest = others - p.numel(), rest - p.numel() * p.element_size()
    rows.append(["biases, norms and others", others, 0, 0, rest, "full precision"])
    binary = sum(layer.latent().numel() for layer in binary_layers(model))
    share = f"{100 * binary / max(1, sum(row[1] for row in rows)):.1f} % of the weights are binary"
    rows.append(["in all", *[sum(row[i] or 0 for row in rows) for i in (1, 2, 3, 4)], share])
    for name, weights, macs, bits, size, state in rows:
        cells = [f"{weights:,}", f"{macs:,}" if macs else "–", f"{bits:,}" if bits else "–", f"{size / 1000:,.1f}"]
        table.add_row(name, *cells, state, style="bold" if name == "in all" else None)
    if not counts:
        table.columns = [c for c in table.columns if "MACs" not in c.header]
    return table


def _count_macs(model: nn.Module, example) -> dict[str, int]:
    """The multiply-accumulate operations of the layers that model(example) calls, by name."""
    counts, names = {}, {(m, key): name for name, (m, key) in _weights(model).items()}

    def count(m: nn.Module, args: tuple, kwargs: dict, y) -> None:
        inputs = [*args, *kwargs.values()]
        if isinstance(m, nn.MultiheadAttention):
            query, key, value = [t.numel() for t in inputs[:3]]
            embed = m.embed_dim
            each = {"q": query, "k": key, "v": value, "in": query + key + value, "out": y[0].numel()}
            found = {f"{kind}_proj_weight": n * embed for kind, n in each.items()}
            found = {names[m, k]: n for k, n in found.items() if (m, k) in names} | {
                names[m.out_proj, "weight"]: found["out_proj_weight"]
            }
        elif isinstance(m, nn.modules.conv._ConvNd) and not _has_inputs_first(m):
            found = {names[m, "weight"]: y.numel() * math.prod(m.kernel_size) * m.in_channels // m.groups}
        else:  # each input meets one row of the weight
            outputs = m.out_features if isinstance(m, nn.Linear) else m._parameters["weight"][0].numel()
            found = {names[m, "weight"]: inputs[0].numel() * outputs}
        for name, n in found.items():
            counts[name] = counts.get(name, 0) + n

    hooks = [m.register_forward_hook(count, with_kwargs=True) for m in {m for m, _ in names}]
    try:
        with _trial(model), torch.no_grad():
            _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# ResNets. The module names are those of torchvision: conv1, bn1, layer1.0.conv1, ..., downsample.0, fc.
#
# A block is [B, C_in, H, W] -> [B, C_out, H/stride, W/stride]. The papers' blocks differ in where the BatchNorms and
# nonlinearities stand and in the shortcut where the shape changes. Parameters are in the order of the authors' codes.

Nonlinearity = Callable[[int], nn.Module]  # number of channels -> module
Shortcut = Callable[[int, int, int], nn.Module]  # C_in, C_out, stride -> module, where the shape changes


def binary_projection(c_in: int, c_out: int, stride: int) -> nn.Module:
    """A 1×1 convolution, which `binarize_` makes binary, and a BatchNorm."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


def float_projection(c_in: int, c_out: int, stride: int) -> nn.Module:
    """A 1×1 convolution in full precision and a BatchNorm."""
    return nn.Sequential(FloatConv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


def pooled_projection(c_in: int, c_out: int, stride: int) -> nn.Module:
    """A 1×1 convolution of stride 1 in full precision, a BatchNorm and an average pool."""
    pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(FloatConv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), pool)


class ZeroPadded(nn.Module):
    """A shortcut without parameters: every `stride`-th pixel, and channels of zeros, one half before, one half behind.

    x [B, C_in, H, W] -> [B, C_out, H/stride, W/stride]. He et al., CVPR 2016, option A, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride, self.before = stride, (c_out - c_in) // 2
        self.behind = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind))


def make_shortcut(shortcut: Shortcut, c_in: int, c_out: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 and c_in == c_out else shortcut(c_in, c_out, stride)


class BasicBlock(nn.Module):
    """The block of a ResNet, with one shortcut around both convolutions.

        y = relu(bn1(conv1(x)))
        output = relu(bn2(conv2(y)) + shortcut(x))

    He et al., CVPR 2016, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, c_in: int, c_out: int, stride: int, nonlinearity: Nonlinearity, shortcut: Shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nonlinearity(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = make_shortcut(shortcut, c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class IRNetBlock(BasicBlock):
    """IR-Net's block for binary activations, with a shortcut around each convolution.

        y = hardtanh(bn1(conv1(x)) + shortcut(x))
        output = hardtanh(bn2(conv2(y)) + y)

    Qin et al., CVPR 2020, https://arxiv.org/abs/1909.10788
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)) + self.downsample(x))
        return self.relu(self.bn2(self.conv2(x)) + x)


class BiRealBlock(nn.Module):
    """Bi-Real Net's block, with a shortcut around each convolution.

        y = bn1(conv1(x)) + shortcut(x)
        output = bn2(conv2(y)) + y

    The shortcuts carry full-precision values past the binary activations. With a nonlinearity, it stands between the
    convolution and its BatchNorm, and each convolution has its own. Bi-Real Net has none besides the sign, whose
    gradient it approximates by a piecewise linear function; `sign_activation` has the gradient of the hard tanh.

    Liu et al., ECCV 2018, https://arxiv.org/abs/1808.00278
    """

    def __init__(self, c_in: int, c_out: int, stride: int, nonlinearity: Nonlinearity, shortcut: Shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.relu1, self.bn1 = nonlinearity(c_out), nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.relu2, self.bn2 = nonlinearity(c_out), nn.BatchNorm2d(c_out)
        self.downsample = make_shortcut(shortcut, c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.relu1(self.conv1(x))) + self.downsample(x)
        return self.bn2(self.relu2(self.conv2(x))) + x


class EqualBitsBlock(BasicBlock):
    """Equal Bits' block, with a shortcut around each convolution and one PReLU, which is used twice.

        y = bn1(prelu(conv1(x))) + shortcut(x)
        output = bn2(prelu(conv2(y))) + y

    Li et al., AAAI 2022, https://arxiv.org/abs/2112.03406
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.relu(self.conv1(x))) + self.downsample(x)
        return self.bn2(self.relu(self.conv2(x))) + x


class SiBNNBlock(nn.Module):
    """Si-BNN's block: a BatchNorm before each binary activation and one after each convolution.

        y = bn2(conv1(bn1(x))) + shortcut(x)
        output = bn4(conv2(bn3(y))) + y

    The binary activation is part of the convolution. With full-precision activations a ReLU takes its place.

    Wang et al., AAAI 2020, https://doi.org/10.1609/aaai.v34i07.6900
    """

    def __init__(self, c_in: int, c_out: int, stride: int, nonlinearity: Nonlinearity, shortcut: Shortcut):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(c_in), nonlinearity(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.bn3, self.relu2 = nn.BatchNorm2d(c_out), nonlinearity(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(c_out)
        self.downsample = make_shortcut(shortcut, c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv1(self.relu1(self.bn1(x)))) + self.downsample(x)
        return self.bn4(self.conv2(self.relu2(self.bn3(x)))) + x


class ResNet(nn.Module):
    """A ResNet: x [B, in_channels, H, W] -> logits [B, num_classes].

    blocks, widths: number of blocks and of channels in each stage. Every stage after the first halves the resolution.
    stem: 'cifar' is a 3×3 convolution; 'imagenet' is a 7×7 convolution of stride 2 and a max pool.
    block, nonlinearity, shortcut: the class of the blocks, and what it is given.
    stem_nonlinearity: behind the stem's BatchNorm, or before it with nonlinearity_first.
    last_nonlinearity: before the average pool.
    norm_fc: whether a BatchNorm1d precedes the classifier. fc_nonlinearity: behind it.
    """

    def __init__(
        self,
        blocks: list[int],
        widths: list[int],
        num_classes: int,
        in_channels: int,
        *,
        stem: str,
        block: type[nn.Module],
        nonlinearity: Nonlinearity,
        shortcut: Shortcut,
        stem_nonlinearity: Nonlinearity,
        nonlinearity_first: bool = False,
        last_nonlinearity: Nonlinearity,
        norm_fc: bool = False,
        fc_nonlinearity: Nonlinearity,
    ):
        super().__init__()
        if stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = stem_nonlinearity(widths[0])
        self.nonlinearity_first = nonlinearity_first
        c_in = widths[0]
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (name, depth, c_out) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(block(c_in, c_out, 2 if i > 0 and j == 0 else 1, nonlinearity, shortcut))
                c_in = c_out
            self.add_module(name, stage)
        self.relu_last = last_nonlinearity(c_in)
        self.bn_fc = nn.BatchNorm1d(c_in) if norm_fc else nn.Identity()
        self.relu_fc = fc_nonlinearity(c_in)
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(self.relu(x)) if self.nonlinearity_first else self.relu(self.bn1(x))
        x = self.maxpool(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        x = self.relu_last(x).mean(dim=(2, 3))
        return self.fc(self.relu_fc(self.bn_fc(x)))


# n blocks in each of three stages make 6n + 2 layers. resnet8 is for laptops and small images.
CIFAR_RESNETS = {f"resnet{6 * n + 2}": n for n in (1, 3, 5, 7, 9, 18)}
IMAGENET_RESNETS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}


# ---------------------------------------------------------------------------------------------------------------------
# Networks without shortcuts.


class PlainNet(nn.Module):
    """Convolutions, then fully connected layers: x [B, in_channels, H, W] -> logits [B, num_classes].

    features: the layers in order. An integer C is a 3×3 convolution to C channels, (C, k, stride, padding) a k×k
        convolution, 'M' a 2×2 and 'P' a 3×3 max pool of stride 2. The modules of each convolution are: convolution,
        pool if one follows, BatchNorm if `norm`, nonlinearity. The pool comes before the quantizer of the next layer,
        because the maximum of several signs is nearly always +1.
    side: the feature maps are average-pooled to side × side before the fully connected layers.
    hidden: widths of the fully connected layers before the classifier.
    norm: whether a BatchNorm follows each layer; without it the layers have a bias.
    """

    def __init__(
        self,
        features: list,
        side: int,
        hidden: list[int],
        norm: bool,
        num_classes: int,
        in_channels: int,
        nonlinearity: Nonlinearity,
    ):
        super().__init__()
        # ceil_mode keeps at least one pixel of small images.
        pools = {"M": lambda: nn.MaxPool2d(2, ceil_mode=True), "P": lambda: nn.MaxPool2d(3, 2, ceil_mode=True)}
        self.features, self.classifier = nn.Sequential(), nn.Sequential()
        channels = in_channels
        for i, feature in enumerate(features):
            if feature in pools:
                continue
            width, k, stride, padding = feature if isinstance(feature, tuple) else (feature, 3, 1, 1)
            self.features.append(nn.Conv2d(channels, width, k, stride, padding, bias=not norm))
            if i + 1 < len(features) and features[i + 1] in pools:
                self.features.append(pools[features[i + 1]]())
            if norm:
                self.features.append(nn.BatchNorm2d(width))
            self.features.append(nonlinearity(width))
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(side)
        inputs = channels * side * side
        for width in hidden:
            self.classifier.append(nn.Linear(inputs, width, bias=not norm))
            if norm:
                self.classifier.append(nn.BatchNorm1d(width))
            self.classifier.append(nonlinearity(width))
            inputs = width
        self.classifier.append(nn.Linear(inputs, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
ALEXNET = [(96, 11, 4, 2), "P", (256, 5, 1, 2), "P", 384, 384, 256, "P"]
PLAIN_NETS = {  # features, side, hidden, norm
    "lenet": ([(32, 5, 1, 2), "M", (64, 5, 1, 2), "M"], 7, [512], True),  # MNIST
    "vgg-small": ([128, 128, "M", 256, 256, "M", 512, 512, "M"], 4, [], True),  # CIFAR
    "vgg16": (VGG16, 1, [], True),
    "alexnet": (ALEXNET, 6, [4096, 4096], True),  # ImageNet
    # CIFAR networks without normalisation, used in Equal Bits. From Frankle and Carbin, ICLR 2019,
    # https://arxiv.org/abs/1803.03635
    "conv2": ([64, 64, "M"], 16, [256, 256], False),
    "conv4": ([64, 64, "M", 128, 128, "M"], 8, [256, 256], False),
    "conv6": ([64, 64, "M", 128, 128, "M", 256, 256, "M"], 4, [256, 256], False),
    "conv8": ([64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M"], 2, [256, 256], False),
}

# ---------------------------------------------------------------------------------------------------------------------
# Networks by name.

UNNORMALISED = [name for name, (*_, norm) in PLAIN_NETS.items() if not norm]
BIREAL_NETS = [f"birealnet{depth}{prelu}" for depth in (8, 18, 20, 34) for prelu in ("", "-prelu")]
METAQUANT_NETS = [f"{name}-metaquant" for name in (*CIFAR_RESNETS, *IMAGENET_RESNETS)]
IRNET_NETS = ["resnet8-irnet", "resnet20-irnet"]
SIBNN_NETS = [f"resnet{depth}-sibnn" for depth in (8, 18, 20, 34)]
EQUALBITS_NETS = [f"resnet{depth}-equalbits" for depth in (8, 18, 20, 34)]
RESNETS = [*CIFAR_RESNETS, *IMAGENET_RESNETS, *METAQUANT_NETS, *IRNET_NETS, *SIBNN_NETS, *EQUALBITS_NETS, *BIREAL_NETS]
ARCHS = [*RESNETS, *PLAIN_NETS]
ARCHS_IN_SHORT = (  # for messages
    f"{', '.join([*CIFAR_RESNETS, *IMAGENET_RESNETS, *BIREAL_NETS[::2], *PLAIN_NETS])}; "
    "resnets also with -metaquant, -irnet, -sibnn or -equalbits, birealnets with -prelu"
)
MULTI_SHORTCUT_NETS = [*IRNET_NETS, *SIBNN_NETS, *EQUALBITS_NETS, *BIREAL_NETS]  # a shortcut around each convolution


def relu(channels: int) -> nn.Module:
    return nn.ReLU(inplace=True)


def hardtanh(channels: int) -> nn.Module:
    return nn.Hardtanh(inplace=True)


def no_nonlinearity(channels: int) -> nn.Module:
    return nn.Identity()


# The nonlinearity between the layers, by activation quantizer. The sign of a ReLU's output is always +1, so networks
# with sign activations use the hard tanh. Si-BNN's step already is a nonlinearity.
NONLINEARITIES = {"none": relu, "sign": hardtanh, "si": no_nonlinearity}


def resnet_design(arch: str, act: str, stem: str) -> dict:
    """What distinguishes the paper's ResNet of that name from others: keyword arguments of ResNet."""
    nonlinearity = NONLINEARITIES[act]
    design = dict(block=BasicBlock, nonlinearity=nonlinearity, shortcut=binary_projection)
    design |= dict(stem_nonlinearity=nonlinearity, last_nonlinearity=no_nonlinearity, fc_nonlinearity=no_nonlinearity)
    if arch in CIFAR_RESNETS:
        design |= dict(norm_fc=True)
    elif arch in IMAGENET_RESNETS:
        design |= dict(norm_fc=True, shortcut=float_projection)
    elif arch in IRNET_NETS:
        design |= dict(norm_fc=True, shortcut=ZeroPadded)
        if act == "none":
            design |= dict(stem_nonlinearity=no_nonlinearity, fc_nonlinearity=relu)
        else:
            design |= dict(block=IRNetBlock)
    elif arch in SIBNN_NETS:
        nonlinearity = relu if act == "none" else no_nonlinearity
        design |= dict(block=SiBNNBlock, nonlinearity=nonlinearity, shortcut=pooled_projection)
        design |= dict(stem_nonlinearity=no_nonlinearity, last_nonlinearity=relu)
    elif arch in EQUALBITS_NETS:
        design |= dict(block=EqualBitsBlock, nonlinearity=nn.PReLU, stem_nonlinearity=nn.PReLU)
        if stem == "cifar":
            design |= dict(shortcut=float_projection)
        else:
            design |= dict(shortcut=pooled_projection, nonlinearity_first=True)
    elif arch in BIREAL_NETS:
        nonlinearity = nn.PReLU if arch.endswith("-prelu") else no_nonlinearity if act == "sign" else nonlinearity
        design |= dict(block=BiRealBlock, nonlinearity=nonlinearity, shortcut=pooled_projection)
        design |= dict(stem_nonlinearity=nonlinearity)
    return design


def build(
    arch: str,
    num_classes: int,
    quantizer: str = "dorefa",
    act: str = "none",
    binarize_all: bool = False,
    in_channels: int = 3,
    image_size: int | None = None,
) -> nn.Module:
    """Build and initialise a network: x [B, in_channels, H, W] -> logits [B, num_classes].

    arch: one of ARCHS.
        resnet8/20/32/44/56/110: FSG's CIFAR ResNets of 16, 32 and 64 channels, with a BatchNorm1d before the
            classifier and binary 1×1 convolutions in the shortcuts.
        resnet18/34: FSG's ResNets of 64 to 512 channels, with a BatchNorm1d before the classifier and full-precision
            1×1 convolutions in the shortcuts.
        resnet8/20/32/44/56/110-metaquant: MetaQuant's CIFAR ResNets, without the BatchNorm1d and otherwise like FSG's.
        resnet18/34-metaquant: the same for 64 to 512 channels, for which MetaQuant's code has no network.
        resnet8/20-irnet: IR-Net's. With binary activations (W1A1) it has a shortcut around each convolution, with
            act 'none' (W1A32) one around two. The shortcuts have no parameters.
        resnet8/20-sibnn and resnet18/34-sibnn: Si-BNN's, see SiBNNBlock.
        resnet8/20-equalbits and resnet18/34-equalbits: Equal Bits', see EqualBitsBlock.
        birealnet8/20 and birealnet18/34: Bi-Real Net's. The suffix -prelu selects PReLU as nonlinearity.
        lenet, vgg-small, vgg16, alexnet, conv2/4/6/8: networks without shortcuts.
    quantizer, act: see `binarize_`. quantizer 'none' gives the full-precision network of the same state dict.
    binarize_all: whether the first convolution and the classifier become binary too, as in MetaQuant and in FSG's
        released code.
    image_size: height and width of the images in pixels. Networks of 18 and 34 layers start with a 3×3 convolution if
        it is at most 96, else with a 7×7 convolution and a max pool (ImageNet's stem). None means ImageNet's stem.

    The weights start as in the authors' codes, see `initialise`. conv2/4/6/8 have no normalisation, so their binary
    weights are multiplied by `he_scale`. 'bwn-f' and 'sibnn' have a scale of their own and need none.
    Raises ModelError for an unknown name, and for AlexNet on images of less than 63 pixels.
    """
    if arch not in ARCHS:
        raise ModelError(f"no network is called {arch!r}: use one of {ARCHS_IN_SHORT}")
    if act not in NONLINEARITIES:
        raise ModelError(f"no activation is called {act!r}: use one of {', '.join(NONLINEARITIES)}")
    if arch == "alexnet" and image_size and image_size < 63:
        raise ModelError(f"alexnet wants images of at least 63 pixels a side; these have {image_size}: use vgg-small")
    if arch in PLAIN_NETS:
        features, side, hidden, norm = PLAIN_NETS[arch]
        net = PlainNet(features, side, hidden, norm, num_classes, in_channels, NONLINEARITIES[act])
    else:
        resnet = arch.replace("bireal", "res").split("-")[0]
        if resnet in CIFAR_RESNETS:
            blocks, widths, stem = [CIFAR_RESNETS[resnet]] * 3, [16, 32, 64], "cifar"
        else:
            blocks, widths = IMAGENET_RESNETS[resnet], [64, 128, 256, 512]
            stem = "cifar" if image_size and image_size <= 96 else "imagenet"
        net = ResNet(blocks, widths, num_classes, in_channels, stem=stem, **resnet_design(arch, act, stem))
    initialise(net, arch)
    binarize_(net, quantizer, act, first=binarize_all, last=binarize_all, scale=1.0, quiet=True)
    if arch in UNNORMALISED and quantizer not in ("bwn-f", "bwn-l", "sibnn", "identity"):
        for layer in binary_layers(net):
            layer.scale = he_scale(layer)
    return net


@torch.no_grad()
def initialise(net: nn.Module, arch: str) -> None:
    """Draw the weights of the convolutions and of the classifier. n is the number of weights of a filter.

        Equal Bits      PyTorch's default, uniform within ±1/√n
        Si-BNN          normal, standard deviation 1/n
        IR-Net          normal, standard deviation √(2/n)
        others          convolutions: normal, standard deviation √(2/fan_out); classifier: PyTorch's default

    Biases, BatchNorms and PReLUs keep PyTorch's default.
    """
    for m in net.modules():
        if arch in EQUALBITS_NETS or not isinstance(m, nn.Conv2d | nn.Linear):
            continue
        if arch in SIBNN_NETS:
            m.weight.normal_(std=1 / m.weight[0].numel())
        elif arch in IRNET_NETS:
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def he_scale(layer: nn.Module) -> float:
    """√2/√fan_in. Signs times this keep the variance through layers followed by ReLUs.

    He et al., ICCV 2015, https://arxiv.org/abs/1502.01852
    """
    return math.sqrt(2 / layer.weight[0].numel())


@torch.no_grad()
def sign_bits(layers: list[nn.Module]) -> Tensor:
    """The signs of all N binary weights, [N] bool, True for +1, in the order of `layers`. N may be 0."""
    return torch.cat([(layer.binary_weight() > 0).flatten() for layer in layers]) if layers else torch.empty(0).bool()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the layers of a network: weights, memory, MACs.")
    parser.add_argument("arch", help=f"one of {ARCHS_IN_SHORT}")
    parser.add_argument("--quantizer", default="dorefa", help="one of WEIGHT_QUANTIZERS, or none (default: dorefa)")
    parser.add_argument("--act", default="none", help="inputs of the binary layers: none, sign, si (default: none)")
    parser.add_argument("--binarize-all", action="store_true", help="the first and the last layer are binary too")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--in-channels", type=int, default=3)
    parser.add_argument("--image-size", type=int, help="pixels a side (default: 32; 224 for ImageNet's networks)")
    args = parser.parse_args(argv)
    is_large = args.arch == "alexnet" or any(depth in args.arch for depth in ("18", "34"))
    size = args.image_size or (224 if is_large else 32)
    try:
        with torch.device("meta"):
            net = build(
                *(args.arch, args.num_classes, args.quantizer, args.act, args.binarize_all, args.in_channels, size)
            )
            table = summary(net, torch.empty(1, args.in_channels, size, size))
    except ModelError as e:
        sys.exit(f"{e}")
    import rich

    table.title = f"{args.arch}, one image of {size}×{size} pixels"
    rich.print(table)


if __name__ == "__main__":
    main()
