"""Preparing rows costs little more than its tokenizer: at most 15 % over the same one called in a plain loop."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import tokenizers

from megatron_swift.data.prepare import DataOptions, prepare
from megatron_swift.data.tokenizer import Tokenizer

ROWS = 20_000
FOLDER = Path(os.environ.get("TOKENIZERS") or "/tmp/tokenizers") / "Qwen2.5-Instruct"
ALPACA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_en_demo.json"
BEFORE = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Path:
    """Alpaca rows, each made different from all others so that no tokenizer remembers it."""
    if not (FOLDER / "tokenizer.json").is_file() or not ALPACA.is_file():
        pytest.skip(f"{FOLDER} or {ALPACA} is absent: bash ../shared/assets/get_tokenizers.sh {FOLDER.parent}")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    source, choose = json.loads(ALPACA.read_text(encoding="utf-8")), random.Random(0)
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(ROWS):
            row = source[number % len(source)]
            words = row["output"].split(" ")
            words.insert(choose.randrange(len(words) + 1), str(number))
            kept = {"instruction": row["instruction"], "input": row["input"], "output": " ".join(words)}
            file.write(json.dumps(kept) + "\n")
    return tmp_path / "rows.jsonl"


@pytest.mark.slow
@pytest.mark.shared
def test_overhead(rows, tmp_path):
    tokenizer = Tokenizer.load(FOLDER)
    plain = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    read = [json.loads(line) for line in rows.open()]
    options = DataOptions(
        (str(rows),),
        split_dataset_ratio=0.0,
        cache_dir=tmp_path / "cache",
        max_length=4096,
        template="qwen2_5",
        packing=True,
        strict=True,
        use_cache=False,
    )

    def loop() -> int:
        count = 0
        for row in read:
            query = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
            for text in (BEFORE.format(query), f"{row['output']}<|im_end|>\n"):
                count += len(plain.encode(text, add_special_tokens=False).ids)
        return count

    def whole() -> int:
        return prepare(options, tokenizer).report.train.tokens

    best = {loop: float("inf"), whole: float("inf")}
    counts = set()
    for _ in range(4):
        for work in best:
            begin = time.process_time()
            counts.add(work())
            best[work] = min(best[work], time.process_time() - begin)
    assert len(counts) == 1  # the same tokens
    overhead = best[whole] / best[loop] - 1
    print(f"{ROWS} rows: loop {best[loop]:.2f} s, prepare {best[whole]:.2f} s, {100 * overhead:+.1f} %")
    assert overhead <= 0.15
