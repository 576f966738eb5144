"""experiments.py with small grids: run, interrupted, resumed, failed."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import experiments
import train_fsg

SMALL = "--dataset digits --arch resnet8 --batch-size 60 --epochs 2 --grad ste --device cpu"
DIVERGES = "--opt sgd --lr 1e30 --no-flip"


def run(monkeypatch, tmp_path, commands, *flags):
    monkeypatch.setitem(experiments.GRIDS, "rates", commands)
    argv = ["rates", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "runs"), *flags]
    return experiments.main(argv)


def rows(tmp_path):
    with open(tmp_path / "results" / "rates.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_every_grid_is_of_commands_that_the_trainer_takes():
    for name, commands in experiments.GRIDS.items():
        assert len(set(commands)) == len(commands) >= 3, name
        for command in commands:
            args = train_fsg.flags().parse_args(command.split())
            train_fsg.complete(args)
            assert f"--seed {args.seed}" in command


def test_a_grid_is_run_and_not_run_again(tmp_path, monkeypatch, capsys):
    commands = [f"{SMALL} --seed {seed}" for seed in (0, 1)] + [f"{SMALL} {DIVERGES} --seed 0"]
    assert run(monkeypatch, tmp_path, commands) == 0
    found = rows(tmp_path)
    assert [row["command"] for row in found] == [f"python train_fsg.py {command}" for command in commands]
    assert [row["seed"] for row in found] == ["0", "1", "0"]
    assert all(0.2 < float(row["test_acc"]) <= float(row["best_test_acc"]) <= 1 for row in found[:2])
    assert found[2]["train_loss"] == "nan", "diverged"
    lines = (tmp_path / "results" / "rates.md").read_text().splitlines()
    assert len(lines) == 4 and f"| `python train_fsg.py {SMALL}` | 2 |" in lines[2] and lines[2].count("±") == 4
    assert capsys.readouterr().out.splitlines()[-4:] == lines

    runs = tmp_path / "runs" / "rates"
    times = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    more = [*commands, f"{SMALL} --seed 2"]
    assert run(monkeypatch, tmp_path, more, "--list") == 0
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["done"] * 3 + ["    "]
    assert run(monkeypatch, tmp_path, more) == 0 and len(rows(tmp_path)) == 4
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (tmp_path / "results" / "rates.csv").unlink()  # finished runs are read again, not run again
    assert run(monkeypatch, tmp_path, commands[:2]) == 0 and rows(tmp_path) == found[:2]


def test_flags_for_all(tmp_path, monkeypatch, capsys):
    command = "--arch resnet8 --epochs 1 --grad ste --seed 0"
    assert run(monkeypatch, tmp_path, [command], "--", "--dataset", "digits", "--batch-size", "60") == 0
    assert rows(tmp_path)[0]["command"] == f"python train_fsg.py {command} --dataset digits --batch-size 60"


def test_an_interrupted_grid_goes_on(tmp_path):
    code = f"""
import sys, experiments
experiments.GRIDS["rates"] = ["{SMALL} --epochs 16 --seed 0"]
sys.exit(experiments.main(["rates", "--results", r"{tmp_path}/results", "--out", r"{tmp_path}/runs"]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = lambda: subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    process = start()
    while not list(tmp_path.glob("runs/rates/*/last.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate(timeout=60)[1] and process.returncode == 130
    (last,) = tmp_path.glob("runs/rates/*/last.pt")
    before = last.with_name("metrics.csv").read_text().splitlines()
    assert 1 < len(before) < 17 and not (tmp_path / "results").exists()
    process = start()
    process.communicate(timeout=240)
    after = last.with_name("metrics.csv").read_text().splitlines()
    assert process.returncode == 0 and len(after) == 17 and after[: len(before)] == before, "it was not begun again"
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    "commands, flags, message",
    [
        ([f"{SMALL} --seed 0 --beta 7 --grad fsg"], [], "beta is the share"),
        ([f"{SMALL} --seed 0"], ["--jobs", "0"], "--jobs must be at least 1"),
        ([f"{SMALL} --seed 0"], ["--", "--seed", "1"], "leave out --seed"),
        ([f"{SMALL} --seed 0 --no-such-flag"], [], "no-such-flag"),
    ],
)
def test_what_cannot_be_run(tmp_path, monkeypatch, capsys, commands, flags, message):
    assert run(monkeypatch, tmp_path, commands, *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_damaged_results(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rates.csv").write_text("command,seed\na,0\n")
    assert run(monkeypatch, tmp_path, [f"{SMALL} --seed 0"]) == 1
    assert "damaged or of another version" in capsys.readouterr().err


def test_the_others_run_where_some_fail(tmp_path, monkeypatch, capsys):
    wrong = f"{SMALL} --beta 7 --grad fsg"
    commands = [f"{wrong} --seed 0", f"{SMALL} --seed 0", f"{wrong} --seed 1"]
    assert run(monkeypatch, tmp_path, commands, "--jobs", "1") == 1
    error = capsys.readouterr().err
    assert "beta is the share" in error and error.endswith("; 1 more cannot\n")
    assert [row["command"] for row in rows(tmp_path)] == [f"python train_fsg.py {commands[1]}"]


def test_commands_that_differ_only_early_have_runs_of_their_own(tmp_path, monkeypatch):
    long = f"{SMALL} --limit-steps 1 --milestones {' '.join(str(i) for i in range(30, 130))} --seed 0"
    assert run(monkeypatch, tmp_path, [long, long.replace("resnet8", "lenet")]) == 0
    assert len(list(tmp_path.glob("runs/rates/*/args.json"))) == len(rows(tmp_path)) == 2
