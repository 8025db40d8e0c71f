"""`hieratok bench`: attention, decoding, training, sampling and evaluation, compared with the machine's limits.

Everything is timed in turns with a large matrix product in the same process, so that results are shares of the
machine's rate, and ratios are taken round by round. Weights are random, as time does not depend on them.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hieratok.bench.config import Bench, What
from hieratok.bench.timing import (
    Call,
    copy_rate,
    count_flops,
    matrix_product,
    peak_memory,
    take_turns,
)
from hieratok.core.checkpoint import write_json
from hieratok.core.devices import best_device, hardware
from hieratok.core.precision import Precision, autocast, dtype_of
from hieratok.core.tables import Table
from hieratok.data.images import ImageDataset, StepBatches, available_cores, open_source, training_loader
from hieratok.evaluation.distribution import frechet_distance
from hieratok.evaluation.features import Inception
from hieratok.evaluation.statistics import statistics_of
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import guided
from hieratok.studies import recipes
from hieratok.studies.recipes import single
from hieratok.tokenizer.attention import scale_attention
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.scales import Scales
from hieratok.training.generator import GeneratorRun
from hieratok.training.meter import Meter
from hieratok.training.step import State, train_step
from hieratok.training.tokenizer import TokenizerObjective, TokenizerRun

MATMUL = "matrix product"
READING = "reading the decoder's weights once"
FEATURES = 2048  # of Inception


@dataclass(frozen=True)
class Machine:
    """Device and settings of the measurements."""

    device: torch.device
    precision: Precision
    batch_size: int
    rounds: int
    compile: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return dtype_of(self.precision)

    def precisely(self, call: Call) -> Call:
        """A call in that precision."""

        def run() -> object:
            with autocast(self.device, self.precision):
                return call()

        return run

    def model(self, module: torch.nn.Module) -> torch.nn.Module:
        """A module on the device, compiled if set."""
        module = module.to(self.device)
        if self.compile:
            module.compile(dynamic=False)
        return module


class Work(NamedTuple):
    """Work of a call."""

    flops: float
    utilisation: float
    """Share of the matrix product's rate."""


class Memory(NamedTuple):
    """Memory of a call."""

    peak_bytes: int | None
    """None if not known."""


class Comparison(NamedTuple):
    """A call's time divided by another's."""

    to: str
    """The other's name."""
    low: float
    """Highest ratio of all rounds."""
    high: float
    ratio: float
    """The median."""


@dataclass(frozen=True)
class Timed:
    """One call; None: not measured."""

    name: str
    seconds: float
    """The median."""
    images_per_second: float | None = None
    memory: Memory | None = None
    work: Work | None = None
    beside: Comparison | None = None

    def to_json(self) -> dict[str, str | float | None]:
        """Numbers by name."""
        row: dict[str, str | float | None] = {"name": self.name, "seconds": self.seconds}
        if self.images_per_second is not None:
            row["images_per_second"] = self.images_per_second
        for part in (self.memory, self.work, self.beside):
            row |= part._asdict() if part else {}
        return row


@dataclass(frozen=True)
class BenchResult:
    """The machine's facts, and rows by part."""

    hardware: str
    torch: str
    precision: str
    compiled: bool
    batch_size: int
    tokenizer: str
    """Recipes."""
    generator: str
    matrix_product_flops_per_second: float
    copy_bytes_per_second: float
    rows: dict[What, list[Timed]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The value that `--json` prints."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return facts | {what: [row.to_json() for row in rows] for what, rows in self.rows.items()}


def bench(options: Bench) -> BenchResult:
    """The command.

    Raises:
        ValueError, FileNotFoundError: no such recipe, images or device.
    """
    machine = machine_of(options)
    on_gpu = machine.device.type == "cuda"
    tokenizer = recipes.get(options.recipe or ("f16d16-multi" if on_gpu else "tiny-multi"))
    generator = recipes.get(options.generator or ("dit-xl" if on_gpu else "dit-tiny"))
    if not isinstance(tokenizer, TokenizerRun) or not isinstance(generator, GeneratorRun):
        raise ValueError("--recipe names a tokenizer's recipe and --generator a generator's (`hieratok recipes`)")
    benches: dict[What, Callable[[], list[Timed]]] = {
        "attention": lambda: bench_attention(machine, tokenizer),
        "decode": lambda: bench_decode(machine, tokenizer),
        "train": lambda: bench_train(machine, tokenizer),
        "sample": lambda: bench_sample(machine, generator),
        "data": lambda: bench_data(machine, tokenizer, options.data),
        "evaluate": lambda: bench_evaluate(machine),
    }
    product, flops = matrix_product(machine.device, machine.dtype)
    seconds = take_turns({MATMUL: product}, machine.device, machine.rounds).median(MATMUL)
    result = BenchResult(
        hardware=hardware() if on_gpu or machine.device.type == "cpu" else str(machine.device),
        torch=torch.__version__,
        precision=machine.precision,
        compiled=machine.compile,
        batch_size=machine.batch_size,
        tokenizer=tokenizer.name,
        generator=generator.name,
        matrix_product_flops_per_second=flops / seconds,
        copy_bytes_per_second=copy_rate(machine.device),
    )
    chosen: tuple[What, ...] = get_args(What) if options.what == "all" else (options.what,)
    for what in chosen:
        result.rows[what] = benches[what]()
        if not options.json:
            print(f"\n{what}\n{table(result.rows[what])}", flush=True)
    if options.out:
        write_json(Path(options.out), result.to_json())
    print(json.dumps(result.to_json(), indent=2) if options.json else f"\n{facts(result)}")
    return result


def machine_of(options: Bench) -> Machine:
    """Device and settings, by the options and the machine."""
    device = torch.device(options.device or best_device())
    on_gpu = device.type == "cuda"
    return Machine(
        device,
        options.precision or ("bf16" if on_gpu else "fp32"),
        options.batch_size or (32 if on_gpu else 8),
        options.rounds,
        options.compile,
    )


# --- What is timed ----------------------------------------------------------------------------------------------------


def measure(
    machine: Machine,
    calls: Mapping[str, Call],
    images: int,
    to: Mapping[str, str] | None = None,
    name: str = "",
    counts: bool = True,
) -> list[Timed]:
    """Time calls in turns with a matrix product.

    Args:
        machine: device and settings.
        calls: by name.
        images: per call.
        to: by a call's name, that of the call to compare with.
        name: of the progress bar.
        counts: count FLOPs, with one more run of every call.
    """
    product, product_flops = matrix_product(machine.device, machine.dtype)
    flops = {n: count_flops(call) if counts else 0.0 for n, call in calls.items()}
    times = take_turns({**calls, MATMUL: product}, machine.device, machine.rounds, title=name)
    rows = []
    for n, call in calls.items():
        seconds = times.median(n)
        work, beside = None, None
        if flops[n]:
            work = Work(flops[n], times.ratio(MATMUL, n).median * flops[n] / product_flops)
        if to and n in to:
            ratio = times.ratio(n, to[n])
            beside = Comparison(to[n], ratio.low, ratio.high, ratio.median)
        memory = Memory(peak_memory(call, machine.device))
        rows.append(Timed(n, seconds, images / seconds, memory, work, beside))
    return rows


def bench_attention(machine: Machine, run: TokenizerRun) -> list[Timed]:
    """One block's attention over the pyramid: ours in two calls, one call with a mask, one without a mask."""
    c = run.model
    scales = Scales.of(c.scales, c.grid)
    shape = (machine.batch_size, c.decoder_heads, scales.num_tokens, c.decoder_width // c.decoder_heads)
    q, k, v = (torch.randn(shape, device=machine.device, dtype=machine.dtype, requires_grad=True) for _ in range(3))
    mask = scales.mask(c.attention, machine.device)
    attends: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": scale_attention(scales, c.attention, machine.device),
        "one call with a mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "one call without": F.scaled_dot_product_attention,
    }
    calls: dict[str, Call] = {}
    for name, attend in attends.items():
        calls[f"{name}, forward"] = lambda attend=attend: attend(q.detach(), k.detach(), v.detach())
        calls[f"{name}, and backward"] = lambda attend=attend: torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    to = {name: f"one call with a mask, {name.rpartition(', ')[2]}" for name in calls}
    return measure(machine, calls, machine.batch_size, to, "attention")


@torch.inference_mode()
def bench_decode(machine: Machine, run: TokenizerRun) -> list[Timed]:
    """Encoding, down-sampling and the decoder's transformer alone, and decoding whole, by scale, and up to each scale.

    Each pass of the decoder reads its weights: the time for that, at the rate of a copy, is shown too.
    """
    c = run.model
    model = HieraTok(c).eval()
    machine.model(model.encoder)
    machine.model(model.decoder)
    model.to(machine.device)
    images = torch.rand(machine.batch_size, 3, c.image_size, c.image_size, device=machine.device) * 2 - 1
    z = model.encode(images).mode()
    scales = Scales.of(c.scales, c.grid)
    tokens = torch.randn(machine.batch_size, scales.num_tokens, c.decoder_width, device=machine.device)
    attend = scale_attention(scales, c.attention, machine.device)

    weights = sum(p.nbytes for p in model.decoder.parameters())
    half = torch.ones(weights // 8, device=machine.device)  # a copy reads and writes, so half the weights
    copied = torch.empty_like(half)

    def progressive(count: int) -> Call:
        return lambda: list(islice(model.decode_progressive(z), count))

    calls: dict[str, Call] = {
        "encode": lambda: model.encode(images),
        "decode: down-sampling alone": lambda: list(model.downsample(z, scales)),
        "decode: transformer alone": lambda: model.decoder.blocks(tokens, attend),
        "decode": lambda: model.decode(z),
        READING: lambda: copied.copy_(half),
    }
    sides = [c.patch_size * s for s in c.scales]
    for k, side in enumerate(sides[:-1]):
        calls[f"decode(z, scale={k}), {side} px"] = lambda k=k: model.decode(z, scale=k)
    for count, side in enumerate(sides, start=1):
        if c.attention != "full":
            calls[f"decode_progressive up to {side} px"] = progressive(count)
    to = {name: "decode" for name in calls if name not in ("encode", "decode")}
    return measure(machine, {n: machine.precisely(call) for n, call in calls.items()}, machine.batch_size, to, "decode")


def bench_train(machine: Machine, run: TokenizerRun) -> list[Timed]:
    """A training step with losses, optimiser and averaging, compared with the single-scale tokenizer's."""
    runs = {"multi scale": run, "single scale": single(run)} if len(run.model.scales) > 1 else {"single scale": run}
    calls = {f"step, {name}": training_step(machine, one) for name, one in runs.items()}
    return measure(machine, calls, machine.batch_size, {"step, multi scale": "step, single scale"}, "train")


def training_step(machine: Machine, run: TokenizerRun) -> Call:
    """One training step on random pixels, with an untrained perceptual trunk."""
    train = replace(run.train, compile=machine.compile, precision=machine.precision)
    run = replace(run, train=train, loss=replace(run.loss, random_trunk=True))
    objective = TokenizerObjective(run, HieraTok(run.model))
    state = State(objective, run.train, machine.device)
    size = (machine.batch_size, 3, run.model.image_size, run.model.image_size)
    images = torch.randint(256, size, dtype=torch.uint8, device=machine.device)
    state.step = run.train.steps  # after the GAN's ramps
    meter = Meter(machine.device)

    def step() -> None:
        state.step -= 1
        batch = {"image": images, "skipped": torch.zeros(1)}
        train_step(objective, state, run.train, iter([batch]), range(1), meter)

    return step


@torch.inference_mode()
def bench_sample(machine: Machine, run: GeneratorRun) -> list[Timed]:
    """One evaluation of the generator: without guidance, guided in one batch, guided in two passes."""
    c = run.model
    model = DiT(c).eval()
    machine.model(model)
    B = machine.batch_size
    x = torch.randn(B, *c.latent_shape, device=machine.device)
    t = torch.full((B,), 0.5, device=machine.device)
    y = torch.zeros(B, dtype=torch.long, device=machine.device)
    null = torch.full_like(y, c.num_classes)
    predict = guided(model, 4.0, c.num_classes)

    calls = {
        "a step without guidance": machine.precisely(lambda: model(x, t, y)),
        "a guided step, one batch": machine.precisely(lambda: predict(x, t, y)),
        "a guided step, two passes": machine.precisely(lambda: (model(x, t, y), model(x, t, null))),
    }
    to = dict.fromkeys(list(calls)[1:], "a step without guidance")
    return measure(machine, calls, B, to, "sample")


def bench_data(machine: Machine, run: TokenizerRun, path: str) -> list[Timed]:
    """Training images, cropped by the recipe: on one core, and from the loader with one worker per core."""
    source = open_source(path)
    dataset = ImageDataset(source, run.model.image_size, run.data.crop, run.data.flip, min_area=run.data.min_area)
    indices = [(i % len(dataset), 0) for i in range(max(64, machine.batch_size))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    times = take_turns({"one core": lambda: [dataset[i] for i in indices]}, torch.device("cpu"), machine.rounds)
    torch.set_num_threads(threads)
    seconds = times.median("one core")
    row = Timed("one core", seconds, len(indices) / seconds)

    cores = available_cores()
    steps = 10 + machine.rounds * 10
    batches = StepBatches(len(dataset), machine.batch_size, machine.batch_size, 0, steps)
    loader = iter(training_loader(dataset, batches, cores))
    for _ in islice(loader, 10):  # workers start
        pass
    start = time.perf_counter()
    count = sum(len(batch["image"]) for batch in loader)
    seconds = time.perf_counter() - start
    name = f"loader, {cores} workers"
    return [row, Timed(name, seconds / (steps - 10), count / seconds)]


@torch.inference_mode()
def bench_evaluate(machine: Machine) -> list[Timed]:
    """Parts of FID: Inception's features of images of 256 px in float32, and the distance of two sets of features."""
    network = Inception().eval().to(machine.device)
    images = torch.rand(machine.batch_size, 3, 299, 299, device=machine.device)
    features = [statistics_of(torch.randn(2 * FEATURES, FEATURES)) for _ in range(2)]
    rows = measure(
        replace(machine, precision="fp32", compile=False),
        {"Inception's features": lambda: network(images)},
        machine.batch_size,
        name="evaluate",
    )
    name = f"Frechet distance, {FEATURES:,} dimensions"
    times = take_turns({name: lambda: frechet_distance(*features)}, torch.device("cpu"), rounds=1, warm_up=0)
    return [*rows, Timed(name, times.median(name))]


# --- Text -------------------------------------------------------------------------------------------------------------


def facts(result: BenchResult) -> str:
    """The machine's facts as text."""
    return (
        f"{result.hardware}, torch {result.torch}, {result.precision}{', compiled' * result.compiled};"
        f" {result.tokenizer} and {result.generator}, {result.batch_size} images at a time.\n"
        f"A large matrix product runs at {result.matrix_product_flops_per_second / 1e12:.3g} TFLOP/s, a copy at"
        f" {result.copy_bytes_per_second / 1e9:.3g} GB/s. of matmul: share of that rate."
    )


def table(rows: list[Timed]) -> str:
    """Rows as text, without empty columns."""
    cells = [list(columns(row)) for row in rows]
    header = ["", "time (ms)", "images/s", "of matmul (%)", "memory (MiB)", "ratio", "to"]
    keep = [i for i in range(len(header)) if any(line[i] for line in cells)]
    return Table([header[i] for i in keep], [[line[i] for i in keep] for line in cells]).text()


def columns(row: Timed) -> Iterator[str]:
    """A row's cells."""
    peak, beside = row.memory.peak_bytes if row.memory else None, row.beside
    yield row.name
    yield f"{1000 * row.seconds:,.4g}"
    yield f"{row.images_per_second:,.4g}" if row.images_per_second is not None else ""
    yield f"{100 * row.work.utilisation:.0f}" if row.work else ""
    yield f"{peak / 2**20:,.0f}" if peak is not None else ""
    yield f"{beside.ratio:.2f} [{beside.low:.2f}, {beside.high:.2f}]" if beside else ""
    yield beside.to if beside else ""
