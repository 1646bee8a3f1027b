"""Indexes documents, and searches indexes: `heliostat search` index, ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import Report, command, finish, model_folder, out, print_table
from heliostat.cli.groups import SEARCH
from heliostat.cli.options import Embedder, Reranker, TextDataset, TrackingUri, argument
from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from heliostat.apps.search.search import Passage, SearchIndex

SHOWN = 600  # maximum printed characters of a passage; --json prints all


@command(SEARCH, "index", example=".heliostat/data/quickstart --out .heliostat/index")
def index_documents(
    dataset: TextDataset,
    to: Annotated[str, typer.Option("--out", help="Folder of the index, or s3://BUCKET/PREFIX", show_default=False)],
    embedder: Annotated[
        str | None,
        typer.Option(help="A model that embeds the passages: models:/NAME/VERSION, a run id, or a folder", metavar="MODEL"),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per passage, by the dataset's tokenizer")] = 256,
    overlap: Annotated[int, typer.Option(help="Tokens that a passage shares with the next passage")] = 32,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Batch size of the embedder, in passages")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Without a cluster: number of parallel tasks")] = 2,
    mlflow: TrackingUri = None,
) -> None:
    """Index a dataset's documents, or update their index: by words, and with --embedder also by meaning."""
    from heliostat.apps.search import build
    from heliostat.apps.search.tasks import IndexSettings
    from heliostat.schema import validate

    build.require()
    settings = validate(IndexSettings, {"chunk_tokens": chunk_tokens, "overlap": overlap}, "search index")
    model = model_folder(embedder, mlflow) if embedder else None
    result = build.index_documents(dataset, to, settings, model, batch, workers, out.quiet)
    _print_made(result, to)
    finish(result)


def _print_made(result: Report, to: str) -> None:
    size = f"{result['documents']:,} documents in {result['passages']:,} passages"
    if not result["new"] and not result["added"] + result["deleted"]:
        out.print(f"{to} is up to date: {size} of {result['dataset']['digest'][:12]}")
        return
    out.print(f"{to} has {size} of {result['dataset']['digest'][:12]}: {result['added']:,} documents added, "
              f"{result['deleted']:,} deleted, {result['kept']:,} unchanged")  # fmt: skip
    for count, what in (
        (result["empty"], "documents have no text, so they have no passages"),
        (result["unembedded"], "passages have no embedding: the model embeds none of their tokens, or failed"),
        (result["truncated"], "passages are too long for the embedder, which embeds only their beginnings"),
    ):
        if count:
            out.print(f"  {count:,} {what}")


@command(SEARCH, example='.heliostat/index "How do I parse JSON?"')
def ask(
    index: Annotated[str, argument("INDEX", "An index of `heliostat search index`: a folder or s3:// URI")],
    question: Annotated[str | None, typer.Argument(help="The question", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Language model that answers the question from the passages. Without it, the passages are shown",
            metavar="MODEL",
            autocompletion=completion.models,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="Maximum number of passages")] = 5,
    mode: Annotated[
        str | None, typer.Option(help="bm25 (by words), dense (by meaning), or hybrid (both)", show_default="bm25")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="Measure the index with a file of questions, each with the documents to find", metavar="FILE"),
    ] = None,
    embedder: Embedder = None,
    reranker: Reranker = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of the answer")] = 128,
    mlflow: TrackingUri = None,
) -> None:
    """Ask an index a question: show passages with their sources, or a model's answer from these passages."""
    from heliostat.apps.search import build, reranking
    from heliostat.apps.search.search import MODES, SearchIndex
    from heliostat.storage.locations import Location

    build.require()
    if (question is None) == (questions is None):
        raise ConfigError(
            "QUESTION: the command needs one question. Pass exactly one of a question and --questions FILE. "
            "Quote a question with spaces"
        )
    if mode is not None and mode not in MODES:
        raise ConfigError(f"--mode: unknown mode ({mode}). Use {', '.join(MODES)}")
    if question is not None and not question.strip():
        raise ConfigError("QUESTION: is empty. Write a question in quotes")
    if question is not None and question.encode("utf-8", "replace").decode() != question:
        raise ConfigError(f"QUESTION: isn't valid UTF-8 ({question[:80]!r}). Check the terminal's encoding")
    opened = SearchIndex(Location(index), model_folder(embedder, mlflow) if embedder else None)
    ordering = model_folder(reranker, mlflow) if reranker else None
    if ordering is not None:
        reranking.require(ordering)
    if questions is not None:
        if model is not None or mode is not None:
            option = "--model" if model else "--mode"
            raise ConfigError(f"{option}: not with --questions, which measures every mode. Remove one option")
        _judge(opened, questions, ordering)
        return
    assert question is not None
    answering = model_folder(model, mlflow) if model else None
    way, orders = mode or "bm25", reranking.Reranker(ordering) if ordering else None
    passages_found = reranking.best(opened, orders, question, way, top)
    passages: list[Passage] = [{**passage, "columns": opened.columns(passage["document"])} for passage in passages_found]
    report = {"index": index, "dataset": opened.record["dataset"], "mode": way, "question": question, "passages": passages}
    report |= {"reranker": orders.facts()} if orders else {}
    if answering is not None and passages:
        from heliostat.apps.search.answering import answer

        report["answer"] = answer(answering, question, passages, max_tokens)
    _print_found(report)
    finish(report)


def _print_found(result: Report) -> None:
    passages, answer = result["passages"], result.get("answer")
    if answer:
        out.print(answer["text"])
        if answer["passages_used"] < len(passages) or answer["cut"]:
            part = ", the last one cut" if answer["cut"] else ""
            used = f"the first {answer['passages_used']} of {len(passages)} passages{part}"
            out.print(f"(from {used}: the model's context has no room for more)")
        out.print("")
    for number, passage in enumerate(passages, 1):
        url = f" {passage['columns']['url']}" if passage["columns"].get("url") else ""
        out.print(f"[{number}] {passage['document']}{url}", style="bold")
        out.print(f"    {_scores(passage)}, passage {passage['number']}, characters {passage['begin']:,} to "
                  f"{passage['end']:,}, shard {passage['shard']}, row group {passage['row_group']}")  # fmt: skip
        if not answer:
            text = passage["text"].strip()
            out.print(text[:SHOWN] + (" ..." if len(text) > SHOWN else "") + "\n")
    if not passages:
        out.print("no passage has a word of the question")


def _scores(passage: Report) -> str:
    """Formats the scores of a passage. The first score is the one by which passages are sorted."""
    searched = f"{passage['scored_by']} score {passage['score']:.4g}"
    if "rerank_score" not in passage:
        return searched
    cut = " of its beginning" if passage["rerank_cut"] else ""
    return f"rerank score{cut} {passage['rerank_score']:.4g}, {searched}"


def _judge(index: SearchIndex, file: Path, reranker: Path | None) -> None:
    from heliostat.apps.search import judging, reranking

    result = judging.judge(index, judging.questions(file), reranking.Reranker(reranker) if reranker else None)
    rows = [["search", *judging.MEASURES]]
    for mode, measured in result["modes"].items():
        rows.append([mode, *(f"{measured[name]:.3f}" for name in judging.MEASURES)])
    for mode, over in result["over_bm25"].items():
        rows.append([f"{mode} over bm25", *("{:+.3f} ± {:.3f}".format(*over[name]) for name in judging.MEASURES)])
    for mode, over in result.get("reranked", {}).items():
        if mode != "bm25":  # the rows above already compare with bm25
            rows.append([f"{mode}+reranker over {mode}", *("{:+.3f} ± {:.3f}".format(*over[name]) for name in judging.MEASURES)])
    print_table(rows)
    left = f"; {result['unknown']:,} other questions name documents that the index doesn't have" if result["unknown"] else ""
    left += f"; {result['too_long']:,} other questions are too long for the embedder" if result["too_long"] else ""
    out.print(f"{result['questions']:,} questions{left}; ± is half the width of the 95 % interval of the difference")
    finish(result)
