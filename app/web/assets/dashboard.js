// The dashboard's entry: the key, the route, and the refresh every three seconds.

import { key } from "./api.js";
import { el, showPanels } from "./elements.js";
import { clock } from "./format.js";
import { jobPage } from "./job.js";
import { jobsPage } from "./jobs.js";
import { modelsPage } from "./models.js";

const PERIOD_MS = 3000;
const LONGEST_WAIT_MS = 30_000; // after failures in a row
const FINAL = new Set([403, 404]); // asking again would not help
const main = document.getElementById("main");
const notice = document.getElementById("notice");
const nav = document.getElementById("nav");
const freshness = document.getElementById("freshness");
const forget = document.getElementById("forget");

let page = null;
let abort = new AbortController();
let timer = null;
let lastGood = null;
let isBusy = false;
let isWanted = false; // a refresh that was asked for while one was under way
let failures = 0;

function start() {
  abort.abort();
  clearTimeout(timer);
  abort = new AbortController();
  lastGood = null;
  failures = 0;
  tell(null);
  const isKnown = Boolean(key.get());
  nav.hidden = forget.hidden = !isKnown;
  if (!isKnown) return askForKey();
  const [section, id] = location.hash.replace(/^#\/?/, "").split("/");
  page = section === "models" ? modelsPage() : section === "jobs" && id ? jobPage(decodeURIComponent(id), refresh, failed) : jobsPage(refresh);
  for (const link of nav.children) {
    if (link.dataset.page === (section === "models" ? "models" : "jobs")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  main.replaceChildren(el("p", { class: "loading", role: "status" }, "Loading…"));
  freshness.textContent = "";
  refresh();
}

/** One refresh at a time; the next one follows three seconds after its end. */
async function refresh() {
  clearTimeout(timer);
  if (document.hidden) return; // taken up again by visibilitychange
  if (isBusy) {
    isWanted = true;
    return;
  }
  isBusy = true;
  isWanted = false;
  const { signal } = abort;
  const goesOn = await load(page, signal);
  isBusy = false;
  if (isWanted) refresh();
  else if (goesOn && !signal.aborted) timer = setTimeout(refresh, Math.min(PERIOD_MS * 2 ** Math.min(failures, 5), LONGEST_WAIT_MS));
}

/** Loads and shows a page; whether to go on. */
async function load(shown, signal) {
  try {
    const panels = await shown.load(signal);
    if (signal.aborted) return false;
    if (lastGood === null) main.replaceChildren();
    showPanels(main, panels);
    document.title = `${shown.title} · Retain`;
    lastGood = Date.now() / 1000;
    failures = 0;
    freshness.textContent = `Updated ${clock(lastGood)}`;
    tell(null);
    return true;
  } catch (problem) {
    if (problem.name === "AbortError" || signal.aborted) return false;
    failures += 1;
    failed(problem);
    return key.get() !== null && !FINAL.has(problem.status);
  }
}

/** Says what went wrong and what to do; a refused key is asked for again. */
function failed(problem) {
  if (problem.status === 401) {
    key.forget();
    start();
    tell("The server refused the key. Paste another, or have an operator make one: retain keys create NAME");
    return;
  }
  if (problem.status === undefined) console.error(problem);
  const since = lastGood === null ? "" : ` What you see is from ${clock(lastGood)}.`;
  const advice = {
    0: `The server does not answer; trying again.${since}`,
    403: `This key may not read that: ${problem.message} Use a key with the scopes jobs:read and models:read.`,
    404: `${problem.message} It may belong to another project than this key's.`,
    429: `Too many requests; trying again.${since}`,
  };
  tell(advice[problem.status] ?? `${problem.message} Trying again.${since}`);
  if (lastGood === null) main.replaceChildren(el("p", { class: "loading" }, el("a", { href: "#/jobs" }, "All jobs")));
}

function tell(text) {
  if (notice.textContent !== (text ?? "")) notice.textContent = text ?? "";
  notice.hidden = text === null;
}

function askForKey() {
  const input = el("input", { id: "key", name: "key", type: "password", autocomplete: "off", spellcheck: "false", required: true, placeholder: "rt_live_…" });
  const form = el("form", { class: "sign-in" },
    el("h1", {}, "Open the dashboard"),
    el("p", {}, "Paste an API key of your project. It stays in this tab and is gone when the tab closes."),
    el("label", { for: "key" }, "API key"), input,
    el("button", { type: "submit", class: "primary" }, "Open"),
    el("p", { class: "sub" }, "No key? An operator makes one on the server with ", el("code", {}, "retain keys create NAME"), "."));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const value = input.value.trim();
    if (!value) return;
    key.set(value);
    start();
  });
  document.title = "Retain";
  freshness.textContent = "";
  main.replaceChildren(form);
  input.focus();
}

forget.addEventListener("click", () => { key.forget(); start(); });
document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
window.addEventListener("hashchange", () => { start(); window.scrollTo(0, 0); });
document.addEventListener("visibilitychange", () => { if (!document.hidden && page && key.get()) refresh(); });
start();
