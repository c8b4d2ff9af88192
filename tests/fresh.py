"""Programs in new processes that have torch and transformers, whose import takes seconds, and nothing of mptk.

One process imports them for all tests that share it. Each program runs in a fork of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SERVER = """
import gc, json, os, sys, traceback
import accelerate, onnx, peft, torch.export, transformers.models.llama.modeling_llama

# An editable installation finds modules of a package that the paths lack.
sys.meta_path[:] = [each for each in sys.meta_path if "Editable" not in getattr(each, "__name__", "")]
gc.freeze()
for line in sys.stdin:
    program, words, paths, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(os.path.dirname(out))
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        sys.path[:0] = paths
        sys.argv = ["mptk", *words]
        code = 0
        try:
            exec(program, {"__name__": "__main__"})
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the end of an interpreter that has torch takes a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
COMMAND = "from mptk.cli.main import main; main()"


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Fresh:
    """Runs programs. ``folder`` is where they run, and holds the cache of mptk."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder

    def run(self, code: str, *words: object, paths: Sequence[Path] = (ROOT,)) -> Done:
        """Run a program. ``words``: its arguments. ``paths``: where it finds mptk, and what is installed beside it."""
        assert self.process.stdin
        assert self.process.stdout
        out, err = self.folder / "out", self.folder / "err"
        asked = (code, [str(word) for word in words], [str(path) for path in paths], str(out), str(err))
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Done(int(self.process.stdout.readline()), out.read_text(), err.read_text())

    def command(self, *words: object, paths: Sequence[Path] = (ROOT,)) -> Done:
        """Run a command line of mptk."""
        return self.run(COMMAND, *words, paths=paths)


@contextmanager
def start_programs(folder: Path) -> Iterator[Fresh]:
    """The process from which programs are forked."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"COLUMNS": "200", "MPTK_CACHE": str(folder / "cache")}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Fresh(process, folder)
        assert process.stdin
        process.stdin.close()
