"""loader: a model of diffusers as a model: a part of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mptk.io.loaders import Loader
from mptk.trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PIPELINE = "model_index.json"
CLASS_NAME = "_class_name"
"""The field of a config that names its class."""


class DiffusersLoader(Loader):
    """A folder whose config names a class of diffusers."""

    priority = 10  # above quantised checkpoints: a quantised part is refused
    library = "diffusers"
    config_fields = (CLASS_NAME,)

    def takes(self, folder: Path) -> bool:
        from mptk.features.diffusers.parts import is_part

        return is_part(folder)

    def explain_folder(self, model: str, folder: Path) -> str:
        if not (folder / PIPELINE).is_file():
            return ""
        from mptk.features.diffusers.parts import list_model_parts

        # A pipeline has a config in the folder of each part.
        named = ", ".join(f"{model}/{part}" for part in list_model_parts(folder))
        return f"{model} is a whole pipeline; give one of its parts: {named}"

    def read_config(self, path: Path, trust: Trust) -> PreTrainedConfig:
        from mptk.features.diffusers.parts import read_part_config

        return read_part_config(path)

    def list_other_files(self, folder: Path) -> Mapping[str, Path]:
        from mptk.features.diffusers.parts import list_pipeline_files

        return list_pipeline_files(folder)

    def name_whole_class(self, folder: Path) -> str:
        return "DiffusionPipeline" if (folder / PIPELINE).is_file() else ""

    def find_class(self, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
        from mptk.features.diffusers.parts import DiffusersConfig, find_diffusers_class

        return find_diffusers_class(config) if isinstance(config, DiffusersConfig) else None


DIFFUSERS = DiffusersLoader()
