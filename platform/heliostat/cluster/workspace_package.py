"""Packages the workspace for a job: code and small files, but never data, secrets, or `.git`.

The package silently leaves out all files that a `.gitignore` file excludes. It also leaves out the following files, and lists
them in `Packed.left_out`:

- data
- files whose names suggest a secret, in upper or lower case
- YAML files that contain a password
- links to files that aren't sent

If a workspace is above the limit, an error lists the biggest files. Without the limit, a mistake could send gigabytes to every
node.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from heliostat import redact
from heliostat.errors import ConfigError

log = logging.getLogger(__name__)

LIMIT = 50 << 20
CODE_FILE = "heliostat-code.json"  # in a workspace that was sent to a cluster: the git state of the original workspace
SHOWN = 8
MACHINERY = GitIgnoreSpec.from_lines(  # left out without a report
    [".git", ".gitignore", ".hg", ".svn", ".venv", "venv", ".heliostat", "node_modules", "__pycache__", "*.pyc", "*.egg-info",
     "mlruns"]
)  # fmt: skip
DATA = GitIgnoreSpec.from_lines(
    ["*.db", "*.sqlite", "*.sqlite3", "*.parquet", "*.arrow", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.tar"]
)
SECRETS = GitIgnoreSpec.from_lines(  # these patterns are matched with paths in lower case
    [
        *("id_*", "!id_*.py"),  # ssh keys, but not Python modules
        *("*.pem", "*.key", "*.p12", "*.pfx", "*.p8", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.token"),
        *(".env", ".env.*", "*.env", ".envrc", ".direnv"),
        *("secrets", "secrets.*", "*.secret", "*.secrets", "*secret*.y*ml", "*secret*.json", "*secret*.toml"),
        *("credentials", "credentials.*", ".credentials", "*credentials*.json", ".git-credentials", "auth_token", ".vault-token"),
        *("key.json", "*-key.json", "*_key.json", "*-keys.json", "*keyfile*.json", "*service-account*.json"),
        *("*service_account*.json", "*serviceaccount*.json", "kaggle.json", "hf_token", ".hf_token"),
        *("token", "token.txt", "stored_tokens", ".huggingface", "**/.cache/huggingface"),
        *(
            ".ssh",
            ".aws",
            ".azure",
            ".boto",
            ".s3cfg",
            "**/.config/gcloud",
            ".docker",
            ".dockercfg",
            ".gnupg",
            ".kaggle",
            ".kube",
        ),
        *("kubeconfig*", "*.kubeconfig", ".mc", "rclone.conf", ".rclone.conf"),
        *(".netrc", "_netrc", ".pgpass", "pgpass.conf", ".my.cnf", ".mylogin.cnf", ".htpasswd"),
        *(".npmrc", ".yarnrc", ".yarnrc.yml", ".pypirc", "pip.conf"),
        *("*.tfvars", "*.tfvars.json", "*.tfstate", "*.tfstate.*", ".terraform"),
    ]
)
YAML = (".yaml", ".yml")
SECRET, HOLDS, KEPT, LINK = "may contain secrets", "contain a password", "are data", "are links to files outside the package"


@dataclass
class Packed:
    """Lists the files that are sent with a job, and the files that are left out.

    `files`: sorted relative paths of the sent files. `left_out`: the paths that aren't sent, by reason, except paths that a
    .gitignore excludes.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, path: Path, folder: bool = False) -> None:
        self.left_out.setdefault(reason, []).append(f"{path}{'/' if folder else ''}")


def private(path: str) -> bool:
    """Checks whether a path (relative to the workspace) must never be shown or sent, because the path belongs to data or
    suggests a secret."""
    return bool(_never(path))


def _never(path: str) -> str | None:
    if MACHINERY.match_file(path):
        return ""
    return SECRET if SECRETS.match_file(path.lower()) else KEPT if DATA.match_file(path) else None


def look(workspace: Path, limit: int = LIMIT) -> Packed:
    """Selects the files that are sent with a job; raises ConfigError if the files together have more than `limit` bytes."""
    packed, links = Packed(), list[Path]()
    for path in _walk(workspace, Path(), [], packed):
        if (workspace / path).is_symlink():
            links.append(path)
        elif path.suffix.lower() in YAML and _holds_password(workspace / path):
            packed.leave(HOLDS, path)
        else:
            packed.files.append(path)
    travels = set(packed.files)
    for path in links:
        target, home = (workspace / path).resolve(), workspace.resolve()
        if target.is_relative_to(home) and target.relative_to(home) in travels:
            packed.files.append(path)
        else:
            packed.leave(LINK, path)
    packed.files.sort()
    sizes = {path: (workspace / path).stat().st_size for path in packed.files}
    if (total := sum(sizes.values())) > limit:
        biggest = sorted(sizes, key=lambda p: -sizes[p])[:SHOWN]
        shown = "\n".join(f"  {sizes[p] / 2**20:8.1f} MiB  {p}" for p in biggest)
        raise ConfigError(
            f"the workspace {workspace} has {total / 2**20:.1f} MiB to send, and the limit is {limit / 2**20:.0f}. "
            f"Put data into storage, and list unneeded files in .gitignore. The biggest:\n{shown}"
        )
    return packed


def _holds_password(path: Path) -> bool:
    return bool(redact.secret_lines(path.read_text(encoding="utf-8", errors="replace").split("\n"), settings=True))


def _walk(workspace: Path, folder: Path, specs: list[tuple[Path, GitIgnoreSpec]], packed: Packed) -> Iterator[Path]:
    ignore = workspace / folder / ".gitignore"
    if ignore.is_file():
        lines = ignore.read_text(encoding="utf-8", errors="replace").splitlines()
        specs = [*specs, (folder, GitIgnoreSpec.from_lines(lines))]
    for entry in sorted(os.scandir(workspace / folder), key=lambda e: e.name):
        path, is_folder = folder / entry.name, entry.is_dir(follow_symlinks=False)
        if _ignored(path, is_folder, specs):
            continue
        reason = _never(f"{path}/" if is_folder else str(path))
        if reason is not None:
            if reason:
                packed.leave(reason, path, is_folder)
        elif is_folder:
            yield from _walk(workspace, path, specs, packed)
        elif entry.is_file() or entry.is_symlink():
            yield path


def _ignored(path: Path, folder: bool, specs: list[tuple[Path, GitIgnoreSpec]]) -> bool:
    """Checks whether git ignores the path. If several .gitignore files have a matching pattern, the deepest file decides."""
    for base, spec in reversed(specs):
        said = spec.check_file(f"{path.relative_to(base)}{'/' if folder else ''}").include
        if said is not None:
            return said
    return False


def stage(workspace: Path, target: Path, limit: int = LIMIT) -> Packed:
    """Copies the files that are sent with a job into `target`, and warns about the files that are left out."""
    packed = look(workspace, limit)
    for path in packed.files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(workspace / path, target / path)
    for reason, paths in packed.left_out.items():
        more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
        log.warning("not sending %d paths that %s: %s%s", len(paths), reason, ", ".join(paths[:SHOWN]), more)
    return packed


def stage_package(target: Path) -> Path:
    """Copies the running heliostat package, without its dependencies, into `target`. Returns the copy's path."""
    import heliostat

    assert heliostat.__file__
    source = Path(heliostat.__file__).parent
    return Path(shutil.copytree(source, target / "heliostat", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")))
