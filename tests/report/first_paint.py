"""Time that a browser takes to show a report of many wrong responses.

    python -m tests.report.first_paint [RESPONSES]

Prints milliseconds from the opening of the file to the first contentful paint and until all curves are there, and
those of the list of mistakes, of a search in it and of one problem.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meds_megatron.report.page import write_report
from tests.report.browser import Browser
from tests.report.planted_run import RESPONSES, write_planted_run

PROMPTS_PER_STEP = 128
WRONG_PER_STEP = PROMPTS_PER_STEP * RESPONSES * 3 // 4
RESPONSE_WORDS = 100


def main(responses: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        write_planted_run(run, -(-responses // WRONG_PER_STEP), problems=1000, prompts_per_step=PROMPTS_PER_STEP)
        lengthen(run)
        began = time.perf_counter()
        write_report([run], run / "report.html", text_mib=256)
        written = time.perf_counter() - began
        size = (run / "report.html").stat().st_size / 2**20
        print(f"written in {written:.1f} s, {size:.1f} MiB")
        measure(run / "report.html")


def lengthen(run: Path) -> None:
    """Puts RESPONSE_WORDS random words of a vocabulary of 5000 before each response."""
    random = np.random.default_rng(0)
    vocabulary = np.array(["".join(random.choice(list("etaoinshrdlu"), 5)) for _ in range(5000)])
    for path in (run / "rollouts").iterdir():
        table = pq.read_table(path)
        column = table.column_names.index("response")
        words = random.choice(vocabulary, (len(table), RESPONSE_WORDS))
        texts = [" ".join([*some, text]) for some, text in zip(words, table["response"].to_pylist(), strict=True)]
        pq.write_table(table.set_column(column, "response", pa.array(texts)), path)


def measure(report: Path) -> None:
    browser = Browser()
    try:
        browser.open(report)
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        browser.wait_for("performance.getEntriesByName('first-contentful-paint').length")
        print(f"first contentful paint after {browser.evaluate(paint):.0f} ms")
        browser.wait_for("[...document.querySelectorAll('.panel')].every((panel) => panel.querySelector('canvas'))")
        print(f"all curves after at most {browser.evaluate('performance.now()'):.0f} ms")
        browser.wait_for("document.readyState === 'complete'")
        for name, action, done in (
            ("mistakes", "location.hash = '#/mistakes'", "document.querySelectorAll('.row').length > 50"),
            ("search", SEARCH, "document.querySelectorAll('.row').length < 5"),
            ("problem", "document.querySelector('.row').click()", "document.querySelector('.response pre')"),
        ):
            began = time.perf_counter()
            browser.evaluate(action)
            browser.wait_for(done)
            print(f"{name} after {1000 * (time.perf_counter() - began):.0f} ms")
        print(f"responses in the page: {browser.evaluate(COUNT)}; errors: {browser.errors}")
    finally:
        browser.close()


SEARCH = """
(() => { const search = document.getElementById('search'); search.value = '(problem 77) 162';
search.dispatchEvent(new Event('input')); })()
"""
COUNT = "data('overview').then(([run]) => run.wrong)"

if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
