"""A real browser without a screen: what it makes of a page, what it complains of, what it asks."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome")

SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing is reached, not by the browser itself either
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",
)

HEAD = """<script>
window.problems = [];
const note = (what) => window.problems.push(String(what));
addEventListener("error", (event) => note(event.message));
addEventListener("unhandledrejection", (event) => note(event.reason));
document.addEventListener("securitypolicyviolation", (event) => note(event.blockedURI));
</script>"""


class Seen(NamedTuple):
    """What a browser saw.

    Attributes:
        answer: what the script returned.
        complaints: its console, uncaught errors, and what the page's own policy forbids.
        requests: addresses that the page asked for.
    """

    answer: Any
    complaints: list[str]
    requests: list[str]


def browser() -> str:
    """Return the browser's program."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    raise AssertionError(
        "no browser to look at the report with: apt-get install chromium (as root, on Debian)"
    )


def look(page: Path, script: str, home: Path, width: int = 1280) -> Seen:
    """Open a page, run a script in it when it is loaded, and return what happened.

    The page is in a frame, because a window without a screen is at least 500 pixels wide.

    Args:
        page: the file.
        script: the body of an async JavaScript function; what it returns is the answer, as JSON.
        home: an empty folder for the browser's own files.
        width: of the screen, in CSS pixels.
    """
    tail = (
        f"<script>(async () => {{ {script} }})().then((answer) => {{\n"
        'const told = parent.document.createElement("pre"); told.id = "told";\n'
        'const requests = performance.getEntriesByType("resource").map((each) => each.name);\n'
        "told.textContent = JSON.stringify({answer, problems, requests});\n"
        "parent.document.body.append(told); });</script>"
    )
    text = page.read_text(encoding="utf-8")
    text = text.replace("<head>", f"<head>{HEAD}", 1).replace("</body>", f"{tail}</body>", 1)
    frame = home / "frame.html"
    style = f"border: 0; width: {width}px; height: 900px"
    frame.write_text(
        f'<!doctype html><body style="margin: 0"><iframe style="{style}" '
        f'srcdoc="{html.escape(text)}"></iframe></body>',
        encoding="utf-8",
    )
    command = [browser(), *SWITCHES, f"--window-size={max(width, 500)},900"]
    command += [f"--user-data-dir={home / 'profile'}", "--dump-dom", f"file://{frame}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(html.unescape(found[1]))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(told["answer"], told["problems"] + console, told["requests"])
