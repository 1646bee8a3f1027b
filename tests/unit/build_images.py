"""Builds small image datasets and text-to-image jobs for tests: real digits, made without Ray, and models with some thousand
weights."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from heliostat.config.spec import Job
from heliostat.curation.images import pictures, sources, tasks
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.images.tasks import END
from heliostat.curation.text import tokens
from heliostat.data import collection, manifest, versions
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.tasks.clusters import Cluster
from heliostat.tasks.work import Work
from PIL import Image
from pydantic import ByteSize, PrivateAttr

from tests.unit import build_job
from tests.unit.build_curation import HereFlow

ROWS = pa.schema(
    [("hash", pa.binary(32)), ("id", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("image", pa.large_binary()),
     ("caption", pa.string()), ("label", pa.string())]
)  # fmt: skip
UNET: dict[str, Any] = {
    "arch": "unet", "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4,
}  # fmt: skip
PIXART: dict[str, Any] = {"arch": "pixart", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
SD3: dict[str, Any] = {
    "arch": "sd3", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "pos_embed_max_size": 8
}  # fmt: skip
FLUX: dict[str, Any] = {
    "arch": "flux", "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12,
    "axes_dims_rope": [4, 4, 4],
}  # fmt: skip
LUMINA: dict[str, Any] = {
    "arch": "lumina", "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
    "multiple_of": 8, "axes_dim_rope": [4, 4, 4],
}  # fmt: skip
SANA: dict[str, Any] = {
    "arch": "sana", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
}  # fmt: skip
PRX: dict[str, Any] = {"arch": "prx", "hidden_size": 16, "num_heads": 2, "depth": 2, "axes_dim": [4, 4]}
TEXT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "length": 8}


CLIP: dict[str, Any] = {
    "arch": "clip", "projection_dim": 16, "temperature": 0.1,
    "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                    "max_position_embeddings": 12, "attention_dropout": 0.1},
    "vision_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                      "patch_size": 4, "attention_dropout": 0.1},
}  # fmt: skip


def rows_of(made: list[Any]) -> pa.Table:
    """Returns prepared images as the table of a shard's task."""
    return pa.Table.from_pylist(
        [{**asdict(one), "hash": bytes.fromhex(one.hash), "width": one.size[0], "height": one.size[1]} for one in made], ROWS
    )


def digits(folder: Path, count: int = 400, chunk: int = 40) -> Path:
    """Prepares a dataset of the first digits, with labels and a tokenizer, as the image pipeline writes it."""
    made = [pictures.prepare(raw, pictures.ImageRules(((8, 8),), 1)) for raw in itertools.islice(sources.digits(), count)]
    found = rows_of(made)
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
    """Builds a job with `key.path: value` changes, as in `tests.unit.build_job.job`. `model`: keys of the recipe."""
    return {
        "recipe": "heliostat.recipes:TextToImage",
        "model": {"backbone": UNET, "text": TEXT, **model},
        "data.sources": [{"path": str(dataset)}],
        "data.sequence_length": None,
        "train.precision": "fp32",
    }


def embedder(dataset: Path, **changes: Any) -> Job:
    """Builds a job with 16 pairs of captions and digits per step, in micro-batches of 2 on 4 virtual ranks, with dropout."""
    usual: dict[str, Any] = {"recipe": "heliostat.recipes:ImageEmbedder", "model": copy.deepcopy(CLIP), "data.virtual_ranks": 4,
                             "data.sources": [{"path": str(dataset)}], "data.sequence_length": None,
                             "train.global_batch_size": 16, "train.precision": "fp32"}  # fmt: skip
    return build_job.job(**{**usual, **changes})


def image(width: int, height: int, seed: int = 0, mode: str = "RGB", encoding: str = "PNG") -> bytes:
    """Returns an image of smooth random colors, which stays recognizable after scaling and JPEG compression."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    small = rng.integers(0, 256, (6, 6, channels)).astype(np.uint8)
    made = Image.fromarray(small.squeeze(2) if channels == 1 else small, mode).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    made.save(out, encoding)
    return out.getvalue()


class Here(ImagePipeline):
    """Defines an image pipeline that runs its tasks in this process, with as little memory as a test sets."""

    memory_limit: ByteSize = ByteSize(2 << 30)
    _keys: dict[str, Any] = PrivateAttr(default_factory=dict)
    _made: HereFlow | None = PrivateAttr(default=None)

    def flow(self, work: Work | None = None, cluster: Cluster | None = None) -> HereFlow:
        self._made = HereFlow(work or self.worked, **self._keys)
        return self._made


def prepared(keys: dict[str, Any], **flow_keys: Any) -> tuple[manifest.Manifest, HereFlow]:
    """Prepares a dataset without Ray, with the same tasks, keys, and records as `prepare`."""
    made = Here.model_validate(keys)
    made._keys = flow_keys
    made.check()
    output = Location(made.output)
    rows, meta = made.write(output, made.inputs())
    meta.pop("listed", None)
    if not rows:
        raise DataError(f"nothing is left; dropped: {meta['dropped']}")
    write = collection.write if "parts" in meta else manifest.write
    result = write(output, rows, {**meta, "name": made.name})
    versions.publish(output, result)
    made.finish(result)
    assert made._made
    return result, made._made


def photos() -> dict[str, bytes]:
    """Returns three photographs from scikit-learn and matplotlib, as JPEG."""
    import matplotlib
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    people = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return {path.stem: path.read_bytes() for path in (folder / "china.jpg", folder / "flower.jpg", people)}


def scaled(data: bytes, factor: float, encoding: str = "JPEG", quality: int = 75) -> bytes:
    """Returns the same photograph in another size."""
    found, out = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    found.resize((int(found.width * factor), int(found.height * factor))).save(out, encoding, quality=quality)
    return out.getvalue()


def folder_of(place: Path, rows: list[tuple[str, bytes, dict[str, Any]]]) -> Path:
    """Writes a folder of images by name, with their rows of metadata."""
    place.mkdir(parents=True)
    for name, data, _ in rows:
        (place / name).write_bytes(data)
    lines = [json.dumps({"file_name": name, **columns}) for name, _, columns in rows]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place
