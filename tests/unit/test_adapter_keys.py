"""Tests `model.adapter` before training: its errors, the first weights, what the plan counts, and how a save reads back."""

import math
import shutil
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from heliostat.checkpoint import read_back, writing
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.errors import CheckpointError, ConfigError
from heliostat.plan import model_stats
from heliostat.recipes import adapter_probe, adapters, building
from heliostat.recipes.folder_digests import weights_digest
from heliostat.recipes.text import adapted
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location

from tests.unit.build_job import BASE, job


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    CausalLM(job()).build().save_pretrained(folder)
    return folder


def recipe(base: Path, seed: int = 1, changes: dict[str, object] | None = None, **adapter: object) -> CausalLM:
    model = {"pretrained": str(base), "adapter": {"rank": 4, **adapter}}
    return CausalLM(job(**{"model": model, "train.seed": seed, "train.precision": "fp32", **(changes or {})}))


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "loha"}, "^model.adapter: method: 'loha' isn't a choice"),
        ({"rank": 0}, "^model.adapter: rank: 0 is too small"),
        ({"dropout": 0.1}, "dropout in adapters isn't supported"),
        ({"targets": []}, "expected a list of different names"),
        ({"targets": "q_proj"}, "expected a list of different names, got q_proj. Write all-linear"),
        ({"ranks": 4}, "^model.adapter: ranks: unknown key. Did you mean 'rank'"),
    ],
)
def test_wrong_keys_are_rejected_in_one_line(base, adapter, said):
    with pytest.raises(ConfigError, match=said) as raised:
        recipe(base, **adapter)
    assert "\n" not in str(raised.value)


def test_a_name_without_a_layer_is_rejected_before_weights_are_read(base):
    with pytest.raises(
        ConfigError, match=r"model.adapter.targets: 'q_prj' is the name of no linear layer. Did you mean 'q_proj'\?"
    ):
        recipe(base, targets=["v_proj", "q_prj"]).probe()
    with pytest.raises(ConfigError, match="'lm_head' is the name of no linear layer"):
        recipe(base, targets=["lm_head"]).probe()
    recipe(base, targets=["1.self_attn.q_proj", "down_proj"]).probe()


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
         "num_key_value_heads": 4, "pad_token_id": 0, "num_experts_per_tok": 2}  # fmt: skip
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip


def probed(kind: str, keys: dict[str, object], **adapter: object) -> None:
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **keys})
    made = partial(transformers.AutoModelForCausalLM.from_config, config)
    adapter_probe.require(adapters.Adapter(rank=2, **adapter), made, adapted.short_logits, 0)


def said_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("heliostat")]


def test_layers_whose_adapter_would_not_train_are_named_before_the_run(caplog):
    """A router's output isn't that of a linear layer. Mamba reads the weight of `dt_proj` without calling the layer. peft
    replaces layers of some mixtures of experts, and supports no `out_proj` of Mamba."""
    llama4 = {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8, "interleave_moe_layer_step": 1}
    probed("llama4_text", llama4)
    (said,) = said_by(caplog)
    assert said.startswith("model.adapter.targets: 2 of 16 linear layers have no adapter: model.layers.0.feed_forward.router (of")
    with pytest.raises(ConfigError, match=r"no adapter can be added to .*0\.feed_forward\.router, a Llama4Router\. Use"):
        probed("llama4_text", llama4, targets=["q_proj", "router"])
    caplog.clear()
    probed("jamba", {"num_experts": 2})
    (said,) = said_by(caplog)
    assert (
        "2 of 11 linear layers have an adapter that isn't trained: model.layers.0.mamba.dt_proj (the model doesn't call" in said
    )
    with pytest.raises(ConfigError, match=r"the model calls none of these layers \(model\.layers\.0\.mamba\.dt_proj\)"):
        probed("jamba", {"num_experts": 2}, targets=["dt_proj"])
    with pytest.raises(
        ConfigError, match=r"^model\.adapter\.targets: peft doesn't support these layers of Deepseek.* \(it adds no"
    ):
        probed("deepseek_v3", DEEPSEEK)
    probed("deepseek_v3", DEEPSEEK, targets=["q_a_proj", "o_proj"])
    with pytest.raises(ConfigError, match=r"^model\.adapter\.targets: peft doesn't support these layers of Mamba.*out_proj"):
        probed("mamba", {"intermediate_size": 64})


@pytest.mark.parametrize("key", ["train.tiled_mlp", "train.parallel.tensor"])
def test_a_key_that_changes_the_bases_layers_is_rejected(base, key):
    changes = {key: 2 if key.endswith("tensor") else True, "workers.count": 2}
    with pytest.raises(ConfigError, match=f"^{key}: not supported with model.adapter"):
        recipe(base, changes=changes).probe()


def test_an_adapter_needs_a_pretrained_model():
    with pytest.raises(ConfigError, match=r"^model.adapter: needs a pretrained model as its base. Set model.pretrained"):
        CausalLM(job(model={**BASE["model"], "adapter": {"rank": 4}}))


def test_null_is_no_adapter_and_the_error_offers_both_fixes():
    """A person who wants to train all weights writes null. The error was `expected a mapping, got None`, without a fix."""
    with pytest.raises(ConfigError, match=r"^model.adapter: .* got null. Write for example \{rank: 16\}, or remove this key$"):
        CausalLM(job(model={"pretrained": "anywhere", "adapter": None}))


def test_a_base_that_also_has_an_adapter_is_rejected(base, tmp_path):
    """transformers would load both, so a run would train, and export, the layers of peft as if they were the model's."""
    folder = shutil.copytree(base, tmp_path / "both")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    for made in (recipe(folder), CausalLM(job(model={"pretrained": str(folder)}))):
        for work in (made.probe, made.build):
            with pytest.raises(ConfigError, match=r"^model\.pretrained: .*both' also has an adapter \(adapter_config\.json\)"):
                work()


def trained(made: CausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in building.build(made).named_parameters() if p.requires_grad}


def test_the_first_weights_follow_from_the_seed_and_the_layer(base):
    """They have the distribution of peft's own: uniform, with the bound 1 / sqrt(inputs); B is zero."""
    torch.manual_seed(3)
    one = trained(recipe(base))
    torch.manual_seed(4)
    same, other = trained(recipe(base)), trained(recipe(base, seed=2))
    downs = [name for name in one if name.endswith(adapters.DOWN)]
    assert len(downs) == 14 and all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in downs)
    assert not any(torch.equal(one[downs[0]], one[name]) for name in downs[1:] if one[name].shape == one[downs[0]].shape)
    scaled = torch.cat([(one[name] * math.sqrt(one[name].shape[1])).flatten() for name in downs])
    assert scaled.abs().max() <= 1 and scaled.std() == pytest.approx(1 / math.sqrt(3), rel=0.05)
    assert not any(one[name].any() for name in one if name.endswith(adapters.UP))
    dora = building.build(recipe(base, method="dora"))
    layer = dora.get_submodule("model.layers.0.mlp.down_proj")
    norms = layer.get_base_layer().weight.norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), norms.detach())


def test_the_plan_counts_the_base_without_gradients_and_its_gradients_flops(base):
    made, whole = recipe(base), CausalLM(job(model={"pretrained": str(base)}))
    stats, all_of = (model_stats.stats_of(one, model_stats.build(one)) for one in (made, whole))
    assert set(stats.trained) == set(trained(made)) and len(stats.frozen) == len(all_of.shapes)
    weights = sum(math.prod(shape) for shape in stats.trained.values())
    length = made.length
    matrices = whole.flops_per_sample(model_stats.build(whole))
    head = 96 * 32
    layers = sum(math.prod(s) for n, s in all_of.shapes.items() if len(s) == 2 and "embed" not in n) - head
    saved = 2 * length * (layers + head) - 6 * length * weights
    assert stats.flops == pytest.approx(matrices - saved)


def test_a_save_is_compared_with_storage_and_must_not_lose_a_matrix(tmp_path):
    """A shard that changed in storage, and a matrix that is zero on all ranks, fail the save."""
    tensors = {
        "master.a": FlatShard(torch.randn(6), 6, 12),
        "master.b": FlatShard(torch.zeros(4), 0, 4),
        "buffer.c": torch.ones(2),
    }
    target = Location(str(tmp_path / "step"))
    part = writing.write_shard(target, tensors, 0, lambda: None)
    seen = read_back.compare(target, part, tensors)
    assert sorted(seen) == [("buffer.c", True), ("master.a", True), ("master.b", False)]
    read_back.require(target, {"master.a": False, "master.b": True}, seen)
    with pytest.raises(CheckpointError, match=r"can't save 'master.b': all its values are zero or missing \(1 tensors\)"):
        read_back.require(target, {"master.a": False, "master.b": False}, seen)
    with pytest.raises(CheckpointError, match=r"can't save 'master.d': all its values are zero or missing \(1 tensors\)"):
        read_back.require(target, {"master.a": False, "master.d": True}, seen)
    changed = {**tensors, "master.a": FlatShard(torch.randn(6), 6, 12)}
    with pytest.raises(CheckpointError, match=r"'master\.a' differs from the tensor that was saved"):
        read_back.compare(target, part, changed)
    file = tmp_path / "step" / part.shards[0].file
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="have changed since they were written"):
        read_back.compare(target, part, tensors)


# the base -------------------------------------------------------------------------------------------------------------


def test_checkpoints_name_the_base_that_the_run_loaded(base, tmp_path):
    """A folder that changes after the first save doesn't change the name. If it changes before, no checkpoint names it."""
    folder = shutil.copytree(base, tmp_path / "base")
    made = recipe(folder)
    model = building.build(made)
    known, late = adapters.base_of(made, model), adapters.base_of(made, model)
    assert known and late
    first = known.digest
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4] + b"\1\2\3\4")
    assert known.digest == first != weights_digest(folder)
    with pytest.raises(CheckpointError, match="the base has changed since the run loaded it"):
        _ = late.digest


def test_short_names_of_layers_name_no_other_module():
    """peft compares a name with all modules: the last part of `blocks.0.out.0` would also name the block."""
    every = ["blocks", "blocks.0", "blocks.0.q", "blocks.0.out", "blocks.0.out.0", "blocks.1", "blocks.1.q"]
    assert adapters.shortest(["blocks.0.q", "blocks.1.q"], every) == ["q"]
    assert adapters.shortest(["blocks.0.q", "blocks.0.out.0"], every) == ["blocks.0.q", "blocks.0.out.0"]
