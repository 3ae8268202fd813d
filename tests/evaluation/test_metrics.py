"""Each metric against closed forms, plain loops, other libraries, and what repeated draws say of it."""

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest
from sklearn.neighbors import NearestNeighbors

from fpdm.evaluation.metrics import (
    Frechet,
    Manifolds,
    Moments,
    bootstrap_interval,
    dealt,
    error_without,
    frechet_distance,
    jackknife_error,
    kernel_distance,
    manifolds,
    nearest,
    proportion_interval,
)


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def correlated(n, size, seed):
    """Features (n, size) with a mean, spreads and correlations of their own for each seed."""
    rng = np.random.default_rng(seed)
    spreads = rng.uniform(0.1, 2, size)
    return rng.normal(size=(n, size)) * spreads @ rotation(size, seed) + rng.normal(size=size)


def gaussian(mean, cov, count=1000):
    """Moments with exactly this mean and covariance."""
    return Moments(count, np.asarray(mean, np.float64), np.asarray(cov, np.float64) * (count - 1))


def centred(variances, vectors=None):
    """Moments with mean 0 and these variances, along the columns of `vectors`."""
    vectors = np.eye(len(variances)) if vectors is None else vectors
    return gaussian(np.zeros(len(variances)), vectors * variances @ vectors.T)


# Frechet distance


@pytest.mark.parametrize(("size", "n", "m"), [(1, 20, 30), (2, 10, 500), (16, 17, 40), (16, 300, 40), (100, 300, 1000)])
def test_frechet_distance_agrees_with_scipy(size, n, m):
    x, y = correlated(n, size, 1), correlated(m, size, 2)
    a, b = np.cov(x.T).reshape(size, size), np.cov(y.T).reshape(size, size)
    shared = np.trace(scipy.linalg.sqrtm(a @ b)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * shared
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-6)


def test_equal_covariances_leave_the_squared_shift_of_the_mean():
    x, shift = correlated(200, 8, 1), np.arange(8.0)
    assert frechet_distance(Moments.of(x + shift), Moments.of(x)) == pytest.approx(140, rel=1e-6)


def test_commuting_covariances_leave_the_squared_differences_of_their_roots():
    a, b, vectors = np.array([1.0, 4, 9, 16, 0]), np.array([4.0, 4, 1, 0, 0]), rotation(5)
    assert frechet_distance(centred(a), centred(b)) == pytest.approx(1 + 0 + 4 + 16, rel=1e-9)
    assert frechet_distance(centred(a, vectors), centred(b, vectors)) == pytest.approx(21, rel=1e-6)


def test_two_dimensions_that_do_not_commute():
    # The roots r and s of the eigenvalues of M have (r + s)^2 = tr M + 2 sqrt(det M).
    a, b = np.array([[2.0, 1], [1, 3]]), np.array([[5.0, -2], [-2, 1]])
    shared = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(5 * 1))
    expected = 1 + 4 + 5 + 6 - 2 * shared
    assert frechet_distance(gaussian([1, 2], a), gaussian([0, 0], b)) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(st.floats(-9, 9), st.floats(-9, 9), st.floats(0.01, 9), st.floats(0.01, 9))
def test_one_dimension(mean, other_mean, deviation, other_deviation):
    found = frechet_distance(gaussian([mean], [[deviation**2]]), gaussian([other_mean], [[other_deviation**2]]))
    expected = (mean - other_mean) ** 2 + (deviation - other_deviation) ** 2
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("n", "size"), [(500, 20), (8, 20), (2, 20)])
@pytest.mark.parametrize("scale", [1e-5, 1, 1e5])
def test_a_set_is_at_no_distance_from_itself(n, size, scale):
    moments = Moments.of(scale * correlated(n, size, 1))
    assert 0 <= frechet_distance(moments, moments) <= 1e-6 * np.trace(moments.cov)


@pytest.mark.parametrize("n", [200, 6])  # 6 for 20 features: one covariance is of low rank
def test_frechet_distance_is_symmetric(n):
    a, b = Moments.of(correlated(n, 20, 1)), Moments.of(correlated(100, 20, 2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


@pytest.mark.parametrize("n", [200, 6])
def test_frechet_distance_does_not_change_by_rotation_and_shift(n):
    x, y, turn = correlated(n, 20, 1), correlated(100, 20, 2), rotation(20, 3)
    turned = frechet_distance(Moments.of(x @ turn + 5), Moments.of(y @ turn + 5))
    assert turned == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 0.5, 1e6])
def test_frechet_distance_goes_with_the_square_of_the_scale(scale):
    x, y = correlated(30, 20, 1), correlated(100, 20, 2)
    scaled = frechet_distance(Moments.of(scale * x), Moments.of(scale * y))
    assert scaled == pytest.approx(scale**2 * frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-6)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_features_in_disjoint_subspaces_share_nothing(n):
    turn, x, y = rotation(60), np.zeros((n, 60)), np.zeros((40, 60))
    x[:, :20], y[:, 20:] = correlated(n, 20, 1), correlated(40, 40, 2)
    a, b = Moments.of(x @ turn), Moments.of(y @ turn)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_low_ranks_that_overlap_share_what_they_overlap_in():
    a, b, vectors = np.zeros(50), np.zeros(50), rotation(50)
    a[:5], b[3:9] = [1, 2, 3, 4, 5], [9, 4, 1, 1, 1, 1]
    expected = 1 + 2 + 3 + (2 - 3) ** 2 + (5**0.5 - 2) ** 2 + 4
    assert frechet_distance(centred(a, vectors), centred(b, vectors)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(centred(b, vectors), centred(a, vectors)) == pytest.approx(expected, rel=1e-6)


def test_images_all_alike_have_a_distance():
    y = correlated(50, 12, 1)
    alike, real = np.tile(y[0], (7, 1)), Moments.of(y)
    expected = ((y[0] - real.mean) ** 2).sum() + np.trace(real.cov)
    assert frechet_distance(Moments.of(alike), real) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(real, Moments.of(alike)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(Moments.of(alike), Moments.of(alike + 1)) == pytest.approx(12, rel=1e-6)


SPECTRA = {
    "6 decades": np.logspace(0, -6, 300),
    "12 decades": np.logspace(0, -12, 300),
    "a power law": np.arange(1.0, 301) ** -2,
    "low rank and noise": np.r_[np.ones(10), np.full(290, 1e-10)],
    "one large and a floor": np.r_[1, np.full(299, 2e-7)],
}


@pytest.mark.parametrize("variances", SPECTRA.values(), ids=SPECTRA)
def test_many_ill_conditioned_features_have_the_known_distance(variances):
    vectors, scale = rotation(300), variances.sum()
    a, double, reverse = (centred(v, vectors) for v in (variances, 4 * variances, variances[::-1]))
    assert frechet_distance(a, double) == pytest.approx(scale, rel=1e-6)
    assert frechet_distance(a, reverse) == pytest.approx(2 * scale - 2 * np.sqrt(variances * variances[::-1]).sum())
    assert frechet_distance(a, a) <= 1e-6 * scale


def test_moments_that_are_not_finite_are_at_no_perfect_distance():
    good = Moments.of(correlated(50, 8, 1))
    assert frechet_distance(Moments(50, good.mean * np.nan, good.scatter), good) != 0


def test_a_single_image_has_no_distance():
    distance, x = Frechet(Moments.of(correlated(50, 8, 1))), correlated(1, 8, 2)
    with pytest.raises(ValueError, match="at least 2 images"):
        distance(Moments.of(x))


# Moments


def test_moments_are_numpys():
    x = correlated(30, 6, 1)
    moments = Moments.of(x)
    assert moments.count == 30
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(x.T), rtol=1e-12, atol=1e-15)


def test_moments_are_computed_in_float64_far_from_0():
    x = np.random.default_rng(0).integers(0, 10, (40, 3))
    far = Moments.of((x + 2**20).astype(np.float32))  # exact, as is the mean in float64, and not in float32
    np.testing.assert_allclose(far.mean - 2**20, x.mean(0), rtol=1e-8)
    np.testing.assert_allclose(far.cov, np.cov(x.T), rtol=1e-8, atol=1e-8)


def features(largest):
    rows, values = st.integers(1, 12), st.floats(-largest, largest, allow_subnormal=False)
    return rows.flatmap(lambda n: arrays(np.float64, (n, 3), elements=values))


def assert_same(found, expected, largest):
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=0, atol=1e-12 * largest)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=0, atol=1e-12 * expected.count * largest**2)


@settings(deadline=None)
@given(features(100), features(100))
def test_merged_is_the_whole_and_without_undoes_it(x, y):
    a, b, whole = Moments.of(x), Moments.of(y), Moments.of(np.concatenate([x, y]))
    assert_same(a.merged(b), whole, 100)
    assert_same(b.merged(a), whole, 100)
    assert_same(whole.without(b), a, 100)
    assert_same(a.merged(b).without(a), b, 100)


def test_many_batches_far_from_0_merge_to_the_whole():
    x = correlated(700, 5, 1) + 1e6  # where a difference of raw second moments would have no digit left
    merged = Moments.of(x[:7])
    for start in range(7, 700, 7):
        merged = merged.merged(Moments.of(x[start : start + 7]))
    np.testing.assert_allclose(merged.cov, np.cov(x.T), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(merged.without(Moments.of(x[:300])).cov, np.cov(x[300:].T), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_moments_refuse_what_is_not_finite(bad):
    x = correlated(5, 3, 1)
    x[4, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(x)


def test_a_single_image_has_moments_but_no_covariance():
    moments = Moments.of(correlated(1, 3, 1))
    assert np.array_equal(moments.scatter, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        _ = moments.cov


# Kernel distance


def kernel(a, b):
    return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3


def plain_within(a, strata):
    """The mean kernel of two independent images: for each two classes the mean over pairs, weighted by their shares."""
    total, numbers = 0.0, range(len(a))
    for c in set(strata):
        for d in set(strata):
            pairs = [(i, j) for i in numbers for j in numbers if (strata[i], strata[j]) == (c, d) and i != j]
            mean = sum(kernel(a[i], a[j]) for i, j in pairs) / len(pairs)
            total += strata.count(c) * strata.count(d) / len(a) ** 2 * mean
    return total


ONE_CLASS, CLASSES = None, [0, 1, 1, 0, 2, 1, 2]


@pytest.mark.parametrize("of_y", [ONE_CLASS, [*CLASSES, 2, 2]], ids=["y", "y by class"])
@pytest.mark.parametrize("of_x", [ONE_CLASS, CLASSES], ids=["x", "x by class"])
def test_kernel_distance_is_that_of_plain_loops(of_x, of_y):
    x, y = correlated(7, 4, 1), correlated(9, 4, 2)
    found = kernel_distance(x, y, *(None if s is None else np.array(s) for s in (of_x, of_y)))
    between = np.mean([kernel(a, b) for a in x for b in y])
    expected = plain_within(x, of_x or [0] * 7) + plain_within(y, of_y or [0] * 9) - 2 * between
    assert found.value == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_symmetric_and_one_class_is_none():
    x, y = correlated(12, 4, 1), correlated(20, 4, 2)
    assert kernel_distance(x, y) == pytest.approx(kernel_distance(y, x), rel=1e-10)
    one_class = kernel_distance(x, y, np.full(12, 7), np.full(20, 7))
    assert one_class == pytest.approx(kernel_distance(x, y), rel=1e-10)


def test_class_names_do_not_matter():
    x, y, classes = correlated(8, 4, 1), correlated(9, 4, 2), np.array([0, 1, 1, 0, 5, 1, 5, 5])
    named = np.array(["cat", "dog", "dog", "cat", "ant", "dog", "ant", "ant"])
    assert kernel_distance(x, y, named) == pytest.approx(kernel_distance(x, y, classes), rel=1e-10)


FEW = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])  # of three classes, the number of each fixed


def mixture(rng, n, strata=None, shift=0.0):
    """Features (n, 2) of three classes that lie apart, which are independent, or as in `strata`."""
    classes = rng.choice(FEW, n) if strata is None else strata
    return rng.normal(shift, 1, (n, 2)) + 2.0 * np.array([[-1, 0], [1, 0], [0, 1]])[classes]


def mean_and_error(values):
    return np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize(("of_x", "of_y"), [(None, None), (FEW, None), (None, FEW), (FEW, FEW)],
                         ids=["independent", "x by class", "y by class", "both by class"])  # fmt: skip
def test_kernel_distance_is_unbiased(of_x, of_y):
    rng, blind, seeing = np.random.default_rng(0), [], []
    for _ in range(1000):
        x, y = mixture(rng, 9, of_x), mixture(rng, 9, of_y)
        seeing.append(kernel_distance(x, y, of_x, of_y).value)
        blind.append(kernel_distance(x, y).value)
    mean, error = mean_and_error(seeing)
    assert abs(mean) < 3 * error
    if of_x is not None or of_y is not None:  # and it is the argument that makes it so
        mean, error = mean_and_error(blind)
        assert mean < -5 * error


@pytest.mark.parametrize(("of_x", "of_y"), [(None, None), (np.repeat(FEW, 5), None), (np.repeat(FEW, 5), FEW)],
                         ids=["independent", "x by class", "both by class"])  # fmt: skip
def test_the_standard_error_is_the_deviation_over_repeated_draws(of_x, of_y):
    rng = np.random.default_rng(0)
    estimates = [
        kernel_distance(mixture(rng, 45, of_x, shift=1.0), mixture(rng, 9, of_y), of_x, of_y) for _ in range(600)
    ]
    deviation = np.std([estimate.value for estimate in estimates])
    error = math.sqrt(np.mean([estimate.standard_error**2 for estimate in estimates]))
    assert error == pytest.approx(deviation, rel=0.15)


def test_the_standard_error_of_equal_distributions_is_not_below_the_deviation():
    # There the first-order terms vanish; what they are estimated as from finite sets takes the place of the second.
    rng = np.random.default_rng(0)
    estimates = [kernel_distance(mixture(rng, 30), mixture(rng, 30)) for _ in range(600)]
    deviation = np.std([estimate.value for estimate in estimates])
    assert deviation < math.sqrt(np.mean([estimate.standard_error**2 for estimate in estimates])) < 2 * deviation


@pytest.mark.parametrize("of_x", [None, np.arange(23) % 3])
def test_the_kernel_distance_does_not_depend_on_the_parts_it_is_computed_in(of_x, monkeypatch):
    x, y = correlated(23, 4, 1), correlated(10, 4, 2)
    whole = kernel_distance(x, y, of_x)
    monkeypatch.setattr("fpdm.evaluation.metrics.ELEMENTS", 50)
    assert kernel_distance(x, y, of_x) == pytest.approx(whole, rel=1e-12)


def test_a_class_of_one_image_does_not_bias_the_kernel_distance():
    """Ten images of each of three classes far apart, and one of a fourth."""
    classes = np.r_[np.arange(30) % 3, 3]
    means = 2 * np.random.default_rng(5).normal(size=(4, 6))
    rng, found = np.random.default_rng(1), []
    for _ in range(300):
        x, y = (rng.normal(means[classes], 1.0) for _ in range(2))
        found.append(kernel_distance(x, y, classes, classes))
    values = np.array([estimate.value for estimate in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(300)
    assert np.isfinite([estimate.standard_error for estimate in found]).all()


@pytest.mark.parametrize(("n", "m", "classes", "text"), [
    (2, 9, None,         "at least 3 images of each kind, not 2 and 9"),
    (9, 2, None,         "at least 3 images of each kind, not 9 and 2"),
    (4, 9, [0, 1, 2, 3], "at least 2 images of a class"),
])  # fmt: skip
def test_too_few_images_for_a_kernel_distance(n, m, classes, text):
    x, y, strata = correlated(n, 3, 1), correlated(m, 3, 2), None if classes is None else np.array(classes)
    with pytest.raises(ValueError, match=text):
        kernel_distance(x, y, strata)
    if classes is not None:
        with pytest.raises(ValueError, match=text):
            kernel_distance(y, x, None, strata)


# Precision, recall, density, coverage


def plain_manifolds(x, y, k_precision, k_density):
    def radii(a, k):
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(a).kneighbors()[0][:, -1]

    def inside(point, centres, reach):
        return np.array([math.dist(point, centre) <= r for centre, r in zip(centres, reach, strict=True)])

    ball_x, ball_y, wide_y = radii(x, k_precision), radii(y, k_precision), radii(y, k_density)
    return Manifolds(
        precision=np.array([inside(a, y, ball_y).any() for a in x]),
        recall=np.array([inside(b, x, ball_x).any() for b in y]),
        density=np.array([inside(a, y, wide_y).sum() / k_density for a in x]),
        coverage=np.array([any(math.dist(a, b) <= r for a in x) for b, r in zip(y, wide_y, strict=True)]),
        without=np.empty((0, 2)),
    )


def on_a_lattice(n, seed):
    """Whole numbers, exact in whatever order they are summed: many distances are equal, and some images."""
    return np.random.default_rng(seed).integers(0, 4, (n, 3)).astype(np.float64)


SETS = {
    "like sizes": (correlated(40, 3, 1), correlated(40, 3, 2)),
    "more real": (correlated(25, 6, 1), correlated(60, 6, 2)),
    "more generated": (correlated(60, 6, 1), correlated(25, 6, 2)),
    "ties": (on_a_lattice(40, 1), on_a_lattice(50, 2)),
}


@pytest.mark.parametrize(("k_precision", "k_density"), [(3, 5), (1, 1), (6, 2)])
@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
def test_manifolds_are_those_of_plain_loops(sets, k_precision, k_density):
    found = manifolds(*sets, k_precision, k_density)
    expected = plain_manifolds(*sets, k_precision, k_density)
    for name in found._fields[:4]:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_manifolds_on_a_line():
    # Real balls [-1, 1], [0, 2], [1, 5], [-12, 0]; generated balls [-3, 4], [0.5, 7.5], [4, 16].
    x, y = np.array([[0.5], [4], [10]]), np.array([[0.0], [1], [3], [-6]])
    found = manifolds(x, y, k_precision=1, k_density=1)
    assert found.precision.tolist() == [1, 1, 0]
    assert found.recall.tolist() == [1, 1, 1, 0]
    assert found.density.tolist() == [2, 1, 0]
    assert found.coverage.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("repeats", [1, 7])  # 7: each image with copies, so that all radii are 0
def test_a_set_against_itself(repeats):
    x = np.repeat(correlated(35, 5, 1) + 3, repeats, axis=0)
    found = manifolds(x, x[::-1].copy())
    assert found.precision.mean() == found.recall.mean() == found.coverage.mean() == 1
    # A ball holds its centre and the k nearest others; or all copies of it.
    assert found.density.mean() == pytest.approx((6 if repeats == 1 else 7) / 5)


def test_copies_of_real_images_that_are_there_six_times_are_in_all_their_balls():
    # The radii are 0, and so are the distances: rounding must not come between them, whatever the sizes.
    for seed in range(40):
        y = correlated(20 + seed % 13, 64, seed)
        found = manifolds(y[: 6 + seed % 9], np.repeat(y, 6, axis=0))
        assert found.precision.mean() == 1
        assert found.density.mean() == pytest.approx(6 / 5)


def test_sets_far_apart_share_nothing():
    x = correlated(30, 5, 1)
    assert [values.sum() for values in manifolds(x, x + 1000)[:4]] == [0, 0, 0, 0]


def test_generated_images_all_alike_are_precise_and_cover_little():
    y = correlated(200, 3, 1)
    alike = np.tile(y[np.argmin(((y - y.mean(0)) ** 2).sum(1))], (200, 1))
    found = manifolds(alike, y)
    assert found.precision.mean() == 1
    assert found.recall.sum() <= 1  # the real image that they are copies of
    assert found.coverage.mean() < 0.2


def test_recall_is_precision_the_other_way_round():
    x, y = correlated(40, 3, 1), correlated(30, 3, 2)
    there, back = manifolds(x, y), manifolds(y, x)
    np.testing.assert_array_equal(there.precision, back.recall)
    np.testing.assert_array_equal(there.recall, back.precision)
    assert 0 < there.precision.mean() < 1


def test_equal_distributions_have_the_density_and_coverage_of_theory():
    # A ball of the k-th nearest real image holds a given other one, real or generated, with probability k / m: the
    # density is 1. It holds no generated one if the k nearest of all m + n - 1 are real (Naeem et al. 2020, eq. 10).
    rng, n, m, k, found = np.random.default_rng(0), 30, 20, 5, []
    for _ in range(400):
        each = manifolds(rng.normal(size=(n, 3)), rng.normal(size=(m, 3)), k_density=k)
        found.append((each.density.mean(), each.coverage.mean()))
    missed = math.prod((m - i) / (m + n - i) for i in range(1, k + 1))
    for values, expected in zip(np.transpose(found), (1, 1 - missed), strict=True):
        mean, error = mean_and_error(values)
        assert abs(mean - expected) < 3 * error


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
def test_manifolds_do_not_depend_on_the_parts_they_are_computed_in(sets, monkeypatch):
    whole = manifolds(*sets)
    monkeypatch.setattr("fpdm.evaluation.metrics.ELEMENTS", 200)
    for name, values in zip(whole._fields, manifolds(*sets), strict=True):
        np.testing.assert_array_equal(values, getattr(whole, name), err_msg=name)


@pytest.mark.parametrize(("n", "m", "ks"), [(5, 9, (3, 5)), (9, 5, (3, 5)), (9, 6, (6, 5)), (6, 9, (6, 5))])
def test_too_few_images_for_neighbourhoods(n, m, ks):
    with pytest.raises(ValueError, match=f"more than {max(ks)} images of each kind, not {n} and {m}"):
        manifolds(correlated(n, 3, 1), correlated(m, 3, 2), *ks)


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
def test_recall_and_coverage_without_a_group_are_those_of_the_others(sets, monkeypatch):
    x, y = sets
    groups = np.random.default_rng(3).integers(0, 4, len(x))  # of which every k + 12 nearest hold others
    monkeypatch.setattr("fpdm.evaluation.metrics.ELEMENTS", 200)
    found = manifolds(x, y, groups=groups)
    assert [values.tolist() for values in found[:4]] == [values.tolist() for values in manifolds(x, y)[:4]]
    for group, without in enumerate(found.without):
        others = manifolds(x[groups != group], y)
        assert without.tolist() == pytest.approx([others.recall.mean(), others.coverage.mean()], abs=1e-12)


def test_the_errors_of_recall_and_coverage_are_not_below_how_much_they_vary():
    rng = np.random.default_rng(0)
    y, found, errors = rng.normal(size=(400, 8)), [], []
    for _ in range(40):
        each = manifolds(0.8 * rng.normal(size=(400, 8)), y, groups=dealt(400, 25, rng))
        found.append((each.recall.mean(), each.coverage.mean()))
        errors.append([error_without(values) for values in each.without.T])
    ratios = np.sqrt(np.mean(np.square(errors), axis=0)) / np.std(found, axis=0)
    assert (ratios > 0.9).all()
    assert (ratios < 2).all()


def test_just_enough_images_for_neighbourhoods():
    assert [len(values) for values in manifolds(correlated(6, 3, 1), correlated(7, 3, 2))[:4]] == [6, 7, 6, 7]


# Proportions


@pytest.mark.parametrize(("ones", "n"), [(0, 50), (50, 50), (1, 50), (20, 50)])
def test_the_interval_of_a_proportion_is_wilsons(ones, n):
    low, high = proportion_interval(np.arange(n) < ones)
    expected = binomtest(ones, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert low <= ones / n <= high
    assert low < high


# Nearest images


def assert_nearest(found, distances):
    np.testing.assert_array_equal(found[1], distances.argmin(1))
    np.testing.assert_allclose(found[0], distances.min(1), rtol=1e-12)


@pytest.mark.parametrize("rows", [2**20, 200])
def test_the_nearest_is_that_of_plain_loops(rows, monkeypatch):
    monkeypatch.setattr("fpdm.evaluation.metrics.ELEMENTS", rows)
    x, y = correlated(20, 5, 1), correlated(33, 5, 2)
    assert_nearest(nearest(x, y), np.array([[math.dist(a, b) for b in y] for a in x]))


@pytest.mark.parametrize("rows", [2**20, 200])
@pytest.mark.parametrize("n", [33, 20])
def test_no_image_is_its_own_neighbour(n, rows, monkeypatch):
    monkeypatch.setattr("fpdm.evaluation.metrics.ELEMENTS", rows)
    y = correlated(33, 5, 1)
    distances = np.array([[math.inf if i == j else math.dist(y[i], y[j]) for j in range(33)] for i in range(n)])
    assert_nearest(nearest(y[:n], y, skip_own=True), distances)


@pytest.mark.parametrize("offset", [0, 1e4])  # far from 0 the matrix form leaves a distance between copies
def test_a_copy_is_at_distance_0(offset):
    y = correlated(50, 40, 1) + offset
    order = np.random.default_rng(0).permutation(50)
    distances, places = nearest(y[order], y)
    assert (distances == 0).all()
    np.testing.assert_array_equal(places, order)


def test_the_copy_of_an_image_is_another_image():
    y = np.concatenate([correlated(10, 4, 1)] * 2)
    distances, places = nearest(y, y, skip_own=True)
    assert (distances == 0).all()
    np.testing.assert_array_equal(places, np.roll(np.arange(20), 10))


# Intervals


class Recorded:
    """A statistic that keeps the sets that it was asked for, and its values."""

    def __init__(self, statistic):
        self.statistic, self.sets, self.values = statistic, [], []

    def __call__(self, values):
        self.sets.append(values)
        self.values.append(self.statistic(values))
        return self.values[-1]


def interval(statistic, values, seed=0, replicates=200):
    return bootstrap_interval(statistic, values, np.random.default_rng(seed), replicates)


def test_an_interval_is_the_percentiles_of_the_bootstrap():
    statistic = Recorded(lambda values: float((values**3).mean()))  # skewed
    found = interval(statistic, np.random.default_rng(1).exponential(size=40))
    assert len(statistic.values) == 200
    np.testing.assert_allclose(found, np.quantile(statistic.values, [0.025, 0.975]), rtol=1e-12)
    assert all(isinstance(end, float) for end in found)


def test_resamples_are_of_as_many_images_drawn_with_replacement():
    statistic = Recorded(len)
    interval(statistic, np.arange(30))
    assert {len(drawn) for drawn in statistic.sets} == {30}
    distinct = np.mean([len(set(drawn)) for drawn in statistic.sets])
    assert distinct == pytest.approx(30 * (1 - (1 - 1 / 30) ** 30), rel=0.05)
    often = np.bincount(np.concatenate(statistic.sets), minlength=30)
    assert often.min() > 150  # of 200 expected; no image is left out
    assert often.max() < 250


def test_an_interval_is_settled_by_the_generator():
    x = np.random.default_rng(1).normal(size=30)
    assert interval(np.mean, x, seed=5) == interval(np.mean, x, seed=5)
    assert interval(np.mean, x, seed=5) != interval(np.mean, x, seed=6)


def coverage(draw, interval_of, expected, repetitions=150):
    """The share of intervals that hold the expected value, and their mean width."""
    rng, covered, widths = np.random.default_rng(0), 0, []
    for seed in range(repetitions):
        low, high = interval_of(draw(rng), seed)
        covered += low <= expected <= high
        widths.append(high - low)
    return covered / repetitions, np.mean(widths)


def test_intervals_of_a_mean_cover_it():
    share, width = coverage(lambda rng: rng.normal(3, 2, 50), lambda x, seed: interval(np.mean, x, seed), 3)
    assert 0.88 <= share <= 0.99
    assert width == pytest.approx(2 * 1.96 * 2 / math.sqrt(50), rel=0.08)


def jackknifed(distance, groups=25, strata=None):
    """The interval of a Frechet distance as it is printed."""

    def interval_of(x, seed):
        value = distance(Moments.of(x))
        margin = 1.96 * jackknife_error(distance, x, dealt(len(x), groups, np.random.default_rng(seed), strata))
        return value - margin, value + margin

    return interval_of


@pytest.mark.parametrize(("n", "size"), [(40, 3), (100, 8), (30, 40)])  # the last with fewer images than features
@pytest.mark.parametrize("spread", [1.4, 1.0])
def test_intervals_of_a_frechet_distance_cover_what_is_expected_at_this_number(n, size, spread):
    def draw(rng):
        return rng.normal(0.4, spread, (n, size))

    distance, rng = Frechet(centred(np.ones(size))), np.random.default_rng(1)
    many = [distance(Moments.of(draw(rng))) for _ in range(1000)]
    share, width = coverage(draw, jackknifed(distance), np.mean(many))
    assert 0.88 <= share <= 1
    # About as wide as they have to be, and where there are fewer images than features at most twice that.
    assert 0.85 <= width / (2 * 1.96 * np.std(many)) <= (1.5 if n > size else 2)


def test_a_jackknife_of_classes_taken_in_turn_does_not_count_their_number_as_chance():
    classes = np.arange(120) % 4
    means = np.array([[0.0, 0], [6, 0], [0, 6], [6, 6]])

    def draw(rng):
        return rng.normal(means[classes], 1.0)

    distance, rng = Frechet(Moments.of(draw(np.random.default_rng(9)))), np.random.default_rng(1)
    many = [distance(Moments.of(draw(rng))) for _ in range(1000)]
    _, width = coverage(draw, jackknifed(distance, 15, classes), np.mean(many), 40)
    _, blind = coverage(draw, jackknifed(distance, 15), np.mean(many), 40)
    assert width / (2 * 1.96 * np.std(many)) == pytest.approx(1, rel=0.35)
    assert blind > 2 * width


def test_a_jackknife_error_of_a_mean_is_the_usual_one():
    x = np.random.default_rng(1).normal(size=(60, 1))
    error = jackknife_error(lambda moments: float(moments.mean[0]), x, np.arange(60))
    assert error == pytest.approx(x.std(ddof=1) / math.sqrt(60), rel=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=30, max_size=90), st.integers(2, 15))
def test_images_are_dealt_out_evenly_and_so_is_each_class(labels, groups):
    strata = np.array(labels)
    group = dealt(len(labels), groups, np.random.default_rng(0), strata)
    sizes = np.bincount(group, minlength=groups)
    assert sizes.max() - sizes.min() <= 1
    for label in set(labels):
        of_class = np.bincount(group[strata == label], minlength=groups)
        assert of_class.max() - of_class.min() <= 1
    assert not np.array_equal(group, dealt(len(labels), groups, np.random.default_rng(1), strata))
