"""Values of options that are none, and options that contradict each other or do nothing."""

from __future__ import annotations

from tests.bad_inputs.shared import SHORT
from tests.bad_inputs.table import Row, rows

PRUNE = f"prune {{model}} --data {{text.raw}} --out {{out}} {SHORT}"
DEFAULT = "prune {model} --data {text.raw} --out {out}"
ONCE = f"{DEFAULT} --method magnitude --length 16 --eval-length 16"
BENCH, EVAL, GENERATE = "bench {gpt2}", "eval {model} --data {text.raw}", "generate {gpt2} hello"
PLAN = f"{DEFAULT} --plan {{pruned/plan.json}}"


COMMANDS = {
    PRUNE: (
        *(
            "--sparsity",
            "--tensor-parallel 0",
            "--seed",
            "--steps",
            "--minutes 0",
            "--batch 0",
            "--micro 0",
            "--lr",
            "--rank",
            "--lm",
        ),
        *(
            "--kl",
            "--hidden-loss",
            "--mask-share",
            "--save-every 0",
            "--threads",
            "--max-decode-ms 0",
            "--max-prefill-ms 0",
        ),
        *("--proof-length 0", "--search-shapes 0", "--search-finalists 0", "--search-tokens"),
    ),
    "shapes {model} --data {text.raw}": ("--shapes 0", "--finalists 0", "--tokens"),
    "recover {pruned} --out {out}": ("--steps",),
    "generate {gpt2} hello": ("--max-new-tokens 0", "--temperature", "--top-k", "--top-p", "--seed", "--threads"),
    "eval {model} --data {text.raw}": ("--length 0", "--windows 0"),
    "eval {model} --tasks arc_easy": ("--limit 0",),
    "bench {gpt2}": ("--rounds 0",),
    "verify {pruned}": ("--proof-length 0",),
    "analyze {model}": ("--tensor-parallel 0",),
}
"""Command → its numbers, and the largest value that is too small if that is not -1."""
NUMBERS = [
    Row(f"{command.split()[0]} {option} {value[:9]}", f"{command} {option}={value}", (option, "-h"), code=2)
    for command, options in COMMANDS.items()
    for option, _, least in (words.partition(" ") for words in options)
    for value in (least or "-1", "9" * 30, *["nan"] * (option in ("--sparsity", "--seed")))
]

REPEATED = [
    Row(f"prune {option} {value}", f"{DEFAULT} {option} {value}", (option,), code=2)
    for option, value in (
        ("--samples", "0"),
        ("--samples", "nan"),
        ("--length", "7"),
        ("--length", "9" * 5000),
        ("--eval-windows", "0"),
        ("--eval-length", "1"),
        ("--method", "[/x]"),
        ("--budget", "money"),
        ("--objective", "both"),
        ("--nonsense", "1"),
    )
]
TEXTS = [
    *rows(
        ONCE,
        {
            "--width ffn=²": ("--width ffn=²", "as ffn=1024"),
            "--width ffn=0": ("--width ffn=0", "as ffn=1024"),
            "--width ffn=-4": ("--width ffn=-4", "as ffn=1024"),
            "--width =4": ("--width =4", "as ffn=1024"),
            "--width ffn": ("--width ffn", "as ffn=1024"),
            f"--width ffn={'9' * 5000}": ("as ffn=1024",),
            "--width wings=8": ("no family 'wings'", "there are"),
            "--width ffn=7": ("ffn cannot have width 7", "nearest legal"),
            "--align h10": ("align: 'h10' is not known", "a100, h100"),
            "--align 8 --sparsity 97%": ("sparsity 0.970; nearest: 0.804",),
            "--families wings": ("no family 'wings'",),
            "--keep wings": ("no family 'wings'",),
            "--families ffn --keep ffn": ("ffn is in --keep and in --",),
            "--width ffn=32 --keep ffn": ("ffn is in --keep and in --", "--width"),
            "--shared": ("only the sizes of --ladder can share weights", "give --ladder"),
            "--shared --ladder 0.2,0.4 --distil-epochs 1": (
                "trained together, without --distil-epochs",
                "leave it out",
            ),
            "--shared --ladder 0.2,0.4 --method maskprune --steps 2": ("maskprune trains each size by itself", "wanda"),
            **{
                f"--memory {value}": ("is not a size", "as 8GB")
                for value in ("nan", "infGB", "-1GB", "0GB", "1e999GB", "8", "8XB", "²GB", "9" * 400 + "TB")
            },
            "--max-shard-size nanGB": ("is not a size", "as 8GB"),
            "--device xpu:7": ("no device xpu:7",),
        },
    ),
    *rows(
        BENCH,
        {
            "--lengths ²": ("--lengths ²", "as 128,512"),
            "--lengths ,": ("--lengths ,", "as 128,512"),
            "--lengths 0": ("--lengths 0", "as 128,512"),
            f"--lengths {'9' * 400}": ("as 128,512",),
            "--lengths 8,8": ("is repeated",),
            "--batches -1": ("--batches -1", "as 128,512"),
            "--threads 1,many": ("--threads 1,many", "numbers of at least"),
            "--threads 0": ("--threads 0", "as 128,512"),
            "{gpt2}": ("given twice",),
        },
    ),
    *rows(
        BENCH,
        {
            "--plot {x.foo}": ("x.foo", ".png", ".svg"),
            "--plot {x}": (".png", ".svg"),
            "--plot /": ("--plot", "/ ends in none of .png"),
            "--markdown /": ("--markdown", "/ is a folder"),
            "--json /": ("--json", "/ is a folder"),
        },
        code=2,
    ),
    *rows(
        "",
        {
            "analyze {model} --json /": ("--json", "/ is a folder"),
            f"{EVAL} --json /": ("--json", "/ is a folder"),
            "ops --json /": ("--json", "/ is a folder"),
            "analyze {model} --html /": ("--html", "/ is a folder"),
            "report {pruned} --html /": ("--html", "/ is a folder"),
            f"ops --json {{{'n' * 300}}}": ("too long", "Give another name"),
            f"prune {{model}} --data {{text.raw}} --out {{{'n' * 300}}}": ("too long",),
            ONCE.replace("{out}", "{text.raw}/deeper"): ("is not a folder",),
            "prune-it {model}": ("prune-it",),
            "prune --out {out}": ("model",),
        },
        code=2,
    ),
    *rows(
        "",
        {
            "analyze {model} --align wings=8": ("no family 'wings'", "there are"),
            "prune {model} --data {text.raw}": ("give --out",),
            "prune {model} --data {text.raw} --out {model}": ("is what is read", "another --out"),
            "fetch smollm9": ("smollm9", "there are"),
        },
    ),
    Row("out that is no text", ONCE.replace("{out}", "{a}"), ("not UTF-8", "rename it"), words={"a": "a\udcffb"}),
    Row("model that is no text", "analyze {a}", ("not UTF-8", "rename it"), words={"a": "a\udcffb"}),
]

CONTRADICTIONS = [
    *rows(
        PRUNE,
        {
            "--steps 2 --lm 0 --kl 0 --hidden-loss 0": ("all three losses have weight 0", "--lm"),
            "--quantize int8 --no-onnx": ("--quantize would do nothing", "--no-onnx"),
            "--onnx-dtype float16 --no-onnx": ("--onnx-dtype would do nothing",),
            "--logits last --no-onnx": ("--logits would do nothing",),
            "--objective prefill --no-onnx": ("--objective would do nothing",),
            "--quantize int8 --onnx-dtype float16": ("needs a float32 graph",),
            "--search --target graph --layers free": (
                "--search only ranks shapes whose layers are alike",
                "leave out --search or --layers free",
            ),
            "--search-tokens 5": ("--search-tokens would do nothing", "--search"),
            "--search --search-tokens 0 --search-finalists 3": (
                "--search-finalists would do nothing",
                "--search-tokens",
            ),
            "--search --search-tokens 9": ("9 tokens are too few", "--batch"),
            "--distil-lr 0.1": ("--distil-lr would do nothing", "--distil-epochs"),
            "--distil-epochs 1 --no-reconstruct": ("leave out --no-reconstr",),
            "--mask-share 0.5": ("--mask-share would do nothing",),
            **{
                line: (f"{line.split()[0]} would do nothing", "--steps")
                for line in (
                    *(
                        "--batch 4",
                        "--micro 2",
                        "--lr 0.1",
                        "--optimizer muon",
                        "--rank 4",
                        "--lm 1",
                        "--kl 1",
                        "--hidden-loss 1",
                    ),
                    *("--teacher cached", "--precision bf16", "--gradient-checkpointing", "--tracker tensorboard"),
                    "--save-every 4",
                )
            },
        },
    ),
    *rows(
        PLAN,
        {
            **{
                line: (f"{line.split()[0]} would do nothing", "--plan already says which units stay")
                for line in (
                    *("--width ffn=8", "--families ffn", "--keep ffn", "--sparsity 0.5", "--method wanda"),
                    *("--budget flops", "--max-decode-ms 5", "--rehome", "--reconstruct", "--distil-epochs 1"),
                )
            },
            "--resume": ("--resume would do nothing", "leave it out"),
            "--search": ("--plan says which units stay, so --search has nothing to choose", "leave out one of both"),
        },
    ),
    *rows(
        "shapes {model} --data {text.raw}",
        {
            "--tokens 0 --finalists 3": ("--finalists would do nothing", "--tokens"),
            "--tokens 9": ("9 tokens are too few", "--batch"),
            "--resume": ("--resume would do nothing", "give --out"),
        },
    ),
    *rows(
        ONCE,
        {
            "--max-decode-ms 5 --max-prefill-ms 9": ("only one latency",),
            "--max-decode-ms 5 --sparsity 0.5": ("--sparsity would do nothing",),
            "--max-decode-ms 5 --budget flops": ("--budget would do nothing",),
            "--max-decode-ms 5 --objective prefill": ("--objective would do nothing",),
            "--threads 4": ("--threads would do nothing",),
            "--steps 2 --teacher-cache {t}": ("add --teacher cached",),
            "--steps 2 --teacher cached --hidden-loss 1": ("--teacher live",),
            "--steps 2 --rank 4 --optimizer muon": ("--optimizer would do nothing: AdamW trains adapters",),
            "--steps 2 --target graph --rank 4": ("--rank: LoRA needs the layers", "leave it out"),
            "--target graph --rehome": ("--rehome would do nothing",),
            "--estimate --resume": ("--resume would do nothing",),
            "--kv-heads 2": ("2 KV heads, which cannot become 2", "give one of 1"),
            "--kv-heads 1 --sparsity 0.01": ("merging KV heads already removes", "--sparsity 0"),
            "--kv-heads 1 --budget latency": ("--kv-heads changes the latency", "--max-decode-ms"),
        },
    ),
    *rows(ONCE, {"--kv-heads 0": ("--kv-heads",)}, code=2),
    *rows(
        DEFAULT,
        {
            "--steps 0": ("learns in steps",),
            "--families ffn --width ffn=16 --align 8 --method reap --length 16": ("none are in ffn", "--method wanda"),
            "--families hidden --width hidden=24 --method wanda --steps 2 --rank 0 --length 16": (
                "leave out --rank 0",
            ),
            "--precision fp16": ("--precision bf16 or no",),
        },
    ),
    *rows(
        "recover {pruned} --out {out}",
        {"--steps 0": ("nothing to do",), "--quantize int8 --no-onnx": ("would do nothing",)},
    ),
    *rows(
        GENERATE,
        {
            "--top-k 5": ("--top-k would do nothing", "--temperature"),
            "--seed 5": ("--seed would do nothing",),
            "--chat": ("no chat template",),
        },
    ),
    *rows(EVAL, {"--limit 5": ("--limit would do nothing",), "--threads 2": ("--threads would do nothing",)}),
    *rows(
        "",
        {
            "eval {model}": ("nothing to evaluate",),
            "eval {model} --tasks x --length 9": ("--length would do nothing",),
            "eval {gpt2} --data {text.raw} --runtime onnx --trust-remote-code": ("would do nothing",),
            "eval {gpt2} --runtime onnx --tasks x": ("lm-eval tasks run in torch",),
            "export {model} --out {out} --data {text.raw}": ("--data would do nothing",),
            "prune {gpt2-dense} --kv-heads 1 --sparsity 0 --data {text.raw} --length 8 --eval-length 8 --out {out}": (
                "no KV heads to merge",
                "leave out --kv-heads",
            ),
            "show {model} --after rewrite": ("give both --after and --plan",),
        },
    ),
]

ROWS = [*NUMBERS, *REPEATED, *TEXTS, *CONTRADICTIONS]
