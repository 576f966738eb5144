"""ProxConnect++ (NeurIPS 2023): BNN++ and the seven methods it contains or is compared with, in one file.

    # A minute on a laptop, nothing to download:
    python train_proxconnect.py --dataset digits --arch resnet8 --epochs 12 --batch-size 64
    python train_proxconnect.py --arch resnet20 --method bnn++           # CIFAR-10
    python train_proxconnect.py --arch resnet20 --method pc              # or fp, bc, bnn, bnn+, pq, rpc
    python train_proxconnect.py --arch resnet20 --method fp --name fp                      # full precision, and
    python train_proxconnect.py --arch resnet20 --pretrained runs/fp/best.pt               # fine-tuning, 100 epochs
    # Vision transformers (pip install timm), end to end or from timm's weights:
    python train_proxconnect.py --arch deit_tiny_patch16_224 --dataset imagenet --data-dir my/imagenet
    python train_proxconnect.py --arch vit_base_patch16_224 --dataset imagenet --data-dir my/imagenet --pretrained-timm
    python train_proxconnect.py --arch vit_tiny_patch16_224 --patch-size 4                 # on CIFAR-10

    python train_proxconnect.py --resume runs/NAME                       # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

Methods that learn binary weights differ in what they compute with and in what they let through on the way back: a
*forward quantizer* F and a *backward quantizer* B. With the latent weight w* and the step size η:

    w = F(w*)      w* ← w* − η·B(w*) ⊙ ∂L/∂w

    method   F        B          method   F        B
    bc       sign     1          bnn+     sign     SS′_μ, μ = 5
    bnn      sign     |w*| ≤ 1   bnn++    SS_μ     SS′_μ, μ from 5 to 30
    pc       L_ρ      1          fp       –        –  (full precision)
    pq: ProxQuant, w ← L_ρ(w − η ∂L/∂w)                 rpc: its reverse, w* ← L_ρ(w*) − η ∂L/∂w*
    (these two quantize the weights themselves, again and again; their ρ is divided by the number of steps)

SS_μ (sign-Swish) and L_ρ (piecewise linear) are soft signs, which harden as μ and ρ grow (quantizers.py). BNN++ uses
one and its own derivative: F and B then fit together as the paper's theory wants. What is tested is always the network
of true signs, whatever F is at the time (`fp` aside); the accuracy of the relaxed one is in the column relaxed_acc.

    flags → data → network → optimizer → the training loop → evaluation

Copy with: models.py, quantizers.py, data.py, runs.py.
"""

import contextlib

import torch
from torch.nn import functional as F

import data
import models
import quantizers
import runs

# The quantizer of the forward and the backward pass, by method.
METHODS = {
    **{"fp": "none", "bc": "bwn", "bnn": "bnn", "pc": "pc"},
    **{"bnn+": "bnn+", "bnn++": "bnn++", "pq": "identity", "rpc": "identity"},
}
# What the paper does not say is ours: the learning rates, and fine-tuning's share of them.
DEFAULT_LR = {"adam": 1e-3, "adam, transformer": 5e-4, "sgd": 0.1, "sgdm": 0.1}
FINE_TUNING = 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    parser = runs.common_flags("train_proxconnect.py", __doc__, epochs=None, opt=None, schedule="cosine")
    bnn = parser.add_argument_group("binary network")
    bnn.add_argument("--method", default="bnn++", choices=METHODS, help="(default: bnn++)")
    bnn.add_argument(
        "--mu", type=float, nargs=2, default=[5.0, 30.0], help="μ at the start and at the end; bnn+: the first"
    )
    bnn.add_argument("--rho", type=float, nargs=2, default=[0.01, 10.0], help="ρ of pc, pq, rpc at the start and end")
    bnn.add_argument("--act", default="none", choices=["none", "sign"], help="sign: binary activations too (W1A1)")
    bnn.add_argument("--binarize-all", action="store_true", help="the first and the last layer too")
    bnn.add_argument("--patch-size", type=int, help="pixels a side of a transformer's patch (default: the model's)")
    bnn.add_argument("--pretrained-timm", action="store_true", help="start from timm's weights, which are downloaded")
    return parser


def complete(args) -> None:
    """Defaults that depend on other flags, and combinations that make no sense."""
    is_transformer, fine_tuning = args.arch not in models.ARCHS, args.pretrained or args.pretrained_timm
    if args.epochs is None:
        args.epochs = 100 if fine_tuning else 300
    if args.opt is None:
        args.opt = "adam" if is_transformer else "sgdm"
    if args.lr is None:
        kind = "adam, transformer" if is_transformer and args.opt == "adam" else args.opt
        args.lr = DEFAULT_LR[kind] * (FINE_TUNING if fine_tuning else 1)
    if is_transformer and not import_timm(args.arch).is_model(args.arch):
        raise runs.RunError(
            f"--arch {args.arch} is not known: use one of {', '.join(models.ARCHS)}, or a vision transformer of timm's"
        )
    if not is_transformer and (args.patch_size is not None or args.pretrained_timm):
        raise runs.RunError(f"--patch-size and --pretrained-timm are for transformers: leave them out with {args.arch}")
    if args.patch_size is not None and args.patch_size < 1:
        raise runs.RunError(f"--patch-size must be at least 1; it is {args.patch_size}")
    if args.pretrained and args.pretrained_timm:
        raise runs.RunError("--pretrained and --pretrained-timm are two places to start from: give one of them")
    if args.method == "fp" and (args.act != "none" or args.binarize_all):
        raise runs.RunError("--method fp is full precision: leave out --act and --binarize-all")
    for name in ("mu", "rho"):
        if not all(0 < value < 1e6 for value in getattr(args, name)):
            raise runs.RunError(f"--{name} wants two positive numbers, for the start and the end of training")


# ---------------------------------------------------------------------------------------------------------------------
# Network.


def import_timm(arch: str):
    data.torchvision_module("models")  # timm imports it too, and data.py knows what to do where that fails
    try:
        import timm
    except ImportError:
        raise runs.RunError(
            f"--arch {arch} is none of {', '.join(models.ARCHS)}; for a vision transformer of timm's, pip install timm"
        ) from None
    return timm


def network(args, num_classes: int, shape: tuple[int, int, int], pretrained: bool = False) -> torch.nn.Module:
    """The network that is trained, freshly initialised: images [B, *shape] -> logits [B, num_classes].

    One of models.ARCHS, or else a vision transformer of timm's (pretrained: with its weights), linear layers binary.
    """
    quantizer = METHODS[args.method]
    if args.arch in models.ARCHS:
        net = models.build(args.arch, num_classes, quantizer, args.act, args.binarize_all, *shape[:2])
    else:
        net = build_transformer(args, num_classes, quantizer, shape, pretrained)
    # Where no normalisation stands behind a layer, outputs of ±1 weights would be √fan_in times too large; so there
    # weights are measured in a unit, √2/√fan_in, and Ŵ = unit · F(w / unit). And pq and rpc pull the weights themselves
    # to ±1 unit, which must not be far from where they start.
    if args.arch not in models.ARCHS or args.arch in models.UNNORMALISED or args.method in ("pq", "rpc"):
        for layer in models.binary_layers(net):
            layer.unit = layer.scale = models.he_scale(layer)
    return net


def build_transformer(args, num_classes: int, quantizer: str, shape: tuple, pretrained: bool) -> torch.nn.Module:
    patch = {"patch_size": args.patch_size} if args.patch_size else {}
    sizes = dict(num_classes=num_classes, in_chans=shape[0], img_size=shape[1], **patch)
    called = set()
    try:
        net = import_timm(args.arch).create_model(args.arch, pretrained, **sizes)
        hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in net.modules()]
        with torch.no_grad():
            net.eval()(torch.zeros(1, *shape))
        for hook in hooks:
            hook.remove()
        models.binarize_(net, quantizer, args.act, first=args.binarize_all, last=args.binarize_all)
    except Exception as e:  # a network without img_size, a patch that does not fit, no connection, …: all kinds
        reason = " ".join(str(e).split())[:150]
        weights = " with its weights" if pretrained else ""
        advice = "go where there is a network, or leave out --pretrained-timm, or choose" if pretrained else "choose"
        raise runs.RunError(
            f"timm's {args.arch} cannot be made{weights} for images of {shape[1]} pixels ({reason}): {advice} "
            "another vision transformer or --patch-size"
        ) from None
    # Swin v2 and BEiT compute with qkv.weight by themselves, past the layer.
    if not called.issuperset(models.binary_layers(net)) or isinstance(net.get_classifier(), tuple):
        raise runs.RunError(
            f"timm's {args.arch} does not call all its linear layers, or has two heads: use a ViT or a DeiT that is "
            "not distilled"
        )
    return net


@torch.no_grad()
def apply_linear_quantizer(layers, rho: torch.Tensor) -> None:
    """w ← L_ρ(w) for the latent weights themselves."""
    for layer in layers:
        layer.weight.copy_(quantizers.linear_quantizer(layer.weight / layer.unit, rho) * layer.unit)


@contextlib.contextmanager
def true_signs(layers):
    """Within it, the layers compute with sign(w*)."""
    relaxed = [(layer.quantizer, layer.options) for layer in layers]
    for layer in layers:
        layer.quantizer, layer.options = "bwn", {}
    try:
        yield
    finally:
        for layer, (quantizer, options) in zip(layers, relaxed, strict=True):
            layer.quantizer, layer.options = quantizer, options


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def main(argv=None) -> int:
    args, resumed = runs.parse(flags(), argv)
    complete(args)
    device = runs.pick_device(args.device)
    part = runs.start_processes(device)
    torch.manual_seed(args.seed)

    # Data.
    train, test = data.load(
        *(args.dataset, args.data_dir, device, args.batch_size, args.seed, not args.no_crop, not args.no_flip),
        *(args.image_size, args.workers, runs.console.print, part),
    )

    # Network. The latent weights are its parameters. μ and ρ are tensors that all layers share.
    net = network(args, train.num_classes, train.shape, args.pretrained_timm and not resumed)
    net.to(device)
    runs.load_weights(net, args, resumed)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    mu, rho = (torch.tensor(float(start), device=device) for start in (args.mu[0], args.rho[0]))
    for layer in layers:
        layer.options = {"bnn+": {"mu": mu}, "bnn++": {"mu": mu}, "pc": {"rho": rho}}.get(args.method, {})
    if args.eval_only:
        with true_signs(layers):
            return runs.report(*runs.evaluate(model, test, device, args.amp), test.size)

    optimizer = runs.make_optimizer(net.parameters(), args)

    # The run: at the start, or exactly where the resumed one stopped.
    kind, about = args.method, f"method: {args.method}"
    parts = {"model": net, "optimizer": optimizer}
    run = runs.Run(args, kind, about, (train, test), device, models.sign_bits(layers), resumed, **parts)

    net.train()
    with run:
        while run.goes_on():
            for batch in run.batches():
                run.set_learning_rate(optimizer)
                progress = run.step / run.total_steps if args.method != "bnn+" else 0.0  # bnn+'s μ is constant
                mu.fill_(args.mu[0] + progress * (args.mu[1] - args.mu[0]))
                rho.fill_(args.rho[0] + progress * (args.rho[1] - args.rho[0]))
                optimizer.zero_grad()
                for images, labels, share in runs.parts(model, *batch, args.accumulate):
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        logits = model(images)
                    loss = F.cross_entropy(logits.float(), labels)
                    (share * loss).backward()  # every binary layer's weight.grad is now B(w*) ⊙ ∂L/∂w
                    run.count(loss, logits, labels)
                # pq and rpc quantize the weights themselves, so that each step's shift adds to those before: with ρ
                # undivided all weights would be at ±1, never to change sign again, within 100 steps.
                if args.method == "rpc":
                    apply_linear_quantizer(layers, rho / run.total_steps)
                optimizer.step()
                if args.method == "pq":
                    apply_linear_quantizer(layers, rho / run.total_steps)
            if run.leaving:
                break
            relaxed_loss, relaxed_acc = test_loss, test_acc = runs.evaluate(model, test, device, args.amp)
            if args.method in ("pc", "bnn++", "pq", "rpc"):
                with true_signs(layers):
                    test_loss, test_acc = runs.evaluate(model, test, device, args.amp)
            relaxed = dict(relaxed_loss=relaxed_loss, relaxed_acc=relaxed_acc)
            run.end_epoch(test_loss, test_acc, models.sign_bits(layers), **relaxed)
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
