"""Image data sets in batches, on the training device.

    train, val, test = load("cifar10", "data", device="cuda", batch_size=128, seed=0, val=5000)
    for images, labels in train.epoch(0): ...    # images [B, C, H, W] float32, channels_last; labels [B] int64

Copy this file alone. It needs torch, einops and Pillow, torchvision for CIFAR, MNIST and large images, and scikit-learn
for digits.

Small images (CIFAR, MNIST, digits, folders up to 96×96) are kept on the device as one uint8 tensor. A few tensor
operations crop, flip and normalise a whole batch there, without worker processes. On one CPU core this takes 2 to 3 ms
for 128 CIFAR images, about 1 % of a training step of ResNet-20. Large images (ImageNet) are decoded by DataLoader
workers.

The batches are reproducible. Epoch e of seed s has the same order, crops and flips on every machine and device, and can
start at any batch.
"""

import collections
import contextlib
import hashlib
import http.client
import importlib
import multiprocessing
import os
import signal
import threading
import time
import unicodedata
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

DATASETS = ("cifar10", "cifar100", "mnist", "digits", "imagenet", "folder")
RESIDENT_UP_TO = 96  # height and width in pixels up to which images are kept on the device: 100,000 of them are 2.8 GB
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")

# PIL warns about images that it can read, such as large ones. Threads decode them, so catch_warnings() is not safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DataError(Exception):
    """The data cannot be used. The message is one sentence that says why and what to do."""


def printable(text: str | Path) -> str:
    """The text with escapes, such as \\x1b, for what could control a terminal, break the line, or is not UTF-8."""
    shown = lambda c: c.isprintable() or unicodedata.category(c) == "Zs"  # Zs: spaces
    return "".join(c if shown(c) else ascii(c)[1:-1] for c in str(text))


def one_line(error: Exception) -> str:
    """The message of an error, printable, or else its type."""
    return printable(" ".join(str(error).split())) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Loading.


def load(
    name: str,
    data_dir: str | Path = "data",
    device: torch.device | str = "cpu",
    *,
    batch_size: int = 128,
    seed: int = 0,
    val: int = 0,
    crop: bool = True,
    flip: bool = True,
    image_size: int | None = None,
    workers: int = 2,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    transforms: tuple | None = None,
    log=print,
    rank: int = 0,
    world_size: int = 1,
) -> tuple["Batches", "Batches | None", "Batches"]:
    """Return the training, validation and test batches of a data set. Without `val`, the validation batches are None.

    name: 'cifar10', 'cifar100' and 'mnist' are read from data_dir, and downloaded there by torchvision if missing.
        'digits' is scikit-learn's set of handwritten 8×8 digits and needs no download. 'imagenet' and 'folder' are
        images in data_dir/train/CLASS/ and data_dir/test/CLASS/ (or data_dir/val/CLASS/), including their subfolders.
        Their classes are the names of the folders in ascending order. Hidden files and folders are ignored. The
        images become RGB: they are turned as their EXIF orientation says, transparent ones are put on white, 16-bit
        grey is scaled to 8 bits, and only the first of several frames is read.
    batch_size: images per batch, over all processes.
    val: how many training images are held out for validation, in equal proportion from each class. The images depend
        on the seed only. Training, and the default mean and std, use the remaining images only.
    crop, flip: augmentation of the training images. crop pads by H/8 pixels (4 for CIFAR) and crops at random. flip
        mirrors half of the images; digits and MNIST are never mirrored. Large images are always cropped, by
        RandomResizedCrop.
    image_size: height and width in pixels, to which images are resized. Default: for 'folder', see `choose_size`; for
        'imagenet', 224; for the other data sets, the size of their images, which can be resized to at most 96.
    workers: DataLoader workers for large images.
    mean, std: of each channel, for pixels from 0 to 1; the images are normalised with them. Three values for grey
        images stand for their average. Default: those of the training images; for large images, ImageNet's.
    transforms: for training and for testing, functions of a PIL image that return a normalised tensor
        [3, image_size, image_size]. They replace crop, flip and normalisation of large images.
    log: called with a message when images are decoded, files ignored, or the image size chosen.
    rank, world_size: of torch.distributed. Each process gets its part of every batch.

    Raises DataError if the data cannot be used, ValueError for an unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set is called {name!r}: use one of {', '.join(DATASETS)}")
    data_dir, is_folder = Path(data_dir), name in ("imagenet", "folder")
    options = dict(seed=seed, rank=rank, world_size=world_size)

    def say(message: str) -> None:  # messages contain the names of files
        log(printable(message))

    if is_folder:
        classes, splits = scan_folder(data_dir, say)
        names = "".join(os.path.relpath(file, data_dir) + "\0" for file in splits["train"][0])
        options["listing"] = hashlib.sha256(os.fsencode(names)).hexdigest()
        if image_size is None:
            image_size = 224 if name == "imagenet" else choose_size(data_dir, splits["train"][0], say)
        if image_size > RESIDENT_UP_TO:
            options |= dict(classes=classes, image_size=image_size, batch_size=batch_size, device=device)
            options |= dict(workers=workers, transforms=transforms, flip=flip)
            options |= dict(mean=mean or IMAGENET_MEAN, std=std or IMAGENET_STD)
            files, labels = splits["train"]

            def part(indices: Tensor, train: bool) -> StreamedBatches:
                chosen = indices.tolist()
                return StreamedBatches([files[i] for i in chosen], [labels[i] for i in chosen], train=train, **options)

            train_indices, val_indices = hold_out(torch.tensor(labels), classes, val, seed)
            test = StreamedBatches(*splits["test"], train=False, **options)
            return part(train_indices, True), part(val_indices, False) if val else None, test

    if rank > 0:
        torch.distributed.barrier()  # wait until rank 0 has downloaded and decoded everything
    if is_folder:
        broken = []
        train, test = (decode_all(data_dir, d, *splits[d], image_size, say, broken) for d in ("train", "test"))
        if broken:
            raise unreadable(sorted(broken, key=lambda pair: pair[0]))
    else:
        train, test, classes = digits() if name == "digits" else downloaded(name, data_dir)
    if rank == 0 and world_size > 1:
        torch.distributed.barrier()

    (train_images, train_labels), (test_images, test_labels) = train, test
    if image_size not in (None, train_images.shape[-1]):  # a folder's images already have this size
        train_images, test_images = resize(train_images, image_size, name), resize(test_images, image_size, name)
    train_indices, val_indices = hold_out(train_labels, classes, val, seed)
    val_images, val_labels = train_images[val_indices], train_labels[val_indices]
    if val:
        train_images, train_labels = train_images[train_indices], train_labels[train_indices]
    own_mean, own_std = channel_statistics(train_images)
    mean = own_mean if mean is None else given_statistic(mean, len(own_mean))
    std = own_std if std is None else given_statistic(std, len(own_std))
    options |= dict(classes=classes, num_classes=len(classes), mean=mean.to(device), std=std.to(device))
    options |= dict(
        crop=max(1, train_images.shape[-1] // 8) if crop else 0, flip=flip and name not in ("digits", "mnist")
    )

    def batches(images: Tensor, labels: Tensor, train: bool) -> ResidentBatches:
        size = batch_size if train else max(batch_size, 500)  # testing needs less memory than training
        return ResidentBatches(images.to(device), labels.to(device), batch_size=size, train=train, **options)

    return (
        batches(train_images, train_labels, True),
        batches(val_images, val_labels, False) if val else None,
        batches(test_images, test_labels, False),
    )


def hold_out(labels: Tensor, classes: list[str], val: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose `val` of the images with these labels, [N] int64, for validation.

    Returns the indices of the remaining images, [N - val], and of the validation images, [val], both ascending. The
    classes give in equal proportion, rounded by the method of largest remainders. Each keeps at least one image. Raises
    DataError if there are too few images.
    """
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    limit = sum(max(count - 1, 0) for count in counts)
    if not 0 <= val <= limit:
        raise DataError(
            f"--val {val} cannot be held out of {len(labels)} training images, because each of the {len(classes)} "
            f"classes must keep one: use 0 to {limit}"
        )
    given = [val * count // len(labels) for count in counts]
    for _ in range(val - sum(given)):
        # The remainder of a class is val · count / N - given. Multiplied by N, it is an exact integer.
        open_classes = [c for c, count in enumerate(counts) if given[c] + 1 < count]
        given[max(open_classes, key=lambda c: val * counts[c] - given[c] * len(labels))] += 1
    rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"validation {seed}".encode()).digest()[:8]))
    shuffled = torch.randperm(len(labels), generator=rng)
    by_class = shuffled[labels[shuffled].argsort(stable=True)].split(counts)
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for members, number in zip(by_class, given, strict=True):
        is_held_out[members[:number]] = True
    return (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, in 0...255: uint8 [N, C, H, W] -> [C], [C] float32."""
    count = images.numel() // images.shape[1]
    chunks = images.split(1000)  # a float64 copy of all images would need eight times their memory
    mean = sum(x.double().sum(dim=(0, 2, 3)) for x in chunks) / count
    square = sum(x.double().square().sum(dim=(0, 2, 3)) for x in chunks) / count
    std = (square - mean.square()).sqrt().clamp_min(1e-3)
    return mean.float(), std.float()


def given_statistic(values: tuple[float, ...], channels: int) -> Tensor:
    """The mean or standard deviation that the caller gave, in 0...255, [channels]; for grey images, the average."""
    values = 255 * torch.tensor(values)
    return values if channels == len(values) else values.mean().expand(channels)


def resize(images: Tensor, size: int, name: str) -> Tensor:
    """uint8 [N, C, H, W] -> [N, C, size, size], bilinear with antialiasing."""
    if size > RESIDENT_UP_TO:
        raise DataError(f"--image-size {size} is too large for {name}: use at most {RESIDENT_UP_TO}")
    return torch.cat([F.interpolate(x, (size, size), mode="bilinear", antialias=True) for x in images.split(1000)])


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """scikit-learn's 1,797 handwritten 8×8 digits, in the form of `downloaded`. Every fifth image is a test image."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("--dataset digits needs scikit-learn: pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)  # 0...16
    images = rearrange(torch.from_numpy(pixels), "n (h w) -> n 1 h w", h=8).mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(labels).long()
    is_test = torch.arange(len(labels)) % 5 == 4
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test]), list("0123456789")


def torchvision_module(name: str):
    """Import torchvision.NAME. Raises DataError if that fails."""
    try:
        return importlib.import_module(f"torchvision.{name}")
    except (ImportError, OSError, RuntimeError) as e:  # RuntimeError: a build for another torch
        raise DataError(
            f"torchvision is needed here and cannot be imported ({one_line(e)}): pip install torchvision, in the build "
            f"that matches torch {torch.__version__}"
        ) from None


def downloaded(name: str, data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """CIFAR-10, CIFAR-100 or MNIST from torchvision: (images, labels) for training and for testing, and the classes."""
    dataset = getattr(torchvision_module("datasets"), {"mnist": "MNIST"}.get(name, name.upper()))
    folder = data_dir / getattr(dataset, "base_folder", "MNIST")

    def damaged(reason: str) -> DataError:
        return DataError(f"{name} in {data_dir} is damaged ({reason}): delete {folder} and start again")

    splits = []
    for train in (True, False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy warns about the pickles in CIFAR's archive
                split = dataset(str(data_dir), train=train, download=True)
        except (MemoryError, ImportError):
            raise
        except Exception as e:
            # A download fails with OSError (no network, space or permission), HTTPException or RuntimeError. Damaged
            # files fail with errors of many kinds. If the four files of MNIST are there, nothing is downloaded.
            is_there = isinstance(e, RuntimeError) and len(list(folder.glob("raw/*-ubyte"))) == 4
            failed = isinstance(e, (OSError, RuntimeError, http.client.HTTPException)) or not folder.exists()
            if is_there or not failed:
                raise damaged(one_line(e)) from None
            raise DataError(
                f"{name} is not in {data_dir} and could not be downloaded there ({one_line(e)}): put torchvision's "
                "copy there, or use --dataset digits, which needs no download, or --dataset folder for your own images"
            ) from None
        images = torch.as_tensor(split.data)
        pattern = "n h w -> n 1 h w" if images.dim() == 3 else "n h w c -> n c h w"
        splits.append((rearrange(images, pattern).contiguous(), torch.as_tensor(split.targets)))
    classes = list("0123456789") if name == "mnist" else list(split.classes)
    size = splits[0][0].shape[-1]
    for images, labels in splits:
        if not len(images) == len(labels) > 0:
            raise damaged(f"it has {len(labels):,} labels for {len(images):,} images")
        if images.shape[2:] != (size, size):
            raise damaged("its images are not all square and of one size")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise damaged(f"it has labels other than 0 to {len(classes) - 1}")
    return *splits, classes


# ---------------------------------------------------------------------------------------------------------------------
# Batches. Both kinds have classes (their names), num_classes, shape (C, H, W), size (number of images), len() (batches
# per epoch), epoch(), and scale and shift [C, 1, 1], which normalise pixels of 0...255: pixels · scale + shift.


def check_batch_size(batch_size: int, world_size: int, size: int) -> None:
    """Raise DataError unless all processes get equally many images of a batch, at least two. size: of the data set."""
    least = 2 * world_size  # BatchNorm cannot normalise one image
    if world_size > 1 and (batch_size % world_size or batch_size < least):
        less = max(batch_size - batch_size % world_size, least)
        known = [str(n) for n in (less, less + world_size) if n <= size]
        raise DataError(
            f"{world_size} processes cannot divide batches of {batch_size} images equally, at least two each: "
            + (f"use --batch-size {' or '.join(known)}" if known else "use fewer processes")
        )


def batch_slice(batch: int, batch_size: int, size: int, rank: int, world_size: int) -> slice:
    """This process's images of a batch, as positions in the order of the epoch."""
    begin = batch * batch_size
    count = min(batch_size, size - begin)
    return slice(begin + count * rank // world_size, begin + count * (rank + 1) // world_size)


class ResidentBatches:
    """A data set that is kept on the device.

    images: [N, C, H, W] uint8. labels: [N] int64. mean, std: of each channel, [C], in 0...255.
    train: shuffle, augment, and leave out the last batch if it is incomplete (unless it is the only one). Otherwise
        the images come in order, all of them.
    crop: zero padding of the random crop in pixels; 0 means no crop. flip: whether to mirror half of the images.
    classes: the names of the num_classes classes. Default: '0', '1', ...
    listing: for a folder, a hash of the names of its training images; `hold_out` depends on their order.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        num_classes: int,
        batch_size: int,
        train: bool,
        seed: int = 0,
        crop: int = 0,
        flip: bool = False,
        rank: int = 0,
        world_size: int = 1,
        classes: list[str] | None = None,
        listing: str | None = None,
    ):
        self.images, self.labels, self.listing = images, labels, listing
        self.classes = classes or [str(c) for c in range(num_classes)]
        self.scale, self.shift = rearrange(1 / std, "c -> c 1 1"), rearrange(-mean / std, "c -> c 1 1")
        self.num_classes, self.shape, self.size = num_classes, tuple(images.shape[1:]), len(images)
        self.batch_size = min(batch_size, self.size)
        self.train, self.seed = train, seed
        self.crop, self.flip = (crop, flip) if train else (0, False)
        self.rank, self.world_size = rank, world_size
        if train:
            check_batch_size(self.batch_size, world_size, self.size)

    def __len__(self) -> int:
        return self.size // self.batch_size if self.train else -(-self.size // self.batch_size)

    def epoch(self, number: int = 0, skip: int = 0):
        """Yield the batches (images, labels) of an epoch, starting at batch `skip`."""
        device = self.images.device
        # The random numbers of an epoch are drawn at once and on the CPU, so they are the same on every device.
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**64)
        order = torch.randperm(self.size, generator=rng) if self.train else torch.arange(self.size)
        shifts = torch.randint(2 * self.crop + 1, (2, self.size), generator=rng).to(device) if self.crop else None
        mirror = (torch.rand(self.size, generator=rng) < 0.5).to(device) if self.flip else None
        order = order.to(device)
        for batch in range(skip, len(self)):
            at = batch_slice(batch, self.batch_size, self.size, self.rank, self.world_size)
            if at.start == at.stop:
                continue
            images = self.images[order[at]]
            if shifts is not None:
                images = random_crop(images, self.crop, *shifts[:, at])
            if mirror is not None:
                images = torch.where(rearrange(mirror[at], "b -> b 1 1 1"), images.flip(-1), images)
            images = torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)
            yield images.contiguous(memory_format=torch.channels_last), self.labels[order[at]]


def random_crop(images: Tensor, pad: int, dy: Tensor, dx: Tensor) -> Tensor:
    """Pad images [B, C, H, W] by `pad` zeros on each side, and cut the H×W window at row dy[i], column dx[i] of each.

    dy, dx: [B] int64, from 0 to 2 · pad. Returns [B, C, H, W].
    """
    h, w = images.shape[-2:]
    windows = F.pad(images, (pad,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # [B, C, 2·pad+1, 2·pad+1, H, W], a view
    return windows[torch.arange(len(images), device=images.device), :, dy, dx]


class StreamedBatches:
    """Large images that DataLoader workers decode. The interface is that of ResidentBatches.

    files, labels: paths and integers, lists of the same length.
    image_size: height and width S in pixels. Training takes a RandomResizedCrop to S×S and a random flip. Testing
        resizes the short side to S·8/7 and cuts the centre. The crop of an image depends only on the seed, the epoch
        and the image.
    mean, std: of each channel, in 0...1. transforms: see `load`.
    """

    def __init__(
        self,
        files: list[str],
        labels: list[int],
        *,
        classes: list[str],
        image_size: int,
        batch_size: int,
        train: bool,
        device: torch.device | str,
        seed: int = 0,
        workers: int = 2,
        flip: bool = True,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        transforms: tuple | None = None,
        rank: int = 0,
        world_size: int = 1,
        listing: str | None = None,
    ):
        self.files, self.labels, self.size, self.listing = Strings(files), torch.tensor(labels), len(files), listing
        self.classes, self.num_classes = classes, len(classes)
        self.shape, self.batch_size = (3, image_size, image_size), min(batch_size, len(files))
        self.train, self.device, self.seed, self.workers = train, torch.device(device), seed, workers
        self.rank, self.world_size = rank, world_size
        if train:
            check_batch_size(self.batch_size, world_size, self.size)
        transforms = transforms or default_transforms(image_size, flip, mean, std)
        self.transform = transforms[0 if train else 1]
        mean, std = 255 * torch.tensor(mean), 255 * torch.tensor(std)
        self.scale, self.shift = rearrange(1 / std, "c -> c 1 1"), rearrange(-mean / std, "c -> c 1 1")

    def __len__(self) -> int:
        return self.size // self.batch_size if self.train else -(-self.size // self.batch_size)

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(epoch, image) -> the transformed image and its label. The DataLoader workers call this."""
        number, i = index
        try:
            image = decode(self.files[i])
        except Exception as e:
            raise unreadable([(self.files[i], e)]) from None
        with torch.random.fork_rng(devices=[]):
            key = hashlib.sha256(f"{self.seed} {number} {i}".encode()).digest()[:8]
            torch.random.default_generator.manual_seed(int.from_bytes(key))
            return self.transform(image), self.labels[i]

    def epoch(self, number: int = 0, skip: int = 0):
        """Yield the batches (images, labels) of an epoch, starting at batch `skip`."""
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**64)
        order = torch.randperm(self.size, generator=rng) if self.train else torch.arange(self.size)
        slices = (
            batch_slice(b, self.batch_size, self.size, self.rank, self.world_size) for b in range(skip, len(self))
        )
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=([(number, i) for i in order[at].tolist()] for at in slices if at.start < at.stop),
            num_workers=self.workers,
            worker_init_fn=leave_signals_to_the_trainer,
            generator=rng,  # otherwise the loader draws the seed of its workers from the global generator
            pin_memory=self.device.type == "cuda",
        )
        batches = None
        try:
            batches = start_workers(loader)
            for images, labels in batches:
                images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                yield images, labels.to(self.device, non_blocking=True)
        except (DataError, RuntimeError, OSError, MemoryError) as e:
            # A worker's error contains its traceback. The last line has the type of the error and its message.
            reason = (str(e).strip() or repr(e)).splitlines()[-1].split(f"{type(e).__name__}: ")[-1]
            if isinstance(e, DataError):
                error = DataError(reason)
            elif any(words in reason for words in OUT_OF_MEMORY):
                error = DataError(
                    f"the DataLoader workers failed, probably for lack of memory ({reason}): use fewer --workers, a "
                    "smaller --image-size or --batch-size, or more memory (in a container, also for /dev/shm)"
                )
            else:
                raise
            e.__traceback__ = None  # it refers to the loader and would keep its workers alive
            raise error from None
        finally:
            batches = None  # ends the workers


class Strings:
    """A list of strings in two tensors. As a list, 1.28 million paths would take 400 MB in each DataLoader worker."""

    def __init__(self, strings: list[str]):
        encoded = [os.fsencode(string) for string in strings]
        self.bytes = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self.ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def __getitem__(self, i: int) -> str:
        begin, end = self.ends[i : i + 2].tolist()
        return os.fsdecode(bytes(self.bytes[begin:end].tolist()))


def default_transforms(size: int, flip: bool, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple:
    """For training and for testing, from a PIL image to a normalised tensor [3, size, size]."""
    transforms = torchvision_module("transforms.v2")
    train = [transforms.RandomResizedCrop(size, antialias=True)]
    train += [transforms.RandomHorizontalFlip()] if flip else []
    test = [transforms.Resize(size * 8 // 7, antialias=True), transforms.CenterCrop(size)]
    to_float = [transforms.PILToTensor(), transforms.ToDtype(torch.float32, scale=True)]
    to_float += [transforms.Normalize(mean, std)]
    return tuple(transforms.Compose([*steps, *to_float]) for steps in (train, test))


# What the DataLoader says if a worker was killed, or if memory, processes or open files have run out.
OUT_OF_MEMORY = ("exited unexpectedly", "killed by signal", "shared memory", "No space left", "allocate memory")
OUT_OF_MEMORY += ("MemoryError", "Bus error", "Resource temporarily unavailable", "Too many open files", "ancdata")


def start_workers(loader: torch.utils.data.DataLoader):
    """iter(loader), without its SIGCHLD handler.

    The handler raises the error of a dead worker in whatever line the training process executes. Without it, the
    iterator raises the error where a batch is missing, between two steps.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let a DataLoader worker ignore Ctrl-C and SIGTERM, which terminals and launchers send to all processes.

    The training process handles these signals. It finishes its step and saves, and needs its workers until then. A
    worker ends if the training process ends or sends it SIGTERM. (On macOS, every SIGTERM ends it.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    trainer, parent = multiprocessing.parent_process().pid, os.getppid()

    def wait():
        with contextlib.suppress(ProcessLookupError):
            while os.getppid() == parent:
                os.kill(trainer, 0)  # raises if the trainer ended before `parent` was read
                sent = signal.sigtimedwait({signal.SIGTERM}, 1)  # None after a second
                if sent and sent.si_pid == trainer:
                    break
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


Batches = ResidentBatches | StreamedBatches

# ---------------------------------------------------------------------------------------------------------------------
# Folders of images.


def scan_folder(root: Path, log) -> tuple[list[str], dict[str, tuple[list[str], list[int]]]]:
    """Return the class names, and {"train": (files, labels), "test": (files, labels)}.

    The files are root/train/CLASS/* and root/test/CLASS/* (or root/val/CLASS/*). Ignored files are logged.
    Raises DataError if the folder does not have this layout.
    """
    ignored = collections.defaultdict(list)  # the reason -> paths
    try:
        images = {"train": scan_split(root / "train", ignored), "test": scan_split(root / "test", ignored)}
        held_out, other = "test", "val"
        if not images["test"]:  # ImageNet's test images have no classes
            images["val"] = scan_split(root / "val", ignored)
            held_out, other = other, held_out
    except OSError as e:
        raise DataError(
            f"the folder {printable(e.filename)} cannot be read ({e.strerror}): make it readable, or delete it"
        ) from None
    if not images["train"] or not images[held_out]:
        raise DataError(
            f"no images in {root}: put them into class folders, {root / 'train'}/CLASS and {root / 'test'}/CLASS (or "
            "val/CLASS), or say with --data-dir where they are"
        )
    ignored[f"beside train/ and {held_out}/"].append(str(root / other))
    counts = {why: sum(map(count_files, paths)) for why, paths in ignored.items()}
    if any(counts.values()):
        kinds = [f"{n:,} {why} (such as {os.path.relpath(min(ignored[why]), root)})" for why, n in counts.items() if n]
        log(f"ignoring {sum(counts.values()):,} files of {root}: {', '.join(kinds)}")
    classes = list(images["train"])
    for has, lacks in (("train", held_out), (held_out, "train")):
        missing = [name for name in images[has] if name not in images[lacks]]
        if missing:
            raise DataError(
                f"{root / has} has the class {missing[0]!r} and {root / lacks} does not: "
                "both must contain the same class folders"
            )
        empty = [name for name, files in images[has].items() if not files]
        if empty:
            raise DataError(
                f"{printable(root / has / empty[0])} contains no images ({', '.join(SUFFIXES)}): "
                "add some or delete the class"
            )
    if len(classes) == 1:
        raise DataError(f"{root} has only the class {classes[0]!r}: put the images of other classes beside it")
    splits = {}
    for split, d in (("train", "train"), ("test", held_out)):
        files = [file for name in classes for file in images[d][name]]
        splits[split] = files, [label for label, name in enumerate(classes) for _ in images[d][name]]
    return classes, splits


def scan_split(folder: Path, ignored: dict[str, list[str]]) -> dict[str, list[str]]:
    """The images of each class in folder/CLASS/ and the folders in it, as torchvision.datasets.ImageFolder finds them.

    Adds the paths of what is not read to `ignored`, by the reason.
    """
    entries = list(os.scandir(folder)) if folder.is_dir() else []
    images = {name: [] for name in sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))}
    for e in entries if images else []:
        if e.name not in images:
            ignored["hidden" if e.name.startswith(".") else "outside the class folders"].append(e.path)
    for name, files in images.items():
        folders = [folder / name]
        for e in (e for f in folders for e in os.scandir(f)):  # the loop adds to `folders`
            if e.name.startswith("."):
                ignored["hidden"].append(e.path)
            elif not e.name.lower().endswith(SUFFIXES):
                if e.is_dir(follow_symlinks=False):
                    folders.append(e.path)
                else:
                    ignored["in linked folders" if os.path.isdir(e) else "with other suffixes"].append(e.path)
            elif e.is_file(follow_symlinks=False) or os.path.isfile(e) or os.path.isdir(e) or not os.path.exists(e):
                files.append(e.path)  # if it is a folder or a broken link, reading fails with a message
            else:
                ignored["that are pipes, sockets or devices"].append(e.path)  # reading could wait forever
        files.sort()
    return images


def count_files(path: str) -> int:
    """The number of files in a folder and the folders in it; 1 for a file."""
    return sum(len(files) for _, _, files in os.walk(path)) if os.path.isdir(path) else int(os.path.lexists(path))


def decode(file: str):
    """Read a file as a PIL image in RGB, as `load` describes. PIL raises errors of many kinds for a damaged file."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        image.load()
        with contextlib.suppress(Exception):  # of a damaged EXIF block
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            image = image.convert("I").point(lambda v: v / 256).convert("L")  # convert() alone would clip above 255
        elif image.mode in ("I", "F"):
            raise ValueError("the range of its 32-bit pixels is not known, save it with 8 or 16 bits")
        elif image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def unreadable(broken: list[tuple[str, Exception]]) -> DataError:
    """The error that names images that cannot be read, given with the error of each."""
    names, reason = [printable(file) for file, _ in broken[:5]], one_line(broken[0][1])
    if len(broken) == 1:
        return DataError(f"the image {names[0]} cannot be read ({reason}): replace or delete it")
    names += ["..."] if len(broken) > 5 else []
    return DataError(
        f"{len(broken):,} images cannot be read (the first: {reason}): replace or delete {', '.join(names)}"
    )


def choose_size(root: Path, files: list[str], log) -> int:
    """The height and width in pixels to which the images of a folder are resized, if the user does not say.

    If the median width and height are at most RESIDENT_UP_TO and differ by less than a fifth, it is the larger one, or
    8 if that is smaller. Otherwise it is 224, and the images are cropped. The medians are those of all training images,
    or of 1,000 random ones. Only the headers of the files are read.
    """
    from PIL import Image

    sizes, broken = [], []
    for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:1000].tolist():
        try:
            with Image.open(files[i]) as image:
                sizes.append(image.size)
        except Exception as e:
            broken.append((files[i], e))
    if not sizes:
        raise unreadable(broken)
    width, height = (sorted(side)[len(sizes) // 2] for side in zip(*sizes, strict=True))
    size = max(width, height, 8)  # 8 is the smallest --image-size
    if size > RESIDENT_UP_TO or 5 * abs(width - height) >= size:
        size = 224
    if set(sizes) != {(size, size)}:
        log(f"{root}: the median image has {width}×{height} pixels; all are used at {size}×{size} (see --image-size)")
    return size


def decode_all(
    root: Path, split: str, files: list[str], labels: list[int], size: int, log, broken: list[tuple[str, Exception]]
) -> tuple[Tensor, Tensor]:
    """Decode all images of a split: images [N, 3, size, size] uint8, and labels [N] int64.

    Images of another size are resized. The result is cached in root/.SPLIT-SIZE.pt, and used again if the names, sizes
    and times of the files have not changed. The times are those of the last modification and of the last change of the
    file's entry, which unpacking and copying cannot set. Images that cannot be read are added to `broken`, each with
    its error. If there are any, nothing is cached.
    """
    fingerprint = hashlib.sha256(b"3\n")  # of the files and of what decode() does: number its versions
    for file in files:
        try:
            stat = os.stat(file)
            state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        except OSError:  # decode() fails too
            state = "unreadable"
        name = file.removeprefix(f"{root}{os.sep}").replace(os.sep, "/")
        fingerprint.update(os.fsencode(f"{name} {state}\n"))
    fingerprint, cache = fingerprint.hexdigest(), root / f".{split}-{size}.pt"
    try:
        cached = torch.load(cache, weights_only=True)
        if cached["fingerprint"] == fingerprint:
            return cached["images"], cached["labels"]
    except Exception:  # the cache is missing or damaged
        pass
    log(f"decoding {len(files):,} {split} images of {root} at {size}×{size} (only once: {cache.name} caches them)")

    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def fill(i: int) -> None:
        try:
            image = decode(files[i])
        except Exception as e:
            broken.append((files[i], e))
            return
        if image.size != (size, size):
            image = image.resize((size, size), resample=2)  # bilinear
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        images[i] = rearrange(pixels, "(h w c) -> c h w", h=size, w=size)

    with ThreadPoolExecutor() as threads:  # PIL releases the GIL while it decodes
        list(threads.map(fill, range(len(files))))
    labels = torch.tensor(labels)
    if broken:
        return images, labels
    temporary = root / f".{split}-{size}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    for left in root.glob(f".{split}-{size}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:  # of a process that was killed
                left.unlink()
    try:
        torch.save({"fingerprint": fingerprint, "images": images, "labels": labels}, temporary)
        temporary.replace(cache)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError if the disk is full
        log(f"the decoded images could not be cached in {cache} ({one_line(e)}): the next run decodes them again")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # there is none if it has replaced the cache
    return images, labels
