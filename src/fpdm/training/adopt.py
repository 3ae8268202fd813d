"""Fine-tuning takes the network and the noise schedule from the model it starts from."""

import json
from pathlib import Path
from typing import Any

SAME_NAME = (
    "patch_size", "hidden_size", "num_heads", "depth", "num_pre", "num_core", "num_post", "time_in_pre_post",
    "learned_variance",
)  # fmt: skip


def fields_of(folder: str) -> dict[str, Any]:
    """The config fields that describe the model in a local pipeline folder; none for a name on the hub, whose settings
    are compared once it is loaded."""
    root = Path(folder)
    if not root.is_dir():
        return {}
    try:
        network = json.loads((root / "transformer/config.json").read_text())
        schedule = json.loads((root / "scheduler/scheduler_config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not a model folder: {error}") from error
    found = {name: network[name] for name in SAME_NAME if name in network}
    return found | {
        "network": {"DiT": "dit", "FixedPointDiT": "fpdm"}[network["_class_name"]],
        "image_size": network["sample_size"],
        "channels": network["in_channels"],
        "conditional": network["num_classes"] > 0,
        "beta_schedule": "linear" if schedule["beta_schedule"] == "linear" else "cosine",
        "prediction_type": schedule["prediction_type"],
        "zero_terminal_snr": schedule["rescale_betas_zero_snr"],
        "num_train_timesteps": schedule["num_train_timesteps"],
    }
