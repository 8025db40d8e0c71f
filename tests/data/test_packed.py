"""Zips, and Arrow and Parquet files, beside the libraries that write them."""

import json
import os
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.object_stores import jpeg, write_zip
from hieratok.data import zips as zips_module
from hieratok.data.images import BadImageError, open_source
from hieratok.data.ranges import LocalFile


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(path, error=ValueError) -> str:
    with pytest.raises(error) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shades(source) -> list[int]:
    return [round(source.image(i).float().mean().item()) for i in range(len(source))]


def labels(source) -> list[int]:
    return [source.label(i) for i in range(len(source))]


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


# --- Zips -------------------------------------------------------------------------------------------------------------

PHOTOS = [("p/dog/2.jpg", jpeg(2)), ("p/cat/1.JPG", jpeg(1)), ("p/cat/notes.txt", b"x"), ("p/.hidden.jpg", b"")]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_the_folder_that_it_was_made_from(tmp_path, method, caplog):
    path = write_zip(tmp_path / "x.zip", [*PHOTOS, ("__MACOSX/p/dog/._2.jpg", b"x")], method)
    source = open_source(str(path))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "out")
    folder = open_source(str(tmp_path / "out" / "p"))
    assert names(source) == [f"x.zip/p/{name}" for name in names(folder)]
    assert labels(source) == labels(folder) == [0, 1]
    assert shades(source) == shades(folder) == [1, 2]
    assert "hidden files (1)" in caplog.text
    assert ".txt (1)" in caplog.text


def test_classes_of_several_zips_are_common(tmp_path):
    write_zip(tmp_path / "a.zip", [("dog/1.jpg", jpeg(1)), ("cat/1.jpg", jpeg(2))])
    write_zip(tmp_path / "b.zip", [("cat/1.jpg", jpeg(3)), ("ant/1.jpg", jpeg(4)), ("loose.jpg", jpeg(5))])
    source = open_source(f"{tmp_path}/*.zip")
    assert names(source) == [
        "a.zip/cat/1.jpg",
        "a.zip/dog/1.jpg",
        "b.zip/ant/1.jpg",
        "b.zip/cat/1.jpg",
        "b.zip/loose.jpg",
    ]
    assert labels(source) == [1, 2, 0, 1, -1]


def test_one_folder_or_none_has_no_classes(tmp_path):
    assert (
        labels(open_source(str(write_zip(tmp_path / "a.zip", [("a/b/1.jpg", jpeg(1)), ("a/b/2.jpg", jpeg(2))]))))
        == [-1] * 2
    )
    assert labels(open_source(str(write_zip(tmp_path / "b.zip", [("1.jpg", jpeg(1))])))) == [-1]


def test_training_and_held_out_images_in_one_zip_are_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", [("d/train/1.jpg", jpeg(1)), ("d/val/1.jpg", jpeg(1))])
    assert refusal(str(path)) == f"{path} holds several sets (train, val): make a zip of each"


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"], include_characters="-_ é/"), min_size=1, max_size=40)
        .map(lambda s: s.strip("/ "))
        .filter(lambda s: s and "//" not in s),
        st.tuples(st.binary(max_size=2000), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])),
    ),
    st.binary(max_size=50),
    st.binary(max_size=50),
)
def test_index_and_content_are_what_zipfile_finds(tmp_path, members, before, comment):
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        file.write(before)  # as of a zip that unpacks itself
        with zipfile.ZipFile(file, "a") as archive:
            for name, (data, method) in members.items():
                archive.writestr(name + ".png", data, method)
            archive.comment = comment
    file = LocalFile(str(path))
    index = zips_module.index_zip(file, str(path))
    found = {}
    for name, offset, size in zip(index.names, index.offsets, index.sizes):
        found[name.decode()] = zips_module.read_member(file, int(offset), int(size), len(name))
    expected = {name + ".png": data for name, (data, _) in members.items() if not name.split("/")[-1].startswith(".")}
    assert found == expected


def test_large_zips_tell_their_places_in_64_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = write_zip(tmp_path / "x.zip", [(f"{i}.jpg", jpeg(i)) for i in range(3)])
    assert b"PK\6\6" in path.read_bytes()
    assert shades(open_source(str(path))) == [0, 1, 2]


def test_members_with_a_long_field_of_their_own_are_read(tmp_path):
    path = tmp_path / "x.zip"
    info = zipfile.ZipInfo("1.jpg")
    info.extra = struct.pack("<2H", 0xCAFE, 3000) + bytes(3000)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, jpeg(9))
    assert shades(open_source(str(path))) == [9]


def spoilt(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    at = data.rfind(old)
    path.write_bytes(data[:at] + new + data[at + len(old) :])
    return path


def test_damaged_zips_are_refused_when_opened(tmp_path):
    def sound() -> Path:
        return write_zip(tmp_path / "x.zip", PHOTOS)

    whole = sound().read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "x.zip").write_bytes(whole[:cut])
        assert "x.zip" in refusal(str(tmp_path / "x.zip"))
    assert "damaged" in refusal(str(spoilt(sound(), b"PK\1\2", b"PK\1\3")))
    assert "split zip" in refusal(str(spoilt(sound(), b"PK\5\6\0\0", b"PK\5\6\1\0")))
    twice = write_zip(tmp_path / "y.zip", [("p/cat/1.JPG", b""), ("p/cat/2.JPG", b"")])
    assert "two members named p/cat/1.JPG" in refusal(str(spoilt(twice, b"p/cat/2.JPG", b"p/cat/1.JPG")))
    assert "leads outside" in refusal(str(write_zip(tmp_path / "y.zip", [("../1.jpg", jpeg(1))])))
    message = refusal(str(write_zip(tmp_path / "y.zip", [("notes.txt", b"")])))
    assert message == f"no images in {tmp_path}/y.zip; there are .txt (1)"


def test_encrypted_members_are_counted(tmp_path):
    path = write_zip(tmp_path / "x.zip", [("1.jpg", jpeg(1))])
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert refusal(str(path)).endswith("there are encrypted files (1)")


def test_members_that_inflate_without_end_stay_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(zips_module, "MAX_IMAGE_BYTES", 1 << 20)
    path = write_zip(tmp_path / "x.zip", [("1.jpg", bytes(1 << 22))], zipfile.ZIP_DEFLATED)
    with pytest.raises(BadImageError, match=r"x\.zip/1\.jpg: more than 1,048,576 bytes"):
        open_source(str(path)).image(0)


def test_damage_within_a_member_names_it(tmp_path):
    path = write_zip(tmp_path / "x.zip", [("1.jpg", jpeg(1))], zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[45:60] = b"\xff" * 15
    path.write_bytes(data)
    with pytest.raises(BadImageError, match=r"^cannot read .*x\.zip/1\.jpg: the archive is damaged"):
        open_source(str(path)).image(0)


def test_a_zip_beside_images_is_left_out_and_kinds_are_not_mixed(tmp_path, caplog):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    write_zip(tmp_path / "x.zip", PHOTOS)
    assert names(open_source(str(tmp_path))) == ["1.jpg"]
    assert ".zip (1)" in caplog.text
    assert "give only one kind" in refusal([f"{tmp_path}/1.jpg", f"{tmp_path}/x.zip"])
    (tmp_path / "x.tar").write_bytes(bytes(1024))
    assert "are of different kinds" in refusal([f"{tmp_path}/x.tar", f"{tmp_path}/x.zip"])


# --- Arrow and Parquet ------------------------------------------------------------------------------------------------


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8))


def dataset(count: int = 7, first: int = 0):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [picture(first + i) for i in range(count)], "label": [i % 3 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


def check_rows(source, expected) -> None:
    """The pixels and labels are what `datasets` itself gives."""
    assert len(source) == len(expected)
    for i, row in enumerate(expected):
        theirs = torch.from_numpy(np.array(row["image"].convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(source.image(i), theirs)
        assert source.label(i) == row["label"]


def test_a_folder_from_save_to_disk(tmp_path):
    data = dataset()
    data.save_to_disk(tmp_path / "d", num_shards=3)
    source = open_source(str(tmp_path / "d"))
    check_rows(source, data)
    assert names(source)[:4] == [f"data-0000{a}-of-00003.arrow/0000000{b}" for a, b in ((0, 0), (0, 1), (0, 2), (1, 0))]


def test_rows_that_were_chosen_and_shuffled(tmp_path):
    data = dataset().shuffle(seed=1).select(range(2, 6))
    data.save_to_disk(tmp_path / "d")
    check_rows(open_source(str(tmp_path / "d")), data)


def test_a_folder_of_several_sets_offers_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": dataset(), "test": dataset(2, first=50)}).save_to_disk(tmp_path / "d")
    assert refusal(str(tmp_path / "d")) == (
        f"{tmp_path}/d holds several sets: choose one of {tmp_path}/d/train, {tmp_path}/d/test"
    )
    check_rows(open_source(str(tmp_path / "d" / "test")), dataset(2, first=50))


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet(tmp_path, cache, compression):
    data = dataset()
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(data.data.table, tmp_path / "x.parquet", compression=compression, row_group_size=2)
    source = open_source(str(tmp_path / "x.parquet"))
    check_rows(source, data)
    assert source.name(3) == "x.parquet/00000003"
    (unpacked,) = cache.glob("parquet/*.arrow")
    before = unpacked.stat().st_ino
    check_rows(open_source(str(tmp_path / "x.parquet")), data)
    assert unpacked.stat().st_ino == before, "unpacked again"
    dataset(3, first=9).to_parquet(tmp_path / "x.parquet")
    check_rows(open_source(str(tmp_path / "x.parquet")), dataset(3, first=9))


def test_a_folder_of_parquet_is_one_set(tmp_path):
    for i in range(2):
        dataset(3, first=3 * i).to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
    assert len(open_source(str(tmp_path))) == 6
    dataset(2).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert f"'{tmp_path}/train-*-of-*.parquet'" in refusal(str(tmp_path))


def test_only_bytes_are_read_and_never_the_path_beside_them(tmp_path, caplog):
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "secret.png").write_bytes(b"")
    picture(0).save(tmp_path / "secret.png")
    rows = [{"bytes": jpeg(5), "path": None}, {"bytes": None, "path": str(tmp_path / "secret.png")}, None]
    table = pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    source = open_source(str(tmp_path / "x.arrow"))
    assert (len(source), source.label(0), shades(source)) == (1, -1, [5])
    assert "rows without an image's bytes (2)" in caplog.text


def write_arrow(path: Path, table, **options) -> Path:
    import pyarrow as pa

    how = pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, options=how) as writer:
        writer.write_table(table)
    return path


def test_tables_that_cannot_serve_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "x.arrow"
    images = pa.array([jpeg(i) * 20 for i in range(9)])
    assert "no column of images among: text" in refusal(str(write_arrow(path, pa.table({"text": ["a"]}))))
    assert len(open_source(str(write_arrow(path, pa.table({"left": images, "jpg": images}))))) == 9
    message = refusal(str(write_arrow(path, pa.table({"image": images}), compression="zstd")))
    assert "is compressed" in message
    labels = pa.array([None, -9, 3], pa.int32())
    table = pa.table({"image": images[:3], "label": labels})
    assert [open_source(str(write_arrow(path, table))).label(i) for i in range(3)] == [-1, -1, 3]
    (tmp_path / "n.parquet").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    assert "n.parquet cannot be read as a Parquet file" in refusal(str(tmp_path / "n.parquet"))


def test_what_is_unused_for_a_month_leaves_the_cache(tmp_path, cache):
    def unpack(name: str) -> Path:
        before = set(cache.glob("parquet/*.arrow"))
        dataset(2).to_parquet(tmp_path / name)
        open_source(str(tmp_path / name))
        (new,) = set(cache.glob("parquet/*.arrow")) - before
        return new

    used, unused = unpack("used.parquet"), unpack("unused.parquet")
    halfway, foreign = cache / "index" / f"{'a' * 40}.part", cache / "parquet" / "notes.arrow"
    halfway.parent.mkdir()
    for file in (halfway, foreign):
        file.touch()
    a_month_ago = time.time() - 31 * 86_400
    for file in (used, unused, unused.with_suffix(".lock"), halfway, foreign):
        os.utime(file, (a_month_ago, a_month_ago))
    open_source(str(tmp_path / "used.parquet"))
    assert unused.exists()  # nothing was made
    unpack("new.parquet")
    assert used.exists()
    assert foreign.exists()  # not hieratok's
    assert not any(file.exists() for file in (unused, unused.with_suffix(".lock"), halfway))


def test_parquet_that_grows_out_of_proportion_is_refused(tmp_path, cache):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    one = np.random.default_rng(0).bytes(1 << 20)
    table = pa.table({"image": pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array([one]))})
    pq.write_table(table, tmp_path / "x.parquet", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 3 << 20
    assert "its images take more than 20 times its size" in refusal(str(tmp_path / "x.parquet"))
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_damaged_state_names_no_file_elsewhere(tmp_path):
    dataset(2).save_to_disk(tmp_path / "d")
    for files in ([{"filename": "../x.arrow"}], [{"filename": "/etc/passwd"}], [], None, [3], "x", [{"a": 1}]):
        (tmp_path / "d" / "state.json").write_text(json.dumps({"_data_files": files}))
        assert "state.json names no files of this folder" in refusal(str(tmp_path / "d"))
    (tmp_path / "d" / "state.json").write_text("{")
    assert "is not valid JSON" in refusal(str(tmp_path / "d"))
    (tmp_path / "d" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    assert "gone.arrow does not exist" in refusal(str(tmp_path / "d"), FileNotFoundError)
