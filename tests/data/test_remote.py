"""Data where it lies: beside the same files on this machine, from real servers on it."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.object_stores import WebServer, jpeg, samples, write_tar, write_zip
from helpers.runs import assert_same_run, command, environment, last_step
from hieratok.core.pixels import BadImageError
from hieratok.data import packed, remote
from hieratok.data.images import (
    ImageDataset,
    PackedImages,
    StepBatches,
    evaluation_batches,
    open_source,
    training_loader,
)
from hieratok.data.remote import RemoteError, check_address, without_secrets

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)


@pytest.fixture
def web(tmp_path):
    (tmp_path / "served").mkdir()
    server = WebServer(tmp_path / "served")
    yield server
    server.stop()


def check_same(found, expected) -> None:
    assert len(found) == len(expected)
    for i in range(len(expected)):
        assert found.name(i) == expected.name(i)
        assert found.label(i) == expected.label(i)
        assert torch.equal(found.image(i), expected.image(i))


def failure(call: Any, error: type[Exception] = RemoteError) -> str:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable(), repr(message)
    return message


# --- A web server -----------------------------------------------------------------------------------------------------


def test_shards_and_zips_are_what_they_are_here(web):
    for i in range(3):
        write_tar(web.folder / f"train-{i:03}.tar", samples(5, first=5 * i))
    check_same(open_source(f"{web.url}/train-{{000..002}}.tar"), open_source(f"{web.folder}/train-*.tar"))
    check_same(open_source(f"{web.url}/train-001.tar"), open_source(f"{web.folder}/train-001.tar"))
    write_zip(web.folder / "x.zip", [(f"c{i % 2}/{i}.jpg", jpeg(i)) for i in range(6)])
    check_same(open_source(f"{web.url}/x.zip"), open_source(f"{web.folder}/x.zip"))


def test_the_index_is_read_once_by_ranges_and_kept(web, tmp_path):
    size = len(jpeg(0)) + (3 << 20)
    members = [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", jpeg(i).ljust(size)), ("cls", b"2"))]
    path = write_tar(web.folder / "big.tar", members)
    source = open_source(f"{web.url}/big.tar")
    read = sum(last - first + 1 for _, first, last in web.ranges)
    assert 0 < read < 0.6 * path.stat().st_size, "what lies between the headers was read"
    web.ranges.clear()
    again = open_source(f"{web.url}/big.tar")
    assert web.ranges == []
    check_same(again, source)
    assert {last - first + 1 for _, first, last in web.ranges} == {size}, "an image is one range"
    (kept,) = (tmp_path / "cache" / "index").glob("*.npz")
    kept.write_bytes(b"damaged")
    check_same(open_source(f"{web.url}/big.tar"), source)


def test_a_zip_of_many_images_is_indexed_by_its_end(web):
    path = write_zip(web.folder / "x.zip", [(f"{i}.jpg", jpeg(i) + bytes(500_000)) for i in range(10)])
    open_source(f"{web.url}/x.zip")
    assert sum(last - first + 1 for _, first, last in web.ranges) < path.stat().st_size / 2


def test_a_file_that_changed_is_noticed_and_indexed_anew(web):
    write_tar(web.folder / "x.tar", samples(3))
    source = open_source(f"{web.url}/x.tar")
    write_tar(web.folder / "x.tar", samples(4, first=50))
    message = failure(lambda: source.image(0), BadImageError)
    assert message == f"{web.url}/x.tar was changed since it was indexed"
    check_same(open_source(f"{web.url}/x.tar"), open_source(f"{web.folder}/x.tar"))


def test_a_server_that_fails_for_a_while_is_asked_again(web):
    write_tar(web.folder / "x.tar", samples(4))
    failures: dict[str, int] = {}

    def fails(path: str) -> int | None:
        failures[path] = failures.get(path, 0) + 1
        return 503 if failures[path] % 4 else None

    web.fails = fails
    check_same(open_source(f"{web.url}/x.tar"), open_source(f"{web.folder}/x.tar"))
    assert failures["/x.tar"] == 4 * 5  # the index and four images


def test_a_server_that_stays_away_ends_the_run_even_where_bad_images_are_skipped(web):
    write_tar(web.folder / "x.tar", samples(4))
    source = open_source(f"{web.url}/x.tar")
    asked = []
    web.fails = lambda path: asked.append(path) or 503
    dataset = ImageDataset(source, 16, on_bad_image="skip")
    message = failure(lambda: dataset[0, 0])
    assert message == f"{web.url}/x.tar cannot be read after 6 tries: the server answers 503"
    assert len(asked) == 6
    loader = training_loader(dataset, StepBatches(4, 2, 2, 0, 2), 1)
    assert failure(lambda: list(loader)) == message, "through a worker's traceback"


def test_what_will_not_pass_is_said_at_once(web):
    write_tar(web.folder / "x.tar", samples(1))
    assert failure(lambda: open_source(f"{web.url}/y.tar"), FileNotFoundError) == f"{web.url}/y.tar does not exist"
    asked = []
    web.fails = lambda path: asked.append(path) or 403
    assert failure(lambda: open_source(f"{web.url}/x.tar")) == f"{web.url}/x.tar may not be read: access denied"
    assert len(asked) == 1
    web.fails = lambda path: None
    web.reads_ranges = False
    assert "does not read parts of files (HTTP ranges)" in failure(lambda: open_source(f"{web.url}/x.tar"))
    web.stop()
    assert "cannot be read after 6 tries" in failure(lambda: open_source(f"{web.url}/x.tar"))


def test_images_are_read_ahead_at_the_same_time(web):
    write_tar(web.folder / "x.tar", samples(24))
    dataset = ImageDataset(open_source(f"{web.url}/x.tar"), 16, crop="center", flip=False)
    here = ImageDataset(open_source(f"{web.folder}/x.tar"), 16, crop="center", flip=False)
    lock, now, most = threading.Lock(), 0, 0

    def slow(path: str) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1

    web.fails = slow
    items = [(i, 0) for i in (5, 3, 8, 1, 9, 3, 20, 11)]
    for ours, theirs in zip(dataset.__getitems__(items), here.__getitems__(items), strict=True):
        assert torch.equal(ours["image"], theirs["image"])
    assert most > 3
    most = 0
    batches = list(evaluation_batches(open_source(f"{web.url}/x.tar"), 16, 8))
    assert most > 3
    expected = list(evaluation_batches(open_source(f"{web.folder}/x.tar"), 16, 8))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(batches, expected, strict=True))


def test_what_is_read_ahead_is_bounded(web, monkeypatch):
    write_tar(web.folder / "x.tar", samples(20))
    source = open_source(f"{web.url}/x.tar")
    monkeypatch.setattr(packed, "READ_AHEAD_BYTES", 3 * len(jpeg(0)))
    source.read_ahead(range(20))
    assert 2 <= len(source._ahead._waiting) <= 4
    assert [round(source.image(i).float().mean().item()) for i in range(20)] == list(range(20))
    assert source._ahead._waiting == {}


def test_resuming_at_any_step_gives_the_tail_with_any_number_of_workers(web):
    for i in range(2):
        write_tar(web.folder / f"{i}.tar", samples(6, first=6 * i))
    here = ImageDataset(open_source(f"{web.folder}/*.tar"), 16, seed=3)
    expected = list(training_loader(here, StepBatches(12, 4, 4, 0, 6, seed=3), 0))
    for start, workers in ((0, 0), (2, 2), (5, 1)):
        there = ImageDataset(open_source(f"{web.url}/{{0..1}}.tar"), 16, seed=3)
        found = list(training_loader(there, StepBatches(12, 4, 4, start, 6 - start, seed=3), workers))
        assert len(found) == 6 - start
        for ours, theirs in zip(found, expected[start:], strict=True):
            assert torch.equal(ours["image"], theirs["image"])
            assert torch.equal(ours["label"], theirs["label"])


def test_parquet_on_a_server(web):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"jpg": [jpeg(i) for i in range(9)], "label": list(range(9))})
    pq.write_table(table, web.folder / "x.parquet", row_group_size=4)
    check_same(open_source(f"{web.url}/x.parquet"), open_source(f"{web.folder}/x.parquet"))
    web.ranges.clear()
    assert len(open_source(f"{web.url}/x.parquet")) == 9
    assert web.ranges == []


def test_a_server_that_says_something_else_is_refused_in_bounds(web):
    (web.folder / "x.tar").write_bytes(b"<html>" * 1000)
    assert "x.tar is not an (uncompressed) tar file" in failure(lambda: open_source(f"{web.url}/x.tar"), ValueError)
    (web.folder / "x.zip").write_bytes(b"<html>" * 1000)
    assert "x.zip is not a zip" in failure(lambda: open_source(f"{web.url}/x.zip"), ValueError)
    assert "cannot be listed" in failure(lambda: open_source(f"{web.url}/*.tar"), ValueError)
    assert "cannot be listed" in failure(lambda: open_source(f"{web.url}/folder"), ValueError)
    assert "compressed archive" in failure(lambda: open_source(f"{web.url}/x.tar.gz"), ValueError)


# --- Addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://example.com/x.tar", "is not encrypted"),
        ("ftp://example.com/x.tar", "ftp:// is not supported"),
        ("file:///etc/passwd", "file:// is not supported"),
        ("memory://x.tar", "memory:// is not supported"),
        ("s3://bucket/x.tar::file:///etc/passwd", ":: or # in it is not supported"),
        ("simplecache::s3://bucket/x.tar", "no such file"),
        ("https://alice:SECRET@example.com/x.tar", "user's name or password"),
        ("https://example.com/x.tar?X-Amz-Signature=SECRET", "query"),
        ("s3://", "names no bucket"),
        ("https:///x.tar", "names no server"),
        ("s3://bucket/x.arrow", "this machine's disks only"),
    ],
)
def test_addresses_that_are_refused_without_asking_anybody(address, words, monkeypatch):
    monkeypatch.setattr(remote, "_open_system", lambda *_: pytest.fail("the network was used"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_source(address) if "arrow" not in address else PackedImages([address])
    assert words in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_no_secret_of_a_librarys_message_is_shown():
    text = without_secrets(
        "403, url='https://u:SECRET@cdn.example/a/b?Signature=SECRET&Key=SECRET' and s3://k:SECRET@b/x"
    )
    assert text == "403, url='https://cdn.example/a/b' and s3://b/x"
    check_address("https://example.com/a@b/x.tar")
    check_address("http://[::1]:8000/x.tar")


# --- An object store --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store():
    """moto's server, which answers as S3 does."""
    pytest.importorskip("moto")
    pytest.importorskip("flask")
    pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(store, monkeypatch, tmp_path):
    """A function that puts a file into an empty bucket, which commands find by the environment."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYOFATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRETOFATEST")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    remote._opened_system.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")

    def put(path: Path, key: str) -> None:
        client.upload_file(str(path), "photos", key)

    yield put
    for entry in client.list_objects_v2(Bucket="photos").get("Contents", []):
        client.delete_object(Bucket="photos", Key=entry["Key"])
    client.delete_bucket(Bucket="photos")
    remote._opened_system.cache_clear()


def test_shards_in_a_bucket_by_every_way_to_name_them(bucket, tmp_path):
    for i in range(3):
        bucket(write_tar(tmp_path / f"train-{i:03}.tar", samples(4, first=4 * i)), f"a/train-{i:03}.tar")
    here = open_source(f"{tmp_path}/train-*.tar")
    for address in (
        "s3://photos/a/train-*.tar",
        "s3://photos/a/train-{000..002}.tar",
        "s3://photos/a/",
        "s3://photos/a",
    ):
        check_same(open_source(address), here)
    bucket(tmp_path / "train-000.tar", "a/val-000.tar")
    message = failure(lambda: open_source("s3://photos/a"), ValueError)
    assert "choose one of 's3://photos/a/train-*.tar', 's3://photos/a/val-*.tar', 's3://photos/a/*.tar'" in message
    loader = training_loader(ImageDataset(open_source("s3://photos/a/train-*.tar"), 16), StepBatches(12, 4, 4, 1, 2), 2)
    expected = training_loader(ImageDataset(here, 16), StepBatches(12, 4, 4, 1, 2), 0)
    for ours, theirs in zip(loader, expected, strict=True):
        assert torch.equal(ours["image"], theirs["image"])


def test_zips_and_parquet_in_a_bucket(bucket, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    bucket(write_zip(tmp_path / "x.zip", [(f"c{i % 2}/{i}.jpg", jpeg(i)) for i in range(5)]), "x.zip")
    check_same(open_source("s3://photos/x.zip"), open_source(str(tmp_path / "x.zip")))
    pq.write_table(pa.table({"jpg": [jpeg(1), jpeg(2)]}), tmp_path / "x.parquet")
    bucket(tmp_path / "x.parquet", "p/x.parquet")
    check_same(open_source("s3://photos/p"), open_source(str(tmp_path / "x.parquet")))


def test_an_object_that_changed_is_noticed(bucket, tmp_path):
    bucket(write_tar(tmp_path / "x.tar", samples(2)), "x.tar")
    source = open_source("s3://photos/x.tar")
    bucket(write_tar(tmp_path / "x.tar", samples(2, first=9)), "x.tar")
    assert "was changed since it was indexed" in failure(lambda: source.image(0), BadImageError)
    check_same(open_source("s3://photos/x.tar"), open_source(str(tmp_path / "x.tar")))


def test_what_is_not_in_a_bucket(bucket, tmp_path):
    for address in ("s3://photos/x.tar", "s3://photos/*.tar", "s3://nowhere/x.tar", "s3://photos/folder"):
        message = failure(lambda address=address: open_source(address), FileNotFoundError)
        assert address in message
        assert "SECRET" not in message
        assert "KEYOFATEST" not in message
    (tmp_path / "notes.txt").write_text("x")
    bucket(tmp_path / "notes.txt", "folder/notes.txt")
    message = failure(lambda: open_source("s3://photos/folder"), ValueError)
    assert message == "no shards found in s3://photos/folder (looked for .tar .zip .parquet); it has .txt (1)"


def test_a_missing_package_is_named(monkeypatch):
    remote._opened_system.cache_clear()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert (
        failure(lambda: open_source("s3://b/x.tar"), ValueError)
        == "s3fs is not installed: pip install 'hieratok[data]'"
    )


# --- The hub ----------------------------------------------------------------------------------------------------------


class Hub(WebServer):
    """Answers what the Hugging Face hub answers about the dataset alice/photos, whose files lie in a folder."""

    def entries(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.rglob("*")):
            content = path.read_bytes() if path.is_file() else None
            kind = {"type": "directory"} if content is None else {"type": "file", "size": len(content)}
            oid = hashlib.sha1(content or b"").hexdigest()
            found.append({**kind, "path": str(path.relative_to(self.folder)), "oid": oid})
        return found

    def json(self, path: str, body: str) -> Any:
        path = urllib.parse.unquote(path.partition("?")[0])
        start = "/api/datasets/alice/photos"
        if path.startswith(f"{start}/tree/main"):
            folder = path.removeprefix(f"{start}/tree/main").strip("/")
            return [entry for entry in self.entries() if entry["path"].startswith(folder + "/" * bool(folder))]
        if path.startswith(f"{start}/paths-info/"):
            wanted = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
            return [entry for entry in self.entries() if entry["path"] in wanted]
        if path.startswith(start):
            return {"id": "alice/photos", "sha": "0" * 40, "siblings": []}
        return None

    def file(self, path: str) -> Path:
        return super().file(path.removeprefix("/datasets/alice/photos/resolve/main"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    (tmp_path / "hub").mkdir()
    server = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    remote._opened_system.cache_clear()
    yield server
    server.stop()
    remote._opened_system.cache_clear()


def test_a_dataset_on_the_hub(hub):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    (hub.folder / "data").mkdir()
    (hub.folder / "README.md").write_text("photos")
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002")):
        table = pa.table({"jpg": [jpeg(9 * i + j) for j in range(4)], "label": list(range(4))})
        pq.write_table(table, hub.folder / "data" / f"{name}.parquet")
    check_same(open_source("hf://datasets/alice/photos"), open_source(str(hub.folder / "data")))
    pq.write_table(table, hub.folder / "data" / "test-00000-of-00001.parquet")
    message = failure(lambda: open_source("hf://datasets/alice/photos"), ValueError)
    assert "'hf://datasets/alice/photos/data/train-*-of-*.parquet'" in message
    check_same(
        open_source("hf://datasets/alice/photos/data/train-*-of-*.parquet"),
        open_source(f"{hub.folder}/data/train-*-of-*.parquet"),
    )
    write_tar(hub.folder / "x.tar", samples(3))
    check_same(open_source("hf://datasets/alice/photos/x.tar"), open_source(f"{hub.folder}/x.tar"))
    assert "or is private" in failure(lambda: open_source("hf://datasets/alice/photos/y.tar"), FileNotFoundError)
    assert "or is private" in failure(lambda: open_source("hf://datasets/bob/photos"), FileNotFoundError)


# --- The command ------------------------------------------------------------------------------------------------------

STEPS = 60
SMALL = """
model: {image_size: 16, patch_size: 4, latent_channels: 4, scales: [1, 2, 4], encoder_width: 16, encoder_depth: 1,
        encoder_heads: 2, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
data: {num_workers: 1}
loss: {perceptual_weight: 0.0}
train: {steps: STEPS, batch_size: 4, precision: fp32, picture_every: 0, save_every: 7, log_every: 1}
""".replace("STEPS", str(STEPS))


def test_a_killed_run_on_a_bucket_ends_as_the_run_on_files(bucket, tmp_path):
    """kill -9 in the middle, resume: weights, optimiser and log bit for bit."""
    (tmp_path / "small.yaml").write_text(SMALL)
    bucket(write_tar(tmp_path / "x.tar", samples(10)), "x.tar")

    def start(data: str, out: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command("train", "small.yaml", "--data", data, "--out", out),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(process: subprocess.Popen[str]) -> str:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed[-2000:]
        return printed

    finish(start("x.tar", "here"))
    killed = start("s3://photos/x.tar", "there")
    while last_step(tmp_path / "there") < 0.4 * STEPS and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    printed, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, printed[-2000:]
    assert last_step(tmp_path / "there") < STEPS
    resumed = finish(start("s3://photos/x.tar", "there"))
    assert f"| 0/{4 * STEPS} " not in resumed, "started again from nothing"
    assert_same_run(tmp_path / "here", tmp_path / "there")
    assert "SECRETOFATEST" not in printed + resumed
    for file in (tmp_path / "there").rglob("*"):
        assert not file.is_file() or b"SECRETOFATEST" not in file.read_bytes()
