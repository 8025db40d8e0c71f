"""Tokenizers whose encoder was trained elsewhere: their latents, files and errors."""

import copy
import json
import re
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from helpers.frozen import DECODER, VIT, on_autoencoder, on_vit, save_autoencoder, save_vit
from helpers.models import CONFIG
from hieratok import HieraTok, TokenizerConfig
from hieratok.tokenizer.frozen import with_encoder

KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


def images(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=["autoencoder", "vit"])
def frozen(request, tmp_path) -> TokenizerConfig:
    if request.param == "vit":
        return on_vit(save_vit(tmp_path / "vit.safetensors"))
    return on_autoencoder(save_autoencoder(tmp_path / "vae"))


# --- what the latents are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoders_latents_are_what_its_pipelines_denoise(kind, tmp_path):
    import diffusers

    folder = save_autoencoder(tmp_path / "vae", kind)
    tokenizer = HieraTok(on_autoencoder(folder)).eval()
    model: Any = getattr(diffusers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        output = model.encode(images())
    posterior = tokenizer.encode(images())
    if kind == "AutoencoderKL":
        expected = (output.latent_dist.mean - 0.1) * 0.7
        variance = output.latent_dist.var * 0.7**2
        torch.testing.assert_close(posterior.logvar.exp(), variance)
    else:
        expected = output.latents if kind == "AutoencoderTiny" else output.latent * 0.41
        assert posterior.logvar.exp().sqrt().max() < 1e-6  # deterministic
    torch.testing.assert_close(posterior.mean, expected)
    assert [image.shape[-1] for image in tokenizer.decode_pyramid(posterior.mode())] == [4, 8, 16, 32]


def test_a_vits_latents_are_its_features_normalised_without_scale_and_shift(tmp_path):
    import timm

    file = save_vit(tmp_path / "vit.safetensors")
    tokenizer = HieraTok(on_vit(file)).eval()
    network: Any = timm.create_model(VIT, dynamic_img_size=True).eval()
    network.load_state_dict(load_file(file))
    network.norm = torch.nn.LayerNorm(64, eps=1e-6, elementwise_affine=False)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    enlarged = F.interpolate(images(), (128, 128), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        features = network.forward_features(((enlarged + 1) / 2 - mean) / std)[:, network.num_prefix_tokens :]
    expected = features.mT.unflatten(2, (8, 8))
    z = tokenizer.encode(images()).mode()
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z.var(dim=1, correction=0), torch.ones(2, 8, 8), rtol=1e-3, atol=1e-3)


def test_images_of_any_size_are_padded_to_whole_latents(frozen):
    tokenizer = HieraTok(frozen).eval()
    posterior = tokenizer.encode(images(46))
    assert posterior.mean.shape[-2:] == (12, 12)
    assert tokenizer.decode(posterior.mode(), image_size=posterior.image_size).shape == (2, 3, 46, 46)


# --- frozen -----------------------------------------------------------------------------------------------------------


def test_nothing_of_the_encoder_is_trained_or_saved(frozen):
    tokenizer = HieraTok(frozen)
    without = {name for name in HieraTok(DECODER).state_dict() if not name.startswith("encoder.")}
    pyramid, posterior, _ = tokenizer(images())
    assert tokenizer.state_dict().keys() == without
    assert not any(name.startswith("encoder") for name, _ in tokenizer.named_parameters())
    assert not posterior.mean.requires_grad
    sum(image.square().mean() for image in pyramid).backward()
    network = tokenizer.encoder.load()  # type: ignore[operator]
    assert all(p.grad is None and not p.requires_grad for p in network.module.parameters())
    assert not network.module.training
    tokenizer.train()
    assert not network.module.training


def test_copies_share_the_frozen_network(frozen):
    tokenizer = HieraTok(frozen)
    average = copy.deepcopy(tokenizer)
    assert average.encoder.load() is tokenizer.encoder.load()  # type: ignore[operator]
    assert average.decoder.positions is not tokenizer.decoder.positions


def test_the_global_random_state_is_left_alone(frozen):
    tokenizer = HieraTok(frozen)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tokenizer.encode(images())
    assert torch.equal(torch.rand(3), expected)


def test_noise_is_added_to_what_the_decoder_sees(frozen):
    """Its deviation lies between 0 and what is asked for, and z itself stays clean."""
    tokenizer = HieraTok(frozen).eval()
    seen = []
    tokenizer.decode_pyramid = lambda z: seen.append(z)  # type: ignore[method-assign,assignment]
    posterior = tokenizer.encode(images().repeat(64, 1, 1, 1))
    posterior.logvar.fill_(-30.0)
    for noise in (0.0, 0.8):
        _, _, z = tokenizer(images(), posterior, noise)
        torch.testing.assert_close(z, posterior.mean)
    torch.testing.assert_close(seen[0], posterior.mean)
    deviations = (seen[1] - posterior.mean).flatten(1).std(1)
    assert deviations.max() < 0.8 * 1.15
    assert deviations.min() < 0.1
    assert deviations.mean().item() == pytest.approx(0.4, abs=0.06)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_names_the_encoder_with_its_hash(frozen, tmp_path):
    tokenizer = HieraTok(frozen).eval()
    tokenizer.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["encoder"] == frozen.encoder
    assert re.fullmatch("[0-9a-f]{64}", config["encoder_sha256"])
    assert not any(name.startswith("encoder") for name in load_file(tmp_path / "saved" / "model.safetensors"))
    loaded = HieraTok.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode(images()).mean, tokenizer.encode(images()).mean)
    assert loaded.encoder_sha256 == tokenizer.encoder_sha256 == config["encoder_sha256"]


def test_decoding_needs_no_encoder(tmp_path):
    folder = save_autoencoder(tmp_path / "vae")
    HieraTok(on_autoencoder(folder)).save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    tokenizer = HieraTok.from_pretrained(tmp_path / "saved")
    assert tokenizer.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 32, 32)
    tokenizer.save_pretrained(tmp_path / "again")
    with pytest.raises(FileNotFoundError, match=r"^diffusers:.*vae: no such folder$"):
        tokenizer.encode(images())


def test_a_copy_of_the_encoder_beside_the_tokenizer_is_enough(frozen, tmp_path):
    tokenizer = HieraTok(frozen).eval()
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer.encoder.save(tmp_path / "saved" / "encoder")  # type: ignore[operator]
    z = tokenizer.encode(images()).mean
    for name in ("vae", "vit.safetensors"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert torch.equal(HieraTok.from_pretrained(tmp_path / "saved").encode(images()).mean, z)


def test_other_weights_are_refused(tmp_path):
    file, folder = save_vit(tmp_path / "vit.safetensors"), save_autoencoder(tmp_path / "vae")
    for name, config in (("a", on_vit(file)), ("b", on_autoencoder(folder))):
        HieraTok(config).save_pretrained(tmp_path / name)
    save_vit(file, seed=1)
    shutil.rmtree(folder)
    save_autoencoder(folder, seed=1)
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=r"are not those that this tokenizer was trained with: their SHA-256 is"):
            HieraTok.from_pretrained(tmp_path / name).encode(images())


def test_the_papers_encoder_is_saved_as_it_was_before_there_was_a_choice(tmp_path):
    """Names and order of `config.json`, and of the weights."""
    torch.manual_seed(0)
    HieraTok(CONFIG).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = (
        "model_type image_size patch_size latent_channels scales attention downsample encoder_width encoder_depth"
        " encoder_heads decoder_width decoder_depth decoder_heads mlp_ratio drop_path init_std"
    )
    assert " ".join(config) == names
    assert "encoder.patch_embed.weight" in load_file(tmp_path / "model.safetensors")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(encoder="sd"), "model.encoder must be timm:NAME or diffusers:FOLDER, not 'sd'"),
        (dict(encoder="timm:"), "model.encoder must be timm:NAME or diffusers:FOLDER"),
        (dict(encoder="pickle:x"), "model.encoder must be"),
        (dict(encoder_weights="x"), "are for a frozen model.encoder"),
        (dict(encoder_sha256="0"), "are for a frozen model.encoder"),
        (dict(encoder="diffusers:x", encoder_weights="x"), "model.encoder_weights is for timm: encoders"),
        (dict(encoder="timm:x", encoder_depth=2), "model.encoder_depth is of the paper's encoder: leave it out"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(DECODER, **changes)


def test_another_grid_or_number_of_channels_says_what_to_set(tmp_path):
    folder, file = save_autoencoder(tmp_path / "vae"), save_vit(tmp_path / "vit.safetensors")
    wrong_d = replace(on_autoencoder(folder), latent_channels=8)
    wrong_f = replace(on_autoencoder(folder), patch_size=8, scales=(1, 2, 4))
    for config in (wrong_d, wrong_f):
        with pytest.raises(ValueError, match=r"has latents of 4 channels and 4 pixels a side: set model.patch_size 4"):
            HieraTok(config).encode(images())
    with pytest.raises(ValueError, match=r"has latents of 64 channels: set model.latent_channels 64"):
        HieraTok(replace(on_vit(file), latent_channels=4)).encode(images())


def test_missing_files_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"model.encoder_weights, does not exist"):
        HieraTok(replace(on_vit(save_vit(tmp_path / "x.safetensors")), encoder_weights="none.pth")).encode(images())
    config = replace(DECODER, encoder="diffusers:nobody/such-vae")
    with pytest.raises(FileNotFoundError, match=r"`hf download nobody/such-vae config.json diffusion_pytorch_model.s"):
        HieraTok(config).encode(images())
    with pytest.raises(ValueError, match=r"timm has no model 'nosuch'"):
        HieraTok(replace(DECODER, encoder="timm:nosuch")).encode(images())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match=r"describes a UNet2DModel; of diffusers' models AutoencoderKL"):
        with_encoder(DECODER, f"diffusers:{tmp_path / 'other'}")


# --- what follows from an encoder -------------------------------------------------------------------------------------


def test_shape_follows_from_the_encoder(tmp_path):
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    folder = save_autoencoder(tmp_path / "vae", block_out_channels=(8, 8), **blocks)
    base = TokenizerConfig()
    found = with_encoder(base, f"diffusers:{folder}", image_size=96)
    assert (found.patch_size, found.latent_channels, found.scales) == (2, 4, (3, 6, 12, 24, 48))
    assert found.decoder_width == base.decoder_width
    vit = with_encoder(base, f"timm:{VIT}")
    assert (vit.patch_size, vit.latent_channels, vit.scales) == (16, 64, base.scales)
    single = with_encoder(replace(base, scales=(16,)), f"diffusers:{folder}")
    assert single.scales == (128,)
    assert with_encoder(base, f"diffusers:{folder}", scales=(64, 128)).scales == (64, 128)
    back = with_encoder(found, f"timm:{VIT}", patch_size=16, image_size=256)
    assert back == vit
