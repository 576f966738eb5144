"""The networks of the papers. The public names of binarize.py, such as `binarize_`, can be imported from here too.

    model = build("resnet20", num_classes=10)  # a CIFAR ResNet with binary weights

`python models.py resnet20` prints the layers of a network: weights, memory, operations, and whether they are binary.

Copy with: binarize.py, quantizers.py.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from binarize import (  # noqa: F401 (some are for users of this file)
    SCALED,
    BinaryConv2d,
    BinaryLinear,
    FloatConv2d,
    ModelError,
    Projection,
    binarize_,
    binary_layer_names,
    binary_layers,
    count_macs,
    describe,
    has_inputs_first,
    he_scale,
    latent_readers,
    named_binary_layers,
    plain_class,
    summary,
    weight_signs,
)
from quantizers import WEIGHT_QUANTIZERS

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
    """A shortcut without parameters: every `stride`-th pixel, with channels of zeros before and after the input's.

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

    The shortcuts carry full-precision values past the binary activations. A nonlinearity, if there is one, is between
    each convolution and its BatchNorm. Bi-Real Net has none besides the sign, whose gradient it approximates by a
    piecewise linear function; `sign_activation` has the gradient of the hard tanh.

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
    """Equal Bits' block, with a shortcut around each convolution. It uses one PReLU twice.

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
    block, nonlinearity, shortcut: the class of the blocks, and its arguments.
    stem_nonlinearity: after the stem's BatchNorm, or before it with nonlinearity_first.
    last_nonlinearity: before the average pool.
    norm_fc: whether a BatchNorm1d precedes the classifier. fc_nonlinearity: between it and the classifier.
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

# Facts for `binarize_`: the papers do not multiply binary weights by a constant, and `forward` only calls its layers.
for kind in (BasicBlock, IRNetBlock, BiRealBlock, EqualBitsBlock, SiBNNBlock, ResNet, PlainNet):
    kind.default_scale, kind.forward.calls_layers = 1.0, True

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
    "resnets also with -metaquant, 8 and 20 with -irnet, 8, 18, 20 and 34 with -sibnn or -equalbits; birealnets with "
    "-prelu"
)
MULTI_SHORTCUT_NETS = [*IRNET_NETS, *SIBNN_NETS, *EQUALBITS_NETS, *BIREAL_NETS]  # a shortcut around each convolution

relu: Nonlinearity = lambda channels: nn.ReLU(inplace=True)
hardtanh: Nonlinearity = lambda channels: nn.Hardtanh(inplace=True)
no_nonlinearity: Nonlinearity = lambda channels: nn.Identity()

# The nonlinearity between the layers, by activation quantizer. The sign of a ReLU's output is always +1, so networks
# with sign activations use the hard tanh. Si-BNN's step is a nonlinearity itself.
NONLINEARITIES = {"none": relu, "sign": hardtanh, "si": no_nonlinearity}


def resnet_design(arch: str, act: str, stem: str) -> dict:
    """The keyword arguments of ResNet that make the paper's network of that name."""
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
        resnet18/34-metaquant: FSG's ResNets of 64 to 512 channels without the BatchNorm1d. MetaQuant's code has none.
        resnet8/20-irnet: IR-Net's. With binary activations (W1A1) it has a shortcut around each convolution, with
            act 'none' (W1A32) one around two. The shortcuts have no parameters.
        resnet8/20-sibnn and resnet18/34-sibnn: Si-BNN's, see SiBNNBlock.
        resnet8/20-equalbits and resnet18/34-equalbits: Equal Bits', see EqualBitsBlock.
        birealnet8/20 and birealnet18/34: Bi-Real Net's, with the shortcuts of Si-BNN's and Equal Bits' codes, whose
            average pool is behind the 1×1 convolution and its BatchNorm. In Bi-Real Net's own code it is before them.
            The suffix -prelu selects PReLU as nonlinearity.
        lenet, vgg-small, vgg16, alexnet, conv2/4/6/8: networks without shortcuts.
    quantizer, act: see `binarize_`. quantizer 'none' gives a full-precision network with the same names of parameters.
    binarize_all: whether the first convolution and the classifier become binary too, as in MetaQuant and in FSG's
        released code.
    image_size: height and width of the images in pixels. Networks of 18 and 34 layers start with a 3×3 convolution if
        it is at most 96, else with a 7×7 convolution and a max pool (ImageNet's stem). None means ImageNet's stem.

    The weights start as in the authors' codes (Bi-Real Net's as in FSG's code), see `initialise`. conv2/4/6/8 have no
    normalisation, so their binary weights are multiplied by `he_scale`, unless the quantizer has a scale (SCALED in
    binarize.py).
    Raises ModelError for an unknown name, and for AlexNet on images of less than 63 pixels.
    """
    if arch not in ARCHS:
        raise ModelError(f"no network is called {arch!r}: use one of {ARCHS_IN_SHORT}")
    if act not in NONLINEARITIES:
        raise ModelError(f"no activation is called {act!r}: use one of {', '.join(NONLINEARITIES)}")
    if arch == "alexnet" and image_size and image_size < 63:
        raise ModelError(f"alexnet needs images of at least 63×63 pixels; these have {image_size}: use vgg-small")
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
    binarize_(net, quantizer, act, first=binarize_all, last=binarize_all, quiet=True)
    if arch in UNNORMALISED and quantizer not in SCALED:
        for layer in binary_layers(net):
            layer.scale = he_scale(layer)
    return net


@torch.no_grad()
def initialise(net: nn.Module, arch: str) -> None:
    """Initialise the weights of the convolutions and of the classifier. n is the number of weights of a filter.

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the layers of a network: weights, memory, MACs.")
    parser.add_argument("arch", help=f"one of {ARCHS_IN_SHORT}")
    quantizers = f"one of none, {', '.join(WEIGHT_QUANTIZERS)}"
    parser.add_argument("--quantizer", default="dorefa", help=f"{quantizers} (default: dorefa)")
    parser.add_argument("--act", default="none", help="inputs of the binary layers: none, sign, si (default: none)")
    parser.add_argument("--binarize-all", action="store_true", help="binarize the first and the last layer too")
    parser.add_argument("--num-classes", type=int, default=10, help="number of classes (default: 10)")
    parser.add_argument("--in-channels", type=int, default=3, help="channels of an image (default: 3)")
    parser.add_argument("--image-size", type=int, help="width in pixels (default: 32; 224 for ImageNet's networks)")
    args = parser.parse_args(argv)
    for name in ("num_classes", "in_channels", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; it is {getattr(args, name)}")
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
