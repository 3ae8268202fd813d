"""Calls of a network as recordings, which a GPU plays again with no Python between its kernels: CUDA graphs.

A fixed number of iterations is three recordings: what comes before the solve, one iteration, residuals included, which
is played as often as the plan says, and what comes after. Each reads and writes tensors of its own, so that one set
serves all timesteps, plans and calls of a size of batch.

What a recording cannot do is done without: gradients, autocast (which keeps cast weights for as long as it pleases),
tolerances, iterations of each sample, accelerated solvers and early exits.
"""

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from fpdm.fixedpoint import FixedIterations, Picard, Running, Solution, Solve, Unroll, mapped, overwrite, residuals

if TYPE_CHECKING:
    from fpdm.models.fixed_point_dit import FixedPointDiT

Tree = TypeVar("Tree")
Inputs = tuple[Tensor, Tensor, Tensor]  # x (B, C, H, W), t (B,), y (B,)
Work = Callable[[], None]
Capture = Callable[[torch.device, Work], Work]  # of some work, what does it again
Start = Callable[[Tensor], Tensor]  # u to where z starts
KEPT = 4  # sets of recordings, each of another size of batch: those used last
ANY = FixedIterations(1)  # plays of an iteration are counted outside


def cuda_graph(device: torch.device, work: Work) -> Work:
    """`work` as a CUDA graph."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up, and compilers compile
                work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay  # type: ignore[no-any-return]


class Recording(Generic[Tree]):
    """A function of tensors that stay where they are, recorded; what it returns is in `outputs` after each `play`."""

    def __init__(self, function: Callable[[], Tree], capture: Callable[[Work], Work], outputs: Tree | None = None):
        """`outputs` are where to write: tensors of their own if there are none."""
        self.outputs: Tree = mapped(Tensor.clone, function()) if outputs is None else outputs
        self.play = capture(lambda: overwrite(self.outputs, function()))


class Explicit:
    """A call of a network without a fixed point."""

    def __init__(self, predict: Callable[..., Tensor], inputs: Inputs, capture: Callable[[Work], Work]):
        self.inputs = mapped(Tensor.clone, inputs)
        self.predict = Recording(lambda: predict(*self.inputs), capture)

    def __call__(self, inputs: Inputs) -> Tensor:
        overwrite(self.inputs, inputs)
        self.predict.play()
        return self.predict.outputs.clone()


class Solved:
    """A call of a fixed point network, and its iterations."""

    def __init__(self, model: "FixedPointDiT", inputs: Inputs, solver: Picard, capture: Callable[[Work], Work]):
        self.inputs = mapped(Tensor.clone, inputs)
        self.before = Recording(lambda: model.encode(*self.inputs), capture)
        u, context, c = self.before.outputs
        self.running = running = Running.begun(u.clone(), context, solver.init(u))
        status = torch.zeros(len(u), dtype=torch.int64, device=u.device)

        def iterated() -> tuple[Any, ...]:
            fz = model.core(running.z, context)
            return measured(running.moved(solver, fz, *residuals(running.z, fz), ANY))

        def ended() -> tuple[Tensor, Tensor, Tensor]:
            return model.decode(running.value, c), running.value, running.told(status, ANY)

        self.iteration = Recording(iterated, capture, measured(running))
        self.after = Recording(ended, capture)

    def __call__(self, inputs: Inputs, iterations: int, start: Start) -> tuple[Tensor, Solution]:
        """The prediction and the solution."""
        overwrite(self.inputs, inputs)
        self.before.play()
        begun = Running.begun(start(self.before.outputs[0]), None, None)
        overwrite(measured(self.running), measured(begun))
        rows = []
        for _ in range(iterations):
            self.iteration.play()
            rows.append(measured(self.running)[-1].clone())
        self.after.play()
        sample, value, status = mapped(Tensor.clone, self.after.outputs)
        spent = torch.full_like(status, iterations)
        return sample, Solution(value, torch.stack(rows), spent, status, {})


def measured(running: Running) -> tuple[Any, ...]:
    """What an iteration changes; the residuals last."""
    return (running.z, running.best, running.least, running.distance, running.residual)


class Recorder:
    """The recordings of one network, made as they are needed. Copies of it begin with none.

    Weights may change in place. Where others take their places, as by a conversion, recordings are made anew.
    """

    def __init__(self, device: str = "cuda", capture: Capture = cuda_graph):
        self.device, self.capture = device, capture
        self.sets: dict[Any, Any] = {}
        self.lock = Lock()  # tensors are written to which all calls share

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder, (self.device, self.capture)

    def takes(self, x: Tensor, solve: Solve | None = None) -> bool:
        """Whether a call can be recorded."""
        if x.device.type != self.device or torch.is_grad_enabled() or torch.is_autocast_enabled(self.device):
            return False
        if solve is None:
            return True
        count = solve.stopping.limit
        fixed = isinstance(solve.stopping, FixedIterations) and isinstance(count, int) and count > 0
        plain = isinstance(solve.solver, Picard) and solve.gradient == Unroll() and not solve.exits
        return fixed and plain

    def explicit(self, model: torch.nn.Module, predict: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        """`predict(*inputs)`."""
        with self.lock:
            return self._set(model, inputs, None, partial(Explicit, predict, inputs))(inputs)  # type: ignore[no-any-return]

    def solved(self, model: "FixedPointDiT", inputs: Inputs, solve: Solve, start: Start) -> tuple[Tensor, Solution]:
        """The prediction and the solution of a call of `model`."""
        solver = solve.solver
        assert isinstance(solver, Picard)
        with self.lock:
            found = self._set(model, inputs, solver, partial(Solved, model, inputs, solver))
            return found(inputs, solve.stopping.limit, start)  # type: ignore[no-any-return]

    def _set(self, model: torch.nn.Module, inputs: Inputs, solver: Any, make: Callable[..., Any]) -> Any:
        places = tuple(parameter.data_ptr() for parameter in model.parameters())
        key = (*((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs), solver, places)
        found = self.sets.pop(key, None)
        if found is None:
            while len(self.sets) >= KEPT:
                del self.sets[next(iter(self.sets))]
            with torch.inference_mode(False), torch.no_grad():
                found = make(partial(self.capture, inputs[0].device))
        self.sets[key] = found
        return found
