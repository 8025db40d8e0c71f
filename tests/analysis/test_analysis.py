"""The analysis' measures: known answers, properties, and what each refuses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import fft, stats
from torch import Tensor, nn

import hieratok
from hieratok.analysis.channels import (
    channel_kl,
    channel_moments,
    correlation,
    effective_rank,
    participation_ratio,
    standardize,
)
from hieratok.analysis.codec import Codec, codec_of, encode_all
from hieratok.analysis.commutation import commutation, commutation_error, equivariance, pyramid_commutation, target_mse
from hieratok.analysis.density import (
    MIN_POINTS,
    Embedding,
    draw_points,
    embed,
    evenness,
    gaussian_points,
    kernel_density,
    measure_density,
)
from hieratok.analysis.intervals import Quantity, columns_to_json, summarize, summarize_columns, to_json
from hieratok.analysis.robustness import noise_psnr
from hieratok.analysis.spectrum import block_dct, dct_profile, high_frequency_share, power_slope, radial_power, zigzag
from hieratok.tokenizer.model import HieraTok, TokenizerConfig
from hieratok.tokenizer.scales import area_pool

SMALL = TokenizerConfig(
    image_size=16, patch_size=4, latent_channels=4, scales=(1, 2, 4), encoder_width=16, encoder_depth=1,
    encoder_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2,
)  # fmt: skip


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_codec(f: int = 4, d: int = 6) -> Codec:
    """Every patch's mean colour, times a matrix; decoding fills each patch with one colour: both know no position."""
    matrix = random(d, 3)

    def encode(images: Tensor) -> tuple[Tensor, None]:
        return torch.einsum("dc,bchw->bdhw", matrix.to(images), F.avg_pool2d(images, f)), None

    def decode(z: Tensor) -> Tensor:
        colours = torch.einsum("cd,bdhw->bchw", torch.linalg.pinv(matrix).to(z), z)
        return colours.repeat_interleave(f, -2).repeat_interleave(f, -1)

    return Codec(encode, decode)


# --- density ----------------------------------------------------------------------------------------------------------


def gini_by_pairs(x: np.ndarray) -> float:
    """Mean absolute difference of all pairs over twice the mean: the coefficient's definition."""
    return float(np.abs(x[:, None] - x[None, :]).mean() / (2 * x.mean()))


def test_evenness_against_the_definitions():
    rho = np.random.default_rng(0).exponential(size=257)
    metrics = evenness(rho)
    assert metrics.density_cv == pytest.approx(stats.variation(rho), rel=1e-12)
    assert metrics.gini == pytest.approx(gini_by_pairs(rho), rel=1e-12)
    assert metrics.normalized_entropy == pytest.approx(stats.entropy(rho) / math.log(257), abs=1e-6)


def test_equal_densities_are_even_and_scale_does_not_matter():
    assert evenness(np.full(50, 0.3)) == pytest.approx((0, 0, 1), abs=1e-8)
    rho = np.random.default_rng(1).random(40)
    assert evenness(1000 * rho) == pytest.approx(evenness(rho), rel=1e-9)
    one = evenness([0.0] * 99 + [1.0])  # all of it in one place
    assert one == pytest.approx((math.sqrt(99), 0.99, 0), abs=1e-8)


@pytest.mark.parametrize("bad", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_evenness_refuses(bad):
    with pytest.raises(ValueError, match="densities must be"):
        evenness(bad)


def test_kernel_density_is_the_sum_of_gaussians_with_scotts_bandwidth():
    points = np.random.default_rng(0).normal(size=(60, 2)) @ [[2.0, 0.3], [0.0, 0.5]]
    covariance = np.cov(points.T) * 60 ** (-2 / 6)
    direct = [stats.multivariate_normal(p, covariance).pdf(points) for p in points]
    assert kernel_density(points) == pytest.approx(np.mean(direct, 0), rel=1e-9)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((10, 3)), "must have shape"),
        (np.zeros((2, 2)), "too few"),
        (np.array([[0, 1], [1, np.nan], [2, 2], [0, 0]]), "NaN"),
        (np.arange(10.0)[:, None].repeat(2, 1), "on one line"),
    ],
)
def test_kernel_density_refuses(points, message):
    with pytest.raises(ValueError, match=message):
        kernel_density(points)


def test_the_published_embedding_gives_its_numbers(shared):
    metrics = evenness(kernel_density(np.load(shared / "data" / "vavae-latents-f16d32-tsne.npy")))
    assert metrics == pytest.approx((0.26453, 0.14743, 0.99582), abs=1e-5)


@pytest.mark.slow
def test_the_published_latents_give_its_numbers_loosely(shared):
    """t-SNE differs between versions and machines; two minutes."""
    metrics = measure_density([np.load(shared / "data" / "vavae-latents-f16d32.npy")], 1).mean
    assert metrics == pytest.approx((0.26453, 0.14743, 0.99582), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "expected"), [(16, (0.3412, 0.1915, 0.9927)), (32, (0.4197, 0.2407, 0.9892))])
def test_the_gaussian_floor(d, expected):
    metrics = measure_density([gaussian_points(10_000, d, 0, 0)], 1).mean
    assert metrics == pytest.approx(expected, rel=0.05)


def test_embedding_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    centres = np.repeat([[0.0] * 8, [30.0] * 8], 60, axis=0)
    plane = embed(centres + rng.normal(size=centres.shape))
    assert plane.shape == (120, 2)
    distances = np.linalg.norm(plane[:, None] - plane[None, :], axis=-1)
    np.fill_diagonal(distances, np.inf)
    same = np.arange(120) // 60
    assert (same[distances.argmin(1)] == same).all()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((200, 4)), "all points are the same"),
        (np.zeros((MIN_POINTS - 1, 4)), f"at least {MIN_POINTS}"),
        (np.zeros((200, 1)), "at least 2 channels"),
        (np.zeros((200, 4, 4)), "must|takes"),
        (np.where(np.eye(200, 4) > 0, np.nan, 0), "NaN"),
    ],
)
def test_embedding_refuses(points, message):
    with pytest.raises(ValueError, match=message):
        embed(points)


def test_density_is_averaged_over_draws():
    sets = [gaussian_points(MIN_POINTS, 4, 0, i) for i in range(2)]
    report = measure_density(sets, 2)
    single = [measure_density([points], 1) for points in sets]
    assert all(one.std is None and one.draws == 1 for one in single)
    values = np.array([one.mean for one in single])
    assert report.mean == pytest.approx(values.mean(0), rel=1e-6)
    assert report.std == pytest.approx(np.abs(values[0] - values[1]) / math.sqrt(2), rel=1e-6)
    assert np.array_equal(report.embedding, single[0].embedding)
    with pytest.raises(ValueError, match="no points"):
        measure_density([], 0)


def test_points_are_one_position_of_each_image_drawn_without_replacement():
    n, h, w = 500, 3, 5
    image, row, column = np.meshgrid(np.arange(n), np.arange(h), np.arange(w), indexing="ij")
    latents = np.stack([image, row, column], 1).astype(np.float32)
    points = draw_points(latents, n, 0, 0)
    assert (points[:, 0] == np.arange(n)).all()
    counts = np.zeros((h, w))
    np.add.at(counts, tuple(points[:, 1:].astype(int).T), 1)
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3
    assert not np.array_equal(points, draw_points(latents, n, 0, 1))
    assert not np.array_equal(points, draw_points(latents, n, 1, 0))
    assert np.array_equal(points, draw_points(latents, n, 0, 0))
    some = draw_points(latents, 100, 0, 0)[:, 0]
    assert len(set(some)) == 100
    assert some.max() > 300  # of all images, not the first

    both = draw_points(latents, n, 0, 0, mirrored=-latents - 1)
    flipped = both[:, 0] < 0
    assert 0.4 < flipped.mean() < 0.6
    assert np.array_equal(np.where(flipped[:, None], -both - 1, both), points)


def test_an_embedding_is_read_back(tmp_path):
    points, density = random(7, 2).numpy(), random(7).abs().numpy()
    Embedding(points, density, np.arange(7)).save(tmp_path / "labelled.npz")
    Embedding(points, density).save(tmp_path / "plain.npz")
    labelled, plain = (Embedding.load(tmp_path / f"{name}.npz") for name in ("labelled", "plain"))
    assert np.array_equal(labelled.points, points)
    assert np.array_equal(plain.density, density)
    assert labelled.labels is not None
    assert labelled.labels.tolist() == list(range(7))
    assert plain.labels is not None
    assert set(plain.labels.tolist()) == {-1}
    np.savez(tmp_path / "other.npz", points=points)
    with pytest.raises(ValueError, match=r"other\.npz holds no embedding"):
        Embedding.load(tmp_path / "other.npz")


# --- commutation and equivariance -------------------------------------------------------------------------------------


def test_a_linear_decoder_commutes_with_area_pooling():
    codec, images = linear_codec(f=1, d=2), random(3, 3, 16, 12)  # two channels cannot hold three colours
    z = codec.encode(images)[0]
    errors = commutation(codec.decode, z, images, [(1, 1), (4, 3), (12, 9)])
    assert [name.key for name in errors] == [
        f"commutation_{what}/{px}px" for what in ("error", "target_mse") for px in (1, 4, 12)
    ]
    for grid in ((1, 1), (4, 3), (12, 9)):
        assert (errors[Quantity("commutation_error", f"{grid[0]}px")] < 1e-25).all()
        lost = area_pool(images - codec.decode(z), grid).square().mean((1, 2, 3))
        assert (lost > 1e-4).all()
        assert torch.allclose(errors[Quantity("commutation_target_mse", f"{grid[0]}px")], lost)


def test_commutation_error_by_hand():
    full = torch.ones(1, 3, 4, 4, dtype=torch.float64)
    full[:, :, :2] = 3.0  # pooled to 2 x 2: 3, 3, 1, 1 of each colour
    coarse = torch.full((1, 3, 2, 2), 2.0, dtype=torch.float64)
    assert commutation_error(coarse, full).item() == pytest.approx(4 / 20)
    assert commutation_error(coarse * 0, full).item() == pytest.approx(1)
    assert target_mse(coarse, full).item() == pytest.approx(1)


def test_a_bad_reconstruction_commutes_and_is_found_out():
    def grey(z: Tensor) -> Tensor:
        return torch.full((len(z), 3, 4 * z.shape[2], 4 * z.shape[3]), 0.5, dtype=z.dtype)

    images = random(2, 3, 16, 16)
    errors = commutation(grey, random(2, 4, 4, 4), images, [(2, 2)])
    assert errors[Quantity("commutation_error", "8px")].tolist() == [0, 0]
    assert (errors[Quantity("commutation_target_mse", "8px")] > 0.1).all()


def test_a_pyramid_of_pooled_images_commutes():
    images = random(2, 3, 16, 16)
    errors = pyramid_commutation(lambda z: [area_pool(images, (s, s)) for s in (4, 8, 16)], images, images)
    assert [name.key for name in errors] == [
        f"pyramid_{what}/{px}px" for what in ("error", "target_mse") for px in (4, 8)
    ]
    assert all((error == 0).all() for error in errors.values())
    off = pyramid_commutation(lambda z: [1.1 * area_pool(images, (8, 8)), images], images, images)
    assert off[Quantity("pyramid_error", "8px")].tolist() == pytest.approx([0.01] * 2)


def test_an_equivariant_map_has_no_equivariance_error():
    images = F.interpolate(random(2, 3, 8, 8), scale_factor=4)  # one colour in every patch: reconstructed exactly
    codec = linear_codec()
    z = codec.encode(images)[0]
    errors = equivariance(codec.encode, codec.decode, z, images, torch.ones(6))
    assert {name.key for name in errors} == {"reconstruction_rms"} | {
        f"equivariance_{part}/{tau}"
        for part in ("decoder", "encoder")
        for tau in ("rotate_90", "rotate_180", "scale_half")
    }
    for name, error in errors.items():
        if name.key != "equivariance_decoder/scale_half":  # halved, a patch has two by two colours
            assert (error < 1e-12).all(), name


def test_equivariance_is_lost_by_a_map_that_knows_positions():
    images = F.interpolate(random(2, 3, 8, 8), scale_factor=4)
    codec = linear_codec()
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64)

    def encode(x: Tensor) -> tuple[Tensor, None]:
        z = codec.encode(x)[0]
        return z + 2 * ramp[: z.shape[-1]], None  # only a column's place is added

    z = encode(images)[0]
    std = torch.full((6,), 4.0)
    errors = equivariance(encode, codec.decode, z, images, std)
    # turned by 180 degrees the ramp runs the other way: 2 (ramp - (1 - ramp)), over 4
    expected = ((2 * (2 * ramp - 1) / 4).square().mean()).sqrt()
    assert errors[Quantity("equivariance_encoder", "rotate_180")].tolist() == pytest.approx([float(expected)] * 2)
    assert (errors[Quantity("equivariance_decoder", "rotate_90")] > 0.01).all()


def test_halving_is_left_out_for_odd_grids():
    images, codec = random(1, 3, 12, 12), linear_codec()
    errors = equivariance(codec.encode, codec.decode, codec.encode(images)[0], images, torch.ones(6))
    assert not any("scale_half" in name.key for name in errors)


# --- spectra ----------------------------------------------------------------------------------------------------------


def test_block_dct_against_scipy():
    x = random(2, 3, 17, 24)  # the last row belongs to no whole block
    coefficients = block_dct(x)
    assert coefficients.shape == (2, 3, 6, 64)
    block = fft.dctn(x[1, 2, 8:16, 16:24].numpy(), norm="ortho")
    u, v = zip(*zigzag())
    assert coefficients[1, 2, 5].numpy() == pytest.approx(block[list(u), list(v)])


def test_zigzag_is_jpegs():
    order = list(zigzag())
    assert order[:10] == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
    assert order[-3:] == [(7, 6), (6, 7), (7, 7)] or order[-3:] == [(6, 7), (7, 6), (7, 7)]
    steps = np.abs(np.diff(order, axis=0)).max(1)
    assert (steps == 1).all()  # from each place to one beside it
    assert sorted(order) == [(u, v) for u in range(8) for v in range(8)]


@pytest.mark.parametrize(("u", "v", "share"), [(0, 3, 0), (3, 4, 0), (4, 4, 1), (7, 2, 1)])
def test_the_cosine_transform_of_a_cosine_is_one_number(u, v, share):
    place = (torch.arange(16, dtype=torch.float64) % 8 + 0.5) * math.pi / 8
    x = 2 + (torch.cos(u * place)[:, None] * torch.cos(v * place)).expand(1, 2, 16, 16)
    profile = dct_profile(x)[0]
    at = zigzag().index((u, v))
    norm = (math.sqrt(0.5) if u == 0 else 1) * (math.sqrt(0.5) if v == 0 else 1)
    assert profile[0] == 1
    assert profile[at] == pytest.approx(1 / (4 * norm))  # DC is 2 x 8; a cosine of amplitude 1 has 4, or 4 sqrt(2)
    profile[[0, at]] = 0
    assert profile.abs().max() < 1e-12
    assert high_frequency_share(x).item() == pytest.approx(share)


def test_the_power_of_a_cosine_is_at_its_frequency():
    x = torch.cos(2 * math.pi * 5 / 32 * torch.arange(32, dtype=torch.float64)).expand(1, 1, 24, 32)[..., :24, :]
    x = x.transpose(2, 3)[..., :32, :24]  # 32 x 24, 5 periods downwards
    square = torch.cos(2 * math.pi * 5 / 32 * torch.arange(32, dtype=torch.float64))[:, None].expand(1, 3, 32, 32)
    frequencies, power = radial_power(square)
    assert frequencies.tolist() == list(range(1, 17))
    assert power[0].argmax() == 4
    power[0, 4] = 0
    assert power.abs().max() < 1e-20
    frequencies, power = radial_power(x)  # in cycles per 24, the smaller side
    assert frequencies[power[0].argmax()] == round(5 / 32 * 24)


def test_white_noise_has_a_flat_spectrum():
    x = random(64, 16, 32, 32)
    assert power_slope(x).mean().item() == pytest.approx(0, abs=0.03)
    assert high_frequency_share(x).mean().item() == pytest.approx(28 / 63, abs=0.005)
    assert (dct_profile(x).mean(0) - 1).abs().max() < 0.03


def test_the_slope_is_the_exponent_of_the_power_law():
    fy, fx = torch.fft.fftfreq(64, dtype=torch.float64) * 64, torch.fft.rfftfreq(64, dtype=torch.float64) * 64
    radius = torch.hypot(fy[:, None], fx[None, :]).round().clamp(min=1)
    phase = torch.fft.rfft2(random(8, 1, 64, 64))
    x = torch.fft.irfft2(phase / phase.abs() / radius, s=(64, 64))  # amplitude 1 / f: power f^-2
    assert power_slope(x).tolist() == pytest.approx([-2] * 8, abs=1e-6)


@pytest.mark.parametrize("measure", [block_dct, power_slope])
def test_small_maps_are_refused(measure):
    with pytest.raises(ValueError, match="needs maps of at least"):
        measure(random(1, 1, 5, 16))


# --- channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eigenvalues", "rank", "ratio"),
    [
        ([2.0] * 5, 5, 5),
        ([3.0, 0, 0, 0], 1, 1),
        ([1.0, 1, 0, 0], 2, 2),
        ([3.0, 1], 4 / 3**0.75, 16 / 10),
    ],
)
def test_rank_of_a_known_covariance(eigenvalues, rank, ratio):
    q = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues)))[0]
    covariance = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    assert effective_rank(covariance) == pytest.approx(rank)
    assert participation_ratio(covariance) == pytest.approx(ratio)


def test_rank_of_constant_latents_is_refused():
    with pytest.raises(ValueError, match="constant"):
        effective_rank(torch.zeros(3, 3, dtype=torch.float64))


def test_moments_and_standardising():
    latents = (5 + random(300, 3, 4, 2) @ random(2, 2, seed=1)).float()  # more images than one part
    latents[:, 1] = 7.0
    mean, covariance = channel_moments(latents)
    table = latents.double().permute(1, 0, 2, 3).reshape(3, -1).numpy()
    assert mean.numpy() == pytest.approx(table.mean(1))
    assert covariance.numpy() == pytest.approx(np.cov(table, ddof=0), abs=1e-9)
    standard = standardize(latents, mean, covariance.diagonal().sqrt())
    assert (standard[:, 1] == 0).all()
    new_mean, new_covariance = channel_moments(standard)
    assert new_mean.abs().max() < 1e-6
    assert torch.allclose(new_covariance, correlation(covariance), atol=1e-5)
    assert torch.allclose(new_covariance.diagonal(), torch.tensor([1.0, 0, 1], dtype=torch.float64), atol=1e-5)
    with pytest.raises(ValueError, match="3 channels cannot be standardised with statistics of 2"):
        standardize(latents, torch.zeros(2), torch.ones(2))


def test_kl_is_torchs():
    mean, logvar = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((2, 3))
    assert torch.allclose(channel_kl(mean, logvar), expected)
    assert (channel_kl(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)) == 0).all()


# --- noise and intervals ----------------------------------------------------------------------------------------------


def test_psnr_under_noise_is_that_of_the_noise():
    images = 0.2 * random(2, 3, 64, 64).clamp(-2, 2)
    std = torch.tensor([0.5, 1.0, 2.0])
    result = noise_psnr(lambda z: z, images, images, random(2, 3, 64, 64, seed=1), std, sigmas=(0.0, 0.05, 0.1))
    assert [name.key for name in result] == ["noise_psnr/0", "noise_psnr/0.05", "noise_psnr/0.1"]
    assert result[Quantity("noise_psnr", 0.0)].isinf().all()
    for sigma in (0.05, 0.1):
        variance = sigma**2 * float(std.square().mean())
        expected = 10 * math.log10(4 / variance)  # pixels run from -1 to 1
        assert result[Quantity("noise_psnr", sigma)].tolist() == pytest.approx([expected] * 2, abs=0.1)


def test_noise_that_breaks_the_decoder_is_not_hidden():
    with pytest.raises(ValueError, match="NaN"):
        noise_psnr(lambda z: z * math.nan, random(2, 3, 4, 4), random(2, 3, 4, 4), random(2, 3, 4, 4), torch.ones(3))


def test_summaries_are_scipys_intervals():
    values = random(20)
    interval = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    assert to_json({Quantity("x", "16px"): summarize(values)}) == pytest.approx(
        {"x/16px": float(values.mean()), "x_low/16px": interval.low, "x_high/16px": interval.high}
    )
    table = columns_to_json("x", summarize_columns(torch.stack([values, 2 * values], 1)))
    assert table["x_high"] == pytest.approx([interval.high, 2 * interval.high])
    infinite = summarize(torch.cat([values, torch.tensor([math.inf])]))
    assert infinite.mean == pytest.approx(float(values.mean()))
    assert summarize(torch.tensor([math.inf] * 2)).mean == math.inf
    assert math.isnan(summarize(torch.cat([values, torch.tensor([math.nan])])).mean)
    low = summarize(torch.tensor([1.0])).low
    assert low is not None
    assert math.isnan(low)


# --- codecs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()  # with gradients the down-sampler computes otherwise, up to rounding
def test_codec_of_this_package():
    torch.manual_seed(0)
    model = HieraTok(SMALL).eval()
    codec, images = codec_of(model), random(2, 3, 16, 16, dtype=torch.float32)
    mean, logvar = codec.encode(images)
    assert torch.equal(mean, model.encode(images).mean)
    assert logvar is not None
    assert torch.equal(logvar, model.encode(images).logvar)
    assert torch.equal(codec.decode(mean), model.decode(mean))
    assert codec.decode_pyramid is not None
    assert [x.shape[-1] for x in codec.decode_pyramid(mean)] == [4, 8, 16]
    assert not mean.requires_grad


class _Diffusers(nn.Module):
    """The shape of what diffusers' autoencoders return."""

    def __init__(self, attribute: str):
        super().__init__()
        self.attribute = attribute
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def encode(self, images: Tensor):
        assert images.dtype == torch.bfloat16
        return type("Output", (), {self.attribute: images[:, :, ::2, ::2]})

    def decode(self, z: Tensor):
        return type("Output", (), {"sample": z.repeat_interleave(2, -1).repeat_interleave(2, -2)})


@pytest.mark.parametrize("attribute", ["latent", "latents"])
def test_codec_of_deterministic_autoencoders(attribute):
    codec = codec_of(_Diffusers(attribute))
    images = torch.ones(1, 3, 4, 4)
    z, logvar = codec.encode(images)
    assert logvar is None
    assert z.dtype == torch.float32
    assert torch.equal(codec.decode(z), images)
    assert codec.decode_pyramid is None


def test_codec_of_diffusers_autoencoder():
    kl = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl", exc_type=ImportError)
    torch.manual_seed(0)
    model = kl.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    codec, images = codec_of(model), random(2, 3, 16, 16, dtype=torch.float32)
    mean, logvar = codec.encode(images)
    posterior = model.encode(images).latent_dist
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(logvar, posterior.logvar)
    assert torch.equal(codec.decode(mean), model.decode(mean).sample)


def batches(*sizes: int):
    for i, size in enumerate(sizes):
        yield [f"{i}-{j}.png" for j in range(size)], torch.full((size, 3, 4, 4), 100 * i, dtype=torch.uint8)


def test_latents_are_collected_in_order():
    latents = encode_all(lambda x: (x[:, :2], -x[:, :2]), batches(3, 1))
    assert latents.mean.shape == (4, 2, 4, 4)
    assert latents.logvar is not None
    assert torch.equal(latents.logvar, -latents.mean)
    assert latents.mean[:, 0, 0, 0].tolist() == pytest.approx([-1, -1, -1, 100 / 127.5 - 1])
    noise = (latents.sample(3) - latents.mean) / torch.exp(0.5 * latents.logvar)
    assert noise.mean().abs() < 0.3
    assert noise.std() == pytest.approx(1, abs=0.2)
    assert torch.equal(latents.sample(3), latents.sample(3))
    assert not torch.equal(latents.sample(3), latents.sample(4))
    plain = encode_all(lambda x: (x, None), batches(2))
    assert plain.logvar is None
    assert plain.sample(0) is plain.mean


def broken(x: Tensor) -> tuple[Tensor, None]:
    x = x.clone()
    x[-1, 0, 0, 0] = math.inf
    return x, None


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (broken, "0-1.png: its latents hold NaN or infinite values"),
        (lambda x: (x.flatten(1), None), r"0-0.png: latents must have shape \(2, d, h, w\), not \(2, 48\)"),
        (lambda x: (x[:1], None), r"0-0.png: latents must have shape"),
        (lambda x: (x, x[:, :1]), r"latents are \(1, 4, 4\) where \(3, 4, 4\) is expected"),
        (lambda x: (x[:, : 1 + int(x.max() > -0.9)], None), r"1-0.png: latents are \(2, 4, 4\) where \(1, 4, 4\)"),
    ],
)
def test_bad_latents_are_refused(encode, message):
    with pytest.raises(ValueError, match=message):
        encode_all(encode, batches(2, 2))


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        encode_all(lambda x: (x, None), [])


def test_nothing_that_trains_or_judges_depends_on_the_analysis():
    package = Path(hieratok.__file__).parent
    for folder in ("tokenizer", "losses", "data", "training", "evaluation"):
        for path in (package / folder).glob("*.py"):
            assert "hieratok.analy" not in path.read_text(), path
