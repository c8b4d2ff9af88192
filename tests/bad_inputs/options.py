"""Values of options that are none, and options that contradict each other or do nothing."""

from __future__ import annotations

from tests.bad_inputs.shared import SHORT
from tests.bad_inputs.table import Row

PRUNE = f"prune {{model}} --data {{text.raw}} --out {{out}} {SHORT}"
ONCE = "prune {model} --data {text.raw} --out {out} --method magnitude --length 16 --eval-length 16"


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
    Row(
        f"prune {option} {value}",
        f"prune {{model}} --data {{text.raw}} --out {{out}} {option} {value}",
        (option,),
        code=2,
    )
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
    Row("width superscript", f"{ONCE} --width ffn=²", ("--width ffn=²", "as ffn=1024")),
    Row("width zero", f"{ONCE} --width ffn=0", ("--width ffn=0", "as ffn=1024")),
    Row("width negative", f"{ONCE} --width ffn=-4", ("--width ffn=-4", "as ffn=1024")),
    Row("width without a family", f"{ONCE} --width =4", ("--width =4", "as ffn=1024")),
    Row("width without a number", f"{ONCE} --width ffn", ("--width ffn", "as ffn=1024")),
    Row("width of 5000 digits", f"{ONCE} --width ffn={'9' * 5000}", ("as ffn=1024",)),
    Row("width of another family", f"{ONCE} --width wings=8", ("no family 'wings'", "there are")),
    Row("width that is not legal", f"{ONCE} --width ffn=7", ("ffn cannot have width 7", "nearest legal")),
    Row("align of no family", "analyze {model} --align wings=8", ("no family 'wings'", "there are")),
    Row("hardware unknown", f"{ONCE} --align h10", ("align: 'h10' is not known", "a100, h100")),
    Row("sparsity out of reach, in percent", f"{ONCE} --align 8 --sparsity 97%", ("sparsity 0.970; nearest: 0.804",)),
    Row("families unknown", f"{ONCE} --families wings", ("no family 'wings'",)),
    Row("keep unknown", f"{ONCE} --keep wings", ("no family 'wings'",)),
    Row("keep everything", f"{ONCE} --families ffn --keep ffn", ("ffn is in --keep and in --",)),
    Row("keep and width", f"{ONCE} --width ffn=32 --keep ffn", ("ffn is in --keep and in --", "--width")),
    *(
        Row(f"memory {value[:12]}", f"{ONCE} --memory {value}", ("is not a size", "as 8GB"))
        for value in ("nan", "infGB", "-1GB", "0GB", "1e999GB", "8", "8XB", "²GB", "9" * 400 + "TB")
    ),
    Row("max shard size nan", f"{ONCE} --max-shard-size nanGB", ("is not a size", "as 8GB")),
    Row("lengths superscript", "bench {gpt2} --lengths ²", ("--lengths ²", "as 128,512")),
    Row("lengths empty", "bench {gpt2} --lengths ,", ("--lengths ,", "as 128,512")),
    Row("lengths zero", "bench {gpt2} --lengths 0", ("--lengths 0", "as 128,512")),
    Row("lengths of 400 digits", f"bench {{gpt2}} --lengths {'9' * 400}", ("as 128,512",)),
    Row("lengths twice", "bench {gpt2} --lengths 8,8", ("is repeated",)),
    Row("batches negative", "bench {gpt2} --batches -1", ("--batches -1", "as 128,512")),
    Row(
        "threads of bench that are words", "bench {gpt2} --threads 1,many", ("--threads 1,many", "numbers of at least")
    ),
    Row("threads of bench zero", "bench {gpt2} --threads 0", ("--threads 0", "as 128,512")),
    Row("plot of no known kind", "bench {gpt2} --plot {x.foo}", ("x.foo", ".png", ".svg"), code=2),
    Row("plot without a suffix", "bench {gpt2} --plot {x}", (".png", ".svg"), code=2),
    Row("plot into a folder", "bench {gpt2} --plot /", ("--plot", "/ ends in none of .png"), code=2),
    Row("markdown into a folder", "bench {gpt2} --markdown /", ("--markdown", "/ is a folder"), code=2),
    Row("bench of one model twice", "bench {gpt2} {gpt2}", ("given twice",)),
    Row("json into a folder", "analyze {model} --json /", ("--json", "/ is a folder"), code=2),
    Row("json of bench into a folder", "bench {gpt2} --json /", ("--json", "/ is a folder"), code=2),
    Row("json of eval into a folder", "eval {model} --data {text.raw} --json /", ("--json", "/ is a folder"), code=2),
    Row("json of ops into a folder", "ops --json /", ("--json", "/ is a folder"), code=2),
    Row("html into a folder", "analyze {model} --html /", ("--html", "/ is a folder"), code=2),
    Row("html of a report into a folder", "report {pruned} --html /", ("--html", "/ is a folder"), code=2),
    Row("json of a name of 300 characters", f"ops --json {{{'n' * 300}}}", ("too long", "Give another name"), code=2),
    Row(
        "out of a name of 300 characters",
        f"prune {{model}} --data {{text.raw}} --out {{{'n' * 300}}}",
        ("too long",),
        code=2,
    ),
    Row("out that is no text", f"{ONCE}".replace("{out}", "{a}"), ("not UTF-8", "rename it"), words={"a": "a\udcffb"}),
    Row("model that is no text", "analyze {a}", ("not UTF-8", "rename it"), words={"a": "a\udcffb"}),
    Row("out below a file", f"{ONCE}".replace("{out}", "{text.raw}/deeper"), ("is not a folder",), code=2),
    Row("the result needs a folder", "prune {model} --data {text.raw}", ("give --out",)),
    Row("out is the model", "prune {model} --data {text.raw} --out {model}", ("not made by mptk", "another --out")),
    Row("no such device", f"{ONCE} --device xpu:7", ("no device xpu:7",)),
    Row("no such command", "prune-it {model}", ("prune-it",), code=2),
    Row("no model", "prune --out {out}", ("model",), code=2),
    Row("an alias that does not exist", "fetch smollm9", ("smollm9", "there are")),
]

CONTRADICTIONS = [
    Row("no loss", f"{PRUNE} --steps 2 --lm 0 --kl 0 --hidden-loss 0", ("all three losses have weight 0", "--lm")),
    Row("quantize without onnx", f"{PRUNE} --quantize int8 --no-onnx", ("--quantize would do nothing", "--no-onnx")),
    Row("onnx dtype without onnx", f"{PRUNE} --onnx-dtype float16 --no-onnx", ("--onnx-dtype would do nothing",)),
    Row("logits without onnx", f"{PRUNE} --logits last --no-onnx", ("--logits would do nothing",)),
    Row("objective without onnx", f"{PRUNE} --objective prefill --no-onnx", ("--objective would do nothing",)),
    Row("quantize and float16", f"{PRUNE} --quantize int8 --onnx-dtype float16", ("needs a float32 graph",)),
    *(
        Row(
            f"plan with {option}",
            f"prune {{model}} --data {{text.raw}} --out {{out}} --plan {{pruned/plan.json}} {option} {value}".rstrip(),
            (f"{option} would do nothing", "--plan already says which units stay"),
        )
        for option, value in (
            ("--width", "ffn=8"),
            ("--families", "ffn"),
            ("--keep", "ffn"),
            ("--sparsity", "0.5"),
            ("--method", "wanda"),
            ("--budget", "flops"),
            ("--max-decode-ms", "5"),
            ("--rehome", ""),
            ("--reconstruct", ""),
            ("--distil-epochs", "1"),
        )
    ),
    Row(
        "plan with resume",
        "prune {model} --data {text.raw} --out {out} --plan {pruned/plan.json} --resume",
        ("--resume would do nothing", "leave it out"),
    ),
    Row(
        "plan with search",
        "prune {model} --data {text.raw} --out {out} --plan {pruned/plan.json} --search",
        ("--plan says which units stay, so --search has nothing to choose", "leave out one of both"),
    ),
    Row(
        "free layers with search",
        f"{PRUNE} --search --target graph --layers free",
        ("--search only ranks shapes whose layers are alike", "leave out --search or --layers free"),
    ),
    Row("search-tokens without search", f"{PRUNE} --search-tokens 5", ("--search-tokens would do nothing", "--search")),
    Row(
        "finalists of a search that trains none",
        f"{PRUNE} --search --search-tokens 0 --search-finalists 3",
        ("--search-finalists would do nothing", "--search-tokens"),
    ),
    Row(
        "finalists of shapes that trains none",
        "shapes {model} --data {text.raw} --tokens 0 --finalists 3",
        ("--finalists would do nothing", "--tokens"),
    ),
    Row("few tokens for a search", f"{PRUNE} --search --search-tokens 9", ("9 tokens are too few", "--batch")),
    Row("few tokens for shapes", "shapes {model} --data {text.raw} --tokens 9", ("9 tokens are too few", "--batch")),
    Row(
        "shapes resumed from nowhere",
        "shapes {model} --data {text.raw} --resume",
        ("--resume would do nothing", "give --out"),
    ),
    Row("rate of no distillation", f"{PRUNE} --distil-lr 0.1", ("--distil-lr would do nothing", "--distil-epochs")),
    Row("distillation without its start", f"{PRUNE} --distil-epochs 1 --no-reconstruct", ("leave out --no-reconstr",)),
    Row(
        "distillation where blocks alone go",
        f"{PRUNE} --families layers --sparsity 0.5 --distil-epochs 1",
        ("no cut block has", "leave out --distil-epochs"),
    ),
    Row(
        "distillation of no block",
        f"{PRUNE} --families hidden --sparsity 0.5 --distil-epochs 1",
        ("no cut block has",),
    ),
    Row("two latencies", f"{ONCE} --max-decode-ms 5 --max-prefill-ms 9", ("only one latency",)),
    Row("latency and sparsity", f"{ONCE} --max-decode-ms 5 --sparsity 0.5", ("--sparsity would do nothing",)),
    Row("latency and budget", f"{ONCE} --max-decode-ms 5 --budget flops", ("--budget would do nothing",)),
    Row("latency and objective", f"{ONCE} --max-decode-ms 5 --objective prefill", ("--objective would do nothing",)),
    Row("threads without latency", f"{ONCE} --threads 4", ("--threads would do nothing",)),
    Row("mask share of a one-shot method", f"{PRUNE} --mask-share 0.5", ("--mask-share would do nothing",)),
    *(
        Row(
            f"{option} without training",
            f"{PRUNE} {option} {value}".rstrip(),
            (f"{option} would do nothing", "--steps"),
        )
        for option, value in (
            ("--batch", "4"),
            ("--micro", "2"),
            ("--lr", "0.1"),
            ("--rank", "4"),
            ("--lm", "1"),
            ("--kl", "1"),
            ("--hidden-loss", "1"),
            ("--teacher", "cached"),
            ("--precision", "bf16"),
            ("--gradient-checkpointing", ""),
            ("--tracker", "tensorboard"),
            ("--save-every", "4"),
        )
    ),
    Row("teacher cache without a cached teacher", f"{ONCE} --steps 2 --teacher-cache {{t}}", ("add --teacher cached",)),
    Row("cached teacher and hidden states", f"{ONCE} --steps 2 --teacher cached --hidden-loss 1", ("--teacher live",)),
    Row("maskprune without steps", "prune {model} --data {text.raw} --out {out} --steps 0", ("learns in steps",)),
    Row(
        "experts of a model without any",
        "prune {model} --data {text.raw} --out {out} --families ffn --width ffn=16 --align 8 --method reap --length 16",
        ("none are in ffn", "--method wanda"),
    ),
    Row(
        "all weights beside cut norms",
        "prune {model} --data {text.raw} --out {out} --families hidden --width hidden=24 --method wanda --steps 2 --rank 0 --length 16",
        ("leave out --rank 0",),
    ),
    Row(
        "maskprune in fp16", "prune {model} --data {text.raw} --out {out} --precision fp16", ("--precision bf16 or no",)
    ),
    Row(
        "adapters of a graph",
        f"{ONCE} --steps 2 --target graph --rank 4",
        ("--rank: LoRA needs the layers", "leave it out"),
    ),
    Row("rehome for a graph", f"{ONCE} --target graph --rehome", ("--rehome would do nothing",)),
    Row("estimate and resume", f"{ONCE} --estimate --resume", ("--resume would do nothing",)),
    Row("recover without steps", "recover {pruned} --out {out} --steps 0", ("nothing to do",)),
    Row(
        "recover quantize without onnx", "recover {pruned} --out {out} --quantize int8 --no-onnx", ("would do nothing",)
    ),
    Row("sampling at temperature 0", "generate {gpt2} hello --top-k 5", ("--top-k would do nothing", "--temperature")),
    Row("seed at temperature 0", "generate {gpt2} hello --seed 5", ("--seed would do nothing",)),
    Row("chat without a template", "generate {gpt2} hello --chat", ("no chat template",)),
    Row("nothing to evaluate", "eval {model}", ("nothing to evaluate",)),
    Row("limit without tasks", "eval {model} --data {text.raw} --limit 5", ("--limit would do nothing",)),
    Row("length without data", "eval {model} --tasks x --length 9", ("--length would do nothing",)),
    Row("threads in torch", "eval {model} --data {text.raw} --threads 2", ("--threads would do nothing",)),
    Row("trust in onnx", "eval {gpt2} --data {text.raw} --runtime onnx --trust-remote-code", ("would do nothing",)),
    Row("tasks in onnx", "eval {gpt2} --runtime onnx --tasks x", ("lm-eval tasks run in torch",)),
    Row("text of an export without int4", "export {model} --out {out} --data {text.raw}", ("--data would do nothing",)),
    Row(
        "as many KV heads as before",
        f"{ONCE} --kv-heads 2",
        ("2 KV heads, which cannot become 2", "give one of 1"),
    ),
    Row("no KV heads", f"{ONCE} --kv-heads 0", ("--kv-heads",), code=2),
    Row(
        "heads in one weight",
        "prune {gpt2-dense} --kv-heads 1 --sparsity 0 --data {text.raw} --length 8 --eval-length 8 --out {out}",
        ("no KV heads to merge", "leave out --kv-heads"),
    ),
    Row(
        "fewer KV heads than asked for",
        f"{ONCE} --kv-heads 1 --sparsity 0.01",
        ("merging KV heads already removes", "--sparsity 0"),
    ),
    Row(
        "KV heads and a share of a latency",
        f"{ONCE} --kv-heads 1 --budget latency",
        ("--kv-heads changes the latency", "--max-decode-ms"),
    ),
    Row("show a pass without a plan", "show {model} --after rewrite", ("give both --after and --plan",)),
]

ROWS = [*NUMBERS, *REPEATED, *TEXTS, *CONTRADICTIONS]
