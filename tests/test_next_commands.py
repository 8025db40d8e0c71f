"""Commands that follow from each other: what one prints as the next one works as printed."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok import HieraTok, TokenizerConfig, cli
from hieratok.data.latents import whose
from hieratok.generation.config import SAMPLERS, SampleConfig
from hieratok.generation.dit import DiTConfig
from hieratok.generation.sampling import fitted

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
    changed = "run as it was before: its weights have changed since"
    assert f"latents holds latents of {changed}" in hieratok(*write)[1]
    assert f"latents holds latents of {changed}" in hieratok(*train)[1]
    assert f"dit was trained on latents of {changed}" in hieratok(*sample)[1]


def test_one_folder_has_many_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "weights have changed" in whose("runs/a", f"{tmp_path}/runs/a/")
    assert whose("runs/a", "runs/b") == "another tokenizer, runs/a, than runs/b"
    assert whose(None, "runs/b") == "another tokenizer than runs/b"
