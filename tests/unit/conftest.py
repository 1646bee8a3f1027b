"""Enforces rules for every unit test, and defines fixtures that several files use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from heliostat.storage.hub import client
from heliostat.storage.locations import Location

from tests import hub_server, stores
from tests.hub_server import Hub

if TYPE_CHECKING:
    from heliostat.apps.search.search import SearchIndex
    from heliostat.data.manifest import Manifest

os.environ["HELIOSTAT_CACHE"] = ""  # a test that changes how models are counted must not meet what was counted before
LOOK_S, LOOKS = 0.005, 400  # 2 s: OpenBLAS' threads wait for more work for 0.1 s, and use a core while they wait
COUNTED_ONCE = ("test_auto", "test_plan", "test_plan_counts", "test_plan_layouts", "test_plan_memory_savers", "test_plan_muon",
                "test_plan_selective", "test_plan_state", "test_cli_errors", "test_cli_next", "test_cli_reports",
                "test_dry_run")  # fmt: skip


def _computes() -> bool:
    """Returns whether a thread of this process computes while this one sleeps."""
    began = time.process_time()
    time.sleep(LOOK_S)
    return time.process_time() - began > LOOK_S / 2


@pytest.fixture(autouse=True, scope="module")
def nothing_computes_on() -> Iterator[None]:
    """Fails a file that leaves a computing thread running, which would halve the speed of all later tests."""
    yield
    assert not all(_computes() for _ in range(LOOKS)), "a thread that this file has started computes on; end it"


@pytest.fixture(autouse=True, scope="module")
def counted_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the planner's counts of models for the whole session, in files whose tests don't change the counting."""
    if request.module.__name__.rpartition(".")[2] not in COUNTED_ONCE:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIOSTAT_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "counts"))
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Replaces fsync by nothing: tests' files needn't survive a power failure, and on a busy machine each fsync takes 20 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test in the repository's root, where jobs and clusters are found by their relative paths."""
    from tests.unit.build_job import ROOT

    monkeypatch.chdir(ROOT)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Computes on one thread: small models are slower on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Returns HOST:PORT of an S3 server in this process."""
    with stores.s3() as endpoint:
        yield endpoint


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    """Returns a folder that doesn't exist yet."""
    if request.param == "disk":
        return Location(str(tmp_path / "run"))
    for name, value in stores.AWS.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    return Location(f"s3://{bucket}/run?{stores.bucket(request.getfixturevalue('s3'), bucket)}")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a small language model, which no test changes."""
    from tests.unit.build_job import BASE
    from tests.unit.build_language_model import write_model

    return write_model(tmp_path_factory.mktemp("llama"), BASE["model"])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Returns a prepared dataset of text, which no test changes."""
    from tests.unit.build_document_index import CORPUS, write_dataset

    return write_dataset(tmp_path_factory.mktemp("corpus"), CORPUS)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a dataset of handwritten digits, which no test changes."""
    from tests.unit import build_images

    return build_images.digits(tmp_path_factory.mktemp("digits") / "data", 120)


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a language model with a limit of 64 tokens."""
    from tests.unit.build_job import BASE
    from tests.unit.build_language_model import write_model

    return write_model(tmp_path_factory.mktemp("embedder"), BASE["model"], 64)


@pytest.fixture(scope="session")
def document_index(corpus: Manifest, embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    """Returns an index of the corpus with embeddings, which no test changes."""
    from heliostat.apps.search.search import SearchIndex

    from tests.unit.build_document_index import index

    index(corpus, folder := tmp_path_factory.mktemp("index"), embedder)
    return SearchIndex(Location(str(folder)))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Runs a server that speaks the Hub's protocol. It has its own cache, and requests aren't retried."""
    with hub_server.serving() as server:
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HELIOSTAT_RETRY_BUDGET_S", "0")
        monkeypatch.setattr(client, "BACKOFF", client.Backoff(0.01, 0.02))
        monkeypatch.setattr(client, "RECEIVED", 1000)
        yield server
