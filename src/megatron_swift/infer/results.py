"""The result file: one JSON object per answer, safe on disk's side of the process as soon as the answer is complete."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megatron_swift.data.types import Message
from megatron_swift.utils.files import storage_errors


def default_path(model: str, folder: Path, *, now: datetime.datetime) -> Path:
    """`infer_result/<time>.jsonl` in the model's folder when a run of this product made it, else below ./result/<model>."""
    base = folder if (folder / "args.json").is_file() else Path("result") / (Path(model.rstrip("/")).name or "model")
    return base.absolute() / "infer_result" / f"{now:%Y%m%d-%H%M%S}.jsonl"


class ResultFile:
    """Appends to a JSON Lines file. The folder is made at once, the file with the first answer; what it holds already stays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one object as one line, and hand it to the operating system."""
        with storage_errors(self.path):
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8", errors="surrogatepass")  # noqa: SIM115
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()


def as_json(messages: Sequence[Message], response: str) -> list[dict[str, str]]:
    """The conversation with its new reply, as a data set would hold it."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return [*turns, {"role": "assistant", "content": response}]
