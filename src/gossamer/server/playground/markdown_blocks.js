/**
 * The blocks of a Markdown text: CommonMark's as models write them, with GitHub's tables. HTML is text here, a single
 * line break is kept, and nesting ends at a bound, so that no text can exhaust the stack.
 */

const DEEPEST = 12; // quotes and lists within each other
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const COLUMN = /^:?-+:?$/;

/**
 * @returns {object[]} blocks with a `kind`, the lines they were read from as `source`, and what the kind needs
 */
export function parseBlocks(text) {
  return readBlocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

function readBlocks(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const block = readBlock(lines, at, depth);
    block.source = lines.slice(at, block.end).join("\n");
    at = block.end;
    blocks.push(block);
  }
  return blocks;
}

/** The block that begins at a line; `end` is the line behind it. */
function readBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return readCode(lines, at);
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", level: heading[1].length, text: (heading[2] ?? "").replace(/\s#+\s*$/, ""), end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (depth < DEEPEST && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return readList(lines, at, depth);
  return readTable(lines, at) ?? readParagraph(lines, at);
}

const beginsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

/** A fence that is not closed yet, because the answer is still coming, reaches to the end. */
function readCode(lines, at) {
  const [, fence, language] = FENCE.exec(lines[at]);
  const indent = lines[at].search(/\S/);
  let end = at + 1;
  const closes = (line) => line.trim().startsWith(fence) && line.trim() === fence[0].repeat(line.trim().length);
  while (end < lines.length && !closes(lines[end])) end++;
  const text = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, line.search(/\S|$/)))).join("\n");
  return { kind: "code", language, text, end: Math.min(end + 1, lines.length) };
}

function readQuote(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && (QUOTE.test(lines[end]) || (lines[end].trim() && !beginsBlock(lines[end])))) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { kind: "quote", blocks: readBlocks(inner, depth + 1), end };
}

function readList(lines, at, depth) {
  const [, before, first] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first);
  const items = [];
  let end = at;
  let loose = false;
  for (;;) {
    const marker = ITEM.exec(lines[end] ?? "");
    if (!marker || /\d/.test(marker[2]) !== ordered || marker[1].length > before.length + 1 || RULE.test(lines[end])) break;
    const item = itemEnd(lines, end, marker);
    const content = [lines[end].slice(marker[0].length), ...lines.slice(end + 1, item).map((line) => outdent(line, marker))];
    loose ||= content.slice(0, content.findLastIndex((line) => line.trim()) + 1).some((line) => !line.trim());
    items.push(readBlocks(content, depth + 1));
    end = item;
    let next = end;
    while (lines[next]?.trim() === "") next++;
    if (next > end && ITEM.test(lines[next] ?? "")) {
      loose = true;
      end = next;
    }
  }
  return { kind: "list", ordered, start: ordered ? parseInt(first, 10) : 1, loose, items, end };
}

/** Lines belong to an item if they are further to the right than its marker, or go on with its paragraph. */
function itemEnd(lines, at, marker) {
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (!line.trim()) {
      const next = lines[end + 1];
      if (next === undefined || next.search(/\S/) <= marker[1].length + 1) break;
    } else if (line.search(/\S/) <= marker[1].length + 1 && (beginsBlock(line) || !lines[end - 1].trim())) {
      break;
    }
  }
  return end;
}

const outdent = (line, marker) => line.slice(Math.min(marker[0].length, line.search(/\S|$/)));

function readTable(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return null;
  const header = cellsOf(lines[at]);
  const columns = cellsOf(lines[at + 1]);
  if (columns.length !== header.length || !columns.every((cell) => COLUMN.test(cell))) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end++;
  const rows = lines.slice(at + 2, end).map((line) => header.map((_, column) => cellsOf(line)[column] ?? ""));
  const align = columns.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  return { kind: "table", header, rows, align, end };
}

/** Cells stand between bars that have no backslash before them. */
function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines[end]) && !readTable(lines, end)) end++;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n"), end };
}
