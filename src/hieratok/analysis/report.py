"""Results of an analysis: the numbers as typed values, and their `metrics.json`.

The file is flat: numbers by their names in `hieratok.core.glossary`; `_low` and `_high` are the ends of a mean's 95%
interval, `_std` is a deviation over draws, `floor_` is of Gaussian noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from hieratok.analysis.density import DensityMetrics, Embedding
from hieratok.analysis.intervals import (
    Quantity,
    columns_from_json,
    columns_to_json,
    from_json,
    read_number,
    to_json,
)
from hieratok.core.estimates import Estimate
from hieratok.core.files import read_json_table, shown
from hieratok.core.typed import as_json, typed

Maps = Literal["latent", "rgb"]
"""Maps with a spectrum: latents, and images."""
MAPS: tuple[Maps, ...] = get_args(Maps)


@dataclass(frozen=True)
class Density:
    """Density of latents, and of Gaussian noise of the same number and channels."""

    draws: int
    """Sets of points."""
    mean: DensityMetrics
    std: DensityMetrics | None = None
    """Over draws; None for a single one."""
    floor: DensityMetrics | None = None
    """Metrics of the noise; None: not measured."""
    floor_std: DensityMetrics | None = None

    def to_json(self) -> dict[str, float]:
        """Numbers by name."""
        table: dict[str, float] = {"density_draws": self.draws}
        for prefix, mean, std in (("", self.mean, self.std), ("floor_", self.floor, self.floor_std)):
            for name in DensityMetrics._fields if mean else ():
                table[f"{prefix}{name}"] = getattr(mean, name)
                if std:
                    table[f"{prefix}{name}_std"] = getattr(std, name)
        return table

    @classmethod
    def from_json(cls, table: Mapping[str, Any], where: str) -> "Density | None":
        """From a file's table; None if it has none."""

        def metrics(prefix: str, suffix: str) -> DensityMetrics | None:
            names = [f"{prefix}{name}{suffix}" for name in DensityMetrics._fields]
            if names[0] not in table:
                return None
            return DensityMetrics(*(read_number(table, name, where) for name in names))

        mean = metrics("", "")
        if mean is None:
            return None
        draws = typed(table.get("density_draws"), int, f"{where}: density_draws")
        return cls(draws, mean, metrics("", "_std"), metrics("floor_", ""), metrics("floor_", "_std"))


@dataclass(frozen=True)
class Channels:
    """Metrics of the latent channels."""

    effective_rank: float
    participation_ratio: float
    active_channels: int
    dead_channels: int
    channel_std: list[float]
    """Standard deviation of the posterior mean, one for each channel."""
    kl: Estimate | None = None
    """Nats per image; None for a tokenizer without a posterior."""
    channel_kl: list[Estimate] = field(default_factory=list)
    """The same of each channel."""

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        table = {f.name: getattr(self, f.name) for f in fields(self)[:5]}
        if self.kl is None:
            return table
        return {**table, **to_json({Quantity("kl"): self.kl}), **columns_to_json("channel_kl", self.channel_kl)}

    @classmethod
    def from_json(cls, table: Mapping[str, Any], where: str) -> "Channels | None":
        """From a file's table; None if it has none."""
        if "effective_rank" not in table:
            return None
        return cls(
            read_number(table, "effective_rank", where),
            read_number(table, "participation_ratio", where),
            typed(table.get("active_channels"), int, f"{where}: active_channels"),
            typed(table.get("dead_channels"), int, f"{where}: dead_channels"),
            typed(table.get("channel_std"), list[float], f"{where}: channel_std"),
            from_json(table, where).get(Quantity("kl")),
            columns_from_json(table, "channel_kl", where),
        )


@dataclass(frozen=True)
class Spectrum:
    """Frequencies of maps."""

    power_slope: Estimate
    dct: list[Estimate] = field(default_factory=list)
    """Mean |coefficient| of 8 x 8 blocks in zigzag order, relative to DC; empty for maps that are smaller."""
    high_frequency_share: Estimate | None = None
    """None for maps that are smaller."""

    def to_json(self, maps: Maps) -> dict[str, Any]:
        """Numbers by name."""
        slope = to_json({Quantity(f"{maps}_power_slope"): self.power_slope})
        if self.high_frequency_share is None:
            return {**slope}
        share = to_json({Quantity(f"{maps}_high_frequency_share"): self.high_frequency_share})
        return {**slope, **columns_to_json(f"{maps}_dct", self.dct), **share}

    @classmethod
    def from_json(cls, table: Mapping[str, Any], maps: Maps, where: str) -> "Spectrum | None":
        """From a file's table; None if it has none."""
        found = from_json(table, where)
        slope = found.get(Quantity(f"{maps}_power_slope"))
        if slope is None:
            return None
        share = found.get(Quantity(f"{maps}_high_frequency_share"))
        return cls(slope, columns_from_json(table, f"{maps}_dct", where), share)


DECODED = (
    "commutation_error",
    "commutation_target_mse",
    "pyramid_error",
    "pyramid_target_mse",
    "reconstruction_rms",
    "equivariance_decoder",
    "equivariance_encoder",
    "noise_psnr",
)
"""Stems of the metrics that need decoding."""


@dataclass(frozen=True)
class LatentReport:
    """The numbers of an analysis; None or empty if not measured."""

    n: int
    """Number of images, or of latents or points of a file."""
    manifest: dict[str, Any]
    """Facts that the numbers depend on."""
    latent_channels: int | None = None
    latent_grid: tuple[int, int] | None = None
    """(h, w)."""
    density: Density | None = None
    channels: Channels | None = None
    decoded_images: int | None = None
    """Number of images that `decoded` and `spectra` are means over."""
    decoded: Mapping[Quantity, Estimate] = field(default_factory=dict)
    """Of `DECODED`."""
    spectra: Mapping[Maps, Spectrum] = field(default_factory=dict)
    inputs: Mapping[str, str] | None = None
    """Options that name the tokenizer and images."""
    folder: str | None = None
    """Folder of its page, in a study."""

    def of(self, stem: str) -> dict[str | float, Estimate]:
        """The values of one decoded metric, by detail."""
        return {quantity.detail: value for quantity, value in self.decoded.items() if quantity.stem == stem}

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        spectra = [spectrum.to_json(maps) for maps, spectrum in self.spectra.items()]
        table = {
            "n": self.n,
            "latent_channels": self.latent_channels,
            "latent_grid": as_json(self.latent_grid),
            **(self.density.to_json() if self.density else {}),
            **(self.channels.to_json() if self.channels else {}),
            "decoded_images": self.decoded_images,
            **to_json(self.decoded),
            **{name: value for part in spectra for name, value in part.items()},
            "manifest": self.manifest,
            "inputs": self.inputs,
            "folder": self.folder,
        }
        absent = {name for name, value in vars(self).items() if value is None}
        return {name: value for name, value in table.items() if name not in absent}

    @classmethod
    def from_json(cls, table: Mapping[str, Any], where: str) -> "LatentReport":
        """The inverse of `to_json`.

        Args:
            table: of a `metrics.json`.
            where: its file, for messages.

        Raises:
            ValueError: a value is missing or has another type; names the file and the value.
        """

        def value(name: str, wanted: Any) -> Any:
            return typed(table.get(name), wanted, f"{where}: {name}")

        spectra: dict[Maps, Spectrum | None] = {maps: Spectrum.from_json(table, maps, where) for maps in MAPS}
        return cls(
            n=value("n", int),
            manifest=value("manifest", dict),
            latent_channels=value("latent_channels", int | None),
            latent_grid=value("latent_grid", tuple[int, int] | None),
            density=Density.from_json(table, where),
            channels=Channels.from_json(table, where),
            decoded_images=value("decoded_images", int | None),
            decoded={q: found for q, found in from_json(table, where).items() if q.stem in DECODED},
            spectra={maps: spectrum for maps, spectrum in spectra.items() if spectrum},
            inputs=value("inputs", dict | None),
            folder=value("folder", str | None),
        )

    @classmethod
    def read(cls, path: Path) -> "LatentReport":
        """Read a `metrics.json`. Raises as `read_json_table` and `from_json`."""
        return cls.from_json(read_json_table(path), shown(path))


@dataclass(frozen=True)
class CommutationImages:
    """Pictures of commutation for a few images."""

    names: Sequence[str]
    """Names of the B images."""
    originals: Tensor
    """uint8 (B, 3, H, W)."""
    coarse: Sequence[Tensor]
    """D(T_k z), uint8 (B, 3, H_k, W_k), coarse to fine."""
    full: Tensor
    """D(z), uint8 (B, 3, H, W)."""


@dataclass(frozen=True)
class Analysis:
    """An analysis's numbers and pictures."""

    title: str
    report: LatentReport
    embedding: Embedding | None = None
    """None without a density."""
    images: CommutationImages | None = None
    """None without coarser scales."""
