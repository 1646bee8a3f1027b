"""Tests that a pretrained model may come from S3 and from MLflow, and that each name gives the same weights as its folder."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
from heliostat.config import pretrained
from heliostat.config.spec import resolve as absolute
from heliostat.curation import hub
from heliostat.data import manifest
from heliostat.errors import ConfigError, StorageError
from heliostat.recipes import loading
from heliostat.recipes.folder_digests import weights_digest
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage import local_files, model_sources
from heliostat.storage.locations import Location
from heliostat.tracking import models
from heliostat.validation import check

from tests import stores
from tests.unit import build_conversations, build_job
from tests.unit.build_language_model import ARCHITECTURES, write_model
from tests.unit.test_dpo import referenced, write_base
from tests.unit.test_samples import make_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source"), ARCHITECTURES["llama"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "cache", lambda kind: tmp_path / f"cache-{kind}")
    for name, value in stores.AWS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def in_s3(folder, s3, request) -> str:
    bucket = f"models-{abs(hash(request.node.name)) % 10**8}"
    place = Location(f"s3://{bucket}/tiny?{stores.bucket(s3, bucket)}")
    for file in folder.iterdir():
        place.join(file.name).upload(file)
    place.join("pytorch_model.bin").write(b"a pickle")
    return place.uri


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the URI of an MLflow store. Creating one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


class Registry:
    """An experiment of an MLflow store with a run, and with versions of a model."""

    def __init__(self, uri: str, artifacts: str, name: str) -> None:
        self.uri, self.name = uri, name
        self.client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        self.experiment = self.client.create_experiment(name, artifact_location=artifacts)
        self.run = self.client.create_run(self.experiment).info.run_id
        self.client.create_registered_model(name)

    def log(self, folder: Path, place: Path, kind: str | None = None) -> str:
        """Logs a folder as heliostat does, in `artifacts/model`. Returns the id of the logged model."""
        shutil.copytree(folder, place / "artifacts" / "model")
        mlflow.set_tracking_uri(self.uri)  # MLflow's own calls below take it; what is tested must not
        one = self.client.create_logged_model(self.experiment, name="model", source_run_id=self.run, model_type=kind)
        self.client.log_model_artifacts(one.model_id, str(place))
        self.client.finalize_logged_model(one.model_id, "READY")
        mlflow.set_tracking_uri(None)
        return one.model_id

    def register(self, model_id: str) -> str:
        mlflow.set_tracking_uri(self.uri)
        made = self.client.create_model_version(self.name, f"models:/{model_id}", run_id=self.run, model_id=model_id)
        mlflow.set_tracking_uri(None)
        return made.version


def names(source: str, store: str, text: Path) -> torch.nn.Module:
    """Builds the model of a job with this `model.pretrained`, as a worker does."""
    job = build_job.job(**{"model": {"pretrained": source}, "mlflow.uri": store, "data.sequence_length": 32})
    return loading.load(pretrained.pinned(job), [make_text(text)]).build()


def equal(model: torch.nn.Module, folder: Path) -> bool:
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    return all(torch.equal(p, stored[name]) for name, p in model.named_parameters() if name in stored)


def test_a_folder_in_s3_gives_the_weights_of_the_folder_and_is_copied_once_without_pickles(in_s3, folder, tmp_path, monkeypatch):
    assert equal(names(in_s3, "sqlite://", tmp_path / "text"), folder)
    copy = model_sources.fetched(in_s3, "")
    assert {p.name for p in copy.iterdir()} == {p.name for p in folder.iterdir()}
    monkeypatch.setattr(model_sources, "_copy", None)  # a second copy would call it
    assert model_sources.fetched(in_s3, "") == copy == models.resolve(in_s3, "sqlite://")


def test_a_changed_folder_in_s3_is_copied_again(in_s3, folder):
    before = model_sources.fetched(in_s3, "")
    Location(in_s3).join("README.md").write(b"changed")
    after = model_sources.fetched(in_s3, "")
    assert after != before and (after / "README.md").read_bytes() == b"changed"


def test_a_folder_that_changes_while_it_is_copied_is_never_taken_for_the_old_or_the_new(in_s3, folder, monkeypatch):
    """A new export with files of the same sizes would otherwise be mixed with the old one, without a word."""
    copy, place = model_sources._copy, Location(in_s3)

    def slow(source: Location, target: Path, size: int) -> None:
        copy(source, target, size)
        if target.name == "config.json":
            place.join("model.safetensors").write(bytes((folder / "model.safetensors").stat().st_size))

    monkeypatch.setattr(model_sources, "_copy", slow)
    with pytest.raises(StorageError, match="changed while heliostat copied it"):
        model_sources.fetched(in_s3, "")
    monkeypatch.setattr(model_sources, "_copy", copy)
    assert not any((model_sources.fetched(in_s3, "") / "model.safetensors").read_bytes())


def test_a_read_of_the_store_that_fails_is_repeated(in_s3, folder, monkeypatch):
    """It was an error that asked for free space on this machine."""
    opened, faults = Location.open, list[str]()

    class Faulty:
        def __init__(self, place: Location) -> None:
            self.place, self.file = place, opened(place)

        def __enter__(self) -> Faulty:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def size(self) -> int:
            return self.file.size()

        def read_at(self, count: int, begin: int) -> bytes:
            if self.place.name not in faults:
                faults.append(self.place.name)
                raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation")
            return self.file.read_at(count, begin)

    monkeypatch.setattr(Location, "open", lambda self: Faulty(self))
    monkeypatch.setattr(model_sources, "BLOCK", 1 << 10)
    copy = model_sources.fetched(in_s3, "")
    assert sorted(faults) == sorted(p.name for p in folder.iterdir())
    assert all((copy / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())


def test_other_files_of_the_folder_may_change_while_the_model_is_copied(in_s3, folder, monkeypatch):
    """For example the logs of a run in the same folder, which change all the time."""
    copy, place = model_sources._copy, Location(in_s3)

    def slow(source: Location, target: Path, size: int) -> None:
        copy(source, target, size)
        place.join("events.log").write(target.name.encode())

    monkeypatch.setattr(model_sources, "_copy", slow)
    assert {p.name for p in model_sources.fetched(in_s3, "").iterdir()} == {p.name for p in folder.iterdir()}


def test_a_process_waits_for_another_ones_copy_as_long_as_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(model_sources, "SILENCE_S", 0.01)
    begun, rest, asked, written = threading.Event(), threading.Event(), threading.Semaphore(0), threading.Semaphore(0)
    looks, writes, bytes_of = list[Path](), 6, model_sources._bytes

    def get(to: Path) -> Path:
        begun.set()
        for number in range(writes):
            asked.acquire()
            (to / str(number)).write_bytes(b"x")
            written.release()
        rest.wait()
        return to

    def grown(folder: Path) -> int:
        if len(looks) < writes:
            asked.release()
            written.acquire()
        looks.append(folder)
        return bytes_of(folder)

    monkeypatch.setattr(model_sources, "_bytes", grown)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(model_sources._cached, ["slow"], get)
        begun.wait()
        with pytest.raises(StorageError, match="no longer grows"):
            model_sources._cached(["slow"], get)
        rest.set()
        assert len(looks) == writes + 1 and first.result() == model_sources._cached(["slow"], get)


def test_a_copy_that_takes_more_than_a_day_is_not_removed_for_another_one(tmp_path):
    """Another process removes the copies that were not used for a day, before it makes its own."""

    def get(to: Path) -> Path:
        (to / "weights").write_bytes(b"x")
        for place in (to.parent, to.parent.with_suffix(local_files.LOCK)):
            os.utime(place, (0, 0))  # a slow download, or a computer that slept
        assert (model_sources._cached(["other"], lambda other: other)).is_dir()
        return to

    copy = model_sources._cached(["slow"], get)
    assert (copy / "weights").read_bytes() == b"x"
    os.utime(copy.parent, (0, 0))
    model_sources._cached(["third"], lambda other: other)
    assert not copy.exists()


def test_a_copy_that_is_renamed_while_a_process_looks_at_it_is_no_error(tmp_path, monkeypatch):
    partial, scan = tmp_path / "partial", os.scandir
    (partial / "vae").mkdir(parents=True)
    for place in (tmp_path / "seen", partial / "vae" / "gone"):
        place.write_bytes(b"xx")

    def late(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path) == partial and partial.exists():
            partial.rename(tmp_path / "model")
        return scan(path)

    monkeypatch.setattr(os, "scandir", late)
    assert model_sources._bytes(tmp_path) == 2


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.ci
def test_a_version_an_alias_a_logged_model_and_a_run_of_mlflow_are_the_same_model(
    folder, tmp_path, store, s3, monkeypatch, remote
):
    artifacts = (tmp_path / "artifacts").as_uri()
    if remote:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{s3}")
        stores.bucket(s3, "of-mlflow")
        artifacts = "s3://of-mlflow/artifacts"
    registry = Registry(store, artifacts, name := f"tiny-{remote}")
    model_id = registry.log(folder, tmp_path / "logged")
    version = registry.register(model_id)
    registry.log(folder.parent, tmp_path / "checkpoint", model_sources.CHECKPOINT)  # newer, but not a model to load
    registry.client.set_registered_model_alias(name, "champion", version)
    for source in (f"models:/{name}/{version}", f"models:/{name}@champion", f"models:/{model_id}", registry.run):
        assert equal(names(source, registry.uri, tmp_path / "text"), folder), source
        assert (models.resolve(source, registry.uri) / "config.json").is_file()
    assert (tmp_path / "cache-models").exists() == remote  # files on this machine are used in place


@pytest.mark.parametrize("recipe", ["SFT", "DPO"])
def test_fine_tuning_starts_from_s3_and_from_an_alias_as_from_the_folder(recipe, tmp_path, store, s3):
    base, data = write_base(tmp_path), tmp_path / "data"
    if recipe == "SFT":
        build_conversations.packs(data)
    else:  # with the digest of the base, which `bind` compares
        referenced(build_conversations.preferences(tmp_path / "pairs", number=12), data, weights_digest(base))
    place = Location(f"s3://base-{recipe.lower()}/tiny?{stores.bucket(s3, f'base-{recipe.lower()}')}")
    for file in base.iterdir():
        place.join(file.name).upload(file)
    registry = Registry(store, (tmp_path / "artifacts").as_uri(), f"base-{recipe}")
    version = registry.register(registry.log(base, tmp_path / "logged"))
    registry.client.set_registered_model_alias(registry.name, "champion", version)
    for source in (place.uri, f"models:/{registry.name}@champion"):
        job = build_conversations.sft(
            data,
            **{"recipe": f"heliostat.recipes:{recipe}", "model": {"pretrained": source}, "mlflow.uri": store},
            **({} if recipe == "SFT" else {"data.document_mask": False}),
        )
        loaded = loading.load(pretrained.pinned(job), [manifest.read(Location(str(data)))])
        assert type(loaded).__name__ == recipe and equal(loaded.build(), base), source


def test_a_name_of_mlflow_that_is_deleted_and_registered_again_is_the_new_model(folder, tmp_path, store, s3, monkeypatch):
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{s3}")
    stores.bucket(s3, "again")
    registry, copies = Registry(store, "s3://again/artifacts", "again"), []
    for number in range(2):
        (tmp_path / f"model-{number}").mkdir()
        for file in folder.iterdir():
            shutil.copy(file, tmp_path / f"model-{number}")
        (tmp_path / f"model-{number}" / "number.txt").write_text(str(number))
        version = registry.register(registry.log(tmp_path / f"model-{number}", tmp_path / f"logged-{number}"))
        copies.append((int(version), (model_sources.fetched(f"models:/again/{version}", store) / "number.txt").read_text()))
        registry.client.delete_registered_model("again")
        registry.client.create_registered_model("again")
    assert copies == [(1, "0"), (1, "1")]


def test_a_registry_whose_versions_name_each_other_is_one_error(store, monkeypatch):
    class Client:
        def get_model_version(self, name: str, version: str) -> SimpleNamespace:
            return SimpleNamespace(source="models:/loop/1")

    monkeypatch.setattr(model_sources, "_client", lambda store: Client())
    with pytest.raises(ConfigError, match="models:/loop/1: after 20 copies of copies"):
        model_sources.fetched("models:/loop/1", store)


def test_a_run_that_resumes_keeps_the_version_that_its_alias_had(folder, tmp_path, store):
    registry = Registry(store, (tmp_path / "artifacts").as_uri(), "tiny")
    versions = [registry.register(registry.log(folder, tmp_path / f"logged-{n}")) for n in range(2)]
    job = build_job.job(**{"model": {"pretrained": "models:/tiny@best"}, "mlflow.uri": registry.uri})
    registry.client.set_registered_model_alias("tiny", "best", versions[0])
    began = pretrained.pinned(job)
    registry.client.set_registered_model_alias("tiny", "best", versions[1])
    assert began.model["pretrained"] == "models:/tiny/1" and pretrained.pinned(job).model["pretrained"] == "models:/tiny/2"
    assert pretrained.moves(job) and pretrained.as_recorded(job, began.dump()).model["pretrained"] == "models:/tiny/1"
    other = build_job.job(**{"model": {"pretrained": "models:/other@best"}, "mlflow.uri": registry.uri})
    assert pretrained.as_recorded(other, began.dump()).model["pretrained"] == "models:/other@best"


def test_names_stay_as_written_when_a_job_is_read_and_submitted(in_s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (in_s3, "models:/tiny@best", "models:/tiny/3", "0" * 32):
        job = absolute(build_job.job(**{"model": {"pretrained": source}}))
        assert job.model["pretrained"] == source and not pretrained.is_folder(source)
    assert pretrained.is_folder("/models/tiny")
    assert hub.resolved({"model": in_s3})[0]["model"] == str(model_sources.fetched(in_s3, ""))


def test_check_describes_the_model_and_each_mistake_is_one_line_with_the_key(in_s3, folder, tmp_path, store, caplog):
    caplog.set_level("INFO")
    build = {"data.sequence_length": 32, "model.vocab_size": None}
    job = build_job.job(**{**build, "model": {"pretrained": in_s3}, "mlflow.uri": "sqlite://"})
    check.check_job(job)
    assert f"model.pretrained: {in_s3}, " in caplog.text
    registry, empty = Registry(store, (tmp_path / "artifacts").as_uri(), "empty"), Location(in_s3).join("nothing").uri
    for source, reason in {
        empty: "no such folder",
        "models:/empty/7": "not found in",
        "models:/absent@best": "not found in",
        registry.run: "has no logged model",
        "f" * 32: "not found in",
    }.items():
        with pytest.raises(ConfigError) as raised:
            pretrained.located(build_job.job(**{"model": {"pretrained": source}, "mlflow.uri": registry.uri}))
        assert str(raised.value).startswith("model.pretrained: ") and reason in str(raised.value)
        assert "\n" not in str(raised.value)
    place = Location(in_s3).join("pickled")
    place.join("config.json").write((folder / "config.json").read_bytes())
    place.join("pytorch_model.bin").write(b"")
    with pytest.raises(ConfigError, match="has no safetensors"):
        model_sources.fetched(place.uri, "")


def test_an_adapter_in_a_store_names_its_base_and_how_to_serve_it(in_s3):
    place = Location(in_s3).join("adapter")
    place.join("adapter_config.json").write(b'{"base_model_name_or_path": "models/my base"}')
    place.join("adapter_model.safetensors").write(b"")
    with pytest.raises(ConfigError, match=r"is an adapter without its base. .* heliostat model serve 'models/my base' --adapter"):
        models.resolve(place.uri, "sqlite://")


@pytest.mark.parametrize("base", ["a\u001b[31m", "a" * 9999, None])
def test_a_hostile_adapter_names_no_base(tmp_path, base):
    config = json.dumps({"base_model_name_or_path": base}) if base else "[" * 100_000
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"Serve it with its base: heliostat model serve BASE --adapter"):
        models.resolve(str(tmp_path), "sqlite://")


def test_a_gguf_file_a_run_and_an_adapter_name_the_command_that_makes_a_model_of_them(tmp_path):
    for name, file, command in (
        ("gguf", "model.gguf", "heliostat model import"),
        ("run", "checkpoints/step", "heliostat model export"),
        ("adapter", "adapter_config.json", r"model serve BASE --adapter NAME=.* Or merge it into its base"),
        ("empty", "notes.txt", "no config.json"),
    ):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_bytes(b"")
        for raises in (
            lambda path: loading.make(CausalLM, build_job.job(**{"model": {"pretrained": path}})).config,
            lambda path: models.resolve(path, "sqlite://"),
        ):
            with pytest.raises(ConfigError, match=command):
                raises(str(tmp_path / name))
    with pytest.raises(ConfigError, match="heliostat model import"):
        models.resolve(str(tmp_path / "gguf" / "model.gguf"), "sqlite://")
