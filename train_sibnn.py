"""Si-BNN: Sparsity-Inducing Binarized Neural Networks (AAAI 2020), in one file.

    # A minute on a laptop, nothing to download:
    python train_sibnn.py --dataset digits --arch birealnet8 --epochs 12 --batch-size 64
    python train_sibnn.py --arch vgg-small                               # CIFAR-10; or --arch birealnet20
    python train_sibnn.py --arch vgg-small --act sign                    # what it improves on
    python train_sibnn.py --dataset mnist --arch lenet
    python train_sibnn.py --dataset imagenet --data-dir my/imagenet --arch birealnet18    # or alexnet, vgg16

    python train_sibnn.py --resume runs/NAME                             # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

Binary networks usually have activations of −1 and +1. Si-BNN's are 0 and 1, a 1-bit ReLU: what is below a threshold
is off, and costs nothing. The threshold θ and the slope Δ of each channel are trained, through a window that lets the
gradient pass also a little below the threshold (ρ):

    y = (x − θ)·Δ      a = 1 where y ≥ 0, else 0      ∂a/∂y := 1 where −ρ < y < 1, else 0

Weights are signs with a scale for each filter, α = mean|W|; the latent weights stay in [−1, 1].

    flags → data → network → optimizer → the training loop → evaluation

Copy with: models.py, quantizers.py, data.py, runs.py.
"""

import contextlib

import torch
from torch.nn import functional as F

import data
import models
import runs

DEFAULT_LR = {"adam": 1e-3, "sgd": 0.1, "sgdm": 0.1}  # Adam's is the paper's
THRESHOLDS = (".theta", ".delta")  # what these parameters' names end with


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    paper = dict(epochs=100, batch_size=256, opt="adam", weight_decay=1e-6, schedule="step", milestones=[40, 80])
    parser = runs.common_flags("train_sibnn.py", __doc__, arch="birealnet20", **paper)
    bnn = parser.add_argument_group("binary network")
    bnn.add_argument("--act", default="si", choices=["si", "sign", "none"], help="si: 0 and 1 (default); sign: ±1")
    bnn.add_argument("--rho", type=float, default=0.3, help="ρ, width of the window below θ, 0 to 1 (default: 0.3)")
    bnn.add_argument("--binarize-all", action="store_true", help="the first and the last layer too")
    return parser


def complete(args) -> None:
    """Defaults that depend on other flags, and combinations that make no sense."""
    if args.lr is None:
        args.lr = DEFAULT_LR[args.opt]
    if args.arch not in models.ARCHS:
        raise runs.RunError(f"--arch {args.arch} is not known: use one of {', '.join(models.ARCHS)}")
    if not 0 <= args.rho <= 1:
        raise runs.RunError(f"--rho must lie in [0, 1]; it is {args.rho}")


# ---------------------------------------------------------------------------------------------------------------------
# Network.


def network(args, num_classes: int, shape: tuple[int, int, int]) -> torch.nn.Module:
    """The network that is trained, freshly initialised: images [B, *shape] -> logits [B, num_classes]."""
    net = models.build(args.arch, num_classes, "bwn-f", args.act, args.binarize_all, *shape[:2])
    for layer in models.binary_layers(net):
        layer.rho = args.rho
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation.


@contextlib.contextmanager
def counting_zeros(net):
    """Within it the network is tested; afterwards a dictionary holds each layer's share of activations that are 0."""
    layers, zeros = dict(zip(models.binary_layer_names(net), models.binary_layers(net), strict=True)), {}
    sums = {name: torch.zeros(2, dtype=torch.float64, device=layer.weight.device) for name, layer in layers.items()}

    def hook(name):
        def count(layer, inputs):
            off = (layer.binary_input(inputs[0]) == 0).sum()
            sums[name] += torch.stack([off, torch.full_like(off, inputs[0].numel())])

        return count

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield zeros
    finally:
        for handle in hooks:
            handle.remove()
    for name, (off, seen) in ((name, runs.total(both)) for name, both in sums.items()):
        zeros[f"zeros/{name}"] = (off / seen).item()


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

    # Network. The latent weights are its parameters; so are θ and Δ.
    net = network(args, train.num_classes, train.shape)
    net.to(device)
    runs.load_weights(net, args, resumed, may_lack=THRESHOLDS)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    if args.eval_only:
        return runs.report(*runs.evaluate(model, test, device, args.amp), test.size)

    # Weight decay would pull the thresholds back to 0 and close their windows, so it is not for them.
    named = dict(net.named_parameters())
    thresholds = [p for name, p in named.items() if name.endswith(THRESHOLDS)]
    others = [p for name, p in named.items() if not name.endswith(THRESHOLDS)]
    groups = [{"params": others}, {"params": thresholds, "weight_decay": 0.0}]
    optimizer = runs.make_optimizer(groups, args)

    # The run: at the start, or exactly where the resumed one stopped.
    kind, about = f"sibnn-{args.act}", f"activations: {args.act}"
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
                    (share * loss).backward()
                    run.count(loss, logits, labels)
                optimizer.step()
                with torch.no_grad():
                    for layer in layers:
                        layer.weight.clamp_(-1, 1)
            if run.leaving:
                break
            with counting_zeros(net) as zeros:  # by hooks, which a compiled model would not call
                test_loss, test_acc = runs.evaluate(net, test, device, args.amp)
            mean = sum(zeros.values()) / len(zeros)
            run.end_epoch(test_loss, test_acc, models.sign_bits(layers), zeros=mean, **zeros)
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
