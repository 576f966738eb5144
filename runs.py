"""What all trainers use besides the algorithms: common flags, devices, processes, checkpoints, metrics, progress.

Needs no other file of this repository; copy it with any train_*.py. A run writes the folder runs/NAME/:

    args.json     the flags that the run used, and under "environment" the versions, the commit, the device, the command
    log.txt       what the run printed
    metrics.csv   one row per epoch, with the columns METRICS below and those of the trainer
    last.pt       the whole state of the run; --resume continues from it bit for bit
    best.pt       the network to use: with --val the one with the best validation accuracy, otherwise the last one

A checkpoint is complete at any moment, even if the process is killed: it is written to a temporary file, which then
replaces the old checkpoint.
"""

import argparse
import contextlib
import csv
import ctypes
import datetime
import errno
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import uuid
import warnings
from pathlib import Path
from typing import ClassVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional as F


class Output:
    """sys.stdout. If the terminal is closed, or no process reads the pipe any more, its text is thrown away."""

    @property
    def stream(self):
        # During a live display, rich puts a proxy in the place of sys.stdout, which prints with our console.
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def __getattr__(self, name):
        if name == "rich_proxied_file":  # this object is not such a proxy
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self._try("write", text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments) -> None:
        try:
            if self.stream is not None:  # it was closed from the start
                getattr(self.stream, method)(*arguments)
        except OSError:  # the run goes on; log.txt has all lines
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Terminal(Console):
    """The console. It also keeps the printed lines until the run folder has them in log.txt."""

    def __init__(self, **options):
        super().__init__(file=Output(), **options)
        self.unsaved: list[str] = []

    def print(self, *objects, **options):
        super().print(*objects, **options)
        if objects and isinstance(objects[0], str):
            self.unsaved.append(" ".join(map(str, objects)) + "\n")

    def save(self, file: Path) -> None:
        """Append the new lines to the file. A full disk is reported by the next checkpoint."""
        lines, self.unsaved = self.unsaved, []
        with contextlib.suppress(OSError), open(file, "a", encoding="utf-8", errors="replace") as f:  # of file names
            f.writelines(lines)


MANY_FLIPS = 0.02  # fraction of signs that flip in an epoch; above it, BatchNorm's running statistics lag behind
console = Terminal(highlight=False, markup=False, emoji=False, soft_wrap=True)  # a name may contain [ ] and :x:


class RunError(Exception):
    """The run cannot start or continue. The message is one sentence that says why and what to do."""


def command(main, *errors: type[Exception]) -> None:
    """Run main() and exit with its code. RunError and `errors` print one sentence to standard error and exit with 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # where the encoding lacks φ, print a question mark
    try:
        code = main()
    except (RunError, *errors) as e:  # it may quote the names and contents of foreign files
        code = "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else "?" for c in f"error: {e}")
    except Exception as e:
        reason = " ".join(str(e).split())[:150]
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in reason:
            code = f"error: out of memory ({reason}): use a smaller --batch-size, or add --accumulate 2"
        elif type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            code = f"error: --compile failed ({reason}): leave it out, or install a C++ compiler (on a GPU: Triton)"
        elif isinstance(e, OSError) and e.errno == errno.ENAMETOOLONG:
            code = f"error: a name is too long ({reason}): use a shorter one"
        else:
            raise
    except KeyboardInterrupt:  # before training, or the second Ctrl-C: last.pt stays as it is
        code = 128 + signal.SIGINT
    if isinstance(code, str):
        code = 1 if rank() else code  # rank 0 prints the sentence
    else:
        end_processes()
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Flags.

# The flags that may change when a run is resumed. A change of any other flag would make it a different run.
MAY_CHANGE = {
    *("epochs", "limit_steps", "lr", "schedule", "milestones", "data_dir", "workers", "device", "compile"),
    *("bn_batches", "tensorboard", "wandb", "deterministic", "accumulate", "save_every", "out", "name", "resume"),
    *("eval_only", "pretrained"),
}
SMALLEST = {"epochs": 1, "batch_size": 2, "limit_steps": 1, "image_size": 8, "accumulate": 1}  # 0 for the flags below
NOT_NEGATIVE = (
    *("val", "bn_batches", "workers", "seed", "save_every", "weight_decay", "warmup"),
    *("lr", "lr_fast", "lr_slow"),
)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the description's line breaks and adds the default of each flag that has one."""

    def _get_help_string(self, action) -> str:
        has_default = action.default not in (None, argparse.SUPPRESS) and action.nargs != 0
        return action.help + " (default: %(default)s)" * (has_default and "default" not in action.help)

    def _expand_help(self, action) -> str:
        return super()._expand_help(action).replace("(default: None)", "(default: depends on the other flags)")


def common_flags(script: str, description: str, **defaults) -> argparse.ArgumentParser:
    """A parser with the flags that all trainers share. A trainer adds the flags of its paper.

    script: the trainer's file name. defaults: the paper's values of these flags, by name; None if a value depends on
    other flags.
    """
    parser = argparse.ArgumentParser(script, description=description, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument_group("data and network").add_argument
    datasets = ["cifar10", "cifar100", "mnist", "digits", "imagenet", "folder"]
    folder = "cifar, mnist: downloaded; digits: in scikit-learn; folder, imagenet: DATA_DIR/{train,test}/CLASS/*.png"
    add("--arch", default="resnet20", help="name of the network; an unknown name prints the known ones")
    add("--dataset", default="cifar10", choices=datasets, help=folder)
    add("--data-dir", default="data", help="the folder with the images, or to download them to")
    add(
        "--image-size",
        type=int,
        help="width and height in pixels (default: imagenet 224; folder: the median if nearly square and at most 96)",
    )
    held_out = "hold N training images out for validation, which then chooses best.pt (default: %(default)s)"
    add("--val", type=int, default=0, metavar="N", help=held_out)
    add("--no-crop", action="store_true", help="no random crops of training images (images of up to 96 pixels)")
    add("--no-flip", action="store_true", help="no horizontal flips of training images")
    add("--workers", type=int, default=8, help="number of processes that decode images of more than 96 pixels")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=100, help="passes over the training images (default: %(default)s)")
    add("--limit-steps", type=int, help="end after this many steps; a cosine schedule ends too (default: no limit)")
    add("--batch-size", type=int, default=128, help="images per step, over all processes (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="split each batch into N micro-batches to save memory")
    optimizers = ["adam", "adamw", "sgd", "sgdm"]
    add("--opt", default="adam", choices=optimizers, help="sgdm: SGD with momentum 0.9 (default: %(default)s)")
    add("--lr", type=float, help="learning rate at the start (default: %(default)s)")
    betas = "adam, adamw: decay per step of the averages of the gradient and of its square (default: 0.9 0.999)"
    add("--betas", type=float, nargs=2, metavar=("B1", "B2"), help=betas)
    decay = "L2 penalty; with adamw, decay per step in units of the learning rate (default: %(default)s)"
    add("--weight-decay", type=float, default=0.0, help=decay)
    schedules = "of the learning rate; step: ÷ 10 at each milestone; cosine: to 0 over all steps (default: %(default)s)"
    add("--schedule", default="step", choices=["step", "cosine", "none"], help=schedules)
    warmup = "the learning rate rises linearly to its value in this many epochs (default: %(default)s)"
    add("--warmup", type=float, default=0.0, metavar="EPOCHS", help=warmup)
    milestones = "epochs at which --schedule step divides the learning rate (default: the paper's, or 30 60 90)"
    add("--milestones", type=int, nargs="*", help=milestones)
    smoothing = "fraction of the target that is spread evenly over all classes (default: %(default)s)"
    add("--label-smoothing", type=float, default=0.0, metavar="FRACTION", help=smoothing)
    clip = "largest norm of the gradients of all weights together (default: no limit)"
    add("--clip", type=float, metavar="NORM", help=clip)
    ema = "test and save (best.pt) an exponential moving average of the weights with this decay per step, with "
    ema += "BatchNorm statistics of its own (not in train_proxconnect.py; default: off)"
    add("--ema", type=float, metavar="DECAY", help=ema)
    add("--seed", type=int, default=0, help="seed of the weights, the order of the images and the augmentation")
    add("--pretrained", metavar="FILE", help="start from the weights of this checkpoint or state dict")
    batchnorm = "also test with BatchNorm statistics of the present weights, from N training batches (test_acc_bn; in "
    batchnorm += "train_proxconnect.py and with --ema, where 32 is the default, all tests use them)"
    add("--bn-batches", type=int, default=0, metavar="N", help=batchnorm + " (default: %(default)s)")
    add = parser.add_argument_group("machine and run").add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda if there is a GPU, else cpu)")
    amp = "forward pass in 16 bits; fp16 scales the loss; auto: bf16 where the device has it, else fp16 (default: off)"
    add("--amp", nargs="?", const="auto", choices=["auto", *AMP], help=amp)
    add("--compile", action="store_true", help="compile the network with torch.compile")
    deterministic = "on GPUs: equal results in every run and after --resume, bit for bit; slower"
    add("--deterministic", action="store_true", help=deterministic)
    add("--tensorboard", action="store_true", help="also write the metrics for TensorBoard, into the run folder")
    add("--wandb", metavar="PROJECT", help="also send the metrics to this project of Weights & Biases")
    add("--save-every", type=float, default=10.0, metavar="MINUTES", help="time between checkpoints within an epoch")
    add("--out", default="runs", help="the folder of the run folders")
    add("--name", help="name of the run and its folder (default: made from the flags)")
    add("--resume", metavar="RUN", help="continue the run in this folder, with the flags of its start")
    add("--eval-only", action="store_true", help="do not train; test the network of --resume or --pretrained")
    parser.set_defaults(script=script, **defaults)
    return parser


def option(name: str) -> str:
    """The flag as it is typed: option("batch_size") is "--batch-size"."""
    return "--" + name.replace("_", "-")


def fits(value, action: argparse.Action) -> bool:
    """Whether a flag can have the value."""
    if value is None:
        return True
    kind = bool if action.nargs == 0 else action.type or str
    several = action.nargs not in (None, 0, "?")
    values = value if several and isinstance(value, list | tuple) else [value]
    if several and (values is not value or action.nargs not in ("*", "+", len(values))):
        return False
    right = [type(v) is kind or (kind is float and type(v) is int) for v in values]
    return all(right) and all(v in action.choices for v in values if action.choices)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The flags, and the checkpoint to resume from, or None.

    With --resume, the flags in the checkpoint are the defaults; those in MAY_CHANGE may be given again (--epochs 200).
    """
    console.unsaved = []
    args = parser.parse_args(argv)
    checkpoint = None
    for name in ("pretrained", "resume"):
        if getattr(args, name) == "":
            raise RunError(f"--{name} is empty: give runs/NAME, or leave it out")
    if args.pretrained and Path(args.pretrained).is_dir():
        args.pretrained = str(Path(args.pretrained, "best.pt"))
    if args.resume:
        path = Path(args.resume).resolve()
        path = path / "last.pt" if path.is_dir() else path
        keep_freed_memory()
        checkpoint = load(path)
        if "args" not in checkpoint or ("optimizer" not in checkpoint and not args.eval_only):
            raise RunError(f"{path} is not the checkpoint of a whole run: resume last.pt, or use --pretrained {path}")
        if path.name != "last.pt" and path.with_name("last.pt").exists() and not args.eval_only:
            raise RunError(
                f"{path} is not the last checkpoint of its run, and to resume it would replace the later ones: copy it "
                "to another folder as last.pt"
            )
        before = checkpoint["args"]
        script = before.get("script", args.script)
        if script != args.script:
            raise RunError(f"{path} is a run of {script}: resume or test it with python {script}")
        if wrong := [a.dest for a in parser._actions if a.dest in before and not fits(before[a.dest], a)]:
            raise RunError(f"the checkpoint {path} is damaged (its flag {option(wrong[0])}): give another checkpoint")
        other_name = args.name not in (None, path.parent.name)
        other_out = args.out != parser.get_default("out") and Path(args.out).resolve() != path.parent.parent
        if (other_name or other_out) and not args.eval_only:
            raise RunError(
                f"a resumed run stays in its folder {path.parent}: leave out --name and --out, or copy the folder and "
                "resume the copy"
            )
        parser.set_defaults(**before)
        args = parser.parse_args(argv)
        args.name, args.out = path.parent.name, str(path.parent.parent)
        if args.amp == "auto" and before.get("amp"):
            args.amp = before["amp"]
        if args.schedule != before.get("schedule") and args.milestones == before.get("milestones"):
            args.milestones = None  # those of the other schedule
        if args.image_size is None and checkpoint.get("shape"):
            args.image_size = before["image_size"] = checkpoint["shape"][-1]
        for name, value in vars(args).items():
            if name not in MAY_CHANGE and value != before.get(name, value):
                raise RunError(
                    f"{option(name)} cannot change within a run (it was {before[name]}): leave it out, or start "
                    f"another run from these weights with --pretrained {path.parent / 'best.pt'}"
                )
    for name in (*SMALLEST, *NOT_NEGATIVE):
        value, smallest = getattr(args, name, None), SMALLEST.get(name, 0)
        largest = 1e30 if isinstance(value, float) else 2**63 - 1
        if value is not None and not smallest <= value <= largest:
            raise RunError(f"{option(name)} must be a number of at least {smallest}; it is {value}")
    for name in ("label_smoothing", "ema"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise RunError(f"{option(name)} must be at least 0 and below 1; it is {value}")
    if args.clip is not None and not 0 < args.clip < 1e30:
        raise RunError(f"--clip must be a positive number; it is {args.clip}")
    if args.name is not None and (args.name in (".", "..", "") or Path(args.name).name != args.name):
        raise RunError(f"--name is the name of a folder in --out, without / or ..; it is {args.name!r}")
    for name in () if args.resume else ("name", "out"):
        value = str(getattr(args, name) or "")
        if value.encode(errors="ignore").decode() != value:
            raise RunError(f"--{name} must be valid UTF-8, since many programs open no other files; it is {value!r}")
    if any(milestone < 1 for milestone in args.milestones or []):
        raise RunError(f"--milestones are epochs and must be at least 1; they are {args.milestones}")
    if args.opt:  # otherwise the trainer chooses the optimizer, and calls complete_betas() then
        complete_betas(args)
    if args.eval_only and not (args.resume or args.pretrained):
        raise RunError("--eval-only needs a network to test: give --resume runs/NAME or --pretrained runs/NAME/best.pt")
    return args, checkpoint


def complete_betas(args: argparse.Namespace) -> None:
    """Set the default of --betas, or remove it if --opt has none. Raises RunError if it is wrong."""
    only_for(args, "opt", {"betas": ("adam", "adamw")})
    fill(args, betas=[0.9, 0.999])
    if not all(0 <= beta < 1 for beta in getattr(args, "betas", ())):
        raise RunError(f"--betas must be at least 0 and below 1; they are {args.betas}")


def complete_schedule(args: argparse.Namespace, milestones: tuple[int, ...] | None = None) -> None:
    """Set the default of --milestones, or remove it if --schedule has none. Raises RunError if it is given then.

    milestones: those of the trainer's paper, or None.
    """
    only_for(args, "schedule", {"milestones": ("step",)})
    fill(args, milestones=list(milestones or (30, 60, 90)))


def only_for(args: argparse.Namespace, choice: str, flags: dict[str, tuple[str, ...]]) -> None:
    """Refuse the flags that the chosen method does not have, and remove them from `args`.

    choice: the flag that chooses the method, such as "method". flags: for each flag, the values of `choice` that have
    it. These flags have the argparse default None or False. Raises RunError if one is given to a method without it.
    """
    chosen = getattr(args, choice, None)
    for name, owners in flags.items():
        if chosen in owners or name not in args:
            continue
        value = getattr(args, name)
        if value is not None and value is not False:
            flag, names = option(choice), " or ".join(owners)
            raise RunError(f"{option(name)} is for {flag} {names}: leave it out with {flag} {chosen}")
        delattr(args, name)


def fill(args: argparse.Namespace, **defaults) -> None:
    """Set the flags of `args` that are None to these defaults. A flag that only_for() removed stays removed."""
    for name, value in defaults.items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# Device and processes.


def pick_device(name: str, deterministic: bool = False) -> torch.device:
    """The device that --device names; "auto" is the GPU if there is one. torchrun's processes take one GPU each.

    On a GPU, cuDNN tries several algorithms per layer and keeps the fastest, and float32 matrix products may round
    their factors to TF32. With deterministic=True neither happens, and every run gives the same results.
    Raises RunError if the device cannot be used.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if device.type == "cpu":
            keep_freed_memory()
        torch.zeros(1, device=device).item()
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not deterministic
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).splitlines()[0][:100]
        raise RunError(f"--device {name} cannot be used here ({reason}): try --device cpu") from None
    return device


AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}  # --amp


def pick_amp(amp: str | None, device: torch.device) -> str | None:
    """The number format of --amp: "bf16", "fp16", or None for float32. "auto" is bf16 unless the GPU lacks it."""
    if amp != "auto":
        return amp
    lacks = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp16" if lacks else "bf16"


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Let networks compute in the number format `amp` within `with autocast(device, amp)`, see pick_amp()."""
    return torch.autocast(device.type, AMP.get(amp, torch.bfloat16), enabled=bool(amp))


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a process frees, where it is glibc, and let Linux use pages of 2 MB.

    Otherwise it returns every tensor of more than 32 MB to the system, and each step gets cleared memory again. This
    takes half of the time of a step with 11 million weights. Call it before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it once
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


PATIENCE = 10  # seconds in which the processes usually find each other


def start_processes(device: torch.device) -> tuple[int, int]:
    """Join the process group if torchrun started this process: (rank, world_size). Only rank 0 prints and writes."""
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            # gloo also on GPU machines, so that small messages between the hosts do not wait for the devices. The other
            # processes wait while rank 0 decodes a data set, which can take hours.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            which, count = int(os.environ.get("RANK", 0)), int(os.environ["WORLD_SIZE"])
            if not 0 <= which < count:
                raise ValueError(f"RANK is {which}, with {count} processes")
            where = ":".join(os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
            line = f"process {which} waits for {count} processes at {where}"
            said = threading.Timer(PATIENCE, console.print, [line])
            said.daemon = True
            said.start()
            try:
                dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
            finally:
                said.cancel()
    except (ValueError, RuntimeError) as e:  # RANK is missing, no answer from the first process, …
        reason = " ".join(str(e).split())[:150]
        raise RunError(f"the processes cannot find each other ({reason}): start them with torchrun") from None
    console.quiet = rank() > 0
    return rank(), world_size()


def end_processes() -> None:
    """Leave the process group, after all processes have arrived here."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum the tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_process(*facts) -> list[bool]:
    """For each fact, whether it is true in any process. So all processes leave the training loop at the same step."""
    if world_size() == 1:
        return [bool(fact) for fact in facts]
    return [count > 0 for count in all_reduce_sum(torch.tensor([int(bool(fact)) for fact in facts])).tolist()]


def on_rank_0(write, *arguments) -> None:
    """Call write(*arguments) in rank 0 only. If it raises RunError, all processes do."""
    error = None
    try:
        if rank() == 0:
            write(*arguments)
    except RunError as e:
        error = e
    if any_process(error)[0]:
        raise error or RunError("the first process could not write")


def parallel(net: torch.nn.Module, args, device: torch.device) -> torch.nn.Module:
    """The network as the training step calls it: compiled with --compile, in DistributedDataParallel if needed.

    On GPUs BatchNorm uses the statistics of the whole batch, on CPUs those of each process's images.
    """
    if world_size() > 1 and device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    # CUDA graphs save the launch of each kernel, but they overwrite the gradients of the last call. So they cannot be
    # used with micro-batches, which accumulate gradients, or with other processes, which wait for gradients.
    graphs = device.type == "cuda" and world_size() == args.accumulate == 1
    model = torch.compile(net, mode="reduce-overhead" if graphs else "default") if args.compile else net
    if world_size() > 1:
        # The gradients of 1×1 filters can have other strides than the filters, for the same order in memory.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with warnings.catch_warnings():  # torch 2.13 warns about a renamed argument
            warnings.simplefilter("ignore", FutureWarning)
            model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return model


def micro_batches(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, count: int):
    """Split a batch into `count` micro-batches; yield (images, labels, fraction of the batch) of each.

    Multiply each loss by its fraction. The gradients are averaged over the processes once, after the last micro-batch.
    """
    count = max(1, min(count, len(labels) // 2))  # BatchNorm needs two images
    chunks = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
    for i, (x, y) in enumerate(chunks, 1):
        with model.no_sync() if world_size() > 1 and i < len(chunks) else contextlib.nullcontext():
            yield x, y, len(y) / len(labels)


def average_batchnorm(model: torch.nn.Module) -> None:
    """Average BatchNorm's running statistics over the processes, each of which has seen other images."""
    for m in _batchnorms(model) if world_size() > 1 else []:
        for statistic in (m.running_mean, m.running_var):
            all_reduce_sum(statistic).div_(world_size())


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def make_optimizer(params, args) -> torch.optim.Optimizer:
    """The network's optimizer, from --opt, --lr, --betas and --weight-decay. params: parameters, or groups of them."""
    complete_betas(args)
    params = list(params)
    first = params[0]["params"][0] if isinstance(params[0], dict) else params[0]
    # A fused optimizer updates all weights in one pass. But fused SGD leaves its momentum uninitialised if a GradScaler
    # skips the first step.
    fused = first.device.type in ("cpu", "cuda") and (args.opt, args.amp) != ("sgdm", "fp16")
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": fused}
    if args.opt in ("adam", "adamw"):
        optimizer = torch.optim.Adam if args.opt == "adam" else torch.optim.AdamW
        return optimizer(params, betas=tuple(args.betas), **options)
    return torch.optim.SGD(params, momentum=0.9 if args.opt == "sgdm" else 0.0, **options)


def learning_rate(args, epoch: int, step: int, total_steps: int) -> float:
    """The learning rate of a step, without the warm-up, by --schedule.

        step       lr · 0.1^(number of milestones ≤ epoch)
        cosine     lr · ½ (1 + cos(π · step / total_steps))
        none       lr

    epoch, step: the numbers of complete epochs and steps before this step.
    """
    if args.schedule == "step":
        return args.lr * 0.1 ** sum(epoch >= m for m in args.milestones)
    if args.schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return args.lr


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches, device: torch.device, amp: str | None) -> dict[str, float]:
    """{"loss": mean cross-entropy, "acc": accuracy, 0 to 1} over the batches of a data set.

    With more than 50 classes also "top5": the fraction of the images whose class is among the five largest logits.
    """
    model.eval()
    k = 5 if batches.num_classes > 50 else 1
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, class is the largest, is among the k largest
    for images, labels in batches.epoch():
        with autocast(device, amp):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        hits = logits.topk(k).indices == labels[:, None]
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    model.train()
    columns = dict(zip(("loss", "acc", "top5"), (all_reduce_sum(sums) / batches.size).tolist(), strict=True))
    if k == 1:
        del columns["top5"]
    return columns


@torch.no_grad()
def estimate_batchnorm(net: torch.nn.Module, batches, device: torch.device, amp: str | None, count: int = 32) -> None:
    """Compute BatchNorm's running statistics with the present weights.

    In training, the running statistics are averages over the weights of many steps. They do not fit weights that change
    quickly, or that are not the trained ones.

    batches: the training batches, augmented as in training. (Statistics of images without the borders of random crops
    cost 1 to 3 points of accuracy on CIFAR-10.) count: how many batches of epoch 0 are used. The result is the average
    over the batches, as in torch.optim.swa_utils.update_bn, and over the processes. The rest of the network is in eval
    mode, without dropout.
    """
    norms = _batchnorms(net)
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    training = net.training
    if norms:
        net.eval()
        for m in norms:
            m.train()
    for i, (images, _) in enumerate(itertools.islice(batches.epoch(), count if norms else 0), 1):
        for m in norms:
            m.momentum = 1 / i
        with autocast(device, amp):
            net(images)
    average_batchnorm(net)
    net.train(training)
    for m, (momentum, batches_tracked) in zip(norms, before, strict=True):
        m.momentum = momentum
        m.num_batches_tracked.copy_(batches_tracked)


@contextlib.contextmanager
@torch.no_grad()
def reestimate_batchnorm(net: torch.nn.Module, batches, device: torch.device, amp: str | None, count: int = 32):
    """estimate_batchnorm() for the body of `with reestimate_batchnorm(…)`. Then the previous statistics come back."""
    before = [(m, m.running_mean.clone(), m.running_var.clone()) for m in _batchnorms(net)]
    try:
        estimate_batchnorm(net, batches, device, amp, count)
        yield
    finally:
        for m, mean, var in before:
            m.running_mean.copy_(mean)
            m.running_var.copy_(var)


def _batchnorms(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The BatchNorms of the network that have running statistics."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    return [m for m in net.modules() if isinstance(m, kind) and m.running_mean is not None]


def evaluate_all(
    model, args, device: torch.device, *, train=None, val=None, test, during_test=None
) -> dict[str, float]:
    """The columns test_loss and test_acc; with validation images, val_loss and val_acc.

    With --bn-batches and `train`, also test_acc_bn: the test accuracy with BatchNorm statistics of the present weights.
    With --ema, all tests use such statistics, and the network keeps them. They are those of averaged weights, and the
    training steps have made none.
    during_test: a context manager for the time in which test_acc is measured.
    """
    net = getattr(model, "module", model)  # DistributedDataParallel's
    net = getattr(net, "_orig_mod", net)  # torch.compile's
    if args.ema is not None:
        estimate_batchnorm(net, train, device, args.amp, args.bn_batches or 32)
    columns = {}
    for name, batches, context in (("val", val, None), ("test", test, during_test)):
        if batches is not None:
            with context or contextlib.nullcontext():
                results = evaluate(model, batches, device, args.amp)
            columns |= {f"{name}_{column}": value for column, value in results.items()}
    if args.bn_batches and train is not None and args.ema is None:
        with reestimate_batchnorm(net, train, device, args.amp, args.bn_batches):
            columns["test_acc_bn"] = evaluate(model, test, device, args.amp)["acc"]
    return columns


def report(columns: dict[str, float], test) -> int:
    """Print the result of --eval-only: what evaluate_all() returned. Returns the exit code."""
    loss, accuracy = columns["test_loss"], columns["test_acc"]
    if not math.isfinite(loss):
        raise RunError(f"the test loss is {loss}: the weights or, with --amp, the activations are not finite")
    line = f"test loss {loss:.4f}, test accuracy {100 * accuracy:.2f} % over {test.size:,} images"
    if "test_top5" in columns:
        line += f", top-5 accuracy {100 * columns['test_top5']:.2f} %"
    if "test_acc_bn" in columns:
        line += f"; {100 * columns['test_acc_bn']:.2f} % with BatchNorm statistics of these weights"
    if "val_acc" in columns:
        line += f"; validation accuracy {100 * columns['val_acc']:.2f} %"
    console.print(line)
    return 0


class Interrupt:
    """Delay signals within `with Interrupt() as interrupt`.

    Ctrl-C, SIGTERM, SIGHUP (the terminal closes) and SIGUSR1 (a cluster warns) make `interrupt` true, so that the loop
    can save and stop after the current step. A second signal stops at once. An ignored signal stays ignored (SIGHUP
    under nohup). Python delivers signals to its main thread only, so in another thread this has no effect.
    """

    def __enter__(self):
        self.signal = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]
        wanted = [n for n in numbers if in_main_thread and signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._ask) for number in wanted}
        return self

    def __exit__(self, *_):
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def _ask(self, which, frame):
        # With several processes a second signal is normal: the terminal sends one, and torchrun sends it again.
        if self.signal is not None and world_size() == 1:
            raise KeyboardInterrupt
        self.signal = which

    def __bool__(self) -> bool:
        return self.signal is not None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: dictionaries of tensors, numbers, strings, lists and dictionaries, which load with weights_only=True.


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w"):
    """Open a temporary file that replaces `path` at the end. Readers see the complete old file or the complete new one.

    mode: "w" or "wb". Every writer has its own temporary file. A missing folder is made. Raises RunError if the file
    cannot be written; `path` then does not change.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RunError(
            f"{path} could not be written, because its folder cannot be made ({e.strerror}): give another folder"
        ) from None
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
        with open(temporary, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]  # without the temporary name
        with contextlib.suppress(OSError):
            reason += f"; {shutil.disk_usage(path.parent).free >> 20:,} MB are free"
        kept = "the old file has not changed" if os.path.exists(path) else "there is no older file"
        raise RunError(
            f"{path} could not be written ({reason}): make room there, or make it writable; {kept}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # there is none if it has replaced `path`


def save(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint. Raises RunError if it cannot be written."""
    with replacing(path, "wb") as f:
        torch.save(checkpoint, f)


def load(path: Path | str) -> dict:
    """Read a checkpoint. Raises RunError if there is none or if it is damaged."""
    if not Path(path).is_file():
        raise RunError(f"there is no checkpoint at {path}: give a run's folder or one of its .pt files")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file raises many types: RuntimeError, EOFError, UnpicklingError, …
        reason = str(e).strip().splitlines()[0][:100] if str(e).strip() else type(e).__name__
        raise RunError(f"the checkpoint {path} is damaged or not a checkpoint ({reason}): use another one") from None
    if not isinstance(checkpoint, dict):
        raise RunError(f"{path} is not a checkpoint but a {type(checkpoint).__name__}: use another file")
    if "args" in checkpoint or {"classes", "images", "normalisation"} <= checkpoint.keys():  # no plain state dict
        for name, right in PARTS.items():
            if (name in checkpoint or name == "model") and not right(checkpoint.get(name)):
                raise RunError(f"the checkpoint {path} is damaged (its part {name}): give another checkpoint")
    return checkpoint


def _is_count(x) -> bool:
    return type(x) is int and 0 <= x < 2**63


def _are_numbers(values) -> bool:
    return isinstance(values, list) and all(type(x) in (int, float) for x in values)


def _is_row(row) -> bool:
    return isinstance(row, dict) and row.keys() >= set(METRICS) and _are_numbers([*row.values()])


PARTS = {  # of a checkpoint: whether they can be right. Run._restore() checks the state of the optimizer and the like.
    "args": lambda x: isinstance(x, dict) and all(isinstance(name, str) for name in x),
    "model": lambda x: isinstance(x, dict),
    "images": lambda x: isinstance(x, dict) and all(map(_is_count, x.values())),
    "shape": lambda x: isinstance(x, tuple) and len(x) == 3 and all(_is_count(size) and size for size in x),
    "classes": lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x),
    "normalisation": lambda x: (
        isinstance(x, list) and len(x) == 2 and all(map(_are_numbers, x)) and len(x[0]) == len(x[1])
    ),
    "rows": lambda x: isinstance(x, list) and all(map(_is_row, x)),
    **dict.fromkeys(("epoch", "batch", "step"), _is_count),
    "seconds": lambda x: _are_numbers([x]) and 0 <= x < math.inf,
}


def load_weights(net: torch.nn.Module, args, checkpoint: dict | None, may_lack: tuple[str, ...] = ()) -> None:
    """Load the weights of --resume or --pretrained into the network. Without these flags nothing is loaded.

    checkpoint: what parse() returned. may_lack: endings of the names of parameters that a --pretrained file may lack.
    It may also lack the BatchNorm1d before the classifier (bn_fc). That layer then keeps its initial state, and a line
    is printed. Raises RunError if the file is of another network, or with --eval-only of other flags.
    """
    if checkpoint:
        weights = tested_weights(checkpoint, args.resume) if args.eval_only else checkpoint["model"]
        return load_model(net, weights, args.resume)
    if not args.pretrained:
        return None
    path, checkpoint = args.pretrained, load(args.pretrained)
    theirs = checkpoint.get("args", {})
    arch = theirs.get("arch", args.arch)
    if arch != args.arch:
        raise RunError(f"--pretrained {path} is of {arch}, not of {args.arch}: use --arch {arch} or another file")
    weights = tested_weights(checkpoint, path) if "model" in checkpoint else checkpoint  # else a plain state dict
    same = lambda *names: all(theirs.get(name) == getattr(args, name, None) for name in names)
    folder = lambda flags: Path(flags.get("data_dir") or "").resolve()
    images = lambda flags: folder(flags) if flags.get("dataset") in ("folder", "imagenet") else flags.get("dataset")
    if getattr(args, "val", 0) and images(theirs) == images(vars(args)) and not same("val", "seed"):
        console.print(
            f"{path} was trained with another --val or --seed, so it has seen images that are held out here for "
            "validation: the validation accuracy is too high"
        )
    if args.eval_only:  # training may start from any weights, but a test must be of the network that was trained
        for name in ("script", "quantizer", "method", "act", "binarize_all", "ratio", "prune", "rho"):
            if theirs.get(name, getattr(args, name, None)) != getattr(args, name, None):
                raise RunError(
                    f"{path} was trained with {name} {theirs[name]}: test it with --eval-only --resume {path}, which "
                    "takes its flags too"
                )
    elif isinstance(weights, dict):
        weights = {name: own for name, own in net.state_dict().items() if name.endswith(may_lack)} | weights
    if isinstance(weights, dict):
        fresh = {name: own for name, own in net.state_dict().items() if name.startswith("bn_fc.")}
        if fresh and not fresh.keys() & weights.keys():
            weights = fresh | weights
            console.print(
                f"{path} has no bn_fc, the BatchNorm1d before the classifier, which therefore keeps its initial state: "
                "it has no effect in a test before training, and normalises the classifier's input in training"
            )
    load_model(net, weights, path)


def tested_weights(checkpoint: dict, path: Path | str) -> dict:
    """The weights of the checkpoint at `path` that its run tests: the averages of --ema, or those that it trains."""
    if "ema" not in checkpoint:
        return checkpoint["model"]
    average = checkpoint["ema"]
    if not isinstance(average, dict) or not all(isinstance(name, str) for name in average):
        raise RunError(f"{path} is damaged (it lacks the averages of --ema): give another checkpoint")
    return {name.removeprefix("module."): value for name, value in average.items() if name != "n_averaged"}


def match_data(args, checkpoint: dict | None, train, val, test) -> None:
    """Use the normalisation of the checkpoint's run, and set --image-size to the size of the images.

    Raises RunError if the data have other classes or another size.

    checkpoint: what parse() returned; with --eval-only and --pretrained, that file is used. train, val, test: what
    data.load() returned. A line is printed if the number of images has changed. A run with --val cannot continue then,
    nor if the names of its training images have changed.
    """
    source, args.image_size = args.resume or args.pretrained, train.shape[-1]
    if checkpoint is None and args.eval_only:
        checkpoint = load(args.pretrained)
    if not checkpoint or not {"classes", "images", "normalisation"} <= checkpoint.keys():
        return  # a new run, or a plain state dict
    ours, theirs = tuple(train.shape), tuple(checkpoint.get("shape", train.shape))
    if ours != theirs:
        sizes = ["×".join(map(str, shape)) for shape in (theirs, ours)]
        raise RunError(
            f"{source} was trained on images of {sizes[0]} elements, and those of {args.data_dir} have {sizes[1]}: add "
            f"--image-size {theirs[-1]}"
        )
    theirs, ours = checkpoint["classes"], train.classes
    if theirs != ours:
        only = [f"{source} knows {name!r}" for name in theirs if name not in ours]
        only += [f"{args.data_dir} has {name!r}" for name in ours if name not in theirs]
        difference = f": only {only[0]}" if only else ", in another order"
        raise RunError(
            f"{source} was trained on other classes than those of {args.data_dir}{difference}; use its data, or start "
            "a new run"
        )
    changes = []
    for name, batches in (("training", train), ("validation", val), ("test", test)):
        before, now = checkpoint["images"].get(name), batches.size if batches is not None else 0
        if before not in (None, now):
            changes.append((name, f"{args.data_dir} has {now:,} {name} images; {source} was trained with {before:,}"))
    if args.val and train.listing != checkpoint.get("listing", train.listing) and "training" not in dict(changes):
        changes.append(("training", f"the training images of {args.data_dir} have other names than those of {source}"))
    for name, change in changes:
        if name == "training" and args.val and not args.eval_only:
            raise RunError(
                f"{change}, so --val would hold out images that the network has seen: use the images of the run, or "
                f"start a new run with --pretrained {source}"
            )
        console.print(change + (", so other images are held out" if name == "training" and args.val else ""))
    scale, shift = (torch.tensor(values)[:, None, None] for values in checkpoint["normalisation"])
    for batches in (train, val, test):
        if batches is not None and batches.scale.shape == scale.shape:
            batches.scale, batches.shift = scale.to(batches.scale), shift.to(batches.shift)


def restore(part, state: dict) -> None:
    """part.load_state_dict(state), for an optimizer, a GradScaler, a generator of gradients, …

    Raises ValueError if an optimizer's averages do not fit its parameters: PyTorch's fused optimizers do not check it,
    and write beyond their memory. Raises other errors if `state` is of another kind. The flags choose an optimizer's
    settings, not `state`.
    """
    optimizer = part if isinstance(part, torch.optim.Optimizer) else getattr(part, "optimizer", None)
    groups = [dict(group) for group in optimizer.param_groups] if optimizer else []
    part.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups if optimizer else (), groups, strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    for p, averages in optimizer.state.items() if optimizer else ():
        sizes = {name: torch.as_tensor(x).shape for name, x in averages.items()}
        if sizes.keys() != names or sizes.pop("step", torch.Size()).numel() != 1 or set(sizes.values()) != {p.shape}:
            raise ValueError("the state of its optimizer does not fit the weights")


def load_model(net: torch.nn.Module, weights: dict, path: Path | str) -> None:
    """net.load_state_dict(weights). Raises RunError, which names `path` and a mismatch, if they do not fit."""
    try:
        net.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as e:
        reason = str(e).strip().split("\n")[-1].strip()[:200]
        raise RunError(f"{path} is of another network or number of classes ({reason}): use another file") from None


# ---------------------------------------------------------------------------------------------------------------------
# The run folder.


def open_folder(folder: Path, reuse: bool, resumed: bool) -> tuple[Path, int | None]:
    """Make and lock the run folder, and delete the temporary files of killed processes: (folder, lock).

    reuse: use this folder (--name); otherwise the first of NAME, NAME-2, NAME-3, … that does not exist.
    Raises RunError if it cannot be written, if another process uses it, or if it contains a run and this one is new.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        name, number = folder.name, 1
        while not reuse:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
            number += 1
            folder = folder.with_name(f"{name}-{number}")
        folder.mkdir(exist_ok=True)
        lock = lock_folder(folder)
        if not resumed and any((folder / file).exists() for file in ("last.pt", "best.pt")):
            unlock(lock)
            resume = f"resume it (--resume {folder}), or " if (folder / "last.pt").exists() else ""
            raise RunError(f"{folder} contains a run already: {resume}choose another --name")
        for file in ("args.json", "metrics.csv", "last.pt", "best.pt"):
            for temporary in folder.glob(f"{file}.*.tmp"):
                temporary.unlink()
    except OSError as e:
        raise RunError(f"the run folder {folder} cannot be written ({e}): choose another --out") from None
    return folder, lock


def lock_folder(folder: Path) -> int | None:
    """Lock the folder for this process. The system releases the lock when the process ends, even if it is killed."""
    if fcntl is None:
        return None
    lock = os.open(folder / "log.txt", os.O_RDWR | os.O_CREAT)  # NFS locks only files that may be written
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunError(f"another process trains in {folder}: wait for it, or choose another --name") from None
    except OSError:  # a file system without locks
        pass
    return lock


def unlock(lock: int | None) -> None:
    if lock is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)  # os.close() alone does not, while DataLoader workers hold copies
        os.close(lock)


def environment(device: torch.device) -> dict:
    """What a run depends on besides its flags, for args.json."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": shlex.join(sys.argv),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "threads": torch.get_num_threads(),
        "world_size": world_size(),
    }


def command_line(script: str, *words: str | Path) -> str:
    """The command as it is typed in a shell, with torchrun if there are several processes."""
    start = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', world_size())}"]
    return shlex.join([*(start if world_size() > 1 else ["python"]), script, *map(str, words)])


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, progress, finite checks. A row of metrics is a dictionary: METRICS and the columns of the trainer.

METRICS = (
    *("epoch", "step", "train_loss", "train_acc", "test_loss", "test_acc", "lr", "seconds", "images_per_s"),
    "flip_ratio",  # fraction of the binary weights that changed sign in the epoch
    "plus_ratio",  # fraction of the binary weights that are +1
)


def write_metrics(folder: Path, rows: list[dict]) -> None:
    columns = dict.fromkeys((*METRICS, *(column for row in rows for column in row)))
    with replacing(folder / "metrics.csv") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def best_row(rows: list[dict]) -> dict:
    """The row of the network in best.pt: with --val the first row with the best val_acc, otherwise the last row."""
    return max(rows, key=lambda row: row.get("val_acc", row["step"]))


def print_metrics(row: dict, heading: bool) -> None:
    """Print one row, but not the columns of single layers, such as zeros/layer1.0.conv1."""
    shown = {name: value for name, value in row.items() if "/" not in name}
    if heading:
        console.print("  ".join(f"{name:>7}" for name in shown))
    cells = (f"{value:.0f}" if value >= 1000 or isinstance(value, int) else f"{value:.4g}" for value in shown.values())
    console.print("  ".join(f"{cell:>{max(7, len(name))}}" for name, cell in zip(shown, cells, strict=True)))


class Trackers:
    """Sends the metrics to TensorBoard and to Weights & Biases, if --tensorboard and --wandb say so."""

    # How the columns of TensorBoard's groups end. All others are in the group "progress".
    GROUPS: ClassVar = {"acc": "accuracy", "acc_bn": "accuracy", "top5": "accuracy", "loss": "loss"}
    GROUPS |= {"_ratio": "weights", "zeros": "weights"}

    def __init__(self, args, folder: Path, step: int):
        """step: of the last row in metrics.csv. TensorBoard hides what an interrupted run wrote after it."""
        self.board = self.wandb = None
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                raise RunError(f"--tensorboard needs its package ({e}): pip install tensorboard") from None
            self.board = SummaryWriter(str(folder), purge_step=step + 1)
        if args.wandb:
            try:
                import wandb

                identity = f"{folder.name}-{uuid.uuid5(uuid.NAMESPACE_URL, str(folder.resolve())).hex[:8]}"
                options = {"project": args.wandb, "name": folder.name, "dir": str(folder), "config": vars(args)}
                self.wandb = wandb.init(**options, id=identity[-64:], resume="allow")
                self.histogram = wandb.Histogram
            except ImportError as e:
                raise RunError(f"--wandb needs its package ({e}): pip install wandb") from None
            except Exception as e:  # wandb raises many types
                reason = " ".join(str(e).split())[:150]
                raise RunError(f"--wandb cannot start ({reason}): log in, or set WANDB_MODE=offline") from None

    def log(self, row: dict) -> None:
        """Send a row of the metrics. The columns of single layers become histograms; W&B also gets their values.

        TensorBoard shows the columns in groups: those of accuracy, loss, weights (flip_ratio, …) and progress (lr, …).
        """
        layers, step = {}, row["step"]
        for column, value in row.items():
            kind, _, layer = column.partition("/")
            if kind in ("flips", "plus", "zeros") and layer:
                layers.setdefault(f"layers/{kind}", []).append(value)
            elif self.board and column != "step":
                group = next((group for ending, group in self.GROUPS.items() if column.endswith(ending)), "progress")
                self.board.add_scalar(column if layer else f"{group}/{column}", value, step)
        if self.board:
            for name, values in layers.items():
                self.board.add_histogram(name, torch.tensor(values), step, bins="auto")
            self.board.flush()
        if self.wandb:
            self.wandb.log(row | {name: self.histogram(values) for name, values in layers.items()}, step=step)

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


class Bar(Progress):
    """The live line: epoch, progress, loss, accuracy, images per second, time left. Hidden if the output is a file."""

    def __init__(self, total_steps: int, step: int):
        metrics = "loss {task.fields[loss]:.4f}  acc {task.fields[acc]:.2%}  {task.fields[speed]:,.0f} img/s"
        before, after = TextColumn("{task.description}"), TextColumn("left")
        columns = (before, BarColumn(bar_width=20), TextColumn(metrics), TimeElapsedColumn(), after)
        hidden = rank() > 0 or not console.is_terminal
        super().__init__(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden)
        self.add_task("", total=total_steps, completed=step, loss=math.nan, acc=0.0, speed=0.0)
        self.next = 0.0

    def due(self) -> bool:
        """True twice a second. Not in every step, because the host must wait for a GPU to read a number from it."""
        return time.perf_counter() >= self.next

    def show(self, description: str, step: int, **fields: float) -> None:
        self.next = time.perf_counter() + 0.5
        self.update(self.task_ids[0], description=description, completed=step, refresh=True, **fields)


class FiniteCheck:
    """Finds the first loss, gradient or weight that is NaN or infinite.

    Call watch() in every step. It leaves its findings on the device. Call check() rarely, because it waits for the
    device to read them.
    scaler: an enabled GradScaler, or None. It skips a step whose gradients are not finite and halves its scale. So
    such gradients are normal, and only a scale below SMALLEST_SCALE is an error.
    """

    NEVER, SMALLEST_SCALE = 2**62, 2.0**-10

    def __init__(self, net: torch.nn.Module, generator, device: torch.device, scaler=None):
        self.names, self.weights = zip(*net.named_parameters(), strict=True)
        self.scaler = scaler
        self.phi = list(generator.named_parameters()) if generator else []  # the hypernetworks' parameters
        # The first step in which the loss (element 0) or each weight's gradient was not finite.
        self.first = torch.full((1 + len(self.names),), self.NEVER, device=device)

    @torch.no_grad()
    def watch(self, loss: torch.Tensor, step: int) -> None:
        grads = [w.detach() if w.grad is None else w.grad for w in self.weights]
        # The 2-norm is the fastest. It is infinite too where the sum of the squares overflows.
        norms = () if self.scaler else torch._foreach_norm(grads)
        largest = torch.stack([loss.float(), *norms])  # the loss alone counts for all elements of `first`
        self.first.clamp_max_(torch.where(largest.isfinite(), self.NEVER, step))

    def check(self, epoch: int, step: int, folder: Path, test_loss: float) -> None:
        """Raise RunError, which names the first loss, gradient or weight that is NaN or infinite, if there is one.

        epoch, step, folder: for the message. test_loss: is checked too.
        """
        if world_size() > 1:
            dist.all_reduce(self.first, dist.ReduceOp.MIN)
        first = self.first.tolist()
        # A finite step can overflow weights, and the loss stays finite because sign(NaN) is −1. So weights are checked.
        values = [*zip(self.names, self.weights, strict=True), *self.phi]
        finite = torch.stack(torch._foreach_norm([w.detach() for _, w in values], math.inf)).isfinite().tolist()
        if min(first) < self.NEVER:
            step, when = min(first), "in"
            what = ("the loss", *(f"the gradient of {name}" for name in self.names))[first.index(step)]
        elif not all(finite):
            what, when = values[finite.index(False)][0], "by"
        elif self.scaler and self.scaler.get_scale() < self.SMALLEST_SCALE:
            what, when = "the gradients in float16, at any scale of the loss,", "by"
        elif not math.isfinite(test_loss):
            what, when = "the test loss", "after"
        else:
            return
        last = folder / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        smaller = "--lr or --lr-fast" if self.phi else "--lr"
        smaller += ", or --amp bf16" if self.scaler else ""
        raise RunError(
            f"{what} became NaN or infinite {when} step {step:,}, epoch {epoch}: {kept}; try a smaller {smaller}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The run.


class Run:
    """One training run: how far it is, its metrics and its checkpoints.

        run = runs.Run(args, kind="ste", about="gradients: ste", train=train, test=test, device=device, signs=signs,
                       checkpoint=checkpoint, state={"model": net, "optimizer": optimizer})
        with run:  # Ctrl-C and SIGTERM take effect after a step
            for epoch in run.epochs():
                for images, labels in run.batches():
                    ...  # one training step, which calls run.count(loss, logits, labels)
                if run.leaving:  # stopped within the epoch; everything is saved
                    break
                run.end_epoch(evaluate_all(…), signs)
        return run.finish()

    kind: the first part of the name of a run without --name. about: the end of the first line that is printed.
    train, val, test: batches (data.py); val can be None. layers: the binary layers of the network. signs [N] int8:
    those of their weights, in this order. checkpoint: what parse() returned.
    state: the objects that a checkpoint contains, with state_dict() and load_state_dict(), or None. "model" is one of
    them; the trainer has loaded it already. "scaler" is a GradScaler; one that is not enabled is left out.
    Raises RunError if the folder cannot be written or contains another run, or if the checkpoint does not fit.
    """

    def __init__(
        self, args, *, kind: str, train, val, test, device, layers, signs, checkpoint, state: dict, about: str = ""
    ):
        self.args, self.train = args, train
        names = {module: name for name, module in state["model"].named_modules()}
        self.layers = {names[layer]: layer.weight.numel() for layer in layers}
        self.images = {"training": train.size, "validation": val.size if val else 0, "test": test.size}
        self.state = {name: part for name, part in state.items() if part is not None}
        if "scaler" in state and not state["scaler"].is_enabled():
            del self.state["scaler"]
        if args.ema is not None:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
            average = torch.optim.swa_utils.AveragedModel(state["model"], multi_avg_fn=average, use_buffers=True)
            self.state["ema"] = average
        if args.warmup and args.warmup >= args.epochs:
            raise RunError(f"--warmup {args.warmup:g} must be less than --epochs, which is {args.epochs}")
        self.total_steps = min(args.epochs * len(train), args.limit_steps or math.inf)
        self.epoch = self.batch = self.step = 0  # complete epochs; batches of this epoch; steps in total
        self.seconds = 0.0  # training time of this epoch
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # of this epoch: loss, correct, images
        self.signs = signs  # at the start of this epoch
        self.rows: list[dict] = []  # of metrics.csv
        self.leaving = False
        self.finite = FiniteCheck(state["model"], state.get("generator"), device, self.state.get("scaler"))
        if checkpoint:
            self._restore(checkpoint)
        name = args.name or f"{kind}-{args.arch}-{args.dataset}-{args.opt}-seed{args.seed}"
        self.folder, self.lock = Path(args.out) / name, None
        self.trackers = None
        on_rank_0(self._open, checkpoint is not None, device)
        where = f"{device}" if world_size() == 1 else f"{world_size()} processes on {device.type}"
        parameters = sum(p.numel() for p in state["model"].parameters())
        console.print(
            f"{self.folder}: {args.arch} on {args.dataset} ({' + '.join(f'{n:,}' for n in self.images.values() if n)} "
            f"images), {where}, "
            f"{parameters:,} parameters, {len(signs):,} of them binary; {args.opt}, learning rate {args.lr:g}"
            + (f"; {about}" if about else "")
        )

    def _restore(self, checkpoint: dict) -> None:
        """Set everything to what it was when the checkpoint was written."""
        source, total_steps = self.args.resume, self.total_steps
        try:
            for name, part in self.state.items():
                if name != "model":
                    restore(part, checkpoint[name])
            for p, averages in self.state["optimizer"].state.items():
                for name, x in averages.items():  # fused optimizers want the weight's memory format
                    if torch.is_tensor(x) and x.shape == p.shape:
                        averages[name] = torch.empty_like(p).copy_(x)
            self.epoch, self.batch, self.step = (checkpoint[k] for k in ("epoch", "batch", "step"))
            self.seconds, self.rows = checkpoint["seconds"], checkpoint["rows"]
            if rank() == 0:  # the checkpoint contains the sums over all processes
                self.sums.copy_(checkpoint["totals"])
            signs = checkpoint["signs"] if "signs" in checkpoint else 2 * checkpoint["bits"].char() - 1
            if signs.shape != self.signs.shape:
                raise ValueError("it has another number of binary weights")
            self.signs = signs.to(self.signs)
            threads, before = int(checkpoint["threads"]), checkpoint["args"]
            planned = min(before["epochs"] * len(self.train), before["limit_steps"] or math.inf)
            torch.set_rng_state(checkpoint["rng"])
            if "cuda_rng" in checkpoint and self.sums.is_cuda:
                torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.sums.device)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as e:
            reason = " ".join(str(e).split())[:200]
            raise RunError(f"{source} is not a run of this trainer and these flags ({reason}): use another") from None
        if self.batch >= len(self.train):
            raise RunError(f"{source} was trained on more images than {self.args.data_dir} has: use its data")
        if threads != torch.get_num_threads() and self.sums.device.type == "cpu":
            console.print(
                f"{source} ran with {threads} threads, this process has {torch.get_num_threads()}: sums are added in "
                "another order, so the run does not continue bit for bit (OMP_NUM_THREADS sets the number)"
            )
        if self.step >= total_steps:
            limit = self.args.limit_steps and self.step >= self.args.limit_steps
            more = "a larger --limit-steps" if limit else "more --epochs"
            raise RunError(f"{source} has done its {self.step:,} steps: give {more} to go on")
        if self.args.schedule == "cosine" and planned != total_steps:
            what = f"{source} was a run of {planned:,} steps, now it is one of {total_steps:,}"
            console.print(f"{what}: its learning rate continues on the cosine schedule of {total_steps:,} steps")

    def _open(self, resumed: bool, device: torch.device) -> None:
        """Open the run folder and write the files that describe the run."""
        self.folder, self.lock = open_folder(self.folder, reuse=bool(self.args.name), resumed=resumed)
        self.args.name = self.folder.name
        # A process that was killed just after it wrote last.pt has not written best.pt.
        best, ended = self.folder / "best.pt", self.rows and self.batch == 0  # at the end of an epoch
        if ended and best_row(self.rows) is self.rows[-1]:
            written = load(best).get("step", self.step) if best.exists() else -1
            if written < self.step:
                save(best, self._model())
        with replacing(self.folder / "args.json") as f:
            f.write(json.dumps({**vars(self.args), "environment": environment(device)}, indent=1) + "\n")
        write_metrics(self.folder, self.rows)
        self.trackers = Trackers(self.args, self.folder, self.rows[-1]["step"] if self.rows else 0)

    # The training loop, in the order in which the trainer calls it.

    def __enter__(self):
        self.saved, self.heading = time.perf_counter(), True
        self.interrupt, self.bar = Interrupt().__enter__(), Bar(self.total_steps, self.step).__enter__()
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)
        self.interrupt.__exit__(*error)
        if rank() == 0:
            self.trackers.close()
            console.unsaved += [f"error: {error[1]}\n"] if error[1] else []
        self._save_log()
        unlock(self.lock)
        if rank() and error[1] and not isinstance(error[1], RunError):  # an error that rank 0 does not know about
            print(f"error in process {rank()}: {error[1]}", file=sys.stderr)

    def epochs(self):
        """The numbers of the epochs that remain, from 0 on."""
        while self.step < self.total_steps and not self.leaving:
            yield self.epoch

    def batches(self):
        """The training batches (images, labels) that remain of this epoch.

        If the user stops the run within the epoch, everything is saved, the batches end, and `leaving` is True.
        """
        started = time.perf_counter() - self.seconds
        for images, labels in self.train.epoch(self.epoch, self.batch):
            yield images, labels
            self.step, self.batch = self.step + 1, self.batch + 1
            if "ema" in self.state:
                self.state["ema"].update_parameters(self.state["model"])
            self.finite.watch(self.sums[0], self.step)
            now = time.perf_counter()
            self.seconds = now - started
            done, whole_epoch = self.step == self.total_steps, self.batch == len(self.train)
            save_due = rank() == 0 and now - self.saved > 60 * self.args.save_every
            show_due = rank() == 0 and self.bar.due()
            interrupted, show_due, save_due = any_process(self.interrupt, show_due, save_due)
            if show_due or interrupted or done:
                self.check_finite()
                loss, correct, images_seen = self._sums()
                means = {"loss": loss / images_seen, "acc": correct / images_seen, "speed": images_seen / self.seconds}
                self.bar.show(f"epoch {self.epoch + 1}/{self.args.epochs}", self.step, **means)
            self.leaving = interrupted and not whole_epoch and not done
            if self.leaving or done:
                break
            if save_due and not whole_epoch:
                self._average_batchnorm()
                self.save(self.rows)
        self._average_batchnorm()
        self.sums.tolist()  # wait for the device, so that the time is that of the whole epoch
        self.seconds = time.perf_counter() - started
        if self.leaving:
            self.save(self.rows)

    def _average_batchnorm(self) -> None:
        for name in ("model", "ema"):
            if name in self.state:
                average_batchnorm(self.state[name])

    def tested(self, model: torch.nn.Module) -> torch.nn.Module:
        """The network to test: `model`, or with --ema the moving average of its weights."""
        return self.state["ema"].module if "ema" in self.state else model

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        """Set the learning rate of this step in all parameter groups, and return it."""
        self.lr = learning_rate(self.args, epoch, self.step, self.total_steps)
        warmup = round(self.args.warmup * len(self.train))  # steps
        self.lr *= min(1.0, (self.step + 1) / (warmup + 1))
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        return self.lr

    @torch.no_grad()
    def count(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a micro-batch to the metrics: mean loss [], logits [B, classes], labels [B]. Does not wait for a GPU.

        For mixed images, labels are the fractions of the classes, [B, classes]. The class with the largest counts.
        """
        labels = labels if labels.dim() == 1 else labels.argmax(1)
        correct = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([loss * len(labels), correct, torch.full_like(correct, len(labels))])

    def end_epoch(self, tested: dict[str, float], signs: torch.Tensor, **extra: float) -> None:
        """Add a row to the metrics and write the checkpoints.

        tested: what evaluate_all() returned. signs: the present ones. extra: the columns of the trainer.
        """
        self.check_finite(tested["test_loss"])
        loss, correct, images = self._sums()
        row = {"epoch": self.epoch + 1, "step": self.step, "train_loss": loss / images, "train_acc": correct / images}
        row |= tested | {"lr": self.lr, "seconds": self.seconds, "images_per_s": images / self.seconds}
        flips, plus = signs != self.signs, signs > 0
        row |= {"flip_ratio": flips.float().mean().item(), "plus_ratio": plus.float().mean().item(), **extra}
        for kind, values in (("flips", flips), ("plus", plus)) if self.layers else ():
            shares = [part.double().mean() for part in values.split(list(self.layers.values()))]
            row |= dict(zip((f"{kind}/{name}" for name in self.layers), torch.stack(shares).tolist(), strict=True))
        # --limit-steps can end the run within an epoch. A run that is resumed from there completes the epoch. So its
        # last.pt contains neither this row nor the end of the epoch.
        whole_epoch = self.batch == len(self.train)
        self.rows.append(row)
        on_rank_0(write_metrics, self.folder, self.rows)
        print_metrics(row, self.heading)
        self.heading = False
        if rank() == 0:
            self.trackers.log(row)
        self._save_log()
        if whole_epoch:
            self.epoch, self.batch, self.seconds, self.signs = self.epoch + 1, 0, 0.0, signs
            self.sums.zero_()
            self.save(self.rows)
        if best_row(self.rows) is row:
            on_rank_0(self._save_best, whole_epoch or "val_acc" not in row)
        if not whole_epoch:
            self.save(self.rows[:-1])
        self.leaving = any_process(self.interrupt)[0] and self.step < self.total_steps

    def finish(self) -> int:
        """Print the summary. Returns the exit code: 0, or 128 + the number of the signal that stopped the run."""
        script, folder = self.args.script, self.folder
        if self.leaving:
            console.print(f"stopped after step {self.step:,}; to go on: {command_line(script, '--resume', folder)}")
            self._save_log()
            return 128 + (self.interrupt.signal or signal.SIGTERM)  # another process may have received the signal
        if self.rows:
            rows = self.rows[:-1] or self.rows if self.batch and self.args.val else self.rows
            row = best_row(rows)
            chosen = f"epoch {row['epoch']}, the last (--val would choose the best)"
            if "val_acc" in row:
                chosen = f"epoch {row['epoch']}, best by validation accuracy ({100 * row['val_acc']:.2f} %)"
            console.print(
                f"{self.step:,} steps in {sum(row['seconds'] for row in self.rows):,.0f} s. Test accuracy "
                f"{100 * row['test_acc']:.2f} % in {chosen}. Curves: {shlex.join(['python', 'plot.py', str(folder)])}. "
                f"Test it: {command_line(script, '--eval-only', '--resume', folder / 'best.pt')}"
            )
            running = not self.args.bn_batches and self.args.ema is None
            if running and self.rows[-1]["flip_ratio"] > MANY_FLIPS:
                console.print(
                    f"{100 * self.rows[-1]['flip_ratio']:.0f} % of the signs flipped in the last epoch, so BatchNorm's "
                    "running statistics may not fit the last weights: --bn-batches 32 tests with new statistics"
                )
        self._save_log()
        return 0

    # Saving.

    def _save_log(self) -> None:
        if rank() == 0:
            console.save(self.folder / "log.txt")

    def _sums(self) -> list[float]:
        """Of this epoch, over all processes: the sum of the losses, correct predictions, images."""
        return all_reduce_sum(self.sums.clone()).tolist()

    def check_finite(self, test_loss: float = 0.0) -> None:
        self.finite.check(self.epoch + 1, self.step, self.folder, test_loss)

    def _model(self) -> dict:
        """The contents of best.pt: the network, and what is needed to use it."""
        return {
            "args": vars(self.args),
            "num_classes": self.train.num_classes,
            "classes": list(self.train.classes),
            "images": self.images,
            "listing": self.train.listing,
            "shape": tuple(self.train.shape),  # of an image: [C, H, W]
            # An image's pixels (0 to 255) are multiplied by the first list and added to the second, per channel.
            "normalisation": [v.flatten().tolist() for v in (self.train.scale, self.train.shift)],
            "step": self.step,
            "model": {name: t.contiguous() for name, t in self.tested(self.state["model"]).state_dict().items()},
        }

    def _save_best(self, replace: bool) -> None:
        """Write best.pt. replace: whether an existing file is replaced."""
        best = self.folder / "best.pt"
        if replace or not best.exists():
            save(best, self._model())

    def save(self, rows: list[dict]) -> None:
        """Write last.pt: all that the rest of the run depends on, and these rows. All processes call it."""
        self.check_finite()
        checkpoint = self._model()
        for part in self.state.values():
            if hasattr(part, "gather"):  # a generator that several processes share
                part.gather()
        checkpoint |= {name: part.state_dict() for name, part in self.state.items()}
        checkpoint |= {k: getattr(self, k) for k in ("epoch", "batch", "seconds", "signs")}
        checkpoint |= {"rows": rows, "totals": all_reduce_sum(self.sums.clone()), "rng": torch.get_rng_state()}
        checkpoint["threads"] = torch.get_num_threads()
        if self.sums.is_cuda:
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state(self.sums.device)
        on_rank_0(save, self.folder / "last.pt", checkpoint)
        self.saved = time.perf_counter()
