/** The settings: fields of requests, for all conversations; a conversation's system prompt and tools. */

import { $ } from "./dom.js";
import { Failure } from "./failure.js";
import { loadSettings, saveSettings } from "./storage.js";

const EXAMPLE = [{
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a city now.",
    parameters: {
      type: "object",
      properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
      required: ["city"],
    },
  },
}];

const inputs = () => [...$("settings-form").querySelectorAll("[name]")];
const ofAll = () => [...inputs(), ...["stop-texts", "reasoning-effort", "tool-choice", "parallel"].map($)];
const kept = () => [...ofAll(), ...["model", "system", "tools"].map($)];
const keyOf = (input) => input.name || input.id;

/** Shows the settings as they were; returns those that are not shown yet: the model, and what conversations begin with. */
export function restoreSettings() {
  const stored = loadSettings();
  for (const input of ofAll()) if (typeof stored[keyOf(input)] === "string") input.value = stored[keyOf(input)];
  for (const input of kept()) {
    input.addEventListener("change", () => saveSettings(Object.fromEntries(kept().map((each) => [keyOf(each), each.value]))));
  }
  const text = (name) => (typeof stored[name] === "string" ? stored[name] : "");
  return { model: text("model"), system: text("system"), tools: text("tools") };
}

/** The system prompt and the tools belong to the conversation that is shown. */
export function showConversationSettings({ system, tools }) {
  $("system").value = system;
  $("tools").value = tools;
  $("tools-details").open = Boolean(tools);
}

export function onConversationSettings(change) {
  for (const id of ["system", "tools"]) $(id).addEventListener("input", () => change({ system: $("system").value, tools: $("tools").value }));
  $("tools-example").addEventListener("click", () => {
    $("tools").value = JSON.stringify(EXAMPLE, null, 2);
    for (const type of ["input", "change"]) $("tools").dispatchEvent(new Event(type));
    $("tools").focus();
    $("tools").setSelectionRange(0, 0);
    $("tools").scrollTop = 0;
  });
}

/**
 * The fields of a request; what is left empty is left to the server.
 * Throws a Failure, with the focus on the field, if one holds no number or the tools are not JSON.
 */
export function requestFields() {
  const fields = { model: $("model").value || undefined };
  for (const input of inputs()) {
    const { badInput, rangeUnderflow, rangeOverflow } = input.validity; // any step will do
    const name = input.ariaLabel ?? input.labels[0].firstChild.textContent.trim();
    if (badInput || rangeUnderflow || rangeOverflow) refuse(input, `${name}: ${input.validationMessage}`);
    if (input.value !== "") fields[input.name] = Number(input.value);
  }
  const stop = $("stop-texts").value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  if (stop.length) fields.stop = stop;
  if ($("reasoning-effort").value) fields.reasoning_effort = $("reasoning-effort").value;
  const tools = requestTools();
  if (tools.length) {
    Object.assign(fields, { tools, tool_choice: $("tool-choice").value });
    if ($("parallel").value === "false") fields.parallel_tool_calls = false;
  }
  return fields;
}

/** The path of the chosen model's prefixes, or of one of them; a server may have several models. */
export const prefixesPath = (id = "") =>
  `v1/prefixes${id && `/${encodeURIComponent(id)}`}?model=${encodeURIComponent($("model").value)}`;

/** The tools of the conversation; a function alone is taken for a tool. */
export function requestTools() {
  const text = $("tools").value.trim();
  if (!text) return [];
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    refuse($("tools"), `Tools: ${error.message}`);
  }
  return [tools].flat().map((tool) => (tool?.name && !tool.type ? { type: "function", function: tool } : tool));
}

function refuse(input, message) {
  const panel = $("settings");
  if (getComputedStyle(panel).display === "none") panel.showPopover();
  if ($("tools-details").contains(input)) $("tools-details").open = true;
  input.focus();
  throw new Failure(message);
}
