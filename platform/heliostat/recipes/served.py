"""Serves an exported model as an MLflow pyfunc. The recipe's `generator` answers the prompts. This server is the default of
`Serves`.

MLflow copies this file into the model. The server needs heliostat and the recipe's package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel
from mlflow.types.type_hints import TypeFromExample  # a list of strings; with list[str] as the hint, MLflow drops the params

from heliostat.recipes import exported
from heliostat.recipes.protocol import Request


class Served(PythonModel):
    """Answers prompts. Parameters: `seed`, and the options of `heliostat model generate` that the signature lists."""

    def load_context(self, context: Any) -> None:
        self.folder = Path(context.artifacts["model"])
        self.generators: dict[str, Any] = {}

    def predict(self, context: Any, model_input: TypeFromExample, params: dict[str, Any] | None = None) -> list[str]:
        """Answers each prompt. Loads a model once for each set of options."""
        prompts: Any = model_input
        options = dict(params or {})
        seed = options.pop("seed", 0)
        key = repr(sorted(options.items()))
        if key not in self.generators:
            self.generators[key] = exported.generator(self.folder, options)
        return [answer.shown for answer in self.generators[key]([Request(prompt, seed, None) for prompt in prompts])]


mlflow.models.set_model(Served())
