"""Sources: folders, lists and patterns of image files, the bundled photos, WebDataset shards."""

import functools
import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.object_stores import jpeg, samples, write_tar
from hieratok.data import ranges
from hieratok.data import shards as shards_module
from hieratok.data.images import BadImageError, BundledPhotos, ImageFiles, PackedImages, open_source
from hieratok.data.ranges import LocalFile


def shade(image: torch.Tensor) -> int:
    return round(image.float().mean().item())


def write(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(shade))


# --- folders and files


def test_folder_with_classes(tmp_path):
    write(tmp_path / "dog" / "b.jpg", 10)
    write(tmp_path / "cat" / "deep" / "er" / "a.JPEG", 20)
    write(tmp_path / "cat" / "c.Png", 30)
    write(tmp_path / "loose.jpg", 40)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    write(tmp_path / "cat" / "._c.jpg")
    write(tmp_path / ".thumbnails" / "c.jpg")
    (tmp_path / "empty").mkdir()
    source = open_source(str(tmp_path))
    assert isinstance(source, ImageFiles)
    assert source.classes == ["cat", "dog"]
    read = {source.name(i): (source.label(i), shade(source.image(i))) for i in range(len(source))}
    assert read == {"cat/c.Png": (0, 30), "cat/deep/er/a.JPEG": (0, 20), "dog/b.jpg": (1, 10), "loose.jpg": (-1, 40)}


def test_flat_folder_has_no_classes(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.jpg", i)
    source = open_source(str(tmp_path))
    assert [source.label(i) for i in range(3)] == [-1, -1, -1]
    assert [source.name(i) for i in range(3)] == ["0.jpg", "1.jpg", "2.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "store" / "1.jpg")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat").symlink_to(tmp_path / "store")
    (photos / "all").symlink_to(photos)
    (tmp_path / "store" / "up").symlink_to(tmp_path)
    source = open_source(str(photos))
    assert [source.name(i) for i in range(len(source))] == ["cat/1.jpg"]


def test_file_list_and_pattern(tmp_path, monkeypatch):
    write(tmp_path / "a" / "1.jpg", 1)
    write(tmp_path / "b" / "1.jpg", 2)
    (tmp_path / "b" / "read.me").write_text("no image")
    one = open_source(str(tmp_path / "a" / "1.jpg"))
    assert (len(one), one.name(0), one.label(0), shade(one.image(0))) == (1, "1.jpg", -1, 1)
    for path in (f"{tmp_path}/?/1.jpg", f"{tmp_path}/**/*", [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b/*"]):
        source = open_source(path)
        assert {source.name(i): shade(source.image(i)) for i in range(len(source))} == {"a/1.jpg": 1, "b/1.jpg": 2}
    folders = open_source([str(tmp_path / "b"), str(tmp_path / "a")])
    assert [folders.name(i) for i in range(2)] == ["b/1.jpg", "a/1.jpg"]
    monkeypatch.chdir(tmp_path / "a")
    relative = open_source(["1.jpg", "../b/1.jpg"])
    assert [relative.name(i) for i in range(2)] == ["a/1.jpg", "b/1.jpg"]  # names never lead out of an output folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("~/a")) == 1


def test_file_name_with_brackets_is_not_a_pattern(tmp_path):
    write(tmp_path / "holiday [2024].jpg", 5)
    assert shade(open_source(str(tmp_path / "holiday [2024].jpg")).image(0)) == 5


def test_names_in_any_encoding(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")  # Latin-1: no valid UTF-8
    write(tmp_path / name, 9)
    source = open_source(str(tmp_path))
    assert source.name(0) == name
    assert shade(source.image(0)) == 9


def refusal(path, error=ValueError) -> str:
    with pytest.raises(error) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_paths_offer_the_nearest_name(tmp_path):
    write(tmp_path / "photos" / "cats" / "1.jpg")
    message = refusal(str(tmp_path / "photo" / "cats"), FileNotFoundError)
    assert message == f"no such file or folder: {tmp_path}/photo/cats (did you mean {tmp_path}/photos?)"
    assert f"did you mean {tmp_path}/photos/cats?" in refusal(str(tmp_path / "photos" / "cat"), FileNotFoundError)
    assert "did you mean" not in refusal(str(tmp_path / "zzz"), FileNotFoundError)
    assert "did you mean bundled?" in refusal("bundeld", FileNotFoundError)
    assert refusal(f"{tmp_path}/*.bmp", FileNotFoundError) == f"nothing matches {tmp_path}/*.bmp"


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert f"no images found in {tmp_path} (looked for .jpg" in refusal(str(tmp_path))
    assert "no images found" in refusal([str(tmp_path), str(tmp_path)])
    assert "no images or shards match" in refusal(f"{tmp_path}/*", FileNotFoundError)
    assert "notes.txt is not named like an image" in refusal(str(tmp_path / "notes.txt"))
    assert "no image" in refusal([])


def test_the_same_file_twice_is_refused(tmp_path):
    write(tmp_path / "1.jpg")
    assert refusal([f"{tmp_path}/1.jpg", f"{tmp_path}/../{tmp_path.name}/1.jpg"]) == f"{tmp_path}/1.jpg is listed twice"
    write_tar(tmp_path / "1.tar", samples(1))
    assert refusal([f"{tmp_path}/1.tar"] * 2) == f"{tmp_path}/1.tar is listed twice"


def test_folder_that_holds_training_and_validation_images_is_refused(tmp_path):
    write(tmp_path / "train" / "cat" / "1.jpg")
    assert len(open_source(str(tmp_path))) == 1
    write(tmp_path / "val" / "cat" / "1.jpg")
    message = refusal(str(tmp_path))
    assert f"choose one of {tmp_path}/train, {tmp_path}/val" in message
    assert len(open_source(str(tmp_path / "val"))) == 1


def test_folder_that_holds_several_sets_of_shards_is_refused(tmp_path):
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        write_tar(tmp_path / name, samples(2))
    message = refusal(str(tmp_path))
    assert f"choose one of '{tmp_path}/train-*.tar', '{tmp_path}/val-*.tar', '{tmp_path}/*.tar'" in message
    assert len(open_source(f"{tmp_path}/train-*.tar")) == 4
    assert len(open_source(f"{tmp_path}/*.tar")) == 6
    (tmp_path / "val-000000.tar").unlink()
    assert len(open_source(str(tmp_path))) == 4


def test_shards_and_images_are_not_mixed(tmp_path):
    write_tar(tmp_path / "0.tar", samples(1))
    write(tmp_path / "1.jpg")
    assert "holds both shards (0.tar) and images (1.jpg)" in refusal(str(tmp_path))
    assert "give only one kind" in refusal([str(tmp_path / "0.tar"), str(tmp_path / "1.jpg")])


def test_bad_files_are_named_when_read(tmp_path):
    write(tmp_path / "gone.jpg")
    (tmp_path / "half.jpg").write_bytes(jpeg(3, 200)[:-200])
    (tmp_path / "text.png").write_text("hello")
    source = open_source(str(tmp_path))
    (tmp_path / "gone.jpg").unlink()
    for i, name in enumerate(("gone.jpg", "half.jpg", "text.png")):
        with pytest.raises(BadImageError, match=f"^cannot read {tmp_path}/{name}: "):
            source.image(i)


def test_unreadable_folder_is_an_error_and_not_left_out(tmp_path):
    write(tmp_path / "a" / "1.jpg")
    write(tmp_path / "b" / "1.jpg")
    (tmp_path / "b").chmod(0)
    try:
        if os.access(tmp_path / "b", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(PermissionError):
            open_source(str(tmp_path))
    finally:
        (tmp_path / "b").chmod(0o700)


# --- bundled photos


def bundled_photos() -> dict[str, np.ndarray]:
    """The same photos through the packages that ship them."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    return {
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "hubble_deep_field": data.hubble_deep_field(),
        "ihc": data.immunohistochemistry(),
        "motorcycle_left": data.stereo_motorcycle()[0],
        "retina": data.retina(),
        "rocket": data.rocket(),
        "china": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }


def test_bundled_photos_are_the_left_of_the_packages_own():
    source = open_source("bundled")
    assert isinstance(source, BundledPhotos)
    photos = {source.name(i): source.image(i).permute(1, 2, 0).numpy() for i in range(len(source))}
    expected = bundled_photos()
    assert photos.keys() == expected.keys()
    for name, photo in expected.items():
        np.testing.assert_array_equal(photos[name], photo[:, : photo.shape[1] * 3 // 4], err_msg=name)
    assert {source.label(i) for i in range(10)} == {-1}


def test_bundled_held_out_tiles_come_from_the_right_and_do_not_overlap():
    source = open_source("bundled:val")
    names = [source.name(i) for i in range(len(source))]
    expected = bundled_photos()
    assert names == [f"{name}-{i}" for name in expected for i in (0, 1)]
    for name, photo in expected.items():
        border = photo.shape[1] * 3 // 4
        strip = photo[:, border:]
        side = min(strip.shape[0] // 2, strip.shape[1])
        for i in (0, 1):
            tile = source.image(names.index(f"{name}-{i}")).permute(1, 2, 0).numpy()
            assert tile.shape == (side, side, 3)
            half = strip[i * (strip.shape[0] // 2) : (i + 1) * (strip.shape[0] // 2)]
            y, x = (half.shape[0] - side) // 2, (half.shape[1] - side) // 2
            np.testing.assert_array_equal(tile, half[y : y + side, x : x + side], err_msg=name)


def test_bundled_whole_photos_are_the_files():
    source = open_source("bundled:whole")
    expected = bundled_photos()
    assert [source.name(i) for i in range(len(source))] == list(expected)
    for i, photo in enumerate(expected.values()):
        np.testing.assert_array_equal(source.image(i).permute(1, 2, 0).numpy(), photo)


def test_bundled_photos_refuse_other_splits():
    assert "train, val and whole, not 'test'" in refusal("bundled:test")


# --- shards


def reference_index(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> offset, size of the regular files, by Python's own reader."""
    with tarfile.open(path) as tar:
        return {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}


def our_index(path: Path) -> dict[str, tuple[int, int]]:
    file = LocalFile(str(path))
    return {m.name: (m.offset, m.size) for m in shards_module._members(file, str(path)) if m.kind == "file"}


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FORMATS),
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"], include_characters="._-é/"), min_size=1, max_size=90)
        .map(lambda s: s.strip("/."))
        .filter(lambda s: s and "//" not in s),
        st.integers(0, 3000),
        max_size=12,
    ),
)
def test_index_is_what_tarfile_finds(tmp_path, format, sizes):
    path = tmp_path / "x.tar"
    try:
        write_tar(path, [(name, bytes(size)) for name, size in sizes.items()], format)
    except ValueError:  # a name too long for this dialect
        return
    assert our_index(path) == reference_index(path)


@pytest.mark.parametrize("format", FORMATS)
def test_long_names_links_and_folders(tmp_path, format):
    path = tmp_path / "x.tar"
    long = "folder/" * 12 + "a" * 90 + ".jpg"  # fits ustar's prefix; the others need an extended header
    longer = "b" * 300 + ".jpg"
    with tarfile.open(path, "w", format=format) as tar:
        names = [long, "short.jpg"] + ([] if format == tarfile.USTAR_FORMAT else [longer, "ünï.jpg"])
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 1000 + i
            tar.addfile(info, io.BytesIO(bytes(info.size)))
            for kind, suffix in (
                (tarfile.SYMTYPE, "s"),
                (tarfile.LNKTYPE, "l"),
                (tarfile.FIFOTYPE, "f"),
                (tarfile.DIRTYPE, "d"),
            ):
                other = tarfile.TarInfo(f"{i}{suffix}.jpg")
                other.type, other.linkname, other.size = kind, "/etc/passwd", 5000  # none of which follows
                tar.addfile(other)
    found = our_index(path)
    assert list(found) == names
    assert found == reference_index(path)


def test_sizes_in_binary_and_in_pax_records(tmp_path):
    """Members beyond 8 GiB, without writing them: sparse files of the right length."""
    size = 9 << 30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        info = tarfile.TarInfo("big.jpg")
        info.size = size
        header = info.tobuf(format)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size + 1024)
        assert our_index(path) == {"big.jpg": (len(header), size)} == reference_index(path)
        source = PackedImages([str(path)])
        with pytest.raises(BadImageError, match="more than an image should have"):
            source.image(0)


def test_samples_are_grouped_by_key_and_labelled(tmp_path):
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("./b/0001.cls", b" 12\n"),
            ("./b/0001.JPG", jpeg(1)),
            ("b/0002.png", jpeg(2)),
            ("b/0002.txt", b"1984"),  # a caption is no class
            ("b/0002.seg.png", jpeg(99)),  # WebDataset's key ends at the first dot: another field of 0002
            ("0003.json", b"{}"),
            ("c/0001.webp", jpeg(3)),
            ("b/.hidden.jpg", jpeg(99)),
            ("0004.jpg", jpeg(4)),
            ("0004.cls", b"0"),
        ],
    )
    source = PackedImages([str(path)])
    read = {source.name(i): (source.label(i), shade(source.image(i))) for i in range(len(source))}
    assert read == {
        "s.tar/b/0001.JPG": (12, 1),
        "s.tar/b/0002.png": (-1, 2),
        "s.tar/c/0001.webp": (-1, 3),
        "s.tar/0004.jpg": (0, 4),
    }


def test_names_are_unique_over_shards(tmp_path):
    for name in ("a/0.tar", "b/0.tar"):
        write_tar(tmp_path / name, samples(2))
    source = open_source(f"{tmp_path}/*/0.tar")
    assert [source.name(i) for i in range(4)] == [f"{s}/0.tar/0000{i}.jpg" for s in "ab" for i in range(2)]


def test_damaged_shards_are_named(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(4)).read_bytes()
    end = max(offset + size for offset, size in our_index(tmp_path / "whole.tar").values())
    for cut in (0, 100, 512, 700, 5000, end - 1, -(-end // 512) * 512):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        assert refusal(str(tmp_path / "cut.tar")).startswith(f"{tmp_path}/cut.tar is truncated")
    flipped = bytearray(whole)
    second = our_index(tmp_path / "whole.tar")["00001.jpg"][0] - 512
    flipped[second + 3] ^= 1  # in the second sample's name
    (tmp_path / "flipped.tar").write_bytes(flipped)
    assert refusal(str(tmp_path / "flipped.tar")) == f"{tmp_path}/flipped.tar is damaged at byte {second}"
    (tmp_path / "text.tar").write_text("no archive at all\n" * 100)
    assert "text.tar is not an (uncompressed) tar file" in refusal(str(tmp_path / "text.tar"))
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.add(tmp_path / "whole.tar")
    assert "not an (uncompressed) tar file" in refusal(str(tmp_path / "zipped.tar"))
    write_tar(tmp_path / "empty.tar", [])
    assert refusal(str(tmp_path / "empty.tar")) == f"no images in {tmp_path}/empty.tar"


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_headers_end_in_an_error_or_in_bounds(tmp_path, draw):
    """Whatever a header says, with a checksum that fits, the scan ends and finds nothing outside the file."""
    data = bytearray(write_tar(tmp_path / "w.tar", samples(2), draw.draw(st.sampled_from(FORMATS))).read_bytes())
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.sampled_from([*range(100, 136), *range(148, 160), 257, 345, 512 * 2 + 130])) % len(data)] = (
            draw.draw(st.sampled_from(b"\x00\x80\xff -01257xLgSZ"))
        )
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path = tmp_path / "h.tar"
    path.write_bytes(data)
    try:
        found = our_index(path)
    except ValueError:
        return
    assert all(0 <= offset <= offset + size <= len(data) for offset, size in found.values())


@given(st.binary(min_size=512, max_size=512), st.integers(0, 511), st.integers(1, 255))
def test_checksum(header, place, change):
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert shards_module._checksum_fits(bytes(header))
    header[place] ^= change
    if not 148 <= place < 156:
        assert not shards_module._checksum_fits(bytes(header))


def test_negative_sizes_do_not_send_the_scan_backwards(tmp_path):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "n.tar").write_bytes(bytes(header) + bytes(10240))
    assert "n.tar is damaged at byte 0" in refusal(str(tmp_path / "n.tar"))
    pax = tarfile.TarInfo("a.jpg")
    pax.pax_headers = {"size": "-512"}
    (tmp_path / "p.tar").write_bytes(pax.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    assert "p.tar is damaged" in refusal(str(tmp_path / "p.tar"))


def test_names_that_lead_outside_are_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("../../etc/0.jpg", jpeg(0))])
    assert "leads outside the archive" in refusal(str(path))
    path = write_tar(tmp_path / "y.tar", [("/etc/0.jpg", jpeg(0))])
    assert open_source(str(path)).name(0) == "y.tar/etc/0.jpg"


def test_members_of_one_name_are_refused(tmp_path):
    for twice in ("0.jpg", "0.cls"):
        path = write_tar(tmp_path / "x.tar", [("0.jpg", jpeg(0)), ("0.cls", b"1"), (twice, b"2")])
        assert refusal(str(path)) == f"{path} has two members named {twice}"
    for text in (b"tench", b"", b"-3", b"1.5", b"9" * 30):
        path = write_tar(tmp_path / "x.tar", [("0.jpg", jpeg(0)), ("0.cls", text)])
        assert "x.tar/0.cls is not a class index" in refusal(str(path))


def test_bad_images_in_shards_are_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", jpeg(3, 200)[:-200]), ("1.jpg", b"")])
    source = PackedImages([str(path)])
    for i in range(2):
        with pytest.raises(BadImageError, match=f"^cannot read {path}/{i}.jpg: "):
            source.image(i)


def test_shard_changed_or_removed_after_indexing(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples(2))
    source = PackedImages([str(path)])
    path.write_bytes(bytes(path.stat().st_size + 512))
    with pytest.raises(BadImageError, match=r"x\.tar was changed since it was indexed"):
        source.image(0)
    path.unlink()
    with pytest.raises(BadImageError, match=r"^cannot read .*x\.tar/00000\.jpg: .* does not exist"):
        source.image(0)


def test_missing_shard(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.tar does not exist"):
        PackedImages([str(tmp_path / "x.tar")])
    with pytest.raises(ValueError, match="no shards given"):
        PackedImages([])


def shades(source, count: int) -> list[int]:
    return [shade(source.image(i)) for i in range(count)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_open_files_are_few(tmp_path):
    for i in range(300):
        write_tar(tmp_path / f"{i:03d}.tar", [("0.jpg", jpeg(7))])

    def open_shards() -> int:
        targets = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        return sum(target.startswith(str(tmp_path)) for target in targets)

    source = open_source(str(tmp_path))
    assert open_shards() == 0
    assert shades(source, 300) == [7] * 300
    assert 0 < open_shards() <= 256


def test_threads_may_read_while_files_are_closed_and_opened(tmp_path, monkeypatch):
    tiny_cache = functools.lru_cache(3)(ranges._open_version.__wrapped__)
    monkeypatch.setattr(ranges, "_open_version", tiny_cache)
    for i in range(12):
        write_tar(tmp_path / f"{i:03d}.tar", samples(3, first=3 * i))
    source = open_source(str(tmp_path))
    order = np.random.default_rng(0).permutation(np.repeat(range(36), 20))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: shade(source.image(i)), order)) == order.tolist()


def test_source_may_be_sent_to_another_process(tmp_path):
    source = open_source(str(write_tar(tmp_path / "0.tar", samples(5))))
    assert shades(source, 5) == list(range(5))
    assert shades(pickle.loads(pickle.dumps(source)), 5) == list(range(5))


def test_index_of_a_million_images_is_small(tmp_path):
    source = PackedImages([str(write_tar(tmp_path / "x.tar", samples(250)))])
    assert len(pickle.dumps(source)) < 250 * 64


def test_real_shards(shared):
    folder = shared / "data" / "imagenette128"
    for split, count in (("train", 9469), ("val", 3425)):
        source = open_source(f"{folder}/{split}-*.tar")
        assert len(source) == count
        assert len({source.name(i) for i in range(count)}) == count
        assert {source.label(i) for i in range(count)} == set(range(10))
        for path in source.paths[:2]:
            with tarfile.open(path) as tar:
                for key in [m.name.removesuffix(".jpg") for m in tar if m.name.endswith(".jpg")][::200]:
                    i = next(i for i in range(count) if source.name(i) == f"{os.path.basename(path)}/{key}.jpg")
                    assert source.label(i) == int(tar.extractfile(f"{key}.cls").read())
                    expected = np.array(Image.open(tar.extractfile(f"{key}.jpg")).convert("RGB"))
                    np.testing.assert_array_equal(source.image(i).permute(1, 2, 0).numpy(), expected)
    sample = open_source(str(shared / "data" / "imagenet256-sample"))
    assert len(sample) == 800
    assert len({sample.label(i) for i in range(800)}) == 800
    assert {tuple(sample.image(i).shape) for i in range(0, 800, 40)} == {(3, 256, 256)}
    assert "choose one of" in refusal(str(folder))


# --- nothing is left out silently


def said(caplog) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


def names_of(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_suffixes_and_what_has_none(tmp_path, caplog):
    for name in ("a.jfif", "b.jpe", "c.JPG", "no suffix", "d.jpeg", "._d.jpg"):
        write(tmp_path / name)
    for name in ("e.HEIC", "f.heic", "g.txt", "Makefile", "h.x" + "y" * 20):
        (tmp_path / name).write_text("no image")
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "i.ppm")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    source = open_source(str(tmp_path))
    assert names_of(source) == ["a.jfif", "b.jpe", "c.JPG", "d.jpeg", "i.ppm", "no suffix"]
    assert source.image(4)[:, 0, 0].tolist() == [1, 2, 3]
    counted = dict.fromkeys([".txt", "no suffix", "long suffixes", "broken links", "special files"], 1)
    for kind, count in {**counted, ".heic": 2, "hidden files": 1}.items():
        assert f"{kind} ({count})" in said(caplog)
    assert ".heic: convert them to JPEG" in said(caplog)
    open_source(str(tmp_path))
    assert len(caplog.records) == 1  # said once
    assert "is not named like an image: .heic" in refusal(str(tmp_path / "e.HEIC"))
    assert "it matches .heic (1)" in refusal(f"{tmp_path}/*.heic", FileNotFoundError)
    assert names_of(open_source(str(tmp_path / "no suffix"))) == ["no suffix"]


def test_a_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "a.heic").write_text("no image")
    assert "; it has .heic (1); .heic: convert them to JPEG" in refusal(str(tmp_path))


def test_folders_linked_to_each_other_are_read_once(tmp_path, caplog):
    write(tmp_path / "a" / "x.jpg")
    write(tmp_path / "b" / "y.jpg")
    (tmp_path / "a" / "l").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "l").symlink_to(tmp_path / "a")
    assert names_of(open_source(str(tmp_path))) == ["a/x.jpg", "b/y.jpg"]
    assert "links to folders that are read anyway (2)" in said(caplog)


def test_of_several_links_to_a_folder_the_first_is_read(tmp_path):
    write(tmp_path / "store" / "1.jpg")
    (tmp_path / "photos").mkdir()
    for name in ("c", "a", "b"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "store")
    assert names_of(open_source(str(tmp_path / "photos"))) == ["a/1.jpg"]


def test_dots_in_names_of_members(tmp_path, caplog):
    members = [("IMG_2020.01.05.jpg", jpeg(1)), ("IMG_2020.01.05.cls", b"7"), ("v1.2.final.png", jpeg(2))]
    members += [("plain.jpg", jpeg(3)), ("0.input.jpg", jpeg(4)), ("0.target.jpg", jpeg(5)), ("0.cls", b"3")]
    source = PackedImages([str(write_tar(tmp_path / "x.tar", members))])
    read = {source.name(i): (source.label(i), shade(source.image(i))) for i in range(len(source))}
    assert read == {
        "x.tar/IMG_2020.01.05.jpg": (7, 1),
        "x.tar/v1.2.final.png": (-1, 2),
        "x.tar/plain.jpg": (-1, 3),
        "x.tar/0.input.jpg": (3, 4),
        "x.tar/0.target.jpg": (3, 5),
    }
    assert said(caplog) == ""


def test_members_that_are_left_out_are_counted(tmp_path, caplog):
    members = [("0.jpg", jpeg(0)), ("0.seg.png", jpeg(9)), ("0.json", b"{}"), ("1.heic", b"x"), ("read me", b"x")]
    members += [("2.jpg", jpeg(2)), ("2.png", jpeg(2))]
    source = PackedImages([str(write_tar(tmp_path / "x.tar", members))])
    assert names_of(source) == ["x.tar/0.jpg", "x.tar/2.jpg", "x.tar/2.png"]
    for kind in (".seg.png", ".json", ".heic", "no suffix"):
        assert f"{kind} (1)" in said(caplog)


def test_links_in_archives_count_as_what_they_lead_to(tmp_path, caplog):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        links = [("a/early.jpg", tarfile.SYMTYPE, "../b/1.jpg"), ("b/1.jpg", None, ""), ("hard.jpg", b"1", "b/1.jpg")]
        links += [("gone.jpg", tarfile.SYMTYPE, "nowhere.jpg"), ("out.jpg", tarfile.SYMTYPE, "/etc/passwd")]
        links += [("self.jpg", tarfile.SYMTYPE, "self.jpg"), ("pipe.jpg", tarfile.FIFOTYPE, "")]
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            data = b"" if kind else jpeg(5)
            info.type, info.linkname, info.size = kind or tarfile.REGTYPE, target, len(data)
            tar.addfile(info, io.BytesIO(data))
    source = PackedImages([str(path)])
    assert names_of(source) == ["x.tar/a/early.jpg", "x.tar/b/1.jpg", "x.tar/hard.jpg"]
    assert {shade(source.image(i)) for i in range(len(source))} == {5}
    assert "broken links (3)" in said(caplog)
    assert "special files (1)" in said(caplog)


def sparse_header(name: str, stored: int, more: bool) -> bytes:
    """An old GNU sparse member's header, as `tar -S` writes it."""
    info = tarfile.TarInfo(name)
    info.size = stored
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[482] = more
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_sparse_members_are_counted_and_what_follows_is_read(tmp_path, caplog, blocks):
    path = write_tar(tmp_path / "x.tar", [("after.jpg", jpeg(6))])
    more = b"".join(bytes(504) + bytes([i < blocks - 1]) + bytes(7) for i in range(blocks))
    path.write_bytes(sparse_header("sparse.jpg", 600, blocks > 0) + more + bytes(1024) + path.read_bytes())
    source = PackedImages([str(path)])
    assert names_of(source) == ["x.tar/after.jpg"]
    assert shade(source.image(0)) == 6
    assert "sparse files (1)" in said(caplog)


def test_sparse_members_of_pax_are_counted(tmp_path, caplog):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (
            ("GNUSparseFile.0/a.jpg", {"GNU.sparse.major": "1", "GNU.sparse.name": "a.jpg"}),
            ("b.jpg", {}),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(jpeg(7)), headers
            tar.addfile(info, io.BytesIO(jpeg(7)))
    assert names_of(PackedImages([str(path)])) == ["x.tar/b.jpg"]
    assert "sparse files (1)" in said(caplog)


def test_webdatasets_notation_for_several_shards(tmp_path):
    for i in range(12):
        write_tar(tmp_path / f"train-{i:06}.tar", samples(1, first=i))
    write_tar(tmp_path / "val-a.tar", samples(1))
    assert len(open_source(f"{tmp_path}/train-{{000000..000011}}.tar")) == 12
    assert len(open_source(f"{tmp_path}/train-{{000009..000011}}.tar")) == 3
    assert len(open_source(f"{tmp_path}/{{train-000003,val-a}}.tar")) == 2
    assert len(open_source(f"{tmp_path}/train-00000{{0..1}}{{0,1}}.tar"[: -len("{0,1}.tar")] + ".tar")) == 2
    assert len(open_source(f"{tmp_path}/train-0000{{00..11}}.tar")) == 12
    assert "train-000012.tar" in refusal(f"{tmp_path}/train-{{000000..000012}}.tar", FileNotFoundError)
    assert "100,000 are the limit" in refusal(f"{tmp_path}/train-{{0..999999999999}}.tar")
    write(tmp_path / "odd {1..2}.jpg")
    assert names_of(open_source(f"{tmp_path}/odd {{1..2}}.jpg")) == ["odd {1..2}.jpg"]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst", ".TAR.XZ"])
def test_compressed_shards_are_refused_with_the_reason(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"\x1f\x8b")
    for data in (path, tmp_path, f"{tmp_path}/*"):
        assert "is a compressed archive" in refusal(str(data))


def test_a_slash_at_the_end_is_the_same_data(tmp_path):
    from hieratok.training.config import DataConfig

    assert DataConfig(path="photos/", val_path="val//") == DataConfig(path="photos", val_path="val")
    assert DataConfig(path="/") == DataConfig(path="/")
