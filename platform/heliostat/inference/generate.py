"""Generates answers to prompts in this process. To generate answers on Ray with several workers, use the module `many`.

The recipe that exported the model (`recipes.exported`) defines the generation: its `generator(folder, options)` loads the model
once and answers requests. An answer depends only on its request and the options, not on its batch or worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.protocol import Generated, Request
from heliostat.storage.locations import Location

RESULTS = "results.jsonl"
BATCH = 16


def generate(folder: Path, prompt: str, options: dict[str, object], seed: int, out: str | None) -> Generated:
    """Generates the answer to one prompt in this process. If the answer is a text, writes it to the file `out` too.

    Raises AccessError or StorageError, before the model is loaded, if `out` can't be written.
    """
    if out is not None:
        Location(out).require_file()
    with exported.using(folder):
        (answer,) = exported.generator(folder, options)([Request(prompt, seed, out)])
    if out is not None and "file" not in answer.facts:
        Location(out).write(f"{answer.shown}\n".encode())
    return answer


def answer(
    folder: Path, prompts: str | Sequence[str], options: dict[str, object], seed: int, out: str | None
) -> Generated | list[Generated]:
    """Answers one prompt, or a list of prompts in order, in this process. The i-th prompt has seed + i.

    `out`: the file of one answer, or the folder for the answers to a list.
    """
    if isinstance(prompts, str):
        return generate(folder, prompts, options, seed, out)
    requests = [
        Request(prompt, seed + i, None if out is None else Location(out).join(f"{i:05d}").uri) for i, prompt in enumerate(prompts)
    ]
    with exported.using(folder):
        ask = exported.read(folder).recipe.generator(folder, options)
        return [answer for i in range(0, len(requests), BATCH) for answer in ask(requests[i : i + BATCH])]


def read_text(option: str, value: str) -> str:
    """Returns the content of the file that `value` names, unchanged. If there is no such file, returns `value` itself.

    Raises ConfigError if the file isn't UTF-8.
    """
    try:
        if "\0" in value or not Path(value).is_file():
            return value
        return Path(value).read_bytes().decode()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{option}: {value} isn't UTF-8 text ({e}). Save the file as UTF-8") from e
    except OSError:  # for example, the name is too long
        return value


def read_prompts(path: Path) -> list[str]:
    """Reads prompts from a file, one per line, and skips empty lines. Raises ConfigError if the file contains no prompt or
    isn't UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--prompts: can't read {path} ({e})") from e
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts: {path} contains no prompt. Write one prompt per line")
    return prompts
