"use strict";

// What all pages share. Names of a model are text: they reach the document through text nodes and attributes only.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element. Attributes that are functions listen to the event of that name; null ones are left out. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const count = (n) => n.toLocaleString("en-US");

function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) [n, i] = [n / 1000, i + 1];
  return `${i && n < 100 ? n.toFixed(n < 10 ? 2 : 1) : Math.round(n)} ${units[i]}`;
}

const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
const short = (x) => (x === null ? "" : Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(4)));

/** The class that gives a kind of site its colour: of the first, where a table is two. */
const kindClass = (kind) => `kind-${/^\w+/.exec(kind)?.[0] ?? "other"}`;
const kindChip = (kind) => el("span", { class: `kind ${kindClass(kind)}` }, kind);

/** "1.2 MB → 0.3 MB, 4.0x smaller", with bars to scale. */
function bytesLine(before, after) {
  const whole = Math.max(before, after, 1);
  const bar = (n, side) => svg("svg", { class: `meter ${side}`, viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "whole", width: 100, height: 6 }), svg("rect", { class: "part", width: (100 * n) / whole, height: 6 }));
  const ratio = before && after ? (after <= before ? `${(before / after).toFixed(2)}× smaller` : `${(after / before).toFixed(2)}× larger`) : "";
  return el("div", { class: "bytes-line" },
    el("span", { title: `${count(before)} bytes` }, bytes(before)), bar(before, "before"),
    el("span", { class: "dim" }, "→"),
    el("span", { title: `${count(after)} bytes` }, bytes(after)), bar(after, "after"),
    el("strong", {}, ratio));
}

/** The button goes from the system's colours to light ones to dark ones. */
function startTheme() {
  const names = ["auto", "light", "dark"];
  let at = 0;
  const show = () => {
    if (at) document.documentElement.dataset.theme = names[at];
    else delete document.documentElement.dataset.theme;
    byId("theme").textContent = `Colours: ${names[at]}`;
  };
  byId("theme").addEventListener("click", () => { at = (at + 1) % names.length; show(); });
  show();
}

function startHelp() {
  byId("ask").addEventListener("click", () => byId("help").showModal());
}

/** Calls `act` when typing has paused. */
function paused(act, milliseconds = 120) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(act, milliseconds); };
}

/** Whether a key belongs to a field that is being typed in, or to the browser. */
function isTyping(event) {
  return event.ctrlKey || event.metaKey || event.altKey || byId("help").open
    || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
}
