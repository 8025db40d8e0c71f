"""Models on disk and on the hub: a folder with `config.json` and `model.safetensors`. Nothing is ever unpickled."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hieratok.core.files import check_regular, read_json_table, read_npz, shown
from hieratok.core.typed import from_json

Config = TypeVar("Config")
LONGEST_NAME = 240  # bytes; leaves room for what a temporary name adds
TEMPORARY, ASIDE = ".tmp", ".old"
"""Suffixes of hidden names: of a file or folder being written, and of a folder being replaced."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ENCODER = "encoder"
"""In a tokenizer's folder: the files of a frozen encoder, if they were copied."""
ENCODER_FILES = [f"{ENCODER}/{CONFIG}", f"{ENCODER}/*.safetensors"]
STATISTICS = {"latent_mean", "latent_std"}
"""A tokenizer's tensors besides its weights, measured after training; NaN before."""
CHECKSUMS = "checksums.json"
BUNDLED = "bundled:"
"""Prefix of the names of models that come with this package."""
RUN = "run.json"
"""In a run's folder: the run's `id`, which its checkpoints repeat."""


def save(folder: str | Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a model's folder. Each file is written atomically.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / WEIGHTS) as temporary:
        save_tensors(weights, temporary)
    write_json(folder / CONFIG, config)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json_text(value) + "\n")


def json_text(value: Any) -> str:
    """JSON over several lines. It has neither infinity (the PSNR of identical images) nor NaN: they become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of the umask; a full disk raises OSError, as for other files."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
        path.chmod(mode)  # safetensors writes files that only their owner may read
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot write: {error}", str(path)) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` if the block succeeds and is removed if it fails."""
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: `path` appears complete, and flushed to the disk, or not at all.

    A former folder is set aside until the new one is in its place: a process killed in between leaves
    it for `remove_leftovers` to put back.
    """
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    aside = temporary.with_suffix(ASIDE)
    try:
        yield temporary
        for file in [*sorted(temporary.rglob("*")), temporary]:
            sync(file)
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists():
            _remove_or_put_back(aside, path)


def _temporary(path: Path) -> Path:
    """A hidden name in the folder of `path`; a long name is cut, as names may have 255 bytes at most."""
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:LONGEST_NAME])}.{uuid.uuid4().hex[:8]}{TEMPORARY}")


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of `atomic_file(path)` or `atomic_folder(path)`; put back a folder whose
    successor did not take its place.

    Args:
        path: its last part may be a pattern. No other process may be writing it: hold the folder's lock.
    """
    for aside in path.parent.glob(f".{path.name}.*{ASIDE}"):
        target = aside.with_name(aside.name[1:].rsplit(".", 2)[0])
        _remove_or_put_back(aside, target)
    for leftover in path.parent.glob(f".{path.name}.*{TEMPORARY}"):
        remove(leftover)


def _remove_or_put_back(aside: Path, path: Path) -> None:
    """Remove a folder that was set aside, or put it back if no other took its place."""
    if path.exists():
        remove(aside)
    else:
        os.rename(aside, path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a crash of the machine cannot lose what was reported as saved."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot sync folders
        if not path.is_dir():
            raise error
    finally:
        os.close(descriptor)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, .npz or (any other ending) torch's format; no code in the file is run.

    Raises:
        FileNotFoundError, PermissionError: no such file, or it may not be read.
        ValueError: a file of another format.
    """
    check_regular(path)
    arrays = read_npz(path) if path.suffix == ".npz" else None
    try:
        if arrays is not None:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        if path.suffix == ".safetensors":
            with utf8_path(path) as readable:
                return load_file(readable)
        if zipfile.is_zipfile(path):
            _check_stored(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise PermissionError(f"{shown(path)} may not be read: permission denied") from error
    except SafetensorError as error:
        raise ValueError(f"{shown(path)} cannot be read, it is damaged: {shown(error)}") from error
    except Exception as error:  # each reader raises its own types, and torch's messages have many lines
        raise ValueError(
            f"{shown(path)} cannot be read ({type(error).__name__}): weights are .pth with tensors only, .safetensors"
            " or .npz"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{shown(path)} is not a table of tensors by name: save the network's state_dict() alone")
    return tensors


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A path for libraries that refuse names which are not UTF-8: for such a name, a link with another one."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / f"link{path.suffix}"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def _check_stored(path: Path) -> None:
    """Refuse a .pth with compressed content, which torch never writes: it could unpack to a thousand times its size."""
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("compressed")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(module: nn.Module) -> str:
    """SHA-256 over a module's names and values, for weights that are not from a file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def seal(folder: Path, **facts: Any) -> None:
    """Write a folder's `checksums.json`: the SHA-256 of every file in it, and what the folder belongs to.

    Args:
        folder: with all its files.
        facts: what it belongs to, as plain values; `find_damage` compares them.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    checksums = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps({**facts, "files": checksums}, indent=2))


def find_damage(folder: Path, names: Iterable[str], **facts: Any) -> str | None:
    """What is wrong with a sealed folder; None if nothing is.

    Args:
        folder: may be missing.
        names: the files that must be there. Others do not matter.
        facts: what its `checksums.json` must state.
    """
    manifest = read_table(folder / CHECKSUMS)
    checksums = manifest.get("files", manifest)  # checkpoints of older runs: files alone
    if not isinstance(checksums, dict) or not checksums:
        return f"{CHECKSUMS} is missing or unreadable"
    for name, value in facts.items():
        if manifest.get(name) != value:
            return f"its {name} is {manifest.get(name)!r} and not {value!r}"
    for name in names:
        path = folder / name
        if name not in checksums:
            return f"{CHECKSUMS} does not name {name}"
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != checksums[name]:
            return f"{name} has changed"
    return None


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file's table; empty if there is none, or none that can be read."""
    try:
        return read_json_table(path)
    except (OSError, ValueError):
        return {}


def step_folders(run: Path) -> list[Path]:
    """A run's checkpoints, newest first: folders `step-` and eight digits whose checksums.json names this run and step.

    Copies, checkpoints of other runs and anything else are left out.
    """
    owner = read_table(run / RUN).get("id")

    def is_ours(folder: Path) -> bool:
        manifest = read_table(folder / CHECKSUMS)
        is_of_run = owner is None or manifest.get("run") == owner  # None: an older run, without an id
        return bool(manifest) and is_of_run and manifest.get("step", step_of(folder)) == step_of(folder)

    return [folder for folder in named_as_steps(run) if is_ours(folder)]


def named_as_steps(run: Path) -> list[Path]:
    """Everything named like a checkpoint in a run's folder, of this run or not, newest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch("step-[0-9]{8}", path.name)]
    return sorted((path for path in folders if path.is_dir() and not path.is_symlink()), reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def find(
    source: str | Path,
    inside: str = "tokenizer",
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model.

    Args:
        source: a model's folder; a run's folder, whose finished model lies in its sub-folder `inside`, or whose
            latest checkpoint serves while it still trains; or a hub id such as "name/model" (not "runs/..."),
            downloaded if no such path exists.
        inside: the model's sub-folder in a run.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; None: the hub's own folder.
        token: for private models; None: the token that this machine is logged in with; False: none.
        local_files_only: use earlier downloads only, without the network.

    Raises:
        FileNotFoundError: no model there.
    """
    if str(source).startswith(BUNDLED):  # here for all loaders
        raise FileNotFoundError(f"{source}: this version comes without models")
    path = Path(source)
    if path.is_dir():
        for folder in (path, path / inside, *(step / inside for step in step_folders(path))):
            if (folder / CONFIG).is_file():
                return folder
        raise FileNotFoundError(f"{path} holds no model: neither {CONFIG} nor {inside}/{CONFIG} nor a checkpoint")
    # Runs are written to runs/NAME: the hub is not asked for a missing one.
    if not path.exists() and is_hub_id(str(source)) and not str(source).startswith("runs/"):
        return _download(str(source), revision, cache_dir, token, local_files_only)
    raise FileNotFoundError(f"{source}: no such folder")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, NAME/MODEL; a relative path of two parts has it too."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _download(
    hub_id: str, revision: str | None, cache_dir: str | Path | None, token: str | bool | None, local_files_only: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS, *ENCODER_FILES],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if local_files_only:
            raise FileNotFoundError(
                f"{hub_id}: no such folder here, and it was not downloaded before (local_files_only)"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{hub_id}: no such folder here, and the hub gave none ({reason})") from error
    return Path(folder)


def load_config(
    folder: Path, model_type: str, config_class: type[Config], others: tuple[str, ...] = ()
) -> tuple[Config, dict[str, Any]]:
    """A model's `config.json`: its dataclass, and the unchecked values under the names `others`.

    Raises:
        FileNotFoundError, PermissionError: no such file, or it may not be read.
        ValueError: not JSON, another kind of model, unknown fields, or values of a wrong type or out of range.
    """
    path = folder / CONFIG
    config = read_json_table(path)
    if config.pop("model_type", None) != model_type:
        raise ValueError(f"{shown(path)} does not describe a {model_type} model")
    rest = {name: config.pop(name) for name in others if name in config}
    return from_json(config_class, config, shown(path)), rest


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a .safetensors file by name, from its header.

    Raises:
        OSError, ValueError: no regular file, or a damaged one.
    """
    check_regular(path)  # a FIFO would block
    try:
        with utf8_path(path) as readable, safe_open(readable, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{shown(path)}: {error}") from error


def tensor_names(folder: Path) -> set[str]:
    """The names of a model's weights; empty if the file cannot be read, which `load_weights` reports."""
    try:
        return set(tensor_shapes(folder / WEIGHTS))
    except (OSError, ValueError):
        return set()


def load_weights(
    folder: Path, model: nn.Module, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Put the weights of a model's folder into `model` (which may be on the meta device).

    Args:
        folder: with `model.safetensors`.
        model: of its config.
        device: where to put a model that is on the meta device.
        dtype: of the weights in `model`; None: as in the file.

    Raises:
        FileNotFoundError, PermissionError: no such file, or it may not be read.
        ValueError: a damaged file, weights that do not fit the config, some that are not finite, or a dtype that is
            not floating-point.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type such as torch.bfloat16, not {dtype!r}")
    path = folder / WEIGHTS
    weights = read_tensors(path)
    state = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = next(n for n in [*expected, *found] if expected.get(n) != found.get(n))
        raise ValueError(
            f"{shown(path)} does not fit {shown(folder / CONFIG)}: {shown(name)} is {found.get(name, 'missing')} in the"
            f" file and {expected.get(name, 'absent')} in the model"
        )
    for name, tensor in weights.items():
        if state[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"{shown(path)}: {name} must hold floating-point numbers, not {tensor.dtype}")
        if not tensor.isfinite().all() and not (name in STATISTICS and tensor.isnan().all()):
            raise ValueError(f"{shown(path)}: {name} holds NaN or infinite values")
        if name == "latent_std" and (tensor < 0).any():
            raise ValueError(f"{shown(path)}: {name}, a deviation, is negative")
    # Copied and not assigned: the file's tensors are not aligned in memory, which changes the last bits of products.
    model.to(dtype)
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=device)
    model.load_state_dict(weights)
