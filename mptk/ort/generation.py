"""generation: generate tokens with a decoder in ONNX Runtime, greedy or sampled, one step at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mptk.errors import FileError, InputError
from mptk.io import ChatTemplate, find_position_limit, models
from mptk.ort.decoder import LogitsArray, OrtDecoder, TokensArray
from mptk.ort.graph_files import find_model_folder
from mptk.ort.sessions import CPU

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    ``temperature`` 0: the likeliest token. Above 0: a sample from softmax(logits / temperature) over the ``top_k``
    likeliest tokens (0: all), reduced to the fewest whose probability reaches ``top_p`` (nucleus sampling, Holtzman et
    al. 2020).
    """

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise InputError(
                "sampling needs a temperature and a top_k of 0 or more, and a top_p above 0, at most 1",
                name="temperature",
            )

    def choose(self, logits: LogitsArray, rng: np.random.Generator) -> TokenIds:
        """The next token of each row of ``logits``, [batch, vocab]."""
        if not self.temperature:
            return np.asarray(logits.argmax(axis=1))
        return np.array([self._draw(row, rng) for row in logits])

    def _draw(self, logits: npt.NDArray[np.float32], rng: np.random.Generator) -> int:
        # The ``top_k`` largest, in order, without sorting the vocabulary.
        count = min(self.top_k or len(logits), len(logits))
        best = np.argpartition(logits, -count)[-count:]
        best = best[np.argsort(-logits[best], kind="stable")]
        scaled = logits[best].astype(np.float64) / self.temperature
        share = np.exp(scaled - scaled[0])
        share /= share.sum()
        # The nucleus: the token that reaches ``top_p`` still belongs to it.
        kept = 1 + int(np.searchsorted(share.cumsum(), self.top_p)) if self.top_p < 1 else count
        share = share[:kept] / share[:kept].sum()
        return int(best[rng.choice(len(share), p=share)])


@dataclass(frozen=True)
class PromptImages:
    """The images of a prompt. ``inputs``: of the vision encoder by name.

    ``positions``: of the prompt's tokens, int64 [axes, 1, length], if the decoder's have several axes.
    """

    inputs: Mapping[str, Tensor]
    positions: TokenIds | None = None

    def find_positions(self, step: int) -> TokenIds | None:
        """The positions of the token that is written in a step, [axes, 1, 1]."""
        if self.positions is None:
            return None
        return np.full((len(self.positions), 1, 1), self.positions.max() + 1 + step)


def generate_tokens(
    decoder: OrtDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    stop: Collection[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    images: PromptImages | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, step by step; None for a prompt that has ended.

    Shorter prompts are padded on the left, which does not change their tokens.

    Args:
        decoder: the model.
        prompts: token ids, at least one for each prompt.
        limit: most new tokens of a prompt.
        stop: tokens that end a sequence. They are yielded, too.
        sampling: greedy if None.
        seed: seed of the sampling.
        images: the images of the only prompt.

    Raises:
        MptkError: a prompt is empty; or it has another number of tokens for images than these become.
    """
    if not prompts or not all(map(len, prompts)):
        raise InputError("an empty prompt has no next token; give some text", name="prompts")
    # Pad on the left with any token: the mask hides it.
    chooser, rng = sampling or Sampling(), np.random.default_rng(seed)
    width = max(map(len, prompts))
    ids = np.array([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts], dtype=np.int64)
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=np.int64)
    ended = np.zeros(len(prompts), dtype=bool)
    logits, cache = decoder.prefill(*_read(decoder, ids, mask, images))
    for step in range(limit):
        tokens = chooser.choose(logits[:, -1], rng)
        yield [None if end else int(token) for token, end in zip(tokens, ended, strict=True)]
        # A row that has ended goes on with the others, and what it gives is not shown.
        ended |= np.array([int(token) in stop for token in tokens])
        if ended.all() or step + 1 == limit:
            return
        logits, cache = decoder.decode(tokens[:, None], cache, None if images is None else images.find_positions(step))


def _read(
    decoder: OrtDecoder, ids: TokenIds, mask: TokenIds, images: PromptImages | None
) -> tuple[TokensArray, TokenIds, TokenIds | None]:
    """What a decoder reads of prompts: tokens, or embeddings if there are images; mask; positions."""
    if images is None:
        return ids, mask, None
    assert decoder.embeddings is not None
    return decoder.embeddings(torch.from_numpy(ids), images.inputs).numpy(), mask, images.positions


@dataclass(frozen=True)
class Speed:
    """``first_s``: seconds to the first token. ``rate``: tokens a second after it, over all prompts."""

    prompt_tokens: int
    new_tokens: int
    first_s: float
    rate: float


class TextGenerator:
    """A decoder and the tokenizer of its folder.

    Args:
        path: the ``--out`` folder of ``prune`` or ``export``, or an ``.onnx`` file in it.
        threads: threads of one operator; 0: one for each core.
        device: see ``OrtDecoder``.

    Raises:
        MptkError: there is no decoder, or no tokenizer beside it.
    """

    def __init__(self, path: str | Path, *, threads: int = 0, device: torch.device = CPU) -> None:
        self.decoder = OrtDecoder(path, threads=threads, device=device)
        folder = find_model_folder(path)
        self.tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(str(folder))
        self.positions = find_position_limit(models.load_config(str(folder)))
        self.stop = stop_tokens(folder, self.tokenizer)

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise MptkError if a token id is outside the graph's vocabulary."""
        largest, size = max(ids, default=0), self.decoder.vocabulary
        if size is not None and largest >= size:
            raise FileError(
                f"the tokenizer gives token {largest}, and the graph's vocabulary has {size}; give the tokenizer files "
                "that belong to the model",
                name="tokenizer",
            )

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        limit: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        images: PromptImages | None = None,
    ) -> Iterator[list[int | None]]:
        """As ``generate_tokens``, with the model's own end tokens. At the end it sets ``speed``.

        Raises:
            MptkError: as ``generate_tokens``; a token is outside the vocabulary; or a prompt and the tokens to be
                written have more tokens than the model has positions (``fit_prompts`` cuts them).
        """
        if all(map(len, prompts)):  # of an empty prompt, ``generate_tokens`` says more
            check_room(self.positions, prompts, limit)
        self.check_ids(token for prompt in prompts for token in prompt)
        began = time.perf_counter()
        first, count = 0.0, 0
        steps = generate_tokens(
            self.decoder, prompts, limit=limit, stop=self.stop, sampling=sampling, seed=seed, images=images
        )
        for tokens in steps:
            first = first or time.perf_counter() - began
            count += sum(token is not None for token in tokens)
            yield tokens
        # The first token of each prompt belongs to the prefill. With one token each there is no rate.
        rest = time.perf_counter() - began - first
        after = count - len(prompts)
        self.speed = Speed(sum(map(len, prompts)), count, first, after / rest if after > 0 else 0.0)


def check_room(positions: int | None, prompts: Sequence[Sequence[int]], limit: int) -> None:
    """Raise MptkError if a model's ``positions`` do not hold each prompt and ``limit`` tokens after it."""
    longest = max(map(len, prompts), default=0)
    if positions is None or longest + limit <= positions:
        return
    if longest >= positions:
        raise InputError(
            f"the prompt has {longest} tokens and the model {positions} positions; give a shorter one, or --cut "
            "(which reads only its end)",
            name="prompts",
        )
    raise InputError(
        f"the model has {positions} positions, and a prompt of {longest} tokens leaves {positions - longest} of them; "
        f"give --max-new-tokens {positions - longest}, or --cut",
        name="max_new_tokens",
        nearest=(positions - longest,),
    )


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """Token ids of each prompt, in the model's chat template if ``chat``."""
    if not chat:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template, as of a base model, which continues a text and answers no questions; "
            "leave out --chat, or take an instruct model",
            name="chat",
        )
    with ChatTemplate(tokenizer) as template:
        chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
        return [template.encode(turns, "the prompt", "leave out --chat", add_generation_prompt=True) for turns in chats]


def fit_prompts(positions: int | None, prompts: Sequence[list[int]], limit: int) -> tuple[list[list[int]], int]:
    """The prompts and the number of new tokens that a model's positions hold.

    The start of a prompt goes first, as far as half of the positions are left to it; then new tokens are fewer.
    """
    if positions is None:
        return list(prompts), limit
    # As many tokens of a prompt as leave room for ``limit``, but at least half of the positions.
    most = max(positions // 2, positions - limit)
    cut = [prompt[-most:] for prompt in prompts]
    return cut, min(limit, positions - max(map(len, cut), default=0))


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End tokens of the folder's generation config, else of its tokenizer."""
    found: int | list[int] | None = None
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return set(found) if isinstance(found, list) else {found} - {None}
