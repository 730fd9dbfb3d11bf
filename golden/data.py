"""Data sets: raw uint8 images `[n][h][w][c]`, labels, and the order in which training sees them (contract
section 8).

`digits` comes with scikit-learn. The others are read in their published formats from `DIR/NAME` where DIR is
`--data-dir` or `INTRAIN_DATA`; without either they are downloaded once, with checksums. `synthetic` is noise
for benchmarks.
"""

from __future__ import annotations

import gzip
import lzma
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golden import random
from golden.errors import InputError


@dataclass(frozen=True)
class DataSet:
    """Constants of a data set. Pixels run from 0 to `scale`; mean and deviation per channel are fractions of
    it.
    """

    name: str
    shape: tuple[int, int, int]
    train: int
    test: int
    scale: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    classes: int = 10
    mirror: bool = True     # augmentation may mirror an image: not a digit, which is then none


DATA_SETS = {
    info.name: info
    for info in (
        DataSet("digits", (8, 8, 1), 1440, 357, 16, (0.3053,), (0.3760,), 32, mirror=False),
        DataSet("mnist", (28, 28, 1), 60000, 10000, 255, (0.1307,), (0.3081,), 64, mirror=False),
        DataSet("fashion-mnist", (28, 28, 1), 60000, 10000, 255, (0.2860,), (0.3530,), 64),
        DataSet(
            "cifar-10",
            (32, 32, 3),
            50000,
            10000,
            255,
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            128,
        ),
        DataSet("synthetic", (16, 16, 3), 1024, 256, 255, (0.5, 0.5, 0.5), (0.2887, 0.2887, 0.2887), 32),
    )
}

_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_SHA256 = {
    "mnist": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion-mnist": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_HASH = "md5:c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)
_CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class Dataset:
    """Loaded images (uint8 `[n][h][w][c]`) and labels (int64 `[n]`); the constants are in `info`."""

    info: DataSet
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def mean(self) -> tuple[float, ...]:
        return self.info.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.info.std

    @property
    def classes(self) -> int:
        return self.info.classes


def _read(path: Path) -> bytes:
    """The contents of a plain, gzip or xz file; the suffix tells which."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; copy or download it again") from None


def _find(folder: Path, name: str, suffixes: tuple[str, ...]) -> Path:
    for suffix in suffixes:
        path = folder / (name + suffix)
        if path.is_file():
            return path
    raise InputError(f"{folder} has no {name}{suffixes[0]}: put the published files there")


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes (plain, .gz or .xz)."""
    path = Path(path)
    content = _read(path)
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 3:
        raise InputError(f"{path} is not an IDX file of bytes: magic number {content[:4].hex() or 'missing'}")
    rank = content[3]
    if len(content) < 4 + 4 * rank:
        raise InputError(f"{path} is truncated: {len(content)} bytes, its header needs {4 + 4 * rank}")
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    expected = 4 + 4 * rank + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise InputError(f"{path} is truncated or too long: {len(content)} bytes, its header says {expected}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _check(info: DataSet, images: np.ndarray, labels: np.ndarray, where: Path) -> tuple[np.ndarray, np.ndarray]:
    if images.shape[1:] != info.shape:
        raise InputError(f"{where}: {info.name} images must have shape {info.shape}, found {images.shape[1:]}")
    if labels.shape != (len(images),):
        raise InputError(f"{where}: {len(images)} images but labels of shape {labels.shape}")
    return images, check_labels(labels, info.classes, where)


def check_labels(labels: np.ndarray, classes: int, where="labels") -> np.ndarray:
    """Labels as int64, each 0..classes - 1."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise InputError(f"{where}: labels must be integers, got {labels.dtype}")
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(f"{where}: labels must be 0..{classes - 1}, found {labels.min()}..{labels.max()}")
    return labels.astype(np.int64)


def _load_idx(info: DataSet, folder: Path) -> list[np.ndarray]:
    arrays = [read_idx(_find(folder, name, (".gz", "", ".xz"))) for name in _IDX_FILES]
    result = []
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3:
            raise InputError(f"{folder}: an image file has {images.ndim} dimensions instead of 3")
        result += _check(info, images[..., None], labels, folder)
    return result


def _load_cifar(info: DataSet, folder: Path) -> list[np.ndarray]:
    images, labels = [], []
    for name in _CIFAR_FILES:
        path = _find(folder, name, ("", ".xz", ".gz"))
        content = _read(path)
        if not content or len(content) % _CIFAR_RECORD:
            raise InputError(f"{path} is truncated: {len(content)} bytes are not a multiple of {_CIFAR_RECORD}")
        records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
        pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        batch = _check(info, np.ascontiguousarray(pixels), records[:, 0], path)
        images.append(batch[0])
        labels.append(batch[1])
    return [np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5]]


def _load_digits(info: DataSet) -> list[np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--data digits needs scikit-learn: pip install scikit-learn") from None
    bundle = load_digits()
    images, labels = bundle.images.astype(np.uint8)[..., None], bundle.target.astype(np.int64)
    order = np.argsort(random.word(0, 0, random.SPLIT, np.arange(len(images))), kind="stable")
    train, test = order[: info.train], order[info.train :]
    return [images[train], labels[train], images[test], labels[test]]


def _load_synthetic(info: DataSet) -> list[np.ndarray]:
    count = info.train + info.test
    images = (random.words(0, 0, random.SPLIT, (count, *info.shape)) >> 24).astype(np.uint8)
    labels = (random.words(0, 1, random.SPLIT, (count,)) % info.classes).astype(np.int64)
    return [images[: info.train], labels[: info.train], images[info.train :], labels[info.train :]]


def _download(info: DataSet) -> Path:
    """The folder of the downloaded files, fetched on first use."""
    try:
        import pooch
    except ImportError:
        raise InputError(
            f"{info.name} is not on this machine: pass --data-dir DIR with a folder DIR/{info.name}, "
            "or pip install pooch to download it"
        ) from None
    import logging

    pooch.get_logger().setLevel(logging.ERROR)
    folder = Path(pooch.os_cache("intrain")) / info.name
    try:
        if info.name == "cifar-10":
            pooch.retrieve(
                _CIFAR_URL,
                _CIFAR_HASH,
                "cifar-10-binary.tar.gz",
                folder,
                processor=pooch.Untar(extract_dir="."),
            )
            return folder / "cifar-10-batches-bin"
        base = _MNIST_URL if info.name == "mnist" else _FASHION_URL
        for name, digest in zip(_IDX_FILES, _SHA256[info.name], strict=True):
            pooch.retrieve(f"{base}{name}.gz", f"sha256:{digest}", f"{name}.gz", folder)
        return folder
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot download {info.name} ({reason[:120]}): pass --data-dir DIR with a folder DIR/{info.name}"
        ) from None


def data_set(name: str) -> DataSet:
    """The constants of a data set by name."""
    if name not in DATA_SETS:
        raise InputError(f"unknown data {name!r}: choose from {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


def load(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Load a data set; `data_dir` (or `INTRAIN_DATA`) holds one folder per set, else it is downloaded."""
    info = data_set(name)
    if name == "digits":
        return Dataset(info, *_load_digits(info))
    if name == "synthetic":
        return Dataset(info, *_load_synthetic(info))
    data_dir = data_dir or os.environ.get("INTRAIN_DATA")
    if data_dir:
        folder = Path(data_dir) / name
        if not folder.is_dir():
            raise InputError(f"no data folder {folder}: give --data-dir the folder that holds {name}/")
    else:
        folder = _download(info)
    loader = _load_cifar if name == "cifar-10" else _load_idx
    return Dataset(info, *loader(info, folder))


def check_batch(batch: int, train: int) -> int:
    """The batch size, if whole batches of it exist."""
    if not 1 <= batch <= train:
        raise InputError(f"--batch must be 1..{train} (the training images), got {batch}")
    return batch


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the training samples in one epoch."""
    return np.argsort(random.word(seed, epoch, random.SHUFFLE, np.arange(count)), kind="stable")


AUGMENTATION_PADDING = 4


def augment(images: np.ndarray, seed: int, epoch: int, indices: np.ndarray, mirror: bool = True) -> np.ndarray:
    """Shift each image by up to 4 pixels into zero padding and mirror half of them, by one word per sample and epoch.

    Vertical and horizontal offsets 0..8 are (byte * 9) >> 8 of the word's bytes 0 and 1; its top bit mirrors, if
    `mirror`.
    """
    words = random.word(seed, epoch, random.AUGMENTATION, indices).astype(np.int64)
    span = 2 * AUGMENTATION_PADDING + 1
    top, left = ((words & 0xFF) * span) >> 8, ((words >> 8 & 0xFF) * span) >> 8
    n, h, w, _ = images.shape
    pad = AUGMENTATION_PADDING
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    columns = np.where((words >> 31 & mirror)[:, None] == 1, np.arange(w)[::-1], np.arange(w)) + left[:, None]
    rows = np.arange(h) + top[:, None]
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches(
    dataset: Dataset, seed: int, epoch: int, batch: int, start: int = 0, augmented: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole training batches (images, labels) of one epoch in contract order, from batch number `start`."""
    count = len(dataset.train_images)
    check_batch(batch, count)
    indices = order(seed, epoch, count)
    for k in range(start, count // batch):
        chosen = indices[k * batch : (k + 1) * batch]
        images = dataset.train_images[chosen]
        if augmented:
            images = augment(images, seed, epoch, chosen, dataset.info.mirror)
        yield images, dataset.train_labels[chosen]


def evaluation_batches(
    images: np.ndarray, labels: np.ndarray, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(images, labels, counted) in file order; the last batch is filled up with all-zero images that are not
    counted.
    """
    for first in range(0, len(images), batch):
        chunk, target = images[first : first + batch], labels[first : first + batch]
        missing = batch - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.zeros((missing, *chunk.shape[1:]), chunk.dtype)])
        yield chunk, target, len(target)
