"""Mutants that no test can tell from the code: the change, as `make mutants` prints it, and why it makes none."""

from __future__ import annotations

NUMBERED = "axes are told apart by their numbers, whichever these are"
CAUTION = "an input whose axes are frozen is caution: nothing is lost"
WORDS = "tests/house/test_messages.py notices it, and mutants are not put to the tests of tests/house"
LAYOUT = "how many spaces a JSON file is indented by is for people's eyes"

ALLOWED: dict[str, str] = {
    """-                counts[a] = max(n, counts.get(a, 0))
+                counts[a] = max(n, counts.get(a, -1))""": "no count is below zero",
    """-                raise ValueError(f"there are outputs at {list(outputs.shape[:2])} positions, not {list(places.shape)}")
+                raise ValueError(f"there are outputs at {list(outputs.shape[: 1])} positions, not {list(places.shape)}")""": WORDS,
    """-    return Cut(choices, {axis: int(kept.table[0].sum()) for axis, kept in choices.items()})
+    return Cut(choices, {axis: int(kept.table[ -1].sum()) for axis, kept in choices.items()})""": "all rows of an axis keep as many units",
    """-    first = reductions[0]
+    first = reductions[ -1]""": "they are of one call, and have one kind",
    """-    found: Tensor = torch.randn(like.shape, generator=generator) / fan_in**0.5
+    found: Tensor = torch.randn(like.shape, generator=generator) / fan_in*0.5""": "any weights of that size will do",
    """-            f"{folder} holds no plan.json; give the --out folder of `mptk prune`{absent and f' ({absent})'}",
+            f"{folder} holds no plan.json; give the --out folder of `mptk prune`{absent or f' ({absent})'}",""": WORDS,
    """-            if identify_file(file.fileno()) != key or began - max(key[-2:]) < SETTLED:
+            if identify_file(file.fileno()) != key or began * max(key[-2:]) < SETTLED:""": (
        "no test can change a file twice within one tick of the file system's clock"
    ),
    """-    if moved.relative > TOLERANCE:  # the cut is visible in the outputs, so the other stages saw it
+    if moved.relative >= TOLERANCE:  # the cut is visible in the outputs, so the other stages saw it""": "no difference is the tolerance to the last bit",
    """-    if moved <= tolerance and cut.removes:
+    if moved < tolerance and cut.removes:""": "no difference is the tolerance to the last bit",
    """-    shell.register_parameter(leaf, nn.Parameter(torch.empty_like(like, device="meta"), requires_grad=False))
+    shell.register_parameter(leaf, nn.Parameter(torch.empty_like(like, device="meta"), requires_grad=True))""": (
        "a weight that no code uses gets no gradient"
    ),
    """-    return isinstance(value, Tensor) and value.is_floating_point()
+    return isinstance(value, Tensor) or value.is_floating_point()""": CAUTION,
    """-        data=_find_dependents(flow, [n for n in inputs if n not in caches and _is_floating(n)]),
+        data=_find_dependents(flow, [n for n in inputs if n not in caches or _is_floating(n)]),""": CAUTION,
    """-    targets = {node: found for node in graph.nodes if (found := _find_aliased_nodes(node, writes=True))}
+    targets = {node: found for node in graph.nodes if (found := _find_aliased_nodes(node, writes=False))}""": (
        "a view that counts as a write is caution: nothing is lost"
    ),
    """-    path.write_text(format_json(content, indent=2, sort_keys=True, ensure_ascii=False) + "\\n", encoding="utf-8")
+    path.write_text(format_json(content, indent= 3, sort_keys=True, ensure_ascii=False) + "\\n", encoding="utf-8")""": LAYOUT,
    """-        folder / MARKER, format_json({"format": MANIFEST_FORMAT, "files": dict(sorted(files.items()))}, indent=1) + "\\n"
+        folder / MARKER, format_json({"format": MANIFEST_FORMAT, "files": dict(sorted(files.items()))}, indent= 0) + "\\n\"""": LAYOUT,
    """-        folder / MARKER, format_json({"format": MANIFEST_FORMAT, "files": dict(sorted(files.items()))}, indent=1) + "\\n"
+        folder / MARKER, format_json({"format": MANIFEST_FORMAT, "files": dict(sorted(files.items()))}, indent= 2) + "\\n\"""": LAYOUT,
    """-    path.write_text(format_json(content, indent=2, sort_keys=True, ensure_ascii=False) + "\\n", encoding="utf-8")
+    path.write_text(format_json(content, indent=2, sort_keys=True, ensure_ascii=True) + "\\n", encoding="utf-8")""": (
        "an escaped letter in a JSON file is the same letter"
    ),
    """-@dataclass(frozen=True)
+@dataclass(frozen=False)""": "nothing assigns to the fields of a claim; frozen keeps it so",
    """-    *,
+    /,""": "who calls it names these arguments already",
    """-        return node.all_input_nodes[:1]
+        return node.all_input_nodes[: 2]""": "an operand that counts as shared is caution: nothing is lost",
    """-    return type(a) is type(b) and not isinstance(a, torch.SymInt) and bool(a == b)
+    return type(a) is type(b) and  isinstance(a, torch.SymInt) and bool(a == b)""": (
        "a call that is run again gives the same; leaving it out only saves time"
    ),
    """-            factor = _compute_factor(norms[0])
+            factor = _compute_factor(norms[ -1])""": "norms that share a weight have one factor, or they are not folded",
    """-    generator = torch.Generator().manual_seed(0)
+    generator = torch.Generator().manual_seed( 1)""": "any noise of that size will do",
    """-            if n > 1:
+            if n > 0:""": "an axis that is not listed counts as having one coordinate",
    """-    generator = torch.Generator().manual_seed(0)
+    generator = torch.Generator().manual_seed( -1)""": "any noise of that size will do",
    """-        return 1.0
+        return 2.0""": "before a cut all norms have one factor, whichever it is",
    """-    if outer_size == 1 or inner_size == 1:
+    if outer_size == 1 and inner_size == 1:""": "a factor of 1 is split off by the general way, too",
    """-    _count = 0
+    _count = 1""": NUMBERED,
    """-        Axis._count += 1
+        Axis._count += 2""": NUMBERED,
    """-    path.write_text(format_json(content, indent=2, sort_keys=True, ensure_ascii=False) + "\\n", encoding="utf-8")
+    path.write_text(format_json(content, indent=2, sort_keys=False, ensure_ascii=False) + "\\n", encoding="utf-8")""": (
        "the order of keys in a JSON file means nothing"
    ),
    """-    path.write_text(format_json(written, indent=2, sort_keys=True) + "\\n", encoding="utf-8")
+    path.write_text(format_json(written, indent= 3, sort_keys=True) + "\\n", encoding="utf-8")""": LAYOUT,
    """-    return max(_compute_relative(*pair) for pair in zip(found, expected, strict=True))
+    return max(_compute_relative(*pair) for pair in zip(found, expected, strict=False))""": (
        "both have the outputs of one program, whose number no cut changes"
    ),
}
