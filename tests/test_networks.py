"""binarize_() on the networks that people have: each computes what a plain network with the weights Ŵ computes."""

import copy
import importlib
import io
import pickle
import textwrap
import types
import warnings

import pytest
import torch
import torch.utils.checkpoint
from programs import Program
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import binarize
import models
import quantizers

# ---------------------------------------------------------------------------------------------------------------------
# Networks. Each function returns a network and an example input.


def images(batch=2, size=32, channels=3):
    return torch.randn(batch, channels, size, size)


def tokens(batch=2, length=6, vocabulary=30):
    return torch.randint(vocabulary, (batch, length))


def optional(package, module=None):
    try:
        return importlib.import_module(module or package)
    except ModuleNotFoundError:
        pytest.skip(f"{package} is not installed")


def torchvision(name, *args, **kwargs):
    return lambda: (getattr(optional("torchvision", "torchvision.models"), name)(*args, **kwargs), images())


def torchvision_resnet():
    resnet = optional("torchvision", "torchvision.models.resnet")
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], 5, width_per_group=64), images()


def torchvision_vit():
    vit = optional("torchvision", "torchvision.models").VisionTransformer
    return vit(32, 8, 2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5), images()


def torchvision_swin(version):
    def make():
        swin = optional("torchvision", "torchvision.models.swin_transformer")
        second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
        return swin.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=5, **second), images()

    return make


def torchvision_fcn():
    """Two heads, of which `aux_classifier` is the last in the order of the modules."""
    resnet, segmentation = (optional("torchvision", f"torchvision.models.{m}") for m in ("resnet", "segmentation.fcn"))
    from torchvision.models._utils import IntermediateLayerGetter

    backbone = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    backbone = IntermediateLayerGetter(backbone, {"layer4": "out", "layer3": "aux"})
    return segmentation.FCN(backbone, segmentation.FCNHead(512, 4), segmentation.FCNHead(256, 4)), images()


def timm(name, **kwargs):
    def make():
        optional("torchvision")
        return optional("timm").create_model(name, **kwargs), images(size=kwargs.get("img_size", 32))

    return make


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def hugging_face(config, model, images_too=False, **sizes):
    def make():
        transformers = optional("transformers")
        net = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        return net, images() if images_too else {"input_ids": tokens()}

    return make


def mlp():
    return nn.Sequential(*(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))), images(
        4, 8, 1
    )


def of_dimension(d):
    """Convolutions, depthwise, strided, grouped and transposed ones in d dimensions."""

    def make():
        conv, up = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")
        net = nn.Sequential(
            *(conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, groups=8, padding=1, padding_mode="circular")),
            *(conv(8, 12, 1), nn.ReLU(), conv(12, 12, 2, stride=2), nn.ReLU()),
            *(up(12, 6, 2, stride=2, groups=3), nn.ReLU(), up(6, 4, 3, padding=1), conv(4, 2, 1)),
        )
        return net, torch.randn(2, 3, *[8] * d)

    return make


class Tokens(nn.Module):
    """An embedding, a body that is called or asked for `method`, and a classifier."""

    def __init__(self, body, width=16, call=None):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(30, width), body, nn.Linear(width, 5)
        self.call = call or (lambda body, x: body(x))

    def forward(self, x):
        x = self.call(self.body, self.embedding(x))
        return self.head(x[0] if isinstance(x, tuple) else x)


def encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True, **kwargs)
    return lambda: (Tokens(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), tokens())


def padded_encoder():
    """With a padding mask and nested tensors, which only the fast path can compute."""
    layer, mask = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), torch.zeros(2, 6).bool()
    mask[0, 4:] = True
    call = lambda body, x: body(x, src_key_padding_mask=mask)[:, :4]
    return Tokens(nn.TransformerEncoder(layer, 2), call=call), tokens()


def encoder_and_decoder():
    net = nn.Transformer(16, 2, 1, 1, 32, 0.1, batch_first=True)
    return Tokens(net, call=lambda net, x: net(x, x.flip(1))), tokens()


def attention(**kwargs):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 2)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **kwargs)

        def forward(self, x):
            key = x if "kdim" in kwargs else self.first(x)
            y, weights = self.attention(self.first(x), key, key[..., : kwargs.get("vdim", 16)])
            return self.last(y), weights

    return lambda: (Attention(), torch.randn(2, 6, 12))


class Reader(nn.Module):
    """Reads the weights of its layers in every way but calling them; and one layer is used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Linear(*sizes) for sizes in ((6, 8), (8, 8), (8, 8), (8, 8)))
        self.conv, self.twice, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 2)
        self.scale, self.act = 0.5, torch.relu  # binary layers have attributes of these names

    def forward(self, x):
        x = self.act(self.scale * self.stem(x))
        x = (x @ self.a.weight.t() + self.a.bias).relu()
        x = F.linear(x, self.b.weight.clone()).relu()
        x = torch.einsum("bi,oi->bo", x, self.c.weight)
        x = self.squash(self.conv, x)
        x = self.twice(self.twice(x).relu())
        return self.head(x)

    @staticmethod
    def squash(conv, x):
        return F.conv1d(x[..., None], conv.weight / conv.weight.std(), padding=1).squeeze(-1).relu()


def reader():
    return Reader(), torch.randn(5, 6)


class Patched(nn.Module):
    """Weights are read by hooks, by a `forward` that was assigned to a layer, and by `__call__`; inputs have names."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d, self.head = (nn.Linear(8, 8) for _ in range(6))
        self.body = nn.Sequential(self.d, nn.Tanh())
        self.a.forward = types.MethodType(lambda layer, x: 2 * F.linear(x, layer.weight), self.a)
        self.b.register_forward_hook(lambda m, x, y: F.linear(y, m.weight))
        self.body.register_forward_hook(lambda m, x, y: F.linear(y, m[0].weight))

    def __call__(self, x):
        return super().__call__(F.linear(self.stem(x), self.c.weight))

    def forward(self, x):
        return self.head(input=self.body(self.b(input=self.a(x))))


class Checkpointed(Reader):
    """Parts are run again in the backward pass."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.stem(x).relu()
        part = lambda x: self.twice(F.linear(x, self.a.weight) + self.b(x)).relu()
        x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=self.use_reentrant)
        return self.head(self.squash(self.conv, self.c(x)))


def traced():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2))
    return torch.fx.symbolic_trace(net), images(size=8)


class Padded(nn.Conv2d):
    """As timm's Conv2dSame does it."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """A subclass that changes its weight: as timm's StdConv2d does it."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)


class FakeQuantized(nn.Linear):
    """A subclass that quantizes its weight, as in quantization-aware training."""

    def forward(self, x):
        return F.linear(x, torch.fake_quantize_per_tensor_affine(self.weight, 0.01, 0, -127, 127), self.bias)


def subclasses():
    net = nn.Sequential(*(nn.Conv2d(3, 4, 3), Padded(4, 6, 3, bias=False), nn.BatchNorm2d(6), Standardized(6, 6, 3)))
    net.extend([nn.AdaptiveAvgPool2d(2), nn.Flatten(), FakeQuantized(24, 8), nn.Linear(8, 2)])
    return net, images(size=8)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is transposed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def transposed_linear():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Conv1D(6, 8), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 4)


class Tied(nn.Module):
    """Two layers with one weight, and a classifier with the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c, self.head, self.last = nn.Linear(8, 8), nn.Linear(8, 30, bias=False), nn.Linear(30, 3)
        self.b.weight, self.head.weight = self.a.weight, self.embedding.weight

    def forward(self, x):
        x = self.b(self.a(self.embedding(x)).relu()).relu()
        return self.last(self.head(self.c(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(30, 8), nn.LSTM(8, 8, batch_first=True)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.c(self.b(self.a(self.lstm(self.embedding(x))[0]).relu()).relu())


NETWORKS = {
    "mlp": mlp,
    "1-d": of_dimension(1),
    "2-d": of_dimension(2),
    "3-d": of_dimension(3),
    "encoder": encoder(),
    "encoder, norm first": encoder(norm_first=True, activation="gelu"),
    "padded encoder": padded_encoder,
    "encoder and decoder": encoder_and_decoder,
    "attention": attention(),
    "attention, kdim": attention(kdim=12, vdim=8, bias=False, add_bias_kv=True),
    "reader": reader,
    "patched": lambda: (Patched(), torch.randn(5, 8)),
    "checkpointed": lambda: (Checkpointed(False), torch.randn(5, 6)),
    "checkpointed, reentrant": lambda: (Checkpointed(True), torch.randn(5, 6)),
    "traced": traced,
    "subclasses": subclasses,
    "transposed linear": transposed_linear,
    "tied": lambda: (Tied(), tokens()),
    "recurrent": lambda: (Recurrent(), tokens()),
    "torchvision resnet": torchvision_resnet,
    "torchvision densenet": lambda: (
        optional("torchvision", "torchvision.models").DenseNet(4, (2, 2), 8, num_classes=5),
        images(),
    ),
    "torchvision vit": torchvision_vit,
    "torchvision swin": torchvision_swin(1),
    "torchvision swin v2": torchvision_swin(2),
    "torchvision mobilenet v2": torchvision("mobilenet_v2", width_mult=0.25, num_classes=5),
    "torchvision shufflenet": torchvision("shufflenet_v2_x0_5", num_classes=5),
    "torchvision fcn": torchvision_fcn,
    "timm vit": timm("vit_tiny_patch16_224", **SMALL),
    "timm deit distilled": timm("deit_tiny_distilled_patch16_224", **SMALL),
    "timm beit": timm("beit_base_patch16_224", **SMALL),
    "timm eva02": timm("eva02_tiny_patch14_224", **SMALL),
    "timm swin v2": timm(
        "swinv2_tiny_window8_256", img_size=32, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4
    ),
    "timm mixer": lambda: (
        optional("timm").models.mlp_mixer.MlpMixer(5, 32, patch_size=8, num_blocks=2, embed_dim=16),
        images(),
    ),
    "timm convnext": timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5),
    "transformers gpt2": hugging_face("GPT2Config", "GPT2LMHeadModel", vocab_size=30, n_embd=16, n_layer=2, n_head=2),
    "transformers bert": hugging_face(
        "BertConfig",
        "BertForSequenceClassification",
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    ),
    "transformers llama": hugging_face(
        "LlamaConfig",
        "LlamaForCausalLM",
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    ),
}


# How many layers keep full precision, where these are not the first and the last. An embedding counts as the first.
ENDS = {
    **dict.fromkeys(["encoder", "encoder, norm first", "padded encoder", "encoder and decoder", "recurrent"], 1),
    **dict.fromkeys(["transformers gpt2", "transformers bert", "transformers llama"], 1),
    "tied": 3,
    "timm deit distilled": 3,
}
AND_WITH_EXAMPLE = {"torchvision fcn": 1, "attention, kdim": 2}  # a second head; layers beside the first one


# ---------------------------------------------------------------------------------------------------------------------
# The table.


def outputs_of(net, example, training, grad):
    """All floating-point outputs. Dropout draws the same numbers each time."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        return [t for t in binarize._call(net.train(training), example) if t.is_floating_point()]


MODES = [(False, False), (False, True), (True, True)]


def plain_twin(net):
    """A copy in full precision with the weights Ŵ, and its parameters in the order of binary_layers(net)."""
    twin = copy.deepcopy(net)
    layers = models.binary_layers(twin)
    bits = [layer.binary_weight().detach().clone() for layer in layers]
    weights = [layer.weight for layer in layers]
    models.binarize_(twin, "none")
    for w, b in zip(weights, bits, strict=True):
        w.data.copy_(b)
    return twin, weights


def check_computes_with_bits(net, example):
    twin, weights = plain_twin(net)
    layers = models.binary_layers(net)
    for training, grad in MODES:
        ours, theirs = (outputs_of(n, example, training, grad) for n in (net, twin))
        assert ours and all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(ours, theirs, strict=True)), (
            training,
            grad,
        )
    cotangents = [torch.randn_like(t) for t in ours]
    for n, outputs in ((net, ours), (twin, theirs)):
        n.zero_grad()
        torch.autograd.backward(
            [t for t in outputs if t.requires_grad],
            [c for c, t in zip(cotangents, outputs, strict=True) if t.requires_grad],
        )
    for layer, w in zip(layers, weights, strict=True):
        assert layer.weight.is_leaf and layer.weight.grad is not None
        expected = w.grad * layer.scale  # the gradient passes through the quantizer unchanged
        assert torch.allclose(layer.weight.grad, expected, 1e-3, 1e-5 * expected.abs().max() + 1e-9)


def saved(net):
    """The whole network in a file, or None for networks that cannot be pickled."""
    file = io.BytesIO()
    try:
        torch.save(net, file)
    except (AttributeError, TypeError, pickle.PicklingError):
        return None
    file.seek(0)
    return file


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, capsys):
    torch.manual_seed(0)
    net, example = NETWORKS[name]()
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p.data)  # heads that start at 0 would hide the rest
    capsys.readouterr()
    can_be_saved = saved(net) is not None
    before, kinds = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    full = outputs_of(net, example, False, False)
    for known in (example, None):
        assert models.binarize_(net, "dorefa", example=known) is net
        layers, said = models.binary_layers(net), capsys.readouterr().err
        ends = ENDS.get(name, 2) + AND_WITH_EXAMPLE.get(name, 0) * (known is not None)
        assert len(binarize._candidates(net)) - len(layers) == ends, said
        # The share of binary weights is as stated, and no weight counts twice.
        count = sum(layer.weight.numel() for layer in layers)
        total = sum(p.numel() for p in net.parameters())
        assert f" with {100 * count / total:.1f} % of {total:,} parameters are binary" in said and said.count("\n") == 1
        assert len({id(layer.weight) for layer in layers}) == len(layers) == len(models.binary_layer_names(net))
        assert {id(layer.weight) for layer in layers} <= {id(p) for p in net.parameters()}
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    check_computes_with_bits(net, example)
    clone = copy.deepcopy(net)
    if can_be_saved:
        clone = torch.load(saved(net), weights_only=False)
    assert models.binary_layer_names(clone) == models.binary_layer_names(net)
    for layer in models.binary_layers(clone):
        layer.weight.data *= torch.randn_like(layer.weight).sign()
    a, b = outputs_of(net, example, False, False), outputs_of(clone, example, False, False)
    assert any(not torch.allclose(x, y) for x, y in zip(a, b, strict=True)), "the output must follow the signs"
    # And back.
    assert models.binarize_(net, "none") is net and not models.binary_layers(net)
    assert [type(m) for m in net.modules()] == kinds
    net.load_state_dict(before)
    assert all(torch.allclose(a, b) for a, b in zip(outputs_of(net, example, False, False), full, strict=True))


def test_layers_whose_weight_is_computed_stay_as_they_are(capsys):
    linear = [nn.Linear(8, 8) for _ in range(7)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(linear[1])
    nn.utils.parametrizations.weight_norm(linear[2])
    nn.utils.parametrizations.spectral_norm(linear[3])
    prune.random_unstructured(linear[4], "weight", 0.3)
    net, x = nn.Sequential(*linear).eval(), torch.randn(4, 8)
    before = [layer(x) for layer in linear]
    for example in (None, x):
        models.binarize_(net, example=example)
        assert models.binary_layer_names(net) == ["5"] and "1 layer with" in (said := capsys.readouterr().err)
        assert "weight_norm" in said
    assert [torch.equal(layer(x), y) for layer, y in zip(linear, before, strict=True)] == [True] * 5 + [False] + [True]


# ---------------------------------------------------------------------------------------------------------------------
# Which layers.


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.boxes, self.classes = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 5, 1)
        self.neck, self.idle = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.neck(self.body(self.stem(x).relu()).relu())
        proposals = self.boxes(x).detach()  # as region proposals are
        return {"boxes": proposals.round(), "classes": [self.classes(x)]}


def test_first_and_last_layers_are_those_of_the_graph(capsys):
    net = TwoHeads()
    models.binarize_(net, example=images(size=8))
    assert models.binary_layer_names(net) == ["body", "neck"]
    assert "idle (not reached by the example)" in (said := capsys.readouterr().err) and "boxes, classes (last)" in said
    models.binarize_(net, example=images(size=8), first=True, last=True)
    assert models.binary_layer_names(net) == ["stem", "body", "boxes", "classes", "neck"]
    assert all(p.requires_grad for p in net.parameters()) and net.training
    models.binarize_(net)  # in the order of the modules
    assert models.binary_layer_names(net) == ["body", "boxes", "classes", "neck"]


def test_skip():
    net = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4)
    )
    for skip in (["1"], "1", ("1.0", "1.1"), lambda name, module: name.startswith("1.")):
        assert models.binary_layer_names(models.binarize_(net, skip=skip)) == ["2"]
    seen = []
    models.binarize_(net, skip=lambda name, module: seen.append((name, module)), first=True, last=True)
    assert seen == [("0", net[0]), ("1.0", net[1][0]), ("1.1", net[1][1]), ("2", net[2]), ("3", net[3])]
    with pytest.raises(models.ModelError, match=r"'head'.*1\.0"):
        models.binarize_(net, skip=["head"])
    assert len(models.binary_layers(net)) == 5, "a refusal changes nothing"


def test_heads_of_timm():
    net, _ = timm("deit_tiny_distilled_patch16_224", **SMALL)()
    names = models.binary_layer_names(models.binarize_(net))
    assert names and not {"head", "head_dist"} & set(names)


def test_a_shared_weight_counts_once_and_has_one_quantizer():
    net = models.binarize_(Tied(), "bihalf")
    assert models.binary_layer_names(net) == ["a", "c"], "head has the weight of the embedding"
    models.binary_layers(net)[0].options = {"ratio": 0.25}
    assert torch.equal(net.a.binary_weight(), net.b.binary_weight())
    assert (net.b.binary_weight() > 0).float().mean() == 0.25
    clone = copy.deepcopy(net)
    assert clone.b.leader is clone.a and clone.b.weight is clone.a.weight


def test_a_network_that_keeps_its_latent_weights_elsewhere_is_refused():
    class Cached(nn.Sequential):
        def forward(self, x):
            return self[2](F.linear(self[0](x), self.cache[0]))

    net = Cached(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net.cache = [net[1].weight]
    for scale in (None, 1e30):  # with outputs that are not finite too
        with pytest.raises(models.ModelError, match=r"skip=\['1'\]"):
            models.binarize_(net, example=torch.randn(3, 4), scale=scale)
    assert not models.binary_layers(net) and type(net) is Cached


def test_an_example_leaves_no_trace():
    """Buffers that a pass replaces, resizes or fills, and what a module keeps from a pass in eval mode."""

    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("replaced", torch.zeros(1))
            self.register_buffer("resized", torch.zeros(0))
            self.cache = None

        def train(self, mode=True):
            self.cache = None
            return super().train(mode)

        def forward(self, x):
            self.replaced, self.cache = self.replaced + 1, x if not self.training else None
            self.resized.resize_(2).fill_(1)
            return x

    net = nn.Sequential(nn.Linear(4, 4), Observer(), nn.Linear(4, 4), nn.Linear(4, 2))
    replaced, before = net[1].replaced, net.train().state_dict()
    models.binarize_(net, example=torch.randn(3, 4))
    assert net[1].replaced is replaced and net[1].cache is None and net.training
    assert not replaced.any() and net[1].resized.shape == (0,) and net.state_dict().keys() == before.keys()
    copy.deepcopy(net)


def test_embeddings_recurrent_layers_and_odd_classes_are_named(capsys):
    class OwnScale(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = 2.0

        def forward(self, x):
            return self.scale * super().forward(x)

    net = Recurrent()
    net.b = OwnScale(8, 8)
    models.binarize_(net)
    assert models.binary_layer_names(net) == ["a"] and net.b.scale == 2
    said = capsys.readouterr().err
    assert all(
        word in said
        for word in ("embedding", "LSTM", "b (with an own attribute ['scale'])", "c (last in module order)")
    )
    models.binarize_(net, quiet=True)
    assert capsys.readouterr().err == ""
    with pytest.raises(models.ModelError, match="nothing to binarize"):
        models.binarize_(nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4), nn.LazyLinear(4)))


# ---------------------------------------------------------------------------------------------------------------------
# Forward passes.


def test_the_weight_is_latent_outside_of_forward_passes():
    net, x = reader()
    models.binarize_(net)
    seen = []
    net.a.weight.register_hook(seen.append)
    net.conv.register_forward_hook(lambda *_: seen.append("called"))
    inside = []
    net.head.register_forward_pre_hook(lambda m, x: inside.append(net.a.weight))
    net(x).sum().backward()
    assert len(seen) == 1, "the network reads the convolution's weight and does not call it"
    assert torch.equal(inside[0], net.a.binary_weight()) and net.a.weight is dict(net.named_parameters())["a.weight"]
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_, error=error):
            raise error

        handle = net.twice.register_forward_pre_hook(fail)
        with pytest.raises(error):
            net(x)
        handle.remove()
        assert net.a.weight.is_leaf


@pytest.mark.parametrize("name", ["encoder", "attention, kdim", "tied", "subclasses"])
def test_data_parallel_copies_compute_with_bits(name):
    """nn.DataParallel puts tensors in the place of the parameters; gradients pass through them."""
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    net = models.binarize_(net).eval()
    moved = {p: 1 * p for p in net.parameters()}
    copies = {m: m._replicate_for_data_parallel() for m in net.modules()}
    for m, copied in copies.items():
        for key, child in m._modules.items():
            copied._modules[key] = copies[child]
        for key, p in m._parameters.items():
            setattr(copied, key, moved.get(p))
    ours, theirs = (binarize._call(n, x)[0] for n in (copies[net], net))
    assert torch.allclose(ours, theirs, atol=1e-6)
    of = [layer.weight for layer in models.binary_layers(net)]
    through = torch.autograd.grad(ours.square().sum(), [moved[w] for w in of], retain_graph=True)
    assert all(torch.equal(g, h) for g, h in zip(through, torch.autograd.grad(ours.square().sum(), of), strict=True))
    assert all(g.any() for g in through)


def test_tracing(capsys):
    """A graph of torch.fx calls binary layers; layers that it would read keep full precision, or it is refused."""
    net, x = traced()[0], images(size=8)
    net = models.binarize_(nn.Sequential(*net.children())).eval()
    graph = torch.fx.symbolic_trace(net)
    net[1].weight.data *= torch.randn_like(net[1].weight).sign()
    assert torch.equal(graph(x), net(x)) and [*graph.parameters()] == [*net.parameters()]

    class CalledAndRead(nn.Sequential):
        def forward(self, x):
            return self[3](self[2](F.linear(self[1](self[0](x)), self[1].weight)))

    read = torch.fx.symbolic_trace(CalledAndRead(*(nn.Linear(4, 4) for _ in range(4))))
    models.binarize_(read)
    assert models.binary_layer_names(read) == ["2"]
    assert "1 (read by a graph of torch.fx)" in capsys.readouterr().err
    with pytest.raises(models.ModelError, match=r"bits of a: trace before binarize_"):
        torch.fx.symbolic_trace(models.binarize_(Reader()))
    with pytest.raises(models.ModelError, match=r"torch\.jit\.script cannot .* use torch\.jit\.trace"):
        torch.jit.script(net)


def test_functions_of_parameters():
    """torch.func: the gradients of single images, and an ensemble."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2)), torch.randn(5, 6)
    models.binarize_(net)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    loss = lambda p, x: torch.func.functional_call(net, p, x[None]).square().sum()
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        net.zero_grad()
        net(row[None]).square().sum().backward()
        for name, p in net.named_parameters():
            assert torch.allclose(found[name][i], p.grad, atol=1e-5), name
    stacked = {name: torch.stack([p, -p]) for name, p in parameters.items()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(net, p, x))(stacked)
    assert torch.allclose(both[0], net(x), atol=1e-6) and not torch.allclose(both[1], net(x), atol=1e-2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", quantizers.WEIGHT_QUANTIZERS)
def test_torch_func_and_autograd_agree_on_each_quantizer(name):
    options = {"bihalf-prune": {"prune": 0.4}, "bnn++": {"mu": 5.0}, "pc": {"rho": 0.3}}.get(name, {})
    quantizer = lambda w: quantizers.WEIGHT_QUANTIZERS[name](w, **options)
    w, v = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, 2, 2).double()
    expected = [quantizer(w[0]), quantizer(w[1])]
    gradients = [torch.autograd.grad(y, w, v)[0][i] for i, y in enumerate(expected)]
    value, pull = torch.func.vjp(quantizer, w[0].detach())
    assert torch.allclose(value, expected[0]) and torch.allclose(pull(v)[0], gradients[0])
    assert torch.allclose(torch.func.vmap(quantizer)(w), torch.stack(expected))
    found = torch.func.vmap(torch.func.grad(lambda x: (quantizer(x) * v).sum()))(w)
    assert torch.allclose(found, torch.stack(gradients))


def test_infinite_values_have_a_sign_under_torch_func_and_compilers_too():
    x = torch.tensor([torch.inf, -torch.inf, 0.3])
    step = lambda x: quantizers.step_activation(x, torch.tensor(0.0), torch.tensor(1.0), 0.3)
    for quantizer in (quantizers.sign, quantizers.bwn_l, quantizers.sign_with_cut, quantizers.sign_activation, step):
        expected = quantizer(x)
        assert torch.equal(torch.func.vmap(quantizer)(x[None])[0], expected)
        torch.compiler.reset()
        assert torch.equal(torch.compile(quantizer, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("quantizer", ["bnn", "bnn+", "bnn++", "pc"])
def test_quantizers_that_compare_weights_with_1_have_a_unit(quantizer):
    """A weight of √2/√fan_in, which is about a weight's standard deviation, counts as 1."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64))
    models.binarize_(net, quantizer, last=True, quiet=True)
    (layer,) = models.binary_layers(net)
    assert layer.scale == 1 and layer.unit == pytest.approx((2 / (8 * 9)) ** 0.5)
    options = {"bnn++": {"mu": 30.0}, "pc": {"rho": 0.01}}.get(quantizer, {})
    layer.options = options
    inside, outside = 0.9 * layer.unit, 1.1 * layer.unit
    with torch.no_grad():
        layer.weight.fill_(inside)
        layer.weight[0] = outside
    expected = quantizers.WEIGHT_QUANTIZERS[quantizer](layer.weight / layer.unit, **options)
    assert torch.allclose(layer.binary_weight(), expected, atol=1e-5)


def test_what_would_take_the_weight_away_is_refused():
    for change in (
        lambda layer: nn.utils.weight_norm(layer),
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ):
        net, x = reader()
        models.binarize_(net)
        with warnings.catch_warnings(), pytest.raises(models.ModelError, match=r"after binarize_.*before"):
            warnings.simplefilter("ignore")
            change(net.a)
            net(x)


def test_compiled_before_any_other_call():
    code = """
        import torch, models
        net = models.binarize_(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4))), quiet=True)
        compiled = torch.compile(net, backend="eager")
        for _ in range(3):
            compiled(torch.ones(2, 4)).sum().backward()
    """
    result = Program("-c", textwrap.dedent(code)).end()  # in a process of its own
    assert result.returncode == 0, result.stderr


def test_compiled():
    net, x = reader()
    models.binarize_(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(compiled(x), net(x), atol=1e-6)


def test_generators_take_every_layer():
    import hypernet

    net, x = encoder()()
    fsg = hypernet.FSG(models.binary_layers(models.binarize_(net)), expand=4, d_state=2)
    optimizer, before = torch.optim.SGD(net.parameters(), 0.1), copy.deepcopy(net.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        fsg.generate()
        optimizer.step()
    assert {n for n, v in net.state_dict().items() if not torch.equal(v, before[n])} == dict(
        net.named_parameters()
    ).keys()


# ---------------------------------------------------------------------------------------------------------------------
# Values.


@pytest.mark.parametrize("quantizer", ["bwn-f", "bihalf", "sibnn"])
def test_filters_of_transposed_weights(quantizer):
    """A filter is an output channel, wherever the weight has it."""
    torch.manual_seed(0)
    up, linear = nn.ConvTranspose2d(6, 8, 3, groups=2), Conv1D(5, 7)
    models.binarize_(nn.ModuleList([up, linear]), quantizer, first=True, last=True, scale=1.0)
    for filters, bits in (
        ([up.weight[g * 3 : g * 3 + 3, o] for g in range(2) for o in range(4)], up.binary_weight()),
        ([linear.weight[:, o] for o in range(5)], linear.binary_weight()),
    ):
        found = [bits[g * 3 : g * 3 + 3, o] for g in range(2) for o in range(4)] if bits.dim() == 4 else [*bits.T]
        for w, b in zip(filters, found, strict=True):
            expected = models.WEIGHT_QUANTIZERS[quantizer](w[None])[0]
            assert torch.allclose(b, expected)


def test_he_scale_keeps_the_variance_of_every_kind_of_layer():
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(512, 512), torch.randn(64, 512)),
        (nn.Conv2d(32, 32, 3, groups=2), images(8, 16, 32)),
        (nn.ConvTranspose2d(64, 32, 4, 2, 1), images(8, 16, 64)),
        (Conv1D(512, 512), torch.randn(64, 512)),
    ):
        layer.bias.data.zero_()
        models.binarize_(layer, first=True, last=True)
        assert 0.85 < layer(x.relu()).std() < 1.15


def test_networks_without_normalisation_get_a_scale():
    torch.manual_seed(0)
    conv = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    linear = [nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.ReLU()]
    net = models.binarize_(nn.Sequential(*conv(3, 32), *conv(32, 32), *linear, nn.Linear(256, 10)))
    assert [round(layer.scale, 3) for layer in models.binary_layers(net)] == [1, 0.062, 0.088]
    assert F.cross_entropy(net(images(32, 16)), torch.randint(10, (32,))) < 4
    for quantizer in ("bwn-f", "sibnn"):
        assert all(layer.scale == 1 for layer in models.binary_layers(models.binarize_(net, quantizer)))
    assert all(layer.scale == 2 for layer in models.binary_layers(models.binarize_(net, scale=2.0)))
    assert all(layer.scale == 1 for layer in models.binary_layers(models.binarize_(models.build("conv2", 10, "none"))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("act", ["none", "sign", "si"])
def test_every_precision(dtype, act):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8)))
    net.extend([nn.ConvTranspose2d(8, 8, 2), nn.Flatten(), nn.Linear(8 * 16, 16), nn.Linear(16, 4)])
    models.binarize_(net, "bwn-f", act)
    x, other = images(size=9), copy.deepcopy(net).to(dtype)
    for training in (True, False):
        y = other.train(training)(x.to(dtype))
        assert y.dtype == dtype and y.isfinite().all()
        if dtype == torch.float64:
            assert torch.allclose(y.float(), net.train(training)(x), atol=1e-4)
    y.sum().backward()


@pytest.mark.filterwarnings("ignore:all inputs of")  # its feed-forward layers have a ReLU
def test_an_encoder_with_binary_activations_does_not_take_the_fast_path():
    torch.manual_seed(0)
    net, x = encoder()()
    models.binarize_(net, act="sign")
    for m in net.modules():
        if isinstance(m, nn.TransformerEncoderLayer):
            assert (m.linear1.act, m.linear2.act, m.self_attn.out_proj.act) == ("sign", "sign", "none")
    net.eval()
    seen = []
    handle = net.body.layers[0].linear1.register_forward_pre_hook(lambda m, x: seen.append(m.binary_input(x[0])))
    with_grad = net(x)
    handle.remove()
    assert set(seen[0].unique().tolist()) == {-1, 1}
    with torch.no_grad():
        assert torch.allclose(net(x), with_grad, atol=1e-5)
    models.binarize_(net, "none")
    assert net.body.layers[0].activation_relu_or_gelu == 1


def test_a_layer_that_is_read_cannot_quantize_its_input():
    net, x = reader()
    models.binarize_(net, act="sign")
    with pytest.raises(models.ModelError, match=r"skip=\['a'\]"):
        net(x)
    models.binarize_(net, act="sign", skip=["a", "b", "c", "conv"])
    assert net(x).shape == (5, 2)


def test_signs_behind_a_relu_are_warned_about():
    layers = [nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.Linear(8, 2)]
    net = models.binarize_(nn.Sequential(*layers), act="sign")
    with pytest.warns(UserWarning, match="inputs of 2 are ≥ 0.*Hardtanh"):
        net(torch.randn(16, 8))
    net = models.binarize_(nn.Sequential(layers[0], nn.Hardtanh(), *layers[2:]), act="sign")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(16, 8))


def test_thresholds_come_and_go():
    net, x = of_dimension(1)()
    before = net.state_dict().keys()
    models.binarize_(net, "bwn-f", "si")
    for layer in models.binary_layers(net):
        assert layer.theta.shape == (layer.in_channels, 1)
    net(x).sum().backward()
    theta = net[2].theta
    models.binarize_(net, "bihalf", "si")
    assert net[2].theta is theta
    models.binarize_(net, "none")
    assert net.state_dict().keys() == before


def test_summary(capsys):
    import rich.console

    net, x = encoder()()
    models.binarize_(net, quiet=True)
    rich.console.Console(width=140).print(models.summary(net, x[:1]))
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.count("│") > 3]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert rows["body.layers.0.self_attn.in_proj"][:3] == ["768", f"{6 * 768:,}", "0"]
    assert rows["body.layers.1.linear1"] == ["512", f"{6 * 512:,}", "0", "0.1", "dorefa"]
    assert rows["head"][-1] == "no: last in module order" and rows["embedding.weight"][-1] == "no: Embedding"
    total = sum(p.numel() for p in net.parameters())
    assert rows["total"][0] == f"{total:,}" and f"{100 * 4096 / total:.1f} %" in rows["total"][-1]
    models.main(["resnet20", "--act", "sign"])
    last = next(line.split("│") for line in capsys.readouterr().out.splitlines() if "total" in line)
    assert [cell.strip() for cell in last[2:5]] == ["272,602", "40.8 M", "40.4 M"], "the ends are not binary"
    macs = models.count_macs(models.build("resnet20", 10), images(1))
    assert sum(macs.values()) - macs["conv1"] - macs["fc"] == 40_813_184 - 442_368 - 640
    with pytest.raises(SystemExit, match="no network is called 'resnet21'"):
        models.main(["resnet21"])
