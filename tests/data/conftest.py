from __future__ import annotations

import pytest
from tiny_tokenizer import write_tokenizer

from megatron_swift.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tok")))
