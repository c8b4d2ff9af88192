"""parts: a model of diffusers as one of transformers, so that all stages open, cut, train and write it alike.

Such a model is mostly a part of a pipeline: a folder with ``model_index.json`` and a folder for each part. A part's
``config.json`` names its class and holds the arguments of the constructor.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.compat.transformers import name_weight_files
from mptk.errors import FileError, ModelError, PackageError, take_first_line
from mptk.features.diffusers.loader import CLASS_NAME, PIPELINE
from mptk.files import format_json
from mptk.io.loaders import CONFIG
from mptk.io.untrusted import read_object
from mptk.publish.licence import list_notices
from mptk.reading import Damaged, Json, check_inside, make_damage_error

# diffusers' names of files and fields, beside those of the loader.
DIFFUSERS_VERSION = "_diffusers_version"
PART_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Inputs that a class reads in the dictionary ``added_cond_kwargs``. Here each is an argument of its own, so that a
# trace and an ONNX graph have it as an input.
ADDED_CONDITIONS = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
# Inputs that all samples share: a class reads them without the samples' dimension, which all inputs have here.
ONE_FOR_ALL = ("img_ids", "txt_ids")


def import_diffusers() -> ModuleType:
    """The package diffusers. Raises MptkError if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise PackageError(
            "diffusers is not installed, and this is a model of it; run: pip install 'mptk[diffusers]'",
            name="diffusers",
        ) from error
    return diffusers


class DiffusersConfig(PreTrainedConfig):
    """The arguments of a diffusers class, by name, with the defaults of the arguments that its file leaves out."""

    model_type = "diffusers"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.fields = tuple(fields)
        for name, value in fields.items():
            setattr(self, name, value)
        self.architectures = [fields[CLASS_NAME]] if CLASS_NAME in fields else None

    @property
    def arguments(self) -> dict[str, object]:
        """What the class's constructor takes."""
        return {name: getattr(self, name) for name in self.fields if not name.startswith("_")}

    def to_dict(self) -> Json:
        """The content of ``config.json``."""
        return {name: getattr(self, name) for name in self.fields}

    def to_diff_dict(self) -> Json:
        """The same: a diffusers config has all its fields."""
        return self.to_dict()


def is_part(folder: Path) -> bool:
    """Whether a folder holds a model of diffusers."""
    return CLASS_NAME in read_object(folder / CONFIG)


def read_part_config(folder: Path) -> DiffusersConfig:
    """The config of the model in a folder.

    Raises:
        MptkError: diffusers is missing or has no such class, or the weights are quantised.
    """
    said = read_object(folder / CONFIG)
    if "quantization_config" in said:
        raise ModelError(f"{folder} has quantised weights; give the float model of diffusers", name=folder)
    wrong = make_damage_error(folder / CONFIG)
    kind = _find_class(said[CLASS_NAME], wrong)
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    known: Json = json.loads(format_json(defaults))  # lists in place of tuples, as a file has
    given = {name: value for name, value in said.items() if name in known or name in (CLASS_NAME, DIFFUSERS_VERSION)}
    return DiffusersConfig(**known | given)


def _find_class(name: object, wrong: Damaged) -> Any:
    diffusers = import_diffusers()
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise wrong(f"{CLASS_NAME} is {name!r}, which is no model of diffusers {diffusers.__version__}")
    return found


def find_diffusers_class(config: DiffusersConfig) -> type[PreTrainedModel]:
    """The class of a config."""
    return build_part_class(_find_class(getattr(config, CLASS_NAME), ModelError))


class _Start:
    """Stands between transformers' and diffusers' constructors, so that the one does not call the other.

    Each calls the next class's constructor, without the arguments that it needs.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]


@functools.cache
def build_part_class(kind: Any) -> type[PreTrainedModel]:
    """A diffusers class that transformers builds, loads and saves, in diffusers' files."""

    class Part(PreTrainedModel, _Start, kind):  # type: ignore[misc]
        config: Any = None  # hides the property of diffusers, which cannot be set
        to = nn.Module.to  # type: ignore[assignment]  # the method of diffusers warns
        config_class = DiffusersConfig
        # transformers estimates sizes by this input, and asks for nothing else.
        # The tasks of diffusion models go by it: denoisers take a time step.
        main_input_name = "timestep" if "timestep" in inspect.signature(kind.forward).parameters else "sample"

        def __init__(self, config: DiffusersConfig) -> None:
            PreTrainedModel.__init__(self, config)
            kind.__init__(self, **config.arguments)
            self.post_init()  # type: ignore[no-untyped-call]

        @functools.wraps(kind.forward)
        def forward(  # type: ignore[override]
            self, *args: object, **given: Any
        ) -> object:
            # From the flat inputs with a samples' dimension back to what diffusers takes.
            nested = {name: given.pop(name) for name in ADDED_CONDITIONS if name in given}
            shared = {name: given[name][0] for name in ONE_FOR_ALL if name in given and given[name].ndim == 3}
            more = {"added_cond_kwargs": nested} if nested else {}
            return kind.forward(self, *args, **given | shared | more)

        def _init_weights(self, module: nn.Module) -> None:
            """Do nothing: the constructor of diffusers has done it."""

        @classmethod
        def from_pretrained(cls, *args: Any, **options: Any) -> Any:
            with name_weight_files(PART_WEIGHTS):
                model, report = super().from_pretrained(*args, **{**options, "output_loading_info": True})
            _restore_tables(model)
            return (model, report) if options.get("output_loading_info") else model

        def save_pretrained(self, *args: Any, **options: Any) -> None:
            with name_weight_files(PART_WEIGHTS):
                super().save_pretrained(*args, **options)

    # Reports and configs name the class that diffusers knows.
    Part.__name__, Part.__qualname__, Part.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Part


def _restore_tables(model: PreTrainedModel) -> None:
    """Give a loaded model the tables that its constructor computes and no file holds, such as tables of positions."""
    # transformers builds a model on the meta device, where they have no numbers. ``init_empty_weights`` leaves buffers
    # on the CPU.
    stored = model.state_dict()
    with init_empty_weights():
        made = type(model)(model.config)
    for name, table in made.named_buffers():
        if name not in stored:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, table)


# ---- the pipeline of a part ----


def open_pipeline(folder: Path, part: PreTrainedModel) -> Any:
    """The pipeline of the part in ``folder``, with ``part`` in its place.

    Raises:
        MptkError: the part has no pipeline, this one would run code of its own, or diffusers cannot load it.
    """
    pipeline = find_pipeline(folder)
    if pipeline is None:
        raise FileError(
            f"{folder} is no part of a pipeline, which would make its samples; put it into one, or give --data random",
            name=folder,
        )
    # A pipeline's index names a package and a class for each part, and diffusers imports them: only its own and
    # transformers' are allowed, and no Python file beside them.
    check_inside(pipeline)
    listed = _list_parts(pipeline)
    known = import_diffusers()
    foreign = [name for name, (package, *_) in listed.items() if not _is_known(package, known)]
    if foreign or any(pipeline.rglob("*.py")) or not isinstance(read_object(pipeline / PIPELINE).get(CLASS_NAME), str):
        raise ModelError(f"{pipeline} brings code of its own, which mptk never runs; give --data random", name=pipeline)
    # In a pipeline that mptk wrote, the part is in the pipeline's own folder, and so has none of its name.
    own = folder.name if folder != pipeline else next(name for name in listed if not (pipeline / name).is_dir())
    try:
        return known.DiffusionPipeline.from_pretrained(
            pipeline, use_safetensors=True, local_files_only=True, **{own: part}
        )
    except Exception as error:  # of any part's own library
        raise ModelError(
            f"diffusers cannot load {pipeline} ({take_first_line(error)}); check its files", name=pipeline
        ) from error


def _is_known(package: object, diffusers: ModuleType) -> bool:
    """Whether a part's class is of diffusers, of one of its pipelines, or of transformers."""
    return package in ("diffusers", "transformers") or hasattr(diffusers.pipelines, str(package))


def _list_parts(pipeline: Path) -> dict[str, list[object]]:
    """The parts of a pipeline, each with its package and class, if it has the part."""
    said = read_object(pipeline / PIPELINE)
    return {name: value for name, value in said.items() if isinstance(value, list) and value[:1] != [None]}


def find_pipeline(folder: Path) -> Path | None:
    """The folder of the pipeline whose part ``folder`` holds; None for a model without one.

    A pipeline that mptk wrote has the part in its own folder, where diffusers looks for a part without a folder.
    """
    return next((place for place in (folder, folder.parent) if (place / PIPELINE).is_file()), None)


def list_model_parts(pipeline: Path) -> list[str]:
    """The names of a pipeline's parts that are models."""
    return sorted(name for name in _list_parts(pipeline) if any((pipeline / name).glob("*.safetensors")))


def list_pipeline_files(folder: Path) -> Mapping[str, Path]:
    """The files of the pipeline beside the part in ``folder``: name in the pipeline → file. Code is not among them."""
    pipeline = find_pipeline(folder)
    if pipeline is None:
        return {}
    places = [pipeline / name for name in _list_parts(pipeline) if pipeline / name != folder]
    files = [
        pipeline / PIPELINE,
        *list_notices(pipeline),
        *(file for place in places for file in sorted(place.rglob("*"))),
    ]
    return {file.relative_to(pipeline).as_posix(): file for file in files if file.is_file() and file.suffix != ".py"}
