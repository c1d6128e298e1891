"""What every reader of data does: whatever is wrong with a file ends in one sentence.

A file from outside is hostile until checked: no pickle is ever loaded, a header is compared with
what the experiment expects before anything is allocated for the data behind it, and no more is
decompressed than the header announces.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

CLASSES = 10
LARGEST = 1_000_000  # images; MNIST has 70,000 and its extensions (EMNIST, QMNIST) below 900,000
GZIP_MAGIC = b"\x1f\x8b"


class DataError(ValueError):
    """A data file is missing, broken or not what it should be.

    The message is one sentence: which file, what is wrong with it, and what to do.
    """


def read_npy(
    archive: zipfile.ZipFile,
    name: str,
    path: Path,
    check: Callable[[str, tuple[int, ...], np.dtype], None],
    expected: str,
) -> NDArray:
    """One array of an ``.npz``, its header read first.

    ``np.load(path, allow_pickle=False)`` would refuse pickles too, but it allocates whatever the
    header claims before it finds out that the data are not there.

    Args:
        archive: the open ``.npz``.
        name: the array's.
        path: the archive's, for messages.
        check: called with the name, and the shape and the dtype that the header announces; raises
            if they are not what is wanted.
        expected: what to give instead, if there is no such array.

    Returns:
        The array.

    Raises:
        DataError: if it is not there or not plain, or what ``check`` raises. A broken archive may
            raise anything.
    """
    if f"{name}.npy" not in archive.namelist():
        raise DataError(f"{path}: holds no array '{name}'; {expected}")
    with archive.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise DataError(f"{path}: '{name}' is not a plain array; save it with np.savez")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise DataError(
                f"{path}: '{name}' holds pickled objects, which are never loaded because they can "
                "run code; save a plain array of numbers"
            )
        check(name, shape, dtype)
        array = read_array(file, shape[::-1] if fortran_order else shape, dtype, path)
        return array.T if fortran_order else array


def read_array(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, path: Path) -> NDArray:
    """An array that is all that is left of a file."""
    size = int(np.prod(shape)) * dtype.itemsize
    data = read_exactly(file, size, path, "data")
    if file.read(1):
        raise DataError(f"{path}: is longer than its header says; download it again")
    return np.frombuffer(data, dtype).reshape(shape)


def read_exactly(file: IO[bytes], size: int, path: Path, part: str) -> bytes:
    """So many bytes of a file, or a `DataError` that says which part of it is short."""
    data = file.read(size)
    if len(data) < size:
        raise DataError(
            f"{path}: its {part} ends after {len(data)} of {size} bytes; download it again"
        )
    return data


def checked_labels(labels: NDArray, images: int, path: Path) -> NDArray[np.int32]:
    """The labels; a `DataError` unless there is one of ten classes for every image."""
    if len(labels) != images:
        raise DataError(
            f"{path}: has {len(labels)} labels for {images} images; use files that belong together"
        )
    lowest, highest = labels.min(), labels.max()
    if lowest < 0 or highest >= CLASSES:
        raise DataError(
            f"{path}: has labels from {lowest} to {highest} instead of 0 to {CLASSES - 1}; "
            "use the labels of ten classes"
        )
    return labels.astype(np.int32)


def as_data_error(error: Exception, path: Path) -> DataError:
    """What went wrong with a file, in one sentence."""
    if isinstance(error, DataError):
        return error
    if isinstance(error, PermissionError):
        return DataError(f"{path}: may not be read; change its permissions")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: is broken ({reason}); download it again")
