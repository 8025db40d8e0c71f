"""`benchmarks/gpu.py --dry-run`: the path that a GPU takes, on a CPU with tiny models."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from hieratok.bench import suite, timing

BENCHMARKS = next(p / "benchmarks" for p in Path(__file__).resolve().parents if (p / "benchmarks").is_dir())


@pytest.fixture
def gpu(monkeypatch):
    """The script, beside a small matrix product and few features."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setitem(timing.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 4096)
    monkeypatch.setattr(suite, "FEATURES", 16)
    yield importlib.import_module("gpu")
    torch.compiler.set_stance("default")


def test_one_command_measures_everything_and_does_not_do_it_twice(gpu, monkeypatch, tmp_path):
    out = tmp_path / "gpu"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--minutes", "0.01", "--out", str(out)])
    gpu.main()
    result = json.loads((out / "gpu.json").read_text())
    assert set(result["bench"]) == {"as it is", "compiled"}
    for one in result["bench"].values():
        assert {"attention", "decode", "train", "sample", "data", "evaluate"} <= set(one)
        assert one["precision"] == "bf16"
        assert all(row["utilisation"] > 0 for row in one["train"])
    assert result["bench"]["compiled"]["compiled"]
    assert set(result["training"]) == {"tiny-single", "tiny-multi"}
    for one in result["training"].values():
        assert one["log"][-1]["step"] == 2
        assert one["metrics"]["psnr"] > 0
    page = (out / "index.html").read_text()
    for title in ("attention", "decode", "train", "sample", "Two tokenizers side by side"):
        assert f">{title}</h2>" in page

    monkeypatch.setattr(gpu, "bench", None)  # what is done is not done again
    monkeypatch.setattr(gpu, "train_tokenizer", None)
    (out / "index.html").unlink()
    gpu.main()
    assert (out / "index.html").read_text() == page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x"], "give --val PATH"),
        ([], "there is no GPU: --dry-run shows on a CPU what would run"),
    ],
)
def test_what_cannot_run_is_one_line(gpu, monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit):
        gpu.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
