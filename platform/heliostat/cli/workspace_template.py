"""Creates a new workspace: the quickstart's jobs, pipelines and local cluster, as they come with heliostat.

The files lie in `template/`, each the same as the one of its name in heliostat's own repository.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from heliostat.errors import ConfigError

IGNORED = ".gitignore"  # `gitignore` in the template: packages leave out what begins with a dot


def create(folder: Path) -> list[str]:
    """Writes the workspace's files; returns their paths in the folder. ConfigError, and nothing written, if one is there already.

    A `.gitignore` that is there gets the lines that it lacks.
    """
    shipped = _files(files("heliostat.cli") / "template", "")
    template = {(IGNORED if path == "gitignore" else path): file for path, file in shipped}
    try:
        _refuse(folder, list(template))
        for path, file in template.items():
            place, content = folder / path, file.read_text(encoding="utf-8")
            place.parent.mkdir(parents=True, exist_ok=True)
            if path == IGNORED and place.exists():
                place.write_text(_with_lines(place.read_text(encoding="utf-8"), content), encoding="utf-8")
            else:
                with place.open("x", encoding="utf-8") as out:
                    out.write(content)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{folder}: cannot become a workspace ({e})") from e
    return sorted(template)


def _refuse(folder: Path, paths: list[str]) -> None:
    """Refuses, by a ConfigError, to write where a path, or a folder that it needs, is something else already."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; give another name")
    blocking = {p for path in paths for p in Path(path).parents if (folder / p).exists() and not (folder / p).is_dir()}
    here = sorted(map(str, blocking)) + [path for path in paths if path != IGNORED and (folder / path).exists()]
    if here:
        more = f" and {len(here) - 1} more" if len(here) > 1 else ""
        raise ConfigError(f"{folder}: has {here[0]}{more} already; nothing was written; give another folder, or move them away")


def _files(folder: Traversable, below: str) -> list[tuple[str, Traversable]]:
    files = []
    for entry in folder.iterdir():
        path = f"{below}{entry.name}"
        files += _files(entry, f"{path}/") if entry.is_dir() else [(path, entry)]
    return files


def _with_lines(text: str, wanted: str) -> str:
    """Appends to the text those of the wanted lines that it lacks."""
    missing = [line for line in wanted.splitlines() if line not in text.splitlines()]
    ended = text if not text or text.endswith("\n") else f"{text}\n"
    return ended + "".join(f"{line}\n" for line in missing)
