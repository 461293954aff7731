// The page of a comparison: bytes against KL, and a table of all that was measured.

const PLOT = { width: 1000, height: 420, left: 74, right: 24, top: 16, bottom: 44 };
const RATES = ["tokens_per_second", "prompt_per_second"];
const rate = (n) => (n === null ? "" : n.toLocaleString("en-US", { maximumFractionDigits: 1 }));
const COLUMNS = [
  ["recipe", (r) => r.recipe], ["weights", (r) => bytes(r.bytes)],
  ["cache, bytes a token", (r) => (r.cache_bytes === null ? "" : count(Math.round(r.cache_bytes)))],
  ["peak memory", (r) => bytes(r.peak_rss)], ["KL", (r) => kl(r.evaluation.kl)],
  ["95 %", (r) => (r.evaluation.window_kls.length > 1 ? `${kl(r.kl_low)} – ${kl(r.kl_high)}` : "")],
  ["perplexity", (r) => kl(r.evaluation.perplexity, 3)], ["top-1", (r) => kl(r.evaluation.top1, 4)],
  ...["tokens/s", "prompt"].map((name, i) => [name, (r) => rate(r[RATES[i]])]),
];
const kl = (x, digits = 5) => (x === null ? "none" : x.toFixed(digits));

function table() {
  byId("rows").tHead.append(el("tr", {}, ...COLUMNS.map(([name], i) => el("th", { scope: "col", class: i ? "number head" : "head" }, name))));
  byId("rows").tBodies[0].append(...data.rows.map((row) => el("tr", { class: data.frontier.includes(row.recipe) ? "best" : "" },
    ...COLUMNS.map(([, value], i) => el("td", { class: i ? "number" : "path" }, value(row))))));
}

/** Powers of ten, and of bytes some five round numbers. */
function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 2 || 1)), wide = [1, 2, 5].map((f) => f * step).find((s) => (high - low) / s <= 6) ?? step * 5;
  return Array.from({ length: Math.floor(high / wide) - Math.ceil(low / wide) + 1 }, (_, i) => (Math.ceil(low / wide) + i) * wide);
}

function plot() {
  const points = data.rows.filter((r) => r.recipe !== "float" && r.evaluation.kl > 0);
  if (points.length < 2) return;
  const logs = points.flatMap((p) => [p.evaluation.kl, p.kl_low || p.evaluation.kl, p.kl_high].map(Math.log10));
  const [low, high] = [Math.floor(Math.min(...logs)), Math.ceil(Math.max(...logs))];
  const sizes = points.map((p) => p.bytes), most = Math.max(...sizes) * 1.05, least = Math.min(...sizes) * 0.95;
  const x = (n) => PLOT.left + ((n - least) / (most - least)) * (PLOT.width - PLOT.left - PLOT.right);
  const y = (v) => PLOT.top + ((high - Math.log10(v)) / (high - low || 1)) * (PLOT.height - PLOT.top - PLOT.bottom);
  const chart = svg("svg", { class: "frontier", viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: "img", "aria-label": "Bytes of each recipe against its KL" });
  for (let power = low; power <= high; power++)
    chart.append(svg("line", { class: "axis", x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: y(10 ** power), y2: y(10 ** power) }),
      svg("text", { x: PLOT.left - 8, y: y(10 ** power) + 4, "text-anchor": "end" }, `1e${power}`));
  for (const n of ticks(least, most))
    chart.append(svg("text", { x: x(n), y: PLOT.height - 20, "text-anchor": "middle" }, bytes(n)));
  const best = points.filter((p) => data.frontier.includes(p.recipe)).sort((a, b) => a.bytes - b.bytes);
  chart.append(svg("polyline", { points: best.map((p) => `${x(p.bytes)},${y(p.evaluation.kl)}`).join(" ") }));
  for (const p of points) {
    const [at, level, mine] = [x(p.bytes), y(p.evaluation.kl), best.includes(p)];
    const right = at < PLOT.width * 0.75;
    chart.append(svg("g", { class: mine ? "best" : "", tabindex: 0 },
      svg("title", {}, `${p.recipe}: ${bytes(p.bytes)}, KL ${kl(p.evaluation.kl)} (${kl(p.kl_low)} to ${kl(p.kl_high)})`),
      svg("line", { class: "whisker", x1: at, x2: at, y1: y(Math.max(p.kl_low, 10 ** low)), y2: y(p.kl_high) }),
      svg("circle", { cx: at, cy: level, r: 5 }),
      svg("text", { class: "label", x: at + (right ? 9 : -9), y: level + 4, "text-anchor": right ? "start" : "end" }, p.recipe)));
  }
  byId("plot").hidden = false;
  byId("frontier").append(chart);
}

document.title = data.model;
byId("title").textContent = data.model;
byId("data-line").textContent = data.data;
document.addEventListener("keydown", (event) => { if (!isTyping(event) && event.key === "?") byId("help").showModal(); });
plot();
table();
startTheme();
startHelp();
