"""Equal Bits (AAAI 2022): bi-half weights, half of each filter +1 and half −1, in one file.

    # A minute on a laptop, nothing to download:
    python train_bihalf.py --dataset digits --arch birealnet8-prelu --epochs 12 --batch-size 64
    python train_bihalf.py --toy                                         # the paper's 2-D example: figures, an image
    python train_bihalf.py --arch conv6                                  # CIFAR-10; or conv2, conv4, conv8
    python train_bihalf.py --arch birealnet20-prelu                      # CIFAR-10, binary activations too
    python train_bihalf.py --arch birealnet18-prelu --dataset cifar100   # or birealnet34-prelu, vgg16
    python train_bihalf.py --arch birealnet18-prelu --dataset imagenet --data-dir my/imagenet
    python train_bihalf.py --arch conv6 --quantizer sign                 # the baseline; or any --ratio, or --prune

    python train_bihalf.py --resume runs/NAME                            # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

The sign of a weight knows nothing of the other weights, and training may end with most of a filter's bits alike. Equal
Bits prescribes their distribution: of the n latent weights of a filter, the n/2 largest become +1 and the others −1,
which is the optimal transport of the weights onto a Bernoulli prior with p = ½, the one of greatest entropy. So a
weight flips when its *rank* changes. The gradient goes straight through. Any other share of +1 is `--ratio`; `--prune`
makes those in the middle 0. Each layer's bits are multiplied by the constant √2/√fan_in.

    flags → data → network → optimizer → the training loop → evaluation

Copy with: models.py, quantizers.py, data.py, runs.py.
"""

import itertools
from pathlib import Path

import torch
from rich.table import Table
from torch.nn import functional as F

import data
import models
import runs

# The paper's recipes, all with SGD, momentum 0.9 and a first learning rate of 0.1. For CIFAR-10 that of IR-Net.
RECIPES = {
    "conv": dict(epochs=100, batch_size=128, weight_decay=1e-4, schedule="cosine", milestones=[]),
    "cifar100": dict(epochs=350, batch_size=128, weight_decay=5e-4, schedule="step", milestones=[150, 250, 320]),
    "imagenet": dict(epochs=100, batch_size=256, weight_decay=1e-4, schedule="step", milestones=[30, 60, 90]),
    "other": dict(epochs=400, batch_size=128, weight_decay=1e-4, schedule="cosine", milestones=[]),
}
DEFAULT_LR = {"adam": 1e-3, "sgd": 0.1, "sgdm": 0.1}


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    by_recipe = dict.fromkeys(RECIPES["other"])  # filled in by complete()
    parser = runs.common_flags("train_bihalf.py", __doc__, arch="birealnet20-prelu", opt="sgdm", **by_recipe)
    bnn = parser.add_argument_group("binary network")
    bnn.add_argument("--quantizer", default="bihalf", choices=["bihalf", "sign"], help="sign: the baseline")
    bnn.add_argument("--ratio", type=float, default=0.5, help="share of a filter's weights that are +1 (default: 0.5)")
    bnn.add_argument("--prune", type=float, default=0.0, help="share of a filter's weights that are 0 (default: 0)")
    bnn.add_argument("--act", choices=["none", "sign"], help="sign: binary activations too (default: in birealnets)")
    bnn.add_argument("--binarize-all", action="store_true", help="the first and the last layer too")
    bnn.add_argument("--toy", action="store_true", help="the paper's 2-D example, and stop; writes OUT/toy.png")
    return parser


def complete(args) -> None:
    """Defaults that depend on other flags, and combinations that make no sense."""
    if args.arch not in models.ARCHS:
        raise runs.RunError(f"--arch {args.arch} is not known: use one of {', '.join(models.ARCHS)}")
    for name in ("ratio", "prune"):
        if not 0 <= getattr(args, name) <= 1:
            raise runs.RunError(f"--{name} is a share of a filter's weights, in [0, 1]; it is {getattr(args, name)}")
    if args.quantizer == "sign" and (args.ratio != 0.5 or args.prune):
        raise runs.RunError("--ratio and --prune are for --quantizer bihalf: leave them out with sign")
    if args.prune and args.ratio != 0.5:
        raise runs.RunError("--prune takes as many weights from either side: leave out --ratio with it")
    kind = "conv" if args.arch in models.UNNORMALISED else args.dataset
    for name, value in RECIPES.get(kind, RECIPES["other"]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr is None:
        args.lr = DEFAULT_LR[args.opt]
    if args.act is None:
        args.act = "sign" if args.arch in models.BIREAL_NETS else "none"


# ---------------------------------------------------------------------------------------------------------------------
# Network.


def network(args, num_classes: int, shape: tuple[int, int, int]) -> torch.nn.Module:
    """The network that is trained, freshly initialised: images [B, *shape] -> logits [B, num_classes]."""
    quantizer = "bwn" if args.quantizer == "sign" else "bihalf-prune" if args.prune else "bihalf"
    net = models.build(args.arch, num_classes, quantizer, args.act, args.binarize_all, *shape[:2])
    for layer in models.binary_layers(net):
        layer.options = {"bihalf": {"ratio": args.ratio}, "bihalf-prune": {"prune": args.prune}}.get(quantizer, {})
        layer.scale = models.he_scale(layer)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# The paper's toy example: what equal bits cost, and what they leave.


def all_networks(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All 4,096 binary networks of 12 weights (2 inputs, 3 sigmoid units with a bias, 1 output) on points [P, 2].

    Returns `units` [16, P] and `networks` [4096, 3], such that network i's output is units[networks[i]].sum(0), its
    decision the sign of that; and how many of each network's weights are +1 [4096].
    """
    # A hidden unit is one of 16: signs of two weights, of the bias, and of what the output multiplies it by.
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=points.dtype)
    units = signs[:, 3:] * torch.sigmoid(signs[:, :2] @ points.T + signs[:, 2:3])
    networks = torch.tensor(list(itertools.product(range(16), repeat=3)))
    return units, networks, (signs > 0).sum(1)[networks].sum(1)


def toy(out: Path) -> int:
    """Count distinct decision boundaries by the number of +1, print them, draw them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise runs.RunError(f"--toy needs matplotlib ({e}): pip install matplotlib") from None
    # The grid lies off the symmetry axes, on which networks whose units cancel each other are exactly undecided.
    side = torch.linspace(-5, 5, 250, dtype=torch.float64) + 0.0117
    x, y = torch.meshgrid(side, side + 0.0031, indexing="xy")
    units, networks, plus = all_networks(torch.stack([x.flatten(), y.flatten()], 1))
    decisions = torch.stack([units[network].sum(0) > 0 for network in networks])  # [4096, P]
    boundaries = decisions ^ decisions[:, :1]  # a network and its negative have the same boundary
    some = boundaries.any(1)  # the others decide the same everywhere
    ids = torch.full((4096,), -1)
    ids[some] = boundaries[some].unique(dim=0, return_inverse=True)[1]

    table = Table(title="binary networks of 12 weights", title_justify="left")
    for column in ("weights that are +1", "networks", "with a boundary", "distinct boundaries"):
        table.add_column(column, justify="right")
    distinct = [len(ids[some & (plus == k)].unique()) for k in range(13)]
    for k, count in enumerate(distinct):
        table.add_row(f"{k}", f"{(plus == k).sum():,}", f"{(some & (plus == k)).sum():,}", f"{count}")
    table.add_row("any", "4,096", f"{some.sum():,}", f"{len(ids[some].unique())}", style="bold")
    runs.console.print(table)

    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    half = set(ids[some & (plus == 6)].tolist())
    for boundary in ids[some].unique().tolist():
        output = units[networks[ids == boundary][0]].sum(0).view_as(x)
        order, color = (2, "#D55E00") if boundary in half else (1, "0.75")
        left.contour(x, y, output, levels=[0], colors=color, linewidths=0.7, zorder=order)
    left.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    left.set_title(
        f"{len(ids[some].unique())} boundaries in all (grey), {len(half)} with equal bits (orange)", fontsize=10
    )
    right.bar(range(13), distinct, color=["#D55E00" if k == 6 else "0.6" for k in range(13)])
    right.set(xlabel="weights that are +1, of 12", ylabel="distinct decision boundaries")
    file = out / "toy.png"
    try:
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    except OSError as e:
        raise runs.RunError(f"{file} cannot be written ({e}): choose another --out") from None
    runs.console.print(f"drawn in {file}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def main(argv=None) -> int:
    args, resumed = runs.parse(flags(), argv)
    if args.toy:
        return toy(Path(args.out))
    complete(args)
    device = runs.pick_device(args.device)
    part = runs.start_processes(device)
    torch.manual_seed(args.seed)

    # Data.
    train, test = data.load(
        *(args.dataset, args.data_dir, device, args.batch_size, args.seed, not args.no_crop, not args.no_flip),
        *(args.image_size, args.workers, runs.console.print, part),
    )

    # Network. The latent weights are its parameters; its binary layers quantize them in the forward pass.
    net = network(args, train.num_classes, train.shape)
    net.to(device)
    runs.load_weights(net, args, resumed)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    sizes = [layer.weight.numel() for layer in layers]
    if args.eval_only:
        return runs.report(*runs.evaluate(model, test, device, args.amp), test.size)

    optimizer = runs.make_optimizer(net.parameters(), args)

    # The run: at the start, or exactly where the resumed one stopped.
    kind = args.quantizer
    if args.prune:
        kind += f"-prune{args.prune:g}"
    elif args.ratio != 0.5:
        kind += f"-{args.ratio:g}"
    about = f"weights: {kind}"
    parts = {"model": net, "optimizer": optimizer}
    run = runs.Run(args, kind, about, (train, test), device, models.sign_bits(layers), resumed, **parts)

    net.train()
    with run:
        while run.goes_on():
            for batch in run.batches():
                run.set_learning_rate(optimizer)
                optimizer.zero_grad()
                for images, labels, share in runs.parts(model, *batch, args.accumulate):
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        logits = model(images)
                    loss = F.cross_entropy(logits.float(), labels)
                    (share * loss).backward()  # straight through: every latent weight's gradient is that of its bit
                    run.count(loss, logits, labels)
                optimizer.step()
            if run.leaving:
                break
            bits = models.sign_bits(layers)
            by_layer = zip(models.binary_layer_names(net), bits.split(sizes), strict=True)
            shares = {f"plus/{name}": part.double().mean().item() for name, part in by_layer}
            run.end_epoch(*runs.evaluate(model, test, device, args.amp), bits, **shares)
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
