"""The command ``python -m l1inf_optax.experiments NAME``.

An experiment is a module in `paper`, `supplement` or `beyond`, with two functions:

- ``add_arguments(parser)`` declares its options;
- ``run(args)`` does the work.

A new one is one more entry of `EXPERIMENTS`.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from l1inf_optax.experiments.command import processes
from l1inf_optax.experiments.command.options import OptionError
from l1inf_optax.experiments.data.files import DataError

PROGRAM = "python -m l1inf_optax.experiments"


class Experiment(NamedTuple):
    """A command.

    Attributes:
        module: where it lives in this package.
        summary: what ``--help`` says of it.
    """

    module: str
    summary: str


EXPERIMENTS = {
    "mnist": Experiment(
        "paper.mnist",
        "handwritten digits with a 784-900-10 network (Section 5.5, Table 3)",
    ),
    "regression": Experiment(
        "paper.regression",
        "high-dimensional regression with a 1000-300-1 network (Section 5.1, Table 1)",
    ),
    "classification": Experiment(
        "paper.classification",
        "high-dimensional, with a 500-100-50-20-2 network (Section 5.2, Table 2)",
    ),
    "sample-size": Experiment(
        "supplement.sample_size",
        "the classification's errors against its number of samples (supplement)",
    ),
    "depth": Experiment(
        "supplement.depth",
        "the classification's errors against its number of hidden layers (supplement)",
    ),
    "step-size": Experiment(
        "supplement.step_size",
        "the classification's errors against the initial step size (supplement)",
    ),
    "cifar10": Experiment(
        "paper.cifar10",
        "images with a VGG-16 whose first windows are 21 x 21 (Section 5.3, Figure 4)",
    ),
    "select-c": Experiment(
        "paper.select_c",
        "cross-validation of c, and of a c for each layer (Section 5.4, Figure 5)",
    ),
    "regularizers": Experiment(
        "paper.regularizers",
        "the ball beside L1, L2 and dropout on three data sets (Section 5.5, Table 3)",
    ),
    "bounds": Experiment(
        "beyond.certificates",
        "generalization errors of trained networks beside the theory (Theorems 2 and 3)",
    ),
    "optimizers": Experiment(
        "beyond.optimizers",
        "optimizers and projections on the simulated data (Sections 5.1 and 5.2)",
    ),
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
            processes.join(args.distributed)
        with processes.first_process_speaks(args):
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
    for name, experiment in EXPERIMENTS.items():
        module = importlib.import_module(f"l1inf_optax.experiments.{experiment.module}")
        command = commands.add_parser(
            name,
            help=experiment.summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _fail(message: str) -> None:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what clusters send before SIGKILL
    sys.exit(main())
