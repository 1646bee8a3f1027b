"""The command line as a person meets it: help for everything, nothing cut, one JSON object, exit codes, what is suggested."""

import ast
import inspect
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Any

import heliostat
import pytest
import typer
from heliostat import tables
from heliostat.chaos import measure
from heliostat.cli import audit, common, logs, main
from heliostat.cli import train as training
from heliostat.cli.chaos import table as chaos_table
from heliostat.config import kinds
from heliostat.errors import AccessError, ConfigError, TrainingError
from heliostat.events import Steps
from heliostat.storage import Location
from heliostat.terminal import duration, fit
from heliostat.track import run_table
from heliostat.train.driver import progress
from rich.console import Console

from tests.unit.build_job import write

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "torch", "deepspeed", "mlflow", "transformers", "diffusers", "pyarrow", "numpy", "boto3", "matplotlib")


def commands(command: Any = None, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every command and group with the words that call it."""
    command = command or typer.main.get_command(common.app)
    below = getattr(command, "commands", {})
    return [(path, command), *(found for name, one in below.items() for found in commands(one, (*path, name)))]


NAMES = {" ".join(path) or "heliostat": command for path, command in commands()}


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["heliostat", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code or 0, *capsys.readouterr()


# help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_command_option_and_argument_has_help(name):
    """A sentence for the command, words for each parameter."""
    command = NAMES[name]
    assert command.help and len(command.help.split()) >= 3
    bare = [p.name for p in command.params if not getattr(p, "help", None)]
    assert not bare, f"{name}: no help for {bare}"


@pytest.mark.parametrize("name", NAMES)
def test_no_help_is_cut_at_80_columns(name, monkeypatch, capsys):
    """Every option's whole name and every word of its help is there, in lines of at most 80."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    code, text, _ = run(monkeypatch, capsys, *([] if name == "heliostat" else name.split()), "--help")
    assert code == 0 and "…" not in text and max(map(len, text.splitlines())) <= 80
    words = re.sub(r"[│\s]+", "", text)
    for parameter in NAMES[name].params:
        for option in parameter.opts:
            assert not option.startswith("-") or option in text, option
        assert re.sub(r"\s+", "", parameter.help)[:30] in words or parameter.help.split()[0] in text, parameter.name


def test_commands_are_listed_under_headings_in_the_order_of_their_use():
    command = [sys.executable, "-m", "heliostat", "--help"]  # of its own: commands are in the order of their import
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"}).stdout
    places = [text.index(f"─ {panel} ─") for panel in common.PANELS]
    assert places == sorted(places) and text.index(" check ") < text.index(" train ") < text.index(" chaos ")


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"heliostat {heliostat.__version__}\n", "")


# start-up ------------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from heliostat.cli.main import main
sys.argv = ["heliostat", *sys.argv[1:]]
try:
    main()
except SystemExit as e:
    print("\\n", e.code or 0, *sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "more", "seconds"),
    [
        (["--help"], 0, ("pydantic", "yaml", "psutil"), 2.0),
        (["check", "jobs/quickstart.yaml", "--set", "train.stpes=1"], 2, (), 4.0),
    ],
    ids=["help", "check"],
)
def test_what_needs_no_library_imports_none(arguments, code, more, seconds):
    """`--help`, and `check` of a file with a wrong key; a right file's recipe brings what its model is built with. The bound of
    processor time is generous: tests/benchmarks/check.py measures it."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout
    ended, *modules = process.stdout.read().decode().splitlines()[-1].split()
    usage = os.wait4(process.pid, 0)[2]
    process.returncode = 0
    process.stdout.close()
    found = {name.partition(".")[0] for name in modules}
    allowed = {"pyarrow", "numpy"} if code else set()  # `storage` reaches places with them
    assert int(ended) == code and not found & {*HEAVY, *more} - allowed
    assert usage.ru_utime + usage.ru_stime < seconds


def test_no_module_of_the_command_line_imports_the_one_that_starts_it():
    """`main` imports the commands, they import what they share: no circle; what is late is late for start-up's sake."""
    for path in sorted((ROOT / "platform" / "heliostat" / "cli").glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        assert path.name == "main.py" or not any(name.startswith("heliostat.cli.main") for name in names), path
        if path.name in ("common.py", "logs.py", "__init__.py"):
            assert not any(name.startswith("heliostat.cli") for name in names), path


def test_training_checks_each_thing_once_on_its_way_to_the_first_attempt(tmp_path, monkeypatch):
    """The file, then what does not depend on the run, then, with the run claimed, its data."""
    from heliostat import check, lease
    from heliostat.train import run as running

    from tests.unit.test_samples import make_text

    make_text(tmp_path / "data")
    changes = {
        "data.sources.0.path": str(tmp_path / "data"),
        "data.sequence_length": 16,
        "evaluate": None,
        "model.vocab_size": None,
    }
    path = write(tmp_path, storage=str(tmp_path / "runs"), **changes, **{"mlflow.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    calls: list[str] = []
    for module, name in ((check, "load_job"), (check, "check_job"), (check, "check_devices"), (check, "check_services"),
                         (lease, "take"), (check, "check_data"), (running._Run, "run")):  # fmt: skip
        act = (lambda self: {}) if name == "run" else getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _act=act, _name=name, **k: (calls.append(_name), _act(*a, **k))[1])
    assert running.train(path) == {}
    assert calls == ["load_job", "check_job", "check_devices", "check_services", "take", "check_data", "run"]


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["train", "--stpes", "--json"], "UsageError", "No such option: --stpes"),
        (["evaluate", "m", "--json"], "UsageError", "Missing option '--data'; see `heliostat evaluate --help`"),
        (["nonsense", "--json"], "UsageError", "No such command 'nonsense'"),
        (["cluster", "nonsense", "--json"], "UsageError", "see `heliostat cluster --help`"),
        (["samples", "r", "--step", "0", "--json"], "UsageError", "'--step'"),
        (["train", "nothing.yaml", "--json"], "ConfigError", "nothing.yaml: no such file"),
        (["check", "jobs", "--json"], "ConfigError", "jobs: is a folder; name a YAML file in it"),
        (["verify", "/nowhere", "--json"], "ConfigError", "/nowhere: holds no run"),
        (["index", "/nowhere", "--json"], "MissingDataError", "make it with `heliostat prepare`"),
        (["runs", "--mlflow", "http://u:p@h", "--json"], "ConfigError", "--mlflow: carries a password"),
    ],
    ids=lambda a: " ".join(a[:2]) if isinstance(a, list) else None,
)
def test_a_users_mistake_is_one_line_one_object_and_exit_code_2(monkeypatch, capsys, arguments, kind, words):
    monkeypatch.chdir(ROOT)
    code, out, err = run(monkeypatch, capsys, *arguments)
    told = json.loads(out)
    assert code == 2 and set(told) == {"error"} and set(told["error"]) == {"type", "message", "exit_code"}
    assert told["error"]["type"] == kind and told["error"]["exit_code"] == 2 and words in told["error"]["message"]
    assert err == f"error: {told['error']['message']}\n" and out.count("\n") == 1


def test_without_json_nothing_of_an_error_is_on_standard_output(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "verify", "/nowhere")
    assert code == 2 and not out and err.startswith("error: /nowhere")


@pytest.mark.parametrize(
    ("raised", "code", "kind"),
    [
        (TrainingError("it failed"), 1, "TrainingError"),
        (AccessError("s3://b: there is no bucket 'b'"), 2, "AccessError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (KeyError("x"), None, "KeyError"),
    ],
    ids=lambda a: type(a).__name__,
)
def test_whatever_ends_a_command_is_an_object_too(monkeypatch, capsys, raised, code, kind):
    """A fault of heliostat's own as well, whose traceback follows."""
    from heliostat.data import index

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(index, "index", fail)
    if code is None:
        monkeypatch.setattr(sys, "argv", ["heliostat", "index", "d", "--json"])
        with pytest.raises(KeyError):
            main.main()
        out = capsys.readouterr().out
    else:
        ended, out, _ = run(monkeypatch, capsys, "index", "d", "--json")
        assert ended == code
    assert json.loads(out)["error"]["type"] == kind and json.loads(out)["error"]["exit_code"] == (code or 1)


def test_a_bucket_that_is_not_there_is_exit_code_2():
    assert Location("s3://nothing/x")._no_bucket().exit_code == 2


def test_what_was_found_before_an_error_is_in_the_object(monkeypatch, capsys):
    """A cluster file's faults, one by one, beside the error."""
    monkeypatch.chdir(ROOT)
    code, out, _ = run(monkeypatch, capsys, "cluster", "check", "clusters/aws-h100.yaml", "--json")
    told = json.loads(out)
    assert ("error" in told) == bool(told["errors"]) == (code == 2) and told["file"] == "clusters/aws-h100.yaml"
    fault = ConfigError("broken")
    with pytest.raises(ConfigError):
        common.finish({"errors": ["a"]}, True, fault)
    assert fault.found == {"errors": ["a"]} and ConfigError("another").found == {}


def test_json_has_no_nan(capsys):
    """Which no reader but Python's takes."""
    common.finish({"loss": float("nan"), "all": [float("inf"), (1.5, None)]}, True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": None, "all": [None, [1.5, None]]}


def test_every_command_that_reports_has_json():
    """All but what shows text as it comes, serves, or is a group."""
    without = {
        name
        for name, command in NAMES.items()
        if not hasattr(command, "commands") and "json_" not in {p.name for p in command.params}
    }
    assert without <= {"logs", "ui"}, without


def test_the_page_of_the_command_line_names_every_command_and_every_exit_code():
    """With the fields that its JSON has: what scripts and agents rely on."""
    page = (ROOT / "docs" / "cli.md").read_text()
    rows = {
        name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`([a-z -]+)`", line.split("|")[1])
    }
    leaves = {name for name, command in NAMES.items() if not hasattr(command, "commands")} - {"logs", "ui"}
    assert leaves - {name.partition(" --")[0] for name in rows} <= {"init"}
    for code in (0, 1, 2, 130):
        assert f"| {code} |" in page and re.search(rf"^{code} +\w", main.__doc__ or "", re.M)


def test_the_documented_fields_of_reports_are_those_that_are_printed(monkeypatch, capsys):
    """Of those that can be had without a run."""
    page = (ROOT / "docs" / "cli.md").read_text()
    for words, command in (
        (("check", FILES["job"], "--offline"), "check"),
        (("cluster", "list"), "cluster list"),
        (("sweeps",), "sweeps"),
    ):
        monkeypatch.chdir(ROOT)
        code, out, _ = run(monkeypatch, capsys, *words, "--json")
        row = next(line for line in page.splitlines() if line.startswith(f"| `{command}` |"))
        assert code == 0 and all(f"`{key}`" in row for key in json.loads(out))
    row = next(line for line in page.splitlines() if line.startswith("| `runs` |"))
    assert all(f"`{key}`" in row for key in RUN)
    row = next(line for line in page.splitlines() if line.startswith("| `chaos` |"))
    assert all(f"`{key}`" in row for key in measure.broken("x"))


# files of the wrong kind ---------------------------------------------------------------------------------------------

FILES = {"job": "jobs/quickstart.yaml", "pipeline": "pipelines/quickstart.yaml", "sweep": "jobs/sweeps/quickstart.yaml",
         "cluster": "clusters/local.yaml"}  # fmt: skip
TAKES = {
    "job": (["train"], ["check"], ["check", "--offline"], ["plan"], ["chaos"], ["submit", "-c", "clusters/kuberay-h100.yaml"]),
    "pipeline": (["prepare"],),
    "sweep": (["tune"],),
    "cluster": (["cluster", "check"], ["cluster", "up"], ["check", "jobs/quickstart.yaml", "--offline", "--cluster"]),
}


@pytest.mark.parametrize("given", FILES)
@pytest.mark.parametrize("wanted", TAKES)
def test_a_file_of_another_kind_names_its_own_command(monkeypatch, capsys, wanted, given):
    if given == wanted:
        return
    monkeypatch.chdir(ROOT)
    for words in TAKES[wanted][:5]:
        if "--cluster" in words:
            continue
        code, _, err = run(monkeypatch, capsys, *words, FILES[given])
        assert code == 2 and kinds.COMMANDS[given].format(FILES[given]) in err, (words, err)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs").rglob("*.yaml")) + sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_file_of_the_workspace_is_of_its_kind(path):
    """By its folder: none is refused where it belongs."""
    from heliostat.config.schema import read_yaml

    wanted = "pipeline" if path.parent.name in ("pipelines", "data") else "sweep" if path.parent.name == "sweeps" else "job"
    assert kinds.kind_of(read_yaml(path)) == wanted


def test_a_sweep_whose_job_is_no_job_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, _, err = run(monkeypatch, capsys, "tune", FILES["sweep"], "--set", f"job={FILES['pipeline']}")
    assert code == 2 and "heliostat prepare" in err


# tables and lines ----------------------------------------------------------------------------------------------------


def shown(width: int, rows: list[list[str]], left: Any = (0,)) -> list[str]:
    return tables.lines(rows, left, width)


RUN = {"run_id": "8ab935a8627d4edb9e3ad37ac277bbac", "name": "a-run-with-a-long-name", "experiment": "e", "status": "FINISHED",
       "reason": None, "started": 1.7e9, "ended": None, "step": 100000, "steps": 200000, "train_loss": 6.2277, "eval_loss": 6.254,
       "per_second": 123456.0, "goodput": 0.325, "worker_hours": 12.345, "gpus": 0.0, "sweep": None}  # fmt: skip
CHECKPOINT = {"step": 100, "whole": True, "bytes": 5e9, "written": 1.7e9, "world_size": 64, "zero_stage": 3, "fault": None,
              "metrics": {"loss": 6.25, "perplexity": 520.2, "bits_per_byte": 2.6}, "kept": ["best", "newest"]}  # fmt: skip
TABLES = {
    "runs": run_table.cells([RUN, RUN]),
    "checkpoints": audit._checkpoint_cells([CHECKPOINT]),
    "chaos": chaos_table([{**measure.broken("kill-worker"), "detected_s": 12.5, "goodput": 0.5}]),
    "goodput": [["part", "seconds", "share", *(f"attempt {i}" for i in range(1, 9))], ["computing", *["1,234.5"] * 10]],
    "trials": [
        ["trial", "status", "step", "loss", *(f"a_rather_long_key_{i}" for i in range(8))],
        ["1", "finished", *["0.001234"] * 10],
    ],
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_no_table_is_cut(name, width):
    """Every cell is there in whole, in lines of at most the terminal's width; as wide as it is where it is piped on."""
    rows = TABLES[name]
    found = shown(width, rows)
    assert all(len(line) <= width for line in found)
    for row in rows:
        assert all(any(cell in line for line in found) for cell in row)
    assert len(tables.lines(rows)) == len(rows)


def test_the_commands_tables_go_through_the_terminals_width(monkeypatch):
    at = io.StringIO()
    monkeypatch.setattr(common, "out", common.Printer(file=at, force_terminal=True, width=80, highlight=False, soft_wrap=True))
    common.print_table(TABLES["runs"], left=range(4))
    assert max(map(len, at.getvalue().splitlines())) <= 80 and RUN["run_id"] in at.getvalue()
    at = io.StringIO()
    monkeypatch.setattr(common, "out", common.Printer(file=at, width=80, highlight=False, soft_wrap=True))
    common.print_table(TABLES["runs"], left=range(4))
    assert len(at.getvalue().splitlines()) == len(TABLES["runs"])


def test_columns_are_aligned():
    assert tables.lines([["name", "n"], ["a", "100"]]) == ["name    n", "a     100"]
    assert tables.lines([["name", "n"], ["a", "100"]], width=5) == ["name", "      n", "a", "    100"]
    assert tables.lines([]) == []


PARTS = [(1, "loss 6.2277"), (5, "lr 1.00e-03"), (3, "1,234,567 tokens/s"), (4, "MFU 45.6%"), (7, "data wait 0.0%")]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_the_progress_line_fits_every_terminal(width):
    """What matters least goes first: the step stays to the last, the time to go and the loss before all the rest."""
    text = progress.line("quickstart", 1_234, 10_000, PARTS, 4000.0, width)
    assert len(text) <= width and text.startswith("quickstart 1,234/10,0"[: width - 1])
    assert ("loss 6.2277" in text) == (width >= 40) and ("ETA 1 h 6 min" in text) == (width >= 60)
    assert ("━" in text) == (width >= 200)
    assert "…" not in text or width == 20


def test_there_is_no_time_to_go_before_two_reports_and_none_at_the_end(caplog):
    """Not "ETA 0 s" at the first step."""
    speed = progress.Speed(100)
    assert speed.left() is None
    speed.reached(1, 10.0)
    assert speed.left() is None
    speed.reached(11, 20.0)
    assert speed.left() == 89.0
    speed.reached(100, 120.0)
    assert speed.left() is None
    event = Steps(first=0, loss=[2.0], lr=[0.1], grad_norm=[1.0], seconds=1.0, tokens_per_second=10.0, data_wait=0.0)
    with caplog.at_level(logging.INFO, "heliostat"):
        progress.ProgressReporter(Console(file=io.StringIO()), "x", 0, 10, "tokens").event(event)
    assert caplog.messages == ["step 1/10  loss 2.0000  lr 1.00e-01  10 tokens/s  data wait 0.0%"]


def test_a_log_line_is_whole_on_a_narrow_terminal(monkeypatch):
    """Beside its time, with what looks like markup as it is."""
    at = io.StringIO()
    monkeypatch.setattr(logs, "console", Console(file=at, force_terminal=True, width=40, no_color=True))
    handler = logs.Terminal()
    handler.setFormatter(logs.Lines("%(message)s"))
    message = "step 10  held-out: [bold] loss 7.327  perplexity 1520  bits_per_byte 3.067"
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, message, (), None))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", at.getvalue()).splitlines()
    assert all(len(line) <= 40 for line in lines) and re.match(r"\d\d:\d\d:\d\d step 10", lines[0])
    assert " ".join(" ".join(line[9:] for line in lines).split()) == " ".join(message.split())


def test_log_lines_do_not_write_over_the_live_line():
    """They share its console."""
    from heliostat.terminal import console

    assert inspect.getmodule(logs.Terminal.emit).console is console  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (310, "5 min 10 s"), (12_000, "3 h 20 min"), (187_300, "2 d 4 h")]
)
def test_a_time_is_told_in_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_what_does_not_fit_is_left_out_by_rank():
    assert fit([(0, "name"), (2, "b"), (1, "a")], 7) == "name  a"
    assert fit([(0, "a-very-long-name")], 8) == "a-very-…"


def test_log_lines_have_a_date_from_the_second_day_on_and_always_in_a_file(capsys):
    at = datetime(2026, 11, 27, 0, 0, 5)
    assert logs.stamp(at, date(2026, 11, 27)) == "00:00:05" and logs.stamp(at, date(2026, 11, 26)) == "2026-11-27 00:00:05"
    record = logging.LogRecord("x", logging.WARNING, "", 0, "told", (), None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d told", logs.Lines("%(asctime)s %(message)s", logs.STAMP).format(record))


# what is suggested next ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("prompt", ["It was", "don't 'quote' me", None])
@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_what_is_suggested_next_works_with_the_runs_own_paths(tmp_path, monkeypatch, registered, prompt, unit):
    """The model by a name that every command takes, the run's folder, its store unless that is the default, its own prompt."""
    from heliostat.check import load_job

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = "models:/m/3" if registered else "models:/m-0123456789abcdef0123456789abcdef"
    made = {"samples": [{"prompt": prompt, "text": ""}] if prompt else [], "model_uri": uri, "run_id": "a" * 32, "unit": unit}
    elsewhere = load_job(write(tmp_path, **{"mlflow.uri": "sqlite:///else where.db", "storage": "my runs"}))
    lines = [shlex.split(line) for line in training.next_commands(made, elsewhere, common.store_uri(None))]
    store = ["--mlflow", f"sqlite:///{tmp_path}/else where.db"]
    assert ["heliostat", "verify", str(tmp_path / "my runs" / "small")] in lines and ["heliostat", "ui", *store] in lines
    name, drawn = ("models:/m/3" if registered else "a" * 32), (["--out", "sample.png"] if unit == "samples" else [])
    wanted = [["heliostat", "generate", name, "--prompt", prompt, *drawn, *store]] if prompt else []
    assert [line for line in lines if "generate" in line] == wanted
    here = load_job(write(tmp_path, **{"mlflow.uri": "sqlite:///.heliostat/mlflow.db"}))
    assert not [line for line in training.next_commands(made, here, common.store_uri(None)) if "--mlflow" in line]


def test_the_usual_store_is_asked_for_before_mlflow_sets_it_to_the_jobs(tmp_path, monkeypatch, capsys):
    """As `mlflow.set_tracking_uri` does: the store of the next command would not be named."""
    from heliostat.train import run as running

    def trained(job: Any, *_: Any, **__: Any) -> dict[str, Any]:
        os.environ["MLFLOW_TRACKING_URI"] = job.mlflow.uri
        return {"samples": [], "eval": {"loss": 1.0}, "reference": {}, "startup": {}, "tokens_per_second": 1.0, "unit": "tokens",
                "data_wait": 0.0, "seconds_to_first_step": 1.0, "model_uri": "models:/m/1", "run_id": "a" * 32,
                "checkpoint": "c"}  # fmt: skip

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////usual.db")
    monkeypatch.setattr(running, "train_job", trained)
    code, out, _ = run(monkeypatch, capsys, "train", str(write(tmp_path)))
    assert code == 0 and f"heliostat ui --mlflow sqlite:///{tmp_path}/mlflow.db\n" in out


def test_a_run_that_another_store_knows_names_that_store(tmp_path):
    """Its folder says where; a run of the store that was asked has no such hint."""
    from heliostat.track import mlflow_client
    from mlflow.exceptions import MlflowException

    class Empty:
        def get_run(self, run_id: str) -> None:
            raise MlflowException(f"{run_id} is not here")

    made = {"run_id": "0" * 32, "token": "t", "uri": "sqlite:////other.db", "name": "x"}
    (tmp_path / "run.json").write_text(json.dumps(made))
    with pytest.raises(
        ConfigError, match=r"no such run in sqlite:////asked\.db; it is in another store: give --mlflow sqlite:////other\.db$"
    ):
        mlflow_client.find(Empty(), str(tmp_path), "sqlite:////asked.db")
    with pytest.raises(ConfigError, match=r"no such run in sqlite:////other\.db$"):
        mlflow_client.find(Empty(), str(tmp_path), "sqlite:////other.db")
