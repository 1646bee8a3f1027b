"""Train models on Ray: from raw data to a registered model. Without a command, show what to do next in this folder.
Exit codes: 0 done, 1 failed, 2 rejected, 130 stopped.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, TypedDict

import typer
from rich.table import Table
from rich.text import Text

import heliostat
from heliostat.cli.common import app, finish, out, write_json
from heliostat.cli.groups import UsageError
from heliostat.cli.options import flag
from heliostat.cli.usage import explain
from heliostat.errors import HeliostatError
from heliostat.redact import Formatter, excepthook, redact
from heliostat.terminal import console
from heliostat.text import printable

# isort: off
# Each module registers its commands; groups list them in this order
from heliostat.cli import data, curation, train, plan, inference, benchmark  # noqa: F401
from heliostat.cli import retrieval, serving, runs, tune, cluster, jobs, next_steps  # noqa: F401
# isort: on

STAMP = "%Y-%m-%d %H:%M:%S"  # of log lines
QUIET = {  # turns off progress bars and messages of libraries
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"heliostat {heliostat.__version__}")
        raise typer.Exit


@app.callback(help=" ".join(__doc__.split()), invoke_without_command=True)
def heliostat_(
    context: typer.Context,
    version: Annotated[bool, flag("--version", callback=_version, is_eager=True, help="Print the version")] = False,
    json_: Annotated[bool, flag("--json", help="Print one JSON object", hidden=True)] = False,
) -> None:
    """Handles options before the command. Without a command, shows what to do next."""
    out.quiet = json_
    if context.invoked_subcommand is None:
        status = next_steps.status(Path())
        for line in next_steps.lines(status):
            out.print(line)
        finish(status)


def main() -> None:
    verbose, json_ = bool({"--verbose", "-v"} & set(sys.argv)), "--json" in sys.argv
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    start_logs(verbose)
    sys.excepthook = excepthook
    try:
        code = _run(json_, verbose)
    except Exception as e:  # a bug: the traceback follows
        if json_:
            write_json({"error": described(e)})
        raise
    finally:
        atexit.register(_nothing_more)  # registered last, so it runs before the exit functions of imported libraries
    sys.exit(code)


def _run(json_: bool, verbose: bool) -> int:
    """Runs the command, reports the command's error, and returns the exit code."""
    ended: BaseException = KeyboardInterrupt()
    try:
        if (code := app(prog_name="heliostat", standalone_mode=False) or 0) != 130:
            return code  # for Ctrl-C, typer returns 130 and prints nothing
    except (HeliostatError, UsageError, KeyboardInterrupt, typer.Abort) as e:
        ended = e
    if type(ended).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{ended.format_message()}\n")  # type: ignore[attr-defined]
        return 2
    if verbose and isinstance(ended, HeliostatError):
        logging.getLogger("heliostat").error("traceback", exc_info=ended)
    description = described(ended)
    line = description["message"] if description["type"] == "Interrupted" else f"error: {description['message']}"
    sys.stderr.write(f"{printable(line, lines=True)}\n")
    if json_:
        write_json({**getattr(ended, "found", {}), "error": description})
    return description["exit_code"]


class DescribedCommand(TypedDict):
    type: str
    message: str
    exit_code: int


def described(error: BaseException) -> DescribedCommand:
    """Describes an error as the field `error` of a JSON result."""
    kind, message, code = type(error).__name__, str(error), getattr(error, "exit_code", 1)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        kind, message, code = "Interrupted", "interrupted", 130
    elif isinstance(error, UsageError):
        kind, message, code = "UsageError", explain(error), 2
    return {"type": kind, "message": redact(message), "exit_code": code}


def _nothing_more() -> None:
    """Ensures that the result is the last line of standard output. When Ray ends, Ray may print more text, and this text then
    goes to standard error."""
    sys.stdout.flush()
    sys.stdout = sys.stderr


class LogLines(Formatter):
    """Formats log lines without secrets. Escapes characters that would move a terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


class Terminal(logging.Handler):
    """Prints log lines above the live progress line. If a message has several lines, all lines after the first are indented by
    the width of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.began = datetime.now().date()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            row = Table.grid(padding=(0, 1))
            row.add_column(style="dim", no_wrap=True)
            row.add_column(overflow="fold")
            row.add_row(stamp(datetime.fromtimestamp(record.created), self.began), Text(self.format(record)))
            console.print(row)
        except Exception:  # noqa: BLE001 (as in logging's handlers: a log line must not end a run)
            self.handleError(record)


def start_logs(verbose: bool) -> None:
    """Sends logs to standard error: warnings of libraries, and heliostat's messages from level `info`, or from `debug` with
    `verbose`."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = Terminal()
        handler.setFormatter(LogLines("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(LogLines("%(asctime)s %(message)s", STAMP))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("heliostat").setLevel(logging.DEBUG if verbose else logging.INFO)


def stamp(at: datetime, began: date) -> str:
    """Formats a time for the terminal. Adds the date only if the date differs from `began`, the day of the command's start."""
    return at.strftime("%H:%M:%S" if at.date() == began else STAMP)
