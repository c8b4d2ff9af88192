"""Values of options that are none, and options that contradict each other or do nothing: what the parser refuses."""

from __future__ import annotations

from mptk.errors import DataError, OutputError
from tests.bad_inputs.table import USAGE, Row, check_lines

ONCE = "prune {model} --data {text.raw} --out {out} --method magnitude --length 16 --eval-length 16"
PRUNE = f"{ONCE} --align 8 --samples 2 --eval-windows 1"
DEFAULT = "prune {model} --data {text.raw} --out {out}"
PLAN = f"{DEFAULT} --plan {{pruned/plan.json}}"
SHAPES, EVAL, BENCH = "shapes {model} --data {text.raw}", "eval {model} --data {text.raw}", "bench {gpt2}"
GENERATE, RECOVER = "generate {gpt2} hello", "recover {pruned} --out {out}"
LONG = "n" * 300

NUMBERS = {
    PRUNE: "sparsity tensor-parallel=0 seed steps minutes=0 batch=0 micro=0 lr rank lm kl hidden-loss mask-share "
    "save-every=0 threads max-decode-ms=0 max-prefill-ms=0 proof-length=0 search-shapes=0 search-finalists=0 "
    "search-tokens",
    SHAPES: "shapes=0 finalists=0 tokens",
    RECOVER: "steps",
    GENERATE: "max-new-tokens=0 temperature top-k top-p seed threads",
    EVAL: "length=0 windows=0",
    "eval {model} --tasks arc_easy": "limit=0",
    BENCH: "rounds=0",
    "verify {pruned}": "proof-length=0",
    "analyze {model}": "tensor-parallel=0",
}
"""Command → its numbers, and the largest value that is too small if that is not -1."""


def refuse_numbers() -> list[Row]:
    """Each number too small, too large, and two that are none at all."""
    found = []
    for command, options in NUMBERS.items():
        for option, _, least in (words.partition("=") for words in options.split()):
            flag, none = f"--{option}", ["nan"] * (option in ("sparsity", "seed"))
            found += check_lines(command, {f"{flag} {v}": flag for v in (least or "-1", "9" * 30, *none)}, USAGE)
    return found


def refuse_idle(line: str, *ends: str) -> list[Row]:
    """Options that would do nothing with ``line``: of each end the first."""
    return check_lines(line, {end: end.split()[0].removeprefix("--").replace("-", "_") for end in ends})


VALUES = [
    *check_lines(
        DEFAULT,
        {
            end: end.split()[0]
            for end in (
                *("--samples 0", "--samples nan", "--length 7", f"--length {'9' * 5000}", "--eval-windows 0"),
                *("--eval-length 1", "--method [/x]", "--budget money", "--objective both", "--nonsense 1"),
                "--kv-heads 0",
            )
        },
        USAGE,
    ),
    *check_lines(
        ONCE,
        {
            **{f"--width {value}": "width" for value in ("ffn=²", "ffn=0", "ffn=-4", "=4", "ffn", f"ffn={'9' * 5000}")},
            **{
                f"--memory {value}": "memory"
                for value in ("nan", "infGB", "-1GB", "0GB", "1e999GB", "8", "8XB", "²GB", "9" * 400 + "TB")
            },
            "--max-shard-size nanGB": "max_shard_size",
            "--align h10": "align",
            "--shared": "shared",
            "--shared --ladder 0.2,0.4 --distil-epochs 1": "distil_epochs",
            "--shared --ladder 0.2,0.4 --method maskprune --steps 2": "method",
            "--ladder 0.2,much": "ladder",
            "--ladder 0.2,0.4 --sparsity 0.3": "sparsity",
        },
    ),
    *check_lines(
        BENCH,
        {
            "--lengths ²": "lengths",
            "--lengths 0": "lengths",
            f"--lengths {'9' * 400}": "lengths",
            "--lengths 8,8": "lengths",
            "--batches -1": "batches",
            "--threads 1,many": "threads",
            "{gpt2}": "{gpt2}",
        },
    ),
    *check_lines("", {"rung {pruned} x --out {out}": "SIZE", "advise {model} --sparsities x": "sparsities"}),
    *check_lines("advise {model} --data {text.raw}", {"--tolerance x": "tolerance", "--steps 4": "steps"}),
]

PLACES = [
    *check_lines(
        "",
        {
            f"{BENCH} --plot {{x.foo}}": "--plot",
            f"{BENCH} --markdown /": "--markdown",
            f"{BENCH} --json /": "--json",
            "analyze {model} --json /": "--json",
            f"{EVAL} --json /": "--json",
            "ops --json /": "--json",
            "analyze {model} --html /": "--html",
            "report {pruned} --html /": "--html",
            f"ops --json {{{LONG}}}": "--json",
            f"prune {{model}} --data {{text.raw}} --out {{{LONG}}}": "--out",
            ONCE.replace("{out}", "{text.raw}/deeper"): "--out",
            "gguf {pruned} --like {toy.gguf} --out {out.bin}": "--out",
            "prune-it {model}": "",
            "prune --out {out}": "model",
        },
        USAGE,
    ),
    *check_lines("", {"prune {model} --data {text.raw}": "out", "rung {pruned} 0.3": "out", "recover {pruned}": "out"}),
    *check_lines(
        "",
        {
            "prune {model} --data {text.raw} --out {model}": "{model}",
            "gguf {pruned} --like {toy.gguf} --out {toy.gguf}": "{toy.gguf}",
        },
        OutputError,
    ),
    Row("out that is no text", ONCE.replace("{out}", "{a}"), about="a\udcffb", words={"a": "a\udcffb"}),
    Row("model that is no text", "analyze {a}", about="a\udcffb", words={"a": "a\udcffb"}),
]

TRAINING = "batch=4 micro=2 lr=0.1 optimizer=muon rank=4 lm=1 kl=1 hidden-loss=1 teacher=cached precision=bf16 "
TRAINING += "gradient-checkpointing tracker=tensorboard save-every=4"
CHOICE = "width=ffn=8 families=ffn keep=ffn sparsity=0.5 method=wanda budget=flops max-decode-ms=5 rehome reconstruct "
CHOICE += "distil-epochs=1 resume search"

CONTRADICTIONS = [
    *refuse_idle(
        PRUNE,
        *("--quantize int8 --no-onnx", "--onnx-dtype float16 --no-onnx", "--logits last --no-onnx"),
        *("--objective prefill --no-onnx", "--search-tokens 5", "--search-finalists 3 --search --search-tokens 0"),
        *("--distil-lr 0.1", "--distil-epochs 1 --no-reconstruct", "--mask-share 0.5"),
        *(f"--{each.replace('=', ' ', 1)}" for each in TRAINING.split()),
    ),
    *check_lines(
        PRUNE,
        {
            "--steps 2 --lm 0 --kl 0 --hidden-loss 0": "lm",
            "--quantize int8 --onnx-dtype float16": "onnx_dtype",
            "--search --target graph --layers free": "layers",
        },
    ),
    *check_lines(PRUNE, {"--search --search-tokens 9": "search_tokens"}, DataError),
    *refuse_idle(PLAN, *(f"--{each.replace('=', ' ', 1)}" for each in CHOICE.split())),
    *refuse_idle(SHAPES, "--finalists 3 --tokens 0", "--resume"),
    *check_lines(SHAPES, {"--tokens 9": "search_tokens"}, DataError),
    *refuse_idle(
        ONCE,
        *("--sparsity 0.5 --max-decode-ms 5", "--budget flops --max-decode-ms 5"),
        *("--objective prefill --max-decode-ms 5", "--threads 4", "--teacher-cache {t} --steps 2"),
        *("--teacher cached --hidden-loss 1 --steps 2", "--optimizer muon --steps 2 --rank 4"),
        *("--rank 4 --target graph --steps 2", "--rehome --target graph", "--resume --estimate"),
        "--kv-heads 1 --budget latency",
    ),
    *check_lines(
        ONCE,
        {
            "--max-decode-ms 5 --max-prefill-ms 9": "max_ms",
            "--families ffn --keep ffn": "keep",
            "--width ffn=32 --keep ffn": "keep",
        },
    ),
    *refuse_idle(DEFAULT, "--steps 0", "--precision fp16", "--context 32768", "--context 9 --max-prefill-ms 9"),
    *refuse_idle(RECOVER, "--steps 0", "--quantize int8 --no-onnx"),
    *refuse_idle(GENERATE, "--top-k 5", "--seed 5"),
    *refuse_idle(EVAL, "--limit 5", "--threads 2"),
    *check_lines(
        "",
        {
            "eval {model}": "data",
            "eval {model} --tasks x --length 9": "length",
            "eval {gpt2} --data {text.raw} --runtime onnx --trust-remote-code": "trust_remote_code",
            "eval {gpt2} --runtime onnx --tasks x": "tasks",
            "export {model} --out {out} --data {text.raw}": "data",
            "show {model} --after rewrite": "plan",
            "prune {model} --data {text.raw} --inputs i.safetensors --out {out}": "data",
        },
    ),
]

ROWS = [*refuse_numbers(), *VALUES, *PLACES, *CONTRADICTIONS]
