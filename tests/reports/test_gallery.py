"""The gallery: what runs left is read and shown, and a damaged run neither breaks the page nor hides."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.models import CONFIG
from helpers.pages import Reader, assert_self_contained
from helpers.saved_runs import RESULT, tokenizer_run, write_run
from hieratok import HieraTok
from hieratok.cli import main
from hieratok.core.typed import plain
from hieratok.generation.dit import DiTConfig
from hieratok.reports import page as report
from hieratok.reports.runs import MAX_PICTURE, MAX_POINTS, Report, differing, thinned, write_report
from hieratok.training.generator import GeneratorRun
from hieratok.training.run_folder import flatten
from hieratok.training.runs import Pace, find_runs, read_run, speed


@pytest.fixture
def runs(tmp_path) -> Path:
    """A tokenizer with an evaluation, one that stopped and one that trains, and a generator inside the first."""
    root = tmp_path / "runs"
    first = write_run(root / "a", tokenizer_run())
    (first / "evaluation").mkdir()
    (first / "evaluation" / "metrics.json").write_text(json.dumps(RESULT))
    (first / "evaluations.jsonl").write_text('{"step": 20, "images": 80, "psnr": 18.25}\n')
    write_run(root / "b", tokenizer_run(learning_rate=5e-4), steps=30, age=7200)
    write_run(root / "c", tokenizer_run(), steps=20)
    model = DiTConfig.of_size("tiny", latent_channels=4, latent_size=4, num_classes=2)
    generator = replace(GeneratorRun(name="dit"), model=model)
    write_run(first / "dit", replace(generator, train=replace(generator.train, steps=40, batch_size=4)))
    return root


def test_what_runs_left_is_read(runs):
    found = {run.name: run for run in find_runs(runs)}
    assert list(found) == ["a", "a/dit", "b", "c"]
    assert {name: run.kind for name, run in found.items()} == {
        "a": "tokenizer", "a/dit": "generator", "b": "tokenizer", "c": "tokenizer",
    }  # fmt: skip
    assert [run.state for run in found.values()] == [
        "finished", "finished", "stopped at step 30 of 40", "step 20 of 40",
    ]  # fmt: skip
    first = found["a"]
    assert first.parameters == sum(p.numel() for p in HieraTok(CONFIG).parameters())
    assert first.pace == speed(first.log) == Pace(images_seen=160, seconds=20.0, images_per_second=8.0)
    assert first.settings == flatten(plain(tokenizer_run()))
    assert [(m.where, m.numbers["psnr"], m.manifest) for m in first.measurements] == [
        ("evaluation", 21.5, RESULT["manifest"])
    ]
    assert found["b"].parameters == first.parameters, "of the newest checkpoint"
    assert not any(run.problems for run in found.values())


def test_the_page_shows_them(runs, capsys):
    write_report(Report(folder=str(runs)))
    document = (runs / "index.html").read_text()
    assert_self_contained(document)
    reader = Reader(document)
    assert not reader.open
    for text in ("stopped at step 30 of 40", "step 20 of 40", "PSNR (dB) ↑", "21.5", "0.625", "18.25"):
        assert text in reader.text, text
    header = reader.cells.index("setting")
    assert reader.cells[header : header + 8] == [
        "setting", "a", "b", "c", "train.learning_rate", "0.0001", "0.0005", "0.0001",
    ]  # fmt: skip  # and that is the only one
    alts = [a.get("alt") for a in reader.tags("img") if a.get("alt")]
    assert alts == ["a, step 40", "b, step 30", "c, step 20", "a/dit, step 40"]
    for i in range(3):
        assert f"var(--series-{i})" in document
    assert "skipped_steps (0)" in reader.text
    printed = capsys.readouterr().out
    assert re.search(r"^b +small +stopped at step 30 of 40 +120 +0\.2 +8\.0 ", printed, re.MULTILINE)
    assert str(runs / "index.html") in printed


def test_evaluations_during_training_show_scales_and_neither_counts_nor_flat_curves(runs):
    common = {"n": 4, "baseline_psnr": 15.5, "psnr_identical": 0, "psnr_identical/8": 0, "baseline_psnr/8": 14.25}
    lines = [
        {"step": 10 * i, "images": 40 * i, "psnr": 17 + i, "psnr/8": 16.125 + i, **common, "psnr_identical": i}
        for i in (1, 2)
    ]
    (runs / "a" / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(Report(folder=str(runs)))
    reader = Reader((runs / "index.html").read_text())
    header = reader.cells.index("PSNR, 8 px (dB) ↑")
    heads = ["images", "PSNR of one colour per token (dB)", "PSNR (dB) ↑", "PSNR, 8 px (dB) ↑"]
    assert set(heads) <= set(reader.cells[header - 8 : header + 8])
    assert {"15.5", "14.25", "18.125"} <= set(reader.cells), "beside each scale's PSNR its baseline"
    assert not [cell for cell in reader.cells if "identical, 8 px" in cell or "identical images, 8 px" in cell]
    labels = reader.text.count("PSNR, 8 px (dB) ↑"), reader.text.count("PSNR of one colour per token, 8 px (dB)")
    assert labels == (2, 1), "a column and a plot; a column alone"


def test_json_is_the_same(runs, tmp_path, capsys):
    assert main(["report", str(runs), "--json", "--out", str(tmp_path / "page.html")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (tmp_path / "page.html").is_file()
    assert not (runs / "index.html").exists()
    assert [fact["name"] for fact in facts] == ["a", "a/dit", "b", "c"]
    assert facts[0]["last"]["loss"] == 1 / 40
    assert facts[0]["last_evaluation"]["psnr"] == 18.25
    assert facts[0]["measurements"]["evaluation"]["ssim"] == 0.625
    assert facts[2]["settings"]["train.learning_rate"] == 5e-4


DAMAGES = {
    "config.yaml": (b"kind: [tokenizer", "config.yaml cannot be read: is not valid YAML: line 1: "),
    "log.jsonl": (
        b'{"step": 10, "images": 40, "loss": 1.0, "images_per_second": 8.0}\n{"st\n[1]\n\xff',
        "3 of 4 lines",
    ),
    "evaluations.jsonl": (b"null\n", "1 of 1 lines"),
    "evaluation/metrics.json": (b'{"psnr": ', "evaluation/metrics.json cannot be read"),
    "tokenizer/model.safetensors": (b"not weights", "tokenizer/model.safetensors cannot be read"),
    "pictures/step-00000040.png": (b"\x89PNG\r\n\x1a\n broken", "step-00000040.png cannot be read"),
}


@pytest.mark.parametrize("file", list(DAMAGES))
def test_damage_is_told_and_the_rest_is_shown(runs, file, capsys):
    content, told = DAMAGES[file]
    (runs / "a" / file).write_bytes(content)
    assert main(["report", str(runs)]) == 0
    reader = Reader((runs / "index.html").read_text())
    assert told in reader.text
    assert "step 20 of 40" in reader.text
    assert "a" in reader.cells
    assert capsys.readouterr().err == ""


def test_everything_of_a_run_may_be_missing(runs):
    for name in os.listdir(runs / "b"):
        path = runs / "b" / name
        if name != "log.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (runs / "c" / "log.jsonl").unlink()
    lost, silent = (next(run for run in find_runs(runs) if run.name == name) for name in "bc")
    assert lost.problems == ["config.yaml cannot be read: does not exist"]
    assert silent.state == "step 20 of 40", "by its checkpoint"
    write_report(Report(folder=str(runs)))


def test_a_runs_own_page_is_kept(runs):
    (runs / "a" / "index.html").write_text("quickstart's")
    write_report(Report(folder=str(runs / "a")))
    assert (runs / "a" / "index.html").read_text() == "quickstart's"
    assert "a/dit" not in (runs / "a" / "report.html").read_text()
    assert [run.name for run in find_runs(runs / "a")] == ["a", "dit"]


def test_six_runs_have_curves(tmp_path):
    for i in range(8):
        write_run(tmp_path / f"r{i}", tokenizer_run(seed=i), age=1000.0 * (i % 5), pictures=False)
    write_report(Report(folder=str(tmp_path)))
    document = (tmp_path / "index.html").read_text()
    legend = re.findall(r'<li style="--color: var\(--series-(\d)\)">(\w+)</li>', document)
    assert legend == [(str(i), name) for i, name in enumerate(["r0", "r1", "r2", "r5", "r6", "r7"])]
    assert "Only the 6 runs with the newest logs" in document


def test_a_line_without_points_keeps_its_colour():
    lines = [report.Line("a", [1, 2], [1.0, 2.0]), report.Line("b", [], []), report.Line("c", [1, 2], [2.0, 1.0])]
    svg = report.line_plot(lines, "steps", "loss", "A plot.", own_legend=False)
    assert "var(--series-0)" in svg
    assert "var(--series-2)" in svg
    assert ">b<" not in svg


def test_long_logs_are_averaged():
    x, y = thinned([(i, 2.0 * i) for i in range(10 * MAX_POINTS + 1)])
    assert len(x) <= MAX_POINTS
    assert sum(x[:-1]) / (len(x) - 1) == pytest.approx((11 * (len(x) - 1) - 1) / 2)
    assert y == [2 * value for value in x]
    assert thinned([(1, 3.0)]) == ([1.0], [3.0])


def test_settings_that_one_run_lacks_are_no_difference():
    assert differing([{"a": 1, "b": 0}, {"a": 1, "b": False, "c": 3}, {"a": 2, "c": 3}]) == ["a"]


def test_large_pictures_are_reduced(tmp_path):
    run = write_run(tmp_path / "a", tokenizer_run(), pictures=False)
    (run / "pictures").mkdir()
    Image.new("RGB", (MAX_PICTURE + 100, 80)).save(run / "pictures" / "step-00000040.png")
    write_report(Report(folder=str(tmp_path)))
    (image,) = [a for a in Reader((tmp_path / "index.html").read_text()).tags("img") if a.get("alt")]
    assert image["width"] == str(MAX_PICTURE)


def test_no_runs_is_one_line(tmp_path, capsys):
    for arguments in ([tmp_path], [tmp_path / "none"]):
        assert main(["report", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(r"no runs in .* or below it|no such folder", line)
    assert not list(tmp_path.iterdir())


def test_reading_changes_nothing(runs):
    torch.manual_seed(0)
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    read_run(runs / "a")
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before
