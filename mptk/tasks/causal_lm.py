"""causal_lm: models that predict the next token from the tokens before it.

A model is recognised before weights are read, by classes that generate text. ``check`` then finds out whether its
logits depend on later tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.errors import MptkError
from mptk.io.evaluation import LogitsFn, Runs, perplexities
from mptk.io.models import Loaded
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.weights import Weights
from mptk.progress import Count, Progress
from mptk.run.chain import Prepared, Task
from mptk.run.settings import Settings
from mptk.run.values import Text
from mptk.tasks.decoder_onnx import export_decoder
from mptk.tasks.windows import calibration_windows, evaluation_windows


class CausalLM(Task):
    """A causal language model, with a KV cache or a state."""

    name = "causal-lm"
    summary = "decoder"
    causal = True

    def refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        name = min((c.__name__ for c in classes), default=type(config).__name__)
        if getattr(config, "is_encoder_decoder", False):
            return f"{name} has an encoder and a decoder"
        if classes and not any(c.can_generate() for c in classes):
            return f"{name} does not predict the next token"
        return None

    def check(self, loaded: Loaded, logits: LogitsFn) -> None:
        found = logits(torch.tensor([[1, 2], [1, 3]]))
        name = type(loaded.model).__name__
        vocabulary = getattr(loaded.model.config.get_text_config(), "vocab_size", 0)  # a model's own config may lack it
        if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[1] != 2 or found.shape[2] < vocabulary:
            raise wrong_kind(loaded.source, f"no {self.summary}: {name} gives no logits for every token")
        first = found[:, 0].float()
        if (first[0] - first[1]).abs().max() > 1e-3 * first.abs().max():
            raise wrong_kind(loaded.source, f"no {self.summary}: {name} looks at later tokens")

    def windows(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Tensor:
        return calibration_windows(loaded, settings, count, progress)

    def evaluation(self, loaded: Loaded, settings: Settings) -> Tensor:
        return evaluation_windows(loaded, settings, settings.eval_length)

    def loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")

    def predicted(self, ids: Tensor) -> int:
        return ids.shape[0] * (ids.shape[1] - 1)

    def logits(self, module: PreTrainedModel, ids: Tensor) -> Tensor:
        logits: Tensor = module(ids, use_cache=False).logits
        return logits

    def quality(self, runs: Runs, text: Text, progress: Progress) -> dict[str, float | str]:
        return perplexities(runs, text.evaluation, data=text.source, progress=partial(progress, "perplexity"))

    def export(self, prepared: Prepared, plan: Plan, state: Weights, text: Tensor, folder: Path, log: Log) -> None:
        settings, loaded, executor = prepared.settings, prepared.loaded, prepared.executor
        dense = prepared.analysis.program.with_state(state)
        export_decoder(
            loaded.model,
            folder,
            {"source": loaded.source},
            plan=plan,
            logits=settings.logits,
            quantize=settings.quantize,
            text=text,
            objective=settings.objective,
            onnx_dtype=settings.onnx_dtype,
            log=log,
            dtype=prepared.dtype,
            weights=lambda program: loaded.with_weights(program).with_state(state),
            dense=lambda ids: next(executor.outputs([dense], [(ids,)])),
            executor=executor,
        )


def wrong_kind(model: str, what: str) -> MptkError:
    """The error for a model that no task takes. ``what``: what it is not, and why."""
    return MptkError(
        f"{model} is {what}; `mptk analyze` shows what can be cut in it, and mptk.rewrite cuts it in Python"
    )
