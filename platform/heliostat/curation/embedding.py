"""Embeds texts by a Hugging Face folder: of an encoder, as sentence-transformers saves one too, or of a language model.

The last hidden states become one vector as `1_Pooling/config.json` says: their mean over the tokens, the first token's or the
last one's; the mean where there is no such file. Vectors are rounded to 8 bits, each by its own largest number, so that products
of two are whole numbers, and the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from heliostat.curation import files
from heliostat.curation.scoring import Reader, describe, digest_of, digests
from heliostat.errors import ConfigError

MODULES, POOLING = "modules.json", "1_Pooling/config.json"
HARMLESS = ("Transformer", "Pooling", "Normalize")  # modules whose result is known; lengths play no part in cosines
POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}


def pooling(folder: str) -> str:
    """Tells how the folder's hidden states become a vector: `mean`, `cls` or `lasttoken`; ConfigError if in another way."""
    for module in _read(folder, MODULES, []):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in HARMLESS:
            raise ConfigError(
                f"model: {folder!r} puts {kind!r} behind its model ({MODULES}), which is not computed; take another"
            )
    told = _read(folder, POOLING, {})
    named = told.get("pooling_mode")
    asked = [named] if isinstance(named, str) else [k.removeprefix("pooling_mode_") for k, v in told.items()
                                                    if k.startswith("pooling_mode_") and v is True]  # fmt: skip
    found = [POOLINGS.get(name, name) for name in asked] or ["mean"]
    if len(found) > 1 or found[0] not in POOLINGS.values():
        known = ", ".join(POOLINGS.values())
        raise ConfigError(
            f"model: {folder!r} pools by {' and '.join(found)} ({POOLING}); models that pool by one of {known} are read"
        )
    return found[0]


def _read(folder: str, name: str, absent: Any) -> Any:
    """Reads a JSON file of the folder that need not be there."""
    path = Path(folder) / name
    if not path.is_file():
        return absent
    try:
        found = json.loads(files.read("model", str(path)))
    except ValueError as e:
        raise ConfigError(f"model: {folder!r}: {name} is not JSON ({e})") from e
    if not isinstance(found, type(absent)):
        raise ConfigError(f"model: {folder!r}: {name} holds no {type(absent).__name__}")
    return found


def identity(folder: str) -> dict[str, str]:
    """Returns the SHA-256 of all files that vectors follow from."""
    others = [Path(folder) / name for name in (MODULES, POOLING)]
    return digests(folder) | {str(p.relative_to(folder)): digest_of(p) for p in others if p.is_file()}


class Embedder(Reader):
    """Makes a vector of each text, of 8-bit numbers; one without tokens is all zeros."""

    def __init__(self, folder: str, max_tokens: int, batch: int) -> None:
        describe(folder)
        self.pooling, self.folder = pooling(folder), folder
        super().__init__(folder, "AutoModel", "a text encoder", max_tokens, batch)

    def values(self, output: Any, mask: Any) -> list[np.ndarray]:
        states = output.last_hidden_state.float()
        if self.pooling == "cls":
            made = states[:, 0] * (mask.sum(1, keepdim=True) > 0)
        elif self.pooling == "lasttoken":
            last = (mask.sum(1) - 1).clamp(min=0)
            made = states[range(len(states)), last] * (mask.sum(1, keepdim=True) > 0)
        else:
            made = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        found = made.cpu().numpy()
        if not np.isfinite(found).all():
            raise ConfigError(f"model: {self.folder!r} gives vectors that are not finite; take another model")
        return list(rounded(found))


def rounded(vectors: np.ndarray) -> np.ndarray:
    """Rounds vectors to 8 bits, each by its own largest number."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    scale = np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(vectors * scale).astype(np.int8)
