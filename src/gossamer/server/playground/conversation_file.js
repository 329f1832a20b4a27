/** Conversations as files: what is read is checked field by field, and what is not known is left out. */

import { add, choose, newConversation } from "./conversation.js";
import { Failure } from "./failure.js";

const FORMAT = "gossamer-conversation";
export const LARGEST = 4_000_000; // characters of a file
const FIGURES = ["promptTokens", "cachedTokens", "answerTokens", "seconds", "first", "thought"];

/** The text of a file that holds a conversation with all its branches. */
export const write = ({ id, ...conversation }) => JSON.stringify({ format: FORMAT, version: 1, ...conversation }, null, 1);

/**
 * The conversation of a file, as a new one. OpenAI's form, {"messages": [{"role", "content"}, ...]}, is read too.
 * Throws a Failure that names what is wrong.
 */
export function read(text) {
  if (text.length > LARGEST) throw new Failure(`the file is larger than ${LARGEST / 1e6} million characters`);
  let data;
  try {
    data = JSON.parse(text);
  } catch (error) {
    throw new Failure(`the file is not JSON: ${error.message}`);
  }
  if (Array.isArray(data)) data = { messages: data };
  if (!Array.isArray(data?.messages)) throw new Failure("the file holds no conversation: it has no list of messages");
  return data.format === FORMAT ? readTree(data) : readList(data.messages);
}

/** As `read`, from an object that the page has stored itself, which keeps its name. */
export function readStored(data) {
  return { ...readTree(data), id: string(data.id, "id") };
}

function readTree(data) {
  const conversation = newConversation({ system: string(data.system ?? "", "system"), tools: string(data.tools ?? "", "tools") });
  const byId = new Map(); // names in the file -> messages; a parent comes before its children, so there is no circle
  data.messages.forEach((given, place) => {
    const where = `messages.${place}`;
    const parent = given?.parent === null ? null : byId.get(given?.parent);
    if (parent === undefined) throw new Failure(`${where}.parent is no message before it`);
    byId.set(string(given.id, `${where}.id`), add(conversation, parent, fieldsOf(given, where)));
  });
  for (const id of Object.values(data.chosen ?? {})) if (byId.has(id)) choose(conversation, byId.get(id));
  conversation.title = string(data.title ?? "", "title").slice(0, 200) || conversation.title;
  if (Number.isFinite(data.updated)) conversation.updated = data.updated;
  return conversation;
}

function fieldsOf(given, where) {
  if (given.role === "user") return { role: "user", content: string(given.content, `${where}.content`) };
  if (given.role === "tool") {
    const results = list(given.results, `${where}.results`).map((result) => ({
      id: string(result?.id, `${where}.results.id`), content: string(result?.content, `${where}.results.content`),
    }));
    return { role: "tool", results };
  }
  if (given.role !== "assistant") throw new Failure(`${where}.role must be user, assistant or tool`);
  const message = answerOf(given.content ?? "", given.reasoning ?? "", given.calls ?? [], where);
  for (const name of ["request", "model", "finish", "note"]) if (typeof given[name] === "string") message[name] = given[name];
  for (const name of FIGURES) if (Number.isFinite(given[name])) message[name] = given[name];
  return message;
}

function answerOf(content, reasoning, calls, where) {
  return {
    role: "assistant",
    content: string(content, `${where}.content`),
    reasoning: string(reasoning, `${where}.reasoning`),
    calls: list(calls, `${where}.calls`).map((call) => ({
      id: string(call?.id, `${where}.calls.id`), name: string(call?.name, `${where}.calls.name`),
      arguments: string(call?.arguments, `${where}.calls.arguments`),
    })),
  };
}

/** OpenAI's messages, one after the other. */
function readList(messages) {
  const conversation = newConversation();
  let last = null;
  messages.forEach((given, place) => {
    const where = `messages.${place}`;
    const content = typeof given?.content === "string" || given?.content == null ? given?.content ?? "" : textOf(given.content, where);
    if (given?.role === "system" || given?.role === "developer") {
      if (place) throw new Failure(`${where}: only the first message can be the system's`);
      conversation.system = content;
    } else if (given?.role === "user") {
      last = add(conversation, last, { role: "user", content });
    } else if (given?.role === "assistant") {
      const calls = list(given.tool_calls ?? [], `${where}.tool_calls`).map((call) => ({ id: call?.id, ...call?.function }));
      last = add(conversation, last, answerOf(content, given.reasoning_content ?? "", calls, where));
    } else if (given?.role === "tool") {
      const result = { id: string(given.tool_call_id, `${where}.tool_call_id`), content };
      if (last?.role === "tool") last.results.push(result);
      else last = add(conversation, last, { role: "tool", results: [result] });
    } else {
      throw new Failure(`${where}.role must be system, user, assistant or tool`);
    }
  });
  return conversation;
}

const textOf = (parts, where) => list(parts, `${where}.content`).map((part) => string(part?.text, `${where}.content.text`)).join("\n");

function string(value, where) {
  if (typeof value !== "string") throw new Failure(`${where} must be a text`);
  return value;
}

function list(value, where) {
  if (!Array.isArray(value)) throw new Failure(`${where} must be a list`);
  return value;
}
