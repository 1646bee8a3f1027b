"""Claims an output folder for what it is made with, so that a run goes on in it, and nothing else is written there."""

from __future__ import annotations

import json

from heliostat.errors import ConfigError
from heliostat.storage.locations import Location

SETTINGS = "settings.json"


def claim(place: Location, settings: dict[str, object], holding: str, made_by: str) -> None:
    """Writes down what the folder is for; ConfigError, in the words `holding` and `made_by`, if something else is there."""
    known = _known(place)
    if known is None:
        others = [name for name, _ in place.files() if not name.startswith(f"{SETTINGS}.")]  # those are half written claims
        if not others and place.join(SETTINGS).create(json.dumps(settings).encode()):
            return
        known = _known(place)  # if another command was faster
        if known is None:
            raise ConfigError(f"--out: {place} is not empty, and holds no {made_by}; name another folder")
    if changed := [name for name in {**settings, **known} if known.get(name) != settings.get(name)]:
        name = changed[0]
        was, now = (str(one.get(name))[:80] for one in (known, settings))
        raise ConfigError(f"--out: {place} holds {holding} of another {name} ({was!r}, not {now!r}); name another folder")


def _known(place: Location) -> dict[str, object] | None:
    """Reads what a folder is claimed for; None if it is not."""
    try:
        known = json.loads(place.join(SETTINGS).read())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ConfigError(f"--out: {place.join(SETTINGS)} is damaged; name another folder") from e
    return known if isinstance(known, dict) else {}
