"""Serves LoRA adapters (Hu et al. 2021) of a model by name. Rows of one batch may use different adapters, or none.

An adapter adds scale * B A x to a linear layer's output for x. DoRA (Liu et al. 2024) then scales each row of the changed weight
to a trained norm. An adapter is a folder in peft's format: `adapter_config.json`, and `adapter_model.safetensors` with `lora_A`
and `lora_B` of each layer, and `lora_magnitude_vector` with DoRA. heliostat reads this folder without peft.

Only adapters that consist of these tensors are supported. heliostat rejects an adapter with any other setting, because ignoring
the setting would give a different model.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from heliostat.errors import ConfigError
from heliostat.inference.adapter_export import RECORD
from heliostat.recipes.folder_digests import matches, weights_digest
from heliostat.storage.hub import files
from heliostat.storage.records import Format

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = Format(dict[str, Any], "configuration of an adapter", ConfigError)
log = logging.getLogger(__name__)

ORIGIN = Format(dict[str, Any], "origin of an adapter", ConfigError)
KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB](?=\.weight)|lora_magnitude_vector)(?:\.weight)?")
DOWN, UP, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
NEUTRAL: dict[str, tuple[object, ...]] = {  # keys that can add other tensors, each with its supported values
    "bias": ("none",), "lora_bias": (False,), "fan_in_fan_out": (False,), "modules_to_save": (None, []),
    "layer_replication": (None,), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []), "alora_invocation_tokens": (None,), "use_qalora": (False,), "arrow_config": (None,),
    "use_bdlora": (None, False), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"), "kasa_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,),
}  # fmt: skip
Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Layer:
    """Holds an adapter's matrices for one layer: A [rank, in] and B [out, rank]. B is already multiplied by the scale.
    `gain`: with DoRA, the factor of each row of the changed weight, fp32 [out]; else None."""

    down: torch.Tensor
    up: torch.Tensor
    gain: torch.Tensor | None = None

    def change(self, inputs: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Computes what the adapter adds to a linear layer's output `out`, [rows, tokens, out]. `bias`: of the layer."""
        added = inputs @ self.down.T @ self.up.T
        if self.gain is None:
            return added
        return self.gain * added + (self.gain - 1) * (out if bias is None else out - bias)


def require(name: str, folder: Path) -> dict[str, Any]:
    """Reads an adapter's configuration, but no weights; raises ConfigError if this adapter isn't supported."""
    where = f"--adapter: {name}: {folder}"
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{where}: isn't an adapter ({CONFIG} is missing). Pass a folder that peft has written")
    config = SETTINGS.read(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: adapters of kind {config.get('peft_type')!r} aren't supported. Use LORA")
    for key, usual in NEUTRAL.items():
        if key in config and config[key] not in usual:
            raise ConfigError(
                f"{where}: {CONFIG}: {key}: {config[key]!r} isn't supported. Merge the adapter into its model (merge_and_unload)"
            )
    if not isinstance(config.get("r"), int) or config["r"] < 1 or not isinstance(config.get("lora_alpha"), int | float):
        raise ConfigError(f"{where}: {CONFIG}: r (1 or more) and lora_alpha (a number) are required")
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{where}: has no {WEIGHTS}. Save the adapter with safetensors")
    return config


def require_base(name: str, folder: Path, model: Path) -> None:
    """Raises ConfigError if the adapter was trained on other weights than those in the folder `model`. Only adapters that
    heliostat exported name their base; other adapters pass."""
    if not (folder / RECORD).is_file():
        return
    origin, digest = ORIGIN.read(folder / RECORD), weights_digest(model)
    if not matches(model, digest, base := origin.get("base_digest")):
        raise ConfigError(
            f"--adapter: {name}: {folder}: was trained on the base {origin.get('base')!r} (digest {base}), but the served model "
            f"is {files.shown(model)!r} (digest {digest}). Serve this base, or the merged model (model export --merge)"
        )
    if kind := origin.get("base_format"):
        log.warning(
            "--adapter: %s: was trained on its base in 4 bits (%s), but the endpoint's base isn't rounded, so answers differ "
            "from the trained model's. To serve the trained model, merge the adapter: heliostat model export --merge", name, kind
        )  # fmt: skip


class Adapters:
    """Adds adapters to a loaded model. Each row of a batch uses its own adapter, or none."""

    def __init__(self, model: PreTrainedModel, folders: dict[str, str]) -> None:
        self.names: Sequence[str | None] = ()
        self.rows: dict[str, torch.Tensor] = {}  # name of an adapter -> its rows in the batch, on the model's device
        self.device = model.device
        self.layers: dict[str, dict[str, Layer]] = {}  # path of a layer -> name of an adapter -> matrices
        for name, folder in folders.items():
            for path, layer in read(name, Path(folder), model).items():
                self.layers.setdefault(path, {})[name] = layer
        for path, known in self.layers.items():
            linear: Any = model.get_submodule(path)
            linear.register_forward_hook(self._hook(known, linear.bias))
        for name in folders:
            self._try(name, model)

    def _try(self, name: str, model: PreTrainedModel) -> None:
        """Runs a forward pass of two rows, one of them with the adapter.

        Raises ConfigError if a layer of the adapter doesn't compute rows independently, for example a layer of an expert.
        """
        with torch.inference_mode(), self.using([name, None]):
            try:
                model(input_ids=torch.tensor([[0, 1], [1, 0]], device=model.device))
            except ValueError as e:
                raise ConfigError(f"--adapter: {name}: {e}. Merge the adapter into its model with peft (merge_and_unload)") from e

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[None]:
        """Sets the adapter of each row for all batches within the context. None means that the row uses no adapter."""
        self.names = names
        used = {name for name in names if name is not None}
        places = {name: [i for i, one in enumerate(names) if one == name] for name in used}
        self.rows = {name: torch.tensor(rows, device=self.device) for name, rows in places.items()}
        try:
            yield
        finally:
            self.names, self.rows = (), {}

    def _hook(self, known: dict[str, Layer], bias: torch.Tensor | None) -> Hook:
        def add(module: object, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
            chosen = self.rows.keys() & known.keys()
            if not chosen:
                return None
            if out.dim() != 3 or len(out) != len(self.names):
                raise ValueError("a layer with adapter weights doesn't compute the rows of a batch independently")
            for name in chosen:
                rows = self.rows[name]
                out = out.index_add(0, rows, known[name].change(inputs[0][rows], out[rows], bias).to(out.dtype))
            return out

        return add


def read(name: str, folder: Path, model: PreTrainedModel) -> dict[str, Layer]:
    """Reads an adapter's matrices, and maps the path of each linear layer to its matrices. Raises ConfigError if a matrix
    doesn't fit the model."""
    config, where = require(name, folder), f"--adapter: {name}: {folder / WEIGHTS}"
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as e:
        raise ConfigError(f"{where}: can't read the file ({e}). Save the adapter again") from e
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if not (match := KEY.fullmatch(key)):
            raise ConfigError(
                f"{where}: {key!r} isn't a lora_A or lora_B matrix, and no other tensors are "
                "supported. Merge the adapter into its model (merge_and_unload)"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise ConfigError(f"{where}: the adapter is empty. Save the adapter again")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    linear = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    parts = {DOWN, UP, MAGNITUDE} if config.get("use_dora") else {DOWN, UP}
    return {
        path: _layer(tensors_of, parts, linear.get(path), config["r"], scale, f"{where}: {path}")
        for path, tensors_of in pairs.items()
    }


def _layer(
    pair: dict[str, torch.Tensor], parts: set[str], module: torch.nn.Linear | None, rank: int, scale: float, where: str
) -> Layer:
    if module is None:
        raise ConfigError(f"{where}: isn't a linear layer of the model. Pass an adapter of this model")
    if set(pair) != parts:
        raise ConfigError(
            f"{where}: has {' and '.join(sorted(pair))}, expected {' and '.join(sorted(parts))}. Save the adapter again"
        )
    down, up = pair[DOWN], pair[UP]
    if tuple(down.shape) != (rank, module.in_features) or tuple(up.shape) != (module.out_features, rank):
        shapes = (
            f"{tuple(down.shape)} and {tuple(up.shape)}, with rank {rank}, but the layer's weight is {tuple(module.weight.shape)}"
        )
        raise ConfigError(f"{where}: the adapter's matrices are {shapes}. Pass an adapter of this model")
    up = up.float() * scale
    if MAGNITUDE not in parts:
        return Layer(down.to(module.weight), up.to(module.weight))
    if tuple(pair[MAGNITUDE].shape) != (module.out_features,):
        raise ConfigError(
            f"{where}: the norms are {tuple(pair[MAGNITUDE].shape)}, expected {(module.out_features,)}. Save the adapter again"
        )
    weight = module.weight.detach().float()
    norms = (weight + (up @ down.float()).to(weight.device)).norm(dim=1)
    gain = pair[MAGNITUDE].to(norms) / norms
    return Layer(down.to(module.weight), up.to(module.weight), gain)  # in bf16, a factor such as 1.003 would be 1
