"""Statistics and distances between sets of features: known answers, independent computations, torch-fidelity."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hieratok.evaluation.distribution import frechet_distance, inception_score, kernel_distance, precision_recall
from hieratok.evaluation.statistics import Moments, Statistics


def normal(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def collect(features: Tensor, batch_size: int = 64, processes: int = 1) -> Statistics:
    """Statistics by way of several `Moments`, fed in turn and then merged."""
    parts = [Moments() for _ in range(processes)]
    for part, batch in zip(itertools.cycle(parts), features.split(batch_size)):
        part.update(batch)
    for other in parts[1:]:
        parts[0].merge_state(other.state())
    return parts[0].statistics()


# --- Moments -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 80),
    d=st.integers(1, 12),
    batch_size=st.sampled_from([1, 7, 64]),
    processes=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    mean=st.sampled_from([0.0, 1e4]),
)
def test_moments_equal_numpy(n: int, d: int, batch_size: int, processes: int, dtype: torch.dtype, mean: float) -> None:
    x = normal(n, d, dtype=dtype) + mean
    statistics = collect(x, batch_size, processes)
    assert statistics.n == n
    assert (statistics.centred is not None) == (n <= d)
    np.testing.assert_allclose(statistics.mu, x.double().mean(0), rtol=1e-12)
    sigma = np.cov(x.double().numpy(), rowvar=False).reshape(d, d)
    np.testing.assert_allclose(statistics.sigma(), sigma, rtol=1e-9, atol=1e-9)
    assert statistics.total_variance() == pytest.approx(np.trace(sigma), rel=1e-9)


def test_moments_refuse_bad_features() -> None:
    moments = Moments()
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        moments.statistics()
    for bad in (normal(3, 2)[0], normal(3, 2).int(), normal(0, 2)):
        with pytest.raises(ValueError, match="must be"):
            moments.update(bad)
    bad = normal(3, 2)
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError, match="image 1 are not finite"):
        moments.update(bad)
    moments.update(normal(1, 2))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.statistics()
    with pytest.raises(ValueError, match="3 dimensions, those before had 2"):
        moments.update(normal(1, 3))


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    moments = Moments()
    for seed in range(50):
        moments.update(normal(10, 6, seed))
    assert sum(map(len, moments.waiting)) <= 6


# --- Frechet distance ----------------------------------------------------------------------------------------------


def gaussian(mu: np.ndarray, sigma: np.ndarray) -> Statistics:
    return Statistics(torch.from_numpy(mu), None, covariance=torch.from_numpy(sigma))


def test_frechet_known_answers() -> None:
    random = np.random.default_rng(0)
    a, b = random.random(5), random.random(5)
    root = random.random((5, 5))
    sigma = root @ root.T
    mu = random.random(5)
    # Equal covariances leave the means; diagonal ones add the squared differences of the deviations.
    assert frechet_distance(gaussian(mu, sigma), gaussian(mu + a, sigma)) == pytest.approx(a @ a, abs=1e-9)
    expected = a @ a + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(gaussian(mu, np.diag(a)), gaussian(mu + a, np.diag(b))) == pytest.approx(expected)
    # Singular ones too.
    zero = np.zeros(5)
    assert frechet_distance(gaussian(mu, np.diag(zero)), gaussian(mu, np.diag(b))) == pytest.approx(b.sum())


@settings(max_examples=25, deadline=None)
@given(n=st.integers(3, 30), m=st.integers(3, 30), d=st.integers(1, 16), seed=st.integers(0, 99))
def test_frechet_equals_scipy_whichever_way_it_is_computed(n: int, m: int, d: int, seed: int) -> None:
    x, y = normal(n, d, seed, torch.float64), 0.5 * normal(m, d, seed + 1, torch.float64) + 1
    a, b = collect(x), collect(y)
    # The trace of the root in terms that exist for singular covariances: eigenvalues of the product.
    eigenvalues = scipy.linalg.eigvals(np.cov(x.T).reshape(d, d) @ np.cov(y.T).reshape(d, d))
    root = np.sqrt(np.maximum(eigenvalues.real, 0)).sum()
    means = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = means + a.total_variance() + b.total_variance() - 2 * root
    dense = [Statistics(s.mu, s.n, covariance=s.sigma()) for s in (a, b)]
    for one, other in ((a, b), (dense[0], b), (a, dense[1]), (dense[0], dense[1]), (b, a)):
        assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_frechet_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    for n, d in ((100, 16), (20, 48)):
        x, y = normal(n, d).exp(), normal(n + 7, d, 1).exp()
        theirs = fid_statistics_to_metric(*(fid_features_to_statistics(z.double()) for z in (x, y)), False)
        assert frechet_distance(collect(x), collect(y)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("d", [16, 300])
def test_frechet_does_not_depend_on_batches_order_and_processes(d: int) -> None:
    x, y = normal(200, d), normal(150, d, 1) + 0.1
    expected = frechet_distance(collect(x), collect(y))
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(2))]
    for batch_size, processes in itertools.product((1, 7, 64), (1, 2)):
        assert frechet_distance(collect(shuffled, batch_size, processes), collect(y)) == pytest.approx(
            expected, rel=1e-12, abs=1e-12
        )


def test_distance_of_a_set_from_itself_is_not_clamped() -> None:
    a = collect(normal(50, 8))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    # KID is unbiased: on half the draws of one distribution it is negative.
    values = [kernel_distance(normal(40, 8, 2 * i), normal(40, 8, 2 * i + 1)) for i in range(20)]
    assert min(values) < 0 < max(values)


def test_dimensions_must_agree() -> None:
    x, y = normal(10, 4), normal(10, 5)
    for metric, a, b in (
        (frechet_distance, collect(x), collect(y)),
        (kernel_distance, x, y),
        (precision_recall, x, y),
    ):
        with pytest.raises(ValueError, match="4 and 5 dimensions"):
            metric(a, b)


# --- KID, Inception Score, precision and recall --------------------------------------------------------------------


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    x, y = normal(12, 5, 0, torch.float64), normal(12, 5, 1, torch.float64) + 0.3

    def kernel(a: Tensor, b: Tensor) -> float:
        return (sum(float(i) * float(j) for i, j in zip(a, b)) / 5 + 1) ** 3

    pairs = list(itertools.permutations(range(12), 2))
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs) / len(pairs)
    across = sum(kernel(a, b) for a in x for b in y) / 144
    assert kernel_distance(x, y) == pytest.approx(within - 2 * across, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (60, 40), (70, 65)])
def test_kernel_distance_equals_torch_fidelity(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    monkeypatch.setattr("hieratok.evaluation.distribution.KID_SUBSET_SIZE", 50)
    x, y = normal(n, 6, 0), normal(m, 6, 1) + 0.5
    theirs = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=100, kid_subset_size=min(n, m, 50), rng_seed=2020, verbose=False
    )
    assert kernel_distance(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_inception_score_known_answers() -> None:
    assert inception_score(torch.zeros(40, 8)) == pytest.approx(1)
    balanced = 100 * torch.eye(8).repeat(50, 1)
    assert inception_score(balanced) == pytest.approx(8)  # one-hot: as many as there are classes
    # Two splits of the permutation, each of half of the classes.
    order = torch.from_numpy(np.random.RandomState(2020).permutation(10_000))
    logits = torch.empty(10_000, 8)
    logits[order] = 100 * torch.eye(8).repeat_interleave(1250, 0)
    assert inception_score(logits) == pytest.approx(4)


def test_inception_score_equals_independent_computation_and_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    for n, splits in ((137, 1), (5_000, 1), (10_000, 2), (12_345, None)):
        logits = 3 * normal(n, 9)
        p = np.exp(logits.double().numpy())
        p /= p.sum(1, keepdims=True)
        p = p[np.random.RandomState(2020).permutation(n)]
        scores = []
        for start in range(0, n, 5_000):  # as ADM: 12,345 = 5,000 + 5,000 + 2,345, all of one weight
            part = p[start : start + 5_000]
            scores.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(0)), 1))))
        assert inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-12)
        if splits:  # torch-fidelity's are all of one size
            theirs = isc_features_to_metric(logits, splits=splits)["inception_score_mean"]
            assert inception_score(logits) == pytest.approx(theirs, rel=1e-12)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        inception_score(logits[:1])


def naive_precision(samples: Tensor, reference: Tensor) -> float:
    inside = 0
    radii = [sorted(torch.linalg.vector_norm(r - s).item() for s in reference)[3] for r in reference]
    for sample in samples:
        distances = [torch.linalg.vector_norm(sample - r).item() for r in reference]
        inside += any(d <= radius for d, radius in zip(distances, radii))
    return inside / len(samples)


def test_precision_and_recall_equal_their_definition_and_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = normal(40, 3, 0, torch.float64), 0.4 * normal(50, 3, 1, torch.float64) + 0.8
    precision, recall = precision_recall(x, y)
    assert precision == naive_precision(x, y)
    assert recall == naive_precision(y, x)
    assert 0.2 < precision < 0.8
    theirs = prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_precision_and_recall_known_answers() -> None:
    x = normal(30, 4) + 100
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    copies = x[:1].repeat(30, 1)  # balls without radius still hold their own centre
    assert precision_recall(copies, copies.flip(0)) == (1, 1)
    # Samples inside a small part of the reference: precise, without coverage.
    precision, recall = precision_recall(0.01 * normal(30, 4, 1) + 100, x)
    assert precision == 1
    assert recall < 0.2
    with pytest.raises(ValueError, match="at least 4 images in each set, got 3 and 30"):
        precision_recall(x[:3], x)


def test_precision_and_recall_do_not_depend_on_blocks() -> None:
    from hieratok.evaluation.distribution import _share_inside

    x, y = normal(70, 3, 0, torch.float64), normal(70, 3, 1, torch.float64) + 1
    assert len({_share_inside(x, y, block) for block in (1, 7, 64, 1000)}) == 1


@pytest.mark.parametrize("metric", [kernel_distance, precision_recall])
def test_sets_with_bad_features_are_refused(metric) -> None:
    x = normal(10, 3)
    bad = x.clone()
    bad[4, 1] = torch.inf
    with pytest.raises(ValueError, match="image 4 are not finite"):
        metric(x, bad)
    with pytest.raises(ValueError, match="must be"):
        metric(x.int(), x)
    with pytest.raises(ValueError, match="at least"):
        metric(x[:1], x)
