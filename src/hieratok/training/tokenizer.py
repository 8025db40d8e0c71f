"""Training a tokenizer: stage 1 (paper, section 4)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from hieratok import checkpoint
from hieratok.data.images import ImageDataset, open_source, to_float, to_uint8
from hieratok.losses.reconstruction import LossConfig, ReconstructionLoss
from hieratok.pictures import pyramid_sheet
from hieratok.tokenizer.model import HieraTok, TokenizerConfig
from hieratok.training.loop import DataConfig, RunFolder, TrainConfig, fit, plain

PICTURE_IMAGES = 6


@dataclass(frozen=True)
class TokenizerRun:
    """A tokenizer's training run, whole: what a recipe returns, a YAML file holds and a run folder keeps."""

    name: str = "tokenizer"
    """Where it is written unless --out says otherwise: runs/NAME."""
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How."""


def train_tokenizer(run: TokenizerRun, out: str | Path) -> HieraTok:
    """Train a tokenizer, or go on with the run in `out`; write `out/tokenizer` at the end.

    Returns:
        The averaged (EMA) tokenizer in evaluation mode.

    Raises:
        ValueError, FileNotFoundError: settings, images or weights that do not fit or are missing.
        TrainingError: the loss is not finite, or the checkpoint to resume from is damaged.
    """
    folder = RunFolder(out, plain(run))
    if run.data.path is None:
        raise ValueError("no images: give --data PATH (a folder of images, WebDataset shards, or `bundled`)")
    size, data = run.model.image_size, run.data
    source = open_source(run.data.path)
    dataset = ImageDataset(source, size, data.crop, data.flip, run.train.seed, data.on_bad_image, data.min_area)
    shown_source = open_source(data.val_path) if data.val_path else source
    shown = picture_images(ImageDataset(shown_source, size, "center", flip=False, on_bad_image=data.on_bad_image))
    criterion = ReconstructionLoss(run.loss, len(run.model.scales))

    torch.manual_seed(run.train.seed)
    model = HieraTok(run.model)

    def compute_loss(tokenizer: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pyramid, posterior = tokenizer(images)
        return criterion.to(images.device)(pyramid, images, posterior)

    ema = fit(
        model,
        compute_loss,
        dataset,
        run.train,
        run.data.num_workers,
        folder,
        draw=lambda tokenizer: reconstruction_sheet(tokenizer, shown),  # type: ignore[arg-type]
    )
    assert isinstance(ema, HieraTok)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return ema
    with checkpoint.atomic_folder(Path(out) / "tokenizer") as finished:
        ema.save_pretrained(finished)
    return ema


def picture_images(dataset: ImageDataset) -> Tensor:
    """A few images spread over a data set: uint8 (B, 3, H, W)."""
    count = min(PICTURE_IMAGES, len(dataset))
    return torch.stack([dataset[i * len(dataset) // count, 0]["image"] for i in range(count)])


def reconstruction_sheet(tokenizer: HieraTok, images: Tensor) -> Image.Image:
    """Every scale's reconstruction beside the original; images uint8 (B, 3, H, W)."""
    return pyramid_sheet(images, reconstruct_pyramid(tokenizer, images))


@torch.no_grad()
def reconstruct_pyramid(tokenizer: HieraTok, images: Tensor) -> list[Tensor]:
    """uint8 (B, 3, H, W) -> every scale's reconstruction from the posterior mean, uint8 (B, 3, H_k, W_k)."""
    device = next(tokenizer.parameters()).device
    z = tokenizer.encode(to_float(images.to(device))).mode()
    return [to_uint8(x).cpu() for x in tokenizer.decode_pyramid(z)]
