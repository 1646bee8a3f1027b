"""Tests a training worker's environment: the next step reuses memory that a step freed, in any thread."""

import os
import subprocess
import sys

from heliostat.cluster import connect, private_ray

STEPS = """
import resource, threading
import numpy as np

def step():
    blocks = [np.ones(size << 18, np.float32) for size in (12, 20, 1, 40)]  # 12, 20, 1 and 40 MB
    del blocks

def steps():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


def faults(settings: dict[str, str]) -> int:
    """Returns the page faults of ten steps in a thread, with 18,688 pages each."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | settings
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_thread_that_trains_does_not_fault_its_memory_in_again_at_every_step():
    assert faults(connect.worker_environment(gpus=0)) < 1_000


def test_workers_with_gpus_have_memory_that_grows_unless_the_user_says_how_torch_allocates(monkeypatch):
    for name in private_ray.GPU_ALLOCATORS:
        monkeypatch.delenv(name, raising=False)
    assert connect.worker_environment(gpus=1) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in private_ray.GPU_ALLOCATORS:
        monkeypatch.setenv(name, "backend:cudaMallocAsync")
        assert connect.worker_environment(gpus=1) == {}
        assert private_ray.environment(gpus=1)[name] == "backend:cudaMallocAsync"
        monkeypatch.delenv(name)
