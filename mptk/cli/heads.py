"""heads: the command that merges KV heads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from mptk.cli.app import command, show
from mptk.cli.console import err
from mptk.cli.options import Json, Model, Out, settings_from, with_settings, within
from mptk.cli.progress import stages

MERGED = "mptk-merged/1"
OPTIONS = ("data", "samples", "length", "seed", "memory", "device", "trust_remote_code")


@command("merge-heads", examples=("merge-heads smollm2-135m --kv-heads 1 --data c4.jsonl --out runs/merged",))
@with_settings(*OPTIONS)
def merge_heads(
    model: Model,
    folder: Out,
    kv_heads: Annotated[int, typer.Option(help="KV heads of each layer afterwards.", **within(1))],
    json_file: Json = None,
    **options: object,
) -> None:
    """Let more query heads share a KV head: the KV cache becomes smaller, no query head goes.

    Keys and values are merged in closed form. `prune` cuts the result further, as it does any model.
    """
    from mptk.driver.merging import merge_heads as merge

    with stages(err) as progress:
        merged = merge(model, folder, kv_heads, settings_from(options), progress=progress)
    row = {"format": MERGED, **asdict(merged), "folder": str(merged.folder), "proof": merged.proof.as_dict()}
    show(json_file, row, merged.text)
