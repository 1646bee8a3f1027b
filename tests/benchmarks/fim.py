"""Compares a model trained to fill in the middle with one trained left to right, on held-out middles, with equal training tokens.

    python -m tests.benchmarks.fim --models FOLDER [--steps 2000] [--seeds 1] [--train fim|plain] [--middles 250]

Each model is trained once and kept in FOLDER, so another evaluation trains nothing; `--train` trains the models of one way and
evaluates nothing. The following was decided before any result was known.

**Trained**: on the source code of Python's own library (without its tests; files are held out by the hash of their path). Both
have one byte-level BPE, one Llama of 1.4M parameters, bf16 autocast, Muon for the matrices of the layers and AdamW for the rest,
and batches of the same size. `fim` uses the pipeline's own form: 9 in 10 spans are rearranged, half of those suffix first, cut
anywhere. A row begins at the beginning of a span, so that a window holds a whole span. `plain` uses files unchanged, with rows
from anywhere.

**Evaluated**: on middles of spans of held-out files, so that both models see a context as long as the training rows. There are
four cuts: "rest of a line" (from within a line to its end), "words" (1 to 4 within a line, with text after them), "line" (a whole
one), and "anywhere" (the pipeline's own random cut). The first three are at token bounds of the uncut span, so no model reads
tokens that it wouldn't see in plain text. "anywhere" isn't, which is a disadvantage for left to right. All cuts have the same
number of middles, which are also grouped by their number of tokens. Added after the first results were known: middles of
"anywhere" without their first two tokens and their last one, where such cuts have their effect.

**Context**: `fim` gets the prefix and the suffix, in both orders. `plain` gets the prefix alone, or the suffix before the prefix
(with a line break between them). The token that ends documents comes first where the training rows have it: before the beginning
of a file for `plain`.

**Nats** per token of the middle, for both, without the end of the middle. That has its own column: for `fim`, the token that ends
the middle, which it must write. `plain` has no such token; the nearest one is the suffix's first token after the middle. The two
are different events.

**Greedy** middles of up to 32 tokens: exact match and edit similarity, as in `heliostat model benchmark`. `fim` ends its middle
itself. `plain` is evaluated twice: *told* the number of characters of the true middle, which is more than any editor knows; and
alone, cut like in an editor: where it repeats the suffix's first 8 characters (after its spaces), else after its line.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from heliostat.curation.text import infilling, tokens
from heliostat.curation.text.infilling import Arranged, FillInTheMiddle, arrange, spans
from heliostat.data.infilling import OWN, Markers, encode, find
from heliostat.evaluation.measures import edit_similarity
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import harness

END, VOCABULARY, LENGTH, BATCH, SPAN, MOST, LR, MATRIX_LR = "<|endoftext|>", 1024, 256, 16, 576, 32, 3e-3, 0.02
MODEL = {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5, "num_key_value_heads": 5,
         "intermediate_size": 432, "max_position_embeddings": 4 * LENGTH, "tie_word_embeddings": True}  # fmt: skip
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"}
CLASSES = ((1, 4), (5, 8), (9, 16), (17, 32), (33, 1000))
FELT = (2, 1)  # tokens at a middle's beginning and end in which a cut within a token is felt
CUTS = ("rest of a line", "words", "line", "anywhere")
WAYS = {
    "plain": ("left to right, the prefix", "left to right, suffix, prefix"),
    "fim": ("middle, prefix first", "middle, suffix first"),
}


@dataclass(frozen=True)
class Middle:
    """Holds a middle of a held-out file and its tokens. `begins`: whether its prefix begins the file."""

    cut: str
    texts: tuple[str, str, str]
    ids: list[list[int]]
    begins: bool


def corpus() -> tuple[list[str], list[str]]:
    """Returns files to train on, and held-out files."""
    halves: tuple[list[str], list[str]] = ([], [])
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts) and (text := path.read_text(errors="ignore")).strip():
            halves[hashlib.sha256(str(name).encode()).digest()[0] < 26].append(text)
    return halves


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def rows(flat: np.ndarray, starts: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """Yields batches of consecutive tokens that begin at these places. Each place appears once before any repeats."""
    draw, left = np.random.default_rng(seed), np.zeros(0, np.int64)
    while True:
        if len(left) < BATCH:
            left = np.concatenate([left, draw.permutation(starts)])
        chosen, left = left[:BATCH], left[BATCH:]
        yield torch.from_numpy(np.stack([flat[at : at + LENGTH] for at in chosen])).long()


def train(flat: np.ndarray, starts: np.ndarray, steps: int, seed: int) -> LlamaForCausalLM:
    """Trains a model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **MODEL))
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not one for one in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)]  # fmt: skip
    peaks, begun = [MATRIX_LR, LR], time.process_time()
    for step, batch in zip(range(1, steps + 1), rows(flat, starts, seed), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(step / 50, 1.0) * min(1.0, 2 * (1 - step / steps) + 0.02)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step}: {loss.item():.3f}, {time.process_time() - begun:.0f} s", file=sys.stderr, flush=True)
    return model


def middles(held: list[str], tokenizer: Tokenizer, most: int) -> list[Middle]:
    """Splits spans of held-out files; uses each kind of split at most once per span."""
    draw, found = np.random.default_rng(0), {cut: list[Middle]() for cut in CUTS}
    keys = FillInTheMiddle(rate=1, spm_rate=0, span_chars=SPAN, seed=1)
    places = [(text, number) for text in held for number in range(len(spans(text, SPAN)))]
    for text, number in (places[i] for i in draw.permutation(len(places))):
        span = spans(text, SPAN)[number]
        for cut, made in found.items():
            if len(made) < most and (pieces := pieces_of(cut, span, draw, (text, keys, number))):
                ids = encode(tokenizer, list(pieces))
                if cut == "anywhere" or list(chain.from_iterable(ids)) == encode(tokenizer, [span])[0]:
                    made.append(Middle(cut, pieces, ids, number == 0))
        if all(len(made) == most for made in found.values()):
            break
    return list(chain.from_iterable(found.values()))


def pieces_of(
    cut: str, span: str, draw: np.random.Generator, own: tuple[str, FillInTheMiddle, int]
) -> tuple[str, str, str] | None:
    """Splits a span in three, at a random place; None if it has no such place."""
    if cut == "anywhere":
        text, keys, number = own
        one = arrange(text, digest(text), keys)[number]
        return one.pieces if isinstance(one, Arranged) and one.middle else None
    lines = list(re.finditer(r"(?<=\n)[ \t]*(\S[^\n]*)\n", span))[1:-1]
    if not lines:
        return None
    line = lines[draw.integers(len(lines))]
    words = [line.start(1) + at.start() for at in re.finditer(r"\s*(\w+|[^\w\s])", line[1])]
    if cut == "line":
        first, last = line.start(), line.end()
    elif len(words) < 3:
        return None
    elif cut == "rest of a line":
        first, last = words[draw.integers(1, len(words))], line.end(1)
    else:
        begin = int(draw.integers(0, len(words) - 1))
        first, last = words[begin], words[min(begin + int(draw.integers(1, 5)), len(words) - 1)]
    return span[:first], span[first:last], span[last:]


def prompts(all_: list[Middle], markers: Markers, end: int, tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Returns the text before each middle, by the name of the given context."""
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    made: dict[str, list[list[int]]] = {name: [] for names in WAYS.values() for name in names}
    for one in all_:
        prefix, _, suffix = one.ids
        alone, both = WAYS["plain"]
        made[alone].append([end, *prefix] if one.begins or not prefix else prefix)
        made[both].append([*suffix, *newline, *prefix] if suffix or prefix else [end])
        for name, first in zip(WAYS["fim"], (False, True), strict=True):
            made[name].append([end, *markers.prompt(prefix, suffix, first)])
    return made


@torch.no_grad()
def nats(model: LlamaForCausalLM, prompt: list[int], middle: list[int], last: int) -> tuple[float, float, float]:
    """Computes the nats of a middle, of the token after it, and of the middle within its cuts."""
    ids = torch.tensor([[*prompt, *middle, last]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    lost = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none")
    return lost[:-1].sum().item(), lost[-1].item(), lost[FELT[0] : -1 - FELT[1]].sum().item()


@torch.no_grad()
def greedy(model: LlamaForCausalLM, before: list[list[int]], most: int, end: int) -> list[list[int]]:
    """Continues prompts with the most likely tokens until each ends, the short prompts first."""
    made: dict[int, list[int]] = {}
    order = sorted(range(len(before)), key=lambda i: len(before[i]))
    for chosen in (order[i : i + 25] for i in range(0, len(order), 25)):
        longest = max(len(before[i]) for i in chosen)
        ids = torch.tensor([[end] * (longest - len(before[i])) + before[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(before[i])) + [1] * len(before[i]) for i in chosen])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=end, eos_token_id=end)
        made |= {i: row[longest:].tolist() for i, row in zip(chosen, out, strict=True)}
    return [made[i] for i in range(len(before))]


def as_editors_cut(text: str, suffix: str) -> str:
    """Truncates the written text where it repeats the suffix, else at the end of its line, which may be the suffix's."""
    goes_on = suffix[: len(suffix) - len(suffix.lstrip()) + 8]
    if goes_on and (at := text.find(goes_on)) >= 0:
        return text[:at]
    line, stop, _ = text.partition("\n")
    return line if suffix.startswith("\n") else line + stop


def judge(model: LlamaForCausalLM, way: str, all_: list[Middle], before: list[list[int]], tokenizer: Tokenizer, end: int,
          markers: Markers) -> dict[str, np.ndarray]:  # fmt: skip
    """Measures each middle. Greedy results are NaN for middles longer than MOST tokens."""
    told = [nats(model, p, one.ids[1], end if way == "fim" or not one.ids[2] else one.ids[2][0])
            for p, one in zip(before, all_, strict=True)]  # fmt: skip
    out = dict(zip(("nats", "end", "inner"), np.array(told).T, strict=True))
    short = [i for i, one in enumerate(all_) if len(one.ids[1]) <= MOST]
    special = {end, markers.prefix, markers.suffix, markers.middle}
    written = greedy(model, [before[i] for i in short], MOST + 8, end)
    for name in ("exact", "similar", "exact told", "similar told"):
        out[name] = np.full(len(all_), np.nan)
    for i, ids in zip(short, written, strict=True):
        _, middle, suffix = all_[i].texts
        stop = next((at for at, token in enumerate(ids) if token in special), len(ids))
        text = tokenizer.decode(ids[:stop])
        own = text if way == "fim" else as_editors_cut(text, suffix)
        for more, answer in (("", own), (" told", text[: len(middle)])):
            out[f"exact{more}"][i], out[f"similar{more}"][i] = answer == middle, edit_similarity(answer, middle)
    return out


def table(title: str, groups: dict[str, np.ndarray], found: dict[str, dict[str, np.ndarray]], sizes: np.ndarray) -> None:
    """Prints a table: for each group of middles, the results of each way."""
    print()
    shown = ("exact", "similarity", "told: exact", "similarity")
    harness.head(title, "given", "middles", "nats a token", "a middle", "its end", *shown)
    for group, mask in groups.items():
        for name, value in found.items():
            if not mask.any():
                continue
            each, count = value["nats"][mask], sizes[mask]
            rate = each.sum() / count.sum()
            error = np.sqrt(((each - rate * count) ** 2).sum()) / count.sum()
            shares = [value[key][mask] for key in ("exact", "similar", "exact told", "similar told")]
            said = ["-" if np.isnan(one).all() else f"{np.nanmean(one):.3f}" for one in shares]
            ends = f"{value['end'][mask].mean():.2f}"
            harness.row(group, name, mask.sum(), f"{rate:.3f} ± {error:.3f}", f"{each.mean():.2f}", ends, *said)


def paired(groups: dict[str, np.ndarray], found: dict[str, dict[str, np.ndarray]]) -> None:
    """Prints the difference of each fill-in-the-middle way from the better left-to-right one, middle by middle."""
    print()
    harness.head("middles", "given", "nats a middle less", "exact more, both by themselves", "both told")
    for group, mask in groups.items():
        for name in WAYS["fim"]:
            said = []
            for key, sign in (("nats", -1), ("exact", 1), ("exact told", 1)):
                others = [found[other][key][mask] for other in WAYS["plain"]]
                best = max(others, key=lambda one: sign * np.nanmean(one)) if not np.isnan(others[0]).all() else others[0]
                gain = sign * (found[name][key][mask] - best)
                gain = gain[~np.isnan(gain)]
                said.append(f"{gain.mean():+.3f} ± {gain.std() / np.sqrt(len(gain)):.3f}" if len(gain) else "-")
            harness.row(group, name, *said)


def within(chosen: np.ndarray, found: dict[str, dict[str, np.ndarray]], sizes: np.ndarray) -> None:
    """Prints nats within the cuts of middles, and their difference from those of each left-to-right way."""
    chosen, taken = chosen & (sizes > sum(FELT)), sizes - sum(FELT)
    print()
    harness.head("given", f"nats a token, {chosen.sum()} middles", *(f"fewer than {n}" for n in WAYS["plain"]))
    for name, value in found.items():
        rate, gains = value["inner"][chosen].sum() / taken[chosen].sum(), []
        for other in WAYS["plain"]:
            gain = found[other]["inner"][chosen] - value["inner"][chosen]
            gains.append("" if name in WAYS["plain"] else f"{gain.mean():+.2f} ± {gain.std() / np.sqrt(len(gain)):.2f} a middle")
        harness.row(name, f"{rate:.3f}", *gains)


def trained(way: str, seed: int, folder: Path, steps: int, data: Callable[[], tuple[np.ndarray, np.ndarray]]) -> LlamaForCausalLM:
    """Returns the model of a way and a seed; trains it if the folder doesn't have it."""
    place = folder / f"{way}-{seed}-{steps}"
    if not (place / "config.json").exists():
        begun = time.process_time()
        train(*data(), steps, seed).save_pretrained(place)
        print(f"{way}, seed {seed}: {steps} steps of {BATCH} x {LENGTH} tokens, {time.process_time() - begun:.0f} s")
    return LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def main() -> None:
    asked = harness.arguments(
        __doc__, models={"type": Path, "required": True}, steps=2000, seeds=1, train={"choices": list(WAYS)}, middles=250
    )
    torch.set_num_threads(1)
    texts, held = corpus()
    definition = asked.models / "tokenizer.json"
    if not definition.exists():
        asked.models.mkdir(parents=True, exist_ok=True)
        definition.write_text(tokens.train(texts[::4], VOCABULARY, END, OWN))
    tokenizer = tokens.load(definition.read_text())
    end, markers = tokens.end_id(tokenizer, END), find(tokenizer, OWN)

    def data(way: str) -> tuple[np.ndarray, np.ndarray]:
        if way == "plain":
            flat = np.concatenate([np.array([end], np.int32), *tokens.encode(tokenizer, texts, end)])
            return flat, np.arange(len(flat) - LENGTH)
        keys = FillInTheMiddle(rate=0.9, spm_rate=0.5, span_chars=SPAN)
        made = infilling.encode(tokenizer, [arrange(t, digest(t), keys) for t in texts], end, markers)
        flat = np.concatenate([np.array([end], np.int32), *made])
        starts = np.flatnonzero(flat == end)  # a row's first token is the end of what is before its text
        sizes = np.diff(starts)
        print(f"{len(flat):,} tokens of {len(texts)} files, {len(starts):,} texts, {(sizes < LENGTH).mean():.0%} within a row")
        return flat, starts[starts < len(flat) - LENGTH]

    if asked.train:
        for seed in range(asked.seeds):
            trained(asked.train, seed, asked.models, asked.steps, lambda: data(asked.train))
        return
    all_ = middles(held, tokenizer, asked.middles)
    before = prompts(all_, markers, end, tokenizer)
    sizes = np.array([len(one.ids[1]) for one in all_])
    print(f"{len(all_)} middles of {len(held)} files, {sizes.mean():.0f} tokens each")
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for way, names in WAYS.items():
        for seed in range(asked.seeds):
            model = trained(way, seed, asked.models, asked.steps, lambda way=way: data(way))
            for name in names:
                found.setdefault(name, []).append(judge(model, way, all_, before[name], tokenizer, end, markers))
    mean = {name: {key: np.mean([one[key] for one in values], axis=0) for key in values[0]} for name, values in found.items()}
    kinds = np.array([one.cut for one in all_])
    by_cut = {cut: kinds == cut for cut in CUTS}
    editors = kinds != "anywhere"
    by_length = {f"{a} to {b}" if b < 1000 else f"{a} and more": editors & (sizes >= a) & (sizes <= b) for a, b in CLASSES}
    table("cut", by_cut, mean, sizes)
    table("tokens of the middle, editors' cuts", by_length, mean, sizes)
    table("all", {"editors' cuts": editors, "all": editors | ~editors}, mean, sizes)
    within(by_cut["anywhere"], mean, sizes)
    paired({"editors' cuts": editors, **by_cut, **by_length}, mean)


if __name__ == "__main__":
    main()
