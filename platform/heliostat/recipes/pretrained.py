"""Loads a model's folder with an Auto class of transformers. Code that lies in the folder ("remote code") is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError


def from_folder(key: str, auto: Any, folder: str | Path, **options: Any) -> Any:
    """Calls `auto.from_pretrained(folder)`; ConfigError that begins with `key` if that needs code from the folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except ValueError as e:
        if "trust_remote_code" not in str(e):
            raise
        raise ConfigError(
            f"{key}: {str(folder)!r} needs its own code to be run, which is not done; take a model of a class of transformers'"
        ) from e


def whole(key: str, auto: Any, folder: str | Path, **options: Any) -> Any:
    """Loads a folder's model; ConfigError if a weight is missing, which transformers would draw at random."""
    model, told = from_folder(key, auto, folder, output_loading_info=True, **options)
    tied = getattr(model, "all_tied_weights_keys", {})
    if absent := sorted(set(told["missing_keys"]) - set(tied)):
        raise ConfigError(f"{folder}: lacks {len(absent)} of the model's weights, as {absent[0]}; is the folder whole?")
    return model
