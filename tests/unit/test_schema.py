"""Tests reading YAML into models: every bad input is one ConfigError with the key, the value, and the nearest choice."""

import random

import pytest
import yaml
from heliostat import schema
from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.curation import prepare, registry
from heliostat.errors import ConfigError

from tests.unit.build_job import BASE, raw, write


def fault(path, settings: list[str] | None = None) -> str:
    """Returns the one error that loading the job raises."""
    with pytest.raises(ConfigError) as e:
        spec.load(path, settings)
    return str(e.value)


def keys(tree: object, prefix: str = "") -> list[str]:
    """Lists every key path of nested mappings and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [p for k, v in items for p in (f"{prefix}{k}", *keys(v, f"{prefix}{k}."))]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("workrs", "Did you mean 'workers'?"),
        ("train.stepss", "Did you mean 'steps'?"),
        ("train.optimizer.momentun", "Use one of: betas, eps, lr, name, weight_decay"),
        ("train.zero.offload.optimiser", "Did you mean 'optimizer'?"),
        ("data.sources.0.wieght", "Did you mean 'weight'?"),
        ("data.sequence_lenght", "Did you mean 'sequence_length'?"),
        ("mlflow.registr", "Did you mean 'register'?"),
        ("mlflow.register_as", "Did you mean 'register'?"),
        ("evaluate.evry", "Did you mean 'every'?"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, key, nearest):
    """At the top level, nested, in a list, and next to an alias: the error has the key's path, and suggests a valid key."""
    message = fault(write(tmp_path, **{key: 1}))
    assert message == f"{tmp_path / 'job.yaml'}: {key}: unknown key. {nearest}"


@pytest.mark.parametrize("seed", range(30))
def test_a_misspelt_key_anywhere_is_refused_by_name(tmp_path, seed):
    """No typo is silently ignored at any place in the file (a recipe checks the model's keys)."""
    rng = random.Random(seed)
    path = rng.choice([k for k in keys(BASE) if not k.startswith("model.") and not k.rpartition(".")[2].isdigit()])
    *parents, last = path.split(".")
    i = rng.randrange(len(last))
    typo = ".".join([*parents, last[:i] + "q" + last[i:]])
    message = fault(write(tmp_path, **{typo: 1}))
    assert f"{typo}: unknown key. Did you mean {last!r}?" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", True, "expected an integer, got True. Write train.steps: INTEGER"),
        ("train.steps", 2.0, "expected an integer, got 2.0. Write train.steps: INTEGER"),
        ("train.steps", "ten", "expected an integer, got 'ten'. Write train.steps: INTEGER"),
        ("train.steps", 0, "0 is too small. Use a number above 0"),
        ("train.steps", 10**22, "10000000000000000000000 is too large. Use 4294967296 or less"),
        ("data.shuffle_window", 10**22, "10000000000000000000000 is too large. Use 4294967296 or less"),
        ("evaluate.samples", 10**22, "10000000000000000000000 is too large. Use 4294967296 or less"),
        ("train.steps", [1], "expected an integer, got [1]. Write train.steps: INTEGER"),
        ("train.compile", 1, "1 isn't a choice. Use true, false, or blocks"),
        ("train.compile", "yes", "'yes' isn't a choice. Use true, false, or blocks"),
        ("train.optimizer.lr", True, "expected a number, got True. Write train.optimizer.lr: NUMBER"),
        ("train.optimizer.lr", "fast", "expected a number, got 'fast'. Write train.optimizer.lr: NUMBER"),
        ("train.optimizer.lr", float("inf"), "inf isn't finite. Use a finite number"),
        ("train.optimizer.lr", float("nan"), "nan isn't finite. Use a finite number"),
        ("train.optimizer.lr", -1.0, "-1.0 is too small. Use a number above 0"),
        ("train.optimizer.betas", [0.9], "[0.9] is too short. Write 2 or more items"),
        ("train.optimizer.betas.1", 1.0, "1.0 is too large. Use a number below 1"),
        ("data.sources.0.weight", float("inf"), "inf isn't finite. Use a finite number"),
        ("data.sources.0.weight", -1, "-1 is too small. Use 0 or more"),
        ("data.seed", -1, "-1 is too small. Use 0 or more"),
        ("train.seed", 2**32, "4294967296 is too large. Use a number below 4294967296"),
        ("name", 5, "expected text, got 5. Write name: TEXT"),
        ("name", "a/b", "'a/b' isn't a valid name. Use up to 100 letters"),
        ("name", "", "'' isn't a valid name. Use up to 100 letters"),
        ("model", "llama", "expected a mapping, got 'llama'. Write model: {KEY: VALUE}"),
        ("train", 5, "expected a mapping, got 5"),
        ("data.sources", [], "[] is too short. Write 1 or more items"),
        ("evaluate.fraction", 1, "1 is too large. Use a number below 1"),
        ("workers.gpus", -1, "-1 is too small. Use 0 or more"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(tmp_path, key, value, message):
    """Types aren't converted, and a number out of range isn't clipped."""
    base = {"train.optimizer.betas": [0.9, 0.95]} if key.startswith("train.optimizer.betas.") else {}
    assert fault(write(tmp_path, **base, **{key: value})).startswith(f"{tmp_path / 'job.yaml'}: {key}: {message}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.precision", "bf61", "'bf61' isn't a choice. Did you mean 'bf16'?"),
        ("train.precision", "int8", "'int8' isn't a choice. Use one of: bf16, fp16, fp32"),
        ("train.zero.stage", 4, "4 isn't a choice. Use one of: 0, 1, 2, 3"),
        ("train.zero.stage", "2", "'2' isn't a choice. Did you mean 2?"),
        ("train.zero.stage", True, "True isn't a choice. Use one of: 0, 1, 2, 3"),
        ("train.schedule.name", "cosin", "'cosin' isn't a choice. Did you mean 'cosine'?"),
        ("train.zero.offload.param", "ram", "'ram' isn't a choice. Use one of: cpu, nvme"),
        ("train.zero.offload.optimizer", "gpu", "'gpu' isn't a choice. Did you mean 'cpu'?"),
        ("train.optimizer.name", "adam", "'adam' isn't a choice. Did you mean 'adamw'?"),
    ],
)
def test_a_choice_that_is_none_shows_the_choices(tmp_path, key, value, message):
    """The error has the nearest choice, or all of them, also for an optional key."""
    assert fault(write(tmp_path, **{key: value})) == f"{tmp_path / 'job.yaml'}: {key}: {message}"


@pytest.mark.parametrize(
    ("key", "example"),
    [
        ("name", "TEXT"), ("model", "..."), ("data", "{path: FOLDER, sequence_length: INTEGER}"),
        ("train.steps", "INTEGER, or train.epochs, or train.tokens"), ("evaluate.every", "INTEGER"),
    ],
)  # fmt: skip
def test_a_missing_key_is_named_with_what_to_write(tmp_path, key, example):
    """The error has its whole path, without the mapping that lacks it."""
    message = fault(write(tmp_path, **{key: None}))
    assert message == f"{tmp_path / 'job.yaml'}: {key}: required key missing. Write {key}: {example}"


@pytest.mark.parametrize("given", [{"min_chars": 3}, {"by": ["url"], "secret": "x" * 500}])
def test_a_stage_without_its_name_says_what_to_write_and_shows_no_mapping(given):
    with pytest.raises(ValueError, match=r"^stage: required key missing. Write stage: NAME$"):
        registry.parse(given)


def test_a_pipeline_file_without_its_class_says_what_to_write(tmp_path):
    (tmp_path / "p.yaml").write_text("output: x\nstages: []\n")
    with pytest.raises(ConfigError, match=r"pipeline: required key missing. Write pipeline: heliostat.pipelines:TextPipeline$"):
        prepare.load(tmp_path / "p.yaml", [])


def test_several_faults_are_one_error_that_lists_them_all(tmp_path):
    """A person fixes a file once, not once per fault."""
    changes = {"nmae": 1, "train.steps": "x", "train.precision": "bf8", "data.sources.0.path": 5, "evaluate.every": None}
    message = fault(write(tmp_path, **changes))
    assert message.splitlines()[0] == f"{tmp_path / 'job.yaml'}:"
    lines = [line.strip().split(": ")[0] for line in message.splitlines()[1:]]
    assert sorted(lines) == ["data.sources.0.path", "evaluate.every", "nmae", "train.precision", "train.steps"]


def test_a_key_given_twice_is_refused(tmp_path):
    """YAML would silently keep the last one. At any depth, the error has the file, the line of its mapping, and the key."""
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nrecipe: b\nname: c\n")
    assert fault(path) == f"{path}: line 1: key 'name' appears twice. Keep one"
    path.write_text("name: a\ntrain:\n  steps: 1\n  zero: {stage: 1, stage: 2}\n")
    assert fault(path) == f"{path}: line 4: key 'stage' appears twice. Keep one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML in line 1, column 6 (expected ',' or ']', but got '<stream end>'). Correct this line"),
        ("a: b: c", "not valid YAML"),
        ("\t", "not valid YAML"),
        ("- 1", "expected a mapping of keys to values, got [1]. Write lines"),
        ("", "is empty. Write lines of the form `key: value`"),
        ("just words", "expected a mapping of keys to values, got 'just words'. Write lines"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_one_line(tmp_path, text, message):
    """For broken YAML, and YAML that isn't a mapping, one line has the file's name. No tag ever creates an object."""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    found = fault(path)
    assert found.startswith(f"{path}: {message}") and "\n" not in found


def test_a_file_that_is_not_there_or_not_text_is_one_line(tmp_path):
    """The error suggests a similar file name. A folder or a binary file can't be read."""
    write(tmp_path)
    assert fault(tmp_path / "jobb.yaml") == f"{tmp_path / 'jobb.yaml'}: no such file. Did you mean 'job.yaml'?"
    assert fault(tmp_path / "nothere.yaml") == f"{tmp_path / 'nothere.yaml'}: no such file. Use one of: job.yaml"
    assert fault(tmp_path / "no" / "job.yaml") == f"{tmp_path / 'no' / 'job.yaml'}: no such file. Check the path"
    (tmp_path / "bin").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path, tmp_path / "bin"):
        found = fault(path)
        assert found.startswith(f"{path}: ") and "\n" not in found


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "1_0e-4"])
def test_a_number_without_a_dot_is_a_number(tmp_path, text):
    """YAML 1.1 reads 1e-3 as a string. A person means 0.001, in the file and in a setting."""
    path = write(tmp_path)
    path.write_text(path.read_text().replace("lr: 0.001", f"lr: {text}"))
    assert f"lr: {text}" in path.read_text()
    assert spec.load(path).train.optimizer.lr == pytest.approx(1e-3, rel=1e-12)
    assert spec.load(path, [f"train.optimizer.lr={text}"]).train.optimizer.lr == pytest.approx(1e-3, rel=1e-12)


def test_whole_numbers_are_floats_where_floats_are_wanted(tmp_path):
    """`weight: 2` is 2.0."""
    made = spec.load(write(tmp_path, **{"data.sources.0.weight": 2, "workers.gpus": 1}))
    assert (made.data.sources[0].weight, made.workers.gpus) == (2.0, 1.0)
    assert isinstance(made.data.sources[0].weight, float)


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("train.steps=7", ("train", "steps"), 7),
        ("train.zero.stage=3", ("train", "zero", "stage"), 3),
        ("data.sources.0.path=/x=y", ("data", "sources", 0, "path"), "/x=y"),
        ("data.sources.0={path: b, weight: 2}", ("data", "sources", 0), {"path": "b", "weight": 2}),
        ("model={arch: gpt2}", ("model",), {"arch": "gpt2"}),
        ("new.deep.key=[1, 2]", ("new", "deep", "key"), [1, 2]),
        ("evaluate=null", ("evaluate",), None),
        ("name='5'", ("name",), "5"),
    ],
)
def test_a_setting_changes_exactly_its_key(setting, path, value):
    """For nested keys, list items, whole mappings, and values with `=`. The other keys and the input stay unchanged."""
    before = raw()
    after = schema.apply(before, [setting])
    assert before == BASE
    found = after
    for key in path:
        found = found[key]
    assert found == value
    for key in set(keys(BASE)) - {".".join(map(str, path[: i + 1])) for i in range(len(path))}:
        if not key.startswith(".".join(map(str, path)) + "."):
            a, b = after, BASE
            for part in key.split("."):
                a, b = (x[int(part)] if isinstance(x, list) else x[part] for x in (a, b))
            assert a == b


def test_settings_apply_in_order():
    """The last setting wins."""
    assert schema.apply(raw(), ["train.steps=7", "train.steps=9"])["train"]["steps"] == 9


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps", "expected KEY=VALUE. Write --set train.steps=VALUE"),
        ("=5", "expected KEY=VALUE. Write --set KEY=VALUE"),
        ("", "expected KEY=VALUE. Write --set KEY=VALUE"),
        ("train.steps=[", "the value isn't valid YAML. Close the brackets, or quote the value"),
        ("data.sources.1.path=x", "'1' isn't an index into a list of 1 item. Use 0"),
        ("data.sources.path=x", "'path' isn't an index into a list of 1 item. Use 0"),
        ("data.sources.-1.path=x", "'-1' isn't an index into a list of 1 item. Use 0"),
        ("data.sources.²=x", "'²' isn't an index into a list of 1 item. Use 0"),
        ("name.first=x", "'name' is a value, not a mapping of keys. Write name=VALUE"),
        ("train.steps.a.b=x", "'steps' is a value, not a mapping of keys. Write train.steps=VALUE"),
    ],
)
def test_a_bad_setting_is_shown_back(setting, message):
    """ConfigError has the setting as typed, and its fault."""
    with pytest.raises(ConfigError) as e:
        schema.apply(raw(), [setting])
    assert str(e.value) == f"--set {setting!r}: {message}"


def test_a_setting_with_an_unknown_key_is_refused(tmp_path):
    """Settings are validated like the file."""
    assert "train.stps: unknown key. Did you mean 'steps'?" in fault(write(tmp_path), ["train.stps=5"])


def test_nearest_says_nothing_rather_than_too_much():
    """The suggestion is a similar word, else up to 30 choices, else nothing."""
    assert schema.nearest("stepp", ["step", "stop"]) == ". Did you mean 'step'?"
    assert schema.nearest("x", ["b", "a"]) == ". Use one of: a, b"
    assert schema.nearest("x", []) == "" == schema.nearest("x", [f"key{i}" for i in range(31)])


@pytest.mark.parametrize("seed", range(20))
def test_any_value_anywhere_is_valid_or_one_config_error(tmp_path, seed):
    """For any value under any key, there is no other exception, and the error names a key on that path."""
    rng = random.Random(seed)
    values = [None, True, -1, 0, 3, 10**30, 0.5, float("inf"), "", "x", "1e-3", [], [1], {}, {"a": 1}, [[]], "s3://", "::", "\0"]
    for _ in range(40):
        key = rng.choice(keys(BASE))
        path = tmp_path / "job.yaml"
        made = raw(**{key: 0})
        value = rng.choice(values)
        target = made
        *parents, last = key.split(".")
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        target[int(last) if isinstance(target, list) else last] = value
        path.write_text(yaml.safe_dump(made))
        try:
            job = spec.load(path)
        except ConfigError as e:
            top = key.split(".")[0]
            assert top in str(e) or "warmup_steps" in str(e), (key, value, str(e))
        else:
            assert isinstance(job, Job)
