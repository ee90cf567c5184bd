"""How layers are split over pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_swift.models.config import ModelConfig


def head_cost(cfg: ModelConfig) -> float:
    """The output layer's work in units of an average transformer layer, by parameters in a token's matrix products."""
    layers = sum(cfg.active_parameters(i) for i in range(cfg.num_layers))
    return cfg.hidden_size * cfg.vocab_size * cfg.num_layers / layers


def split_layers(
    num_layers: int, num_stages: int, *, last_cost: float = 0.0, first: int | None = None, last: int | None = None
) -> list[range]:
    """Consecutive layers per stage, in order, at least one each, so that the busiest stage has as little to do as possible.

    last_cost : what the last stage has to do besides, in layers (the output layer). The embedding look-up costs nothing.
    first, last : numbers of layers of the first and last stage, where the user decides (decoder_first/last_pipeline_num_layers).
    Raises ValueError when the layers do not suffice.
    """
    fixed = (first or 0) + (last or 0)
    free = num_stages - (first is not None) - (last is not None)
    if num_layers - fixed < free or (free == 0 and num_layers != fixed):
        raise ValueError(
            f"{num_layers} layers cannot be split over {num_stages} stages"
            + (f" with {fixed} of them fixed" if fixed else "")
        )
    middle = _balanced(num_layers - fixed, free, last_cost if last is None else 0.0) if free else []
    counts = [*([first] if first is not None else []), *middle, *([last] if last is not None else [])]
    return _ranges(counts)


def _balanced(num_layers: int, num_stages: int, last_cost: float) -> list[int]:
    """Layers per stage: as even as the last stage's extra cost allows; where some must have one more, the earlier ones have it."""
    last = max(1, min(round((num_layers + last_cost) / num_stages - last_cost), num_layers - num_stages + 1))
    if num_stages == 1:
        return [num_layers]
    share, more = divmod(num_layers - last, num_stages - 1)
    return [share + (i < more) for i in range(num_stages - 1)] + [last]


def _ranges(counts: Sequence[int]) -> list[range]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
