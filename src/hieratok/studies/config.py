"""Options of `hieratok study`. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

SizeName = Literal["tiny", "small", "paper"]


@dataclass(kw_only=True)
class RunStudy:
    """Run one of the paper's tables or figures, and set the paper's numbers beside its own; or compare encoders.

    Example: hieratok study table3; hieratok study table2 --size small --data PHOTOS/train --val PHOTOS/val --plan
    """

    study: str
    """table1 .. table7, figure4, figure5, appendix-b, appendix-d; encoders, which is not the paper's."""
    size: SizeName | None = None
    """tiny: less than a minute per row on a CPU; small: minutes per row on one GPU; paper: the paper's settings.
    Default: tiny, and paper for table7, which trains nothing."""
    data: str | None = None
    """Images to train on. Default for tiny: ten bundled photos."""
    val: str | None = None
    """Held-out images for evaluation."""
    out: str | None = None
    """Folder of pages, tables and runs. Default: studies/SIZE."""
    base: str | None = None
    """Recipe or YAML file of the multi-scale tokenizer whose variants the rows are, instead of the size's."""
    steps: int | None = None
    """Training steps of every run, instead of the size's."""
    generator_steps: int | None = None
    """Training steps of every generator, instead of --steps or the size's."""
    samples: int | None = None
    """Number of samples for gFID, instead of the size's."""
    seeds: int = 1
    """Seeds, which is runs of each row; several give intervals."""
    row: int | None = None
    """Run only this row, counted from 1, and write no page: to divide rows among machines. A last call without --row
    then assembles the study."""
    plan: bool = False
    """Print what is finished, what would be trained, and an estimate of the time; train nothing."""
    features: str = "none"
    """Feature network of FID, as for `hieratok evaluate`. none: no rFID, and no generator is trained."""
    weights: str | None = None
    """File with the feature network's weights. Default: torch's cache."""
    lpips: list[str] = field(default_factory=list)
    """Trunks of LPIPS, each optionally =FILE, as for `hieratok evaluate`."""
    encoders: list[str] = field(default_factory=list)
    """For study encoders: frozen encoders, each a row next to the paper's ViT: timm:NAME, timm:NAME=FILE with its
    weights, or diffusers:FOLDER."""
    reference: str | None = None
    """Real images to compare samples with, or an .npz of their statistics. Default: those of --val. Required for size
    paper: ADM's VIRTUAL_imagenet256_labeled.npz."""

    @property
    def steps_of_generators(self) -> int | None:
        """The value of --generator_steps, else of --steps."""
        return self.generator_steps or self.steps

    def __post_init__(self):
        for name, least in (("seeds", 1), ("steps", 1), ("generator_steps", 1), ("samples", 2), ("row", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}")
