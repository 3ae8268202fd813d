"""Fine-tuning takes the network and the noise schedule from the model it starts from."""

from pathlib import Path
from typing import Any

from fpdm.files import model_folder, read_json
from fpdm.training.config import FIXED_POINT_NETWORK

SAME_NAME = ("patch_size", "hidden_size", "num_heads", "depth", "learned_variance", *FIXED_POINT_NETWORK)

NETWORKS = {"DiT": "dit", "FixedPointDiT": "fpdm"}
BETA_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}


def fields_of(name: str) -> dict[str, Any]:
    """The config fields that describe the model in a local pipeline folder or run; none for a name on the hub, whose
    settings are compared once it is loaded.

    Raises ValueError for a folder that holds no model of ours, or a noise schedule that training does not have.
    """
    root = Path(model_folder(name))
    if not root.is_dir():
        return {}
    network = read_json(root / "transformer/config.json")
    schedule = read_json(root / "scheduler/scheduler_config.json")
    try:
        # A recipe may have these, and a model from before they were there says nothing of them.
        found = {"input_skip": False, "injection": "mlp"} if network["_class_name"] == "FixedPointDiT" else {}
        found |= {name: network[name] for name in SAME_NAME if name in network}
        return found | {
            "model": None,
            "network": NETWORKS[network["_class_name"]],
            "image_size": network["sample_size"],
            "channels": network["in_channels"],
            "conditional": network["num_classes"] > 0,
            "beta_schedule": BETA_SCHEDULES[schedule["beta_schedule"]],
            "prediction_type": schedule["prediction_type"],
            "zero_terminal_snr": schedule["rescale_betas_zero_snr"],
            "num_train_timesteps": schedule["num_train_timesteps"],
        }
    except KeyError as error:
        raise ValueError(f"{name} cannot be fine-tuned: its configuration has or lacks {error}") from error
