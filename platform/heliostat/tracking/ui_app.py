"""Wraps MLflow's server for `heliostat run ui` (`mlflow server --app-name heliostat`).

The server requires a key, and its UI opens in model-training mode. HELIOSTAT_UI_KEYS names the file with the keys. Without that
file, the server rejects all clients.

MLflow's UI has two modes, and the browser stores the user's choice. Without a choice, MLflow 3.17 opens every experiment in
GenAI mode, even if the experiment is of another kind. So in a browser without a choice, the page chooses model training once.

The browser also stores the columns of an experiment's table of runs. MLflow's default columns are source, models, and datasets,
but no metric. With heliostat, the default is `COLUMNS`. Together with the runs' names, these columns fit in 1280 pixels. The
user's choice replaces this default.
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

CHOICES = {  # by the browser's names for them
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",  # otherwise it opens, and covers a part of the table of runs
}
BEFORE = {"attributes.`Run Name`": 175, "runDateAndNestInfo": 140, "duration": 80}  # MLflow's own columns, which stay first
KEPT = "MLflowLocalStorage-1.1-ExperimentPage-"  # prefix of the browser's names for the columns
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
    """Serves MLflow's only page, with a script that sets the mode and the columns before MLflow's own scripts run."""
    text = (Path(str(flask_app.static_folder)) / "index.html").read_text(encoding="utf-8")
    return Response(text.replace("<head>", f"<head>{SCRIPT}", 1), mimetype="text/html", headers={"Cache-Control": "no-cache"})


flask_app.view_functions["serve"] = index

place = os.environ.get(KEYS)
app = Gate(mlflow_app, keys.read(Path(place)) if place else {}, os.environ.get(HOST, "127.0.0.1"))
deadlines.apply()
