"""Explains a wrong command line in one line: `FIELD: problem (value). Fix.`"""

from __future__ import annotations

import re
from typing import Any

from heliostat.cli.groups import suggest
from heliostat.text import brief

SUGGESTED = {  # options of other tools, or of other heliostat commands -> this command's option
    **dict.fromkeys(("--output", "--output-dir", "--output_dir", "--dir", "--to", "-o", "--file", "--path"), "--out"),
    **dict.fromkeys(("--tracking-uri", "--store", "--uri", "--mlflow-uri"), "--mlflow"),
    **dict.fromkeys(("--max-new-tokens", "--max_tokens", "--length"), "--max-tokens"),
    **dict.fromkeys(("--watch", "--tail", "--wait"), "--follow"),
    **dict.fromkeys(("--continue", "--from-checkpoint", "--restart"), "--resume"),
    "--force": "--overwrite", "--model-name": "--model", "--temp": "--temperature", "--data": "--dataset", "--debug": "--verbose",
}  # fmt: skip
OF_JOB = {  # option of another tool -> the job key with the same meaning
    **dict.fromkeys(("--lr", "--learning-rate", "--learning_rate"), "train.optimizer.lr"),
    **dict.fromkeys(("--steps", "--max-steps", "--max_steps"), "train.steps"),
    **dict.fromkeys(("--epochs", "--num-epochs", "--num_train_epochs"), "train.epochs"),
    **dict.fromkeys(("--batch-size", "--batch_size", "--global-batch-size", "--global_batch_size"), "train.global_batch_size"),
    **dict.fromkeys(("--micro-batch-size", "--per_device_train_batch_size"), "train.micro_batch_size"),
    **dict.fromkeys(("--workers", "--num-workers", "--num_workers", "--nproc-per-node", "--nproc_per_node"), "workers.count"),
    "--gpus": "workers.gpus", "--seed": "train.seed", "--name": "name", "--precision": "train.precision", "--model": "model",
    "--bf16": "train.precision", "--fp16": "train.precision", "--dataset": "data.path", "--data": "data.path",
    "--storage": "storage", "--output": "storage", "--output_dir": "storage", "--out": "storage", "--stage": "train.zero.stage",
    "--zero": "train.zero.stage", "--deepspeed": "train.deepspeed",
}  # fmt: skip
OF_PIPELINE = {
    **dict.fromkeys(("--output", "--output-dir", "--out", "-o"), "output"),
    **dict.fromkeys(("--input", "--data", "--dataset", "-i"), "input"),
    **dict.fromkeys(("--keep-work", "--keep_work"), "keep_work"),
    **dict.fromkeys(("--memory-limit", "--memory_limit", "--memory"), "memory_limit"),
    "--work": "work", "--tokenizer": "tokenizer", "--vocab-size": "tokenizer.vocab_size", "--name": "name",
}  # fmt: skip


def explain(error: Any) -> str:
    """Explains a wrong command line: the wrong word, the problem, and the text to type instead."""
    context = error.ctx
    path = context.command_path if context else "heliostat"
    problem, fix = _problem(error, context, path)
    return f"{problem}. {fix}See `{path} --help`"


def _problem(error: Any, context: Any, path: str) -> tuple[str, str]:
    kind, message = type(error).__name__, error.format_message().strip().removesuffix(".")
    if kind == "NoSuchOption":
        return _unknown_option(error, context, path)
    if kind == "MissingParameter":
        field = _field(error.param)
        what = "argument" if error.param.param_type_name == "argument" else "option"
        return f"{field}: this {what} is missing", f"{_meaning(error.param)}. "
    if kind == "BadOptionUsage":
        if "does not take a value" in message:
            return f"{error.option_name}: takes no value", f"Write {error.option_name} without a value. "
        option = next((p for p in context.command.params if error.option_name in p.opts), None) if context else None
        return f"{error.option_name}: the value is missing", f"{_meaning(option)}. " if option else ""
    if getattr(error, "param", None) is not None:
        return f"{_field(error.param)}: {_plain(error)}", f"{_meaning(error.param)}. "
    if unknown := re.fullmatch(r"No such command '(.*?)'.*", message, re.DOTALL):
        return _unknown_command(unknown[1], context, path)
    if extra := re.fullmatch(r"Got unexpected extra argument\(?s?\)? \((.*)\)", message, re.DOTALL):
        takes = [_field(p) for p in context.command.params if p.param_type_name == "argument"]
        fix = f"Write: {path} {' '.join(takes)}".rstrip() + (", and quote text with spaces. " if takes else ". ")
        return f"{brief(extra[1])}: unexpected argument", fix
    return message, ""


def _unknown_option(error: Any, context: Any, path: str) -> tuple[str, str]:
    option, params = brief(error.option_name), context.command.params
    problem = f"{option}: unknown option of {path}"
    if hasattr(context.command, "commands"):
        return problem, f"Write options after the command: {path} COMMAND {option}. "
    keys = {"JOB": OF_JOB, "PIPELINE": OF_PIPELINE}
    key = next((keys[p.metavar][option] for p in params if option in keys.get(p.metavar, ())), None)
    known = [name for p in params for name in p.opts if name.startswith("-") and not p.hidden]
    near = [name for name in error.possibilities or [] if name in known]
    if key:
        return problem, f"Set the key instead: --set {key}=VALUE. "
    if SUGGESTED.get(option) in known:
        near = [SUGGESTED[option]]
    return problem, f"Did you mean {near[0]}? " if near else ""


def _unknown_command(word: str, context: Any, path: str) -> tuple[str, str]:
    root, within = context.find_root().command, tuple(path.split()[1:])
    likely = [f"`{'heliostat ' + words}`" for words in suggest(root, within, word)]
    fix = f"Did you mean {' or '.join(likely)}? " if likely else ""
    if word.endswith((".yaml", ".yml")) and not within:
        fix = f"Write a command first, for example `heliostat train {brief(word)}`. "
    return f"{brief(word)}: unknown command of {path}", fix


def _field(parameter: Any) -> str:
    """Returns a parameter's name on the command line, such as JOB or --out."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper()).strip("[]")
    return max(parameter.opts, key=len)


def _meaning(parameter: Any) -> str:
    """Explains how to pass a parameter, with its help text."""
    field, help = _field(parameter), str(parameter.help or "").partition(";")[0]
    value = "" if parameter.param_type_name == "argument" else f" {parameter.metavar or 'VALUE'}"
    return f"Pass {field}{value} ({help[:1].lower() + help[1:]})"


def _plain(error: Any) -> str:
    """Explains the problem with a value. typer checks values with pydantic."""
    faults = error.__cause__.errors() if hasattr(error.__cause__, "errors") else []
    if not faults:
        return str(error.message).strip().removesuffix(".")
    fault = faults[0]
    kind, value, limit = fault["type"], brief(str(fault["input"])), next(iter(fault.get("ctx", {}).values()), "")
    return {
        "int_parsing": f"expected a whole number, got {value}", "int_from_float": f"expected a whole number, got {value}",
        "float_parsing": f"expected a number, got {value}", "bool_parsing": f"expected true or false, got {value}",
        "greater_than_equal": f"must be at least {limit}, got {value}", "greater_than": f"must be more than {limit}, got {value}",
        "less_than_equal": f"must be at most {limit}, got {value}", "less_than": f"must be less than {limit}, got {value}",
    }.get(kind, f"{fault['msg']} ({value})")  # fmt: skip
