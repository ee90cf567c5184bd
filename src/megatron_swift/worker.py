"""One rank, started by torchrun: `python -m megatron_swift.worker SETUP`, SETUP being the launcher's private file."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from megatron_swift.args.run_params import logging_level_number
from megatron_swift.launch import guarded
from megatron_swift.utils.log import set_up_logging


def main(path: str) -> int:
    """Train as the setup says; the exit code of `launch.guarded`."""
    setup, started = pickle.loads(Path(path).read_bytes())
    set_up_logging(logging_level_number(setup.args.logging_level))

    def train() -> None:
        from megatron_swift.commands.train import run

        run(setup, started=started)

    return guarded(train)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
