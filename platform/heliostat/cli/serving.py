"""Serves models: `heliostat serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.common import MODELS, Model, TrackingUri, app, flag, out, store_uri
from heliostat.errors import ConfigError


@app.command(rich_help_panel=MODELS)
def serve(
    model: Model,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the default is its own name")] = None,
    keys: Annotated[
        Path, typer.Option(help="A file of API keys, a key or NAME KEY a line; one that is not there is made, with a new key")
    ] = Path(".heliostat/serve/keys"),
    open_: Annotated[bool, flag("--no-keys", help="Answer whoever can reach the port, without a key")] = False,
    port: Annotated[int, typer.Option(help="On 127.0.0.1")] = 8000,
    replicas: Annotated[str, typer.Option(help="So many, as 2, or by load, as 1..4")] = "1",
    batch: Annotated[int, typer.Option(help="Prompts that a replica steps together")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most")] = 1024,
    max_body: Annotated[int, typer.Option(help="Bytes of a request, at most")] = 1 << 20,
    concurrent: Annotated[int, typer.Option(help="Requests of a key at a time; 0 is no limit")] = 256,
    per_minute: Annotated[int, typer.Option(help="Requests of a key in a minute; 0 is no limit")] = 0,
    deadline: Annotated[float, typer.Option(help="Seconds for an answer as a whole")] = 300.0,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at the alias")] = 2.0,
    mlflow: TrackingUri = None,
) -> None:
    """Serve a language model over HTTP, as OpenAI's API: an alias of the registry is followed."""
    from heliostat import extras
    from heliostat.config.schema import validate
    from heliostat.serving import keys as files
    from heliostat.serving import options, run
    from heliostat.serving.versions import Source

    extras.require("serve", "watchfiles", what="heliostat serve")
    given = {"port": port, "replicas": options.replicas(replicas), "batch": batch, "max_tokens": max_tokens, "poll_s": poll,
             "body_bytes": max_body, "at_once": concurrent, "a_minute": per_minute, "deadline_s": deadline}  # fmt: skip
    asked = validate(options.Options, given, "serve")
    if open_ and keys != Path(".heliostat/serve/keys"):
        raise ConfigError("--no-keys: goes without --keys")
    source = Source(model, store_uri(mlflow))
    run.require_free(port)
    if not open_ and files.made(keys):
        out.print(f"a new API key is in {keys}")
    known = None if open_ else files.read(keys)
    called = name or source.name

    def ready(url: str) -> None:
        out.print(f"{called} is served at {url}" + ("" if open_ else f"; the keys are in {keys}"))

    run.serve(source, called, known, asked, ready)
    raise typer.Exit(130)
