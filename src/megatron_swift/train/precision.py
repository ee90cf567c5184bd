"""The dynamic loss scale of fp16; 1 and unmoved for every other precision."""

from __future__ import annotations

from dataclasses import dataclass

INITIAL_SCALE = 2.0**32
GROWTH_INTERVAL = 1000  # clean steps before the scale doubles
HYSTERESIS = 2  # overflows before it halves
MIN_SCALE = 1.0


@dataclass
class LossScale:
    """Megatron's dynamic grad scaler (spec section 2.9). `dynamic` is false except for fp16."""

    dynamic: bool
    scale: float
    clean_steps: int = 0
    overflows_left: int = HYSTERESIS

    @staticmethod
    def for_dtype(dtype: str) -> LossScale:
        """Dynamic from 2^32 for "float16", constant 1 otherwise."""
        return LossScale(True, INITIAL_SCALE) if dtype == "float16" else LossScale(False, 1.0)

    def update(self, *, overflow: bool) -> None:
        """Account for one step."""
        if not self.dynamic:
            return
        if overflow:
            self.clean_steps = 0
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.scale = max(self.scale * 0.5, MIN_SCALE)
            return
        self.clean_steps += 1
        if self.clean_steps == GROWTH_INTERVAL:
            self.clean_steps, self.overflows_left = 0, HYSTERESIS
            self.scale *= 2.0

    def as_json(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"scale": self.scale, "clean_steps": self.clean_steps, "overflows_left": self.overflows_left}

    def restore(self, saved: dict[str, float]) -> None:
        """From the checkpoint; a run of another precision keeps its own, and so does one that goes on from a checkpoint of Megatron's,
        or from one of a run without a loss scale: that one's constant 1 says nothing of fp16.
        """
        # A scale that has fallen to 1 has no overflow left: only doubling, past 1, gives new ones.
        constant = bool(saved) and (saved["scale"], saved["overflows_left"]) == (1.0, HYSTERESIS)
        if self.dynamic and saved and not constant:
            self.scale = float(saved["scale"])
            self.clean_steps, self.overflows_left = int(saved["clean_steps"]), int(saved["overflows_left"])
