"""The app: uploads are checked before they are decoded, the page shows what the models give, and strangers in numbers,
with bad files or a keyboard alone get along with it."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok import HieraTok, app_page, cli, uploads
from hieratok.app import ServeApp, load, serve
from hieratok.app_handlers import BLENDS, SAMPLES, SIGMAS, Demo
from hieratok.app_page import Picture, error_map, judge, latent_picture
from hieratok.data.pixels import BadImageError, center_crop, to_float, to_uint8
from hieratok.evaluation.pixels import psnr, ssim
from hieratok.evaluation.reconstruction import area_resize, one_colour_per_token
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import SampleConfig, sample_latents
from hieratok.uploads import MAX_BYTES, at_most, check_image, content_of, read_upload
from test_latents import save_tokenizer
from test_sample import save_generator

NASTY = "<img src=x onerror=alert(1)>&\"'.png"


def photo(path: Path, width: int = 90, height: int = 60, seed: int = 0, **options) -> Path:
    """A smooth picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


def read(path: Path) -> torch.Tensor:
    """An upload that lies in a folder of its own."""
    return read_upload(str(path), path.name, 256, path.parent)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# File name, content, and what the message must say. All but the last are refused before a pixel is decoded.
BAD = {
    "text": ("notes.png", b"not a picture", "notes.png is not an image"),
    "empty": ("empty.jpg", b"", "empty.jpg is not an image"),
    "svg": ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.svg is not an image"),
    "postscript": ("figure.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "figure.eps is not an image"),
    "bomb": ("bomb.png", png_header(40_000, 40_000), "bomb.png has more pixels than the limit, 25 million"),
    "warned": ("large.png", png_header(10_000, 12_000), "large.png has 10,000 x 12,000 pixels"),
    "large": ("large.png", png_header(6_000, 5_000), "the limit is 25 million in all"),
    "narrow": ("strip.png", png_header(1, 20_000), "strip.png is too narrow with 1 x 20,000 pixels"),
    "truncated": ("half.png", png_header(50, 50), "cannot read half.png"),
}


# --- uploads ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as hieratok.data.pixels does
@pytest.mark.parametrize("kind", BAD)
def test_bad_uploads_are_refused_in_one_line(kind, tmp_path, monkeypatch):
    name, content, expected = BAD[kind]
    path = tmp_path / "upload"
    path.write_bytes(content)
    if kind != "truncated":
        monkeypatch.setattr(uploads, "decode_image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImageError, match=re.escape(expected)) as error:
        read_upload(str(path), name, 256, tmp_path)
    assert "\n" not in str(error.value)


def test_size_in_bytes_is_checked_first(tmp_path):
    path = tmp_path / "upload"
    path.write_bytes(b"\0")
    os.truncate(path, MAX_BYTES + 2**20)
    with pytest.raises(BadImageError, match=r"big\.jpg has 21\.0 MB; the limit is 20 MB"):
        content_of(str(path), "big.jpg", tmp_path)


def test_largest_photos_pass():
    check_image(png_header(6_000, 4_000), "24 megapixels.png")
    check_image(png_header(20, 1), "narrow.png")


def test_photos_come_upright_and_not_too_large(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = read(photo(tmp_path / "a.jpg", 2400, 1200, exif=exif))
    assert image.shape == (3, 256, 128)
    assert image.dtype == torch.uint8
    plain = read(photo(tmp_path / "b.jpg", 2400, 1200))
    assert (plain.rot90(-1, (1, 2)).int() - image.int()).abs().max() <= 2


def test_small_photos_stay_as_they_are(tmp_path):
    image = read(photo(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as saved:
        assert np.array_equal(image.permute(1, 2, 0), np.array(saved))
    assert at_most(torch.zeros(3, 1, 3000, dtype=torch.uint8), 1024).shape == (3, 1, 1024)


# --- pictures and HTML ------------------------------------------------------------------------------------------------


def pictures(html: str) -> list[torch.Tensor]:
    """The pictures of a page, uint8 (3, H, W), in their order."""
    found = []
    for data in re.findall(r'src="data:image/webp;base64,([^"]+)"', html):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            found.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    return found


def test_latent_picture_is_pca():
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([3.0, 2.0, 1.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
    z = (turn * deviations) @ torch.randn(6, 40, dtype=torch.float64, generator=generator)
    z = z.view(6, 5, 8)
    picture = latent_picture(z)
    assert picture.shape == (3, 5, 8)
    values = z.flatten(1).numpy()
    _, strengths, rows = np.linalg.svd(values - values.mean(1, keepdims=True), full_matrices=False)
    expected = strengths[:3, None] * rows[:3]  # PCA by another way: (3, 40)
    expected = 127.5 + 127.5 * expected / (2.5 * expected[0].std())
    for channel, reference in zip(picture.flatten(1).double().numpy(), expected):
        errors = [np.abs(channel - np.clip(sign, 0, 255)).max() for sign in (reference, 255 - reference)]
        assert min(errors) <= 0.51
    assert torch.equal(latent_picture(z[[3, 1, 5, 0, 2, 4]]), picture), "the order of the channels changes nothing"


def test_latent_picture_of_few_channels_and_of_nothing():
    assert set(latent_picture(torch.full((4, 2, 3), 7.0)).flatten().tolist()) <= {127, 128}
    assert latent_picture(torch.randn(16, 1, 1)).shape == (3, 1, 1)
    two = latent_picture(torch.randn(2, 4, 4))
    assert two[0].float().std() > 0
    assert set(two[2].flatten().tolist()) <= {127, 128}


def test_error_map_grows_brighter_with_the_error():
    original = torch.zeros(3, 1, 6, dtype=torch.uint8)
    image = torch.tensor([0, 8, 16, 32, 64, 255], dtype=torch.uint8).expand(3, 1, 6)
    brightness = error_map(image, original).float().mean(0)[0]
    assert brightness[0] < 5
    assert (brightness.diff()[:4] > 5).all()
    assert brightness[4] == brightness[5] > 200
    assert torch.equal(error_map(original, image), error_map(image, original))


def test_judge_compares_with_the_photo_at_the_scales_size():
    original = torch.randint(0, 256, (3, 48, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = torch.full((3, 24, 16), 128, dtype=torch.uint8)
    reference = area_resize(original[None], (24, 16))
    expected = f"PSNR {float(psnr(scale[None], reference)):.2f} dB, SSIM {float(ssim(scale[None], reference)):.3f}"
    assert judge(scale, original) == expected
    assert judge(scale[:, :10], original[:, :20]).endswith("SSIM –"), "smaller than SSIM's window"
    assert judge(original, original) == "identical"
    noise = original[:, :24, :16]
    colours = float(psnr(one_colour_per_token(noise[None], 8), noise[None]))
    assert judge(noise, noise, 8) == f"identical; one colour per token {colours:.2f} dB"
    assert judge(scale, scale, 8) == "identical; one colour per token identical"


def test_what_is_written_is_escaped():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    nasty = Picture(image, NASTY, NASTY)
    parts = [
        app_page.message(NASTY),
        app_page.status(NASTY),
        app_page.section(NASTY, NASTY),
        app_page.row([nasty], [(NASTY, 1, 1)]),
        app_page.before_after(nasty, nasty),
        app_page.frames([nasty, nasty], NASTY),
    ]
    assert "<img src=x" not in "".join(parts)
    assert "onerror=alert" in "".join(parts)


# --- what the handlers yield ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a tokenizer (16 px, scales 1, 2, 4) and a generator of three classes."""
    folder = save_tokenizer(tmp_path_factory.mktemp("run"))
    return save_generator(folder, folder)


@pytest.fixture
def tokenizer(run) -> HieraTok:
    return HieraTok.from_pretrained(run)


@pytest.fixture
def demo(run, tmp_path) -> Demo:
    return load(ServeApp(run=str(run), generator=str(run), device="cpu"), tmp_path)


def record(path: Path) -> dict[str, str]:
    return {"path": str(path), "orig_name": path.name}


@pytest.mark.parametrize("size", [(90, 60), (16, 16), (5, 7), (1, 1)])
def test_photo_at_every_scale_as_it_is_decoded(demo, tokenizer, tmp_path, size):
    path = photo(tmp_path / "a.png", *size)
    pages = list(demo.photo(record(path)))
    image = read(path)
    with torch.inference_mode():
        posterior = tokenizer.encode(to_float(image[None]))
        scales = [to_uint8(x)[0] for x in tokenizer.decode_progressive(posterior.mode(), posterior.image_size)]
    for k in range(3):
        shown = pictures(pages[1 + k])
        assert len(shown) == k + 1, "coarse scales are shown before finer ones are decoded"
        assert pages[1 + k].count("pending") == 2 - k
        assert all(torch.equal(a, b) for a, b in zip(shown, scales))
        assert judge(scales[k], image, tokenizer.config.patch_size) in pages[1 + k]
    *_, last = pages
    expected = [*scales, image, scales[-1], error_map(scales[-1], image), latent_picture(posterior.mode()[0])]
    shown = pictures(last)
    assert all(torch.equal(a, b) for a, b in zip(shown, expected))
    assert len(shown) == len(expected) + len(SIGMAS)


def test_noise_is_in_units_of_the_latents_deviation(demo, tokenizer, tmp_path):
    std = torch.tensor([0.1, 1.0, 2.0, 0.5])
    demo.tokenizer.latent_std.copy_(std)
    image = read(photo(tmp_path / "a.png"))
    with torch.inference_mode():
        shown = pictures(demo.noise(image))
        z = tokenizer.encode(to_float(center_crop(image, 16)[None])).mode()
        noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        for sigma, picture in zip(SIGMAS, shown, strict=True):
            expected = to_uint8(tokenizer.decode(z + sigma * std.view(4, 1, 1) * noise))[0]
            assert torch.equal(picture, expected)


def test_two_photos_are_joined_by_a_line_between_their_latents(demo, tokenizer, tmp_path):
    paths = [photo(tmp_path / f"{i}.png", 40 + 20 * i, 50, seed=i) for i in range(2)]
    *_, page = demo.two_photos(*map(record, paths))
    with torch.inference_mode():
        a, b = (tokenizer.encode(to_float(center_crop(read(p), 16)[None])).mode() for p in paths)
        expected = [to_uint8(tokenizer.decode(z))[0] for z in (a, (a + b) / 2, b)]
    shown = pictures(page)
    assert len(shown) == BLENDS
    for picture, reference in zip((shown[0], shown[BLENDS // 2], shown[-1]), expected):
        assert (picture.int() - reference.int()).abs().max() <= 1
    assert "Two photos are needed" in list(demo.two_photos(record(paths[0]), None))[-1]


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_samples_are_those_of_the_generator(objective, tokenizer, tmp_path):
    folder = save_tokenizer(tmp_path)
    save_generator(folder, folder, objective=objective, learn_sigma=objective == "ddpm")
    demo = load(ServeApp(run=str(folder), generator=str(folder), device="cpu"), tmp_path)
    calls = []
    pages = list(demo.generate(2, 1.5, 5, 7, lambda *done: calls.append(done)))
    evaluations = 10 if objective == "flow" else 5
    assert calls == [(i + 1, evaluations) for i in range(evaluations)]

    sampler = "heun" if objective == "flow" else "ddim"
    config = SampleConfig(sampler=sampler, steps=5, cfg=1.5, seed=7, labels=(2,), num=SAMPLES, batch_size=SAMPLES)
    generator = DiT.from_pretrained(folder)
    assert generator.latents is not None
    (batch,) = sample_latents(generator, config)
    with torch.inference_mode():
        scales = list(tokenizer.decode_progressive(generator.latents.denormalize(batch.latents)))
    assert [len(pictures(page)) for page in pages] == [4, 8, 12]
    shown = pictures(pages[-1])
    for k, images in enumerate(scales):
        assert torch.equal(torch.stack(shown[k * SAMPLES : (k + 1) * SAMPLES]), to_uint8(images))
    assert not generator._forward_hooks


@pytest.mark.parametrize("kind", BAD)
def test_handlers_say_what_is_wrong(kind, demo, tmp_path):
    name, content, expected = BAD[kind]
    path = tmp_path / name
    path.write_bytes(content)
    good = photo(tmp_path / "good.jpg")
    for pages in (demo.photo(record(path)), demo.two_photos(record(good), record(path))):
        *_, page = pages
        assert 'role="alert"' in page
        assert expected in page
        assert "<section" not in page


def test_handlers_survive_bad_settings_and_no_photo(demo):
    for settings, expected in {
        (99, 1, 5, 0): "label 99 is out of range",
        (0.5, 1, 5, 0): "the class must be a whole number",
        (0, 1, 10**9, 0): "steps must be a number from 5 to 250",
        (0, 1, 5, -1): "seed must be a number from 0 to",
        (0, "2", 5, 0): "guidance must be a number from 1 to 10",
        (None, 1, 5, 0): "the class must be a whole number",
    }.items():
        (page,) = demo.generate(*settings, lambda *_: None)
        assert expected in page
    (page,) = demo.photo(None)
    assert "No photo yet" in page


def test_large_photos_are_scaled_to_a_bounded_number_of_tokens(demo, tmp_path):
    assert demo.max_side == 64 * 4
    *_, page = demo.photo(record(photo(tmp_path / "a.jpg", 3000, 1000)))
    assert pictures(page)[2].shape == (3, 85, 256)


def test_models_that_do_not_fit_are_refused(run, tmp_path):
    other = save_tokenizer(tmp_path, seed=1)
    with pytest.raises(ValueError, match="trained on latents of another tokenizer"):
        load(ServeApp(run=str(other), generator=str(run), device="cpu"), tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(ServeApp(run=str(tmp_path / "none"), device="cpu"), tmp_path)


def test_without_gradio_one_line_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app", str(run)]) == 2
    assert capsys.readouterr().err == "hieratok: the app needs gradio: pip install 'hieratok[demo]'\n"
    with pytest.raises(ValueError, match="needs gradio"):
        serve(ServeApp(run=str(run)))


def test_options_are_checked(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    assert cli.main(["app", str(run), "--time_limit", "0", "--allowed_hosts", "[photos.example.org, 10.0.0.1]"]) == 2
    assert capsys.readouterr().err == "hieratok: time_limit must be above 0 seconds, not 0\n"


def test_port_in_use_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)  # it is not imported before the port is known
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["app", str(run), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hieratok: cannot listen on 127.0.0.1, port {port} (")
    assert line.endswith("give another --port or --host")


# --- the server -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


WITHOUT_LIMIT = """
import sys
from hieratok.cli import main
from hieratok.data import pixels
pixels.MAX_SCANS = pixels.MAX_SEGMENTS = 10**9
if __name__ == "__main__":  # the worker, which is spawned, takes over what stands above
    sys.exit(main())
"""
"""`hieratok` without a limit of a JPEG's scans: such a file stands for all that keep a decoder busy for long."""


class Server:
    """`hieratok app`, without a limit of scans, in a process of its own, spoken to as a browser would."""

    def __init__(self, run: Path, home: Path, *options: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.temporary, self.place = home / "tmp", home / "place"
        self.temporary.mkdir()
        self.place.mkdir()
        program = home / "program.py"
        program.write_text(WITHOUT_LIMIT)
        command = [sys.executable, str(program), "app", str(run), "--generator", str(run), "--port", str(self.port)]
        self.log = home / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", *options],
                cwd=self.place,
                env={**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"hieratok app: {self.url} (Ctrl+C ends it)\n", line + self.log.read_text()

    def upload(self, name: str, content: bytes) -> dict:
        """Send a file; gradio's record of it."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + content + f"\r\n--{boundary}--\r\n".encode()
        (path,) = self.post("upload", body, f"multipart/form-data; boundary={boundary}")
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, handler: str, *values: object) -> str:
        """What a handler yields last; "error" if the server refuses."""
        event = self.post(f"call/{handler}", json.dumps({"data": values}).encode(), "application/json")["event_id"]
        kind, page = "", ""
        with urllib.request.urlopen(f"{self.url}gradio_api/call/{handler}/{event}", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                field, _, value = line.partition(": ")
                kind = value if field == "event" else kind
                if field == "data" and kind in ("generating", "complete"):
                    page = json.loads(value)[0]
        return page if kind == "complete" else "error"

    def post(self, path: str, body: bytes, kind: str):
        request = urllib.request.Request(f"{self.url}gradio_api/{path}", body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def family(self) -> list[int]:
        """The process and those that it started."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [self.process.pid, *(int(pid) for file in children for pid in file.read_text().split())]

    def megabytes(self) -> float:
        """Resident memory of all its processes."""
        found = [re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in self.family()]
        return sum(int(size) for sizes in found for size in sizes) / 1024

    def end(self, timeout: float = 5) -> int:
        """Ask it to stop; its exit status. Nothing that it started may be left."""
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=timeout)
        deadline = time.monotonic() + timeout
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, family))
        return self.process.returncode

    def kill(self) -> None:
        """Whatever became of it."""
        self.process.kill()
        self.process.communicate()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def server(run, tmp_path_factory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="the app needs gradio")
    server = Server(run, tmp_path_factory.mktemp("server"))
    try:
        yield server
        assert server.end() == 0
        left = [path for folder in (server.temporary, server.place) for path in folder.rglob("*") if path.is_file()]
        assert not left, "nothing is kept on the disk"
    finally:
        server.kill()


@pytest.mark.parametrize("kind", BAD)
def test_served_page_says_what_is_wrong(kind, server):
    name, content, expected = BAD[kind]
    page = server.call("photo", server.upload(name, content))
    assert page.startswith('<p class="message" role="alert">')
    assert expected in page


def test_server_refuses_files_that_are_too_large(server):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.upload("big.jpg", bytes(MAX_BYTES + 1))
    assert error.value.code == 413
    error.value.close()


def test_only_this_machine_is_let_in(server):
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", server.port), timeout=2).close()


def test_ten_at_once_wait_and_memory_does_not_grow(server, tmp_path):
    content = photo(tmp_path / "a.jpg", 120, 90).read_bytes()
    uploaded = server.upload("a.jpg", content)
    assert server.call("photo", uploaded).count("<section") == 4

    def ten_at_once() -> list[str]:
        with ThreadPoolExecutor(10) as visitors:
            return list(visitors.map(lambda _: server.call("photo", server.upload("a.jpg", content)), range(10)))

    pages = ten_at_once()
    before = server.megabytes()
    pages += ten_at_once()
    assert all(page == pages[0] for page in pages)
    assert pages[0].count("<section") == 4
    assert server.megabytes() - before < 100


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("browser tests need chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """A page of the app of a given width; afterwards it must not have asked another host for anything, nor erred."""
    requests, errors, contexts = [], [], []

    def open_page(width: int = 1280, color_scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=color_scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.get_by_role("heading", name="hieratok").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert len(requests) > 5
    assert not [url for url in requests if not url.startswith((server.url, "data:", "blob:"))]


def choose(page, nth: int, *files: Path) -> None:
    """Give files to the page's nth upload that has no photo yet."""
    page.locator("input[type=file]").nth(nth).set_input_files(files)


@pytest.mark.slow
def test_a_photo_in_the_browser_by_keyboard(visit, tmp_path):
    page = visit()
    page.get_by_role("tab", name="Two photos").wait_for()
    choose(page, 0, photo(tmp_path / "a.png"))
    page.get_by_role("heading", name="Noise on z").wait_for()
    assert page.get_by_alt_text(re.compile(r"^\d+ × \d+ px. PSNR")).count() == 3
    assert page.get_by_alt_text(re.compile(r"^90 × 60 px. PSNR")).count() == 1
    assert page.evaluate("[...document.querySelectorAll('.results img')].every(image => image.alt)")

    border = page.get_by_label(re.compile("^Border between Photo"))
    border.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert page.locator(".compare").evaluate("figure => figure.style.getPropertyValue('--cut')") == "40%"
    box = page.locator(".compare").bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 10)
    assert 75 < float(border.input_value()) < 85

    sigma = page.get_by_role("slider", name="Noise σ")
    sigma.focus()
    page.keyboard.press("End")
    assert page.locator(".frames figure:visible figcaption").inner_text().startswith("σ = 1.5")
    assert sigma.get_attribute("aria-valuetext").startswith("σ = 1.5")


@pytest.mark.slow
def test_pasting_two_photos(visit, tmp_path):
    page = visit()
    page.get_by_role("tab", name="Two photos").click()
    paste = """data => {
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
        const clipboard = new DataTransfer();
        clipboard.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
        document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: clipboard}));
    }"""
    for i in range(2):
        data = base64.b64encode(photo(tmp_path / f"{i}.png", seed=i).read_bytes()).decode()
        page.evaluate(paste, data)
        page.locator("[data-testid=image] img, .image-frame img").nth(i).wait_for()
    page.get_by_role("heading", name="Between the two").wait_for()
    page.get_by_role("slider", name="From the first to the second").press("End")
    assert page.locator(".frames figure:visible figcaption").inner_text().startswith("0% first, 100% second")


@pytest.mark.slow
def test_samples_in_the_browser(visit):
    page = visit()
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("heading", name="Class 0").wait_for()
    page.get_by_role("heading", name="16 × 16 px").wait_for()
    assert page.locator(".results:visible img").count() == 3 * SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_a_phone(visit, tmp_path, color_scheme):
    page = visit(width=360, color_scheme=color_scheme)
    page.get_by_role("tab", name="Photo", exact=True).wait_for()
    choose(page, 0, photo(tmp_path / "a.png", 900, 300))
    page.get_by_role("heading", name="Noise on z").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "no scrolling sideways"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 384) == (color_scheme == "dark")


@pytest.mark.slow
def test_a_bad_file_is_answered_in_the_page(visit, tmp_path):
    page = visit()
    page.get_by_role("tab", name="Two photos").wait_for()
    name, content, expected = BAD["text"]
    (tmp_path / name).write_bytes(content)
    choose(page, 0, tmp_path / name)
    assert expected in page.get_by_role("alert").inner_text()
    assert page.get_by_text("Traceback").count() == 0
