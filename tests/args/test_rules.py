"""Every rule between parameters has a failing example here."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_swift.args import rules
from megatron_swift.args.commands import ExportArguments, InferArguments, SftArguments
from megatron_swift.utils.errors import UsageError


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that looks like a run: tracker file and one iteration."""
    run = tmp_path / "out" / "v0"
    (run / "iter_0000001").mkdir(parents=True)
    (run / rules.TRACKER).write_text("1")
    return run


def train(**changes) -> SftArguments:
    return SftArguments(**({"model": "org/name", "dataset": ["a.jsonl"], "train_iters": 100} | changes))


@pytest.mark.parametrize(
    ("changes", "what", "do"),
    [
        ({"model": None}, "no model is given", "--load"),
        ({"model": "/nowhere/x"}, "--model /nowhere/x is not an existing folder", ""),
        ({"load": "/nowhere/x"}, "--load /nowhere/x does not exist", ""),
        ({"dataset": []}, "no training data", "--dataset"),
        ({"train_iters": None}, "length of the run", "--max_epochs"),
        ({"max_epochs": 2}, "--train_iters 100 and --max_epochs 2", "one of them"),
        ({"lr_warmup_iters": 100}, "--lr_warmup_iters 100 must be below train_iters 100", "--lr_warmup_iters 99"),
        ({"lr_warmup_iters": 50, "lr_decay_iters": 20}, "must be below lr_decay_iters 20", ""),
        ({"min_lr": 1e-4}, "--min_lr 0.0001 is above --lr 1e-05", ""),
        (
            {"micro_batch_size": 3},
            "--global_batch_size 16 is not a multiple",
            "1, 2, 4, 8 or --global_batch_size 12 or 18",
        ),
        ({"micro_batch_size": 16}, "--micro_batch_size 16 x 2", "--global_batch_size 32"),
        ({"global_batch_size": 1}, "--global_batch_size 1 is not a multiple", "use --global_batch_size 2"),
        ({"tensor_model_parallel_size": 3}, "2 processes cannot be split", "multiple of 3"),
        ({"fp16": True, "bf16": True}, "--fp16 true and --bf16 true", ""),
        ({"deterministic_mode": True, "use_flash_attn": True}, "excludes --use_flash_attn true", ""),
        ({"deterministic_mode": True, "attention_backend": "flash"}, "excludes --attention_backend flash", ""),
        ({"deterministic_mode": True, "attention_backend": "cudnn"}, "excludes --attention_backend cudnn", ""),
        ({"deterministic_mode": True, "cross_entropy_loss_fusion": True}, "excludes --cross_entropy_loss_fusion", ""),
        ({"recompute_granularity": "full"}, "needs --recompute_method", "uniform"),
        ({"recompute_granularity": "full", "recompute_method": "block"}, "needs --recompute_num_layers", ""),
        ({"recompute_num_layers": 2}, "--recompute_num_layers 2 needs --recompute_granularity full", ""),
        (
            {"recompute_granularity": "none", "given": frozenset({"recompute_modules"})},
            "--recompute_modules needs --recompute_granularity selective; it is none",
            "",
        ),
        (
            {
                "recompute_modules": ["layernorm"],
                "tp_comm_overlap": True,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
            },
            "--recompute_modules layernorm cannot be used with --tp_comm_overlap true",
            "leave one",
        ),
        ({"overlap_param_gather": True}, "needs --overlap_grad_reduce true", ""),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": False},
            "needs --use_distributed_optimizer true",
            "",
        ),
        (
            {"tp_comm_overlap": True},
            "needs a --tensor_model_parallel_size of at least 2",
            "leave --tp_comm_overlap out",
        ),
        ({"tp_comm_overlap": True, "tensor_model_parallel_size": 2}, "needs --sequence_parallel true", "add"),
        ({"use_flash_attn": True, "attention_backend": "local"}, "contradicts --attention_backend local", ""),
        ({"dataset": ["swift/self-cognition#500"]}, "missing: model_name, model_author", "swift-robot"),
        ({"dataset": ["hf::modelscope/Self-Cognition:qwen3"], "model_name": ["a"]}, "missing: model_author", ""),
        ({"report_to": ["none", "wandb"]}, "none excludes the others", ""),
        ({"max_length": 9000, "max_position_embeddings": 8192}, "--max_length 9000 is more than the model's 8192", ""),
        ({"seq_length": 9000, "max_position_embeddings": 8192}, "--seq_length 9000 is more than", ""),
    ],
)
def test_train_rules(changes, what, do):
    with pytest.raises(UsageError) as e:
        rules.check_train(train(**changes), world_size=2)
    assert what in e.value.what
    assert do in e.value.do


def test_overlap_stays_within_a_machine():
    """Two machines of four ranks: tp 4 is within each, tp 8 goes over both."""
    env = {"NNODES": "2", "NPROC_PER_NODE": "4", "MASTER_ADDR": "10.0.0.1", "NODE_RANK": "0"}
    overlap = {"tp_comm_overlap": True, "sequence_parallel": True, "global_batch_size": 16}
    rules.check_train(train(**overlap, tensor_model_parallel_size=4), world_size=8, env=env)
    with pytest.raises(UsageError, match="8 does not divide NPROC_PER_NODE=4"):
        rules.check_train(train(**overlap, tensor_model_parallel_size=8), world_size=8, env=env)


def test_good_runs_pass(checkpoint, caplog):
    for changes in (
        {},
        {"train_iters": None, "max_epochs": 3},
        {"load": str(checkpoint)},
        {"dataset": ["swift/self-cognition"], "model_name": ["a", "b"], "model_author": ["c"]},
        {"use_flash_attn": True, "attention_backend": "flash"},
        {"max_length": 8192, "max_position_embeddings": 8192},
    ):
        rules.check_train(train(**changes), world_size=2, env={"NPROC_PER_NODE": "2"})
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_parallel": True}, "disabled: tensor_model_parallel_size is 1"),
        ({"model_name": ["x"]}, "--model_name and --model_author are not used"),
    ],
)
def test_train_warnings(changes, message, caplog):
    rules.check_train(train(**changes), world_size=1)
    assert message in caplog.text


def test_load_says_where_the_checkpoint_is(checkpoint, tmp_path, caplog):
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    for folder, do in (
        (checkpoint / "iter_0000001", f"name the folder above: --load {checkpoint}"),
        (checkpoint.parent, f"name the run in it, such as --load {checkpoint}"),
        (hf, "give it as --model"),
    ):
        with pytest.raises(UsageError) as e:
            rules.check_train(train(load=str(folder)), world_size=1)
        assert f"--load {folder} holds no checkpoint" in e.value.what
        assert do in e.value.do
    rules.check_train(train(load=str(hf), exit_on_missing_checkpoint=False), world_size=1)
    assert "starting from --model org/name" in caplog.text
    with pytest.raises(UsageError, match="holds no checkpoint"):
        rules.check_train(train(model=None, load=str(hf), exit_on_missing_checkpoint=False), world_size=1)
    with pytest.raises(UsageError, match="is not known"):
        rules.check_train(train(model=None, load=str(checkpoint)), world_size=1)


@pytest.mark.parametrize(
    ("env", "what"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two: must be a whole number"),
        ({"NPROC_PER_NODE": "0"}, "at least 1"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR=127.0.0.1 with NNODES=2"),
        ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "NODE_RANK": "2"}, "NODE_RANK=2 with NNODES=2"),
    ],
)
def test_environment(env, what):
    with pytest.raises(UsageError) as e:
        rules.check_train(train(), world_size=1, env=env)
    assert what in e.value.what


def test_schedule_of_a_run_by_epochs():
    args = train(train_iters=None, max_epochs=1, lr_warmup_iters=10)
    rules.check_train(args, world_size=1)
    rules.check_schedule(args, train_iters=11)
    with pytest.raises(UsageError, match="must be below train_iters 10"):
        rules.check_schedule(args, train_iters=10)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "neither is given"),
        ({"to_mcore": True, "to_hf": True, "model": "a/b"}, "both are given"),
        ({"to_mcore": True}, "--to_mcore needs the model"),
        ({"to_mcore": True, "model": "./nowhere"}, "is not an existing folder"),
        ({"to_mcore": True, "model": "a/b", "mcore_model": "x"}, "--mcore_model x is given"),
        ({"to_hf": True}, "--to_hf needs the Megatron checkpoint"),
        ({"to_hf": True, "mcore_model": "/nowhere"}, "--mcore_model /nowhere does not exist"),
    ],
)
def test_export_rules(changes, what):
    with pytest.raises(UsageError) as e:
        rules.check_export(ExportArguments(**changes))
    assert what in e.value.what


def test_export_target(checkpoint, tmp_path):
    args = ExportArguments(to_hf=True, mcore_model=str(checkpoint), model="a/b", output_dir=str(tmp_path / "new"))
    rules.check_export(args)
    with pytest.raises(UsageError, match="is not known"):
        rules.check_export(dataclasses.replace(args, model=None))
    used = dataclasses.replace(args, output_dir=str(checkpoint))
    with pytest.raises(UsageError, match="exists and is not empty"):
        rules.check_export(used)
    rules.check_export(dataclasses.replace(used, exist_ok=True))
    with pytest.raises(UsageError, match="is a file"):
        rules.check_output_dir(str(checkpoint / rules.TRACKER), exist_ok=True)


@pytest.mark.parametrize(
    ("changes", "world_size", "what"),
    [
        ({"model": None}, 1, "swift infer needs a model"),
        ({"model": "/nowhere"}, 1, "is not an existing folder"),
        ({}, 2, "2 processes cannot be used without --dataset"),
        ({"dataset": ["a"], "stream": True}, 2, "2 processes cannot be used with --stream true"),
        ({"dataset": ["a"], "stream": True, "max_batch_size": 4}, 1, "--max_batch_size 4: only one answer"),
        ({"metric": "acc"}, 1, "--metric needs a data set"),
        ({"val_dataset_sample": 5}, 1, "--val_dataset_sample needs a data set"),
    ],
)
def test_infer_rules(changes, world_size, what):
    with pytest.raises(UsageError) as e:
        rules.check_infer(InferArguments(**({"model": "a/b"} | changes)), world_size=world_size)
    assert what in e.value.what
    rules.check_infer(InferArguments(model="a/b", val_dataset=["x"], metric="acc"), world_size=2)
