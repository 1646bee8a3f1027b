"""The GPU tests run the integration tests' jobs."""

from tests.integration.conftest import corpus, job_file, ray_session, tracking

__all__ = ["corpus", "job_file", "ray_session", "tracking"]
