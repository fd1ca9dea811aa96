// The models that jobs and chat requests can name.

import { listModels } from "./api.js";
import { chip, el, emptyState, panel, table } from "./elements.js";
import { DASH, RETENTION_MEANING, moment, percent, tone, words } from "./format.js";

/** The page `#/models`: { title, load(signal) -> panels }. */
export function modelsPage() {
  return {
    title: "Models",
    async load(signal) {
      const models = await listModels(signal);
      const isBase = (model) => model.kind === "base";
      const [versions, bases] = [models.filter((model) => !isBase(model)), models.filter(isBase)];
      return [
        panel("versions", "Published versions", versions, () => showVersions(versions)),
        panel("bases", "Base models", bases, () => showBases(bases)),
      ];
    },
  };
}

function showVersions(models) {
  if (!models.length) return emptyState("No versions published yet.", "A job that succeeds publishes one; ", el("a", { href: "#/jobs" }, "the jobs"), " show how far they are.");
  const columns = [
    { label: "Version", cell: (m) => [el("span", { class: "mono wrap" }, m.id), m.fine_tuning_job_id ? el("a", { class: "sub", href: `#/jobs/${encodeURIComponent(m.fine_tuning_job_id)}`, "data-focus": m.id }, "its job") : null] },
    { label: "Retention", cell: (m) => retention(m) },
    { label: "Status", cell: (m) => chip(words(m.status), tone(m.status)) },
    { label: "Kind", cell: (m) => words(m.kind) },
    { label: "Of the way", numeric: true, cell: (m) => percent(m.alpha, 0) },
    { label: "Tuned from", cell: (m) => el("span", { class: "wrap" }, m.parent ?? m.root) },
    { label: "Published", cell: (m) => moment(m.created) },
  ];
  return table("Published model versions", columns, models);
}

function retention(model) {
  if (!model.retention) return el("span", { class: "muted" }, DASH);
  return [chip(words(model.retention), tone(model.retention)), el("span", { class: "sub" }, model.reason ? words(model.reason) : RETENTION_MEANING[model.retention] ?? "")];
}

function showBases(models) {
  if (!models.length) return emptyState("No base model is registered.", "An operator adds one with ", el("code", {}, "retain models add NAME SOURCE"), " on the server, or the demo model with ", el("code", {}, "retain models build-demo NAME"), ".");
  const columns = [
    { label: "Name", cell: (m) => el("span", { class: "mono wrap" }, m.id) },
    { label: "Owner", cell: (m) => m.owned_by },
    { label: "Registered", cell: (m) => moment(m.created) },
  ];
  return table("Base models", columns, models);
}
