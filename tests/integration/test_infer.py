"""Tests batch inference on Ray with real kills: each input is answered once, as in an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from heliostat.curation.prepare import prepare
from heliostat.inference.batch import run
from heliostat.inference.batch.tasks import BatchSettings

from tests.integration import commands
from tests.unit import command_line
from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model
from tests.unit.build_model import texts
from tests.unit.test_batch_tasks import answers, ask, clip, png, write_classifier, write_writer  # noqa: F401 (a fixture)
from tests.waiting import until

COUNT = 1000
OPTIONS = {"max_tokens": 4, "temperature": 0.7}


def test_a_killed_driver_and_a_killed_worker_change_no_answer(ray_session, tmp_path):
    """SIGKILL ends the driver of its own Ray after its first pieces, and then a worker of the resumed run."""
    model, asked = write_model(tmp_path, BASE["model"], 64), tmp_path / "in.jsonl"
    rows = [json.dumps({"text": f"{'word ' * (i % 7)}{i}", "n": i, "of_no_use": "." * 60}) for i in range(COUNT)]  # for pieces
    asked.write_text("\n".join([*rows, "{"]))
    settings = BatchSettings(keep=["n"], options=OPTIONS)
    whole = run.infer(model, str(asked), str(tmp_path / "whole"), settings)

    out = tmp_path / "out"
    words = ["model", "infer", str(model), "--input", str(asked), "--out", str(out), "--keep", "n", "--max-tokens", "4"]
    driver = commands.start(*words, "--temperature", "0.7", log=tmp_path / "driver.log", RAY_ADDRESS="")
    try:
        until(lambda: len(list((out / run.WORK).glob("done/infer/*.json"))) >= 2, "two pieces")
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(60)
    assert not (out / run.RECORD).exists()

    killed = subprocess.Popen([sys.executable, "-c", KILLER, str(os.getpid())])
    found = run.infer(model, str(asked), str(out), settings)
    assert killed.wait(60) == 0, "no worker was at work"
    assert found["new"] < len(json.loads((out / run.RECORD).read_text())["answers_in"])
    assert (found["answers"], found["bad"], found["inputs"]) == (COUNT, 1, whole["inputs"])
    assert answers(out) == answers(tmp_path / "whole")
    assert [row["n"] for row in answers(out)] == [str(i) for i in range(COUNT)]


KILLER = """
import sys, time, psutil
deadline = time.monotonic() + 150
while time.monotonic() < deadline:
    for process in psutil.Process(int(sys.argv[1])).children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::infer"]:
                process.kill()
                sys.exit(0)
        except psutil.Error:
            pass
    time.sleep(0.02)
sys.exit(1)
"""


@pytest.mark.ci
def test_chats_classes_and_images_are_answered_once_by_workers_of_which_one_is_killed(ray_session, clip, tmp_path):  # noqa: F811
    """Each answer equals that of one process, which also lists its bad inputs. The worker dies during the chats."""
    chats = [json.dumps({"messages": json.loads(ask(("user", f"{'word ' * (i % 7)}{i}"))), "n": i}) for i in range(COUNT)]
    (tmp_path / "chats.jsonl").write_text("\n".join([*chats, '{"messages": 3}']))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(60)))
    (tmp_path / "images").mkdir()
    for i in range(20):
        (tmp_path / "images" / f"{i:02d}.png").write_bytes(png(i))
    (tmp_path / "images" / "20.png").write_bytes(b"no image")
    listed = [json.dumps({"file_name": f"{i:02d}.png", "text": ""}) for i in range(21)]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(listed))
    chat = BatchSettings(task="chat", keep=["n"], options=OPTIONS)
    asked = {
        "chat": (write_writer(tmp_path / "writer"), "chats.jsonl", chat, COUNT, 1),
        "classify": (write_classifier(tmp_path / "classifier"), "texts.jsonl", BatchSettings(task="classify"), 60, 0),
        "embed-images": (clip, "images", BatchSettings(task="embed-images"), 20, 1),
    }
    killed = subprocess.Popen([sys.executable, "-c", KILLER, str(os.getpid())])
    for task, (model, name, settings, count, bad) in asked.items():
        found = run.infer(model, str(tmp_path / name), str(tmp_path / task), settings)
        assert killed.wait(60) == 0, "no worker was at work"
        assert (found["answers"], found["bad"]) == (count, bad), task
        ids = [row["id"] for row in answers(tmp_path / task)]
        assert len(set(ids)) == len(ids) == count, task
    assert [row["n"] for row in answers(tmp_path / "chat")] == [str(i) for i in range(COUNT)]
    again = run.infer(*(asked["chat"][0], str(tmp_path / "chats.jsonl"), str(tmp_path / "whole"), asked["chat"][2]))
    assert again["inputs"] == json.loads((tmp_path / "chat" / run.RECORD).read_text())["inputs"]
    assert answers(tmp_path / "whole") == answers(tmp_path / "chat")
    vectors = [row["embedding"] for row in answers(tmp_path / "embed-images")]
    assert all(abs(sum(x * x for x in one) - 1) < 1e-4 for one in vectors)
    assert {row["label"] for row in answers(tmp_path / "classify")} <= {"bad", "good", "odd"}
    for task, column, columns in (("chat", "answer", ["n"]), ("classify", "text", ["label", "probability"])):  # as new data
        pipeline = {"name": task, "pipeline": "heliostat.pipelines:TextPipeline", "input": str(tmp_path / task / "answers"),
                    "text_column": column, "columns": columns, "output": str(tmp_path / "data" / task), "min_chars": 1,
                    "tokenizer": {"vocab_size": 300}, "chunk_tokens": 1024}  # fmt: skip
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(pipeline))
        read = prepare(tmp_path / f"{task}.yaml", [], quiet=True)
        written = {row[column] for row in answers(tmp_path / task) if row[column]}
        assert len(written) / 2 < read["documents"] <= len(written), task  # of equal texts one is kept


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    """One line each, before Ray starts: an option of another task, and an output that isn't empty."""
    model = write_model(tmp_path, BASE["model"])
    asked = tmp_path / "in.jsonl"
    asked.write_text('{"text": "a"}\n')
    capsys.readouterr()  # the progress of writing the model

    def said(*more: str) -> str:
        code, _, error = command_line.run(monkeypatch, capsys, "model", "infer", str(model), "--input", str(asked), *more)
        assert code == 2 and len(error.strip().splitlines()) == 1
        return error

    assert "--max-tokens: has an effect only with --task continue or chat (score). Remove this option" in said(
        "--out", str(tmp_path / "out"), "--task", "score", "--max-tokens", "3"
    )
    assert "not empty, and has no batch inference" in said("--out", str(tmp_path), "--max-tokens", "3")
    few = ("--out", str(tmp_path / "out"), "--max-tokens", "3")
    assert "--engine vllm needs the extra 'vllm'" in said(*few, "--engine", "vllm")
    assert "max_tokens: 100 leaves no room for a prompt" in said("--out", str(tmp_path / "out"))
    assert "which has no classification head" in said("--out", str(tmp_path / "out"), "--task", "classify")
    assert "task" in said("--out", str(tmp_path / "out"), "--task", "sing")
    assert not (tmp_path / "out").exists()
