"""Claims an output folder for what it is made with, so that a run goes on in it, and nothing else is written there."""

from __future__ import annotations

import json
from typing import Any

from heliostat.errors import ConfigError
from heliostat.storage import Location

SETTINGS = "settings.json"


def claim(place: Location, settings: dict[str, Any], holding: str, made_by: str) -> None:
    """Writes down what the folder is for; ConfigError, in the words `holding` and `made_by`, if something else is there."""
    try:
        known = json.loads(place.join(SETTINGS).read())
    except FileNotFoundError:
        if place.files():
            raise ConfigError(f"--out: {place} is not empty, and holds no {made_by}; name another folder") from None
        place.join(SETTINGS).write(json.dumps(settings).encode())
        return
    except ValueError as e:
        raise ConfigError(f"--out: {place.join(SETTINGS)} is damaged; name another folder") from e
    known = known if isinstance(known, dict) else {}
    if changed := [name for name in {**settings, **known} if known.get(name) != settings.get(name)]:
        name = changed[0]
        was, now = (str(held.get(name))[:80] for held in (known, settings))
        raise ConfigError(f"--out: {place} holds {holding} of another {name} ({was!r}, not {now!r}); name another folder")
