"""Held-out middles: a model trained to fill in the middle against one trained left to right, at equal tokens of the same files.

    python tests/benchmarks/fim.py [--steps 3000] [--seconds 0] [--rate 0.9] [--seeds 1]

Source code of Python's own library, files held out by the hash of their path; one byte-level BPE, one small Llama, AdamW,
batches of the same size. Scored are middles of spans of held-out files, cut as the pipeline cuts: nats a token of the middle.
The model that reads left to right is given the prefix alone, and the suffix before the prefix; the other one both, as its data
has them.
`--seconds`: of processor time of each training, after which it ends whatever the steps.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

from heliostat.data.infilling import OWN, Markers, encode, find  # noqa: E402
from heliostat.pipelines.text import infilling, tokens  # noqa: E402
from heliostat.pipelines.text.infilling import Arranged, FillInTheMiddle, arrange  # noqa: E402

END, VOCABULARY, LENGTH, BATCH, SPAN, MIDDLES, LR = "<|endoftext|>", 768, 192, 8, 320, 300, 3e-3
MODEL = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 344, "max_position_embeddings": 2 * LENGTH, "tie_word_embeddings": True}  # fmt: skip


def corpus() -> tuple[list[str], list[str]]:
    """Files to train on, and files held out."""
    halves: tuple[list[str], list[str]] = ([], [])
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        if (text := path.read_text(errors="ignore")).strip():
            halves[hashlib.sha256(str(path.relative_to(root)).encode()).digest()[0] < 26].append(text)
    return halves


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def rows(flat: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """Yields batches of consecutive tokens, from places that are drawn anew each time."""
    draw = np.random.default_rng(seed)
    while True:
        starts = draw.integers(0, len(flat) - LENGTH, BATCH)
        yield torch.from_numpy(np.stack([flat[at : at + LENGTH] for at in starts])).long()


def train(flat: np.ndarray, steps: int, seconds: float, seed: int) -> tuple[LlamaForCausalLM, int]:
    """Trains, and returns the model and the steps that were taken."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **MODEL))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    begun, step = time.process_time(), 0
    for step, batch in enumerate(itertools.islice(rows(flat, seed), steps), 1):
        spent = (time.process_time() - begun) / seconds if seconds else 0.0
        if spent >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LR * min(step / 50, 1.0) * (1 - max(spent, step / steps) * 0.95)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"  step {step}: {loss.item():.3f}, {time.process_time() - begun:.0f} s", file=sys.stderr)
    return model.eval(), step


def cut(held: list[str]) -> list[Arranged]:
    """Cuts spans of held-out files, as the pipeline does."""
    keys, found = FillInTheMiddle(rate=1, spm_rate=0, span_chars=SPAN, seed=1), list[Arranged]()
    for text in held:
        found += [one for one in arrange(text, digest(text), keys) if isinstance(one, Arranged) and one.middle]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:MIDDLES]]


@torch.no_grad()
def nats(model: LlamaForCausalLM, before: list[list[int]], middles: list[list[int]]) -> tuple[float, float]:
    """Computes the nats a token of the middles behind what is before each, and the standard error of that."""
    lost, count = [], []
    for prompt, middle in zip(before, middles, strict=True):
        ids = torch.tensor([[*prompt, *middle]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        lost.append(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item())
        count.append(len(middle))
    each, sizes = np.array(lost), np.array(count)
    value = each.sum() / sizes.sum()
    return float(value), float(np.sqrt(((each - value * sizes) ** 2).sum()) / sizes.sum())


def prompts(pieces: list[list[list[int]]], markers: Markers, end: int) -> dict[str, list[list[int]]]:
    """Returns what stands before each middle, by name."""
    return {
        "left to right, given the prefix": [[end, *prefix] for prefix, _, _ in pieces],
        "left to right, given suffix and prefix": [[end, *suffix, *prefix] for prefix, _, suffix in pieces],
        "fill in the middle, given both (PSM)": [[end, *markers.prompt(prefix, suffix, False)] for prefix, _, suffix in pieces],
        "fill in the middle, given both (SPM)": [[end, *markers.prompt(prefix, suffix, True)] for prefix, _, suffix in pieces],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    texts, held = corpus()
    tokenizer = tokens.load(tokens.train(texts[::4], VOCABULARY, END, OWN))
    end, markers = tokens.end_id(tokenizer, END), find(tokenizer, OWN)
    keys = FillInTheMiddle(rate=asked.rate, spm_rate=0.5, span_chars=SPAN)
    plain = np.concatenate(tokens.encode(tokenizer, texts, end))
    arranged = np.concatenate(infilling.encode(tokenizer, [arrange(t, digest(t), keys) for t in texts], end, markers))
    pieces = [encode(tokenizer, list(one.pieces)) for one in cut(held)]
    middles = [middle for _, middle, _ in pieces]
    print(f"{len(plain):,} tokens of {len(texts)} files, {len(arranged):,} rearranged; {len(middles)} middles of {len(held)} "
          f"files, {mean(map(len, middles)):.0f} tokens each")  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {}
    most = asked.steps
    for seed in range(asked.seeds):
        for way, flat in (("fill in the middle", arranged), ("left to right", plain)):
            model, taken = train(flat, most, 0.0 if way == "left to right" else asked.seconds, seed)
            most = taken if way == "fill in the middle" else asked.steps  # both see as many tokens
            print(f"{way}, seed {seed}: {taken} steps of {BATCH} x {LENGTH} tokens")
            for name, before in prompts(pieces, markers, end).items():
                if name.startswith(way):
                    found.setdefault(name, []).append(nats(model, before, middles))
            whole = [[end] for _ in pieces]
            found.setdefault(f"{way}: whole spans, nothing before", []).append(
                nats(model, whole, [[*p, *m, *s] for p, m, s in pieces])
            )
    print("\n| trained, and given | nats a token |\n|---|---:|")
    for name, values in sorted(found.items()):
        print(f"| {name} | {mean(v for v, _ in values):.3f} ± {mean(e for _, e in values):.3f} |")


if __name__ == "__main__":
    main()
