"""Tiny models as decoders."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
from megatron_swift.checkpoint.load import load_decoder
from megatron_swift.infer.sampling import Sampling
from megatron_swift.models.decoder import Decoder
from megatron_swift.models.families import describe

GREEDY = Sampling()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = describe(folder, model_type=None, template="chatml", chat_template=None).config
    return load_decoder(HuggingFaceWeights(folder, config), config, dtype=dtype, device=torch.device("cpu"))
