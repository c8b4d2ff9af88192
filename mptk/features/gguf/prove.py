"""prove: prove a GGUF file against the folder that it was made from, when it is written and again by ``verify``.

mptk itself compares fields and tensors (``check.py``). If llama.cpp can be imported, it must also
compute the folder's logits and read text like the folder's tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn
from transformers import PreTrainedConfig

from mptk.compile.cut import open_pruned_weights
from mptk.errors import FileError, InputError, ProofError
from mptk.features.gguf import GgufType
from mptk.features.gguf.architectures import GELU, find_ignored_window
from mptk.features.gguf.check import TEXTS, WRITE_AGAIN, GgufFile
from mptk.features.gguf.folder import GgufFolder, Pattern
from mptk.features.gguf.llama_cpp import has_llama_cpp, log_probabilities
from mptk.features.gguf.weights import write_floats
from mptk.files import expand_path, make_scratch
from mptk.io import measure_free_memory, models
from mptk.ir import Plan
from mptk.protocols import Prover, Report
from mptk.publish.manifest import check_manifest
from mptk.report.runs import name_pruned
from mptk.targets.graph import GraphTarget
from mptk.trust import NO_CODE
from passes.verify import Difference

LOGITS_STAGE, TEXT_STAGE = "llama.cpp logits", "llama.cpp reads text"
PROMPT_TOKENS = 24
"""Tokens of the prompt whose logits are compared: enough for positions to matter, and below every window."""
MOST_TOKENS = 200
"""Most tokens of a text to read; longer ones do not fit llama.cpp's context (``llama_cpp.py``)."""
LIKELIEST = 50
"""Next tokens that are compared after each prompt."""
CLOSE, ROUNDED = 1e-3, 1e-2
"""Largest difference of a log probability, as a share of the largest; the second if llama.cpp computes the activation
by a table of half precision."""
SAME = 1e-5
"""The same for two runs of llama.cpp on the same tokens."""


MAGIC = b"GGUF"
"""The first bytes of a file."""


class GgufProver(Prover):
    """Compares a file with its folder, and asks llama.cpp."""

    kind = "GGUF"

    def takes(self, path: Path) -> bool:
        """Whether a path is named like a GGUF file, or the file begins like one."""
        if path.suffix.lower() == ".gguf":
            return not path.is_dir()
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def prove(
        self, file: Path, like: str | Path | None, model: str | Path | nn.Module | None
    ) -> tuple[list[Difference], list[str]]:
        """``model``: the dense model's GGUF file, if the file was written with it."""
        if not file.is_file():
            raise FileError(f"there is no file {file}; check the path", name=file)
        if like is None:
            raise InputError(
                f"{file} is a GGUF file, which is proven against the folder that it was made from; add --like DIR",
                name="like",
            )
        if isinstance(model, nn.Module):
            raise InputError("the dense model of a GGUF file is a GGUF file, too; give its path", name="model")
        made = open_folder(like, model)
        differences = made.check(file)
        more, notes = run_llama_cpp(made, file)
        return [*differences, *more], [*made.notes, *notes]


PROVER = GgufProver()


def open_folder(folder: str | Path, like: str | Path | None, kind: GgufType = "auto") -> GgufFolder:
    """What a pruned folder's GGUF file must hold. ``like``: the dense model's GGUF file, or its packaged alias.

    Raises:
        MptkError: ``folder`` or ``like`` cannot be read; they do not belong to one model; or llama.cpp cannot compute
            it.
    """
    # The pattern is the dense model's file: its fields are taken over, except those of its weights and layers.
    place, pattern = expand_path(folder), None if like is None else models.locate(str(like))
    if pattern is not None and pattern.is_dir():
        raise FileError(f"{like} is not a GGUF file; give the .gguf file of the dense model", name=like)
    report = Report.read(place if place.exists() else folder)
    check_manifest(place)
    # A graph has no config. No code of the model runs: only its config class and its tensors are read.
    config = None if GraphTarget().has_written(place) else models.load_config(str(place))
    return GgufFolder(
        place,
        open_pruned_weights(place, trust=NO_CODE),
        Plan.load(place / "plan.json"),
        config,
        None if pattern is None else Pattern(pattern),
        kind,
        name_pruned(report),
    )


def run_llama_cpp(made: GgufFolder, file: Path) -> tuple[list[Difference], list[str]]:
    """The differences of what llama.cpp computes of ``file``, and notes on what could not be compared.

    The logits are of the file's fields with the folder's weights in float32, whatever the type of its matrices, so that
    rounding hides nothing; each tensor was compared before.

    Raises:
        ProofError: llama.cpp does not read the file, or computes or reads something else.
    """
    if not has_llama_cpp():
        return [], ["llama.cpp was not asked, as it is not installed; run: pip install 'mptk[llama-cpp]'"]
    # How it reads text, which needs no logits of the folder and so little memory.
    found, notes = list[Difference](), list[str]()
    if made.tokenizer is not None:
        found.append(_compare_reading(made, file))
    if made.config is None or not models.has_tokenizer(made.place):
        return found, [*notes, "llama.cpp's logits were not compared, as the folder has no config and tokenizer"]
    # Its logits, if float32 weights fit twice: 4 bytes in llama.cpp and 4 in transformers.
    needed = 8 * sum(like.numel() for like in made.weights.tensors.likes.values())
    if needed > measure_free_memory():
        return found, [*notes, f"llama.cpp's logits were not compared, which needs {needed / 1e9:.1f} GB of memory"]
    with make_scratch() as place:
        # A file of narrower matrices is copied with the folder's float32 weights under its own fields.
        if (read := GgufFile(file)).common is not Kind.F32:
            copy = place.folder / file.name
            write_floats(copy, made.weights, read.fields)
            file = copy
        found.append(_compare_logits(made, made.config, file))
    return found, notes


def _compare_logits(made: GgufFolder, config: PreTrainedConfig, file: Path) -> Difference:
    # Below the model's positions, and below a window that llama.cpp ignores: beyond it the logits differ rightly.
    longest = min(
        filter(None, (PROMPT_TOKENS, config.max_position_embeddings - 1, find_ignored_window(config, made.base)))
    )
    ids = torch.randint(made.weights.table[0], (longest,), generator=torch.Generator().manual_seed(0))
    (found,) = _ask(made, file, [ids.tolist()])
    model = models.load_whole(str(made.place)).model
    with torch.no_grad():
        expected = model(ids[None]).logits[0, -1].log_softmax(-1)
    wanted = torch.tensor([float(expected[token]) for token in found])  # llama.cpp says which tokens are likeliest
    difference = _measure_apart(
        LOGITS_STAGE, torch.tensor(list(found.values())), wanted, ROUNDED if made.base.activations is GELU else CLOSE
    )
    if not difference.ok:
        raise ProofError(
            f"the proof fails: llama.cpp computes other logits of {file.name} than transformers of the folder, by "
            f"{difference.max_abs:.2g}; {WRITE_AGAIN}",
            name=file.name,
        )
    return difference


def _compare_reading(made: GgufFolder, file: Path) -> Difference:
    """llama.cpp must predict the same after a text as after the tokens that the folder's tokenizer makes of it."""
    assert made.tokenizer is not None
    pairs = [(text, made.tokenizer(text).input_ids) for text in TEXTS]
    room = MOST_TOKENS if made.config is None else min(MOST_TOKENS, made.config.max_position_embeddings)
    pairs = [(text, ids) for text, ids in pairs if len(ids) < room]
    # One start of llama.cpp for all prompts: text, ids, text, ids, …
    found = _ask(made, file, [prompt for pair in pairs for prompt in pair])
    worst = Difference(TEXT_STAGE, 0.0, 0.0, SAME)
    for (text, _), one, other in zip(pairs, found[::2], found[1::2], strict=True):
        numbers = torch.tensor([one.get(token, -torch.inf) for token in other])
        difference = _measure_apart(TEXT_STAGE, numbers, torch.tensor(list(other.values())), SAME)
        if not difference.ok:
            raise ProofError(
                f"the proof fails: llama.cpp reads {text!r} otherwise than the folder's tokenizer; {WRITE_AGAIN}",
                name="tokenizer",
            )
        worst = max(worst, difference, key=lambda each: each.relative)
    return worst


def _ask(made: GgufFolder, file: Path, prompts: list[list[int] | str]) -> list[dict[int, float]]:
    # llama.cpp is made to write this token: it reports no probabilities for half of a letter.
    tokenizer = made.tokenizer or models.load_tokenizer(str(made.place))
    written = tokenizer("a", add_special_tokens=False).input_ids[-1]
    answer = log_probabilities(file, prompts, written, LIKELIEST)
    if isinstance(answer, str):
        raise ProofError(
            f"the proof fails: llama.cpp does not run {file.name} ({answer}); {WRITE_AGAIN}", name=file.name
        )
    return answer


def _measure_apart(stage: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Difference:
    apart = float((found - expected).abs().max())
    return Difference(stage, apart, apart / float(expected.abs().max()), tolerance)
