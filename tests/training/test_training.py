"""Training runs: what resumes is bit-equal, what fails says so, and processes do not change the numbers."""

import errno
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from helpers.runs import (
    TORCHRUN,
    Crash,
    assert_same_run,
    crash_in_step,
    environment,
    final_state,
    last_step,
    same,
    small_run,
    start_process,
    write_run,
)
from hieratok import HieraTok
from hieratok.cli import main
from hieratok.core import checkpoint
from hieratok.core.checkpoint import read_table
from hieratok.core.errors import TrainingError
from hieratok.core.seeding import seed_of
from hieratok.core.typed import plain
from hieratok.losses.reconstruction import LossConfig, ReconstructionLoss
from hieratok.settings import load_run
from hieratok.training import step as step_module
from hieratok.training.config import DataConfig, Optimization, TrainConfig
from hieratok.training.generator import GeneratorRun
from hieratok.training.run_folder import Log, RunFolder, read_log
from hieratok.training.runs import read_run
from hieratok.training.step import learning_rate
from hieratok.training.tokenizer import EvalConfig, TokenizerRun, train_tokenizer


def assert_same_shown(a: Path, b: Path) -> None:
    """What was drawn and measured on the way: the same steps, pixels and numbers, and nothing half-written."""
    lines, pictures = ([], [])
    for out in (a, b):
        lines.append([json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()])
        pictures.append({path.name: np.asarray(Image.open(path)) for path in sorted((out / "pictures").iterdir())})
    assert lines[0] == lines[1]
    assert pictures[0].keys() == pictures[1].keys()
    assert all(np.array_equal(pictures[0][name], pictures[1][name]) for name in pictures[0])


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(photos, tmp_path):
    run = small_run(photos)
    tokenizer = train_tokenizer(run, tmp_path / "run")
    out = tmp_path / "run"
    assert yaml.safe_load((out / "config.yaml").read_text()) == plain(run)
    records = read_log(out / "log.jsonl")
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10, 12]
    assert records[-1]["loss"] < records[0]["loss"]
    expected = {"loss", "l1", "mse", "kl", "l1/4", "l1/8", "l1/16", "mse/4", "mse/8", "mse/16", "gradient_norm"}
    assert expected <= records[0].keys()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    assert sorted(p.name for p in (out / "pictures").iterdir()) == ["step-00000006.png", "step-00000012.png"]
    assert list((out / "tensorboard").iterdir())
    assert not list(out.rglob("*.tmp"))
    loaded = HieraTok.from_pretrained(out)
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded.decode(z), tokenizer.decode(z))


def test_only_the_latest_checkpoints_stay(photos, tmp_path):
    train_tokenizer(small_run(photos, save_every=2, keep_checkpoints=2), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]


def test_training_data_makes_a_difference(photos, tmp_path):
    """Guards the comparisons below: another seed is another run."""
    train_tokenizer(small_run(photos), tmp_path / "a")
    train_tokenizer(small_run(photos, seed=1), tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("at", [1, 5, 6, 9, 12])
def test_resumed_equals_uninterrupted(photos, tmp_path, at):
    """A crash in step `at`, between or right after checkpoints, then the same call again."""
    run = small_run(photos)
    train_tokenizer(run, tmp_path / "whole")
    crash_in_step(at, lambda: train_tokenizer(run, tmp_path / "crashed"))
    train_tokenizer(run, tmp_path / "crashed")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


@pytest.mark.parametrize(("log_every", "save_every", "at"), [(5, 4, 6), (5, 4, 9), (3, 2, 5), (50, 1, 8), (4, 12, 7)])
def test_means_in_the_log_do_not_depend_on_interruptions(photos, tmp_path, log_every, save_every, at):
    """A line's interval may begin before the checkpoint that a run resumes from."""
    run = small_run(photos, log_every=log_every, save_every=save_every, picture_every=0)
    train_tokenizer(run, tmp_path / "whole")
    crash_in_step(at, lambda: train_tokenizer(run, tmp_path / "crashed"))
    train_tokenizer(run, tmp_path / "crashed")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


def test_counts_do_not_depend_on_interruptions(photos, tmp_path, monkeypatch):
    """Of skipped steps and images since the last line in the log, and of bad steps in a row."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for image in photos.iterdir():
        (folder / image.name).write_bytes(image.read_bytes())
    (folder / "4.png").write_text("not a picture")
    run = small_run(folder, log_every=5, max_bad_steps=3, picture_every=0)
    run = replace(run, data=replace(run.data, on_bad_image="skip"))
    bad = {4, 5}
    calls = poison(monkeypatch, lambda call: call in bad)
    train_tokenizer(run, tmp_path / "whole")
    calls.clear()
    crash_in_step(6, lambda: train_tokenizer(run, tmp_path / "crashed"))
    bad |= {7}  # step 5 again: the calls went on to 6
    train_tokenizer(run, tmp_path / "crashed")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")
    last = read_log(tmp_path / "crashed" / "log.jsonl")[-1]
    assert last["skipped_steps"] == 2
    assert last["bad_images"] > 0


def judged_run(photos: Path, **train) -> TokenizerRun:
    """With evaluations and pictures on the way."""
    run = small_run(photos, **train)
    return replace(run, data=replace(run.data, val_path=str(photos)), eval=EvalConfig(every=4, num_images=4))


@pytest.mark.parametrize(("what", "step"), [("picture", 6), ("picture", 12), ("evaluation", 8), ("evaluation", 12)])
@pytest.mark.parametrize("is_written", [False, True])
def test_what_a_killed_run_owed_is_done(photos, tmp_path, monkeypatch, what, step, is_written):
    """Crashed between checkpoint and picture or evaluation, or right after them: done once, as it would have been."""
    run = judged_run(photos, save_every=2)
    train_tokenizer(run, tmp_path / "whole")
    original = getattr(Log, what)

    def crash(self, *args):
        now = args[1] if what == "picture" else args[0]["step"]
        if now != step or is_written:
            original(self, *args)
        if now == step:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Log, what, crash)
        with pytest.raises(Crash):
            train_tokenizer(run, tmp_path / "crashed")
    train_tokenizer(run, tmp_path / "crashed")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")
    assert_same_shown(tmp_path / "whole", tmp_path / "crashed")


def test_a_finished_run_can_be_judged_afterwards(photos, tmp_path):
    run = judged_run(photos)
    train_tokenizer(replace(run, eval=EvalConfig()), tmp_path)
    train_tokenizer(run, tmp_path)
    train_tokenizer(run, tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()] == [12]


@pytest.mark.parametrize("step", ["sync", "replace"])
def test_crash_while_saving(photos, tmp_path, monkeypatch, step):
    """A checkpoint that was being written does not count, and its remains are cleared away."""
    run = small_run(photos)
    train_tokenizer(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies nothing
        calls = []
        module, name = (checkpoint, "sync") if step == "sync" else (checkpoint.os, "replace")
        original = getattr(module, name)

        def crash(path, *args):
            if "step-00000008" in str(path):
                calls.append(path)
                if len(calls) == 3 or step == "replace":
                    raise Crash
            return original(path, *args)

        patch.setattr(module, name, crash)
        with pytest.raises(Crash):
            train_tokenizer(run, tmp_path / "crashed")
    assert list((tmp_path / "crashed" / "checkpoints").glob(".*.tmp"))
    train_tokenizer(run, tmp_path / "crashed")
    assert not list((tmp_path / "crashed" / "checkpoints").glob(".*.tmp"))
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


def test_a_finished_run_stays_as_it_is(photos, tmp_path):
    run = small_run(photos)
    train_tokenizer(run, tmp_path)
    before = final_state(tmp_path)
    train_tokenizer(run, tmp_path)
    assert all(same(v, before[k]) for k, v in final_state(tmp_path).items())


def test_gradient_accumulation_changes_only_rounding(photos, tmp_path):
    """drop_path and sampling noise are drawn per micro-batch, so they are off here: one against two micro-batches."""
    run = small_run(photos)
    quiet = replace(run, model=replace(run.model, drop_path=0.0))
    losses = []
    for micro in (4, 2):
        torch.manual_seed(0)
        run = replace(quiet, train=replace(quiet.train, micro_batch_size=micro, steps=1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hieratok.tokenizer.posterior.DiagonalGaussian.sample", lambda self: self.mode())
            train_tokenizer(run, tmp_path / str(micro))
        losses.append(json.loads((tmp_path / str(micro) / "log.jsonl").read_text()))
    for name in ("loss", "gradient_norm", "l1/16", "kl"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-5)


# --- real processes ---------------------------------------------------------------------------------------------------


def kill_and_finish(run: TokenizerRun, out: Path, untils: Iterable[int], rng: random.Random) -> None:
    """Train; kill -9 a little after the log passes each of `untils`, and train again; then to the end."""
    for until in untils:
        process = start_process(train_tokenizer, run, out)
        while last_step(out) < until and process.is_alive():
            time.sleep(0.01 * rng.random())
        time.sleep(0.05 * rng.random())
        assert process.is_alive(), "the run ended before it could be killed"
        process.kill()
        process.join()
    process = start_process(train_tokenizer, run, out)
    process.join()
    assert process.exitcode == 0


def assert_kills_do_not_matter(photos: Path, tmp_path: Path, steps: int, kills: int) -> None:
    run = judged_run(photos, steps=steps, save_every=7, log_every=3, picture_every=11)
    run = replace(run, data=replace(run.data, num_workers=1))
    rng = random.Random()
    seed = rng.randrange(2**32)
    print(f"seed {seed}")  # shown by pytest if the test fails
    rng.seed(seed)
    kill_and_finish(run, tmp_path / "whole", [], rng)
    kill_and_finish(run, tmp_path / "killed", sorted(rng.sample(range(9, int(0.8 * steps)), kills)), rng)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_same_shown(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob(".*"))


def test_kill_9_at_random_moments(photos, tmp_path):
    """With a loader process, in training, saving, drawing or judging: the same as never interrupted."""
    assert_kills_do_not_matter(photos, tmp_path, steps=100, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_lose_nothing(photos, tmp_path):
    assert_kills_do_not_matter(photos, tmp_path, steps=600, kills=50)


def test_a_second_train_is_refused_and_harms_nothing(photos, tmp_path, capsys):
    run = small_run(photos, steps=150, save_every=1, log_every=1, picture_every=0)
    first = start_process(train_tokenizer, run, tmp_path / "out")
    while last_step(tmp_path / "out") < 3:
        assert first.is_alive()
        time.sleep(0.01)
    living = list((tmp_path / "out" / "checkpoints").glob(".*.tmp"))
    told = rf"out is in use by `hieratok train`, process {first.pid} on host {socket.gethostname()}, since 20\d\d-"
    with pytest.raises(ValueError, match=told):
        train_tokenizer(run, tmp_path / "out")
    config = write_run(run, tmp_path / "run.yaml")
    for arguments in (["train", config], ["train", config, "--allow-changes", "--train.steps", "12"]):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(told, line)
    assert first.is_alive(), living
    first.join()
    assert first.exitcode == 0
    train_tokenizer(run, tmp_path / "alone")
    state = [final_state(tmp_path / name) for name in ("out", "alone")]
    assert all(same(state[0][name], state[1][name]) for name in state[0] if name != "counters")  # threads may differ


def test_two_processes_equal_one_with_two_micro_batches(photos, tmp_path):
    """Real torchrun with gloo: the same losses to 1e-5, noise included, because a step is what defines it."""
    run = small_run(photos, steps=6, log_every=1, micro_batch_size=2, picture_every=0)
    train_tokenizer(run, tmp_path / "one")
    config = write_run(run, tmp_path / "run.yaml")
    subprocess.run(
        [*TORCHRUN, "-m", "hieratok", "train", config, "--out", str(tmp_path / "two")],
        check=True,
        env=environment(),
        timeout=300,
    )
    one, two = read_log(tmp_path / "one" / "log.jsonl"), read_log(tmp_path / "two" / "log.jsonl")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        for name in ("loss", "l1/4", "mse/16", "kl", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def poison(monkeypatch, is_bad) -> list[int]:
    """Make the reconstruction loss NaN in the calls for which `is_bad(number of the call)`; the calls so far."""
    original = ReconstructionLoss.forward
    calls: list[int] = []

    def poisoned(self, *args):
        loss, *others = original(self, *args)
        calls.append(len(calls) + 1)
        return (loss * float("nan") if is_bad(len(calls)) else loss), *others

    monkeypatch.setattr(ReconstructionLoss, "forward", poisoned)
    return calls


def test_a_bad_step_is_left_out_counted_and_logged(photos, tmp_path, monkeypatch):
    run = small_run(photos, steps=6, log_every=1, save_every=1, keep_checkpoints=6)
    poison(monkeypatch, lambda call: call == 3)
    train_tokenizer(run, tmp_path)
    records = read_log(tmp_path / "log.jsonl")
    assert [r["skipped_steps"] for r in records] == [0, 0, 1, 1, 1, 1]
    assert "loss" not in records[2]
    assert records[3]["loss"] < 10
    before, after, later = (
        load_file(tmp_path / "checkpoints" / f"step-0000000{step}" / "tokenizer.safetensors") for step in (2, 3, 4)
    )
    assert all(torch.equal(before[k], after[k]) or "latent" in k for k in before)
    assert any(not torch.equal(later[k], after[k]) for k in before if "latent" not in k)
    moments = [
        torch.load(tmp_path / "checkpoints" / f"step-0000000{step}" / "tokenizer-optimizer.pt", weights_only=True)
        for step in (2, 3)
    ]
    for name, state in moments[0]["state"].items():
        assert all(torch.equal(state[k], moments[1]["state"][name][k]) for k in ("exp_avg", "exp_avg_sq", "step"))


def test_bad_steps_in_a_row_go_back_to_the_last_checkpoint(photos, tmp_path, monkeypatch, capsys):
    """Steps 6 to 8 fail: back to step 4 with the data in another order, then to the end."""
    run = small_run(photos, log_every=1, max_bad_steps=3)
    calls = poison(monkeypatch, lambda call: 6 <= call <= 8)
    train_tokenizer(run, tmp_path)
    assert len(calls) == 12 + 4
    records = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["rollbacks"] for r in records] == [0] * 4 + [1] * 8
    assert "not finite from step 6 on; the last checkpoint before that is" in capsys.readouterr().err
    monkeypatch.undo()
    train_tokenizer(small_run(photos, log_every=1, max_bad_steps=3), tmp_path / "healthy")
    healthy = read_log(tmp_path / "healthy" / "log.jsonl")
    assert all(a["loss"] == b["loss"] for a, b in zip(records[:4], healthy[:4]))
    assert records[5]["loss"] != healthy[5]["loss"]


def test_after_too_many_rollbacks_a_run_stops_with_a_message(photos, tmp_path, monkeypatch):
    run = small_run(photos, max_bad_steps=2, max_rollbacks=2)
    poison(monkeypatch, lambda call: call >= 7)
    message = r"not finite from step 5 on \(after 2 rollbacks\); the last checkpoint .* is .*step-00000004"
    with pytest.raises(TrainingError, match=message):
        train_tokenizer(run, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (tmp_path / "tokenizer").exists()


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(photos, tmp_path, monkeypatch):
    poison(monkeypatch, lambda call: True)
    with pytest.raises(TrainingError, match="not finite from step 1 on; no checkpoint was written before it"):
        train_tokenizer(small_run(photos, max_bad_steps=3), tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(save_every=4), r"from step 2 on; no checkpoint was written before it"),
        (dict(save_every=4, picture_every=0), r"from step 2 on; no checkpoint was written before it"),
        (
            dict(save_every=1, picture_every=0, max_bad_steps=2),
            r"from step 2 on \(after 3 rollbacks\); the last checkpoint before that is .*step-00000001",
        ),
        (dict(save_every=1, picture_every=1), r"from step \d on; no checkpoint was written before it"),
        (dict(save_every=1, learning_rate=1e39, min_learning_rate=1e39), r"from step 1 on; no checkpoint was written"),
    ],
)
def test_divergence_is_said_in_one_line(photos, tmp_path, capsys, settings, told):
    """Whatever meets what is not finite first: a bad last step, too many in a row, a picture, or the weights."""
    run = small_run(photos, **{"learning_rate": 1e30, "min_learning_rate": 1e30, **settings})
    config = write_run(run, tmp_path / "run.yaml")
    assert main(["train", config, "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("hieratok: the run diverged: loss, gradient or weights are not finite from step")
    assert re.search(told, line)
    assert line.endswith("Try a lower learning rate, or fp32")
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_a_run_of_skipped_steps_ends_in_an_error(photos, tmp_path, monkeypatch, capsys):
    """Fewer of them than `max_bad_steps`; and it is not for publishing."""
    run = small_run(photos, save_every=2, picture_every=0)
    with monkeypatch.context() as patch:
        poison(patch, lambda call: True)
        with pytest.raises(TrainingError, match=r"not finite from step 1 on; no checkpoint was written before it"):
            train_tokenizer(run, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer").exists()
    assert main(["push", str(tmp_path / "out"), "a/b", "--license", "mit", "--dry_run"]) == 2
    assert "learned nothing: all of its 10 steps were skipped as not finite" in capsys.readouterr().err


def test_a_bad_last_step_is_done_again(photos, tmp_path, monkeypatch):
    """From the last checkpoint, with the data in another order: the last step's weights would be untried."""
    calls = poison(monkeypatch, lambda call: call == 12)
    train_tokenizer(small_run(photos, log_every=1), tmp_path)
    assert len(calls) == 12 + 4
    assert [r["rollbacks"] for r in read_log(tmp_path / "log.jsonl")] == [0] * 8 + [1] * 4


def test_checkpoints_from_before_a_bad_streak_stay(photos, tmp_path, monkeypatch):
    """However often is saved meanwhile."""
    run = small_run(photos, save_every=1, keep_checkpoints=1, max_bad_steps=4, max_rollbacks=1, log_every=1)
    poison(monkeypatch, lambda call: call >= 6)
    with pytest.raises(TrainingError, match=r"from step 6 on \(after 1 rollback\); .* is .*step-00000005"):
        train_tokenizer(run, tmp_path)


def test_full_disk_leaves_nothing_half_written(photos, tmp_path):
    """Files are limited to 40 kB by the system, as on a full disk: one line, status 1, no remains."""
    config = write_run(small_run(photos), tmp_path / "run.yaml")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
        "from hieratok.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", config, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hieratok: ")
    assert os.strerror(errno.EFBIG) in last
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_other_settings_are_refused_by_name(photos, tmp_path):
    run = small_run(photos)
    train_tokenizer(run, tmp_path)
    changed = replace(run, train=replace(run.train, seed=5, log_every=3), model=replace(run.model, drop_path=0.1))
    with pytest.raises(
        ValueError, match=r"model\.drop_path 0\.2 -> 0\.1, train\.seed 0 -> 5\): choose another --out, or"
    ):
        train_tokenizer(changed, tmp_path)
    train_tokenizer(replace(run, train=replace(run.train, log_every=3)), tmp_path)
    longer = replace(run, train=replace(run.train, steps=14))
    train_tokenizer(longer, tmp_path, allow_changes=True)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 14
    config = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(config) == plain(longer)
    wider = replace(longer, model=replace(run.model, encoder_width=2 * run.model.encoder_width))
    for impossible, message in (
        (wider, "holds checkpoints of another model .*model.encoder_width.* cannot change"),
        (run, "has done 14 steps: train.steps must be at least that, not 12"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tokenizer(impossible, tmp_path, allow_changes=True)
        assert (tmp_path / "config.yaml").read_text() == config


def test_what_is_not_a_checkpoint_of_this_run_does_not_count(photos, tmp_path, caplog):
    """Neither resumed from nor counted nor deleted: copies, other runs' checkpoints, and odd names."""
    run = small_run(photos, keep_checkpoints=1)
    train_tokenizer(run, tmp_path / "whole")
    train_tokenizer(small_run(photos, seed=1), tmp_path / "other")
    out = tmp_path / "out"
    crash_in_step(7, lambda: train_tokenizer(run, out))
    checkpoints = out / "checkpoints"
    own = checkpoints / "step-00000004"
    for name in ("step-00000099", "step-00000004 (copy)", "step-4", "step-000000005", "step-0000000\u0665", "other"):
        shutil.copytree(own, checkpoints / name)
    for step in (8, 12):  # one in the way, one that would be the newest
        shutil.copytree(tmp_path / "other" / "checkpoints" / f"step-{step:08d}", checkpoints / f"step-{step:08d}")
    (checkpoints / "step-00000050").write_text("a file")
    (checkpoints / "step-00000051").symlink_to(own)
    foreign = {p.name: contents(p) for p in checkpoints.iterdir() if p.is_dir() and p != own and not p.is_symlink()}
    assert [path.name for path in checkpoint.step_folders(out)] == ["step-00000004"]
    assert read_run(out).state.startswith("step 6 of 12")
    assert checkpoint.find(out, inside="tokenizer") == own / "tokenizer"

    train_tokenizer(run, out)
    assert "step-00000099 is not a checkpoint of this run: ignored" in caplog.text
    assert [path.name for path in checkpoint.step_folders(out)] == ["step-00000012"]
    for name in ("step-00000008", "step-00000012"):
        (aside,) = checkpoints.glob(f"not-this-runs-{name}-*")
        assert contents(aside) == foreign.pop(name)
    assert all(contents(checkpoints / name) == files for name, files in foreign.items())
    assert (checkpoints / "step-00000050").read_text() == "a file"
    ours, whole = ((path / "checkpoints" / "step-00000012") for path in (out, tmp_path / "whole"))
    name = "tokenizer.safetensors"
    assert (ours / name).read_bytes() == (whole / name).read_bytes()
    for path in [p for p in checkpoints.iterdir() if p.name != "step-00000012"]:
        checkpoint.remove(path)
    assert_same_run(tmp_path / "whole", out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_begun_before_runs_had_an_id_goes_on(photos, tmp_path):
    """Its checksums.json holds the files alone, and its counters no interval."""
    run = small_run(photos)
    train_tokenizer(run, tmp_path / "whole")
    crash_in_step(9, lambda: train_tokenizer(run, tmp_path / "old"))
    (tmp_path / "old" / "run.json").unlink()
    for folder in (tmp_path / "old" / "checkpoints").iterdir():
        counters = json.loads((folder / "counters.json").read_text())
        old = {name: counters[name] for name in ("step", "bad_images", "skipped_steps", "rollbacks")}
        (folder / "counters.json").write_text(json.dumps(old))
        checkpoint.seal(folder)
        files = json.loads((folder / "checksums.json").read_text())["files"]
        files.pop("checksums.json")
        (folder / "checksums.json").write_text(json.dumps(files))
    train_tokenizer(run, tmp_path / "old")
    assert_same_run(tmp_path / "whole", tmp_path / "old")


def test_damaged_checkpoints_take_no_good_ones_place(photos, tmp_path):
    """One is kept, and the newest is damaged: the next one saved stays."""
    run = small_run(photos, keep_checkpoints=1, save_every=5)
    train_tokenizer(run, tmp_path)
    (tmp_path / "checkpoints" / "step-00000012" / "counters.json").write_text("{}")
    shutil.copytree(tmp_path / "checkpoints" / "step-00000012", tmp_path / "kept")
    with pytest.raises(TrainingError, match=r"is damaged \(the newest: counters.json has changed\): remove them"):
        train_tokenizer(run, tmp_path)
    checkpoint.remove(tmp_path / "checkpoints" / "step-00000012")
    crash_in_step(8, lambda: train_tokenizer(run, tmp_path))
    shutil.copytree(tmp_path / "kept", tmp_path / "checkpoints" / "step-00000012")
    crash_in_step(11, lambda: train_tokenizer(run, tmp_path))
    names = [path.name for path in checkpoint.step_folders(tmp_path)]
    assert names == ["step-00000012", "step-00000010"]


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "a/./b", "", ".", "..", " ", "a//b", "a/", "\\x", "..\\x", "C:/x", "a\0b"]
)
def test_a_name_leads_to_no_other_place(photos, tmp_path, name):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"name": name, "data": {"path": str(photos)}}))
    with pytest.raises(ValueError, match="does not lead to a folder in runs/: choose another, or set --out"):
        load_run(str(path))
    with pytest.raises(ValueError, match="does not lead to a folder in runs/"):
        GeneratorRun(name=name)


@pytest.mark.parametrize("name", ["a", "a/b", "v1.2", "..a", "été 2026", "f16d16-multi"])
def test_names_of_runs(name):
    assert TokenizerRun(name=name).name == name


def test_another_number_of_threads_is_said(photos, tmp_path, caplog):
    run = small_run(photos)
    threads = torch.get_num_threads()
    crash_in_step(9, lambda: train_tokenizer(run, tmp_path))
    torch.set_num_threads(threads + 1)
    try:
        train_tokenizer(run, tmp_path)
    finally:
        torch.set_num_threads(threads)
    told = f"was trained with {threads} threads up to here, and continues with {threads + 1}"
    assert told in caplog.text
    caplog.clear()
    train_tokenizer(small_run(photos), tmp_path / "other")
    train_tokenizer(small_run(photos), tmp_path / "other")
    assert "threads" not in caplog.text


def test_other_commands_files_are_left_alone(photos, tmp_path):
    """Half-written ones in a run's folder may be a living process's; this run's own cannot, as it holds the lock."""
    others = [".hub.12345678.tmp", ".metrics.json.12345678.tmp", "evaluation/.metrics.json.12345678.tmp"]
    own = [".config.yaml.12345678.tmp", ".tokenizer.12345678.tmp", "checkpoints/.step-00000004.12345678.tmp"]
    for name in [*others, *own]:
        (tmp_path / name).mkdir(parents=True)
    train_tokenizer(small_run(photos), tmp_path)
    assert all((tmp_path / name).is_dir() for name in others)
    assert not any((tmp_path / name).exists() for name in own)


@pytest.mark.parametrize("content", ["", "- 1\n", "{", "\x00"])
def test_a_damaged_config_is_one_line(photos, tmp_path, content):
    train_tokenizer(small_run(photos), tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml (holds no settings|is not valid YAML.*): remove it"):
        train_tokenizer(small_run(photos), tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "missing", "no checksums", "not named"])
def test_a_damaged_checkpoint_is_passed_over(photos, tmp_path, damage, caplog):
    """The one before it is used, with a warning, and the run ends as if nothing had happened."""
    run = small_run(photos)
    train_tokenizer(run, tmp_path / "whole")
    train_tokenizer(run, tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "step-00000012"
    weights = newest / "tokenizer.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:100])
    elif damage == "zeroed":
        weights.write_bytes(whole[:-64] + bytes(64))
    elif damage == "missing":
        (newest / "tokenizer-optimizer.pt").unlink()
    elif damage == "no checksums":
        (newest / "checksums.json").unlink()
    else:
        weights.unlink()
        checkpoint.seal(newest, **{k: v for k, v in read_table(newest / "checksums.json").items() if k != "files"})
    train_tokenizer(run, tmp_path / "damaged")
    assert "step-00000012 is damaged" in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


def test_nothing_but_damaged_checkpoints(photos, tmp_path):
    run = small_run(photos)
    train_tokenizer(run, tmp_path)
    for weights in tmp_path.glob("checkpoints/*/tokenizer.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(
        TrainingError, match=r"every checkpoint in .* is damaged \(the newest: tokenizer\.safetensors has changed\)"
    ):
        train_tokenizer(run, tmp_path)


def test_no_images_leave_no_folder(photos, tmp_path):
    run = small_run(photos)
    (tmp_path / "empty").mkdir()
    for path in (None, str(tmp_path / "empty"), str(tmp_path / "nowhere")):
        with pytest.raises((ValueError, FileNotFoundError)):
            train_tokenizer(replace(run, data=replace(run.data, path=path)), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth"):
        train_tokenizer(
            replace(run, loss=LossConfig(trunk_weights=str(tmp_path / "vgg16-397923af.pth"))), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_unreadable_image_is_named_or_counted(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for image in photos.iterdir():
        (folder / image.name).write_bytes(image.read_bytes())
    (folder / "4.png").write_text("not a picture")
    run = small_run(folder)
    with pytest.raises(ValueError, match=r"4\.png"):
        train_tokenizer(run, tmp_path / "strict")
    train_tokenizer(replace(run, data=replace(run.data, on_bad_image="skip")), tmp_path / "lenient")
    assert read_log(tmp_path / "lenient" / "log.jsonl")[-1]["bad_images"] > 0


def test_batch_must_divide():
    with pytest.raises(ValueError, match=r"batch_size 10 is not a multiple of train\.micro_batch_size 4"):
        TrainConfig(batch_size=10, micro_batch_size=4)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (TrainConfig, dict(steps=0), "train.steps must be at least 1"),
        (TrainConfig, dict(warmup_ratio=1.0), "warmup_ratio"),
        (TrainConfig, dict(learning_rate=0.0), "learning_rate"),
        (DataConfig, dict(min_area=0.0), "data.min_area"),
        (DataConfig, dict(num_workers=-1), "data.num_workers"),
        (LossConfig, dict(l1_weight=-1.0), "loss.l1_weight"),
        (LossConfig, dict(scale_weights=(0.0, 0.0)), "loss.scale_weights"),
    ],
)
def test_bad_settings(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_a_run_in_progress_can_be_looked_at(photos, tmp_path):
    """Before the end, the latest checkpoint's averaged weights serve."""
    train_tokenizer(small_run(photos), tmp_path)
    checkpoint.shutil.rmtree(tmp_path / "tokenizer")
    assert isinstance(HieraTok.from_pretrained(tmp_path), HieraTok)


def test_half_a_line_in_the_log_is_passed_over(photos, tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.log_file.write_text('{"step": 1}\n[]\n{"step": "2"}\n3\n{"step": 2}\n{"st')
    folder.truncate_logs(1)
    assert folder.log_file.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("killed_before", ["the first rename", "the second rename", "the removal"])
def test_a_folder_that_is_replaced_is_never_lost(tmp_path, monkeypatch, killed_before):
    """Killed anywhere, the old one or the new one is there, whole, once what is left has been cleared."""

    class Killed(BaseException):
        pass

    folder, at = (
        tmp_path / "step-00000004",
        ["the first rename", "the second rename", "the removal"].index(killed_before),
    )
    folder.mkdir()
    (folder / "content").write_text("old")
    rename, rmtree, calls = os.rename, shutil.rmtree, []

    def kill_or(call: Callable, *arguments: object, **options: object) -> None:
        calls.append(call)
        if len(calls) > at:
            raise Killed
        call(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "rename", lambda *a: kill_or(rename, *a))
        patch.setattr(shutil, "rmtree", lambda *a, **k: kill_or(rmtree, *a, **k))
        with checkpoint.atomic_folder(folder) as temporary:
            (temporary / "content").write_text("new")
    assert len(list(tmp_path.iterdir())) == 2
    checkpoint.remove_leftovers(tmp_path / "step-*")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert (folder / "content").read_text() == ("new" if killed_before == "the removal" else "old")


def test_a_folder_whose_successor_cannot_take_its_place_stays(tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", os.rename
    folder.mkdir()

    def fail(source: Path, target: Path) -> None:
        if source.suffix == checkpoint.TEMPORARY:
            raise OSError(errno.EIO, "disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="disk"), checkpoint.atomic_folder(folder):
        pass
    assert list(tmp_path.iterdir()) == [folder]


# --- schedule, averages, optimiser ------------------------------------------------------------------------------------


def test_learning_rate_schedule():
    config = Optimization(learning_rate=1e-4, min_learning_rate=1e-6, warmup_ratio=0.03)
    rates = np.array([learning_rate(step, config, 1000) for step in range(1000)])
    np.testing.assert_allclose(rates[:30], 1e-4 * np.arange(1, 31) / 30)
    t = np.arange(970) / 969
    np.testing.assert_allclose(rates[30:], 1e-6 + (1e-4 - 1e-6) * (1 + np.cos(np.pi * t)) / 2)
    assert rates[-1] == pytest.approx(1e-6)


def test_ema_against_its_definition():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    ema = torch.nn.Linear(3, 2).requires_grad_(False)
    expected = ema.weight.double().clone()
    for step in range(50):
        with torch.no_grad():
            model.weight.normal_()
        step_module.update_ema(ema, model, step, 0.5)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_norms_biases_and_positions():
    model = HieraTok(small_run(Path("x")).model)
    optimizer = step_module.make_optimizer(model, TrainConfig(), torch.device("cpu"))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    spared = {names[id(p)] for p in optimizer.param_groups[1]["params"]}
    assert decayed | spared == set(names.values())
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    assert {"encoder.positions", "decoder.positions", "decoder.scale_embeddings", "decoder.head.bias"} <= spared
    assert all("norm" not in n and "bias" not in n for n in decayed)
    assert {"decoder.head.weight", "encoder.patch_embed.weight", "downsample.branches.0.patch.weight"} <= decayed


def test_seeds_differ():
    seeds = {seed_of(seed, step, micro) for seed in range(5) for step in range(50) for micro in range(4)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)
