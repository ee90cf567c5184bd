"""Everything about one GPU in one call: parity with the plain twins, the product, and its peers on the same shapes and rows. One JSON.

    BENCH_DATA=alpaca.json BENCH_TOKENIZER=folder python benchmarks/gpu_all.py --out all.json [--parts product peers] [--cases dense alpaca]

Each part is the script of its name, in a process of its own: gpu_parity.py, gpu.py, gpu_peers.py (which needs transformers and liger-kernel,
and knows dense models only). Prints what they print; then for each case that both have, how many times the peer's rate ours is. The JSON
holds device, versions and commit. Exit code 1 where a part failed or parity is not met.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = {"parity": "gpu_parity.py", "product": "gpu.py", "peers": "gpu_peers.py"}
PEERS = ("llama8b", "dense", "full8192", "ragged8192", "documents", "alpaca", "dense2")


def flags(part: str, cases: list[str], steps: int) -> list[str] | None:
    """Of a part's command line; None where it has nothing to do."""
    if part == "parity":
        return []
    chosen = cases if part == "product" else [case for case in cases if case in PEERS]
    return ["--cases", *chosen, "--steps", str(steps)] if chosen else None


def compare(report: Mapping[str, Any]) -> dict[str, float]:
    """Trained tokens per second, ours over the peer's best, for each case that both have."""
    ours, theirs = (report.get(part, {}).get("results", {}) for part in ("product", "peers"))
    found = {}
    for case, result in ours.items():
        rates = [r["trained_per_second"] for name, r in theirs.items() if name.split()[0] == case and "seconds" in r]
        if rates and "seconds" in result:
            found[case] = round(result["trained_per_second"] / max(rates), 3)
    return found


def main() -> None:
    """Run the parts, gather what they wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--cases", nargs="+", default=["dense", "recompute", "moe", "llama8b", "full8192", "alpaca"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    report: dict[str, Any] = {}
    codes = {}
    with tempfile.TemporaryDirectory() as temporary:
        for part in arguments.parts:
            asked = flags(part, arguments.cases, arguments.steps)
            if asked is None:
                continue
            written = Path(temporary) / f"{part}.json"
            command = [sys.executable, str(HERE / SCRIPTS[part]), *asked, "--out", str(written)]
            codes[part] = subprocess.run(command, check=False).returncode
            if written.exists():
                report[part] = json.loads(written.read_text(encoding="utf-8"))
    report |= {"times the peer": compare(report), "exit codes": codes}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("times the peer:", report["times the peer"], "exit codes:", codes)
    sys.exit(any(codes.values()))


if __name__ == "__main__":
    main()
