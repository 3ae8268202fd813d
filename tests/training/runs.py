"""A run so small that a test can afford several."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fpdm.recipes import recipe
from fpdm.recipes.forms import form
from fpdm.training.config import Config
from fpdm.training.loop import Trainer

TIMES = ("seconds", "images_per_second", "steps_per_second", "share_of_matrix_rate", "share_waiting_for_data")


def tiny(**changes: Any) -> Config:
    settings = {
        "hidden_size": 16, "num_heads": 2, "patch_size": 4, "batch_size": 8, "steps": 10, "warmup": 3, "log_every": 4,
        "checkpoint_every": 5, "sample_every": 100, "keep_checkpoints": 9,
        "no_grad_max": 2, "with_grad_max": 2,
    }  # fmt: skip
    return recipe("digits").with_fields(**form("1+1+1")).with_fields(**{**settings, **changes})


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have Ctrl-C pressed in the middle of the step that makes `step` of them."""
    one_step = Trainer._one_step

    def pressed(self: Trainer, batches: Any) -> None:
        one_step(self, batches)
        if self.step + 1 == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_one_step", pressed)


def log_of(path: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries]


def tensors_of(path: Path, step: int) -> dict[str, Any]:
    folder = path / "checkpoints" / f"step-{step:08d}"
    return {
        f"{name}/{key}": value
        for name in ("weights", "ema", "optimizer")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }
