"""One command that runs on many hosts: all compute the same, and the first one speaks for all."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from tempfile import TemporaryDirectory

import jax

from l1inf_optax.experiments.command.options import OptionError


def join(where: str) -> None:
    """Find the other processes; before anything is computed."""
    try:
        if where == "auto":
            jax.distributed.initialize()
        else:
            address, processes, process = where.split(",")
            jax.distributed.initialize(address, int(processes), int(process))
    except ValueError as error:
        raise OptionError(
            f"--distributed {where}: {error}; give auto on a cluster that JAX knows, otherwise "
            "HOST:PORT,N,I such as host0:1234,4,0"
        ) from error


@contextmanager
def first_process_speaks(args: argparse.Namespace) -> Iterator[None]:
    """Keep the other processes, which compute the same, from printing it and writing it too."""
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        yield
        return
    with (
        TemporaryDirectory() as args.out,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
    ):
        yield
