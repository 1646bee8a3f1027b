"""A FineWeb-like pipeline as a whole, beside datatrove's: the same filters, MinHash 14 x 8, PII, tokens of the same tokenizer.

    python tests/benchmarks/curation_pipeline.py corpus.jsonl tokenizer.json [--datatrove VENV/bin/python] [--megabytes 5 50]

The corpus is what `curation_corpus.py` makes. Not in it: extraction, and language, whose model datatrove loads from elsewhere.
datatrove runs as FineWeb's own script has it: filters and a compressed JSONL, signatures, buckets, clusters, and the rest with
tokens; one process, one task a step, without its executors. Each side is a process of its own: CPU seconds are of all of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = [{"stage": "gopher_repetition"}, {"stage": "gopher_quality"}, {"stage": "c4", "terminal_marks": False},
          {"stage": "fineweb"}, {"stage": "minhash"}, {"stage": "pii", "kinds": ["email", "ip"]}]  # fmt: skip
END = "<|endoftext|>"


def ours(folder: Path, tokenizer: str) -> dict[str, int]:
    sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
    from heliostat.curation import reasons

    from tests.unit.build_pipeline import Here, make_dataset

    made = make_dataset(
        Here(name="a", input=f"{folder}/in", output=f"{folder}/out", stages=STAGES, tokenizer={"path": tokenizer})
    )
    funnel = reasons.funnel(made)
    return {"behind the filters": funnel["3 fineweb"]["kept"], "documents": made.meta["documents"], "tokens": made.tokens}


def theirs(folder: Path, tokenizer: str) -> dict[str, int]:
    from datatrove.pipeline import filters
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    config = minhash.MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    kept, sigs, buckets, removed = (str(folder / name) for name in ("kept", "sigs", "buckets", "removed"))

    def run(*steps, data=None, rank=0, size=1) -> int:
        for step in steps:
            data = step.run(data, rank, size)
        return sum(1 for _ in data or ())

    filtered = run(JsonlReader(str(folder / "in")), filters.GopherRepetitionFilter(), filters.GopherQualityFilter(),
                   filters.C4QualityFilter(filter_no_terminal_punct=False), filters.FineWebQualityFilter(),
                   JsonlWriter(kept))  # fmt: skip
    run(JsonlReader(kept), minhash.MinhashDedupSignature(output_folder=sigs, config=config))
    for bucket in range(14):
        run(minhash.MinhashDedupBuckets(input_folder=sigs, output_folder=buckets, config=config), rank=bucket, size=14)
    run(minhash.MinhashDedupCluster(input_folder=buckets, output_folder=removed, config=config))
    counted = [0, 0]

    def count(documents):
        for document in documents:
            counted[0] += 1
            yield document

    rest = JsonlReader(kept).run()
    for step in (minhash.MinhashDedupFilter(input_folder=removed), PIIFormatter()):
        rest = step.run(rest, 0, 1)
    tokens = DocumentTokenizer(output_folder=str(folder / "tokens"), tokenizer_name_or_path=tokenizer, eos_token=END)
    run(tokens, data=count(rest))
    counted[1] = sum(path.stat().st_size for path in (folder / "tokens").rglob("*.ds")) // 2
    return {"behind the filters": filtered, "documents": counted[0], "tokens": counted[1]}


def turn(python: str, which: str, folder: Path, tokenizer: str) -> tuple[dict[str, int], float]:
    """Runs a side; returns what it made, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([python, __file__, which, str(folder), tokenizer], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads((folder / f"{which}.json").read_text()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--datatrove", default="")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[5.0, 50.0])
    asked = parser.parse_args()
    print("| side | input | behind the filters | documents | tokens | CPU s | MB/s a core |\n|---|---|---|---|---|---|---|")
    for most in asked.megabytes:
        with tempfile.TemporaryDirectory() as temporary:
            folder, size, count = Path(temporary), 0, 0
            (folder / "in").mkdir()
            with asked.corpus.open() as lines, (folder / "in" / "a.jsonl").open("w") as out:
                for line in lines:
                    text = json.loads(line)["text"]
                    if (size := size + len(text.encode())) > most * 1e6:
                        break
                    out.write(json.dumps({"id": str(count), "text": text}) + "\n")
                    count += 1
            sides = {"heliostat": (sys.executable, "--ours")}
            sides |= {"datatrove": (asked.datatrove, "--theirs")} if asked.datatrove else {}
            for name, (python, which) in sides.items():
                found, seconds = turn(python, which, folder, asked.tokenizer)
                cells = " | ".join(f"{value:,}" for value in found.values())
                print(
                    f"| {name} | {count:,}, {size / 1e6:.1f} MB | {cells} | {seconds:.1f} | {size / 1e6 / seconds:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1] in ("--ours", "--theirs"):
        made = {"--ours": ours, "--theirs": theirs}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
        (Path(sys.argv[2]) / f"{sys.argv[1]}.json").write_text(json.dumps(made))
    else:
        main()
