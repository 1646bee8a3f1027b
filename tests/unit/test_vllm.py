"""Tests vLLM as the other engine: when it is used, and its requests, checked against its own classes if it is installed.

No GPU runs vLLM here. A replacement of its two classes records the requests, and answers with the real model's most likely
tokens.
"""

import asyncio
import dataclasses
import json
import os
import queue
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from heliostat import extras
from heliostat.apps.serve.row import Row, Stopping
from heliostat.errors import ConfigError, HeliostatError
from heliostat.inference import vllm_engine
from heliostat.inference.batch import engines, loading
from heliostat.inference.batch.engines import Input
from heliostat.inference.batch.run import claim
from heliostat.inference.batch.tasks import BatchSettings
from heliostat.inference.sampling import Draw
from heliostat.storage.locations import Location
from heliostat.web.refusals import Refusal
from safetensors.torch import save_file

from tests.unit.build_language_model import PROMPTS

# which engine ------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_or_the_package_transformers_answers_and_says_why(model, tmp_path):
    assert loading.choose("transformers", model, "chat", 1) == ("transformers", transformers.__version__)
    assert loading.choose("auto", model, "chat", 0) == ("transformers", "this machine has no GPU")
    assert loading.choose("auto", model, "classify", 1) == (
        "transformers",
        "heliostat doesn't support vLLM for the task classify",
    )
    (tmp_path / "config.json").write_text('{"model_type": "clip", "architectures": ["CLIPModel"]}')
    assert loading.choose("auto", tmp_path, "embed", 1)[1] == "heliostat doesn't support vLLM for CLIP embeddings"
    with pytest.raises(ConfigError, match="--engine: 'tensorrt' isn't an engine"):
        loading.choose("tensorrt", model, "chat", 1)


def test_where_vllm_is_not_installed_a_line_says_how_it_comes(model):
    if "vllm" in sys.modules or loading.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    assert loading.choose("auto", model, "chat", 1)[1] == f"vLLM isn't installed ({extras.command('vllm')})"
    with pytest.raises(HeliostatError) as found:
        loading.choose("vllm", model, "chat", 0)
    assert str(found.value) == f"--engine vllm needs the extra 'vllm' (no module 'vllm'). Run: {extras.command('vllm')}"


def test_a_model_that_vllm_has_not_is_answered_by_transformers_or_refused(model, vllm):
    known = {"LlamaForCausalLM"}
    assert loading.choose("auto", model, "serve", 1, lambda: known) == ("vllm", "0.33.0")
    assert loading.choose("auto", model, "serve", 1, set) == ("transformers", "vLLM doesn't support LlamaForCausalLM")
    with pytest.raises(ConfigError, match=r"--engine vllm: vLLM doesn't support LlamaForCausalLM\. Use --engine transformers"):
        loading.choose("vllm", model, "serve", 1, set)
    with pytest.raises(ConfigError, match="--engine vllm: this machine has no GPU"):
        loading.choose("vllm", model, "serve", 0, lambda: known)


def test_answers_of_one_engine_are_not_gone_on_with_by_the_other(tmp_path):
    """An answer from a version with one engine resumes with that engine."""
    old, new = BatchSettings(), BatchSettings(engine="vllm")
    assert "engine" not in old.identity and new.identity["engine"] == "vllm"
    for first, then in ((old, new), (new, old)):
        place = Location(str(tmp_path / first.engine))
        claim(place, {"model": "a", **first.identity}, "answers", "batch inference")
        claim(place, {"model": "a", **first.identity}, "answers", "batch inference")
        with pytest.raises(ConfigError, match="contains answers of another engine"):
            claim(place, {"model": "a", **then.identity}, "answers", "batch inference")


# what is asked -----------------------------------------------------------------------------------------------------------


def test_scores_add_up_and_one_that_is_missing_is_an_error():
    at = [None, {5: SimpleNamespace(logprob=-1.5)}, {7: SimpleNamespace(logprob=-0.5), 8: SimpleNamespace(logprob=-0.1)}]
    assert vllm_engine.nats([3, 5, 7], at) == 2.0
    for tokens, found in (([3, 5], at), ([3, 5, 9], at), ([3, 5, 7], [*at[:2], None])):
        with pytest.raises(ValueError, match="vLLM scored only"):
            vllm_engine.nats(tokens, found)
    told = vllm_engine.probabilities(at[2], 7, 1)
    assert told == {"chosen": -0.5, "best": [(8, -0.1)]} and vllm_engine.probabilities(at[2], 7, 0)["best"] == []
    assert [vllm_engine.rank(n) for n in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]
    with pytest.raises(ConfigError, match="up to rank 512, not 513"):
        vllm_engine.rank(513)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_vllms_own_class_takes_what_is_asked_and_changes_none_of_it(temperature):
    params = pytest.importorskip("vllm.sampling_params", exc_type=ImportError)
    for asked in (vllm_engine.sampling(7, temperature, 0.9, -1, {9, 3}, 5), vllm_engine.scoring()):
        made = params.SamplingParams(**asked)
        kept = {name: getattr(made, name) for name in asked}
        assert kept == asked | ({"top_p": 1.0} if temperature == 0 and "top_p" in asked else {})
    assert made.n == 1 and params.SamplingParams(**vllm_engine.sampling(1, 0.5, 1.0, -1, [])).seed == 2**63 - 1


def test_vllms_own_class_of_an_engine_has_every_key(model):
    args = pytest.importorskip("vllm.engine.arg_utils", exc_type=ImportError)
    asked = vllm_engine.engine_options(model, transformers.AutoConfig.from_pretrained(model), 32, 16, [4])
    assert asked.keys() <= {field.name for field in dataclasses.fields(args.AsyncEngineArgs)}


# engines -----------------------------------------------------------------------------------------------------------------


class Likeliest:
    """Replaces vLLM: returns the most likely tokens of its model, up to and including an end token."""

    def __init__(self, model: str, **asked: Any) -> None:
        self.asked, self.model = asked, transformers.AutoModelForCausalLM.from_pretrained(model).eval()
        self.model_config = SimpleNamespace(max_model_len=asked["max_model_len"] or 24)

    def tokens(self, prompt: list[int], params: Any) -> tuple[list[int], list[dict[int, Any]], list[Any]]:
        made, told = list[int](), list[dict[int, Any]]()
        with torch.inference_mode():
            while len(made) < params.max_tokens and not (made and made[-1] in params.stop_token_ids):
                found = torch.log_softmax(self.model(torch.tensor([prompt + made])).logits[0, -1].double(), -1)
                best = found.topk(max(1, params.logprobs or 0)).indices.tolist()
                told.append({token: SimpleNamespace(logprob=float(found[token])) for token in best})
                made.append(best[0])
            scores = torch.log_softmax(self.model(torch.tensor([prompt])).logits[0].double(), -1)
        own = [None, *({t: SimpleNamespace(logprob=float(scores[i, t]))} for i, t in enumerate(prompt[1:]))]
        return made, told, own

    def generate(self, prompts: list[dict], params: list[Any], use_tqdm: bool) -> list[Any]:
        found = [self.tokens(one["prompt_token_ids"], p) for one, p in zip(prompts, params, strict=True)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=made)], prompt_logprobs=own) for made, _, own in found]


class Streaming(Likeliest):
    errored = False

    @classmethod
    def from_engine_args(cls, args: Any) -> "Streaming":
        return cls(**vars(args))

    async def generate(self, prompt, params, request_id, *, lora_request=None):  # type: ignore[override]
        made, told, _ = self.tokens(prompt["prompt_token_ids"], params)
        for sent in range(2, len(made) + 2, 2):
            await asyncio.sleep(0)
            some = SimpleNamespace(token_ids=made[:sent], logprobs=told[:sent], finish_reason=None)
            yield SimpleNamespace(outputs=[some])


@pytest.fixture
def vllm(monkeypatch):
    """Replaces the two modules that are imported from vLLM."""
    made, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    keys = {"max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "seed": None, "stop_token_ids": [], "logprobs": None,
            "prompt_logprobs": None, "detokenize": True}  # fmt: skip
    made.LLM, made.AsyncLLMEngine, made.AsyncEngineArgs = Likeliest, Streaming, SimpleNamespace  # type: ignore[attr-defined]
    made.SamplingParams = lambda **asked: SimpleNamespace(**{**keys, **asked})  # type: ignore[attr-defined]
    request.LoRARequest = SimpleNamespace  # type: ignore[attr-defined]
    for name, module in (("vllm", made), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(loading, "find_spec", lambda name: made)
    monkeypatch.setattr(loading.extras, "find_spec", lambda name: made)
    monkeypatch.setattr(loading, "version", lambda name: "0.33.0")
    return made


def test_what_is_made_of_its_tokens_is_what_the_other_engine_answers(model, vllm):
    """Continuations with their ends, scores, and bad inputs, of one piece in one call."""
    options = {"max_tokens": 6, "temperature": 0.0}
    asked = [*PROMPTS, Input("a " * 200, 0)]
    ours, theirs = (loading.engine(model, "continue", 4, options, by) for by in ("transformers", "vllm"))
    assert [vars(answer) for answer in theirs(asked)] == [vars(answer) for answer in ours(asked)]
    assert theirs.llm.asked == {
        "dtype": "float32", "max_model_len": 32, "max_num_seqs": 4, "trust_remote_code": False, "generation_config": "vllm",
        "max_logprobs": 20, "logprobs_mode": "raw_logprobs", "disable_log_stats": True,
    }  # fmt: skip
    texts = [one for one in asked if one.text]
    for one, other in zip(engines.Score(model, 4)(texts), loading.engine(model, "score", 4, {}, "vllm")(texts), strict=True):
        if not one.values["truncated"]:
            assert other.values == pytest.approx(one.values, rel=1e-5)
    assert other.values["truncated"] and other.values["tokens"] == one.values["tokens"] - 1  # room for the token that is drawn


def test_a_stream_of_its_tokens_is_told_as_the_other_engine_tells_it(model, vllm):
    from heliostat.apps.serve.engine import ServingEngine, VllmEngine

    def rows(tokenizer: Any, found: queue.Queue) -> list[Row]:
        kinds = [(9, [], 2), (6, [], None), (9, ["e"], None)]
        return [
            Row(tokenizer("a b")["input_ids"], most, Draw(0.0, 1.0, 1), Stopping(stops),
                lambda piece, n=n: found.put((n, piece)), logprobs)
            for n, (most, stops, logprobs) in enumerate(kinds)
        ]  # fmt: skip

    def told(found: queue.Queue) -> list[dict]:
        made = [{"text": "", "tokens": [], "values": []} for _ in range(3)]
        while any("finish" not in one for one in made):
            n, piece = found.get(timeout=60)
            assert "failed" not in piece, piece
            made[n]["text"] += piece["text"]
            made[n]["tokens"] += (piece["logprobs"] or {}).get("tokens", [])
            made[n]["values"] += (piece["logprobs"] or {}).get("token_logprobs", [])
            made[n] |= {key: piece[key] for key in ("finish", "completion_tokens", "prompt_tokens") if key in piece}
        return made

    ours, found = ServingEngine(engines.LoadedModel(model), 4), queue.Queue[Any]()
    ours.begin(rows(ours.loaded.tokenizer, found))
    wanted = told(found)
    theirs = VllmEngine(model, 4, {})

    async def run() -> None:
        theirs.begin(rows(theirs.loaded.tokenizer, found))
        await asyncio.gather(*theirs.tasks)

    asyncio.run(run())
    for one, other in zip(told(found), wanted, strict=True):
        assert one.pop("values") == pytest.approx(other.pop("values"), abs=1e-4) and one == other
    assert found.empty()


def test_texts_are_not_embedded_where_vllm_answers(model, vllm):
    from heliostat.apps.serve.writer import Writer

    with pytest.raises(Refusal, match="--engine transformers"):
        asyncio.run(Writer(model, 1, engine="vllm").embed(["a"]))


def test_what_vllm_is_made_with_asks_no_hub_and_tells_nobody(model, monkeypatch):
    """A folder's name is never taken for one of the Hub, weights without a precision are fp32, as everywhere, and vLLM sends no
    usage data."""
    monkeypatch.chdir(model.parent)
    asked = vllm_engine.engine_options(Path(model.name), transformers.LlamaConfig(), None, 1)
    assert asked["model"] == str(model) and asked["dtype"] == "float32"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert vllm_engine.sampling(1, 0.0, 1.0, 0, [3])["ignore_eos"]


def test_ends_that_config_json_alone_names_end_answers_with_either_engine(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 40]}))
    found = [engines.LoadedModel(folder, weights=weights).generation().eos_token_id for weights in (False, True)]
    assert found == [[3, 40], [3, 40]]


def test_vllms_own_limit_is_that_of_prompts(model, vllm, monkeypatch):
    from heliostat.apps.serve.engine import VllmEngine

    monkeypatch.setattr(vllm_engine, "engine_options", lambda folder, *_: {"model": str(folder), "max_model_len": None})
    assert VllmEngine(model, 1, {}).loaded.longest == loading.engine(model, "score", 1, {}, "vllm").longest == 24


def test_an_adapter_of_another_model_is_refused_before_vllm_starts(model, vllm, tmp_path):
    from heliostat.apps.serve.engine import VllmEngine

    (tmp_path / "one").mkdir()
    (tmp_path / "one/adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{path}.lora_A.weight": torch.ones(4, 9), f"{path}.lora_B.weight": torch.ones(9, 4)}
    save_file(pair, tmp_path / "one/adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"q_proj: the adapter's matrices are .*\. Pass an adapter of this model"):
        VllmEngine(model, 4, {"one": str(tmp_path / "one")})


def test_a_request_that_nobody_waits_for_is_aborted_and_a_dead_core_ends_the_replica(model, vllm, monkeypatch):
    from heliostat.apps.serve import engine as serving

    engine, found, seen = serving.VllmEngine(model, 4, {}), queue.Queue[Any](), []

    async def waits(*_, **__):
        try:
            await asyncio.sleep(60)
            yield
        finally:
            seen.append("aborted")

    async def dies(*_, **__):
        engine.stream.llm.errored = True
        raise RuntimeError("the core has died")
        yield

    async def run(generate: Any, leave: bool) -> None:
        monkeypatch.setattr(engine.stream.llm, "generate", generate)
        row = Row([5, 6], 4, Draw(0.0, 1.0, 1), Stopping(), found.put)
        engine.begin([row])
        await asyncio.sleep(0)
        if leave:
            row.leave()
        await asyncio.wait(engine.tasks)

    asyncio.run(run(waits, leave=True))
    assert seen == ["aborted"] and found.empty()
    monkeypatch.setattr(serving.os, "_exit", seen.append)
    asyncio.run(run(dies, leave=False))
    assert seen == ["aborted", 1]


def test_a_stream_that_vllm_breaks_off_fails_and_the_others_go_on(model, vllm, monkeypatch):
    from heliostat.apps.serve.engine import VllmEngine

    engine, found = VllmEngine(model, 4, {}), queue.Queue[Any]()
    plain = engine.stream.llm.tokens
    monkeypatch.setattr(engine.stream.llm, "tokens", lambda prompt, p: ([1], [{}], []) if p.seed == 3 else plain(prompt, p))
    asked = [Row([5, 6], 4, Draw(0.0, 1.0, seed), Stopping(), lambda piece, n=seed: found.put((n, piece))) for seed in (2, 3)]

    async def run() -> None:
        engine.begin(asked)
        await asyncio.gather(*engine.tasks)

    asyncio.run(run())
    ended = {n: piece for n, piece in [found.get_nowait() for _ in range(found.qsize())] if {"finish", "failed"} & piece.keys()}
    assert ended[2]["finish"] and "before its end" in ended[3]["failed"]
