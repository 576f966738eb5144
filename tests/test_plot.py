"""plot.py as a user calls it: run folders in, one figure or one sentence out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent
HEADER = "epoch,step,train_loss,train_acc,test_loss,test_acc,lr,seconds,images_per_s,flip_ratio,plus_ratio\n"


def row(epoch, loss=1.5, acc=0.5, seconds=2.0, flips="0.02"):
    return f"{epoch},{10 * epoch},{loss:.6g},0.4,1.6,{acc:.6g},0.001,{seconds},500,{flips},0.5\n"


def make_run(folder: Path, epochs=3, seconds=2.0, flips="0.02", text=None) -> str:
    """A run folder as the trainers write it, or with any other text as its metrics.csv."""
    folder.mkdir(parents=True)
    rows = (row(e, 2 * 0.8**e, 1 - 0.9**e, seconds, flips) for e in range(1, epochs + 1))
    (folder / "metrics.csv").write_text(HEADER + "".join(rows) if text is None else text)
    return str(folder)


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def check_png(path: Path):
    import matplotlib.image

    width, height = png_size(path)
    assert 1000 <= width <= 4000 and 1000 <= height <= 4000
    image = matplotlib.image.imread(path)[..., :3]
    assert 0.01 < (image.min(axis=-1) < 0.9).mean() < 0.5  # something is drawn, on white


def check_error(capsys, argv, *words):
    """main fails with exit code 1 and one sentence on standard error that holds all the words."""
    assert plot.main([str(a) for a in argv]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and output.err.endswith("\n")
    for word in words:
        assert str(word) in output.err
    return output.err


def command(*argv, cwd=ROOT, script=ROOT / "plot.py", **env):
    return subprocess.run(
        [sys.executable, str(script), *argv], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


def legend_texts(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---------------------------------------------------------------------------------------------------------------------
# Images.


@pytest.mark.parametrize("epochs", [[1], [3, 2], [40, 1, 3, 30, 100]])
def test_writes_a_figure_beside_the_first_run_and_prints_its_path(tmp_path, capsys, epochs):
    folders = [make_run(tmp_path / "runs" / f"run{i}", n) for i, n in enumerate(epochs)]
    assert plot.main(folders) == 0
    output = capsys.readouterr()
    assert output.out.strip() == str(tmp_path / "runs" / "curves.png") and output.err == ""
    check_png(tmp_path / "runs" / "curves.png")


def test_paths_relative_to_the_current_folder(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "runs" / "A")
    monkeypatch.chdir(tmp_path)
    assert plot.main(["runs/A/"]) == 0
    monkeypatch.chdir(tmp_path / "runs" / "A")
    assert plot.main(["."]) == 0
    assert capsys.readouterr().out.split() == [os.path.join("runs", "curves.png"), os.path.join("..", "curves.png")]
    assert plot.label_runs([Path(".")]) == ["A"]


def test_out_names_the_file_or_its_folder(tmp_path, capsys):
    run = make_run(tmp_path / "runs" / "A")
    (tmp_path / "figures").mkdir()
    assert plot.main([run, "--out", str(tmp_path / "figures" / "a.png"), "--title", "Digits, 5 $ a run_$"]) == 0
    assert plot.main([run, "--out", str(tmp_path / "figures")]) == 0
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["a.png", "curves.png"]
    assert not (tmp_path / "runs" / "curves.png").exists()
    check_png(tmp_path / "figures" / "a.png")


def test_a_pattern_may_match_an_earlier_figure(tmp_path, capsys):
    make_run(tmp_path / "runs" / "A")
    for _ in range(2):
        assert plot.main(sorted(str(p) for p in (tmp_path / "runs").glob("*"))) == 0
    capsys.readouterr()
    check_error(capsys, [tmp_path / "runs" / "curves.png"], "no run to draw")


def test_full_precision_runs_have_no_flips(tmp_path):
    fp32, ste = make_run(tmp_path / "fp32", 4, flips="nan"), make_run(tmp_path / "ste", 4)
    for folders in ([fp32], [fp32, ste]):
        assert plot.main(folders) == 0
        check_png(tmp_path / "curves.png")
    figure = plot.draw({"fp32": plot.read_run(fp32), "ste": plot.read_run(ste)})
    flips = [line.get_ydata() for line in figure.axes[4].get_lines()]
    assert np.isnan(flips[0]).all()
    np.testing.assert_allclose(flips[1], 2.0)  # per cent


def test_losses_that_a_log_scale_cannot_show(tmp_path):
    zero = make_run(tmp_path / "zero", text=HEADER + row(1, loss=0) + row(2, loss=0))
    some = make_run(tmp_path / "some", text=HEADER + row(1, loss=0.5) + row(2, loss=0) + row(3, loss=float("inf")))
    for folders in ([zero], [some], [zero, some]):
        assert plot.main(folders) == 0


def test_axes_show_the_metrics_by_epoch_and_by_time(tmp_path):
    a, b = plot.read_run(make_run(tmp_path / "a", 5, seconds=60)), plot.read_run(make_run(tmp_path / "b", 3, seconds=1))
    figure = plot.draw({"a": a, "b": b})
    axes = np.array(figure.axes).reshape(3, 2)
    assert axes[2, 0].get_xlabel() == "epoch" and axes[2, 1].get_xlabel() == "training time (minutes)"
    assert axes[0, 0].get_yscale() == axes[0, 1].get_yscale() == "log"
    for i, run in enumerate((a, b)):
        for ax, key, factor in zip(axes[:, 0], ("train_loss", "test_acc", "flip_ratio"), (1, 100, 100), strict=True):
            np.testing.assert_allclose(ax.get_lines()[i].get_xdata(), run["epoch"])
            np.testing.assert_allclose(ax.get_lines()[i].get_ydata(), factor * run[key])
        for ax in axes[:, 1]:
            np.testing.assert_allclose(ax.get_lines()[i].get_xdata(), run["time"] / 60)
    for left, right in axes:
        assert left.get_ylim() == right.get_ylim()
        assert [line.get_color() for line in left.get_lines()] == [line.get_color() for line in right.get_lines()]
        assert left.get_lines()[0].get_color() != left.get_lines()[1].get_color()


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0.0, "seconds"), (100, "seconds"), (600, "minutes"), (3600 * 5, "hours")]
)
def test_the_unit_of_time_fits(tmp_path, seconds, unit):
    run = plot.read_run(make_run(tmp_path / "a", text=HEADER + row(1, seconds=seconds)))
    assert plot.draw({"a": run}).axes[5].get_xlabel() == f"training time ({unit})"


def test_few_points_have_markers_and_many_have_none(tmp_path):
    one, many = plot.read_run(make_run(tmp_path / "one", 1)), plot.read_run(make_run(tmp_path / "many", 90))
    for ax in plot.draw({"one": one, "many": many}).axes:
        assert ax.get_lines()[0].get_marker() == "o" and not ax.get_lines()[1].get_marker()


@pytest.mark.parametrize(("runs", "length"), [(1, 250), (5, 20), (5, 60), (28, 4), (28, 250)])
def test_the_legend_is_inside_the_image_and_above_the_curves(tmp_path, runs, length):
    run = plot.read_run(make_run(tmp_path / "a"))
    names = [f"{i:02d}" + "m" * (length - 2) for i in range(runs)]
    figure = plot.draw(dict.fromkeys(names, run), title="What was compared, and with which learning rate. " * 5)
    figure.canvas.draw()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
    assert all(ax.get_tightbbox().y1 <= box.y0 and ax.get_window_extent().height > 300 for ax in figure.axes)
    assert [text.replace("\n", "") for text in legend_texts(figure)] == names
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].get_lines()}
    assert len(looks) == runs


# ---------------------------------------------------------------------------------------------------------------------
# Reading and naming.


def test_time_is_the_sum_of_the_epochs_seconds(tmp_path):
    folder = make_run(tmp_path / "a", text=HEADER + row(1, seconds=3) + row(2, seconds=0.5) + row(3, seconds=10))
    run = plot.read_run(folder)
    np.testing.assert_allclose(run["time"], [3, 3.5, 13.5])
    np.testing.assert_array_equal(run["epoch"], [1, 2, 3])
    assert all(curve.shape == (3,) and curve.dtype == np.float64 for curve in run.values())


def test_columns_go_by_name(tmp_path):
    text = "note,seconds,flip_ratio,test_acc,train_loss,epoch\nwarm,4,nan,0.25,2.5,1\n"
    run = plot.read_run(make_run(tmp_path / "a", text=text))
    assert (run["train_loss"][0], run["test_acc"][0], run["time"][0]) == (2.5, 0.25, 4)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [Path(make_run(tmp_path / name)) for name in ("a/ste", "b/ste", "b/fsg", "a/x/ste", "b/x/ste")]
    labels = plot.label_runs(folders)
    assert labels[1:3] == [os.path.join("b", "ste"), "fsg"]
    assert labels[3:] == [os.path.join(*name) for name in (("a", "x", "ste"), ("b", "x", "ste"))]
    assert len(set(labels)) == 5
    figure = plot.draw({label: plot.read_run(folder) for label, folder in zip(labels, folders, strict=True)})
    assert legend_texts(figure) == labels


def test_names_that_mean_something_to_matplotlib_are_shown_as_they_are(tmp_path):
    names = ["_hidden", "$a$", r"$\frac$", "x_{1}"]
    folders = [Path(make_run(tmp_path / name.replace("\\", ""))) for name in names]
    assert plot.main([str(folder) for folder in folders]) == 0
    runs = {name: plot.read_run(folder) for name, folder in zip(names, folders, strict=True)}
    figure = plot.draw(runs, title="$")
    figure.canvas.draw()
    assert legend_texts(figure) == names


def test_names_that_no_font_can_show(tmp_path):
    columns = {"flips/a": [0.1] * 3, "plus/a": [0.5] * 3}
    run = plot.read_run(add_columns(make_run(tmp_path / "a"), **columns))
    figure = plot.draw({"caf\udce9": run}, title="\udce9")  # of a folder's name that is not UTF-8
    assert legend_texts(figure) == ["caf?"]
    assert plot.draw_layers({"caf\udce9": run}, title="\udce9").axes[0].get_title() == "caf?"


def test_a_run_given_twice_is_drawn_once(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    assert plot.main([run, "--out", str(tmp_path / "once.png")]) == 0
    assert plot.main([run, run + os.sep, str(tmp_path / "." / "a"), "--out", str(tmp_path / "thrice.png")]) == 0
    assert (tmp_path / "once.png").read_bytes() == (tmp_path / "thrice.png").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 1, no traceback.


def test_no_such_run(tmp_path, capsys):
    good = make_run(tmp_path / "good")
    check_error(capsys, [good, tmp_path / "nope"], tmp_path / "nope", "runs/NAME")
    check_error(capsys, [Path(good) / "metric.csv"], "no run", "CSV file")
    assert not (tmp_path / "curves.png").exists()


def test_no_metrics(tmp_path, capsys):
    make_run(tmp_path / "runs" / "A")
    check_error(capsys, [tmp_path / "runs"], "no metrics.csv", "runs/NAME")


def test_no_epoch_yet(tmp_path, capsys):
    check_error(capsys, [make_run(tmp_path / "a", 0)], "no epoch yet", "leave it out")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "without the columns epoch"),
        ("\n\n", "without the columns"),
        ("epoch,train_loss,test_acc,flip_ratio\n1,2,0.5,0.1\n", "without the column seconds"),
        (HEADER + row(1) + "2,20,1.4,0.4", "line 3 has not as many fields"),
        (HEADER + row(1).strip() + ",7\n", "line 2 has not as many fields"),
        (HEADER + row(1) + row(2).replace("0.02", "0.0x"), "line 3 has a field that is not a number"),
        (HEADER + row(1) + HEADER + row(2), "line 3"),
        (HEADER + row(1) + row(2) + row(1), "order"),
        (HEADER + row(1) + row(2, seconds=-3), "seconds"),
        (HEADER + row(1) + row(2, seconds="nan"), "seconds"),
        (HEADER + "\0" * 500, "line 2"),
        (HEADER + '"' + "x" * 200_000, "field"),
    ],
)
def test_damaged_metrics(tmp_path, capsys, text, reason):
    check_error(capsys, [make_run(tmp_path / "a", text=text)], tmp_path / "a", "is damaged", reason, "--resume")


def test_metrics_that_are_no_text(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.csv").write_bytes(bytes(range(256)) * 20)
    check_error(capsys, [run], "is damaged", "not a text file")


@pytest.mark.parametrize("name", ["r" * 300, f"{'r' * 300}/metrics.csv"])
def test_names_that_are_too_long(tmp_path, capsys, name):
    check_error(capsys, [tmp_path / name], "there is no run", "runs/NAME")
    check_error(capsys, [make_run(tmp_path / "a"), "--out", tmp_path / f"{name}.png"], "cannot be written", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("loss", [1e308, 1.7e308])
def test_values_that_cannot_be_drawn(tmp_path, capsys, loss):
    run = make_run(tmp_path / "a", text=HEADER + row(1, loss=loss))
    check_error(capsys, [run, "--out", tmp_path / "a.pgf"], "unknown format", ".png", ".pdf", ".jpg")
    check_error(capsys, [run], "values in the runs cannot be drawn", "leave out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("suffix", [*plot.FORMATS, ".PNG"])
def test_every_format_is_written_and_is_not_taken_for_a_run(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(plot, "draw", lambda *args: plot.new_figure(1, 1))
    run, file = make_run(tmp_path / "a"), tmp_path / f"a{suffix}"
    assert plot.main([run, "--out", str(file)]) == 0 and file.stat().st_size > 100
    assert suffix == ".PNG" or plot.main([run, str(file)]) == 0


def test_output_that_cannot_be_written(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    check_error(capsys, [run, "--out", tmp_path / "nope" / "c.png"], "cannot be written", "--out")
    check_error(capsys, [run, "--out", tmp_path / "a" / "metrics.csv" / "c.png"], "cannot be written", "--out")
    check_error(capsys, [run, "--out", tmp_path / "a" / "metrics.csv"], "unknown format", ".png")
    check_error(capsys, [run, "--out", tmp_path / "c"], "unknown format", ".png")
    assert plot.main([run]) == 0  # and the run is as it was


def test_a_full_disk_keeps_the_old_figure(tmp_path):
    run, out = make_run(tmp_path / "a"), tmp_path / "figures" / "c.png"
    out.parent.mkdir()
    code = """
import resource, sys, plot
save = plot.save

def save_to_full_disk(*args):  # the kernel refuses to let files grow past a limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    save(*args)

plot.save = save_to_full_disk
sys.exit(plot.main(sys.argv[1:]))
"""
    argv = [sys.executable, "-c", code, run, "--out", str(out)]

    def check_fails():
        result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 1 and result.stderr.startswith(f"error: {out} cannot be written (")

    check_fails()
    assert list(out.parent.iterdir()) == []
    assert plot.main([run, "--out", str(out)]) == 0
    old = out.read_bytes()
    check_fails()
    assert list(out.parent.iterdir()) == [out] and out.read_bytes() == old


def test_more_runs_than_can_be_told_apart(tmp_path, capsys):
    check_error(capsys, [make_run(tmp_path / f"r{i}", 1) for i in range(29)], "29 runs", "at most 28")


def test_as_a_command(tmp_path):
    """Alone in a folder, without the rest of the repository: a figure, and one sentence for each error."""
    shutil.copy(ROOT / "plot.py", tmp_path)
    make_run(tmp_path / "runs" / "A")
    make_run(tmp_path / "runs" / "B", text=HEADER + "1,2\n")
    here = dict(cwd=tmp_path, script=tmp_path / "plot.py")
    good = command("runs/A", **here, PYTHONPATH="")
    assert (good.returncode, good.stdout.strip(), good.stderr) == (0, os.path.join("runs", "curves.png"), "")
    check_png(tmp_path / "runs" / "curves.png")
    for argv in (["runs/nope"], ["runs/A", "runs/B"], ["runs/A", "--out", "nope/c.png"]):
        bad = command(*argv, **here)
        assert bad.returncode == 1 and bad.stdout == ""
        assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    assert command(**here).returncode == 2  # no run at all: argparse's usage


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, ASCII])
def test_a_terminal_without_some_characters_shows_question_marks(tmp_path, env):
    good = command("--table", make_run(tmp_path / "a"), **env)
    assert (good.returncode, good.stderr) == (0, "") and "| ? |" in good.stdout
    bad = command("--table", str(tmp_path / "–"), **env)
    assert bad.returncode == 1 and bad.stderr.startswith("error: there is no run ") and bad.stderr.count("\n") == 1
    shown = command("--help", **env)
    assert (shown.returncode, shown.stderr) == (0, "") and "mean ? standard deviation" in shown.stdout


def test_standard_output_that_cannot_be_written(tmp_path):
    script = [sys.executable, str(ROOT / "plot.py"), "--table", make_run(tmp_path / "a")]
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(script, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (1, "")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            bad = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True)
            other = subprocess.run([*script, "nope"], stdout=full, stderr=subprocess.PIPE, text=True)
        assert bad.returncode == other.returncode == 1 and bad.stderr.count("\n") == other.stderr.count("\n") == 1
        assert bad.stderr.startswith("error: standard output cannot be written (")
        assert other.stderr.startswith("error: there is no run nope")


def test_without_matplotlib(tmp_path):
    run = make_run(tmp_path / "runs" / "A")
    (tmp_path / "path" / "matplotlib").mkdir(parents=True)  # comes before the real one, and cannot be imported
    (tmp_path / "path" / "matplotlib" / "__init__.py").write_text("raise ImportError('not installed')\n")
    bad = command(run, PYTHONPATH=str(tmp_path / "path"))
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr.startswith("error: ") and "pip install matplotlib" in bad.stderr and bad.stderr.count("\n") == 1


def test_starts_fast(tmp_path):
    """Neither torch nor any other file of the repository is loaded, and matplotlib only to draw."""
    code = (
        "import sys, plot; assert plot.main(['nope']) == 1; assert 'matplotlib' not in sys.modules\n"
        f"assert plot.main([{make_run(tmp_path / 'A')!r}]) == 0\n"
        "names = ('torch', 'matplotlib.pyplot', 'runs', 'models', 'data', 'quantizers', 'hypernet')\n"
        "assert not [name for name in names if name in sys.modules]\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds.


def make_seeds(folder: Path, name: str, accuracies: list[list[float]], **flags) -> list[str]:
    """Runs name-seed0, name-seed1, … with these test accuracies."""
    folders = []
    for seed, accs in enumerate(accuracies):
        text = HEADER + "".join(row(e, 2 / e + seed, acc) for e, acc in enumerate(accs, 1))
        folders.append(make_run(folder / f"{name}-seed{seed}", text=text))
        named = {"seed": seed, "name": f"{name}-seed{seed}", "lr": 0.1, **flags}
        (Path(folders[-1]) / "args.json").write_text(json.dumps(named))
    return folders


def test_the_table_gives_mean_and_standard_deviation_over_seeds(tmp_path, capsys):
    many = make_seeds(tmp_path, "ste", [[0.2 + i / 100 for i in range(12)], [0.3 + i / 100 for i in range(13)]])
    one = make_seeds(tmp_path, "other", [[0.5, 0.7, 0.6]], lr=0.2)
    (tmp_path / "curves.png").write_text("")
    assert plot.main(["--table", *many, *one, str(tmp_path / "curves.png")]) == 0
    head, line, *rows = capsys.readouterr().out.partition("\n\n")[0].split("\n")
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in (head, line, *rows)]
    assert len({len(c) for c in cells}) == 1 and set(cells[1]) == {"---"}
    assert cells[0][3:5] == ["test acc. %, last epoch", "training loss, last epoch"]
    # 12 epochs in both: the last are 31 and 41; 10/√2 = 7.07
    assert cells[2][:5] == ["ste", "2", "12", "36.00 ± 7.07", "0.6667 ± 0.7071"]
    assert cells[3][:4] == ["other", "1", "3", "60.00"]


@pytest.mark.parametrize("flags", [{"lr": 0.2}, {"arch": "resnet8"}])
def test_only_the_seed_may_differ_within_a_group(tmp_path, flags):
    a, b = make_seeds(tmp_path, "a", [[0.5], [0.5]]), make_seeds(tmp_path, "b", [[0.5], [0.5]], **flags)
    folders = [Path(folder) for folder in (*a, *b)]
    assert plot.group_runs(folders) == [[0, 1], [2, 3]]
    (folders[1] / "args.json").write_text("damaged")
    assert plot.group_runs(folders) == [[0], [1], [2, 3]]
    shutil.copy(folders[2] / "args.json", folders[3] / "args.json")
    assert plot.group_runs(folders) == [[0], [1], [2], [3]], "a seed run twice says nothing of the spread"


def test_a_group_is_drawn_as_its_mean_with_a_band(tmp_path, capsys):
    folders = make_seeds(tmp_path, "ste", [[0.2, 0.4, 0.6], [0.4, 0.8]]) + make_seeds(tmp_path, "b", [[0.5]], lr=0.2)
    runs = [plot.read_run(folder) for folder in folders]
    mean = plot.average(runs[:2])
    assert np.allclose(mean["test_acc"], [0.3, 0.6]) and np.allclose(mean["test_acc_sd"], [0.1 * 2**0.5, 0.2 * 2**0.5])
    axes = plot.draw({"two": mean, "one": plot.average(runs[2:])}).axes
    for ax in axes[2:4]:
        (band,) = ax.collections
        top = band.get_paths()[0].vertices[:, 1].max()
        assert np.isclose(top, 60 + 20 * 2**0.5)
    assert (axes[0].collections[0].get_paths()[0].vertices[:, 1] > 0).all()
    assert plot.main(folders) == 0
    check_png(tmp_path / "curves.png")


def test_groups_whose_runs_are_named_alike(tmp_path, capsys):
    a, b = make_seeds(tmp_path / "a", "run", [[0.5], [0.6]]), make_seeds(tmp_path / "b", "run", [[0.5], [0.6]], lr=1)
    assert plot.main(["--table", a[0], b[0], a[1], b[1]]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == ["a/run", "b/run"]
    assert plot.label_group(["x1", "y2"]) == "x1"
    assert plot.label_group(["ste-seed1", "ste-seed10", "ste-seed11"]) == "ste"
    assert plot.label_group(["ours-1", "ours-2"]) == "ours"


def test_a_group_and_a_run_of_its_name_are_both_shown(tmp_path, capsys):
    folders = make_seeds(tmp_path, "ste", [[0.5], [0.6]])
    assert plot.main(["--table", *folders, make_run(tmp_path / "ste")]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
    assert rows == ["ste-seed0", "ste"]


def make_sweep(folder: Path, *runs: dict) -> list[str]:
    """Runs ste-seed0, ste-seed0-2, ste-seed0-3, … with these flags, as the trainers name them."""
    folders = []
    for i, flags in enumerate(runs, 1):
        (made,) = make_seeds(folder / "new", "ste", [[i / 10]], **flags)
        name = f"ste-seed{flags.get('seed', 0)}"
        number = 1 + len(list(folder.glob(f"{name}*")))
        folders.append(str(Path(made).rename(folder / (f"{name}-{number}" if number > 1 else name))))
    return folders


def labels(capsys, *argv) -> list[str]:
    return [row["run"] for row in table(capsys, *argv)]


def test_groups_of_one_name_are_told_apart_by_their_flags(tmp_path, capsys):
    sweep = [{"lr": 0.01, "workers": 2}, {"lr": 0.3, "device": "cpu"}, {"lr": 0.01, "seed": 1}, {"lr": 0.3, "seed": 1}]
    folders = make_sweep(tmp_path, *sweep)
    assert [Path(folder).name for folder in folders] == ["ste-seed0", "ste-seed0-2", "ste-seed1", "ste-seed1-2"]
    rows = table(capsys, *folders)
    assert [(row["run"], row["seeds"]) for row in rows] == [("ste lr 1e-2", "2"), ("ste lr 0.3", "2")]
    assert labels(capsys, *folders[1:]) == ["ste lr 0.3", "ste lr 1e-2"]
    assert labels(capsys, folders[1]) == labels(capsys, folders[1], folders[3]) == ["ste"]
    other = make_seeds(tmp_path, "fsg", [[0.5]], lr=0.3, hgs="mamba")
    assert labels(capsys, *folders, *other) == ["ste lr 1e-2", "ste lr 0.3", "fsg"]


def test_flags_of_any_type_tell_groups_apart(tmp_path, capsys):
    runs = (
        {"betas": [0.9, 0.97], "no_crop": True, "clip": None},
        {"betas": [0.9, 0.999], "no_crop": False, "clip": 1e-5},
    )
    expected = ["ste betas 0.9 0.97 no-crop True clip None", "ste betas 0.9 0.999 no-crop False clip 1e-5"]
    assert labels(capsys, *make_sweep(tmp_path, *runs)) == expected


def test_runs_that_nothing_but_their_folder_tells_apart(tmp_path, capsys):
    folders = make_sweep(tmp_path, {}, {}, {"lr": 0.3}, {"extra": 1})
    assert labels(capsys, *folders[:2]) == ["ste-seed0", "ste-seed0-2"], "a seed run twice"
    expected = ["ste-seed0 lr 0.1", "ste-seed0-2 lr 0.1", "ste lr 0.3"]
    assert labels(capsys, *folders[:3]) == expected
    assert labels(capsys, folders[0], folders[3]) == ["ste-seed0", "ste-seed0-4"], "no flag that both have"
    other = make_seeds(tmp_path, "ste-seed0", [[0.5], [0.5]], lr=0.5)[1]
    assert labels(capsys, *folders[:2], other) == ["ste-seed0", "ste-seed0-2", "ste-seed0-seed1"]


def test_the_legend_has_the_labels_of_the_table(tmp_path, monkeypatch):
    drawn = []
    draw = plot.draw
    monkeypatch.setattr(plot, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    assert plot.main(make_sweep(tmp_path, {"lr": 0.01}, {"lr": 0.3}, {"lr": 0.3, "seed": 1})) == 0
    assert legend_texts(drawn[0]) == ["ste lr 1e-2", "ste lr 0.3, 2 seeds"]


def test_a_baseline_goes_by_its_label_or_a_part_of_it_or_a_run_folder(tmp_path, capsys, monkeypatch):
    folders = make_sweep(tmp_path / "runs", {"lr": 0.01}, {"lr": 0.3}, {"lr": 0.01, "seed": 1}, {"lr": 0.3, "seed": 1})
    monkeypatch.chdir(tmp_path)
    for name in ("ste lr 0.3", "0.3", "ste-seed0-2", "ste-seed1-2", "runs/ste-seed0-2/", folders[3]):
        row = table(capsys, *folders, "--baseline", name)[0]
        assert row["difference to ste lr 0.3, last epoch (seeds)"] == "-10.00 ± 0.00 (2)", name
    for name in ("ste lr", "ste"):
        check_error(capsys, ["--table", *folders, "--baseline", name], "more than one row", "ste lr 1e-2, ste lr 0.3")
    short = make_seeds(tmp_path, "lr", [[0.5]])
    assert "difference to lr, last epoch (seeds)" in table(capsys, *folders, *short, "--baseline", "lr")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Confidence intervals and paired differences.


def table(capsys, *argv) -> list[dict[str, str]]:
    """The rows of `plot.py --table`, {column: cell}."""
    assert plot.main(["--table", *map(str, argv)]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    head, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (31, 2.0423)])
def test_the_confidence_interval_is_students(n, t):
    values = np.random.default_rng(n).normal(size=n)
    assert plot.half_width(list(values)) == pytest.approx(t * values.std(ddof=1) / n**0.5, rel=1e-4)


def test_the_table_gives_95_percent_intervals_and_differences_paired_by_seed(tmp_path, capsys):
    ste = make_seeds(tmp_path, "ste", [[0.60], [0.70], [0.80]])
    ours = make_seeds(tmp_path, "ours", [[0.61], [0.73], [0.82], [0.9]], lr=0.2)  # seed 3 has no partner
    alone = make_run(tmp_path / "alone")
    rows = table(capsys, *ste, *ours, alone, "--baseline", "ste")
    assert [row["run"] for row in rows] == ["ste", "ours", "alone"]
    differences = [row["difference to ste, last epoch (seeds)"] for row in rows]
    assert differences == ["–", "+2.00 ± 2.48 (3)", "–"]  # 4.303 · 1 / √3
    assert rows[0]["95 % interval, last epoch"] == "45.16 to 94.84"  # 70 ± 4.303 · 10 / √3
    assert rows[2]["95 % interval, last epoch"] == "–"
    (row,) = [r for r in table(capsys, ste[0], ours[0], "--baseline", "ste") if r["run"] == "ours"]
    assert row["difference to ste, last epoch (seeds)"] == "+1.00 (1)"


def test_intervals_and_differences_are_of_the_last_epoch_without_validation(tmp_path, capsys):
    slow = make_seeds(tmp_path, "slow", [[0.1, 0.2, 0.80], [0.1, 0.2, 0.82]])  # behind at first, and ahead at the end
    fast = make_seeds(tmp_path, "fast", [[0.6, 0.7, 0.78], [0.6, 0.7, 0.78]], lr=0.2)
    add_columns(slow[0], val_acc=[0.5, 0.4, 0.3])  # one run's choice of an epoch does not count
    first = table(capsys, *slow, *fast, "--baseline", "fast")[0]
    assert first["test acc. %, last epoch"] == "81.00 ± 1.41"
    assert first["95 % interval, last epoch"] == "68.29 to 93.71"  # 81 ± 12.706 · √2 / √2
    assert first["difference to fast, last epoch (seeds)"] == "+3.00 ± 12.71 (2)"
    assert first["test acc. %, epoch of best validation"] == "–"


def test_intervals_and_differences_are_of_the_epoch_that_validation_chooses(tmp_path, capsys):
    a = make_seeds(tmp_path, "a", [[0.5, 0.80, 0.1], [0.82, 0.5, 0.9]])
    b = make_seeds(tmp_path, "b", [[0.5, 0.6, 0.78], [0.78, 0.6, 0.5]], lr=0.2)
    for run, val_acc in zip((*a, *b), ([1, 3, 2], [3, 1, 2], [1, 2, 3], [3, 3, 1]), strict=True):
        add_columns(run, val_acc=val_acc, test_acc_bn=[0.1, 0.2, 0.3])
    row = table(capsys, *a, *b, "--baseline", "b")[0]
    assert row["test acc. %, last epoch"] == "50.00 ± 56.57"
    assert row["test acc. %, epoch of best validation"] == "81.00 ± 1.41"
    assert row["95 % interval, epoch of best validation"] == "68.29 to 93.71"
    assert row["difference to b, epoch of best validation (seeds)"] == "+3.00 ± 12.71 (2)"
    assert row["BatchNorm re-estimated %, epoch of best validation"] == "15.00 ± 7.07"


def test_a_difference_is_taken_at_the_same_epoch(tmp_path, capsys):
    long, short = make_seeds(tmp_path, "long", [[0.5] * 10 + [0.9] * 10]), make_seeds(tmp_path, "s", [[0.4] * 10], lr=1)
    rows = table(capsys, *long, *short, "--baseline", "s")
    assert rows[0]["difference to s, last epoch (seeds)"] == "+10.00 (1)"


def test_a_baseline_that_is_no_row(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    check_error(capsys, ["--table", run, "--baseline", "b"], "--baseline b", "one of a")
    check_error(capsys, [run, "--baseline", "a"], "--table")


def test_the_table_says_what_makes_rows_incomparable(tmp_path, capsys):
    data = {"dataset": "cifar10", "data_dir": "data", "arch": "resnet20"}
    a = make_seeds(tmp_path, "a", [[0.5, 0.6]] * 2, **data, grad="ste")
    b = make_seeds(tmp_path, "b", [[0.5, 0.6]] * 2, **data | {"data_dir": "elsewhere"}, grad="gate")

    def said(*argv):
        assert plot.main(["--table", *map(str, argv)]) == 0
        return capsys.readouterr().out.partition("\n\n")[2].strip()

    assert said(*a, *b) == "", "other methods, and other folders of the same downloaded images"
    (tmp_path / "paper.csv").write_text(WRITTEN_BY_HAND)
    assert said(*a, tmp_path / "paper.csv") == "", "what a CSV file is of is not known"
    short = make_seeds(tmp_path, "short", [[0.5]], **data)
    assert said(*a, *b, *short) == "Not a comparison of methods alone: the rows differ in epochs (2: a, b; 1: short)."
    other = make_seeds(tmp_path, "other", [[0.5, 0.6]], **data | {"dataset": "digits", "arch": "resnet8"})
    text = said(*a, *other, "--baseline", "a")
    assert "dataset (cifar10: a; digits: other), arch (resnet20: a; resnet8: other)" in text
    folders = [
        make_seeds(tmp_path / x, x, [[0.5]], **data | {"dataset": "folder", "data_dir": x})[0] for x in ("cats", "dogs")
    ]
    assert "data_dir (cats: cats; dogs: dogs)" in said(*folders)
    none, some = (make_seeds(tmp_path, f"val{n}", [[0.5, 0.6]], **data, val=n) for n in (0, 5000))
    assert "val (0: val0; 5000: val5000)" in said(*none, *some)


# ---------------------------------------------------------------------------------------------------------------------
# CSV files and unfinished runs.

WRITTEN_BY_HAND = "epoch, seconds, train_loss, test_acc, flip_ratio\n1, 60, 1.5, 0.5, 0.1\n2, 60, 1.0, 0.75, nan\n"


def test_a_csv_file_with_the_documented_columns_is_a_run(tmp_path, capsys):
    file, run = tmp_path / "paper.csv", make_run(tmp_path / "ours")
    file.write_text(WRITTEN_BY_HAND)
    (row,) = [row for row in table(capsys, file, run) if row["run"] == "paper"]
    assert (row["epochs"], row["test acc. %, last epoch"], row["hours"]) == ("2", "75.00", "0.03")
    assert plot.main([str(file), run]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    file.write_text(WRITTEN_BY_HAND.replace("0.75", "75 %"))
    check_error(capsys, [file], "paper.csv is damaged", "line 3", "correct the file")


def test_a_runs_metrics_file_stands_for_the_run(tmp_path, capsys):
    run = make_run(tmp_path / "ours")
    rows = table(capsys, Path(run) / "metrics.csv", run)
    assert [row["run"] for row in rows] == ["ours"]


def test_a_run_without_an_epoch_is_left_out_with_a_note(tmp_path, capsys):
    for argv in ([], ["--table"]):
        made = make_run(tmp_path / f"a{len(argv)}"), make_run(tmp_path / f"b{len(argv)}", 0)
        assert plot.main([*made, *argv]) == 0
        said = capsys.readouterr().err
        assert said.startswith("note: ") and made[1] in said and "no epoch yet" in said and said.count("\n") == 1


def test_the_table_leaves_out_unfinished_runs_with_a_note(tmp_path, capsys):
    done = make_seeds(tmp_path, "done", [[0.5, 0.6]], epochs=2, limit_steps=None)
    running = make_seeds(tmp_path, "running", [[0.5, 0.6]], epochs=3, limit_steps=None)
    limited = make_seeds(tmp_path, "limited", [[0.5, 0.6]], epochs=3, limit_steps=20)  # its last row is of step 20
    assert plot.main(["--table", *done, *running, *limited]) == 0
    said = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in said.out.splitlines()[2:]] == ["done", "limited"]
    assert "running-seed0 is not finished (2 of 3 epochs)" in said.err and said.err.count("\n") == 1
    check_error(capsys, ["--table", *running], "2 of 3 epochs", "resume it")
    assert plot.main(running) == 0, "the figure shows a run that still trains"


@pytest.mark.parametrize("limit_steps", ["6", {}, [6], True, 10**400, 0, -1, 6.5])
def test_flags_of_other_types_do_not_finish_a_run(tmp_path, capsys, limit_steps):
    running = make_seeds(tmp_path, "running", [[0.5, 0.6]], epochs=9, limit_steps=limit_steps)
    check_error(capsys, ["--table", *running], "2 of 9 epochs")


@pytest.mark.parametrize("epochs", ["9", {}, [9], True, 10**400, -1, None])
def test_epochs_of_other_types_are_not_used(tmp_path, capsys, epochs):
    assert labels(capsys, *make_seeds(tmp_path, "run", [[0.5, 0.6]], epochs=epochs, limit_steps=6)) == ["run"]


@pytest.mark.parametrize("depth", [600, 100_000])
def test_flags_that_are_nested_deeply(tmp_path, capsys, depth):
    folders = make_sweep(tmp_path, {"lr": 0.1}, {"lr": 0.3})
    (Path(folders[1]) / "args.json").write_text(f'{{"seed": 0, "lr": {"[" * depth}{"]" * depth}}}')
    assert len(labels(capsys, *folders)) == 2


def test_what_files_contain_cannot_act_on_the_terminal(tmp_path, capsys):
    evil = "\x1b[31m\r\n\u202e\x9b"
    folders = make_sweep(tmp_path, {"lr": "a", "arch": "b"}, {"lr": evil, "arch": evil, evil: evil})
    folders.append(make_seeds(tmp_path, evil, [[0.5]], epochs=3)[0])
    for argv, code in ((folders, 0), ([*folders, "--baseline", "c"], 1)):
        assert plot.main(["--table", *argv]) == code
        output = capsys.readouterr()
        lines = (output.out + output.err).split("\n")
        assert all(line.isprintable() for line in lines) and "?[31m????" in "".join(lines)
        assert output.err.count("\n") == 1 + code and len(output.out.splitlines()) == (0 if code else 6)


# ---------------------------------------------------------------------------------------------------------------------
# Further columns.


def add_columns(folder: str, **columns: list) -> str:
    """Append columns to a run's metrics.csv."""
    file = Path(folder) / "metrics.csv"
    lines = [
        line + "".join(f",{values[i]}" for values in ([name, *v] for name, v in columns.items()))
        for i, line in enumerate(file.read_text().splitlines())
    ]
    file.write_text("\n".join(lines) + "\n")
    return folder


def test_validation_selects_and_reestimated_batchnorm_has_a_column(tmp_path, capsys):
    a = make_seeds(tmp_path, "a", [[0.5, 0.9, 0.7]])[0]
    add_columns(a, val_loss=[2, 1, 0.5], val_acc=[0.4, 0.5, 0.6], test_acc_bn=[0.6, 0.9, 0.75])
    b = make_run(tmp_path / "b")
    rows = table(capsys, a, b)
    chosen, reestimated = "test acc. %, epoch of best validation", "BatchNorm re-estimated %, last epoch"
    assert rows[0][chosen] == "70.00" and rows[0][reestimated] == "75.00"
    assert rows[1][chosen] == rows[1][reestimated] == "–"
    assert chosen not in table(capsys, b)[0]
    figure = plot.draw({"b": plot.read_run(b), "a": plot.read_run(a)})
    loss, acc, flips = (figure.axes[i].get_lines() for i in (0, 2, 4))
    assert (len(loss), len(acc), len(flips)) == (3, 4, 2)
    np.testing.assert_allclose(loss[2].get_ydata(), [2, 1, 0.5])
    np.testing.assert_allclose([line.get_ydata() for line in acc[2:]], [[40, 50, 60], [60, 90, 75]])
    assert {line.get_color() for line in (loss[2], *acc[2:])} == {acc[1].get_color()} != {acc[0].get_color()}
    assert legend_texts(figure) == ["b", "a"]
    assert "validation" in figure.axes[2].get_title("left") and "BatchNorm" in figure.axes[2].get_title("right")


def test_an_empty_field_of_a_further_column_is_a_gap(tmp_path):
    a = add_columns(make_run(tmp_path / "a"), val_acc=["", 0.5, 0.6])
    np.testing.assert_array_equal(plot.read_run(a)["val_acc"], [np.nan, 0.5, 0.6])
    assert plot.main([a]) == 0


def test_the_left_column_can_be_by_step(tmp_path, capsys):
    run = plot.read_run(make_run(tmp_path / "a"))
    axes = plot.draw({"a": run}, x="step").axes
    assert axes[4].get_xlabel() == "step"
    np.testing.assert_array_equal(axes[0].get_lines()[0].get_xdata(), [10, 20, 30])
    (tmp_path / "paper.csv").write_text(WRITTEN_BY_HAND)
    check_error(capsys, [tmp_path / "paper.csv", "--x", "step"], "paper has no column step", "--x")
    check_error(capsys, [tmp_path / "paper.csv", "--x", "step", "--table"], "--x is for the curves")


def test_heat_maps_of_the_layers(tmp_path, capsys):
    columns = {"flips/conv1": [0.2, 0.1, ""], "plus/conv1": [0.5, 0.5, 0.4], "flips/layer1.0.conv_$2": [0.4, 0.2, 0.1]}
    columns["plus/layer1.0.conv_$2"] = [0.5, 0.6, 0.7]
    a, b = (add_columns(make_run(tmp_path / name), **columns) for name in "ab")
    assert plot.main(["--layers", a, b]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "layers.png")
    assert all(1000 <= pixels <= 4000 for pixels in png_size(tmp_path / "layers.png"))
    figure = plot.draw_layers({"a": plot.read_run(a), "b": plot.read_run(b)})
    flips, _, plus, _ = (ax.collections[0].get_array() for ax in figure.axes[:4])
    np.testing.assert_allclose(np.ma.filled(flips, np.nan), [[20, 10, np.nan], [40, 20, 10]])
    np.testing.assert_allclose(plus, [[50, 50, 40], [50, 60, 70]])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["conv1", "layer1.0.conv_$2"]
    top, bottom = figure.axes[0].get_ylim()[::-1]
    assert top < bottom, "the first layer is on top"


def test_heat_maps_of_a_deep_network_and_of_none(tmp_path, capsys):
    names = [f"layer{i}" for i in range(108)]
    deep = add_columns(
        make_run(tmp_path / "deep"), **{f"{kind}/{n}": [0.1] * 3 for n in names for kind in ("flips", "plus")}
    )
    assert plot.main(["--layers", deep]) == 0
    capsys.readouterr()
    assert all(1000 <= pixels <= 4000 for pixels in png_size(tmp_path / "layers.png"))
    check_error(capsys, ["--layers", make_run(tmp_path / "fp32")], "fp32 has no columns flips/LAYER", "--layers")
    check_error(capsys, ["--layers", *(make_run(tmp_path / f"r{i}") for i in range(5))], "5 runs", "at most 4")


def test_runs_of_one_command_with_other_seeds_are_one_row(tmp_path):
    """As the trainers write them."""
    import train_bihalf

    argv = ["--dataset", "digits", "--arch", "resnet8", "--batch-size", "8", "--limit-steps", "1"]
    argv += ["--device", "cpu", "--out", str(tmp_path)]
    for name, *flags in (["a", "--seed", "0"], ["b", "--seed", "1"], ["c", "--seed", "0", "--lr", "0.5"]):
        assert train_bihalf.main([*argv, "--name", name, *flags]) == 0
    assert plot.group_runs([tmp_path / name for name in "abc"]) == [[0, 1], [2]]
