"""Provides heliostat, distributed training on Ray, as a Python library. `heliostat --help` shows the commands that do the same.

    job = heliostat.load_job("jobs/quickstart.yaml", {"train.steps": 100})
    run = heliostat.train(job)
    print(run.losses()[100], run.verify()["ok"])

docs/python-api.md describes every name. `import heliostat` is fast, because a name's module is imported only when the name is
first used.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

__version__ = "0.1.0"

if TYPE_CHECKING:
    from heliostat.api.functions import Checked as Checked
    from heliostat.api.functions import ExactStream as ExactStream
    from heliostat.api.functions import Generated as Generated
    from heliostat.api.functions import Job as Job
    from heliostat.api.functions import Run as Run
    from heliostat.api.functions import check as check
    from heliostat.api.functions import datasets as datasets
    from heliostat.api.functions import generate as generate
    from heliostat.api.functions import load_job as load_job
    from heliostat.api.functions import prepare as prepare
    from heliostat.api.functions import train as train

__all__ = ["Checked", "ExactStream", "Generated", "Job", "Run", "check", "datasets", "generate", "load_job", "prepare", "train"]


class _Earlier:
    """Finds public modules under their earlier paths, so that existing recipes and pipelines can still import these modules.

    This class doesn't subclass `importlib.abc.MetaPathFinder`, because importing `importlib.abc` would double the import time of
    heliostat.
    """

    paths: ClassVar = {
        "heliostat.benchmark": "heliostat.evaluation",
        "heliostat.config.kinds": "heliostat.schema",
        "heliostat.config.optimizers": "heliostat.optim.optimizers",
        "heliostat.config.schema": "heliostat.schema",
        "heliostat.curation.files": "heliostat.tasks.files",
        "heliostat.curation.filtering": "heliostat.curation.stage",
        "heliostat.exact_stream": "heliostat.api.exact_stream",
        "heliostat.pipelines": "heliostat.curation",
        "heliostat.recipes.huggingface": "heliostat.recipes.pretrained",
        "heliostat.retrieval": "heliostat.apps.search",
        "heliostat.run_handle": "heliostat.api.run_handle",
        "heliostat.track": "heliostat.tracking",
    }

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if not fullname.startswith("heliostat."):  # a fast path, because every import calls this
            return None
        known = next((old for old in self.paths if fullname == old or fullname.startswith(f"{old}.")), None)
        if known is None:
            return None
        origin = self.paths[known] + fullname.removeprefix(known)
        return ModuleSpec(fullname, self, origin=origin)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        assert spec.origin is not None
        module = importlib.import_module(spec.origin)
        self._specs[id(module)] = module.__spec__
        return module

    def get_code(self, fullname: str) -> NoReturn:
        """Raises ImportError for `python -m` of an earlier path. The message names the new path."""
        spec = self.find_spec(fullname)
        raise ImportError(f"{fullname} has moved. Run python -m {spec.origin if spec else fullname}.")

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._specs.pop(id(module))  # the import system has set it to the earlier path

    _specs: ClassVar[dict[int, ModuleSpec | None]] = {}


sys.meta_path.insert(0, _Earlier())  # first, because a leftover folder of an earlier path would import as a namespace package


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("heliostat.api.functions"), name)
    raise AttributeError(f"module 'heliostat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
