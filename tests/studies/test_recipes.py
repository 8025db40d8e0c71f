"""Recipes: all of the paper's tokenizers, each of which builds; and what they cost (table 7)."""

from dataclasses import replace

import pytest
import torch
import yaml

from hieratok import DiagonalGaussian, HieraTok
from hieratok.core.typed import plain
from hieratok.generation.dit import DiT
from hieratok.settings import load_run
from hieratok.studies import recipes
from hieratok.tokenizer.cost import PAPER, measure
from hieratok.training.step import learning_rate

# (table, name, d, scales, KL, down-sampling, attention), straight from the paper
M, S = (1, 2, 4, 8, 16), (16,)
TABLES = [
    (2, "f16d16-single", 16, S, 1e-6, None, None),
    (2, "f16d16-multi", 16, M, 1e-6, "conv", "causal"),
    (2, "f16d16-single-kl1e-5", 16, S, 1e-5, None, None),
    (2, "f16d16-multi-kl1e-5", 16, M, 1e-5, "conv", "causal"),
    (2, "f16d32-single-kl1e-5", 32, S, 1e-5, None, None),
    (2, "f16d32-multi-kl1e-5", 32, M, 1e-5, "conv", "causal"),
    (3, "f16d16-conv-causal", 16, M, 1e-6, "conv", "causal"),
    (3, "f16d16-conv-independent", 16, M, 1e-6, "conv", "independent"),
    (3, "f16d16-conv-full", 16, M, 1e-6, "conv", "full"),
    (3, "f16d16-interpolate-causal", 16, M, 1e-6, "interpolate", "causal"),
    (3, "f16d16-interpolate-independent", 16, M, 1e-6, "interpolate", "independent"),
    (3, "f16d16-interpolate-full", 16, M, 1e-6, "interpolate", "full"),
    (4, "f16d16-scales-1-2-4-16", 16, (1, 2, 4, 16), 1e-6, "conv", "causal"),
    (4, "f16d16-scales-1-2-4-8-12-16", 16, (1, 2, 4, 8, 12, 16), 1e-6, "conv", "causal"),
]


@pytest.mark.parametrize(("table", "name", "d", "scales", "kl", "downsample", "attention"), TABLES)
def test_tables_2_to_4(table, name, d, scales, kl, downsample, attention):
    run = recipes.get(name)
    assert run.name == name
    assert (run.model.image_size, run.model.patch_size) == (256, 16)
    assert (run.model.latent_channels, run.model.scales, run.loss.kl_weight) == (d, scales, kl)
    if len(scales) > 1:
        assert (run.model.downsample, run.model.attention) == (downsample, attention)
    assert (run.loss.l1_weight, run.loss.mse_weight, run.loss.perceptual_weight) == (1.0, 0.4, 1.0)
    train = run.train
    assert (train.batch_size, train.betas, train.weight_decay, train.warmup_ratio) == (256, (0.9, 0.95), 0.05, 0.03)
    assert train.steps == round(100 * 1_281_167 / 256)


TOKENIZERS = [name for name in recipes.RECIPES if recipes.get(name).kind == "tokenizer"]
GENERATORS = [name for name in recipes.RECIPES if recipes.get(name).kind == "generator"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_builds_and_runs(name):
    """On the meta device: shapes of a whole pass, without the memory or time of 400M parameters."""
    config = recipes.get(name).model
    with torch.device("meta"):
        z = torch.empty(2, config.latent_channels, *config.grid)
        known = DiagonalGaussian(z, z) if config.encoder else None  # a frozen encoder's weights are not here
        images = torch.empty(2, 3, config.image_size, config.image_size)
        pyramid, posterior, _ = HieraTok(config).eval()(images, known)
    assert [x.shape[-1] for x in pyramid] == [config.patch_size * s for s in config.scales]
    assert posterior.mean.shape == (2, config.latent_channels, *config.grid)
    assert recipes.summary(name)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_builds_and_runs(name):
    config = recipes.get(name).model
    with torch.device("meta"):
        x, t, y = torch.empty(2, *config.latent_shape), torch.empty(2), torch.empty(2, dtype=torch.long)
        prediction = DiT(config).eval()(x, t, y)
    assert prediction.shape == (2, config.out_channels, config.latent_size, config.latent_size)
    assert recipes.summary(name)


@pytest.mark.parametrize(("size", "millions"), [("b", 130), ("l", 458), ("xl", 675)])
def test_table_6_and_its_training(size, millions):
    run = recipes.get(f"dit-{size}")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiT(run.model).parameters())
    assert parameters == pytest.approx(millions * 1e6, rel=0.01)
    assert run.model.latent_shape == (16, 16, 16)
    assert run.model.objective == "ddpm"
    train = run.train
    assert (train.steps, train.batch_size, train.betas, train.weight_decay) == (400_000, 256, (0.9, 0.999), 0.0)
    assert {learning_rate(step, train, train.steps) for step in (0, 1, 1000, 399_999)} == {1e-4}


def test_tiny_generator_takes_the_tiny_tokenizers_latents():
    tokenizer = recipes.get("tiny-multi").model
    assert recipes.get("dit-tiny").model.latent_shape == (tokenizer.latent_channels, *tokenizer.grid)


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_a_printed_recipe_is_a_file_that_train_accepts(name, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain(recipes.get(name)), sort_keys=False))
    run, out, _ = load_run(str(path))
    assert run == recipes.get(name)
    assert str(out) == f"runs/{name}"


def test_unknown_recipe():
    with pytest.raises(ValueError, match="no recipe 'f16d16-mutli'; did you mean 'f16d16-multi'"):
        recipes.get("f16d16-mutli")


def test_small_keeps_the_papers_token_geometry():
    for kind, tokens in (("multi", 341), ("single", 256)):
        cost = measure(recipes.get(f"small-{kind}").model)
        assert (cost.encoder_tokens, cost.decoder_tokens) == (256, tokens)


@pytest.mark.parametrize("name", list(PAPER))
def test_table_7(name):
    cost, paper = measure(recipes.get(name).model), PAPER[name]
    assert cost.parameters == pytest.approx(paper["parameters"], rel=0.002)
    assert cost.encoder_tokens == paper["encoder_tokens"]
    assert cost.decoder_tokens == paper["decoder_tokens"]
    assert cost.gflops == pytest.approx(paper["gflops"], rel=0.06)
    assert cost.gflops_without_attention == pytest.approx(paper["gflops"], rel=0.06)


def test_table_7_increment():
    """What the down-sampler and the scale embeddings add, without two errors that cancel."""
    multi, single = (measure(recipes.get(f"f16d16-{kind}").model).parameters for kind in ("multi", "single"))
    paper = PAPER["f16d16-multi"]["parameters"] - PAPER["f16d16-single"]["parameters"]
    assert multi - single == pytest.approx(paper, rel=0.002)


def test_flops_against_a_count_by_hand():
    """A layer is 12 C^2 N multiply-adds with weights and 2 C for each pair of query and key that is computed."""
    base = recipes.get("tiny-multi").model
    shallow = replace(base, decoder_depth=1)
    deep = replace(base, decoder_depth=2)
    a, b = measure(shallow), measure(deep)
    N, C = sum(s * s for s in base.scales), base.decoder_width
    with_weights = 2 * 12 * C * C * N / 1e9
    coarse, finest = N - base.scales[-1] ** 2, base.scales[-1] ** 2
    attention = 2 * 2 * C * (coarse * coarse + finest * N) / 1e9
    assert b.gflops_without_attention - a.gflops_without_attention == pytest.approx(with_weights, rel=1e-9)
    assert b.gflops - a.gflops == pytest.approx(with_weights + attention, rel=1e-9)
