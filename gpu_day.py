"""All measurements on a GPU in one call: correctness, step times, mamba-ssm, training runs. Results are JSON files.

    python gpu_day.py --prepare IMAGES.tar.xz PRETRAINED.pth    # before, with internet: fills the folder gpu-day/
    python gpu_day.py --out OUT --minutes 9                     # on the GPU machine, offline
    python gpu_day.py --out OUT --minutes 5 --stages 1 2 3      # some of the stages
    python gpu_day.py --out OUT --minutes 9 --stages 4          # as many runs of experiments.py as the time allows
    python gpu_day.py --out OUT --dry-run                       # all stages at toy size on a CPU

This file needs the whole repository. The most important stages come first. Each stage has several items. An item is a
separate process with a time limit, and its results are written to the stage's JSON file at once. If an item fails,
hangs or is killed, its error is recorded and the next item starts. OUT then contains:

    1-correctness.json   checks of the Triton kernels, the generators, AMP, resume and CUDA graphs
    2-steps.json         milliseconds per training step of every generator, and the scan against the GPU's peak rates
    3-mamba-ssm.json     the kernel of the mamba-ssm package against the fused scan: results and speed
    4-grids.json         how many rows the grids of experiments.py have
    grids.tar.gz         their tables, the metrics of their runs, and birealnet20.pt, a full-precision network. Rows in
                         results/ are not run again: to continue on a fresh machine, copy the tables there, and
                         birealnet20.pt to gpu-day/
    log.txt              the output of the items

The time of each stage (SECONDS below), as measured on an H100 or H200 with 16 CPU cores:

    stage  seconds  reason
    1          130  all items run at a time; Triton compiles `last` in 20 s and `tails` in 50 s per shape
    2          110  a process takes 10 s to start and a method 2 s; the graphs of ResNet-32 take 30 s to load
    3           60  the extension compiles in 240 s beside stages 1 and 2; the comparison takes 45 s
    4          300  it uses all of its time: 702 steps take 30 s (STE) to 70 s (FSG with Mamba) on an H200 with 16 runs
                    at a time, and the grids have some 600 runs

The stages get their seconds in this order until --minutes are used up. A stage that would get less than half of its
seconds is left out. The last stage gets the remaining time. A stage that ends early leaves its time to the next ones.
"""

import argparse
import contextlib
import csv
import importlib
import itertools
import json
import math
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

try:
    import triton
except ImportError:
    triton = None

ROOT = Path(__file__).resolve().parent
CARRIED = ROOT / "gpu-day"
PRETRAINED = "ResNet20-CIFAR10-pretrain.pth"
NAMES = ("correctness", "steps", "mamba-ssm", "grids")
FILES = {i: f"{i}-{name}.json" for i, name in enumerate(NAMES, 1)}
SECONDS = {1: 130, 2: 110, 3: 60, 4: 300}
DRY_SECONDS = {1: 180, 2: 90, 3: 10, 4: 60}  # upper limits, for a busy machine
MOST_LOG = 15 * 2**20  # bytes of log.txt


def plan(minutes: float, stages: list[int], seconds: dict[int, int] = SECONDS) -> dict[int, float]:
    """When each stage must have ended, in seconds from the start. Stages without enough time are left out."""
    left, given = 60 * minutes, {}
    for stage in sorted(stages):
        if left >= seconds[stage] / 2:
            given[stage] = min(left, seconds[stage])
            left -= given[stage]
    if given and left > 0:
        given[max(given)] += left
    return dict(zip(given, itertools.accumulate(given.values()), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Processes with a time limit, and the JSON files with their results.


def write_json(path: Path, value) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def kill(process: subprocess.Popen) -> None:
    """End the process and all processes that it has started, also those in other process groups."""
    pids = [process.pid]
    for pid in pids:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += map(int, children.read_text().split())
    for end, pid in ((os.killpg, process.pid), *((os.kill, pid) for pid in pids)):
        with contextlib.suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)
    process.wait()


def start(command: list, output: Path, env: dict | None = None) -> subprocess.Popen:
    """Start the command in a new process group, in the repository's folder; stdout and stderr go to a file."""
    with open(output, "wb") as f:
        options = {"stdin": subprocess.DEVNULL, "stdout": f, "stderr": subprocess.STDOUT, "start_new_session": True}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        return subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment, **options)


def wait(process: subprocess.Popen, end: float, watch=lambda: None) -> str:
    """Wait for the process until time.monotonic() is `end`, then kill it: 'ok', 'failed' or 'time limit'.

    Calls watch() while it waits.
    """
    while process.poll() is None:
        if time.monotonic() > end:
            kill(process)
            return "time limit"
        time.sleep(0.1)
        watch()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # processes that it has not ended
    return "failed" if process.returncode else "ok"


def found(output: Path) -> list[dict]:
    """The results that a child process has reported with `say` until now."""
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    results = []
    for line in lines:
        if line.startswith("RESULT "):
            with contextlib.suppress(ValueError):  # half a line
                results.append(json.loads(line.removeprefix("RESULT ")))
    return results


def last_lines(output: Path, count: int = 12) -> list[str]:
    text = output.read_text(errors="replace") if output.exists() else ""
    lines = [line[:300] for line in text.splitlines() if line.strip() and not line.startswith("RESULT ")]
    return lines[-count:]


class Stage:
    """One stage. It runs items and writes its JSON file."""

    def __init__(self, number: int, day, end: float):
        self.number, self.day, self.end = number, day, end
        self.file, self.items, self.lock = day.out / FILES[number], {}, threading.Lock()
        self.began = time.monotonic()
        self.write()

    def write(self) -> None:
        with self.lock:
            seconds = round(time.monotonic() - self.began, 1)
            write_json(self.file, {"stage": self.number, **self.day.facts, "seconds": seconds, "items": self.items})

    def record(self, name: str, **values) -> None:
        with self.lock:
            self.items[name] = self.items.get(name, {}) | values
        self.write()

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, name: str, command: list, limit: float, env: dict | None = None) -> str:
        """Run a command as the item `name`. Its status: 'ok', 'failed', 'time limit', or 'skipped'."""
        began = time.monotonic()
        limit = min(limit * (3 if self.day.dry else 1), self.left())
        if limit < 2:
            self.record(name, status="skipped", error=["no time was left"])
            return "skipped"
        output, seen = self.day.output(f"{self.number}-{name}"), []

        def watch():
            if len(results := found(output)) > len(seen):
                seen[:] = results
                self.record(name, status="running", results=list(seen))

        try:
            status = wait(start(command, output, self.day.env | (env or {})), began + limit, watch)
        except OSError as e:  # no such program
            status = "failed"
            output.write_text(f"{type(e).__name__}: {e}\n")
        results = found(output)
        skipped = next((r["skipped"] for r in results if "skipped" in r), None)
        if status == "ok" and not all(r.get("ok", True) for r in results):
            status = "failed"
        values = {"status": "skipped" if skipped and status == "ok" else status, "limit": round(limit, 1)}
        values |= {"seconds": round(time.monotonic() - began, 1), "results": results}
        if values["status"] != "ok":
            values["error"] = [skipped] if skipped else last_lines(output)
        self.record(name, **values)
        self.day.log(f"stage {self.number}, {name}: {values['status']}, {values['seconds']} s", output)
        return values["status"]

    def item(self, name: str, function, limit: float, env: dict | None = None, prefix=(), **arguments) -> str:
        """Run a function of this file as an item, in a new process."""
        command = child(function, self.day.scratch, self.day.dry, **arguments)
        return self.run(name, [*prefix, *command], limit, env)


def child(function, scratch: Path, dry: bool, **arguments) -> list[str]:
    """The command that runs a function of this file in a new process."""
    command = [sys.executable, __file__, "--item", function.__name__, "--arguments", json.dumps(arguments)]
    return command + ["--scratch", str(scratch)] + ["--dry-run"] * dry


class Day:
    """The folders, the environment and the background processes of all stages."""

    def __init__(self, out: Path, dry: bool):
        self.out, self.dry = out, dry
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-day-")) if dry else Path(tempfile.gettempdir(), "gpu-day")
        self.scratch.mkdir(exist_ok=True)
        self.device = "cpu" if dry else "cuda"
        self.facts = {"dry_run": dry}
        self.env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if dry:
            self.env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        else:
            self.env |= {
                "TORCHINDUCTOR_CACHE_DIR": f"{self.scratch}/inductor",
                "TRITON_CACHE_DIR": f"{self.scratch}/triton",
                "TORCH_EXTENSIONS_DIR": f"{self.scratch}/extensions",
            }
        self.lock, self.outputs = threading.Lock(), itertools.count()
        self.background = {}
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").write_text("")

    def output(self, name: str) -> Path:
        return self.scratch / f"{next(self.outputs):03d}-{re.sub('[^a-z0-9]+', '-', name.lower())}.txt"

    def start(self, name: str, function, **arguments) -> None:
        """Run a function of this file beside the stages, as `name`."""
        output = self.output(name)
        process = start(child(function, self.scratch, self.dry, **arguments), output, self.env)
        self.background[name] = process, output, time.monotonic()

    def log(self, title: str, output: Path | None = None) -> None:
        with self.lock:
            print(title, flush=True)
            text = output.read_text(errors="replace")[-40_000:] if output and output.exists() else ""
            log = self.out / "log.txt"
            if log.stat().st_size < MOST_LOG - 50_000:
                with open(log, "a") as f:
                    f.write(f"=== {title}\n{text}\n")

    def close(self) -> None:
        for name, (process, output, _) in self.background.items():
            kill(process)
            self.log(f"background, {name}: exit status {process.returncode}", output)
        if self.dry:
            shutil.rmtree(self.scratch, ignore_errors=True)


# Functions for child processes (items). Only these import torch, not the process that starts them.


def say(**values) -> None:
    """Report a result to the parent process."""
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) and math.isfinite(v) else v for k, v in values.items()}
    print("RESULT " + json.dumps(rounded, default=str), flush=True)


def check(what: str, value: float, limit: float, **more) -> None:
    """Report a figure that must be at most `limit`."""
    say(check=what, value=float(value), limit=limit, ok=bool(value <= limit), **more)


def relative(a, b) -> float:
    """The largest difference, relative to the largest |b|."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)).item()


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function, device: str, seconds: float, repeats: int = 3) -> dict[str, float]:
    """Milliseconds per call: median, lowest and highest of `repeats` measurements of about seconds / repeats each.

    A measurement is of many calls, with one synchronisation at its end.
    """
    import torch

    def measure(calls):
        synchronize(device)
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                function()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / calls
        began = time.perf_counter()
        for _ in range(calls):
            function()
        return 1e3 * (time.perf_counter() - began) / calls

    once, repeats = measure(1 if device == "cpu" else 3), repeats if seconds else 1
    calls = max(1, min(500, round(1e3 * seconds / repeats / max(once, 1e-3))))
    times = sorted(measure(calls) for _ in range(repeats))
    return {"ms": statistics.median(times), "ms_min": times[0], "ms_max": times[-1], "calls": calls * repeats}


@contextlib.contextmanager
def reported(**where):
    """Report an error within the block as a result. It does not end the item."""
    try:
        yield
    except Exception as e:
        say(**where, ok=False, error=f"{type(e).__name__}: {' '.join(str(e).split())[:400]}")


def network_sizes(arch: str) -> list[int]:
    """The number of weights of each binary layer."""
    import models

    return [layer.weight.numel() for layer in models.binary_layers(models.build(arch, 10, "dorefa"))]


def make_generator(method: str, layers):
    """The gradient generator of a method, for the step times."""
    import hypernet
    from gate import GatedHistory
    from metaquant import MultiFC

    small = {} if layers[0].weight.is_cuda else {"d_state": 4, "expand": 8, "scan": "reference"}
    makers = {
        "plain": lambda: None,
        "ste": lambda: hypernet.STE(layers),
        "gate": lambda: GatedHistory(layers),
        "fsg": lambda: hypernet.FSG(layers, **small),
        "fsg-flat": lambda: hypernet.FSG(layers, history="flat", **small),
        "fsg-all": lambda: hypernet.FSG(layers, hyper_sample=1.0, **small),
        "fsg-lstm16": lambda: hypernet.FSG(layers, hgs="lstm", hidden=16),
        "fsg-lstm100": lambda: hypernet.FSG(layers, hgs="lstm", hidden=100),
        "multifc": lambda: MultiFC(layers),
    }
    return makers[method]()


def train(flags: list[str], folder: Path, name: str) -> list[dict]:
    """Run train_fsg.py in this process. Returns the rows of metrics.csv. Raises the trainer's errors."""
    import train_fsg

    if code := train_fsg.main([*map(str, flags), "--out", str(folder), "--name", name]):
        raise RuntimeError(f"train_fsg.py ended with {code}")
    return metrics(folder / name)


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.csv, as numbers."""
    if not (run / "metrics.csv").exists():
        return []
    with open(run / "metrics.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(f)]


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: correctness.


def correctness(stage: Stage) -> None:
    """Run all items at a time: none of them is timed, and each kernel starts with its smallest size."""
    dry = stage.day.dry
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    commands = [
        lambda: stage.item("machine", machine, 60),
        lambda: stage.item("kernel last", kernel_last, 125),
        lambda: stage.item("kernel tails", kernel_tails, 128),
        lambda: stage.item("CUDA graphs", cuda_graphs, 125),
        lambda: stage.item("generators", generators, 125),
        lambda: stage.item("resume", resume, 125),
        lambda: stage.item("AMP", amp, 125),
    ]
    if dry:
        stage.record("memcheck", status="skipped", error=["no GPU"])
        stage.record("pytest", status="skipped", error=["no GPU"])
    else:
        tests = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "-n", "4"]
        tests += ["tests/test_gpu.py", "tests/test_triton.py", "-v", "-k", "not any_shape and not several_blocks"]
        no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        commands.insert(3, lambda: stage.item("memcheck", smallest, 125, env=no_cache, prefix=sanitizer))
        commands.insert(4, lambda: stage.run("pytest", tests, 128))
    with ThreadPoolExecutor(2 if dry else 9) as threads:
        for future in [threads.submit(command) for command in commands]:
            future.result()
    if "pytest" in stage.items and not dry:
        last = sorted(stage.day.scratch.glob("*-1-pytest.txt"))
        stage.record("pytest", summary=last_lines(last[-1], 30) if last else [])


def machine(dry: bool, scratch: Path) -> None:
    """The GPU, and the versions."""
    import torch

    say(python=sys.version.split()[0], torch=torch.__version__, triton=getattr(triton, "__version__", None))
    say(cpu_cores=os.cpu_count(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    if not dry:
        p = torch.cuda.get_device_properties(0)
        say(device=p.name, multiprocessors=p.multi_processor_count, memory_gb=p.total_memory / 2**30)
    for tool in ("nvcc", "ncu", "compute-sanitizer", "nvidia-cuda-mps-control", "nvidia-smi", "c++", "ninja"):
        say(**{tool: shutil.which(tool)})
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,compute_mode,mig.mode.current"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        say(nvidia_smi=subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines())


def mamba_pair(device: str, d: int, n: int, k: int):
    """One Mamba block three times: with the fused scan in float32, with the reference in float64 and in float32."""
    import torch

    import selective_scan_triton
    from hypernet import SlowMamba

    torch.manual_seed(0)
    net = SlowMamba(n, k, d, "fused").to(device)
    net.last = lambda u: selective_scan_triton.last(u.squeeze(-1), *net.in_kernel_order())
    net.tails = lambda *inputs: selective_scan_triton.tails(*inputs, *net.in_kernel_order())
    books = []
    for dtype in (torch.float64, torch.float32):
        book = SlowMamba(n, k, d, "reference").to(device)
        book.load_state_dict(net.state_dict())
        books.append(book.to(dtype))
    return net, *books


def compare(what: str, names: list[str], ours, exact, reference, gradient_limit: float) -> None:
    """Report errors relative to float64, each with the error of plain float32 PyTorch."""
    for name, a, b, c in zip(names, ours, exact, reference, strict=True):
        plain = relative(c, b)
        limit = 1e-5 if name == "y" else gradient_limit
        check(f"{what}: {name}", relative(a, b), max(limit, 5 * plain), plain_float32=plain)


def kernel_last(dry: bool, scratch: Path) -> None:
    """selective_scan_triton.last, forward and backward, against float64: small, then the paper's size."""
    import torch

    device = "cpu" if dry else "cuda"
    shapes = [(10, 3, 5, 4, 2)] if dry else [(40, 6, 20, 16, 8), (33, 4, 7, 5, 3), (270_000, 6, 100, 16, 8)]
    for rows, length, d, n, k in shapes:
        what = f"last, {rows} x {length}, d {d}, n {n}"
        with reported(shape=what):
            net, book, plain = mamba_pair(device, d, n, k)
            u, v = torch.randn(rows, length, 1, device=device), torch.randn(rows, device=device)
            u[:, 0] = u[0, 0]  # the layer embedding
            results, names = [], ["y", "u", *dict(net.named_parameters())]
            for one, dtype in ((net, torch.float32), (book, torch.float64), (plain, torch.float32)):
                x = u.detach().to(dtype).requires_grad_()
                began = time.perf_counter()
                y = one.last(x)
                synchronize(device)
                between = time.perf_counter()
                results.append([y.detach(), *torch.autograd.grad(y, [x, *one.parameters()], v.to(dtype))])
                synchronize(device)
                if one is net:
                    seconds = {"forward": between - began, "backward": time.perf_counter() - between}
                    say(shape=what, first_call_seconds=seconds)
            compare(what, names, *results, 1e-4)


def kernel_tails(dry: bool, scratch: Path) -> None:
    """selective_scan_triton.tails, forward and backward, against float64: small, then ResNet-20's layers."""
    import torch

    device = "cpu" if dry else "cuda"
    shapes = [([9, 1], 4, 2, 2)] if dry else [([20, 1, 33], 20, 16, 8), ([20_000, 1, 432, 6_000], 100, 16, 8)]
    if not dry:
        shapes.append((network_sizes("resnet20"), 100, 16, 8))
    for sizes, d, n, k in shapes:
        what = f"tails, {sum(sizes)} weights in {len(sizes)} layers, d {d}, n {n}"
        with reported(shape=what):
            net, book, plain = mamba_pair(device, d, n, k)
            past, v = torch.randn(1 if dry else 5, sum(sizes), device=device), torch.randn(sum(sizes), device=device)
            first = torch.randn(len(sizes), device=device)
            results, names = [], ["y", *dict(net.named_parameters())]
            for one, dtype in ((net, torch.float32), (book, torch.float64), (plain, torch.float32)):
                f = first.to(dtype).requires_grad_()
                began = time.perf_counter()
                y = one.tails(past.to(dtype), sizes, f)
                synchronize(device)
                between = time.perf_counter()
                results.append([y.detach(), *torch.autograd.grad(y, list(one.parameters()), v.to(dtype))])
                synchronize(device)
                if one is net:
                    seconds = {"forward": between - began, "backward": time.perf_counter() - between}
                    say(shape=what, first_call_seconds=seconds)
            compare(what, names, *results, 1e-4)


def smallest(dry: bool, scratch: Path) -> None:
    """Run both kernels once, small enough for compute-sanitizer. The shapes are not multiples of the blocks."""
    import torch

    device = "cpu" if dry else "cuda"
    net, *_ = mamba_pair(device, 20, 16, 8)
    u = torch.randn(21, 6, 1, device=device, requires_grad=True)
    net.last(u).sum().backward()
    first = torch.randn(2, device=device, requires_grad=True)
    net.tails(torch.randn(5, 34, device=device), [33, 1], first).sum().backward()
    synchronize(device)
    say(ran=True, finite=bool(u.grad.isfinite().all() and first.grad.isfinite().all()))


def generators(dry: bool, scratch: Path) -> None:
    """Five generate() steps in float32: the GPU's G against the CPU's, for equal gradients and weights."""
    import torch

    import hypernet
    import models

    device = "cpu" if dry else "cuda"

    def fsg(layers, **options):  # the reference scan on the CPU, the Triton kernels on the GPU
        scan = "fused" if layers[0].weight.is_cuda else "reference"
        return hypernet.FSG(layers, d_state=4, expand=10, hidden=8, scan=scan, **options)

    variants = {
        "fsg per-weight": fsg,
        "fsg flat": lambda layers: fsg(layers, history="flat"),
        "fsg of 3 gradients": lambda layers: fsg(layers, length=3),
        "fsg lstm": lambda layers: fsg(layers, hgs="lstm"),
        "gate": lambda layers: make_generator("gate", layers),
        "ste": hypernet.STE,
        "multifc": lambda layers: make_generator("multifc", layers),
    }
    shapes = [(16, 3, 3, 3), (8, 16, 3, 3), (10, 40)]
    for name, make in variants.items():
        with reported(generator=name):
            nets, makers = [], []
            for place in ("cpu", device):
                torch.manual_seed(0)
                convs = [torch.nn.Conv2d(s[1], s[0], 3) if len(s) == 4 else torch.nn.Linear(s[1], s[0]) for s in shapes]
                net = models.binarize_(torch.nn.ModuleList(convs), "dorefa", "none", first=True, last=True).to(place)
                torch.manual_seed(1)
                nets.append(models.binary_layers(net))
                makers.append(make(nets[-1]))
            if "fsg" in name or name == "multifc":  # equal random numbers on both devices
                makers[1].load_state_dict(makers[0].state_dict())
            random = torch.Generator().manual_seed(2)
            for step in range(5):
                for a, b in zip(*nets, strict=True):
                    a.weight.grad = torch.randn(a.weight.shape, generator=random) * 1e-3
                    b.weight.grad = a.weight.grad.to(device)
                for maker in makers:
                    maker.generate()
                G = [torch.cat([layer.weight.grad.flatten().cpu() for layer in layers]) for layers in nets]
                check(f"{name}, step {step}", relative(G[1], G[0]), 1e-3)


def toy(dry: bool, epochs: int, hgs: str = "--hgs mamba --d-state 4 --expand 8") -> list[str]:
    """Flags of train_fsg.py: FSG on handwritten digits."""
    flags = f"--dataset digits --arch resnet8 --batch-size 64 --schedule none {hgs} "
    flags += "--epochs 1 --limit-steps 2 --device cpu" if dry else f"--epochs {epochs} --device cuda"
    return [*flags.split(), *(["--scan", "reference"] if dry else [])]


def resume(dry: bool, scratch: Path) -> None:
    """A run of 2 epochs against one of 1 epoch, resumed in a new process: equal weights and metrics, bit for bit."""
    import torch

    folder, one = scratch / "resume", ["--limit-steps", "1"] if dry else ["--epochs", "1"]
    flags = [*toy(dry, 2), "--deterministic"]
    train(flags, folder, "whole")
    train([*flags, *one], folder, "halves")
    more = ["--limit-steps", "2"] if dry else ["--epochs", "2"]
    command = [sys.executable, "train_fsg.py", "--resume", folder / "halves", *more]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(result.stdout.decode(errors="replace"))
    whole, halves = (torch.load(folder / name / "last.pt", map_location="cpu") for name in ("whole", "halves"))
    for part in ("model", "generator"):
        names = [k for k, v in whole[part].items() if torch.is_tensor(v) and not torch.equal(v, halves[part][k])]
        say(resumed=part, different=names[:5], ok=not names and result.returncode == 0)
    a, b = metrics(folder / "whole")[-1], metrics(folder / "halves")[-1]
    different = [k for k in a if a[k] != b.get(k) and k not in ("seconds", "images_per_s")]
    say(resumed="metrics", different=different, ok=not different)


def amp(dry: bool, scratch: Path) -> None:
    """Training in bfloat16 and in float16, and with the LSTM: training accuracy on digits after 6 epochs."""
    variants = {"amp": [*toy(dry, 6), "--amp", "bf16"]}
    if not dry:  # float16 is slow on a CPU
        variants["float16"] = [*toy(dry, 6), "--amp", "fp16"]
        variants["lstm"] = toy(dry, 6, "--hgs lstm --hidden 16")
    for name, flags in variants.items():
        with reported(run=name):
            row = train(flags, scratch / "amp", name)[-1]
            say(run=name, train_acc=row["train_acc"], ok=dry or row["train_acc"] > 0.7, seconds=row["seconds"])


def cuda_graphs(dry: bool, scratch: Path) -> None:
    """Training with --compile (CUDA graphs): training accuracy on digits after 6 epochs."""
    if dry:
        return say(skipped="no GPU, no CUDA graphs")
    row = train([*toy(dry, 6), "--compile"], scratch / "graphs", "compiled")[-1]
    say(run="compiled", train_acc=row["train_acc"], ok=row["train_acc"] > 0.7, seconds=row["seconds"])


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: step times.

METHODS = ["ste", "plain", "fsg", "gate", "fsg-all", "multifc", "fsg-lstm16", "fsg-flat", "fsg-lstm100"]
FEW = ["ste", "plain", "fsg", "gate", "fsg-all"]
# How a network runs: mode, precision, methods. tf32 is PyTorch's default: convolutions in TF32, the rest in float32.
EAGER = [("eager", "tf32", METHODS)]
GRAPHS = [("graphs", "tf32", METHODS)]
OTHER = [("eager", "bf16", FEW), ("eager", "fp32", FEW), ("graphs", "bf16", ["ste", "fsg", "gate"])]
COMPILE = [("compile", "tf32", FEW)]


def step_times(stage: Stage) -> None:
    if stage.day.dry:
        stage.item(
            "resnet8 eager", steps, 40, arch="resnet8", size=32, ways=[("eager", "tf32", FEW[::2])], seconds=0.01
        )
        stage.item("scan alone", scan_alone, 30)
        stage.record("ncu", status="skipped", error=["no GPU"])
        return
    for name in ("compile resnet32", "compile mamba-ssm"):
        wait_for(stage, name, 10)
    stage.item("resnet32 eager", steps, 40, arch="resnet32", size=32, ways=EAGER)
    stage.item("resnet32 graphs", steps, 60, arch="resnet32", size=32, ways=GRAPHS)
    stage.item("scan alone", scan_alone, 25)
    stage.item("resnet32, other precisions", steps, 40, arch="resnet32", size=32, ways=OTHER)
    stage.item("resnet18 eager", steps, 25, arch="resnet18", size=224, ways=[("eager", "tf32", FEW)])
    stage.item("resnet18 graphs", steps, 60, arch="resnet18", size=224, ways=[("graphs", "tf32", FEW)])
    stage.item("ncu", registers, 30)
    stage.item("resnet32 compile", steps, 30, arch="resnet32", size=32, ways=COMPILE)


def wait_for(stage: Stage, name: str, limit: float) -> None:
    """Wait for a background process, so that it does not disturb the timings. Kill it after `limit` seconds."""
    if name in stage.day.background:
        process, output, began = stage.day.background[name]
        end = min(stage.end, time.monotonic() + limit)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        if process.poll() is None:
            kill(process)
        seconds = round(time.monotonic() - began, 1)
        stage.record(
            name, status="failed" if process.returncode else "ok", seconds=seconds, error=last_lines(output, 3)
        )


def precision_is(precision: str) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False


def make_step(model, net, method: str, images, labels, precision: str):
    """A function that does one training step: the trainer's computations, without its metrics and augmentation."""
    import torch
    from torch.nn import functional as F

    import models

    device = images.device.type
    layers = models.binary_layers(net)
    generator = make_generator(method, layers) if layers else None
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=device == "cuda")

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        if generator:
            generator.generate()
        optimizer.step()

    return step


def compiled(net, how: str):
    import torch

    modes = {"graphs": "reduce-overhead", "compile": "default"}
    return torch.compile(net, mode=modes[how]) if how in modes else net


def steps(dry: bool, scratch: Path, arch: str, size: int, ways: list, seconds: float = 0.3) -> None:
    """Milliseconds per step at batch 128, and the ratio to STE's. seconds: how long to measure; 0: only compile."""
    import torch

    import models

    device, batch = ("cpu", 4) if dry else ("cuda", 128)
    torch.backends.cudnn.deterministic = True  # as with --deterministic
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    for how, precision, methods in ways:
        precision_is(precision)
        torch.compiler.reset()
        base, kept = None, {}
        for method in methods if seconds else methods[:2]:
            where = {"arch": arch, "size": size, "batch": batch, "how": how, "precision": precision, "method": method}
            with reported(**where):
                quantizer = "none" if method == "plain" else "dorefa"
                if quantizer not in kept:  # the methods share the network and its compiled code
                    torch.manual_seed(0)
                    net = models.build(arch, 10, quantizer, image_size=size).to(device)
                    state = {k: v.clone() for k, v in net.state_dict().items()}
                    kept[quantizer] = net, compiled(net, how), state
                net, model, state = kept[quantizer]
                net.load_state_dict(state)
                step = make_step(model, net, method, images, labels, precision)
                began = time.perf_counter()
                for _ in range(2 if dry else 6):  # a generator does all of its work from its third step on
                    step()
                synchronize(device)
                first = time.perf_counter() - began
                if not seconds:
                    net.eval()
                    with torch.no_grad():  # the trainers' tests, in batches of 500
                        model(images.repeat(4, 1, 1, 1)[:500])
                    net.train()
                    say(**where, compile_seconds=first)
                    continue
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                row = milliseconds(step, device, seconds)
                base = row["ms"] if method == "ste" else base
                row["ratio"] = row["ms"] / base if base else None
                row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
                say(**where, **row, warm_up_seconds=first)


def peak_rates(device: str) -> dict[str, float]:
    """Measure the exponentials per second of the special function units, and the float32 multiply-adds per second."""
    import torch

    import bench

    cuda = device == "cuda"
    programs = 64 * torch.cuda.get_device_properties(0).multi_processor_count if cuda else 1
    count, rates = 2000 if cuda else 5, {}
    out = torch.empty(programs * 1024, device=device)
    kernels = {"exponentials": (bench.exponentials, 1), "multiply_adds": (bench.multiply_adds, 4)}
    for name, (kernel, operations) in kernels.items():
        kernel[(programs,)](out, count)
        ms = milliseconds(lambda kernel=kernel: kernel[(programs,)](out, count), device, 0.1 if cuda else 0)["ms_min"]
        rates[name] = operations * count * programs * 1024 / ms * 1e3
    return rates


# Operations per weight at the paper's size (L = 6, d = 100, n = 16), from the top of selective_scan_triton.py:
# exponentials and reciprocals, which the special function units compute, and float32 multiply-adds as FLOPs / 2.
COUNTS = {"forward": (1863, 6_500), "backward": (2200, 20_500)}


def scan_alone(dry: bool, scratch: Path) -> None:
    """Forward and backward milliseconds of both kernels, and the fractions of the peak rates that they reach."""
    import torch

    device, archs = ("cpu", ["resnet8"]) if dry else ("cuda", ["resnet20", "resnet32"])
    if not dry:  # a copy's bytes are read once and written once
        x = torch.empty(2**30, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        say(copy_tb_per_s=2 * 2**30 / milliseconds(lambda: y.copy_(x), device, 0.1)["ms_min"] / 1e9)
        del x, y
    rates = peak_rates(device)
    say(peak_per_second=rates)
    for arch, layout in itertools.product(archs, ("last", "tails")[: 1 if dry else 2]):
        with reported(arch=arch, layout=layout):
            sizes = [5, 3] if dry else network_sizes(arch)
            N = sum(sizes)
            net, *_ = mamba_pair(device, *((4, 2, 2) if dry else (100, 16, 8)))
            past, v = torch.randn(1 if dry else 5, N, device=device), torch.randn(N, device=device)
            first = torch.randn(len(sizes), device=device, requires_grad=True)
            tokens = torch.cat([torch.full((1, N), 0.3, device=device), past]).T.unsqueeze(-1)
            run = (lambda: net.last(tokens)) if layout == "last" else lambda: net.tails(past, sizes, first)  # noqa: B023
            inputs = list(net.parameters())
            y = run()
            backward = lambda: torch.autograd.grad(y, inputs, v, retain_graph=True)  # noqa: B023
            backward()
            for way, function in (("forward", run), ("backward", backward)):
                row = milliseconds(function, device, 0.0 if dry else 0.4)
                if layout == "last" and not dry:
                    exponentials, multiply_adds = (N * count for count in COUNTS[way])
                    row["exponentials_of_peak"] = exponentials / rates["exponentials"] / row["ms"] * 1e3
                    row["multiply_adds_of_peak"] = multiply_adds / rates["multiply_adds"] / row["ms"] * 1e3
                say(arch=arch, layout=layout, weights=N, way=way, **row)


def one_scan(dry: bool, scratch: Path) -> None:
    """The program that ncu profiles: both kernels once at ResNet-20's size."""
    import torch

    net, *_ = mamba_pair("cuda", 100, 16, 8)
    sizes = network_sizes("resnet20")
    u = torch.randn(sum(sizes), 6, 1, device="cuda")
    net.last(u).sum().backward()
    net.tails(torch.randn(5, sum(sizes), device="cuda"), sizes, None).sum().backward()
    torch.cuda.synchronize()


def registers(dry: bool, scratch: Path) -> None:
    """Registers, occupancy and throughput of every kernel of the scans, by Nsight Compute."""
    command = ["ncu", "--set", "basic", "--clock-control", "none", "--kernel-name", "regex:^_(forward|backward|tails)"]
    one = child(one_scan, scratch, dry)
    result = subprocess.run([*command, "--launch-count", "12", *one], cwd=ROOT, capture_output=True, text=True)
    print(result.stdout[-20_000:], result.stderr[-3000:])
    wanted = "Duration|Registers Per Thread|Theoretical Occupancy|Achieved Occupancy|Compute \\(SM\\) Throughput"
    kernel = None
    for line in result.stdout.splitlines():
        if match := re.match(r"\s+(_\w+) .*\(\d+, \d+, \d+\)x", line):
            kernel = match[1]
        elif match := re.match(rf"\s+({wanted}|Memory Throughput|SM Frequency)\s+(\S+)\s+([\d.,]+)", line):
            say(kernel=kernel, **{f"{match[1]} ({match[2]})": match[3]})
    if result.returncode:
        raise RuntimeError(f"ncu ended with exit status {result.returncode}")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3: mamba-ssm.


def build_mamba_ssm(dry: bool, scratch: Path) -> None:
    """Compile the float32 kernels of mamba-ssm's selective scan as the module selective_scan_cuda."""
    from torch.utils.cpp_extension import load

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    os.environ.setdefault("MAX_JOBS", "4")  # there are four files
    folder, source = scratch / "selective_scan_cuda", scratch / "selective_scan"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(CARRIED / "mamba-ssm" / "csrc" / "selective_scan", source)
    folder.mkdir(exist_ok=True)
    # B and C always vary with time here, so the kernels for constant ones are left out: a quarter is compiled.
    switch = source / "static_switch.h"
    always = "#define ALWAYS(COND, NAME, ...) [&] { constexpr bool NAME = true; return __VA_ARGS__(); }()\n"
    switch.write_text(switch.read_text() + "\n" + always)
    for kernel in source.glob("*_kernel.cuh"):
        text = kernel.read_text()
        kernel.write_text(re.sub(r"BOOL_SWITCH\(params\.is_variable_", "ALWAYS(params.is_variable_", text))
    # The interface names all data types; those that are not compiled raise an error.
    function = "template void selective_scan_{0}_cuda<float, float>({1} &params, cudaStream_t stream);\n"
    stub = "template <> void selective_scan_{0}_cuda<{2}, {3}>({1} &, cudaStream_t) {{ throw 1; }}\n"
    declare = "template <typename I, typename W> void selective_scan_{0}_cuda({1} &params, cudaStream_t stream);\n"
    header = "#include <c10/cuda/CUDAStream.h>\n#include <torch/types.h>\n#include <c10/util/complex.h>\n"
    stubs = header + '#include "selective_scan.h"\n'
    for way, params in (("fwd", "SSMParamsBase"), ("bwd", "SSMParamsBwd")):
        (source / f"{way}.cu").write_text(
            f'#include "selective_scan_{way}_kernel.cuh"\n' + function.format(way, params)
        )
        stubs += declare.format(way, params)
        for i, w in itertools.product(("float", "at::Half", "at::BFloat16"), ("float", "c10::complex<float>")):
            if (i, w) != ("float", "float"):
                stubs += stub.format(way, params, i, w)
    (source / "stubs.cpp").write_text(stubs)
    undefined = [f"-U__CUDA_NO_{kind}__" for kind in ("HALF_OPERATORS", "HALF_CONVERSIONS")]
    undefined += [f"-U__CUDA_NO_{k}__" for k in ("BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS")]
    flags = ["-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "--split-compile=0"]
    load(
        "selective_scan_cuda",
        [str(source / name) for name in ("selective_scan.cpp", "stubs.cpp", "fwd.cu", "bwd.cu")],
        extra_include_paths=[str(source)],
        extra_cflags=["-O2"],
        extra_cuda_cflags=[*undefined, *flags],
        build_directory=str(folder),
        verbose=True,
    )


def mamba_ssm(stage: Stage) -> None:
    if stage.day.dry or not shutil.which("nvcc"):
        stage.record("compile", status="skipped", error=["no nvcc"])
        return stage.record("equal", status="skipped", error=["no nvcc"])
    if "compile mamba-ssm" not in stage.day.background:
        stage.day.start("compile mamba-ssm", build_mamba_ssm)
    wait_for(stage, "compile mamba-ssm", 90)
    folders = [ROOT, CARRIED / "mamba-ssm", stage.day.scratch / "selective_scan_cuda"]
    env = {"PYTHONPATH": os.pathsep.join(map(str, [*folders, os.environ.get("PYTHONPATH", "")]))}
    if stage.items["compile mamba-ssm"]["status"] != "ok":
        return stage.record("equal", status="skipped", error=["the extension did not compile"])
    stage.item("equal", mamba_ssm_equal, 30, env=env)
    stage.item("speed", mamba_ssm_speed, 40, env=env)
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfEs",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
        "-k",
        "mamba_ssm",
    ]
    stage.run("pytest", tests, 25, env=env)
    return None


def mamba_ssm_equal(dry: bool, scratch: Path) -> None:
    """SlowMamba(scan='mamba-ssm'), through the package's own import path, against ours and float64."""
    import torch

    import hypernet

    say(imports=str(hypernet.mamba_ssm_scan()), extension=__import__("selective_scan_cuda").__file__)
    net, book, _ = mamba_pair("cuda", 100, 16, 8)
    theirs = hypernet.SlowMamba(scan="mamba-ssm").cuda()
    theirs.load_state_dict(net.state_dict())
    say(backend=theirs.backend("cuda", torch.float32, 6))
    u, v = torch.randn(5000, 6, 1, device="cuda"), torch.randn(5000, device="cuda")
    a, b, c = theirs.last(u), net.last(u), book.last(u.double())
    check("mamba-ssm against ours, per-weight", relative(a, b), 1e-4)
    check("mamba-ssm against float64, per-weight", relative(a, c), 1e-4)
    grads = [torch.autograd.grad(y, one.parameters(), v) for y, one in ((a, theirs), (b, net))]
    for (name, _), x, y in zip(net.named_parameters(), *grads, strict=True):
        check(f"gradient of {name}, per-weight", relative(x, y), 1e-3)
    past, sizes = torch.randn(5, 7001, device="cuda"), [5000, 2000, 1]
    first, v = torch.randn(3, device="cuda"), torch.randn(7001, device="cuda")
    a, b = theirs.tails(past, sizes, first), net.tails(past, sizes, first)
    c = released_flat(theirs, past, sizes, first)
    check("mamba-ssm against ours, flat", relative(a, b), 1e-3)
    check("the released loop against ours, flat", relative(c, b), 1e-3)
    grads = [torch.autograd.grad(y, one.parameters(), v) for y, one in ((c, theirs), (b, net))]
    for (name, _), x, y in zip(net.named_parameters(), *grads, strict=True):
        check(f"gradient of {name}, flat", relative(x, y), 1e-2)


def released_flat(net, past, sizes: list[int], first):
    """The flat layout as the FSG authors' code calls mamba-ssm: the whole history of a layer as one sequence.

    The gate z and the softplus are computed in mamba-ssm's kernel, which is the fastest way to use it.
    """
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from torch.nn import functional as F

    outputs, A = [], -torch.exp(net.A_log)
    for i, part in enumerate(past.split(sizes, dim=1)):
        u = torch.cat([first[i].view(1), part.reshape(-1)]).view(1, 1, -1)  # [1, 1, L]
        x, z = (net.in_proj.weight @ u).chunk(2, dim=1)  # [1, d, L] each
        x = F.silu(net.conv1d(x)[..., : u.shape[-1]])
        dt, B, C = (net.x_proj.weight @ x).split([1, net.d_state, net.d_state], dim=1)
        delta = net.dt_proj.weight @ dt  # [1, d, L]
        bias = net.dt_proj.bias.float()
        y = selective_scan_fn(x, delta, A, B.contiguous(), C.contiguous(), net.D, z, bias, delta_softplus=True)
        outputs.append((net.out_proj.weight @ y)[0, 0, -part.shape[1] :])
    return torch.cat(outputs)


def mamba_ssm_speed(dry: bool, scratch: Path) -> None:
    """Forward and backward of the slow-net for all weights of ResNet-20: ours and mamba-ssm's."""
    import torch

    import hypernet

    sizes = network_sizes("resnet20")
    N = sum(sizes)
    ours, *_ = mamba_pair("cuda", 100, 16, 8)
    theirs = hypernet.SlowMamba(scan="mamba-ssm").cuda()
    theirs.load_state_dict(ours.state_dict())
    past, v = torch.randn(5, N, device="cuda"), torch.randn(N, device="cuda")
    first = torch.randn(len(sizes), device="cuda", requires_grad=True)
    tokens = torch.cat([torch.full((1, N), 0.3, device="cuda"), past]).T.unsqueeze(-1)
    variants = {
        "ours, per-weight": lambda: ours.last(tokens),
        "mamba-ssm, flat, layer by layer, whole history": lambda: released_flat(theirs, past, sizes, first),
        "ours, flat": lambda: ours.tails(past, sizes, first),
        "mamba-ssm, per-weight batches": lambda: theirs.last(tokens),
        "mamba-ssm, flat, forgotten tokens left out": lambda: theirs.tails(past, sizes, first),
    }
    base = None
    for name, run in variants.items():
        with reported(variant=name):

            def both(run=run):
                run().backward(v)

            for _ in range(2):
                both()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            row = milliseconds(both, "cuda", 0.8)
            forward = milliseconds(lambda run=run: run(), "cuda", 0.3)["ms"]
            base = base or row["ms"]
            more = {"forward_ms": forward, "ratio_to_ours": row["ms"] / base}
            say(variant=name, weights=N, **row, **more, peak_mb=torch.cuda.max_memory_allocated() / 2**20)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4: the grids of experiments.py. Several training processes share the GPU.


def start_mps(stage: Stage) -> dict[str, str]:
    """Start NVIDIA's multi-process service, which runs kernels of several processes at a time.

    Returns the environment variables for the processes that use it; none if it cannot be started. It changes no setting
    of the GPU.
    """
    if stage.day.dry or not shutil.which("nvidia-cuda-mps-control"):
        stage.record("MPS", status="skipped", error=["no GPU" if stage.day.dry else "no nvidia-cuda-mps-control"])
        return {}
    folder = stage.day.scratch / "mps"
    folder.mkdir(exist_ok=True)
    env = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    if stage.run("MPS daemon", ["nvidia-cuda-mps-control", "-d"], 10, env) == "ok":
        test = "import torch; x = torch.ones(1000, device='cuda'); print('RESULT', '{\"sum\": %d}' % x.sum().item())"
        if stage.run("MPS", [sys.executable, "-c", test], 25, env) == "ok":
            return env
        stop_mps(env)
    return {}


def stop_mps(env: dict[str, str]) -> None:
    if env:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            options = {"input": b"quit\n", "env": os.environ | env, "timeout": 10, "capture_output": True}
            subprocess.run(["nvidia-cuda-mps-control"], **options)


DECODING = 150  # seconds in which the images must be decoded
BIREALNET_FILE = "birealnet20.pt"  # a full-precision network, which BIREALNET trains
# Groups of grids of experiments.py: the full-precision network that they start from, and how many of their runs train
# at a time. The first group gets most of the GPU.
GRIDS = (
    (PRETRAINED, 16, ("protocol", "finals", "ablations", "search", "protocol-sgd")),
    (BIREALNET_FILE, 6, ("w1a1", "w1a1-finals")),
    (None, 3, ("scratch",)),
)
WORKERS = 16  # training processes; a CPU core for each
FOLDER = "--dataset folder --data-dir data/cifar10-jpeg"
BIREALNET = f"train_fsg.py --arch birealnet20 --quantizer none --opt sgdm --weight-decay 1e-4 --epochs 15 {FOLDER}"
BIREALNET += " --schedule cosine --name birealnet20 --out pretrained"


def grids(stage: Stage) -> None:
    """As many runs of the grids of experiments.py as the time allows. The results are in grids.tar.gz.

    Their commands name the images and the network as the rows in results/ do, so these rows are not run again. A second
    call on the same machine continues where the first one stopped.
    """
    day, home = stage.day, stage.day.scratch / "grids"
    for name in ("data", "results"):
        (home / name).mkdir(parents=True, exist_ok=True)
    if not day.dry:
        for known in (ROOT / "results").glob("*.csv"):
            if not (home / "results" / known.name).exists():  # an earlier call has more rows
                shutil.copy(known, home / "results")
        links = {"data/cifar10-jpeg": day.scratch / "images", PRETRAINED: CARRIED / PRETRAINED}
        if (CARRIED / BIREALNET_FILE).exists():
            links[BIREALNET_FILE] = CARRIED / BIREALNET_FILE
        for name, target in links.items():
            (home / name).unlink(missing_ok=True)
            (home / name).symlink_to(target)
    mps = start_mps(stage)
    try:
        seconds = stage.left() - 20  # the rest is for the runs to save their state
        stage.item("grids", train_grids, seconds + 18, env=mps, seconds=seconds, out=str(day.out))
    finally:
        stop_mps(mps)


class Workers:
    """Processes that train one run after the other, for run_grids() of experiments.py.

    A new process for each run would import torch, start CUDA and choose cuDNN's algorithms each time.
    """

    def __init__(self, jobs: int, scratch: Path, dry: bool):
        self.jobs, self.scratch, self.dry = jobs, scratch, dry
        self.free, self.all, self.stopping = queue.Queue(), [], threading.Event()
        self.ended = {"ok": 0, "failed": 0}
        for _ in range(jobs):
            self.free.put(self.start())

    def start(self) -> subprocess.Popen:
        with open(self.scratch / f"worker-{len(self.all)}.txt", "wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            where = {"cwd": self.scratch / "grids", "env": {**os.environ, "OMP_NUM_THREADS": "2"}}
            process = subprocess.Popen(child(train_runs, self.scratch, self.dry), **where, **pipes)
        self.all.append(process)
        return process

    def run(self, command: list[str]) -> tuple[int, str]:
        """Run a command: its exit code and its error. Waits for a free process."""
        import experiments

        worker = self.free.get()
        try:
            if self.stopping.is_set():
                raise experiments.Interrupted
            code, error = self.ask(worker, command)
            if worker.poll() is not None and not self.stopping.is_set():
                worker = self.start()
        finally:
            self.free.put(worker)
        self.ended["failed" if code == 1 else "ok"] += 1
        return code, error

    def ask(self, worker: subprocess.Popen, command: list[str]) -> tuple[int, str]:
        with contextlib.suppress(OSError):  # it has ended
            print(json.dumps(list(map(str, command[1:]))), file=worker.stdin, flush=True)
            if answer := worker.stdout.readline():
                code, error = json.loads(answer)
                if "CUDA error" in error:  # the process cannot go on
                    worker.kill()
                    worker.wait()
                return code, error
        code = worker.wait()
        return code or 1, f"the training process ended with exit status {code}"

    def stop(self) -> None:
        """Let the runs save their state and end. (A second signal would end them at once.)"""
        if not self.stopping.is_set():
            self.stopping.set()
            for worker in self.all:
                worker.terminate()

    def share(self, jobs: int):
        """These processes, for `jobs` runs at a time."""
        return SimpleNamespace(jobs=min(jobs, self.jobs), run=self.run, stop=self.stop)


def train_grids(dry: bool, scratch: Path, seconds: float, out: str) -> None:
    """Train the grids for that many seconds. Writes OUT/grids.tar.gz every 30 seconds and at the end."""
    import experiments

    end, home, reported = time.monotonic() + seconds, scratch / "grids", time.monotonic()
    os.chdir(home)
    workers = Workers(2 if dry else WORKERS, scratch, dry)
    limit = time.monotonic() + DECODING
    while not (dry or Path("data/cifar10-jpeg").exists()):  # until another process has decoded the images
        if time.monotonic() > limit:
            raise RuntimeError("the images were not decoded in time")
        time.sleep(0.1)

    def train(folder: str, grids: dict, flags: list[str], jobs: int) -> None:
        command = experiments.with_flags(flags)
        with contextlib.suppress(experiments.Interrupted, experiments.RunError):
            experiments.run_grids(grids, command, home / folder, home / "runs" / folder, workers.share(jobs))

    def pretrain() -> None:
        last = Path("pretrained/birealnet20/last.pt")
        words = [BIREALNET.split()[0], "--resume", last] if last.exists() else BIREALNET.split()
        with contextlib.suppress(experiments.Interrupted):
            code, error = workers.run([sys.executable, *words])
            say(trained=BIREALNET_FILE, code=code, error=error)
            if code == 0:
                last.with_name("best.pt").rename(BIREALNET_FILE)

    def train_group(pretrained: str | None, jobs: int, names: tuple) -> None:
        if pretrained == BIREALNET_FILE and not Path(pretrained).exists():
            pretrain()
        if pretrained and not Path(pretrained).exists():
            return
        flags = [*FOLDER.split(), *(["--pretrained", pretrained] if pretrained else [])]
        train("results", {name: experiments.GRIDS[name] for name in names}, flags, jobs)

    if dry:
        flags = "--dataset digits --val 200 --arch resnet8 --batch-size 32 --limit-steps 1 --epochs 1 --device cpu"
        ablations = {"ablations": experiments.GRIDS["ablations"][-1:]}
        threads = [threading.Thread(target=train, args=("results", ablations, flags.split(), 2))]
    else:
        # Rows that are known from CPUs are run again, for comparison.
        again = [experiments.Search(f"{experiments.FSG} --grad {grad}", ("1e-3",)) for grad in ("ste", "gate")]
        flags = [*FOLDER.split(), "--pretrained", PRETRAINED]
        threads = [threading.Thread(target=train, args=("check", {"protocol": again}, flags, 6))]
        threads += [threading.Thread(target=train_group, args=group) for group in GRIDS]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if time.monotonic() > end or (workers.ended["failed"] > 20 and not workers.ended["ok"]):
            workers.stop()
        for thread in threads:
            thread.join(1)
        if not dry and time.monotonic() > reported + 30:
            pack(home, Path(out))
            # What limits the runs, the CPUs or the GPU?
            reported, query = time.monotonic(), ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader"]
            with contextlib.suppress(OSError):  # no nvidia-smi
                gpu = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True).stdout.strip()
                say(cpu_load=os.getloadavg()[0], gpu=gpu)
    for worker in workers.all:
        with contextlib.suppress(OSError):  # it has ended
            worker.stdin.close()
    pack(home, Path(out))
    for file in sorted(home.glob("[rc]*/*.csv")):
        say(grid=f"{file.parent.name}/{file.stem}", rows=len(file.read_text().splitlines()) - 1)


def pack(home: Path, out: Path) -> None:
    """Write OUT/grids.tar.gz: the tables, the metrics of all runs, the logs, and the trained network."""
    part, patterns = home / "grids.part", ["results/*", "check/*", BIREALNET_FILE, "../worker-*.txt"]
    patterns += ["runs/*/*/*/metrics.csv", "runs/*/*/*/args.json"]
    with tarfile.open(part, "w:gz") as tar:
        for pattern in patterns:
            for path in sorted(home.glob(pattern)):
                with contextlib.suppress(OSError):  # it is being replaced
                    tar.add(path, path.name if ".." in pattern else path.relative_to(home))
    shutil.copy(part, out / "grids.tmp")
    (out / "grids.tmp").replace(out / "grids.tar.gz")


def graphed(net):
    """The network, with CUDA graphs for its forward and backward passes in training.

    The graphs launch the same kernels as the network. Their outputs and gradients are compared with the network's
    before the first use and in the third step. If they differ, or if no graph can be made, the network itself is used.
    """
    import torch
    from torch.nn import functional as F

    def difference(a, b) -> float:
        pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        if [x is None for x in a] != [y is None for y in b]:
            return math.inf
        return math.sqrt(sum((x - y).square().sum() for x, y in pairs) / sum(y.square().sum() for _, y in pairs))

    @contextlib.contextmanager
    def unchanged_buffers():  # BatchNorm's statistics
        before = [b.clone() for b in net.buffers()]
        try:
            yield
        finally:
            for b, value in zip(net.buffers(), before, strict=True):
                b.copy_(value)

    class Graphed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.graph, self.shape, self.calls = net, None, None, 0

        def forward(self, x):
            if not (net.training and torch.is_grad_enabled()):
                return net(x)
            self.calls += 1
            if self.calls == 1:
                self.capture(x)
            if self.graph is None or x.shape != self.shape:
                return net(x)
            if self.calls == 3:
                self.compare(x)
            return self.graph(x) if self.graph else net(x)

        def capture(self, x):
            try:
                with unchanged_buffers():
                    torch.cuda.make_graphed_callables(net, (x.clone(),), allow_unused_input=True)
                self.graph, self.shape = net.__dict__["forward"], x.shape
            except Exception as e:
                print(f"no CUDA graphs: {type(e).__name__}: {e}", flush=True)
            net.__dict__.pop("forward", None)
            if self.graph:
                self.compare(x)

        def compare(self, x):
            found, parameters = [], [p for p in net.parameters() if p.requires_grad]
            for function in (net, self.graph):
                with unchanged_buffers():
                    logits = function(x)
                    loss = F.cross_entropy(logits, torch.arange(len(x), device=x.device) % logits.shape[1])
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                    gradients = [g if g is None else g.clone() for g in gradients]
                    statistics = [b.clone() for b in net.buffers()]
                found.append(([logits.detach().clone()], gradients, statistics))
            errors = [difference(b, a) for a, b in zip(*found, strict=True)]
            print(f"graphs, step {self.calls}: differences {errors}", flush=True)
            if not max(errors) < 0.05:
                print("the graphs differ, so they are not used", flush=True)
                self.graph = None

    return Graphed()


def train_runs(dry: bool, scratch: Path) -> None:
    """A training process: runs the commands on standard input, and writes their exit codes and errors."""
    import gc

    import torch

    import data
    import models
    import runs
    import train_fsg

    answers, parallel, FSG = os.fdopen(os.dup(1), "w"), runs.parallel, train_fsg.FSG
    os.dup2(2, 1)  # what the trainers print goes to the log
    sys.path.insert(0, str(ROOT / "results"))
    for line in sys.stdin:
        script, *flags = json.loads(line)
        name, error = Path(script).stem, ""
        print("===", line, flush=True)
        # train_proxconnect.py changes constants of its quantizers during training, which a graph would keep.
        graphs = not dry and name != "train_proxconnect"
        runs.parallel = (lambda net, args, device: graphed(net)) if graphs else parallel
        try:
            code = importlib.import_module(name).main(flags)
        except (runs.RunError, data.DataError, models.ModelError) as e:
            code, error = 1, f"error: {e}"
        except SystemExit as e:  # wrong flags
            code, error = 2, f"error: exit {e.code}"
        except Exception as e:
            traceback.print_exc()
            code, error = 1, f"error: {type(e).__name__}: {e}"
        train_fsg.FSG = FSG  # search.py replaces it
        print(json.dumps([code, " ".join(error.split())]), file=answers, flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def unpack(dry: bool, scratch: Path) -> None:
    """Unpack the JPEG images in gpu-day/ and decode them once. The trainers then find the cached images."""
    import data

    part, whole = scratch / "images.part", scratch / "images"
    if not whole.exists():  # as after an earlier call
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(CARRIED / "cifar10-jpeg.tar.xz") as tar:
            tar.extractall(part, filter="data")
        data.load("folder", part, "cpu")
        part.replace(whole)
    say(decoded=[path.name for path in whole.glob(".*.pt")])


# ---------------------------------------------------------------------------------------------------------------------
# --prepare: what the GPU machine needs and cannot download.


def prepare(archive: Path, pretrained: Path) -> None:
    """Fill gpu-day/ with the images, the full-precision network and mamba-ssm's source. It must stay below 60 MiB.

    archive: a tar archive of CIFAR-10 as images, with train/CLASS/* and test/CLASS/*.
    """
    import models
    import runs

    if not archive.is_file() or not tarfile.is_tarfile(archive):
        raise SystemExit(
            f"error: {archive} is not a tar archive of images: name one with train/CLASS/* and test/CLASS/*"
        )
    args = SimpleNamespace(pretrained=pretrained, arch="resnet20", dataset="folder", eval_only=False)
    try:
        runs.load_weights(models.build("resnet20", 10, "none"), args, None)
    except runs.RunError as e:
        raise SystemExit(f"error: {e}") from None
    CARRIED.mkdir(exist_ok=True)
    shutil.copyfile(archive, CARRIED / "cifar10-jpeg.tar.xz")
    shutil.copyfile(pretrained, CARRIED / PRETRAINED)
    prepare_mamba_ssm()
    size = sum(path.stat().st_size for path in CARRIED.rglob("*") if path.is_file())
    print(f"gpu-day/ has {size / 2**20:.1f} MiB")
    if size > 60 * 2**20:
        raise SystemExit("error: gpu-day/ has more than 60 MiB: delete a part of it")


def prepare_mamba_ssm() -> None:
    """Copy mamba-ssm's selective scan from its source package: the CUDA source, the interface, the licence."""
    folder = CARRIED / "mamba-ssm"
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "-d", work, "mamba-ssm==2.3.2.post1"]
        if subprocess.run(command, env={**os.environ, "MAMBA_SKIP_CUDA_BUILD": "TRUE"}).returncode:
            raise SystemExit("error: pip could not download mamba-ssm (see above): check the connection")
        with tarfile.open(next(Path(work).glob("*.tar.gz"))) as tar:
            tar.extractall(work, filter="data")
        source = next(path for path in Path(work).iterdir() if path.is_dir())
        shutil.copytree(source / "csrc" / "selective_scan", folder / "csrc" / "selective_scan")
        shutil.copy(source / "LICENSE", folder)
        package = folder / "mamba_ssm"
        modules = ("ops/selective_scan_interface", "ops/triton/layer_norm", "utils/torch", "utils/determinism")
        for name in (f"{module}.py" for module in modules):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "mamba_ssm" / name, package / name)
        for name in ("", "ops", "ops/triton", "utils"):  # the original __init__.py imports the language models
            (package / name / "__init__.py").write_text("")


# ---------------------------------------------------------------------------------------------------------------------
# The day.

STAGES = {1: correctness, 2: step_times, 3: mamba_ssm, 4: grids}
ITEMS = [machine, kernel_last, kernel_tails, smallest, generators, resume, amp, cuda_graphs, steps, scan_alone]
ITEMS += [one_scan, registers, build_mamba_ssm, mamba_ssm_equal, mamba_ssm_speed, unpack, train_grids, train_runs]
ITEMS = {function.__name__: function for function in ITEMS}


def start_background(day: Day, stages) -> None:
    """Start what needs the CPUs more than the GPU beside the first stages: compilers, and the decoding of images."""
    if 4 in stages:
        day.start("images", unpack)
    if 3 in stages and shutil.which("nvcc"):
        day.start("compile mamba-ssm", build_mamba_ssm)
    if 2 in stages:
        day.start("compile resnet32", steps, arch="resnet32", size=32, ways=[("graphs", "tf32", FEW)], seconds=0)


def run_day(out: Path, minutes: float, stages: list[int], dry: bool) -> None:
    began = time.monotonic()
    ends = plan(minutes, stages, DRY_SECONDS if dry else SECONDS)
    day = Day(out, dry)
    day.log(f"stages and when they end, in seconds: {ends}; left out: {sorted(set(stages) - set(ends))}")
    try:
        if not dry:
            start_background(day, ends)
        for number, end in ends.items():
            stage = Stage(number, day, began + end)
            try:
                STAGES[number](stage)
            except Exception as e:  # an error in one stage must not end the others
                stage.record("stage", status="failed", error=[f"{type(e).__name__}: {e}"[:500]])
                day.log(f"stage {number} failed: {type(e).__name__}: {e}")
            stage.write()
    finally:
        day.close()
    print(summary(out, ends))


def summary(out: Path, stages) -> str:
    """A short table of all items and their most telling figures."""
    lines = []
    for number in stages:
        content = json.loads((out / FILES[number]).read_text())
        lines.append(f"\nstage {number} ({FILES[number]}), {content['seconds']} s")
        for name, item in content["items"].items():
            results = item.get("results", [])
            bad = [r for r in results if not r.get("ok", True)]
            lines.append(f"  {name:24} {item.get('status', ''):11} {item.get('seconds', '')!s:>6} s  {figures(item)}")
            lines += [f"      ! {json.dumps(r)[:170]}" for r in bad[:3]]
            if item.get("status") in ("failed", "time limit") and not bad:
                lines += [f"      ! {line[:170]}" for line in item.get("error", [])[-2:]]
    return "\n".join(lines)


def figures(item: dict) -> str:
    results, parts = item.get("results", []), []
    for r in results:
        if "method" in r and "ms" in r:
            ratio = "" if r["ratio"] is None else f" ({r['ratio']:.2f})"
            parts.append(f"\n      {r['how']:8}{r['precision']:6}{r['method']:12}{r['ms']:9.3f} ms{ratio}")
        elif "variant" in r and "ms" in r:
            parts.append(f"\n      {r['variant']:48}{r['ms']:9.3f} ms ({r['ratio_to_ours']:.2f})")
        elif "layout" in r and "ms" in r:
            share = "".join(f", {k.split('_of')[0]} {r[k]:.0%}" for k in r if k.endswith("of_peak"))
            parts.append(f"\n      {r['arch']} {r['layout']:6}{r['way']:9}{r['ms']:9.3f} ms{share}")
    checks = [r for r in results if "check" in r]
    if checks:
        parts.append(f"{sum(r['ok'] for r in checks)} of {len(checks)} checks")
    return " ".join(parts)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=10, help="time of all stages (default: %(default)s)")
    stages = "numbers of the stages to run (default: all)"
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES), choices=STAGES, help=stages)
    parser.add_argument("--dry-run", action="store_true", help="run all stages at toy size on the CPU")
    parser.add_argument("--prepare", type=Path, nargs=2, metavar=("IMAGES", "PRETRAINED"), help="fill gpu-day/")
    parser.add_argument("--item", choices=ITEMS, help=argparse.SUPPRESS)  # one item, in this process
    parser.add_argument("--arguments", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.prepare:
        prepare(*args.prepare)
    elif args.item:
        ITEMS[args.item](args.dry_run, args.scratch, **json.loads(args.arguments))
    elif args.out is None:
        parser.error("--out is missing: name the folder of the results")
    else:
        run_day(args.out.resolve(), args.minutes, sorted(set(args.stages)), args.dry_run)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
