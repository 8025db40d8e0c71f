"""Small frozen encoders in their real layouts, with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hieratok import TokenizerConfig
from hieratok.tokenizer.frozen import with_encoder

VIT = "test_vit"
"""timm's smallest vision transformer: 64 channels, patches of 16."""
DECODER = TokenizerConfig(
    image_size=32,
    patch_size=4,
    latent_channels=4,
    scales=(1, 2, 4, 8),
    decoder_width=24,
    decoder_depth=1,
    decoder_heads=2,
    init_std=0.3,
)


def save_autoencoder(folder: Path, kind: str = "AutoencoderKL", seed: int = 0, **changes: Any) -> Path:
    """Of diffusers, f 4, d 4."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    settings: dict[str, dict[str, Any]] = {
        "AutoencoderKL": dict(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.7,
            shift_factor=0.1,
        ),
        "AutoencoderTiny": dict(
            encoder_block_out_channels=(8,) * 3,
            decoder_block_out_channels=(8,) * 3,
            num_encoder_blocks=(1,) * 3,
            num_decoder_blocks=(1,) * 3,
            latent_channels=4,
        ),
        "AutoencoderDC": dict(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.41,
        ),
    }
    getattr(diffusers, kind)(**{**settings[kind], **changes}).save_pretrained(folder)
    return folder


def save_vit(file: Path, seed: int = 0) -> Path:
    """Weights of `VIT` as timm publishes them."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(seed)
    network = timm.create_model(VIT)
    with torch.no_grad():  # a norm's scale and shift are ones and zeros at the start
        network.norm.weight.normal_()
        network.norm.bias.normal_()
    save_file(network.state_dict(), file)
    return file


def on_autoencoder(folder: Path, **changes: Any) -> TokenizerConfig:
    """A multi-scale decoder for its latents."""
    return with_encoder(DECODER, f"diffusers:{folder}", **changes)


def on_vit(file: Path, **changes: Any) -> TokenizerConfig:
    """A multi-scale decoder for its features: an 8 x 8 grid, so that it sees 128 px."""
    return with_encoder(DECODER, f"timm:{VIT}", encoder_weights=str(file), **changes)
