"""A real endpoint for tests and benchmarks: the command in a process of its own, and a registry whose alias can be moved."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import torch
import transformers
from heliostat.cluster.processes import free_port

from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model

NAME, KEY, OTHER = "tiny", "sk-a-key-of-the-tests", "sk-another-key-of-them"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


class Running:
    """A command of heliostat in a process of its own, with no Ray to join; FOLDER/log has what it prints."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder, self.log = folder, folder / "log"
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        words = [sys.executable, "-m", "heliostat", *command]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)

    def said(self, words: str, seconds: float = 300.0) -> str:
        """Waits until the command has printed some words; returns all that it has printed."""
        self.until(lambda: words in self.log.read_text(), seconds)
        return self.log.read_text()

    def until(self, what, seconds: float = 120.0):
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        return found

    def processes(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self) -> int:
        """Asks the command to stop; returns its exit code, when none of its processes is left."""
        left = self.processes() if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(90)
            assert not [p for p in psutil.wait_procs(left, timeout=20)[1] if p.status() != psutil.STATUS_ZOMBIE]
        finally:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        return code


class Endpoint(Running):
    """`heliostat serve models:/tiny@champion`, of two versions with different weights; version 1 is the champion."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.store = folder, f"sqlite:///{folder}/mlflow.db"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = mlflow.MlflowClient(tracking_uri=self.store, registry_uri=self.store)
        self._register()
        keys = folder / "keys"
        keys.write_text(f"alice {KEY}\nbob {OTHER}\n")
        keys.chmod(0o600)
        command = ["serve", f"models:/{NAME}@champion", "--mlflow", self.store]
        super().__init__(folder, *command, "--port", str(self.port), "--keys", str(keys), "--poll", "0.5", *options)

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

    def replicas(self, version: int) -> list[psutil.Process]:
        """The processes of a version's replicas."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{NAME}-{version}:" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Endpoint]:
    endpoint = Endpoint(folder, *options)
    try:
        endpoint.said("is served at")
        yield endpoint
    finally:
        endpoint.stop()
