"""Look at a run's report as people will: wide and light, narrow and dark.

    python benchmarks/report_screenshots.py RUN docs/images

Writes report-light.png and report-phone-dark.png. Needs chromium on the path.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

VIEWS = {
    "report-light": {"viewport": {"width": 1120, "height": 1500}, "color_scheme": "light"},
    "report-phone-dark": {"viewport": {"width": 390, "height": 1500}, "color_scheme": "dark"},
}


def main() -> None:
    run, target = Path(sys.argv[1]), Path(sys.argv[2])
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        raise SystemExit("There is no chromium on the path.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, view in VIEWS.items():
            page = browser.new_context(**view, offline=True).new_page()
            page.goto((run / "report.html").resolve().as_uri())
            page.screenshot(path=target / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
