"""One step of training: learning rate, micro-batches forward and backward, clipping, AdamW, moving average."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hieratok.core import checkpoint
from hieratok.core.distributed import is_first, process
from hieratok.core.layers import Blocks
from hieratok.core.precision import autocast
from hieratok.core.seeding import seed_of
from hieratok.training import parallel
from hieratok.training.config import Optimization, TrainConfig
from hieratok.training.meter import Meter
from hieratok.training.run_folder import COUNTERS, RunFolder, Snapshot

Backward = Callable[[Tensor], None]
"""Adds a loss's gradients to those of the step."""


class Objective:
    """Networks and their losses; `train_step` does the rest.

    Args:
        networks: the networks to train, by name. The first is the model: it is averaged, saved with its
            `save_pretrained(folder, state_dict)`, and shown.
        optimizations: by the same names.
    """

    methods: tuple[str, ...] = ()
    """Names of the model's methods, besides `forward`, that compute with its weights."""

    def __init__(self, networks: dict[str, nn.Module], optimizations: dict[str, Optimization]):
        self.networks = networks
        self.optimizations = optimizations
        self.name = next(iter(networks))

    def compute(
        self, networks: dict[str, nn.Module], batch: dict[str, Tensor], step: int, backward: Backward
    ) -> dict[str, Tensor]:
        """Compute the loss or losses of one micro-batch, and call `backward` with each.

        Args:
            networks: those of `__init__`, possibly wrapped for several processes: call these.
            batch: from the data set, on the device.
            step: number of optimiser steps done.
            backward: call it with a scalar; frees the scalar's graph.

        Returns:
            Detached scalars to log by name, "loss" among them.
        """
        raise NotImplementedError

    def finish_step(self, bad: Tensor) -> None:
        """Called after each optimiser step; `bad` is 1 if it was skipped, else 0."""


def learning_rate(step: int, config: Optimization, steps: int) -> float:
    """Linear warm-up, then a cosine down to `min_learning_rate` at the last step. `step` counts from 0."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def make_optimizer(model: nn.Module, config: Optimization, device: torch.device) -> torch.optim.AdamW:
    """AdamW for the trainable parameters of a network, with weight decay on matrices and convolutions only. [ours]"""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim >= 2 and "positions" not in name and "embeddings" not in name
            (decayed if is_weight else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, config.learning_rate, betas, fused=device.type in ("cpu", "cuda"))


def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + step) / (10 + step)): early averages forget quickly. [ours]"""
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average([p.detach() for p in ema.parameters()], [p.detach() for p in model.parameters()], step)


class State:
    """Everything that a step changes, with saving and loading of checkpoints.

    Args:
        objective: freshly initialised networks on the CPU.
        config: the settings.
        device: where they are trained.
    """

    def __init__(self, objective: Objective, config: TrainConfig, device: torch.device):
        self.name = objective.name
        self.device = device
        self.networks = {name: network.to(device).train() for name, network in objective.networks.items()}
        self.ema = copy.deepcopy(self.networks[self.name]).requires_grad_(False).eval()
        for module in self.networks[self.name].modules():
            if isinstance(module, Blocks):
                module.gradient_checkpointing = config.activation_checkpointing
        if config.parallel == "fsdp2" and process()[1] > 1:
            parallel.shard(self.networks[self.name], objective.methods)
            parallel.shard(self.ema, objective.methods)
        if config.compile:
            self.networks[self.name].compile()
        self.called = {
            name: network if isinstance(network, parallel.FSDPModule) else parallel.replicate(network, device)
            for name, network in self.networks.items()
        }
        self.optimizers = {
            name: make_optimizer(network, objective.optimizations[name], device)
            for name, network in self.networks.items()
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")  # type: ignore[attr-defined]
        """Keeps the gradients of fp16 within its range; does nothing in other precisions."""
        self.step = 0
        """Optimiser steps done, skipped ones included."""
        self.counts = {"bad_images": 0, "skipped_steps": 0, "rollbacks": 0}
        """Counts of unreadable images, skipped steps and rollbacks."""

    @property
    def files(self) -> list[str]:
        """Files that a checkpoint must hold."""
        model = [f"{self.name}/{file}" for file in (checkpoint.CONFIG, checkpoint.WEIGHTS)]
        others = [f"{name}{end}" for name in self.networks for end in (".safetensors", "-optimizer.pt")]
        return [COUNTERS, *model, *others]

    def save(self, run: RunFolder, interval: dict[str, Any], keep: int | None) -> None:
        """Write a checkpoint; every process must call it.

        Args:
            run: the folder.
            interval: the meter's state since the last line of the log.
            keep: number of checkpoints to keep; None: all.
        """
        averaged = parallel.whole_weights(self.ema)
        counters = {
            "step": self.step,
            **self.counts,
            "threads": torch.get_num_threads(),
            "interval": interval,
            "scaler": self.scaler.state_dict(),
        }
        snapshot = Snapshot(
            counters,
            {name: parallel.whole_weights(network) for name, network in self.networks.items()},
            {name: parallel.whole_optimizer(network, self.optimizers[name]) for name, network in self.networks.items()},
        )
        if is_first():
            model: Any = self.ema
            run.save(snapshot, lambda folder: model.save_pretrained(folder / self.name, averaged), keep)

    def load(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Load an intact checkpoint; returns the rest of its values, `interval` and `threads`."""
        snapshot = run.load(folder, self.networks)
        parallel.load_weights(self.ema, checkpoint.read_tensors(folder / self.name / checkpoint.WEIGHTS))
        for name, network in self.networks.items():
            parallel.load_weights(network, snapshot.weights[name])
            parallel.load_optimizer(network, self.optimizers[name], snapshot.optimizers[name])
        if scaler := snapshot.counters.pop("scaler", None):  # empty without fp16
            self.scaler.load_state_dict(scaler)
        self.step = snapshot.counters.pop("step")
        self.counts = {name: snapshot.counters.pop(name) for name in self.counts}
        return snapshot.counters

    def is_finite(self) -> bool:
        """Whether all weights are finite; under FSDP2 those of this process."""
        weights = [p for network in (self.ema, *self.networks.values()) for p in network.parameters()]
        return all(bool(parallel.local(p).isfinite().all()) for p in weights)


def train_step(
    objective: Objective,
    state: State,
    config: TrainConfig,
    batches: Iterator[dict[str, Tensor]],
    micro_batches: range,
    meter: Meter,
) -> None:
    """One optimiser step of every network, skipped for all if a gradient is not finite.

    Args:
        objective: networks and losses.
        state: changed by the step.
        config: the settings.
        batches: this process's next micro-batches, including the tensor `skipped`.
        micro_batches: their indices in the whole batch, which seed their noise.
        meter: collects losses and gradient norms.
    """
    for name, optimizer in state.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step, objective.optimizations[name], config.steps)

    def backward(loss: Tensor) -> None:
        with torch.autocast(state.device.type, enabled=False):
            state.scaler.scale(loss / len(micro_batches)).backward()

    for i in micro_batches:
        with meter.waiting():
            batch = next(batches)
        meter.skipped_images += int(batch.pop("skipped").sum())
        batch = {name: tensor.to(state.device, non_blocking=True) for name, tensor in batch.items()}
        torch.manual_seed(seed_of(config.seed, state.counts["rollbacks"], state.step, i))
        is_last = i == micro_batches[-1]
        with parallel.synchronized(state.called.values(), is_last), autocast(state.device, config.precision):
            meter.add(objective.compute(state.called, batch, state.step, backward))

    for optimizer in state.optimizers.values():
        state.scaler.unscale_(optimizer)
    norms = {
        name: parallel.clip_gradients(network, objective.optimizations[name].clip_norm)
        for name, network in state.networks.items()
    }
    # An overflow of scaled gradients only says that the scale is too large, unless the scale is at its minimum.
    is_scaled = state.scaler.scale(torch.ones((), device=state.device)) > 1
    bad = meter.watch(norms, state.step + 1, tolerated=is_scaled)
    for optimizer in state.optimizers.values():
        parallel.step_unless(optimizer, bad)
        optimizer.zero_grad()
    state.scaler.update()
    objective.finish_step(bad)
    update_ema(state.ema, state.networks[state.name], state.step, config.ema_decay)
    state.step += 1
