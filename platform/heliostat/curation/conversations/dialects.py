"""Finds a pipeline's tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from heliostat.curation.conversations import templates
from heliostat.curation.conversations.rendering import Dialect
from heliostat.curation.prepare import place
from heliostat.curation.text import tokens
from heliostat.curation.text.pipeline import TokenizerConfig
from heliostat.errors import ConfigError
from heliostat.recipes.pretrained import from_folder, no_model
from heliostat.schema import Strict
from heliostat.text import brief

SET = f"Set template to {', '.join(templates.NAMED)}, or the path of a .jinja file"


class ExistingTokenizer(Strict):
    """Configures a tokenizer without a model."""

    path: str
    """Tokenizer: a `tokenizer.json`, a folder with a `tokenizer.json`, or `ORG/NAME` of the Hugging Face Hub."""
    end_of_document: str = Field("<|endoftext|>", min_length=1)
    """Token that ends a document. The tokenizer must have this token."""


def of(model: str | None, tokenizer: ExistingTokenizer | None, template: str | None) -> Dialect:
    """Returns the tokenizer and the template of a pipeline's keys. Raises ConfigError if one of them is missing."""
    if (model is None) == (tokenizer is None):
        raise ConfigError("model: set either model, or tokenizer and template. They must be the ones of the model that you train")
    named = None if template is None else _template(template)
    return _of_model(model, named) if model is not None else _of_tokenizer(tokenizer, named)


def _template(name: str) -> str:
    if name in templates.NAMED:
        return templates.NAMED[name]
    if not name.endswith(".jinja"):
        raise ConfigError(f"template: {name!r} isn't a template. {SET}")
    try:
        return place(name, "template").read().decode()
    except (FileNotFoundError, UnicodeDecodeError) as e:
        raise ConfigError(f"template: {name!r}: no such file, or not UTF-8 text. Correct the path") from e


def _of_tokenizer(tokenizer: ExistingTokenizer | None, named: str | None) -> Dialect:
    assert tokenizer is not None
    if named is None:
        raise ConfigError(f"template: a tokenizer without a model has no chat template. {SET}")
    definition = TokenizerConfig.model_validate(tokenizer.model_dump()).definition()
    assert definition is not None
    tokens.end_id(tokens.load(definition), tokenizer.end_of_document)
    return Dialect(definition, named, {"eos_token": tokenizer.end_of_document}, tokenizer.end_of_document)


def _of_model(model: str, named: str | None) -> Dialect:
    from transformers import AutoTokenizer  # takes seconds

    folder = place(model, "model").path
    if Path(folder).suffix == ".gguf":
        raise ConfigError(f"model: {model!r} {no_model(Path(folder))}")
    if not Path(folder).is_dir():
        raise ConfigError(f"model: {model!r}: no such folder. Run: hf download {model} --local-dir models/NAME")
    try:
        tokenizer = from_folder("model", AutoTokenizer, folder)
    except (OSError, ValueError, KeyError) as e:
        if reason := no_model(Path(folder), ""):
            raise ConfigError(f"model: {model!r} {reason}") from e
        raise ConfigError(f"model: transformers can't read the tokenizer of {model!r} ({brief(e, 200)}). Add its files") from e
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"model: {model!r} has no tokenizer.json. Convert its tokenizer to a fast tokenizer")
    if tokenizer.eos_token is None:
        raise ConfigError(f"model: the tokenizer of {model!r} has no eos_token. Add it to tokenizer_config.json")
    if named is None:
        try:
            named = tokenizer.get_chat_template()
        except ValueError as e:
            raise ConfigError(f"template: the tokenizer of {model!r} has no chat template, or several. {SET}") from e
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return Dialect(tokenizer.backend_tokenizer.to_str(), named, special, tokenizer.eos_token)
