"""Writes golden_published.json from the published tokenizers and templates: python tests/data/record_published.py

The expected ids come from transformers and the published templates, not from this product; the texts recorded with their
ids are the pieces that this product tokenises, each by the published tokenizer.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from published import CASES, FOLDER, Reference, Spy, golden_conversations
from test_published import expected_ids, our_sample

from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer

OUT = Path(__file__).with_name("golden_published.json")


def main() -> None:
    record = {}
    for case in CASES:
        tokenizer, reference = Tokenizer.load(FOLDER / case.folder), Reference(FOLDER / case.folder)
        spy = Spy(tokenizer)
        template = get_template(case.template, date=datetime.date(2025, 3, 5))
        cases = {}
        for name, turns, loss_scale, tools in golden_conversations(case):
            sample = our_sample(template, spy, turns, loss_scale=loss_scale, tools=tools)
            cases[name] = {
                "ids": expected_ids(case, reference, tokenizer, turns, tools=tools, loss_scale=loss_scale),
                "trained": [int(label != -100) for label in sample.labels],
            }
        record[f"{case.template} {case.folder}"] = {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "texts": spy.texts,
            "cases": cases,
        }
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in record.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
