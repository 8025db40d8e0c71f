"""Stage 2 (GAN, vf-loss, frozen encoder) and several processes: bit-equal resume, and the same numbers either way."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from helpers.runs import (
    TORCHRUN,
    assert_same_run,
    command,
    crash_in_step,
    environment,
    final_state,
    last_step,
    small_run,
    write_run,
)
from hieratok import HieraTok
from hieratok.cli import main
from hieratok.core.errors import Stopped
from hieratok.data.images import to_float
from hieratok.losses.adversarial import AdversarialConfig
from hieratok.losses.vf import VFConfig
from hieratok.studies import recipes
from hieratok.training import step as step_module
from hieratok.training.config import Optimization
from hieratok.training.run_folder import read_log
from hieratok.training.step import learning_rate
from hieratok.training.tokenizer import EvalConfig, TokenizerObjective, TokenizerRun, train_tokenizer

GAN = AdversarialConfig(
    discriminator="patchgan",
    width=4,
    num_layers=1,
    lecam_weight=1e-3,
    r1_weight=0.1,
    r1_interval=2,
    diffaugment=True,
    generator_start=3,
    ramp_steps=4,
    discriminator_learning_rate=1e-3,
    discriminator_min_learning_rate=1e-5,
)


@pytest.fixture(scope="module")
def stage1(photos, tmp_path_factory) -> Path:
    """A finished first stage."""
    out = tmp_path_factory.mktemp("stage1")
    train_tokenizer(small_run(photos, steps=4), out)
    return out


def stage2_run(photos: Path, stage1: Path, **train) -> TokenizerRun:
    return replace(small_run(photos, **train), start_from=str(stage1), gan=GAN)


# --- what stage 2 does ------------------------------------------------------------------------------------------------


def test_stage_2_starts_from_stage_1(photos, stage1, tmp_path):
    before = HieraTok.from_pretrained(stage1)
    run = stage2_run(photos, stage1)
    train_tokenizer(run, tmp_path)
    records = read_log(tmp_path / "log.jsonl")
    assert {"discriminator/loss", "discriminator/lecam", "logits/real", "logits/fake", "loss"} <= records[0].keys()
    assert "adversarial" not in records[0]  # steps 1 and 2: the generator does not feel it yet
    assert [r.get("adversarial_weight", 0) > 0 for r in records] == [False, True, True, True, True, True]
    assert records[-1]["adversarial_weight"] == pytest.approx(0.6 / 3)  # of the finest of three scales
    assert records[-1]["discriminator/gradient_norm"] > 0
    tokenizer = HieraTok.from_pretrained(tmp_path)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), tokenizer.parameters()))
    gone = TokenizerObjective(run, HieraTok(run.model)).networks["discriminator"].state_dict()
    saved = load_file(max((tmp_path / "checkpoints").iterdir()) / "discriminator.safetensors")
    assert saved.keys() == gone.keys()
    assert saved["lecam.num_updates"] == 12


def test_the_gan_changes_the_tokenizer_and_not_the_other_way_round(photos, stage1):
    """The tokenizer's loss gives the discriminator no gradient, the discriminator's loss gives the tokenizer none."""
    run = replace(stage2_run(photos, stage1), gan=replace(GAN, generator_start=0, ramp_steps=0))
    objective = TokenizerObjective(run, HieraTok(run.model))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    tokenizer, critic = objective.networks["tokenizer"], objective.networks["discriminator"]
    losses, gradients = [], []

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        losses.append(loss.detach())
        gradients.append([None if p.grad is None else p.grad.clone() for p in tokenizer.parameters()])
        assert all((p.grad is None) == (len(losses) == 1) for p in critic.parameters())

    terms = objective.compute(objective.networks, {"image": images}, 0, backward)
    total = terms["l1"] + 0.4 * terms["mse"] + (1e-6 * terms["kl"] + 0.6 * terms["adversarial"]) / 3
    torch.testing.assert_close(losses[0], total)
    assert len(losses) == 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_r1_is_added_at_every_k_th_step_k_times(photos, stage1):
    gan = replace(GAN, diffaugment=False, lecam_weight=0.0, r1_weight=3.0, r1_interval=4)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    objective = TokenizerObjective(replace(stage2_run(photos, stage1), gan=gan), HieraTok(small_run(photos).model))
    critic = objective.networks["discriminator"]
    found = [objective.discriminator_loss(critic, images, images.flip(0), step) for step in range(5)]
    assert ["discriminator/r1" in terms for _, terms in found] == [True, False, False, False, True]
    with_r1, terms = found[0]
    plain = found[1][0]
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).flatten(1).mean(1).sum(), x)
    torch.testing.assert_close(terms["discriminator/r1"], gradient.square().sum((1, 2, 3)).mean())
    torch.testing.assert_close(with_r1 - plain, 3.0 / 2 * 4 * terms["discriminator/r1"], rtol=1e-4, atol=1e-6)


def test_adaptive_weight_balances_gradients_at_the_pixel_head(photos, stage1):
    gan = replace(GAN, generator_start=0, ramp_steps=0, adaptive=True)
    run = replace(stage2_run(photos, stage1), gan=gan)
    objective = TokenizerObjective(run, HieraTok(run.model).eval())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(0)
    terms = objective.compute(objective.networks, {"image": images}, 0, torch.Tensor.backward)
    torch.manual_seed(0)
    pyramid, posterior, _ = objective.tokenizer(to_float(images))
    _, finest, _ = objective.criterion(pyramid, to_float(images), posterior)
    head = objective.tokenizer.decoder.head.weight
    adversarial = objective.adversarial_loss(objective.critic, pyramid[-1])
    norms = [torch.autograd.grad(x, head, retain_graph=True)[0].norm() for x in (finest, adversarial)]
    torch.testing.assert_close(terms["adversarial_weight"], 0.6 * norms[0] / (norms[1] + 1e-4))


def test_vf_loss_in_a_run(photos, tmp_path):
    vf = VFConfig(weight=0.5, model="vit_tiny_patch16_224", random_model=True)
    train_tokenizer(replace(small_run(photos, steps=2, batch_size=2, log_every=1), vf=vf), tmp_path)
    record = read_log(tmp_path / "log.jsonl")[-1]
    assert record["vf"] == pytest.approx(record["vf_cosine"] + record["vf_distance"], rel=1e-5)
    assert record["vf/gradient_norm"] > 0
    assert final_state(tmp_path)["vf.project.weight"].shape == (192, 4, 1, 1)


def test_frozen_encoder_keeps_latents_bit_equal(photos, stage1, tmp_path):
    run = replace(stage2_run(photos, stage1), freeze_encoder=True)
    train_tokenizer(run, tmp_path)
    before, after = HieraTok.from_pretrained(stage1), HieraTok.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = before.encode(images).mode()
        assert torch.equal(z, after.encode(images).mode())
        assert not torch.equal(before.decode(z), after.decode(z))
    assert torch.equal(before.latent_mean, after.latent_mean)


def test_evaluation_during_training(photos, tmp_path):
    run = small_run(photos)
    run = replace(run, data=replace(run.data, val_path=str(photos)), eval=EvalConfig(every=5, num_images=4))
    train_tokenizer(run, tmp_path / "judged")
    records = [json.loads(line) for line in (tmp_path / "judged" / "evaluations.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [5, 10, 12]
    assert all(r["n"] == 4 and 0 < r["psnr"] < 60 and -1 <= r["ssim"] <= 1 for r in records)
    assert records[-1]["psnr"] > records[0]["psnr"]
    train_tokenizer(replace(run, eval=EvalConfig()), tmp_path / "not")
    assert_same_run(tmp_path / "judged", tmp_path / "not")
    with pytest.raises(ValueError, match=r"eval\.every needs images that are not trained on: set --data\.val_path"):
        train_tokenizer(replace(run, data=replace(run.data, val_path=None)), tmp_path / "none")


def test_evaluation_during_training_finds_what_the_command_finds_at_every_scale(photos, tmp_path):
    run = small_run(photos)
    run = replace(run, data=replace(run.data, val_path=str(photos)), eval=EvalConfig(every=12))
    train_tokenizer(run, tmp_path / "run")
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    options = ["--data", str(photos), "--features", "none", "--lpips", "[]", "--scales", "--device", "cpu"]
    assert main(["evaluate", "reconstruction", str(tmp_path / "run"), *options]) == 0
    result = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    expected = {key: result[key] for key in ("n", "psnr", "baseline_psnr", "ssim")}
    for side in ("4", "8"):
        expected |= {f"{key}/{side}": result["scales"][side][key] for key in ("psnr", "baseline_psnr")}
    assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_latent_statistics_are_measured_when_a_run_ends(photos, stage1):
    tokenizer = HieraTok.from_pretrained(stage1)
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(tokenizer.denormalize(tokenizer.normalize(z)), z)
    shaped = tokenizer.latent_mean.view(-1, 1, 1), tokenizer.latent_std.view(-1, 1, 1)
    torch.testing.assert_close(tokenizer.normalize(z), (z - shaped[0]) / shaped[1])
    with pytest.raises(ValueError, match="were not measured: hieratok latents RUN"):
        HieraTok(tokenizer.config).normalize(z)


def test_activation_checkpointing_changes_nothing_but_memory(photos, tmp_path):
    train_tokenizer(small_run(photos), tmp_path / "plain")
    train_tokenizer(small_run(photos, activation_checkpointing=True), tmp_path / "checkpointed")
    assert_same_run(tmp_path / "plain", tmp_path / "checkpointed")


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(photos, tmp_path):
    """With the real compiler, which dynamo's counting in test_tokenizer.py leaves out."""
    losses = []
    for name in ("plain", "compiled"):
        run = small_run(photos, steps=4, log_every=1, picture_every=0, compile=name == "compiled")
        run = replace(run, model=replace(run.model, drop_path=0.0))  # inductor draws other random numbers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hieratok.tokenizer.posterior.DiagonalGaussian.sample", lambda self: self.mode())
            train_tokenizer(run, tmp_path / name)
        losses.append([record["loss"] for record in read_log(tmp_path / name / "log.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 6, 12])
def test_stage_2_resumed_equals_uninterrupted(photos, stage1, tmp_path, at):
    """Tokenizer, discriminator, LeCam's means, EMA, both optimisers, logs."""
    run = stage2_run(photos, stage1)
    train_tokenizer(run, tmp_path / "whole")
    crash_in_step(at, lambda: train_tokenizer(run, tmp_path / "crashed"))
    train_tokenizer(run, tmp_path / "crashed")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


def test_sigterm_saves_and_the_same_call_goes_on(photos, stage1, tmp_path, monkeypatch):
    run = stage2_run(photos, stage1)
    train_tokenizer(run, tmp_path / "whole")
    original = step_module.update_ema

    def terminate(ema, model, step, decay):
        original(ema, model, step, decay)
        if step + 1 == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "update_ema", terminate)
        with pytest.raises(Stopped, match="after step 6: the same command resumes"):
            train_tokenizer(run, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == handler
    assert sorted(p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir())[-1] == "step-00000006"
    train_tokenizer(run, tmp_path / "stopped")
    first, second = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert all(torch.equal(first[k], second[k]) for k in first if "latent" not in k and k != "counters")


def torchrun(config: str, out: Path) -> list[str]:
    return [*TORCHRUN, "-m", "hieratok", "train", config, "--out", str(out)]


def run_two(config: str, out: Path) -> None:
    environment_ = environment()
    subprocess.run(torchrun(config, out), check=True, env=environment_, timeout=300)


def kill_and_resume(start: list[str], out: Path, untils: list[int], environment_: dict[str, str]) -> None:
    """Start, kill -9 every process once the log passes each of `untils`, then run to the end."""
    for until in untils:
        process = subprocess.Popen(start, env=environment_)
        while last_step(out) < until and process.poll() is None:
            time.sleep(0.01 * random.random())
        assert process.poll() is None, "the run ended before it could be killed"
        family = psutil.Process(process.pid).children(recursive=True)  # torchrun's workers would outlive it
        for member in [psutil.Process(process.pid), *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family)
        process.wait()
    subprocess.run(start, check=True, env=environment_, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_ten_times(photos, stage1, tmp_path, processes):
    """At random moments, with loader processes; then the same as never interrupted."""
    run = stage2_run(photos, stage1, steps=800, save_every=7, log_every=1, picture_every=0)
    run = replace(run, data=replace(run.data, num_workers=1))
    config = write_run(run, tmp_path / "run.yaml")
    commands = [
        command("train", config, "--out", str(tmp_path / out)) if processes == 1 else torchrun(config, tmp_path / out)
        for out in ("whole", "killed")
    ]
    environment_ = environment()
    subprocess.run(commands[0], check=True, env=environment_)
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown by pytest if the test fails
    untils = sorted(random.Random(seed).sample(range(10, 450), 10))
    kill_and_resume(commands[1], tmp_path / "killed", untils, environment_)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# --- several processes ------------------------------------------------------------------------------------------------


def assert_same_losses(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        for name in ("loss", "l1/4", "mse/16", "kl", "gradient_norm", "discriminator/loss", "logits/fake"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), (a["step"], name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_two_micro_batches(photos, stage1, tmp_path, strategy):
    """Real torchrun with gloo, stage 2: the same losses to 1e-5; resumed half-way, bit-equal; one can go on with it."""
    run = stage2_run(photos, stage1, steps=6, log_every=1, micro_batch_size=2, picture_every=2, save_every=3)
    # Not hinge: at first every logit lies within its margins, so the last bias has a gradient of 1 - 1, rounding alone,
    # which Adam scales up to a full step. The non-saturating loss has no such place.
    assert run.gan.loss == "non-saturating"
    train_tokenizer(run, tmp_path / "one")
    run = replace(run, train=replace(run.train, parallel=strategy))
    config = write_run(run, tmp_path / "run.yaml")
    run_two(config, tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000006")  # as if killed in step 4, 5 or 6
    run_two(config, tmp_path / "resumed")
    assert_same_run(tmp_path / "two", tmp_path / "resumed")
    assert_same_losses(read_log(tmp_path / "one" / "log.jsonl"), read_log(tmp_path / "two" / "log.jsonl"))
    first, second = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor) and name.startswith(("tokenizer.", "ema.", "discriminator.")):
            torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
    # what two processes saved, one goes on with
    train_tokenizer(replace(run, train=replace(run.train, steps=7)), tmp_path / "two", allow_changes=True)
    assert read_log(tmp_path / "two" / "log.jsonl")[-1]["step"] == 7


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(photos, stage1, tmp_path):
    run = stage2_run(photos, stage1)
    with pytest.raises(ValueError, match=r"another shape: model\.latent_channels 4 -> 8"):
        train_tokenizer(replace(run, model=replace(run.model, latent_channels=8)), tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        train_tokenizer(replace(run, start_from="nowhere"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"runs/none: no such folder; name the weights .* with --from RUN"):
        train_tokenizer(replace(run, start_from="runs/none"), tmp_path)  # and the hub is not asked
    with pytest.raises(ValueError, match="name it with --from RUN"):
        replace(run, start_from=None, freeze_encoder=True)
    with pytest.raises(ValueError, match="use only one of them"):
        replace(run, freeze_encoder=True, vf=VFConfig(weight=0.1))
    with pytest.raises(ValueError, match=r"gan\.adaptive needs whole gradients"):
        replace(run, gan=replace(GAN, adaptive=True), train=replace(run.train, parallel="fsdp2"))
    with pytest.raises(ValueError, match=r"needs images of 32 px or more, not 16"):
        train_tokenizer(replace(run, gan=AdversarialConfig()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_discriminator_has_its_own_schedule(photos, stage1):
    run = recipes.get("f16d16-multi-stage2")
    tokenizer = recipes.get("tiny-multi").model
    objective = TokenizerObjective(
        replace(run, model=tokenizer, vf=VFConfig(), loss=small_run(photos).loss), HieraTok(tokenizer)
    )
    optimization = objective.optimizations["discriminator"]
    assert optimization == Optimization(learning_rate=1e-4, min_learning_rate=1e-6, warmup_ratio=0.01)
    assert learning_rate(0, optimization, 1000) == pytest.approx(1e-5)
    assert objective.optimizations["tokenizer"].warmup_ratio == 0.03
