"""The page of a study: for every metric the paper's numbers beside ours, as HTML, Markdown and JSON."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hieratok import report
from hieratok.checkpoint import atomic_file
from hieratok.studies import METRICS, Metric

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
}


@dataclass(frozen=True)
class Table:
    """Cells that both HTML and Markdown can show."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str

    def html(self) -> report.Html:
        """As part of a page."""
        return report.table(self.header, self.rows, self.caption)

    def markdown(self) -> str:
        """As a pipe table."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + (
            f"\n\n{self.caption}"
        )


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs and tables; pictures and plots only a page can show."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[report.Html] = ()


def write(stem: Path, result: dict[str, Any], sections: Sequence[Section] = ()) -> None:
    """Write STEM.json, STEM.md and STEM.html, each whole or not at all.

    Args:
        stem: OUT/STUDY.
        result: of `study.assemble`.
        sections: what the study shows beside the paper's metrics.
    """
    everything = [*metric_sections(result), *sections, runs_section(result)]
    summary = " ".join(note for note in result["notes"] if note)
    stem.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(stem.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    with atomic_file(stem.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(result["title"], summary, everything), encoding="utf-8")
    parts = [
        report.section(s.title, *map(report.text, s.paragraphs), *(t.html() for t in s.tables), *s.pictures)
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
    """The overview, and a section for each metric."""
    if not result["comparisons"]:
        return []
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


def title_of(name: str) -> str:
    """A metric with its unit."""
    unit = METRICS[name].unit
    return f"{name} ({unit})" if unit else name


def overview_table(result: dict[str, Any]) -> Table:
    """How many effects agree, a row a measured number."""
    rows = []
    for c in result["comparisons"]:
        verdicts = [line.get("verdict") for line in c["rows"]]
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
    ours = "ours" if comparison["is_metric"] and "-" not in (key or "") else f"ours: {key}" if key else "ours"
    header = [*result["columns"], "paper", ours, "difference"]
    header += ["against", "paper's effect", "our effect", "direction"] if has_effects else []
    rows = []
    for row, line in zip(result["rows"], comparison["rows"]):
        cells = [*row["label"], number(line["paper"]), estimate(line["ours"]), signed(line["difference"])]
        if has_effects and "verdict" in line:
            base = ", ".join(result["rows"][row["against"]]["label"])
            effects = [effect(line["paper_effect"], metric), estimate(line["effect"], is_effect=True)]
            cells += [base, *effects, line["verdict"]]
        elif has_effects:
            cells += ["", "", "", ""]
        rows.append(cells)
    caption = f"{title_of(name)}."
    if key is None:
        caption = f"{name}: {NOT_MEASURED.get(name, 'not measured')}."
    elif not comparison["is_metric"]:
        caption = f"{key} is not {name}: only its direction can be compared with the paper's."
    return Table(header, rows, caption)


def number(value: float | None) -> str:
    """Four significant digits."""
    return "–" if value is None else f"{value:.4g}"


def signed(value: float | None) -> str:
    """The same with its sign."""
    return "–" if value is None else f"{value:+.3g}"


def effect(value: float | None, metric: Metric) -> str:
    """A difference, and whether it is for the better."""
    if value is None or round(value, 9) == 0 or metric.better == "neither":
        return signed(value)
    return f"{value:+.3g} ({'better' if (value < 0) == (metric.better == 'lower') else 'worse'})"


def estimate(value: dict[str, Any] | None, is_effect: bool = False) -> str:
    """A mean over seeds with its interval, if there are several."""
    if value is None:
        return "–"
    mean = signed(value["mean"]) if is_effect else number(value["mean"])
    return mean if value["low"] is None else f"{mean} [{number(value['low'])}, {number(value['high'])}]"


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
    tables = [Table(header, rows, "Its config.yaml has every setting of a run. Rows may share a run.")] if rows else []
    if rows:
        tables.append(base_table(result["base"]))
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
        ["trained on, judged by", f"{data['path']}, {data['val_path']}"],
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
