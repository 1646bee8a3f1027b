"""Builds the input and the keys of an image pipeline for tests."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.unit.build_images import image, scaled

SIZES = [(40, 40), (80, 40), (40, 80), (60, 40)]


def make_input(folder: Path, count: int = 60) -> None:
    """Writes images in two Parquet files and a tar. Each seventh image appears again, smaller and as a JPEG, and some images are
    bad."""
    folder.mkdir()
    rows = []
    for i in range(count):
        data = image(*SIZES[i % 4], seed=i)
        rows.append({"image": data, "caption": f"image number {i}", "kind": "even" if i % 2 == 0 else "odd", "url": f"u/{i}"})
        if i % 7 == 3:
            rows.append(rows[-1] | {"image": scaled(data, 0.8), "caption": "it looks alike", "url": f"alike/{i}"})
        if i % 9 == 3:
            rows.append(rows[-1] | {"caption": "the very same", "url": f"same/{i}"})
        if i % 20 == 5:
            rows.append(rows[-1] | {"image": image(40, 40, seed=1000 + i), "caption": "short"})
    bad = [(b"bad", "not an image"), (None, "no image"), (image(9, 9), ""), (image(20, 20, seed=5000), "a small one"),
           (image(50, 50)[:-60], "cut short")]  # fmt: skip
    rows += [{"image": data, "caption": caption} for data, caption in bad]
    third = len(rows) // 3
    pq.write_table(pa.Table.from_pylist(rows[:third]), folder / "a.parquet", row_group_size=5)
    pq.write_table(pa.Table.from_pylist(rows[third : 2 * third]), folder / "b.parquet", row_group_size=5)
    with tarfile.open(folder / "c.tar", "w") as tar:
        for number, row in enumerate(rows[2 * third :]):
            bodies = {"json": json.dumps({k: v for k, v in row.items() if k != "image"}).encode()}
            bodies |= {"png": row["image"]} if row["image"] else {}
            for suffix, body in bodies.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))


def keys(folder: Path, output: str = "out", **more: Any) -> dict[str, Any]:
    usual = {"name": "test", "input": str(folder / "in"), "output": str(folder / output), "resolution": 32,
             "columns": {"label": "kind", "others": ["url"]}, "min_side": 8, "buckets": {"step": 8, "max_aspect": 2.0},
             "duplicates": "perceptual", "tokenizer": {"vocab_size": 300}, "chunk_images": 5, "shard_images": 10}  # fmt: skip
    return {k: v for k, v in (usual | more).items() if v is not None}


STAGES = [{"stage": "length", "min_chars": 6}, {"stage": "image_size", "min_side": 31}]
