"""Extends Ray's fake multi-node provider with a folder for each node. In a shared folder, a node that unpacks a job's working
directory removes that of the others."""

import os
import tempfile
from functools import partial
from typing import Any
from unittest import mock

import ray._private.parameter
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class NodesApart(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        apart = partial(RayParams, temp_dir=tempfile.mkdtemp(dir=os.environ["HELIOSTAT_NODES"]))
        with mock.patch.object(ray._private.parameter, "RayParams", apart):
            super()._create_node_with_resources_and_labels(*arguments)
