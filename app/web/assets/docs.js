// The API's operations, drawn from /openapi.json: no foreign code, nothing fetched from elsewhere.

import { el } from "./elements.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const MAX_DEPTH = 4;

const main = document.getElementById("main");

/** Text in which what stands in backticks is code. */
function words(text) {
  return text.split("`").map((part, at) => (at % 2 ? el("code", {}, part) : part));
}

/** What a `$ref` points at, and the last part of its name. */
function resolve(doc, thing) {
  let name = "";
  while (thing && thing.$ref) {
    name = thing.$ref.split("/").pop();
    thing = thing.$ref.split("/").slice(1).reduce((at, part) => at[part], doc);
  }
  return [thing || {}, name];
}

/** A schema's type in a few words. */
function typeOf(doc, schema) {
  const [found, name] = resolve(doc, schema);
  const branches = found.anyOf || found.oneOf;
  if (branches) return [...new Set(branches.map((branch) => typeOf(doc, branch)))].join(" or ");
  if (found.const !== undefined) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map((word) => JSON.stringify(word)).join(" | ");
  if (found.type === "array") return `list of ${typeOf(doc, found.items || {})}`;
  return name || found.type || "anything";
}

/** Bounds and default of a schema. */
function bounds(schema) {
  const told = [];
  for (const [key, word] of [["minimum", ">="], ["maximum", "<="], ["exclusiveMinimum", ">"], ["exclusiveMaximum", "<"],
    ["minLength", "length >="], ["maxLength", "length <="], ["minItems", "items >="], ["maxItems", "items <="], ["pattern", "matches"]])
    if (schema[key] !== undefined) told.push(`${word} ${schema[key]}`);
  if (schema.default !== undefined && schema.default !== null) told.push(`default ${JSON.stringify(schema.default)}`);
  return told.join(", ");
}

/** The object schemas inside a schema: of an optional field, of a list, of a union's branches. */
function objectsIn(doc, schema) {
  const [found] = resolve(doc, schema);
  if (found.properties) return [found];
  if (found.items) return objectsIn(doc, found.items);
  return (found.anyOf || found.oneOf || []).flatMap((branch) => objectsIn(doc, branch));
}

/** The fields of a schema; what lies deeper is drawn when it is opened. */
function fields(doc, schema, depth = 0) {
  const objects = objectsIn(doc, schema);
  return objects.map((object) => el("dl", { class: "fields" }, Object.entries(object.properties).map(([name, inner]) => {
    const [found] = resolve(doc, inner);
    const told = [found.description, bounds(inner.anyOf ? { ...inner.anyOf[0], default: inner.default } : { ...found, ...inner })].filter(Boolean).join(" · ");
    const needed = (object.required || []).includes(name);
    const deeper = depth < MAX_DEPTH && objectsIn(doc, inner).length > 0;
    return [
      el("dt", {}, name, needed ? " *" : "", " ", el("span", { class: "muted small" }, typeOf(doc, inner))),
      told || deeper ? el("dd", {}, told, deeper ? later("fields", () => fields(doc, inner, depth + 1)) : null) : null,
    ];
  })));
}

/** Details whose inside is made when they are first opened. */
function later(title, build) {
  const details = el("details", {}, el("summary", {}, title));
  details.addEventListener("toggle", () => details.append(...[build()].flat(3)), { once: true });
  return details;
}

function media(doc, content) {
  return Object.entries(content || {}).map(([kind, found]) => [
    el("p", { class: "sub" }, kind, found.schema ? ` · ${typeOf(doc, found.schema)}` : ""),
    found.example === undefined ? null : el("pre", {}, JSON.stringify(found.example, null, 2)),
    found.schema && objectsIn(doc, found.schema).length ? later("fields", () => fields(doc, found.schema)) : null,
  ]);
}

function response(doc, [status, given]) {
  const [found] = resolve(doc, given);
  const headers = Object.keys(found.headers || {});
  return [
    el("dt", {}, status),
    el("dd", {}, found.description, headers.length ? el("span", { class: "sub" }, `headers: ${headers.join(", ")}`) : null,
      status.startsWith("2") ? media(doc, found.content) : null),
  ];
}

function inside(doc, operation) {
  const body = operation.requestBody;
  const links = Object.values(operation.responses).flatMap((found) => Object.values(found.links || {}));
  return el("div", { class: "inside" },
    operation.description.split(/\n\s*\n/).map((text) => el("p", {}, words(text))),
    operation.parameters.length ? [el("h3", {}, "Parameters"), el("dl", {}, operation.parameters.map((parameter) => [
      el("dt", {}, parameter.name, parameter.required ? " *" : "", " ",
        el("span", { class: "muted small" }, `${parameter.in}, ${typeOf(doc, parameter.schema)}`)),
      el("dd", {}, [parameter.description, bounds(parameter.schema)].filter(Boolean).join(" · ")),
    ]))] : null,
    body ? [el("h3", {}, "Body", body.required ? " *" : ""), body.description ? el("p", {}, words(body.description)) : null, media(doc, body.content)] : null,
    el("h3", {}, "Answers"), el("dl", {}, Object.entries(operation.responses).map((entry) => response(doc, entry))),
    links.length ? [el("h3", {}, "Then"), el("ul", {}, links.map((link) => el("li", {}, el("a", { href: `#${link.operationId}` }, link.operationId))))] : null);
}

function draw(doc) {
  const every = Object.entries(doc.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => ({ path, method, operation: item[method] })));
  main.replaceChildren(
    el("h1", {}, `${doc.info.title} ${doc.info.version}`),
    ...doc.info.description.split(/\n\s*\n/).map((text) => el("p", {}, words(text))),
    ...doc.tags.map((tag) => el("section", {}, el("h2", {}, tag.name), el("p", { class: "sub" }, tag.description),
      every.filter(({ operation }) => operation.tags[0] === tag.name).map(({ path, method, operation }) => {
        const details = el("details", { class: "operation", id: operation.operationId },
          el("summary", {}, el("span", { class: `verb ${method}` }, method.toUpperCase()), el("code", {}, path), el("span", { class: "muted" }, operation.summary)));
        details.dataset.words = `${method} ${path} ${operation.summary} ${operation.operationId} ${operation.description} ${Object.keys(operation.responses).join(" ")}`.toLowerCase();
        details.addEventListener("toggle", () => details.append(inside(doc, operation)), { once: true });
        return details;
      }))));
}

function find(event) {
  const wanted = event.target.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  for (const section of main.querySelectorAll("section")) {
    const all = [...section.querySelectorAll("details.operation")];
    for (const details of all) details.hidden = !wanted.every((word) => details.dataset.words.includes(word));
    section.hidden = all.every((details) => details.hidden);
  }
}

/** Opens the operation that the address names. */
function follow() {
  const details = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (details && details.matches("details")) {
    details.open = true;
    details.scrollIntoView();
  }
}

try {
  const answer = await fetch("/openapi.json");
  if (!answer.ok) throw new Error(`openapi.json: ${answer.status}`);
  draw(await answer.json());
  document.getElementById("find").addEventListener("input", find);
  addEventListener("hashchange", follow);
  follow();
} catch (error) {
  const notice = document.getElementById("notice");
  notice.textContent = `The document could not be loaded: ${error.message}.`;
  notice.hidden = false;
}
