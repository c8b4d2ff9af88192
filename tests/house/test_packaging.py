"""What is installed: both packages with all their files, the command, and only imports that are declared."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grimp
import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mptk", "passes")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_badges_say_what_the_project_declares(project):
    mark = "Programming Language :: Python :: 3."
    minors = sorted(int(each.removeprefix(mark)) for each in project["project"]["classifiers"] if each.startswith(mark))
    said = {
        "badge-python.svg": f"Python: 3.{minors[0]} to 3.{minors[-1]}",
        "badge-licence.svg": f"licence: {project['project']['license']}",
    }
    for name, text in said.items():
        assert f"<title>{text}</title>" in (ROOT / "docs" / name).read_text()


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the absolute imports in ``tree``, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def normal(requirement: str) -> str:
    """The normalised distribution name that a requirement starts with."""
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def undeclared(folder: str, declared: set[str]) -> set[str]:
    """Modules that ``folder`` imports and that no distribution in ``declared`` provides."""
    own = {*PACKAGES, "benchmarks", "tests", *(p.stem for p in (ROOT / folder).rglob("*.py"))}
    providers = importlib.metadata.packages_distributions()
    names = {n for p in (ROOT / folder).rglob("*.py") for n in imported(ast.parse(p.read_text()))}
    third_party = names - own - sys.stdlib_module_names
    return {n for n in third_party if not {normal(d) for d in providers.get(n, [n])} & declared}


def defined(tree: ast.Module) -> Iterator[str]:
    """Classes and constants of a module."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))


def test_one_name_is_one_thing():
    """A search for a class or a constant finds one definition. A few short names may have two."""
    places = Counter(
        name
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for name in set(defined(ast.parse(file.read_text())))
    )
    # Each feature calls its record FEATURE, as its entry point says.
    known = {"FEATURE"}
    twice = [name for name, count in places.items() if count > 1 and not name.startswith("__") and name not in known]
    assert len(twice) < 10, twice


def test_wheel_holds_every_file_of_both_packages_and_shadows_nothing(site):
    for package in PACKAGES:
        files = [p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        missing = [str(f.relative_to(ROOT)) for f in files if not (site / f.relative_to(ROOT)).is_file()]
        assert not missing
        assert (site / package / "py.typed").is_file()
    (licence,) = site.glob("mptk-*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()
    record = licence.parents[1] / "RECORD"
    top = {line.partition("/")[0] for line in record.read_text().splitlines()} - {record.parent.name, ".."}
    assert top == set(PACKAGES), "benchmarks, docs and tests are not installed"
    others = importlib.metadata.packages_distributions()
    assert {owner for name in PACKAGES for owner in others.get(name, ["mptk"])} == {"mptk"}


def test_module_and_console_script_are_one_command(fresh, site, project):
    (entry,) = (e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "mptk")
    assert entry.value == "mptk.cli.main:main"
    code = "import runpy; runpy.run_module('mptk', run_name='__main__')"
    assert project["project"]["version"] in fresh.run(code, "--version", paths=[site]).out


@pytest.mark.network
def test_the_steps_of_the_cpu_image_make_a_command_that_works(tmp_path):
    """Its RUN lines, without Docker: in an environment of their own, and outside of the checkout."""
    steps = re.findall(r"^RUN (.+)", (ROOT / "docker/cpu.Dockerfile").read_text(), re.MULTILINE)
    assert len(steps) == 3
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", ".venv*", "build", "runs", ".*_cache")
    )
    path = {
        "PATH": f"{tmp_path / 'env/bin'}:{os.environ['PATH']}",
        "MPTK_CACHE": str(tmp_path / "cache"),
        "PIP_RETRIES": "0",
    }
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | path
    for line in [*steps, "mptk --version", "mptk models", "mptk prune --help"]:
        placed = line.replace("/source", f"{tmp_path}/source").replace("/wheels", f"{tmp_path}/wheels")
        subprocess.run(placed, shell=True, cwd=tmp_path, env=environment, check=True)


def test_every_one_can_be_the_first_import(fresh, site):
    """``passes`` imports mptk's data types and the API imports ``passes``: no order may close a circle.

    Only modules on such a circle can depend on the order. A package is imported before its modules: what it imports of
    them needs no trial of its own.
    """
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    imports = nx.DiGraph(
        (name, other) for name in graph.modules for other in graph.find_modules_directly_imported_by(name)
    )
    imports.add_edges_from([(name, name.rpartition(".")[0]) for name in graph.modules if "." in name])
    circles = [circle for circle in nx.strongly_connected_components(imports) if len(circle) > 1]
    modules = sorted(set().union(*circles))  # a package before what is in it
    assert set(PACKAGES) <= set(imports)
    assert 0 < len(modules) < len(imports) / 2
    # Third-party modules are imported once; then each name gets a child in which ours are not imported yet.
    script = f"""
import gc, importlib, os, sys
names, tried = {modules!r}, set()
for name in names:
    assert importlib.import_module(name).__file__.startswith({str(site)!r}), name
gc.disable()  # in each child it would look through all of torch
for name in names:
    if name in tried:
        continue
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        for module in [m for m in sys.modules if m.startswith({PACKAGES!r})]:  # the example of a feature, too
            del sys.modules[module]
        importlib.import_module(name)
        os.write(writes, " ".join(m for m in names if m in sys.modules and m.startswith(name + ".")).encode())
        os._exit(0)
    os.close(writes)
    if os.waitpid(child, 0)[1]:
        raise ImportError(f"cannot import {{name}} first")
    tried.update(os.read(reads, 1 << 16).decode().split())
"""
    result = fresh.run(script, paths=[site])
    assert result.code == 0, result.err


def test_installed_version_is_the_projects(project):
    assert importlib.metadata.version("mptk") == project["project"]["version"]


def test_imports_are_declared(project):
    extras = project["project"]["optional-dependencies"]
    core = {normal(r) for r in project["project"]["dependencies"]}
    everything = core | {normal(r) for extra in extras.values() for r in extra}
    optional = {
        normal(r)
        for extra in ("diffusers", "eval", "images", "llama-cpp", "quantized", "testing")
        for r in extras[extra]
    }
    for package in PACKAGES:
        assert not undeclared(package, core | optional)
    assert not undeclared("tests", everything)
    assert not undeclared("benchmarks", everything)
    assert not undeclared("examples", core)


def test_dependencies_are_ranges_with_a_lower_bound(project):
    extras = project["project"]["optional-dependencies"]
    requirements = [*project["project"]["dependencies"], *(r for extra in extras.values() for r in extra)]
    assert [r for r in requirements if ">=" not in r or "==" in r or "@" in r] == []


@pytest.mark.features
def test_contracts_cover_every_module(project):
    """A new module of mptk must stand in a layer, or it would escape the contract."""
    house, *_ = project["tool"]["importlinter"]["contracts"]
    layers = {name for layer in house["layers"] for name in layer.split(" | ")}
    modules = {
        f"mptk.{p.stem}" for p in (ROOT / "mptk").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert modules - {"mptk.__init__", "mptk.__main__"} | {"passes"} == layers
