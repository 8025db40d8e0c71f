"""The command line: what each command prints and writes, and that a user's mistake is one line and leaves nothing."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from hieratok import HieraTok, __version__, cli
from hieratok.cli import main
from hieratok.commands.train import SUMMARY
from hieratok.core.errors import TrainingError
from hieratok.core.pictures import MARGIN, pyramid_sheet
from hieratok.core.typed import field_types, flatten, plain
from hieratok.data.images import center_crop, open_source, to_float, to_uint8
from hieratok.settings import Command, load_run
from hieratok.studies import recipes
from hieratok.tasks.reconstruct import SHEET_ROWS
from hieratok.training.config import TokenizerRun

SMALL = """
model: {image_size: 16, patch_size: 4, latent_channels: 4, scales: [1, 2, 4], encoder_width: 16, encoder_depth: 1,
        encoder_heads: 2, decoder_width: 24, decoder_depth: 2, decoder_heads: 2}
data: {num_workers: 0}
loss: {perceptual_weight: 0.0}
train: {steps: 2, batch_size: 4, learning_rate: 3e-4, save_every: 2, log_every: 1, picture_every: 2, precision: fp32}
"""

Run = Callable[..., tuple[int, str, list[str]]]


def photo(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        photo(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def trained(photos, config, tmp_path_factory) -> Path:
    """A run of two steps, made by the command."""
    out = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", str(config), "--data", str(photos), "--out", str(out)]) == 0
    return out


@pytest.fixture
def hieratok(tmp_path, monkeypatch, capsys) -> Run:
    """Run a command in an empty folder: exit status, what it printed, lines on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse leaves this way after --help
            status = int(stop.code or 0)
        printed, errors = capsys.readouterr()
        return status, printed, errors.splitlines()

    return run


@pytest.fixture
def refused(hieratok, tmp_path) -> Callable[..., str]:
    """Run a command that must fail with status 2, one line and nothing written; returns the line."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        status, printed, errors = hieratok(*arguments)
        assert (status, printed, len(errors)) == (2, "", 1), errors
        assert errors[0].startswith("hieratok: ")
        assert sorted(tmp_path.rglob("*")) == before
        return errors[0].removeprefix("hieratok: ")

    return run


# --- without a command ------------------------------------------------------------------------------------------------


def help_of_all() -> list[list[str]]:
    """Every command line that asks for help, and `recipes`."""
    words = [[name] for name in cli.COMMANDS] + [["evaluate", kind] for kind in cli.COMMANDS["evaluate"].kinds]
    words += [["train", "f16d16-multi"], ["train", "dit-tiny"]]
    return [[], *([*line, "--help"] for line in words), ["recipes"], ["recipes", "f16d16-multi"]]


def test_help_and_mistakes_do_not_wait_for_torch():
    """With torch and numpy out of reach, as imports of them take seconds."""
    script = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
from hieratok.cli import main
from hieratok.commands.train import SUMMARY
from hieratok.core.typed import field_types, flatten, plain
for line in LINES:
    try:
        assert main(line) == 0, line
    except SystemExit as stop:
        assert stop.code == 0, line
mistakes = [["evaluate", "picture"], ["trian"], ["sample", "--stpes", "3"], ["train", "tiny-mutli"], ["cost"]]
mistakes += [["train", "tiny-multi", "--train.steps", "x"], ["reconstruct", "run"]]
assert [main(line) for line in mistakes] == [2] * len(mistakes)
"""
    lines = f"LINES = {help_of_all()}\n"
    done = subprocess.run([sys.executable, "-c", lines + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout
    assert done.stderr.splitlines()[:2] == [
        "hieratok: no evaluation 'picture': choose from reconstruction, images, samples, stats, compare",
        "hieratok: no command 'trian'; did you mean 'train'? (`hieratok --help` lists them)",
    ]


def test_version(hieratok):
    assert hieratok("--version") == (0, f"hieratok {__version__}\n", [])


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name not in ("train", "evaluate")])
def test_help_begins_with_usage_one_sentence_and_an_example(hieratok, name):
    command = cli.COMMANDS[name]
    status, printed, errors = hieratok(name, "--help")
    assert (status, errors) == (0, [])
    start, sentence, *_ = printed.split("\n\n")
    assert start.startswith(f"usage: hieratok {name}")
    assert " ".join(sentence.split()).startswith(command.summary)
    assert f"\n\nExample: hieratok {name}" in printed
    assert command.options is not None
    for option in field_types(command.options):
        shown = rf"^  {option.upper()}( |$)" if option in command.positionals else rf"^  --{option}( |$)"
        assert len(re.findall(shown, printed, re.MULTILINE)) == 1, option
    for option in command.positionals:
        assert re.search(rf"\b{option.upper()}\b", start)


def test_the_process_ends_with_the_status():
    done = subprocess.run([sys.executable, "-m", "hieratok", "xyz"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "hieratok: no command 'xyz' (`hieratok --help` lists them)\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "hieratok: interrupted"),
        (TrainingError("loss is not finite\nat step 3"), 1, "hieratok: loss is not finite at step 3"),
        (OSError(28, "No space left on device", "x.png"), 1, "hieratok: [Errno 28] No space left on device: 'x.png'"),
        (ValueError("bad"), 2, "hieratok: bad"),
        (FileNotFoundError("x: no such file"), 2, "hieratok: x: no such file"),
    ],
)
def test_how_a_command_fails(hieratok, monkeypatch, error, status, line):
    def failing(argv: list[str]) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "recipes", Command("", failing))
    result, printed, errors = hieratok("recipes")
    assert (result, printed, len(errors)) == (status, "", 1)
    assert errors[0].startswith(line)


def test_our_own_mistakes_are_not_passed_off_as_the_users(monkeypatch):
    def broken(argv: list[str]) -> None:
        raise AssertionError

    monkeypatch.setitem(cli.COMMANDS, "recipes", Command("", broken))
    with pytest.raises(AssertionError):
        main(["recipes"])


# --- recipes and cost -------------------------------------------------------------------------------------------------


def test_recipes_are_listed(hieratok):
    status, printed, errors = hieratok("recipes")
    assert (status, errors) == (0, [])
    listed = dict(line.split("  ", 1) for line in printed.splitlines())
    assert {name: text.strip() for name, text in listed.items()} == {
        name: recipes.summary(name) for name in recipes.RECIPES
    }


def test_a_printed_recipe_can_be_trained(hieratok):
    status, printed, _ = hieratok("recipes", "tiny-multi")
    assert status == 0
    Path("mine.yaml").write_text(printed)
    assert load_run("mine.yaml")[0] == recipes.get("tiny-multi")


@pytest.mark.parametrize("command", ["recipes", "cost", "train"])
def test_unknown_recipe(refused, command):
    assert "no recipe 'tiny-mutli'; did you mean 'tiny-multi'?" in refused(command, "tiny-mutli")


def test_cost(hieratok, config, refused):
    status, printed, errors = hieratok("cost", "f16d16-multi", "--json")
    assert (status, errors) == (0, [])
    result = json.loads(printed)
    assert list(result) == ["parameters", "gflops", "gflops_without_attention", "encoder_tokens", "decoder_tokens"]
    assert (result["encoder_tokens"], result["decoder_tokens"]) == (256, 341)
    rows = [line.split() for line in hieratok("cost", "f16d16-multi")[1].splitlines()]
    assert ["parameters", "(M)", f"{result['parameters'] / 1e6:.2f}", "401.18"] in rows
    assert ["GFLOPs", f"{result['gflops']:.2f}", "230.45"] in rows
    assert ["decoder", "tokens", "341", "341"] in rows
    rows = [
        line.split() for line in hieratok("cost", config)[1].splitlines()
    ]  # a file, of which the paper says nothing
    assert rows[0] == ["small", "ours", "paper"]
    assert ["decoder", "tokens", str(1 + 4 + 16), "–"] in rows
    assert refused("cost") == "hieratok cost needs RECIPE (`hieratok cost --help` shows how)"


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.stpes", "3"], "unknown option --train.stpes; did you mean 'train.steps'?"),
        (["--train.ste", "3"], "unknown option --train.ste; did you mean 'train.steps'?"),  # no guessed abbreviations
        (["--train", "3"], "unknown option --train"),
        (["stray"], "unrecognized arguments: stray"),
        (["--train.steps"], "--train.steps: expected one argument"),
        (["--train.steps", "many"], "--train.steps must be a whole number, not 'many'"),
        (["--train.steps", "2.5"], "--train.steps must be a whole number, not '2.5'"),
        (["--train.steps", "null"], "--train.steps must be a whole number, not 'null'"),
        (["--train.steps=0"], "train.steps must be at least 1, not 0"),
        (["--train.micro_batch_size", "many"], "--train.micro_batch_size must be a whole number or null, not 'many'"),
        (["--train.learning_rate=fast"], "--train.learning_rate must be a finite number, not 'fast'"),
        (["--train.precision", "fp8"], "--train.precision must be one of fp32, bf16, fp16, not 'fp8'"),
        (["--model.attention", "casual"], "--model.attention must be one of full, independent, causal, not 'casual'"),
        (["--model.scales", "16"], "--model.scales must be a list of whole numbers, not '16'"),
        (["--model.scales", "[1, two]"], "--model.scales must be a list of whole numbers, not '[1, two]'"),
        (["--train.betas", "[0.9]"], "--train.betas must be a list of 2 finite numbers, not '[0.9]'"),
        (["--train.learning_rate", "1e999"], "--train.learning_rate must be a finite number, not '1e999'"),
        (["--data.flip", "maybe"], "unrecognized arguments: maybe"),
        (["--data.flip=maybe"], "--data.flip must be true or false, not 'maybe'"),
        (
            ["--model.scales", "[1,2]"],
            "model.scales [1, 2] must end at the latent grid's side, image_size / patch_size",
        ),
        (["--model.scales", "[4,2,8]"], "model.scales must ascend"),
        (["--model.image_size", "100"], "model.image_size 100 is not divisible by model.patch_size 16"),
        (["--data", "nowhere"], "no such file or folder: nowhere"),
        (["--data", "."], "no images found in ."),
    ],
)
def test_bad_flags(refused, flags, message):
    assert message in refused("train", "tiny-multi", *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {patch_size: 4}", "x.yaml: unknown setting 'modle'; did you mean 'model'?"),
        ("modle: {}", "x.yaml: unknown setting 'modle'; did you mean 'model'?"),
        ("out: here", "x.yaml: unknown setting 'out'"),
        ("on: 1", "x.yaml: the name True is not text: put it in quotes"),  # YAML's idea of `on`
        ("train: {stpes: 3}", "x.yaml: unknown setting 'train.stpes'; did you mean 'train.steps'?"),
        ("train: {steps: {a: 3}}", "x.yaml: unknown setting 'train.steps.a'; did you mean 'train.steps'?"),
        ("train: {steps: many}", "x.yaml: train.steps must be a whole number, not 'many'"),
        ("train: {steps: null}", "x.yaml: train.steps must be a whole number, not null"),
        ("name: null", "x.yaml: name must be a text, not null"),
        ("train: 3", "x.yaml: train must hold settings of its own by name, not 3"),
        ("train:", "x.yaml: train must hold settings of its own by name, not None"),
        ("data: {flip: maybe}", "x.yaml: data.flip must be true or false, not 'maybe'"),
        (
            "model: {attention: casual}",
            "model.attention must be one of full, independent, causal, not 'casual'",
        ),
        ("model: {scales: [1, two]}", "x.yaml: model.scales must be a list of whole numbers, not [1, 'two']"),
        ("model: {scales: [1, 2]}", "model.scales [1, 2] must end at the latent grid's side"),
        ("model: {image_size: 100}", "model.image_size 100 is not divisible by model.patch_size 16"),
        (
            "loss: {scale_weights: [1, x]}",
            "loss.scale_weights must be a list of finite numbers or null, not [1, 'x']",
        ),
        ("model: [", "x.yaml is not valid YAML: "),
        ("!!python/object/apply:os.getcwd []", "x.yaml is not valid YAML: "),
        ("- train", "x.yaml holds no settings"),
        ("", "x.yaml holds no settings"),
        ("{}", "no images: give --data PATH"),
    ],
)
def test_bad_files(refused, text, message):
    Path("x.yaml").write_text(text)
    assert message in refused("train", "x.yaml")


def test_files_that_are_none(refused):
    assert refused("train", "nowhere.yaml") == "nowhere.yaml does not exist"
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert refused("train", "bytes.yaml").startswith("bytes.yaml is not valid YAML")


def test_what_to_train_comes_first(refused):
    assert refused("train").startswith("say what to train: hieratok train RECIPE|FILE.yaml")
    assert refused("train", "--data", "photos", "tiny-multi").startswith("say what to train")
    assert refused("train", "f16d16-multi").startswith("no images: give --data PATH")


def test_help_of_train_explains_every_setting(hieratok):
    status, printed, errors = hieratok("train", "--help")
    assert (status, errors) == (0, [])
    assert "pixels per token side" in printed  # from TokenizerConfig's docstrings
    assert "Example: hieratok train" in printed
    for name in field_types(TokenizerRun).keys() - {"kind", "data.path", "start_from", "model.encoder"} | {
        "out",
        "allow_changes",
    }:
        assert len(re.findall(rf"^  --{re.escape(name)}( |$)", printed, re.MULTILINE)) == 1, name
    assert "\n  --data, --data.path PATH " in printed
    assert "\n  --from, --start_from RUN " in printed
    assert "\n  --encoder, --model.encoder timm:NAME|diffusers:FOLDER" in printed
    assert "default: " not in printed  # a recipe's settings are others than those of the 400M model
    assert not [word for word in ("Union[", "Literal[", "{true,false}", "--x+") if word in printed]
    order = ["usage: ", SUMMARY, "Example: ", "  RECIPE|FILE.yaml ", "  --data", "  --from", "  --train.steps "]
    places = [printed.index(word) for word in [*order, "  --model.scales ", "  --model.encoder_width "]]
    assert places == sorted(places)


@pytest.mark.parametrize("recipe", ["tiny-multi", "dit-tiny"])
def test_help_of_a_recipe_shows_its_values(hieratok, recipe):
    run = recipes.get(recipe)
    status, printed, errors = hieratok("train", recipe, "--help")
    assert (status, errors) == (0, [])
    words = " ".join(printed.split())
    for name, value in flatten(plain(run)).items():
        assert f"--{name} " in words or name == "kind"
        if isinstance(value, int | float | str) and not isinstance(value, bool) and name != "kind":
            assert f"(default: {value})" in words, name
    assert "(default: [1, 2, 4, 8])" in words or recipe == "dit-tiny"


def test_a_boolean_needs_no_value():
    flags = ["--train.compile", "--gan.adaptive", "true", "--data.flip=false", "--train.steps", "3", "--freeze_encoder"]
    run = load_run("tiny-multi", [*flags, "--from", "runs/x", "--train.activation_checkpointing"]).run
    assert (run.train.compile, run.gan.adaptive, run.data.flip, run.train.steps) == (True, True, False, 3)
    assert run.freeze_encoder
    assert run.train.activation_checkpointing


def test_flags_override_the_file_and_the_file_the_defaults(config, hieratok):
    run, out, _ = load_run(str(config), ["--train.steps=7", "--model.scales", "[2, 4]", "--train.betas", "[0.8,0.9]"])
    assert (run.name, str(out)) == ("small", "runs/small")
    assert (run.train.steps, run.train.batch_size, run.train.seed) == (7, 4, 0)
    assert (run.model.scales, run.train.betas) == ((2, 4), (0.8, 0.9))
    assert load_run(str(config), ["--name", "other"])[1] == Path("runs/other")
    assert load_run(str(config), ["--name", "other", "--out", "here"])[1] == Path("here")
    assert load_run("tiny-multi")[1] == Path("runs/tiny-multi")


def test_numbers_with_exponents_are_numbers(config):
    """YAML takes 3e-4, without a dot, for text."""
    assert yaml.safe_load("3e-4") == "3e-4"
    for run, _, _ in (load_run(str(config)), load_run("tiny-multi", ["--train.learning_rate", "3e-4"])):
        assert isinstance(run.train.learning_rate, float)
        assert run.train.learning_rate == 0.0003


def test_data_is_short_for_data_path():
    plain, short, equals = (
        load_run("tiny-multi", flags) for flags in (["--data.path", "x"], ["--data", "x"], ["--data=x"])
    )
    assert plain == short == equals
    assert plain[0].data.path == "x"
    assert replace(plain[0], data=recipes.get("tiny-multi").data) == recipes.get("tiny-multi")


# --- training ---------------------------------------------------------------------------------------------------------


def test_train_writes_a_run_and_goes_on_with_it(trained, config, photos, hieratok):
    before = {
        path: path.read_bytes() for path in trained.rglob("*") if path.suffix in (".yaml", ".jsonl", ".safetensors")
    }
    assert {path.name for path in before} == {
        "config.yaml",
        "log.jsonl",
        "evaluations.jsonl",
        "model.safetensors",
        "tokenizer.safetensors",
    }
    assert [json.loads(line)["step"] for line in (trained / "log.jsonl").read_text().splitlines()] == [1, 2]
    status, printed, _ = hieratok("train", config, "--data", photos, "--out", trained)  # nothing is left to do
    assert status == 0
    assert f"{trained / 'tokenizer'}\n" in printed
    assert f"hieratok reconstruct {trained} " in printed
    assert {path: path.read_bytes() for path in before} == before


def test_another_run_is_not_overwritten(trained, config, photos, refused):
    line = refused("train", config, "--data", photos, "--out", trained, "--train.seed", "1")
    assert "train.seed 0 -> 1" in line
    assert line.endswith("choose another --out, or resume with the new ones with --allow-changes")


def test_a_run_that_diverges_says_so(config, photos, hieratok):
    status, _, errors = hieratok(
        "train", config, "--data", photos, "--train.learning_rate", "1e30", "--train.max_bad_steps", "1"
    )
    assert status == 1
    assert errors[-1].startswith("hieratok: the run diverged: loss, gradient or weights are not finite from step ")
    assert not Path("runs/small/tokenizer").exists()


# --- reconstruct ------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("given", ["folder", "glob", "files"])
def test_reconstruct_writes_every_scale(trained, photos, hieratok, given):
    images = {"folder": [photos], "glob": [photos / "[0-4].png"], "files": sorted(photos.iterdir())}[given]
    status, printed, _ = hieratok("reconstruct", trained, *images, "--crop", "--out", "out/here")
    assert status == 0
    assert printed.splitlines()[0] == "15 pictures and out/here/contact-sheet.png"
    out = Path("out/here")
    names = [f"{i}-{side}px.png" for i in range(5) for side in (4, 8, 16)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "contact-sheet.png"])
    tokenizer, source = HieraTok.from_pretrained(trained), open_source(str(photos))
    for i in range(5):
        original = center_crop(source.image(i), 16)
        with torch.no_grad():
            pyramid = tokenizer.decode_pyramid(tokenizer.encode(to_float(original[None])).mode())
        for x, side in zip(pyramid, (4, 8, 16), strict=True):
            assert torch.equal(pixels(out / f"{i}-{side}px.png"), to_uint8(x)[0])
    sheet = pixels(out / "contact-sheet.png")
    top, left = 16 + 4 * (16 + MARGIN), MARGIN + 3 * (16 + MARGIN)
    assert torch.equal(sheet[:, top : top + 16, left : left + 16], original)  # the last row's last cell


def test_reconstruct_one_file_of_a_sub_folder(trained, hieratok):
    Path("a/b").mkdir(parents=True)
    photo(7, (20, 30)).save("a/b/x.jpg")
    assert hieratok("reconstruct", trained / "tokenizer", "a/b/x.jpg", "--out", "one")[0] == 0
    assert Path("one/x-20x30px.png").is_file()
    assert hieratok("reconstruct", trained, "a", "--out", "two")[0] == 0
    assert Path("two/b-x-20x30px.png").is_file()
    assert Path("two/b-x-20x30px.png").read_bytes() == Path("one/x-20x30px.png").read_bytes()


def test_a_contact_sheet_does_not_grow_without_bounds(trained, hieratok):
    Path("many").mkdir()
    for i in range(SHEET_ROWS + 2):
        photo(i, (16, 16)).save(f"many/{i:02}.png")
    assert hieratok("reconstruct", trained, "many", "--out", "out")[0] == 0
    assert len(list(Path("out").glob("*-16px.png"))) == SHEET_ROWS + 2
    assert pixels(Path("out/contact-sheet.png")).shape[1] == 16 + SHEET_ROWS * (16 + MARGIN) + MARGIN


def test_reconstruct_refuses_what_is_not_there(trained, photos, refused):
    assert refused("reconstruct", "nowhere", photos, "--out", "out") == "nowhere: no such folder"
    Path("empty").mkdir()
    assert refused("reconstruct", "empty", photos, "--out", "out").startswith("empty holds no model")
    assert refused("reconstruct", trained, "empty", "--out", "out").startswith("no images found in empty")
    assert refused("reconstruct", trained, "x.png", "--out", "out").startswith("no such file or folder: x.png")
    assert refused("reconstruct", trained, "x*.png", "--out", "out") == "nothing matches x*.png"
    assert "--out" in refused("reconstruct", trained, photos)
    assert refused("reconstruct", trained, "--out", "out").startswith("hieratok reconstruct needs IMAGES")


def test_reconstruct_refuses_two_images_of_one_name(trained, refused):
    Path("twins").mkdir()
    for suffix in ("jpg", "png"):
        photo(1).save(f"twins/a.{suffix}")
    assert refused("reconstruct", trained, "twins", "--out", "out").startswith("a.jpg and a.png would both be written")


def test_reconstruct_names_an_unreadable_image(trained, hieratok):
    Path("bad").mkdir()
    photo(1).save("bad/a.png")
    Path("bad/b.png").write_bytes(Path("bad/a.png").read_bytes()[:200])
    status, printed, errors = hieratok("reconstruct", trained, "bad", "--out", "out")
    assert (status, printed) == (2, "")
    assert errors[-1].startswith("hieratok: ")  # on a line of its own, after the progress bar's
    assert "bad/b.png" in errors[-1]
    assert sum(line.startswith("hieratok: ") for line in errors) == 1
    assert not list(Path("out").glob("*.tmp"))


# --- killed processes -------------------------------------------------------------------------------------------------

PIXELS_ALONE = ("--features", "none", "--lpips", "[]")


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (
            ["evaluate", "reconstruction", "runs/small", "--data", "PHOTOS", *PIXELS_ALONE],
            ["evaluation/reconstructions.png", "evaluation/index.html", "evaluation/metrics.json"],
        ),
        (
            ["analyze", "runs/small", "--data", "PHOTOS", "--draws", "0"],
            ["analysis/index.html", "analysis/metrics.json"],
        ),
        (["report", "runs/small"], ["report.html"]),
        (["push", "runs/small", "alice/photos", "--license", "mit", "--dry_run"], ["hub"]),
    ],
)
def test_temporary_files_of_a_killed_command_are_removed(trained, photos, hieratok, words, written):
    """Those of what it writes, and no others, which a living process may need."""
    run = Path("runs/small")
    shutil.copytree(trained, run)
    before = set(run.rglob(".*"))
    names = [run / name for name in (*written, "pictures/step-00000002.png")]
    leftovers = [name.with_name(f".{name.name}.12345678.tmp") for name in names]
    for leftover in leftovers:
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(b"half")
    assert hieratok(*(photos if word == "PHOTOS" else word for word in words))[0] == 0
    assert all((run / name).exists() for name in written)
    assert set(run.rglob(".*")) - before == {leftovers[-1]}


# --- evaluate ---------------------------------------------------------------------------------------------------------


def mean_psnr(originals: list[torch.Tensor], reconstructions: list[torch.Tensor]) -> float:
    """By scikit-image."""
    pairs = zip(originals, reconstructions, strict=True)
    return float(np.mean([peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in pairs]))


def area(image: torch.Tensor, side: int) -> torch.Tensor:
    """Means over squares, to 8 bits."""
    f = image.shape[-1] // side
    return image.reshape(3, side, f, side, f).double().mean((2, 4)).round().to(torch.uint8)


def test_evaluate_reconstruction(trained, photos, hieratok):
    command = ("evaluate", "reconstruction", trained, "--data", photos, *PIXELS_ALONE, "--json")
    assert hieratok("reconstruct", trained, photos, "--crop", "--out", "pngs")[0] == 0
    source = open_source(str(photos))
    originals = [center_crop(source.image(i), 16) for i in range(5)]
    written = {side: [pixels(Path(f"pngs/{i}-{side}px.png")) for i in range(5)] for side in (4, 8, 16)}

    status, printed, _ = hieratok(*command)
    assert status == 0
    result = json.loads(printed)
    assert result["n"] == 5
    assert result["psnr"] == pytest.approx(mean_psnr(originals, written[16]), abs=1e-6)
    assert "fid" not in result
    assert result["manifest"]["latents"] == "posterior mean"
    assert result["manifest"]["crop"] == "ADM centre crop to 16"
    assert json.loads((trained / "evaluation" / "metrics.json").read_text()) == result
    assert (trained / "evaluation" / "reconstructions.png").is_file()

    status, printed, _ = hieratok(*command, "--scales", "--out", "scales")
    scales = json.loads(printed)["scales"]
    assert status == 0
    assert list(scales) == ["4", "8", "16"]
    for side, images in written.items():
        expected = mean_psnr([area(x, side) for x in originals], images)
        assert scales[str(side)]["psnr"] == pytest.approx(expected, abs=1e-6)
    assert json.loads(Path("scales/metrics.json").read_text())["scales"] == scales


def test_samples_of_the_posterior_do_not_depend_on_batches(trained, photos, hieratok):
    command = ("evaluate", "reconstruction", trained, *PIXELS_ALONE, "--json", "--out", "out")
    results = {}
    for batch_size in (1, 3):
        status, printed, _ = hieratok(*command, "--data", photos, "--sample", "--batch_size", batch_size)
        assert status == 0
        results[batch_size] = json.loads(printed)
    mean = json.loads(hieratok(*command, "--data", photos)[1])["psnr"]
    assert results[1]["psnr"] == pytest.approx(results[3]["psnr"], abs=1e-4)  # but for rounding in sums
    assert abs(results[1]["psnr"] - mean) > 1e-3  # noise was drawn: more than rounding makes
    assert results[1]["manifest"]["latents"] == "one sample of the posterior"
    assert results[1]["manifest"] == results[3]["manifest"]


def test_evaluate_images_equals_evaluating_the_run(trained, photos, hieratok):
    assert hieratok("reconstruct", trained, photos, "--crop", "--out", "pngs")[0] == 0
    Path("a").mkdir()
    Path("b").mkdir()
    source = open_source(str(photos))
    for i in range(5):
        Image.fromarray(center_crop(source.image(i), 16).permute(1, 2, 0).numpy()).save(f"a/{i}.png")
        Path(f"pngs/{i}-16px.png").rename(f"b/{i}.png")
    status, printed, _ = hieratok("evaluate", "images", "a", "b", *PIXELS_ALONE, "--json")
    assert status == 0
    result = json.loads(printed)
    command = ("evaluate", "reconstruction", trained, "--data", photos, *PIXELS_ALONE, "--json", "--out", "run")
    run = json.loads(hieratok(*command)[1])
    assert {k: result[k] for k in ("n", "psnr", "ssim")} == {k: run[k] for k in ("n", "psnr", "ssim")}

    status, printed, _ = hieratok("evaluate", "images", "a", "b", *PIXELS_ALONE, "--out", "images")
    assert status == 0
    assert f"{result['psnr']:.5g}" in printed.split()


def test_compare_refuses_other_protocols(trained, photos, hieratok, refused):
    command = ("evaluate", "reconstruction", trained, "--data", photos, *PIXELS_ALONE)
    for out, flags in (("mean", []), ("again", []), ("sample", ["--sample"])):
        assert hieratok(*command, *flags, "--out", out)[0] == 0
    status, printed, errors = hieratok("evaluate", "compare", "mean/metrics.json", "again/metrics.json", "--json")
    assert (status, errors) == (0, [])
    assert json.loads(printed)["psnr"]["difference"] == 0
    line = refused("evaluate", "compare", "mean/metrics.json", "sample/metrics.json")
    assert "cannot be compared" in line
    assert "latents: posterior mean | one sample of the posterior" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["picture"], "no evaluation 'picture': choose from reconstruction, images"),
        (["sample"], "no evaluation 'sample'; did you mean 'samples'?: choose from"),
        (["reconstruction"], "hieratok evaluate reconstruction needs RUN"),
        (["reconstruction", "run"], "hieratok evaluate reconstruction needs --data"),
        (["reconstruction", "--data", "x"], "hieratok evaluate reconstruction needs RUN"),
        (["images", "a"], "hieratok evaluate images needs B"),
        (["images", "a", "b", "c"], "unrecognized arguments: c"),
        (["samples", "a"], "hieratok evaluate samples needs --reference"),
        (["stats", "a"], "hieratok evaluate stats needs --out"),
        (["compare", "a"], "hieratok evaluate compare needs B"),
        (["compare", "a", "b"], "a does not exist"),
        (["reconstruction", "run", "--data", "x", "--feature", "none"], "--feature; did you mean 'features'?"),
        (["reconstruction", "run", "--data", "x", "--size", "big"], "--size must be a whole number or null, not 'big'"),
        (["reconstruction", "run", "--data", "x", "--json=maybe"], "--json must be true or false, not 'maybe'"),
        (["reconstruction", "run", "--data", "x"], "run: no such folder"),
        (["images", "a", "b", "--features", "none"], "no such file or folder: a"),
    ],
)
def test_bad_evaluations(refused, arguments, message):
    assert message in refused("evaluate", *arguments)


def test_evaluate_refuses_what_does_not_fit_the_run(trained, photos, refused):
    command = ("evaluate", "reconstruction", trained, *PIXELS_ALONE, "--out", "out")
    assert "cut to the tokenizer's own size, 16" in refused(*command, "--data", photos, "--size", 32)
    assert refused(*command, "--data", "nowhere").startswith("no such file or folder: nowhere")


@pytest.mark.parametrize("kind", ["reconstruction", "images", "samples", "stats", "compare"])
def test_help_of_evaluations(hieratok, kind):
    status, printed, errors = hieratok("evaluate", kind, "--help")
    assert (status, errors) == (0, [])
    assert f"Example: hieratok evaluate {kind} " in " ".join(printed.split())


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pyramid_sheet_shows_coarse_scales_as_they_are():
    generator = torch.Generator().manual_seed(0)
    coarse, fine, original = (
        torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator) for side in (4, 8, 16)
    )
    sheet = pyramid_sheet(original, [coarse, fine])
    header = 16
    assert sheet.size == (3 * (16 + MARGIN) + MARGIN, header + 2 * (16 + MARGIN) + MARGIN)
    cells = torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
    for row in range(2):
        for column, images in enumerate((coarse, fine, original)):
            top, left = header + row * (16 + MARGIN), MARGIN + column * (16 + MARGIN)
            cell = cells[:, top : top + 16, left : left + 16]
            repeats = 16 // images.shape[-1]
            assert torch.equal(cell, images[row].repeat_interleave(repeats, 1).repeat_interleave(repeats, 2))
    assert (cells[:, header:, :MARGIN] == 255).all()


def test_pyramid_sheet_of_oblong_images():
    original = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    sheet = pyramid_sheet(original, [original[:, :, ::2, ::2]])
    assert sheet.size == (2 * (12 + MARGIN) + MARGIN, 16 + 8 + 2 * MARGIN)
    assert (np.array(sheet)[16:24, -MARGIN - 12 : -MARGIN] == 0).all()
