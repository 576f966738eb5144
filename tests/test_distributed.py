"""Several processes (gloo, on this CPU) do what one does: generators share their work, trainers their batches."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import ROOT
from programs import Program

import data

VARIANTS = {
    "ste": "STE(layers)",
    "fcgrad": "FCGrad(layers, 5, lr=1e-2)",
    "multifc": "MultiFC(layers, 5, 'tanh', lr=1e-2)",
    "lstmfc": "LSTMFC(layers, 3, lr=1e-2)",
    # Balancing takes from the gradient of `fast` its part along `fast`: most of it, of a linear MLP all. In float32 the
    # rest is little more than rounding errors, of which Adam makes steps.
    "fsg-mamba": "FSG(layers, expand=4, d_state=3, hyper_sample=1)  # float64",
    "fsg-mamba-tanh": "FSG(layers, expand=4, d_state=3, fast_act='tanh', hyper_sample=1)  # float64",
    "fsg-lstm": "FSG(layers, 'lstm', hidden=4, length=3, fast_act='tanh', hyper_sample=1)  # float64",
    "fsg-flat": "FSG(layers, history='flat', expand=4, d_state=3, fast_act='tanh')  # float64",
    "fsg-newest": "FSG(layers, history='newest', expand=4, d_state=3, fast_act='tanh', hyper_sample=1)  # float64",
    "fsg-sampled": "FSG(layers, hyper_sample=0.3, expand=4, d_state=3, fast_act='tanh')  # float64",
    "fsg-mamba-unbalanced": "FSG(layers, balance='none', expand=4, d_state=3, hyper_sample=1)",
    "fsg-lstm-unbalanced": "FSG(layers, 'lstm', balance='none', hidden=4, length=3, hyper_sample=1)",
    "fsg-flat-unbalanced": "FSG(layers, history='flat', balance='none', expand=4, d_state=3)",
    "fsg-sampled-unbalanced": "FSG(layers, hyper_sample=0.3, balance='none', expand=4, d_state=3)",
    "gate": "GatedHistory(layers)",
    "released": "ReleasedFSG(layers, expand=4, d_state=3)",
    "released-lstm": "ReleasedFSGLSTM(layers, hidden=4)",
    "released-multifc": "ReleasedMultiFC(layers, 5, lr=1e-2)",
    "released-lstmfc": "ReleasedLSTMFC(layers, 3)",
}

# Eight steps with the gradients of a fixed function of the weights, the checkpoint of the fourth loaded into a new
# generator: what is left after them is written to FILE. Layers of odd sizes, one of them channels_last.
GENERATOR = """
    import copy, os, sys, torch, torch.distributed as dist
    from fsg_released import ReleasedFSG, ReleasedFSGLSTM
    from gate import GatedHistory
    from hypernet import FSG, STE
    from metaquant import FCGrad, LookAhead, LSTMFC, MultiFC, ReleasedLSTMFC, ReleasedMultiFC
    torch.set_num_threads(1)
    file, saved, *makers = sys.argv[1:]
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1: dist.init_process_group("gloo")

    def run(maker, before):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(7, 5), torch.nn.Linear(1, 1), torch.nn.Conv2d(3, 7, 2)]
        layers[3].to(memory_format=torch.channels_last)
        if "float64" in maker: torch.nn.ModuleList(layers).double()
        targets = [torch.randn_like(layer.weight) for layer in layers]
        for layer in layers: layer.quantizer = "dorefa"
        make = lambda: eval(maker, globals(), {"layers": layers})
        generator = make()
        optimizer = torch.optim.SGD([layer.weight for layer in layers], 0.05)
        for t in range(8):
            if t == 4:
                generator.gather()
                fourth = generator.state_dict()
                generator = make()
                generator.load_state_dict(copy.deepcopy(before or fourth))
            if isinstance(generator, LookAhead): generator.look_ahead(0.05)
            for layer, target in zip(layers, targets):
                layer.weight.grad = (layer.weight.detach() - target) * (1 + torch.sin(10 * target)) / 100
            generator.generate()
            optimizer.step()
        if world > 1 and generator.keeps_latent:
            assert len(generator.latent) < sum(layer.weight.numel() for layer in layers) / world + 30
        grads = torch.cat([layer.weight.grad.flatten() for layer in layers])
        weights = [layer.weight.detach() for layer in layers]
        found = {"measured": generator.measure(0.05), "G": grads, "weights": weights}
        generator.gather()
        return {**found, "state": generator.state_dict(), "fourth": fourth}

    before = torch.load(saved) if world > 1 else {}
    found = {maker: run(maker, before.get(maker, {}).get("fourth")) for maker in makers}
    if int(os.environ.get("RANK", 0)) == 0: torch.save(found, file)
    if world > 1: dist.barrier(), dist.destroy_process_group()
"""


def launch(processes, *command, meanwhile=None, fork=True):
    """Run a command in so many processes that know of each other, as torchrun does: their exit codes and outputs."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(processes):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if processes > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if fork:
            started.append(Program(*command, env=env, together=True))
        else:
            started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes))
    if meanwhile:
        meanwhile(started)
    ended = [process.end() for process in started] if fork else started
    outputs = [process.stdout if fork else process.communicate(timeout=240)[0] for process in ended]
    return [process.returncode for process in ended], outputs


def assert_close(a, b, where=""):
    """The same structure, and numbers equal to floating-point reordering."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_close(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor) and a.is_floating_point():
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-4 * a.abs().max().clamp_min(1e-3), where
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, float):
        assert abs(a - b) <= 1e-4 * max(1.0, abs(a)), where
    else:
        assert a == b, where


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """What one process and three found."""
    folder = tmp_path_factory.mktemp("generated")
    for processes in (1, 3):
        files = [str(folder / f"{processes}.pt"), str(folder / "1.pt")]
        codes, outputs = launch(processes, "-c", textwrap.dedent(GENERATOR), *files, *VARIANTS.values())
        assert codes == [0] * processes, outputs
    return [torch.load(folder / f"{processes}.pt", weights_only=True) for processes in (1, 3)]


@pytest.mark.xdist_group("generated")
@pytest.mark.parametrize("name", VARIANTS)
def test_generators_share_the_weights_and_make_the_same_gradients(generated, name):
    one, three = (found[VARIANTS[name]] for found in generated)
    assert one["G"].abs().max() > 0
    assert_close(one, three)


# ---------------------------------------------------------------------------------------------------------------------
# Whole trainers, on a small network without BatchNorm, which on CPUs normalises by the statistics of a process's part.

MANY_RUNS = """
    import importlib, json, sys
    import models, runs
    models.PLAIN_NETS["tiny"] = ([8, "M", 8], 4, [16], False)
    models.ARCHS.append("tiny"), models.UNNORMALISED.append("tiny")
    for script, *argv in json.loads(sys.argv[1]):
        assert importlib.import_module(script[:-3]).main(argv) == 0
    runs.end_processes()
"""
DIGITS = ["--dataset", "digits", "--batch-size", "60", "--epochs", "2", "--device", "cpu"]
TRAINERS = {
    "gate": ["train_fsg.py", "--grad", "gate", "--lr", "1e-3"],
    "fsg-mamba": ["train_fsg.py", "--hgs", "mamba", "--expand", "2", "--d-state", "2"],
    "fsg-lstm": ["train_fsg.py", "--hgs", "lstm", "--hidden", "3", "--balance", "none"],
    "sibnn": ["train_sibnn.py"],
    "bnn+": ["train_proxconnect.py", "--method", "bnn+", "--lr", "0.01"],
    "bihalf": ["train_bihalf.py", "--lr", "0.01"],
}


def compare(folder, *names):
    states = [torch.load(folder / name / "last.pt", weights_only=True) for name in names]
    if "fsg-mamba" in names[0]:  # balanced: see VARIANTS
        for state in states:
            state["generator"] = {k: v for k, v in state["generator"].items() if not k.startswith("fast.")}
    for key in ("model", "generator", "optimizer", "step", "epoch", "batch", "signs", "totals"):
        if key in states[0]:
            assert_close(states[0][key], states[1][key], key)
    rows = [state["rows"] for state in states]
    assert len(rows[0]) == len(rows[1])
    for one, other in zip(*rows, strict=True):
        for column in one.keys() - {"seconds", "images_per_s"}:
            assert abs(one[column] - other[column]) <= 1e-3 * max(1.0, abs(one[column])), column


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with every trainer's run NAME-1 in one process, NAME-2 in two, which compute their halves of a batch in
    three parts each, and NAME-parts, begun in three and ended in one."""
    out = tmp_path_factory.mktemp("trained")

    def run(processes, *runs):
        codes, outputs = launch(processes, "-c", textwrap.dedent(MANY_RUNS), json.dumps(runs))
        assert codes == [0] * processes, outputs
        assert all(output == "" for output in outputs[1:]), "rank 0 alone speaks"

    def runs(label, steps, *more):
        common = [*DIGITS, "--arch", "tiny", "--val", "1000", "--schedule", "none", "--limit-steps", steps]
        common += ["--out", str(out), *more]
        common += ["--name"]
        return [[*argv, *common, f"{name}-{label}"] for name, argv in TRAINERS.items()]

    run(1, *runs(1, "11"))  # the second epoch begins with the eighth step
    run(2, *runs(2, "11", "--accumulate", "3"))
    run(3, *runs("parts", "9"))
    more = ["--limit-steps", "11", "--resume"]
    run(1, *([argv[0], *more, str(out / f"{name}-parts")] for name, argv in TRAINERS.items()))
    return out


@pytest.mark.xdist_group("trained")
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("other", ["2", "parts"])
def test_several_processes_train_what_one_does(trained, name, other):
    compare(trained, f"{name}-1", f"{name}-{other}")
    assert len(list(trained.iterdir())) == 3 * len(TRAINERS)


OVERFLOW = """
    import math, sys
    import torch, runs, train_fsg
    real, calls = torch.amp.GradScaler.scale, []
    def scale(self, loss):  # in the third step, in the second process alone
        calls.append(loss)
        return real(self, loss) * (math.inf if len(calls) == 3 and runs.rank() == 1 else 1)
    torch.amp.GradScaler.scale = scale
    seen, update = [], torch.amp.GradScaler.update
    def record(self):
        update(self)
        seen.append((self.get_scale(), copy()))
    torch.amp.GradScaler.update = record
    init = runs.Run.__init__
    def keep(self, *arguments, **options):
        init(self, *arguments, **options)
        parts = self.state["model"], self.state["generator"]
        globals()["copy"] = lambda: [p.detach().clone() for part in parts for p in part.parameters()]
    runs.Run.__init__ = keep
    assert train_fsg.main(sys.argv[2:]) == 0
    torch.save(seen, f"{sys.argv[1]}/{runs.rank()}.pt")
    runs.end_processes()
"""


def test_an_overflow_in_one_process_skips_the_step_in_all(tmp_path):
    argv = ["--dataset", "digits", "--arch", "resnet8", "--batch-size", "8", "--val", "1000", "--limit-steps", "4"]
    argv += ["--amp", "fp16", "--expand", "2", "--d-state", "2", "--out", str(tmp_path), "--device", "cpu"]
    codes, outputs = launch(2, "-c", textwrap.dedent(OVERFLOW), str(tmp_path), *argv)
    assert codes == [0, 0], outputs
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for (scale, tensors), (same_scale, same) in zip(one, other, strict=True):
        assert scale == same_scale and all(torch.equal(a, b) for a, b in zip(tensors, same, strict=True))
    (before, kept), (after, weights), (_, later) = one[1:]
    assert after == before / 2 and all(torch.equal(a, b) for a, b in zip(kept, weights, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights, later, strict=True))


def test_the_benchmark_of_shared_generators(tmp_path):
    """Memory falls with the number of processes."""
    command = ["bench.py", "scale", "--arch", "resnet8", "--expand", "4", "--d-state", "2", "--rounds", "1"]
    codes, outputs = launch(1, *command, "--grads", "fsg-mamba", "--processes", "1", "2", "--json", str(tmp_path / "f"))
    assert codes == [0], outputs
    one, two = json.loads((tmp_path / "f").read_text())["variants"].values()
    assert one["weights"] == 76_288 and two["weights"] == one["weights"] // 2
    assert two["MB_held"] < 0.6 * one["MB_held"] and 0 < two["talking"] < 1


def test_one_process_that_is_told_to_stop_stops_all_at_the_same_step(tmp_path):
    argv = ["train_sibnn.py", *DIGITS, "--arch", "resnet8", "--epochs", "500", "--out", str(tmp_path), "--name", "cut"]

    def tell(processes):
        while not (tmp_path / "cut" / "best.pt").exists():
            assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
            time.sleep(0.05)
        time.sleep(0.3)
        processes[1].send_signal(signal.SIGTERM)

    codes, outputs = launch(2, *argv, meanwhile=tell, fork=False)
    assert codes == [128 + signal.SIGTERM] * 2 and "Traceback" not in "".join(outputs)
    stopped = int(re.search(r"stopped after step ([\d,]+)", outputs[0])[1].replace(",", ""))
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == stopped


def test_a_checkpoint_that_cannot_be_written_ends_all_processes_with_one_sentence(tmp_path):
    code = """
        import sys, runs, train_sibnn
        def save(path, state): raise runs.RunError("the disk is full")
        runs.save = save
        runs.command(lambda: train_sibnn.main(sys.argv[1:]))
    """
    argv = [*DIGITS, "--arch", "resnet8", "--out", str(tmp_path), "--name", "full"]
    codes, outputs = launch(2, "-c", textwrap.dedent(code), *argv, fork=False)
    assert codes == [1, 1] and outputs[1] == "" and outputs[0].endswith("error: the disk is full\n"), outputs


def test_batches_that_cannot_be_shared(tmp_path):
    argv = ["train_sibnn.py", *DIGITS, "--arch", "lenet", "--batch-size", "61", "--out", str(tmp_path)]
    codes, outputs = launch(2, *argv)
    sentence = "2 processes cannot divide batches of 61 images equally, at least two each: use --batch-size 60 or 62"
    assert 0 not in codes and outputs[1] == "" and outputs[0].strip().endswith(sentence)
    assert not list(tmp_path.iterdir())
    for batch, processes, size, advice in ((2, 2, 99, "4 or 6"), (5, 2, 5, "4"), (9, 4, 99, "8 or 12")):
        with pytest.raises(data.DataError, match=f"use --batch-size {advice}$"):
            data.check_batch_size(batch, processes, size)
    with pytest.raises(data.DataError, match="use fewer processes"):
        data.check_batch_size(7, 4, 7)


@pytest.mark.parametrize("size, batch, processes", [(100, 12, 1), (100, 12, 3), (7, 12, 4), (25, 12, 4)])
def test_the_parts_of_a_batch_are_the_batch(size, batch, processes):
    images, labels = torch.arange(size).to(torch.uint8).view(-1, 1, 1, 1), torch.arange(size)
    one = torch.ones(1)
    for train in (True, False):
        make = functools.partial(data.ResidentBatches, images, labels, 0 * one, one, 10, batch, train)
        if train and size % batch % processes and size < batch:
            with pytest.raises(data.DataError, match="cannot divide"):
                make(rank=0, world_size=processes)
            continue
        whole = [sorted(y.tolist()) for _, y in make().epoch(3)]
        parts = [list(make(rank=rank, world_size=processes).epoch(3)) for rank in range(processes)]
        together = sorted(y for part in parts for _, ys in part for y in ys.tolist())
        assert together == sorted(y for ys in whole for y in ys), "every image once"
        if train:
            for b, batch_labels in enumerate(whole):
                assert sorted(y for part in parts for y in part[b][1].tolist()) == batch_labels
                assert {len(part[b][1]) for part in parts} == {len(batch_labels) // processes}
