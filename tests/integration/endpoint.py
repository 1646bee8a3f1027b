"""Runs a real endpoint for tests and benchmarks: the command in a separate process, and a registry whose alias can be moved."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import torch
import transformers
from heliostat.cluster.processes import free_port

from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model
from tests.waiting import until

NAME, KEY, OTHER = "tiny", "sk-a-key-of-the-tests", "sk-another-key-of-them"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def started(folder: Path, said: str, *command: str) -> tuple[subprocess.Popen, Path]:
    """Starts a command of heliostat in its own session, and waits for a line of its output; returns the process and its log."""
    log = folder / "log"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as out:
        words = [sys.executable, "-m", "heliostat", *command]
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True)
    until(lambda: said in log.read_text(), said, 300, lambda: process.poll() is None, log.read_text)
    return process, log


def family(process: subprocess.Popen) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def stopped(process: subprocess.Popen) -> int:
    """Requests a command to stop; returns its exit code when all of its processes have ended."""
    left = family(process) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(90)
        assert not [p for p in psutil.wait_procs(left, timeout=120)[1] if p.status() != psutil.STATUS_ZOMBIE]
    finally:
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
    return code


class Endpoint:
    """Runs `heliostat model serve models:/tiny@champion`, with two versions of different weights. Version 1 is the champion."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.store = folder, f"sqlite:///{folder}/mlflow.db"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = mlflow.MlflowClient(tracking_uri=self.store, registry_uri=self.store)
        self._register()
        keys = folder / "keys"
        keys.write_text(f"alice {KEY}\nbob {OTHER}\n")
        keys.chmod(0o600)
        command = [
            "model",
            "serve",
            f"models:/{NAME}@champion",
            "--mlflow",
            self.store,
            "--port",
            str(self.port),
            "--keys",
            str(keys),
        ]
        self.process, self.log = started(folder, "is served at", *command, "--poll", "0.5", *options)

    def _register(self) -> None:
        made = write_model(self.folder, BASE["model"], 512)
        tokenizer = transformers.AutoTokenizer.from_pretrained(made)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(made)
        self.client.create_registered_model(NAME)
        for number in (1, 2):
            place = self.folder / f"version-{number}" / "artifacts" / "model"
            shutil.copytree(made, place)
            if number == 2:
                model = transformers.AutoModelForCausalLM.from_pretrained(made)
                with torch.no_grad():
                    model.lm_head.weight.mul_(-1)
                model.save_pretrained(place)
            self.client.create_model_version(NAME, source=str(place.parents[1]))
        self.move(1)

    def move(self, version: int) -> None:
        self.client.set_registered_model_alias(NAME, "champion", str(version))

    def until(self, condition, seconds: float = 120.0):
        return until(condition, "such an endpoint", seconds, lambda: self.process.poll() is None, self.log.read_text)

    def processes(self) -> list[psutil.Process]:
        return family(self.process)

    def replicas(self, version: int) -> list[psutil.Process]:
        """Returns the processes of a version's replicas."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{NAME}-{version}:" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> int:
        return stopped(self.process)


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Endpoint]:
    endpoint = Endpoint(folder, *options)
    try:
        yield endpoint
    finally:
        endpoint.stop()
