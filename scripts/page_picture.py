"""Take the README's pictures of the page, light and dark, of a server under load.

python -m scripts.page_picture REPOSITORY FOLDER

Serves a repository that has the models `vowels` and `waterflow`, loads both by `rnnserve bench` for a minute, as
clients elsewhere would, while the page is open; then streams the example through `vowels`, and takes page.png and
page-dark.png. The browser's part runs in .venv-compat, which `make test-compat` makes.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BROWSER = ROOT / ".venv-compat" / "bin" / "python"
CLI = (sys.executable, "-m", "service.client.cli", "bench")
LOADS = (
    ("vowels", "--kind", "frames", "--sessions", "32", "--rate", "20", "--streams", "1,2,4,3,6,6"),
    ("waterflow", "--rate", "5", "--streams", "16,32,16,48,24,24"),
)
PART_S = 15
"""Of each number of streams in turn."""
SHOT_AFTER_S = 64
SIZE = {"width": 1180, "height": 1300}


def main(repository: Path, folder: Path) -> None:
    """Serve, load, and have the pictures taken."""
    from benchmarks.processes import rnnserve  # not in the environment of the browser

    with rnnserve(repository) as server:
        more = ("--seconds", str(PART_S), "--server", server.target)
        clients = [subprocess.Popen([*CLI, *load, *more]) for load in LOADS]
        try:
            subprocess.run([BROWSER, __file__, "--shoot", f"http://127.0.0.1:{server.http_port}/", folder], check=True)
        finally:
            for client in clients:
                client.terminate()
                client.wait()


def shoot(url: str, folder: Path) -> None:
    """Watch the page for a minute, try a model, and take the pictures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        pages = {}
        for theme, name in (("light", "page.png"), ("dark", "page-dark.png")):
            context = browser.new_context(color_scheme=theme, viewport=SIZE, device_scale_factor=1.5)
            pages[name] = context.new_page()
            pages[name].goto(url)
            pages[name].wait_for_selector("#start:enabled")
        pages["page.png"].wait_for_timeout(SHOT_AFTER_S * 1000)
        for name, page in pages.items():
            page.select_option("#try-model", "vowels/1")
            page.wait_for_selector("#start:enabled")
            page.select_option("#example", "1")
            page.click("#start")
            page.wait_for_selector("#stop:enabled")
            page.wait_for_selector("#stop:disabled")
            page.mouse.move(5, 5)
            page.wait_for_timeout(300)
            card = page.locator("#results").bounding_box()
            clip = {"x": 0, "y": 0, "width": SIZE["width"], "height": card["y"] + card["height"] + 24}
            page.screenshot(path=str(folder / name), clip=clip)
        browser.close()


if __name__ == "__main__":
    if sys.argv[1] == "--shoot":
        shoot(sys.argv[2], Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
