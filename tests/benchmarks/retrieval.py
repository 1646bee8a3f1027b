"""Measures retrieval with questions from the corpus: recall, nDCG, and MRR by words, embeddings, and both. By hand:

    python -m tests.benchmarks.retrieval FOLDER [--embedder MODEL] [--questions 2000] [--kind functions]

functions: each function of Python's standard library is a document, without its docstring, whose first sentence is the question.
sections: each section of heliostat's own documentation is a document, without its title, which is the question.

FOLDER keeps the corpus, the dataset, and the index, so another embedder costs only its embeddings. FOLDER/pairs is a dataset of
all other questions with their documents, on which jobs/embedder.yaml trains. docs/benchmarks/retrieval.md has the numbers.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from heliostat.apps.search import build, judging
from heliostat.apps.search.search import SearchIndex
from heliostat.apps.search.tasks import IndexSettings
from heliostat.curation.prepare import prepare
from heliostat.inference.batch.run import model_digest
from heliostat.storage.locations import Location

from tests.benchmarks import harness

LEAST_WORDS = 4  # of a question


def functions() -> Iterator[tuple[str, str]]:
    """Yields (question, document): the first sentence of a docstring, or "", and the function without its docstring."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 3:
                yield _function(node, lines)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str]:
    docstring, first = ast.get_docstring(node) or "", node.body[0]
    begin, end = node.lineno - 1, node.end_lineno
    if not docstring:
        return "", "".join(lines[begin:end])
    body = "".join(lines[begin : first.lineno - 1] + lines[first.end_lineno : end])
    sentence = re.split(r"(?<=[.!?])\s|\n\s*\n", docstring.strip())[0]
    return " ".join(sentence.split()), body


def sections() -> Iterator[tuple[str, str]]:
    """Yields (question, document) of each section: its title, and its text."""
    for path in sorted((harness.ROOT / "docs").rglob("*.md")):
        for part in re.split(r"(?m)^(?=#+ )", path.read_text(encoding="utf-8")):
            title, _, body = part.partition("\n")
            if len(body.split()) >= 20:
                yield title.strip("# ").strip(), body


def make(folder: Path, kind: str, most: int) -> None:
    """Writes the corpus, the questions and the dataset."""
    pairs = list({"functions": functions, "sections": sections}[kind]())
    once = [pair for pair in {body: (question, body) for question, body in pairs}.values() if len(pair[1].split()) >= 8]
    (folder / "in").mkdir(parents=True, exist_ok=True)
    (folder / "in" / "all.jsonl").write_text("".join(json.dumps({"text": body}) + "\n" for _, body in once))
    least = LEAST_WORDS if kind == "functions" else 1
    asked = [{"question": q, "document": f"all.jsonl#{n}"} for n, (q, _) in enumerate(once, 1) if len(q.split()) >= least]
    chosen = random.Random(0).sample(asked, min(most, len(asked)))
    left = {one["document"] for one in asked} - {one["document"] for one in chosen}
    make_pairs(folder, [pair for n, pair in enumerate(once, 1) if f"all.jsonl#{n}" in left], chosen)
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chosen))
    pipeline = {"name": kind, "pipeline": "heliostat.pipelines:TextPipeline", "input": str(folder / "in"),
                "output": str(folder / "data"), "tokenizer": {"vocab_size": 2048}, "chunk_tokens": 65536}  # fmt: skip
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    prepare(folder / "pipeline.yaml", [])


def make_pairs(folder: Path, others: list[tuple[str, str]], chosen: list[dict[str, str]]) -> None:
    """Prepares the pairs whose question isn't among the test's questions, also in the same words, for training an embedder."""
    asked, rows = {one["question"] for one in chosen}, folder / "in-pairs"
    rows.mkdir()
    left = [{"query": question, "text": body} for question, body in others if question not in asked]
    (rows / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in left))
    pipeline = {"name": "pairs", "pipeline": "heliostat.pipelines:PairPipeline", "input": str(rows), "chunk_pairs": 64,
                "output": str(folder / "pairs"), "tokenizer": {"vocab_size": 8192}}  # fmt: skip
    (folder / "pairs.yaml").write_text(yaml.safe_dump(pipeline))
    prepare(folder / "pairs.yaml", [])


def main() -> None:
    kinds = {"choices": ["functions", "sections"], "default": "functions"}
    given = harness.arguments(__doc__, folder=Path, embedder={"type": Path}, questions=2000, kind=kinds)
    if not (given.folder / "data").exists():
        make(given.folder, given.kind, given.questions)
    out = given.folder / (f"index-{model_digest(given.embedder)[:8]}" if given.embedder else "index")
    made = build.index_documents(str(given.folder / "data"), str(out), IndexSettings(), given.embedder)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file() and "work" not in p.parts)
    print(
        f"{made['documents']:,} documents, {made['passages']:,} passages, {size / 1e6:.1f} MB; {made['cpu_seconds']} s of tasks"
    )
    began, asked = time.process_time(), judging.questions(given.folder / "questions.jsonl")
    told = judging.judge(SearchIndex(Location(str(out))), asked)
    each = (time.process_time() - began) / len(asked) * 1e3
    print(f"{told['questions']:,} questions, {told['unknown']} unknown, {each:.0f} ms of processor time each")
    harness.head("search", *judging.MEASURES)
    for mode, measured in told["modes"].items():
        harness.row(mode, *(f"{measured[name]:.3f}" for name in judging.MEASURES))
    for mode, over in told["over_bm25"].items():
        harness.row(f"{mode} over bm25", *("{:+.3f} ± {:.3f}".format(*over[name]) for name in judging.MEASURES))


if __name__ == "__main__":
    main()
