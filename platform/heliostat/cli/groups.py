"""Groups the commands, and translates names of earlier versions into current names.

The tree has two levels: `heliostat GROUP COMMAND`. Five commands have no group. `RENAMED` and `OPTIONS` list the names of version
0.1. These old names still work in the version after 0.1. Each use of an old name prints a line on standard error.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from typing import Any

import typer

TOP, DATA, RUN, MODEL, SWEEP, JOB, CLUSTER, SEARCH, DEBUG = (
    "", "data", "run", "model", "sweep", "job", "cluster", "search", "debug",
)  # fmt: skip
FIRST = ("init", "check", "plan", "train", "submit")  # commands without a group, in the order of use
GROUPS = {
    DATA: "Datasets: prepare, index, trace, forget, report.",
    RUN: "Training runs: list, report, lineage, checkpoints, verify, ui.",
    MODEL: "Models: generate, evaluate, export, benchmark, serve, promote.",
    SWEEP: "Hyperparameter searches: run, list, show, stop.",
    JOB: "Jobs on clusters: list, status, logs, stop, resume.",
    CLUSTER: "Ray clusters from YAML: check, up, down, status, list.",
    SEARCH: "Document search: index a dataset, ask it a question.",
    DEBUG: "Fault injection, profiles, and repeated runs.",
}
RENAMED = {
    **{name: f"data {name}" for name in ("prepare", "index", "trace", "forget")},
    "curate report": "data report", "curate train-classifier": "data train-classifier",
    **{name: f"run {name}" for name in ("report", "lineage", "ui", "checkpoints", "verify", "goodput", "samples")},
    **{name: f"model {name}" for name in ("generate", "infer", "evaluate", "export", "benchmark", "make-suite", "serve", "play",
                                          "promote")},
    **{name: f"job {name}" for name in ("status", "logs", "stop", "resume")},
    **{name: f"debug {name}" for name in ("chaos", "profile", "reproduce")},
    "runs": "run list", "jobs": "job list", "tune": "sweep run", "sweeps": "sweep list",
    "index-documents": "search index", "ask": "search ask",
}  # fmt: skip
OPTIONS = {  # command -> old name of an option -> new name
    "model export": {"--to": "--out"},
    "model evaluate": {"--data": "--dataset"},
    "plan": {"--write": "--out"},
}
SYNONYMS = {  # command of another tool -> heliostat's command
    **dict.fromkeys(("start", "fit", "finetune", "fine-tune", "launch"), "train"),
    **dict.fromkeys(("new", "create", "setup"), "init"),
    **dict.fromkeys(("validate", "lint", "doctor"), "check"),
    **dict.fromkeys(("eval", "test", "score"), "model evaluate"),
    **dict.fromkeys(("predict", "inference", "batch"), "model infer"),
    **dict.fromkeys(("sample", "complete", "write", "draw"), "model generate"),
    **dict.fromkeys(("convert", "save"), "model export"),
    **dict.fromkeys(("preprocess", "tokenize", "dataset", "datasets"), "data prepare"),
    **dict.fromkeys(("ls", "history"), "run list"), **dict.fromkeys(("mlflow", "dashboard", "view"), "run ui"),
    **dict.fromkeys(("kill", "cancel"), "job stop"), **dict.fromkeys(("remove", "delete", "rm"), "data forget"),
    "estimate": "plan", "chat": "model play", "deploy": "model serve", "serving": "model serve", "curate": "data report",
    "ps": "job list", "hpo": "sweep run", "clusters": "cluster list", "models": "run list",
    "version": "--version", "help": "--help",
    **dict.fromkeys(("cluster start", "cluster create", "cluster launch"), "cluster up"),
    **dict.fromkeys(("cluster stop", "cluster delete"), "cluster down"), "cluster ls": "cluster list", "sweep ls": "sweep list",
    "job ls": "job list", "run show": "run report", "sweep start": "sweep run", "search query": "search ask",
}  # fmt: skip


UsageError: Any = typer.BadParameter.__base__  # typer exports only its subclass


class RenamingCommand(typer.core.TyperCommand):
    """Replaces options of earlier versions by current options."""

    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = OPTIONS.get(ctx.command_path.partition(" ")[2], {})
        words, rest = split(args)
        for i, word in enumerate(words):
            option, mark, value = word.partition("=")
            if new := names.get(option):
                words[i] = f"{new}{mark}{value}"
                notice(ctx, option, new)
        try:
            return super().parse_args(ctx, [*words, *rest])
        except UsageError as e:
            e.ctx = e.ctx or ctx  # typer omits it if an option lacks its value
            raise


class Root(typer.core.TyperGroup):
    """Lists commands and groups in the order of use, and replaces commands of earlier versions by current commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = without_types(super().get_params(ctx))
        for parameter in params:
            if parameter.name == "install_completion":
                parameter.help = "Install completion for this shell"
            parameter.hidden = parameter.hidden or parameter.name == "show_completion"
        return params

    def list_commands(self, ctx: object) -> list[str]:
        order = [*FIRST, *GROUPS]
        return sorted(self.commands, key=order.index)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        old, new, rest = current(args)
        if new:
            notice(ctx, f"heliostat {old}", f"heliostat {new}")
        return super().resolve_command(ctx, [*new.split(), *rest])


class CommandGroup(typer.core.TyperGroup):
    """Holds the commands of one group."""

    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))


def without_types(params: list[Any]) -> list[Any]:
    """Removes the value type from typer's own flags. Otherwise, the type would appear in the help, and checking the type would
    import pydantic."""
    for parameter in params:
        if parameter.name in ("help", "install_completion", "show_completion"):
            parameter.metavar, parameter.default = "", False
    return params


def current(words: list[str]) -> tuple[str, str, list[str]]:
    """Splits a command line into an old command, its current name, and the other words.

    Both names are empty if the words begin with a command of this version.
    """
    known = ("run", "list", "show", "stop", "--help", "-h")
    if len(words) > 1 and words[0] == SWEEP and words[1] not in known and f"sweep {words[1]}" not in SYNONYMS:
        rest = [word for word in words[1:] if word != "--stop"]  # `sweep NAME` and `sweep NAME --stop`
        return ("sweep", "sweep show", rest) if len(rest) == len(words) - 1 else ("sweep --stop", "sweep stop", rest)
    for length in (2, 1):
        old = " ".join(words[:length])
        if old in RENAMED and len(words) >= length:
            return old, RENAMED[old], words[length:]
    return "", "", words


def notice(ctx: Any, old: str, new: str) -> None:
    """Prints on standard error that a name has changed, except during shell completion."""
    if not ctx.resilient_parsing:
        sys.stderr.write(f"{old} is now {new}\n")


def split(args: list[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into the words before `--`, and the rest, which contains no options."""
    end = args.index("--") if "--" in args else len(args)
    return args[:end], args[end:]


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the words of each subcommand, without the program's name."""
    for name, below in getattr(command, "commands", {}).items():
        yield (*path, name)
        yield from leaves(below, (*path, name))


def suggest(root: Any, within: tuple[str, ...], word: str) -> list[str]:
    """Lists up to three commands that the user may have meant by an unknown word in the group `within`, the likeliest first."""
    tree = [words for words in leaves(root) if len(words) > 1 or words[0] not in GROUPS]
    same = [" ".join(words) for words in tree if words[-1] == word]
    here = difflib.get_close_matches(word, [words[-1] for words in tree if words[:-1] == within], n=1)
    names = {words[-1]: " ".join(words) for words in tree} | RENAMED | {group: group for group in GROUPS}
    near = [] if here else [names[name] for name in difflib.get_close_matches(word, names, n=1, cutoff=0.7)]
    if meant := SYNONYMS.get(" ".join((*within, word)), SYNONYMS.get(word)):
        same = [meant, *same]
    likely = same or [*(" ".join((*within, name)) for name in here), *near]
    return list(dict.fromkeys(likely))[:3]
