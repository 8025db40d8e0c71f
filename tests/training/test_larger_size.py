"""Training on at another image size: it begins as what the smaller tokenizer does there, or is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.runs import small_run
from hieratok import HieraTok
from hieratok.studies import recipes
from hieratok.tokenizer.attention import AttentionMode
from hieratok.tokenizer.config import DownsampleMode
from hieratok.training.tokenizer import TokenizerRun, initial_tokenizer, train_tokenizer


def saved(run: TokenizerRun, folder: Path) -> HieraTok:
    """A tokenizer with weights large enough that every part of it shows in what it makes."""
    torch.manual_seed(1)
    tokenizer = HieraTok(replace(run.model, init_std=0.2)).eval()
    with torch.no_grad():
        for positions in (tokenizer.encoder.positions, tokenizer.decoder.positions, tokenizer.decoder.scale_embeddings):
            positions.normal_()
    tokenizer.save_pretrained(folder)
    return tokenizer


def enlarged(run: TokenizerRun, factor: int, start_from: Path) -> TokenizerRun:
    """`run` with images and token maps `factor` times as wide."""
    scales = tuple(factor * s for s in run.model.scales)
    model = replace(run.model, image_size=factor * run.model.image_size, scales=scales)
    return replace(run, model=model, start_from=str(start_from))


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    ("scales", "downsample", "attention"),
    [
        ((1, 2, 4), "conv", "causal"),
        ((1, 3, 4), "conv", "full"),
        ((1, 2, 4), "interpolate", "independent"),
        ((4,), "interpolate", "causal"),
    ],
)
def test_it_begins_as_what_the_smaller_one_does_at_its_size(
    tmp_path, factor, scales: tuple[int, ...], downsample: DownsampleMode, attention: AttentionMode
):
    run = small_run(tmp_path)
    run = replace(run, model=replace(run.model, scales=scales, downsample=downsample, attention=attention))
    before = saved(run, tmp_path / "before")
    larger = initial_tokenizer(enlarged(run, factor, tmp_path / "before"), resumes=False).eval()
    side = factor * run.model.image_size
    assert larger.encoder.positions.shape[-2:] == (side // 4, side // 4)  # no longer interpolated at every call
    images = torch.rand(2, 3, side, side) * 2 - 1
    theirs, ours = before.encode(images), larger.encode(images)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logvar, theirs.logvar, rtol=0, atol=1e-5)
    z = theirs.mode()
    pyramids = before.decode_pyramid(z), larger.decode_pyramid(z)
    assert [x.shape[-1] for x in pyramids[1]] == [4 * factor * s for s in scales]
    for x, y in zip(*pyramids, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-5)
    assert pyramids[0][-1].std() > 0.1, "an image that is flat says nothing about positions"


def test_two_steps_change_every_weight_and_are_saved(photos, tmp_path):
    run = small_run(photos, steps=2, save_every=2, picture_every=0, ema_decay=0.0)
    saved(run, tmp_path / "before")
    larger = enlarged(run, 2, tmp_path / "before")
    start = initial_tokenizer(larger, resumes=False).state_dict()
    train_tokenizer(larger, tmp_path / "run")
    finished = load_file(tmp_path / "run" / "tokenizer" / "model.safetensors")
    unchanged = [name for name, value in finished.items() if value.dim() > 1 and torch.equal(value, start[name])]
    assert not unchanged
    again = HieraTok.from_pretrained(tmp_path / "run")
    assert (again.config.image_size, again.config.scales) == (32, (2, 4, 8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(image_size=32, scales=(1, 2, 4, 8)), r"image_size 16 -> 32, model\.scales \(1, 2, 4\) -> \(1, 2, 4, 8\)"),
        (dict(image_size=32, scales=(1, 4, 8)), r"image_size 16 -> 32, model\.scales \(1, 2, 4\) -> \(1, 4, 8\)"),
        (dict(scales=(1, 3, 4)), r"model\.scales \(1, 2, 4\) -> \(1, 3, 4\)$"),
        (dict(image_size=32, scales=(2, 4, 8), decoder_width=48), r"shape: model\.decoder_width 24 -> 48$"),
        (dict(image_size=32, scales=(2, 4, 8), attention="full"), r"shape: model\.attention 'causal' -> 'full'$"),
        (dict(image_size=32, patch_size=8), r"image_size 16 -> 32, model\.patch_size 4 -> 8$"),
    ],
)
def test_other_shapes_are_refused_in_one_line(tmp_path, changes, named):
    run = small_run(tmp_path)
    saved(run, tmp_path / "before")
    other = replace(run, model=replace(run.model, **changes), start_from=str(tmp_path / "before"))
    with pytest.raises(ValueError, match=named) as refused:
        initial_tokenizer(other, resumes=False)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "base", "size"),
    [
        ("f16d16-multi-512", "f16d16-multi", 512),
        ("f16d16-single-512", "f16d16-single", 512),
        ("tiny-multi-256", "tiny-multi", 256),
        ("tiny-single-256", "tiny-single", 256),
    ],
)
def test_recipes_take_their_base_recipes_weights(name, base, size):
    """On the meta device: every weight but the positions has the base's name and shape."""
    larger, smaller = recipes.get(name), recipes.get(base)
    assert isinstance(larger, TokenizerRun)
    assert isinstance(smaller, TokenizerRun)
    assert larger.start_from == f"runs/{base}"
    assert larger.model.image_size == size
    assert (larger.loss, larger.data) == (smaller.loss, smaller.data)
    assert larger.train.learning_rate == smaller.train.learning_rate / 4
    with torch.device("meta"):
        shapes = [
            {k: v.shape for k, v in HieraTok(run.model).state_dict().items() if not k.endswith(".positions")}
            for run in (larger, smaller)
        ]
    assert shapes[0] == shapes[1]
