"""What a study finds, as typed values, and the `STUDY.json` that holds them.

In the file stand the fields by their names, but where a class has a `to_json` of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

from hieratok.analysis.convergence import SpeedUp
from hieratok.analysis.intervals import Quantity, to_json
from hieratok.analysis.report import LatentReport
from hieratok.core.estimates import Estimate
from hieratok.core.typed import as_json, plain
from hieratok.evaluation.results import Result
from hieratok.studies.config import RunStudy, SizeName
from hieratok.studies.paper import Need
from hieratok.tokenizer.cost import Cost
from hieratok.training.config import GeneratorRun, TokenizerRun

EMBEDDING = "embedding.npz"
"""Beside the metrics.json of an analysis with a density."""
Verdict = Literal["agrees", "opposite", "not resolved", "-"]


# --- What one row gives with one seed ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """How long and where a run was trained: `trained.json` in its folder."""

    images_seen: int
    seconds: float
    images_per_second: float
    hardware: str
    torch: str


@dataclass(frozen=True)
class FinishedRun:
    """A run that a row stands on."""

    folder: str
    run: TokenizerRun | GeneratorRun
    trained: Trained

    def to_json(self) -> dict[str, Any]:
        """What it was, and all of its settings."""
        what = {"folder": self.folder, "kind": self.run.kind, "seed": self.run.train.seed}
        return {**what, **asdict(self.trained), "settings": plain(self.run)}


@dataclass(frozen=True)
class Agreement:
    """How well the scales of one sample agree (appendix D)."""

    n: int
    """Samples."""
    folder: str
    """Where they lie."""
    psnr: Mapping[str, Estimate]
    """In dB, of each coarser scale against the finest, by the name of the scale's folder; coarse to fine."""

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        means = {Quantity("psnr", scale): value for scale, value in self.psnr.items()}
        return {"n": self.n, "folder": self.folder, **to_json(means)}


@dataclass(frozen=True)
class Curve:
    """The evaluations of a generator during its training (figure 4)."""

    points: list[dict[str, float]]
    """Metrics by name, with `step` and `images`."""

    @property
    def last(self) -> dict[str, float]:
        """At the last step."""
        return {name: value for name, value in self.points[-1].items() if name not in ("step", "images")}

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        return {"points": self.points, **self.last}


def cost_numbers(cost: Cost) -> dict[str, float]:
    """By name; parameters in millions, as the paper has them."""
    return asdict(cost) | {"parameters": cost.parameters / 1e6}


@dataclass(frozen=True)
class Measured:
    """What was measured of a row, by what the study needs; the fields are the `Need`s. None: it does not need it."""

    cost: Cost | None = None
    reconstruction: Result | None = None
    density: LatentReport | None = None
    commutation: LatentReport | None = None
    spectrum: LatentReport | None = None
    generation: Result | None = None
    guided: Result | None = None
    samples: Agreement | None = None
    curves: Curve | None = None

    def numbers(self, need: Need) -> Mapping[str, float]:
        """The numbers of one need that may stand in the paper's columns, by name."""
        value = getattr(self, need)
        if isinstance(value, Result):
            return value.numbers.finest
        if isinstance(value, LatentReport):
            return value.density.mean._asdict() if value.density else {}
        if isinstance(value, Cost):
            return cost_numbers(value)
        return value.last if isinstance(value, Curve) else {}

    @property
    def warnings(self) -> list[str]:
        """Of all that was measured."""
        return [warning for _, value in self._given() if isinstance(value, Result) for warning in value.warnings]

    def to_json(self) -> dict[str, Any]:
        """By need."""
        return {
            need: cost_numbers(value) if isinstance(value, Cost) else as_json(value) for need, value in self._given()
        }

    def _given(self) -> Iterator[tuple[str, Any]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)


@dataclass(frozen=True)
class Cell:
    """A row with one seed."""

    runs: Sequence[FinishedRun] = ()
    measured: Measured = Measured()
    warnings: Sequence[str] = ()


# --- Paper and ours ---------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean over seeds and its 95% interval; without one for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def estimate(self) -> Estimate:
        """Without the number of seeds."""
        return Estimate(self.mean, self.low, self.high)


@dataclass(frozen=True)
class Effect:
    """A row minus the row that it is held against."""

    paper: float | None
    """None: the paper gives no numbers."""
    ours: Interval | None
    """Of seeds, each seed's row against the same seed's; None: not measured."""
    verdict: Verdict
    counts: bool
    """Whether the paper's number is beyond doubt."""


@dataclass(frozen=True)
class ComparedRow:
    """One row's line of one metric."""

    paper: float | None
    ours: Interval | None
    difference: float | None
    """Ours minus the paper's; None: one is missing, or they are of two networks."""
    effect: Effect | None
    """None of a row that is not held against another."""

    def to_json(self) -> dict[str, Any]:
        """By name; the effect's parts beside the rest."""
        line = {"paper": self.paper, "ours": as_json(self.ours), "difference": self.difference}
        if (effect := self.effect) is None:
            return line
        line |= {"paper_effect": effect.paper, "effect": as_json(effect.ours)}
        return line | {"verdict": effect.verdict, "counts": effect.counts}


@dataclass(frozen=True)
class Comparison:
    """One of the paper's metrics in every row, and one measured number beside it."""

    metric: str
    """Of `paper.METRICS`."""
    measured: str | None
    """The measured number's name; None: there is none."""
    is_metric: bool
    """It is that metric; else one of another network, of which only the direction can be compared."""
    rows: Sequence[ComparedRow]


@dataclass(frozen=True)
class ComparedCurves:
    """Figure 4: two rows' curves and how much sooner the second is at the first's levels."""

    measured: str
    """The distance's name."""
    steps: Sequence[float]
    curves: Mapping[str, list[list[float]]]
    """Of the first row and of the second, (seeds, steps), by its name."""
    levels: Sequence[SpeedUp]


@dataclass(frozen=True)
class StudyRow:
    """A row of the paper's, and ours for each seed."""

    label: tuple[str, ...]
    against: int | None
    paper: Mapping[str, float]
    seeds: Sequence[Cell]
    """None where it was not run."""

    @property
    def name(self) -> str:
        """In one text."""
        return ", ".join(self.label)


@dataclass(frozen=True)
class StudyResult:
    """Settings, every row's numbers, and for each metric the paper's, ours and the effects."""

    title: str
    columns: tuple[str, ...]
    """Heads of the rows' labels."""
    size: SizeName
    notes: Sequence[str]
    options: RunStudy
    base: TokenizerRun
    rows: Sequence[StudyRow]
    comparisons: Sequence[Comparison]
    speed_up: ComparedCurves | None
    torch: str
    warnings: Sequence[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What `STUDY.json` holds."""
        return {
            "study": self.options.study,
            "title": self.title,
            "columns": self.columns,
            "size": self.size,
            "notes": self.notes,
            "seeds": self.options.seeds,
            "options": asdict(self.options),
            "base": plain(self.base),
            "rows": as_json(self.rows),
            "comparisons": as_json(self.comparisons),
            "speed_up": as_json(self.speed_up),
            "warnings": self.warnings,
            "torch": self.torch,
        }
