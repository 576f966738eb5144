"""Benchmarks: a training step, the selective scan, the weight quantizers, and generators over several processes.

    python bench.py step                                        # ResNet-20, batch 128, every generator
    python bench.py step --arch resnet20 resnet56 resnet110 --grads ste fsg-mamba fsg-flat --rounds 7
    python bench.py step --grads pytorch pytorch+memory ste gate brevitas parq  # compared with other people's code
    python bench.py step --device cuda --grads ste ste+amp ste+compile fsg-mamba fsg-mamba+amp+compile
    python bench.py scan                                        # Mamba alone, on ResNet-20's weights: ten minutes
    python bench.py quantizers                                  # every weight quantizer on one large layer
    python bench.py scale                                       # a generator over 1, 2 and 4 CPU processes

The variants take turns, one step each per round, so a change in the machine's speed affects all of them alike. (`scan`
measures the variants of one layout before those of the next.) The tables give medians over the rounds. The column
`ratio` is the median, over the rounds, of a variant's time divided by the baseline's time in the same round. The
baseline is `pytorch` (without it `ste`) or `fused`. Memory is the peak of one more step, less the memory in use between
steps. The results are also written to a JSON file.

The variants of `step` are those of train_fsg.py, with its optimizer, metrics and check for NaN. `plain` is its network
in full precision, so `ste` − `plain` is the cost of binary weights. Three variants do not use this repository's layers:

    pytorch     a straight-through estimator as users write it by hand, w + (sign(w) − w).detach(), in a bare loop,
                with channels_last and the fused Adam
    brevitas    brevitas' binary layers (SignedBinaryWeightPerTensorConst) in the loop of `pytorch`
    parq        torchao's PARQ, per channel, in the loop of `pytorch`

The last two need their packages. They run only if --grads names them. On a CPU these three run in processes of their
own, with PyTorch's default memory settings, as they would in a program of their own. With the suffix +memory they have
the settings of the trainers (runs.keep_freed_memory), which save time.

Copy with: models.py, binarize.py, quantizers.py, hypernet.py, metaquant.py, gate.py, data.py, runs.py,
selective_scan.py, selective_scan_cpu.cpp, selective_scan_triton.py.
"""

import argparse
import ctypes
import itertools
import json
import os
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
from torch import nn
from torch.nn import functional as F

import data
import gate
import hypernet
import metaquant
import models
import runs
import selective_scan

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# fsg-all is fsg-mamba with --hyper-sample 1, fsg-flat is fsg-mamba with --history flat. The suffixes +amp and
# +compile stand for the trainers' flags of these names; +memory: see elsewhere().
OURS = ("plain", "ste", "fcgrad", "multifc", "lstmfc", "gate", "fsg-lstm", "fsg-mamba", "fsg-all", "fsg-flat")
GRADS = ("pytorch", *OURS)
PACKAGES = {"brevitas": "brevitas", "parq": "torchao"}  # variants that need a package, and run only if they are named
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Measures the seconds between calls of lap(). Each call waits until the device has finished its work."""

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
    """Peak memory of function() in MB (2^20 bytes), less the memory in use before the call.

    Returns None on devices and systems that do not report it (anything but CUDA and Linux).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():
        return None
    read = lambda key: int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, so that allocating it again is counted
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the recorded peak
    except OSError:  # not allowed in this environment
        return None
    before = read("VmRSS:")
    function()
    return (read("VmHWM:") - before) / 2**10


def table(title: str, rows: dict[str, dict], **columns: str) -> None:
    """Print a table.

    rows: for each row's name, a dictionary of values. columns: for each value's name, its format specification.
    A value that is None or missing prints as –.
    """
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


PARTS = ("data", "network", "generator", "optimizer", "checks")  # of a step; checks: metrics, and the check for NaN


def make_generator(grad: str, layers, args):
    """The gradient generator that `grad`, one of OURS, names; None for 'plain'."""
    mamba = dict(d_state=args.d_state, d_conv=args.d_conv, expand=args.expand, hidden=args.hidden, scan=args.scan)
    makers = {
        "plain": lambda: None,
        "ste": lambda: hypernet.STE(layers),
        "fcgrad": lambda: metaquant.FCGrad(layers, args.hidden),
        "multifc": lambda: metaquant.MultiFC(layers, args.hidden),
        "lstmfc": lambda: metaquant.LSTMFC(layers, args.hidden),
        "gate": lambda: gate.GatedHistory(layers),
        "fsg-lstm": lambda: hypernet.FSG(layers, hgs="lstm", hidden=args.hidden),
        "fsg-mamba": lambda: hypernet.FSG(layers, **mamba),
        "fsg-all": lambda: hypernet.FSG(layers, hyper_sample=1.0, **mamba),
        "fsg-flat": lambda: hypernet.FSG(layers, history="flat", **mamba),
    }
    return makers[grad]()


class HandWrittenConv2d(nn.Conv2d):
    """A convolution with binary weights as users write it by hand."""

    def forward(self, x):
        return self._conv_forward(x, hand_written_ste(self.weight), self.bias)


class HandWrittenLinear(nn.Linear):
    """A linear layer with binary weights as users write it by hand."""

    def forward(self, x):
        return F.linear(x, hand_written_ste(self.weight), self.bias)


def hand_written_ste(w: torch.Tensor) -> torch.Tensor:
    return w + (torch.where(w >= 0, 1.0, -1.0) - w).detach()


def layers_to_binarize(net: nn.Module) -> dict[str, nn.Module]:
    """By name, the layers that models.binarize_() makes binary: all Conv2d and Linear layers but the first and last."""
    layers = [(name, m) for name, m in net.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]
    return dict(layers[1:-1])


def brevitas_layer(layer: nn.Module) -> nn.Module:
    """brevitas' binary layer of the same shape."""
    import brevitas.nn
    from brevitas.quant.binary import SignedBinaryWeightPerTensorConst as quantizer

    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return brevitas.nn.QuantLinear(layer.in_features, layer.out_features, bias, weight_quant=quantizer)
    sizes = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    channels = layer.in_channels, layer.out_channels
    return brevitas.nn.QuantConv2d(*channels, layer.kernel_size, **sizes, bias=bias, weight_quant=quantizer)


def other_network(grad: str, arch: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and the optimizer of 'pytorch', 'brevitas' or 'parq'. Raises ImportError without their package."""
    net = models.build(arch, 10, "none")
    layers = layers_to_binarize(net)
    for name, layer in layers.items():
        if grad == "pytorch":
            layer.__class__ = HandWrittenLinear if isinstance(layer, nn.Linear) else HandWrittenConv2d
        elif grad == "brevitas":
            net.set_submodule(name, brevitas_layer(layer))
    net = net.to(device, memory_format=torch.channels_last)
    if grad != "parq":
        return net, torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer

    latent = {layer.weight for layer in layers.values()}
    groups = [{"params": list(latent), "quant_bits": 1}, {"params": [p for p in net.parameters() if p not in latent]}]
    adam = torch.optim.Adam(groups, 1e-3, fused=True)
    return net, QuantOptimizer(adam, LSBQuantizer(), ProxPARQ(0, 1_000_000), quant_per_channel=True)


def make_step(grad: str, arch: str, args, device: torch.device):
    """A function step(images, labels) that does one training step and returns the seconds of each part of the step.

    With memory=True it returns the peak memory of the step, see peak_memory().
    Raises ImportError if the variant's package is missing.
    """
    torch.manual_seed(0)
    grad, *suffixes = grad.split("+")
    generator, finite = None, None
    if grad in OURS:  # as in train_fsg.py
        net = models.build(arch, 10, "none" if grad == "plain" else "dorefa")
        net = net.to(device, memory_format=torch.channels_last)
        generator, parameters = make_generator(grad, models.binary_layers(net), args), net.parameters()
        flags = argparse.Namespace(opt="adam", lr=1e-3, betas=None, weight_decay=0.0, amp=None)
        optimizer = runs.make_optimizer(parameters, flags)
        if isinstance(generator, gate.GatedHistory):
            generator.without_momentum(optimizer)
        finite = runs.FiniteCheck(net, generator, device)
    else:
        net, optimizer = other_network(grad, arch, device)
    mode = "reduce-overhead" if device.type == "cuda" else "default"  # the modes that runs.py uses
    model = torch.compile(net, mode=mode) if "compile" in suffixes else net
    sums = torch.zeros(3, dtype=torch.float64, device=device)

    def step(images, labels, memory=False):
        if memory:
            return peak_memory(device, lambda: step(images, labels))
        watch = Stopwatch(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled="amp" in suffixes):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        watch.lap("network")
        if generator:
            generator.generate()
        watch.lap("generator")
        optimizer.step()
        watch.lap("optimizer")
        if finite:  # as runs.Run does
            correct = (logits.argmax(1) == labels).sum()
            sums.add_(torch.stack([loss.detach() * len(labels), correct, torch.full_like(correct, len(labels))]))
            finite.watch(sums[0], 1)
        watch.lap("checks")
        return watch.laps

    return step


def elsewhere(grad: str, arch: str, args, device: torch.device):
    """make_step(), in a process of its own that has PyTorch's default memory settings.

    Raises ImportError as make_step() does, and RuntimeError if the process dies.
    """
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, grad, arch, args, device), daemon=True)
    process.start()
    there.close()  # the process has the only other end: if it dies, recv() does not wait for ever

    def answer():
        try:
            found = here.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise RuntimeError(f"the process of {grad} has ended with exit status {process.exitcode}") from None
        if isinstance(found, Exception):
            raise found
        return found

    def step(images, labels, memory=False):
        here.send((images, labels, memory))
        return answer()

    answer()
    return step


def serve(connection, grad: str, arch: str, args, device: torch.device) -> None:
    """What the process of elsewhere() runs, until it is ended with the benchmark."""
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # which this process's parent has set
    try:
        step = make_step(grad, arch, args, device)
        connection.send("ready")
        while True:
            connection.send(step(*connection.recv()))
    except EOFError:  # the benchmark has ended
        return
    except Exception as e:
        connection.send(e)


def make_steps(arch: str, args, device: torch.device) -> dict:
    """The steps of --grads, by name. Prints a sentence for each that is skipped. Raises ValueError if none is left."""
    steps = {}
    for grad in args.grads:
        name, *suffixes = grad.split("+")
        alone = name not in OURS and device.type == "cpu" and "memory" not in suffixes
        try:
            steps[grad] = (elsewhere if alone else make_step)(grad, arch, args, device)
        except ImportError as e:
            package = PACKAGES[name]
            console.print(f"{grad}: skipped, {package} cannot be imported ({e}): pip install {package}")
    if not steps:
        raise ValueError("none of the variants in --grads can run: name others, or install their packages")
    return steps


def bench_step(arch: str, args, device: torch.device) -> dict:
    """Time training steps of one network with every variant of --grads; print the table and return its values.

    The times are medians in milliseconds; the parts (PARTS) are also given as fractions.
    """
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, device=device)  # the size of CIFAR-10
    labels = torch.randint(10, (50_000,), device=device)
    mean = std = torch.full((3,), 128.0, device=device)
    batches = data.ResidentBatches(
        images,
        labels,
        mean=mean,
        std=std,
        num_classes=10,
        batch_size=args.batch_size,
        train=True,
        crop=4,
        flip=True,
    )
    steps = make_steps(arch, args, device)
    stream = (batch for number in itertools.count() for batch in batches.epoch(number))
    rounds, began = [], time.perf_counter()
    warm_up = 3  # a generator does all of its work from its third step on
    while len(rounds) < warm_up + args.rounds and (
        len(rounds) <= warm_up or time.perf_counter() - began < args.seconds
    ):
        watch = Stopwatch(device)
        images, labels = next(stream)
        watch.lap("data")
        order = list(steps) if len(rounds) % 2 else list(reversed(steps))  # no variant always follows the same one
        laps = {grad: steps[grad](images, labels) for grad in order}
        rounds.append({"data": watch.laps["data"]} | laps)
    rounds = rounds[warm_up:]

    base = next((grad for grad in ("pytorch", "ste") if grad in steps), next(iter(steps)))
    rows = {}
    for grad in steps:
        total = [sum(r[grad].values()) + r["data"] for r in rounds]
        row = rows[grad] = {"ms": 1e3 * statistics.median(total)}
        row["ratio"] = statistics.median(sum(r[grad].values()) / sum(r[base].values()) for r in rounds)
        for part in PARTS:
            seconds = [r[part] if part == "data" else r[grad][part] for r in rounds]
            row[f"{part}_ms"] = 1e3 * statistics.median(seconds)
            row[part] = statistics.median(s / t for s, t in zip(seconds, total, strict=True))
        row["MB"] = steps[grad](images, labels, memory=True)
    title = f"{arch}, batch {args.batch_size}, {describe(device)}: one step, median of {len(rounds)}, ratio to {base}"
    columns = {"ms": ".1f", "ratio": ".3f"} | {f"{part}_ms": ".1f" for part in PARTS} | {"MB": ".0f"}
    table(title, rows, **columns)
    return {"rounds": len(rounds), "variants": rows}


# ---------------------------------------------------------------------------------------------------------------------
# The slow-nets alone.

if triton:  # one program computes COUNT exponentials, or 4 · COUNT multiply-adds, in each of its 1024 lanes

    @triton.jit
    def exponentials(out, COUNT: tl.constexpr):
        lane = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        x = lane * 1e-9
        for _ in range(COUNT):
            x = tl.exp2(-x)
        tl.store(out + lane, x)

    @triton.jit
    def multiply_adds(out, COUNT: tl.constexpr):
        lane = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        a = lane * 1e-9
        b = a + 1.0
        c = a + 2.0
        d = a + 3.0
        for _ in range(COUNT):
            a = a * 0.999 + 0.001
            b = b * 0.999 + 0.001
            c = c * 0.999 + 0.001
            d = d * 0.999 + 0.001
        tl.store(out + lane, a + b + c + d)


def peak_rate(device: torch.device) -> float | None:
    """The machine's measured rate of the operation that bounds the fused scan; None where it cannot be measured.

    On a CPU these are the multiply-adds per second of its vector units, on a GPU the exponentials per second.
    """

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
        return best(lambda: exponentials[(programs,)](out, count), programs * 1024 * count)
    library = selective_scan.library(6) if device.type == "cpu" else ""
    if isinstance(library, str):
        return None
    threads, count = torch.get_num_threads(), 100_000_000
    lanes = library.multiply_adds(ctypes.c_int64(1), ctypes.c_int(1))
    return best(lambda: library.multiply_adds(ctypes.c_int64(count), ctypes.c_int(threads)), lanes * count * threads)


def operations(layout: str, way: str, weights: int, length: int, d: int, n: int, k: int, on_cpu: bool) -> float:
    """The smallest number of operations that the kernel's arithmetic needs, of the kind that bounds its speed.

    On a CPU these are multiplications and multiply-adds, counted as at the top of selective_scan_cpu.cpp. On a GPU they
    are exponentials. For the flat layout, only the `weights` newest tokens are counted.

    way: 'forward' or 'backward'. d, n, k: channels, states per channel and taps of the convolution.
    """
    per_weight = layout == "per-weight"
    tokens, own = (length, length - 1) if per_weight else (1, 1)  # all weights of a layer share the first token
    scanned = own * d * n  # exponentials in the scan
    if not on_cpu:
        return weights * (scanned + 2 * tokens * d)
    projections = lambda count: (count * (n + 1) + n) * d
    taps = lambda first: d * (sum(min(t + 1, k) for t in range(first, tokens)) if per_weight else k)
    exponential = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 6
    once = projections(own) + taps(tokens - own) + own * d * (9 + 2 * exponential)  # silu and softplus
    once += d * (3 + exponential)  # the gate's silu
    if way == "forward":
        # Per-weight: 3 operations for a power by a polynomial of degree 2, and 1 for the output.
        # Flat: 1 for the decay, 4 for its exponential, 1 for the state's input and 1 for the output.
        return weights * (scanned * (4 if per_weight else 7) + once)
    # The backward pass computes the forward pass again. In the flat layout the adjoint takes another 8 operations.
    back = 2 * projections(tokens) + (2 if per_weight else 1) * taps(0) + own * d * 4
    return weights * (scanned * (7 if per_weight else 15) + once + back)


def bench_scan(args, device: torch.device) -> dict:
    """Time the slow-nets' forward and backward passes, for every layout and every backend that runs on this machine.

    Prints the table and returns its values; the times are medians in milliseconds.
    """
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
                console.print(f"{layout}, {scan}: skipped, {e}")
                continue
            per_weight, flat = lambda net=net: net.last(tokens), lambda net=net: net.tails(past, sizes, first)
            runs[f"{layout}, {scan}"] = per_weight if layout == "per-weight" else flat
    if args.lstm:
        runs["per-weight, LSTM"] = lambda: lstm.last(tokens)
        runs["per-weight, nn.LSTM alone"] = lambda: lstm.lstm(tokens)[0][:, -1].sum(1)

    # Only variants that are compared with each other take turns, because variants run more slowly for some seconds
    # after another one has freed gigabytes.
    groups = itertools.groupby(runs, key=lambda name: (name.partition(",")[0], "LSTM" in name))
    rates = [peak_rate(device)]  # measured again at the end; the higher of the two is used
    rounds = {name: [] for name in runs}
    for name in (n for _, names in groups for n in list(names) * (args.rounds + 1)):
        watch = Stopwatch(device)
        y = runs[name]()
        watch.lap("forward")
        y.backward(v)
        watch.lap("backward")
        rounds[name].append(watch.laps)
    rounds = {name: laps[1:] for name, laps in rounds.items()}  # the first round is a warm-up
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
                bound = operations(layout, way, *shape, on_cpu=device.type == "cpu") / rate
                row[f"{short}_of_bound"] = 1e3 * bound / row[way]
    title = f"{args.arch[0]}'s {sum(sizes):,} weights, {describe(device)}: ms, median of {args.rounds}"
    columns = {"forward": ".1f", "backward": ".1f", "ratio": ".2f", "MB": ".0f"}
    columns |= {f"{short}_G_updates/s": ".2f" for short in ("fwd", "bwd")}
    columns |= {f"{short}_of_bound": ".0%" for short in ("fwd", "bwd")}
    table(title, rows, **columns)
    operation = "multiply-adds" if device.type == "cpu" else "exponentials"
    if rate:
        console.print(f"measured peak rate of this machine: {rate / 1e9:.1f} G {operation}/s")
    return {"rounds": args.rounds, "peak_rate": rate, "variants": rows}


# ---------------------------------------------------------------------------------------------------------------------
# The weight quantizers.

OPTIONS = {"bihalf-prune": {"prune": 0.4}, "bnn+": {"mu": 5.0}, "bnn++": {"mu": 5.0}, "pc": {"rho": 0.1}}


def bench_quantizers(args, device: torch.device) -> dict:
    """Time every weight quantizer, forward and backward, on ResNet-18's largest layer.

    Prints the table and returns its values; the times are medians in milliseconds.
    """
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
    title = f"512×4,608 weights, {describe(device)}: ms, median of {args.rounds}; ratio to bwn-f (sign and scale)"
    table(title, rows, forward=".2f", backward=".2f", ratio=".2f")
    return {"variants": rows}


# ---------------------------------------------------------------------------------------------------------------------
# One generator over several processes.


def run_process(rank: int, world_size: int, grad: str, args, folder: str) -> None:
    """The function that each process runs. It writes its measurements to the file `RANK.json` in the folder."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    layers = models.binary_layers(models.build(args.arch[0], 10, "dorefa"))
    generator = make_generator(grad, layers, args)
    talking = []  # seconds of each call that communicates, including the wait for the slowest process

    def timed(function):
        def call(*args):
            began = time.perf_counter()
            out = function(*args)
            talking.append(time.perf_counter() - began)
            return out

        return call

    for name in ("all_gather", "all_reduce"):
        setattr(generator.shard, name, timed(getattr(generator.shard, name)))

    def step():
        for layer in layers:
            layer.weight.grad = torch.randn_like(layer.weight)
        if world_size > 1:
            dist.barrier()
        talking.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        generator.generate()
        return {"ms": time.perf_counter() - wall, "cpu_ms": time.process_time() - cpu, "talking": sum(talking)}

    rounds = [step() for _ in range(3 + args.rounds)][3:]
    row = {key: 1e3 * statistics.median(r[key] for r in rounds) for key in rounds[0]}
    row["talking"] /= row["ms"]
    row["weights"] = len(generator.latent)
    row["MB_held"] = sum(b.numel() * b.element_size() for b in generator.buffers()) / 2**20
    row["MB_peak"] = peak_memory(torch.device("cpu"), step)
    Path(folder, f"{rank}.json").write_text(json.dumps(row))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def bench_scale(args) -> dict:
    """Time generate() of each generator over each number of processes, which have one thread each.

    Prints the table and returns its values. Every value is the largest of those that the processes measured.
    """
    rows = {}
    for grad in args.grads:
        for world_size in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(run_process, (world_size, grad, args, folder), nprocs=world_size)
                found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]
            known = {key: [f[key] for f in found if f[key] is not None] for key in found[0]}
            rows[f"{grad}, {world_size}"] = {key: max(values, default=None) for key, values in known.items()}
    cores = torch.get_num_threads()
    title = f"{args.arch[0]}: generate(), processes with 1 thread each on {cores} cores, median of {args.rounds}"
    table(title, rows, ms=".0f", cpu_ms=".0f", talking=".1%", weights=",d", MB_held=".1f", MB_peak=".1f")
    return {"variants": rows}


def describe(device: torch.device) -> str:
    """The device in words, for the tables' titles."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["step", "scan", "quantizers", "scale"], help="see above")
    parser.add_argument(
        "--arch", nargs="+", default=["resnet20"], choices=models.ARCHS, help="networks; scan and scale use the first"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds to measure, after the warm-up (default: 20; scan: 5)")
    parser.add_argument(
        "--seconds", type=float, default=300, help="step: start no new round after this time (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, …")
    parser.add_argument("--hidden", type=int, default=100, help="width of fast-net and LSTM (default: %(default)s)")
    parser.add_argument("--d-state", type=int, default=16, help="Mamba: states per channel (default: %(default)s)")
    parser.add_argument("--d-conv", type=int, default=8, help="Mamba: taps of the convolution (default: %(default)s)")
    parser.add_argument("--expand", type=int, default=100, help="Mamba: channels (default: %(default)s)")
    parser.add_argument("--length", type=int, default=5, help="scan: past gradients per weight (default: %(default)s)")
    suffixes = ("", "+amp", "+compile", "+amp+compile")
    variants = [f"{grad}{suffix}" for suffix in suffixes for grad in (*GRADS, *PACKAGES)]
    variants += [f"{grad}+memory" for grad in ("pytorch", *PACKAGES)]
    parser.add_argument(
        "--grads",
        nargs="+",
        choices=variants,
        metavar="GRAD",
        help=f"step, scale: {', '.join((*GRADS, *PACKAGES))}; for step also with the suffixes +amp and +compile; "
        "pytorch+memory: with the trainers' memory settings",
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], help="scale: numbers of processes")
    parser.add_argument(
        "--scan", default="auto", choices=["auto", "fused", "mamba-ssm", "reference"], help="step: Mamba's backend"
    )
    scans = ["fused", "reference", "mamba-ssm"]
    parser.add_argument("--scans", nargs="+", default=scans, choices=scans, help="scan: the backends to compare")
    parser.add_argument(
        "--lstm", action="store_true", help="scan: also the LSTM, compared with nn.LSTM, which needs 11 GB of memory"
    )
    parser.add_argument("--json", help="file for the results (default: runs/bench-step.json, …)")
    args = parser.parse_args(argv)
    learned = ["fsg-mamba", "fsg-flat", "multifc"]
    args.grads = args.grads or (learned if args.benchmark == "scale" else list(GRADS))
    args.rounds = (5 if args.benchmark == "scan" else 20) if args.rounds is None else args.rounds
    for grad in args.grads if args.benchmark == "scale" else ():
        if grad not in OURS or grad in ("plain", "ste"):
            parser.error(f"scale cannot divide {grad} over processes: use generators such as {', '.join(learned)}")
    if min(args.processes) < 1:
        parser.error(f"--processes must be at least 1; it is {min(args.processes)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1; it is {args.rounds}")
    device, file = runs.pick_device(args.device), Path(args.json or f"runs/bench-{args.benchmark}.json")
    result = {"torch": torch.__version__, "machine": describe(device), **vars(args)}
    if args.benchmark == "scan":
        result |= bench_scan(args, device)
    elif args.benchmark == "quantizers":
        result |= bench_quantizers(args, device)
    elif args.benchmark == "scale":
        result |= bench_scale(args)
    else:
        result["archs"] = {arch: bench_step(arch, args, device) for arch in args.arch}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"results written to {file}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (ValueError, RuntimeError, runs.RunError) as e:
        raise SystemExit(f"error: {e}") from None
