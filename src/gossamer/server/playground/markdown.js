/** Markdown as elements. No text becomes HTML: elements are made one by one, and everything else is text nodes. */

import { make, makeCopyButton } from "./dom.js";
import { parseBlocks } from "./markdown_blocks.js";
import { inline } from "./markdown_inline.js";

const shown = new WeakMap(); // element -> sources of the blocks it shows

/** Show a text in an element. While it grows, the blocks that stay the same are left alone, with focus and selection. */
export function showMarkdown(element, text) {
  const blocks = parseBlocks(text);
  const before = shown.get(element) ?? [];
  let same = 0;
  while (same < before.length && same < blocks.length && before[same] === blocks[same].source) same++;
  while (element.childNodes.length > same) element.lastChild.remove();
  for (const block of blocks.slice(same)) element.append(makeBlock(block));
  shown.set(element, blocks.map(({ source }) => source));
}

function makeBlock(block) {
  switch (block.kind) {
    case "code": return makeCode(block);
    case "heading": return make(`h${Math.min(block.level + 3, 6)}`, { className: `level-${block.level}` }, inline(block.text));
    case "rule": return make("hr");
    case "quote": return make("blockquote", {}, block.blocks.map(makeBlock));
    case "list": return makeList(block);
    case "table": return makeTable(block);
    default: return make("p", {}, inline(block.text));
  }
}

function makeCode({ language, text }) {
  const head = make("figcaption", {}, make("span", { textContent: language || "text" }), makeCopyButton(() => text, "Copy code"));
  const code = make("pre", { tabIndex: 0, ariaLabel: "Code" }, make("code", { textContent: text })); // focusable: it scrolls
  return make("figure", { className: "code" }, head, code);
}

function makeList({ ordered, start, loose, items }) {
  const tight = (block) => (block.kind === "paragraph" && !loose ? inline(block.text) : [makeBlock(block)]);
  const list = make(ordered ? "ol" : "ul", {}, items.map((blocks) => make("li", {}, blocks.flatMap(tight))));
  if (ordered) list.start = start;
  return list;
}

function makeTable({ header, rows, align }) {
  const makeCell = (name) => (cell, column) => make(name, { className: align[column] }, inline(cell));
  const makeRow = (name, cells) => make("tr", {}, cells.map(makeCell(name)));
  const table = make("table", {},
    make("thead", {}, makeRow("th", header)),
    make("tbody", {}, rows.map((cells) => makeRow("td", cells))));
  return make("div", { className: "table", tabIndex: 0, role: "group", ariaLabel: "Table" }, table);
}
