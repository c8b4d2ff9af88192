"""Private names of other libraries: each still does what mptk needs, and none is used outside ``mptk/compat``."""

from __future__ import annotations

import ast
import gc
import linecache
import logging
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, fx, nn
from transformers import (
    AutoModelForCausalLM,
    FunnelConfig,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    modeling_utils,
)
from transformers.models.llama import modeling_llama
from transformers.utils import generic, import_utils

import mptk
from benchmarks.tiny_models import tiny_model
from mptk import testing
from mptk.compat import torch as compat
from mptk.compat.accelerate import separate_state
from mptk.compat.onnxruntime import run_on_values
from mptk.compat.peft import is_lora_refused, switch_off_adapters
from mptk.compat.symbols import Symbols, compute_exponents, compute_value, evaluate_numbers, find_symbols, to_expression
from mptk.compat.transformers import (
    find_auto_classes,
    forget_source,
    list_ignored_weights,
    watch_missing_attributes,
    without_generation,
)
from mptk.io import Resident
from mptk.io.tensors import Deferred, Files
from mptk.methods.maskprune.learner import adapt, unwrap_adapters

ROOT = Path(__file__).resolve().parents[2]


def changed(library: str, what: str) -> str:
    return f"{library} {version(library)} changed {what}; repair mptk/compat"


# ---- torch ----


def test_a_mapped_function_is_traced_between_the_calls_that_hide_and_show_its_samples():
    class Mapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.vmap(lambda row: row.relu())(x)

    nodes = list(torch.export.export(Mapped(), (torch.ones(3, 4),)).graph.nodes)
    (opens,) = [n for n in nodes if n.target is compat.vmap_opens]
    (closes,) = [n for n in nodes if n.target is compat.vmap_closes]
    said = changed("torch", "what it calls around a mapped function")
    assert opens.args[1:] == (0, 1), said
    assert closes.args[1:] == (1, 3, 0), said
    assert opens.meta["val"].shape == (4,), said


def exported(dynamic: bool = False) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    return torch.export.export(nn.Linear(5, 3), (torch.ones(7, 5),), dynamic_shapes=shapes)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([x[i] for i in range(len(x))])
        return rows.reshape(2, -1, 1) if x.shape[1] > 4 else rows


def test_what_a_mapped_function_sees_is_read_with_its_samples_last():
    seen = list[Tensor]()

    def see(x: Tensor) -> Tensor:
        seen.append(compat.move_samples_last(x))
        return x

    x = torch.randn(2, 3, 5, 7)
    torch.vmap(torch.vmap(see, in_dims=1))(x)
    assert seen[0].shape == (3, 7, 5, 2)
    assert torch.equal(seen[0], x.permute(1, 3, 2, 0))
    assert compat.move_samples_last(x) is x


def test_a_trace_tells_what_it_assumed_of_sizes_and_where():
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    with compat.record_locations():
        program = torch.export.export(Branching(), (torch.ones(2, 6),), dynamic_shapes=shapes)
    batch, length = next(node for node in program.graph.nodes if node.op == "placeholder").meta["val"].shape
    said = [guard for guard in compat.list_guards([batch, length]) if not guard.kernel and guard.holds.free_symbols]
    assert [str(guard.holds) for guard in said] == [f"{length} > 4"], changed("torch", "ShapeEnv.guards")
    assert "test_compat.py" in said[0].stack, changed("torch", "ShapeEnv._get_sloc")
    assert "test_compat.py" in compat.find_size_origin(batch), changed("torch", "ShapeEnv.replacements_slocs")
    assert compat.find_size_origin(length) == ""


def value(program: torch.export.ExportedProgram) -> torch.Tensor:
    found: torch.Tensor = program.graph.output_node().args[0][0].meta["val"]
    return found


def test_traced_values_are_fake_tensors_of_a_fake_mode():
    with compat.FakeTensorMode() as mode:
        made = torch.ones(3, 5) @ torch.ones(5, 7)
    assert isinstance(made, compat.FakeTensor), changed("torch", "what FakeTensorMode makes")
    assert made.shape == (3, 7)
    assert made.fake_mode is mode, changed("torch", "FakeTensor.fake_mode")
    assert mode.from_tensor(torch.ones(2)).device.type == "cpu", changed("torch", "FakeTensorMode.from_tensor")


def test_a_traced_call_is_an_op_overload_with_a_schema():
    add = torch.ops.aten.add_.Tensor
    assert isinstance(add, compat.OpOverload), changed("torch", "OpOverload")
    signature = compat.find_schema(add)
    assert signature is not None, changed("torch", "OpOverload._schema")
    assert [a.name for a in signature.arguments] == ["self", "other", "alpha"], changed("torch", "schema arguments")
    assert signature.is_mutable, changed("torch", "FunctionSchema.is_mutable")
    assert signature.overload_name == "Tensor", changed("torch", "FunctionSchema.overload_name")
    assert signature.arguments[0].alias_info.is_write, changed("torch", "alias_info of an argument")
    assert signature.returns[0].alias_info is not None, changed("torch", "alias_info of a result")
    assert compat.find_schema(len) is None


def test_a_symbolic_size_has_a_hint_and_an_expression():
    size = value(exported(dynamic=True)).shape[0]
    assert isinstance(size, torch.SymInt)
    assert compat.find_size_hint(size) == 7, changed("torch", "SymInt.node.hint")
    assert compat.express_size(size * 2) == compat.express_size(size + size), changed("torch", "SymInt.node.expr")
    assert compat.express_size(size) != compat.express_size(size + 1)


def two_fifths(value: int) -> int:
    assert isinstance(value, int)
    return int(value / 5 * 2)


def test_sizes_of_modules_are_expressions_of_symbols():
    symbols = Symbols()
    (a, width), (b, heads) = symbols.integer("width", 12), symbols.integer("heads", 1)
    with symbols.build_symbolically(__name__):
        layers = nn.Sequential(nn.Linear(width, heads * 3), nn.LayerNorm(width)).to(torch.float16)
        part, known = two_fifths(width), {width, heads}
        assert vars(modeling_llama)["int"](width) is width, "the code of parts of a model"
        rate = torch.linspace(0, 1, width).tolist()[0]
    sizes = [to_expression(size) for weight in layers.state_dict().values() for size in weight.shape]
    assert [find_symbols(size) for size in sizes] == [{b}, {a}, {b}, {a}, {a}], changed("torch", "symbolic sizes")
    assert evaluate_numbers([*sizes, to_expression(part), 7], {a: 20, b: 2}) == [6, 20, 6, 20, 20, 8, 7]
    assert compute_value(sizes[0], {b: 5}) == 15
    assert evaluate_numbers([to_expression(7 // (width - 20))], {a: 20}) == [0], "no size"
    assert compute_exponents(to_expression(heads * width**2 // 5), {a: 12, b: 1}) == {a: 2, b: 1}
    assert compute_exponents(to_expression(width + 2 * heads), {a: 6, b: 1}) == {a: Fraction(3, 4), b: Fraction(1, 4)}
    assert compute_exponents(to_expression((width + 3) // 4 * 4), {a: 12}) == {a: 1}, "as if nothing were rounded"
    assert compute_exponents(to_expression(width - 12), {a: 12}) == {}, "a number that is 0 grows by no share"
    assert math.isnan(rate)
    assert len(known) == 2
    assert "int" not in globals(), "a module keeps what was put into it"
    assert nn.Linear(2, 3).to(torch.float16).weight.dtype is torch.float16
    with pytest.raises(TypeError, match="unhashable"):
        hash(width)


def test_nested_inputs_are_flattened_and_mapped():
    assert compat.tree_leaves(((1, {"a": 2}), [3])) == [1, 2, 3], changed("torch", "tree_leaves")
    assert compat.tree_map(lambda x: -x, (1, {"a": 2})) == (-1, {"a": -2}), changed("torch", "tree_map")


def test_a_relation_of_sizes_can_be_stated():
    compat.check(True)
    with pytest.raises(RuntimeError):
        compat.check(False)


def test_python_kernels_take_symbolic_sizes():
    example = value(exported(dynamic=True))
    with example.fake_mode, compat.enable_python_dispatcher():
        assert compat.tree_leaves(torch.relu(example).shape)[1] == 3, changed("torch", "enable_python_dispatcher")


@pytest.mark.parametrize("wrap", [lambda program: program, compat.mark_undecomposed], ids=["built", "undecomposed"])
def test_an_exported_program_can_be_built_of_other_weights(wrap):
    old = exported(dynamic=True)
    state = {name: nn.Parameter(torch.full_like(t, 2.0)) for name, t in old.state_dict.items()}
    new = compat.build_exported(
        old, old.graph_module, old.graph_signature, state=state, constants={}, example_inputs=old.example_inputs
    )
    run = wrap(new).module()  # type: ignore[operator]
    assert torch.equal(run(torch.ones(4, 5)), torch.full((4, 3), 12.0)), changed("torch", "ExportedProgram")


def test_an_undecomposed_program_stays_as_it_is():
    old = exported()
    program = compat.mark_undecomposed(old)
    assert program.run_decompositions({}) is program
    made = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    origins = {node.metadata_props.get("pkg.torch.onnx.fx_node", "") for node in made.model.graph}
    assert any("aten.linear.default" in origin for origin in origins), changed("torch", "how the exporter decomposes")


def test_the_exporter_is_quiet_for_a_time():
    name = "torch.onnx._internal.exporter._registration"
    assert find_spec(name) is not None, changed("torch", f"the logger {name}")
    logger = logging.getLogger(name)
    with compat.hide_exporter_logs():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.WARNING)


def test_what_operators_gave_is_not_kept():
    with compat.stop_operator_cache():
        mode = compat.FakeTensorMode()
    assert mode.cache_enabled is False, changed("torch", "fake_tensor_cache_enabled")
    assert compat.FakeTensorMode().cache_enabled, changed("torch", "fake_tensor_cache_enabled")


def test_sources_of_generated_code_are_forgotten():
    before = fx.symbolic_trace(torch.nn.ReLU())
    with compat.forget_sources():
        within = fx.symbolic_trace(torch.nn.ReLU())
        assert linecache.getlines(within.forward.__code__.co_filename), changed("torch", "where fx keeps sources")
    assert not linecache.getlines(within.forward.__code__.co_filename), changed("torch", "where fx keeps sources")
    assert linecache.getlines(before.forward.__code__.co_filename)
    assert within(torch.ones(1)) == 1


def test_a_trace_leaves_nothing_behind():
    program = mptk.trace(torch.nn.Linear(2, 3), [torch.ones(1, 2)])
    assert not linecache.getlines(program.graph.forward.__code__.co_filename)
    assert all(not n.meta["val"].fake_mode.cache_enabled for n in program.graph.graph.nodes if "val" in n.meta)


def test_a_trace_is_gone_when_its_program_is():
    """But for the last one, which torch keeps."""

    class Own(torch.nn.Linear):  # the tests remember traces of known classes
        pass

    def sizes_of_a_trace() -> weakref.ref[object]:
        program = mptk.trace(Own(2, 3), [torch.ones(2, 2)], dynamic=True)
        return weakref.ref(next(iter(program.graph.graph.nodes)).meta["val"].fake_mode.shape_env)

    first, _ = sizes_of_a_trace(), sizes_of_a_trace()
    gc.collect()
    assert first() is None, changed("torch", "what an export keeps of symbolic sizes")


# ---- transformers ----


def test_transformers_asks_once_whether_an_optional_package_is_there():
    said = changed("transformers", "how it remembers which packages are installed")
    assert hasattr(import_utils.is_torchaudio_available, "cache_clear"), said
    assert generic._is_mlx_available is import_utils.is_mlx_available(), said


def test_auto_classes_say_which_classes_they_have():
    config = LlamaConfig()
    said = changed("transformers", "auto classes' _model_mapping")
    assert find_auto_classes("AutoModelForCausalLM", config) == (LlamaForCausalLM,), said
    assert find_auto_classes("AutoModelForImageClassification", config) == ()
    assert len(find_auto_classes("AutoModel", FunnelConfig())) > 1, said


def test_a_config_forgets_where_it_came_from():
    config = LlamaConfig()
    vars(config)["_model_name_or_path"] = "a title"
    forget_source(config)
    forget_source(config)
    assert "a title" not in config.to_json_string(use_diff=False)


def test_names_that_are_left_out_when_a_model_is_loaded_are_known():
    with torch.device("meta"):
        model = Glm4MoeForCausalLM(Glm4MoeConfig(num_hidden_layers=1))
    said = changed("transformers", "PreTrainedModel._keys_to_ignore_on_load_unexpected")
    assert any(re.search(name, "model.layers.46.enorm.weight") for name in list_ignored_weights(model)), said


def test_missing_attributes_of_configs_are_heard_of_and_nothing_stays():
    outer: list[str] = []
    inner: list[str] = []
    config = LlamaConfig()
    with watch_missing_attributes(lambda _, name: outer.append(name)):
        with watch_missing_attributes(lambda _, name: inner.append(name)):
            assert getattr(config, "first", 5) == 5, changed("transformers", "how configs look attributes up")
        assert getattr(config, "second", 5) == 5
        with pytest.raises(AttributeError, match="third"):
            config.third  # noqa: B018
    assert getattr(config, "fourth", 5) == 5
    assert inner == ["first"]
    assert outer == ["first", "second", "third"]
    assert "__getattr__" not in vars(PreTrainedConfig)


def test_a_model_is_made_without_settings_of_generation_from_its_config():
    config = testing.make_decoder("llama", meta=True).config
    config.max_length = 7
    with without_generation(), torch.device("meta"):
        assert LlamaForCausalLM(config).generation_config.max_length != 7
    assert GenerationConfig.from_model_config(config).max_length == 7


def test_weights_are_read_later_than_the_model_is_loaded(tmp_path, inside):
    (model := testing.make_decoder("mixtral")).save_pretrained(tmp_path / "model")
    inside.bound("transformers.modeling_utils.safe_open", None)
    files = Files()
    with files.defer_reads():
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert modeling_utils.safe_open is None
    said = changed("transformers", "modeling_utils.safe_open")
    assert all(isinstance(weight, Deferred) for weight in opened.state_dict(keep_vars=True).values()), said
    weights = files.open_weights(opened, Resident(0))
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    assert all(type(p) is nn.Parameter and p.is_meta for p in opened.parameters())


# ---- accelerate ----


def test_a_run_has_an_accelerator_of_its_own_and_the_callers_is_as_before():
    with separate_state():
        mine = Accelerator(cpu=True, mixed_precision="bf16")
        with separate_state():
            assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no", changed(
                "accelerate", "AcceleratorState's global state"
            )
        assert mine.mixed_precision == AcceleratorState().mixed_precision == "bf16"


# ---- peft ----


def test_peft_refuses_lora_where_kernels_read_a_weight():
    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4))
    refused = {name.rpartition(".")[2] for name, _ in model.named_modules() if is_lora_refused(model, name)}
    assert refused == {"conv1d", "out_proj"}, changed("peft", "_check_lora_target_modules_mamba")
    assert adapt(model, 2, 0).peft_config["default"].target_modules
    assert not is_lora_refused(testing.make_decoder("llama"), "model.layers.0.self_attn.out_proj")


def test_adapters_are_in_the_layers_that_are_named():
    adapted = adapt(tiny_model("causal-lm", "deepseek_v3").model, 2, 0)
    layers = {name for name, module in unwrap_adapters(adapted).named_modules() if isinstance(module, LoraLayer)}
    assert "model.layers.1.mlp.shared_experts.gate_proj" in layers, changed("peft", "no conversion of names")
    assert not any(name.endswith("experts") for name in layers)


def test_adapters_are_off_for_a_time_and_stay_trainable():
    model = testing.make_decoder("llama")
    tokens = testing.draw_tokens(2, 7)
    dense = model(tokens).logits
    adapted: PeftModel = adapt(model, 2, 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert not torch.equal(adapted(tokens).logits, dense)
    with switch_off_adapters(adapted):
        assert torch.equal(adapted(tokens).logits, dense), changed("peft", "LoraLayer._disable_adapters")
        assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trained
    assert not torch.equal(adapted(tokens).logits, dense)


# ---- onnxruntime ----


def test_a_session_takes_and_gives_its_own_tensors():
    text = "agraph (float[2, N] x, float[2, N] y) => (float[2, N] sum, float[2, N] difference) "
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]>' + text + "{ sum = Add(x, y) difference = Sub(x, y) }"
    )
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    x, y = np.full((2, 3), 5, dtype=np.float32), np.full((2, 3), 3, dtype=np.float32)
    feeds = {"y": ort.OrtValue.ortvalue_from_numpy(y), "x": ort.OrtValue.ortvalue_from_numpy(x)}
    difference, total = run_on_values(session, feeds, ["difference", "sum"])
    assert (difference.numpy() == 2).all(), changed("onnxruntime", "run_with_ortvaluevector")
    assert (total.numpy() == 8).all()
    again = run_on_values(session, {"x": total, "y": difference}, ["sum"])
    assert (again[0].numpy() == 10).all()


def test_the_quantiser_leaves_logging_alone():
    """In a process of its own: a module is imported once."""
    program = (
        "import logging; from mptk.compat.onnxruntime import import_matmul_quantizer; module = import_matmul_quantizer();"
        "assert module.MatMulNBitsQuantizer and module.DefaultWeightOnlyQuantConfig;"
        "assert not logging.root.handlers and logging.root.level == logging.WARNING"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# ---- everything else ----


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(tree: ast.AST) -> set[str]:
    """What a file defines or assigns itself."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


INTERNAL = (".node.hint", ".node.expr", "ExportedProgram(")
"""Internals of torch whose names say nothing of it."""


def foreign_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, private name of another library): imports, attributes, and names given to getattr and its like.

    ATen operators (``aten._to_copy``) are names in a graph, not torch's Python.
    """
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            if not ast.unparse(node.value).endswith("aten"):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).endswith(INTERNAL):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if any(map(private, a.name.split("."))))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ("mptk", "passes"):
            names = [f"{node.module}.{a.name}" for a in node.names]
            yield from ((node.lineno, name) for name in names if any(map(private, name.split("."))))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if f"{called}(".endswith(INTERNAL):
                yield node.lineno, called
            if called in ("getattr", "hasattr", "setattr", "delattr") or called.startswith("vars("):
                texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                yield from ((node.lineno, text) for text in texts if private(text))


@pytest.mark.parametrize(
    "line",
    [
        "from torch._dispatch import python",
        "import torch._dynamo",
        "from torch import _check",
        "torch._ops.OpOverload",
        "self._buffers",
        "module._parameters['x'] = 1",
        "getattr(op, '_schema', None)",
        "vars(config).pop('_name', None)",
        "size.node.hint",
        "torch.export.ExportedProgram(root=graph)",
    ],
)
def test_a_private_name_is_seen(line):
    assert list(foreign_names(ast.parse(line)))


def test_private_names_of_other_libraries_are_in_compat_alone():
    files = [p for package in ("mptk", "passes") for p in (ROOT / package).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(files)
        if (ROOT / "mptk/compat") not in path.parents
        for line, name in foreign_names(ast.parse(path.read_text()))
    ]
    assert not found, "move these into mptk/compat, with a test here:\n" + "\n".join(found)
