"""Parameters of `swift infer` and `swift export` alone."""

# ruff: noqa: RUF009  (`param` makes a field, as dataclasses.field does)
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_swift.args.spec import Arguments, param

_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?\s*(KB|MB|GB|TB|KiB|MiB|GiB|TiB)", re.IGNORECASE)


def _is_size(text: str) -> str:
    return "" if _SIZE.fullmatch(text) else "a number with a unit, such as 5GB or 500MB"


@dataclass(frozen=True, kw_only=True)
class InferParams(Arguments):
    group: ClassVar[str] = "Infer"

    infer_backend: Literal["pt", "vllm", "lmdeploy"] = param(
        "pt", "Engine: pt = PyTorch.", not_yet="another engine than PyTorch"
    )
    stream: bool = param(False, "Print the answer while it is generated.")
    temperature: float | None = param(
        None, "Sampling temperature; 0 = always the likeliest token. Default: from generation_config.json.", at_least=0
    )
    top_k: int | None = param(
        None, "Sample among this many likeliest tokens; 0 = all. Default: from generation_config.json.", at_least=0
    )
    top_p: float | None = param(
        None,
        "Sample among the likeliest tokens that make up this probability. Default: from generation_config.json.",
        above=0,
        at_most=1,
    )
    repetition_penalty: float | None = param(
        None, "Divide the score of tokens already used; 1 = off. Default: from generation_config.json.", above=0
    )
    max_new_tokens: int | None = param(
        None, "Longest answer in tokens. Default: what the model's length leaves after the prompt.", at_least=1
    )
    num_beams: int = param(1, "Width of beam search; 1 = none.", at_least=1, not_yet="beam search")
    stop_words: list[str] = param([], "Texts that end the answer (and stay in it), besides the end token.")
    max_batch_size: int = param(1, "Prompts generated together when a data set is answered.", at_least=1)
    val_dataset_sample: int | None = param(
        None, "Answer only this many rows of the data set. Default: all.", at_least=1
    )
    result_path: str | None = param(
        None,
        "JSONL file for the answers. Default: `infer_result/<time>.jsonl` in the model's folder or below ./result.",
    )
    metric: Literal["acc", "rouge"] | None = param(
        None, "Compare the answers to a data set with its labels by this measure."
    )
    merge_lora: bool = param(False, "Merge LoRA weights into the model first.", not_yet="LoRA")
    seed: int = param(42, "Seed of the sampling.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ExportParams(Arguments):
    group: ClassVar[str] = "Export"

    to_mcore: bool = param(False, "Convert the Hugging Face model in model to a Megatron checkpoint.")
    to_hf: bool = param(False, "Convert the Megatron checkpoint in mcore_model to a Hugging Face folder.")
    mcore_model: str | None = param(
        None, "Megatron checkpoint to convert: the folder that holds latest_checkpointed_iteration.txt."
    )
    ckpt_format: Literal["torch", "torch_dist", "zarr"] = param(
        "torch_dist",
        "Format that to_mcore writes: torch_dist, or torch = one file mp_rank_00/model_optim_rng.pt. to_hf finds out what it reads: both, and zarr.",
    )
    output_dir: str | None = param(None, "Folder to write. Default: the source's name with -mcore or -hf added.")
    exist_ok: bool = param(False, "Allow output_dir to exist; its files are overwritten.")
    thread_count: int | None = param(
        None, "Writer threads, and files, of a Megatron checkpoint. Default: one per 10 GB, at least 2.", at_least=1
    )
    test_convert_precision: bool = param(
        False,
        "Compare the logits of both models in float32 on a short prompt after the conversion; fail where they differ.",
    )
    safe_serialization: bool = param(True, "Write .safetensors files.", not_yet="writing pickled .bin files")
    max_shard_size: str = param("5GB", "Largest size of one weight file, such as 5GB or 500MB.", check=_is_size)
