"""Makes models of transformers and diffusers: from a folder, or from a configuration with initial weights.

heliostat never runs code from a folder ("remote code"). Initial weights are the same at every ZeRO stage.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.errors import ConfigError
from heliostat.recipes import partitioning, precision
from heliostat.text import brief

if TYPE_CHECKING:
    import torch


def from_folder(key: str, auto: Any, folder: str | Path, **options: Any) -> Any:
    """Calls `auto.from_pretrained(folder)`. Raises ConfigError, with `key` at its beginning, if the folder needs its own code."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except ValueError as e:
        if "trust_remote_code" not in str(e):
            raise
        raise ConfigError(
            f"{key}: {str(folder)!r} needs its own code, which heliostat doesn't run. Use a model whose class is in transformers"
        ) from e


def no_model(path: Path, otherwise: str = "isn't a model folder (no config.json)") -> str:
    """Explains why a path without config.json isn't a model's folder, and what to do. `otherwise`: the explanation for a folder
    that contains nothing known."""
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        return f"is a GGUF file or a folder with one. Convert it: heliostat model import {path} --out FOLDER"
    if (path / "adapter_config.json").is_file():
        base = _base_of(path / "adapter_config.json")
        return (
            f"is an adapter without its base. Serve it with its base: heliostat model serve {base} --adapter NAME={path}. Or "
            "merge it into its base: heliostat model export RUN --out FOLDER"
        )
    if (path / "checkpoints").is_dir():
        return f"is a run, not a model. Export its model: heliostat model export {path} --out FOLDER"
    return otherwise


def _base_of(config: Path) -> str:
    """Returns the name of an adapter's base in the adapter's configuration; `BASE` if it has none that fits a command."""
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "BASE"
    return shlex.quote(base) if base and isinstance(base, str) and brief(base) == base else "BASE"


def whole(key: str, auto: Any, folder: str | Path, **options: Any) -> Any:
    """Loads a folder's model, by default in the type in which heliostat's inference computes (`precision.compute_dtype`). Raises
    ConfigError if a weight is missing, because transformers would initialize this weight at random, or if the folder also has an
    adapter."""
    require_no_adapter(key, folder)
    options = {"dtype": precision.compute_dtype(folder), **options}
    model, loading = from_folder(key, auto, folder, output_loading_info=True, **options)
    tied = getattr(model, "all_tied_weights_keys", {})
    _require_none(folder, set(loading["missing_keys"]) - set(tied))
    return model


def require_no_adapter(key: str, folder: str | Path) -> None:
    """Raises ConfigError if a model's folder also has an adapter, because transformers would add its layers to the model."""
    if (Path(folder) / "adapter_config.json").is_file():
        raise ConfigError(
            f"{key}: {str(folder)!r} also has an adapter (adapter_config.json), which transformers would add to the model. Move "
            "the adapter's files to another folder, or merge the adapter into the model"
        )


def whole_part(cls: Any, folder: str | Path, dtype: torch.dtype, **options: Any) -> Any:
    """Loads a model of diffusers from a folder. Raises ConfigError if a weight is missing, because diffusers would only log a
    warning."""
    model, loading = cls.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True, **options)
    _require_none(folder, set(loading["missing_keys"]) & {name for name, _ in model.named_parameters()})
    return model


def _require_none(folder: str | Path, absent: set[str]) -> None:
    """Raises ConfigError if weights are absent from a folder."""
    if absent:
        raise ConfigError(
            f"{folder}: {len(absent)} of the model's weights are missing, for example {min(absent)}. Copy the folder again"
        )


def from_config(auto: Any, config: Any, **options: Any) -> Any:
    """Builds a model in fp32. `auto`: an Auto class, or a model class."""
    import torch
    from transformers.initialization import no_init_weights

    make = getattr(auto, "from_config", None) or auto._from_config
    if partitioning.wanted():
        return make(config, dtype=torch.float32, **options)
    with no_init_weights():  # so that constructors draw no random numbers, as at ZeRO-3
        model = make(config, dtype=torch.float32, **options)
    model.init_weights()
    return model
