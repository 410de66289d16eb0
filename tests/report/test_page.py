"""The report in a real browser, opened from its file."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meds_megatron.report.page import write_report
from tests.report.planted_run import HOSTILE, question, write_planted_run

CHARTS = [
    "Validation accuracy by data set",
    "Accuracy of rollouts",
    "Reward",
    "Entropy",
    "KL",
    "Clip fraction",
    "Response length (tokens)",
    "Mismatch of trainer and engine log-probs",
    "Keys",
    "Clusters",
    "Hit rate",
    "Mean penalty",
    "Eigenvalue ratio (largest of all)",
    "Tokens per second",
    "Seconds of a step by phase",
]
COLOURED_PIXELS = """
[...document.querySelectorAll(".panel")].map((panel) => {
  const canvas = panel.querySelector("canvas");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let coloured = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    const [r, g, b, a] = pixels.slice(i, i + 4);
    if (a > 128 && Math.max(r, g, b) - Math.min(r, g, b) > 60) coloured++;
  }
  return [panel.querySelector("h3").textContent, coloured];
})
"""
"""Title of each chart and how many of its pixels have the colour of a curve: axes and grid are grey."""
NOTHING_RAN = "window.ran === undefined && document.querySelectorAll('main img, main script').length === 0"


@pytest.fixture(scope="module")
def report(planted: Path) -> Path:
    write_report([planted], planted / "report.html")
    return planted / "report.html"


@pytest.fixture(autouse=True)
def no_errors_and_no_network(browser):
    browser.errors.clear()
    browser.requests.clear()
    browser.system_colours("light")
    yield
    assert browser.errors == []
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "about"}


def chart(title: str) -> str:
    """JavaScript for the uPlot object of a chart."""
    return f"document.querySelector('[aria-label^={json.dumps(title + '.')}]').chart"


def drawn(browser) -> dict[str, int]:
    browser.wait_for("[...document.querySelectorAll('main .panel')].every((panel) => panel.querySelector('canvas'))")
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return dict(browser.evaluate(COLOURED_PIXELS))


def test_every_curve_is_drawn(browser, report):
    browser.open(report)
    pixels = drawn(browser)
    assert set(CHARTS) <= set(pixels)
    assert {title: pixels[title] for title in CHARTS if pixels[title] < 100} == {}


def test_a_curve_has_the_values_of_the_metrics(browser, planted, report):
    browser.open(report)
    drawn(browser)
    shown = browser.evaluate(f"{chart('Entropy')}.data")
    lines = [json.loads(line) for line in (planted / "metrics.jsonl").read_text().splitlines()]
    assert shown[0] == [line["step"] for line in lines]
    assert shown[1][0] is None
    np.testing.assert_allclose(shown[1][1:], [line["policy/entropy"] for line in lines[1:]], rtol=1e-3)


def test_phases_are_stacked_up_to_the_time_of_the_step(browser, report):
    browser.open(report)
    drawn(browser)
    shown = browser.evaluate(f"{chart('Seconds of a step by phase')}.data")
    assert shown[0] == list(range(1, 13))
    # Rollout 3.0, update 2.0 and what is in no phase, 0.5, the highest sum first.
    assert [stack[0] for stack in shown[1:]] == [5.5, 5.0, 3.0]


def test_several_runs_are_overlaid_and_their_settings_compared(browser, planted, tmp_path):
    other = write_planted_run(tmp_path / "other", steps=20, seed=1, name="longer")
    write_report([planted, other], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    drawn(browser)
    shown = browser.evaluate(f"{chart('Entropy')}.series.map((one) => one.label)")
    assert shown == ["step", "planted", "longer"]
    browser.press("3")
    browser.wait_for("document.documentElement.dataset.shown === 'settings'")
    assert browser.evaluate("document.querySelector('tbody').textContent").startswith('name"planted""longer"')
    browser.press("2")
    browser.wait_for("document.querySelector('[aria-label=Run]')")
    browser.evaluate("location.hash = '#/mistakes/1'")
    browser.wait_for("document.querySelector('.note')?.textContent.startsWith('960 wrong responses of 1,280')")


def test_runs_of_one_name_are_told_apart(browser, tmp_path):
    runs = [write_planted_run(tmp_path / path, steps=1) for path in ("a/seed0", "a/seed1", "b/seed0")]
    labels = "[...document.querySelectorAll('#runs > span')].map((label) => label.textContent)"
    write_report(runs[:2], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert browser.evaluate(labels) == ["seed0", "seed1"]
    write_report(runs, tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert browser.evaluate(labels) == [str(run) for run in runs]


def test_search_finds_a_mistake_and_a_click_opens_its_responses(browser, report):
    browser.open(report, "#/mistakes")
    # 6 problems with two habits and wrong responses without an answer, and what noise HDBSCAN finds.
    assert browser.evaluate("document.querySelectorAll('.row').length") >= 18
    browser.click("#search")
    # Problem 5 ignoring precedence: 11 + 7.
    browser.type("problem 5 18")
    browser.wait_for("document.querySelectorAll('.row').length === 1")
    assert question(5) in browser.evaluate("document.querySelector('.row').textContent")
    browser.click(".row")
    browser.wait_for("document.querySelectorAll('.response').length > 1")
    texts = browser.evaluate("[...document.querySelectorAll('.response pre')].map((text) => text.textContent)")
    assert set(texts) == {"5 + 6: ignores precedence, so \\boxed{18}"}
    assert browser.evaluate("[...document.querySelectorAll('.response strong')].length") == 2
    browser.press("Escape")
    browser.wait_for("document.querySelectorAll('.row').length === 1")
    assert browser.evaluate("document.querySelector('#search').value") == "problem 5 18"


def test_a_click_on_the_map_opens_that_response(browser, report):
    browser.open(report, "#/problem/0/0/0")
    points = browser.evaluate("document.querySelectorAll('#map .point').length")
    assert points == browser.evaluate("data('part-0-0').then((part) => part[0].x.filter((x) => x !== null).length)") > 0
    browser.click("#map .point")
    browser.wait_for("document.querySelector('.response.at pre')")
    assert browser.evaluate("document.querySelectorAll('#map .point.at').length") == 1


def test_sizes_over_the_steps_add_up_to_the_responses(browser, report):
    browser.open(report, "#/problem/0/0/0")
    browser.wait_for(chart("Responses in each step"))
    shown = browser.evaluate(f"{chart('Responses in each step')}.data")
    assert shown[1] == [16] * len(shown[0])


def test_the_keyboard_alone_reaches_a_response(browser, report):
    browser.open(report)
    browser.press("/")
    browser.wait_for("document.activeElement.id === 'search'")
    browser.press("ArrowDown")
    browser.wait_for("document.activeElement.className === 'row'")
    browser.press("ArrowDown")
    second = browser.evaluate("document.querySelectorAll('.row')[1].querySelector('.answer').textContent")
    browser.press("Enter")
    browser.wait_for("document.documentElement.dataset.shown === 'problem'")
    assert browser.evaluate("document.querySelector('.response .answer').textContent") == second
    browser.wait_for("document.activeElement.className === 'choose'")
    browser.press("ArrowDown")
    browser.press("Enter")
    browser.wait_for("document.querySelector('#responses h2').textContent.includes('cluster B')")


def test_arrow_keys_move_along_a_chart(browser, report):
    browser.open(report)
    drawn(browser)
    browser.evaluate("document.querySelector('[aria-label^=Entropy]').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    assert browser.evaluate(f"{chart('Entropy')}.cursor.idx") == 2


LUMINANCE = """
(([r, g, b]) => (r + g + b) / 765)(getComputedStyle(document.body).%s.match(/[0-9.]+/g).map(Number))
"""


def test_dark_and_light(browser, report):
    browser.open(report)
    drawn(browser)

    def background() -> float:
        return browser.evaluate(LUMINANCE % "backgroundColor")

    def curve() -> str:
        return browser.evaluate(f"((drawn) => drawn.series[1].stroke(drawn, 1))({chart('Entropy')})")

    assert background() > 0.9 and browser.evaluate(LUMINANCE % "color") < 0.2
    light = curve()
    browser.system_colours("dark")
    browser.wait_for("document.documentElement.dataset.theme === 'dark'")
    assert background() < 0.2 and browser.evaluate(LUMINANCE % "color") > 0.8
    assert curve() != light
    assert min(drawn(browser)[title] for title in CHARTS) > 100
    browser.press("t")
    assert browser.evaluate("document.documentElement.dataset.theme") == "light" and background() > 0.9
    browser.press("t")
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    browser.press("t")


def test_text_of_a_model_is_shown_and_never_run(browser, report):
    browser.open(report, "#/mistakes")
    problems = browser.evaluate("data('mistakes-0').then((found) => found.problems.question)")
    browser.open(report, f"#/problem/0/{problems.index(question(0))}/0")
    texts = []
    for mistake in range(browser.evaluate("document.querySelectorAll('.choose').length")):
        browser.click(f".choose[data-mistake='{mistake}']")
        texts += browser.evaluate("[...document.querySelectorAll('.response pre')].map((text) => text.textContent)")
    for hostile in HOSTILE:
        assert any(text.startswith(hostile) for text in texts), hostile
    assert browser.evaluate(NOTHING_RAN) and browser.evaluate("document.querySelectorAll('pre *').length === 0")


def test_hostile_questions_answers_and_names_are_shown_too(browser, tmp_path):
    run = write_planted_run(tmp_path / "run", steps=1, problems=1, prompts_per_step=1, name=HOSTILE[0])
    path = run / "rollouts" / "step_000001.parquet"
    table = pq.read_table(path)
    hostile = pa.array([HOSTILE[0]] * len(table))
    for name in ("prompt", "answer", "source"):
        table = table.set_column(table.column_names.index(name), name, hostile)
    boxed = pa.array([f"\\boxed{{{HOSTILE[0]}}}"] * len(table))
    table = table.set_column(table.column_names.index("response"), "response", boxed)
    pq.write_table(table, path)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("validation/sums/", f"validation/{HOSTILE[0][:40]}/"))
    write_report([run], tmp_path / "report.html")
    for page in ("#/curves", "#/mistakes", "#/settings", "#/problem/0/0/0"):
        browser.open(tmp_path / "report.html", page)
        assert HOSTILE[0][:30] in browser.evaluate("document.body.innerText")
        assert browser.evaluate(NOTHING_RAN)


def test_broken_utf8_is_replaced(browser, tmp_path):
    run = write_planted_run(tmp_path / "run", steps=1, problems=1, prompts_per_step=1)
    path = run / "rollouts" / "step_000001.parquet"
    table = pq.read_table(path)
    broken = pa.array([b"caf\xc3 \xff\xfe\\boxed{\xe2\x82}"] * len(table), pa.binary())
    as_string = pa.Array.from_buffers(pa.string(), len(broken), broken.buffers())
    pq.write_table(table.set_column(table.column_names.index("response"), "response", as_string), path)
    write_report([run], tmp_path / "report.html")
    browser.open(tmp_path / "report.html", "#/problem/0/0/0")
    text = browser.evaluate("document.querySelector('.response pre').textContent")
    assert text == "caf\ufffd \ufffd\ufffd\\boxed{\ufffd}"


def test_a_run_without_rollouts_has_its_curves(browser, tmp_path):
    run = write_planted_run(tmp_path / "run")
    for path in (run / "rollouts").iterdir():
        path.unlink()
    write_report([run], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert drawn(browser)["Entropy"] > 100
    browser.open(tmp_path / "report.html", "#/mistakes")
    assert "saved no responses" in browser.evaluate("document.querySelector('.note').textContent")


def test_texts_that_do_not_fit_are_named(browser, planted, tmp_path):
    write_report([planted], tmp_path / "report.html", text_mib=3000 / 2**20)
    browser.open(tmp_path / "report.html", "#/mistakes")
    assert "The texts of " in browser.evaluate("document.querySelector('.note').textContent")
    browser.open(tmp_path / "report.html", "#/problem/0/0/0")
    shown = browser.evaluate("[...document.querySelectorAll('.response')].map((one) => one.innerText)")
    first, last = shown[0], shown[-1]
    assert "typical" in first and "boxed" in first
    assert "Its text is not in this file: row " in last and "rollouts/step_0000" in last


def test_responses_are_unpacked_when_they_are_opened(browser, report):
    browser.open(report)
    drawn(browser)
    assert browser.evaluate("[...unpacked.keys()]") == ["overview"]
    browser.press("2")
    browser.wait_for("document.querySelector('.row')")
    assert browser.evaluate("[...unpacked.keys()]") == ["overview", "mistakes-0"]
