"""The page of `grgauge report` in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from cli.studies import STUDIES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
PHONE, DESK = (390, 844), (1280, 900)

PROBE = """<script>
addEventListener("load", () => {
  const all = (root, what) => [...root.querySelectorAll(what)];
  const seen = all(document, "svg[aria-label]").filter(svg => svg.clientWidth);
  const outside = all(document, "main *").filter(
    part => !part.closest(".scroller") && part.getBoundingClientRect().right > innerWidth + 1);
  const over = (p, q) => Math.min(p.x + p.width, q.x + q.width) - Math.max(p.x, q.x) > 2
    && Math.min(p.y + p.height, q.y + q.height) - Math.max(p.y, q.y) > 5;
  const collide = seen.flatMap(svg => {
    const boxes = all(svg, "text").map(text => [text.textContent, text.getBBox()]).filter(([, box]) => box.width);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) => over(p, q)).map(([b]) => a + " / " + b));
  });
  const scroller = document.querySelector(".scroller");
  seen[0]?.querySelector(".dot")?.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  parent.document.documentElement.dataset.probe = JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, collide, pictures: seen.length,
    outside: outside.map(part => part.outerHTML.slice(0, 80)),
    background: getComputedStyle(document.body).backgroundColor,
    letters: Math.min(...seen.flatMap(svg => all(svg, "text")).map(
      text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)),
    table: scroller && [scroller.scrollWidth, scroller.clientWidth],
    tip: document.getElementById("tip").textContent, title: document.title});
});
</script></body>"""


def opened(page, folder, size, *flags):
    """What the probe saw in the page, and what the console said."""
    text = page.read_text(encoding="utf-8")
    # the probe may run only where the page's own ban on foreign scripts is lifted
    text = re.sub(r"script-src '[^']+'", "script-src 'unsafe-inline'", text).replace("</body>", PROBE)
    # in a frame, since no window of chromium's is narrower than 500 pixels
    frame = f'<iframe srcdoc="{html.escape(text)}" style="border: 0; width: {size[0]}px; height: {size[1]}px"></iframe>'
    outside = folder / "frame.html"
    outside.write_text(f'<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">{frame}')
    dom, console = browser(outside, folder, DESK, "--dump-dom", *flags)
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, console
    return json.loads(html.unescape(found[1])), console


def browser(page, folder, size, *flags):
    window = f"--window-size={size[0]},{size[1]}"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", window, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize("size", [PHONE, DESK])
@pytest.mark.parametrize("name", [f.__name__ for f in STUDIES])
def test_no_page_overflows_its_window(name, size, pages, tmp_path):
    seen, console = opened(pages[name], tmp_path, size)
    assert seen["inner"] == size[0]
    assert seen["scroll"] <= size[0]
    assert seen["outside"] == []
    assert console == []
    assert seen["title"].endswith(" · GR-Gauge")
    if name != "empty":
        assert seen["pictures"] == 3  # of each the one that was drawn for this width
        assert seen["letters"] > 8.5
        assert seen["collide"] == []
    if name == "typical":
        assert seen["table"][0] <= seen["table"][1]  # cards on a phone
        assert seen["title"].startswith("Train with lr 4e-3 and batch 48")
        assert re.match(r"#\d stopped early", seen["tip"])


@needs_browser
def test_dark_follows_the_reader(pages, tmp_path):
    light, _ = opened(pages["typical"], tmp_path, DESK)
    dark, console = opened(pages["typical"], tmp_path, DESK, "--blink-settings=preferredColorScheme=0")
    brightness = [sum(map(int, re.findall(r"\d+", seen["background"])[:3])) for seen in (light, dark)]
    assert brightness[0] > 700 > 100 > brightness[1]
    assert console == []


@needs_browser
@pytest.mark.parametrize("name", ["typical", "awkward"])
def test_the_page_as_written_runs_its_own_script_and_no_other(name, pages, tmp_path):
    dom, console = browser(pages[name], tmp_path, DESK, "--dump-dom")
    assert console == []
    assert re.search(r'<g class="trial[^>]*aria-label="#0 ', dom)  # made by the script out of a title
    foreign = tmp_path / "foreign.html"
    text = pages[name].read_text(encoding="utf-8")
    foreign.write_text(text.replace("</body>", "<script>document.title = 'owned'</script></body>"), encoding="utf-8")
    dom, console = browser(foreign, tmp_path, DESK, "--dump-dom")
    assert "<title>owned" not in dom
    assert "Content Security Policy" in " ".join(console)


@needs_browser
def test_it_can_be_looked_at_and_printed(pages, tmp_path):
    picture, paper = tmp_path / "page.png", tmp_path / "page.pdf"
    browser(pages["typical"], tmp_path, PHONE, f"--screenshot={picture}")
    browser(pages["typical"], tmp_path, DESK, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    assert paper.read_bytes().startswith(b"%PDF")
