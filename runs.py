"""What every trainer needs and no paper is about: common flags, the run folder, checkpoints, resuming, progress.

Copy this file with any train_*.py. A run writes a folder runs/NAME/:

    args.json     the flags it ran with
    metrics.csv   one row an epoch (METRICS below)
    last.pt       all that is needed to go on exactly where it stopped
    best.pt       the model with the best test accuracy so far
"""

import argparse
import csv
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

METRICS = (
    *("epoch", "step", "train_loss", "train_acc", "test_loss", "test_acc", "lr", "seconds", "images_per_s"),
    *("flip_ratio", "plus_ratio"),  # share of binary weights that changed sign in the epoch; share that are +1
)
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)  # names may hold [ ] and : :

# What may be given anew with --resume; everything else would make it another run.
MAY_CHANGE = {
    *("epochs", "limit_steps", "lr", "schedule", "milestones", "data_dir", "workers", "device", "compile"),
    *("out", "name", "resume", "eval_only", "pretrained"),
}


class RunError(Exception):
    """The run cannot start or go on; the message is one sentence that says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def common_flags(description: str, **defaults) -> argparse.ArgumentParser:
    """A parser with the flags that all trainers share; a trainer adds its paper's own.

    defaults: the paper's values for these flags, by name.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("data and network")
    data.add_argument("--arch", default="resnet20", help="network, see models.ARCHS (default: resnet20)")
    data.add_argument(
        "--dataset",
        default="cifar10",
        choices=["cifar10", "cifar100", "mnist", "digits", "imagenet", "folder"],
        help="cifar10, cifar100, mnist: downloaded; digits: comes with scikit-learn; "
        "folder: DATA_DIR/train/CLASS/*.png and DATA_DIR/test/CLASS/* (default: cifar10)",
    )
    data.add_argument("--data-dir", default="data", help="where the pictures are or are downloaded to (default: data)")
    data.add_argument("--image-size", type=int, help="pixels a side, for --dataset folder and imagenet")
    data.add_argument(
        "--no-crop", action="store_true", help="no random crops of the training pictures (up to 96 pixels)"
    )
    data.add_argument("--no-flip", action="store_true", help="no mirroring of the training pictures")
    data.add_argument("--workers", type=int, default=8, help="processes that decode large pictures (default: 8)")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=100, help="passes over the training pictures (default: 100)")
    training.add_argument("--limit-steps", type=int, help="stop after so many steps")
    training.add_argument("--batch-size", type=int, default=128, help="pictures a step (default: 128)")
    training.add_argument("--opt", default="adam", choices=["adam", "sgd", "sgdm"], help="sgdm: momentum 0.9")
    training.add_argument("--lr", type=float, help="learning rate (default: by --opt, see the top of the trainer)")
    training.add_argument("--weight-decay", type=float, default=0.0, help="L2 on all parameters (default: 0)")
    training.add_argument(
        "--schedule",
        default="step",
        choices=["step", "cosine", "none"],
        help="of --lr (default: step, by --milestones)",
    )
    training.add_argument("--milestones", type=int, nargs="*", default=[30, 60, 90], help="epochs at which lr /= 10")
    training.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    training.add_argument("--pretrained", metavar="FILE", help="start from this checkpoint's weights")
    machine = parser.add_argument_group("machine and run")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    machine.add_argument("--amp", action="store_true", help="the network's forward pass in bfloat16")
    machine.add_argument("--compile", action="store_true", help="torch.compile the network")
    machine.add_argument("--out", default="runs", help="folder of the run folders (default: runs)")
    machine.add_argument("--name", help="name of the run (default: made from the flags)")
    machine.add_argument("--resume", metavar="RUN", help="go on with this run (its folder), with its flags")
    machine.add_argument("--eval-only", action="store_true", help="test the --resume or --pretrained model, and stop")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The flags, and the checkpoint to resume from (or None).

    With --resume the run's own flags are the defaults, of which MAY_CHANGE may be given anew (--epochs 200).
    """
    args = parser.parse_args(argv)
    checkpoint = None
    if args.resume:
        path = Path(args.resume).resolve()
        path = path / "last.pt" if path.is_dir() else path
        checkpoint = load(path)
        if "args" not in checkpoint or ("optimizer" not in checkpoint and not args.eval_only):
            raise RunError(f"{path} is no whole run, which could go on: resume last.pt, or use --pretrained {path}")
        before = checkpoint["args"]
        parser.set_defaults(**before)
        args = parser.parse_args(argv)
        args.name, args.out = path.parent.name, str(path.parent.parent)
        for name, value in vars(args).items():
            if name not in MAY_CHANGE and value != before.get(name, value):
                raise RunError(
                    f"--{name.replace('_', '-')} cannot change within a run (it was {before[name]}): leave it out, or "
                    f"start another run from these weights with --pretrained {path.parent / 'best.pt'}"
                )
    least = {"epochs": 1, "batch_size": 2, "limit_steps": 1, "image_size": 8}
    for name in (*least, "workers", "seed", "weight_decay", "lr", "lr_fast", "lr_slow"):
        value = getattr(args, name, None)
        most = 1e30 if isinstance(value, float) else 2**63 - 1
        if value is not None and not least.get(name, 0) <= value <= most:
            raise RunError(f"--{name.replace('_', '-')} must be a number from {least.get(name, 0)} on; it is {value}")
    if args.eval_only and not (args.resume or args.pretrained):
        raise RunError("--eval-only needs a model to test: give --resume runs/NAME or --pretrained runs/NAME/best.pt")
    return args, checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Set-up.


def pick_device(name: str) -> torch.device:
    """'auto' is the first CUDA device, or the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
        torch.backends.cudnn.deterministic = True  # so that a resumed run is the same run
    except (RuntimeError, AssertionError) as e:
        raise RunError(f"--device {name} cannot be used here ({str(e).splitlines()[0]}): try --device cpu") from None
    return device


def make_optimizer(params, args) -> torch.optim.Optimizer:
    """The main network's optimizer, by --opt, --lr and --weight-decay."""
    if args.opt == "adam":
        return torch.optim.Adam(params, args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(params, args.lr, momentum=0.9 if args.opt == "sgdm" else 0.0, weight_decay=args.weight_decay)


def learning_rate(args, epoch: int, step: int, total_steps: int) -> float:
    """--schedule: 'step' divides by 10 at each of the milestones (epochs); 'cosine' falls to 0 over all steps."""
    if args.schedule == "step":
        return args.lr * 0.1 ** sum(epoch >= m for m in args.milestones)
    if args.schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return args.lr


class Interrupt:
    """Within `with Interrupt() as interrupt`, Ctrl-C and SIGTERM ask the loop to stop after the step in hand
    (`if interrupt: …`). A second one stops at once."""

    def __enter__(self):
        self.signal = None
        self.before = {which: signal.signal(which, self._ask) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def _ask(self, which, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = which

    def __bool__(self) -> bool:
        return self.signal is not None

    def leave(self, folder: Path, step: int, script: str) -> int:
        """Say how to go on; the exit code that shells expect of a program that this signal ended."""
        console.print(f"stopped after step {step:,}; to go on: python {script} --resume {folder}")
        return 128 + self.signal


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: dictionaries of tensors, numbers, strings, lists and dictionaries, so they load with weights_only=True.


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that `path` is at any moment the old one or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = f"; the one before it is untouched: {path}" if path.exists() else ""
        raise RunError(f"the checkpoint {path} could not be written ({str(e).splitlines()[0]}){kept}") from None


def load(path: Path | str) -> dict:
    """Read a checkpoint. Raises RunError where there is none or it is damaged."""
    if not Path(path).is_file():
        raise RunError(f"there is no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a truncated or foreign file shows as many kinds: RuntimeError, EOFError, UnpicklingError…
        reason = str(e).strip().splitlines()[0][:100] if str(e).strip() else type(e).__name__
        raise RunError(f"the checkpoint {path} is damaged or not a checkpoint ({reason}): use another one") from None
    if not isinstance(state, dict):
        raise RunError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def load_pretrained(model: torch.nn.Module, path: str, args) -> None:
    """Start from the weights in a checkpoint of ours or in a plain state dict."""
    checkpoint = load(path)
    theirs = checkpoint.get("args", {})
    if theirs.get("arch", args.arch) != args.arch:
        raise RunError(
            f"--pretrained {path} holds a {theirs['arch']}, not a {args.arch}: use --arch {theirs['arch']} or another "
            "checkpoint"
        )
    if args.eval_only:  # training may start from other weights, but a test must be of the network that was trained
        for name in ("quantizer", "act", "binarize_all"):
            if theirs.get(name, getattr(args, name, None)) != getattr(args, name, None):
                raise RunError(
                    f"{path} was trained with {name} {theirs[name]}: test it with --eval-only --resume {path}, which "
                    "takes its flags too"
                )
    load_model(model, checkpoint.get("model", checkpoint), path)


def load_model(model: torch.nn.Module, state: dict, path: Path | str) -> None:
    """model.load_state_dict, with a sentence instead of a list of mismatches."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        ours = model.state_dict()
        for name in sorted(ours.keys() | state.keys()):
            a, b = (tuple(d[name].shape) if name in d and hasattr(d[name], "shape") else None for d in (state, ours))
            if a != b:
                there, here = ("nothing" if shape is None else f"the shape {list(shape)}" for shape in (a, b))
                raise RunError(
                    f"{path} is of another network or number of classes: {name} has {there} there and {here} here"
                ) from None
        raise


# ---------------------------------------------------------------------------------------------------------------------
# The run folder.


class Run:
    """The folder OUT/NAME, its metrics and its checkpoints.

    Without --name a free name is made from `name`. Raises RunError where the folder cannot be written, or holds a run
    already and is not being resumed.
    """

    def __init__(self, args, name: str, resumed: dict | None = None):
        self.folder = Path(args.out) / (args.name or name)
        self.rows: list[dict] = resumed["rows"] if resumed else []
        try:
            if args.name:
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self.folder = self._free_folder(Path(args.out), name)
            if not resumed and any((self.folder / file).exists() for file in ("last.pt", "best.pt")):
                raise RunError(
                    f"{self.folder} holds a run already: go on with it (--resume {self.folder}), or choose another "
                    "--name"
                )
            args.name = self.folder.name
            (self.folder / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
            self._write_rows()
        except OSError as e:
            raise RunError(f"the run folder {self.folder} cannot be written ({e}): choose another --out") from None

    @staticmethod
    def _free_folder(out: Path, name: str) -> Path:
        """Make OUT/name, or OUT/name-2, … where that is taken."""
        out.mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            folder = out / (name if n == 1 else f"{name}-{n}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder

    @property
    def best(self) -> float:
        return max((row["test_acc"] for row in self.rows), default=-1.0)

    def add(self, **row) -> None:
        """One epoch's metrics: to metrics.csv and to the terminal."""
        if not self.rows:
            console.print("epoch     step  train loss   acc %   test loss   acc %        lr   img/s  flips %  plus %")
        is_best = row["test_acc"] > self.best
        self.rows.append(row)
        self._write_rows()
        console.print(
            f"{row['epoch']:5d} {row['step']:8d}  {row['train_loss']:10.4f}  {100 * row['train_acc']:6.2f}  "
            f"{row['test_loss']:10.4f}  {100 * row['test_acc']:6.2f}{'*' if is_best else ' '} {row['lr']:9.2e} "
            f"{row['images_per_s']:7.0f}  {100 * row['flip_ratio']:7.3f}  {100 * row['plus_ratio']:6.2f}"
        )

    def _write_rows(self) -> None:
        temporary, path = self.folder / "metrics.tmp", self.folder / "metrics.csv"
        try:
            with open(temporary, "w", newline="") as f:
                writer = csv.DictWriter(f, METRICS)
                writer.writeheader()
                for row in self.rows:
                    writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            temporary.replace(path)
        except OSError as e:
            raise RunError(f"{path} cannot be written ({e}): make room, then --resume {self.folder}") from None

    def summary(self, script: str) -> None:
        """The table at the end: what was reached, in which time, and where it is."""
        if not self.rows:
            return
        last, best = self.rows[-1], max(self.rows, key=lambda row: row["test_acc"])
        table = Table(title=f"{self.folder}", title_justify="left")
        for column in ("", "epoch", "train loss", "train acc %", "test loss", "test acc %"):
            table.add_column(column, justify="right" if column else "left")
        for label, row in (("best", best), ("last", last)):
            table.add_row(
                label,
                str(row["epoch"]),
                f"{row['train_loss']:.4f}",
                f"{100 * row['train_acc']:.2f}",
                f"{row['test_loss']:.4f}",
                f"{100 * row['test_acc']:.2f}",
            )
        console.print(table)
        seconds = sum(row["seconds"] for row in self.rows)
        console.print(
            f"{last['step']:,} steps in {seconds:,.0f} s. "
            f"Curves: python plot.py {self.folder}. Test it: python {script} --eval-only --resume {self.folder}/best.pt"
        )


class Bar:
    """The live line: epoch, progress, loss, accuracy, pictures a second, time left. Nothing where output is a file."""

    def __init__(self, total_steps: int, step: int):
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("loss {task.fields[loss]:.4f}  acc {task.fields[acc]:.2f} %  {task.fields[speed]:,.0f} img/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total_steps, completed=step, loss=math.nan, acc=0.0, speed=0.0)
        self.next = 0.0

    def due(self) -> bool:
        """True twice a second: looking at a number on a GPU makes the host wait, so it is not done every step."""
        return time.perf_counter() >= self.next

    def show(self, description: str, step: int, loss: float, acc: float, speed: float) -> None:
        self.next = time.perf_counter() + 0.5
        self.progress.update(
            self.task, completed=step, description=description, loss=loss, acc=100 * acc, speed=speed, refresh=True
        )

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()


def command(main, *errors: type[Exception]) -> None:
    """Run `main()` and exit with its code; RunError and `errors` end as one sentence on standard error, code 1."""
    try:
        code = main()
    except (RunError, *errors) as e:
        code = f"error: {e}"
    except KeyboardInterrupt:  # before training has begun, or the second one: last.pt is as it was saved last
        code = 128 + signal.SIGINT
    sys.exit(code)
