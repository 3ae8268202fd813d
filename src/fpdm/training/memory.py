"""What a training step holds in memory, counted without allocating it.

The step is run as training runs it - forward with iterations without and with gradient, loss, backward, clipping,
AdamW, moving average - but on tensors without data (torch's FakeTensorMode), and the storages that are alive are added
up at every operation. A size that fits no machine takes seconds, and what the network or the loss stores is counted
because they do store it. torch's own `MemTracker` counts the same, at up to ten times the time.

What is not counted: what a kernel takes while it runs, the allocator's rounding and fragments, cuBLAS's workspace, and
what several processes send each other. Warm starts are left out: they have no gradient, and are over before the peak.
"""

import math
import warnings
import weakref
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpdm.data import Slots, Source
from fpdm.diffusion import DiffusionLoss, make_schedule
from fpdm.fixedpoint import Implicit, MultiStepJacobianFree, Solve, StochasticJacobianFree
from fpdm.models import Denoiser, DiT
from fpdm.training.build import build_model
from fpdm.training.config import Config, DataConfig
from fpdm.training.course import differentiated, make_courses
from fpdm.training.ema import Ema


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step, on one process.

    parameters   of the network, with its fixed positions
    gradients    of them; all are there at the end of backward, when the activations are gone
    optimizer    AdamW's two moments
    ema          the moving average
    activations  what forward leaves behind for backward, the batch and the casts of the weights included
    peak         the most that is there at any time: gradients come as activations go, beside what is in work
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    peak: int

    @property
    def transient(self) -> int:
        """What is at the peak beside weights, moments, average and all activations: what is in work, and the gradients
        that are there by then."""
        return self.peak - (self.parameters + self.optimizer + self.ema + self.activations)


def training_memory(config: Config, source: Source, solve: Solve | None) -> Memory:
    """The memory of a training step of `config` on images of `source`, of which only channels and classes are read.

    solve  as a call of the network takes it, nothing left to be drawn (see `solves`); None for an explicit network

    Raises ValueError for a network that cannot be, and a batch that cannot be shared out.
    """
    slots = one_step(config)
    schedule = make_schedule(
        prediction_type=config.diffusion.prediction_type,
        learned_variance=config.model.learned_variance,
        num_train_timesteps=config.diffusion.num_train_timesteps,
    )
    loss = DiffusionLoss(schedule, config.diffusion.min_snr_gamma)
    with _without_data():
        model = build_model(config, source).train()
        if config.gradient.checkpointing:
            model.enable_gradient_checkpointing()
        ema, optimizer = Ema(model, config.optimizer.ema), _stepped(model)
        live = Live()
        parameters = live.add(_tensors(model))
        average = live.add(_tensors(ema.model))
        moments = live.add(value for state in optimizer.state.values() for value in state.values())
        with live:
            for _ in range(min(slots.parts, 2)):  # further parts are as the second: gradients lie beside activations
                before = live.now
                total = _forward(config, model, loss, solve, slots.size)
                activations = live.now - before
                total.backward()
                del total
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, 1)
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    return Memory(parameters, gradients, moments, average, activations, live.peak)


def one_step(config: Config) -> Slots:
    """The parts of a step's batch, on one process. Raises ValueError for a batch that cannot be shared out."""
    return Slots(0, 1, config.optimizer.batch_size, config.optimizer.accumulation)


def stand_in(config: DataConfig) -> Source:
    """Images of which no more is known than the config says: their channels and, 0 if it is open, their classes."""
    names = [str(label) for label in range(config.classes or 0)]
    return cast(Source, SimpleNamespace(channels=config.channels, class_names=names))


def network(config: Config, source: Source) -> Denoiser:
    """The network of a config without its weights, for its counts and configuration."""
    with _without_data():
        return build_model(config, source)


def solves(config: Config, model: Denoiser) -> dict[str, Solve | None]:
    """The solves of a training step by name: "mean" and "most", the mean draw of S-JFB's counts, rounded up, and the
    largest, which a run meets sooner or later; "every" where no count is drawn, None for an explicit network.

    Where there are early exits, one is decoded. The implicit method is counted without the iterates of its second
    solve: no tensor here says when that is done.
    """
    if isinstance(model, DiT):
        return {"every": None}
    courses = make_courses(config.gradient, model.config.num_core)
    gradient, stopping = courses.gradient, courses.stopping
    limit = stopping.limit
    assert isinstance(limit, int)
    if isinstance(gradient, StochasticJacobianFree):
        (low_n, high_n), (low_m, high_m) = gradient.no_grad, gradient.with_grad
        mean = MultiStepJacobianFree(math.ceil((low_n + high_n) / 2), math.ceil((low_m + high_m) / 2))
        found = {"mean": Solve(gradient=mean), "most": Solve(gradient=MultiStepJacobianFree(high_n, high_m))}
    elif isinstance(gradient, Implicit):
        found = {"every": Solve(gradient=MultiStepJacobianFree(limit, 1))}
    else:
        found = {"every": Solve(gradient=gradient, stopping=stopping)}
    return {name: replace(solve, exits=_exits(solve) if courses.exits else ()) for name, solve in found.items()}


def _exits(solve: Solve) -> tuple[int, ...]:
    """An earlier iterate, with gradient if there is such a one."""
    later = differentiated(solve)
    return tuple(later[:-1] or range(1, later[-1]))[:1]


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, each once however many tensors show it: those that operations make
    while this is entered, and those that are added.

    now   bytes
    peak  the most they have been
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count the storages of `tensors` from now on; the bytes that this adds."""
        before = self.now
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place, size = storage._cdata, storage.nbytes()
            if place not in self._known:
                self._known.add(place)
                self.now += size
                weakref.finalize(storage, self._forget, place, size)
        self.peak = max(self.peak, self.now)
        return self.now - before

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def _forward(config: Config, model: Denoiser, loss: DiffusionLoss, solve: Solve | None, images: int) -> Tensor:
    """The loss of a batch, and nothing else that lives on."""
    shape = (images, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    x0, noise = torch.empty(shape), torch.empty(shape)
    t, y = torch.zeros(images, dtype=torch.int64), torch.zeros(images, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.run.mixed_precision == "bf16"):
        output = model(loss.noisy(x0, noise, t), t, y, **({} if solve is None else {"solve": solve}))
    samples = (output.sample, *output.exits.values())
    return torch.stack([loss(sample.float(), x0, noise, t).total.mean() for sample in samples]).sum()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _stepped(model: Denoiser) -> torch.optim.AdamW:
    """The optimiser after a step: only then its moments are there."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class _WithoutData(FakeTensorMode):
    """Tensors of the CPU, whose attention is a fused kernel as it is on CUDA: one that stores its inputs, its output
    and a number per row. (Tensors of CUDA cannot be imitated where torch is built without it.)"""

    def __deepcopy__(self, memo: Any) -> "_WithoutData":
        return self  # tensors hold their mode, and those of a copied network go with the others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True  # asked is only whether norms are unexceptional, as those of a real step are
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _without_data() -> Any:
    with warnings.catch_warnings(), _WithoutData(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # on copying
        yield
