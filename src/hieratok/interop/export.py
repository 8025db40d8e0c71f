"""`hieratok export`: a tokenizer as files for other runtimes, which do not need this package: ONNX or `torch.export`.

    hieratok export runs/photos --int8
    session = onnxruntime.InferenceSession("runs/photos/export-onnx/decoder-scale2.onnx")
    (*_, preview) = session.run(None, {"z": z})  # z (B, d, h, w) float32; preview: the result of decode(z, scale=2)

Images have the tokenizer's training size; the batch may have any size.
"""

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hieratok import __version__
from hieratok.core import checkpoint
from hieratok.core.extras import needs_extras
from hieratok.core.files import shown
from hieratok.core.progress import progress
from hieratok.core.tables import Table
from hieratok.core.typed import as_json
from hieratok.data.images import Source, evaluation_batches, evenly_spread, open_source, to_float, to_uint8
from hieratok.evaluation.pixels import psnr
from hieratok.evaluation.reconstruction import area_resize
from hieratok.interop.config import Export
from hieratok.tokenizer.downsample import ConvDownsample
from hieratok.tokenizer.frozen import FrozenEncoder
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.pretrained import describe_tokenizer
from hieratok.tokenizer.scales import Scales

TOLERANCE = 1e-4
"""Largest allowed difference between any values of a file and of the original."""
MANIFEST = "export.json"
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
QUANTIZED = ["MatMul", "Gemm", "Conv"]
NEEDED = ("onnx", "onnxruntime", "onnxscript")
CHECKED = 3  # photos for checking files, one alone and all together
MEASURED, AT_A_TIME = 64, 8  # photos for the PSNR of int8 weights, at most, and per batch
SOURCE_LINES = ("stack_trace", "pkg.torch.onnx.stack_trace")  # these name files on this machine

Shape = list[str | int]
"""The word `batch`, then sizes."""
Program = Callable[[Tensor], tuple[Tensor, ...]]
"""Runs one file: its input, with the batch first -> its outputs."""


class Part(NamedTuple):
    """One file of an export."""

    name: str
    """Without suffix."""
    module: nn.Module
    input: str
    """The input's name."""
    outputs: tuple[str, ...]
    """The outputs' names."""


class Encode(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance of z, each (B, d, h, w), as `HieraTok.encode`."""

    def __init__(self, tokenizer: HieraTok):
        super().__init__()
        self.encoder = tokenizer.encoder
        if isinstance(self.encoder, FrozenEncoder):
            self.frozen = self.encoder.load().module  # so that its weights are the module's

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's parameters."""
        posterior = DiagonalGaussian(*self.encoder(images))
        return posterior.mean, posterior.logvar


class Decode(nn.Module):
    """z (B, d, h, w) -> the images of scales 0 to `last`, coarse to fine, without the weights of finer scales."""

    def __init__(self, tokenizer: HieraTok, last: int):
        super().__init__()
        config = tokenizer.config
        self.scales = Scales.of(config.scales, config.grid)
        self.last = last
        self.downsample = first_branches(tokenizer, last)
        self.decoder = tokenizer.decoder

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, f h_k, f w_k) each, about [-1, 1] (not clamped)."""
        return tuple(self.decoder(self.downsample(z, self.scales), self.scales, self.last))


def first_branches(tokenizer: HieraTok, last: int) -> nn.Module:
    """The part of a tokenizer's down-sampler for scales 0 to `last`; weights are shared, not copied."""
    c, whole = tokenizer.config, tokenizer.downsample
    if not isinstance(whole, ConvDownsample) or last == len(c.scales) - 1:
        return whole
    with torch.device("meta"):
        part = ConvDownsample(c.latent_channels, c.decoder_width, (*c.scales[: last + 1], c.scales[-1]))
    weights = whole.state_dict(keep_vars=True)
    part.load_state_dict({name: weights[name] for name in part.state_dict()}, assign=True)
    return part


def parts(tokenizer: HieraTok) -> list[Part]:
    """The exported parts: the encoder, the whole decoder, and one decoder for each shorter prefix of the scales.

    In full attention coarse scales depend on fine ones, so there is only the whole decoder.
    """
    c = tokenizer.config
    outputs = tuple(f"image_{c.patch_size * side}px" for side in c.scales)
    whole = len(c.scales) - 1
    shorter = [] if c.attention == "full" else range(whole)
    return [
        Part("encoder", Encode(tokenizer), "images", ("mean", "logvar")),
        Part("decoder", Decode(tokenizer, whole), "z", outputs),
        *(Part(f"decoder-scale{k}", Decode(tokenizer, k), "z", outputs[: k + 1]) for k in shorter),
    ]


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export, with the results of its check."""

    name: str
    input: dict[str, Shape]
    """The input's shape, by name."""
    outputs: dict[str, Shape]
    bytes: int
    largest_difference: float
    """Largest difference of any value to the original."""
    int8: str | None = None
    """Name of the file with int8 weights."""
    int8_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Values by name, without missing ones."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Int8Cost(NamedTuple):
    """PSNR in dB of a decoder file's finest image against the photo reduced to its size."""

    float32: float
    int8: float
    cost: float
    """Their difference."""


@dataclass(frozen=True)
class Int8Costs:
    """The cost of int8 weights."""

    images: int
    """Number of photos for the mean PSNR."""
    files: dict[str, Int8Cost]
    """Costs by the decoder's name, without suffix."""

    def to_json(self) -> dict[str, Any]:
        """Costs by file, and the number of photos."""
        return {"images": self.images, **{name: cost._asdict() for name, cost in self.files.items()}}


def export(options: Export) -> list[ExportedFile]:
    """The command: write the files and an `export.json` with `files`, the tokenizer's `config`, weights' `sha256` and
    latent statistics, versions, and with `int8` the cost in `psnr`.

    Raises:
        ValueError, FileNotFoundError: a missing tokenizer, images or packages, a folder with other content, or a file
            that differs from the original by more than 1e-4 (nothing is written then).
    """
    if options.format == "onnx":
        check_packages()
    out = output_folder(options)
    source = open_source(options.data)
    tokenizer = HieraTok.from_pretrained(options.run).eval()
    photos = first_photos(source, tokenizer.config.image_size)
    facts = describe(options, tokenizer)
    files: list[ExportedFile] = []
    costs = None
    with checkpoint.atomic_folder(out) as folder:
        for part in progress(parts(tokenizer), title="export", unit="files", leave=False):
            example = photos if part.input == "images" else latents_of(tokenizer, photos)
            path = folder / f"{part.name}{SUFFIXES[options.format]}"
            write(part, example, path)
            file = ExportedFile(
                path.name,
                {part.input: ["batch", *example.shape[1:]]},
                shapes(part, example),
                size(path),
                check(part, example, path),
            )
            if options.int8:
                quantized = int8_path(path)
                quantize(path, quantized)
                file = replace(file, int8=quantized.name, int8_bytes=size(quantized))
            files.append(file)
        if options.int8:
            costs = int8_cost(tokenizer, source, folder)
        psnr_costs = {"psnr": as_json(costs)} if costs else {}
        checkpoint.write_json(folder / MANIFEST, {**facts, "files": as_json(files), **psnr_costs})
    print(table(files, costs).text())
    print(f"written: {shown(out)} (every file's inputs and outputs: {MANIFEST})")
    return files


def describe(options: Export, tokenizer: HieraTok) -> dict[str, Any]:
    """Facts for `export.json`: format, versions, and the tokenizer's config, weights and statistics."""
    sha256, config = describe_tokenizer(options.run)
    whose = {
        "sha256": sha256,
        "config": config,
        "latent_mean": tokenizer.latent_mean.tolist(),
        "latent_std": tokenizer.latent_std.tolist(),
    }
    return {"format": options.format, "versions": versions(options.format), "tokenizer": whose}


def output_folder(options: Export) -> Path:
    """The folder to write to.

    Raises:
        ValueError: not given and not in a run's folder, or a folder that holds something other than an export.
    """
    if options.out is None and not Path(options.run).is_dir():
        raise ValueError(f"say where to write: {shown(options.run)} is not a folder here, give --out FOLDER")
    out = Path(options.run) / f"export-{options.format}" if options.out is None else Path(options.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ValueError(f"{shown(out)} holds something other than an export: give --out a new or empty folder")
    return out


def check_packages() -> None:
    """Raise MissingPackageError unless what ONNX files need is installed."""
    with needs_extras():
        for name in NEEDED:
            importlib.import_module(name)


def versions(format: str) -> dict[str, str]:
    """Versions of the packages that wrote the files."""
    packages = ("torch", *(NEEDED if format == "onnx" else ()))
    return {"hieratok": __version__} | {name: importlib.metadata.version(name) for name in packages}


def first_photos(source: Source, side: int) -> Tensor:
    """Three photos (3, 3, side, side) in [-1, 1] to check files on; of fewer, some twice."""
    _, _, photos = next(evaluation_batches(evenly_spread(source, CHECKED), side, CHECKED))
    return to_float(photos[torch.arange(CHECKED) % len(photos)])


@torch.no_grad()
def latents_of(tokenizer: HieraTok, photos: Tensor) -> Tensor:
    """The posterior's mean."""
    return tokenizer.encode(photos).mode()


@torch.no_grad()
def shapes(part: Part, example: Tensor) -> dict[str, Shape]:
    """Each output's shape, by name."""
    return {name: ["batch", *y.shape[1:]] for name, y in zip(part.outputs, part.module(example), strict=True)}


# --- Files ------------------------------------------------------------------------------------------------------------


def write(part: Part, example: Tensor, path: Path) -> None:
    """Write a part in the format of the path's suffix. ONNX beyond 2 GB has its weights in a second file."""
    module = part.module.eval()
    with torch.no_grad():
        if path.suffix == SUFFIXES["torch"]:
            program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            for node in program.graph.nodes:
                forget_source(node.meta)
            torch.export.save(program, path)
            return
        exported = torch.onnx.export(
            module,
            (example,),
            input_names=[part.input],
            output_names=list(part.outputs),
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
        assert exported is not None
        for node in exported.model.graph:
            forget_source(node.metadata_props)
        exported.save(path)


def forget_source(metadata: Any) -> None:
    """Remove file names of this machine from nodes."""
    for name in SOURCE_LINES:
        metadata.pop(name, None)


def open_program(path: Path, threads: int | None = None) -> Program:
    """Run a file that `export` wrote, on the CPU.

    Args:
        path: .onnx or .pt2.
        threads: of ONNX Runtime; None: as many as torch has.
    """
    if path.suffix == SUFFIXES["torch"]:
        module = torch.export.load(path).module()
        return lambda x: tuple(module(x))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(y) for y in session.run(None, {given.name: x.numpy()}))

    return run


@torch.no_grad()
def check(part: Part, example: Tensor, path: Path) -> float:
    """The largest difference between any values of a file and of the original, for one image and for several at once.

    Raises:
        ValueError: more than 1e-4.
    """
    program = open_program(path)
    difference = max(
        (found - expected).abs().max().item()
        for batch in (example[:1], example)
        for found, expected in zip(program(batch), part.module(batch), strict=True)
    )
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{path.name} differs from the original by {difference:.1e}, more than {TOLERANCE:.0e}: nothing was written"
        )
    return difference


def size(path: Path) -> int:
    """Bytes of a file, including its second file of weights if it has one."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


# --- int8 -------------------------------------------------------------------------------------------------------------


def int8_path(path: Path) -> Path:
    """The same with int8 weights."""
    return path.with_name(f"{path.stem}-int8{path.suffix}")


def quantize(path: Path, target: Path) -> None:
    """Write an ONNX file with int8 weights, with one scale per output channel; activations are quantised dynamically.

    Every matrix product with a weight and every convolution; norms, positions and biases keep float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet_root_logger():  # it advises to optimise the graph first, which the exporter did
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=size(path) > path.stat().st_size,
        )


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Without the root logger's warnings."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def int8_cost(tokenizer: HieraTok, source: Source, folder: Path) -> Int8Costs:
    """PSNR in dB of each decoder file's finest image against the photo reduced to its size, in float32 and in int8.

    In int8 the encoder is int8 too. Mean over at most 64 images.
    """
    images = evenly_spread(source, MEASURED)
    names = [part.name for part in parts(tokenizer) if part.input == "z"]

    def measure(path_of: Callable[[Path], Path]) -> dict[str, float]:
        encode = open_program(path_of(folder / "encoder.onnx"))
        found = {}
        for name in names:
            decode = open_program(path_of(folder / f"{name}.onnx"))
            values = [
                psnr(restored, area_resize(photos, restored.shape[-2:]))
                for _, _, photos in evaluation_batches(images, tokenizer.config.image_size, AT_A_TIME)
                for restored in [to_uint8(decode(encode(to_float(photos))[0])[-1])]
            ]
            found[name] = torch.cat(values).mean().item()
        return found

    float32, int8 = measure(lambda path: path), measure(int8_path)
    costs = {name: Int8Cost(float32[name], int8[name], float32[name] - int8[name]) for name in names}
    return Int8Costs(len(images), costs)


def table(files: Sequence[ExportedFile], costs: Int8Costs | None) -> Table:
    """A table of the files, their sizes and measurements."""
    measured = ["int8 size", "PSNR", "int8 PSNR", "cost"] if costs else []
    rows = []
    for file in files:
        row = [file.name, megabytes(file.bytes), f"{file.largest_difference:.1e}"]
        if costs:
            numbers = costs.files.get(Path(file.name).stem)
            row.append(megabytes(file.int8_bytes or 0))
            row += [f"{value:.2f} dB" for value in numbers] if numbers else [""] * 3
        rows.append(row)
    return Table(["file", "size", "largest difference", *measured], rows)


def megabytes(count: int) -> str:
    """Bytes as text."""
    return f"{count / 1e6:,.1f} MB"
