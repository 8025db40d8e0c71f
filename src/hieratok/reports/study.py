"""The page of a study, as HTML and Markdown: for every metric the paper's numbers and ours."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hieratok.analysis.density import Embedding
from hieratok.analysis.meanings import lines
from hieratok.analysis.report import LatentReport
from hieratok.core.checkpoint import atomic_file
from hieratok.core.glossary import ANALYSIS, describe
from hieratok.core.pictures import to_pil
from hieratok.core.pixels import read_image
from hieratok.core.tables import Table, digits, estimated, signed
from hieratok.evaluation.results import Result
from hieratok.reports import page as report
from hieratok.reports.analysis import embedding_plots
from hieratok.studies.config import RunStudy
from hieratok.studies.paper import METRICS, PAPER_SPEED_UP, Metric
from hieratok.studies.results import (
    EMBEDDING,
    Agreement,
    ComparedCurves,
    ComparedRow,
    Comparison,
    Curve,
    Measured,
    StudyResult,
)
from hieratok.training.config import TokenizerRun

SHOWN = 8  # samples in appendix D's pictures

VERDICTS = ("agrees", "opposite", "not resolved")
READING = (
    "An effect is the difference between a row and its reference row. It agrees with the paper if it has the same sign."
)
ONE_SEED = " One seed gives no interval, so a difference may be chance."
SEVERAL_SEEDS = (
    " With {} seeds an effect is the mean over pairs of the same seed, in brackets its 95% interval (Student's t);"
    " if that contains 0, the sign is not resolved."
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
    """A heading, paragraphs and tables, and pictures and plots for the page."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[report.Html] = ()


def write(stem: Path, result: StudyResult) -> None:
    """Write STEM.md and STEM.html, each atomically.

    Args:
        stem: OUT/STUDY, in an existing folder.
        result: of the study.
    """
    everything = [*metric_sections(result), *shown_sections(result), runs_section(result)]
    summary = " ".join(note for note in result.notes if note)
    with atomic_file(stem.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(result.title, summary, everything), encoding="utf-8", errors="backslashreplace")
    parts = [
        report.section(s.title, *map(report.text, s.paragraphs), *map(report.table, s.tables), *s.pictures)
        for s in everything
    ]
    report.write_page(stem.with_suffix(".html"), report.page(result.title, summary, parts))


def markdown(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The study as Markdown, without pictures."""
    parts = [f"# {title}", summary]
    for section in sections:
        parts += [f"## {section.title}", *section.paragraphs, *(table.markdown() for table in section.tables)]
    return "\n\n".join(parts) + "\n"


# --- Metrics ----------------------------------------------------------------------------------------------------------


def metric_sections(result: StudyResult) -> list[Section]:
    """The overview, and a section for each metric; a single table if there are only counts."""
    if not result.comparisons:
        return []
    if all(METRICS[c.metric].need == "cost" for c in result.comparisons):
        return [Section("Paper and ours", tables=[cost_table(result)])]
    seeds = result.options.seeds
    reading = READING + (ONE_SEED if seeds == 1 else SEVERAL_SEEDS.format(seeds))
    overview = Section("Paper and ours", [reading], [overview_table(result)])
    names = list(dict.fromkeys(c.metric for c in result.comparisons))
    sections = []
    for name in names:
        better = METRICS[name].better
        sections.append(Section(
            f"{title_of(name)}" + f", {better} is better" * (better != "neither"),
            tables=[metric_table(result, c) for c in result.comparisons if c.metric == name],
        ))  # fmt: skip
    return [overview, *sections]


def cost_table(result: StudyResult) -> Table:
    """A row for each tokenizer, and one for their difference; ours, with the deviation from the paper in per cent."""
    labels = [row.name for row in result.rows]
    cells: list[list[str]] = [[label] for label in [*labels, f"{labels[1]} minus {labels[0]}"]]
    for c in result.comparisons:
        (paper_single, single), (paper_multi, multi) = pairs = [counted(line) for line in c.rows]
        for row, (paper, ours) in zip(cells, [*pairs, (paper_multi - paper_single, multi - single)]):
            row += [
                f"{paper:.5g}",
                f"{ours:.5g}" + (f" ({100 * (ours / paper - 1):+.2f}%)" if paper and ours != paper else ""),
            ]
    heads = [f"{title_of(c.metric)}: {whose}" for c in result.comparisons for whose in ("paper", "ours")]
    return Table([*result.columns, *heads], cells, "Parameters, FLOPs and tokens.")


def counted(line: ComparedRow) -> tuple[float, float]:
    """The paper's count and ours, for a row with both."""
    assert line.paper is not None
    assert line.ours is not None
    return line.paper, line.ours.mean


def title_of(name: str) -> str:
    """A metric with its unit."""
    unit = METRICS[name].meaning.unit
    return f"{name} ({unit})" if unit else name


def overview_table(result: StudyResult) -> Table:
    """The number of effects that agree, one row per measured number."""
    rows = []
    for c in result.comparisons:
        verdicts = [line.effect.verdict for line in c.rows if line.effect and line.effect.counts]
        counts = [str(verdicts.count(v)) if c.measured else "" for v in VERDICTS]
        what = c.measured or NOT_MEASURED.get(c.metric, "not measured")
        if c.measured and not c.is_metric:
            what += f" (not {c.metric})"
        rows.append([title_of(c.metric), what, *counts])
    return Table(
        ["the paper's metric", "measured here", *(f"effects: {v}" for v in VERDICTS)],
        rows,
        "For distances of other networks than the paper's, only directions can be compared, not values.",
    )


def metric_table(result: StudyResult, comparison: Comparison) -> Table:
    """The rows of one metric: paper, ours, difference, effects."""
    name, key = comparison.metric, comparison.measured
    metric = METRICS[name]
    has_effects = any(line.effect for line in comparison.rows)
    head = "ours" if key is None or (comparison.is_metric and key == metric.key) else f"ours: {key}"
    header = [*result.columns, "paper", head, "difference"]
    header += ["against", "paper's effect", "our effect", "direction"] if has_effects else []
    rows = []
    for row, line in zip(result.rows, comparison.rows):
        ours = estimated(line.ours.estimate) if line.ours else "not measured" if row.seeds else "not run"
        cells = [*row.label, digits(line.paper), ours, signed(line.difference)]
        rows.append(cells + (effect_cells(result, row.against, line, metric) if has_effects else []))
    caption = f"{title_of(name)}."
    if key is None:
        caption = f"{name}: {NOT_MEASURED.get(name, 'not measured')}."
    elif not comparison.is_metric:
        caption = f"{key} is not {name}: only its direction can be compared with the paper's."
    return Table(header, rows, caption)


def effect_cells(result: StudyResult, against: int | None, line: ComparedRow, metric: Metric) -> list[str]:
    """Reference row, the paper's effect, ours, and whether they agree; empty cells for a row without a reference."""
    if line.effect is None or against is None:
        return ["", "", "", ""]
    ours = estimated(line.effect.ours.estimate if line.effect.ours else None, is_difference=True)
    direction = line.effect.verdict + " (not counted)" * (not line.effect.counts)
    return [result.rows[against].name, effect(line.effect.paper, metric), ours, direction]


def effect(value: float | None, metric: Metric) -> str:
    """A difference, and whether it is better or worse."""
    if value is None or round(value, 9) == 0 or metric.better == "neither":
        return signed(value)
    return f"{value:+.3g} ({'better' if (value < 0) == (metric.better == 'lower') else 'worse'})"


# --- Figures and appendices -------------------------------------------------------------------------------------------


def shown_sections(result: StudyResult) -> list[Section]:
    """Figures 4 and 5, appendices B and D, if measured; of each row's first seed."""
    first = {row.name: row.seeds[0].measured if row.seeds else Measured() for row in result.rows}
    density = {name: found.density for name, found in first.items() if found.density}
    commutation = {name: found.commutation for name, found in first.items() if found.commutation}
    reconstruction = {name: found.reconstruction for name, found in first.items() if found.reconstruction}
    spectrum = {name: found.spectrum for name, found in first.items() if found.spectrum}
    sections = []
    if any(found.numbers.scales for found in reconstruction.values()):
        sections.append(scales_section(reconstruction))
    if spectrum:
        sections.append(spectrum_section(spectrum))
    if result.speed_up:
        sections.append(speed_section(result.speed_up, result.options.seeds))
    if density:
        sections.append(density_section(density))
    if commutation:
        sections.append(commutation_section(commutation))
    curves = {name: found.curves for name, found in first.items() if found.curves}
    if curves and not result.speed_up:
        sections.append(curves_section(curves))
    return sections + [samples_section(name, found.samples) for name, found in first.items() if found.samples]


def scales_section(rows: Mapping[str, Result]) -> Section:
    """Reconstructions: the finest scale's numbers, and every scale's PSNR beside one colour per token."""
    numbers = dict.fromkeys(name for found in rows.values() for name in found.numbers.finest)
    found_names = {name: describe(name) for name in numbers if not name.endswith("_identical")}
    names = {name: metric.with_unit for name, metric in found_names.items() if metric}
    finest = [
        [row, *(digits(found.numbers.finest[name]) if name in found.numbers.finest else "" for name in names)]
        for row, found in rows.items()
    ]
    scales = [
        [row, f"{side} px", digits(numbers["psnr"]), digits(numbers.get("baseline_psnr", math.nan))]
        for row, found in rows.items()
        for side, numbers in found.numbers.scales.items()
    ]
    return Section(
        "Reconstruction",
        tables=[
            Table(["row", *names.values()], finest, "Held-out images at the finest scale; first seed."),
            Table(
                ["row", "scale", "PSNR (dB)", "one colour per token (dB)"],
                scales,
                "Each scale against the image reduced by area to its size; first seed. Tokens of several encoders may"
                " stand for different numbers of pixels.",
            ),
        ],
    )


def spectrum_section(rows: Mapping[str, LatentReport]) -> Section:
    """Which frequencies latents hold, beside the images'."""
    cells = []
    for row, found in rows.items():
        latent, rgb = found.spectra.get("latent"), found.spectra.get("rgb")
        numbers = [one.power_slope if one else None for one in (latent, rgb)]
        share = latent.high_frequency_share if latent else None
        grid = found.latent_grid or ("?", "?")
        cells.append([row, f"{found.latent_channels} x {grid[0]} x {grid[1]}", *map(estimated, [*numbers, share])])
    table = Table(
        ["row", "latent", "slope", "slope of the images", "high-frequency share"],
        cells,
        "Slope of the radial power spectrum on logarithmic axes: the steeper, the smoother. Share of the DCT's"
        " coefficients above the middle. Means with 95% intervals, first seed; each channel is standardised.",
    )
    return Section("Spectrum of the latents", tables=[table])


def speed_section(found: ComparedCurves, num_seeds: int) -> Section:
    """Figure 4."""
    curves = [
        report.Line(f"{name}, seed {seed}" if num_seeds > 1 else name, found.steps, values)
        for name, seeds in found.curves.items()
        for seed, values in enumerate(seeds)
    ]
    rows = [
        [digits(level.level), digits(level.baseline_step), reached(level.step),
         "at least " * level.at_least + reached(level.ratio),
         f"{reached(level.low)} to {reached(level.high)}"]
        for level in found.levels
    ]  # fmt: skip
    base, other = found.curves
    table = Table(
        [found.measured, f"{base}: step", f"{other}: step", "speed-up", "95% interval"],
        rows,
        f"First step at which each curve, made monotone, reaches the level of {base} after half, three quarters and all"
        f" of its steps; the paper's speed-up is {PAPER_SPEED_UP}. The interval is a bootstrap over"
        + (
            " seeds."
            if num_seeds > 1
            else " the points' deviations from a smooth curve, which says nothing about other seeds."
        ),
    )
    plot = report.line_plot(curves[: len(report.SERIES)], "steps", found.measured, "Lower is better.", log_y=True)
    return Section("How much sooner", tables=[table], pictures=[plot])


def curves_section(rows: Mapping[str, Curve]) -> Section:
    """A generator's distance during its training, on each row's latents."""
    name = next(iter(rows.values())).distance
    lines = [
        report.Line(row, [int(point["step"]) for point in found.points], [point[name] for point in found.points])
        for row, found in rows.items()
    ]
    cells = [
        [digits(step), *(digits(line.y[i]) if i < len(line.y) else "" for line in lines)]
        for i, step in enumerate(lines[0].x)
    ]
    table = Table(["step", *rows], cells, f"{name} of samples during the generators' training; first seed.")
    plot = report.line_plot(lines[: len(report.SERIES)], "steps", name, "Lower is better.", log_y=True)
    return Section("Generators' distance over steps", tables=[table], pictures=[plot])


def reached(value: float | None) -> str:
    """A number, or a text for none."""
    return "not reached" if value is None else f"{value:.3g}"


def density_section(rows: Mapping[str, LatentReport]) -> Section:
    """Table 5's floor, and figure 5."""
    table = Table(
        ["row", "density CV", "Gini", "entropy", "images"],
        [[row, *density_cells(found), f"{found.n:,}"] for row, found in rows.items()],
        "The first seed's latents, by VA-VAE's procedure, and the Gaussian floor: as many vectors of N(0, I). All three"
        " depend on the number of images; the paper has 10,000.",
    )
    pictures = []
    for row, found in rows.items():
        assert found.folder is not None
        plots = embedding_plots(Embedding.load(Path(found.folder) / EMBEDDING))
        pictures += [report.heading(row), report.columns(*plots)]
    return Section("Latents in the plane", tables=[table], pictures=pictures)


def density_cells(found: LatentReport) -> list[str]:
    """The three numbers, each with its floor."""
    assert found.density is not None
    assert found.density.floor is not None
    pairs = zip(found.density.mean, found.density.floor)
    return [f"{value:.4f} (floor {floor:.4f})" for value, floor in pairs]


def commutation_section(rows: Mapping[str, LatentReport]) -> Section:
    """Appendix B: errors of every scale, a column a row of the study."""
    stems = ("commutation_error", "commutation_target_mse", "pyramid_error", "pyramid_target_mse")
    quantities = dict.fromkeys(line.quantity for found in rows.values() for line in lines(found, stems))
    cells = [
        [
            ANALYSIS[quantity.stem].with_unit,
            quantity.detail_text,
            *(estimated(found.decoded.get(quantity)) for found in rows.values()),
        ]
        for quantity in sorted(quantities, key=lambda quantity: stems.index(quantity.stem))
    ]
    table = Table(
        ["number", "scale", *rows],
        cells,
        "Means over held-out images with their 95% intervals, first seed. Commutation decodes the reduced latent map on"
        " its own; a pyramid's scales are those of one decoding, as in training.",
    )
    pages = [f"{row}, with pictures: {found.folder}/index.html" for row, found in rows.items()]
    return Section("Errors of every scale", pages, [table])


def samples_section(row: str, found: Agreement) -> Section:
    """Appendix D: agreement between the scales of samples."""
    table = Table(
        ["scale", "PSNR (dB)"],
        [[side, estimated(value)] for side, value in found.psnr.items()],
        f"Each scale's picture against the finest one, resized to it by area: mean over {found.n} samples with its"
        " 95% interval, first seed.",
    )
    folder = Path(found.folder)
    finest = max((path.name for path in folder.glob("*px")), key=lambda name: int(name.removesuffix("px")))
    columns = [*found.psnr, finest]
    rows = []
    for path in sorted((folder / finest).glob("*.png"))[:SHOWN]:
        pictures = [to_pil(read_image(folder / side / path.name)) for side in columns]
        rows.append(report.Row(f"sample {int(path.stem)}", pictures))
    grid = report.picture_grid(columns, rows, f"Samples, every scale of one decoding; all are in {folder}.")
    return Section(f"Scales of one sample: {row}", tables=[table], pictures=[grid])


# --- How it was run ---------------------------------------------------------------------------------------------------


def runs_section(result: StudyResult) -> Section:
    """Every run, the base's settings, the command, and warnings."""
    rows = []
    for i, row in enumerate(result.rows):
        for cell in row.seeds:
            for one in cell.runs:
                run, trained = one.run, one.trained
                rows.append([
                    str(i + 1), run.kind, str(run.train.seed), one.folder, f"{trained.images_seen:,}",
                    f"{trained.seconds / 60:.1f}", f"{trained.images_per_second:,.0f}", trained.hardware,
                ])  # fmt: skip
    header = ["row", "trains", "seed", "run", "images seen", "minutes", "images/s", "hardware"]
    caption = "The config.yaml in a run's folder has every setting. Rows may share a run."
    tables = [Table(header, rows, caption), base_table(result.base)] if rows else []
    return Section(
        "How this was run",
        [f"Command: {command(result.options)}", *(f"Warning: {warning}." for warning in result.warnings)],
        tables,
    )


def base_table(base: TokenizerRun) -> Table:
    """The settings of the base run."""
    m, t, loss, data = base.model, base.train, base.loss, base.data
    rows = [
        ["images", f"{m.image_size} px, f{m.patch_size} d{m.latent_channels}, scales {list(m.scales)}"],
        ["encoder, decoder", f"depth {m.encoder_depth} and {m.decoder_depth}, width {m.encoder_width} and"
         f" {m.decoder_width}"],
        ["training", f"{t.steps:,} steps of {t.batch_size} images, learning rate {t.learning_rate:g} to"
         f" {t.min_learning_rate:g}, {t.precision}"],
        ["loss weights", f"L1 {loss.l1_weight:g}, MSE {loss.mse_weight:g}, perceptual"
         f" {loss.perceptual_weight:g} ({loss.trunk}), KL {loss.kl_weight:g}"],
        ["trained on, evaluated on", f"{data.path}, {data.val_path}"],
    ]  # fmt: skip
    return Table(["setting", "value"], rows, "The run that all rows are variants of.")


def command(options: RunStudy) -> str:
    """The study's command."""
    words = ["hieratok", "study", options.study]
    for name, value in asdict(options).items():
        if name in ("study", "plan", "row") or value in (None, []):
            continue
        if (name, value) in (("seeds", 1), ("features", "none")):
            continue
        words += [f"--{name}", f"[{','.join(value)}]" if isinstance(value, list) else str(value)]
    return shlex.join(words)
