// Charts over steps, drawn by uPlot: lines, and bars or areas one on top of the other.

const CHART_HEIGHT = 210;
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4]];
const resized = new ResizeObserver((entries) => {
  for (const entry of entries) entry.target.chart?.setSize({ width: entry.contentRect.width, height: CHART_HEIGHT });
});

// A panel with a chart of `series` [{label, values, colour, dash}] over the steps `x`. `stacked` is "bars", "areas" or
// nothing. The chart is drawn when the panel has come into the document.
function chartPanel({ title, x, series, stacked, share }) {
  const plot = el("div", { tabindex: "0", role: "img", "aria-label": summary(title, x, series) });
  const panel = el("section", { class: "panel" }, el("h3", {}, title), plot);
  requestAnimationFrame(() => {
    if (!plot.isConnected) return;
    plot.chart = new uPlot(chartOptions(plot, series, stacked, share), chartData(x, series, stacked), plot);
    resized.observe(plot);
    plot.addEventListener("keydown", (event) => moveCursor(event, plot.chart, x));
  });
  return panel;
}

function summary(title, x, series) {
  const ends = series.map(({ label, values }) => {
    const last = lastValue(values);
    return last < 0 ? `${label}: no values` : `${label}: ${number(values[last])} at step ${x[last]}`;
  });
  return `${title}. ${ends.join("; ")}`;
}

// Stacked values are sums over the series below; the highest sum is drawn first.
function chartData(x, series, stacked) {
  if (!stacked) return [x, ...series.map(({ values }) => values)];
  const sums = x.map(() => 0);
  const stacks = series.map(({ values }) => values.map((value, index) => (sums[index] += value ?? 0)));
  return [x, ...stacks.reverse()];
}

function chartOptions(plot, series, stacked, share) {
  const drawn = stacked ? [...series].reverse() : series;
  const axis = {
    stroke: () => colour("--muted"),
    grid: { stroke: () => colour("--grid"), width: 1 },
    ticks: { stroke: () => colour("--grid"), width: 1 },
    font: "12px system-ui, sans-serif",
  };
  return {
    width: plot.clientWidth,
    height: CHART_HEIGHT,
    scales: { x: { time: false, range: stepRange(stacked) }, y: share ? { range: [0, 1] } : { range: valueRange(stacked) } },
    axes: [
      { ...axis, size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000], values: (_, ticks) => ticks.map(number) },
      { ...axis, size: 62, values: (_, ticks) => ticks.map(number) },
    ],
    legend: { markers: { dash: (chart, index) => (chart.series[index].dash?.length ? "dashed" : "solid") } },
    cursor: { sync: { key: stacked === "bars" ? null : "steps" }, points: { size: 7 } },
    series: [{ label: "step", value: (_, value) => number(value) }, ...drawn.map((one) => seriesOptions(one, stacked))],
  };
}

function seriesOptions({ label, values, colour: variable, dash }, stacked) {
  // Without a cursor the legend shows the sum of bars and the last value of curves.
  const atRest = stacked === "bars" ? total : (all) => all[lastValue(all)];
  const few = values.filter((value) => value !== null).length <= 30;
  const options = {
    label,
    stroke: () => colour(variable),
    width: 2,
    dash: DASHES[(dash ?? 0) % DASHES.length],
    spanGaps: true,
    points: { show: few && !stacked, size: 5 },
    value: (_, __, ___, index) => number(index === null ? atRest(values) : values[index]),
  };
  if (stacked) Object.assign(options, { fill: () => colour(variable), width: 0.5, stroke: () => colour("--panel") });
  if (stacked === "bars") options.paths = uPlot.paths.bars({ size: [0.8, 46] });
  return options;
}

const lastValue = (values) => values.findLastIndex((value) => value !== null);
const total = (values) => values.reduce((sum, value) => sum + (value ?? 0), 0);

function stepRange(stacked) {
  return (_, low, high) => {
    if (low === null) return [0, 1];
    const margin = stacked === "bars" ? Math.max(1, (high - low) * 0.05) : low === high ? 1 : 0;
    return [low - margin, high + margin];
  };
}

function valueRange(stacked) {
  return (_, low, high) => {
    if (low === null) return [0, 1];
    if (stacked) return [0, high * 1.05 || 1];
    const margin = (high - low || Math.abs(high) || 1) * 0.08;
    // A curve near zero is shown with zero.
    const bottom = low >= 0 && low < (high - low) * 0.5 ? 0 : low - margin;
    return [bottom, high + margin];
  };
}

function moveCursor(event, chart, x) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const index = Math.min(Math.max((chart.cursor.idx ?? (step > 0 ? -1 : x.length)) + step, 0), x.length - 1);
  chart.setCursor({ left: chart.valToPos(x[index], "x"), top: chart.over.clientHeight / 2 });
}
