"""The folder a run writes into, and what stands in it before the first step."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.dump import to_json
from megatron_swift.checkpoint.companions import CONFIG, FOLDER, copy_companions
from megatron_swift.commands.run_data import RunData
from megatron_swift.utils.files import storage_errors, write_json


def make_run_dir(save: str, *, add_version: bool) -> Path:
    """`<save>/v<N>-<YYYYMMDD-HHMMSS>` with the next free N, or `save` itself. It is made, so that a disk that cannot be written fails now."""
    parent = Path(save).expanduser().absolute()
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        if not add_version:
            probe = parent / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
            return parent
        while True:
            taken = [int(m[1]) for p in parent.iterdir() if (m := re.match(r"^v(\d+)", p.name))]
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            run_dir = parent / f"v{max(taken, default=-1) + 1}-{stamp}"
            try:
                run_dir.mkdir()
            except FileExistsError:  # another run took this number in this very second
                continue
            return run_dir


def write_run_files(
    run_dir: Path,
    args: TrainArguments,
    data: RunData,
    *,
    model_dir: Path,
    config: dict[str, Any] | None,
    settled: dict[str, object],
) -> None:
    """args.json with the settled values, the data report, the validation rows that were split off, and the model's companions.

    config : the run's config.json where it is not model_dir's: the model is then known by the run's own folder.
    """
    known = args.model if model_dir.name == FOLDER else str(model_dir.absolute())
    known = known if config is None else str(run_dir / FOLDER)
    resolved = dataclasses.replace(args, model=known, save=str(run_dir))
    write_json(run_dir / "args.json", to_json(resolved) | settled)
    write_json(run_dir / "data_report.json", data.report)
    if data.val_rows:
        with storage_errors(run_dir), open(run_dir / "val_dataset.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in data.val_rows)
    carried = run_dir / FOLDER
    if not (carried.exists() and carried.samefile(model_dir)):  # resuming in place, when the model itself is gone
        copy_companions(model_dir, carried, config=True)
    if config is not None:
        write_json(carried / CONFIG, config)
