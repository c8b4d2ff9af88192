"""Trimmed tokenizers: texts whose tokens all stay are read as before, and other texts can still be read."""

from __future__ import annotations

import itertools
import json
import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mptk.errors import ModelError
from mptk.features.vocabulary.convert import (
    Choice,
    Merges,
    check_trimmed_reading,
    find_named_ids,
    find_used_ids,
    replace_config_ids,
    trim_content,
    trim_tokenizer,
)
from mptk.testing import expect_error

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]
RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices("abcdeé", [5, 4, 3, 2, 1, 1], k=RANDOM.randint(1, 9))) for _ in range(400)]
CORPUS, *OTHERS = [" ".join(RANDOM.choices(WORDS, k=n)) for n in [120, *[40] * 57]]
OTHERS.append(" ".join("".join(RANDOM.choices("abfgh", k=5)) for _ in range(40)))  # letters that the corpus has not
TEXT = [CORPUS, *OTHERS]


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def trained(model, pre, trainer, **parts) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(TEXT, trainer)
    return backend


def byte_level() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=SPECIAL, initial_alphabet=alphabet)
    return trained(models.BPE(), pre_tokenizers.ByteLevel(), trainer, decoder=decoders.ByteLevel())


def bpe(**options) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, **options)
    return trained(models.BPE(unk_token="<unk>", **options), pre_tokenizers.Whitespace(), trainer)


def changed(backend: Tokenizer, **model) -> Tokenizer:
    content = json.loads(backend.to_str())
    content["model"].update(model)
    return Tokenizer.from_str(json.dumps(content))


def every_way() -> Tokenizer:
    """Merges for all ways to make each token, and whole words first, as in Llama 3."""
    model = json.loads(byte_level().to_str())["model"]
    vocab = model["vocab"]
    ways = [[t[:i], t[i:]] for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    return changed(byte_level(), merges=[pair for pair in ways if "".join(pair) not in SPECIAL], ignore_merges=True)


def byte_fallback() -> Tokenizer:
    backend = bpe()
    model = json.loads(backend.to_str())["model"]
    more = {f"<0x{i:02X}>": len(model["vocab"]) + i for i in range(256)}
    found = changed(backend, vocab={**model["vocab"], **more}, byte_fallback=True)
    found.decoder = decoders.ByteFallback()
    return found


def wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)
    backend = trained(
        models.WordPiece(unk_token="<unk>"), pre_tokenizers.Whitespace(), trainer, normalizer=normalizers.Lowercase()
    )
    ends = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return backend


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    return trained(models.Unigram(), pre_tokenizers.Metaspace(), trainer, decoder=decoders.Metaspace())


def word_level() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL)
    return trained(models.WordLevel(unk_token="<unk>"), pre_tokenizers.Whitespace(), trainer)


KINDS = {
    "byte level": byte_level,
    "every way": every_way,
    "end of word": lambda: bpe(end_of_word_suffix="</w>"),
    "inside a word": lambda: bpe(continuing_subword_prefix="##"),
    "byte fallback": byte_fallback,
    "WordPiece": wordpiece,
    "Unigram": unigram,
    "WordLevel": word_level,
}


@pytest.fixture(params=KINDS, scope="module")
def pair(request):
    """A tokenizer, the tokens that stay of it for the corpus, and what is made of it."""
    dense = wrapped(KINDS[request.param]())
    kept = Choice(dense, len(dense)).list_kept(find_used_ids([[CORPUS]], dense), 16, 1)
    return dense, kept, trim_tokenizer(dense, kept)


def test_texts_of_tokens_that_stay_are_read_as_before(pair):
    (dense, kept, small), draw = pair, random.Random(1)
    new = {old: i for i, old in enumerate(kept)}
    assert 0.1 * len(dense) < len(kept) < 0.9 * len(dense)
    words = [word for word in WORDS if {*dense(word).input_ids} <= new.keys()]
    texts = [CORPUS, *words, *(" ".join(draw.sample(words, 9)) for _ in range(200))]
    texts = [text for text in texts if {*dense(text).input_ids} <= new.keys()]
    assert len(texts) > 100
    for text in texts:
        assert small(text).input_ids == [new[i] for i in dense(text).input_ids], text
        assert small.decode(small(text).input_ids) == dense.decode(dense(text).input_ids)
    check_trimmed_reading(([text] for text in texts), dense, small, kept)


def test_special_tokens_keep_their_meaning_and_other_texts_are_spelled_with_what_stays(pair):
    dense, kept, small = pair
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert kept[getattr(small, name)] == getattr(dense, name)
    assert small.all_special_tokens == dense.all_special_tokens
    assert [kept[i] for i in small("<s>").input_ids] == dense("<s>").input_ids
    if isinstance(dense.backend_tokenizer.model, models.WordLevel):
        return  # a word that went is unknown
    for text in OTHERS:
        assert max(small(text).input_ids) < len(kept)
        assert small.unk_token_id not in small(text).input_ids
    assert any(len(small(text).input_ids) > len(dense(text).input_ids) for text in OTHERS)
    for text in ("ß 猫!", "\x00 ÿ"):
        assert small.decode(small(text).input_ids) == dense.decode(dense(text).input_ids)


def test_merges_lead_where_the_tokenizer_goes():
    """Every token but single characters is built of others, and these of others again, down to characters."""
    for make in (byte_level, every_way, KINDS["end of word"], KINDS["inside a word"]):
        model = json.loads(make().to_str())["model"]
        merges = Merges(model)
        for token in model["vocab"].keys() - set(SPECIAL):
            for part in merges.find_intermediates(token):
                assert merges.find_intermediates(part) <= merges.find_intermediates(token)
        assert sum(bool(merges.find_intermediates(token)) for token in model["vocab"]) >= len(model["vocab"]) - 280


def test_tokens_fill_up_to_a_multiple_from_the_lowest_ids():
    backend = byte_level()
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    backwards = [*SPECIAL, *reversed(tokens[len(SPECIAL) :])]  # long tokens have the lowest ids
    dense = wrapped(changed(backend, vocab={token: i for i, token in enumerate(backwards)}))
    choice, used = Choice(dense, len(dense)), find_used_ids([[CORPUS[:200]]], dense)
    few, more = choice.list_kept(used, 16, 1), choice.list_kept(used, 16, 64)
    assert len(more) % 64 == 0
    assert set(few) < set(more)
    merges = Merges(json.loads(dense.backend_tokenizer.to_str())["model"])
    there = set(dense.convert_ids_to_tokens(more))
    assert all(merges.find_intermediates(token) <= there for token in there)
    assert choice.list_kept(range(len(dense)), 16, 512) == tuple(range(len(dense)))
    rows = Choice(dense, len(dense) + 30)  # rows without a token come last
    assert rows.list_kept(range(len(dense)), 16, len(dense) + 10) == tuple(range(len(dense) + 10))


def test_the_unlikeliest_piece_stays_for_the_cost_of_what_is_unknown():
    """Without it an unknown character would cost less, and be taken where a text was read in known pieces."""
    pieces = [("<unk>", 0.0), ("x", -4.0), ("y", -20.0), ("xy", -5.0), ("yz", -9.0), ("qq", -30.0)]
    dense = wrapped(Tokenizer(models.Unigram(pieces, unk_id=0)))
    kept = Choice(dense, len(dense)).list_kept([1, 4], 1, 1)
    assert dense.convert_tokens_to_ids("qq") in kept


def test_ids_of_templates_and_padding_are_renumbered():
    backend = wordpiece()
    backend.add_special_tokens(["<last>"])
    last = backend.token_to_id("<last>")
    backend.post_processor = processors.BertProcessing(("<last>", last), ("<s>", 0))
    backend.enable_padding(pad_id=last, pad_token="<last>")
    small = trim_content(json.loads(backend.to_str()), {0: 0, 1: 1, 2: 2, 3: 3, 9: 4, last: 5})
    assert small["post_processor"]["sep"] == ["<last>", 5]
    assert small["padding"]["pad_id"] == small["added_tokens"][-1]["id"] == 5
    assert sorted(small["model"]["vocab"].values()) == [0, 1, 2, 3, 4]
    backend.post_processor = processors.TemplateProcessing("$A <last>", special_tokens=[("<last>", last)])
    small = trim_content(json.loads(backend.to_str()), {0: 0, 1: 1, 2: 2, 3: 3, 9: 4, last: 5})
    assert small["post_processor"]["special_tokens"]["<last>"]["ids"] == [5]


def test_ids_in_configs_are_renumbered():
    from transformers import BartConfig, GenerationConfig

    new = {0: 0, 2: 1, 5: 2, 9: 3}
    config = BartConfig(
        vocab_size=12, pad_token_id=0, bos_token_id=2, eos_token_id=5, decoder_start_token_id=9, forced_eos_token_id=5
    )
    assert find_named_ids(config, 12) == {0, 2, 5, 9}
    made, changes = replace_config_ids(config, new, 12)
    assert (made.vocab_size, made.pad_token_id, made.bos_token_id, made.eos_token_id) == (4, 0, 1, 2)
    assert (made.decoder_start_token_id, made.forced_eos_token_id) == (3, 2)
    assert changes["decoder_start_token_id"] == [9, 3]
    assert config.vocab_size == 12
    generation = GenerationConfig(
        eos_token_id=[5, 9], pad_token_id=-1, suppress_tokens=[1, 2], bad_words_ids=[[2, 5], [3]]
    )
    assert find_named_ids(generation, 12) == {5, 9}
    made, _ = replace_config_ids(generation, new, 12)
    assert (made.eos_token_id, made.pad_token_id) == ([2, 3], -1)
    assert (made.suppress_tokens, made.bad_words_ids) == ([1], [[1, 2]])


def test_what_cannot_be_trimmed_is_refused():
    with expect_error(ModelError, name="SimpleNamespace"):
        Choice(SimpleNamespace(), 9)
    dense = wrapped(byte_level())
    with expect_error(ModelError, name=dense.convert_ids_to_tokens(len(dense) - 1)):
        Choice(dense, len(dense) - 1)
    with expect_error(ModelError, name="dropout"):
        Choice(wrapped(changed(byte_level(), dropout=0.1)), 999)
    kept = Choice(dense, len(dense)).list_kept(find_used_ids([[CORPUS]], dense), 16, 1)
    small = trim_tokenizer(dense, kept)
    gone = next(text for text in itertools.chain(OTHERS) if not {*dense(text).input_ids} <= {*kept})
    with expect_error(ModelError, name=type(dense).__name__):
        check_trimmed_reading([[gone]], dense, small, kept)
