"""`hieratok analyze`: what it writes, by which protocol, and that a user's mistake is one line."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok.analysis.codec import Codec
from hieratok.analysis.density import evenness, kernel_density, measure_density
from hieratok.analysis.meanings import lines
from hieratok.analysis.report import LatentReport
from hieratok.cli import main
from hieratok.core.glossary import ANALYSIS
from hieratok.data.images import ImageFiles, center_crop, open_source, to_float
from hieratok.tasks.analyze import Analyze, analyze, analyze_tokenizer, coarser_grids
from hieratok.tokenizer.model import HieraTok, TokenizerConfig

CONFIG = TokenizerConfig(
    image_size=32, patch_size=4, latent_channels=4, scales=(2, 4, 8), encoder_width=16, encoder_depth=1,
    encoder_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2,
)  # fmt: skip
QUICK = ["--draws", "0", "--decoded", "5", "--device", "cpu"]


def save_tokenizer(folder: Path, config: TokenizerConfig = CONFIG) -> HieraTok:
    torch.manual_seed(0)
    model = HieraTok(replace(config, init_std=0.2)).eval()
    model.save_pretrained(folder / "tokenizer")
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(100):
        (folder / f"{'cats' if i % 3 else 'dogs'}").mkdir(exist_ok=True)
        coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((36, 40), Image.Resampling.BICUBIC)
        picture.save(folder / f"{'cats' if i % 3 else 'dogs'}" / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    save_tokenizer(folder)
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`hieratok analyze` in an empty folder: exit status, what it printed, lines on standard error but for progress."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        status = main(["analyze", *map(str, arguments)])
        printed, errors = capsys.readouterr()
        return status, printed, [line for line in errors.splitlines() if line.startswith("hieratok: ")]

    return call


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


# --- a tokenizer ------------------------------------------------------------------------------------------------------


def test_a_run(run, photos, command):
    status, printed, errors = command(run, "--data", photos, "--draws", 2, "--decoded", 9, "--device", "cpu")
    assert (status, errors) == (0, [])
    result = read(run / "analysis")
    assert (result["n"], result["decoded_images"]) == (100, 9)
    assert (result["latent_channels"], result["latent_grid"]) == (4, [8, 8])

    source = ImageFiles(str(photos))
    images = to_float(torch.stack([center_crop(source.image(i), 32) for i in range(100)]))
    with torch.no_grad():
        posterior = HieraTok.from_pretrained(run).encode(images)
    assert result["kl"] == pytest.approx(float(posterior.kl().mean()), rel=1e-4)
    assert result["kl_low"] < result["kl"] < result["kl_high"]
    assert sum(result["channel_kl"]) == pytest.approx(result["kl"], rel=1e-6)
    table = posterior.mean.double().transpose(0, 1).flatten(1).numpy()
    shares = np.linalg.eigvalsh(np.corrcoef(table)) / 4
    assert result["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert result["active_channels"] == (table.var(1) > 0.01).sum() == 4 - result["dead_channels"]

    assert result["density_draws"] == 2
    for name in ("density_cv", "gini", "normalized_entropy"):
        assert result[f"{name}_std"] > 0
        assert result[f"floor_{name}_std"] > 0
    scales = [f"{what}/{px}px" for what in ("commutation_error", "pyramid_target_mse") for px in (8, 16)]
    others = ["equivariance_encoder/scale_half", "noise_psnr/0.1", "latent_power_slope", "rgb_high_frequency_share"]
    for key in scales + others:
        stem, slash, detail = key.partition("/")
        assert result[f"{stem}_low{slash}{detail}"] < result[key] < result[f"{stem}_high{slash}{detail}"], key
    assert len(result["latent_dct"]) == len(result["rgb_dct"]) == 64
    assert result["latent_dct"][0] == 1
    assert result["manifest"]["protocol"] == "ours"

    for line in lines(LatentReport.from_json(result, "")):
        assert line.label in printed
    assert "analysis/index.html" in printed
    page = (run / "analysis" / "index.html").read_text()
    for stem in {key.partition("/")[0] for key in result} & set(ANALYSIS):
        assert ANALYSIS[stem].meaning in unescape(page), stem
    assert "Lower than the floor is not closer to the prior." in page
    assert ">cats</text>" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)", page)


def test_a_file_is_read_back_as_what_was_written(run, photos, command, tmp_path):
    np.save("z.npy", np.random.default_rng(0).normal(size=(100, 5)))
    np.save("tsne.npy", np.random.default_rng(0).normal(size=(100, 2)))
    assert command(run, "--data", photos, *QUICK, "--out", "a")[0] == 0
    assert command("--latents", "z.npy", "--out", "b")[0] == command("--embedding", "tsne.npy", "--out", "c")[0] == 0
    for name in "abc":
        table = read(tmp_path / name)
        assert json.dumps(LatentReport.from_json(table, name).to_json()) == json.dumps(table), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": "many"}, "metrics.json: n must be a whole number, not 'many'"),
        ({"kl": "much", "kl_low": 1, "kl_high": 2}, "metrics.json: kl must be"),
        ({"noise_psnr/0.1": 20, "noise_psnr_low/0.1": 19}, "metrics.json lacks noise_psnr_high/0.1"),
        ({"density_cv": 0.5}, "metrics.json lacks gini"),
        ({"effective_rank": 1.5, "participation_ratio": None}, "active_channels must be a whole number, not null"),
        ({"manifest": 3}, "manifest must be a table"),
        ({"channel_kl": [1]}, "channel_kl_low must be a list"),
    ],
)
def test_files_that_are_no_reports(changes, message):
    good = {"n": 3, "manifest": {}, "effective_rank": 1.5, "participation_ratio": 1, "active_channels": 1,
            "dead_channels": 0, "channel_std": [1.0]}  # fmt: skip
    table = {k: v for k, v in {**good, **changes}.items() if "effective_rank" not in changes or "channel" not in k}
    with pytest.raises(ValueError, match=re.escape(message)):
        LatentReport.from_json(table, "metrics.json")


def test_every_number_has_a_meaning(run, photos, command, tmp_path):
    assert command(run, "--data", photos, *QUICK, "--out", tmp_path / "a")[0] == 0
    result = read(tmp_path / "a")
    stems = {key.partition("/")[0] for key, value in result.items() if isinstance(value, float)}
    stems = {re.sub("_(low|high|std)$", "", stem) for stem in stems}
    assert stems <= set(ANALYSIS)
    assert not any("density" in key for key in result)
    assert "Density of the latents" not in (tmp_path / "a" / "index.html").read_text()


def test_batches_do_not_change_the_numbers(run, photos, command, tmp_path):
    for size in (3, 64):
        assert command(run, "--data", photos, *QUICK, "--num", 20, "--batch_size", size, "--out", size)[0] == 0
    one, other = read(tmp_path / "3"), read(tmp_path / "64")
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, float | list):
            assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_a_single_scale_is_halved(tmp_path, photos, command):
    save_tokenizer(tmp_path / "single", replace(CONFIG, scales=(8,), downsample="interpolate"))
    assert command("single", "--data", photos, *QUICK)[0] == 0
    result = read(tmp_path / "single" / "analysis")
    assert [key for key in result if key.startswith("commutation_error/")] == [
        f"commutation_error/{px}px" for px in (4, 8, 16)
    ]
    assert not any(key.startswith("pyramid") for key in result)


def test_scales_of_any_ratio():
    codec = Codec(lambda x: (x, None), lambda z: z, lambda z: [torch.zeros(1, 3, s, s) for s in (16, 192, 256)])
    assert coarser_grids(codec, torch.zeros(1, 4, 16, 16)) == [(1, 1), (12, 12)]
    assert coarser_grids(replace(codec, decode_pyramid=None), torch.zeros(2, 4, 6, 12)) == [(1, 3), (3, 6)]


def test_statistics_of_the_training_images_are_used(tmp_path, photos, command):
    model = save_tokenizer(tmp_path / "run")
    command("run", "--data", photos, *QUICK, "--out", "own")
    model.latent_mean.fill_(0.5)
    model.latent_std.fill_(3.0)
    model.save_pretrained(tmp_path / "run" / "tokenizer")
    command("run", "--data", photos, *QUICK, "--out", "training")
    command("run", "--data", photos, *QUICK, "--out", "vavae", "--protocol", "vavae")
    own, training, vavae = (read(tmp_path / name) for name in ("own", "training", "vavae"))
    assert "training" in training["manifest"]["statistics"]
    assert "training" not in own["manifest"]["statistics"] + vavae["manifest"]["statistics"]
    assert training["noise_psnr/1"] != own["noise_psnr/1"]
    assert training["noise_psnr/0"] == own["noise_psnr/0"]
    assert training["effective_rank"] == own["effective_rank"]


def mirror_blind(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.nn.functional.avg_pool2d(images, 8)
    return z, torch.full_like(z, -20.0)


def test_the_vavae_protocol_takes_samples_and_mirrored_images(photos):
    seen = []

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(images)
        return mirror_blind(images)

    codec = Codec(encode, lambda z: z.repeat_interleave(8, -1).repeat_interleave(8, -2))
    options = Analyze(run="x", data="x", protocol="vavae", draws=1, decoded=2, batch_size=100)
    found = analyze_tokenizer(codec, ImageFiles(str(photos)), 32, options)
    result, embedding = found.report.to_json(), found.embedding
    assert torch.equal(seen[0].flip(-1), seen[1])
    assert embedding is not None
    assert embedding.points.shape == (100, 2)
    assert sorted(set(embedding.labels)) == [0, 1]  # type: ignore[arg-type]
    assert "sample" in result["manifest"]["latents"]
    assert "mirror" in result["manifest"]["images"]
    ours = analyze_tokenizer(codec, ImageFiles(str(photos)), 32, replace(options, protocol="ours")).report.to_json()
    assert ours["density_cv"] != result["density_cv"]
    assert ours["commutation_error/16px"] == pytest.approx(result["commutation_error/16px"])


def test_diffusers_autoencoder(tmp_path, photos, command):
    kl = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl", exc_type=ImportError)
    torch.manual_seed(0)
    model = kl.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "sd")
    assert command("sd", "--data", photos, *QUICK, "--num", 6)[0] == 0
    result = read(tmp_path / "sd" / "analysis")
    assert (result["latent_grid"], result["n"]) == ([16, 16], 6)
    assert result["kl"] > 0
    assert "commutation_error/2px" in result


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_embedding(tmp_path, command):
    points = np.random.default_rng(0).normal(size=(150, 2)) ** 3
    np.save(tmp_path / "tsne.npy", points)
    status, printed, _ = command("--embedding", "tsne.npy", "--out", "out")
    assert status == 0
    result = read(tmp_path / "out")
    expected = evenness(kernel_density(points.astype(np.float32)))
    assert [result[key] for key in ("density_cv", "gini", "normalized_entropy")] == pytest.approx(expected, rel=1e-12)
    assert f"{result['density_cv']:.4g}" in printed
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Density of tsne.npy" in page
    assert "Gaussian floor" not in page
    command("--embedding", "tsne.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tsne.npy"]


def test_the_published_embedding_by_the_command(shared, tmp_path, command):
    path = shared / "data" / "vavae-latents-f16d32-tsne.npy"
    assert command("--embedding", path, "--out", "out")[0] == 0
    result = read(tmp_path / "out")
    numbers = [result[key] for key in ("density_cv", "gini", "normalized_entropy")]
    assert numbers == pytest.approx([0.26453, 0.14743, 0.99582], abs=1e-5)


def test_latent_vectors(tmp_path, command):
    latents = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32) * [1, 2, 3, 4, 5] + 7
    np.save(tmp_path / "z.npy", latents)
    assert command("--latents", "z.npy", "--out", "out")[0] == 0
    result = read(tmp_path / "out")
    standard = (latents - latents.mean(0)) / latents.std(0)
    expected = measure_density([standard], 1).mean
    numbers = [result[key] for key in ("density_cv", "gini", "normalized_entropy")]
    assert numbers == pytest.approx(expected, rel=0.05)  # t-SNE of inputs that differ in their last bits
    assert result["density_draws"] == 1  # there is nothing to draw
    assert "density_cv_std" not in result
    assert 0 < result["floor_density_cv"] < 1


def test_latent_maps_are_drawn_from(tmp_path, command):
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(120, 3, 2, 2)))
    assert command("--latents", "z.npy", "--num", 92, "--draws", 2, "--out", "out")[0] == 0
    result = read(tmp_path / "out")
    assert (result["n"], result["manifest"]["points"], result["density_draws"]) == (120, 92, 2)
    assert result["density_cv_std"] > 0


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of RUN, --latents FILE.npy and --embedding FILE.npy"),
        (["RUN", "--latents", "maps.npy"], "one of RUN"),
        (["RUN"], "which images? hieratok analyze RUN --data PATH"),
        (["nowhere", "--data", "PHOTOS"], "nowhere: no such folder"),
        (["RUN", "--data", "nowhere"], "nowhere"),
        (["RUN", "--data", "PHOTOS/dogs"], "34 points, one per image, are too few for t-SNE"),
        (["RUN", "--data", "PHOTOS/dogs/000.png", "--draws", "0"], "at least 2 images"),
        (["RUN", "--data", "PHOTOS", "--draws", "0", "--size", "30"], "multiples of the patch size 4"),
        (["RUN", "--data", "PHOTOS", "--protocol", "mine"], "protocol"),
        (["RUN", "--data", "PHOTOS", "--draw", "0"], "unknown option --draw; did you mean 'draws'?"),
        (["RUN", "--data", "PHOTOS", "--draws", "-1"], "--draws must be at least 0, not -1"),
        (["RUN", "--data", "PHOTOS", "--num", "1"], "--num must be at least 2"),
        (["--embedding", "nowhere.npy"], "nowhere.npy does not exist"),
        (["--embedding", "vectors.npy"], "an embedding must have shape (points, 2), not (20, 4)"),
        (["--embedding", "maps.npy"], "maps.npy must have shape (points, channels), not (20, 4, 2, 2)"),
        (["--embedding", "text.npy"], "text.npy cannot be read as .npy"),
        (["--embedding", "empty.npy"], "empty.npy cannot be read as .npy"),
        (["--embedding", "objects.npy"], "objects.npy cannot be read as .npy"),
        (["--embedding", "integers.npy"], "integers.npy must be a .npy of floating-point numbers"),
        (["--embedding", "arrays.npz"], "arrays.npz cannot be read as .npy"),
        (
            ["--latents", "line.npy"],
            "line.npy must have shape (points, channels) or (images, channels, h, w), not (20,)",
        ),
        (["--latents", "nan.npy"], "nan.npy holds NaN or infinite values"),
        (["--latents", "vectors.npy"], "20 points, one per image, are too few"),
        (["--latents", "vectors.npy", "--draws", "0"], "--draws must be at least 1"),
        (["--latents", "constant.npy"], "all points are the same"),
        (["--latents", "channel.npy"], "at least 2 channels"),
    ],
)
def test_mistakes_are_one_line(run, photos, tmp_path, command, arguments, message):
    np.save("vectors.npy", np.ones((20, 4)))
    np.save("maps.npy", np.ones((20, 4, 2, 2)))
    np.save("line.npy", np.ones(20))
    np.save("integers.npy", np.ones((20, 2), int))
    np.save("nan.npy", np.array([[1.0, np.nan]] * 200))
    np.save("constant.npy", np.ones((200, 3)))
    np.save("channel.npy", np.random.default_rng(0).normal(size=(200, 1)))
    np.save("objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.savez("arrays.npz", a=np.ones((20, 2)))
    Path("text.npy").write_text("1 2 3")
    Path("empty.npy").write_text("")
    before = sorted(tmp_path.rglob("*"))
    words = [word.replace("RUN", str(run)).replace("PHOTOS", str(photos)) for word in arguments]
    status, printed, errors = command(*words)
    assert (status, printed, len(errors)) == (2, "", 1)
    assert message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_latents_that_are_not_finite_name_the_image(run, photos, tmp_path, command):
    model = HieraTok.from_pretrained(run)
    with torch.no_grad():
        model.encoder.head.weight[0] = 3e38  # as a file holds it: NaN there would be refused
    model.save_pretrained(tmp_path / "broken")
    status, _, errors = command("broken", "--data", photos, *QUICK)
    assert status == 2
    assert re.search(r"(cats|dogs)/\d\d\d.png: its latents hold NaN or infinite values", errors[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "AutoencoderOobleck"},
            "AutoencoderKL, AutoencoderDC, AutoencoderTiny can be used",
        ),
        ({"_class_name": "AutoencoderKL"}, "diffusion_pytorch_model.safetensors does not exist"),
        ({"model_type": "bert"}, "does not describe a hieratok model"),
    ],
)
def test_other_models_are_refused(tmp_path, photos, command, config, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    status, _, errors = command("model", "--data", photos, *QUICK)
    assert status == 2
    assert message in errors[0]


def test_a_tokenizer_without_a_size():
    codec = Codec(mirror_blind, lambda z: z)
    with pytest.raises(ValueError, match="give --size"):
        analyze_tokenizer(codec, open_source("bundled:val"), None, Analyze(run="x", data="x"))


def test_from_python(run, photos, tmp_path):
    options = Analyze(
        run=str(run), data=str(photos), draws=0, decoded=3, num=5, device="cpu", out=str(tmp_path / "out")
    )
    result = analyze(options)
    assert result.n == 5
    assert result.channels is not None
    assert read(tmp_path / "out")["effective_rank"] == result.channels.effective_rank


def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["analyze", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "Example: hieratok analyze runs/photos" in printed
    for flag in ("--latents", "--embedding", "--protocol", "--draws"):
        assert flag in printed
