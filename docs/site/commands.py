"""Writes the reference of the command line from its typer application, in the words of `--help`, and that of the exit codes from
the typed errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from heliostat import errors

from docs.site.keys import linked


def leaves(command: Any, path: tuple[str, ...] = ("heliostat",)) -> Iterator[tuple[str, Any]]:
    """Yields (name, command) of all that can be typed, in the order of `--help`."""
    if not hasattr(command, "commands"):
        yield " ".join(path), command
        return
    for name, inner in command.commands.items():
        if not inner.hidden:
            yield from leaves(inner, (*path, name))


def reference(app: typer.Typer) -> str:
    """Writes every command with its arguments and options as Markdown."""
    group: Any = typer.main.get_command(app)
    found, lines, heading = list(leaves(group)), [], None
    for name, command in found:
        below = group.commands[name.split()[1]]
        under = f"**`{below.name}`**: {prose(below.help)}" if hasattr(below, "commands") else "**Without a group**"
        lines += ["", under, ""] if under != heading else []
        heading = under
        lines.append(f"- [`{name}`](#{name.replace(' ', '-')}): {prose(command.short_help)}")
    for name, command in found:
        context = typer.Context(command)
        lines += ["", f"## `{name}`", "", prose(command.help), ""]
        lines += ["```sh", command.epilog.removeprefix("Example: "), "```", ""]
        for parameter in command.params:
            record = None if parameter.name == "help" else parameter.get_help_record(context)
            if record:
                spelled, told = record
                told, _, facts = re.sub(r"\s*\[([^][]*)\]$", r"\0\1", told).partition("\0")
                facts = f"<small>({facts})</small>" if facts and not facts.startswith("default: no-") else ""
                lines += [f"`{spelled.partition(' / --no-')[0]}` {facts}".rstrip(), f":   {prose(told) or '-'}", ""]
    return "\n".join(lines)


def prose(help: str | None) -> str:
    """Converts a help text to Markdown: a line for each paragraph, and nothing in it that marks up by accident."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", help or "")]
    return linked("\n\n".join(re.sub(r"(?<![`\w])[<*_]|\*", r"\\\g<0>", p) for p in paragraphs))


def exit_codes() -> str:
    """Writes a table of which error ends a command with which exit code, from the classes of `heliostat.errors`."""
    lines = ["| error | exit code | meaning |", "|---|---|---|"]
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.HeliostatError) and error is not errors.HeliostatError:
            lines.append(f"| `{name}` | {error.exit_code} | {' '.join((error.__doc__ or '').split())} |")
    return "\n".join(lines)
