"""data.py: load() and the two kinds of batches, on real files in temporary folders.

    pytest tests/test_data.py

Nothing is downloaded. The images are noise, or have a single colour where a test must recognise them after cropping.
"""

import contextlib
import copy
import errno
import gc
import gzip
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import tarfile
import time
import types
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data

SPLITS = ("train", "val", "test")
REAL_IMAGES = Path(__file__).parents[1] / "../shared/data/cifar10-jpeg.tar.xz"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def make_folder(root: Path, classes=("ant", "bee"), train=3, test=2, side=16, held_out="test") -> Path:
    """Save noise images root/train/CLASS/0.png, ... and root/test/CLASS/0.png, ...: `train` and `test` per class."""
    for split, each in (("train", train), (held_out, test)):
        for c, name in enumerate(classes):
            for i in range(each):
                seed = 1000 * c + 10 * i + (split == "train")
                save(root / split / name / f"{i}.png", noise(side, side, 3, seed=seed))
    return root


def pixels_of(file: Path) -> torch.Tensor:
    """The file as PIL decodes it: [3, H, W] uint8."""
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def quiet(message: str):
    pass


def resident(size=10, side=4, mean=0.0, std=1.0, **options) -> data.ResidentBatches:
    """Batches of noise images. The label of image i is i. mean 0 and std 1 leave the pixels as they are."""
    images = torch.from_numpy(noise(size, 3, side, side))
    options = dict(batch_size=4, train=True) | options
    return data.ResidentBatches(
        images, torch.arange(size), torch.full((3,), mean), torch.full((3,), std), num_classes=size, **options
    )


def labels_of(batches, *epoch) -> list[int]:
    return torch.cat([labels for _, labels in batches.epoch(*epoch)]).tolist()


def same(a, b) -> bool:
    """Whether two sequences of batches are equal bit for bit."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def pixels_in(batches: data.ResidentBatches, images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation by the mean and standard deviation of `batches.images`: uint8 images."""
    x = batches.images.double()
    mean, std = (v.view(-1, 1, 1) for v in (x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3), correction=0)))
    pixels = images * std + mean
    assert (pixels - pixels.round()).abs().max() < 0.01
    return pixels.round().to(torch.uint8)


def windows_of(images: torch.Tensor, pad: int) -> dict[bytes, tuple[int, int, int, bool]]:
    """Map each crop of each zero-padded image, mirrored or not, to (image, row, column, whether mirrored)."""
    h, w = images.shape[-2:]
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    found = {}
    for i, image in enumerate(padded):
        for y in range(2 * pad + 1):
            for x in range(2 * pad + 1):
                window = image[:, y : y + h, x : x + w]
                found[window.tobytes()] = i, y, x, False
                found[window[..., ::-1].tobytes()] = i, y, x, True
    assert len(found) == 2 * len(images) * (2 * pad + 1) ** 2
    return found


def found_in(windows, images: torch.Tensor) -> list[tuple[int, int, int, bool]]:
    return [windows[image.numpy().tobytes()] for image in images.to(torch.uint8).contiguous()]


def error_of(use, *mentions: str) -> str:
    """The message of the DataError that use() raises. Checks that it is one line and contains all `mentions`."""
    with pytest.raises(data.DataError) as caught:
        use()
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1, message
    for words in mentions:
        assert str(words) in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# random_crop.


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_crop_is_pad_and_slice(draw):
    b, c, h, w = (draw.draw(st.integers(1, n), label) for n, label in ((4, "b"), (3, "c"), (9, "h"), (9, "w")))
    pad = draw.draw(st.integers(0, 5), "pad")
    dy, dx = (draw.draw(st.lists(st.integers(0, 2 * pad), min_size=b, max_size=b), label) for label in ("dy", "dx"))
    images = noise(b, c, h, w, seed=b + h + w)
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    expected = np.stack([padded[i, :, dy[i] : dy[i] + h, dx[i] : dx[i] + w] for i in range(b)])
    got = data.random_crop(torch.from_numpy(images), pad, torch.tensor(dy), torch.tensor(dx))
    assert got.dtype == torch.uint8
    assert np.array_equal(got.numpy(), expected)


# ---------------------------------------------------------------------------------------------------------------------
# ResidentBatches.


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), number=st.integers(0, 300), seed=st.integers(0, 2**31))
def test_training_epoch_is_a_permutation_without_the_incomplete_batch(size, batch_size, number, seed):
    batches = resident(size, side=2, batch_size=batch_size, seed=seed)
    sizes = [len(labels) for _, labels in batches.epoch(number)]
    full = min(batch_size, size)
    assert sizes == [full] * (size // full)
    assert len(batches) == len(sizes) >= 1
    seen = labels_of(batches, number)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(size))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), number=st.integers(0, 9))
def test_test_batches_are_complete_and_in_order(size, batch_size, number):
    batches = resident(size, side=2, batch_size=batch_size, train=False, crop=1, flip=True)
    got = list(batches.epoch(number))
    assert len(got) == len(batches)
    assert all(len(labels) == min(batch_size, size) for _, labels in got[:-1])
    assert torch.equal(torch.cat([labels for _, labels in got]), torch.arange(size))
    # not cropped and not mirrored
    assert torch.equal(torch.cat([images for images, _ in got]), batches.images.float())


def test_training_shuffles():
    batches = resident(100, side=2, batch_size=100)
    assert labels_of(batches, 0) != list(range(100))
    assert sorted(labels_of(batches, 0)) == list(range(100))


def test_images_keep_their_labels():
    batches = resident(23, batch_size=5)
    for images, labels in batches.epoch(3):
        assert torch.equal(images, batches.images[labels].float())


def test_dtypes_shapes_and_memory_format():
    for train in (True, False):
        batches = resident(10, side=6, train=train, crop=1, flip=True)
        assert (batches.shape, batches.size, batches.num_classes) == ((3, 6, 6), 10, 10)
        for images, labels in batches.epoch(0):
            assert images.shape == (len(labels), 3, 6, 6)
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert not images.is_contiguous()


def test_the_same_seed_and_epoch_give_the_same_batches():
    first, second = (resident(50, side=8, crop=2, flip=True, seed=5) for _ in range(2))
    list(second.epoch(0))  # earlier epochs must not matter
    torch.manual_seed(123)
    assert same(first.epoch(7), second.epoch(7))
    assert same(first.epoch(7), first.epoch(7))


@pytest.mark.parametrize(("seed", "number"), [(5, 8), (6, 7), (0, 0), (7, 5)])
def test_another_seed_or_epoch_gives_another_order_crops_and_flips(seed, number):
    options = dict(side=8, crop=2, flip=True, batch_size=50)
    [(images, labels)] = resident(50, seed=5, **options).epoch(7)
    [(others, other_labels)] = resident(50, seed=seed, **options).epoch(number)
    assert not torch.equal(labels, other_labels)
    # sort both by image: the remaining differences are crops and flips
    a, b = images[labels.argsort()], others[other_labels.argsort()]
    assert (a != b).flatten(1).any(1).float().mean() > 0.5


@pytest.mark.parametrize("train", [True, False])
def test_an_epoch_can_start_at_any_batch(train):
    batches = resident(30, side=8, mean=100.0, std=50.0, crop=2, flip=True, train=train, seed=3)
    whole = list(batches.epoch(2))
    for skip in range(len(batches) + 1):
        assert same(batches.epoch(2, skip=skip), whole[skip:])
    assert list(batches.epoch(2, skip=len(batches))) == []


def test_flip_only_mirrors_half_of_the_images():
    batches = resident(1000, flip=True, batch_size=100)
    windows = windows_of(batches.images, 0)
    mirrored, patterns = [], set()
    for number in range(2):
        mirrored.append(set())
        for images, labels in batches.epoch(number):
            found = found_in(windows, images)
            assert [i for i, *_ in found] == labels.tolist()
            mirrored[number] |= {i for i, _, _, is_mirrored in found if is_mirrored}
            patterns.add(tuple(is_mirrored for *_, is_mirrored in found))
        assert 420 < len(mirrored[number]) < 580  # 500 ± 5 standard deviations
    assert 180 < len(mirrored[0] & mirrored[1]) < 320  # each epoch draws again: a quarter is mirrored in both
    assert len(patterns) == 20  # and each batch


def test_crop_only_cuts_windows_of_the_padded_image_and_takes_all_of_them():
    batches = resident(200, crop=1, batch_size=50)
    windows = windows_of(batches.images, 1)
    seen, patterns = torch.zeros(3, 3, dtype=torch.int64), set()
    for images, labels in batches.epoch(0):
        found = found_in(windows, images)
        assert [i for i, *_ in found] == labels.tolist()
        assert not any(is_mirrored for *_, is_mirrored in found)
        for _, y, x, _ in found:
            seen[y, x] += 1
        patterns.add(tuple((y, x) for _, y, x, _ in found))
    assert seen.sum() == 200
    assert seen.min() >= 5  # 22 each are expected
    assert len(patterns) == 4  # each batch draws again


def test_normalisation():
    batches = resident(40, mean=120.0, std=30.0, batch_size=8)
    for images, labels in batches.epoch(0):
        torch.testing.assert_close(images, (batches.images[labels].float() - 120) / 30, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# digits.


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    label_of = {(p * 255 / 16).round().astype(np.uint8).tobytes(): int(y) for p, y in zip(pixels, labels, strict=True)}
    assert len(label_of) == 1797  # no image occurs twice
    train, _, test = data.load("digits", log=quiet)
    assert (train.size, test.size) == (1438, 359)
    assert train.shape == test.shape == (1, 8, 8)
    assert train.num_classes == test.num_classes == 10
    assert train.classes == test.classes == [str(i) for i in range(10)]
    keys = []
    for batches in (train, test):
        assert (batches.images.dtype, batches.labels.dtype) == (torch.uint8, torch.int64)
        assert set(batches.labels.tolist()) == set(range(10))
        for image, label in zip(batches.images, batches.labels.tolist(), strict=True):
            keys.append(image.numpy().tobytes())
            assert label_of[keys[-1]] == label
    assert len(set(keys)) == 1797  # no test image is a training image
    assert test.labels.tolist() == labels[4::5].tolist()  # every fifth


def test_digits_are_normalised_and_never_mirrored():
    train, _, _ = data.load("digits", batch_size=1438, crop=False, flip=True, log=quiet)
    [(images, labels)] = train.epoch(0)
    assert images.shape == (1438, 1, 8, 8)
    assert abs(images.mean()) < 1e-4
    assert abs(images.std(correction=0) - 1) < 1e-4
    label_of = {x.numpy().tobytes(): y for x, y in zip(train.images, train.labels.tolist(), strict=True)}
    assert [label_of[x.numpy().tobytes()] for x in pixels_in(train, images).contiguous()] == labels.tolist()


def test_digits_are_cropped_by_one_pixel():
    images = {crop: next(data.load("digits", crop=crop, log=quiet)[0].epoch(0))[0] for crop in (True, False)}
    changed = (images[True] != images[False]).flatten(1).any(1).float().mean()
    assert changed > 0.7  # 8 of the 9 windows move the image


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    error_of(lambda: data.load("digits"), "pip install scikit-learn")


# ---------------------------------------------------------------------------------------------------------------------
# The validation images.


def keys_of(images: torch.Tensor) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for image in images]


def test_without_val_there_are_no_validation_batches(colours):
    assert data.load("digits")[1] is None
    assert large(colours)[1] is None


@pytest.mark.parametrize("val", [1, 100, 359])
def test_validation_images_are_held_out_of_training(val):
    whole, _, whole_test = data.load("digits", batch_size=200)
    train, held_out, test = data.load("digits", batch_size=200, val=val)
    assert (train.size, held_out.size, test.size) == (1438 - val, val, 359)
    label_of = dict(zip(keys_of(whole.images), whole.labels.tolist(), strict=True))
    parts = keys_of(train.images), keys_of(held_out.images), keys_of(test.images)
    assert len(set().union(*parts)) == sum(map(len, parts)) == 1797  # disjoint and complete
    assert set(parts[0]) | set(parts[1]) == set(label_of)
    assert keys_of(whole_test.images) == parts[2]
    for batches, keys in ((train, parts[0]), (held_out, parts[1])):
        assert [label_of[key] for key in keys] == batches.labels.tolist()
        assert keys == [key for key in label_of if key in set(keys)]  # the order of the data set is kept


def test_training_with_validation_sees_no_validation_or_test_image():
    train, held_out, test = data.load("digits", batch_size=100, val=300, crop=False)
    others = set(keys_of(held_out.images)) | set(keys_of(test.images))
    seen = {key for e in range(3) for images, _ in train.epoch(e) for key in keys_of(pixels_in(train, images))}
    assert seen <= set(keys_of(train.images))
    assert not seen & others
    x = train.images.double()  # pixels_in has checked that the images are normalised with these
    mean, std = x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3), correction=0)
    for batches in (train, held_out, test):
        torch.testing.assert_close(batches.scale.double().view(-1), 1 / std, rtol=1e-5, atol=0)
        torch.testing.assert_close(batches.shift.double().view(-1), -mean / std, rtol=1e-5, atol=0)
    whole, _, _ = data.load("digits")
    assert not torch.equal(whole.scale, train.scale)


def test_the_images_held_out_for_validation_do_not_change_the_statistics(tmp_path):
    make_folder(tmp_path, train=20)
    train, held_out, _ = data.load("folder", tmp_path, val=10, log=quiet)
    keys = set(keys_of(held_out.images))
    for file in (tmp_path / "train").rglob("*.png"):
        if pixels_of(file).numpy().tobytes() in keys:
            save(file, np.full((16, 16, 3), 255, np.uint8))  # changes neither names nor order
    after, changed, _ = data.load("folder", tmp_path, val=10, log=quiet)
    assert (changed.images == 255).all()
    assert torch.equal(train.images, after.images)
    assert torch.equal(train.scale, after.scale) and torch.equal(train.shift, after.shift)


def test_validation_batches_are_in_order_and_not_augmented():
    _, held_out, _ = data.load("digits", val=77, batch_size=10)
    for number in range(2):
        got = list(held_out.epoch(number))
        images, labels = (torch.cat(x) for x in zip(*got, strict=True))
        assert torch.equal(labels, held_out.labels)
        torch.testing.assert_close(images, held_out.images * held_out.scale + held_out.shift, rtol=0, atol=1e-5)


def test_the_seed_alone_chooses_the_validation_images():
    def chosen(**options):
        return data.load("digits", val=60, **options)[1].images

    first = chosen(seed=3)
    torch.manual_seed(99)
    others = dict(batch_size=8, crop=False, flip=False, mean=(0.5,), std=(0.2,))
    assert torch.equal(first, chosen(seed=3, **others))
    before = torch.get_rng_state()
    assert not torch.equal(first, chosen(seed=4))
    assert torch.equal(before, torch.get_rng_state())
    # written down, so that another machine or version of torch that chooses other images is noticed
    labels = torch.arange(40) % 4
    assert data.hold_out(labels, list("abcd"), 8, seed=0)[1].tolist() == [2, 8, 11, 25, 28, 33, 34, 39]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.data())
def test_each_class_gives_its_proportional_share(counts, draw):
    size = sum(counts)
    val = draw.draw(st.integers(0, size - len(counts)), "val")
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(size, generator=torch.Generator().manual_seed(size))]
    remaining, held_out = data.hold_out(labels, [""] * len(counts), val, seed=draw.draw(st.integers(0, 9), "seed"))
    assert (len(remaining), len(held_out)) == (size - val, val)
    assert sorted(remaining.tolist() + held_out.tolist()) == list(range(size))
    given = torch.bincount(labels[held_out], minlength=len(counts)).tolist()
    assert all(share < count for share, count in zip(given, counts, strict=True))
    shares = [val * count / size for count in counts]
    if all(math.ceil(share) < count for share, count in zip(shares, counts, strict=True)):
        assert all(math.floor(s) <= n <= math.ceil(s) for n, s in zip(given, shares, strict=True))
        rounded_up = [s % 1 for n, s in zip(given, shares, strict=True) if n > s]
        rounded_down = [s % 1 for n, s in zip(given, shares, strict=True) if n < s]
        assert min(rounded_up, default=1) >= max(rounded_down, default=0) - 1e-9


def test_each_image_can_be_chosen_for_validation():
    labels = torch.arange(30) % 3
    chosen = torch.cat([data.hold_out(labels, list("abc"), 6, seed)[1] for seed in range(100)])
    times = torch.bincount(chosen, minlength=30)
    assert times.min() > 5 and times.max() < 40  # 20 each are expected


@pytest.mark.parametrize("val", [-1, 5, 6, 7])
def test_val_must_leave_an_image_of_each_class(tmp_path, val):
    make_folder(tmp_path, train=3)
    for size in (16, 128):
        error_of(
            lambda size=size: data.load("folder", tmp_path, val=val, image_size=size, log=quiet), f"--val {val} ", "4"
        )
    train, held_out, _ = data.load("folder", tmp_path, val=4, log=quiet)
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([0, 1], [0, 0, 1, 1])


def test_validation_of_streamed_images(colours):
    train, held_out, test = large(colours, val=4, batch_size=7)
    assert (train.size, held_out.size, test.size) == (7, 4, 5)
    in_training = [{i for images, _ in train.epoch(e) for i in numbers_of(images)} for e in range(2)]
    [(images, labels)] = held_out.epoch(0)
    numbers = numbers_of(images)
    assert numbers == sorted(numbers)
    assert labels.tolist() == [int(i >= 5) for i in numbers] == [0, 0, 1, 1]
    assert in_training[0] == in_training[1] == set(range(11)) - set(numbers)
    parts = [large(colours, val=4, batch_size=6, rank=rank, world_size=3)[1] for rank in range(3)]
    together = [i for part in parts for images, _ in part.epoch(0) for i in numbers_of(images)]
    assert together == numbers  # of several processes, each tests its part of the same images
    # the same images as with the images in memory
    _, in_memory, _ = data.load("folder", colours, val=4, image_size=16, log=quiet)
    assert [round(image[0].float().mean().item() / 20) for image in in_memory.images] == numbers


# ---------------------------------------------------------------------------------------------------------------------
# Folders of small images.


def test_folder_classes_are_sorted_and_pixels_exact(tmp_path):
    make_folder(tmp_path, classes=("wasp", "ant", "Bee"), train=3, test=2)
    (tmp_path / "train" / "README.txt").write_text("not a class")
    train, _, test = data.load("folder", tmp_path, log=quiet)
    assert train.num_classes == test.num_classes == 3
    assert train.classes == test.classes == ["Bee", "ant", "wasp"]
    assert train.shape == test.shape == (3, 16, 16)
    for batches, split, each in ((train, "train", 3), (test, "test", 2)):
        files = [tmp_path / split / name / f"{i}.png" for name in ("Bee", "ant", "wasp") for i in range(each)]
        assert torch.equal(batches.images, torch.stack([pixels_of(file) for file in files]))
        assert batches.labels.tolist() == [label for label in range(3) for _ in range(each)]
        assert batches.labels.dtype == torch.int64
    assert labels_of(test) == test.labels.tolist()


def test_folder_is_normalised_by_its_training_images(tmp_path):
    make_folder(tmp_path, train=4)
    for file in (tmp_path / "train").rglob("*.png"):  # channels of different ranges, one of them constant
        pixels = np.array(Image.open(file))
        save(file, np.stack([pixels[..., 0] // 4, 200 + pixels[..., 1] // 8, np.full((16, 16), 77, np.uint8)], axis=-1))
    train, _, test = data.load("folder", tmp_path, batch_size=4, crop=False, flip=False, log=quiet)
    got = torch.cat([images for images, _ in train.epoch(0)])
    assert len(got) == 8
    torch.testing.assert_close(got[:, :2].mean(dim=(0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(got[:, :2].std(dim=(0, 2, 3), correction=0), torch.ones(2), rtol=0, atol=1e-4)
    assert got[:, 2].abs().max() < 0.2  # the constant channel must not divide by zero
    [(images, _)] = test.epoch(0)
    x = train.images[:, :2].float()
    mean, std = (v.view(2, 1, 1) for v in (x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3), correction=0)))
    torch.testing.assert_close(images[:, :2], (test.images[:, :2].float() - mean) / std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("crop", [True, False])
def test_crop_and_flip_can_be_turned_off(tmp_path, crop, flip):
    make_folder(tmp_path, train=20, side=28)
    train, _, _ = data.load("folder", tmp_path, batch_size=40, crop=crop, flip=flip, log=quiet)
    [(images, labels)] = train.epoch(0)
    found = found_in(windows_of(train.images, 3), pixels_in(train, images))  # 28 // 8 pixels of padding
    assert [train.labels[i] for i, *_ in found] == labels.tolist()
    assert len({i for i, *_ in found}) == 40
    assert len({(y, x) for _, y, x, _ in found}) > 10 if crop else {(y, x) for _, y, x, _ in found} == {(3, 3)}
    assert {is_mirrored for *_, is_mirrored in found} == ({True, False} if flip else {False})


def test_jpeg_and_upper_case_suffixes(tmp_path):
    make_folder(tmp_path, train=1)
    names = ("1.jpg", "2.JPG", "3.JPEG", "4.PNG", "5.Bmp", "6.webp", "7.tif", "8.TIFF", "9.pgm")
    for i, name in enumerate(names):
        save(tmp_path / "train/ant" / name, noise(16, 16, *[3] * (name != "9.pgm"), seed=i))
    (tmp_path / "train/ant/notes.txt").write_text("not an image")
    train, _, _ = data.load("folder", tmp_path, log=quiet)
    files = [tmp_path / "train/ant" / name for name in ("0.png", *names)] + [tmp_path / "train/bee/0.png"]
    assert torch.equal(train.images, torch.stack([pixels_of(file) for file in files]))
    assert train.labels.tolist() == [0] * 10 + [1]


def test_the_first_frame_of_a_gif_is_read(tmp_path):
    make_folder(tmp_path, train=1)
    frames = [Image.fromarray(np.full((16, 16), grey, np.uint8)) for grey in (50, 100, 200)]
    frames[0].save(tmp_path / "train/ant/1.gif", save_all=True, append_images=frames[1:])
    assert Image.open(tmp_path / "train/ant/1.gif").n_frames == 3
    train, _, _ = data.load("folder", tmp_path, log=quiet)
    assert (train.images[1] == 50).all()


def test_images_of_all_modes_become_rgb(tmp_path):
    make_folder(tmp_path, train=1)
    grey, rgba = noise(16, 16, seed=1), noise(16, 16, 4, seed=2)
    grey_alpha, bits = noise(16, 16, 2, seed=3), noise(16, 16, seed=4) > 127
    save(tmp_path / "train/ant/1.png", grey)
    save(tmp_path / "train/ant/2.png", rgba)
    Image.fromarray(grey_alpha).save(tmp_path / "train/ant/3.png")
    save(tmp_path / "train/ant/4.png", bits)
    Image.fromarray(noise(16, 16, 3, seed=5)).quantize(16).save(tmp_path / "train/ant/5.png")
    modes = [Image.open(tmp_path / f"train/ant/{i}.png").mode for i in range(1, 6)]
    assert modes == ["L", "RGBA", "LA", "1", "P"]
    train, _, _ = data.load("folder", tmp_path, log=quiet)
    expected = [
        np.stack([grey] * 3),
        on_white(rgba[..., :3], rgba[..., 3:]).transpose(2, 0, 1),
        np.stack([on_white(grey_alpha[..., 0], grey_alpha[..., 1])] * 3),
        np.stack([bits.astype(np.uint8) * 255] * 3),
        pixels_of(tmp_path / "train/ant/5.png").numpy(),
    ]
    off = train.images[1:6].int() - torch.from_numpy(np.stack(expected).astype(np.int32))
    assert off[[0, 3, 4]].abs().max() == 0
    assert off[[1, 2]].abs().max() <= 1  # rounding


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return (255 + (pixels.astype(float) - 255) * (alpha / 255)).round().astype(np.uint8)


@pytest.mark.parametrize("name", ["0.png", "0.gif"])
def test_a_transparent_colour_becomes_white(tmp_path, name):
    make_folder(tmp_path, train=1, test=1)
    palette = Image.fromarray(noise(16, 16) % 4).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    (tmp_path / "train/ant/0.png").unlink()
    palette.save(tmp_path / "train/ant" / name, transparency=2)
    expected = torch.tensor(palette.convert("RGB").get_flattened_data(), dtype=torch.uint8).view(16, 16, 3)
    expected[torch.from_numpy(noise(16, 16) % 4 == 2)] = 255
    for size in (16, 128):
        train, _, _ = data.load("folder", tmp_path, image_size=size, flip=False, workers=0, log=quiet)
        if size == 16:
            assert torch.equal(train.images[0].permute(1, 2, 0), expected)
        else:
            images = next(uncropped(train).epoch(0))[0]
            assert unnormalised(images).max() > 254


def uncropped(train: data.StreamedBatches) -> data.StreamedBatches:
    """The training images, transformed as for testing."""
    twin = copy.copy(train)
    twin.transform = data.default_transforms(train.shape[-1], False, data.IMAGENET_MEAN, data.IMAGENET_STD)[1]
    return twin


def pnm(path: Path, kind: str, pixels: np.ndarray, maximum: int) -> None:
    height, width = pixels.shape[:2]
    path.write_bytes(f"{kind}\n{width} {height}\n{maximum}\n".encode() + pixels.astype(">u2").tobytes())


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "pgm", "ppm", "ppm of 10 bits", "colour ppm"])
@pytest.mark.parametrize("streamed", [False, True])
def test_sixteen_bit_images_keep_their_contrast(tmp_path, suffix, streamed):
    make_folder(tmp_path, train=1, side=128 if streamed else 16)
    side = 146 if streamed else 16  # the centre of 146 pixels is used
    deep = np.linspace(0, 65535, side * side).astype(np.uint16).reshape(side, side)
    (tmp_path / "train/ant/0.png").unlink()
    file = tmp_path / f"train/ant/0.{suffix.split()[-1]}"
    if suffix == "ppm of 10 bits":
        pnm(file.with_suffix(".ppm"), "P5", deep // 64, 1023)
    elif suffix == "colour ppm":
        pnm(file, "P6", np.stack([deep] * 3, axis=-1), 65535)
    elif suffix in ("pgm", "ppm"):
        pnm(file, "P5", deep, 65535)
    else:
        save(file, deep)
    size = 128 if streamed else 16
    train, _, _ = data.load("folder", tmp_path, image_size=size, batch_size=2, workers=0, log=quiet)
    images, labels = next((uncropped(train) if streamed else train).epoch(0))
    got = unnormalised(images)[labels == 0] if streamed else train.images[:1].float()
    expected = torch.from_numpy((deep // 257).astype(np.float32))[None, None]
    expected = expected[..., 9:137, 9:137] if streamed else expected
    assert (got - expected).abs().max() <= 1.01


def test_pixels_of_unknown_range_are_refused(tmp_path):
    make_folder(tmp_path, train=1)
    for i, kind in enumerate((np.float32, np.int32)):
        save(tmp_path / f"train/ant/{i + 1}.tif", np.linspace(0, 1, 256).astype(kind).reshape(16, 16))
    error_of(lambda: data.load("folder", tmp_path, log=quiet), "2 images", "1.tif", "2.tif", "32-bit", "16 bits")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    make_folder(tmp_path, train=1)
    pixels = noise(16, 16, 3)
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),  # the camera was turned: the image is to be turned clockwise
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train/ant/0.png").unlink()
    save(tmp_path / f"train/ant/0.{suffix}", pixels, exif=exif)
    train, _, _ = data.load("folder", tmp_path, log=quiet)
    assert np.array_equal(train.images[0].permute(1, 2, 0).numpy(), turned)


def test_a_damaged_exif_block_does_not_matter(tmp_path):
    make_folder(tmp_path, train=1)
    save(tmp_path / "train/ant/0.png", noise(16, 16, 3, seed=5), exif=b"Exif\0\0garbage")
    train, _, _ = data.load("folder", tmp_path, log=quiet)
    assert np.array_equal(train.images[0].permute(1, 2, 0).numpy(), noise(16, 16, 3, seed=5))


@pytest.mark.parametrize("size", [None, 16, 128])
def test_pil_does_not_warn_about_images_that_it_can_read(tmp_path, monkeypatch, size):
    make_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16 - 1)
    save(tmp_path / "train/ant/0.tif", noise(16, 16, 3))
    save(tmp_path / "train/ant/0.jpg", noise(16, 16, 3), exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0cut")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.decode(tmp_path / "train/ant/0.jpg")
        assert {w.category.__name__ for w in caught} == {"DecompressionBombWarning", "UserWarning"}
        caught.clear()
        spec = importlib.util.spec_from_file_location("data_again", data.__file__)
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)  # pytest has dropped the filters of the first import
        train, _, _ = again.load("folder", tmp_path, image_size=size, batch_size=8, workers=0, log=quiet)
        list(train.epoch(0))
        warnings.warn("of others", stacklevel=1)
    assert [str(w.message) for w in caught] == ["of others"]


def test_images_of_other_sizes_are_resized(tmp_path):
    make_folder(tmp_path, train=1)
    colours = {(40, 12): (250, 3, 90), (7, 7): (1, 128, 255), (16, 30): (64, 65, 66)}
    for i, ((w, h), colour) in enumerate(colours.items(), start=1):
        save(tmp_path / f"train/bee/{i}.png", np.full((h, w, 3), colour, np.uint8))
    for size in (16, 24):
        train, _, test = data.load("folder", tmp_path, image_size=size, log=quiet)
        assert train.shape == test.shape == (3, size, size)
        for image, colour in zip(train.images[-3:], colours.values(), strict=True):
            assert torch.equal(image, torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, size, size))
    checks = np.indices((32, 32)).sum(axis=0) % 2 * np.uint8(255)
    save(tmp_path / "test/ant/0.png", checks.astype(np.uint8))
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 64, axis=0)  # dark on the left, light on the right
    save(tmp_path / "train/ant/0.png", ramp)
    train, _, test = data.load("folder", tmp_path, image_size=16, log=quiet)
    image = train.images[0, 0].int()
    assert (image[:, 1:] > image[:, :-1]).all()
    assert (image[0] == image[-1]).all()
    assert (test.images[0, :, 1:-1, 1:-1].int() - 127).abs().max() <= 8  # the pixels are averaged


def test_data_sets_other_than_folders_are_resized_too():
    own, _, _ = data.load("digits")
    for size in (4, 5, 20):
        train, _, test = data.load("digits", image_size=size)
        assert train.shape == test.shape == (1, size, size)
        for small, whole in zip(train.images[:20, 0], own.images[:20, 0], strict=True):
            expected = Image.fromarray(whole.numpy()).resize((size, size), resample=2)
            assert np.abs(np.asarray(expected).astype(int) - small.numpy()).max() <= 1
    with pytest.raises(data.DataError, match="--image-size 97 is too large for digits: use at most 96"):
        data.load("digits", image_size=97)


def test_val_works_in_place_of_test(tmp_path):
    make_folder(tmp_path, held_out="val")
    _, _, test = data.load("folder", tmp_path, log=quiet)
    files = [tmp_path / "val" / name / f"{i}.png" for name in ("ant", "bee") for i in range(2)]
    assert torch.equal(test.images, torch.stack([pixels_of(file) for file in files]))


def test_val_is_used_when_test_has_no_classes(tmp_path):
    # ImageNet's layout: test/ contains images without class folders
    make_folder(tmp_path, held_out="val")
    save(tmp_path / "test/0.png", noise(16, 16, 3))
    _, _, test = data.load("folder", tmp_path, log=quiet)
    assert test.size == 4


def test_a_folder_smaller_than_a_batch_is_one_batch(tmp_path):
    train, _, test = data.load("folder", make_folder(tmp_path), batch_size=128, log=quiet)
    assert [len(labels) for _, labels in train.epoch(0)] == [6]
    assert [len(labels) for _, labels in test.epoch(0)] == [4]


def test_default_image_size(tmp_path):
    def shape(name, *side, **options):
        save(tmp_path / "train/ant/0.png", noise(*side, 3))
        batches = data.load(name, tmp_path, log=quiet, **options)
        assert batches[0].shape == batches[-1].shape
        return batches[0].shape, type(batches[0])

    make_folder(tmp_path, train=1, test=1)
    (tmp_path / "train/bee/0.png").unlink()
    (tmp_path / "train/bee/0.png").symlink_to(tmp_path / "train/ant/0.png")
    assert shape("folder", 96, 96) == ((3, 96, 96), data.ResidentBatches)
    assert shape("folder", 97, 97) == ((3, 224, 224), data.StreamedBatches)
    assert shape("folder", 20, 16) == ((3, 224, 224), data.StreamedBatches)
    assert shape("folder", 20, 16, image_size=20) == ((3, 20, 20), data.ResidentBatches)
    assert shape("folder", 20, 20, image_size=128) == ((3, 128, 128), data.StreamedBatches)
    assert shape("imagenet", 20, 20) == ((3, 224, 224), data.StreamedBatches)
    assert shape("imagenet", 20, 20, image_size=64) == ((3, 64, 64), data.ResidentBatches)


def sizes_folder(root: Path, *sides: tuple[int, int]) -> Path:
    make_folder(root, train=1, test=1)
    for i, (width, height) in enumerate(sides):
        save(root / f"train/ant/{i}.png", noise(height, width, 3))
    return root


@pytest.mark.parametrize(
    ("sides", "size"),
    [
        ([(30, 17), (32, 32), (32, 32), (32, 32)], 32),  # the first image alone does not decide
        ([(500, 400), (32, 32), (32, 32), (32, 32), (32, 32)], 32),
        ([(8, 8), (160, 120), (140, 200), (90, 300)], 224),
        ([(40, 42), (50, 48), (44, 44), (45, 46), (46, 44)], 45),  # nearly square, all different
        ([(90, 40), (80, 50), (90, 50), (80, 40), (90, 50)], 224),  # oblong images are cropped
    ],
)
def test_the_sizes_of_all_images_decide(tmp_path, sides, size):
    log = []
    train, _, test = data.load("folder", sizes_folder(tmp_path, *sides), log=log.append)
    assert train.shape == test.shape == (3, size, size)
    said = [m for m in log if "--image-size" in m]
    assert len(said) == 1 and f"{size}×{size}" in said[0] and len(said[0].splitlines()) == 1


def test_the_size_is_not_mentioned_where_all_images_have_it(tmp_path):
    log = []
    data.load("folder", make_folder(tmp_path), log=log.append)
    assert not [m for m in log if "--image-size" in m]
    data.load("folder", sizes_folder(tmp_path, (3, 5)), image_size=24, log=log.append)
    assert not [m for m in log if "--image-size" in m]


def test_few_headers_are_read_to_choose_the_size(tmp_path, monkeypatch):
    make_folder(tmp_path, train=1, test=1, side=130)
    for i in range(1, 1500):
        os.link(tmp_path / "train/ant/0.png", tmp_path / f"train/ant/{i}.png")
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args, **options: opened.append(file) or open_image(file))
    for _ in range(2):
        assert data.load("folder", tmp_path, log=quiet)[0].shape == (3, 224, 224)
    assert len(opened) == 2000
    assert opened[:1000] == opened[1000:]  # a second process opens the same ones
    numbers = sorted(int(Path(file).stem) for file in set(opened))
    assert len(numbers) > 990 and numbers[0] < 50 and numbers[-1] > 1450  # from all over the folder


# ---------------------------------------------------------------------------------------------------------------------
# What is ignored.


def test_ignored_files_are_counted_in_one_message(tmp_path):
    make_folder(tmp_path)
    before, _, test_before = data.load("folder", tmp_path, log=quiet)
    for name in (
        *("train/ant/notes.txt", "train/ant/0.xml", "test/bee/Thumbs.db"),  # other suffixes
        *("train/.ipynb_checkpoints/0.png", "test/.ipynb_checkpoints/0.png", "train/bee/._0.png"),  # hidden
        *("train/bee/.ipynb_checkpoints/0.png", "train/bee/.ipynb_checkpoints/1.png"),
        *("link/3.png", "link/more/4.png"),  # in a folder that a link in a class folder leads to
        *("train/README.md", "train/5.png"),  # outside
        *("val/ant/0.png", "val/bee/0.png", "val/cat/0.png"),  # beside test/
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "train/ant/2.png").read_bytes())
    (tmp_path / "train/ant/more").symlink_to("../../link")
    train, _, test, log = *data.load("folder", tmp_path, log=(log := []).append), log
    assert train.classes == ["ant", "bee"]
    assert torch.equal(train.images, before.images) and torch.equal(test.images, test_before.images)
    [message] = log
    assert len(message.splitlines()) == 1
    for words in (
        "15 files",
        "3 with other suffixes",
        "5 hidden",
        "2 in linked folders",
        "2 outside",
        "3 beside train/",
    ):
        assert words in message, message
    for example in ("test/.ipynb_checkpoints", "test/bee/Thumbs.db", "train/ant/more", "train/5.png", "val"):
        assert f"(such as {example})" in message, message
    (tmp_path / "train/ant/notes.txt").unlink()
    log.clear()
    data.load("folder", tmp_path, image_size=128, log=log.append)
    assert len(log) == 1 and "14 files" in log[0]


def test_the_folders_in_a_class_folder_are_read_as_torchvision_reads_them(tmp_path):
    folder = data.torchvision_module("datasets").ImageFolder
    make_folder(tmp_path)
    for name in ("train/ant/images/3.png", "train/bee/a/b/4.png", "train/bee/a/b/c/4.png", "train/ant/a/b/c/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "train/ant/2.png").read_bytes())
    theirs = folder(tmp_path / "train")
    classes, splits = data.scan_folder(tmp_path, quiet)
    assert classes == theirs.classes
    assert sorted(zip(*splits["train"], strict=True)) == sorted(theirs.samples)
    before = data.load("folder", tmp_path, log=(log := []).append)[0]
    assert before.labels.bincount().tolist() == [5, 5] and all("decoding" in message for message in log)
    # An image that moves to another class, with its size and time, is decoded anew.
    moved = tmp_path / "train/bee/x/b/c/4.png"
    moved.parent.mkdir(parents=True)
    (tmp_path / "train/ant/a/b/c/4.png").rename(moved)
    assert data.load("folder", tmp_path, log=quiet)[0].labels.bincount().tolist() == [4, 6]


def test_nothing_is_said_where_nothing_is_ignored(tmp_path):
    data.load("folder", make_folder(tmp_path), log=(log := []).append)
    assert len(log) == 2 and all("decoding" in m for m in log)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("size", [None, 128])
def test_pipes_sockets_and_devices_are_not_read(tmp_path, size):
    make_folder(tmp_path)
    os.mkfifo(tmp_path / "train/ant/1.5.png")
    (tmp_path / "train/ant/link.png").symlink_to("1.5.png")
    (tmp_path / "test/bee/zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "train/bee.png")
    with socket.socket(socket.AF_UNIX) as s, contextlib.chdir(tmp_path / "train/bee"):
        s.bind("a.jpg")  # a socket's path must be short
    train, _, test = data.load("folder", tmp_path, image_size=size, workers=0, log=(log := []).append)
    assert (train.size, test.size) == (6, 4)
    assert len(list(train.epoch(0))) == 1
    assert "4 that are pipes" in log[0]


def test_links_to_images_and_folders_are_followed(tmp_path):
    make_folder(tmp_path / "real")
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
        (tmp_path / split / "bee").symlink_to(tmp_path / "real" / split / "bee")
        (tmp_path / split / "ant/0.png").symlink_to(tmp_path / "real" / split / "ant/1.png")
    train, _, _ = data.load("folder", tmp_path, log=quiet)
    assert train.labels.tolist() == [0, 1, 1, 1]
    assert torch.equal(train.images[0], pixels_of(tmp_path / "real/train/ant/1.png"))


@pytest.mark.parametrize("where", ["train", "test", "train/ant", "test/bee"])
def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch, where):
    make_folder(tmp_path)
    scandir = os.scandir

    def refuse(path):  # root may read everything
        if Path(path) == tmp_path / where:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    error_of(lambda: data.load("folder", tmp_path, log=quiet), tmp_path / where, "Permission denied", "readable")


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_one_class_is_not_enough(tmp_path, name):
    make_folder(tmp_path, classes=("ant",))
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    error_of(lambda: data.load(name, tmp_path, log=quiet), "only the class 'ant'")


def test_all_unreadable_images_are_named_before_training(tmp_path):
    make_folder(tmp_path, train=6, test=2)
    damaged = ["train/ant/0.png", "train/ant/3.png", "test/bee/1.png"]
    for name in damaged:
        (tmp_path / name).write_bytes(b"")
    for _ in range(2):
        error_of(lambda: data.load("folder", tmp_path, log=quiet), "3 images", *(tmp_path / name for name in damaged))
    for i in range(6):
        (tmp_path / f"train/bee/{i}.png").write_bytes(b"")
    message = error_of(lambda: data.load("folder", tmp_path, log=quiet), "9 images", tmp_path / damaged[0], "...")
    assert 5 <= message.count(str(tmp_path)) <= 6  # the first few, and perhaps PIL's message


def test_a_broken_link_is_named_beside_a_cache(tmp_path):
    make_folder(tmp_path)
    data.load("folder", tmp_path, log=quiet)
    (tmp_path / "train/ant/9.png").symlink_to(tmp_path / "nowhere.png")
    error_of(lambda: data.load("folder", tmp_path, log=quiet), tmp_path / "train/ant/9.png", "cannot be read")


def test_a_folder_without_a_readable_image(tmp_path):
    make_folder(tmp_path)
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(b"")
    error_of(lambda: data.load("folder", tmp_path, log=quiet), "6 images", "cannot be read")


# ---------------------------------------------------------------------------------------------------------------------
# The cache of decoded images.


def load_logged(root: Path, **options):
    log = []
    train, _, test = data.load("folder", root, log=log.append, **options)
    return train, test, log


def test_images_are_decoded_once(tmp_path):
    make_folder(tmp_path)
    train, test, log = load_logged(tmp_path)
    assert len(log) == 2
    assert "6 train" in log[0] and "4 test" in log[1]
    again, test_again, log = load_logged(tmp_path)
    assert log == []
    assert same(train.epoch(1), again.epoch(1))
    assert same(test.epoch(0), test_again.epoch(0))
    _, _, log = load_logged(tmp_path, image_size=12)
    assert len(log) == 2  # another size has another cache
    _, _, log = load_logged(tmp_path)
    assert log == []  # and the first cache still exists


def test_the_cache_moves_with_the_folder(tmp_path):
    make_folder(tmp_path / "here")
    before, _, _ = load_logged(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    after, _, log = load_logged(tmp_path / "there")
    assert log == []
    assert same(before.epoch(0), after.epoch(0))


def edit(root):
    file = root / "train/ant/0.png"
    later = file.stat().st_mtime_ns + 10**9
    save(file, noise(16, 16, 3, seed=99))
    os.utime(file, ns=(later, later))


def edit_to_same_size_and_name(root):
    file = root / "train/ant/0.bmp"
    later = file.stat().st_mtime_ns + 10**9
    before = file.stat().st_size
    save(file, noise(16, 16, 3, seed=99))
    assert file.stat().st_size == before
    os.utime(file, ns=(later, later))


def replace_by_an_equally_old_and_large_file(root):
    """As unpacking an archive does it, in which all files have one date."""
    file = root / "train/ant/0.bmp"
    before = file.stat()
    save(root / "new.bmp", noise(16, 16, 3, seed=99))
    os.utime(root / "new.bmp", ns=(before.st_mtime_ns, before.st_mtime_ns))
    (root / "new.bmp").replace(file)
    assert file.stat()[6:9] == before[6:9]


def edit_at_the_same_time(root):
    file = root / "train/ant/0.png"
    before = file.stat()
    save(file, np.zeros((16, 16, 3), np.uint8))
    os.utime(file, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert file.stat().st_size != before.st_size


def add(root):
    save(root / "train/bee/9.png", noise(16, 16, 3, seed=99))


def remove(root):
    (root / "train/ant/1.png").unlink()


def rename_image(root):
    (root / "train/ant/0.png").rename(root / "train/ant/7.png")


def move_to_other_class(root):
    (root / "train/ant/2.png").rename(root / "train/bee/!.png")  # does not change the order of the images


CHANGES = (edit, edit_to_same_size_and_name, edit_at_the_same_time, replace_by_an_equally_old_and_large_file)
CHANGES += (add, remove, rename_image, move_to_other_class)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_decoded_again(tmp_path, change):
    make_folder(tmp_path)
    save(tmp_path / "train/ant/0.bmp", noise(16, 16, 3, seed=98))
    load_logged(tmp_path)
    change(tmp_path)
    train, _, log = load_logged(tmp_path)
    assert len(log) == 1 and "train" in log[0]  # the test images did not change
    files = [p for name in ("ant", "bee") for p in sorted((tmp_path / "train" / name).iterdir())]
    assert torch.equal(train.images, torch.stack([pixels_of(file) for file in files]))
    assert train.labels.tolist() == [int(file.parent.name == "bee") for file in files]
    assert load_logged(tmp_path)[2] == []


def test_renamed_classes_are_decoded_again(tmp_path):
    make_folder(tmp_path)
    before, _, _ = load_logged(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "ant").rename(tmp_path / split / "cat")  # now after bee
    after, _, log = load_logged(tmp_path)
    assert len(log) == 2
    assert torch.equal(after.images, before.images[[3, 4, 5, 0, 1, 2]])


def test_a_folder_that_cannot_be_written_still_loads(tmp_path):
    make_folder(tmp_path)
    (tmp_path / ".train-16.pt").mkdir()  # a file cannot replace a folder
    expected = torch.stack([pixels_of(tmp_path / "train" / n / f"{i}.png") for n in ("ant", "bee") for i in range(3)])
    for _ in range(2):
        train, _, log = load_logged(tmp_path)
        assert torch.equal(train.images, expected)
        assert [m for m in log if "could not be cached" in m and ".train-16.pt" in m]
    assert {p.name for p in tmp_path.iterdir()} == {"train", "test", ".train-16.pt", ".test-16.pt"}


def test_a_read_only_file_system_still_loads(tmp_path, monkeypatch):
    def refuse(*args, **options):  # on such a file system even deleting a missing file fails
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    make_folder(tmp_path)
    monkeypatch.setattr(torch, "save", refuse)
    for call in ("unlink", "remove", "replace", "rename"):
        monkeypatch.setattr(os, call, refuse)
    train, test, log = load_logged(tmp_path)
    assert (train.size, test.size) == (6, 4)
    assert sum("could not be cached" in m for m in log) == 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("disk full\nframe 1"), None])
def test_each_writer_of_the_cache_has_its_own_temporary_file(tmp_path, monkeypatch, error):
    make_folder(tmp_path)
    written = []

    def save_and_fail(value, file):
        written.append(file)
        file.write_bytes(b"half")
        raise error or KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_and_fail)
    for _ in range(2):  # of one process, as of two containers with equal process ids
        with contextlib.suppress(KeyboardInterrupt):
            log = load_logged(tmp_path)[2]
            assert sum("could not be cached" in m and m.isprintable() for m in log) == 2
    assert len(set(written)) == len(written) >= 2
    assert {p.name for p in tmp_path.iterdir()} == {"train", "test"}  # no temporary file is left


def of_something_else() -> bytes:
    kept = io.BytesIO()
    torch.save([1, 2, 3], kept)
    return kept.getvalue()


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "something else"])
def test_a_damaged_cache_is_ignored(tmp_path, kind):
    make_folder(tmp_path)
    before, _, _ = load_logged(tmp_path)
    cache = tmp_path / ".train-16.pt"
    whole = cache.read_bytes()
    damaged = {"empty": b"", "garbage": noise(5000).tobytes(), "truncated": whole[: len(whole) // 2]}
    cache.write_bytes(damaged[kind] if kind in damaged else of_something_else())
    after, _, log = load_logged(tmp_path)
    assert len(log) == 1
    assert torch.equal(after.images, before.images)
    assert load_logged(tmp_path)[2] == []  # the damaged cache was replaced


# ---------------------------------------------------------------------------------------------------------------------
# Large images, streamed.


def colour(i: int) -> tuple[int, int, int]:
    return 20 * i, 255 - 20 * i, 128


@pytest.fixture
def colours(tmp_path):
    """11 training images (5 ants, 6 bees) and 5 test images (2, 3). Each has a single colour that no other has."""
    for split, sizes in (("train", {"ant": 5, "bee": 6}), ("test", {"ant": 2, "bee": 3})):
        i = 0
        for name, size in sizes.items():
            for k in range(size):
                save(tmp_path / split / name / f"{k}.png", np.full((140, 150 + i, 3), colour(i), np.uint8))
                i += 1
    return tmp_path


def large(root: Path, **options):
    return data.load("folder", root, **dict(image_size=128, batch_size=4, workers=0, log=quiet) | options)


def unnormalised(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return (images * std + mean) * 255


def numbers_of(images: torch.Tensor) -> list[int]:
    """The numbers of these images of the fixture `colours`."""
    pixels = unnormalised(images)
    numbers = [round(image[0].mean().item() / 20) for image in pixels]
    expected = torch.tensor([colour(i) for i in numbers]).float()[..., None, None].expand_as(pixels)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.6)
    return numbers


def test_streamed_shapes_and_labels(colours):
    train, _, test = large(colours)
    assert (train.size, test.size, len(train), len(test)) == (11, 5, 2, 2)
    assert train.num_classes == test.num_classes == 2
    assert train.classes == test.classes == ["ant", "bee"]
    assert train.shape == test.shape == (3, 128, 128)
    for batches, first_bee, sizes in ((train, 5, [4, 4]), (test, 2, [4, 1])):
        seen = []
        for images, labels in batches.epoch(0):
            assert images.shape == (len(labels), 3, 128, 128)
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            assert images.is_contiguous(memory_format=torch.channels_last)
            numbers = numbers_of(images)
            assert labels.tolist() == [int(i >= first_bee) for i in numbers]
            seen.append(numbers)
        assert [len(numbers) for numbers in seen] == sizes  # training leaves out the incomplete batch
        seen = [i for numbers in seen for i in numbers]
        assert len(set(seen)) == sum(sizes)
        assert (seen == sorted(seen)) == (batches is test)


def test_streamed_smaller_than_a_batch_is_one_batch(colours):
    train, _, test = large(colours, batch_size=64)
    assert sorted(labels_of(train)) == [0] * 5 + [1] * 6
    assert labels_of(test) == [0, 0, 1, 1, 1]


def test_streamed_batches_do_not_depend_on_the_workers(tmp_path):
    make_folder(tmp_path, train=5, test=3, side=130)
    (train, _, test), (train_2, _, test_2) = (large(tmp_path, workers=workers, seed=3) for workers in (0, 2))
    torch.manual_seed(0)
    whole = list(train.epoch(4))
    drawn_next = torch.rand(3)
    torch.manual_seed(1)  # the global generator before must not matter
    assert same(train_2.epoch(4), whole)
    torch.manual_seed(0)
    list(train_2.epoch(4))
    assert torch.equal(torch.rand(3), drawn_next)  # and is not changed
    assert same(test_2.epoch(0), test.epoch(0))
    for skip in range(3):
        assert same(train.epoch(4, skip=skip), whole[skip:])
    assert same(train_2.epoch(4, skip=1), whole[1:])


def test_streamed_another_seed_or_epoch_gives_other_crops(tmp_path):
    make_folder(tmp_path, train=4, test=1, side=130)

    def epoch_images(seed, number):
        [(images, _)] = large(tmp_path, batch_size=8, seed=seed)[0].epoch(number)
        return {image.numpy().tobytes() for image in images.contiguous()}

    first = epoch_images(0, 0)
    assert len(first) == 8
    assert epoch_images(0, 0) == first
    assert not first & epoch_images(0, 1)
    assert not first & epoch_images(1, 0)


def test_streamed_another_seed_or_epoch_gives_another_order(colours):
    def order(seed, number):
        batches = large(colours, batch_size=11, seed=seed)[0]
        return [i for images, _ in batches.epoch(number) for i in numbers_of(images)]

    assert sorted(order(0, 0)) == list(range(11))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, number)) for seed, number in ((0, 0), (0, 1), (1, 0))}) == 3


@pytest.mark.parametrize("seed", [0, 12_345, 20_260_101, 2**32 - 1])
def test_streamed_accepts_any_seed_of_32_bits(tmp_path, seed):
    make_folder(tmp_path, train=2, test=1, side=130)
    assert len(labels_of(large(tmp_path, seed=seed)[0], 200)) == 4


def test_streamed_test_images_are_resized_and_cut_from_the_centre(tmp_path):
    make_folder(tmp_path, train=1, test=2, side=160)
    _, _, test = large(tmp_path)
    [(images, _)] = test.epoch(0)
    assert same(test.epoch(0), test.epoch(5))
    for k, name in enumerate(("ant", "bee")):
        with Image.open(tmp_path / "test" / name / "1.png") as image:
            centre = np.array(image.resize((146, 146), Image.Resampling.BILINEAR))[9:137, 9:137]
        expected = torch.from_numpy(centre).permute(2, 0, 1).float()
        torch.testing.assert_close(unnormalised(images[2 * k + 1]), expected, rtol=0, atol=0.01)


def test_streamed_flips_only_with_flip_and_in_training(tmp_path):
    make_folder(tmp_path, train=8, test=1)
    ramp = np.repeat(np.linspace(0, 255, 160).astype(np.uint8)[None], 160, axis=0)  # dark on the left
    for file in tmp_path.rglob("*.png"):
        save(file, ramp)
    mirrored = {}
    for flip in (True, False):
        batches = large(tmp_path, flip=flip, batch_size=16)
        [(images, _)] = batches[0].epoch(0)
        mirrored[flip] = (images[:, 0, :, 0] > images[:, 0, :, -1]).all(1).sum().item()
        [(images, _)] = batches[-1].epoch(0)
        assert (images[:, 0, :, 0] < images[:, 0, :, -1]).all()
    assert 3 <= mirrored[True] <= 13
    assert mirrored[False] == 0


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_unreadable_image(colours, split, workers):
    file = colours / split / "bee" / "1.png"
    file.write_bytes(file.read_bytes()[:60])
    batches = large(colours, workers=workers)[0 if split == "train" else -1]
    if split == "train":
        batches.batch_size = 11  # all images, including the damaged one
    message = error_of(lambda: list(batches.epoch(0)), file, "cannot be read")
    assert message.startswith("the image ")  # no traceback of the worker
    assert multiprocessing.active_children() == []  # the workers ended with the epoch


# ---------------------------------------------------------------------------------------------------------------------
# The DataLoader workers.


def training_process(scenario: str, root: Path, say) -> None:
    """A process that trains with two workers, in a process group of its own. say: a pipe's end, for what happens."""
    os.setsid()
    # As a trainer does: SIGTERM asks it to finish and save. (The signal waits until the workers have been started, so
    # that they do not inherit the handler.)
    asked = []
    batches = large(root, workers=1 if scenario == "a worker hangs" else 2, batch_size=1)[0]
    if "hang" in scenario:
        decoded = []
        batches.transform = lambda image: time.sleep(1000) if decoded else decoded.append(1) or torch.zeros(3, 128, 128)
    epoch = batches.epoch(0)
    next(epoch)
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    workers = [worker.pid for worker in multiprocessing.active_children()]
    say.send(workers)
    if scenario == "the group gets SIGTERM":
        while not asked:
            time.sleep(0.02)
        say.send(1 + len(list(epoch)))  # the workers decode the rest of the epoch
    elif scenario == "a worker is killed":
        os.kill(workers[0], signal.SIGKILL)
        time.sleep(0.3)  # the training step is not interrupted
        try:
            list(epoch)
        except Exception as e:
            say.send((type(e).__name__, str(e)))
    elif scenario.startswith("the trainer is killed"):
        time.sleep(1000)
    elif scenario == "the trainer fails":
        training_process.epoch = epoch  # the epoch is never closed
        raise SystemExit(3)
    else:
        epoch.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def late_worker(trainer: int) -> None:
    multiprocessing.parent_process = lambda: types.SimpleNamespace(pid=trainer)
    data.leave_signals_to_the_trainer(0)
    time.sleep(60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and signals that tell their sender")
def test_a_worker_that_starts_after_the_end_of_its_trainer_ends():
    context = multiprocessing.get_context("fork")
    trainer = context.Process(target=bool)
    trainer.start()
    trainer.join()
    worker = context.Process(target=late_worker, args=(trainer.pid,))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 128 + signal.SIGTERM


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and signals that tell their sender")
def test_workers_end_with_their_trainer_and_not_before(colours):
    scenarios = ("the group gets SIGTERM", "a worker is killed", "the trainer is killed", "the trainer fails")
    scenarios += ("a worker hangs", "the trainer is killed while workers hang")
    data.torchvision_module("transforms.v2")  # once, and not in every process
    context = multiprocessing.get_context("fork")
    processes, pipes, workers = {}, {}, {}
    for scenario in scenarios:  # all at once, since they wait most of the time
        pipes[scenario], say = context.Pipe()
        processes[scenario] = context.Process(target=training_process, args=(scenario, colours, say))
        processes[scenario].start()
    try:
        for scenario in scenarios:
            assert pipes[scenario].poll(60)
            workers[scenario] = pipes[scenario].recv()
            assert len(workers[scenario]) >= 1
        os.killpg(processes["the group gets SIGTERM"].pid, signal.SIGTERM)
        processes["the trainer is killed"].kill()
        processes["the trainer is killed while workers hang"].kill()
        for process in processes.values():
            process.join(60)
        codes = {scenario: process.exitcode for scenario, process in processes.items()}
        assert list(codes.values()) == [0, 0, -signal.SIGKILL, 3, 0, -signal.SIGKILL], codes
        assert pipes["the group gets SIGTERM"].recv() == 11  # all images of the epoch
        kind, message = pipes["a worker is killed"].recv()
        assert kind == "DataError" and len(message.splitlines()) == 1, message
        assert all(words in message for words in ("--workers", "--image-size", "memory", "exited unexpectedly"))
        for scenario in scenarios:
            deadline = time.monotonic() + 30
            while any(map(is_running, workers[scenario])):
                assert time.monotonic() < deadline, scenario
                time.sleep(0.05)
    finally:
        for pid in [*(process.pid for process in processes.values()), *itertools.chain(*workers.values())]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def fail(error: Exception):
    raise error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        MemoryError(),
    ],
)
def test_lack_of_memory_in_a_worker(colours, workers, error):
    batches = large(colours, workers=workers)[0]
    batches.transform = lambda image: fail(error)
    error_of(lambda: list(batches.epoch(0)), "--workers", "--image-size", "/dev/shm")
    assert multiprocessing.active_children() == []


def test_lack_of_processes(colours, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: fail(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))))
    error_of(lambda: list(large(colours, workers=2)[0].epoch(0)), "--workers", "Cannot allocate memory")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_transforms_are_not_changed(colours, workers):
    batches = large(colours, workers=workers)[0]
    batches.transform = lambda image: fail(RuntimeError("the size of tensor a must match"))
    message = None
    try:
        list(batches.epoch(0))
    except RuntimeError as e:
        message = str(e)
        e.__traceback__ = None  # it would keep the worker alive
    assert "the size of tensor a must match" in message


def test_the_files_of_a_data_set_are_not_copied_by_its_workers(tmp_path):
    paths = [f"/data/train/n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG" for i in range(50_000)]
    paths[7] = os.fsdecode(b"/data/\xe9t\xe9.png")
    options = dict(classes=["a", "b"], image_size=8, batch_size=8, train=True, device="cpu", transforms=(None, None))
    batches = data.StreamedBatches(paths, [i % 2 for i in range(50_000)], **options)
    assert [batches.files[i] for i in (0, 7, 49_999)] == [paths[i] for i in (0, 7, 49_999)]
    assert batches.labels.tolist()[:3] == [0, 1, 0]
    # what a worker would be sent, or copy when it counts references: bytes, ends and labels, and no Python objects
    assert len(pickle.dumps(batches)) < sum(map(len, paths)) + 16 * len(paths) + 20_000
    del paths
    gc.collect()
    before = sys.getallocatedblocks()
    del batches
    assert before - sys.getallocatedblocks() < 1000  # Python objects


# ---------------------------------------------------------------------------------------------------------------------
# Bad inputs.


@pytest.mark.parametrize("name", ["cifar11", "CIFAR10", "", "svhn"])
def test_unknown_name(name, tmp_path):
    with pytest.raises(ValueError, match="digits") as caught:
        data.load(name, tmp_path)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in data.DATASETS)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_no_folder(name, tmp_path):
    missing = tmp_path / "nowhere"
    error_of(lambda: data.load(name, missing), missing, "train/CLASS", "--data-dir")
    assert not missing.exists()
    (tmp_path / "file").write_text("")
    error_of(lambda: data.load(name, tmp_path / "file"), tmp_path / "file")
    error_of(lambda: data.load(name, str(tmp_path)), tmp_path)


@pytest.mark.parametrize("lacking", ["train", "test"])
def test_a_missing_split(tmp_path, lacking):
    make_folder(tmp_path)
    (tmp_path / lacking).rename(tmp_path / "elsewhere")
    error_of(lambda: data.load("folder", tmp_path), tmp_path, f"{lacking}/CLASS")


def test_no_class_folders(tmp_path):
    (make_folder(tmp_path) / "train").rename(tmp_path / "elsewhere")
    save(tmp_path / "train/0.png", noise(16, 16, 3))
    error_of(lambda: data.load("folder", tmp_path), tmp_path / "train", "class")


@pytest.mark.parametrize("held_out", ["test", "val"])
@pytest.mark.parametrize("lacking", ["train", "held out"])
def test_a_class_in_one_split_only_is_named(tmp_path, held_out, lacking):
    make_folder(tmp_path, classes=("ant", "bee", "cat"), held_out=held_out)
    has, lacks = ("train", held_out) if lacking == "held out" else (held_out, "train")
    for file in (tmp_path / lacks / "bee").iterdir():
        file.unlink()
    (tmp_path / lacks / "bee").rmdir()
    message = error_of(lambda: data.load("folder", tmp_path), "'bee'", tmp_path / has, tmp_path / lacks)
    assert message.index(str(tmp_path / has)) < message.index(str(tmp_path / lacks))
    assert "ant" not in message.replace(str(tmp_path), "")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("rest", [None, "notes.txt"])
def test_empty_class_folder_is_named(tmp_path, split, rest):
    make_folder(tmp_path)
    for file in (tmp_path / split / "bee").iterdir():
        file.unlink()
    if rest:
        (tmp_path / split / "bee" / rest).write_text("")
    error_of(lambda: data.load("folder", tmp_path), tmp_path / split / "bee", "no images", ".png")


@pytest.mark.parametrize("image", ["train/ant/0.png", "train/bee/2.png", "test/ant/1.png"])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "folder", "broken link"])
def test_unreadable_image_is_named(tmp_path, image, damage):
    make_folder(tmp_path)
    file = tmp_path / image
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "broken link":
        file.symlink_to(tmp_path / "nowhere.png")
    else:
        file.write_bytes({"empty": b"", "text": b"<html>not found</html>", "truncated": whole[:300]}[damage])
    error_of(lambda: data.load("folder", tmp_path, log=quiet), file, "cannot be read")
    # after it is deleted the other images load: no incomplete cache was written
    file.rmdir() if damage == "folder" else file.unlink()
    train, _, test = data.load("folder", tmp_path, log=quiet)
    assert train.size + test.size == 9


CONTROLS = "\x1b]0;PWN\x1b[2J\r\n\x07"


def test_names_cannot_control_the_terminal(tmp_path):
    def is_printed(message: str) -> bool:
        return message.isprintable() and "\\x1b]0;PWN\\x1b[2J\\r\\n\\x07" in message

    make_folder(tmp_path, classes=("ant", f"bee{CONTROLS}"))
    (tmp_path / f"train/ant/{CONTROLS}.txt").write_text("")
    train, _, _ = data.load("folder", tmp_path, log=(log := []).append)
    assert train.classes == ["ant", f"bee{CONTROLS}"]  # not changed
    assert is_printed(log[0]) and "such as train/ant" in log[0]
    for size in (16, 128):  # images in memory and streamed
        (tmp_path / f"train/bee{CONTROLS}/1.png").write_bytes(b"")
        with pytest.raises(data.DataError, match="cannot be read") as e:
            train, _, _ = data.load("folder", tmp_path, image_size=size, batch_size=6, workers=0, log=quiet)
            list(train.epoch(0))
        assert is_printed(str(e.value))
    for file in (tmp_path / f"train/bee{CONTROLS}").iterdir():
        file.unlink()
    assert is_printed(error_of(lambda: data.load("folder", tmp_path, log=quiet), "contains no images"))
    (tmp_path / f"train/bee{CONTROLS}").rmdir()
    assert is_printed(error_of(lambda: data.load("folder", tmp_path, log=quiet), "has the class"))


def test_a_folder_with_control_characters_that_cannot_be_read(tmp_path, monkeypatch):
    make_folder(tmp_path, classes=("ant", f"bee{CONTROLS}"))
    scandir = os.scandir

    def refuse(path):
        return fail(PermissionError(13, "Permission denied", str(path))) if "bee" in str(path) else scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert error_of(lambda: data.load("folder", tmp_path, log=quiet), "make it readable").isprintable()


@pytest.mark.parametrize("damaged", [False, True])
def test_names_that_are_not_utf8(tmp_path, damaged):
    make_folder(tmp_path)
    try:
        save(tmp_path / "train/ant" / os.fsdecode(b"\xe9t\xe9.png"), noise(16, 16, 3))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    if damaged:
        (tmp_path / "train/ant" / os.fsdecode(b"\xe9t\xe9.png")).write_bytes(b"")
        error_of(lambda: data.load("folder", tmp_path, log=quiet), "\\udce9t\\udce9.png").encode()
    else:
        assert data.load("folder", tmp_path, log=quiet)[0].size == 7


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR and MNIST, from files in torchvision's formats.


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*args, **options):
        raise urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is\nunreachable"))

    def refuse(*args, **options):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(urllib.request, "urlretrieve", unreachable)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_no_data_and_no_network(name, tmp_path, no_network):
    where = tmp_path / "downloads"
    error_of(lambda: data.load(name, where), name, where, "--dataset digits", "--dataset folder")


def test_without_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    error_of(lambda: data.load("cifar10", tmp_path), "pip install torchvision")


def test_torchvision_of_another_build(monkeypatch, tmp_path):
    def fail(name):
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(data.importlib, "import_module", fail)
    error_of(lambda: data.load("mnist", tmp_path), "torchvision::nms does not exist", "matches torch", "pip install")


def write_cifar(root: Path, name: str, monkeypatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Write torchvision's unpacked archive with a few images. Returns the expected images and labels of each split."""
    # these files cannot have the checksums of the real ones
    cifar = data.torchvision_module("datasets").cifar
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    classes = int(name.removeprefix("cifar"))
    key = "labels" if classes == 10 else "fine_labels"
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    if classes == 100:
        files = {"train": ["train"], "test": ["test"]}
    folder.mkdir()
    meta = {"label_names" if classes == 10 else "fine_label_names": [f"class {i}" for i in range(classes)]}
    (folder / ("batches.meta" if classes == 10 else "meta")).write_bytes(pickle.dumps(meta))
    expected = {}
    for split, names in files.items():
        images, labels = noise(4 * len(names), 3, 32, 32, seed=len(split)), []
        for k, file in enumerate(names):
            part = [(7 * k + 3 * i + len(split)) % classes for i in range(4)]
            entry = {"data": images[4 * k : 4 * k + 4].reshape(4, 3072), key: part, "coarse_labels": [0] * 4}
            (folder / file).write_bytes(pickle.dumps(entry))
            labels += part
        expected[split] = images, labels
    return expected


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_local_files(name, tmp_path, monkeypatch, no_network):
    expected = write_cifar(tmp_path, name, monkeypatch)
    batches = dict(zip(SPLITS, data.load(name, tmp_path, batch_size=4, log=quiet), strict=True))
    for split, (images, labels) in expected.items():
        got = batches[split]
        assert (got.shape, got.size, got.num_classes) == ((3, 32, 32), len(labels), int(name[5:]))
        assert got.classes == [f"class {i}" for i in range(int(name[5:]))]  # the names in the archive
        assert (got.images.dtype, got.labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(got.images.numpy(), images)
        assert got.labels.tolist() == labels
        images, _ = next(iter(got.epoch(0)))
        assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_cifar_is_padded_by_four_pixels_and_mirrored(tmp_path, monkeypatch, no_network):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    train, _, _ = data.load("cifar10", tmp_path, batch_size=20, log=quiet)
    windows = windows_of(train.images, 4)
    found = [f for e in range(5) for images, _ in train.epoch(e) for f in found_in(windows, pixels_in(train, images))]
    assert {y for _, y, _, _ in found} == {x for _, _, x, _ in found} == set(range(9))
    assert {is_mirrored for *_, is_mirrored in found} == {True, False}


def idx(pixels: np.ndarray, kind: int = 8) -> bytes:
    """In the format of MNIST's files. kind: 8 means uint8."""
    return struct.pack(f">{1 + pixels.ndim}i", 256 * kind + pixels.ndim, *pixels.shape) + pixels.tobytes()


def write_mnist(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write torchvision's unpacked files with a few images. Returns the images and labels of each split."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    expected = {}
    for split, prefix, size in (("train", "train", 12), ("test", "t10k", 5)):
        images, labels = noise(size, 28, 28, seed=size), noise(size, seed=size) % 10
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        expected[split] = images, labels
    return expected


def test_mnist_from_local_files(tmp_path, no_network):
    expected = write_mnist(tmp_path)
    batches = dict(zip(SPLITS, data.load("mnist", tmp_path, crop=False, flip=True, log=quiet), strict=True))
    for split, (images, labels) in expected.items():
        got = batches[split]
        assert (got.shape, got.size, got.num_classes) == ((1, 28, 28), len(labels), 10)
        assert got.classes == [str(i) for i in range(10)]
        assert (got.images.dtype, got.labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(got.images[:, 0].numpy(), images)
        assert got.labels.tolist() == labels.tolist()
    train = batches["train"]  # digits are never mirrored
    [(images, _)] = train.epoch(0)
    found = found_in(windows_of(train.images, 0), pixels_in(train, images))
    assert sorted(found) == [(i, 0, 0, False) for i in range(12)]


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", idx(noise(12, 28, 28))[:10]),
        ("train-images-idx3-ubyte", idx(noise(12, 28, 28))[:-1]),
        ("t10k-images-idx3-ubyte", b"<html>not found</html>"),
        ("t10k-images-idx3-ubyte", gzip.compress(idx(noise(5, 28, 28)))),
        ("train-images-idx3-ubyte", idx(noise(12, 28, 28).astype(">f4"), kind=13)),
        ("train-images-idx3-ubyte", idx(noise(12, 28, 28), kind=10)),
        ("train-labels-idx1-ubyte", b""),
        ("train-labels-idx1-ubyte", idx(noise(12, 28, 28))),
    ],
    ids=["empty", "header cut", "image cut", "HTML", "gzip", "floats", "unknown type", "no labels", "images as labels"],
)
def test_mnist_files_that_cannot_be_read(tmp_path, no_network, file, contents):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw" / file).write_bytes(contents)
    error_of(lambda: data.load("mnist", tmp_path), "damaged", f"delete {tmp_path / 'MNIST'} and start again")
    assert (tmp_path / "MNIST/raw" / file).read_bytes() == contents


@pytest.mark.parametrize(
    ("file", "pixels", "said"),
    [
        ("train-labels-idx1-ubyte", noise(11) % 10, "11 labels for 12 images"),
        ("t10k-labels-idx1-ubyte", noise(6) % 10, "6 labels for 5 images"),
        ("train-labels-idx1-ubyte", np.full(12, 200, np.uint8), "labels other than 0 to 9"),
        ("t10k-labels-idx1-ubyte", np.full(5, 10, np.uint8), "labels other than 0 to 9"),
        ("t10k-images-idx3-ubyte", noise(5, 14, 14), "not all square and of one size"),
        ("t10k-images-idx3-ubyte", noise(5, 28, 14), "not all square and of one size"),
        ("train-images-idx3-ubyte", noise(12, 14, 28), "not all square and of one size"),
    ],
)
def test_mnist_files_that_do_not_fit_together(tmp_path, no_network, file, pixels, said):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw" / file).write_bytes(idx(pixels))
    error_of(lambda: data.load("mnist", tmp_path), said, f"delete {tmp_path / 'MNIST'} and start again")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_with_a_label_that_no_class_has(tmp_path, monkeypatch, no_network, name):
    write_cifar(tmp_path, name, monkeypatch)
    [file] = [*tmp_path.glob("*/test"), *tmp_path.glob("*/test_batch")]
    entry = pickle.loads(file.read_bytes())
    next(v for k, v in entry.items() if k in ("labels", "fine_labels"))[2] = int(name[5:])
    file.write_bytes(pickle.dumps(entry))
    error_of(lambda: data.load(name, tmp_path), f"0 to {int(name[5:]) - 1}", f"delete {file.parent} and start again")


def test_mnist_that_is_incomplete_is_not_called_damaged(tmp_path, no_network):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    error_of(lambda: data.load("mnist", tmp_path), "could not be downloaded", "--dataset digits")


# ---------------------------------------------------------------------------------------------------------------------
# Real images.


@pytest.mark.skipif(not REAL_IMAGES.is_file(), reason="../shared/data/cifar10-jpeg.tar.xz is not there")
def test_real_images(tmp_path):
    wanted = {f"{s}/{c}/{i:04}.jpg" for s in ("train", "test") for c in ("airplane", "automobile") for i in range(3)}
    found = set()
    with tarfile.open(REAL_IMAGES, "r|xz") as archive:  # read only up to the last wanted file
        for member in archive:
            if member.name in wanted:
                file = tmp_path / member.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.extractfile(member).read())
                found.add(member.name)
                if found == wanted:
                    break
    assert found == wanted
    train, _, test = data.load("folder", tmp_path, batch_size=3, log=quiet)
    for batches, split in ((train, "train"), (test, "test")):
        assert (batches.shape, batches.size, batches.num_classes) == ((3, 32, 32), 6, 2)
        assert batches.labels.tolist() == [0, 0, 0, 1, 1, 1]
        files = [tmp_path / split / name / f"{i:04}.jpg" for name in ("airplane", "automobile") for i in range(3)]
        assert torch.equal(batches.images, torch.stack([pixels_of(file) for file in files]))
        assert len({image.numpy().tobytes() for image in batches.images}) == 6
        for images, labels in batches.epoch(0):
            assert images.shape == (len(labels), 3, 32, 32)
            assert images.isfinite().all()
            assert 0.3 < images.std() < 3
    streamed, _, _ = large(tmp_path, batch_size=3)
    for images, _ in streamed.epoch(0):
        assert images.shape == (3, 3, 128, 128)
        assert -0.01 < unnormalised(images).min() < unnormalised(images).max() < 255.01


def test_seeds_of_any_size():
    for seed in (20240615123456, 2**63 - 1):
        train, _, _ = data.load("digits", seed=seed, val=10)
        assert len(next(iter(train.epoch(3)))[1])
