"""The real console scripts in processes of their own, for the tests of the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

BIN = Path(sys.executable).parent


class Said(NamedTuple):
    """A finished command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def blocks(self) -> list[str]:
        """The error blocks on stderr."""
        return re.findall(r"^error: .*(?:\n  (?:why|do ) : .*)*", self.err, re.MULTILINE)


def environment(**changes: str) -> dict[str, str]:
    """The test's own, without a trace of a launcher's."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("NPROC_PER_NODE", "NNODES", "RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def command(*argv: object) -> list[str]:
    """`megatron sft ...` as an argv with the script's path."""
    program, *rest = (str(arg) for arg in argv)
    return [str(BIN / program), *rest]


def call(*argv: object, cwd: Path, stdin: str = "", **env: str) -> Said:
    """Run to the end."""
    done = subprocess.run(
        command(*argv),
        cwd=cwd,
        env=environment(**env),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Said(done.returncode, done.stdout, done.stderr)
