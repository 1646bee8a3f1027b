"""Wraps MLflow's server: `mlflow server --app-name heliostat`, run by `heliostat run ui`. It asks for a key, and its UI opens as
model training.

The keys are those of the file that HELIOSTAT_UI_KEYS names; without one, no one gets in.

MLflow's UI has two modes, and a browser that has chosen neither opens every experiment as one of GenAI, whatever the experiment's
kind (3.17). The browser keeps the choice; here the page makes it, once, in a browser that has not. MLflow's assistant opens by
itself in such a browser, and covers a part of the table of runs. Here it stays closed until a person opens it.

The browser also keeps the columns of an experiment's table of runs. MLflow begins with source, models, datasets, and no metric.
Here the table begins with `COLUMNS`, which fit in 1280 pixels with the runs' names. What a person chooses replaces them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from flask import Response
from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import app as mlflow_app

from heliostat.tracking.ui import COLUMNS, HOST, KEYS
from heliostat.web import deadlines, keys
from heliostat.web.gate import Gate

__all__ = ["app"]

CHOICES = {  # by the names under which the browser keeps them
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
}
BEFORE = {"attributes.`Run Name`": 175, "runDateAndNestInfo": 140, "duration": 80}  # MLflow's own columns, which stay first
KEPT = "MLflowLocalStorage-1.1-ExperimentPage-"  # begins the names under which the browser keeps the columns
_METRICS = {f"metrics.`{name}`": width for name, width in COLUMNS.items()}
_WIDTHS = BEFORE | _METRICS
_TABLE = {"selectedColumns": [*_METRICS], "columnOrder": [*_WIDTHS], "columnWidths": _WIDTHS}
SCRIPT = f"""<script>
for (const [name, value] of Object.entries({json.dumps(CHOICES)}))
  if (localStorage.getItem(name) === null) localStorage.setItem(name, value);
const kept = Storage.prototype.getItem;
Storage.prototype.getItem = function (name) {{
  const value = kept.call(this, name);
  return value === null && String(name).startsWith("{KEPT}") ? {json.dumps(json.dumps(_TABLE))} : value;
}};
</script>"""


def index() -> Response:
    """Serves MLflow's one page, with the choice of mode made before its own scripts run."""
    text = (Path(str(flask_app.static_folder)) / "index.html").read_text(encoding="utf-8")
    return Response(text.replace("<head>", f"<head>{SCRIPT}", 1), mimetype="text/html", headers={"Cache-Control": "no-cache"})


flask_app.view_functions["serve"] = index

place = os.environ.get(KEYS)
app = Gate(mlflow_app, keys.read(Path(place)) if place else {}, os.environ.get(HOST, "127.0.0.1"))
deadlines.apply()
