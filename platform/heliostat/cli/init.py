"""Creates a workspace to begin with: `heliostat init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.common import DATA, Json, app, finish, out, program


@app.command(rich_help_panel=DATA)
def init(
    folder: Annotated[
        Path, typer.Argument(help="Becomes the workspace; made if it is missing", show_default="this one")
    ] = Path(),
    json_: Json = False,
) -> None:
    """Make a workspace: jobs, pipelines and a local cluster to begin with. Files that are there are never overwritten."""
    from heliostat.cli.workspace_template import create

    written = create(folder)
    if not json_:
        out.print(f"{folder} is a workspace with {', '.join(path for path in written if path.endswith('.yaml'))}")
        go = "" if folder.resolve() == Path.cwd() else f"cd {folder}\n       "
        name = shlex.quote(program(elsewhere=bool(go)))
        out.print(f"\nNext:  {go}{name} prepare pipelines/quickstart.yaml\n       {name} train jobs/quickstart.yaml")
    finish({"folder": str(folder), "files": written}, json_)
