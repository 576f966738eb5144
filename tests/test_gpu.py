"""What needs a CUDA GPU: the same numbers as on the CPU, the fused scan at full size (small ones: test_triton.py), and
mamba-ssm's kernel against the reference scan."""

import pytest
import torch
from test_hypernet import MAKERS, backward, network, relative
from test_selective_scan import check_tails

import models
import train_fsg
from hypernet import SlowMamba, mamba_ssm_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("name", MAKERS)
def test_generators_give_the_same_gradients_on_the_gpu(name):
    on_cpu, on_gpu = network(), network()
    torch.manual_seed(1)
    cpu = MAKERS[name](models.binary_layers(on_cpu))
    on_gpu.cuda()
    torch.manual_seed(1)
    gpu = MAKERS[name](models.binary_layers(on_gpu))
    for t in range(5):
        backward(on_cpu, t)
        for a, b in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
            b.grad = a.grad.cuda()
        cpu.generate()
        gpu.generate()
        for a, b in zip(models.binary_layers(on_cpu), models.binary_layers(on_gpu), strict=True):
            assert relative(b.weight.grad.cpu(), a.weight.grad) < 1e-6


def test_the_fused_scan_at_the_papers_size_equals_float64():
    torch.manual_seed(0)
    net = SlowMamba(scan="fused").cuda()
    book = SlowMamba(scan="reference").cuda().double()
    book.load_state_dict(net.state_dict())
    assert SlowMamba().backend("cuda", torch.float32, 6) == "fused", "what auto takes"
    u, v = torch.randn(50_000, 6, 1, device="cuda"), torch.randn(50_000, device="cuda")
    y, y64 = net.last(u), book.last(u.double())
    assert relative(y, y64) < 1e-5
    grads = torch.autograd.grad(y, net.parameters(), v)
    exact = torch.autograd.grad(y64, book.parameters(), v.double())
    for (name, _), a, b in zip(net.named_parameters(), grads, exact, strict=True):
        assert relative(a, b) < 1e-4, name  # sums of 50,000 terms of either sign


@pytest.mark.parametrize("has_first", [True, False])
def test_the_flat_scan_at_the_papers_size_equals_float64(has_first):
    torch.manual_seed(0)
    net, layers = SlowMamba(scan="fused").cuda(), [20_000, 1, 432, 6_000]
    assert SlowMamba().backend("cuda", torch.float32, None) == "fused", "what auto takes"
    past, v = torch.randn(5, sum(layers), device="cuda"), torch.randn(sum(layers), device="cuda")
    first = torch.randn(len(layers), device="cuda") if has_first else None
    check_tails(net, past, layers, first, v, lambda book, u: book(u), tolerance=1e-4)


def test_mamba_ssm_equals_the_reference():
    try:
        mamba_ssm_scan()
    except RuntimeError as e:
        pytest.skip(str(e))
    torch.manual_seed(0)
    reference = SlowMamba(scan="reference").cuda()
    theirs = SlowMamba(scan="mamba-ssm").cuda()
    theirs.load_state_dict(reference.state_dict())
    u = torch.randn(1000, 6, 1, device="cuda")
    v = torch.randn(1000, device="cuda")
    a, b = theirs.last(u), reference.last(u)
    assert relative(a, b) < 1e-4
    grads = [torch.autograd.grad(y, net.parameters(), v) for y, net in ((a, theirs), (b, reference))]
    for x, y in zip(*grads, strict=True):
        assert relative(x, y) < 1e-3
    long = torch.randn(1, 3000, 1, device="cuda")
    assert relative(theirs.tail(long, 500), reference.tail(long, 500)) < 1e-4


MAMBA = ["--expand", "8", "--d-state", "4"]


FLOAT16 = ["--amp", "fp16", "--opt", "sgdm", "--schedule", "cosine"]


@pytest.mark.parametrize(
    "extra",
    [MAMBA, [*MAMBA, "--amp"], [*MAMBA, *FLOAT16], ["--hgs", "lstm", "--hidden", "16"], ["--grad", "gate"]],
)
def test_training_on_the_gpu(tmp_path, extra):
    argv = ["--dataset", "digits", "--arch", "resnet8", "--epochs", "6", "--batch-size", "64", "--device", "cuda"]
    argv += ["--out", str(tmp_path), "--name", "run", *extra]
    assert train_fsg.main(argv) == 0
    last = (tmp_path / "run" / "metrics.csv").read_text().strip().splitlines()[-1].split(",")
    assert float(last[3]) > 0.7, "training accuracy"
