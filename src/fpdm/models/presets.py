"""DiT's sizes (Peebles and Xie 2023, table 1). "S/2" is size S with patch 2."""

from typing import TypedDict

from fpdm.names import unknown


class Size(TypedDict):
    hidden_size: int
    depth: int
    num_heads: int


# fmt: off
SIZES: dict[str, Size] = {
    "S":  {"hidden_size":  384, "depth": 12, "num_heads":  6},
    "B":  {"hidden_size":  768, "depth": 12, "num_heads": 12},
    "L":  {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
# fmt: on
PATCHES = (2, 4, 8)
NAMES = [f"{size}/{patch}" for size in SIZES for patch in PATCHES]


def preset(name: str) -> dict[str, int]:
    """The settings of a named size: hidden_size, depth, num_heads, patch_size. Raises ValueError for another name."""
    if name not in NAMES:
        raise ValueError(unknown("preset", name, NAMES))
    size, patch = name.split("/")
    return {**SIZES[size], "patch_size": int(patch)}  # type: ignore[dict-item]
