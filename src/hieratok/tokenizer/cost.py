"""What a tokenizer costs: parameters, FLOPs, tokens (paper, table 7)."""

from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from hieratok.core.glossary import COST
from hieratok.core.tables import Table
from hieratok.tokenizer.model import HieraTok, TokenizerConfig
from hieratok.tokenizer.scales import Scales


@dataclass(frozen=True)
class Cost:
    """One row of table 7. GFLOPs are of one forward pass of one image, two per multiply-add."""

    parameters: float
    gflops: float
    gflops_without_attention: float
    """Without attention's products of queries with keys and of attention weights with values."""
    encoder_tokens: int
    decoder_tokens: int


# Table 7. The paper does not say how it counts FLOPs: its numbers lie between our two counts.
PAPER = {
    "f16d16-single": {"parameters": 346.25e6, "gflops": 182.36, "encoder_tokens": 256, "decoder_tokens": 256},
    "f16d16-multi": {"parameters": 401.18e6, "gflops": 230.45, "encoder_tokens": 256, "decoder_tokens": 341},
}


def measure(config: TokenizerConfig) -> Cost:
    """Count on the meta device: no memory, no arithmetic, whatever the model's size. Of what is trained: a frozen
    encoder does not count."""
    with torch.device("meta"):
        model = HieraTok(config).eval()
        images = torch.empty(1, 3, config.image_size, config.image_size)
        z = torch.empty(1, config.latent_channels, *config.grid)
        with FlopCounterMode(display=False) as counter:
            model.decode_pyramid(z) if config.encoder else model(images)
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    with_weights = sum(by_operator.get(f"aten.{name}", 0) for name in ("mm", "addmm", "convolution"))
    scales = Scales.of(config.scales, config.grid)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=sum(by_operator.values()) / 1e9,
        gflops_without_attention=with_weights / 1e9,
        encoder_tokens=scales.lengths[-1],
        decoder_tokens=scales.num_tokens,
    )


def table(name: str, cost: Cost) -> Table:
    """The cost, compared with the paper's if the paper has it."""
    paper = PAPER.get(name, {})
    rows = []
    for field, value in asdict(cost).items():
        published = paper.get(field.removesuffix("_without_attention"))
        rows.append([COST[field].with_unit, _text(field, value), _text(field, published) if published else "–"])
    return Table([name, "ours", "paper"], rows)


def _text(field: str, value: float) -> str:
    return str(value) if field.endswith("tokens") else f"{value / 1e6 if field == 'parameters' else value:.2f}"
