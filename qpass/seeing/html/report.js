// The page of a report: charts, and a table of sites that is sorted, searched and folded.

const COLUMNS = [
  { name: "kind", value: (s) => s.kind }, { name: "name", value: (s) => s.name },
  { name: "format", value: (s) => s.format || "float" }, { name: "computed in", value: (s) => s.compute || "" },
  { name: "before", value: (s) => s.bytes_before, number: true }, { name: "after", value: (s) => s.bytes_after, number: true },
  { name: "SQNR dB", value: (s) => s.sqnr_db, number: true },
];
const state = { query: "", kind: "", skipped: false, column: null, down: false, open: new Set() };

function matches(site) {
  if (state.kind && !site.kind.split("+").includes(state.kind)) return false;
  if (state.skipped && !site.skipped) return false;
  const hay = [site.kind, site.name, site.format, site.compute, site.skipped].filter(Boolean).join(" ").toLowerCase();
  return state.query.split(/\s+/).every((word) => hay.includes(word));
}

/** Sites that differ in their layer only, with one format, are one row. */
function folded(sites) {
  const found = new Map();
  for (const site of sites) {
    const key = JSON.stringify([patternOf(site.name), site.kind, site.format, site.skipped]);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(site);
  }
  return [...found].map(([key, members]) => ({ key, members, site: members.length > 1 ? summed(members) : members[0] }));
}

function summed(members) {
  const known = members.map((s) => s.sqnr_db).filter((d) => d !== null);
  const sum = (side) => members.reduce((total, s) => total + s[side], 0);
  return { ...members[0], name: `${patternOf(members[0].name)} × ${members.length}`, bytes_before: sum("bytes_before"), bytes_after: sum("bytes_after"),
    sqnr_db: known.length ? Math.min(...known) : null, most: known.length ? Math.max(...known) : null };
}

function compare(a, b) {
  const value = COLUMNS[state.column].value, [x, y] = [value(a), value(b)];
  if (x === y) return 0;
  if (x === null || y === null) return x === null ? 1 : -1;
  return (x < y ? -1 : 1) * (state.down ? -1 : 1);
}

function render() {
  const sites = data.sites.filter(matches);
  const rows = folded(sites);
  if (state.column !== null) rows.sort((a, b) => compare(a.site, b.site));
  byId("sites").tBodies[0].replaceChildren(...rows.flatMap((row) => {
    if (row.members.length === 1) return [siteRow(row.site)];
    const open = state.open.has(row.key);
    const members = state.column === null ? row.members : [...row.members].sort(compare);
    return [siteRow(row.site, row.key, open), ...(open ? members.map((s) => siteRow(s, null, false, "member")) : [])];
  }));
  byId("found").textContent = `${plural(sites.length, "site")}`;
  for (const [i, th] of [...byId("sites").tHead.rows[0].cells].entries())
    th.setAttribute("aria-sort", i !== state.column ? "none" : state.down ? "descending" : "ascending");
}

function siteRow(site, key = null, open = false, style = "") {
  const flip = () => { state.open[state.open.has(key) ? "delete" : "add"](key); render(); };
  const decibels = site.sqnr_db === null ? "" : [...new Set([site.sqnr_db, site.most ?? site.sqnr_db].map((d) => d.toFixed(1)))].join(" – ");
  const token = site.bytes_per_token ? `${count(Math.round(site.bytes_per_token))} bytes a token` : "";
  return el("tr", { class: key === null ? style : "folded", click: key === null ? null : flip },
    el("td", {}, kindChip(site.kind)),
    el("td", { class: "site" }, key === null ? null : el("button", { type: "button", class: "fold-button", "aria-expanded": String(open), "aria-label": `Unfold ${site.name}` }, open ? "▾" : "▸"), el("span", { class: "path" }, site.name)),
    el("td", { class: site.skipped ? "why" : "" }, site.skipped ? `float: ${site.skipped}` : [site.format, token].filter(Boolean).join(", ")),
    el("td", {}, site.compute || ""),
    el("td", { class: "number" }, site.bytes_before ? count(site.bytes_before) : ""),
    el("td", { class: "number" }, site.bytes_after ? count(site.bytes_after) : ""),
    el("td", { class: "number" }, decibels));
}

function header() {
  const sort = (i) => () => { Object.assign(state, { down: state.column === i && !state.down, column: i }); render(); };
  byId("sites").tHead.replaceChildren(el("tr", {}, ...COLUMNS.map((column, i) =>
    el("th", { scope: "col", class: column.number ? "number" : "" }, el("button", { type: "button", click: sort(i) }, column.name)))));
}

function start() {
  document.title = data.title;
  byId("title").textContent = data.title;
  byId("bytes").append(bytesLine(data.bytes_before, data.bytes_after),
    el("div", { class: "dim" }, `${plural(data.sites.length, "site")}; in memory now: ${bytes(data.resident_float)} of float weights, ${bytes(data.resident_quantized)} quantized`));
  byId("notes").hidden = !data.notes.length;
  byId("note-list").append(...data.notes.map((note) => el("li", {}, note)));
  byId("bytes-chart").append(...bytesChart(data.sites));
  for (const [section, figure, chart] of [["errors", "error-chart", errorChart(data.sites)], ["ranges", "range-chart", rangeChart(data.sites)]]) {
    byId(section).hidden = !chart;
    if (chart) byId(figure).append(...chart);
  }
  byId("kinds").append(...[...new Set(data.sites.flatMap((s) => s.kind.split("+")))].map((kind) => el("option", { value: kind }, kind)));
  byId("search").addEventListener("input", paused(() => { state.query = byId("search").value.trim().toLowerCase(); render(); }));
  byId("kinds").addEventListener("change", (event) => { state.kind = event.target.value; render(); });
  byId("skipped").addEventListener("change", (event) => { state.skipped = event.target.checked; render(); });
  document.addEventListener("keydown", (event) => {
    if (isTyping(event)) return;
    if (event.key === "/") { event.preventDefault(); byId("search").focus(); }
    if (event.key === "?") byId("help").showModal();
  });
  header();
  startTheme();
  startHelp();
  render();
}

start();
