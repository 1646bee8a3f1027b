"""A private Ray ends with the process that started it."""

import contextlib
import subprocess
import sys

import psutil

DRIVER = """
import atexit, os, time
import ray
from heliostat.cluster.connect import connect

@ray.remote(num_cpus=0)
class Actor:
    def pid(self):
        atexit.register(time.sleep, 600)
        return os.getpid()

connect(cpus=2)
actor = Actor.remote()
pid = ray.get(actor.pid.remote())
del actor
time.sleep(2)
print(pid)
"""


def test_a_process_that_does_not_end_by_itself_is_ended():
    """As an actor's process, now and then, hangs in its own exit: Ray takes it for gone then."""
    done = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(5)  # until it has been reaped
