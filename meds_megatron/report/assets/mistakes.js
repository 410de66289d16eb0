// The list of the mistakes that a run made most often, searchable.

const ORDERS = {
  "made most often": (one, other) => other.times - one.times,
  "made in most steps": (one, other) => other.steps - one.steps || other.times - one.times,
  "made last": (one, other) => other.last - one.last || other.times - one.times,
  "highest penalty": (one, other) => (other.penalty ?? -1) - (one.penalty ?? -1) || other.times - one.times,
};
const ROWS_AT_ONCE = 100;

async function mistakesPage(runs, runNumber, state) {
  const run = runs[runNumber];
  const { mistakes, problems, last_step: lastStep } = await data(`mistakes-${runNumber}`);
  const problemRows = rowsOf(problems);
  const rows = rowsOf(mistakes).map((row) => ({ ...row, of: problemRows[row.problem] }));
  for (const row of rows) row.searched = searchedText(row);
  const search = el("input", {
    type: "search", id: "search", placeholder: "Search question, wrong answer, expected answer, data set", "aria-label": "Search mistakes", value: state.query,
  });
  const order = el("select", { "aria-label": "Order" }, Object.keys(ORDERS).map((name) => el("option", { selected: name === state.order }, name)));
  const found = el("span", { class: "small", role: "status" });
  const list = el("ol", { class: "rows" });
  const more = el("button", { type: "button" }, "Show more");
  let shown = [];

  function append() {
    const next = shown.slice(list.childElementCount, list.childElementCount + ROWS_AT_ONCE);
    list.append(...next.map((row) => el("li", {}, mistakeRow(row, runNumber, lastStep))));
    more.hidden = list.childElementCount >= shown.length;
  }
  function update() {
    Object.assign(state, { query: search.value, order: order.value });
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = rows.filter((row) => words.every((word) => row.searched.includes(word))).sort(ORDERS[order.value]);
    found.textContent = count(shown.length, "mistake");
    list.replaceChildren();
    append();
  }
  search.addEventListener("input", update);
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") list.querySelector("button")?.focus();
    if (event.key === "Enter") list.querySelector("button")?.click();
  });
  order.addEventListener("change", update);
  more.addEventListener("click", append);
  arrowKeys(list, ".row");
  update();
  return [
    el("h2", {}, "What mistakes does this model keep making?"),
    el("p", { class: "note" }, mistakesNote(run, problemRows.length, rows.length)),
    el("div", { class: "bar" }, runChoice(runs, runNumber), search, order, found),
    list,
    more,
  ];
}

function searchedText(row) {
  const answers = row.answers.map(([answer]) => answer ?? "");
  return [row.name, row.of.question, row.of.answer, row.of.source, ...answers].join(" ").toLowerCase();
}

function mistakesNote(run, problems, mistakes) {
  if (!run.rollouts) return "The run saved no responses (train.save_rollouts), so its mistakes are unknown.";
  const texts = run.texts < run.wrong ? ` The texts of ${number(run.texts)} are in this file, the most typical of each mistake first; the others are in ${run.path}/rollouts.` : "";
  return `${count(run.wrong, "wrong response")} of ${number(run.responses)}, to ${count(problems, "problem")}: ${count(mistakes, "mistake")}. ` +
    (run.settings["memory.method"] === "answer"
      ? "A mistake is one wrong answer to a problem, over all steps."
      : "A mistake is a cluster of the fingerprints of one problem's wrong responses, by the run's memory settings, over all steps; " +
        "where the group filter left responses without a fingerprint, it is one wrong answer.") +
    `${texts}`;
}

function runChoice(runs, runNumber) {
  if (runs.length < 2) return null;
  const choose = (event) => (location.hash = `#/mistakes/${event.target.value}`);
  return el("select", { "aria-label": "Run", onchange: choose },
    runs.map((run, index) => el("option", { value: index, selected: index === runNumber }, run.label)));
}

function mistakeRow(row, runNumber, lastStep) {
  const [answer] = row.answers[0];
  return el("button", { type: "button", class: "row", onclick: () => (location.hash = `#/problem/${runNumber}/${row.problem}/${row.mistake}`) },
    el("span", { class: "times", title: "responses" }, `${number(row.times)}×`),
    timeline(row.timeline, lastStep),
    el("span", { class: "line" }, el("span", { class: "answer wrong" }, answer ?? "no answer"), " instead of ", el("span", { class: "answer" }, row.of.answer),
      row.different > 1 ? el("span", { class: "small" }, ` and ${count(row.different - 1, "other answer")}`) : null),
    el("span", { class: "line" }, row.of.question),
    el("span", { class: "small" },
      el("span", { class: "line" }, `${mistakeName(row.name)} · steps ${row.first}–${row.last}`),
      el("span", { class: "line" }, row.of.source, row.penalty === null ? null : ` · penalty ${number(row.penalty)}`)));
}

const isCluster = (name) => /^[A-Z]+$/.test(name);
const mistakeName = (name) => (isCluster(name) ? `cluster ${name}` : name);

// How often the mistake was made, from the first step to the last.
function timeline(bins, lastStep) {
  const highest = Math.max(...bins);
  const bars = bins.map((times, place) => {
    const height = times ? Math.max(2, (times / highest) * 26) : 0;
    return svg("rect", { class: "timeline", x: place * 5, y: 28 - height, width: 4, height });
  });
  return svg("svg", { width: 120, height: 28, viewBox: "0 0 120 28", role: "img", "aria-label": `how often in steps 1 to ${lastStep}` }, bars);
}
