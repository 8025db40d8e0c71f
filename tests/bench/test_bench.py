"""Timing beside each other, and the command that does it. Whatever is measured here is checked for sense, not speed."""

import json
import re
import time

import pytest
import torch

from hieratok.bench import suite as bench
from hieratok.bench import timing
from hieratok.bench.timing import count_flops, peak_memory, take_turns
from hieratok.cli import main

CPU = torch.device("cpu")


@pytest.fixture
def small_machine(monkeypatch):
    """A small matrix product, few features and short samples."""
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setitem(timing.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 4096)
    monkeypatch.setattr(bench, "FEATURES", 16)


def test_calls_take_turns_and_every_second_round_is_reversed(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0)
    order: list[str] = []
    times = take_turns({n: lambda n=n: order.append(n) for n in "abc"}, CPU, rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_short_calls_are_repeated_and_a_time_is_of_one(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0.05)
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        time.sleep(0.01)

    times = take_turns({"call": call}, CPU, rounds=2)
    assert 2 * 2 + 1 <= count <= 2 * 5 + 1
    assert 0.01 <= times.median("call") < 0.05


def test_ratios_are_of_rounds():
    times = timing.Times({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]})  # the second round was disturbed
    assert times.ratio("a", "b") == (3.0, 2.0, 4.0)
    assert times.median("a") == 4.0


def test_flops_are_two_per_multiply_add():
    a, b = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert count_flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_attention(backward):
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=backward) for n in (5, 7, 7))
    product = 2 * 2 * 3 * 5 * 7 * 8
    attend = torch.nn.functional.scaled_dot_product_attention
    found = count_flops(lambda: attend(q, k, v).sum().backward() if backward else attend(q, k, v))
    # Two products forward; the flash kernel's backward makes one of them again and four of its own.
    assert found == (2 + 5) * product if backward else 2 * product


def test_flops_of_a_compiled_module_are_those_of_the_plain_one():
    module = torch.nn.Linear(4, 5, bias=False)
    x = torch.randn(3, 4)
    plain = count_flops(lambda: module(x))
    module.compile(backend="eager")
    assert count_flops(lambda: module(x)) == plain == 2 * 3 * 4 * 5


@pytest.mark.skipif(not timing.CLEAR.exists(), reason="peak memory is known on Linux alone")
def test_peak_memory_is_what_is_needed_at_once():
    size = 64 * 2**20

    def call() -> None:
        for _ in range(4):  # one after the other
            torch.ones(size // 4)

    found = peak_memory(call, CPU)
    assert found is not None
    assert 0.9 * size < found < 2.5 * size


def test_the_whole_bench(small_machine, tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = bench.Bench(batch_size=2, rounds=2, device="cpu", out=str(out), json=True)
    result = bench.bench(options)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text()) == json.loads(json.dumps(result.to_json()))
    assert printed["tokenizer"] == "tiny-multi"
    names = {row["name"] for what in ("attention", "decode", "train", "sample") for row in printed[what]}
    assert {"ours, forward", "decode", "decode_progressive up to 128 px", "step, multi scale"} <= names
    for what in ("attention", "decode", "train", "sample", "data", "evaluate"):
        for row in printed[what]:
            assert row["seconds"] > 0
            assert row.get("utilisation", 1) > 0
            if "ratio" in row:
                assert row["low"] <= row["ratio"] <= row["high"]
                assert row["to"] in {other["name"] for other in printed[what]}


@pytest.mark.parametrize("what", ["decode", "train"])
def test_flops_are_the_models(small_machine, what):
    from hieratok.studies import recipes
    from hieratok.tokenizer import cost

    result = bench.bench(bench.Bench(what=what, batch_size=2, rounds=1, device="cpu"))  # type: ignore[arg-type]
    rows = {row["name"]: row for row in result.to_json()[what]}
    model = recipes.get("tiny-multi").model
    if what == "decode":
        whole = rows["encode"]["flops"] + rows["decode"]["flops"]
        assert whole / 2 / 1e9 == pytest.approx(cost.measure(model).gflops, rel=1e-6)
        assert rows["decode_progressive up to 128 px"]["flops"] == pytest.approx(rows["decode"]["flops"], rel=0.01)
    else:  # backward costs twice as much as forward, but for the gradient of the pixels
        forward = 2 * cost.measure(model).gflops * 1e9
        assert 2.8 * forward < rows["step, multi scale"]["flops"] < 3 * forward


def test_tables_are_readable(small_machine, capsys):
    assert main(["bench", "attention", "--rounds", "2", "--batch_size", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "time" in line)
    assert "ratio" in header
    assert "of matmul" not in header or re.search(r"^one call.* \d+ ", "\n".join(lines), re.MULTILINE)
    assert any(line.startswith("one call with a mask, forward") and "1.00 [1.00, 1.00]" in line for line in lines)
    assert "A large matrix product runs at" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decod"], "decod"),
        (["--rounds", "0"], "at least 1"),
        (["--recipe", "dit-tiny"], "--recipe names a tokenizer's recipe"),
        (["--recipe", "tiny-mutli"], "did you mean 'tiny-multi'"),
        (["--generator", "tiny-multi"], "--generator a generator's"),
        (["data", "--data", "missing"], "missing"),
        (["--bach_size", "3"], "did you mean 'batch_size'"),
    ],
)
def test_mistakes_are_one_line(small_machine, arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
