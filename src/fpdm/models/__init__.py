"""The networks: `DiT`, explicit, and `FixedPointDiT`, whose middle is a fixed point."""

from fpdm.models.denoiser import Denoiser, Output
from fpdm.models.dit import DiT
from fpdm.models.fixed_point_dit import FixedPointDiT
from fpdm.models.float8 import to_float8
from fpdm.models.int8 import to_int8

__all__ = ["Denoiser", "DiT", "FixedPointDiT", "Output", "to_float8", "to_int8"]
