"""binarize_() on the networks that people have: each computes what a plain network with the weights Ŵ computes."""

import contextlib
import copy
import importlib
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import models

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

    def forward(self, x):
        x = self.stem(x).relu()
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


NETWORKS = {  # the network and an example; which parameters are binary where this is not "all matrices but the ends'"
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


# ---------------------------------------------------------------------------------------------------------------------


def outputs_of(net, example, training, grad):
    """All floating-point outputs. Dropout draws the same numbers each time."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        return [t for t in models._call(net.train(training), example) if t.is_floating_point()]


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


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, with_example, capsys):
    torch.manual_seed(0)
    net, example = NETWORKS[name]()
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p.data)  # heads that start at 0 would hide the rest
    capsys.readouterr()
    before, kinds = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    full = outputs_of(net, example, False, False)
    net.load_state_dict(before)
    assert models.binarize_(net, "dorefa", example=example if with_example else None) is net
    layers, said = models.binary_layers(net), capsys.readouterr().err
    print(said)
    # The share of binary weights is as stated; no weight counts twice; state dicts fit as they are.
    count = sum(layer.weight.numel() for layer in layers)
    total = sum(p.numel() for p in net.parameters())
    assert (
        f"{len(layers)} layers with {100 * count / total:.1f} % of {total:,} parameters are binary" in said
        and said.count("\n") == 1
    )
    assert len({id(layer.weight) for layer in layers}) == len(layers) == len(models.binary_layer_names(net))
    assert {id(layer.weight) for layer in layers} <= {id(p) for p in net.parameters()}
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    check_computes_with_bits(net, example)
    clone = copy.deepcopy(net)
    file = io.BytesIO()
    with contextlib.suppress(AttributeError, TypeError):  # networks that cannot be saved whole anyway
        torch.save(net, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
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
        assert models.binary_layer_names(net) == ["5"] and "1 layers with" in (said := capsys.readouterr().err)
        assert "weight_norm" in said
    assert [torch.equal(layer(x), y) for layer, y in zip(linear, before, strict=True)] == [True] * 5 + [False] + [True]
