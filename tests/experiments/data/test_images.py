"""Images from good files come back as they were written; every bad file ends in one sentence."""

import gzip
import io
import pickle
import sys
import tarfile
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from l1inf_optax.experiments.data.files import DataError
from l1inf_optax.experiments.data.images import load_cifar10
from tests.support.digit_files import Alarm
from tests.support.image_files import (
    BAD_PYTHON,
    FILES,
    FOLDERS,
    IMAGES,
    LABELS,
    NAME,
    SIZES,
    SMOOTH,
    jpeg,
    jpegs,
    laid_end_to_end,
    pack,
    planes,
    python,
    write,
)


def check(got):
    for x, y, names in (
        (got.x_train, got.y_train, list(SIZES)[:5]),
        (got.x_test, got.y_test, ["test_batch"]),
    ):
        assert (x.dtype, y.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(x, np.concatenate([IMAGES[name] for name in names]))
        np.testing.assert_array_equal(y, np.concatenate([LABELS[name] for name in names]))


def refuse(path, *words):
    """The message is a single sentence that names the file, says what is wrong and what to do."""
    with pytest.raises(DataError) as caught:
        load_cifar10(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, ";", *words):
        assert word in message


@pytest.mark.parametrize("version", FILES)
def test_the_original_batches_are_read(tmp_path, version):
    inside = write(tmp_path / FOLDERS[version], FILES[version])
    archive = pack(tmp_path / "cifar.tar.gz", FILES[version], FOLDERS[version])
    for path in (inside, tmp_path, archive):
        got = load_cifar10(path)
        check(got)
        assert got.source == path.name


def test_an_array_pickled_column_by_column_is_read(tmp_path):
    data = np.asfortranarray(planes(IMAGES[NAME]))
    changed = python(IMAGES[NAME], LABELS[NAME], data=data)
    check(load_cifar10(write(tmp_path / "x", {**FILES["python"], NAME: changed})))


def test_the_pickles_of_these_tests_are_what_numpy_reads():
    batch = pickle.loads(FILES["python"][NAME], encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], planes(IMAGES[NAME]))
    np.testing.assert_array_equal(batch[b"labels"], LABELS[NAME])


def test_jpeg_files_are_read(tmp_path):
    np.savez_compressed(tmp_path / "images.npz", **jpegs())
    got = load_cifar10(tmp_path / "images.npz")
    assert got.x_train.shape == (3, 32, 32, 3)
    for image, original in zip(
        got.x_train, (SMOOTH, SMOOTH[::-1], SMOOTH.swapaxes(0, 1)), strict=True
    ):
        assert np.abs(image.astype(int) - original).max() < 8
    np.testing.assert_array_equal(got.y_train, [7, 0, 9])
    np.testing.assert_array_equal(got.y_test, [3])


def test_without_a_path_one_sentence_says_how_to_get_the_images():
    with pytest.raises(DataError, match=r"--data .*cs\.toronto\.edu.*--download"):
        load_cifar10()


def test_a_missing_path_is_refused(tmp_path):
    refuse(tmp_path / "nowhere", "no such file")


def test_an_empty_folder_is_refused(tmp_path):
    refuse(tmp_path, "holds no data_batch_1")


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("name", SIZES)
def test_a_missing_batch_is_refused(tmp_path, version, name):
    files = {key: value for key, value in FILES[version].items() if not key.startswith(name)}
    refuse(write(tmp_path / "x", files), f"holds no {name}")
    refuse(pack(tmp_path / "x.tar.gz", files), f"holds no {name}")


GOOD = FILES["binary"][f"{NAME}.bin"]
BAD_BINARY = {
    "empty": (b"", "has 0 bytes"),
    "truncated": (GOOD[:-1], "no multiple of 3,073"),
    "two labels a record, as in CIFAR-100": (bytes(3074), "no multiple of 3,073"),
    "a web page": (b"<!DOCTYPE html><html></html>", "no multiple of 3,073"),
    "label 10": (b"\x0a" + GOOD[1:], "to 10 instead of 0 to 9"),
    "far too long": (bytes(2**26 + 1), "more than 67,108,864 bytes"),
}


@pytest.mark.parametrize("case", BAD_BINARY)
def test_a_bad_binary_batch_is_refused(tmp_path, case):
    content, complaint = BAD_BINARY[case]
    files = {**FILES["binary"], f"{NAME}.bin": content}
    for path in (write(tmp_path / "x", files), pack(tmp_path / "x.tar.gz", files)):
        with pytest.raises(DataError, match=f"{NAME}.bin") as caught:
            load_cifar10(path)
        assert complaint in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BAD_PYTHON)
def test_a_bad_python_batch_is_refused(tmp_path, case):
    content, complaint = BAD_PYTHON[case]
    with pytest.raises(DataError, match=complaint) as caught:
        load_cifar10(write(tmp_path / "x", {**FILES["python"], NAME: content}))
    assert NAME in str(caught.value)
    assert "\n" not in str(caught.value)


NO_ARCHIVES = {
    "empty": b"",
    "the start of a zip archive": b"PK\x03\x04",
    "a table": b"x,y\n1,2\n",
    "compressed, but no tar archive": gzip.compress(b"no tar"),
}


@pytest.mark.parametrize("content", NO_ARCHIVES.values(), ids=NO_ARCHIVES)
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    refuse(write(tmp_path, {"images": content}) / "images", "neither a tar archive nor an .npz")


def test_a_link_to_nothing_is_no_batch(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo(f"{NAME}.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere"
        archive.addfile(link)
    refuse(tmp_path / "x.tar", "holds no data_batch_1")


@pytest.mark.parametrize("size", [2**40, -512])
@pytest.mark.parametrize(
    "kind",
    [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE],
    ids=["extended header", "long name", "file"],
)
def test_a_tar_header_that_lies_is_refused_before_memory_is_taken(tmp_path, kind, size):
    member = tarfile.TarInfo(f"{NAME}.bin")
    member.type, member.size = kind, size
    header = member.tobuf(tarfile.GNU_FORMAT)
    for content in (header, gzip.compress(header + bytes(10**6))):
        refuse(write(tmp_path, {"x.tar": content}) / "x.tar", "bytes")


def test_a_tar_archive_of_endless_empty_files_takes_no_memory(tmp_path):
    header = tarfile.TarInfo("x" * 90).tobuf()
    (tmp_path / "x.tar").write_bytes(header * 2_000)
    tracemalloc.start()
    refuse(tmp_path / "x.tar", "holds no data_batch_1")
    assert tracemalloc.get_traced_memory()[1] < 3e5
    tracemalloc.stop()


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_a_truncated_tar_archive_is_refused(tmp_path, kept):
    path = pack(tmp_path / "x.tar.gz", FILES["binary"])
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refuse(path)


def bad_archives():
    good = jpegs()
    grey, large = Image.new("L", (32, 32)), np.zeros((33, 32, 3), np.uint8)
    file = io.BytesIO()
    grey.save(file, "JPEG")

    def of(*files):
        data, offsets = laid_end_to_end(files)
        return {"test_jpeg": data, "test_offsets": offsets}

    cut = good["test_jpeg"][:-200]
    return {
        "no test_labels": ({"test_labels": None}, "no array 'test_labels'"),
        "float offsets": ({"test_offsets": np.array([0.0, 1.0])}, "float64 of shape (2,)"),
        "bytes in two axes": ({"test_jpeg": good["test_jpeg"][None]}, "of shape (1, "),
        "wide bytes": ({"test_jpeg": good["test_jpeg"].astype(np.int64)}, "does not divide"),
        "no images": ({"train_labels": np.zeros(0, np.uint8)}, "of shape (0,)"),
        "fewer labels": ({"train_labels": np.array([1, 2])}, "2 labels for 3 images"),
        "label 10": ({"test_labels": np.array([10])}, "labels from 10 to 10"),
        "offsets beyond the end": ({"test_offsets": np.array([0, 10**9])}, "does not divide"),
        "offsets that go back": ({"train_offsets": np.array([0, 9, 3, 2])}, "does not divide"),
        "truncated image": ({"test_jpeg": cut, "test_offsets": np.array([0, len(cut)])}, "image 0"),
        "no image": (of(b"no image at all"), "image 0 of 'test_jpeg' is no whole JPEG"),
        "a large image": (of(jpeg(large)), "RGB of 32 x 33 pixels instead"),
        "a grey image": (of(file.getvalue()), "L of 32 x 32"),
        "objects": ({"test_labels": np.array([Alarm()], object)}, "pickled objects"),
    }


BAD_JPEGS = bad_archives()


@pytest.mark.parametrize("case", BAD_JPEGS)
def test_a_bad_archive_of_jpeg_files_is_refused(tmp_path, case):
    changes, complaint = BAD_JPEGS[case]
    np.savez(tmp_path / "images.npz", **jpegs(**changes))
    refuse(tmp_path / "images.npz", complaint)


def test_bytes_in_eight_bytes_each_are_refused_before_memory_is_taken(tmp_path):
    header = io.BytesIO()
    shape = {"shape": (2**28,), "fortran_order": False, "descr": "<i8"}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("train_jpeg.npy", header.getvalue())
    refuse(tmp_path / "images.npz", "up to 268,435,456 bytes")


@pytest.mark.parametrize("position", [0.1, 0.4, 0.7])
def test_a_damaged_archive_of_jpeg_files_is_refused(tmp_path, position):
    np.savez_compressed(tmp_path / "images.npz", **jpegs())
    content = bytearray((tmp_path / "images.npz").read_bytes())
    first = int(position * len(content))
    content[first : first + 64] = bytes(64)
    (tmp_path / "images.npz").write_bytes(content)
    refuse(tmp_path / "images.npz")


@pytest.fixture
def openml(monkeypatch):
    """openml.org as scikit-learn would hand it out, without a network."""
    order = np.concatenate([np.arange(50_000) % 10, np.arange(10_000) % 10])
    answer = {"x": np.zeros((60_000, 3072), np.uint8), "y": order.astype(str).astype(object)}
    answer["x"][0, :1024] = 200  # the first image is red
    asked = []

    def fetch_openml(name, **options):
        asked.append((name, options))
        if isinstance(answer["x"], Exception):
            raise answer["x"]
        return answer["x"], answer["y"]

    fake = types.SimpleNamespace(fetch_openml=fetch_openml)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", fake)
    return answer, asked


def test_a_download_is_split_as_the_original(openml):
    got = load_cifar10(download=True)
    assert openml[1][0][0] == "CIFAR_10"
    assert (len(got.x_train), len(got.x_test)) == (50_000, 10_000)
    np.testing.assert_array_equal(got.x_train[0, 5, 7], [200, 0, 0])
    np.testing.assert_array_equal(got.y_test[:3], [0, 1, 2])
    assert (got.x_train.dtype, got.y_train.dtype) == (np.uint8, np.int32)


def test_a_path_comes_before_a_download(tmp_path, openml):
    check(load_cifar10(write(tmp_path / "x", FILES["binary"]), download=True))
    assert not openml[1]


@pytest.mark.parametrize(
    "error", [OSError("<urlopen error\nno route>"), ValueError("md5"), EOFError()]
)
def test_a_failed_download_ends_in_one_sentence(openml, error):
    openml[0]["x"] = error
    with pytest.raises(DataError, match=r"download failed .*; .*--data") as caught:
        load_cifar10(download=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["another order", "fewer images", "negative pixels"])
def test_a_download_of_something_else_is_refused(openml, case):
    answer = openml[0]
    if case == "another order":
        answer["y"] = np.sort(answer["y"])
    elif case == "fewer images":
        answer["x"] = answer["x"][:-1]
    else:
        answer["x"] = answer["x"].astype(np.int16) - 1
    with pytest.raises(DataError, match="is not the 50,000 training images"):
        load_cifar10(download=True)
