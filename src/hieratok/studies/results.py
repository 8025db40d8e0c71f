"""Results of a study as typed values, and their `STUDY.json`.

The file has the fields by name, except for classes with their own `to_json`.
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
"""Next to the metrics.json of an analysis with a density."""
Verdict = Literal["agrees", "opposite", "not resolved", "-"]


# --- One row with one seed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Time and hardware of a run's training: `trained.json` in its folder."""

    images_seen: int
    seconds: float
    images_per_second: float
    hardware: str
    torch: str


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of a row."""

    folder: str
    run: TokenizerRun | GeneratorRun
    trained: Trained

    def to_json(self) -> dict[str, Any]:
        """Its facts and all of its settings."""
        what = {"folder": self.folder, "kind": self.run.kind, "seed": self.run.train.seed}
        return {**what, **asdict(self.trained), "settings": plain(self.run)}


@dataclass(frozen=True)
class Agreement:
    """Agreement between the scales of samples (appendix D)."""

    n: int
    """Samples."""
    folder: str
    """Folder of the samples."""
    psnr: Mapping[str, Estimate]
    """PSNR in dB of each coarser scale against the finest, by the name of the scale's folder; coarse to fine."""

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        means = {Quantity("psnr", scale): value for scale, value in self.psnr.items()}
        return {"n": self.n, "folder": self.folder, **to_json(means)}


@dataclass(frozen=True)
class Curve:
    """The evaluations of a generator during its training (figure 4)."""

    points: list[dict[str, float]]
    """Records of metrics by name, with `step` and `images`."""

    @property
    def last(self) -> dict[str, float]:
        """The record of the last step."""
        return {name: value for name, value in self.points[-1].items() if name not in ("step", "images")}

    @property
    def distance(self) -> str:
        """The name of its Frechet distance."""
        return next(name for name in self.points[0] if name == "fid" or name.startswith("fd-"))

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        return {"points": self.points, **self.last}


def cost_numbers(cost: Cost) -> dict[str, float]:
    """Numbers by name; parameters in millions, as in the paper."""
    return asdict(cost) | {"parameters": cost.parameters / 1e6}


@dataclass(frozen=True)
class Measured:
    """Measurements of a row; the fields are the `Need`s. None: not needed by the study."""

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
        """The numbers of one need for the paper's columns, by name."""
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
        """Warnings of all measurements."""
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
        """The estimate, without the number of seeds."""
        return Estimate(self.mean, self.low, self.high)


@dataclass(frozen=True)
class Effect:
    """A row minus its reference row."""

    paper: float | None
    """The paper's effect; None: the paper gives no numbers."""
    ours: Interval | None
    """Ours: the mean over seeds of the differences at the same seed; None: not measured."""
    verdict: Verdict
    counts: bool
    """Whether it counts: the paper's number is not a probable misprint."""


@dataclass(frozen=True)
class ComparedRow:
    """One metric of one row."""

    paper: float | None
    ours: Interval | None
    difference: float | None
    """Ours minus the paper's; None: one is missing, or they are of two networks."""
    effect: Effect | None
    """None for a row without a reference row."""

    def to_json(self) -> dict[str, Any]:
        """Values by name, including the effect's."""
        line = {"paper": self.paper, "ours": as_json(self.ours), "difference": self.difference}
        if (effect := self.effect) is None:
            return line
        line |= {"paper_effect": effect.paper, "effect": as_json(effect.ours)}
        return line | {"verdict": effect.verdict, "counts": effect.counts}


@dataclass(frozen=True)
class Comparison:
    """One of the paper's metrics in every row, with one measured number."""

    metric: str
    """Of `paper.METRICS`."""
    measured: str | None
    """The measured number's name; None: there is none."""
    is_metric: bool
    """Whether the number is that metric; otherwise another network's, of which only the direction can be compared."""
    rows: Sequence[ComparedRow]


@dataclass(frozen=True)
class ComparedCurves:
    """Figure 4: two rows' curves and their speed-up."""

    measured: str
    """The distance's name."""
    steps: Sequence[float]
    curves: Mapping[str, list[list[float]]]
    """Curves (seeds, steps) of the first and the second row, by name."""
    levels: Sequence[SpeedUp]


@dataclass(frozen=True)
class StudyRow:
    """A row of the paper, and ours for each seed."""

    label: tuple[str, ...]
    against: int | None
    paper: Mapping[str, float]
    seeds: Sequence[Cell]
    """None if not run."""

    @property
    def name(self) -> str:
        """The label as one text."""
        return ", ".join(self.label)


@dataclass(frozen=True)
class StudyResult:
    """Settings, every row's numbers, and for each metric the paper's number, ours and the effects."""

    title: str
    columns: tuple[str, ...]
    """Headers of the rows' labels."""
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
        """The content of `STUDY.json`."""
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
