"""Rules of mixtures of experts: each names flag and value, says why, and lists what is legal."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from megatron_swift.args.commands import SftArguments, parse
from megatron_swift.args.moe_rules import Experts, capacity_factor, check_experts, expert_tensor_size
from megatron_swift.utils.errors import UsageError

BASE = "--model m --dataset d --train_iters 1 "
QWEN = Experts(number=60, topk=4, ffn_hidden_size=1408, shared_size=5632, pre_softmax=True)
SMALL = Experts(number=8, topk=2, ffn_hidden_size=96, shared_size=0, pre_softmax=False)
TP2 = "--tensor_model_parallel_size 2 --sequence_parallel true "


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
    """caplog hears the package's logger, whatever another test set up."""
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)


def check(flags: str, experts: Experts | None = SMALL, world: int = 8) -> None:
    check_experts(parse(SftArguments, (BASE + flags).split()), experts, world_size=world)


@pytest.mark.parametrize(
    ("flags", "what", "why", "do"),
    [
        (
            "--tensor_model_parallel_size 2",
            "--tensor_model_parallel_size 2 with experts needs --sequence_parallel true",
            "the same tokens",
            "add --sequence_parallel true",
        ),
        (
            "--expert_model_parallel_size 3",
            "--expert_model_parallel_size 3 does not divide the model's 8 experts",
            "",
            "use one of 1, 2, 4, 8",
        ),
        (
            TP2 + "--expert_model_parallel_size 8",
            "8 processes cannot be split by expert_model_parallel_size 8 x expert_tensor_parallel_size 2 (as tensor "
            "parallel) x pipeline_model_parallel_size 1 = 16",
            "",
            "use an --expert_model_parallel_size of 1, 2, 4",
        ),
        (
            "--pipeline_model_parallel_size 2 --expert_model_parallel_size 4 --expert_tensor_parallel_size 2",
            "x expert_tensor_parallel_size 2 x pipeline_model_parallel_size 2 = 16",
            "",
            "use an --expert_model_parallel_size of 1, 2",
        ),
        (
            "--expert_tensor_parallel_size 16",
            "8 processes cannot be split by expert_model_parallel_size 1 x expert_tensor_parallel_size 16",
            "",
            "use a smaller --expert_tensor_parallel_size",
        ),
        (
            TP2 + "--expert_tensor_parallel_size 1 --moe_token_dispatcher_type alltoall_seq",
            "--moe_token_dispatcher_type alltoall_seq needs expert_tensor_parallel_size 1 to be tensor_model_parallel_size 2",
            "",
            "use --moe_token_dispatcher_type alltoall",
        ),
        (
            "--moe_shared_expert_overlap true --moe_token_dispatcher_type allgather",
            "--moe_shared_expert_overlap true excludes --moe_token_dispatcher_type allgather",
            "",
            "use --moe_token_dispatcher_type alltoall",
        ),
        (
            "--moe_shared_expert_overlap true --moe_token_dispatcher_type alltoall_seq",
            "--moe_shared_expert_overlap true excludes --moe_token_dispatcher_type alltoall_seq",
            "",
            "use --moe_token_dispatcher_type alltoall",
        ),
        (
            "--moe_aux_loss_coeff 0.01 --moe_router_load_balancing_type sinkhorn",
            "--moe_aux_loss_coeff 0.01 has no place with --moe_router_load_balancing_type sinkhorn",
            "adds no loss",
            "leave --moe_aux_loss_coeff out, or use aux_loss, seq_aux_loss or global_aux_loss",
        ),
        (
            "--moe_aux_loss_coeff 0.01 --moe_router_load_balancing_type none",
            "has no place with --moe_router_load_balancing_type none",
            "adds no loss",
            "aux_loss",
        ),
        (
            "--moe_pad_expert_input_to_capacity true",
            "--moe_pad_expert_input_to_capacity true needs --moe_expert_capacity_factor",
            "",
            "--moe_expert_capacity_factor 1.5",
        ),
        (
            "--moe_pad_expert_input_to_capacity true --moe_expert_capacity_factor -1",
            "--moe_pad_expert_input_to_capacity true needs",
            "",
            "",
        ),
        (
            "--moe_expert_capacity_factor 1.5 --moe_router_load_balancing_type sinkhorn",
            "--moe_expert_capacity_factor excludes --moe_router_load_balancing_type sinkhorn",
            "balanced by itself",
            "one of the two",
        ),
        (
            "--moe_expert_capacity_factor 1 --moe_pad_expert_input_to_capacity true --moe_token_dispatcher_type allgather",
            "--moe_pad_expert_input_to_capacity true excludes --moe_token_dispatcher_type allgather",
            "",
            "use --moe_token_dispatcher_type alltoall",
        ),
    ],
)
def test_what_cannot_be(flags, what, why, do):
    with pytest.raises(UsageError) as caught:
        check(flags)
    assert what in caught.value.what
    assert why in caught.value.why
    assert do in caught.value.do


@pytest.mark.parametrize(
    ("changes", "flags", "what", "do"),
    [
        ({"topk": 9}, "", "moe_router_topk 9 is more than the 8 experts", "use --moe_router_topk 8 or less"),
        ({"topk": 1}, "", "moe_router_topk 1 needs --moe_router_pre_softmax true", "add --moe_router_pre_softmax true"),
        (
            {"ffn_hidden_size": 94},
            "--expert_tensor_parallel_size 4",
            "expert_tensor_parallel_size 4 does not divide moe_ffn_hidden_size 94",
            "use an --expert_tensor_parallel_size of 1, 2",
        ),
    ],
)
def test_what_does_not_fit_the_model(changes, flags, what, do):
    with pytest.raises(UsageError) as caught:
        check(flags, dataclasses.replace(SMALL, **changes))
    assert what in caught.value.what and do in caught.value.do


@pytest.mark.parametrize(
    ("experts", "world", "flags"),
    [
        (SMALL, 1, ""),
        (SMALL, 8, "--expert_model_parallel_size 8"),
        (SMALL, 8, "--expert_model_parallel_size 4 --pipeline_model_parallel_size 2"),
        (SMALL, 8, TP2 + "--expert_model_parallel_size 8 --expert_tensor_parallel_size 1"),
        (SMALL, 8, TP2 + "--expert_model_parallel_size 4 --moe_token_dispatcher_type alltoall_seq"),
        (SMALL, 8, "--moe_router_load_balancing_type sinkhorn"),
        (SMALL, 8, "--moe_router_load_balancing_type none --moe_aux_loss_coeff 0"),
        (
            SMALL,
            8,
            "--moe_expert_capacity_factor 1 --moe_token_drop_policy position --moe_token_dispatcher_type allgather",
        ),
        (dataclasses.replace(SMALL, topk=1), 1, "--moe_router_load_balancing_type sinkhorn"),
        (dataclasses.replace(SMALL, topk=1, pre_softmax=True), 1, ""),
        (QWEN, 8, TP2 + "--expert_model_parallel_size 4 --moe_shared_expert_overlap true"),
        (None, 8, "--tensor_model_parallel_size 2"),
    ],
)
def test_what_can_be(experts, world, flags, caplog):
    with caplog.at_level(logging.WARNING, "megatron_swift"):
        check(flags, experts, world)
    assert not caplog.records


@pytest.mark.parametrize(
    ("flags", "legal"), [("", "1, 2, 4"), (TP2, "1, 2, 4"), (TP2 + "--expert_tensor_parallel_size 4 ", "1, 2")]
)
def test_what_is_listed_is_legal_and_nothing_else_is(flags, legal):
    """Every other size is refused with the same list."""
    for size in range(1, 61):
        if str(size) in legal.split(", "):
            check(f"{flags}--expert_model_parallel_size {size}", QWEN)
            continue
        with pytest.raises(UsageError) as caught:
            check(f"{flags}--expert_model_parallel_size {size}", QWEN)
        assert caught.value.do.endswith(f"of {legal}"), size


@pytest.mark.parametrize("flag", ["expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_a_dense_model_has_no_experts_to_spread(flag):
    check(f"--{flag} 1", None)
    with pytest.raises(UsageError, match=f"--{flag} 2: the model has no experts") as caught:
        check(f"--{flag} 2", None)
    assert "dense" in caught.value.why and f"leave --{flag} out" in caught.value.do


@pytest.mark.parametrize(
    ("flags", "experts", "words"),
    [
        (
            "--moe_grouped_gemm false --moe_aux_loss_coeff 0.1",
            None,
            "--moe_aux_loss_coeff, --moe_grouped_gemm: no effect",
        ),
        ("--moe_shared_expert_overlap true", SMALL, "--moe_shared_expert_overlap changes nothing"),
        ("--recompute_modules moe_act", None, "moe_act changes nothing: the model has no experts"),
        ("--recompute_modules core_attn mlp", SMALL, "mlp changes nothing: no layer of the model is dense"),
        ("--moe_token_drop_policy position", SMALL, "--moe_token_drop_policy: no effect without"),
        ("--moe_pad_expert_input_to_capacity false", SMALL, "--moe_pad_expert_input_to_capacity: no effect without"),
    ],
)
def test_what_changes_nothing_is_said(flags, experts, words, caplog):
    with caplog.at_level(logging.WARNING, "megatron_swift"):
        check(flags, experts)
    assert [words in record.getMessage() for record in caplog.records] == [True]


def test_sizes_that_follow_from_others():
    args = parse(SftArguments, (BASE + TP2).split())
    assert expert_tensor_size(args) == 2 and capacity_factor(args) is None
    flags = "--expert_tensor_parallel_size 1 --moe_expert_capacity_factor "
    for text, factor in (("1.25", 1.25), ("-1", None), ("0", None)):
        args = parse(SftArguments, (BASE + TP2 + flags + text).split())
        assert expert_tensor_size(args) == 1 and capacity_factor(args) == factor
