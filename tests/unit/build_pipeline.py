"""Makes complete datasets for tests in this process, without Ray."""

from heliostat.curation.prepare import place
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.data import manifest, versions
from heliostat.data.manifest import Manifest
from heliostat.tasks.clusters import Cluster
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow


class Here(TextPipeline):
    """Runs tasks in this process."""

    def flow(self, work: Work | None = None, cluster: Cluster | None = None) -> HereFlow:
        return HereFlow(work or self.worked, again=0)


def make_dataset(pipeline: Here) -> Manifest:
    """Makes the pipeline's dataset like `prepare`."""
    output, inputs = place(pipeline.output, "output"), pipeline.inputs()
    pipeline._written_by = pipeline.written_by(inputs)
    made = manifest.write(output, *pipeline.write(output, inputs))
    versions.publish(output, made)
    pipeline.finish(made)
    return manifest.read(output)
