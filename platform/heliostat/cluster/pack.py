"""What of the workspace travels with a job: code and small files, never data, secrets or `.git`.

`.gitignore` files are respected, in every folder. What is left out beside is in `NEVER`. A workspace above the limit is refused
with its biggest paths, because a mistake here is gigabytes on every node.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

from heliostat.errors import ConfigError

LIMIT = 50 << 20
CODE_FILE = "heliostat-code.json"  # of a workspace that has travelled: what git said of it before
SHOWN = 8
NEVER = GitIgnoreSpec.from_lines(
    [
        *(".git", ".hg", ".svn", ".venv", "venv", ".heliostat", "node_modules", "__pycache__", "*.pyc", "*.egg-info"),
        *("mlruns", "*.db", "*.sqlite", "*.sqlite3", "*.parquet", "*.arrow", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.tar"),
        *(".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", "id_ecdsa*", ".ssh", ".aws", ".netrc"),
        *(
            "credentials",
            "credentials.*",
            "auth_token",
            "kubeconfig*",
            ".kube",
            "*service-account*.json",
            "secrets.*",
            ".gitignore",
        ),
    ]
)


def files(workspace: Path, limit: int = LIMIT) -> list[Path]:
    """Relative paths of what travels, sorted; ConfigError above `limit` bytes."""
    found = sorted(_walk(workspace, Path(), []))
    sizes = {path: (workspace / path).stat().st_size for path in found}
    if (total := sum(sizes.values())) > limit:
        biggest = sorted(sizes, key=lambda p: -sizes[p])[:SHOWN]
        shown = "\n".join(f"  {sizes[p] / 2**20:8.1f} MiB  {p}" for p in biggest)
        raise ConfigError(
            f"the workspace {workspace} has {total / 2**20:.1f} MiB to send, and the limit is {limit / 2**20:.0f}; data "
            f"belongs into storage. Put what the job does not need into .gitignore. The biggest:\n{shown}"
        )
    return found


def _walk(workspace: Path, folder: Path, specs: list[tuple[Path, GitIgnoreSpec]]) -> Iterator[Path]:
    ignore = workspace / folder / ".gitignore"
    if ignore.is_file():
        lines = ignore.read_text(encoding="utf-8", errors="replace").splitlines()
        specs = [*specs, (folder, GitIgnoreSpec.from_lines(lines))]
    for entry in os.scandir(workspace / folder):
        path = folder / entry.name
        inside = (workspace / path).resolve().is_relative_to(workspace.resolve())
        if entry.is_dir(follow_symlinks=False):
            if not _ignored(path, True, specs):
                yield from _walk(workspace, path, specs)
        elif entry.is_file() and inside and not _ignored(path, False, specs):
            yield path


def _ignored(path: Path, folder: bool, specs: list[tuple[Path, GitIgnoreSpec]]) -> bool:
    """As git decides: the deepest .gitignore that says anything of the path; NEVER above them all."""
    mark = "/" if folder else ""
    if NEVER.match_file(f"{path}{mark}"):
        return True
    for base, spec in reversed(specs):
        said = spec.check_file(f"{path.relative_to(base)}{mark}").include
        if said is not None:
            return said
    return False


def stage(workspace: Path, target: Path, limit: int = LIMIT) -> None:
    """Copies what travels into a folder."""
    for path in files(workspace, limit):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(workspace / path, target / path)


def stage_package(target: Path) -> Path:
    """Copies the running heliostat package: what a wheel of it holds, and no dependency."""
    import heliostat

    assert heliostat.__file__
    source = Path(heliostat.__file__).parent
    return Path(shutil.copytree(source, target / "heliostat", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")))
