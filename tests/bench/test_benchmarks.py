"""The scripts in benchmarks/, small: whether they run. Their figures mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--recipe", "tiny-multi", "--rounds", "1"]
SMALL = {
    "attention": [*TINY, "--batch_size", "1", "--precision", "fp32"],
    "autoencoders": [*TINY, "--batch_size", "1", "--size", "128"],
    "runtimes": ["--quick", "--batch_sizes", "1"],
    "scaling": ["--recipe", "small-multi", "--rounds", "1", "--batch_sizes", "1"],
    "transformer": [*TINY, "--batch_size", "1", "--precision", "bf16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name, tmp_path):
    if name in ("autoencoders", "runtimes", "transformer"):
        pytest.importorskip("diffusers")
    if name == "runtimes":
        pytest.importorskip("onnxscript")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *SMALL[name], "--out", str(tmp_path / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "time (ms)" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())
