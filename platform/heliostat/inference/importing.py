"""Converts a model in a GGUF file to a folder that `from_pretrained` loads, with safetensors, tokenizer, and chat template.

transformers dequantizes the weights. The written folder is then loaded again, and its outputs are compared with those of the
dequantized weights in fp32. GGUF files and safetensors contain only data, so nothing here runs code from a file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from heliostat.errors import ConfigError, HeliostatError
from heliostat.inference import gguf_files
from heliostat.inference.gguf_files import GgufFile
from heliostat.recipes.exported import CONVERTED, IMPORT
from heliostat.recipes.precision import dtype_of
from heliostat.recipes.pretrained import from_folder, whole
from heliostat.storage.locations import Location
from heliostat.text import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS, LENGTH, STRIDE = 4, 32, 7919  # of the tokens that compare the written model with the file's weights
TOKENIZER = "tokenizer.json"
MOST = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.3}  # bound of the difference, as a share of the logits' standard deviation


@dataclass(frozen=True)
class Imported:
    """Describes an import. `difference`: the largest difference between logits of the written model and of the file's weights in
    fp32; `spread`: the standard deviation of these logits; `agreement`: the share of positions with the same most likely token.
    """

    file: GgufFile
    digest: str
    difference: float
    spread: float
    agreement: float
    has_template: bool


def convert(path: Path, folder: Path) -> Imported:
    """Writes the model of a GGUF file to `folder`. `path`: the file, or a folder with one GGUF file.

    Needs host memory for the weights in fp32 and in the written precision at once. Raises ConfigError if the file is damaged, if
    transformers doesn't support its architecture, or if `folder` isn't empty or can't be replaced. Writes to `folder`.partial
    first, so `folder` has only a complete and compared model. Raises HeliostatError if the written model's outputs differ from
    the file's by more than rounding.
    """
    file, folder = gguf_files.read(gguf_files.locate(path)), folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: not empty ({folder}). Pass another folder")
    if folder.is_mount() or folder == Path.cwd():
        raise ConfigError(f"--out: can't replace a mount point or the current folder ({folder}). Pass a folder in it")
    Location(str(folder)).require_writable()
    tokenizer = _tokenizer(file)
    with _reading(file):
        model = _model(file)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as e:
        raise ConfigError(
            f"--out: another import writes to {partial}, or was killed. If no import is running, delete this folder"
        ) from e
    try:
        imported = _write(file, model, tokenizer, partial)
        partial.replace(folder)
    except BaseException:  # also Ctrl-C
        shutil.rmtree(partial)
        raise
    return imported


def _write(file: GgufFile, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Imported:
    import transformers

    with torch.inference_mode():
        tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) * STRIDE % model.config.vocab_size
        expected = model(input_ids=tokens, use_cache=False).logits.float()
    tokenizer.save_pretrained(folder)
    torch.nn.Module.to(model, dtype_of(file.precision))
    model.save_pretrained(folder, max_shard_size="4GB")
    written = whole("--out", transformers.AutoModelForCausalLM, folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = written(input_ids=tokens, use_cache=False).logits.float()
    imported = Imported(
        file,
        file.digest(),
        float((logits - expected).abs().max()),
        float(expected.std()),
        float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
        tokenizer.chat_template is not None,
    )
    if not imported.difference <= MOST[file.precision] * imported.spread:
        raise HeliostatError(
            f"PATH: {file.path.name}: the written model's logits differ from the file's by {imported.difference:.3g}, more than "
            f"rounding explains (standard deviation {imported.spread:.3g}). Convert the original model instead"
        )
    (folder / "README.md").write_text(card(imported), encoding="utf-8")
    (folder / IMPORT).write_bytes(CONVERTED.encode({"file": file.path.name, "digest": imported.digest}))
    return imported


def _model(file: GgufFile) -> PreTrainedModel:
    """Loads the dequantized weights in fp32, as an ordinary model of transformers."""
    import transformers

    name = {"gguf_file": file.path.name}
    model = whole("PATH", transformers.AutoModelForCausalLM, file.path.parent, dtype=torch.float32, **name).eval()
    config = transformers.AutoConfig.from_pretrained(file.path.parent, **name)  # without the key `quantization_config`
    plain = type(model)(config)  # a model that GGUF's loader didn't mark: only such a model can be saved as safetensors
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def _tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """Makes the tokenizer: from tokenizer.json next to the GGUF file, or from the file itself."""
    import transformers
    from tokenizers import pre_tokenizers

    if (file.path.parent / TOKENIZER).is_file():
        tokenizer: Any = from_folder("PATH", transformers.AutoTokenizer, file.path.parent)
        gguf_files.require_own(file, tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        return tokenizer
    if not file.has_tokenizer:
        raise ConfigError(f"PATH: {file.path.name} has no tokenizer. Copy the original model's tokenizer.json into its folder")
    alone = gguf_files.split_digits(file)
    with _reading(file):
        tokenizer = from_folder("PATH", transformers.AutoTokenizer, file.path.parent, gguf_file=file.path.name)
    if alone:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    return tokenizer


@contextmanager
def _reading(file: GgufFile) -> Iterator[None]:
    """Converts a library's error into one line that names the file and its architecture. Hides the library's progress bar."""
    from transformers import modeling_gguf_pytorch_utils as library

    try:
        with patch.object(library, "tqdm", lambda tensors, **_: tensors):
            yield
    except HeliostatError:
        raise
    except Exception as e:
        raise ConfigError(
            f"PATH: transformers can't read {file.path.name}, a model of the architecture {file.architecture!r} ({brief(e)}). "
            "Use the model's safetensors folder"
        ) from e


def card(imported: Imported) -> str:
    """Writes the folder's README.md: the file's name and digest, the types of its matrices, and the result of the comparison."""
    file, header = imported.file, ""
    if file.license:
        header = f"---\nlicense: {file.license}\n---\n"
    return f"{header}# {file.path.stem}\n\nConverted by `heliostat model import`.\n\n" + "".join(
        f"- {line}\n" for line in (f"File: `{file.path.name}`, SHA-256 `{imported.digest}`", *facts(imported))
    )


def facts(imported: Imported) -> list[str]:
    """Describes an import in lines for people."""
    file = imported.file
    types = ", ".join(f"{count} {name}" for name, count in file.types.items())
    lost = "" if not file.quantized else " The file doesn't contain what its own quantization lost"
    template = "with a chat template" if imported.has_template else "without a chat template"
    return [
        f"Architecture {file.architecture}, {file.weights:,} weights, tokenizer {template}",
        f"Matrices: {types}; {file.bits:.2f} bits per weight.{lost}",
        f"Written as {file.precision}: logits differ by at most {imported.difference:.2g} (standard deviation "
        f"{imported.spread:.2g}); same most likely token at {imported.agreement:.1%} of {ROWS * LENGTH} positions",
    ]
