"""Every command and every line of Python in the README, as written; only the training gets fewer steps."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok import HieraTok, recipes
from hieratok.cli import main
from hieratok.settings import load_run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """What a reader has after the quickstart: runs/quickstart and some photos."""
    torch.manual_seed(0)
    HieraTok(recipes.get("tiny-multi").model).save_pretrained(tmp_path / "runs" / "quickstart" / "tokenizer")
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((160, 140), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "photos" / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python(workplace, capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [f"(1, 3, {side}, {side})" for side in (16, 32, 64, 128)]


def commands(block: str) -> list[list[str]]:
    """Lines of a block as words, without comments."""
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def test_commands(workplace, capsys):
    for words in commands(blocks("sh")[1]):
        words = [{"2000": "2", "50": "2"}.get(word, word) for word in words]
        target = words.pop() if ">" in words else None
        words = [word for word in words if word != ">"]
        assert words[0] == "hieratok"
        status = main(words[1:])
        printed = capsys.readouterr()
        assert status == 0, f"{words}: {printed.err}"
        if target:
            Path(target).write_text(printed.out)
    assert (workplace / "runs" / "photos" / "tokenizer" / "model.safetensors").is_file()
    assert (workplace / "reconstructions" / "contact-sheet.png").is_file()
    assert (workplace / "samples" / "16px" / "000000.png").is_file()


def test_commands_that_need_a_cluster_are_understood():
    lines = commands(blocks("sh")[2])
    assert len(lines) == 2
    for program, command, *arguments in lines:
        assert (program, command) == ("hieratok", "train")
        run = load_run(arguments[0], arguments[1:]).run
        assert run.start_from == "runs/f16d16-multi"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", blocks("sh")[0], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_commands_in_tables_and_text_name_what_exists():
    commands = re.findall(r"`hieratok (train|cost) ([\w-]+)[^`]*`", README)
    assert len(commands) >= 6
    for _, recipe in commands:
        load_run(recipe)


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_measured_costs_are_those_of_the_code():
    from hieratok.cost import measure

    for kind in ("single", "multi"):
        cost = measure(recipes.get(f"f16d16-{kind}").model)
        numbers = (
            f"{cost.parameters / 1e6:.2f}M, {cost.gflops:.2f} ({cost.gflops_without_attention:.2f} without attention)"
        )
        assert numbers in README
