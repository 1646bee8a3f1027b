"""Compares deduplication within each dump and over all dumps, by the held-out loss of small models with equal training tokens.

    pip download --no-deps --no-binary :all: -d SDISTS Django==2.2.28 Django==3.2.25 Django==4.2.16 Django==5.2    # and others
    python -m tests.benchmarks.dump_experiment SDISTS [--steps 300] [--seeds 1 2 3]

**Dumps**: the documentation (`.txt`, `.rst`) of several versions of packages, as a crawl finds pages again. The older half of a
package's versions is dump 1, the newer half is dump 2. So a page occurs up to twice in a dump, and up to four times in all.

**Datasets**: `exact` has all documents, without exact duplicates, as every pipeline of heliostat. `within` also ran `stage:
minhash` with `within: dump`, and `overall` without it. All three keep the longest document of a cluster.

**Pages** are divided by the hash of their names, because a short training sees few. One in ten is held out in all versions. Its
newest version is `new`, unless any version shares a band of 20 x 4 with a training document. (Such bands find 73 % of the pairs
with a Jaccard similarity of 0.5, and 99.99 % at 0.8.) Of another one in ten, only the newest version is held out. This version is
`near` if it shares a band of 14 x 8 with a training document, and isn't equal to one. The models train on the other versions of
these pages, and on all versions of two more in ten.

**Models**: a Llama of 0.4M parameters with one tokenizer for all, which is trained on `overall`. Every seed has the same first
weights and number of tokens in each dataset, and rows that begin at other places. The losses are nats per token over the first
rows of each held-out document.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from heliostat.curation.minhash.signatures import Parameters, keys
from heliostat.curation.text import tokens
from heliostat.data.infilling import encode
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import harness
from tests.unit.build_curation import curate, left

END, VOCABULARY, LENGTH, BATCH, LR, FIRST_ROWS = "<|endoftext|>", 1024, 128, 16, 4e-3, 4
MODEL = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 256, "max_position_embeddings": LENGTH, "tie_word_embeddings": True}  # fmt: skip
NAME = re.compile(r"(.+)-([\d.]+)\.tar\.gz")
LONGEST = 20_000  # characters of a document: with long ones, a short training would see few documents
TRAINED = (1, 2, 3)  # tenths of the pages to train on
STRICT, FINEWEB = Parameters(20, 4, 5, 1), Parameters(14, 8, 5, 1)
STAGES = {"exact": [], "within": [{"stage": "minhash", "within": "dump"}], "overall": [{"stage": "minhash"}]}


@dataclass(frozen=True)
class Page:
    """Holds one version of a page. `name` is the same for all versions; `newest`: whether no package has a newer version."""

    name: str
    dump: str
    newest: bool
    text: str


def pages(folder: Path) -> Iterator[tuple[str, Page]]:
    """Yields (id, page) for the documentation of the packages in a folder of source distributions."""
    packages = defaultdict[str, list[tuple[tuple[int, ...], Path]]](list)
    for path in folder.glob("*.tar.gz"):
        if match := NAME.fullmatch(path.name):
            packages[match[1].lower()].append((tuple(map(int, match[2].split("."))), path))
    for package, versions in sorted(packages.items()):
        for number, (_, path) in enumerate(sorted(versions)):
            dump = str(1 + number * 2 // len(versions))
            for name, text in documents(path):
                yield f"{dump}/{path.name}/{name}", Page(f"{package}/{name}", dump, number == len(versions) - 1, text)


def documents(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (path without the first folder, text) for the documentation in a source distribution."""
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith("doc") and name.endswith((".txt", ".rst")):
                source = archive.extractfile(member)
                text = source.read().decode("utf-8", "replace") if source else ""
                if 200 < len(text) < LONGEST:
                    yield name, text


def tenth(text: str, of: int) -> bool:
    """Chooses a tenth of the names. `of`: number of the tenth."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == of


def divided(found: dict[str, Page]) -> tuple[dict[str, Page], list[str], list[str]]:
    """Returns the documents to train on, and the texts that are held out: `new` and `near`."""
    apart = {id: page for id, page in found.items() if tenth(page.name, 0)}
    newest = {id: page for id, page in found.items() if page.newest and tenth(page.name, 1)}
    training = {id: page for id, page in found.items() if id not in newest and any(tenth(page.name, i) for i in TRAINED)}
    texts = list({page.text for page in training.values()})

    def meeting(pages: dict[str, Page], parameters: Parameters) -> set[str]:
        known = {key for row in keys(texts, parameters)[0].tolist() for key in row}
        own = list(dict.fromkeys(page.text for page in pages.values()))
        made, which = keys(own, parameters)
        return {own[i] for i, row in zip(which.tolist(), made.tolist(), strict=True) if known & set(row)}

    new = {page.text for page in apart.values() if page.newest} - meeting(apart, STRICT)
    return training, sorted(new), sorted(meeting(newest, FINEWEB) - set(texts))


def prepared(training: dict[str, Page], stages: list[dict[str, object]]) -> list[str]:
    """Runs the documents through stages, and removes exact duplicates."""
    texts = {id: page.text for id, page in training.items()}
    columns = {id: {"dump": page.dump} for id, page in training.items()}
    with tempfile.TemporaryDirectory() as folder:
        found, here = curate(Path(folder), texts, stages, 4, 256 << 20, columns, again=0)
        return sorted(set(left(found, here).values()))


def flat(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns the tokens of documents, each with the token that ends it."""
    end = tokenizer.token_to_id(END)
    return np.concatenate([np.array([*ids, end], np.int32) for ids in encode(tokenizer, texts)])


def rows(stream: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """Yields batches of rows in random order. Each token occurs once before any occurs again."""
    draw, waiting = np.random.default_rng(seed), np.zeros(0, np.int64)
    while True:
        if len(waiting) < BATCH:
            waiting = np.concatenate([waiting, draw.permutation(np.arange(draw.integers(LENGTH), len(stream) - LENGTH, LENGTH))])
        chosen, waiting = waiting[:BATCH], waiting[BATCH:]
        yield torch.from_numpy(np.stack([stream[at : at + LENGTH] for at in chosen])).long()


def train(stream: np.ndarray, steps: int, seed: int) -> LlamaForCausalLM:
    """Trains a model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **MODEL))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    for step, batch in zip(range(1, steps + 1), rows(stream, seed), strict=False):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = LR * min(step / 30, 1.0) * (1.02 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def held_rows(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Returns the first complete rows of each document."""
    streams = [np.array(ids, np.int64) for ids in encode(tokenizer, texts)]
    some = [ids[: min(len(ids) // LENGTH, FIRST_ROWS) * LENGTH].reshape(-1, LENGTH) for ids in streams]
    return torch.from_numpy(np.concatenate(some))


@torch.no_grad()
def loss(model: LlamaForCausalLM, held: torch.Tensor) -> float:
    """Returns the mean nats per token."""
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in held.split(64)) / len(held)


def main() -> None:
    arguments = harness.arguments(__doc__, sdists=Path, steps=300, seeds=[1, 2, 3])
    torch.set_num_threads(1)
    training, new, near = divided(dict(pages(arguments.sdists)))
    datasets = {name: prepared(training, stages) for name, stages in STAGES.items()}
    tokenizer = tokens.load(tokens.train(datasets["overall"], VOCABULARY, END))
    streams = {name: flat(tokenizer, texts) for name, texts in datasets.items()}
    held = {"new": held_rows(tokenizer, new), "near": held_rows(tokenizer, near)}
    print(f"{len(training):,} training documents; held out: {len(new)} new, {len(near)} near; "
          f"{arguments.steps * BATCH * LENGTH:,} training tokens\n")  # fmt: skip
    for name, stream in streams.items():
        epochs = arguments.steps * BATCH * LENGTH / len(stream)
        print(f"{name}: {len(datasets[name]):,} documents, {len(stream):,} tokens, {epochs:.2f} epochs", flush=True)
    losses = {name: {kind: list[float]() for kind in held} for name in streams}
    for seed in arguments.seeds:
        for name, stream in streams.items():
            began = time.process_time()
            model = train(stream, arguments.steps, seed)
            for kind, part in held.items():
                losses[name][kind].append(loss(model, part))
            done = {kind: round(values[-1], 4) for kind, values in losses[name].items()}
            print(f"  seed {seed}, {name}: {done}, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    print()
    harness.head("dataset", *(column for kind in held for column in (f"loss, {kind}", f"{kind}, less exact")))
    for name, of in losses.items():
        cells = list[str]()
        for kind, values in of.items():
            against = [a - b for a, b in zip(values, losses["exact"][kind], strict=True)]
            cells += [f"{mean(values):.4f}", harness.spread(against, "+.4f")]
        harness.row(name, *cells)


if __name__ == "__main__":
    main()
