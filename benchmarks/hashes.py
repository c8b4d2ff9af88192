"""SHA-256 of plans and weights that ``mptk prune`` gives, so that a change of the code can be shown to change nothing.

    python -m benchmarks.hashes --json before.json
    python -m benchmarks.hashes --against before.json

Runs the command line alone, each method on a tiny Llama of random weights, and Wanda on SmolLM2-135M (``--tiny``: not).
The same machine, library versions and thread count give the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = ["--sparsity", "0.3", "--samples", "8", "--no-onnx"]
LEARNING = ["--steps", "6", "--batch", "2", "--micro", "2"]
TINY = ["--length", "32", "--align", "4"]
ROWS = {
    "tiny wanda": ["tiny", "--method", "wanda", *TINY],
    "tiny flap": ["tiny", "--method", "flap", *TINY],
    "tiny taylor": ["tiny", "--method", "taylor", *TINY],
    "tiny maskprune": ["tiny", "--method", "maskprune", *TINY, *LEARNING],
    "smollm2 wanda": ["smollm2-135m", "--method", "wanda", "--length", "128"],
}


def main() -> None:
    """Print a row for each run, and compare with ``--against``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="leave SmolLM2 out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    expected = json.loads(args.against.read_text()) if args.against else {}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(Path(folder) / "tiny")
        for name, row in ROWS.items():
            if args.tiny and not name.startswith("tiny"):
                continue
            found[name] = hashes(row, Path(folder))
            same = "" if name not in expected else "same" if expected[name] == found[name] else "DIFFERENT"
            print(name, *(f"{what} {digest[:16]}" for what, digest in found[name].items()), same, sep="  ", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(expected.get(name, row) != row for name, row in found.items()))


def write_tiny(folder: Path) -> None:
    """A Llama of two layers whose sizes all differ, with a tokenizer."""
    from mptk.testing import make_llama, make_tokenizer, save_model

    save_model(make_llama(), folder, make_tokenizer(begin=True))


def hashes(row: list[str], folder: Path) -> dict[str, str]:
    """Digests of what one ``mptk prune`` wrote."""
    model, *options = row
    source = str(folder / model) if model == "tiny" else model
    out = folder / "out" / "-".join(row[:3])
    command = [sys.executable, "-m", "mptk", "prune", source, *COMMON, *options, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    plan = json.dumps(json.loads((out / "plan.json").read_text())["families"], sort_keys=True)
    return {
        "plan": hashlib.sha256(plan.encode()).hexdigest(),
        "weights": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
    }


if __name__ == "__main__":
    main()
