"""What was measured of samples: numbers and intervals, what they were measured against, and how it is printed."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One number.

    name      such as "FID" or "precision"
    value     of the samples
    low, high a 95% interval
    floor     the same of real images against other real images: what a perfect model would have
    better    "lower" or "higher"; "floor" if to fall below it is suspicious, too
    margin    of the floor, half of its 95% interval, where the floor of a perfect model is 0 but for chance
    """

    name: str
    value: float
    low: float
    high: float
    floor: float
    better: str
    margin: float = 0.0

    @property
    def real(self) -> str:
        """The floor, as it is printed."""
        return significant(self.floor) + (f" \u00b1 {significant(self.margin)}" if self.margin else "")


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    samples   how many
    compared  how many of them, and of real images, where all pairs are compared: precision to coverage
    floor     how many real images were compared with all others, how many, for the Frechet distance's floor
    halves    the Frechet distance between two halves of the real images
    real      the real images' name, number, and how many could not be read
    identity  what settles the statistics of the real images
    measures  the numbers; the Frechet distance comes first
    notes     what a reader should know
    originals other images that copies were looked for among, if any: name, fingerprint, number, how many were searched,
              how many could not be read
    """

    samples: int
    compared: int
    floor: tuple[int, int]
    halves: float
    real: dict[str, Any]
    identity: dict[str, Any]
    measures: tuple[Measure, ...]
    notes: tuple[str, ...] = ()
    originals: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Measure:
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        measures = tuple(Measure(**measure) for measure in values["measures"])
        return cls(**{**values, "measures": measures, "floor": tuple(values["floor"]), "notes": tuple(values["notes"])})

    def __str__(self) -> str:
        size = self.identity["preprocessing"]["size"]
        lines = [
            f"{self.samples:,} samples against {self.real['images']:,} images of {self.real['name']}, "
            f"{size} x {size}, features of {self.identity['features']['network']}",
            f"{'':20} {'value':>10} {'95% interval':>22} {'real images':>20}",
        ]
        for m in self.measures:
            interval = f"{significant(m.low)} to {significant(m.high)}"
            lines.append(f"{m.name:20} {significant(m.value):>10} {interval:>22} {m.real:>20}")
        return "\n".join([*lines, self.compared_with, *self.notes])

    @property
    def compared_with(self) -> str:
        """How many images stand behind the numbers of the real ones."""
        (a, b), first = self.floor, self.measures[0].name
        return (
            f"real images: what they are themselves to other real images, the floor of a distance. {first}: {a:,} "
            f"against {b:,}, and {significant(self.halves)} between two halves of them. Precision to coverage: "
            f"{self.compared:,} against as many"
        )


def significant(value: float) -> str:
    """Three significant digits, or all before the point; without an exponent where it can be read so."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"
