// Reading the API: plain GETs with the pasted key, and its objects turned into what the pages show.

const KEY = "retain.key";
const PAGE = 100;
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
const rowsOf = (body) => (Array.isArray(body) ? body : body?.data ?? []);
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

/** The frontier's points, or none where none was measured (404 or 409). */
export async function listFrontier(jobId, signal) {
  try {
    const body = await getJson(`/fine_tuning/jobs/${id(jobId)}/frontier`, signal);
    return body.points ?? body.frontier ?? rowsOf(body);
  } catch (problem) {
    if (problem instanceof ApiError && [404, 409].includes(problem.status)) return [];
    throw problem;
  }
}

export async function downloadFile(fileId) {
  return (await request(`/files/${id(fileId)}/content`)).blob();
}

/**
 * Follows a list that grows at its head: the first call reads all of it, later ones what is new.
 *
 * With `isMutable` all rows are read each time, as old ones change too (a checkpoint becomes superseded).
 */
export function follow(path, { isMutable = false } = {}) {
  let known = [];
  return async (signal) => {
    const seen = new Set(isMutable ? [] : known.map((row) => row.id));
    const fresh = [];
    let after = null;
    for (;;) {
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
  const progress = job.progress ?? {};
  const totalSteps = progress.total_steps ?? null;
  const step = progress.step ?? null;
  const isOver = TERMINAL.has(job.status);
  const began = job.started_at ?? job.created_at;
  const asked = job.retention?.strategies;
  return {
    id: job.id,
    name: job.user_provided_suffix ?? job.suffix ?? null,
    status: job.status,
    isOver,
    model: job.model,
    fineTunedModel: job.fine_tuned_model ?? null,
    createdAt: job.created_at,
    finishedAt: job.finished_at ?? null,
    seconds: job.status === "queued" || job.status === "validating_files" ? null : (isOver ? job.finished_at : Date.now() / 1000) - began,
    step,
    totalSteps,
    share: job.status === "succeeded" ? 1 : totalSteps && step !== null ? Math.min(step / totalSteps, 1) : null,
    phase: progress.phase ?? null,
    secondsRemaining: isOver ? null : progress.seconds_remaining ?? null,
    branch: progress.branch ?? 0,
    isOff: job.retention === null,
    strategies: Array.isArray(job.strategies) ? job.strategies : Array.isArray(asked) ? asked : [],
    strategiesWhy: job.strategies_why ?? job.retention?.strategies_why ?? null,
    policy: job.retention?.policy ?? null,
    report: readReport(job),
    trainedTokens: job.trained_tokens ?? progress.trained_tokens ?? null,
    hyperparameters: job.hyperparameters ?? {},
    training: job.training ?? null,
    resultFiles: job.result_files ?? [],
    error: job.error && job.error.message ? job.error : null,
    warnings: (job.warnings ?? []).map((warning) => (typeof warning === "string" ? warning : warning.message ?? JSON.stringify(warning))),
  };
}

function readReport(job) {
  const report = job.report ?? job.retention?.report ?? job.retention_report ?? null;
  const reading = report?.reading ?? report?.verdict ?? job.verdict ?? null;
  if (reading === null) return null;
  return typeof reading === "object" ? readReading(reading) : readReading({ ...report, verdict: reading });
}

/** A reading's numbers; drops as ratios. */
export function readReading(reading) {
  return {
    verdict: reading.verdict ?? null,
    drop: reading.drop ?? null,
    lower: reading.lower ?? null,
    upper: reading.upper ?? null,
    limit: reading.limit ?? reading.max_drop ?? null,
    benchmarks: reading.benchmarks ?? [],
  };
}

/** A decision with its reading and what it turned. */
export function readDecision(decision) {
  const look = decision.evidence?.look;
  return {
    id: decision.id,
    createdAt: decision.created_at ?? null,
    branch: decision.branch ?? 0,
    step: decision.step,
    look: decision.look ?? null,
    action: decision.action,
    code: decision.code ?? null,
    reason: decision.reason ?? "",
    lever: decision.lever ?? null,
    origin: decision.origin ?? "run",
    before: decision.before ?? null,
    after: decision.after ?? null,
    target: decision.target_checkpoint_id ?? decision.target_checkpoint ?? null,
    targetStep: decision.target_step ?? decision.rolled_back_to_step ?? null,
    validLoss: decision.valid_loss ?? look?.valid_loss ?? null,
    reading: readReading(decision.reading ?? look?.reading ?? { ...decision.trigger, ...decision }),
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
