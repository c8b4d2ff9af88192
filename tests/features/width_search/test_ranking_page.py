"""The page about a search: a row for each shape, charts, and no text that becomes markup; the study's table.

It reaches for mptk.features.width_search: a page of made-up shapes needs no search.
"""

from __future__ import annotations

from dataclasses import replace

from page_runs import HOSTILE, Parsed

from benchmarks.shape_ranking import table
from mptk.features.width_search.page import render_shapes_page
from mptk.features.width_search.shapes import WORST, Rung, Shape, Shapes


def test_a_page_about_shapes_has_a_row_a_shape_and_no_markup_of_others():
    widths = {"ffn": 24, HOSTILE: 2}
    first = Shape(widths, 0.3, 7e6, 12.5, 6.0, 5.0, (Rung(64, 4.5), Rung(192, 4.25)))
    second = replace(first, latency_ms=11.0, reconstructed=4.8, rungs=(Rung(64, 4.75),))
    lost = replace(first, latency_ms=14.0, masked=WORST, reconstructed=WORST, rungs=())
    dense = Shape({"ffn": 40, HOSTILE: 3}, 0.0, 9e6, 20.0, 3.0)
    page = Parsed(
        render_shapes_page(Shapes(HOSTILE, HOSTILE, "perplexity", dense, (first, second, lost), command=HOSTILE))
    )
    assert not page.tags & {"script", "img"}
    assert f"shape ffn {HOSTILE} removed parameters ms masked reconstructed 64 tokens 192 tokens" in page.text
    assert "dense 40 3 0.0% 9.0 M 20.00 20.09" in page.text
    assert "1 ★ 24 2 30.0% 7.0 M 12.50 403.43 148.41 90.02 70.11" in page.text
    assert "2 ★ 24 2 30.0% 7.0 M 11.00 403.43 121.51 115.58" in page.text
    assert "3 24 2 30.0% 7.0 M 14.00 not finite not finite" in page.text
    drawn = [value for name, value in page.attributes if name == "aria-label"]
    assert drawn == [
        "perplexity over predicted milliseconds of 3 shapes",
        "perplexity of the shapes that were trained, over tokens",
    ]
    bare = Shapes("m", "p", "loss", replace(dense, latency_ms=None), (replace(first, latency_ms=None, rungs=()),))
    page = Parsed(render_shapes_page(bare))
    assert [value for name, value in page.attributes if name == "aria-label"] == [
        "loss over parameters (millions) of 1 shapes"
    ]
    assert "6.00 5.00" in page.text


def test_full_runs_are_compared_with_the_best_of_them_in_the_order_of_the_search():
    first = {"place": 1, "widths": {"ffn": 512}, "removed": 0.5, "losses": [5.0, 4.0], "wikitext2": 100.0, "c4": 144.0}
    second = first | {"place": 2, "widths": {"kv_groups": 2, "ffn": 672}, "wikitext2": 120.0, "c4": 100.0}
    rows = table([second, first])[2:]
    assert rows[0] == "| 1 | ffn 512 | 50.0% | 148 → 55 | 100.0 | 144.0 | +9.5% |"
    assert rows[1].endswith("| 120.0 | 100.0 | +0.0% |")
