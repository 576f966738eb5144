"""Puts the repository on the import path, and says where the optional reference material lies."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every continuous-integration run; new ones in every other.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: there is one test a core
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, which looks when it is imported

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # small tensors: threads only get in each other's way


@pytest.fixture
def golden():
    """Outputs and gradients of the public Mamba block, ../shared/golden/mamba.npz."""
    file = ROOT.parent / "shared" / "golden" / "mamba.npz"
    if not file.exists():
        pytest.skip("the golden vectors ../shared/golden/mamba.npz are not here")
    import numpy as np

    return np.load(file)
