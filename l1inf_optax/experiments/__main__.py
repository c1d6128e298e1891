"""The command ``python -m l1inf_optax.experiments NAME``.

An experiment is a module of this package, named like its command (``select-c`` lives in
``select_c.py``), with two functions:

- ``add_arguments(parser)`` declares its options;
- ``run(args)`` does the work.

A new one is one more line in `EXPERIMENTS`.

With ``--distributed`` the same command runs once on each of many hosts. All compute, and the first
one speaks for all.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from tempfile import TemporaryDirectory

import jax

from l1inf_optax.experiments.data import DataError
from l1inf_optax.experiments.options import OptionError

PROGRAM = "python -m l1inf_optax.experiments"

EXPERIMENTS = {
    "mnist": "handwritten digits with a 784-900-10 network (Section 5.5, Table 3)",
    "regression": "high-dimensional regression with a 1000-300-1 network (Section 5.1, Table 1)",
    "classification": "high-dimensional, with a 500-100-50-20-2 network (Section 5.2, Table 2)",
    "sample-size": "the classification's errors against its number of samples (supplement)",
    "depth": "the classification's errors against its number of hidden layers (supplement)",
    "step-size": "the classification's errors against the initial step size (supplement)",
    "cifar10": "images with a VGG-16 whose first windows are 21 x 21 (Section 5.3, Figure 4)",
    "select-c": "cross-validation of c, and of a c for each layer (Section 5.4, Figure 5)",
    "regularizers": "the ball beside L1, L2 and dropout on three data sets (Section 5.5, Table 3)",
    "bounds": "generalization errors of trained networks beside the theory (Theorems 2 and 3)",
    "optimizers": "optimizers and projections on the simulated data (Sections 5.1 and 5.2)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment.

    Args:
        argv: the arguments, without the program's name; those of the process by default.

    Returns:
        0 on success. Wrong options, bad data and missing packages end in one line on standard
        error and ``SystemExit(2)``, as `argparse` has it; an interrupt ends in one line and 130.
    """
    try:
        args = make_parser().parse_args(argv)
        if args.distributed:
            _join(args.distributed)
        with _first_process_speaks(args):
            args.run(args)
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == "l1inf_optax":
            raise
        _fail(f"needs the package '{error.name}': pip install \"l1inf-optax[experiments]\"")
    except (DataError, OptionError) as error:
        _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand for each experiment."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Tables and figures of 'Sparse deep neural networks using L1,inf-weight "
        "normalization', one command each.",
        epilog=f"'{PROGRAM} NAME --help' lists the options of an experiment.",
    )
    parser.add_argument(
        "--distributed",
        metavar="auto|HOST:PORT,N,I",
        help="be one of many processes that share the networks out among their devices: run the "
        "same command as each; auto where JAX knows the cluster (Slurm, Open MPI, Cloud TPU, "
        "Kubernetes), otherwise process I of N, of which process 0 listens at HOST:PORT",
    )
    commands = parser.add_subparsers(metavar="NAME", required=True)
    for name, summary in EXPERIMENTS.items():
        module = importlib.import_module(f"l1inf_optax.experiments.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _join(where: str) -> None:
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
def _first_process_speaks(args: argparse.Namespace) -> Iterator[None]:
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


def _fail(message: str) -> None:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what clusters send before SIGKILL
    sys.exit(main())
