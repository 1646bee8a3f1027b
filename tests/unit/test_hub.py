"""Tests the Hub's protocol with a server on 127.0.0.1: names are pinned, files arrive once and complete, and errors are lines
with a fix."""

import logging
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation.text import sources
from heliostat.errors import ConfigError, DataError, HeliostatError, StorageError
from heliostat.storage.hub import files, names
from heliostat.storage.hub.names import HubName

from tests.hub_server import TOKEN

WEIGHTS = bytes(range(256)) * 40
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    "model.safetensors": WEIGHTS,
    "consolidated.safetensors": WEIGHTS + b"again",
    "pytorch_model.bin": b"a pickle",
    "modeling_own.py": b"raise SystemExit",
    "onnx/config.json": b"{}",
}
ABOUT = {"config.json", "tokenizer.json", "README.md"}


def model(name: str) -> HubName:
    named = names.model(name)
    assert named
    return named


def resolved(name: str) -> HubName:
    return files.resolve("model.pretrained", model(name))


def here(folder) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def refusal(name: str, exit_code: int | None = None, **options) -> str:
    with pytest.raises(HeliostatError) as e:
        files.model("model.pretrained", resolved(name), **options)
    assert "\n" not in str(e.value) and exit_code in (None, e.value.exit_code)
    return str(e.value)


def test_names_of_models_and_datasets():
    assert model("Qwen/Qwen3-0.6B") == HubName("model", "Qwen/Qwen3-0.6B")
    assert model("a/b/text_encoder@refs/pr/3") == HubName("model", "a/b", "refs/pr/3", "text_encoder")
    for other in ("a/b@../../c", "gpt2", "/a/b", "./a/b", "a/../b", "models:/a/1", "s3://a/b", "a/b@", "a//b", "~/a/b", "0" * 32):
        assert names.model(other) is None, other
    expected = HubName("dataset", "org/name", "v1", "data/train")
    for uri in ("hf://datasets/org/name@v1/data/train", "hf://datasets/org/name/data/train@v1"):
        assert names.dataset("input", uri) == expected
    assert names.dataset("input", str(expected)) == expected
    assert names.dataset("input", "hf://datasets/o/n@refs/convert/parquet/a.parquet").revision == "refs/convert/parquet"
    assert names.dataset("input", "hf://datasets/o/n/*.jsonl").inside == "*.jsonl"
    for wrong in (
        "hf://datasets/imdb",
        "hf://o/n",
        "hf://datasets/o/n@",
        "hf://datasets/o/n/../x",
        "hf://datasets/o/n/x@../y",
        "hf://datasets/o/n/x@",
    ):
        with pytest.raises(ConfigError, match=r"input: .*(Write hf://datasets/ORG/NAME|Remove '..')"):
            names.dataset("input", wrong)


def test_a_model_is_pinned_downloaded_once_and_without_pickles_and_code(hub):
    commit = hub.push("org/m", MODEL)
    name = resolved("org/m")
    assert str(name) == f"org/m@{commit}"
    folder = files.model("model.pretrained", name, weights=False)
    assert here(folder) == ABOUT and files.weight_bytes(folder) == len(WEIGHTS)
    assert files.model("model.pretrained", name) == folder and here(folder) == {*ABOUT, "model.safetensors"}
    assert files.of_folder(folder) == name and files.shown(folder) == f"org/m@{commit}"
    hub.requests.clear()
    assert files.model("model.pretrained", name) == folder and not hub.requests  # without a request

    newer = hub.push("org/m", {**MODEL, "config.json": b"{}"})
    assert resolved("org/m").revision == newer
    assert (files.model("model.pretrained", resolved(f"org/m@{commit}")) / "config.json").read_bytes() == MODEL["config.json"]


def test_a_sharded_model_and_a_folder_of_one(hub):
    parts = {f"model-0000{n}-of-00002.safetensors": bytes(10 * n) for n in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    hub.push("org/big", {**parts, **index, "consolidated.safetensors": bytes(30), "config.json": b"{}"})
    assert here(files.model("k", resolved("org/big"))) == {*parts, *index, "config.json"}
    inner = {"diffusion_pytorch_model.safetensors": b"x", "diffusion_pytorch_model.fp16.safetensors": b"y", "config.json": b"{}"}
    hub.push("org/pipe", {**{f"vae/{n}": c for n, c in inner.items()}, "unet/diffusion_pytorch_model.safetensors": b"z" * 9,
                          "tokenizer/vocab.json": b"{}"})  # fmt: skip
    folder = files.model("k", resolved("org/pipe/vae"), weights=False)
    assert folder.name == "vae" and files.weight_bytes(folder) == 1
    assert files.absent_weights(folder) == {
        "diffusion_pytorch_model.safetensors": files.listing("k", resolved("org/pipe"))[-1].hash
    }
    assert here(files.model("k", resolved("org/pipe/vae")).parent) == {
        "tokenizer/vocab.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}  # fmt: skip
    assert "has no folder 'none'" in refusal("org/pipe/none")


def test_an_interrupted_download_resumes_where_it_ended(hub):
    hub.push("org/m", MODEL)
    name = resolved("org/m")
    files.model("k", name, weights=False)
    hub.breaks_at, hub.failing_then = 3000, 1
    with pytest.raises(StorageError, match=r"the Hub fails \(503\).*Without a network, .*hf download org/m"):
        files.model("k", name)
    hub.requests.clear()
    folder = files.model("k", name)  # as another command does
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    begins = [begin for method, path, begin, _ in hub.requests if path.startswith("/store/") and method == "GET"]
    assert begins == ["bytes=3000-"]


def test_a_fault_that_passes_is_retried_within_the_budget(hub, monkeypatch):
    monkeypatch.setenv("HELIOSTAT_RETRY_BUDGET_S", "5")
    hub.push("org/m", MODEL)
    hub.limited, hub.failing, hub.breaks_at = 2, 2, 100
    assert here(files.model("k", resolved("org/m"))) == {*ABOUT, "model.safetensors"}


def test_what_is_not_what_the_hub_lists_is_refused_and_removed(hub):
    hub.push("org/m", MODEL)
    hub.changed["model.safetensors"] = WEIGHTS[:-1] + b"?"
    message = refusal("org/m")
    assert "model.safetensors isn't the file that the Hub lists" in message and "Run the command again" in message
    hub.changed.clear()
    folder = files.model("k", resolved("org/m"))
    damaged = (folder / "model.safetensors").resolve()
    damaged.write_bytes(b"!" + WEIGHTS[1:])
    with pytest.raises(DataError, match="isn't the file that the Hub lists"):
        files.model("k", resolved("org/m"))
    assert not damaged.exists()
    assert (files.model("k", resolved("org/m")) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_partial_file_that_is_damaged_is_downloaded_from_its_start(hub):
    hub.push("org/m", MODEL)
    name = resolved("org/m")
    blobs = files.model("k", name, weights=False).parents[1] / "blobs"
    (weights,) = (f for f in files.listing("k", name) if f.path == "model.safetensors")
    (blobs / f"{weights.hash}.heliostat.incomplete").write_bytes(b"?" * 500)
    assert (files.model("k", name) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_cache_without_a_list_is_used_with_a_warning_and_not_if_a_download_was_interrupted(hub, monkeypatch, caplog):
    """`hf download` leaves such a cache. A part of a dataset would silently be a smaller dataset."""
    hub.push("org/m", MODEL)
    name = resolved("org/m")
    repository = files.model("k", name).parents[1]
    (kept,) = (repository / "heliostat").glob("*.json")
    kept.unlink()
    files._kept.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {f.path for f in files.listing("k", name)} == {*ABOUT, "model.safetensors"}
    assert f"{name}: the cache has no list of the Hub's files. Using the 4 files in the cache" in caplog.text
    (repository / "blobs" / "abc.incomplete").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"lacks the files, or some of them, of org/m \(HF_HUB_OFFLINE is set\)"):
        files.listing("k", name)


def test_a_lock_that_another_process_keeps_is_waited_for_with_a_deadline(hub, monkeypatch):
    from huggingface_hub.utils import WeakFileLock

    hub.push("org/m", MODEL)
    name = resolved("org/m")
    files.model("k", name, weights=False)
    (weights,) = (f for f in files.listing("k", name) if f.path == "model.safetensors")
    monkeypatch.setattr(files, "LOCK_S", 0.5)
    lock = files.client.cache() / ".locks" / "models--org--m" / f"{weights.hash}.lock"
    with (
        WeakFileLock(lock),
        pytest.raises(
            StorageError, match=r"another process has held the lock .*If no process is downloading this file, delete the lock"
        ),
    ):
        files.model("k", name)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (
            "absent",
            "no folder 'org/absent' here, and no model 'org/absent' on the Hub (401). "
            "Check the name; if the repository is private, log in",
        ),
        ("m@v9", "org/m has no revision 'v9' (404). Use a branch, a tag, or a commit"),
        ("gated", "org/gated: the Hub denies access (401). Accept the terms at"),
        (
            "pickled",
            "org/pickled has no safetensors (pytorch_model.bin is a pickle, which can run code). Convert the weights at https://",
        ),
        ("limited", "here, and the Hub limits requests (429). Wait some minutes, or log in for a higher limit: hf auth login"),
        ("failing", "the Hub fails (503)"),
    ],
)
def test_each_refusal_is_one_line_that_says_what_to_do(hub, what, says):
    hub.push("org/m", MODEL)
    hub.push("org/gated", MODEL)
    hub.gated.add("models/org/gated")
    hub.push("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.limited, hub.failing = 9 * (what == "limited"), 9 * (what == "failing")
    message = refusal(f"org/{what}", weights=False)
    assert message.startswith("model.pretrained: ") and says in message


def test_a_missing_path_whose_parent_is_here_is_an_error_without_a_wait(hub, tmp_path, monkeypatch, caplog):
    """`org/absent` may be a path or a name of the Hub: the line names both, nothing is tried again, and the exit code asks for
    another command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELIOSTAT_RETRY_BUDGET_S", "5")
    (tmp_path / "org").mkdir()
    hub.failing = 99
    message = refusal("org/absent", exit_code=2)
    assert message.startswith("model.pretrained: no folder 'org/absent' here, and the Hub fails (503). Correct the path. ")
    assert message.endswith("hf download org/absent") and "retrying" not in caplog.text


def test_a_missing_path_without_a_network_is_an_error_without_a_wait(hub, monkeypatch, caplog):
    monkeypatch.setenv("HELIOSTAT_RETRY_BUDGET_S", "5")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and doesn't listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        message = refusal("org/absent", exit_code=2)
    assert message.startswith(f"model.pretrained: no folder 'org/absent' here, and no answer from {url} (")
    assert ". Correct the path. For a model of the Hub, run on a machine with a network" in message
    assert "retrying" not in caplog.text


def test_a_token_opens_a_private_model_and_is_neither_logged_nor_sent_elsewhere(hub, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    hub.push("org/private", MODEL)
    hub.private.add("models/org/private")
    assert "no model 'org/private' on the Hub (401)" in refusal("org/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    files.model("k", resolved("org/private"))
    stored = [authorized for _, path, _, authorized in hub.requests if path.startswith("/store/")]
    assert stored and not any(stored)  # the store is another host
    hub.gated.add("models/org/private")
    hub.push("org/private", {**MODEL, "config.json": b"[]"})
    assert "the Hub denies access (403)" in refusal("org/private") and TOKEN not in caplog.text


def test_without_a_network_the_cache_is_used(hub, monkeypatch, caplog):
    hub.push("org/m", MODEL)
    name = resolved("org/m")
    folder = files.model("k", name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert resolved("org/m") == name and files.model("k", name) == folder and not hub.requests
    assert refusal("org/other").endswith(
        "Unset HF_HUB_OFFLINE, or run this command on a machine with a network "
        "and copy that machine's cache: hf download org/other"
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.failing = 9
    assert resolved("org/m") == name and f"using {name.revision} from the cache" in caplog.text


def test_a_cache_that_hugging_face_filled_is_taken_and_checked(hub, tmp_path, monkeypatch):
    hub.push("org/m", MODEL)
    folder = files.model("k", resolved("org/m"))
    kept = folder.parents[1] / "heliostat"
    for place in sorted(kept.rglob("*"), reverse=True):
        place.rmdir() if place.is_dir() else place.unlink()
    files._kept.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert here(files.model("k", resolved("org/m"))) >= {*ABOUT, "model.safetensors"}
    (folder / "config.json").resolve().write_bytes(b"{'model_type': 'other'}")
    with pytest.raises(DataError, match=r"config.json isn't the file that the Hub lists"):
        files.model("k", resolved("org/m"))


@pytest.mark.parametrize("path", ["../../outside.json", "/outside.json", "a//b.json"])
def test_a_list_that_leads_out_of_the_cache_is_refused(hub, path):
    hub.push("org/m", {**MODEL, path: b"{}"})
    assert "is outside the repository" in refusal("org/m")


# datasets ------------------------------------------------------------------------------------------------------------


def parquet(texts: list[str]) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), out)
    return out.getvalue().to_pybytes()


CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: small
  data_files: small/*.jsonl
---
# A dataset
"""
DATASET = {
    "README.md": CARD,
    "data/train-0.parquet": parquet(["one", "two"]),
    "data/train-1.parquet": parquet(["three"]),
    "data/test-0.parquet": parquet(["never"]),
    "small/a.jsonl": b'{"text": "four"}\n',
    "build.py": b"raise SystemExit",
}


def found(uri: str) -> list[str]:
    return [f.path for f in sources.listing(str(files.resolve("input", names.dataset("input", uri))))]


def test_the_files_of_a_dataset_are_those_of_a_configuration_a_folder_a_file_or_a_glob(hub, caplog):
    caplog.set_level(logging.INFO)
    hub.push("org/d", DATASET, "datasets")
    train = ["data/train-0.parquet", "data/train-1.parquet"]
    assert found("hf://datasets/org/d") == train
    assert "configuration 'default': split train (2 files" in caplog.text and "not read: test (1 file," in caplog.text
    assert found("hf://datasets/org/d/small") == ["small/a.jsonl"]
    assert found("hf://datasets/org/d/data") == ["data/test-0.parquet", *train]
    assert found("hf://datasets/org/d/data/test-0.parquet") == ["data/test-0.parquet"]
    assert found("hf://datasets/org/d/**/train-*.parquet@main") == train
    with pytest.raises(ConfigError, match=r"has no file, folder, or configuration 'smal'. It has .*small"):
        found("hf://datasets/org/d/smal")
    assert hub.downloads() == [f"/datasets/org/d/resolve/{hub.refs['datasets/org/d']['main']}/README.md"]

    hub.push("org/plain", {k: v for k, v in DATASET.items() if k != "README.md"} | {"README.md": b"# None"}, "datasets")
    assert found("hf://datasets/org/plain") == [*train, "small/a.jsonl"] and "of other splits" in caplog.text
    hub.push("org/many", {**DATASET, "README.md": CARD.replace(b"default", b"large")}, "datasets")
    with pytest.raises(ConfigError, match=r"has 2 configurations\. Choose one: hf://datasets/org/many/large"):
        found("hf://datasets/org/many")


def test_a_task_downloads_the_file_that_it_reads(hub):
    hub.push("org/d", DATASET, "datasets")
    uri = str(files.resolve("input", names.dataset("input", "hf://datasets/org/d")))
    base, (first, *_) = sources.root(uri), sources.listing(uri)
    with sources.blocks(base, first.path, 1 << 20, first.part) as file:
        assert file.read() == DATASET[first.path]
    assert sources.fetch(base, "data/train-1.parquet", 1 << 20) == DATASET["data/train-1.parquet"]
    hub.failing = 9
    with pytest.raises(StorageError, match=r"input: org/d: the Hub fails .* \(on node "):
        sources.fetch(base, "data/test-0.parquet", 1 << 20)


def test_a_name_in_a_metadata_file_cannot_lead_out_of_a_dataset_of_the_hub(hub, tmp_path):
    hub.push("org/d", DATASET, "datasets")
    base = sources.root(str(files.resolve("input", names.dataset("input", "hf://datasets/org/d"))))
    assert sources.fetch(base, "data/train-0.parquet", 1 << 20)
    (secret := tmp_path / "secret").write_text("key")
    for path in (os.path.relpath(secret, base.path), "data/../" + os.path.relpath(secret, base.path)):
        with pytest.raises(sources.LeftOutError):
            sources.fetch(base, path, 1 << 20)
