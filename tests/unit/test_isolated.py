"""Tests parsers in separate processes: every failure of one has a reason, and a parser reaches nothing of its user."""

import socket
import time
from contextlib import closing
from pathlib import Path

import pytest
from heliostat.curation import isolated
from heliostat.curation.isolated import Isolated, IsolatedError
from heliostat.tasks import cpu_time


def test_what_another_process_computes_counts_and_what_is_waited_for_does_not():
    with closing(Isolated("tests.unit.build_isolated:worst", {"mark": "!"}, 5, 1024)) as run:
        run({"do": ""}, b"")
        start = cpu_time.now()
        run({"do": "compute"}, b"")
        assert 0.19 < cpu_time.now() - start < 0.5
        start = cpu_time.now()
        time.sleep(0.3)
        assert cpu_time.now() - start < 0.1


def test_the_time_of_short_items_counts():
    """Linux updates a process's time only at each tick while a timer runs, so most of a page's millisecond was lost."""
    with closing(Isolated("tests.unit.build_isolated:worst", {"mark": "!"}, 5, 1024)) as run:
        run({"do": ""}, b"")
        start = cpu_time.now()
        for _ in range(300):
            run({"do": "compute briefly"}, b"")
        counted, start = cpu_time.now() - start, time.process_time()
        for _ in range(300):
            sum(range(50_000))
        assert counted > 0.7 * (time.process_time() - start)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("crash", "crashed"),
        ("hang", "timeout"),
        ("sleep", "timeout"),
        ("memory", "memory"),
        ("raise", "failed"),
        ("exit", "crashed"),
        ("answer twice", "crashed"),
    ],
)
def test_whatever_happens_to_an_isolated_process_has_a_reason_and_the_next_item_an_answer(what, reason, monkeypatch):
    monkeypatch.setattr("heliostat.curation.isolated.WALL", 4)
    with closing(Isolated("tests.unit.build_isolated:worst", {"mark": "!"}, 0.5, 1024)) as run:
        assert run({"do": "echo"}, b"x" * 3_000_000) == ({"seen": 3_000_000}, b"!")
        with pytest.raises(IsolatedError) as found:
            run({"do": what}, b"")
        assert found.value.reason == reason
        assert run({"do": "echo"}, b"") == ({"seen": 0}, b"!")


@pytest.fixture
def taken_over():
    with closing(Isolated("tests.unit.build_isolated:worst", {"mark": "!"}, 5, 1024)) as run:
        yield lambda what, **about: run({"do": what, **about}, b"")[0]["seen"]


def test_a_parser_has_none_of_the_keys_in_the_environment(monkeypatch, taken_over):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    found = set(taken_over("environment"))
    assert found <= {*isolated.KEPT, *isolated.SINGLE, "PYTHONPATH", "LC_CTYPE"} and "AWS_SECRET_ACCESS_KEY" not in found


@pytest.mark.parametrize("what", ["socket", "unix socket", "exec", "run", "fork", "signal"])
def test_a_parser_opens_no_socket_and_starts_and_signals_no_process(what, taken_over):
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(IsolatedError, match="PermissionError") as found:
        taken_over(what, port=server.getsockname()[1])
    assert found.value.reason == "failed"
    assert taken_over("import") == "colorsys"


def test_a_parser_reads_the_data_of_libraries_wherever_they_are_installed(tmp_path, monkeypatch, taken_over):
    """For `pip install --user` or `--target`, and an environment on top of another: these aren't in Python's own folder."""
    library = tmp_path / "site-packages" / "parser"
    library.mkdir(parents=True)
    (library / "settings.cfg").write_text("of the library")
    monkeypatch.syspath_prepend(str(library.parent))
    assert taken_over("file", path=str(library / "settings.cfg")) == "of the library"


@pytest.mark.parametrize("what", ["file", "parent", "write"])
def test_a_parser_reads_and_changes_no_file_of_its_user(what, tmp_path, taken_over):
    (tmp_path / "credentials").write_text("aws_secret_access_key = hunter2")
    taken_over("environment")
    if any("namespaces aren't available" in lack for lack in isolated._logged):
        pytest.skip(f"this machine allows none: {isolated._logged}")
    with pytest.raises(IsolatedError, match=r"FileNotFoundError|PermissionError|File too large"):
        taken_over(what, path=str(tmp_path / "credentials"))
    assert (tmp_path / "credentials").read_text() == "aws_secret_access_key = hunter2"


def test_a_machine_without_namespaces_is_logged_once_and_the_filter_stays(monkeypatch, caplog):
    """The folder on which the root would be mounted is missing."""
    monkeypatch.setattr(isolated, "_logged", set())
    for _ in range(2):
        with closing(Isolated("tests.unit.build_isolated:worst", {"mark": "!"}, 5, 1024)) as run:
            Path(run._root.name).rmdir()
            assert run({"do": "import"}, b"")[0] == {"seen": "colorsys"}
            with pytest.raises(IsolatedError, match="PermissionError"):
                run({"do": "exec"}, b"")
            Path(run._root.name).mkdir()
    assert [message for message in caplog.messages if "namespaces aren't available" in message] == caplog.messages[
        :1
    ] and caplog.messages
