"""The contributor files: what they name exists, the import rules hold, and CI runs what ``.ci/run`` runs."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest
from paths import ROOT

import snr_optim

PAGES = ("CONTRIBUTING.md", "RELEASING.md")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SUFFIXES = (".cff", ".json", ".md", ".py", ".toml", ".txt", ".typed", ".yaml", ".yml")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / name).read_text()


def in_backticks(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", FENCE.sub("", read(page)))


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w./-]+):(?!=)", read("Makefile"), re.MULTILINE))


# ------------------------------------------------------------------------------------------------------ what pages name
def is_path(words: str) -> bool:
    return re.fullmatch(r"[\w.<>/-]+(::\w+)?", words) is not None and (
        "/" in words or words.partition("::")[0].endswith(SUFFIXES)
    )


def files_of(path: str) -> list[Path]:
    """The files that a path stands for: ``<op>`` is any op, and a name without a folder a file anywhere."""
    pattern = re.sub(r"<\w+>", "*", path)
    found = list(ROOT.glob(pattern))
    if not found and "/" not in path:
        rooms = ("snr_optim", "kernels", "tests", "benchmarks", "examples", ".github")
        found = [file for room in rooms for file in (ROOT / room).rglob(pattern)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists_and_has_what_is_looked_for_in_it(page):
    ignored = set(read(".gitignore").splitlines())  # runs/ is there only after a run
    named = [words for words in in_backticks(page) if is_path(words) and words not in ignored]
    assert len(named) > (40 if page == "CONTRIBUTING.md" else 5)  # and the expression above finds them
    for path, _, name in (words.partition("::") for words in named):
        files = files_of(path)
        assert files, f"{page} names {path}, which does not exist"
        assert not name or any(re.search(rf"\b{name}\b", file.read_text()) for file in files), (
            f"{name} is not in {path}"
        )


def test_a_path_that_does_not_exist_would_be_found():
    assert is_path("kernels/snr_kernels/no_such_op.py")
    for path in ("kernels/snr_kernels/no_such_op.py", "no_such_file.py", "no_such_room/<op>/op.py"):
        assert files_of(path) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page):
    code = [*in_backticks(page), *FENCE.findall(read(page))]
    targets = {target for words in code for target in re.findall(r"\bmake ([\w./-]+)", words)}
    assert {"lint", "test"} <= targets <= make_targets()


def test_the_page_stays_short():
    assert len(read("CONTRIBUTING.md").splitlines()) < 150


# --------------------------------------------------------------------------------------------------------- import rules
def modules() -> dict[str, Path]:
    """The files of both packages, by the names they are imported under."""
    found = {}
    for source, package in ((ROOT, "snr_optim"), (ROOT / "kernels", "snr_kernels")):
        for file in (source / package).rglob("*.py"):
            parts = file.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """What a file imports of ``known``, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known.keys()) or {str(node.module)}
    return found & known.keys()


def test_no_import_goes_upward():
    """From a room to one that CONTRIBUTING.md lists above it; it lists all but the public surface."""
    rows = re.findall(r"^\| (`[\w./]+/?`(?:, `[\w./]+`)*) \|", read("CONTRIBUTING.md"), re.MULTILINE)
    height = {ROOT / room: -row for row, rooms in enumerate(rows) for room in re.findall(r"`(.*?)`", rooms)}
    assert len(height) > 10

    def height_of(file: Path) -> int | None:
        return next((h for room, h in height.items() if file == room or room in file.parents), None)

    known = modules()
    assert {name for name, file in known.items() if height_of(file) is None} <= {"snr_optim"}
    for name, file in known.items():
        for other in imports(file, known):
            here, there = height_of(file), height_of(known[other])
            assert here is None or there is None or there <= here, f"{name} imports {other}, which stands above it"


def test_no_import_goes_in_a_circle():
    known = modules()
    graph = {name: imports(file, known) - {name} for name, file in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_the_ops_import_nothing_of_the_library():
    known = modules()
    ops = {name: file for name, file in known.items() if name.startswith("snr_kernels")}
    assert all(imports(file, known) <= ops.keys() for file in ops.values())


# ------------------------------------------------------------------------------------------------------- CI, pre-commit
@pytest.fixture
def load():
    yaml = pytest.importorskip("yaml")
    return lambda name: yaml.safe_load(read(name))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_few_rights_and_an_end(load, workflow):
    loaded = load(workflow)
    assert loaded["permissions"] == {"contents": "read"}
    for job in loaded["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert re.search(r"@(release/)?v\d+$", step.get("uses", "@v1")), "actions are pinned by their major version"
            assert set(re.findall(r"^make ([\w./-]+)", step.get("run", ""), re.MULTILINE)) <= make_targets()


def test_ci_runs_every_step_of_the_local_ci(load):
    steps = set(re.findall(r"^step (\S+)$", read(".ci/run"), re.MULTILINE))
    rows = load(".github/workflows/ci.yml")["jobs"]["make"]["strategy"]["matrix"]["include"]
    assert {row["target"] for row in rows} | {".venv/ready"} == steps
    assert steps <= make_targets()


def test_ci_covers_the_versions_that_the_package_allows(load):
    rows = load(".github/workflows/ci.yml")["jobs"]["make"]["strategy"]["matrix"]["include"]
    pins = dict(line.split("==") for line in read("constraints.txt").splitlines() if "==" in line)
    oldest_python = re.search(r'requires-python = ">=([\d.]+)"', read("pyproject.toml"))[1]
    oldest_torch = re.search(r'dependencies = \["torch>=([\d.]+)"\]', read("pyproject.toml"))[1]
    tested = {(row["python"], row["torch"]) for row in rows if row["target"] == "test"}
    assert (oldest_python, f"{oldest_torch}.0") in tested
    assert {python for python, _ in tested} == {"3.10", "3.11", "3.12", "3.13"}
    assert {torch for _, torch in tested} == {f"{oldest_torch}.0", pins["torch"]}
    assert {pin.split("==")[0] for row in rows for pin in row.get("pins", "").split()} <= pins.keys()
    left_out = [words.removeprefix("--ignore=") for row in rows for words in row.get("pytest", "").split()]
    assert all((ROOT / path).is_file() for path in left_out)


def test_pre_commit_runs_what_make_lint_runs(load):
    def command(words: str) -> str:
        return " ".join(word for word in words.split() if not word.startswith("-") and word != ".")

    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)[1]
    linters = {command(line.replace("$(BIN)/", "")) for line in recipe.splitlines()}
    hooks = [hook for repo in load(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    entries = [hook["entry"] for hook in hooks if "entry" in hook]
    assert all(entry.startswith(".venv/bin/") for entry in entries)
    assert {command(entry.removeprefix(".venv/bin/")) for entry in entries} == linters
    assert {"end-of-file-fixer", "trailing-whitespace"} <= {hook["id"] for hook in hooks}


# ------------------------------------------------------------------------------------------------- citation, changelog
def test_the_citation_is_of_this_version(load):
    citation = load("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert str(citation["version"]) == snr_optim.__version__
    assert f'license = "{citation["license"]}"' in read("pyproject.toml")
    assert any("2511.23310" in reference["url"] for reference in citation["references"])


def test_the_changelog_keeps_its_form():
    changelog = read("CHANGELOG.md")
    versions = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = set(re.findall(r"^### (.*)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_release_workflow_finds_the_version():
    assert f'\n__version__ = "{snr_optim.__version__}"\n' in read("snr_optim/__init__.py")
