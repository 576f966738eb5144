"""The promise of copying: each file works in an empty folder with the files it names, and nothing else of this repo."""

import json
import shutil
import textwrap

import pytest
from conftest import ROOT
from programs import Program

import bench
import selective_scan

# Someone else's training loop, with FSG in it.
THEIR_LOOP = """
    import torch
    from torch import nn
    from hypernet import FSG
    from binarize import binarize_, binary_layers

    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = (x[:, :4].sum(1) * x[:, 4:8].sum(1) > 0).long()
    block = lambda i, o: [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    net = binarize_(nn.Sequential(*block(16, 64), *block(64, 64), nn.Linear(64, 2)), "dorefa")
    fsg = FSG(binary_layers(net), HGS)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(150):
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        fsg.generate()
        optimizer.step(), optimizer.zero_grad()
        if step == 0: print("first", loss.item())
    print("last", loss.item())
"""

FSG_FILES = [
    "models.py",
    "binarize.py",
    "quantizers.py",
    "hypernet.py",
    "metaquant.py",
    "gate.py",
    "fsg_released.py",
    "data.py",
    "runs.py",
]
COPIES = {
    "quantizers.py": ([], "import torch, quantizers; print(quantizers.dorefa(torch.randn(3, 3)))"),
    "binarize.py": (
        ["quantizers.py"],
        """
        import binarize, torch
        block = lambda: [torch.nn.Linear(4, 4), torch.nn.ReLU()]
        net = binarize.binarize_(torch.nn.Sequential(*block(), *block(), *block()))
        print(binarize.binary_layers(net), net(torch.randn(2, 4)))
        """,
    ),
    "models.py": (["binarize.py", "quantizers.py"], "import models; print(models.build('resnet20', 10))"),
    "data.py": ([], "import data; train, val, test = data.load('digits'); print(next(iter(train.epoch()))[0].shape)"),
    "runs.py": ([], "import runs; print(runs.common_flags('x.py', '').parse_args([]))"),
    "plot.py": ([], "import plot; print(plot)"),
    "selective_scan.py": (
        ["selective_scan_cpu.cpp", "selective_scan_triton.py"],
        "import selective_scan as s; print(s.library(6))",
    ),
    "export_c.py": (
        ["kernels.c", "models.py", "binarize.py", "quantizers.py", "runs.py"],
        """
        import export_c, torch
        ops = export_c.operations(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 4)).eval(), (1, 4, 4))
        assert "predict" in export_c.c_source(ops, [[1.0], [0.0]], "net")
        """,
    ),
    "export_onnx.py": (
        ["export_c.py", "kernels.c", "models.py", "binarize.py", "quantizers.py", "runs.py"],
        """
        import export_c, export_onnx, torch
        ops = export_c.operations(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 4)).eval(), (1, 4, 4))
        assert export_onnx.onnx_model(ops, torch.zeros(1, 1, 4, 4)) is None
        """,
    ),
    "export_bits.py": (
        ["models.py", "binarize.py", "quantizers.py", "runs.py"],
        """
        import export_bits, models
        net, arguments = models.build("resnet8", 10), {"arch": "resnet8", "num_classes": 10}
        export_bits.save_bits(net, "net.safetensors", build=arguments)
        print(export_bits.load_bits("net.safetensors"))
        """,
    ),
    "hubconf.py": (
        ["export_bits.py", "models.py", "binarize.py", "quantizers.py", "runs.py"],
        """
        import export_bits, hubconf, models
        net, arguments = models.build("resnet8", 10), {"arch": "resnet8", "num_classes": 10}
        export_bits.save_bits(net, "net.safetensors", build=arguments)
        print(hubconf.from_pretrained("net.safetensors"))
        """,
    ),
    "export.py": (
        [
            *("export_bits.py", "export_c.py", "export_onnx.py", "kernels.c"),
            *("models.py", "binarize.py", "quantizers.py"),
            *("data.py", "runs.py", "train_fsg.py", "hypernet.py", "metaquant.py", "gate.py", "fsg_released.py"),
            *("train_sibnn.py", "train_proxconnect.py", "train_bihalf.py"),
        ],
        """
        import export, train_fsg
        train_fsg.main("--dataset digits --arch resnet8 --limit-steps 3 --grad ste --act sign --name a".split())
        export.main(["runs/a", "--to", "bits"])
        print(export.load_bits("runs/a/a.safetensors"))
        """,
    ),
    "selective_scan_triton.py": (
        [],
        "import torch, selective_scan_triton as s; print(s.why_not(torch.device('cpu'), torch.float32, 6))",
    ),
    "train_fsg.py": (
        FSG_FILES,
        "import train_fsg; train_fsg.main('--dataset digits --arch resnet8 --limit-steps 3 --expand 2'.split())",
    ),
    "experiments.py": (
        ["plot.py", "train_fsg.py", *FSG_FILES],
        """
        import experiments as e
        small = "train_fsg.py --dataset digits --arch resnet8 --limit-steps 3 --grad ste"
        e.GRIDS["protocol"] = [e.Search(small, ("1e-3",), (0,))]
        assert e.main(["protocol"]) == 0
        """,
    ),
    **{
        f"{trainer}.py": (
            ["models.py", "binarize.py", "quantizers.py", "data.py", "runs.py"],
            f"import {trainer}; {trainer}.main('--dataset digits --arch resnet8 --limit-steps 3'.split())",
        )
        for trainer in ("train_sibnn", "train_proxconnect", "train_bihalf")
    },
}


def test_bench_measures_and_writes_json(tmp_path):
    code = """
        import bench
        small = "--arch resnet8 --rounds 1 --expand 2 --d-state 2 --hidden 4 --batch-size 8 --device cpu".split()
        bench.main(["step", *small])
        bench.main(["scan", "--lstm", *small])
        bench.main(["quantizers", *small])
    """
    files = [file for file in FSG_FILES if file != "fsg_released.py"]
    scan = ["selective_scan.py", "selective_scan_cpu.cpp", "selective_scan_triton.py"]
    compiled = str(selective_scan._cache())
    result = run_alone(tmp_path, ["bench.py", *files, *scan], code, TORCH_EXTENSIONS_DIR=compiled)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "runs" / "bench-step.json").read_text())["archs"]["resnet8"]["variants"]
    assert set(found) == set(bench.GRADS)
    assert found["pytorch"]["ratio"] == 1 and found["fsg-mamba"]["generator_ms"] > found["ste"]["generator_ms"] > 0
    for row in found.values():  # medians of shares, so about 1 together
        assert 0.8 < sum(row[part] for part in bench.PARTS) < 1.2
    scans = json.loads((tmp_path / "runs" / "bench-scan.json").read_text())["variants"]
    assert {"per-weight, reference", "flat, reference", "per-weight, nn.LSTM alone"} <= set(scans)
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in scans.values())
    quantizers = json.loads((tmp_path / "runs" / "bench-quantizers.json").read_text())["variants"]
    assert quantizers["bwn-f"]["ratio"] == 1 and quantizers["bihalf"]["forward"] > 0


def run_alone(folder, files, code, **variables):
    for file in files:
        shutil.copy(ROOT / file, folder)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", **variables}
    return Program("-c", textwrap.dedent(code), folder=folder, env=env).end()


@pytest.mark.parametrize("file", COPIES)
def test_a_file_works_with_the_files_it_names_alone(tmp_path, file):
    others, code = COPIES[file]
    result = run_alone(tmp_path, [file, *others], code)
    assert result.returncode == 0, result.stderr
    opening = (ROOT / file).read_text().split('"""')[1]
    for other in others:
        assert other in opening, f"{file} must name {other} in its docstring"


@pytest.mark.parametrize("hgs", ["mamba", "lstm"])
def test_fsg_in_someone_elses_loop(tmp_path, hgs):
    code = THEIR_LOOP.replace("HGS", f"hgs='{hgs}', expand=8, d_state=4, hidden=16")
    result = run_alone(tmp_path, ["hypernet.py", "binarize.py", "quantizers.py"], code)
    assert result.returncode == 0, result.stderr
    first, last = (float(line.split()[1]) for line in result.stdout.splitlines())
    assert first > 0.6 and last < 0.25 * first


GENERATORS = {
    "hypernet.py": "hypernet.FSG([layer], expand=4, d_state=2)",
    "metaquant.py": "metaquant.MultiFC([layer], 4)",
    "gate.py": "gate.GatedHistory([layer])",
    "fsg_released.py": "fsg_released.ReleasedFSG([layer], expand=4, d_state=2)",
}


@pytest.mark.parametrize("file", GENERATORS)
def test_generators_need_torch_and_hypernet_alone(tmp_path, file):
    """Without our binarize.py: layers are whatever has a weight and the name of a quantizer."""
    code = f"""
        import sys, torch
        sys.modules |= dict.fromkeys(["torchvision", "einops", "rich", "mamba_ssm"])  # which cannot be imported then
        import {file.removesuffix(".py")}
        layer = torch.nn.Linear(5, 3)
        layer.quantizer = "bwn"
        generator = {GENERATORS[file]}
        for step in range(4):
            if hasattr(generator, "look_ahead"):
                generator.look_ahead(0.1)
            layer.weight.grad = torch.randn(3, 5)
            generator.generate()
        print(layer.weight.grad.shape)
    """
    others = {"hypernet.py"} - {file}
    if file == "fsg_released.py":
        others.add("metaquant.py")
    result = run_alone(tmp_path, [file, *others], code)
    assert result.returncode == 0, result.stderr
    opening = (ROOT / file).read_text().split('"""')[1]
    copied = opening.split("Copy this file with")[-1].split(".py. ")[0] + ".py"
    assert all(other in copied for other in others)
