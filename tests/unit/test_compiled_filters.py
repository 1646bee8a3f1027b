"""Tests that compiled filters measure what their definitions say, and that Numba is imported and compiles only when needed."""

import errno
import os
import pwd
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
from heliostat import extras
from heliostat.curation import compiled, machine_code
from heliostat.curation.english.characters import SYMBOLS, TERMINALS
from heliostat.curation.english.sentences import _lower, sentences
from heliostat.curation.stage import Document
from heliostat.curation.stages.c4 import C4
from heliostat.curation.stages.fineweb import FineWeb
from heliostat.curation.stages.gopher_quality import GopherQuality
from heliostat.curation.stages.gopher_repetition import GopherRepetition
from heliostat.errors import MissingExtraError
from heliostat.storage import local_files
from numba import config
from numba.core.caching import CacheImpl

from tests.seeds import every_seed
from tests.unit.english_reference import tokens

WORDS = ["the", "of", "word", "Mr", "don't", "(see", "日本", "1989", "x" * 30, "#tag", "-", "•", "...", "…", "a…", ":)", "\ud800"]
LINE_ENDS = ["\n", "\n", "\n\n", "\r\n", "\r", "\u2028", "\x1c", "\x0b", " \n", "\n- ", "\n • "]
PHRASES = ["use cookies", "JavaScript", "javaſcript", "coo\u212aies policy", "cooKie Policy", "TERMS of use", "lorem İpsum",
           "Lorem  ipsum", "Lorem ipsum", "{", "[1]", "[٣٤]", "[edit]", "[citation needed]", "[", "]", "[1", "[]"]  # fmt: skip
MARKS = [".", "!", "?", '."', "'", "...", "。", ". ", "\x1f", "\t"]


def text_of(draw, *kinds):
    pieces = [*kinds, [" "], [" "], LINE_ENDS, MARKS]
    return "".join(draw.choice(draw.choice(pieces)) for _ in range(draw.choice([1, 5, 60, 300])))


@every_seed(20)
def test_duplicate_n_grams_are_those_of_the_definition(seed):
    """Compares with a count by the definition, from the left, over few repeated words of different lengths."""
    draw = random.Random(seed)
    words = draw.choices(["a", "bb", "ccc", "dddd"], k=draw.randint(0, 80))
    text = " ".join(words) or "-"
    _, measures = GopherRepetition(**dict.fromkeys((f for f in GopherRepetition.model_fields), 1.0)).judge(text)
    words = text.split()
    for n in range(5, 11):
        seen, chars, at = set(), 0, 0
        while at <= len(words) - n:
            gram = tuple(words[at : at + n])
            chars, at = (chars + sum(map(len, gram)), at + n) if gram in seen else (chars, at + 1)
            seen.add(gram)
        assert measures[f"{n}_grams"] == chars / len(text)
    for n in range(2, 5):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        most = max((grams.count(g) for g in grams), default=0)
        top = next((g for g in grams if grams.count(g) == most), "")
        assert measures[f"top_{n}_grams"] == most * len(top) / len(text)


@every_seed(20)
def test_lines_and_paragraphs_are_those_of_the_definition(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices(["a", "b", "\n", "\n\n", "\r", "é"], k=draw.randint(1, 60)))
    _, measures = GopherRepetition().judge(text)
    for name, parts in (("paragraph", re.split(r"\n{2,}", text.strip())), ("line", re.split(r"\n+", text))):
        lost = len("".join(parts)) - len("".join(set(parts)))
        assert measures[f"{name}s"] == (len(parts) - len(set(parts))) / len(parts) and measures[f"{name}_chars"] == lost / len(
            text
        )


@every_seed(20)
def test_quality_is_that_of_the_definition(seed):
    draw = random.Random(seed)
    for _ in range(20):
        text = "the " + text_of(draw, WORDS, WORDS)
        words = [word for part in text.split() for word in tokens(part)]
        lines = text.splitlines()
        stop_words = ["the", "of", "the", "", "the of", ":)", "…"]
        for all_words in (True, False):
            _, measures = GopherQuality(marks_are_words=all_words, stop_words=stop_words).judge(text)
            plain = [word for word in words if not SYMBOLS.issuperset(word)]
            counted = words if all_words else plain
            assert measures == {
                "words": len(plain),
                "word_length": sum(map(len, plain)) / max(1, len(plain)),
                "hashes": text.count("#") / len(words),
                "ellipses": (text.count("...") + text.count("…")) / len(words),
                "bullet_lines": sum(line.lstrip().startswith(("-", "•")) for line in lines) / len(lines),
                "ellipsis_lines": sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines),
                "alphabetic_words": sum(any(map(str.isalpha, word)) for word in counted) / max(1, len(counted)),
                "stop_words": len({*stop_words} & {*words}),
            }


@every_seed(20)
def test_lists_are_those_of_the_definition(seed):
    draw = random.Random(seed)
    for _ in range(20):
        text = "the " + text_of(draw, WORDS)
        lines = [line for line in text.split("\n") if line.strip()]
        _, measures = FineWeb().judge(text)
        ends = text.count("\n")
        assert measures["terminal_lines"] == sum(line[-1] in TERMINALS for line in lines) / len(lines)
        assert measures["duplicate_chars"] == (len("".join(lines)) - len("".join({*lines}))) / (len(text) - ends)
        assert measures["line_ends"] == ends / len([word for part in text.split() for word in tokens(part)])
        for short in (0, 5, 30):
            _, measures = FineWeb(short_line_chars=short).judge(text)
            assert measures["short_lines"] == sum(len(line) <= short for line in lines) / len(lines)


def by_definition(stage, text):
    """Returns what `c4` makes of a text: what drops it, its sentences, the removed lines, and the text."""
    kept, count, removed = [], 0, {}
    for line in map(str.strip, text.splitlines()):
        short = re.sub(r"\[(?:\d*|edit|citation needed)\]", "", line) if stage.citations else line
        lower = short.lower()
        policies = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
        reasons = {
            "lines_of_long_words": any(len(word) > stage.max_word_chars for word in line.split()),
            "lines_without_terminal_mark": stage.terminal_marks
            and (not short.endswith((".", "?", "!", '"', "'")) or short.endswith("...")),
            "short_lines": len(line.split()) < stage.min_line_words,
            "lorem_ipsum": stage.lorem_ipsum and "lorem ipsum" in lower,
            "javascript_lines": stage.javascript and "javascript" in lower,
            "curly_bracket": stage.curly_brackets and "{" in short,
            "policy_lines": stage.policies and any(policy in lower for policy in policies),
        }
        why = next((name for name, applies in reasons.items() if applies), "")
        if why in stage.reasons:
            return why, count, {}, None
        if why:
            removed[why] = removed.get(why, 0) + 1
        else:
            count += sentences(short)
            kept.append(short)
    return "", count, removed, "\n".join(kept).strip()


@every_seed(20)
def test_lines_of_c4_are_those_of_the_definition(seed):
    draw = random.Random(seed)
    for _ in range(30):
        keys = {key: draw.random() < 0.6 for key in ("terminal_marks", "javascript", "policies", "citations", "lorem_ipsum")}
        keys |= {"curly_brackets": draw.random() < 0.2, "min_line_words": draw.choice([0, 1, 3])}
        stage = C4(**keys, max_word_chars=draw.choice([12, 1000]), min_sentences=0)
        text = text_of(draw, WORDS, WORDS, PHRASES, MARKS)
        (outcome,) = stage.open()([Document("a", text)])
        text_after = outcome.document and outcome.document.text
        assert (outcome.reason, outcome.measures["sentences"], outcome.counts, text_after) == by_definition(stage, text)


def test_characters_whose_lower_case_has_an_ascii_letter_are_folded():
    """`c4` compares phrases in lower case. The lower case of İ also has a mark after the i, so no phrase has it."""
    for character in map(chr, range(0x110000)):
        lower = character.lower()
        folded = lower if len(lower) == 1 and lower.isascii() else character
        assert chr(_lower(ord(character))) == folded
        assert lower.isascii() or not any(map(str.isascii, lower)) or character == "İ"


@pytest.mark.parametrize("stage", [GopherRepetition(), GopherQuality(), FineWeb(), C4()], ids=lambda stage: stage.named())
def test_a_stage_without_numba_gives_the_command_before_any_document(stage, monkeypatch):
    real = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "numba" else real(name))
    for start in (stage.check, stage.open):
        with pytest.raises(MissingExtraError, match=rf"^stage {stage.named()} needs the extra 'curation' \(no module 'numba'\)"):
            start()


def test_checking_stages_imports_no_numba():
    """Numba takes 0.5 s to import, and a kernel takes seconds to compile."""
    code = """
import sys
import heliostat, heliostat.cli.main
from heliostat.curation.stages import c4, decontaminate, fineweb, gopher_quality, gopher_repetition
for kind in (c4.C4, fineweb.FineWeb, gopher_quality.GopherQuality, gopher_repetition.GopherRepetition):
    kind().check()
decontaminate.Decontaminate(sets={"tests": sys.argv[1]}, n=2).check()
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, __file__], check=True)


def test_compiled_loops_import_no_scipy():
    """SciPy takes 0.16 s and 16 MB per process. Numba's functions of linear algebra still find it."""
    code = """
import sys
import numpy as np
from heliostat.curation.english import words
words.rules()
assert "scipy" not in sys.modules
from numba import njit
assert njit(lambda a: a @ a)(np.eye(2)).tolist() == [[1, 0], [0, 1]] and "scipy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


OPENED = """
import sys
from heliostat.curation import chain, registry
from heliostat.curation.stage import Document
from heliostat.storage.locations import Location
from heliostat.tasks.work import key

def compiled():
    modules = [module for name, module in sys.modules.items() if name.startswith("heliostat.curation.")]
    kernels = {(m.__name__, name): k for m in modules for name, k in vars(m).items() if hasattr(k, "py_func")}
    return {name: len(kernel.signatures) for name, kernel in kernels.items()}

entry = {"stage": sys.argv[1]}
opened = chain.Chain(Location("."), [(entry, key(registry.parse(entry).follows()), ())])
before = compiled()
opened.run([Document("a", "The (first) sentence, e.g. don't. [1]\\n\\nIt has 10km of it.\\n"), Document("b", "")])
assert sum(before.values()) > 0 and compiled() == before, "a document waits for the compiler"
"""


@pytest.mark.parametrize("stage", ["gopher_repetition", "gopher_quality", "fineweb", "c4", "lines"])
def test_opening_a_stage_compiles_its_loops(stage):
    """A prediction from a sample scales the seconds of documents with the input, but not the seconds of opening stages. The first
    document that reaches a stage may be in any task: an earlier stage may drop the first batch."""
    subprocess.run([sys.executable, "-c", OPENED, stage], check=True)


def test_a_kernel_is_compiled_again_if_any_module_of_its_folder_changes(tmp_path):
    """Numba compares only the kernel's own file. But the kernel also depends on constants and kernels of other modules."""
    digests = []
    for name, content in (("a.py", "X = 1"), ("b.py", "Y = 1"), ("a.py", "X = 2"), ("data.txt", "")):
        (tmp_path / name).write_text(content)
        machine_code.modules_digest.cache_clear()
        digests.append(machine_code.modules_digest(tmp_path))
    assert len({*digests}) == 3 and digests[2] == digests[3]
    assert _lower.py_func.__qualname__.startswith("_lower_")


def test_a_kernel_is_compiled_again_if_a_constant_of_another_folder_changes(monkeypatch, tmp_path):
    """Machine code contains constants. Kernels of English words get their hashes' factor from a module of another folder."""
    english, shared = tmp_path / "english", tmp_path / "comparable_characters.py"
    shutil.copytree(machine_code.HERE / "english", english, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("compiled.py", shared.name):
        shutil.copy(machine_code.HERE / name, tmp_path)
    monkeypatch.setattr(machine_code, "HERE", tmp_path)
    machine_code.modules_digest.cache_clear()
    before = machine_code.modules_digest(english)
    shared.write_text(shared.read_text().replace("0x9E3779B97F4A7C15", "0x9E3779B97F4A7C17"))
    machine_code.modules_digest.cache_clear()
    assert machine_code.modules_digest(english) != before
    machine_code.modules_digest.cache_clear()
    found = [re.findall(r"heliostat\.curation(?: import |\.)(\w+)", path.read_text()) for path in english.glob("*.py")]
    imported = {name for names in found for name in names}
    assert {f"{name}.py" for name in imported - {"english"}} == {*machine_code.SHARED}


def test_other_threads_can_import_scipy_while_numba_is_imported():
    """Numba doesn't see SciPy. But a thread of a task or a notebook may import it at the same time."""
    code = """
import threading
from heliostat.curation import compiled
errors = []
def other():
    try:
        import scipy
    except ImportError as e:
        errors.append(e)
with compiled._hidden("scipy"):
    try:
        import scipy
        raise AssertionError("not hidden")
    except ImportError:
        pass
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
import scipy
assert not errors, errors
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_node_without_a_writable_folder_compiles_without_a_cache(monkeypatch):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert kernel()(21) == 42


def test_processes_that_store_two_signatures_at_once_do_not_mix_them(monkeypatch, tmp_path):
    """Numba's own cache listed the code for integers under floats, and `2 * 2.5` was 4 from then on, in each process."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    one, other = kernel(), kernel()
    other._cache._cache_file._load_index = dict  # `other` reads the index before `one` writes it
    store = one._cache._cache_file._save_data
    one._cache._cache_file._save_data = lambda name, code: (other(2.5), store(name, code))
    assert one(3) == 6
    later = kernel()
    assert later(2.5) == 5.0 and later(3) == 6
    assert len(later._cache_hits) == 2


def test_a_damaged_cache_and_a_full_disk_cost_only_time(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    assert kernel()(3) == 6
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        path.write_bytes(b"")
    damaged = kernel()
    assert damaged(3) == 6 and not damaged._cache_hits

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert kernel()(2.5) == 5.0


KERNEL = """
import logging, os, time
from pathlib import Path
from heliostat.curation.compiled import compiled

@compiled
def inner(number):
    return 2 * number

@compiled
def outer(number):
    return inner(number) + 1

logging.basicConfig(level=logging.INFO, format="%(message)s")
Path(f"ready-{os.getpid()}").touch()
while len([*Path().glob("ready-*")]) < 3:
    time.sleep(0.01)
print(outer(20), sum((inner._cache_misses + outer._cache_misses).values()))
"""


def test_one_process_of_a_machine_compiles_and_says_so(tmp_path):
    """32 processes would each need 8 to 12 CPU seconds and 300 MB. A user who sees nothing for so long may stop the command."""
    (tmp_path / "kernels.py").write_text(KERNEL)
    environment = {"PYTHONPATH": ":".join(sys.path), "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    command, pipe = [sys.executable, "kernels.py"], subprocess.PIPE
    running = [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    printed, logged = zip(*(process.communicate(timeout=60) for process in running), strict=True)
    assert sorted(printed) == ["41 0\n", "41 0\n", "41 2\n"]
    assert sorted(logged) == ["", "", "compiling the text filters: about 10 s, once per machine\n"]


def test_the_driver_knows_without_numba_whether_this_machine_has_machine_code(monkeypatch, tmp_path):
    """Users don't see the log of a task, so the command says that tasks will compile."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert machine_code.is_missing()
    compiled.compiled(FunctionType(compiled.finalized.py_func.__code__, vars(compiled)))(np.uint64(1))
    assert not machine_code.is_missing()
    monkeypatch.setattr(machine_code, "modules_digest", lambda folder: "of a newer version")
    assert machine_code.is_missing()


def test_the_driver_finds_machine_code_in_the_folder_for_caches(monkeypatch, tmp_path):
    """The package's folder may be read-only. A container may run as a user that has no home, or that can't read it."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(machine_code, "modules_digest", lambda folder: "of a newer version")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine_code.is_missing()
    (tmp_path / "numba" / "english_0").mkdir(parents=True)
    (tmp_path / "numba" / "english_0" / "words._words_of a newer version-1.py312.nbc").touch()
    assert not machine_code.is_missing()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert machine_code.is_missing()
    monkeypatch.setattr(Path, "rglob", _forbidden)
    assert machine_code.is_missing()


def _forbidden(*_):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_process_that_cannot_take_the_lock_compiles_after_a_deadline(monkeypatch, tmp_path):
    """Another process may hang while it has the lock. Then this one waits once, and not for each kernel."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compiled, "_LOCK", lock := compiled.CompileLock())
    lock.wait_s, slept = 0.05, []
    monkeypatch.setattr(compiled, "LOOK_S", 0.01)
    one = kernel()
    with local_files.alone(one._cache._lock_file, 0.0):
        assert one(3) == 6 and not lock.passed and lock.wait_s == 0.0
        monkeypatch.setattr(compiled.time, "sleep", slept.append)
        assert one(2.5) == 5.0 and not slept


def kernel():
    """Returns a kernel as a new process would."""
    return compiled.compiled(FunctionType(_double.__code__, globals()))


def _double(number):
    return 2 * number


@pytest.mark.ci
def test_processes_that_compile_at_once_get_the_same_words(tmp_path):
    """The tasks of a node share one cache, also if the package's folder isn't writable."""
    code = "from heliostat.curation.english import words; from heliostat.curation.english.characters import code_points\n"
    code += "print(words.spoken(code_points('(well-known) words, e.g. 10km')).hashes.tolist())"
    environment = {"PYTHONPATH": ":".join(sys.path), "NUMBA_CACHE_DIR": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(4)]
    printed = {process.communicate()[0] for process in running}
    assert len(printed) == 1 and not any(process.returncode for process in running)
    assert [*tmp_path.rglob("*.nbc")]
