"""Everything that is worth measuring on a GPU, by one command: speed, memory, and two tokenizers trained side by side.

    python benchmarks/gpu.py --minutes 25 --data 'photos/train-*.tar' --val 'photos/val-*.tar'
    python benchmarks/gpu.py --minutes 25 --data ... --val ... -- --loss.perceptual_weight 0
    python benchmarks/gpu.py --dry-run                     # the same on a CPU in a minute, with tiny models

1. `hieratok bench all` in bf16, as it is and compiled: time, images/s, memory, and the share of the rate of a large
   matrix product that attention, decoding, a training step and sampling reach.
2. small-single and small-multi, one after the other, for as many steps as fit in the minutes that are left; the same
   images in the same order. Then PSNR and SSIM on --val. What stands after `--` are settings of both runs.

Writes OUT/gpu.json and OUT/index.html after each part. The same command again skips what is done and resumes training.
The recipes' perceptual loss needs VGG-16's weights in torch's cache.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hieratok.bench.config import Bench
from hieratok.bench.suite import Machine, bench, machine_of, training_step
from hieratok.bench.timing import take_turns
from hieratok.core.checkpoint import write_json
from hieratok.core.devices import hardware
from hieratok.core.files import read_json_table
from hieratok.core.tables import Table
from hieratok.evaluation.config import EvaluateReconstruction
from hieratok.reports import page as report
from hieratok.settings import load_run
from hieratok.tasks.reconstruct import evaluate_tokenizer
from hieratok.training.config import TokenizerRun
from hieratok.training.run_folder import LOG, read_log
from hieratok.training.tokenizer import train_tokenizer

SHARE = 0.85
"""Of the time that is left, what training may plan for: start, checkpoints and evaluation take the rest."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="for everything together, about")
    parser.add_argument("--data", help="images to train on; none: nothing is trained")
    parser.add_argument("--val", help="images that are not trained on")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models: figures mean nothing")
    parser.add_argument("settings", nargs="*", help="after --: settings of both training runs")
    options = parser.parse_args()
    if options.data and not options.val:
        parser.error("results are measured on images that were never trained on: give --val PATH")
    if options.dry_run:
        torch.compiler.set_stance("force_eager")  # compiling for a CPU takes minutes
        options.data, options.val = options.data or "bundled:train", options.val or "bundled:val"
    elif not torch.cuda.is_available():
        parser.error("there is no GPU: --dry-run shows on a CPU what would run")
    run(options, time.monotonic() + 60 * options.minutes)


def run(options: argparse.Namespace, end: float) -> None:
    """All parts, in order; `end` on the monotonic clock."""
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"hardware": hardware(), "torch": torch.__version__, "bench": {}, "training": {}}
    for name, compiled in (("as it is", False), ("compiled", True)):
        file = options.out / f"bench{'-compiled' * compiled}.json"
        result["bench"][name] = once(file, lambda file=file, c=compiled: bench(bench_options(options, c, file)))
        write(options.out, result)
    if not options.data:
        return
    runs = training_runs(options)
    machine = machine_of(bench_options(options, False, None))
    steps = once(options.out / "steps.json", lambda: write_json(options.out / "steps.json", plan(runs, machine, end)))
    for name, one in runs.items():
        folder = options.out / name
        one = replace(one, train=replace(one.train, steps=steps["steps"], save_every=max(1, steps["steps"] // 4)))
        if not (folder / "tokenizer").is_dir():
            train_tokenizer(one, folder)
        evaluation = folder / "evaluation"
        settings = EvaluateReconstruction(
            run=str(folder), data=options.val, scales=True, features="none", lpips=[], out=str(evaluation)
        )
        numbers = once(evaluation / "metrics.json", lambda settings=settings: evaluate_tokenizer(settings))
        result["training"][name] = {"log": read_log(folder / LOG), "metrics": numbers}
        write(options.out, result)


def bench_options(options: argparse.Namespace, compiled: bool, file: Path | None) -> Bench:
    """Of `hieratok bench all`: its defaults for a GPU; or the least there is."""
    out = str(file) if file else None
    if options.dry_run:
        return Bench(recipe="tiny-multi", generator="dit-tiny", batch_size=2, rounds=1, compile=compiled, device="cpu",
                     precision="bf16", out=out)  # fmt: skip
    return Bench(precision="bf16", compile=compiled, out=out)


def once(file: Path, make: Callable[[], object]) -> dict[str, Any]:
    """The JSON that `make` writes to `file`, unless it is there."""
    if not file.is_file():
        make()
    return read_json_table(file)


def training_runs(options: argparse.Namespace) -> dict[str, TokenizerRun]:
    """Two runs that differ in their scales alone."""
    found = {}
    for name in ("tiny-single", "tiny-multi") if options.dry_run else ("small-single", "small-multi"):
        settings = ["--data", options.data, "--data.val_path", options.val, *options.settings]
        one = load_run(name, settings).run
        assert isinstance(one, TokenizerRun)
        if options.dry_run:
            one = replace(one, train=replace(one.train, batch_size=4, log_every=1, picture_every=0))
        found[name] = one
    return found


def plan(runs: Mapping[str, TokenizerRun], machine: Machine, end: float) -> dict[str, Any]:
    """How many steps both runs make: what fits, at most the recipe's, at least two; and the seconds of a step."""
    seconds = {}
    for name, one in runs.items():
        step = training_step(replace(machine, batch_size=one.train.batch_size), one)
        seconds[name] = take_turns({name: step}, machine.device, rounds=3).median(name)
    fitting = SHARE * (end - time.monotonic()) / sum(seconds.values())
    most = min(one.train.steps for one in runs.values())
    return {"steps": int(min(most, max(2, fitting))), "seconds": seconds}


# --- The page ---------------------------------------------------------------------------------------------------------


def write(out: Path, result: dict[str, Any]) -> None:
    """gpu.json and index.html, each whole or not at all."""
    write_json(out / "gpu.json", result)
    sections = [bench_section(what, result["bench"]) for what in rows_of(next(iter(result["bench"].values())))]
    if result["training"]:
        sections.append(training_section(result["training"]))
    summary = f"{result['hardware']}, torch {result['torch']}. " + " ".join(
        f"{name}: a large matrix product runs at {one['matrix_product_flops_per_second'] / 1e12:.3g} TFLOP/s in"
        f" {one['precision']}."
        for name, one in result["bench"].items()
    )
    report.write_page(out / "index.html", report.page("On this GPU", summary, sections))


def rows_of(one: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What was timed in one run of `hieratok bench`, by its part."""
    return {what: rows for what, rows in one.items() if isinstance(rows, list)}


def bench_section(what: str, benches: Mapping[str, Mapping[str, Any]]) -> report.Html:
    """One part of `hieratok bench`, a pair of columns for each way to run it."""
    by_way = {way: {row["name"]: row for row in rows_of(one).get(what, [])} for way, one in benches.items()}
    names = list(dict.fromkeys(name for rows in by_way.values() for name in rows))
    heads = [f"{head}, {way}" for way in by_way for head in ("ms", "of matrix product (%)", "MiB")]
    cells = [[name, *(cell for rows in by_way.values() for cell in row_cells(rows.get(name, {})))] for name in names]
    return report.section(what, report.table(Table(["", *heads], cells)))


def row_cells(row: Mapping[str, Any]) -> list[str]:
    """Time, share of the matrix product's rate, and memory."""
    share, peak = row.get("utilisation"), row.get("peak_bytes")
    return [
        f"{1000 * row['seconds']:.4g}" if row else "",
        f"{100 * share:.0f}" if share is not None else "",
        f"{peak / 2**20:,.0f}" if peak is not None else "",
    ]


def training_section(runs: Mapping[str, Mapping[str, Any]]) -> report.Html:
    """Losses of both runs, and what they reach on held-out images."""
    lines = [
        report.Line(name, [r["images"] for r in one["log"]], [r["l1"] for r in one["log"]])
        for name, one in runs.items()
    ]
    cells = []
    for name, one in runs.items():
        speed = [record["images_per_second"] for record in one["log"]]
        numbers = one["metrics"]
        scales = ", ".join(f"{side} px: {row['psnr']:.2f}" for side, row in numbers.get("scales", {}).items())
        cells.append([name, f"{lines[0].x[-1]:,.0f}", f"{max(speed):.0f}", f"{numbers['psnr']:.2f}",
                      f"{numbers['ssim']:.3f}", scales])  # fmt: skip
    heads = ["", "images", "images/s", "PSNR (dB)", "SSIM", "PSNR of each scale (dB)"]
    return report.section(
        "Two tokenizers side by side",
        report.table(Table(heads, cells, "The same images in the same order; one seed.")),
        report.line_plot(lines, "images", "L1", "Training loss: of several scales the mean.", log_y=True),
    )


if __name__ == "__main__":
    main()
