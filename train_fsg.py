"""FSG: Fast and Slow Gradient Approximation for Binary Neural Network Optimization (AAAI 2025), in one file.

    # Half a minute on a laptop, nothing to download:
    python train_fsg.py --dataset digits --arch resnet8 --epochs 12 --batch-size 64
    python train_fsg.py --arch resnet32 --hgs mamba --opt adam           # the paper, on CIFAR-10
    python train_fsg.py --arch resnet32                                  # --hgs gate, what trains best here
    python train_fsg.py --grad ste --arch resnet32                       # the baseline to beat
    python train_fsg.py --dataset folder --data-dir my/images          # my/images/{train,test}/CLASS/*.png

    # The paper starts from a full-precision network:
    python train_fsg.py --arch resnet32 --quantizer none --opt sgdm --name fp32
    python train_fsg.py --arch resnet32 --hgs mamba --pretrained runs/fp32/best.pt

    python train_fsg.py --resume runs/NAME                               # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

A binary network computes with Ŵ = sign(W) while the optimizer moves the latent weights W. The sign has no useful
derivative, so something must be put in its place on the way back. Straight-through estimators (STE) put a constant.
FSG *learns* it (`--hgs mamba` or `lstm`): two small hypernetworks turn the gradient at the binary weight into the
gradient for the latent one; one sees the present gradient, the other the past ones. `--hgs gate`, the default, makes it
of the same two, with a formula in place of the networks; README, "Does a learned gradient help?", says why.
The whole method is in hypernet.py; here you see where it enters training: one line between backward() and step().

    flags → data → network → gradient generator → optimizer → the training loop → evaluation

Copy with: models.py, quantizers.py, hypernet.py, data.py, runs.py; for speed selective_scan.py and its kernels.
"""

import torch
from torch.nn import functional as F

import data
import hypernet
import models
import runs

# Learning rates that work, measured (README, "Learning rates"): for the latent weights, by optimizer, …
DEFAULT_LR = {"adam": 1e-3, "sgd": 0.3, "sgdm": 0.1}
GATE_LR = 6e-3  # … with Adam under --hgs gate
# … and for φ: fast-net, slow-net. Nothing bounds the scale of the gradients that φ learns to make. Adam does not care
# for scale, but under SGD it multiplies the learning rate, so there φ must learn slowly.
DEFAULT_LR_PHI = {"fsg": (1e-2, 1e-3), "metaquant": (1e-3, None), "sgd": (1e-5, 1e-5)}

# Flags of the paper's nets, with their defaults. --hgs gate refuses them; other --grads ignore what they do not have.
NETS = {"length": 5, "beta": 0.9, "normalize": "layer-rms", "no_lre": False, "fast_act": None, "hyper_sample": 1.0}
NETS |= {"hidden": 100, "d_state": 16, "d_conv": 8, "expand": 100, "scan": "auto", "lr_fast": None, "lr_slow": None}


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    parser = runs.common_flags("train_fsg.py", __doc__)
    bnn = parser.add_argument_group("binary network")
    bnn.add_argument("--quantizer", default="dorefa", choices=["dorefa", "bwn", "bwn-f", "none"], help="none: float")
    bnn.add_argument("--act", default="none", choices=["none", "sign"], help="sign: binary activations too (W1A1)")
    bnn.add_argument("--binarize-all", action="store_true", help="the first convolution and the classifier too")
    fsg = parser.add_argument_group("gradient generator (hypernet.py)")
    fsg.add_argument(
        "--grad",
        default="fsg",
        choices=["fsg", "fcgrad", "multifc", "lstmfc", "ste"],
        help="what latent weights are updated with: FSG, one of MetaQuant's three, or straight-through (default: fsg)",
    )
    fsg.add_argument(
        "--hgs",
        choices=["gate", "mamba", "lstm"],
        help="what is made of the gradient history: the paper's slow-net, mamba or lstm, or gate, which sums it since "
        "the weight's last flip (default: mamba where a flag of the paper's nets is given, else gate)",
    )
    fsg.add_argument(
        "--history",
        default="per-weight",
        choices=["per-weight", "flat", "newest"],
        help="its layout; newest: without the older gradients (default: per-weight)",
    )
    fsg.add_argument("--length", type=int, help="l, past gradients a weight (default: 5)")
    fsg.add_argument("--beta", type=float, help="share of the slow gradient, 0 to 1 (default: 0.9)")
    fsg.add_argument("--normalize", choices=["layer-rms", "none"], help="scaling of the history (default: layer-rms)")
    fsg.add_argument("--no-lre", action="store_true", help="no layer recognition embedding")
    fsg.add_argument("--fast-act", choices=["none", "relu", "tanh"], help="default: none; tanh under bwn and bwn-f")
    fsg.add_argument("--hidden", type=int, help="width of the fast-net and of the LSTM (default: 100)")
    fsg.add_argument("--d-state", type=int, help="Mamba: numbers of state a channel (default: 16)")
    fsg.add_argument("--d-conv", type=int, help="Mamba: taps of the convolution (default: 8)")
    fsg.add_argument("--expand", type=int, help="Mamba: channels (default: 100)")
    fsg.add_argument("--scan", choices=["auto", "fused", "mamba-ssm", "reference"], help="Mamba's backend")
    fsg.add_argument(
        "--lr-fast", type=float, help="Adam's rate for the fast-net (default: 1e-2; MetaQuant 1e-3; SGD 1e-5)"
    )
    fsg.add_argument("--hyper-sample", type=float, help="share of the weights φ is trained on each step (default: 1)")
    fsg.add_argument("--lr-slow", type=float, help="Adam's rate for slow-net and LRE (default: 1e-3; SGD 1e-5)")
    fsg.add_argument(
        "--preset",
        default="none",
        choices=["none", "released"],
        help="released: what the authors' code does (README); sets history, normalize, fast-act, beta, length and "
        "binarize-all",
    )
    return parser


def complete(args) -> None:
    """Defaults that depend on other flags, and combinations that make no sense."""
    asked = [name for name in NETS if getattr(args, name) is not None and getattr(args, name) is not False]
    asked += ["history"] * (args.history == "flat") + ["preset"] * (args.preset != "none")
    args.hgs = args.hgs or ("mamba" if asked else "gate")
    gate = args.grad == "fsg" and args.hgs == "gate" and args.quantizer != "none"
    if gate and asked and not args.eval_only:
        flag = asked[0].replace("_", "-")
        raise runs.RunError(f"--{flag} is for the paper's slow-nets: use --hgs mamba or lstm, or leave it out")
    if not gate:
        fast, slow = DEFAULT_LR_PHI["sgd" if args.opt != "adam" else "fsg" if args.grad == "fsg" else "metaquant"]
        defaults = {**NETS, "lr_fast": fast, "lr_slow": slow}
        vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    if args.lr is None:
        args.lr = GATE_LR if gate and args.opt == "adam" else DEFAULT_LR[args.opt]
    if args.quantizer == "none" and (args.act != "none" or args.binarize_all or args.preset != "none"):
        raise runs.RunError("--quantizer none is full precision: leave out --act, --binarize-all and --preset")
    if args.preset == "released":
        if args.grad != "fsg" or args.hgs != "mamba":
            raise runs.RunError("--preset released is FSG with Mamba: leave out --grad and --hgs, or the preset")
        vars(args).update(hypernet.RELEASED_OPTIONS, binarize_all=True)
    if args.hyper_sample not in (None, 1) and (args.grad != "fsg" or args.quantizer == "none" or args.preset != "none"):
        raise runs.RunError("--hyper-sample is for --grad fsg without --preset and --quantizer none: leave it out")
    if args.arch not in models.ARCHS:
        raise runs.RunError(f"--arch {args.arch} is not known: use one of {', '.join(models.ARCHS)}")
    for name in ("hidden", "d_state", "d_conv", "expand"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise runs.RunError(f"--{name.replace('_', '-')} must be at least 1; it is {getattr(args, name)}")


def network(args, num_classes: int, shape: tuple[int, int, int]) -> torch.nn.Module:
    """The network that is trained, freshly initialised: images [B, *shape] -> logits [B, num_classes]."""
    return models.build(args.arch, num_classes, args.quantizer, args.act, args.binarize_all, *shape[:2])


def make_generator(args, layers):
    """The gradient generator that --grad names, for the network's binary layers (none at full precision)."""
    if args.quantizer == "none":
        return None
    try:
        if args.grad == "ste":
            return hypernet.STE(layers)
        if args.grad == "fcgrad":
            return hypernet.FCGrad(layers, args.hidden, args.fast_act, args.lr_fast)
        if args.grad == "multifc":
            return hypernet.MultiFC(layers, args.hidden, args.fast_act, args.lr_fast)
        if args.grad == "lstmfc":
            return hypernet.LSTMFC(layers, args.hidden, args.lr_fast)
        if args.hgs == "gate":
            without = {"memory": 0.0} if args.history == "newest" else {}
            return hypernet.GatedHistory(layers, **without)
        generator = hypernet.FSG(
            layers,
            hgs=args.hgs,
            length=args.length,
            beta=args.beta,
            history=args.history,
            normalize=args.normalize,
            lre=not args.no_lre,
            hidden=args.hidden,
            fast_act=args.fast_act,
            d_state=args.d_state,
            d_conv=args.d_conv,
            expand=args.expand,
            scan=args.scan,
            lr_fast=args.lr_fast,
            lr_slow=args.lr_slow,
            hyper_sample=args.hyper_sample,
            preset=args.preset,
        )
        # Says now, not at the first step, what is missing.
        runs.console.print(f"slow-net: {args.hgs}, {generator.backend_and_why()}", soft_wrap=True)
        return generator
    except (ValueError, RuntimeError) as e:  # beta outside [0, 1], an LSTM over the flat history, mamba-ssm missing, …
        raise runs.RunError(str(e)) from None


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

    # Network. The latent weights are its parameters; its binary layers quantize them in the forward pass.
    net = network(args, train.num_classes, train.shape)
    net.to(device)
    runs.load_weights(net, args, resumed)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    if args.eval_only:
        return runs.report(*runs.evaluate(model, test, device, args.amp), test.size)

    # Gradient generator: turns ĝ, the gradient at the binary weights, into G, the one for the latent weights.
    generator = make_generator(args, layers)
    groups = net.parameters()
    if isinstance(generator, hypernet.GatedHistory):  # its history is momentum enough for the latent weights
        latent = [layer.weight for layer in layers]
        rest = [p for p in net.parameters() if not any(p is w for w in latent)]
        without = {"betas": (0.0, 0.999)} if args.opt == "adam" else {"momentum": 0.0}
        groups = [{"params": latent, **without}, {"params": rest}]
    optimizer = runs.make_optimizer(groups, args)

    # The run: at the start, or exactly where the resumed one stopped.
    kind = "fp32" if generator is None else f"fsg-{args.hgs}" if args.grad == "fsg" else args.grad
    hyper = sum(p.numel() for p in generator.parameters()) if generator else 0
    about = f"gradients: {kind}" + (f", {hyper:,} hyper-parameters φ" if hyper else "")
    parts = {"model": net, "optimizer": optimizer} | ({"generator": generator} if generator else {})
    run = runs.Run(args, kind, about, (train, test), device, models.sign_bits(layers), resumed, **parts)

    net.train()
    with run:
        while run.goes_on():
            for batch in run.batches():
                lr = run.set_learning_rate(optimizer)
                if args.preset == "released":
                    generator.look_ahead(lr)  # that code measures ĝ where the update before would lead
                optimizer.zero_grad()
                for images, labels, share in runs.parts(model, *batch, args.accumulate):
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        logits = model(images)
                    loss = F.cross_entropy(logits.float(), labels)
                    (share * loss).backward()  # every binary layer's weight.grad is now ĝ
                    run.count(loss, logits, labels)
                if generator:
                    generator.generate()  # … and now G; also trains the hypernetworks
                optimizer.step()
            if run.leaving:
                break
            steps = {f"gradient/{name}": x for name, x in generator.measure(lr).items()} if generator else {}
            run.end_epoch(*runs.evaluate(model, test, device, args.amp), models.sign_bits(layers), **steps)
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
