"""Binary layers, the networks they are used in, and `binarize_()`, which makes any network binary in place.

Copy this file with quantizers.py.

    model = build("resnet20", num_classes=10)                     # a CIFAR ResNet with binary weights
    model = binarize_(my_network, quantizer="dorefa")             # or: your own
    for layer in binary_layers(model): print(layer.weight.shape)  # what FSG(layers) in hypernet.py takes
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, step_activation


class ModelError(ValueError):
    """There is no such network; the message is one sentence that says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Binary layers: the usual layer with Ŵ = Q(W) in place of W. `weight` stays the latent weight W, so optimizers,
# initialisation, checkpoints and state dicts work as ever, and a full-precision checkpoint loads unchanged.


class _Binary:
    """What BinaryConv2d and BinaryLinear share.

    quantizer, act: names (quantizers.py). options: the quantizer's keyword arguments, such as {"ratio": 0.5}.
    unit, scale: constants in Ŵ = scale · Q(W / unit).
    With act 'si' a layer has two parameters more, theta and delta [C_in], and the constant rho.
    """

    quantizer: str
    act: str
    options: dict = {}  # noqa: RUF012 (replaced, never changed)
    unit = scale = 1.0
    rho = 0.3

    def binary_weight(self) -> Tensor:
        """Ŵ, the weight the layer computes with; same shape as `weight`."""
        w = self.weight if self.unit == 1 else self.weight / self.unit
        w = WEIGHT_QUANTIZERS[self.quantizer](w, **self.options)
        return w if self.scale == 1 else w * self.scale

    def binary_input(self, x: Tensor) -> Tensor:
        if self.act != "si":
            return ACTIVATION_QUANTIZERS[self.act](x)
        channels = (-1, 1, 1) if isinstance(self, nn.Conv2d) else (-1,)
        return step_activation(x, self.theta.view(channels), self.delta.view(channels), self.rho)

    def apply_weight(self, function: Callable, x: Tensor) -> Tensor:
        """function(binary input, Ŵ, bias), function being the layer's convolution or product.

        In eval mode binary inputs are summed first and multiplied by the filter's scale afterwards: a sum of −1, 0 and
        +1 is exact in every order, a sum of ±0.0123 is not. So what the next binary activation compares with its
        threshold does not depend on the batch size, the library or the machine, nor on the format (export.py).
        """
        x, w = self.binary_input(x), self.binary_weight()
        if self.training or self.act == "none":
            return function(x, w, self.bias)
        scale = w.detach().abs().flatten(1).amax(1).clamp_min(torch.finfo(w.dtype).tiny)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has not the digits of a large sum
            outputs = function(x.float(), w / scale.view(-1, *[1] * (w.dim() - 1)), None)
        like_outputs = (-1, 1, 1) if isinstance(self, nn.Conv2d) else (-1,)
        outputs = outputs * scale.view(like_outputs)
        return outputs if self.bias is None else outputs + self.bias.view(like_outputs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantizer={self.quantizer}, act={self.act}"


class BinaryConv2d(_Binary, nn.Conv2d):
    """nn.Conv2d whose forward uses binary weights: x [B, C_in, H, W] -> [B, C_out, H', W']."""

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(self._conv_forward, x)


class BinaryLinear(_Binary, nn.Linear):
    """nn.Linear whose forward uses binary weights: x [..., F_in] -> [..., F_out]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(F.linear, x)


class FloatConv2d(nn.Conv2d):
    """nn.Conv2d that binarize_() leaves in full precision."""


def binary_layers(model: nn.Module) -> list[nn.Module]:
    """The binary layers of a model, in module order (the order of `model.modules()`)."""
    return [m for m in model.modules() if isinstance(m, _Binary)]


def binary_layer_names(model: nn.Module) -> list[str]:
    """Their names, in the same order."""
    return [name for name, m in model.named_modules() if isinstance(m, _Binary)]


def binarize_(
    model: nn.Module, quantizer: str = "dorefa", act: str = "none", first: bool = False, last: bool = False
) -> nn.Module:
    """Turn the Conv2d and Linear layers of any model into binary ones, in place, keeping their weights.

    quantizer: one of WEIGHT_QUANTIZERS (quantizers.py), or 'none', which leaves the model as it is. A quantizer's own
        settings are the layers' `options`: for layer in binary_layers(model): layer.options = {"ratio": 0.5}.
    act: 'none' (full-precision activations), 'sign' or 'si' (inputs of the binary layers are binarized too, to −1 and
        +1 or, as in Si-BNN, to 0 and 1; a ReLU right before such a layer would make them all 1, so use Hardtanh, PReLU
        or nothing there). 'si' adds the parameters theta and delta to each layer: make the optimizer afterwards.
    first, last: whether the first and the last of these layers, in module order, become binary too. They are left in
        full precision by default, as nearly every BNN paper does.
    The layer objects stay the same ones: parameters, hooks and optimizers that hold them are not disturbed.
    Returns the model. Raises ModelError for an unknown name or when nothing is left to binarize.
    """
    if quantizer != "none" and quantizer not in WEIGHT_QUANTIZERS:
        raise ModelError(f"no quantizer is called {quantizer!r}: use one of none, {', '.join(WEIGHT_QUANTIZERS)}")
    if act not in ACTIVATION_QUANTIZERS:
        raise ModelError(f"no activation is called {act!r}: use one of {', '.join(ACTIVATION_QUANTIZERS)}")
    if quantizer == "none":
        return model
    twin = {nn.Conv2d: BinaryConv2d, nn.Linear: BinaryLinear, BinaryConv2d: BinaryConv2d, BinaryLinear: BinaryLinear}
    layers = [m for m in model.modules() if type(m) in twin]
    layers = layers[0 if first else 1 : None if last else -1]
    if not layers:
        raise ModelError("nothing to binarize: the model has no Conv2d or Linear between its first and its last one")
    for layer in layers:
        layer.__class__ = twin[type(layer)]  # same data, other forward
        layer.quantizer, layer.act = quantizer, act
        if act == "si" and not hasattr(layer, "theta"):
            channels = layer.weight.new_ones(layer.weight.shape[1] * getattr(layer, "groups", 1))
            layer.theta, layer.delta = nn.Parameter(0 * channels), nn.Parameter(channels)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# ResNets. Module names are torchvision's (conv1, bn1, layer1.0.conv1, …, downsample.0, fc).

Nonlinearity = Callable[[int], nn.Module]  # channels -> module


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: [B, C_in, H, W] -> [B, C_out, H/stride, W/stride] (He et al., 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int, nonlinearity: Nonlinearity):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nonlinearity(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class BiRealBlock(nn.Module):
    """The same with a shortcut around each convolution, so that what a binary activation destroys is not lost: Bi-Real
    Net (Liu et al., ECCV 2018). The shortcut's 1×1 convolution stays full precision.

    The nonlinearity stands before the normalisation, as in Equal Bits (there a PReLU; Bi-Real Net has none).
    """

    def __init__(self, c_in: int, c_out: int, stride: int, nonlinearity: Nonlinearity):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.relu1, self.bn1 = nonlinearity(c_out), nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.relu2, self.bn2 = nonlinearity(c_out), nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(FloatConv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), pool)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.relu1(self.conv1(x))) + shortcut
        return self.bn2(self.relu2(self.conv2(x))) + x


class ResNet(nn.Module):
    """A ResNet: x [B, in_channels, H, W] -> logits [B, num_classes].

    blocks: blocks per stage; widths: channels per stage (each later stage halves the resolution).
    stem: 'cifar' is one 3×3 convolution; 'imagenet' is a 7×7 convolution of stride 2 and a max-pool.
    norm_fc: a BatchNorm1d before the classifier, which MetaQuant's and FSG's CIFAR networks have.
    """

    def __init__(
        self,
        block: type[nn.Module],
        blocks: list[int],
        widths: list[int],
        num_classes: int,
        stem: str,
        in_channels: int,
        nonlinearity: Nonlinearity,
        norm_fc: bool,
    ):
        super().__init__()
        if stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nonlinearity(widths[0])
        c_in = widths[0]
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (name, depth, c_out) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(block(c_in, c_out, 2 if i > 0 and j == 0 else 1, nonlinearity))
                c_in = c_out
            self.add_module(name, stage)
        self.bn_fc = nn.BatchNorm1d(c_in) if norm_fc else nn.Identity()
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.bn_fc(x.mean(dim=(2, 3))))


# 6n + 2 layers: n blocks in each of three stages. resnet8 is there for laptops and small images.
CIFAR_RESNETS = {f"resnet{6 * n + 2}": n for n in (1, 3, 5, 7, 9, 18)}
IMAGENET_RESNETS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}


# ---------------------------------------------------------------------------------------------------------------------
# Networks without shortcuts.


class PlainNet(nn.Module):
    """Convolutions, then fully connected layers: x [B, in_channels, H, W] -> logits [B, num_classes].

    features: what stands behind each other: C is a 3×3 convolution to C channels, (C, k, stride, padding) a k×k one,
        'M' a 2×2 and 'P' a 3×3 max-pool of stride 2. Each convolution comes with [pool,] [BatchNorm,] nonlinearity, in
        this order: a pool of binary values would be nearly all 1, so it stands before the next layer's quantizer.
    side: pixels a side of what the fully connected layers see; images of another size are pooled to it.
    hidden: widths of the fully connected layers before the classifier.
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
        # ceil_mode: of tiny images something is left.
        pools = {"M": lambda: nn.MaxPool2d(2, ceil_mode=True), "P": lambda: nn.MaxPool2d(3, 2, ceil_mode=True)}
        self.features, self.classifier = nn.Sequential(), nn.Sequential()
        c = in_channels
        for i, feature in enumerate(features):
            if feature in pools:
                continue
            width, k, stride, padding = feature if isinstance(feature, tuple) else (feature, 3, 1, 1)
            self.features.append(nn.Conv2d(c, width, k, stride, padding, bias=not norm))
            if i + 1 < len(features) and features[i + 1] in pools:
                self.features.append(pools[features[i + 1]]())
            if norm:
                self.features.append(nn.BatchNorm2d(width))
            self.features.append(nonlinearity(width))
            c = width
        self.pool = nn.AdaptiveAvgPool2d(side)
        c *= side * side
        for width in hidden:
            self.classifier.append(nn.Linear(c, width, bias=not norm))
            if norm:
                self.classifier.append(nn.BatchNorm1d(width))
            self.classifier.append(nonlinearity(width))
            c = width
        self.classifier.append(nn.Linear(c, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


VGG16 = [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"]
ALEXNET = [(96, 11, 4, 2), "P", (256, 5, 1, 2), "P", 384, 384, 256, "P"]
PLAIN_NETS = {  # features, side, hidden, norm
    "lenet": ([(32, 5, 1, 2), "M", (64, 5, 1, 2), "M"], 7, [512], True),  # MNIST
    "vgg-small": ([128, 128, "M", 256, 256, "M", 512, 512, "M"], 4, [], True),  # CIFAR
    "vgg16": (VGG16, 1, [], True),
    "alexnet": (ALEXNET, 6, [4096, 4096], True),  # ImageNet
    # The shallow networks without normalisation that Equal Bits takes from Frankle and Carbin (ICLR 2019); CIFAR.
    "conv2": ([64, 64, "M"], 16, [256, 256], False),
    "conv4": ([64, 64, "M", 128, 128, "M"], 8, [256, 256], False),
    "conv6": ([64, 64, "M", 128, 128, "M", 256, 256, "M"], 4, [256, 256], False),
    "conv8": ([64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M"], 2, [256, 256], False),
}

# ---------------------------------------------------------------------------------------------------------------------
# All of them, by name.

UNNORMALISED = [name for name, (*_, norm) in PLAIN_NETS.items() if not norm]
BIREAL_NETS = [f"birealnet{depth}{prelu}" for depth in (8, 18, 20, 34) for prelu in ("", "-prelu")]
ARCHS = [*CIFAR_RESNETS, *IMAGENET_RESNETS, *BIREAL_NETS, *PLAIN_NETS]
# The sign of a ReLU's output is always +1, so with sign activations the bounded linear unit takes its place. Si-BNN's
# activation is a non-linearity of its own, on both sides of its threshold.
NONLINEARITIES = {
    "none": lambda channels: nn.ReLU(inplace=True),
    "sign": lambda channels: nn.Hardtanh(inplace=True),
    "si": lambda channels: nn.Identity(),
}


def build(
    arch: str,
    num_classes: int,
    quantizer: str = "dorefa",
    act: str = "none",
    binarize_all: bool = False,
    in_channels: int = 3,
    image_size: int | None = None,
) -> nn.Module:
    """A freshly initialised network: x [B, in_channels, H, W] -> logits [B, num_classes].

    arch: one of ARCHS.
        resnet8/20/32/44/56/110 (CIFAR: 16-32-64 channels) and resnet18/34 (64 to 512 channels);
        birealnet8/20 and birealnet18/34, the same with a shortcut around each convolution, and -prelu;
        lenet, vgg-small, vgg16, alexnet, conv2/4/6/8.
    quantizer, act: see `binarize_`; quantizer 'none' is the full-precision network of the same shape and state dict.
    binarize_all: the first convolution and the classifier become binary too (MetaQuant's setting).
    image_size: pixels a side. Up to 96, the networks of 18 and 34 layers begin with a 3×3 convolution, as they do on
        CIFAR; otherwise with ImageNet's 7×7 one and a max-pool.
    In conv2/4/6/8, where no normalisation follows a layer, bits are multiplied by `he_scale`.
    Raises ModelError for an unknown name, and for AlexNet on images that it would shrink to nothing.
    """
    if arch not in ARCHS:
        raise ModelError(f"no network is called {arch!r}: use one of {', '.join(ARCHS)}")
    if act not in NONLINEARITIES:
        raise ModelError(f"no activation is called {act!r}: use one of {', '.join(NONLINEARITIES)}")
    if arch == "alexnet" and image_size and image_size < 63:
        raise ModelError(f"alexnet wants images of at least 63 pixels a side; these have {image_size}: use vgg-small")
    nonlinearity = NONLINEARITIES[act]
    if arch in PLAIN_NETS:
        net = PlainNet(*PLAIN_NETS[arch], num_classes, in_channels, nonlinearity)
    else:
        block, resnet = BasicBlock, arch
        if arch in BIREAL_NETS:
            block, resnet = BiRealBlock, arch.replace("bireal", "res").removesuffix("-prelu")
            if arch.endswith("-prelu"):
                nonlinearity = nn.PReLU
            elif act == "sign":
                nonlinearity = NONLINEARITIES["si"]  # none: the sign alone, as in Bi-Real Net
        if resnet in CIFAR_RESNETS:
            blocks, widths, stem = [CIFAR_RESNETS[resnet]] * 3, [16, 32, 64], "cifar"
        else:
            blocks, widths = IMAGENET_RESNETS[resnet], [64, 128, 256, 512]
            stem = "cifar" if image_size and image_size <= 96 else "imagenet"
        norm_fc = arch in CIFAR_RESNETS
        net = ResNet(block, blocks, widths, num_classes, stem, in_channels, nonlinearity, norm_fc)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    binarize_(net, quantizer, act, first=binarize_all, last=binarize_all)
    if arch in UNNORMALISED and quantizer not in ("bwn-f", "identity"):
        for layer in binary_layers(net):
            layer.scale = he_scale(layer)
    return net


def he_scale(layer: nn.Module) -> float:
    """√2/√fan_in. Signs times this keep the variance of what passes through layers and ReLUs (He et al., 2015)."""
    return math.sqrt(2 / layer.weight[0].numel())


@torch.no_grad()
def sign_bits(layers: list[nn.Module]) -> Tensor:
    """The bits of all binary weights, [N] bool, True for +1, layer after layer (N = 0 without binary layers)."""
    return torch.cat([(layer.binary_weight() > 0).flatten() for layer in layers]) if layers else torch.empty(0).bool()
