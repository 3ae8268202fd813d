"""Fixed Point Diffusion Models: small diffusion transformers that sample at any compute budget.

The public names are imported when they are first used, so that `import fpdm` and `fpdm --help` load neither torch nor
diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Anderson": "fpdm.fixedpoint",
    "Broyden": "fpdm.fixedpoint",
    "DiT": "fpdm.models",
    "FixedIterations": "fpdm.fixedpoint",
    "FixedPointDiT": "fpdm.models",
    "FixedPointDiTPipeline": "fpdm.pipeline",
    "Implicit": "fpdm.fixedpoint",
    "JacobianFree": "fpdm.fixedpoint",
    "MultiStepJacobianFree": "fpdm.fixedpoint",
    "Phantom": "fpdm.fixedpoint",
    "Picard": "fpdm.fixedpoint",
    "Plan": "fpdm.sampling",
    "Report": "fpdm.sampling",
    "Solve": "fpdm.fixedpoint",
    "StochasticJacobianFree": "fpdm.fixedpoint",
    "Tolerance": "fpdm.fixedpoint",
    "Unroll": "fpdm.fixedpoint",
    "make_plan": "fpdm.sampling",
    "to_float8": "fpdm.models",
    "to_int8": "fpdm.models",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from fpdm.fixedpoint import (
        Anderson,
        Broyden,
        FixedIterations,
        Implicit,
        JacobianFree,
        MultiStepJacobianFree,
        Phantom,
        Picard,
        Solve,
        StochasticJacobianFree,
        Tolerance,
        Unroll,
    )
    from fpdm.models import DiT, FixedPointDiT, to_float8, to_int8
    from fpdm.pipeline import FixedPointDiTPipeline
    from fpdm.sampling import Plan, Report, make_plan


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fpdm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
