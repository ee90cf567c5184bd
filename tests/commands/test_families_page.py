"""docs/families.md: its example is run, by a conversion of a model that only it can read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_swift.args.commands import ExportArguments, parse
from megatron_swift.commands.export import run
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError, UsageError

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


def test_a_family_of_your_own(tmp_path):
    [(name, code)] = re.findall(r"^```python (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / name).write_text(code, encoding="utf-8")
    model = make_tiny_model(tmp_path / "model", family="qwen3")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MyForCausalLM"]}))
    flags = ["--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "out"), "--template", "chatml"]
    with pytest.raises(CheckpointError, match="MyForCausalLM"):
        run(parse(ExportArguments, flags))
    run(parse(ExportArguments, [*flags, "--custom_register_path", str(tmp_path / name)]))
    assert (tmp_path / "out" / "iter_0000001" / "manifest.json").is_file()


def test_what_is_no_family(tmp_path):
    (tmp_path / "bad.py").write_text("FAMILIES = [1]")
    model = make_tiny_model(tmp_path / "model")
    flags = ["--model", str(model), "--to_mcore", "true", "--custom_register_path", str(tmp_path / "bad.py")]
    with pytest.raises(UsageError, match="FAMILIES holds 1"):
        run(parse(ExportArguments, [*flags, "--output_dir", str(tmp_path / "out")]))
