"""Builds prompts for filling in the middle of a text, with the fill-in-the-middle tokens of the model's tokenizer. The prompts
have the form of the model's training data.

An export records these tokens in its `tokenizer_config.json`. The export also records whether the suffix came first in all
training data:

`"fill_in_the_middle": {"tokens": [PREFIX, SUFFIX, MIDDLE], "suffix_first": false}`. In folders without this record, heliostat
finds the tokens by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from heliostat.data import infilling
from heliostat.data.infilling import ENDS, FACT, Markers
from heliostat.data.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
NONE = "the model's tokenizer has no prefix, suffix, and middle tokens, so the model can't fill in the middle"


def write(folder: Path, sources: list[Manifest]) -> None:
    """Writes the fill-in-the-middle form of the training data into an export's tokenizer configuration. Writes nothing if the
    data has no such form."""
    facts = [source.meta[FACT] for source in sources if FACT in source.meta]
    if not facts:
        return
    place = folder / CONFIG
    config = json.loads(place.read_text())
    config[FACT] = {"tokens": facts[0]["names"], "suffix_first": all(one["spm_rate"] == 1 for one in facts)}
    place.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Infilling:
    """Makes prompts for filling in the middle of a text. `ends`: tokens that end the generated middle, in addition to the tokens
    that end a document."""

    tokenizer: Tokenizer
    markers: Markers
    suffix_first: bool
    opening: list[int]
    ends: list[int]

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> Infilling | None:
        """Reads the form of a model's fill-in-the-middle prompts from the model's transformers tokenizer. Returns None if the
        tokenizer has no fill-in-the-middle tokens."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        raw = Tokenizer.from_str(backend.to_str())
        raw.no_truncation()
        raw.no_padding()
        raw.encode_special_tokens = True  # a marker that is written in a text stays text
        said = tokenizer.init_kwargs.get(FACT) or {}
        names = said.get("tokens") or infilling.names(raw)
        if names is None:
            return None
        ends = [token for name in ENDS if (token := raw.token_to_id(name)) is not None]
        opening = tokenizer("", verbose=False)["input_ids"]
        return Infilling(raw, infilling.find(raw, names), bool(said.get("suffix_first")), list(opening), ends)

    def prompt(self, prefix: str, suffix: str) -> list[int]:
        """Encodes the prompt that the model continues with the middle between `prefix` and `suffix`."""
        before, behind = infilling.encode(self.tokenizer, [prefix, suffix])
        return [*self.opening, *self.markers.prompt(before, behind, self.suffix_first)]
