// Pages by the address after #, colours and keys.

const THEMES = ["system", "light", "dark"];
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const listState = { query: "", order: Object.keys(ORDERS)[0] };
let theme = "system";
let pagesAsked = 0;
let searchWanted = false;

function applyTheme() {
  const dark = theme === "dark" || (theme === "system" && systemDark.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  document.getElementById("theme").textContent = `Colours: ${theme}`;
  for (const plot of document.querySelectorAll("[role=img]")) plot.chart?.redraw();
}

function nextTheme() {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  applyTheme();
}

// Runs of one name are told apart by their directories' names, and where these are the same by their paths.
function labelled(runs) {
  const names = [(run) => run.name, (run) => run.path.split("/").at(-1), (run) => run.path];
  const isUnique = (name) => new Set(runs.map(name)).size === runs.length;
  const name = names.find(isUnique) ?? names.at(-1);
  return runs.map((run) => ({ ...run, label: name(run) }));
}

async function showPage(runs) {
  const [, name = "curves", ...parts] = location.hash.split("/");
  const numbers = parts.map(Number);
  const runNumber = Math.min(numbers[0] || 0, runs.length - 1);
  const pages = {
    curves: () => curvesPage(runs),
    mistakes: () => mistakesPage(runs, runNumber, listState),
    problem: () => problemPage(runs, runNumber, numbers[1] || 0, numbers[2] || 0),
    settings: () => settingsPage(runs),
  };
  const page = pages[name] ? name : "curves";
  const asked = ++pagesAsked;
  const content = await pages[page]();
  // Another page may have been asked for meanwhile.
  if (asked !== pagesAsked) return;
  document.getElementById("main").replaceChildren(...content);
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.dataset.page === (page === "problem" ? "mistakes" : page);
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  window.scrollTo(0, 0);
  if (page === "problem") document.querySelector(".choose[aria-pressed=true]")?.focus({ preventScroll: true });
  if (page === "mistakes" && searchWanted) document.getElementById("search").focus();
  searchWanted = false;
  document.documentElement.dataset.shown = page;
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (location.hash.startsWith("#/problem")) history.back();
    else document.activeElement.blur();
    return;
  }
  if (["INPUT", "SELECT", "TEXTAREA"].includes(document.activeElement?.tagName)) return;
  if (event.key === "/") {
    event.preventDefault();
    if (document.getElementById("search")) document.getElementById("search").focus();
    else {
      searchWanted = true;
      location.hash = "#/mistakes";
    }
  } else if (event.key === "t") nextTheme();
  else if ("123".includes(event.key)) location.hash = ["#/curves", "#/mistakes", "#/settings"][Number(event.key) - 1];
}

async function start() {
  const runs = labelled(await data("overview"));
  document.getElementById("runs").append(...runs.map((run, index) =>
    el("span", { title: run.path }, swatch(seriesColour(index)), run.label)));
  document.title = `${runs.map((run) => run.label).join(", ")} – meds report`;
  document.getElementById("theme").addEventListener("click", nextTheme);
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    document.getElementById("main").focus();
  });
  document.addEventListener("keydown", keys);
  systemDark.addEventListener("change", applyTheme);
  applyTheme();
  window.addEventListener("hashchange", () => showPage(runs));
  await showPage(runs);
}

start();
