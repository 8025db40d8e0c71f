"""Images per second and core of the data pipeline, beside plain Pillow and torchvision in the same run.

    python benchmarks/data.py                                            # photos made from the bundled ones
    python benchmarks/data.py --shards 'DIR/train-*.tar' --folder DIR    # yours

(a) 128 px shards with the centre crop, (b) a folder of JPEGs of some 500 x 375 pixels with a random-resized crop to 256
px, both with flips; (c) the index of the shards beside Python's `tarfile`; (d) the training loader with one worker for
each core. (a) to (c) use one thread; the two sides take turns, and the median of the rounds counts. (e) the loader of
(d) on the same shards in an object store: moto's server on this machine, which shares cores, or yours by `--remote`.

    python benchmarks/data.py --shards 'DIR/train-*.tar' --remote 's3://BUCKET/train-*.tar'
"""

import argparse
import contextlib
import io
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

from hieratok.data.images import ImageDataset, PackedImages, StepBatches, center_crop, open_source, training_loader

ROUNDS = 7


def make_photos(folder: Path, count: int = 200) -> None:
    """Windows of 500 x 375 pixels from the bundled photos, as JPEG files."""
    source = open_source("bundled:train")
    photos = [
        photo for photo in map(source.image, range(len(source))) if photo.shape[1] >= 375 and photo.shape[2] >= 500
    ]
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = (
            int(torch.randint(side - part + 1, (), generator=generator))
            for side, part in zip(photo.shape[1:], (375, 500))
        )
        window = photo[:, top : top + 375, left : left + 500]
        Image.fromarray(window.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.jpg", quality=90)


def make_shard(folder: str, path: Path) -> None:
    """The centres of a folder's images at 128 px, in one shard."""
    source = open_source(folder)
    with tarfile.open(path, "w") as tar:
        for i in range(len(source)):
            file = io.BytesIO()
            crop = center_crop(source.image(i), 128)
            Image.fromarray(crop.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
            for suffix, data in (("jpg", file.getvalue()), ("cls", b"0")):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def plain_shards(paths: list[str]) -> Callable[[int], torch.Tensor]:
    """Pillow and torchvision's transforms on members that `tarfile` found."""
    bicubic = v2.InterpolationMode.BICUBIC
    transform = v2.Compose([v2.Resize(128, bicubic), v2.CenterCrop(128), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    tars = [tarfile.open(path) for path in paths]  # noqa: SIM115
    members = [(tar, member) for tar in tars for member in tar if member.name.endswith(".jpg")]

    def read(index: int) -> torch.Tensor:
        tar, member = members[index % len(members)]
        file = tar.extractfile(member)
        assert file is not None
        return transform(Image.open(file).convert("RGB"))

    return read


def plain_folder(paths: list[Path]) -> Callable[[int], torch.Tensor]:
    """Pillow and torchvision's transforms on files."""
    crop = v2.RandomResizedCrop(256, (0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return lambda index: transform(Image.open(paths[index % len(paths)]).convert("RGB"))


def compare(title: str, ours: Callable[[int], object], plain: Callable[[int], object], count: int) -> None:
    """Print both rates and their ratio."""
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        for name, call in (("ours", ours), ("plain", plain)):
            start = time.perf_counter()
            for index in range(count):
                call(index)
            rates[name].append(count / (time.perf_counter() - start))
    fast, slow = statistics.median(rates["ours"]), statistics.median(rates["plain"])
    print(f"{title:44s} {fast:10.0f} /s   plain {slow:10.0f} /s   ratio {fast / slow:5.2f}")


@contextlib.contextmanager
def object_store(paths: list[str]) -> Iterator[str]:
    """Shards in a bucket of moto's server, a process of its own; yields the address."""
    import boto3
    from botocore.config import Config

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = "benchmark"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        retries = Config(retries={"total_max_attempts": 20, "mode": "standard"})
        client = boto3.client("s3", region_name="us-east-1", config=retries)
        client.create_bucket(Bucket="shards")
        for path in paths:
            client.upload_file(path, "shards", os.path.basename(path))
        yield "s3://shards/"
    finally:
        server.terminate()
        server.wait()


def loader_rate(dataset: ImageDataset, workers: int) -> float:
    """Images per second of the training loader, once it runs."""
    loader = iter(training_loader(dataset, StepBatches(len(dataset), 64, 64, 0, 40), workers))
    for _ in range(5):
        next(loader)
    start = time.perf_counter()
    return sum(len(batch["image"]) for batch in loader) / (time.perf_counter() - start)


def compare_remote(here: PackedImages, address: str, workers: int) -> None:
    """Print the first and the second opening of shards behind an address, and the loader's rate on both."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        there = open_source(address)
        seconds.append(time.perf_counter() - start)
    rates = [loader_rate(ImageDataset(source, 128, "center"), workers) for source in (there, here)]
    print(f"(e) loader on {address}, {workers} workers {rates[0]:10.0f} /s   here {rates[1]:10.0f} /s")
    print(f"    opened in {seconds[0]:.2f} s, with the index kept in {seconds[1]:.2f} s")


def main(shards: str | None, folder: str | None, remote: str | None, temporary: Path) -> None:
    """Prepare what is missing and print the table."""
    torch.set_num_threads(1)
    if folder is None:
        folder = str(temporary / "photos")
        Path(folder).mkdir()
        make_photos(Path(folder))
    if shards is None:
        shards = str(temporary / "0.tar")
        make_shard(folder, Path(shards))
    images, files = open_source(shards), open_source(folder)
    if not isinstance(images, PackedImages):
        raise SystemExit(f"{shards} are no shards")
    paths = images.paths
    file_paths = [Path(folder) / files.name(i) for i in range(len(files))]

    center = ImageDataset(images, 128, "center")
    random = ImageDataset(files, 256, "random-resized")
    compare("(a) shards, centre crop to 128", lambda i: center[i % len(center), 0], plain_shards(paths), 400)
    compare(
        "(b) files, random-resized crop to 256", lambda i: random[i % len(random), 0], plain_folder(file_paths), 100
    )

    headers = 0

    def plain_index(_: int) -> None:
        nonlocal headers
        headers = 0
        for path in paths:
            with tarfile.open(path) as tar:
                headers += len(tar.getmembers())

    compare(f"(c) indexing {len(paths)} shards", lambda _: open_source(paths), plain_index, 1)
    print(f"    {headers} headers")

    cores = len(os.sched_getaffinity(0))
    for name, dataset in (("(a)", center), ("(b)", random)):
        print(f"(d) training loader on {name}, {cores} workers {loader_rate(dataset, cores):16.0f} /s")

    os.environ["HIERATOK_CACHE"] = str(temporary / "cache")
    if remote is not None:
        compare_remote(images, remote, cores)
    else:
        with object_store(paths) as address:
            compare_remote(images, address, cores)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="tar files (a file or a pattern) of 128 px images")
    parser.add_argument("--folder", help="a folder of image files")
    parser.add_argument("--remote", help="the same shards by address")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.shards, arguments.folder, arguments.remote, Path(temporary))
