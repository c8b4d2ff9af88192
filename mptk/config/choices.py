"""choices: the values that settings may have, and defaults that more than one setting names."""

from __future__ import annotations

from mptk.config.setting import Choices
from mptk.ir import ENGINES, FORMS

IN_MEMORY = "samples given in Python"
"""What settings and reports call samples that were given in memory."""
INPUTS = ".safetensors"
"""Suffix of a file of inputs. It holds only tensors, unlike a pickle, which may run code."""
UNIFORM, FREE = LAYERS = ("uniform", "free")
"""Whether all cut layers share their widths, or each has its own."""
# Names, not the objects that they name: settings import no library, and methods and targets import torch. A test
# compares them with what there is.
ONE_SHOT = ("random", "magnitude", "wanda", "flap", "reap", "fisher", "taylor", "influence", "greedy")
"""The methods that score units and learn no masks. What is trained after them is only what ``--steps`` asks for."""
METHODS = Choices(("maskprune", *ONE_SHOT), plugins=("mptk.methods", "mptk.criteria"), parts="methods")
TARGET_CHOICES = Choices(FORMS, plugins=("mptk.targets",), parts="targets")
ENGINE_CHOICES = Choices(ENGINES)
AUTO_SCHEME = "auto"
"""In place of schemes: a feature chooses the type of the graph, and how much is cut, by a limit."""
SCHEMES = Choices(("int8", "int4", "fp16", AUTO_SCHEME), alone=(AUTO_SCHEME,))
COMPARED_TYPES = ("int8", "int4")
"""Schemes with which a cut competes, in `bench` and in an advice."""
DTYPES = Choices(("auto", "float32", "bfloat16", "float16"))
COMPUTE_DTYPES = Choices(("auto", "float32", "bfloat16"))
ONNX_DTYPES = Choices(("auto", "float32", "float16"))  # ONNX Runtime has no bfloat16 kernels for the CPU
DEVICES = Choices(("auto", "cpu", "cuda", "mps", "xpu"), numbered=("cuda", "xpu"))
MOST_SPARSITY = 0.99
"""The largest sparsity."""
SAMPLES = 32
"""Calibration windows of a run whose minutes do not count."""
