"""FSG: Fast and Slow Gradient Approximation for Binary Neural Network Optimization (AAAI 2025), in one file.

    # A minute or two on a laptop, nothing to download:
    python train_fsg.py --dataset digits --arch resnet8 --epochs 12 --batch-size 64
    python train_fsg.py --arch resnet32 --hgs mamba --opt adam           # CIFAR-10
    python train_fsg.py --grad ste --arch resnet32                       # the baseline to beat
    python train_fsg.py --dataset folder --data-dir my/pictures          # my/pictures/{train,test}/CLASS/*.png

    # The paper starts from a full-precision network:
    python train_fsg.py --arch resnet32 --quantizer none --opt sgdm --name fp32
    python train_fsg.py --arch resnet32 --pretrained runs/fp32/best.pt

    python train_fsg.py --resume runs/NAME                               # after Ctrl-C or a crash, bit for bit
    python plot.py runs/A runs/B                                         # curves

A binary network computes with Ŵ = sign(W) while the optimizer moves the latent weights W. The sign has no useful
derivative, so something must be put in its place on the way back. Straight-through estimators (STE) put a constant.
FSG *learns* it: two small hypernetworks turn the gradient at the binary weight into the gradient for the latent one.
The whole method is in hypernet.py; here you see where it enters training: one line between backward() and step().

    flags → data → network → gradient generator → optimizer → the training loop → evaluation

Copy with: models.py, quantizers.py, hypernet.py, data.py, runs.py; for speed selective_scan.py and its kernels.
"""

import math
import time

import torch
from torch.nn import functional as F

import data
import hypernet
import models
import runs

# Learning rates that work, measured (README, "Learning rates"): for the latent weights, by optimizer, …
DEFAULT_LR = {"adam": 1e-3, "sgd": 0.3, "sgdm": 0.1}
# … and for φ: fast-net, slow-net. Nothing bounds the scale of the gradients that φ learns to make. Adam does not care
# for scale, but under SGD it multiplies the learning rate, so there φ must learn slowly.
DEFAULT_LR_PHI = {"fsg": (1e-2, 1e-3), "metaquant": (1e-3, None), "sgd": (1e-5, 1e-5)}


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def flags():
    parser = runs.common_flags(__doc__)
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
    fsg.add_argument("--hgs", default="mamba", choices=["mamba", "lstm"], help="slow-net over the gradient history")
    fsg.add_argument("--history", default="per-weight", choices=["per-weight", "flat"], help="layout of the history")
    fsg.add_argument("--length", type=int, default=5, help="l, past gradients a weight (default: 5)")
    fsg.add_argument("--beta", type=float, default=0.9, help="share of the slow gradient, 0 to 1 (default: 0.9)")
    fsg.add_argument("--normalize", default="layer-rms", choices=["layer-rms", "none"], help="scaling of the history")
    fsg.add_argument("--no-lre", action="store_true", help="no layer recognition embedding")
    fsg.add_argument("--fast-act", choices=["none", "relu", "tanh"], help="default: none; tanh under bwn and bwn-f")
    fsg.add_argument("--hidden", type=int, default=100, help="width of the fast-net and of the LSTM (default: 100)")
    fsg.add_argument("--d-state", type=int, default=16, help="Mamba: numbers of state a channel (default: 16)")
    fsg.add_argument("--d-conv", type=int, default=8, help="Mamba: taps of the convolution (default: 8)")
    fsg.add_argument("--expand", type=int, default=100, help="Mamba: channels (default: 100)")
    fsg.add_argument(
        "--scan", default="auto", choices=["auto", "fused", "mamba-ssm", "reference"], help="Mamba's backend"
    )
    fsg.add_argument(
        "--lr-fast", type=float, help="Adam's rate for the fast-net (default: 1e-2; MetaQuant 1e-3; SGD 1e-5)"
    )
    fsg.add_argument(
        "--hyper-sample", type=float, default=1.0, help="share of the weights φ is trained on each step (default: 1)"
    )
    fsg.add_argument("--lr-slow", type=float, help="Adam's rate for slow-net and LRE (default: 1e-3; under SGD 1e-5)")
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
    if args.lr is None:
        args.lr = DEFAULT_LR[args.opt]
    if args.quantizer == "none" and (args.act != "none" or args.binarize_all or args.preset != "none"):
        raise runs.RunError("--quantizer none is full precision: leave out --act, --binarize-all and --preset")
    if args.preset == "released":
        if args.grad != "fsg" or args.hgs != "mamba":
            raise runs.RunError("--preset released is FSG with Mamba: leave out --grad and --hgs, or the preset")
        vars(args).update(hypernet.RELEASED_OPTIONS, binarize_all=True)
    if args.hyper_sample != 1 and (args.grad != "fsg" or args.quantizer == "none" or args.preset == "released"):
        raise runs.RunError("--hyper-sample is for --grad fsg without --preset and --quantizer none: leave it out")
    lr_phi = DEFAULT_LR_PHI["sgd" if args.opt != "adam" else "fsg" if args.grad == "fsg" else "metaquant"]
    args.lr_fast = lr_phi[0] if args.lr_fast is None else args.lr_fast
    args.lr_slow = lr_phi[1] if args.lr_slow is None else args.lr_slow
    if args.arch not in models.ARCHS:
        raise runs.RunError(f"--arch {args.arch} is not known: use one of {', '.join(models.ARCHS)}")
    for name in ("hidden", "d_state", "d_conv", "expand"):
        if getattr(args, name) < 1:
            raise runs.RunError(f"--{name.replace('_', '-')} must be at least 1; it is {getattr(args, name)}")


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
# Evaluation.


@torch.no_grad()
def evaluate(model, batches, device, amp) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the test set."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # Σ loss, correct
    for images, labels in batches.epoch():
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        totals += torch.stack([loss, (logits.argmax(1) == labels).sum()])
    model.train()
    loss, correct = (totals / batches.size).tolist()
    return loss, correct


def main(argv=None) -> int:
    args, resumed = runs.parse(flags(), argv)
    complete(args)
    device = runs.pick_device(args.device)
    torch.manual_seed(args.seed)

    # Data.
    train, test = data.load(
        args.dataset,
        args.data_dir,
        device,
        args.batch_size,
        args.seed,
        crop=not args.no_crop,
        flip=not args.no_flip,
        image_size=args.image_size,
        workers=args.workers,
        log=runs.console.print,
    )

    # Network. The latent weights are its parameters; its binary layers quantize them in the forward pass.
    net = models.build(args.arch, train.num_classes, args.quantizer, args.act, args.binarize_all, train.shape[0])
    net.to(device)
    if args.pretrained and not resumed:
        runs.load_pretrained(net, args.pretrained, args)
    model = torch.compile(net) if args.compile else net
    layers = models.binary_layers(net)

    if resumed:
        runs.load_model(net, resumed["model"], args.resume)
    if args.eval_only:
        loss, accuracy = evaluate(model, test, device, args.amp)
        runs.console.print(f"test loss {loss:.4f}, test accuracy {100 * accuracy:.2f} % over {test.size:,} pictures")
        return 0

    # Gradient generator: turns ĝ, the gradient at the binary weights, into G, the one for the latent weights.
    generator = make_generator(args, layers)
    optimizer = runs.make_optimizer(net.parameters(), args)

    # Where we are: at the start, or exactly where the resumed run stopped.
    total_steps = min(args.epochs * len(train), args.limit_steps or math.inf)
    epoch = first_batch = step = 0
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # of this epoch: Σ loss, correct, seen
    bits = models.sign_bits(layers)  # at the start of this epoch
    seconds = 0.0
    if resumed:
        try:
            optimizer.load_state_dict(resumed["optimizer"])
            if generator:
                generator.load_state_dict(resumed["generator"])
            epoch, first_batch, step, seconds = (resumed[k] for k in ("epoch", "batch", "step", "seconds"))
            totals.copy_(resumed["totals"])
            bits.copy_(resumed["bits"])
            torch.set_rng_state(resumed["rng"])
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            reason = " ".join(str(e).split())[:200]
            raise runs.RunError(f"{args.resume} is not a run of this trainer and these flags ({reason})") from None
        if first_batch >= len(train):
            raise runs.RunError(f"{args.resume} was trained on more pictures than {args.data_dir} has: use its data")
        if step >= total_steps:
            raise runs.RunError(
                f"{args.resume} has done its {step:,} steps: to go on, give more --epochs, --limit-steps"
            )
    slow = f"-{args.hgs}" if args.grad == "fsg" else ""
    kind = "fp32" if generator is None else f"{args.grad}{slow}"
    run = runs.Run(args, f"{kind}-{args.arch}-{args.dataset}-{args.opt}-seed{args.seed}", resumed)

    def checkpoint(epoch, batch):
        """All that the rest of the run depends on."""
        return {
            **{"args": vars(args), "num_classes": train.num_classes, "model": net.state_dict()},
            **{"optimizer": optimizer.state_dict(), "generator": generator.state_dict() if generator else {}},
            **{"epoch": epoch, "batch": batch, "step": step, "seconds": seconds, "rows": run.rows},
            **{"totals": totals, "bits": bits, "rng": torch.get_rng_state()},
        }

    def check_finite(loss):
        # sign(NaN) is −1: a binary network of NaN weights still has a finite loss, so look at the weights too.
        if not math.isfinite(loss):
            problem = f"the loss became {loss}"
        elif not torch.stack(torch._foreach_norm([p.detach() for p in net.parameters()])).isfinite().all():
            problem = "the weights became NaN or infinite"
        else:
            return
        last = run.folder / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there was no checkpoint yet"
        raise runs.RunError(f"{problem} in epoch {epoch + 1}, by step {step}: {kept}; try a smaller --lr or --lr-fast")

    hyper = sum(p.numel() for p in generator.parameters()) if generator else 0
    runs.console.print(
        f"{run.folder}: {args.arch} on {args.dataset} ({train.size:,} + {test.size:,} pictures), {device}, "
        f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(bits):,} of them binary; "
        f"gradients: {kind}" + (f", {hyper:,} hyper-parameters φ" if hyper else "")
    )

    # The training loop.
    net.train()
    with runs.Interrupt() as interrupt, runs.Bar(total_steps, step) as bar:
        while step < total_steps:
            started = time.perf_counter() - seconds
            for batch, (images, labels) in enumerate(train.epoch(epoch, first_batch), first_batch + 1):
                lr = runs.learning_rate(args, epoch, step, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                if args.preset == "released":
                    generator.look_ahead(lr)  # that code measures ĝ where the update before would lead
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), labels)
                loss.backward()  # every binary layer's weight.grad is now ĝ
                if generator:
                    generator.generate()  # … and now G; also trains the hypernetworks
                optimizer.step()

                step += 1
                with torch.no_grad():
                    correct = (logits.argmax(1) == labels).sum()
                    totals += torch.stack([loss * len(labels), correct, torch.full_like(correct, len(labels))])
                seconds = time.perf_counter() - started
                if bar.due() or interrupt or step == total_steps:
                    loss_sum, correct, seen = totals.tolist()
                    check_finite(loss_sum)
                    speed = seen / seconds
                    bar.show(f"epoch {epoch + 1}/{args.epochs}", step, loss_sum / seen, correct / seen, speed)
                if interrupt and batch < len(train) and step < total_steps:
                    runs.save(run.folder / "last.pt", checkpoint(epoch, batch))
                    return interrupt.leave(run.folder, step, "train_fsg.py")
                if step == total_steps:
                    break

            # The end of an epoch: test, one row of metrics, checkpoints.
            loss_sum, correct, seen = totals.tolist()
            seconds = time.perf_counter() - started  # now that the device has caught up
            check_finite(loss_sum)
            test_loss, test_acc = evaluate(model, test, device, args.amp)
            check_finite(test_loss)
            now = models.sign_bits(layers)
            row = dict(
                epoch=epoch + 1,
                step=step,
                train_loss=loss_sum / seen,
                train_acc=correct / seen,
                test_loss=test_loss,
                test_acc=test_acc,
                lr=lr,
                seconds=seconds,
                images_per_s=seen / seconds,
                flip_ratio=(now != bits).float().mean().item(),
                plus_ratio=now.float().mean().item(),
            )
            # --limit-steps may end within an epoch. Resumed with a higher limit, the run goes on there as if it had
            # never stopped, and then this test has not been.
            whole_epoch, best = batch == len(train), run.folder / "best.pt"
            if test_acc > run.best and (whole_epoch or not best.exists()):
                runs.save(best, {"args": vars(args), "num_classes": train.num_classes, "model": net.state_dict()})
            if not whole_epoch:
                runs.save(run.folder / "last.pt", checkpoint(epoch, batch))
                run.add(**row)
            else:
                run.add(**row)
                epoch, first_batch, seconds, bits = epoch + 1, 0, 0.0, now
                totals.zero_()
                runs.save(run.folder / "last.pt", checkpoint(epoch, 0))
            if interrupt and step < total_steps:
                return interrupt.leave(run.folder, step, "train_fsg.py")
    run.summary("train_fsg.py")
    return 0


if __name__ == "__main__":
    runs.command(main, data.DataError)
