"""The rules that carry the paper's claims, and the direction of imports: read from the source, nothing is run."""

import ast
from pathlib import Path

import pytest

import hieratok

PACKAGE = Path(hieratok.__file__).parent
ORDER = (  # a module imports from its own line or an earlier one
    {"core"},
    {"tokenizer", "generation", "data"},
    {"losses"},
    {"evaluation", "analysis"},
    {"training"},
    {"studies.recipes", "studies.config"},
    {"settings"},
    {"tasks"},
    {"studies"},
    {"reports"},
    {"app", "interop", "bench"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
)
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package without the leading `hieratok.`, a package by its own name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> list[tuple[str, str]]:
    """(module, what it imports of ours), both without the leading `hieratok.`, inside functions too.

    Of `from hieratok.core import files` both `core` and `core.files` are named, as a module may have a rank of its own.
    """
    found = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [(module, name.removeprefix("hieratok.")) for name in names if name.startswith("hieratok.")]
    return [(module, name) for module, name in found if name != "__version__"]


def rank(module: str) -> int | None:
    """The rank of a module or of the package that it is in."""
    while module and module not in RANKS:
        module = module.rpartition(".")[0]
    return RANKS.get(module)


def room(module: str) -> str:
    return module.partition(".")[0]


def test_there_is_something_to_check():
    pairs = imports()
    assert ("tokenizer.model", "core.checkpoint") in {(module, name) for module, name in pairs}
    assert len(pairs) > 500


def test_every_module_has_a_rank():
    assert [module for module in modules() if rank(module) is None] == []
    assert [name for _, name in imports() if rank(name) is None and name not in hieratok.__all__] == []


def test_imports_go_one_way():
    broken = [
        (module, name)
        for module, name in imports()
        if name not in hieratok.__all__ and (rank(name) or 0) > (rank(module) or 0)
    ]
    assert broken == []


def test_few_modules_lie_at_the_top():
    assert len([module for module in modules() if "." not in module and not (PACKAGE / module).is_dir()]) <= 8


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("generation", {"tokenizer", "data"}),  # a generator sees only z
        ("data", {"tokenizer", "generation"}),  # caching takes an `encode` callable
        ("tokenizer", {"generation", "data"}),
        ("evaluation", {"tokenizer", "generation", "analysis"}),  # images, never models
        ("training", {"analysis"}),
        ("commands", {"commands"}),  # a command never imports a command
    ],
)
def test_rules(importer, forbidden):
    assert [(m, name) for m, name in imports() if room(m) == importer and room(name) in forbidden] == []


def test_only_the_table_of_commands_imports_commands():
    assert {module for module, name in imports() if room(name) == "commands"} == {"cli"}


def test_no_test_imports_another_test():
    tests = Path(__file__).parent
    paths = list(tests.rglob("test_*.py"))
    imported = {
        node.module
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert len(paths) > 40
    assert not imported & {path.stem for path in paths}
    rooms = {path.name for path in tests.iterdir() if path.is_dir()} - {"helpers", "__pycache__"}
    assert rooms <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}


ONE_HOME = {  # what may be written in these modules alone
    "import tqdm": {"core.progress"},
    "from tqdm": {"core.progress"},
    "torch.distributed": {"core.distributed", "training.parallel"},
    "RANK": {"core.distributed", "core.devices"},
    "WORLD_SIZE": {"core.distributed"},
    "hashlib.blake2b(": {"core.seeding"},
    "default_rng(": {"core.seeding"},
    "Image.open(": {"core.pixels"},
    "yaml.safe_load": {"core.files", "settings"},  # files; values of flags
    "yaml.load": {"core.files"},
    "safe_open(": {"core.checkpoint"},
    "load_file(": {"core.checkpoint"},
    "torch.load(": {"core.checkpoint", "training.run_folder"},  # weights; optimisers
    "import jinja2": {"reports.templating"},
    "from jinja2": {"reports.templating"},
}


@pytest.mark.parametrize("text", ONE_HOME)
def test_one_of_each(text):
    """One reader, one progress bar, one place that knows about processes, one scheme of seeds, ..."""
    found = {module for module, path in modules().items() if text in path.read_text()}
    assert found <= ONE_HOME[text]
