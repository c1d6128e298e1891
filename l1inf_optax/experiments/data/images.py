"""CIFAR-10 from what the user names or from openml.org, checked before it is believed.

The layouts:

- a folder or a tar archive, packed or not, with the five training batches and the test batch of
  the original release, binary (``data_batch_1.bin``) or Python (``data_batch_1``);
- an ``.npz`` of JPEG files laid end to end, for either split s (train, test): the bytes
  ``s_jpeg``, the offsets at which image i begins and ends, ``s_offsets[i:i + 2]``, and
  ``s_labels``;
- the data set CIFAR_10 of openml.org, fetched by scikit-learn.

The Python batches are pickles, and a pickle is a program. Python's own machine never runs it. One
with a few instructions does, which can make numbers, strings, tuples, lists, dictionaries of bytes
and, for the three names without which numpy pickles no array, stand-ins that note what they are
told and do nothing. After that the array is put together from the notes, if they agree.
"""

import gzip
import http.client
import io
import pickletools
import tarfile
import zipfile
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from l1inf_optax.experiments.data.files import (
    CLASSES,
    GZIP_MAGIC,
    LARGEST,
    DataError,
    as_data_error,
    checked_labels,
    read_exactly,
    read_npy,
)

SHAPE = (32, 32, 3)
PIXELS = 3072

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")  # what the original archives unpack to
LARGEST_BATCH = 2**26  # bytes; the original ones have 31 million
LARGEST_ARCHIVE = 2**29  # bytes, unpacked; the original ones have 186 million
LONGEST_PICKLE = 2**18  # instructions; the original ones have 30,000
LARGEST_JPEG = 2**28  # bytes of all images of a split; 46 million at usual quality

EXPECTED = (
    "give the binary or Python version of CIFAR-10 (the .tar.gz or the folder it unpacks to), or "
    "an .npz with train_jpeg, train_offsets, train_labels and the same for test"
)

# What numpy's arrays name in a pickle, under its old module names and its new ones.
ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}

Split = tuple[NDArray[np.uint8], NDArray[np.int32]]


class Cifar10(NamedTuple):
    """Images of airplanes, automobiles, birds, cats, deer, dogs, frogs, horses, ships, trucks.

    Attributes:
        x_train: ``(n_train, 32, 32, 3)`` uint8, red, green, blue.
        y_train: ``(n_train,)`` int32, the class, 0 to 9 in the order above.
        x_test: ``(n_test, 32, 32, 3)`` uint8.
        y_test: ``(n_test,)`` int32.
        source: where they came from, without a folder.
    """

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int32]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int32]
    source: str


def load_cifar10(path: str | Path | None = None, *, download: bool = False) -> Cifar10:
    """CIFAR-10 from a file or folder, or from openml.org.

    Args:
        path: in one of the layouts that this module's docstring lists.
        download: fetch the images instead, if there is no path. scikit-learn keeps them in its
            data folder.

    Returns:
        The images, as `Cifar10`.

    Raises:
        DataError: if there is neither, or it does not hold such data. Nothing of it is used then.
    """
    if path is None:
        if not download:
            raise DataError(
                "--data names no images, and none are included; name what "
                "cs.toronto.edu/~kriz/cifar.html offers as binary or Python version, or say "
                "--download to fetch them from openml.org"
            )
        return _openml()
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {EXPECTED}")
    try:
        read = _jpeg_splits if zipfile.is_zipfile(path) else _batch_splits
        train, test = read(path)
    except Exception as error:  # whatever the libraries make of bytes that are not theirs
        raise as_data_error(error, path) from error
    return Cifar10(*train, *test, path.resolve().name)


def _batch_splits(path: Path) -> tuple[Split, Split]:
    files = _folder_files(path) if path.is_dir() else _tar_files(path)
    binary = any(name.endswith(".bin") for name in files)
    batches = []
    for batch in BATCHES:
        name = f"{batch}.bin" if binary else batch
        if name not in files:
            raise DataError(f"{path}: holds no {name}; {EXPECTED}")
        decode = _binary_batch if binary else _python_batch
        batches.append(decode(files[name], path / name))
    *train, test = batches
    x, y = zip(*train, strict=True)
    return (np.concatenate(x), np.concatenate(y)), test


def _folder_files(path: Path) -> dict[str, bytes]:
    """The batches among the files of the folder or, if it has none, of one that is in it."""
    for folder in (path, *(path / name for name in FOLDERS)):
        found = [file for name in BATCHES for file in folder.glob(f"{name}*") if _is_batch(file)]
        if found:
            break
    files = {}
    for name in found:
        with name.open("rb") as file:
            files[name.name] = _read_batch(file, name)
    return files


def _tar_files(path: Path) -> dict[str, bytes]:
    """The batches in a tar archive, gzipped or not.

    Member by member: `tarfile` reads extended headers of any length into memory, and keeps what it
    knows of any number of members.
    """
    files = {}
    with path.open("rb") as raw:
        zipped = raw.read(2) == GZIP_MAGIC
    file: IO[bytes]
    with gzip.open(path) if zipped else path.open("rb") as file:  # type: ignore[assignment]
        while (header := file.read(tarfile.BLOCKSIZE)) or not file.tell():
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                break
            except tarfile.HeaderError as error:
                raise DataError(
                    f"{path}: is neither a tar archive nor an .npz (or it was cut short); "
                    f"{EXPECTED}"
                ) from error
            name = PurePosixPath(member.name)
            end = file.tell() + tarfile.BLOCKSIZE * -(-member.size // tarfile.BLOCKSIZE)
            if member.isreg() and not member.issparse() and _is_batch(name):
                _check_size(member.size, path / name.name)
                files[name.name] = read_exactly(file, member.size, path / name.name, "data")
            if member.size < 0 or end > LARGEST_ARCHIVE:
                raise DataError(
                    f"{path}: is not of 0 to {LARGEST_ARCHIVE:,} bytes, unpacked; download it again"
                )
            file.seek(end)
    return files


def _is_batch(name: PurePosixPath | Path) -> bool:
    return name.name.removesuffix(".bin") in BATCHES


def _read_batch(file: IO[bytes], path: Path) -> bytes:
    content = file.read(LARGEST_BATCH + 1)
    _check_size(len(content), path)
    return content


def _check_size(size: int, path: Path) -> None:
    if not 0 <= size <= LARGEST_BATCH:
        raise DataError(f"{path}: has more than {LARGEST_BATCH:,} bytes; download it again")


def _binary_batch(content: bytes, path: Path) -> Split:
    """Records of a label and 32 x 32 red, green and blue pixels."""
    record = 1 + PIXELS
    count, rest = divmod(len(content), record)
    if rest or not count:
        raise DataError(
            f"{path}: has {len(content):,} bytes, which is no multiple of {record:,}; "
            "download it again"
        )
    table = np.frombuffer(content, np.uint8).reshape(count, record)
    return _interleaved(table[:, 1:]), checked_labels(table[:, 0], count, path)


class _StandIn:
    """Stands for what a pickle asks of numpy, and notes what it is told."""

    def __init__(self, args: Any):
        self.args = args
        self.state: Any = None


def _read_pickle(content: bytes) -> Any:
    """What a pickle describes, if it describes no more than a CIFAR-10 batch may hold.

    Every instruction adds a bounded amount to what is in memory, and keys are bytes: the hash of
    nested tuples that share their parts can take for ever.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below marks
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count >= LONGEST_PICKLE:
            raise DataError(f"has more than {LONGEST_PICKLE:,} instructions")
        above = stack
        if opcode.name in ("TUPLE", "APPENDS", "SETITEMS"):
            stack = below.pop()
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case (
                "BININT" | "BININT1" | "BININT2"
                | "BINBYTES" | "SHORT_BINBYTES" | "BINUNICODE" | "SHORT_BINUNICODE"
            ):  # fmt: skip
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # Python 2's
                stack.append(argument.encode("latin-1"))
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"TUPLE": tuple, "LIST": list, "DICT": dict}[opcode.name[6:]]())
            case "TUPLE":
                stack.append(tuple(above))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                stack[-2].append(stack.pop())
            case "APPENDS":
                stack[-1].extend(above)
            case "SETITEM":
                *stack, key, value = stack
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                _set_items(stack[-1], above)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_admitted(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_admitted(*stack[-2:])]
            case "REDUCE":
                stack[-2:] = [_StandIn(stack[-1])]
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case name:
                raise DataError(f"has the instruction {name}")
    return stack.pop()


def _set_items(target: Any, items: list[Any]) -> None:
    if any(type(key) is not bytes for key in items[::2]):
        raise DataError("has keys that are not bytes")
    target.update(zip(items[::2], items[1::2], strict=True))


def _admitted(module: Any, name: Any) -> str:
    if (module, name) not in ADMITTED:
        raise DataError(f"asks for {module}.{name}")
    return f"{module}.{name}"


def _python_batch(content: bytes, path: Path) -> Split:
    """A pickled dictionary, made by Python 2: its strings are bytes here."""
    try:
        batch = _read_pickle(content)
    except Exception as error:  # whatever a broken program may raise
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(
            f"{path}: is no pickle of a CIFAR-10 batch ({reason}), and no other is loaded because "
            "it can run code; download it again"
        ) from error
    match batch:
        case {
            b"data": _StandIn(
                state=(_, (int(n), 3072), _StandIn(args=(b"u1", *_)), order, bytes(data))
            ),
            b"labels": [int(), *_] as labels,
        } if len(data) == n * PIXELS and all(type(label) is int for label in labels):
            table = np.frombuffer(data, np.uint8).reshape((n, PIXELS), order="F" if order else "C")
            return _interleaved(table), checked_labels(np.array(labels), n, path)
    raise DataError(
        f"{path}: holds no images (n, 3072) of uint8 with a list of labels; download it again"
    )


def _interleaved(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``(n, 3072)``, one colour after the other, as ``(n, 32, 32, 3)``."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _jpeg_splits(path: Path) -> list[Split]:
    with zipfile.ZipFile(path) as archive:
        return [_jpeg_split(archive, split, path) for split in ("train", "test")]


def _jpeg_split(archive: zipfile.ZipFile, split: str, path: Path) -> Split:
    data, offsets, labels = (
        read_npy(archive, name, path, partial(_check_vector, path, most), EXPECTED)
        for name, most in (
            (f"{split}_jpeg", LARGEST_JPEG),
            (f"{split}_offsets", 8 * (LARGEST + 1)),
            (f"{split}_labels", 8 * LARGEST),
        )
    )
    count = len(offsets) - 1
    labels = checked_labels(labels, count, path)
    ends = (offsets[0], offsets[-1]) == (0, len(data))
    if data.dtype != np.uint8 or not ends or (offsets[1:] <= offsets[:-1]).any():
        raise DataError(
            f"{path}: '{split}_offsets' does not divide the bytes of '{split}_jpeg' into images; "
            "use arrays that belong together"
        )
    images = np.empty((count, *SHAPE), np.uint8)
    for i, (first, last) in enumerate(pairwise(offsets)):
        images[i] = _jpeg_image(data[first:last].tobytes(), f"image {i} of '{split}_jpeg'", path)
    return images, labels


def _check_vector(path: Path, most: int, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    whole = len(shape) == 1 and dtype.kind in "iu"
    if not whole or not 1 <= shape[0] <= most // dtype.itemsize:
        raise DataError(
            f"{path}: '{name}' is {dtype} of shape {shape} instead of integers, of up to {most:,} "
            f"bytes; {EXPECTED}"
        )


def _jpeg_image(content: bytes, name: str, path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            found = f"{image.mode} of {image.width} x {image.height} pixels"
            if (image.mode, image.size) == ("RGB", (32, 32)):
                return np.asarray(image)
    except Exception as error:  # a decoder may raise anything on bytes that are no image
        raise DataError(f"{path}: {name} is no whole JPEG file; download it again") from error
    raise DataError(f"{path}: {name} is {found} instead of RGB of 32 x 32; convert it")


def _openml() -> Cifar10:
    from sklearn.datasets import fetch_openml  # takes a second to import

    source = "openml.org: CIFAR_10"
    try:
        x, y = fetch_openml("CIFAR_10", version=1, as_frame=False, return_X_y=True, parser="auto")
        classes = y.astype(np.int32)
    except (OSError, ValueError, EOFError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{source}: the download failed ({reason}); try again, or name files with --data"
        ) from error
    train, test = slice(50_000), slice(50_000, None)
    balanced = len(classes) == 60_000 and all(
        np.array_equal(np.bincount(np.clip(part, 0, CLASSES)), [len(part) // CLASSES] * CLASSES)
        for part in (classes[train], classes[test])
    )
    if x.shape != (60_000, PIXELS) or not balanced or x.min() < 0 or x.max() > 255:
        raise DataError(
            f"{source}: is not the 50,000 training images and then the 10,000 test images; "
            "name files with --data"
        )
    images = _interleaved(x.astype(np.uint8))
    return Cifar10(images[train], classes[train], images[test], classes[test], source)
