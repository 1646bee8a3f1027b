"""Tests the export of weights: memory holds pieces, never the model, a large model has several files, and plain `from_pretrained`
loads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from heliostat.checkpoint import saver as checkpoint
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.config import spec
from heliostat.inference import export
from heliostat.storage.locations import Location
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.integration import ranks
from tests.unit import build_index

TENSORS, NUMEL = 24, 4 << 20  # 400 MB in fp32
FACTS: dict[str, Any] = build_index.facts()


def _peak_mb(reset: bool = False) -> float:
    """Returns the peak memory of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def streams(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    run, out = Location(folder), Path(folder) / "out"
    saver = checkpoint.Saver(run, spec.Checkpoint(every=1), group)
    state = {f"master.{i}": FlatShard(torch.full((NUMEL,), float(i)), 0, NUMEL) for i in range(TENSORS)}
    saver.save(1, state, FACTS)
    saver.wait()
    del saver, state
    found = checkpoint.open_checkpoint(run, 1)
    out.mkdir()
    before = _peak_mb(reset=True)
    export.write_weights(found, {str(i): (2, NUMEL // 2) for i in range(TENSORS)}, torch.bfloat16, out / "model")
    yield {"growth_mb": _peak_mb() - before}
    read = load_file(out / "model.safetensors")
    yield {"right": all(torch.equal(read[str(i)], torch.full((2, NUMEL // 2), i).bfloat16()) for i in range(TENSORS))}


def test_the_model_is_never_in_memory(tmp_path: Path) -> None:
    """For 100M parameters: 200 MB in bf16, from 400 MB of master weights."""
    told = ranks.run(f"{__name__}:streams", (1,), str(tmp_path))
    assert told[1]["right"]
    assert told[0]["growth_mb"] < 100


def llama(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Saves a model's weights, exports them in files of at most 100 kB, and loads them with transformers."""
    torch.manual_seed(3)
    shape: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, tie_word_embeddings=True, **shape))
    state = {f"master.{n}": FlatShard(p.detach().view(-1), 0, p.numel()) for n, p in model.named_parameters()}
    saver = checkpoint.Saver(Location(folder), spec.Checkpoint(every=1), group)
    saver.save(1, state, FACTS)
    saver.wait()
    export.SHARD_BYTES = 100_000
    out = Path(folder) / "out"
    model.config.save_pretrained(out)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    export.write_weights(checkpoint.open_checkpoint(Location(folder), 1), shapes, torch.float32, out / "model")
    again = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.arange(40)[None]
    yield {
        "sizes": [p.stat().st_size for p in sorted(out.glob("*.safetensors"))],
        "total": json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"],
        "expected": sum(p.numel() for p in model.parameters()) * 4,
        "equal": torch.equal(again(tokens).logits, model(tokens).logits),
    }


def test_several_files_with_an_index_load_with_plain_from_pretrained(tmp_path: Path) -> None:
    """Tied weights are included. No file exceeds the limit, except for a single tensor that does."""
    (told,) = ranks.run(f"{__name__}:llama", (1,), str(tmp_path))
    assert told["equal"] and told["total"] == told["expected"]
    assert len(told["sizes"]) > 2
    assert sum(size > 105_000 for size in told["sizes"]) == 1  # the embedding
