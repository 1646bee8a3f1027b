"""Trains with a loop of your own, under Ray Train's TorchTrainer, on heliostat's exact, elastic stream of samples.

    heliostat data prepare pipelines/quickstart.yaml
    python jobs/examples/own_trainer.py --workers 2 --steps 40
    python jobs/examples/own_trainer.py --workers 1 --steps 80      # goes on behind step 40, with the same samples as two workers
    heliostat run verify .heliostat/own-trainer/stream

The model, the loop and the checkpoints are plain torch and Ray; of heliostat there are three lines, marked with (*).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import heliostat
import ray.train
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

VOCABULARY = 4096


def model() -> nn.Module:
    """Builds a model that predicts each token from the one before it alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY))


def loop(config: dict[str, Any]) -> None:
    """Runs on every worker."""
    stream: heliostat.ExactStream = config["stream"]
    plain = model()
    state = _read(ray.train.get_checkpoint() or config["checkpoint"])
    if state:
        plain.load_state_dict(state["model"])
    network = prepare_model(plain)  # with one worker it is the plain one itself
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    feed = stream.start(state["steps"] if state else 0)  # (*) this worker's share, from the step that the checkpoint stands at
    for batch in feed:
        tokens = torch.from_numpy(batch.content.astype("int64"))
        loss = nn.functional.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if batch.step % config["every"] == 0 or batch.step == stream.steps:
            receipt = feed.receipt()  # (*) on all workers, and before the checkpoint: a resume wants the receipt of its step
            _report({"loss": loss.item(), **receipt}, {"model": plain.state_dict(), "steps": batch.step})


def _read(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "state.pt", weights_only=True)


def _report(metrics: dict[str, Any], state: dict[str, Any]) -> None:
    """Reports to Ray Train, from all workers; the state of rank 0 is the checkpoint."""
    if ray.train.get_context().get_world_rank():
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "state.pt")
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def run(data: str, folder: Path, workers: int, steps: int, every: int = 20, anew: bool = False) -> dict[str, Any]:
    """Trains up to `steps`, from the newest checkpoint in the folder; returns the last metrics, the receipt among them."""
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    stream = heliostat.datasets(  # (*) the same on every run: what is in the folder is gone on with, or refused
        {"sources": [{"path": data}], "sequence_length": 64, "virtual_ranks": 4, "seed": 17},
        steps=steps,
        global_batch_size=16,
        folder=str(folder / "stream"),
    )
    kept = sorted((folder / "checkpoints").glob("*"))
    trainer = TorchTrainer(
        loop,
        train_loop_config={"stream": stream, "every": every, "checkpoint": Checkpoint(str(kept[-1])) if kept else None},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=str((folder / "ray").absolute())),
    )
    result: Any = trainer.fit()
    made = folder / "checkpoints" / f"{result.metrics['steps']:08d}"
    shutil.copytree(result.checkpoint.path, made)
    return result.metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=".heliostat/data/quickstart", help="a prepared dataset of tokens")
    parser.add_argument("--folder", type=Path, default=Path(".heliostat/own-trainer"))
    parser.add_argument("--workers", type=int, default=2, help="1, 2 or 4: what divides the lanes")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--anew", action="store_true", help="delete the folder first")
    given = parser.parse_args()
    print(run(given.data, given.folder, given.workers, given.steps, anew=given.anew))  # noqa: T201
