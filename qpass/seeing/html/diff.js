// The page of a diff: a list of rows made from the tree and from what is open, filtered and selected; made again when that changes.

const siteOf = new Map(data.sites.map((site) => [site.key, site]));
/** Rows that are made at a time. */
const PAGE = 400;

const state = { graph: 0, open: new Map(), limit: PAGE, query: "", kind: "", changed: false, skipped: false, selected: null, panel: false };
let tree, leaves, readers, rows = [];

// --- the graph that is shown ----------------------------------------------------------------------------------------------

function showGraph(i) {
  Object.assign(state, { graph: i, open: new Map(), limit: PAGE, selected: null });
  tree = buildTree(data.graphs[i].nodes);
  leaves = { before: new Map(), after: new Map() };
  eachLeaf(tree, (leaf) => leaf.nodes.forEach((node) => {
    if (node.status !== "added") leaves.before.set(node.name, leaf);
    if (node.status !== "removed") leaves.after.set(node.name, leaf);
  }));
  readers = null;
  closeDetails();
  showTotals();
  render();
}

function usersOf(name, side) {
  if (!readers) {
    readers = { before: new Map(), after: new Map() };
    for (const node of data.graphs[state.graph].nodes)
      for (const at of ["before", "after"])
        if (node.status !== (at === "before" ? "added" : "removed"))
          for (const input of node.inputs) readers[at].set(input, [...(readers[at].get(input) || []), node.name]);
  }
  return readers[side].get(name) || [];
}

function showTotals() {
  const graph = data.graphs[state.graph];
  byId("totals").replaceChildren(...[["removed", "−"], ["added", "+"], ["changed", "~"], ["kept", "="]].map(([status, sign]) =>
    el("span", { class: `total ${status}`, title: status === "changed" ? "places with nodes on both sides" : `nodes ${status}` },
      el("b", { "aria-hidden": "true" }, sign), ` ${count(graph[status])} ${status}`)));
}

// --- what matches ---------------------------------------------------------------------------------------------------------

const isFiltered = () => Boolean(state.query || state.kind || state.skipped);
const isSkipped = (key) => Boolean(siteOf.get(key)?.after?.skipped);

function nodeMatches(node) {
  const site = siteOf.get(node.site);
  if (state.kind && !(site && site.kind.split("+").includes(state.kind))) return false;
  if (state.skipped && !isSkipped(node.site)) return false;
  if (!state.query) return true;
  node.hay ??= [node.name, node.module, node.source, node.text, node.site, site?.before?.format, site?.after?.format, site?.after?.skipped]
    .filter(Boolean).join(" ").toLowerCase();
  return state.query.split(/\s+/).every((word) => node.hay.includes(word));
}

/** The nodes of a leaf that are shown; all of a group if one matches. */
function matching(leaf) {
  if (leaf.kind === "kept") return state.changed ? [] : isFiltered() ? leaf.nodes.filter(nodeMatches) : leaf.nodes;
  return !isFiltered() || leaf.nodes.some(nodeMatches) ? leaf.nodes : [];
}

/** How much below an item matches; 0 hides it. */
function matches(item, known) {
  if (!known.has(item)) {
    const below = item.items || item.members;
    known.set(item, below ? below.reduce((sum, child) => sum + matches(child, known), 0) : matching(item).length);
  }
  return known.get(item);
}

// --- rows -----------------------------------------------------------------------------------------------------------------

/** Fills `found` with {item, level, open, ..}: depth first, what is folded left out. */
function collect(item, level, known, found, folded = false) {
  if (!matches(item, known)) return;
  const row = { item, level, id: item.id };
  if (item.kind === "group") found.push({ ...row });
  else if (item.kind === "kept") {
    const nodes = matching(item);
    const open = state.open.get(item.id) ?? (isFiltered() && nodes.length <= 8);
    found.push({ ...row, open, nodes });
    if (open) for (const node of nodes) found.push({ item: { kind: "kept", id: `node ${node.name}`, nodes: [node], above: [...item.above, item] }, level: level + 1, id: `node ${node.name}`, node });
  } else if (item.kind === "repeat") {
    const members = item.members.filter((member) => matches(member, known));
    const open = state.open.get(item.id) ?? (isFiltered() && members.length < item.members.length);
    found.push({ ...row, open, shown: members.length });
    if (open) for (const member of members) collect(member, level + 1, known, found, members.length > 1);
    else for (const child of members[0].items) collect(child, level + 1, known, found);
  } else {
    const open = state.open.get(item.id) ?? !folded;
    found.push({ ...row, open });
    if (open) for (const child of item.items) collect(child, level + 1, known, found);
  }
}

function render() {
  const known = new Map();
  rows = [];
  for (const item of tree.items) collect(item, 1, known, rows);
  const visible = rows.slice(0, state.limit);
  const more = rows.length - visible.length;
  byId("rows").replaceChildren(...visible.map(rowElement),
    ...(more ? [el("button", { class: "more", type: "button", click: () => { state.limit += PAGE; render(); } }, `${count(more)} more rows`)] : []),
    ...(rows.length ? [] : [el("p", { class: "empty" }, data.graphs[state.graph].nodes.length ? "Nothing matches." : "The graph is empty.")]));
  byId("found").textContent = isFiltered() ? plural(matches(tree, known), "node") : "";
  if (!visible.some((row) => row.id === state.selected)) state.selected = null;
  mark();
}

function rowElement(row) {
  const { item } = row;
  const attributes = { role: "treeitem", tabindex: "-1", "data-id": row.id, "aria-level": row.level, "aria-selected": "false",
    "aria-expanded": "open" in row ? String(row.open) : null, click: () => { choose(row.id); act(row); } };
  const inner = row.node ? keptNode(row.node) : item.kind === "group" ? groupRow(item) : item.kind === "kept" ? keptRow(row) : headingRow(row);
  const node = el("div", { ...attributes, class: `row ${row.node ? "kept-node" : item.kind} ${item.status || ""}` }, ...inner);
  node.style.setProperty("--level", row.level - 1);
  return node;
}

function headingRow({ item, open, shown }) {
  const found = tally(item), parent = item.above[item.above.length - 1]?.path || "";
  const path = parent && !parent.endsWith("*") ? item.path.slice(parent.length + 1) : item.path;
  const sites = [...found.sites].map((key) => siteOf.get(key)).filter(Boolean);
  const sum = (side) => sites.reduce((total, site) => total + (site[side] ? site[side].nbytes : 0), 0);
  return [el("span", { class: "fold", "aria-hidden": "true" }, open ? "▾" : "▸"),
    el("span", { class: "path" }, path),
    item.kind === "repeat" ? el("span", { class: "times" }, `× ${item.members.length}`) : null,
    item.kind === "repeat" ? el("span", { class: "dim" }, open ? `each of ${item.label}` : `${item.label}, alike${shown < item.members.length ? `; ${plural(shown, "match", "matches")}` : ""}: one is shown`) : null,
    el("span", { class: "grow" }),
    ...["changed", "removed", "added"].filter((s) => found[s]).map((s) => el("span", { class: `total ${s}` }, `${count(found[s])} ${s}`)),
    sum("before") ? el("span", { class: "size dim" }, `${bytes(sum("before"))} → ${bytes(sum("after"))}`) : null];
}

const SIGN = { removed: "−", added: "+", changed: "~", kept: "=" };

function groupRow(group) {
  const parent = group.above[group.above.length - 1]?.path || "";
  const sites = group.sites.map((key) => siteOf.get(key)).filter(Boolean);
  const kinds = [...new Set(group.sites.map((key) => siteOf.get(key)?.kind ?? key.split(" ")[0]))], formats = [...new Set(sites.map(formatsOf))];
  const label = modulesLabel(group.modules, parent) || mainOperation(group);
  const many = group.modules.length > 1;
  const cell = (nodes, side) => el("div", { class: `cell ${side}` }, ...nodes.map((node) => nodeLine(node, many)));
  return [
    el("div", { class: "group-head" }, el("b", { class: "sign", title: group.status }, SIGN[group.status]), el("span", { class: "path" }, label),
      ...kinds.map(kindChip), el("span", { class: "dim" }, formats.join(", ")),
      el("span", { class: "grow" }), el("span", { class: "dim" }, group.status === "changed" ? `${group.before.length} → ${group.after.length}` : "")),
    el("div", { class: "cells" }, cell(group.before, "removed"), cell(group.after, "added"))];
}

/** Of a group that no module of its own tells apart. */
const mainOperation = ({ nodes }) => (nodes.findLast((n) => n.status === "removed" && n.op !== "input") || nodes[nodes.length - 1]).op;

function nodeLine(node, named) {
  const shape = node.text.lastIndexOf(" -> ");
  return el("div", { class: "line", title: node.name }, el("b", { class: "sign", "aria-label": node.status }, SIGN[node.status]),
    el("code", {}, shape < 0 ? node.text : node.text.slice(0, shape), shape < 0 ? null : el("span", { class: "dim" }, ` ${node.text.slice(shape + 4)}`)),
    named ? el("span", { class: "of-module" }, node.module.slice(node.module.lastIndexOf(".") + 1)) : null);
}

function keptRow({ nodes, open }) {
  const names = [...new Set(nodes.map((n) => n.op))].filter((op) => op !== "input");
  const skipped = new Set(nodes.map((n) => n.site).filter(isSkipped));
  return [el("span", { class: "fold", "aria-hidden": "true" }, open ? "▾" : "⋯"), el("span", {}, `${count(nodes.length)} unchanged`),
    el("span", { class: "dim ops" }, names.slice(0, 7).join(", ") + (names.length > 7 ? ", …" : "")),
    skipped.size ? el("span", { class: "kind skipped" }, plural(skipped.size, "site in float", "sites in float")) : null];
}

function keptNode(node) {
  const side = () => el("div", { class: "cell" }, nodeLine(node, true));
  return [el("div", { class: "cells" }, side(), side())];
}

// --- selection ------------------------------------------------------------------------------------------------------------

const elementOf = (id) => [...byId("rows").children].find((node) => node.dataset.id === id);

function mark() {
  let any = false;
  for (const node of byId("rows").children) {
    const chosen = node.dataset.id === state.selected && Boolean(state.selected);
    if (node.getAttribute("role") !== "treeitem") continue;
    node.setAttribute("aria-selected", String(chosen));
    node.tabIndex = chosen ? 0 : -1;
    any ||= chosen;
  }
  if (!any && byId("rows").firstElementChild) byId("rows").firstElementChild.tabIndex = 0;
}

function choose(id) {
  state.selected = id;
  mark();
  const node = elementOf(id);
  node?.focus({ preventScroll: true });
  node?.scrollIntoView({ block: "nearest" });
  const row = rows.find((r) => r.id === id);
  if (state.panel && row) showDetails(row.item);
}

/** Fold, unfold, or show what a row is about. */
function act(row) {
  if ("open" in row) toggle(row, !row.open);
  else { state.panel = true; showDetails(row.item); }
}

function toggle(row, open) {
  state.open.set(row.id, open);
  render();
  choose(row.id);
}

function showDetails(item) {
  if (item.kind === "kept" && item.nodes.length > 1) return;
  const repeat = item.above.find((a) => a.kind === "repeat" && !rows.some((r) => r.item === a && r.open));
  byId("details").replaceChildren(...detailsOf({ ...item, repeated: repeat?.members.length }, go, closeDetails));
  byId("details").hidden = false;
  byId("details").scrollTop = 0;
  elementOf(state.selected)?.scrollIntoView({ block: "nearest" }); // the panel has taken room from the rows
}

function closeDetails() {
  state.panel = false;
  byId("details").hidden = true;
  byId("details").replaceChildren();
}

/** Unfolds what hides a node and selects its row. */
function go(name, side) {
  const leaf = leaves[side].get(name);
  if (!leaf) return;
  clearFilters();
  for (const item of leaf.above) {
    if (item.kind !== "repeat") state.open.set(item.id, true);
    else if (!leaf.above.includes(item.members[0])) state.open.set(item.id, true);
  }
  if (leaf.kind === "kept") state.open.set(leaf.id, true);
  state.limit = Infinity;
  render();
  const id = leaf.kind === "kept" ? `node ${name}` : leaf.id;
  state.panel = true;
  choose(id);
}

function move(step, wanted = () => true) {
  const at = rows.findIndex((row) => row.id === state.selected);
  for (let i = at < 0 ? (step > 0 ? 0 : rows.length - 1) : at + step; i >= 0 && i < rows.length; i += step) {
    if (!wanted(rows[i])) continue;
    if (i >= state.limit) { state.limit = i + PAGE; render(); }
    return choose(rows[i].id);
  }
}

function fold() {
  const row = rows.find((r) => r.id === state.selected);
  if (!row) return;
  if (row.open) return toggle(row, false);
  const above = [...row.item.above].reverse().find((item) => rows.some((r) => r.item === item));
  if (above) choose(above.id);
}

// --- keys and fields ------------------------------------------------------------------------------------------------------

const isChange = (row) => row.item.kind === "group";
const chosen = () => rows.find((row) => row.id === state.selected);
const keys = {
  j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
  n: () => move(1, isChange), p: () => move(-1, isChange),
  Enter: () => chosen() && act(chosen()), " ": () => chosen() && act(chosen()),
  ArrowRight: () => chosen() && "open" in chosen() && !chosen().open && toggle(chosen(), true), ArrowLeft: fold,
  Home: () => rows.length && choose(rows[0].id), End: () => rows.length && move(-1, (row) => row === rows[rows.length - 1]),
  "/": () => byId("search").focus(), "?": () => byId("help").showModal(), Escape: closeDetails,
};

function onKey(event) {
  if (event.key === "Escape" && event.target === byId("search")) { clearFilters(); render(); byId("rows").firstElementChild?.focus(); return; }
  const inButton = event.target.tagName === "BUTTON" && (event.key === "Enter" || event.key === " ");
  if (isTyping(event) || inButton || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
}

function clearFilters() {
  Object.assign(state, { query: "", kind: "", changed: false, skipped: false });
  byId("search").value = byId("kinds").value = "";
  byId("changed").checked = byId("skipped").checked = false;
}

/** What was folded by hand unfolds, so that nothing that matches is hidden. */
function filter(change) {
  const open = new Map([...state.open].filter(([, isOpen]) => isOpen));
  Object.assign(state, change, { limit: PAGE, open });
  render();
}

function start() {
  document.title = data.title;
  byId("title").textContent = data.title;
  const sum = (side) => data.sites.reduce((total, site) => total + (site[side] ? site[side].nbytes : 0), 0);
  if (data.sites.length) byId("bytes").replaceChildren(bytesLine(sum("before"), sum("after")));
  const kinds = new Set(data.sites.flatMap((site) => site.kind.split("+")));
  byId("kinds").append(...[...kinds].map((kind) => el("option", { value: kind }, kind)));
  byId("graphs").append(...data.graphs.map((_, i) => el("option", { value: i }, `${i + 1} of ${data.graphs.length}`)));
  byId("graphs-label").hidden = data.graphs.length < 2;
  byId("graphs").addEventListener("change", (event) => showGraph(Number(event.target.value)));
  byId("search").addEventListener("input", paused(() => {
    const query = byId("search").value.trim().toLowerCase();
    if (query !== state.query) filter({ query }); // Escape may have come first, and the focus gone to a row since
  }));
  byId("kinds").addEventListener("change", (event) => filter({ kind: event.target.value }));
  for (const name of ["changed", "skipped"]) byId(name).addEventListener("change", (event) => filter({ [name]: event.target.checked }));
  document.addEventListener("keydown", onKey);
  startTheme();
  startHelp();
  if (data.graphs.length) showGraph(0);
  else byId("rows").append(el("p", { class: "empty" }, "No graph was captured yet: call the model once."));
}

start();
