"""Runs the process from which commands, their fork servers, and groups of ranks are forked. It imports their common modules
once."""

from __future__ import annotations

from heliostat.cluster import private_ray

from tests.fork_server import ForkServer

DRIVERS = (
    "heliostat.cli.main", "heliostat.training.run", "heliostat.training.driver.attempt", "heliostat.training.driver.memory",
    "heliostat.training.driver.progress", "heliostat.training.driver.pool", "heliostat.cluster.connect",
    "heliostat.cluster.nodes",
    "heliostat.inference.export", "heliostat.inference.batch.run", "heliostat.tracking.logger", "heliostat.tracking.models",
    "heliostat.tracking.report.page", "heliostat.tracking.report.curation", "heliostat.tune.driver", "heliostat.tune.trial",
    "heliostat.tasks.flow", "heliostat.curation.text", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store", "matplotlib.figure", "matplotlib.backends.backend_agg", "ray.data",
    "transformers.generation", "transformers.models.auto.modeling_auto",
)  # fmt: skip
RANKS = (
    "pytest", "boto3", "safetensors.torch", "heliostat.training.worker.build", "heliostat.training.worker.preload",
    "heliostat.recipes.text.causal_lm", "heliostat.recipes.images.text_to_image", "peft",
    "transformers.models.llama.modeling_llama", "transformers.integrations.deepspeed", "diffusers.models.unets",
    "diffusers.models.transformers",
)  # fmt: skip
OF_RANKS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}


class Forks(ForkServer):
    """Starts with a fork server's environment, because Ray's library and malloc read it at the start."""

    def at_start(self) -> dict[str, str]:
        return {**private_ray.environment(0), **private_ray.OF_FORKS, **self.environment}


SERVER = Forks((*RANKS, *DRIVERS), OF_RANKS)
