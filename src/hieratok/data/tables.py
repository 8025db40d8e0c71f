"""Images in Apache Arrow and Parquet files, as Hugging Face's `datasets` writes them.

A folder from `save_to_disk` holds Arrow files, which store each image's bytes uncompressed: with an index, reading an
image is one read. Parquet packs rows in compressed groups, so it is converted once to an Arrow file in the cache, as
`datasets` does. Only the bytes of an image are read, never a file at the path next to them.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hieratok.core.extras import needs_extras
from hieratok.core.files import check_regular, read_json_table, shown
from hieratok.core.pixels import MAX_IMAGE_BYTES
from hieratok.data.folders import LeftOut
from hieratok.data.image_index import ImageIndex, kept_file
from hieratok.data.ranges import RangeFile, Seekable, Version
from hieratok.data.remote import RemoteError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
PARQUET_ROWS = 4
"""Rows decoded at a time: few, as a small file may repeat one large image in every row."""
MAX_GROWTH = 20
"""Limit of the unpacked size, relative to the Parquet file's: images are compressed already."""
FREE_BYTES = 1 << 30
"""Bytes that stay free on the cache's disk."""


def saved_shards(folder: str) -> list[str] | None:
    """The Arrow files of a folder from `Dataset.save_to_disk`, in order; None: not such a folder.

    Raises:
        ValueError: a folder from `DatasetDict.save_to_disk`, of which the user must choose a part, or a damaged one.
    """
    splits_file = os.path.join(folder, "dataset_dict.json")
    if os.path.lexists(splits_file):
        splits = read_json_table(splits_file).get("splits")
        names = [os.path.join(folder, str(name)) for name in splits] if isinstance(splits, list) else []
        choices = f": choose one of {', '.join(map(shown, names[:8]))}" if names else ""
        raise ValueError(f"{shown(folder)} holds several sets{choices}")
    state_file = os.path.join(folder, "state.json")
    if not os.path.lexists(state_file) or not os.path.lexists(os.path.join(folder, "dataset_info.json")):
        return None
    state = read_json_table(state_file)
    if state.get("_indices_data_files"):
        raise ValueError(f"{shown(folder)} has its rows in another order than its files: save its flatten_indices()")
    files = state.get("_data_files")
    try:
        names = [file["filename"] for file in files]  # type: ignore[union-attr]
    except (TypeError, KeyError):
        names = []
    if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise ValueError(f"{shown(state_file)} names no files of this folder")
    return [os.path.join(folder, name) for name in names]


def index_arrow(file: RangeFile, path: str) -> ImageIndex:
    """The place of each row's image in an Arrow file on this machine, and its class index.

    Raises:
        ValueError: damaged, compressed, not an Arrow file, or without a column of images.
    """
    check_regular(path)
    with needs_extras():
        import pyarrow as pa
    offsets, sizes, labels = [], [], []
    left_out = LeftOut()
    row = 0
    rows: list[np.ndarray] = []
    try:
        with pa.memory_map(path) as mapped:
            content = mapped.read_buffer()
            for values, label in _batches(content, path):
                starts, lengths, has_bytes = _places(values, content, path)
                rows.append(row + np.flatnonzero(has_bytes))
                offsets.append(starts[has_bytes])
                sizes.append(lengths[has_bytes])
                labels.append(label[has_bytes])
                left_out.count("rows without an image's bytes", int((~has_bytes).sum()))
                row += len(values)
            del content
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"{shown(path)} cannot be read as an Arrow file: damaged, or of another kind") from error
    numbers = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return ImageIndex(
        path,
        file.version(),
        np.char.zfill(numbers.astype("S"), 8) if len(numbers) else np.empty(0, "S8"),
        _joined(offsets),
        _joined(sizes),
        _joined(labels),
        left_out,
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def _batches(content: Any, path: str) -> Iterator[tuple[Any, np.ndarray]]:
    """The column of images of each batch, and its labels; checked, as the file is not trusted."""
    import pyarrow as pa

    source = pa.BufferReader(content)
    is_file = content.size >= 6 and content.slice(0, 6).to_pybytes() == b"ARROW1"
    open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
    schema = open_reader(source).schema
    image, label = _columns(schema, path)
    wanted = [schema.get_field_index(name) for name in (image, label) if name is not None]
    source.seek(0)
    if is_file:  # selecting columns would copy them
        file = pa.ipc.open_file(source)
        batches = (file.get_batch(i).select(wanted) for i in range(file.num_record_batches))
    else:
        batches = pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(included_fields=wanted))
    for batch in batches:
        batch.validate(full=True)
        labels = np.full(len(batch), -1, np.int64) if label is None else _labels(batch.column(label))
        yield _bytes_of(batch.column(image)), labels


def _columns(schema: Any, path: str) -> tuple[str, str | None]:
    """Names of the columns of images and of labels, None if there is none.

    Raises:
        ValueError: no column of images, or several without a name such as `image`.
    """
    import pyarrow.types as types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_image(field: Any) -> bool:
        if not types.is_struct(field.type):
            return is_bytes(field.type) and field.name in IMAGE_COLUMNS
        at = field.type.get_field_index("bytes")
        return at >= 0 and is_bytes(field.type.field(at).type)

    fields = [schema.field(i) for i in range(len(schema))]
    images = [field.name for field in fields if is_image(field)]
    if len(images) > 1:
        images = [name for name in IMAGE_COLUMNS if name in images][:1] or images
    if len(images) != 1:
        names = ", ".join(shown(str(field.name)) for field in fields[:12])
        raise ValueError(f"{shown(path)} has {'several columns' if images else 'no column'} of images among: {names}")
    if len({field.name for field in fields}) < len(fields):
        raise ValueError(f"{shown(path)} has two columns with the same name")
    labels = [field.name for field in fields if types.is_integer(field.type)]
    return images[0], next((name for name in LABEL_COLUMNS if name in labels), None)


def _bytes_of(column: Any) -> Any:
    """The bytes of a column of images, null where missing."""
    import pyarrow.types as types

    if not types.is_struct(column.type):
        return column
    return column.flatten()[column.type.get_field_index("bytes")]


def _labels(column: Any) -> np.ndarray:
    """int64; -1 where missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = np.array(pc.fill_null(column.cast(pa.int64()), -1))
    return np.maximum(labels, -1)


def _places(values: Any, content: Any, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset and size of each value in the file, and whether it is present."""
    import pyarrow.types as types

    _, ends, data = values.buffers()
    if ends is None or not len(values):
        empty = np.zeros(len(values), np.int64)
        return empty, empty, np.zeros(len(values), bool)
    width = np.dtype("<i8" if types.is_large_binary(values.type) else "<i4")
    edges = np.frombuffer(ends, width, len(values) + 1, values.offset * width.itemsize).astype(np.int64)
    start = 0 if data is None else data.address - content.address
    if data is not None and not 0 <= start <= start + data.size <= content.size:
        raise ValueError(f"{shown(path)} is compressed, so images cannot be read in any order: save it uncompressed")
    there = ~np.asarray(values.is_null()) & (edges[1:] > edges[:-1])
    return start + edges[:-1], edges[1:] - edges[:-1], there


# --- Parquet ----------------------------------------------------------------------------------------------------------


class _DiskFull(OSError):
    """An error with a message of ours, which may be shown."""


def unpacked_parquet(file: RangeFile, path: str) -> str:
    """The Arrow file in the cache that holds the images and labels of a Parquet file.

    Raises:
        ValueError: damaged, not a Parquet file, without a column of images, or too large when unpacked.
        OSError: the cache's disk is full, or the server fails.
    """
    version = file.version()
    return str(kept_file("parquet", path, version, ".arrow", lambda to: _unpack(file, path, version, to)))


def _unpack(file: RangeFile, path: str, version: Version, to: Path) -> None:
    with needs_extras():
        import pyarrow as pa
    schema = pa.schema([("image", pa.large_binary()), ("label", pa.int64())])
    total, limit = 0, MAX_GROWTH * version.size
    try:
        with pa.OSFile(str(to), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for values, labels in _parquet_batches(file, path):
                total += values.nbytes
                if total > limit:
                    raise ValueError(f"{shown(path)} is refused: its images take more than {MAX_GROWTH} times its size")
                if shutil.disk_usage(to.parent).free < FREE_BYTES + values.nbytes:
                    raise _DiskFull(
                        f"{shown(path)} needs more room in {shown(to.parent)}: free some, or set HIERATOK_CACHE to a"
                        " folder on a larger disk"
                    )
                writer.write_batch(pa.record_batch([values.cast(pa.large_binary()), pa.array(labels)], schema))
    except (RemoteError, _DiskFull):
        raise
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"{shown(path)} cannot be read as a Parquet file: damaged, or of another kind") from error


def _parquet_batches(file: RangeFile, path: str) -> Iterator[tuple[Any, np.ndarray]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = pq.ParquetFile(pa.PythonFile(Seekable(file), "r"), pre_buffer=False, buffer_size=1 << 22)
    image, label = _columns(source.schema_arrow, path)
    for batch in source.iter_batches(PARQUET_ROWS, columns=[name for name in (image, label) if name is not None]):
        values = _bytes_of(batch.column(image))
        if values.nbytes > PARQUET_ROWS * MAX_IMAGE_BYTES:
            raise ValueError(f"{shown(path)} holds something much larger than an image should be")
        labels = np.full(len(batch), -1, np.int64) if label is None else _labels(batch.column(label))
        yield values, labels
