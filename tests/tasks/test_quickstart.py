"""The quickstart, end to end with a tiny model: its numbers are recomputed here with numpy from what it left behind."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pages import Reader, assert_self_contained
from hieratok import HieraTok
from hieratok.cli import main
from hieratok.data.images import center_crop, open_source
from hieratok.reports.quickstart import decibels, write
from hieratok.studies import recipes
from hieratok.tasks.quickstart import quickstart, reconstruct_photos
from hieratok.tokenizer.model import TokenizerConfig
from hieratok.training.runs import speed
from hieratok.training.tokenizer import TokenizerRun

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
    quickstart(out, run, generator_steps=4, write_page=write)
    return out


def to_numpy(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) -> float64 (B, H, W, 3)."""
    return images.permute(0, 2, 3, 1).double().numpy()


def block_means(images: np.ndarray, side: int) -> np.ndarray:
    """(B, H, W, 3) -> (B, side, side, 3), rounded to whole grey levels."""
    b, h, w, _ = images.shape
    return np.rint(images.reshape(b, side, h // side, side, w // side, 3).mean((2, 4)))


def psnr(images: np.ndarray, references: np.ndarray) -> float:
    """The mean of the images' own, as docs/metrics.md defines it."""
    errors = ((images - references) ** 2).mean((1, 2, 3))
    return float(np.mean(20 * math.log10(255) - 10 * np.log10(errors)))


def colours(images: np.ndarray, f: int) -> np.ndarray:
    """(B, H, W, 3) -> each f x f patch in its mean colour."""
    return np.repeat(np.repeat(block_means(images, images.shape[1] // f), f, axis=1), f, axis=2)


def test_metrics_are_what_numpy_finds(finished, photos):
    metrics = json.loads((finished / "metrics.json").read_text())
    source = open_source(str(photos))
    originals = torch.stack([center_crop(source.image(i), 32) for i in range(len(source))])
    tokenizer = HieraTok.from_pretrained(finished)
    with torch.no_grad():
        z = tokenizer.encode(originals / 127.5 - 1).mean
        pyramid = [np.clip(np.rint(to_numpy(x) * 127.5 + 127.5), 0, 255) for x in tokenizer.decode_pyramid(z)]
    truth = to_numpy(originals)

    assert list(metrics["scales"]) == ["8", "16", "32"]
    for x, numbers in zip(pyramid, metrics["scales"].values()):
        target = block_means(truth, x.shape[1])
        assert numbers["psnr"] == pytest.approx(psnr(x, target), abs=1e-6)
        assert numbers["baseline_psnr"] == pytest.approx(psnr(colours(target, 8), target), abs=1e-6)
    assert metrics["psnr"] == numbers["psnr"]
    assert metrics["baseline_psnr"] == numbers["baseline_psnr"]
    assert metrics["n"] == len(originals) == 2
    assert metrics["parameters"] == sum(p.numel() for p in tokenizer.parameters())
    assert metrics["images_seen"] == STEPS * BATCH
    assert metrics["seconds"] > 0
    assert metrics["images_per_second"] == pytest.approx(STEPS * BATCH / metrics["seconds"])
    assert metrics["settings"]["model"]["scales"] == [1, 2, 4]
    assert metrics["generator"]["images_seen"] == 4 * metrics["generator"]["settings"]["train"]["batch_size"]


def test_evaluate_finds_the_same_numbers(finished, photos, tmp_path):
    command = [
        "evaluate",
        "reconstruction",
        str(finished),
        "--data",
        str(photos),
        "--features",
        "none",
        "--lpips",
        "[]",
    ]
    assert main([*command, "--scales", "--device", "cpu", "--out", str(tmp_path)]) == 0
    metrics, result = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    assert metrics["scales"] == result["scales"]
    assert {key: metrics[key] for key in ("n", "psnr", "baseline_psnr", "ssim")}.items() <= result.items()
    assert metrics["protocol"].items() <= {**result["manifest"], "crop": "ADM centre crop"}.items()


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
    for numbers in metrics["scales"].values():
        assert {f"{numbers['psnr']:.5g}", f"{numbers['baseline_psnr']:.5g}"} <= set(reader.cells)
    for number in (metrics["psnr"], metrics["baseline_psnr"], metrics["psnr"] - metrics["baseline_psnr"]):
        assert f"{number:.2f} dB" in reader.text
    # of each photo, uncut: three scales, the original, one colour per token, all as large as the photo; then the crops
    # and the samples as they are; then the viewer's empty picture
    sizes = [(a["width"], a["height"]) for a in reader.tags("img") if a.get("src")]
    crops = [("8", "8"), ("16", "16"), ("32", "32"), ("32", "32"), ("32", "32")] * 2
    samples = [("8", "8"), ("16", "16"), ("32", "32")] * 6
    assert sizes == [("40", "70")] * 5 + [("33", "32")] * 5 + crops + samples
    assert len(reader.tags("svg")) == 2


def test_the_page_of_a_photo_tells_its_own_numbers(finished, run, photos):
    tokenizer = HieraTok.from_pretrained(finished)
    whole = reconstruct_photos(tokenizer, open_source(str(photos)))
    assert [photo.name for photo in whole] == ["<b>bold&.png", "plain.png"]
    photo = whole[0]
    assert torch.equal(photo.original, open_source(str(photos)).image(0))
    assert [x.shape[1:] for x in photo.pyramid] == [(18, 10), (35, 20), (70, 40)]
    pieces = [np.array(list(map(float, re.findall(r"(\d+\.\d\d) dB", decibels(numbers))))) for numbers in photo.numbers]
    assert all(len(piece) == 2 for piece in pieces)
    finest, original = (to_numpy(x[None]) for x in (photo.pyramid[-1], photo.original))
    assert pieces[-1][0] == pytest.approx(psnr(finest, original), abs=0.006)
    page = (finished / "index.html").read_text(encoding="utf-8")
    assert all(decibels(numbers) in page for numbers in photo.numbers)


def test_a_large_photo_is_reduced(finished, tmp_path):
    Image.new("RGB", (1100, 40), (200, 10, 10)).save(tmp_path / "wide.png")
    (photo,) = reconstruct_photos(HieraTok.from_pretrained(finished), open_source(str(tmp_path)))
    assert photo.original.shape == photo.pyramid[-1].shape == (3, 19, 512)


def test_the_page_is_there_before_the_generator_trains(finished, run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    complete = (out / "index.html").read_text(encoding="utf-8")
    (out / "index.html").unlink()

    def stop(generator_run, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("hieratok.tasks.quickstart.train_generator", stop)
    with pytest.raises(KeyboardInterrupt):
        quickstart(out, run, generator_steps=4, write_page=write)
    assert str(out / "index.html") in capsys.readouterr().out
    first = (out / "index.html").read_text(encoding="utf-8")
    assert_self_contained(first)
    assert "sample 0" not in first
    assert "They follow when the generator is trained" in first
    assert "generator" not in json.loads((out / "metrics.json").read_text())
    before, after = (page.index("<h2>Samples</h2>") for page in (first, complete))
    assert first[:before] == complete[:after], "nothing else changes"


def test_a_finished_run_is_not_trained_again(finished, run, capsys):
    weights = finished / "tokenizer" / "model.safetensors"
    before, log = weights.read_bytes(), (finished / "log.jsonl").read_text()
    metrics = json.loads((finished / "metrics.json").read_text())
    (finished / "index.html").unlink()
    assert quickstart(finished, run, generator_steps=4, write_page=write).to_json() == metrics
    assert weights.read_bytes() == before
    assert (finished / "log.jsonl").read_text() == log
    assert (finished / "index.html").is_file()
    printed = capsys.readouterr().out
    for numbers in metrics["scales"].values():
        assert {f"{numbers['psnr']:.5g}", f"{numbers['baseline_psnr']:.5g}"} <= set(printed.split())
    assert str(finished / "index.html") in printed


def test_speed_adds_up_the_intervals():
    log = [{"images": 20, "images_per_second": 10.0}, {"images": 50, "images_per_second": 30.0}]
    assert speed(log)._asdict() == {"images_seen": 50, "seconds": 3.0, "images_per_second": 50 / 3}


def test_a_run_without_held_out_images_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"data\.val_path"):
        quickstart(tmp_path / "out", replace(run, data=replace(run.data, val_path=None)))
    assert not (tmp_path / "out").exists()
