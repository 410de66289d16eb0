"""The page itself: our HTML, styles and scripts, uPlot, and the data of the runs in one file.

The data is gzip-compressed JSON in base64, in script elements of a type that browsers do not run; the page unpacks each
when it is needed. A content security policy allows the page's own scripts by their hash, and no network.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from meds_megatron import atomic
from meds_megatron.errors import UserError
from meds_megatron.report.contents import RunContents, run_contents
from meds_megatron.run.reader import read_run

SCRIPTS = ["data.js", "dom.js", "charts.js", "curves.js", "mistakes.js", "problem.js", "main.js"]
TEXT_MIB = 64.0


def write_report(run_dirs: Sequence[str | Path], out: str | Path, text_mib: float = TEXT_MIB) -> None:
    """Writes the report of the runs, at least one, as the file `out`, which appears whole or not at all.

    `text_mib` limits the texts of responses, of all runs together, before compression (`contents.run_contents`). Raises
    UserError for a directory without a run, a damaged file of a run, and where `out` cannot be written.
    """
    runs = [read_run(directory) for directory in run_dirs]
    contents = [run_contents(run, int(text_mib * 2**20 / len(runs))) for run in runs]
    out = Path(out).expanduser().absolute()
    try:
        with atomic.open_atomic(out) as file:
            file.writelines(page(contents))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): make space, or name another file.") from error


def page(contents: Sequence[RunContents]) -> Iterator[str]:
    """The file, piece by piece; what is shown first comes first."""
    library = _asset("vendor", "uPlot.iife.min.js")
    own = "\n".join(['"use strict";', *(_asset("assets", name) for name in SCRIPTS)])
    style = _asset("vendor", "uPlot.min.css") + _asset("assets", "report.css")
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in (library, own))
    head, body = _asset("assets", "report.html").split("<!-- contents -->")
    yield head.replace("SCRIPT_HASHES", hashes).replace("/* styles */", style)
    yield _data("overview", [run.overview for run in contents])
    yield f"<script>{library}</script>\n<script>{own}</script>\n"
    for number, run in enumerate(contents):
        yield _data(f"mistakes-{number}", run.mistakes)
        for place, part in enumerate(run.parts):
            yield _data(f"part-{number}-{place}", part)
    yield body


def _data(name: str, value: object) -> str:
    packed = base64.b64encode(gzip.compress(json.dumps(value).encode(), compresslevel=6, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="{name}">{packed}</script>\n'


def _asset(*path: str) -> str:
    return files("meds_megatron.report").joinpath(*path).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
