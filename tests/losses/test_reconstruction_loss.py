"""Stage 1's loss against the paper's formulae, written out in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hieratok.losses.reconstruction import LossConfig, ReconstructionLoss
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.scales import Scales

THREE, ONE = Scales(((1, 1), (2, 2), (4, 4))), Scales(((4, 4),))


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
@pytest.mark.parametrize("pixels", ["scales", "tokens"])
def test_pixel_terms_equal_equations_3_4_8_9(scale_weights, pixels):
    pyramid, images, posterior = example()
    config = LossConfig(
        perceptual_weight=0.0,
        l1_weight=0.7,
        mse_weight=0.3,
        kl_weight=0.01,
        scale_weights=scale_weights,
        pixel_reduction=pixels,
    )
    loss, finest, terms = ReconstructionLoss(config, THREE)(pyramid, images, posterior)

    weights = np.array(scale_weights or (1.0, 1.0, 1.0))
    errors = [x.numpy() - pooled(images.numpy(), x.shape[-1]) for x in pyramid]
    if pixels == "tokens":  # one mean over all pixels, each counting as its scale does
        each = np.concatenate([np.full(e[0].size, w) for e, w in zip(errors, weights)])
        flat = np.concatenate([e.reshape(3, -1) for e in errors], axis=1)
        expected_l1 = np.average(np.abs(flat), axis=1, weights=each).mean()
        expected_mse = np.average(np.square(flat), axis=1, weights=each).mean()
        share = weights[-1] * errors[-1].size / sum(w * e.size for w, e in zip(weights, errors))
    else:
        expected_l1 = np.average([np.abs(e).mean() for e in errors], weights=weights)
        expected_mse = np.average([np.square(e).mean() for e in errors], weights=weights)
        share = weights[-1] / weights.sum()
    m, v = posterior.mean.numpy(), posterior.logvar.numpy()
    kl = sum(0.5 * (mi**2 + math.exp(vi) - 1 - vi) for mi, vi in zip(m.flat, v.flat)) / 3  # summed dims, mean of batch
    assert float(loss) == pytest.approx(0.7 * expected_l1 + 0.3 * expected_mse + share * 0.01 * kl, rel=1e-12)
    own = 0.7 * np.abs(errors[-1]).mean() + 0.3 * np.square(errors[-1]).mean()
    assert float(finest) == pytest.approx(share * own, rel=1e-12)
    for e, side in zip(errors, (4, 8, 16)):
        assert float(terms[f"l1/{side}"]) == pytest.approx(np.abs(e).mean(), rel=1e-12)
        assert float(terms[f"mse/{side}"]) == pytest.approx(np.square(e).mean(), rel=1e-12)
    assert float(terms["l1"]) == pytest.approx(expected_l1, rel=1e-12)
    assert float(terms["kl"]) == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize(
    ("pixels", "perceptual", "ratio"),
    [("scales", "mean", 1), ("tokens", "sum", 21 / 16), ("scales", "finest", 3), ("tokens", "finest", 21 / 16)],
)
def test_weight_of_the_perceptual_term_at_the_finest_scale(pixels, perceptual, ratio):
    """Relative to its pixel terms: what tells the readings of eqs. 8 and 9 apart. 1 + 4 + 16 tokens here."""
    criterion = ReconstructionLoss(
        LossConfig(perceptual_weight=0.0, pixel_reduction=pixels, perceptual_reduction=perceptual), THREE
    )
    assert criterion.perceptual_shares[-1] / criterion.pixel_shares[-1] == pytest.approx(ratio)


@pytest.mark.parametrize("pixels", ["scales", "tokens"])
def test_kl_weighs_the_same_against_the_finest_scale_for_any_number_of_scales(pixels):
    pyramid, images, posterior = example()
    balance = []
    for scales, images_of in ((ONE, pyramid[-1:]), (THREE, pyramid)):
        config = LossConfig(perceptual_weight=0.0, kl_weight=1.0, pixel_reduction=pixels)
        loss, finest, _ = ReconstructionLoss(config, scales)(images_of, images, posterior)
        without, *_ = ReconstructionLoss(replace(config, kl_weight=0.0), scales)(images_of, images, posterior)
        balance.append(float((loss - without) / finest))
    assert balance[0] == pytest.approx(balance[1], rel=1e-9)


def test_perfect_reconstruction_costs_only_kl():
    _, images, posterior = example()
    pyramid = [torch.from_numpy(pooled(images.numpy(), s)) for s in (4, 8, 16)]
    loss, *_ = ReconstructionLoss(LossConfig(perceptual_weight=0.0, kl_weight=1e-6), THREE)(pyramid, images, posterior)
    assert float(loss) == pytest.approx(1e-6 * float(posterior.kl().mean()) / 3, rel=1e-6)


def test_single_scale_is_the_plain_loss():
    pyramid, images, posterior = example((16,))
    loss, *_ = ReconstructionLoss(LossConfig(perceptual_weight=0.0, kl_weight=0.0), ONE)(pyramid, images, posterior)
    error = pyramid[0] - images
    assert float(loss) == pytest.approx(float(error.abs().mean() + 0.4 * error.square().mean()), rel=1e-12)


def test_perceptual_term_by_name_and_scale():
    pyramid, images, posterior = example()
    config = LossConfig(
        trunk="squeeze", random_trunk=True, perceptual_weight=2.0, l1_weight=0, mse_weight=0, kl_weight=0,
        perceptual_reduction="mean",
    )  # fmt: skip
    criterion = ReconstructionLoss(config, THREE)
    pyramid = [x.float().requires_grad_() for x in pyramid]
    loss, _, terms = criterion(pyramid, images.float(), posterior)
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
    criterion = ReconstructionLoss(LossConfig(trunk="squeeze", random_trunk=True), ONE)
    assert not any(p.requires_grad for p in criterion.parameters())


@pytest.mark.parametrize(("reduction", "shares"), [("mean", (1 / 3,) * 3), ("sum", (1, 1, 1)), ("finest", (0, 0, 1))])
def test_reductions_of_the_perceptual_term(reduction, shares):
    pyramid, images, posterior = example()
    config = LossConfig(
        trunk="squeeze", random_trunk=True, l1_weight=0, mse_weight=0, kl_weight=0, perceptual_reduction=reduction
    )
    criterion = ReconstructionLoss(config, THREE)
    assert criterion.perceptual is not None
    loss, finest, terms = criterion([x.float() for x in pyramid], images.float(), posterior)
    values = [
        criterion.perceptual(x.float(), torch.from_numpy(pooled(images.numpy(), x.shape[-1])).float()).mean().item()
        for x in pyramid
    ]
    assert loss.item() == pytest.approx(np.dot(shares, values), rel=1e-5)
    assert finest.item() == pytest.approx(shares[-1] * values[-1], rel=1e-5)
    assert float(terms[criterion.perceptual.name]) == pytest.approx(np.dot(shares, values), rel=1e-5)


@pytest.mark.parametrize("setting", [{"pixel_reduction": "sum"}, {"perceptual_reduction": "tokens"}])
def test_unknown_reductions(setting):
    with pytest.raises(ValueError, match=r"loss\.\w+ must be one of"):
        LossConfig(**setting)


def test_weights_must_match_the_scales():
    with pytest.raises(ValueError, match="scale_weights has 2 entries for 3 scales"):
        ReconstructionLoss(LossConfig(perceptual_weight=0.0, scale_weights=(1.0, 1.0)), THREE)
