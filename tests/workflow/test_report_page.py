"""The report page in a browser, and made by Snakemake."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixflow.config import load_config
from mixflow.runtime import paths
from mixflow.stages.plan import Plan
from mixflow.stages.report import make_report
from tests.browser import PROGRAM, Browser
from tests.conftest import ROOT
from tests.made_up import make_table
from tests.workflow.house import House, copy_of

pytestmark = pytest.mark.slow
browsing = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
PICTURES = ROOT / "logs" / "report"  # kept to be looked at
SEEDS: dict[str, Any] = {
    "title": "Exposure bias on digits, three seeds",
    "paper": False,
    "replicates": {"training": [1, 2, 3], "sampling": [100, 101, 102]},
    "columns": [{"sampler": "euler5", "metric": "fd"}, {"sampler": "euler50", "metric": "accuracy"}],
    "rows": [
        {"checkpoint": "digits-base", "label": "base"},
        {"checkpoint": "digits-continued", "label": "continued"},
        {"checkpoint": "digits-mixflow-g0.8", "label": "MixFlow 0.8", "against": "digits-continued"},
    ],
}
# The contrast of every text with what lies behind it, as WCAG 2 has it: [[ratio, needed, text], ...] of the low ones.
CONTRAST = """(() => {
  const channel = (c) => { c /= 255; return c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; };
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const behind = (node) => {
    for (let e = node; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  for (let node; node = walker.nextNode();) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.data.trim() || !e.checkVisibility() || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const [a, b] = [light(rgba(style.color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05), needed = large ? 3 : 4.5;
    seen += 1;
    if (ratio < needed) low.push([ratio.toFixed(2), needed, node.data.trim().slice(0, 40)]);
  }
  return [seen, low];
})()"""
# What reaches beyond the window without a box of its own to scroll in.
WIDE = """[...document.querySelectorAll("body *")].filter((e) =>
  e.checkVisibility() && !e.closest(".scroll, .skip, [hidden]") && e.getBoundingClientRect().right > innerWidth + 1
).map((e) => e.outerHTML.slice(0, 80))"""
SHIFT = """new Promise((resolve) => {
  let sum = 0;
  const observer = new PerformanceObserver((list) => { for (const entry of list.getEntries()) sum += entry.value; });
  observer.observe({type: "layout-shift", buffered: true});
  setTimeout(() => resolve(sum), 300);
})"""
FIRST = "#table-digits tbody a.number"


def place_of(browser: Browser, selector: str) -> tuple[float, float]:
    """Scroll to an element and return its middle."""
    browser.ask(f"document.querySelector('{selector}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    time.sleep(0.2)  # the page hears of its scrolling
    box = f"document.querySelector('{selector}').getBoundingClientRect()"
    x, y, width, height = browser.ask(f"(({{x, y, width, height}}) => [x, y, width, height])({box})")
    return x + width / 2, y + height / 2


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a page can hold: seeds, single runs, the paper's numbers, what was not run."""
    root = tmp_path_factory.mktemp("report")
    asked = {"table": "seeds", "row": "digits-mixflow-g0.8", "sampler": "euler5", "metric": "fd"}
    later = {"table": "main", "row": "sit-xl2-256-mixflow", "sampler": "heun250-cfg1.5", "metric": "fid"}
    answers = [{"asks": "Does MixFlow help digits?", **asked}, {"asks": "And ImageNet?", **later}]
    said = {"made": ["seeds", "digits"], "shown": ["main", "table8"], "answers": answers}
    (root / "more.yaml").write_text(yaml.safe_dump({"tables": {"seeds": SEEDS}, "report": said}))
    config = load_config(ROOT / "config.yaml", root / "more.yaml")
    for table in said["made"]:
        make_table(config, root, table)
    make_table(config, root, "main", ["sit-xl2-256", "sit-xl2-256-mixflow"])
    make_report(config, ["config.yaml"], root / "index.html", root=root)
    return root / "index.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@browsing
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 1280])
def test_it_fits_and_can_be_read(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.requests.clear()
    browser.console.clear()
    browser.show(page, width, scheme=scheme)
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask(WIDE) == []
    seen, low = browser.ask(CONTRAST)
    assert seen > 500
    assert low == []
    assert browser.ask(SHIFT) == 0
    assert [address for address in browser.requests if not address.startswith("data:")] == [page.as_uri()]
    assert browser.console == []
    browser.screenshot(PICTURES / f"{width}-{scheme}.png")


@browsing
def test_a_click_on_a_number_shows_where_it_comes_from(browser: Browser, page: Path) -> None:
    browser.show(page, 1280)
    hidden = "document.getElementById('panel').hidden"
    assert browser.ask(hidden) is True
    place = place_of(browser, FIRST)
    browser.move(*place)
    tip = browser.ask("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    assert tip.startswith("digits-base, euler5 · seed 100 · commit 01234567 ·")
    browser.click(*place)
    assert browser.ask(hidden) is False
    told = browser.ask("document.getElementById('panel').innerText")
    for words in ("base: Euler 5, FD", "samplers.euler5", "01234567", "20 November 2026", "--forcerun"):
        assert words in told
    assert browser.ask("document.activeElement.id") == "panel"
    over = browser.ask(f"""(() => {{
        const a = document.querySelector('{FIRST}').getBoundingClientRect();
        const b = document.getElementById('panel').getBoundingClientRect();
        return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    }})()""")
    assert over is False
    browser.screenshot(PICTURES / "number.png", whole=False)
    browser.press("Escape")
    assert browser.ask(hidden) is True
    assert browser.ask(f"document.activeElement === document.querySelector('{FIRST}')") is True
    browser.press("Enter")  # by keyboard alone
    assert browser.ask(hidden) is False
    browser.press("Escape")


@browsing
def test_a_tap_on_a_phone(browser: Browser, page: Path) -> None:
    browser.show(page, 320, 640, scheme="dark")
    browser.click(*place_of(browser, FIRST))
    panel = "document.getElementById('panel')"
    assert browser.ask(f"{panel}.getBoundingClientRect().width") == 320
    assert browser.ask(f"{panel}.scrollWidth <= {panel}.clientWidth") is True
    time.sleep(0.2)
    above = f"document.querySelector('{FIRST}').getBoundingClientRect().bottom <= {panel}.getBoundingClientRect().top"
    assert browser.ask(above) is True
    browser.screenshot(PICTURES / "number-320.png", whole=False)


@browsing
def test_colours_can_be_chosen(browser: Browser, page: Path) -> None:
    browser.show(page, 1280, scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = browser.ask(colour)
    for wanted in ("Light", "Dark"):
        browser.click(*place_of(browser, "#theme"))
        assert wanted in browser.ask("document.getElementById('theme').textContent")
        assert (browser.ask(colour) == light) == (wanted == "Light")
    assert browser.ask(CONTRAST)[1] == []
    browser.click(*place_of(browser, "#theme"))
    assert browser.ask(colour) == light


@browsing
def test_it_can_be_read_without_its_script(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(page, 1280)
        browser.click(*place_of(browser, FIRST))
        wanted = browser.ask(f"document.querySelector('{FIRST}').hash.slice(1)")
        assert browser.ask(f"document.getElementById('{wanted}').checkVisibility()") is True
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_snakemake_makes_it_with_its_tables(house: House, tmp_path: Path) -> None:
    house = copy_of(house, tmp_path)
    said = {"report": {"made": ["digits"], "shown": ["main"], "answers": [], "slow_flow": ["digits_slow_flow"]}}
    small = house.folder / "small.yaml"
    small.write_text(yaml.safe_dump({**yaml.safe_load(small.read_text()), **said}))
    config = load_config(*(house.folder / name for name in ("config.yaml", "rehearsal.yaml", "small.yaml")))
    assert house.left("report") == Plan(config, ["report"], root=house.folder).counts() == {"report": 1}
    result = house.snakemake("report")
    assert result.returncode == 0, result.stderr[-3000:]
    text = (house.folder / paths.report()).read_text("utf-8")
    assert "REHEARSAL" in text
    assert "--configfile rehearsal.yaml small.yaml" in text
    assert str(house.folder) not in text
    assert house.left("report") == {}
    result = house.snakemake("report", "--config", "report={title: Another}")
    assert "the config files say another report" in result.stdout + result.stderr
