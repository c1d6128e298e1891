"""Small files of digits, as IDX and as arrays by their names."""

import struct

import numpy as np

IMAGE_FILE = "train-images-idx3-ubyte"
RNG = np.random.default_rng(0)
IMAGES = {split: RNG.integers(0, 256, (n, 28, 28), np.uint8) for split, n in (("a", 7), ("b", 4))}
LABELS = {"a": np.array([0, 9, 1, 2, 3, 4, 5], np.uint8), "b": np.array([6, 7, 8, 9], np.uint8)}


def idx(array, magic=None):
    """An IDX file, written from its specification."""
    magic = {1: 0x0801, 3: 0x0803}[array.ndim] if magic is None else magic
    return struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()


def idx_files(joint="-"):
    return {
        f"{split}-{kind}{joint}idx{array.ndim}-ubyte": idx(array)
        for split, key in (("train", "a"), ("t10k", "b"))
        for kind, array in (("images", IMAGES[key]), ("labels", LABELS[key]))
    }


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def arrays(**changes):
    good = {
        "x_train": IMAGES["a"],
        "y_train": LABELS["a"],
        "x_test": IMAGES["b"],
        "y_test": LABELS["b"],
    }
    return {name: array for name, array in {**good, **changes}.items() if array is not None}


class Alarm:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was loaded')",)
