"""Preparation of a million rows beside `datasets.map`: rows/s, memory at 10 % and 100 % of the data, packing, first batch.

    python benchmarks/data_scale.py --tokenizer FOLDER --work FOLDER [--rows 1000000] [--peer PYTHON]

FOLDER of --work gets the data (about 1 KB a row) and the caches. PYTHON has `datasets` and `tokenizers` installed; without it
only our side runs. Every part is a process of its own, one after another, and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[2] / "shared" / "data"
PROCESSES = 2
MAX_LENGTH = 4096
SAMPLED = 0.2  # seconds between two looks at the memory
PEER = """
import json, os, sys, time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HOME"] = sys.argv[4]
import datasets, tokenizers
data, folder, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
tok = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
eos = tok.token_to_id(sys.argv[5])
def encode(rows):
    ids = [one.ids + [eos] for one in tok.encode_batch(rows["text"], add_special_tokens=False)]
    return {"input_ids": ids, "labels": ids}
begin = time.perf_counter()
rows = datasets.load_dataset("json", data_files=data, split="train")
loaded = time.perf_counter()
done = rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
end = time.perf_counter()
print(json.dumps({"part": "datasets", "rows": len(done), "load_s": loaded - begin, "map_s": end - loaded,
                  "rows_per_s": len(done) / (end - begin), "map_rows_per_s": len(done) / (end - loaded),
                  "version": datasets.__version__}))
"""


def make_rows(path: Path, count: int, bytes_per_row: int) -> None:
    """Documents of the lengths of c4 and Wikipedia, out of their paragraphs and of plays, each with its number in it."""
    c4 = [json.loads(line)["text"] for line in (SHARED / "c4_demo.jsonl").open(encoding="utf-8")]
    wiki = [line.strip() for line in (SHARED / "wiki_demo.txt").open(encoding="utf-8") if line.strip()]
    plays = (SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8")
    text = "\n".join([*c4, *wiki, *(plays[at : at + 2000] for at in range(0, len(plays), 2000))])
    lengths = sorted(min(len(one), 60_000) for one in [*c4, *(part[:3000] for part in wiki)])
    choose = random.Random(0)
    scale = bytes_per_row * len(lengths) / sum(lengths)  # in the same proportions
    draft = path.with_suffix(".draft")
    with draft.open("w", encoding="utf-8") as file:
        for number in range(count):
            length = max(int(choose.choice(lengths) * scale), 2)
            at = choose.randrange(len(text) - length)
            file.write(json.dumps({"text": f"{number} {text[at : at + length]}"}, ensure_ascii=False) + "\n")
    draft.rename(path)


class Memory:
    """The most that this process and its children held, in MiB, looked at while `with` lasts.

    rss  : resident, mapped files included, which the kernel takes back when it needs room.  anon: without them.
    """

    def __init__(self) -> None:
        self.own = {"rss": 0.0, "anon": 0.0}
        self.worker = {"rss": 0.0, "anon": 0.0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        own = os.getpid()
        while not self._stop.wait(SAMPLED):
            children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
            for pid, most in [(own, self.own), *((pid, self.worker) for pid in children)]:
                for name, value in _status(pid).items():
                    most[name] = max(most[name], value)


def _status(pid: object) -> dict[str, float]:
    wanted = {"VmRSS": "rss", "RssAnon": "anon"}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return {}
    pairs = [line.split()[:2] for line in lines if line.partition(":")[0] in wanted]
    return {wanted[name.rstrip(":")]: int(value) / 1024 for name, value in pairs}


def _options(data: Path, cache: Path) -> Any:
    from megatron_swift.data.prepare import DataOptions
    from megatron_swift.data.templates import get_template

    return DataOptions(
        (str(data),),
        template=get_template("generation"),
        max_length=MAX_LENGTH,
        truncation="split",
        loss_scale="all",
        packing=True,
        strict=True,
        dataset_num_proc=PROCESSES,
        cache_dir=cache,
    )


def prepare_rows(data: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """Our preparation from nothing: reading, checking, encoding, packing, writing, checksums."""
    from megatron_swift.data.prepare import prepare
    from megatron_swift.data.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    begin = time.perf_counter()
    with Memory() as memory:
        prepared = prepare(_options(data, cache), loaded)
    seconds = time.perf_counter() - begin
    rows, part = sum(prepared.report.rows_read.values()), prepared.report.train
    return {
        "part": "ours",
        "rows": rows,
        "seconds": seconds,
        "rows_per_s": rows / seconds,
        "tokens": part.tokens,
        "packs": part.rows,
        "efficiency": part.efficiency,
        "parent_mib": memory.own,
        "worker_mib": memory.worker,
    }


def first_batch(data: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """From finished imports to the first batch, the rows being in the cache."""
    from megatron_swift.data.loader import TrainLoader
    from megatron_swift.data.order import Order
    from megatron_swift.data.prepare import prepare
    from megatron_swift.data.tokenizer import Tokenizer

    begin = time.perf_counter()
    loaded = Tokenizer.load(tokenizer)
    opened = time.perf_counter()
    rows = prepare(_options(data, cache), loaded).train
    ready = time.perf_counter()
    loader = TrainLoader(
        rows,
        Order(len(rows), seed=42, shuffle=True),
        first_step=0,
        num_steps=1,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=1,
        global_batch_size=4,
        num_workers=0,
        prefetch_factor=2,
        persistent_workers=False,
        pad_to_multiple=1,
        pad_id=0,
    )
    tokens = sum(len(batch.tokens) for batch in next(iter(loader)))
    end = time.perf_counter()
    return {
        "part": "first batch",
        "tokenizer_s": opened - begin,
        "prepare_s": ready - opened,
        "batch_s": end - ready,
        "total_s": end - begin,
        "tokens": tokens,
    }


def _ours(part: str, data: Path, args: argparse.Namespace, cache: Path) -> None:
    words = [sys.executable, __file__, "--part", part, "--data", str(data), "--cache", str(cache)]
    subprocess.run([*words, "--tokenizer", str(args.tokenizer), "--work", str(args.work)], check=True)


def main() -> None:
    """Run all parts, or the one that a child was started for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bytes_per_row", type=int, default=1000, help="on average; the lengths' proportions stay")
    parser.add_argument("--peer", help="a python that has `datasets`")
    parser.add_argument("--eos", default="<|endoftext|>", help="the end token, for the peer")
    parser.add_argument("--part", choices=("prepare", "first"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part = prepare_rows if args.part == "prepare" else first_batch
        print(json.dumps(part(args.data, args.tokenizer, args.cache)), flush=True)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    for count in (args.rows // 10, args.rows):
        data = args.work / f"rows-{count}x{args.bytes_per_row}.jsonl"
        if not data.is_file():
            make_rows(data, count, args.bytes_per_row)
        print(json.dumps({"part": "data", "rows": count, "bytes": data.stat().st_size}), flush=True)
        _ours("prepare", data, args, args.work / f"cache-{count}-{time.time_ns()}")
    cache = max(args.work.glob(f"cache-{args.rows}-*"), key=lambda path: path.stat().st_mtime_ns)
    for _ in range(2):
        _ours("first", data, args, cache)
    if args.peer:
        home = args.work / f"hf-{time.time_ns()}"
        words = [args.peer, "-c", PEER, str(data), str(args.tokenizer), str(PROCESSES), str(home), args.eos]
        subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
