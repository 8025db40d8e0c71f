"""The page of an evaluation: metrics with units and directions, worst and best pictures, the whole protocol."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pages import Reader, assert_self_contained
from hieratok.cli import main
from hieratok.core.glossary import EVALUATION, describe
from hieratok.core.tables import digits, flat
from hieratok.evaluation.reconstruction import Numbers, ReconstructionMetrics, area_resize
from hieratok.evaluation.results import Result, format_numbers
from hieratok.reports.evaluation import write


@pytest.fixture
def images(tmp_path) -> Path:
    """Eleven originals, and the same with noise that grows from image to image; the first is left as it is."""
    for i in range(11):
        random = np.random.default_rng(i)
        original = random.integers(60, 200, (16, 16, 3))
        noise = random.integers(-4 * i, 4 * i + 1, original.shape)
        for name, pixels in (("a", original), ("b", original + noise)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{i:02d}.png")
    return tmp_path


def test_the_page_of_two_sets_of_images(images):
    out = images / "out"
    arguments = ["--features", "none", "--lpips", "[]", "--out", str(out)]
    assert main(["evaluate", "images", str(images / "a"), str(images / "b"), *arguments]) == 0
    document = (out / "index.html").read_text()
    assert_self_contained(document)
    reader = Reader(document)
    assert not reader.open
    result = json.loads((out / "metrics.json").read_text())
    row = reader.cells.index("PSNR")
    ends = ", ".join(f"{end:.4g}" for end in result["intervals"]["16"]["psnr"])
    assert reader.cells[row : row + 4] == ["PSNR", f"{result['psnr']:.5g} [{ends}]", "dB", "higher"]
    assert reader.cells[reader.cells.index("identical images") + 1] == "1"
    for name, value in flat(result["manifest"]):
        assert reader.cells[reader.cells.index(name) + 1] == value, "every fact of the protocol"
    shown = [str(a["alt"]) for a in reader.tags("img") if a.get("alt")]
    names = list(dict.fromkeys(alt.partition(",")[0].removesuffix(".png") for alt in shown))
    assert names == ["10", "09", "08", "07", "00", "01", "02", "03"]  # the worst first, then the best
    assert len(shown) == 3 * len(names)
    assert "∞ dB" in reader.text


def test_the_page_shows_coarse_scales_intervals_and_how_psnr_is_distributed(tmp_path):
    """Three images at 8 and 16 px, of which one is identical at the finest scale."""
    metrics = ReconstructionMetrics(patch_size=8)
    random = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 200, (3, 3, 16, 16), generator=random, dtype=torch.uint8)
    noise = torch.tensor([0, 3, 9], dtype=torch.uint8).view(3, 1, 1, 1)
    metrics.update(["a", "b", "c"], originals, [area_resize(originals, (8, 8)) + 5, originals + noise])
    intervals = {
        side: {name: (value.low, value.high) for name, value in row.items()}
        for side, row in metrics.estimates().items()
    }
    inputs = {"a": "A", "b": "B"}
    write(tmp_path, Result(metrics.compute(), {"protocol": "images"}, [], inputs, intervals), metrics)
    reader = Reader((tmp_path / "index.html").read_text())
    values = [10 * math.log10(255**2 / error**2) for error in (3, 9)]
    half = 12.7062 * abs(values[0] - values[1]) / 2  # t of one degree of freedom; two values' standard error
    mean = sum(values) / 2
    row = reader.cells.index("PSNR")
    assert reader.cells[row + 2] == f"{mean:.5g} [{mean - half:.4g}, {mean + half:.4g}]"
    assert "2 images of the finest scale" in reader.text
    assert "1 more are identical" in reader.text
    alts = [str(a["alt"]) for a in reader.tags("img") if a.get("alt")]
    assert alts[:4] == ["c, 8 px", "c, 16 px", "c, original", "c, error"]
    assert "64 or more of 255 grey levels" in reader.text


def test_without_out_nothing_is_written(images):
    before = sorted(images.rglob("*"))
    arguments = ["--features", "none", "--lpips", "[]"]
    assert main(["evaluate", "images", str(images / "a"), str(images / "b"), *arguments]) == 0
    assert sorted(images.rglob("*")) == before


@pytest.mark.parametrize(
    ("key", "label", "better"),
    [
        ("psnr", "PSNR", "higher"),
        ("lpips-vgg", "LPIPS-vgg", "lower"),
        ("perceptual[squeeze-caffe]", "perceptual[squeeze-caffe]", "lower"),
        ("fid", "FID", "lower"),
        ("fd-tiny", "FD-tiny", "lower"),
        ("class-score-tiny", "class-score-tiny", "higher"),
        ("is", "IS", "higher"),
        ("recall", "recall", "higher"),
        ("psnr/32", "PSNR, 32 px", "higher"),
        ("baseline_psnr/32x48", "PSNR of one colour per token, 32x48 px", "neither"),
    ],
)
def test_names_and_directions(key, label, better):
    metric = describe(key)
    assert metric is not None
    assert (metric.label, metric.better) == (label, better)
    assert metric.meaning


def test_other_names_are_no_metrics():
    assert all(describe(name) is None for name in ("seconds", "nn", "psnr_patch_mean", "isotropy", "fidelity"))
    assert len({metric.label for metric in EVALUATION.values()}) == len(EVALUATION)
    assert describe("speed/32") is None
    assert format_numbers(Numbers({"n": 3, "psnr": 21.123456})).splitlines() == [
        "images          3",
        "PSNR (dB)  21.123",
    ]


def test_digits():
    assert [digits(x) for x in (None, 12345, 0.123456, float("inf"))] == ["–", "12,345", "0.12346", "∞"]
