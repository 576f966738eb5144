"""Compare runs: a figure of training loss, test accuracy and sign flips, or a table.

    python plot.py runs/A runs/B                              # writes runs/curves.png
    python plot.py runs/*/ --out compare.png --title "CIFAR-10, ResNet-20, Adam"
    python plot.py --table runs/*                             # Markdown: mean ± standard deviation over the seeds

The left column of the figure is by epoch, the right one by training time: a method that learns its gradients costs more
per step, so it may win by epoch and lose by time. Training time is the sum of the epochs' training seconds, without the
evaluation after each epoch. The bottom row shows the share of the binary weights whose sign changed in the epoch. A
full-precision run has none, and no curve there.

Runs that differ only in --seed (according to their args.json) form a group: one curve, their mean, with a band of ± one
standard deviation, and one row of the table. A group extends to the last epoch that all of its runs have reached.

The figure needs matplotlib. This file reads metrics.csv and args.json only. It can be copied alone, and it can be used
while the runs are still training.
"""

import argparse
import csv
import io
import json
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

COLUMNS = ("epoch", "seconds", "train_loss", "test_acc", "flip_ratio")  # the columns of metrics.csv that are used

# Runs of one experiment may differ in these flags.
NOT_THE_EXPERIMENT = {"seed", "name", "out", "resume", "eval_only", "workers", "save_every", "device"}
LAST = 10  # the table averages the test accuracy over this many epochs at the end of a run

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too pale on white. After the last
# colour comes the first one again, with the next dash and marker.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
FEW = 25  # curves of at most this many points have markers, so that a run of one epoch is visible

WIDTH, HEIGHT = 11.0, 8.5  # inches, without the legend
DPI = 150


class PlotError(Exception):
    """The runs cannot be plotted. The message is one sentence that says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def read_run(folder: Path | str) -> dict[str, np.ndarray]:
    """Read the curves of one run: a dictionary of float64 arrays [epochs].

    epoch       1, 2, …
    time        seconds of training up to the end of the epoch
    train_loss  mean cross-entropy over the epoch
    test_acc    0 to 1
    flip_ratio  share of the binary weights that changed sign in the epoch, 0 to 1; nan for a full-precision run

    Raises PlotError if there is no such run, if it has no epoch yet, or if metrics.csv is damaged.
    """
    folder = Path(folder)
    path = folder / "metrics.csv"
    if not folder.is_dir():
        raise PlotError(f"there is no run folder {folder}: give the folder of a run, such as runs/NAME")
    if not path.is_file():
        raise PlotError(f"{folder} has no metrics.csv, so it is not a run: give the folder of a run, such as runs/NAME")
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"without the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
            rows = [numbers(row, reader.line_num) for row in reader]
        if not rows:
            raise PlotError(f"{path} has no epoch yet: try again when the run's first epoch is over, or leave it out")
        run = dict(zip(COLUMNS, np.array(rows).T, strict=True))
        if not np.all(np.diff(run["epoch"], prepend=0) > 0):
            raise ValueError("its epochs are not in order")
        if not np.all(np.isfinite(run["seconds"]) & (run["seconds"] >= 0)):
            raise ValueError("an epoch's seconds are not a time")
    except OSError as e:
        raise PlotError(f"{path} cannot be read ({e.strerror or e}): make it readable, or leave this run out") from None
    except (ValueError, csv.Error) as e:  # UnicodeDecodeError, from a binary file, is a ValueError
        reason = "not a text file" if isinstance(e, UnicodeError) else e
        raise PlotError(
            f"{path} is damaged ({reason}): leave this run out, or resume it (--resume), which writes the file anew"
        ) from None
    run["time"] = np.cumsum(run.pop("seconds"))
    return run


def numbers(row: dict, line: int) -> list[float]:
    """The COLUMNS of one row as floats. Raises ValueError for a wrong number of fields or a field that is no number."""
    if None in row or None in row.values():  # csv.DictReader's mark for surplus and missing fields
        raise ValueError(f"line {line} has not as many fields as the first")
    try:
        return [float(row[name]) for name in COLUMNS]
    except ValueError:
        raise ValueError(f"line {line} has a field that is not a number") from None


def label_runs(folders: list[Path]) -> list[str]:
    """A unique label for each folder: its name, preceded by as many parent folders as are needed.

    a/ste, b/ste, b/fsg  →  'a/ste', 'b/ste', 'fsg'
    """
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    labels = []
    for path in paths:
        n = 1
        while n < len(path) and sum(other[-n:] == path[-n:] for other in paths) > 1:
            n += 1
        labels.append(str(Path(*path[-n:])))
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds.


def group_runs(folders: list[Path]) -> list[list[int]]:
    """Group the runs that have the same flags and different seeds. Returns lists of indices into `folders`.

    A run without a readable args.json is a group of its own.
    """
    groups, seen = {}, {}
    for i, folder in enumerate(folders):
        try:
            flags = json.loads((folder / "args.json").read_text())
            experiment = json.dumps({k: v for k, v in flags.items() if k not in NOT_THE_EXPERIMENT}, sort_keys=True)
            repeats = seen.setdefault(
                (experiment, flags.get("seed")), []
            )  # runs with the same seed go to different groups
        except (OSError, ValueError, AttributeError):
            experiment, repeats = f"{i}", []
        groups.setdefault((experiment, len(repeats)), []).append(i)
        repeats.append(i)
    return list(groups.values())


def label_group(labels: list[str]) -> str:
    """The common beginning of the labels of a group's runs: ste-seed0, ste-seed1  →  'ste'."""
    if len(labels) == 1:
        return labels[0]
    common = os.path.commonprefix(labels)  # noqa: RUF071 (the prefix of the characters is wanted)
    common = re.sub(r"([-_ ,.]+(seeds?|s)\d*)?[-_ ,.]*$", "", common, flags=re.IGNORECASE)
    return common or labels[0]


def average(runs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean of the curves of runs read by read_run(), as long as the shortest run.

    For more than one run, `NAME_sd` holds the standard deviation of the curve NAME.
    """
    epochs = min(len(run["epoch"]) for run in runs)
    stacks = {name: np.stack([run[name][:epochs] for run in runs]) for name in runs[0]}
    mean = {name: stack.mean(0) for name, stack in stacks.items()}
    if len(runs) > 1:
        mean |= {f"{name}_sd": stack.std(0, ddof=1) for name, stack in stacks.items()}
    return mean


def mean_and_spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, as in '91.11 ± 0.29'; for a single value the mean alone."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(groups: dict[str, list[dict]]) -> str:
    """A Markdown table with one row per group {label: [read_run(folder), …]}, accuracies in %."""
    rows, last = [], 1
    for label, runs in groups.items():
        epochs = min(len(run["epoch"]) for run in runs)
        runs = [{name: curve[:epochs] for name, curve in run.items()} for run in runs]
        last = max(last, min(LAST, epochs))
        best = mean_and_spread([100 * run["test_acc"].max() for run in runs], 2)
        end = mean_and_spread([100 * run["test_acc"][-LAST:].mean() for run in runs], 2)
        loss = mean_and_spread([run["train_loss"][-1] for run in runs], 4)
        hours = np.mean([run["time"][-1] for run in runs]) / 3600
        label = label.replace("|", "\\|")
        rows.append(f"| {label} | {len(runs)} | {epochs} | {best} | {end} | {loss} | {hours:.2f} |")
    ending = f"last {last} epochs %" if last > 1 else "last epoch %"
    head = f"| run | seeds | epochs | best test acc. % | {ending} | training loss | hours |"
    return "\n".join([head, "| --- " * 7 + "|", *rows])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing.


def time_unit(seconds: float) -> tuple[str, float]:
    """A readable unit for an axis that ends at this many seconds, and the unit's length in seconds."""
    if seconds < 120:
        return "seconds", 1.0
    if seconds < 2 * 3600:
        return "minutes", 60.0
    return "hours", 3600.0


def draw(runs: dict[str, dict], title: str = ""):
    """Draw the groups {label: average([read_run(folder), …])}; returns a matplotlib Figure.

    The axes [3, 2] have one row each for loss, accuracy and flips. The left column is by epoch, the right one by time.
    Raises PlotError if matplotlib is missing or if there are more groups than line styles.
    """
    if len(runs) > len(COLORS) * len(STYLES):
        most = len(COLORS) * len(STYLES)
        raise PlotError(f"{len(runs)} runs cannot be told apart in one figure: give at most {most}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no screen
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as e:
        raise PlotError(f"plot.py needs matplotlib ({e}): pip install matplotlib") from None

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2, sharex="col", sharey="row")
    unit, unit_seconds = time_unit(max(run["time"][-1] for run in runs.values()))
    for i, run in enumerate(runs.values()):
        for row, (name, factor) in enumerate((("train_loss", 1), ("test_acc", 100), ("flip_ratio", 100))):
            y, spread = factor * run[name], run.get(f"{name}_sd")
            if row == 0:
                y = np.where(np.isfinite(y) & (y > 0), y, np.nan)  # a log scale shows only these
            for column, x in enumerate((run["epoch"], run["time"] / unit_seconds)):
                draw_curve(axes[row, column], x, y, i, None if spread is None else factor * spread)

    set_log_scale(axes[0, 0])
    if not any(np.isfinite(run["flip_ratio"]).any() for run in runs.values()):
        axes[2, 0].set_yticks([])
        for ax in axes[2]:
            ax.text(0.5, 0.5, "full precision: no binary weights", transform=ax.transAxes, ha="center", color="0.4")
    else:
        axes[2, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("training loss (log scale)")
    axes[1, 0].set_ylabel("test accuracy (%)")
    axes[2, 0].set_ylabel("weights flipped (% per epoch)")
    axes[2, 0].set_xlabel("epoch")
    axes[2, 1].set_xlabel(f"training time ({unit})")
    axes[2, 0].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    for ax in axes.flat:
        ax.set_xlim(left=0)
        ax.grid(color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelleft=True)  # repeat the numbers of the left column in the right one
    figure.align_ylabels(axes[:, 0])
    add_legend(figure, axes[0, 0].get_lines(), list(runs), title)
    return figure


def draw_curve(ax, x: np.ndarray, y: np.ndarray, i: int, spread: np.ndarray | None) -> None:
    """Draw curve number i, with a gap where y is nan, and a band of ± spread (None: no band)."""
    color = COLORS[i % len(COLORS)]
    linestyle, marker = STYLES[i // len(COLORS)]
    if np.isfinite(y).sum() > FEW:
        marker = ""
    ax.plot(x, y, color=color, linestyle=linestyle, linewidth=1.6, marker=marker, markersize=4)
    if spread is not None:  # the lower edge stays above 0: no curve is negative, and a log scale has no 0
        ax.fill_between(x, np.maximum(y - spread, 0.2 * y), y + spread, color=color, alpha=0.2, linewidth=0)


def set_log_scale(ax) -> None:
    """Set a log scale with plain numbers at the ticks: 1, 2, 5, 10, …, or evenly spaced ticks for a narrow range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    values = np.concatenate([line.get_ydata() for line in ax.get_lines()])
    if not np.isfinite(values).any():
        return  # every loss was infinite or 0
    low, high = np.nanmin(values), np.nanmax(values)
    ax.set_yscale("log")
    if low == high:
        ax.set_ylim(low / 1.5, high * 1.5)
    if high / low < 8:
        locator = MaxNLocator(6)
    else:
        locator = LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,))
    ax.yaxis.set_major_locator(locator)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def add_legend(figure, lines: list, labels: list[str], title: str) -> None:
    """Add the title and one legend above all panels, in as many columns as fit.

    The figure grows by the legend's height.
    """
    labels = ["\n".join(label[i : i + 70] for i in range(0, len(label), 70)) for label in labels]
    title = "\n".join(textwrap.wrap(title, 70))
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(lines, labels, loc="outside upper center", ncols=columns, frameon=False, title=title)
        for text in (*legend.get_texts(), legend.get_title()):
            text.set_parse_math(False)  # show a $ in a name as it is
        legend.get_title().set(fontsize="large", multialignment="center")
        box = legend.get_window_extent(figure.canvas.get_renderer())  # pixels
        if box.width < 0.95 * WIDTH * DPI or columns == 1:
            break
        legend.remove()
    figure.set_size_inches(WIDTH, HEIGHT + box.height / DPI)


def save(figure, path: Path) -> None:
    """Write the figure in the format given by the path's suffix. Raises PlotError if it cannot be written."""
    image = io.BytesIO()  # the file is written only after drawing has succeeded, so a failure keeps the old file
    try:
        figure.savefig(image, format=path.suffix[1:])
    except ValueError:
        raise PlotError(f"--out {path} is of no known kind: let it end in .png (or .pdf, .svg)") from None
    try:
        path.write_bytes(image.getvalue())
    except OSError as e:
        raise PlotError(f"{path} cannot be written ({e.strerror or e}): choose another --out") from None


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("--out", metavar="FILE.png", help="file to write (default: curves.png beside the first run)")
    parser.add_argument("--table", action="store_true", help="print a Markdown table and draw nothing")
    parser.add_argument("--title", metavar="TEXT", default="", help="title of the figure")
    return parser


def main(argv=None) -> int:
    """Returns the exit code: 0, or 1 after one sentence on standard error."""
    args = flags().parse_args(argv)
    try:
        # The pattern `runs/*` may also match an earlier figure and bench.py's JSON files. A folder counts once.
        names = [name for name in args.runs if not (name.endswith((".png", ".json")) and os.path.isfile(name))]
        folders = list({os.path.abspath(name): Path(name) for name in names}.values())
        if not folders:
            raise PlotError("there is no run to draw: give the folder of a run, such as runs/NAME")
        out = Path(args.out or os.path.normpath(folders[0] / ".."))  # `..` rather than .parent: RUN may be "."
        if out.is_dir():
            out = out / "curves.png"
        labels, runs = label_runs(folders), [read_run(folder) for folder in folders]
        groups = {}
        for group in group_runs(folders):
            label = label_group([labels[i] for i in group])
            if label in groups or (len(group) > 1 and label in labels):  # the label is taken
                label = labels[group[0]]
            groups[label] = [runs[i] for i in group]
        if args.table:
            print(table(groups))
            return 0
        seeds = {label: f", {len(group)} seeds" if len(group) > 1 else "" for label, group in groups.items()}
        save(draw({f"{label}{seeds[label]}": average(group) for label, group in groups.items()}, args.title), out)
    except PlotError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
