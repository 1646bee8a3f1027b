"""Compares the held-out loss of the quickstart's model after training on raw and on curated text, with equal tokens.

    python -m tests.benchmarks.curated FOLDER [--apart SITE ...] [--steps 100] [--seeds 1 2 3] [--pages 3000]

FOLDER holds pages of HTML, in a folder per site; `planted_web.py` makes a small web of this form. The sides are `raw`, all text
of the pages, as in a WET file; `main text`, the result of `extract`; and `curated`, the stages of `pipelines/fineweb.yaml`. All
use one tokenizer, trained on the raw side.

Each run is one process of one thread: the job of `jobs/quickstart.yaml` on the same number of tokens, without repetition if there
are enough. Scores are on clean text of pages that no side trains on, extracted by another library than the curated side's
(trafilatura): pages of the same sites, and whole held-out sites (--apart).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import yaml
from heliostat.curation import reasons
from heliostat.data.manifest import Manifest
from heliostat.data.order import Order, SamplePlaces
from heliostat.engine import deepspeed_engine

from tests.benchmarks import harness, one_process, planted_web
from tests.gpu import setting
from tests.unit.build_pipeline import Here, make_dataset

JOB = harness.ROOT / "jobs/quickstart.yaml"
SIDES: dict[str, list[dict[str, Any]]] = {
    "raw": [{"stage": "extract", "main_content": False}],
    "main text": [{"stage": "extract"}],
    "curated": yaml.safe_load((harness.ROOT / "pipelines/fineweb.yaml").read_text())["stages"],
}


def made(folder: Path, name: str, stages: list[dict[str, Any]], tokenizer: dict[str, Any], source: str) -> Manifest:
    sizes = {"chunk_tokens": 65_536, "shard_bytes": 2_000_000}
    return make_dataset(Here(name="curated", input=f"{folder}/{source}",
                             output=f"{folder}/{name}", stages=stages, tokenizer=tokenizer, **sizes))  # fmt: skip


def write(folder: Path, web: planted_web.Web) -> None:
    """Writes the pages, and the texts for scoring."""
    for path, page in web.pages.items():
        (folder / "web" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "web" / path).write_bytes(page)
    for number, (what, texts) in enumerate(web.aside.items()):
        (folder / f"aside-{number}").mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"aside-{number}" / "a.jsonl").write_text(lines)
        print(f"aside, {what}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


def job(folder: Path, name: str, steps: int, seed: int) -> Any:
    return one_process.checked(JOB, [f"data.sources.0.path={folder}/{name}", f"train.steps={steps}", f"train.seed={seed}",
                                     f"data.seed={seed}", "evaluate=null"])  # fmt: skip


def an_epoch(order: Order) -> SamplePlaces:
    """Returns every training sample of a source, once."""
    return order.locate(np.arange(int(order.epoch_samples[0])))


def compared(losses: list[float], others: list[float]) -> str:
    """Formats the difference of losses from others with the same seeds, with the standard deviation over the seeds."""
    found = [a - b for a, b in zip(losses, others, strict=True)]
    return f"{mean(found):+.3f} ± {stdev(found) if len(found) > 1 else 0:.3f}"


def main() -> None:
    asked = harness.arguments(
        __doc__,
        folder=Path,
        apart={"nargs": "*", "default": []},
        pages=3000,
        scored=120,
        steps=100,
        seeds=[1, 2, 3],
        sides=[*SIDES],
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        web = planted_web.make(asked.folder, set(asked.apart), asked.pages, asked.scored)
        print(f"{len(web.pages):,} pages, {sum(map(len, web.pages.values())):,} bytes:", web.counts, flush=True)
        write(folder, web)
        trained, given = {"vocab_size": 2048, "train_bytes": 8_000_000}, {"path": f"{folder}/raw"}
        for name in asked.sides:
            found = made(folder, name, SIDES[name], trained if name == "raw" else given, "web")
            funnel = {stage: part["kept"] for stage, part in reasons.funnel(found).items()}
            print(f"{name}: {found.tokens:,} tokens; documents: {funnel}", flush=True)
        for number in range(len(web.aside)):
            made(folder, f"scored-{number}", [], given, f"aside-{number}")
        setting.start()
        print(f"\n{asked.steps} steps; held-out loss, nats a token, by seed, and bits a byte (mean)\n")
        heads = [head for what in web.aside for head in (what, "bits a byte", "above raw")]
        harness.head("side", *heads, "CPU s a run")
        raw: list[list[float]] = []
        for name in asked.sides:
            runs, seconds = list[list[dict[str, float]]](), list[float]()
            for seed in asked.seeds:
                engine, _, spent = one_process.train(job(folder, name, asked.steps, seed), lambda step, _: step / asked.steps)
                seconds.append(spent)
                scored = [job(folder, f"scored-{n}", asked.steps, seed) for n in range(len(web.aside))]
                runs.append([one_process.scores(of, engine, an_epoch(of.order)) for of in scored])
                deepspeed_engine.destroy_engines()
            losses = [[run[n]["loss"] for run in runs] for n in range(len(web.aside))]
            raw = raw or losses
            cells = [f"{', '.join(f'{x:.3f}' for x in mine)} | {mean(run[n]['bits_per_byte'] for run in runs):.3f} | "
                     f"{compared(mine, raw[n])}" for n, mine in enumerate(losses)]  # fmt: skip
            harness.row(name, *cells, f"{mean(seconds):.0f}")


if __name__ == "__main__":
    main()
