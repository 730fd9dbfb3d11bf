import gzip
import lzma
import struct

import numpy as np
import pytest

from golden import data, random
from golden.errors import InputError


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A tiny data folder in the published format: gzip, plain and xz files."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    arrays = {}
    for prefix, count in (("train", 70), ("t10k", 20)):
        arrays[prefix] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(arrays["train"][0])))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(arrays["train"][1]))
    (folder / "t10k-images-idx3-ubyte.xz").write_bytes(lzma.compress(idx(arrays["t10k"][0])))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(arrays["t10k"][1])))
    return tmp_path, folder, arrays


def test_digits_split_follows_the_contract():
    digits = data.load("digits")
    assert digits.train_images.shape == (1440, 8, 8, 1) and digits.test_images.shape == (357, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8 and digits.train_images.max() == 16
    words = [random.word(0, 0, 0xFFFF0003, i) for i in range(1797)]
    order = sorted(range(1797), key=lambda i: (words[i], i))
    from sklearn.datasets import load_digits

    bundle = load_digits()
    assert (digits.train_labels == bundle.target[order[:1440]]).all()
    assert (digits.test_images[:, :, :, 0] == bundle.images[order[1440:]]).all()
    pixels = digits.train_images / 16
    assert abs(pixels.mean() - digits.mean[0]) < 5e-3 and abs(pixels.std() - digits.std[0]) < 5e-3


def test_epoch_order_is_a_stable_sort_of_the_shuffle_words():
    words = [random.word(9, 3, 0xFFFF0000, i) for i in range(100)]
    assert data.order(9, 3, 100).tolist() == sorted(range(100), key=lambda i: (words[i], i))
    digits = data.load("digits")
    batches = list(data.batches(digits, 9, 3, 100))
    order = data.order(9, 3, 1440)
    assert len(batches) == 14
    assert (batches[2][1] == digits.train_labels[order[200:300]]).all()
    resumed = list(data.batches(digits, 9, 3, 100, start=12))
    assert len(resumed) == 2 and (resumed[0][0] == batches[12][0]).all()


def test_evaluation_batches_pad_with_zero_images():
    images, labels = np.ones((5, 2, 2, 1), np.uint8), np.arange(5)
    chunks = list(data.evaluation_batches(images, labels, 4))
    assert [(chunk.shape[0], counted, target.tolist()) for chunk, target, counted in chunks] == [
        (4, 4, [0, 1, 2, 3]),
        (4, 1, [4]),
    ]
    assert chunks[1][0][0].all() and not chunks[1][0][1:].any()


def test_idx_folder_in_all_published_forms(mnist):
    root, _, arrays = mnist
    loaded = data.load("mnist", root)
    assert (loaded.train_images[..., 0] == arrays["train"][0]).all()
    assert (loaded.test_labels == arrays["t10k"][1]).all()


def test_environment_names_the_data_folder(mnist, monkeypatch):
    monkeypatch.setenv("INTRAIN_DATA", str(mnist[0]))
    assert len(data.load("mnist").train_images) == 70


def _damage(name):
    def truncated(folder):
        (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(70, np.uint8))[:-1])

    def magic(folder):
        (folder / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x09\x01" + bytes(74))

    def short(folder):
        (folder / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00")

    def gzip_cut(folder):
        path = folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-100])

    def not_gzip(folder):
        (folder / "train-images-idx3-ubyte.gz").write_bytes(b"hello")

    def xz_damaged(folder):
        path = folder / "t10k-images-idx3-ubyte.xz"
        path.write_bytes(path.read_bytes()[:200] + b"x" + path.read_bytes()[201:])

    def labels_high(folder):
        (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.full(70, 10, np.uint8)))

    def labels_few(folder):
        (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(69, np.uint8)))

    def image_size(folder):
        content = gzip.compress(idx(np.zeros((70, 27, 28), np.uint8)))
        (folder / "train-images-idx3-ubyte.gz").write_bytes(content)

    def missing(folder):
        (folder / "train-labels-idx1-ubyte").unlink()

    return locals()[name]


@pytest.mark.parametrize(
    "damage,message",
    [
        ("truncated", "truncated or too long: 77 bytes, its header says 78"),
        ("magic", "is not an IDX file of bytes: magic number 00000901"),
        ("short", "is truncated: 5 bytes"),
        ("gzip_cut", "cannot read"),
        ("not_gzip", "cannot read"),
        ("xz_damaged", "cannot read"),
        ("labels_high", "labels must be 0..9, found 10..10"),
        ("labels_few", "70 images but labels of shape"),
        ("image_size", "mnist images must have shape"),
        ("missing", "has no train-labels-idx1-ubyte"),
    ],
)
def test_damaged_files_are_refused_in_one_line(mnist, damage, message):
    root, folder, _ = mnist
    _damage(damage)(folder)
    with pytest.raises(InputError) as caught:
        data.load("mnist", root)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder_and_unknown_name(tmp_path):
    with pytest.raises(InputError, match="no data folder .*fashion-mnist: give --data-dir"):
        data.load("fashion-mnist", tmp_path)
    with pytest.raises(InputError, match="unknown data 'mnits'"):
        data.load("mnits")


def test_offline_download_gives_one_message(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv("INTRAIN_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path)

    def refuse(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    with pytest.raises(InputError) as caught:
        data.load("mnist")
    assert "cannot download mnist (no route to host): pass --data-dir" in str(caught.value)


def test_cifar_records(tmp_path):
    folder = tmp_path / "cifar-10"
    folder.mkdir()
    rng = np.random.default_rng(1)
    records = rng.integers(0, 256, (6, 3, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        if i % 2:
            (folder / f"{name}.xz").write_bytes(lzma.compress(records[i].tobytes()))
        else:
            (folder / name).write_bytes(records[i].tobytes())
    loaded = data.load("cifar-10", tmp_path)
    assert loaded.train_images.shape == (15, 32, 32, 3)
    assert loaded.train_images[4, 5, 6].tolist() == [int(records[1, 1, 1 + 1024 * c + 32 * 5 + 6]) for c in range(3)]
    assert loaded.test_labels.tolist() == records[5, :, 0].tolist()
    (folder / "test_batch.bin").unlink(missing_ok=True)
    (folder / "test_batch.bin.xz").write_bytes(lzma.compress(records[5].tobytes()[:-1]))
    with pytest.raises(InputError, match="not a multiple of 3073"):
        data.load("cifar-10", tmp_path)


@pytest.mark.parametrize("mirrors", [True, False])
def test_augmentation_shifts_and_mirrors_by_the_words(mirrors):
    rng = np.random.default_rng(2)
    images = rng.integers(1, 256, (40, 8, 8, 3), dtype=np.uint8)
    indices = np.arange(100, 140)
    result = data.augment(images, 5, 7, indices, mirrors)
    for image, index, out in zip(images, indices.tolist(), result, strict=True):
        word = random.word(5, 7, 0xFFFF0002, index)
        top, left, mirror = (word & 255) * 9 // 256, (word >> 8 & 255) * 9 // 256, word >> 31 and mirrors
        padded = np.zeros((16, 16, 3), np.uint8)
        padded[4:12, 4:12] = image
        crop = padded[top : top + 8, left : left + 8]
        assert (out == (crop[:, ::-1] if mirror else crop)).all()
    assert len({bytes(data.augment(images[:1], 5, epoch, indices[:1])) for epoch in range(9)}) > 5


def test_augmented_digits_are_never_mirrored():
    digits = data.load("digits")
    chosen = data.order(1, 0, 1440)[:32]
    images, _ = next(data.batches(digits, 1, 0, 32, augmented=True))
    assert (images == data.augment(digits.train_images[chosen], 1, 0, chosen, False)).all()
    assert data.data_set("cifar-10").mirror


def test_synthetic_is_deterministic_noise():
    a, b = data.load("synthetic"), data.load("synthetic")
    assert a.train_images.shape == (1024, 16, 16, 3) and (a.train_images == b.train_images).all()
    assert 110 < a.train_images.mean() < 145 and set(a.train_labels.tolist()) == set(range(10))


def test_batch_size_limits():
    digits = data.load("digits")
    for batch in (0, 1441):
        with pytest.raises(InputError, match=f"--batch must be 1..1440 .*, got {batch}"):
            next(data.batches(digits, 1, 0, batch))
