"""Commands that follow from each other: what one prints as the next one works as printed."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hieratok import HieraTok, TokenizerConfig, cli
from hieratok.core.pixels import read_image, to_uint8
from hieratok.data.latents import whose
from hieratok.evaluation.images import open_images, pair
from hieratok.generation.config import SAMPLERS, SampleConfig
from hieratok.generation.dit import DiTConfig
from hieratok.generation.sampling import fitted
from hieratok.tasks.reconstruct import SHEET_ROWS, column_titles, reconstruct_any

CONFIG = TokenizerConfig(
    image_size=16, patch_size=4, latent_channels=4, scales=(1, 2, 4), encoder_width=16, encoder_depth=1,
    encoder_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, init_std=0.3,
)  # fmt: skip
QUICK = ["--train.steps", "1", "--train.batch_size", "2", "--train.picture_every", "0", "--model.depth", "1"]


def save_tokenizer(folder: str, seed: int = 0) -> None:
    torch.manual_seed(seed)
    HieraTok(CONFIG).save_pretrained(f"{folder}/tokenizer")


def save_photos(*paths: str) -> None:
    for i, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


@pytest.fixture
def hieratok(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own, given as words; gives what it printed, and what it said went wrong."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[str, str]:
        status = cli.main(list(words))
        out, err = capsys.readouterr()
        assert bool(status) == ("hieratok: " in err.splitlines()[-1] if err else False), err
        return out, err

    return run


def following(printed: str) -> list[str]:
    """The words of the next command, without the program's name."""
    (line,) = re.findall(r"^next: +(.+)$", printed, re.MULTILINE)
    program, *words = shlex.split(line)
    assert program == "hieratok"
    return words


@pytest.mark.parametrize(
    "photos",
    [
        ["my photos/a.png", "my photos/b.png"],  # no classes: one
        [f"my photos/class {i}/{j}.png" for i in range(3) for j in range(2)],
    ],
    ids=["no classes", "three classes"],
)
def test_from_latents_to_samples_as_printed(hieratok, photos):
    save_tokenizer("my run")
    save_photos(*photos)
    printed, _ = hieratok("latents", "my run", "--data", "my photos", "--out", "my latents", "--device", "cpu")
    train = following(printed)
    assert train[:2] == ["train", "dit-tiny"]
    assert train[train.index("--model.num_classes") + 1] == ("3" if "class" in photos[0] else "1")
    sample = following(hieratok(*train, "--out", "my dit", *QUICK)[0])
    assert sample[:4] == ["sample", "my dit", "--tokenizer", "my run"]
    printed, _ = hieratok(*sample, "--num", "2", "--steps", "2", "--device", "cpu")  # no --sampler: it is a flow's
    evaluate = following(printed)
    assert evaluate[-2:] == ["--reference", "PATH"]
    assert Path(evaluate[2]).is_file()


def test_latents_that_no_generator_can_learn_say_so(hieratok):
    save_tokenizer("run")
    save_photos("photos/a.png", "photos/class/b.png")
    printed, _ = hieratok("latents", "run", "--data", "photos", "--out", "latents", "--device", "cpu")
    assert "no generator can be trained on them: latents: some images have a class and others none" in printed
    assert "next:" not in printed


# --- Samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_the_sampler_fits_the_generator(objective):
    model = DiTConfig.of_size("tiny", objective=objective, learn_sigma=False)
    chosen = fitted(SampleConfig(steps=7), model)
    assert (chosen.sampler, chosen.steps) == (SAMPLERS[objective][0], 7)
    assert chosen.objective == objective
    for sampler in SAMPLERS[objective]:
        assert fitted(SampleConfig(sampler=sampler), model).sampler == sampler
    (other,) = SAMPLERS.keys() - {objective}
    with pytest.raises(ValueError, match="does not fit a generator trained with objective"):
        fitted(SampleConfig(sampler=SAMPLERS[other][0]), model)


def test_settings_of_one_sampler_are_checked_when_it_is_chosen():
    ddpm, flow = (DiTConfig.of_size("tiny", objective=objective, learn_sigma=False) for objective in ("ddpm", "flow"))
    assert SampleConfig().objective is None
    assert fitted(SampleConfig(time_shift=2.0), flow).time_shift == 2.0
    assert fitted(SampleConfig(steps=5_000), flow).steps == 5_000
    for config, model in (
        (SampleConfig(time_shift=2.0), ddpm),
        (SampleConfig(steps=5_000), ddpm),
        (SampleConfig(eta=0.5), ddpm),  # the default is ddpm, and eta of ddim
        (SampleConfig(eta=0.5), flow),
    ):
        with pytest.raises(ValueError, match=r"time_shift is for|steps must be at most|eta is for"):
            fitted(config, model)
    with pytest.raises(ValueError, match="sampler must be one of"):
        replace(SampleConfig(), sampler="dpm")  # type: ignore[arg-type]


# --- Whose latents ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_was_trained_on_is_not_called_another_one(hieratok):
    save_tokenizer("run")
    save_tokenizer("other", seed=1)
    save_photos("photos/a.png", "photos/b.png")
    write = ["latents", "run", "--data", "photos", "--out", "latents", "--device", "cpu"]
    train = [*following(hieratok(*write)[0]), "--out", "dit", *QUICK]
    sample = [*following(hieratok(*train)[0]), "--num", "1", "--steps", "1", "--device", "cpu"]

    _, error = hieratok(*(word if word != "run" else "other" for word in write))
    assert "latents holds latents of another tokenizer, run, than other: choose another --out" in error
    _, error = hieratok(*(word if word != "run" else "other" for word in [*train, "--allow-changes"]))
    assert "latents holds latents of another tokenizer, run, than other" in error
    _, error = hieratok(*(word if word != "run" else "other" for word in sample))
    assert "dit was trained on latents of another tokenizer, run, than other" in error

    save_tokenizer("run", seed=2)
    changed = "run with other weights than it has now"
    assert f"latents holds latents of {changed}" in hieratok(*write)[1]
    assert f"latents holds latents of {changed}" in hieratok(*train)[1]
    assert f"dit was trained on latents of {changed}" in hieratok(*sample)[1]


def test_one_folder_has_many_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "other weights than it has now" in whose("runs/a", f"{tmp_path}/runs/a/")
    assert whose("runs/a", "runs/b") == "another tokenizer, runs/a, than runs/b"
    assert whose(None, "runs/b") == "another tokenizer than runs/b"


# --- From photos to reconstructions to their evaluation ---------------------------------------------------------------


def save_photo(path: str, height: int, width: int) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(height).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.mark.parametrize("crop", [False, True])
def test_from_reconstruct_to_evaluate_as_printed(hieratok, crop):
    save_tokenizer("run")
    long = "x" * 240  # shortened in the reconstruction's name
    names = ["my photos/cat/a.png", "my photos/dog/a.png", f"my photos/{long}.png"]
    for name in names:
        save_photo(name, 24, 32)
    printed, _ = hieratok("reconstruct", "run", "my photos", "--out", "my out", "--device", "cpu", *["--crop"] * crop)
    assert printed.startswith("9 pictures and my out/contact-sheet.png\n")
    assert ("tiles of 16 px" in printed) is not crop
    words = following(printed)
    assert words[:4] == ["evaluate", "images", "my photos", "my out"]
    assert words[4] == ("--suffix=-16px" if crop else "--suffix=-32x24px")
    printed, _ = hieratok(*words, "--json")
    result = json.loads(printed)
    assert result["n"] == 3
    command = ["evaluate", "reconstruction", "run", "--data", "my photos", *words[-4:], "--json", "--device", "cpu"]
    if crop:  # the same by the tokenizer itself
        assert result["psnr"] == pytest.approx(json.loads(hieratok(*command)[0])["psnr"], abs=1e-9)


def test_photos_of_several_sizes_have_no_one_suffix(hieratok):
    save_tokenizer("run")
    save_photo("photos/a.png", 24, 32)
    save_photo("photos/b.png", 8, 10)
    printed, _ = hieratok("reconstruct", "run", "photos", "--out", "out", "--device", "cpu")
    assert "next:" not in printed
    assert {path.name for path in Path("out").glob("*px.png")} == {
        "a-8x6px.png", "a-16x12px.png", "a-32x24px.png", "b-3x2px.png", "b-5x4px.png", "b-10x8px.png",
    }  # fmt: skip


def test_of_scales_that_come_to_one_size_the_finest_is_kept(hieratok):
    save_tokenizer("run")
    save_photo("dot.png", 1, 1)
    printed, _ = hieratok("reconstruct", "run", "dot.png", "--out", "out", "--device", "cpu")
    assert printed.startswith("1 pictures and out/contact-sheet.png\n")
    tokenizer = HieraTok.from_pretrained("run")
    finest = reconstruct_any(tokenizer, read_image("dot.png"))[-1]
    assert torch.equal(read_image("out/dot-1px.png"), finest)


def test_the_summary_says_when_the_sheet_stops(hieratok):
    save_tokenizer("run")
    for i in range(SHEET_ROWS + 1):
        save_photo(f"photos/{i:03}.png", 16, 16)
    printed, _ = hieratok("reconstruct", "run", "photos", "--out", "out", "--device", "cpu")
    assert f"the sheet stops after {SHEET_ROWS} of {SHEET_ROWS + 1} photos\n" in printed
    assert "tiles" not in printed  # photos of the training size


def test_scales_that_cannot_be_tiled_are_decoded_whole_and_that_is_said(hieratok):
    torch.manual_seed(0)
    config = replace(CONFIG, image_size=7, patch_size=1, scales=(1, 7))
    HieraTok(config).eval().save_pretrained("run/tokenizer")
    save_photo("photos/a.png", 9, 11)
    save_photo("photos/b.png", 5, 7)
    printed, _ = hieratok("reconstruct", "run", "photos", "--out", "out", "--device", "cpu")
    assert "whole: 1 of 2 photos, as these scales cannot be tiled" in printed
    image = read_image("photos/a.png")
    tokenizer = HieraTok.from_pretrained("run")
    with torch.no_grad():
        posterior = tokenizer.encode(tokenizer.preprocess(image, crop=False))
        expected = to_uint8(tokenizer.decode(posterior.mode(), image_size=posterior.image_size))[0]
    assert torch.equal(read_image("out/a-11x9px.png"), expected)


def test_a_small_photo_is_one_padded_tile():
    torch.manual_seed(0)
    tokenizer = HieraTok(CONFIG).eval()
    image = torch.randint(0, 256, (3, 10, 7), dtype=torch.uint8)
    padded = F.pad(image[None].float(), (0, 9, 0, 6), mode="replicate").to(torch.uint8)
    with torch.no_grad():
        pyramid = tokenizer.decode_pyramid(tokenizer.encode(tokenizer.preprocess(padded[0], crop=False)).mode())
    expected = [to_uint8(x)[0][:, : -(-10 * s // 4), : -(-7 * s // 4)] for s, x in zip((1, 2, 4), pyramid)]
    for ours, theirs in zip(reconstruct_any(tokenizer, image), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_titles_of_a_sheet():
    assert column_titles([["4px", "8px"], ["4px", "8px"]], (1, 2)) == ["4px", "8px"]
    assert column_titles([["4px", "8x6px"], ["4px", "8px"]], (1, 2)) == ["1/2 size", "full size"]
    assert column_titles([["1px", "1px", "2px"]], (1, 2, 16)) == ["1/16 size", "1/8 size", "full size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a", "b"],
            "b has no image named x (and 1 more): images are paired by name; --suffix=TEXT is for a suffix of the",
        ),
        (["a", "b", "--suffix=_out"], "b has no image whose name ends in _out"),
        (["a", "b", "--suffix=-1"], "b has no image named y-1: images are paired by name"),
        (["b", "a", "--suffix=x"], "a has no image named x-1x"),
    ],
)
def test_suffixes_that_do_not_fit(hieratok, arguments, message):
    save_photo("a/x.png", 16, 16)
    save_photo("a/y.png", 16, 16)
    save_photo("b/x-1.png", 16, 16)
    _, error = hieratok("evaluate", "images", *arguments, "--features", "none", "--lpips", "[]")
    assert message in error


def test_a_suffix_pairs_folders_of_any_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/cat/1.png", "a/dog/1.png", "b/cat/1_rec.png", "b/dog/1_rec.png", "b/sheet.png"):
        save_photo(name, 16, 16)
    ids, in_a, in_b = pair(open_images("a"), open_images("b"), "a", "b", "_rec")
    assert ids == ["cat-1", "dog-1"]
    assert in_a == [0, 1]
    assert [open_images("b").name(i) for i in in_b] == ["cat/1_rec.png", "dog/1_rec.png"]
