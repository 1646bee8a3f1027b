"""Defines the shared fixtures of the integration tests: one Ray for the session, and an S3 server in this process."""

import atexit
import fcntl
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from heliostat.curation.prepare import prepare
from heliostat.training.run import train
from mlflow import MlflowClient

from tests import stores
from tests.integration.paced import PLAIN
from tests.integration.pipelines import write_pipeline

# before Ray starts: its workers inherit them
for name, value in stores.AWS.items():
    os.environ.setdefault(name, value)
os.environ["HELIOSTAT_CACHE"] = ""  # what earlier code counted is nothing to a test
SESSION = os.environ.get("PYTEST_XDIST_WORKER", "alone")
if os.environ.get("HELIOSTAT_TEST_SESSION") != SESSION:  # Ray's workers import this module too
    os.environ["HELIOSTAT_TEST_SESSION"] = SESSION
    _poison = tempfile.mkdtemp(prefix="heliostat-poison-")
    atexit.register(shutil.rmtree, _poison, ignore_errors=True)
    os.environ["HELIOSTAT_TEST_POISON"] = f"{_poison}/samples.json"
    Path(os.environ["HELIOSTAT_TEST_POISON"]).write_text("[]")


# Files that take longest, the longest first: with the others behind them, processes that run files one by one end together
LONGEST = (
    "test_cluster_local", "test_numerics", "test_lineage", "test_checkpoint_matrix", "test_tune", "test_training",
    "test_layout_runs", "test_storage_faults", "test_benchmark", "test_serving", "test_connect", "test_diffusion",
    "test_survival", "test_optimizers", "test_exact_data", "test_examples", "test_checkpoint_storage", "test_golden_curves",
    "test_selective_checkpointing", "test_play", "test_first_weights", "test_ui_key", "test_contrastive",
    "test_sequence_parallel", "test_recheck", "test_curation_answers", "test_room", "test_prepare", "test_offload",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """Returns the result of `make`, as JSON values. The first process of the session computes it, and the others wait for it."""
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder, made = root / f"once-{name}", root / f"{name}.json"
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            made.write_text(json.dumps(make(folder)))
        return json.loads(made.read_text())


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Starts a private Ray of eight logical CPUs, once per session."""
    from heliostat import training, tune
    from heliostat.cluster import private_ray
    from heliostat.cluster.connect import connect, disconnect
    from heliostat.recipes import built_in

    text, images = (
        built_in.modules("heliostat.recipes:CausalLM", {"arch": "llama"}),
        built_in.modules("heliostat.recipes:TextToImage", {}),
    )
    private_ray.ahead(torch.cuda.device_count(), [*training.AHEAD, *text, *images, *tune.AHEAD])
    connect(cpus=8, gpus=torch.cuda.device_count())
    yield
    disconnect()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Returns HOST:PORT of an embedded S3 server, for `?endpoint_override=HOST:PORT&scheme=http`."""
    with stores.s3() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def corpus(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepares a small dataset of real text: some packages of the standard library, with a vocabulary of 512 tokens."""
    return once(tmp_path_factory, "corpus", _corpus)


def _corpus(folder: Path) -> str:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "http", "email", "asyncio"):
        shutil.copytree(stdlib / package, folder / "raw" / package, ignore=shutil.ignore_patterns("__pycache__"))
    keys = {"input": str(folder / "raw"), "output": str(folder / "data"), "tokenizer": {"vocab_size": 512}, "chunk_tokens": 8192}
    prepare(write_pipeline(folder, name="corpus", **keys), [])
    return str(folder / "data")


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns one MLflow store for all tests of the session in this process."""
    return empty_store(tmp_path_factory)


def empty_store(factory: pytest.TempPathFactory) -> str:
    """Returns an MLflow store as a copy of an empty one, because creating its tables takes seconds."""
    empty, mine = once(factory, "tables", _tables), factory.mktemp("mlflow") / "mlflow.db"
    shutil.copy(empty, mine)
    return f"sqlite:///{mine}"


def _tables(folder: Path) -> str:
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return str(folder / "mlflow.db")


def tiny_job(corpus: str, tracking: str, folder: Path) -> dict[str, Any]:
    """Returns a job of some seconds on the corpus, in fp32, with its runs below the folder."""
    return {
        "name": "tiny",
        "recipe": "heliostat.recipes:CausalLM",
        "model": {"arch": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
        "data": {"sequence_length": 64, "sources": [{"path": corpus}], "seed": 5},
        "train": {
            "steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "optimizer": {"lr": 3e-3},
            "schedule": {"name": "cosine", "warmup_steps": 4},
            "precision": "fp32",
            "zero": {"stage": 2},
            # tiny parameters would otherwise stay gathered, and hide faults of stage 3
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
            "seed": 1,
        },
        "evaluate": {"every": 10, "samples": 24, "fraction": 0.05},
        "checkpoint": {"every": 10},
        "workers": {"count": 2},
        "storage": str(folder / "runs"),
        "mlflow": {"uri": tracking, "experiment": "tests"},
    }


UNBROKEN_STEPS = 60


@pytest.fixture(scope="session")
def unbroken(ray_session: None, corpus: str, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Trains a tiny job for UNBROKEN_STEPS without interruption; returns its file, and the losses that interrupted runs must
    have."""

    def make(folder: Path) -> dict[str, Any]:
        job = {**tiny_job(corpus, tracking, folder), **PLAIN, "name": "unbroken"}
        (folder / "unbroken.yaml").write_text(yaml.safe_dump(job))
        settings = [f"train.steps={UNBROKEN_STEPS}", f"evaluate.every={UNBROKEN_STEPS}", "checkpoint.every=10"]
        run_id = train(folder / "unbroken.yaml", [*settings, "train.log_every=1"])["run_id"]
        return {"job": job, "losses": curve(tracking, run_id)}

    made = once(tmp_path_factory, "unbroken", make)
    made["job"]["mlflow"]["uri"] = tracking
    path = tmp_path_factory.mktemp("unbroken") / "unbroken.yaml"
    path.write_text(yaml.safe_dump(made["job"]))
    return path, made["losses"]


@pytest.fixture
def job_file(corpus: str, tracking: str, tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny job, under a name if one is given."""

    def make(name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**tiny_job(corpus, tracking, tmp_path), "name": name}))
        return path

    return make


def curve(tracking: str, run_id: str, metric: str = "train/loss") -> list[float]:
    """Returns a metric's values at steps 1, 2, and so on; fails if a step is missing or appears twice."""
    history = MlflowClient(tracking_uri=tracking).get_metric_history(run_id, metric)
    points = sorted((m.step, m.value) for m in history)
    assert [step for step, _ in points] == list(range(1, len(points) + 1))
    return [value for _, value in points]
