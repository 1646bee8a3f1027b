"""Whatever reaches into private parts of DeepSpeed is in one module, is guarded by DeepSpeed's version, and has its effect."""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.data import device_ranges
from heliostat.engine import patches
from heliostat.errors import ConfigError

from docs.site import rooms

NAMED = ".".join(map(str, patches.VERSION))
BY_NAME = {patch.__name__: patch for patch in patches.PATCHES}
HOME = rooms.PACKAGE / "engine" / "patches.py"
OF_TORCH = {"_foreach_lerp_", "_abort_process_group", "_buffers", "_non_persistent_buffers_set", "_asdict", "_replace"}


# the guard -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_every_patch_names_its_version_and_what_fails_without_it(name):
    text = inspect.getdoc(BY_NAME[name]) or ""
    assert f"DeepSpeed {NAMED}" in text and "Without it " in text


def test_every_function_that_is_called_from_elsewhere_is_a_patch_or_the_guard():
    public = {node.name for node in ast.parse(HOME.read_text()).body if isinstance(node, ast.FunctionDef) if node.name[0] != "_"}
    assert public - BY_NAME.keys() == {"installed", "require_version"}


def test_the_version_is_that_which_is_pinned():
    needed = tomllib.loads((rooms.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"deepspeed~={NAMED}" in needed


@pytest.mark.parametrize("version", ["0.19.7", "0.18.20", "0.20.0", "1.19.8", "0.20"])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_patch_touches_nothing_of_another_version(name, version, monkeypatch):
    monkeypatch.setattr(patches, "installed", lambda: version)
    with pytest.raises(ConfigError) as e:
        BY_NAME[name](*[None for _ in inspect.signature(BY_NAME[name]).parameters])
    assert str(e.value) == (
        f"deepspeed: heliostat doesn't support this version ({version}). Run: pip install 'deepspeed~={NAMED}'"
    )


@pytest.mark.parametrize("version", ["0.19.8", "0.19.12", "0.19.8+unknown", None])
def test_versions_of_the_pinned_series_are_taken(version, monkeypatch):
    monkeypatch.setattr(patches, "installed", lambda: version)
    assert patches.fragment(SimpleNamespace(_hp_mapping="slice")) == "slice"


def test_a_part_that_is_missing_is_one_error_which_names_the_patch():
    with pytest.raises(ConfigError, match=r"^deepspeed: \S+ doesn't fit heliostat's fragment \(.*_hp_mapping.*\)\. Run: pip"):
        patches.fragment(SimpleNamespace())


def test_a_name_that_is_gone_is_not_set(monkeypatch):
    """A version that has renamed it would go on as if nothing had been replaced."""
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deepspeed.utils.groups", SimpleNamespace())
    with pytest.raises(ConfigError, match="set_model_parallel_unit"):
        patches.set_model_parallel_unit(None)


# nothing elsewhere ---------------------------------------------------------------------------------------------------


def reaches(text: str) -> list[str]:
    """Lists private names of other objects, and assignments to what is imported from DeepSpeed."""
    tree, found, theirs = ast.parse(text), list[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            theirs |= {alias.asname or alias.name for alias in node.names}
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Import):
            theirs |= {alias.asname or "deepspeed" for alias in node.names if alias.name.split(".")[0] == "deepspeed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root: ast.expr = node
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            base = root.id if isinstance(root, ast.Name) else ""
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.attr not in OF_TORCH and base not in ("self", "cls"):
                found.append(node.attr)
            if base in theirs and not isinstance(node.ctx, ast.Load):
                found.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "importlib.reload"):
            found += [ast.unparse(node)] if ast.unparse(node.args[0]) in theirs else []
    return found


@pytest.mark.parametrize(
    "line",
    [
        "zero._partition_all_parameters()",
        "from deepspeed.utils import groups\ngroups.mpu = None",
        "import deepspeed.comm.comm as communication\ncommunication.cdb = None",
        "from deepspeed.utils import groups\nimportlib.reload(groups)",
        "from deepspeed.runtime.zero.partition_parameters import Init\nInit.__init__ = None",
        "from deepspeed.runtime.utils import _private",
    ],
)
def test_every_reach_is_seen(line):
    assert reaches(line)


@pytest.mark.parametrize("path", sorted((rooms.PACKAGE / "engine").glob("*.py")), ids=lambda path: path.stem)
def test_no_other_module_of_the_engine_reaches_into_deepspeed(path: Path):
    assert (reaches(path.read_text()) == []) is (path != HOME)


# what each does ------------------------------------------------------------------------------------------------------

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
    done = subprocess.run([sys.executable, "-c", PREPARED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed's module of groups, as it was again afterwards."""
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
    patches.place_expert(p, "ep_size_2", "group")
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


def test_the_reduction_of_gradients_is_named_while_a_profile_runs(groups, monkeypatch):
    from deepspeed.runtime import engine

    names: list[str] = []
    monkeypatch.setattr(engine.DeepSpeedEngine, "allreduce_gradients", lambda self, bucket_size: names.append(str(bucket_size)))
    monkeypatch.setattr(device_ranges, "named", lambda name: names.append(name) or contextlib.nullcontext())
    patches.name_reduction()
    patches.name_reduction()
    engine.DeepSpeedEngine.allreduce_gradients(object(), bucket_size=7)
    assert names == ["reduce", "7"]


def test_the_first_batch_is_not_sent_again():
    removed = []
    engine = SimpleNamespace(first_dataloader_check=SimpleNamespace(remove=lambda: removed.append(True)))
    patches.stop_input_check(engine)
    patches.stop_input_check(engine)
    assert removed == [True] and engine.first_dataloader_check is None


def test_the_optimizer_of_stage_3_has_what_is_asked_of_it(groups):
    """`zero_state` and `StateGroup` ask it for these; test_state_group.py and the tests of checkpoints have what they do."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    for name in ("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters", "_get_norm_groups"):
        assert callable(getattr(Zero, name))
    taken = inspect.signature(Zero._get_fp32_opt_state_partition).parameters
    assert {"param", "release_swap_buffers", "optim_state_key"} <= taken.keys()
    assert callable(Zero.step) and callable(Zero.has_overflow)


def test_weights_are_taken_from_the_partitions_again_and_second_copies_are_dropped():
    asked: list[Any] = []
    zero = SimpleNamespace(
        fp16_groups=[1, 2],
        _reassign_or_swap_out_partitioned_parameters=asked.append,
        _partition_all_parameters=lambda: asked.append("all"),
        _get_fp32_opt_state_partition=lambda p, release_swap_buffers, optim_state_key: (optim_state_key, 0),
    )
    p = SimpleNamespace(ds_secondary_tensor="before")
    patches.partition_parameters(zero)
    patches.reassign_parameters(zero, [p])
    assert asked == ["all", 0, 1] and p.ds_secondary_tensor is None
    assert patches.partition_state(zero, p, "exp_avg") == "exp_avg"


class OnDevice(torch.Tensor):
    """A tensor of a device that must not be waited for: nothing reads its value."""

    def __bool__(self) -> bool:
        raise AssertionError("the host waits for the device")

    __float__ = item = tolist = cpu = __bool__  # type: ignore[assignment]


@pytest.fixture
def optimizers(groups: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed's modules of optimizers, as they were again afterwards."""
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
