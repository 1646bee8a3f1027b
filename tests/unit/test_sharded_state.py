"""Tests that one module owns the sharded state, that only `zero_state` knows its place in DeepSpeed, and that another backend is
one class."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.engine import patches, sharded_state, zero_state
from heliostat.engine.sharded_state import MASTER, ShardedState, SlicePlace
from heliostat.errors import ConfigError, TrainingError

from docs.site import rooms

KINDS = (zero_state.Replicated, zero_state.Partitioned, zero_state.SummedApart, zero_state.Divided)


# another backend -----------------------------------------------------------------------------------------------------


class Backend(ShardedState):
    """Keeps the elements [3, end) of each of two parameters in one flat tensor, like the second of two workers."""

    loss_scale, steps = 1.0, 0

    def __init__(self, module: torch.nn.Module, **places: tuple[int, int]) -> None:
        self.names = {p: name for name, p in module.named_parameters()}
        super().__init__(module, {p: ("exp_avg", "z") for p in self.names if p.requires_grad}, {"z"})
        kept = [p.detach().view(-1)[3:].clone() for p in self.moments]
        self.flat = torch.cat(kept).requires_grad_()
        self.begins = dict(zip(self.moments, [0, len(kept[0])], strict=True))
        self.optimizer: Any = SimpleNamespace(state={}, defaults={})
        for name, place in places.items():
            setattr(self, name, place)

    def groups(self) -> Any:
        return [(self.flat, list(self.moments))]

    def place(self, p: torch.nn.Parameter) -> SlicePlace:
        return SlicePlace(self.flat, self.begins[p], p.numel() - 3, 3)

    def original(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        return (self.optimizer.state[self.flat][key] if key else self.flat).detach()[self.begins[p] :]

    def weights(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, int] | None:
        return p.detach().view(-1), 0

    def refresh(self) -> None:
        for p in self.moments:
            p.data.view(-1)[3:] = self.original(p, None)[: p.numel() - 3]

    def full(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        raise NotImplementedError

    full_gradient = read_loss_scale = write_loss_scale = full  # type: ignore[assignment]


class Copied(Backend):
    """Reads from other memory than that of its views, as after a `.to(device)` on a GPU."""

    def original(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        return super().original(p, key).clone()


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, affine=False))
    made.register_buffer("scratch", torch.zeros(1), persistent=False)
    made.frozen = torch.nn.Parameter(torch.arange(6.0), requires_grad=False)
    return made


def test_views_have_names_and_what_is_written_into_them_is_in_the_optimizer_and_the_forward_pass():
    backend = Backend(model())
    backend.prepare()
    views = backend.tensors(whole=True)
    assert list(views)[:6] == [f"{kind}.0.{p}" for p in ("weight", "bias") for kind in (MASTER, "exp_avg", "z")]
    assert {n for n in views if n.startswith("buffer.")} == {f"buffer.1.{n}" for n in backend.module[1].state_dict()}
    weight: Any = views["master.0.weight"]
    assert (weight.start, weight.shape[0], weight.local.numel()) == (3, 12, 9)
    weight.local.fill_(7)
    backend.after_load(5)
    assert backend.module[0].weight.view(-1)[3:].tolist() == [7.0] * 9
    assert backend.optimizer.state[backend.flat]["step"] == 5
    assert backend.slices("z").keys() == {"0.weight", "0.bias"}


def test_state_begins_as_zeros_or_as_the_master_weight_and_the_probe_leaves_no_trace():
    backend = Backend(model())
    before = backend.flat.detach().clone()
    backend.prepare()
    state = backend.optimizer.state[backend.flat]
    assert torch.equal(backend.flat, before) and torch.equal(state["z"], before) and not state["exp_avg"].any()
    state["exp_avg"].fill_(2)
    backend.prepare()
    assert state["exp_avg"].eq(2).all(), "an optimizer that has made steps keeps its state"


def test_training_is_refused_if_a_view_is_a_copy():
    with pytest.raises(TrainingError, match=r"^train\.zero: heliostat can't restore 6 tensors, for example 'master\.0\.weight',"):
        Copied(model()).prepare()


@pytest.mark.parametrize(
    ("places", "saved", "frozen", "all_"),
    [
        ({}, (3, 9), (0, 6), True),
        ({"replicas": (1, 2), "weight_replicas": (1, 4)}, (8, 4), (2, 2), False),
        ({"replicas": (4, 5), "weight_replicas": (7, 8)}, (11, 1), (6, 0), False),
        ({"matrix_part": (0, 2)}, (3, 9), (0, 6), False),
        ({"matrix_part": (1, 2)}, (3, 0), (0, 0), False),
    ],
)
def test_workers_with_the_same_slice_save_a_part_each_and_load_all_of_it(places, saved, frozen, all_):
    backend = Backend(model(), **places)
    backend.prepare()
    part: Any = backend.tensors()["master.0.weight"]
    assert (part.start, part.local.numel()) == saved and backend.saves_all() is all_
    part = backend.frozen()["frozen.frozen"]
    assert (part.start, part.local.numel()) == frozen
    wholes = [backend.tensors(whole=True)["master.0.weight"], backend.frozen(whole=True)["frozen.frozen"]]
    assert [shard.local.numel() for shard in wholes if isinstance(shard, FlatShard)] == [9, 6]


def test_a_frozen_weight_in_a_file_is_refused_by_its_name():
    backend = Backend(model())
    backend.weights = lambda p: None  # type: ignore[method-assign]
    with pytest.raises(
        ConfigError,
        match=r"^train\.zero\.offload\.param: nvme offload doesn't support parameters that aren't trained, such as 'frozen'",
    ):
        backend.frozen()


# DeepSpeed's ---------------------------------------------------------------------------------------------------------


def engine(stage: int, optimizer: Any) -> Any:
    return SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: stage, module=torch.nn.Linear(1, 1))


@pytest.mark.parametrize(("stage", "kind"), [(1, zero_state.Partitioned), (2, zero_state.Partitioned), (3, zero_state.Divided)])
def test_an_optimizer_without_a_part_is_one_error_which_names_it(stage, kind):
    for missing in kind.parts:
        zero = SimpleNamespace(**dict.fromkeys(kind.parts))
        delattr(zero, missing)
        with pytest.raises(ConfigError, match=rf"doesn't support heliostat's adapter \(.*'{missing}'\)\. Run: pip install"):
            zero_state.adapter(engine(stage, zero), {}, (), None)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(patches, "installed", lambda: "0.20.0")
    with pytest.raises(ConfigError, match="doesn't support this version"):
        zero_state.adapter(engine(0, None), {}, (), None)


def test_deepspeed_has_the_parts(monkeypatch):
    """The tests of checkpoints check their content."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    patches.import_without_mlflow()
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for kind, module in zip(KINDS[1:], (stage_1_and_2, bf16_optimizer, stage3), strict=True):
        text = inspect.getsource(module)
        assert [name for name in kind.parts if f"self.{name}" not in text and f"def {name}(" not in text] == []
    taken = inspect.signature(stage3.DeepSpeedZeroOptimizer_Stage3._get_fp32_opt_state_partition).parameters
    assert {"param", "release_swap_buffers", "optim_state_key"} <= taken.keys()


def test_at_stage_3_weights_are_taken_from_the_partitions_again_and_second_copies_are_dropped(monkeypatch):
    asked: list[Any] = []
    zero = SimpleNamespace(
        fp16_groups=[1, 2],
        fp32_partitioned_groups_flat=[torch.ones(2), None],
        fp16_partitioned_groups_flat=[torch.zeros(2, dtype=torch.bfloat16), None],
        persistent_parameters=[SimpleNamespace(all_gather=lambda those: asked.append("gather"))],
        parameter_offload=SimpleNamespace(_DeepSpeedZeRoOffload__allgather_stream=None),
        _reassign_or_swap_out_partitioned_parameters=asked.append,
        _partition_all_parameters=lambda: asked.append("all"),
        _get_fp32_opt_state_partition=lambda p, release_swap_buffers, optim_state_key: (optim_state_key, 0),
    )
    state: Any = object.__new__(zero_state.Divided)
    p = SimpleNamespace(ds_secondary_tensor="before")
    state._zero, state.module = zero, SimpleNamespace(parameters=lambda: [p])
    state.refresh()
    assert asked == ["all", 0, 1, "gather"] and p.ds_secondary_tensor is None
    assert zero.fp16_partitioned_groups_flat[0].tolist() == [1, 1]
    assert state.original(p, "exp_avg") == "exp_avg"


# one owner -----------------------------------------------------------------------------------------------------------

OWNERS = {"engine/patches.py", "engine/stream_patches.py", "engine/zero_state.py"}
PARTS = {name for kind in KINDS for name in kind.parts} - {"allgather_bucket_size"}  # which is a key of the config, too
INTERNAL = re.compile(
    r"_?ds_(id|tensor|numel|shape|status|persist|secondary\w*|process_group|zero_\w+|autotp\w*)|DS_AUTOTP\w*|"
    r"_(hp|z3)_\w+|\w*(fp16|fp32|bf16|bit16)_\w*(groups|partition)\w*|averaged_gradients|loss_scaler|convert_to_zero_parameters"
)
PUBLIC = {  # of DeepSpeed, which every module of the engine may use
    "deepspeed.DeepSpeedEngine", "deepspeed.initialize", "deepspeed.zero", "deepspeed.accelerator.get_accelerator",
    "deepspeed.runtime.zero.config.DeepSpeedZeroConfig", "deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF",
    "deepspeed.utils.set_z3_leaf_module",
}  # fmt: skip


@cache
def trees() -> dict[str, ast.Module]:
    """Parses the modules of the package that may name the state or DeepSpeed."""
    word = re.compile(rf"deepspeed|sharded|{'|'.join(PARTS)}|{INTERNAL.pattern}")
    texts = {str(path.relative_to(rooms.PACKAGE)): path.read_text(encoding="utf-8") for path in rooms.PACKAGE.rglob("*.py")}
    return {name: ast.parse(text) for name, text in texts.items() if word.search(text)}


def internals(tree: ast.AST) -> list[str]:
    """Lists the internals of DeepSpeed that a module names: attributes, also as strings, and imports except `PUBLIC`."""
    found = []
    for node in ast.walk(tree):
        named: str | None = None
        if isinstance(node, ast.Attribute):
            named = node.attr
            if isinstance(node.value, ast.Name) and node.value.id == "deepspeed":
                found += [node.attr] if f"deepspeed.{node.attr}" not in PUBLIC else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            found += [alias.name for alias in node.names if f"{node.module}.{alias.name}" not in PUBLIC]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("deepspeed.")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            found += [ast.unparse(one) for one in node.args if ast.unparse(one).strip("'").startswith("deepspeed")]
        if named and (INTERNAL.fullmatch(named) or named in PARTS):
            found.append(named)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "engine.optimizer.fp32_partitioned_groups_flat", "getattr(p, 'ds_tensor', p)", "p._hp_mapping", "zero.bit16_groups_flat",
        "engine.optimizer._partition_all_parameters()", "from deepspeed.utils import safe_get_full_grad", "import deepspeed.comm",
        "import deepspeed\ndeepspeed.comm.comm", "from deepspeed.runtime.utils import all_gather_dp_groups", "p.ds_numel",
        "importlib.import_module('deepspeed.ops')", "from deepspeed.utils import groups", "engine.optimizer.loss_scaler",
    ],
)  # fmt: skip
def test_every_internal_is_seen(line):
    assert internals(ast.parse(line))


def test_the_adapter_and_the_patches_alone_name_internals_of_deepspeed():
    """In another module, such a use wouldn't be guarded by the version, and would break without an explanation."""
    found = {name: internals(tree) for name, tree in trees().items()}
    assert {name: names for name, names in found.items() if names and name not in OWNERS} == {}
    assert all(found[name] for name in OWNERS)


def asked(tree: ast.AST) -> set[str]:
    """Collects the calls of the sharded state in a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            called = ast.unparse(owner.func) if isinstance(owner, ast.Call) else ""
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else called
            found |= {node.attr} if name in ("sharded", "sharded_state.of") else set()
    return found


def test_what_users_ask_for_is_what_the_adapter_has_and_no_more():
    """Another backend implements the abstract members: nothing specific to DeepSpeed, and nothing that no caller needs."""
    users = {name: asked(tree) for name, tree in trees().items() if name != "engine/zero_state.py"}
    has = {name for name in vars(ShardedState) if not name.startswith("_")} | {"optimizer", "module", "moments", "copies"}
    unknown = {name: names - has for name, names in users.items()}
    assert {name: names for name, names in unknown.items() if names} == {}
    inside = {n.attr for n in ast.walk(trees()["engine/sharded_state.py"]) if isinstance(n, ast.Attribute)}
    assert has - inside - set().union(*users.values()) == set()
    assert all(not kind.__abstractmethods__ for kind in KINDS)


def test_every_kind_adds_no_method_that_another_backend_would_not_know():
    known = {name for name in dir(ShardedState) if not name.startswith("_")} | {"parts"}
    assert {name for kind in KINDS for name in dir(kind) if not name.startswith("_")} <= known


def test_the_owner_says_what_another_backend_gives():
    text = sharded_state.__doc__ or ""
    assert [name for name in sorted(ShardedState.__abstractmethods__) if f"`{name}`" not in text] == []
