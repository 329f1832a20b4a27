/**
 * Text within a block: code, emphasis, strong, struck out, and links. Links lead to http and https only, images are
 * their links, and HTML is text.
 *
 * Marks that may open something are kept as frames, each with what came after it. A mark that closes wraps the frame's
 * content; a frame that nothing closes becomes text again.
 */

import { make } from "./dom.js";

const OPEN_FRAMES = 40; // marks beyond are text: the search for the one that is closed is bounded
const TARGET = /\(\s*<?([^\s<>()]{0,2000}(?:\([^\s<>()]{0,500}\)[^\s<>()]{0,2000})?)>?(?:\s+"[^"]{0,500}"|\s+'[^']{0,500}')?\s*\)/y;
const ADDRESS = /<?https?:\/\/[^\s<>"`|]{1,2000}>?/y;
const ESCAPED = "\\`*_#|~>-!.+";
const WORD = /[\p{L}\p{N}]/u;
const SPACE = /\s|^$/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const SPECIAL = /[\\`*_~[\]!h<]/;

/** The address if it is one of a page, otherwise null. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const makeLink = (href, children) =>
  make("a", { href, target: "_blank", rel: "noopener noreferrer", title: href }, children);

/** @returns {(Node | string)[]} what the text says */
export function inline(text) {
  return new Inline(text).read();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.frames = [{ children: [], literal: "" }];
    this.unclosedCode = new Set(); // lengths of runs of backticks that have no partner
  }

  read() {
    while (this.at < this.text.length) {
      const here = this.text[this.at];
      const handled = SPECIAL.test(here) && (
        here === "\\" ? this.escape()
          : here === "`" ? this.code()
            : here === "[" || this.text.startsWith("![", this.at) ? this.openLink()
              : here === "]" ? this.closeLink()
                : here === "h" || here === "<" ? this.address()
                  : "*_~".includes(here) && this.mark(here));
      if (!handled) this.plain();
    }
    while (this.frames.length > 1) this.flatten();
    return this.frames[0].children;
  }

  /** Texts behind each other become one, so that there are few nodes. */
  push(node) {
    const { children } = this.frames.at(-1);
    if (typeof node === "string" && typeof children.at(-1) === "string") children.push(children.pop() + node);
    else children.push(node);
  }

  plain() {
    let end = this.at + 1;
    while (end < this.text.length && !SPECIAL.test(this.text[end])) end++;
    this.push(this.text.slice(this.at, end));
    this.at = end;
    return true;
  }

  escape() {
    const next = this.text[this.at + 1];
    if (!next || !ESCAPED.includes(next)) return false;
    this.push(next);
    this.at += 2;
    return true;
  }

  code() {
    const run = /`+/y;
    run.lastIndex = this.at;
    const ticks = run.exec(this.text)[0];
    const start = this.at + ticks.length;
    if (!this.unclosedCode.has(ticks.length)) {
      for (const { 0: found, index } of this.text.slice(start).matchAll(/`+/g)) {
        if (found.length !== ticks.length) continue;
        const inner = this.text.slice(start, start + index).replaceAll("\n", " ");
        const padded = inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ");
        this.push(make("code", { textContent: padded ? inner.slice(1, -1) : inner }));
        this.at = start + index + ticks.length;
        return true;
      }
      this.unclosedCode.add(ticks.length);
    }
    this.push(ticks);
    this.at = start;
    return true;
  }

  address() {
    const before = this.text[this.at - 1] ?? "";
    ADDRESS.lastIndex = this.at;
    const found = WORD.test(before) || this.frames.some(({ link }) => link) ? null : ADDRESS.exec(this.text);
    if (!found) return false;
    const inBrackets = found[0].startsWith("<");
    if (inBrackets && !found[0].endsWith(">")) return false;
    // A full stop behind an address belongs to the sentence, and so does a bracket that does not open in it.
    const shown = inBrackets ? found[0].slice(1, -1) : found[0].replace(/>$/, "").replace(/[.,;:!?*_~'\]]+$/, "").replace(/^([^(]*)\).*$/, "$1");
    const href = safeAddress(shown);
    if (!href) return false;
    this.push(makeLink(href, [shown]));
    this.at += inBrackets ? found[0].length : shown.length;
    return true;
  }

  openLink() {
    const literal = this.text[this.at] === "!" ? "![" : "[";
    this.at += literal.length;
    if (this.frames.length < OPEN_FRAMES) this.frames.push({ children: [], literal, link: true });
    else this.push(literal);
    return true;
  }

  closeLink() {
    const opened = this.frames.findLastIndex(({ link }) => link);
    if (opened < 0) return false;
    while (this.frames.length > opened + 1) this.flatten();
    TARGET.lastIndex = this.at + 1;
    const target = TARGET.exec(this.text);
    const href = target && !this.frames.slice(0, opened).some(({ link }) => link) ? safeAddress(target[1]) : null;
    if (href) {
      const { children } = this.frames.pop();
      this.push(makeLink(href, children.length ? children : [href]));
      this.at = TARGET.lastIndex;
    } else {
      this.flatten(); // an address of another kind stays what was written
      this.push("]");
      this.at++;
    }
    return true;
  }

  /** A run of * or _ or ~: it closes frames of its kind, and what is left of it may open one. */
  mark(kind) {
    let end = this.at;
    while (this.text[end] === kind) end++;
    const before = this.text[this.at - 1] ?? "";
    const after = this.text[end] ?? "";
    let length = end - this.at;
    this.at = end;
    const touchesRight = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const touchesLeft = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const opens = touchesRight && (kind !== "_" || !WORD.test(before)) && (kind !== "~" || length === 2);
    const closes = touchesLeft && (kind !== "_" || !WORD.test(after)) && (kind !== "~" || length === 2);
    if (closes) length = this.closeMarks(kind, length);
    if (!length) return true;
    if (opens && this.frames.length < OPEN_FRAMES) this.frames.push({ children: [], kind, length });
    else this.push(kind.repeat(length));
    return true;
  }

  /** @returns {number} how much of the run has closed nothing */
  closeMarks(kind, length) {
    while (length) {
      const link = this.frames.findLastIndex((frame) => frame.link); // emphasis does not reach out of a link's text
      const opened = this.frames.findLastIndex((frame) => frame.kind === kind);
      if (opened <= link || opened < 0) break;
      while (this.frames.length > opened + 1) this.flatten();
      const frame = this.frames[opened];
      const used = Math.min(frame.length, length, 2);
      frame.children = [make(kind === "~" ? "del" : used === 2 ? "strong" : "em", {}, frame.children)];
      frame.length -= used;
      length -= used;
      if (!frame.length) {
        this.frames.pop();
        frame.children.forEach((child) => this.push(child));
      }
    }
    return length;
  }

  /** The last frame becomes text. */
  flatten() {
    const { children, literal, kind, length } = this.frames.pop();
    this.push(literal ?? kind.repeat(length));
    children.forEach((child) => this.push(child));
  }
}
