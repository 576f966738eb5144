"""bench.py: the variants that are other people's code, and what happens without their packages."""

import argparse
import os
import sys

import pytest
import torch

import bench
import models

CPU = torch.device("cpu")


def test_the_baseline_computes_what_our_network_computes():
    """With sign weights, 'pytorch' has the logits and the gradients of the network that models.py makes."""
    torch.manual_seed(0)
    theirs, _ = bench.other_network("pytorch", "resnet8", CPU)
    ours = models.build("resnet8", 10, "bwn")
    ours.load_state_dict(theirs.state_dict())
    images, results = torch.randn(4, 3, 32, 32), []
    for net in (theirs, ours):
        logits = net.train()(images)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    binary = [m for m in theirs.modules() if isinstance(m, bench.HandWrittenConv2d | bench.HandWrittenLinear)]
    assert len(binary) == len(models.binary_layers(ours)) > 0


def test_a_variant_without_its_package_is_skipped_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "brevitas", None)
    monkeypatch.setitem(sys.modules, "brevitas.nn", None)
    monkeypatch.chdir(tmp_path)
    small = ["step", "--arch", "resnet8", "--rounds", "1", "--batch-size", "8", "--device", "cpu"]
    assert bench.main([*small, "--grads", "brevitas+memory", "ste"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "brevitas+memory: skipped" in said and "pip install brevitas" in said
    with pytest.raises(ValueError, match="none of the variants"):
        bench.main([*small, "--grads", "brevitas+memory"])


def make_step_that_reports(grad, *_):
    if grad == "brevitas":
        raise ImportError("no such package")

    def step(images, labels, memory=False):
        if images is None:
            os._exit(3)
        return os.environ.get("THP_MEM_ALLOC_ENABLE"), images.sum().item(), memory

    return step


def serve(*arguments):  # in the other process
    bench.make_step = make_step_that_reports
    bench.serve(*arguments)


def test_other_peoples_code_runs_elsewhere_with_default_settings(monkeypatch):
    """It receives the batches, has none of the trainers' memory settings, and its errors arrive here."""
    monkeypatch.setattr(bench, "serve", serve)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    step = bench.elsewhere("pytorch", "resnet8", None, CPU)
    assert step(torch.ones(3), None) == (None, 3.0, False)
    assert step(torch.ones(4), None, memory=True) == (None, 4.0, True)
    with pytest.raises(RuntimeError, match="the process of pytorch has ended with exit status 3"):
        step(None, None)
    with pytest.raises(ImportError, match="no such package"):
        bench.elsewhere("brevitas", "resnet8", None, CPU)


@pytest.mark.parametrize("grad", bench.PACKAGES)
def test_the_variants_of_other_packages_train_binary_weights(grad):
    pytest.importorskip(bench.PACKAGES[grad])
    torch.manual_seed(0)
    step = bench.make_step(grad, "resnet8", argparse.Namespace(), CPU)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    laps = [step(images, labels) for _ in range(3)]
    assert all(set(lap) == set(bench.PARTS) - {"data"} and lap["network"] > 0 for lap in laps)
    net, optimizer = bench.other_network(grad, "resnet8", CPU)
    names = bench.layers_to_binarize(models.build("resnet8", 10, "none"))
    layers = [net.get_submodule(name) for name in names]
    before = [layer.weight.detach().clone() for layer in layers]
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    assert all((layer.weight != w).any() for layer, w in zip(layers, before, strict=True))
    if grad == "brevitas":
        assert all(len(layer.quant_weight().value.abs().unique()) == 1 for layer in layers)
    else:
        assert len(next(iter(optimizer.regularized_param_groups()))["params"]) == len(layers)
