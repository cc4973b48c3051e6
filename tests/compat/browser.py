"""Uses the page in headless Chromium, and writes down what it showed. Runs in .venv-compat: browser.py URL FOUND.

Each part is a use of its own, in a browser without memory of the others; what it returns, or how it failed, goes into
the file FOUND as JSON, for pytest to judge.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from pathlib import Path

import numpy as np
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, sync_playwright
from visiting import CHROMIUM, FLAGS, Visit  # beside this file

VOWELS, WHOLE, NAMES, CONTEXTUAL, WIDE, VAD = (
    f"{name}/1" for name in ("vowels", "whole", "names", "contextual", "wide", "vad")
)
SPEECH = Path(__file__).parent.parent / "data" / "speech.npz"


def example(visit: Visit) -> dict:
    visit.choose(VOWELS)
    visit.fast()
    visit.run()
    visit.page.locator("#values summary").click()
    visit.page.wait_for_selector("#value-table tbody tr")
    table = visit.page.locator("#value-table tbody tr").all()
    return visit.result(
        legend=visit.page.locator("#output-legend .leads").inner_text(),
        table=[row.locator("td").all_inner_texts() for row in table],
        live=visit.page.text_content("#live"),
        latency=visit.page.inner_text("#fact-latency"),
    )


def at_a_pace(visit: Visit) -> dict:
    """The answers arrive one after another, while the steps are sent."""
    visit.choose(VOWELS)
    visit.page.locator("#rate").fill("20")  # ten steps a second
    visit.page.click("#start")
    counts = []
    while visit.page.locator("#stop").is_enabled():
        counts.append(int(visit.page.inner_text("#fact-steps").split()[0]))
        visit.page.wait_for_timeout(100)
    return {"counts": counts, "error": visit.error}


def pause_and_stop(visit: Visit) -> dict:
    page = visit.page
    visit.choose(VOWELS)
    page.locator("#rate").fill("10")
    page.click("#start")
    page.wait_for_selector("#output-chart path.line[d*=L]")
    page.click("#pause")
    page.wait_for_timeout(200)
    paused = page.inner_text("#fact-steps")
    name = page.inner_text("#pause")
    page.wait_for_timeout(900)
    still = page.inner_text("#fact-steps")
    page.click("#pause")
    page.locator("#fact-steps", has_not_text=paused).wait_for()
    page.click("#stop")
    visit.ended()
    return {
        "paused": paused,
        "still": still,
        "name": name,
        "stopped": page.inner_text("#fact-steps"),
        "error": visit.error,
    }


def csv(visit: Visit) -> dict:
    """The example by way of CSV, its columns in another order; and what is said about what can't be read."""
    visit.choose(VOWELS)
    visit.fast()
    visit.source("csv")
    visit.page.click("#csv-fill")
    text = visit.page.input_value("#csv")
    lines = [line.split(",") for line in text.strip().splitlines()]
    visit.page.fill("#csv", "\n".join(";".join(reversed(line)) for line in lines))
    visit.run()
    found = visit.result(header=lines[0])
    row = ",".join(["0"] * 12)
    faults = {}
    for name, content in {
        "empty": "",
        "columns": f"{row}\n1,2,3",
        "word": f"{row}\n{row[:-1]}abc",
        "gap": f"{row}\n{row[:-1]}",
        "header": ",".join(lines[0]),
        "stranger": ",".join([*lines[0][:11], "lpc_99"]),
        "quote": '"1"x,2',
        "nan": f"{row}\n{row[:-1]}nan",
        "inf": f"{row[:-1]}-inf",
    }.items():
        visit.page.fill("#csv", content)
        visit.page.click("#start")
        visit.page.locator("#try-error:not(:empty)").wait_for()
        visit.ended()
        faults[name] = visit.error
    return {**found, "faults": faults}


def draw_by_pointer(visit: Visit) -> dict:
    page = visit.page
    visit.choose(VOWELS)
    visit.fast()
    visit.source("draw")
    page.select_option("#draw-feature", "2")
    page.fill("#draw-steps", "30")
    page.fill("#draw-low", "-2")
    page.fill("#draw-high", "2")
    page.select_option("#draw-others", "zero")
    page.locator('[data-shape="flat"]').click()
    box = page.locator("#draw").bounding_box()
    at = lambda x, y: (box["x"] + x * (box["width"] - 1), box["y"] + y * box["height"])  # noqa: E731
    page.mouse.move(*at(0, 0.75))
    page.mouse.down()
    page.mouse.move(*at(1, 0.25), steps=15)
    page.mouse.up()
    visit.run()
    return visit.result(input=visit.plotted("#input-chart"))


def draw_by_keys(visit: Visit) -> dict:
    page = visit.page
    visit.choose(VOWELS)
    visit.fast()
    visit.source("draw")
    page.fill("#draw-steps", "5")
    page.fill("#draw-low", "0")
    page.fill("#draw-high", "1")
    page.select_option("#draw-others", "zero")
    page.locator('[data-shape="flat"]').click()
    page.locator("#draw").focus()
    page.keyboard.press("Home")
    for key in ("ArrowUp", "Shift+ArrowUp", "ArrowRight", "PageDown", "End", "PageUp", "PageUp", "PageUp", "PageUp"):
        page.keyboard.press(key)
    told = page.text_content("#draw-value")
    visit.run()
    return visit.result(told=told)


def keyboard_alone(visit: Visit) -> dict:
    """From the top of the page to a result, without a pointer."""
    page = visit.page
    page.keyboard.press("Tab")
    first = focused(page)
    page.keyboard.press("Enter")  # the link that skips to the panel
    way = []
    while focused(page) != "start":
        page.keyboard.press("Tab")
        way.append(focused(page))
        if way[-1] == "try-model":
            while page.input_value("#try-model") != VOWELS:
                page.keyboard.press("ArrowDown")
                page.wait_for_timeout(50)
            page.wait_for_selector("#start:enabled")
        if way[-1] == "rate":
            page.keyboard.press("End")
        if len(way) > 30:
            raise AssertionError(f"Start was not reached: {way}")
    outline = page.locator("#start").evaluate("(it) => getComputedStyle(it).outlineStyle")
    page.keyboard.press("Enter")
    page.locator("#fact-steps", has_text=re.compile(r"^(\d+) of \1$")).wait_for()
    visit.ended()
    return visit.result(first=first, way=way, outline=outline, after=focused(page))


def focused(page: Page) -> str:
    return page.evaluate("() => document.activeElement.id || document.activeElement.className")


def whole(visit: Visit) -> dict:
    """A model that needs the whole sequence answers after its end."""
    visit.choose(WHOLE)
    visit.fast()
    visit.run()
    return visit.result(mode=visit.page.inner_text("#try-mode"))


def generate(visit: Visit) -> dict:
    page = visit.page
    visit.choose(NAMES)
    page.fill("#made-prompt", "b")
    page.fill("#made-temperature", "0.9")
    page.fill("#made-seed", "5")
    page.fill("#made-num", "3")
    visit.run()
    made = page.locator(".made-item .text").all_inner_texts()
    csv = visit.downloaded()
    page.fill("#made-prompt", "bxb")
    page.click("#start")
    page.locator("#try-error:not(:empty)").wait_for()
    return {"made": made, "csv": csv, "error": visit.error}


def contextual(visit: Visit) -> dict:
    """A sequence is given its context once; there is no example, so the steps are CSV."""
    page = visit.page
    visit.choose(CONTEXTUAL)
    visit.fast()
    for at, value in enumerate(("0.5", "-1", "2")):
        page.fill(f"#given-season-{at}", value)
    page.fill("#csv", "1 2 3\n4 5 6\n\n-1 0 0.25\n")
    visit.run()
    sources = page.locator("#sources label:visible").all_inner_texts()
    return visit.result(sources=sources)


def wide(visit: Visit) -> dict:
    """A step of many values, and no example."""
    page = visit.page
    visit.choose(WIDE)
    visit.fast()
    page.fill("#csv", "\n".join("\t".join(str((step + at) % 7) for at in range(512)) for step in range(40)))
    visit.run()
    return visit.result(legend=page.locator("#input-legend li").all_inner_texts())


def signal(visit: Visit) -> dict:
    """Speech as samples, a chunk a step; and a curve that is stretched over the samples of its steps."""
    page = visit.page
    visit.choose(VAD)
    visit.fast()
    with np.load(SPEECH) as clip:
        samples = clip["samples"].astype(np.float32) / 32768
    text = "\n".join(map(repr, samples.tolist()))
    page.set_input_files("#csv-file", {"name": "speech.csv", "mimeType": "text/csv", "buffer": text.encode()})
    page.locator("#csv[placeholder^=speech]").wait_for()
    visit.run()
    found = visit.result(note=page.get_attribute("#csv", "placeholder"), width=512)
    visit.sent.clear()
    visit.source("draw")
    page.fill("#draw-steps", "3")
    page.locator('[data-shape="ramp"]').click()
    visit.run()
    return {**found, "drawn": visit.rows_sent(512), "drawn_csv": visit.downloaded()}


def models(visit: Visit) -> dict:
    item = visit.page.locator('[data-key="vowels/1"]')
    item.locator("summary").press("Enter")
    item.locator("dl").first.wait_for()
    return {"text": item.inner_text(), "list": visit.page.locator(".model summary .title").all_inner_texts()}


def theme(visit: Visit) -> dict:
    """The system's at first, then the one that was chosen, which is remembered."""
    page = visit.page
    colour = lambda: page.evaluate("() => getComputedStyle(document.body).backgroundColor")  # noqa: E731
    system = colour()
    button = page.locator("#theme")
    label = button.get_attribute("aria-label")
    button.press("Enter")
    chosen = colour()
    page.reload()
    page.wait_for_selector("#start:enabled")
    return {"system": system, "label": label, "chosen": chosen, "reloaded": colour()}


def accessible(visit: Visit) -> dict:
    """What axe-core finds, with a model open, results there, and an error."""
    visit.page.locator('[data-key="vowels/1"] summary').click()
    visit.page.locator('[data-key="vowels/1"] dl').first.wait_for()
    visit.choose(VOWELS)
    visit.fast()
    visit.run()
    visit.page.locator("#values summary").click()
    visit.source("csv")
    visit.page.fill("#csv", "1,2")
    visit.page.click("#start")
    visit.page.wait_for_timeout(300)
    found = violations(visit.page)
    visit.source("draw")
    found += violations(visit.page)
    visit.choose(NAMES)
    return {"violations": found + violations(visit.page)}


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{each['impact']} {each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]


def narrow(visit: Visit) -> dict:
    """On a phone nothing is wider than the screen; and nothing moves after it was shown."""
    shifts = """() => new Promise((resolve) => new PerformanceObserver((list) => resolve(
        list.getEntries().reduce((sum, each) => sum + (each.hadRecentInput ? 0 : each.value), 0)
    )).observe({type: "layout-shift", buffered: true}) || setTimeout(() => resolve(0), 300))"""
    shift = visit.page.evaluate(shifts)
    visit.choose(VOWELS)
    visit.fast()
    visit.run()
    width = visit.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    return {"width": width, "shift": shift, "reached": is_seen(visit.page.locator("#output-chart"))}


def is_seen(part: Locator) -> bool:
    part.page.wait_for_timeout(500)
    box = part.bounding_box()
    return box is not None and box["y"] < 900


PARTS = {
    "example": (example, {}),
    "at_a_pace": (at_a_pace, {}),
    "pause_and_stop": (pause_and_stop, {}),
    "csv": (csv, {}),
    "draw_by_pointer": (draw_by_pointer, {}),
    "draw_by_keys": (draw_by_keys, {}),
    "keyboard_alone": (keyboard_alone, {}),
    "whole": (whole, {}),
    "generate": (generate, {}),
    "contextual": (contextual, {}),
    "wide": (wide, {}),
    "signal": (signal, {}),
    "models": (models, {}),
    "theme_light": (theme, {"color_scheme": "light"}),
    "theme_dark": (theme, {"color_scheme": "dark"}),
    "accessible_light": (accessible, {"color_scheme": "light", "bypass_csp": True}),
    "accessible_dark": (accessible, {"color_scheme": "dark", "bypass_csp": True}),
    "narrow": (narrow, {"width": 360}),
}


def main(url: str, found: Path) -> None:
    results = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, (part, options) in PARTS.items():
            result = results[name] = {}
            visit = None
            try:
                visit = Visit(browser, url, **options)
                result.update(part(visit))
            except Exception:  # noqa: BLE001  pytest is told
                result["failed"] = traceback.format_exc()
            if visit is not None:
                result.update(said=visit.said, hosts=sorted(visit.hosts))
                visit.context.close()
        browser.close()
    found.write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
