"""The evaluation protocols end to end on files: results, manifests, batches and processes, bad input."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from hieratok.core.checkpoint import json_text
from hieratok.core.distributed import process_group
from hieratok.data.images import to_uint8
from hieratok.evaluation import protocols
from hieratok.evaluation.config import (
    EvaluateCompare,
    EvaluateImages,
    EvaluateReconstruction,
    EvaluateSamples,
    EvaluateStats,
)
from hieratok.evaluation.features import FeatureNetwork
from hieratok.evaluation.images import NpzImages, batches, pair
from hieratok.evaluation.pixels import PixelMetrics
from hieratok.evaluation.protocols import compare, write_statistics
from hieratok.evaluation.reconstruction import ReconstructionMetrics, area_resize, one_colour_per_token
from hieratok.evaluation.results import Result
from hieratok.evaluation.statistics import FeatureSet, SetStatistics


class Tiny(nn.Module):
    """12 features of uint8 images: colours of a 2 x 2 grid."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


class TinyWithSpace(Tiny):
    """Beside them 27 features that keep positions."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images), F.adaptive_avg_pool2d(images.float(), 3).flatten(1)


def tiny(weights: Path | None = None) -> nn.Module:
    return Tiny()


def real(weights: Path | None = None) -> FeatureNetwork:
    """A stand-in that passes for Inception with its real weights."""
    class_weights = torch.randn(10, 12, generator=torch.Generator().manual_seed(0)) / 100
    return FeatureNetwork("inception", TinyWithSpace(), lambda x: x, "as it is", "6726825d" + 56 * "0", class_weights)


TINY, REAL = f"{__name__}:tiny", f"{__name__}:real"


def noise(num: int, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.rand(num, 3, 4, 4, generator=generator), (size, size), mode="bicubic")
    return (255 * images).clamp(0, 255).round().to(torch.uint8)


def degrade(images: Tensor, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (images + 9 * torch.randn(images.shape, generator=generator)).clamp(0, 255).round().to(torch.uint8)


def write_folder(folder: Path, images: Tensor, suffix: str = "png", names: list[str] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        name = names[i] if names else f"{i:06}"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.{suffix}")
    return str(folder)


def write_npz(path: Path, images: Tensor, compressed: bool = False) -> str:
    save = np.savez_compressed if compressed else np.savez
    save(path, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
    return str(path)


def images_options(a: str, b: str, **more: Any) -> EvaluateImages:
    return EvaluateImages(a=a, b=b, **{"features": TINY, "lpips": []} | more)


def samples_options(path: str, reference: str, **more: Any) -> EvaluateSamples:
    return EvaluateSamples(path=path, reference=reference, **{"features": TINY} | more)


def evaluate_images(options: EvaluateImages) -> dict[str, Any]:
    """What metrics.json holds."""
    return protocols.evaluate_images(options).to_json()


def evaluate_samples(options: EvaluateSamples) -> dict[str, Any]:
    return protocols.evaluate_samples(options).to_json()


def evaluate_reconstruction(*arguments: Any, **more: Any) -> dict[str, Any]:
    return protocols.evaluate_reconstruction(*arguments, **more).to_json()


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result.items() if isinstance(value, int | float)}


# --- Images against images -----------------------------------------------------------------------------------------


def test_images_gives_the_metrics_of_pairs_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = noise(20)
    y = degrade(x)
    y[3] = x[3]
    a, b = write_folder(tmp_path / "a", x), write_folder(tmp_path / "b", y)
    result = evaluate_images(images_options(a, b, out=str(tmp_path / "out")))

    expected = PixelMetrics()
    expected.update(x, y, [str(i) for i in range(20)])
    features = [np.asarray(Tiny()(images), dtype=np.float64) for images in (x, y)]
    assert expected.compute().items() <= result.items()
    assert result["psnr_identical"] == 1
    mean = ((features[0].mean(0) - features[1].mean(0)) ** 2).sum()
    assert result["fd-tiny"] > mean
    assert set(numbers(result)) == {"n", "psnr", "psnr_identical", "ssim", "fd-tiny"}

    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    assert sorted(os.listdir(tmp_path / "out")) == ["metrics.json", "reconstructions.png"]
    Image.open(tmp_path / "out" / "reconstructions.png").verify()
    table = capsys.readouterr().out
    assert "PSNR (dB)" in table
    assert "FD-tiny" in table
    assert f"{result['psnr']:.5g}" in table


def test_json_is_all_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = noise(5)
    a = write_npz(tmp_path / "a.npz", x)
    result = evaluate_images(images_options(a, a, json=True))
    printed = json.loads(capsys.readouterr().out)
    assert result["psnr"] == math.inf
    assert printed["psnr"] is None  # JSON has no infinity
    assert printed["psnr_identical"] == 5
    assert printed["fd-tiny"] == pytest.approx(0, abs=1e-9)


def test_folders_and_npz_files_give_the_same_numbers(tmp_path: Path) -> None:
    x, y = noise(10), degrade(noise(10))
    forms = [
        (write_folder(tmp_path / "a", x), write_folder(tmp_path / "b", y, "bmp")),
        (write_npz(tmp_path / "a.npz", x), write_npz(tmp_path / "b.npz", y, compressed=True)),
        (write_npz(tmp_path / "a.npz", x), str(tmp_path / "b")),
    ]
    results = [evaluate_images(images_options(*form)) for form in forms]
    assert numbers(results[0]) == numbers(results[1]) == numbers(results[2])
    assert results[0]["manifest"] == results[1]["manifest"]


def test_jpeg_suffixes_in_capitals_are_found(tmp_path: Path) -> None:
    x = noise(4)
    a = write_folder(tmp_path / "a", x, names=["p", "q", "r", "s"])
    b = write_folder(tmp_path / "b", x, "JPEG", names=["p", "q", "r", "s"])
    assert evaluate_images(images_options(a, b))["n"] == 4


@settings(max_examples=10, deadline=None)
@given(num=st.integers(2, 30), height=st.integers(11, 20), width=st.integers(11, 20), seed=st.integers(0, 99))
def test_batches_order_and_merging_change_nothing(num: int, height: int, width: int, seed: int) -> None:
    x = noise(num, 32, seed)[..., :height, :width]
    y = degrade(x, seed)
    names = [f"image {i}" for i in range(num)]
    order = list(range(num))
    results = []
    for batch_size, parts in itertools.product((1, 7, 64), (1, 2)):
        random.Random(seed + batch_size).shuffle(order)
        metrics = [ReconstructionMetrics(real()) for _ in range(parts)]
        for i, start in enumerate(range(0, num, batch_size)):
            chosen = order[start : start + batch_size]
            metrics[i % parts].update([names[j] for j in chosen], x[chosen], y[chosen])
        for other in metrics[1:]:
            metrics[0].merge(other)
        results.append((metrics[0].compute().finest, metrics[0].reference(), np.asarray(metrics[0].picture())))
    for result, reference, picture in results:
        # The root of a covariance that is nearly singular turns rounding errors of 1e-16 into 1e-8.
        assert result == pytest.approx(results[0][0], rel=1e-6, abs=1e-6)
        assert reference == results[0][1]
        assert np.array_equal(picture, results[0][2])


def test_different_sizes_are_refused_or_cropped_when_asked(tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a", noise(3, 32)), write_folder(tmp_path / "b", noise(3, 16))
    with pytest.raises(ValueError, match=r"000000\.png has 16 x 16 pixels where 32 x 32 are expected.*--size"):
        evaluate_images(images_options(a, b))
    result = evaluate_images(images_options(a, b, size=16))
    assert result["manifest"]["crop"] == "ADM centre crop to 16"

    write_folder(tmp_path / "a", noise(1, 24), names=["000001"])
    with pytest.raises(ValueError, match=r"000001\.png has 24 x 24 pixels where 32 x 32 are expected"):
        evaluate_images(images_options(a, a))


def test_missing_and_double_names_are_refused(tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a", noise(3)), write_folder(tmp_path / "b", noise(2))
    with pytest.raises(ValueError, match=r"b has no image named 000002"):
        evaluate_images(images_options(a, b))
    with pytest.raises(ValueError, match=r"a has no image named .*000002|b has no image named .*000002"):
        evaluate_images(images_options(b, a))
    write_folder(tmp_path / "b", noise(2), "bmp", names=["000001", "000002"])
    with pytest.raises(ValueError, match="b has two images named 000001"):
        evaluate_images(images_options(a, b))


def test_truncated_and_empty_input_is_refused_by_name(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", noise(3))
    b = write_folder(tmp_path / "b", noise(3))
    file = tmp_path / "b" / "000001.png"
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"hello"):
        file.write_bytes(content)
        for command in (
            lambda: evaluate_images(images_options(a, b)),
            lambda: evaluate_samples(samples_options(b, a)),
            lambda: evaluate_samples(samples_options(a, b)),
            lambda: write_statistics(EvaluateStats(path=b, out=str(tmp_path / "s.npz"), features=TINY)),
        ):
            with pytest.raises(ValueError, match=r"000001\.png") as error:
                command()
            assert "\n" not in str(error.value)
    assert not (tmp_path / "s.npz").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images found in .*empty"):
        evaluate_images(images_options(str(tmp_path / "empty"), a))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_images(images_options(a, str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        evaluate_samples(samples_options(a, str(tmp_path / "nowhere.npz")))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.full((2, 8, 8, 3), np.nan, np.float32)}, "arr_0 must be uint8"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.int16)}, "arr_0 must be uint8"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "arr_0 must be uint8 of shape"),
        ({"arr_0": np.zeros((2, 8, 8), np.uint8)}, "arr_0 must be uint8 of shape"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "holds no images"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "no array called arr_0"),
        ({"arr_0": np.array([object()])}, "cannot be read"),
    ],
)
def test_bad_npz_files_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as error:
        NpzImages(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value)


def test_damaged_npz_files_are_refused(tmp_path: Path) -> None:
    whole = Path(write_npz(tmp_path / "a.npz", noise(4))).read_bytes()
    for content in (b"", b"hello", whole[:100], whole[:-100]):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
            NpzImages(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz does not exist"):
        NpzImages(tmp_path / "nowhere.npz")


@settings(max_examples=10, deadline=None)
@given(num=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9), order=st.sampled_from("CF"))
def test_npz_images_are_those_of_numpy(
    tmp_path_factory: pytest.TempPathFactory, num: int, height: int, width: int, order: str
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (num, height, width, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, label=np.arange(num), arr_0=np.array(array, order=order))  # type: ignore[call-overload]
        source = NpzImages(path)
        assert len(source) == num
        for i in range(num):
            assert np.array_equal(source.image(i).permute(1, 2, 0), array[i])


def test_processes_share_the_images_without_repeats(tmp_path: Path) -> None:
    source = NpzImages(write_npz(tmp_path / "a.npz", noise(11)))
    seen = [
        name
        for rank in range(3)
        for names, images in batches(source, (16, 16), 2, process_index=rank, num_processes=3)
        for name in names
        if len(images) == len(names)
    ]
    assert sorted(seen) == [f"{i:06}" for i in range(11)]
    with pytest.raises(ValueError, match="batch size"):
        next(batches(source, 16, 0))
    ids, in_a, in_b = pair(source, source, "a", "b")
    assert in_a == in_b == list(range(11))
    assert ids[3] == "000003"


# --- Samples and statistics ----------------------------------------------------------------------------------------


def test_samples_against_images_equal_samples_against_their_statistics(tmp_path: Path) -> None:
    x = write_npz(tmp_path / "x.npz", noise(40, seed=1))
    y = write_npz(tmp_path / "y.npz", noise(50, seed=2))
    for features in (TINY, REAL):
        out = str(tmp_path / "deep" / "y-stats.npz")
        write_statistics(EvaluateStats(path=y, out=out, features=features))
        from_images = evaluate_samples(samples_options(x, y, features=features))
        from_file = evaluate_samples(samples_options(x, out, features=features))
        assert numbers(from_images) == numbers(from_file)
        assert from_images["manifest"] == from_file["manifest"]
        expected = {
            TINY: {"n", "fd-tiny", "kd-tiny", "precision", "recall"},
            REAL: {"n", "fid", "sfid", "is", "kid", "precision", "recall"},
        }
        assert set(numbers(from_images)) == expected[features]


def test_fewer_images_than_dimensions_survive_the_file_of_statistics(tmp_path: Path) -> None:
    x, y = write_npz(tmp_path / "x.npz", noise(8, seed=1)), write_npz(tmp_path / "y.npz", noise(9, seed=2))
    write_statistics(EvaluateStats(path=y, out=str(tmp_path / "s.npz"), features=TINY))
    from_images = evaluate_samples(samples_options(x, y))
    assert numbers(from_images) == numbers(evaluate_samples(samples_options(x, str(tmp_path / "s.npz"))))
    assert any("too few for the covariance of 12 dimensions" in warning for warning in from_images["warnings"])


def test_adms_reference_file_is_read_as_it_is(tmp_path: Path) -> None:
    """mu, sigma, mu_s, sigma_s of a large set, and images of some of it for precision and recall."""
    samples = write_npz(tmp_path / "samples.npz", noise(30, seed=1))
    everything, some = noise(60, seed=2), noise(60, seed=2)[:20]
    pool, spatial = (np.asarray(f, dtype=np.float64) for f in TinyWithSpace()(everything))
    arrays = {
        "mu": pool.mean(0),
        "sigma": np.cov(pool, rowvar=False),
        "mu_s": spatial.mean(0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=some.permute(0, 2, 3, 1).numpy(), **arrays)
    np.savez(tmp_path / "only.npz", mu=arrays["mu"], sigma=arrays["sigma"])  # pytorch-fid's layout

    result = evaluate_samples(samples_options(samples, str(tmp_path / "VIRTUAL.npz"), features=REAL))
    whole = evaluate_samples(samples_options(samples, write_npz(tmp_path / "all.npz", everything), features=REAL))
    part = evaluate_samples(samples_options(samples, write_npz(tmp_path / "some.npz", some), features=REAL))
    for key in ("fid", "sfid", "is"):
        assert result[key] == pytest.approx(whole[key], rel=1e-8)
    for key in ("kid", "precision", "recall"):
        assert result[key] == part[key]
    assert part["fid"] != pytest.approx(whole["fid"], rel=1e-3)

    only = evaluate_samples(samples_options(samples, str(tmp_path / "only.npz"), features=REAL))
    assert only["fid"] == pytest.approx(whole["fid"], rel=1e-8)
    assert set(numbers(only)) == {"n", "fid", "is"}
    assert any("no kid, precision, recall" in warning for warning in only["warnings"])
    # Neither file names a network, so they are of FID's; nothing else may be compared with them.
    for name in ("VIRTUAL.npz", "only.npz"):
        with pytest.raises(ValueError, match=f"{name} does not name its network.*tiny"):
            evaluate_samples(samples_options(samples, str(tmp_path / name)))


def test_our_statistics_are_in_adms_layout(tmp_path: Path) -> None:
    images = noise(60)
    write_statistics(
        EvaluateStats(path=write_npz(tmp_path / "x.npz", images), out=str(tmp_path / "s.npz"), features=REAL)
    )
    pool, spatial = (np.asarray(f, dtype=np.float64) for f in TinyWithSpace()(images))
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["mu"], pool.mean(0))
        np.testing.assert_allclose(arrays["sigma"], np.cov(pool, rowvar=False))
        np.testing.assert_allclose(arrays["mu_s"], spatial.mean(0))
        np.testing.assert_allclose(arrays["sigma_s"], np.cov(spatial, rowvar=False))


def test_statistics_of_another_network_or_size_are_refused(tmp_path: Path) -> None:
    x = write_npz(tmp_path / "x.npz", noise(20))
    write_statistics(EvaluateStats(path=x, out=str(tmp_path / "s.npz"), features=REAL))
    with pytest.raises(ValueError, match=r"s\.npz is of another network: its network is 'inception', not 'tiny'"):
        evaluate_samples(samples_options(x, str(tmp_path / "s.npz")))
    larger = write_npz(tmp_path / "larger.npz", noise(20, 32))
    with pytest.raises(ValueError, match="images of 32 x 32 pixels cannot be compared with a reference of 16 x 16"):
        evaluate_samples(samples_options(larger, str(tmp_path / "s.npz"), features=REAL))
    with pytest.raises(ValueError, match=r"x\.npz|000000 has 16 x 16 pixels where 32 x 32 are expected"):
        evaluate_samples(samples_options(larger, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": np.full((12, 12), np.nan)}, "not finite"),
        ({"mu": np.full(12, np.inf)}, "not finite"),
        ({"sigma": np.eye(3)}, "not a mean and its covariance"),
        ({"sigma": np.triu(np.ones((12, 12)))}, "not symmetric"),
        ({"mu_s": np.full(12, np.inf), "sigma_s": np.eye(12)}, "not finite"),
        ({"manifest": np.array("{")}, "the manifest of .* is not valid JSON"),
        ({"manifest": np.array("[1]")}, "damaged manifest"),
        ({"manifest": np.array([object()])}, "cannot be read"),
    ],
)
def test_bad_statistics_are_refused(change: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    x = write_npz(tmp_path / "x.npz", noise(20))
    np.savez(tmp_path / "s.npz", **{"mu": np.zeros(12), "sigma": np.eye(12)} | change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as error:
        evaluate_samples(samples_options(x, str(tmp_path / "s.npz"), features=REAL))
    assert "s.npz" in str(error.value)


def test_one_image_is_refused(tmp_path: Path) -> None:
    one, many = write_npz(tmp_path / "1.npz", noise(1)), write_npz(tmp_path / "9.npz", noise(9))
    for path, reference in ((one, many), (many, one)):
        with pytest.raises(ValueError, match="at least 2 images, got 1"):
            evaluate_samples(samples_options(path, reference))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        write_statistics(EvaluateStats(path=one, out=str(tmp_path / "s.npz"), features=TINY))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        evaluate_images(images_options(one, one))
    assert evaluate_images(images_options(one, one, features="none"))["n"] == 1  # pixel metrics need no more


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    x = write_npz(tmp_path / "x.npz", noise(3))
    with pytest.raises(ValueError, match="--features none"):
        evaluate_samples(samples_options(x, x, features="none"))
    with pytest.raises(ValueError, match="--features none"):
        write_statistics(EvaluateStats(path=x, out="s.npz", features="none"))
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        write_statistics(EvaluateStats(path=x, out="s.pt", features=TINY))
    with pytest.raises(ValueError, match="--size must be at least 1"):
        evaluate_images(images_options(x, x, size=0))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*--lpips '\[vgg=FILE\]'"):
        evaluate_images(images_options(x, x, lpips=["vgg=nowhere.pth"]))
    with pytest.raises(ValueError, match="trunk"):
        evaluate_images(images_options(x, x, lpips=["vggg"]))
    with pytest.raises(ValueError, match="batch size"):
        evaluate_images(images_options(x, x, batch_size=0))


def test_a_feature_set_keeps_a_choice_that_order_does_not_change() -> None:
    x, names = noise(50), [f"{i:03}" for i in range(50)]
    sets = []
    for seed in range(3):
        order = list(range(50))
        random.Random(seed).shuffle(order)
        parts = [FeatureSet(real(), keep=6) for _ in range(2)]
        for i, j in enumerate(order):
            parts[i % 2].update(x[[j]], [names[j]])
            assert len(parts[0].kept) <= 12
        parts[0].merge(parts[1])
        sets.append(parts[0].compute())
    everything = Tiny()(x)
    assert sets[0].features is not None
    assert sets[0].features.shape == (6, 12)
    assert all(any(torch.equal(row, other) for other in everything) for row in sets[0].features)
    assert not torch.equal(sets[0].features, everything[:6])
    for other in sets[1:]:
        assert other.features is not None
        assert torch.equal(other.features, sets[0].features)
        assert other.images == sets[0].images
        torch.testing.assert_close(other.pool.sigma(), sets[0].pool.sigma())


def test_feature_sets_refuse_what_is_not_one_set() -> None:
    x = noise(4)
    features = FeatureSet(real(), keep=None)
    features.update(x, list("abcd"))
    with pytest.raises(ValueError, match="b: this image was already counted"):
        features.update(x[:1], ["b"])
    with pytest.raises(ValueError, match="e: this name stands twice"):
        features.update(x[:2], ["e", "e"])
    with pytest.raises(ValueError, match="1 names for 2 images"):
        features.update(x[:2], ["e"])
    with pytest.raises(ValueError, match="16 x 16 and 8 x 8 pixels are not one set"):
        features.update(noise(1, 8), ["e"])
    with pytest.raises(ValueError, match="uint8"):
        features.update(x.float(), list("efgh"))
    with pytest.raises(ValueError, match="one network"):
        features.merge(FeatureSet(real()))
    assert features.compute().pool.n == 4

    nan = FeatureNetwork("nan", nn.Flatten(), lambda images: images.float() / 0, "", "")
    with pytest.raises(ValueError, match="a: the features of nan are not finite"):
        FeatureSet(nan).update(x, list("abcd"))


def test_loading_checks_that_there_are_statistics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no statistics"):
        SetStatistics.load(write_npz(tmp_path / "x.npz", noise(2)), real())
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        SetStatistics.load(tmp_path / "nowhere.npz", real())


# --- Reconstruction ------------------------------------------------------------------------------------------------


def reconstruct(x: Tensor, batch_size: int = 8, scales: tuple[int, ...] = (16,)) -> Any:
    """Batches as a tokenizer would give them: names, originals, a reconstruction for each scale."""
    for start in range(0, len(x), batch_size):
        batch = x[start : start + batch_size]
        pyramid = [degrade(area_resize(batch, (side, side)), start) for side in scales]
        yield [f"{start + i}.png" for i in range(len(batch))], batch, pyramid if len(pyramid) > 1 else pyramid[0]


def reconstruction_options(tmp_path: Path, **more: Any) -> EvaluateReconstruction:
    return EvaluateReconstruction(run=str(tmp_path), data="val", **{"features": TINY, "lpips": []} | more)


def test_reconstruction_judges_each_scale_against_the_original_at_that_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = noise(20)
    pairs = reconstruct(x, scales=(4, 16))
    result = evaluate_reconstruction(pairs, reconstruction_options(tmp_path), total=20, details={"crop": "none"})
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == result
    assert (tmp_path / "evaluation" / "reconstructions.png").exists()
    assert list(result["scales"]) == ["4", "16"]
    assert result["scales"]["16"].items() <= result.items()
    assert "ssim" not in result["scales"]["4"]  # smaller than its window

    coarse = PixelMetrics(ssim=False)
    for names, originals, pyramid in reconstruct(x, scales=(4, 16)):
        target = (originals.float().reshape(-1, 3, 4, 4, 4, 4).mean((3, 5))).round().to(torch.uint8)
        coarse.update(target, pyramid[0], names)
    assert result["scales"]["4"]["psnr"] == pytest.approx(coarse.compute()["psnr"])

    for key, value in {"protocol": "reconstruction", "latents": "posterior mean", "crop": "none", "n": 20}.items():
        assert result["manifest"][key] == value
    table = capsys.readouterr().out
    assert "4 px" in table
    assert "16 px" in table


def mean_colours(image: np.ndarray, f: int) -> np.ndarray:
    """(H, W, 3) -> each f x f patch, those at the border as far as they go, in its mean colour: one at a time."""
    result = np.empty_like(image, dtype=np.float64)
    for y in range(0, image.shape[0], f):
        for x in range(0, image.shape[1], f):
            result[y : y + f, x : x + f] = image[y : y + f, x : x + f].mean((0, 1))
    return result


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), f=st.integers(1, 17), seed=st.integers(0, 100))
def test_one_colour_per_token_equals_numpy(height: int, width: int, f: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    result = one_colour_per_token(images, f)
    assert result.dtype == torch.uint8
    assert result.shape == images.shape
    for image, colours in zip(images, result):
        expected = mean_colours(image.permute(1, 2, 0).double().numpy(), f)
        assert np.abs(colours.permute(1, 2, 0).numpy() - expected).max() <= 0.5 + 1e-4, "the nearest grey level"


def test_beside_each_scales_psnr_stands_that_of_one_colour_per_token(tmp_path: Path) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    x = noise(9)
    options = reconstruction_options(tmp_path, features="none")
    result = evaluate_reconstruction(reconstruct(x, 4, scales=(4, 8, 16)), options, patch_size=4)
    assert result["baseline_psnr"] == result["scales"]["16"]["baseline_psnr"]
    for side in (4, 8, 16):
        originals = x.double().reshape(9, 3, side, 16 // side, side, 16 // side).mean((3, 5)).round()
        images = originals.permute(0, 2, 3, 1).numpy()
        expected = [peak_signal_noise_ratio(a, np.rint(mean_colours(a, 4)), data_range=255) for a in images]
        assert result["scales"][str(side)]["baseline_psnr"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert "with each token's patch in its mean colour" in result["manifest"]["baseline_psnr"]
    without = evaluate_reconstruction(reconstruct(x, 4, scales=(4, 8, 16)), options)
    assert not [key for key in (*without, *without["manifest"]) if key.startswith("baseline")]

    metrics = [ReconstructionMetrics(patch_size=4) for _ in range(2)]  # two processes
    for i, batch in enumerate(reconstruct(x, 4, scales=(4, 8, 16))):
        metrics[i % 2].update(*batch)
    metrics[0].merge(metrics[1])
    assert metrics[0].compute().scales == result["scales"]


def test_of_image_is_what_the_image_has_alone() -> None:
    x = noise(5)
    pyramid = [degrade(area_resize(x, (8, 8))), degrade(x)]
    metrics, alone = ReconstructionMetrics(patch_size=4), ReconstructionMetrics(patch_size=4)
    metrics.update(list("abcde"), x, pyramid)
    alone.update(["d"], x[3:4], [scale[3:4] for scale in pyramid])
    numbers = metrics.of_image("d")
    assert list(numbers) == ["8", "16"]
    for side, row in numbers.items():
        assert row.keys() >= {"psnr", "baseline_psnr"}
        assert row.items() <= alone.compute().scales[side].items()


def test_images_of_one_colour_per_token_are_counted_apart() -> None:
    x = torch.cat((noise(2), torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)))
    metrics, others = ReconstructionMetrics(patch_size=8), ReconstructionMetrics(patch_size=8)
    metrics.update(["a", "b", "flat"], x, degrade(x))
    others.update(["a", "b"], x[:2], degrade(x[:2]))
    result = metrics.compute().finest
    assert (result["baseline_psnr_identical"], result["psnr_identical"]) == (1, 0)
    assert result["baseline_psnr"] == others.compute().finest["baseline_psnr"]


def test_perceptual_distances_stand_under_their_own_names(tmp_path: Path) -> None:
    class Difference:
        name = "difference"

        def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
            return (images - targets).abs().mean((1, 2, 3))

    x = noise(12)
    result = evaluate_reconstruction(reconstruct(x), reconstruction_options(tmp_path), perceptual=[Difference()])
    expected = [(y.float() - z.float()).abs().mean() / 127.5 for _, a, b in reconstruct(x) for y, z in zip(a, b)]
    assert result["difference"] == pytest.approx(float(np.mean(expected)), rel=1e-5)
    assert result["manifest"]["perceptual"] == {"difference": {}}


def test_squeezenet_stands_in_for_lpips_under_its_own_name(shared: Path, tmp_path: Path) -> None:
    weights = shared / "weights" / "squeezenet1_1-caffe-fp16.npz"
    a, b = write_npz(tmp_path / "a.npz", noise(3, 32)), write_npz(tmp_path / "b.npz", degrade(noise(3, 32)))
    options = images_options(a, b, features="squeezenet", weights=str(weights), lpips=[f"squeeze-caffe={weights}"])
    result = evaluate_images(options)
    assert {"perceptual[squeeze-caffe]", "fd-squeezenet"} <= result.keys()
    assert not {"fid", "lpips-squeeze"} & result.keys()
    hashes = result["manifest"]["perceptual"]["perceptual[squeeze-caffe]"]
    assert hashes["trunk"] == result["manifest"]["weights sha256"]


def test_a_diverged_model_cannot_score(tmp_path: Path) -> None:
    x = noise(8)

    def pairs() -> Any:
        yield from reconstruct(x)
        yield ["nan.png"], x[:1], to_uint8(torch.full((1, 3, 16, 16), math.nan))

    with pytest.raises(ValueError, match="NaN"):
        evaluate_reconstruction(pairs(), reconstruction_options(tmp_path))
    with pytest.raises(ValueError, match="uint8"):
        evaluate_reconstruction([(["a"], x[:1], x[:1].float())], reconstruction_options(tmp_path))
    with pytest.raises(ValueError, match=r"a\.png: the finest reconstruction must have the original's shape"):
        evaluate_reconstruction([(["a.png"], x[:1], x[:1, :, :8])], reconstruction_options(tmp_path))
    with pytest.raises(ValueError, match="no images"):
        evaluate_reconstruction([], reconstruction_options(tmp_path))
    assert not (tmp_path / "evaluation").exists()


def test_the_picture_shows_the_worst_and_the_best() -> None:
    x = noise(12)
    y = degrade(x)
    y[5] = x[5]  # the best
    y[7] = 255 - x[7]  # the worst
    metrics = ReconstructionMetrics()
    metrics.update([str(i) for i in range(12)], x, y)
    pairs = sorted(metrics.shown.pairs, key=lambda item: item[0])
    assert len(pairs) == 8
    assert (pairs[0][1], pairs[-1][1]) == ("7", "5")
    assert metrics.picture().width > 4 * 16
    one = ReconstructionMetrics()
    one.update(["a"], x[:1], y[:1])
    one.picture()


# --- Manifests -----------------------------------------------------------------------------------------------------


def test_results_with_one_manifest_are_compared_and_others_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = noise(30)
    a = write_npz(tmp_path / "a.npz", x)
    for name, seed in (("b", 1), ("c", 2)):
        b = write_npz(tmp_path / f"{name}.npz", degrade(x, seed))
        evaluate_images(images_options(a, b, out=str(tmp_path / name)))
    evaluate_images(images_options(a, a, out=str(tmp_path / "other"), features=REAL, size=8))
    capsys.readouterr()
    first, second = (str(tmp_path / name / "metrics.json") for name in "bc")
    table = compare(EvaluateCompare(a=first, b=second))
    psnrs = [json.loads(Path(file).read_text())["psnr"] for file in (first, second)]
    assert table["psnr"]._asdict() == {"a": psnrs[0], "b": psnrs[1], "difference": psnrs[1] - psnrs[0]}
    assert "PSNR" in capsys.readouterr().out
    compare(EvaluateCompare(a=first, b=second, json=True))
    assert json.loads(capsys.readouterr().out) == {key: row._asdict() for key, row in table.items()}

    with pytest.raises(ValueError, match="cannot be compared") as error:
        compare(EvaluateCompare(a=first, b=str(tmp_path / "other" / "metrics.json")))
    differences = str(error.value).partition(", they differ in ")[2].split("; ")
    assert "network: tiny | inception" in differences
    assert "crop: none: all images are 16 x 16 | ADM centre crop to 8" in differences
    assert not any("ssim" in difference for difference in differences)

    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(ValueError, match=r"text\.json is not a metrics\.json"):
        compare(EvaluateCompare(a=first, b=str(tmp_path / "text.json")))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        compare(EvaluateCompare(a=first, b=str(tmp_path / "nowhere.json")))


def test_a_result_is_read_back_as_what_was_written(tmp_path: Path) -> None:
    x = noise(20)
    y = write_npz(tmp_path / "y.npz", x)
    evaluate_reconstruction(reconstruct(x, scales=(4, 16)), reconstruction_options(tmp_path))
    evaluate_images(images_options(y, y, out=str(tmp_path / "same")))
    evaluate_samples(samples_options(y, y, out=str(tmp_path / "samples")))
    for name in ("evaluation", "same", "samples"):
        path = tmp_path / name / "metrics.json"
        assert json_text(Result.read(path).to_json()) == path.read_text().rstrip("\n"), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": None}, "metrics.json: n must be a whole number, not null"),
        ({"psnr": "high"}, "metrics.json: psnr must be"),
        ({"scales": {"16": 3}}, "metrics.json: scales, 16 must be a table"),
        ({"scales": {"16": {"psnr": []}}}, "psnr must be"),
        ({"intervals": {"16": {"psnr": [1]}}}, "metrics.json: intervals of psnr must be a list of 2"),
        ({"warnings": "none"}, "metrics.json: warnings must be a list"),
        ({"manifest": []}, "metrics.json: manifest must be a table"),
    ],
)
def test_files_that_are_no_results(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Result.from_json({"n": 3, "psnr": 20.5, "warnings": [], "manifest": {}, **changes}, "metrics.json")


def test_manifests_hold_what_the_numbers_depend_on(tmp_path: Path) -> None:
    x = write_npz(tmp_path / "x.npz", noise(20))
    y = write_npz(tmp_path / "y.npz", noise(20, seed=1))
    result = evaluate_samples(samples_options(x, y, batch_size=3))
    wanted = {"protocol", "torch version", "backend", "network", "weights sha256", "preprocessing", "quantiser", "crop"}
    assert wanted | {"n", "reference n", "reference sha256", "seed", "features dtype"} <= result["manifest"].keys()
    assert result["manifest"] == evaluate_samples(samples_options(x, y, batch_size=7))["manifest"]
    assert result["manifest"] != evaluate_samples(samples_options(x, x))["manifest"]  # another reference
    assert result["inputs"]["sha256"] != result["manifest"]["reference sha256"]


# --- Processes ----------------------------------------------------------------------------------------------------


def join_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture
def joined_none() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("joined_none")
def test_a_process_group_is_left_by_who_joined_it() -> None:
    with process_group():  # of one process
        assert not dist.is_initialized()
    join_alone()
    with process_group():
        pass
    assert dist.is_initialized(), "somebody else's"


# --- Two processes -------------------------------------------------------------------------------------------------

SCRIPT = """
from pathlib import Path
from hieratok.evaluation.config import EvaluateImages, EvaluateSamples, EvaluateStats
from hieratok.evaluation.protocols import evaluate_images, evaluate_samples, write_statistics
from hieratok.core.distributed import process_group
folder = Path({folder!r})
common = dict(features={features!r}, batch_size=3)
a, b, out = str(folder / "a.npz"), str(folder / "b.npz"), str(folder / {out!r})
with process_group():
    evaluate_images(EvaluateImages(a=a, b=b, lpips=[], out=out + "/images", **common))
    evaluate_samples(EvaluateSamples(path=a, reference=b, out=out + "/samples", **common))
    write_statistics(EvaluateStats(path=b, out=out + "/stats.npz", **common))
    evaluate_samples(EvaluateSamples(path=a, reference=out + "/stats.npz", out=out + "/from-stats", **common))
"""


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    x = noise(31)
    write_npz(tmp_path / "a.npz", x)
    write_npz(tmp_path / "b.npz", degrade(x))
    exec(SCRIPT.format(folder=str(tmp_path), out="one", features=REAL))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path), out="two", features=REAL))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for protocol in ("images", "samples", "from-stats"):
        one, two = (json.loads((tmp_path / p / protocol / "metrics.json").read_text()) for p in ("one", "two"))
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-9, abs=1e-9)
        assert one["manifest"] == two["manifest"]
    assert done.stdout.count("PSNR") == 1  # one process prints
    pictures = [(tmp_path / p / "images" / "reconstructions.png").read_bytes() for p in ("one", "two")]
    assert pictures[0] == pictures[1]
