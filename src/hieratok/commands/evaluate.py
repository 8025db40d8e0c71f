"""`hieratok evaluate`: five protocols, each with its own options."""

from hieratok.core.messages import nearest
from hieratok.evaluation.config import (
    EvaluateCompare,
    EvaluateImages,
    EvaluateReconstruction,
    EvaluateSamples,
    EvaluateStats,
)
from hieratok.settings import Command, command, overview

SUMMARY = "Evaluate reconstructions or samples: rFID, PSNR, SSIM, LPIPS; FID, sFID, IS, KID, precision, recall."


def reconstruction(options: EvaluateReconstruction) -> None:
    """`hieratok evaluate reconstruction`."""
    from hieratok.reports import evaluation
    from hieratok.tasks.reconstruct import evaluate_tokenizer

    evaluate_tokenizer(options, evaluation.write)


def images(options: EvaluateImages) -> None:
    """`hieratok evaluate images`."""
    from hieratok.evaluation.protocols import evaluate_images
    from hieratok.reports import evaluation

    evaluate_images(options, evaluation.write)


def samples(options: EvaluateSamples) -> None:
    """`hieratok evaluate samples`."""
    from hieratok.evaluation.protocols import evaluate_samples
    from hieratok.reports import evaluation

    evaluate_samples(options, evaluation.write)


def stats(options: EvaluateStats) -> None:
    """`hieratok evaluate stats`."""
    from hieratok.evaluation.protocols import write_statistics

    write_statistics(options)


def compare(options: EvaluateCompare) -> None:
    """`hieratok evaluate compare`."""
    from hieratok.evaluation.protocols import compare

    compare(options)


KINDS = {
    "reconstruction": command("evaluate reconstruction", EvaluateReconstruction, reconstruction, "run"),
    "images": command("evaluate images", EvaluateImages, images, "a", "b"),
    "samples": command("evaluate samples", EvaluateSamples, samples, "path"),
    "stats": command("evaluate stats", EvaluateStats, stats, "path"),
    "compare": command("evaluate compare", EvaluateCompare, compare, "a", "b"),
}


def main(arguments: list[str]) -> None:
    """The command: the first word says which protocol.

    Raises:
        ValueError: there is no such protocol.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_of_all())
        return
    kind, *rest = arguments
    if kind not in KINDS:
        raise ValueError(f"no evaluation {kind!r}{nearest(kind, KINDS)}: choose from {', '.join(KINDS)}")
    KINDS[kind].main(rest)


def help_of_all() -> str:
    """The help of `hieratok evaluate`, without a protocol."""
    example = "hieratok evaluate reconstruction runs/photos --data val"
    last = "`hieratok evaluate KIND --help` shows a kind's options and an example."
    return overview("hieratok evaluate KIND ... [OPTIONS]", SUMMARY, example, "kinds", KINDS, last)


COMMAND = Command(SUMMARY, main, kinds=KINDS)
