"""Studies: the paper's numbers, rows trained once and found again, effects, speed-ups, and the pages."""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import t as student

from helpers.frozen import VIT, save_autoencoder, save_vit
from helpers.pages import Reader, assert_self_contained
from helpers.runs import FEATURES, TORCHRUN, environment, start_process
from hieratok import HieraTok
from hieratok.analysis import convergence, density
from hieratok.analysis.convergence import speed_up
from hieratok.cli import main
from hieratok.core import checkpoint
from hieratok.core.lock import lock
from hieratok.core.tables import digits
from hieratok.core.typed import plain
from hieratok.data.images import center_crop, open_source
from hieratok.evaluation.reconstruction import Numbers
from hieratok.evaluation.results import Result
from hieratok.generation.dit import DiTConfig
from hieratok.losses.adversarial import AdversarialConfig
from hieratok.reports import analysis as analysis_page
from hieratok.reports import study as study_page
from hieratok.studies import paper as studies
from hieratok.studies import plan as study_runs
from hieratok.studies import recipes
from hieratok.studies import run as study
from hieratok.studies.plan import RunStudy, place, planned_runs, prepare
from hieratok.studies.results import Cell, Measured
from hieratok.tokenizer import cost
from hieratok.training.run_folder import Log

STEPS = 4


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch):
    """Intervals a little less exact, five times sooner."""
    monkeypatch.setattr(convergence, "REPLICATES", 200)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A YAML file with a much smaller base: 32 px, a grid of 4 x 4."""
    run = recipes.tiny_multi()
    model = replace(
        run.model, image_size=32, patch_size=8, latent_channels=16, scales=(1, 2, 4), encoder_width=16,
        encoder_heads=1, decoder_width=16, decoder_depth=1, decoder_heads=1,
    )  # fmt: skip
    train = replace(run.train, steps=STEPS, batch_size=2, log_every=1, save_every=2, picture_every=0)
    run = replace(run, model=model, data=replace(run.data, num_workers=0), train=train)
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    path.write_text(yaml.safe_dump(plain(run)))
    return str(path)


def small_size() -> studies.Size:
    """Size tiny with generators, second stages and numbers of samples to match."""
    run = recipes.dit_tiny()
    model = DiTConfig(width=16, depth=1, heads=1, latent_size=4, objective="flow", learn_sigma=False)
    train = replace(run.train, steps=STEPS, batch_size=2, log_every=1, picture_every=0)
    stage2 = recipes.tiny_multi_stage2()
    gan = AdversarialConfig(discriminator="patchgan", width=4, generator_start=0, ramp_steps=1)
    stage2 = replace(stage2, gan=gan, train=replace(stage2.train, steps=2, batch_size=2))
    return replace(
        studies.SIZES["tiny"],
        generators=dict.fromkeys(studies.SIZES["tiny"].generators, lambda: replace(run, model=model, train=train)),
        stage2=lambda: stage2,
        sampler_steps=2,
        samples=6,
        curve_samples=4,
        draws=1,
    )


@pytest.fixture
def small_generators(monkeypatch):
    monkeypatch.setitem(studies.SIZES, "tiny", small_size())


def reconstructed(numbers: dict[str, float], warnings: tuple[str, ...] = ()) -> Cell:
    """A row with one seed of which the reconstructions were measured."""
    return Cell(measured=Measured(reconstruction=Result(Numbers(numbers), manifest={})), warnings=warnings)


def run_study(options: RunStudy) -> dict:
    """With all pages; what STUDY.json holds."""
    result = study.run_study(options, study_page.write, analysis_page.write)
    assert result is not None
    return result.to_json()


# --- The paper --------------------------------------------------------------------------------------------------------


def test_effects_that_the_papers_text_states():
    single, multi = (row.paper for row in studies.TABLE2.rows[:2])
    assert 1 - multi["rFID"] / single["rFID"] == pytest.approx(0.272, abs=5e-4)
    assert 1 - multi["LPIPS"] / single["LPIPS"] == pytest.approx(0.194, abs=5e-4)
    assert 1 - multi["gFID"] / single["gFID"] == pytest.approx(0.189, abs=5e-4)


def test_every_number_stands_in_the_papers_tables(shared):
    """Each row of tables 2 to 7 is a run of numbers on the page that holds them."""
    path = shared / "PAPER.md"
    if not path.is_file():
        pytest.skip("needs the paper's tables in PAPER.md")
    text = " ".join(path.read_text().replace("|", "/").replace(",", "").replace("->", "").split())
    text = text.replace("M ", " ").replace(" / ", " ")
    for name in ("table2", "table3", "table4"):
        for row in studies.STUDIES[name].rows:
            wanted = [row.paper[metric] for metric in studies.QUALITY]
            forms = [f"{a:.2f} {b:.1f} {c:.3f} {d:.2f} {e:.1f} {f:.1f}" for a, b, c, d, e, f in [wanted]]
            assert any(form in text for form in forms), (name, row.label, forms)
    for row in studies.TABLE5.rows:
        cv, gini, entropy, gfid = row.paper.values()
        assert f"{cv:.3f} {gini:.3f} {entropy:.3f} {gfid:.1f}" in text
    for single, multi in zip(studies.TABLE6.rows[::2], studies.TABLE6.rows[1::2]):
        (a, b), (c, d) = single.paper.values(), multi.paper.values()
        assert f"{a} {b} {c} {d}" in text


def test_the_papers_probable_misprint_is_not_counted():
    """Three numbers of one row are another table's, and no other row has such a twin."""
    doubtful = {(name, row.name): row.doubtful for name, s in studies.STUDIES.items() for row in s.rows if row.doubtful}
    assert doubtful == {("table3", "interpolate, full"): ("PSNR", "LPIPS", "SSIM")}
    misprint, source = studies.TABLE3.rows[5].paper, studies.TABLE2.rows[5].paper
    assert [misprint[m] == source[m] for m in studies.QUALITY] == [False, True, True, True, False, False]
    assert "probably a misprint" in studies.TABLE3.note

    setup = prepare(RunStudy(study="table3"))
    cells = {(i, 0): reconstructed({"psnr": 20.0 - i, "fd-x": 5.0 + i}) for i in range(6)}
    result = study.assemble(setup, cells)
    psnr = next(c for c in result.comparisons if c.measured == "psnr")
    effects = [line.effect for line in psnr.rows[1:] if line.effect]
    assert [(effect.verdict, effect.counts) for effect in effects] == [("agrees", True)] * 4 + [("agrees", False)]
    overview = {row[1]: row[2:] for row in study_page.overview_table(result).rows}
    assert overview["psnr"] == ["4", "0", "0"]
    assert overview["fd-x (not rFID)"] == ["5", "0", "0"]
    assert [row[-1] for row in study_page.metric_table(result, psnr).rows][-2:] == ["agrees", "agrees (not counted)"]


def test_rows_are_the_papers_runs():
    paper = studies.SIZES["paper"].base()
    for study_name, names in {
        "table2": ["f16d16-single", "f16d16-multi", "f16d16-single-kl1e-5", "f16d16-multi-kl1e-5",
                   "f16d32-single-kl1e-5", "f16d32-multi-kl1e-5"],
        "table3": [f"f16d16-{d}-{a}" for d in ("conv", "interpolate") for a in ("causal", "independent", "full")],
        "table4": ["f16d16-single", "f16d16-scales-1-2-4-16", "f16d16-multi", "f16d16-scales-1-2-4-8-12-16"],
    }.items():  # fmt: skip
        for row, name in zip(studies.STUDIES[study_name].rows, names, strict=True):
            assert row.build is not None
            assert replace(row.build(paper), name=name) == recipes.get(name)
    for single, multi in zip(studies.TABLE6.rows[::2], studies.TABLE6.rows[1::2]):
        assert single.generator == multi.generator
    sizes = [studies.SIZES["paper"].generators[row.generator]().model.width for row in studies.TABLE6.rows[::2]]
    assert sizes == [1152, 1024, 768]
    assert studies.SIZES["paper"].generators["scaled up"]().train.steps == 5_000_000


def test_effects_are_against_a_row_before_that_has_none_itself():
    for entry in studies.STUDIES.values():
        for i, row in enumerate(entry.rows):
            assert len(row.label) == len(entry.columns)
            assert set(row.paper) <= set(entry.metrics)
            assert row.against is None or (row.against < i and entry.rows[row.against].against is None)


def test_scale_lists_on_a_smaller_grid():
    base = studies.tiny_base()
    lists = {(1, 2, 4, 8, 16): (1, 2, 4, 8), (1, 2, 4, 16): (1, 2, 8), (1, 2, 4, 8, 12, 16): (1, 2, 4, 6, 8)}
    assert {sides: studies.scales(*sides)(base).model.scales for sides in lists} == lists
    for sides in lists:
        assert studies.scales(*sides)(recipes.small_multi()).model.scales == sides


# --- Runs -------------------------------------------------------------------------------------------------------------


def folders(name: str, **options) -> list[str]:
    setup = prepare(RunStudy(study=name, **options))
    return [planned_runs(setup, row, 0)[0].folder.name for _, row in setup.rows]


def test_the_same_run_is_one_folder_whatever_asks_for_it(tmp_path):
    two, three, four = (folders(name) for name in ("table2", "table3", "table4"))
    assert two[1] == three[0] == four[2]
    assert two[0] == four[0]
    assert len({*two, *three, *four}) == len(two) + len(three) + len(four) - 3
    assert folders("figure4", features="squeezenet") == two[:2]
    assert set(folders("table3", steps=7)).isdisjoint(three)
    setup = prepare(RunStudy(study="table3"))
    other = replace(setup.base, name="other", train=replace(setup.base.train, log_every=3))
    assert place(setup, other).folder == place(setup, setup.base).folder, "what does not change weights does not count"
    (tmp_path / "a.png").write_bytes(b"")
    changed = replace(setup.base, data=replace(setup.base.data, path=str(tmp_path)))
    assert place(setup, changed).folder != place(setup, setup.base).folder
    seeds = {planned_runs(setup, setup.study.rows[0], seed)[0].folder for seed in range(3)}
    assert len(seeds) == 3


class Interrupted(BaseException):
    pass


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """table3: row 2 by itself, then all, stopped in the middle of row 4, then the same command again."""
    out = tmp_path_factory.mktemp("studies")
    command = ["study", "table3", "--base", base, "--out", str(out)]
    assert main([*command, "--row", "2"]) == 0
    assert len(list((out / "runs").iterdir())) == 1
    assert not (out / "table3.md").exists()
    one = next((out / "runs").iterdir()) / "trained.json"
    before = one.read_bytes(), one.stat().st_mtime_ns

    write = Log.write
    runs = []

    def stop(self, record):
        write(self, record)
        if self.run.path not in runs:
            runs.append(self.run.path)
        if len(runs) == 3 and record["step"] == 3:  # rows 1, 3 and 4: row 2 is there
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Log, "write", stop)
        main(command)
    assert len(list((out / "runs").glob("*/trained.json"))) == 3
    assert main(command) == 0
    assert (one.read_bytes(), one.stat().st_mtime_ns) == before, "row 2 was not trained again"
    return out


def test_table3(finished, base):
    result = json.loads((finished / "table3.json").read_text())
    assert [tuple(row["label"]) for row in result["rows"]] == [row.label for row in studies.TABLE3.rows]
    folders = [row["seeds"][0]["runs"][0]["folder"] for row in result["rows"]]
    assert len(set(folders)) == 6
    for row, folder in zip(result["rows"], folders):
        run = row["seeds"][0]["runs"][0]
        config = HieraTok.from_pretrained(folder).config
        assert (config.downsample, config.attention) == tuple(row["label"])
        assert run["images_seen"] == 2 * STEPS
        assert run["seconds"] > 0
        assert run["hardware"]
    psnr = next(c for c in result["comparisons"] if c["measured"] == "psnr")["rows"]
    assert [line["paper"] for line in psnr] == [23.8, 23.7, 23.6, 23.7, 23.7, 23.0]
    for line, folder in zip(psnr, folders):
        assert line["ours"]["mean"] == pytest.approx(mean_psnr(folder), abs=1e-4)  # batches round otherwise
        assert line["difference"] == pytest.approx(line["ours"]["mean"] - line["paper"])
    for line in psnr[1:]:
        effect = line["ours"]["mean"] - psnr[0]["ours"]["mean"]
        assert line["effect"]["mean"] == pytest.approx(effect)
        assert line["verdict"] == ("agrees" if effect < 0 else "opposite"), "in the paper all fall"
    assert "verdict" not in psnr[0]


def mean_psnr(folder: str) -> float:
    tokenizer = HieraTok.from_pretrained(folder)
    source = open_source("bundled:val")
    values = []
    for i in range(len(source)):
        image = center_crop(source.image(i), 32)
        with torch.no_grad():
            decoded = tokenizer.decode(tokenizer.encode(image[None].float() / 127.5 - 1).mean)
        pixels = np.clip(np.floor(decoded[0].double().numpy() * 127.5 + 128), 0, 255)
        values.append(10 * math.log10(255**2 / np.mean((pixels - image.numpy()) ** 2)))
    return float(np.mean(values))


def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, base, tmp_path):
    setup = prepare(RunStudy(study="table3", base=base, out=str(tmp_path)))
    (planned,) = planned_runs(setup, studies.TABLE3.rows[3], 0)
    study_runs.train(planned)
    stopped = finished / "runs" / planned.folder.name
    whole, resumed = (HieraTok.from_pretrained(f).state_dict() for f in (planned.folder, stopped))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_a_study_killed_anywhere_ends_as_one_that_was_not(finished, base, tmp_path):
    """In training, between a run's end and its note, in measuring: and nothing is trained or measured twice."""
    options = RunStudy(study="table3", base=base, out=str(tmp_path))
    rng = random.Random()
    seed = rng.randrange(2**32)
    print(f"seed {seed}")  # shown by pytest if the test fails
    rng.seed(seed)
    for kills in range(5):
        process = start_process(study.run_study, options)
        while process.is_alive() and len(list(tmp_path.glob("runs/*/trained.json"))) <= kills:
            time.sleep(0.01)
        time.sleep(rng.random())
        process.kill()
        process.join()
    process = start_process(study.run_study, options)
    process.join()
    assert process.exitcode == 0
    whole, killed = (json.loads((out / "table3.json").read_text()) for out in (finished, tmp_path))
    for a, b in zip(whole["comparisons"], killed["comparisons"], strict=True):
        assert a["measured"] == b["measured"]
        for one, other in zip(a["rows"], b["rows"], strict=True):
            assert (one["ours"] is None) == (other["ours"] is None)
            assert not one["ours"] or one["ours"]["mean"] == pytest.approx(other["ours"]["mean"], rel=1e-3)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_before_any_write_is_mended(base, tmp_path, monkeypatch):
    """A copy of the folder before each file operation is what `kill -9` would leave there: from each copy the same
    command ends with the same files and numbers, trains and measures nothing twice, and leaves nothing half-written."""
    out, states = tmp_path / "out", tmp_path / "states"
    options = RunStudy(study="table2", base=base, out=str(out), features=FEATURES)
    process = start_process(run_and_keep_states, options, states)
    process.join()
    assert process.exitcode == 0
    whole, names = json.loads((out / "table2.json").read_text())["comparisons"], names_in(out)
    assert len(list(states.iterdir())) > 50
    make_small(monkeypatch.setitem)
    for state in sorted(states.iterdir()):
        shutil.rmtree(out)
        state.rename(out)
        done = [*out.rglob("trained.json"), *out.rglob("measured/*/metrics.json")]
        before = [path.stat().st_mtime_ns for path in done]
        assert study.run_study(options) is not None
        assert json.loads((out / "table2.json").read_text())["comparisons"] == whole, state.name
        assert names_in(out) == names, state.name
        assert [path.stat().st_mtime_ns for path in done] == before, state.name


def names_in(out: Path) -> set[str]:
    """Of all files and folders; TensorBoard makes another file at each start."""
    paths = (path.relative_to(out).as_posix() for path in out.rglob("*"))
    return {path for path in paths if "/tensorboard/" not in path}


def make_small(set_item: Callable) -> None:
    """Of table 2 one row, which measures all that studies measure, at the least size."""
    needs = ("reconstruction", "generation", "samples", "commutation")
    row = replace(studies.TABLE2.rows[1], against=None)
    set_item(studies.STUDIES, "table2", replace(studies.TABLE2, rows=(row,), needs=needs))
    set_item(studies.SIZES, "tiny", replace(small_size(), samples=2, curve_samples=2))


def run_and_keep_states(options: RunStudy, states: Path) -> None:
    """Run a study; before each operation that changes its folder, keep a copy of the folder."""
    make_small(dict.__setitem__)
    out, copying = Path(str(options.out)), threading.Lock()
    changing = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

    def keep(event: str, arguments: tuple) -> None:
        if event not in changing or copying.locked() or not str(arguments[0]).startswith(f"{out}/"):
            return
        path = Path(arguments[0])
        if event == "open":
            changes = arguments[2] & (os.O_WRONLY | os.O_RDWR) and path.suffix != checkpoint.TEMPORARY
        else:
            changes = path.exists() == (event != "os.mkdir")
        if not changes or not out.is_dir():
            return
        with copying:
            shutil.copytree(out, states / f"{len(list(states.iterdir())):04d}-{event}-{path.name}")

    states.mkdir()
    sys.addaudithook(keep)
    study.run_study(options)


def test_a_second_study_is_refused(base, tmp_path, capsys):
    """The same one in the same folder; rows by themselves and other studies may run."""
    with lock(tmp_path, "study table3", ".table3.lock"):
        assert main(["study", "table3", "--base", base, "--out", str(tmp_path)]) == 2
        told = f"is in use by `hieratok study table3`, process {os.getpid()} on host {socket.gethostname()}, since"
        assert told in capsys.readouterr().err
        assert main(["study", "table3", "--base", base, "--out", str(tmp_path), "--row", "1"]) == 0
        (run,) = (tmp_path / "runs").iterdir()
        with lock(run, "train"):
            (run / "trained.json").unlink()
            assert main(["study", "table3", "--base", base, "--out", str(tmp_path), "--row", "1"]) == 2
            assert "is in use by `hieratok train`" in capsys.readouterr().err


def test_the_pages_show_paper_and_ours(finished):
    page, text = ((finished / f"table3.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "md"))
    assert_self_contained(page)
    reader = Reader(page)
    assert not reader.open
    result = json.loads((finished / "table3.json").read_text())
    for shown in ("23.8", "68.5", "not measured", "-0.8 (worse)", "hieratok study table3"):
        assert shown in reader.text
        assert shown in text
    for comparison in result["comparisons"]:
        for line in comparison["rows"]:
            if line["ours"]:
                assert f"{line['ours']['mean']:.5g}" in reader.cells
            else:
                assert comparison["metric"] in ("rFID", "LPIPS", "gFID", "IS")
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 1 + 6 + 2
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("| -:")


@pytest.mark.slow
def test_two_processes_write_one_study(finished, base, tmp_path):
    """Training and evaluation share the images, and one process puts the study together."""
    command = ["-m", "hieratok", "study", "table3", "--base", base, "--out", str(tmp_path)]
    subprocess.run([*TORCHRUN, *command], check=True, env=environment(), timeout=500)
    one, two = (json.loads((out / "table3.json").read_text())["comparisons"] for out in (finished, tmp_path))
    assert [c["measured"] for c in one] == [c["measured"] for c in two]
    a, b = (next(c["rows"] for c in result if c["measured"] == "psnr") for result in (one, two))
    for x, y in zip(a, b, strict=True):  # a batch is two micro-batches here, which draw other noise than one
        assert x["ours"]["mean"] == pytest.approx(y["ours"]["mean"], abs=0.5)
        assert x["ours"]["mean"] != y["ours"]["mean"]


def test_plan(base, finished, tmp_path, capsys):
    command = ["study", "table3", "--base", base, "--plan"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{STEPS} of {STEPS} steps to train") == 6
    assert "tokenizers by a short measurement" in printed
    assert not list(tmp_path.iterdir())
    assert main([*command, "--out", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished") == 6
    assert "training left" not in printed
    assert main([*command, "--out", str(finished), "--seeds", "2", "--row", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished") == 1
    assert printed.count(f"seed 1, rows 5: {STEPS} of {STEPS} steps to train") == 1
    assert "by the logs of 1 of these runs" in printed


def test_steps_of_generators_and_samples_can_be_chosen_apart(base, tmp_path):
    options = RunStudy(study="table2", base=base, out=str(tmp_path), features=FEATURES, steps=7, samples=9)
    setup = prepare(options)
    _, generator = planned_runs(setup, setup.study.rows[0], 0)
    assert generator.run.train.steps == 7
    assert setup.size.samples == 9
    setup = prepare(replace(options, generator_steps=5))
    tokenizer, generator = planned_runs(setup, setup.study.rows[0], 0)
    assert (tokenizer.run.train.steps, generator.run.train.steps) == (7, 5)


def test_time_left_is_work_over_the_logged_rate(tmp_path, base):
    setup = prepare(RunStudy(study="table4", base=base, out=str(tmp_path)))
    runs = [planned_runs(setup, row, 0)[0] for _, row in setup.rows]
    for one, rate in zip(runs[:2], (100.0, 50.0)):
        one.folder.mkdir(parents=True)
        (one.folder / "log.jsonl").write_text(json.dumps({"step": 1, "images": 2, "images_per_second": rate}) + "\n")
    saved = runs[1].folder / "checkpoints" / "step-00000003"
    saved.mkdir(parents=True)
    (saved / "counters.json").write_text("{}")
    checkpoint.seal(saved, run=None, step=3)
    (saved.parent / "step-00000004").mkdir()  # not a checkpoint
    rates, source = study_runs.throughput(runs)
    work = [cost.measure(one.run.model).gflops for one in runs]
    speed = (100 * work[0] + 50 * work[1]) / 2
    assert [rates[one.folder] for one in runs] == pytest.approx([speed / amount for amount in work])
    assert "logs of 2 of these runs" in source
    assert [study_runs.images_left(one) for one in runs] == [2 * STEPS, 2, 2 * STEPS, 2 * STEPS]


# --- Effects ----------------------------------------------------------------------------------------------------------


def test_direction():
    one, unclear = study.interval([-0.3]), study.interval([-0.3, 0.2, -0.1])
    clear = study.interval([-0.3, -0.2, -0.25])
    assert study.verdict(-1.0, one) == study.verdict(-1.0, clear) == "agrees"
    assert study.verdict(1.0, one) == study.verdict(1.0, clear) == "opposite"
    assert study.verdict(-1.0, unclear) == study.verdict(1.0, unclear) == "not resolved"
    assert study.verdict(-1.0, study.interval([0.0])) == "not resolved"
    assert study.verdict(0.1 + 0.2 - 0.3, one) == "-", "a difference of nothing but rounding"
    assert study.verdict(None, one) == study.verdict(-1.0, None) == "-"


def test_interval_is_students():
    values = [1.0, 2.0, 4.0, 5.5]
    mean, low, high, n = study.interval(values)
    expected = student.interval(0.95, 3, np.mean(values), np.std(values, ddof=1) / 2)
    assert (mean, low, high, n) == (pytest.approx(np.mean(values)), *map(pytest.approx, expected), 4)


def test_effects_are_paired_by_seed():
    """Seeds differ by far more than rows do: unpaired, no effect would show."""
    setup = prepare(RunStudy(study="table4", seeds=3))
    cells = {}
    for i in range(4):
        for seed in range(3):
            numbers = {"psnr": 20.0 + 3 * seed - 0.5 * i + 0.01 * seed * i, "fd-other": 9.0 - i}
            cells[i, seed] = reconstructed(numbers, ("few images",))
    result = study.assemble(setup, cells).to_json()
    assert result["warnings"] == ["few images"]
    psnr, fd = ([c for c in result["comparisons"] if c["measured"] == key] for key in ("psnr", "fd-other"))
    line = psnr[0]["rows"][2]
    assert line["ours"]["low"] < line["ours"]["mean"] - 3
    assert line["effect"]["mean"] == pytest.approx(-0.98)
    assert line["effect"]["high"] < 0
    assert (line["paper_effect"], line["verdict"]) == (pytest.approx(-0.6), "agrees")
    assert (fd[0]["metric"], fd[0]["is_metric"]) == ("rFID", False)
    assert [x["difference"] for x in fd[0]["rows"]] == [None] * 4, "no difference between two networks' distances"
    assert [x["verdict"] for x in fd[0]["rows"][1:]] == ["agrees"] * 3
    del cells[2, 1]
    assert study.assemble(setup, cells).to_json()["comparisons"][1]["rows"][2]["effect"]["seeds"] == 2


# --- Speed-up ---------------------------------------------------------------------------------------------------------

GRID = [10, 20, 30, 40, 60, 80, 100]


def power(factor: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """gFID = 100 (factor step)^-0.7: reached `factor` times sooner than with factor 1."""
    deviations = np.random.default_rng(seed).normal(0, noise, len(GRID)) if noise else np.zeros(len(GRID))
    return [100 * (factor * s) ** -0.7 * math.exp(e) for s, e in zip(GRID, deviations)]


def test_speed_up_of_power_laws_is_their_factor():
    levels = speed_up(GRID, [power(1.0)], [power(1.6)])
    assert [level.baseline_step for level in levels] == pytest.approx([60, 80, 100])
    for level in levels:
        assert level.level == pytest.approx(100 * level.baseline_step**-0.7)
        assert level.step == pytest.approx(level.baseline_step / 1.6)
        assert (level.ratio, level.low, level.high) == pytest.approx((1.6, 1.6, 1.6))
        assert not level.at_least


def test_a_slower_curve_is_not_extrapolated():
    half, _, last = speed_up(GRID, [power(1.0)], [power(0.8)])
    assert half.ratio == pytest.approx(0.8)
    assert (last.step, last.ratio, last.low, last.high) == (None, None, None, None)


def test_a_curve_that_begins_below_gives_a_lower_bound():
    levels = speed_up(GRID, [power(1.0)], [power(30.0)])
    assert [(level.step, level.at_least) for level in levels] == [(pytest.approx(10), True)] * 3
    assert levels[2].ratio == pytest.approx(10)


def test_bumps_are_smoothed_and_widen_the_interval():
    bumpy = power(1.0)
    bumpy[3], bumpy[4] = bumpy[4], bumpy[3]
    level = speed_up(GRID, [bumpy], [power(1.5)])[2]
    assert level.ratio == pytest.approx(1.5)
    assert level.low is not None
    assert level.low < 1.4, "a curve with a bump in it knows its step less well"
    for seed in range(3):
        noisy = speed_up(GRID, [power(1.0, 0.05, seed)], [power(1.5, 0.05, 10 + seed)])[1]
        assert noisy.low is not None
        assert noisy.high is not None
        assert noisy.low < 1.5 < noisy.high
        assert noisy.high - noisy.low > 0.1
    several = speed_up(GRID, [power(f) for f in (0.9, 1.0, 1.1)], [power(f) for f in (1.4, 1.5, 1.6)])[1]
    assert several.ratio == pytest.approx((1.4 * 1.5 * 1.6 / (0.9 * 1.0 * 1.1)) ** (1 / 3))
    assert several.low is not None
    assert 1.4 / 1.1 - 1e-6 <= several.low < several.ratio


@pytest.mark.parametrize(
    ("steps", "values"),
    [([1, 2], [[2.0, 1.0]]), ([2, 1, 3], [[3.0, 2.0, 1.0]]), ([1, 2, 3], [[1.0, -1.0, 1.0]]), ([1, 2, 3], [[1.0]])],
)
def test_curves_that_are_none(steps, values):
    with pytest.raises(ValueError, match="curves"):
        speed_up(steps, values, values)


# --- Generators and latents -------------------------------------------------------------------------------------------


def test_figure4_and_generation(small_generators, base, tmp_path, capsys):
    options = dict(base=base, out=str(tmp_path), features=FEATURES)
    result = run_study(RunStudy(study="figure4", **options))
    found = result["speed_up"]
    assert found["measured"] == "fd-means"
    assert found["steps"] == [1, 2, 3, 4]
    assert list(found["curves"]) == ["single", "multi"]
    generator = Path(result["rows"][1]["seeds"][0]["runs"][1]["folder"])
    log = [json.loads(line) for line in (generator / "evaluations.jsonl").read_text().splitlines()]
    assert found["curves"]["multi"] == [[record["fd-means"] for record in log]]
    assert "1.38" in (tmp_path / "figure4.md").read_text()
    before = {path.name for path in (tmp_path / "runs").iterdir()}

    result = run_study(RunStudy(study="table6", **options))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == before, "the same runs serve table 6"
    by_name = {(c["metric"], c["measured"]): c for c in result["comparisons"]}
    assert set(by_name) == {("gFID", "fd-means"), ("IS", None)}
    assert not by_name["gFID", "fd-means"]["is_metric"]
    page = (tmp_path / "table6.md").read_text()
    assert "fd-means is not gFID" in page
    assert "| DiT-XL | multi | 13.3 |" in page


def test_table1_trains_two_stages_and_shows_other_systems(small_generators, base, tmp_path):
    setup = prepare(RunStudy(study="table1", base=base, out=str(tmp_path), features=FEATURES))
    ((index, row),) = setup.rows
    first, second, generator = planned_runs(setup, row, 0)
    assert second.run.start_from == str(first.folder)  # type: ignore[union-attr]
    assert generator.run.tokenizer == str(second.folder)  # type: ignore[union-attr]
    result = run_study(setup.options)
    measured = result["rows"][index]["seeds"][0]["measured"]
    assert measured["generation"]["n"] == measured["guided"]["n"] == 6
    folder = Path(result["rows"][index]["seeds"][0]["runs"][2]["folder"]) / "measured"
    weights = [json.loads(path.read_text())["settings"]["cfg"] for path in folder.glob("samples-*/metadata.json")]
    assert sorted(weights) == [1.0, 1.5]
    page = (tmp_path / "table1.md").read_text()
    assert "| VA-VAE + LightningDiT | conv | 0.28 | not run |" in page


def test_appendix_d_compares_scales(small_generators, base, tmp_path):
    result = run_study(RunStudy(study="appendix-d", base=base, out=str(tmp_path)))
    numbers = result["rows"][0]["seeds"][0]["measured"]["samples"]
    folder = Path(numbers["folder"])
    for side in (8, 16):
        values = []
        for path in sorted((folder / "32px").glob("*.png")):
            full = np.asarray(Image.open(path), dtype=np.float64)
            small = np.rint(full.reshape(side, 32 // side, side, 32 // side, 3).mean((1, 3)))
            own = np.asarray(Image.open(folder / f"{side}px" / path.name), dtype=np.float64)
            values.append(10 * math.log10(255**2 / np.mean((small - own) ** 2)))
        assert len(values) == 6
        assert numbers[f"psnr/{side}px"] == pytest.approx(np.mean(values), abs=0.02)  # halves round either way
    sizes = [
        (a["width"], a["height"])
        for a in Reader((tmp_path / "appendix-d.html").read_text()).tags("img")
        if a.get("src")
    ]
    assert sizes[:3] == [("8", "8"), ("16", "16"), ("32", "32")]


@pytest.fixture
def many_images(tmp_path) -> str:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(density.MIN_POINTS):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return str(folder)


def test_figure5_and_appendix_b(small_generators, base, tmp_path, many_images, monkeypatch):
    monkeypatch.setattr(density, "ITERATIONS", 250)
    options = dict(base=base, out=str(tmp_path / "out"), data=many_images, val=many_images)
    multi_alone = replace(studies.FIGURE5.rows[1], against=None)
    monkeypatch.setitem(studies.STUDIES, "figure5", replace(studies.FIGURE5, rows=(multi_alone,)))
    result = run_study(RunStudy(study="figure5", **options))
    assert [c["measured"] for c in result["comparisons"]] == ["density_cv", "gini", "normalized_entropy"]
    measured = result["rows"][0]["seeds"][0]["measured"]["density"]
    assert measured["manifest"]["protocol"] == "vavae", "the paper's"
    assert "VA-VAE's published procedure" in (tmp_path / "out" / "figure5.md").read_text()
    with np.load(Path(measured["folder"]) / "embedding.npz") as arrays:
        assert density.evenness(density.kernel_density(arrays["points"])).density_cv == pytest.approx(
            measured["density_cv"], rel=1e-6
        )
    reader = Reader((tmp_path / "out" / "figure5.html").read_text())
    assert len(reader.tags("svg")) == 1
    assert f"floor {measured['floor_gini']:.4f}" in reader.text

    result = run_study(RunStudy(study="appendix-b", **options))
    single, multi = (row["seeds"][0]["measured"]["commutation"] for row in result["rows"])
    assert multi["manifest"]["protocol"] == "ours"
    assert "pyramid_error/16px" in multi
    assert "pyramid_error/16px" not in single
    text = (tmp_path / "out" / "appendix-b.md").read_text()
    assert f"{multi['pyramid_error/16px']:.5g}" in text


def test_table7_counts_and_trains_nothing(tmp_path):
    result = run_study(RunStudy(study="table7", out=str(tmp_path)))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["table7.html", "table7.json", "table7.md"]
    assert result["size"] == "paper"
    parameters = result["comparisons"][0]["rows"]
    assert [line["ours"]["mean"] for line in parameters] == pytest.approx([346.25, 401.18], rel=0.002)
    page = (tmp_path / "table7.md").read_text()
    assert "| multi minus single | 54.93 | 54.9" in page  # one table, the increment in a row of its own, per cent
    assert "| 0 | 0 | 85 | 85 |" in page
    assert page.count("| tokenizer |") == 1


def test_size_paper_compares_samples_with_adms_statistics(tmp_path, many_images):
    options = RunStudy(study="table6", size="paper", out=str(tmp_path / "out"), data=many_images, val=many_images,
                       features=FEATURES)  # fmt: skip
    setup = prepare(options)
    assert study_runs.reference(setup) is None
    with pytest.raises(
        ValueError, match=r"VIRTUAL_imagenet256_labeled\.npz from https://.*: give it with --reference FILE"
    ):
        study.run_study(options)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"adm\.npz does not name its network, so it is FID's Inception"):
        study.run_study(replace(options, reference=str(tmp_path / "adm.npz")))
    assert not (tmp_path / "out").exists()
    given = replace(options, reference="real")
    generator = planned_runs(prepare(given), studies.TABLE6.rows[0], 0)[1].run
    assert generator.eval.reference == "real"  # type: ignore[union-attr]
    study_runs.check(prepare(replace(options, study="table2", features="none")))  # no samples: no reference
    study_runs.check(prepare(replace(options, size="tiny")))  # the held-out images


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel3"], "no study 'tabel3'; did you mean 'table3'?"),
        (["table3", "--row", "7"], "--row 7: table3 has rows 1 to 6"),
        (["table3", "--row", "0"], "--row must be at least 1, not 0"),
        (["table1", "--row", "3"], "another system's published result"),
        (["table3", "--size", "small"], "give --data PATH"),
        (["table3", "--data", "photos"], "give --val PATH"),
        (["table3", "--size", "huge"], "size"),
        (["table3", "--seeds", "0"], "--seeds must be at least 1"),
        (["table3", "--base", "dit-tiny"], "rows need a tokenizer of several scales"),
        (["table3", "--base", "tiny-single"], "rows need a tokenizer of several scales"),
        (["table3", "--sede", "3"], "did you mean 'seeds'?"),
        (["figure4"], "give --features NAME"),
        (["figure4", "--features", "squeezenet", "--steps", "2"], "at least 3 steps"),
        (["figure4", "--features", "squeezenet", "--steps", "9", "--generator_steps", "2"], "at least 3 steps"),
        (["table2", "--samples", "1"], "--samples must be at least 2"),
        (["table5"], "needs at least 92 held-out images, and bundled:val has 20"),
        (["table3", "--features", "squeezenet", "--weights", "missing.pth"], "missing.pth"),
        ([], "needs STUDY"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_encoders_compares_frozen_ones_with_the_papers(small_generators, base, tmp_path, many_images, monkeypatch):
    monkeypatch.setattr(density, "ITERATIONS", 250)
    vae, vit = save_autoencoder(tmp_path / "vae"), save_vit(tmp_path / "vit.safetensors")
    encoders = [f"diffusers:{vae}", f"timm:{VIT}={vit}"]
    out = tmp_path / "out"
    options = dict(base=base, out=str(out), data=many_images, val=many_images, features=FEATURES, encoders=encoders)
    result = run_study(RunStudy(study="encoders", **options))
    assert [row["label"] for row in result["rows"]] == [
        ["the paper's ViT, trained with the decoder"],
        [f"diffusers:{vae}"],
        [f"timm:{VIT}"],
    ]
    shapes = {"own": 16, "vae": 4, "vit": 64}
    for row, channels in zip(result["rows"], shapes.values(), strict=True):
        tokenizer, generator = row["seeds"][0]["runs"]
        assert tokenizer["settings"]["model"]["latent_channels"] == channels
        model = generator["settings"]["model"]
        assert (model["wide_width"] is not None) == (channels > model["width"])
        if model["wide_width"]:
            assert model["wide_width"] >= channels
            assert model["time_shift"] == "dimension"
    page = (out / "encoders.md").read_text()
    for title in ("Reconstruction", "Spectrum of the latents", "Generators' distance over steps"):
        assert f"## {title}" in page
    measured = result["rows"][1]["seeds"][0]["measured"]
    assert set(measured) >= {"reconstruction", "density", "spectrum", "curves"}
    for side, numbers in measured["reconstruction"]["scales"].items():
        assert f"| diffusers:{vae} | {side} px | {digits(numbers['psnr'])} |" in page


def test_encoders_that_cannot_be_compared(base):
    with pytest.raises(ValueError, match="--encoders is for the study encoders"):
        prepare(RunStudy(study="table3", base=base, encoders=["timm:x"]))
    with pytest.raises(ValueError, match="encoders compares frozen ones with the paper's: name some with --encoders"):
        prepare(RunStudy(study="encoders", base=base))
    with pytest.raises(ValueError, match="--encoders names one twice"):
        prepare(RunStudy(study="encoders", base=base, encoders=["timm:x", "timm:x"]))
    setup = prepare(RunStudy(study="encoders", base=base, encoders=["timm:nosuch"], plan=True))
    with pytest.raises(ValueError, match="timm has no model 'nosuch'"):
        [planned_runs(setup, row, 0) for _, row in setup.rows]
