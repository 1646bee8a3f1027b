"""Says what is served: a model, an index of documents, or both, and by which names clients ask for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from heliostat.apps.serve import kinds
from heliostat.apps.serve.asks import Holds
from heliostat.apps.serve.front import FrontSettings
from heliostat.apps.serve.options import Options
from heliostat.apps.serve.versions import NoModel, VersionSource
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location


@dataclass(frozen=True)
class ServedModels:
    """Says what is served: a model as `name`, an index, or both; `index_name`: what clients call that; `adapters`: the folders of
    the model's adapters, by what clients call them."""

    source: VersionSource | NoModel
    name: str | None
    index: str | None = None
    index_name: str | None = None
    embedder: str | None = None
    reranker: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)

    def kind(self) -> str | None:
        """Returns the kind of the model; None without one. ConfigError if that, or the index, cannot be served."""
        if self.index is not None:
            from heliostat.apps.search.search import SearchIndex

            SearchIndex(Location(self.index))
        if self.reranker is not None:
            from heliostat.apps.search import reranking

            reranking.require(Path(self.reranker))
        folder = self.source.folder(self.source.wanted())
        kind = None if folder is None else kinds.of(folder)
        if self.adapters:
            from heliostat.apps.serve import adapters

            if kind != kinds.TEXT:
                raise ConfigError("--adapter: goes with a model that writes")
            for name, place in self.adapters.items():
                adapters.require(name, Path(place))
        return kind

    def holds(self, folder: Path | None, batch: int, engine: str = "transformers") -> Holds:
        """Returns what a replica of a version loads."""
        return Holds(None if folder is None else str(folder.absolute()), batch, self.index, self.embedder, self.reranker,
                     self.adapters, engine)  # fmt: skip

    def settings(self, kind: str | None, keys: dict[str, str] | None, o: Options) -> FrontSettings:
        """Returns what the front goes by."""
        return FrontSettings(self.name, kind, self.index_name, int(time.time()), keys, o.body_bytes, o.max_tokens, o.at_once,
                        o.a_minute, o.deadline_s, tuple(self.adapters))  # fmt: skip

    def with_adapters(self, given: Sequence[str]) -> ServedModels:
        """Adds adapters, each NAME=FOLDER; ConfigError if one is no such thing, or its name is taken."""
        folders = dict[str, str]()
        if given and self.name is None:
            raise ConfigError("--adapter: goes with a model that writes")
        for one in given:
            name, _, folder = one.partition("=")
            if not name or not folder:
                raise ConfigError(f"--adapter: {one!r} is not NAME=FOLDER")
            if name in (self.name, self.index_name, *folders):
                raise ConfigError(f"--adapter: {name!r} is the name of something else that is served; give it another")
            folders[name] = str(Path(folder).absolute())
        return replace(self, adapters=folders)


def served(
    model: str | None, store: str, name: str | None, index: str | None, embedder: Path | None, reranker: Path | None = None
) -> ServedModels:  # fmt: skip
    """Says what is served; ConfigError if there is nothing, or one name would stand for two things."""
    if model is None and index is None:
        raise ConfigError("MODEL: give a model, an index with --index, or both")
    if model is None and name is not None:
        raise ConfigError("--name: is the model's; an index is called as its folder")
    for option, given in (("--embedder", embedder), ("--reranker", reranker)):
        if index is None and given is not None:
            raise ConfigError(f"{option}: goes with --index")
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
        raise ConfigError(f"--name: the index is called {called!r} as well; give the model another name")
    return ServedModels(source, name or source.name, uri, called, embeds, orders)
