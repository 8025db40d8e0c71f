"""Pixel metrics against scikit-image, and the promises of PixelMetrics: order, batches and processes change nothing."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hieratok.evaluation.pixels import PixelMetrics, psnr, ssim

# scikit-image's options for the SSIM of Wang et al. 2004.
WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}


def pair(num: int = 5, height: int = 32, width: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with flat areas (where SSIM's variances cancel) and noisy copies of them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8, generator=generator)
    images[:, :, : height // 2] = images[:, :, :1, :1]
    noise = 12 * torch.randn(images.shape, generator=generator)
    return images, (images + noise).round().clamp(0, 255).to(torch.uint8)


class L1:
    """A perceptual distance for the tests."""

    name = "l1"

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert images.min() >= -1
        assert images.max() <= 1
        return (images - targets).abs().flatten(1).mean(1)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(11, 40), width=st.integers(11, 40), seed=st.integers(0, 100))
def test_psnr_and_ssim_equal_scikit_image(height: int, width: int, seed: int) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x, y = pair(2, height, width, seed)
    for i in range(len(x)):
        a, b = x[i].permute(1, 2, 0).numpy(), y[i].permute(1, 2, 0).numpy()
        assert psnr(y, x)[i] == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-12)
        assert ssim(y, x)[i] == pytest.approx(structural_similarity(a, b, data_range=255, **WANG), abs=1e-10)


def test_ssim_of_photos_equals_scikit_image_and_not_its_variants() -> None:
    from skimage.data import astronaut
    from skimage.metrics import structural_similarity

    a = astronaut()[:256, :256]
    b = np.clip(a + np.random.default_rng(0).normal(0, 15, a.shape), 0, 255).round().astype(np.uint8)
    ours = ssim(*(torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None] for x in (b, a))).item()
    assert ours == pytest.approx(structural_similarity(a, b, data_range=255, **WANG), abs=1e-10)
    assert abs(ours - structural_similarity(a, b, data_range=510, **WANG)) > 0.05
    assert abs(ours - structural_similarity(a, b, data_range=255, channel_axis=-1)) > 0.001


def test_psnr_known_answers() -> None:
    zeros = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(zeros + 255, zeros).item() == 0
    assert psnr(zeros + 1, zeros).item() == pytest.approx(20 * math.log10(255))
    assert psnr(zeros, zeros).item() == math.inf
    assert ssim(*(torch.full((1, 3, 16, 16), 7, dtype=torch.uint8),) * 2).item() == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(num=st.integers(1, 70), batch_size=st.sampled_from([1, 7, 64]), seed=st.integers(0, 9))
def test_batches_order_and_processes_change_nothing(num: int, batch_size: int, seed: int) -> None:
    x, y = pair(num, 12, 13)
    names = [f"{i:03}" for i in range(num)]
    whole = PixelMetrics([L1()])
    whole.update(x, y, names)

    order = list(range(num))
    random.Random(seed).shuffle(order)
    parts = PixelMetrics([L1()]), PixelMetrics([L1()])
    for number, start in enumerate(range(0, num, batch_size)):
        indices = order[start : start + batch_size]
        parts[number % 2].update(x[indices], y[indices], [names[i] for i in indices])
    parts[0].merge(parts[1])
    assert parts[0].rows == whole.rows
    assert parts[0].compute() == whole.compute()
    assert whole.compute()["psnr"] == pytest.approx(psnr(y, x).mean().item())


def test_identical_images_are_counted_apart() -> None:
    x, y = pair(4)
    y[1] = x[1]
    metrics = PixelMetrics()
    metrics.update(x, y, list("abcd"))
    result = metrics.compute()
    assert result["psnr_identical"] == 1
    assert result["n"] == 4
    assert result["psnr"] == pytest.approx(psnr(y, x)[[0, 2, 3]].mean().item())
    assert metrics.ranked("psnr")[0] == "b"
    assert metrics.ranked("ssim")[0] == "b"

    same = PixelMetrics()
    same.update(x, x, list("abcd"))
    assert same.compute()["psnr"] == math.inf
    assert same.compute()["psnr_identical"] == 4


def test_ranked_runs_from_best_to_worst() -> None:
    x, _ = pair(3)
    y = x.clone()
    y[0, :, :8] //= 2
    y[2, :, :8] //= 4
    metrics = PixelMetrics([L1()])
    metrics.update(x, y, list("abc"))
    for metric in ("psnr", "ssim", "l1"):
        assert metrics.ranked(metric) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("images", "references", "message"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), "uint8"),
        (np.zeros((1, 3, 16, 16), np.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "ndarray"),
        (torch.zeros(1, 1, 16, 16, dtype=torch.uint8),) * 2 + ("shape",),
        (torch.zeros(3, 16, 16, dtype=torch.uint8),) * 2 + ("shape",),
        (torch.zeros(0, 3, 16, 16, dtype=torch.uint8),) * 2 + ("shape",),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 17, dtype=torch.uint8), "differ"),
    ],
)
def test_bad_images_are_refused(images: torch.Tensor, references: torch.Tensor, message: str) -> None:
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=message):
            metric(images, references)


def test_bad_updates_are_refused_and_leave_nothing_behind() -> None:
    class Broken:
        name = "broken"

        def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images),), math.nan)

    x, y = pair(2)
    metrics = PixelMetrics()
    with pytest.raises(ValueError, match="no images"):
        metrics.compute()
    with pytest.raises(ValueError, match="1 names for 2 images"):
        metrics.update(x, y, ["a"])
    with pytest.raises(ValueError, match="a: this name stands twice"):
        metrics.update(x, y, ["a", "a"])
    assert not metrics.rows
    metrics.update(x, y, ["a", "b"])
    with pytest.raises(ValueError, match="b: this image was already counted"):
        metrics.update(x, y, ["c", "b"])
    assert metrics.compute()["n"] == 2
    with pytest.raises(ValueError, match="a: broken is nan"):
        PixelMetrics([Broken()]).update(x, y, ["a", "b"])
    with pytest.raises(ValueError, match="different names"):
        PixelMetrics([Broken(), Broken()])
    with pytest.raises(ValueError, match="at least 11 x 11"):
        PixelMetrics().update(*pair(2, 8, 8), ["a", "b"])
    PixelMetrics(ssim=False).update(*pair(2, 8, 8), ["a", "b"])
