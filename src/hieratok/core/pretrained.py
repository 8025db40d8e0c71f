"""Models that are saved to a folder and loaded from one, or from the hub."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hieratok.core import checkpoint


class Pretrained(nn.Module):
    """A model whose configuration is a dataclass, its only argument."""

    model_type: ClassVar[str]
    """The model's type in `config.json`."""
    kind: ClassVar[str]
    """Name of its folder in a run."""
    config_class: ClassVar[type]
    others: ClassVar[tuple[str, ...]] = ()
    """Names in `config.json` besides the configuration."""
    config: Any

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is created if needed.

        `state_dict` is the whole model's where this module holds only a part of it (FSDP).
        """
        weights = self.state_dict() if state_dict is None else state_dict
        settings = {name: value for name, value in asdict(self.config).items() if value is not None}
        facts = {"model_type": self.model_type, **settings, **self._others()}
        checkpoint.save(folder, weights, facts)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The model in a run's folder, a folder written by `save_pretrained`, or a hub id ("name/model").

        Returns it in evaluation mode. A hub id is downloaded only if no such folder exists here.

        Args:
            source: where it is.
            dtype: of the weights, such as torch.bfloat16; None: float32.
            device: where to put it, such as "cuda".
            revision: branch, tag or commit on the hub.
            cache_dir: where downloads are kept; None: the hub's own folder.
            token: for private models; None: the token that this machine is logged in with; False: none.
            local_files_only: use earlier downloads only, without the network.

        Raises:
            FileNotFoundError: nothing there, or a file is missing.
            ValueError: the files do not fit this class or each other, or `dtype` is not floating-point; the message
                says where.
        """
        folder = checkpoint.find(
            source,
            inside=cls.kind,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        config, others = checkpoint.load_config(folder, cls.model_type, cls.config_class, others=cls.others)
        with torch.device("meta"):
            model = cls(config)
        model._take_over(others, folder)
        checkpoint.load_weights(folder, model, device, dtype)
        return model.eval()

    def _others(self) -> dict[str, Any]:
        """What is written into `config.json` besides the configuration."""
        return {}

    def _take_over(self, others: dict[str, Any], folder: Path) -> None:
        """Check the folder, and the other values of its `config.json`, before weights are read.

        Raises:
            ValueError: they do not fit.
        """
