"""Processes that tests start: none is waited for longer than a minute, none outlives its test."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds


@contextmanager
def started(command: Sequence[Any], **options: Any) -> Iterator[Popen]:
    """A process, which is killed at the end, or after a minute, with all that it has started.

    So whatever waits for it inside ends too.

    Raises:
        TimeoutError: it had to be killed after a minute.
    """
    options = {"cwd": ROOT, **options}
    overdue = threading.Event()
    with Popen([*map(str, command)], start_new_session=True, **options) as process:

        def kill():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def give_up():
            overdue.set()
            kill()

        timer = threading.Timer(PATIENCE, give_up)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            timer.join()
            kill()
            if overdue.is_set():
                raise TimeoutError(f"{process.args} has taken longer than {PATIENCE} s")


def run(command: Sequence[Any], **options: Any) -> CompletedProcess:
    """A process to its end, whichever that is, and what it has printed."""
    pipes = {"stdout": PIPE, "stderr": PIPE, "text": True}
    with started(command, **pipes, **options) as process:
        output, errors = process.communicate()
    return CompletedProcess(command, process.returncode, output, errors)
