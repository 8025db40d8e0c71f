"""The rules that carry the paper's claims, and the direction of imports: read from the source, nothing is run."""

import ast
from pathlib import Path

import pytest

import hieratok

PACKAGE = Path(hieratok.__file__).parent
# A module imports from its own rank or a lower one. What is not listed (commands, pages) may import everything.
RANKS = {
    "core": 0,
    "errors": 0,
    "estimates": 0,
    "files": 0,
    "glossary": 0,
    "layers": 0,
    "tables": 0,
    "checkpoint": 1,
    "data": 1,
    "tokenizer": 1,
    "generation": 1,
    "pictures": 1,
    "losses": 2,
    "analysis": 3,
    "evaluation": 3,
    "lock": 3,
    "training": 4,
    "recipes": 5,
    "settings": 6,
    "study_config": 5,
    "studies": 6,
}


def imports() -> list[tuple[str, str]]:
    """(module, what it imports of ours), both without the leading `hieratok.`, inside functions too."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                if node.module == "hieratok":
                    names = [f"hieratok.{alias.name}" for alias in node.names]
                else:
                    names = [node.module or ""]
            found += [(module, name.removeprefix("hieratok.")) for name in names if name.startswith("hieratok.")]
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def test_there_is_something_to_check():
    pairs = imports()
    assert ("tokenizer.model", "checkpoint") in pairs
    assert len(pairs) > 100


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("generation", {"tokenizer", "data", "losses", "training"}),  # a generator sees only z
        ("data", set(RANKS) - {"core", "data", "files", "errors"}),  # caching takes an `encode` callable
        ("evaluation", {"tokenizer", "generation", "training"}),  # images, never models
        ("training", {"analysis", "cost", "interop", "report"}),
        ("commands", {"cli"}),
    ],
)
def test_rules(importer, forbidden):
    broken = [(m, name) for m, name in imports() if top(m) == importer and top(name) in forbidden]
    assert not broken


def test_left_never_imports_right():
    broken = [
        (module, name)
        for module, name in imports()
        if top(module) in RANKS and top(name) != "__version__" and RANKS.get(top(name), 99) > RANKS[top(module)]
    ]
    assert not broken


def test_a_command_never_imports_a_command():
    assert not [(module, name) for module, name in imports() if top(module) == top(name) == "commands"]


def test_only_the_table_of_commands_imports_commands():
    assert {module for module, name in imports() if top(name) == "commands"} == {"cli"}
