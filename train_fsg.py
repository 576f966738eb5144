"""FSG: binary weights trained with learned gradients, which are made of the present gradient and of past ones.

    # Half a minute on a laptop, without a download:
    python train_fsg.py --dataset digits --arch resnet8 --epochs 12 --batch-size 64
    python train_fsg.py --arch resnet32 --hgs mamba --opt adam           # FSG on CIFAR-10, both terms balanced
    python train_fsg.py --arch resnet32 --grad ste                       # the baseline; or gate, fcgrad, multifc, …
    python train_fsg.py --arch resnet32 --preset released                # the training step of the authors' code
    python train_fsg.py --dataset folder --data-dir my/images            # my/images/{train,test}/CLASS/*.png
    # The paper starts from a full-precision network:
    python train_fsg.py --arch resnet32 --quantizer none --opt sgdm --name fp32
    python train_fsg.py --arch resnet32 --pretrained runs/fp32/best.pt

    python train_fsg.py --resume runs/NAME                               # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

Paper: Fast and Slow Gradient Approximation for Binary Neural Network Optimization (AAAI 2025),
https://arxiv.org/abs/2412.11777

The optimizer updates latent weights W. The network computes with binary weights Ŵ, which are W rounded to −1 or +1. The
derivative of the rounding is 0 almost everywhere. A straight-through estimator (STE) replaces it by 1. FSG generates
the gradient of W by small networks. In step t, with ĝ_t = ∂L/∂Ŵ and the parameters φ of these networks:

    fast = ĝ_t ⊙ MLP(W̃)                             of the present gradient; W̃ = A(W) is what Q rounds to Ŵ
    slow = SlowNet(LRE, ĝ_{t−l+1}, …, ĝ_t)          of the last l gradients of each weight; Mamba or an LSTM
    G_t  = D ⊙ ((1 − β)·fast + β·slow)              the optimizer's gradient; D is ∂Ŵ/∂W without the rounding
    φ is trained in step t + 1: how much did G_t reduce the loss?

--balance none is this formula. The default also balances the two terms. hypernet.py contains the method. In the
training loop it is one line after backward(): generator.generate().

    flags → data → network → gradient generator → optimizer → the training loop → evaluation

Copy with: models.py, binarize.py, quantizers.py, hypernet.py, metaquant.py, gate.py, fsg_released.py, data.py, runs.py;
for speed also selective_scan.py, selective_scan_cpu.cpp and selective_scan_triton.py.
"""

import torch
from torch.nn import functional as F

import data
import models
import runs
from fsg_released import ReleasedFSG, ReleasedFSGLSTM
from gate import GatedHistory
from hypernet import FSG, STE
from metaquant import LSTMFC, AuthorsAdam, FCGrad, LookAhead, MultiFC, ReleasedFCGrad, ReleasedLSTMFC, ReleasedMultiFC

# Learning rates for the latent weights (see "Default learning rates" in results/README.md).
DEFAULT_LR = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.3, "sgdm": 0.1}
GATE_LR = 6e-3  # with Adam under --grad gate, from random weights
# Adam's learning rates for φ: LR_FAST for the fast-net and for MetaQuant's nets, LR_SLOW for the slow-net and the LRE.
LR_FAST = {"fsg": 1e-2, "fcgrad": 1e-3, "multifc": 1e-3, "lstmfc": 1e-3}
LR_SLOW = 1e-3
# SGD's step is lr·G. With --balance none and with MetaQuant's generators, φ can make G arbitrarily large. So φ learns
# slowly there. (The authors' codes do not, so --preset released does not.)
LR_PHI_UNBOUNDED = 1e-5

# The generators (--grad) that have each flag. The other generators refuse it.
LEARNED = ("fsg", "fcgrad", "multifc", "lstmfc")
FLAGS_OF = {
    "hgs": ("fsg",),
    "history": ("fsg",),
    "length": ("fsg",),
    "beta": ("fsg",),
    "balance": ("fsg",),
    "normalize": ("fsg",),
    "no_lre": ("fsg",),
    "hyper_sample": ("fsg",),
    "lr_slow": ("fsg",),
    "d_state": ("fsg",),
    "d_conv": ("fsg",),
    "expand": ("fsg",),
    "scan": ("fsg",),
    "fast_act": ("fsg", "fcgrad", "multifc"),
    "hidden": LEARNED,
    "lr_fast": LEARNED,
    "preset": LEARNED,
    "memory": ("gate",),
    "epsilon": ("gate",),
}
OF_MAMBA = ("d_state", "d_conv", "expand", "scan")
NOT_RELEASED = ("history", "balance", "normalize", "no_lre", "fast_act", "hyper_sample")  # not in the authors' code


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    parser = runs.common_flags("train_fsg.py", __doc__, weight_decay=None)
    add = parser.add_argument_group("binary network").add_argument
    quantizers = ["dorefa", "bwn", "bwn-f", "bwn-l", "none"]
    quantizer = "bwn: the sign; bwn-f, bwn-l: with a scale per filter or layer; none: full precision (quantizers.py)"
    add("--quantizer", default="dorefa", choices=quantizers, help=quantizer)
    add("--act", default="none", choices=["none", "sign"], help="activations; sign: −1 and +1; none: full precision")
    add("--binarize-all", action="store_true", help="binarize the first and the last layer too")
    title = "gradient generator; a flag that the chosen generator does not have is refused"
    add = parser.add_argument_group(title).add_argument
    grad = "fsg: hypernet.py; gate: the gated history, gate.py; ste: straight-through; others: MetaQuant (metaquant.py)"
    add("--grad", choices=["fsg", "gate", "ste", "fcgrad", "multifc", "lstmfc"], help=f"{grad} (default: fsg)")
    add("--hgs", choices=["mamba", "lstm"], help="fsg: the slow-net, which sees the history (default: mamba)")
    preset = "released: the training step of the authors' code, FSG's (fsg_released.py) or MetaQuant's (metaquant.py)"
    add("--preset", choices=["none", "released"], help=f"{preset} (default: none)")
    history = "fsg: one sequence per weight, one per layer (flat), or one per weight without older gradients (newest)"
    add("--history", choices=["per-weight", "flat", "newest"], help=f"{history} (default: per-weight)")
    add("--length", type=int, help="fsg: l, past gradients per weight (default: 5)")
    add("--beta", type=float, help="fsg: β, the weight of the slow gradient, 0 to 1 (default: 0.9)")
    balance = "fsg: layer-rms scales both terms to the RMS of the gradient in each layer; keep-mean also keeps the "
    balance += "gradient's component along the mean of the history; none: the formula as written (default: keep-mean)"
    add("--balance", choices=["keep-mean", "layer-rms", "none"], help=balance)
    normalize = "fsg: layer-rms divides the history by its RMS in each layer (default: layer-rms)"
    add("--normalize", choices=["layer-rms", "none"], help=normalize)
    add("--no-lre", action="store_true", help="fsg: no layer recognition embedding")
    fast_act = "nonlinearity of the MLP (default: none with dorefa or fcgrad, else tanh)"
    add("--fast-act", choices=["none", "relu", "tanh"], help=fast_act)
    add("--hidden", type=int, help="width of the MLP and of the LSTM (default: 100)")
    add("--d-state", type=int, help="mamba: states per channel (default: 16)")
    add("--d-conv", type=int, help="mamba: taps of the convolution (default: 8)")
    add("--expand", type=int, help="mamba: channels (default: 100)")
    scans = ["auto", "fused", "mamba-ssm", "reference"]
    add("--scan", choices=scans, help="mamba: implementation of the selective scan (default: auto)")
    sample = "fsg: fraction of the weights that φ is trained on in each step (default: 0.125; with --history flat 1)"
    add("--hyper-sample", type=float, help=sample)
    unbounded = "1e-5 with SGD if no balance limits G, except in the released preset"
    lr_fast = f"Adam's learning rate for the MLP or LSTMFC's LSTM (default: fsg 1e-2, MetaQuant's 1e-3, {unbounded})"
    add("--lr-fast", type=float, help=lr_fast)
    lr_slow = f"fsg: Adam's learning rate for the slow-net and the LRE (default: 1e-3, {unbounded})"
    add("--lr-slow", type=float, help=lr_slow)
    add("--memory", type=float, help="gate: λ, the history's decay per step, from 0 to below 1 (default: 0.8)")
    epsilon = "gate: ε > 0; the smaller it is, the longer are the steps of weights close to 0 (default: 0.35)"
    add("--epsilon", type=float, help=epsilon)
    return parser


def complete(args) -> None:
    """Set the defaults that depend on other flags, and refuse flags that do not go together."""
    if args.arch not in models.ARCHS:
        raise runs.RunError(f"--arch {args.arch} is not known: use one of {models.ARCHS_IN_SHORT}")
    if args.quantizer == "none" and (args.act != "none" or args.binarize_all):
        raise runs.RunError("--quantizer none is full precision: leave out --act and --binarize-all")
    # only_for() removes the flags that the generator does not have. So `"hgs" in args` means that it has a slow-net.
    runs.only_for(args, "quantizer", dict.fromkeys(("grad", *FLAGS_OF), ("dorefa", "bwn", "bwn-f", "bwn-l")))
    runs.fill(args, grad="fsg")
    runs.only_for(args, "grad", FLAGS_OF)
    if "hgs" in args:
        runs.fill(args, hgs="mamba")
        runs.only_for(args, "hgs", dict.fromkeys(OF_MAMBA, ("mamba",)))
    runs.fill(args, preset="none")
    released = getattr(args, "preset", "none") == "released"
    if released:
        runs.only_for(args, "preset", dict.fromkeys(NOT_RELEASED, ("none",)))
        if "hgs" in args:
            runs.only_for(args, "hgs", {"length": ("mamba",)})  # its LSTM sees no history
        args.binarize_all = True  # in the authors' codes all layers are binary
        if args.grad != "fsg":  # MetaQuant: its BWN has a scale, its networks no BatchNorm before the classifier
            args.quantizer = {"bwn": "bwn-l"}.get(args.quantizer, args.quantizer)
            args.arch += "-metaquant" * (f"{args.arch}-metaquant" in models.ARCHS)
    runs.complete_schedule(args)
    runs.fill(args, weight_decay=5e-4 if released and args.grad != "fsg" and args.opt == "adam" else 0.0)

    runs.fill(args, history="per-weight", length=5, beta=0.9, balance="keep-mean", normalize="layer-rms")
    runs.fill(args, hidden=100, d_state=16, d_conv=8, expand=100, scan="auto")
    runs.fill(args, hyper_sample=1.0 if getattr(args, "history", "flat") == "flat" else 0.125)
    runs.fill(args, memory=0.8, epsilon=0.35)
    if getattr(args, "balance", "none") != "none" and args.quantizer == "dorefa" and args.fast_act != "tanh":
        if args.lr_fast is not None:
            raise runs.RunError(
                "--lr-fast has no effect with DoReFa weights and a linear or ReLU MLP, since the balance removes the "
                "MLP's factor: leave it out, or use --fast-act tanh or --balance none"
            )
        del args.lr_fast
    unbounded = args.opt.startswith("sgd") and getattr(args, "balance", "none") == "none" and not released
    grad = getattr(args, "grad", None)
    runs.fill(args, fast_act="none" if args.quantizer == "dorefa" or grad == "fcgrad" else "tanh")
    runs.fill(args, lr_fast=LR_PHI_UNBOUNDED if unbounded else LR_FAST.get(grad))
    runs.fill(args, lr_slow=LR_PHI_UNBOUNDED if unbounded else LR_SLOW)
    gate_lr = grad == "gate" and args.opt.startswith("adam") and not args.pretrained
    runs.fill(args, lr=GATE_LR if gate_lr else DEFAULT_LR[args.opt])
    for name in ("length", "hidden", "d_state", "d_conv", "expand"):
        if not 1 <= getattr(args, name, 1) <= 100_000:
            raise runs.RunError(
                f"{runs.option(name)} must be at least 1 and at most 100,000; it is {getattr(args, name)}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Network and gradient generator.


def network(args, num_classes: int, shape: tuple[int, int, int]) -> torch.nn.Module:
    """The network before training: images [B, *shape] -> logits [B, num_classes]."""
    return models.build(args.arch, num_classes, args.quantizer, args.act, args.binarize_all, *shape[:2])


def make_generator(args, layers):
    """The gradient generator that --grad names, for the network's binary layers. None with --quantizer none.

    Raises RunError for a wrong value of a flag, and if the selective scan cannot run.
    """
    if args.quantizer == "none":
        return None
    released = getattr(args, "preset", "none") == "released"
    try:
        if args.grad == "ste":
            return STE(layers)
        if args.grad == "gate":
            return GatedHistory(layers, args.memory, args.epsilon)
        if args.grad in ("fcgrad", "multifc", "lstmfc"):
            simple = {"fcgrad": FCGrad, "multifc": MultiFC, "lstmfc": LSTMFC}
            theirs = {"fcgrad": ReleasedFCGrad, "multifc": ReleasedMultiFC, "lstmfc": ReleasedLSTMFC}
            options = {"hidden": args.hidden, "lr": args.lr_fast}
            if "fast_act" in args:
                options["act"] = args.fast_act
            return (theirs if released else simple)[args.grad](layers, **options)
        options = {"beta": args.beta, "hidden": args.hidden}
        options["lr_slow"] = args.lr_slow
        if "lr_fast" in args:
            options["lr_fast"] = args.lr_fast
        if "length" in args:
            options["length"] = args.length
        if args.hgs == "mamba":
            options |= {"d_state": args.d_state, "d_conv": args.d_conv, "expand": args.expand, "scan": args.scan}
        if released and args.hgs == "lstm":
            return ReleasedFSGLSTM(layers, **options)
        if released:
            generator = ReleasedFSG(layers, **options)
        else:
            generator = FSG(
                layers,
                hgs=args.hgs,
                history=args.history,
                balance=args.balance,
                normalize=args.normalize,
                lre=not args.no_lre,
                fast_act=args.fast_act,
                hyper_sample=args.hyper_sample,
                **options,
            )
        # backend_and_why() raises an error here, not at the first step, if the scan cannot run.
        runs.console.print(f"slow-net: {args.hgs}, {generator.backend_and_why()}", soft_wrap=True)
        return generator
    except (ValueError, RuntimeError) as e:  # beta outside [0, 1], an LSTM over the flat history, mamba-ssm missing, …
        raise runs.RunError(str(e)) from None


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

    # Network. Its parameters are the latent weights; the binary layers quantize them in the forward pass.
    net = network(args, train.num_classes, train.shape).to(device, memory_format=torch.channels_last)
    runs.load_weights(net, args, checkpoint)
    model = runs.parallel(net, args, device)
    layers = models.binary_layers(net)
    if args.eval_only:
        return runs.report(runs.evaluate_all(model, args, device, train=train, val=val, test=test), test)

    # Gradient generator, which turns ĝ, the gradient at the binary weights, into G, the gradient of the latent weights.
    generator = make_generator(args, layers)
    released = isinstance(generator, LookAhead)  # --preset released

    # Optimizer.
    if released and args.opt == "adam":
        optimizer = AuthorsAdam(net.parameters(), args.lr, betas=args.betas, weight_decay=args.weight_decay)
    else:
        optimizer = runs.make_optimizer(net.parameters(), args)
    if isinstance(generator, GatedHistory):  # its history is a momentum
        generator.without_momentum(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")  # otherwise it changes nothing

    # The run, from its start or from the checkpoint on.
    kind = "fp32" if generator is None else f"fsg-{args.hgs}" if args.grad == "fsg" else args.grad
    kind += "-released" if released else ""
    phi = sum(p.numel() for p in generator.parameters()) if generator else 0
    about = f"gradients: {kind}" + (f"; φ, the hypernetworks: {phi:,} parameters" if phi else "")
    if isinstance(generator, GatedHistory) and args.lr == GATE_LR:
        about += "; this learning rate is the default of --grad gate"
    run = runs.Run(
        args,
        kind=kind,
        about=about,
        train=train,
        val=val,
        test=test,
        device=device,
        layers=layers,
        signs=models.weight_signs(layers),
        checkpoint=checkpoint,
        state={"model": net, "optimizer": optimizer, "scaler": scaler, "generator": generator},
    )

    # Training.
    net.train()
    with run:
        for epoch in run.epochs():
            for images, labels in run.batches():
                lr = run.set_learning_rate(optimizer, epoch)
                if released:
                    generator.look_ahead(lr)  # the authors' codes measure ĝ at look-ahead weights
                optimizer.zero_grad()
                for x, y, fraction in runs.micro_batches(model, images, labels, args.accumulate):
                    with runs.autocast(device, args.amp):
                        logits = model(x)
                    loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
                    scaler.scale(fraction * loss).backward()
                    run.count(loss, logits, y)
                scaler.unscale_(optimizer)  # now the .grad of every binary layer's weight is ĝ
                if generator:
                    generator.generate()  # the .grad becomes G; this also trains the hypernetworks
                if args.clip:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
                if not released or generator.t > 1:  # the authors' codes skip the first update
                    scaler.step(optimizer)
                scaler.update()
            if run.leaving:
                break
            tested = runs.evaluate_all(run.tested(model), args, device, train=train, val=val, test=test)
            measured = {f"gradient/{name}": x for name, x in generator.measure(lr).items()} if generator else {}
            run.end_epoch(tested, models.weight_signs(layers), **measured)
    return run.finish()


if __name__ == "__main__":
    runs.command(main, data.DataError, models.ModelError)
