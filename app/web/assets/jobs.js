// The list of fine-tuning jobs.

import { ApiError, latestDecision, listJobs } from "./api.js";
import { chip, el, emptyState, panel, table } from "./elements.js";
import { DASH, VERDICT_MEANING, duration, interval, moment, number, percent, tone, words } from "./format.js";

const STEP = 20;
const MOST = 100;

/** The page `#/jobs`: { title, load(signal) -> panels }. */
export function jobsPage(refresh) {
  const decisions = new Map(); // of jobs that are over: read once
  let limit = STEP;
  return {
    title: "Jobs",
    async load(signal) {
      const { jobs, hasMore } = await listJobs(limit, signal);
      const rows = await Promise.all(jobs.map(async (job) => ({ job, decision: await decisionOf(job, decisions, signal) })));
      const more = hasMore && limit < MOST ? () => { limit = Math.min(limit + STEP, MOST); refresh(); } : null;
      return [panel("jobs", "Fine-tuning jobs", [rows, hasMore], () => showJobs(rows, more))];
    },
  };
}

async function decisionOf(job, known, signal) {
  if (job.isOff || job.status === "queued" || job.status === "validating_files") return null;
  if (known.has(job.id)) return known.get(job.id);
  try {
    const decision = await latestDecision(job.id, signal);
    if (job.isOver) known.set(job.id, decision);
    return decision;
  } catch (problem) {
    if (problem instanceof ApiError && problem.status === 404) return null; // deleted since the list was read
    throw problem;
  }
}

function showJobs(rows, more) {
  if (!rows.length) {
    return emptyState("No fine-tuning jobs yet.",
      "Submit one with ", el("code", {}, "retain jobs submit"), ", or with any OpenAI client: ",
      el("code", {}, "client.fine_tuning.jobs.create(…)"), " against this server's ", el("code", {}, "/v1"), ".");
  }
  const columns = [
    { label: "Job", cell: ({ job }) => [jobLink(job), job.name ? el("span", { class: "sub mono" }, shortId(job.id)) : null] },
    { label: "Model", cell: ({ job }) => el("span", { class: "wrap" }, job.model) },
    { label: "Status", cell: ({ job }) => statusChip(job) },
    { label: "Progress", cell: ({ job }) => progressBar(job) },
    { label: "Strategies", cell: ({ job, decision }) => strategyList(job, decision?.after?.strengths) },
    { label: "General drop", numeric: true, cell: ({ job, decision }) => dropCell(job.report?.reading ?? decision?.reading) },
    { label: "Verdict", cell: ({ job, decision }) => verdictChip(job, job.report?.reading ?? decision?.reading) },
    { label: "Duration", numeric: true, cell: ({ job }) => [duration(job.seconds), el("span", { class: "sub" }, moment(job.createdAt))] },
  ];
  return [
    table("Fine-tuning jobs, newest first", columns, rows),
    more ? el("button", { type: "button", class: "more", onclick: more, "data-focus": "more" }, "Show more jobs") : null,
  ];
}

const shortId = (id) => (id.length > 20 ? `${id.slice(0, 14)}…${id.slice(-4)}` : id);

function jobLink(job) {
  return el("a", { href: `#/jobs/${encodeURIComponent(job.id)}`, "data-focus": job.id, title: job.id }, job.name ?? shortId(job.id));
}

/** The state, with what was asked of the job since. */
export function statusChip(job) {
  const asked = job.stopRequested && !job.isOver ? el("span", { class: "sub" }, `${job.stopRequested} requested`) : null;
  return el("div", {}, chip(words(job.status), tone(job.status)), asked);
}

/** Steps done, with the phase and the remaining time while the job runs. */
export function progressBar(job) {
  if (job.share === null) return el("span", { class: "muted" }, job.phase ? words(job.phase) : DASH);
  const steps = job.totalSteps ? `${job.step} / ${job.totalSteps} steps` : percent(job.share, 0);
  const left = job.secondsRemaining === null ? null : `${duration(job.secondsRemaining)} left`;
  return el("div", { class: "progress" },
    el("progress", { max: 1, value: job.share, "aria-label": `Progress of ${job.name ?? job.id}` }),
    el("span", { class: "sub" }, [steps, job.isOver ? null : left].filter(Boolean).join(" · ")));
}

/** Each strategy with the strength in force, and the one asked for where the controller moved it. */
export function strategyList(job, inForce) {
  if (job.isOff) return el("span", { class: "muted" }, "retention off");
  if (!job.strategies.length) return el("span", { class: "muted" }, DASH);
  return el("ul", { class: "strategies" }, job.strategies.map((strategy) => {
    const asked = strategy.armed && !strategy.strength ? 0 : strategy.strength ?? null;
    const now = inForce?.[strategy.type] ?? asked;
    const isMoved = asked !== null && now !== asked;
    return el("li", {}, el("span", { class: "mono" }, strategy.type), " ",
      strategy.armed && !now ? el("span", { class: "muted" }, "armed")
        : [isMoved ? el("span", { class: "muted" }, `${number(asked)} → `) : null, el("b", {}, now === null ? "default" : number(now))]);
  }));
}

/** The drop of the general mean with its interval. */
export function dropCell(reading) {
  if (!reading || reading.drop === null) return el("span", { class: "muted" }, DASH);
  return [
    el("b", {}, percent(reading.drop)),
    el("span", { class: "sub" }, interval(reading.lower, reading.upper)),
  ];
}

export function verdictChip(job, reading) {
  if (job?.isOff) return el("span", { class: "muted" }, "off");
  if (!reading?.verdict) return el("span", { class: "muted" }, DASH);
  const node = chip(words(reading.verdict), tone(reading.verdict));
  node.title = VERDICT_MEANING[reading.verdict] ?? "";
  return node;
}
