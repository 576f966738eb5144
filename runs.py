"""What every trainer needs and no paper is about: common flags, the run folder, checkpoints, resuming, progress.

Copy this file with any train_*.py. A run writes a folder runs/NAME/:

    args.json     the flags it ran with
    metrics.csv   one row an epoch (METRICS below)
    last.pt       all that is needed to go on exactly where it stopped
    best.pt       the model with the best test accuracy so far

Whatever happens at whatever moment, last.pt is whole: it is written to another file first, which then takes its name.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.nn import functional as F

METRICS = (
    *("epoch", "step", "train_loss", "train_acc", "test_loss", "test_acc", "lr", "seconds", "images_per_s"),
    *("flip_ratio", "plus_ratio"),  # share of binary weights that changed sign in the epoch; share that are +1
)
NEVER = 2**62  # a step that does not come
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)  # names may hold [ ] and : :

# What may be given anew with --resume; everything else would make it another run.
MAY_CHANGE = {
    *("epochs", "limit_steps", "lr", "schedule", "milestones", "data_dir", "workers", "device", "compile"),
    *("accumulate", "save_every", "out", "name", "resume", "eval_only", "pretrained"),
}


class RunError(Exception):
    """The run cannot start or go on; the message is one sentence that says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that leaves the description's lines as they are, and says where a default depends on other flags."""

    def _expand_help(self, action) -> str:
        return super()._expand_help(action).replace("(default: None)", "(default: by other flags, see the file)")


def common_flags(script: str, description: str, **defaults) -> argparse.ArgumentParser:
    """A parser with the flags that all trainers share; a trainer adds its paper's own.

    script: the trainer's file name. defaults: the paper's values for these flags, by name.
    """
    parser = argparse.ArgumentParser(script, description=description, formatter_class=Help, allow_abbrev=False)
    data = parser.add_argument_group("data and network")
    data.add_argument("--arch", default="resnet20", help="network, see models.ARCHS (default: %(default)s)")
    data.add_argument(
        "--dataset",
        default="cifar10",
        choices=["cifar10", "cifar100", "mnist", "digits", "imagenet", "folder"],
        help="cifar10, cifar100, mnist: downloaded; digits: comes with scikit-learn; "
        "folder: DATA_DIR/train/CLASS/*.png and DATA_DIR/test/CLASS/* (default: %(default)s)",
    )
    data.add_argument(
        "--data-dir", default="data", help="where the images are or are downloaded to (default: %(default)s)"
    )
    data.add_argument("--image-size", type=int, help="pixels a side (default: the images' own; large ones 224)")
    data.add_argument("--no-crop", action="store_true", help="no random crops of the training images (up to 96 pixels)")
    data.add_argument("--no-flip", action="store_true", help="no mirroring of the training images")
    data.add_argument(
        "--workers", type=int, default=8, help="processes that decode large images (default: %(default)s)"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=int, default=100, help="passes over the training images (default: %(default)s)"
    )
    training.add_argument("--limit-steps", type=int, help="train so many steps at most")
    training.add_argument("--batch-size", type=int, default=128, help="images a step (default: %(default)s)")
    training.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="compute each batch in N parts, one after another: the same step in less memory (default: %(default)s)",
    )
    training.add_argument(
        "--opt", default="adam", choices=["adam", "sgd", "sgdm"], help="sgdm: momentum 0.9 (default: %(default)s)"
    )
    training.add_argument("--lr", type=float, help="learning rate (default: %(default)s)")
    training.add_argument("--weight-decay", type=float, default=0.0, help="L2 (default: %(default)s)")
    training.add_argument(
        "--schedule",
        default="step",
        choices=["step", "cosine", "none"],
        help="of --lr over all steps; step: by --milestones (default: %(default)s)",
    )
    training.add_argument(
        "--milestones",
        type=int,
        nargs="*",
        default=[30, 60, 90],
        help="epochs at which lr /= 10 (default: %(default)s)",
    )
    training.add_argument(
        "--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)"
    )
    training.add_argument("--pretrained", metavar="FILE", help="start from this checkpoint's weights")
    machine = parser.add_argument_group("machine and run")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    machine.add_argument("--amp", action="store_true", help="the network's forward pass in bfloat16")
    machine.add_argument("--compile", action="store_true", help="torch.compile the network")
    machine.add_argument(
        "--save-every",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="checkpoint within an epoch too, so often (default: %(default)s)",
    )
    machine.add_argument("--out", default="runs", help="folder of the run folders (default: runs)")
    machine.add_argument("--name", help="name of the run (default: made from the flags)")
    machine.add_argument("--resume", metavar="RUN", help="go on with this run (its folder), with its flags")
    machine.add_argument("--eval-only", action="store_true", help="test the --resume or --pretrained model, and stop")
    parser.set_defaults(script=script, **defaults)
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
        script = before.get("script", args.script)
        if script != args.script:
            raise RunError(f"{path} is a run of {script}: go on with it, or test it, with python {script}")
        parser.set_defaults(**before)
        args = parser.parse_args(argv)
        args.name, args.out = path.parent.name, str(path.parent.parent)
        for name, value in vars(args).items():
            if name not in MAY_CHANGE and value != before.get(name, value):
                raise RunError(
                    f"--{name.replace('_', '-')} cannot change within a run (it was {before[name]}): leave it out, or "
                    f"start another run from these weights with --pretrained {path.parent / 'best.pt'}"
                )
    least = {"epochs": 1, "batch_size": 2, "limit_steps": 1, "image_size": 8, "accumulate": 1}
    for name in (*least, "workers", "seed", "save_every", "weight_decay", "lr", "lr_fast", "lr_slow"):
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
    """'auto' is the first CUDA device, or the CPU. Started by torchrun, each process takes the GPU of its number."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
        torch.backends.cudnn.deterministic = True  # so that a resumed run is the same run
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).splitlines()[0][:100]
        raise RunError(f"--device {name} cannot be used here ({reason}): try --device cpu") from None
    return device


def start_processes(device: torch.device) -> tuple[int, int]:
    """Meet the other processes that torchrun has started, if it has: this one's rank, and how many there are.

    Rank 0 alone speaks, and writes files.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # gloo too on GPUs: what the processes say to each other on the host need not wait for the device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    console.quiet = rank() > 0
    return rank(), processes()


def end_processes() -> None:
    """All processes have come to the end: none may go while another one still talks to it."""
    if processes() > 1:
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if processes() > 1 else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, in place."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def parallel(net: torch.nn.Module, args, device: torch.device) -> torch.nn.Module:
    """What the training step calls: the network, compiled with --compile, its gradients averaged over the processes.

    On GPUs BatchNorm then normalises by the statistics of the whole batch, on CPUs each process by those of its part.
    """
    if processes() > 1 and device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    # CUDA graphs, which spare the launch of each kernel, hold one step's gradients until the next step begins: these
    # must not be added to, nor waited for by other processes.
    graphs = device.type == "cuda" and processes() == args.accumulate == 1
    model = torch.compile(net, mode="reduce-overhead" if graphs else "default") if args.compile else net
    if processes() > 1:
        with warnings.catch_warnings():  # that the argument has another name since torch 2.13
            warnings.simplefilter("ignore", FutureWarning)
            model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return model


def parts(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, accumulate: int):
    """A batch in so many parts (--accumulate): of each its images, its labels, and its share of the batch.

    Between processes gradients are averaged once, after the last part.
    """
    count = max(1, min(accumulate, len(labels) // 2))  # BatchNorm can make nothing of a single image
    pieces = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
    for i, (x, y) in enumerate(pieces, 1):
        alone = processes() == 1 or i == len(pieces)
        with contextlib.nullcontext() if alone else model.no_sync():
            yield x, y, len(y) / len(labels)


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
        if self.signal is not None and processes() == 1:  # torchrun passes on what the terminal has sent already
            raise KeyboardInterrupt
        self.signal = which

    def __bool__(self) -> bool:
        return self.signal is not None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: dictionaries of tensors, numbers, strings, lists and dictionaries, so they load with weights_only=True.


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w"):
    """A file to write to, which takes the place of `path` when it is done: at any moment that is the old one or the new
    one, whole. Raises RunError where it cannot be written; `path` is then as it was."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, mode, newline=None if "b" in mode else "") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:  # of a full disk torch.save only says that it is at an "unexpected pos"
        reason = str(e).splitlines()[0]
        with contextlib.suppress(OSError):
            reason += f"; {shutil.disk_usage(path.parent).free >> 20:,} MB are free"
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "the one before it is untouched" if os.path.exists(path) else "there was none before it"
        raise RunError(
            f"{path} could not be written ({reason}): make room there, or make it writable; {kept}"
        ) from None


def save(path: Path, state: dict) -> None:
    """Write a checkpoint. Raises RunError where it cannot be written."""
    with replacing(path, "wb") as f:
        torch.save(state, f)


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


def load_weights(model: torch.nn.Module, args, resumed: dict | None, may_lack: tuple[str, ...] = ()) -> None:
    """The weights that the run starts or goes on from: --resume's, --pretrained's, or the model's own.

    may_lack: endings of parameters that a --pretrained network of another kind need not have.
    """
    if resumed:
        load_model(model, resumed["model"], args.resume)
    elif args.pretrained:
        load_pretrained(model, args.pretrained, args, may_lack)


def load_pretrained(model: torch.nn.Module, path: str, args, may_lack: tuple[str, ...]) -> None:
    """Start from the weights in a checkpoint of ours or in a plain state dict."""
    checkpoint = load(path)
    theirs = checkpoint.get("args", {})
    if theirs.get("arch", args.arch) != args.arch:
        raise RunError(
            f"--pretrained {path} holds a {theirs['arch']}, not a {args.arch}: use --arch {theirs['arch']} or another "
            "checkpoint"
        )
    if args.eval_only:  # training may start from other weights, but a test must be of the network that was trained
        for name in ("script", "quantizer", "method", "act", "binarize_all", "ratio", "prune", "rho"):
            if theirs.get(name, getattr(args, name, None)) != getattr(args, name, None):
                raise RunError(
                    f"{path} was trained with {name} {theirs[name]}: test it with --eval-only --resume {path}, which "
                    "takes its flags too"
                )
    state = checkpoint.get("model", checkpoint)
    if not args.eval_only and isinstance(state, dict):
        state = {name: own for name, own in model.state_dict().items() if name.endswith(may_lack)} | state
    load_model(model, state, path)


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
# Evaluation.


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches, device: torch.device, amp: bool) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0 to 1) over a data set's batches."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # Σ loss, correct
    for images, labels in batches.epoch():
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        totals += torch.stack([loss, (logits.argmax(1) == labels).sum()])
    model.train()
    loss, correct = (total(totals) / batches.size).tolist()
    return loss, correct


def report(loss: float, accuracy: float, count: int) -> int:
    """What --eval-only prints; the exit code."""
    console.print(f"test loss {loss:.4f}, test accuracy {100 * accuracy:.2f} % over {count:,} images")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The run.


class Run:
    """A run: its folder, its metrics and checkpoints, and how far it is.

        run = Run(args, "ste", "straight-through", (train, test), device, bits, resumed, model=net, optimizer=optimizer)
        with run:  # Ctrl-C and SIGTERM now wait for the end of the step
            while run.goes_on():
                for images, labels in run.batches():
                    ...  # a training step, which tells what it saw: run.count(loss, logits, labels)
                if run.leaving:  # asked to stop within the epoch: all is saved
                    break
                run.end_epoch(test_loss, test_acc, bits)
        return run.finish()

    kind: what is trained, for the name that a run without --name gets; about: the same in words.
    bits [N] bool: the signs of the binary weights now. resumed: the checkpoint to go on from, or None.
    parts: all that must be in a checkpoint, objects with state_dict() and load_state_dict(); `model` among them, whose
    state the trainer has loaded already.
    Raises RunError where the folder cannot be written, where it holds another run, or where the checkpoint is not of
    these parts.
    """

    def __init__(self, args, kind: str, about: str, batches, device, bits, resumed: dict | None, **parts):
        self.args, self.parts, (self.train, test) = args, parts, batches
        self.total_steps = min(args.epochs * len(self.train), args.limit_steps or math.inf)
        self.epoch = self.batch = self.step = 0  # whole epochs; batches of this epoch; steps in all
        self.seconds = 0.0  # of training in this epoch
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # of this epoch: Σ loss, correct, seen
        self.names, self.weights = zip(*parts["model"].named_parameters(), strict=True)
        generator = parts.get("generator")
        self.phi = list(generator.named_parameters()) if generator else []
        # The first step whose loss (in front), or whose gradient of each of the weights, was NaN or infinite.
        self.broken = torch.full((1 + len(self.names),), NEVER, device=device)
        self.bits = bits  # at the start of this epoch
        self.rows: list[dict] = []
        self.leaving = False
        if resumed:
            self._restore(resumed)
        self.folder = Path(args.out) / (args.name or f"{kind}-{args.arch}-{args.dataset}-{args.opt}-seed{args.seed}")
        self._first_writes(self._make_folder, resumed is not None)
        self._first_writes(self._mend_best)
        where = f"{device}" if processes() == 1 else f"{processes()} processes on {device.type}"
        parameters = sum(p.numel() for p in parts["model"].parameters())
        console.print(
            f"{self.folder}: {args.arch} on {args.dataset} ({self.train.size:,} + {test.size:,} images), {where}, "
            f"{parameters:,} parameters, {len(bits):,} of them binary; {about}"
        )

    def _restore(self, resumed: dict) -> None:
        """Go to exactly where the checkpoint was written."""
        source, steps = self.args.resume, self.total_steps
        try:
            for name, part in self.parts.items():
                if name != "model":
                    part.load_state_dict(resumed[name])
            self.epoch, self.batch, self.step = (resumed[k] for k in ("epoch", "batch", "step"))
            self.seconds, self.rows = resumed["seconds"], resumed["rows"]
            if rank() == 0:  # the others' are among them
                self.totals.copy_(resumed["totals"])
            self.bits = resumed["bits"].to(self.bits.device)
            torch.set_rng_state(resumed["rng"])
            if "cuda_rng" in resumed and self.totals.is_cuda:
                torch.cuda.set_rng_state(resumed["cuda_rng"], self.totals.device)
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            reason = " ".join(str(e).split())[:200]
            raise RunError(f"{source} is not a run of this trainer and these flags ({reason})") from None
        if self.batch >= len(self.train):
            raise RunError(f"{source} was trained on more images than {self.args.data_dir} has: use its data")
        if self.step >= steps:
            raise RunError(f"{source} has done its {self.step:,} steps: to go on, give more --epochs, --limit-steps")

    def _make_folder(self, exists: bool) -> None:
        args = self.args
        try:
            if args.name:
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self._find_free_folder()
            self._lock()
            if not exists and any((self.folder / file).exists() for file in ("last.pt", "best.pt")):
                go_on = f"go on with it (--resume {self.folder}), or " if (self.folder / "last.pt").exists() else ""
                raise RunError(f"{self.folder} holds a run already: {go_on}choose another --name")
            for file in self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
                file.unlink()
        except OSError as e:
            raise RunError(f"the run folder {self.folder} cannot be written ({e}): choose another --out") from None
        args.name = self.folder.name
        with replacing(self.folder / "args.json") as f:
            f.write(json.dumps(vars(args), indent=1) + "\n")
        self._write_rows()

    def _lock(self) -> None:
        """No two processes may train in one folder. The system unlocks it when this one ends, however it ends."""
        if fcntl is None:
            return
        self.lock = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, self.lock)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process trains in {self.folder}: wait for it, or choose another --name") from None
        except OSError:  # a file system without locks
            pass

    def _find_free_folder(self) -> None:
        """Make OUT/name, or OUT/name-2, … where that is taken."""
        out, name = self.folder.parent, self.folder.name
        out.mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            self.folder = out / (name if n == 1 else f"{name}-{n}")
            try:
                self.folder.mkdir()
            except FileExistsError:
                continue
            return

    def _mend_best(self) -> None:
        """A process that is killed just after last.pt was written has not written best.pt yet."""
        best, before = self.folder / "best.pt", max((row["test_acc"] for row in self.rows[:-1]), default=-1.0)
        if self.rows and self.batch == 0 and self.rows[-1]["test_acc"] > before:
            written = load(best).get("step", self.step) if best.exists() else -1
            if written < self.step:
                save(best, self._model())

    # The training loop, in the order in which the trainer calls it.

    def __enter__(self):
        self.saved = time.perf_counter()
        self.interrupt, self.bar = Interrupt().__enter__(), Bar(self.total_steps, self.step).__enter__()
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)
        self.interrupt.__exit__(*error)
        if hasattr(self, "lock"):
            fcntl.flock(self.lock, fcntl.LOCK_UN)
        if rank() and error[1] and not isinstance(error[1], RunError):  # of these the first process knows nothing
            print(f"error in process {rank()}: {error[1]}", file=sys.stderr)

    def goes_on(self) -> bool:
        return self.step < self.total_steps and not self.leaving

    def batches(self):
        """This epoch's training batches (images, labels), from where the run is. When the user wants to stop, all is
        saved and the batches end; `leaving` is then True."""
        started = time.perf_counter() - self.seconds
        for images, labels in self.train.epoch(self.epoch, self.batch):
            yield images, labels
            self.step, self.batch = self.step + 1, self.batch + 1
            self._watch()
            now = time.perf_counter()
            self.seconds = now - started
            done, whole_epoch = self.step == self.total_steps, self.batch == len(self.train)
            old = now - self.saved > 60 * self.args.save_every
            interrupted, due, old = self._any(self.interrupt, *((self.bar.due(), old) if rank() == 0 else (0, 0)))
            if due or interrupted or done:
                self.check_finite()
                loss_sum, correct, seen = self._sums()
                epoch = f"epoch {self.epoch + 1}/{self.args.epochs}"
                self.bar.show(epoch, self.step, loss_sum / seen, correct / seen, seen / self.seconds)
            self.leaving = interrupted and not whole_epoch and not done
            if self.leaving or done:
                break
            if old and not whole_epoch:
                self._average_statistics()
                self.save(self.rows)
        self._average_statistics()
        self.totals.tolist()  # the device has caught up, and the epoch's time is known
        self.seconds = time.perf_counter() - started
        if self.leaving:
            self.save(self.rows)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer) -> float:
        """This step's learning rate, by --schedule; all of the optimizer's groups get it."""
        self.lr = learning_rate(self.args, self.epoch, self.step, self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        return self.lr

    @torch.no_grad()
    def count(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Of a step, or a part of it: mean loss [], logits [B, classes], labels [B]. Does not wait for the device."""
        correct = (logits.argmax(1) == labels).sum()
        self.totals += torch.stack([loss * len(labels), correct, torch.full_like(correct, len(labels))])

    def end_epoch(self, test_loss: float, test_acc: float, bits: torch.Tensor, **extra: float) -> None:
        """One row of metrics, and the checkpoints. bits: as in __init__, now. extra: the paper's own columns."""
        self.check_finite(test_loss)
        loss_sum, correct, seen = self._sums()
        row = dict(
            epoch=self.epoch + 1,
            step=self.step,
            train_loss=loss_sum / seen,
            train_acc=correct / seen,
            test_loss=test_loss,
            test_acc=test_acc,
            lr=self.lr,
            seconds=self.seconds,
            images_per_s=seen / self.seconds,
            flip_ratio=(bits != self.bits).float().mean().item(),
            plus_ratio=bits.float().mean().item(),
            **extra,
        )
        # --limit-steps may end within an epoch. Resumed with a higher limit, the run goes on there as if it had never
        # stopped, and then this test has not been.
        whole_epoch, best = self.batch == len(self.train), self.folder / "best.pt"
        is_best = test_acc > self.best and (whole_epoch or not best.exists())
        self._add(row)
        if whole_epoch:
            self.epoch, self.batch, self.seconds, self.bits = self.epoch + 1, 0, 0.0, bits
            self.totals.zero_()
            self.save(self.rows)
        if is_best:
            self._first_writes(save, best, self._model())
        if not whole_epoch:
            self.save(self.rows[:-1])
        self.leaving = self._any(self.interrupt)[0] and self.step < self.total_steps

    def finish(self) -> int:
        """The last words, and the exit code: 0, or what shells expect of a program that a signal ended."""
        if self.leaving:
            console.print(
                f"stopped after step {self.step:,}; to go on: python {self.args.script} --resume {self.folder}"
            )
            return 128 + (self.interrupt.signal or signal.SIGTERM)  # which another process may have got
        self._summary()
        return 0

    # Its parts.

    def _any(self, *facts) -> list[bool]:
        """Which of the facts are true in any process: all must leave the loop at the same step."""
        if processes() == 1:
            return [bool(fact) for fact in facts]
        facts = torch.tensor([int(bool(fact)) for fact in facts])
        return [bool(fact) for fact in total(facts).tolist()]

    def _first_writes(self, write, *arguments) -> None:
        """The first process writes; where it cannot, all end."""
        error = None
        try:
            if rank() == 0:
                write(*arguments)
        except RunError as e:
            error = e
        if self._any(error)[0]:
            raise error or RunError("the first process could not write")

    def _sums(self) -> list[float]:
        """Of this epoch so far: Σ loss, correct, seen."""
        return total(self.totals.clone()).tolist()

    def _average_statistics(self) -> None:
        """BatchNorm's running statistics, which each process has of its part of the batches, become their average."""
        norms = [m for m in self.parts["model"].modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        for m in norms if processes() > 1 else []:
            for statistic in (m.running_mean, m.running_var):
                total(statistic).div_(processes())

    @torch.no_grad()
    def _watch(self) -> None:
        """Note on the device which of this step's loss and gradients are not finite, for check_finite(), which waits
        for the device and so is not called every step."""
        grads = [w.detach() if w.grad is None else w.grad for w in self.weights]
        largest = torch.stack([self.totals[0].float(), *torch._foreach_norm(grads, math.inf)])
        self.broken.clamp_max_(torch.where(largest.isfinite(), NEVER, self.step))

    def check_finite(self, test_loss: float = 0.0) -> None:
        """Raise RunError where the loss, a gradient or a weight has been NaN or infinite; it names the first."""
        if processes() > 1:
            dist.all_reduce(self.broken, dist.ReduceOp.MIN)
        broken = self.broken.tolist()
        # The weights too: a finite step can overflow them, and as sign(NaN) is −1, the loss stays finite.
        values = [*zip(self.names, self.weights, strict=True), *self.phi]
        finite = torch.stack(torch._foreach_norm([w.detach() for _, w in values], math.inf)).isfinite().tolist()
        if (step := min(broken)) < NEVER:
            problem, when = ("the loss", *(f"the gradient of {name}" for name in self.names))[broken.index(step)], "in"
        elif not all(finite):
            problem, step, when = values[finite.index(False)][0], self.step, "by"
        elif not math.isfinite(test_loss):
            problem, step, when = "the test loss", self.step, "after"
        else:
            return
        last = self.folder / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there was no checkpoint yet"
        fast = " or --lr-fast" if self.phi else ""
        raise RunError(
            f"{problem} became NaN or infinite {when} step {step:,}, epoch {self.epoch + 1}: {kept}; try a smaller "
            f"--lr{fast}"
        )

    def _model(self) -> dict:
        return {
            "args": vars(self.args),
            "num_classes": self.train.num_classes,
            "shape": tuple(self.train.shape),  # of an image: [C, H, W]
            # What an image's numbers, 0…255, are multiplied by, and what is added then: by channel.
            "normalisation": [v.flatten().tolist() for v in (self.train.scale, self.train.shift)],
            "step": self.step,
            "model": self.parts["model"].state_dict(),
        }

    def save(self, rows: list[dict]) -> None:
        """last.pt: all that the rest of the run depends on, with these rows of metrics. All processes take part."""
        self.check_finite()
        place = {k: getattr(self, k) for k in ("epoch", "batch", "step", "seconds", "bits")}
        place |= {"rows": rows, "totals": total(self.totals.clone())}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        random = {"rng": torch.get_rng_state()}
        if self.totals.is_cuda:
            random["cuda_rng"] = torch.cuda.get_rng_state(self.totals.device)
        self._first_writes(save, self.folder / "last.pt", {**self._model(), **parts, **place, **random})
        self.saved = time.perf_counter()

    @property
    def best(self) -> float:
        return max((row["test_acc"] for row in self.rows), default=-1.0)

    def _add(self, row: dict) -> None:
        """One epoch's metrics, to metrics.csv and to the terminal; there without the columns NAME/DETAIL, and shares of
        a whole in %."""
        extra = {name: 1 if name.endswith("loss") else 100 for name in row if name not in METRICS and "/" not in name}
        if not self.rows:
            more = "".join(f"  {name + ' %' * (factor == 100):>10}" for name, factor in extra.items())
            console.print(
                f"epoch     step  train loss   acc %   test loss   acc %        lr   img/s  flips %  plus %{more}"
            )
        is_best = row["test_acc"] > self.best
        self.rows.append(row)
        self._first_writes(self._write_rows)
        more = "".join(
            f"  {factor * row[name]:{max(10, len(name) + 2 * (factor == 100))}.{2 if factor == 100 else 4}f}"
            for name, factor in extra.items()
        )
        console.print(
            f"{row['epoch']:5d} {row['step']:8d}  {row['train_loss']:10.4f}  {100 * row['train_acc']:6.2f}  "
            f"{row['test_loss']:10.4f}  {100 * row['test_acc']:6.2f}{'*' if is_best else ' '} {row['lr']:9.2e} "
            f"{row['images_per_s']:7.0f}  {100 * row['flip_ratio']:7.3f}  {100 * row['plus_ratio']:6.2f}{more}"
        )

    def _write_rows(self) -> None:
        columns = dict.fromkeys((*METRICS, *(column for row in self.rows for column in row)))
        with replacing(self.folder / "metrics.csv") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            for row in self.rows:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    def _summary(self) -> None:
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
        for name in dict.fromkeys(column.split("/")[0] for column in last if "/" in column):
            table = Table(title=f"{name}, at the end", title_justify="left")
            table.add_column(""), table.add_column(name, justify="right")
            for column, value in last.items():
                if column.startswith(f"{name}/"):
                    table.add_row(column.partition("/")[2], f"{value:.4g}")
            console.print(table)
        seconds, script = sum(row["seconds"] for row in self.rows), self.args.script
        console.print(
            f"{last['step']:,} steps in {seconds:,.0f} s. Curves: python plot.py {self.folder}. "
            f"Test it: python {script} --eval-only --resume {self.folder}/best.pt"
        )


class Bar:
    """The live line: epoch, progress, loss, accuracy, images a second, time left. Nothing where output is a file."""

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
            disable=rank() > 0 or not console.is_terminal,
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
    except Exception as e:
        if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(str(e).split())[:150]
        code = f"error: --compile failed ({reason}): leave it out; it needs a C++ compiler, on a GPU Triton"
    except KeyboardInterrupt:  # before training has begun, or the second one: last.pt is as it was saved last
        code = 128 + signal.SIGINT
    if isinstance(code, str):
        code = 1 if rank() else code  # the first process says why
    else:
        end_processes()
    sys.exit(code)
