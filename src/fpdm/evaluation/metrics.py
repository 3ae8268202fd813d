"""Distances between sets of features. NumPy in float64; nothing here knows of images.

x  (n, D)  features of generated images        y  (m, D)  features of real images
mu, C      mean (D,) and covariance (D, D)     k          which nearest neighbour
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray
ELEMENTS = 2**23  # of a matrix of all pairs at a time: memory stays small, and each part is one matrix product


@dataclass(frozen=True)
class Moments:
    """Mean (D,) of `count` features, and their scatter (D, D) about it: the sum of outer products."""

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: Array) -> "Moments":
        """Of (n, D) features, n at least 1. Raises ValueError if some are not finite."""
        features = np.asarray(features, np.float64)
        if not np.isfinite(features).all():
            raise ValueError("some features are not finite: the images or the feature network are damaged")
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    @property
    def cov(self) -> Array:
        """The unbiased covariance (D, D). Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)

    def without(self, part: "Moments") -> "Moments":
        """Those of a set without a part of it: `merged` undone."""
        count = self.count - part.count
        mean = self.mean + (self.mean - part.mean) * (part.count / count)
        step = part.mean - mean
        scatter = self.scatter - part.scatter - np.outer(step, step) * (count * part.count / self.count)
        return Moments(count, mean, scatter)

    def merged(self, other: "Moments") -> "Moments":
        """Those of both sets together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), scatter)


class Frechet:
    """The squared Frechet (2-Wasserstein) distance of Gaussians to a fixed one:

        |mu_a - mu_b|^2 + tr C_a + tr C_b - 2 tr (C_b^1/2 C_a C_b^1/2)^1/2        (Dowson and Landau 1982)

    The last term is the sum of the square roots of the eigenvalues of a symmetric product, real and non-negative but
    for rounding, whatever the ranks; a square root of the unsymmetric C_a C_b has neither property.
    """

    def __init__(self, reference: Moments):
        self.mean, self.trace = reference.mean, np.trace(reference.cov)
        values, vectors = np.linalg.eigh(reference.cov)
        self.root = (vectors * np.sqrt(_non_negative(values))) @ vectors.T

    def __call__(self, moments: Moments) -> float:
        cov, shift = moments.cov, moments.mean - self.mean
        shared = np.sqrt(_non_negative(np.linalg.eigvalsh(self.root @ cov @ self.root))).sum()
        distance = shift @ shift + np.trace(cov) + self.trace - 2 * shared
        return float(np.maximum(distance, 0))


def _non_negative(values: Array) -> Array:
    """Eigenvalues without what rounding made of those that are 0, whose square roots would not be small any more."""
    return np.where(values > np.finfo(values.dtype).eps * values.max(), values, 0.0)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Frechet distance between two Gaussians: see `Frechet`."""
    return Frechet(b)(a)


class Estimate(NamedTuple):
    value: float
    standard_error: float


def kernel_distance(x: Array, y: Array, x_strata: Array | None = None, y_strata: Array | None = None) -> Estimate:
    """The squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, unbiased, with its standard error.

    Binkowski et al. 2018, sec. 4; an unbiased estimate may be below 0. The standard error is that of the
    first-order projections of both sets (Hoeffding 1948).

    strata  (n,) and (m,) the class of each image, if the set has a fixed number of each; without them the estimate
            would be biased downwards, since such sets have fewer pairs within a class than independent images

    Needs at least 3 images of each kind, and 2 of some class.
    """
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise ValueError(f"a kernel distance needs at least 3 images of each kind, not {n} and {m}")
    of_x, of_y = _within(x, x_strata), _within(y, y_strata)
    cross_x, cross_y = _kernel_sums(x, y)[0] / m, _kernel_sums(y, x)[0] / n
    value = of_x.mean() + of_y.mean() - 2 * cross_x.mean()
    variance = 4 * _variance(of_x - cross_x, x_strata) / n + 4 * _variance(of_y - cross_y, y_strata) / m
    return Estimate(float(value), float(np.sqrt(variance)))


def _within(a: Array, strata: Array | None) -> Array:
    """For each row of a, its mean kernel with independent images of the same kind; the mean of all is unbiased."""
    n = len(a)
    strata = np.zeros(n, int) if strata is None else strata
    sums, same = _kernel_sums(a, a, strata)
    _, place, counts = np.unique(strata, return_inverse=True, return_counts=True)
    if counts.max() < 2:
        raise ValueError("a kernel distance needs at least 2 images of a class")
    size = counts[place]
    # The mean kernel with others of the class; of a class of one image, as it is in the other classes.
    near = np.where(size > 1, same / np.maximum(size - 1, 1), same.sum() / (size - 1).sum())
    return (sums - same) / n + near * size / n


def _variance(values: Array, strata: Array | None) -> float:
    """The variance within strata, of which those of one value are taken for like the others."""
    if strata is None:
        return float(values.var(ddof=1))
    parts = [values[strata == stratum] for stratum in np.unique(strata)]
    parts = [part for part in parts if len(part) > 1]
    return float(sum(len(part) * part.var(ddof=1) for part in parts) / sum(map(len, parts)))


def _kernel_sums(a: Array, b: Array, strata: Array | None = None) -> tuple[Array, Array]:
    """For each row of a, the sum of its kernels with the rows of b; and, where a is b and of these strata, with those
    of the same stratum. A row and itself are left out then."""
    sums, same, size = np.empty(len(a)), np.empty(len(a)), max(1, ELEMENTS // len(b))
    for start in range(0, len(a), size):
        part = slice(start, start + size)
        kernels = (a[part] @ b.T / a.shape[1] + 1) ** 3
        if strata is not None:
            rows = np.arange(len(kernels))
            kernels[rows, start + rows] = 0
            same[part] = (kernels * (strata[part, None] == strata)).sum(1)
        sums[part] = kernels.sum(1)
    return sums, same


class Manifolds(NamedTuple):
    """What the neighbourhoods say, image by image; each metric is the mean of its array.

    precision  (n,) generated images within the neighbourhood of a real one, 0 or 1
    recall     (m,) real images within the neighbourhood of a generated one, 0 or 1
    density    (n,) neighbourhoods of real images that a generated one is in, over k
    coverage   (m,) real images with a generated one in their neighbourhood, 0 or 1
    without    (G, 2) recall and coverage by the generated images without those of a group
    """

    precision: Array
    recall: Array
    density: Array
    coverage: Array
    without: Array


def manifolds(x: Array, y: Array, k_precision: int = 3, k_density: int = 5, groups: Array | None = None) -> Manifolds:
    """Precision and recall (Kynkaanniemi et al. 2019, k = 3), density and coverage (Naeem et al. 2020, k = 5). A
    neighbourhood is the ball around an image that reaches its k-th nearest neighbour in the same set. All depend on the
    sizes of the sets, which should be equal.

    groups  (n,) the group of each generated image, to be left out in turn
    """
    most = max(k_precision, k_density)
    if min(len(x), len(y)) <= most:
        raise ValueError(f"neighbourhoods need more than {most} images of each kind, not {len(x)} and {len(y)}")
    groups = np.full(len(x), -1) if groups is None else groups
    count = int(groups.max()) + 1
    # Copies of an image are on the edge of a ball, or at its centre: rounding must not put them outside.
    slack = 1e-12 * max((x**2).sum(1).max(), (y**2).sum(1).max())
    balls_x = _radii_without(x, k_precision, groups, count) + slack  # the last is that of all images
    ball_y, wide_y = _radii(y, [k_precision, k_density]).T + slack
    widest = balls_x.max(0)
    precision, density = np.zeros(len(x)), np.zeros(len(x))
    recalled, near = np.zeros((count + 1, len(y)), bool), np.zeros((count + 1, len(y)), np.int64)
    for start, squares in _squared_distances(x, y):
        part = slice(start, start + len(squares))
        precision[part] = (squares <= ball_y).any(1)
        density[part] = (squares <= wide_y).sum(1) / k_density
        of_x, of_y = np.nonzero(squares <= widest[part, None])
        for ball, seen in zip(balls_x, recalled, strict=True):
            seen[of_y[squares[of_x, of_y] <= ball[start + of_x]]] = True
        of_x, of_y = np.nonzero(squares <= wide_y)
        np.add.at(near, (groups[start + of_x], of_y), 1)  # group -1 is the last row
    covered = near.sum(0) - near[:count] > 0
    without = np.stack([recalled[:count].mean(1), covered.mean(1)], axis=1)
    return Manifolds(precision, recalled[-1].astype(float), density, (near.sum(0) > 0).astype(float), without)


def nearest(x: Array, y: Array, skip_own: bool = False) -> tuple[Array, Array]:
    """For each row of x, the distance (n,) to the nearest row of y, and its number (n,). With `skip_own`, x are the
    first rows of y, and none is its own neighbour."""
    distances, places = np.empty(len(x)), np.empty(len(x), np.int64)
    for start, squares in _squared_distances(x, y):
        part, rows = slice(start, start + len(squares)), np.arange(len(squares))
        if skip_own:
            squares[rows, start + rows] = np.inf
        places[part] = squares.argmin(1)
        # Once more without the cancellation of the matrix form: a copy must be at distance 0.
        distances[part] = np.linalg.norm(x[part] - y[places[part]], axis=1)
    return distances, places


def _radii(features: Array, ks: list[int]) -> Array:
    """(n, len(ks)) squared distances of each row to its k-th nearest other row."""
    radii = np.empty((len(features), len(ks)))
    for start, squares in _others(features):
        radii[start : start + len(squares)] = np.partition(squares, ks, axis=1)[:, ks]
    return radii


SPARE = 12  # of so many nearest neighbours more than k, hardly ever all fall into one group


def _radii_without(features: Array, k: int, groups: Array, count: int) -> Array:
    """(count + 1, n) squared distances of each row to its k-th nearest other row among those not of group 0, 1, ...,
    and, in the last line, among all; below 0 for the rows of the group itself."""
    most = min(k + SPARE, len(features) - 1)
    radii = np.empty((count + 1, len(features)))
    for start, squares in _others(features):
        part, rows = slice(start, start + len(squares)), np.arange(len(squares))
        places = np.argpartition(squares, most, axis=1)[:, : most + 1]
        places = np.take_along_axis(places, np.take_along_axis(squares, places, 1).argsort(1), 1)[:, 1:]  # not itself
        for group in range(count + 1):
            kept = np.cumsum(groups[places] != group, axis=1) == k
            kth = np.where(kept.any(1), kept.argmax(1), most - 1)
            radii[group, part] = squares[rows, places[rows, kth]]
    for group in range(count):
        radii[group, groups == group] = -np.inf
    return radii


def _others(features: Array) -> Iterator[tuple[int, Array]]:
    """Parts of the squared distances (n, n), in which a row comes before all others, whatever rounding says."""
    for start, squares in _squared_distances(features, features):
        rows = np.arange(len(squares))
        squares[rows, start + rows] = -1
        yield start, squares


def _squared_distances(x: Array, y: Array) -> Iterator[tuple[int, Array]]:
    """Parts of the matrix (n, m) of squared distances: the first row, and the rows."""
    norms, rows = (y**2).sum(1), max(1, ELEMENTS // len(y))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        yield start, np.maximum((part**2).sum(1)[:, None] + norms - 2 * part @ y.T, 0)


def bootstrap_interval(
    statistic: Callable[[Array], float], values: Array, rng: np.random.Generator, replicates: int = 1000
) -> tuple[float, float]:
    """A 95% interval for `statistic` of values (n,): the bootstrap's percentiles (Efron 1979). For means and medians;
    in a Frechet distance, images drawn more than once would count as a lack of variety."""
    n = len(values)
    draws = [statistic(values[rng.integers(n, size=n)]) for _ in range(replicates)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def jackknife_error(statistic: Callable[[Moments], float], features: Array, groups: Array) -> float:
    """The standard error of a statistic of moments, from leaving out one group of features at a time (Tukey 1958).

    groups  (n,) the group of each of the features (n, D), as `dealt` deals them
    """
    whole, count = Moments.of(features), int(groups.max()) + 1
    return error_without([statistic(whole.without(Moments.of(features[groups == g]))) for g in range(count)])


def error_without(values: Array | list[float]) -> float:
    """The standard error of a statistic from its values (G,) without one group at a time."""
    return float(np.sqrt((len(values) - 1) * np.var(values)))


def proportion_interval(values: Array) -> tuple[float, float]:
    """A 95% interval for the mean of values (n,) of 0 and 1 (Wilson 1927): not empty where all are alike."""
    n, p, z = len(values), float(values.mean()), 1.96
    centre, margin = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (centre - margin) / (1 + z**2 / n), (centre + margin) / (1 + z**2 / n)
    return max(0.0, float(min(low, p))), min(1.0, float(max(high, p)))


def dealt(count: int, groups: int, rng: np.random.Generator, strata: Array | None = None) -> Array:
    """A group (count,) for each of so many images, at random; each class, where the set has a fixed number of each, is
    dealt out in turn, so that leaving out a group leaves the classes in proportion."""
    order = rng.permutation(count)
    if strata is not None:
        order = order[np.argsort(strata[order], kind="stable")]
    group = np.empty(count, np.int64)
    group[order] = np.arange(count) % groups
    return group
