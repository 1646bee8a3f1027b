"""Serves models: `heliostat model` serve, play."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import command, keys_of, model_folder, out, print_page, store_uri
from heliostat.cli.groups import MODEL
from heliostat.cli.options import Embedder, Engine, Keys, OnCluster, Reranker, TrackingUri, argument, flag
from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from heliostat.apps.serve.served import ServedModels

AnyModel = Annotated[
    str | None, argument("[MODEL]", "models:/NAME/VERSION, models:/NAME@ALIAS, a run id, or a model's folder", completion.models)
]
Index = Annotated[
    str | None,
    typer.Option(
        "--index",
        metavar="INDEX",
        help="Index of `heliostat search index` to serve in addition to the model: a folder or s3:// URI",
    ),
]
Open = Annotated[bool, flag("--no-keys", help="Answer requests without a key")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Maximum number of tokens of an answer")]


@command(MODEL, example="models:/quickstart-lm/1 --port 8000", reports=False)
def serve(
    model: AnyModel = None,
    index: Index = None,
    embedder: Embedder = None,
    reranker: Reranker = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients", show_default="its own name")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="LoRA adapter to serve in addition to the model, under this name; may be repeated"
        ),
    ] = None,
    keys: Keys = Path(".heliostat/serve/keys"),
    open_: Open = False,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1")] = 8000,
    replicas: Annotated[str, typer.Option(help="Number of replicas, or a range by load, such as 1..4")] = "1",
    engine: Engine = "auto",
    batch: Annotated[int, typer.Option(help="Batch size of a replica, in prompts")] = 16,
    max_tokens: MaxTokens = 1024,
    max_body: Annotated[int, typer.Option(help="Maximum number of bytes of a request")] = 1 << 20,
    concurrent: Annotated[int, typer.Option(help="Maximum number of concurrent requests per key; 0: no limit")] = 256,
    per_minute: Annotated[int, typer.Option(help="Maximum number of requests per key and per minute; 0: no limit")] = 0,
    deadline: Annotated[float, typer.Option(help="Maximum number of seconds of an answer")] = 300.0,
    poll: Annotated[float, typer.Option(help="Seconds between two checks whether the alias has a new version")] = 2.0,
    cluster: OnCluster = None,
    stop: Annotated[bool, flag("--stop", help="Stop the endpoint that a killed command left on the cluster")] = False,
    mlflow: TrackingUri = None,
) -> None:
    """Serve a model, an index, or both over HTTP with OpenAI's API. Follows an alias of the registry."""
    from heliostat.cluster.endpoint import join

    join(cluster)
    from heliostat import extras
    from heliostat.apps.serve import run
    from heliostat.apps.serve.served import Options, replica_range
    from heliostat.schema import validate

    extras.require("serve", "watchfiles", what="heliostat model serve")
    if stop:
        out.print("stopped the endpoint" if run.stop() else "no endpoint on this cluster")
        return
    flags = {"port": port, "replicas": replica_range(replicas), "engine": engine, "batch": batch, "max_tokens": max_tokens,
             "poll_s": poll, "body_bytes": max_body, "at_once": concurrent, "a_minute": per_minute,
             "deadline_s": deadline}  # fmt: skip
    options = validate(Options, flags, "serve")
    if open_ and keys != Path(".heliostat/serve/keys"):
        raise ConfigError("--no-keys: not with --keys. Remove one of the two")
    served = _served(model, name, index, embedder, reranker, mlflow).with_adapters(adapter or [])
    called = " and ".join(one for one in (served.name, *served.adapters, served.index_name) if one)

    def ready(url: str) -> None:
        out.print(f"{called} is served at {url}" + ("" if open_ else f"; the keys are in {keys}"))

    run.serve(served, keys_of(None if open_ else keys), options, ready)
    raise typer.Exit(130)


@command(MODEL, example="models:/quickstart-lm/1", reports=False)
def play(
    model: AnyModel = None,
    index: Index = None,
    embedder: Embedder = None,
    reranker: Reranker = None,
    keys: Keys = Path(".heliostat/play/keys"),
    open_: Open = False,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1")] = 7860,
    max_tokens: MaxTokens = 1024,
    mlflow: TrackingUri = None,
) -> None:
    """Open a web page to try a model or an index: write, complete code, chat, draw, ask."""
    from heliostat import extras
    from heliostat.schema import validate

    extras.require("play", "starlette", "uvicorn", what="heliostat model play")
    from heliostat.apps.play import app as page
    from heliostat.apps.serve.served import Options

    if open_ and keys != Path(".heliostat/play/keys"):
        raise ConfigError("--no-keys: not with --keys. Remove one of the two")
    options = validate(Options, {"port": port, "max_tokens": max_tokens, "at_once": 64, "batch": 8}, "play")
    served = _served(model, None, index, embedder, reranker, mlflow)

    def ready(url: str) -> None:
        if open_:
            out.print(f"the page is at {url}")
        else:
            print_page(url, keys)

    page.play(served, keys_of(None if open_ else keys), options, ready)
    raise typer.Exit(130)


def _served(
    model: str | None, name: str | None, index: str | None, embedder: str | None, reranker: str | None, mlflow: str | None
) -> ServedModels:
    from heliostat.apps.serve.served import served

    store = store_uri(mlflow)
    if index is not None:
        from heliostat.apps.search import build

        build.require()
    return served(model, store, name, index, *(model_folder(one, mlflow) if one else None for one in (embedder, reranker)))
