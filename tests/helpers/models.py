"""Small saved models, and photos."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hieratok import HieraTok, TokenizerConfig
from hieratok.generation.dit import DiT, DiTConfig, LatentSpace

CONFIG = TokenizerConfig(
    image_size=16,
    patch_size=4,
    latent_channels=4,
    scales=(1, 2, 4),
    encoder_width=16,
    encoder_depth=1,
    encoder_heads=2,
    decoder_width=24,
    decoder_depth=1,
    decoder_heads=2,
    init_std=0.3,
)


def save_tokenizer(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    HieraTok(CONFIG).save_pretrained(folder / "tokenizer")
    return folder


def save_generator(folder: Path, tokenizer: Path, **changes) -> Path:
    """Of a DiT whose prediction depends on everything: DiT's own start would predict zero."""
    settings = dict(latent_channels=4, latent_size=4, width=16, depth=2, heads=2, num_classes=3)
    torch.manual_seed(0)
    generator = DiT(DiTConfig(**{**settings, "objective": "flow", "learn_sigma": False, **changes}))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = HieraTok.from_pretrained(tokenizer).encoder_sha256
    generator.latents = LatentSpace(encoder, (0.1, -0.2, 0.3, 0.0), (0.5, 1.0, 2.0, 1.5))
    generator.save_pretrained(folder / "generator")
    return folder


def save_photos(folder: Path) -> Path:
    """Eleven images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(11):
        image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((21, 18))
        path = folder / ("cat" if i < 6 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder
