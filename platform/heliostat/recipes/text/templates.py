"""Reads chat templates: of a model's folder, and of a dataset of conversations. Compares templates by digest."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from heliostat.data.conversations import TEMPLATE
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.storage.hub import files

SETTINGS = "tokenizer_config.json"
SHOWN = 12  # digits of a digest in messages


def digest(template: str) -> str:
    return xxhash.xxh3_128_hexdigest(template.encode())


def of_folder(folder: Path) -> str | None:
    """Reads the chat template of a model's tokenizer, the one named `default` if there are several. Returns None if the tokenizer
    has no template. Raises ConfigError if the tokenizer's settings can't be read."""
    file, settings = folder / TEMPLATE, folder / SETTINGS
    if file.is_file():
        return file.read_text("utf-8")
    if not settings.is_file():
        return None
    try:
        named = json.loads(settings.read_text("utf-8")).get("chat_template")
        if isinstance(named, list):
            named = next((one["template"] for one in named if one["name"] == "default"), None)
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise ConfigError(
            f"model.pretrained: {files.shown(folder)!r}: {SETTINGS} isn't valid JSON with a chat template. Copy this file again"
        ) from e
    return None if named is None else str(named)


def of_dataset(source: Manifest, recorded: str) -> str:
    """Reads the template of a dataset. `recorded`: the template's digest in the manifest. Raises DataError if the file is missing
    or changed."""
    file = source.file(TEMPLATE)
    try:
        template = file.read().decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as e:
        raise DataError(f"{file}: missing or not UTF-8. Prepare the dataset again") from e
    if digest(template) != recorded:
        raise DataError(f"{file}: differs from the template that made the dataset. Prepare the dataset again")
    return template


def require_same(folder: Path, source: Manifest, recorded: str) -> None:
    """Raises ConfigError if a pretrained model has another chat template than the dataset."""
    own = of_folder(folder)
    if own is None or digest(own) == recorded:
        return
    raise ConfigError(
        f"model.pretrained: {files.shown(folder)!r}: the model's chat template ({digest(own)[:SHOWN]}) differs from the template "
        f"({recorded[:SHOWN]}) that rendered data.sources.0.path {str(source.location)!r}. Prepare the dataset with the model's "
        "template, or train the model on the dataset's template: set model.chat_template: dataset"
    )
