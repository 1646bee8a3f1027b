"""Compares fine-tuning with TRL's trainers: losses, gradients, CPU seconds per trained token, and peak memory.

Both train the same weights on the same batches of random conversations, in one process with one thread, fp32, AdamW. Each run is
a process of its own, and the ways take turns. TRL must be installed in an environment with heliostat's packages:

    python -m tests.benchmarks.fine_tuning --trl FOLDER     # FOLDER: `pip install --no-deps --target FOLDER trl==1.16.0`
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from heliostat.data.conversations import PACKS, REFERENCE
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests.benchmarks import harness

if TYPE_CHECKING:
    import pyarrow as pa
    from heliostat.config.spec import Job

MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 8192}
LENGTH, SEED, LR = 256, 7, 1e-3
BATCH = {"packed": 8, "single": 16, "pairs": 8}  # rows of each dataset per step
MICROS = 4  # micro-batches per step
EPS = 1e-5  # of AdamW: with the usual 1e-8, AdamW turns the rounding of tiny gradients into updates
SKIPPED = 2  # steps that warm up, and don't count
ROWS, PAIRS = 400, 96
COMPARED = 5  # steps whose losses and gradients are compared
STOP, PAD, BETA = 1, 2, 0.1


# the data ------------------------------------------------------------------------------------------------------------


def draw(random: np.random.Generator, size: int) -> list[int]:
    """Draws tokens from a distribution in which the model can learn the frequencies."""
    return np.minimum(random.zipf(1.3, size) + PAD, MODEL["vocab_size"] - 1).tolist()


def conversations(number: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Yields conversations of 24 to LENGTH tokens, half of them shorter than 90. The answers have about half of the tokens."""
    random = np.random.default_rng(SEED)
    for _ in range(number):
        size = int(np.clip(random.lognormal(4.5, 0.7), 24, LENGTH))
        asked = int(size * random.uniform(0.3, 0.7))
        yield [*draw(random, size - 1), STOP], [False] * asked + [True] * (size - asked)


def packs(number: int) -> list[dict[str, Any]]:
    """Packs the conversations as TRL does (best fit decreasing), in random order."""
    import datasets
    from trl import pack_dataset

    tokens, trained = map(list, zip(*conversations(number), strict=True))
    rows = datasets.Dataset.from_dict({"tokens": tokens, "trained": trained})
    packed = pack_dataset(rows, LENGTH, "bfd", {"batch_size": number}).rename_column("seq_lengths", "lengths").to_list()
    order = np.random.default_rng(SEED).permutation(len(packed))
    return [{"ids": [f"{i}-{at}" for at in range(len(packed[i]["lengths"]))], **packed[i]} for i in order]


def pairs(number: int) -> list[dict[str, Any]]:
    """Draws prompts with two answers of 8 to 96 tokens."""
    random = np.random.default_rng(SEED)
    sizes = random.integers(8, 96, (number, 3))
    parts = [[draw(random, int(size)) for size in three] for three in sizes]
    return [{"id": str(i), "prompt": a, "chosen": [*b, STOP], "rejected": [*c, STOP]} for i, (a, b, c) in enumerate(parts)]


def prepare(folder: str, number: int) -> None:
    """Writes the weights that are trained, a dataset of packs, one of single conversations, and one of preferences."""
    from heliostat.recipes.folder_digests import weights_digest
    from tokenizers import Tokenizer, models

    from tests.unit import build_conversations

    vocabulary = {f"<{i}>": i for i in range(MODEL["vocab_size"])}
    vocabulary = {{"<0>": build_conversations.END, "<1>": build_conversations.STOP}.get(k, k): i for k, i in vocabulary.items()}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<3>"))
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    model.save_pretrained(f"{folder}/base")
    Path(folder, "base/tokenizer.json").write_text(raw.to_str())
    single = [{"ids": [str(i)], "lengths": [len(tokens)], "tokens": tokens, "trained": trained}
              for i, (tokens, trained) in enumerate(conversations(number))]  # fmt: skip
    compared = list(referred(model, pairs(PAIRS)))
    for name, rows, columns in (("packed", packs(number), PACKS), ("single", single, PACKS), ("pairs", compared, REFERENCE)):
        form = "preferences" if columns is REFERENCE else "packs"
        build_conversations.write(Path(folder, name), rows, columns, raw, {
            "form": form, "sequence_length": LENGTH, "turns": "all", "end_of_turn": True, "counts": counted(rows, form),
            "reference": {"digest": weights_digest(Path(folder, "base")), "precision": "fp32"},
        })  # fmt: skip


def referred(model: Any, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the rows with the log-probabilities of their answers, which `ReferencePipeline` would write."""
    import pyarrow as pa
    from heliostat.data.conversations import PREFERENCES
    from heliostat.recipes.text import answer_logprobs, preference_rows

    for row in rows:
        batch = preference_rows.batch(pa.Table.from_pylist([row], PREFERENCES), LENGTH, MODEL["vocab_size"], reference=False)
        with torch.no_grad():
            ((chosen, rejected),) = answer_logprobs.of_pairs(model, batch).tolist()
        yield {**row, "reference_chosen": chosen, "reference_rejected": rejected}


def counted(rows: list[dict[str, Any]], form: str) -> dict[str, int]:
    tokens = sum(len(row[name]) for row in rows for name in ("prompt", "chosen", "rejected", "tokens") if name in row)
    answers = [row[name] for row in rows for name in ("chosen", "rejected") if name in row]
    learned = sum(map(len, answers)) + sum(sum(row.get("trained", [])) for row in rows)
    turns = len(answers) + sum(len(row.get("lengths", [])) for row in rows)
    return {"conversations": len(rows) if form == "preferences" else turns, "tokens": tokens, "trained": learned, "turns": turns,
            "trained_ends": turns, "untrained": 0, "cut": 0, "split": 0, "retokenized": 0, "ended": 0,
            "padding": len(rows) * LENGTH - tokens}  # fmt: skip


# heliostat -----------------------------------------------------------------------------------------------------------


def described(folder: str, data: str, steps: int, changes: dict[str, Any]) -> Job:
    from tests.unit.build_job import job

    recipe = "DPO" if data == "pairs" else "SFT"
    keys: dict[str, Any] = {"recipe": f"heliostat.recipes:{recipe}", "data.sources": [{"path": f"{folder}/{data}"}]}
    keys |= {
        "data.sequence_length": None,
        "data.document_mask": data == "packed",
        "evaluate": None,
        "storage": f"{folder}/runs-{time.time_ns()}",
        "train.steps": steps,
    }
    keys |= {
        "train.global_batch_size": BATCH[data],
        "train.micro_batch_size": BATCH[data] // MICROS,
        "train.seed": SEED,
        "train.precision": "fp32",
    }
    keys |= {"train.optimizer": {"name": "adamw", "lr": LR, "betas": [0.9, 0.999], "eps": EPS, "weight_decay": 0.0}}
    keys |= {"train.grad_clip": 0.0, "train.schedule": {"name": "constant"}, "train.zero.stage": 1, "workers.count": 1}
    keys |= {"model": {"pretrained": f"{folder}/base", **({"dpo": {"beta": BETA}} if data == "pairs" else {})}}
    return job(**{**keys, **changes})


def in_order(folder: str, data: str, steps: int) -> list[pa.Table]:
    """Returns the rows of each step, in heliostat's order."""
    from heliostat.data.dataset import open_dataset, plan
    from heliostat.data.manifest import read

    made = described(folder, data, steps, {})
    dataset = open_dataset(plan(made, [read(location) for location in made.sources]))
    return [dataset.read(dataset.order.locate(dataset.order.step(step).ravel())) for step in range(steps)]


def heliostat(folder: str, data: str, steps: int, changes: dict[str, Any], kept: str = "") -> dict[str, Any]:
    """Trains with the steps of a worker: engine, data streams, and receipts, without Ray. `kept`: the file for gradients."""
    from heliostat.engine import deepspeed_engine, process_group
    from heliostat.numerics import play

    from tests.integration import layouts

    torch.set_num_threads(1)
    made = described(folder, data, steps, changes)
    deepspeed_engine.prepare_environment(0)
    process_group.join(process_group.WorkerPlace(0, 1, 0, 1, f"file://{folder}-group-{time.time_ns()}", "gloo", ()))
    before = harness.memory("VmRSS")
    harness.forget_peak()
    player, seconds, gradients = layouts.player(made), list[float](), list[dict[str, torch.Tensor]]()
    if kept:
        play.watch(player.engine, gradients.append)
    losses: list[float] = []
    for step in range(steps):
        began = time.process_time()
        losses += player.losses(step, step + 1)
        seconds.append(time.process_time() - began)
    result = _result(losses, seconds, before)
    if kept:
        keep(kept, gradients)
    process_group.leave()
    return result


def keep(path: str, gradients: list[dict[str, torch.Tensor]]) -> None:
    np.savez(path, **{f"{step}/{name}": grad.numpy() for step, one in enumerate(gradients) for name, grad in one.items()})  # type: ignore[arg-type]


def _result(losses: list[float], seconds: list[float], before: float) -> dict[str, Any]:
    return {"losses": losses, "seconds": sum(seconds[SKIPPED:]), "peak": harness.memory("VmHWM") - before}


def learned(folder: str, data: str, steps: int) -> int:
    """Counts the trained tokens of the steps that count."""
    rows = [row for table in in_order(folder, data, steps)[SKIPPED:] for row in table.to_pylist()]
    return sum(sum(row["trained"]) if "trained" in row else len(row["chosen"]) + len(row["rejected"]) for row in rows)


# TRL -----------------------------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """Measures the CPU seconds of each step, and keeps the gradients of each step if `kept` names a file."""

    def __init__(self, kept: str) -> None:
        self.kept, self.began = kept, 0.0
        self.seconds, self.gradients = list[float](), list[dict[str, torch.Tensor]]()

    def on_step_begin(self, *arguments: Any, **named: Any) -> None:
        self.began = time.process_time()

    def on_pre_optimizer_step(self, *arguments: Any, model: torch.nn.Module, **named: Any) -> None:
        if self.kept:
            grads = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
            self.gradients.append({name: grad.clone() for name, grad in grads if grad is not None})

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def settings(folder: str, data: str, steps: int) -> dict[str, Any]:
    """Returns the settings of TRL's trainers that heliostat's job has."""
    return {
        "output_dir": f"{folder}-trl", "per_device_train_batch_size": BATCH[data] // MICROS,
        "gradient_accumulation_steps": MICROS,
        "max_steps": steps, "learning_rate": LR, "lr_scheduler_type": "constant", "optim": "adamw_torch", "weight_decay": 0.0,
        "adam_epsilon": EPS, "max_grad_norm": 0.0, "logging_steps": 1, "gradient_checkpointing": False, "bf16": False,
        "max_length": LENGTH, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def labelled(tokens: list[int], trained: list[bool]) -> dict[str, list[int]]:
    return {"input_ids": tokens, "labels": [token if one else -100 for token, one in zip(tokens, trained, strict=True)]}


def in_their_order(trainer: type) -> type:
    """Returns a trainer that reads the rows in their order, and that gets tokens instead of text."""

    def sampler(self: Any, *arguments: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    return type("InOrder", (trainer,), {"_get_train_sampler": sampler, "_prepare_dataset": lambda self, rows, *more: rows})


def tokenizer(folder: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    from tests.unit.build_conversations import END, STOP

    return PreTrainedTokenizerFast(tokenizer_file=f"{folder}/base/tokenizer.json", eos_token=STOP, pad_token=END)


class Uncounted(LlamaForCausalLM):
    """Declares that its loss doesn't use the number of trained tokens of a step, as 46 families of transformers 5.24 do."""

    accepts_loss_kwargs = False


def trl_sft(folder: str, data: str, steps: int, kept: str = "", uncounted: bool = False) -> dict[str, Any]:
    """Trains with SFTTrainer on the rows of heliostat's steps. `data`: packed, or single. `uncounted`: trains `Uncounted`."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = [row for table in in_order(folder, data, steps) for row in table.to_pylist()]
    made = [
        labelled(row["tokens"], row["trained"]) | ({"seq_lengths": row["lengths"]} if data == "packed" else {}) for row in rows
    ]
    asked = SFTConfig(**settings(folder, data, steps), packing=data == "packed", packing_strategy="bfd")
    named = {"args": asked, "train_dataset": datasets.Dataset.from_list(made)}
    return trained(in_their_order(SFTTrainer), folder, kept, Uncounted if uncounted else LlamaForCausalLM, **named)


def trl_dpo(folder: str, steps: int, precomputed: bool, kept: str = "") -> dict[str, Any]:
    """Trains with DPOTrainer. `precomputed`: the reference's log-probabilities are computed before the first step."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    rows = [row for table in in_order(folder, "pairs", steps) for row in table.to_pylist()]
    made = [{f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    asked = DPOConfig(**settings(folder, "pairs", steps), beta=BETA, precompute_ref_log_probs=precomputed)
    reference = None if precomputed else LlamaForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    return trained(in_their_order(DPOTrainer), folder, kept, LlamaForCausalLM, ref_model=reference, args=asked,
                   train_dataset=datasets.Dataset.from_list(made))  # fmt: skip


def trained(trainer: type, folder: str, kept: str, family: Any, **named: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    watch, before = Steps(kept), harness.memory("VmRSS")
    harness.forget_peak()
    model = family.from_pretrained(f"{folder}/base", dtype=torch.float32)
    made = trainer(model, processing_class=tokenizer(folder), callbacks=[watch], **named)
    made.train()
    result = _result([entry["loss"] for entry in made.state.log_history if "loss" in entry], watch.seconds, before)
    if kept:
        keep(kept, watch.gradients)
    return result


def trl_held_out(folder: str, steps: int) -> dict[str, float]:
    """Trains some steps. Returns the loss of the same conversations that SFTTrainer's `evaluate` reports for three batch sizes,
    and the mean over their trained tokens."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    table = [row for rows in in_order(folder, "single", steps + 4) for row in rows.to_pylist()]
    rows = datasets.Dataset.from_list([labelled(row["tokens"], row["trained"]) for row in table])
    last = rows.select(range(steps * BATCH["single"], len(rows)))
    model = LlamaForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    made = in_their_order(SFTTrainer)(model, args=SFTConfig(**settings(folder, "single", steps)), train_dataset=rows,
                                      eval_dataset=last, processing_class=tokenizer(folder))  # fmt: skip
    made.train()
    losses = {}
    for size in (1, 4, 16):
        made.args.per_device_eval_batch_size = size
        losses[f"evaluate, batches of {size}"] = made.evaluate()["eval_loss"]
    nats, terms = 0.0, 0
    for row in last:
        tokens, goals = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, goals, reduction="sum"))
        terms += int((goals >= 0).sum())
    return {**losses, "mean over the trained tokens": nats / terms}


# the comparison ------------------------------------------------------------------------------------------------------


def apart(one: str, other: str) -> list[float]:
    """Returns, for each compared step, the largest relative difference of a parameter's gradient."""
    mine, right = np.load(one), np.load(other)
    assert set(mine.files) == set(right.files)
    norm = np.linalg.norm
    each = {name: float(norm(mine[name] - right[name]) / norm(right[name])) for name in right.files}
    return [max(value for name, value in each.items() if name.startswith(f"{step}/")) for step in range(COMPARED)]


def main() -> None:
    asked = harness.arguments(__doc__, trl="", steps=8, rounds=3)
    if not asked.trl:
        sys.exit("--trl: required. Install TRL into a folder, and pass this folder")
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/made"
        Path(folder).mkdir()
        call = partial(harness.apart, PYTHONPATH=f"{harness.ROOT}/platform:{harness.ROOT}:{Path(asked.trl).absolute()}")
        call(prepare, folder, ROWS)
        equal(call, folder)
        for name, loss in call(trl_held_out, folder, COMPARED)[0].items():
            harness.row(f"TRL, held-out loss: {name}", f"{loss:.4f}")
        ways: dict[str, Any] = {}
        for data in BATCH:
            ways[f"heliostat, {data}"] = partial(call, heliostat, folder, data, asked.steps, {})
            more = (trl_dpo, folder, asked.steps, True) if data == "pairs" else (trl_sft, folder, data, asked.steps)
            ways[f"TRL, {data}"] = partial(call, *more)
        runs = {name: [result for result, _ in results] for name, results in harness.by_turns(ways, asked.rounds).items()}
        counts = {data: call(learned, folder, data, asked.steps)[0] for data in BATCH}
    harness.head("", "CPU ms per trained token", "trained tokens per CPU s", "peak MiB above imports")
    for name, results in runs.items():
        tokens = counts[name.split(", ")[1]]
        cells = [harness.spread([1000 * run["seconds"] / tokens for run in results])]
        cells += [harness.spread([tokens / run["seconds"] for run in results], ".0f")]
        harness.row(name, *cells, harness.spread([run["peak"] for run in results], ".0f"))


def equal(call: Any, folder: str) -> None:
    """Prints the differences of losses and gradients of the first steps."""
    harness.head("", "largest relative difference of losses", "of gradients, by step")
    for data in BATCH:
        mine, theirs = f"{folder}/heliostat-{data}.npz", f"{folder}/trl-{data}.npz"
        ours = call(heliostat, folder, data, COMPARED, {}, mine)[0]
        more = (trl_dpo, folder, COMPARED, False, theirs) if data == "pairs" else (trl_sft, folder, data, COMPARED, theirs)
        compared(data, ours, call(*more)[0], mine, theirs)
        if data == "single":
            uncounted = call(trl_sft, folder, data, COMPARED, theirs, True)[0]
            compared("single, TRL without the number of tokens", ours, uncounted, mine, theirs)


def compared(name: str, ours: dict[str, Any], others: dict[str, Any], mine: str, theirs: str) -> None:
    losses = [abs(a - b) / b for a, b in zip(ours["losses"], others["losses"], strict=True)]
    harness.row(name, f"{max(losses):.1e}", ", ".join(f"{value:.1e}" for value in apart(mine, theirs)))


if __name__ == "__main__":
    main()
