"""The released forms and the siblings' blocks equal the authors' codes: tests/replay.py on the golden files."""

import json

import numpy as np
import pytest
import replay
from conftest import ROOT
from programs import Program

FOLDER = ROOT.parent / "shared" / "golden"


def golden(name):
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no golden numbers at {path}")
    return path


@pytest.mark.parametrize("name", ["fsg_released", "fsg_released_lstm", "metaquant", "sibnn", "equalbits", "irnet"])
def test_golden_file(name):
    errors = replay.replay(golden(name))
    assert errors and max(errors.values()) <= 1e-10, errors
    if name.startswith(("fsg", "metaquant")):
        assert {"W", "phi", "loss", "other", "detail"} == errors.keys()


def changed(tmp_path, name, **arrays):
    """The file with some arrays replaced; None removes one."""
    with np.load(golden(name)) as npz:
        stored = dict(npz)
    for key, value in arrays.items():
        stored.pop(key) if value is None else stored.update({key: value(stored[key])})
    path = tmp_path / "changed.npz"
    np.savez(path, **stored)
    return path


def short(tmp_path, name, **more):
    """The first five steps of the file."""
    with np.load(golden(name)) as npz:
        cut = {key: lambda a: a[:5] for key in npz.files if key.startswith("batches/") or key.endswith("/loss")}
    return changed(tmp_path, name, **cut, **more)


def test_the_script_prints_one_line_and_says_by_its_exit_code_whether_all_is_equal(tmp_path):
    run = lambda *paths: Program("tests/replay.py", *map(str, paths)).end()
    good = run(short(tmp_path, "fsg_released_lstm"))
    assert good.returncode == 0, good.stderr
    assert max(json.loads(good.stdout).values()) <= 1e-10

    bad = run(short(tmp_path, "fsg_released_lstm", **{"hyper/beta": lambda beta: beta - 1e-5}))
    assert bad.returncode == 1
    errors = json.loads(bad.stdout)
    assert errors["phi"] > 1e-10 and errors["detail"] > 1e-10

    other = run(ROOT / "tests" / "replay.py")
    assert other.returncode not in (0, None) and "is not an .npz file" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    "key, change, kind",
    [
        ("hyper/length", lambda length: length - 3, "phi"),
        ("hyper/lr", lambda lr: lr * (1 + 1e-6), "W"),
        ("sgd/step2/model.fc.bias", lambda b: b + 1e-12, "other"),
        ("adam/step2/flat_look_ahead", lambda w: w * (1 + 1e-9), "detail"),
    ],
)
def test_small_deviations_are_seen(tmp_path, key, change, kind):
    assert replay.replay(short(tmp_path, "fsg_released", **{key: change}))[kind] > 1e-10
