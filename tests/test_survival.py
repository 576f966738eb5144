"""Runs that are killed, on full disks, or that diverge: nothing is lost, and what went wrong is said."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from programs import Program

import fsg_released
import runs
import train_fsg

DIGITS = ["--dataset", "digits", "--arch", "resnet8", "--batch-size", "60", "--device", "cpu", "--epochs", "2"]
FSG = ["--expand", "2", "--d-state", "2", "--save-every", "0"]  # a checkpoint every step


def assert_same_run(a, b):
    """Two checkpoints of the same moment: the same bits, all but the clock's."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))

    def check(x, y, where):
        assert type(x) is type(y), where
        if isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for k in x.keys() - {"seconds", "images_per_s", "args"}:
                check(x[k], y[k], f"{where}.{k}")
        elif isinstance(x, list | tuple):
            assert len(x) == len(y), where
            for i, pair in enumerate(zip(x, y, strict=True)):
                check(*pair, f"{where}[{i}]")
        else:
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, where

    check(a, b, "")


# Runs the trainer in forks of one process, so that the libraries are loaded once. Every second one writes its
# checkpoints in two halves and is killed between them, the others at any moment; a step takes 20 ms at least, so that
# they are not done before.
KILLER = """
    import os, random, signal, sys, time, pathlib
    import sklearn.datasets, torch, torch._dynamo, torch.utils.cpp_extension
    torch.set_num_threads(1)
    import runs, train_fsg
    folder, argv = pathlib.Path(sys.argv[1]), sys.argv[2:]
    random.seed(0)
    real_save = torch.save

    def slow_save(state, file):
        import io
        memory = io.BytesIO()
        real_save(state, memory)
        data = memory.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        if random.random() < 0.2:
            (folder / "writing").write_text("")
            time.sleep(60)
        file.write(data[len(data) // 2 :])

    def steady_save(state, file):
        time.sleep(0.02)
        real_save(state, file)

    def start(slow):
        again = ["--resume", str(folder)] if (folder / "last.pt").exists() else argv
        pid = os.fork()
        if pid == 0:
            random.seed(time.perf_counter())
            torch.save = slow_save if slow else steady_save
            code = 9
            try: code = train_fsg.main(again)
            finally: os._exit(code)
        return pid

    kills, in_writes = 0, 0
    while kills < 6:
        slow, marker = kills % 2 == 0, folder / "writing"
        pid = start(slow)
        until = time.perf_counter() + (60 if slow else random.uniform(0.1, 0.8))
        while time.perf_counter() < until and not marker.exists(): time.sleep(0.01)
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            break  # done before it could be killed
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        if marker.exists():
            in_writes += any(folder.glob("*.tmp"))
            marker.unlink()
        step = runs.load(folder / "last.pt")["step"] if (folder / "last.pt").exists() else 0  # whole, or it raises
        print("killed at", step, "in a write" if slow else "", flush=True)
    _, status = os.waitpid(start(False), 0)
    print("ended with", status, "after", kills, "kills,", in_writes, "in writes")
"""


def test_killed_six_times_the_run_is_the_same_run(tmp_path):
    argv = [*DIGITS, *FSG, "--epochs", "4", "--out", str(tmp_path), "--name"]
    assert train_fsg.main([*argv, "whole"]) == 0
    (tmp_path / "killed").mkdir()
    process = Program("-c", textwrap.dedent(KILLER), str(tmp_path / "killed"), *argv, "killed").end()
    kills, in_writes = map(int, re.search(r"ended with 0 after (\d+) kills, (\d+) in writes", process.stdout).groups())
    assert kills == 6 and in_writes == 3, process.stdout + process.stderr
    for file in ("last.pt", "best.pt"):
        assert_same_run(tmp_path / "whole" / file, tmp_path / "killed" / file)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "args.json",
        "best.pt",
        "last.pt",
        "log.txt",
        "metrics.csv",
    ]


# The kernel refuses to let files grow past a limit, as on a full disk or beyond a quota.
FULL_DISK = """
    import resource, sys
    import torch
    import runs, train_fsg
    real_save = runs.save

    def save(path, state):
        if state.get("step", 0) >= 15 and path.name == "last.pt":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        real_save(path, state)

    runs.save = save
    runs.command(lambda: train_fsg.main(sys.argv[1:]))
"""


def test_a_full_disk(tmp_path):
    argv = [*DIGITS, *FSG, "--out", str(tmp_path), "--name", "run"]
    process = Program("-c", textwrap.dedent(FULL_DISK), *argv).end()
    folder = tmp_path / "run"
    assert process.returncode == 1 and "Traceback" not in process.stderr
    last_line = process.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: .*last\.pt could not be written \(.*\): make room there.*; the old file has not changed", last_line
    )
    assert runs.load(folder / "last.pt")["step"] == 14 and not list(folder.glob("*.tmp"))
    assert train_fsg.main(["--resume", str(folder)]) == 0, "with room again, it goes on"


def test_best_is_written_again_if_the_process_died_just_before(tmp_path, monkeypatch):
    argv = [*DIGITS, "--grad", "ste", "--out", str(tmp_path), "--name", "run"]
    assert train_fsg.main([*argv, "--epochs", "1"]) == 0
    best = tmp_path / "run" / "best.pt"
    before = torch.load(best, weights_only=True)
    best.unlink()
    more = ["--resume", str(tmp_path / "run"), "--epochs", "2"]
    monkeypatch.setattr(runs.Run, "batches", lambda run: iter(sys.exit()))  # it ends before the first batch
    with pytest.raises(SystemExit):
        train_fsg.main(more)
    state = torch.load(best, weights_only=True)
    assert state["step"] == 23 and all(torch.equal(state["model"][k], v) for k, v in before["model"].items())


# ---------------------------------------------------------------------------------------------------------------------
# Divergence.


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_what_diverges_first_is_named(tmp_path, monkeypatch, where):
    """At step 8 a loss, one layer's gradient or one weight breaks; the checkpoint of step 7 stays."""
    steps = []
    real_zero_grad, real_step = torch.optim.Adam.zero_grad, torch.optim.Adam.step

    def zero_grad(self, *args):
        real_zero_grad(self, *args)
        steps.append(0)

    def step(self, *args):
        weight = [p for p in self.param_groups[0]["params"] if p.dim() == 4][1]  # the first binary layer's
        if len(steps) == 8 and where == "gradient":
            weight.grad[0, 0] = -torch.inf
        real_step(self, *args)
        if len(steps) == 8 and where == "weight":
            weight.data[0, 0] = torch.inf

    monkeypatch.setattr(torch.optim.Adam, "zero_grad", zero_grad)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    if where == "loss":
        real = torch.nn.functional.cross_entropy
        broken = lambda *args, **options: real(*args, **options) * (torch.nan if len(steps) == 8 else 1)
        monkeypatch.setattr(train_fsg.F, "cross_entropy", broken)
    with pytest.raises(runs.RunError) as error:
        train_fsg.main([*DIGITS, "--grad", "ste", "--save-every", "0", "--out", str(tmp_path), "--name", "run"])
    name = "layer1.0.conv1.weight"
    what = {"loss": "the loss", "gradient": f"the gradient of {name}", "weight": name}[where]
    last = tmp_path / "run" / "last.pt"
    assert str(error.value).startswith(
        f"{what} became NaN or infinite {'by' if where == 'weight' else 'in'} step 8, epoch 1"
    )
    assert f"the last good checkpoint is {last}" in str(error.value)
    assert runs.load(last)["step"] == 7


def test_watching_for_divergence_waits_for_the_device_only_now_and_then(tmp_path, monkeypatch):
    """Reading a number off a device is `tolist` or `item`; a step does neither."""
    reads, steps = [], []
    for name in ("tolist", "item"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: (reads.append(len(steps)), real(self))[1])
    monkeypatch.setattr(runs.Bar, "due", lambda self: len(steps) % 10 == 0)
    real_count = runs.Run.count
    monkeypatch.setattr(runs.Run, "count", lambda *a: (steps.append(0), real_count(*a))[1])
    argv = [*DIGITS, "--grad", "ste", "--opt", "sgd", "--lr", "0.1", "--out", str(tmp_path), "--name", "run"]
    assert train_fsg.main([*argv, "--epochs", "1"]) == 0
    assert set(reads) - {0, 23} == {10, 20}


# ---------------------------------------------------------------------------------------------------------------------
# --accumulate, --save-every, --compile.


def test_micro_batches_are_the_batch(tmp_path, monkeypatch):
    """On a network without BatchNorm; 7 micro-batches of 60 images differ in size."""
    import models

    monkeypatch.setitem(models.PLAIN_NETS, "tiny", ([8, "M", 8], 4, [16], False))
    monkeypatch.setattr(models, "ARCHS", [*models.ARCHS, "tiny"])
    monkeypatch.setattr(models, "UNNORMALISED", [*models.UNNORMALISED, "tiny"])
    states = []
    for accumulate in ("1", "7"):
        argv = [*DIGITS, *FSG, "--arch", "tiny", "--accumulate", accumulate, "--schedule", "none"]
        assert train_fsg.main([*argv, "--limit-steps", "25", "--out", str(tmp_path), "--name", accumulate]) == 0
        states.append(torch.load(tmp_path / accumulate / "last.pt", weights_only=True))
    for one, seven in zip(*(state["model"].values() for state in states), strict=True):
        assert (one - seven).abs().max() <= 1e-4 * one.abs().max()
    assert states[0]["step"] == states[1]["step"] == 25
    assert states[0]["totals"].tolist() == pytest.approx(states[1]["totals"].tolist(), rel=1e-4)


def test_timed_checkpoints(tmp_path, monkeypatch):
    saved = []
    real = runs.Run.save
    monkeypatch.setattr(runs.Run, "save", lambda self, rows: (saved.append(self.step), real(self, rows))[1])
    argv = [*DIGITS, "--grad", "ste", "--out", str(tmp_path), "--limit-steps", "30"]
    assert train_fsg.main([*argv, "--name", "none"]) == 0
    assert saved == [23, 30], "minutes have not passed"
    saved.clear()
    assert train_fsg.main([*argv, "--name", "all", "--save-every", "0"]) == 0
    assert saved == list(range(1, 31)), "each step once, the last ones of an epoch after its test"


def test_compiled_and_in_bfloat16_a_run_learns_as_well(tmp_path):
    losses = {}
    for name, flags in (("plain", []), ("amp", ["--amp"]), ("compile", ["--compile"])):
        argv = [
            *DIGITS,
            "--arch",
            "lenet",
            "--grad",
            "ste",
            "--epochs",
            "1",
            "--out",
            str(tmp_path),
            "--name",
            name,
            *flags,
        ]
        assert train_fsg.main(argv) == 0
        losses[name] = runs.load(tmp_path / name / "last.pt")["rows"][0]["train_loss"]
    assert abs(losses["amp"] - losses["plain"]) < 0.1 * losses["plain"]
    assert abs(losses["compile"] - losses["plain"]) < 0.1 * losses["plain"]


def test_compile_without_a_compiler(tmp_path):
    argv = [*DIGITS, "--grad", "ste", "--limit-steps", "1", "--compile", "--out", str(tmp_path)]
    env = {"CXX": "no-such-compiler", "PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "train_fsg.py", *argv]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert re.search(r"error: --compile failed \(.*\): leave it out, or install a C\+\+", process.stderr.strip())


# ---------------------------------------------------------------------------------------------------------------------
# Who writes what, and when.


@pytest.mark.parametrize("output", ["pipe", "terminal"])
def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, output):
    """As behind `| head -1`, or when the window of the terminal is closed."""
    reader, writer = os.pipe() if output == "pipe" else os.openpty()
    command = [sys.executable, str(ROOT / "train_fsg.py"), *DIGITS, "--grad", "ste", "--out", tmp_path, "--name", "run"]
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert b"resnet8 on digits" in os.read(reader, 1000)
    os.close(reader)
    assert (process.wait(), process.stderr.read()) == (0, "")
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3 and torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 2
    assert "Test accuracy" in (tmp_path / "run" / "log.txt").read_text() and (tmp_path / "run" / "best.pt").exists()


def test_where_the_encoding_has_no_greek_letters(tmp_path):
    """As on Windows, and under old locales."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "train_fsg.py"), *DIGITS, "--limit-steps", "1", "--expand", "2"]
    done = subprocess.run([*command, "--out", tmp_path, "--name", "run"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"; ?, the hypernetworks: " in done.stdout
    assert "; φ, the hypernetworks: " in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    argv = [*DIGITS, "--grad", "ste", "--out", str(tmp_path), "--name", "run", "--limit-steps", "3"]
    assert train_fsg.main(argv) == 0
    code = "import pathlib, runs, sys; lock = runs.lock_folder(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    folder = str(tmp_path / "run")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(runs.RunError, match="another process trains in"):
            train_fsg.main(["--resume", folder, "--limit-steps", "5"])
        other.communicate(b"\n")
    assert train_fsg.main(["--resume", folder, "--limit-steps", "5"]) == 0


def test_writers_of_the_same_file_do_not_collide(tmp_path):
    """Each writes a temporary file of its own; the last one to finish wins, and readers see complete files only."""
    path = tmp_path / "last.pt"
    with runs.replacing(path) as first:
        first.write("first, ")
        with runs.replacing(path) as second:
            second.write("second, complete")
        assert path.read_text() == "second, complete"
        first.write("complete")
    assert path.read_text() == "first, complete" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), runs.replacing(path) as interrupted:
        interrupted.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first, complete" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_three_processes_write_is_complete_whenever_it_is_read(tmp_path):
    path = tmp_path / "last.pt"
    runs.save(path, {"writer": -1, "x": torch.zeros(50_000)})
    code = """
        import pathlib, sys, torch, runs
        path, writer = pathlib.Path(sys.argv[1]), int(sys.argv[2])
        for _ in range(20): runs.save(path, {"writer": writer, "x": torch.full((50_000,), writer)})
    """
    writers = [Program("-c", textwrap.dedent(code), str(path), str(i)) for i in range(3)]
    while any(writer.poll() is None for writer in writers):
        state = runs.load(path)
        assert (state["x"] == max(state["writer"], 0)).all()
    assert [writer.end().stderr for writer in writers] == [""] * 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_deletes_its_old_temporary_files_and_no_others(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    stale = [folder / f"{name}.4242-0a1b2c3d.tmp" for name in ("last.pt", "best.pt", "metrics.csv", "args.json")]
    others = [folder / "run.onnx.4242-0a1b2c3d.tmp", folder / "notes.tmp"]
    for file in (*stale, *others):
        file.write_text("half")
    argv = [*DIGITS, "--grad", "ste", "--out", str(tmp_path), "--name", "run", "--limit-steps", "2"]
    assert train_fsg.main(argv) == 0
    assert not any(file.exists() for file in stale) and all(file.exists() for file in others)


def test_the_last_row_is_there_also_if_the_last_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    argv = [*DIGITS, "--grad", "ste", "--out", str(tmp_path), "--name", "run", "--limit-steps", "5"]
    real = runs.save

    def save(path, state):
        if path.name == "last.pt":
            raise runs.RunError("the disk is full")
        real(path, state)

    monkeypatch.setattr(runs, "save", save)
    with pytest.raises(runs.RunError, match="the disk is full"):
        train_fsg.main(argv)
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith("1,5,")
    with pytest.raises(runs.RunError, match=r"contains a run already: choose another --name"):
        train_fsg.main(argv)


def test_phi_that_diverges_is_not_saved(tmp_path, monkeypatch):
    """In the released code's order φ's NaN reaches the weights a step later."""
    real = fsg_released.ReleasedFSG.generate

    def generate(self):
        real(self)
        if self.t == 8:
            next(self.fast.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(fsg_released.ReleasedFSG, "generate", generate)
    argv = [*DIGITS, *FSG, "--preset", "released", "--out", str(tmp_path), "--name", "run"]
    with pytest.raises(runs.RunError, match=r"^fast\..* became NaN or infinite by step 8"):
        train_fsg.main(argv)
    assert runs.load(tmp_path / "run" / "last.pt")["step"] == 7
