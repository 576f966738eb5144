"""gpu_day.py: how it plans its time, what becomes of items that fail or hang, and a dry run of all stages."""

import copy
import json
import os
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image

import experiments
import gpu_day


@pytest.fixture
def stage(tmp_path):
    day = gpu_day.Day(tmp_path / "out", dry=True)
    yield gpu_day.Stage(1, day, time.monotonic() + 60)
    day.close()


def items(stage):
    return json.loads(stage.file.read_text())["items"]


def test_the_last_stage_gets_the_time_that_is_left():
    seconds = {1: 90, 2: 120, 3: 40, 4: 200}
    assert gpu_day.plan(9, [1, 2, 3, 4], seconds) == {1: 90, 2: 210, 3: 250, 4: 540}
    assert gpu_day.plan(5, [4], seconds) == {4: 300}
    assert gpu_day.plan(5, [2, 1], seconds) == {1: 90, 2: 300}


def test_the_plan_leaves_out_what_there_is_no_time_for():
    seconds = {1: 90, 2: 120, 3: 40, 4: 200}
    assert gpu_day.plan(5.5, [1, 2, 3, 4], seconds) == {1: 90, 2: 210, 3: 330}, "80 s are too few for stage 4"
    assert gpu_day.plan(3, [1, 2], seconds) == {1: 90, 2: 180}, "more than half of its time"
    assert gpu_day.plan(0.5, [1, 2], seconds) == {}


def test_an_item_that_works(stage):
    code = "print('RESULT {\"value\": 3}'); print('RESULT {\"half a li')"
    assert stage.run("it", [sys.executable, "-c", code], 20) == "ok"
    assert items(stage)["it"]["results"] == [{"value": 3}]
    assert items(stage)["it"]["status"] == "ok"


def test_an_item_that_fails_is_recorded_with_what_it_found_and_its_last_lines(stage):
    code = "print('RESULT {\"value\": 3}', flush=True); raise ValueError('what went wrong')"
    assert stage.run("it", [sys.executable, "-c", code], 20) == "failed"
    item = items(stage)["it"]
    assert item["results"] == [{"value": 3}] and item["error"][-1] == "ValueError: what went wrong"


def test_a_check_that_does_not_hold_fails_the_item(stage):
    code = "import gpu_day; gpu_day.check('a', 1.0, 2.0); gpu_day.check('b', float('nan'), 2.0)"
    assert stage.run("it", [sys.executable, "-c", code], 20) == "failed"
    assert [r["ok"] for r in items(stage)["it"]["results"]] == [True, False]


def test_a_program_that_is_not_there(stage):
    assert stage.run("it", ["no-such-program"], 20) == "failed"
    assert "no-such-program" in items(stage)["it"]["error"][-1]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0] != "Z"


def test_an_item_is_killed_at_its_limit_with_all_it_started(stage):
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print('RESULT {"pid": %d}' % child.pid, flush=True)
time.sleep(60)
"""
    began = time.monotonic()
    assert stage.run("it", [sys.executable, "-c", code], 3) == "time limit"
    assert time.monotonic() - began < 15
    (result,) = items(stage)["it"]["results"]
    deadline = time.monotonic() + 5
    while alive(result["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(result["pid"])


def test_results_are_in_the_file_while_the_item_runs(stage):
    seen = []
    write = stage.write
    stage.write = lambda: (write(), seen.append(items(stage)))
    code = "import time; print('RESULT {\"value\": 1}', flush=True); time.sleep(0.5)"
    stage.run("it", [sys.executable, "-c", code], 20)
    assert {"status": "running", "results": [{"value": 1}]} in [found.get("it") for found in seen]


def test_without_time_an_item_is_skipped(stage):
    stage.end = time.monotonic()
    assert stage.run("it", [sys.executable, "-c", ""], 20) == "skipped"
    assert items(stage)["it"]["error"] == ["no time was left"]


def test_images_are_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "CARRIED", tmp_path)
    scratch, times = tmp_path / "scratch", []
    for file in ("train/cat/0.png", "test/cat/0.png", "train/dog/0.png", "test/dog/0.png"):
        (tmp_path / file).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    with tarfile.open(tmp_path / "cifar10-jpeg.tar.xz", "w:xz") as tar:
        for split in ("train", "test"):
            tar.add(tmp_path / split, split)
    for _ in range(2):  # a second call finds them
        gpu_day.unpack(True, scratch)
        found = sorted((scratch / "images").iterdir())
        assert [path.name for path in found] == [".test-8.pt", ".train-8.pt", "test", "train"]
        times.append([path.stat().st_mtime_ns for path in found])
    assert times[0] == times[1]


def test_a_training_process_that_dies_is_replaced(tmp_path):
    (tmp_path / "grids").mkdir()
    workers = gpu_day.Workers(1, tmp_path, dry=True)
    try:
        command = [sys.executable, "train_fsg.py", "--dataset", "folder", "--data-dir", "nowhere"]
        code, error = workers.run(command)
        assert code == 1 and error.startswith("error: ") and "nowhere" in error
        workers.all[0].kill()
        assert "ended with exit status" in workers.run(command)[1]
        assert workers.run([*command[:2], "--no-such-flag"])[0] == 2 and len(workers.all) == 2
        workers.stop()
        with pytest.raises(experiments.Interrupted):
            workers.run(command)
    finally:
        for worker in workers.all:
            worker.kill()


@pytest.mark.parametrize("graph", ["right", "wrong", "wrong gradient", "stale", "impossible"])
def test_graphs_are_used_only_if_they_compute_what_the_network_does(graph, monkeypatch):
    steps = []

    def capture(net, inputs, **_):  # as CUDA graphs, it runs the network and replaces its forward
        if graph == "impossible":
            raise RuntimeError("no GPU")
        net(*inputs)
        weight = net[0].weight.detach().clone()

        def forward(x):
            steps.append(len(x))
            if graph == "stale":
                x = torch.nn.functional.conv2d(x, weight, net[0].bias, padding=1)
                return net[2:](net[1](x))
            out = type(net).forward(net, x)
            doubled = out + out - out.detach()  # with twice the gradient
            return {"wrong": 1.2 * out, "wrong gradient": doubled}.get(graph, out)

        net.forward = forward

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(64, 10))
    plain = copy.deepcopy(net)
    model = gpu_day.graphed(net)
    images, labels = torch.randn(5, 8, 3, 4, 4), torch.arange(8)
    for x in images:
        for one, parameters in ((plain, plain.parameters()), (model, net.parameters())):
            torch.nn.functional.cross_entropy(one(x), labels).backward()
            with torch.no_grad():
                for p in parameters:
                    p -= 0.1 * p.grad
                    p.grad = None
    for a, b in zip(plain.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    used = len(steps)
    model(images[0][:5])
    net.eval()
    model(images[0])
    assert len(steps) == used, "another batch size and a test do not use the graph"
    assert (used >= 5) == (graph == "right")


def test_a_dry_run_of_all_stages(tmp_path):
    command = [sys.executable, "gpu_day.py", "--out", str(tmp_path), "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [*gpu_day.FILES.values(), "grids.tar.gz", "log.txt"]
    found = {n: json.loads((tmp_path / file).read_text())["items"] for n, file in gpu_day.FILES.items()}
    status = {f"{n} {name}": item["status"] for n, all_ in found.items() for name, item in all_.items()}
    skipped = {"1 CUDA graphs", "1 memcheck", "1 pytest", "2 ncu", "3 compile", "3 equal", "4 MPS"}
    assert {name for name, s in status.items() if s == "skipped"} == skipped
    assert {s for name, s in status.items() if name not in skipped} == {"ok"}, status
    assert found[3]["compile"]["error"] == ["no nvcc"]
    assert found[4]["grids"]["results"] == [{"grid": "results/ablations", "rows": 3}], "three seeds"
    with tarfile.open(tmp_path / "grids.tar.gz") as tar:
        names = [name.split("/")[-1] for name in tar.getnames()]
    assert names.count("metrics.csv") == names.count("args.json") == 3 and "ablations.csv" in names
    assert "checks" in result.stdout


def test_what_cannot_be_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "CARRIED", tmp_path / "gpu-day")
    (tmp_path / "text").write_text("no archive")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "text", "train/cat/0.png")
    for images, pretrained, sentence in (
        ("", "text", "is not a tar archive of images"),
        ("text", "text", "is not a tar archive of images"),
        ("images.tar", "none", "there is no checkpoint"),
        ("images.tar", "text", "is damaged or not a checkpoint"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
            gpu_day.prepare(tmp_path / images, tmp_path / pretrained)
