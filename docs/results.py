"""Pictures and curves of docs/results.md, from finished runs.

    python docs/results.py SINGLE MULTI STAGE2 DIT_SINGLE DIT_MULTI --data 'imagenette/val-*.tar'

SINGLE, MULTI and STAGE2 are run folders of tiny-single, tiny-multi and tiny-multi-stage2; DIT_SINGLE and DIT_MULTI of
dit-tiny on the latents of the first two.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from hieratok import HieraTok
from hieratok.core.pictures import picture_table
from hieratok.data.images import center_crop, evenly_spread, open_source
from hieratok.evaluation.pixels import psnr
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import SampleConfig
from hieratok.tasks.reconstruct import reconstruct_any
from hieratok.training.generator import decoded_samples
from hieratok.training.run_folder import LOG, read_log
from hieratok.training.tokenizer import reconstruct_pyramid

DOCS = Path(__file__).parent
NUM_IMAGES = 6
INK, SECOND = "#1f5fa8", "#c2571a"


def main() -> None:
    """Write imagenette.webp, tiles.webp, stage2.webp, stage2-curves.webp and samples.webp."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("single", "multi", "stage2", "dit_single", "dit_multi"):
        parser.add_argument(name)
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    single, multi, stage2 = (HieraTok.from_pretrained(run) for run in (args.single, args.multi, args.stage2))
    source = evenly_spread(open_source(args.data), NUM_IMAGES)
    originals = torch.stack([center_crop(source.image(i), multi.config.image_size) for i in range(len(source))])
    pyramid = reconstruct_pyramid(multi, originals)
    columns = {
        "original": originals,
        "single scale": reconstruct_pyramid(single, originals)[-1],
        **{f"multi scale, {x.shape[-1]} px": x for x in reversed(pyramid)},
    }
    save(picture_table(columns), DOCS / "imagenette.webp")
    draw_tiles(multi, DOCS / "tiles.webp")
    after = reconstruct_pyramid(stage2, originals)[-1]
    save(picture_table({"original": originals, "stage 1": pyramid[-1], "stage 2": after}), DOCS / "stage2.webp")
    draw_curves(Path(args.stage2), DOCS / "stage2-curves.webp")
    config = SampleConfig("euler", steps=50, num=30, batch_size=30, labels="balanced")
    samples = {}
    for name, run, tokenizer in (("single scale", args.dit_single, single), ("multi scale", args.dit_multi, multi)):
        ((_, images),) = decoded_samples(DiT.from_pretrained(run), tokenizer, config)
        samples |= {f"{name} {row + 1}": images[10 * row : 10 * row + 10] for row in range(3)}
    save(picture_table(samples), DOCS / "samples.webp")


def save(picture: Image.Image, path: Path) -> None:
    """A small file."""
    picture.save(path, quality=82, method=6)


def draw_tiles(tokenizer: HieraTok, path: Path) -> None:
    """A bundled photo decoded in tiles and whole, and four times their difference around grey."""
    source = open_source("bundled:train")  # on which the runs of this page were not trained
    photo = source.image(2)
    tiles, whole = reconstruct_any(tokenizer, photo)[-1], reconstruct_pyramid(tokenizer, photo[None])[-1][0]
    difference = (128 + 4 * (tiles.int() - whole.int())).clamp(0, 255).to(torch.uint8)
    for name, image in (("tiles", tiles), ("whole", whole)):
        print(f"{source.name(2)}, {name}: {psnr(image[None], photo[None]).item():.2f} dB")
    print(f"tiles against whole: {psnr(tiles[None], whole[None]).item():.2f} dB")
    columns = {"photo": photo, "in tiles": tiles, "whole": whole, "4 x difference": difference}
    save(picture_table({name: image[None] for name, image in columns.items()}), path)


def draw_curves(run: Path, path: Path) -> None:
    """Losses of a stage-2 run over its steps."""
    import matplotlib.pyplot as plt

    log = read_log(run / LOG)
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), constrained_layout=True)
    perceptual = next(name for name in log[0] if name.startswith(("perceptual", "lpips")) and "/" not in name)
    panels = [
        ("reconstruction", [("l1", "L1", INK), (perceptual, "perceptual", SECOND)]),
        ("discriminator's loss", [("discriminator/loss", "hinge", INK)]),
        ("mean logits", [("logits/real", "real", INK), ("logits/fake", "reconstructed", SECOND)]),
    ]
    for axis, (title, lines) in zip(axes, panels):
        for name, label, colour in lines:
            axis.plot([r["step"] for r in log], [r[name] for r in log], label=label, color=colour, linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
