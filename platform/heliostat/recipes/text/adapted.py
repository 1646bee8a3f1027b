"""Trains and exports adapters of language models (`recipes.adapters`), in peft's format: `adapter_config.json` and
`adapter_model.safetensors`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.errors import ConfigError
from heliostat.recipes import adapter_tensors, adapters
from heliostat.recipes.adapters import Adapts
from heliostat.recipes.protocol import Exports, Weight
from heliostat.storage.hub import files

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model"
ROWS, LENGTH, STRIDE = 2, 16, 7919  # of the batch that compares an export with the trained model


class AdaptedText(Adapts, Exports):
    """Implements `Adapts` for language models of transformers."""

    pretrained: Any
    config: Any
    balances: bool

    def base(self) -> Path:
        return Path(self.pretrained)

    def require_adapter(self) -> None:
        """Raises ConfigError if the model or another key of the job doesn't support `model.adapter`."""
        from transformers import AutoModelForCausalLM

        from heliostat.recipes import adapter_probe

        assert self.adapter
        train, folder = self.job.train, self.base()
        if not any(folder.glob("*.safetensors")) and not files.absent_weights(folder):
            name = files.shown(folder)
            raise ConfigError(f"model.pretrained: {name!r} has no safetensors weights. Save the model with save_pretrained")
        for key, used in {
            "train.fp8": train.fp8,
            "train.tiled_mlp": train.tiled_mlp,
            "train.parallel.tensor": train.parallel.tensor > 1,
            "train.parallel.expert": train.parallel.expert > 1,
            "model.router_bias_update_rate": self.balances,
        }.items():
            if used:
                raise ConfigError(
                    f"{key}: not supported with model.adapter, because it changes layers of the base. Remove this key, or remove "
                    "model.adapter"
                )
        adapter_probe.require(
            self.adapter, partial(AutoModelForCausalLM.from_config, self.config), short_logits, train.zero.stage
        )

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        return super().tensors(shapes) if self.adapter is None else {"model": adapter_tensors.merged(self.adapter, shapes)}

    def adapter_files(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        assert self.adapter
        return {WEIGHTS: adapter_tensors.exported(self.adapter, shapes, lambda layer: f"base_model.model.{layer}")}

    def save_adapter_config(self, folder: Path, layers: list[str]) -> dict[str, str]:
        import torch
        from transformers import AutoModelForCausalLM

        assert self.adapter
        with torch.device("meta"):
            every = [name for name, _ in AutoModelForCausalLM.from_config(self.config).named_modules()]
        name, targets = files.shown(self.base()), adapters.shortest(layers, every)
        adapters.peft_config(
            self.adapter, targets, task_type="CAUSAL_LM", base_model_name_or_path=name, inference_mode=True
        ).save_pretrained(str(folder))
        return {}

    def reload(self, folder: Path, adapter: bool) -> torch.nn.Module:
        import torch
        from peft import PeftModel

        from heliostat.recipes.text import generator

        if not adapter:
            return generator.whole("model", folder, dtype=torch.float32)
        base = generator.whole("model.pretrained", self.base(), config=self.config, dtype=torch.float32)
        adapters.round_base(self.adapter, base)
        return PeftModel.from_pretrained(base, folder)

    def answer(self, model: torch.nn.Module) -> torch.Tensor:
        import torch

        tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) * STRIDE % self.config.get_text_config(decoder=True).vocab_size
        return model(input_ids=tokens, use_cache=False).logits.float()


def short_logits(model: torch.nn.Module) -> torch.Tensor:
    """Computes the logits of one short sample on the meta device, in bf16, the only precision of some experts' kernels."""
    import torch

    from heliostat.recipes.text import masks

    with masks.unread(whole=True):
        return model.bfloat16()(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False).logits
