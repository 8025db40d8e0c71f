"""The pages in docs/ and the README: every command and every line of Python in them, as written, only shorter.

Blocks of a page run in order, in one folder, as a reader would run them; training gets two steps. A block that needs
what is not at hand says so in its info string, which GitHub ignores: ```sh needs="one GPU; ImageNet, 140 GB". Its
commands go through the command line's parser, and what they would do is left out.
"""

import ast
import functools
import re
import runpy
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok import HieraTok
from hieratok.cli import COMMANDS, main
from hieratok.core import plugins
from hieratok.core.typed import plain
from hieratok.settings import load_run
from hieratok.studies import paper as studies
from hieratok.studies import recipes
from hieratok.training.generator import GeneratorRun
from hieratok.training.run_folder import flatten
from hieratok.training.tokenizer import TokenizerRun

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")), *DOCS]
IDS = [page.name for page in PAGES]

SHORTER = {  # appended: of an option that stands twice, the last counts
    "train": ["--train.steps", "2", "--train.batch_size", "2", "--train.picture_every", "0"],
    "sample": ["--steps", "2"],
}
LONG = {"quickstart", "app", "bench"}  # take minutes, or serve until they are stopped; they have tests of their own
WORK = (  # what commands do when their line has been understood
    "tasks.quickstart.quickstart",
    "training.tokenizer.train_tokenizer",
    "training.generator.train_generator",
    "tokenizer.model.HieraTok.from_pretrained",
    "tasks.reconstruct.reconstruct",
    "tasks.reconstruct.evaluate_tokenizer",
    "evaluation.protocols.evaluate_images",
    "evaluation.protocols.evaluate_samples",
    "evaluation.protocols.write_statistics",
    "evaluation.protocols.compare",
    "tasks.analyze.analyze",
    "tasks.latents.write_latents",
    "studies.run.run_study",
    "tasks.sample.sample",
    "reports.runs.write_report",
    "interop.hub.push",
    "interop.export.export",
    "app.server.serve",
    "bench.suite.bench",
)
TORCHRUN = {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint"}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    needs: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    found = re.findall(r"^```(\w+)(?: needs=\"([^\"]+)\")?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*block) for block in found if block[0] in languages]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """A block's lines as words, without comments; a line that ends in a backslash goes on."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


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
    monkeypatch.syspath_prepend(tmp_path)  # for modules that a page writes
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))  # a page adds to these
    monkeypatch.setattr(studies, "STUDIES", dict(studies.STUDIES))
    monkeypatch.setattr(plugins, "_loaded", set())  # of a plugin that a page writes
    monkeypatch.setenv(plugins.VARIABLE, "")
    for registry in (plugins.DOWNSAMPLERS, plugins.LOSSES, plugins.DISCRIMINATORS, plugins.SOURCES):
        monkeypatch.setattr(registry, "_parts", {})
    return tmp_path


@pytest.fixture
def run_command(capsys, monkeypatch):
    """Runs one command line of a page, given as words."""

    def run(words: list[str], understood: bool) -> None:
        program, *arguments = words
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif program == "pip":
            check_extras(arguments)
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), words
        elif program.startswith(".venv/bin/"):  # tools of those who work on the package
            assert program.removeprefix(".venv/bin/") in ("pytest", "pyright"), words
            assert all((ROOT / argument).exists() for argument in arguments), words
        elif program == "torchrun":
            assert understood, f"{words}: several processes are not started here; mark the block"
            start = arguments.index("hieratok")
            assert arguments[start - 1] in ("-m", "--"), words
            assert {word[2:] for word in arguments[: start - 1] if word.startswith("--")} - {""} <= TORCHRUN, words
            run(arguments[start:], understood)
        else:
            assert program == "hieratok", words
            run_hieratok(arguments, understood or arguments[0] in LONG)

    def run_hieratok(words: list[str], understood: bool) -> None:
        target = None
        if ">" in words:
            words, target = words[: words.index(">")], words[words.index(">") + 1]
        with monkeypatch.context() as patch:
            if understood:
                for name in WORK:
                    patch.setattr(f"hieratok.{name}", lambda *_, **__: ["what was written"])
                patch.setattr("hieratok.tokenizer.frozen.with_encoder", lambda model, *_, **__: model)  # reads a file
            status = main(words if understood else [*words, *SHORTER.get(words[0], [])])
        printed = capsys.readouterr()
        assert status == 0, f"{words}: {printed.err}"
        if target:
            Path(target).write_text(printed.out)

    return run


def check_extras(arguments: list[str]) -> None:
    """`pip install .`, `hieratok` or `'hieratok[extra]'` with extras that exist."""
    assert arguments[0] == "install"
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package in arguments[1:]:
        name, _, extra = package.rstrip("]").partition("[")
        assert name in (".", "hieratok"), package
        assert not extra or extra in known, package


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_blocks(page, workplace, run_command):
    namespace: dict[str, object] = {}
    for block in blocks(page, "sh", "python", "yaml"):
        if block.language == "python":
            code = compile(block.text, f"{page.name}: {block.text[:40]}", "exec")
            if not block.needs:
                exec(code, namespace)
        elif block.language == "yaml":
            Path("settings.yaml").write_text(block.text)
            load_run("settings.yaml")
        else:
            for words in commands(block.text):
                run_command(words, understood=bool(block.needs))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_has_a_known_kind(page):
    opened = re.findall(r"^```(.+)$", page.read_text(), re.MULTILINE)
    assert len(opened) == len(blocks(page, "sh", "python", "yaml", "text", "bibtex")), opened


def test_wrong_commands_are_noticed(run_command, workplace):
    """That the test above can fail, for blocks that are only understood and for those that run."""
    with pytest.raises(AssertionError, match="unknown option --train"):
        run_command(["hieratok", "train", "f16d16-multi", "--train.step", "3", "--data", "nowhere"], understood=True)
    with pytest.raises(AssertionError, match="unknown option --cgf"):
        run_command(["torchrun", "-m", "hieratok", "sample", "RUN", "--cgf", "3"], understood=True)
    with pytest.raises(AssertionError, match="no such file or folder"):
        run_command(["hieratok", "train", "tiny-multi", "--data", "nowhere"], understood=False)


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_python_writes_every_scale_and_keeps_no_gradients(workplace):
    (block,) = blocks(README, "python")
    names: dict = {}
    exec(compile(block.text, "README.md", "exec"), names)
    for side in (16, 32, 64, 128):
        with Image.open(workplace / f"{side}px.png") as picture:
            assert picture.size == (side, side)
    assert not names["z"].requires_grad
    assert not names["image"].requires_grad


def test_readme_measured_costs_are_those_of_the_code():
    from hieratok.tokenizer.cost import measure

    for kind in ("single", "multi"):
        cost = measure(recipes.get(f"f16d16-{kind}").model)
        numbers = (
            f"{cost.parameters / 1e6:.2f}M, {cost.gflops:.2f} ({cost.gflops_without_attention:.2f} without attention)"
        )
        assert numbers in README.read_text()


# --- what the text names ---------------------------------------------------------------------------------------------


@functools.cache
def settings() -> set[str]:
    """Of both kinds of run, such as `train.steps`."""
    return {*flatten(plain(TokenizerRun())), *flatten(plain(GeneratorRun()))}


@functools.cache
def options() -> set[str]:
    """Of all commands, without dashes in front."""
    all_of_them = [one for command in COMMANDS.values() for one in (command, *command.kinds.values()) if one.options]
    names = {field.name for command in all_of_them for field in fields(command.options)}
    return names | {"data", "encoder", "from", "out", "allow-changes", "help", "version", "plugin"} | TORCHRUN


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_in_the_text_exist(page):
    for code in re.findall(r"`([^`]+)`", prose(page)):
        for flag in re.findall(r"--([a-z][\w.-]*)", code):
            assert flag in settings() or flag.replace("-", "_") in {o.replace("-", "_") for o in options()}, code
        if re.fullmatch(r"(?:model|data|loss|gan|vf|train|eval)\.(?!(?:py|safetensors)$)\w+", code):
            assert code in settings(), code


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_recipes_in_the_text_exist(page):
    for command, recipe in re.findall(r"`hieratok ([a-z]+)(?: ([a-z][\w-]*))?[^`]*`", prose(page)):
        assert command in COMMANDS
        if command in ("train", "cost") and recipe:
            assert recipe in recipes.RECIPES, recipe
    for recipe in re.findall(r"`((?:f16d\d+|small|tiny|dit)-[\w-]+)`", prose(page)):
        assert recipe in recipes.RECIPES, recipe


# --- links -----------------------------------------------------------------------------------------------------------


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def names_in(path: Path) -> set[str]:
    """What a Python file defines, or calls so: functions, classes, methods, constants and fields."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links(page):
    text = prose(page)
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text) + [
        ("", path) for path in re.findall(r'<img src="(.+?)"', text)
    ]
    for label, target in links:
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        assert path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in slugs(path), f"{page.name}: {target}"
        if path.suffix == ".py" and (name := re.fullmatch(r"`(?:\w+\.)?(\w+)`", label)):
            assert name[1] in names_in(path) or label.strip("`") == path.name, f"{page.name}: [{label}]({target})"


def test_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in DOCS:
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_page_names_a_place_on_somebodys_machine(page):
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp|mnt|Users)/", page.read_text())


# --- made pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["settings.md", "architecture.svg", "attention.svg"])
def test_what_is_made_is_up_to_date(name):
    if name == "settings.md":
        made = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    else:
        made = runpy.run_path(str(ROOT / "docs" / "drawings.py"))[name.removesuffix(".svg")]()
    embedded = r"data:image/webp;base64,[^\"]+"  # bytes that another version of Pillow writes otherwise
    there = (ROOT / "docs" / name).read_text()
    assert re.sub(embedded, "", made) == re.sub(embedded, "", there), "run `make docs`"


def test_settings_page_has_every_setting_and_command():
    page = (ROOT / "docs" / "settings.md").read_text()
    for name in settings():
        assert f"| `{name}` |" in page, name
    for name in COMMANDS.keys() - {"train"}:  # whose options are a run's settings
        assert f"### hieratok {name}" in page, name
