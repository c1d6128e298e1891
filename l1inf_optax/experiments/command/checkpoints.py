"""Checkpoints of a training, by Orbax: written while it goes on, and never trusted unread.

Orbax makes a checkpoint appear whole or not at all, whenever the process is killed. What may happen
to its files afterwards it does not notice: so every checkpoint holds a hash of what it should hold,
and one that does not is thrown away, with a warning, for the one before it.
"""

import hashlib
import json
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from l1inf_optax._lanes import Progress, Snapshot
from l1inf_optax.experiments.command.options import OptionError

KEPT = 3  # so many checkpoints, so that one that is damaged has one before it


class DamagedError(Exception):
    """A checkpoint does not hold what was written to it."""


@contextmanager
def open_checkpoints(
    folder: Path, run: Mapping[str, Any], *, asynchronous: bool = True
) -> Iterator[tuple[Snapshot | None, Callable[[Snapshot], None]]]:
    """The checkpoints of one run: where to go on, and what to call with each new state.

    Args:
        folder: where they are kept, the last `KEPT` of them.
        run: everything that decides what the training computes, as JSON has it.
        asynchronous: whether training goes on while a checkpoint is written. The state is copied
            before that, and the last one is on the disk when the context ends.

    Yields:
        The last state that can be read, None if there is none yet, and the function that keeps one.
        An interrupt never comes while Orbax reads or writes. A `KeyboardInterrupt` that ends the
        context says from which step the run goes on.

    Raises:
        OptionError: the folder holds checkpoints of another run, or none of them can be read.
    """
    settings = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        enable_async_checkpointing=asynchronous,
        cleanup_tmp_directories=True,
    )
    run = json.loads(json.dumps(run))
    try:
        opened = ocp.CheckpointManager(folder.resolve(), options=settings)
    except Exception as error:  # it reads what every checkpoint says of itself, and believes it
        raise OptionError(
            f"--checkpoint {folder} cannot be opened ({_reason(error)}); "
            "empty it, or name another folder"
        ) from error
    with opened as manager:

        def keep(snapshot: Snapshot) -> None:
            about = {"run": run, "hash": _hash(run, snapshot)}
            items = ocp.args.Composite(
                about=ocp.args.JsonSave(about), arrays=ocp.args.StandardSave(_packed(snapshot))
            )
            with _uninterrupted():
                manager.save(snapshot.history[-1].step, args=items)

        with _uninterrupted():
            last = _last_whole(manager, folder, run)
        try:
            try:
                yield last, keep
            finally:
                with _uninterrupted():
                    manager.wait_until_finished()
        except KeyboardInterrupt:
            step = manager.latest_step() or 0
            raise KeyboardInterrupt(f"the same command goes on from step {step}") from None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Raises a `KeyboardInterrupt` only after what is inside.

    In the middle of Orbax it would close the event loop under threads that still report to it.
    """
    if threading.current_thread() is not threading.main_thread():  # signals go to that one
        yield
        return
    interrupts = signal.SIGINT, signal.SIGTERM
    raising = [s for s in interrupts if signal.getsignal(s) is signal.default_int_handler]
    came: list[int] = []
    for number in raising:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number in raising:
            signal.signal(number, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def fingerprint(arrays: Sequence[Any]) -> str:
    """A hash of arrays: their bits, shapes and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _hash(run: Any, snapshot: Snapshot) -> str:
    return fingerprint([np.array(json.dumps(run, sort_keys=True)), *_packed(snapshot).values()])


def _packed(snapshot: Snapshot) -> dict[str, np.ndarray]:
    """A snapshot as named arrays."""
    state = {f"state_{i:04}": leaf for i, leaf in enumerate(snapshot.state)}
    columns = zip(*snapshot.history, strict=True)
    return {**dict(zip(Progress._fields, map(np.array, columns), strict=True)), **state}


def _unpacked(arrays: Mapping[str, Any]) -> Snapshot:
    named = {name: np.asarray(array) for name, array in arrays.items()}
    columns = [named.pop(field) for field in Progress._fields]
    history = [Progress(int(step), *rest) for step, *rest in zip(*columns, strict=True)]
    return Snapshot([named[name] for name in sorted(named)], history)


def _last_whole(manager: ocp.CheckpointManager, folder: Path, run: Any) -> Snapshot | None:
    """The last checkpoint that holds what was written to it; later ones are deleted."""
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            saved_run, snapshot = _read(manager, step)
        except Exception as error:  # whatever Orbax makes of bytes that are not its own
            warnings.warn(
                f"{folder}: the checkpoint of step {step} is damaged and will not be used "
                f"({_reason(error)})",
                stacklevel=2,
            )
            manager.delete(step)
            continue
        if saved_run != run:
            changed = [k for k in {**saved_run, **run} if saved_run.get(k) != run.get(k)]
            raise OptionError(
                f"--checkpoint {folder} is of a run with another {', '.join(changed)}; "
                "name another folder, or give the options of that run"
            )
        return snapshot
    if steps:
        raise OptionError(f"--checkpoint {folder} holds no checkpoint that can be read: empty it")
    return None


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first:.200}"


def _read(manager: ocp.CheckpointManager, step: int) -> tuple[Any, Snapshot]:
    items = ocp.args.Composite(about=ocp.args.JsonRestore(), arrays=ocp.args.StandardRestore())
    found = manager.restore(step, args=items)
    snapshot = _unpacked(found["arrays"])
    if found["about"]["hash"] != _hash(found["about"]["run"], snapshot):
        raise DamagedError("its contents are not those that were saved")
    if not isinstance(found["about"]["run"], dict):
        raise DamagedError("it does not say of which run it is")
    if snapshot.history[-1].step != step:
        raise DamagedError(f"it was saved at step {snapshot.history[-1].step}")
    return found["about"]["run"], snapshot
