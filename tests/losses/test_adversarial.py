"""GAN losses against formulae in float64, discriminators by what a logit may depend on, and what steadies them."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hieratok.losses.adversarial import (
    AdversarialConfig,
    DiffAugment,
    DinoDiscriminator,
    LeCam,
    PatchGAN,
    ResidualDiscriminator,
    SpectralNorm,
    adaptive_weight,
    cutout,
    discriminator_loss,
    generator_loss,
    generator_weight,
    jitter_colour,
    make_discriminator,
    r1_penalty,
    random_crop,
    spectral_norm,
    translate,
)

TINY = {
    "patchgan": AdversarialConfig(width=4),
    "residual": AdversarialConfig(discriminator="residual", width=4),
    # timm's test ViT: 6 blocks, 64 channels, 160 px
    "dino": AdversarialConfig(discriminator="dino", backbone="test_vit", random_backbone=True),
}


def images(count: int = 2, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny(name: str, side: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return make_discriminator(TINY[name], side)


# --- losses -----------------------------------------------------------------------------------------------------------


def logits(seed: int) -> Tensor:
    values = torch.randn(4, 1, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    return values.requires_grad_()


def test_hinge_in_value_and_gradient():
    real, fake = logits(1), logits(2)
    loss = discriminator_loss("hinge", real, fake)
    r, f = real.detach().numpy(), fake.detach().numpy()
    assert loss.item() == pytest.approx(np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean(), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(real.grad, -1.0 * (r < 1) / r.size, atol=1e-15)
    np.testing.assert_allclose(fake.grad, (f > -1) / f.size, atol=1e-15)

    fake = logits(2)
    loss = generator_loss("hinge", fake)
    assert loss.item() == pytest.approx(-f.mean(), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(fake.grad, -np.ones_like(f) / f.size, atol=1e-15)


def test_non_saturating_is_cross_entropy_on_the_right_sides():
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(G))) for D, -log sigmoid(D(G)) for G."""
    real, fake = logits(3), logits(4)
    r, f = real.detach().numpy(), fake.detach().numpy()
    p_real, p_fake = 1 / (1 + np.exp(-r)), 1 / (1 + np.exp(-f))  # probability of "real"
    loss = discriminator_loss("non-saturating", real, fake)
    assert loss.item() == pytest.approx(-np.log(p_real).mean() - np.log(1 - p_fake).mean(), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(real.grad, (p_real - 1) / r.size, rtol=1e-12)
    np.testing.assert_allclose(fake.grad, p_fake / f.size, rtol=1e-12)

    fake = logits(4)
    loss = generator_loss("non-saturating", fake)
    assert loss.item() == pytest.approx(-np.log(p_fake).mean(), rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(fake.grad, (p_fake - 1) / f.size, rtol=1e-12)


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_who_wants_what(kind):
    """Right verdicts cost the discriminator less than wrong ones; a generator gains by looking real."""
    high, low = torch.full((4, 1), 0.9), torch.full((4, 1), -0.9)
    assert discriminator_loss(kind, high, low) < discriminator_loss(kind, low, high)
    assert generator_loss(kind, high) < generator_loss(kind, low)


def test_non_saturating_generator_keeps_its_gradient_where_the_discriminator_is_sure():
    fake = torch.tensor([-30.0], requires_grad=True)
    generator_loss("non-saturating", fake).backward()
    assert fake.grad is not None
    assert fake.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_losses_of_bf16_logits_are_float32(kind):
    real, fake = logits(1).detach().bfloat16(), logits(2).detach().bfloat16()
    for loss, expected in (
        (discriminator_loss(kind, real, fake), discriminator_loss(kind, real.double(), fake.double())),
        (generator_loss(kind, fake), generator_loss(kind, fake.double())),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_unknown_losses():
    with pytest.raises(ValueError, match="no GAN loss is called 'wgan': choose from hinge, non-saturating"):
        discriminator_loss("wgan", logits(0), logits(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no GAN loss is called 'wgan'"):
        generator_loss("wgan", logits(0))  # type: ignore[arg-type]


# --- R1 ---------------------------------------------------------------------------------------------------------------


def test_r1_equals_its_closed_form():
    """D(x) = x.Ax / 2 + b.x in float64: the gradient is Sx + b, S = (A + A') / 2, and the penalty's has a form too."""
    random = np.random.default_rng(0)
    A, b, x = random.normal(size=(12, 12)), random.normal(size=12), random.normal(size=(5, 12))
    matrix, vector = (nn.Parameter(torch.from_numpy(v)) for v in (A, b))

    def quadratic(images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return (flat @ matrix.T * flat).sum(1, keepdim=True) / 2 + flat @ vector[:, None]

    penalty = r1_penalty(quadratic, torch.from_numpy(x).view(5, 3, 2, 2))
    g = x @ (A + A.T) / 2 + b
    assert penalty.dtype == torch.float64
    assert penalty.item() == pytest.approx((g**2).sum(1).mean(), rel=1e-12)
    penalty.backward()
    np.testing.assert_allclose(vector.grad, 2 * g.mean(0), rtol=1e-12)
    products = np.einsum("ni,nj->ij", g, x) / len(x)
    np.testing.assert_allclose(matrix.grad, products + products.T, rtol=1e-12)


def test_r1_of_many_logits_is_that_of_their_mean():
    weight = torch.randn(7, 12, dtype=torch.float64)
    penalty = r1_penalty(lambda x: (x.flatten(1) @ weight.T).view(-1, 1, 7, 1), torch.zeros(2, 3, 2, 2).double())
    assert penalty.item() == pytest.approx(weight.mean(0).square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("network", [PatchGAN(8, width=4, num_layers=1), ResidualDiscriminator(8, width=4)])
def test_r1_equals_finite_differences(network):
    network = network.double()
    x = images(2, 8, seed=3).double()
    shift = 1e-5 * torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)
    with torch.no_grad():
        slopes = [(network(i + shift) - network(i - shift)).flatten(1).mean(1) / 2e-5 for i in x.split(1)]
    expected = torch.stack(slopes).square().sum(1).mean().item()
    assert expected > 0
    assert r1_penalty(network, x).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_r1_is_float32_under_autocast_and_reaches_the_weights(name):
    discriminator, x = tiny(name).train(), images(2)
    expected = r1_penalty(discriminator, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = r1_penalty(discriminator, x)
    assert penalty.dtype == torch.float32
    assert torch.equal(penalty, expected)
    penalty.backward()
    weights = {n: p for n, p in discriminator.named_parameters() if p.ndim > 1}
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights.values())


def test_r1_goes_through_diffaugment():
    discriminator = make_discriminator(AdversarialConfig(width=4, diffaugment=True), 32)
    x = images(2)
    torch.manual_seed(0)
    first = r1_penalty(discriminator, x)
    torch.manual_seed(0)
    assert torch.equal(r1_penalty(discriminator, x), first)
    assert not torch.equal(r1_penalty(discriminator, x), first)
    assert not torch.equal(r1_penalty(discriminator.eval(), x), first)


# --- PatchGAN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_layers", "expected"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_of_a_patch(num_layers, expected):
    torch.manual_seed(0)
    x = images(1, 160).requires_grad_()
    out = PatchGAN(160, width=4, num_layers=num_layers)(x)
    middle = out.shape[-1] // 2
    out[0, 0, middle, middle].backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (expected, expected)


@pytest.mark.parametrize("side", [32, 64, 128, 256])
def test_patchgan_shapes(side):
    out = PatchGAN(side, width=2)(images(1, side))
    assert out.shape == (1, 1, side // 8 - 2, side // 8 - 2)


def test_patchgan_is_the_usual_network():
    """64, 128, 256, 512 channels by convolutions of 4 x 4, and one to a logit, as in pix2pix."""
    widths = [3, 64, 128, 256, 512, 1]
    convolutions = sum(16 * a * b for a, b in itertools.pairwise(widths)) + 64 + 1  # biases of first and last
    norms = 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in PatchGAN(256).parameters()) == convolutions + norms


def test_patchgan_needs_32_px():
    with pytest.raises(ValueError, match=r"gan\.num_layers 3 needs images of 32 px or more, not 16"):
        make_discriminator(AdversarialConfig(), 16)
    with pytest.raises(ValueError, match="needs images of 32 px or more"):
        PatchGAN(32, width=2)(images(1, 16))
    assert make_discriminator(AdversarialConfig(width=2, num_layers=2), 16)(images(1, 16)).shape == (1, 1, 2, 2)


# --- residual ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 32, 64, 96, 128, 256])
def test_residual_gives_one_logit(side):
    discriminator = ResidualDiscriminator(side, width=2)
    assert discriminator(images(2, side)).shape == (2, 1)


def test_residual_sees_the_whole_image():
    x = images(1, 64).requires_grad_()
    torch.manual_seed(0)
    ResidualDiscriminator(64, width=8)(x).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).float().mean() > 0.99


def test_residual_starts_at_a_useful_scale():
    """He initialisation: neither vanishing nor exploding over the depth of a 256 px network."""
    torch.manual_seed(0)
    blobs = nn.functional.interpolate(images(8, 4), (256, 256), mode="bicubic")
    out = ResidualDiscriminator(256, width=8)(blobs)
    assert 0.1 < out.std() < 5


def test_residual_needs_8_px():
    with pytest.raises(ValueError, match="needs images of 8 px or more, not 4"):
        make_discriminator(TINY["residual"], 4)
    with pytest.raises(ValueError, match="needs images of 32 px or more"):
        tiny("residual", 32)(images(1, 16))


# --- DINO -------------------------------------------------------------------------------------------------------------


def test_dino_gives_a_logit_per_token_and_depth():
    discriminator = tiny("dino")
    assert isinstance(discriminator, DinoDiscriminator)
    assert discriminator.depths == [-1, 0, 2, 3, 5]  # before, and at the quarters of 6 blocks
    assert discriminator(images(2, 32)).shape == (2, 5, 100)  # resized to 160 px: 10 x 10 tokens


def test_dino_small_is_tapped_before_its_blocks_and_at_2_5_8_11():
    config = AdversarialConfig(discriminator="dino", random_backbone=True)
    discriminator = make_discriminator(config, 64)
    assert isinstance(discriminator, DinoDiscriminator)
    assert discriminator.depths == [-1, 2, 5, 8, 11]
    assert (discriminator.backbone.width, discriminator.backbone.image_size) == (384, 224)


def head_by_hand(head: nn.Module, x: Tensor) -> Tensor:
    """StyleGAN-T's head with norms over channels, written with indices: (C, N) -> (N,), in float64."""
    weights = {name: getattr(head, name).weight.detach() for name in ("embed", "mix", "head")}
    N = x.shape[1]

    def block(x: Tensor, name: str) -> Tensor:
        layer, norm = getattr(head, name), getattr(head, f"{name}_norm")
        taps = weights[name].shape[2]
        y = torch.zeros(len(x), N, dtype=x.dtype)
        for n in range(N):
            for tap in range(taps):
                y[:, n] += weights[name][:, :, tap] @ x[:, (n + tap - taps // 2) % N]  # round in a circle
        y = y + layer.bias[:, None]
        y = (y - y.mean(0)) / (y.var(0, unbiased=False) + norm.eps).sqrt()
        y = y * norm.weight[:, None] + norm.bias[:, None]
        return torch.where(y > 0, y, 0.2 * y)

    x = block(x, "embed")
    x = (x + block(x, "mix")) / 2**0.5
    return weights["head"][0, :, 0] @ x + head.head.bias  # type: ignore[operator]


def test_dino_equals_the_published_design_by_hand():
    """Tokens of the ViT's own layers, the class token added to each, five heads; float64."""
    discriminator = tiny("dino").double().eval()
    assert isinstance(discriminator, DinoDiscriminator)
    vit = discriminator.backbone._unregistered[0]
    with torch.no_grad():
        for norm in [m for m in discriminator.heads.modules() if isinstance(m, nn.LayerNorm)]:
            norm.weight.normal_()
            norm.bias.normal_()
        x = images(1, 320).double()  # by area: means of 2 x 2
        small = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        mean, std = (torch.tensor(vit.pretrained_cfg[k], dtype=torch.float64).view(3, 1, 1) for k in ("mean", "std"))
        tokens = vit.patch_embed(((small + 1) / 2 - mean) / std).flatten(1, -2)  # (1, 100, C)
        tokens = torch.cat((vit.cls_token, tokens), 1) + vit.pos_embed
        taken = [tokens]
        for i, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if i in (0, 2, 3, 5):
                taken.append(tokens)
        expected = [head_by_hand(h, (t[0, 1:] + t[0, 0]).mT) for h, t in zip(discriminator.heads, taken, strict=True)]
        torch.testing.assert_close(discriminator(x)[0], torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_dino_hears_the_class_token():
    discriminator = tiny("dino").eval()
    assert isinstance(discriminator, DinoDiscriminator)
    x = images(1, 32)
    before = discriminator(x)
    with torch.no_grad():
        discriminator.backbone._unregistered[0].cls_token += torch.randn(64)
    assert ((discriminator(x) - before).abs().amax((0, 2)) > 0.05).all()  # at every depth


def test_dino_cuts_half_of_the_batches_of_larger_images():
    discriminator = tiny("dino").train()
    x = images(1, 200)
    resized = nn.functional.interpolate(x, (160, 160), mode="area")
    torch.manual_seed(0)
    whole = discriminator(resized)
    equal = [torch.equal(discriminator(x), whole) for _ in range(24)]
    assert 4 < sum(equal) < 20
    assert torch.equal(discriminator.eval()(x), whole)
    assert all(torch.equal(discriminator.eval()(x), whole) for _ in range(5))


def test_random_crops_reach_every_place():
    x = torch.arange(5.0)[:, None] * 10 + torch.arange(4.0)
    places = set()
    for seed in range(60):
        torch.manual_seed(seed)
        crop = random_crop(x.expand(2, 3, 5, 4), 3)
        assert crop.shape == (2, 3, 3, 3)
        top, left = divmod(int(crop[0, 0, 0, 0]), 10)
        assert torch.equal(crop[1, 2], x[top : top + 3, left : left + 3])
        places.add((top, left))
    assert places == {(i, j) for i in range(3) for j in range(2)}


def test_dino_backbone_is_frozen_and_not_saved_but_passes_gradients():
    discriminator = tiny("dino")
    network = discriminator.backbone._unregistered[0]
    assert not any(p.requires_grad for p in network.parameters())
    registered = {id(p) for p in [*discriminator.parameters(), *discriminator.buffers()]}
    assert not registered & {id(p) for p in network.parameters()}
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    saved = sum(t.numel() for t in discriminator.state_dict().values())
    assert saved < 5 * (11 * 64 * 64)  # 1 x 1, kernel 9, and less than another 1 x 1 for all vectors

    x = images(2, 32).requires_grad_()
    generator_loss("hinge", discriminator(x)).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())


def test_dino_reloads_without_its_backbone():
    first = tiny("dino")
    torch.manual_seed(1)
    second = make_discriminator(TINY["dino"], 32)
    x = images()
    assert not torch.equal(first.eval()(x), second.eval()(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_dino_without_weights_or_backbone(tmp_path: Path):
    with pytest.raises(ValueError, match=r"gan\.backbone: timm has no model 'test_vitt'; did you mean 'test_vit'"):
        make_discriminator(AdversarialConfig(discriminator="dino", backbone="test_vitt"), 64)
    with pytest.raises(ValueError, match=r"gan\.backbone 'test_vit2' has no class token: choose one that has"):
        make_discriminator(AdversarialConfig(discriminator="dino", backbone="test_vit2", random_backbone=True), 64)
    with pytest.raises(FileNotFoundError, match=r"none\.pth, given as gan\.backbone_weights, does not exist"):
        make_discriminator(AdversarialConfig(discriminator="dino", backbone_weights=str(tmp_path / "none.pth")), 64)


# --- spectral norm ----------------------------------------------------------------------------------------------------


def largest_singular_value(layer: nn.Module) -> float:
    return np.linalg.svd(layer.weight.detach().flatten(1).double().numpy(), compute_uv=False)[0]  # type: ignore[operator]


def test_spectral_norm_is_1_and_follows_the_weight():
    torch.manual_seed(0)
    layer = spectral_norm(nn.Conv1d(16, 16, kernel_size=9))
    assert largest_singular_value(layer) == pytest.approx(1, abs=0.1)  # after 15 iterations
    original = layer.parametrizations.weight.original  # type: ignore[union-attr]
    change = torch.outer(*(nn.functional.normalize(torch.randn(n), dim=0) for n in (16, 144))).view(16, 16, 9)
    for _ in range(60):
        original.data.add_(0.1 * change)
        layer(torch.zeros(1, 16, 9))
    assert largest_singular_value(layer) == pytest.approx(1, abs=1e-4)
    assert np.linalg.svd(original.detach().flatten(1).numpy(), compute_uv=False)[0] > 5
    heads = tiny("dino").heads
    assert all(
        isinstance(layer.parametrizations.weight[0], SpectralNorm)
        for head in heads
        for layer in (head.embed, head.mix, head.head)
    )


def test_spectral_norm_depends_on_updates_not_on_forward_passes():
    """So micro-batches do not count, and a resumed run goes on as an unbroken one does."""
    torch.manual_seed(0)
    layer = spectral_norm(nn.Conv1d(8, 8, kernel_size=3))
    x = torch.randn(1, 8, 12)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), first)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    original = layer.parametrizations.weight.original  # type: ignore[union-attr]
    original.data.add_(0.1 * torch.randn_like(original))
    u = layer.parametrizations.weight[0].u.clone()  # type: ignore[union-attr]
    changed = layer(x)
    assert not torch.equal(u, layer.parametrizations.weight[0].u)  # type: ignore[union-attr]

    torch.manual_seed(7)
    resumed = spectral_norm(nn.Conv1d(8, 8, kernel_size=3))
    resumed.load_state_dict(state)
    assert torch.equal(resumed(x), first)
    resumed.parametrizations.weight.original.data.copy_(original)  # type: ignore[union-attr]
    assert torch.equal(resumed(x), changed)


def test_spectral_norm_s_gradient():
    """d/dW of c . W / sigma(W), with sigma from the exact singular value decomposition."""
    torch.manual_seed(0)
    norm = SpectralNorm(torch.randn(5, 7, dtype=torch.float64))
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, 7, dtype=torch.float64)
    for i in range(500):
        norm(weight.detach() + (1e-12 if i % 2 else 0))
    (norm(weight) * direction).sum().backward()
    ours = weight.grad
    weight.grad = None
    (weight / torch.linalg.svdvals(weight)[0] * direction).sum().backward()
    torch.testing.assert_close(ours, weight.grad, rtol=1e-8, atol=1e-10)


def test_spectral_norm_is_float32_under_autocast():
    torch.manual_seed(0)
    layer = spectral_norm(nn.Conv1d(8, 8, kernel_size=3))
    expected = layer.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, expected)


# --- all discriminators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_logit_depends_on_its_own_image_alone(name):
    """In training mode: no batch statistics, hence no dependence on micro-batches and processes."""
    discriminator = tiny(name).train()
    x = images(3)
    together = discriminator(x)
    for i in range(3):
        torch.testing.assert_close(discriminator(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_learns_to_tell_noise_from_stripes(name):
    discriminator = tiny(name)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 1e-2, (0.5, 0.9))
    stripes = torch.sin(torch.arange(32.0)).expand(4, 3, 32, 32)
    for step in range(12):
        real, fake = images(4, seed=step) * 0.5, stripes * torch.linspace(0.5, 1, 4).view(4, 1, 1, 1)
        real_logits, fake_logits = discriminator(real), discriminator(fake)  # two passes, then one backward pass
        loss = discriminator_loss("hinge", real_logits, fake_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    discriminator.eval()
    assert discriminator(images(4, seed=99) * 0.5).mean() > discriminator(stripes * 0.8).mean() + 0.5


@pytest.mark.parametrize("name", TINY)
def test_discriminators_run_under_bf16(name):
    x = images(1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = generator_loss("hinge", tiny(name)(x))
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("bad", [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 32).byte()])
def test_discriminators_refuse_what_is_no_image(name, bad):
    with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\) float in \[-1, 1\], not \("):
        tiny(name)(bad)


# --- LeCam ------------------------------------------------------------------------------------------------------------


def test_lecam_equals_its_formula():
    lecam = LeCam(decay=0.9)
    generator = np.random.default_rng(0)
    m_real = m_fake = None
    for step in range(5):
        real, fake = generator.normal(1, 2, (4, 3)), generator.normal(-1, 2, (4, 3))
        loss = lecam(torch.from_numpy(real), torch.from_numpy(fake))
        if m_real is None or m_fake is None:
            assert loss == 0  # no averages yet
            m_real, m_fake = real.mean(), fake.mean()
        else:
            expected = np.square(np.maximum(0, real - m_fake)).mean() + np.square(np.maximum(0, m_real - fake)).mean()
            assert loss.item() == pytest.approx(expected, rel=1e-5), step
            m_real, m_fake = 0.9 * m_real + 0.1 * real.mean(), 0.9 * m_fake + 0.1 * fake.mean()
        lecam.update(torch.tensor(real.mean()), torch.tensor(fake.mean()))
    assert LeCam().decay == 0.999


def test_lecam_pulls_logits_together():
    lecam = LeCam()
    lecam.update(torch.tensor(1.0), torch.tensor(-1.0))
    real, fake = torch.tensor([3.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    lecam(real, fake).backward()
    assert (real.grad.item(), fake.grad.item()) == (8.0, -8.0)  # type: ignore[union-attr]  # 2 (3 + 1), -2 (1 + 3)


def test_lecam_resumes():
    lecam = LeCam(0.5)
    for value in (1.0, 2.0, 4.0):
        lecam.update(torch.tensor(value), torch.tensor(-value))
    resumed = LeCam(0.5)
    resumed.load_state_dict({k: v.clone() for k, v in lecam.state_dict().items()})
    for module in (lecam, resumed):
        module.update(torch.tensor(8.0), torch.tensor(1.0))
    assert [t.item() for t in resumed.state_dict().values()] == [t.item() for t in lecam.state_dict().values()]
    assert resumed.real_mean == (((1 + 2) / 2 + 4) / 2 + 8) / 2


def test_lecam_stays_where_a_step_is_skipped():
    lecam = LeCam(0.5)
    lecam.update(torch.tensor(math.nan), torch.tensor(math.inf), skip=torch.tensor(1.0))
    assert lecam.num_updates == 0
    assert lecam(torch.ones(2), torch.ones(2)) == 0
    lecam.update(torch.tensor(2.0), torch.tensor(-2.0), skip=torch.tensor(0.0))
    before = [t.item() for t in lecam.state_dict().values()]
    lecam.update(torch.tensor(math.nan), torch.tensor(math.nan), skip=torch.tensor(1.0))
    assert [t.item() for t in lecam.state_dict().values()] == before == [2.0, -2.0, 1]


LECAM_PROCESS = """
import json, sys, torch, torch.distributed as dist
from hieratok.losses.adversarial import LeCam
dist.init_process_group("gloo", init_method=sys.argv[1], rank=1, world_size=2)
lecam = LeCam()
lecam.update(torch.tensor(2.0), torch.tensor(-3.0))
print(json.dumps([lecam.real_mean.item(), lecam.fake_mean.item()]))
dist.destroy_process_group()
"""


def test_lecam_is_the_same_on_every_process(tmp_path: Path):
    """This process and one more."""
    store = f"file://{tmp_path / 'store'}"
    command = [sys.executable, "-c", LECAM_PROCESS, store]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as other:
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=2)
        try:
            lecam = LeCam()
            lecam.update(torch.tensor(1.0), torch.tensor(0.0))
            theirs = json.loads(other.communicate(timeout=120)[0])
        finally:
            dist.destroy_process_group()
    assert [lecam.real_mean.item(), lecam.fake_mean.item()] == theirs == [1.5, -1.5]


def test_lecam_s_bad_input():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), not 1"):
        LeCam(1.0)
    with pytest.raises(ValueError, match="takes two scalars"):
        LeCam().update(torch.zeros(3), torch.zeros(3))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_generator_weight_is_zero_then_a_ramp():
    config = AdversarialConfig(weight=0.6, generator_start=3, ramp_steps=4)
    assert [generator_weight(step, config) for step in range(9)] == pytest.approx(
        [0, 0, 0, 0.15, 0.3, 0.45, 0.6, 0.6, 0.6]
    )
    at_once = AdversarialConfig(weight=0.6, generator_start=0, ramp_steps=0)
    assert generator_weight(0, at_once) == 0.6
    assert generator_weight(10**6, AdversarialConfig(weight=0.0)) == 0


def losses(scale: float = 1.0) -> tuple[Tensor, Tensor, nn.Parameter, float]:
    """Two losses of one linear layer, and the ratio of their gradients' norms from their closed forms in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (3, 4)))
    target = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(weight.float())
    out = x.float() @ parameter.T
    reconstruction = (out - target.float()).square().mean()
    gan = -scale * out.mean()
    grad_reconstruction = 2 / 15 * (x @ weight.T - target).T @ x
    grad_gan = -scale / 15 * x.sum(0).expand(3, 4)
    ratio = float(grad_reconstruction.norm() / (grad_gan.norm() + 1e-4))
    return reconstruction, gan, parameter, ratio


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    reconstruction, gan, parameter, ratio = losses()
    weight = adaptive_weight(reconstruction, gan, parameter)
    assert weight.item() == pytest.approx(ratio, rel=1e-5)
    assert weight.dtype == torch.float32
    assert not weight.requires_grad
    assert parameter.grad is None
    (reconstruction + weight * gan).backward()  # the graphs are still there
    assert parameter.grad is not None


def test_adaptive_weight_is_bounded():
    reconstruction, gan, parameter, ratio = losses(scale=1e-12)
    assert 1e4 < ratio < 1e5  # held by the 1e-4 in the denominator
    assert adaptive_weight(reconstruction, gan, parameter, max_weight=1e8).item() == pytest.approx(ratio, rel=1e-4)
    assert adaptive_weight(reconstruction, gan, parameter).item() == 1e4


def test_adaptive_weight_is_float32_under_autocast():
    """From bf16 forward passes; computed in bf16 itself it would be off by up to 0.4%, and equal to its rounding."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    x, target = torch.randn(32, 64), torch.randn(32, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        reconstruction, gan = (out.float() - target).square().mean(), generator_loss("non-saturating", out)
        weight = adaptive_weight(reconstruction, gan, layer.weight)
    norms = [torch.autograd.grad(v, layer.weight, retain_graph=True)[0].double().norm() for v in (reconstruction, gan)]
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-5)
    assert weight != weight.bfloat16().float()


def test_adaptive_weight_s_bad_input():
    reconstruction, gan, parameter, _ = losses()
    with pytest.raises(ValueError, match=r"reconstruction_loss must be a scalar, not of shape \(2,\)"):
        adaptive_weight(reconstruction.repeat(2), gan, parameter)
    with pytest.raises(ValueError, match="other_loss does not depend on last_layer"):
        adaptive_weight(reconstruction, nn.Parameter(torch.ones(())) * 2, parameter)
    with pytest.raises(ValueError, match="other_loss does not depend on last_layer"):
        adaptive_weight(reconstruction, torch.ones(()), parameter)


# --- DiffAugment ------------------------------------------------------------------------------------------------------


def test_diffaugment_keeps_the_shape_and_passes_gradients():
    torch.manual_seed(0)
    x = images(4, 40).requires_grad_()
    out = DiffAugment()(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_diffaugment_is_off_in_evaluation_and_by_default():
    x = images()
    assert torch.equal(DiffAugment().eval()(x), x)
    assert isinstance(make_discriminator(TINY["patchgan"], 32), PatchGAN)
    augmenting = make_discriminator(AdversarialConfig(width=4, diffaugment=True), 32)
    assert not torch.equal(augmenting(x), augmenting(x))
    augmenting.eval()
    assert torch.equal(augmenting(x), augmenting(x))


def test_diffaugment_draws_anew_and_repeats_under_a_seed():
    x = images(1).expand(4, 3, 32, 32)
    augment = DiffAugment()
    torch.manual_seed(5)
    first, second = augment(x), augment(x)
    torch.manual_seed(5)
    assert torch.equal(augment(x), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])  # each image has its own


def test_colours_move_within_their_ranges():
    torch.manual_seed(0)
    x = images(64, 8).double()
    out = jitter_colour(x)
    grey, grey_out = x.mean(1), out.mean(1)
    shift = out.mean((1, 2, 3)) - x.mean((1, 2, 3))
    assert shift.abs().max() <= 0.5
    assert shift.abs().max() > 0.3
    contrast = grey_out.std((1, 2)) / grey.std((1, 2))
    assert contrast.min() >= 0.5
    assert contrast.max() <= 1.5
    colour, colour_out = x - grey[:, None], out - grey_out[:, None]
    saturation = colour_out.flatten(1).norm(dim=1) / colour.flatten(1).norm(dim=1) / contrast
    assert saturation.min() >= 0
    assert 1.5 < saturation.max() <= 2
    for i in range(3):  # an affine map of each image's colours, the same everywhere
        fit = np.linalg.lstsq(np.c_[x[i].flatten(1).T, np.ones(64)], out[i].flatten(1).T, rcond=None)
        assert fit[1].sum() < 1e-20


def test_translation_moves_by_up_to_an_eighth_and_fills_with_grey():
    torch.manual_seed(0)
    x = images(40, 32) + 3  # no zeros inside
    out = translate(x)
    shifts = set()
    for before, after in zip(x, out):
        inside = (after != 0).all(0)
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        top, left = int(rows[0]) or int(rows[-1]) - 31, int(columns[0]) or int(columns[-1]) - 31
        shifts |= {top, left}
        expected = torch.zeros_like(before)
        source = before[:, max(0, -top) : 32 - max(0, top), max(0, -left) : 32 - max(0, left)]
        expected[:, max(0, top) : 32 + min(0, top), max(0, left) : 32 + min(0, left)] = source
        assert torch.equal(after, expected)
    assert shifts == set(range(-4, 5))


@pytest.mark.parametrize(("share", "height", "width"), [(0.5, 8, 12), (0.2, 3, 5)])
def test_cutout_takes_its_share_of_each_side_or_less_at_the_border(share, height, width):
    torch.manual_seed(0)
    x = torch.ones(300, 3, 16, 24)
    out = cutout(x, share)
    hole = out[:, 0] == 0
    assert torch.equal(out == 0, hole[:, None].expand_as(out))
    heights, widths = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), heights * widths)  # a rectangle
    assert (heights.max(), widths.max()) == (height, width)
    assert heights.min() == (height + 1) // 2  # centred on an edge, half of it lies outside
    assert torch.equal(out[~hole[:, None].expand_as(out)].unique(), torch.ones(1))


def test_dino_cuts_out_less():
    """A fifth of the side, as StyleGAN-T; half elsewhere, as DiffAugment's authors."""
    for name, side in (("patchgan", 16), ("dino", 6)):
        augment = make_discriminator(replace(TINY[name], diffaugment=True), 32)[0]  # type: ignore[index]
        torch.manual_seed(0)
        holes = (augment(torch.full((200, 3, 32, 32), 9.0)) == 0).all(1)
        inside = holes[:, 4:-4, 4:-4]  # beyond what translation fills
        assert inside.any(2).sum(1).max() == side


def test_diffaugment_refuses_what_is_no_image():
    with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\)"):
        DiffAugment()(torch.zeros(3, 32, 32))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_paper_s():
    config = AdversarialConfig()
    assert (config.weight, config.betas, config.warmup_ratio) == (0.6, (0.9, 0.95), 0.01)
    assert config.loss == "non-saturating"  # StyleGAN's
    assert (config.adaptive, config.diffaugment, config.lecam_weight, config.r1_weight) == (False, False, 0.0, 0.0)
    assert config.r1_interval == 16  # StyleGAN2's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -0.1}, "gan.weight must not be negative, it is -0.1"),
        ({"weight": math.nan}, "gan.weight must not be negative, it is nan"),
        ({"lecam_weight": -1.0}, "gan.lecam_weight must not be negative"),
        ({"r1_weight": -1.0}, "gan.r1_weight must not be negative"),
        ({"r1_interval": 0}, "gan.r1_interval must be at least 1, not 0"),
        ({"generator_start": -1}, "gan.generator_start must not be negative"),
        ({"ramp_steps": -1}, "gan.ramp_steps must not be negative"),
        ({"weight_decay": -1.0}, "gan.weight_decay must not be negative"),
        ({"discriminator_min_learning_rate": -1.0}, "gan.discriminator_min_learning_rate must not be negative"),
        ({"discriminator_learning_rate": 0.0}, "gan.discriminator_learning_rate must be positive, not 0.0"),
        ({"width": 0}, "gan.width must be at least 1, not 0"),
        ({"num_layers": 0}, "gan.num_layers must be at least 1"),
        ({"warmup_ratio": 1.0}, r"gan.warmup_ratio must be in \[0, 1\), not 1.0"),
        ({"betas": (0.9, 1.0)}, r"gan.betas must be two numbers in \[0, 1\), not \[0.9, 1.0\]"),
        ({"betas": (0.9,)}, "gan.betas must be two numbers"),
        ({"discriminator": "biggan"}, "gan.discriminator must be one of patchgan, residual, dino, not 'biggan'"),
        ({"loss": "wgan"}, "gan.loss must be one of hinge, non-saturating, not 'wgan'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**settings)
