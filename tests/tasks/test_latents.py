"""Cached latents: what encoding gives, whole or not at all, and of one tokenizer and one set of images."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import hieratok.data.latent_writer
from helpers.models import CONFIG, save_photos, save_tokenizer
from helpers.runs import TORCHRUN
from hieratok import HieraTok, cli
from hieratok.core import checkpoint
from hieratok.core.lock import lock
from hieratok.data.images import ImageDataset, center_crop, open_source, to_float
from hieratok.data.latents import LatentDataset
from hieratok.tasks.latents import WriteLatents, write_latents


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return save_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(hieratok.data.latent_writer, "SHARD_IMAGES", 4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(run: Path, photos: Path, out: Path, **options) -> dict[str, bytes]:
    write_latents(WriteLatents(run=str(run), data=str(photos), out=str(out), device="cpu", **options))
    return contents(out)


def posteriors(run: Path, photos: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and log-variances (N, 2, d, h, w), an image at a time."""
    tokenizer, source = HieraTok.from_pretrained(run), open_source(str(photos))
    means, logvars = [], []
    with torch.no_grad():
        for i in range(len(source)):
            image = center_crop(source.image(i), 16)
            both = tokenizer.encode(to_float(torch.stack((image, image.flip(-1)))))
            means.append(both.mean)
            logvars.append(both.logvar)
    return torch.stack(means), torch.stack(logvars)


# --- what is in a folder ----------------------------------------------------------------------------------------------


def test_latents_are_what_the_tokenizer_gives(run, photos, tmp_path):
    files = write(run, photos, tmp_path, batch_size=3)
    mean, logvar = posteriors(run, photos)
    shards = sorted(p for p in tmp_path.iterdir() if p.is_dir())
    assert [len(np.load(s / "labels.npy")) for s in shards] == [4, 4, 3]
    for name, expected in (("mean", mean), ("logvar", logvar)):
        found = np.concatenate([np.load(s / f"{name}.npy") for s in shards])
        assert found.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    names = [n.decode() for s in shards for n in np.load(s / "names.npy")]
    assert names == [open_source(str(photos)).name(i) for i in range(11)]
    assert not any(".tmp" in name for name in files)


def test_statistics_are_of_z_over_images_and_mirror_images(run, photos, tmp_path):
    write(run, photos, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    mean, logvar = (x.double().flatten(0, 1) for x in posteriors(run, photos))
    expected = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))
    np.testing.assert_allclose(manifest["mean"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(manifest["std"], variance.sqrt(), rtol=1e-5)
    assert manifest["images"] == 11
    assert manifest["shape"] == [4, 4, 4]
    assert manifest["tokenizer"]["sha256"] == checkpoint.file_sha256(run / "tokenizer" / "model.safetensors")
    assert manifest["tokenizer"]["config"]["scales"] == [1, 2, 4]


def test_a_data_set_mirrors_as_images_are_mirrored(run, photos, tmp_path):
    """Cached and encoded on the fly are the same training data: same images, same mirror images, same labels."""
    write(run, photos, tmp_path)
    latents = LatentDataset(tmp_path, seed=3)
    images = ImageDataset(open_source(str(photos)), 16, "center", seed=3)
    tokenizer = HieraTok.from_pretrained(run)
    mirrored = set()
    for index, epoch in [(i, e) for e in range(2) for i in range(11)]:
        item, image = latents[index, epoch], images[index, epoch]
        with torch.no_grad():
            posterior = tokenizer.encode(to_float(image["image"][None]))
        torch.testing.assert_close(item["mean"], posterior.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(item["logvar"], posterior.logvar[0], rtol=1e-4, atol=1e-5)
        assert (item["label"], item["skipped"]) == (image["label"], 0)
        plain = LatentDataset(tmp_path, flip=False)[index, epoch]["mean"]
        mirrored.add(torch.equal(plain, item["mean"]))
    assert mirrored == {True, False}
    assert len(latents) == 11
    assert latents.labels.tolist() == [0] * 6 + [1] * 5


def test_items_may_be_written_to(run, photos, tmp_path):
    """A copy of what is mapped: nothing reaches the files, and nothing warns."""
    before = write(run, photos, tmp_path)
    data = LatentDataset(tmp_path)
    data[0, 0]["mean"].zero_()
    assert data[0, 0]["mean"].abs().sum() > 0
    assert contents(tmp_path) == before


# --- resuming, processes ----------------------------------------------------------------------------------------------


def test_an_interrupted_folder_is_finished(run, photos, tmp_path, monkeypatch):
    whole = write(run, photos, tmp_path / "whole")

    class Crash(Exception):
        pass

    calls = []
    original = hieratok.data.latent_writer.encoded

    def crash(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Crash
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(hieratok.data.latent_writer, "encoded", crash)
        with pytest.raises(Crash):
            write(run, photos, tmp_path / "crashed")
    crashed = tmp_path / "crashed"
    assert [p.name for p in crashed.iterdir() if p.is_dir()] == ["shard-00000"]
    with pytest.raises(ValueError, match="are not finished: run the same `hieratok latents` again"):
        LatentDataset(crashed)
    (crashed / ".shard-00001.12345678.tmp").mkdir()  # what a killed process leaves
    with monkeypatch.context() as patch:
        patch.setattr(hieratok.data.latent_writer, "encoded", lambda *args: calls.append(args) or original(*args))
        calls.clear()
        assert write(run, photos, crashed) == whole
        assert len(calls) == 2
        assert write(run, photos, crashed) == whole  # finished: nothing is encoded again
        assert len(calls) == 2


@pytest.mark.parametrize("name", ["mean", "logvar", "labels", "names", "moments"])
@pytest.mark.parametrize("damage", ["missing", "cut", "swapped", "unsealed"])
def test_what_is_damaged_is_written_again(run, photos, tmp_path, name, damage, caplog):
    whole = write(run, photos, tmp_path)
    file, other = (tmp_path / f"shard-0000{k}" / f"{name}.npy" for k in (0, 1))
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "swapped":
        file.write_bytes(other.read_bytes())
    else:
        (file.parent / "checksums.json").unlink()
    assert write(run, photos, tmp_path) == whole
    assert "shard-00000 is damaged" in caplog.text
    assert "shard-00001 is damaged" not in caplog.text


def test_swapped_shards_are_written_again(run, photos, tmp_path, caplog):
    """Whole ones, but of other images; or of another tokenizer."""
    whole = write(run, photos, tmp_path / "latents")
    shards = [tmp_path / "latents" / f"shard-0000{k}" for k in (0, 1)]
    shards[0].rename(tmp_path / "aside")
    shards[1].rename(shards[0])
    (tmp_path / "aside").rename(shards[1])
    assert write(run, photos, tmp_path / "latents") == whole
    assert "its shard is 1 and not 0" in caplog.text
    write(save_tokenizer(tmp_path / "other", seed=1), photos, tmp_path / "others")
    checkpoint.remove(shards[0])
    shutil.copytree(tmp_path / "others" / shards[0].name, shards[0])
    assert write(run, photos, tmp_path / "latents") == whole
    assert "its encoder_sha256 is" in caplog.text


def test_a_damaged_manifest_is_refused_and_made_anew(run, photos, tmp_path):
    whole = write(run, photos, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for damaged in (json.dumps(manifest | {"std": None}), "{"):
        (tmp_path / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json.*: remove manifest\.json, and the same command"):
            write(run, photos, tmp_path)
        (tmp_path / "manifest.json").unlink()
        assert write(run, photos, tmp_path) == whole


@pytest.mark.parametrize("changes", [{"images": 8}, {"shape": [4, 2, 8]}, {"shard_images": 3}, {"mean": [0.0] * 4}])
def test_a_changed_manifest_is_put_right(run, photos, tmp_path, changes):
    whole = write(run, photos, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | changes))
    files = write(run, photos, tmp_path)
    if "shard_images" in changes:  # as if so many had been asked for
        assert LatentDataset(tmp_path).manifest.shard_images == 3
        assert len(LatentDataset(tmp_path)) == 11
    else:
        assert files == whole


def test_a_second_process_is_refused(run, photos, tmp_path):
    other = tmp_path / ".report.html.12345678.tmp"  # another command's, perhaps of a living process
    other.touch()
    with lock(tmp_path, "latents"), pytest.raises(ValueError, match="is in use by `hieratok latents`, process"):
        write(run, photos, tmp_path)
    write(run, photos, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [
        ".report.html.12345678.tmp"
    ]
    stats = WriteLatents(run=str(run), data=str(photos), stats_only=True, device="cpu")
    with lock(run, "train"), pytest.raises(ValueError, match="is in use by `hieratok train`, process"):
        write_latents(stats)


def test_two_processes_write_the_same_folder(run, photos, tmp_path):
    whole = write(run, photos, tmp_path / "one")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, hieratok.data.latent_writer, hieratok.cli\n"
        "hieratok.data.latent_writer.SHARD_IMAGES = 4\n"
        "sys.exit(hieratok.cli.main(sys.argv[1:]))\n"
    )
    arguments = ["latents", str(run), "--data", str(photos), "--out", str(tmp_path / "two"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*TORCHRUN, str(program), *arguments], check=True, env=environment, timeout=300)
    two = contents(tmp_path / "two")
    assert two.keys() == whole.keys()
    ours, theirs = LatentDataset(tmp_path / "one"), LatentDataset(tmp_path / "two")
    for i in range(11):  # another number of threads may round differently
        torch.testing.assert_close(ours[i, 0], theirs[i, 0])
    np.testing.assert_allclose(ours.manifest.std, theirs.manifest.std, rtol=1e-6)


# --- statistics into the tokenizer ------------------------------------------------------------------------------------


def test_stats_only_puts_statistics_into_the_tokenizer(photos, tmp_path, capsys):
    folder = save_tokenizer(tmp_path / "run")
    before = HieraTok.from_pretrained(folder)
    with pytest.raises(ValueError, match="--stats-only"):
        before.normalize(torch.zeros(1, 4, 4, 4))
    assert cli.main(["latents", str(folder), "--data", str(photos), "--stats-only", "--device", "cpu"]) == 0
    assert "4 channels over 11 images" in capsys.readouterr().out
    after = HieraTok.from_pretrained(folder)
    mean, logvar = (x[:, 0].double() for x in posteriors(folder, photos))
    torch.testing.assert_close(after.latent_mean.double(), mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))
    torch.testing.assert_close(after.latent_std.double(), variance.sqrt(), rtol=1e-4, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_statistics_do_not_make_another_tokenizer(photos, tmp_path):
    """Neither does a decoder trained on: latents stay what they are."""
    folder = save_tokenizer(tmp_path / "run")
    write(folder, photos, tmp_path / "latents")
    tokenizer = HieraTok.from_pretrained(folder)
    tokenizer.latent_std.fill_(1.0)
    with torch.no_grad():
        tokenizer.decoder.head.weight.zero_()
    tokenizer.save_pretrained(folder / "tokenizer")
    write(folder, photos, tmp_path / "latents")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_tokenizers_and_images_are_not_mixed(run, photos, tmp_path):
    write(run, photos, tmp_path / "latents")
    other = save_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"holds latents of another tokenizer, .*: choose another --out"):
        write(other, photos, tmp_path / "latents")
    shutil.copytree(photos, tmp_path / "fewer")
    shutil.copytree(photos, tmp_path / "moved")
    next((tmp_path / "fewer" / "cat").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"holds latents of other images, .*: choose another --out"):
        write(run, tmp_path / "fewer", tmp_path / "latents")
    write(run, tmp_path / "moved", tmp_path / "latents")  # the same images elsewhere are the same


def test_latents_that_are_damaged_or_missing(run, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no latents"):
        LatentDataset(tmp_path)
    write(run, photos, tmp_path)
    mean = tmp_path / "shard-00001" / "mean.npy"
    whole = mean.read_bytes()
    mean.write_bytes(whole[:-7])
    data = LatentDataset(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00001.mean\.npy cannot be read as \.npy: it is cut short"):
        data[5, 0]
    np.save(mean, np.zeros((3, 2, 4, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"shard-00001.mean\.npy does not fit manifest\.json"):
        LatentDataset(tmp_path)[5, 0]
    (tmp_path / "shard-00002" / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"shard-00002.labels\.npy does not exist"):
        LatentDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        LatentDataset(tmp_path)


def test_a_tokenizer_that_gives_nan_is_named_by_its_image(photos, tmp_path):
    folder = save_tokenizer(tmp_path / "run")
    tokenizer = HieraTok.from_pretrained(folder)
    with torch.no_grad():
        tokenizer.encoder.head.weight[0] = 3e38  # as a file holds it: NaN there would be refused
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"cat/00\.png: its latents hold NaN"):
        write(folder, photos, tmp_path / "latents")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say where to write with --out DIR, or --stats-only"),
        (["--out", "x", "--stats-only"], "leave out --out"),
        (["--out", "x", "--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["--oot", "x"], "unknown option --oot; did you mean 'out'?"),
    ],
)
def test_bad_flags(run, photos, capsys, flags, message):
    assert cli.main(["latents", str(run), "--data", str(photos), *flags]) == 2
    assert message in capsys.readouterr().err


def test_stats_only_writes_into_a_finished_tokenizer_alone(photos, tmp_path):
    torch.manual_seed(0)
    saved = tmp_path / "checkpoints" / "step-00000001"
    HieraTok(CONFIG).save_pretrained(saved / "tokenizer")
    checkpoint.seal(saved, run=None, step=1)
    with pytest.raises(ValueError, match="holds no finished tokenizer yet"):
        write_latents(WriteLatents(run=str(tmp_path), data=str(photos), stats_only=True, device="cpu"))
