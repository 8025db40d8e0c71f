"""The page of a study: for every metric the paper's numbers beside ours, as HTML, Markdown and JSON."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hieratok.core.checkpoint import atomic_file, write_json
from hieratok.core.estimates import Estimate
from hieratok.core.files import read_npz
from hieratok.core.glossary import ANALYSIS
from hieratok.core.pictures import to_pil
from hieratok.core.pixels import read_image
from hieratok.core.tables import Table, digits, estimated, signed
from hieratok.reports import page as report
from hieratok.reports.analysis import Embedding, embedding_plots
from hieratok.studies.paper import METRICS, PAPER_SPEED_UP, Metric

SHOWN = 8  # samples in appendix D's pictures

VERDICTS = ("agrees", "opposite", "not resolved")
READING = (
    "Effects are differences to the row that a row is held against. An effect agrees with the paper if it has the same"
    " sign."
)
ONE_SEED = " One seed has no interval: whether such a difference is more than chance, it cannot say."
SEVERAL_SEEDS = (
    " With {} seeds an effect is the mean over pairs of the same seed, in brackets its 95% interval (Student's t);"
    " where that holds 0, the sign is not resolved."
)
NOT_MEASURED = {
    "rFID": "not measured: needs --features inception and the network's weights",
    "LPIPS": "not measured: needs --lpips '[vgg]' and the network's weights",
    "gFID": "not measured: needs --features inception and the network's weights",
    "IS": "not measured: needs --features inception and the network's weights",
    "gFID with CFG": "not measured: needs --features inception and the network's weights",
    "gFID at the last step": "not measured: needs --features inception and the network's weights",
}


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs and tables; pictures and plots only a page can show."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[report.Html] = ()


def write(stem: Path, result: dict[str, Any]) -> None:
    """Write STEM.json, STEM.md and STEM.html, each whole or not at all.

    Args:
        stem: OUT/STUDY.
        result: of `study.assemble`.
    """
    everything = [*metric_sections(result), *shown_sections(result), runs_section(result)]
    summary = " ".join(note for note in result["notes"] if note)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_suffix(".json"), result)
    with atomic_file(stem.with_suffix(".md")) as temporary:
        temporary.write_text(
            markdown(result["title"], summary, everything), encoding="utf-8", errors="backslashreplace"
        )
    parts = [
        report.section(s.title, *map(report.text, s.paragraphs), *map(report.table, s.tables), *s.pictures)
        for s in everything
    ]
    report.write_page(stem.with_suffix(".html"), report.page(result["title"], summary, parts))


def markdown(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The same without pictures."""
    parts = [f"# {title}", summary]
    for section in sections:
        parts += [f"## {section.title}", *section.paragraphs, *(table.markdown() for table in section.tables)]
    return "\n\n".join(parts) + "\n"


# --- Metrics ----------------------------------------------------------------------------------------------------------


def metric_sections(result: dict[str, Any]) -> list[Section]:
    """The overview, and a section for each metric; one table where all there is are counts."""
    if not result["comparisons"]:
        return []
    if all(METRICS[c["metric"]].need == "cost" for c in result["comparisons"]):
        return [Section("Paper and ours", tables=[cost_table(result)])]
    seeds = result["seeds"]
    reading = READING + (ONE_SEED if seeds == 1 else SEVERAL_SEEDS.format(seeds))
    overview = Section("Paper and ours", [reading], [overview_table(result)])
    names = list(dict.fromkeys(c["metric"] for c in result["comparisons"]))
    sections = []
    for name in names:
        mine = [c for c in result["comparisons"] if c["metric"] == name]
        better = METRICS[name].better
        sections.append(Section(
            f"{title_of(name)}" + f", {better} is better" * (better != "neither"),
            tables=[metric_table(result, c) for c in mine],
        ))  # fmt: skip
    return [overview, *sections]


def cost_table(result: dict[str, Any]) -> Table:
    """A row for each tokenizer, and one for what the second adds to the first; ours beside the paper's in per cent."""
    labels = [", ".join(row["label"]) for row in result["rows"]]
    cells: list[list[str]] = [[label] for label in [*labels, f"{labels[1]} minus {labels[0]}"]]
    for c in result["comparisons"]:
        pairs = [(line["paper"], line["ours"]["mean"]) for line in c["rows"]]
        (paper_single, single), (paper_multi, multi) = pairs
        for row, (paper, ours) in zip(cells, [*pairs, (paper_multi - paper_single, multi - single)]):
            row += [
                f"{paper:.5g}",
                f"{ours:.5g}" + (f" ({100 * (ours / paper - 1):+.2f}%)" if paper and ours != paper else ""),
            ]
    heads = [f"{title_of(c['metric'])}: {whose}" for c in result["comparisons"] for whose in ("paper", "ours")]
    return Table([*result["columns"], *heads], cells, "Parameters, FLOPs and tokens.")


def title_of(name: str) -> str:
    """A metric with its unit."""
    unit = METRICS[name].meaning.unit
    return f"{name} ({unit})" if unit else name


def overview_table(result: dict[str, Any]) -> Table:
    """How many effects agree, a row a measured number."""
    rows = []
    for c in result["comparisons"]:
        verdicts = [line["verdict"] for line in c["rows"] if line.get("counts")]
        counts = [str(verdicts.count(v)) if c["measured"] else "" for v in VERDICTS]
        what = c["measured"] or NOT_MEASURED.get(c["metric"], "not measured")
        if c["measured"] and not c["is_metric"]:
            what += f" (not {c['metric']})"
        rows.append([title_of(c["metric"]), what, *counts])
    return Table(
        ["the paper's metric", "measured here", *(f"effects: {v}" for v in VERDICTS)],
        rows,
        "A distance of another network than the paper's says something about directions and nothing about values.",
    )


def metric_table(result: dict[str, Any], comparison: dict[str, Any]) -> Table:
    """The rows of one metric: paper, ours, difference, effects."""
    name, key = comparison["metric"], comparison["measured"]
    metric = METRICS[name]
    has_effects = any("verdict" in line for line in comparison["rows"])
    head = "ours" if key is None or (comparison["is_metric"] and key == metric.key) else f"ours: {key}"
    header = [*result["columns"], "paper", head, "difference"]
    header += ["against", "paper's effect", "our effect", "direction"] if has_effects else []
    rows = []
    for row, line in zip(result["rows"], comparison["rows"]):
        ours = estimated(mean_of(line["ours"])) if line["ours"] else "not measured" if row["seeds"] else "not run"
        cells = [*row["label"], digits(line["paper"]), ours, signed(line["difference"])]
        if has_effects and "verdict" in line:
            base = ", ".join(result["rows"][row["against"]]["label"])
            effects = [effect(line["paper_effect"], metric), estimated(mean_of(line["effect"]), is_difference=True)]
            cells += [base, *effects, line["verdict"] + " (not counted)" * (not line["counts"])]
        elif has_effects:
            cells += ["", "", "", ""]
        rows.append(cells)
    caption = f"{title_of(name)}."
    if key is None:
        caption = f"{name}: {NOT_MEASURED.get(name, 'not measured')}."
    elif not comparison["is_metric"]:
        caption = f"{key} is not {name}: only its direction can be compared with the paper's."
    return Table(header, rows, caption)


def effect(value: float | None, metric: Metric) -> str:
    """A difference, and whether it is for the better."""
    if value is None or round(value, 9) == 0 or metric.better == "neither":
        return signed(value)
    return f"{value:+.3g} ({'better' if (value < 0) == (metric.better == 'lower') else 'worse'})"


def mean_of(value: dict[str, Any] | None) -> Estimate | None:
    """A mean over seeds in a result."""
    return Estimate(value["mean"], value["low"], value["high"]) if value else None


# --- What a study shows beside the paper's metrics --------------------------------------------------------------------


def shown_sections(result: dict[str, Any]) -> list[Section]:
    """Figures 4 and 5, appendices B and D, so far as their numbers are there."""
    first = {}  # each row's first seed
    for row in result["rows"]:
        for need, numbers in row["seeds"][0]["measured"].items() if row["seeds"] else ():
            first.setdefault(need, {})[", ".join(row["label"])] = numbers
    sections = []
    if result.get("speed_up"):
        sections.append(speed_section(result))
    if "density" in first:
        sections.append(density_section(first["density"]))
    if "commutation" in first:
        sections.append(commutation_section(first["commutation"]))
    if "samples" in first:
        sections += [samples_section(name, numbers) for name, numbers in first["samples"].items()]
    return sections


def speed_section(result: dict[str, Any]) -> Section:
    """Figure 4."""
    found = result["speed_up"]
    curves = [
        report.Line(f"{name}, seed {seed}" if result["seeds"] > 1 else name, found["steps"], values)
        for name, seeds in found["curves"].items()
        for seed, values in enumerate(seeds)
    ]
    rows = [
        [digits(level["level"]), digits(level["baseline_step"]), reached(level["step"]),
         "at least " * level["at_least"] + reached(level["ratio"]),
         f"{reached(level['low'])} to {reached(level['high'])}"]
        for level in found["levels"]
    ]  # fmt: skip
    base, other = found["curves"]
    table = Table(
        [found["measured"], f"{base}: step", f"{other}: step", "speed-up", "95% interval"],
        rows,
        f"First step at which each curve, made monotone, reaches what {base} reaches after half, three quarters and all"
        f" of its steps; the paper's speed-up is {PAPER_SPEED_UP}. The interval is a bootstrap over"
        + (
            " seeds."
            if result["seeds"] > 1
            else " the points' deviations from a smooth curve, which says nothing about other seeds."
        ),
    )
    plot = report.line_plot(curves[: len(report.SERIES)], "steps", found["measured"], "Lower is better.", log_y=True)
    return Section("How much sooner", tables=[table], pictures=[plot])


def reached(value: float | None) -> str:
    """A number, or that there is none."""
    return "not reached" if value is None else f"{value:.3g}"


def density_section(rows: dict[str, dict[str, Any]]) -> Section:
    """Table 5's floor, and figure 5."""
    names = ("density_cv", "gini", "normalized_entropy")
    cells = [
        [row, *(f"{numbers[name]:.4f} (floor {numbers[f'floor_{name}']:.4f})" for name in names), f"{numbers['n']:,}"]
        for row, numbers in rows.items()
    ]
    table = Table(
        ["row", "density CV", "Gini", "entropy", "images"],
        cells,
        "The first seed's latents, by VA-VAE's procedure, and the Gaussian floor: as many vectors of N(0, I). All three"
        " depend on how many images there are; the paper has 10,000.",
    )
    pictures = []
    for row, numbers in rows.items():
        arrays = read_npz(Path(numbers["folder"]) / "embedding.npz")
        plots = embedding_plots(Embedding(arrays["points"], arrays["density"], arrays["labels"]))
        pictures += [report.text(row), report.columns(*plots)]
    return Section("Latents in the plane", tables=[table], pictures=pictures)


def commutation_section(rows: dict[str, dict[str, Any]]) -> Section:
    """Appendix B: errors of every scale, a column a row of the study."""
    stems = ("commutation_error", "commutation_target_mse", "pyramid_error", "pyramid_target_mse")
    keys = [key for numbers in rows.values() for key in numbers if key.partition("/")[0] in stems]
    cells = []
    for key in sorted(dict.fromkeys(keys), key=lambda key: stems.index(key.partition("/")[0])):
        stem, _, scale = key.partition("/")
        cells.append([ANALYSIS[stem].with_unit, scale, *(with_interval(numbers, key) for numbers in rows.values())])
    table = Table(
        ["number", "scale", *rows],
        cells,
        "Means over held-out images with their 95% intervals, first seed. Commutation decodes the shrunk latent map by"
        " itself; a pyramid's scales are those of one decoding, as the multi-scale tokenizer trains them.",
    )
    pages = [f"{row}, with pictures: {numbers['folder']}/index.html" for row, numbers in rows.items()]
    return Section("Errors of every scale", pages, [table])


def samples_section(row: str, numbers: dict[str, Any]) -> Section:
    """Appendix D: how well the scales of one sample agree."""
    keys = [key for key in numbers if key.startswith("psnr/")]
    sides = [key.removeprefix("psnr/") for key in keys]
    table = Table(
        ["scale", "PSNR (dB)"],
        [[side, with_interval(numbers, key)] for side, key in zip(sides, keys)],
        f"Each scale's picture against the finest one, resized to it by area: mean over {numbers['n']} samples with its"
        " 95% interval, first seed.",
    )
    folder = Path(numbers["folder"])
    finest = max((path.name for path in folder.glob("*px")), key=lambda name: int(name.removesuffix("px")))
    columns = [*sides, finest]
    rows = []
    for path in sorted((folder / finest).glob("*.png"))[:SHOWN]:
        pictures = [to_pil(read_image(folder / side / path.name)) for side in columns]
        rows.append(report.Row(f"sample {int(path.stem)}", pictures))
    grid = report.picture_grid(columns, rows, f"Samples, every scale of one decoding; all are in {folder}.")
    return Section(f"Scales of one sample: {row}", tables=[table], pictures=[grid])


def with_interval(numbers: dict[str, Any], key: str) -> str:
    """A mean and the ends of its interval, from `analysis.intervals.summarize`."""
    if key not in numbers:
        return "–"
    stem, _, detail = key.partition("/")
    return estimated(Estimate(numbers[key], *(numbers[f"{stem}_{end}/{detail}"] for end in ("low", "high"))))


# --- How it was run ---------------------------------------------------------------------------------------------------


def runs_section(result: dict[str, Any]) -> Section:
    """Every run, the base's settings, the command, and warnings."""
    rows = []
    for i, row in enumerate(result["rows"]):
        for seed in row["seeds"]:
            for run in seed["runs"]:
                minutes, rate = run["seconds"] / 60, run["images_per_second"]
                rows.append([
                    str(i + 1), run["kind"], str(run["seed"]), run["folder"], f"{run['images_seen']:,}",
                    f"{minutes:.1f}", f"{rate:,.0f}", run["hardware"],
                ])  # fmt: skip
    header = ["row", "trains", "seed", "run", "images seen", "minutes", "images/s", "hardware"]
    caption = "The config.yaml in a run's folder has every setting. Rows may share a run."
    tables = [Table(header, rows, caption), base_table(result["base"])] if rows else []
    return Section(
        "How this was run",
        [f"Command: {command(result['options'])}", *(f"Warning: {warning}." for warning in result["warnings"])],
        tables,
    )


def base_table(base: dict[str, Any]) -> Table:
    """The settings that rows are variants of."""
    m, t, loss, data = (base[group] for group in ("model", "train", "loss", "data"))
    rows = [
        ["images", f"{m['image_size']} px, f{m['patch_size']} d{m['latent_channels']}, scales {m['scales']}"],
        ["encoder, decoder", f"depth {m['encoder_depth']} and {m['decoder_depth']}, width {m['encoder_width']} and"
         f" {m['decoder_width']}"],
        ["training", f"{t['steps']:,} steps of {t['batch_size']} images, learning rate {t['learning_rate']:g} to"
         f" {t['min_learning_rate']:g}, {t['precision']}"],
        ["loss weights", f"L1 {loss['l1_weight']:g}, MSE {loss['mse_weight']:g}, perceptual"
         f" {loss['perceptual_weight']:g} ({loss['trunk']}), KL {loss['kl_weight']:g}"],
        ["trained on, evaluated on", f"{data['path']}, {data['val_path']}"],
    ]  # fmt: skip
    return Table(["setting", "value"], rows, "The run that all rows are variants of.")


def command(options: dict[str, Any]) -> str:
    """What to type for the same study."""
    words = ["hieratok", "study", options["study"]]
    for name, value in options.items():
        if name in ("study", "plan", "row") or value in (None, []):
            continue
        if (name, value) in (("seeds", 1), ("features", "none")):
            continue
        words += [f"--{name}", f"[{','.join(value)}]" if isinstance(value, list) else str(value)]
    return shlex.join(words)
