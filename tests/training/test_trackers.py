"""Trackers: what TensorBoard's files and those of Weights & Biases hold, read with their own formats."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.runs import small_run
from hieratok.core.extras import MissingPackageError
from hieratok.training.run_folder import HARMLESS, read_log
from hieratok.training.tokenizer import train_tokenizer
from hieratok.training.trackers import WeightsAndBiases, open_tracker

BLOCK, HEADER = 32_768, 7


def offline_records(file: Path) -> Iterator[Any]:
    """The records in a .wandb file: LevelDB's log format behind a header of 7 bytes, each a protocol buffer."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), HEADER, b""
    assert data.startswith(b":W&B")
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # padding to the next block
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or its last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged to the offline runs below a folder, a table a line."""
    lines = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in offline_records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                lines.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
    return lines


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The real wandb, which asks no network."""
    pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_weights_and_biases_gets_what_the_log_gets(offline, photos, tmp_path):
    out = tmp_path / "run"
    run = small_run(photos, tracker="wandb")
    train_tokenizer(run, out)
    lines = history(out)
    logged = {line["step"]: line for line in lines if "loss" in line}
    records = {record["step"]: record for record in read_log(out / "log.jsonl")}
    assert list(logged) == list(records) == [2, 4, 6, 8, 10, 12]
    for step, record in records.items():
        for name, value in record.items():
            if name not in ("step", "images"):
                assert logged[step][name] == pytest.approx(value), name
    pictures = [line for line in lines if "pictures/path" in line]
    assert [line["step"] for line in pictures] == [6, 12]
    (file,) = out.glob(f"wandb/offline-run-*/files/{pictures[-1]['pictures/path']}")
    with Image.open(file) as theirs, Image.open(out / "pictures" / "step-00000012.png") as ours:
        assert theirs.tobytes() == ours.tobytes()
    assert not (out / "tensorboard").exists()
    (config,) = [
        record.run
        for file in out.glob("wandb/offline-run-*/*.wandb")
        for record in offline_records(file)
        if record.WhichOneof("record_type") == "run"
    ][:1]
    settings = {item.key: json.loads(item.value_json) for item in config.config.update}
    assert settings["train.learning_rate"] == run.train.learning_rate
    assert config.run_id == json.loads((out / "run.json").read_text())["id"]
    assert (config.project, config.display_name) == ("hieratok", "run")


@pytest.mark.filterwarnings("ignore")
def test_a_run_resumes_with_another_tracker(offline, photos, tmp_path):
    train_tokenizer(small_run(photos, steps=4), tmp_path)
    train_tokenizer(small_run(photos, steps=8, tracker="wandb"), tmp_path, allow_changes=True)
    assert [line["step"] for line in history(tmp_path) if "loss" in line] == [6, 8]
    assert "train.tracker" in HARMLESS


def test_tensorboard_is_the_default(photos, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tokenizer(small_run(photos, steps=4, picture_every=4), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (record["step"], record["loss"]) for record in read_log(tmp_path / "log.jsonl")
    ]
    assert [e.step for e in events.Images("pictures")] == [4]
    assert not (tmp_path / "wandb").exists()


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"wandb is not installed: pip install 'hieratok\[wandb\]'"):
        open_tracker("wandb", tmp_path, {}, "x", 0)


def test_a_refusal_of_wandb_is_one_line(offline, tmp_path, monkeypatch):
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ValueError, match=r"^wandb did not start \(api_key not configured \(no-tty\)\): log in"
    ) as error:
        WeightsAndBiases(tmp_path, {}, "x")
    assert "\n" not in str(error.value)


def test_an_unknown_tracker_is_refused_on_the_command_line(photos, capsys):
    from hieratok.cli import main

    assert main(["train", "tiny-multi", "--data", str(photos), "--train.tracker", "mlflow"]) == 2
    assert "tensorboard" in capsys.readouterr().err
