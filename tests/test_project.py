"""What belongs to the project around the code: versions, citation, workflows, the package, the page of recipes."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from torch.profiler import ProfilerActivity, profile

import hieratok
from hieratok.studies import recipes

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_every_place_names_the_same_version():
    version = PYPROJECT["project"]["version"]
    assert hieratok.__version__ == version
    assert str(read_yaml(ROOT / "CITATION.cff")["version"]) == version
    assert re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    (cited,) = re.findall(r"version = \{(.+)\}", (ROOT / "README.md").read_text())
    assert cited == version


def test_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    dates = [version.split(" - ")[1] for version in versions[1:]]
    assert dates == sorted(dates, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_citation_has_what_the_format_requires_and_names_the_paper():
    citation = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation["authors"] == PYPROJECT["project"]["authors"]
    assert citation["repository-code"] == REPOSITORY
    (paper,) = citation["references"]
    assert paper["url"] == PYPROJECT["project"]["urls"]["Paper"]
    readme = (ROOT / "README.md").read_text()
    assert paper["title"] in readme.replace("{HieraTok}", "HieraTok")
    cited = re.search(r"author  = \{(Chen, Cong.*?)\}", readme, re.DOTALL)
    assert cited
    names = [" ".join(name.split()) for name in cited[1].split(" and")]
    assert names == [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]


def test_the_repository_has_one_address():
    """In the package's links, in the picture's and in what is cited."""
    owner = REPOSITORY.removeprefix("https://github.com/")
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        found = re.findall(r"(?:github|raw\.githubusercontent)\.com/([\w-]+/hieratok)\b", (ROOT / name).read_text())
        assert found, name
        assert set(found) == {owner}, name


# --- GitHub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_exists(path):
    workflow = read_yaml(path)
    assert {"name", True, "permissions", "jobs"} <= workflow.keys()  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps", "timeout-minutes"} <= job.keys()
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            command = step.get("run", "")
            assert not command.startswith("make ") or command.split()[1] in targets, command
            for file in re.findall(r"\btests/\w+\.py", command):
                assert (ROOT / file).is_file(), command


def test_the_matrix_is_what_the_package_says_it_supports():
    jobs = read_yaml(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    classifiers = PYPROJECT["project"]["classifiers"]
    supported = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == supported
    assert PYPROJECT["project"]["requires-python"] == f">={supported[0]}"
    floors = dict(dependency.split(">=") for dependency in PYPROJECT["project"]["dependencies"])
    (oldest,) = [step["run"] for step in jobs["test"]["steps"] if "oldest" in step.get("if", "")]
    assert re.findall(r"'(torch|torchvision)==([\d.]+)\.\*'", oldest) == [
        (name, floors[name]) for name in ("torch", "torchvision")
    ]


@pytest.mark.parametrize("path", [p for p in FORMS if p.name != "config.yml"], ids=lambda path: path.name)
def test_issue_forms_have_what_github_requires(path):
    form = read_yaml(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    assert {element["type"] for element in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert len({element["id"] for element in fields}) == len(fields) > 0
    assert all(element["attributes"]["label"] for element in fields)


def test_files_that_forms_and_template_name_exist():
    for path in [*FORMS, ROOT / ".github" / "pull_request_template.md"]:
        for name in re.findall(r"\b(?:docs/)?[\w-]+\.md\b", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"


# --- the page of recipes ---------------------------------------------------------------------------------------------


@pytest.fixture
def counting(monkeypatch) -> ModuleType:
    """docs/recipes.py."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    for name in ("recipes", "settings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("recipes")


def lines_of(counting: ModuleType) -> dict[str, list[str]]:
    """The page's lines by recipe."""
    found = re.findall(r"^\| `([\w-]+)`\*? \|.*$", counting.PAGE.read_text(), re.MULTILINE)
    lines = [line for line in counting.PAGE.read_text().splitlines() if re.match(r"\| `[\w-]+`\*? \|", line)]
    return {name: line.strip("| ").split(" | ") for name, line in zip(found, lines, strict=True)}


def test_every_recipe_has_one_line(counting):
    listed = [name for starts, _ in counting.GROUPS.values() for name in counting.names_of(starts)]
    assert sorted(listed) == sorted(recipes.RECIPES), "a new family of recipes needs a line in GROUPS"
    assert sorted(lines_of(counting)) == sorted(recipes.RECIPES), "run `make docs`"
    assert counting.PAGE.read_text().startswith(counting.INTRODUCTION.format(share=counting.SHARE, gpu=100)[:500])


@pytest.mark.parametrize(("name", "base"), [("tiny-multi", "tiny-multi"), ("dit-tiny", "dit-tiny")])
def test_lines_are_up_to_date(counting, name, base):
    """The cheapest ones; all of them below."""
    assert lines_of(counting)[name] == counting.row(name, base), "run `make docs`"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_page_is_up_to_date(counting):
    assert counting.PAGE.read_text() == counting.page(), "run `make docs`"


@pytest.mark.parametrize("name", ["f16d16-multi", "f16d16-single", "tiny-multi"])
def test_parameters_and_forward_flops_agree_with_cost(counting, name):
    """Training costs three times the forward pass and more: the losses' networks."""
    from hieratok.tokenizer.cost import measure

    cost, cells = measure(recipes.get(name).model), lines_of(counting)[name]
    assert cells[1] == f"{counting.significant(cost.parameters / 1e6)}M"
    assert 2.9 < float(cells[2].replace(",", "")) / cost.gflops < 5


@pytest.mark.parametrize("name", ["tiny-multi-stage2", "dit-tiny"])
def test_memory_is_what_the_allocator_counts(counting, name):
    """Real tensors on the CPU, torch's allocator counting: one more image takes as much as the page says."""
    run = recipes.get(name)
    peaks = []
    for count in (4, 8):
        step, _ = counting.make_step(run, count)
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            step()
        assert profiler.profiler is not None
        now, peak = 0, 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        peaks.append(peak)
    measured = (peaks[1] - peaks[0]) / 4
    assert counting.counted(name).image_bytes == pytest.approx(measured, rel=0.1)


def test_what_fits(counting):
    """By hand: nine tenths of 24 GB, less 1.6 GB, are 20 images of 1 GB, so 16."""
    load = counting.Load(1, 1.0, int(1.6e9), 1e9)
    assert load.micro_batch(24, 256) == 16
    assert load.micro_batch(24, 8) == 8
    assert replace(load, fixed_bytes=int(30e9)).micro_batch(24, 256) == 0


# --- the package -----------------------------------------------------------------------------------------------------


def run(*words: object, **options) -> str:
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "venv", folder / "tools")
    python = folder / "tools" / "bin" / "python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    try:
        run(*pip, "install", "build", "twine", timeout=300)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"needs a package index, to get build and twine: {str(error)[-200:]}")
    source = folder / "source"  # a copy: nothing is left behind in the checkout
    ignored = shutil.ignore_patterns(".venv", ".git", "__pycache__", "runs", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(python, "-m", "build", "--outdir", folder / "dist", source)
    run(python, "-m", "twine", "check", "--strict", *(folder / "dist").iterdir())
    return folder / "dist"


@pytest.mark.slow
def test_wheel_has_the_whole_package_and_links_that_lead_somewhere(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (metadata,) = [wheel.read(name).decode() for name in names if name.endswith("/METADATA")]
    package = ROOT / "src"
    wanted = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    targets = re.findall(r"\]\(([^)\s]+)\)", metadata) + re.findall(r'<img src="(.+?)"', metadata)
    pictures = [t for t in targets if t.startswith("https://raw.githubusercontent.com/")]
    assert {Path(picture).name for picture in pictures} == {"imagenette.webp"}
    for target in targets:
        assert target.startswith(("https://", "#")), target
        if target.startswith((f"{REPOSITORY}/blob/main/", *pictures)):
            assert (ROOT / target.partition("/main/")[2].partition("#")[0]).exists(), target


@pytest.mark.slow
def test_wheel_works_in_a_fresh_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # Dependencies are those of this environment: by path, so that an editable hieratok here is not seen there.
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(packages) / "dependencies.pth").write_text("\n".join(sorted(here)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    in_fresh = {"cwd": tmp_path, "env": environment}
    code = "import hieratok; from hieratok import HieraTok; print(hieratok.__file__, HieraTok.__name__, sep='|')"
    file, name = run(python, "-c", code, **in_fresh).strip().split("|")
    assert Path(file).is_relative_to(tmp_path / "fresh")
    assert name == "HieraTok"
    command = tmp_path / "fresh" / "bin" / "hieratok"
    assert "quickstart" in run(command, "--help", **in_fresh)
    assert run(command, "--version", **in_fresh).split()[-1] == PYPROJECT["project"]["version"]
    run(command, "train", "tiny-multi", "--train.steps", "1", "--train.picture_every", "0", "--out", "out", **in_fresh)
    assert (tmp_path / "out" / "tokenizer").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sdist_passes_its_own_tests(built, tmp_path):
    """Those that look at files beside the package; the others see the same code as here."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    if shutil.which("git") and (ROOT / ".git").exists():
        tracked = run("git", "-C", ROOT, "ls-files").split("\n")[:-1]
        missing = [name for name in tracked if not name.startswith(".ci/") and (ROOT / name).exists()]
        assert not [name for name in missing if not (folder / name).exists()]
    tests = ["test_docs.py", "test_project.py", "test_examples.py", "test_design.py", "studies/test_recipes.py"]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    words += ["--basetemp", tmp_path / "pytest", *(f"tests/{test}" for test in tests)]
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    printed = run(*words, cwd=folder, env=environment)
    assert re.search(r"\d+ passed", printed), printed[-500:]
