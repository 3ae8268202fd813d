"""Which devices a run uses and how: processes, precision, compilation, sharding."""

import math
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from fpdm.devices import check_compiler, pick_device
from fpdm.models import Denoiser, DiT
from fpdm.names import needs
from fpdm.training.config import Config

PATIENCE = timedelta(hours=2)  # of processes that wait while the main one saves, samples and validates
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def make_accelerator(config: Config, folder: Path) -> Accelerator:
    """accelerate's view of the devices, and nothing else of how it was configured or launched.

    Raises ValueError for a device or compiler that is not there, a launch that is not plain, one that sets what the
    config does otherwise, or one whose processes are not in use.
    """
    run = config.run
    cpu = pick_device(run.device) == "cpu"
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=run.mixed_precision,
        log_with=tracker_of(config),
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    if kind not in SUPPORTED:
        raise ValueError(
            f"a launch with {kind} is not supported: launch plainly on one device or several, and share parameters "
            "over them with --sharding fsdp"
        )
    refuse_contradictions(accelerator, run.mixed_precision)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes:
        raise ValueError(
            f"{launched} processes were launched and this one would train with {processes}: each would make the same "
            "run. Launch with `accelerate launch -m fpdm` or `torchrun -m fpdm`, or unset WORLD_SIZE"
        )
    if run.sharding == "fsdp" and processes == 1:
        raise ValueError(
            "--sharding fsdp shares parameters over processes, and there is one: launch several, or leave it"
        )
    if run.compile:
        check_compiler(accelerator.device.type)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if run.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = run.tf32
    return accelerator


def refuse_contradictions(accelerator: Accelerator, mixed_precision: str) -> None:
    """Raises ValueError for what `accelerate config` or `accelerate launch` set that training would do otherwise, or
    leave out without a word."""
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()  # a launch always says one, if only "no"
    steps, dynamo = accelerator.gradient_accumulation_steps, accelerator.state.dynamo_plugin.backend
    said = []
    if wanted not in ("no", mixed_precision):
        said.append((f"mixed precision {wanted}", f"--mixed-precision {wanted}"))
    if steps != 1:
        said.append((f"{steps} steps of gradient accumulation", "--accumulation, the parts of a batch"))
    if dynamo != DynamoBackend.NO:
        said.append((f"dynamo backend {dynamo.value}", "--compile, which compiles the blocks"))
    if said:
        found, flags = (" and ".join(words) for words in zip(*said, strict=True))
        raise ValueError(
            f"accelerate was configured or launched with {found}, which this run does not have: say {flags} instead, "
            "and leave it out of accelerate's settings"
        )


def tracker_of(config: Config) -> str | None:
    """Raises ImportError for one that is not installed, without which accelerate would go on in silence."""
    tracker = config.run.tracker
    if tracker == "none":
        return None
    needs(tracker, tracker)
    return tracker


def shard(model: Denoiser) -> None:
    """Share the parameters of `model` over all processes (FSDP2), in place.

    The blocks of an explicit network are gathered one at a time. A fixed point network is gathered as a whole: it is
    small, and its core runs again and again.
    """
    # Modulations are views of one tensor, of which FSDP warns in case they are written to; nothing here does that.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if isinstance(model, DiT):
        for block in model.blocks:
            fully_shard(block)
            register_fsdp_forward_method(block, "modulation")
    fully_shard(model)


def gradients_shared(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass of a sharded model shares its gradients, or adds to those not shared yet."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. All processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, model: Tensor) -> Tensor:
    """`value`, a whole tensor, on the device of `model` and sharded as that is, if it is of its shape."""
    if isinstance(model, DTensor) and value.shape == model.shape:
        value = value.to(model.to_local().device)
        return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)
    return value.to(model.device)


def clip(parameters: Any, most: float) -> Tensor:
    """Scale gradients to a norm of at most `most` (0 for any); the norm that they had."""
    return whole(nn.utils.clip_grad_norm_(parameters, most or math.inf))
