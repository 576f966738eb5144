"""How long a training step takes, and what takes it; how fast the selective scan is, the quantizers, many processes.

    python bench.py step                                        # ResNet-20, batch 128, every generator
    python bench.py step --arch resnet20 resnet56 resnet110 --grads ste fsg-mamba fsg-flat --rounds 7
    python bench.py step --device cuda --grads ste ste+amp ste+compile fsg-mamba fsg-mamba+amp+compile
    python bench.py scan                                        # Mamba alone, on ResNet-20's weights: ten minutes
    python bench.py quantizers                                  # every weight quantizer on one large layer
    python bench.py scale                                       # a generator shared by 1, 2 and 4 processes, on CPUs

The variants run in turn, one step each, round after round, so that a machine whose speed drifts slows all of them
alike (scan: those of one layout, then those of the next). Given are medians, and the median of the ratio to the first
row's (`ste`, `fused`) within a round. `plain` is the same network made of ordinary nn.Conv2d layers; `ste` − `plain` is
therefore what binary weights cost. Memory is what one more step takes at its peak, on top of what is held between
steps. Results also go to a JSON file.
"""

import argparse
import ctypes
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import data
import hypernet
import models
import selective_scan

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# fsg-sampled is fsg-mamba with --hyper-sample, fsg-flat with --history flat. +amp, +compile: the trainers' flags.
GRADS = ("plain", "ste", "fcgrad", "multifc", "lstmfc", "fsg-gate", "fsg-lstm", "fsg-mamba", "fsg-sampled", "fsg-flat")
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds between laps, the device's work included."""

    def __init__(self, device: torch.device):
        self.device, self.laps = device, {}
        self.lap()

    def lap(self, name: str | None = None) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if name:
            self.laps[name] = now - self.last
        self.last = now


def peak_memory(device: torch.device, function) -> float | None:
    """Megabytes that function() takes at its peak on top of what is held before it; None where that cannot be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():  # Linux only
        return None
    read = lambda key: int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that taking it again is seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:  # a sandbox
        return None
    before = read("VmRSS:")
    function()
    return (read("VmHWM:") - before) / 2**10


def table(title: str, rows: dict[str, dict], **columns: str) -> None:
    """rows: name -> figures; columns: heading -> format of the figure of that name (None prints as –)."""
    out = Table(title=title)
    out.add_column("")
    for name in columns:
        out.add_column(name.replace("_", " "), justify="right")
    for name, row in rows.items():
        cells = ("–" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items())
        out.add_row(name, *cells)
    console.print(out)


# ---------------------------------------------------------------------------------------------------------------------
# Whole training steps.


def make_generator(grad: str, layers, args):
    """The gradient generator called `grad` for these layers (None for plain)."""
    size = {"d_state": args.d_state, "d_conv": args.d_conv, "expand": args.expand, "hidden": args.hidden}
    mamba = {**size, "scan": args.scan}
    makers = {
        "plain": lambda: None,
        "ste": lambda: hypernet.STE(layers),
        "fcgrad": lambda: hypernet.FCGrad(layers, args.hidden),
        "multifc": lambda: hypernet.MultiFC(layers, args.hidden),
        "lstmfc": lambda: hypernet.LSTMFC(layers, args.hidden),
        "fsg-gate": lambda: hypernet.GatedHistory(layers),
        "fsg-lstm": lambda: hypernet.FSG(layers, hgs="lstm", **size),
        "fsg-mamba": lambda: hypernet.FSG(layers, **mamba),
        "fsg-sampled": lambda: hypernet.FSG(layers, hyper_sample=args.hyper_sample, **mamba),
        "fsg-flat": lambda: hypernet.FSG(layers, history="flat", **mamba),
    }
    return makers[grad]()


def make_step(grad: str, arch: str, args, device):
    """A function that takes one training step as the trainer does, and returns its parts' seconds."""
    torch.manual_seed(0)
    grad, *how = grad.split("+")
    net = models.build(arch, 10, "none" if grad == "plain" else "dorefa").to(device)
    mode = "reduce-overhead" if device.type == "cuda" else "default"  # as in runs.py
    model = torch.compile(net, mode=mode) if "compile" in how else net
    generator = make_generator(grad, models.binary_layers(net), args)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def step(images, labels):
        watch = Stopwatch(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled="amp" in how):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        watch.lap("network")
        if generator:
            generator.generate()
        watch.lap("generator")
        optimizer.step()
        watch.lap("optimizer")
        return watch.laps

    return step


def bench_step(arch: str, args, device: torch.device) -> dict:
    """Median milliseconds a step, their parts and peak memory for every variant; printed, and returned for the JSON."""
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, device=device)  # a CIFAR's worth
    labels = torch.randint(10, (50_000,), device=device)
    mean = std = torch.full((3,), 128.0, device=device)
    batches = data.ResidentBatches(images, labels, mean, std, 10, args.batch_size, True, 0, crop=4, flip=True)
    steps = {grad: make_step(grad, arch, args, device) for grad in args.grads}
    stream = (batch for number in itertools.count() for batch in batches.epoch(number))
    rounds, began = [], time.perf_counter()
    warm_up = 3  # a generator's third step is the first that does everything
    while len(rounds) < warm_up + args.rounds and (
        len(rounds) <= warm_up or time.perf_counter() - began < args.seconds
    ):
        watch = Stopwatch(device)
        images, labels = next(stream)
        watch.lap("data")
        rounds.append({"data": watch.laps["data"], **{grad: step(images, labels) for grad, step in steps.items()}})
    rounds = rounds[warm_up:]

    base = "ste" if "ste" in args.grads else args.grads[0]
    rows = {}
    for g in args.grads:
        total = [sum(r[g].values()) + r["data"] for r in rounds]
        row = rows[g] = {"ms": 1e3 * statistics.median(total)}
        row["ratio"] = statistics.median(sum(r[g].values()) / sum(r[base].values()) for r in rounds)
        for part in ("data", "network", "generator", "optimizer"):
            seconds = [r[part] if part == "data" else r[g][part] for r in rounds]
            row[f"{part}_ms"] = 1e3 * statistics.median(seconds)
            row[part] = statistics.median(s / t for s, t in zip(seconds, total, strict=True))
        row["MB"] = peak_memory(device, lambda step=steps[g]: step(images, labels))
    title = f"{arch}, batch {args.batch_size}, {describe(device)}: one step, median of {len(rounds)}, ratio to {base}"
    parts = {"data": ".2%", "network": ".1%", "generator": ".1%", "optimizer": ".1%"}
    table(title, rows, ms=".1f", ratio=".3f", generator_ms=".1f", **parts, MB=".0f")
    return {"rounds": len(rounds), "variants": rows}


# ---------------------------------------------------------------------------------------------------------------------
# The slow-nets alone.

if triton:

    @triton.jit
    def _exponentials(out, COUNT: tl.constexpr):
        lane = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        x = lane * 1e-9
        for _ in range(COUNT):
            x = tl.exp2(-x)
        tl.store(out + lane, x)


def peak_rate(device: torch.device) -> float | None:
    """What bounds the fused scan, measured: multiply-adds/s of a CPU's vector units, or exponentials/s of a GPU's."""

    def best(function, work: float) -> float:
        function()
        seconds = []
        for _ in range(5):
            watch = Stopwatch(device)
            function()
            watch.lap("run")
            seconds.append(watch.laps["run"])
        return work / min(seconds)

    if device.type == "cuda" and triton:
        programs, count = 64 * torch.cuda.get_device_properties(device).multi_processor_count, 2000
        out = torch.empty(programs * 1024, device=device)
        return best(lambda: _exponentials[(programs,)](out, count), programs * 1024 * count)
    library = selective_scan.library(6) if device.type == "cpu" else ""
    if isinstance(library, str):
        return None
    threads, count = torch.get_num_threads(), 100_000_000
    lanes = library.multiply_adds(ctypes.c_int64(1), ctypes.c_int(1))
    return best(lambda: library.multiply_adds(ctypes.c_int64(count), ctypes.c_int(threads)), lanes * count * threads)


def operations(layout: str, way: str, weights: int, length: int, d: int, n: int, k: int, on_cpu: bool) -> float:
    """The least of the bounding operation that the kernel's arithmetic needs: multiplications and multiply-adds on a
    CPU, as selective_scan_cpu.cpp's header counts them, exponentials alone on a GPU.

    For the flat layout: of the `weights` newest tokens, as if none before them had to be scanned.
    """
    per_weight = layout == "per-weight"
    tokens, own = (length, length - 1) if per_weight else (1, 1)  # a layer's weights share a first token
    scanned = own * d * n  # exponentials of the scan
    if not on_cpu:
        return weights * (scanned + 2 * tokens * d)
    projections = lambda count: (count * (n + 1) + n) * d
    taps = lambda first: d * (sum(min(t + 1, k) for t in range(first, tokens)) if per_weight else k)
    exponential = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 6
    once = projections(own) + taps(tokens - own) + own * d * (9 + 2 * exponential)  # silu and softplus
    once += d * (3 + exponential)  # the gate's silu
    if way == "forward":  # a power by degree 2, 3, and the output; flat: a decay, by 4, a state's input, the output
        return weights * (scanned * (4 if per_weight else 7) + once)
    # All of it again; the flat layout's adjoint takes 8.
    back = 2 * projections(tokens) + (2 if per_weight else 1) * taps(0) + own * d * 4
    return weights * (scanned * (7 if per_weight else 15) + once + back)


def bench_scan(args, device: torch.device) -> dict:
    """Forward and backward of the slow-nets for all layouts and backends that run here; printed, and returned."""
    layers = models.binary_layers(models.build(args.arch[0], 10, "dorefa"))
    sizes = [layer.weight.numel() for layer in layers]
    torch.manual_seed(0)
    past, first = torch.randn(args.length, sum(sizes), device=device), torch.randn(len(sizes), device=device)
    layer_of = torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))
    tokens = torch.cat([first[layer_of].unsqueeze(0), past]).T.unsqueeze(-1)  # [N, 1 + l, 1], as FSG makes it
    v = torch.randn(sum(sizes), device=device)
    slow = hypernet.SlowMamba(args.d_state, args.d_conv, args.expand, "reference").to(device)
    lstm = hypernet.SlowLSTM(args.hidden).to(device)
    runs = {}
    for layout in ("per-weight", "flat"):
        for scan in args.scans:
            net = hypernet.SlowMamba(args.d_state, args.d_conv, args.expand, scan).to(device)
            net.load_state_dict(slow.state_dict())
            try:
                net.backend(device, torch.float32, tokens.shape[1] if layout == "per-weight" else None)
            except RuntimeError as e:
                console.print(f"{layout}, {scan}: left out, {e}")
                continue
            per_weight, flat = lambda net=net: net.last(tokens), lambda net=net: net.tails(past, sizes, first)
            runs[f"{layout}, {scan}"] = per_weight if layout == "per-weight" else flat
    if args.lstm:
        runs["per-weight, LSTM"] = lambda: lstm.last(tokens)
        runs["per-weight, nn.LSTM alone"] = lambda: lstm.lstm(tokens)[0][:, -1].sum(1)

    # Those that are compared take turns, and no others: what frees gigabytes slows for seconds what comes after it.
    groups = itertools.groupby(runs, key=lambda name: (name.partition(",")[0], "LSTM" in name))
    rates = [peak_rate(device)]  # and once more at the end: it is to be the most that the machine can do
    rounds = {name: [] for name in runs}
    for name in (n for _, names in groups for n in list(names) * (args.rounds + 1)):
        watch = Stopwatch(device)
        y = runs[name]()
        watch.lap("forward")
        y.backward(v)
        watch.lap("backward")
        rounds[name].append(watch.laps)
    rounds = {name: laps[1:] for name, laps in rounds.items()}  # the first round warms up
    rates.append(peak_rate(device))
    rate, rows = max(rates) if all(rates) else None, {}
    for name, run in runs.items():
        layout, _, backend = name.partition(", ")
        row = rows[name] = {k: 1e3 * statistics.median(r[k] for r in rounds[name]) for k in ("forward", "backward")}
        base = "per-weight, nn.LSTM alone" if "LSTM" in name else f"{layout}, {args.scans[0]}"
        if base in rounds:
            pairs = zip(rounds[name], rounds[base], strict=True)
            row["ratio"] = statistics.median(sum(a.values()) / sum(b.values()) for a, b in pairs)
        row["MB"] = peak_memory(device, lambda run=run: run().backward(v))
        if "LSTM" in name:
            continue
        shape = (sum(sizes), tokens.shape[1], args.expand, args.d_state, args.d_conv)
        updates = sum(sizes) * (tokens.shape[1] if layout == "per-weight" else 1) * args.expand * args.d_state
        for way, short in (("forward", "fwd"), ("backward", "bwd")):
            row[f"{short}_G_updates/s"] = updates / row[way] / 1e6
            if rate and backend == "fused":
                least = operations(layout, way, *shape, device.type == "cpu") / rate
                row[f"{short}_of_bound"] = 1e3 * least / row[way]
    title = f"{args.arch[0]}'s {sum(sizes):,} weights, {describe(device)}: ms, median of {args.rounds}"
    updates = {f"{way}_G_updates/s": ".2f" for way in ("fwd", "bwd")}
    bound = {f"{way}_of_bound": ".0%" for way in ("fwd", "bwd")}
    table(title, rows, forward=".1f", backward=".1f", ratio=".2f", MB=".0f", **updates, **bound)
    what = "multiply-adds" if device.type == "cpu" else "exponentials"
    if rate:
        console.print(f"the machine's bound, measured: {rate / 1e9:.1f} G {what}/s")
    return {"rounds": args.rounds, "peak_rate": rate, "variants": rows}


# ---------------------------------------------------------------------------------------------------------------------
# The weight quantizers.

OPTIONS = {"bihalf-prune": {"prune": 0.4}, "bnn+": {"mu": 5.0}, "bnn++": {"mu": 5.0}, "pc": {"rho": 0.1}}


def bench_quantizers(args, device: torch.device) -> dict:
    """Median milliseconds of each weight quantizer, forward and backward, on a ResNet-18's largest layer."""
    w = torch.randn(512, 4608, device=device, requires_grad=True)
    v = torch.randn_like(w)
    quantizers = {name: q for name, q in models.WEIGHT_QUANTIZERS.items() if name != "identity"}
    rounds = []
    for _ in range(3 + args.rounds):
        laps = {}
        for name, quantizer in quantizers.items():
            watch = Stopwatch(device)
            out = quantizer(w, **OPTIONS.get(name, {}))
            watch.lap("forward")
            out.backward(v)
            watch.lap("backward")
            laps[name], w.grad = watch.laps, None
        rounds.append(laps)
    rounds, rows = rounds[3:], {}
    for name in quantizers:
        ratios = [sum(r[name].values()) / sum(r["bwn-f"].values()) for r in rounds]
        rows[name] = {way: 1e3 * statistics.median(r[name][way] for r in rounds) for way in ("forward", "backward")}
        rows[name]["ratio"] = statistics.median(ratios)
    title = f"512×4,608 weights, {describe(device)}: ms, median of {args.rounds}; ratio to bwn-f, a sign and a scale"
    table(title, rows, forward=".2f", backward=".2f", ratio=".2f")
    return {"variants": rows}


# ---------------------------------------------------------------------------------------------------------------------
# A generator shared by several processes.


def share_generator(rank: int, processes: int, grad: str, args, folder: str) -> None:
    """One of the processes; its figures go to a file in the folder."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=processes)
    torch.manual_seed(0)
    layers = models.binary_layers(models.build(args.arch[0], 10, "dorefa"))
    generator = make_generator(grad, layers, args)
    talking = []

    def timed(function):  # what the processes say to each other, waiting for the slowest included
        def call(part):
            began = time.perf_counter()
            out = function(part)
            talking.append(time.perf_counter() - began)
            return out

        return call

    generator.gather, generator.total = timed(generator.gather), timed(generator.total)

    def step():
        for layer in layers:
            layer.weight.grad = torch.randn_like(layer.weight)
        if processes > 1:
            dist.barrier()
        talking.clear()
        wall, own = time.perf_counter(), time.process_time()
        generator.generate()
        return {"ms": time.perf_counter() - wall, "cpu_ms": time.process_time() - own, "talking": sum(talking)}

    rounds = [step() for _ in range(3 + args.rounds)][3:]
    row = {key: 1e3 * statistics.median(r[key] for r in rounds) for key in rounds[0]}
    row["talking"] /= row["ms"]
    row["history"] = generator.history.shape[1]
    row["MB_held"] = sum(b.numel() * b.element_size() for b in generator.buffers()) / 2**20
    row["MB_peak"] = peak_memory(torch.device("cpu"), step)
    Path(folder, f"{rank}.json").write_text(json.dumps(row))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def bench_scale(args) -> dict:
    """generate() of each generator in 1, 2, … processes of one thread; of every figure the largest of all processes."""
    rows = {}
    for grad in args.grads:
        for processes in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                inputs = (processes, grad, args, folder)
                torch.multiprocessing.spawn(share_generator, inputs, nprocs=processes)
                found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]
            known = {key: [f[key] for f in found if f[key] is not None] for key in found[0]}
            rows[f"{grad}, {processes}"] = {key: max(values, default=None) for key, values in known.items()}
    title = (
        f"{args.arch[0]}: generate(), processes of 1 thread on {torch.get_num_threads()} cores, median of {args.rounds}"
    )
    table(title, rows, ms=".0f", cpu_ms=".0f", talking=".1%", history=",d", MB_held=".1f", MB_peak=".1f")
    return {"variants": rows}


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "scan", "quantizers", "scale"])
    parser.add_argument("--arch", nargs="+", default=["resnet20"], choices=models.ARCHS, help="scan, scale: the first")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, help="to measure, after the warm-up (default: 20; scan 5)")
    parser.add_argument("--seconds", type=float, default=300, help="step: begin no round after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--d-conv", type=int, default=8)
    parser.add_argument("--expand", type=int, default=100)
    parser.add_argument("--length", type=int, default=5, help="scan: gradients of history a weight")
    known = [f"{grad}{more}" for more in ("", "+amp", "+compile", "+amp+compile") for grad in GRADS]
    parser.add_argument(
        "--grads",
        nargs="+",
        choices=known,
        metavar="GRAD",
        help=f"step, scale: {', '.join(GRADS)}; step: with +amp, +compile",
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], help="scale")
    parser.add_argument("--hyper-sample", type=float, default=0.125, help="step: of fsg-sampled (default: 0.125)")
    parser.add_argument("--scan", default="auto", choices=["auto", "fused", "mamba-ssm", "reference"], help="step")
    scans = ["fused", "reference", "mamba-ssm"]
    parser.add_argument("--scans", nargs="+", default=scans, choices=scans, help="scan: the variants")
    parser.add_argument("--lstm", action="store_true", help="scan: the LSTM too, against nn.LSTM, which takes 11 GB")
    parser.add_argument("--json", help="where the figures go (default: runs/bench-step.json, …)")
    args = parser.parse_args(argv)
    shared = ["fsg-mamba", "fsg-flat", "multifc"]
    args.grads = args.grads or (shared if args.what == "scale" else list(GRADS))
    args.rounds = (5 if args.what == "scan" else 20) if args.rounds is None else args.rounds
    for grad in args.grads if args.what == "scale" else ():
        if grad not in GRADS or grad in ("plain", "ste"):
            parser.error(f"{grad} has no hypernetworks to share: use generators such as {', '.join(shared)}")
    if min(args.processes) < 1:
        parser.error(f"--processes must be at least 1; it is {min(args.processes)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1; it is {args.rounds}")
    device, file = torch.device(args.device), Path(args.json or f"runs/bench-{args.what}.json")
    result = {"torch": torch.__version__, "machine": describe(device), **vars(args)}
    if args.what == "scan":
        result |= bench_scan(args, device)
    elif args.what == "quantizers":
        result |= bench_quantizers(args, device)
    elif args.what == "scale":
        result |= bench_scale(args)
    else:
        result["archs"] = {arch: bench_step(arch, args, device) for arch in args.arch}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {file}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (ValueError, RuntimeError) as e:
        raise SystemExit(f"error: {e}") from None
