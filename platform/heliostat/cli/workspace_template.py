"""Creates a new workspace with the quickstart's jobs, pipelines, and local cluster.

The files come from `template/`. Each is identical to the file with the same path in heliostat's repository.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from heliostat.errors import ConfigError

IGNORED = ".gitignore"  # its name is `gitignore` in the template, because packages omit files that begin with a dot


def create(folder: Path) -> list[str]:
    """Writes the workspace's files, and returns their paths in the folder. If one of the files exists already, raises ConfigError
    and writes nothing.

    An existing `.gitignore` isn't an error: this function appends the missing lines.
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
        raise ConfigError(f"{folder}: can't become a workspace ({e}). Pass another folder") from e
    return sorted(template)


def _refuse(folder: Path, paths: list[str]) -> None:
    """Raises ConfigError if a file already exists, or if a file has the path of a folder of the workspace."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: isn't a folder. Pass another name")
    blocking = {p for path in paths for p in Path(path).parents if (folder / p).exists() and not (folder / p).is_dir()}
    here = sorted(map(str, blocking)) + [path for path in paths if path != IGNORED and (folder / path).exists()]
    if here:
        more = f" and {len(here) - 1} more" if len(here) > 1 else ""
        raise ConfigError(
            f"{folder}: already has {here[0]}{more}, so nothing was written. Pass another folder, or empty this folder"
        )


def _files(folder: Traversable, below: str) -> list[tuple[str, Traversable]]:
    files = []
    for entry in folder.iterdir():
        path = f"{below}{entry.name}"
        files += _files(entry, f"{path}/") if entry.is_dir() else [(path, entry)]
    return files


def _with_lines(text: str, wanted: str) -> str:
    """Appends the wanted lines that the text lacks."""
    missing = [line for line in wanted.splitlines() if line not in text.splitlines()]
    ended = text if not text or text.endswith("\n") else f"{text}\n"
    return ended + "".join(f"{line}\n" for line in missing)
