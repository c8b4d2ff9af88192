"""command: the option ``--image`` of ``mptk generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptk.cli.app import extend_command
from mptk.cli.options import refuse
from mptk.cli.use import check_generation, open_generator, print_answers
from mptk.config import Settings
from mptk.errors import InputError


def check_image_options(model: str, prompts: list[str], temperature: float) -> None:
    """Check the options of ``generate --image``."""
    check_generation(model, temperature)
    refuse(("cut", "chat"), "a prompt with images stands whole in the processor's chat template; leave it out")
    if len(prompts) > 1:
        raise InputError("--image is for one prompt; give the others in calls of their own", name="image")


@extend_command("generate", after="chat", check=check_image_options)
def generate_after_images(
    model: str,
    prompts: list[str],
    settings: Settings,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image before the prompt (vision-language models); repeat it for several.", exists=True),
    ] = None,
) -> None:
    """Write text after a prompt with images."""
    from mptk.features.image_text.inputs import encode_image_prompt
    from mptk.ort.generation import Sampling

    runner = open_generator(model, settings)
    ids, images = encode_image_prompt(model, runner.decoder, prompts[0], image or [])
    print_answers(runner, prompts, [ids], max_new_tokens, Sampling(temperature, top_k, top_p), seed, images)
