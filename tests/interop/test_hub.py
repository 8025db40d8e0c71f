"""Publishing: the card says what the run knows and no more, and nothing but the model leaves the machine."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from helpers.frozen import on_autoencoder, on_vit, save_autoencoder, save_vit
from helpers.saved_runs import RESULT, tokenizer_run, write_run
from hieratok import HieraTok, TokenizerConfig, push_to_hub
from hieratok.cli import main
from hieratok.core import checkpoint
from hieratok.generation.dit import DiT, DiTConfig, LatentSpace
from hieratok.interop.hub import FILES, MAX_PICTURE, local, write_folder
from hieratok.training.generator import GeneratorRun


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished tokenizer with an evaluation, on photos whose place is nobody's business."""
    settings = tokenizer_run()
    settings = replace(
        settings,
        data=replace(settings.data, path="/home/someone/photos"),
        eval=replace(settings.eval, lpips=("alex=/home/someone/alex.pth",)),
    )
    folder = write_run(tmp_path / "runs" / "photos", settings)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(RESULT))
    return folder


class FakeHub:
    """Stands for the hub: what would be uploaded lies in `folder` afterwards."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls: list[tuple[str, Any]] = []

    def __call__(self, **_: Any) -> "FakeHub":
        return self

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.calls.append((repo_id, private))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        assert commit_message
        assert set(allow_patterns) == {*FILES, *checkpoint.ENCODER_FILES}
        shutil.copytree(folder_path, self.folder / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")

    def download(hub_id: str, revision: str | None, allow_patterns: list[str], **others) -> str:
        fake.calls.append((hub_id, revision))
        assert set(allow_patterns) <= {*FILES, *checkpoint.ENCODER_FILES}
        return str(fake.folder / hub_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fake


def test_what_is_pushed_is_the_model_and_decodes_bit_equal(run, hub):
    assert push_to_hub(run, "alice/photos", license="mit", private=True) == "https://huggingface.co/alice/photos"
    assert sorted(path.name for path in (hub.folder / "alice/photos").iterdir()) == sorted(FILES)
    back = HieraTok.from_pretrained("alice/photos", revision="v1")
    assert hub.calls == [("alice/photos", True), ("alice/photos", "v1")]
    z = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        for ours, theirs in zip(HieraTok.from_pretrained(run).decode_pyramid(z), back.decode_pyramid(z), strict=True):
            assert torch.equal(ours, theirs)
    assert not (run / "hub").exists()


def test_the_card(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), "alice/photos", "--license", "apache-2.0", "--dry_run"]) == 0
    card = ModelCard.load(run / "hub" / "README.md")  # parses the metadata
    metadata = card.data.to_dict()
    assert (metadata["license"], metadata["library_name"]) == ("apache-2.0", "hieratok")
    assert "arxiv:2509.23736" in metadata["tags"]
    text = card.content
    assert "| PSNR | 21.5 dB | higher |" in text
    assert "reference sha256: abab" in text
    assert "Warning: 100 images" in text
    assert "Not measured: rFID, LPIPS." in text
    assert "| data | photos |" in text
    assert '"model.latent_channels": 4' in text
    assert "| steps x batch | 40 x 4 |" in text
    assert "someone" not in text, "a path of this machine"
    assert "pip install hieratok" in text
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    Image.new("RGB", (30, 20)).save("photo.jpg")
    exec(code.replace("alice/photos", str(run / "hub")), {})  # as it stands, but for where the model is
    with Image.open("16px.png") as finest:
        assert finest.size == (16, 16)
    assert metadata["pipeline_tag"] == "image-to-image"
    (entry,) = metadata["model-index"]
    found = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert found["psnr"] == RESULT["psnr"]
    assert entry["name"] == "photos"
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (citation,) = re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
    assert citation == re.findall(r"```bibtex\n(.*?)```", readme, re.DOTALL)[0]
    with Image.open(run / "hub" / "pictures.png") as picture:
        assert max(picture.size) <= MAX_PICTURE
    assert "![" in text


def test_a_generator(tmp_path, hub, monkeypatch):
    model = DiTConfig.of_size("tiny", latent_channels=4, latent_size=4, num_classes=2)
    settings = replace(GeneratorRun(name="dit", tokenizer="/home/someone/runs/photos"), model=model)
    settings = replace(settings, train=replace(settings.train, steps=40, batch_size=4))
    run = write_run(tmp_path / "dit", settings, pictures=False)
    push_to_hub(run, "alice/dit", license="mit")
    back, ours = DiT.from_pretrained("alice/dit").state_dict(), DiT.from_pretrained(run).state_dict()
    assert all(torch.equal(back[name], value) for name, value in ours.items())
    card = (hub.folder / "alice/dit" / "README.md").read_text()
    assert "Not measured: FID, Inception Score, KID, precision, recall." in card
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    HieraTok(tokenizer_run().model).save_pretrained(tmp_path / "tokenizer")
    generator = DiT.from_pretrained(run)
    generator.latents = LatentSpace("0" * 64, (0.0,) * 4, (1.0,) * 4)
    generator.save_pretrained(hub.folder / "alice/dit")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("TOKENIZER", "tokenizer").replace("steps=50", "steps=2"), {})
    for i in range(4):
        with Image.open(f"sample-{i}.png") as picture:
            assert picture.size == (16, 16)
    assert "of 2 classes" in card
    assert "In training it was `photos`." in card
    assert "There are no pictures" in card
    assert "![" not in card


def test_an_unfinished_run_and_a_bare_model_say_so(tmp_path):
    run = write_run(tmp_path / "run", tokenizer_run(), steps=20)
    assert main(["push", str(run), "a/b", "--license", "mit", "--dry-run"]) == 0
    assert "Its training is not finished (step 20 of 40)" in (run / "hub" / "README.md").read_text()
    bare = run / "checkpoints" / "step-00000020" / "tokenizer"
    assert main(["push", str(bare), "a/b", "--license", "mit", "--dry-run"]) == 0
    assert "Not known: the model was published without its run." in (bare / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["RUN", "a/b"], "needs --license"),
        (
            ["RUN", "a/b", "--license", "MIT"],
            "'MIT' is not a licence's identifier; did you mean 'mit'?: give",
        ),
        (["RUN", "a/b", "--license", "apache"], "'apache' is not a licence's identifier"),
        (["RUN", "a/b", "--license", "my-own"], "'my-own' is not a licence's identifier"),
        (["RUN", "a/b", "--license", "mit or isc"], "'mit or isc' is not a licence's identifier"),
        (["RUN", "a/b", "--license", "licenseref-x"], "'licenseref-x' is not a licence's identifier"),
        (["RUN", "photos", "--license", "mit"], "'photos' is not a hub id: NAME/MODEL"),
        (["RUN/none", "a/b", "--license", "mit", "--dry_run"], "none: no such folder"),
        (["RUN/pictures", "a/b", "--license", "mit", "--dry_run"], "pictures holds no model"),
        (["RUN", "a/b", "--license", "mit"], "hf auth login"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(run, arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # would be a TypeError, were it asked for
    before = sorted(run.rglob("*"))
    assert main(["push", *(argument.replace("RUN", str(run)) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert sorted(run.rglob("*")) == before


def test_the_hubs_refusal_is_one_line(run, hub, monkeypatch, capsys):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("403 Forbidden\nyou may not")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    assert main(["push", str(run), "a/b", "--license", "mit"]) == 1
    assert capsys.readouterr().err == "hieratok: a/b: the hub refused (403 Forbidden)\n"


def test_a_model_without_weights_is_refused(run):
    (run / "tokenizer" / checkpoint.WEIGHTS).unlink()
    assert main(["push", str(run), "a/b", "--license", "mit", "--dry_run"]) == 2
    assert not (run / "hub").exists()


def test_weights_that_are_not_finite_are_refused(run, hub, capsys):
    """Statistics that were not measured are no weights: those are NaN until then."""
    tokenizer = HieraTok.from_pretrained(run)
    assert tokenizer.latent_mean.isnan().all()
    assert main(["push", str(run), "a/b", "--license", "mit", "--dry_run"]) == 0
    with torch.no_grad():
        tokenizer.decoder.head.weight[0, 0] = float("inf")
    tokenizer.save_pretrained(run / "tokenizer")
    capsys.readouterr()
    assert main(["push", str(run), "a/b", "--license", "mit"]) == 2
    assert "holds NaN or infinite values in 1 tensors, such as decoder.head.weight" in capsys.readouterr().err
    assert not hub.calls


def test_a_run_that_learned_nothing_is_refused(run, capsys):
    log = run / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(r | {"skipped_steps": r["step"]}) + "\n" for r in records))
    assert main(["push", str(run), "a/b", "--license", "mit", "--dry_run"]) == 2
    assert "learned nothing: all of its 40 steps were skipped as not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/someone/photos/", "photos"),
        ("~/photos", "photos"),
        ("/home/someone/imagenette/train-*.tar", "imagenette/train-*.tar"),
        ("C:\\Users\\someone\\photos", "photos"),
        ("alex=/home/someone/alex.pth", "alex=alex.pth"),
        (["vgg", "alex=/home/x.pth"], ["vgg", "alex=x.pth"]),
        ("bundled:train", "bundled:train"),
        ("runs/photos", "runs/photos"),
        ("data/of/someone/photos", "photos"),
        ("../photos", "photos"),
        ("./photos/", "photos"),
        ("data/imagenette/train-*.tar", "imagenette/train-*.tar"),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_paths_lose_their_folders(value, kept):
    assert local(value) == kept


# --- frozen encoders --------------------------------------------------------------------------------------------------


def on_frozen(folder: Path, config: TokenizerConfig, copied: bool) -> Path:
    """A run's folder with a tokenizer whose encoder is frozen."""
    write_run(folder, replace(tokenizer_run(), model=config, loss=replace(tokenizer_run().loss, kl_weight=0.0)))
    if copied:
        HieraTok.from_pretrained(folder).encoder.save(folder / "tokenizer/encoder")  # type: ignore[operator]
    return folder


def test_a_copied_encoder_is_published_and_found_again(tmp_path):
    vae = save_autoencoder(tmp_path / "vae")
    run = on_frozen(tmp_path / "run", on_autoencoder(vae), copied=True)
    write_folder(run, "alice/preview", "mit", tmp_path / "hub")
    shutil.rmtree(vae)
    published = HieraTok.from_pretrained(tmp_path / "hub")
    assert published.config.encoder == "diffusers:vae"
    assert published.encode(torch.zeros(1, 3, 32, 32)).mean.shape == (1, 4, 8, 8)
    assert str(tmp_path) not in (tmp_path / "hub/config.json").read_text()


def test_an_encoder_that_nobody_else_has_is_not_published(tmp_path):
    run = on_frozen(tmp_path / "run", on_autoencoder(save_autoencoder(tmp_path / "vae")), copied=False)
    with pytest.raises(ValueError, match=r"is only on this machine: train with --copy_encoder"):
        write_folder(run, "alice/preview", "mit", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    vit = on_frozen(tmp_path / "vit", on_vit(save_vit(tmp_path / "vit.safetensors")), copied=False)
    write_folder(vit, "alice/rae", "mit", tmp_path / "hub")  # timm's name is enough
    assert "encoder_weights" not in (tmp_path / "hub/config.json").read_text()
