"""A corpus of hostile and odd files in the place of every file that is read: one line or success, in bounds.

No case may end in anything but success, a ValueError or an OSError of one printable line, take more than some seconds,
or more memory than the limit that `outcome` sets.
"""

import contextlib
import io
import json
import math
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.models import CONFIG
from helpers.object_stores import write_tar, write_zip
from hieratok import HieraTok, cli
from hieratok.analysis.report import LatentReport
from hieratok.app.uploads import check_image
from hieratok.core.checkpoint import json_text, read_tensors
from hieratok.core.files import MAX_DEPTH, read_json, read_npy, read_npz, read_yaml, shown
from hieratok.core.pixels import MAX_SCANS
from hieratok.data.images import open_source
from hieratok.data.latents import LatentDataset
from hieratok.evaluation.features import FeatureNetwork, load_network
from hieratok.evaluation.images import NpzImages
from hieratok.evaluation.protocols import EvaluateCompare, compare
from hieratok.evaluation.results import Result
from hieratok.evaluation.statistics import SetStatistics
from hieratok.generation.dit import DiT, DiTConfig, LatentSpace
from hieratok.reports.runs import Report, picture_parts, write_report
from hieratok.settings import load_run
from hieratok.tasks.analyze import load_array
from hieratok.tasks.latents import WriteLatents, write_latents
from hieratok.tasks.sample import read_settings
from hieratok.tokenizer.pretrained import load_tokenizer
from hieratok.training.runs import find_runs

pytestmark = pytest.mark.timeout(60)  # the machine may be busy; a hang takes for ever
MEMORY = 1 << 30
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
PACKED = ("zip", "tar", "arrow", "parquet")
"""Files of many images."""
GENERATOR = DiTConfig(latent_channels=4, latent_size=4, width=32, depth=1, heads=2, num_classes=3)


@contextlib.contextmanager
def bounded_memory(extra: int = MEMORY) -> Iterator[None]:
    """What takes more addresses than now and `extra` fails with MemoryError (or torch's RuntimeError)."""
    if sys.platform != "linux":
        yield
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(call: Callable[[], Any]) -> str:
    """The one line that a call ends with; empty if it succeeds. Anything else fails the test."""
    with bounded_memory():
        try:
            call()
        except (ValueError, OSError) as error:
            message = str(error)
    if "message" not in locals():
        return ""
    assert message
    assert message.isprintable(), repr(message)
    assert len(message) < 2_000
    return message


def refused(call: Callable[[], Any]) -> str:
    message = outcome(call)
    assert message, "not refused"
    return message


# --- What stands in a file's place ------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "FIFO": make_fifo,
    "socket": make_socket,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to a FIFO": lambda path: (make_fifo(path.with_name("fifo")), path.symlink_to("fifo")),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """One sound file or folder of every kind that is read."""
    root = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    for i in range(3):
        (root / "photos").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / "photos" / f"{i}.png")
    torch.manual_seed(0)
    tokenizer = HieraTok(CONFIG)
    tokenizer.latent_mean.zero_()
    tokenizer.latent_std.fill_(1)
    tokenizer.save_pretrained(root / "tokenizer")
    generator = DiT(GENERATOR)
    generator.latents = LatentSpace("0" * 64, (0.0,) * 4, (1.0,) * 4)
    generator.save_pretrained(root / "generator")
    write_latents(
        WriteLatents(run=str(root / "tokenizer"), data=str(root / "photos"), out=str(root / "latents"), device="cpu")
    )
    run = root / "run"
    for name in ("checkpoints", "pictures", "evaluation"):
        (run / name).mkdir(parents=True)
    shutil.copytree(root / "tokenizer", run / "tokenizer")
    (run / "config.yaml").write_text("name: a\nkind: tokenizer\ntrain: {steps: 10}\n")
    record = {"step": 10, "images": 40, "loss": 0.5, "images_per_second": 8.0}
    (run / "log.jsonl").write_text(json.dumps(record) + "\n")
    (run / "evaluations.jsonl").write_text(json.dumps({"step": 10, "images": 40, "psnr": 20.0}) + "\n")
    (run / "evaluation" / "metrics.json").write_text(json.dumps({"n": 3, "psnr": 20.0, "manifest": {"a": 1}}))
    Image.new("RGB", (30, 20)).save(run / "pictures" / "step-00000010.png")
    (root / "recipe.yaml").write_text("name: a\nmodel: {image_size: 128, patch_size: 16, scales: [1, 8]}\n")
    (root / "metrics.json").write_text(json.dumps({"psnr": 20.0, "manifest": {"a": 1}}))
    intervals = {"64": {"psnr": [19.0, 21.0]}}
    result = {"n": 3, "psnr": 20.0, "intervals": intervals, "warnings": [], "manifest": {"a": 1}, "inputs": {}}
    (root / "evaluated.json").write_text(json.dumps(result))
    noise = {"noise_psnr/0.1": 20.0, "noise_psnr_low/0.1": 19.0, "noise_psnr_high/0.1": None}
    (root / "analysed.json").write_text(json.dumps({"n": 3, "decoded_images": 3, **noise, "manifest": {"a": 1}}))
    (root / "metadata.json").write_text(json.dumps({"settings": {"num": 1}}))
    write_statistics(root / "statistics.npz")
    np.savez(root / "images.npz", arr_0=rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    np.save(root / "points.npy", rng.normal(size=(5, 2)).astype(np.float32))
    save_file({"a": torch.zeros(3)}, root / "weights.safetensors")
    torch.save({"a": torch.zeros(3)}, root / "weights.pth")
    np.savez(root / "weights.npz", a=np.zeros(3, np.float32))
    photo = (root / "photos" / "1.png").read_bytes()
    write_zip(root / "photos.zip", [("a/1.png", photo), ("b/2.png", photo)], zipfile.ZIP_DEFLATED)
    write_tar(root / "photos.tar", [("1.png", photo), ("1.cls", b"0")])
    table = pa.table({"image": [{"bytes": photo, "path": "1.png"}] * 3, "label": [0, 1, 2]})
    with pa.OSFile(str(root / "photos.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, root / "photos.parquet")
    return root


@pytest.fixture
def sound(templates, tmp_path, monkeypatch) -> Path:
    """A copy that may be spoilt."""
    monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(templates, tmp_path / "sound"))


NETWORK = FeatureNetwork("tiny", nn.Flatten(), lambda x: x.float(), "none", "0" * 64)


def write_statistics(path: Path, **changes: Any) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(9, 4)).astype(np.float32)
    manifest = NETWORK.description() | {"images sha256": "0" * 64, "image size": "8 x 8"}
    arrays = {
        "mu": features.mean(0, dtype=np.float64),
        "sigma": np.cov(features, rowvar=False).astype(np.float64),
        "n": np.int64(9),
        "features": features,
        "manifest": np.array(json.dumps(manifest)),
    }
    arrays |= {name: np.asarray(value) for name, value in changes.items()}
    np.savez(path, **{name: array for name, array in arrays.items() if array.shape or array.dtype != object})


def read_all(source: Any) -> None:
    for i in range(len(source)):
        source.image(i)


def report_of(root: Path) -> None:
    write_report(Report(folder=str(root / "run"), out=str(root / "page.html")))


def look_at(root: Path) -> None:
    """What a page of runs is made of, without the plots, which take a while."""
    runs = find_runs(root / "run")
    json_text([run.facts() for run in runs])
    picture_parts(runs)


# file within `sound` -> what reads it, and whether a spoilt one is an error (a gallery tells it on its page)
READERS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "tokenizer/config.json": (lambda root: HieraTok.from_pretrained(root / "tokenizer"), True),
    "tokenizer/model.safetensors": (lambda root: HieraTok.from_pretrained(root / "tokenizer"), True),
    "generator/config.json": (lambda root: DiT.from_pretrained(root / "generator"), True),
    "generator/model.safetensors": (lambda root: DiT.from_pretrained(root / "generator"), True),
    "latents/manifest.json": (lambda root: LatentDataset(root / "latents"), True),
    "latents/shard-00000/labels.npy": (lambda root: LatentDataset(root / "latents"), True),
    "latents/shard-00000/mean.npy": (lambda root: LatentDataset(root / "latents")[0, 0], True),
    "recipe.yaml": (lambda root: load_run(str(root / "recipe.yaml")), True),
    "metrics.json": (lambda root: compare(EvaluateCompare(a=f"{root}/metrics.json", b=f"{root}/metrics.json")), True),
    "evaluated.json": (lambda root: Result.read(root / "evaluated.json"), True),
    "analysed.json": (lambda root: LatentReport.read(root / "analysed.json"), True),
    "metadata.json": (read_settings, True),
    "statistics.npz": (lambda root: SetStatistics.load(root / "statistics.npz", NETWORK), True),
    "images.npz": (lambda root: read_all(NpzImages(root / "images.npz")), True),
    "points.npy": (lambda root: load_array(str(root / "points.npy"), (2,)), True),
    "weights.safetensors": (lambda root: read_tensors(root / "weights.safetensors"), True),
    "weights.pth": (lambda root: read_tensors(root / "weights.pth"), True),
    "weights.npz": (lambda root: read_tensors(root / "weights.npz"), True),
    "photos/1.png": (lambda root: read_all(open_source(str(root / "photos" / "1.png"))), True),
    **{
        f"photos.{kind}": (lambda root, kind=kind: read_all(open_source(str(root / f"photos.{kind}"))), True)
        for kind in PACKED
    },
    "run/config.yaml": (look_at, False),
    "run/log.jsonl": (look_at, False),
    "run/evaluations.jsonl": (look_at, False),
    "run/evaluation/metrics.json": (look_at, False),
    "run/pictures/step-00000010.png": (look_at, False),
    "run/tokenizer/model.safetensors": (look_at, False),
}


def test_every_reader_reads_what_is_sound(sound):
    for read in [report_of, *(read for read, _ in READERS.values())]:
        assert outcome(lambda read=read: read(sound)) == ""
    assert "What could not be read" not in (sound / "page.html").read_text()


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("place", READERS)
def test_only_regular_files_are_opened(sound, place, special):
    path = sound / place
    path.unlink()
    SPECIAL[special](path)
    read, is_error = READERS[place]
    message = outcome(lambda: read(sound))
    if is_error:
        kind = special.removeprefix("link to a ")
        wanted = ["does not exist", "levels of symbolic links"] if "link to" in special else []
        wanted += [f"is a {kind}, not a regular file", f"{shown(path.parent)} holds no model", "no images found in"]
        assert any(words in message for words in wanted), message
        assert path.name.split(".")[0] in message or "holds no model" in message


@pytest.mark.parametrize("place", [place for place, (_, is_error) in READERS.items() if is_error])
def test_an_unreadable_file_is_called_unreadable(sound, place, monkeypatch):
    """Root may read everything, so the system's refusal is played."""
    really_open, path = os.open, os.fspath(sound / place)

    def refuse(file: Any, *args: Any, **kwargs: Any) -> int:
        if isinstance(file, str | os.PathLike) and os.fspath(file) == path:
            raise PermissionError(13, "Permission denied", path)
        return really_open(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    if place.endswith((".safetensors", ".pth")):
        pytest.skip("opened by a library in its own way")
    message = refused(lambda: READERS[place][0](sound))
    assert "may not be read" in message
    assert Path(place).name in message


# --- Contents ---------------------------------------------------------------------------------------------------------

CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "spaces": b"  \n ",
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "a text": b'"text"',
    "half a table": b'{"a": ',
    "zeros": bytes(100),
    "bytes that are no UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "deep lists": b"[" * 100_000,
    "deep closed lists": b"[" * 900 + b"]" * 900,
    "deep tables": b'{"a":' * 100_000,
    "deep closed tables": b'{"a":' * 900 + b"1" + b"}" * 900,
    "an empty table": b"{}",
    "a huge number": b'{"step": ' + b"9" * 5_000 + b', "a": 1e999}',
    "no numbers": b'{"a": NaN, "step": Infinity, "images": -Infinity}',
    "half a surrogate": b'{"\\ud800": "\\udfff", "model_type": "\\ud800"}',
    "names that turn": '{"\u202e": 1, "a\\nb": 2}'.encode(),
    "spaces without end": b" " * (9 << 20),
    "a long line": b"a" * (2 << 20),
    "many lines": b"{}\n" * 50_000,
    "HTML": b"<html><script>alert(1)</script></html>",
    "PostScript": EPS,
    "a zip": b"PK\x05\x06" + bytes(18),
    "a zip cut short": b"PK\x03\x04" + bytes(40),
    "a pickle": b"cos\nsystem\n(S'touch hacked'\ntR.",
    "anchors": b"a: &a [x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c]",
    "a tag": b"a: !!python/object/apply:os.system ['touch hacked']",
    "a set": b"a: !!set {b, c}",
    "bytes in YAML": b"a: !!binary aGFsbG8=",
    "a tab": b"a:\n\t- b",
    "a number for a name": b"1: 2\n2: {3: 4}",
    "a list for a name": b"? [a, b]\n: c",
    "two documents": b"a: 1\n---\nb: 2",
    "a control character": b"a: \x07",
    "a header without end": struct.pack("<Q", 1 << 60) + b"{}",
    "a header of one's own": struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}',
    "numpy's beginning": b"\x93NUMPY\x01\x00",
    "numpy of objects": b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }".ljust(117)
    + b"\n",
    "numpy without end": b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,), }".ljust(117)
    + b"\n",
    "numpy of negative size": b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, -1), }".ljust(117)
    + b"\n",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("place", READERS)
def test_contents(sound, place, content, monkeypatch):
    monkeypatch.chdir(sound)  # where a pickle would leave its trace
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = sound / place
    path.write_bytes(CONTENTS[content])
    read, is_error = READERS[place]
    message = outcome(lambda: read(sound))
    assert not (sound / "hacked").exists()
    if is_error and message:
        assert path.name.partition(".")[0] in message or "holds no" in message
    if is_error and place != "recipe.yaml":  # of which some are tables, in which anything may be left out
        assert message or (place, content) == ("weights.npz", "a zip")  # of no tensors


@pytest.mark.parametrize("place", READERS)
def test_a_file_cut_anywhere(sound, place):
    path = sound / place
    data = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        outcome(lambda: READERS[place][0](sound))


@pytest.mark.parametrize("kind", PACKED)
def test_a_byte_changed_anywhere_in_a_file_of_images(sound, kind):
    """Lengths, places, counts and types among them."""
    path = sound / f"photos.{kind}"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(data), min(len(data), 150), replace=False):
        spoilt = bytearray(data)
        spoilt[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        path.write_bytes(spoilt)
        outcome(lambda: read_all(open_source(str(path))))


def test_a_zips_long_table_of_contents_fits(tmp_path):
    names = [f"{i:07}.jpg".encode() for i in range(400_000)]
    entry = struct.Struct("<4s6H3I5H2I")
    table = b"".join(entry.pack(b"PK\1\2", *[0] * 9, len(name), *[0] * 6) + name for name in names)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0, 0, len(table), 64, 0)
    (tmp_path / "x.zip").write_bytes(bytes(64) + table + end)
    assert outcome(lambda: open_source(str(tmp_path / "x.zip"))) == ""


# --- Models -----------------------------------------------------------------------------------------------------------

VALUES = [4, "4", -1, 0, 1.5, None, True, [], {}, [4], "\u202e", 10**9, 10**30, math.inf, math.nan, ["a"] * 100]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_values_in_a_models_config(sound, kind, value):
    """Every field in turn; `scales: 4`, `mlp_ratio: "4"` and a depth of 10^9 among them."""
    path = sound / kind / "config.json"
    config = json.loads(path.read_text())
    read = {"tokenizer": HieraTok, "generator": DiT}[kind].from_pretrained
    for name, sound_value in config.items():
        if value == sound_value and type(value) is type(sound_value):
            continue
        path.write_text(json.dumps({**config, name: value}))
        message = outcome(lambda: read(path.parent))
        may_be = (
            value == 4 or (isinstance(sound_value, float) and value in (0, 1.5)) or (name, value) == ("latents", None)
        )
        assert "config.json" in message or (may_be and not message), (name, value)
        path.write_text(json.dumps({k: v for k, v in config.items() if k != name}))
        outcome(lambda: read(path.parent))


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_in_what_a_generator_says_of_its_latents(sound, value):
    path = sound / "generator" / "config.json"
    config = json.loads(path.read_text())
    for name in ("encoder_sha256", "mean", "std"):
        latents = {**config["latents"], name: value}
        path.write_text(json.dumps({**config, "latents": latents}))
        message = outcome(lambda: DiT.from_pretrained(path.parent))
        if name != "encoder_sha256":
            assert "latents" in message


def changed(tensors: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in {**tensors, name: value}.items() if v is not None}


WEIGHTS: dict[str, tuple[str, Callable[[Tensor], Tensor | None]]] = {
    "whole numbers": ("encoder.positions", lambda x: torch.zeros(x.shape, dtype=torch.int64)),
    "true and false": ("encoder.positions", lambda x: torch.zeros(x.shape, dtype=torch.bool)),
    "another shape": ("encoder.positions", lambda x: torch.zeros(2)),
    "not there": ("encoder.positions", lambda x: None),
    "too many": ("a\nb\u202e", lambda x: torch.zeros(1)),
    "not a number": ("encoder.positions", lambda x: torch.full_like(x, math.nan)),
    "a negative deviation": ("latent_std", lambda x: -torch.ones_like(x)),
    "an infinite mean": ("latent_mean", lambda x: torch.full_like(x, math.inf)),
    "half of the means": ("latent_mean", lambda x: torch.tensor([0.0, math.nan, 0.0, 0.0])),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_no_model_has(sound, case):
    path = sound / "tokenizer" / "model.safetensors"
    tensors = load_file(path)
    name, make = WEIGHTS[case]
    save_file(changed(tensors, name, make(tensors.get(name, torch.zeros(1)))), path)
    assert "model.safetensors" in refused(lambda: HieraTok.from_pretrained(path.parent))


def test_weights_in_another_floating_type_are_read(sound):
    path = sound / "tokenizer" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert outcome(lambda: HieraTok.from_pretrained(path.parent)) == ""


def test_statistics_never_measured_are_allowed_and_a_constant_channel_is_named(sound):
    model = HieraTok(CONFIG)
    model.save_pretrained(sound / "fresh")
    assert outcome(lambda: HieraTok.from_pretrained(sound / "fresh")) == ""
    model.latent_mean.zero_()
    model.latent_std.copy_(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert "channel 1" in refused(lambda: model.normalize(torch.zeros(1, 4, 4, 4)))


def test_a_compressed_pth_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w", 8) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert "b.pth cannot be read" in refused(lambda: read_tensors(tmp_path / "b.pth"))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 10**9},
        {"block_out_channels": 10**9},
        {"block_out_channels": [32] * 1_000},
        {"block_out_channels": []},
        {"latent_channels": "4"},
        {"latent_channels": -1},
        {"in_channels": None},
        {"down_block_types": ["os.system"]},
        {"_class_name": ["AutoencoderKL"]},
        {"_class_name": "StableDiffusionPipeline"},
        {"norm_num_groups": 0},
        {"sample_size": "large"},
        {"surprise": [[[[]]]]},
    ],
    ids=str,
)
def test_a_config_of_diffusers(tmp_path, changes):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=[32], layers_per_block=1, latent_channels=4, norm_num_groups=32, sample_size=32
    )
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = outcome(lambda: load_tokenizer(str(tmp_path)))
    assert message or "surprise" in changes


# --- Latents and statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_in_a_manifest_of_latents(sound, value):
    path = sound / "latents" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest:
        path.write_text(json.dumps({**manifest, name: value}))
        message = outcome(lambda: LatentDataset(sound / "latents"))
        assert message or (name == "shard_images" and value in (4, 10**9))
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k != name}))
        refused(lambda: LatentDataset(sound / "latents"))
    for part in ("tokenizer", "data"):
        for name in manifest[part]:
            path.write_text(json.dumps({**manifest, part: {k: v for k, v in manifest[part].items() if k != name}}))
            message = outcome(lambda: LatentDataset(sound / "latents"))
            assert message or name == "config"


@pytest.mark.parametrize(
    "array",
    [np.zeros(3), np.zeros((3, 1), np.int64), np.full(3, -2), np.array(["a"] * 3), np.zeros(0, np.int64), np.int64(3)],
    ids=repr,
)
def test_arrays_of_latents(sound, array):
    np.save(sound / "latents" / "shard-00000" / "labels.npy", array)
    assert "labels.npy" in refused(lambda: LatentDataset(sound / "latents"))


STATISTICS: dict[str, dict[str, Any]] = {
    "a negative variance": {"sigma": -np.eye(4)},
    "a negative eigenvalue": {"sigma": np.ones((4, 4)) * 2 - np.eye(4)},
    "not symmetric": {"sigma": np.triu(np.ones((4, 4)))},
    "infinite": {"sigma": np.full((4, 4), np.inf)},
    "no number": {"mu": np.full(4, np.nan)},
    "another shape": {"sigma": np.eye(5)},
    "a vector": {"sigma": np.ones(4)},
    "a table for a mean": {"mu": np.zeros((2, 2))},
    "nothing": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
    "whole numbers": {"mu": np.zeros(4, np.int64)},
    "texts": {"mu": np.array(["a"] * 4)},
    "complex": {"sigma": np.eye(4, dtype=complex)},
    "no images": {"n": 0},
    "one image": {"n": 1},
    "fewer than none": {"n": -5},
    "half an image": {"n": 9.5},
    "a list of counts": {"n": [9, 9]},
    "a text for a count": {"n": "9"},
    "a count without end": {"n": np.uint64(2**63)},
    "features of another width": {"features": np.zeros((9, 3), np.float32)},
    "more features than images": {"features": np.zeros((99, 4), np.float32)},
    "features that are not finite": {"features": np.full((9, 4), np.nan, np.float32)},
    "features of whole numbers": {"features": np.zeros((9, 4), np.int64)},
    "no manifest": {"manifest": "null"},
    "half a manifest": {"manifest": "{"},
    "a deep manifest": {"manifest": "[" * 10_000},
    "a number for a manifest": {"manifest": 3},
    "a list of manifests": {"manifest": ["{}", "{}"]},
    "another network": {"manifest": json.dumps({"images sha256": "a", "image size": None, "network": "\u202e"})},
    "no hash": {"manifest": json.dumps({"images sha256": 3, "image size": [1]})},
    "half of the spatial ones": {"mu_s": np.zeros(4)},
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_no_images_have(tmp_path, case):
    path = tmp_path / "bad.npz"
    write_statistics(path, **STATISTICS[case])
    assert "bad.npz" in refused(lambda: SetStatistics.load(path, NETWORK))


@pytest.mark.parametrize(
    "changes",
    [{"sigma": np.zeros((4, 4)), "mu": np.zeros(4)}, {"sigma": np.ones((4, 4), np.float32)}, {"n": np.int32(9)}],
    ids=["zero", "of rank one", "another type of count"],
)
def test_statistics_at_the_edge_are_read(tmp_path, changes):
    write_statistics(tmp_path / "good.npz", **changes)
    assert outcome(lambda: SetStatistics.load(tmp_path / "good.npz", NETWORK)) == ""


def member(name: str, shape: str, size: int, data: bytes, kind: int = zipfile.ZIP_DEFLATED) -> Any:
    """An array in an .npz whose header and directory may say what they like."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return name, b"\x93NUMPY\x01\x00\x76\x00" + header + data, size, kind


def write_npz(path: Path, *members: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, size, kind in members:
            archive.writestr(name, data, kind)
            if size:
                archive.infolist()[-1].file_size = size  # what the directory at the end says


NPZ = {
    "5 GiB declared": [member("arr_0.npy", "(1, 41000, 41000, 3)", 5 << 30, bytes(1000))],
    "more in the header than in the file": [member("arr_0.npy", "(1, 41000, 41000, 3)", 0, bytes(1000))],
    "more in a stored header": [member("arr_0.npy", "(1, 41000, 41000, 3)", 0, bytes(1000), zipfile.ZIP_STORED)],
    "more in the directory": [member("arr_0.npy", "(1, 10000, 10000, 3)", 1 << 29, bytes(300))],
    "a negative side": [member("arr_0.npy", "(1, -10, -10, 3)", 0, bytes(300))],
    "a number too large": [member("arr_0.npy", f"({10**40}, 1, 1, 3)", 0, bytes(300))],
    "code for a shape": [member("arr_0.npy", "__import__('os')", 0, bytes(300))],
    "LZMA": [member("arr_0.npy", "(1, 10, 10, 3)", 0, bytes(300), zipfile.ZIP_LZMA)],
    "BZIP2": [member("arr_0.npy", "(1, 10, 10, 3)", 0, bytes(300), zipfile.ZIP_BZIP2)],
    "no array": [("arr_0.npy", b"hello", 0, zipfile.ZIP_STORED)],
    "another name": [member("arr_1.npy", "(1, 10, 10, 3)", 0, bytes(300))],
}


@pytest.mark.parametrize("case", NPZ)
def test_npz(tmp_path, case):
    path = tmp_path / "bad.npz"
    write_npz(path, *NPZ[case])
    assert "bad.npz" in refused(lambda: NpzImages(path))
    if case != "another name":
        assert "bad.npz" in refused(lambda: read_npz(path))


def test_an_npz_that_grows_a_thousandfold_is_refused_by_the_size_it_declares(tmp_path, monkeypatch):
    monkeypatch.setattr("hieratok.core.files.MAX_ARRAY_BYTES", 1 << 24)
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros((1, 4096, 4096, 3), np.uint8))
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 17
    assert "bomb.npz cannot be read as .npz: its arrays would take" in refused(lambda: NpzImages(tmp_path / "bomb.npz"))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((1, 4096, 4096, 3), np.uint8))
    assert outcome(lambda: NpzImages(tmp_path / "large.npz")) == ""  # stored, so it is mapped and not read


def test_arrays_read_as_numpy_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4, 5))),
        "zero": np.float32(3),
        "empty": np.zeros((0, 3)),
        "bytes": np.array([b"a", b"bc"]),
        "text": np.array("caf\u00e9"),
        "big": np.arange(5, dtype=">i4"),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        for name, array in read_npz(tmp_path / "a.npz").items():
            assert array.dtype == arrays[name].dtype
            np.testing.assert_array_equal(array, arrays[name])
    for name, array in arrays.items():
        np.save(tmp_path / "a.npy", array)
        for mapped in (False, True):
            np.testing.assert_array_equal(read_npy(tmp_path / "a.npy", mapped), arrays[name], err_msg=name)


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_nesting_has_a_limit_and_what_is_below_it_is_read(tmp_path):
    deep = "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)
    (tmp_path / "a.json").write_text(f'{{"a": {deep}}}')
    (tmp_path / "a.yaml").write_text(f"a: {deep}")
    assert read_json(tmp_path / "a.json") == read_yaml(tmp_path / "a.yaml")


def test_yaml_without_aliases_is_what_pyyaml_reads(tmp_path):
    text = "a: [1, 2.5, true, null, text, '7', 1e3]\nb: {c: {d: []}}\ne: |\n  two\n  lines\n'caf\u00e9': 0x1f\n"
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)


CODE = ["os:system", "subprocess:getoutput", "builtins:exec", "test_hostile_files:own_network", ":", "a:b:c"]


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("command", ["train", "study", "cost"])
def test_no_file_names_code(tmp_path, capsys, monkeypatch, code, command):
    """A feature network of one's own is code: it is taken from the command line, and refused from any file."""
    monkeypatch.chdir(tmp_path)
    settings = {"name": "a", "eval": {"every": 1, "features": code, "weights": "touch hacked"}}
    settings["data"] = {"path": "bundled:train", "val_path": "bundled:val"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    arguments = {
        "train": ["train", "a.yaml", "--out", "run"],
        "study": ["study", "table3", "--base", "a.yaml", "--out", "out"],
        "cost": ["cost", "a.yaml"],
    }
    assert cli.main(arguments[command]) == 2
    error = capsys.readouterr().err
    assert "names code" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "run").exists()


def test_the_same_in_dotted_names_and_in_a_generators_file(tmp_path):
    for text in ("eval.features: 'os:system'\n", "kind: generator\neval: {features: 'os:system'}\n"):
        (tmp_path / "a.yaml").write_text(text)
        assert "names code" in refused(lambda: load_run(str(tmp_path / "a.yaml")))


def test_the_command_line_may_name_code():
    run = load_run("tiny-multi", ["--eval.features", "test_hostile_files:own_network"]).run
    assert run.eval.features == "test_hostile_files:own_network"


class OwnNetwork(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


def own_network(weights: Path | None) -> nn.Module:
    return OwnNetwork()


def without_annotation(weights):
    raise AssertionError("called")


def of_another_kind(weights: Path | None) -> int:
    raise AssertionError("called")


def lying(weights: Path | None) -> nn.Module:
    return 3  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name", ["without_annotation", "of_another_kind", "lying", "CODE", "Path", "nothing", "OwnNetwork.forward"]
)
def test_only_what_says_that_it_returns_a_network_is_called(name):
    assert "nn.Module" in (message := refused(lambda: load_network(f"{__name__}:{name}"))) or "imported" in message


@pytest.mark.parametrize("name", ["os:system", "subprocess:getoutput", "builtins:print", "shutil:rmtree", "os:_exit"])
def test_functions_that_give_no_network_are_not_called_even_if_the_user_says_so(name, tmp_path):
    assert "cannot be used" in refused(lambda: load_network(name, tmp_path / "touch hacked"))


def test_a_network_of_ones_own_still_works():
    assert load_network(f"{__name__}:own_network").name == "own_network"


# --- Pictures ---------------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_header(width: int, height: int, bits: int = 8, kind: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
SOUND = encoded(PHOTO, "PNG")
PICTURES: dict[str, bytes] = {
    "EPS": EPS,
    "EPS after a DOS header": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 30, len(EPS), 0, 0, 0, 0) + EPS,
    "PDF": b"%PDF-1.4\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "ICO": encoded(PHOTO.resize((16, 16)), "ICO"),
    "TGA": encoded(PHOTO, "TGA"),
    "PCX": encoded(PHOTO, "PCX"),
    "SGI": encoded(PHOTO, "SGI"),
    "text": b"hello",
    "nothing": b"",
    "a header alone": png(png_header(10, 10)),
    "no pixels": png(png_header(0, 0), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    "a bomb in the header": png(png_header(60_000, 60_000), (b"IDAT", b""), (b"IEND", b"")),
    "13,000 x 13,000": png(png_header(13_000, 13_000), (b"IDAT", b""), (b"IEND", b"")),
    "one row": png(png_header(2_000_000_000, 1), (b"IDAT", b""), (b"IEND", b"")),
    "a checksum": SOUND[:40] + b"\0" + SOUND[41:],
    "a chunk without end": SOUND[:33] + b"\xff\xff\xff\xfftEXt" + SOUND[33:],
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", PICTURES)
def test_pictures_that_are_not_decoded(sound, case, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (sound / "photos" / "1.png").write_bytes(PICTURES[case])
    assert "1.png" in refused(lambda: read_all(open_source(str(sound / "photos"))))
    (sound / "run" / "pictures" / "step-00000010.png").write_bytes(PICTURES[case])
    page = "".join(picture_parts(find_runs(sound / "run"))).replace("<wbr>", "")
    assert "step-00000010.png cannot be read" in page


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_many_pixels_is_refused_on_the_command_line(sound, capsys):
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + 13_000 // 8)) for _ in range(13_000)) + rows.flush()
    file = png(png_header(13_000, 13_000, 1, 0), (b"IDAT", data), (b"IEND", b""))
    assert len(file) < 500_000
    (sound / "many.png").write_bytes(file)
    with bounded_memory():
        status = cli.main(
            ["reconstruct", str(sound / "tokenizer"), str(sound / "many.png"), "--out", str(sound / "out"), "--crop"]
        )
    assert status == 2
    assert "many.png: it has 13,000 x 13,000 pixels" in capsys.readouterr().err


def jpeg_of_scans(count: int) -> bytes:
    """A small file: a photo of one colour, whose last scan stands in it again and again."""
    file = encoded(Image.new("RGB", (2_000, 2_000)), "JPEG", progressive=True)
    scans, last = file.count(b"\xff\xda"), file[file.rindex(b"\xff\xda") : -2]
    return file[:-2] + last * (count - scans) + file[-2:]


def jpeg_of_one_component_a_scan(count: int) -> bytes:
    file = encoded(Image.new("RGB", (2_000, 2_000)), "JPEG")
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(100)
    return file[: file.index(b"\xff\xda")] + scan * count + file[-2:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("parts.jpg", jpeg_of_one_component_a_scan(101), "parts.jpg: it is a JPEG of more than 100 scans"),
        ("scans.jpg", jpeg_of_scans(20_000), "scans.jpg: it is a JPEG of more than 100 scans"),
        ("segments.jpg", b"\xff\xd8" + b"\xff\xfe\0\2" * 1_000_000, "it is a JPEG of more than 10,000 segments"),
    ],
)
def test_a_small_jpeg_that_would_take_minutes_is_refused(sound, capsys, monkeypatch, name, content, message):
    """By every command that opens pictures, the app and the pages of runs among them, without a pixel decoded."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", lambda *_: pytest.fail("it was decoded"))
    assert len(content) < 1 << 22
    file, out = sound / "hostile" / name, str(sound / "out")
    file.parent.mkdir()
    file.write_bytes(content)
    for command in (["reconstruct", str(sound / "tokenizer")], ["latents", str(sound / "tokenizer"), "--data"]):
        assert cli.main([*command, str(file.parent), "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert message in refused(lambda: check_image(content, name))
    (sound / "run" / "pictures" / "step-00000010.png").write_bytes(content)
    page = "".join(picture_parts(find_runs(sound / "run"))).replace("<wbr>", "")
    assert "step-00000010.png cannot be read" in page


def test_a_jpeg_of_as_many_scans_as_are_allowed_is_read(tmp_path):
    """What no decoder looks at is not counted: a preview in its EXIF, and what stands after its end."""
    file = jpeg_of_scans(MAX_SCANS)
    preview = segment(0xE1, b"Exif\0\0" + b"\xff\xda\0\2" * MAX_SCANS)
    (tmp_path / "a.jpg").write_bytes(file[:2] + preview + file[2:] + b"\xff\xda" * MAX_SCANS)
    assert open_source(str(tmp_path)).image(0).shape == (3, 2_000, 2_000)


def test_a_large_text_in_a_png_is_no_reason_to_refuse_it(tmp_path):
    text = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(b"a" * (2 << 20)))
    for place in (33, len(SOUND) - 12):  # before the pixels, and after them
        (tmp_path / "a.png").write_bytes(SOUND[:place] + text + SOUND[place:])
        image = open_source(str(tmp_path)).image(0)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(PHOTO))


def png_16(pixels: np.ndarray, transparent: bytes = b"") -> bytes:
    """A PNG of 16 bits from uint16 (H, W, 1 to 4)."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [png_header(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels])]
    chunks += [(b"tRNS", transparent)] if transparent else []
    return png(*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_rounded_on_white(tmp_path, channels):
    pixels = np.random.default_rng(channels).integers(0, 65536, (300, 9, channels))
    (tmp_path / "a.png").write_bytes(png_16(pixels))
    values = pixels.astype(np.float64) / 65535
    if channels in (2, 4):
        values = values[..., :-1] * values[..., -1:] + 1 - values[..., -1:]
    expected = np.broadcast_to(np.floor(values * 255 + 0.5), (300, 9, 3))
    image = open_source(str(tmp_path)).image(0).permute(1, 2, 0).numpy()
    assert np.abs(image - expected).max() <= 1
    assert (image != expected).mean() < 1e-3  # where opacity leads to a tie


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_16_bits_is_white(tmp_path, channels):
    pixels = np.full((2, 2, channels), 301)
    pixels[0, 1] = 300
    (tmp_path / "a.png").write_bytes(png_16(pixels, struct.pack(">H", 300) * channels))
    image = open_source(str(tmp_path)).image(0)
    assert image[:, 0, 1].tolist() == [255, 255, 255]
    assert image[:, 0, 0].tolist() == [1, 1, 1]


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("is_xmp_first", [False, True])
def test_a_photo_is_turned_whatever_stands_before_its_exif(tmp_path, orientation, is_xmp_first):
    plain = encoded(PHOTO, "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    segments = [xmp] * is_xmp_first + [segment(0xE1, exif.tobytes())]
    (tmp_path / "a.jpg").write_bytes(plain[:2] + b"".join(segments) + plain[2:])
    image = open_source(str(tmp_path)).image(0).permute(1, 2, 0).numpy()
    upright = np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))
    for _ in range({1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[orientation]):
        upright = np.rot90(upright)
    if orientation in (2, 4, 5, 7):
        upright = upright[:, ::-1]
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 1


# --- Runs -------------------------------------------------------------------------------------------------------------

LOGS = {
    "no lines": b"",
    "numbers beyond all": b'{"step": 1, "images": 4, "images_per_second": 1, "loss": 1e308, "a": -1e308, "b": 1e-9}\n',
    "more than infinite": b'{"step": 1, "images": 4, "images_per_second": 1, "loss": 1e999, "a": '
    + b"9" * 400
    + b"}\n",
    "no speed": b'{"step": 1, "images": 4, "images_per_second": 1e-320, "loss": 1}\n',
    "steps back": b'{"step": 9, "images": 9, "images_per_second": 1}\n{"step": 1, "images": 1}\n',
    "true for a number": b'{"step": true, "images": true, "images_per_second": true}\n',
    "names of terms": json.dumps(
        {"step": 1, "images": 4, "images_per_second": 1, "a\nb\u202e\ud800<script>$x^2$": 1, "\udce9": 2, "": 3}
    ).encode(),
    "thousands of terms": json.dumps(
        {"step": 1, "images": 4, "images_per_second": 1} | {f"t{i}": 1 for i in range(5_000)}
    ).encode(),
}
SETTINGS = {
    "texts for numbers": b"train: {steps: many}\nname: [1]\nkind: tokenizer",
    "a list for a kind": b"kind: [tokenizer]",
    "another kind": b"kind: discriminator",
    "infinite steps": b"train: {steps: .inf}",
    "no number of steps": b"train: {steps: .nan}",
    "negative steps": b"train: {steps: -5}",
    "very many steps": b"train: {steps: 1" + b"0" * 300 + b"}",
    "more steps than can be said": b"train: {steps: 1" + b"0" * 5_000 + b"}",
    "a name that turns": '"\u202e": 1\nname: "\\x07<script>"\n'.encode(),
    "no tables": b"train: 3\nmodel: [1]\ndata: x",
}
RESULTS = {
    "texts": {"psnr": "high", "manifest": "none", "warnings": 3, "inputs": [1]},
    "infinite": {"psnr": math.inf, "fid": math.nan, "manifest": {}},
    "beyond all": {"psnr": 10**400, "ssim": -(10**17)},
    "names": {"psnr-\u202e\n": 1.0, "fid-<script>": 2.0, "manifest": {"a\n": {"b": [{}]}}, "warnings": [[1], None]},
    "nothing": {},
    "deep": {"manifest": {"a": {"b": {"c": {"d": {"e": {"f": {}}}}}}}},
}


def spoil(root: Path, place: str, content: bytes) -> None:
    (root / "run" / place).write_bytes(content)


@pytest.mark.parametrize(
    ("place", "content"),
    [
        *(pytest.param("log.jsonl", content, id=f"log, {case}") for case, content in LOGS.items()),
        *(pytest.param("evaluations.jsonl", content, id=f"evaluations, {case}") for case, content in LOGS.items()),
        *(pytest.param("config.yaml", content, id=f"settings, {case}") for case, content in SETTINGS.items()),
        *(
            pytest.param("evaluation/metrics.json", json.dumps(result).encode(), id=f"result, {case}")
            for case, result in RESULTS.items()
        ),
    ],
)
def test_a_damaged_run_is_shown_and_published(sound, capsys, monkeypatch, place, content):
    """By `report`, as a page and as JSON, and by `push --dry_run`, whose card is made of it."""
    monkeypatch.setattr("hieratok.training.runs.MOST_TERMS", 5)  # a plot takes a while
    spoil(sound, place, content)
    arguments = ["report", str(sound / "run"), "--out", str(sound / "page.html")]
    with bounded_memory():
        assert cli.main(arguments) == 0
        assert cli.main([*arguments, "--json"]) == 0
        assert cli.main(["push", str(sound / "run"), "a/b", "--license", "mit", "--dry_run"]) in (0, 2)
    assert "<script>a" not in (sound / "page.html").read_text()
    assert "\u202e" not in (sound / "page.html").read_text()
    assert capsys.readouterr().err.count("\n") <= 1


# --- Names ------------------------------------------------------------------------------------------------------------

NAMES = {
    "no UTF-8": b"caf\xe9",
    "line break": b"a\nb",
    "turned": "a\u202egpj".encode(),
    "escape": b"a\x1b[31mb",
    "long": b"x" * 245,
    "quotes": b"a'\"b <i>&amp;",
    "backslash": b"a\\b",
    "dash": b"-rf",
    "brackets": b"[a]{b,c}{1..3}",
    "percent": b"%s{0}",
    "space": b" a ",
    "dots": b"a..b...c",
}


@pytest.fixture(params=NAMES)
def odd(request, sound) -> tuple[Path, str]:
    """A folder of photos, one of an odd name, one in an odd folder; and a run of that name."""
    name = os.fsdecode(NAMES[request.param])
    photos = sound / name / "photos"
    photos.mkdir(parents=True)
    (photos / name).mkdir()
    shutil.copy(sound / "photos" / "0.png", photos / f"{name}.png")
    for i in range(3):
        shutil.copy(sound / "photos" / f"{i}.png", photos / name / f"{i}.png")
    shutil.move(sound / "run", sound / name / "run")
    return sound / name, request.param


def run_command(*arguments: Any) -> None:
    assert cli.main([*map(str, arguments)]) == 0, arguments


def test_every_command_works_with_any_name(odd, capsys, monkeypatch):
    folder, kind = odd
    photos, run = folder / "photos", folder / "run"
    if kind == "dash":
        monkeypatch.chdir(folder)
        photos = Path("photos")
    plain = ["--features", "none", "--lpips", "[]"]
    run_command("reconstruct", run, photos, "--out", folder / "out", "--device", "cpu")
    assert len(list((folder / "out").glob("*px.png"))) == 3 * 4
    run_command("evaluate", "images", photos, photos, "--size", 16, "--out", folder / "evaluated", *plain)
    run_command("evaluate", "reconstruction", run, "--data", photos, "--device", "cpu", *plain)
    run_command("latents", run, "--data", photos, "--out", folder / "latents", "--device", "cpu")
    run_command("analyze", run, "--data", photos, "--draws", 0, "--num", 3, "--device", "cpu")
    run_command("report", folder, "--out", folder / "page.html")
    run_command("report", folder, "--out", folder / "page.html", "--json")
    capsys.readouterr()
    for page in [*folder.rglob("*.html")]:
        text = page.read_text(encoding="utf-8")
        assert "\u202e" not in text
        assert "\x1b" not in text
    for file in folder.rglob("*.json"):
        json.loads(file.read_text(encoding="ascii"))


def test_messages_show_names_escaped(odd, capsys):
    folder, kind = odd
    bad = next((folder / "photos").glob("*.png"), None) or next((folder / "photos").glob("*/0.png"))
    bad.write_bytes(b"hello")
    for data in (bad, folder / "nowhere")[: 1 if kind == "brackets" else 2]:  # a name that is not there is a pattern
        assert cli.main(["evaluate", "images", str(data), str(data), "--features", "none", "--lpips", "[]"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.strip().isprintable()
        assert shown(folder.name) in error


def test_a_name_shown():
    assert shown(Path("plain/caf\u00e9.png")) == "plain/caf\u00e9.png"
    assert shown("a\nb\u202e\x1b\t") == "a\\nb\\u202e\\x1b\\t"
    assert shown(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert shown("\ud800") == "\\ud800"


def test_a_deep_folder_of_long_names(sound):
    deep = sound / "deep"
    for i in range(5):
        deep = deep / (str(i) * 60)
    deep.mkdir(parents=True)
    shutil.copy(sound / "photos" / "0.png", deep / "a.png")
    run_command("reconstruct", sound / "tokenizer", sound / "deep", "--out", sound / "out", "--device", "cpu")
    assert len(list((sound / "out").glob("*px.png"))) == 3 * 1


def test_two_long_names_alike_at_their_beginning_stay_two(sound):
    for name in ("x" * 240 + "1.png", "x" * 240 + "2.png"):
        (sound / "long").mkdir(exist_ok=True)
        shutil.copy(sound / "photos" / "0.png", sound / "long" / name)
    run_command("reconstruct", sound / "tokenizer", sound / "long", "--out", sound / "out", "--device", "cpu")
    assert len(list((sound / "out").glob("*px.png"))) == 3 * 2


def test_a_run_may_lie_under_any_name(sound, monkeypatch):
    """Training writes settings, logs, checkpoints and events below a name that is no UTF-8, from photos under one."""
    name = os.fsdecode(b"caf\xe9\n\xff")
    shutil.move(sound / "photos", sound / name)
    options = ["--train.steps", 2, "--train.batch_size", 2, "--train.save_every", 1, "--data.num_workers", 0]
    options += ["--model.image_size", 32, "--model.scales", "[1,2]", "--train.picture_every", 1]
    for _ in range(2):  # and again, which resumes
        run_command("train", "tiny-multi", "--data", sound / name, "--out", sound / f"run{name}", *options)
    assert read_yaml(sound / f"run{name}" / "config.yaml")["data"]["path"] == str(sound / name)


# --- Modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_files_have_the_modes_that_the_umask_gives(sound, mask):
    before = os.umask(mask)
    try:
        HieraTok(CONFIG).save_pretrained(sound / "new")
        run_command("latents", sound / "tokenizer", "--data", sound / "photos", "--out", sound / "cache")
        run_command("reconstruct", sound / "tokenizer", sound / "photos", "--out", sound / "out", "--device", "cpu")
        run_command("push", sound / "run", "a/b", "--license", "mit", "--dry_run")
    finally:
        os.umask(before)
    folders = [sound / "new", sound / "cache", sound / "out", sound / "run" / "hub"]
    for path in [file for folder in folders for file in folder.rglob("*") if file.is_file()]:
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", ["FIFO", "device", "folder"])
@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ("tokenizer/model.safetensors", ["reconstruct", "tokenizer", "photos", "--out", "out"]),
        ("tokenizer/config.json", ["reconstruct", "tokenizer", "photos", "--out", "out"]),
        ("photos/1.png", ["reconstruct", "tokenizer", "photos/1.png", "--out", "out"]),
        ("recipe.yaml", ["train", "recipe.yaml", "--out", "out"]),
        ("recipe.yaml", ["study", "table3", "--base", "recipe.yaml", "--out", "out"]),
        ("run/config.yaml", ["train", "tiny-multi", "--out", "run"]),
        ("latents/manifest.json", ["train", "dit-tiny", "--data", "latents", "--out", "out"]),
        ("images.npz", ["evaluate", "images", "images.npz", "images.npz", "--features", "none", "--lpips", "[]"]),
        ("metrics.json", ["evaluate", "compare", "metrics.json", "metrics.json"]),
        ("weights.pth", ["evaluate", "stats", ".", "--features", "vgg16", "--weights", "weights.pth", "--out=a.npz"]),
        ("weights.pth", ["evaluate", "images", ".", ".", "--features", "none", "--lpips", "[vgg=weights.pth]"]),
        ("points.npy", ["analyze", "--embedding", "points.npy"]),
    ],
)  # fmt: skip
def test_special_files_on_the_command_line(sound, capsys, monkeypatch, place, arguments, special):
    monkeypatch.chdir(sound)
    (sound / place).unlink()
    SPECIAL[special](sound / place)
    assert cli.main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
