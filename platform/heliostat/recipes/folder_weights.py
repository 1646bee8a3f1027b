"""Reads a pretrained model's weights from safetensors files, one tensor at a time. The tensors in the files must match the
model's tensors.

transformers renames and converts the tensors of some architectures, and diffusers renames and converts the tensors of old
folders. For these architectures and folders, `find` raises UnreadableError with the reason, and the library itself must load the
folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heliostat.checkpoint.safetensors_file import DTYPES
from heliostat.recipes.weightless import Computed, Pretrained

NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # file names of transformers and of diffusers
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


class UnreadableError(Exception):
    """Explains why a folder's tensors can't be read one by one."""


@dataclass(frozen=True)
class Stored:
    """Describes the location of a tensor in a file. `offset`: the tensor's first byte."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> torch.Tensor:
        """Reads the tensor into new host memory. Doesn't map the file, because the mapped pages would count as memory of the
        process."""
        values = torch.empty(self.shape, dtype=self.dtype)
        left = memoryview(values.reshape(-1).view(torch.uint8).numpy().data) if values.numel() else memoryview(b"")
        with self.file.open("rb", buffering=0) as f:
            f.seek(self.offset)
            while left:
                if not (count := f.readinto(left)):
                    raise OSError(f"{self.file}: the file ends before its last tensor")
                left = left[count:]
        return values.float() if values.dtype == torch.float64 else values  # the libraries load all weights in fp32


@dataclass(frozen=True)
class ComputedWeight:
    """Describes a tensor that is computed when it is read: from a stored tensor (`source`), or from nothing."""

    make: Callable[..., torch.Tensor]
    source: Stored | None

    def read(self) -> torch.Tensor:
        return self.make(*([self.source.read()] if self.source else []))


def find(model: torch.nn.Module, noted: list[Pretrained | Computed]) -> dict[int, Stored | ComputedWeight]:
    """Finds the file and offset of each parameter's stored values, and of each buffer in the folders. The keys are the `id`s of
    the model's tensors. Raises UnreadableError if a parameter has neither stored nor computed values."""
    folders = [one for one in noted if isinstance(one, Pretrained)]
    if not folders:
        raise UnreadableError("the model's weights are initialized at random")
    stored: dict[int, Stored] = {}
    for pretrained in folders:
        try:
            stored |= _of_folder(pretrained)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:  # of a damaged or hostile file
            raise UnreadableError(f"{pretrained.folder}: {type(e).__name__}: {e}") from e
    by_tensor = {
        id(one.tensor): ComputedWeight(one.make, None if one.source is None else stored[id(one.source)])
        for one in noted
        if isinstance(one, Computed)
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in stored and id(parameter) not in by_tensor:
            raise UnreadableError(f"the parameter {name!r} isn't in a pretrained folder")
    return {**stored, **by_tensor}


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the type of a folder's first floating-point weight, in which transformers computes if config.json names no type.
    Returns fp32 if the folder has no safetensors file that heliostat can read."""
    with suppress(UnreadableError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return next((one.dtype for one in _listed(folder).values() if one.dtype.is_floating_point), torch.float32)
    return torch.float32


def _of_folder(pretrained: Pretrained) -> dict[int, Stored]:
    folder, module = pretrained.folder, pretrained.module
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "transformers_weights"):
        if config.get(key):
            raise UnreadableError(f"{folder}: config.json contains the key {key!r}")
    if (folder / "adapter_config.json").exists():
        raise UnreadableError(f"{folder}: contains an adapter (adapter_config.json)")
    stored = _listed(folder)
    named: dict[int, list[str]] = {}
    for name, tensor in pretrained.tensors.items():
        named.setdefault(id(tensor), []).append(name)
    weights, converts, prefix = {}, _conversions(module), getattr(module, "base_model_prefix", "")
    for names in named.values():
        tensor = pretrained.tensors[names[0]]
        keys = {key for name in names for key in _spellings(name, prefix) if key in stored}
        if len(keys) != 1:
            raise UnreadableError(f"{folder}: expected one tensor for {names[0]!r}, found {len(keys) or 'none'}")
        (key,) = keys
        if any(transform.rename_source_key(key) != (key, None) for transform in converts):
            raise UnreadableError(f"{folder}: transformers renames or converts the tensor {key!r}")
        one = stored[key]
        if one.shape != tuple(tensor.shape) or one.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise UnreadableError(
                f"{folder}: the tensor {key!r} has {one.dtype} {list(one.shape)}, which doesn't match the model"
            )
        weights[id(tensor)] = one
    return weights


def _spellings(name: str, prefix: str) -> list[str]:
    """Lists the names that a tensor may have in a folder. The names depend on whether the model in the folder has a head."""
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]


def _conversions(module: torch.nn.Module) -> list[Any]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(module) if isinstance(module, PreTrainedModel) else []


def _listed(folder: Path) -> dict[str, Stored]:
    """Lists the tensors of a folder. Raises UnreadableError unless the folder has exactly one set of safetensors files with a
    standard name."""
    files = [file for name in NAMES for file in (folder / name, folder / f"{name}.index.json") if file.is_file()]
    if len(files) != 1:
        raise UnreadableError(f"{folder}: expected one set of safetensors files, found {len(files) or 'none'}")
    if files[0].suffix == ".safetensors":
        return _header(files[0])
    index: dict[str, str] = json.loads(files[0].read_text())["weight_map"]
    headers = {name: _header(folder / Path(name).name) for name in sorted(set(index.values()))}
    if sum(map(len, headers.values())) != len(index) or any(key not in headers[name] for key, name in index.items()):
        raise ValueError(f"the files have other tensors than {files[0].name} lists")  # or a tensor twice, with two values
    return {key: headers[name][key] for key, name in index.items()}


def _header(file: Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(size, LONGEST_HEADER):
            raise ValueError(f"{file.name} isn't a safetensors file")
        listed = json.loads(f.read(length))
    tensors = {}
    for key, entry in listed.items():
        if key == "__metadata__":
            continue
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not 0 <= begin <= end <= size - 8 - length or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file.name} is incomplete")
        tensors[key] = Stored(file, dtype, shape, 8 + length + begin)
    return tensors
