"""Compares images/s of whole heliostat runs with a plain loop of diffusers and accelerate, and measures the gain of latents.

    python -m tests.benchmarks.diffusion [--steps 30] [--turn 14] [--stages 1 2 3] [--precisions fp32 bf16] [--batch 64]
        [--no-latents]

Both have the same U-Net (digits at 32 x 32, heads 32 wide), AdamW, clipping, EMA, and 2 processes of 1 thread. A step has 64
images in micro-batches of 16, as in the quickstart, or --batch images in micro-batches of at most 16. In bf16, heliostat has
weights in bf16 with fp32 master weights, and the plain loop has accelerate's autocast.

The plain loop has decoded images and tokenized captions in memory. The heliostat runs have everything on: Ray Data, receipts,
MLflow, checkpoints, and an evaluation. The two are interleaved (see yardsticks/turns.py). Then a small latent model is trained
with the frozen encoders in every step, and on latents and embeddings from the pipeline, in whole runs one after another, three
times.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tests.benchmarks import harness
from tests.benchmarks.yardsticks import turns

LATENT_ROUNDS, LATENT_STEPS = 3, 12
BATCH = 64
# what diffusers calls a U-Net's attention_head_dim is the number of heads: 4 of width 32
CHANNELS = {"attention_head_dim": 4, "block_out_channels": [64, 128, 128],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}  # fmt: skip


def prepare(folder: Path, name: str, **keys: Any) -> Path:
    raw = yaml.safe_load((harness.ROOT / "pipelines/quickstart-images.yaml").read_text())
    raw |= {"output": str(folder / name), "resolution": 32, **keys}
    path = folder / f"{name}-pipeline.yaml"
    path.write_text(yaml.safe_dump(raw))
    harness.heliostat("data", "prepare", path)
    return folder / name


def job(folder: Path, name: str, data: Path, steps: int, batch: int = BATCH, precision: str = "fp32", **model: Any) -> Path:
    raw = yaml.safe_load((harness.ROOT / "jobs/quickstart-diffusion.yaml").read_text())
    raw["name"], raw["data"] = name, {"sources": [{"path": str(data)}]}
    raw["model"]["backbone"] |= CHANNELS
    raw["model"] |= {"samples": {}, **model}
    raw["train"] |= {"steps": steps, "global_batch_size": batch, "micro_batch_size": min(16, batch // 2), "log_every": 1}
    raw["train"]["precision"] = precision
    raw["train"]["schedule"] = {"name": "constant"}
    raw["evaluate"] = {"every": steps, "samples": 16, "fraction": 0.05}
    raw["checkpoint"] = {"every": steps // 2}
    raw["watchdog"] = {"stall": 3600}  # it stands still between its turns
    raw["storage"], raw["mlflow"] = str(folder / "runs"), {"uri": f"sqlite:///{folder}/mlflow.db", "experiment": "bench"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def heliostat(path: Path) -> float:
    result = harness.heliostat("train", path, "--overwrite")
    from mlflow import MlflowClient

    uri = yaml.safe_load(path.read_text())["mlflow"]["uri"]
    history = MlflowClient(tracking_uri=uri).get_metric_history(result["run_id"], "train/tokens_per_second")
    return median(m.value for m in history if m.step > 2)


def frozen(folder: Path, data: Path) -> dict[str, Any]:
    """Creates an autoencoder and a CLIP with the sizes of a small latent model, and initial weights."""
    from diffusers import AutoencoderKL
    from heliostat.recipes.images.diffusers_folder import tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = 3
    kinds = ("DownEncoderBlock2D",) * blocks, ("UpDecoderBlock2D",) * blocks
    vae = AutoencoderKL(1, 1, *kinds, (32, 64, 128), latent_channels=4, norm_num_groups=8)
    vae.save_pretrained(folder / "vae")
    config = CLIPTextConfig(vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                            max_position_embeddings=24)  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "clip")
    tokenizer((data / "tokenizer.json").read_bytes(), 0, 24).save_pretrained(folder / "clip")
    return {"autoencoder": {"pretrained": str(folder / "vae")}, "text": {"pretrained": str(folder / "clip"), "length": 24}}


def main() -> None:
    options = harness.arguments(__doc__, steps=30, turn=14.0, stages=[1, 2, 3], precisions=["fp32", "bf16"], batch=BATCH,
                                no_latents=False)  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = prepare(folder, "images")
        print(f"\n{options.steps} steps of {options.batch} images, turns of {options.turn:g} s")
        harness.head("images/s", *turns.HEADS)
        for precision in options.precisions:
            path = job(folder, f"pixels-{precision}", images, options.steps, options.batch, precision)
            for stage in options.stages:
                found = turns.compare("plain_diffusers", [], path, stage, options.turn)
                harness.row(f"ZeRO-{stage}, {precision}", *found.cells)
        if options.no_latents:
            return
        models = frozen(folder, images)
        paths = {"latents": models["autoencoder"]["pretrained"], "text": models["text"]["pretrained"]}
        latents = {"autoencoder": paths["latents"], "text_encoder": paths["text"], "length": 24}
        stored = prepare(folder, "latents", latents=latents, tokenizer=None)
        cases = {"encoders in every step": job(folder, "encoding", images, LATENT_STEPS, **models),
                 "latents and embeddings stored": job(folder, "stored", stored, LATENT_STEPS, **models)}  # fmt: skip
        ways = {label: lambda case=case: heliostat(case) for label, case in cases.items()}
        table("a latent model, ZeRO-2", harness.by_turns(ways, LATENT_ROUNDS))


def table(title: str, rates: dict[str, list[float]]) -> None:
    print(f"\n{title}")
    harness.head("", "images/s, median (all)", "ratio to the first, median of the rounds")
    first = next(iter(rates.values()))
    for label, values in rates.items():
        ratio = median(v / p for v, p in zip(values, first, strict=True))
        harness.row(label, f"{median(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})", f"{ratio:.3f}")


if __name__ == "__main__":
    main()
