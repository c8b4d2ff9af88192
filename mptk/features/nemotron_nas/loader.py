"""loader: a checkpoint folder of DeciLM as a model."""

from __future__ import annotations

from pathlib import Path

from mptk.io.loaders import Loader

OWN_CODE = Path(__file__).with_name("modeling_nemotron_nas.py")
"""The code that the target copies into folders."""


class NemotronNasLoader(Loader):
    """transformers reads such a folder once it knows the classes."""

    code = (OWN_CODE,)

    def register_classes(self) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        from mptk.features.nemotron_nas.modeling_nemotron_nas import DeciLMConfig, DeciLMForCausalLM

        AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig)
        AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM)


NEMOTRON_NAS = NemotronNasLoader()
