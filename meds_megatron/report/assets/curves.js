// The page of curves: every metric of every run over its steps, the ones looked at most by name and the others below.

const GROUPS = [
  ["What it learns", [
    { title: "Validation accuracy by data set", match: /^validation\/(?:(.+)\/)?accuracy$/, share: true },
    { title: "Validation pass@k", match: /^validation\/(.*pass@\d+)$/, share: true },
    { title: "Accuracy of rollouts", match: /^accuracy\/(mean|solved)$/, share: true },
    { title: "Reward", match: /^reward\/(mean|shaped_mean)$/ },
    { title: "Entropy", match: /^policy\/(entropy)$/ },
    { title: "KL", match: /^policy\/(kl)$/ },
    { title: "Clip fraction", match: /^policy\/(clip.*|.*clip_fraction.*|.*clipped.*)$/ },
    { title: "Response length (tokens)", match: /^response\/(length_mean)$/ },
    { title: "Truncated responses", match: /^response\/(truncated_share)$/ },
    { title: "Mismatch of trainer and engine log-probs", match: /^mismatch\/(.+)$/ },
    { title: "Age of the tokens trained on (policy updates)", match: /^staleness\/(mean|max)$/ },
  ]],
  ["The error memory", [
    { title: "Keys", match: /^memory\/(keys)$/ },
    { title: "Clusters", match: /^memory\/(clusters)$/ },
    { title: "Hit rate", match: /^memory\/(hit_share)$/, share: true },
    { title: "Mean penalty", match: /^reward\/(penalty_mean)$/ },
    { title: "Eigenvalue ratio (largest of all)", match: /^memory\/(top_eigenvalue_share)$/, share: true },
    { title: "Mean size of the cluster found", match: /^memory\/(lookup_size_mean)$/ },
    { title: "Noise, saturated penalties", match: /^memory\/(noise_share|saturated_share)$/, share: true },
  ]],
  ["How fast", [{ title: "Tokens per second", match: /^throughput\/(.+)$/ }, { title: "Seconds of a step", match: /^time\/(step)$/ }]],
];

function curvesPage(runs) {
  const x = [...new Set(runs.flatMap((run) => run.steps))].sort((one, other) => one - other);
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  const shown = new Set();
  const page = GROUPS.flatMap(([heading, charts]) => {
    const panels = charts.flatMap((chart) => metricChart(runs, x, names, chart, shown));
    if (heading === "How fast") panels.push(...runs.map((run) => phasesChart(run, runs.length > 1)));
    return panels.length ? [el("h2", {}, heading), el("div", { class: "charts" }, panels)] : [];
  });
  const others = names.filter((name) => !shown.has(name) && !name.startsWith("time/"));
  if (others.length) page.push(otherMetrics(runs, x, others));
  return page;
}

function metricChart(runs, x, names, { title, match, share }, shown) {
  let found = names.filter((name) => match.test(name) && runs.some((run) => run.metrics[name]?.some((value) => value !== null)));
  found.forEach((name) => shown.add(name));
  // With a single data set the mean over all data sets is its own accuracy.
  if (found.length === 2 && found.includes("validation/accuracy")) found = found.filter((name) => name !== "validation/accuracy");
  if (!found.length) return [];
  const several = runs.length > 1;
  const series = runs.flatMap((run, runNumber) =>
    found.filter((name) => run.metrics[name]).map((name) => {
      const index = found.indexOf(name);
      const label = (match.exec(name)[1] ?? "all").replaceAll("_", " ");
      return {
        label: several ? (found.length > 1 ? `${run.label}: ${label}` : run.label) : label,
        values: alongSteps(run, x, run.metrics[name]),
        colour: seriesColour(several ? runNumber : index),
        // Beyond the number of colours, runs differ by their dashes.
        dash: several ? index + Math.floor(runNumber / COLOURS) : 0,
      };
    }),
  );
  return [chartPanel({ title, x, series, share })];
}

function alongSteps(run, x, values) {
  const places = new Map(run.steps.map((step, place) => [step, place]));
  return x.map((step) => (places.has(step) ? values[places.get(step)] : null));
}

function phasesChart(run, several) {
  const whole = run.metrics["time/step"] ?? run.steps.map(() => null);
  const keep = run.steps.map((step, place) => place).filter((place) => run.steps[place] > 0 && whole[place] !== null);
  const phases = Object.entries(run.metrics)
    .filter(([name]) => name.startsWith("time/") && name !== "time/step")
    .map(([name, values]) => ({ label: name.slice(5), values: keep.map((place) => values[place]) }))
    .sort((one, other) => total(other.values) - total(one.values));
  const rest = keep.map((place, index) => Math.max(0, whole[place] - total(phases.map((phase) => phase.values[index]))));
  phases.push({ label: "other", values: rest });
  const series = phases.map((phase, index) => ({ ...phase, colour: seriesColour(index) }));
  const title = `Seconds of a step by phase${several ? `: ${run.label}` : ""}`;
  return chartPanel({ title, x: keep.map((place) => run.steps[place]), series, stacked: "areas" });
}

function otherMetrics(runs, x, names) {
  const charts = el("div", { class: "charts" });
  const draw = () => {
    if (charts.childElementCount) return;
    const chart = (name) => metricChart(runs, x, names, { title: name, match: new RegExp(`^(${escaped(name)})$`) }, new Set());
    charts.append(...names.flatMap(chart));
  };
  return el("details", { ontoggle: draw }, el("summary", {}, `All other metrics (${names.length})`), charts);
}

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

// The page of settings: those in which the runs differ, then all.
function settingsPage(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const value = (run, name) => JSON.stringify(run.settings[name]) ?? "–";
  const differ = names.filter((name) => new Set(runs.map((run) => value(run, name))).size > 1);
  const table = (rows) => el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, "setting"), runs.map((run) => el("th", {}, run.label)))),
    el("tbody", {}, rows.map((name) => el("tr", {}, el("td", {}, name), runs.map((run) => el("td", { class: "answer" }, value(run, name)))))));
  return [
    ...(runs.length > 1 ? [el("h2", {}, "Settings in which the runs differ"), el("div", { class: "panel" }, table(differ))] : []),
    el("h2", {}, "All settings"),
    el("div", { class: "panel" }, table(names)),
  ];
}
