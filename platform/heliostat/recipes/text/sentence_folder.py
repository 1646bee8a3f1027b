"""Writes and reads the files of `sentence-transformers` next to a model: how its hidden states become an embedding.

    modules.json                    the model, the pooling, and the normalization, in their order
    1_Pooling/config.json           the kind of pooling
    sentence_bert_config.json       the maximum number of tokens of a text
    config_sentence_transformers.json

A folder with other modules, for example a dense layer, is rejected, because its embeddings would differ from the original's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from heliostat.errors import ConfigError
from heliostat.storage.records import Format

MODULES, POOLING, LENGTH = "modules.json", "1_Pooling", "sentence_bert_config.json"
FACTS = "config_sentence_transformers.json"
KINDS = ("Transformer", "Pooling", "Normalize")
MODE = "pooling_mode"  # a key, or the beginning of keys such as pooling_mode_mean_tokens
WAYS = {"mean_tokens": "mean", "lasttoken": "last", "cls_token": "cls"}
LIST = Format(list[dict[str, object]], "list of modules", ConfigError)
SETTINGS = Format(dict[str, object], "configuration of a module", ConfigError)


@dataclass(frozen=True)
class Embedding:
    """Describes how a text is embedded: the pooling, and the maximum number of tokens. None means the model's maximum."""

    pooling: str
    max_tokens: int | None


def write(folder: Path, how: Embedding, width: int) -> None:
    """Writes the files into a model's folder. `width`: the size of the model's embeddings."""
    paths = ("", POOLING, "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, KINDS, strict=True))
    ]
    for path in paths:
        (folder / path).mkdir(parents=True, exist_ok=True)
    _write(folder / MODULES, modules)
    modes = {f"{MODE}_{name}": way == how.pooling for name, way in WAYS.items()}
    _write(folder / POOLING / "config.json", {"word_embedding_dimension": width, **modes})
    _write(folder / "2_Normalize" / "config.json", {})
    _write(folder / LENGTH, {"max_seq_length": how.max_tokens, "do_lower_case": False})
    _write(folder / FACTS, {"similarity_fn_name": "cosine", "prompts": {}, "default_prompt_name": None})


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def read(folder: Path) -> Embedding | None:
    """Reads how the folder's model embeds texts. Returns None if the folder has no record of the pooling. Raises ConfigError if
    the pooling or a module isn't supported.

    A folder without a list of modules may still have a pooling file.
    """
    if not embeds(folder):
        return None
    place = pooling_file(folder)
    length = SETTINGS.read(folder / LENGTH).get("max_seq_length") if (folder / LENGTH).is_file() else None
    return Embedding(_pooling(place), length if isinstance(length, int) else None)


def embeds(folder: Path) -> bool:
    """Checks whether a folder contains an embedder: a model that records how its states become an embedding."""
    return (folder / MODULES).is_file() or (folder / POOLING / "config.json").is_file()


def pooling_file(folder: Path) -> Path:
    """Finds the pooling file of an embedder's folder. Raises ConfigError if the folder has unsupported modules."""
    if not (folder / MODULES).is_file():
        return folder / POOLING / "config.json"
    modules = {
        str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in LIST.read(folder / MODULES)
    }
    if unknown := sorted(set(modules) - set(KINDS)):
        raise ConfigError(f"{folder / MODULES}: module {unknown[0]!r} isn't supported. Supported: {', '.join(KINDS)}")
    if "Pooling" not in modules or modules.get("Transformer"):
        raise ConfigError(
            f"{folder / MODULES}: the Pooling module is missing, or the Transformer module is outside this folder. Use another "
            f"model"
        )
    place = Path(modules["Pooling"])
    if place.is_absolute() or ".." in place.parts:
        raise ConfigError(f"{folder / MODULES}: the Pooling module is outside this folder. Use another model")
    return folder / place / "config.json"


def _pooling(place: Path) -> str:
    try:
        said = SETTINGS.read(place)
    except OSError as e:
        raise ConfigError(f"{place}: can't read it ({e.strerror}). Copy the folder again") from e
    named = said.get(MODE)
    chosen = [named] if isinstance(named, str) else [key.removeprefix(f"{MODE}_") for key, on in said.items()
                                                     if key.startswith(f"{MODE}_") and on is True]  # fmt: skip
    ways = [WAYS.get(name, name) for name in chosen] or ["mean"]  # sentence-transformers' default
    if len(ways) != 1 or ways[0] not in WAYS.values():
        raise ConfigError(f"{place}: pooling by {', '.join(ways)} isn't supported. Supported: one of {', '.join(WAYS.values())}")
    return ways[0]
