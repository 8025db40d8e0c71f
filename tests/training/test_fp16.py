"""fp16: autocast with scaled gradients, on the CPU's own support of it."""

import json
from pathlib import Path

import pytest
import torch

from helpers.runs import assert_same_run, crash_in_step, small_run
from hieratok.core.errors import TrainingError
from hieratok.core.precision import autocast, dtype_of
from hieratok.training.config import TrainConfig
from hieratok.training.run_folder import read_log
from hieratok.training.tokenizer import train_tokenizer


def counters(out: Path) -> dict:
    return json.loads((max((out / "checkpoints").glob("step-*")) / "counters.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_are_computed_in_that_type(precision):
    with autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype_of(precision)


def test_fp16_trains_as_fp32_does_to_its_precision(photos, tmp_path):
    losses = {}
    for precision in ("fp32", "fp16"):
        train_tokenizer(small_run(photos, precision=precision), tmp_path / precision)
        losses[precision] = [record["loss"] for record in read_log(tmp_path / precision / "log.jsonl")]
    assert losses["fp16"] != losses["fp32"]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert counters(tmp_path / "fp16")["scaler"]["scale"] == 65536.0
    assert counters(tmp_path / "fp32")["scaler"] == {}
    assert [record["skipped_steps"] for record in read_log(tmp_path / "fp16" / "log.jsonl")] == [0] * 6


def test_gradients_are_unscaled_before_they_are_clipped(photos, tmp_path):
    norms = {}
    for precision in ("fp32", "fp16"):
        train_tokenizer(small_run(photos, precision=precision, steps=2, log_every=1), tmp_path / precision)
        norms[precision] = [record["gradient_norm"] for record in read_log(tmp_path / precision / "log.jsonl")]
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)


def overflowing(monkeypatch, largest: float) -> None:
    """A GPU's fp16: gradients beyond a limit while they are scaled are infinite."""
    scale = torch.amp.GradScaler.scale

    def limited(self, loss):
        scaled = scale(self, loss)
        if scaled.ndim == 0 and scaled.requires_grad and float(scaled.detach() / loss.detach()) > largest:
            return scaled * float("inf")
        return scaled

    monkeypatch.setattr(torch.amp.GradScaler, "scale", limited)


def test_an_overflow_halves_the_scale_and_is_no_divergence(photos, tmp_path, monkeypatch):
    overflowing(monkeypatch, largest=1024.0)
    train_tokenizer(small_run(photos, precision="fp16", max_bad_steps=2), tmp_path)
    assert counters(tmp_path)["scaler"]["scale"] == 1024.0  # after 6 halvings
    assert read_log(tmp_path / "log.jsonl")[-1]["skipped_steps"] == 6
    assert read_log(tmp_path / "log.jsonl")[-1]["rollbacks"] == 0
    assert max((tmp_path / "checkpoints").iterdir()).name == "step-00000012"


def test_a_run_may_end_with_an_overflow(photos, tmp_path, monkeypatch):
    overflowing(monkeypatch, largest=1024.0)
    train_tokenizer(small_run(photos, precision="fp16", steps=4, max_bad_steps=1), tmp_path)
    assert read_log(tmp_path / "log.jsonl")[-1]["skipped_steps"] == 4


def test_what_no_scale_cures_is_a_divergence(photos, tmp_path, monkeypatch):
    overflowing(monkeypatch, largest=0.0)
    with pytest.raises(TrainingError) as error:
        train_tokenizer(small_run(photos, precision="fp16", steps=40, max_bad_steps=3, max_rollbacks=0), tmp_path)
    assert "diverged" in str(error.value)
    assert "from step 17 on" in str(error.value)  # 65536 = 2^16: until then the scale was halved


def test_a_resumed_run_has_its_scale_again(photos, tmp_path, monkeypatch):
    overflowing(monkeypatch, largest=4096.0)
    run = small_run(photos, precision="fp16")
    train_tokenizer(run, tmp_path / "whole")
    crash_in_step(9, lambda: train_tokenizer(run, tmp_path / "resumed"))
    train_tokenizer(run, tmp_path / "resumed")
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert counters(tmp_path / "resumed")["scaler"]["scale"] == 4096.0


def test_fp16_and_fsdp2_are_refused_together():
    with pytest.raises(ValueError, match=r"train\.precision fp16 does not go with train\.parallel fsdp2"):
        TrainConfig(precision="fp16", parallel="fsdp2")
