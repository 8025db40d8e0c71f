"""The model: properties, an independent float64 reading of the decoder, and the paper's facts."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hieratok import HieraTok, TokenizerConfig
from hieratok.tokenizer.downsample import AreaDownsample, ConvDownsample, SmallMapConv2d, strides
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.scales import Scales, area_pool

SIDES = (1, 2, 4, 8)
MODES = ("full", "independent", "causal")
SCALE_LISTS = ((16,), (1, 2, 4, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8, 12, 16))


def small_config(**changes) -> TokenizerConfig:
    settings = dict(
        image_size=32,
        patch_size=4,
        latent_channels=6,
        scales=SIDES,
        encoder_width=32,
        encoder_depth=2,
        encoder_heads=2,
        decoder_width=48,
        decoder_depth=3,
        decoder_heads=3,
    )
    return TokenizerConfig(**{**settings, **changes})


def small_model(seed: int = 0, **changes) -> HieraTok:
    """In evaluation mode, with weights large enough that every path matters."""
    torch.manual_seed(seed)
    model = HieraTok(small_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# --- an independent reading of the decoder: one masked attention over the whole sequence, plain tensor algebra --------


def naive_decode(model: HieraTok, z: torch.Tensor, mode: str) -> list[torch.Tensor]:
    """Appendix E and eqs. 5-7 from the weights alone; shares no code with the package but the down-sampler."""
    p = dict(model.decoder.named_parameters())
    config = model.config
    grids = [
        (round(z.shape[2] * s / config.scales[-1]), round(z.shape[3] * s / config.scales[-1])) for s in config.scales
    ]
    maps = list(model.downsample(z, Scales(tuple(grids))))
    tokens, scale_of = [], []
    for k, (x, (h, w)) in enumerate(zip(maps, grids)):
        H, W = p["positions"].shape[-2:]
        pooled = p["positions"].reshape(1, -1, h, H // h, w, W // w).mean((3, 5))
        tokens.append((x + pooled).flatten(2).mT + p["scale_embeddings"][k])
        scale_of += [k] * (h * w)
    x = torch.cat(tokens, 1)
    scale_of = np.array(scale_of)
    allowed = {
        "full": np.ones((len(scale_of), len(scale_of)), bool),
        "independent": scale_of[:, None] == scale_of[None],
        "causal": scale_of[:, None] >= scale_of[None],
    }[mode]
    bias = torch.from_numpy(np.where(allowed, 0.0, -np.inf))
    heads = config.decoder_heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
        )

    for i in range(config.decoder_depth):
        b = f"blocks.{i}."
        q, k, v = (norm(x, b + "norm1") @ p[b + "attn.qkv.weight"].T).chunk(3, -1)
        out = []
        for head in range(heads):
            part = slice(head * q.shape[-1] // heads, (head + 1) * q.shape[-1] // heads)
            scores = q[..., part] @ k[..., part].mT / (q.shape[-1] / heads) ** 0.5 + bias
            out.append(scores.softmax(-1) @ v[..., part])
        x = x + torch.cat(out, -1) @ p[b + "attn.proj.weight"].T
        hidden = norm(x, b + "norm2") @ p[b + "mlp.fc1.weight"].T
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ p[b + "mlp.fc2.weight"].T
    patches = norm(x, "norm") @ p["head.weight"].T + p["head.bias"]
    images, start, f = [], 0, config.patch_size
    for h, w in grids:
        image = torch.empty(len(z), 3, h * f, w * f, dtype=z.dtype)
        for i, j in itertools.product(range(h), range(w)):
            patch = patches[:, start + i * w + j].reshape(-1, f, f, 3)
            image[:, :, i * f : (i + 1) * f, j * f : (j + 1) * f] = patch.permute(0, 3, 1, 2)
        images.append(image)
        start += h * w
    return images


@pytest.mark.parametrize("downsample", ["conv", "interpolate"])
@pytest.mark.parametrize("attention", MODES)
def test_decoder_equals_naive_masked_reference(attention, downsample):
    model = small_model(attention=attention, downsample=downsample).double()
    z = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    for ours, reference in zip(model.decode_pyramid(z), naive_decode(model, z, attention), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", MODES)
def test_gradients_equal_naive_masked_reference(attention):
    model = small_model(attention=attention).double()
    z = torch.randn(1, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(1, 3, 4 * s, 4 * s, dtype=torch.float64) for s in SIDES]
    inputs = [z, *model.decoder.parameters()]
    gradients = []
    for pyramid in (model.decode_pyramid(z), naive_decode(model, z, attention)):
        gradients.append(torch.autograd.grad(sum((x * w).sum() for x, w in zip(pyramid, weights)), inputs))
    for ours, reference in zip(*gradients):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-8)


def test_single_scale_is_a_plain_vit():
    """With S = [8] the mode of attention cannot matter, and the decoder equals unmasked attention."""
    pyramids = []
    for attention in MODES:
        model = small_model(scales=(8,), attention=attention).double()
        z = torch.randn(2, 6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        pyramids.append(model.decode_pyramid(z)[0])
    torch.testing.assert_close(pyramids[0], naive_decode(model, z, "full")[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(pyramids[0], pyramids[1])
    assert torch.equal(pyramids[0], pyramids[2])


# --- who sees whom ----------------------------------------------------------------------------------------------------


def decode_with_perturbed_scale(model: HieraTok, maps: list[torch.Tensor], j: int | None) -> list[torch.Tensor]:
    scales = Scales.of(model.config.scales, (8, 8))
    maps = [x + torch.randn_like(x) if k == j else x for k, x in enumerate(maps)]
    return model.decoder(maps, scales)


@pytest.mark.parametrize("attention", MODES)
@torch.no_grad()
def test_information_flow(attention):
    """Tokens of scale j reach scale k's pixels exactly where the mode says; elsewhere pixels are bit-equal."""
    model = small_model(attention=attention)
    maps = list(model.downsample(torch.randn(2, 6, 8, 8), Scales.of(SIDES, (8, 8))))
    before = decode_with_perturbed_scale(model, maps, None)
    sees = {"full": lambda k, j: True, "independent": lambda k, j: k == j, "causal": lambda k, j: k >= j}[attention]
    for j in range(len(SIDES)):
        after = decode_with_perturbed_scale(model, maps, j)
        for k in range(len(SIDES)):
            assert torch.equal(before[k], after[k]) != sees(k, j), (k, j)


@pytest.mark.parametrize("batch_size", [1, 2, 9])  # coarse scales in passes of three, two and one
@pytest.mark.parametrize("grid", [(8, 8), (6, 11)])
@pytest.mark.parametrize("attention", MODES)
@torch.no_grad()
def test_progressive_decoding_equals_the_pyramid(attention, grid, batch_size):
    model = small_model(attention=attention).double()
    z = torch.randn(batch_size, 6, *grid, dtype=torch.float64)
    for progressive, whole in zip(model.decode_progressive(z), model.decode_pyramid(z), strict=True):
        torch.testing.assert_close(progressive, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("batch_size", "passes"), [(1, [21]), (2, [5, 16]), (9, [1, 4, 16])])
@torch.no_grad()
def test_progressive_decoding_computes_only_what_was_asked(batch_size, passes, monkeypatch):
    model = small_model()
    tokens_seen = []
    block = model.decoder.blocks[0]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda x, attend: tokens_seen.append(x.shape[1]) or forward(x, attend))
    images = model.decode_progressive(torch.randn(batch_size, 6, 8, 8))
    assert next(images).shape[-1] == 4
    assert tokens_seen == passes[:1]
    assert [next(images).shape[-1] for _ in range(2)] == [8, 16]
    assert tokens_seen == passes
    assert next(images).shape[-1] == 32
    assert tokens_seen == [*passes, 64]


# --- scales and down-sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", SCALE_LISTS)
@pytest.mark.parametrize("downsample", ["conv", "interpolate"])
def test_downsamplers_give_every_grid(sides, downsample):
    scales = Scales.of(sides, (16, 16))
    module = ConvDownsample(5, 12, sides) if downsample == "conv" else AreaDownsample(5, 12)
    maps = module(torch.randn(2, 5, 16, 16), scales)
    assert [tuple(x.shape) for x in maps] == [(2, 12, s, s) for s in sides]
    assert scales.num_tokens == sum(s * s for s in sides)


def test_conv_downsampling_is_learnable_from_the_finest_resolution():
    """Every coarse token's output depends on the whole of z that it covers, and every convolution gets a gradient."""
    module = ConvDownsample(3, 12, (1, 2, 6, 8))
    z = torch.randn(1, 3, 8, 8, requires_grad=True)
    coarsest, *others = module(z, Scales.of((1, 2, 6, 8), (8, 8)))
    (reach,) = torch.autograd.grad(coarsest.square().sum(), z, retain_graph=True)
    assert (reach != 0).all()
    (sum(x.square().sum() for x in others) + coarsest.square().sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # LayerNorm's own scale and shift aside, which a sum of squares of a normalised map moves as well
        assert parameter.grad.abs().sum() > 0 or name.endswith("norm.weight"), name


@pytest.mark.parametrize("downsample", ["conv", "interpolate"])
@pytest.mark.parametrize("sides", SCALE_LISTS[1:])
def test_a_coarse_token_knows_the_layout_of_its_area(sides, downsample):
    """Mirror what one coarse token covers: its average stays, but its image has to change."""
    model = small_model(image_size=64, scales=sides, downsample=downsample)
    z = torch.randn(2, 6, 16, 16)
    before = model.decode_pyramid(z)
    for k, side in enumerate(sides[:-1]):
        covered = -(-16 // side)  # 16 -> 12: two of each side, of which the second is half
        moved = z.clone()
        moved[:, :, :covered, :covered] = z[:, :, :covered, :covered].flip(-1)
        patch = (..., slice(0, model.config.patch_size), slice(0, model.config.patch_size))
        change = (model.decode(moved, scale=k) - before[k])[patch].square().mean() / before[k][patch].var()
        if downsample == "conv":
            assert change > 1e-3, side
        elif 16 % side == 0:  # what throwing the layout away looks like: every coarser average stays, too
            assert change < 1e-9, side


@pytest.mark.parametrize(
    ("side", "finest", "expected"),
    [
        (8, 16, (1, 2, 1)),
        (4, 16, (1, 2, 2)),
        (2, 16, (2, 2, 2)),
        (1, 16, (4, 2, 2)),
        (12, 16, (1, 2, 1)),  # 24 / 2
        (5, 16, (1, 2, 2)),  # 20 / 4
        (3, 16, (2, 2, 2)),  # 24 / 8
        (2, 32, (4, 2, 2)),  # twice the size: the weights of 1 of 16
    ],
)
def test_strides_do_the_whole_reduction(side, finest, expected):
    assert strides(side, finest) == expected
    reduction = math.prod(expected)
    assert reduction * side >= finest > reduction / 2 * side


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 15), (16, 48), (33, 31), (17, 16)])
def test_conv_downsampling_takes_any_grid_and_keeps_its_layout(grid):
    module = ConvDownsample(3, 12, (1, 2, 4, 8, 12, 16))
    scales = Scales.of((1, 2, 4, 8, 12, 16), grid)
    z = torch.randn(1, 3, *grid, requires_grad=True)
    maps = list(module(z, scales))
    assert [tuple(x.shape[-2:]) for x in maps] == list(scales.grids)
    for x in maps:  # nothing of z is left out at any scale
        (reach,) = torch.autograd.grad(x.square().sum(), z, retain_graph=True)
        assert (reach.abs().sum(1) > 0).float().mean() > 0.95


@pytest.mark.parametrize("geometry", [dict(kernel_size=2, stride=2), dict(kernel_size=3, stride=2, padding=1)])
@pytest.mark.parametrize(("size", "is_small"), [((2, 12, 9), True), ((2, 24, 17), False)])
def test_a_convolution_of_few_positions_is_one_product(size, is_small, geometry, monkeypatch):
    conv = SmallMapConv2d(3, 5, bias=False, **geometry).double()
    x = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
    unfolded = []
    unfold = F.unfold
    monkeypatch.setattr(F, "unfold", lambda *args, **options: unfolded.append(1) or unfold(*args, **options))
    trained = conv(x)
    assert trained.requires_grad
    assert not unfolded
    with torch.no_grad():
        torch.testing.assert_close(conv(x), trained, rtol=1e-12, atol=1e-12)
    assert bool(unfolded) == is_small


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=40, deadline=None)
def test_area_pool_is_the_mean_of_the_covered_area(h, w, out_h, out_w):
    """Against the definition: output (i, j) averages rows floor(i h / out_h) .. ceil((i + 1) h / out_h) - 1."""
    x = torch.randn(1, 2, h, w, dtype=torch.float64)
    pooled = area_pool(x, (out_h, out_w))
    for i, j in itertools.product(range(out_h), range(out_w)):
        rows = slice(i * h // out_h, -(-(i + 1) * h // out_h))
        columns = slice(j * w // out_w, -(-(j + 1) * w // out_w))
        torch.testing.assert_close(pooled[0, :, i, j], x[0, :, rows, columns].mean((1, 2)))


def test_area_pool_keeps_the_mean_and_composes():
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(area_pool(x, (4, 4)).mean(), x.mean())
    torch.testing.assert_close(area_pool(area_pool(x, (8, 8)), (2, 2)), area_pool(x, (2, 2)))
    torch.testing.assert_close(area_pool(x, (12, 12)), F.interpolate(x, size=(12, 12), mode="area"))


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_scales_of_any_grid(h, w):
    scales = Scales.of((1, 2, 4, 8, 16), (h, w))
    assert scales.grids[-1] == (h, w)
    assert all(a <= b and c <= d for (a, c), (b, d) in itertools.pairwise(scales.grids))
    pieces = scales.split(torch.arange(scales.num_tokens)[None])
    assert [p.shape[1] for p in pieces] == list(scales.lengths)
    assert scales.num_coarse == scales.num_tokens - h * w


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 400))
@settings(deadline=None)
def test_passes_are_all_scales_in_order_and_as_few_as_fit(h, w, tokens):
    scales = Scales.of((1, 2, 4, 8, 16), (h, w))
    passes = scales.passes(tokens)
    assert sum((p.grids for p in passes), ()) == scales.grids
    assert all(len(p) == 1 or p.num_tokens <= tokens for p in passes)
    assert all(one.num_tokens + other.lengths[0] > tokens for one, other in itertools.pairwise(passes))


def test_mask_of_two_scales():
    scales = Scales(((1, 1), (1, 2)))
    assert scales.mask("causal").int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert scales.mask("independent").int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert scales.mask("full").all()


# --- the posterior ----------------------------------------------------------------------------------------------------


def test_kl_against_the_integral():
    """KL(N(m, s^2) || N(0, 1)) by numerical integration, summed over dimensions, per image."""
    mean, logvar = torch.tensor([0.3, -1.2]).double(), torch.tensor([-0.7, 0.4]).double()
    x = torch.linspace(-15, 15, 300_001, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for m, v in zip(mean, logvar.exp()):
        log_p = -0.5 * (x - m) ** 2 / v - 0.5 * torch.log(2 * torch.pi * v)
        log_q = -0.5 * x**2 - 0.5 * np.log(2 * np.pi)
        expected += torch.trapezoid(log_p.exp() * (log_p - log_q), x)
    posterior = DiagonalGaussian(mean.view(1, 2, 1, 1), logvar.view(1, 2, 1, 1))
    torch.testing.assert_close(posterior.kl(), expected[None], rtol=1e-6, atol=0)


def test_samples_follow_mean_and_variance_and_generator():
    posterior = DiagonalGaussian(torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), -1.0))
    z = posterior.sample(torch.Generator().manual_seed(3))
    assert abs(z.mean() - 2.0) < 0.02
    assert abs(z.var() - np.exp(-1.0)) < 0.02
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(3)))
    assert torch.equal(posterior.mode(), posterior.mean)


def test_posterior_of_half_precision_is_float32():
    half = torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)
    assert DiagonalGaussian(half, half).sample().dtype == torch.float32


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_shapes_and_other_sizes():
    model = small_model()
    posterior = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert posterior.mode().shape == (2, 6, 8, 8)
    assert [tuple(x.shape) for x in model.decode_pyramid(posterior.mode())] == [(2, 3, 4 * s, 4 * s) for s in SIDES]
    z = model.encode(torch.rand(1, 3, 48, 20)).mode()
    assert z.shape == (1, 6, 12, 5)
    assert model.decode(z).shape == (1, 3, 48, 20)


@torch.no_grad()
def test_latents_come_before_multi_scale_downsampling():
    """A generator sees z alone: the encoder of a multi-scale model is the single-scale model's."""
    multi, single = HieraTok(small_config()), HieraTok(small_config(scales=(8,)))
    assert {k: v.shape for k, v in multi.encoder.state_dict().items()} == {
        k: v.shape for k, v in single.encoder.state_dict().items()
    }


def test_drop_path_only_in_training_and_growing_with_depth():
    model = HieraTok(small_config(drop_path=0.5))
    assert [round(b.drop_path.rate, 3) for b in model.decoder.blocks] == [0, 0.25, 0.5]
    assert all(b.drop_path.rate == 0 for b in model.encoder.blocks)
    z = torch.randn(8, 6, 8, 8)
    model.eval()
    assert torch.equal(model.decode(z), model.decode(z))
    model.train()
    assert not torch.equal(model.decode(z), model.decode(z))


def test_drop_path_keeps_the_expectation():
    from hieratok.core.layers import DropPath

    torch.manual_seed(0)
    x = DropPath(0.3).train()(torch.ones(20_000, 1, 1))
    assert x.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert abs(x.mean() - 1) < 0.02


def test_initialisation():
    torch.manual_seed(0)
    model = HieraTok(small_config(encoder_width=256, decoder_width=384))
    assert model.decoder.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.encoder.positions.std().item() == pytest.approx(0.02, rel=0.02)
    wider = HieraTok(small_config(encoder_width=256, decoder_width=384, init_std=0.1))
    assert wider.decoder.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.1, rel=0.01)
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert not any(
        f".{layer}." in n for n in biases for layer in ("qkv", "proj", "fc1", "fc2") if "downsample" not in n
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_size=30), "image_size 30 is not divisible by model.patch_size 4"),
        (dict(scales=(1, 2, 4)), r"scales \[1, 2, 4\] must end at the latent grid's side.* 32 / 4 = 8"),
        (dict(scales=(2, 1, 8)), "must ascend"),
        (dict(scales=(8, 8)), "must ascend"),
        (dict(scales=()), "list of positive whole numbers"),
        (dict(scales=(0, 8)), "list of positive whole numbers"),
        (dict(attention="causl"), "attention must be one of full, independent, causal"),
        (dict(downsample="pool"), "downsample must be one of interpolate, conv"),
        (dict(encoder_width=33), "encoder_width 33 is not divisible by model.encoder_heads 2"),
        (dict(decoder_depth=0), "decoder_depth must be a whole number from 1 to"),
        (dict(latent_channels=1.5), "latent_channels must be a whole number from 1 to"),
        (dict(drop_path=1.0), r"drop_path must be in \[0, 1\)"),
        (dict(mlp_ratio=0), "mlp_ratio must be positive"),
        (dict(init_std=0.0), "init_std must be positive"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match="encode takes"):
        small_model().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(6, 8, 8), (1, 5, 8, 8)])
def test_bad_latents(shape):
    with pytest.raises(ValueError, match="decode takes latents"):
        small_model().decode(torch.zeros(shape))


# --- on disk ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_and_load(tmp_path):
    model = small_model(attention="independent", scales=(1, 6, 8))
    model.save_pretrained(tmp_path / "tokenizer")
    z = torch.randn(1, 6, 8, 8)
    for source in (tmp_path / "tokenizer", str(tmp_path)):  # the model's folder, or the run's
        again = HieraTok.from_pretrained(source)
        assert again.config == model.config
        assert not again.training
        assert torch.equal(again.decode(z), model.decode(z))
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == ["config.json", "model.safetensors"]


def test_weights_of_the_former_downsampler_are_refused(tmp_path):
    model = small_model()
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("downsample.branches")}
    former = {"downsample.lift.weight": torch.zeros(32, 6, 1, 1), "downsample.branches.0.down.weight": torch.zeros(1)}
    model.save_pretrained(tmp_path, {**weights, **former})
    with pytest.raises(ValueError, match=r"conv down-sampling of hieratok 0\.1.*train it again"):
        HieraTok.from_pretrained(tmp_path)


def test_loading_what_does_not_fit(tmp_path):
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def rewrite(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))

    rewrite(decoder_depth=4)
    with pytest.raises(ValueError, match=r"does not fit .*blocks\.3.* is missing in the file"):
        HieraTok.from_pretrained(tmp_path)
    rewrite(latent_channels=7)
    with pytest.raises(ValueError, match="does not fit"):
        HieraTok.from_pretrained(tmp_path)
    rewrite(attentoin="full")
    with pytest.raises(ValueError, match="unknown setting 'attentoin'; did you mean 'attention'"):
        HieraTok.from_pretrained(tmp_path)
    rewrite(model_type="dit")
    with pytest.raises(ValueError, match="does not describe a hieratok model"):
        HieraTok.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        HieraTok.from_pretrained(tmp_path)
    rewrite()
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        HieraTok.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        HieraTok.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        HieraTok.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        (tmp_path / "empty").mkdir()
        HieraTok.from_pretrained(tmp_path / "empty")


def test_hub_ids_are_downloaded_only_if_no_such_folder_exists(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    small_model().save_pretrained(tmp_path)

    def snapshot_download(repo_id, revision=None, **others):
        asked.append((repo_id, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert HieraTok.from_pretrained("someone/model", revision="v1").config == small_config()
    assert asked == [("someone/model", "v1")]
    small_model().save_pretrained(tmp_path / "local" / "model")
    HieraTok.from_pretrained("local/model")
    assert len(asked) == 1


def test_hub_failure_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach\nthe hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"someone/model: no such folder here, and the hub gave none"):
        HieraTok.from_pretrained("someone/model")


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["full", "independent", "causal"])
def test_training_pass_is_one_graph_and_is_compiled_once(attention):
    """No graph break, and no recompilation across batches of one shape; the numbers are those of the plain pass."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = small_model(attention=attention).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        torch.manual_seed(seed)
        pyramid, posterior, z = compiled(images)
        torch.manual_seed(seed)
        expected, expected_posterior, expected_z = model(images)
        assert torch.equal(posterior.mean, expected_posterior.mean)
        torch.testing.assert_close(z, expected_z)
        for a, b in zip(pyramid, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
