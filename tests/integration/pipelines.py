"""Writes the pipeline files of tests."""

import json
from pathlib import Path


def write_pipeline(folder: Path, kind: str = "TextPipeline", file: str = "pipeline", **keys: object) -> Path:
    """Writes a pipeline from `in` to `out` below the folder, unless the keys change this. Keys of None are left out."""
    config: dict[str, object] = {"name": "test", "pipeline": f"heliostat.pipelines:{kind}"}
    config |= {"input": str(folder / "in"), "output": str(folder / "out"), **keys}
    path = folder / f"{file}.yaml"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path
