"""Weights laid out as the paper's code (and DiT's) lays them out, into our networks.

The configuration is read from the metadata of the safetensors file, so nothing is unpickled and nothing is guessed.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fpdm.models.denoiser import Denoiser
from fpdm.models.dit import DiT
from fpdm.models.fixed_point_dit import FixedPointDiT

# Our prefix -> the file's. The first that fits is taken.
PREFIXES = {
    "patch_embed.proj.": "x_embedder.proj.",
    "time_embed.fc1.": "t_embedder.mlp.0.",
    "time_embed.fc2.": "t_embedder.mlp.2.",
    "label_embed.": "y_embedder.embedding_table.",
    "final.": "final_layer.",
    "pre.": "blocks_pre.",
    "post.": "blocks_post.",
    "core.project.": "block_pre_projection.",
    "core.inject_u.": "block_fixed_point_projection_fc1.",  # where inject_z is a part of it: acts on [z ; P u]
    "core.inject_out.": "block_fixed_point_projection_fc2.",
    "core.blocks.0.": "block_fixed_point.",
}


FIXED_POINT = (
    "fixed_point", "fixed_point_pre_depth", "fixed_point_post_depth", "fixed_point_reuse_solution",
    "fixed_point_no_grad_min_iters", "fixed_point_no_grad_max_iters", "fixed_point_with_grad_min_iters",
    "fixed_point_with_grad_max_iters", "fixed_point_pre_post_timestep_conditioning",
)  # fmt: skip


def load_paper_file(path: str | Path) -> FixedPointDiT | DiT:
    """The network in a safetensors file whose weights lie under `model.` and whose metadata holds `config` as JSON.

    Raises ValueError for a file that is not such a one, a configuration it does not know, and missing, extra or
    misshaped weights, which are listed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            keys = [key for key in file.keys() if not re.match(r"call\d+\.", key)]  # noqa: SIM118
            weights = {key.removeprefix("model."): file.get_tensor(key) for key in keys}
    except FileNotFoundError:
        raise
    except KeyError:
        raise ValueError(f"{path} has no 'config' in its metadata, so the network cannot be rebuilt from it") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error

    model = _network(config)
    _load(model, weights, path)
    return model.eval()


def iterations_per_call(config: dict[str, Any]) -> int | None:
    """The iterations that a configuration in the paper's names asks for, None for an explicit DiT."""
    if not config.get("fixed_point"):
        return None
    return config.get("fixed_point_no_grad_min_iters", 0) + config["fixed_point_with_grad_min_iters"]


def _network(config: dict[str, Any]) -> FixedPointDiT | DiT:
    known = {
        "sample_size": "input_size", "patch_size": "patch_size", "in_channels": "in_channels",
        "hidden_size": "hidden_size", "num_heads": "num_heads", "num_classes": "num_classes",
        "learned_variance": "learn_sigma",
    }  # fmt: skip
    if strange := sorted(config.keys() - {*known.values(), "depth", "use_gradient_checkpointing", *FIXED_POINT}):
        raise ValueError(f"the configuration has settings that are not known here: {strange}")
    missing = [name for name in (*known.values(), "depth") if name not in config]
    if missing:
        raise ValueError(f"the configuration lacks {missing}")
    settings = {ours: config[theirs] for ours, theirs in known.items()}
    if not config.get("fixed_point", False):
        return DiT(depth=config["depth"], **settings)
    return FixedPointDiT(
        num_pre=config.get("fixed_point_pre_depth", 1),
        num_post=config.get("fixed_point_post_depth", 1),
        time_in_pre_post=config.get("fixed_point_pre_post_timestep_conditioning", True),
        **settings,
    )


def _paper_name(key: str) -> str:
    for ours, theirs in PREFIXES.items():
        if key.startswith(ours):
            key = theirs + key.removeprefix(ours)
            break
    return key.replace("adaln.", "adaLN_modulation.1.")


def _paper_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the file's names, the two halves of the injection joined to the one map they are there."""
    state = dict(state)
    if "core.inject_z.weight" in state:
        halves = [state.pop("core.inject_z.weight"), state["core.inject_u.weight"]]
        state["core.inject_u.weight"] = torch.cat(halves, dim=1)
    return {_paper_name(key): weight for key, weight in state.items()}


def _load(model: Denoiser, weights: dict[str, Tensor], path: str | Path) -> None:
    """Copy `weights` into `model`; every mismatch is named as the file names it."""
    wanted = _paper_layout(model.state_dict())
    wanted["pos_embed"] = model.patch_embed.get_buffer("positions")
    problems = {
        "missing": sorted(wanted.keys() - weights.keys()),
        "extra": sorted(weights.keys() - wanted.keys()),
        "misshaped": [
            f"{key} {tuple(weights[key].shape)}, not {tuple(wanted[key].shape)}"
            for key in sorted(wanted.keys() & weights.keys())
            if weights[key].shape != wanted[key].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"the weights in {path} do not fit its configuration. {listed}")

    _check_positions(weights["pos_embed"], wanted["pos_embed"])
    state = {}
    for key in model.state_dict():
        if key == "core.inject_z.weight":
            state[key] = weights[_paper_name("core.inject_u.weight")][:, : model.config.hidden_size]
        elif key == "core.inject_u.weight":
            state[key] = weights[_paper_name(key)][:, model.config.hidden_size :]
        else:
            state[key] = weights[_paper_name(key)]
    model.load_state_dict(state)


def _check_positions(theirs: Tensor, ours: Tensor) -> None:
    """Positions are fixed, so ours are computed; a file whose own differ was made for another network."""
    if not torch.allclose(theirs.float(), ours, atol=max(1e-5, torch.finfo(theirs.dtype).eps)):
        raise ValueError(f"pos_embed is not the sine-cosine table {tuple(ours.shape)} that this network has")
