"""Sets up the workers' rendezvous: a file in the session's folder on a private Ray, a TCP port of the first worker elsewhere.

Whoever reaches that port can, without a token, write what the workers read and pose as one of them: on a machine with other users
even if it listens on loopback. The workers of a private Ray are all on one machine, so a file, which nobody else can open, is
enough.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


def config(gpus: float) -> TorchConfig:
    """Returns Ray Train's process group configuration for the Ray that this process is connected to."""
    backend = "nccl" if gpus else "gloo"
    if os.environ.get("RAY_ADDRESS"):
        return TorchConfig(backend=backend)
    session: Any = ray._private.worker._global_node
    return ByFile(backend=backend, folder=session.get_session_dir_path())


@dataclass
class ByFile(TorchConfig):
    folder: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        place = Path(backend_config.folder) / f"group-{uuid.uuid4().hex}"  # an earlier group's would be taken for this one's
        worker_group.execute(_set_torch_distributed_env_vars)
        setting_up = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=f"file://{place}",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(setting_up)
