"""Feature networks: Inception against torch-fidelity with one weights file, others by what they recognise."""

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hieratok.core.checkpoint import read_tensors
from hieratok.data.images import open_source
from hieratok.evaluation.config import EvaluateSamples
from hieratok.evaluation.features import (
    INCEPTION_FILES,
    FeatureNetwork,
    Inception,
    _imagenet,
    exact_float32,
    load_network,
    resize_tf1,
)
from hieratok.evaluation.protocols import evaluate_samples

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def photos(num: int, size: int, seed: int = 0) -> Tensor:
    """uint8 noise of two scales, which excites a network more than white noise does."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 6, 6, generator=generator)
    fine = torch.rand(num, 3, size, size, generator=generator)
    images = 0.8 * F.interpolate(coarse, (size, size), mode="bicubic") + 0.2 * fine
    return (255 * images).clamp(0, 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def seeded_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Inception network in the layout of the real file, with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    network = Inception()
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        with torch.no_grad():
            if p.ndim == 4:
                nn.init.kaiming_normal_(p, nonlinearity="relu", generator=generator)
            elif p.ndim == 2:
                p.normal_(0, 0.05, generator=generator)
            elif name.endswith(("running_var", "bn.weight")):
                p.uniform_(0.7, 1.3, generator=generator)
            elif p.is_floating_point():
                p.normal_(0, 0.1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "seeded.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_equals_torch_fidelity(seeded_inception: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(seeded_inception)
    )
    network = load_network("inception", seeded_inception)
    images = photos(2, 96)
    seen = {}
    block = theirs.Mixed_6d.branch1x1
    block.register_forward_hook(lambda module, inputs, output: seen.update(spatial=output))
    pool, logits = theirs(images)
    features = network(images)

    torch.testing.assert_close(features.pool, pool, rtol=1e-4, atol=1e-5 * pool.abs().max().item())
    assert network.class_weights is not None
    ours = features.pool @ network.class_weights.T
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
    # sFID's features: the first 7 channels, with TensorFlow's axes (rows, columns, channels), flattened.
    spatial = seen["spatial"].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert features.spatial is not None
    assert features.spatial.shape == (2, 2023)
    np.testing.assert_allclose(features.spatial, spatial, rtol=1e-4, atol=1e-5 * spatial.max())
    # The two images differ by much more than the tolerance.
    assert (pool[0] - pool[1]).abs().max() > 0.01 * pool.abs().max()


def test_samples_equal_torch_fidelity_from_the_files_on(seeded_inception: Path, tmp_path: Path) -> None:
    """The same images and weights' file, each through its own reading, network and formulas."""
    from torch_fidelity import calculate_metrics

    for name, seed in (("samples", 0), ("reference", 1)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(photos(6, 40, seed)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    samples, reference = str(tmp_path / "samples"), str(tmp_path / "reference")
    theirs = calculate_metrics(
        input1=samples,
        input2=reference,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=6,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(seeded_inception),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no loader processes
    )
    options = EvaluateSamples(path=samples, reference=reference, weights=str(seeded_inception))
    ours = evaluate_samples(options).numbers.finest
    name = load_network("inception", seeded_inception).name
    assert ours[f"fd-{name}"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours[f"kd-{name}"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert f"sfd-{name}" in ours
    assert not {"fid", "sfid", "is", "kid"} & ours.keys()


@pytest.mark.parametrize("size", [(32, 32), (64, 80), (256, 256), (299, 299), (400, 350)])
def test_resize_equals_torch_fidelity(size: tuple[int, int]) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(299, 299), align_corners=False)
    assert torch.equal(resize_tf1(x, 299), theirs)


def test_only_the_real_weights_give_fid(seeded_inception: Path) -> None:
    network = load_network("inception", seeded_inception)
    digits = hashlib.sha256(seeded_inception.read_bytes()).hexdigest()
    assert network.sha256 == digits
    assert network.key("fid") == f"fd-inception-{digits[:8]}"
    assert network.key("sfid") == f"sfd-inception-{digits[:8]}"
    assert network.key("is") == f"class-score-inception-{digits[:8]}"
    assert network.key("kid") == f"kd-inception-{digits[:8]}"

    real = FeatureNetwork("inception", nn.Identity(), lambda x: x, "", "6726825d" + 56 * "0")
    assert [real.key(metric) for metric in ("fid", "sfid", "is", "kid")] == ["fid", "sfid", "is", "kid"]
    other = FeatureNetwork("squeezenet", nn.Identity(), lambda x: x, "", "6726825d" + 56 * "0")
    assert other.key("fid") == "fd-squeezenet"


def test_a_hash_in_the_name_is_checked(seeded_inception: Path, tmp_path: Path) -> None:
    right = tmp_path / f"seeded-{hashlib.sha256(seeded_inception.read_bytes()).hexdigest()[:8]}.pth"
    shutil.copy(seeded_inception, right)
    load_network("inception", right)
    for name in INCEPTION_FILES:
        shutil.copy(seeded_inception, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is damaged or renamed: its SHA-256 begins with"):
            load_network("inception", tmp_path / name)


def test_torchs_cache_is_searched(seeded_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no weights for the feature network inception.*--weights FILE"):
        load_network("inception")
    with pytest.raises(FileNotFoundError, match=r"no weights for the feature network dinov2-small.*--weights FILE"):
        load_network("dinov2-small")
    (tmp_path / "checkpoints").mkdir()
    for name in INCEPTION_FILES:
        file = tmp_path / "checkpoints" / name
        shutil.copy(seeded_inception, file)
        with pytest.raises(ValueError, match=f"{name} is damaged"):  # so this file was found
            load_network("inception")
        file.unlink()


def test_bad_names_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean squeezenet"):
        load_network("squeeznet")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth, the weights of vgg16, does not exist"):
        load_network("vgg16", tmp_path / "nowhere.pth")
    for name, content in (("empty.pth", b""), ("text.pth", b"hello"), ("text.npz", b"hello"), ("t.safetensors", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_network("squeezenet", tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth is not a table of tensors"):
        load_network("squeezenet", tmp_path / "list.pth")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for network in ("squeezenet", "vgg16", "inception", "dinov2-small"):
        with pytest.raises(ValueError, match=r"other\.pth does not fit this network: "):
            load_network(network, tmp_path / "other.pth")


class Pickled:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_no_code_in_a_weights_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Pickled()}, tmp_path / "bad.pth")
    np.savez(tmp_path / "bad.npz", a=np.array([Pickled()], dtype=object))
    for name in ("bad.pth", "bad.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_network("squeezenet", tmp_path / name)
    assert not capsys.readouterr().out


# --- Real networks: with a wrong preprocessing they would not recognise the photos ---------------------------------


@pytest.fixture(scope="module")
def labelled(shared: Path) -> tuple[Tensor, Tensor]:
    source = open_source(str(shared / "data" / "imagenet256-sample"))
    indices = range(0, len(source), 16)
    return torch.stack([source.image(i) for i in indices]), torch.tensor([source.label(i) for i in indices])


def test_mobilenetv2_of_the_benchmarks_recognises_photos(
    shared: Path, labelled: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    path = shared / "weights" / "mobilenet_v2-keras-fp16.npz"
    network, tensors = load_network("mobilenetv2:load", path), read_tensors(path)
    images, labels = labelled
    features = torch.cat([network(batch).pool for batch in images.split(20)])
    assert features.shape == (50, 1280)
    logits = features @ tensors["w52.weight"].float().T + tensors["w52.bias"].float()
    assert (logits.argmax(1) == labels).double().mean() > 0.8


def test_squeezenet_recognises_photos(shared: Path, labelled: tuple[Tensor, Tensor]) -> None:
    path = shared / "weights" / "squeezenet1_1-caffe-fp16.npz"
    network, tensors = load_network("squeezenet", path), read_tensors(path)
    images, labels = labelled
    with torch.inference_mode():
        maps = network.module[0](network.prepare(images))  # type: ignore[index]
        logits = F.conv2d(maps, tensors["classifier.1.weight"].float(), tensors["classifier.1.bias"].float())
    assert (logits.relu().mean((2, 3)).argmax(1) == labels).double().mean() > 0.5
    pool = network(images[:2]).pool
    assert pool.shape == (2, 512)
    torch.testing.assert_close(pool, maps[:2].mean((2, 3)))


def test_squeezenet_and_vgg16_in_torchvisions_layout(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1, vgg16

    images = photos(2, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    prepared = (F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True) / 255 - mean) / std
    for name, build in (("squeezenet", squeezenet1_1), ("vgg16", vgg16)):
        with torch.device("meta"):
            model = build(weights=None).eval()
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5, generator=generator)
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        network = load_network(name, tmp_path / f"{name}.pth")
        with torch.inference_mode():
            if name == "squeezenet":
                expected = model.features(prepared).mean((2, 3))
            else:
                expected = model.classifier[:5](model.features(prepared).flatten(1))
        torch.testing.assert_close(network(images).pool, expected, rtol=1e-4, atol=1e-6)
        (tmp_path / f"{name}.pth").unlink()


def cubic_matrix(old: int, new: int, offset: float) -> np.ndarray:
    """(new, old): Keys' cubic convolution with a = -3/4, sampled at steps of old / (new + offset), edges repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        position = (i + 0.5) * old / (new + offset) - 0.5
        for j in range(math.floor(position) - 1, math.floor(position) + 3):
            t = abs(position - j)
            near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if t <= 1 else far
    return matrix


def dinov2_by_hand(state: dict[str, Tensor], image: Tensor) -> np.ndarray:
    """DINOv2's class token at 224 px from weights of 518 px, in float64 without torch: uint8 (3, H, W) -> (C,)."""
    w = {name: value.double().numpy() for name, value in state.items()}
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    x = (np.asarray(picture) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = x.reshape(16, 14, 16, 14, 3).transpose(0, 2, 4, 1, 3).reshape(256, -1)
    tokens = patches @ w["patch_embed.proj.weight"].reshape(len(w["patch_embed.proj.weight"]), -1).T
    tokens = np.concatenate((w["cls_token"][0], tokens + w["patch_embed.proj.bias"]))
    table, shrink = w["pos_embed"][0], cubic_matrix(37, 16, 0.1)
    grid = np.einsum("ia,jb,abc->ijc", shrink, shrink, table[1:].reshape(37, 37, -1), optimize=True)
    x = tokens + np.concatenate((table[:1], grid.reshape(256, -1)))
    for block in (f"blocks.{i}" for i in range(depth)):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(257, 3, -1, 64).transpose(1, 2, 0, 3)
        attention = scipy.special.softmax(q @ k.transpose(0, 2, 1) / 8, axis=-1)
        mixed = (attention @ v).transpose(1, 0, 2).reshape(257, -1)
        x = x + w[f"{block}.ls1.gamma"] * linear(mixed, f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * scipy.special.ndtr(hidden)  # GELU
        x = x + w[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[0]


def test_dinov2_as_its_authors_compute_it(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518, num_classes=0).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # fresh ones would hardly look at the image
            if name.endswith("gamma"):
                p.uniform_(0.1, 0.4)
            elif "pos_embed" in name or "bias" in name:
                p.normal_(0, 0.2)
    save_file(model.state_dict(), tmp_path / "dinov2.safetensors")
    network = load_network("dinov2-small", tmp_path / "dinov2.safetensors")
    assert network.key("fid") == "fd-dinov2-small"
    images = photos(1, 256)
    features = network(images).pool
    assert features.shape == (1, 384)
    expected = dinov2_by_hand(model.state_dict(), images[0])[None]
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=2e-5)
    # timm's own resampling of the positions is another function; so is a bilinear resize of the images.
    model.set_input_size(img_size=224)
    with torch.inference_mode():
        others = model(network.prepare(images)), network.module(_imagenet(images))
    for other in others:
        assert np.abs(other.numpy() - expected).mean() > 5e-4
    assert "dgm-eval" in network.description()["preprocessing"]
    with pytest.raises(ValueError, match=r"dinov2\.safetensors does not"):
        load_network("dinov2-base", tmp_path / "dinov2.safetensors")


# --- A user's own network --------------------------------------------------------------------------------------------


class Means(nn.Module):
    """Mean colours, of uint8 images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


def means(weights: Path | None) -> nn.Module:
    return Means()


def not_a_network(weights: Path | None) -> int:
    return 0


def test_a_network_of_ones_own() -> None:
    network = load_network(f"{__name__}:means")
    assert network.key("fid") == "fd-means"
    images = photos(3, 16)
    torch.testing.assert_close(network(images).pool, images.float().mean((2, 3)))
    for name, message in (
        ("nowhere:means", "cannot be imported"),
        (f"{__name__}:nothing", "cannot be imported"),
        (f"{__name__}:not_a_network", "cannot be used"),
    ):
        with pytest.raises(ValueError, match=message):
            load_network(name)


def test_bad_images_and_bad_outputs_are_refused() -> None:
    network = FeatureNetwork("flat", nn.Flatten(0), lambda x: x.float(), "", "")
    with pytest.raises(ValueError, match="uint8"):
        network(photos(2, 8).float())
    with pytest.raises(ValueError, match="feature network flat must give a tensor"):
        network(photos(2, 8))


def test_networks_stay_in_evaluation_mode_and_out_of_autograd() -> None:
    network = FeatureNetwork("linear", nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), lambda x: x.float(), "", "")
    network.train()
    assert not network.module.training
    assert not network(photos(2, 8)).pool.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = network(photos(2, 8)).pool
    assert torch.equal(inside, network(photos(2, 8)).pool)


def test_reduced_precision_is_off_inside_and_back_on_after() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with exact_float32():
            assert matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
