"""Rules of FP8: each names the flag and the sizes, says why, and what to do."""

from __future__ import annotations

import logging

import pytest

from megatron_swift.args.commands import SftArguments, parse
from megatron_swift.args.fp8_rules import check_fp8
from megatron_swift.commands.setup import linear_sizes
from megatron_swift.models.config import ModelConfig, MoEConfig
from megatron_swift.utils.errors import UsageError
from shapes import shape

BASE = "--model m --dataset d --train_iters 1 "
HYBRID, E4M3 = "--fp8_format hybrid ", "--fp8_format e4m3 "
BLOCKS = E4M3 + "--fp8_recipe blockwise "
MODEL = shape(
    num_layers=2, hidden_size=128, ffn_hidden_size=384, num_attention_heads=8, kv_channels=32, dtype="bfloat16"
)


def check(flags: str, *, dtype: str = "bfloat16", model: ModelConfig = MODEL) -> None:
    args = parse(SftArguments, (BASE + flags).split())
    check_fp8(args, sizes=linear_sizes(model, args.tensor_model_parallel_size), dtype=dtype)


def test_sizes_of_a_rank():
    moe = MoEConfig(
        num_experts=4, topk=2, ffn_hidden_size=24, shared_size=80, pre_softmax=True, sparse_layers=(True,) * 2
    )
    assert linear_sizes(MODEL, 1) == {
        "hidden_size": 128,
        "heads x kv_channels": 256,
        "rows of linear_qkv": 384,
        "ffn_hidden_size": 384,
    }
    sizes = linear_sizes(MODEL.replace(moe=moe), 4)  # two groups on four ranks: one each
    assert sizes == {
        "hidden_size": 128,
        "heads x kv_channels": 64,
        "rows of linear_qkv": 128,
        "moe_shared_expert_intermediate_size": 20,
    }
    mixed = MODEL.replace(moe=MoEConfig(**{**vars(moe), "shared_size": 0, "sparse_layers": (True, False)}))
    assert "ffn_hidden_size" in linear_sizes(mixed, 1) and len(linear_sizes(mixed, 1)) == 4


@pytest.mark.parametrize(
    "flags",
    [
        "",
        HYBRID,
        E4M3 + "--fp8_recipe rowwise",
        BLOCKS,
        HYBRID + "--tensor_model_parallel_size 4",
        BLOCKS + "--recompute_granularity full --recompute_method uniform --recompute_num_layers 1",
    ],
)
def test_what_fits(flags):
    check(flags)


@pytest.mark.parametrize(
    ("flags", "dtype", "what", "why", "do"),
    [
        (HYBRID + "--fp8_recipe blockwise", "bfloat16", "needs --fp8_format e4m3, not hybrid", "e4m3 alone", "e4m3"),
        (HYBRID, "float16", "needs a run in bfloat16, not float16", "as in Megatron", "add --torch_dtype bfloat16"),
        (E4M3, "float32", "--fp8_format e4m3 needs a run in bfloat16, not float32", "", "add --torch_dtype bfloat16"),
        (
            HYBRID + "--tp_comm_overlap true --tensor_model_parallel_size 2",
            "bfloat16",
            "--fp8_format hybrid excludes --tp_comm_overlap true",
            "16 bits",
            "leave one of the two out",
        ),
        (
            BLOCKS + "--tensor_model_parallel_size 2",
            "bfloat16",
            "multiples of 128, and rows of linear_qkv 192 and ffn_hidden_size 192 are not (on each of 2 ranks)",
            "tensor cores",
            "use --fp8_recipe tensorwise or a smaller --tensor_model_parallel_size, or leave --fp8_format out",
        ),
    ],
)
def test_what_does_not_fit(flags, dtype, what, why, do):
    with pytest.raises(UsageError) as refused:
        check(flags, dtype=dtype)
    for text, found in zip((what, why, do), refused.value.args, strict=True):
        assert text in found


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_sizes_that_no_recipe_takes(recipe):
    with pytest.raises(UsageError) as refused:
        check(f"{E4M3} --fp8_recipe {recipe}", model=MODEL.replace(ffn_hidden_size=100))
    assert "and ffn_hidden_size 100 is not" in refused.value.args[0] and "ranks" not in refused.value.args[0]
    assert refused.value.args[2] == "leave --fp8_format out"


def test_a_recipe_alone_does_nothing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)
    check("--fp8_recipe rowwise", dtype="float32")
    assert "--fp8_recipe rowwise: no effect without --fp8_format" in caplog.text
