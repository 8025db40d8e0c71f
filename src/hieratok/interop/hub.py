"""Publishing a trained model on the Hugging Face hub, with a model card made from its run.

    from hieratok import HieraTok, push_to_hub
    push_to_hub("runs/photos", "NAME/MODEL", license="mit")
    tok = HieraTok.from_pretrained("NAME/MODEL", revision="main")

Published are the model (config.json, model.safetensors), the card (README.md) and one small picture; no optimiser,
checkpoint or log, and only the last part of paths on this machine.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hieratok import __version__
from hieratok.core import checkpoint
from hieratok.core.files import check_regular, read_json_table, shown
from hieratok.core.glossary import describe
from hieratok.core.lock import lock
from hieratok.core.messages import nearest
from hieratok.core.pictures import to_pil
from hieratok.core.pixels import BadImageError, read_image
from hieratok.core.tables import Table, digits, flat
from hieratok.generation.dit import DiTConfig
from hieratok.reports.templating import render
from hieratok.tokenizer.model import TokenizerConfig
from hieratok.training.runs import Measurement, Run, read_run

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PAPER = "arXiv 2509.23736"
PICTURE = "pictures.png"
MAX_PICTURE = 1_024
"""Longer side of the card's picture, in pixels."""
FILES = [checkpoint.CONFIG, checkpoint.WEIGHTS, "README.md", PICTURE]
"""All that is ever published, but for a copy of a frozen encoder."""
EXPECTED = {
    "tokenizer": {"rFID": "fid", "PSNR": "psnr", "SSIM": "ssim", "LPIPS": "lpips"},
    "generator": {"FID": "fid", "Inception Score": "is", "KID": "kid", "precision": "precision", "recall": "recall"},
}
"""Metrics that readers expect, by the start of their names in metrics.json: the card lists missing ones."""
PIPELINES = {"tokenizer": "image-to-image", "generator": "unconditional-image-generation"}
"""The hub's task for the model, by which it lists models."""
CODE = {
    "tokenizer": """
import torch
from hieratok import HieraTok

tok = HieraTok.from_pretrained("HUB_ID")
images = tok.preprocess("photo.jpg")  # (B, 3, H, W) in [-1, 1]
with torch.inference_mode():
    z = tok.encode(images).mode()
    for image in tok.decode_progressive(z):  # every scale, coarse to fine
        tok.postprocess(image)[0].save(f"{image.shape[-1]}px.png")
""",
    "generator": """
import torch
from hieratok import HieraTok
from hieratok.generation.config import SampleConfig
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import sample_latents

dit = DiT.from_pretrained("HUB_ID")
tok = HieraTok.from_pretrained("TOKENIZER")  # the tokenizer of its latents
for batch in sample_latents(dit, SampleConfig(num=4, steps=50)):
    with torch.inference_mode():
        images = tok.decode(dit.latents.denormalize(batch.latents))
    for index, photo in zip(batch.indices, tok.postprocess(images)):
        photo.save(f"sample-{index}.png")
""",
}
HUB_LICENSES = {
    "apple-amlr", "apple-ascl", "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "cc",
    "creativeml-openrail-m", "deepfloyd-if-license", "gemma", "gfdl", "gpl", "intel-research", "lgpl", "llama2",
    "llama3", "llama3.1", "llama3.2", "llama3.3", "openmdw", "openrail", "openrail++", "other", "unknown",
}  # fmt: skip
"""The hub's own licence identifiers, besides SPDX's."""
COMMON_LICENSES = ("mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc0-1.0", "other")


def push(run: str, hub_id: str, license: str, private: bool, dry_run: bool) -> None:
    """The command `hieratok push`; with `dry_run`, write to the folder `hub` of the run instead of the hub.

    Raises:
        ValueError, FileNotFoundError: no such model, no licence, no token.
        OSError: the hub refused.
    """
    if dry_run:
        folder = Path(run) / "hub"
        write_folder(run, hub_id, license, folder)
        print(f"what would be published: {folder}\nnext: the same command without --dry_run")
        return
    url = push_to_hub(run, hub_id, license=license, private=private)
    print(f"published: {url}")


def push_to_hub(run: str | Path, hub_id: str, *, license: str, private: bool = False) -> str:
    """Publish a run's model with its card.

    Args:
        run: folder of a run, or of a model alone (whose card then has few facts).
        hub_id: "name/model"; the repository is created if needed.
        license: the hub's identifier of a licence, such as "mit"; there is no default.
        private: make a new repository private.

    Returns:
        Its address.

    Raises:
        ValueError: no licence, no hub id, or no token.
        FileNotFoundError: no model there.
        OSError: the hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    check(hub_id, license)
    if get_token() is None:
        raise ValueError("the hub needs a login: run `hf auth login`, or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_folder(run, hub_id, license, folder)
        api = HfApi(library_name="hieratok", library_version=__version__)
        try:
            url = api.create_repo(hub_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=hub_id,
                folder_path=folder,
                allow_patterns=[*FILES, *checkpoint.ENCODER_FILES],
                commit_message=f"hieratok {__version__}",
            )
        except Exception as error:  # the hub's own errors, and those of its client's HTTP library
            raise OSError(f"{hub_id}: the hub refused ({str(error).strip().splitlines()[0]})") from error
    return str(url)


def write_folder(run: str | Path, hub_id: str, license: str, folder: Path) -> None:
    """Write all published files to `folder`, atomically; an existing folder is replaced.

    Raises:
        ValueError, FileNotFoundError: no licence, no hub id, no model, or one that learned nothing or is not finite.
    """
    check(hub_id, license)
    facts = read_run(Path(run))
    kind, model = find_model(Path(run), facts)
    check_learned(facts, model)
    with lock(folder.parent, "push", ".push.lock"):  # not that of a run which still trains
        checkpoint.remove_leftovers(folder)
        with checkpoint.atomic_folder(folder) as temporary:
            for name in (checkpoint.CONFIG, checkpoint.WEIGHTS):
                check_regular(model / name)
                shutil.copyfile(model / name, temporary / name)
            publish_encoder(model, temporary)
            has_picture = write_picture(facts.picture, temporary / PICTURE)
            config = load_config(kind, model)
            card = make_card(facts, kind, config, hub_id, license, has_picture)
            (temporary / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def publish_encoder(model: Path, folder: Path) -> None:
    """Copy a frozen encoder from the tokenizer's folder, and name it without this machine's paths.

    Args:
        model: the tokenizer's folder.
        folder: what is published; its config.json is changed.

    Raises:
        ValueError: the encoder is only on this machine.
    """
    config = read_json_table(folder / checkpoint.CONFIG)
    encoder = config.get("encoder")
    if not isinstance(encoder, str):
        return
    copy = model / checkpoint.ENCODER
    kind, _, name = encoder.partition(":")
    if copy.is_dir():
        for path in sorted(copy.iterdir()):
            check_regular(path)
        shutil.copytree(copy, folder / checkpoint.ENCODER)
        config["encoder"] = f"{kind}:{Path(name).name}"
    elif kind == "diffusers" and (Path(name).exists() or not checkpoint.is_hub_id(name)):
        raise ValueError(
            f"the encoder {shown(encoder)} is only on this machine: train with --copy_encoder, which copies it into the"
            " tokenizer's folder, or name an autoencoder on the hub"
        )
    config.pop("encoder_weights", None)
    checkpoint.write_json(folder / checkpoint.CONFIG, config)


def check(hub_id: str, license: str) -> None:
    """Check the hub id and the licence as the hub does, before anything is written.

    Raises:
        ValueError: not a hub id or licence.
    """
    if not checkpoint.is_hub_id(hub_id):
        raise ValueError(f"{hub_id!r} is not a hub id: NAME/MODEL, such as alice/photos-f16d32")
    if not is_license(license):
        raise ValueError(
            f"{license!r} is not a licence's identifier{nearest(license.lower(), COMMON_LICENSES)}: give one of"
            f" SPDX's in lower case, such as {', '.join(COMMON_LICENSES[:4])}, or one of the hub's own, such as other"
            " (https://huggingface.co/docs/hub/repositories-licenses)"
        )


def is_license(identifier: str) -> bool:
    """Whether the hub knows a licence by this name: SPDX's identifiers in lower case, and some of its own."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    if identifier in HUB_LICENSES:
        return True
    if not re.fullmatch(r"(?!licenseref-)[a-z0-9][a-z0-9.+-]*", identifier):  # a single one, not an expression
        return False
    try:
        return bool(canonicalize_license_expression(identifier))
    except InvalidLicenseExpression:
        return False


def find_model(run: Path, facts: Run) -> tuple[str, Path]:
    """The kind of a run's model, tokenizer or generator, and its folder: finished, else the newest checkpoint.

    Raises:
        ValueError, FileNotFoundError: neither.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder")
    folder = checkpoint.find(run, inside=facts.kind)
    try:
        model_type = read_json_table(folder / checkpoint.CONFIG)["model_type"]
        return {"hieratok": "tokenizer", "hieratok-dit": "generator"}[model_type], folder
    except (KeyError, TypeError) as error:
        where = shown(folder / checkpoint.CONFIG)
        raise ValueError(f"{where} describes neither a tokenizer nor a generator") from error


def load_config(kind: str, folder: Path) -> dict[str, Any]:
    """A model's checked settings by name.

    Raises:
        ValueError: they are not those of a model of this kind.
    """
    if kind == "tokenizer":
        return asdict(checkpoint.load_config(folder, "hieratok", TokenizerConfig)[0])
    return asdict(checkpoint.load_config(folder, "hieratok-dit", DiTConfig, others=("latents",))[0])


def check_learned(facts: Run, model: Path) -> None:
    """Refuse models that are of no use.

    Raises:
        ValueError: a run without a good step, weights that are not finite, or a damaged file.
    """
    last = facts.log[-1] if facts.log else {}
    if last.get("skipped_steps", 0) >= last.get("step", math.inf):
        raise ValueError(
            f"{facts.folder} learned nothing: all of its {last['step']:,} steps were skipped as not finite"
        )
    path = model / checkpoint.WEIGHTS
    weights = checkpoint.read_tensors(path)
    broken = [n for n, tensor in weights.items() if n not in checkpoint.STATISTICS and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{shown(path)} holds NaN or infinite values in {len(broken)} tensors, such as {broken[0]}")


def write_picture(source: Path | None, path: Path) -> bool:
    """Write the run's latest picture, reduced; False if there is none that can be read."""
    if source is None:
        return False
    try:
        picture = to_pil(read_image(source))
    except BadImageError:
        return False
    picture.thumbnail((MAX_PICTURE, MAX_PICTURE))
    picture.save(path, format="PNG")
    return True


# --- The card ---------------------------------------------------------------------------------------------------------


def make_card(facts: Run, kind: str, config: Mapping[str, Any], hub_id: str, license: str, has_picture: bool) -> str:
    """README.md: metadata for the hub, then the model, its training and evaluation, and its limits."""
    from huggingface_hub import ModelCardData

    title = hub_id.partition("/")[2]
    data = ModelCardData(
        license=license,
        library_name="hieratok",
        pipeline_tag=PIPELINES[kind],
        model_name=title,
        eval_results=model_index(facts, kind) or None,
        tags=["image-tokenizer" if kind == "tokenizer" else "image-generation", "hieratok", "arxiv:2509.23736"],
    )
    settings = {name: local(value) for name, value in facts.settings.items()}
    card = render(
        "card.md",
        metadata=data.to_yaml(),
        title=title,
        version=__version__,
        introduction=introduction(kind, config),
        code=CODE[kind].strip().replace("HUB_ID", hub_id),
        use_note=use_note(kind, facts, hub_id),
        picture=PICTURE if has_picture else "",
        caption=picture_caption(kind),
        training=training(facts),
        measurements=measurements(facts),
        missing=not_measured(facts, kind),
        limits=limits(facts, kind, config, has_picture),
        settings=json.dumps(settings, indent=2) if settings else "",
    )
    return str(card)


def introduction(kind: str, config: Mapping[str, Any]) -> str:
    """The introduction of the card."""
    paper = "[HieraTok: Multi-Scale Visual Tokenizer](https://arxiv.org/abs/2509.23736)"
    code = f"made with hieratok {__version__}, an open implementation of that paper: not its authors' model"
    if kind == "tokenizer":
        side, scales = config["scales"][-1], config["scales"]
        kind_of = f"multi-scale tokenizer with {len(scales)} scales" if len(scales) > 1 else "single-scale tokenizer"
        return (
            f"An image tokenizer, a {kind_of}: it turns an image of {config['image_size']} px into {side} x {side}"
            f" latent vectors of {config['latent_channels']} numbers and decodes them at"
            f" {', '.join(str(config['patch_size'] * s) for s in scales)} px. After {paper} ({PAPER}), {code}."
        )
    side = config["latent_size"]
    return (
        f"A diffusion transformer (DiT, {config['objective']}) for the latents of a tokenizer,"
        f" {config['latent_channels']} x {side} x {side}, of {config['num_classes']:,}"
        f" class{'es' * (config['num_classes'] > 1)}. After {paper} ({PAPER}), {code}."
    )


def use_note(kind: str, facts: Run, hub_id: str) -> str:
    """A note on use."""
    if kind == "tokenizer":
        return (
            "Images may have any size: they are padded to whole patches, and positions are interpolated. `revision=`"
            f" chooses a branch, tag or commit. In a shell: `hieratok reconstruct {hub_id} PHOTO.jpg --out DIR`."
            f' In diffusers: `hieratok.interop.AutoencoderHieraTok.from_pretrained("{hub_id}")`.'
        )
    tokenizer = facts.settings.get("tokenizer")
    which = f" In training it was `{local(tokenizer)}`." if tokenizer else ""
    return f"TOKENIZER is the tokenizer of its latents; any other is refused.{which}"


def picture_caption(kind: str) -> str:
    """The picture's caption."""
    if kind == "tokenizer":
        return "Reconstructions at every scale, coarse to fine, and the originals, from the end of training (reduced)."
    return "Samples from the end of training: few steps, no guidance (reduced)."


def training(facts: Run) -> str:
    """Data, recipe, and time of training."""
    s, pace = facts.settings, facts.pace
    if not s:
        return "Not known: the model was published without its run."
    steps, batch = s.get("train.steps"), s.get("train.batch_size")
    lines = {
        "recipe": s.get("name"),
        "state": facts.state,
        "data": local(s.get("data.path")),
        "held-out data": local(s.get("data.val_path")) or "none",
        "started from": local(s.get("start_from")),
        "steps x batch": f"{steps:,} x {batch:,}" if isinstance(steps, int) and isinstance(batch, int) else None,
        "images seen": f"{pace.images_seen:,.0f}" if pace else None,
        "time": f"{pace.seconds / 3600:.2f} hours, {pace.images_per_second:.1f} images/s" if pace else None,
        "learning rate": f"{s.get('train.learning_rate')} to {s.get('train.min_learning_rate')}",
        "precision": s.get("train.precision"),
        "parameters": f"{facts.parameters / 1e6:.2f}M" if facts.parameters else None,
    }
    rows = [[name, str(value)] for name, value in lines.items() if value is not None]
    return Table(["", ""], rows).markdown()


@dataclass(frozen=True)
class Measured:
    """The card's part on one evaluation."""

    title: str
    table: str
    """Markdown."""
    warnings: list[str] = field(default_factory=list)
    protocol: str = ""
    """One fact per line; empty for an evaluation during training, whose protocol is in the settings."""


def measurements(facts: Run) -> list[Measured]:
    """Each evaluation in the run's folder, and the last one during training."""
    found = [measurement_part(m) for m in facts.measurements if any(describe(key) for key in m.numbers)]
    if facts.evaluations:
        last = facts.evaluations[-1]
        numbers = {k: v for k, v in last.items() if k not in ("step", "images")}
        found.append(Measured(f"At step {last['step']:,.0f}, during training:", metric_table(numbers)))
    return found


def measurement_part(measurement: Measurement) -> Measured:
    """One metrics.json."""
    result = measurement.result
    inputs = result.get("inputs")
    facts = {name: local(value) for name, value in inputs.items()} if isinstance(inputs, dict) else {}
    data = facts.get("data") or facts.get("reference")
    title = f"`{Path(measurement.where) / 'metrics.json'}`" + (f", images of `{data}`" if data else "")
    listed = result.get("warnings")
    warnings = [shown(warning) for warning in (listed if isinstance(listed, list) else ())]
    protocol = "\n".join(f"{name}: {value}" for name, value in flat({**measurement.manifest, **facts}))
    return Measured(title, metric_table(measurement.numbers), warnings, protocol)


def model_index(facts: Run, kind: str) -> "list[EvalResult]":
    """Results of evaluations after training, for the hub's tables."""
    from huggingface_hub import EvalResult

    results = []
    for measurement in facts.measurements:
        inputs = measurement.result.get("inputs")
        given = inputs if isinstance(inputs, dict) else {}
        data = str(local(given.get("data") or given.get("reference") or "not named"))
        for key, value in measurement.numbers.items():
            if metric := describe(key):
                results.append(
                    EvalResult(
                        task_type=PIPELINES[kind],
                        dataset_type="image-folder",
                        dataset_name=data,
                        metric_type=key,
                        metric_name=metric.label,
                        metric_value=value,
                    )
                )
    return results


def metric_table(numbers: Mapping[str, float]) -> str:
    """Metrics with their units and directions, as Markdown."""
    found = [(metric, value) for key, value in numbers.items() if (metric := describe(key))]
    rows = [[metric.label, f"{digits(value)} {metric.unit}".rstrip(), metric.better] for metric, value in found]
    return Table(["metric", "value", "better"], rows).markdown()


def not_measured(facts: Run, kind: str) -> list[str]:
    """The expected metrics that this run does not have."""
    found = {key for m in facts.measurements for key in m.numbers}
    found |= {key for record in facts.evaluations[-1:] for key in record}
    wanted = EXPECTED[kind].items()
    return [name for name, key in wanted if not any(f == key or f.startswith(f"{key}-") for f in found)]


def limits(facts: Run, kind: str, config: Mapping[str, Any], has_picture: bool) -> list[str]:
    """The card's list of limits."""
    lines = []
    if not facts.finished and facts.settings:
        lines.append(f"Its training is not finished ({facts.state}): these are its last checkpoint's averaged weights.")
    if kind == "tokenizer":
        lines.append(f"It was trained at {config['image_size']} px; quality at other sizes was not measured here.")
        lines.append("A tokenizer loses fine detail such as text and small faces first: check this for your images.")
    else:
        lines.append("Its samples have the content and biases of its training images, which were not measured.")
    if facts.settings and not facts.settings.get("data.val_path"):
        lines.append("No held-out images were named in training.")
    if not has_picture:
        lines.append("There are no pictures of what it does: the run drew none.")
    return lines


def local(value: Any) -> Any:
    """A setting without this machine's folders: the last part of a path (also in NAME=PATH), with the folder for a
    pattern. Relative paths of two parts are not changed, as they may be hub ids."""
    if isinstance(value, list):
        return [local(item) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")
    parts = re.split(r"[\\/]", path.rstrip("\\/"))
    if len(parts) < 3 and not re.match(r"[/~\\.]|[A-Za-z]:[\\/]", path):
        return value
    return name + equals + "/".join(parts[-2:] if "*" in parts[-1] else parts[-1:])
