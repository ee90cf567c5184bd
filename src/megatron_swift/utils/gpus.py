"""What can be known of GPUs without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def visible_gpus(env: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible, counted without torch; 0 where none can be seen."""
    present = sum(path.name[6:].isdecimal() for path in devices.glob("nvidia*"))
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    return present if chosen is None else min(present, len([part for part in chosen.split(",") if part.strip()]))
