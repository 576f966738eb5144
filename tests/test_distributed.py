"""Several processes (gloo, on this CPU) do what one does: generators share their work, trainers their batches."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT

VARIANTS = {
    "ste": "STE(layers)",
    "fcgrad": "FCGrad(layers, 5, lr=1e-2)",
    "multifc": "MultiFC(layers, 5, 'tanh', lr=1e-2)",
    "lstmfc": "LSTMFC(layers, 3, lr=1e-2)",
    "fsg-mamba": "FSG(layers, expand=4, d_state=3)",
    "fsg-lstm": "FSG(layers, 'lstm', hidden=4, length=3)",
    "fsg-flat": "FSG(layers, history='flat', expand=4, d_state=3)",
    "fsg-sampled": "FSG(layers, hyper_sample=0.3, expand=4, d_state=3)",
    "released": "FSG(layers, preset='released', expand=4, d_state=3, **hypernet.RELEASED_OPTIONS)",
}

# Eleven steps with the gradients of a fixed function of the weights, the checkpoint of the sixth loaded into a new
# generator: what is left after them is written to FILE. Layers of odd sizes, one of them channels_last.
GENERATOR = """
    import copy, os, sys, torch, torch.distributed as dist
    import hypernet
    from hypernet import *
    torch.set_num_threads(1)
    file, saved, *makers = sys.argv[1:]
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1: dist.init_process_group("gloo")

    def run(maker, before):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(7, 5), torch.nn.Linear(1, 1), torch.nn.Conv2d(3, 7, 2)]
        layers[3].to(memory_format=torch.channels_last)
        targets = [torch.randn_like(layer.weight) for layer in layers]
        for layer in layers: layer.quantizer = "dorefa"
        make = lambda: eval(maker, globals(), {"layers": layers})
        generator = make()
        optimizer = torch.optim.SGD([layer.weight for layer in layers], 0.05)
        for t in range(11):
            if t == 6:
                sixth = generator.state_dict()
                generator = make()
                generator.load_state_dict(copy.deepcopy(before or sixth))
            if getattr(generator, "released", False): generator.look_ahead(0.05)
            for layer, target in zip(layers, targets):
                layer.weight.grad = (layer.weight.detach() - target) * (1 + torch.sin(10 * target)) / 100
            generator.generate()
            optimizer.step()
        if world > 1 and generator.learned:
            assert len(generator.latent) < sum(layer.weight.numel() for layer in layers) / world + 30
        grads = torch.cat([layer.weight.grad.flatten() for layer in layers])
        weights = [layer.weight.detach() for layer in layers]
        return {"G": grads, "weights": weights, "state": generator.state_dict(), "sixth": sixth}

    before = torch.load(saved) if world > 1 else {}
    found = {maker: run(maker, before.get(maker, {}).get("sixth")) for maker in makers}
    if int(os.environ.get("RANK", 0)) == 0: torch.save(found, file)
"""


def launch(processes, *command, **kwargs):
    """Run a command in so many processes that know of each other, as torchrun does; the finished processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(processes):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if processes > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes, **kwargs))
    outputs = [process.communicate(timeout=240)[0] for process in started]
    return [process.returncode for process in started], outputs


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


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """What one, two and three processes found, by number of processes."""
    folder = tmp_path_factory.mktemp("generated")
    for processes in (1, 2, 3):
        files = [str(folder / f"{processes}.pt"), str(folder / "1.pt")]
        codes, outputs = launch(processes, "-c", textwrap.dedent(GENERATOR), *files, *VARIANTS.values())
        assert codes == [0] * processes, outputs
    return {processes: torch.load(folder / f"{processes}.pt", weights_only=True) for processes in (1, 2, 3)}


@pytest.mark.parametrize("name", VARIANTS)
def test_generators_share_the_weights_and_make_the_same_gradients(generated, name):
    one, *others = (found[VARIANTS[name]] for found in generated.values())
    assert one["G"].abs().max() > 0
    for other in others:
        assert_close(one, other)
