"""`hieratok export`: files for other runtimes give what the tokenizer gives, and say so in `export.json`."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.frozen import on_autoencoder, on_vit, save_autoencoder, save_vit
from hieratok import HieraTok, TokenizerConfig
from hieratok.cli import main
from hieratok.core import checkpoint
from hieratok.core.files import read_json_table
from hieratok.interop import export as module
from hieratok.interop.config import Export
from hieratok.interop.export import MANIFEST, SUFFIXES, export, open_program

SIDES = (1, 2, 4)
SHAPE = dict(
    image_size=32, patch_size=8, latent_channels=3, scales=SIDES, encoder_width=16, encoder_depth=1,
    encoder_heads=2, decoder_width=24, decoder_depth=2, decoder_heads=2, init_std=0.3,
)  # fmt: skip
FORMATS = list(SUFFIXES)
# What torch's exporters use inside; nothing a caller could change
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def need(format: str) -> None:
    """Skip where ONNX's packages are missing."""
    if format == "onnx":
        for name in module.NEEDED:
            pytest.importorskip(name, reason=f"ONNX files need {name}: pip install 'hieratok[onnx]'")


def save_run(folder: Path, **changes) -> Path:
    torch.manual_seed(0)
    tokenizer = HieraTok(TokenizerConfig(**{**SHAPE, **changes}))
    tokenizer.latent_mean.fill_(0.5)
    tokenizer.latent_std.fill_(2.0)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, photos):
    """The run's folder and the export's, each format written once."""
    made: dict[str, tuple[Path, Path]] = {}

    def folders(format: str) -> tuple[Path, Path]:
        need(format)
        if format not in made:
            run = save_run(tmp_path_factory.mktemp("run"))
            options = ["--format", format, "--data", str(photos), *["--int8"] * (format == "onnx")]
            with (run / "printed.txt").open("w") as printed, contextlib.redirect_stdout(printed):
                assert main(["export", str(run), *options]) == 0
            made[format] = run, run / f"export-{format}"
        return made[format]

    return folders


# --- what is in the files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_files_give_what_the_tokenizer_gives_for_any_batch(exported, format, batch):
    run, out = exported(format)
    tokenizer, suffix = HieraTok.from_pretrained(run), SUFFIXES[format]
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)) * 2 - 1
    posterior = tokenizer.encode(images)
    mean, logvar = open_program(out / f"encoder{suffix}")(images)
    torch.testing.assert_close(mean, posterior.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, rtol=0, atol=1e-4)
    z = posterior.mode()
    whole = open_program(out / f"decoder{suffix}")(z)
    for found, expected in zip(whole, tokenizer.decode_pyramid(z), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole[-1], tokenizer.decode(z), rtol=0, atol=1e-4)
    for k in range(len(SIDES) - 1):
        *coarser, finest = open_program(out / f"decoder-scale{k}{suffix}")(z)
        assert len(coarser) == k
        torch.testing.assert_close(finest, tokenizer.decode(z, scale=k), rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_the_manifest_says_what_is_in_the_folder(exported, format):
    run, out = exported(format)
    result = read_json_table(out / MANIFEST)
    suffix = SUFFIXES[format]
    assert [file["name"] for file in result["files"]] == [
        f"{name}{suffix}" for name in ("encoder", "decoder", "decoder-scale0", "decoder-scale1")
    ]
    encoder, decoder, _, preview = result["files"]
    assert encoder["input"] == {"images": ["batch", 3, 32, 32]}
    assert encoder["outputs"] == {"mean": ["batch", 3, 4, 4], "logvar": ["batch", 3, 4, 4]}
    assert decoder["input"] == {"z": ["batch", 3, 4, 4]}
    assert decoder["outputs"] == {f"image_{s}px": ["batch", 3, s, s] for s in (8, 16, 32)}
    assert list(preview["outputs"]) == ["image_8px", "image_16px"]
    written = {name for file in result["files"] for name in (file["name"], file.get("int8")) if name}
    assert {path.name for path in out.iterdir()} == written | {MANIFEST}
    for file in result["files"]:
        assert 0 <= file["largest_difference"] <= 1e-4
        assert file["bytes"] == (out / file["name"]).stat().st_size
    assert result["tokenizer"]["sha256"] == checkpoint.file_sha256(run / "tokenizer" / "model.safetensors")
    assert result["tokenizer"]["config"]["scales"] == list(SIDES)
    assert result["tokenizer"]["latent_mean"] == [0.5] * 3
    assert result["tokenizer"]["latent_std"] == [2.0] * 3


def test_onnx_names_are_those_of_the_manifest(exported):
    _, out = exported("onnx")
    import onnxruntime

    for file in read_json_table(out / MANIFEST)["files"]:
        for name in (file["name"], file["int8"]):
            session = onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"])
            assert {x.name: x.shape for x in session.get_inputs()} == file["input"]
            assert [x.name for x in session.get_outputs()] == list(file["outputs"])
    session = onnxruntime.InferenceSession(out / "decoder.onnx", providers=["CPUExecutionProvider"])
    assert {x.name: x.shape for x in session.get_outputs()} == {f"image_{s}px": ["batch", 3, s, s] for s in (8, 16, 32)}


@pytest.mark.parametrize("format", FORMATS)
def test_a_prefix_has_no_weights_of_finer_scales(exported, format):
    run, out = exported(format)
    tokenizer = HieraTok.from_pretrained(run)
    branches = [sum(p.nbytes for p in branch.parameters()) for branch in tokenizer.downsample.branches]
    sizes = [(out / f"decoder-scale{k}{SUFFIXES[format]}").stat().st_size for k in range(2)]
    assert sizes[1] - sizes[0] > 0.9 * branches[1]
    assert tokenizer.downsample.branches[1].mix.weight.nbytes < branches[1]


@pytest.mark.parametrize("format", FORMATS)
def test_files_do_not_say_where_they_were_made(exported, format):
    _, out = exported(format)
    here = str(Path(module.__file__).parent).encode()
    for path in out.iterdir():
        assert here not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("format", "changes", "names"),
    [
        ("onnx", {"scales": (1, 3, 4)}, ["encoder", "decoder", "decoder-scale0", "decoder-scale1"]),
        ("torch", {"scales": (3, 4), "downsample": "interpolate", "attention": "independent"}, None),
        ("onnx", {"scales": (3, 4), "downsample": "interpolate", "attention": "independent"}, None),
        ("onnx", {"scales": (4,)}, ["encoder", "decoder"]),
        ("torch", {"attention": "full"}, ["encoder", "decoder"]),
    ],
    ids=["grids that do not divide", "interpolate", "interpolate, onnx", "one scale", "full"],
)
@torch.no_grad()
def test_other_tokenizers(tmp_path, format, changes, names):
    """The last decoder of each: the longest prefix, or the whole where there is no prefix."""
    need(format)
    tokenizer = HieraTok.from_pretrained(save_run(tmp_path, **changes))
    parts = module.parts(tokenizer)
    assert [part.name for part in parts] == (names or ["encoder", "decoder", "decoder-scale0"])
    path = tmp_path / f"last{SUFFIXES[format]}"
    module.write(parts[-1], torch.zeros(2, 3, 4, 4), path)
    z = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(open_program(path)(z), tokenizer.decode_pyramid(z)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --- int8 -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_int8_files_are_smaller_and_near(exported):
    run, out = exported("onnx")
    tokenizer = HieraTok.from_pretrained(run)
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found, expected = open_program(out / "decoder-int8.onnx")(z)[-1], tokenizer.decode(z)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 1e-4 < error < 0.1
    import onnx

    for path in out.glob("*-int8.onnx"):
        kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer if np.prod(tensor.dims) > 4 * 24 * 24}
        assert kinds <= {onnx.TensorProto.INT8}, path.name  # every large weight


def test_the_cost_of_int8_is_measured_on_the_data(exported, photos):
    """PSNR computed here by itself, from the files' images in float64."""
    _, out = exported("onnx")
    result = read_json_table(out / MANIFEST)["psnr"]
    assert result.pop("images") == 2
    assert set(result) == {"decoder", "decoder-scale0", "decoder-scale1"}
    from hieratok.data.images import center_crop, open_source, to_float

    source = open_source(str(photos))
    originals = torch.stack([center_crop(source.image(i), 32) for i in range(2)])
    for name, numbers in result.items():
        for precision, end in (("float32", ""), ("int8", "-int8")):
            z = open_program(out / f"encoder{end}.onnx")(to_float(originals))[0]
            image = open_program(out / f"{name}{end}.onnx")(z)[-1]
            image = ((image.double() + 1) * 127.5).clamp(0, 255).round()
            factor = 32 // image.shape[-1]
            wanted = originals.double().unflatten(2, (-1, factor)).unflatten(4, (-1, factor)).mean((3, 5)).round()
            mse = (image - wanted).square().flatten(1).mean(1)
            # a value next to a half may round to either side
            assert numbers[precision] == pytest.approx((10 * torch.log10(255**2 / mse)).mean().item(), abs=0.02)
        assert numbers["cost"] == pytest.approx(numbers["float32"] - numbers["int8"])


def test_the_cost_of_int8_is_printed(exported):
    _, out = exported("onnx")
    head, *lines = (out.parent / "printed.txt").read_text().splitlines()
    assert head.split("  ")[-1].strip() == "cost"
    cost = read_json_table(out / MANIFEST)["psnr"]["decoder-scale1"]["cost"]
    (line,) = (line for line in lines if line.startswith("decoder-scale1.onnx"))
    assert line.endswith(f" {cost:.2f} dB")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_file_that_differs_is_not_written(tmp_path, photos, monkeypatch):
    run = save_run(tmp_path)
    out = tmp_path / "out"
    original = module.open_program

    def wrong(path: Path):
        program = original(path)
        return lambda x: tuple(y + (2e-4 if len(x) > 1 else 0) for y in program(x))

    monkeypatch.setattr(module, "open_program", wrong)
    with pytest.raises(ValueError, match=r"encoder\.pt2 differs from the original by 2\.\de-04, more than 1e-04"):
        export(Export(run=str(run), format="torch", data=str(photos), out=str(out)))
    monkeypatch.setattr(module, "open_program", lambda path: lambda x: tuple(y * torch.nan for y in original(path)(x)))
    with pytest.raises(ValueError, match="differs from the original by nan"):
        export(Export(run=str(run), format="torch", data=str(photos), out=str(out)))
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer"}


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path, photos, capsys):
    run = save_run(tmp_path / "run")
    for folder, file in (("before", MANIFEST), ("mine", "photo.jpg")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    arguments = ["export", str(run), "--format", "torch", "--data", str(photos), "--out"]
    assert main([*arguments, str(tmp_path / "before")]) == 0
    assert json.loads((tmp_path / "before" / MANIFEST).read_text())["format"] == "torch"
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "mine")]) == 2
    assert "mine holds something other than an export: give --out a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "--format must be one of onnx, torch, not 'tflite'"),
        (["--format", "torch", "--int8"], "--int8 is for ONNX files: leave --format torch out"),
        (["--format", "torch", "--data", "nowhere"], "nowhere"),
        (["--fromat", "torch"], "unknown option --fromat; did you mean 'format'?"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, arguments, message):
    run = save_run(tmp_path)
    assert main(["export", str(run), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert {path.name for path in run.iterdir()} == {"tokenizer"}


def test_a_run_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "nobody", "--format", "torch"]) == 2
    assert "nobody is not a folder here, give --out FOLDER" in capsys.readouterr().err
    assert main(["export"]) == 2
    assert "hieratok export needs RUN" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "torch"]) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    run = save_run(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(run)]) == 2
    assert capsys.readouterr().err == "hieratok: onnxruntime is not installed: pip install 'hieratok[onnx]'\n"


@pytest.mark.parametrize(("kind", "format"), [("autoencoder", "onnx"), ("vit", "torch")])
def test_a_frozen_encoder_is_exported_too(kind, format, tmp_path):
    need(format)
    if kind == "vit":
        config = on_vit(save_vit(tmp_path / "vit.safetensors"))
    else:
        config = on_autoencoder(save_autoencoder(tmp_path / "vae"))
    HieraTok(config).save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--format", format, "--out", str(tmp_path / "out")]) == 0
    files = json.loads((tmp_path / "out/export.json").read_text())["files"]
    assert [file["name"].partition(".")[0] for file in files][:2] == ["encoder", "decoder"]
    assert max(file["largest_difference"] for file in files) < 1e-3
