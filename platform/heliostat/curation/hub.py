"""Resolves the Hugging Face Hub's names in a pipeline: the name of the input (`hf://datasets/ORG/NAME`), and the names of the
stages' models.

The command resolves each name once, and records the pinned names with the dataset. The input keeps its Hub name, with the commit,
and every node downloads the files that it reads. A model's name becomes a folder in this machine's cache, and `shipping` copies
this folder to nodes that lack it. If a dataset's card lists configurations, heliostat reads only the split `train` of one
configuration. It logs the files that it doesn't read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs
import yaml

from heliostat.errors import ConfigError
from heliostat.schema import nearest
from heliostat.storage import model_sources
from heliostat.storage.hub import files, names
from heliostat.storage.hub.files import HubFile
from heliostat.storage.hub.names import HubName
from heliostat.storage.locations import Location
from heliostat.storage.s3_client import Listed
from heliostat.text import brief, plural

log = logging.getLogger(__name__)

MODELS = ("model", "autoencoder", "text_encoder", "encoder")  # pipeline keys whose value is a model's folder
CARD = "README.md"
NO_DATA = (".md", ".py", ".rst")  # endings of a repository's card and scripts, which aren't read unless a path selects them
RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
TRAIN = "train"
OTHERS = {"test", "validation", "valid", "val", "dev", "eval"}


def resolved(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Resolves the names of the Hub in a pipeline's keys; returns the new keys, and the pinned name of each changed key."""
    pinned = dict[str, str]()
    if isinstance(input := raw.get("input"), str) and names.is_dataset(input):
        name = files.resolve("input", names.dataset("input", input))
        pinned["input"] = str(name)
        raw = {**raw, "input": str(name)}
    return _models(raw, "", pinned), pinned


def _models(value: Any, key: str, pinned: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_models(one, f"{key}.{number}", pinned) for number, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    out = {}
    for name, inner in value.items():
        path, tokenizer = f"{key}.{name}".lstrip("."), (key, name) == ("tokenizer", "path")
        if isinstance(inner, str) and (name in MODELS or tokenizer):
            out[name] = _folder(path, inner, tokenizer, pinned)
        else:
            out[name] = _models(inner, path, pinned)
    return out


def _folder(key: str, value: str, tokenizer: bool, pinned: dict[str, str]) -> str:
    """Returns the local folder of a model of the Hub, S3, or MLflow. Returns `value` unchanged if it is an existing path, or
    doesn't have the form of a model's name."""
    if model_sources.is_source(value):
        store = model_sources.default_uri()
        try:
            pinned[key] = model_sources.pinned(value, store)
            return str(model_sources.fetched(pinned[key], store))
        except ConfigError as e:
            raise ConfigError(f"{key}: {e}") from e
    name = None if Path(value).exists() else names.model(value)
    if name is None:
        return value
    name = files.resolve(key, name)
    pinned[key] = str(name)
    return str(files.model(key, name, weights=not tokenizer, tokenizer=tokenizer))


# a dataset's files ---------------------------------------------------------------------------------------------------


def root(uri: str) -> Location:
    """Returns the location of the dataset's folder in this machine's cache. The dataset's paths are relative to this folder."""
    return Location(str(files.folder(_whole(names.dataset("input", uri)))))


def find(uri: str, compiled: Callable[[str], re.Pattern[str]]) -> tuple[Location, list[tuple[str, Listed]]]:
    """Finds the files of a pinned dataset that the path in `uri` selects: a file, a folder, a glob, or a configuration of the
    dataset's card. Returns the dataset's folder in the cache, and the files."""
    name = names.dataset("input", uri)
    whole, inside = _whole(name), name.inside
    listed = files.listing("input", whole)
    if re.search(r"[*?\[]", inside):
        matches = compiled(inside).fullmatch
        chosen = [f for f in listed if matches(f.path)]
    else:
        chosen = [f for f in listed if f.path == inside or (inside and f.path.startswith(f"{inside}/"))]
        if not chosen:
            chosen = _configured(whole, listed, inside, compiled)
    return root(uri), [(f.path, Listed(f.path, pafs.FileType.File, f.bytes, 0, f.hash)) for f in chosen]


def fetch(base: Location, path: str) -> bool:
    """Downloads a file of the input to this node's cache, if the Hub lists this file; returns whether the Hub lists it.

    A metadata file may contain any path. This function downloads nothing for a path that the Hub doesn't list, such as
    `../../file`. Another function checks paths, and rejects a path outside the dataset.
    """
    name = None if base.is_s3 else files.of_folder(Path(base.path))
    if name is None:
        return False
    wanted = "/".join(filter(None, (name.inside, path)))
    listed = [f for f in files.listing("input", _whole(name)) if f.path == wanted]
    files.download("input", _whole(name), listed)
    return bool(listed)


def _whole(name: HubName) -> HubName:
    return HubName(name.kind, name.repo, name.revision)


def _configured(name: HubName, listed: list[HubFile], wanted: str, compiled: Callable[[str], re.Pattern[str]]) -> list[HubFile]:
    """Chooses the files of the configuration `wanted`, or of the default configuration. If the dataset has no configuration,
    chooses files by their names."""
    configs = _configs(name, listed)
    if wanted and wanted not in configs:
        folders = sorted({f.path.partition("/")[0] for f in listed if "/" in f.path})
        known = [*configs, *folders]
        has = (
            f"It has {', '.join(known[:20])}{nearest(wanted, known)}"
            if known
            else "Remove this name from `input`: the dataset has neither folders nor configurations"
        )
        raise ConfigError(f"input: {name.repo} has no file, folder, or configuration {wanted!r}. {has}")
    if not configs:
        return _trained(name, [f for f in listed if not _is_apart(f.path)])
    if not wanted and len(configs) > 1 and "" not in configs and "default" not in configs:
        raise ConfigError(
            f"input: {name.repo} has {len(configs)} configurations. Choose one: "
            f"{names.DATASETS}{name.repo}/{next(iter(configs))} (the configurations are {', '.join(list(configs)[:20])})"
        )
    chosen = wanted or ("default" if "default" in configs else next(iter(configs)))
    splits = {split: [f for f in listed if any(compiled(p).fullmatch(f.path) for p in paths)]
              for split, paths in configs[chosen].items()}  # fmt: skip
    taken = {TRAIN: splits[TRAIN]} if TRAIN in splits else splits
    unread = {split: members for split, members in splits.items() if split not in taken}
    log.info("input: %s, configuration %r: split %s%s", name, chosen, _counted(taken),
             f"; not read: {_counted(unread)} (to read these files, add their path to `input`)" if unread else "")  # fmt: skip
    return sorted({f.path: f for members in taken.values() for f in members}.values(), key=lambda f: f.path)


def _counted(splits: dict[str, list[HubFile]]) -> str:
    sizes = {
        split: (plural(len(members), "file"), files.readable(sum(f.bytes for f in members))) for split, members in splits.items()
    }
    return ", ".join(f"{split} ({count}, {size})" for split, (count, size) in sizes.items())


def _trained(name: HubName, listed: list[HubFile]) -> list[HubFile]:
    """Leaves out files whose paths belong to test or validation splits, if the paths of other files belong to a train split."""
    words = {f.path: set(re.split(r"[/_.-]", f.path.lower())) for f in listed}
    others = [f for f in listed if words[f.path] & OTHERS and TRAIN not in words[f.path]]
    if not others or not any(TRAIN in members for members in words.values()):
        return listed
    log.info("input: %s: heliostat doesn't read %s of other splits, such as %s. To read these files, add their path to `input`",
             name, plural(len(others), "file"), others[0].path)  # fmt: skip
    return [f for f in listed if f not in others]


def _is_apart(path: str) -> bool:
    place = PurePosixPath(path)
    return place.name.startswith(".") or place.suffix in NO_DATA or place.name in RECORDS


def _configs(name: HubName, listed: list[HubFile]) -> dict[str, dict[str, list[str]]]:
    """Reads the configurations in a dataset's card: configuration -> split -> globs of files. Returns an empty mapping if there
    are none."""
    card = [f for f in listed if f.path == CARD]
    if not card:
        return {}
    files.download("input", name, card)
    header = re.match(r"---\s*\n(.*?)\n---", (files.folder(name) / CARD).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        known = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError as e:
        log.warning(
            "input: %s: can't read the configurations in the dataset's %s (%s), so heliostat ignores these configurations",
            name,
            CARD,
            brief(e),
        )
        return {}
    configs = known.get("configs") if isinstance(known, dict) else None
    if not isinstance(configs, list):
        return {}
    return {str(c.get("config_name", "default")): splits for c in configs if isinstance(c, dict) and (splits := dict(_splits(c)))}


def _splits(config: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    prefix = f"{config['data_dir'].strip('/')}/" if isinstance(config.get("data_dir"), str) else ""
    data = config.get("data_files", "**/*" if prefix else None)
    entries = data if isinstance(data, list) else [data]
    paths_alone = [prefix + entry for entry in entries if isinstance(entry, str)]
    if len(paths_alone) == len(entries):
        yield TRAIN, paths_alone
        return
    for entry in entries:
        if isinstance(entry, dict) and (paths := entry.get("path")):
            yield str(entry.get("split", TRAIN)), [prefix + str(p) for p in (paths if isinstance(paths, list) else [paths])]
