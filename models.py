"""Binary layers, the networks of the papers, and `binarize_()`, which makes any network binary in place.

    model = build("resnet20", num_classes=10)                     # a CIFAR ResNet with binary weights
    model = binarize_(my_network, quantizer="dorefa")             # or your own network
    for layer in binary_layers(model): print(layer.weight.shape)  # the layers that FSG(layers) in hypernet.py takes
    rich.print(summary(model))                                    # what is binary, what is not and why

`python models.py resnet20` prints such a table of a network of the papers.

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
# Many networks do not call their layers: Swin, BEiT and the fast path of nn.TransformerEncoderLayer pass `layer.weight`
# to a function. So `weight` is a property. It is W for optimizers and for everyone else outside of a pass through the
# network, and Ŵ within: from the beginning to the end of `forward` of any module that contains binary layers (_Scoped),
# and in the backward pass, in which checkpointing repeats parts of the forward pass. This needs neither an example
# input nor a list of such networks. With torch.nn.utils.parametrize, `layer.weight` would be Ŵ for optimizers too, and
# the names in the state dict would change.


class _ForwardPasses(threading.local):
    """depth: how many calls of `forward` of modules with binary layers are under way in this thread."""

    def __init__(self):
        self.depth = 0


_passes = _ForwardPasses()


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
    leader: the layer with which this one shares its weight, or None. The leader's settings give Ŵ for both.
    With act 'si' the layer has the parameters theta and delta, [C_in, 1, 1] or [F_in], and the constant rho: see
    `step_activation`.
    """

    quantizer: str
    act: str
    options: dict = {}  # noqa: RUF012 (assigned to a layer, never modified)
    unit = scale = 1.0
    rho = 0.3
    leader = None
    layer_name = "a binary layer"  # in the network, for messages
    calls_itself = False  # whether the layer's own forward is under way
    saw_input = False

    def latent(self) -> Tensor:
        """W, also within a forward or backward pass."""
        w = self._parameters.get("weight", self.__dict__.get("weight"))
        if w is None:
            raise AttributeError("weight")
        return w

    @property
    def weight(self) -> Tensor:
        """W, or Ŵ within a forward or backward pass."""
        if not _passes.depth and torch._C._current_graph_task_id() == -1:
            return self.latent()
        if self.act != "none" and not self.calls_itself:
            raise ModelError(
                f"the network reads the weight of {self.layer_name} without calling the layer, which therefore "
                f"cannot quantize its input: use act='none', or skip=[{self.layer_name!r}]"
            )
        return self.binary_weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:  # nn.DataParallel sets tensors in its copies; parameters do not come here
        self.__dict__["weight"] = value

    def binary_weight(self) -> Tensor:
        """Ŵ, the weight that the layer computes with. Same shape as `weight`."""
        if self.leader is not None:
            return self.leader.binary_weight()
        w, groups = self.latent() if self.unit == 1 else self.latent() / self.unit, getattr(self, "groups", 1)
        by_input = has_inputs_first(self)  # quantizers take [C_out, ...]
        w = rearrange(w, "(g i) o ... -> (g o) i ...", g=groups) if by_input else w
        w = WEIGHT_QUANTIZERS[self.quantizer](w, **self.options)
        w = rearrange(w, "(g o) i ... -> (g i) o ...", g=groups) if by_input else w
        return w if self.scale == 1 else w * self.scale

    def binary_input(self, x: Tensor) -> Tensor:
        """The quantized input. Same shape as x; x itself with act 'none'."""
        if self.act == "si":
            return step_activation(x, self.theta, self.delta, self.rho)
        if self.act == "sign" and not (torch.compiler.is_compiling() or x.is_meta or self.saw_input):
            self.saw_input = True
            if x.numel() >= 64 and bool((x >= 0).all()):
                warnings.warn(
                    f"all inputs of {self.layer_name} are ≥ 0, so all their signs are +1: replace a ReLU in front of "
                    "it by nn.Hardtanh, nn.PReLU or nn.Identity",
                    stacklevel=2,
                )
        return ACTIVATION_QUANTIZERS[self.act](x)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The forward of the layer's own class, in which `weight` is Ŵ."""
        x = self.binary_input(x)
        self.calls_itself, _passes.depth = True, _passes.depth + 1
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.calls_itself, _passes.depth = False, _passes.depth - 1

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"quantizer={self.quantizer}, act={self.act}"]))


class _Summing(_Binary):
    """nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d, which sum exactly in eval mode."""

    def per_channel(self, v: Tensor) -> Tensor:
        """One value per channel, [C], in a shape that broadcasts with the layer's output."""
        return v.view(-1, *[1] * (self.latent().dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        """The convolution or matrix product of the binary input with Ŵ.

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
        return (outputs if self.bias is None else outputs + self.per_channel(self.bias)).to(w.dtype)


class BinaryConv2d(_Summing, nn.Conv2d):
    """nn.Conv2d with binary weights: x [B, C_in, H, W] -> [B, C_out, H', W']."""

    plain = nn.Conv2d


class BinaryLinear(_Summing, nn.Linear):
    """nn.Linear with binary weights: x [..., F_in] -> [..., F_out]."""

    plain = nn.Linear


class FloatConv2d(nn.Conv2d):
    """A convolution that `binarize_` leaves in full precision."""


class Projection(_Binary, nn.Module):
    """A projection of the inputs of an nn.MultiheadAttention, as a layer: `weight` is the attention's parameter.

    It is no submodule of the attention, so the names in the state dict stay as they are.
    """

    def __init__(self, attention: nn.MultiheadAttention, parameter: str):
        super().__init__()
        self.__dict__.update(attention=attention, parameter=parameter)  # nn.Module would register the attention

    def latent(self) -> Tensor:
        return self.attention._parameters[self.parameter]

    def register_parameter(self, name: str, value: nn.Parameter | None) -> None:
        """`projection.weight = value` sets the attention's parameter."""
        self.attention.register_parameter(self.parameter, value)


PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class _Attention(_Scoped):
    """Mixed into nn.MultiheadAttention. projections: its binary parameters, as layers."""

    projections: dict[str, Projection] = {}  # noqa: RUF012 (assigned to an attention, never modified)

    def weight_of(self, name: str) -> Tensor | None:
        return self.projections[name].weight if name in self.projections else self._parameters.get(name)

    in_proj_weight = property(lambda self: self.weight_of("in_proj_weight"))
    q_proj_weight = property(lambda self: self.weight_of("q_proj_weight"))
    k_proj_weight = property(lambda self: self.weight_of("k_proj_weight"))
    v_proj_weight = property(lambda self: self.weight_of("v_proj_weight"))


@functools.cache
def _with(mixin: type, cls: type) -> type:
    """The class `cls` with a mixin. A module changes its behaviour, and stays the same object, by taking this class."""
    if mixin is _Binary and cls in (nn.Conv2d, nn.Linear):
        return BinaryConv2d if cls is nn.Conv2d else BinaryLinear
    if mixin is _Binary and cls.forward in {c.forward for c in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}:
        mixin = _Summing
    fields = {"plain": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    if not issubclass(mixin, _Binary):  # libraries look at the names of the arguments
        fields["forward"] = functools.wraps(cls.forward)(lambda self, *args, **kw: mixin.forward(self, *args, **kw))

    def __reduce_ex__(self, protocol):  # copy and pickle would look for the class by its name
        make, args, *state = super(made, self).__reduce_ex__(protocol)
        return (_new, (mixin, cls), *state) if make is copyreg.__newobj__ else (make, args, *state)

    name = f"Binary{cls.__name__}" if issubclass(mixin, _Binary) else cls.__name__
    made = type(name, (mixin, cls), fields | {"__reduce_ex__": __reduce_ex__})
    return made


def _new(mixin: type, cls: type) -> nn.Module:
    made = _with(mixin, cls)
    return made.__new__(made)


def plain_class(module: nn.Module) -> type:
    """The class of a module without the mixins of this file."""
    return getattr(type(module), "plain", type(module))


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer with a weight [F_in, F_out], which transformers calls Conv1D."""
    w, b = module._parameters.get("weight"), module._parameters.get("bias")
    return plain_class(module).__name__ == "Conv1D" and w is not None and b is not None and w.shape[1:] == b.shape


def has_inputs_first(layer: nn.Module) -> bool:
    """Whether dimension 0 of the weight counts inputs, and dimension 1 the filters of a group."""
    return isinstance(layer, nn.modules.conv._ConvTransposeNd) or is_conv1d(layer)


def named_binary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The binary layers by name, in the order of `model.modules()`.

    A weight that several layers share counts once. The parameter in_proj_weight of an nn.MultiheadAttention a is the
    layer a.in_proj.
    """
    found = {}
    for name, (m, parameter) in _candidates(model).items():
        layer = m if isinstance(m, _Binary) else getattr(m, "projections", {}).get(parameter)
        if layer is not None:
            found.setdefault(id(layer.latent()), (name, layer))
    return dict(found.values())


def binary_layers(model: nn.Module) -> list[nn.Module]:
    """The binary layers of a model, in the order of `model.modules()`. A weight that several share counts once."""
    return list(named_binary_layers(model).values())


def binary_layer_names(model: nn.Module) -> list[str]:
    """The names of the binary layers, in the same order."""
    return list(named_binary_layers(model))


# ---------------------------------------------------------------------------------------------------------------------
# binarize_().

SETTINGS = ("quantizer", "act", "options", "unit", "scale", "rho", "leader")
SCALED = ("bwn-f", "bwn-l", "sibnn", "identity")  # quantizers whose Ŵ is of the size of W
RELAXED = ("bnn", "bnn+", "bnn++", "pc")  # quantizers that compare |W| with 1


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

    Linear layers, convolutions and transposed convolutions in 1, 2 and 3 dimensions, classes derived from them,
    nn.MultiheadAttention (its input projections are the layer `in_proj`) and transformers' Conv1D become binary. All
    else keeps full precision: embeddings, LSTM and GRU, norms, biases, and layers whose weight is computed from other
    parameters (weight_norm, spectral_norm, pruning). One line on stderr says what does; `summary` lists all.

    quantizer: one of WEIGHT_QUANTIZERS (quantizers.py). 'none' makes all layers full-precision layers again. Set the
        arguments of a quantizer afterwards: for layer in binary_layers(model): layer.options = {"ratio": 0.5}.
    act: how the inputs of the binary layers are quantized. 'none' keeps full precision, 'sign' gives −1 and +1, 'si'
        gives 0 and 1 (Si-BNN). With 'sign' do not place a ReLU right before such a layer, since every input would
        become +1; use Hardtanh, PReLU or nothing. 'si' adds the parameters theta and delta to each layer, so create
        the optimizer afterwards. Inside nn.MultiheadAttention, inputs keep full precision.
    first, last: whether the first and the last layer become binary too. By default they keep full precision, as in
        most papers. Without `example`, the first is that in the order of `model.modules()`, unless an embedding comes
        before; the last are timm's `get_classifier()`, transformers' `get_output_embeddings()`, or the last one in
        that order. With `example` all first and last layers are found in the autograd graph.
    skip: further layers that keep full precision: names of layers or of modules that contain them, or a function of
        the layer's name and its module.
    scale: a constant that multiplies the binary weights. None means `he_scale` for layers that no BatchNorm, GroupNorm
        or InstanceNorm follows, whose outputs would grow from layer to layer. It means 1 for the others, for quantizers
        with a scale of their own, and for the networks of this file, whose papers have none.
    example: an input of the model: a tensor, a tuple of arguments, or a dict of keyword arguments. The model runs on
        it, to find the first and last layers, and to check that its outputs depend on the signs of the latent weights
        alone. Layers that the example does not reach keep full precision.
    quiet: do not print the line.

    The modules stay the same objects with the same parameters. Hooks and optimizers that refer to them keep working.
    Raises ModelError for an unknown name, if there is no layer to make binary, and if the check fails (all layers then
    have full precision).
    """
    if quantizer != "none" and quantizer not in WEIGHT_QUANTIZERS:
        raise ModelError(f"no quantizer is called {quantizer!r}: use one of none, {', '.join(WEIGHT_QUANTIZERS)}")
    if act not in ACTIVATION_QUANTIZERS:
        raise ModelError(f"no activation is called {act!r}: use one of {', '.join(ACTIVATION_QUANTIZERS)}")
    candidates = {} if quantizer == "none" else _candidates(model)
    float_layers = _float_layers(model, candidates, first, last, skip, example)
    chosen = {name: found for name, found in candidates.items() if name not in float_layers}
    if quantizer != "none" and not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(float_layers.items())[:4])
        raise ModelError(f"nothing to binarize: the model has no layer that can become binary ({reasons or 'none'})")
    keep_thresholds = {m for m, _ in chosen.values()} if act == "si" else set()
    for m in model.modules():
        _restore(m, m in keep_thresholds)
    if quantizer == "none":
        return model

    leaders, normalised = {}, _normalised_layers(model)
    for name, (m, parameter) in chosen.items():
        if parameter == "weight":
            layer, layer.__class__ = m, _with(_Binary, type(m))
        else:
            layer = m.__dict__.setdefault("projections", {})[parameter] = Projection(m, parameter)
        layer.layer_name, layer.quantizer = name, quantizer
        # An nn.MultiheadAttention reads the weights of its layers.
        layer.act = "none" if parameter != "weight" or f"{name.rpartition('.')[0]}.in_proj" in candidates else act
        if layer.act == "si" and "theta" not in layer._parameters:
            _add_thresholds(layer)
        is_exempt = quantizer in SCALED or m in normalised or isinstance(model, ResNet | PlainNet)
        layer.scale = scale if scale is not None else 1.0 if is_exempt else he_scale(layer)
        layer.unit = layer.scale if quantizer in RELAXED else 1.0
        leader = leaders.setdefault(id(layer.latent()), layer)
        layer.__dict__["leader"] = None if leader is layer else leader  # nn.Module would register it
    for m in model.modules():
        _let_read(m, act)
    for name, reason in float_layers.items():
        m, parameter = candidates[name]
        m.__dict__.setdefault("why_float", {})[parameter] = reason
    if example is not None and (names := latent_readers(model, example)):
        binarize_(model, "none")
        raise ModelError(
            f"the outputs depend on more than the signs of {_shortened(names)}, because the network reads these "
            f"weights in a way that binarize_ cannot change: leave them in full precision with skip={names[:3]}"
        )
    if not quiet:
        print(describe(model), file=sys.stderr)
    return model


def _candidates(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The layers that can become binary, by name: the module and the name of its parameter."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.conv._ConvNd | nn.Linear) or is_conv1d(m):
            found[name] = m, "weight"
        elif isinstance(m, nn.MultiheadAttention):
            dot = f"{name}." if name else ""
            found |= {dot + p.removesuffix("_weight"): (m, p) for p in PROJECTIONS if m._parameters.get(p) is not None}
    return found


def _float_layers(model: nn.Module, candidates: dict, first: bool, last: bool, skip, example) -> dict[str, str]:
    """The layers that keep full precision, by name, and why."""
    modules = {m for m, _ in candidates.values()}
    names = {id(m): name for name, (m, _) in candidates.items()}
    begin = next((m for m in model.modules() if isinstance(m, nn.Embedding) or m in modules), None)
    firsts, lasts, unused = [] if isinstance(begin, nn.Embedding) else list(candidates)[:1], list(candidates)[-1:], []
    guess = " in module order" if example is None else ""
    for method in ("get_classifier", "get_output_embeddings"):
        heads = getattr(model, method)() if hasattr(model, method) else ()
        heads = heads if isinstance(heads, tuple | list) else [heads]
        known = [names[id(m)] for m in heads if id(m) in names]
        lasts, guess = (known, "") if known else (lasts, guess)
    if example is not None and candidates:
        firsts, lasts, unused = _ends(model, candidates, example)
    if not callable(skip):
        prefixes = [f"{prefix}." for prefix in ([skip] if isinstance(skip, str) else skip)]
        unknown = [p[:-1] for p in prefixes if candidates and not any(f"{name}.".startswith(p) for name in candidates)]
        if unknown:
            raise ModelError(f"skip: no layer is called {unknown[0]!r}; the layers are {_shortened([*candidates], 8)}")
        skip = lambda name, m: f"{name}.".startswith(tuple(prefixes))
    found = {}
    for name, (m, parameter) in candidates.items():
        w = m._parameters.get(parameter)
        attributes = [a for a in (*SETTINGS, "theta", "delta") if hasattr(m, a) and not isinstance(m, _Binary)]
        reasons = {
            "by design": isinstance(m, FloatConv2d),
            "computed from other parameters (undo weight_norm, pruning, … first)": w is None,
            "not reached by the example": name in unused,
            "first": name in firsts and not first,
            f"last{guess}": name in lasts and not last,
            "skipped": skip(name, m),
            "not initialised (run the lazy module first)": isinstance(w, nn.parameter.UninitializedTensorMixin),
            "not floating-point": w is not None and not w.is_floating_point(),
            f"with an own attribute {attributes[:1]}": bool(attributes),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        found |= {name: reason} if reason else {}
    # A parameter that several modules share is binary in all of them or in none.
    binary = {(id(m), parameter) for name, (m, parameter) in candidates.items() if name not in found}
    shared = {id(p) for m in model.modules() for key, p in m._parameters.items() if (id(m), key) not in binary}
    for name, (m, parameter) in candidates.items():
        if name not in found and id(m._parameters[parameter]) in shared:
            found[name] = "shared with a full-precision module"
    return found


def _normalised_layers(model: nn.Module) -> set[nn.Module]:
    """The layers that a BatchNorm, GroupNorm or InstanceNorm of their width follows among the parent's modules."""
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


def _let_read(module: nn.Module, act: str) -> None:
    """Let `weight` be Ŵ within the module's forward, unless it has no binary layers or is known to call them."""
    calls_them = plain_class(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    calls_them |= plain_class(module).__module__ == __name__ or isinstance(module, _Binary)
    if calls_them or not named_binary_layers(module):
        return
    mixin = _Attention if isinstance(module, nn.MultiheadAttention) else _Scoped
    module.__class__ = _with(mixin, type(module))
    if isinstance(module, nn.TransformerEncoderLayer) and act != "none":
        module.fast_path = module.activation_relu_or_gelu
        module.activation_relu_or_gelu = 0  # the fast path does not call the layers, which quantize their inputs


def _restore(module: nn.Module, keep_thresholds: bool) -> None:
    """Undo what `binarize_` did to a module (not to its submodules)."""
    if "fast_path" in module.__dict__:
        module.activation_relu_or_gelu = module.__dict__.pop("fast_path")
    if isinstance(module, _Binary) and "theta" in module._parameters and not keep_thresholds:
        del module.theta, module.delta
    if isinstance(module, _Binary | _Scoped):
        module.__class__ = plain_class(module)
        for key in (*SETTINGS, "layer_name", "calls_itself", "saw_input", "projections"):
            module.__dict__.pop(key, None)
    module.__dict__.pop("why_float", None)


def _add_thresholds(layer: nn.Module) -> None:
    """Give a layer the parameters delta and theta. They come before `weight`, as in Si-BNN's code."""
    weight, bias = layer.weight, layer.bias
    channels = weight.shape[0] if has_inputs_first(layer) else weight.shape[1] * getattr(layer, "groups", 1)
    shape = (channels, *[1] * (weight.dim() - 2))
    del layer.weight, layer.bias  # the order of a module's parameters is the order in which they are set
    layer.delta, layer.theta = nn.Parameter(weight.new_ones(shape)), nn.Parameter(weight.new_zeros(shape))
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)


# ---------------------------------------------------------------------------------------------------------------------
# What an example tells.


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


def _call(model: nn.Module, example) -> list[Tensor]:
    """The floating-point tensors that model(example) returns. example: see `binarize_`."""
    if isinstance(example, dict):
        outputs = model(**example)
    else:
        outputs = model(*example) if isinstance(example, tuple) else model(example)
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def _ends(model: nn.Module, candidates: dict, example) -> tuple[set[str], set[str], set[str]]:
    """The first layers, the last ones, and those that the example does not reach, by the autograd graph.

    A layer is a node of the graph in which something that depends on the input meets something that depends on its
    weight and not on the input. It is first if there is no layer before it, and last if there is none behind it. The
    vectors of an embedding count as input, and nothing is first behind them.
    """
    differentiable = lambda t: isinstance(t, Tensor) and t.is_floating_point()
    example = tree_map(lambda t: t.detach().clone().requires_grad_() if differentiable(t) else t, example)
    inputs = {id(t) for t in tree_leaves(example)}
    outputs = []  # of all modules: what is computed from them may be detached, and they may be modified in place
    hooks = [m.register_forward_hook(lambda m, x, y: outputs.extend(tree_leaves(y))) for m in model.modules()]
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with _trial(model), torch.enable_grad():
            outputs += _call(model, example)
        stack = [t.grad_fn for t in outputs if isinstance(t, Tensor) and t.grad_fn is not None]
    finally:
        for hook in hooks:
            hook.remove()
        for p in frozen:
            p.requires_grad_(False)
    id_of = {name: id(m._parameters.get(key)) for name, (m, key) in candidates.items()}
    weights = set(id_of.values())
    has_embedding = any(isinstance(m, nn.Embedding) for m in model.modules())
    # By node: whether it depends on the input; if not, the weights that it depends on; if so, the weights of the
    # nearest layers at it or before it.
    depends, owned, nearest = {}, {}, {}
    firsts, reached, followed = set(), set(), set()
    while stack:
        node = stack[-1]
        before = [n for n, _ in node.next_functions if n is not None]
        waiting = [n for n in before if n not in depends]
        if node in depends or waiting:
            stack.pop() if node in depends else stack.extend(waiting)
            continue
        variable, is_embedding = id(getattr(node, "variable", None)), "Embedding" in node.name()
        depends[node] = variable in inputs or is_embedding or any(depends[n] for n in before)
        own = {w for n in before if not depends[n] and not is_embedding for w in owned[n]} | {variable} & weights
        passed = {w for n in before if depends[n] for w in nearest[n]}
        owned[node], nearest[node] = own, own or passed
        if depends[node] and own:
            reached |= own
            followed |= passed
            firsts |= own if not passed and not has_embedding else set()
    return tuple({n for n in id_of if id_of[n] in found} for found in (firsts, reached - followed, weights - reached))


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

    def change_outputs(names) -> bool:
        latent = [(layers[name].latent(), layers[name].latent().clone()) for name in names]
        try:
            for w, _ in latent:
                w.mul_(0.5 + torch.rand_like(w))
            after = results()
        finally:
            for w, value in latent:
                w.copy_(value)
        if [t.shape for t in after] != [t.shape for t in before]:
            return True
        return not all(torch.allclose(a, b, 1e-3, 1e-5, equal_nan=True) for a, b in zip(after, before, strict=True))

    try:
        for layer, *_ in settings:
            layer.quantizer, layer.options = "bwn", {}  # Ŵ depends on the signs alone
        before = results()
        return [name for name in layers if change_outputs([name])] if change_outputs(layers) else []
    finally:
        for layer, quantizer, options in settings:
            layer.quantizer, layer.options = quantizer, options


def count_macs(model: nn.Module, example) -> dict[str, int]:
    """The multiply-accumulate operations of the layers that model(example) calls, by name. example: see `binarize_`."""
    names, counts = {(m, key): name for name, (m, key) in _candidates(model).items()}, {}

    def count(m: nn.Module, args: tuple, kwargs: dict, y) -> None:
        x = [t.numel() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if isinstance(m, nn.MultiheadAttention):
            inputs = zip(PROJECTIONS, (sum(x[:3]), *x[:3]), strict=True)
            found = {names[m, key]: n * m.embed_dim for key, n in inputs if (m, key) in names}
            found[names[m.out_proj, "weight"]] = y[0].numel() * m.embed_dim
        else:
            w = m.latent() if isinstance(m, _Binary) else m.weight
            found = {names[m, "weight"]: (x[0] if has_inputs_first(m) else y.numel()) * w[0].numel()}
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
# What is binary.


def _matrices(model: nn.Module) -> list[tuple[str, Tensor, nn.Module | None, str]]:
    """Parameters of two and more dimensions: name, parameter, binary layer or None, why it keeps full precision."""
    candidates, binary, found = _candidates(model), named_binary_layers(model), {}
    names = {id(m._parameters.get(key)): name for name, (m, key) in reversed(candidates.items())}
    whys = {name: m.__dict__.get("why_float", {}).get(key) for name, (m, key) in candidates.items()}
    for prefix, m in model.named_modules():
        for key, p in m._parameters.items():
            if p is None or p.dim() < 2 or id(p) in found or key in ("theta", "delta"):
                continue
            name = names.get(id(p), f"{prefix}.{key}" if prefix else key)
            # Names of the parameters of which a layer's weight is computed begin with the layer's name.
            why = [whys[layer] for layer in whys if whys[layer] and f"{name}.".startswith(f"{layer}.")]
            why = why or [plain_class(m).__name__ if name not in whys else "not chosen"]
            found[id(p)] = name, p, binary.get(name), why[0]
    return list(found.values())


def _shortened(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def describe(model: nn.Module) -> str:
    """One line: how many layers and weights are binary, and what keeps full precision."""
    layers, kept = binary_layers(model), {}
    for name, _, layer, why in _matrices(model):
        if layer is None:
            kept.setdefault(why, []).append(name)
    total, binary = sum(p.numel() for p in model.parameters()), sum(layer.latent().numel() for layer in layers)
    counted = f"{len(layers)} layer{'s' * (len(layers) != 1)} with {100 * binary / max(total, 1):.1f} % of {total:,}"
    line = f"binarize_: {counted} parameters are binary"
    if scaled := sum(layer.scale != 1 for layer in layers):
        line += f", {scaled} of them with a constant scale"
    if 0 < (unquantized := sum(layer.act == "none" for layer in layers)) < len(layers):
        line += f", {unquantized} of them with full-precision inputs"
    kept = "; ".join(f"{_shortened(names)} ({why})" for why, names in kept.items())
    return f"{line}. In full precision: {kept}" if kept else line


def summary(model: nn.Module, example=None):
    """A rich.table.Table of all matrices and kernels: weights, memory, and whether they are binary or why not.

    With `example` (a batch of one; see `binarize_`) it also has the multiply-accumulate operations (MACs). With binary
    inputs and weights they are 1-bit MACs, which are XNOR and popcount. Layers that the model does not call have none.
    """
    from rich.table import Table

    macs, rows = count_macs(model, example) if example is not None else {}, []
    rest, rest_bytes = sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters())
    for name, p, layer, why in _matrices(model):
        is_w1a1 = layer is not None and layer.act != "none"
        size = p.nbytes if layer is None else p.numel() / 8
        state = f"no: {why}" if layer is None else layer.quantizer + f", {layer.act}" * is_w1a1
        rows.append([name, p.numel(), macs.get(name, 0), macs.get(name, 0) * is_w1a1, size, state])
        rest, rest_bytes = rest - p.numel(), rest_bytes - p.nbytes
    rows.append(["all else", rest, 0, 0, rest_bytes, "no: norms, biases, …"])
    binary, total = sum(layer.latent().numel() for layer in binary_layers(model)), sum(row[1] for row in rows)
    sums = [sum(row[i] for row in rows) for i in (1, 2, 3, 4)]
    rows.append(["in all", *sums, f"{100 * binary / max(total, 1):.1f} % binary"])
    table = Table(title=plain_class(model).__name__, title_justify="left")
    table.add_column("layer", overflow="fold")
    headers = ("weights", "MACs", "1-bit MACs", "kB") if macs else ("weights", "kB")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("binary?", overflow="fold")
    for name, weights, count, one_bit, size, state in rows:
        counts = [f"{n / 1e6:,.1f} M" if n > 1e5 else f"{n:,}" for n in (count, one_bit)] if macs else []
        cells = [f"{weights:,}", *counts, f"{size / 1000:,.1f}", state]
        table.add_row(name, *cells, style="bold" if name == "in all" else None)
    return table


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

    fan_in is the number of weights of a filter, divided by the strides in a transposed convolution.
    He et al., ICCV 2015, https://arxiv.org/abs/1502.01852
    """
    fan_in = layer.weight[0].numel()
    if has_inputs_first(layer):
        filters = layer.weight.shape[1] * getattr(layer, "groups", 1)
        fan_in = layer.weight.numel() / filters / math.prod(getattr(layer, "stride", (1,)))
    return math.sqrt(2 / fan_in)


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
