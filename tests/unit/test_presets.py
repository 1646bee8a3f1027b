"""Tests the shipped pipelines for the web, code, books, and images: their stages work, and keep the right documents."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
from heliostat.curation import reasons

from tests.unit.build_curation import curate, left, left_out
from tests.unit.build_images import folder_of, photos, prepared, scaled

PIPELINES = Path(__file__).parents[2] / "pipelines"
STORY = (
    "The old lighthouse keeper walked down to the harbour every morning before the sun had risen. He carried a lamp and a "
    "rope, and he would wait for the first boats to return with their nets. Nobody in the village could remember a time "
    "when he had not been there. Some said that the sea itself would stop if he ever failed to come. Children were told to "
    "greet him with respect. In the winter of that year a storm took the pier away, and three of the boats with it. Their "
    "crews swam ashore in the dark, guided by a light that they all had seen and that nobody had lit. When they came to "
    "thank the keeper, they found his door open and the stove cold. A letter on the table asked whoever read it to keep the "
    "lamp clean. The baker's daughter took it home, and she has looked after the light since then."
)
JUNK = "buy now " * 200
CODE = 'import os\n\n\ndef size(path):\n    """Return the bytes of a file."""\n    return os.stat(path).st_size\n' * 3
TEXTS = {"story": STORY, "again": STORY + " It still burns.", "junk": JUNK}


def stages(name):
    return yaml.safe_load((PIPELINES / f"{name}.yaml").read_text())["stages"]


def page(text):
    body = "".join(f"<p>{part}.</p>" for part in text.rstrip(".").split(". "))
    return f"<html><body><nav><a href=/>Home</a></nav><main>{body}</main></body></html>".encode()


@pytest.mark.parametrize(("name", "given"), [
    ("fineweb", {id: page(text) for id, text in TEXTS.items()}),
    ("books", {"story": topics["compound"], "again": topics["compound"] + " It still burns.", "junk": STORY}),
    ("starcoder", {"story": CODE, "again": CODE + "print(size('.'))\n", "junk": "x = '" + "A1b2" * 1000 + "'\n"}),
], ids=["fineweb", "books", "starcoder"])  # fmt: skip
def test_a_preset_keeps_one_of_two_that_are_alike_and_no_junk(tmp_path, name, given):
    """The stages' own tests check which of them finds the junk."""
    found, here = curate(tmp_path, given, stages(name), memory_limit=64 << 20)
    kept, out = left(found, here), left_out(found, here)
    assert kept.keys() == {"again"}  # the longest
    assert out["story"][1] == "near_duplicate" and out["junk"][1] not in ("near_duplicate", "")


def test_the_preset_of_images_keeps_one_of_two_that_are_alike_and_no_junk(tmp_path):
    """The input has photographs with captions, and one example of each kind of junk that a stage removes."""
    found = photos()
    english = "A photograph of a temple with red walls and a green roof under a blue sky"
    folder_of(tmp_path / "in", [
        ("temple.jpg", found["china"], {"caption": english, "url": "https://example.org/temple"}),
        ("temple-again.webp", scaled(found["china"], 1.2, "WEBP"), {"caption": "The same temple on a sunny day in spring"}),
        ("flower.jpg", found["flower"], {"caption": "Eine große rote Blume im Garten hinter dem alten Haus meiner Eltern"}),
        ("hopper.jpg", found["grace_hopper"], {"caption": "abc"}),
        ("tiny.jpg", scaled(found["flower"], 0.2), {"caption": "A small picture of a red flower in a garden"}),
        ("strip.png", scaled(found["flower"], 1.0, "PNG"), {"caption": "A picture of a red flower in a garden"}),
    ])  # fmt: skip
    keys = {k: v for k, v in yaml.safe_load((PIPELINES / "laion.yaml").read_text()).items() if k != "pipeline"}
    made, _ = prepared(keys | {"input": str(tmp_path / "in"), "output": str(tmp_path / "out")})
    ends = {row["id"]: row for table in reasons.ends(made) for row in table.to_pylist()}
    assert {id: (row["stage"].partition(" ")[2], row["reason"]) for id, row in ends.items() if "temple" not in id} == {
        "flower.jpg": ("language", "other_language"), "hopper.jpg": ("length", "short"), "tiny.jpg": ("image_size", "small"),
        "strip.png": ("", "kept"),
    }  # fmt: skip
    assert sorted(ends[id]["reason"] for id in ("temple.jpg", "temple-again.webp")) == ["kept", "near_duplicate"]
    assert json.loads(ends["temple.jpg"]["columns"]) == {"url": "https://example.org/temple"}
    assert made.rows == 2 and len(made.meta["parts"]) == 1 and made.meta["digests"].keys() == {"640x384"}
