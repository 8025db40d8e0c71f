"""The DiT: an independent float64 reading on weights in facebookresearch/DiT's names, and the paper's facts."""

import json
import math

import pytest
import torch

from hieratok.generation import flow
from hieratok.generation.config import SIZES
from hieratok.generation.dit import DiT, DiTConfig, rotary_attention, sincos_positions

CLASSIC = dict(latent_channels=3, latent_size=6, patch_size=2, width=32, depth=2, heads=2, num_classes=5)
MODERN = dict(norm="rms", mlp="swiglu", positions="rotary", qk_norm=True)


def small_config(**changes) -> DiTConfig:
    return DiTConfig(**{**CLASSIC, **changes})


def small_model(**changes) -> DiT:
    """In evaluation mode, with weights large enough that every path matters: DiT's own start would predict zero."""
    torch.manual_seed(0)
    model = DiT(small_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 6, 6, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0, 999, 371]), torch.tensor([4, 5, 0])  # 5 is "no class"


def facebook_shapes(d: int, p: int, width: int, depth: int, tokens: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a facebookresearch/DiT checkpoint with learned sigma."""
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, d, p, p),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.linear.weight": (p * p * 2 * d, width),
        "final_layer.linear.bias": (p * p * 2 * d,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for n in range(depth):
        for layer, outputs, features in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
            ("adaLN_modulation.1", 6 * width, width),
        ):
            shapes[f"blocks.{n}.{layer}.weight"] = (outputs, features)
            shapes[f"blocks.{n}.{layer}.bias"] = (outputs,)
    return shapes


# --- an independent reading: plain functions on a state dict, float64 ------------------------------------------------


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def naive_norm(x, kind):
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated(x, grid):
    """Rotary positions as products of complex numbers: pairs (j, j + half); the first half of the pairs turn by row."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    turns = torch.empty(grid * grid, half, dtype=torch.complex128)
    for n in range(grid * grid):
        for j in range(half):
            place = n // grid if j < half // 2 else n % grid
            angle = place * 10000 ** (-(j % (half // 2)) / (half // 2))
            turns[n, j] = complex(math.cos(angle), math.sin(angle))
    pairs = pairs * turns
    return torch.cat((pairs.real, pairs.imag), -1)


def naive_attention(p, name, x, config):
    outputs = []
    q, k, v = linear(p, f"{name}.qkv", x).chunk(3, -1)
    size = config.width // config.heads
    for head in range(config.heads):
        part = slice(head * size, (head + 1) * size)
        q_head, k_head = q[..., part], k[..., part]
        if config.qk_norm:
            q_head = naive_norm(q_head, "rms") * p[f"{name}.q_norm.weight"]
            k_head = naive_norm(k_head, "rms") * p[f"{name}.k_norm.weight"]
        if config.positions == "rotary":
            grid = config.latent_size // config.patch_size
            q_head, k_head = rotated(q_head, grid), rotated(k_head, grid)
        outputs.append((q_head @ k_head.mT / size**0.5).softmax(-1) @ v[..., part])
    return linear(p, f"{name}.proj", torch.cat(outputs, -1))


def naive_mlp(p, name, x, config):
    x = linear(p, f"{name}.fc1", x)
    if config.mlp == "swiglu":
        half = x.shape[-1] // 2
        return linear(p, f"{name}.fc2", silu(x[..., :half]) * x[..., half:])
    return linear(p, f"{name}.fc2", 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))))


def naive_dit(state: dict[str, torch.Tensor], config: DiTConfig, x, t, y) -> torch.Tensor:
    p = {name: tensor.double() for name, tensor in state.items()}
    x, t, s = x.double(), t.double(), config.patch_size
    n = config.latent_size // s
    kernel = p["x_embedder.proj.weight"].reshape(config.width, -1)
    patches = [x[:, :, s * i : s * i + s, s * j : s * j + s].flatten(1) for i in range(n) for j in range(n)]
    tokens = torch.stack([patch @ kernel.T + p["x_embedder.proj.bias"] for patch in patches], 1)
    if config.positions == "sincos":
        tokens = tokens + p["pos_embed"]
    angles = torch.stack([t * 10000 ** (-k / 128) for k in range(128)], 1)
    time = silu(linear(p, "t_embedder.mlp.0", torch.cat((angles.cos(), angles.sin()), 1)))
    condition = silu(linear(p, "t_embedder.mlp.2", time) + p["y_embedder.embedding_table.weight"][y])
    for i in range(config.depth):
        b = f"blocks.{i}"
        modulation = linear(p, f"{b}.adaLN_modulation.1", condition)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(config.width, -1)
        hidden = naive_norm(tokens, config.norm) * (1 + scale1) + shift1
        tokens = tokens + gate1 * naive_attention(p, f"{b}.attn", hidden, config)
        hidden = naive_norm(tokens, config.norm) * (1 + scale2) + shift2
        tokens = tokens + gate2 * naive_mlp(p, f"{b}.mlp", hidden, config)
    shift, scale = linear(p, "final_layer.adaLN_modulation.1", condition)[:, None].split(config.width, -1)
    patches = linear(p, "final_layer.linear", naive_norm(tokens, config.norm) * (1 + scale) + shift)
    out = torch.empty(len(x), config.out_channels, n * s, n * s, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            patch = patches[:, i * n + j].reshape(-1, s, s, config.out_channels)
            out[:, :, s * i : s * i + s, s * j : s * j + s] = patch.permute(0, 3, 1, 2)
    return out


@torch.no_grad()
def test_weights_in_facebooks_names_load_strictly_and_give_the_same_outputs():
    g = torch.Generator().manual_seed(0)
    shapes = facebook_shapes(d=3, p=2, width=32, depth=2, tokens=9, classes=5)
    state = {name: 0.1 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    model = DiT(small_config()).eval()
    model.load_state_dict(state, strict=True)
    ours, reference = model(*inputs()), naive_dit(state, model.config, *inputs())
    assert ours.shape == (3, 6, 6, 6)
    assert reference.std() > 0.05  # the agreement is about something
    torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(learn_sigma=False, patch_size=1),
        dict(norm="rms"),
        dict(mlp="swiglu"),
        dict(positions="rotary"),
        dict(qk_norm=True),
        dict(**MODERN, objective="flow", learn_sigma=False),
    ],
    ids=["dit", "patch-1", "rms", "swiglu", "rotary", "qk-norm", "modern-flow"],
)
@torch.no_grad()
def test_every_option_equals_the_reading_in_float64(changes):
    model = small_model(**changes).double()
    x, t, y = inputs(torch.float64)
    ours = model(x, t, y)
    assert ours.shape == (3, model.config.out_channels, 6, 6)
    tolerance = 1e-6 if model.config.positions == "rotary" else 1e-10  # rotary angles are float32
    torch.testing.assert_close(
        ours, naive_dit(model.state_dict(), model.config, x, t, y), rtol=tolerance, atol=tolerance
    )


def test_fractional_times_of_a_flow_are_told_apart():
    model = small_model(objective="flow", learn_sigma=False)
    x, _, y = inputs()
    outputs = model(x[:1].expand(3, -1, -1, -1), torch.tensor([0.0, 0.5, 1.0]), y[:1].expand(3))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    assert (outputs[1] - outputs[2]).abs().max() > 1e-4


# --- positions -------------------------------------------------------------------------------------------------------


def test_sincos_positions_value_by_value():
    """Quarters: sin(column w), cos(column w), sin(row w), cos(row w), w = 10000^(-k / quarter); rows run slowest."""
    positions = sincos_positions(16, 3)
    assert positions.shape == (1, 9, 16)
    assert positions.dtype == torch.float32
    for n in range(9):
        row, column = divmod(n, 3)
        for k in range(4):
            w = 10000 ** (-k / 4)
            expected = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
            assert positions[0, n, k::4].tolist() == pytest.approx(expected, abs=1e-6)


def test_rotary_attention_sees_relative_places_alone():
    """With the same query and key everywhere, a score depends on the displacement between two tokens alone."""
    torch.manual_seed(0)
    grid, size = 4, 8
    q, k = (torch.randn(1, 1, 1, size).expand(1, 1, grid * grid, size) for _ in range(2))
    v = torch.eye(grid * grid)[None, None]  # so that the output is the attention itself
    attention = rotary_attention(grid, size, torch.device("cpu"))(q, k, v)[0, 0]
    logits = attention.log()

    def difference(a, b, reference):  # of two scores of one query: the softmax's norm falls out
        return float(logits[a, b] - logits[a, reference])

    # query (1, 1) to keys (2, 3) and (1, 1); query (0, 0) to keys (1, 2) and (0, 0); query (2, 1) to (3, 3) and (2, 1)
    scores = [difference(5, 11, 5), difference(0, 6, 0), difference(9, 15, 9)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)
    assert difference(5, 10, 5) != pytest.approx(scores[0], abs=1e-3)


# --- initial weights, labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, dict(**MODERN)])
def test_initial_weights(changes):
    torch.manual_seed(0)
    model = DiT(small_config(width=128, num_classes=200, **changes))
    x, t, y = inputs()
    assert (model.eval()(x, t, y) == 0).all()  # adaLN-zero
    tokens, condition = torch.randn(3, 9, 128), torch.randn(3, 1, 128)
    for block in model.blocks:
        assert torch.equal(block(tokens, condition, torch.nn.functional.scaled_dot_product_attention), tokens)
    assert abs(model.y_embedder.embedding_table.weight.std() - 0.02) < 1e-3
    assert abs(model.t_embedder.mlp[0].weight.std() - 0.02) < 1e-3
    assert abs(model.t_embedder.mlp[2].weight.std() - 0.02) < 1e-3
    for weight, fan in (
        (model.blocks[0].attn.qkv.weight, 4 * 128),
        (model.blocks[1].mlp.fc2.weight, sum(model.blocks[1].mlp.fc2.weight.shape)),
        (model.x_embedder.proj.weight, 128 + 3 * 2 * 2),
    ):
        bound = (6 / fan) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound  # Xavier's uniform
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_every_parameter_learns_and_positions_do_not():
    for changes in ({}, MODERN):
        model = small_model(**changes)
        model(*inputs()).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        assert "pos_embed" not in dict(model.named_parameters())
        assert ("pos_embed" in model.state_dict()) == (model.config.positions == "sincos")


def test_labels_are_dropped_in_training_alone():
    torch.manual_seed(0)
    embedder = small_model(label_dropout=0.25).y_embedder
    table = embedder.embedding_table.weight
    y = torch.full((20_000,), 3)
    assert torch.equal(embedder.eval()(y[:7]), table[3].expand(7, -1))
    embedded = embedder.train()(y)
    dropped = (embedded == table[5]).all(1)
    assert abs(dropped.float().mean() - 0.25) < 0.02
    assert (embedded[~dropped] == table[3]).all()
    assert small_model(label_dropout=0.0).y_embedder.embedding_table.weight.shape == (5, 32)  # no row for "no class"


# --- the paper's facts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions"), [("b", 130), ("l", 458), ("xl", 675)])
def test_parameters_of_table_6(size, millions):
    with torch.device("meta"):
        model = DiT(DiTConfig.of_size(size))
    assert model.config.latent_shape == (16, 16, 16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    modern = DiTConfig.of_size(size, **MODERN)
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(modern).parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_sizes_grow_and_the_default_is_the_papers():
    assert list(SIZES) == ["tiny", "s", "b", "l", "xl"]
    assert DiTConfig() == DiTConfig.of_size("xl")
    with pytest.raises(ValueError, match=r"no DiT of size 'xxl': the sizes are tiny, s, b, l, xl"):
        DiTConfig.of_size("xxl")


@pytest.mark.parametrize("changes", [{}, MODERN])
def test_bf16_autocast_stays_close(changes):
    model = small_model(**changes)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(*inputs())
    exact = model(*inputs())
    assert (half.float() - exact).norm() < 0.03 * exact.norm()


# --- bad input, on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(latent_channels=0), "model.latent_channels must be a whole number from 1 to"),
        (dict(depth=1.5), "model.depth must be a whole number from 1 to"),
        (dict(patch_size=4), "model.latent_size 6 is not divisible by model.patch_size 4"),
        (dict(heads=3), "model.width 32 is not divisible by model.heads 3"),
        (dict(width=30, heads=1), "model.width 30 must be a multiple of 4 for sincos"),
        (dict(width=36, heads=6, positions="rotary"), "model.width / model.heads = 6 must be a multiple of 4"),
        (dict(objective="edm"), "model.objective must be one of ddpm, flow, not 'edm'"),
        (dict(norm="batch"), "model.norm must be one of layer, rms"),
        (dict(mlp="relu"), "model.mlp must be one of gelu, swiglu"),
        (dict(positions="learned"), "model.positions must be one of sincos, rotary"),
        (dict(objective="flow"), "model.learn_sigma must be false for model.objective flow"),
        (dict(label_dropout=1.0), r"model.label_dropout must be in \[0, 1\)"),
        (dict(mlp_ratio=0), "model.mlp_ratio must be positive"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


@pytest.mark.parametrize("shape", [(1, 4, 6, 6), (1, 3, 6, 8), (3, 6, 6)])
def test_latents_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"takes latents \(B, 3, 6, 6\), not"):
        small_model()(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("changes", [{}, dict(**MODERN, objective="flow", learn_sigma=False)])
@torch.no_grad()
def test_save_and_load(tmp_path, changes):
    model = small_model(**changes)
    model.save_pretrained(tmp_path / "generator")
    for source in (tmp_path / "generator", str(tmp_path)):  # the model's folder, or the run's
        again = DiT.from_pretrained(source)
        assert again.config == model.config
        assert not again.training
        assert torch.equal(again(*inputs()), model(*inputs()))


def test_loading_what_does_not_fit(tmp_path):
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "hieratok-dit"
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 4}))
    with pytest.raises(ValueError, match=r"does not fit .*x_embedder\.proj\.weight"):
        DiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "hieratok"}))
    with pytest.raises(ValueError, match="does not describe a hieratok-dit model"):
        DiT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        DiT.from_pretrained(tmp_path / "nowhere" / "at" / "all")


# --- the wide head ----------------------------------------------------------------------------------------------------


def wide_config(**changes) -> DiTConfig:
    return small_config(**{**dict(wide_width=48, wide_depth=2, wide_heads=4), **changes})


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_a_wide_head_is_what_its_parts_say(positions):
    """Trunk, then wide blocks over the noisy latents, conditioned at each token on the trunk's and on time."""
    torch.manual_seed(0)
    model = DiT(wide_config(positions=positions)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, t, y = inputs()
    seen: dict[str, torch.Tensor] = {}
    model.blocks.register_forward_hook(lambda _, __, output: seen.update(trunk=output))
    output = model(x, t, y)
    assert model.wide_head is not None
    head, time = model.wide_head, model.t_embedder(t)[:, None]
    condition = head.project(seen["trunk"] + time)
    tokens = head.x_embedder(x)
    attend = torch.nn.functional.scaled_dot_product_attention
    if positions == "rotary":
        attend = rotary_attention(model.grid, 12, x.device)
    for block in head.blocks:
        tokens = block(tokens, condition, attend)
    torch.testing.assert_close(output, model.unpatchify(model.final_layer(tokens, condition)))
    assert head.x_embedder.proj.out_channels == 48


def test_a_wide_head_starts_at_zero_and_learns_everywhere():
    torch.manual_seed(0)
    model = DiT(wide_config()).eval()
    x, t, y = inputs()
    assert (model(x, t, y) == 0).all()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model(x, t, y).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_without_a_wide_head_there_is_nothing_of_it():
    assert not [name for name in DiT(small_config()).state_dict() if "wide" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(wide_depth=None), "belong together"),
        (dict(wide_width=2), "must be at least the .* channels of a token's latents"),
        (dict(wide_heads=5), "of the wide head: model.width 48 is not divisible by model.heads 5"),
        (dict(time_shift=0.5, objective="ddpm"), "model.time_shift is for model.objective flow"),
        (dict(time_shift=0.0, objective="flow", learn_sigma=False), "model.time_shift must be positive"),
    ],
)
def test_wide_heads_and_shifts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        wide_config(**changes)


def test_the_shift_that_follows_from_a_latents_size():
    """RAE's for DINOv2-B: sqrt(16 * 16 * 768 / 4096) = 6.93 of times that run the other way."""
    config = DiTConfig(latent_channels=768, objective="flow", learn_sigma=False, time_shift="dimension")
    assert 1 / config.shift == pytest.approx((196_608 / 4096) ** 0.5)
    for t in (0.1, 0.5, 0.9):
        theirs = 1 - t
        s = (196_608 / 4096) ** 0.5
        assert 1 - flow.time_shift(t, config.shift) == pytest.approx(s * theirs / (1 + (s - 1) * theirs))
    sd = DiTConfig(latent_channels=4, latent_size=32, objective="flow", learn_sigma=False, time_shift="dimension")
    assert sd.shift == 1
    assert DiTConfig().shift == 1
