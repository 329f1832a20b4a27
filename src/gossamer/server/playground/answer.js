/** The streamed answers of one request, gathered into messages, with what they cost. */

import { call, events } from "./api.js";

export const newAnswer = (request, model) => ({ role: "assistant", content: "", reasoning: "", calls: [], request, model });

/**
 * Ask, and add what comes to the answers until they are complete.
 *
 * Each answer gets `finish` when it has ended, and the figures of the request: `promptTokens`, `cachedTokens`,
 * `answerTokens` (of all answers), `seconds`, `first` (seconds until the first token) and `thought` (seconds of
 * reasoning).
 *
 * @param {object[]} answers messages of the role assistant, one for each choice
 * @param {() => void} changed called after each event
 */
export async function streamAnswers(answers, body, signal, changed) {
  const start = performance.now();
  const elapsed = () => (performance.now() - start) / 1000;
  const response = await call("v1/chat/completions", { method: "POST", body, signal });
  const told = response.headers.get("x-gossamer-tools");
  let first;
  for await (const { choices, usage } of events(response)) {
    for (const { index, delta, finish_reason: reason } of choices) {
      const answer = answers[index];
      if (addDelta(answer, delta)) first ??= elapsed();
      if (delta.reasoning_content) answer.thought = elapsed() - first;
      if (reason) answer.finish = reason;
    }
    for (const answer of answers) {
      if (usage) Object.assign(answer, figuresOf(usage));
      Object.assign(answer, { seconds: elapsed(), first: first ?? elapsed() });
      if (told) answer.note = `Tools are ${told}.`;
    }
    changed();
  }
}

/** @returns {boolean} whether there was anything in it */
function addDelta(answer, { content, reasoning_content: reasoning, tool_calls: calls }) {
  answer.content += content ?? "";
  answer.reasoning += reasoning ?? "";
  for (const { index, id, function: part } of calls ?? []) {
    answer.calls[index] ??= { id, name: "", arguments: "" };
    answer.calls[index].name += part.name ?? "";
    answer.calls[index].arguments += part.arguments ?? "";
  }
  return Boolean(content || reasoning || calls);
}

const figuresOf = (usage) => ({
  promptTokens: usage.prompt_tokens,
  cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
  answerTokens: usage.completion_tokens,
});

export const isEmpty = ({ content, reasoning, calls }) => !content && !reasoning && !calls.length;
