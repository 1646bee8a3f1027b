"""Parses names of the Hugging Face Hub: `ORG/NAME[/FOLDER][@REVISION]` for models, `hf://datasets/ORG/NAME[/PATH][@REVISION]`.

A revision is a branch, a tag, or a commit. A name with the 40 digits of a commit is pinned: it always identifies the same files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from heliostat.errors import ConfigError
from heliostat.storage.locations import is_inside

SCHEME = "hf://"
DATASETS = "hf://datasets/"
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.))*"
MODEL = re.compile(rf"(?P<repo>{PART}/{PART})(?:/(?P<inside>{PART}(?:/{PART})*))?(?:@(?P<revision>[\w./-]+))?")
REPO = re.compile(rf"{PART}/{PART}")
REVISION = re.compile(r"(?P<revision>refs/(?:convert|pr)/[\w-]+|[\w.-]+)(?:/(?P<inside>.*))?")


@dataclass(frozen=True)
class HubName:
    """Identifies a model or a dataset on the Hub, at a revision. `inside`: a folder, file, or glob in the repository; "" for
    all files."""

    kind: Literal["model", "dataset"]
    repo: str
    revision: str = MAIN
    inside: str = ""

    def __str__(self) -> str:
        inside = f"/{self.inside}" if self.inside else ""
        if self.kind == "dataset":
            return f"{DATASETS}{self.repo}@{self.revision}{inside}"
        return f"{self.repo}{inside}@{self.revision}"

    @property
    def pinned(self) -> bool:
        return COMMIT.fullmatch(self.revision) is not None

    @property
    def command(self) -> str:
        """Returns the command that downloads the complete repository."""
        revision = "" if self.revision == MAIN else f" --revision {self.revision}"
        return f"hf download {self.repo}{' --repo-type dataset' if self.kind == 'dataset' else ''}{revision}"

    def at(self, commit: str) -> HubName:
        return replace(self, revision=commit)


def model(name: str) -> HubName | None:
    """Parses the name of a model on the Hub; None if the text can't be such a name."""
    match = MODEL.fullmatch(name)
    if match is None or not _is_revision(match["revision"] or MAIN):
        return None
    return HubName("model", match["repo"], match["revision"] or MAIN, match["inside"] or "")


def _is_revision(text: str) -> bool:
    """Returns whether a text can be a revision. Because the cache uses the revision as a path, the text must also be a valid
    path."""
    return is_inside(text) and re.fullmatch(r"[\w./-]+", text) is not None


def is_dataset(uri: str) -> bool:
    return uri.startswith(SCHEME)


def dataset(key: str, uri: str) -> HubName:
    """Parses the URI of a dataset. The revision can be after the dataset's name, or at the end of the URI.

    Raises ConfigError if the URI isn't a dataset's.
    """
    expected = f"{DATASETS}ORG/NAME[/PATH][@REVISION]"
    org, _, rest = uri.removeprefix(DATASETS).partition("/")
    name, mark, inside = rest.partition("/")
    revision = MAIN
    if "@" in name:  # the form that Hugging Face uses
        name, _, rest = f"{name}{mark}{inside}".partition("@")
        if not (match := REVISION.fullmatch(rest)):
            raise ConfigError(f"{key}: {uri!r}: {rest!r} isn't a revision. Write {expected}")
        revision, inside = match["revision"], match["inside"] or ""
    elif "@" in inside:
        inside, _, revision = inside.rpartition("@")
    repo = f"{org}/{name}"
    if not uri.startswith(DATASETS) or not REPO.fullmatch(repo) or not _is_revision(revision):
        raise ConfigError(f"{key}: {uri!r} isn't a dataset of the Hugging Face Hub. Write {expected}")
    if ".." in inside.split("/"):
        raise ConfigError(f"{key}: {uri!r}: the path leaves the dataset. Remove '..'")
    return HubName("dataset", repo, revision, inside.strip("/"))
