"""Distances between two sets of images: Frechet, kernel (KID), precision and recall; and the Inception Score.

Functions take features or statistics, not images or networks, and compute in float64. Nothing is clamped: a distance
estimated from samples may be a little below zero.
"""

import math

import numpy as np
import torch
from torch import Tensor

from hieratok.evaluation.features import FeatureNetwork
from hieratok.evaluation.statistics import (
    REFERENCE_FEATURES,
    SEED,
    SetStatistics,
    Statistics,
    check_features,
    float64,
)

IS_SPLIT_SIZE = 5000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3  # k of precision and recall

# Definitions for the manifest.
DISTRIBUTION_PROTOCOL = {
    "frechet": "float64, covariance with ddof 1",
    "kernel": f"polynomial degree 3, gamma 1/d, coef 1, unbiased, {KID_SUBSETS} subsets of at most {KID_SUBSET_SIZE}",
    "inception score": f"mean over splits of {IS_SPLIT_SIZE} images of a seeded permutation, the last of what is left",
    "precision and recall": f"k = {NEIGHBOURS}, all samples against at most {REFERENCE_FEATURES} reference images",
    "seed": SEED,
}


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance of two Gaussians: |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    FID is this distance of the Inception network's features (Heusel et al. 2017). Raises ValueError where the
    statistics have different dimensions.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"statistics of {len(a.mu)} and {len(b.mu)} dimensions cannot be compared")
    means = (a.mu - b.mu).square().sum().item()
    return means + a.total_variance() + b.total_variance() - 2 * _trace_of_root(a, b)


def _trace_of_root(a: Statistics, b: Statistics) -> float:
    """tr((S_a S_b)^(1/2)): the sum of the singular values of F_a F_b', where S = F' F."""
    if a.centred is not None and b.centred is not None:
        # F = centred / sqrt(n - 1): the cross-Gram is n_a x n_b, smaller than D x D, and no eigenvalue is lost to
        # the rounding of a square root of zero.
        singular = torch.linalg.svdvals(a.centred @ b.centred.T)
        return singular.sum().item() / math.sqrt((len(a.centred) - 1) * (len(b.centred) - 1))
    if b.centred is not None:
        a, b = b, a
    if a.centred is not None:
        factor = a.centred / math.sqrt(len(a.centred) - 1)
    else:
        values, vectors = torch.linalg.eigh(a.sigma())
        factor = (vectors * values.clamp(min=0).sqrt()).T  # rounding can make a zero eigenvalue negative
    return torch.linalg.eigvalsh(factor @ b.sigma() @ factor.T).clamp(min=0).sqrt().sum().item()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, unbiased, averaged over seeded subsets.

    KID is this distance of the Inception network's features (Binkowski et al. 2018). 100 subsets of 1000 images, or of
    as many as the smaller set has. The subsets depend on the order of the rows, so keep it fixed.

    Args: features (n_x, D), (n_y, D). Raises ValueError below two images and for bad features.
    """
    _check_two_sets(x, y, at_least=2, what="the kernel distance")
    x, y = float64(x), float64(y)
    size = min(KID_SUBSET_SIZE, len(x), len(y))
    random = np.random.RandomState(SEED)
    values = []
    # If both sets are as small as a subset, all subsets are equal.
    for _ in range(1 if size == len(x) == len(y) else KID_SUBSETS):
        a = x[random.choice(len(x), size, replace=False)]
        b = y[random.choice(len(y), size, replace=False)]
        aa, bb, ab = _kernel(a, a), _kernel(b, b), _kernel(a, b)
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (size * (size - 1))
        values.append((within - 2 * ab.mean()).item())
    return math.fsum(values) / len(values)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    k = a @ b.T / a.shape[1] + 1
    return k * k * k


def inception_score(logits: Tensor) -> float:
    """exp(E_x KL(p(y|x) | p(y))), averaged over splits of 5,000 images (Salimans et al. 2016).

    Splits as in ADM's evaluator: the last has the rest, and below 5,000 images there is only one. ADM keeps the images'
    order; here a seeded permutation is used, as samples may be sorted by class. The score rises with the size of a
    split: scores of few images cannot be compared with those of 50,000.

    Args: logits (n, classes) of images in a defined order; n at least 2. Raises ValueError for fewer or bad logits.
    """
    check_features(logits, "logits")
    if len(logits) < 2:
        raise ValueError(f"the Inception Score needs at least 2 images, got {len(logits)}")
    order = torch.from_numpy(np.random.RandomState(SEED).permutation(len(logits)))
    log_p = float64(logits.cpu()[order]).log_softmax(1)
    scores = []
    for split in log_p.split(IS_SPLIT_SIZE):
        log_mean = split.logsumexp(0) - math.log(len(split))
        scores.append((split.exp() * (split - log_mean)).sum(1).mean().exp().item())
    return math.fsum(scores) / len(scores)


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), k = 3.

    Precision: the share of samples inside the ball of any reference image, whose radius reaches its third nearest
    neighbour among the reference; recall: the same with the sets exchanged.

    Args: features (n, D), (m, D), at least 4 each. Raises ValueError for fewer and for bad features.
    """
    _check_two_sets(samples, reference, at_least=NEIGHBOURS + 1, what="precision and recall")
    samples, reference = float64(samples), float64(reference)
    return _share_inside(samples, reference), _share_inside(reference, samples)


def _share_inside(points: Tensor, balls: Tensor, block: int = 2048) -> float:
    radii = torch.cat([_squared_distances(rows, balls).kthvalue(NEIGHBOURS + 1).values for rows in balls.split(block)])
    inside = [(_squared_distances(rows, balls) <= radii).any(1) for rows in points.split(block)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m); exactly 0 if below rounding errors, so that two copies of an image have distance 0."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = squares - 2 * x @ y.T
    return torch.where(distances > 1e-13 * squares, distances, 0)


def _check_two_sets(x: Tensor, y: Tensor, at_least: int, what: str) -> None:
    check_features(x)
    check_features(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")
    if min(len(x), len(y)) < at_least:
        raise ValueError(f"{what} needs at least {at_least} images in each set, got {len(x)} and {len(y)}")


def distances(samples: SetStatistics, reference: SetStatistics, network: FeatureNetwork) -> dict[str, float]:
    """Every metric that the two sets' statistics allow, named after the network.

    The Frechet distance always; sFID where the network has spatial features; the Inception Score where it has classes
    and the samples' features were kept; KID, precision and recall where those of both sets were. Precision and recall
    need 4 images in each set.

    Raises ValueError for statistics of two networks or image sizes.
    """
    for key, value in network.description().items():
        for side in (samples, reference):
            if side.network[key] != value:
                raise ValueError(f"statistics of another network: {key} is {side.network[key]!r}, not {value!r}")
    if samples.size and reference.size and samples.size != reference.size:
        raise ValueError(f"images of {samples.size} pixels cannot be compared with a reference of {reference.size}")
    result = {network.key("fid"): frechet_distance(samples.pool, reference.pool)}
    if samples.spatial is not None and reference.spatial is not None:
        result[network.key("sfid")] = frechet_distance(samples.spatial, reference.spatial)
    if samples.features is None:
        return result
    if network.class_weights is not None:
        result[network.key("is")] = inception_score(samples.features @ network.class_weights.cpu().T)
    if reference.features is not None:
        result[network.key("kid")] = kernel_distance(samples.features, reference.features)
        if min(len(samples.features), len(reference.features)) > NEIGHBOURS:
            result["precision"], result["recall"] = precision_recall(samples.features, reference.features)
    return result
