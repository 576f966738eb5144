"""How long a training step takes, and what takes it.

    python bench.py step                                        # ResNet-20, batch 128, every generator
    python bench.py step --arch resnet110 --grads plain ste fsg-mamba --expand 8 --d-state 4
    python bench.py step --device cuda --amp

The variants run in turn, one step each, round after round, so that a machine whose speed drifts slows all of them
alike. Given are medians, and the median of the ratio to `ste` within a round. `plain` is the same network made of
ordinary nn.Conv2d layers; `ste` − `plain` is therefore what binary weights cost. Results also go to a JSON file.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import data
import hypernet
import models

GRADS = ("plain", "ste", "fcgrad", "multifc", "lstmfc", "fsg-lstm", "fsg-mamba")
console = Console(highlight=False, markup=False)


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


def make_generator(grad: str, layers, args):
    """The gradient generator called `grad` for these layers (None for plain)."""
    size = {"d_state": args.d_state, "d_conv": args.d_conv, "expand": args.expand, "hidden": args.hidden}
    makers = {
        "plain": lambda: None,
        "ste": lambda: hypernet.STE(layers),
        "fcgrad": lambda: hypernet.FCGrad(layers, args.hidden),
        "multifc": lambda: hypernet.MultiFC(layers, args.hidden),
        "lstmfc": lambda: hypernet.LSTMFC(layers, args.hidden),
        "fsg-lstm": lambda: hypernet.FSG(layers, hgs="lstm", **size),
        "fsg-mamba": lambda: hypernet.FSG(layers, history=args.history, scan=args.scan, **size),
    }
    return makers[grad]()


def make_step(grad: str, args, device):
    """A function that takes one training step as the trainer does, and returns its parts' seconds."""
    torch.manual_seed(0)
    net = models.build(args.arch, 10, "none" if grad == "plain" else "dorefa").to(device)
    generator = make_generator(grad, models.binary_layers(net), args)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def step(images, labels):
        watch = Stopwatch(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()
        watch.lap("network")
        if generator:
            generator.generate()
        watch.lap("generator")
        optimizer.step()
        watch.lap("optimizer")
        return watch.laps

    return step


def bench_step(args) -> dict:
    """Median milliseconds a step and its parts for every variant; printed, and returned for the JSON file."""
    device = torch.device(args.device)
    pictures = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, device=device)  # a CIFAR's worth
    labels = torch.randint(10, (50_000,), device=device)
    mean = std = torch.full((3,), 128.0, device=device)
    batches = data.ResidentBatches(pictures, labels, mean, std, 10, args.batch_size, True, 0, crop=4, flip=True)
    steps = {grad: make_step(grad, args, device) for grad in args.grads}
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

    total = {g: [sum(r[g].values()) for r in rounds] for g in args.grads}
    base = "ste" if "ste" in args.grads else args.grads[0]
    rows = {}
    for g in args.grads:
        rows[g] = {"ms": 1e3 * statistics.median(total[g])}
        rows[g]["ratio"] = statistics.median(a / b for a, b in zip(total[g], total[base], strict=True))
        for part in ("network", "generator", "optimizer"):
            rows[g][f"{part}_ms"] = 1e3 * statistics.median(r[g][part] for r in rounds)
    data_ms = 1e3 * statistics.median(r["data"] for r in rounds)

    table = Table(title=f"{args.arch}, batch {args.batch_size}, {describe(device)}: one step, median of {len(rounds)}")
    for column in ("gradient", "ms", f"÷ {base}", "network ms", "generator ms", "optimizer ms"):
        table.add_column(column, justify="left" if column == "gradient" else "right")
    for g, row in rows.items():
        table.add_row(g, f"{row['ms']:.1f}", f"{row['ratio']:.3f}", *(f"{v:.1f}" for v in list(row.values())[2:]))
    console.print(table)
    console.print(f"data: {data_ms:.2f} ms a batch, {100 * data_ms / rows[base]['ms']:.2f} % of the {base} step")
    return {"rounds": len(rounds), "data_ms": data_ms, "variants": rows}


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step"])
    parser.add_argument("--arch", default="resnet20", choices=models.ARCHS)
    parser.add_argument("--grads", nargs="+", default=list(GRADS), choices=GRADS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20, help="rounds to measure, after three to warm up")
    parser.add_argument("--seconds", type=float, default=300, help="begin no round after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--d-conv", type=int, default=8)
    parser.add_argument("--expand", type=int, default=100)
    parser.add_argument("--history", default="per-weight", choices=["per-weight", "flat"])
    parser.add_argument("--scan", default="auto", choices=["auto", "fused", "mamba-ssm", "reference"])
    parser.add_argument("--json", default="runs/bench.json", help="where the figures go (default: runs/bench.json)")
    args = parser.parse_args(argv)
    result = {"torch": torch.__version__, "machine": describe(torch.device(args.device)), **vars(args)}
    result.update(bench_step(args))
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
