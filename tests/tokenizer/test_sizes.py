"""Images of any size: padding, a scale on its own, tiles without seams, memory that does not grow."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hieratok import HieraTok, TokenizerConfig
from hieratok.cli import main
from hieratok.tokenizer.scales import area_pool
from hieratok.tokenizer.tiling import overlap_of, reconstruct_tiled, window


def config(**changes) -> TokenizerConfig:
    settings = dict(
        image_size=32,
        patch_size=4,
        latent_channels=6,
        scales=(1, 2, 4, 8),
        encoder_width=16,
        encoder_depth=1,
        encoder_heads=2,
        decoder_width=16,
        decoder_depth=2,
        decoder_heads=2,
        init_std=0.2,
    )
    return TokenizerConfig(**{**settings, **changes})


def model(**changes) -> HieraTok:
    torch.manual_seed(0)
    return HieraTok(config(**changes)).eval()


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 (3, H, W), smooth."""
    coarse = torch.rand(1, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
    return (255 * image).round().clamp(0, 255).to(torch.uint8)


# --- a scale on its own -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attention", ["causal", "independent", "full"])
@pytest.mark.parametrize("downsample", ["conv", "interpolate"])
def test_decode_stops_at_a_scale(attention, downsample):
    tokenizer = model(attention=attention, downsample=downsample)
    z = torch.randn(2, 6, 8, 8)
    pyramid = tokenizer.decode_pyramid(z)
    for k in range(4):
        torch.testing.assert_close(tokenizer.decode(z, scale=k), pyramid[k], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokenizer.decode(z, scale=k - 4), pyramid[k], rtol=1e-5, atol=1e-5)
    for k in (4, -5):
        with pytest.raises(ValueError, match="this tokenizer has scales 0 to 3"):
            tokenizer.decode(z, scale=k)


@torch.no_grad()
def test_a_coarse_scale_costs_its_own_tokens_alone():
    from torch.utils.flop_counter import FlopCounterMode

    tokenizer, z = model(decoder_depth=8), torch.randn(1, 6, 8, 8)
    flops = []
    for scale in (2, -1):
        with FlopCounterMode(display=False) as counter:
            tokenizer.decode(z, scale=scale)
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.4 * flops[1]  # 21 of 85 tokens, and the down-sampling


# --- padding ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (31, 29), (32, 32), (33, 11), (4, 64), (5, 7)])
def test_any_size_comes_back(size):
    tokenizer = model()
    images = photo(*size).float()[None] / 127.5 - 1
    posterior = tokenizer.encode(images)
    assert posterior.image_size == size
    padded = F.pad(images, (0, -size[1] % 4, 0, -size[0] % 4), mode="replicate")
    whole = tokenizer.encode(padded)
    assert torch.equal(posterior.mode(), whole.mode())
    z = posterior.mode()
    image = tokenizer.decode(z, image_size=posterior.image_size)
    assert image.shape == images.shape
    assert torch.equal(image, tokenizer.decode(z)[..., : size[0], : size[1]])
    pyramid = tokenizer.decode_pyramid(z, posterior.image_size)
    progressive = list(tokenizer.decode_progressive(z, posterior.image_size))
    assert [x.shape for x in pyramid] == [x.shape for x in progressive]
    assert pyramid[-1].shape == images.shape
    assert all(0 < x.shape[2] <= y.shape[2] for x, y in itertools.pairwise(pyramid))
    if size == (32, 32):
        assert [x.shape[-1] for x in pyramid] == [4, 8, 16, 32]


def test_image_size_must_fit_the_latents():
    z = torch.zeros(1, 6, 8, 8)
    for size in ((33, 32), (0, 5)):
        with pytest.raises(ValueError, match="does not fit latents of 8 x 8 patches of 4 px"):
            model().decode(z, image_size=size)


# --- tiles ------------------------------------------------------------------------------------------------------------


def pooled(tiles: torch.Tensor, sides: tuple[int, ...] = (4, 8, 16, 32)) -> list[torch.Tensor]:
    """A perfect tokenizer: every scale is the area-pooled tile."""
    return [area_pool(tiles.float(), (side, side)).round().to(torch.uint8) for side in sides]


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 32), (31, 97), (120, 40), (101, 103)])
def test_tiles_of_a_perfect_tokenizer_give_the_image(size):
    image = photo(*size)
    calls = []
    pyramid = reconstruct_tiled(pooled, image, config(), batch_size=3, progress=calls.append)
    assert torch.equal(pyramid[-1], image)
    assert [p.shape[1:] for p in pyramid] == [
        (-(-size[0] * side // 32), -(-size[1] * side // 32)) for side in (4, 8, 16, 32)
    ]
    across = [1 if side <= 32 else -(-(side - 32) // 24) + 1 for side in size]
    assert sum(calls) == across[0] * across[1]


def test_no_seam_is_wider_than_the_blend():
    """Tiles that are each off by another constant: the result moves from one to the next in small steps."""
    image = torch.full((3, 32, 200), 100, dtype=torch.uint8)
    numbers = iter(range(100))

    def off(tiles):
        return [torch.stack([tile + 40 * (next(numbers) % 2) for tile in tiles])]

    result = reconstruct_tiled(off, image, config(scales=(8,)))[0].float()
    assert result.min() == 100
    assert result.max() == 140
    overlap = overlap_of(config())
    assert overlap == 8
    assert result.diff(dim=2).abs().max() <= 40 / (overlap + 1) + 1


def test_weights_of_neighbouring_tiles_add_up_to_one_along_a_line():
    side, overlap = 32, 8
    line = window(side, overlap)[16]
    assert (line > 0).all()
    torch.testing.assert_close(line[-overlap:] + line[:overlap], torch.ones(overlap))
    assert (line[overlap:-overlap] == 1).all()


@pytest.mark.parametrize("scales", [(16,), (1, 2, 4, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8, 12, 16)])
def test_every_scale_list_of_the_paper_can_be_tiled(scales):
    c = TokenizerConfig(scales=scales)
    stride = c.image_size - overlap_of(c)
    assert stride == 192
    assert all(16 * s * stride % 256 == 0 for s in scales)


def test_scales_that_cannot_be_tiled_say_so():
    with pytest.raises(ValueError, match="cannot be tiled with scales"):
        overlap_of(config(image_size=7, patch_size=1, scales=(1, 7)))


# --- the command ------------------------------------------------------------------------------------------------------


def test_reconstruct_takes_any_photo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model().save_pretrained("tok")
    sizes = {"dot": (1, 1), "small": (10, 23), "large": (70, 45), "wide": (20, 300)}
    for name, size in sizes.items():
        Image.fromarray(photo(*size).permute(1, 2, 0).numpy()).save(f"{name}.png")
    assert main(["reconstruct", "tok", *(f"{name}.png" for name in sizes), "--out", "out"]) == 0
    for name, (height, width) in sizes.items():
        written = {path.stem.removeprefix(f"{name}-") for path in Path("out").glob(f"{name}-*.png")}
        scales = [(-(-height * s // 8), -(-width * s // 8)) for s in (1, 2, 4, 8)]  # in proportion to the photo
        assert written == {f"{w}px" if w == h else f"{w}x{h}px" for h, w in scales}
        for h, w in scales:
            with Image.open(f"out/{name}-{w}px.png" if w == h else f"out/{name}-{w}x{h}px.png") as picture:
                assert picture.size == (w, h)
    with Image.open("out/contact-sheet.png") as sheet:
        assert sheet.width <= 5 * (256 + 4) + 4
    assert main(["reconstruct", "tok", "large.png", "--crop", "--out", "cropped"]) == 0
    with Image.open("cropped/large-32px.png") as picture:
        assert picture.size == (32, 32)


@pytest.mark.slow
def test_24_megapixels_fit_into_4_gigabytes(tmp_path):
    """The command as a user runs it, under a limit on the memory that its process tree may hold."""
    resource = pytest.importorskip("resource")
    tokenizer = HieraTok(config(image_size=256, patch_size=16, scales=(1, 2, 4, 8, 16)))
    tokenizer.save_pretrained(tmp_path / "tok")
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((6000, 4000), Image.Resampling.BILINEAR).save(tmp_path / "photo.jpg")
    command = [sys.executable, "-m", "hieratok", "reconstruct", "tok", "photo.jpg", "--out", "out", "--device", "cpu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with Image.open(tmp_path / "out" / "photo-6000x4000px.png") as picture:
        assert picture.size == (6000, 4000)
    assert peak < 4e9, peak
