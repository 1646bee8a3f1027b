"""Tests that bf16 becomes fp32 only on a CPU without instructions for it."""

import logging

import pytest
from heliostat.validation.check import computable, cpu_flags

from tests.unit.build_job import job


@pytest.mark.parametrize("flags", [{"avx2", "fma"}, {"sse4_2"}])
def test_bf16_is_rerouted_with_a_warning_where_it_would_crawl(flags, caplog):
    made = job(**{"train.precision": "bf16"})
    with caplog.at_level(logging.WARNING):
        found = computable(made, flags)
    assert found.train.precision == "fp32" and found.model_copy(update={"train": made.train}) == made
    assert caplog.messages == [
        "train.precision: this CPU has no bf16 instructions, so heliostat computes in fp32, which is much faster here"
    ]


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"train.precision": "bf16"}, {"avx2", "avx512bw"}),
        ({"train.precision": "bf16"}, {"asimd", "bf16"}),
        ({"train.precision": "bf16"}, set()),  # a system that does not tell
        ({"train.precision": "bf16", "workers.gpus": 1}, {"avx2"}),
        ({"train.precision": "fp32"}, {"avx2"}),
    ],
)
def test_all_else_stays_as_it_is(changes, flags, caplog):
    made = job(**changes)
    assert computable(made, flags) is made and not caplog.messages


def test_linux_tells_what_its_cpu_can_do():
    assert not cpu_flags() or {"fpu", "asimd", "fp"} & cpu_flags()
