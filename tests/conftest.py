"""Settings that all tests share: the same examples and numbers in every run, and no advice about tiny configs."""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import typer.rich_utils  # noqa: F401  # reads the terminal's width once; some tests have a wider one

from mptk.plugins import list_absent_features

pytest_plugins = ["mptk.testing.fixtures"]
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("same")
LONGEST = (
    "test_docs_commands.py",
    "test_image_text.py",
    "test_kinds.py",
    "test_learning.py",
    "test_bad_inputs.py",
    "test_rules.py",
    "test_pruning.py",
    "test_vocabulary.py",
    "test_packaging.py",
    "test_stages.py",
    "test_shapes.py",
    "test_examples.py",
    "test_plugin.py",
)
TOGETHER = {
    "test_image_text_onnx.py": "test_image_text.py",
    "test_onnx_forms.py": "test_kinds.py",
    "test_python_kinds.py": "test_kinds.py",
}
"""File → the file whose worker runs it, too: both trace the same models."""


ABSENT = list_absent_features()
"""Features that are not there: `tests/core_only.py` runs the core's tests without any."""
# The tiny models of benchmarks are of all kinds, so they need features, too.
collect_ignore = [
    str(path.relative_to(Path(__file__).parent))
    for path in Path(__file__).parent.rglob("test_*.py")
    if ABSENT and re.search(r"^from (mptk\.features|benchmarks)\b", path.read_text(), re.MULTILINE)
]


def pytest_configure(config):
    config.addinivalue_line("markers", "always: what `make test` runs whatever it takes: a kind, a fault, a rule")
    config.addinivalue_line("markers", "network: needs a network")
    config.addinivalue_line(
        "markers", "features(*names): what a test needs beside the core; without names: the whole product"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid):
            folder, _, name = super()._split_scope(nodeid).rpartition("/")
            return f"{folder}/{TOGETHER.get(name, name)}"

    return Together(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items):
    """The files that take longest come first: at the end no worker waits long for another."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        marks = list(item.iter_markers("features"))
        needed = {name for mark in marks for name in mark.args or ABSENT}
        if missing := sorted(needed.intersection(ABSENT)):
            item.add_marker(pytest.mark.skip(reason=f"without {', '.join(missing)}"))


@pytest.fixture(autouse=True)
def _same_numbers(request):
    """A test draws the same random numbers whichever tests ran before it in its process."""
    import torch

    torch.manual_seed(0)
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)


def pytest_collection_finish():
    """Keep the objects of the imports out of garbage collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _traced_once():
    """The same model is traced and translated to ONNX once in a process (traces.py).

    What takes seconds to import is imported here: the process that only hands tests to others needs none of it.
    """
    import traces
    import transformers
    from onnxscript._framework_apis import torch_2_5 as onnx_operators
    from torch.onnx._internal.exporter import _schemas as schemas

    onnx_operators.get_torchlib_ops = functools.cache(onnx_operators.get_torchlib_ops)  # made anew for each export
    schemas.op_signature_from_function = functools.cache(schemas.op_signature_from_function)  # so are their signatures
    transformers.logging.set_verbosity_error()
    with traces.remembered():
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Text that models of the tests write goes into a cache of the tests' own."""
    if "MPTK_CACHE" in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPTK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def inside(monkeypatch):
    """What a test can only do inside of the product (inside.py)."""
    from inside import Inside

    return Inside(monkeypatch)


@pytest.fixture
def typed(inside):
    """Runs words as the console script does, in this process. Gives the exit code."""

    def run(*words):
        from mptk.cli.main import main

        inside.bound("sys.argv", ["mptk", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def decoder_graphs(laboratory):
    """Kind of a tiny decoder → the folder of its ONNX graphs (tiny_decoders.py). To be read, not to be changed."""
    import tiny_decoders

    return lambda kind: laboratory.keep(f"graphs/{kind}", lambda out: tiny_decoders.write_graphs(kind, out))


@pytest.fixture(scope="session")
def tiny_folders(laboratory, _own_cache):
    """Name → a tiny model, an export, a pruned folder, …, for tests that damage copies of them."""
    from tests.bad_inputs.shared import write_folders

    return {path.name: path for path in laboratory.keep("tiny", write_folders).iterdir()}


@pytest.fixture(scope="session")
def gqa():
    """A model with the inputs and gradients of its layers (criteria_cases.py); here and below."""
    import criteria_cases

    return criteria_cases.grouped_queries()


@pytest.fixture(scope="session")
def gpt2():
    import criteria_cases

    return criteria_cases.fused_heads()


@pytest.fixture(scope="session")
def moe():
    import criteria_cases

    return criteria_cases.packed_experts()


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory):
    """A folder of the file's own for the code of models that transformers copies, and for the cache of mptk."""
    from inside import Inside

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        Inside(patch).bound("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)  # of another folder, from another file's tests
        Inside(patch).bound("sys.path", [p for p in sys.path if not (Path(p) / "transformers_modules").is_dir()])
        patch.setenv("MPTK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
