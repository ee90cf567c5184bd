"""Rules between parallel sizes and the model's: each names flag, value and reason, and lists what is legal."""

from __future__ import annotations

import pytest

from megatron_swift.args.commands import SftArguments, parse
from megatron_swift.args.rules import Shape, check_layout, check_train, virtual_stages
from megatron_swift.utils.errors import UsageError

MODEL = Shape(num_layers=6, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96)
SMOLLM = Shape(num_layers=30, num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536)
BASE = "--model m --dataset d --train_iters 1 "


def check(flags: str, model: Shape = MODEL, micro: int = 4) -> None:
    check_layout(parse(SftArguments, (BASE + flags).split()), model, num_micro_batches=micro)


@pytest.mark.parametrize(
    ("flags", "what", "do"),
    [
        ("--tensor_model_parallel_size 3", "--tensor_model_parallel_size 3 does not divide", "use one of 1, 2, 4"),
        ("--tensor_model_parallel_size 8", "--tensor_model_parallel_size 8 does not divide", "use one of 1, 2, 4"),
        ("--pipeline_model_parallel_size 7", "6 layers cannot be split over 7", "at most 6"),
        (
            "--cp_comm_type a2a --context_parallel_size 3",
            "--context_parallel_size 3 needs 3 to divide",
            "all_gather or p2p",
        ),
        ("--virtual_pipeline_model_parallel_size 2", "needs a --pipeline_model_parallel_size", "leave"),
        (
            "--pipeline_model_parallel_size 2 --num_layers_per_virtual_pipeline_stage 2",
            "--num_layers_per_virtual_pipeline_stage 2: 6 layers on 2 ranks",
            "use one of 1, 3",
        ),
        (
            "--pipeline_model_parallel_size 2 --num_layers_per_virtual_pipeline_stage 1 --virtual_pipeline_model_parallel_size 3",
            "say the same thing",
            "give one",
        ),
        ("--decoder_first_pipeline_num_layers 2", "at least 2", "leave it out"),
        ("--pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 6", "leaves 0 of 6 layers", "balanced"),
        (
            "--pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 2 --decoder_last_pipeline_num_layers 3",
            "leaves 1 of 6 layers for 0 other",
            "change it",
        ),
    ],
)
def test_what_cannot_be(flags, what, do):
    with pytest.raises(UsageError) as caught:
        check(flags)
    assert what in caught.value.what
    assert do in caught.value.do


def test_virtual_stages_take_whole_groups_of_micro_batches():
    flags = "--pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2"
    check(flags, micro=4)
    with pytest.raises(UsageError, match="the 3 micro-batches of a step"):
        check(flags, micro=3)


@pytest.mark.parametrize(
    "flags", ["", "--tensor_model_parallel_size 4", "--pipeline_model_parallel_size 5", "--context_parallel_size 3"]
)
def test_what_can_be(flags):
    check(flags)


def test_heads_and_groups_both_decide():
    check("--tensor_model_parallel_size 3", SMOLLM)
    with pytest.raises(UsageError) as caught:
        check("--tensor_model_parallel_size 2", SMOLLM)
    assert caught.value.do == "use one of 1, 3, 9" or caught.value.do == "use one of 1, 3"


def test_virtual_stages_by_either_name():
    args = parse(
        SftArguments, (BASE + "--pipeline_model_parallel_size 2 --num_layers_per_virtual_pipeline_stage 1").split()
    )
    assert virtual_stages(args, num_layers=6) == 3
    args = parse(
        SftArguments, (BASE + "--pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2").split()
    )
    assert virtual_stages(args, num_layers=6) == 2


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (
            "--data_parallel_sharding_strategy optim --use_distributed_optimizer false",
            "contradicts --use_distributed_optimizer",
        ),
        (
            "--data_parallel_sharding_strategy no_shard --use_distributed_optimizer true",
            "contradicts --use_distributed_optimizer",
        ),
        ("--recompute_granularity full", "needs --recompute_method"),
        ("--recompute_method uniform", "needs --recompute_granularity full"),
    ],
)
def test_switches_that_contradict(flags, what, tmp_path):
    args = parse(SftArguments, (BASE + flags).split())
    with pytest.raises(UsageError, match=what):
        check_train(args, world_size=1)
