"""Parameters of data sets and of how conversations become tokens."""

# ruff: noqa: RUF009  (`param` makes a field, as dataclasses.field does)
from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_swift.args.spec import Arguments, param

LossScale = Literal[
    "default", "last_round", "all", "ignore_empty_think", "react", "agentflan", "alpha_umi", "qwen", "hermes"
]
Truncation = Literal["delete", "left", "right", "raise", "split"]
UNDOCUMENTED = ("agentflan", "alpha_umi")


def _known_weights(name: str) -> str:
    return f"another one: which weights ms-swift gives {name} is documented nowhere" if name in UNDOCUMENTED else ""


AGENT_TEMPLATES = ("hermes", "react_en", "react", "llama3")


def _is_agent(name: str) -> str:
    return "" if name in AGENT_TEMPLATES else f"one of {', '.join(AGENT_TEMPLATES)}"


def _is_date(text: str) -> str:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return "a date such as 2025-04-30"
    return ""


@dataclass(frozen=True, kw_only=True)
class DataParams(Arguments):
    group: ClassVar[str] = "Data"

    dataset: list[str] = param(
        [],
        "Training data: files (jsonl, json, csv, txt, parquet), folders or hub names, "
        "`[hf::|ms::]NAME[:SUBSET/SUBSET][#ROWS]`; several are joined.",
    )
    val_dataset: list[str] = param(
        [], "Validation data, written like dataset. When given, nothing is split off from dataset."
    )
    split_dataset_ratio: float = param(
        0.01, "Share of each data set's rows taken for validation (at least one row); 0 = none.", at_least=0, below=1
    )
    data_seed: int | None = param(None, "Seed of sampling, splitting and shuffling rows. Default: seed.", at_least=0)
    dataset_num_proc: int = param(1, "Processes that prepare and tokenise the rows.", at_least=1)
    dataset_shuffle: bool = param(True, "Shuffle the training rows before training.")
    val_dataset_shuffle: bool = param(False, "Shuffle the validation rows.")
    streaming: bool = param(
        False,
        "Read, encode and pack the rows while training instead of before it, for data too large to prepare. Needs train_iters; "
        "nothing is split off.",
    )
    interleave_prob: list[float] | None = param(
        None,
        "Probability of each data set when training rows are drawn from them in turn instead of joined; sum 1.",
        above=0,
        at_most=1,
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = param(
        "first_exhausted",
        "With interleave_prob: stop when the first data set has given its last row, or when the last one has (those that "
        "ran out begin again).",
    )
    shuffle_buffer_size: int = param(
        1000,
        "With streaming: rows held to shuffle and to pack, for each row of the global batch.",
        at_least=1,
    )
    load_from_cache_file: bool = param(
        True,
        "Reuse rows that an earlier run with the same data, tokenizer and settings has encoded (ms-swift: false). "
        "false = encode anew.",
        aliases=("enable_cache",),
    )
    download_mode: Literal["reuse_dataset_if_exists", "reuse_cache_if_exists", "force_redownload"] = param(
        "reuse_dataset_if_exists",
        "Hub data sets already on disk: reuse_dataset_if_exists = fetch only what has changed, reuse_cache_if_exists = "
        "likewise, but encode the rows anew, force_redownload = fetch everything again.",
    )
    columns: dict[str, Any] | None = param(
        None, 'Names of columns to read as other names, as JSON: {"question": "query"}.'
    )
    strict: bool = param(
        True,
        "A row that cannot be used is an error naming file and line (ms-swift drops it). false = drop it and count it.",
    )
    remove_unused_columns: bool = param(
        True, "Drop columns that training does not use.", no_effect="they are never kept"
    )
    model_name: list[str] = param(
        [], "Name that swift/self-cognition teaches the model: one, or one in Chinese and one in English.", max_items=2
    )
    model_author: list[str] = param(
        [],
        "Author that swift/self-cognition teaches the model: one, or one in Chinese and one in English.",
        max_items=2,
    )
    custom_dataset_info: list[str] = param([], "JSON files that describe further data sets by name.")


@dataclass(frozen=True, kw_only=True)
class TemplateParams(Arguments):
    group: ClassVar[str] = "Template"

    template: str | None = param(None, "Name of the chat template. Default: the model's own.")
    system: str | None = param(
        None, "System prompt of rows without one: a text (\\n = new line) or a .txt file. Default: the template's."
    )
    max_length: int | None = param(
        None, "Longest sample, and size of a pack, in tokens. Default: what the model allows.", at_least=1
    )
    truncation_strategy: Truncation | None = param(
        None,
        "What happens to longer samples: dropped, cut on the left, cut on the right, an error, or split into several. "
        "Default: delete.",
    )
    loss_scale: LossScale = param(
        "default",
        "Which tokens are trained: default = all answers, last_round = the last answer, all = every token, "
        "ignore_empty_think = answers without an empty thinking part; react, qwen and hermes weigh tool calls twice.",
        check=_known_weights,
    )
    use_chat_template: bool = param(
        True, "Wrap conversations in the chat template. false = plain text, as in pre-training."
    )
    padding_side: Literal["left", "right"] = param(
        "right", "Side of padding in batches.", no_effect="rows are joined without padding"
    )
    response_prefix: str | None = param(
        None, "Text put before each answer, such as `<think>\\n`. Default: the template's."
    )
    agent_template: str | None = param(
        None,
        "Form of tool descriptions, calls and responses: hermes, react_en or llama3. Default: the template's.",
        check=_is_agent,
    )
    template_backend: Literal["swift", "jinja"] = param(
        "swift", "swift = this product's templates, jinja = the model's own template, run in a sandbox."
    )
    enable_thinking: bool | None = param(
        None,
        "For models that think on demand (qwen3). false = prompts open the answer with an empty thinking part; "
        "true = answers to train on get none. Default: prompts have none, answers without a thinking part get one.",
    )
    template_date: str | None = param(
        None,
        "Day that llama3_2 writes into the system prompt, as YYYY-MM-DD. Default: the day of the run.",
        check=_is_date,
    )


@dataclass(frozen=True, kw_only=True)
class DataShowParams(Arguments):
    group: ClassVar[str] = "Show"

    num_samples: int = param(3, "Samples to print, from the first on.", at_least=0)
    json: bool = param(False, "Print one JSON object a sample, with ids and labels, and the report to stderr.")
    histogram_png: str | None = param(None, "PNG file for the histogram of lengths; needs matplotlib.")
    seed: int = param(42, "Seed of sampling, splitting and shuffling rows where data_seed is not given.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class IndexedParams(Arguments):
    group: ClassVar[str] = "Megatron's indexed data"

    data_path: list[str] = param(
        [],
        "Instead of dataset: PREFIX of PREFIX.bin and PREFIX.idx, or weights and prefixes in turn (0.3 A 0.7 B). Rows of max_length "
        "tokens are cut through the documents; split_dataset_ratio takes the last documents for validation.",
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessParams(Arguments):
    group: ClassVar[str] = "Preprocess"

    prepare_for: Literal["sft", "pt"] = param(
        "sft",
        "The command whose defaults hold, so that `megatron sft` or `megatron pt` with the same flags finds the rows.",
    )
    output_prefix: str | None = param(
        None,
        "Write Megatron's indexed data set PREFIX.bin and PREFIX.idx: each row a document, in the files' order, of any length.",
    )
