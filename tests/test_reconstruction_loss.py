"""Stage 1's loss against the paper's formulae, written out in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hieratok.losses.reconstruction import LossConfig, ReconstructionLoss
from hieratok.tokenizer.posterior import DiagonalGaussian


def pooled(image: np.ndarray, side: int) -> np.ndarray:
    """T_k by block means: (B, 3, H, W) -> (B, 3, side, side) for integer ratios."""
    B, C, H, W = image.shape
    return image.reshape(B, C, side, H // side, side, W // side).mean((3, 5))


def example(sides=(4, 8, 16)) -> tuple[list[Tensor], Tensor, DiagonalGaussian]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    pyramid = [torch.rand(3, 3, s, s, generator=generator, dtype=torch.float64) * 2 - 1 for s in sides]
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    return pyramid, images, DiagonalGaussian(mean, logvar)


@pytest.mark.parametrize("scale_weights", [None, (0.0, 1.0, 3.0)])
def test_equals_equations_3_4_8_9(scale_weights):
    pyramid, images, posterior = example()
    config = LossConfig(
        perceptual_weight=0.0, l1_weight=0.7, mse_weight=0.3, kl_weight=0.01, scale_weights=scale_weights
    )
    loss, terms = ReconstructionLoss(config, 3)(pyramid, images, posterior)

    weights = np.array(scale_weights or (1.0, 1.0, 1.0))
    weights /= weights.sum()
    errors = [x.numpy() - pooled(images.numpy(), x.shape[-1]) for x in pyramid]
    l1 = [np.abs(e).mean() for e in errors]
    mse = [np.square(e).mean() for e in errors]
    m, v = posterior.mean.numpy(), posterior.logvar.numpy()
    kl = sum(0.5 * (mi**2 + math.exp(vi) - 1 - vi) for mi, vi in zip(m.flat, v.flat)) / 3  # summed dims, mean of batch
    expected = 0.7 * weights @ l1 + 0.3 * weights @ mse + 0.01 * kl
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    for i, side in enumerate((4, 8, 16)):
        assert float(terms[f"l1/{side}"]) == pytest.approx(l1[i], rel=1e-12)
        assert float(terms[f"mse/{side}"]) == pytest.approx(mse[i], rel=1e-12)
    assert float(terms["l1"]) == pytest.approx(weights @ l1, rel=1e-12)
    assert float(terms["kl"]) == pytest.approx(kl, rel=1e-12)


def test_perfect_reconstruction_costs_only_kl():
    _, images, posterior = example()
    pyramid = [torch.from_numpy(pooled(images.numpy(), s)) for s in (4, 8, 16)]
    loss, _ = ReconstructionLoss(LossConfig(perceptual_weight=0.0, kl_weight=1e-6), 3)(pyramid, images, posterior)
    assert float(loss) == pytest.approx(1e-6 * float(posterior.kl().mean()), abs=1e-9)


def test_single_scale_is_the_plain_loss():
    pyramid, images, posterior = example((16,))
    loss, _ = ReconstructionLoss(LossConfig(perceptual_weight=0.0, kl_weight=0.0), 1)(pyramid, images, posterior)
    error = pyramid[0] - images
    assert float(loss) == pytest.approx(float(error.abs().mean() + 0.4 * error.square().mean()), rel=1e-12)


def test_perceptual_term_by_name_and_scale():
    pyramid, images, posterior = example()
    config = LossConfig(
        trunk="squeeze", random_trunk=True, perceptual_weight=2.0, l1_weight=0, mse_weight=0, kl_weight=0
    )
    criterion = ReconstructionLoss(config, 3)
    pyramid = [x.float().requires_grad_() for x in pyramid]
    loss, terms = criterion(pyramid, images.float(), posterior)
    assert criterion.perceptual is not None
    name = criterion.perceptual.name
    assert "lpips" not in name  # random weights may not be called LPIPS
    expected = []
    for x in pyramid:
        target = torch.from_numpy(pooled(images.numpy(), x.shape[-1])).float()
        expected.append(criterion.perceptual(x, target).mean().item())
    assert [float(terms[f"{name}/{s}"]) for s in (4, 8, 16)] == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(2.0 * np.mean(expected), rel=1e-5)
    loss.backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in pyramid)


def test_nothing_of_the_trunk_is_trained_or_saved_with_a_model():
    criterion = ReconstructionLoss(LossConfig(trunk="squeeze", random_trunk=True), 1)
    assert not any(p.requires_grad for p in criterion.parameters())


def test_weights_must_match_the_scales():
    with pytest.raises(ValueError, match="scale_weights has 2 entries for 3 scales"):
        ReconstructionLoss(LossConfig(perceptual_weight=0.0, scale_weights=(1.0, 1.0)), 3)
