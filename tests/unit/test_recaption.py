"""Tests a captioner's folder as a stage: the captions are the model's own, in any batch, the old ones stay, and invalid settings
are rejected."""

import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from heliostat.curation import image_models, reasons
from heliostat.curation.registry import parse
from heliostat.curation.stage import Document, Picture
from heliostat.errors import ConfigError
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from tests.unit.build_images import folder_of, image, prepared

WORDS = ["<end>", *(f"w{i}" for i in range(39))]


def make_captioner(folder: Path, seed: int = 0) -> Path:
    """Writes a tiny ViT with a GPT-2 decoder in the form of save_pretrained. Its large weights give different captions for
    different images."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = ViTConfig(image_size=32, patch_size=8, initializer_range=0.5, **sizes)
    text = GPT2Config(vocab_size=len(WORDS), n_positions=40, n_embd=32, n_layer=1, n_head=2, initializer_range=1.0,
                      add_cross_attention=True, is_decoder=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 0, 0
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=0, pad_token_id=0, eos_token_id=0, bos_token_id=0)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    return make_captioner(tmp_path_factory.mktemp("captioner"))


def pictures(count: int) -> list[bytes]:
    return [image(20 + i, 40, seed=i) for i in range(count)]


def test_captions_are_the_models_own_and_do_not_depend_on_the_batch(captioner):
    images = pictures(11)
    write = image_models.Captioner(str(captioner), 8, 4)
    made = write(images)
    model = VisionEncoderDecoderModel.from_pretrained(captioner).eval()
    processor = AutoImageProcessor.from_pretrained(captioner, backend="pil")
    for data, (text, cut) in zip(images, made, strict=True):
        values = processor(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"]
        ids = model.generate(values, max_new_tokens=8, do_sample=False)[0].tolist()[1:]
        end = ids.index(0) if 0 in ids else len(ids)
        assert text == " ".join(WORDS[i] for i in ids[:end]) and cut is (end == 8)
    assert [write([data])[0] for data in images] == made and len(set(made)) > 5


def make_blip(folder: Path) -> Path:
    """Writes a tiny BLIP that ends a text with its own token, which differs from that of its generation config."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "projection_dim": 16}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 40, "encoder_hidden_size": 32, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3, "initializer_range": 1.0}  # fmt: skip
    vision = {**sizes, "image_size": 32, "patch_size": 8, "initializer_range": 0.5}
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_range=1.0)
    )
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[3] += 4  # so that some texts end soon
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_captions_of_a_blip_end_where_it_ends_them(tmp_path, captioner):
    """In a batch, only the long caption is truncated, and not the short ones that are padded to its length."""
    shutil.copy(captioner / "tokenizer.json", make_blip(tmp_path) / "tokenizer.json")
    images, lengths = pictures(12), list[int]()
    made = image_models.Captioner(str(tmp_path), 12, 12)(images)
    model = BlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for data, (text, cut) in zip(images, made, strict=True):
        values = processor(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"]
        ids = model.generate(values, max_new_tokens=12, do_sample=False)[0].tolist()[1:]
        end = ids.index(3) if 3 in ids else len(ids)
        assert text == " ".join(WORDS[i] for i in ids[:end] if i) and cut is (end == 12)
        lengths.append(end)
    assert min(lengths) < 12 == max(lengths), "what this test is of"


def test_captions_are_replaced_and_the_old_ones_stay_in_the_shards(tmp_path, captioner):
    """The funnel counts them, and the result is the same for any split of the work."""
    rows = [(f"{i}.png", data, {"caption": f"alt text {i}"}) for i, data in enumerate(pictures(12))]
    folder_of(tmp_path / "in", rows)
    stages = [{"stage": "recaption", "model": str(captioner), "max_tokens": 8, "batch": 4}]
    stored = {name: f"{Path(name).stem}.png" for name, _, _ in rows}
    write = image_models.Captioner(str(captioner), 8, 4)
    keys = {"name": "t", "input": str(tmp_path / "in"), "resolution": 32, "stages": stages[:1]}
    made, _ = prepared({**keys, "output": str(tmp_path / "out")})
    table = pq.read_table(Path(made.location.path) / made.paths[0]).to_pylist()
    assert {row["id"]: row["original_caption"] for row in table} == {name: f"alt text {name[:-4]}" for name in stored}
    assert [row["caption"] for row in table] == [text for text, _ in write([row["image"] for row in table])]
    part = reasons.funnel(made)["0 recaption"]
    assert part["counts"]["recaptioned"] == part["documents"] == part["kept"] == 12
    assert part["counts"].get("cut_to_max_tokens", 0) == sum(cut for _, cut in write([row["image"] for row in table]))
    assert prepared({**keys, "output": str(tmp_path / "again"), "memory_limit": 1 << 16}, seed=3)[0].digest == made.digest
    other = [{**stages[0], "original": "alt"}]
    assert prepared({**keys, "output": str(tmp_path / "other"), "stages": other})[0].digest != made.digest


def test_an_image_of_which_nothing_is_written_is_dropped(captioner, monkeypatch):
    stage = parse({"stage": "recaption", "model": str(captioner)})
    document = Document("d", "old", {"url": "u"}, Picture(image(8, 8), b"h"))
    assert stage.outcome(document, "", False).reason == "no_caption"
    same, cut = stage.outcome(document, "old", False), stage.outcome(document, "new", True)
    assert same.counts == {"same_caption": 1} and cut.counts == {"cut_to_max_tokens": 1, "recaptioned": 1}
    assert cut.document.text == "new" and cut.document.columns == {"url": "u", "original_caption": "old"}
    assert document.text == "old" and document.columns == {"url": "u"}


def test_what_is_no_captioner_is_refused(tmp_path, captioner):
    folder = tmp_path / "model"
    shutil.copytree(captioner, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ConfigError, match=r"is a 'llava'\. To caption images, use one of blip, git"):
        parse({"stage": "recaption", "model": str(folder)}).check()
    (folder / "config.json").write_text(json.dumps(config))
    before = image_models.digests(str(folder))
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "config.json"} <= before.keys()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"can't load .* as a captioner \(tokenizer\.json: "):
        image_models.Captioner(str(folder), 8, 4)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        parse({"stage": "recaption", "model": str(folder)}).check()


def test_a_missing_folder_is_one_line_with_the_folder_and_the_fix(tmp_path):
    """The folder lacks every file, so the error doesn't name one of the files."""
    with pytest.raises(ConfigError) as e:
        parse({"stage": "recaption", "model": str(tmp_path / "none")}).check()
    assert str(e.value) == (
        f"model: '{tmp_path}/none': no such folder. Set model to a model's folder, for example after hf download ORG/NAME "
        "--local-dir FOLDER"
    )


def test_a_column_that_is_there_already_is_refused(tmp_path, captioner):
    """The column may be one of the shards, of the input, or of another such stage."""
    folder_of(tmp_path / "in", [("a.png", image(8, 8), {"caption": "x"})])
    keys = {"name": "t", "input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "resolution": 8}
    for names in (["caption"], ["label"], ["was", "was"]):
        stages = [{"stage": "recaption", "model": str(captioner), "original": name} for name in names]
        with pytest.raises(ConfigError, match=f"recaption: '{names[0]}' is already a column of the shards"):
            prepared({**keys, "stages": stages})
    stage = {"stage": "recaption", "model": str(captioner), "original": "was"}
    with pytest.raises(ConfigError, match=r"'was' is already a column of the shards, or one of columns\.others\. Choose another"):
        prepared({**keys, "stages": [stage], "columns": {"others": ["was"]}})
    made, _ = prepared({**keys, "stages": [stage], "columns": {"others": ["url"]}})
    assert pq.read_table(Path(made.location.path) / made.paths[0])["was"].to_pylist() == ["x"]
