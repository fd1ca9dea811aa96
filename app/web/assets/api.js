// Reading the API: plain GETs with the pasted key, and its objects turned into what the pages show.

const KEY = "retain.key";
const PAGE = 100;
const MOST_PAGES = 30;
const TERMINAL = new Set(["succeeded", "failed", "cancelled"]);

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer that is no success; `status` 0 means that no answer came. */
export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function request(path, signal) {
  let response;
  try {
    response = await fetch(`/v1${path}`, { headers: { authorization: `Bearer ${key.get()}` }, cache: "no-store", signal });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ApiError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? `The server answered ${response.status}.`, body?.error?.code ?? null);
}

const getJson = async (path, signal) => (await request(path, signal)).json();
const rowsOf = (body) => body.data ?? [];
const id = encodeURIComponent;

/** A page of jobs, newest first: { jobs, hasMore }. */
export async function listJobs(limit, signal) {
  const body = await getJson(`/fine_tuning/jobs?limit=${limit}`, signal);
  return { jobs: rowsOf(body).map(readJob), hasMore: Boolean(body.has_more) };
}

export async function getJob(jobId, signal) {
  return readJob(await getJson(`/fine_tuning/jobs/${id(jobId)}`, signal));
}

export async function latestDecision(jobId, signal) {
  const rows = rowsOf(await getJson(`/fine_tuning/jobs/${id(jobId)}/decisions?limit=1`, signal));
  return rows.length ? readDecision(rows[0]) : null;
}

export async function listModels(signal) {
  return rowsOf(await getJson("/models", signal));
}

/** The line from base to tuned as measured at the job's end; empty before. */
export async function listFrontier(jobId, signal) {
  return rowsOf(await getJson(`/fine_tuning/jobs/${id(jobId)}/frontier`, signal));
}

export async function downloadFile(fileId) {
  return (await request(`/files/${id(fileId)}/content`)).blob();
}

/**
 * Follows a list that grows at its head: the first call reads all of it, later ones what is new.
 *
 * With `isMutable` all rows are read each time, as old ones change too (a checkpoint becomes superseded). Of a list
 * of more than 3,000 rows the oldest are left out. Calls must not overlap.
 */
export function follow(path, { isMutable = false } = {}) {
  let known = [];
  return async (signal) => {
    const seen = new Set(isMutable ? [] : known.map((row) => row.id));
    const fresh = [];
    let after = null;
    for (let page = 0; page < MOST_PAGES; page += 1) {
      const body = await getJson(`${path}?limit=${PAGE}${after ? `&after=${id(after)}` : ""}`, signal);
      const rows = rowsOf(body);
      const unseen = rows.filter((row) => !seen.has(row.id));
      fresh.push(...unseen);
      if (!body.has_more || !rows.length || unseen.length < rows.length) break;
      after = rows.at(-1).id;
    }
    known = isMutable ? fresh : [...fresh, ...known];
    return known;
  };
}

// ---- shapes ---------------------------------------------------------------------------------------

/** A job with the fields under the names that the pages use; durations in seconds, ratios 0 to 1. */
export function readJob(job) {
  const { step, total_steps: totalSteps, phase, seconds_remaining: left } = job.progress;
  const isOver = TERMINAL.has(job.status);
  const until = isOver ? job.finished_at : Date.now() / 1000;
  return {
    id: job.id,
    name: job.user_provided_suffix,
    status: job.status,
    stopRequested: job.stop_requested,
    isOver,
    model: job.model,
    fineTunedModel: job.fine_tuned_model,
    createdAt: job.created_at,
    seconds: job.started_at ? Math.max(Math.round(until - job.started_at), 0) : null,
    step,
    totalSteps,
    share: job.status === "succeeded" ? 1 : totalSteps ? Math.min(step / totalSteps, 1) : null,
    phase,
    secondsRemaining: isOver ? null : left,
    isOff: job.retention === null,
    strategies: job.retention?.strategies ?? [],
    strategiesWhy: job.strategies_why,
    maxDrop: job.retention?.policy?.max_drop ?? null,
    report: job.report && { ...job.report, reading: job.report.verdict ? readReading(job.report.verdict) : null },
    trainedTokens: job.trained_tokens,
    resultFiles: job.result_files,
    error: job.error,
    warnings: job.warnings.map((warning) => warning.message),
  };
}

/** A reading's numbers; drops as ratios. */
export function readReading({ verdict, drop, lower, upper, limit, benchmarks }) {
  return { verdict, drop, lower, upper, limit, benchmarks: benchmarks ?? [] };
}

/** A decision with its reading, and the coefficients before and after it. */
export function readDecision(decision) {
  const { id: decisionId, branch, step, origin, action, reason, before, after } = decision;
  return {
    id: decisionId, branch, step, origin, action, reason, before, after,
    target: decision.target_checkpoint_id,
    reading: readReading(decision.reading),
  };
}

/** Loss series from the log's metric lines, oldest first: { train, valid }, rows of { branch, step, value }. */
export function readLosses(events) {
  const train = [];
  const valid = [];
  for (const event of [...events].reverse()) {
    const data = event.type === "metrics" ? event.data : null;
    if (!data || data.step === undefined) continue;
    const at = { branch: data.branch ?? 0, step: data.step };
    if (typeof data.valid_loss === "number") valid.push({ ...at, value: data.valid_loss });
    // An evaluation's line repeats the training loss of its step.
    else if (typeof data.train_loss === "number") train.push({ ...at, value: data.train_loss });
  }
  return { train, valid };
}
