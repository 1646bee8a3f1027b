"""Tells the page what it can offer: the tabs that the model and the index can do, why not the others, and what bounds them."""

from __future__ import annotations

from typing import Any

from heliostat.apps.serve import requests
from heliostat.apps.serve.options import Options
from heliostat.apps.serve.painter import MOST_AREA
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.served import ServedModels
from heliostat.recipes.text import infilling

NO_MODEL = "no model was given"
DRAWS = "the model draws, and writes nothing"
WRITES = "the model writes, and draws nothing"
NO_TEMPLATE = "the model's tokenizer has no chat template"
NO_INDEX = "no index was given; start with --index INDEX"


def of(served: ServedModels, replica: Replica, version: str, options: Options) -> dict[str, Any]:
    """Describes what is here. `tabs`: each with why it is not there, or null; in the order in which they are shown."""
    return {
        "model": served.name,
        "index": served.index_name,
        "version": version,
        "tabs": tabs(replica),
        "text": _text(replica, options),
        "images": _images(replica),
        "passages": _passages(replica),
    }


def tabs(replica: Replica) -> dict[str, str | None]:
    """Says of each tab why it is not there; None if it is."""
    none = DRAWS if replica.painter else NO_MODEL
    writer = replica.writer
    return {
        "write": None if writer else none,
        "complete": none if not writer else None if writer.engine.infilling else infilling.NONE,
        "chat": none if not writer else None if writer.engine.loaded.tokenizer.chat_template else NO_TEMPLATE,
        "draw": None if replica.painter else WRITES if writer else NO_MODEL,
        "ask": None if replica.shelf else NO_INDEX,
    }


def _text(replica: Replica, options: Options) -> dict[str, Any] | None:
    if replica.writer is None:
        return None
    longest = replica.writer.engine.loaded.longest
    return {"longest": longest, "max_tokens": min(options.max_tokens, longest or options.max_tokens)}


def _images(replica: Replica) -> dict[str, Any] | None:
    if replica.painter is None:
        return None
    painter = replica.painter
    bounds = {"most_images": requests.MOST_IMAGES, "most_steps": requests.MOST_STEPS, "most_area": MOST_AREA}
    return {"size": list(painter.size), **painter.canvas.defaults, **bounds}


def _passages(replica: Replica) -> dict[str, Any] | None:
    if replica.shelf is None:
        return None
    index = replica.shelf.index
    return {"modes": list(index.modes), "documents": index.record["documents"], "passages": index.record["passages"],
            "most": requests.MOST_PASSAGES, "answers": replica.writer is not None}  # fmt: skip
