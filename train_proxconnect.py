"""ProxConnect++: binary weights by forward and backward quantizers, with BNN++ and the methods of its comparison.

    # One minute on a laptop, without a download:
    python train_proxconnect.py --dataset digits --arch resnet8 --epochs 12 --batch-size 64
    python train_proxconnect.py --arch resnet20 --method bnn++                             # CIFAR-10
    python train_proxconnect.py --arch resnet20 --method pc                                # or any other method below
    # Full precision, then fine-tuning from it:
    python train_proxconnect.py --arch resnet20 --method fp --name fp
    python train_proxconnect.py --arch resnet20 --pretrained runs/fp/best.pt
    # Vision transformers (pip install timm), from scratch or from timm's weights. The last command is for CIFAR-10:
    python train_proxconnect.py --arch deit_tiny_patch16_224 --dataset imagenet --data-dir my/imagenet
    python train_proxconnect.py --arch vit_base_patch16_224 --dataset imagenet --data-dir my/imagenet --pretrained-timm
    python train_proxconnect.py --arch vit_tiny_patch16_224 --patch-size 4

    python train_proxconnect.py --resume runs/NAME                       # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

Paper: Understanding Neural Network Binarization with Forward and Backward Proximal Quantizers (NeurIPS 2023),
https://arxiv.org/abs/2402.17710

A method is a *forward quantizer* F, which makes the weights that the network computes with, and a *backward quantizer*
B, which scales their gradient. With the latent weights w* and the step size η:

    w = F(w*)
    w* ← w* − η · B(w*) ⊙ ∂L/∂w

    method   F        B             method   F        B
    fp       w*       1             pc       L_ρ      1
    bc       sign     1             bnn+     sign     SS′_μ, μ = 5
    bnn      sign     1[|w*| ≤ 1]   bnn++    SS_μ     SS′_μ, μ from 5 to 30

    pq (ProxQuant)           w ← L_{ρ/T}(w − η ∂L/∂w)           in a run of T steps, whose effects add up
    rpc (reverse of pc)      w* ← L_{ρ/T}(w*) − η ∂L/∂w*
    parq (PARQ)              F(w*) = clip(w*/r, −α, α), B = 1, with α = mean|w*| of each filter and r from 1 to 0

The sign-Swish SS_μ and the piecewise linear L_ρ (quantizers.py) are soft signs. They become harder as μ and ρ grow
linearly during training; the last step uses their end values. The backward quantizer of BNN++ is the derivative of its
forward quantizer. PARQ (https://arxiv.org/abs/2503.15748) has its own schedule (`inverse_slope`).

Soft signs are near ±1 for weights of order 1. So each layer divides its weights by the unit √2/√fan_in, which is about
the standard deviation of their initial values:

    w = unit · F(w* / unit)

test_acc is always the accuracy of the network with sign(w*) (parq: α sign(w*)), except for fp. The column relaxed_acc
is that of F(w*), for the methods that train with other weights than the signs. Both are measured with BatchNorm
statistics of the weights that are tested, from --bn-batches training batches. best.pt and last.pt contain the
statistics of the signs.

Networks of timm use timm's normalisation, interpolation and crop. They are trained with AdamW and a warm-up, and on
images of more than 96 pixels with DeiT's augmentation (RandAugment and random erasing; no repeated augmentation).
--mixup and --cutmix are timm's, off by default as in timm; DeiT has 0.8 and 1. With them, train_acc counts the class
with the larger fraction of an image.

    flags → data → network → optimizer → the training loop → evaluation

Copy with: models.py, binarize.py, quantizers.py, data.py, runs.py.
"""

import contextlib
import math
import random

import numpy
import torch
from torch.nn import functional as F

import data
import models
import quantizers
import runs

METHODS = {  # the quantizer of each method (quantizers.py)
    "fp": "none",
    "bc": "bwn",
    "bnn": "bnn",
    "pc": "pc",
    "bnn+": "bnn+",
    "bnn++": "bnn++",
    "pq": "identity",
    "rpc": "identity",
    "parq": "parq",
}
SWISH = ("bnn+", "bnn++")
RELAXED = ("pc", "bnn++", "pq", "rpc", "parq")  # methods that train with weights other than the signs
# The paper does not give learning rates.
DEFAULT_LR = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.1, "sgdm": 0.1}
TRANSFORMER_LR = 5e-4  # with Adam and AdamW
# From DeiT (Touvron et al., ICML 2021, https://arxiv.org/abs/2012.12877), table 9.
TRANSFORMER_DECAY = 0.05  # with AdamW, of the full-precision weights
TRANSFORMER_WARMUP = 5.0  # epochs; at most a twentieth of the run
AUGMENTATION = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}  # timm's create_transform
SWISH_LR = 10  # divides SGD's learning rate for bnn+ and bnn++: SS′_μ multiplies their gradient by up to μ
FINE_TUNING = 0.1  # factor of the learning rate when training starts from trained weights
PARQ_END = 0.9  # parq's weights are binary from this fraction of the run on
PARQ_STEEPNESS = 10  # of parq's schedule; the default of torchao's ProxPARQ


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    defaults = dict(schedule="cosine", bn_batches=32, epochs=None, opt=None, weight_decay=None, warmup=None)
    parser = runs.common_flags("train_proxconnect.py", __doc__, **defaults)
    add = parser.add_argument_group("binary network").add_argument
    add("--method", default="bnn++", choices=METHODS, help="the forward and the backward quantizer, see above")
    mu = "μ of bnn++ at the start and the end (default: 5 30); bnn+ has one value (default: 5)"
    add("--mu", type=float, nargs="+", help=mu)
    add("--rho", type=float, nargs=2, help="ρ of pc, pq and rpc at the start and the end (default: 0.01 10)")
    add("--act", default="none", choices=["none", "sign"], help="activations; sign: −1 and +1; none: full precision")
    add("--binarize-all", action="store_true", help="binarize the first and the last layer too")
    mixup = "timm's Mixup of pairs of training images, with fractions from Beta(ALPHA, ALPHA) (default: 0, off)"
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help=mixup)
    cutmix = "timm's CutMix, in the same way; with both flags, each batch gets one of them (default: 0, off)"
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help=cutmix)
    add("--patch-size", type=int, help="width of a transformer's patches in pixels (default: that of the network)")
    add("--pretrained-timm", action="store_true", help="start from timm's weights, which are downloaded")
    return parser


def complete(args) -> None:
    """Set the defaults that depend on other flags, and refuse flags that do not go together."""
    is_transformer, fine_tuning = args.arch not in models.ARCHS, args.pretrained or args.pretrained_timm
    runs.only_for(args, "method", {"mu": ("bnn+", "bnn++"), "rho": ("pc", "pq", "rpc")})
    runs.fill(args, mu=[5.0] if args.method == "bnn+" else [5.0, 30.0], rho=[0.01, 10.0])
    runs.fill(args, epochs=100 if fine_tuning else 300, opt="adamw" if is_transformer else "sgdm")
    runs.complete_betas(args)
    runs.complete_schedule(args)
    lr = TRANSFORMER_LR if is_transformer and args.opt in ("adam", "adamw") else DEFAULT_LR[args.opt]
    lr /= SWISH_LR if args.method in SWISH and args.opt in ("sgd", "sgdm") else 1
    runs.fill(args, lr=lr * FINE_TUNING if fine_tuning else lr)
    runs.fill(args, weight_decay=TRANSFORMER_DECAY if is_transformer and args.opt == "adamw" else 0.0)
    runs.fill(args, warmup=min(TRANSFORMER_WARMUP, args.epochs / 20) if is_transformer else 0.0)
    if is_transformer and not timm_for(args.arch).is_model(args.arch):
        raise runs.RunError(
            f"--arch {args.arch} is not known: use one of {models.ARCHS_IN_SHORT}, or a vision transformer of timm"
        )
    if is_transformer and args.dataset == "imagenet":
        runs.fill(args, image_size=timm_config(args.arch)["input_size"][-1])
    if not is_transformer and (args.patch_size is not None or args.pretrained_timm):
        raise runs.RunError(f"--patch-size and --pretrained-timm are for transformers: leave them out with {args.arch}")
    if args.patch_size is not None and args.patch_size < 1:
        raise runs.RunError(f"--patch-size must be at least 1; it is {args.patch_size}")
    if args.pretrained and args.pretrained_timm:
        raise runs.RunError("--pretrained and --pretrained-timm both set the first weights: give one of them")
    if args.ema is not None:
        raise runs.RunError("--ema averages weights, but this trainer tests the signs of the last ones: leave it out")
    if args.method == "fp" and (args.act != "none" or args.binarize_all):
        raise runs.RunError("--method fp is full precision: leave out --act and --binarize-all")
    if args.method in RELAXED and args.bn_batches < 1:
        what = f"--method {args.method} tests other weights than it trains, with BatchNorm statistics of their own"
        raise runs.RunError(f"{what}: --bn-batches must be at least 1")
    for name in ("mixup", "cutmix"):
        if not 0 <= getattr(args, name) < 1e6:
            raise runs.RunError(f"--{name} must be at least 0; it is {getattr(args, name)}")
    for name in ("mu", "rho"):
        values, count = getattr(args, name, None), 1 if args.method == "bnn+" else 2
        if values and (len(values) != count or not all(0 < value < 1e6 for value in values)):
            wanted = "one positive number" if count == 1 else "two positive numbers, for the start and the end"
            raise runs.RunError(f"--{name} needs {wanted} with --method {args.method}")
        if values and values[-1] < values[0]:
            raise runs.RunError(f"--{name} grows during training: its end must not be below its start; it is {values}")


# ---------------------------------------------------------------------------------------------------------------------
# Network.


def import_timm(advice: str):
    """timm. Raises RunError with this advice if it is not installed."""
    data.torchvision_module("models")  # timm imports it too; data.py handles a torchvision that cannot be imported
    try:
        import timm
    except ImportError:
        raise runs.RunError(advice) from None
    return timm


def timm_for(arch: str):
    """timm, for a network that is not in models.ARCHS. Raises RunError if it is not installed."""
    return import_timm(
        f"--arch {arch} is not one of {models.ARCHS_IN_SHORT}; for a vision transformer of timm, pip install timm"
    )


def network(args, num_classes: int, shape: tuple[int, int, int], pretrained: bool = False) -> torch.nn.Module:
    """The network before training: images [B, *shape] -> logits [B, num_classes].

    It is one of models.ARCHS, or a vision transformer of timm with binary linear layers (pretrained: timm's weights).
    """
    quantizer = METHODS[args.method]
    if args.arch in models.ARCHS:
        net = models.build(args.arch, num_classes, quantizer, args.act, args.binarize_all, *shape[:2])
    else:
        net = build_transformer(args, num_classes, quantizer, shape, pretrained)
    for layer in models.binary_layers(net):
        layer.unit = layer.scale = models.he_scale(layer)  # w = unit · F(w* / unit)
    return net


@contextlib.contextmanager
def seeded(seed: int):
    """Seed the random numbers of Python and NumPy within `with seeded(seed)`. seed: 0 to 2³² − 1."""
    states = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


class SeededTransform:
    """timm's transform of a PIL image, with the random numbers of Python and NumPy seeded from those of PyTorch.

    data.py seeds PyTorch's for each image, so that an epoch is reproducible and can start at any batch.
    """

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image) -> torch.Tensor:
        with seeded(int(torch.randint(2**31, ()))):
            return self.transform(image)


class Mixup:
    """timm's Mixup and CutMix of a batch. The result depends only on the seed, the step and the process.

    train: the training batches. Raises RunError if timm is missing, or if a process gets an odd number of images.
    """

    def __init__(self, args, train):
        self.seed, self.mix = args.seed, None
        if args.mixup or args.cutmix:
            timm = import_timm("--mixup and --cutmix are timm's: pip install timm, or leave them out")
            if train.batch_size // runs.world_size() % 2:
                raise runs.RunError("--mixup and --cutmix mix pairs: use a --batch-size with an even part per process")
            options = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix, "label_smoothing": 0.0}
            self.mix = timm.data.Mixup(**options, num_classes=train.num_classes)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, C, H, W] and labels [B] -> mixed images, and the fractions of the classes in them [B, classes].

        Without the flags, images and labels do not change.
        """
        if self.mix is None:
            return images, labels
        with seeded(int(numpy.random.SeedSequence([self.seed, step, runs.rank()]).generate_state(1)[0])):
            return self.mix(images, labels)


def timm_config(arch: str) -> dict:
    """timm's data configuration of a network: mean, std, interpolation, crop_pct, input_size, …"""
    timm = timm_for(arch)
    return timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(arch).to_dict())


def data_options(args) -> dict:
    """The arguments of data.load for a network of timm: its normalisation, and its transforms of large images."""
    if args.arch in models.ARCHS:
        return {}
    timm, config = timm_for(args.arch), timm_config(args.arch)
    common = {"interpolation": config["interpolation"], "mean": config["mean"], "std": config["std"]}
    size = args.image_size or 224
    common["input_size"] = (3, size, size)
    hflip = 0.0 if args.no_flip else 0.5
    train = timm.data.create_transform(**common, is_training=True, hflip=hflip, **AUGMENTATION)
    test = timm.data.create_transform(**common, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    return {"mean": config["mean"], "std": config["std"], "transforms": (SeededTransform(train), SeededTransform(test))}


def build_transformer(args, num_classes: int, quantizer: str, shape: tuple, pretrained: bool) -> torch.nn.Module:
    sizes = {"num_classes": num_classes, "in_chans": shape[0], "img_size": shape[1]}
    if args.patch_size:
        sizes["patch_size"] = args.patch_size
    try:
        net = timm_for(args.arch).create_model(args.arch, pretrained, **sizes)
        models.binarize_(net, quantizer, args.act, first=args.binarize_all, last=args.binarize_all)
        with true_signs(models.binary_layers(net)), torch.no_grad():
            net.eval()(torch.randn(1, *shape, generator=torch.Generator()))
    except models.ModelError as e:  # nothing to binarize, or --act sign with a layer that is not called
        raise runs.RunError(f"choose another network than timm's {args.arch}, or --act none: {e}") from None
    except Exception as e:  # timm raises many types: no img_size, a patch that does not fit, no connection, …
        reason = " ".join(str(e).split())[:150]
        weights = " with its weights" if pretrained else ""
        advice = "check the connection, or leave out --pretrained-timm, or choose" if pretrained else "choose"
        raise runs.RunError(
            f"timm's {args.arch} cannot be made{weights} for images of {shape[1]} pixels ({reason}): {advice} "
            "another vision transformer or --patch-size"
        ) from None
    return net


def inverse_slope(progress: float) -> float:
    """PARQ's r: a sigmoid that falls from 1 (progress 0) to 0 (progress 1 and above).

    r(p) = (σ(s (½ − p)) − σ(−s/2)) / (σ(s/2) − σ(−s/2))            s = PARQ_STEEPNESS
    """
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    low, high = sigmoid(-PARQ_STEEPNESS / 2), sigmoid(PARQ_STEEPNESS / 2)
    return (sigmoid(PARQ_STEEPNESS * (0.5 - min(progress, 1.0))) - low) / (high - low)


def hardness_at(args, progress: float) -> float:
    """μ, ρ or PARQ's r in a step; 0 for the other methods. progress: 0 in the first step, 1 in the last."""
    if args.method == "parq":
        return inverse_slope(progress / PARQ_END)
    values = args.mu if "mu" in args else args.rho if "rho" in args else [0.0]
    return values[0] + progress * (values[-1] - values[0])


@torch.no_grad()
def start_weights(layers, args) -> None:
    """For bnn+ and bnn++, scale the initial weights of each layer so that the RMS of w*/unit is 1/μ.

    Then most latent weights start where SS′_μ is positive, |w*/unit| < 2.4/μ, and their SS_μ is of order 1. Larger
    weights rarely change their sign. If --pretrained is a run of bnn+ or bnn++, the weights are not scaled.
    """
    trained = runs.load(args.pretrained).get("args", {}).get("method") if args.pretrained else None
    if args.method in SWISH and trained not in SWISH:
        for layer in layers:
            rms = (layer.weight / layer.unit).square().mean().sqrt().clamp_min(1e-12)
            layer.weight.div_(args.mu[0] * rms)


@torch.no_grad()
def apply_linear_quantizer(layers, rho: torch.Tensor) -> None:
    """w ← L_ρ(w) for the latent weights, in units of the layer."""
    for layer in layers:
        layer.weight.copy_(quantizers.linear_quantizer(layer.weight / layer.unit, rho) * layer.unit)


def optimizer_groups(net: torch.nn.Module, args) -> list[dict]:
    """The parameter groups of the optimizer. In networks of timm, biases, norms and latent weights do not decay.

    timm excludes biases, norms and what `no_weight_decay()` names, such as position embeddings. Decay would pull the
    latent weights to 0, where the soft signs are far from ±1.
    """
    if args.arch in models.ARCHS:
        return [{"params": list(net.parameters())}]
    names = getattr(net, "no_weight_decay", set)()
    excluded = {layer.weight for layer in models.binary_layers(net)}
    excluded |= {p for name, p in net.named_parameters() if name in names}
    decays = [p for p in net.parameters() if p.dim() > 1 and p not in excluded]
    rest = [p for p in net.parameters() if p.dim() <= 1 or p in excluded]
    return [{"params": decays}, {"params": rest, "weight_decay": 0.0}]


@contextlib.contextmanager
def true_signs(layers):
    """Let the layers compute with sign(w*), or α sign(w*) for parq, within `with true_signs(layers)`."""
    relaxed = [(layer.quantizer, layer.options) for layer in layers]
    for layer in layers:
        layer.quantizer, layer.options = "bwn-f" if layer.quantizer == "parq" else "bwn", {}
    try:
        yield
    finally:
        for layer, (quantizer, options) in zip(layers, relaxed, strict=True):
            layer.quantizer, layer.options = quantizer, options


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def main(argv=None) -> int:
    args, checkpoint = runs.parse(flags(), argv)
    complete(args)
    device = runs.pick_device(args.device, args.deterministic)
    args.amp = runs.pick_amp(args.amp, device)
    rank, world_size = runs.start_processes(device)
    torch.manual_seed(args.seed)

    # Data.
    train, val, test = data.load(
        args.dataset,
        args.data_dir,
        device,
        batch_size=args.batch_size,
        seed=args.seed,
        crop=not args.no_crop,
        flip=not args.no_flip,
        image_size=args.image_size,
        workers=args.workers,
        val=args.val,
        **data_options(args),
        log=runs.console.print,
        rank=rank,
        world_size=world_size,
    )
    runs.match_data(args, checkpoint, train, val, test)

    # Network. Its parameters are the latent weights; the binary layers compute w = F(w*).
    net = network(args, train.num_classes, train.shape, args.pretrained_timm and not checkpoint)
    net = net.to(device, memory_format=torch.channels_last)
    runs.load_weights(net, args, checkpoint)
    if not checkpoint and not args.eval_only:
        start_weights(models.binary_layers(net), args)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    hardness = torch.tensor(hardness_at(args, 0.0), device=device)  # μ, ρ or r, one tensor for all layers
    parameter = {"bnn+": "mu", "bnn++": "mu", "pc": "rho", "parq": "inverse_slope"}.get(args.method)
    for layer in layers:
        layer.options = {parameter: hardness} if parameter else {}
    if args.eval_only:
        with true_signs(layers), runs.reestimate_batchnorm(net, train, device, args.amp, args.bn_batches):
            return runs.report(runs.evaluate_all(model, args, device, val=val, test=test), test)

    # Optimizer, and the mixing of images.
    mixup = Mixup(args, train)
    optimizer = runs.make_optimizer(optimizer_groups(net, args), args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")  # otherwise it changes nothing

    # The run, from its start or from the checkpoint on.
    run = runs.Run(
        args,
        kind=args.method,
        about=f"method: {args.method}",
        train=train,
        val=val,
        test=test,
        device=device,
        layers=layers,
        signs=models.weight_signs(layers),
        checkpoint=checkpoint,
        state={"model": net, "optimizer": optimizer, "scaler": scaler},
    )

    # Training.
    net.train()
    with run:
        for epoch in run.epochs():
            for images, labels in run.batches():
                run.set_learning_rate(optimizer, epoch)
                progress = run.step / (run.total_steps - 1) if run.total_steps > 1 else 1.0  # 1 in the last step
                hardness.fill_(hardness_at(args, progress))
                images, labels = mixup(images, labels, run.step)
                optimizer.zero_grad()
                for x, y, fraction in runs.micro_batches(model, images, labels, args.accumulate):
                    with runs.autocast(device, args.amp):
                        logits = model(x)
                    loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
                    scaler.scale(fraction * loss).backward()  # the binary layers' .grad is B(w*) ⊙ ∂L/∂w
                    run.count(loss, logits, y)
                scaler.unscale_(optimizer)
                if args.clip:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
                # pq and rpc apply L to the latent weights in every step. With ρ in place of ρ/T, all weights would be
                # at ±1 within 100 steps and never change sign again.
                if args.method == "rpc":
                    apply_linear_quantizer(layers, hardness / run.total_steps)
                scaler.step(optimizer)
                scaler.update()
                if args.method == "pq":
                    apply_linear_quantizer(layers, hardness / run.total_steps)
            if run.leaving:
                break
            relaxed = {}
            if args.method in RELAXED:
                with runs.reestimate_batchnorm(net, train, device, args.amp, args.bn_batches):
                    relaxed = runs.evaluate(model, test, device, args.amp)
            # The checkpoints are written within this `with`, so they contain the statistics of the network that was
            # tested. Training steps do not read running statistics.
            with true_signs(layers), runs.reestimate_batchnorm(net, train, device, args.amp, args.bn_batches):
                tested = runs.evaluate_all(model, args, device, val=val, test=test)
                run.end_epoch(
                    tested,
                    models.weight_signs(layers),
                    **{f"relaxed_{column}": value for column, value in relaxed.items()},
                )
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
