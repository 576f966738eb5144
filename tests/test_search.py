"""results/search.py: the variants of FSG's slow term."""

import csv
import importlib.util

import pytest
import torch
from conftest import ROOT

import runs
import train_fsg

spec = importlib.util.spec_from_file_location("search", ROOT / "results" / "search.py")
search = importlib.util.module_from_spec(spec)
spec.loader.exec_module(search)

SMALL = ["--dataset", "digits", "--arch", "resnet8", "--batch-size", "60", "--limit-steps", "24", "--device", "cpu"]
SMALL += ["--expand", "2", "--d-state", "2", "--balance", "layer-rms"]


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setattr(train_fsg, "FSG", train_fsg.FSG)  # search.main() replaces it

    def train(words, name):
        argv = [*SMALL, "--out", str(tmp_path), "--name", name]
        assert (search.main([words, *argv]) if words else train_fsg.main(argv)) == 0
        with open(tmp_path / name / "metrics.csv", newline="") as f:
            row = list(csv.DictReader(f))[-1]
        return torch.load(tmp_path / name / "last.pt", weights_only=True)["model"], row

    return train


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_without_a_change_it_is_fsg(train):
    assert same(train(None, "plain")[0], train("fsg", "search")[0])


def test_variants(train):
    memory, row = train("memory", "memory")
    assert row["gradient/signal"] == "nan", "nothing is learned"
    lags = [float(row[f"gradient/lag{i}"]) for i in range(5)]
    assert all(abs(lag / lags[0] - 0.8**i) < 1e-3 for i, lag in enumerate(lags)), "Σ 0.8^k ĝ, with a common factor"
    frozen, _ = train("residual+frozen", "frozen")
    assert same(memory, frozen), "the slow-net starts at 0"
    learned, row = train("residual", "residual")
    assert not same(memory, learned) and 0 < float(row["gradient/signal"]) <= 4 + 1e-6, "of four gradients"
    found = [train(words, words)[0] for words in ("leap+memory", "forget+memory", "distance", "ahead3", "smooth")]
    for i, weights in enumerate(found):
        assert not any(same(weights, other) for other in [memory, learned, *found[:i]])


def test_a_run_without_its_words_is_not_resumed():
    with pytest.raises(runs.RunError, match="cannot be resumed"):
        search.main(["memory", "--resume=run"])


@pytest.mark.parametrize("flag", ["--grad=ste", "--preset"])
def test_the_words_are_of_fsg(flag):
    with pytest.raises(runs.RunError, match="leave out --grad and --preset"):
        search.main(["memory", flag, "released"])


def test_unknown_words():
    with pytest.raises(runs.RunError, match="jump"):
        search.main(["leap+jump"])
