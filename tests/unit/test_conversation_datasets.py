"""Tests datasets of conversations and of preferences: they are the same however the work is distributed, and hold out complete
prompts."""

import ast
import csv
import inspect
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import pieces, reasons, registry
from heliostat.curation.conversations import reading, shapes
from heliostat.curation.conversations.pipeline import ConversationPipeline, PreferencePipeline
from heliostat.curation.conversations.rendering import Renderer
from heliostat.curation.repeated import RepeatingStage
from heliostat.data import manifest, split
from heliostat.data.conversations import FACT, PACKS, PREFERENCES, TEMPLATE
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.unit import build_chat_templates as chat
from tests.unit.build_curation import HereFlow

LENGTH = 120
WORDS = chat.TEXT[0].split()
Row = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat.folder(tmp_path_factory.mktemp("model"), chat.DEFAULT_SYSTEM)


def records(number: int = 240) -> list[Row]:
    """Returns conversations of one to six exchanges, about eight for each first question, and some pairs of equal ones."""
    rng, made = random.Random(7), list[Row]()
    for i in range(number):
        messages = [{"role": "user", "content": f"question {i % 30}"}]
        for turn in range(rng.randint(1, 6)):
            messages += [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))}] if turn else []
            messages += [{"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))}]
        made.append({"messages": messages})
    return made + made[:9]


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(pipeline: Any, name: str, model: Path, folder: Path, /, seed: int = 0, **keys: Any) -> Manifest:
    """Makes a dataset in this process, from `in` below the folder."""
    usual = {"name": "chat", "input": f"{folder}/in", "output": f"{folder}/{name}", "model": str(model),
             "sequence_length": LENGTH, "chunk_tokens": 1500, "shard_bytes": 8000}  # fmt: skip
    made = pipeline.model_validate({key: value for key, value in {**usual, **keys}.items() if value is not None})
    made.check()
    output = Location(made.output)
    rows, meta = made.making(HereFlow(Work(Location(f"{folder}/{name}.work")), seed=seed), output).run(made.inputs())
    assert meta.pop("listed") is None or meta["dropped"]
    return manifest.write(output, rows, {"name": "chat", **meta})


def groups(dataset: Manifest) -> list[list[Row]]:
    """Returns the rows of each row group."""
    folder, chunks = dataset.location.path, dataset.chunks.to_pylist()
    return [pq.ParquetFile(f"{folder}/{c['path']}").read_row_group(c["row_group"]).to_pylist() for c in chunks]


def tokens_of(dataset: Manifest) -> list[list[list[int]]]:
    return [[row["tokens"] for row in group] for group in groups(dataset)]


def parts(dataset: Manifest) -> list[tuple[str, list[int], list[bool]]]:
    """Returns the id, the tokens, and the mask of each conversation in the packs."""
    found = []
    for row in (row for group in groups(dataset) for row in group):
        begin = 0
        for id, length in zip(row["ids"], row["lengths"], strict=True):
            found.append((id, row["tokens"][begin : begin + length], row["trained"][begin : begin + length]))
            begin += length
        assert begin == len(row["tokens"]) == len(row["trained"]) <= LENGTH
    return found


def test_packs_have_each_conversation_once_from_any_cut_of_the_input(tmp_path, model, monkeypatch) -> None:
    rows = records()
    write(tmp_path / "in/a.jsonl", rows)
    first = make(ConversationPipeline, "first", model, tmp_path)
    facts, renderer = first.meta[FACT], Renderer(chat.dialect(chat.DEFAULT_SYSTEM))
    rendered = [renderer.conversation(shapes.conversation(row, "auto")) for row in rows[:240]]
    fits = [one for one in rendered if len(one.tokens) <= LENGTH]
    assert sorted((one.tokens.tolist(), one.trained.tolist()) for one in fits) == sorted((t, m) for _, t, m in parts(first))
    counts = {"conversations": len(fits), "tokens": sum(len(one.tokens) for one in fits),
              "trained": sum(int(one.trained.sum()) for one in fits), "turns": sum(len(one.turns) for one in fits)}  # fmt: skip
    packs = sum(map(len, groups(first)))
    counts |= {"trained_ends": counts["turns"], "padding": packs * LENGTH - counts["tokens"]}
    assert {name: count for name, count in facts["counts"].items() if count} == counts
    assert first.meta["dropped"] == {"too_long": 249 - len(fits) - first.meta["duplicates"]} and 0 < first.meta["duplicates"] <= 9
    assert pq.read_schema(f"{first.location.path}/{first.paths[0]}").equals(PACKS) and len(set(first.paths)) > 2
    assert first.file(TEMPLATE).read().decode() == chat.DEFAULT_SYSTEM and packs < len(fits)
    assert (facts["end"], facts["turns"], first.fact("end_of_document")) == (
        renderer.end_id,
        "all",
        renderer.encode(chat.END)[0][0],
    )

    monkeypatch.setattr(pieces, "size", lambda total: 4000)
    again = make(ConversationPipeline, "again", model, tmp_path, seed=3, memory_limit="64MiB")
    assert again.digest == first.digest
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    write(tmp_path / "in/z.jsonl", rows[100:][::-1])
    write(tmp_path / "in/y/b.jsonl", rows[:100])
    other = make(ConversationPipeline, "other", model, tmp_path)
    assert tokens_of(other) == tokens_of(first)


def test_conversations_with_the_same_question_are_held_out_together(tmp_path, model) -> None:
    write(tmp_path / "in/a.jsonl", records())
    dataset, decode = (
        make(ConversationPipeline, "out", model, tmp_path),
        Renderer(chat.dialect(chat.DEFAULT_SYSTEM)).tokenizer.decode,
    )
    for fraction in (0.1, 0.37, 0.5):
        divided, sides = split.split(dataset, None, fraction), (set[str](), set[str]())
        for rows, held in zip(groups(dataset), divided.held, strict=True):
            assert held in (0, len(rows))
            texts = (decode(row["tokens"]) for row in rows)
            sides[bool(held)].update(part.split("\n")[0] for text in texts for part in text.split("user\nquestion ")[1:])
        assert not sides[0] & sides[1] and all(sides) and len(sides[0] | sides[1]) == 30


def test_tables_and_lines_give_the_same_rows(tmp_path, model) -> None:
    rows = [{"prompt": f'say "{i}",\nthen stop', "completion": f"line {i}\r\nend"} for i in range(40)]
    write(tmp_path / "lines/in/a.jsonl", rows)
    (tmp_path / "table/in").mkdir(parents=True)
    with (tmp_path / "table/in/a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer", "note"])
        writer.writeheader()
        writer.writerows({"question": row["prompt"], "answer": row["completion"], "note": ""} for row in rows)
    (tmp_path / "parquet/in").mkdir(parents=True)
    roles = {"prompt": "user", "completion": "assistant"}
    messages = [[{"role": role, "content": row[name], "name": None} for name, role in roles.items()] for row in rows]
    pq.write_table(pa.table({"messages": messages, "id": range(40)}), tmp_path / "parquet/in/a.parquet", row_group_size=7)
    renamed = {"columns": {"prompt": "question", "completion": "answer"}}
    made = [
        sorted(tokens for _, tokens, _ in parts(make(ConversationPipeline, "out", model, tmp_path / name, **keys)))
        for name, keys in (("lines", {}), ("parquet", {}), ("table", renamed))
    ]
    assert made[0] == made[1] == made[2] and len(made[0]) == 40


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("too_long", ["cut", "split"])
def test_long_conversations_are_cut_or_split_and_counted(tmp_path, model, too_long: str, packing: str) -> None:
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in records(60)]
    write(tmp_path / "in/a.jsonl", rows)
    dataset = make(ConversationPipeline, "out", model, tmp_path, too_long=too_long, packing=packing)
    counts, renderer = dataset.meta[FACT]["counts"], Renderer(chat.dialect(chat.DEFAULT_SYSTEM))
    whole = [renderer.conversation(shapes.conversation(row, "auto")) for row in rows[:60]]
    long = sum(len(one.tokens) > LENGTH for one in whole)
    assert counts[too_long] == long > 5 and dataset.meta["dropped"] == {}
    found = parts(dataset)
    assert counts["conversations"] == len(found) and all(any(mask) for _, _, mask in found)
    head = renderer.encode(renderer.text(rows[0]["messages"][:1]))[0].tolist()
    assert all(tokens[: len(head)] == head for _, tokens, _ in found)  # each part has the system prompt
    if too_long == "split":
        assert counts["trained"] == sum(int(one.trained.sum()) for one in whole) and len(found) > 60
    else:
        assert len(found) == 60 and counts["turns"] < sum(len(one.turns) for one in whole)
    if packing == "none":
        assert sum(map(len, groups(dataset))) == len(found)


def test_each_turn_can_be_a_row_with_its_prompt_at_inference(tmp_path, model) -> None:
    """Qwen3's template removes thoughts from earlier turns, so no single row has all turns as they are at inference."""
    (tmp_path / "qwen3.jinja").write_text(chat.THOUGHTS)
    talk = [row["messages"] for row in records(20)[:20]]
    for number, messages in enumerate(talk):
        talk[number] = [
            {**m, "content": f"<think>birch</think>{m['content']}"} if m["role"] == "assistant" else m for m in messages
        ]
    write(tmp_path / "in/a.jsonl", [{"messages": messages} for messages in talk])
    keys = {"template": f"{tmp_path}/qwen3.jinja", "packing": "none", "sequence_length": 64}
    dataset = make(ConversationPipeline, "out", model, tmp_path, turns="each", **keys)
    counts, last = dataset.meta[FACT]["counts"], Renderer(chat.dialect(chat.THOUGHTS), turns="last")
    beginnings = [shapes.conversation({"messages": m[: i + 1]}, "auto") for m in talk for i in range(1, len(m), 2)]
    wanted = [last.conversation(one) for one in beginnings]
    fitting = [one for one in wanted if len(one.tokens) <= 64]
    assert sorted(tokens for _, tokens, _ in parts(dataset)) == sorted(one.tokens.tolist() for one in fitting)
    assert counts["trained"] == sum(int(one.trained.sum()) for one in fitting) and counts["turns"] == len(fitting) < len(wanted)
    assert 0 < counts["cut"] < counts["split"] < 20 and dataset.meta["dropped"] == {}
    dropped = make(ConversationPipeline, "all", model, tmp_path, **keys).meta["dropped"]
    assert dropped == {"rewritten": sum(len(m) > 2 for m in talk)}


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_turns_that_cant_fit_cost_nothing(tmp_path, model, monkeypatch, too_long: str) -> None:
    """Else, a conversation of thousands of turns takes hours. An answer with long thoughts, which later turns leave out, doesn't
    end the conversation."""
    (tmp_path / "qwen3.jinja").write_text(chat.THOUGHTS)
    answers = ["amber", f"<think>{'birch ' * 200}</think>amber", *["amber"] * 400]
    messages = [
        {"role": role, "content": text} for answer in answers for role, text in (("user", "first"), ("assistant", answer))
    ]
    rendered, text, made = list[int](), Renderer.text, list[Manifest]()
    monkeypatch.setattr(Renderer, "text", lambda self, m, *more, **keys: rendered.append(len(m)) or text(self, m, *more, **keys))
    for number in (40, 804):
        write(tmp_path / "in/a.jsonl", [{"messages": messages[:number]}])
        keys = {"template": f"{tmp_path}/qwen3.jinja", "packing": "none", "sequence_length": 64, "too_long": too_long}
        made.append(make(ConversationPipeline, f"out-{number}", model, tmp_path, turns="each", **keys))
        costs = sum(rendered)
        rendered.clear()
    assert costs < 3000 and made[0].meta[FACT]["counts"] == made[1].meta[FACT]["counts"]
    assert len(parts(made[1])) == 3 + (too_long == "cut")


@pytest.mark.parametrize("too_long", ["cut", "split"])
def test_turns_after_a_cut_are_not_rendered_one_by_one(tmp_path, model, monkeypatch, too_long: str) -> None:
    """Else, the time grows with the square of the turns. The rows are those of a conversation that is rendered completely."""
    exchange = [{"role": "user", "content": "first of all"}, {"role": "assistant", "content": "amber"}]
    rendered, text, made, costs = list[int](), Renderer.text, list[Manifest](), list[int]()
    monkeypatch.setattr(Renderer, "text", lambda self, m, *more, **keys: rendered.append(len(m)) or text(self, m, *more, **keys))
    for number, many in ((400, 64), (100, 64), (100, 1000)):
        monkeypatch.setattr(reading, "MANY_MESSAGES", many)
        write(tmp_path / "in/a.jsonl", [{"messages": exchange * number}])
        made.append(make(ConversationPipeline, f"{number}-{many}", model, tmp_path, sequence_length=64, too_long=too_long))
        costs.append(sum(rendered))
        rendered.clear()
    assert costs[0] < 6 * costs[1] < 6 * costs[2] and parts(made[1]) == parts(made[2])


def test_a_long_conversation_whose_beginning_trains_nothing_is_too_long(tmp_path, model) -> None:
    """It has trained answers, but none within the maximum length."""
    short = [{"role": "user", "content": "first of all"}, {"role": "assistant", "content": "amber", "weight": 0}]
    write(tmp_path / "in/a.jsonl", [{"messages": [{**one, "weight": 1} for one in short]},
                                    {"messages": [*short * 400, short[0], {**short[1], "weight": 1}]}])  # fmt: skip
    dataset = make(ConversationPipeline, "out", model, tmp_path, sequence_length=64, too_long="cut")
    assert dataset.meta["dropped"] == {"too_long": 1}


def test_a_question_with_thousands_of_turns_is_not_rendered_per_turn(tmp_path, model, monkeypatch) -> None:
    """An agent calls tools many times after one message of the user, so no part of its conversation fits."""
    rendered, text, costs = list[int](), Renderer.text, list[int]()
    monkeypatch.setattr(Renderer, "text", lambda self, m, *more, **keys: rendered.append(len(m)) or text(self, m, *more, **keys))
    short = [{"role": "user", "content": "first of all"}, {"role": "assistant", "content": "amber"}]
    for number in (400, 100):
        write(tmp_path / "in/a.jsonl", [{"messages": short}, {"messages": short + short[1:] * number}])
        dataset = make(ConversationPipeline, f"{number}", model, tmp_path, sequence_length=64, too_long="split")
        assert dataset.meta["dropped"] == {"too_long": 1}
        costs.append(sum(rendered))
        rendered.clear()
    assert costs[0] < 6 * costs[1]


@pytest.mark.parametrize(("pipeline", "keys", "number"), [
    (ConversationPipeline, {}, 1), (ConversationPipeline, {"too_long": "cut"}, 2), (PreferencePipeline, {}, 2),
    (ConversationPipeline, {"too_long": "cut", "turns": "last"}, 1),
])  # fmt: skip
def test_datasets_whose_rules_have_not_changed_stay_up_to_date(tmp_path, model, pipeline, keys: Row, number: int) -> None:
    """A new version of other rules would make a large dataset again. Rules that drop other records need one."""
    usual = {"name": "chat", "input": f"{tmp_path}/in", "output": f"{tmp_path}/out", "model": str(model), "sequence_length": 64}
    made = pipeline.model_validate({**usual, **keys})
    assert made.identity()["versions"] == [1, 1, number]


def test_a_conversation_with_an_example_of_an_evaluation_is_dropped(tmp_path, model) -> None:
    question, answer = "which word comes first of amber and birch", {"role": "assistant", "content": "amber"}
    texts = (f"Tell me: {question}?", "which of all is first?")
    write(tmp_path / "in/a.jsonl", [{"messages": [{"role": "user", "content": text}, answer]} for text in texts])
    write(tmp_path / "eval.jsonl", [{"question": question}])
    stage = {"stage": "decontaminate", "sets": {"words": f"{tmp_path}/eval.jsonl"}, "n": 6}
    dataset = make(ConversationPipeline, "out", model, tmp_path, stages=[stage])
    assert dataset.meta["dropped"] == {"0 decontaminate: contaminated": 1} and [id for id, *_ in parts(dataset)] == ["a.jsonl#2"]


@pytest.mark.parametrize("name", registry.names())
def test_a_stage_that_changes_texts_says_so(name: str) -> None:
    """A dataset of conversations rejects such stages at the start, because the tokens wouldn't follow from the text."""
    cls = registry.find(name)
    (path,) = {inspect.getsourcefile(cls)}
    targets = [target for node in ast.walk(ast.parse(Path(str(path)).read_text())) if isinstance(node, ast.Assign)
               for target in node.targets]  # fmt: skip
    assigns = any(isinstance(target, ast.Attribute) and target.attr == "text" for target in targets)
    masks = "edits" in vars(cls)  # depends on the stage's keys
    assert (cls.changes or masks) == (assigns or issubclass(cls, RepeatingStage))


def test_each_dropped_and_each_kept_conversation_is_recorded(tmp_path, model) -> None:
    answer = {"role": "assistant", "content": "amber"}
    rows = [{"messages": [{"role": "user", "content": "which word comes first?"}, answer]}] * 2
    rows += [
        {"messages": [{"role": "user", "content": text}, answer]} for text in ("a </s>", "x", "the first of all, which one?")
    ]
    write(tmp_path / "in/a.jsonl", [*rows, {"messages": [answer, {"role": "bot"}]}, {"text": "a"}])
    dataset = make(ConversationPipeline, "out", model, tmp_path, stages=[{"stage": "length", "min_words": 5}])
    assert dataset.meta["dropped"] == {"0 length: short": 1, "no_shape": 1, "special_token": 1, "unknown_role": 1}
    ends = {line: reasons.end_of(dataset, f"a.jsonl#{line}")[0] for line in range(1, 8)}
    fates = {line: (end["stage"], end["reason"]) for line, end in ends.items()}
    assert fates == {1: ("shard", "kept"), 2: ("exact", "duplicate"), 3: ("read", "special_token"), 4: ("0 length", "short"),
                     5: ("shard", "kept"), 6: ("read", "unknown_role"), 7: ("read", "no_shape")}  # fmt: skip
    assert reasons.funnel(dataset)["read"]["what"]["too_long"] == "more than sequence_length tokens"
    assert ends[2]["detail"] == "a.jsonl#1" and ends[1]["detail"] in dataset.paths
    assert sorted(id for id, _, _ in parts(dataset)) == ["a.jsonl#1", "a.jsonl#5"]


def test_the_turns_of_a_conversation_that_is_far_too_long_are_not_rendered(tmp_path, model, monkeypatch) -> None:
    counts, text = set[int](), Renderer.text  # counts: of the messages that were rendered
    monkeypatch.setattr(Renderer, "text", lambda *a, **k: counts.add(len(a[1])) or text(*a, **k))
    exchange = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "amber"}]
    write(tmp_path / "in/a.jsonl", [{"messages": exchange * 200}, {"messages": exchange}])
    dataset = make(ConversationPipeline, "out", model, tmp_path)
    assert dataset.meta["dropped"] == {"too_long": 1} and counts == {1, 2, 400}


def test_half_a_character_in_a_docstring_is_counted(tmp_path, model) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.py").write_text(
        'def a():\n    """Does \\ud800."""\n    return 1\n\ndef b():\n    """Does b."""\n    return 2\n'
    )
    assert make(ConversationPipeline, "out", model, tmp_path, turns="each").meta["dropped"] == {"invalid_messages": 1}


def test_json_of_too_many_levels_is_dropped(tmp_path, model) -> None:
    write(tmp_path / "in/a.jsonl", records(2))
    lines = [f'{{"messages": [{{"role": "user", "content": {"[" * levels}{"]" * levels}}}]}}\n' for levels in (450, 700, 900)]
    (tmp_path / "in/b.jsonl").write_text("".join(lines))
    dataset = make(ConversationPipeline, "out", model, tmp_path)
    assert sum(dataset.meta["dropped"].values()) == 3 and dataset.meta[FACT]["counts"]["conversations"] == 2


def test_functions_are_instructions_and_other_texts_are_counted(tmp_path, model) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.py").write_text('def first(words):\n    """Returns the first word. Never fails."""\n    return words[0]\n')
    (tmp_path / "in/b.py").write_text("def f(:")
    (tmp_path / "in/notes.txt").write_text("user: a")
    dataset = make(ConversationPipeline, "out", model, tmp_path)
    assert dataset.meta["dropped"] == {"no_shape": 1, "unparsed": 1}
    ((id, tokens, _),) = parts(dataset)
    text = Renderer(chat.dialect(chat.DEFAULT_SYSTEM)).tokenizer.decode(tokens)
    assert id == "a.py#1" and "Returns the first word.<" not in text and "def first(words):\n    return words[0]\n```" in text


def test_the_rejected_answer_to_a_docstring_is_another_function_of_the_file(tmp_path, model) -> None:
    (tmp_path / "in").mkdir()
    functions = [f'def f{n}(word):\n    """Does {n}."""\n    return word + "{n}"\n' for n in range(3)]
    (tmp_path / "in/a.py").write_text("\n".join(functions))
    (tmp_path / "in/b.py").write_text(functions[0])
    (tmp_path / "in/c.py").write_text(functions[0] * 2)
    dataset = make(PreferencePipeline, "out", model, tmp_path)
    assert dataset.meta["dropped"] == {"no_pairs": 1, "same_answers": 2}
    decode = Renderer(chat.dialect(chat.DEFAULT_SYSTEM)).tokenizer.decode
    rows = [row for group in groups(dataset) for row in group]
    assert len(rows) == 3
    for row in rows:
        (n,) = (n for n in range(3) if f"Does {n}." in decode(row["prompt"]))
        assert f"def f{n}(" in decode(row["chosen"]) and f"def f{(n + 1) % 3}(" in decode(row["rejected"])


def test_preferences_are_the_same_from_any_cut_of_the_input(tmp_path, model, monkeypatch) -> None:
    rows: list[Row] = [{"prompt": f"question {i % 9}", "chosen": f"amber {i}", "rejected": f"birch {i}"} for i in range(60)]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b" * 400, "rejected": "c"}, rows[0]]
    write(tmp_path / "in/a.jsonl", rows)
    first = make(PreferencePipeline, "first", model, tmp_path)
    assert first.meta["dropped"] == {"same_answers": 1, "too_long": 1} and first.meta["duplicates"] == 1
    renderer = Renderer(chat.dialect(chat.DEFAULT_SYSTEM))
    wanted = [[one.tolist() for one in renderer.preference(shapes.preference(row))] for row in rows[:60]]
    made = [row for group in groups(first) for row in group]
    assert sorted([row["prompt"], row["chosen"], row["rejected"]] for row in made) == sorted(wanted)
    assert pq.read_schema(f"{first.location.path}/{first.paths[0]}").equals(PREFERENCES)
    assert first.meta[FACT]["form"] == "preferences" and first.meta[FACT]["counts"]["conversations"] == 60
    monkeypatch.setattr(pieces, "size", lambda total: 900)
    assert make(PreferencePipeline, "again", model, tmp_path, seed=5).digest == first.digest


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "missing"}, "model: 'missing': no such folder"),
        ({"model": None}, "model: set either model, or tokenizer"),
        ({"model": None, "tokenizer": {"path": "TOKENIZER", "end_of_document": "</s>"}}, "template: a tokenizer without a model"),
        ({"model": None, "tokenizer": {"path": "TOKENIZER"}, "template": "plain"}, "tokenizer.end_of_document: "),
        ({"template": "alpaca"}, "template: 'alpaca' isn't a template"),
        ({"template": "missing.jinja"}, "template: 'missing.jinja': no such file"),
        ({"template": "OTHER"}, r"template: writes <\|channel\|>, which the tokenizer doesn't have"),
        ({"stages": [{"stage": "pii"}]}, "stages.0: pii changes texts"),
        ({"columns": {"promt": "a"}}, "columns: 'promt' isn't a column of a shape. Did you mean 'prompt'"),
        ({"too_long": "split", "turns": "last"}, "too_long: with turns: last"),
        ({"too_long": "split", "turns": "each"}, "too_long: with turns: each"),
    ],
)
def test_a_pipeline_that_makes_no_sense_is_refused(tmp_path, model, keys: Row, message: str) -> None:
    (tmp_path / "other.jinja").write_text(chat.DEFAULT_SYSTEM.replace("<|im_start|>", "<|channel|>"))
    replaced = json.loads(json.dumps(keys).replace("OTHER", f"{tmp_path}/other.jinja").replace("TOKENIZER", str(model)))
    write(tmp_path / "in/a.jsonl", records(2))
    with pytest.raises(ConfigError, match=f"^{message}"):
        make(ConversationPipeline, "out", model, tmp_path, **replaced)


def test_a_table_without_the_columns_of_a_shape_is_one_clear_error(tmp_path, model) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_text("question,answer\na,b\n")
    message = r"input: 'a.csv' has the columns question, answer, but needs messages, or prompt and .* Set `columns`"
    for keys in ({}, {"input": str(tmp_path / "in/a.csv")}):
        with pytest.raises(ConfigError, match=message):
            make(ConversationPipeline, "out", model, tmp_path, **keys)
    with pytest.raises(
        ConfigError, match=r"'a.csv' has the columns question, answer, but needs chosen and rejected. Set `columns`"
    ):
        make(PreferencePipeline, "out", model, tmp_path)


def test_a_table_of_another_pipelines_shape_names_this_pipeline(tmp_path, model) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(ConfigError, match=r"Prepare it with heliostat.pipelines:PreferencePipeline"):
        make(ConversationPipeline, "out", model, tmp_path)
    (tmp_path / "in/a.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(ConfigError, match=r"Prepare it with heliostat.pipelines:ConversationPipeline"):
        make(PreferencePipeline, "out", model, tmp_path)


def test_an_adapter_as_a_pipelines_model_is_named(tmp_path, model) -> None:
    write(tmp_path / "in/a.jsonl", records(2))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^model: '.*lora' is an adapter without its base\. "):
        make(ConversationPipeline, "out", model, tmp_path, model=str(tmp_path / "lora"))


def test_a_gguf_file_as_a_pipelines_model_names_the_command_that_converts_it(tmp_path, model) -> None:
    write(tmp_path / "in/a.jsonl", records(2))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"model: '.*m.gguf' is a GGUF file .*: heliostat model import .*m.gguf --out FOLDER"):
        make(ConversationPipeline, "out", model, tmp_path, model=str(tmp_path / "m.gguf"))
