"""Pages opened in a browser, as a reader has them: in light and in dark, on a screen and on a phone."""
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
THEMES = ("light", "dark")
WIDTHS = {"screen": 1300, "phone": 390}
# Colours that fade in would be measured half way.
# What is folded, or comes when one scrolls or searches, is read too.
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
UNFOLD = """
document.head.append(Object.assign(document.createElement("style"), {textContent: arguments[0]}));
for (const one of document.querySelectorAll("article details")) one.open = true;
for (const one of document.querySelectorAll("article .toggle-hidden")) one.classList.remove("toggle-hidden");
for (const one of document.querySelectorAll("#pst-search-dialog")) one.open = true;
for (const one of document.querySelectorAll("#pst-back-to-top")) one.style.display = "flex";
"""
FORMULAS = "const done = arguments[0]; window.MathJax?.startup ? MathJax.startup.promise.then(done) : done()"
THEME = "Object.assign(document.documentElement.dataset, {theme: arguments[0], mode: arguments[0]})"
FAULTS = "return {contrast: faint(), width: wide(), pictures: wordless(), formulas: unset()}"


@contextmanager
def browser() -> Iterator:
    "Chromium without a window; skips where it, its driver or selenium is missing."
    pytest.importorskip("selenium", reason="pages are opened in a browser: selenium is not installed")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("pages are opened in a browser: chromium and chromium-driver are not installed")
    options = ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--force-device-scale-factor=1"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")   # Chromium has none for root
    chrome = Chrome(options, ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def resize(chrome, width: int) -> None:
    "Give the page a window of this width; below 500 px, as a phone has it."
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def faults(chrome, page: Path) -> dict[tuple[str, str, str], list[str]]:
    "What a reader cannot read on a page, by kind of fault, theme and window."
    chrome.get(page.resolve().as_uri())
    chrome.execute_async_script(FORMULAS)
    chrome.execute_script(UNFOLD, STILL)
    found = {}
    for window, width in WIDTHS.items():
        resize(chrome, width)
        for theme in THEMES:
            chrome.execute_script(THEME, theme)
            for kind, lines in chrome.execute_script(f"{SCRIPT}\n{FAULTS}").items():
                found[kind, theme, window] = lines
    return {where: lines for where, lines in found.items() if lines}


def report(found: dict[tuple[str, str, str], list[str]]) -> str:
    "One line for each fault."
    return "\n".join(f"{', '.join(where)}: {line}" for where, lines in found.items() for line in lines)


class Anchors(HTMLParser):
    "The links and the anchors of a page."

    def __init__(self, page: Path):
        super().__init__()
        self.links, self.anchors = set(), {"", "top"}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value}
        self.anchors |= {values.get("id", ""), values.get("name", "") if tag == "a" else ""}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])


def dead_links(page: Path, known: dict[Path, set[str]]) -> list[str]:
    "Links of a page to files or anchors that don't exist; `known` keeps the anchors of each file."
    dead = []
    for link in sorted(Anchors(page).links):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
        if target not in known and target.suffix == ".html" and target.exists():
            known[target] = Anchors(target).anchors
        anchors = known.get(target, {""})
        anchor, _, _ = unquote(parts.fragment).partition(":~:")   # what follows is text to scroll to
        if not target.exists() or anchor not in anchors:
            dead.append(link)
    return dead


def megabytes(*paths: Path) -> float:
    "Size of files on disk."
    return sum(path.stat().st_size for path in paths) / 1e6
