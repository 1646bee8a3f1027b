"""Small image datasets and text-to-image jobs for tests: real digits, made without Ray; models of some thousand weights."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from heliostat.data import manifest
from heliostat.pipelines.images import sources, tasks
from heliostat.pipelines.images.pictures import Rules
from heliostat.pipelines.images.pipeline import END
from heliostat.pipelines.text import tokens
from heliostat.storage import Location
from PIL import Image

UNET: dict[str, Any] = {
    "arch": "unet", "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4,
}  # fmt: skip
PIXART: dict[str, Any] = {"arch": "pixart", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
SD3: dict[str, Any] = {
    "arch": "sd3", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "pos_embed_max_size": 8
}  # fmt: skip
TEXT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "length": 8}


def digits(folder: Path, count: int = 400, chunk: int = 40) -> Path:
    """A prepared dataset of the first digits, with labels and a tokenizer, as the image pipeline writes them."""
    task = pa.table({"task": [json.dumps({"kind": "digits", "path": "", "entries": []})]})
    rules = Rules(((8, 8),), 1)
    found = pa.concat_tables(tasks.extract(task, sources.DIGITS, sources.Columns(), rules)).slice(0, count)
    (folder / "shards").mkdir(parents=True)
    (folder / "shards/00000.parquet").write_bytes(tasks.shard(found, chunk))
    definition = tokens.train(sorted(found["caption"].to_pylist()), 300, END)
    (folder / "tokenizer.json").write_text(definition)
    tokenizer = tokens.load(definition)
    meta = {"name": "digits", "kind": "rows", "content": "images", "channels": 1, "size": [8, 8],
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(), "vocab_size": tokenizer.get_vocab_size(),
            "end_of_document": tokens.end_id(tokenizer, END), "classes": sorted(set(found["label"].to_pylist()))}  # fmt: skip
    place = Location(str(folder))
    manifest.write(place, manifest.read_footer(place, "shards/00000.parquet", None), meta)
    return folder


def job(dataset: Path, **model: Any) -> dict[str, Any]:
    """`key.path: value` changes of the job as `tests.unit.build_job.job` takes them; `model`: keys of the recipe."""
    return {
        "recipe": "heliostat.recipes:TextToImage",
        "model": {"backbone": UNET, "text": TEXT, **model},
        "data.sources": [{"path": str(dataset)}],
        "data.sequence_length": None,
        "train.precision": "fp32",
    }


def image(width: int, height: int, seed: int = 0, mode: str = "RGB", encoding: str = "PNG") -> bytes:
    """An image of smooth random colours, so that scaling and JPEG leave it recognisable."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    small = rng.integers(0, 256, (6, 6, channels)).astype(np.uint8)
    made = Image.fromarray(small.squeeze(2) if channels == 1 else small, mode).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    made.save(out, encoding)
    return out.getvalue()
