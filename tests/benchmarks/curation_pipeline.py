"""Compares a FineWeb-like pipeline with datatrove's: the same filters, MinHash 14 x 8, PII, and tokens of the same tokenizer.

    python -m tests.benchmarks.curation_pipeline corpus.jsonl tokenizer.json --folder FOLDER [--datatrove VENV/bin/python]
        [--megabytes 5 50] [--sides heliostat datatrove] [--slices 5]

`curation_corpus.py` makes the corpus. Extraction and language are left out, because datatrove downloads the model for languages.
datatrove runs as in FineWeb's own script: filters and a compressed JSONL, signatures, buckets, clusters, and the rest with
tokens. It uses one process, one task per step and file of 50 MB, without its executors. With `--slices N`, both sides run in turn
on N inputs of these megabytes. Slice k has every 25th document of the corpus, from document k on, so it is a sample.

Each side is a separate process, and CPU seconds are those of the whole process. Each side's result is saved in FOLDER when it
ends, and datatrove's filters after each file, so the same command resumes. Both sides report the filter that dropped each
document, and why. The differences are written to `differences-*.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

from tests.benchmarks import harness

FILTERS = ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
STAGES = [{"stage": "gopher_repetition"}, {"stage": "gopher_quality"}, {"stage": "c4", "terminal_marks": False},
          {"stage": "fineweb"}, {"stage": "minhash"}, {"stage": "pii", "kinds": ["email", "ip"]}]  # fmt: skip
END = "<|endoftext|>"
FILE_BYTES = 50_000_000  # of text
EVERY = 25  # a slice has one document in so many
Ends = dict[str, list[str]]  # id of a document that a filter drops -> the filter, the reason


def ours(place: str, tokenizer: str) -> dict[str, Any]:
    from heliostat.curation import reasons

    from tests.unit.build_pipeline import Here, make_dataset

    folder = Path(place)
    made = make_dataset(
        Here(name="a", input=f"{folder}/in", output=f"{folder}/out", stages=STAGES, tokenizer={"path": tokenizer})
    )
    funnel, ends = reasons.funnel(made), Ends()
    for table in reasons.ends(made):
        columns = (table[name].to_pylist() for name in ("id", "stage", "reason"))
        ends |= {id: [stage, reason] for id, stage, reason in zip(*columns, strict=True) if _of_a_filter(stage)}
    (folder / "ends-heliostat.json").write_text(json.dumps(ends))
    steps = {name: round(seconds, 1) for name, seconds in reasons.seconds(made).items()}
    return {"behind the filters": funnel["3 fineweb"]["kept"], "documents": made.meta["documents"], "tokens": made.tokens,
            "steps": steps, "peak": harness.memory("VmHWM")}  # fmt: skip


def _of_a_filter(stage: str) -> bool:
    return stage.partition(" ")[2] in FILTERS or stage in FILTERS


class Left:
    """Records the drops of a datatrove filter, in place of the writer that would write them."""

    def __init__(self, name: str, ends: Ends) -> None:
        self.name, self.ends = name, ends

    def __enter__(self) -> Left:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes nothing."""

    def write(self, document: Any, rank: int) -> None:
        self.ends[document.id] = [self.name, str(document.metadata.get("filter_reason"))]


def theirs(place: str, tokenizer: str) -> dict[str, Any]:
    from datatrove.pipeline import filters
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    folder, config = Path(place), minhash.MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    kept, sigs, buckets, removed = (str(folder / name) for name in ("kept", "sigs", "buckets", "removed"))
    files, seconds, ends, filtered = sorted(p.name for p in (folder / "in").iterdir()), Counter[str](), Ends(), 0

    def run(step: str, *parts: Any, data: Any = None, rank: int = 0, size: int = len(files)) -> int:
        began = time.process_time()
        for part in parts:
            data = part.run(data, rank, size)
        count = sum(1 for _ in data or ())
        seconds[step] += time.process_time() - began
        return count

    for rank, file in enumerate(files):
        saved = folder / f"filtered-{file}.json"
        if not saved.exists():
            mine, before = Ends(), seconds["filters"]
            left = [Left(name, mine) for name in FILTERS]
            count = run("filters", JsonlReader(str(folder / "in")), filters.GopherRepetitionFilter(exclusion_writer=left[0]),
                        filters.GopherQualityFilter(exclusion_writer=left[1]),
                        filters.C4QualityFilter(filter_no_terminal_punct=False, exclusion_writer=left[2]),
                        filters.FineWebQualityFilter(exclusion_writer=left[3]), JsonlWriter(kept), rank=rank)  # fmt: skip
            saved.write_text(json.dumps([count, seconds["filters"] - before, mine]))
            seconds["filters"] = before
        count, spent, mine = json.loads(saved.read_text())
        filtered, ends = filtered + count, ends | mine
        seconds["filters"] += spent
    (folder / "ends-datatrove.json").write_text(json.dumps(ends))
    for rank in range(len(files)):
        run("signatures", JsonlReader(kept), minhash.MinhashDedupSignature(output_folder=sigs, config=config), rank=rank)
    for bucket in range(14):
        run("buckets", minhash.MinhashDedupBuckets(input_folder=sigs, output_folder=buckets, config=config), rank=bucket, size=14)
    run("clusters", minhash.MinhashDedupCluster(input_folder=buckets, output_folder=removed, config=config), size=1)
    counted = [0]

    def count_documents(documents: Iterator[Any]) -> Iterator[Any]:
        for document in documents:
            counted[0] += 1
            yield document

    for rank in range(len(files)):
        rest = JsonlReader(kept).run(None, rank, len(files))
        for step in (minhash.MinhashDedupFilter(input_folder=removed), PIIFormatter()):
            rest = step.run(rest, rank, len(files))
        tokens = DocumentTokenizer(output_folder=str(folder / "tokens"), tokenizer_name_or_path=tokenizer, eos_token=END)
        run("the rest, and tokens", tokens, data=count_documents(rest), rank=rank)
    size = sum(path.stat().st_size for path in (folder / "tokens").rglob("*.ds")) // 2
    steps = {name: round(spent, 1) for name, spent in seconds.items()}
    return {"behind the filters": filtered, "documents": counted[0], "tokens": size, "steps": steps,
            "peak": harness.memory("VmHWM"), "all its CPU seconds": sum(seconds.values())}  # fmt: skip


SIDES = {"heliostat": ours, "datatrove": theirs}


def turn(python: str, side: str, folder: Path, tokenizer: str) -> dict[str, Any]:
    """Runs a side, or takes its earlier result; adds its CPU seconds."""
    saved = folder / f"{side}.json"
    if not saved.exists():
        made, spent = harness.apart(SIDES[side], str(folder.absolute()), tokenizer, python=python)
        saved.write_text(json.dumps(made | {"seconds": max(spent, made.pop("all its CPU seconds", 0))}))
    return json.loads(saved.read_text())


def split(corpus: Path, folder: Path, most: float, part: slice) -> tuple[int, int]:
    """Writes up to `most` bytes of a part of the corpus in files of FILE_BYTES, with the ids that both sides report. Returns the
    numbers of documents and bytes."""
    told = folder / "input.json"
    if not told.exists():
        (folder / "in").mkdir(parents=True, exist_ok=True)
        size = documents = file = line = held = 0
        out = (folder / "in" / "0000.jsonl").open("w")
        with corpus.open() as lines:
            for row in islice(lines, part.start, None, part.step):
                text = json.loads(row)["text"]
                bytes_ = len(text.encode())
                if size + bytes_ > most:
                    break
                if held + bytes_ > FILE_BYTES:
                    out.close()
                    file, line, held = file + 1, 0, 0
                    out = (folder / "in" / f"{file:04}.jsonl").open("w")
                size, documents, line, held = size + bytes_, documents + 1, line + 1, held + bytes_
                out.write(json.dumps({"id": f"{file:04}.jsonl#{line}", "text": text}) + "\n")
        out.close()
        told.write_text(json.dumps([documents, size]))
    documents, size = json.loads(told.read_text())
    return documents, size


def agreed(folder: Path, documents: int) -> None:
    """Formats the number of the filters' decisions that agree, and writes the others."""
    mine, other = (json.loads((folder / f"ends-{side}.json").read_text()) for side in ("heliostat", "datatrove"))
    kept = [id for id in mine.keys() | other.keys() if (id in mine) != (id in other)]
    first = [id for id in mine.keys() & other.keys() if mine[id][0].split()[-1] != other[id][0]]
    print(f"\nkept or dropped alike: {documents - len(kept):,} of {documents:,} ({1 - len(kept) / documents:.4%}); of those "
          f"dropped by both, by the same filter: {len(mine.keys() & other.keys()) - len(first):,} of "
          f"{len(mine.keys() & other.keys()):,}\n", flush=True)  # fmt: skip
    told = {id: [mine.get(id), other.get(id)] for id in sorted(kept + first)}
    (folder / "differences.json").write_text(json.dumps(told, indent=1))


def main() -> None:
    asked = harness.arguments(__doc__, corpus=Path, tokenizer=str, folder={"type": Path, "required": True}, datatrove="",
                              megabytes=[5.0, 50.0], sides=[*SIDES], slices=0)  # fmt: skip
    parts = {f"-{k}": slice(k, None, EVERY) for k in range(asked.slices)} or {"": slice(0, None, 1)}
    harness.head("side", "input", "behind the filters", "documents", "tokens", "CPU s", "of the steps", "MB/s a core", "peak")
    for most, (name, part) in product(asked.megabytes, parts.items()):
        folder = asked.folder / f"{most:g}{name}"
        documents, size = split(asked.corpus, folder, most * 1e6, part)
        pythons = {"heliostat": sys.executable, "datatrove": asked.datatrove}
        for side in asked.sides:
            found = turn(pythons[side], side, folder, asked.tokenizer)
            counts = [f"{found[name]:,}" for name in ("behind the filters", "documents", "tokens")]
            steps, rate = sum(found["steps"].values()), f"{size / 1e6 / found['seconds']:.2f}"
            harness.row(side, f"{documents:,}, {size / 1e6:.1f} MB", *counts, f"{found['seconds']:.1f}", f"{steps:.1f}", rate,
                        f"{found['peak']:,.0f} MiB")  # fmt: skip
            print("  steps:", found["steps"], file=sys.stderr, flush=True)
        if all((folder / f"ends-{side}.json").exists() for side in pythons):
            agreed(folder, documents)


if __name__ == "__main__":
    main()
