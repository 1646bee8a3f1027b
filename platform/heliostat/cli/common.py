"""Defines what commands share: the application that they register with, standard output, options, and how a result is printed.

A command prints its result for people, or with `--json` as one object; `finish` ends it. Options and arguments that mean the same
everywhere are types here, so that their help is written once.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from heliostat.cli import tables
from heliostat.errors import ConfigError, HeliostatError, StorageError
from heliostat.redact import carries_secret
from heliostat.text import printable

if TYPE_CHECKING:
    from heliostat.storage.locations import Location

HELP = {"help_option_names": ["--help", "-h"]}

DATA, TRAINING, MODELS, RUNS = "Data", "Training", "Models", "Runs"  # headings of `heliostat --help`
SWEEPS, CLUSTERS, JOBS = "Sweeps", "Clusters", "Jobs on clusters"
PANELS = (DATA, TRAINING, MODELS, RUNS, SWEEPS, CLUSTERS, JOBS)  # in this order


class Commands(typer.core.TyperGroup):
    """Lists the commands of one heading together."""

    def list_commands(self, ctx: object) -> list[str]:
        panels = {name: getattr(command, "rich_help_panel", None) for name, command in self.commands.items()}
        return sorted(self.commands, key=lambda name: PANELS.index(panels[name]) if panels[name] in PANELS else len(PANELS))


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, context_settings=HELP)


class Printer(Console):
    """Prints to standard output, so that what comes from data moves no cursor and marks up nothing."""

    def print(self, *objects: object, **options: Any) -> None:
        super().print(*(printable(o, lines=True) if isinstance(o, str) else o for o in objects), **{"markup": False, **options})


out = Printer(highlight=False, soft_wrap=True, markup=False)


def require_file(place: Location) -> None:
    """Raises, before the work, if what it makes cannot be written to the file that `--out` names."""
    try:
        place.require_file()
    except StorageError as e:
        raise type(e)(f"--out: {e}") from e


def flag(*names: str, help: str, **more: Any) -> Any:
    """Makes an option without a value."""
    return typer.Option(*names, help=help, metavar="", **more)


JobFile = Annotated[Path, typer.Argument(help="A job file, as jobs/quickstart.yaml", metavar="JOB", show_default=False)]
Run = Annotated[str, typer.Argument(help="A run id, or a run's folder (STORAGE/NAME)", metavar="RUN", show_default=False)]
Model = Annotated[
    str, typer.Argument(help="models:/NAME/VERSION, a run id, or a model's folder", metavar="MODEL", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the file, as train.optimizer.lr=1e-3; may be repeated"),
]
Json = Annotated[bool, flag("--json", help="Print one JSON object, on errors too (docs/cli.md)")]
Verbose = Annotated[bool, flag("--verbose", "-v", help="Show the logs of Ray and of the workers, and tracebacks")]
OnCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", "-c", help="A cluster that runs on this machine: its file or name; the default is RAY_ADDRESS, or none"
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option("--mlflow", metavar="URI", help="MLflow's store; the default is MLFLOW_TRACKING_URI, then the quickstart's"),
]

Keys = Annotated[
    Path, typer.Option(help="A file of API keys, a key or NAME KEY a line; one that is not there is made, with a new key")
]


def keys_of(place: Path | None) -> Callable[[], dict[str, str] | None]:
    """Checks a file of keys that is there, and returns what reads it; one that is not there is made only then."""
    from heliostat.web import keys

    def known() -> dict[str, str] | None:
        if place is None:
            return None
        if keys.made(place):
            out.print(f"a new API key is in {place}")
        return keys.read(place)

    if place is not None and place.exists():
        keys.read(place)
    return known


def print_page(url: str, place: Path) -> None:
    """Prints where a page is; on a terminal with the key, behind the #, which browsers send nowhere."""
    from heliostat.web import keys

    if out.is_terminal:
        out.print(f"the page is at {url}#key={keys.first(place)}")
    else:
        out.print(f"the page is at {url}; it asks for a key, one of those in {place}")


def program(elsewhere: bool = False) -> str:
    """Tells how this program is called in the person's shell: by its name, or as it was, as `.venv/bin/heliostat`, from another
    folder by its whole path."""
    called = sys.argv[0]
    if Path(called).name != "heliostat" or shutil.which("heliostat"):
        return "heliostat"
    return str(Path(called).absolute()) if elsewhere else called


def print_table(rows: list[list[str]], left: Collection[int] = (0,)) -> None:
    """Prints rows of cells, the head first, none cut; what is piped on has one line a row."""
    for line in tables.lines(rows, left, out.width if out.is_terminal else None):
        out.print(line)


def store_uri(given: str | None) -> str:
    """Finds the MLflow store that a command is to ask: as given, of the environment, or the quickstart's."""
    if given and carries_secret(given):
        raise ConfigError(
            "--mlflow: carries a password, which every user of this machine can see; set MLFLOW_TRACKING_URI instead, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if given and given.startswith("sqlite:///") and not Path(given.removeprefix("sqlite:///").partition("?")[0]).exists():
        raise ConfigError(f"--mlflow: {given}: there is no such file")
    from heliostat.tracking.mlflow_client import default_uri

    return given or default_uri()


def finish(result: Mapping[str, object], json_: bool, fault: HeliostatError | None = None) -> None:
    """Prints a command's result as one JSON object, if it is asked for; raises `fault`, which then carries the result."""
    if fault:
        fault.found = result
        raise fault
    if json_:
        write_json(result)


def write_json(result: Mapping[str, object]) -> None:
    """Writes one object on one line; JSON has no NaN and no infinity, so they are null."""
    sys.stdout.write(json.dumps(_finite(result), allow_nan=False) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
