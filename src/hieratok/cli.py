"""The command line: thin subcommands over the package. torch is imported only by the commands that need it."""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hieratok import __version__
from hieratok.errors import Stopped, TrainingError

DESCRIPTION = "hieratok: multi-scale visual tokenizers (HieraTok, arXiv 2509.23736)"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (`{self.prog} --help` shows how)")


def parser(command: str, description: str, example: str) -> Parser:
    """A subcommand's parser; its help ends in an example."""
    return Parser(
        prog=f"hieratok {command}",
        description=description,
        epilog=f"example: hieratok {command} {example}".rstrip(),
    )


def quickstart(argv: list[str]) -> None:
    """Train a small tokenizer on bundled photos in minutes on a CPU; ends in a page of pictures."""
    p = parser("quickstart", str(quickstart.__doc__), "")
    p.add_argument("--out", default="runs/quickstart", help="folder to write to (default: %(default)s)")
    args = p.parse_args(argv)
    from hieratok.quickstart import quickstart as run

    run(Path(args.out))


def recipes(argv: list[str]) -> None:
    """List recipes, or print one as YAML that `train` accepts."""
    p = parser("recipes", str(recipes.__doc__), "f16d16-multi > mine.yaml")
    p.add_argument("name", nargs="?", help="print this one")
    args = p.parse_args(argv)
    from hieratok import recipes as book

    if args.name:
        import yaml

        from hieratok.training.run_folder import plain

        print(yaml.safe_dump(plain(book.get(args.name)), sort_keys=False), end="")
        return
    width = max(map(len, book.RECIPES))
    for name in book.RECIPES:
        print(f"{name:<{width}}  {book.summary(name)}")


def train(argv: list[str]) -> None:
    """Train a recipe or a YAML file; the same command again resumes."""
    from hieratok.evaluation.processes import leaving_processes
    from hieratok.settings import kind_of, load_run, make_parser, read_settings
    from hieratok.training.generator import GeneratorRun, train_generator
    from hieratok.training.tokenizer import train_tokenizer

    source = argv[0] if argv and not argv[0].startswith("-") else None
    if {"-h", "--help"} & set(argv):
        settings = read_settings(source) if source else {}
        return make_parser(kind_of(settings, source or ""), settings).print_help()
    if source is None:
        raise ValueError("what to train comes first: hieratok train RECIPE|FILE.yaml (`hieratok recipes` lists them)")
    run, out, allow_changes = load_run(source, argv[1:])
    with leaving_processes():
        if isinstance(run, GeneratorRun):
            train_generator(run, out, allow_changes)
        else:
            train_tokenizer(run, out, allow_changes)
    if isinstance(run, GeneratorRun):
        sample = f"hieratok sample {out} --tokenizer {run.tokenizer or 'RUN'}"
        following = f"{sample} --sampler {'ddpm' if run.model.objective == 'ddpm' else 'heun'} --out {out / 'samples'}"
    else:
        following = f"hieratok reconstruct {out} PHOTO.jpg --out {out / 'reconstructions'}"
    if os.environ.get("RANK", "0") == "0":
        print(f"{run.kind}: {out / run.kind}\nlog:       {out / 'log.jsonl'} (tensorboard --logdir {out})")
        print(f"next:      {following}")


def reconstruct(argv: list[str]) -> None:
    """Encode and decode photos: every scale as PNG, and one contact sheet."""
    p = parser("reconstruct", str(reconstruct.__doc__), "runs/quickstart photos/ --out reconstructions")
    p.add_argument("run", help="run folder, tokenizer folder or hub id")
    p.add_argument("images", nargs="+", help="image files, folders or globs")
    p.add_argument("--out", required=True, help="folder to write to")
    p.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    p.add_argument("--crop", action="store_true", help="cut images to the tokenizer's size first, as evaluation does")
    args = p.parse_args(argv)
    from hieratok.reconstruct import best_device
    from hieratok.reconstruct import reconstruct as run
    from hieratok.tokenizer.model import HieraTok

    written = run(HieraTok.from_pretrained(args.run), args.images, args.out, args.device or best_device(), args.crop)
    print(f"{len(written) - 1} pictures and {written[-1]}")


def cost(argv: list[str]) -> None:
    """Parameters, FLOPs and tokens of a recipe's tokenizer, beside the paper's (table 7)."""
    p = parser("cost", str(cost.__doc__), "f16d16-multi --json")
    p.add_argument("recipe", help="recipe, or YAML file")
    p.add_argument("--json", action="store_true", help="print JSON")
    args = p.parse_args(argv)
    from dataclasses import asdict

    from hieratok.cost import measure, table
    from hieratok.settings import load_run
    from hieratok.training.tokenizer import TokenizerRun

    run = load_run(args.recipe).run
    if not isinstance(run, TokenizerRun):
        raise ValueError(f"{args.recipe} trains a generator; cost is of tokenizers")
    result = measure(run.model)
    print(json.dumps(asdict(result)) if args.json else table(run.name, result))


def evaluate(argv: list[str]) -> None:
    """Judge reconstructions or samples: rFID, PSNR, SSIM, LPIPS; FID, sFID, IS, KID, precision, recall."""
    kinds = {
        "reconstruction": ("EvaluateReconstruction", ["run"]),
        "images": ("EvaluateImages", ["a", "b"]),
        "samples": ("EvaluateSamples", ["path"]),
        "stats": ("EvaluateStats", ["path"]),
        "compare": ("EvaluateCompare", ["a", "b"]),
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: hieratok evaluate {{{','.join(kinds)}}} [OPTIONS]\n\n{evaluate.__doc__}")
        print("`hieratok evaluate KIND --help` shows a kind's options and an example.")
        return
    if argv[0] not in kinds:
        raise ValueError(f"no evaluation {argv[0]!r}: choose from {', '.join(kinds)}")
    from hieratok import evaluate_page
    from hieratok.evaluation import evaluate as protocols
    from hieratok.reconstruct import evaluate_tokenizer
    from hieratok.settings import load_options

    class_name, positionals = kinds[argv[0]]
    options = load_options(getattr(protocols, class_name), positionals, f"hieratok evaluate {argv[0]}", argv[1:])
    run = {
        "reconstruction": evaluate_tokenizer,
        "images": lambda options: protocols.evaluate_images(options, evaluate_page.write),
        "samples": lambda options: protocols.evaluate_samples(options, evaluate_page.write),
        "stats": protocols.write_statistics,
        "compare": protocols.compare,
    }[argv[0]]
    run(options)


def analyze(argv: list[str]) -> None:
    """Measure a tokenizer's latent space: density, commutation, equivariance, spectra, channels, noise."""
    from hieratok.analyze import Analyze
    from hieratok.analyze import analyze as run
    from hieratok.settings import load_options

    run(load_options(Analyze, ["run"], "hieratok analyze", argv))


def report(argv: list[str]) -> None:
    """Put all runs of a folder on one page: how far each got, settings that differ, curves, metrics, pictures."""
    from hieratok.gallery import Report, write_report
    from hieratok.settings import load_options

    write_report(load_options(Report, ["folder"], "hieratok report", argv))


def latents(argv: list[str]) -> None:
    """Write the latents of images, for training generators; the same command again goes on."""
    from hieratok.latents import WriteLatents, write_latents
    from hieratok.settings import load_options

    write_latents(load_options(WriteLatents, ["run"], "hieratok latents", argv))


def study(argv: list[str]) -> None:
    """Run a table or figure of the paper at a size that fits, beside the paper's numbers; the same command goes on."""
    from hieratok.evaluation.processes import leaving_processes
    from hieratok.settings import load_options
    from hieratok.study import RunStudy, run_study

    options = load_options(RunStudy, ["study"], "hieratok study", argv)
    with leaving_processes():
        run_study(options)


def bench(argv: list[str]) -> None:
    """Time this machine: attention, decoding, training, sampling, data and evaluation, as shares of its limit."""
    from hieratok.bench import Bench
    from hieratok.bench import bench as run
    from hieratok.settings import load_options

    run(load_options(Bench, ["what"], "hieratok bench", argv))


def sample(argv: list[str]) -> None:
    """Draw images from a generator, at one scale or at all; the same command again draws what is missing."""
    from hieratok.sample import Sample
    from hieratok.sample import sample as run
    from hieratok.settings import load_options

    run(load_options(Sample, ["run"], "hieratok sample", argv))


def push(argv: list[str]) -> None:
    """Publish a run's tokenizer or generator on the Hugging Face hub, with a model card made from the run."""
    from hieratok.hub import Push
    from hieratok.hub import push as run
    from hieratok.settings import load_options

    run(load_options(Push, ["run", "hub_id"], "hieratok push", argv))


def app(argv: list[str]) -> None:
    """Drop photos into a page in the browser and see what is kept at each scale; with a generator, draw samples."""
    from hieratok.app import ServeApp, serve
    from hieratok.settings import load_options

    serve(load_options(ServeApp, ["run"], "hieratok app", argv))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": quickstart,
    "recipes": recipes,
    "train": train,
    "reconstruct": reconstruct,
    "cost": cost,
    "evaluate": evaluate,
    "analyze": analyze,
    "report": report,
    "latents": latents,
    "sample": sample,
    "study": study,
    "app": app,
    "push": push,
    "bench": bench,
}


def usage() -> str:
    """The top-level help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            DESCRIPTION,
            "",
            "usage: hieratok COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "`hieratok COMMAND --help` shows a command's options and an example.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on standard error and exit status 2, a failed run 1."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold bytes that are no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"hieratok {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return fail(f"no command {name!r}{hint} (`hieratok --help` lists them)", 2)
    try:
        COMMANDS[name](rest)
    except KeyboardInterrupt:
        resumes = name in ("train", "quickstart", "study")
        if name in ("latents", "sample"):
            return fail("interrupted: the same command does the rest", 130)
        return fail("interrupted" + ": the same command goes on from the last checkpoint" * resumes, 130)
    except Stopped as error:
        return fail(str(error), 143)  # as a process ended by SIGTERM, so that no script takes the run for finished
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error), 2)
    except (TrainingError, OSError) as error:
        return fail(str(error), 1)
    return 0


def fail(message: str, status: int) -> int:
    """Print one line, without what a terminal would take for an order; return the exit status."""
    from hieratok.files import shown

    print(f"hieratok: {shown(' '.join(message.split()))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
