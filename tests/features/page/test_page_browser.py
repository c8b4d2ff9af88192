"""Pages in headless Chromium, on a phone and on a desk: no console message, every chart drawn, nothing too wide."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from page_runs import made
from tiny_decoders import tiny_decoder

import mptk
from mptk.features.page.render import render_analysis_page, render_report_page
from mptk.ir import Alignment
from mptk.report.analysis import build_analysis_json
from mptk.targets import find_target

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
MEASURE = """
const page = document.querySelector("iframe");
page.onload = () => {
  const inside = page.contentDocument;
  const charts = [...inside.querySelectorAll("svg.chart")].map(chart => {
    const box = chart.getBoundingClientRect(), drawn = chart.getBBox();
    return {name: chart.getAttribute("aria-label"), width: box.width, height: box.height, drawn: drawn.width * drawn.height};
  });
  const texts = [...inside.querySelectorAll("svg.chart text")].map(text => parseFloat(page.contentWindow.getComputedStyle(text).fontSize)
    * text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width);
  const found = {charts, wide: inside.documentElement.scrollWidth, smallest: Math.min(...texts)};
  document.querySelector("pre").textContent = JSON.stringify(found);
};
"""


def opened(page: str, width: int, folder: Path) -> dict[str, Any]:
    """The page in a frame of that width, measured from outside: it allows no script of its own."""
    frame = f'<iframe style="width:{width}px;height:3000px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    outer = folder / "outer.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><pre></pre>{frame}<script>{MEASURE}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    window = [f"--window-size={max(width, 600)},3000", f"--user-data-dir={folder / 'profile'}"]
    command = [str(CHROMIUM), *options, *window, "--dump-dom", outer.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert re.findall(r".*CONSOLE.*", run.stderr) == []
    (said,) = re.findall(r"<pre>(.+?)</pre>", run.stdout)
    return json.loads(html.unescape(said))


@pytest.fixture(scope="module", params=["report", "analysis"])
def page(request):
    """A page, and how many charts it has."""
    if request.param == "report":
        return render_report_page([made(run="a" * 70), made(run="b")]), 17
    model = tiny_decoder("grouped heads, rotary")
    analysis = mptk.analyze(model)
    legal = find_target("stock").find_legal(analysis, model, Alignment(1))
    return render_analysis_page(build_analysis_json(analysis, legal, "small"), analysis, legal), 1


@pytest.mark.parametrize("width", [390, 1280])
def test_every_chart_is_drawn_and_fits(page, width, tmp_path):
    found = opened(page[0], width, tmp_path)
    assert len(found["charts"]) == page[1]
    assert all(min(chart["width"], chart["height"], chart["drawn"]) > 20 for chart in found["charts"])
    assert found["wide"] <= width
    assert found["smallest"] >= 6.5
