"""Grids of ordinary train_fsg.py runs, and what came of them: does a learned gradient help?

    python experiments.py rates                       # a grid of the list below, into results/rates.csv and rates.md
    python experiments.py rates --list                # its commands, and which of them are done
    python experiments.py rates -- --dataset folder --data-dir my/cifar10       # with flags added to all of them

A grid is a list of command lines and nothing else; add your own. What is in the CSV file is not run again, and a run
that was interrupted goes on where it stopped, so the same command may be given as often as it takes. On CPUs two runs
at a time share the cores (--jobs); on GPUs there is one on each.

results/NAME.csv has one row a run: the exact command, its seed, the best and the last test accuracy, the training loss
of the last epoch ("nan" for a run that diverged), and the seconds of training. results/NAME.md has one row for all
seeds of a command: mean ± standard deviation.
"""

import argparse
import concurrent.futures
import csv
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import plot

# ---------------------------------------------------------------------------------------------------------------------
# The grids: lists of flags for train_fsg.py.

BUDGET = "--arch resnet20 --epochs 2 --schedule cosine"  # 780 steps of CIFAR-10
FSG = "--grad fsg --hyper-sample 0.125"  # φ is trained on an eighth of the weights each step: 2.6 times STE's price
METHODS = [
    *("--grad ste", "--grad multifc", "--grad fcgrad", FSG, "--grad fsg --history flat", "--preset released"),
    "--grad lstmfc --hidden 16",
    "--grad fsg --hgs lstm --hidden 16 --hyper-sample 0.125",
]


def grid(*commands: str, seeds=(0,)) -> list[str]:
    """Each command at each seed."""
    return [f"{BUDGET} {command} --seed {seed}" for seed in seeds for command in commands]


GRIDS = {
    # Every method at each of its learning rates, one seed.
    "rates": grid(*(f"{method} --lr {lr}" for lr in ("1e-3", "3e-3", "3e-4", "1e-2") for method in METHODS)),
    "rates-sgd": grid(*(f"{method} --opt sgd --lr {lr}" for lr in ("0.3", "1", "0.1") for method in METHODS)),
    # The paper's ablations.
    "beta": grid(*(f"{FSG} --beta {beta}" for beta in (0.1, 0.3, 0.5, 0.7, 0.9))),
    "length": grid(*(f"{FSG} --length {length}" for length in range(3, 8))),
    # Is the layer embedding used, and the history?
    "lre": grid(FSG, f"{FSG} --no-lre", seeds=(0, 1, 2)),
    "history": grid(FSG, f"{FSG} --history newest", seeds=(0, 1, 2)),
}
COLUMNS = ("command", "seed", "best_test_acc", "test_acc", "train_loss", "seconds")


# ---------------------------------------------------------------------------------------------------------------------
# Running them.


class ExperimentError(Exception):
    """The grid cannot go on; the message is one sentence that says why and what to do."""


class Interrupted(Exception):
    """Somebody wants to stop; the runs have saved what they did."""


def run_one(flags: str, out: Path, slots: queue.Queue, running: set) -> dict:
    """Run a command line, or go on with it where it was interrupted: its row.

    slots: environments, one for each run that may go on at a time. running: the processes that do.
    """
    name = re.sub(r"[^\w.]+", "-", flags).strip("-")[-200:]
    more = ["--resume", str(out / name)] if (out / name / "last.pt").exists() else ["--name", name, "--out", str(out)]
    command = [sys.executable, "train_fsg.py", *(more if "--resume" in more else shlex.split(flags) + more)]
    slot = slots.get()
    # In a session of its own, so that Ctrl-C does not reach it twice: from the terminal, and from us.
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env={**os.environ, **slot}, cwd=Path(__file__).parent, **pipes)
    running.add(process)
    _, errors = process.communicate()
    running.discard(process)
    slots.put(slot)
    if process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Interrupted
    errors = errors.strip().splitlines()[-1:] or ["it ended without a word"]
    diverged = process.returncode and "became NaN or infinite" in errors[0]
    finished = process.returncode == 0 or "has done its" in errors[0]  # and only the row was not written
    if not finished and not diverged:
        raise ExperimentError(f"python train_fsg.py {flags} cannot be run ({errors[0].removeprefix('error: ')})")
    row = {"command": f"python train_fsg.py {flags}", "seed": re.search(r"--seed (\d+)", flags)[1]}
    try:
        curves = plot.read_run(out / name)
    except plot.PlotError:  # diverged in its first epoch
        return row | {"best_test_acc": "nan", "test_acc": "nan", "train_loss": "nan", "seconds": "nan"}
    accuracies, loss = curves["test_acc"], "nan" if diverged else f"{curves['train_loss'][-1]:.4f}"
    row |= {"best_test_acc": f"{accuracies.max():.4f}", "test_acc": f"{accuracies[-1]:.4f}"}
    return row | {"train_loss": loss, "seconds": f"{curves['time'][-1]:.0f}"}


def environments(jobs: int | None) -> list[dict]:
    """What each of the runs that go on at a time finds in its environment: a GPU, or a share of the cores."""
    if torch.cuda.is_available() and jobs is None:
        return [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(torch.cuda.device_count())]
    jobs = 2 if jobs is None else jobs
    return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} for _ in range(jobs)]


def run_grid(name: str, commands: list[str], results: Path, out: Path, jobs: int | None) -> None:
    """Run what of the grid is not in its CSV file yet; after each run both files are written."""
    file = results / f"{name}.csv"
    rows = read_results(file)
    left = [flags for flags in commands if f"python train_fsg.py {flags}" not in rows]
    slots, running = queue.Queue(), set()
    for environment in environments(jobs):
        slots.put(environment)
    with concurrent.futures.ThreadPoolExecutor(slots.qsize()) as pool:
        waiting = [pool.submit(run_one, flags, out / name, slots, running) for flags in left]
        try:
            for done in concurrent.futures.as_completed(waiting):
                row = done.result()
                rows[row["command"]] = row
                write(file, rows.values(), commands)
                print(f"{len(rows)} done: {row['command']}: {row['test_acc']}", flush=True)
        except BaseException:
            for future in waiting:
                future.cancel()
            for process in list(running):
                process.terminate()  # saves, and ends
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Results.


def read_results(file: Path) -> dict[str, dict]:
    """The rows of a results file, by command."""
    if not file.exists():
        return {}
    with open(file, newline="") as f:
        rows = list(csv.DictReader(f))
    if any(set(row) != set(COLUMNS) or None in row.values() for row in rows):
        raise ExperimentError(f"{file} is damaged or of another version: move it away")
    return {row["command"]: row for row in rows}


def write(file: Path, rows, commands: list[str]) -> None:
    """The CSV file and the Markdown table beside it, in the grid's order."""
    order = {f"python train_fsg.py {flags}": i for i, flags in enumerate(commands)}
    rows = sorted(rows, key=lambda row: order.get(row["command"], len(order)))
    temporary = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(file)
        file.with_suffix(".md").write_text(table(rows))
    except OSError as e:
        raise ExperimentError(f"{file} cannot be written ({e}): choose another --results") from None


def table(rows: list[dict]) -> str:
    """Markdown: a row for all seeds of a command; accuracies in %, mean ± standard deviation."""

    def cell(name: str, factor: float, digits: int) -> str:
        values = factor * np.array([float(row[name]) for row in group])
        return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")

    groups = {}
    for row in rows:
        groups.setdefault(re.sub(r" --seed \d+", "", row["command"]), []).append(row)
    lines = ["| command | seeds | best test acc. % | test acc. % | training loss | seconds |", "| --- " * 6 + "|"]
    for command, group in groups.items():
        cells = (
            cell("best_test_acc", 100, 1),
            cell("test_acc", 100, 1),
            cell("train_loss", 1, 3),
            cell("seconds", 1, 0),
        )
        lines.append(f"| `{command}` | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--list", action="store_true", help="the commands, and which are done; run nothing")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, or 2 on CPUs)")
    parser.add_argument("--out", default="runs/experiments", help="folder of the run folders (default: %(default)s)")
    parser.add_argument(
        "--results", default="results", help="folder of the CSV files and tables (default: %(default)s)"
    )
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args, more = parser.parse_args(argv[:end]), argv[end + 1 :]
    commands = [shlex.join([*shlex.split(command), *more]) for command in GRIDS[args.grid]]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.jobs is not None and args.jobs < 1:
            raise ExperimentError(f"--jobs must be at least 1; it is {args.jobs}")
        if args.list:
            done = read_results(Path(args.results, f"{args.grid}.csv"))
            for command in (f"python train_fsg.py {flags}" for flags in commands):
                print("done" if command in done else "    ", command)
            return 0
        run_grid(args.grid, commands, Path(args.results), Path(args.out).resolve(), args.jobs)
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except ExperimentError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(Path(args.results, f"{args.grid}.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
