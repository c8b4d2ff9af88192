"""tokenizer: the fast tokenizer in a folder as fields of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase

from mptk.errors import MptkError, TargetError
from mptk.reading import Json

# The expressions of pre-tokenizers, letter by letter as tokenizer.json has them: llama.cpp knows each only by a name.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLIT_CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}", False): "qwen2",
    (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}", True): "llama-bpe",
    (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}", False): "dbrx",
    (SPLIT_CASES, True): "tekken",
}
"""How a tokenizer splits text, and whether it takes whole words of the vocabulary first → llama.cpp's name."""
SPACE = "▁"
"""A space in SentencePiece's vocabularies. llama.cpp reads user-defined tokens as text, so there it is a plain
space."""


def write_tokenizer(writer: GGUFWriter, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Write the vocabulary. Raises MptkError if llama.cpp has no such tokenizer.

    ``rows``: the length of the embedding table, whose last rows may have no token.
    """
    # 1. The tokens.
    spec = _read_spec(tokenizer)
    if spec["model"]["type"] != "BPE":
        raise _make_tokenizer_error(f"a vocabulary of type {spec['model']['type']}")
    tokens, types = _list_tokens(spec, rows)
    spaces = bool(spec["model"].get("byte_fallback"))
    # 2. How text becomes tokens: SentencePiece's kind by scores, the byte-level kind by merges and a way to split text.
    writer.add_tokenizer_model("llama" if spaces else "gpt2")
    writer.add_tokenizer_pre("default" if spaces else _name_splitting(spec))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if spaces:
        writer.add_token_scores(_compute_scores(spec, tokens))
    writer.add_add_space_prefix(_has_prefix_step(spec))
    # 3. Special tokens, merges and chat templates, which gguf reads from the folder. What is put around a text is seen
    # on one: a tokenizer's fields may say otherwise.
    special = SpecialVocab(folder, load_merges=not spaces, n_vocab=rows)
    ids = tokenizer("a").input_ids
    special.add_special_token = {
        "bos": ids[0] == tokenizer.bos_token_id,
        "eos": ids[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _read_spec(tokenizer: PreTrainedTokenizerBase) -> Json:
    """The fast tokenizer as transformers reads it: some classes read the same tokenizer.json otherwise."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _make_tokenizer_error("no fast form")
    spec: Json = json.loads(backend.to_str())
    return spec


def _list_tokens(spec: Json, rows: int) -> tuple[list[str], list[TokenType]]:
    """The token of each row, and its type. A token without a row, which some classes add, is left out.

    A row without a token is called ``[PADn]``, like in llama.cpp's converter.
    """
    added = {token["id"]: token for token in spec["added_tokens"]}
    words = {number: word for word, number in spec["model"]["vocab"].items()}
    words |= {number: token["content"] for number, token in added.items()}
    tokens, types = [words.get(number, f"[PAD{number}]") for number in range(rows)], []
    for number, word in enumerate(tokens):
        if number in added:
            types.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
            tokens[number] = word if added[number]["special"] else word.replace(SPACE, " ")
        elif number not in words:
            types.append(TokenType.UNUSED)
        else:
            is_byte = spec["model"].get("byte_fallback") and word.startswith("<0x") and len(word) == 6
            types.append(TokenType.BYTE if is_byte else TokenType.NORMAL)
        if word == spec["model"].get("unk_token"):
            types[-1] = TokenType.UNKNOWN
    return tokens, types


def _compute_scores(spec: Json, tokens: list[str]) -> list[float]:
    """Less for a token that is merged later."""
    merges: list[str | list[str]] = spec["model"]["merges"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _list_steps(spec: Json, name: str, inner: str) -> list[Json]:
    """The steps of a normalizer or of a pre-tokenizer."""
    part = spec.get(name)
    steps: list[Json] = [] if part is None else part.get(inner, [part])
    return steps


def _name_splitting(spec: Json) -> str:
    """llama.cpp's name for how the tokenizer splits text."""
    # llama.cpp does not normalise text. NFC changes few texts; any other step is refused.
    steps = _list_steps(spec, "pre_tokenizer", "pretokenizers")
    kinds = [step["type"] for step in steps]
    if odd := [step["type"] for step in _list_steps(spec, "normalizer", "normalizers") if step["type"] != "NFC"]:
        raise _make_tokenizer_error(f"a normalizer of type {odd[0]}")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        key = (steps[0]["pattern"].get("Regex", ""), bool(spec["model"].get("ignore_merges")))
        if key in SPLITS:
            return SPLITS[key]
    raise _make_tokenizer_error(f"a pre-tokenizer of type {', '.join(kinds) or 'none'} that mptk does not know")


def _has_prefix_step(spec: Json) -> bool:
    """Whether a space is put before the text."""
    steps = [*_list_steps(spec, "normalizer", "normalizers"), *_list_steps(spec, "pre_tokenizer", "pretokenizers")]
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "ByteLevel" and step["add_prefix_space"])
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _make_tokenizer_error(what: str) -> MptkError:
    return TargetError(
        f"the tokenizer has {what}; give the dense model's GGUF file by --like, which has llama.cpp's form",
        name="like",
    )
