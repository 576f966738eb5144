"""Experiments: grids of train_fsg.py commands, and tables of their results.

    python experiments.py rates                       # run the grid `rates`; writes results/rates.csv and rates.md
    python experiments.py rates --list                # print its commands and which of them are done; run nothing
    python experiments.py rates -- --dataset folder --data-dir my/cifar10       # add flags to all of its commands

A grid is a list of command lines; add your own to GRIDS. A command whose row is in the CSV file is not run again, and
an interrupted run resumes where it stopped, so the same command can be repeated until the grid is complete. On CPUs two
runs at a time share the cores (--jobs); on GPUs each GPU takes one run. When a run fails, the others continue, the
error is reported at the end and the exit code is 1. For other images or flags choose another --results folder.

results/NAME.csv has one row per run: the exact command, its seed, the best and the last test accuracy, the training
loss of the last epoch ("nan" for a run that diverged) and the seconds of training. results/NAME.md has one row per
command, with the mean ± standard deviation over its seeds.

Copy with: plot.py, and train_fsg.py with its files: models.py, quantizers.py, hypernet.py, metaquant.py, gate.py,
fsg_released.py, data.py, runs.py.
"""

import argparse
import concurrent.futures
import csv
import hashlib
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch

import plot
from runs import RunError, replacing

# ---------------------------------------------------------------------------------------------------------------------
# The grids: lists of flags for train_fsg.py.

SHORT = "--arch resnet20 --epochs 2 --schedule cosine"  # 780 steps on CIFAR-10
SMALL = f"{SHORT} --image-size 16"  # the network costs a quarter
LONG = "--arch resnet20 --epochs 6 --schedule cosine --image-size 16"
GATE = ("--grad ste", "--grad gate", "--grad gate --memory 0")  # --memory 0: the gate without a history
METAQUANT = ("--grad multifc", "--grad fcgrad")
# FSG's formula as written in the paper: the scales of its two terms are not balanced.
MAMBA = "--hgs mamba --balance none --hyper-sample 0.125"  # φ is trained on an eighth of the weights in each step
FLAT = "--hgs mamba --balance none --history flat"
SMALL_MAMBA = "--hgs mamba --balance none --expand 16 --hyper-sample 0.125"  # 16 channels instead of 100
LSTMS = ("--hgs lstm --balance none --hidden 16 --hyper-sample 0.125", "--grad lstmfc --hidden 16")
EXPENSIVE = (MAMBA, FLAT, *LSTMS, "--preset released")


def grid(budget: str, methods, lrs=(None,), seeds=(0,)) -> list[str]:
    """One command for each method, learning rate (None: the method's default) and seed."""
    rates = [f" --lr {lr}" if lr else "" for lr in lrs]
    return [f"{budget} {method}{rate} --seed {seed}" for seed in seeds for rate in rates for method in methods]


GRIDS = {
    # FSG and MetaQuant with Adam, at several learning rates.
    "rates": [
        *grid(SMALL, ("--grad ste", *METAQUANT, SMALL_MAMBA), ("6e-3", "3e-3", "1.2e-2", "1e-3")),
        *grid(SMALL, EXPENSIVE, ("1e-3", "3e-3", "3e-4")),
        *grid(SMALL, LSTMS, ("6e-3",)),
        *grid(SMALL, (f"{MAMBA} --lr-slow 1e-5",), ("3e-3",)),  # control: the slow-net hardly learns
        *grid(SHORT, ("--grad ste", *METAQUANT, MAMBA, FLAT), ("1e-3",)),  # at 32×32 pixels
        *grid(SHORT, ("--grad ste",), ("3e-3",)),
    ],
    # The same with plain SGD, and the gate.
    "rates-sgd": [
        *grid(SMALL, [f"{method} --opt sgd" for method in (*GATE, *METAQUANT, SMALL_MAMBA)], ("1", "0.3", "3", "0.1")),
        *grid(SMALL, [f"{method} --opt sgd" for method in EXPENSIVE], ("1", "0.3", "3")),
    ],
    # The gate, STE and the gate without a history: three learning rates, then two more seeds at the best.
    "gate": [*grid(SHORT, GATE, ("6e-3", "1.2e-2", "3e-3")), *grid(SHORT, GATE, ("6e-3",), seeds=(1, 2))],
    # The same for 2,340 steps at 16×16 pixels, where the gate without a history is best at twice the learning rate.
    "long": [
        *grid(LONG, GATE, ("6e-3", "3e-3", "1.2e-2")),
        *grid(LONG, GATE[:2], ("6e-3",), seeds=(1, 2)),
        *grid(LONG, GATE[2:], ("1.2e-2",), seeds=(1, 2)),
        *grid(LONG, GATE[2:], ("2.4e-2",)),
        *grid(LONG, (METAQUANT[0], SMALL_MAMBA), ("6e-3",), seeds=(0, 1, 2)),  # the best two of "rates"
    ],
    # The paper's ablations: the share β of the slow gradient (default 0.9), the length of the history (default 5), the
    # layer embedding and the history itself.
    "ablations": grid(
        SMALL,
        [
            SMALL_MAMBA,
            *(f"{SMALL_MAMBA} --beta {beta}" for beta in (0.1, 0.3, 0.5, 0.7)),
            *(f"{SMALL_MAMBA} --length {length}" for length in (3, 4, 6, 7)),
            f"{SMALL_MAMBA} --no-lre",
            f"{SMALL_MAMBA} --history newest",
        ],
        seeds=(0, 1, 2),
    ),
}
TRAIN = "python train_fsg.py "
COLUMNS = ("command", "seed", "best_test_acc", "test_acc", "train_loss", "seconds")


# ---------------------------------------------------------------------------------------------------------------------
# Running a grid.


class Interrupted(Exception):
    """The grid was asked to stop. Its runs have saved their state."""


class Slots:
    """The places for runs at the same time: one per GPU, or equal shares of the CPU's cores.

    A place is a set of environment variables for the run's process.
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

        Waits for a free place. Raises Interrupted after stop().
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
                start_new_session=True,  # Ctrl-C in the terminal must not reach the run; stop() tells it once
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
        """Start no further runs, and let the present ones save their state and end."""
        self.stopping.set()
        for process in list(self.running):
            process.terminate()


def run_one(command: str, out: Path, slots: Slots) -> dict:
    """Run a command, or resume it if it was interrupted. Returns its row of the CSV file."""
    flags = command.removeprefix(TRAIN)
    name = re.sub(r"[^\w.]+", "-", flags)[:150].strip("-") + "-" + hashlib.sha256(flags.encode()).hexdigest()[:8]
    started = (out / name / "last.pt").exists()
    argv = ["--resume", str(out / name)] if started else [*shlex.split(flags), "--name", name, "--out", str(out)]
    code, error = slots.run([sys.executable, str(Path(__file__).with_name("train_fsg.py")), *argv])
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Interrupted
    diverged = "became NaN or infinite" in error
    finished = "has done its" in error  # an earlier call completed the run, but did not write its row
    if code and not diverged and not finished:
        raise RunError(f"{command} cannot be run ({error.removeprefix('error: ')})")
    row = {"command": command, "seed": re.search(r"--seed (\d+)", flags)[1]}
    if diverged:
        return {**row, **dict.fromkeys(COLUMNS[2:], "nan")}
    curves = plot.read_run(out / name)
    accuracies = curves["test_acc"]
    row |= {"best_test_acc": f"{accuracies.max():.4f}", "test_acc": f"{accuracies[-1]:.4f}"}
    return row | {"train_loss": f"{curves['train_loss'][-1]:.4f}", "seconds": f"{curves['time'][-1]:.0f}"}


def run_grid(name: str, commands: list[str], results: Path, out: Path, jobs: int | None) -> None:
    """Run the commands that are not in the grid's CSV file yet. Both files are written after each run.

    Raises RunError for the commands that failed, after all others have run.
    """
    file = results / f"{name}.csv"
    rows, slots, failed = read_results(file), Slots(jobs), []
    with concurrent.futures.ThreadPoolExecutor(slots.jobs) as pool:
        waiting = [pool.submit(run_one, command, out / name, slots) for command in commands if command not in rows]
        try:
            for done in concurrent.futures.as_completed(waiting):
                try:
                    row = done.result()
                except (RunError, plot.PlotError) as e:
                    print(f"failed: {e}", flush=True)
                    failed.append(str(e))
                    continue
                rows[row["command"]] = row
                write(file, rows.values(), commands)
                print(f"{len(rows)} done: {row['command']}: {row['test_acc']}", flush=True)
        except BaseException:
            slots.stop()
            for future in waiting:
                future.cancel()
            raise
    write(file, rows.values(), commands)
    if failed:
        others = f"; {len(failed) - 1} more cannot" if failed[1:] else ""
        raise RunError(failed[0] + others)


# ---------------------------------------------------------------------------------------------------------------------
# Results.


def read_results(file: Path) -> dict[str, dict]:
    """The rows of a results file, by command."""
    if not file.exists():
        return {}
    with open(file, newline="") as f:
        rows = list(csv.DictReader(f))
    if any(set(row) != set(COLUMNS) or None in row.values() for row in rows):
        raise RunError(f"{file} is damaged or of another version: move it to another place")
    return {row["command"]: row for row in rows}


def write(file: Path, rows, commands: list[str]) -> None:
    """Write the CSV file and, beside it, the Markdown table. The rows are in the grid's order."""
    rows = sorted(rows, key=lambda row: commands.index(row["command"]) if row["command"] in commands else len(commands))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RunError(f"{file} cannot be written ({e}): choose another --results") from None
    with replacing(file) as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replacing(file.with_suffix(".md")) as f:
        f.write(table(rows))


def table(rows: list[dict]) -> str:
    """A Markdown table with one row per command: mean ± standard deviation over its seeds, accuracies in %."""
    groups = {}
    for row in rows:
        groups.setdefault(re.sub(r" --seed \d+", "", row["command"]), []).append(row)
    lines = ["| command | seeds | best test acc. % | test acc. % | training loss | seconds |", "| --- " * 6 + "|"]
    for command, group in groups.items():
        cells = [f"`{command}`", str(len(group))]
        columns = (("best_test_acc", 100, 1), ("test_acc", 100, 1), ("train_loss", 1, 3), ("seconds", 1, 0))
        for name, factor, digits in columns:
            cells.append(plot.mean_and_spread([factor * float(row[name]) for row in group], digits))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--list", action="store_true", help="print the commands and which are done; run nothing")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per GPU, or 2 on CPUs)")
    parser.add_argument("--out", default="results/runs", help="folder for the run folders (default: %(default)s)")
    parser.add_argument(
        "--results", default="results", help="folder for the CSV files and the tables (default: %(default)s)"
    )
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args, added_flags = parser.parse_args(argv[:end]), argv[end + 1 :]
    commands = [TRAIN + shlex.join([*shlex.split(flags), *added_flags]) for flags in GRIDS[args.grid]]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if "--seed" in added_flags:
            raise RunError("the grid sets the seeds: leave out --seed")
        if args.jobs is not None and args.jobs < 1:
            raise RunError(f"--jobs must be at least 1; it is {args.jobs}")
        if args.list:
            done = read_results(Path(args.results, f"{args.grid}.csv"))
            for command in commands:
                print("done" if command in done else "    ", command)
            return 0
        run_grid(args.grid, commands, Path(args.results), Path(args.out).resolve(), args.jobs)
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (RunError, plot.PlotError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(Path(args.results, f"{args.grid}.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
