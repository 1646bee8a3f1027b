"""Tests that an imported GGUF file gives a folder with the file's weights, tokenizer, and chat template, or one clear error."""

import json
import struct
from pathlib import Path

import gguf
import pytest
import torch
from heliostat.cli.main import app
from heliostat.curation.text import tokens
from heliostat.errors import ConfigError
from heliostat.inference import importing
from heliostat.recipes import model_origins, pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit import build_gguf
from tests.unit.test_samples import END

F32, F16, Q8 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
INPUT = torch.arange(40).view(2, 20) * 7 % 300


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=INPUT).logits.float()


@pytest.mark.parametrize(("types", "precision", "bound"), [(F32, "fp32", 1e-4), (F16, "fp16", 1e-2), (Q8, "bf16", 0.1)])
def test_the_written_model_answers_as_the_model_of_which_the_file_was_made(tmp_path, types, precision, bound):
    source = build_gguf.model()
    file = build_gguf.write(tmp_path / "tiny.gguf", source, types)
    imported = importing.convert(file, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(source)
    assert (logits(written) - expected).abs().mean() < bound * expected.std()
    assert (imported.file.precision, imported.file.types) == (precision, {types.name: 16})
    assert imported.agreement > 0.9
    assert (imported.difference == 0) == (types is not Q8)  # F32 and F16 files lose nothing
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["max_position_embeddings"] == 128


def test_the_tokenizer_splits_numbers_as_the_file_says_and_has_the_template(tmp_path):
    tokenizers = {}
    for pre in ("smollm", "gpt-2"):
        folder = tmp_path / pre
        importing.convert(build_gguf.write(tmp_path / f"{pre}.gguf", build_gguf.model(), F32, pre=pre), folder)
        tokenizers[pre] = AutoTokenizer.from_pretrained(folder)
    split = {
        pre: [part for part, _ in t.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12")] for pre, t in tokenizers.items()
    }
    assert split == {"smollm": ["a", "Ġ", "1", "2"], "gpt-2": ["a", "Ġ12"]}
    assert tokenizers["smollm"].apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|user|>hi"
    assert "license: mit" in (tmp_path / "smollm" / "README.md").read_text()
    source = model_origins.of("smollm", tmp_path / "smollm")["converted_from"]
    assert source and source["file"].endswith(".gguf") and len(source["digest"]) == 64


def test_a_file_that_cannot_be_converted_gives_one_line_and_leaves_no_folder(tmp_path):
    source, out = build_gguf.model(), tmp_path / "out"
    file = build_gguf.write(tmp_path / "tiny.gguf", source, F32)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:3000])
    build_gguf.write(tmp_path / "other.gguf", source, F32, arch="bert-of-tomorrow")
    build_gguf.write(tmp_path / "words.gguf", source, F32, pre="unheard-of")
    (tmp_path / "tiny-00001-of-00002.gguf").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path, reason in {
        tmp_path: "has 5 GGUF files",
        tmp_path / "cut.gguf": "isn't a readable GGUF file",
        tmp_path / "other.gguf": "'bert-of-tomorrow'",
        tmp_path / "words.gguf": "unknown pre-tokenizer (unheard-of)",
        tmp_path / "tiny-00001-of-00002.gguf": "Merge the parts first",
        tmp_path / "model.safetensors": "isn't a GGUF file",
        tmp_path / "absent.gguf": "no such file",
    }.items():
        with pytest.raises(ConfigError) as raised:
            importing.convert(path, out)
        assert str(raised.value).startswith("PATH: ") and reason in str(raised.value) and "\n" not in str(raised.value)
        assert not out.exists()
    (out / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--out: not empty"):
        importing.convert(file, out)
    assert (out / "mine").exists()


def test_a_tokenizer_next_to_the_file_replaces_the_one_of_the_file(tmp_path):
    importing.convert(build_gguf.write(tmp_path / "known.gguf", build_gguf.model(), F32), tmp_path / "known")
    (tmp_path / "known" / "words.gguf").write_bytes(
        build_gguf.write(tmp_path / "words.gguf", build_gguf.model(), F32, pre="unheard-of").read_bytes()
    )
    importing.convert(tmp_path / "known" / "words.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "known" / "tokenizer.json").read_text()


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([b"x", 9, struct.pack("<IQ", 0, 1 << 17)], "longer than the file"),
        ([b"x", 8, struct.pack("<Q", 1 << 40)], "longer than the file"),
        ([b"general.license", 8, text(b"\xff")], "utf-8"),
        ([b"llama.block_count", 4, struct.pack("<I", 1 << 30)], "1,073,741,824 layers, but 1 tensors"),
    ],
)
def test_a_hostile_file_is_one_error_and_is_not_read_beyond_its_end(tmp_path, fields, reason):
    name, kind, value = fields
    listed = [(b"general.architecture", 8, text(b"llama")), (name, kind, value)]
    metadata = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in listed)
    tensor = text(b"a") + struct.pack("<IQQIQ", 2, 2, 2, 0, 0)
    file = tmp_path / "hostile.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, len(listed)) + metadata + tensor + bytes(256))
    with pytest.raises(ConfigError) as raised:
        importing.convert(file, tmp_path / "out")
    assert str(raised.value).startswith("PATH: ") and reason in str(raised.value) and "\n" not in str(raised.value)


def test_an_import_that_is_killed_leaves_no_folder_that_looks_complete(tmp_path, monkeypatch):
    file, out = build_gguf.write(tmp_path / "tiny.gguf", build_gguf.model(), F32), tmp_path / "models" / "out"
    seen = []
    monkeypatch.setattr(importing, "whole", lambda *a, **k: seen.append(out.exists()) or pretrained.whole(*a, **k))
    importing.convert(file, out)
    assert seen == [False, False] and (out / "heliostat_import.json").is_file(), "the folder appears after the comparison"
    out.rename(out.with_name("out.partial"))  # as a killed import, or one that still runs
    with pytest.raises(ConfigError, match=r"--out: another import writes to .*out\.partial"):
        importing.convert(file, out)
    assert not out.exists()


def test_a_link_to_a_folder_stays_and_the_current_folder_is_rejected_first(tmp_path, monkeypatch):
    file = build_gguf.write(tmp_path / "tiny.gguf", build_gguf.model(), F32)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    importing.convert(file, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "heliostat_import.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(importing, "_model", None)
    with pytest.raises(ConfigError, match=r"--out: can't replace .* \(.*/here\). Pass a folder in it"):
        importing.convert(file, Path())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "here", "link", "tiny.gguf"]


def test_the_tokenizer_of_another_model_next_to_the_file_is_rejected(tmp_path):
    file = build_gguf.write(tmp_path / "tiny.gguf", build_gguf.model(), F32)
    (tmp_path / "tokenizer.json").write_text(tokens.train(["Zwei andere Texte von Katzen, Hunden, Fischen"] * 9, 300, END))
    with pytest.raises(ConfigError, match=r"PATH: the tokenizer\.json next to tiny\.gguf is of another model"):
        importing.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_what_it_compared(tmp_path, capsys):
    build_gguf.write(tmp_path / "tiny.gguf", build_gguf.model(), Q8)
    with pytest.raises(SystemExit) as ended:
        app(["model", "import", str(tmp_path), "--out", str(tmp_path / "out"), "--json"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert ended.value.code in (0, None) and result["types"] == {"Q8_0": 16} and 8 < result["bits_per_weight"] < 9.5
    assert 0 < result["difference"] < result["spread"] and result["chat_template"] is True
