"""command: ``mptk gguf``, and what ``mptk verify`` does with a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from mptk.cli.app import extend_command, register_command
from mptk.cli.console import out
from mptk.cli.options import DenseOption, Overwrite, make_choice_arguments, make_file_option
from mptk.cli.verify import show_proof
from mptk.config import Choices, Settings
from mptk.features.gguf import GgufType

GGUF_TYPES = make_choice_arguments(Choices(get_args(GgufType)))


@register_command("gguf", examples=("gguf runs/m30 --type q8_0 --out runs/m30.gguf",))
def write_gguf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out folder of `prune` or `recover`.")],
    file: Annotated[Path, make_file_option("The file to write.", "GGUF", ".gguf", flag="--out")],
    like: Annotated[
        str | None, typer.Option(metavar="FILE", help="The dense model's GGUF file, or its packaged alias.")
    ] = None,
    type: Annotated[
        GgufType, typer.Option(help="Type of the matrices; auto: as the folder has them.", **GGUF_TYPES)
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a pruned model as a GGUF file for llama.cpp. Layers of a LLaMA model may differ in width."""
    from mptk.features.gguf import api

    # Widths that are equal in all layers are named once.
    made = api.gguf(folder, file, like=like, type=type, overwrite=overwrite)
    each = {
        "query heads": [x.heads for x in made.layers],
        "KV heads": [x.groups for x in made.layers],
        "ffn": [x.ffn for x in made.layers],
        "experts": [x.experts for x in made.layers],
    }
    widths = ", ".join(f"{name} {n[0] if len(set(n)) == 1 else n}" for name, n in each.items() if any(n))
    written = f"written to {file}: {len(made.layers)} layers, {widths}"
    out.print(written, *made.notes, sep="\n", soft_wrap=True, highlight=False)


@extend_command(
    "verify",
    after="model",
    examples=("verify runs/m30.gguf --like runs/m30",),
    about=(
        "A GGUF file is compared with its folder: each field, each tensor and, if llama.cpp is installed, its logits."
    ),
)
def verify_file(
    folder: Path,
    settings: Settings,
    model: DenseOption = None,
    like: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For a GGUF file: the folder that it was made from.")
    ] = None,
) -> None:
    """Prove a GGUF file against a folder."""
    show_proof(folder, settings, model, like)
