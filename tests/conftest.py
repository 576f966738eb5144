"""Set-up of all tests: the import path, threads, and the fixture of the optional reference arrays."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Continuous integration always runs the same examples, other runs draw new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: each core runs one test
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell; the tests interrupt runs
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the tensors are small, and each core runs one test

# pip can install torchvision's CUDA build with torch's CPU build: its operators cannot load, so its import needs stubs.
torchvision = importlib.util.find_spec("torchvision")
if torchvision:
    try:
        for library in Path(torchvision.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        stubs = torch.library.Library("torchvision", "DEF")  # they exist as long as this object does
        stubs.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        stubs.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture
def golden():
    """The arrays of ../shared/golden/mamba.npz: outputs and gradients of the public Mamba block."""
    file = ROOT.parent / "shared" / "golden" / "mamba.npz"
    if not file.exists():
        pytest.skip("the golden vectors ../shared/golden/mamba.npz are not here")
    import numpy as np

    return np.load(file)
