"""Tests that for ranks on several nodes, one stream per node delivers the samples of the order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from heliostat.chaos.nodes import LocalNodes

from tests.unit.test_samples import make_text

TRAINED = """
import dataclasses, json, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np, ray
from heliostat.api import exact_stream
from heliostat.data import stream
from heliostat.data.dataset import open_dataset, sample_bytes
from heliostat.data.mixing import Shape
from heliostat.data.node_streams import NodeStreams, StreamLimits

ray.init(log_to_driver=False)
here = ray.get_runtime_context().get_node_id()
others = [n["NodeID"] for n in ray.nodes() if n["NodeID"] != here]
steps, ranks = 24, [others[0], others[0], others[1], others[1]]
data = {"sources": [{"path": sys.argv[1]}], "sequence_length": 16, "seed": 3, "virtual_ranks": 8}
plan = exact_stream.plan_stream(exact_stream.data_job(data, steps, 16, 0.0), sys.argv[2]).plan
plan = dataclasses.replace(plan, shape=Shape(16, 8, 3, 12))  # windows of two blocks, as many as a node has ranks
dataset = open_dataset(plan)
task = stream.fetch(plan, dataset.order, 4, steps, replace=True)
streams = NodeStreams(task, len(ranks), StreamLimits(1 << 30, sample_bytes(16, dataset.sources), {}))
parts = streams.parts(ranks)

def consumed(rank):
    lanes = stream.iterate(parts[rank], plan, dataset.order, rank, len(ranks), 4)
    return [lanes.next_step() for _ in range(4, steps)]

with ThreadPoolExecutor(len(ranks)) as pool:
    taken = list(pool.map(consumed, range(len(ranks))))
right = 0
for rank, batches in enumerate(taken):
    for step, batch in enumerate(batches, start=4):
        positions = dataset.order.step(step)[rank :: len(ranks)].ravel()
        right += np.array_equal(batch.content, dataset.read(dataset.order.locate(positions)))
node_of = lambda actor: ray.get_runtime_context().get_node_id()
coordinators = [ray.get(parts[rank]._coord_actor.__ray_call__.remote(node_of)) for rank in range(len(ranks))]
streams.end()
gone = NodeStreams(task, len(ranks), StreamLimits(1 << 30, sample_bytes(16, dataset.sources), {}))
try:
    failed = bool(gone.parts([*["ab" * 28] * 2, *ranks[2:]]))
except ray.exceptions.RayError as e:
    failed = type(e).__name__
gone.end()
print(json.dumps({"right": right, "on_their_nodes": coordinators == ranks, "failed": failed}))
"""


@pytest.mark.ci
def test_ranks_of_two_nodes_get_their_samples_from_a_stream_on_each(tmp_path: Path):
    make_text(tmp_path / "data")
    with LocalNodes(tmp_path, 2, 2) as nodes:
        command = [sys.executable, "-c", TRAINED, str(tmp_path / "data"), str(tmp_path / "run")]
        done = subprocess.run(command, env={**os.environ, **nodes.environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "right": 4 * 20, "on_their_nodes": True, "failed": "ActorUnschedulableError",  # not after a wait
    }  # fmt: skip
