"""Settings that all tests share: the same examples and numbers in every run, and no advice about tiny configs."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import re
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import typer.rich_utils  # noqa: F401  # reads the terminal's width once; some tests have a wider one
from durations import SUITES, Recorder, is_in_suite, read_durations, sum_by_file

# Before huggingface_hub is imported, which reads it once: no test asks the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The consoles read it once, here: the workers of pytest-xdist have 80 columns, which break tables.
os.environ.pop("COLUMNS", None)

import mptk.cli.console  # noqa: F401
from mptk.plugins import list_absent_features

pytest_plugins = ["mptk.testing.fixtures"]
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("same")
ABSENT = list_absent_features()
"""Features that are not there: `tests/core_only.py` runs the core's tests without any."""
# The tiny models of benchmarks are of all kinds, so they need features, too.
collect_ignore = [
    str(path.relative_to(Path(__file__).parent))
    for path in Path(__file__).parent.rglob("test_*.py")
    if ABSENT and re.search(r"^from (mptk\.features|benchmarks)\b", path.read_text(), re.MULTILINE)
]


def pytest_addoption(parser):
    parser.addoption("--suite", choices=SUITES, help="which tests to run; default: every test, network tests included")
    parser.addoption("--shuffle", type=int, help="a seed: files in random order, and the tests in each")
    parser.addoption("--write-durations", action="store_true", help="write durations.json: which tests are not quick")


def pytest_configure(config):
    if config.getoption("--write-durations"):
        config.pluginmanager.register(Recorder())


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    """Mark the tests that are not quick. The files that take longest come first, so that no worker waits for another."""
    durations = read_durations()
    by_file = sum_by_file(durations)
    items.sort(key=lambda item: -by_file.get(item.nodeid.partition("::")[0], 0.0))
    for item in items:
        if item.nodeid in durations:
            item.add_marker(pytest.mark.slow)
        marks = list(item.iter_markers("features"))
        needed = {name for mark in marks for name in mark.args or ABSENT}
        if missing := sorted(needed.intersection(ABSENT)):
            item.add_marker(pytest.mark.skip(reason=f"without {', '.join(missing)}"))
    if (seed := config.getoption("--shuffle")) is not None:
        # By file, for a fixture of a module is made anew whenever another module's test comes between.
        order = random.Random(seed)
        keys = {path: order.random() for path in dict.fromkeys(item.path for item in items)}
        order.shuffle(items)
        items.sort(key=lambda item: keys[item.path])
    if suite := config.getoption("--suite"):
        left_out = [item for item in items if not is_in_suite(item, suite)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_in_suite(item, suite)]


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
def _import_here():
    """What takes seconds to import is imported here: the process that only hands tests to others needs none of it."""
    import transformers
    from onnxscript._framework_apis import torch_2_5 as onnx_operators
    from torch.onnx._internal.exporter import _schemas as schemas

    onnx_operators.get_torchlib_ops = functools.cache(onnx_operators.get_torchlib_ops)  # made anew for each export
    schemas.op_signature_from_function = functools.cache(schemas.op_signature_from_function)  # so are their signatures
    transformers.logging.set_verbosity_error()


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
def go_to():
    """Makes a folder the current one until the test is over."""
    with contextlib.ExitStack() as stack:
        yield lambda folder: stack.enter_context(contextlib.chdir(folder))


@pytest.fixture
def set_cache(monkeypatch):
    """Gives mptk another folder for its cache until the test is over."""
    return lambda folder: monkeypatch.setenv("MPTK_CACHE", str(folder))


@pytest.fixture
def asked_prune(inside):
    """Collects what ``mptk.prune`` is asked for, in place of a run."""
    return inside.asked("mptk.api.pruned.prune")


@pytest.fixture(scope="module")
def quick_bench():
    """A bench measures no memory, which takes a process for each graph, and times each step once in a turn.

    The machine's peaks are those of a small product, and of reading little memory.
    """
    from inside import changed

    with changed() as inside:
        inside.bound("mptk.ort.roofline.SIDE", 64)
        inside.bound("mptk.ort.roofline.READ_BYTES", 1 << 20)
        inside.gives("mptk.ort.bench.measure_peak_memory", 1)
        inside.around(
            "mptk.ort.bench.time_alternately", lambda real, steps, rounds, **_: real(steps, rounds, shortest=0.0)
        )
        yield


@pytest.fixture(scope="module")
def made_up_times():
    """Operators take the times of made_up_times.py."""
    from inside import changed
    from made_up_times import times

    with changed() as inside:
        inside.around("mptk.cost.operator_times.time_operators", lambda real, found, threads, progress: times(found))
        yield


@pytest.fixture
def run_words():
    """Runs words as the console script does, in this process. Gives the exit code."""

    def run(*words):
        from mptk.cli.main import main

        before, sys.argv = sys.argv, ["mptk", *map(str, words)]
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            sys.argv = before
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
def fresh(tmp_path_factory):
    """Runs programs in new processes that have torch, and nothing of mptk (fresh.py)."""
    from fresh import start_programs

    with start_programs(tmp_path_factory.mktemp("fresh")) as programs:
        yield programs


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
