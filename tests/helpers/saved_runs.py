"""Run folders as training leaves them, for pages and cards."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from helpers.models import CONFIG
from hieratok import HieraTok
from hieratok.core.checkpoint import seal
from hieratok.core.typed import plain
from hieratok.generation.dit import DiT
from hieratok.training.generator import GeneratorRun
from hieratok.training.tokenizer import TokenizerRun

RESULT = {
    "n": 100,
    "psnr": 21.5,
    "psnr_identical": 0,
    "ssim": 0.625,
    "warnings": ["100 images: published figures use 50,000"],
    "manifest": {"protocol": "reconstruction", "network": "none", "n": 100, "reference sha256": "ab" * 32},
    "inputs": {"run": "/home/someone/runs/a", "data": "/home/someone/photos"},
}


def tokenizer_run(**train: Any) -> TokenizerRun:
    run = TokenizerRun(name="small", model=CONFIG)
    return replace(run, train=replace(run.train, **{"steps": 40, "batch_size": 4, **train}))


def write_run(
    folder: Path, run: TokenizerRun | GeneratorRun, steps: int = 40, age: float = 0.0, pictures: bool = True
) -> Path:
    """A run's folder as training leaves it after so many steps, `age` seconds ago."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(run), sort_keys=False))
    records = [
        {
            "step": step,
            "images": 4 * step,
            "loss": 1 / step,
            "mse": 2 / step,
            "images_per_second": 8.0,
            "skipped_steps": 0,
            "learning_rate": 1e-3,
        }
        for step in range(10, steps + 1, 10)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    model = HieraTok(run.model) if isinstance(run, TokenizerRun) else DiT(run.model)
    finished = steps == run.train.steps
    checkpoint = folder / "checkpoints" / f"step-{steps:08d}"
    model.save_pretrained(folder / run.kind if finished else checkpoint / run.kind)
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / f"{run.kind}-optimizer.pt").write_bytes(b"moments")
    seal(checkpoint, run=None, step=steps)
    if pictures:
        (folder / "pictures").mkdir()
        Image.new("RGB", (30, 20), (200, 10, 30)).save(folder / "pictures" / f"step-{steps:08d}.png")
    os.utime(folder / "log.jsonl", (time.time() - age,) * 2)
    return folder
