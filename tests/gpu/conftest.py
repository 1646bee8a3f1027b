"""Imports the integration tests' fixtures, because the GPU tests run their jobs."""

from tests.integration.conftest import corpus, job_file, ray_session, tracking

__all__ = ["corpus", "job_file", "ray_session", "tracking"]
