"""Tests that all code for private parts of DeepSpeed is in one module, is guarded by DeepSpeed's version, and takes effect."""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.data import device_ranges
from heliostat.engine import patches, stream_patches
from heliostat.errors import ConfigError

from docs.site import rooms

NAMED = ".".join(map(str, patches.VERSION))
BY_NAME = {patch.__name__: patch for patch in patches.PATCHES}
HOME = rooms.PACKAGE / "engine" / "patches.py"
HOMES = {HOME, HOME.with_name("zero_state.py")}
OF_TORCH = {"_foreach_lerp_", "_abort_process_group", "_buffers", "_non_persistent_buffers_set", "_asdict", "_replace"}


# the guard -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_every_patch_names_its_version_and_what_fails_without_it(name):
    text = inspect.getdoc(BY_NAME[name]) or ""
    assert f"DeepSpeed {NAMED}" in text and "Without it " in text


def test_every_function_that_is_called_from_elsewhere_is_a_patch_or_the_guard():
    public = {node.name for node in ast.parse(HOME.read_text()).body if isinstance(node, ast.FunctionDef) if node.name[0] != "_"}
    assert public - BY_NAME.keys() == {"installed", "require_version", "guard"}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_patch_is_named_by_a_test_of_what_it_does(name):
    assert any(re.search(rf"patches\.{name}\b|`{name}`", path.read_text()) for path in rooms.ROOT.glob("tests/*/test_*.py"))


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
    patches.stop_input_check(SimpleNamespace(first_dataloader_check=None))


def test_a_part_that_is_missing_is_one_error_which_names_the_patch():
    with pytest.raises(
        ConfigError, match=r"^deepspeed: \S+ doesn't support heliostat's stop_input_check \(.*_check.*\)\. Run: pip"
    ):
        patches.stop_input_check(SimpleNamespace())


def test_a_name_that_is_gone_is_not_set(monkeypatch):
    """A version that has renamed it would continue as if nothing had been replaced."""
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deepspeed.utils.groups", SimpleNamespace())
    with pytest.raises(ConfigError, match="set_model_parallel_unit"):
        patches.set_model_parallel_unit(None)


# nothing elsewhere ---------------------------------------------------------------------------------------------------


def reaches(text: str) -> list[str]:
    """Lists private names of other objects, and assignments to imports from DeepSpeed."""
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
    assert (reaches(path.read_text()) == []) is (path not in HOMES)


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


# the order of streams ------------------------------------------------------------------------------------------------


class Stream:
    """Simulates a stream, and records its calls."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"the host waits for {self.name}")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    noted: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("training", noted))
    return noted


def _zero_2(log: list[str], **changes: Any) -> Any:
    """Returns an optimizer of ZeRO-1 or 2 with an epilogue like DeepSpeed's."""
    zero = SimpleNamespace(overlap_comm=True, contiguous_gradients=True, cpu_offload=False, reduction_stream=Stream("sums", log))
    zero.reduce_ipg_grads = lambda: log.append("reduce")
    zero.independent_gradient_partition_epilogue = lambda: (
        zero.reduce_ipg_grads(),
        log.append("the host waits" if zero.overlap_comm else "sum up"),
    )
    vars(zero).update(changes)
    stream_patches.order_reductions(zero)
    return zero


def test_after_a_backward_pass_training_waits_for_the_sums_and_the_host_does_not(log):
    zero = _zero_2(log)
    for _ in range(2):
        zero.independent_gradient_partition_epilogue()
    assert log == ["reduce", "training waits for sums", "sum up"] * 2 and zero.overlap_comm


@pytest.mark.parametrize("changes", [{"cpu_offload": True}, {"contiguous_gradients": False}])
def test_the_host_waits_where_it_reads_the_sums_or_frees_gradients(changes, log):
    _zero_2(log, **changes).independent_gradient_partition_epilogue()
    assert log == ["reduce", "the host waits"]


@pytest.mark.parametrize(("offload", "right"), [(False, "training waits for sums"), (True, "the host waits for sums")])
def test_at_stage_3_the_host_waits_for_the_sums_only_if_it_reads_them(offload, right, log):
    zero = SimpleNamespace(reduce_and_partition_stream=Stream("sums", log), offload_optimizer=offload)
    stream_patches.order_reductions(zero)
    zero.reduce_and_partition_stream.synchronize()
    assert log == [right]


def test_gathers_wait_for_the_weights_that_a_step_writes(log):
    offload = SimpleNamespace(**{"_DeepSpeedZeRoOffload__allgather_stream": Stream("gathers", log)})
    zero = SimpleNamespace(parameter_offload=offload, step=lambda: log.append("step"))
    stream_patches.order_gathers(zero)
    zero.step()
    assert log == ["step", "gathers waits for training"]


def test_gathers_wait_for_the_weights_of_a_restore_and_on_a_cpu_for_nothing(log):
    for gathering in (Stream("gathers", log), None):
        offload = SimpleNamespace(**{"_DeepSpeedZeRoOffload__allgather_stream": gathering})
        stream_patches.gathers_wait(SimpleNamespace(parameter_offload=offload))
    assert log == ["gathers waits for training"]
