// Line charts as inline SVG; colours come from the style sheet by class.

import { el, svg } from "./elements.js";

const MARGIN = { top: 14, right: 16, bottom: 40, left: 58 };
const HEIGHT = 280;
const BRANCH_COLOURS = 6;

/** The colour class of a branch. */
export const branchClass = (branch) => `branch-${branch % BRANCH_COLOURS}`;

/** Round tick positions that cover a range. */
export function ticks(low, high, wanted = 5) {
  const span = high - low || 1;
  const raw = span / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
}

/**
 * A chart of points, lines, bands and reference lines.
 *
 * spec: { label, xLabel, yLabel, xFormat, yFormat, series: [{ name, className, points: [{ x, y, lower, upper, text, mark }],
 * band, dots, dashed }], limits: [{ y, text }], links: [{ from: {x, y}, to: {x, y}, text }], yFloor, yCeiling, labels: [{x, y, text}] }
 */
export function lineChart(spec, width) {
  const plot = buildScales(spec, width);
  const image = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, class: "chart", role: "img", "aria-label": spec.label });
  image.append(drawAxes(spec, plot), drawLimits(spec, plot), drawSeries(spec, plot), drawLinks(spec, plot), drawLabels(spec, plot));
  const readout = el("p", { class: "readout", "aria-hidden": "true" }, spec.hint ?? "Point at the chart to read a value.");
  watchPointer(image, spec, plot, readout);
  return el("div", { class: "chart-box" }, drawLegend(spec), image, readout);
}

/** A chart that is drawn again whenever its box changes width. */
export function responsiveChart(spec) {
  const box = el("div", { class: "chart-outer" });
  let drawn = 0;
  const draw = () => {
    const width = Math.max(Math.floor(box.clientWidth), 280);
    if (width === drawn) return;
    drawn = width;
    box.replaceChildren(lineChart(spec, width));
  };
  new ResizeObserver(draw).observe(box);
  return box;
}

function buildScales(spec, width) {
  const points = spec.series.flatMap((s) => s.points);
  const xs = points.map((p) => p.x);
  const ys = [
    ...points.flatMap((p) => [p.y, p.lower, p.upper]),
    ...(spec.limits ?? []).map((l) => l.y),
    spec.yFloor, spec.yCeiling,
  ].filter((y) => typeof y === "number" && Number.isFinite(y));
  const [x0, x1] = padded(spec.xMin ?? Math.min(...xs), spec.xMax ?? Math.max(...xs), spec.xPad ?? 0);
  const [y0, y1] = padded(Math.min(...ys), Math.max(...ys), 0.06);
  const inner = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
  return {
    ...inner, x0, x1, y0, y1,
    x: (value) => inner.left + ((value - x0) / (x1 - x0)) * (inner.right - inner.left),
    y: (value) => inner.bottom - ((Math.min(Math.max(value, y0), y1) - y0) / (y1 - y0)) * (inner.bottom - inner.top),
  };
}

function padded(low, high, share) {
  if (low === high) return [low - Math.abs(low || 1) * 0.1, high + Math.abs(high || 1) * 0.1];
  return [low - (high - low) * share, high + (high - low) * share];
}

function drawAxes(spec, plot) {
  const group = svg("g", { class: "axes" });
  for (const value of ticks(plot.y0, plot.y1)) {
    const y = plot.y(value);
    group.append(
      svg("line", { x1: plot.left, x2: plot.right, y1: y, y2: y, class: value === 0 && spec.zeroLine ? "zero" : "grid" }),
      svg("text", { x: plot.left - 8, y: y + 4, class: "tick end" }, spec.yFormat(value)));
  }
  const room = Math.max(Math.floor((plot.right - plot.left) / 90), 2);
  for (const value of ticks(plot.x0, plot.x1, room).filter((v) => !spec.xWhole || Number.isInteger(v))) {
    group.append(svg("text", { x: plot.x(value), y: plot.bottom + 18, class: "tick middle" }, spec.xFormat(value)));
  }
  group.append(
    svg("text", { x: (plot.left + plot.right) / 2, y: HEIGHT - 6, class: "axis-label middle" }, spec.xLabel),
    svg("text", { x: 0, y: 0, class: "axis-label middle", transform: `translate(13 ${(plot.top + plot.bottom) / 2}) rotate(-90)` }, spec.yLabel));
  return group;
}

function drawLimits(spec, plot) {
  return svg("g", {}, (spec.limits ?? []).map((limit) => [
    svg("line", { x1: plot.left, x2: plot.right, y1: plot.y(limit.y), y2: plot.y(limit.y), class: "limit" }),
    svg("text", { x: plot.right - 4, y: plot.y(limit.y) - 6, class: "limit-label end" }, limit.text),
  ]));
}

function drawSeries(spec, plot) {
  return svg("g", {}, spec.series.map((series) => {
    const path = series.points.map((p, k) => `${k ? "L" : "M"}${plot.x(p.x).toFixed(1)} ${plot.y(p.y).toFixed(1)}`).join("");
    return svg("g", { class: `series ${series.className}` },
      series.band ? drawBand(series.points, plot) : null,
      svg("path", { d: path, class: series.dashed ? "line dashed" : "line" }),
      series.dots ? series.points.map((p) => drawDot(p, plot)) : null);
  }));
}

/** Whiskers, as the points are few and each has its own interval; an open end runs to the edge of the plot. */
function drawBand(points, plot) {
  return points.filter((p) => !p.isOrigin && (p.lower !== null || p.upper !== null)).map((p) => {
    const x = plot.x(p.x);
    const top = plot.y(p.upper ?? plot.y1);
    const bottom = plot.y(p.lower ?? plot.y0);
    const caps = [p.upper === null ? null : top, p.lower === null ? null : bottom].filter((y) => y !== null);
    return [
      svg("line", { x1: x, x2: x, y1: top, y2: bottom, class: "whisker" }),
      caps.map((y) => svg("line", { x1: x - 5, x2: x + 5, y1: y, y2: y, class: "whisker" })),
    ];
  });
}

function drawDot(point, plot) {
  if (point.isOrigin) return null;
  const at = { cx: plot.x(point.x), cy: plot.y(point.y) };
  const title = svg("title", {}, point.text);
  if (!point.mark) return svg("circle", { ...at, r: 4, class: "dot" }, title);
  return [
    svg("circle", { ...at, r: 9, class: "mark" }, title),
    svg("text", { x: at.cx, y: at.cy + 4.5, class: "mark-glyph middle" }, point.mark),
  ];
}

/** Where a rollback went back to: a dotted arc from the point to its target. */
function drawLinks(spec, plot) {
  return svg("g", { class: "links" }, (spec.links ?? []).map((link) => {
    const [x1, y1, x2, y2] = [plot.x(link.from.x), plot.y(link.from.y), plot.x(link.to.x), plot.y(link.to.y)];
    const bend = Math.max(Math.min(y1, y2) - 26, plot.top);
    return svg("path", { d: `M${x1} ${y1 - 9}C${x1} ${bend} ${x2} ${bend} ${x2} ${y2 - 5}`, class: `link ${link.className ?? ""}` }, svg("title", {}, link.text));
  }));
}

function drawLabels(spec, plot) {
  return svg("g", {}, (spec.labels ?? []).map((label) => {
    const x = plot.x(label.x);
    const isRight = x > (plot.left + plot.right) / 2;
    return svg("text", { x: x + (isRight ? -10 : 10), y: plot.y(label.y) + (label.below ? 18 : -8), class: `point-label ${isRight ? "end" : "start"}` }, label.text);
  }));
}

function drawLegend(spec) {
  const entries = spec.series.filter((s) => s.name).map((s) => [s.className, s.dashed ? "dashed" : "", s.name]);
  if (entries.length < 2 && !spec.legend) return null;
  return el("ul", { class: "legend" },
    entries.map(([className, dash, name]) => el("li", { class: className }, el("span", { class: `key ${dash}` }), name)),
    (spec.legend ?? []).map((entry) => el("li", {}, el("span", { class: "glyph" }, entry.glyph), entry.text)));
}

function watchPointer(image, spec, plot, readout) {
  const spots = spec.series.flatMap((s) => s.points.filter((p) => !p.isOrigin && p.text).map((p) => ({ x: plot.x(p.x), y: plot.y(p.y), text: p.text })));
  const ring = svg("circle", { r: 7, class: "ring", visibility: "hidden" });
  image.append(ring);
  const resting = readout.textContent;
  image.addEventListener("pointermove", (event) => {
    const box = image.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const nearest = spots.reduce((best, s) => {
      const distance = Math.hypot(s.x - x, (s.y - y) / 2);
      return best && best.distance <= distance ? best : { ...s, distance };
    }, null);
    if (!nearest) return;
    ring.setAttribute("cx", nearest.x);
    ring.setAttribute("cy", nearest.y);
    ring.setAttribute("visibility", "visible");
    readout.textContent = nearest.text;
  });
  image.addEventListener("pointerleave", () => {
    ring.setAttribute("visibility", "hidden");
    readout.textContent = resting;
  });
}
