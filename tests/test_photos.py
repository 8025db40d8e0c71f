"""Photos in, photos out: preprocess, postprocess, where and in which type a tokenizer is."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

import hieratok
from hieratok import HieraTok, TokenizerConfig
from hieratok.core.pixels import BadImageError, center_crop, from_picture, read_image
from hieratok.generation.dit import DiT, DiTConfig

SIZE = 32


@pytest.fixture(scope="module")
def tok() -> HieraTok:
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=SIZE, patch_size=8, latent_channels=4, scales=(1, 2, 4), encoder_width=16, encoder_depth=1,
        encoder_heads=1, decoder_width=16, decoder_depth=1, decoder_heads=1,
    )  # fmt: skip
    return HieraTok(config).eval()


def pixels(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3), smooth enough that a wrong crop shows."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


# --- preprocess -------------------------------------------------------------------------------------------------------


def test_every_form_of_a_photo_gives_the_same_images(tok, tmp_path):
    array = pixels()
    path = tmp_path / "photo.png"
    Image.fromarray(array).save(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    # the reference: ADM's crop, and the definition of [-1, 1] in float64
    expected = torch.from_numpy(center_crop(tensor, SIZE).numpy().astype(np.float64) / 255 * 2 - 1)[None]
    with Image.open(path) as lazy:
        forms = [path, str(path), lazy, Image.fromarray(array), array, array[None], tensor, tensor[None], [path]]
        for form in forms:
            images = tok.preprocess(form)
            assert images.shape == (1, 3, SIZE, SIZE)
            assert images.dtype == torch.float32
            torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)
    mixed = tok.preprocess([path, array, np.stack([array, array])])  # a batch within a list is several photos
    assert torch.equal(mixed, tok.preprocess(path).expand(4, -1, -1, -1))


def test_without_crop_a_photo_keeps_its_size_and_round_trips_bit_for_bit(tok):
    array = pixels(41, 67)
    images = tok.preprocess(array, crop=False)
    assert images.shape == (1, 3, 41, 67)
    (back,) = tok.postprocess(images)
    assert np.array_equal(np.array(back), array)
    posterior = tok.encode(images)
    (picture,) = tok.postprocess(tok.decode(posterior.mode(), image_size=posterior.image_size))
    assert picture.size == (67, 41)


def test_odd_memory_is_read_as_numpy_shows_it(tok):
    array = pixels()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = tok.preprocess(
            [array, array[:, :, ::-1], array[::-1], torch.from_numpy(np.array(array)).movedim(2, 0)]
        )
    assert torch.equal(images[0], images[3])
    assert not torch.equal(images[0], images[1])
    torch.testing.assert_close(images[1], images[0].flip(0), rtol=0, atol=2.1 / 255)  # red and blue change places


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_pillow_images_of_every_mode_are_read_as_their_files_are(mode, tmp_path):
    picture = Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257) if mode == "I;16" else None
    picture = picture or Image.fromarray(pixels()).convert(mode)
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    picture.save(path)
    assert torch.equal(from_picture(picture), read_image(path))


def test_pillow_images_are_turned_upright_as_their_files_are(tok, tmp_path):
    picture = Image.fromarray(pixels())
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as lazy:
        turned = tok.preprocess(lazy, crop=False)
    assert turned.shape == (1, 3, 70, 50)
    assert torch.equal(turned, tok.preprocess(tmp_path / "turned.jpg", crop=False))


@pytest.mark.parametrize(
    ("photos", "message"),
    [
        ([], "no photos"),
        (None, "NoneType"),
        (3, "int"),
        (b"bytes", "int"),
        ([["photo.png"]], "list"),
        (np.zeros((4, 4, 3)), "goes to encode as it is"),
        (torch.zeros(1, 3, 8, 8), "goes to encode as it is"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (np.zeros((3, 8, 8), np.uint8), r"\(H, W, 3\) or \(B, H, W, 3\), not \(3, 8, 8\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(3, H, W\) or \(B, 3, H, W\), not \(8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"\(0, 8, 8, 3\)"),
        (np.zeros((), np.uint8), r"\(\)"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), r"\(3, 0, 8\)"),
        (Image.new("F", (9, 9)), "floating-point pixels"),
    ],
)
def test_what_is_no_photo_is_refused_in_one_line(tok, photos, message):
    with pytest.raises(ValueError, match=message) as error:
        tok.preprocess(photos)
    assert "\n" not in str(error.value)


def test_files_that_are_no_images(tok, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    Image.fromarray(pixels()).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    for path in (tmp_path / "notes.jpg", tmp_path / "missing.jpg", tmp_path, tmp_path / "cut.png"):
        with pytest.raises(BadImageError, match=path.name):
            tok.preprocess(path)
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(BadImageError, match="mode RGB"):
        tok.preprocess(cut)


def test_photos_of_different_sizes_are_one_batch_only_when_cropped(tok):
    photos = [pixels(40, 60), pixels(60, 40)]
    assert tok.preprocess(photos).shape == (2, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"60 x 40 and 40 x 60 px.*crop"):
        tok.preprocess(photos, crop=False)


# --- postprocess ------------------------------------------------------------------------------------------------------


def test_postprocess_rounds_and_clamps(tok):
    values = torch.tensor([-9.0, -1.0, 0.0, 1 / 255, 1.0, 3.0]).view(1, 1, 1, 6).repeat(2, 3, 1, 1).requires_grad_()
    first, second = tok.postprocess(values)
    assert np.array(first)[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert first.tobytes() == second.tobytes()
    assert (first.mode, first.size) == ("RGB", (6, 1))
    assert tok.postprocess(values.bfloat16())[0].size == (6, 1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(B, 3, H, W\), not \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), r"\(1, 4, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        ([torch.zeros(1, 3, 8, 8)], "list"),
        (torch.full((1, 3, 8, 8), torch.nan), "NaN"),
    ],
)
def test_postprocess_refuses_what_decode_does_not_give(tok, images, message):
    with pytest.raises(ValueError, match=message):
        tok.postprocess(images)


# --- encode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        "photo.jpg",
        Image.new("RGB", (8, 8)),
        np.zeros((1, 3, 8, 8), np.float32),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 4, 8, 8),
        torch.zeros(0, 3, 8, 8),
        [torch.zeros(3, 8, 8)],
        None,
    ],
    ids=repr,
)
def test_encode_given_anything_else_names_preprocess(tok, images):
    with pytest.raises(ValueError, match=r"encode takes .* not .*: preprocess\(photos\) makes them$") as error:
        tok.encode(images)
    assert "\n" not in str(error.value)


# --- Where, and in which type -----------------------------------------------------------------------------------------


def test_a_tokenizer_in_bf16_takes_and_gives_photos(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    half = HieraTok.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half.dtype, half.device) == (torch.bfloat16, torch.device("cpu"))
    images = half.preprocess(pixels())
    assert images.dtype == torch.bfloat16
    with torch.inference_mode():
        z = half.encode(images).mode()
        pyramid = half.decode_pyramid(z)
        assert len(half.postprocess(pyramid[-1])) == 1
        for one, other in zip(half.decode_progressive(z), pyramid, strict=True):
            assert torch.equal(one, other)
        whole = tok.encode(tok.preprocess(pixels())).mode()
        torch.testing.assert_close(half.encode(images.float()).mode(), whole, rtol=0, atol=0.05 * float(whole.std()))
    assert (tok.dtype, HieraTok.from_pretrained(tmp_path).dtype) == (torch.float32, torch.float32)


def test_a_tokenizer_says_where_it_is(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert HieraTok(tok.config).device == torch.device("meta")
    with pytest.raises(ValueError, match=r"floating-point type such as torch\.bfloat16, not torch\.int8"):
        HieraTok.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="not 'bfloat16'"):
        HieraTok.from_pretrained(tmp_path, dtype="bfloat16")  # type: ignore[arg-type]


def test_hub_options_reach_the_hub(tok, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(hub_id, **options):
        asked.update(options)
        return str(tmp_path / "downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    options = dict(revision="v2", cache_dir=tmp_path / "cache", token="hf_x", local_files_only=True)
    tok.save_pretrained(tmp_path / "downloaded")
    assert HieraTok.from_pretrained("someone/model", **options).config == tok.config
    assert {name: asked[name] for name in options} == options
    DiT(DiTConfig(latent_channels=4, latent_size=4, width=16, depth=1, heads=1)).save_pretrained(
        tmp_path / "downloaded"
    )
    assert DiT.from_pretrained("someone/dit", dtype=torch.float16, **options).x_embedder.proj.weight.dtype == torch.half
    assert set(asked["allow_patterns"]) == {
        "config.json",
        "model.safetensors",
        "encoder/config.json",
        "encoder/*.safetensors",
    }  # and no code


def test_local_files_only_asks_no_network(tmp_path, monkeypatch):
    """With the real client: nothing is in the cache, and the socket would raise."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"someone/model: .*not downloaded before \(local_files_only\)"
    ) as error:
        HieraTok.from_pretrained("someone/model", cache_dir=tmp_path, local_files_only=True)
    assert isinstance(error.value.__cause__, LocalEntryNotFoundError)
    with pytest.raises(FileNotFoundError, match="hub gave none"):
        HieraTok.from_pretrained("someone..x/model-", cache_dir=tmp_path)  # the client refuses such a name itself


# --- Editors and type checkers ----------------------------------------------------------------------------------------

USER_SCRIPT = """
import torch
from hieratok import DiagonalGaussian, HieraTok

tok = HieraTok.from_pretrained("runs/photos", dtype=torch.bfloat16, device="cuda", revision="main")
images = tok.preprocess(["photo.jpg"])
posterior: DiagonalGaussian = tok.encode(images)
pyramid: list[torch.Tensor] = tok.decode_pyramid(posterior.mode())
tok.postprocess(pyramid[-1])[0].save("out.png")
reconstructions, posterior, z = tok(images)
print(z.shape, reconstructions[0].shape, tok.device, tok.dtype)
"""
MISTAKES = """
from hieratok import HieraTok

tok = HieraTok.from_pretrained("runs/photos")
tok.encode("photo.jpg")
tok.decode_pyramid(tok.preprocess("photo.jpg")).shape
tok(tok.preprocess("photo.jpg")).mode()
HieraTok.from_pretrained("runs/photos", revison="main")
"""


def check(tool: list[str], folder: Path, script: str) -> list[int]:
    """The lines of a script in which a type checker finds mistakes."""
    (folder / "script.py").write_text(script.lstrip())
    done = subprocess.run([*tool, "script.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "script.py:" in line and "error" in line]
    assert bool(lines) == bool(done.returncode), done.stdout + done.stderr
    return [int(line.partition("script.py:")[2].partition(":")[0]) for line in lines]


@pytest.fixture(params=["pyright", "mypy"])
def checker(request, tmp_path) -> list[str]:
    """A type checker as a user would run it: the package's types come from where Python finds it."""
    pytest.importorskip(request.param)
    source = Path(hieratok.__file__).parents[1]
    if request.param == "mypy":
        (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\nmypy_path = {source}\n")
        return [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--follow-imports", "silent"]
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{source}"], "typeCheckingMode": "strict"}}')
    return [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]


@pytest.mark.slow
def test_a_users_script_is_checked(checker, tmp_path):
    assert check(checker, tmp_path, USER_SCRIPT) == []
    assert sorted(set(check(checker, tmp_path, MISTAKES))) == [4, 5, 6, 7]


def test_the_package_says_that_it_is_typed_and_what_is_in_it():
    assert (Path(hieratok.__file__).parent / "py.typed").is_file()
    assert set(hieratok.__all__) <= set(dir(hieratok))
    assert {"preprocess", "postprocess", "device", "dtype"} <= set(dir(HieraTok))
