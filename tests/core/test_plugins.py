"""Plugins: parts of a user's module, by the command line or an installed package's entry point, never by a file."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hieratok import HieraTok, TokenizerConfig, cli
from hieratok.core import plugins
from hieratok.core.plugins import DISCRIMINATORS, DOWNSAMPLERS, LOSSES, SOURCES, VARIABLE, Registry, take_plugins
from hieratok.data.images import open_source
from hieratok.losses.config import AdversarialConfig, LossConfig
from hieratok.studies import paper

MODULE = """
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hieratok.core.plugins import DISCRIMINATORS, DOWNSAMPLERS, LOSSES, SOURCES
from hieratok.studies import paper
from hieratok.studies.paper import Row, scales


@DOWNSAMPLERS.register("max")
class MaxDownsample(nn.Module):
    def __init__(self, latent_channels, width, sides):
        super().__init__()
        self.proj = nn.Conv2d(latent_channels, width, kernel_size=1)

    def forward(self, z, scales):
        for grid in scales.grids:
            yield self.proj(F.adaptive_max_pool2d(z, grid))


@LOSSES.register("edges")
def edge_loss(pyramid, images):
    error = pyramid[-1] - images
    return error.diff(dim=-1).abs().mean()


@LOSSES.register("wrong")
def wrong(pyramid, images):
    return 1.0


@DISCRIMINATORS.register("mean-colour")
class MeanColour(nn.Module):
    def __init__(self, config, image_size):
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, images):
        return self.head(images.mean((2, 3)))


@SOURCES.register("noise")
class Noise:
    def __init__(self, text):
        self.count = int(text)

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{index:03}"

    def label(self, index):
        return -1

    def image(self, index):
        return torch.from_numpy(np.random.default_rng(index).integers(0, 256, (3, 20, 24), dtype=np.uint8))


paper.add_row("table4", Row(("mine: 8, 16",), scales(8, 16), against=0))
"""
SMALL = """
model: {image_size: 16, patch_size: 4, latent_channels: 4, scales: [1, 2, 4], encoder_width: 16, encoder_depth: 1,
        encoder_heads: 2, decoder_width: 24, decoder_depth: 2, decoder_heads: 2, downsample: max}
data: {num_workers: 0}
loss: {perceptual_weight: 0.0, plugins: [edges=0.5]}
gan: {weight: 0.1, discriminator: mean-colour, generator_start: 0, ramp_steps: 0}
train: {steps: 2, batch_size: 4, save_every: 2, log_every: 1, picture_every: 0, precision: fp32}
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a plugin, and registries that are as they were afterwards."""
    (tmp_path / "tested_plugin.py").write_text(MODULE)
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(paper, "STUDIES", dict(paper.STUDIES))
    monkeypatch.setenv(VARIABLE, "")
    for registry in (DOWNSAMPLERS, LOSSES, DISCRIMINATORS, SOURCES):
        monkeypatch.setattr(registry, "_parts", {})
    yield tmp_path
    sys.modules.pop("tested_plugin", None)


def test_every_part_from_the_command_line(place, capsys):
    command = ["train", "small.yaml", "--data", "noise:6", "--out", "run"]
    assert cli.main(command) == 2
    assert "model.downsample must be one of interpolate, conv, not 'max'" in capsys.readouterr().err
    assert cli.main([*command, "--plugin", "tested_plugin"]) == 0
    assert type(HieraTok.from_pretrained("run").downsample).__name__ == "MaxDownsample"
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert last["edges"] > 0
    assert "logits/real" in last
    assert cli.main(["--plugin=tested_plugin", "reconstruct", "run", "noise:2", "--out", "out"]) == 0
    assert len(list(Path("out").glob("*px.png"))) == 6
    command = ["study", "table4", "--row", "5", "--plan"]  # the table has four rows
    assert cli.main([*command, "--plugin", "tested_plugin"]) == 0
    assert "seed 0, rows 5: " in capsys.readouterr().out


def test_a_plugins_loss_counts_with_its_weight(place):
    take_plugins(["--plugin", "tested_plugin"])
    from hieratok.losses.reconstruction import ReconstructionLoss
    from hieratok.tokenizer.posterior import DiagonalGaussian
    from hieratok.tokenizer.scales import Scales

    images = torch.rand(2, 3, 16, 16) * 2 - 1
    pyramid = [torch.rand(2, 3, side, side) for side in (4, 16)]
    posterior = DiagonalGaussian(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4))
    losses = []
    for own in ((), ("edges=0.5",)):
        criterion = ReconstructionLoss(LossConfig(perceptual_weight=0.0, plugins=own), Scales(((1, 1), (4, 4))))
        losses.append(criterion(pyramid, images, posterior))
    expected = 0.5 * (pyramid[-1] - images).diff(dim=-1).abs().mean()
    torch.testing.assert_close(losses[1][0] - losses[0][0], expected)
    assert torch.equal(losses[0][1], losses[1][1])  # what other losses' adaptive weights are measured by
    criterion = ReconstructionLoss(LossConfig(perceptual_weight=0.0, plugins=("wrong=1",)), Scales(((1, 1), (4, 4))))
    with pytest.raises(ValueError, match="loss wrong must give a scalar tensor"):
        criterion(pyramid, images, posterior)


def test_an_installed_package_is_found_by_its_entry_point(place, monkeypatch):
    folder = place / "site" / "my_package-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[hieratok.plugins]\nmine = tested_plugin\n")
    (place / "tested_plugin.py").rename(place / "site" / "tested_plugin.py")
    monkeypatch.syspath_prepend(place / "site")
    importlib.invalidate_caches()
    assert TokenizerConfig(downsample="max").downsample == "max"
    assert len(open_source("noise:3")) == 3
    assert any(row.name == "mine: 8, 16" for row in paper.get("table4").rows)
    assert "max" in DOWNSAMPLERS.names()


def test_a_started_process_has_the_plugins_too(place):
    take_plugins(["train", "--plugin", "tested_plugin"])
    assert os.environ[VARIABLE] == "tested_plugin"
    code = "from hieratok import TokenizerConfig; print(TokenizerConfig(downsample='max').downsample)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "max\n"


def test_a_file_names_no_code(place, capsys):
    """Neither as a module nor as a setting that would load one."""
    Path("evil.py").write_text("from pathlib import Path\nPath('loaded').touch()\n")
    texts = [
        "plugin: evil",
        "plugins: [evil]",
        "model: {downsample: 'evil:max'}",
        "model: {downsample: evil}",
        "loss: {plugins: ['evil:edges=1']}",
        "gan: {discriminator: evil}",
        "data: {path: 'evil:3'}",
    ]
    for text in texts:
        Path("evil.yaml").write_text(text)
        assert cli.main(["train", "evil.yaml", "--out", "run", "--loss.perceptual_weight", "0"]) == 2, text
        assert capsys.readouterr().err.count("\n") == 1
    config = {"model_type": "hieratok", "downsample": "evil"}
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.downsample must be one of"):
        HieraTok.from_pretrained("model")
    assert not Path("loaded").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plugin"], "--plugin takes a module's name such as my_module, not ''"),
        (["--plugin", "a/b.py"], "--plugin takes a module's name such as my_module, not 'a/b.py'"),
        (["--plugin", "no_such_module"], "the plugin no_such_module cannot be loaded (ModuleNotFoundError: No module"),
        (["--plugin", "broken"], "the plugin broken cannot be loaded (ZeroDivisionError: division by zero)"),
        (["--plugin", "twice"], "there is a down-sampler called 'conv' already"),
    ],
)
def test_what_is_wrong_is_one_line(place, arguments, message, capsys):
    Path("broken.py").write_text("1 / 0\n")
    Path("twice.py").write_text(
        "from hieratok.core.plugins import DOWNSAMPLERS\nDOWNSAMPLERS.register('conv')(print)\n"
    )
    assert cli.main(["recipes", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_words_behind_two_dashes_are_no_flags():
    assert take_plugins(["reconstruct", "--", "--plugin", "x"]) == ["reconstruct", "--", "--plugin", "x"]


def test_names():
    registry: Registry = Registry("thing", "a.thing", ("old",))
    registry.register("new")(len)
    registry.register("new")(len)  # the same once more, as a module that is loaded again does
    with pytest.raises(ValueError, match="there is a thing called 'new' already"):
        registry.register("new")(print)
    for name in ("", "New", "a b", "a:b", "-a", "../a"):
        with pytest.raises(ValueError, match="the name of a thing has lower-case letters"):
            registry.register(name)
    with pytest.raises(ValueError, match=r"a\.thing must be one of old, new, not 'nwe'; did you mean 'new'\?"):
        registry["nwe"]
    assert "old" not in registry  # it is built in, and no plugin's


@pytest.mark.parametrize("entries", [("edges",), ("edges=x",), ("edges=-1",), ("edges=nan",), ("edges=inf",), ("=1",)])
def test_wrong_weights_of_losses(place, entries):
    take_plugins(["--plugin", "tested_plugin"])
    with pytest.raises(ValueError, match=r"loss\.plugins"):
        LossConfig(plugins=entries)
    with pytest.raises(ValueError, match="one NAME=WEIGHT for each loss"):
        LossConfig(plugins=("edges=1", "edges=2"))
    with pytest.raises(ValueError, match=r"gan\.discriminator must be one of patchgan, residual, dino, mean-colour"):
        AdversarialConfig(discriminator="other")


def test_wrong_rows(place):
    for study, row, message in (
        ("table44", paper.Row(("x",), None), "no study 'table44'; did you mean"),
        ("table4", paper.Row(("x", "y"), None), "a row of table4 has 1 label"),
        ("table4", paper.Row(("x",), None, against=99), "to compare with, not 99"),
        ("table4", paper.STUDIES["table4"].rows[0], "has a row .* already"),
    ):
        with pytest.raises(ValueError, match=message):
            paper.add_row(study, row)


def test_images_of_a_source_are_what_it_gives(place):
    take_plugins(["--plugin", "tested_plugin"])
    expected = np.random.default_rng(1).integers(0, 256, (3, 20, 24), dtype=np.uint8)
    assert np.array_equal(open_source("noise:3").image(1).numpy(), expected)
