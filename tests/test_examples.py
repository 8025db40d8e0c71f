"""The notebooks in examples/ run from top to bottom, cell by cell, with two steps of training."""

import ast
import json
import re
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]
LARGEST = 100_000  # bytes


def cells(path: Path, kind: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_runs(path, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    matplotlib.use("agg")
    namespace: dict[str, object] = {"__name__": "__main__"}
    shortened = 0
    for i, code in enumerate(cells(path, "code")):
        code, found = re.subn(r"^STEPS = \d+$", "STEPS = 2", code, flags=re.MULTILINE)
        shortened += found
        tree = ast.parse(code)
        shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, code cell {i}", "exec"), namespace)
        if isinstance(shown, ast.Expr):
            value = eval(compile(ast.Expression(shown.value), f"{path.name}, code cell {i}", "eval"), namespace)
            if hasattr(value, "_repr_png_"):  # what a notebook would show
                assert value._repr_png_()
    assert shortened == 1
    assert not plt.get_fignums()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_are_small_and_their_outputs_are_of_one_run(path):
    """From the first cell to the last, without an error; or they come without outputs."""
    assert path.stat().st_size < LARGEST
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert counts == list(range(1, len(code) + 1)) or (counts == [None] * len(code) and not outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_say_how_to_use_ones_own(path):
    assert sum("**Your own.**" in text for text in cells(path, "markdown")) == 1


def test_there_are_four():
    assert len(NOTEBOOKS) == 4
