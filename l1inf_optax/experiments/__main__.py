"""The command ``python -m l1inf_optax.experiments NAME``.

An experiment is a module of this package, named like its command (``select-c`` lives in
``select_c.py``), with two functions:

- ``add_arguments(parser)`` declares its options;
- ``run(args)`` does the work.

A new one is one more line in `EXPERIMENTS`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

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
        error and ``SystemExit(2)``, as `argparse` has it.
    """
    try:
        args = make_parser().parse_args(argv)
        args.run(args)
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == "l1inf_optax":
            raise
        _fail(f"needs the package '{error.name}': pip install \"l1inf-optax[experiments]\"")
    except (DataError, OptionError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
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


def _fail(message: str) -> None:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
