"""Files of packed bits: read by NumPy from the documented format; networks of one's own; damaged and hostile files."""

import contextlib
import copy
import hashlib
import json
import re
import shutil
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import export
import export_bits
import models
import runs
import train_fsg
from hypernet import FSG

# ---------------------------------------------------------------------------------------------------------------------
# The documented format.


def read_with_numpy(contents: bytes) -> tuple[dict, dict, dict]:
    """What the top of export.py says of the format, in NumPy: (metadata, tensors, Ŵ of each binary layer)."""
    size = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + size])
    metadata = header.pop("__metadata__")
    dtypes = {"U8": "uint8", "F32": "float32", "F16": "float16", "I64": "int64"}
    tensors = {}
    for name, at in header.items():
        begin, end = at["data_offsets"]
        values = np.frombuffer(contents[8 + size + begin : 8 + size + end], dtypes[at["dtype"]])
        tensors[name] = values.reshape(at["shape"])
    digest = hashlib.sha256()
    for name in sorted(metadata.keys() - {"checksum"}):
        digest.update(f"{name}={metadata[name]}\n".encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode() + values.tobytes())
    assert digest.hexdigest() == metadata["checksum"]
    weights = {}
    for name, layer in json.loads(metadata["layers"]).items():
        if "act" in layer and "shares" not in layer:
            shape, groups = layer["shape"], layer.get("groups", 1)
            n = int(np.prod(shape)) // len(tensors[f"{name}.weight.bits"])
            ones = np.unpackbits(tensors[f"{name}.weight.bits"], axis=1, bitorder="little")[:, :n]
            signs = 2 * ones.astype("float32") - 1
            if f"{name}.weight.nonzero" in tensors:
                signs *= np.unpackbits(tensors[f"{name}.weight.nonzero"], axis=1, bitorder="little")[:, :n]
            weights[name] = signs * tensors[f"{name}.weight.scale"][:, None]
            if "inputs_first" in layer:
                weights[name] = weights[name].reshape(groups, shape[1], shape[0] // groups, -1).swapaxes(1, 2)
            weights[name] = weights[name].reshape(shape)
    return metadata, tensors, weights


def run_with_numpy(x: np.ndarray, metadata: dict, tensors: dict, weights: dict) -> np.ndarray:
    """The logits of an nn.Sequential of convolutions, linear layers, BatchNorms, Hardtanhs and Flattens."""
    formulas = {
        "x": lambda x, name: x,
        "+1 where x >= 0, else -1": lambda x, name: np.where(x >= 0, 1.0, -1.0),
        "1 where (x - theta) * delta >= 0, else 0": lambda x, name: (
            ((x - tensors[f"{name}.theta"]) * tensors[f"{name}.delta"] >= 0) * 1.0
        ),
    }
    activations = json.loads(metadata["activations"])
    for name, layer in json.loads(metadata["layers"]).items():
        if "act" in layer:
            x = formulas[activations[layer["act"]]](x, name)
        w = weights.get(name, tensors.get(f"{name}.weight"))
        if layer["type"].endswith("Conv2d"):
            (p, _), (s, _), k = layer["padding"], layer["stride"], w.shape[2]
            windows = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
            windows = np.lib.stride_tricks.sliding_window_view(windows, (k, k), axis=(2, 3))[:, :, ::s, ::s]
            x = np.einsum("bchwyx,fcyx->bfhw", windows, w) + tensors[f"{name}.bias"][:, None, None]
        elif layer["type"].endswith("Linear"):
            x = x @ w.T + tensors[f"{name}.bias"]
        elif layer["type"].startswith("BatchNorm"):
            mean, var, bias = (tensors[f"{name}.{n}"][:, None, None] for n in ("running_mean", "running_var", "bias"))
            x = (x - mean) / np.sqrt(var + layer["eps"]) * w[:, None, None] + bias
        elif layer["type"] == "Hardtanh":
            x = x.clip(layer["min_val"], layer["max_val"])
        elif layer["type"] == "Flatten":
            x = x.reshape(len(x), -1)
    return x


def own_network(act="sign", quantizer="bwn-f") -> nn.Module:
    """A network of one's own, whose BatchNorms are used to other weights than the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 9, 3, padding=1),
        nn.BatchNorm2d(9, eps=0.3),
        nn.Hardtanh(),
        nn.Conv2d(9, 70, 3, 2, padding=1),
        nn.BatchNorm2d(70),
        nn.Conv2d(70, 5, 1),
        nn.BatchNorm2d(5, eps=1e-2),
        nn.Flatten(),
        nn.Linear(45, 6),
        nn.Linear(6, 4),
    )
    models.binarize_(net, quantizer, act)
    for layer in models.binary_layers(net):
        if quantizer == "bihalf-prune":
            layer.options = {"prune": 0.4}
        if act == "si":
            layer.theta.data.normal_(), layer.delta.data.normal_()
    for _ in range(20):
        net(2 * torch.randn(30, 2, 6, 6))
    return net


@pytest.mark.parametrize("act", ["none", "sign", "si"])
@pytest.mark.parametrize("quantizer", ["dorefa", "bihalf-prune"])
def test_numpy_reads_the_documented_format(tmp_path, act, quantizer):
    net = own_network(act, quantizer)
    export.save_bits(net, tmp_path / "net.safetensors", half=act == "none")
    metadata, tensors, weights = read_with_numpy((tmp_path / "net.safetensors").read_bytes())
    layers = dict(zip(models.binary_layer_names(net), models.binary_layers(net), strict=True))
    assert weights.keys() == layers.keys() and len(layers) == 3
    for name, layer in layers.items():
        assert np.array_equal(weights[name], layer.binary_weight().detach().numpy())
    images = torch.randn(20, 2, 6, 6)
    logits = net.eval()(images).detach().numpy()
    found = run_with_numpy(images.numpy(), metadata, tensors, weights)
    assert np.abs(found - logits).max() < (1e-2 if act == "none" else 1e-4) * np.abs(logits).max()


# ---------------------------------------------------------------------------------------------------------------------
# Networks of one's own.


@pytest.mark.parametrize("act", ["none", "sign", "si"])
def test_a_network_of_ones_own(tmp_path, act):
    net, file = own_network(act), tmp_path / "net.safetensors"
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    export.save_bits(net, file)
    assert net.training and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    twin = own_network(act, "bwn")
    torch.set_rng_state(random_state)
    assert export.load_bits(file, twin) is twin and not twin.training
    assert torch.equal(random_state, torch.get_rng_state())
    images = torch.randn(9, 2, 6, 6)
    assert torch.equal(twin(images), net.eval()(images))
    export.save_bits(twin, tmp_path / "again.safetensors")
    checksums = [read_with_numpy(f.read_bytes())[0]["checksum"] for f in (file, tmp_path / "again.safetensors")]
    assert checksums[0] == checksums[1]
    with pytest.raises(runs.RunError, match=r"names no network of models\.build"):
        export.load_bits(file)


class Shared(nn.Module):
    """Two layers with one weight, and a weight that is read without a call."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Hardtanh(), nn.Linear(6, 6))
        self.inner[2].weight = self.inner[0].weight
        self.first, self.read, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(nn.functional.linear(self.inner(self.first(x)), self.read.weight))


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))


KINDS = {
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 8, 3, groups=2), nn.Conv1d(8, 2, 1)), (4, 9)),
    "ConvTranspose2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.ConvTranspose2d(6, 10, 3, 2, groups=2), nn.Conv2d(10, 2, 1)),
        (2, 6, 6),
    ),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 1), nn.Conv3d(4, 5, 2), nn.Conv3d(5, 2, 1)), (2, 4, 4, 4)),
    "shared": (Shared, (6,)),
    "attention": (encoder, (7, 5)),
}


@pytest.mark.parametrize("act", ["none", "sign"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(tmp_path, kind, act):
    make, shape = KINDS[kind]
    if (kind, act) == ("shared", "sign"):
        return  # a layer that is not called cannot quantize its input
    torch.manual_seed(0)
    nets = [models.binarize_(make(), "bwn-f", act, quiet=True) for _ in range(2)]
    for parameter in nets[0].parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    export.save_bits(nets[0], tmp_path / "net.safetensors")
    export.load_bits(tmp_path / "net.safetensors", nets[1])
    x = torch.randn(5, *shape)
    with torch.no_grad():
        expected = nets[0].eval()(x)
        assert torch.equal(nets[1](x), expected) and not torch.equal(make().eval()(x), expected)
    weights = read_with_numpy((tmp_path / "net.safetensors").read_bytes())[2]
    for name, layer in models.named_binary_layers(nets[0]).items():
        assert np.array_equal(layer.binary_weight().detach().numpy(), weights[name])
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    export.to_onnx(nets[0], tmp_path / "net.onnx", x[:2])
    (logits,) = export.onnx_session(tmp_path / "net.onnx").run(None, {"image": x.numpy()})
    assert np.abs(logits - expected.numpy()).max() < 1e-4 * np.abs(expected.numpy()).max()
    graph = onnx.load(tmp_path / "net.onnx").graph
    arrays = [onnx.numpy_helper.to_array(v) for v in graph.initializer]
    arrays += [onnx.numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"]
    assert sum(a.size for a in arrays if a.dtype == np.int8) == sum(w.size for w in weights.values())


def test_a_network_of_words_becomes_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 16), nn.Hardtanh(), nn.Linear(16, 3))
    models.binarize_(net, "bwn-f", quiet=True).eval()
    words = torch.randint(20, (4, 5))
    export.to_onnx(net, tmp_path / "net.onnx", words[:1])
    (logits,) = export.onnx_session(tmp_path / "net.onnx").run(None, {"image": words.numpy()})
    assert np.abs(logits - net(words).detach().numpy()).max() < 1e-5


def test_a_file_of_another_network_is_refused_and_the_network_stays_as_it_was(tmp_path):
    export.save_bits(own_network(), tmp_path / "net.safetensors")
    with pytest.raises(runs.RunError, match=r"call binarize_\(\) first"):
        export.load_bits(tmp_path / "net.safetensors", nn.Sequential(nn.Conv2d(2, 9, 3), nn.Linear(45, 6)))
    others = {"3": own_network("none"), "1": own_network(), "8": own_network()}
    others["1"][1] = nn.BatchNorm2d(9, eps=0.2)
    others["8"][8] = nn.Linear(45, 6)  # not binary
    for name, net in others.items():
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(runs.RunError, match=rf"\({name} has another .*give the network that was saved"):
            export.load_bits(tmp_path / "net.safetensors", net)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


class MyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.classifier = nn.Linear(16 * 4 * 4, 3)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler (cc) here")
def test_the_loop_of_the_readme(tmp_path):
    """A network trained in one's own loop with FSG becomes bits, ONNX and C."""
    torch.manual_seed(0)
    net = models.binarize_(MyNetwork(), quantizer="dorefa")
    fsg = FSG(models.binary_layers(net), hgs="lstm", hidden=4)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        fsg.generate()
        optimizer.step()
    export.save_bits(net, tmp_path / "net.safetensors")
    export.to_c(net, tmp_path / "net.c", images[:1])
    net.eval()
    with torch.no_grad():
        expected = net(images)
        assert torch.equal(export.load_bits(tmp_path / "net.safetensors", copy.deepcopy(net))(images), expected)
        library = export.export_c.compile_library(tmp_path / "net.c", tmp_path)
        assert (export.export_c.predict(library, images, 3) - expected).abs().max() < 1e-5
        if pytest.importorskip("onnxruntime"):
            export.to_onnx(net, tmp_path / "net.onnx", images[:2])
            (logits,) = export.onnx_session(tmp_path / "net.onnx").run(None, {"image": images.numpy()})
            assert np.abs(logits - expected.numpy()).max() < 1e-5


def test_what_cannot_be_packed_is_named_layer_by_layer(tmp_path):
    file = tmp_path / "net.safetensors"
    net = models.build("resnet8", 10, "bnn++")
    for layer in models.binary_layers(net):
        layer.options = {"mu": 5.0}
    models.binary_layers(net)[1].quantizer, models.binary_layers(net)[1].options = "bwn", {}
    with pytest.raises(runs.RunError) as error:
        export.save_bits(net, file)
    names = models.binary_layer_names(net)
    assert [f"{name} (bnn++)" in str(error.value) for name in names] == [name != names[1] for name in names]
    with pytest.raises(runs.RunError, match="full-precision network"):
        export.save_bits(models.build("resnet8", 10, "none"), file)
    with pytest.raises(runs.RunError, match="build does not make this network"):
        export.save_bits(models.build("resnet8", 10), file, build={"arch": "resnet20", "num_classes": 10})
    net = models.build("resnet8", 10)
    net.layer2[0].bn1.running_mean[3] = torch.nan
    with pytest.raises(runs.RunError, match=r"NaN.* in layer2\.0\.bn1\.running_mean"):
        export.save_bits(net, file)
    assert not file.exists()


class Stateful(nn.Identity):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def kept(net):
    """A network that has kept a result of its forward pass."""
    net[1].result = net[0](torch.randn(1, 2, 6, 6))
    return net


@pytest.mark.parametrize(
    "change, said",
    [
        (kept, "cannot be copied"),
        (lambda net: net.append(Stateful()), "10._extra_state is no tensor"),
        (lambda net: (net[0].register_buffer("bound", torch.tensor([torch.nan])), net)[1], "NaN.* in 0.bound"),
        (lambda net: (net[1].running_mean.fill_(torch.inf), net)[1], "infinite .* in 1.running_mean"),
    ],
)
def test_a_state_that_cannot_be_packed_ends_with_a_sentence(tmp_path, change, said):
    with pytest.raises(runs.RunError, match=said):
        export.save_bits(change(own_network()), tmp_path / "net.safetensors")


def test_masks_and_tuples_of_functions(tmp_path):
    """Masks of attention have infinite elements. The address of a function is another one in each process."""
    nets = [own_network() for _ in range(2)]
    for net in nets:
        net[0].register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        net[2].functions = (torch.relu, torch.tanh)
    assert "functions" not in export.export_bits.describe(nets[0])["2"]
    export.save_bits(nets[0], tmp_path / "net.safetensors")
    assert torch.equal(export.load_bits(tmp_path / "net.safetensors", nets[1])[0].mask, nets[0][0].mask)


class Median(nn.Module):
    def forward(self, x):
        return x.nanmedian(dim=1).values


def test_what_is_neither_onnx_nor_c_is_named_layer_by_layer(tmp_path):
    pytest.importorskip("onnx")
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Softmax(1), nn.Linear(8, 8), Median())
    models.binarize_(net)
    with pytest.raises(runs.RunError, match=r"as ONNX \(5 \(Median\)\)"):
        export.to_onnx(net, tmp_path / "net.onnx", torch.randn(1, 8))
    with pytest.raises(runs.RunError, match=r"1 \(GELU\), 3 \(Softmax\), 5 \(Median\)"):
        export.to_c(net, tmp_path / "net.c", torch.randn(1, 8))
    assert not list(tmp_path.iterdir())


class Called(nn.Module):
    """A network that calls ReLU as a function."""

    def __init__(self, layer, features):
        super().__init__()
        self.before, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.conv, self.layer = nn.Conv2d(4, 4, 3, padding="same"), layer
        self.fc = nn.Linear(features, 3)

    def forward(self, x):
        return self.fc(self.layer(self.conv(nn.functional.relu(self.norm(self.before(x))))).flatten(1))


WITH_RULE = {
    "pools": [
        *[nn.MaxPool2d((2, 2)), nn.LeakyReLU(0.3), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.PReLU()],
        *[nn.AvgPool2d(3, 1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(2, ceil_mode=True), nn.Hardtanh()],
    ],
    "convolutions": [nn.Conv2d(4, 4, 3, padding="valid"), nn.PReLU(), nn.Conv2d(4, 4, (2, 2)), nn.Dropout2d()],
}


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler (cc) here")
@pytest.mark.parametrize("kind", WITH_RULE)
def test_the_c_file_computes_what_these_layers_compute(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("CFLAGS", "-O0")
    torch.manual_seed(0)
    layers, images = nn.Sequential(*WITH_RULE[kind]), torch.randn(5, 2, 37, 37)
    net = Called(layers, layers(torch.zeros(1, 4, 37, 37)).numel())
    models.binarize_(net, quantizer="bwn-f", act="sign", quiet=True).eval()
    export.to_c(net, tmp_path / "net.c", images)
    library = export.export_c.compile_library(tmp_path / "net.c", tmp_path)
    with torch.no_grad():
        assert (export.export_c.predict(library, images, 3) - net(images)).abs().max() < 1e-4


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler (cc) here")
def test_names_of_modules_mean_nothing(tmp_path, monkeypatch):
    """They can be those of methods: a network's "relu" is often of another kind."""
    monkeypatch.setenv("CFLAGS", "-O0")
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(2, 8, 3), "relu": nn.Hardtanh(), "mean": nn.Conv2d(8, 8, 3), "add": nn.PReLU()}
    layers |= {"flatten": nn.AvgPool2d(5), "image": nn.Flatten(), "output": nn.Linear(8, 3)}
    net = models.binarize_(nn.Sequential(OrderedDict(layers)), quiet=True).eval()
    images = 3 * torch.randn(5, 2, 9, 9)
    export.to_c(net, tmp_path / "net.c", images)
    library = export.export_c.compile_library(tmp_path / "net.c", tmp_path)
    with torch.no_grad():
        assert (export.export_c.predict(library, images, 3) - net(images)).abs().max() < 1e-5


class InPlace(nn.Module):
    """A network that overwrites what it still needs, under this name and another one."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.same, self.fc = nn.ReLU(inplace=True), nn.Identity(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.a(x))
        identity = self.same(x)
        x = self.b(self.relu(x))
        earlier = x
        x += identity
        before = x
        x.relu_()
        return self.fc((before + earlier + x).mean(dim=(2, 3)))


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler (cc) here")
def test_what_is_overwritten_in_place_is_overwritten_in_c(tmp_path, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-O0")
    torch.manual_seed(0)
    net, images = models.binarize_(InPlace(), quiet=True).eval(), torch.randn(5, 2, 9, 9)
    export.to_c(net, tmp_path / "net.c", images)
    library = export.export_c.compile_library(tmp_path / "net.c", tmp_path)
    with torch.no_grad():
        assert (export.export_c.predict(library, images, 3) - net(images)).abs().max() < 1e-5


class Shortcut(nn.Module):
    """What `kind` says happens between two binary convolutions and a classifier."""

    def __init__(self, kind, scale=None):
        super().__init__()
        self.kind, self.pool, self.flatten = kind, nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1, bias=False) for i in (2, 8, 8))
        self.fc, self.other, self.wide = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8 * 25, 3)
        self.relu, self.norm = nn.ReLU(), nn.BatchNorm1d(8 * 25)
        self.largest, self.average = nn.MaxPool2d(2), nn.AvgPool2d(2)
        if kind == "one weight":
            self.c.weight = self.b.weight
        models.binarize_(self, "bwn", "sign", skip=["a", "fc", "other", "wide"], scale=scale, quiet=True)

    def forward(self, x):
        x = self.b(self.a(x))
        if self.kind == "sums":  # of a binary convolution, read by a binary convolution and by an addition
            x = self.c(x) + x
        elif self.kind == "one weight":
            x = self.c(x)
        elif self.kind in ("pool + shortcut", "shortcut + pool"):
            shortcut, pool = self.average(x), self.largest(self.c(x))
            x = shortcut + pool if self.kind == "shortcut + pool" else pool + shortcut
        elif self.kind == "broadcast":
            x = x + self.pool(x)
        elif self.kind == "norm of pixels":
            return self.wide(self.norm(self.flatten(x)))
        elif self.kind == "relu of pixels":
            return self.wide(self.relu(self.flatten(x)))
        elif self.kind == "map":
            return self.c(x)
        x = self.flatten(self.pool(x))
        logits, other = self.fc(x), self.other(x)
        return (logits, other) if self.kind == "two" else logits


REFUSED = {
    "broadcast": "no rule for add of 8×5×5 and 8×1×1",
    "norm of pixels": "no rule for batchnorm of 8×5×5 that makes 200×1×1",
    "relu of pixels": "no rule for relu of 8×5×5",
    "map": "its output has the shape 8×5×5",
    "two": "does not return one tensor",
}


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler (cc) here")
@pytest.mark.parametrize(
    "kind", ["a head that is not returned", "sums", "one weight", "pool + shortcut", "shortcut + pool", *REFUSED]
)
def test_shortcuts_heads_and_shapes(tmp_path, monkeypatch, kind):
    """C and ONNX compute what the network returns, or C refuses it."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("CFLAGS", "-O0")
    torch.manual_seed(0)
    net, images = Shortcut(kind, 1.0 if kind == "sums" else None).eval(), torch.randn(5, 2, 5, 5)
    expected = net(images)
    if kind in REFUSED:
        with pytest.raises(runs.RunError, match=f"cannot be written as C .*{REFUSED[kind]}"):
            export.to_c(net, tmp_path / "net.c", images)
    else:
        export.to_c(net, tmp_path / "net.c", images)
        library = export.export_c.compile_library(tmp_path / "net.c", tmp_path)
        assert (export.export_c.predict(library, images, 3) - expected).abs().max() < 1e-5
    if kind != "two":
        export.to_onnx(net, tmp_path / "net.onnx", images)
        (logits,) = export.onnx_session(tmp_path / "net.onnx").run(None, {"image": images.numpy()})
        assert np.abs(logits - expected.detach().numpy()).max() < 1e-5


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


hooked = nn.ReLU()
hooked.register_forward_hook(lambda layer, inputs, output: 2 * output)

WITHOUT_RULE = {  # the property that the message names
    "forward='Doubled.forward'": Doubled(),
    "hooks=True": hooked,
    "groups=2": nn.Conv2d(4, 4, 3, groups=2),
    "dilation=(2, 2)": nn.Conv2d(4, 4, 3, dilation=2),
    "kernel_size=(3, 1)": nn.Conv2d(4, 4, (3, 1)),
    "stride=(2, 1)": nn.Conv2d(4, 4, 3, stride=(2, 1)),
    "padding_mode='reflect'": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "padding='same'": nn.Conv2d(4, 4, 2, padding="same"),
    "dilation=2": nn.MaxPool2d(2, dilation=2),
    "kernel_size=(2, 3)": nn.MaxPool2d((2, 3)),
    "divisor_override=3": nn.AvgPool2d(2, divisor_override=3),
    "count_include_pad=True": nn.AvgPool2d(2, padding=1),
    "track_running_stats=False": nn.BatchNorm2d(4, track_running_stats=False),
    "min_val=0, max_val=2": nn.Hardtanh(0, 2),
    "GroupNorm": nn.GroupNorm(2, 4),
    "fc, a Linear on 2×3 pixels": nn.AdaptiveAvgPool2d((2, 3)),
}


@pytest.mark.parametrize("said", WITHOUT_RULE)
def test_a_layer_without_a_rule_is_refused_and_its_property_named(tmp_path, said):
    layer = WITHOUT_RULE[said]
    net = models.binarize_(Called(layer, layer(torch.zeros(2, 4, 7, 7))[0].numel()), quiet=True).eval()
    with pytest.raises(runs.RunError, match=re.escape(said)) as error:
        export.to_c(net, tmp_path / "net.c", torch.randn(1, 2, 7, 7))
    assert "layer" in str(error.value) or "fc" in str(error.value)
    assert not list(tmp_path.iterdir())


class NamedInput(nn.Sequential):
    def forward(self, x):
        return self[2](input=self[1](self[0](x)))


def test_an_input_given_by_name_is_refused(tmp_path):
    net = models.binarize_(NamedInput(nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), quiet=True)
    with pytest.raises(runs.RunError, match="no rule for 2 with named inputs"):
        export.to_c(net, tmp_path / "net.c", torch.randn(1, 2, 2, 2))


def test_weights_of_0_with_activations_of_0_and_1_are_refused(tmp_path):
    with pytest.raises(runs.RunError, match="its weights have 0, and its inputs are 0 and 1"):
        export.to_c(own_network("si", "bihalf-prune"), tmp_path / "net.c", torch.randn(1, 2, 6, 6))


@pytest.mark.parametrize("layer", [Doubled(), hooked])
def test_onnx_has_what_a_layer_does_besides_its_class(tmp_path, layer, capfd):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, images = models.binarize_(Called(layer, 4 * 49), act="sign", quiet=True).eval(), torch.randn(3, 2, 7, 7)
    export.to_onnx(net, tmp_path / "net.onnx", images)
    (logits,) = export.onnx_session(tmp_path / "net.onnx").run(None, {"image": images.numpy()})
    assert np.abs(logits - net(images).detach().numpy()).max() < 1e-5
    assert "Traceback" not in "".join(capfd.readouterr())


def test_transformers_become_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    from data import torchvision_module

    torch.manual_seed(0)
    vision_transformer = torchvision_module("models").VisionTransformer
    nets = [vision_transformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)]
    nets.append(pytest.importorskip("timm").create_model("test_vit", img_size=16, patch_size=8, num_classes=7))
    for act in ("none", "sign"):
        for net in nets:
            net.apply(lambda m: nn.init.normal_(m.weight, std=0.1) if isinstance(m, nn.Linear) else None)
            models.binarize_(net, "bwn-f", act)
            export.to_onnx(net, tmp_path / "net.onnx", torch.randn(2, 3, 16, 16))
            images = torch.randn(5, 3, 16, 16)
            (logits,) = export.onnx_session(tmp_path / "net.onnx").run(None, {"image": images.numpy()})
            expected = net.eval()(images).detach().numpy()
            assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile files.


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    """A file of packed bits: its metadata and tensors, to be changed and written again with `crafted`."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("packed") / "net.safetensors"
    net = models.build("resnet8", 4, "dorefa", "sign", in_channels=1, image_size=8)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(1, 9)
    build = {"arch": "resnet8", "num_classes": 4, "act": "sign", "in_channels": 1, "image_size": 8}
    export.save_bits(net, file, build=build, shape=(1, 8, 8), normalisation=[[0.02], [-2.5]])
    with safe_open(file, "pt") as f:
        return f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def crafted(path, metadata, tensors):
    """Write a file whose checksum is right, as the author of a hostile file would."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with contextlib.suppress(TypeError):  # there is no checksum of a dtype that NumPy does not have
        metadata = metadata | ({"checksum": export_bits.checksum(metadata, tensors)} if "checksum" in metadata else {})
    save_file(tensors, path, metadata)
    return path


def refused(file, net=None) -> str:
    with pytest.raises(runs.RunError) as error:
        export.load_bits(file, net)
    said = str(error.value)
    assert said.isprintable() and len(said) < 700
    return said


INJECTION = "resnet8 */ int injected = 1; /*"
HOSTILE_METADATA = {
    "format": ["bnn-bits-1", "bnn-bits-3", "bnn-bits-2 "],
    "shape": ["[1, 8]", "[1, 8, 8, 8]", '"188"', "8", "null", "[1, 0, 8]", "[1, -8, 8]", "[1, 8.0, 8]", "[true, 8, 8]"],
    "normalisation": ["[[1], [NaN]]", "[[1], [1e999]]", "[[1]]", "[[1, 1], [0, 0]]", '[["1"], [0]]', "[1, 0]", "{}"],
    "build": ["null", "[]", "{}", "[" * 100_000, "{", '"resnet8"', "9" * 5000],
    "layers": ["null", "[]", "{}", "{", '{"conv1": 3}', '{"conv1": {"type": "\u001b[31m"}}'],
    "activations": ["null", "{}", '{"sign": "-1 where x >= 0, else +1"}', '{"sign": "__import__(\'os\')"}', "[[]]"],
}
HOSTILE_BUILD = {
    "arch": [INJECTION, "hf-hub:someone/net", "local-dir:/tmp", "../resnet8", "vit_base_patch16_224", 8, None, [], {}],
    "quantizer": [INJECTION, "none", "nothing", 3, None, ["dorefa"], {"dorefa": 1}],
    "act": [INJECTION, "none", "nothing", 3, {}],
    "num_classes": [0, -4, 5, 65536, 10**9, 1e9, 4.0, True, "4", [4], None],
    "binarize_all": ["yes", {}, True, 1],
    "in_channels": [0, 3, "1", None],
    "image_size": [0, "8", 1.5, 10**12],
    "data_dir": ["/etc"],
}
HOSTILE_TENSORS = {
    "layer1.0.conv1.weight.bits": [
        None,
        torch.zeros(16, 24, dtype=torch.int8),
        torch.zeros(16, 16, dtype=torch.uint8),
        torch.full((16, 24), 255, dtype=torch.uint8),  # the padding is not 0
    ],
    "layer1.0.conv1.weight.scale": [None, -torch.ones(16), torch.full((16,), torch.nan), torch.ones(16).double()],
    "layer1.0.conv1.weight.nonzero": [torch.zeros(16, 1, dtype=torch.uint8)],
    "bn1.running_var": [
        *[None, torch.full((16,), torch.inf), torch.ones(17), torch.ones(16).long(), -torch.ones(16)],
        *[torch.ones(16).cfloat(), torch.ones(16).bool()],
    ],
    "bn1.weight": [torch.ones(16).bfloat16(), torch.ones(16).to(torch.float8_e4m3fn), torch.ones(16).cfloat()],
    "bn1.num_batches_tracked": [torch.tensor(1.0), torch.tensor([1])],
    "layer1.0.conv1.weight": [torch.ones(16, 16, 3, 3)],
    "no_such_layer.\u001b[31m": [torch.ones(1)],
}
HOSTILE = [
    *[("metadata", name, value) for name, values in HOSTILE_METADATA.items() for value in [None, *values]],
    *[("metadata", "comment", "a field that is not known"), ("metadata", "checksum", None)],
    *[("build", name, value) for name, values in HOSTILE_BUILD.items() for value in values],
    *[("tensor", name, value) for name, values in HOSTILE_TENSORS.items() for value in values],
]


@pytest.mark.parametrize(
    "place, name, value", HOSTILE, ids=lambda value: "" if torch.is_tensor(value) else f"{value!a}"[:20]
)
def test_a_hostile_file_is_refused(packed_file, tmp_path, place, name, value):
    """With one sentence. None: the field is left out."""
    metadata, tensors = dict(packed_file[0]), dict(packed_file[1])
    if place == "build":
        metadata["build"] = json.dumps(json.loads(metadata["build"]) | {name: value})
    else:
        fields = metadata if place == "metadata" else tensors
        fields[name] = value
        if value is None:
            del fields[name]
    file = crafted(tmp_path / "net.safetensors", metadata, tensors)
    said = refused(file)
    assert any(words in said for words in ("export it again", "export the run again", "load_bits(path", "packed bits"))
    if place != "metadata" or name != "build":  # with a network of one's own, too
        refused(file, models.build("resnet8", 4, "bwn", "sign", in_channels=1, image_size=8)) if place != "build" else 0
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_as_it_was_is_not_refused(packed_file, tmp_path):
    assert export.load_bits(crafted(tmp_path / "net.safetensors", *packed_file))


def test_a_small_file_cannot_name_a_huge_network(packed_file, tmp_path):
    metadata, tensors = packed_file
    build = json.loads(metadata["build"]) | {"arch": "vgg16", "num_classes": 65536}
    file = crafted(tmp_path / "a.safetensors", metadata | {"build": json.dumps(build)}, tensors)
    assert "too small for a network of this size" in refused(file)


@pytest.mark.parametrize("header", [2**62, 2**24 + 1, 2**23])
def test_a_header_cannot_claim_more_than_there_is(tmp_path, header):
    file = tmp_path / "net.safetensors"
    file.write_bytes(struct.pack("<Q", header) + b"{}")
    assert "export it again" in refused(file)
    for shape, offsets in (([10**12], [0, 4 * 10**12]), ([10**12], [0, 4]), ([2**62, 4], [0, 0]), ([1], [4, 0])):
        text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + b"1234")
        assert "export it again" in refused(file)


def test_every_flipped_byte_is_noticed(packed_file, tmp_path):
    file = crafted(tmp_path / "net.safetensors", *packed_file)
    contents = file.read_bytes()
    header = 8 + int.from_bytes(contents[:8], "little")
    rng = np.random.default_rng(0)
    for position in [*range(8), *rng.integers(8, header, 60), *rng.integers(header, len(contents), 60), -1]:
        changed = bytearray(contents)
        changed[position] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        assert "export it again" in refused(file) or "packed bits" in refused(file), position


@given(seed=st.integers(0, 2**32), count=st.integers(1, 4), cut=st.booleans())
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_ends_with_a_sentence(packed_file, tmp_path, seed, count, cut):
    file = crafted(tmp_path / "net.safetensors", *packed_file)
    contents, rng = bytearray(file.read_bytes()), np.random.default_rng(seed)
    before, header = bytes(contents), 8 + int.from_bytes(contents[:8], "little")
    for _ in range(count):  # half of them in the header
        contents[rng.integers(header if rng.random() < 0.5 else len(contents))] = rng.integers(256)
    contents = bytes(contents[: rng.integers(len(contents))] if cut else contents)
    file.write_bytes(contents)
    if contents != before:
        refused(file)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(models.ARCHS),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
DTYPES = [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_end_with_a_sentence(packed_file, tmp_path, data):
    """Fields and tensors of any kind, with the right checksum: the file is refused, or its network computes."""
    metadata, tensors = dict(packed_file[0]), dict(packed_file[1])
    name = data.draw(st.sampled_from([*sorted(metadata.keys() - {"checksum"}), "tensor", "tensor"]))
    if name == "tensor":
        name = data.draw(st.sampled_from(sorted(tensors)) | st.text(max_size=5))
        shape = data.draw(st.just(list(tensors[name].shape) if name in tensors else [1]) | st.lists(st.integers(0, 3)))
        value = data.draw(st.sampled_from([0, 1, -1, 255, torch.nan, torch.inf]))
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors[name] = torch.full(shape, value, dtype=torch.float64).to(dtype)
    elif name == "format" or data.draw(st.booleans()):
        metadata[name] = data.draw(st.text() | VALUES.map(json.dumps))
    else:
        value = json.loads(metadata[name])
        if isinstance(value, dict):
            value[data.draw(st.sampled_from(sorted(value)))] = data.draw(VALUES)
        metadata[name] = json.dumps(value)
    try:
        net = export.load_bits(crafted(tmp_path / "net.safetensors", metadata, tensors))
    except runs.RunError as e:
        assert str(e).isprintable()
    except UnicodeEncodeError:  # the file cannot be written
        pass
    else:
        assert net(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


def test_a_file_does_not_say_where_data_are(packed_file, tmp_path):
    """Neither the data set nor its folder: reading images, or downloading them, takes the user's word."""
    found = export.read(crafted(tmp_path / "net.safetensors", *packed_file))
    assert found.dataset is None and found.data_dir is None
    with pytest.raises(runs.RunError, match="--dataset and --data-dir"):
        export.load_test(found)


def test_text_of_a_checkpoint_does_not_reach_the_c_file(tmp_path):
    args = train_fsg.flags().parse_args(["--dataset", "folder", "--arch", "resnet8", "--grad", "ste"])
    train_fsg.complete(args)
    net = train_fsg.network(args, 4, (1, 8, 8))
    state = {"args": vars(args), "num_classes": 4, "shape": (1, 8, 8), "normalisation": [[0.02], [-2.5]]}
    for name in ("arch", "act", "quantizer", "script", "dataset"):
        for value in (INJECTION, 3, None, ["a"], {"b": {}}):
            flags = state["args"] | {name: value}
            torch.save(state | {"args": flags, "model": net.state_dict()}, tmp_path / "last.pt")
            with pytest.raises(runs.RunError) as error:
                export.main([str(tmp_path / "last.pt"), "--to", "c"])
            assert "injected" not in str(error.value).replace(INJECTION, "")
            assert not (tmp_path / "last.c").exists()
