"""Images in batches, on the device. Copy this file alone: it needs torch, Pillow, einops; torchvision for downloads.

    train, test = load("cifar10", "data", device="cuda", batch_size=128, seed=0)
    for images, labels in train.epoch(0): ...    # images [B, C, H, W] float32, channels_last; labels [B] int64

Small images (CIFAR, MNIST, digits, folders up to 96×96) are one uint8 tensor on the device. A batch is cropped,
flipped and normalised there in a handful of tensor operations, so there are no worker processes and no copies: 2 to
3 ms for 128 CIFAR images on one CPU core, where a ResNet-20 takes a hundred times that. Large images (ImageNet)
are decoded by DataLoader workers.

Reproducible: epoch e of seed s has the same order, crops and flips on every machine, and can be entered at any batch.
"""

import contextlib
import hashlib
import importlib
import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

DATASETS = ("cifar10", "cifar100", "mnist", "digits", "imagenet", "folder")
RESIDENT_UP_TO = 96  # pixels a side: 100,000 such RGB images are 2.8 GB
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")


class DataError(Exception):
    """The data cannot be used; the message is one sentence that says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Batches. Both classes have: num_classes, shape (C, H, W), size (images), len() (batches an epoch), epoch(), and
# scale and shift [C, 1, 1], which normalise pixels of 0…255. With several processes `part` is (this one's rank, their
# number), and each gets its part of every batch.


def check_share(batch_size: int, processes: int) -> None:
    if batch_size % processes:
        less = batch_size - batch_size % processes
        raise DataError(
            f"{processes} processes cannot share batches of {batch_size} images evenly: use --batch-size "
            f"{less or less + processes} or {less + processes}"
        )


def share(b: int, batch_size: int, size: int, part: tuple[int, int]) -> slice:
    """Where this process's part of batch b lies among the `size` images of an epoch."""
    begin, end = b * batch_size, min((b + 1) * batch_size, size)
    return slice(*(begin + (end - begin) * (part[0] + i) // part[1] for i in (0, 1)))


class ResidentBatches:
    """A data set held on the device.

    images [N, C, H, W] uint8, labels [N] int64, mean and std (in 0…255) [C]. train: shuffled, augmented, and a last
    incomplete batch is left out (unless it is the only one); otherwise in order and complete.
    crop: pixels of zero padding of the random crop (0: none). flip: whether to mirror half of the images.
    """

    def __init__(
        self, images, labels, mean, std, num_classes, batch_size, train, seed=0, crop=0, flip=False, part=(0, 1)
    ):
        self.images, self.labels = images, labels
        self.scale, self.shift = (1 / std).view(-1, 1, 1), (-mean / std).view(-1, 1, 1)
        self.num_classes, self.shape, self.size = num_classes, tuple(images.shape[1:]), len(images)
        self.batch_size = min(batch_size, self.size)
        self.train, self.seed, self.crop, self.flip = train, seed, crop if train else 0, flip and train
        self.part = part
        if train:
            check_share(self.batch_size, part[1])

    def __len__(self) -> int:
        return self.size // self.batch_size if self.train else -(-self.size // self.batch_size)

    def epoch(self, number: int = 0, skip: int = 0):
        """The batches (images, labels) of that epoch, from batch `skip` on."""
        device = self.images.device
        # All of an epoch's random numbers are drawn at once, on the CPU: the same on every device.
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(self.size, generator=rng) if self.train else torch.arange(self.size)
        shifts = torch.randint(2 * self.crop + 1, (2, self.size), generator=rng).to(device) if self.crop else None
        mirror = (torch.rand(self.size, generator=rng) < 0.5).to(device) if self.flip else None
        order = order.to(device)
        for b in range(skip, len(self)):
            at = share(b, self.batch_size, self.size, self.part)
            if at.start == at.stop:
                continue
            images = self.images[order[at]]
            if shifts is not None:
                images = random_crop(images, self.crop, *shifts[:, at])
            if mirror is not None:
                images = torch.where(mirror[at].view(-1, 1, 1, 1), images.flip(-1), images)
            images = torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)
            yield images.contiguous(memory_format=torch.channels_last), self.labels[order[at]]


def random_crop(images: Tensor, pad: int, dy: Tensor, dx: Tensor) -> Tensor:
    """Pad by `pad` zeros on every side, then cut image i's window at row dy[i], column dx[i]: [B, C, H, W]."""
    h, w = images.shape[-2:]
    windows = F.pad(images, (pad,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # [B, C, 2·pad+1, 2·pad+1, H, W], a view
    return windows[torch.arange(len(images), device=images.device), :, dy, dx]


class StreamedBatches:
    """Large images, decoded by DataLoader workers: the same interface as ResidentBatches.

    files and labels: lists. image_size S: training takes a RandomResizedCrop to S×S and a flip, testing resizes the
    short side to S·8/7 and cuts the centre. Every image's crop depends on (seed, epoch, image) alone.
    """

    def __init__(
        self,
        files,
        labels,
        num_classes,
        image_size,
        batch_size,
        train,
        device,
        seed=0,
        workers=2,
        flip=True,
        part=(0, 1),
    ):
        transforms = torchvision_module("transforms.v2")
        self.files, self.labels, self.num_classes, self.size = files, labels, num_classes, len(files)
        self.shape, self.batch_size = (3, image_size, image_size), min(batch_size, len(files))
        self.train, self.device, self.seed, self.workers, self.part = train, torch.device(device), seed, workers, part
        if train:
            check_share(self.batch_size, part[1])
            steps = [transforms.RandomResizedCrop(image_size, antialias=True)]
            steps += [transforms.RandomHorizontalFlip()] if flip else []
        else:
            steps = [transforms.Resize(image_size * 8 // 7, antialias=True), transforms.CenterCrop(image_size)]
        to_float = [transforms.PILToTensor(), transforms.ToDtype(torch.float32, scale=True)]
        self.transform = transforms.Compose([*steps, *to_float, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        # The same as numbers for 0…255, as ResidentBatches has them.
        mean, std = 255 * torch.tensor(IMAGENET_MEAN), 255 * torch.tensor(IMAGENET_STD)
        self.scale, self.shift = (1 / std).view(-1, 1, 1), (-mean / std).view(-1, 1, 1)

    def __len__(self) -> int:
        return self.size // self.batch_size if self.train else -(-self.size // self.batch_size)

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        """(epoch, image) -> its transformed image and label; what the DataLoader's workers run."""
        number, i = index
        with torch.random.fork_rng(devices=[]):
            key = hashlib.sha256(f"{self.seed} {number} {i}".encode()).digest()[:8]
            torch.random.default_generator.manual_seed(int.from_bytes(key))
            return self.transform(decode(self.files[i])), self.labels[i]

    def epoch(self, number: int = 0, skip: int = 0):
        """The batches (images, labels) of that epoch, from batch `skip` on."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = (torch.randperm(self.size, generator=rng) if self.train else torch.arange(self.size)).tolist()
        batches = [order[share(b, self.batch_size, self.size, self.part)] for b in range(skip, len(self))]
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=[[(number, i) for i in batch] for batch in batches if batch],
            num_workers=self.workers,
            worker_init_fn=ignore_ctrl_c,
            generator=rng,  # else it would draw its workers' seed from the global generator
            pin_memory=self.device.type == "cuda",
        )
        try:
            for images, labels in loader:
                images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                yield images, labels.to(self.device, non_blocking=True)
        except DataError as e:  # from a worker it comes with the worker's traceback; its last line is ours
            e.__traceback__ = None  # it holds the loader, whose workers otherwise live on until it is collected
            raise DataError(str(e).strip().splitlines()[-1].split("DataError: ")[-1]) from None


def ignore_ctrl_c(worker: int) -> None:
    """Ctrl-C is for the training process, which finishes its step and saves; it needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# Loading.


def load(
    name: str,
    data_dir: str | Path = "data",
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    seed: int = 0,
    crop: bool = True,
    flip: bool = True,
    image_size: int | None = None,
    workers: int = 2,
    log=print,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[ResidentBatches | StreamedBatches, ResidentBatches | StreamedBatches]:
    """The training and the test batches of a data set.

    name: 'cifar10', 'cifar100', 'mnist' (downloaded into data_dir with torchvision when they are not there), 'digits'
        (8×8 handwriting, comes with scikit-learn, always works offline), 'imagenet' and 'folder' (images in
        data_dir/train/CLASS/ and data_dir/test/CLASS/ or data_dir/val/CLASS/).
    crop, flip: augmentation of the training images: pad by H/8 pixels (4 for CIFAR) and crop at random; mirror
        every other one (never digits). Large images are always cropped, by RandomResizedCrop.
    image_size: pixels a side, to which images are resized. Default: that of a folder's first image, if it is square
        and at most 96, else 224; 224 for 'imagenet'; and their own for the others, which can have up to 96.
    part: (rank, number of processes) of torch.distributed; batch_size is that of all together.
    Raises DataError, whose message is one sentence for the user; ValueError for an unknown name.
    """
    part = (rank, world_size)
    if name not in DATASETS:
        raise ValueError(f"no data set is called {name!r}: use one of {', '.join(DATASETS)}")
    if name in ("imagenet", "folder"):
        classes, splits = scan_folder(Path(data_dir))
        if image_size is None:
            image_size = 224 if name == "imagenet" else natural_size(splits["train"][0][0])
        if image_size > RESIDENT_UP_TO:
            return tuple(
                StreamedBatches(
                    *splits[s], len(classes), image_size, batch_size, s == "train", device, seed, workers, flip, part
                )
                for s in ("train", "test")
            )
    if part[0] > 0:
        torch.distributed.barrier()  # until the first process has downloaded and decoded everything
    if name in ("imagenet", "folder"):
        train, test = (decode_all(Path(data_dir), s, *splits[s], image_size, log) for s in ("train", "test"))
        num_classes = len(classes)
    elif name == "digits":
        train, test, num_classes = *digits(), 10
    else:
        train, test, num_classes = *downloaded(name, Path(data_dir)), 100 if name == "cifar100" else 10
    if part[0] == 0 and part[1] > 1:
        torch.distributed.barrier()
    if image_size not in (None, train[0].shape[-1]):  # a folder's images have that size by now
        train, test = ((resize(images, image_size, name), labels) for images, labels in (train, test))
    if name in ("digits", "mnist"):
        flip = False
    # Mean and standard deviation of each channel over the training images, in 0…255. By slices, to spare memory.
    count = train[0].numel() // train[0].shape[1]
    mean = sum(x.double().sum(dim=(0, 2, 3)) for x in train[0].split(1000)) / count
    square = sum(x.double().square().sum(dim=(0, 2, 3)) for x in train[0].split(1000)) / count
    std = (square - mean.square()).sqrt().clamp_min(1e-3)
    pad = max(1, train[0].shape[-1] // 8) if crop else 0
    mean, std = mean.float().to(device), std.float().to(device)
    return tuple(
        ResidentBatches(x.to(device), y.to(device), mean, std, num_classes, batch, is_train, seed, pad, flip, part)
        for (x, y), batch, is_train in ((train, batch_size, True), (test, max(batch_size, 500), False))
    )


def resize(images: Tensor, size: int, name: str) -> Tensor:
    """uint8 [N, C, H, W] -> [N, C, size, size], averaging where that is smaller."""
    if size > RESIDENT_UP_TO:
        raise DataError(f"--image-size {size} is over {RESIDENT_UP_TO}, the most for {name}, which is held in memory")
    return torch.cat([F.interpolate(x, (size, size), mode="bilinear", antialias=True) for x in images.split(1000)])


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 handwritten 8×8 digits, every fifth one for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("--dataset digits needs scikit-learn: pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)
    images = rearrange(torch.from_numpy(pixels), "n (h w) -> n 1 h w", h=8).mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(labels).long()
    held_out = torch.arange(len(labels)) % 5 == 4
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def torchvision_module(name: str):
    """Import torchvision.NAME.

    pip can pair a CPU build of torch with torchvision's CUDA build. The latter's compiled operators then do not load,
    and importing it fails on the first of them. Nothing here uses them, so they are declared, and the import goes on.
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except ImportError as e:
        raise DataError(f"torchvision is needed here and cannot be imported ({e}): pip install torchvision") from None
    except RuntimeError as e:
        if "torchvision::" not in str(e):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_module.library = library  # the declarations live as long as this object does
    return importlib.import_module(f"torchvision.{name}")


def downloaded(name: str, data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """cifar10, cifar100 or mnist as uint8 tensors, through torchvision.datasets."""
    dataset = getattr(torchvision_module("datasets"), {"mnist": "MNIST"}.get(name, name.upper()))
    splits = []
    for train in (True, False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy's, about the pickles inside CIFAR's archive
                split = dataset(str(data_dir), train=train, download=True)
        except (OSError, RuntimeError) as e:  # no network, no space, not writable, a damaged archive
            reason = " ".join(str(e).split())
            raise DataError(
                f"{name} is not in {data_dir} and could not be downloaded there ({reason}): put torchvision's copy "
                "there, or use --dataset digits, which needs no download, or --dataset folder for your own images"
            ) from None
        images = torch.as_tensor(split.data)
        images = images.unsqueeze(1) if images.dim() == 3 else rearrange(images, "n h w c -> n c h w").contiguous()
        splits.append((images, torch.as_tensor(split.targets)))
    return splits[0], splits[1]


# ---------------------------------------------------------------------------------------------------------------------
# Folders of images.


def scan_folder(root: Path) -> tuple[list[str], dict[str, tuple[list[Path], list[int]]]]:
    """The classes, and for 'train' and 'test' the files and their labels, of root/train/CLASS/*, root/test/CLASS/*."""
    held_out = next((d for d in ("test", "val") if any(e.is_dir() for e in (root / d).glob("*"))), None)
    if not (root / "train").is_dir() or held_out is None:
        raise DataError(
            f"no images in {root}: it must hold train/CLASS/*.png (or .jpg) and test/CLASS/* (or val/CLASS/*); "
            "say where with --data-dir"
        )
    names = {d: sorted(e.name for e in os.scandir(root / d) if e.is_dir()) for d in ("train", held_out)}
    if not names["train"]:
        raise DataError(f"{root / 'train'} holds no class folders: put each class's images in a folder of its own")
    missing, unknown = (sorted(set(a) - set(b)) for a, b in (names.values(), list(names.values())[::-1]))
    for classes, has, lacks in ((missing, "train", held_out), (unknown, held_out, "train")):
        if classes:
            raise DataError(
                f"{root / has} has the class {classes[0]!r} and {root / lacks} does not: "
                "both must hold the same class folders"
            )
    splits = {}
    for split, d in (("train", "train"), ("test", held_out)):
        files, labels = [], []
        for label, name in enumerate(names["train"]):
            with os.scandir(root / d / name) as entries:
                found = sorted(e.path for e in entries if e.name.lower().endswith(SUFFIXES))
            if not found:
                raise DataError(f"{root / d / name} holds no images ({', '.join(SUFFIXES)})")
            files += map(Path, found)
            labels += [label] * len(found)
        splits[split] = files, labels
    return names["train"], splits


def decode(file: Path):
    """A file as a PIL image in RGB. Raises DataError naming the file."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16"):  # convert() would make every value above 255 white
                image = image.convert("I").point(lambda v: v / 256).convert("L")
            return image.convert("RGB")
    except Exception as e:  # PIL raises many kinds for damaged files: OSError, SyntaxError, ValueError, struct.error
        raise DataError(f"the image {file} cannot be read ({e}): replace it or take it away") from None


def natural_size(file: Path) -> int:
    """The side of an image that is square and small enough to be held on the device, else 224."""
    width, height = decode(file).size
    return width if width == height <= RESIDENT_UP_TO else 224


def decode_all(root: Path, split: str, files: list[Path], labels: list[int], size: int, log) -> tuple[Tensor, Tensor]:
    """All images of a split as [N, 3, size, size] uint8, and their labels [N].

    Images of another size are resized. The result is kept in root/.SPLIT-SIZE.pt and used again while the files'
    names, sizes and times are the same; where that cannot be written, decoding is done anew each time.
    """
    fingerprint = hashlib.sha256()
    for file in files:
        try:
            stat = file.stat()
        except OSError as e:
            raise DataError(f"the image {file} cannot be read ({e}): replace it or take it away") from None
        fingerprint.update(os.fsencode(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n"))
    fingerprint, cache = fingerprint.hexdigest(), root / f".{split}-{size}.pt"
    try:
        kept = torch.load(cache, weights_only=True)
        if kept["fingerprint"] == fingerprint:
            return kept["images"], kept["labels"]
    except Exception:  # not there, or damaged: it is only a cache
        pass
    log(f"decoding {len(files):,} {split} images of {root} at {size}×{size} (once: they are kept in {cache.name})")

    def pixels(file: Path) -> Tensor:
        image = decode(file)
        if image.size != (size, size):
            image = image.resize((size, size), resample=2)  # bilinear
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)

    with ThreadPoolExecutor() as threads:  # PIL lets go of the interpreter lock while it decodes
        images = torch.stack(list(threads.map(pixels, files)))
    images = rearrange(images, "n (h w c) -> n c h w", h=size, w=size).contiguous()
    labels = torch.tensor(labels)
    temporary = cache.with_suffix(f".{os.getpid()}")
    try:
        torch.save({"fingerprint": fingerprint, "images": images, "labels": labels}, temporary)
        temporary.replace(cache)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError where the disk is full
        log(f"could not keep the decoded images in {cache} ({e}): they will be decoded again next time")
        with contextlib.suppress(OSError):
            temporary.unlink()
    return images, labels
