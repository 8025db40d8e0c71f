"""The training loop of all runs: exact resume, logs, pictures, checkpoints, rollback.

Randomness is stateless: the data order is a function of (seed, step), each image's augmentation of (seed, epoch,
image), and the noise of each micro-batch (posterior samples, stochastic depth) of (seed, step, micro-batch). A step
number is therefore all that a checkpoint needs besides weights, optimisers and the log's running means, and one
process with two micro-batches computes the same as two processes with one each.
"""

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from hieratok.core.devices import best_device
from hieratok.core.distributed import broadcast, check_joined, is_first, process, total, wait
from hieratok.core.errors import NotFinite, Stopped, TrainingError
from hieratok.core.progress import note, progress
from hieratok.core.seeding import seed_of
from hieratok.data.images import StepBatches, training_loader
from hieratok.training.config import TrainConfig
from hieratok.training.meter import Meter
from hieratok.training.run_folder import Log, RunFolder
from hieratok.training.step import Objective, State, learning_rate, train_step

logger = logging.getLogger(__name__)

STOP_CHECK_STEPS = 10
"""Steps after which several processes agree whether to stop: doing so at every step would cost time."""


def fit(
    objective: Objective,
    dataset: Dataset,
    config: TrainConfig,
    num_workers: int,
    run: RunFolder,
    draw: Callable[[nn.Module], Image.Image] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> nn.Module:
    """Train an objective's networks, or resume `run`, up to `config.steps`.

    Several processes call it inside `core.distributed.process_group`.

    Args:
        objective: networks and losses.
        dataset: from (index, epoch) to dicts of tensors, including `skipped`.
        config: the settings.
        num_workers: of the data loader.
        run: the folder to write to.
        draw: makes a picture with the averaged model, every `config.picture_every` steps. All processes call it.
        evaluate: gives numbers by name of the averaged model. All processes call it.
        evaluate_every: steps between evaluations, with one at the end; 0: none.

    Returns:
        The averaged (EMA) model, in evaluation mode.

    Raises:
        TrainingError: the run diverged, or every checkpoint to resume from is damaged.
        Stopped: SIGTERM came; a checkpoint was saved.
        ValueError: the batch does not divide over the processes, or they have not joined a group.
    """
    loop = Loop(objective, dataset, config, num_workers, run)
    observer = Observer(loop, draw, evaluate, evaluate_every)
    with loop.open(), stop_signal(loop.state.device) as stop_asked:
        observer.observe()
        while loop.state.step < config.steps:
            loop.advance()
            stopping = stop_asked(loop.state.step)
            saving = stopping or loop.is_due(config.save_every)
            if loop.rolled_back(thorough=saving or observer.is_due()):
                continue
            if loop.is_due(config.log_every):
                loop.write_log()
            if saving:
                loop.save()
            observer.observe()
            if stopping and loop.state.step < config.steps:
                raise Stopped(f"stopped by SIGTERM after step {loop.state.step}: the same command resumes there")
        loop.check_end()
    wait()
    return loop.state.ema


class Loop:
    """The state of a run: networks, data and files at one step.

    Args:
        objective, dataset, config, num_workers, run: as for `fit`.

    Raises:
        ValueError: the batch does not divide over the processes.
    """

    def __init__(self, objective: Objective, dataset: Dataset, config: TrainConfig, num_workers: int, run: RunFolder):
        self.objective = objective
        self.dataset = dataset
        self.config = config
        self.num_workers = num_workers
        self.run = run
        self.micro_size, self.micro_batches = split_batch(config)
        self.state = State(objective, config, best_device())
        self.meter = Meter(self.state.device)
        self.log: Log | None = None  # in the first process

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Resume from the newest checkpoint, and keep log and progress bar open."""
        if is_first():
            self.run.prepare()
        wait()
        self.resume(self.newest())
        self.start()
        size = self.config.batch_size
        self.bar = progress(
            unit="images", title=self.run.path.name, total=self.config.steps * size, done=self.state.step * size
        )
        try:
            yield
        finally:
            self.bar.close()
            if self.log:
                self.log.close()

    def resume(self, folder: Path | None) -> None:
        """Load a checkpoint, if there is one, and remove what was logged after it."""
        if folder:
            others = self.state.load(self.run, folder)
            self.meter.resume(others.get("interval"))
            if is_first():
                warn_of_threads(others.get("threads"), self.run, self.state.device)
        if is_first():
            self.run.truncate_logs(self.state.step)

    def start(self) -> None:
        """Start data and log at the present step; after a rollback the data have another order."""
        rank, world = process()
        batches = StepBatches(
            num_images=len(self.dataset),  # type: ignore[arg-type]
            batch_size=self.config.batch_size,
            micro_batch_size=self.micro_size,
            start_step=self.state.step,
            num_steps=self.config.steps - self.state.step,
            seed=seed_of(self.config.seed, self.state.counts["rollbacks"]),
            process_index=rank,
            num_processes=world,
        )
        self.batches: Iterator[dict[str, Tensor]] = iter(training_loader(self.dataset, batches, self.num_workers))
        if is_first():
            if self.log:  # its file was truncated
                self.log.close()
            self.log = Log(self.run, self.state.step)

    def newest(self, before: int | None = None) -> Path | None:
        """The newest intact checkpoint, chosen by the first process; with `before`, of an earlier step.

        Raises:
            TrainingError: there are checkpoints, and all are damaged.
        """
        found: Path | TrainingError | None = None
        if is_first():
            try:
                found = self.run.newest(self.state.files, before)
            except TrainingError as error:
                found = error
        found = broadcast(found)
        if isinstance(found, TrainingError):
            raise found
        return found

    def is_due(self, steps: int) -> bool:
        """Whether something done every `steps` steps, and at the end, is due after this step."""
        step = self.state.step
        return steps > 0 and step > 0 and (step % steps == 0 or step == self.config.steps)

    def advance(self) -> None:
        """One step."""
        train_step(self.objective, self.state, self.config, self.batches, self.micro_batches, self.meter)
        self.bar.update(self.config.batch_size)

    def rolled_back(self, thorough: bool) -> bool:
        """Return to an earlier checkpoint if the run has diverged; whether it did.

        Args:
            thorough: check all weights too. Otherwise a GPU is only synchronised when the log is written: at every step
                it would cost time.

        Raises:
            TrainingError: there is no checkpoint to return to, or the limit of rollbacks is reached.
        """
        if not (thorough or self.is_due(self.config.log_every) or self.state.device.type == "cpu"):
            return False
        step = self.diverged_at(thorough)
        if step:
            self.roll_back(step)
        return step > 0

    def diverged_at(self, check_weights: bool) -> int:
        """The step from which on nothing is finite; 0 if the run has not diverged. A few bad steps do not count, except
        at the end, where no later step would test the weights."""
        bad_steps, first_bad = self.meter.bad_steps()
        if bad_steps >= (self.config.max_bad_steps if self.state.step < self.config.steps else 1):
            return first_bad
        if check_weights:
            broken = total(torch.tensor(float(not self.state.is_finite()), device=self.state.device))
            if broken > 0:
                return first_bad if bad_steps else self.state.step
        return 0

    def roll_back(self, step: int) -> None:
        """Return to the last checkpoint before the run diverged; the number of rollbacks changes the order of the data.

        Raises:
            TrainingError: there is none, or the limit of rollbacks is reached.
        """
        rollbacks = self.state.counts["rollbacks"] + 1
        folder = self.newest(before=step)
        if folder is None or rollbacks > self.config.max_rollbacks:
            raise TrainingError(divergence(step, rollbacks - 1, folder))
        self.resume(folder)
        self.meter.in_a_row.zero_()
        self.state.counts["rollbacks"] = rollbacks
        note(f"{divergence(step, rollbacks - 1, folder)}: continuing from it")
        self.bar.n = self.state.step * self.config.batch_size
        self.bar.refresh()
        self.start()

    def write_log(self) -> None:
        """Log the means since the last line."""
        state = self.state
        means, counts = self.meter.flush(self.config.batch_size)
        for name, count in counts.items():
            state.counts[name] += count
        rate = learning_rate(state.step - 1, self.objective.optimizations[state.name], self.config.steps)
        if self.log:
            images = state.step * self.config.batch_size
            self.log.write({"step": state.step, "images": images, **means, **state.counts, "learning_rate": rate})
            self.bar.set_postfix(loss=f"{means.get('loss', math.nan):.4f}", refresh=False)

    def save(self) -> None:
        """Write a checkpoint. While steps are bad, older ones are kept: they may be the last good ones."""
        interval = self.meter.state()
        if self.log:
            self.log.sync()
        self.state.save(self.run, interval, None if interval["in_a_row"] else self.config.keep_checkpoints)

    def check_end(self) -> None:
        """Raise TrainingError if the run has ended and diverged, possibly before it was resumed."""
        if step := self.diverged_at(check_weights=True):
            raise self.failure(step)

    def failure(self, step: int) -> TrainingError:
        """The error of a run that diverged at a step and cannot be rolled back."""
        folder = self.run.newest(self.state.files, before=step)
        return TrainingError(divergence(step, self.state.counts["rollbacks"], folder))


class Observer:
    """Pictures and evaluations of a run's averaged model. A resumed run makes those that are missing at its checkpoint.

    Args:
        loop: the run.
        draw, evaluate, evaluate_every: as for `fit`.
    """

    def __init__(
        self,
        loop: Loop,
        draw: Callable[[nn.Module], Image.Image] | None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        evaluate_every: int,
    ):
        self.loop = loop
        self.draw = draw
        self.evaluate = evaluate
        self.evaluate_every = evaluate_every

    def is_due(self) -> bool:
        """Whether a picture or an evaluation is due at this step."""
        return self.loop.is_due(self.loop.config.picture_every) or self.loop.is_due(self.evaluate_every)

    def observe(self) -> None:
        """Make this step's picture and evaluation if they are missing.

        Raises:
            TrainingError: the averaged model's outputs are not finite.
        """
        try:
            self._write_picture()
            self._write_evaluation()
        except NotFinite as error:  # possibly in this process only: the others cannot be asked
            bad_steps, first_bad = self.loop.meter.bad_steps()
            raise self.loop.failure(first_bad if bad_steps else self.loop.state.step) from error

    def _write_picture(self) -> None:
        loop, step = self.loop, self.loop.state.step
        if self.draw and loop.is_due(loop.config.picture_every) and not broadcast(loop.run.picture(step).is_file()):
            picture = self.draw(loop.state.ema)
            if loop.log:
                loop.log.picture(picture, step)

    def _write_evaluation(self) -> None:
        loop, step = self.loop, self.loop.state.step
        if self.evaluate and loop.is_due(self.evaluate_every) and not broadcast(loop.run.is_evaluated(step)):
            images = step * loop.config.batch_size
            numbers = {"step": step, "images": images, **self.evaluate(loop.state.ema)}
            if loop.log:
                loop.log.evaluation(numbers)


def split_batch(config: TrainConfig) -> tuple[int, range]:
    """The size of a micro-batch, and the indices of this process's micro-batches in the whole batch.

    Raises:
        ValueError: the batch does not divide over the processes, or they have not joined a group.
    """
    check_joined()
    rank, world = process()
    share, rest = divmod(config.batch_size, world)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise ValueError(
            f"train.batch_size {config.batch_size} does not divide into {world} processes"
            f" times micro-batches of {micro}"
        )
    count = share // micro
    return micro, range(rank * count, (rank + 1) * count)


def divergence(step: int, rollbacks: int, folder: Path | None) -> str:
    """The message of a diverged run."""
    good = f"the last checkpoint before that is {folder}" if folder else "no checkpoint was written before it"
    times = f" (after {rollbacks} rollback{'s' * (rollbacks > 1)})" * (rollbacks > 0)
    return (
        f"the run diverged: loss, gradient or weights are not finite from step {step} on{times}; {good}. Try a lower"
        f" learning rate, or fp32"
    )


def warn_of_threads(before: int | None, run: RunFolder, device: torch.device) -> None:
    """Warn if the number of threads has changed: on a CPU, torch splits sums among them, which changes rounding."""
    now = torch.get_num_threads()
    if device.type == "cpu" and before not in (None, now):
        logger.warning(
            "%s was trained with %s threads up to here, and continues with %d: the result will differ in its last bits"
            " from an uninterrupted run's (OMP_NUM_THREADS=%s keeps them)",
            run.path,
            before,
            now,
            before,
        )


@contextlib.contextmanager
def stop_signal(device: torch.device) -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether SIGTERM came, the same on every process."""
    came = threading.Event()

    def stop(step: int) -> bool:
        if process()[1] == 1:
            return came.is_set()
        if step % STOP_CHECK_STEPS:
            return False
        return bool(total(torch.tensor(float(came.is_set()), device=device)) > 0)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
