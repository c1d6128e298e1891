"""Kills a training that keeps checkpoints, many times: ``python -m`` this file, and how many."""

import sys
import tempfile
from pathlib import Path

from tests.support.checkpointed import kill_and_compare, run


def main() -> None:
    """Kills it so many times, each soon after it has begun to write, and compares the end."""
    kills = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        kill_and_compare(run(), Path(folder), kills)
    print(f"killed {kills} times: every run ended with the bits of the uninterrupted one")


if __name__ == "__main__":
    main()
