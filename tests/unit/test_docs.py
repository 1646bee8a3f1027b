"""Tests that the documentation is true: its keys, paths, commands, options, and names exist, and the navigation has every
page."""

import ast
import importlib
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
import yaml
from heliostat.cli import groups
from heliostat.cli.main import app
from heliostat.config.deepspeed_keys import Allowed
from heliostat.config.spec import Job
from heliostat.curation import registry
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.pairs.pipeline import PairPipeline
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.evaluation.suite import Suite
from heliostat.recipes.images.config import Model
from heliostat.tune.sweep import Sweep
from pydantic import BaseModel, Field

from docs.site import build, commands, keys

ROOT = Path(__file__).parents[2]
PAGES = [p for p in build.sources() if p.suffix == ".md" and p.name != "CHANGELOG.md"] + [Path("README.md")]
TEXTS = {str(p): (ROOT / p).read_text(encoding="utf-8") for p in PAGES}
PYTHON = [
    p.relative_to(ROOT) for folder in ("platform", "jobs", "pipelines", "tests", "docs") for p in (ROOT / folder).rglob("*.py")
]
GROUP: Any = typer.main.get_command(app)
FOLDERS = "platform|jobs|pipelines|clusters|tests|docs"
NO_MODULES = {
    "json",
    "checkpoint",
    "spikes",
    "corruption",
    "bad_nodes",
    "deleted",
    "history",
    "reason",
    "clones",
    "pruned",
}  # a file; MLflow's tags and types
ELSEWHERE = {"ds_to_universal.py", "zero_to_fp32.py", "torchtitan/components/data/loader.py"}  # of other projects
MADE = {"jobs/llama3-8b-transferred.yaml", "jobs/digits.py", "jobs/digits.yaml", "pipeline.py", "shapes.py"}  # as the page says


@pytest.mark.parametrize(
    "model", [Job, Allowed, Model, TextPipeline, ImagePipeline, PairPipeline, Sweep, Suite], ids=lambda m: m.__name__
)
def test_every_key_of_every_schema_has_a_description(model):
    missing = [
        f"{section.path}.{name}".lstrip(".")
        for section in keys.sections(model)
        for name, told in keys.descriptions(section.model).items()
        if not told
    ]
    assert missing == []


def test_every_stage_of_a_pipeline_and_each_of_its_keys_is_in_the_reference():
    sections = dict(re.findall(r"^## `(\w+)`\n\n(.+?)(?=^## |\Z)", keys.stages(), re.M | re.S))
    assert sorted(sections) == registry.names()
    for name, text in sections.items():
        assert not text.startswith("`"), f"{name}: the docstring of its module says nothing"
        described = keys.descriptions(registry.find(name))
        assert [key for key, meaning in described.items() if not meaning or f"`{key}`" not in text] == []


def test_every_key_of_a_job_is_in_the_reference_with_its_type_and_default():
    """The reference follows the models: it has each key's type, range, default, and meaning, under the path for --set."""
    text = keys.reference(Job)
    assert "`warmup_steps`{ #train.schedule.warmup_steps } <small>whole number, at least 0; default `0`</small>" in text
    assert "`register`{ #mlflow.register }" in text  # by its name in the file
    assert "<small>`cosine`, `constant`, `linear`, `wsd`" in text
    assert "<small>bytes, as `512MiB`; default 2 GiB</small>" in text
    for section in keys.sections(Job):
        for name, info in section.model.model_fields.items():
            assert f"`{info.alias or name}`" in text
        assert not section.path or f"### `{section.path}`" in text


class Fast(BaseModel):
    """Goes fast."""

    name: Literal["fast"] = "fast"
    """Which it is."""
    speed: Annotated[float, Field(gt=0)]
    """How fast."""


class Slow(BaseModel):
    """Goes slowly."""

    name: Literal["slow"] = "slow"
    """Which it is."""


class Mover(BaseModel):
    ways: dict[str, Annotated[Fast | Slow, Field(discriminator="name")]]
    """How it goes."""


def test_a_key_that_may_hold_several_kinds_has_a_section_for_each():
    text = keys.reference(Mover)
    assert "`ways` <small>mapping to [its keys](#ways.KEY); **required**</small>\n:   How it goes." in text
    assert "### `ways.KEY`, `name: fast` { #ways.KEY }\n\nGoes fast." in text
    assert "### `ways.KEY`, `name: slow` { #ways.KEY-slow }\n\nGoes slowly." in text
    assert "`speed`{ #ways.KEY.speed } <small>number, above 0; **required**</small>\n:   How fast." in text


def test_every_command_and_option_is_in_the_reference():
    text = commands.reference(app)
    for name, command in commands.leaves(GROUP):
        assert f"## `{name}`" in text
        section = text.partition(f"## `{name}`\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            if parameter.name != "help":
                spelled = [*parameter.opts, str(parameter.metavar)]  # an argument is shown by its metavar, if it has one
                assert any(f"`{word}" in section or f", {word}" in section for word in spelled), (name, spelled)


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    def entries(nav: Any) -> Iterator[str]:
        for entry in nav if isinstance(nav, list) else [nav]:
            yield from [entry] if isinstance(entry, str) else (page for inner in entry.values() for page in entries(inner))

    config = tomllib.loads((ROOT / "docs/site/zensical.toml").read_text())
    listed = list(entries(config["project"]["nav"]))
    assert sorted(listed) == sorted(str(place) for place in build.sources().values() if place.suffix == ".md")


def test_every_marker_of_a_generated_part_is_known_and_each_part_is_in_a_page():
    found = [name for text in TEXTS.values() for name in build.MARK.findall(text)]
    assert sorted(found) == sorted(build.GENERATED)


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_that_a_page_names_exists(page):
    """Checks paths of the repository in text, code, and links (a star matches anything), and Python files by the end of their
    path."""
    named = set(re.findall(rf"(?<![\w/.:-])((?:{FOLDERS})/[\w./*-]*[\w*])", TEXTS[page])) - MADE
    missing = {n for n in named if not any(ROOT.glob(n))}
    ends = {n for n in re.findall(r"`([\w/]+\.py)`", TEXTS[page]) if not re.match(rf"(?:{FOLDERS})/", n)}
    missing |= {n for n in ends - MADE - ELSEWHERE - saved(TEXTS[page]) if not any(str(p).endswith("/" + n) for p in PYTHON)}
    assert sorted(missing) == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_dotted_name_that_a_page_names_exists(page):
    named = set(re.findall(r"(?<![\w/.-])heliostat((?:\.[A-Za-z_]\w*)+(?::\w+)?)", TEXTS[page]))
    wrong = [f"heliostat{n}" for n in named if n.split(".")[1] not in NO_MODULES and not resolves(f"heliostat{n}")]
    assert sorted(wrong) == []


def saved(text: str) -> set[str]:
    """Returns the names of the files that a page tells its reader to save: blocks that begin with `# NAME`."""
    return set(re.findall(r"^```(?:python|yaml)\n# ([\w.-]+\.\w+)$", text, re.MULTILINE))


def resolves(name: str) -> bool:
    parts = name.replace(":", ".").split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def blocks(text: str, language: str) -> Iterator[str]:
    """Yields the code of a page's blocks in a language, without the indentation of lists."""
    yield from (textwrap.dedent(code) for code in re.findall(rf"^ *```(?:{language})\b[^\n]*\n(.*?)^ *```", text, re.M | re.S))


def test_all_blocks_of_a_page_are_read():
    text = "1. a\n\n    ```yaml\n    a: 1\n    ```\n\n```yaml title\nb: 2\n```\n```sh\nc\n```\n"
    assert list(blocks(text, "yaml|yml")) == ["a: 1\n", "b: 2\n"]


JOB_KEYS = {
    keys.anchor(f"{section.path}.{info.alias or name}".lstrip(".")).removesuffix(".KEY")
    for section in keys.sections(Job)
    for name, info in section.model.model_fields.items()
}


def unknown_keys(part: Any, at: str = "") -> Iterator[str]:
    """Yields the keys of a part of a job that the schema lacks. A mapping with free keys (`model`, `train.deepspeed`) accepts
    any."""
    for key, value in part.items() if isinstance(part, dict) else ():
        path = f"{at}.{key}".lstrip(".")
        if path not in JOB_KEYS:
            yield path
        elif any(known.startswith(f"{path}.") for known in JOB_KEYS):
            for inner in value if isinstance(value, list) else [value]:
                yield from unknown_keys(inner, path)


@pytest.mark.parametrize("page", TEXTS)
def test_every_yaml_block_of_a_page_can_be_read_and_a_jobs_keys_exist(page):
    parts = [yaml.safe_load(code) for code in blocks(TEXTS[page], "yaml|yml")]
    jobs = [part for part in parts if isinstance(part, dict) and set(part) <= Job.model_fields.keys()]
    assert [key for job in jobs for key in unknown_keys(job)] == []


def imported(code: str) -> Iterator[str]:
    """Yields the names that code imports from this repository, with their modules."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("page", TEXTS)
def test_every_import_in_a_pages_code_exists(page):
    names = {name for code in blocks(TEXTS[page], "python|py") for name in imported(code)}
    ours = {name for name in names if name.split(".")[0] in ("heliostat", "tests", "docs")}
    assert sorted(name for name in ours if not resolves(name)) == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_python_file_and_module_that_a_page_runs_exists(page):
    lines = [line for code in blocks(TEXTS[page], "sh|bash") for line in code.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", TEXTS[page]) + re.findall(r"^ {4,}(.*python .*)$", TEXTS[page], re.M)
    wrong = []
    for line in lines:
        for module, path in re.findall(r"(?:^|[\s/])python3? (?:-m ((?:heliostat|tests|docs)[\w.]*)|([\w/.-]+\.py)\b)", line):
            place = (
                ROOT / "platform" / module.replace(".", "/")
                if module.startswith("heliostat")
                else ROOT / module.replace(".", "/")
            )
            if module and not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
                wrong.append(line)
            if path and path not in MADE | saved(TEXTS[page]) and not (ROOT / path).is_file():
                wrong.append(line)
    assert wrong == []


def written(name: str) -> bool:
    """Returns, without an import, whether the package has a module of this name, or a module that defines the name's next
    part."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = (ROOT / "platform" / "heliostat").joinpath(*parts[:end])
        place = next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), place)
        if place.is_file():
            return end == len(parts) or re.search(rf"\b{parts[end]}\b", place.read_text(encoding="utf-8")) is not None
    return False


def test_every_module_that_a_docstring_names_exists():
    """A dotted name that begins with a room is a module or its member, a key of a job, or a file."""
    package, wrong = ROOT / "platform" / "heliostat", []
    rooms = "|".join(p.name for p in package.iterdir() if p.is_dir() and p.name.isidentifier())
    job_keys = {f"{section.path}.{name}" for section in keys.sections(Job) for name in section.model.model_fields}
    for path in package.rglob("*.py"):
        for text in re.findall(r'"""(.*?)"""', path.read_text(encoding="utf-8"), re.S):
            named = re.findall(rf"`(?:heliostat\.)?((?:{rooms})(?:\.\w+)+)`", text)
            wrong += [f"{path.relative_to(ROOT)}: {n}" for n in named
                      if not n.endswith((".json", ".py")) and n not in job_keys and not written(n)]  # fmt: skip
    assert wrong == []


def spoken(text: str) -> Iterator[str]:
    """Yields each heliostat command on a page: lines of shell blocks, and inline code."""
    blocks = re.findall(r"^ *```(?:sh|bash)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))]:
        for part in re.split(r"&&|;|\|\s", line.partition(" #")[0]):
            if found := re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?heliostat ([a-z].*)", part):
                yield found[1]


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_and_option_that_a_page_names_exists(page):
    wrong = []
    for line in spoken(TEXTS[page]):
        _, name, words = groups.current(shlex.split(re.sub(r"[\[\]|()]|\.\.\.", " ", line)))
        words = [*name.split(), *words]
        command: Any = GROUP
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if hasattr(command, "commands"):
            if (words and command is GROUP) or any(w.startswith("-") for w in words):
                wrong.append(f"heliostat {line}: no such command")
            continue
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        wrong += [f"heliostat {line}: {w}" for w in words if w.startswith("-") and w.partition("=")[0] not in options]
    assert wrong == []


def test_a_link_to_a_file_of_the_repository_leads_to_a_page_that_shows_it(tmp_path):
    stage = build.Stage(tmp_path)
    page, place = Path("docs/tutorials/text.md"), Path("tutorials/text.md")
    text = "[c](../../clusters/local.yaml) [j](../job.md#keys) [x](https://x.org/a) [n](nowhere.md)\n"
    text += "```sh\n[c](../../LICENSE)\n```\n"
    linked = stage.linked(text, page, place)
    assert "[c](../files/clusters/local.yaml.md) [j](../job.md#keys) [x](https://x.org/a) [n](nowhere.md)" in linked
    assert "[c](../../LICENSE)" in linked  # code is left alone
    assert stage.shown == {Path("clusters/local.yaml"): Path("files/clusters/local.yaml.md")}


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img src="http://img.example/a.png">',
        "<style>@import 'https://fonts.example/css';</style>",
        '<p style="background: url(https://img.example/a.png)">',
        '<iframe src="https://video.example/"></iframe>',
    ],
)
def test_what_a_page_would_fetch_from_elsewhere_is_found(html, tmp_path):
    (tmp_path / "page.html").write_text(f"<p>{html}</p>")
    assert len(build.fetched_from_elsewhere(tmp_path)) == 1


def test_a_link_that_a_person_follows_is_no_fetch(tmp_path):
    (tmp_path / "page.html").write_text(
        '<a href="https://x.org">x</a><img src="a.png"><link rel="canonical" href="https://x.org">'
    )
    assert build.fetched_from_elsewhere(tmp_path) == []
