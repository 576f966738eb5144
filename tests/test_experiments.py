"""experiments.py with small grids: run, interrupted, resumed, failed."""

import csv
import io
import multiprocessing
import runpy
import sys
import threading
import time
from pathlib import Path

import pytest
from programs import Program

import experiments
import runs
import train_bihalf
import train_fsg
import train_proxconnect
import train_sibnn
from experiments import Search

SMALL = "--dataset digits --arch resnet8 --batch-size 60 --epochs 1 --val 60 --grad ste --device cpu"
TRAINERS = {
    f"train_{module.__name__.removeprefix('train_')}.py": module
    for module in (train_bihalf, train_fsg, train_proxconnect, train_sibnn)
}


def search(flags=SMALL, rates=("1e-3",), seeds=(0,)):
    return Search(f"train_fsg.py {flags}", rates, seeds)


def run(monkeypatch, tmp_path, grid, *flags):
    monkeypatch.setitem(experiments.GRIDS, "ablations", grid)
    argv = ["ablations", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "runs"), *flags]
    return experiments.main(argv)


@pytest.fixture
def in_this_process(monkeypatch):
    """Train in this process, one run at a time: new processes need seconds for their imports."""
    one = threading.Lock()

    def run(slots, command):
        try:
            with one:
                return TRAINERS[Path(command[1]).name].main(command[2:]), ""
        except runs.RunError as e:
            return 1, f"error: {e}"

    monkeypatch.setattr(experiments.Slots, "run", run)


def rows(tmp_path):
    with open(tmp_path / "results" / "ablations.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("name", experiments.GRIDS)
def test_every_grid_is_of_comparable_commands_that_the_trainers_take(name):
    grid = experiments.GRIDS[name]
    commands = [s.at(rate, seed) for s in grid for rate in s.rates or ("1e-3",) for seed in s.seeds]
    assert len(set(commands)) == len(commands) >= 3
    budgets = set()
    for command in commands:
        trainer, *flags = command.split()
        if trainer == "results/search.py":
            trainer, flags = "train_fsg.py", flags[1:]
        args = TRAINERS[trainer].flags().parse_args(flags)
        TRAINERS[trainer].complete(args)
        assert f"--seed {args.seed}" in command and args.val == (300 if name == "digits" else 5000)
        budgets.add((args.opt, args.batch_size, args.epochs, args.schedule, args.image_size))
    assert len(budgets) == 1
    assert all(s.like is None or s.like in experiments.PROTOCOL + experiments.W1A1 for s in grid)


def test_long_runs_take_their_rates_from_short_ones():
    command = lambda flags: flags
    short = search(rates=("1e-2", "1e-3"), seeds=(5, 6))
    long = Search("long", seeds=(1, 2), like=short)
    rows = {short.at(rate, 5): {"val_acc": "0.5"} for rate in short.rates}
    assert experiments.commands_of([long], rows, command) == [], "both rates are as good, and each needs two seeds"
    rows |= {short.at("1e-2", 6): {"val_acc": "0.51"}, short.at("1e-3", 6): {"val_acc": "0.52"}}
    assert experiments.result(short, rows, command) == "1e-3"
    assert experiments.commands_of([long], rows, command) == [long.at("1e-3", 1), long.at("1e-3", 2)]
    wider = short._replace(rates=("1e-2", "1e-3", "1e-1"))  # its best rate at the first seed is not the best on average
    rows |= {wider.at("1e-1", 5): {"val_acc": "0.9"}}
    assert experiments.result(wider, rows, command) is None
    rows |= {wider.at("1e-1", 6): {"val_acc": "nan"}}
    assert experiments.result(wider, rows, command) == "1e-3", "the other one diverged"
    rows |= {wider.at("1e-1", 6): {"val_acc": "0.1"}}
    assert experiments.result(wider, rows, command) == "1e-3"


def test_long_runs_wait_for_their_rates(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path, [Search(f"train_fsg.py {SMALL}", like=search(rates=("1", "2")))]) == 0
    assert "not run before the search for its learning rate is complete" in capsys.readouterr().out


def test_the_seeds_of_all_searches_are_run_in_turn():
    one, two = search("a", ("1",), (0, 1, 2)), search("b", ("2",), (0, 1))
    first = {one.at("1", 0): {"val_acc": "1"}, two.at("2", 0): {"val_acc": "1"}}
    commands = experiments.commands_of([one, two], first, lambda flags: flags)
    assert commands == [one.at("1", 0), two.at("2", 0), one.at("1", 1), two.at("2", 1), one.at("1", 2)]


def test_a_grid_is_run_and_not_run_again(tmp_path, monkeypatch, capsys, in_this_process):
    grid = [search(rates=("1e-9", "3e-3"), seeds=(0, 1)), search(f"{SMALL} --opt sgd --no-flip", ("1e30",))]
    assert run(monkeypatch, tmp_path, grid) == 0
    found = rows(tmp_path)
    wanted = ["--lr 1e-9 --seed 0", "--lr 3e-3 --seed 0", "--lr 3e-3 --seed 1", "--lr 1e30 --seed 0"]
    assert sorted(" ".join(row["command"].split()[-4:]) for row in found) == sorted(wanted)
    good = [row for row in found if "--lr 3e-3" in row["command"]]
    assert [row["seed"] for row in good] == ["0", "1"], "the runs of a command stand together"
    assert all(0.2 < float(row[column]) <= 1 for row in good for column in ("test_acc", "val_acc"))
    assert all(row["test_acc_bn"] == "nan" for row in good), "it was not measured"
    assert all(row["train_loss"] == "nan" for row in found if "1e30" in row["command"]), "diverged"
    lines = (tmp_path / "results" / "ablations.md").read_text().splitlines()
    assert len(lines) == 5 and f"| `python train_fsg.py {SMALL} --lr 3e-3` | 2 |" in "".join(lines)
    assert capsys.readouterr().out.splitlines()[-5:] == lines

    runs = tmp_path / "runs" / "ablations"
    times = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    more = [grid[0]._replace(seeds=(0, 1, 2)), grid[1]]
    assert run(monkeypatch, tmp_path, more, "--list") == 0
    listed = [line[:4] for line in capsys.readouterr().out.splitlines()]
    assert sorted(listed) == ["    "] + ["done"] * 4
    assert run(monkeypatch, tmp_path, more, "--list", "--only", "--opt sgd") == 0
    assert "--lr 1e30 --seed 0" in (one := capsys.readouterr().out) and len(one.splitlines()) == 1
    assert run(monkeypatch, tmp_path, more, "--only", "adamw") == 1 and "adamw" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path, more) == 0 and len(rows(tmp_path)) == 5
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (tmp_path / "results" / "ablations.csv").unlink()  # finished runs are read again, not run again
    assert run(monkeypatch, tmp_path, grid) == 0
    key = lambda row: row["command"]
    assert sorted(rows(tmp_path), key=key) == sorted(found, key=key)
    completed = [path for path in times if "1e30" not in str(path)]  # a run that diverged left nothing to read
    assert {path: path.stat().st_mtime_ns for path in completed} == {path: times[path] for path in completed}


def test_the_learning_rate_is_chosen_by_validation_accuracy():
    command = lambda flags: flags
    one = search(rates=("1e-2", "1e-3", "1e-4"), seeds=(5, 6))

    def row(rate, val_acc, test_acc):
        return {one.at(rate, 5): {"val_acc": val_acc, "test_acc": test_acc}}

    some = row("1e-2", "nan", "nan") | row("1e-3", "0.5", "0.9")
    assert experiments.best_rates(one, some, command) == [], "one has not been tried"
    assert experiments.commands_of([one], some, command) == [one.at(rate, 5) for rate in one.rates]
    every = some | row("1e-4", "0.7", "0.1")
    assert experiments.best_rates(one, every, command) == ["1e-4"]
    assert experiments.commands_of([one], every, command)[3:] == [one.at("1e-4", 6)]
    # One standard error of 0.5 on 60 images is 6.5 points.
    for other, are_close in (("0.56", True), ("0.57", False)):
        rates = experiments.best_rates(one, some | row("1e-4", other, "0.1"), command)
        assert rates == (["1e-3", "1e-4"] if are_close else ["1e-4"])


def test_without_validation_accuracies_it_is_said_that_no_rate_is_chosen(
    tmp_path, monkeypatch, capsys, in_this_process
):
    grid = [search(rates=("1e-2", "1e-3"), seeds=(0, 1))]
    assert run(monkeypatch, tmp_path, grid, "--", "--val", "0", "--limit-steps", "1") == 0
    assert "no run has a validation accuracy, so its other seeds are not run" in capsys.readouterr().out
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("flag", ["--seed", "--seed=3", "--lr", "--lr=1"])
def test_flags_that_the_grid_sets(tmp_path, monkeypatch, capsys, flag):
    assert run(monkeypatch, tmp_path, [search()], "--", flag, "3") == 1
    assert "the grid sets the seeds and the learning rates" in capsys.readouterr().err


def test_flags_for_all(tmp_path, monkeypatch, in_this_process):
    flags = "--arch resnet8 --epochs 1 --grad ste"
    assert run(monkeypatch, tmp_path, [search(flags)], "--", "--dataset", "digits", "--batch-size", "60") == 0
    whole = f"python train_fsg.py {flags} --lr 1e-3 --seed 0 --dataset digits --batch-size 60"
    assert rows(tmp_path)[0]["command"] == whole


def test_an_interrupted_grid_goes_on(tmp_path):
    code = f"""
import sys, experiments
experiments.GRIDS["ablations"] = [experiments.Search("train_fsg.py {SMALL} --epochs 8", ("1e-3",), (0,))]
sys.exit(experiments.main(["ablations", "--results", r"{tmp_path}/results", "--out", r"{tmp_path}/runs"]))
"""
    process = Program("-c", code)
    while not list(tmp_path.glob("runs/ablations/*/last.pt")):
        assert process.poll() is None, process.end().stderr
        time.sleep(0.05)
    process.terminate()
    ended = process.end(60)
    assert "stopped; repeat the command" in ended.stderr and ended.returncode == 130
    (last,) = tmp_path.glob("runs/ablations/*/last.pt")
    before = last.with_name("metrics.csv").read_text().splitlines()
    assert 1 < len(before) < 9 and not (tmp_path / "results").exists()
    process = Program("-c", code).end()
    after = last.with_name("metrics.csv").read_text().splitlines()
    assert process.returncode == 0 and len(after) == 9 and after[: len(before)] == before, "it was not begun again"
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    "flags, added, message",
    [
        (f"{SMALL} --beta 7 --grad fsg", [], "beta is the weight"),
        (SMALL, ["--jobs", "0"], "--jobs must be at least 1"),
        (SMALL, ["--", "--seed", "1"], "leave out --seed"),
        (f"{SMALL} --no-such-flag", [], "no-such-flag"),
    ],
)
def test_what_cannot_be_run(tmp_path, monkeypatch, capsys, flags, added, message):
    assert run(monkeypatch, tmp_path, [search(flags)], *added) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def result(command="a --seed 0", **values):
    return {"command": command, "seed": "0", **dict.fromkeys(experiments.COLUMNS[2:], "0.5"), **values}


def results_file(tmp_path, *found):
    file = tmp_path / "results" / "ablations.csv"
    file.parent.mkdir(exist_ok=True)
    lines = [experiments.COLUMNS, *(row.values() for row in found)]
    file.write_text("".join(",".join(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("command,seed\na,0\n"),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: file.write_bytes(file.read_bytes() + b"\xff"),
        lambda file: file.write_text(file.read_text() + "x" * 200_000),
        *(
            lambda file, damaged=damaged: results_file(file.parent.parent, result(), result("b --seed 0", **damaged))
            for damaged in (
                {"seed": "x"},
                {"seed": "0.5"},
                {"seed": ""},
                {"val_acc": "abc"},
                {"val_acc": ""},
                {"val_acc": "5"},
                {"val_acc": "-0.1"},
                {"val_acc": "inf"},
                {"train_loss": "abc"},
                {"seconds": ""},
            )
        ),
    ],
)
def test_damaged_results(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(experiments.Slots, "run", None)  # nothing is trained
    file = results_file(tmp_path, result())
    damage(file)
    before = file.is_file() and file.read_bytes()
    for flags in ([], ["--list"]):
        assert run(monkeypatch, tmp_path, [search()], *flags) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {file} is damaged or of another version") and error.count("\n") == 1
    assert (file.is_file() and file.read_bytes()) == before


def test_results_of_runs_that_diverged_are_not_damaged(tmp_path):
    row = result(**dict.fromkeys(experiments.COLUMNS[2:], "nan"))
    assert experiments.read_results(results_file(tmp_path, row)) == {row["command"]: row}


def test_the_rows_of_another_process_are_kept(tmp_path):
    file = results_file(tmp_path, result("b --seed 0"), result("c --seed 0"))
    ours = experiments.read_results(file)
    results_file(tmp_path, result("b --seed 0"), result("a --seed 0"), result("c --seed 0"))
    ours["d --seed 0"] = result("d --seed 0")
    ours["c --seed 0"] = result("c --seed 0", val_acc="0.7")
    experiments.write(file, ours)
    found = rows(tmp_path)
    assert [row["command"][0] for row in found] == ["b", "a", "c", "d"] and found[2]["val_acc"] == "0.7"
    assert experiments.read_results(file) == ours, "rows of other processes are not run again"
    assert len(file.with_suffix(".md").read_text().splitlines()) == 6


def write_rows(file, name):
    for command in (f"{name}{i} --seed 0" for i in range(20)):
        experiments.write(file, {command: result(command)})


@pytest.mark.skipif(experiments.fcntl is None, reason="there are no locks")
def test_processes_that_write_one_file_at_a_time(tmp_path):
    file = tmp_path / "results" / "ablations.csv"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_rows, args=(file, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3 and len(rows(tmp_path)) == 60


def run_as_script(monkeypatch, stdout, *argv):
    """Run experiments.py in this process. Returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", *argv])
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(experiments.__file__, run_name="__main__")
    return ended.value.code


def test_a_terminal_without_some_characters_shows_question_marks(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert run_as_script(monkeypatch, stdout, "--help") == 0
    assert b"mean ? standard deviation" in stdout.buffer.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_cannot_be_written(monkeypatch, tmp_path):
    with open("/dev/full", "w") as full:
        code = run_as_script(monkeypatch, full, "digits", "--list", "--results", str(tmp_path))
    assert code.startswith("error: standard output cannot be written (")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_grid_goes_on_when_its_terminal_is_closed(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "run_one", lambda command, *_: result(command))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(monkeypatch, tmp_path, [search(), search(f"{SMALL} --no-flip")]) == 0
    assert len(rows(tmp_path)) == 2


def test_the_others_run_where_some_fail(tmp_path, monkeypatch, capsys, in_this_process):
    wrong = f"{SMALL} --beta 7 --grad fsg"
    grid = [search(wrong), search(), search(f"{wrong} --no-flip")]
    assert run(monkeypatch, tmp_path, grid) == 1
    error = capsys.readouterr().err
    assert "beta is the weight" in error and error.endswith("; 1 more cannot\n")
    assert [row["command"] for row in rows(tmp_path)] == [f"python {search().at('1e-3', 0)}"]


def test_an_interrupted_run_of_search_starts_again(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(experiments.Slots, "run", lambda slots, command: (seen.append(command), (143, ""))[1])
    slots = experiments.Slots(1)
    for _ in range(2):
        with pytest.raises(experiments.Interrupted):
            experiments.run_one("python results/search.py frozen --lr 1e-3 --seed 0", tmp_path, slots)
        (tmp_path / seen[-1][seen[-1].index("--name") + 1]).mkdir()
        (tmp_path / seen[-1][seen[-1].index("--name") + 1] / "last.pt").touch()
    assert seen[0] == seen[1] and seen[0][2] == "frozen"


def test_commands_that_differ_only_early_have_runs_of_their_own(tmp_path, monkeypatch, in_this_process):
    long = f"{SMALL} --limit-steps 1 --milestones {' '.join(str(i) for i in range(30, 130))}"
    assert run(monkeypatch, tmp_path, [search(long), search(long.replace("resnet8", "lenet"))]) == 0
    assert len(list(tmp_path.glob("runs/ablations/*/args.json"))) == len(rows(tmp_path)) == 2
