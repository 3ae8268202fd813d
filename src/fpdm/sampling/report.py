"""What a sampling spent, and how well its fixed points were solved."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """One sampling, or several with the same plan taken together. Lists run in sampling order (noise to image).

    images            how many
    asked             block passes per image asked for, None if no budget was given
    planned, spent    block passes per image; equal
    total_passes      per image, guidance's second evaluation of the network included
    timesteps         of the noise schedule
    iterations        per timestep; None at every timestep of a network without iterations
    residuals         per timestep and iteration, |f(z) - z| / |f(z)|, mean over images; empty without iterations
    diverged          images in which a value that is not finite appeared: they show nothing
    seconds           in all, from noise to images (without decoding and writing)
    """

    images: int
    asked: int | None
    planned: int
    spent: int
    total_passes: int
    timesteps: list[int]
    iterations: list[int | None]
    residuals: list[list[float]]
    diverged: int
    seconds: float

    @property
    def residual(self) -> list[float]:
        """The last residual of each timestep: how far from solved it was left."""
        return [row[-1] for row in self.residuals if row]

    def merged(self, other: "Report") -> "Report":
        """This report and another of the same plan as one: residuals weighted by images, seconds added."""
        images = self.images + other.images
        share = other.images / images
        residuals = [
            [a + share * (b - a) for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.residuals, other.residuals, strict=True)
        ]
        changed = {
            "images": images,
            "residuals": residuals,
            "diverged": self.diverged + other.diverged,
            "seconds": self.seconds + other.seconds,
        }
        return Report(**{**asdict(self), **changed})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")
