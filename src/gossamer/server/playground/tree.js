/** The prefix tree as a picture and as a table. */

import { $, make, makeSvg, say, set } from "./dom.js";
import { bytes, count, tokensOf } from "./format.js";

const DRAWN = 400; // nodes; more is no picture
const ROOT = 6; // pixels of the bar that all prompts begin at
const drawn = new Map(); // node id -> its elements, which move when the node does
let tabled = "";

/** Where nodes go: to the right by tokens, down by continuations. Parents come before their children. */
function layOut(nodes, width) {
  const places = new Map([[null, { end: 0, level: 0, rows: 0 }]]);
  for (const node of nodes) {
    const above = places.get(node.parent);
    places.set(node.id, { node, above, start: above.end, end: above.end + Math.sqrt(node.tokens), level: above.level + 1, rows: 0 });
  }
  const root = places.get(null);
  places.delete(null);
  const inOrder = [...places.values()];
  for (const place of inOrder.toReversed()) {
    place.rows ||= 1; // a leaf
    place.above.rows += place.rows;
  }
  const unit = (width - ROOT) / Math.max(...inOrder.map(({ end }) => end), 1);
  const row = Math.max(6, Math.min(30, 320 / Math.max(root.rows, 1)));
  root.next = 0;
  for (const place of inOrder) {
    place.x = ROOT + unit * place.start;
    place.y = place.next = place.above.next;
    place.width = Math.max(unit * (place.end - place.start) - 2, 2);
    place.height = row * place.rows - 2;
    place.above.next += row * place.rows;
  }
  return { places: inOrder, height: row * root.rows };
}

/** @param {object} picture what `GET /v1/prefixes` tells */
export function drawTree({ nodes: all, num_nodes: total }) {
  const nodes = all.slice(0, DRAWN);
  const { places, height } = layOut(nodes, $("tree").clientWidth);
  set($("tree-svg"), { height });
  set($("root"), { height: Math.max(height - 2, 0) });
  places.forEach(drawNode);
  const present = new Set(nodes.map(({ id }) => id));
  for (const [id, { group }] of drawn) {
    if (present.has(id)) continue;
    group.remove();
    drawn.delete(id);
  }
  const used = all.filter(({ references }) => references).length;
  const summary = total === 0 ? "The cache is empty." : `${count(total)} node${total === 1 ? "" : "s"}, ${used} in use` +
    (total > nodes.length ? `; the first ${nodes.length} are shown.` : ".");
  say($("tree-note"), summary);
  $("tree-svg").ariaLabel = `Prefix tree: ${summary}`;
  $("tree").tabIndex = height > $("tree").clientHeight ? 0 : -1; // where there is something to scroll
  if ($("table-details").open) showTable(places);
}

function makeParts(id) {
  const [group, title, label] = [makeSvg("g", { class: "node" }), makeSvg("title"), makeSvg("text", { x: 6 })];
  const block = makeSvg("rect", { class: "block", rx: 3 });
  const part = makeSvg("rect", { class: "part", x: 1, y: 1, rx: 2 });
  const pin = makeSvg("circle", { class: "pin" });
  group.append(title, block, part, label, pin);
  $("tree-svg").append(group);
  drawn.set(id, { group, title, label, block, part, pin });
  return drawn.get(id);
}

function drawNode({ node, x, y, width, height }) {
  const { group, block, part, label, pin, title } = drawn.get(node.id) ?? makeParts(node.id);
  group.style.transform = `translate(${x}px, ${y + 1}px)`;
  group.classList.toggle("done", node.computed === node.tokens);
  group.classList.toggle("used", node.references > 0);
  group.classList.toggle("pinned", node.pinned);
  set(block, { width, height });
  set(part, { width: Math.max((width - 2) * (node.computed / node.tokens), 0), height: height - 2 });
  set(pin, { cx: width - 7, cy: Math.min(height / 2, 7), r: node.pinned && width > 12 ? 3 : 0 });
  set(label, { y: height / 2 });
  // The most that fits; the table and the title tell the rest.
  const uses = node.references ? ` ×${node.references}` : "";
  const room = height < 12 ? 0 : (width - (node.pinned ? 20 : 10)) / 6.6;
  const [number, size] = [count(node.tokens), bytes(node.bytes)];
  const texts = [`${tokensOf(node.tokens)}${uses} · ${size}`, `${number}${uses} · ${size}`, number + uses, number];
  say(label, texts.find((text) => text.length <= room) ?? "");
  const computed = node.computed < node.tokens ? `, ${count(node.computed)} computed` : "";
  const pinned = node.pinned ? ", pinned" : "";
  say(title, `${tokensOf(node.tokens)}${computed}, used by ${count(node.references)}, ${bytes(node.bytes)}${pinned}`);
}

function showTable(places) {
  const rows = places.map(({ node, level }) =>
    [level, count(node.tokens), count(node.computed), node.references, bytes(node.bytes), node.pinned ? "yes" : "no"]);
  if (tabled === (tabled = JSON.stringify(rows))) return; // whoever reads it is not disturbed for nothing
  $("table").replaceChildren(...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", { textContent: cell })))));
}
