/**
 * A conversation is a tree of messages: a message that is edited or an answer that is generated again stands beside the
 * first one, and everything before them stays one prefix, which the server computed once.
 *
 * A message has `id`, `parent` (null for the first) and `role`:
 *   user       {content}
 *   assistant  {content, reasoning, calls: [{id, name, arguments}], request, ...figures}; those of one request belong together
 *   tool       {results: [{id, content}]}, one for each call of its parent
 */

const ROOT = "";
let lastId = 0;

/** A name that no other conversation has; crypto.randomUUID is not there on plain HTTP from another machine. */
export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function newConversation({ system = "", tools = "" } = {}) {
  return { id: newId(), title: "", updated: Date.now(), system, tools, messages: [], chosen: {} };
}

/** Append a message to `parent` (null: at the beginning), and choose it among its siblings. */
export function add(conversation, parent, fields) {
  const message = { id: `m${Date.now()}-${++lastId}`, parent: parent?.id ?? null, ...fields };
  conversation.messages.push(message);
  choose(conversation, message);
  if (!conversation.title && message.role === "user") conversation.title = message.content.trim().replace(/\s+/g, " ").slice(0, 80);
  return message;
}

/** Take back messages that have no continuation, and choose those that stood there before. */
export function remove(conversation, messages) {
  const gone = new Set(messages);
  conversation.messages = conversation.messages.filter((message) => !gone.has(message));
  for (const { parent } of messages) {
    const left = children(conversation, parent);
    if (left.length) choose(conversation, left.at(-1));
    else delete conversation.chosen[parent ?? ROOT];
  }
}

export function choose(conversation, message) {
  conversation.chosen[message.parent ?? ROOT] = message.id;
}

const children = (conversation, parent) => conversation.messages.filter((message) => message.parent === (parent ?? null));

export const find = (conversation, id) => conversation.messages.find((message) => message.id === id) ?? null;

/** The messages that are shown, from the first to the last. */
export function path(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const shown = [];
  for (let next = byId.get(conversation.chosen[ROOT]); next; next = byId.get(conversation.chosen[next.id])) shown.push(next);
  return shown;
}

/** The messages of the same request: answers that stand beside each other. */
export const companions = (conversation, message) =>
  children(conversation, message.parent).filter((each) => each === message || (message.request && each.request === message.request));

/** One message for each attempt at this place: each edited text, each request for an answer. */
export function alternatives(conversation, message) {
  const seen = new Set();
  return children(conversation, message.parent).filter((each) => {
    const key = each.request ?? each.id;
    return !seen.has(key) && seen.add(key);
  });
}

/** The messages from the first to this one. */
function upTo(conversation, message) {
  const before = [];
  for (let each = message; each; each = find(conversation, each.parent)) before.unshift(each);
  return before;
}

/** The conversation up to a message, as the server takes it. */
export function requestMessages(conversation, last) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...upTo(conversation, last).flatMap(asRequested)];
}

function asRequested(message) {
  if (message.role === "user") return [{ role: "user", content: message.content }];
  if (message.role === "tool") return message.results.map(({ id, content }) => ({ role: "tool", tool_call_id: id, content }));
  const answer = { role: "assistant", content: message.content };
  if (message.reasoning) answer.reasoning_content = message.reasoning;
  if (message.calls.length) {
    answer.tool_calls = message.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  }
  return [answer];
}
