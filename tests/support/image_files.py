"""Small files of images in every version of CIFAR-10's, good ones and bad ones."""

import io
import pickle
import struct
import tarfile

import numpy as np
from PIL import Image

from tests.support.digit_files import Alarm

RNG = np.random.default_rng(0)
SIZES = {**{f"data_batch_{i}": i for i in range(1, 6)}, "test_batch": 4}
IMAGES = {name: RNG.integers(0, 256, (n, 32, 32, 3), np.uint8) for name, n in SIZES.items()}
LABELS = {name: RNG.integers(0, 10, n) for name, n in SIZES.items()}
NAME = "data_batch_3"


def binary(images, labels):
    """A binary batch, from its description: label, 1024 red bytes, 1024 green, 1024 blue."""
    return b"".join(
        bytes([label]) + b"".join(image[:, :, color].tobytes() for color in range(3))
        for image, label in zip(images, labels, strict=True)
    )


def python2(value):
    """What Python 2 pickles of these types with protocol 2, opcode by opcode."""
    if isinstance(value, bytes):
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + (
            value
        )
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if value is None:
        return b"N"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(v) for item in value.items() for v in item) + b"u"
    fortran = not value.flags.c_contiguous
    kind = b"cnumpy\ndtype\n" + python2((value.dtype.str[1:].encode(), 0, 1)) + b"R"
    kind += python2((3, b"|", None, None, None, -1, -1, 0)) + b"b"
    state = b"(" + python2(1) + python2(value.shape) + kind + python2(fortran)
    state += python2(value.tobytes("A")) + b"t"
    made = b"cnumpy.core.multiarray\n_reconstruct\n" + b"(cnumpy\nndarray\n" + python2((0,))
    return made + python2(b"b") + b"tR" + state + b"b"


def program(value):
    return b"\x80\x02" + python2(value) + b"."


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python(images, classes, **changes):
    batch = {
        b"batch_label": b"a batch",
        b"labels": [int(label) for label in classes],
        b"data": np.ascontiguousarray(planes(images)),
        b"filenames": [b"an_image.png"] * len(classes),
    }
    batch.update({key.encode(): value for key, value in changes.items()})
    return program({key: value for key, value in batch.items() if value is not None})


def batches(encode, ending):
    return {f"{name}{ending}": encode(IMAGES[name], LABELS[name]) for name in SIZES}


FILES = {"binary": batches(binary, ".bin"), "python": batches(python, "")}
FOLDERS = {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pack(path, files, folder="cifar-10-batches-bin"):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def jpeg(image, **how):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, **how)
    return file.getvalue()


def laid_end_to_end(files):
    ends = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), np.uint8), ends


SMOOTH = np.tile(np.arange(0, 256, 8, np.uint8)[:, None, None], (1, 32, 3))  # survives JPEG


def jpegs(**changes):
    train = [jpeg(SMOOTH), jpeg(SMOOTH[::-1]), jpeg(SMOOTH.swapaxes(0, 1))]
    test = [jpeg(SMOOTH[::-1])]
    arrays = {"class_names": np.array(["airplane"])}
    for split, files, labels in (("train", train, [7, 0, 9]), ("test", test, [3])):
        data, offsets = laid_end_to_end(files)
        arrays |= {f"{split}_jpeg": data, f"{split}_offsets": offsets}
        arrays[f"{split}_labels"] = np.array(labels, np.uint8)
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def bad_python_batches():
    images, labels = IMAGES[NAME], [int(label) for label in LABELS[NAME]]
    flat = np.ascontiguousarray(planes(images))
    whole = python(images, labels)
    return {
        "empty": (b"", "no pickle"),
        "truncated": (whole[:-20], "no pickle"),
        "a web page": (b"<!DOCTYPE html><html></html>", "no pickle"),
        "a program": (pickle.dumps({b"data": Alarm(), b"labels": labels}), "builtins.exec"),
        "a program of protocol 0": (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        "numpy's loader": (b"cnumpy\nload\n.", "numpy.load"),
        "a name with line breaks": (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", "asks for a b.c"),
        "endless nesting": (b"(" * 100_000 + b"t" * 100_000 + b".", "holds no images"),
        "a huge memo": (b"Nr\xff\xff\xff\x7f.", "holds no images"),
        "a key whose hash never ends": (b"})" + b"q\0h\0\x86" * 99 + b"Ns.", "not bytes"),
        "endless empty lists": (b"]" * 2**18 + b".", "more than 262,144 instructions"),
        "arguments that are no tuple": (b"cnumpy\ndtype\nNR.", "holds no images"),
        "a long number": (b"\x8a\x01\x05.", "has the instruction LONG1"),
        "a list": (program([1, 2]), "holds no images"),
        "no labels": (python(images, labels, labels=None), "holds no images"),
        "no data": (python(images, labels, data=None), "holds no images"),
        "data as a list": (python(images, labels, data=[1, 2, 3]), "holds no images"),
        "floats": (python(images, labels, data=flat / 2.0), "holds no images"),
        "flat data": (python(images, labels, data=flat.ravel()), "holds no images"),
        "gray images": (python(images, labels, data=flat[:, :1024].copy()), "holds no images"),
        "a shape that lies": (whole.replace(python2((3, 3072)), python2((9, 3072))), "no images"),
        "fewer labels": (python(images, labels[:-1]), "2 labels for 3 images"),
        "fine labels of CIFAR-100": (python(images, [99, 0, 1]), "to 99 instead of 0 to 9"),
        "label -1": (python(images, [-1, 0, 1]), "from -1"),
        "names for labels": (python(images, labels, labels=[b"cat"] * 3), "holds no images"),
    }


BAD_PYTHON = bad_python_batches()
