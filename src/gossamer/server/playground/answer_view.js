/** An answer as it is shown: reasoning folded, text, calls, and what it cost. */

import { make, say } from "./dom.js";
import { count, decimals, percent, seconds, tokensOf } from "./format.js";
import { showMarkdown } from "./markdown.js";

const NOTES = { length: "Cut off at the token limit.", stopped: "Stopped.", failed: "Ended by an error." };

/** One answer. `show` brings it up to date; `streaming` says whether more is to come. */
export function makeAnswer(message) {
  const summary = make("summary");
  const thoughts = make("div", { className: "markdown" });
  const reasoning = make("details", { className: "reasoning", hidden: true }, summary, thoughts);
  const text = make("div", { className: "text markdown" });
  const calls = make("div", { className: "calls" });
  const note = make("p", { className: "note" });
  const element = make("div", { className: "answer" }, reasoning, text, calls, note);

  function show(streaming) {
    const thinking = streaming && !message.content && !message.calls.length;
    element.classList.toggle("streaming", streaming);
    reasoning.hidden = !message.reasoning;
    say(summary, thinking ? "Thinking…" : message.thought !== undefined ? `Thought for ${seconds(message.thought)}` : "Thoughts");
    if (reasoning.open) showMarkdown(thoughts, message.reasoning);
    showMarkdown(text, message.content);
    while (calls.childNodes.length < message.calls.length) calls.append(makeCall());
    message.calls.forEach((call, place) => showCall(calls.childNodes[place], call, streaming));
    say(note, [NOTES[message.finish], message.note].filter(Boolean).join(" "));
  }

  reasoning.addEventListener("toggle", () => showMarkdown(thoughts, message.reasoning));
  return { element, show };
}

const makeCall = () => make("figure", { className: "call" }, make("figcaption"), make("pre", { tabIndex: 0, ariaLabel: "Arguments" }));

function showCall(element, call, streaming) {
  const [caption, text] = element.childNodes;
  say(caption, `Call of ${call.name}`);
  say(text, streaming ? call.arguments : pretty(call.arguments));
}

/** JSON over several lines; a text that is none stays as it is. */
export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** What the answers of a request cost, and how much of their prompt was there already. */
export function makeFigures() {
  const meter = make("meter", { ariaLabel: "Prompt tokens from the cache", min: 0 });
  const text = make("span");
  const element = make("p", { className: "figures note", hidden: true }, meter, text);

  function show({ promptTokens, cachedTokens, answerTokens, seconds: total, first }, answers) {
    element.hidden = !promptTokens;
    if (!promptTokens) return;
    meter.max = promptTokens;
    meter.value = cachedTokens;
    const after = answerTokens - answers; // the first tokens come with the prompt
    const rate = after > 0 && total > first ? after / (total - first) : answerTokens / Math.max(total, 1e-3);
    say(text, `${count(cachedTokens)} of ${count(promptTokens)} prompt tokens cached (${percent(cachedTokens, promptTokens)}) · ` +
      `first token after ${seconds(first)} · ${tokensOf(answerTokens)} at ${decimals(rate, 1)} tokens/s`);
  }

  return { element, show };
}
