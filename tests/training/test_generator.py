"""Training generators: from latents and from images, resumed and whole, judged while they train."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import default_collate

import helpers
from helpers.models import save_photos, save_tokenizer
from helpers.runs import FEATURES, TORCHRUN, crash_in_step, same
from hieratok import HieraTok, cli
from hieratok.core import checkpoint
from hieratok.core.typed import plain
from hieratok.data.images import evaluation_batches, open_source
from hieratok.data.latents import LatentDataset
from hieratok.evaluation import protocols as evaluate
from hieratok.evaluation.config import EvaluateStats
from hieratok.evaluation.distribution import frechet_distance
from hieratok.evaluation.features import load_network
from hieratok.evaluation.protocols import write_statistics
from hieratok.evaluation.statistics import FeatureSet
from hieratok.generation import flow
from hieratok.generation.dit import DiT, DiTConfig, LatentSpace
from hieratok.settings import load_run
from hieratok.tasks.latents import WriteLatents, write_latents
from hieratok.training import generator as module
from hieratok.training.config import DataConfig, GeneratorEval, TrainConfig
from hieratok.training.generator import GeneratorObjective, GeneratorRun, train_generator
from hieratok.training.run_folder import read_log


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return save_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, photos) -> Path:
    """A tokenizer with statistics."""
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    write_latents(WriteLatents(run=str(folder), data=str(photos), stats_only=True, device="cpu"))
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory, tokenizer, photos) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(WriteLatents(run=str(tokenizer), data=str(photos), out=str(folder), device="cpu"))
    return folder


def small_run(tokenizer: Path | None, data: Path, objective: str = "flow", **train) -> GeneratorRun:
    settings = dict(steps=6, batch_size=4, learning_rate=1e-3, min_learning_rate=1e-3, warmup_ratio=0.0)
    settings |= dict(save_every=2, log_every=1, picture_every=0, ema_decay=0.9, precision="fp32", weight_decay=0.0)
    return GeneratorRun(
        name="small",
        tokenizer=str(tokenizer) if tokenizer else None,
        model=DiTConfig(
            objective=objective,  # type: ignore[arg-type]
            learn_sigma=objective == "ddpm",
            latent_channels=4,
            latent_size=4,
            width=16,
            depth=2,
            heads=2,
            num_classes=2,
        ),
        data=DataConfig(path=str(data), crop="center", num_workers=0),
        train=TrainConfig(**{**settings, **train}),
    )


def final_state(out: Path) -> dict[str, object]:
    newest = max((out / "checkpoints").glob("step-*"))
    state: dict[str, object] = {"counters": json.loads((newest / "counters.json").read_text())}
    for file in ("generator.safetensors", "generator/model.safetensors"):
        weights = checkpoint.read_tensors(newest / file)
        state |= {f"{file}.{name}": tensor for name, tensor in weights.items()}
    moments = torch.load(newest / "generator-optimizer.pt", weights_only=True)["state"]
    state |= {f"{name}.{k}": v for name, values in moments.items() for k, v in values.items()}
    return state


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_log(out / "log.jsonl")]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(tokenizer, latents, tmp_path):
    run = small_run(tokenizer, latents, steps=60, picture_every=30, learning_rate=5e-3, log_every=20, batch_size=16)
    trained = train_generator(run, tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == plain(run)
    records = read_log(tmp_path / "log.jsonl")
    assert records[-1]["loss"] < records[0]["loss"]
    assert {"loss", "mse", "gradient_norm", "learning_rate"} <= records[0].keys()
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["step-00000030.png", "step-00000060.png"]
    loaded = DiT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), loaded.parameters()))
    manifest = LatentDataset(latents).manifest
    assert loaded.latents == LatentSpace(manifest.tokenizer["encoder_sha256"], manifest.mean, manifest.std)
    checkpoints = sorted((tmp_path / "checkpoints").iterdir())
    assert DiT.from_pretrained(checkpoints[-1] / "generator").latents == loaded.latents


@pytest.mark.parametrize(("objective", "at"), [("ddpm", 1), ("ddpm", 5), ("flow", 4)])
def test_resumed_equals_uninterrupted(tokenizer, latents, tmp_path, objective, at):
    run = small_run(tokenizer, latents, objective)
    train_generator(run, tmp_path / "whole")
    crash_in_step(at, lambda: train_generator(run, tmp_path / "crashed"))
    train_generator(run, tmp_path / "crashed")
    whole, crashed = final_state(tmp_path / "whole"), final_state(tmp_path / "crashed")
    assert whole.keys() == crashed.keys()
    for name in whole:
        assert same(whole[name], crashed[name]), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "crashed")
    assert len(set(losses(tmp_path / "whole"))) == 6


def test_images_train_what_their_latents_train(tokenizer, latents, photos, tmp_path, monkeypatch):
    """Encoded on the fly or cached: the same images, mirrored alike, with the same noise."""
    monkeypatch.setattr(module, "LatentSpace", lambda *_: LatentSpace("x", (0.1,) * 4, (1.5,) * 4))
    monkeypatch.setattr(HieraTok, "encoder_sha256", "x")
    train_generator(small_run(None, latents), tmp_path / "cached")
    train_generator(small_run(tokenizer, photos), tmp_path / "images")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "images"), rel=1e-4)


def test_images_without_classes_are_one_class(tokenizer, photos, tmp_path):
    run = small_run(tokenizer, photos / "cat")
    with pytest.raises(ValueError, match=r"of 1 classes.*add --model.num_classes 1$"):
        train_generator(run, tmp_path)
    train_generator(replace(run, model=replace(run.model, num_classes=1)), tmp_path)


def test_the_default_run_is_the_papers(tmp_path):
    run = GeneratorRun()
    assert (run.train.learning_rate, run.train.min_learning_rate, run.train.warmup_ratio) == (1e-4, 1e-4, 0)
    assert (run.train.ema_decay, run.train.clip_norm, run.model.objective) == (0.9999, 1.0, "ddpm")
    path = tmp_path / "mine.yaml"
    path.write_text("kind: generator\ntrain: {steps: 7}\nmodel: {num_classes: 3}\n")
    loaded = load_run(str(path), ["--tokenizer", "runs/x", "--data", "y"]).run
    data = replace(run.data, path="y")
    expected = replace(run, name="mine", tokenizer="runs/x", data=data, model=replace(run.model, num_classes=3))
    assert loaded == replace(expected, train=replace(run.train, steps=7))


# --- the objective ----------------------------------------------------------------------------------------------------


def objective_of(latents: Path, name: str = "flow") -> GeneratorObjective:
    run = small_run(None, latents, name)
    generator = DiT(run.model)
    generator.latents = module.open_latents(run, None)[1]
    return GeneratorObjective(run, generator)


def test_latents_are_sampled_and_normalised(latents):
    """Over all images, mirror images and draws: mean 0 and deviation 1 in every channel."""
    objective, data = objective_of(latents), LatentDataset(latents)
    torch.manual_seed(0)
    batches = [default_collate([data[i, epoch] for i in range(11)]) for epoch in range(60)]
    z = torch.cat([objective.latents(batch) for batch in batches]).double()
    assert z.mean((0, 2, 3)).abs().max() < 0.05
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.05
    same_batch = objective.latents(batches[0]), objective.latents(batches[0])
    assert not torch.equal(*same_batch)


def test_latents_there_and_back():
    space = LatentSpace("x", (1.0, -2.0), (0.5, 4.0))
    z = torch.tensor([1.5, 2.0]).view(1, 2, 1, 1).expand(3, 2, 4, 4)
    assert torch.equal(space.normalize(z), torch.ones(3, 2, 4, 4))
    assert torch.equal(space.denormalize(space.normalize(z)), z)


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_the_objectives_loss(latents, monkeypatch, name):
    """With known latents, the process's own loss of the right objective, times and labels."""
    objective, data = objective_of(latents, name), LatentDataset(latents)
    batch = default_collate([data[i, 0] for i in range(8)])
    z = torch.randn(8, 4, 4, 4)
    monkeypatch.setattr(objective, "latents", lambda _: z)
    seen = []
    model = objective.networks["generator"].eval()

    def predict(x, t, y):
        seen.append((t, y))
        return model(x, t, y)

    torch.manual_seed(5)
    losses = []
    terms = objective.compute({"generator": predict}, batch, 0, losses.append)  # type: ignore[dict-item]
    (loss,) = losses
    t, y = seen[0]
    assert torch.equal(y, batch["label"])
    assert terms.keys() == ({"loss", "mse"} if name == "flow" else {"loss", "mse", "vb"})
    torch.manual_seed(5)
    if name == "flow":
        times = torch.empty(8).uniform_()
        expected = flow.loss_terms(model, z, y, times, torch.randn(8, 4, 4, 4))["mse"].mean()
        assert torch.equal(t, times)
        torch.testing.assert_close(loss, expected)
    else:
        assert t.dtype == torch.long
        torch.testing.assert_close(loss.detach(), terms["mse"] + terms["vb"])


def test_the_generator_alone_learns(tokenizer, photos, tmp_path):
    before = HieraTok.from_pretrained(tokenizer)
    run = small_run(tokenizer, photos, steps=2)
    objective = GeneratorObjective(run, objective_of_images(run, before), before)
    batch = {"image": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), "label": torch.tensor([0, 1])}
    objective.compute(objective.networks, batch, 0, torch.Tensor.backward)
    assert all(p.grad is None for p in before.parameters())
    assert any(p.grad is not None for p in objective.networks["generator"].parameters())


def objective_of_images(run: GeneratorRun, tokenizer: HieraTok) -> DiT:
    generator = DiT(run.model)
    generator.latents = module.open_latents(run, tokenizer)[1]
    return generator


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_distances_during_training(tokenizer, latents, photos, tmp_path):
    """As many samples as asked for, of the averaged model, against the reference; statistics or images alike."""
    judged = GeneratorEval(every=3, num_images=6, reference=str(photos), features=FEATURES, steps=3, batch_size=4)
    run = replace(small_run(tokenizer, latents), eval=judged)
    trained = train_generator(run, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [3, 6]
    assert all(r.keys() == {"step", "images", "fd-means"} for r in records)

    network, model = load_network(FEATURES), HieraTok.from_pretrained(tokenizer)
    config = module.quick_sampling(run.model, 6, 3, 6, "random")
    _, images = next(module.decoded_samples(trained, model, config))
    samples, reference = FeatureSet(network), FeatureSet(network)
    samples.update(images, [str(i) for i in range(6)])
    for names, _, real in evaluation_batches(open_source(str(photos)), 16, 4):
        reference.update(real, names)
    expected = frechet_distance(samples.compute().pool, reference.compute().pool)
    assert records[1]["fd-means"] == pytest.approx(expected, rel=1e-6)

    statistics = str(tmp_path / "reference.npz")
    write_statistics(EvaluateStats(path=str(photos), out=statistics, features=FEATURES, size=16, device="cpu"))
    from_file = module.GeneratorEvaluation(replace(run, eval=replace(judged, reference=statistics)), model)
    assert from_file(trained)["fd-means"] == pytest.approx(expected, rel=1e-6)


def test_processes_share_the_samples_and_sample_equally_often(tokenizer, latents, photos, monkeypatch):
    judged = GeneratorEval(every=1, num_images=5, reference=str(photos), features=FEATURES, steps=1, batch_size=2)
    run = replace(small_run(tokenizer, latents), eval=judged)
    model = HieraTok.from_pretrained(tokenizer)
    generator = objective_of_images(run, model).eval()
    calls, names = [], []
    for rank in range(2):
        for place in (module, evaluate):  # samples, and the reference
            monkeypatch.setattr(place, "process", lambda rank=rank: (rank, 2))
            monkeypatch.setattr(place, "merge_processes", lambda features: names.append(sorted(features.digests)))
        count = []
        handle = generator.register_forward_hook(lambda *_, count=count: count.append(1))
        module.GeneratorEvaluation(run, model)(generator)
        handle.remove()
        calls.append(len(count))
    assert calls[0] == calls[1] == 2
    assert (names[0], names[2]) == (["0", "2", "4"], ["1", "3"])


@pytest.mark.slow
def test_a_divided_model_is_shown_and_evaluated(tokenizer, latents, photos, tmp_path):
    """FSDP2 in two processes, which sample in the middle of training: the losses of one process."""
    judged = GeneratorEval(every=2, num_images=3, reference=str(photos), features=FEATURES, steps=2)
    run = replace(small_run(tokenizer, latents, steps=4, picture_every=1, micro_batch_size=2), eval=judged)
    train_generator(run, tmp_path / "one")
    in_file = replace(run, train=replace(run.train, parallel="fsdp2"), eval=replace(judged, features="inception"))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(plain(in_file)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    tests = str(Path(helpers.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    train = ["train", str(config), "--eval.features", FEATURES, "--out", str(tmp_path / "two")]  # code: never in a file
    subprocess.run([*TORCHRUN, "-m", "hieratok", *train], check=True, env=environment, timeout=500)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = ((tmp_path / name / "evaluations.jsonl").read_text().splitlines() for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):  # of three 16 px images, and pixels may differ by a level
        assert json.loads(a)["fd-means"] == pytest.approx(json.loads(b)["fd-means"], rel=0.01)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_one_line(tokenizer, latents, photos, tmp_path):
    run = small_run(tokenizer, latents)
    other = save_tokenizer(tmp_path / "other", seed=1)
    cases = [
        (replace(run, data=replace(run.data, path=None)), "no latents: give --data DIR"),
        (replace(run, tokenizer=str(other)), "holds latents of another tokenizer"),
        (replace(run, data=replace(run.data, crop="random-resized")), "data.crop must be center"),
        (replace(run, tokenizer=None, data=replace(run.data, path=str(photos))), "name the tokenizer that"),
        (
            replace(run, tokenizer=str(other), data=replace(run.data, path=str(photos))),
            "were not measured: .*stats-only",
        ),
        (
            replace(run, model=replace(run.model, latent_channels=8, num_classes=1000)),
            "4 x 4 x 4 of 2 classes.*add --model.latent_channels 4 --model.num_classes 2$",
        ),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            train_generator(bad, tmp_path / "run")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train_generator(replace(run, tokenizer=str(tmp_path / "nowhere")), tmp_path / "run")


def test_some_images_without_a_class(tokenizer, photos, tmp_path):
    (tmp_path / "mixed" / "cat").mkdir(parents=True)
    image = next((photos / "cat").iterdir()).read_bytes()
    (tmp_path / "mixed" / "a.png").write_bytes(image)
    (tmp_path / "mixed" / "cat" / "b.png").write_bytes(image)
    with pytest.raises(ValueError, match="some images have a class and others none"):
        train_generator(small_run(tokenizer, tmp_path / "mixed"), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(time_sampling="logit-normal"), "time_sampling logit-normal is for model.objective flow"),
        (dict(eval=GeneratorEval(every=5, reference="x")), "name their tokenizer"),
        (dict(eval=GeneratorEval(every=5), tokenizer="x"), "set --eval.reference PATH"),
    ],
)
def test_settings_that_do_not_fit_together(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneratorRun(**settings)


@pytest.mark.parametrize("settings", [dict(every=-1), dict(num_images=1), dict(steps=0), dict(steps=1001)])
def test_bad_evaluations(settings):
    with pytest.raises(ValueError, match=r"eval\.every must not be negative"):
        GeneratorEval(**settings)


def test_constant_channels_cannot_be_normalised():
    with pytest.raises(ValueError, match="channel 1 of the latents has deviation 0"):
        LatentSpace("x", (0.0, 0.0), (1.0, 0.0))


def test_commands(tokenizer, latents, tmp_path, capsys, monkeypatch):
    """A YAML file, flags, and what comes next; an unknown kind and a flag of the other kind are refused."""
    monkeypatch.chdir(tmp_path)
    run = replace(small_run(None, latents), data=DataConfig(crop="center", num_workers=0))
    Path("small.yaml").write_text(yaml.safe_dump(plain(run)))
    command = ["train", "small.yaml", "--tokenizer", str(tokenizer), "--data", str(latents), "--train.steps", "2"]
    assert cli.main([*command, "--train.picture_every", "2"]) == 0
    out = capsys.readouterr().out
    assert f"hieratok sample {os.path.join('runs', 'small')} --tokenizer {tokenizer} --out" in out
    assert Path("runs/small/generator/model.safetensors").is_file()
    assert cli.main(["train", "dit-tiny", "--gan.weight", "1"]) == 2
    assert "unknown option --gan.weight" in capsys.readouterr().err
    Path("bad.yaml").write_text("kind: generater\n")
    assert cli.main(["train", "bad.yaml"]) == 2
    assert "kind must be tokenizer or generator, not 'generater'; did you mean 'generator'?" in capsys.readouterr().err
    assert cli.main(["cost", "dit-b"]) == 2
    assert "dit-b trains a generator" in capsys.readouterr().err
    assert cli.main(["train", "dit-b", "--help"]) == 0
    assert "--time_sampling" in capsys.readouterr().out
