"""Initializes a backbone's projection of captions so that the projected captions of the datasets are white: their mean is zero,
and their covariance is the identity.

Pooled embeddings of similar captions are nearly parallel. Whitening removes what they have in common, and makes their differences
equally large, such as the subject and the style (PCA whitening: Kessy et al. 2018, arXiv 1512.00809). The projection is then
trained with the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from heliostat.data.chunks import Chunks
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes import partitioning
from heliostat.recipes.images.stored_arrays import ArrayFormat

LIMIT = 20_000  # captions
KEY = "model.text.whiten"


def check(keys: dict[str, object], pooling: str | None, encoders: int, is_stored: bool, pretrained: bool) -> None:
    """Raises ConfigError if the backbone has no projection to initialize, or if the datasets don't store the pooled embeddings of
    one text encoder, or if the backbone is pretrained. `keys`: the backbone's. `encoders`: the number of text encoders."""
    if pretrained:
        raise ConfigError(f"{KEY}: not supported with a pretrained backbone, whose projection is trained. Remove this key")
    if encoders > 1:
        raise ConfigError(f"{KEY}: not supported with {encoders} text encoders. Use one text encoder, or remove this key")
    if keys.get("encoder_hid_dim_type") != "text_proj":
        raise ConfigError(
            f"{KEY}: the backbone has no projection of captions. Set model.backbone.encoder_hid_dim_type: text_proj"
        )
    if not pooling or not is_stored:
        raise ConfigError(f"{KEY}: the datasets store no pooled embeddings. Set pooling: mean in the pipeline's latents")


def whiten(projection: torch.nn.Linear, sources: list[Manifest], column: str, form: ArrayFormat) -> None:
    """Initializes the projection [outputs, width] from a column of the datasets with embeddings. Does nothing on the meta
    device."""
    if projection.weight.is_meta:
        return
    weight, bias = whitening(embeddings(sources, column, form), projection.out_features)
    with torch.no_grad():
        partitioning.assign(projection.weight, torch.from_numpy(weight))
        partitioning.assign(projection.bias, torch.from_numpy(bias))


def whitening(vectors: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the matrix [outputs, width] and the bias [outputs], fp32, that whiten vectors [n, width]. The matrix keeps the
    directions of the largest variance. Raises ConfigError if the vectors span fewer directions."""
    center = vectors.mean(0, dtype=np.float64)
    variances, directions = np.linalg.eigh(np.cov(vectors.astype(np.float64), rowvar=False, bias=True))
    variances, directions = variances[::-1][:outputs], directions[:, ::-1][:, :outputs]
    if len(variances) < outputs or variances[-1] < 1e-6 * variances[0]:
        raise ConfigError(
            f"model.backbone.cross_attention_dim: the datasets' captions span fewer than {outputs} directions. Lower this key"
        )
    signs = np.sign(directions[np.abs(directions).argmax(0), np.arange(outputs)])  # the same on every machine
    matrix = (directions * signs / np.sqrt(variances)).T
    return matrix.astype(np.float32), (-matrix @ center).astype(np.float32)


def embeddings(sources: list[Manifest], column: str, form: ArrayFormat) -> np.ndarray:
    """Reads the pooled embeddings of at most LIMIT captions from a column of datasets, fp32 [n, width], in the order of the
    shards."""
    chunks, rows = Chunks(sources, None), list[bytes]()
    table: Any
    for number, source in enumerate(sources):
        for chunk in range(source.chunks.num_rows):
            if len(rows) < LIMIT:
                table = chunks.read(number, chunk)
                rows += table[column].to_pylist()
    return form.unpack(rows[:LIMIT]).flatten(1).numpy()
