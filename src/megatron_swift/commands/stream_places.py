"""Where the lanes of streamed rows stand, to and from a checkpoint: one file for each data-parallel rank, put together when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_swift.data.streaming import Place
from megatron_swift.utils.errors import CheckpointError


def places_file(dp_rank: int, places: Mapping[int, Place]) -> tuple[str, bytes]:
    """Name and content of a data-parallel rank's file."""
    value = {str(lane): place.as_json() for lane, place in sorted(places.items())}
    return f"stream_{dp_rank:05d}.json", json.dumps(value).encode()


def load_places(folder: Path, *, lanes: int) -> dict[int, Place]:
    """The places of all lanes, whatever number of ranks wrote them. CheckpointError where one is missing."""
    found: dict[int, Place] = {}
    for path in sorted(folder.glob("stream_*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            found |= {int(lane): Place.from_json(place) for lane, place in value.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}", do="use another checkpoint") from None
    missing = sorted(set(range(lanes)) - set(found))
    if missing:
        raise CheckpointError(
            f"{folder} does not say where the stream goes on",
            why=f"{len(missing)} of {lanes} lanes are missing, such as lane {missing[0]}",
            do="give --finetune true to start a new training from its weights",
        )
    return found
