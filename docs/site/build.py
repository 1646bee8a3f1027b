"""Builds the documentation site: `make docs`. Pages are staged in `build/docs/pages`, the site is `build/docs/site/index.html`.

What staging does: a line `<!-- generated: NAME -->` becomes the reference of that name (`GENERATED`), made from the code at that
moment; links to files of the repository become links to pages that show those files; CONTRIBUTING, AGENTS and CHANGELOG join the
pages. Then Zensical builds with warnings as errors (broken links and anchors), and the result is searched for whatever a browser
would fetch from elsewhere: the site works without a network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from heliostat.cli.main import app
from heliostat.config.deepspeed_keys import Allowed
from heliostat.config.spec import Job
from heliostat.curation.conversations import reading as conversations
from heliostat.curation.conversations.pipeline import ConversationPipeline, PreferencePipeline
from heliostat.curation.images import pictures
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.pairs import reading
from heliostat.curation.pairs.pipeline import PairPipeline
from heliostat.curation.references.pipeline import ReferencePipeline
from heliostat.curation.text import documents
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.evaluation.suite import Suite
from heliostat.recipes.images.config import Model
from heliostat.recipes.text.dpo import DPOSettings
from heliostat.tune.sweep import Sweep

from docs.site import api, commands, keys, schemas, versions

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent
BUILD = ROOT / "build" / "docs"
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "AGENTS.md")  # where people and tools look for them
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".md": "markdown", ".txt": "text"}


def reasons(told: dict[str, str]) -> str:
    """Writes why a pipeline leaves something out, as a Markdown table."""
    return "\n".join(["| reason | what it means |", "|---|---|", *(f"| `{reason}` | {what} |" for reason, what in told.items())])


def figure(file: Path) -> str:
    """Writes a picture into the page itself, where it has the page's colours: as one line, which Markdown leaves alone."""
    return f"<figure>{file.read_text(encoding='utf-8').replace(chr(10), ' ')}</figure>"


GENERATED: dict[str, Callable[[], str]] = {
    "keys of a job": lambda: keys.reference(Job),
    "keys of DeepSpeed": lambda: keys.reference(Allowed, "train.deepspeed"),
    "keys of an image model": lambda: keys.reference(Model, "model"),
    "keys of a text pipeline": lambda: keys.reference(TextPipeline),
    "keys of an image pipeline": lambda: keys.reference(ImagePipeline),
    "keys of a pipeline of pairs": lambda: keys.reference(PairPipeline),
    "keys of a pipeline of conversations": lambda: keys.reference(ConversationPipeline),
    "keys of a pipeline of preferences": lambda: keys.reference(PreferencePipeline),
    "keys of DPO": lambda: keys.reference(DPOSettings, "model.dpo"),
    "keys of a pipeline of references": lambda: keys.reference(ReferencePipeline),
    "keys of stages": keys.stages,
    "keys of a sweep": lambda: keys.reference(Sweep),
    "keys of a suite": lambda: keys.reference(Suite),
    "reasons of the text pipeline": lambda: reasons(documents.REASONS),
    "reasons of the image pipeline": lambda: reasons(pictures.REASONS),
    "reasons of the pipeline of pairs": lambda: reasons(reading.REASONS),
    "reasons of the pipelines of conversations": lambda: reasons(conversations.REASONS),
    "commands": lambda: commands.reference(app),
    "exit codes": commands.exit_codes,
    "error classes": api.errors,
    "tested versions": versions.table,
    "python types": api.aliases,
    "python api": api.public,
    "recipe protocol": api.recipes,
    "architecture": lambda: figure(ROOT / "docs/images/architecture.svg"),
}
MARK = re.compile(r"^<!-- generated: ([\w ]+?) -->$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCED = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)


def sources() -> dict[Path, Path]:
    """Maps every page and picture, by its path in the repository, to its path in the site."""
    found = {p.relative_to(ROOT): p.relative_to(ROOT / "docs") for p in sorted((ROOT / "docs").rglob("*"))
             if p.suffix in (".md", ".svg", ".png") and SITE not in p.parents}  # fmt: skip
    return found | {Path(name): Path(name) for name in ROOT_PAGES}


class Stage:
    """Copies the pages into a folder of their own, with the generated parts filled in and the links changed to the site's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.places = folder, sources()
        self.shown: dict[Path, Path] = {}  # files of the repository that pages link to, with their pages
        self.broken: list[str] = []  # links to files that are not there; those to pages and anchors Zensical finds

    def write(self) -> None:
        for source, place in self.places.items():
            target = self.folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".md":
                text = MARK.sub(lambda m: GENERATED[m[1]](), (ROOT / source).read_text(encoding="utf-8"))
                target.write_text(self.linked(text, source, place), encoding="utf-8")
            else:
                shutil.copyfile(ROOT / source, target)
        for source, place in self.shown.items():
            target = self.folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            text = (ROOT / source).read_text(encoding="utf-8")
            target.write_text(f"# `{source}`\n\n`````{LANGUAGES.get(source.suffix, 'text')}\n{text}\n`````\n", encoding="utf-8")

    def linked(self, text: str, source: Path, place: Path) -> str:
        """Changes the links of a page to the site's, except in code blocks."""
        parts, end = [], 0
        for block in FENCED.finditer(text):
            parts += [LINK.sub(lambda m: self.target(m[1], source, place), text[end : block.start()]), block[0]]
            end = block.end()
        return "".join([*parts, LINK.sub(lambda m: self.target(m[1], source, place), text[end:])])

    def target(self, link: str, source: Path, place: Path) -> str:
        """Resolves where a link leads in the site. One that leads nowhere stays, for the build to find."""
        path, mark, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link
        wanted = Path(path) if path.startswith("docs/") else Path(os.path.normpath(source.parent / path))
        if wanted in self.places:
            to = self.places[wanted]
        elif (ROOT / wanted).is_file():
            to = self.shown.setdefault(wanted, Path("files") / f"{wanted}.md")
        else:
            if wanted.suffix != ".md":
                self.broken.append(f"{source}: {link}: there is no such file")
            return link
        return os.path.relpath(to, place.parent) + mark + anchor


class Fetches(HTMLParser):
    """Collects what a browser fetches when it opens a page."""

    RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and self.RELATIONS & set((given.get("rel") or "").split()):
            self.urls.append(given.get("href") or "")
        elif tag != "a":
            self.urls += [given[name] or "" for name in ("src", "srcset", "data", "poster", "xlink:href") if name in given]
            if tag in ("use", "image"):
                self.urls.append(given.get("href") or "")


def fetched_from_elsewhere(site: Path) -> list[str]:
    """Lists as `FILE: URL` everything in a built site that comes from another server: by tags, styles and style sheets."""
    found = []
    for file in sorted([*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]):
        text = file.read_text(encoding="utf-8")
        urls = re.findall(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""", text)
        tags = Fetches()
        if file.suffix != ".css":
            tags.feed(text)
        for url in [*(first or second for first, second in urls), *tags.urls]:
            if re.match(r"\s*([a-z]+:)?//", url, re.IGNORECASE):
                found.append(f"{file.relative_to(site)}: {url.strip()}")
    return found


def build(folder: Path = BUILD) -> Path:
    """Builds the site into the folder, and returns the folder of the built site; SystemExit if there is anything to warn of."""
    shutil.rmtree(folder, ignore_errors=True)
    stage = Stage(folder / "pages")
    stage.write()
    shutil.copytree(schemas.FOLDER, folder / "pages" / "schemas")
    if stage.broken:
        raise SystemExit("\n".join(stage.broken))
    shutil.copytree(SITE / "assets", folder / "pages" / "assets")
    shutil.copyfile(SITE / "zensical.toml", folder / "zensical.toml")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / "zensical.toml")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        told = re.sub(r"\x1b\[[\d;]*m", "", done.stderr.partition("Traceback")[0])
        raise SystemExit(f"{told}\nthe documentation has faults, see above; its pages are in {folder / 'pages'}")
    if foreign := fetched_from_elsewhere(folder / "site"):
        raise SystemExit("\n".join(["the site would fetch from elsewhere:", *foreign]))
    return folder / "site"


if __name__ == "__main__":
    sys.stdout.write(f"{build() / 'index.html'}\n")
