"""The quickstart, end to end with a tiny model: its numbers are recomputed here with numpy from what it left behind."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok import HieraTok, recipes
from hieratok.data.images import center_crop, open_source
from hieratok.quickstart import patch_mean, quickstart, shrink, speed
from hieratok.tokenizer.model import TokenizerConfig
from hieratok.training.tokenizer import TokenizerRun
from test_report import Reader, assert_self_contained

STEPS, BATCH = 6, 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two held-out photos, one with a name that would be HTML."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, size in (("<b>bold&.png", (40, 70)), ("plain.png", (33, 32))):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def run(photos) -> TokenizerRun:
    """`tiny-multi` made much smaller."""
    tiny = recipes.get("tiny-multi")
    model = TokenizerConfig(
        image_size=32,
        patch_size=8,
        latent_channels=4,
        scales=(1, 2, 4),
        encoder_width=16,
        encoder_depth=1,
        encoder_heads=1,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=1,
    )
    return replace(
        tiny,
        name="a <i>run</i>",
        model=model,
        data=replace(tiny.data, val_path=str(photos), num_workers=0),
        train=replace(tiny.train, steps=STEPS, batch_size=BATCH, log_every=2, save_every=3, picture_every=0),
    )


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    """The folder of a finished quickstart."""
    out = tmp_path_factory.mktemp("runs") / "first look"
    quickstart(out, run, generator_steps=4)
    return out


def to_numpy(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) -> float64 (B, H, W, 3)."""
    return images.permute(0, 2, 3, 1).double().numpy()


def block_means(images: np.ndarray, side: int) -> np.ndarray:
    """(B, H, W, 3) -> (B, side, side, 3), rounded to whole grey levels."""
    b, h, w, _ = images.shape
    return np.rint(images.reshape(b, side, h // side, side, w // side, 3).mean((2, 4)))


def psnr(images: np.ndarray, references: np.ndarray) -> float:
    """From the mean of all squared errors."""
    return 20 * math.log10(255) - 10 * math.log10(np.mean((images - references) ** 2))


def test_metrics_are_what_numpy_finds(finished, photos):
    metrics = json.loads((finished / "metrics.json").read_text())
    source = open_source(str(photos))
    originals = torch.stack([center_crop(source.image(i), 32) for i in range(len(source))])
    tokenizer = HieraTok.from_pretrained(finished)
    with torch.no_grad():
        z = tokenizer.encode(originals / 127.5 - 1).mean
        pyramid = [np.clip(np.rint(to_numpy(x) * 127.5 + 127.5), 0, 255) for x in tokenizer.decode_pyramid(z)]
    truth = to_numpy(originals)

    baseline = np.repeat(np.repeat(block_means(truth, 4), 8, axis=1), 8, axis=2)
    assert metrics["psnr"] == pytest.approx(psnr(pyramid[-1], truth), abs=1e-6)
    assert metrics["psnr_patch_mean"] == pytest.approx(psnr(baseline, truth), abs=1e-6)
    assert metrics["gain_db"] == pytest.approx(psnr(pyramid[-1], truth) - psnr(baseline, truth), abs=1e-6)
    expected = {str(x.shape[1]): psnr(x, block_means(truth, x.shape[1])) for x in pyramid}
    assert list(expected) == ["8", "16", "32"]
    assert metrics["psnr_per_scale"] == pytest.approx(expected, abs=1e-6)
    assert metrics["held_out_images"] == len(originals) == 2
    assert metrics["parameters"] == sum(p.numel() for p in tokenizer.parameters())
    assert metrics["images_seen"] == STEPS * BATCH
    assert metrics["seconds"] > 0
    assert metrics["images_per_second"] == pytest.approx(STEPS * BATCH / metrics["seconds"])
    assert metrics["settings"]["model"]["scales"] == [1, 2, 4]
    assert metrics["generator"]["images_seen"] == 4 * metrics["generator"]["settings"]["train"]["batch_size"]


def test_the_page_shows_everything_and_needs_nothing(finished):
    page = (finished / "index.html").read_text(encoding="utf-8")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert_self_contained(page)
    reader = Reader(page)
    assert not reader.open
    assert not reader.tags("b")
    assert not reader.tags("i")
    for shown in ("a <i>run</i>", "<b>bold&.png", "plain.png", "hieratok train tiny-multi --data PHOTOS"):
        assert shown in reader.text
    assert f"hieratok reconstruct '{finished}' PHOTO.jpg --out DIR" in reader.text, "a path with a space is quoted"
    for number in (metrics["psnr"], metrics["psnr_patch_mean"], *metrics["psnr_per_scale"].values()):
        assert f"{number:.2f}" in reader.cells
    # of each photo: three scales, the original, the patch means (one pixel each); then the viewer's empty picture
    sizes = [(a["width"], a["height"]) for a in reader.tags("img") if a.get("src")]
    samples = [("8", "8"), ("16", "16"), ("32", "32")] * 6
    assert sizes == [("8", "8"), ("16", "16"), ("32", "32"), ("32", "32"), ("4", "4")] * 2 + samples
    assert len(reader.tags("svg")) == 2


def test_a_finished_run_is_not_trained_again(finished, run, capsys):
    weights = finished / "tokenizer" / "model.safetensors"
    before, log = weights.read_bytes(), (finished / "log.jsonl").read_text()
    metrics = json.loads((finished / "metrics.json").read_text())
    (finished / "index.html").unlink()
    assert quickstart(finished, run, generator_steps=4) == metrics
    assert weights.read_bytes() == before
    assert (finished / "log.jsonl").read_text() == log
    assert (finished / "index.html").is_file()
    printed = capsys.readouterr().out
    assert f"{metrics['psnr']:.2f} dB" in printed
    assert f"{metrics['psnr_patch_mean']:.2f} dB" in printed
    assert str(finished / "index.html") in printed


def test_patch_mean_equals_numpy():
    images = torch.randint(0, 256, (3, 3, 12, 18), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    result = patch_mean(images, 6)
    for image, mean in zip(to_numpy(images), to_numpy(result)):
        for y in range(0, 12, 6):
            for x in range(0, 18, 6):
                exact = image[y : y + 6, x : x + 6].mean((0, 1))
                assert np.abs(mean[y : y + 6, x : x + 6] - exact).max() <= 0.5 + 1e-4, "the nearest grey level"


def test_shrink_keeps_a_constant_image():
    images = torch.full((1, 3, 32, 32), 201, dtype=torch.uint8)
    assert torch.equal(shrink(images, 4, 4), images[..., :4, :4])


def test_speed_adds_up_the_intervals():
    log = [{"images": 20, "images_per_second": 10.0}, {"images": 50, "images_per_second": 30.0}]
    assert speed(log) == {"images_seen": 50, "seconds": 3.0, "images_per_second": 50 / 3}


def test_a_run_without_held_out_images_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"data\.val_path"):
        quickstart(tmp_path / "out", replace(run, data=replace(run.data, val_path=None)))
    assert not (tmp_path / "out").exists()
