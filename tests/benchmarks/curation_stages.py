"""Compares stages of curation with datatrove's: the same decisions, and MB/s a core, by turns. By hand:

    python tests/benchmarks/curation_corpus.py FOLDER corpus.jsonl
    python tests/benchmarks/curation_stages.py corpus.jsonl --datatrove VENV/bin/python --stages gopher_quality,c4

Each turn is a process of its own; CPU seconds are counted, not those of the wall. Numbers: docs/benchmarks/curation-stages.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

COMPARED = ("gopher_quality", "gopher_repetition", "c4", "fineweb")


def stage(name: str):
    from heliostat.curation.stage import Stage

    module = importlib.import_module(f"heliostat.curation.stages.{name}")
    (cls,) = (
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Stage) and c.__module__ == module.__name__
    )
    return cls


def ours(name: str, path: str, most: int) -> None:
    """Runs a stage over the documents, 64 at a time, and prints what `curation_contender.py` prints."""
    from heliostat.curation.stage import Document

    made = stage(name)()
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()[:most]]
    documents = [Document(str(i), t.encode() if name == "extract" else t) for i, t in enumerate(texts)]
    work = made.open()
    work([Document("0", "Some words to begin with. " * 30)])
    start, out = time.process_time(), []
    for i in range(0, len(documents), 64):
        out += work(documents[i : i + 64])
    print(json.dumps({"seconds": time.process_time() - start, "decisions": [o.reason for o in out]}))


def turn(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--datatrove", default="")
    parser.add_argument("--stages", default=",".join(COMPARED))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--most", type=int, default=1 << 30)
    parser.add_argument("--differences", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.corpus.read_text().splitlines()[: args.most]]
    megabytes = sum(len(r["text"].encode()) for r in rows) / 1e6
    print(f"{len(rows):,} documents, {megabytes:.1f} MB")
    print(f"{'stage':20} {'ours MB/s':>10} {'datatrove':>10} {'times':>6} {'kept':>6} {'same':>9}")
    for name in args.stages.split(","):
        tail, here, there = [name, str(args.corpus), str(args.most)], [], []
        for _ in range(args.turns):
            here.append(turn([sys.executable, __file__, "--ours", *tail]))
            if args.datatrove:
                there.append(turn([args.datatrove, str(Path(__file__).with_name("curation_contender.py")), *tail]))
        a = megabytes / statistics.median(t["seconds"] for t in here)
        kept = sum(not d for d in here[0]["decisions"]) / len(rows)
        line = f"{name:20} {a:10.2f}"
        if there:
            b = megabytes / statistics.median(t["seconds"] for t in there)
            pairs = list(zip(here[0]["decisions"], there[0]["decisions"], rows, strict=True))
            other = [(x, y, r["id"]) for x, y, r in pairs if bool(x) != bool(y)]
            line += f" {b:10.2f} {a / b:6.1f} {kept:6.1%} {1 - len(other) / len(rows):9.3%}"
            print(line, flush=True)
            for x, y, id in other if args.differences else ():
                print(f"    {id}: ours {x or 'kept'}, datatrove {y or 'kept'}")
            reasons = Counter((x, y) for x, y, _ in pairs if x or y)
            print("   ", ", ".join(f"{x or 'kept'}/{y or 'kept'} {n}" for (x, y), n in reasons.most_common(12)))
        else:
            print(f"{line} {'':17} {kept:6.1%}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        ours(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
