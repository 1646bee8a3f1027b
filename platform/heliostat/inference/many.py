"""Answers many prompts on Ray, with text or images: `heliostat model generate MODEL --prompts FILE --out OUT`.

    OUT/00000.png ...    generated images, by the prompt's number
    OUT/results.jsonl    the answers in the prompts' order, written last
    OUT/settings.json    model, prompts, and options with which the folder was written
    OUT/work             results of finished batches

Each prompt is answered once. If a command is killed, the next command continues after the last finished batch, on any number of
workers. An answer depends only on its prompt, its seed, the model, and the options. One command at a time writes to the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from heliostat.curation import segment
from heliostat.errors import HeliostatError
from heliostat.inference.batch.run import claim, flow_on_ray, model_digest
from heliostat.inference.generate import BATCH, RESULTS
from heliostat.recipes import exported
from heliostat.recipes.protocol import Generated, Request
from heliostat.storage import lease
from heliostat.storage.locations import Location
from heliostat.tasks import shipping
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.shipping import Shipment
from heliostat.tasks.work import key
from heliostat.text import brief


def generate_many(
    folder: Path, prompts: list[str], options: dict[str, object], seed: int, out: str, workers: int, quiet: bool = False
) -> int:
    """Answers all prompts with `workers` copies of the model in parallel, on Ray; returns the number of answers.

    The i-th prompt has seed + i. `quiet`: whether to hide the progress. Raises ConfigError, before Ray starts, in these cases:

    - the model doesn't support generation with these options
    - the output contains something else, or answers to other prompts
    - another command writes to the output
    """
    place = Location(out)
    place.probe()
    place.require_writable()
    with exported.using(folder):
        first = exported.generator(folder, options)  # first, so that errors come before Ray's start
    identity = {"model": model_digest(folder), "options": options, "seed": seed,
             "set of prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}  # fmt: skip
    if getattr(first, "chat", False):
        identity["chat"] = True  # earlier versions continued the prompts of such a model
    claim(place, identity, "answers", "answers of `heliostat model generate --prompts`")
    import torch

    with lease.take(place, "written", "Wait for that process, or stop it", field="--out") as lease_:
        with flow_on_ray(place, "answering prompts", workers, torch.cuda.device_count(), quiet) as flow:
            try:
                results = answered(flow, folder, prompts, options, seed, out, key(identity))
            except HeliostatError:
                raise
            except Exception as e:  # for example, the memory is too small for the model
                raise HeliostatError(f"generating failed: {brief(getattr(e, 'cause', None) or e)}") from e
            shipping.withdraw(flow.work.spill)
        lease_.fence.check()
        place.join(RESULTS).write("".join(f"{result}\n" for result in results).encode())
    return len(results)


def answered(
    flow: Flow, folder: Path, prompts: list[str], options: dict[str, object], seed: int, out: str, follows: str
) -> list[str]:
    """Answers prompts with Ray tasks (`flow`); returns a JSON line per prompt, in the order of the prompts.

    `follows`: a key that covers everything that determines the answers, including the model's files.
    """
    place = Location(out)
    drawn = {place.join(name).uri for name, _ in place.files()}
    shared = {"model": shipping.describe("model", str(folder)), "options": options, "seed": seed, "out": out, "follows": follows}
    tasks = (
        Task(key(follows, first), {"first": first, "prompts": prompts[first : first + BATCH], **shared})
        for first in range(0, len(prompts), BATCH)
    )
    records = flow.all("generate", answer_batch, tasks, valid=lambda record: drawn.issuperset(record["drawn"]), pooled=True)
    return [result for record in records for result in segment.load(flow.work.spill, record["results"])]


def answer_batch(
    folder: Location,
    first: int,
    prompts: list[str],
    model: Shipment,
    options: dict[str, object],
    seed: int,
    out: str,
    follows: str,
) -> dict[str, object]:
    """Answers prompts; the first of them has the number `first`. Returns the names of the answers' file and of the generated
    images."""
    place = Location(out)
    requests = [Request(prompt, seed + i, place.join(f"{i:05d}").uri) for i, prompt in enumerate(prompts, first)]
    used = shipping.here(folder, model)
    with exported.using(Path(used)):
        answers = _generator(used, json.dumps(options, sort_keys=True), follows)(requests)
    results = segment.store(folder, [json.dumps({"prompt": g.prompt, **g.facts}) for g in answers])
    return {"results": results, "files": [results], "drawn": [g.facts["file"] for g in answers if "file" in g.facts]}


@lru_cache(maxsize=1)
def _generator(model: str, options: str, follows: str) -> Callable[[list[Request]], list[Generated]]:
    """Loads a model once per process, for later tasks with the same model and options."""
    return exported.generator(Path(model), json.loads(options))
