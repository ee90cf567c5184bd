"""docs/templates.md: its example is run, and what it lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from tiny_tokenizer import write_tokenizer

from megatron_swift.data.agent import AGENTS
from megatron_swift.data.encode import encode, stop_strings
from megatron_swift.data.loss_scale import NAMES
from megatron_swift.data.plugins import load_plugins
from megatron_swift.data.templates import TEMPLATES, load_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Message

PAGE = (Path(__file__).parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")


def test_a_template_of_your_own(tmp_path):
    [(name, code)] = re.findall(r"^```python (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / name).write_text(code, encoding="utf-8")
    own = {one.name: one for one in load_plugins([str(tmp_path / name)]).templates}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "tok", bos="<s>", eos="</s>"))
    template = load_template("my_template", tokenizer, registered=own)
    turns = [Message(r, t) for r, t in (("user", "a"), ("assistant", "XY"), ("user", "b"), ("assistant", "ZW"))]
    sample = encode(template, tokenizer, turns)
    assert tokenizer.decode(sample.ids.tolist()) == (
        "<s>## System\nBe kind.\n\n## User\na\n\n## Bot\nXY</s>\n\n## User\nb\n\n## Bot\nZW</s>"
    )
    assert tokenizer.decode(sample.labels[sample.labels != IGNORE].tolist()) == "XY</s>ZW</s>"
    assert stop_strings(template, tokenizer) == ["## User"]


def test_what_is_listed_is_what_there_is():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| (\w+|–) \|$", PAGE, re.MULTILINE)
    listed = {name: agent for names, agent in rows for name in re.findall(r"\w+", names)}
    assert listed.keys() == TEMPLATES.keys()
    for name, agent in listed.items():
        assert agent in ("–", TEMPLATES[name].agent_template), name
        system = TEMPLATES[name].default_system
        if system and name not in ("llama", "qwq_preview"):
            assert system in PAGE, name
    for name in (*NAMES, *AGENTS):
        assert f"`{name}`" in PAGE, name
    assert all("—" not in line for line in PAGE.splitlines())
