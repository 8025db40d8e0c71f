"""The vision-foundation loss against its formula in float64, and foundation models: input, weights, what is saved."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hieratok.losses.vf import VFConfig, VFLoss
from hieratok.tokenizer.foundation import FoundationModel

# timm's test ViT: 6 blocks, 64 channels, patches of 16, 160 px
TINY = VFConfig(weight=0.5, model="test_vit", random_model=True)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(count: int = 2, side: int = 48, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(count: int = 2, channels: int = 5, side: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def make_loss(config: VFConfig = TINY, channels: int = 5) -> VFLoss:
    torch.manual_seed(0)
    return VFLoss(config, channels)


# --- the loss ---------------------------------------------------------------------------------------------------------


def reference(f: np.ndarray, z: np.ndarray, cos_margin: float, distance_margin: float) -> tuple[float, float]:
    """FIELD's formula in loops: f and z' (B, C, N), float64."""

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    B, _, N = f.shape
    cosine = [max(0.0, 1 - cos_margin - cos(f[b, :, i], z[b, :, i])) for b in range(B) for i in range(N)]
    distance = [
        max(0.0, abs(cos(z[b, :, i], z[b, :, j]) - cos(f[b, :, i], f[b, :, j])) - distance_margin)
        for b in range(B)
        for i in range(N)
        for j in range(N)
    ]
    return float(np.mean(cosine)), float(np.mean(distance))


@pytest.mark.parametrize(("cos_margin", "distance_margin"), [(0.0, 0.0), (0.5, 0.25)])
def test_equals_its_formula(cos_margin, distance_margin):
    config = VFConfig(
        model="test_vit", random_model=True, cos_margin=cos_margin, distance_margin=distance_margin, weight=0.1
    )
    criterion = make_loss(config).double()
    x, z = images().double(), latents().double()
    loss, terms = criterion(z, x)
    (features,) = criterion.model(x, (48, 48), [5])
    projected = np.einsum("cd,bdhw->bchw", criterion.project.weight.detach().numpy()[:, :, 0, 0], z.numpy())
    cosine, distance = reference(features.flatten(2).numpy(), projected.reshape(2, 64, 9), cos_margin, distance_margin)
    assert terms["vf_cosine"].item() == pytest.approx(cosine, rel=1e-10)
    assert terms["vf_distance"].item() == pytest.approx(distance, rel=1e-10)
    assert loss.item() == pytest.approx(cosine + distance, rel=1e-10)
    assert distance > 0
    assert not any(term.requires_grad for term in terms.values())


def test_gradients():
    criterion = make_loss(channels=3).double()
    x = images(1, 32).double()
    z = latents(1, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: criterion(z, x)[0], z, eps=1e-7, atol=1e-5)


def test_features_themselves_cost_nothing():
    """z' = f: both parts are 0; with another z they are not."""
    criterion = make_loss(channels=64)
    nn.init.dirac_(criterion.project.weight)
    (features,) = criterion.model(images(), (48, 48), [5])
    loss, _ = criterion(3 * features, images())
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert criterion(latents(channels=64), images())[0] > 0.5


def test_margins_forgive():
    _, strict = make_loss()(latents(), images())
    lenient = VFConfig(model="test_vit", random_model=True, cos_margin=1.99, distance_margin=1.99)
    assert strict["vf_cosine"] > 0.5
    assert make_loss(lenient)(latents(), images())[0] == 0


def test_position_pairs_are_of_one_image():
    """A batch's loss is the mean of its images' losses."""
    criterion = make_loss()
    x, z = images(3), latents(3)
    alone = [criterion(z[i : i + 1], x[i : i + 1])[0].item() for i in range(3)]
    assert criterion(z, x)[0].item() == pytest.approx(np.mean(alone), rel=1e-5)


def test_what_is_trained_and_saved_is_the_projection():
    criterion = make_loss()
    assert list(criterion.state_dict()) == ["project.weight"]
    assert [name for name, _ in criterion.named_parameters()] == ["project.weight"]
    assert criterion.project.weight.shape == (64, 5, 1, 1)
    x, z = images().requires_grad_(), latents().requires_grad_()
    criterion(z, x)[0].backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    assert criterion.project.weight.grad is not None
    assert x.grad is None
    other = VFLoss(TINY, 5)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other(z, x)[0], criterion(z, x)[0])


def test_the_grid_follows_z():
    criterion = make_loss()
    sizes = []
    forward = criterion.model.forward

    def watched(images, size, blocks):
        sizes.append(size)
        return forward(images, size, blocks)

    criterion.model.forward = watched  # type: ignore[method-assign]
    criterion(torch.randn(1, 5, 2, 4), torch.zeros(1, 3, 64, 128))
    assert sizes == [(32, 64)]


def test_cosines_are_float32_under_autocast():
    """The model may run in bf16; given its features, the rest is as exact as without autocast."""
    criterion = make_loss()
    (features,) = criterion.model(images(), (48, 48), [5])
    criterion.model.forward = lambda *_: [features]  # type: ignore[method-assign]
    expected, _ = criterion(latents(), images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = criterion(latents(), images())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_images_enter_as_the_model_expects_or_as_they_are(normalize):
    config = VFConfig(model="vit_small_patch16_224.dino", random_model=True, normalize=normalize)
    model = make_loss(config).model
    x = images(1, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    network: Any = model._unregistered[0]
    expected = network.forward_features(((x + 1) / 2 - mean) / std if normalize else x)[:, 1:]
    (features,) = model(x, (32, 32), [11])
    torch.testing.assert_close(features.flatten(2).mT, expected, rtol=1e-4, atol=1e-4)
    other = network.forward_features(x if normalize else ((x + 1) / 2 - mean) / std)[:, 1:]
    assert not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.parametrize("z", [torch.zeros(2, 4, 3, 3), torch.zeros(1, 5, 3, 3), torch.zeros(2, 5, 9)])
def test_latents_of_another_shape(z):
    with pytest.raises(ValueError, match=r"z must be \(2, 5, 'h', 'w'\) for 2 images, not \("):
        make_loss()(z, images())


def test_images_of_another_shape():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) float in \[-1, 1\], not \(2, 1, 48, 48\)"):
        make_loss()(latents(), torch.zeros(2, 1, 48, 48))


def test_off_by_default_and_the_default_model_exists():
    assert VFConfig().weight == 0
    assert timm.is_model(VFConfig().model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "vf.weight must not be negative, it is -1.0"),
        ({"weight": float("nan")}, "vf.weight must not be negative"),
        ({"cos_margin": -0.1}, r"vf.cos_margin must be in \[0, 2\), not -0.1"),
        ({"distance_margin": 2.0}, r"vf.distance_margin must be in \[0, 2\), not 2.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        VFConfig(**settings)


# --- foundation models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file as timm publishes it: test_vit's names, here random values."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def expected_features(weights: Path, x: Tensor) -> Tensor:
    """What timm itself makes of images in [-1, 1], as test_vit expects them: patch tokens after the final norm."""
    from safetensors.torch import load_file

    network = timm.create_model("test_vit", img_size=x.shape[-1]).eval()
    tensors = timm.models.vision_transformer.checkpoint_filter_fn(load_file(weights), network)
    network.load_state_dict(tensors)
    with torch.no_grad():
        return network.forward_features(x)[:, 1:].transpose(1, 2)  # without the class token: (B, C, N)


@pytest.mark.parametrize("side", [160, 48])
def test_features_are_timm_s(weights, side):
    model = FoundationModel("vf.model", "test_vit", weights)
    assert (model.depth, model.width, model.patch_size, model.image_size) == (6, 64, 16, 160)
    x = images(2, side)
    first, last = model(x, (side, side), [2, 5])
    expected = expected_features(weights, x)
    torch.testing.assert_close(last.flatten(2), expected, rtol=1e-3, atol=1e-4)
    assert first.shape == last.shape
    assert not torch.allclose(first, last, rtol=0.1)


def test_the_grid_is_free_of_patch_and_image_size():
    """DINOv2's patches are of 14 px."""
    model = FoundationModel("vf.model", "vit_small_patch14_dinov2.lvd142m", random_weights=True)
    assert model.patch_size == 14
    (features,) = model(images(1, 32), (28, 28), [0])  # the grid of z whatever the image's
    assert features.shape == (1, 384, 2, 2)


def test_images_are_resized_to_the_grid():
    model = FoundationModel("vf.model", "test_vit", random_weights=True)
    x = images(1, 96)
    small = F.interpolate(x, (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(model(x, (48, 48), [5]), model(small, (48, 48), [5]))


def test_frozen_unregistered_and_moved_along():
    model = FoundationModel("vf.model", "test_vit", random_weights=True)
    outer = nn.Sequential(model).train().double()
    network = model._unregistered[0]
    assert not list(outer.parameters())
    assert not outer.state_dict()
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in network.parameters())
    x = images().double().requires_grad_()
    model(x, (48, 48), [5])[0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x, (48, 48), [5])[0], model(x, (48, 48), [5])[0])


def test_random_weights_are_fixed_and_leave_the_random_state_alone():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = FoundationModel("vf.model", "test_vit", random_weights=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    second = FoundationModel("vf.model", "test_vit", random_weights=True)
    assert torch.equal(first(images(), (48, 48), [5])[0], second(images(), (48, 48), [5])[0])


def test_weights_from_the_hub_s_cache(weights, empty_caches):
    """Laid out as huggingface_hub does."""
    repository = empty_caches / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef")
    (snapshot / "model.safetensors").write_bytes(weights.read_bytes())
    model = FoundationModel("vf.model", "test_vit")
    expected = FoundationModel("vf.model", "test_vit", weights)
    assert torch.equal(model(images(), (48, 48), [5])[0], expected(images(), (48, 48), [5])[0])


def test_weights_from_torch_s_cache_in_meta_s_layout(empty_caches):
    """DINO's authors' file, by its own name."""
    torch.manual_seed(4)
    network = timm.create_model("vit_small_patch16_224.dino", depth=12)
    path = empty_caches / "torch" / "checkpoints" / "dino_deitsmall16_pretrain.pth"
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    model = FoundationModel("gan.backbone", "vit_small_patch16_224.dino")
    loaded = model._unregistered[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())
    assert "state_dict" not in model._unregistered[0].pretrained_cfg


@pytest.mark.usefixtures("empty_caches")
def test_no_weights_and_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with pytest.raises(
        FileNotFoundError,
        match=r"the weights of vit_large_patch14_dinov2\.lvd142m are not on this machine: give the file with"
        r" --vf\.model_weights FILE, or run `hf download timm/vit_large_patch14_dinov2\.lvd142m",
    ):
        VFLoss(VFConfig(weight=0.1), 16)


def test_a_given_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth, given as vf\.model_weights, does not exist"):
        FoundationModel("vf.model", "test_vit", tmp_path / "none.pth")


def test_a_file_of_another_network_or_with_gaps(weights, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(weights)
    del tensors["blocks.3.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "gap.safetensors")
    with pytest.raises(ValueError, match=r"gap\.safetensors cannot be used as vf\.model 'test_vit'.*blocks\.3") as info:
        FoundationModel("vf.model", "test_vit", tmp_path / "gap.safetensors")
    assert "\n" not in str(info.value)
    with pytest.raises(ValueError, match=r"cannot be used as vf\.model 'test_vit2'"):
        FoundationModel("vf.model", "test_vit2", weights)
    (tmp_path / "text.pth").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"text\.pth cannot be read"):
        FoundationModel("vf.model", "test_vit", tmp_path / "text.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vitt", r"vf\.model: timm has no model 'test_vitt'; did you mean 'test_vit'"),
        ("hf-hub:someone/model", r"vf\.model: timm has no model 'hf-hub:someone/model'"),
        ("resnet18", r"vf\.model 'resnet18' is not a plain vision transformer"),
    ],
)
def test_names_that_are_no_vit(name, message):
    with pytest.raises(ValueError, match=message):
        FoundationModel("vf.model", name, random_weights=True)


@pytest.mark.parametrize("random_weights", [True, False])
def test_unknown_tags(random_weights):
    with pytest.raises(ValueError, match=r"vf\.model.*[Ii]nvalid pretrained tag"):
        FoundationModel("vf.model", "vit_small_patch16_224.nonsense", random_weights=random_weights)


def test_random_reads_no_file(weights):
    with pytest.raises(ValueError, match=r"a random vf\.model reads no file: leave out vf\.model_weights"):
        VFLoss(VFConfig(model="test_vit", random_model=True, model_weights=str(weights)), 4)
