from __future__ import annotations

import pytest

from megatron_swift.args.commands import SftArguments, parse
from megatron_swift.commands.engine_options import engine_options
from megatron_swift.commands.setup import prepare_run
from megatron_swift.kernels.fp8 import Fp8Options
from megatron_swift.parallel.compiled import Compile
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("", "unfused", ()),
        ("--no_rope_fusion true", "unfused", ("rope",)),
        ("--no_bias_swiglu_fusion true --no_rope_fusion true", "unfused", ("rope", "swiglu")),
        ("", "fp8", None),
        ("--torch_dtype bfloat16 --fp8_format hybrid", "fp8", Fp8Options(format="hybrid")),
        (
            "--torch_dtype bfloat16 --fp8_format e4m3 --fp8_recipe rowwise",
            "fp8",
            Fp8Options(format="e4m3", recipe="rowwise"),
        ),
        ("--cross_entropy_loss_fusion true", "chunked_cross_entropy", True),
        ("", "transformer_engine", "where it runs"),
        ("--transformer_impl local", "transformer_engine", "never"),
        ("", "compile", Compile("auto")),
        ("--torch_compile false", "compile", Compile("false")),
    ],
)
def test_switches_reach_the_engine(folder, tmp_path, flags, name, value):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "of", "response": "to"}\n' * 20)
    words = f"--model {folder} --dataset {rows} --train_iters 1 --save {tmp_path / 'run'} --report_to none {flags}"
    assert getattr(engine_options(prepare_run(parse(SftArguments, words.split()), {})), name) == value


def test_modules_to_compute_again(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "of", "response": "to"}\n' * 20)
    words = f"--model {folder} --dataset {rows} --train_iters 1 --save {tmp_path / 'run'} --report_to none"
    given = parse(SftArguments, [*words.split(), "--recompute_modules", "mlp", "layernorm"])
    recompute = engine_options(prepare_run(given, {})).recompute
    assert recompute.has("mlp") and recompute.has("layernorm") and not recompute.has("core_attn")


def test_fp8_that_does_not_fit_is_refused_before_ranks_start(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "of", "response": "to"}\n' * 20)
    words = f"--model {folder} --dataset {rows} --train_iters 1 --save {tmp_path / 'run'} --fp8_format e4m3"
    with pytest.raises(UsageError, match="--fp8_format e4m3 needs a run in bfloat16, not float32"):
        prepare_run(parse(SftArguments, words.split()), {})
    blocks = [*words.split(), "--torch_dtype", "bfloat16", "--fp8_recipe", "blockwise"]
    with pytest.raises(UsageError, match="multiples of 128, and hidden_size 64 and heads x kv_channels 64"):
        prepare_run(parse(SftArguments, blocks), {})
    assert not (tmp_path / "run").exists()
