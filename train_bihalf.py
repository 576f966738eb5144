"""Equal Bits: bi-half weights. In each filter, half of the weights are +1 and half are −1.

    # One minute on a laptop, without a download:
    python train_bihalf.py --dataset digits --arch resnet8-equalbits --epochs 12 --batch-size 64
    python train_bihalf.py --toy                                         # the paper's 2-D example: a table and a plot
    python train_bihalf.py --arch conv6                                  # CIFAR-10; or conv2, conv4, conv8
    python train_bihalf.py --arch resnet18-equalbits                     # CIFAR-10, binary activations too
    python train_bihalf.py --arch resnet18-equalbits --prune 0.5         # the default of the authors' code
    python train_bihalf.py --arch resnet20-irnet                         # with IR-Net's ResNet-20
    python train_bihalf.py --arch resnet18-equalbits --dataset cifar100  # or resnet34-equalbits, vgg16
    python train_bihalf.py --arch resnet18-equalbits --dataset imagenet --data-dir my/imagenet
    python train_bihalf.py --arch conv6 --quantizer sign                 # the baseline
    python train_bihalf.py --arch conv6 --ratio 0.3                      # 30 % of the weights are +1
    python train_bihalf.py --arch conv6 --prune 0.4                      # 40 % of the weights are 0

    python train_bihalf.py --resume runs/NAME                            # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

Paper: Equal Bits: Enforcing Equally Distributed Binary Network Weights (AAAI 2022), https://arxiv.org/abs/2112.03406

The sign of a weight does not depend on the other weights. So training can end with equal signs in most of a filter.
Equal Bits prescribes the distribution of the signs. Of the n latent weights of a filter,

    the n/2 largest become +1, the others −1

This is the optimal transport of the weights to a Bernoulli prior with p = ½, the prior of largest entropy. A weight
flips when its *rank* crosses the middle. The gradient passes straight through. --ratio sets another fraction of +1;
--prune sets the weights in the middle to 0. The bits of each layer are multiplied by the constant √2/√fan_in.

    flags → data → network → optimizer → the training loop → evaluation

Copy with: models.py, binarize.py, quantizers.py, data.py, runs.py.
"""

import itertools
from pathlib import Path

import torch
from rich.table import Table
from torch.nn import functional as F

import data
import models
import runs

# The paper's recipes, all for SGD with momentum 0.9. "equalbits" is for CIFAR-100 and for ResNet-18 and 34 on CIFAR-10,
# "other" is IR-Net's for CIFAR-10. On ImageNet, the authors' code has --milestones 30 60 80 95.
RECIPES = {
    "conv": dict(epochs=100, batch_size=128, weight_decay=1e-4, schedule="cosine"),
    "equalbits": dict(epochs=350, batch_size=128, weight_decay=5e-4, schedule="step"),
    "imagenet": dict(epochs=100, batch_size=256, weight_decay=1e-4, schedule="step"),
    "other": dict(epochs=400, batch_size=128, weight_decay=1e-4, schedule="cosine"),
}
MILESTONES = {"equalbits": (150, 250, 320)}
DEFAULT_LR = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.1, "sgdm": 0.1}  # sgdm: the paper's


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    by_recipe = dict.fromkeys(RECIPES["other"])  # None; complete() sets them
    parser = runs.common_flags("train_bihalf.py", __doc__, arch="resnet20-irnet", opt="sgdm", **by_recipe)
    add = parser.add_argument_group("binary network").add_argument
    add("--quantizer", default="bihalf", choices=["bihalf", "sign"], help="of the weights; sign is the baseline")
    add("--ratio", type=float, help="fraction of a filter's weights that are +1 (default: 0.5)")
    add("--prune", type=float, help="fraction of a filter's weights that are 0 (default: 0)")
    act = "activations; sign: −1 and +1; none: full precision (default: sign if every convolution has a shortcut)"
    add("--act", choices=["none", "sign"], help=act)
    add("--binarize-all", action="store_true", help="binarize the first and the last layer too")
    add("--toy", action="store_true", help="do not train; print the paper's 2-D example and draw it in OUT/toy.png")
    return parser


def complete(args) -> None:
    """Set the defaults that depend on other flags, and refuse flags that do not go together."""
    if args.arch not in models.ARCHS:
        raise runs.RunError(f"--arch {args.arch} is not known: use one of {models.ARCHS_IN_SHORT}")
    runs.only_for(args, "quantizer", {"ratio": ("bihalf",), "prune": ("bihalf",)})
    runs.fill(args, ratio=0.5, prune=0.0)
    if args.quantizer == "bihalf":
        for name in ("ratio", "prune"):
            if not 0 <= getattr(args, name) <= 1:
                raise runs.RunError(
                    f"--{name} is a fraction of a filter's weights, in [0, 1]; it is {vars(args)[name]}"
                )
        if args.prune == 1:
            raise runs.RunError("--prune 1 sets all weights to 0: use a smaller fraction")
        if args.prune and args.ratio != 0.5:
            raise runs.RunError("--prune keeps equal numbers of +1 and −1: leave out --ratio with it")
    runs.fill(args, **RECIPES[recipe(args)], lr=DEFAULT_LR[args.opt])
    runs.complete_schedule(args, MILESTONES.get(recipe(args)))
    runs.fill(args, act="sign" if args.arch in models.MULTI_SHORTCUT_NETS else "none")


def recipe(args) -> str:
    """The name of the recipe for --arch and --dataset."""
    if args.arch in models.UNNORMALISED:
        return "conv"
    if args.dataset == "imagenet":
        return "imagenet"
    return "equalbits" if args.dataset == "cifar100" or args.arch in models.EQUALBITS_NETS else "other"


# ---------------------------------------------------------------------------------------------------------------------
# Network.


def network(args, num_classes: int, shape: tuple[int, int, int]) -> torch.nn.Module:
    """The network before training: images [B, *shape] -> logits [B, num_classes]."""
    if args.quantizer == "sign":
        quantizer, options = "bwn", {}
    elif args.prune:
        quantizer, options = "bihalf-prune", {"prune": args.prune}
    else:
        quantizer, options = "bihalf", {"ratio": args.ratio}
    net = models.build(args.arch, num_classes, quantizer, args.act, args.binarize_all, *shape[:2])
    for layer in models.binary_layers(net):
        layer.options, layer.scale = options, models.he_scale(layer)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# The paper's toy example: how many decision boundaries networks with equal bits can still have.


def all_networks(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All 4,096 binary networks of 12 weights (2 inputs, 3 sigmoid units with a bias, 1 output) on points [P, 2].

    Returns units [16, P], networks [4096, 3] and plus [4096]. The output of network i is units[networks[i]].sum(0), its
    decision is the sign of the output, and plus[i] of its weights are +1.
    """
    # There are 2⁴ different hidden units: two weights, a bias and the weight of the output layer are each −1 or +1.
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=points.dtype)
    units = signs[:, 3:] * torch.sigmoid(signs[:, :2] @ points.T + signs[:, 2:3])
    networks = torch.tensor(list(itertools.product(range(16), repeat=3)))
    return units, networks, (signs > 0).sum(1)[networks].sum(1)


def toy(out: Path) -> int:
    """Count the distinct decision boundaries for each number of +1, print the counts, draw the boundaries."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise runs.RunError(f"--toy needs matplotlib ({e}): pip install matplotlib") from None
    # The grid avoids the symmetry axes, on which units can cancel each other exactly.
    side = torch.linspace(-5, 5, 250, dtype=torch.float64) + 0.0117
    x, y = torch.meshgrid(side, side + 0.0031, indexing="xy")
    units, networks, plus = all_networks(torch.stack([x.flatten(), y.flatten()], 1))
    decisions = torch.stack([units[network].sum(0) > 0 for network in networks])  # [4096, P]
    boundaries = decisions ^ decisions[:, :1]  # a network and its negative have the same boundary
    some = boundaries.any(1)  # networks that have a boundary; the others make one decision everywhere
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
    args, checkpoint = runs.parse(flags(), argv)
    if args.toy:
        return toy(Path(args.out))
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
        log=runs.console.print,
        rank=rank,
        world_size=world_size,
    )
    runs.match_data(args, checkpoint, train, val, test)

    # Network. Its parameters are the latent weights; the binary layers quantize them in the forward pass.
    net = network(args, train.num_classes, train.shape).to(device, memory_format=torch.channels_last)
    runs.load_weights(net, args, checkpoint)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    if args.eval_only:
        return runs.report(runs.evaluate_all(model, args, device, train=train, val=val, test=test), test)

    # Optimizer.
    optimizer = runs.make_optimizer(net.parameters(), args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")  # otherwise it changes nothing

    # The run, from its start or from the checkpoint on.
    kind = args.quantizer
    if kind == "bihalf" and args.prune:
        kind += f"-prune{args.prune:g}"
    elif kind == "bihalf" and args.ratio != 0.5:
        kind += f"-{args.ratio:g}"
    run = runs.Run(
        args,
        kind=kind,
        about=f"weights: {kind}",
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
                optimizer.zero_grad()
                for x, y, fraction in runs.micro_batches(model, images, labels, args.accumulate):
                    with runs.autocast(device, args.amp):
                        logits = model(x)
                    loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
                    scaler.scale(fraction * loss).backward()  # a latent weight gets the gradient of its bit
                    run.count(loss, logits, y)
                scaler.unscale_(optimizer)
                if args.clip:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
                scaler.step(optimizer)
                scaler.update()
            if run.leaving:
                break
            tested = runs.evaluate_all(run.tested(model), args, device, train=train, val=val, test=test)
            run.end_epoch(tested, models.weight_signs(layers))
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
