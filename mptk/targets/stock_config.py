"""stock_config: compare each field of a written config with the dense model's. Only the plan's changes are allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig

from mptk.io import list_own_code, make_portable_config, models, read_object
from mptk.protocols import Written
from mptk.publish.manifest import hash_file
from mptk.targets.beside import CONFIG_STAGE, JsonObject, compare, fail, require, walk_fields
from mptk.tasks.runtimes import CONFIG_KEY, build_js_config
from mptk.trust import Trust
from passes.targets.onnx.names import ONNX_FOLDER
from passes.verify import Difference

# Fields that say who wrote the file, and fields with a check of their own (the class, the weights' type).
_APART = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "quantization_config")
_GENERATION = ("transformers_version", "_from_model_config")
"""The same of generation_config.json."""
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of types → torch's."""


def find_config_changes(written: Written, folder: Path) -> dict[str, list[object]]:
    """Field → [old, new] for each field of config.json in ``folder`` that differs from the dense model's."""
    changes = {**_find_cut_changes(written), **{name: list(values) for name, values in written.stock.changes.items()}}
    dense, graphs = _read_dense(written), build_js_config(folder / ONNX_FOLDER)
    if dense.dtype is not None and _name_dtype(dense.dtype) != _name_dtype(written.dtype):
        changes["dtype"] = [_name_dtype(dense.dtype), _name_dtype(written.dtype)]
    if graphs and graphs != (known := getattr(dense, CONFIG_KEY, None)):
        changes[CONFIG_KEY] = [known, graphs]
    return changes


def check_written_config(written: Written, folder: Path, trust: Trust) -> Difference:
    """The stage ``config``: compare config.json and generation_config.json in ``folder`` with the dense model's, cut.

    Run ``check_code`` first: a config may name classes of code beside it.
    """
    # 1. The file agrees with itself: older spellings of a field have its value.
    found = models.load_config(str(folder), trust=trust)
    raw = read_object(folder / "config.json")
    compare("config.json", raw, make_portable_config(raw))
    # 2. What was to be written differs from the dense config only as the plan says, and 3. is what was written.
    _check_cut(written)
    graphs = build_js_config(folder / ONNX_FOLDER)
    if graphs:
        compare("config.json", {CONFIG_KEY: raw.get(CONFIG_KEY)}, {CONFIG_KEY: graphs})
    compare(
        "config.json",
        _convert_config(found),
        _convert_config(_read_back(written.stock.config)),
        {CONFIG_KEY} if graphs else set(),
    )
    # 4. The class, and the type that the weights have.
    require("config.json", "architectures", found.architectures, [written.stock.model_class.__name__])
    for file in sorted(folder.glob("model*.safetensors")):  # not a compensation's weights, which keep float32
        for kind in _list_dtypes(file):
            require("config.json", "dtype", _name_dtype(found.dtype), kind)
    # 5. How text is generated, which no cut changes.
    if written.stock.model_class.can_generate() and (dense := written.loaded.model.generation_config) is not None:
        if not (folder / "generation_config.json").is_file():
            fail("generation_config.json is missing")
        own = GenerationConfig.from_pretrained(folder).to_dict()
        compare("generation_config.json", _without(own, _GENERATION), _without(dense.to_dict(), _GENERATION))
    return Difference(CONFIG_STAGE, 0.0, 0.0, 0.0)


def check_code(dense: Path, folder: Path) -> None:
    """Raise MptkError if Python code in ``folder`` is neither the dense model's nor mptk's. Call it before any runs."""
    for file in sorted(folder.rglob("*.py")):
        # By content, so that neither a dense model's file nor mptk's own can be replaced by another of its name.
        known = [
            own
            for own in (dense / file.relative_to(folder), *list_own_code())
            if own.name == file.name and own.is_file()
        ]
        if hash_file(file) not in map(hash_file, known):
            fail(f"{file.relative_to(folder)} is not the dense model's code")
    # ``auto_map`` may also name code of another repository, which no file here shows.
    for name in ("config.json", "tokenizer_config.json"):
        if foreign := sorted(_list_repositories(folder / name) - _list_repositories(dense / name)):
            fail(f"{name} asks for code of another repository, {foreign[0]}")


def _list_repositories(file: Path) -> set[str]:
    """Classes of other repositories in a JSON file's ``auto_map``, as ``OWNER/NAME--module.Class``."""
    classes = read_object(file).get("auto_map") if file.is_file() else None
    values = classes.values() if isinstance(classes, dict) else []
    return {c for v in values for c in (v if isinstance(v, list) else [v]) if isinstance(c, str) and "--" in c}


def _check_cut(written: Written) -> None:
    """The config to write must differ from the dense config only in the listed fields."""
    dense, cut, new = (
        _convert_config(_read_dense(written)),
        _convert_config(written.cut),
        _convert_config(written.stock.config),
    )
    listed = set(written.stock.changes)
    if written.cut is written.stock.config:
        compare("config.json", new, dense, listed)
    else:
        # Another class is written. ``written.cut`` is the own class's config, and the two share only some fields.
        common = cut.keys() & new.keys()
        compare("config.json", {k: new[k] for k in common}, {k: cut[k] for k in common}, listed)


def _find_cut_changes(written: Written) -> dict[str, list[object]]:
    """The plan's changes of the dense model's own config, if another class's config is written."""
    if written.cut is written.stock.config:
        return {}
    dense, cut = (
        dict(walk_fields(_convert_config(_read_dense(written)))),
        dict(walk_fields(_convert_config(written.cut))),
    )
    return {k: [dense.get(k), cut[k]] for k in sorted(cut) if cut[k] != dense.get(k)}


def _read_dense(written: Written) -> PreTrainedConfig:
    """The dense model's config as in its checkpoint; the loaded model's config has the dtype of loading."""
    return models.read_stored_config(written.loaded)


def _read_back(config: PreTrainedConfig) -> PreTrainedConfig:
    """``config`` as read from its file, with older spellings of fields replaced."""
    content = json.loads(config.to_json_string(), object_hook=_read_number)
    back: PreTrainedConfig = type(config).from_dict(make_portable_config(content))
    return back


def _read_number(item: dict[str, object]) -> object:
    """A number that is not finite, which transformers writes as ``{"__float__": "Infinity"}``; else the object."""
    return float(str(item["__float__"])) if item.keys() == {"__float__"} else item


def _convert_config(config: PreTrainedConfig) -> dict[str, object]:
    return _without(json.loads(config.to_json_string(use_diff=False)), _APART)


def _without(body: JsonObject, names: tuple[str, ...]) -> dict[str, object]:
    return {
        key: _without(value, names) if isinstance(value, Mapping) else value
        for key, value in body.items()
        if key not in names
    }


def _list_dtypes(file: Path) -> set[str]:
    """The dtypes of a file's floating-point weights."""
    with safe_open(file, "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return {_TYPES[kind] for kind in kinds if kind in _TYPES}


def _name_dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
