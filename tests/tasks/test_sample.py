"""Samples as files: every image its own, whatever the batch, the process and the interruption."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hieratok.tasks.sample
from helpers.models import save_generator, save_tokenizer
from helpers.runs import TORCHRUN
from hieratok import HieraTok, cli
from hieratok.core.lock import lock
from hieratok.data.images import to_uint8
from hieratok.evaluation.images import open_images
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import SampleConfig, sample_latents
from hieratok.settings import load_options
from hieratok.tasks.sample import Sample, sample


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def generator(tmp_path_factory, tokenizer) -> Path:
    return save_generator(tmp_path_factory.mktemp("generator"), tokenizer)


@pytest.fixture
def options(tokenizer, generator, tmp_path) -> Sample:
    """Five images of the stochastic sampler."""
    return Sample(
        run=str(generator),
        tokenizer=str(tokenizer),
        out=str(tmp_path / "samples"),
        sampler="sde",
        steps=3,
        num=5,
        cfg=1.5,
        batch_size=2,
        device="cpu",
    )


def images(out: str | Path, side: int = 16) -> np.ndarray:
    """(N, H, W, 3) of a folder's PNGs, in the order of their names."""
    files = sorted((Path(out) / f"{side}px").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(len(files))]
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(np.array(image))
    return np.stack(found)


def archive(out: str | Path) -> dict[str, np.ndarray]:
    """samples.npz."""
    with np.load(Path(out) / "samples.npz") as arrays:
        return dict(arrays)


def sheet_size(out: str | Path) -> tuple[int, int]:
    with Image.open(Path(out) / "contact-sheet.png") as sheet:
        return sheet.size


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of any pixel."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# --- what is written --------------------------------------------------------------------------------------------------


def test_images_are_the_generators_latents_decoded(options, generator, tokenizer):
    sample(options)
    model, decoder = DiT.from_pretrained(generator), HieraTok.from_pretrained(tokenizer)
    config = SampleConfig(sampler="sde", steps=3, num=5, cfg=1.5, batch_size=2)
    std, mean = torch.tensor([0.5, 1.0, 2.0, 1.5]).view(4, 1, 1), torch.tensor([0.1, -0.2, 0.3, 0.0]).view(4, 1, 1)
    batches = list(sample_latents(model, config))
    with torch.inference_mode():
        expected = torch.cat([to_uint8(decoder.decode(batch.latents * std + mean)) for batch in batches])
    assert levels_apart(images(options.out), expected.permute(0, 2, 3, 1).numpy()) <= 1
    assert len(np.unique(images(options.out), axis=0)) == 5

    arrays = archive(options.out)
    assert np.array_equal(arrays["arr_0"], images(options.out))
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == torch.cat([batch.labels for batch in batches]).tolist()
    source = open_images(Path(options.out) / "samples.npz")  # as `evaluate samples` reads it
    assert len(source) == 5
    assert np.array_equal(source.image(3).permute(1, 2, 0), images(options.out)[3])

    metadata = json.loads((Path(options.out) / "metadata.json").read_text())
    assert metadata["settings"] == {
        "sampler": "sde",
        "steps": 3,
        "cfg": 1.5,
        "cfg_interval": None,
        "legacy_cfg": False,
        "time_shift": 1.0,
        "eta": 0.0,
        "seed": 0,
        "labels": "random",
        "num": 5,
        "precision": "fp32",
        "sides": [16],
        "generator_sha256": metadata["settings"]["generator_sha256"],
        "tokenizer_sha256": metadata["settings"]["tokenizer_sha256"],
    }
    assert sheet_size(options.out) == (5 * 18 + 2, 20)
    assert not list(Path(options.out).rglob("*.tmp"))


@pytest.mark.parametrize("preview", [False, True])
def test_every_scale(options, generator, tokenizer, preview):
    """Appendix D: the same latents, decoded at every scale; progressively too."""
    sample(options)
    scaled = replace(options, out=options.out + "-all", scales="finest" if preview else "all", preview=preview)
    sample(scaled)
    assert levels_apart(images(options.out), images(scaled.out)) <= 1
    model, decoder = DiT.from_pretrained(generator), HieraTok.from_pretrained(tokenizer)
    assert model.latents is not None
    batch = next(sample_latents(model, options, [0, 1]))
    with torch.inference_mode():
        pyramid = decoder.decode_pyramid(model.latents.denormalize(batch.latents))
    for side, expected in zip((4, 8, 16), pyramid):
        found = images(scaled.out, side)
        assert found.shape == (5, side, side, 3)
        assert levels_apart(found[:2], to_uint8(expected).permute(0, 2, 3, 1).numpy()) <= 1
    assert sheet_size(scaled.out) == (3 * 18 + 2, 5 * 18 + 2)


def test_previews_are_on_the_disk_before_the_finest_is_computed(options, monkeypatch):
    original = HieraTok.decode_progressive
    seen = []

    def watched(self, z):
        for image in original(self, z):
            seen.append({p.parent.name for p in Path(options.out).glob("*px/00000[01].png")})
            yield image

    monkeypatch.setattr(HieraTok, "decode_progressive", watched)
    sample(replace(options, preview=True, num=2))
    assert seen == [set(), {"4px"}, {"4px", "8px"}]


# --- the same images, however they are drawn --------------------------------------------------------------------------


def test_batches_do_not_matter(options):
    sample(options)
    for batch_size in (1, 8):
        other = replace(options, out=f"{options.out}-{batch_size}", batch_size=batch_size)
        sample(other)
        assert levels_apart(images(options.out), images(other.out)) <= 1


def test_compiled_generators_see_batches_of_one_size_and_draw_the_same(options, monkeypatch):
    """Two guided images a batch, five in all: the last batch is filled up, so nothing is compiled twice."""
    sample(options)
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(DiT, "compile", lambda self, dynamic: module_compile(self, counter, dynamic))
    torch._dynamo.reset()
    other = replace(options, out=f"{options.out}-compiled", compile=True)
    sample(other)
    assert counter.frame_count == 1
    assert levels_apart(images(options.out), images(other.out)) <= 1


def module_compile(module: torch.nn.Module, backend: Any, dynamic: bool) -> None:
    torch.nn.Module.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)


def test_bfloat16_draws_nearly_the_same_and_says_so(options):
    sample(options)
    other = replace(options, out=f"{options.out}-bf16", precision="bf16")
    sample(other)
    a, b = images(options.out).astype(float), images(other.out).astype(float)
    assert 0 < np.abs(a - b).mean() < 2
    with pytest.raises(ValueError, match="precision 'bf16' -> 'fp32'"):
        sample(replace(other, precision="fp32"))


def test_seeds_do_matter(options):
    sample(options)
    other = replace(options, out=options.out + "-1", seed=1)
    sample(other)
    assert levels_apart(images(options.out), images(other.out)) > 10


@pytest.mark.parametrize("scales", ["finest", "all"])
def test_an_interrupted_run_is_finished(options, monkeypatch, scales):
    options = replace(options, scales=scales)
    whole = replace(options, out=options.out + "-whole")
    sample(whole)
    original, written = hieratok.tasks.sample.save_png, []

    class Crash(Exception):
        pass

    def crash(picture, path, *text):
        written.append(path)
        if len(written) == 4:
            raise Crash
        return original(picture, path, *text)

    with monkeypatch.context() as patch:
        patch.setattr(hieratok.tasks.sample, "save_png", crash)
        with pytest.raises(Crash):
            sample(options)
    leftover = Path(options.out) / "16px" / ".000003.png.12345678.tmp"  # what a killed process leaves
    leftover.write_bytes(b"half")
    first = Path(options.out) / ("16px" if scales == "finest" else "4px") / "000000.png"
    before = first.stat().st_mtime_ns
    drawn = []
    with monkeypatch.context() as patch:
        draw = hieratok.tasks.sample.draw
        patch.setattr(hieratok.tasks.sample, "draw", lambda *args: drawn.append(args[-1]) or draw(*args))
        sample(options)
        sample(options)
    assert drawn[1] == []
    if scales == "finest":
        assert drawn[0] == [3, 4]
        assert first.stat().st_mtime_ns == before
    else:  # images of which a scale is missing are drawn again
        assert drawn[0] == [0, 1, 2, 3, 4]
    for side in (16,) if scales == "finest" else (4, 8, 16):
        assert levels_apart(images(whole.out, side), images(options.out, side)) <= 1
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "flipped", "swapped", "other settings", "other picture"])
def test_what_is_damaged_is_drawn_again(options, damage, caplog):
    sample(options)
    whole, folder = images(options.out), Path(options.out) / "16px"
    path = folder / "000001.png"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-30])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    elif damage == "swapped":
        path.write_bytes((folder / "000002.png").read_bytes())
    elif damage == "other settings":
        sample(replace(options, out=options.out + "-other", seed=7))
        path.write_bytes((Path(options.out + "-other") / "16px" / path.name).read_bytes())
    else:
        Image.new("RGB", (16, 16)).save(path)
    others = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p != path}
    sample(options)
    assert np.array_equal(images(options.out), whole)
    assert np.array_equal(archive(options.out)["arr_0"], whole)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p != path} == others
    assert ("000001.png is damaged, or a picture of something else" in caplog.text) == (damage != "missing")


def test_images_without_their_metadata_are_known(options):
    """Each says what it is of."""
    sample(options)
    (Path(options.out) / "metadata.json").unlink()
    other = replace(options, seed=7, out=options.out + "-other")
    sample(other)
    sample(replace(options, seed=7))
    assert np.array_equal(images(options.out), images(other.out))


def test_a_second_process_is_refused(options):
    with lock(options.out, "sample"), pytest.raises(ValueError, match="is in use by `hieratok sample`, process"):
        sample(options)
    assert not Path(options.out).exists()


def test_more_images_are_added(options):
    sample(replace(options, num=3))
    three = images(options.out)
    sample(options)
    assert np.array_equal(images(options.out)[:3], three)
    assert archive(options.out)["arr_0"].shape[0] == 5


def test_two_processes_draw_the_same_images(options):
    sample(options)
    flags = ["--sampler", "sde", "--steps", "3", "--num", "5", "--cfg", "1.5", "--batch-size", "2", "--device", "cpu"]
    arguments = ["sample", options.run, "--tokenizer", options.tokenizer, "--out", options.out + "-two", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # "--": else torchrun may take --num for an option of its own
    subprocess.run([*TORCHRUN, "-m", "--", "hieratok", *arguments], check=True, env=environment, timeout=300)
    assert levels_apart(images(options.out), images(options.out + "-two")) <= 1
    assert len(archive(options.out + "-two")["arr_1"]) == 5


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(options):
    sample(options)
    with pytest.raises(ValueError, match=r"other settings \(cfg 1\.5 -> 3, seed 0 -> 7\): choose another --out"):
        sample(replace(options, cfg=3, seed=7))
    with pytest.raises(ValueError, match=r"\(num 5 -> 4\)"):
        sample(replace(options, num=4))
    with pytest.raises(ValueError, match=r"\(sides \[16\] -> \[4, 8, 16\]\)"):
        sample(replace(options, scales="all"))
    sample(replace(options, batch_size=3))
    (Path(options.out) / "metadata.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metadata\.json holds no table"):
        sample(options)


def test_models_that_do_not_fit(options, tokenizer, tmp_path):
    other = save_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was trained on latents of another tokenizer than"):
        sample(replace(options, tokenizer=str(other)))
    larger = save_generator(tmp_path / "larger", tokenizer, latent_size=8)
    with pytest.raises(ValueError, match=r"makes latents 4 x 8 x 8, but .* takes 4 x 4 x 4"):
        sample(replace(options, run=str(larger)))
    foreign = tmp_path / "foreign" / "generator"
    model = DiT.from_pretrained(options.run)
    model.latents = None
    model.save_pretrained(foreign)
    with pytest.raises(ValueError, match="does not name the tokenizer of its latents"):
        sample(replace(options, run=str(foreign)))
    (foreign / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        sample(replace(options, run=str(foreign)))
    with pytest.raises(FileNotFoundError, match="holds no model"):
        sample(replace(options, run=options.tokenizer))
    assert not Path(options.out).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(labels=(0, 3)), r"label 3 is out of range: the generator knows 0 \.\. 2"),
        (dict(sampler="ddpm"), "sampler ddpm does not fit a generator trained with objective flow"),
    ],
)
def test_settings_that_the_generator_does_not_have(options, changes, message):
    with pytest.raises(ValueError, match=message):
        sample(replace(options, **changes))


def test_a_generator_that_gives_nan_writes_nothing(options, tokenizer, tmp_path):
    broken = save_generator(tmp_path / "broken", tokenizer)
    model = DiT.from_pretrained(broken)
    with torch.no_grad():
        model.final_layer.linear.weight.fill_(3e38)  # as a file holds it: NaN there would be refused
    model.save_pretrained(broken / "generator")
    with pytest.raises(ValueError, match=r"^images .* hold NaN or infinite values"):
        sample(replace(options, run=str(broken)))
    assert not list(Path(options.out).rglob("*.png"))


def test_the_command(options, capsys):
    arguments = ["sample", options.run, "--tokenizer", options.tokenizer, "--out", options.out, "--device", "cpu"]
    arguments += ["--sampler", "euler", "--steps", "2", "--num", "3", "--labels", "[2,1]", "--preview"]
    assert cli.main(arguments) == 0
    assert "next:     hieratok evaluate samples" in capsys.readouterr().out
    assert archive(options.out)["arr_1"].tolist() == [2, 1, 2]
    assert sorted(p.name for p in Path(options.out).iterdir() if p.is_dir()) == ["16px", "4px", "8px"]
    assert cli.main([*arguments, "--cfg", "-1"]) == 2
    assert "cfg must be a number of at least 0, not -1" in capsys.readouterr().err
    assert cli.main(arguments[:2]) == 2
    assert "needs --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "labels"), [(["--labels", "balanced"], "balanced"), (["--labels", "[0, 5]"], (0, 5)), ([], "random")]
)
def test_flags(flags, labels):
    given = ["runs/x", "--tokenizer", "y", "--out", "z", "--cfg-interval", "[0.1, 0.9]", "--legacy-cfg", *flags]
    options = load_options(Sample, ["run"], "hieratok sample", given)
    assert options == Sample(
        run="runs/x", tokenizer="y", out="z", cfg_interval=(0.1, 0.9), legacy_cfg=True, labels=labels
    )
