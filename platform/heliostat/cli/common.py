"""Defines code that all commands use: the application in which commands are registered, standard output, and functions that print
results.

`command` registers a command. A command that reports prints its result as text to `out`, and ends with `finish`. With `--json`,
`out` prints nothing, and `finish` prints the result as one JSON object.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from heliostat.cli import groups
from heliostat.cli.options import flag
from heliostat.errors import ConfigError, HeliostatError, StorageError
from heliostat.redact import carries_secret
from heliostat.text import printable

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from heliostat.storage.locations import Location

GAP = "  "  # gap between the columns of a table
INDENT = "    "  # indentation of a row's continuation lines
Report = dict[str, Any]  # a command's result, as `--json` prints it
HELP = {"help_option_names": ["--help", "-h"]}


app = typer.Typer(cls=groups.Root, pretty_exceptions_enable=False, context_settings=HELP)
apps = {groups.TOP: app}
for _name, _help in groups.GROUPS.items():
    apps[_name] = typer.Typer(cls=groups.CommandGroup, no_args_is_help=True, context_settings=HELP, help=_help)
    app.add_typer(apps[_name], name=_name, rich_help_panel="Groups of commands")


class Printer(Console):
    """Prints to standard output. Text that comes from data can't move the cursor, and markup in this text has no effect."""

    def print(self, *objects: object, **options: Any) -> None:
        if not self.quiet:
            shown = (printable(o, lines=True) if isinstance(o, str) else o for o in objects)
            super().print(*shown, **{"markup": False, **options})


out = Printer(highlight=False, soft_wrap=True, markup=False)


REPORTING = typer.Typer(add_completion=False)


def _be_quiet(quiet: bool) -> None:
    out.quiet = out.quiet or quiet


@REPORTING.command()
def _reporting(
    json_: Annotated[
        bool,
        flag(
            "--json",
            help="Print one JSON object, even if the command fails (docs/cli.md)",
            callback=_be_quiet,
            expose_value=False,
        ),
    ] = False,
) -> None:
    """Defines the option `--json` of all commands that report."""


@cache
def _reporting_options() -> list[Any]:
    """Returns the option `--json`. All commands share it, because typer needs a millisecond to make one."""
    return [p for p in typer.main.get_command(REPORTING).params if p.name == "json_"]


class Reporting(groups.RenamingCommand):
    """Adds the option `--json`, which prints only the result as a JSON object."""

    def __init__(self, name: str | None, **options: Any) -> None:
        super().__init__(name, **options)
        self.params += _reporting_options()


def command(
    group: str, name: str | None = None, *, example: str, reports: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command in a group of `groups`, or at the top level. The function's docstring is the help text. Lists of
    commands show the docstring's first sentence.

    `name`: the command's name, by default the function's name. `example`: example arguments for the help text. `reports`: whether
    the command has `--json`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        called = name or function.__name__.strip("_").replace("_", "-")
        words = " ".join(filter(None, ("heliostat", group, called, example)))
        kind = Reporting if reports else groups.RenamingCommand
        first = (function.__doc__ or "").partition(". ")[0].removesuffix(".") + "."
        return apps[group].command(called, cls=kind, short_help=first, epilog=f"Example: {words}")(function)

    return register


def require_file(place: Location) -> None:
    """Raises an error, before the work starts, if the file given by `--out` can't be written."""
    try:
        place.require_file()
    except StorageError as e:
        raise type(e)(f"--out: {e}") from e


def keys_of(place: Path | None) -> Callable[[], dict[str, str] | None]:
    """Checks the file of API keys, if the file exists. Returns a function that reads the file. If the file is missing, this
    function first creates the file."""
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
    """Prints the address of a page. On a terminal, the address contains the key after `#`, which browsers don't send."""
    from heliostat.web import keys

    if out.is_terminal:
        out.print(f"the page is at {url}#key={keys.first(place)}")
    else:
        out.print(f"the page is at {url}; enter one of the keys in {place}")


def program(elsewhere: bool = False) -> str:
    """Returns the words that run heliostat in the user's shell: the program's name, or the program's path if the name isn't on
    the PATH.

    `elsewhere`: whether the words must work in another folder. If so, the path is absolute.
    """
    called = sys.argv[0]
    if Path(called).name != "heliostat" or shutil.which("heliostat"):
        return "heliostat"
    return str(Path(called).absolute()) if elsewhere else called


def print_table(rows: list[list[str]], left: Collection[int] = (0,)) -> None:
    """Prints a table, with the header first. Never shortens a cell. Without a terminal, each row is one line."""
    for line in table_lines(rows, left, out.width if out.is_terminal else None):
        out.print(line)


def table_lines(rows: Sequence[Sequence[str]], left: Collection[int] = (0,), width: int | None = None) -> list[str]:
    """Formats a table, with the header first. Columns in `left` are aligned to the left, all others to the right.

    `width`: characters per line of the terminal. None: each row is one line.
    """
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [line for row in rows for line in _lines(row, widths, left, width)]


def _lines(row: Sequence[str], widths: list[int], left: Collection[int], width: int | None) -> list[str]:
    cells = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
    parts = [GAP.join(cells[begin:end]).rstrip() for begin, end in bands(widths, width)]
    return [parts[0], *(INDENT + part for part in parts[1:] if part)]


def bands(widths: Sequence[int], width: int | None) -> list[tuple[int, int]]:
    """Splits a table that is too wide into groups of columns, each [begin, end). A row is printed with one line per group. A
    group has as many columns as fit into `width` characters, but at least one column."""
    columns, begin, used = list[tuple[int, int]](), 0, 0
    for i, one in enumerate(widths):
        if width is not None and i > begin and used + len(GAP) + one > width:
            columns.append((begin, i))
            begin, used = i, len(INDENT) + one
        else:
            used += one + (len(GAP) if i > begin else 0)
    return [*columns, (begin, len(widths))]


def store_uri(uri: str | None) -> str:
    """Returns the URI of the MLflow store: from the option, from the environment, or the default. Raises ConfigError if the URI
    isn't valid."""
    if uri and carries_secret(uri):
        raise ConfigError(
            "--mlflow: has a password, which every user of this machine can see. Set MLFLOW_TRACKING_URI instead, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    from heliostat.config.spec import require_store
    from heliostat.storage.local_files import require_database
    from heliostat.storage.model_sources import default_uri

    if not uri:
        return default_uri()
    require_store("--mlflow", uri)
    if uri.startswith("sqlite:///"):
        place = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        if not place.exists():
            raise ConfigError(
                f"--mlflow: no such file ({place}). Pass the path of an MLflow database, which `heliostat train` creates"
            )
        require_database("--mlflow", place)
    return uri


def run_folder(run: str, mlflow: str | None) -> Location:
    """Finds the folder of a run by the run's id or path. Raises ConfigError if the run doesn't exist."""
    from heliostat.tracking.models import find_run

    return find_run(run, store_uri(mlflow))


def model_folder(model: str, mlflow: str | None) -> Path:
    """Finds or downloads the folder of a model. Raises ConfigError if the model doesn't exist."""
    from heliostat.tracking.models import resolve

    return resolve(model, store_uri(mlflow))


@contextmanager
def tracking(mlflow: str | None) -> Iterator[tuple[MlflowClient, str]]:
    """Connects to the MLflow store; yields its client and its URI. Raises TrackingError if a call in the `with` block fails."""
    from heliostat.tracking import mlflow_client

    uri = store_uri(mlflow)
    with mlflow_client.asking(uri):
        yield mlflow_client.connect(uri), uri


def write_page(to: Path, page: Callable[[], str]) -> None:
    """Writes an HTML page to the file given by `--out`. If the file's folder doesn't exist, raises ConfigError before it calls
    `page`."""
    if not to.absolute().parent.is_dir():
        raise ConfigError(f"--out: no such folder ({to.parent}). Create it first, or pass another path")
    text = page()
    try:
        to.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--out: can't write {to} ({e.strerror}). Pass another path") from e
    out.print(f"{to}: {to.stat().st_size:,} bytes")


def finish(result: Mapping[str, object], fault: HeliostatError | None = None) -> None:
    """Ends a command. With `--json`, prints the result as one JSON object. If there is a `fault`, attaches the result to this
    error and raises the error."""
    if fault:
        fault.found = result
        raise fault
    if out.quiet:
        write_json(result)


def write_json(result: Mapping[str, object]) -> None:
    """Writes an object on one line. NaN and infinity become null, because JSON doesn't have these values."""
    sys.stdout.write(json.dumps(_finite(result), allow_nan=False) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
