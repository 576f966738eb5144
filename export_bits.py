r"""Packed bits: a binary network in a .safetensors file with one bit per binary weight.

    save_bits(net, "net.safetensors")                        # any network made with binarize_()
    net = load_bits("net.safetensors", MyBinaryNetwork())    # the same logits, bit for bit

    build = {"arch": "resnet20", "num_classes": 10}          # a network made with models.build(**build)
    save_bits(net, "net.safetensors", build=build)
    net = load_bits("net.safetensors")

The format is .safetensors. For each binary layer L with weights [C_out, C_in, k, k] or [F_out, F_in]:
    L.weight.bits      uint8 [C_out, 8·words]. A row is a filter with n weights in PyTorch's order (C_in, then ky, kx;
                       if layers say "inputs_first", [C_in, C_out, k, k] is transposed in each group before).
                       Weight i is bit i % 8 (0 is the lowest) of byte i // 8: 1 is +1, 0 is −1. A row is padded with 0
                       to words of 64 bits: read as little-endian uint64, weight i is bit i % 64 of word i // 64.
    L.weight.nonzero   In this layout, only if some weights are 0 (pruned): 1 where the weight is not 0.
    L.weight.scale     float32 [C_out]. Ŵ = scale · (±1 or 0), exactly.
All other parameters and buffers have their names in the state dict, in float32 (with `half` in float16) or integers.
The metadata are strings; all but format and checksum are JSON:
    format             bnn-bits-2
    layers             {name: {"type": class, and its constants, such as "stride" or "eps"}} of the modules that
                       contain no others, in the order of the network's definition. Binary layers also have "shape",
                       the weight's, and "act", the quantizer of their input. The input projections of an
                       nn.MultiheadAttention a are the binary layer a.in_proj. A layer with "shares" has the weight of
                       the layer that is named there.
    activations        {act: formula}, for the acts of this file: the function of a layer's input x
    build              the arguments of models.build that make the network, or null for another network
    shape              [C, H, W] of an image, or null
    normalisation      two lists by channel, x = factor · pixel + shift for pixels of 0 to 255, or null
    checksum           SHA-256, as hexadecimal digits, of all other fields, each as the line "name=value\n" (UTF-8, in
                       the alphabetical order of the names), and then of all tensors in alphabetical order, each as the
                       line "name dtype shape\n", such as "fc.bias float32 [10]\n", and its bytes (little-endian)
BatchNorm computes (x − running_mean) / √(running_var + eps) · weight + bias.

Copy with: models.py, binarize.py, quantizers.py, runs.py.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

import models
import runs
from quantizers import WEIGHT_QUANTIZERS
from runs import RunError

# ---------------------------------------------------------------------------------------------------------------------
# A network with constant bits.

# How a binary layer quantizes its input x, by the layer's `act`.
ACTIVATIONS = {"none": "x", "sign": "+1 where x >= 0, else -1", "si": "1 where (x - theta) * delta >= 0, else 0"}


def rows_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or its signs, with a filter in each row: [C_out, n]."""
    if models.has_inputs_first(layer):
        weight = rearrange(weight, "(g i) o ... -> (g o) i ...", g=getattr(layer, "groups", 1))
    return weight.flatten(1)


def from_rows(layer: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of `rows_of`: [C_out, n] -> the shape of the layer's weight."""
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    if not models.has_inputs_first(layer):
        return rows.view(shape)
    rows = rows.view(shape[1] * groups, shape[0] // groups, *shape[2:])
    return rearrange(rows, "(g o) i ... -> (g i) o ...", g=groups)


def freeze(layer: nn.Module, signs: Tensor, scale: Tensor) -> None:
    """Make Ŵ = scale · signs the layer's constant weight, and keep both factors as `signs` and `filter_scale`.

    signs: int8 (−1, 0, +1), [C_out, n]. scale: [C_out], not negative.
    """
    layer.weight.data.copy_(from_rows(layer, signs * scale[:, None]))  # in place: other layers can share it
    layer.weight.requires_grad_(False)
    layer.signs, layer.filter_scale = from_rows(layer, signs), scale
    layer.quantizer, layer.options, layer.unit, layer.scale = "identity", {}, 1.0, 1.0


def factorize(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ŵ [C_out, n] as signs (int8) and the scale of each filter [C_out]. None if Ŵ does not have this form."""
    scale = rows.abs().amax(1)
    signs = torch.where(scale[:, None] == 0, 1, rows.sign()).to(torch.int8)  # a filter of zeros has the scale 0
    return (signs, scale) if torch.equal(signs * scale[:, None], rows) else None


@torch.no_grad()
def frozen(net: nn.Module) -> nn.Module:
    """A copy of a network on the CPU, in float32 and in eval mode, whose binary layers have constant weights.

    Raises RunError if there are no binary layers, and names those whose weights cannot be packed.
    """
    net = getattr(net, "_orig_mod", net)  # torch.compile's wrapper
    net = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
    try:
        net = copy.deepcopy(net).cpu().float().eval()
    except RuntimeError as e:
        raise RunError(
            f"the network cannot be copied ({one_line(e)}): remove weight_norm or spectral_norm, and results of a "
            "forward pass that modules keep"
        ) from None
    layers = models.named_binary_layers(net)
    if not layers:
        raise RunError(
            "this is a full-precision network, which has no bits: use one with binary weights (models.binarize_)"
        )
    others = [name for name, value in net.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise RunError(f"{others[0]} is no tensor, and a file has only tensors: remove its get_extra_state()")
    bad = bad_tensors(net, net.state_dict())
    if bad:
        raise RunError(f"some elements are NaN, infinite or a negative variance in {', '.join(bad)}: use another state")
    factors = {name: factorize(rows_of(layer, layer.binary_weight())) for name, layer in layers.items()}
    relaxed = [f"{name} ({layers[name].quantizer})" for name, found in factors.items() if found is None]
    if relaxed:
        raise RunError(
            f"these weights are not −1, 0 and +1 times one scale per filter: {', '.join(relaxed)}. Give the layers "
            "true signs (layer.quantizer, layer.options = 'bwn', {}), re-estimate the BatchNorms and test the network"
        )
    for name, layer in layers.items():
        freeze(layer, *factors[name])
    return net


def bad_tensors(net: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """The names of tensors of a network with elements that no trained network has.

    A buffer may have infinite elements, as masks of attention have, but not a BatchNorm's statistics.
    """
    masks = {name for name, _ in net.named_buffers() if not name.endswith(("running_mean", "running_var"))}
    return [
        name
        for name, value in tensors.items()
        if value.isnan().any()
        or (value.isinf().any() and name not in masks)
        or (name.endswith("running_var") and (value < 0).any())
    ]


# Attributes of modules, and of binary layers, that have no effect in eval mode, or follow from the tensors' shapes.
NOT_DESCRIBED = {"training", "momentum", "track_running_stats", "inplace", "return_indices", "affine", "transposed"}
NOT_DESCRIBED |= {"in_channels", "out_channels", "in_features", "out_features", "num_features"}
NOT_DESCRIBED_IF_BINARY = NOT_DESCRIBED | {"unit", "scale", "rho", "calls_itself", "saw_input"}
DESCRIBED_TEXTS = {"act", "padding", "padding_mode", "approximate", "mode"}  # other strings could be paths


def describe(net: nn.Module) -> dict[str, dict]:
    """The field `layers` of a file (see the top of this file)."""
    binary, layers = models.named_binary_layers(net), {}
    owners = {id(layer.weight): name for name, layer in binary.items()}
    leaves = {name: m for name, m in net.named_modules() if next(m.children(), None) is None}
    for name, m in (leaves | binary).items():
        fields = layers[name] = {"type": type(m).__name__}
        is_binary = hasattr(m, "binary_weight")
        for key, v in vars(m).items():
            if key.startswith("_") or key in (NOT_DESCRIBED_IF_BINARY if is_binary else NOT_DESCRIBED):
                continue
            are_numbers = all(isinstance(x, int | float) for x in (v if isinstance(v, tuple) else (v,)))
            if are_numbers or (isinstance(v, str) and key in DESCRIBED_TEXTS):
                fields[key] = v
        if is_binary:
            fields["shape"] = list(m.weight.shape)
            if models.has_inputs_first(m):
                fields["inputs_first"] = True
            if name not in binary:
                fields["shares"] = owners[id(m.weight)]
    return json.loads(json.dumps(layers, default=str))  # tuples become lists


def packed_parameters(net: nn.Module) -> set[str]:
    """The names, in the state dict, of the weights of binary layers."""
    packed = {id(layer.weight) for layer in models.binary_layers(net)}
    return {name for name, value in net.state_dict(keep_vars=True).items() if id(value) in packed}


# ---------------------------------------------------------------------------------------------------------------------
# Packed bits: writing.

FORMAT = "bnn-bits-2"
FIELDS = {"format", "layers", "activations", "build", "shape", "normalisation", "checksum"}


def pack(bits: Tensor) -> Tensor:
    """bits [rows, n] bool -> uint8 [rows, 8·⌈n/64⌉]: bit i of a row is bit i % 8 of byte i // 8, padded with 0."""
    rows, n = bits.shape
    padded = np.zeros((rows, math.ceil(n / 64) * 64), dtype=bool)
    padded[:, :n] = bits
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little"))


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: packed [rows, bytes] uint8 with n bits in a row -> [rows, n] bool."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=n, bitorder="little")).bool()


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise RunError("packed bits need safetensors: pip install safetensors") from None
    return safetensors


def save_bits(
    net: nn.Module,
    path: Path | str,
    *,
    build: dict | None = None,
    shape: tuple[int, int, int] | None = None,
    normalisation: list[list[float]] | None = None,
    half: bool = False,
) -> None:
    """Write the packed bits of a network to a .safetensors file in the format that the top of this file describes.

    build: the arguments with which models.build made the network, such as {"arch": "resnet20", "num_classes": 10}.
        With them load_bits(path) needs no network.
    shape: [C, H, W] of an image. normalisation: factors and shifts by channel, x = factor · pixel + shift, for pixels
        of 0 to 255. Both are for programs that read the file.
    half: write what is not binary in float16, except tensors with elements that float16 cannot represent. The logits
        then differ a little. It is refused with binary activations, which amplify the differences.

    Raises RunError if the file cannot be written, if the network has no binary layers, or if the weights of some layers
    (the message names them) are not −1, 0 and +1 times one scale per filter.
    """
    net = frozen(net)
    layers = models.named_binary_layers(net)
    if half and any(layer.act != "none" for layer in layers.values()):
        raise RunError("half precision would change binary activations and so predictions: leave out half (--half)")
    tensors, packed = {}, packed_parameters(net)
    for name, value in net.state_dict().items():
        if name not in packed:
            fits = half and value.is_floating_point() and value.half().isfinite().all()
            tensors[name] = (value.half() if fits else value).clone(memory_format=torch.contiguous_format)
    for name, layer in layers.items():
        rows = rows_of(layer, layer.signs)
        tensors[f"{name}.weight.bits"] = pack(rows > 0)
        tensors[f"{name}.weight.scale"] = layer.filter_scale
        if (rows == 0).any():
            tensors[f"{name}.weight.nonzero"] = pack(rows != 0)
    if build is not None:
        build = BUILD_DEFAULTS | build
        try:
            if describe(build_named(build, "meta")) != describe(net):
                raise ValueError("it makes another network")
        except (TypeError, ValueError) as e:
            raise RunError(f"build does not make this network with models.build ({e}): correct it") from None
    values = {"build": build, "shape": shape, "normalisation": normalisation, "layers": describe(net)}
    values["activations"] = {layer.act: ACTIVATIONS[layer.act] for layer in layers.values()}
    fields = {"format": FORMAT} | {name: json.dumps(value, separators=(",", ":")) for name, value in values.items()}
    fields["checksum"] = checksum(fields, tensors)
    write(path, import_safetensors().torch.save(tensors, fields))


def checksum(fields: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """The field `checksum` of a file (see the top of this file)."""
    digest = hashlib.sha256()
    for name in sorted(fields.keys() - {"checksum"}):
        digest.update(f"{name}={fields[name]}\n".encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode() + array.tobytes())
    return digest.hexdigest()


def write(path: Path | str, contents: bytes) -> None:
    """Write a file. At any moment `path` is the old file or the complete new one.

    Raises RunError if it cannot be written, or if it is a checkpoint, which is never overwritten.
    """
    write_all({path: contents})


def write_all(files: dict[Path | str, bytes]) -> None:
    """Write several files as `write` does. None is replaced before the contents of all are on the disk."""
    with contextlib.ExitStack() as stack:
        for path, contents in files.items():
            path = Path(path)
            if not path.name or os.path.isdir(path):
                raise RunError(f"{path} is a folder: give the name of a file")
            if is_checkpoint(path):
                raise RunError(f"{path} is a checkpoint, which an export would overwrite: give another name (--out)")
            f = stack.enter_context(runs.replacing(path, "wb"))
            f.write(contents)
            f.flush()
            os.fsync(f.fileno())


def is_checkpoint(path: Path) -> bool:
    """Whether a file exists that torch.save has written: a zip archive, or in old versions a pickle."""
    try:
        with open(path, "rb") as f:
            return f.read(8).startswith((b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9c"))
    except OSError:  # it does not exist
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Packed bits: reading. A file can come from anyone. Nothing in it is executed or used as a path or an address. Its
# contents are checked before use: names must be known, sizes must fit the file, and the checksum must be right.

LARGEST = 2**16  # of classes, channels and pixels per side
LONGEST_HEADER = 2**24  # bytes
BUILD_DEFAULTS = {"quantizer": "dorefa", "act": "none", "binarize_all": False, "in_channels": 3, "image_size": None}


def load_bits(path: Path | str, net: nn.Module | None = None) -> nn.Module:
    """The network of packed bits, in eval mode. Its logits are those of the network that was saved, bit for bit.

    net: your network, made in the way of the one that was saved, binarize_() included. Its weights are replaced in
        place, and it is returned. Without it, the file must name a network of models.build (`save_bits` with `build`).

    Raises RunError if the file does not exist, is damaged, is of another kind, or does not fit the network.
    """
    return read_bits(path, net)[0]


@torch.no_grad()
def read_bits(path: Path | str, net: nn.Module | None = None) -> tuple[nn.Module, dict]:
    """`load_bits`, and the file's build, shape and normalisation, each None or what save_bits was given."""
    path = Path(path)
    if not os.path.isfile(path):
        raise RunError(f"there is no file {path}: check its name")
    advice = "export it again" if net is None else "give the network that was saved, or export it again"
    try:
        fields, tensors = read_safetensors(path)
        if not fields.get("format", "").startswith("bnn-bits-"):
            raise RunError(f"{path} is a .safetensors file, but not of packed bits: export the network again")
        if fields["format"] != FORMAT:
            raise RunError(f"{path} has the format of another version: export it again")
        if fields.keys() != FIELDS:
            raise ValueError("its metadata have other fields")
        if fields["checksum"] != checksum(fields, tensors):
            raise ValueError("its checksum is wrong: it has changed since it was written")
        known = {name: json.loads(fields[name]) for name in FIELDS - {"format", "checksum"}}
        if known["shape"] is not None:
            check_shape(known["shape"], known["normalisation"])
        elif known["normalisation"] is not None:
            raise ValueError("it has a normalisation, but no shape of the images")
        if net is None:
            if known["build"] is None:
                raise RunError(f"{path} names no network of models.build: make it, and call load_bits(path, net)")
            elements = sum(value.numel() for value in build_named(known["build"], "meta").state_dict().values())
            if elements > 8 * path.stat().st_size:  # each has at least a bit
                raise ValueError("it is too small for a network of this size")
            net = build_named(known["build"], "cpu")
        check_layers(net, known["layers"], known["activations"])
        values = unpacked(net, tensors)
        layers = models.named_binary_layers(net)
        for name, value in net.state_dict().items():
            if name in values:
                value.copy_(values[name])
        for name, layer in layers.items():
            freeze(layer, *(value.to(layer.weight.device) for value in values[name, "bits"]))
        return net.eval(), {name: known[name] for name in ("build", "shape", "normalisation")}
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise RunError(f"{path} cannot be loaded ({one_line(e)}): {advice}") from None


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of a file. Raises ValueError for a damaged file."""
    safetensors = import_safetensors()
    try:
        with open(path, "rb") as f:
            if int.from_bytes(f.read(8), "little") > LONGEST_HEADER:
                raise ValueError("its header is too long")
        with safetensors.safe_open(path, "pt") as f:  # it checks that each tensor lies within the file
            return f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, RuntimeError, MemoryError) as e:
        raise ValueError(f"it is damaged or not a .safetensors file: {one_line(e)}") from None


def one_line(error: Exception) -> str:
    """The first line of an error's message. It can quote a file, so characters that control a terminal are replaced."""
    return printable((str(error).splitlines() or [type(error).__name__])[0])


def printable(text: str, most: int = 300) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def is_size(value) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def check_shape(shape, normalisation) -> None:
    """Raises ValueError unless they are [C, H, W] and two lists of C finite numbers, or a normalisation of None."""
    if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(map(is_size, shape)):
        raise ValueError("the images' shape is wrong")
    if normalisation is None:
        return
    if len(normalisation) != 2 or any(not isinstance(v, list) or len(v) != shape[0] for v in normalisation):
        raise ValueError("the normalisation must be two lists with an element per channel")
    for value in (*normalisation[0], *normalisation[1]):
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
            raise ValueError("the normalisation is not of finite numbers")
    if 0 in normalisation[0]:
        raise ValueError("the normalisation has a factor of 0")


def build_named(build: dict, device: str) -> nn.Module:
    """models.build(**build) on a device; "meta" allocates no memory. Raises ValueError for wrong arguments."""
    if not isinstance(build, dict) or build.keys() != BUILD_DEFAULTS.keys() | {"arch", "num_classes"}:
        raise ValueError("the arguments of models.build are not known")
    choices = {"arch": models.ARCHS, "quantizer": WEIGHT_QUANTIZERS, "act": ACTIVATIONS}
    for name, known in choices.items():
        if not isinstance(build[name], str) or build[name] not in known:
            raise ValueError(f"its {name} is not known")
    size = build["image_size"]
    if not all(map(is_size, (build["num_classes"], build["in_channels"]))) or not (size is None or is_size(size)):
        raise ValueError("a number of classes, channels or pixels is wrong")
    if type(build["binarize_all"]) is not bool:
        raise ValueError("binarize_all is neither true nor false")
    with torch.device(device), torch.random.fork_rng(devices=[]):
        return models.build(**build)


def check_layers(net: nn.Module, layers, activations) -> None:
    """Raises ValueError unless a network's layers and activations are those that a file describes."""
    found = describe(net)
    if not models.binary_layers(net):
        raise ValueError("the network has no binary layers: call binarize_() first")
    if not isinstance(layers, dict) or not all(isinstance(fields, dict) for fields in layers.values()):
        raise ValueError("its layers are not described")
    for name in [*found, *layers]:
        if name not in layers or name not in found:
            owner = "network" if name not in layers else "file"
            raise ValueError(f"only the {owner} has a layer {name!r:.80}")
        for key in (found[name].keys() | layers[name].keys()) - {"type"}:
            if found[name].get(key) != layers[name].get(key):
                raise ValueError(f"{name} has another {key!r:.80} in the file than in the network")
    acts = {fields["act"] for fields in found.values() if "act" in fields}
    if activations != {act: ACTIVATIONS[act] for act in acts}:
        raise ValueError("its activations are not known")


def unpacked(net: nn.Module, tensors: dict[str, Tensor]) -> dict:
    """The tensors of a network by name, and for each binary layer {(its name, "bits"): (signs [C_out, n], scale)}.

    Raises ValueError unless a file's tensors are exactly those of the network.
    """
    tensors, values, packed = dict(tensors), {}, packed_parameters(net)
    dtypes = {torch.uint8, torch.float32, torch.float16} | {value.dtype for value in net.state_dict().values()}
    for name, value in tensors.items():
        if value.dtype not in dtypes:  # the operations below are not defined for every dtype
            raise ValueError(f"{name!r:.80} has a dtype that no network has, {value.dtype}")
    bad = bad_tensors(net, tensors)
    if bad:
        raise ValueError(f"some elements are NaN, infinite or a negative variance in {bad[0]!r:.80}")
    for name, layer in models.named_binary_layers(net).items():
        rows, n = rows_of(layer, layer.weight).shape
        packed_shape = (rows, math.ceil(n / 64) * 8)
        bits = take_bits(tensors, f"{name}.weight.bits", packed_shape, n)
        scale = take(tensors, f"{name}.weight.scale", (rows,), torch.float32)
        signs = bits.to(torch.int8) * 2 - 1
        if f"{name}.weight.nonzero" in tensors:
            signs *= take_bits(tensors, f"{name}.weight.nonzero", packed_shape, n)
        if (scale < 0).any():
            raise ValueError(f"{name}.weight.scale has negative elements")
        values[name, "bits"] = signs, scale
    for name, value in net.state_dict().items():
        if name not in packed:
            dtypes = (torch.float32, torch.float16) if value.is_floating_point() else (value.dtype,)
            values[name] = take(tensors, name, value.shape, *dtypes)
    if tensors:
        raise ValueError(f"the network has no {next(iter(tensors))!r:.80}")
    return values


def take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """Remove and return a tensor. Raises ValueError if it does not exist or has another shape or dtype."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    value = tensors.pop(name)
    if value.shape != shape or value.dtype not in dtypes:
        raise ValueError(f"{name} must have the shape {list(shape)} and {dtypes[0]}")
    return value


def take_bits(tensors: dict[str, Tensor], name: str, shape: tuple[int, int], n: int) -> Tensor:
    """Remove a tensor of packed bits and return them: [rows, n] bool."""
    packed = take(tensors, name, shape, torch.uint8)
    bits = unpack(packed, n)
    if not torch.equal(pack(bits), packed):
        raise ValueError(f"the padding of {name} is not 0")
    return bits
