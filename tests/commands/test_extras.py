"""What each extra is for: the core works without any of them, and what is missing is named with its installation."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hieratok import cli
from hieratok.core.extras import EXTRAS, MissingPackageError, needs_extras
from hieratok.settings import Command

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}

WITHOUT = """
import sys
from pathlib import Path
for name in {blocked}:
    sys.modules[name] = None
"""
CORE = """
import torch
from hieratok import HieraTok, TokenizerConfig
from hieratok.cli import main

config = TokenizerConfig(16, 4, 4, (1, 2, 4), encoder_width=16, encoder_depth=1, encoder_heads=2, decoder_width=16,
                         decoder_depth=1, decoder_heads=2)
HieraTok(config).save_pretrained("tokenizer")
tokenizer = HieraTok.from_pretrained("tokenizer")
z = tokenizer.encode(torch.zeros(2, 3, 16, 16)).mode()
assert tokenizer.decode(z).shape == (2, 3, 16, 16)
assert [len(x) for x in tokenizer.decode_pyramid(z)] == [2, 2, 2]
assert main(["reconstruct", "tokenizer", "photos", "--out", "out"]) == 0
assert main(["recipes"]) == main(["cost", "tiny-multi"]) == 0
"""
MISSING = """
assert main(["train", "tiny-multi"]) == 2
assert main(["train", "small.yaml", "--data", "photos"]) == 2
assert main(["analyze", "--embedding", "points.npy"]) == 2
assert main(["analyze", "--latents", "latents.npy", "--draws", "1"]) == 2
assert main(["train", "small.yaml", "--data", "photos", "--vf.weight", "1", "--vf.random_model", "--out", "v"]) == 2
assert main(["app", "tokenizer"]) == 2
try:
    from hieratok.interop import AutoencoderHieraTok
except ImportError as error:
    print("hieratok:", error, file=sys.stderr)
"""
NAMED = ["skimage", "tensorboard", "scipy", "sklearn", "timm", "gradio", "diffusers"]
SMALL = """
model: {image_size: 16, patch_size: 4, latent_channels: 4, scales: [1, 2, 4], encoder_width: 16, encoder_depth: 1,
        encoder_heads: 2, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
data: {num_workers: 0}
loss: {perceptual_weight: 0.0}
train: {steps: 1, batch_size: 2, precision: fp32, picture_every: 0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    np.save(tmp_path / "points.npy", generator.normal(size=(100, 2)))
    np.save(tmp_path / "latents.npy", generator.normal(size=(100, 4)))
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def test_the_core_needs_no_extra_and_what_is_missing_is_named(folder):
    script = WITHOUT.format(blocked=sorted(EXTRAS)) + CORE + MISSING
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "out" / "contact-sheet.png").is_file()
    lines = re.findall(r"^hieratok: (.*)$", done.stderr, re.MULTILINE)
    assert lines == [f"{name} is not installed: pip install 'hieratok[{EXTRAS[name]}]'" for name in NAMED]


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_the_named_extra_brings_the_package_and_the_core_does_not(package):
    distribution = DISTRIBUTIONS.get(package, package)

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\s<>=\[;]", requirement)[0] for requirement in requirements}

    assert distribution in names(PROJECT["optional-dependencies"][EXTRAS[package]])
    assert distribution not in names(PROJECT["dependencies"])


def test_all_has_every_extra():
    extras = PROJECT["optional-dependencies"]
    (requirement,) = extras["all"]
    assert set(requirement.partition("[")[2].rstrip("]").split(",")) == extras.keys() - {"all", "dev"}
    assert "hieratok[all]" in extras["dev"]


def test_other_missing_modules_are_our_own_mistake(monkeypatch):
    def broken(arguments: list[str]) -> None:
        import hieratok.nowhere  # noqa: F401

    monkeypatch.setitem(cli.COMMANDS, "recipes", Command("", broken))
    with pytest.raises(ModuleNotFoundError, match=r"hieratok\.nowhere"):
        cli.main(["recipes"])


def test_a_missing_submodule_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingPackageError, match=r"^scipy is not installed: .*'hieratok\[eval\]'$"), needs_extras():
        from scipy.stats import t  # noqa: F401


def test_a_command_names_what_it_lacks(monkeypatch, capsys):
    def draw(arguments: list[str]) -> None:
        import matplotlib  # noqa: F401

    monkeypatch.setitem(cli.COMMANDS, "recipes", Command("", draw))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["recipes"]) == 2
    assert capsys.readouterr().err == "hieratok: matplotlib is not installed: pip install 'hieratok[eval]'\n"
