"""Tests adapters by name: each row of a batch is answered as by a model with its adapter merged into it."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from heliostat.apps.serve.adapters import Adapters, require
from heliostat.apps.serve.group import RowBatch
from heliostat.apps.serve.served import served
from heliostat.errors import ConfigError
from heliostat.inference.batch.engines import Continue, Input, LoadedModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model
from tests.unit.page import client, opened

PROMPTS = [[5, 9, 11], [7, 3, 8, 40, 2, 6, 12], [30, 31], [5, 9, 11], [8, 8, 8, 8]]
NAMES = ["kind", None, "rude", "rude", "kind"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), BASE["model"], 128)


def write_adapter(folder: Path, base: Path, seed: int, targets: tuple[str, ...], **config) -> Path:
    """Writes an adapter of random matrices in peft's form."""
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": list(targets), **config}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(told))
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for path, module in LoadedModel(base).model.named_modules():
        if isinstance(module, torch.nn.Linear) and path.endswith(targets):
            sizes = {"A": (4, module.in_features), "B": (module.out_features, 4)}
            for letter, size in sizes.items():
                tensors[f"base_model.model.{path}.lora_{letter}.weight"] = torch.randn(size, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    kind = write_adapter(place / "kind", base, 1, ("q_proj", "v_proj"))
    rude = write_adapter(place / "rude", base, 2, ("q_proj", "down_proj", "o_proj"), use_rslora=True)
    return {"kind": str(kind), "rude": str(rude)}


@pytest.fixture(scope="module")
def merged(base, folders, tmp_path_factory):
    """Returns folders of models with an adapter merged by its definition: W + alpha / r B A, or alpha / sqrt(r)."""
    found = {None: base}
    for name, folder in folders.items():
        from safetensors.torch import load_file

        tensors, model = load_file(Path(folder) / "adapter_model.safetensors"), LoadedModel(base).model
        scale = 8 / 2 if name == "rude" else 8 / 4
        for key in [key for key in tensors if ".lora_A." in key]:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            with torch.no_grad():
                model.get_submodule(path).weight += scale * tensors[key.replace("_A.", "_B.")] @ tensors[key]
        found[name] = shutil.copytree(base, tmp_path_factory.mktemp("merged") / f"merged-{name}")
        model.save_pretrained(found[name])
    return found


def test_each_row_of_a_batch_is_answered_with_its_own_adapter(base, folders, merged):
    """Over several steps, while rows join and leave the batch, the logits equal those of the merged models, row by row."""
    loaded = LoadedModel(base)
    adapters = Adapters(loaded.model, folders)
    plain = {name: LoadedModel(folder).model for name, folder in merged.items()}
    texts, names = [list(one) for one in PROMPTS[:3]], NAMES[:3]

    def compare(group: RowBatch) -> list[int]:
        for place, (text, name) in enumerate(zip(texts, names, strict=True)):
            wanted = plain[name](torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(group.logits[place], wanted, atol=2e-4, rtol=2e-4)
        return group.logits.argmax(-1).tolist()

    def go_on(group: RowBatch) -> None:
        tokens = compare(group)
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        group.step(tokens)

    with torch.inference_mode():
        group = RowBatch(loaded.model, texts, loaded.pad, names, adapters)
        go_on(group)
        go_on(group)
        group.join(RowBatch(loaded.model, PROMPTS[3:], loaded.pad, NAMES[3:], adapters))
        texts, names = [*texts, *(list(one) for one in PROMPTS[3:])], NAMES
        go_on(group)
        group.keep([1, 2, 4])
        texts, names = [texts[i] for i in (1, 2, 4)], [names[i] for i in (1, 2, 4)]
        go_on(group)
        compare(group)
        prompt = torch.tensor([PROMPTS[0]])
        logits = {name: model(prompt).logits for name, model in plain.items()}
        assert (logits["kind"] - logits[None]).abs().max() > 0.1 < (logits["kind"] - logits["rude"]).abs().max()
        assert torch.equal(loaded.model(prompt).logits, logits[None]), "without a name nothing is added"


def test_requests_choose_by_the_models_name(base, folders, merged):
    """With many concurrent requests for all names, each text equals that of the merged model."""
    wanted = {
        name or base.name: Continue(folder, 1, {"max_tokens": 12, "temperature": 0})([Input("def f", 0)])[0].values["answer"]
        for name, folder in merged.items()
    }
    assert len(set(wanted.values())) == 3
    with opened(base, adapters=[f"{name}={folder}" for name, folder in folders.items()]) as url:
        ask = client(url)
        assert [one.id for one in ask.models.list()] == [base.name, "kind", "rude"]

        def written(name: str) -> str:
            return ask.completions.create(model=name, prompt="def f", max_tokens=12, temperature=0).choices[0].text

        names = list(wanted) * 4
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(written, names)) == [wanted[name] for name in names]
        stream = ask.completions.create(model="rude", prompt="def f", max_tokens=12, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in stream) == wanted["rude"]
        with pytest.raises(openai.BadRequestError, match="'kind' is an adapter, which only generates text"):
            ask.embeddings.create(model="kind", input="x")
        with pytest.raises(openai.NotFoundError, match="'rude'"):
            ask.completions.create(model="gentle", prompt="x")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LOHA"}, "adapters of kind 'LOHA' aren't supported. Use LORA"),
        ({"use_qalora": True}, r"use_qalora: True isn't supported\. Merge the adapter into its model"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: .* isn't supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"r": None}, r"lora_alpha \(a number\) are required"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_before_a_weight_is_read(base, tmp_path, config, said):
    folder = write_adapter(tmp_path / "x", base, 1, ("q_proj",), **config)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"^--adapter: x: .*{said}"):
        require("x", folder)


def test_what_does_not_fit_the_model_is_named(base, folders, tmp_path):
    model = LoadedModel(base).model
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"isn't an adapter \(adapter_config.json is missing\)"):
        Adapters(model, {"x": str(tmp_path / "none")})
    write_adapter(tmp_path / "pickled", base, 1, ("q_proj",))
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors\. Save the adapter with safetensors"):
        Adapters(model, {"x": str(tmp_path / "pickled")})
    other = write_model(tmp_path, {**BASE["model"], "intermediate_size": 24}, 64)
    with pytest.raises(ConfigError, match=r"down_proj: the adapter's matrices are .*\. Pass an adapter of this model"):
        Adapters(LoadedModel(other).model, {"x": folders["rude"]})
    for tensors, said in (
        ({"base_model.model.lm_head.weight": torch.ones(2)}, "isn't a lora_A or lora_B matrix"),
        ({"base_model.model.nowhere.lora_A.weight": torch.ones(2, 2)}, "nowhere: isn't a linear layer of the model"),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 4)},
            "self_attn.q_proj: has lora_A, expected lora_A and lora_B",
        ),
        ({}, "is empty"),
    ):
        folder = write_adapter(tmp_path / said[:7], base, 1, ("q_proj",))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=said):
            Adapters(model, {"x": str(folder)})


class Biased(torch.nn.Module):
    """Defines a model whose only layer is linear, with a bias."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj = torch.nn.Embedding(2, 6), torch.nn.Linear(6, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.proj(self.embed(input_ids))


def test_dora_equals_peft_in_a_layer_with_a_bias_and_other_rows_keep_the_model(tmp_path):
    torch.manual_seed(0)
    model, tokens = Biased(), torch.tensor([[0, 1], [1, 0]])
    plain = model(tokens)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=3, target_modules=["proj"], use_dora=True))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.mul_(1.3).add_(0.3) if "lora_" in name else None
    adapted.save_pretrained(tmp_path / "dora")
    served = Adapters(model, {"x": str(tmp_path / "dora")})
    with served.using(["x", None]):
        both = model(tokens)
    torch.testing.assert_close(both[0], adapted(tokens)[0])
    assert torch.equal(both[1], plain[1]) and (both[0] - plain[0]).abs().max() > 0.1


def dora(model: Biased, folder: Path, gain: float) -> Path:
    """Writes a DoRA adapter that multiplies the weight of `proj` by `gain`, and changes nothing else."""
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["proj"], use_dora=True))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.mul_(gain) if "magnitude" in name else None
    adapted.save_pretrained(folder)
    return folder


def test_a_small_change_of_the_norms_by_dora_has_an_effect_in_bf16(tmp_path):
    model, tokens = Biased(), torch.tensor([[0, 1], [1, 0]])
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
        model.proj.weight.fill_(0.125)
        model.proj.bias.fill_(-0.75)
    folder = dora(model, tmp_path / "dora", 1.003)
    model.to(torch.bfloat16)
    served = Adapters(model, {"x": str(folder)})
    with torch.no_grad(), served.using(["x", None]):
        both = model(tokens).float()
    torch.testing.assert_close(both[0] - both[1], torch.full((2, 4), 0.75 * 0.003), atol=1e-4, rtol=0)


class HostConstants(TorchFunctionMode):
    """Records each tensor that is made from values of the host."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func in (torch.tensor, torch.as_tensor)
        return func(*args, **(kwargs or {}))


def test_layers_with_adapters_make_no_tensor_from_values_of_the_host(tmp_path):
    """Each such tensor would make a GPU wait, once per layer and token."""
    model, tokens = Biased(), torch.tensor([[0, 1], [1, 0]])
    served = Adapters(model, {"x": str(dora(model, tmp_path / "dora", 1.5))})
    with torch.no_grad(), served.using(["x", None]), HostConstants() as host:
        both = model(tokens)
    assert host.calls == 0 and not torch.equal(both[0], both[1].flip(0))


class Flat(torch.nn.Module):
    """Defines a model with a layer that sees the tokens of all rows in one line, like the experts of a mixture."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.ones(input_ids.numel(), 4))


def test_a_layer_that_does_not_see_rows_is_refused_when_it_is_loaded(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    sizes = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    tensors = {f"base_model.model.proj.lora_{letter}.weight": tensor for letter, tensor in sizes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ConfigError,
        match=r"--adapter: x: a layer with adapter weights doesn't compute the rows of a batch independently\. Merge the adapter",
    ):
        Adapters(Flat(), {"x": str(tmp_path)})


def test_names_are_apart_and_only_a_model_that_writes_has_adapters(base, folders, tmp_path):
    told = served(str(base), "", None, None, None)
    for given, said in (
        (["kind"], "expected NAME=FOLDER, got 'kind'"),
        ([f"{base.name}={folders['kind']}"], "is already in use"),
        ([f"a={folders['kind']}", f"a={folders['rude']}"], "the name 'a' is already in use"),
    ):
        with pytest.raises(ConfigError, match=said):
            told.with_adapters(given)
    with pytest.raises(ConfigError, match="isn't an adapter"):
        told.with_adapters([f"x={tmp_path}"]).kind()
    assert told.with_adapters([f"x={folders['kind']}"]).kind() == "text"
    with pytest.raises(ConfigError, match="--adapter: needs a model"):
        served(None, "", None, str(tmp_path / "index"), None).with_adapters([f"x={folders['kind']}"])
