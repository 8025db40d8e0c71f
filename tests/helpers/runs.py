"""Small training runs, and processes that train."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from helpers.models import CONFIG
from hieratok import TokenizerConfig
from hieratok.core.typed import plain
from hieratok.losses.reconstruction import LossConfig
from hieratok.training import step as step_module
from hieratok.training.config import DataConfig, TrainConfig
from hieratok.training.run_folder import read_log
from hieratok.training.tokenizer import TokenizerRun


def small_run(photos: Path, **train) -> TokenizerRun:
    settings = dict(
        steps=12, batch_size=4, learning_rate=1e-3, save_every=4, log_every=2, picture_every=6, ema_decay=0.9
    )
    return TokenizerRun(
        name="small",
        model=replace(CONFIG, decoder_depth=2, drop_path=0.2, init_std=TokenizerConfig().init_std),
        data=DataConfig(path=str(photos), num_workers=0),
        loss=LossConfig(perceptual_weight=0.0),
        train=TrainConfig(**{**settings, "precision": "fp32", **train}),
    )


def final_state(out: Path) -> dict[str, object]:
    """Everything a finished run holds, by name: weights, averaged weights, optimisers, counters."""
    newest = max((out / "checkpoints").glob("step-*"))
    state: dict[str, object] = {"counters": json.loads((newest / "counters.json").read_text())}
    for file in newest.glob("*.safetensors"):
        state |= {f"{file.stem}.{k}": v for k, v in load_file(file).items()}
    state |= {f"ema.{k}": v for k, v in load_file(out / "tokenizer" / "model.safetensors").items()}
    for file in newest.glob("*-optimizer.pt"):
        for parameter, moments in torch.load(file, weights_only=True)["state"].items():
            state |= {f"{file.stem}.{parameter}.{k}": v for k, v in moments.items()}
    return state


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):  # NaN: latent statistics not measured yet
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimisers and counters bit by bit, and the means in the log; evaluations and pictures too."""
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    for name in first:
        assert same(first[name], second[name]), name
    timing = ("images_per_second", "data_wait")
    logs = [[{k: v for k, v in r.items() if k not in timing} for r in read_log(p / "log.jsonl")] for p in (a, b)]
    assert logs[0] == logs[1]


class Crash(Exception):
    """Stands in for a crash of the machine at one point."""


def crash_in_step(at: int, run: Callable[[], object]) -> None:
    """Run something that trains; it crashes in step `at`, before that step counts."""
    original = step_module.update_ema

    def crash(ema, model, step, decay):
        if step + 1 == at:
            raise Crash
        original(ema, model, step, decay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "update_ema", crash)
        with pytest.raises(Crash):
            run()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_run(run: TokenizerRun, path: Path) -> str:
    path.write_text(yaml.safe_dump(plain(run)))
    return str(path)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "hieratok", *args]


def last_step(out: Path) -> int:
    """Of the log; 0 before its first line. A line that is being written does not count."""
    return max((record["step"] for record in read_log(out / "log.jsonl")), default=0)


FORKED = multiprocessing.get_context("forkserver")  # of which each process starts at once: nothing is imported anew


FORKED.set_forkserver_preload(["hieratok.training.tokenizer", "torch.utils.tensorboard"])


def call_as_started(function: Callable[..., object], *args: object) -> None:
    """A call whose data loaders begin as those of a program that was started: forked."""
    multiprocessing.set_start_method("fork", force=True)
    function(*args)


def start_process(function: Callable[..., object], *args: object) -> multiprocessing.process.BaseProcess:
    process = FORKED.Process(target=call_as_started, args=(function, *args))
    process.start()
    return process


class Means(nn.Module):
    """A feature network: the mean of every channel in every quarter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def means(weights: Path | None = None) -> nn.Module:
    return Means()


FEATURES = f"{__name__}:means"
"""A feature network: mean colours."""
