"""Binary layers, and `binarize_()`, which makes any network binary in place.

    model = binarize_(my_network, quantizer="dorefa")             # binary weights; act="sign" for binary inputs too
    for layer in binary_layers(model): print(layer.weight.shape)  # the layers that FSG(layers) in hypernet.py takes
    rich.print(summary(model))                                    # what is binary, what is not and why

Copy with: quantizers.py.
"""

import contextlib
import copy
import copyreg
import functools
import math
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from unittest import mock

import torch
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, per_filter, step_activation


class ModelError(ValueError):
    """The network cannot be built or made binary. The message is one sentence that says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Binary layers. A binary layer computes with Ŵ = Q(W) in place of W. Its parameter `weight` is the latent weight W, so
# optimizers, initialisation and state dicts work as with nn.Conv2d and nn.Linear, and full-precision checkpoints load.
#
# Many networks do not call their layers: Swin, BEiT and the fast path of nn.TransformerEncoderLayer pass `layer.weight`
# to a function. So `weight` is a property. It is Ŵ within a pass through the network, and W outside, for optimizers and
# other code. A pass is a call of a binary layer or of any module that contains one, hooks included (_Scoped). The
# backward pass counts too, because checkpointing repeats parts of the forward pass in it. This needs neither an example
# input nor a list of such networks. With torch.nn.utils.parametrize, `layer.weight` would be Ŵ for optimizers too, and
# the names in the state dict would change.


class _ForwardPasses(threading.local):
    def __init__(self):  # for each thread; torch.compile needs an attribute that is already in the dictionary
        self.depth = 0  # the number of nested calls of modules with binary layers in this thread


_passes = _ForwardPasses()


def _in_pass(function, *args, **kwargs):
    """Call function(*args, **kwargs). In the call, the `weight` of binary layers is Ŵ."""
    _passes.depth += 1
    try:
        return function(*args, **kwargs)
    finally:
        _passes.depth -= 1


class _Called:
    """Mixed into the class of a module. In a call of it, hooks included, the `weight` of binary layers is Ŵ."""

    def __call__(self, *args, **kwargs):
        if getattr(self, "act", "none") in ("sign", "si") and "forward" not in self.__dict__:
            return super().__call__(*args, **kwargs)  # hooks of a layer with binary inputs may read W
        return _in_pass(super().__call__, *args, **kwargs)

    def __init_subclass__(cls):
        if cls.__name__.startswith("Parametrized"):  # torch.nn.utils.parametrize makes it, with another `weight`
            raise ModelError("a parametrization was registered after binarize_(): register it before, in a new network")

    def __prepare_scriptable__(self):
        raise ModelError("torch.jit.script cannot compile binary layers: use torch.jit.trace or torch.export")


class _Scoped(_Called):
    """Mixed into the class of a module that contains binary layers. Its `forward` may be called directly as well."""

    def forward(self, *args, **kwargs):
        return _in_pass(super().forward, *args, **kwargs)


class _Binary(_Called):
    """The base of all binary layers. This class is mixed into the class of the layer.

    quantizer, act: names of a weight quantizer and an activation quantizer (quantizers.py).
    options: keyword arguments of the weight quantizer, such as {"ratio": 0.5}.
    unit, scale: constants, Ŵ = scale · Q(W / unit).
    leader: a layer with which this one shares its weight, or None. Both use the leader's settings.
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
    calls_itself = False  # whether the layer's forward is running
    saw_input = False

    def latent(self) -> Tensor:
        """W, also within a pass. In the copies of nn.DataParallel and in FSDP, it is not a parameter."""
        w = self._parameters.get("weight")
        if w is None and ("weight_orig" in self._parameters or "weight_g" in self._parameters):
            raise ModelError(f"{self.layer_name} got weight_norm or pruning after binarize_(): add it before")
        w = self.__dict__.get("weight") if w is None else w
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
        if not torch.compiler.is_compiling() and torch.fx._symbolic_trace._is_fx_tracing_flag and not get_proxy_mode():
            raise ModelError(f"torch.fx would freeze the bits of {self.layer_name}: trace before binarize_()")
        like = self if self.leader is None else self.leader
        w, groups = self.latent() if like.unit == 1 else self.latent() / like.unit, getattr(like, "groups", 1)
        by_input = has_inputs_first(like)  # quantizers take [C_out, ...]
        w = rearrange(w, "(g i) o ... -> (g o) i ...", g=groups) if by_input else w
        w = WEIGHT_QUANTIZERS[like.quantizer](w, **like.options)
        w = rearrange(w, "(g o) i ... -> (g i) o ...", g=groups) if by_input else w
        return w if like.scale == 1 else w * like.scale

    def binary_input(self, x: Tensor) -> Tensor:
        """The quantized input. Same shape as x; x itself with act 'none'."""
        if self.act == "si":
            return step_activation(x, self.theta, self.delta, self.rho)
        if self.act == "sign" and not (torch.compiler.is_compiling() or x.is_meta or self.saw_input):
            self.saw_input, no_sign_is_minus = True, False
            with contextlib.suppress(RuntimeError):  # a transform of torch.func has no values
                no_sign_is_minus = x.numel() >= 64 and bool((x >= 0).all())
            if no_sign_is_minus:
                warnings.warn(
                    f"all inputs of {self.layer_name} are ≥ 0, so all their signs are +1: replace a ReLU in front of "
                    "it by nn.Hardtanh, nn.PReLU or nn.Identity",
                    stacklevel=2,
                )
        return ACTIVATION_QUANTIZERS[self.act](x)

    def forward(self, *args, **kwargs) -> Tensor:
        """The forward of the layer's original class, in which `weight` is Ŵ."""
        if args:
            args = (self.binary_input(args[0]), *args[1:])
        elif kwargs:
            name = "input" if "input" in kwargs else next(iter(kwargs))
            kwargs[name] = self.binary_input(kwargs[name])
        self.calls_itself = True
        try:
            return _in_pass(super().forward, *args, **kwargs)
        finally:
            self.calls_itself = False

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"quantizer={self.quantizer}, act={self.act}"]))


class _Summing(_Binary):
    """nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d, which sum exactly in eval mode."""

    def forward(self, input: Tensor) -> Tensor:
        """The convolution or matrix product of the binary input with Ŵ.

        In eval mode with binary activations, the layer sums the signs first and multiplies the sums by the scale of
        each filter afterwards. A sum of −1, 0 and +1 is exact in any order of summation, a sum of ±0.0123 is not. So
        the next binary activation sees the same values with any batch size, library and machine, and in every format
        that export.py writes.
        """
        function = F.linear if isinstance(self, nn.Linear) else self._conv_forward
        x, w = self.binary_input(input), self.binary_weight()
        if self.training or self.act == "none":
            return function(x, w, self.bias)
        scale = w.detach().abs().flatten(1).amax(1).clamp_min(torch.finfo(w.dtype).tiny)
        exact = torch.promote_types(w.dtype, torch.float32)  # bfloat16 cannot represent large sums exactly
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            outputs = function(x.to(exact), (w / per_filter(scale, w)).to(exact), None)
        per_channel = (-1, *[1] * (w.dim() - 2))  # this shape broadcasts with the outputs
        outputs = outputs * scale.view(per_channel)
        return (outputs if self.bias is None else outputs + self.bias.view(per_channel)).to(w.dtype)


class FloatConv2d(nn.Conv2d):
    """A convolution that `binarize_` leaves in full precision."""


class Projection(_Binary, nn.Module):
    """A projection of the inputs of an nn.MultiheadAttention, as a layer: `weight` is the attention's parameter.

    It is not a submodule of the attention, so the names in the state dict do not change.
    """

    def __init__(self, attention: nn.MultiheadAttention, parameter: str):
        super().__init__()
        self.__dict__.update(attention=attention, parameter=parameter)  # nn.Module would register the attention

    def latent(self) -> Tensor:
        return self.attention._parameters.get(self.parameter, self.attention.__dict__.get(self.parameter))

    def register_parameter(self, name: str, value: nn.Parameter | None) -> None:
        """`projection.weight = value` sets the attention's parameter."""
        self.attention.register_parameter(self.parameter, value)


PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class _Attention(_Scoped):
    """Mixed into nn.MultiheadAttention. projections: its binary parameters, as layers."""

    projections: dict[str, Projection] = {}  # noqa: RUF012 (assigned to an attention, never modified)

    def weight_of(self, name: str) -> Tensor | None:
        if name in self.projections:
            return self.projections[name].weight
        return self._parameters.get(name, self.__dict__.get(name))

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.projections = {name: copy.copy(projection) for name, projection in self.projections.items()}
        for projection in replica.projections.values():
            projection.__dict__["attention"] = replica
        return replica


def _projection(name: str) -> property:
    def write(self, value: Tensor) -> None:  # nn.DataParallel sets tensors in its copies
        self.__dict__[name] = value

    return property(lambda self: self.weight_of(name), write)


for name in PROJECTIONS:
    setattr(_Attention, name, _projection(name))


@functools.cache
def _with(mixin: type, cls: type) -> type:
    """The class `cls` with a mixin. A module that takes it behaves differently but remains the same object."""
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


BinaryConv2d = _with(_Binary, nn.Conv2d)  # nn.Conv2d with binary weights: x [B, C_in, H, W] -> [B, C_out, H', W']
BinaryLinear = _with(_Binary, nn.Linear)  # nn.Linear with binary weights: x [..., F_in] -> [..., F_out]


def plain_class(module: nn.Module) -> type:
    """The class of a module without the mixins of this file."""
    return getattr(type(module), "plain", type(module))


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer with a weight [F_in, F_out], which transformers calls Conv1D."""
    if plain_class(module).__name__ != "Conv1D":
        return False
    w, b = module._parameters.get("weight"), module._parameters.get("bias")
    return w is not None and b is not None and w.shape[1:] == b.shape


def has_inputs_first(layer: nn.Module) -> bool:
    """Whether dimension 0 of the weight counts inputs, and dimension 1 the filters of a group."""
    return isinstance(layer, nn.modules.conv._ConvTransposeNd) or is_conv1d(layer)


def he_scale(layer: nn.Module) -> float:
    """√2/√fan_in. Signs times this keep the variance through layers followed by ReLUs.

    fan_in is the number of weights of a filter, divided by the strides in a transposed convolution.
    He et al., ICCV 2015, https://arxiv.org/abs/1502.01852
    """
    fan_in = math.prod(layer.weight.shape[1:])
    if has_inputs_first(layer):
        filters = layer.weight.shape[1] * getattr(layer, "groups", 1)
        fan_in = layer.weight.numel() / filters / math.prod(getattr(layer, "stride", (1,)))
    return math.sqrt(2 / max(fan_in, 1))


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


@torch.no_grad()
def weight_signs(layers: list[nn.Module]) -> Tensor:
    """The signs of all N binary weights, [N] int8, in the order of `layers`: −1 or +1, 0 if pruned. N may be 0."""
    parts = [layer.binary_weight().sign().char().flatten() for layer in layers]
    return torch.cat(parts) if parts else torch.empty(0).char()


# ---------------------------------------------------------------------------------------------------------------------
# binarize_().

SETTINGS = ("quantizer", "act", "options", "unit", "scale", "rho", "leader", "layer_name", "calls_itself", "saw_input")
SCALED = ("bwn-f", "bwn-l", "sibnn", "parq", "identity")  # quantizers whose Ŵ has the scale of W
WITH_UNIT = ("bnn", "bnn+", "bnn++", "pc")  # quantizers that compare |W| with 1


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
    nn.MultiheadAttention (its input projections are the layer `in_proj`) and transformers' Conv1D become binary.
    Embeddings, LSTM and GRU, norms, biases, and layers whose weight is computed from other parameters (weight_norm,
    spectral_norm, pruning) keep full precision. One line on stderr says what is binary; `summary` lists all layers.

    quantizer: one of WEIGHT_QUANTIZERS (quantizers.py). 'none' makes all layers full-precision layers again. Set the
        arguments of a quantizer afterwards: for layer in binary_layers(model): layer.options = {"ratio": 0.5}.
    act: how the inputs of the binary layers are quantized. 'none' keeps full precision, 'sign' gives −1 and +1, 'si'
        gives 0 and 1 (Si-BNN). With 'sign' do not place a ReLU right before such a layer, because every input would
        become +1; use Hardtanh, PReLU or nothing. 'si' adds the parameters theta and delta to each layer, so create
        the optimizer afterwards. Inside nn.MultiheadAttention, inputs keep full precision.
    first, last: whether the first and the last layer become binary too. By default they keep full precision, as in
        most papers. Without `example`, the first layer is the first in the order of `model.modules()`; a model that
        begins with an embedding has none. The last layers are timm's `get_classifier()`, transformers'
        `get_output_embeddings()`, or the last layer in that order. With `example`, all first and last layers are found
        in the autograd graph.
    skip: further layers that keep full precision: names of layers or of modules that contain them, or a function of
        the layer's name and its module.
    scale: a constant that multiplies the binary weights. None means the attribute `default_scale` of the model's class,
        which the networks of models.py have. Without it, None means `he_scale` for layers that no BatchNorm, GroupNorm
        or InstanceNorm follows, because their outputs would grow from layer to layer. It means 1 for the other layers,
        and for quantizers that have a scale (SCALED).
    example: an input of the model: a tensor, a tuple of arguments, or a dict of keyword arguments. The model runs on
        it, to find the first and last layers, and to check that its outputs depend on the signs of the latent weights
        alone. Layers that the example does not reach keep full precision.
    quiet: do not print the line.

    The modules and their parameters remain the same objects, so hooks and optimizers that refer to them keep working.
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
    scale = getattr(type(model), "default_scale", None) if scale is None else scale
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
        needs_none = quantizer in SCALED or m in normalised
        layer.scale = scale if scale is not None else 1.0 if needs_none else he_scale(layer)
        layer.unit = he_scale(layer) if quantizer in WITH_UNIT else 1.0
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
            f"weights in a way that binarize_ cannot change: keep them in full precision with skip={names[:3]}"
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
    graphs = [m for m in model.modules() if isinstance(m, torch.fx.GraphModule)]
    read = {(graph, node.target) for graph in graphs for node in graph.graph.nodes if node.op == "get_attr"}
    read = {id(operator.attrgetter(target)(graph)) for graph, target in read}
    found = {}
    for name, (m, parameter) in candidates.items():
        w = m._parameters.get(parameter)
        attributes = [a for a in (*SETTINGS, "theta", "delta") if hasattr(m, a) and not isinstance(m, _Binary)]
        reasons = {
            "by design": isinstance(m, FloatConv2d),
            "read by a graph of torch.fx": id(w) in read,
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
    """Let `weight` be Ŵ in calls of the module, unless it has no binary layers or is known to call them.

    A `forward` with the attribute `calls_layers` calls its layers and does not read their weights (models.py). So do
    containers, and graphs of torch.fx, see `_float_layers`. The class of a graph must not change.
    """
    calls_them = plain_class(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    calls_them = calls_them or hasattr(module.forward, "calls_layers")
    calls_them = calls_them and not (module._forward_hooks or module._forward_pre_hooks)
    calls_them = calls_them or isinstance(module, _Binary | torch.fx.GraphModule | torch.jit.ScriptModule)
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
    own = SETTINGS if isinstance(module, _Binary) else ("projections",) if isinstance(module, _Attention) else ()
    if isinstance(module, _Binary | _Scoped):
        module.__class__ = plain_class(module)
    for key in (*own, "why_float"):
        module.__dict__.pop(key, None)


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
# What a run on an example shows.


@contextlib.contextmanager
def _trial(model: nn.Module, training: bool = False):
    """Let the model run within `with _trial(model)`. At the end, mode, buffers and random numbers are restored."""
    modes, buffers = [(m, m.training) for m in model.modules()], [(b, b.clone()) for b in model.buffers()]
    places = [(m, key, b) for m in model.modules() for key, b in m._buffers.items()]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield model.train(training)
    finally:
        model.train(modes[0][1])  # train() of some modules clears their caches
        for m, mode in modes:
            m.training = mode
        for m, key, b in places:
            m._buffers[key] = b
        with torch.no_grad():
            for b, value in buffers:  # observers of quantization resize theirs
                b.resize_(value.shape).copy_(value)


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
    weight and not on the input. It is first if there is no layer before it, and last if there is none after it. The
    vectors of an embedding count as input, and no layer after them is first.
    """
    differentiable = lambda t: isinstance(t, Tensor) and t.is_floating_point()
    example = tree_map(lambda t: t.detach().clone().requires_grad_() if differentiable(t) else t, example)
    inputs = {id(t) for t in tree_leaves(example)}
    outputs = []  # of all modules, because later operations may detach them or modify them in place
    eager = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    hooks = [m.register_forward_hook(lambda m, x, y: outputs.extend(tree_leaves(y))) for m in eager]
    unchecked = SimpleNamespace(apply=lambda function, preserve_rng_state, *args: function(*args))
    checkpointing = mock.patch.object(torch.utils.checkpoint, "CheckpointFunction", unchecked)  # it hides the graph
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with _trial(model), torch.enable_grad(), checkpointing:
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

    There should be none. The model runs in eval mode with and without gradients and, if it can, in training mode.
    example: see `binarize_`.
    """
    layers = named_binary_layers(model)
    settings = [(layer, layer.quantizer, layer.options, layer.unit, layer.scale) for layer in layers.values()]

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
            # Ŵ depends on the signs alone, and the outputs of untrained networks are finite.
            layer.quantizer, layer.options, layer.unit, layer.scale = "bwn", {}, 1.0, he_scale(layer)
        before = results()
        return [name for name in layers if change_outputs([name])] if change_outputs(layers) else []
    finally:
        for layer, *values in settings:
            layer.quantizer, layer.options, layer.unit, layer.scale = values


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
            # If a layer's weight is computed from other parameters, their names begin with the layer's name.
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
    """A rich.table.Table of all matrices and kernels: weights, memory, and whether they are binary, or why not.

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
    rows.append(["other", rest, 0, 0, rest_bytes, "no: norms, biases, …"])
    binary, total = sum(layer.latent().numel() for layer in binary_layers(model)), sum(row[1] for row in rows)
    sums = [sum(row[i] for row in rows) for i in (1, 2, 3, 4)]
    rows.append(["total", *sums, f"{100 * binary / max(total, 1):.1f} % binary"])
    table = Table(title=plain_class(model).__name__, title_justify="left")
    table.add_column("layer", overflow="fold")
    headers = ("weights", "MACs", "1-bit MACs", "kB") if macs else ("weights", "kB")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("binary?", overflow="fold")
    for name, weights, count, one_bit, size, state in rows:
        counts = [f"{n / 1e6:,.1f} M" if n > 1e5 else f"{n:,}" for n in (count, one_bit)] if macs else []
        cells = [f"{weights:,}", *counts, f"{size / 1000:,.1f}", state]
        table.add_row(name, *cells, style="bold" if name == "total" else None)
    return table
