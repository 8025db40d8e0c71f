"""`hieratok report DIR`: all runs in a folder on one page: state, differing settings, curves, numbers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hieratok.core.checkpoint import json_text, remove_leftovers
from hieratok.core.glossary import ANALYSIS, ARROWS_MEAN, TRAINING, describe
from hieratok.core.lock import lock
from hieratok.core.pictures import to_pil
from hieratok.core.pixels import BadImageError, read_image
from hieratok.core.tables import Table, digits, setting
from hieratok.reports import page as report
from hieratok.reports.config import Report
from hieratok.training.runs import Measurement, Run, find_runs, is_run, problem_of

MAX_POINTS = 200
"""Largest number of a curve's points: longer logs are averaged over intervals."""
MAX_PICTURE = 1_200
"""Largest side of a picture on the page, in pixels."""
NO_LOSSES = {
    "step",
    "images",
    "images_per_second",
    "data_wait",
    "learning_rate",
    "bad_images",
    "skipped_steps",
    "rollbacks",
}
"""Terms of a log that are not terms of the loss."""
PROGRESS = (
    "A run counts as stopped if its log has not grown for ten minutes and for ten of its intervals; the same command"
    " resumes it. Time is that of training, without interruptions."
)
PLOTS = 6
"""Number of plots that are visible at first; the others are folded."""


def write_report(options: Report) -> list[Run]:
    """The command: write the page, print a table or JSON.

    Returns:
        The runs.

    Raises:
        FileNotFoundError: no such folder, or no runs below it. A damaged run raises nothing, the page names it.
    """
    folder = Path(options.folder)
    runs = find_runs(folder)
    # a run's own folder may hold the quickstart's page
    out = Path(options.out) if options.out else folder / ("report.html" if is_run(folder) else "index.html")
    with lock(out.parent, "report", ".report.lock"):  # not that of a run which trains in the folder
        remove_leftovers(out)
        report.write_page(out, make_page(folder, runs))
    if options.json:
        print(json_text([run.facts() for run in runs]))
        return runs
    for title, group in groups(runs).items():
        print(f"{title}\n{overview(group).text()}\n")
    for line in problem_lines(runs):
        print(line)
    print(f"curves, settings, pictures: {out}")
    return runs


def make_page(folder: Path, runs: Sequence[Run]) -> report.Html:
    """The page."""
    finished = sum(run.finished for run in runs)
    stopped = sum(run.state.startswith("stopped") for run in runs)
    parts = [
        report.key_figures(
            [
                *((f"{len(group)}", title.lower()) for title, group in groups(runs).items()),
                (f"{finished}", "finished"),
                (f"{len(runs) - finished - stopped}", "in training"),
                (f"{stopped}", "stopped early"),
            ]
        )
    ]
    problems = problem_lines(runs)
    if problems:
        parts.append(report.section("What could not be read", *map(report.text, problems)))
    found = groups(runs)
    for title, group in found.items():
        parts += run_sections(title, group, PLOTS // len(found))
    summary = f"All runs in {folder.resolve().name} and its sub-folders, at the time this page was written."
    return report.page("Runs", summary, parts)


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by kind, tokenizers and generators, without empty groups."""
    named = {"Tokenizers": "tokenizer", "Generators": "generator"}
    found = {title: [run for run in runs if run.kind == kind] for title, kind in named.items()}
    return {title: group for title, group in found.items() if group}


def problem_lines(runs: Sequence[Run]) -> list[str]:
    """What could not be read, one line each."""
    return [f"{run.name}: {problem}." for run in runs for problem in run.problems]


def run_sections(title: str, runs: Sequence[Run], num_plots: int) -> list[report.Html]:
    """The sections of the runs of one kind: first the differences, last the folded parts."""
    sections = []
    if len(runs) > 1:
        sections.append(report.section(f"{title}: what differs", differences_part(runs)))
    progress = report.table(overview(runs))
    sections.append(report.section(f"{title}: progress" if len(runs) > 1 else title, progress))
    if metrics := metric_parts(runs):
        sections.append(report.section(f"{title}: metrics", *metrics))
    if curves := curve_parts(runs, num_plots):
        sections.append(report.section(f"{title}: curves", *curves))
    if pictures := picture_parts(runs):
        sections.append(report.section(f"{title}: latest pictures", *pictures))
    return sections


# --- Tables -----------------------------------------------------------------------------------------------------------


def overview(runs: Sequence[Run]) -> Table:
    """State and speed of each run."""
    rows = []
    for run in runs:
        pace = run.pace
        rows.append([
            run.name,
            str(run.settings.get("name", "–")),
            run.state,
            f"{pace.images_seen:,.0f}" if pace else "–",
            f"{pace.seconds / 60:.1f}" if pace else "–",
            f"{pace.images_per_second:.1f}" if pace else "–",
            f"{run.parameters / 1e6:.2f}" if run.parameters else "–",
            digits(run.log[-1].get("loss")) if run.log else "–",
        ])  # fmt: skip
    header = ["run", "recipe", "state", "images seen", "minutes", "images/s", "parameters (M)", "last loss"]
    return Table(header, rows, PROGRESS)


def last_losses(runs: Sequence[Run]) -> Table:
    """The last value of every term of the loss, without those of single scales."""
    terms = [term for term in terms_of([run.log[-1:] for run in runs]) if "/" not in term and term not in NO_LOSSES]
    rows = [[run.name, *(digits((run.log or [{}])[-1].get(term)) for term in terms)] for run in runs]
    return Table(["run", *terms], rows, "The last logged interval, without the losses of single scales.")


def differences_part(runs: Sequence[Run]) -> report.Html:
    """A table of the settings in which the runs differ."""
    known = [run for run in runs if run.settings]
    names = differing([{name: value for name, value in run.settings.items() if name != "name"} for run in known])
    rows = [[name, *(setting(run.settings[name]) if name in run.settings else "–" for run in known)] for name in names]
    if not rows:
        return report.text("None: the runs have the same settings.")
    caption = (
        "Settings by their names on the command line; all others are the same in all runs. –: the run's version did not"
        " have this setting."
    )
    return report.table(Table(["setting", *(run.name for run in known)], rows, caption))


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names with different values in two tables. A missing name is not a difference."""
    names = dict.fromkeys(name for table in tables for name in table)
    values = {name: [table[name] for table in tables if name in table] for name in names}
    return [name for name, found in values.items() if any(value != found[0] for value in found)]


# --- Metrics ----------------------------------------------------------------------------------------------------------


def metric_parts(runs: Sequence[Run]) -> list[report.Html]:
    """Evaluations and analyses in the runs' folders, and the last evaluation of each run's training."""
    parts = []
    measured = [(run, measurement) for run in runs for measurement in run.measurements]
    for label, caption in (
        (evaluation_label, "Evaluations in the runs' folders."),
        (analysis_label, "Analyses in the runs' folders; the page of an analysis explains its numbers."),
    ):
        chosen = [(run, m) for run, m in measured if any(label(key) for key in m.numbers if key != "n")]
        if chosen:
            parts += measurement_parts(chosen, label, caption)
    latest = {run.name: run.evaluations[-1] for run in runs if run.evaluations}
    if latest:
        terms = list(filter(is_shown, terms_of([[record] for record in latest.values()])))
        heads = [evaluation_label(term) or term for term in terms]
        rows = [[name, f"{r['step']:,.0f}", *(digits(r.get(term)) for term in terms)] for name, r in latest.items()]
        caption = f"The last evaluation during training. {ARROWS_MEAN}"
        parts.append(report.table(Table(["run", "step", *heads], rows, caption)))
    return parts


def measurement_parts(
    chosen: Sequence[tuple[Run, Measurement]], label: Callable[[str], str | None], caption: str
) -> list[report.Html]:
    """A table of measurements, and one of their protocols."""
    keys = dict.fromkeys(key for _, m in chosen for key in m.numbers if label(key))
    protocols: list[Mapping[str, Any]] = []
    rows = []
    for run, measurement in chosen:
        if measurement.manifest not in protocols:
            protocols.append(measurement.manifest)
        letter = protocol_name(protocols.index(measurement.manifest))
        rows.append([run.name, measurement.where, letter, *(digits(measurement.numbers.get(key)) for key in keys)])
    names = [protocol_name(i) for i in range(len(protocols))]
    note = "All have the same protocol, so their numbers can be compared."
    if len(protocols) > 1:
        note = "Only numbers of the same protocol can be compared."
    header = ["run", "folder", "protocol", *(str(label(key)) for key in keys)]
    parts = [report.table(Table(header, rows, f"{caption} {ARROWS_MEAN} {note}"))]
    if len(protocols) > 1:
        differ = [[key, *(short(protocol.get(key)) for protocol in protocols)] for key in differing(protocols)]
        parts.append(report.table(Table(["what differs", *names], differ, "The protocols, where they differ.")))
    return parts


def protocol_name(index: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def is_shown(term: str) -> bool:
    """Whether a term of an evaluation during training gets a column: not `step`, `images` or counts but `n`."""
    metric = describe(term)
    return term not in ("step", "images") and (metric is None or not metric.is_count or term == "n")


def evaluation_label(key: str) -> str | None:
    """A metric's column header; None: not a metric of an evaluation."""
    metric = describe(key)
    if metric is None or (metric.is_count and key != "n"):
        return None
    return metric.head


def analysis_label(key: str) -> str | None:
    """The same for an analysis, for numbers without scale, transform or sigma."""
    metric = ANALYSIS.get(key)
    return metric.head if metric else None


def short(value: Any) -> str:
    """A manifest's fact in a cell; hashes are shortened."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {short(item)}" for key, item in value.items())
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text


# --- Curves and pictures ----------------------------------------------------------------------------------------------


def curve_parts(runs: Sequence[Run], num_plots: int) -> list[report.Html]:
    """A plot for each term of the logs and the evaluations, with a line for each run, as far as there are colours.

    The loss comes first, then evaluations, then the terms of the loss; beyond `num_plots` they are folded, together
    with the last losses.
    """
    drawn = sorted((run for run in runs if run.log), key=lambda run: run.written)[-len(report.SERIES) :]
    drawn = [run for run in runs if run in drawn]  # sorted by name
    if not drawn:
        return []
    logs, evaluations = [run.log for run in drawn], [run.evaluations for run in drawn]
    constant, terms = [], []
    for term in terms_of(logs):
        values = {record[term] for log in logs for record in log if term in record}
        if term in ("step", "images"):
            continue
        if len(values) == 1:
            constant.append(f"{term} ({values.pop():g})")
        else:
            terms.append(curves(drawn, logs, term, meaning(term)))
    evaluated = [
        curves(drawn, evaluations, term, "Evaluation during training.", evaluation_label(term))
        for term in filter(is_shown, terms_of(evaluations))
        if varies(evaluations, term)
    ]
    plots = [*terms[:1], *evaluated, *terms[1:]]
    parts = []
    if len(drawn) < sum(bool(run.log) for run in runs):
        parts.append(report.text(f"Only the {len(drawn)} runs with the newest logs: a plot has no more colours."))
    parts += [report.legend([run.name for run in drawn]), report.columns(*plots[:num_plots])]
    rest = [report.table(last_losses(runs))]
    if constant:
        rest.append(report.text(f"Without a plot, as they are constant: {', '.join(constant)}."))
    if more := plots[num_plots:]:
        rest.insert(0, report.columns(*more))
    title = f"{len(more)} more plot{'s' * (len(more) > 1)} and the last losses" if more else "The last losses"
    return [*parts, report.folded(title, *rest)]


def varies(logs: Sequence[Sequence[Mapping[str, float]]], term: str) -> bool:
    """Whether a term has different values; counts and baselines are constant."""
    return len({record[term] for log in logs for record in log if term in record}) > 1


def curves(
    runs: Sequence[Run],
    records: Sequence[Sequence[Mapping[str, float]]],
    term: str,
    caption: str,
    label: str | None = None,
) -> report.Html:
    """One term over images seen; logarithmic if all values are positive and span a wide range."""
    lines = []
    for run, log in zip(runs, records):
        points = [(record["images"], record[term]) for record in log if term in record]
        lines.append(report.Line(run.name, *thinned(points)))
    everything = [y for line in lines for y in line.y]
    log_y = min(everything) > 0 and max(everything) > 3 * min(everything)
    return report.line_plot(lines, "images seen", label or term, caption, log_y, own_legend=False)


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """x and y of points, averaged over neighbours to at most `MAX_POINTS`."""
    size = max(1, -(-len(points) // MAX_POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    xs, ys = ([sum(point[axis] for point in part) / len(part) for part in parts] for axis in (0, 1))
    return xs, ys


def terms_of(logs: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    """The names in records: `loss` first, then other losses, those of single scales or parts, then other terms."""
    names = dict.fromkeys(name for log in logs for record in log for name in record)
    return sorted(names, key=lambda name: (name in NO_LOSSES, "/" in name, name != "loss"))


def meaning(term: str) -> str:
    """The explanation of a log's term."""
    metric = describe(term.partition("/")[0], TRAINING)
    if metric is None:
        return ""
    text = metric.meaning + f" In {metric.unit}." * bool(metric.unit)
    scale = term.partition("/")[2]
    return f"{text} Scale of {scale} px." if scale.isdigit() else text


def picture_parts(runs: Sequence[Run]) -> list[report.Html]:
    """The latest picture of each run; a damaged one is named."""
    pictures, broken = [], []
    for run in runs:
        if run.picture is None:
            continue
        try:
            picture = to_pil(read_image(run.picture))
        except BadImageError as error:
            problem = problem_of(run.picture, run.picture.parent, error)
            broken.append(report.text(f"{run.name}: {problem}."))
            continue
        size = f"{picture.width} x {picture.height} px" + ", reduced" * (max(picture.size) > MAX_PICTURE)
        picture.thumbnail((MAX_PICTURE, MAX_PICTURE))
        what = f"{run.name}, step {run.picture.stem.removeprefix('step-').lstrip('0')}"
        pictures.append(report.picture(picture, what, f"{what} ({size})"))
    if not pictures:
        return broken
    text = "Outputs of the averaged model. Select a picture to enlarge it; arrow keys show the next."
    return [report.text(text), report.columns(*pictures), *broken]
