"""README.md: its Python code runs, its commands are accepted, its links lead to files."""

import importlib
import re
import shlex

import torch
from conftest import ROOT
from torch import nn

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]


class MyNetwork(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )


def test_the_python_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(4, (16,))) for _ in range(4)]
    names = {"MyNetwork": MyNetwork, "device": "cpu", "total_steps": 100, "batches": batches}
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(codes) == 2
    training, checkpoint = codes
    exec(training, names)
    saved = [p.detach().clone() for p in (*names["model"].parameters(), *names["fsg"].parameters())]
    exec(checkpoint, names)
    loaded = [*names["model"].parameters(), *names["fsg"].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(saved, loaded, strict=True))
    assert names["fsg"].history.isfinite().all() and all(p.isfinite().all() for p in names["model"].parameters())


def test_a_checkpoint_of_the_readme_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(4, (16,))) for _ in range(6)]
    training, checkpoint = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    make, loop = training.split("for images", 1)
    save, load = re.split(r"# Later.*\n", checkpoint)

    def start() -> dict:
        torch.manual_seed(1)
        names = {"MyNetwork": MyNetwork, "device": "cpu", "total_steps": 100}
        exec(make, names)
        return names

    one, two = start(), start()
    exec(f"for images{loop}", one | {"batches": batches[:3]})
    exec(save, one)
    exec(f"for images{loop}", one | {"batches": batches[3:]})
    exec(save.split("torch.save")[0] + load, two)
    exec(f"for images{loop}", two | {"batches": batches[3:]})
    for name in ("model", "fsg"):
        pairs = zip(one[name].parameters(), two[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_its_commands_are_accepted():
    commands = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
            commands += [line.split("#")[0] for line in block.splitlines()]
        commands += re.findall(r"`(python [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    commands = [shlex.split(command) for command in commands if command.startswith("python train_")]
    commands = [argv for argv in commands if not set(argv) & {"OPT", "LR", "--help"}]
    assert len(commands) > 30
    for _, script, *argv in commands:
        importlib.import_module(script.removesuffix(".py")).flags().parse_args(argv)


def test_its_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if not link.startswith("https://"):
                path, _, anchor = link.partition("#")
                target = page.parent / path if path else page
                assert target.exists(), f"{page.name}: {link}"
                if anchor:
                    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                    anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
                    assert anchor in anchors, f"{page.name}: {link}"


def test_it_fits_one_page():
    assert len(README.splitlines()) <= 250
    code_removed = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(re.findall(r"^#+ ", code_removed, re.MULTILINE)) <= 15
