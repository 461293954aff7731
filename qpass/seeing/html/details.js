// The panel beside the nodes: what became of a site, its scales, and the code of its nodes.

/** `item`: a group, a module or a repeat; or {kind: "kept", nodes: [one]}. `go(name, side)` shows a node elsewhere. */
function detailsOf(item, go, close) {
  const sites = [...tally(item).sites].map((key) => siteOf.get(key)).filter(Boolean);
  const leaf = item.kind === "group" || item.kind === "kept";
  return [
    el("div", { class: "details-head" }, el("h2", {}, titleOf(item)), el("button", { type: "button", "aria-label": "Close details", click: close }, "×")),
    item.repeated ? el("p", { class: "dim" }, `Shown for one of ${item.repeated} that are alike.`) : null,
    ...(leaf || sites.length <= 4 ? sites.map(siteCard) : [manySites(sites)]),
    leaf ? nodeList("Before", item.before || item.nodes, "before", go) : null,
    leaf ? nodeList("After", item.after || item.nodes, "after", go) : null,
  ].filter(Boolean);
}

function titleOf(item) {
  if (item.kind === "module" || item.kind === "repeat") return item.path || "all modules";
  if (item.kind === "kept") return item.nodes[0].name;
  return modulesLabel(item.modules, "") || mainOperation(item);
}

/** "self_attn.q_proj, k_proj, v_proj" of modules with one parent; below `parent`, if it holds them. */
function modulesLabel(modules, parent) {
  const inside = modules.map((m) => (parent && m.startsWith(`${parent}.`) ? m.slice(parent.length + 1) : m === parent ? "" : m));
  const heads = new Set(inside.map((m) => m.slice(0, m.lastIndexOf(".") + 1)));
  if (heads.size > 1) return inside.filter(Boolean).join(", ");
  return [...heads][0] + inside.map((m) => m.slice(m.lastIndexOf(".") + 1)).filter(Boolean).join(", ");
}

const formatOf = (side) => (side === null ? "not there" : side.format || side.dtype || "float");
const formatsOf = ({ before, after }) => [...new Set([formatOf(before), formatOf(after)])].join(" → ");

function siteCard(site) {
  const { before, after } = site;
  const told = [before, after].filter(Boolean);
  const rows = [
    ["format", formatsOf(site)],
    ["error", told.filter((s) => s.sqnr_db !== null).map((s) => `${s.sqnr_db.toFixed(1)} dB`).join(" → "), "SQNR"],
    ["computed in", (after && after.compute) || ""],
    ["stays in float", (after && after.skipped) || ""],
  ].filter(([, text]) => text);
  return el("section", { class: "card" },
    el("h3", {}, kindChip(site.kind), " ", el("span", { class: "name" }, site.name)),
    before && after && (before.nbytes || after.nbytes) ? bytesLine(before.nbytes, after.nbytes) : null,
    el("dl", {}, ...rows.flatMap(([name, text, more]) => [el("dt", {}, more ? `${name} (${more})` : name), el("dd", {}, text)])),
    ...told.filter((s) => s.scales).map((s) => histogram(s.scales, told.filter((t) => t.scales).length > 1 ? formatOf(s) : "")),
  );
}

function manySites(sites) {
  const sum = (side) => sites.reduce((total, s) => total + (s[side] ? s[side].nbytes : 0), 0);
  const kinds = [...new Set(sites.map((s) => s.kind))];
  return el("section", { class: "card" }, el("h3", {}, plural(sites.length, "site")), bytesLine(sum("before"), sum("after")),
    el("dl", {}, ...kinds.flatMap((kind) => {
      const mine = sites.filter((s) => s.kind === kind);
      const formats = [...new Set(mine.map((s) => formatOf(s.after)))];
      return [el("dt", {}, kindChip(kind)), el("dd", {}, `${count(mine.length)} in ${formats.join(", ")}`)];
    })));
}

/** Bars over powers of two. */
function histogram(h, of) {
  const width = 320, height = 84, top = Math.max(...h.counts), bar = width / h.counts.length;
  const chart = svg("svg", { class: "histogram", viewBox: `0 0 ${width} ${height + 16}`, role: "img",
    "aria-label": `Histogram of scales, from ${short(h.low)} to ${short(h.high)}` });
  h.counts.forEach((n, i) => {
    const tall = n ? Math.max(1, (height * n) / top) : 0;
    const from = 2 ** (h.start + i * h.step), to = 2 ** (h.start + (i + 1) * h.step);
    chart.append(svg("rect", { class: "bar", x: i * bar + 0.5, width: Math.max(0.5, bar - 1), y: height - tall, height: tall },
      svg("title", {}, `${count(n)} from ${short(from)} to ${short(to)}`)));
  });
  chart.append(svg("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }));
  const every = Math.max(1, Math.ceil((h.counts.length * h.step) / 6));
  for (let power = Math.ceil(h.start); power <= h.start + h.counts.length * h.step; power += every) {
    const x = ((power - h.start) / h.step) * bar;
    chart.append(svg("line", { class: "axis", x1: x, x2: x, y1: height, y2: height + 3 }),
      svg("text", { x: Math.min(Math.max(x, 10), width - 10), y: height + 14, "text-anchor": "middle" }, "2", svg("tspan", { dy: -4, class: "power" }, String(power))));
  }
  const counted = h.counted < h.total ? `${count(h.counted)} of ${count(h.total)} scales` : plural(h.total, "scale");
  return el("figure", {}, el("figcaption", {}, `Scales${of ? ` in ${of}` : ""}: ${short(h.low)} to ${short(h.high)} `, el("span", { class: "dim" }, counted)), chart);
}

function nodeList(title, nodes, side, go) {
  if (!nodes.length) return null;
  return el("section", { class: "code" }, el("h3", {}, title, el("span", { class: "dim" }, ` ${plural(nodes.length, "node")}`)),
    ...nodes.map((node) => el("article", {},
      el("div", { class: "node-name" }, el("strong", {}, node.name), el("span", { class: "dim" }, node.source)),
      el("pre", {}, node.code || node.text),
      links("reads", node.inputs, side, go), links("read by", usersOf(node.name, side), side, go))));
}

function links(title, names, side, go) {
  if (!names.length) return null;
  const most = 12;
  return el("div", { class: "links" }, el("span", { class: "dim" }, `${title} `),
    ...names.slice(0, most).map((name) => el("button", { type: "button", class: "link", click: () => go(name, side) }, name)),
    names.length > most ? el("span", { class: "dim" }, ` and ${count(names.length - most)} more`) : null);
}
