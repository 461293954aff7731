// Charts of a report, drawn as SVG. A series is {label, points: [{x, ...}]}: one strip each, all strips on one scale.

const STRIP = { width: 1000, height: 44 };

/** Strips below each other, over layers: `draw(point, x, y)` gives the marks of a point. */
function strips(series, low, high, y, draw, line) {
  const most = Math.max(1, ...series.flatMap((s) => s.points.map((p) => p.x)));
  const x = (n) => 8 + (n / most) * (STRIP.width - 16);
  const height = (value) => STRIP.height - 3 - ((y(value) - y(low)) / (y(high) - y(low) || 1)) * (STRIP.height - 6);
  return el("div", { class: "strips" }, ...series.flatMap(({ label, kind, points, range }) => {
    const chart = svg("svg", { class: "strip", viewBox: `0 0 ${STRIP.width} ${STRIP.height}`, preserveAspectRatio: "none", role: "img", "aria-label": `${label}: ${range}` },
      svg("rect", { class: "ground", width: STRIP.width, height: STRIP.height, rx: 3 }));
    if (line && points.length > 1) chart.append(svg("polyline", { points: points.map((p) => `${x(p.x)},${height(p.value)}`).join(" ") }));
    points.forEach((p) => chart.append(svg("g", {}, svg("title", {}, p.title), ...draw(p, x(p.x), height))));
    return [el("span", { class: "label" }, kindChip(kind), " ", label), chart, el("span", { class: "range" }, range)];
  }));
}

/** Sites as series: names that differ in the number of their layer only are one. */
function seriesOf(sites, value, range) {
  const found = new Map();
  for (const site of sites) {
    if (value(site) === null || value(site) === undefined) continue;
    const layer = /(?:^|\.)(\d+)(?=\.)/.exec(site.name);
    const label = patternOf(site.name).replace(/\.weight$/, "");
    if (!found.has(label)) found.set(label, { label, kind: site.kind, points: [] });
    found.get(label).points.push({ x: layer ? Number(layer[1]) : 0, site, value: value(site) });
  }
  for (const one of found.values()) {
    one.points.sort((a, b) => a.x - b.x);
    one.range = range(one.points);
  }
  return [...found.values()];
}

const patternOf = (name) => name.replace(/(^|\.)\d+(?=\.)/g, "$1*");

function errorChart(sites) {
  const series = seriesOf(sites, (s) => s.sqnr_db, (points) => {
    const ends = [Math.min(...points.map((p) => p.value)), Math.max(...points.map((p) => p.value))].map((d) => d.toFixed(1));
    return `${[...new Set(ends)].join(" – ")} dB`;
  });
  if (!series.length) return null;
  const values = series.flatMap((s) => s.points.map((p) => p.value));
  for (const one of series) for (const p of one.points) p.title = `${p.site.name}: ${p.value.toFixed(2)} dB`;
  const mark = (p, x, y) => [svg("rect", { class: "dot", x: x - 3, y: y(p.value) - 2, width: 6, height: 4 })];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return [strips(series, low, high, (v) => v, mark, true), scaleNote(`${low.toFixed(1)} to ${high.toFixed(1)} dB`)];
}

/** Whiskers: the whole range thin, that of most values thick. */
function rangeChart(sites) {
  const series = seriesOf(sites, (s) => s.input, (points) =>
    `${short(Math.min(...points.map((p) => p.value.low)))} … ${short(Math.max(...points.map((p) => p.value.high)))}`);
  if (!series.length) return null;
  const all = series.flatMap((s) => s.points.map((p) => p.value));
  const least = Math.min(...all.flatMap((o) => [o.low_percentile, o.high_percentile].map(Math.abs)).filter((v) => v > 0), 1);
  const signed = (v) => Math.sign(v) * Math.log10(1 + Math.abs(v) / least);
  for (const one of series) for (const p of one.points)
    p.title = `${p.site.name}: ${short(p.value.low)} to ${short(p.value.high)}, most ${short(p.value.low_percentile)} to ${short(p.value.high_percentile)}`
      + (p.value.scale === null ? "" : `, scale ${short(p.value.scale)}`) + (p.value.wide ? ", left in float" : "");
  const mark = (p, x, y) => [
    svg("line", { class: "zero", x1: 0, x2: STRIP.width, y1: y(0), y2: y(0) }),
    svg("line", { class: "whole", x1: x, x2: x, y1: y(p.value.low), y2: y(p.value.high) }),
    svg("line", { class: "most", x1: x, x2: x, y1: y(p.value.low_percentile), y2: y(p.value.high_percentile) })];
  const [low, high] = [Math.min(...all.map((o) => o.low), 0), Math.max(...all.map((o) => o.high), 0)];
  return [strips(series, low, high, signed, mark, false), scaleNote(`${short(low)} to ${short(high)}, linear within ±${short(least)}`)];
}

const scaleNote = (text) => el("p", { class: "dim" }, `Bottom to top of every strip: ${text}. First to last layer from left to right.`);

/** One bar before and one after, to one scale, in parts by kind. */
function bytesChart(sites) {
  const sum = (kind, side) => sites.filter((s) => s.kind === kind).reduce((total, s) => total + s[side], 0);
  const kinds = [...new Set(sites.map((s) => s.kind))].filter((kind) => sum(kind, "bytes_before") || sum(kind, "bytes_after"));
  const whole = Math.max(...["bytes_before", "bytes_after"].map((side) => kinds.reduce((total, kind) => total + sum(kind, side), 0)), 1);
  const stack = (side, name) => {
    const chart = svg("svg", { class: "stack", viewBox: "0 0 1000 26", preserveAspectRatio: "none", role: "img", "aria-label": `Bytes ${name}, by kind` });
    let x = 0;
    for (const kind of kinds) {
      const width = (1000 * sum(kind, side)) / whole;
      chart.append(svg("rect", { class: kindClass(kind), x, width: Math.max(0, width - 1.5), height: 26 },
        svg("title", {}, `${kind}: ${count(sum(kind, side))} bytes`)));
      x += width;
    }
    const total = kinds.reduce((all, kind) => all + sum(kind, side), 0);
    return [el("span", { class: "label" }, name), chart, el("span", { class: "range" }, bytes(total))];
  };
  return [el("div", { class: "strips" }, ...stack("bytes_before", "before"), ...stack("bytes_after", "after")),
    el("div", { class: "legend" }, ...kinds.map((kind) => el("span", {}, kindChip(kind), el("span", { class: "dim" }, ` ${bytes(sum(kind, "bytes_before"))} → ${bytes(sum(kind, "bytes_after"))}`))))];
}
