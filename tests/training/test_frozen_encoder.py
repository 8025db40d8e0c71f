"""Training a decoder on latents that already exist: from images, from cached latents, resumed, and from the command."""

import json
from dataclasses import replace

import pytest
import torch

from helpers.frozen import on_autoencoder, save_autoencoder, save_vit
from helpers.models import save_photos
from helpers.runs import assert_same_run, crash_in_step, final_state, small_run
from hieratok import HieraTok
from hieratok.cli import main
from hieratok.data.images import ImageDataset, open_source
from hieratok.data.latents import ImagesAndLatents, LatentDataset
from hieratok.settings import load_run
from hieratok.tokenizer.frozen import Autoencoder
from hieratok.training.config import DataConfig, TokenizerRun
from hieratok.training.tokenizer import train_tokenizer


@pytest.fixture
def vae(tmp_path):
    return save_autoencoder(tmp_path / "vae")


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    return save_photos(tmp_path / "photos")


def run_on(vae, photos, **changes) -> TokenizerRun:
    run = small_run(photos)
    data = DataConfig(path=str(photos), num_workers=0, crop="center")
    loss = replace(run.loss, kl_weight=0.0)
    return replace(run, model=on_autoencoder(vae), data=data, loss=loss, latent_noise=0.3, **changes)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images went through the frozen encoder, call by call."""
    calls, original = [], Autoencoder.moments

    def moments(self, images, grid):
        calls.append(len(images))
        return original(self, images, grid)

    monkeypatch.setattr(Autoencoder, "moments", moments)
    return calls


def test_cached_latents_train_what_the_photos_train_and_the_encoder_runs_once(vae, photos, tmp_path, encoded):
    train_tokenizer(run_on(vae, photos), tmp_path / "images")
    without_cache = sum(encoded)
    encoded.clear()
    train_tokenizer(run_on(vae, photos, cache_latents=True), tmp_path / "cached")
    assert without_cache - sum(encoded) == 12 * 4 - 2 * 11  # every step's images, against all photos and mirror images
    a, b = final_state(tmp_path / "images"), final_state(tmp_path / "cached")
    assert a.keys() == b.keys()
    for name, value in a.items():  # batches of another size round differently
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_resumed_run_is_the_same_to_the_bit(vae, photos, tmp_path):
    run = run_on(vae, photos, cache_latents=True)
    train_tokenizer(run, tmp_path / "whole")
    crash_in_step(7, lambda: train_tokenizer(run, tmp_path / "resumed"))
    train_tokenizer(run, tmp_path / "resumed")
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert (tmp_path / "whole/latents/manifest.json").is_file()


def test_the_trained_tokenizer_knows_its_encoder(vae, photos, tmp_path):
    run = run_on(vae, photos, copy_encoder=True)
    trained = train_tokenizer(run, tmp_path / "run")
    config = json.loads((tmp_path / "run/tokenizer/config.json").read_text())
    assert config["encoder_sha256"] == trained.encoder_sha256
    assert (tmp_path / "run/tokenizer/encoder/diffusion_pytorch_model.safetensors").is_file()
    assert torch.isfinite(trained.latent_mean).all()
    for step in (tmp_path / "run/checkpoints").glob("step-*"):
        assert json.loads((step / "tokenizer/config.json").read_text())["encoder_sha256"] == trained.encoder_sha256
    assert not list((tmp_path / "run/checkpoints").glob("*/tokenizer/encoder"))


def test_stage_2_begins_with_the_same_encoder_or_not_at_all(vae, photos, tmp_path):
    train_tokenizer(run_on(vae, photos), tmp_path / "one")
    second = run_on(vae, photos, start_from=str(tmp_path / "one"), name="two")
    trained = train_tokenizer(replace(second, train=replace(second.train, steps=1)), tmp_path / "two")
    assert trained.config.encoder_sha256
    other = save_autoencoder(tmp_path / "other", seed=1)
    third = replace(second, model=on_autoencoder(other), name="three")
    with pytest.raises(ValueError, match=r"is a tokenizer of another shape: model.encoder 'diffusers:"):
        train_tokenizer(third, tmp_path / "three")
    moved = json.loads((tmp_path / "one/tokenizer/config.json").read_text()) | {"encoder": f"diffusers:{other}"}
    (tmp_path / "one/tokenizer/config.json").write_text(json.dumps(moved))
    with pytest.raises(ValueError, match="was trained with other weights of diffusers:"):
        train_tokenizer(third, tmp_path / "three")


def test_missing_weights_are_found_out_before_training(photos, tmp_path):
    run = run_on(save_autoencoder(tmp_path / "vae"), photos)
    gone = replace(run, model=replace(run.model, encoder=f"diffusers:{tmp_path / 'gone'}"))
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        train_tokenizer(gone, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    known = replace(gone, model=replace(gone.model, encoder_sha256="0" * 64))  # which nothing needs to be read for
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        train_tokenizer(known, tmp_path / "known")
    assert not list((tmp_path / "known").glob("checkpoints/*"))


def test_images_and_their_latents_are_mirrored_alike(vae, photos, tmp_path):
    run = run_on(vae, photos, cache_latents=True)
    train_tokenizer(replace(run, train=replace(run.train, steps=1)), tmp_path / "run")
    images = ImageDataset(open_source(str(photos)), 32, "center", flip=True, seed=3)
    both = ImagesAndLatents(images, LatentDataset(tmp_path / "run/latents", flip=True, seed=3))
    tokenizer = HieraTok.from_pretrained(tmp_path / "run")
    assert len(both) == 11
    for epoch in range(3):
        for index in range(11):
            item = both[index, epoch]
            z = tokenizer.encode(item["image"][None].float() / 127.5 - 1).mean[0]
            torch.testing.assert_close(item["mean"], z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vf=dict(weight=0.1)), "vf.weight must be 0 beside a frozen"),
        (dict(loss=dict(kl_weight=1e-6)), "loss.kl_weight must be 0 beside a frozen"),
        (dict(freeze_encoder=True, start_from="x"), "leave out freeze_encoder"),
        (dict(cache_latents=True, data=dict(crop="random-resized")), "cache_latents needs data.crop center"),
        (dict(cache_latents=True, data=dict(on_bad_image="skip")), "cache_latents needs data.crop center"),
        (dict(latent_noise=-1.0), "latent_noise must not be negative"),
    ],
)
def test_settings_that_do_not_fit(changes, message, vae, photos):
    run = run_on(vae, photos)
    nested = {k: replace(getattr(run, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        replace(run, **nested)


def test_a_cache_is_for_frozen_encoders(photos):
    for name in ("cache_latents", "copy_encoder"):
        with pytest.raises(ValueError, match=f"{name} is for a frozen model.encoder"):
            replace(small_run(photos), **{name: True})


# --- from the command line --------------------------------------------------------------------------------------------


def test_the_flag_encoder_sets_what_follows_from_it(vae, tmp_path):
    run = load_run("tiny-multi", ["--encoder", f"diffusers:{vae}", "--model.image_size", "64"]).run
    assert isinstance(run, TokenizerRun)
    assert (run.model.latent_channels, run.model.patch_size, run.model.scales) == (4, 4, (1, 2, 4, 8, 16))
    assert run.loss.kl_weight == 0
    assert run.model.decoder_width == load_run("tiny-multi").run.model.decoder_width
    file = save_vit(tmp_path / "vit.safetensors")
    flags = ["--encoder", "timm:test_vit", "--model.encoder_weights", str(file), "--model.scales", "[2,8]"]
    run = load_run("tiny-multi", flags).run
    assert (run.model.latent_channels, run.model.encoder_weights) == (64, str(file))
    assert run.model.scales == (2, 8)
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        load_run("tiny-multi", ["--encoder", "diffusers:none"])
    with pytest.raises(ValueError, match=r"model.encoder must be"):
        load_run("tiny-multi", ["--encoder", "sd"])


def test_from_training_to_reconstruction(vae, photos, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--encoder", f"diffusers:{vae}", "--data", str(photos), "--data.crop", "center", "--cache_latents"]
    sizes = ["--model.image_size", "32", "--model.scales", "[1,2,8]", "--train.batch_size", "4"]
    flags += ["--data.num_workers", "0"]
    assert main(["train", "tiny-multi", *flags, *sizes, "--train.steps", "2", "--out", str(out)]) == 0
    photo = str(next(photos.rglob("*.png")))
    assert main(["reconstruct", str(out), photo, "--out", str(tmp_path / "pictures")]) == 0
    how = ["--features", "none", "--lpips", "[]", "--out", str(tmp_path / "evaluation")]
    assert main(["evaluate", "reconstruction", str(out), "--data", str(photos), *how]) == 0
    assert main(["latents", str(out), "--data", str(photos), "--out", str(tmp_path / "latents")]) == 0
    capsys.readouterr()
    assert main(["train", "tiny-multi", "--encoder", "diffusers:none", "--data", str(photos)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "no such folder" in error[0]
