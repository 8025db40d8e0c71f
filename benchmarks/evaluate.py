"""Time the whole evaluation of samples (FID, IS, KID, precision, recall) beside torch-fidelity's.

    python benchmarks/evaluate.py                  # 1,000 images in each set: about eight minutes on two CPU cores
    python benchmarks/evaluate.py --num 50         # a first look

Both read the same PNG files, run the same Inception network from the same weights' file on the same device, and compute
the same metrics but for sFID, which only hieratok has. Speed does not depend on the weights' values: without --weights
a seeded random network takes their place. The metrics of both are printed, as they have to agree, and then the ratio.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from hieratok.data.images import open_source
from hieratok.evaluation.config import EvaluateSamples
from hieratok.evaluation.distribution import IS_SPLIT_SIZE
from hieratok.evaluation.features import Inception
from hieratok.evaluation.protocols import evaluate_samples

THEIR_KEYS = {
    "fid": "frechet_inception_distance",
    "is": "inception_score_mean",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


def seeded_weights(path: Path) -> None:
    """A random network in the layout of the real file."""
    generator = torch.Generator().manual_seed(0)
    network = Inception()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    torch.save(network.state_dict(), path)


def write_images(folder: Path, num: int, size: int, seed: int) -> None:
    """Random crops of the bundled photos."""
    folder.mkdir()
    source = open_source("bundled:train")
    generator = torch.Generator().manual_seed(seed)
    for i in range(num):
        photo = source.image(i % len(source))
        top, left = (int(torch.randint(0, side - size + 1, (), generator=generator)) for side in photo.shape[1:])
        crop = photo[:, top : top + size, left : left + size]
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(folder / f"{i:06}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1000, help="images in each of the two sets")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--weights", help="the weights of Inception (default: random)")
    parser.add_argument("--out", help="JSON file to write the figures to")
    args = parser.parse_args()
    from torch_fidelity import calculate_metrics

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = args.weights or str(folder / "seeded.pth")
        if not args.weights:
            seeded_weights(Path(weights))
        samples, reference = folder / "samples", folder / "reference"
        write_images(samples, args.num, args.size, seed=0)
        write_images(reference, args.num, args.size, seed=1)

        started = time.perf_counter()
        options = EvaluateSamples(
            path=str(samples), reference=str(reference), weights=weights, batch_size=args.batch_size
        )
        with contextlib.redirect_stdout(io.StringIO()):
            result = evaluate_samples(options).numbers.finest
        ours = time.perf_counter() - started

        started = time.perf_counter()
        theirs_result = calculate_metrics(
            input1=str(samples),
            input2=str(reference),
            fid=True,
            isc=True,
            isc_splits=max(1, args.num // IS_SPLIT_SIZE),
            kid=True,
            prc=True,
            kid_subset_size=min(1000, args.num),
            feature_extractor="inception-v3-compat",  # for precision and recall too, whose default is VGG-16
            feature_extractor_weights_path=weights,
            batch_size=args.batch_size,
            cuda=torch.cuda.is_available(),
            cache=False,
            verbose=False,
        )
        theirs = time.perf_counter() - started

    figures = {
        "images": args.num,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "hieratok seconds": round(ours, 1),
        "torch-fidelity seconds": round(theirs, 1),
        "ratio": round(theirs / ours, 2),
    }
    inception = {"fid": "fd-", "is": "class-score-", "kid": "kd-"}  # how they are called without the real weights
    for key, their_key in THEIR_KEYS.items():
        start = inception.get(key, key)
        mine = next(v for k, v in result.items() if k == key or k.startswith(start))
        figures[key] = [mine, float(theirs_result[their_key])]
        print(f"{key:<10} hieratok {mine:<14.8g} torch-fidelity {theirs_result[their_key]:<14.8g}")
    print(f"{ours:.1f} s beside {theirs:.1f} s: hieratok is {theirs / ours:.2f} times as fast as torch-fidelity")
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
