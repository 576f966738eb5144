"""Compare runs: a figure of training loss, test accuracy and sign flips, a table, or heat maps of the layers.

    python plot.py runs/A runs/B                              # writes runs/curves.png
    python plot.py runs/*/ --out compare.png --title "CIFAR-10, ResNet-20, Adam"
    python plot.py runs/A runs/B --x step                     # by optimizer step instead of by epoch
    python plot.py --layers runs/A                            # writes runs/layers.png: flips and +1 of each layer
    python plot.py --table runs/*                             # Markdown: mean ± standard deviation over the seeds
    python plot.py --table runs/* --baseline ste              # also the differences to ste, paired by seed

The left column of the figure is by epoch (or step), the right one by training time: a method that learns its gradients
costs more per step, so it may win by epoch and lose by time. Training time is the sum of the epochs' training seconds,
without the evaluation after each epoch. The bottom row shows the fraction of the binary weights whose sign changed in
the epoch. A full-precision run has no binary weights, and no curve there.

Runs that differ only in --seed (according to their args.json) form a group: one curve, their mean, with a band of ± one
standard deviation, and one row of the table. A group extends to the last epoch that all of its runs have reached. Its
label is the name of its runs without -seedN or -seedN-K. Groups of the same name also have the flags in which they
differ: the runs ste-seed0 and ste-seed0-2 of two learning rates are "ste lr 1e-2" and "ste lr 3e-2".

The table has three measures of the spread: ± one standard deviation over the seeds, the 95 % confidence interval of the
mean accuracy (Student's t), and with --baseline the mean difference to that row with its 95 % confidence interval. The
interval and the difference are of the test accuracy of the last epoch. If all runs have val_acc, they are of the epoch
with the best val_acc instead. The difference is taken seed by seed, which cancels the effect of the seed on both
methods. Runs that have not reached the last epoch of their --epochs are left out, with a note. A line below the table
says whether the rows are of different data sets, networks or numbers of epochs.

A RUN is the folder of a run, or a CSV file with the following columns, in any order. Other columns are not used.

    epoch, seconds, train_loss, test_acc, flip_ratio      needed; flip_ratio is nan at full precision
    step                                                  for --x step
    val_loss, val_acc                                     drawn dotted; the table adds the test accuracy of the epoch
                                                          with the best val_acc
    test_acc_bn                                           test accuracy with re-estimated BatchNorm statistics: drawn
                                                          dashed, and a column of the table
    flips/LAYER, plus/LAYER                               for --layers: flip_ratio of one layer, and its fraction of +1

The figure needs matplotlib. This file reads CSV files and args.json only. It can be copied alone, and it can be used
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
import unicodedata
import uuid
from pathlib import Path

import numpy as np

COLUMNS = ("epoch", "seconds", "train_loss", "test_acc", "flip_ratio")
OPTIONAL = ("step", "val_loss", "val_acc", "test_acc_bn")
OF_LAYERS = ("flips/", "plus/")  # how the columns of single layers begin

# Rows of the table that differ in these flags, or in the number of epochs, do not compare methods alone.
COMPARED = ("dataset", "data_dir", "val", "image_size", "arch")

# Runs of one experiment may differ in these flags.
NOT_THE_EXPERIMENT = {"seed", "name", "out", "resume", "eval_only", "workers", "save_every", "device", "environment"}
NOT_THE_EXPERIMENT |= {"tensorboard", "wandb"}

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too pale on white. After the last
# colour, the colours repeat with the next dash and marker.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
FEW = 25  # curves of at most this many points have markers, so that a run of one epoch is visible

# Further curves of a run: the row of the figure, the line style, and what they are.
THIN = {
    "val_loss": (0, "dotted", "validation"),
    "val_acc": (1, "dotted", "validation"),
    "test_acc_bn": (1, "dashed", "test, BatchNorm re-estimated"),
}

# What matplotlib writes without other programs.
FORMATS = (".png", ".pdf", ".svg", ".svgz", ".jpg", ".jpeg", ".eps", ".ps", ".tif", ".tiff", ".webp", ".gif")
WIDTH, HEIGHT = 11.0, 8.5  # inches, without the legend
DPI = 150


class PlotError(Exception):
    """The runs cannot be plotted. The message is one sentence that says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


class Unfinished(PlotError):
    """A run that cannot be used yet."""


def run_path(name: str) -> Path:
    """The path that stands for a run: its folder, or its CSV file. runs/A/metrics.csv stands for the folder runs/A."""
    path = Path(name)
    return path.parent if path.name == "metrics.csv" and os.path.isfile(path) else path


def read_flags(path: Path) -> dict:
    """The run's args.json; {} if there is none that can be read."""
    try:
        flags = json.loads((path / "args.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return flags if isinstance(flags, dict) else {}


def read_run(path: Path | str) -> dict[str, np.ndarray]:
    """Read the curves of one run: a dictionary of float64 arrays [epochs].

    epoch       1, 2, …
    time        seconds of training up to the end of the epoch
    train_loss  mean cross-entropy over the epoch
    test_acc    0 to 1
    flip_ratio  fraction of the binary weights that changed sign in the epoch, 0 to 1; nan for a full-precision run
    step, val_loss, val_acc, test_acc_bn, flips/LAYER, plus/LAYER: only if the file has them; nan where a field is empty

    path: the run's folder, or a CSV file. Raises Unfinished if it has no epoch yet, and PlotError if there is no such
    run or if the file is damaged.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists(), it takes names that are too long
        raise PlotError(f"there is no run {path}: give the folder of a run, such as runs/NAME, or a CSV file")
    file = path / "metrics.csv" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise PlotError(f"{path} has no metrics.csv, so it is not a run: give the folder of a run, such as runs/NAME")
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, skipinitialspace=True)
            found = reader.fieldnames or ()
            missing = [name for name in COLUMNS if name not in found]
            if missing:
                raise ValueError(f"without the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
            optional = [name for name in found if name in OPTIONAL or name.startswith(OF_LAYERS)]
            rows = [numbers(row, reader.line_num, optional) for row in reader]
        if not rows:
            raise Unfinished(f"{file} has no epoch yet: try again when the run's first epoch is over, or leave it out")
        run = dict(zip((*COLUMNS, *optional), np.array(rows).T, strict=True))
        if not np.all(np.diff(run["epoch"], prepend=0) > 0):
            raise ValueError("its epochs are not in order")
        if not np.all(np.isfinite(run["seconds"]) & (run["seconds"] >= 0)):
            raise ValueError("an epoch's seconds are not a time")
    except OSError as e:
        raise PlotError(f"{file} cannot be read ({e.strerror or e}): make it readable, or leave this run out") from None
    except (ValueError, csv.Error) as e:  # UnicodeDecodeError, from a binary file, is a ValueError
        reason = "not a text file" if isinstance(e, UnicodeError) else e
        advice = "or resume it (--resume), which writes a new file" if path.is_dir() else "or correct the file"
        raise PlotError(f"{file} is damaged ({reason}): leave this run out, {advice}") from None
    run["time"] = np.cumsum(run.pop("seconds"))
    return run


def numbers(row: dict, line: int, optional: list[str]) -> list[float]:
    """The COLUMNS and the optional columns of one row as floats; an empty optional field is nan.

    Raises ValueError for a wrong number of fields or a field that is no number.
    """
    if None in row or None in row.values():  # csv.DictReader's mark for surplus and missing fields
        raise ValueError(f"line {line} has not as many fields as the first")
    try:
        return [float(row[name]) for name in COLUMNS] + [float(row[name].strip() or "nan") for name in optional]
    except ValueError:
        raise ValueError(f"line {line} has a field that is not a number") from None


def check_finished(path: Path, run: dict[str, np.ndarray], flags: dict) -> None:
    """Raise Unfinished if the run has fewer epochs than its flags say. A CSV file without flags is finished."""
    given = map(flags.get, ("epochs", "limit_steps"))  # of any type, if another program wrote them
    epochs, limit = (x if type(x) is int and 0 < x < 2**53 else None for x in given)
    done = run["epoch"][-1]
    if epochs and done < epochs and not (limit and run.get("step", [limit])[-1] >= limit):
        raise Unfinished(
            f"{path} is not finished ({done:.0f} of {epochs} epochs): resume it, or draw it without --table"
        )


def label_runs(folders: list[Path]) -> list[str]:
    """A unique label for each folder: its name, preceded by as many parent folders as are needed.

    a/ste, b/ste, b/fsg  →  'a/ste', 'b/ste', 'fsg'. A CSV file goes by its name without the ending.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    paths = [(path.with_suffix("") if path.is_file() else path).parts for path in paths]
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

    A run without a readable args.json is a separate group.
    """
    groups, seen = {}, {}
    for i, folder in enumerate(folders):
        flags = read_flags(folder)
        experiment = json.dumps({k: v for k, v in flags.items() if k not in NOT_THE_EXPERIMENT}, sort_keys=True)
        if flags:
            repeats = seen.setdefault((experiment, str(flags.get("seed"))), [])  # equal seeds: separate groups
        else:
            experiment, repeats = f"{i}", []
        groups.setdefault((experiment, len(repeats)), []).append(i)
        repeats.append(i)
    return list(groups.values())


def label_group(labels: list[str]) -> str:
    """The labels of a group's runs without the seed, or their common beginning: ste-seed0, ste-seed1-2  →  'ste'."""
    names = {re.sub(r"-seed\d+(-\d+)?$", "", label) for label in labels}
    if len(names) == 1:
        return names.pop() or labels[0]
    common = os.path.commonprefix(labels)  # noqa: RUF071 (the prefix of the characters is wanted)
    common = re.sub(r"([-_ ,.]+(seeds?|s)\d*)?[-_ ,.]*$", "", common, flags=re.IGNORECASE)
    return common or labels[0]


def as_typed(value) -> str:
    """The value of a flag: 0.01  →  '1e-2', [0.9, 0.97]  →  '0.9 0.97'."""
    if isinstance(value, list):
        return " ".join(str(v) if isinstance(v, list) else as_typed(v) for v in value)
    if isinstance(value, float) and 0 < abs(value) < 0.1:
        return np.format_float_scientific(value, trim="-", exp_digits=1)
    return str(value)


def label_groups(runs: list[list[str]], flags: list[dict]) -> list[str]:
    """The label of each group: its name, and the flags in which it differs from other groups of that name.

    runs: the labels of each group's runs. flags: the args.json of a run of each group. Where the flags do not tell
    groups apart, or two labels would be equal, the label of the first run replaces the name.
    """
    names = [label_group(labels) for labels in runs]

    def differing(name: str, own: dict) -> str:
        alike = [other for other_name, other in zip(names, flags, strict=True) if other_name == name]
        found = [k for k, v in own.items() if k not in NOT_THE_EXPERIMENT and any(o.get(k, v) != v for o in alike)]
        return "".join(f" {k.replace('_', '-')} {as_typed(own[k])}" for k in found)

    keys = [(name, differing(name, own)) for name, own in zip(names, flags, strict=True)]
    found = [(k[0] if keys.count(k) == 1 else labels[0]) + k[1] for k, labels in zip(keys, runs, strict=True)]
    return [label if found.count(label) == 1 else labels[0] for label, labels in zip(found, runs, strict=True)]


def find_row(name: str, flags: dict[str, dict]) -> str:
    """The label that `name` stands for: it is the label, the folder of one of its runs, or a part of this label alone.

    flags: {label: {folder: {…}, …}}. Raises PlotError if it stands for no label or for several.
    """
    path = os.path.abspath(run_path(name))
    is_run = lambda label: any(name == run.name or path == os.path.abspath(run) for run in flags[label])
    for fits in (name.__eq__, is_run, lambda label: name in label):
        found = [label for label in flags if fits(label)]
        if len(found) == 1:
            return found[0]
    what = "more than one" if found else "not a"
    raise PlotError(f"--baseline {name} is {what} row of the table: give one of {', '.join(found or flags)}")


def average(runs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean of the curves of runs read by read_run(), as long as the shortest run, of the columns that all have.

    For more than one run, `NAME_sd` is the standard deviation of the curve NAME, except for the columns of layers.
    """
    epochs = min(len(run["epoch"]) for run in runs)
    common = [name for name in runs[0] if all(name in run for run in runs)]
    stacks = {name: np.stack([run[name][:epochs] for run in runs]) for name in common}
    mean = {name: stack.mean(0) for name, stack in stacks.items()}
    if len(runs) > 1:
        mean |= {f"{name}_sd": stack.std(0, ddof=1) for name, stack in stacks.items() if "/" not in name}
    return mean


def mean_and_spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, as in '91.11 ± 0.29'; for a single value the mean alone."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def half_width(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean (Student's t), for at least two values."""
    n = len(values)
    # For θ = arctan(t / √(n−1)), the density of |t| is proportional to cos^(n−2) θ, with θ from 0 to π/2.
    theta = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(theta) ** (n - 2)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    t = np.sqrt(n - 1) * np.tan(np.interp(0.95, share / share[-1], theta))
    return t * np.std(values, ddof=1) / np.sqrt(n)


def accuracy(run: dict, epochs: int, validated: bool, column: str = "test_acc") -> float:
    """Test accuracy in %: of the last of that many epochs or, if `validated`, of the one with the best val_acc."""
    at = np.nan_to_num(run["val_acc"][:epochs]).argmax() if validated else epochs - 1
    return 100 * run[column][at]


def printable(text: str) -> str:
    """The text with a question mark for each line break and each other character that cannot be shown."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else "?" for c in text)  # Zs: spaces


def difference(ours: dict, baseline: dict, validated: bool) -> str:
    """Mean difference of accuracy(), in %, paired by seed: '+1.20 ± 0.35 (3)'. Groups: {seed: run}.

    Only the epochs that all of these runs have count. '–' if the groups have no seed in common.
    """
    pairs = [(run, baseline[seed]) for seed, run in ours.items() if seed in baseline]
    if not pairs:
        return "–"
    epochs = min(len(run["epoch"]) for pair in pairs for run in pair)
    values = [accuracy(a, epochs, validated) - accuracy(b, epochs, validated) for a, b in pairs]
    spread = f" ± {half_width(values):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.2f}{spread} ({len(values)})"


def table(groups: dict[str, list[dict]], flags: dict[str, dict], baseline: str | None = None) -> str:
    """A Markdown table with one row per group {label: [read_run(folder), …]}, accuracies in %.

    flags: the args.json of each run, {label: {folder: {…}, …}}. baseline: what find_row() finds the row by that the
    others are compared with.
    """
    if baseline is not None:
        baseline = find_row(baseline, flags)
    has = lambda column: any(column in run for runs in groups.values() for run in runs)
    by_seed = {}
    for label, runs in groups.items():
        seeds = [own.get("seed") for own in flags[label].values()]
        by_seed[label] = {seed: run for seed, run in zip(seeds, runs, strict=True) if isinstance(seed, int)}
    validated = lambda runs: all(np.isfinite(run.get("val_acc", np.nan)).any() for run in runs)
    chosen = all(map(validated, groups.values()))
    at = "epoch of best validation" if chosen else "last epoch"
    rows = []
    for label, runs in groups.items():
        epochs = min(len(run["epoch"]) for run in runs)
        measured = [accuracy(run, epochs, chosen) for run in runs]
        row = {"run": label.replace("|", "\\|"), "seeds": f"{len(runs)}", "epochs": f"{epochs}"}
        row["test acc. %, last epoch"] = mean_and_spread([accuracy(run, epochs, False) for run in runs], 2)
        row["training loss, last epoch"] = mean_and_spread([run["train_loss"][epochs - 1] for run in runs], 4)
        if has("val_acc"):
            found = [accuracy(run, epochs, True) for run in runs] if validated(runs) else []
            row["test acc. %, epoch of best validation"] = mean_and_spread(found, 2) if found else "–"
        low, high = (np.mean(measured) + sign * half_width(measured) for sign in (-1, 1)) if len(runs) > 1 else (0, 0)
        row[f"95 % interval, {at}"] = f"{low:.2f} to {high:.2f}" if len(runs) > 1 else "–"
        if has("test_acc_bn"):
            known = all("test_acc_bn" in run for run in runs)
            found = [accuracy(run, epochs, chosen, "test_acc_bn") for run in runs] if known else []
            row[f"BatchNorm re-estimated %, {at}"] = mean_and_spread(found, 2) if known else "–"
        if baseline is not None:
            paired = "–" if label == baseline else difference(by_seed[label], by_seed[baseline], chosen)
            row[f"difference to {baseline}, {at} (seeds)"] = paired
        row["hours"] = f"{np.mean([run['time'][epochs - 1] for run in runs]) / 3600:.2f}"
        rows.append(row)
    head = [name.replace("|", "\\|") for name in rows[0]]
    lines = [head, ["---"] * len(head), *(row.values() for row in rows)]
    return "\n".join(printable(f"| {' | '.join(line)} |") for line in lines)


def what_differs(groups: dict[str, list[dict]], flags: dict[str, dict]) -> str:
    """A sentence that says in which of COMPARED, and in which number of epochs, the groups differ; "" if in none.

    groups: {label: [read_run(folder), …]}. flags: the args.json of each run, {label: {folder: {…}, …}}.
    """
    differences = []
    for name in (*COMPARED, "epochs"):
        values = {}  # {value: [label, …]}
        for label, runs in groups.items():
            known = next(iter(flags[label].values())) | {"epochs": min(len(run["epoch"]) for run in runs)}
            if name in known and (name != "data_dir" or known.get("dataset") in ("folder", "imagenet")):
                values.setdefault(str(known[name]), []).append(label)
        if len(values) > 1:
            listed = "; ".join(f"{value}: {', '.join(labels)}" for value, labels in values.items())
            differences.append(f"{name} ({listed})")
    found = printable(", ".join(differences))
    return f"Not a comparison of methods alone: the rows differ in {found}." if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# Drawing.


def time_unit(seconds: float) -> tuple[str, float]:
    """A readable unit for an axis that ends at this many seconds, and the unit's length in seconds."""
    if seconds < 120:
        return "seconds", 1.0
    if seconds < 2 * 3600:
        return "minutes", 60.0
    return "hours", 3600.0


def new_figure(width: float, height: float):
    """An empty matplotlib Figure. Raises PlotError if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no screen
        from matplotlib.figure import Figure
    except ImportError as e:
        raise PlotError(f"plot.py needs matplotlib ({e}): pip install matplotlib") from None
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    FigureCanvasAgg(figure)
    return figure


def draw(runs: dict[str, dict], title: str = "", x: str = "epoch"):
    """Draw the groups {label: average([read_run(folder), …])}; returns a matplotlib Figure.

    The axes [3, 2] have one row each for loss, accuracy and flips. The left column is by epoch or, with x="step", by
    step; the right one is by time. Raises PlotError if matplotlib is missing, if there are more groups than line
    styles, or if a group has no steps.
    """
    if len(runs) > len(COLORS) * len(STYLES):
        most = len(COLORS) * len(STYLES)
        raise PlotError(f"{len(runs)} runs cannot be told apart in one figure: give at most {most}")
    for label, run in runs.items():
        if x not in run:
            raise PlotError(f"{label} has no column {x}: leave this run out, or leave out --x")
    figure = new_figure(WIDTH, HEIGHT)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(3, 2, sharex="col", sharey="row")
    unit, unit_seconds = time_unit(max(run["time"][-1] for run in runs.values()))
    for i, run in enumerate(runs.values()):
        for row, (name, factor) in enumerate((("train_loss", 1), ("test_acc", 100), ("flip_ratio", 100))):
            y, spread = factor * run[name], run.get(f"{name}_sd")
            if row == 0:
                y = np.where(np.isfinite(y) & (y > 0), y, np.nan)  # a log scale shows only these
            for column, at in enumerate((run[x], run["time"] / unit_seconds)):
                draw_curve(axes[row, column], at, y, i, None if spread is None else factor * spread)
    for name, (row, linestyle, what) in THIN.items():
        having = [(i, run) for i, run in enumerate(runs.values()) if name in run]
        for i, run in having:
            y = 100 * run[name] if row == 1 else np.where(run[name] > 0, run[name], np.nan)
            for ax, at in zip(axes[row], (run[x], run["time"] / unit_seconds), strict=True):
                ax.plot(at, y, color=COLORS[i % len(COLORS)], linestyle=linestyle, linewidth=1.0)
        if having:  # each kind has its place above the panel
            place = "right" if name == "test_acc_bn" else "left"
            axes[row, 0].set_title(f"{linestyle}: {what}", loc=place, fontsize="small", color="0.3")

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
    axes[2, 0].set_xlabel(x)
    axes[2, 1].set_xlabel(f"training time ({unit})")
    axes[2, 0].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    for ax in axes.flat:
        ax.set_xlim(left=0)
        ax.grid(color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelleft=True)  # repeat the numbers of the left column in the right one
    figure.align_ylabels(axes[:, 0])
    add_legend(figure, axes[0, 0].get_lines()[: len(runs)], list(runs), title)
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
    labels = ["\n".join(printable(label[i : i + 70]) for i in range(0, len(label), 70)) for label in labels]
    title = "\n".join(map(printable, textwrap.wrap(title, 70)))
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


MOST_LAYERS = 40  # names of layers on an axis; with more layers, only some are named


def draw_layers(runs: dict[str, dict], title: str = ""):
    """Heat maps of every layer over the epochs, for the groups {label: average([…])}; returns a matplotlib Figure.

    The axes [2, groups] show the fraction of a layer's weights that changed sign in the epoch, and the fraction of +1.
    Raises PlotError if matplotlib is missing, for more than four groups, and if a group has no columns of layers.
    """
    if len(runs) > 4:
        raise PlotError(f"{len(runs)} runs do not fit beside each other: give at most 4 with --layers")
    layers = {label: layer_names(label, run) for label, run in runs.items()}
    most = min(MOST_LAYERS, max(map(len, layers.values())))
    figure = new_figure(3.0 + 3.7 * len(runs), 2.5 + 2 * max(2.1, 0.13 * most))  # inches
    axes = figure.subplots(2, len(runs), squeeze=False)
    for row, prefix in enumerate(OF_LAYERS):
        maps = {label: 100 * np.stack([run[prefix + name] for name in layers[label]]) for label, run in runs.items()}
        known = np.concatenate([values[np.isfinite(values)] for values in maps.values()])
        if prefix == "flips/":
            options = {"cmap": "viridis", "vmin": 0, "vmax": max(known, default=0) or 1}
        else:  # white: half of the weights are +1
            widest = max(abs(known - 50), default=0) or 1
            options = {"cmap": "PuOr", "vmin": 50 - widest, "vmax": 50 + widest}
        for ax, (label, run) in zip(axes[row], runs.items(), strict=True):
            image = draw_heat_map(ax, run["epoch"], layers[label], maps[label], options)
        figure.colorbar(image, ax=axes[row], label=("weights flipped (% per epoch)", "weights that are +1 (%)")[row])
    for ax, label in zip(axes[0], runs, strict=True):
        ax.set_title("\n".join(map(printable, textwrap.wrap(label, 40))), fontsize="medium", parse_math=False)
    for ax in axes[1]:
        ax.set_xlabel("epoch")
    figure.suptitle("\n".join(map(printable, textwrap.wrap(title, 70))), parse_math=False)
    return figure


def layer_names(label: str, run: dict) -> list[str]:
    """The layers that the run has columns of. Raises PlotError if there is none."""
    names = [name.removeprefix("plus/") for name in run if name.startswith("plus/")]
    names = [name for name in names if f"flips/{name}" in run]
    if not names:
        raise PlotError(f"{label} has no columns flips/LAYER and plus/LAYER: leave it out, or leave out --layers")
    return names


def draw_heat_map(ax, epochs: np.ndarray, names: list[str], values: np.ndarray, options: dict):
    """Draw values [layers, epochs], the first layer on top and nan in grey; returns what a colour bar needs."""
    from matplotlib.ticker import MaxNLocator

    edges = np.append(epochs - 0.5, epochs[-1] + 0.5)
    image = ax.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, values, **options)
    ax.set_facecolor("0.85")
    ax.invert_yaxis()
    every = -(-len(names) // MOST_LAYERS)
    ax.set_yticks(range(0, len(names), every), names[::every], fontsize=7, parse_math=False)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    return image


def save(figure, path: Path) -> None:
    """Write the figure in the format given by the path's suffix.

    Raises PlotError if it cannot be written, and ValueError if matplotlib cannot draw its values.
    """
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # a failure keeps the old file
    try:
        try:
            temporary.write_bytes(image.getvalue())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise PlotError(f"{path} cannot be written ({e.strerror or e}): choose another --out") from None


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as runs/NAME, or a CSV file")
    out = "file to write (default: curves.png, with --layers layers.png, beside the first run)"
    parser.add_argument("--out", metavar="FILE.png", help=out)
    parser.add_argument("--x", choices=["epoch", "step"], default="epoch", help="x axis of the left column")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--layers", action="store_true", help="draw heat maps of each layer's flips and fraction of +1")
    what.add_argument("--table", action="store_true", help="print a Markdown table and draw nothing")
    baseline = "--table: the row that the others are compared with: its label, a part of it, or one of its run folders"
    parser.add_argument("--baseline", metavar="NAME", help=baseline)
    parser.add_argument("--title", metavar="TEXT", default="", help="title of the figure")
    return parser


def read_groups(paths: list[Path], finished: bool) -> tuple[dict[str, list[dict]], dict[str, dict[Path, dict]]]:
    """The runs {label: [read_run(path), …]} of each group, and their flags {label: {path: read_flags(path), …}}.

    Leaves out runs without an epoch and, if `finished`, those that have not reached their last one; a note on standard
    error says so. Raises Unfinished if no run is left, and PlotError for a run that cannot be read.
    """
    runs, left_out = {}, []
    for path in paths:
        try:
            run = read_run(path)
            if finished:
                check_finished(path, run, read_flags(path))
            runs[path] = run
        except Unfinished as e:
            left_out.append(e)
    if not runs:
        raise left_out[0]
    for e in left_out:
        print(printable(f"note: left out: {e}"), file=sys.stderr)
    paths = list(runs)
    names, groups = label_runs(paths), group_runs(paths)
    flags = [{paths[i]: read_flags(paths[i]) for i in group} for group in groups]
    labels = label_groups([[names[i] for i in group] for group in groups], [next(iter(f.values())) for f in flags])
    flags = dict(zip(labels, flags, strict=True))
    return {label: [runs[path] for path in flags[label]] for label in labels}, flags


@np.errstate(all="ignore")  # a damaged run may have a loss of 1e308
def main(argv=None) -> int:
    """Returns the exit code: 0, or 1 after one sentence on standard error."""
    args = flags().parse_args(argv)
    try:
        if args.baseline is not None and not args.table:
            raise PlotError("--baseline is for --table: add --table, or leave it out")
        if args.x != "epoch" and (args.table or args.layers):
            raise PlotError("--x is for the curves: leave it out with --table and --layers")
        # The pattern `runs/*` may also match an earlier figure and bench.py's JSON files. A run counts once.
        figures = (*FORMATS, ".json")
        names = [run_path(name) for name in args.runs if not (name.endswith(figures) and os.path.isfile(name))]
        paths = list({os.path.abspath(path): path for path in names}.values())
        if not paths:
            raise PlotError("there is no run to draw: give the folder of a run, such as runs/NAME")
        out = Path(args.out or os.path.normpath(paths[0] / ".."))  # `..` rather than .parent: RUN may be "."
        if os.path.isdir(out):
            out = out / ("layers.png" if args.layers else "curves.png")
        groups, flags_of = read_groups(paths, finished=args.table)
        if args.table:
            print(table(groups, flags_of, args.baseline))
            differences = what_differs(groups, flags_of)
            if differences:
                print(f"\n{differences}")
            return 0
        if out.suffix.lower() not in FORMATS:
            raise PlotError(f"--out {out} has an unknown format: use a name that ends in {', '.join(FORMATS)}")
        counts = {label: f", {len(group)} seeds" if len(group) > 1 else "" for label, group in groups.items()}
        means = {f"{label}{counts[label]}": average(group) for label, group in groups.items()}
        try:
            save(draw_layers(means, args.title) if args.layers else draw(means, args.title, args.x), out)
        except ValueError as e:
            raise PlotError(f"values in the runs cannot be drawn ({e}): leave out the run that has them") from None
    except PlotError as e:
        print(printable(f"error: {e}"), file=sys.stderr)
        return 1
    print(out)
    return 0


def command(main) -> None:
    """Run main() and exit with its code. OSError prints one sentence to standard error and exits with 1.

    If no process reads the pipe any more, there is no sentence.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # where the encoding lacks ±, print a question mark
    try:
        try:
            code = main()
        finally:
            if sys.stdout:  # None if it was closed from the start
                sys.stdout.flush()
    except OSError as e:
        reason, file = e.strerror or e, e.filename
        code = f"error: standard output cannot be written ({reason}): make room there, or send it to another file"
        if file is not None:
            code = printable(f"error: {file} cannot be used ({reason}): give another name, or make it accessible")
        elif sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python prints at its end
            code = 1 if isinstance(e, BrokenPipeError) else code
    sys.exit(code)


if __name__ == "__main__":
    command(main)
