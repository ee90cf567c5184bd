"""A tiny model, loaded once, and engines on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from load_decoders import GREEDY, load

from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.infer.engine import Engine, EngineOptions
from megatron_swift.infer.sampling import Sampling
from megatron_swift.models.decoder import Decoder
from megatron_swift.testing import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=2)


@pytest.fixture(scope="session")
def model(tiny) -> Decoder:
    return load(tiny)


@pytest.fixture(scope="session")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.load(tiny)


@pytest.fixture
def make_engine(model, tokenizer):
    """An engine on the tiny model, by the options that matter."""

    def make(template: str = "chatml", *, sampling: Sampling = GREEDY, **options) -> Engine:
        return Engine(model, tokenizer, get_template(template), EngineOptions(sampling=sampling, **options))

    return make
