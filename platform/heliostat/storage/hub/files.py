"""Downloads each file from the Hub once, to Hugging Face's cache on this machine, and checks its hash.

    name = files.resolve("model.pretrained", names.model("Qwen/Qwen3-0.6B"))   # pinned to a commit
    folder = files.model("model.pretrained", name)                             # for `from_pretrained`

A commit never changes, so the cache keeps the commit's list of files (`heliostat/COMMIT.json` in the repository's folder). The
Hub identifies each file by its content: a large file by its SHA-256, and a small file by git's SHA-1. An interrupted download
resumes. Pickles and code are never downloaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass
from functools import lru_cache
from functools import partial as partial_
from pathlib import Path, PurePosixPath

from heliostat.errors import ConfigError, DataError, HeliostatError, StorageError
from heliostat.storage.hub import client
from heliostat.storage.hub.names import COMMIT, HubName
from heliostat.storage.locations import is_inside
from heliostat.text import plural, printable

log = logging.getLogger(__name__)

ABOUT = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".md")  # files of a model, in addition to weights
WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"
STEMS = ("model", "diffusion_pytorch_model")  # names of weights that the libraries use
PICKLES = (".bin", ".ckpt", ".h5", ".msgpack", ".pt", ".pth")
ELSEWHERE = ("coreml/", "flax/", "gguf/", "onnx/", "openvino/", "original/")  # folders with the same model for other libraries
HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
PARTS = r"-\d+-of-\d+"
THREADS = 8
BLOCK = 16 << 20
LOCK_S = 3600.0  # seconds to wait for another process that downloads a file
CONVERT = "https://huggingface.co/spaces/safetensors/convert"


@dataclass(frozen=True)
class HubFile:
    """Describes a file in a repository. `hash`: SHA-256, or git's SHA-1 (64 or 40 hex digits); "" if unknown."""

    path: str
    bytes: int
    hash: str


def resolve(key: str, name: HubName) -> HubName:
    """Pins a name to the current commit of its revision.

    Without a network, pins the name to the commit that the revision had at the last download.
    """
    if name.pinned:
        return name
    reference = _repository(name) / "refs" / name.revision
    known = reference.read_text().strip() if reference.is_file() else ""
    if client.offline():
        if not COMMIT.fullmatch(known):
            raise client.missing(key, name, f"the commit of revision {name.revision!r}")
        return name.at(known)
    try:
        info = client.ask(key, name, lambda: client.information(name), client.AWAY_S)
    except client.HubAwayError as e:
        if not COMMIT.fullmatch(known):
            raise
        log.warning("%s: %s; using %s from the cache", name.repo, e.reason, known)
        return name.at(known)
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit):
        raise DataError(
            f"{key}: {client.endpoint()} returns no commit for {name}. Set HF_ENDPOINT to a server with the Hub's protocol"
        )
    if commit != known:
        with suppress(OSError):  # the cache can't be written
            _write(reference, commit)
    return name.at(commit)


def listing(key: str, name: HubName) -> list[HubFile]:
    """Lists all files in the repository of a pinned name, sorted by path.

    Without a network, lists only the files in the cache.
    """
    kept = _repository(name) / "heliostat" / f"{name.revision}.json"
    with suppress(OSError, ValueError, TypeError):
        return _kept(kept)
    if client.offline():
        if not (cached := _downloaded(name)):
            raise client.missing(key, name, "the files, or some of them,")
        return cached

    def ask() -> list[HubFile]:
        from huggingface_hub.hf_api import RepoFile

        tree = client.api().list_repo_tree(name.repo, recursive=True, revision=name.revision, repo_type=name.kind)
        return [HubFile(f.path, f.lfs.size if f.lfs else f.size, f.lfs.sha256 if f.lfs else f.blob_id)
                for f in tree if isinstance(f, RepoFile)]  # fmt: skip

    try:
        listed_files = sorted(client.ask(key, name, ask, client.AWAY_S), key=lambda f: f.path)
    except client.HubAwayError:
        if not (cached := _downloaded(name)):
            raise
        return cached
    if wrong := next((f for f in listed_files if not is_inside(f.path) or not HASH.fullmatch(f.hash)), None):
        raise DataError(
            f"{key}: {name}: the Hub lists {printable(wrong.path)[:200]!r}, which is outside the repository, or has no hash. "
            "Use another revision"
        )
    with suppress(OSError):
        _write(kept, json.dumps([astuple(f) for f in listed_files]))
    return listed_files


@lru_cache(maxsize=16)
def _kept(place: Path) -> list[HubFile]:
    return [HubFile(*fields) for fields in json.loads(place.read_text())]


def folder(name: HubName) -> Path:
    """Returns the path of a pinned name's folder or file in this machine's cache. The path may not exist yet."""
    return _snapshot(name) / name.inside


def of_folder(path: Path) -> HubName | None:
    """Returns the pinned name of a path in the cache; None for any other path."""
    if not path.is_relative_to(client.cache()):
        return None
    place = re.fullmatch(r"(model|dataset)s--([^/]+?)--([^/]+)/snapshots/([^/]+)/?(.*)", str(path.relative_to(client.cache())))
    if not place:
        return None
    return HubName("model" if place[1] == "model" else "dataset", f"{place[2]}/{place[3]}", place[4], place[5])


def download(key: str, name: HubName, wanted: Iterable[HubFile]) -> None:
    """Downloads the files of a pinned name that the cache lacks, and checks each file's hash once.

    Raises DataError if a file differs from the Hub's list. heliostat removes this file, so the next command downloads it again.
    """
    lacking = [f for f in wanted if not _is_checked(name, f)]
    absent = [f for f in lacking if not (_snapshot(name) / f.path).is_file()]
    if absent and client.offline():
        raise client.missing(key, name, f"{plural(len(absent), 'file')}, such as {absent[0].path},")
    size, began = sum(f.bytes for f in absent), time.monotonic()
    if size >= BLOCK:
        log.info("%s: downloading %s (%s) to %s", name, plural(len(absent), "file"), readable(size), client.cache())
    if not lacking:
        return
    with ThreadPoolExecutor(min(THREADS, len(lacking))) as pool:
        try:
            for done in [pool.submit(_one, key, name, f) for f in lacking]:
                done.result()
        except HeliostatError as e:
            pool.shutdown(cancel_futures=True)
            raise type(e)(f"{e} (on node {socket.gethostname()})") from e
    if size >= BLOCK:
        log.info("%s: downloaded in %.0f s, hashes checked", name, time.monotonic() - began)


def _one(key: str, name: HubName, file: HubFile) -> None:
    place = _snapshot(name) / file.path
    if not place.is_file():
        _fetch(key, name, file)
    elif file.hash and not _matches(place, file):
        blob = place.parent / place.readlink() if place.is_symlink() else place
        place.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise _changed(key, name, file)
    with suppress(OSError):  # the cache can't be written
        _write(_mark(name, file), _state(place))


def _fetch(key: str, name: HubName, file: HubFile) -> None:
    """Downloads a file to the cache, and resumes an interrupted download. The file appears in the cache once its hash is right.

    Gives up if no byte arrives within the retry budget.
    """
    from huggingface_hub.utils import WeakFileLock

    blob = _repository(name) / "blobs" / file.hash
    partial, lock = blob.with_name(f"{blob.name}.heliostat.incomplete"), client.cache() / ".locks" / _repository(name).name
    with client.kept(key, name):
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            try:
                locks.enter_context(WeakFileLock(lock / f"{file.hash}.lock", timeout=LOCK_S))
            except TimeoutError as e:  # filelock.Timeout
                raise StorageError(
                    f"{key}: {name}: another process has held the lock {lock / file.hash}.lock for {LOCK_S / 60:.0f} minutes. "
                    "If no process is downloading this file, delete the lock"
                ) from e
            if not blob.exists():
                resumed = _size(partial)
                while True:
                    before = _size(partial)
                    try:
                        client.ask(key, name, partial_(client.receive, name, file.path, file.bytes, partial))
                    except client.HubAwayError:
                        if _size(partial) <= before:
                            raise
                        continue
                    if _matches(partial, file):
                        break
                    partial.unlink()
                    if not resumed:
                        raise _changed(key, name, file)
                    resumed = 0  # the earlier part may be damaged: starts once more from the beginning
                partial.replace(blob)
            _link(blob, _snapshot(name) / file.path)


def _link(blob: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        return
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except OSError:  # the file system doesn't support links
        blob.replace(place)


def _size(place: Path) -> int:
    return place.stat().st_size if place.exists() else 0


def _changed(key: str, name: HubName, file: HubFile) -> DataError:
    return DataError(
        f"{key}: {name}: {file.path} isn't the file that the Hub lists (its hash isn't {file.hash[:12]}...). "
        "heliostat removed it from the cache. Run the command again to download the file"
    )


def _matches(place: Path, file: HubFile) -> bool:
    digest = hashlib.sha256() if len(file.hash) == 64 else hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False)
    if place.stat().st_size != file.bytes:
        return False
    with place.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest() == file.hash


def _is_checked(name: HubName, file: HubFile) -> bool:
    """Returns whether a file in the cache is unchanged since its hash was checked."""
    try:
        return _mark(name, file).read_text() == _state(_snapshot(name) / file.path)
    except OSError:
        return False


def _mark(name: HubName, file: HubFile) -> Path:
    return _repository(name) / "heliostat" / "checked" / (file.hash or hashlib.sha256(file.path.encode()).hexdigest())


def _state(place: Path) -> str:
    status = place.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _repository(name: HubName) -> Path:
    return client.cache() / f"{name.kind}s--{name.repo.replace('/', '--')}"


def _snapshot(name: HubName) -> Path:
    return _repository(name) / "snapshots" / name.revision


def _downloaded(name: HubName) -> list[HubFile]:
    """Lists the files of a commit that are in the cache.

    If a file in the cache is a link, the name of the link's target is the file's hash.

    The list is empty if the cache has no files of the commit. The list is also empty if a download in the repository was
    interrupted, because some files may be missing.
    """
    if any((_repository(name) / "blobs").glob("*.incomplete")):
        return []
    root, listed_files = _snapshot(name), list[HubFile]()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        hash = path.readlink().name if path.is_symlink() else ""
        known = hash if HASH.fullmatch(hash) else ""
        listed_files.append(HubFile(path.relative_to(root).as_posix(), path.stat().st_size, known))
    if listed_files:
        log.warning(
            "%s: the cache has no list of the Hub's files. Using the %s in the cache", name, plural(len(listed_files), "file")
        )
    return listed_files


def _write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(text)
    partial.replace(place)


# models --------------------------------------------------------------------------------------------------------------


def model(key: str, name: HubName, weights: bool = True, tokenizer: bool = False) -> Path:
    """Downloads a pinned model and returns its folder; without `weights`, only its configuration and tokenizer.

    Raises ConfigError for a model without safetensors, because loading a pickle can run code. With `tokenizer`, the caller
    needs only the tokenizer, so a model without safetensors raises no error.
    """
    listed = [f for f in listing(key, name) if not f.path.startswith(ELSEWHERE)]
    inside = f"{name.inside}/" if name.inside else ""
    own = [f for f in listed if f.path.startswith(inside)]
    if not own:
        raise ConfigError(
            f"{key}: {name.repo} has no folder {name.inside!r}. Choose a folder of {client.endpoint()}/{name.repo}/tree/main"
        )
    chosen = weight_files(own)
    if not chosen and not tokenizer:
        pickles = [f.path for f in own if f.path.endswith(PICKLES)]
        fix = f"Convert the weights at {CONVERT}, and use the new revision: {name.repo}@refs/pr/NUMBER"
        fault = f"{pickles[0]} is a pickle, which can run code). {fix}" if pickles else "no weights). Use a model with weights"
        raise ConfigError(f"{key}: {name.repo} has no safetensors ({fault}")
    beside = f"{name.inside.rpartition('/')[0]}/tokenizer/".removeprefix("/")  # diffusers' folder for an encoder's tokenizer
    listed = [f for f in listed if f.path.startswith((inside, beside))]
    about = [f for f in listed if f.path.endswith(ABOUT)]
    download(key, name, about + (chosen if weights else []))
    return folder(name)


def weight_files(listed: list[HubFile]) -> list[HubFile]:
    """Chooses the safetensors that the libraries load. If a folder has several sets, chooses the set with the usual name."""
    folders: dict[str, list[HubFile]] = {}
    for f in listed:
        folders.setdefault(str(PurePosixPath(f.path).parent), []).append(f)
    return [f for files in folders.values() for f in _usual(files)]


def _usual(files: list[HubFile]) -> list[HubFile]:
    """Chooses a folder's weight files: the one file with a usual name, or the files of an index. Without both, chooses all
    safetensors."""
    named = {PurePosixPath(f.path).name: f for f in files if f.path.endswith((WEIGHTS, INDEX))}
    for stem in STEMS:
        if whole := named.get(f"{stem}{WEIGHTS}"):
            return [whole]
        if f"{stem}{INDEX}" in named:
            return [f for name, f in named.items() if re.fullmatch(f"{stem}{PARTS}{WEIGHTS}", name)]
    return [f for name, f in named.items() if name.endswith(WEIGHTS)]


def weight_bytes(path: Path) -> int:
    """Counts the bytes of a model's weights.

    For a model of the Hub, uses the Hub's list of files; for other models, the files in the folder.
    """
    if (name := of_folder(path)) is None:
        return sum(p.stat().st_size for p in path.rglob(f"*{WEIGHTS}"))
    prefix = f"{name.inside}/" if name.inside else ""
    return sum(f.bytes for f in weight_files([f for f in listing("model", name) if f.path.startswith(prefix)]))


def absent_weights(path: Path) -> dict[str, str]:
    """Returns, by name, the SHA-256 of each weight file that the Hub has and this folder of the cache lacks.

    For any other folder, returns {}.
    """
    if (name := of_folder(path)) is None:
        return {}
    prefix = f"{name.inside}/" if name.inside else ""
    weights = weight_files([f for f in listing("model", name) if f.path.startswith(prefix)])
    here = {PurePosixPath(f.path).name: f for f in weights if "/" not in f.path.removeprefix(prefix)}
    return {file: f.hash for file, f in here.items() if len(f.hash) == 64 and not (path / file).exists()}


def shown(path: Path) -> str:
    """Returns a folder's name for messages. For a model of the Hub, this is its name on the Hub."""
    return str(of_folder(path) or path)


def readable(size: int) -> str:
    """Formats a number of bytes for messages, such as `1.2 GB`."""
    value, unit = float(size), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
