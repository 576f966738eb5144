"""Binary layers, the networks they are used in, and `binarize_()`, which makes any network binary in place.

Copy this file with quantizers.py.

    model = build("resnet20", num_classes=10)                     # a CIFAR ResNet with binary weights
    model = binarize_(my_network, quantizer="dorefa")             # or: your own
    for layer in binary_layers(model): print(layer.weight.shape)  # what FSG(layers) in hypernet.py takes
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

# ---------------------------------------------------------------------------------------------------------------------
# Binary layers: the usual layer with Ŵ = Q(W) in place of W. `weight` stays the latent weight W, so optimizers,
# initialisation, checkpoints and state dicts work as ever, and a full-precision checkpoint loads unchanged.


class _Binary:
    """What BinaryConv2d and BinaryLinear share: the attributes `quantizer` and `act` (names, see quantizers.py)."""

    quantizer: str
    act: str

    def binary_weight(self) -> Tensor:
        """Ŵ, the weight the layer computes with; same shape as `weight`."""
        return WEIGHT_QUANTIZERS[self.quantizer](self.weight)

    def binary_input(self, x: Tensor) -> Tensor:
        return ACTIVATION_QUANTIZERS[self.act](x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantizer={self.quantizer}, act={self.act}"


class BinaryConv2d(_Binary, nn.Conv2d):
    """nn.Conv2d whose forward uses binary weights: x [B, C_in, H, W] -> [B, C_out, H', W']."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.binary_input(x), self.binary_weight(), self.bias)


class BinaryLinear(_Binary, nn.Linear):
    """nn.Linear whose forward uses binary weights: x [..., F_in] -> [..., F_out]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.binary_input(x), self.binary_weight(), self.bias)


def binary_layers(model: nn.Module) -> list[nn.Module]:
    """The binary layers of a model, in module order (the order of `model.modules()`)."""
    return [m for m in model.modules() if isinstance(m, _Binary)]


def binarize_(
    model: nn.Module, quantizer: str = "dorefa", act: str = "none", first: bool = False, last: bool = False
) -> nn.Module:
    """Turn the Conv2d and Linear layers of any model into binary ones, in place, keeping their weights.

    quantizer: 'dorefa', 'bwn', 'bwn-f' (quantizers.py), or 'none', which leaves the model as it is.
    act: 'none' (full-precision activations) or 'sign' (inputs of the binary layers are binarized too; a ReLU right
        before such a layer would make them all +1, so use Hardtanh or PReLU there).
    first, last: whether the first and the last of these layers, in module order, become binary too. They are left in
        full precision by default, as nearly every BNN paper does.
    The layer objects stay the same ones: parameters, hooks and optimizers that hold them are not disturbed.
    Returns the model. Raises ValueError for an unknown name or when nothing is left to binarize.
    """
    if quantizer != "none" and quantizer not in WEIGHT_QUANTIZERS:
        raise ValueError(f"no quantizer is called {quantizer!r}: use one of none, {', '.join(WEIGHT_QUANTIZERS)}")
    if act not in ACTIVATION_QUANTIZERS:
        raise ValueError(f"no activation is called {act!r}: use one of {', '.join(ACTIVATION_QUANTIZERS)}")
    if quantizer == "none":
        return model
    twin = {nn.Conv2d: BinaryConv2d, nn.Linear: BinaryLinear, BinaryConv2d: BinaryConv2d, BinaryLinear: BinaryLinear}
    layers = [m for m in model.modules() if type(m) in twin]
    layers = layers[0 if first else 1 : None if last else -1]
    if not layers:
        raise ValueError("nothing to binarize: the model has no Conv2d or Linear between its first and its last one")
    for layer in layers:
        layer.__class__ = twin[type(layer)]  # same data, other forward
        layer.quantizer, layer.act = quantizer, act
    return model


# ---------------------------------------------------------------------------------------------------------------------
# ResNets. Module names are torchvision's (conv1, bn1, layer1.0.conv1, …, downsample.0, fc).


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: [B, C_in, H, W] -> [B, C_out, H/stride, W/stride] (He et al., 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int, nonlinearity: type[nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nonlinearity(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet(nn.Module):
    """A ResNet of BasicBlocks: x [B, in_channels, H, W] -> logits [B, num_classes].

    blocks: blocks per stage; widths: channels per stage (each later stage halves the resolution).
    stem: 'cifar' is one 3×3 convolution; 'imagenet' is a 7×7 convolution of stride 2 and a max-pool.
    The CIFAR networks have a BatchNorm1d before the classifier, as MetaQuant's and FSG's experiments do.
    """

    def __init__(
        self,
        blocks: list[int],
        widths: list[int],
        num_classes: int,
        stem: str = "cifar",
        in_channels: int = 3,
        nonlinearity: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        if stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nonlinearity(inplace=True)
        c_in = widths[0]
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (name, depth, c_out) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(BasicBlock(c_in, c_out, 2 if i > 0 and j == 0 else 1, nonlinearity))
                c_in = c_out
            self.add_module(name, stage)
        self.bn_fc = nn.BatchNorm1d(c_in) if stem == "cifar" else nn.Identity()
        self.fc = nn.Linear(c_in, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.bn_fc(x.mean(dim=(2, 3))))


# 6n + 2 layers: n blocks in each of three stages. resnet8 is there for laptops and small pictures.
CIFAR_RESNETS = {f"resnet{6 * n + 2}": n for n in (1, 3, 5, 7, 9, 18)}
IMAGENET_RESNETS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}
ARCHS = [*CIFAR_RESNETS, *IMAGENET_RESNETS]


def build(
    arch: str,
    num_classes: int,
    quantizer: str = "dorefa",
    act: str = "none",
    binarize_all: bool = False,
    in_channels: int = 3,
) -> nn.Module:
    """A freshly initialised network: x [B, in_channels, H, W] -> logits [B, num_classes].

    arch: resnet8/20/32/44/56/110 (CIFAR: 16-32-64 channels) or resnet18/34 (ImageNet).
    quantizer, act: see `binarize_`; quantizer 'none' is the full-precision network of the same shape and state dict.
    binarize_all: the first convolution and the classifier become binary too (MetaQuant's setting).
    Raises ValueError for an unknown name.
    """
    if arch not in ARCHS:
        raise ValueError(f"no network is called {arch!r}: use one of {', '.join(ARCHS)}")
    # The sign of a ReLU's output is always +1, so with binary activations the bounded linear unit takes its place.
    nonlinearity = nn.Hardtanh if act == "sign" else nn.ReLU
    if arch in CIFAR_RESNETS:
        depth = CIFAR_RESNETS[arch]
        net = ResNet([depth] * 3, [16, 32, 64], num_classes, "cifar", in_channels, nonlinearity)
    else:
        net = ResNet(IMAGENET_RESNETS[arch], [64, 128, 256, 512], num_classes, "imagenet", in_channels, nonlinearity)
    return binarize_(net, quantizer, act, first=binarize_all, last=binarize_all)


@torch.no_grad()
def sign_bits(layers: list[nn.Module]) -> Tensor:
    """The bits of all binary weights, [N] bool, True for +1, layer after layer (N = 0 without binary layers)."""
    return torch.cat([(layer.binary_weight() > 0).flatten() for layer in layers]) if layers else torch.empty(0).bool()
