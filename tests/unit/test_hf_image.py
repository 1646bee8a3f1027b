"""Tests the folder of an image classifier or a CLIP as a stage: the model's own scores, in any batch, and what it rejects."""

import io
import json
import shutil
import string
from pathlib import Path

import pytest
import torch
from heliostat.curation import image_models, reasons
from heliostat.curation.registry import parse
from heliostat.curation.stage import Document, Picture
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.errors import ConfigError
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from tests.unit.build_images import folder_of, image, photos, prepared

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def make_classifier(folder: Path, labels: tuple[str, ...] = ("clean", "watermark"), **keys) -> Path:
    """Writes a tiny ViT in the form of save_pretrained."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, initializer_range=0.5, id2label=dict(enumerate(labels)), **SIZES, **keys)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """Writes a tiny CLIP with a vocabulary of letters, in the form of save_pretrained."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[UNK]", "[SEP]", *string.ascii_lowercase, " "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 1))
    torch.manual_seed(0)
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 24, "eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8, "initializer_factor": 30.0}
    config = CLIPConfig(text_config={**text, **SIZES, "initializer_factor": 30.0}, vision_config={**vision, **SIZES},
                        projection_dim=16)  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


def given(count: int) -> list[Document]:
    texts = [f"image of the {string.ascii_lowercase[i % 26] * (1 + i % 30)}" for i in range(count)]
    return [Document(f"d{i}", text, {}, Picture(image(20 + i, 40, seed=i), b"h")) for i, text in enumerate(texts)]


def opened(document: Document) -> Image.Image:
    return Image.open(io.BytesIO(document.picture.data)).convert("RGB")


def test_a_labels_score_is_the_models_own_and_does_not_depend_on_the_batch(classifier):
    documents = given(21)
    score = image_models.ImageLabels(str(classifier), "watermark", 8)
    made = score([d.picture.data for d in documents], [""] * 21)
    model = ViTForImageClassification.from_pretrained(classifier).eval()
    processor = AutoImageProcessor.from_pretrained(classifier, backend="pil")
    for document, found in zip(documents, made, strict=True):
        with torch.inference_mode():
            logits = model(**processor(images=opened(document), return_tensors="pt")).logits
        assert found == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=2e-5)
    assert [score([d.picture.data], [""])[0] for d in documents] == made and len(set(made)) > 15


def test_a_captions_score_is_the_cosine_of_what_the_clip_makes_of_both(clip):
    documents = given(21)
    score = image_models.CaptionFit(str(clip), 8)
    images, captions = [d.picture.data for d in documents], [d.text for d in documents]
    made = score(images, captions)
    model = CLIPModel.from_pretrained(clip).eval()
    processor = AutoImageProcessor.from_pretrained(clip, backend="pil")
    tokenizer = Tokenizer.from_file(str(clip / "tokenizer.json"))
    for document, found in zip(documents, made, strict=True):
        ids = tokenizer.encode(document.text).ids
        ids = ids if len(ids) <= 24 else [*ids[:23], ids[-1]]
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([ids]), **processor(images=opened(document), return_tensors="pt"))
        wanted = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert found == pytest.approx(wanted, abs=2e-5) and -1 <= found <= 1
    assert score(images[::-1], captions[::-1]) == made[::-1] and len(set(made)) > 15
    assert score(images, captions[1:] + captions[:1]) != made


def test_images_go_by_their_score(tmp_path, classifier):
    """The stage runs in its own segment, after images have their stored form. The score becomes a column, and a dropped image has
    a reason."""
    rows = [(f"{i}.png", image(40, 30, seed=i), {"caption": f"number {i}", "url": f"u/{i}"}) for i in range(24)]
    rows += [(f"{name}.jpg", data, {"caption": name, "url": name}) for name, data in photos().items()]
    folder_of(tmp_path / "in", rows)
    stage = {"stage": "hf_image", "model": str(classifier), "label": "watermark", "max_score": 0.5, "column": "mark"}
    made, flow = prepared({"name": "x", "input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "resolution": 32,
                           "columns": {"others": ["url", "mark"]}, "stages": [stage], "encoding": "png"})  # fmt: skip
    assert flow.done["stages-0"] >= 1
    ends = {row["id"]: row for table in reasons.ends(made) for row in table.to_pylist()}
    assert {row["reason"] for row in ends.values()} == {"kept", "high_score"} and len(ends) == 27
    for row in ends.values():
        if row["reason"] == "kept":
            assert json.loads(row["columns"])["mark"] <= 0.5
        else:
            assert json.loads(row["measures"])["score"] > 0.5
    assert made.meta["dropped"] == {"0 hf_image: high_score": sum(row["reason"] == "high_score" for row in ends.values())}


def test_another_model_is_another_stage(tmp_path, classifier):
    shutil.copytree(classifier, tmp_path / "copy")
    stage = parse({"stage": "hf_image", "model": str(tmp_path / "copy"), "label": "clean", "min_score": 0.5})
    before = stage.identity()
    assert "preprocessor_config.json" in before["model"] and "model.safetensors" in before["model"]
    about = json.loads((tmp_path / "copy" / "preprocessor_config.json").read_text())
    (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps(about | {"image_mean": [0.1, 0.1, 0.1]}))
    assert stage.identity() != before


def test_what_cannot_score_is_refused_with_the_fix(tmp_path, classifier, clip):
    def refused(match: str, **keys) -> None:
        with pytest.raises((ConfigError, ValueError), match=match):
            parse({"stage": "hf_image", **keys}).check()

    refused("set min_score, max_score, or both", model=str(clip))
    refused("has no preprocessor_config.json", model=str(tmp_path), min_score=0.5)
    refused("Set label to one of the classifier's labels: clean, watermark", model=str(classifier), min_score=0.5)
    refused("'watermarks' isn't a label of the model.*watermark", model=str(classifier), label="watermarks", min_score=0.5)
    refused("is a CLIP, which has no labels", model=str(clip), label="x", min_score=0.5)
    shutil.copytree(classifier, tmp_path / "code")
    about = json.loads((tmp_path / "code" / "preprocessor_config.json").read_text())
    (tmp_path / "code" / "preprocessor_config.json").write_text(json.dumps(about | {"auto_map": {"AutoProcessor": "x.Y"}}))
    refused("needs its own code", model=str(tmp_path / "code"), label="clean", min_score=0.5)


def test_a_text_pipeline_has_no_images_to_look_at(tmp_path, clip):
    (tmp_path / "in").mkdir()
    pipeline = TextPipeline(name="x", input=str(tmp_path / "in"), output=str(tmp_path / "out"), tokenizer={"vocab_size": 300},
                            stages=[{"stage": "hf_image", "model": str(clip), "min_score": 0.1}])  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"stages: hf_image reads images, but a text pipeline has no images\. Remove this stage"
    ):
        pipeline.check()
