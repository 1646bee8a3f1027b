"""Tests that `train.deepspeed` accepts only keys for speed and memory. DeepSpeed's other keys have a key in the job file."""

import pytest
from heliostat.config import deepspeed_keys
from heliostat.config.deepspeed_keys import INSTEAD, Allowed
from heliostat.engine.engine_config import engine_config
from heliostat.errors import ConfigError
from heliostat.schema import Strict
from heliostat.validation import check

from tests.unit.build_job import job


def faults(given: dict, **changes) -> list[str]:
    return deepspeed_keys.faults(job(**{"train.deepspeed": given, **changes}))


def nested(key: str, value: object) -> dict:
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


@pytest.mark.parametrize("key", sorted(INSTEAD))
def test_a_key_that_would_be_a_second_word_on_the_job_is_refused_with_the_key_that_does_it(key):
    """The error has one line with the key and its replacement."""
    changes = {"train.precision": "fp16", "workers.gpus": 1} if key.startswith("fp16") else {}
    changes |= {"train.zero.stage": 3, "train.zero.offload.param": "cpu", "train.zero.offload.optimizer": "cpu"}
    assert faults(nested(key, 2), **changes) == [f"train.deepspeed.{key}: not supported. {INSTEAD[key]}"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"sequence_paralel_size": 2}, "train.deepspeed.sequence_paralel_size: unknown key"),
        ({"zero_optimization": {"reduce_bucket": 5}},
         "train.deepspeed.zero_optimization.reduce_bucket: unknown key. Did you mean 'reduce_bucket_size'?"),
        ({"zero_optimization": {"reduce_bucket_size": 0}},
         "train.deepspeed.zero_optimization.reduce_bucket_size: 0 is too small. Use a number above 0"),
        ({"zero_optimization": {"overlap_comm": "yes"}},
         "train.deepspeed.zero_optimization.overlap_comm: expected true or false, got 'yes'"),
        ({"zero_optimization": 3}, "train.deepspeed.zero_optimization: expected a mapping, got 3"),
        ({"fp16": {"initial_scale_power": 8}}, "train.deepspeed.fp16: has no effect without train.precision fp16"),
        ({"zero_optimization": {"offload_param": {"buffer_count": 2}}},
         "train.deepspeed.zero_optimization.offload_param: has no effect without train.zero.offload.param"),
    ],
)  # fmt: skip
def test_an_unknown_or_wrong_or_idle_key_is_refused(given, line):
    """Each error is one line with the key and the value."""
    (found,) = faults(given)
    assert found.startswith(line)


@pytest.mark.parametrize("settings", ["DeepSpeedBF16Config", "DeepSpeedFP16Config"])
def test_every_key_of_deepspeed_that_stores_state_in_16_bits_is_rejected_with_the_reason(settings):
    """Looks in DeepSpeed's own classes, so that a key of a newer version is not forgotten."""
    from deepspeed.runtime import precision_config

    names = [n for n in getattr(precision_config, settings).model_fields if "master" in n or "optimizer_state" in n]
    assert names
    for name in names:
        for section in {"DeepSpeedBF16Config": ("bf16", "bfloat16"), "DeepSpeedFP16Config": ("fp16",)}[settings]:
            with pytest.raises(ConfigError) as e:
                check.check_job(job(**{"train.deepspeed": {section: {"enabled": True, name: True}}}))
            lines = [line.strip() for line in str(e.value).splitlines()]
            own = [line for line in lines if line.startswith(f"train.deepspeed.{section}.{name}: not supported.")]
            assert len(own) == 1 and "always fp32, because 16 bits round small updates away" in own[0]
            assert not any(line.startswith(f"train.deepspeed.{section}: not") for line in lines), "one error says it all"


def test_the_check_refuses_them_before_anything_starts():
    """The check reports all of them at once."""
    with pytest.raises(ConfigError) as e:
        check.check_job(job(**{"train.deepspeed": {"gradient_accumulation_steps": 1, "tensor_parallel": {"autotp_size": 2}}}))
    first, second = str(e.value).splitlines()
    assert first.startswith(
        "train.deepspeed.gradient_accumulation_steps: not supported. This number follows from train.global_batch_size"
    )
    assert second.strip().startswith("train.deepspeed.tensor_parallel: not supported. Use train.parallel.tensor")


def test_what_is_allowed_reaches_deepspeed_as_given():
    """DeepSpeed gets only keys that the job sets: the defaults here only document DeepSpeed's."""
    given = {"zero_optimization": {"reduce_bucket_size": 7}, "communication_data_type": "fp32"}
    assert faults(given) == []
    made = engine_config(job(**{"train.deepspeed": given}))
    assert made["zero_optimization"]["reduce_bucket_size"] == 7 and made["communication_data_type"] == "fp32"
    assert "fp16" not in made and "sub_group_size" not in made["zero_optimization"]


def test_the_documented_defaults_are_deepspeeds():
    """This test finds a key that a new version of DeepSpeed drops, renames, or sets differently."""
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    def values(model: type[Strict]) -> dict:
        return {k: v for k, v in model().model_dump().items() if not isinstance(v, dict)}

    zeros = DeepSpeedZeroConfig(stage=1).model_dump(by_alias=True)
    for name, value in values(deepspeed_keys.ZeroKeys).items():
        assert name in zeros and (zeros[name] == value or value == 1 << 62), name
    for mine, theirs in [
        (deepspeed_keys.Fp16, DeepSpeedFP16Config().model_dump()),
        (deepspeed_keys.OffloadOptimizer, DeepSpeedZeroOffloadOptimizerConfig().model_dump()),
        (deepspeed_keys.OffloadParam, DeepSpeedZeroOffloadParamConfig().model_dump()),
        (deepspeed_keys.Aio, get_aio_config({"aio": {}})),
    ]:
        for name, value in values(mine).items():
            assert theirs[name] == value, name
    assert set(Allowed.model_fields) == {"zero_optimization", "fp16", "aio", "communication_data_type"}
