"""Tests that each patch of DeepSpeed takes effect."""

from __future__ import annotations

import contextlib
import inspect
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.data import device_ranges
from heliostat.engine import patches, stream_patches

PREPARED = """
import sys
from heliostat.engine import deepspeed_engine, patches
deepspeed_engine.prepare_environment(0)
import deepspeed
from deepspeed.autotuning import autotuner
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import numa
assert "mlflow" not in sys.modules and not autotuner.has_mlflow
assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules and "torch._dynamo" not in sys.modules
assert hasattr(numa.get_numa_cores, "cache_info")
assert bf16_optimizer.see_memory_usage is patches._nothing
assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
once = numa.get_numa_cores
deepspeed_engine.prepare_environment(0)
assert numa.get_numa_cores is once
"""


def test_a_worker_is_prepared_without_mlflow_a_compiler_and_programs():
    """By `import_without_mlflow`, `import_muon_without_compiler`, `cache_numa_cores`, `silence_memory_reports`, and
    `skip_shared_memory_kernel`."""
    done = subprocess.run([sys.executable, "-c", PREPARED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns DeepSpeed's module of groups, and restores it afterwards."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    patches.import_without_mlflow()
    from deepspeed.utils import groups

    for name in ("mpu", "_create_zero_param_parallel_group", "_ZERO_PARAM_INTRA_PARALLEL_GROUP"):
        monkeypatch.setattr(groups, name, getattr(groups, name))
    return groups


def test_the_group_of_second_copies_is_made_once(groups, monkeypatch):
    made = []

    def make(workers: int) -> None:
        made.append(workers)
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = "group"

    monkeypatch.setattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None)
    monkeypatch.setattr(groups, "_create_zero_param_parallel_group", make)
    for _ in range(2):
        patches.share_second_copies()
        groups._create_zero_param_parallel_group(2)
    assert made == [2]


def test_an_engine_takes_its_own_groups_and_none_of_an_attempt_before(groups):
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    patches.set_model_parallel_unit("ours")
    assert groups.mpu == "ours"
    comm.cdb, Init.param_id, counter = "backend", 7, DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0]
    counter[0] = 9
    patches.forget_groups()
    patches.restart_numbering()
    assert (groups.mpu, comm.cdb, Init.param_id, counter[0]) == (None, None, 0, 0)


def test_experts_are_divided_within_groups_that_deepspeed_forms(groups, monkeypatch):
    formed = []
    monkeypatch.setattr(groups, "_create_expert_and_data_parallel", formed.append)
    monkeypatch.setattr(groups, "_get_expert_parallel_group", lambda name: f"{name} across")
    monkeypatch.setattr(groups, "_get_expert_data_parallel_group", lambda name: f"{name} alike")
    assert patches.expert_groups("ep_size_2", 2) == ("ep_size_2 across", "ep_size_2 alike") and formed == [2]
    from deepspeed.runtime.zero import partition_parameters, stage3

    p: Any = torch.nn.Parameter(torch.ones(2))
    divided: list[Any] = []
    whole = SimpleNamespace(convert_to_zero_parameters=lambda param_list: divided.extend(param_list))
    patches.place_expert(p, whole, "ep_size_2", "group")
    assert divided == [p]
    read = inspect.getsource(stage3) + inspect.getsource(partition_parameters)  # the marks, by name
    assert len(vars(p)) == 3 and all(f'"{mark}"' in read for mark in vars(p))


def test_models_are_partitioned_within_a_group_while_they_are_built(groups, monkeypatch):
    from deepspeed.runtime.zero.partition_parameters import Init

    given: list[Any] = []
    monkeypatch.setattr(Init, "__init__", lambda self, **named: given.append(named))
    plain = Init.__init__
    with pytest.raises(RuntimeError), patches.partition_within("group"):
        Init(config_dict_or_path={})
        raise RuntimeError
    assert given == [{"data_parallel_group": "group", "config_dict_or_path": {}}] and Init.__init__ is plain


def test_what_keeps_a_destroyed_engine_is_emptied(groups):
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.append(torch.nn.Linear(1, 1))
    patches.release_modules()
    assert parameter_offload.FWD_MODULE_STACK == []


def test_the_linear_of_stage_3_ends_with_its_engine(groups, monkeypatch):
    """It rounds gradients differently, so a run of another stage in the same process would have other bits."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from heliostat.engine import deepspeed_engine

    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    deepspeed_engine.destroy_engines()
    assert torch.nn.functional.linear is plain is not zero3_linear_wrap


def test_the_reduction_of_gradients_is_named_while_a_profile_runs(groups, monkeypatch):
    from deepspeed.runtime import engine

    names: list[str] = []
    monkeypatch.setattr(engine.DeepSpeedEngine, "allreduce_gradients", lambda self, bucket_size: names.append(str(bucket_size)))
    monkeypatch.setattr(device_ranges, "named", lambda name: names.append(name) or contextlib.nullcontext())
    stream_patches.name_reduction()
    stream_patches.name_reduction()
    engine.DeepSpeedEngine.allreduce_gradients(object(), bucket_size=7)
    assert names == ["reduce", "7"]


def test_the_first_batch_is_not_sent_again():
    removed = []
    engine = SimpleNamespace(first_dataloader_check=SimpleNamespace(remove=lambda: removed.append(True)))
    patches.stop_input_check(engine)
    patches.stop_input_check(engine)
    assert removed == [True] and engine.first_dataloader_check is None


def test_the_optimizer_of_stage_3_has_what_the_average_over_groups_asks_of_it(groups):
    """test_state_group.py tests what `patches.before_step` does with it."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    assert all(callable(getattr(Zero, name)) for name in ("step", "has_overflow", "_get_norm_groups"))


def test_matrices_are_divided_by_the_marks_that_autotp_reads_and_leaves(groups):
    """test_tensor_parallel.py trains with `patches.divide_matrices`. This test checks its requirements."""
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.runtime import engine

    assert callable(AutoTP._replace_module) and callable(AutoTP.register_replicated_grad_hooks)
    assert callable(groups._init_tp_mesh_device) and "ds_autotp_parsed" in inspect.getsource(engine)
    marks = {"replicated": False, "logical_shape": [4, 6], "partition_dim": 1, "partition_sizes": [3, 3]}
    p: Any = torch.nn.Parameter(torch.ones(4, 3))
    assert patches.matrix_part(p) is None
    setattr(p, DS_AUTOTP_UC_META, marks)
    assert patches.matrix_part(p) == ((4, 6), 1, (3, 3))
    marks["replicated"] = True
    assert patches.matrix_part(p) is None


class OnDevice(torch.Tensor):
    """Simulates a tensor of a device that must not be waited for, so its value must not be read."""

    def __bool__(self) -> bool:
        raise AssertionError("the host waits for the device")

    __float__ = item = tolist = cpu = __bool__  # type: ignore[assignment]


@pytest.fixture
def optimizers(groups: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns DeepSpeed's modules of optimizers, and restores them afterwards."""
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, utils, stage3, stage_1_and_2):
        for name in ("is_invalid_grad_norm", "mask_nan_or_inf_with_val_inplace", "clip_tensors_by_global_norm"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    return SimpleNamespace(bf16=bf16_optimizer, zero=stage_1_and_2, stage3=stage3)


@pytest.mark.parametrize("norm", [0.5, 7.0, math.inf])
def test_gradients_are_clipped_on_the_device_by_the_same_factor(optimizers, norm):
    from deepspeed.runtime.utils import clip_tensors_by_global_norm

    zero = SimpleNamespace(clip_grad=1.0, loss_scale=1.0, device="cpu")
    gradient = torch.tensor([3.0, -1e-7, 0.1])
    clips = {
        "zero": lambda given, norm: optimizers.zero.DeepSpeedZeroOptimizer.unscale_and_clip_grads(zero, [given], norm),
        "bf16": lambda given, norm: optimizers.bf16.clip_tensors_by_global_norm([given], max_norm=1.0, global_norm=norm),
    }
    expected = {"zero": gradient.clone(), "bf16": gradient.clone()}
    patches.read_norms(True)
    clips["zero"](expected["zero"], torch.tensor(norm))
    clip_tensors_by_global_norm([expected["bf16"]], max_norm=1.0, global_norm=torch.tensor(norm))
    patches.read_norms(False)
    for name, clip in clips.items():
        mine = gradient.clone()
        clip(mine, torch.tensor(norm).as_subclass(OnDevice))
        assert torch.equal(mine, expected[name])


def test_norms_are_looked_at_before_the_step_for_a_loss_scale_alone(optimizers):
    bad = torch.tensor(math.nan)
    for at_once in (False, True, False):
        patches.read_norms(at_once)
        for module in vars(optimizers).values():
            assert bool(module.is_invalid_grad_norm(bad)) is at_once


@pytest.mark.parametrize("norm", [0.5, math.inf, -math.inf, math.nan])
def test_norms_that_are_not_finite_are_marked_as_deepspeed_marks_them(optimizers, norm):
    from deepspeed.runtime import utils

    theirs, mine = torch.tensor(norm), torch.tensor(norm)
    utils.mask_nan_or_inf_with_val_inplace(theirs, device=theirs.device)
    patches.read_norms(False)
    for module in (utils, optimizers.zero, optimizers.stage3):
        module.mask_nan_or_inf_with_val_inplace(mine, device=mine.device)
        assert torch.equal(mine, theirs)
