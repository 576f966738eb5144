"""Experiments: grids of training commands, and tables of their results.

    python experiments.py digits                        # a small grid whose images need no download
    python experiments.py protocol                      # run the grid; writes results/protocol.csv and protocol.md
    python experiments.py protocol finals               # several grids
    python experiments.py protocol --only "--grad gate" # run one of its searches
    python experiments.py protocol --list               # print its commands and which of them are done; run nothing
    # Add flags to all commands of a grid: the papers start from a full-precision network.
    python experiments.py protocol -- --dataset folder --data-dir my/cifar10 --pretrained runs/fp32/best.pt

A grid is a list of searches; add yours to GRIDS. A search trains one method at each of its learning rates with seed 0.
The learning rates whose validation accuracy at the end of the run is within one standard error of the best are then
trained with the other seeds. The search finds the rate with the best mean validation accuracy. Nothing is chosen on the
test images. The grids of ten epochs, finals and w1a1-finals, take their rates from the results of protocol and w1a1. A
command whose row is in the CSV file is not run again, and an interrupted run resumes where it stopped. So repeat the
command until the grid is complete. On CPUs two runs at a time share the cores (--jobs); on GPUs each GPU has one run.
When a run fails, the others continue, the error is reported at the end and the exit code is 1. For other images or
flags choose another --results folder.

results/NAME.csv has one row per run: the command, its seed, the seconds of training, and these values of the last
epoch: training loss, validation and test accuracy, test accuracy with BatchNorm statistics of the last weights, and the
fraction of the signs that flipped. A run that diverged has "nan". results/NAME.md has one row per command, with the
mean ± standard deviation over its seeds.

Copy with: plot.py, runs.py, and the trainers of the grid with their files: for train_fsg.py models.py, binarize.py,
quantizers.py, hypernet.py, metaquant.py, gate.py, fsg_released.py, data.py.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import hashlib
import math
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import torch

import plot
from runs import RunError, console, fcntl, replacing, unlock

# ---------------------------------------------------------------------------------------------------------------------
# The grids: lists of searches.


class Search(NamedTuple):
    """A method, and how its learning rate is found."""

    command: str  # the trainer and the flags of the method
    rates: tuple[str, ...] = ()  # values of --lr, tried with the first seed
    seeds: tuple[int, ...] = (0, 1, 2)
    like: "Search | None" = None  # in place of rates: a search of another grid, whose result is the learning rate

    def at(self, rate: str, seed: int) -> str:
        return f"{self.command} --lr {rate} --seed {seed}"


# 702 steps on CIFAR-10, of which 5,000 images are held out.
BUDGET = "--arch resnet20 --epochs 2 --schedule cosine --val 5000 --bn-batches 32"
DIGITS = "--dataset digits --batch-size 64 --epochs 10 --schedule cosine --val 300"
SCRATCH = "--arch resnet20 --image-size 16 --epochs 6 --schedule cosine --val 5000 --bn-batches 32"
FSG, PROX, BIHALF = (f"train_{name}.py {BUDGET}" for name in ("fsg", "proxconnect", "bihalf"))
BIREAL = BUDGET.replace("resnet20", "birealnet20")
SAMPLED = "--hyper-sample 0.125"  # φ is trained on an eighth of the weights in each step
MAMBA = f"--grad fsg --hgs mamba {SAMPLED}"
SHORTER = "--betas 0.9 0.97"  # a shorter memory of Adam than its default
ADAM, SGD, FROM_SCRATCH = ("1e-3", "3e-4", "3e-3"), ("0.1", "0.03", "0.3"), ("6e-3", "3e-3", "1.2e-2")

# FSG whose slow-net may oppose the mean of the history; see results/README.md.
RMS = "--balance layer-rms"
MAMBA_RMS = f"--grad fsg --hgs mamba {RMS} {SAMPLED}"
# The gradient generators. --balance none is FSG's formula as written in the paper.
GENERATORS = (
    "--grad ste",
    MAMBA,
    "--grad gate",
    "--grad multifc",
    "--grad fcgrad",
    f"--grad fsg --hgs lstm --hidden 16 {SAMPLED}",
    "--grad lstmfc --hidden 16",
    "--grad fsg --hgs mamba --history flat",
    MAMBA_RMS,
    f"--grad fsg --hgs lstm --hidden 16 {RMS} {SAMPLED}",
    f"--grad fsg --hgs mamba {RMS} --history flat",
    f"--grad fsg --hgs mamba --balance none {SAMPLED}",
    "--grad fsg --hgs mamba --preset released",
    "--grad multifc --preset released",
    "--grad fcgrad --preset released",
    "--grad lstmfc --preset released",
)
METHODS = ("bc", "bnn+", "bnn++", "pc", "parq")

# Adam, from a full-precision network.
PROTOCOL = [
    Search(f"{FSG} --grad ste", (*ADAM, "1e-2")),
    Search(f"{FSG} --grad ste {SHORTER}", ADAM),
    *(Search(f"{FSG} {generator}", ADAM) for generator in GENERATORS[1:]),
    *(Search(f"{PROX} --opt adam --method {method}", (*ADAM, "1e-2")) for method in METHODS),
    Search(f"{BIHALF} --opt adam --weight-decay 0", ADAM),
    Search(f"{FSG} --quantizer none", ADAM),  # the full-precision network
]
# Binary weights and activations, in networks made for them.
W1A1 = [
    *(
        Search(f"train_fsg.py {BIREAL} --act sign --grad {grad}", (*ADAM, "1e-2", "3e-2"))
        for grad in ("ste", f"ste {SHORTER}", "gate")
    ),
    Search(f"train_sibnn.py {BIREAL} --batch-size 128", (*ADAM, "1e-2")),
    Search(f"train_bihalf.py {BIREAL} --act sign --opt adam --weight-decay 0", (*ADAM, "1e-2")),
]
FINALISTS = ("--grad ste", SHORTER, MAMBA, MAMBA_RMS, "--grad gate", "--grad multifc", "--grad fcgrad", "--method parq")
FINALISTS += ("--opt adam --weight-decay 0", "--quantizer none")


def ten_epochs(search: Search, more: str = "") -> Search:
    """The search with five times as many epochs and five seeds, at the learning rate that the search has found."""
    command = search.command.replace("--epochs 2", "--epochs 10")
    return Search(f"{command} {more}".strip(), seeds=(0, 1, 2, 3, 4), like=search)


GRIDS = {
    "protocol": PROTOCOL,
    # Ten epochs of some methods. The last one has no history.
    "finals": [
        *(ten_epochs(search) for search in PROTOCOL if search.command.endswith(FINALISTS)),
        *(ten_epochs(search, "--history newest") for search in PROTOCOL if search.command.endswith(MAMBA_RMS)),
    ],
    "w1a1": W1A1,
    "w1a1-finals": [ten_epochs(search) for search in W1A1],
    # From random weights, on small images.
    "scratch": [
        Search(f"train_fsg.py {SCRATCH} --grad ste", (*FROM_SCRATCH, "2.4e-2")),
        *(
            Search(f"train_fsg.py {SCRATCH} {flags}", FROM_SCRATCH)
            for flags in (
                f"--grad ste {SHORTER}",
                MAMBA,
                MAMBA_RMS,
                "--grad gate",
                "--grad gate --memory 0",
            )
        ),
        Search(f"train_fsg.py {SCRATCH} --grad multifc", FROM_SCRATCH),
        Search(f"train_proxconnect.py {SCRATCH} --opt adam --method parq", FROM_SCRATCH),
    ],
    # The paper's ablations of FSG: the weight β of the slow gradient (default 0.9), the length of the history (default
    # 5), the layer embedding and the history itself.
    "ablations": [
        Search(f"{FSG} {SAMPLED} {flags}".strip(), ("1e-3",))
        for flags in (
            "",
            *(f"--beta {beta}" for beta in (0, 0.5, 1)),
            *(f"--length {length}" for length in (3, 7)),
            "--no-lre",
            "--history newest",
        )
    ],
    # Other ways to train φ, and φ not trained (results/search.py).
    "search": [
        Search(f"results/search.py {words} {BUDGET} --hgs mamba {RMS} {SAMPLED}", ("1e-3",))
        for words in ("frozen", "smooth", "ahead4", "ahead16", "leap+forget+residual+ahead8")
    ],
    # The protocol with plain SGD.
    "protocol-sgd": [
        *(Search(f"{FSG} --opt sgd {generator}", SGD) for generator in GENERATORS),
        *(Search(f"{PROX} --opt sgd --method {method}", ("1e-2", "1e-3", "1e-1")) for method in METHODS),
        Search(f"{BIHALF} --opt sgd --weight-decay 0", SGD),
    ],
    # Another data set and smaller networks, from random weights, on the images that scikit-learn contains.
    "digits": [
        Search(f"train_{trainer}.py {DIGITS} {flags}", ("1e-2", "3e-3", "3e-2", "1e-1"), (0, 1, 2, 3, 4))
        for trainer, flags in (
            ("fsg", "--arch resnet8 --grad ste"),
            ("fsg", f"--arch resnet8 --grad ste {SHORTER}"),
            ("fsg", "--arch resnet8 --grad fsg --hgs mamba"),
            ("fsg", "--arch resnet8 --grad gate"),
            ("proxconnect", "--arch resnet8 --method parq --opt adam"),
            ("fsg", "--arch birealnet8 --act sign --grad ste"),
            ("fsg", f"--arch birealnet8 --act sign --grad ste {SHORTER}"),
            ("fsg", "--arch birealnet8 --act sign --grad gate"),
            ("sibnn", "--arch birealnet8"),
        )
    ],
}
COLUMNS = ("command", "seed", "train_loss", "val_acc", "test_acc", "test_acc_bn", "flip_ratio", "seconds")


# ---------------------------------------------------------------------------------------------------------------------
# Running a grid.


class Interrupted(Exception):
    """The grid was asked to stop. Its runs have saved their state."""


class Slots:
    """The slots in which runs are started, as many as run at a time. On GPUs a slot is a GPU, on a CPU some cores.

    A slot is a set of environment variables for the process of the run.
    """

    def __init__(self, jobs: int | None):
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if gpus == [""]:
            gpus = [str(i) for i in range(torch.cuda.device_count())]
        self.jobs = jobs or (len(gpus) if torch.cuda.is_available() else 2)
        self.free, self.running, self.stopping = queue.Queue(), set(), threading.Event()
        for i in range(self.jobs):
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if torch.cuda.is_available() else {}
            self.free.put({**os.environ, **threads, **gpu})

    def run(self, command: list[str]) -> tuple[int, str]:
        """Run a command; return its exit code and the last line of its standard error.

        Waits for a free slot. Raises Interrupted after stop().
        """
        environment = self.free.get()
        try:
            if self.stopping.is_set():
                raise Interrupted
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C in the terminal does not reach the run; stop() ends it
            )
            self.running.add(process)
            if self.stopping.is_set():
                process.terminate()
            errors = process.communicate()[1].strip().splitlines()
            self.running.discard(process)
            return process.returncode, (errors or ["it ended without a message"])[-1]
        finally:
            self.free.put(environment)

    def stop(self) -> None:
        """Start no more runs, and let the running ones save their state and end."""
        self.stopping.set()
        for process in list(self.running):
            process.terminate()


def run_one(command: str, out: Path, slots: Slots) -> dict:
    """Run a command, or resume it if it was interrupted. Returns its row of the CSV file."""
    trainer, _, flags = command.removeprefix("python ").partition(" ")
    hashed = hashlib.sha256(command.encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.]+", "-", flags)[:150].strip("-") + "-" + hashed
    if trainer == "results/search.py":  # it cannot resume its runs
        shutil.rmtree(out / name, ignore_errors=True)
    started = (out / name / "last.pt").exists()
    argv = ["--resume", str(out / name)] if started else [*shlex.split(flags), "--name", name, "--out", str(out)]
    code, error = slots.run([sys.executable, str(Path(__file__).parent / trainer), *argv])
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM):
        raise Interrupted
    diverged = "became NaN or infinite" in error
    finished = "has done its" in error  # an earlier call completed the run, but did not write its row
    if code and not diverged and not finished:
        raise RunError(f"{command} cannot be run ({error.removeprefix('error: ')})")
    row = {"command": command, "seed": re.search(r"--seed (\d+)", flags)[1]}
    if diverged:
        return {**row, **dict.fromkeys(COLUMNS[2:], "nan")}
    try:
        with open(out / name / "metrics.csv", newline="", encoding="utf-8") as f:
            epochs = list(csv.DictReader(f))
        values = {column: float(epochs[-1].get(column) or "nan") for column in COLUMNS[2:-1]}
        seconds = sum(float(epoch["seconds"]) for epoch in epochs)
    except (OSError, ValueError, LookupError) as e:
        raise RunError(
            f"{out / name} has no complete metrics.csv ({e}): delete it, and its command runs again"
        ) from None
    return row | {k: f"{v:.4f}" for k, v in values.items()} | {"seconds": f"{seconds:.0f}"}


def with_flags(added: list[str]):
    """A function that turns the flags of a run into its command line, with these flags added."""
    return lambda flags: "python " + shlex.join([*shlex.split(flags), *added])


def best_rates(search: Search, rows, command) -> list[str]:
    """The learning rates whose validation accuracy at the first seed is within one standard error of the best.

    The standard error of an accuracy p on n images is √(p (1 − p) / n). The list is empty if some rates have not been
    tried, or if no run has a validation accuracy. rows: of all grids, by command. command: see with_flags().
    """
    if search.like:
        rate = result(search.like, rows, command)
        return [rate] if rate else []
    tried = {rate: rows.get(command(search.at(rate, search.seeds[0]))) for rate in search.rates}
    if not all(tried.values()):
        return []
    if len(search.rates) == 1:
        return list(search.rates)
    accuracies = {rate: float(row["val_acc"]) for rate, row in tried.items()}
    known = [accuracy for accuracy in accuracies.values() if accuracy == accuracy]  # not NaN
    if not known:
        return []
    best, images = max(known), int(re.findall(r"--val[ =](\d+)", command(search.command))[-1])
    error = math.sqrt(best * (1 - best) / images)
    return [rate for rate, accuracy in accuracies.items() if accuracy >= best - error]


def result(search: Search, rows, command) -> str | None:
    """The learning rate with the best mean validation accuracy, of those with all seeds.

    None if the search is not complete.
    """
    means = {}
    for rate in search.rates:
        found = [rows.get(command(search.at(rate, seed))) for seed in search.seeds]
        if all(found):
            means[rate] = sum(float(row["val_acc"]) for row in found) / len(found)
    best = best_rates(search, rows, command)
    if not best or not set(best) <= set(means):
        return None
    return max(means, key=lambda rate: -1 if math.isnan(means[rate]) else means[rate])  # NaN: a run diverged


def commands_of(grid: list[Search], rows, command) -> list[str]:
    """The commands of a grid in the order in which they are run: all learning rates, the second seeds, the third, …

    Only the commands that are known: the other seeds need the best learning rates.
    """
    commands = [command(search.at(rate, search.seeds[0])) for search in grid for rate in search.rates]
    best = [(search, best_rates(search, rows, command)) for search in grid]
    for i in range(max(len(search.seeds) for search in grid)):
        for search, rates in best:
            commands += [command(search.at(rate, seed)) for seed in search.seeds[i : i + 1] for rate in rates]
    return list(dict.fromkeys(commands))


def run_grids(grids: dict[str, list[Search]], command, results: Path, out: Path, slots: Slots) -> None:
    """Run the commands that are not in the CSV files of the grids yet. A grid's files are written after each run.

    Raises RunError for the commands that failed, after all others have run.
    """
    own = {name: read_results(results / f"{name}.csv") for name in {*GRIDS, *grids}}
    rows = collections.ChainMap(*own.values())
    failed, running = {}, {}

    def start(pool) -> None:
        """Start the commands that are known now, as many as run at a time."""
        for name, grid in grids.items():
            for line in commands_of(grid, rows, command):
                if len(running) == slots.jobs:
                    return
                if line not in rows and line not in failed and line not in [line for _, line in running.values()]:
                    running[pool.submit(run_one, line, out / name, slots)] = name, line

    with concurrent.futures.ThreadPoolExecutor(slots.jobs) as pool:
        try:
            start(pool)
            while running:
                for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)[0]:
                    name, line = running.pop(future)
                    try:
                        row = future.result()
                    except RunError as e:
                        console.print(f"failed: {e}")  # if the terminal is closed, the grid goes on
                        failed[line] = str(e)
                        continue
                    own[name][line] = row
                    write(results / f"{name}.csv", own[name])
                    console.print(f"{name}, {len(own[name])} done: {line}: {row['test_acc']}")
                start(pool)
        except BaseException:
            slots.stop()
            raise
    for name, grid in grids.items():
        write(results / f"{name}.csv", own[name])
        for search in grid:
            if not failed and not best_rates(search, rows, command):
                why = "no run has a validation accuracy, so its other seeds are not run"
                if search.like:
                    why = f"it is not run before the search for its learning rate is complete, {search.like.command}"
                console.print(f"{search.command}: {why}")
    if failed:
        others = f"; {len(failed) - 1} more cannot" if len(failed) > 1 else ""
        raise RunError(next(iter(failed.values())) + others)


# ---------------------------------------------------------------------------------------------------------------------
# Results.


def read_results(file: Path) -> dict[str, dict]:
    """The rows of a results file, by command. Raises RunError if it is damaged."""
    try:
        with open(file, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        for row in rows:
            if set(row) != set(COLUMNS) or None in row.values():
                raise ValueError("a row has other columns")
            if not row["command"].isprintable():
                raise ValueError("a command has control characters")
            int(row["seed"])
            values = {column: float(row[column]) for column in COLUMNS[2:]}
            if values["val_acc"] < 0 or values["val_acc"] > 1:  # it may be NaN
                raise ValueError("an accuracy is not between 0 and 1")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as e:
        reason = getattr(e, "strerror", None) or e
        raise RunError(f"{file} is damaged or of another version ({reason}): move it to another place") from None
    return {row["command"]: row for row in rows}


def write(file: Path, rows: dict[str, dict]) -> None:
    """Write the CSV file and the Markdown table beside it. The rows of a command are next to each other.

    rows: by command. Rows that another process has added to the file are kept, and added to `rows`.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = None
        with contextlib.suppress(PermissionError):  # of another user's lock; replacing() reports a read-only folder
            lock = os.open(file.with_name(f".{file.stem}.lock"), os.O_RDWR | os.O_CREAT, 0o666) if fcntl else None
    except OSError as e:
        raise RunError(f"{file} cannot be written ({e}): choose another --results") from None
    try:
        if lock is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        merged = read_results(file) | rows
        rows.update(merged)
        order = list(dict.fromkeys(map(without_seed, merged.values())))
        merged = sorted(merged.values(), key=lambda row: (order.index(without_seed(row)), int(row["seed"])))
        with replacing(file) as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(merged)
        with replacing(file.with_suffix(".md")) as f:
            f.write(table(merged))
    finally:
        unlock(lock)


def without_seed(row: dict) -> str:
    return re.sub(r" --seed \d+", "", row["command"])


def table(rows: list[dict]) -> str:
    """A Markdown table with one row per command: mean ± standard deviation over its seeds, accuracies in %."""
    groups = {}
    for row in rows:
        groups.setdefault(without_seed(row), []).append(row)
    columns = {
        "training loss": ("train_loss", 1, 3),
        "validation acc. %": ("val_acc", 100, 1),
        "test acc. %": ("test_acc", 100, 1),
        "test acc. %, BatchNorm re-estimated": ("test_acc_bn", 100, 1),
        "flips in the last epoch, %": ("flip_ratio", 100, 1),
        "seconds": ("seconds", 1, 0),
    }
    lines = [f"| command | seeds | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    for command, group in groups.items():
        cells = [f"`{command}`", str(len(group))]
        for name, factor, digits in columns.values():
            cells.append(plot.mean_and_spread([factor * float(row[name]) for row in group], digits))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", choices=GRIDS, metavar="GRID", help=f"one or several of {', '.join(GRIDS)}")
    parser.add_argument("--list", action="store_true", help="print the commands and which are done; run nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the searches whose command contains this text")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per GPU, or 2 on CPUs)")
    parser.add_argument("--out", default="results/runs", help="folder for the run folders (default: %(default)s)")
    parser.add_argument(
        "--results", default="results", help="folder for the CSV files and the tables (default: %(default)s)"
    )
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args, added_flags = parser.parse_args(argv[:end]), argv[end + 1 :]
    grids = {name: [search for search in GRIDS[name] if args.only in search.command] for name in args.grids}
    command = with_flags(added_flags)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for flag in ("--seed", "--lr"):
            if flag in [word.partition("=")[0] for word in added_flags]:
                raise RunError(f"the grid sets the seeds and the learning rates: leave out {flag}")
        for name in [name for name, grid in grids.items() if not grid]:
            raise RunError(f"no search of the grid {name} has {args.only!r} in its command: see --list")
        if args.jobs is not None and args.jobs < 1:
            raise RunError(f"--jobs must be at least 1; it is {args.jobs}")
        results = Path(args.results)
        if args.list:
            rows = collections.ChainMap(*(read_results(results / f"{name}.csv") for name in GRIDS))
            for line in [line for grid in grids.values() for line in commands_of(grid, rows, command)]:
                print("done" if line in rows else "    ", line)
            return 0
        run_grids(grids, command, results, Path(args.out).resolve(), Slots(args.jobs))
    except (KeyboardInterrupt, Interrupted):
        print("stopped; repeat the command to go on", file=sys.stderr)
        return 130
    except RunError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print("\n".join((results / f"{name}.md").read_text(encoding="utf-8") for name in grids), end="")
    return 0


if __name__ == "__main__":
    plot.command(main)
