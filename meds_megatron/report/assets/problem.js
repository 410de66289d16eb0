// The page of one problem: the map of its mistakes, their sizes over the steps, and the responses of each.

const MAP_WIDTH = 640;
const MAP_HEIGHT = 380;
const RESPONSES_AT_ONCE = 20;
const TYPICAL = 2;
const GREYS = 4;

async function problemPage(runs, runNumber, problemNumber, chosen) {
  const { problems } = await data(`mistakes-${runNumber}`);
  const problem = rowsOf(problems)[problemNumber];
  const details = (await data(`part-${runNumber}-${problem.part}`))[problem.place];
  const groups = mistakeGroups(details);
  const view = { run: runs[runNumber], groups, details, responses: el("section", { id: "responses" }) };
  const table = mistakesTable(view, (mistake) => select(mistake));
  const map = mistakesMap(view, (mistake, response) => select(mistake, response));

  function select(mistake, response) {
    history.replaceState(null, "", `#/problem/${runNumber}/${problemNumber}/${mistake}`);
    for (const button of table.querySelectorAll(".choose")) button.setAttribute("aria-pressed", String(Number(button.dataset.mistake) === mistake));
    map.choose(mistake, response);
    showResponses(view, mistake, response);
  }
  select(Math.min(chosen, groups.length - 1));
  return [
    el("p", {}, el("a", { href: `#/mistakes/${runNumber}` }, "← all mistakes")),
    el("section", { class: "panel" },
      el("pre", { id: "question" }, problem.question),
      el("p", { class: "small" }, "expected ", el("span", { class: "answer" }, problem.answer),
        ` · ${problem.source} · ${number(problem.right)} of ${count(problem.responses, "response")} right`)),
    el("h2", {}, "Its mistakes"),
    el("div", { class: "problem" }, map.panel, el("div", {}, sizesChart(view), el("section", { class: "panel", style: "margin-top: 0.9rem" }, table))),
    view.responses,
  ];
}

// The responses of a problem lie mistake after mistake: their name, first index, number and colour. What is no cluster
// is grey.
function mistakeGroups(details) {
  let begin = 0;
  const numbers = { clusters: 0, others: 0 };
  return details.mistakes.map(([name, size], index) => {
    const group = { name, index, begin, end: begin + size, size };
    group.colour = isCluster(name) ? seriesColour(numbers.clusters++) : `--g${numbers.others++ % GREYS}`;
    const answers = new Set(details.answer.slice(begin, begin + size));
    group.label = name === "no fingerprint" && answers.size === 1 ? `${name}: ${[...answers][0]}` : mistakeName(name);
    begin += size;
    return group;
  });
}

function mistakesTable(view, select) {
  const rows = view.groups.map((group) => {
    const answers = topAnswers(view.details.answer.slice(group.begin, group.end));
    return el("tr", {},
      el("td", {}, el("button", { type: "button", class: "choose", "data-mistake": group.index, "aria-pressed": "false", onclick: () => select(group.index) },
        swatch(group.colour), group.label)),
      el("td", { class: "number" }, number(group.size)),
      el("td", {}, answers.slice(0, 4).map(([answer, times], place) => [
        place ? ", " : null, el("span", { class: "answer" }, answer ?? "none"), el("span", { class: "small" }, ` ×${times}`)]).flat(),
        answers.length > 4 ? el("span", { class: "small" }, `, ${answers.length - 4} more`) : null));
  });
  const table = el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, "mistake"), el("th", { class: "number" }, "responses"), el("th", {}, "answers"))), el("tbody", {}, rows));
  arrowKeys(table, ".choose");
  return table;
}

function topAnswers(answers) {
  const counts = new Map();
  for (const answer of answers) counts.set(answer, (counts.get(answer) ?? 0) + 1);
  return [...counts].sort((one, other) => other[1] - one[1]);
}

// The fingerprints in their first two principal components; the same scale on both axes.
function mistakesMap(view, select) {
  const { details, groups } = view;
  const placed = details.x.map((_, index) => index).filter((index) => details.x[index] !== null);
  const title = el("h3", {}, "Map of the fingerprints");
  if (!placed.length) {
    return { panel: el("section", { class: "panel" }, title, el("p", { class: "note" }, "No wrong response to this problem has a fingerprint.")), choose() {} };
  }
  const place = mapScale(placed.map((index) => details.x[index]), placed.map((index) => details.y[index]));
  const circles = new Map();
  for (const group of [...groups].reverse()) {
    for (let index = group.begin; index < group.end; index++) {
      if (details.x[index] === null) continue;
      const [cx, cy] = place(details.x[index], details.y[index]);
      const label = `${group.label}, step ${details.step[index]}: ${details.answer[index] ?? "no answer"}`;
      circles.set(index, svg("circle", { class: "point", cx, cy, r: 5, onclick: () => select(group.index, index) }, svg("title", {}, label)));
      circles.get(index).style.fill = `var(${group.colour})`;
    }
  }
  const [first, second] = details.variance.map((share) => `${Math.round((share ?? 0) * 100)} %`);
  const axes = [
    svg("text", { class: "axis", x: MAP_WIDTH - 8, y: MAP_HEIGHT - 8, "text-anchor": "end" }, `first component, ${first} of the variance →`),
    svg("text", { class: "axis", x: 8, y: 16 }, `↑ second, ${second}`),
  ];
  const picture = svg("svg", { id: "map", viewBox: `0 0 ${MAP_WIDTH} ${MAP_HEIGHT}`, width: "100%", role: "img",
    "aria-label": `${placed.length} fingerprints in ${groups.length} mistakes; the table beside it lists them` },
    ...axes, ...circles.values(), ...clusterNames(groups, details, place));
  const panel = el("section", { class: "panel" }, title, picture,
    el("p", { class: "small" }, "A point is a wrong response: equal points are equal fingerprints. Choose one to read it."));
  return { panel, choose: (mistake, response) => highlight(circles, groups[mistake], response) };
}

function highlight(circles, group, response) {
  for (const [index, circle] of circles) {
    circle.classList.toggle("other", circles.has(group.begin) && (index < group.begin || index >= group.end));
    circle.classList.toggle("at", index === response);
  }
}

function mapScale(xs, ys) {
  // Not Math.min(...xs): a problem may have more responses than a call has arguments.
  const range = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const [[left, right], [bottom, top]] = [range(xs), range(ys)];
  const scale = Math.min((MAP_WIDTH - 60) / (right - left || 1e-9), (MAP_HEIGHT - 70) / (top - bottom || 1e-9), 1e9);
  return (x, y) => [
    MAP_WIDTH / 2 + (x - (left + right) / 2) * scale,
    MAP_HEIGHT / 2 - (y - (top + bottom) / 2) * scale,
  ].map((value) => Number(value.toFixed(1)));
}

function clusterNames(groups, details, place) {
  return groups.filter((group) => isCluster(group.name)).map((group) => {
    // The first response of a cluster is the nearest to the mean of its fingerprints.
    const first = details.x.findIndex((x, index) => x !== null && index >= group.begin && index < group.end);
    if (first < 0) return null;
    const [x, y] = place(details.x[first], details.y[first]);
    return svg("text", { x, y: y - 9, "text-anchor": "middle" }, group.name);
  });
}

function sizesChart({ details, groups }) {
  const places = new Map(details.steps.map((step, index) => [step, index]));
  const series = groups.map((group) => {
    const values = details.steps.map(() => 0);
    for (let index = group.begin; index < group.end; index++) values[places.get(details.step[index])] += 1;
    return { label: group.label, values, colour: group.colour };
  });
  series.push({ label: "right", values: details.right, colour: "--right" });
  return chartPanel({ title: "Responses in each step", x: details.steps, series, stacked: "bars" });
}

function showResponses(view, mistake, response) {
  const group = view.groups[mistake];
  const list = el("div", {});
  const more = el("button", { type: "button" }, "Show more");
  let next = group.begin;
  const append = () => {
    const end = Math.min(next + RESPONSES_AT_ONCE, group.end);
    for (; next < end; next++) if (next !== response) list.append(responsePanel(view, group, next, false));
    more.hidden = next >= group.end;
  };
  if (response !== undefined) list.append(responsePanel(view, group, response, true));
  append();
  more.addEventListener("click", append);
  view.responses.replaceChildren(
    el("h2", {}, swatch(group.colour), `Responses: ${group.label} (${number(group.size)})`), list, more);
  if (response !== undefined) list.firstChild.scrollIntoView({ block: "nearest" });
}

function responsePanel({ details, run }, group, index, chosen) {
  const fact = (name, value) => el("span", {}, `${name} ${number(value)}`);
  const text = details.text[index];
  const file = `rollouts/step_${String(details.step[index]).padStart(6, "0")}.parquet`;
  const typical = group.size > TYPICAL && index < group.begin + TYPICAL;
  return el("article", { class: `panel response${chosen ? " at" : ""}` },
    el("div", { class: "facts small" },
      typical ? el("strong", {}, "typical") : null,
      el("span", {}, "answer ", el("span", { class: "answer wrong" }, details.answer[index] ?? "none")),
      fact("step", details.step[index]), fact("score", details.score[index]), fact("penalty", details.penalty[index]),
      fact("seen before", details.cluster_size[index]), fact("advantage", details.advantage[index]),
      fact("tokens", details.response_tokens[index]), fact("policy", details.policy_version[index])),
    text === null
      ? el("p", { class: "note" }, `Its text is not in this file: row ${details.row[index]} of ${run.path}/${file}.`)
      : el("pre", { dir: "auto" }, text));
}
