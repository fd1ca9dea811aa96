// DOM building by nodes and text alone: nothing the server sends is ever parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; attributes that are null or false are left out, children may be nodes, text or lists. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, alike. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A word in a coloured pill; the word carries the meaning, the colour only helps. */
export function chip(word, tone) {
  return el("span", { class: `chip ${tone}` }, word);
}

/** A titled panel; `key` names it, so that a refresh replaces only the panels that changed. */
export function panel(key, title, signature, build) {
  return { key, title, signature: JSON.stringify(signature), build };
}

/** A table whose rows turn into cards on narrow screens. `columns`: [{ label, cell(row), numeric }]. */
export function table(caption, columns, rows, rowAttributes = () => ({})) {
  const head = columns.map((c) => el("th", { scope: "col", class: c.numeric ? "numeric" : null }, c.label));
  const body = rows.map((row) =>
    el("tr", rowAttributes(row), columns.map((c) =>
      el("td", { "data-label": c.label, class: c.numeric ? "numeric" : null }, c.cell(row)))));
  return el("div", { class: "table-wrap" },
    el("table", {}, el("caption", { class: "unseen" }, caption), el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
}

/** A table of many rows in a box of its own that scrolls, by keyboard too. */
export function longTable(caption, columns, rows, rowAttributes) {
  const box = table(caption, columns, rows, rowAttributes);
  for (const [name, value] of Object.entries({ class: "table-wrap long", role: "region", "aria-label": caption, tabindex: 0, "data-scroll": caption, "data-focus": caption })) box.setAttribute(name, value);
  return box;
}

/** What a panel shows when there is nothing, and what to do about it. */
export function emptyState(title, ...advice) {
  return el("div", { class: "empty" }, el("p", { class: "empty-title" }, title), el("p", {}, advice));
}

/**
 * Puts panels into a container: unchanged ones stay as they are, so focus, selection and scroll survive.
 */
export function showPanels(container, panels) {
  const old = new Map([...container.children].map((node) => [node.dataset.key, node]));
  const nodes = panels.map((one) => {
    const known = old.get(one.key);
    if (known && known.dataset.signature === one.signature) return known;
    return replaceKeepingPlace(known, buildPanel(one));
  });
  for (const node of [...container.children]) if (!nodes.includes(node)) node.remove();
  nodes.forEach((node, place) => {
    if (container.children[place] !== node) container.insertBefore(node, container.children[place] ?? null);
  });
}

function buildPanel(one) {
  const heading = one.title ? el("h2", { id: `title-${one.key}` }, one.title) : null;
  const node = el("section", { class: `panel panel-${one.key}`, "aria-labelledby": one.title ? `title-${one.key}` : null }, heading, one.build());
  node.dataset.key = one.key;
  node.dataset.signature = one.signature;
  return node;
}

function replaceKeepingPlace(known, fresh) {
  if (!known?.isConnected) return fresh;
  const focused = known.contains(document.activeElement) ? document.activeElement.dataset.focus ?? null : null;
  const scrolled = [...known.querySelectorAll("[data-scroll]")].map((n) => [n.dataset.scroll, n.scrollTop, n.scrollLeft]);
  const open = [...known.querySelectorAll("details[open]")].map((n) => n.dataset.focus);
  known.replaceWith(fresh);
  for (const node of fresh.querySelectorAll("details")) if (open.includes(node.dataset.focus)) node.open = true;
  for (const [name, top, left] of scrolled) {
    const node = [...fresh.querySelectorAll("[data-scroll]")].find((n) => n.dataset.scroll === name);
    if (node) [node.scrollTop, node.scrollLeft] = [top, left];
  }
  if (focused) [...fresh.querySelectorAll("[data-focus]")].find((n) => n.dataset.focus === focused)?.focus({ preventScroll: true });
  return fresh;
}
