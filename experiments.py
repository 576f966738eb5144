"""Grids of ordinary train_fsg.py runs, and what came of them: does a learned gradient help?

    python experiments.py rates                       # a grid of the list below, into results/rates.csv and rates.md
    python experiments.py rates --list                # its commands, and which of them are done
    python experiments.py rates -- --dataset folder --data-dir my/cifar10       # with flags added to all of them

A grid is a list of command lines and nothing else; add your own. What is in the CSV file, with the same added flags, is
not run again, and a run that was interrupted goes on where it stopped, so the same command may be given as often as it
takes. (For images or flags of your own take another folder, --results.) On CPUs two runs at a time share the cores
(--jobs); on GPUs there is one on each. Where a run fails, the others go on; in the end the error is told again, and the
exit code is 1.

results/NAME.csv has one row a run: the exact command, its seed, the best and the last test accuracy, the training loss
of the last epoch ("nan" for a run that diverged), and the seconds of training. results/NAME.md has one row for all
seeds of a command: mean ± standard deviation.

Copy with: plot.py, and train_fsg.py with what it needs: models.py, quantizers.py, hypernet.py, data.py, runs.py.
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

SHORT = "--arch resnet20 --epochs 2 --schedule cosine"  # 780 steps of CIFAR-10
SMALL = f"{SHORT} --image-size 16"  # at a quarter of the network's price
LONG = "--arch resnet20 --epochs 6 --schedule cosine --image-size 16"
GATE = ("--grad ste", "--hgs gate", "--hgs gate --history newest")  # newest: the gate with no history
METAQUANT = ("--grad multifc", "--grad fcgrad")
MAMBA = "--hgs mamba --hyper-sample 0.125"  # φ is trained on an eighth of the weights each step: half the price
FLAT = "--hgs mamba --history flat"
LSTMS = ("--hgs lstm --hidden 16 --hyper-sample 0.125", "--grad lstmfc --hidden 16")
DEAR = (MAMBA, FLAT, *LSTMS, "--preset released")
TINY = "--hgs mamba --expand 16 --hyper-sample 0.125"  # a Mamba of a sixth of the size


def grid(budget: str, hows, lrs=(None,), seeds=(0,)) -> list[str]:
    """Each method at each learning rate (None: its default) and seed."""
    rates = [f" --lr {lr}" if lr else "" for lr in lrs]
    return [f"{budget} {how}{rate} --seed {seed}" for seed in seeds for rate in rates for how in hows]


GRIDS = {
    # The paper's formula and MetaQuant's at each of their learning rates.
    "rates": [
        *grid(SMALL, ("--grad ste", *METAQUANT, TINY), ("6e-3", "3e-3", "1.2e-2", "1e-3")),
        *grid(SMALL, DEAR, ("1e-3", "3e-3", "3e-4")),
        *grid(SMALL, LSTMS, ("6e-3",)),
        *grid(SMALL, (f"{MAMBA} --lr-slow 1e-5",), ("3e-3",)),  # a control: the slow-net hardly learns
    ],
    "rates-sgd": [
        *grid(SMALL, [f"{how} --opt sgd" for how in (*GATE, *METAQUANT, TINY)], ("1", "0.3", "3", "0.1")),
        *grid(SMALL, [f"{how} --opt sgd" for how in DEAR], ("1", "0.3", "3")),
    ],
    # The gate against straight-through, and against itself without its history: at three rates, then at more seeds.
    "gate": [*grid(SHORT, GATE, ("6e-3", "1.2e-2", "3e-3")), *grid(SHORT, GATE, ("6e-3",), seeds=(1, 2))],
    # The same, three times as long, on smaller images; there the gate without history is best at twice the rate.
    "long": [
        *grid(LONG, GATE, ("6e-3", "3e-3", "1.2e-2")),
        *grid(LONG, GATE[:2], ("6e-3",), seeds=(1, 2)),
        *grid(LONG, GATE[2:], ("1.2e-2",), seeds=(1, 2)),
        *grid(LONG, GATE[2:], ("2.4e-2",)),
        *grid(LONG, (METAQUANT[0], TINY), ("6e-3",), seeds=(0, 1, 2)),  # the best of "rates"
    ],
    # The paper's ablations: the share of the slow gradient (β = 0.9 is the default) and the length of the history (5).
    # Then, are the layer embedding and the history used?
    "ablations": grid(
        SMALL,
        [
            TINY,
            *(f"{TINY} --beta {beta}" for beta in (0.1, 0.3, 0.5, 0.7)),
            *(f"{TINY} --length {length}" for length in (3, 4, 6, 7)),
            f"{TINY} --no-lre",
            f"{TINY} --history newest",
        ],
        seeds=(0, 1, 2),
    ),
}
TRAIN = "python train_fsg.py "
COLUMNS = ("command", "seed", "best_test_acc", "test_acc", "train_loss", "seconds")


# ---------------------------------------------------------------------------------------------------------------------
# Running them.


class Interrupted(Exception):
    """Somebody wants to stop; the runs have saved what they did."""


class Slots:
    """Where runs can go on at the same time: a GPU each, or equal shares of the cores. As environments."""

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
        """The command's exit code and the last line of its standard error. Raises Interrupted after stop()."""
        environment = self.free.get()
        try:
            if self.stopping.is_set():
                raise Interrupted
            # In a session of its own, so that Ctrl-C does not reach it twice: from the terminal, and from us.
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
            process = subprocess.Popen(command, env=environment, **pipes)
            self.running.add(process)
            if self.stopping.is_set():
                process.terminate()
            errors = process.communicate()[1].strip().splitlines()
            self.running.discard(process)
            return process.returncode, (errors or ["it ended without a word"])[-1]
        finally:
            self.free.put(environment)

    def stop(self) -> None:
        """Nothing more is begun; what runs saves its state, and ends."""
        self.stopping.set()
        for process in list(self.running):
            process.terminate()


def run_one(command: str, out: Path, slots: Slots) -> dict:
    """Run a command, or go on with it where it was interrupted: its row."""
    flags = command.removeprefix(TRAIN)
    name = re.sub(r"[^\w.]+", "-", flags)[:150].strip("-") + "-" + hashlib.sha256(flags.encode()).hexdigest()[:8]
    begun = (out / name / "last.pt").exists()
    more = ["--resume", str(out / name)] if begun else [*shlex.split(flags), "--name", name, "--out", str(out)]
    code, error = slots.run([sys.executable, str(Path(__file__).with_name("train_fsg.py")), *more])
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Interrupted
    diverged = "became NaN or infinite" in error
    if code and not diverged and "has done its" not in error:  # done, but its row was not written
        raise RunError(f"{command} cannot be run ({error.removeprefix('error: ')})")
    row = {"command": command, "seed": re.search(r"--seed (\d+)", flags)[1]}
    if diverged:
        return {**row, **dict.fromkeys(COLUMNS[2:], "nan")}
    curves = plot.read_run(out / name)
    accuracies = curves["test_acc"]
    row |= {"best_test_acc": f"{accuracies.max():.4f}", "test_acc": f"{accuracies[-1]:.4f}"}
    return row | {"train_loss": f"{curves['train_loss'][-1]:.4f}", "seconds": f"{curves['time'][-1]:.0f}"}


def run_grid(name: str, commands: list[str], results: Path, out: Path, jobs: int | None) -> None:
    """Run what of the grid is not in its CSV file yet; after each run both files are written.

    Raises RunError, after all the others have run, where some cannot.
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
        raise RunError(f"{file} is damaged or of another version: move it away")
    return {row["command"]: row for row in rows}


def write(file: Path, rows, commands: list[str]) -> None:
    """The CSV file and the Markdown table beside it, in the grid's order."""
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
    """Markdown: a row for all seeds of a command; accuracies in %, mean ± standard deviation."""
    groups = {}
    for row in rows:
        groups.setdefault(re.sub(r" --seed \d+", "", row["command"]), []).append(row)
    lines = ["| command | seeds | best test acc. % | test acc. % | training loss | seconds |", "| --- " * 6 + "|"]
    for command, group in groups.items():
        cells = [f"`{command}`", str(len(group))]
        for name, factor, digits in (
            ("best_test_acc", 100, 1),
            ("test_acc", 100, 1),
            ("train_loss", 1, 3),
            ("seconds", 1, 0),
        ):
            cells.append(plot.mean_and_spread([factor * float(row[name]) for row in group], digits))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--list", action="store_true", help="the commands, and which are done; run nothing")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, or 2 on CPUs)")
    parser.add_argument("--out", default="results/runs", help="folder of the run folders (default: %(default)s)")
    parser.add_argument(
        "--results", default="results", help="folder of the CSV files and tables (default: %(default)s)"
    )
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args, more = parser.parse_args(argv[:end]), argv[end + 1 :]
    commands = [TRAIN + shlex.join([*shlex.split(flags), *more]) for flags in GRIDS[args.grid]]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if "--seed" in more:
            raise RunError("the grid has the seeds: leave out --seed")
        if args.jobs is not None and args.jobs < 1:
            raise RunError(f"--jobs must be at least 1; it is {args.jobs}")
        if args.list:
            done = read_results(Path(args.results, f"{args.grid}.csv"))
            for command in commands:
                print("done" if command in done else "    ", command)
            return 0
        run_grid(args.grid, commands, Path(args.results), Path(args.out).resolve(), args.jobs)
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (RunError, plot.PlotError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(Path(args.results, f"{args.grid}.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
