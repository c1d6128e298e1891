"""Coverage-guided fuzzing of everything that reads a file from elsewhere: ``python -m`` this file.

Every reader gets a process of its own, in which `atheris` (libFuzzer) mutates a small good file, or
one that was crafted to be hostile, and watches which lines of the reader, of numpy's header parser
and of the standard library's decompressors it reaches. A file is either read, and then everything
about the result is as documented, or refused by the documented error. Anything else, more than
`SECONDS` for a file, more than `MEGABYTES` in all, a pickle or a command that is run, ends it.
"""

import argparse
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

SECONDS = 20
MEGABYTES = 3000
RUN = {"name": "fuzz"}
STANDARD = ("zipfile", "gzip", "tarfile", "pickletools", "json", "json.decoder", "json.scanner")


# --- readers: what is written where, and what must be true of what is read ------------------------


def read_digits(path):
    from l1inf_optax.experiments.data.digits import load_digits
    from l1inf_optax.experiments.data.files import DataError

    try:
        digits = load_digits(path)
    except DataError as error:
        return check_sentence(error)
    for x, y in ((digits.x_train, digits.y_train), (digits.x_test, digits.y_test)):
        assert (x.shape, x.dtype, y.dtype) == ((len(y), 784), "float32", "int32")
        assert 0 <= x.min() <= x.max() <= 1
        assert 0 <= y.min() <= y.max() <= 9


def read_cifar10(path):
    from l1inf_optax.experiments.data.files import DataError
    from l1inf_optax.experiments.data.images import load_cifar10

    try:
        images = load_cifar10(path)
    except DataError as error:
        return check_sentence(error)
    for x, y in ((images.x_train, images.y_train), (images.x_test, images.y_test)):
        assert (x.shape, x.dtype, y.dtype) == ((len(y), 32, 32, 3), "uint8", "int32")
        assert 0 <= y.min() <= y.max() <= 9


def read_checkpoint(path):
    from l1inf_optax.experiments.command.checkpoints import open_checkpoints
    from l1inf_optax.experiments.command.options import OptionError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_checkpoints(path, RUN, asynchronous=False) as (resume, _):
                assert resume.history[-1].step == 1
        except OptionError as error:
            check_sentence(error)


def check_sentence(error):
    assert re.fullmatch(".+", str(error))


# --- good files and hostile ones ------------------------------------------------------------------


def npy(shape="(3,)", descr="'|u1'", data=b"\x01\x02\x03", order="False"):
    """A .npy file whose header says anything."""
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def packed(arrays, compression=0):
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def written(arrays, save):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def idx_target(folder):
    from tests.support import digit_files as good

    good.write(folder, good.idx_files())
    image = good.idx(good.IMAGES["a"][:1])
    huge = image[:4] + b"\xff" * 4 + image[8:]
    seeds = [image, gzip.compress(image), huge, gzip.compress(image + bytes(10**6))]
    return read_digits, folder, folder / good.IMAGE_FILE, seeds


def npz_target(folder):
    import numpy as np

    from tests.support import digit_files as good

    small = {k: v[:2] for k, v in good.arrays().items()}
    seeds = [written(small, save) for save in (np.savez, np.savez_compressed)]
    seeds += [
        packed({"x_train": npy(shape="(10**12, 28, 28)")}),
        packed({"x_train": npy(shape="(1000000000000, 28, 28)")}),
        packed({"x_train": npy(shape="(3, 28, 28)", descr="()")}),
        packed({"x_train": npy(shape="(3, 28, 28)", descr="[('a', '|O')]")}),
        packed({"x_train": npy(data=b"\0" * 10**6)}, compression=8),
        packed({"x_train": npy()}, compression=14),
    ]
    return read_digits, folder / "mnist.npz", folder / "mnist.npz", seeds


def cifar_binary_target(folder):
    from tests.support import image_files as good

    good.write(folder, good.FILES["binary"])
    name = f"{good.NAME}.bin"
    return read_cifar10, folder, folder / name, [good.FILES["binary"][name][:3073]]


def cifar_python_target(folder):
    import pickle

    from tests.support import image_files as good

    good.write(folder, good.FILES["python"])
    seeds = [
        good.python(good.IMAGES[good.NAME][:1], good.LABELS[good.NAME][:1]),
        *(content for content, _ in good.BAD_PYTHON.values() if len(content) < 10_000),
        *(pickle.dumps({b"data": (1, "x"), b"labels": [1, 2]}, protocol) for protocol in (2, 3, 4)),
    ]
    return read_cifar10, folder, folder / good.NAME, seeds


def cifar_tar_target(folder):
    import tarfile

    from tests.support import image_files as good

    packs = good.pack(folder / "x", good.FILES["binary"]).read_bytes()
    plain = gzip.decompress(packs)
    seeds = [packs, plain, plain[: 4 * 512]]
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE):
        member = tarfile.TarInfo("data_batch_1.bin")
        member.type, member.size = kind, 2**40
        seeds.append(member.tobuf(tarfile.GNU_FORMAT) + plain[512:2048])
    return read_cifar10, folder / "x", folder / "x", seeds


def cifar_jpeg_target(folder):
    import numpy as np

    from tests.support import image_files as good

    arrays = {k: v for k, v in good.jpegs().items() if k != "class_names"}
    seeds = [written(arrays, save) for save in (np.savez, np.savez_compressed)]
    seeds.append(packed({"train_jpeg": npy(shape="(268435456,)", descr="'<i8'")}))
    return read_cifar10, folder / "x.npz", folder / "x.npz", seeds


def checkpoint_target(name):
    """One of the files of a checkpoint that Orbax reads as text."""

    def target(folder):
        import numpy as np

        from l1inf_optax._lanes import Progress, Snapshot
        from l1inf_optax.experiments.command.checkpoints import open_checkpoints

        whole = folder / "whole"
        with open_checkpoints(whole, RUN, asynchronous=False) as (_, keep):
            keep(Snapshot([np.arange(3.0)], [Progress(1, np.ones(2), np.ones(2))]))
        content = (whole / "1" / name).read_bytes()

        def read(path):
            # A checkpoint that was refused is deleted: every file gets a folder of its own.
            with tempfile.TemporaryDirectory(dir=folder) as copy:
                shutil.copytree(whole, copy, dirs_exist_ok=True)
                shutil.copy(path, Path(copy) / "1" / name)
                read_checkpoint(Path(copy))

        return read, folder / "fuzzed", folder / "fuzzed", [content, b"[]", b"[" * 100_000, b"{}"]

    return target


TARGETS = {
    "idx": idx_target,
    "npz": npz_target,
    "cifar_binary": cifar_binary_target,
    "cifar_python": cifar_python_target,
    "cifar_tar": cifar_tar_target,
    "cifar_jpeg": cifar_jpeg_target,
    "checkpoint_about": checkpoint_target("about/metadata"),
    "checkpoint_metadata": checkpoint_target("_CHECKPOINT_METADATA"),
    "checkpoint_arrays": checkpoint_target("arrays/_METADATA"),
}


# --- one reader, in a process of its own ----------------------------------------------------------


def no_programs(event, arguments):
    """An audit hook: what no file may bring about."""
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        print(f"a file has brought about {event} {arguments}", file=sys.stderr, flush=True)
        os.abort()


def fuzz(name, folder, seconds):
    import atheris

    for module in STANDARD:  # those that this process has imported already
        sys.modules.pop(module, None)
    with atheris.instrument_imports(include=["l1inf_optax.experiments", "orbax", *STANDARD]):
        import l1inf_optax.experiments.data.images

        if name.startswith("checkpoint"):
            import l1inf_optax.experiments.command.checkpoints  # noqa: F401
    from numpy.lib import format as npy_format

    for function in ("_read_array_header", "descr_to_dtype", "_filter_header"):
        for module in (npy_format, sys.modules.get("numpy.lib._format_impl")):
            if hasattr(module, function):
                setattr(module, function, atheris.instrument_func(getattr(module, function)))

    (folder / "seeds").mkdir()
    (folder / "place").mkdir()
    read, path, file, seeds = TARGETS[name](folder / "place")
    for i, seed in enumerate(seeds):
        (folder / "seeds" / str(i)).write_bytes(seed)
        file.write_bytes(seed)  # once without a fuzzer: what a library does at its first call
        read(path)
    sys.addaudithook(no_programs)

    def one(content):
        file.write_bytes(content)
        read(path)

    options = {
        "max_total_time": seconds,
        "timeout": SECONDS,
        "rss_limit_mb": MEGABYTES,
        "max_len": 30_000,
        "print_final_stats": 1,
        "artifact_prefix": f"{folder}/found-",
    }
    arguments = [f"-{key}={value}" for key, value in options.items()]
    atheris.Setup([sys.argv[0], str(folder / "seeds"), *arguments], one)
    atheris.Fuzz()


# --- all of them ----------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each (default: %(default)s)")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.names) - set(TARGETS):
        parser.error(f"there is no {', '.join(unknown)}; choose from {', '.join(TARGETS)}")
    if args.folder:
        return fuzz(*args.names, args.folder, args.seconds)

    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("reader", "files", "edges reached", "peak MB", "CPU s", "ended"):
        table.add_column(heading, justify="left" if heading in ("reader", "ended") else "right")
    failed = False
    for name in args.names or TARGETS:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz_{name}_"))
        before = os.times()
        command = [sys.executable, "-m", "tests.programs.fuzz_readers", name, "--in", str(folder)]
        done = subprocess.run(
            [*command, "--seconds", str(args.seconds)], capture_output=True, text=True, check=False
        )
        after = os.times()
        cpu = sum(after[2:4]) - sum(before[2:4])
        output = done.stdout + done.stderr
        (folder / "output").write_text(output)
        if done.returncode == 0:
            shutil.rmtree(folder / "place", ignore_errors=True)

        def last(pattern, output=output):
            return ([*re.findall(pattern, output)] or ["?"])[-1]

        table.add_row(
            name, last(r"number_of_executed_units: *(\d+)"), last(r"cov: (\d+)"),
            last(r"peak_rss_mb: *(\d+)"), f"{cpu:.0f}",
            "well" if done.returncode == 0 else f"see {folder}",
        )  # fmt: skip
        failed |= done.returncode != 0
    Console(width=120).print(table)
    return failed


if __name__ == "__main__":
    sys.exit(main())
