"""Describes what an endpoint serves: a model, an index of documents, or both, and the names that clients use for them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from heliostat.apps.serve.asks import TEXT, Holds, kind_of
from heliostat.apps.serve.gateway import FrontSettings
from heliostat.errors import ConfigError, HeliostatError
from heliostat.schema import Float, Strict
from heliostat.storage.locations import Location
from heliostat.text import brief

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


class NoModel:
    """Replaces `VersionSource` if an index is served without a model."""

    def __init__(self, index: str) -> None:
        self.label = index

    def wanted(self) -> str:
        """Returns the only version: the index's name."""
        return self.label

    def folder(self, version: str) -> Path | None:
        """Returns None, because there is no model."""
        return None


class VersionSource:
    """Resolves a model (a folder, a `models:/` URI, or a run) to a version and the version's folder. An alias is resolved again
    at each call.

    `name`: the name that clients use by default.
    """

    def __init__(self, model: str, store: str) -> None:
        self.model, self.store = model, store
        self.follows = model.startswith("models:/") and "@" in model
        self.label = Path(model).resolve().name if Path(model).is_dir() else model.removeprefix("models:/").replace("/", "-")
        self.name = re.split("[/@]", model.removeprefix("models:/"))[0] if model.startswith("models:/") else self.label
        self.known = ""
        self.client: MlflowClient | None = None

    def wanted(self) -> str:
        """Returns the version to serve now.

        If the registry doesn't answer, logs a warning and returns the last known version. Raises HeliostatError if no version
        is known.
        """
        if not self.follows:
            return self.label
        from heliostat.tracking import mlflow_client, registry

        try:
            if self.client is None:
                self.client = mlflow_client.connect(self.store)
            with mlflow_client.asking(self.store):
                version = registry.find(self.client, self.model)
            self.known = f"{version.name}-{version.version}"
        except HeliostatError as e:
            if not self.known:
                raise
            log.warning("can't check the registry for a new model version, so version %s stays in use: %s", self.known, brief(e))
        return self.known

    def folder(self, version: str) -> Path:
        """Returns a version's folder; raises ConfigError if the version has no folder."""
        from heliostat.tracking.models import resolve

        number = version.rpartition("-")[2]
        return resolve(f"models:/{self.name}/{number}" if self.follows else self.model, self.store)


@dataclass(frozen=True)
class ServedModels:
    """Describes what an endpoint serves: a model, an index, or both.

    `name`, `index_name`: the names that clients use. `adapters`: maps the name that clients use to the adapter's folder.
    """

    source: VersionSource | NoModel
    name: str | None
    index: str | None = None
    index_name: str | None = None
    embedder: str | None = None
    reranker: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)

    def kind(self) -> str | None:
        """Returns the model's kind; None without a model.

        Raises ConfigError if the model, an adapter, the reranker, or the index can't be served.
        """
        if self.index is not None:
            from heliostat.apps.search.search import SearchIndex

            SearchIndex(Location(self.index))
        if self.reranker is not None:
            from heliostat.apps.search import reranking

            reranking.require(Path(self.reranker))
        folder = self.source.folder(self.source.wanted())
        kind = None if folder is None else kind_of(folder)
        if self.adapters:
            from heliostat.apps.serve import adapters

            if folder is None or kind != TEXT:
                raise ConfigError("--adapter: needs a model that generates text. Remove --adapter, or pass such a model")
            for name, place in self.adapters.items():
                adapters.require(name, Path(place))
                adapters.require_base(name, Path(place), folder)
        return kind

    def holds(self, folder: Path | None, batch: int, engine: str = "transformers") -> Holds:
        """Describes the contents of a version's replica."""
        return Holds(None if folder is None else str(folder.absolute()), batch, self.index, self.embedder, self.reranker,
                     self.adapters, engine)  # fmt: skip

    def settings(self, kind: str | None, keys: dict[str, str] | None, o: Options) -> FrontSettings:
        """Returns the settings of the HTTP server. `keys`: digests of API keys, by the key's name; None means that clients need
        no key."""
        return FrontSettings(self.name, kind, self.index_name, int(time.time()), keys, o.body_bytes, o.max_tokens, o.at_once,
                        o.a_minute, o.deadline_s, tuple(self.adapters))  # fmt: skip

    def with_adapters(self, pairs: Sequence[str]) -> ServedModels:
        """Returns a copy that serves these adapters too. Each adapter is written as NAME=FOLDER. Raises ConfigError if an adapter
        has another form, or a name that is already in use."""
        folders = dict[str, str]()
        if pairs and self.name is None:
            raise ConfigError("--adapter: needs a model that generates text. Remove --adapter, or pass such a model")
        for one in pairs:
            name, _, folder = one.partition("=")
            if not name or not folder:
                raise ConfigError(f"--adapter: expected NAME=FOLDER, got {one!r}")
            if name in (self.name, self.index_name, *folders):
                raise ConfigError(f"--adapter: the name {name!r} is already in use. Choose another")
            folders[name] = str(Path(folder).absolute())
        return replace(self, adapters=folders)


def served(
    model: str | None, store: str, name: str | None, index: str | None, embedder: Path | None, reranker: Path | None = None
) -> ServedModels:  # fmt: skip
    """Describes what to serve. Raises ConfigError if there is neither a model nor an index, or if both would have the same
    name."""
    if model is None and index is None:
        raise ConfigError("MODEL: required. Pass a model, an index with --index, or both")
    if model is None and name is not None:
        raise ConfigError("--name: needs a model. Remove --name, because an index has the name of its folder")
    for option, folder in (("--embedder", embedder), ("--reranker", reranker)):
        if index is None and folder is not None:
            raise ConfigError(f"{option}: needs --index. Add --index INDEX")
    if index is None:
        assert model is not None
        source = VersionSource(model, store)
        return ServedModels(source, name or source.name)
    place = Location(index)
    uri, called = place.uri if place.is_s3 else place.path, Path(place.path).name
    embeds, orders = (None if one is None else str(one.absolute()) for one in (embedder, reranker))
    if model is None:
        return ServedModels(NoModel(called), None, uri, called, embeds, orders)
    source = VersionSource(model, store)
    if called == (name or source.name):
        raise ConfigError(f"--name: the index already has the name {called!r}. Choose another name for the model")
    return ServedModels(source, name or source.name, uri, called, embeds, orders)


class Options(Strict):
    """Holds the options of an endpoint."""

    port: int = Field(8000, ge=1, le=65535)
    replicas: tuple[int, int] = (1, 1)
    """Minimum and maximum number of replicas."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine of text generation; auto uses vllm where it is supported."""
    batch: int = Field(16, ge=1, le=4096)
    """Prompts that a replica answers in one batch."""
    body_bytes: int = Field(1 << 20, ge=1)
    max_tokens: int = Field(1024, ge=1)
    """Maximum tokens of an answer."""
    at_once: int = Field(256, ge=0)
    """Maximum concurrent requests per key; 0 means no limit."""
    a_minute: int = Field(0, ge=0)
    """Maximum requests per key and minute; 0 means no limit."""
    deadline_s: Float = Field(300.0, gt=0)
    """Maximum seconds of an answer."""
    poll_s: Float = Field(2.0, gt=0)
    """Seconds between two checks of the model's alias for a new version."""


def replica_range(text: str) -> tuple[int, int]:
    """Reads a number or range of replicas, for example 2 or 1..4; returns (minimum, maximum). Raises ConfigError if the text has
    another form."""
    match = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError(f"--replicas: expected a number or a range, got {text!r}. Write 2 or 1..4")
    return least, most
