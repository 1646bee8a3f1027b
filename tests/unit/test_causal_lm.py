"""Tests the language-model recipe: impossible models are rejected by key, and packed documents don't see each other."""

import itertools

import numpy as np
import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import IGNORED
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.next_token import SummedCrossEntropy
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.seeds import every_seed
from tests.unit.build_job import BASE, job

LLAMA = BASE["model"]
END = 0
SHAPES = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "arch": "qwen3", "head_dim": 8},
    "mistral": {**LLAMA, "arch": "mistral"},
    "gpt2": {"arch": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    "gpt_neox": {"arch": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                 "vocab_size": 96},
}  # fmt: skip
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(model: dict | None = None, length: int = 64, **changes) -> CausalLM:
    made = CausalLM(job(**{"model": model or LLAMA, "data.sequence_length": length, **changes}))
    made.end = END
    return made


def refusal(model: dict, length: int = 64) -> str:
    with pytest.raises(ConfigError) as e:
        recipe(model, length)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("arch", "near"),
    [("lama", "'llama'"), ("gpt-2", "'gpt2'"), ("gptneox", "'gpt_neox'"), ("qwen33", "'qwen3'")],
)
def test_an_unknown_architecture_suggests_the_nearest(arch, near):
    """The error has the given value and a suggestion."""
    assert refusal({**LLAMA, "arch": arch}) == (
        f"model.arch: {arch!r} isn't a causal language model of transformers. Did you mean {near}?"
    )


@pytest.mark.parametrize("arch", [None, 5, ["llama"], "bert-like-thing", "t5"])
def test_what_is_no_architecture_is_one_line(arch):
    """The value is missing, has another type, or isn't a causal language model: one line names the key."""
    assert refusal({**LLAMA, "arch": arch}).startswith(f"model.arch: {str(arch)!r} isn't a causal language model of transformers")


@pytest.mark.parametrize(
    ("arch", "key", "near"),
    [
        ("llama", "hiden_size", "'hidden_size'"),
        ("llama", "num_hidden_layer", "'num_hidden_layers'"),
        ("gpt2", "n_layers", "'n_layer'"),
    ],
)
def test_an_unknown_model_key_suggests_the_nearest(arch, key, near):
    """transformers would silently keep it as an attribute and train another model."""
    assert refusal({**SHAPES[arch], key: 1}) == f"model.{key}: unknown key for arch {arch!r}. Did you mean {near}?"


@pytest.mark.parametrize("arch", sorted(SHAPES))
def test_heads_must_divide_the_width(arch):
    """The error suggests the nearest number that divides, which works. An explicit head size lifts the rule."""
    shape = {k: v for k, v in SHAPES[arch].items() if k not in ("num_key_value_heads", "head_dim")}
    name, width = ("n_head", "n_embd") if arch == "gpt2" else ("num_attention_heads", "hidden_size")
    free = arch == "qwen3"  # its head_dim has a default of its own
    for heads in range(1, 33):
        model = {**shape, name: heads, **({"num_key_value_heads": heads} if arch in ("mistral", "qwen3") else {})}
        if 32 % heads == 0 or free:
            recipe(model)
            continue
        message = refusal(model)
        assert message.startswith(f"model.{name}: {heads} doesn't divide {width} 32. Nearest divisor: ")
        nearest = int(message.rpartition(" ")[2])
        assert abs(nearest - heads) == min(abs(d - heads) for d in (1, 2, 4, 8, 16, 32))
    if arch == "mistral":
        recipe({**shape, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16})


def test_key_value_heads_must_divide_the_heads():
    """For every number of groups: it is valid exactly if it divides; otherwise the error suggests the nearest that does."""
    for groups in range(1, 9):
        model = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": groups}
        if 8 % groups == 0:
            recipe(model)
        else:
            message = refusal(model)
            assert message.startswith(f"model.num_key_value_heads: {groups} doesn't divide num_attention_heads 8. Nearest")
            assert 8 % int(message.rpartition(" ")[2]) == 0


@pytest.mark.parametrize(
    ("arch", "key"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions"), ("gpt2", "max_position_embeddings")]
)
def test_a_sequence_longer_than_the_positions_is_refused(arch, key):
    """This holds under either name of the key. If the job doesn't set the positions, they grow with the sequence."""
    shape = {k: v for k, v in SHAPES[arch].items() if k != "n_positions"}
    assert recipe({**shape, key: 64}).config.max_position_embeddings == 64
    assert refusal({**shape, key: 63}) == "data.sequence_length: 64 is above the model's max_position_embeddings. Use at most 63"
    assert recipe(shape, 5000).config.max_position_embeddings == 5000


def test_a_language_model_needs_a_sequence_length():
    """The key is optional for other recipes, so this recipe checks it."""
    with pytest.raises(ConfigError, match=r"data\.sequence_length: required for a language model"):
        CausalLM(job(**{"data.sequence_length": None}))


def test_a_pretrained_model_is_a_folder_with_a_configuration(tmp_path):
    """A missing folder and a model of another kind are rejected, without a request to the Hub."""
    gone = str(tmp_path / "gone")
    assert refusal({"pretrained": gone}) == f"model.pretrained: {gone!r} isn't a model folder (no config.json)"
    from transformers import BertConfig, LlamaConfig, T5Config

    for kind in (T5Config, BertConfig):
        kind().save_pretrained(tmp_path)
        found = kind.model_type
        if found not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            assert refusal({"pretrained": str(tmp_path)}).endswith(f"contains a {found!r}, which isn't a causal language model")
    LlamaConfig(max_position_embeddings=32).save_pretrained(tmp_path)
    assert "is above the model's max_position_embeddings. Use at most 32" in refusal({"pretrained": str(tmp_path)})
    assert recipe({"pretrained": str(tmp_path)}, 32).config.model_type == "llama"


def test_the_shapes_of_a_pretrained_model_are_known_without_reading_its_weights(tmp_path):
    """An export and a plan need them on the meta device, from the folder's configuration alone."""
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = recipe({"pretrained": str(tmp_path)}, 32).build()
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.config.hidden_size == 16


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "big"},
        {"hidden_size": True},
        {"num_attention_heads": 0},
        {"rope_parameters": 5},
        {"num_hidden_layers": [1]},
    ],
)
def test_a_bad_value_is_one_line_without_a_traceback(change):
    """Any error of transformers becomes one ConfigError under `model`."""
    assert refusal({**LLAMA, **change}).startswith("model")


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        (LLAMA, {"hidden_size": "abc"}, "model.hidden_size: expected int, got str (value: 'abc')"),
        (SHAPES["gpt2"], {"n_layer": True}, "model.n_layer: expected int, got bool (value: True)"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_by_its_key(model, change, said):
    assert refusal({**model, **change}) == said


def test_every_architecture_of_transformers_is_accepted_or_refused_in_one_line():
    """The rules above fit the defaults of each architecture: nothing raises another error than ConfigError, and almost nothing is
    rejected."""
    refused = []
    for arch in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            recipe({"arch": arch})
        except ConfigError as e:
            assert "\n" not in str(e)
            refused.append(arch)
    assert len(refused) <= 5, refused


@every_seed(10)
def test_every_token_but_the_first_is_predicted(seed):
    """Without document_mask, labels are the tokens, and the first is ignored. `terms` is the divisor of a step's loss."""
    content = np.random.default_rng(seed).integers(0, 96, (3, 64)).astype(np.int32)
    made = recipe()
    batch = made.batch(content)
    assert set(batch) == {"input_ids", "labels"} and all(v.dtype == torch.int64 for v in batch.values())
    assert np.array_equal(batch["input_ids"], content) and np.array_equal(batch["labels"][:, 1:], content[:, 1:])
    assert (batch["labels"][:, 0] == IGNORED).all()
    assert made.terms(batch) == 3 * made.terms_per_sample == 3 * 63


@every_seed(20)
def test_document_mask_starts_anew_after_each_end_of_document(seed):
    """Positions and labels equal those of a plain loop over the documents."""
    rng = np.random.default_rng(seed)
    content = rng.integers(1, 96, (4, 64)).astype(np.int32)
    content[rng.random((4, 64)) < rng.choice([0.0, 0.05, 0.5, 1.0])] = END
    made = recipe(**{"data.document_mask": True})
    batch = made.batch(content)
    assert made.terms_per_sample is None
    predicted = 0
    for tokens, labels, positions in zip(content, batch["labels"], batch["position_ids"], strict=True):
        place = 0
        for i, token in enumerate(tokens):
            first = i == 0 or tokens[i - 1] == END
            place = 0 if first else place + 1
            assert positions[i] == place
            assert labels[i] == (IGNORED if first else token)
            predicted += not first
    assert made.terms(batch) == predicted


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", sorted(SHAPES))
def test_packed_documents_do_not_see_each_other(arch, checkpointing):
    """The logits of a packed sample equal those of its documents alone. A change in one document doesn't affect the others."""
    torch.manual_seed(0)
    model_keys = {**SHAPES[arch], **NO_DROPOUT.get(arch, {})}
    made = recipe(model_keys, **{"data.document_mask": True, "train.activation_checkpointing": checkpointing})
    model = made.build()
    rng = np.random.default_rng(1)
    content = rng.integers(1, 96, (3, 64)).astype(np.int32)
    ends = [[9, 30, 62], [63], [0, 1, 20]]
    for row, places in zip(content, ends, strict=True):
        row[places] = END
    with torch.no_grad():
        inputs = {k: v for k, v in made.batch(content).items() if k != "labels"}
        packed = model(**inputs).logits
        for row, places, got in zip(content, ends, packed, strict=True):
            edges = sorted({0, *(p + 1 for p in places), 64})
            for begin, end in itertools.pairwise(edges):
                alone = model(input_ids=torch.from_numpy(row[None, begin:end].astype(np.int64))).logits[0]
                assert torch.allclose(got[begin:end], alone, atol=1e-5, rtol=0)
        unmasked = model(input_ids=inputs["input_ids"]).logits
        assert (unmasked[0, 31:] - packed[0, 31:]).abs().max() > 1e-4, "without the mask they do see each other"


@pytest.mark.parametrize("arch", sorted(SHAPES))
def test_a_batchs_loss_is_the_sum_of_its_samples(arch):
    """loss() sums terms, so a step's loss doesn't depend on the split of its samples into micro-batches."""
    torch.manual_seed(0)
    made = recipe({**SHAPES[arch], **NO_DROPOUT.get(arch, {})})
    model = made.build()
    content = np.random.default_rng(0).integers(0, 96, (4, 64)).astype(np.int32)
    with torch.no_grad():
        whole = made.loss(model, made.batch(content)).sum.item()
        parts = sum(made.loss(model, made.batch(content[i : i + 1])).sum.item() for i in range(4))
        logits = model(input_ids=torch.from_numpy(content).long()).logits.log_softmax(-1)
    naive = -sum(logits[b, t - 1, int(content[b, t])].item() for b in range(4) for t in range(1, 64))
    assert whole == pytest.approx(parts, rel=1e-5) == pytest.approx(naive, rel=1e-4)


@pytest.mark.parametrize(("key", "value", "says"), [
    ("hidden_act", "siluu", "model.hidden_act: 'siluu' isn't an activation. Did you mean 'silu'?"),
    ("num_hidden_layers", -1, "model.num_hidden_layers: expected at least 1, got -1"),
])  # fmt: skip
def test_values_that_only_building_would_find_are_found_before(key, value, says):
    assert says in refusal({**LLAMA, key: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blockwise_loss_is_cross_entropy_and_its_gradient(dtype):
    """The sum and the gradient equal torch's, for any block boundaries and ignored targets."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(700, 4096, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, 4096, (700,), generator=generator)
    targets[torch.rand(700, generator=generator) < 0.2] = IGNORED
    ours = SummedCrossEntropy.apply(logits, targets)
    (ours * 0.37).backward()
    gradient, logits.grad = logits.grad, None
    theirs = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    (theirs * 0.37).backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-7)
