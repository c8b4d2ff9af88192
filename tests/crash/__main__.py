"""Kill commands, run them again, and compare with runs that nobody killed.

    python -m tests.crash [--kills 160] [--seed 0] [--scene NAME] [--json FILE]

Each scene is a command (``scenes.py``). A third of its kills come at a rename, before it or after it, a third at a word
of a stage, stage after stage, and a third at a random moment; by SIGKILL, SIGTERM and SIGINT. What is killed is drawn
from the seed. After each kill:

- what is there under its name is the earlier result or the new one, whole;
- SIGTERM and SIGINT say what is kept and leave no temporary file;
- the same command, with ``--resume`` every other time, ends with the plan and the weights of the unbroken run, bit for
  bit, and with the same files: nothing is left beside it, in the cache folder or among the temporary files.

With ``--json`` it goes on where it was stopped. Exit code 1 if anything differs.
"""

from __future__ import annotations

import json
import os

os.environ |= {"OMP_NUM_THREADS": "1", "TTY_INTERACTIVE": "0", "COLUMNS": "1000"}

import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import result_header, write_result
from mptk.errors import MptkError
from mptk.publish.manifest import check_manifest
from tests.crash.forked import Ended, Trap, run, warm
from tests.crash.scenes import PRUNED, SCENES, Scene, made, starting, write_inputs

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)


@dataclass
class Trial:
    """One kill. ``found``: "same", or what was wrong; "finished" if the command ended before it could be killed."""

    scene: str
    number: int
    signal: str
    at: str
    resumed: bool
    code: int
    found: str


@dataclass(frozen=True)
class Stage:
    """A scene ready to be played: its place before the command, what an unbroken run makes of it, how that ended."""

    scene: Scene
    before: Path
    expected: dict[str, str]
    unbroken: Ended
    work: Path

    @staticmethod
    def of(scene: Scene, inputs: Path, work: Path) -> Stage:
        """Run the command once in a copy, which also measures the machine for all runs that follow."""
        before, after = work / "before", work / "after"
        starting(scene, inputs, before, work / "aside")
        shutil.copytree(before, after)
        unbroken = run(scene.command, after, work / "aside", Trap(exchange=scene.exchange), scene.prepare)
        assert unbroken.code == 0, unbroken.said
        if (after / "cache" / "machine").is_dir():
            shutil.copytree(after / "cache" / "machine", before / "cache" / "machine", dirs_exist_ok=True)
        return Stage(scene, before, made(after), unbroken, work)

    def trap(self, number: int, seed: int) -> tuple[Trap, str]:
        """Where kill ``number`` of the scene is to come, and that in words."""
        draw = random.Random(f"{seed} {self.scene.name} {number}")
        events, how = self.unbroken.events, SIGNALS[draw.randrange(len(SIGNALS))]
        renames = [i for i, event in enumerate(events) if not event.startswith("at ")]
        words: dict[str, list[int]] = {}
        for i, event in enumerate(events):
            if event.startswith("at "):
                words.setdefault(event.split(" of ")[0].rstrip(" 0123456789"), []).append(i)
        if number % 3 == 0 and renames:
            event = draw.choice(renames)
        elif number % 3 == 1 and words:
            event = draw.choice(list(words.values())[number // 3 % len(words)])
        else:
            seconds = 0.9 * draw.random() * self.unbroken.seconds
            return Trap(how, seconds=seconds, exchange=self.scene.exchange), f"after {seconds:.2f} s of work"
        return Trap(how, event=event, exchange=self.scene.exchange), f"{event}: {events[event]}"

    def play(self, number: int, seed: int) -> Trial:
        """Kill the command once, and see what is left and what the next run makes of it."""
        trap, at = self.trap(number, seed)
        place, again = self.work / "place", list(self.scene.command)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.before, place)
        killed = run(again, place, self.work / "aside", trap, self.scene.prepare)
        if trap.event is not None and trap.event < len(killed.events):
            at = f"{trap.event}: {killed.events[trap.event]}"
        resumes = self.scene.resumes and number % 2 == 0
        trial = Trial(self.scene.name, number, signal.Signals(trap.signal).name, at, resumes, killed.code, "finished")
        if killed.code == 0:
            return trial
        wrong = self.after_kill(place, killed, trap)
        ended = self.run(again + ["--resume"] * resumes, place)
        if ended.code == 1 and "add --resume" in ended.said:
            trial.resumed = True
            ended = self.run([*again, "--resume"], place)
        if ended.code != 0:
            wrong.append(f"the next run ended with {ended.code}: {ended.said[-300:]}")
        wrong += differences(self.expected, made(place))
        trial.found = "; ".join(wrong) or "same"
        return trial

    def run(self, command: list[str], place: Path) -> Ended:
        return run(command, place, self.work / "aside", Trap(exchange=self.scene.exchange), self.scene.prepare)

    def after_kill(self, place: Path, killed: Ended, trap: Trap) -> list[str]:
        """What is wrong with what a killed command left."""
        wrong, there, before = [], made(place), made(self.before)
        if trap.signal != signal.SIGKILL:
            if last_words(killed) != last_words(self.unbroken):  # if not, only the interpreter was left to end
                wrong += told(killed, trap.signal, place)
            wrong += [f"{path} stayed after {trap.signal.name}" for path in there if ".mptk" in path]
        out = self.scene.out
        for result in self.scene.results or ([] if out is None else [out]):
            wrong += self.not_whole(place, result, before)
        there = made(place)
        for path, digest in there.items():
            hidden = any(part.startswith(".") or part.endswith(".run") for part in Path(path).parts)
            if not hidden and path.split("/")[0] != out and digest not in (before.get(path), self.expected.get(path)):
                wrong.append(f"{path} is no file of a whole run")
        return wrong

    def not_whole(self, place: Path, out: str, before: dict[str, str]) -> list[str]:
        """What is wrong with a result: it is the earlier one or the new one, whole."""
        wrong, there = [], made(place)
        if within(before, out) and not within(there, out):
            if self.scene.exchange:
                wrong.append(f"{out} was away")
            ended = self.run(["report", out], place)
            if ended.code:
                wrong.append(f"the next command did not put {out} back: {ended.said[-200:]}")
            there = made(place)
        if found := within(there, out):
            if found not in (within(before, out), within(self.expected, out)):
                wrong.append(
                    f"{out} is neither the earlier nor the new one: {differences(within(self.expected, out), found)}"
                )
            try:
                check_manifest(place / out)
            except MptkError as error:
                wrong.append(str(error))
        return wrong


def told(killed: Ended, by: signal.Signals, place: Path) -> list[str]:
    """What is wrong with the last words of a command that could speak them."""
    word, code = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}[by]
    last = last_words(killed)
    wrong = [] if killed.code == code else [f"{by.name} ended with {killed.code}"]
    if not last.startswith(f"{word}; "):
        wrong.append(f"{by.name} said {killed.said[-300:]!r}")
    kept = any(place.glob("out.run/*.safetensors")) and "proven and published" not in last
    return wrong + (["what is kept was not said: " + last] if kept and "--resume goes on" not in last else [])


def last_words(ended: Ended) -> str:
    return (ended.said.splitlines() or [""])[-1]


def within(files: dict[str, str], folder: str) -> dict[str, str]:
    return {path: digest for path, digest in files.items() if path.startswith(f"{folder}/")}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is left, missing or other, in words."""
    return (
        [f"{path} is left" for path in sorted(found.keys() - expected.keys())]
        + [f"{path} is missing" for path in sorted(expected.keys() - found.keys())]
        + [f"{path} differs" for path in sorted(expected.keys() & found.keys()) if expected[path] != found[path]]
    )


def numbers(kills: int, scenes: list[Scene]) -> dict[str, int]:
    """How often each scene is killed."""
    shares = sum(scene.share for scene in scenes)
    return {scene.name: -(-kills * scene.share // shares) for scene in scenes}


def known(file: Path | None, seed: int) -> list[Trial]:
    """The trials of a run with this seed that was stopped."""
    if file is None or not file.is_file():
        return []
    content = json.loads(file.read_text())
    return [Trial(**row) for row in content["rows"]] if content["seed"] == seed and not content["done"] else []


def inputs_in(work: Path) -> Path:
    """What all scenes start from, made in a fork; and this process made ready to be forked."""
    (work / "inputs").mkdir()
    pid = os.fork()
    if pid == 0:
        try:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            write_inputs(work / "inputs")
        finally:
            os._exit(not (work / "inputs" / "text.txt").is_file())
    assert os.waitpid(pid, 0)[1] == 0
    shutil.copytree(work / "inputs", work / "warm")
    with suppress(SystemExit):
        warm(PRUNED, work / "warm")
    assert (work / "warm" / PRUNED[-1]).is_dir()
    return work / "inputs"


def main(
    kills: Annotated[int, typer.Option(help="how many")] = 160,
    seed: int = 0,
    scene: Annotated[list[str] | None, typer.Option(help="only these")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    scenes = [SCENES[name] for name in scene or SCENES]
    trials = known(json_file, seed)
    ready = {(trial.scene, trial.number) for trial in trials}
    work = Path(tempfile.mkdtemp(prefix="crash-"))  # a TemporaryDirectory would go with the first fork that ends
    try:
        inputs = inputs_in(work)
        for each, count in zip(scenes, numbers(kills, scenes).values(), strict=True):
            left = [number for number in range(count) if (each.name, number) not in ready]
            if not left:
                continue
            stage = Stage.of(each, inputs, work / each.name.replace(" ", "-"))
            for number in left:
                trials.append(stage.play(number, seed))
                print(shown(trials[-1]), flush=True)
                if json_file is not None:
                    write_result(json_file, header(trials, seed, done=False), [asdict(trial) for trial in trials])
    finally:
        shutil.rmtree(work)
    head = header(trials, seed, done=True)
    if json_file is not None:
        write_result(json_file, head, [asdict(trial) for trial in trials])
    print(
        f"seed {seed}: {head['kills']} kills, {head['wrong']} wrong, {head['finished']} ended before they were killed"
    )
    raise typer.Exit(head["wrong"] > 0)


def shown(trial: Trial) -> str:
    how = " (--resume)" if trial.resumed else ""
    return f"{trial.scene} {trial.number}: {trial.signal} {trial.at} → {trial.code}, then{how} {trial.found}"


def header(trials: list[Trial], seed: int, *, done: bool) -> dict[str, object]:
    found = Counter("same" if t.found == "same" else "finished" if t.found == "finished" else "wrong" for t in trials)
    by = Counter(trial.signal for trial in trials if trial.found != "finished")
    figures = {"kills": sum(by.values()), "wrong": found["wrong"], "finished": found["finished"], "signals": dict(by)}
    return {**result_header(), "done": done, "seed": seed, **figures}


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
