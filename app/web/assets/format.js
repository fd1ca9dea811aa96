// Numbers, times and words as people read them; a missing value is a dash.

export const DASH = "–";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** A ratio as a percentage: 0.0312 -> "3.1 %". */
export function percent(ratio, digits = 1) {
  return isNumber(ratio) ? `${minus((ratio * 100).toFixed(digits))} %` : DASH;
}

/** An interval of ratios: "1.0 to 4.2 %". */
export function interval(lower, upper) {
  if (!isNumber(lower) && !isNumber(upper)) return "";
  const end = (value, open) => (isNumber(value) ? minus((value * 100).toFixed(1)) : open);
  return `${end(lower, "−∞")} to ${end(upper, "∞")} %`;
}

/** Significant digits, without trailing zeros and without exponents for everyday sizes. */
export function number(value, digits = 4) {
  if (!isNumber(value)) return DASH;
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3)) return minus(value.toExponential(digits > 2 ? 2 : 1).replace(/\.?0+e/, "e"));
  return minus(String(Number(value.toPrecision(digits))));
}

export function count(value) {
  return isNumber(value) ? value.toLocaleString("en-US") : DASH;
}

/** Seconds as "45 s", "3 min 20 s", "2 h 05 min". */
export function duration(seconds) {
  if (!isNumber(seconds) || seconds < 0) return DASH;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** Unix seconds as local date and time. */
export function moment(unixSeconds) {
  if (!isNumber(unixSeconds)) return DASH;
  return new Date(unixSeconds * 1000).toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

export function clock(unixSeconds) {
  return isNumber(unixSeconds) ? new Date(unixSeconds * 1000).toLocaleTimeString("en-GB") : DASH;
}

/** An API word as people write it: `roll_back` -> "roll back". */
export function words(value) {
  return typeof value === "string" && value ? value.replaceAll("_", " ") : DASH;
}

function minus(text) {
  return /^-0(\.0*)?$/.test(text) ? text.slice(1) : text.replace(/^-/, "−");
}

const TONES = {
  succeeded: "good", pass: "good", good: "good", held: "good", ready: "good", keep: "calm",
  running: "busy", pausing: "busy", validating_files: "calm", queued: "calm", paused: "calm", pending: "calm",
  failed: "bad", regress: "bad", bad: "bad", roll_back: "bad", stop: "bad", error: "bad", cancelled: "calm",
  inconclusive: "warn", unproven: "warn", raise_strength: "warn", lower_learning_rate: "warn", repair: "warn", warn: "warn",
};

/** The colour class of a state, verdict or action. */
export function tone(word) {
  return TONES[word] ?? "calm";
}

/** What a verdict says, in a few words. */
export const VERDICT_MEANING = {
  pass: "The drop is under the limit with 95 % confidence.",
  regress: "The drop is above the limit, beyond chance.",
  inconclusive: "The interval spans the limit: neither proven safe nor proven worse.",
  no_data: "Nothing was measured.",
  at_floor: "The baseline is no better than chance, so no drop can be seen.",
};

/** What a version's word on retention says. */
export const RETENTION_MEANING = {
  held: "The report set shows that general ability held.",
  unproven: "The report set neither passed nor regressed.",
  unwatched: "No benchmark was watched that can say anything.",
  off: "Retention was turned off for this job.",
};
