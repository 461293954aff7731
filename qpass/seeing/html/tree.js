// The nodes of one graph as a tree of modules. An item is a module, a repeat of modules that are alike, a group of nodes that
// stand for each other, or a run of nodes that were kept. Nothing here touches the document.

function buildTree(nodes) {
  const root = { kind: "module", path: "", children: new Map(), own: [], order: 0 };
  const groups = new Map();
  nodes.forEach((node, i) => {
    const order = node.op === "input" ? i - nodes.length : i; // inputs stand at the beginning of every graph
    if (node.group === null) at(root, node.module).own.push({ kind: "kept", nodes: [node], order });
    else if (groups.has(node.group)) {
      const group = groups.get(node.group);
      group.nodes.push(node);
      group.order = group.order < 0 ? order : order < 0 ? group.order : Math.min(group.order, order);
    } else groups.set(node.group, { kind: "group", nodes: [node], order });
  });
  for (const [id, group] of groups) place(root, group, id);
  const tree = settle(root);
  tree.path = "";
  number(tree, []);
  return tree;
}

function at(root, path) {
  let module = root;
  for (const [i, name] of path ? path.split(".").entries() : []) {
    if (!module.children.has(name)) {
      const inside = path.split(".").slice(0, i + 1).join(".");
      module.children.set(name, { kind: "module", path: inside, name, children: new Map(), own: [], order: Infinity });
    }
    module = module.children.get(name);
  }
  return module;
}

/** A group belongs to the innermost module that holds the weights it replaces, or all of its nodes if there are none. */
function place(root, group, id) {
  group.id = `group ${id}`;
  group.before = group.nodes.filter((n) => n.status === "removed");
  group.after = group.nodes.filter((n) => n.status === "added");
  const weights = group.before.filter((n) => n.op === "input");
  group.modules = [...new Set((weights.length ? weights : group.nodes).map((n) => n.module))];
  group.sites = [...new Set(group.nodes.map((n) => n.site).filter(Boolean))];
  group.status = group.before.length && group.after.length ? "changed" : group.before.length ? "removed" : "added";
  const paths = group.modules.map((m) => m.split("."));
  let shared = 0;
  while (paths.every((p) => p.length > shared && p[shared] === paths[0][shared])) shared += 1;
  at(root, paths[0].slice(0, shared).join(".")).own.push(group);
}

/** Puts the items of a module in order: what has one item only is lifted out, kept nodes are joined, equal blocks are folded. */
function settle(module) {
  const inside = [...module.own];
  const isInput = (item) => item.kind === "kept" && item.nodes.every((n) => n.op === "input");
  for (const child of module.children.values()) {
    const settled = settle(child);
    const lone = settled.items.filter((item) => !isInput(item)).length <= 1; // beside its bias, perhaps
    inside.push(...(lone ? settled.items : [settled]));
  }
  inside.sort((a, b) => a.order - b.order);
  const items = [];
  for (const item of foldRepeats(inside)) {
    const last = items[items.length - 1];
    if (item.kind === "kept" && last && last.kind === "kept") {
      last.nodes.push(...item.nodes);
      if (last.order < 0) last.order = item.order;
    } else items.push(item.kind === "kept" ? { ...item, nodes: [...item.nodes] } : item);
  }
  const computing = items.map((item) => item.order).filter((order) => order >= 0);
  const order = computing.length ? Math.min(...computing) : Math.min(Infinity, ...items.map((item) => item.order));
  return { kind: "module", path: module.path, name: module.name, items, order };
}

/** Modules that differ in a number only, and hold the same changes, become one item. */
function foldRepeats(items) {
  const alike = new Map();
  for (const item of items) {
    if (item.kind !== "module" || !/^\d+$/.test(item.name)) continue;
    const key = signature(item);
    if (!alike.has(key)) alike.set(key, []);
    alike.get(key).push(item);
  }
  const repeats = new Map();
  for (const members of alike.values()) {
    if (members.length < 2) continue;
    const parent = members[0].path.slice(0, -members[0].name.length);
    const repeat = { kind: "repeat", path: `${parent}*`, name: "*", members, order: members[0].order, label: ranges(members) };
    members.forEach((member, i) => repeats.set(member, i ? null : repeat));
  }
  return items.map((item) => (repeats.has(item) ? repeats.get(item) : item)).filter(Boolean);
}

function ranges(members) {
  const numbers = members.map((m) => Number(m.name)).sort((a, b) => a - b);
  const contiguous = numbers[numbers.length - 1] - numbers[0] === numbers.length - 1;
  if (contiguous) return `${numbers[0]}–${numbers[numbers.length - 1]}`;
  return numbers.length > 6 ? `${numbers.slice(0, 4).join(", ")}, …` : numbers.join(", ");
}

/** What makes two blocks equal: the changes in them, with operations and shapes, in order, and the sites that stay in float;
 *  of blocks without any, the operations. Not the names, nor what is kept beside. */
function signature(module) {
  const changes = [], kept = [];
  eachLeaf(module, (leaf) => {
    for (const node of leaf.nodes) {
      const inside = node.module.slice(module.path.length);
      if (leaf.kind === "group") changes.push(`${node.status} ${inside} ${node.op === "input" ? withoutName(node.text) : node.text}`);
      else if (node.site) changes.push(`kept ${inside} ${node.op}`);
      kept.push(node.op);
    }
  });
  return (changes.length ? changes : kept).join("\n");
}

/** Of an input: a part of a weight keeps its name, any other has one of its own. */
const withoutName = (text) => text.replace(/^input \S*_\S*/, "input");

/** Gives every item an id and the items above it. */
function number(item, above) {
  item.above = above;
  item.id = item.id || (item.kind === "kept" ? `kept ${item.nodes[0].name}` : `${item.kind} ${item.path} ${item.label || ""}`);
  const children = item.items || item.members || [];
  for (const child of children) number(child, [...above, item]);
}

/** Calls `act` for each group and run below an item, itself included. */
function eachLeaf(item, act) {
  if (item.kind === "group" || item.kind === "kept") act(item);
  else for (const child of item.items || item.members) eachLeaf(child, act);
}

/** {removed, added, changed, kept} and the keys of the sites below an item. */
function tally(item) {
  if (item.tally) return item.tally;
  const found = { removed: 0, added: 0, changed: 0, kept: 0, sites: new Set() };
  eachLeaf(item, (leaf) => {
    if (leaf.kind === "group") found[leaf.status] += 1;
    else found.kept += leaf.nodes.length;
    for (const node of leaf.nodes) if (node.site) found.sites.add(node.site);
  });
  return (item.tally = found);
}
