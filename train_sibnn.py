"""Si-BNN: sparsity-inducing binary activations, 0 and 1 instead of −1 and +1, with a trained threshold.

    # One minute on a laptop, without a download:
    python train_sibnn.py --dataset digits --arch resnet8-sibnn --epochs 12 --batch-size 64
    python train_sibnn.py --arch vgg-small                               # CIFAR-10; or --arch resnet20-sibnn
    python train_sibnn.py --arch vgg-small --act sign                    # the baseline
    python train_sibnn.py --dataset mnist --arch lenet
    python train_sibnn.py --dataset imagenet --data-dir my/imagenet --arch resnet18-sibnn    # or alexnet, vgg16

    python train_sibnn.py --resume runs/NAME                             # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

Paper: Sparsity-Inducing Binarized Neural Networks (AAAI 2020), https://ojs.aaai.org/index.php/AAAI/article/view/6900
Code of its authors, for the extension of 2022: https://github.com/peiswang/SiBNN

Binary activations are usually −1 and +1. Those of Si-BNN are 0 and 1, like a ReLU of one bit. Each channel has a
trained threshold θ and a trained slope Δ. The gradient passes through a window that begins below the threshold (by ρ):

    y = (x − θ)·Δ
    a = 1 if y ≥ 0, else 0
    ∂a/∂y := 1 if −ρ < y < 1, else 0

The weights are signs with one scale per filter, α = mean|W|, and the gradient passes through the scale too (`sibnn` in
quantizers.py). The latent weights are clamped to [−1, 1].

--recipe paper (the default) trains as the paper of 2020 says: Adam at 1e-3, divided by 10 at epochs 40 and 80 of 100,
weight decay 1e-6. The accuracies of 2020 were obtained with it. --recipe code trains as the authors' code does: cosine
schedule, weight decay 1e-5. Both use batches of 256 images. (ImageNet's crops are those of data.py.)

    flags → data → network → optimizer → the training loop → evaluation

Copy with: models.py, binarize.py, quantizers.py, data.py, runs.py.
"""

import contextlib

import torch
from torch.nn import functional as F

import data
import models
import runs

RECIPES = {
    "paper": dict(weight_decay=1e-6, schedule="step"),
    "code": dict(weight_decay=1e-5, schedule="cosine"),
}
MILESTONES = (40, 80)
DEFAULT_LR = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.1, "sgdm": 0.1}  # adam: of the paper and of the authors' code
THRESHOLDS = (".theta", ".delta")  # endings of the parameter names of θ and Δ


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    by_recipe = dict.fromkeys(RECIPES["paper"])  # None; complete() sets them
    both = dict(epochs=100, batch_size=256, opt="adam")
    parser = runs.common_flags("train_sibnn.py", __doc__, arch="resnet20-sibnn", **both, **by_recipe)
    add = parser.add_argument_group("binary network").add_argument
    recipes = "sets --schedule and --weight-decay as the paper of 2020 or as the authors' code"
    add("--recipe", default="paper", choices=list(RECIPES), help=recipes)
    act = "activations; si: 0 and 1; sign: −1 and +1; none: full precision"
    add("--act", default="si", choices=["si", "sign", "none"], help=act)
    add("--rho", type=float, help="si: ρ; the gradient's window begins at y = −ρ, 0 to 1 (default: 0.3)")
    add("--binarize-all", action="store_true", help="binarize the first and the last layer too")
    return parser


def complete(args) -> None:
    """Set the defaults that depend on other flags, and refuse flags that do not go together."""
    if args.arch not in models.ARCHS:
        raise runs.RunError(f"--arch {args.arch} is not known: use one of {models.ARCHS_IN_SHORT}")
    runs.only_for(args, "act", {"rho": ("si",)})
    runs.fill(args, rho=0.3, lr=DEFAULT_LR[args.opt], **RECIPES[args.recipe])
    runs.complete_schedule(args, MILESTONES)
    if args.act == "si" and not 0 <= args.rho <= 1:
        raise runs.RunError(f"--rho must lie in [0, 1]; it is {args.rho}")


# ---------------------------------------------------------------------------------------------------------------------
# Network.


def network(args, num_classes: int, shape: tuple[int, int, int]) -> torch.nn.Module:
    """The network before training: images [B, *shape] -> logits [B, num_classes]."""
    net = models.build(args.arch, num_classes, "sibnn", args.act, args.binarize_all, *shape[:2])
    for layer in models.binary_layers(net) if args.act == "si" else []:
        layer.rho = args.rho
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation.


@contextlib.contextmanager
def counting_zeros(net, zeros: dict):
    """Count within `with counting_zeros(net, zeros)`. Afterwards `zeros` contains, as zeros/LAYER, the fraction of each
    binary layer's inputs that were 0."""
    layers = dict(zip(models.binary_layer_names(net), models.binary_layers(net), strict=True))
    sums = {name: torch.zeros(2, dtype=torch.float64, device=layer.weight.device) for name, layer in layers.items()}

    def hook(name):
        def count(layer, inputs):
            off = (layer.binary_input(inputs[0]) == 0).sum()
            sums[name] += torch.stack([off, torch.full_like(off, inputs[0].numel())])

        return count

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
    for name in layers:
        off, elements = runs.all_reduce_sum(sums[name])
        zeros[f"zeros/{name}"] = (off / elements).item()


@torch.no_grad()
def clamp(layers: list[torch.nn.Module]) -> None:
    """Clamp the latent weights to [−1, 1]."""
    for layer in layers:
        layer.weight.clamp_(-1, 1)


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
        log=runs.console.print,
        rank=rank,
        world_size=world_size,
    )
    runs.match_data(args, checkpoint, train, val, test)

    # Network. Its parameters are the latent weights, θ and Δ, and those of the normalisations.
    net = network(args, train.num_classes, train.shape).to(device, memory_format=torch.channels_last)
    runs.load_weights(net, args, checkpoint, may_lack=THRESHOLDS)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    clamp(layers)
    if args.eval_only:
        return runs.report(runs.evaluate_all(model, args, device, train=train, val=val, test=test), test)

    # Optimizer. θ and Δ do not decay, as in the authors' code: a small Δ makes the gradient of the inputs small.
    named = dict(net.named_parameters())
    thresholds = [p for name, p in named.items() if name.endswith(THRESHOLDS)]
    others = [p for name, p in named.items() if not name.endswith(THRESHOLDS)]
    params = [{"params": others}, {"params": thresholds, "weight_decay": 0.0}]
    optimizer = runs.make_optimizer(params, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")  # otherwise it changes nothing

    # The run, from its start or from the checkpoint on.
    run = runs.Run(
        args,
        kind=f"sibnn-{args.act}",
        about=f"activations: {args.act}",
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
                    scaler.scale(fraction * loss).backward()  # through the signs, their scales and the windows
                    run.count(loss, logits, y)
                scaler.unscale_(optimizer)
                if args.clip:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
                scaler.step(optimizer)
                scaler.update()
                clamp(layers)
            if run.leaving:
                break
            tested_net, zeros = run.tested(net), {}  # not the model: a compiled one does not call the counting hooks
            counting = counting_zeros(tested_net, zeros)
            tested = runs.evaluate_all(tested_net, args, device, train=train, val=val, test=test, during_test=counting)
            mean_zeros = sum(zeros.values()) / len(zeros)
            run.end_epoch(tested, models.weight_signs(layers), zeros=mean_zeros, **zeros)
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
