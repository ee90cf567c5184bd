"""Tiny models, random rows and engines on them, for the tests of models, parallel and train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
from megatron_swift.checkpoint.layout import hugging_face_tensors, tensor_specs
from megatron_swift.checkpoint.load import load_decoder
from megatron_swift.data.loader import collate
from megatron_swift.data.types import IGNORE, Batch, Sample
from megatron_swift.kernels.attention import Segments
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.decoder import Decoder, Row
from megatron_swift.models.families import describe
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.engine import Engine, EngineOptions
from megatron_swift.parallel.mesh import Mesh
from megatron_swift.train.state import load_weights

torch.set_num_threads(1)

CPU = torch.device("cpu")
# A prime vocabulary, and a head size of 6: over 4 ranks the last one holds no row of a q/k norm.
SMALL = {"vocab_size": 263, "hidden_size": 32, "intermediate_size": 44, "head_dim": 6}


def read_config(folder: Path) -> ModelConfig:
    return describe(folder, model_type=None, template="chatml", chat_template=None).config


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The folder's decoder, trainable."""
    cfg = read_config(folder)
    return load_decoder(HuggingFaceWeights(folder, cfg), cfg, dtype=dtype, device=CPU).requires_grad_(True)


def make_engine(folder: Path, dtype: torch.dtype, mesh: Mesh | None = None, **options) -> Engine:
    """An engine with the folder's weights, in one process unless a mesh is given."""
    cfg = read_config(folder)
    mesh = mesh or mesh_module.start(backend="gloo", timeout_minutes=1)
    engine = build_engine(cfg, mesh, EngineOptions(compute_dtype=dtype, **options))
    load_weights(engine.shards, tensor_specs(cfg), HuggingFaceWeights(folder, cfg))
    return engine


def under_hugging_face_names(tensors: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Our parameters, or their gradients, cut into the tensors of a Hugging Face model; it keeps a layer's experts stacked."""
    layout = hugging_face_tensors(tensor_specs(cfg, stacked_experts=True).values())
    return {
        name: torch.cat([tensors[p.name][p.start : p.start + p.rows] for p in tensor.parts]).view(tensor.shape)
        for name, tensor in layout.items()
    }


def random_samples(
    rng: np.random.Generator, lengths: Sequence[int], *, trained: float, vocab_size: int = 263
) -> list[Sample]:
    """Samples of these lengths; each token is trained with probability `trained`."""
    samples = []
    for length in lengths:
        ids = rng.integers(0, vocab_size, length).astype(np.int32)
        samples.append(Sample(ids, np.where(rng.random(length) < trained, ids, IGNORE).astype(np.int32)))
    return samples


def as_batch(samples: Sequence[Sample], *, pad_to_multiple: int = 8, rows: tuple[int, ...] = ()) -> Batch:
    return collate(samples, pad_to_multiple=pad_to_multiple, pad_id=0, rows=rows)


def as_row(batch: Batch) -> Row:
    """What the model gets, made without the engine."""
    tokens, labels, positions = (torch.from_numpy(array) for array in batch[:3])
    index = (labels != IGNORE).nonzero()[:, 0]
    return Row(tokens, positions, Segments.of(batch.lengths, CPU), index, labels[index])
