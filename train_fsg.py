"""FSG: binary weights trained with learned gradients, from the current gradient (fast) and the past ones (slow).

    # Half a minute on a laptop, without a download:
    python train_fsg.py --dataset digits --arch resnet8 --epochs 12 --batch-size 64
    python train_fsg.py --arch resnet32 --hgs mamba --opt adam           # the paper, on CIFAR-10
    python train_fsg.py --arch resnet32 --grad ste                       # the baseline; or gate, fcgrad, multifc, …
    python train_fsg.py --dataset folder --data-dir my/images            # my/images/{train,test}/CLASS/*.png
    # The paper starts from a full-precision network:
    python train_fsg.py --arch resnet32 --quantizer none --opt sgdm --name fp32
    python train_fsg.py --arch resnet32 --pretrained runs/fp32/best.pt

    python train_fsg.py --resume runs/NAME                               # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

Paper: Fast and Slow Gradient Approximation for Binary Neural Network Optimization (AAAI 2025),
https://arxiv.org/abs/2412.11777

The network computes with binary weights Ŵ = Q(W), and the optimizer updates the latent weights W. Q has no useful
derivative. A straight-through estimator (STE) replaces it by a constant; FSG learns what to put in its place. In each
step t, with ĝ_t = ∂L/∂Ŵ and the hypernetworks' parameters φ:

    fast = ĝ_t ⊙ MLP(W̃)                      from the current gradient; W̃ is W before it is rounded
    slow = SlowNet(LRE, ĝ_t, ĝ_t−1, …)       from the last l gradients of each weight; Mamba or an LSTM
    G_t  = D ⊙ ((1 − β)·fast + β·slow)       the optimizer's gradient; D is ∂Ŵ/∂W, straight through the rounding
    φ is trained in the next step: how well did G_t reduce the loss?

hypernet.py holds all of it. In the training loop it is one line between backward() and step(): generator.generate().

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
    args, checkpoint = runs.parse(flags(), argv)
    complete(args)
    device = runs.pick_device(args.device)
    rank, world_size = runs.start_processes(device)
    torch.manual_seed(args.seed)

    # Data.
    train, test = data.load(
        args.dataset,
        args.data_dir,
        device,
        batch_size=args.batch_size,
        seed=args.seed,
        crop=not args.no_crop,
        flip=not args.no_flip,
        image_size=args.image_size,
        workers=args.workers,
        log=runs.console.print,
        rank=rank,
        world_size=world_size,
    )

    # Network. Its parameters are the latent weights; the binary layers quantize them in the forward pass.
    net = network(args, train.num_classes, train.shape).to(device)
    runs.load_weights(net, args, checkpoint)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    if args.eval_only:
        return runs.report(*runs.evaluate(model, test, device, args.amp), test.size)

    # Gradient generator: turns ĝ, the gradient at the binary weights, into G, the gradient of the latent weights.
    generator = make_generator(args, layers)

    # Optimizer. The gate is a momentum of its own kind, so the optimizer uses none for the latent weights.
    params = net.parameters()
    if isinstance(generator, hypernet.GatedHistory):
        latent = [layer.weight for layer in layers]
        others = [p for p in net.parameters() if not any(p is w for w in latent)]
        no_momentum = {"betas": (0.0, 0.999)} if args.opt == "adam" else {"momentum": 0.0}
        params = [{"params": latent, **no_momentum}, {"params": others}]
    optimizer = runs.make_optimizer(params, args)

    # The run, from its start or from the checkpoint on.
    kind = "fp32" if generator is None else f"fsg-{args.hgs}" if args.grad == "fsg" else args.grad
    phi = sum(p.numel() for p in generator.parameters()) if generator else 0
    about = f"gradients: {kind}" + (f", with {phi:,} hyper-parameters φ" if phi else "")
    if isinstance(generator, hypernet.GatedHistory) and args.lr == GATE_LR:
        about += ", which trains best at a higher learning rate than other gradients do"
    run = runs.Run(
        args,
        kind=kind,
        about=about,
        train=train,
        test=test,
        device=device,
        bits=models.sign_bits(layers),
        checkpoint=checkpoint,
        state={"model": net, "optimizer": optimizer, "generator": generator},
    )

    # Training.
    net.train()
    with run:
        for epoch in run.epochs():
            for images, labels in run.batches():
                lr = run.set_learning_rate(optimizer, epoch)
                if args.preset == "released":
                    generator.look_ahead(lr)  # the authors' code measures ĝ after a trial step with the last G
                optimizer.zero_grad()
                for x, y, fraction in runs.micro_batches(model, images, labels, args.accumulate):
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        logits = model(x)
                    loss = F.cross_entropy(logits.float(), y)
                    (fraction * loss).backward()  # now the .grad of every binary layer's weight is ĝ
                    run.count(loss, logits, y)
                if generator:
                    generator.generate()  # now the .grad is G; this also trains the hypernetworks
                optimizer.step()
            if run.leaving:
                break
            test_loss, test_acc = runs.evaluate(model, test, device, args.amp)
            measured = {f"gradient/{name}": x for name, x in generator.measure(lr).items()} if generator else {}
            run.end_epoch(test_loss, test_acc, models.sign_bits(layers), **measured)
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
