// The three charts of a job, described for charts.js.

import { branchClass, responsiveChart } from "./charts.js";
import { interval, number, percent, words } from "./format.js";

const byStep = (a, b) => a.step - b.step;

/** The general drop at each evaluation: one line a branch, rollbacks marked, against the limit. */
export function dropChart(decisions, limit) {
  const branches = [...new Set(decisions.map((d) => d.branch))].sort((a, b) => a - b);
  const rollbacks = decisions.filter((d) => d.action === "roll_back");
  const starts = new Map(rollbacks.map((d) => [d.branch + 1, d.targetStep ?? 0]));
  const isSplit = branches.length > 1 || rollbacks.length > 0;
  const dropAt = (step, before) => {
    const found = decisions.filter((d) => d.step === step && d.branch < before).sort((a, b) => b.branch - a.branch)[0];
    return step === 0 ? 0 : found?.reading.drop ?? null;
  };
  const series = branches.map((branch) => {
    const points = decisions.filter((d) => d.branch === branch).sort(byStep).map(dropPoint);
    const start = branch === 0 ? 0 : starts.get(branch) ?? null;
    const origin = start === null ? null : dropAt(start, branch);
    const all = origin === null || points[0]?.x === start ? points : [{ x: start, y: origin, isOrigin: true, lower: null, upper: null }, ...points];
    return { name: isSplit ? `branch ${branch}` : "", className: branchClass(branch), points: all, band: true, dots: true };
  });
  const links = rollbacks.map((d) => ({
    from: { x: d.step, y: d.reading.drop },
    to: { x: d.targetStep ?? 0, y: dropAt(d.targetStep ?? 0, d.branch + 1) ?? 0 },
    className: branchClass(d.branch),
    text: `Rolled back from step ${d.step} to ${d.targetStep ? `step ${d.targetStep}` : "the base"}`,
  }));
  return responsiveChart({
    label: `General drop by step. ${decisions.length} evaluations, ${rollbacks.length} rollbacks. The decisions table holds the numbers.`,
    xLabel: "step", yLabel: "general drop", xFormat: number, yFormat: (v) => percent(v, 0), xWhole: true, xMin: 0, xMax: Math.max(...decisions.map((d) => d.step)) * 1.02,
    series, links, zeroLine: true, yFloor: 0, yCeiling: limit === null ? null : limit * 1.4,
    limits: limit === null ? [] : [{ y: limit, text: `limit ${percent(limit)}` }],
    legend: rollbacks.length ? [{ glyph: "↩", text: "rolled back" }] : null,
    hint: "Point at an evaluation to read it.",
  });
}

function dropPoint(decision) {
  const { drop, lower, upper, verdict } = decision.reading;
  return {
    x: decision.step, y: drop, lower, upper,
    mark: decision.action === "roll_back" ? "↩" : null,
    text: `Step ${decision.step}, branch ${decision.branch}: ${percent(drop)} (${interval(lower, upper)}), ${words(verdict)} → ${words(decision.action)}`,
  };
}

/** Training and validation loss: the steps that count as one line, those that a rollback undid fainter. */
export function lossChart({ train, valid }, rollbacks) {
  const undoneAfter = (branch) => Math.min(...rollbacks.filter((d) => d.branch >= branch).map((d) => d.targetStep ?? 0), Infinity);
  const isKept = (row) => row.step <= undoneAfter(row.branch);
  const seriesOf = (rows, word, className, dots) => {
    const pointOf = (row) => ({ x: row.step, y: row.value, text: `Step ${row.step}, branch ${row.branch}: ${word} loss ${number(row.value)}` });
    const kept = rows.filter(isKept).sort(byStep);
    const undone = rows.filter((row) => !isKept(row)).sort(byStep);
    const left = [...new Set(undone.map((row) => row.branch))].map((branch) => {
      const origin = kept.filter((row) => row.branch <= branch && row.step <= undoneAfter(branch)).at(-1);
      const points = undone.filter((row) => row.branch === branch).map(pointOf);
      return { name: "", className: `${className} left-behind`, dots, points: origin ? [{ ...pointOf(origin), isOrigin: true }, ...points] : points };
    });
    return [...left, { name: rows.length ? `${word} loss` : "", className, dots: dots || kept.length === 1, points: kept.map(pointOf) }];
  };
  const last = Math.max(...[...train, ...valid].map((row) => row.step));
  return responsiveChart({
    label: `Training and validation loss by step, up to step ${last}.`,
    xLabel: "step", yLabel: "loss (nats)", xFormat: number, yFormat: number, xWhole: true, xMin: 0, xMax: last,
    series: [...seriesOf(train, "training", "train", false), ...seriesOf(valid, "validation", "valid", true)],
    legend: rollbacks.length ? [{ glyph: "▒", text: "faint: undone by a rollback" }] : null,
  });
}

/** General against domain ability along the line from base to tuned; without a domain benchmark against validation loss. */
export function frontierChart(points, publishedAlpha) {
  const usable = (key) => points.some((p) => typeof p[key] === "number");
  const goal = usable("domain") ? "domain" : "valid_loss";
  const isLoss = goal === "valid_loss";
  const rows = points.filter((p) => typeof p.general === "number" && typeof p[goal] === "number").sort((a, b) => a.alpha - b.alpha);
  // As many decimals as tell the ticks apart: a retained model moves by fractions of a percent.
  const decimals = (key) => {
    const values = rows.map((p) => p[key]);
    const span = Math.max(...values) - Math.min(...values);
    return span > 0.1 ? 0 : span > 0.01 ? 1 : 2;
  };
  const format = isLoss ? number : (v) => percent(v, decimals(goal));
  const places = rows.map((p) => ({
    x: p.general, y: p[goal],
    text: `${percent(p.alpha, 0)} of the way: general ${percent(p.general)}, ${isLoss ? `validation loss ${number(p[goal])}` : `domain ${percent(p[goal])}`}`,
  }));
  const named = rows.map((p, k) => ({ ...places[k], name: p.alpha === 0 ? "base" : p.alpha === 1 ? "tuned" : null, alpha: p.alpha }))
    .filter((p) => p.name || p.alpha === publishedAlpha);
  if (!rows.length) return null;
  return responsiveChart({
    label: `Frontier of ${rows.length} points from base to tuned. The table below holds the numbers.`,
    xLabel: "general ability", yLabel: isLoss ? "validation loss (nats)" : "domain ability",
    xFormat: (v) => percent(v, decimals("general")), yFormat: format, xPad: 0.08,
    series: [{ name: "", className: "frontier", points: places, dots: true }],
    labels: named.map((p) => ({ x: p.x, y: p.y, text: [p.name, p.alpha === publishedAlpha ? `published (${percent(p.alpha, 0)})` : null].filter(Boolean).join(", ") })),
    hint: "Point at a dot to read it.",
  });
}
