// One job: where it stands, what the sensor saw, what the controller did.

import { downloadFile, follow, getJob, listFrontier, readDecision, readLosses } from "./api.js";
import { chip, el, emptyState, longTable, panel, table } from "./elements.js";
import { DASH, RETENTION_MEANING, VERDICT_MEANING, clock, count, duration, interval, moment, number, percent, tone, words } from "./format.js";
import { dropCell, progressBar, statusChip, strategyList, verdictChip } from "./jobs.js";
import { dropChart, frontierChart, lossChart } from "./plots.js";

/** The page `#/jobs/<id>`: { title, load(signal) -> panels }. */
export function jobPage(jobId, refresh, report) {
  const path = `/fine_tuning/jobs/${encodeURIComponent(jobId)}`;
  const sources = {
    decisions: follow(`${path}/decisions`),
    checkpoints: follow(`${path}/checkpoints`, { isMutable: true }),
    events: follow(`${path}/events`),
  };
  const view = { metrics: false };
  let frontier = null;
  return {
    title: jobId,
    async load(signal) {
      const job = await getJob(jobId, signal);
      this.title = job.name ?? job.id;
      const [decisionRows, checkpoints, events] = await Promise.all([sources.decisions(signal), sources.checkpoints(signal), sources.events(signal)]);
      if (job.isOver && frontier === null) frontier = await listFrontier(jobId, signal);
      const decisions = decisionRows.map(readDecision).map((d) => withTarget(d, checkpoints));
      const toggle = () => { view.metrics = !view.metrics; refresh(); };
      return panelsOf({ job, decisions, checkpoints, events, frontier: frontier ?? [], view, toggle, report });
    },
  };
}

function withTarget(decision, checkpoints) {
  if (decision.action !== "roll_back") return decision;
  const found = checkpoints.find((c) => c.id === decision.target);
  return { ...decision, targetStep: found?.step_number ?? 0 }; // without a checkpoint the target is the base
}

function panelsOf({ job, decisions, checkpoints, events, frontier, view, toggle, report }) {
  const losses = readLosses(events);
  const rollbacks = decisions.filter((decision) => decision.action === "roll_back");
  const lines = view.metrics ? events : events.filter((event) => event.type !== "metrics");
  const latest = decisions[0] ?? null;
  const limit = latest?.reading.limit ?? job.maxDrop;
  const panels = [
    panel("summary", null, [job, latest], () => showSummary(job, latest, report)),
    panel("drop", "General ability", [decisions, job.isOver], () => showDrop(job, decisions, limit)),
    panel("loss", "Loss", [losses, rollbacks, job.isOver], () => showLoss(job, losses, rollbacks)),
  ];
  const alpha = job.fineTunedModel ? job.report?.alpha ?? null : null;
  if (frontier.length) panels.push(panel("frontier", "From base to tuned", [frontier, alpha], () => showFrontier(frontier, alpha)));
  if (latest?.reading.benchmarks.length) panels.push(panel("benchmarks", "Latest look, by benchmark", latest.reading, () => showBenchmarks(latest)));
  panels.push(
    panel("decisions", "Decisions", [decisions, job.isOver], () => showDecisions(decisions, job)),
    panel("checkpoints", "Checkpoints", [checkpoints, job.isOver], () => showCheckpoints(checkpoints, job)),
    panel("events", "Log", [lines, view.metrics], () => showEvents(lines, view, toggle)));
  return panels;
}

function showSummary(job, latest, report) {
  const reading = job.report?.reading ?? latest?.reading ?? null;
  const facts = [
    ["Progress", progressBar(job)],
    ["Phase", job.isOver || !job.phase ? null : words(job.phase)],
    ["Remaining", job.secondsRemaining === null ? null : duration(job.secondsRemaining)],
    ["Duration", job.seconds === null ? null : duration(job.seconds)],
    [job.report?.reading ? "General drop, report set" : "General drop, latest look", reading?.drop == null ? null : dropCell(reading)],
    ["Verdict", reading?.verdict ? [verdictChip(job, reading), el("span", { class: "sub" }, VERDICT_MEANING[reading.verdict] ?? "")] : null],
    ["Retention", job.report?.retention ? [chip(words(job.report.retention), tone(job.report.retention)), el("span", { class: "sub" }, RETENTION_MEANING[job.report.retention])] : null],
    ["Strategies", strategyList(job, latest?.after?.strengths)],
    ["Learning rate", latest?.after && latest.after.learning_rate_scale !== 1 ? `× ${number(latest.after.learning_rate_scale)} of the planned rate` : null],
    ["Base model", el("span", { class: "wrap" }, job.model)],
    ["Published as", job.fineTunedModel ? el("span", { class: "mono wrap" }, job.fineTunedModel) : null],
    ["Trained on", job.trainedTokens === null ? null : `${count(job.trainedTokens)} tokens`],
    ["Submitted", moment(job.createdAt)],
  ];
  return [
    el("div", { class: "headline" },
      el("div", {}, el("p", { class: "crumb" }, el("a", { href: "#/jobs", "data-focus": "back" }, "← All jobs")),
        el("h1", {}, job.name ?? job.id), el("p", { class: "sub mono wrap" }, job.id)),
      el("div", { class: "headline-side" }, statusChip(job),
        job.resultFiles.map((fileId) => resultButton(fileId, job, report)))),
    job.error ? el("div", { class: "callout bad" }, el("b", {}, words(job.error.code)), " ", job.error.message, job.error.param ? ` (${job.error.param})` : "") : null,
    job.warnings.length ? el("ul", { class: "callout warn" }, job.warnings.map((text) => el("li", {}, text))) : null,
    el("dl", { class: "facts" }, facts.filter(([, value]) => value !== null).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    job.strategiesWhy ? el("p", { class: "sub" }, job.strategiesWhy) : null,
  ];
}

/** The file needs the key, which a plain link cannot carry: it is fetched, then saved from memory. */
function resultButton(fileId, job, report) {
  const save = async () => {
    try {
      const address = URL.createObjectURL(await downloadFile(fileId));
      el("a", { href: address, download: `${job.name ?? job.id}-metrics.csv` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 10_000);
    } catch (problem) {
      report(problem);
    }
  };
  return el("button", { type: "button", onclick: save, "data-focus": `file-${fileId}` }, "Download metrics (CSV)");
}

function showDrop(job, decisions, limit) {
  if (job.isOff) return emptyState("Retention is off for this job.", "General ability is not measured, so no drop can be shown. Leave ", el("code", {}, "retention"), " out of the request to watch it.");
  const measured = decisions.filter((d) => d.reading.drop !== null);
  if (!measured.length) return emptyState(job.isOver ? "Nothing was measured." : "Nothing measured yet.", job.isOver ? "The job ended before its first evaluation, or its base model has no benchmarks; the log says which." : "The first point appears at the first evaluation.");
  return [
    el("p", { class: "sub" }, "Relative drop of the general mean against the base model, with its interval; lower is better."),
    dropChart(measured, limit),
  ];
}

function showLoss(job, losses, rollbacks) {
  if (!losses.train.length && !losses.valid.length) return emptyState(job.isOver ? "No losses." : "No losses yet.", job.isOver ? "The job ended before its first step." : "They appear once training has begun.");
  return [el("p", { class: "sub" }, "Nats per supervised token; lower is better."), lossChart(losses, rollbacks)];
}

function showFrontier(points, alpha) {
  const columns = [
    { label: "Share of the way", numeric: true, cell: (p) => percent(p.alpha, 0) },
    { label: "General", numeric: true, cell: (p) => percent(p.general) },
    { label: "Domain", numeric: true, cell: (p) => percent(p.domain) },
    { label: "Validation loss", numeric: true, cell: (p) => number(p.valid_loss) },
  ];
  return [
    el("p", { class: "sub" }, "Every point of the line from the base (0 %) to the tuned weights (100 %) can be published later without training again."),
    frontierChart(points, alpha),
    el("details", { "data-focus": "frontier-table" }, el("summary", {}, "The points as a table"), table("Points from base to tuned", columns, points)),
  ];
}

function showBenchmarks(decision) {
  const isLoss = (b) => b.scorer === "nll";
  const value = (b, key) => (isLoss(b) ? number(b[key]) : percent(b[key]));
  const columns = [
    { label: "Benchmark", cell: (b) => [el("span", {}, b.name), el("span", { class: "sub" }, words(b.scorer))] },
    { label: "Items", numeric: true, cell: (b) => [count(b.n_items), b.paired === false ? el("span", { class: "sub" }, "unpaired") : null] },
    { label: "Base", numeric: true, cell: (b) => value(b, "baseline") },
    { label: "Now", numeric: true, cell: (b) => value(b, "value") },
    { label: "Loss of ability", numeric: true, cell: (b) => (isLoss(b)
      ? [el("b", {}, b.drop === null ? DASH : `${number(b.drop, 3)} nats`), el("span", { class: "sub" }, b.lower === null ? "" : `${number(b.lower, 3)} to ${number(b.upper, 3)}`)]
      : [el("b", {}, percent(b.drop)), el("span", { class: "sub" }, interval(b.lower, b.upper))]) },
    { label: "Verdict", cell: (b) => chip(words(b.verdict), tone(b.verdict)) },
  ];
  return [el("p", { class: "sub" }, `Step ${decision.step}, branch ${decision.branch}. Of a text benchmark (nll) the loss is the rise in nats per token.`), table("Benchmarks of the latest look", columns, decision.reading.benchmarks)];
}

function showDecisions(decisions, job) {
  if (!decisions.length) return emptyState(job.isOver ? "No decisions." : "No decisions yet.", job.isOff ? "Nothing is decided while retention is off." : "One is made at every evaluation.");
  const columns = [
    { label: "Step", numeric: true, cell: (d) => [el("b", {}, count(d.step)), el("span", { class: "sub" }, `branch ${d.branch}`)] },
    { label: "Action", cell: (d) => chip(words(d.action), tone(d.action)) },
    { label: "General drop", numeric: true, cell: (d) => dropCell(d.reading) },
    { label: "Verdict", cell: (d) => verdictChip(null, d.reading) },
    { label: "Turned", cell: (d) => changes(d) },
    { label: "Reason", cell: (d) => [d.reason, d.origin === "run" ? null : el("span", { class: "sub" }, "on a result posted from outside")] },
  ];
  return longTable("Decisions, newest first", columns, decisions);
}

/** What a decision changed: strengths, learning rate, and where a rollback went. */
function changes(decision) {
  const found = [];
  if (decision.action === "roll_back") found.push(decision.targetStep ? `back to step ${decision.targetStep}` : "back to the base");
  const [before, after] = [decision.before, decision.after];
  for (const [type, strength] of Object.entries(after?.strengths ?? {})) {
    const was = before?.strengths?.[type];
    if (was !== undefined && was !== strength) found.push(`${type} ${number(was)} → ${number(strength)}`);
  }
  if (before && after && before.learning_rate_scale !== after.learning_rate_scale) found.push(`learning rate × ${number(after.learning_rate_scale)}`);
  return found.length ? el("ul", { class: "strategies" }, found.map((text) => el("li", {}, text))) : el("span", { class: "muted" }, DASH);
}

function showCheckpoints(checkpoints, job) {
  if (!checkpoints.length) return emptyState(job.isOver ? "No checkpoints." : "No checkpoints yet.", "One is saved at every evaluation.");
  const columns = [
    { label: "Step", numeric: true, cell: (c) => [el("b", {}, count(c.step_number)), el("span", { class: "sub" }, `branch ${c.branch}`)] },
    { label: "State", cell: (c) => [chip(words(c.status), tone(c.status)), c.superseded ? [" ", chip("superseded", "calm")] : null] },
    { label: "Validation loss", numeric: true, cell: (c) => number(c.metrics.full_valid_loss ?? c.metrics.valid_loss) },
    { label: "Training loss", numeric: true, cell: (c) => number(c.metrics.train_loss) },
    { label: "Saved", cell: (c) => moment(c.created_at) },
    { label: "Id", cell: (c) => el("span", { class: "mono wrap small" }, c.id) },
  ];
  return longTable("Checkpoints, newest first", columns, checkpoints, (c) => ({ class: c.superseded ? "faded" : null }));
}

function showEvents(events, view, toggle) {
  return [
    el("label", { class: "switch" }, el("input", { type: "checkbox", checked: view.metrics, onchange: toggle, "data-focus": "metrics" }), " Show metric lines"),
    events.length
      ? el("ol", { class: "log", "data-scroll": "log", tabindex: 0, "aria-label": "Log, newest first" }, events.map((event) =>
        el("li", { class: `level-${event.level}` },
          el("time", { datetime: new Date(event.created_at * 1000).toISOString(), title: moment(event.created_at) }, clock(event.created_at)),
          el("span", { class: "level" }, event.level), el("span", { class: "wrap" }, event.message))))
      : emptyState("The log is empty.", "Lines appear as soon as the job is queued."),
  ];
}
