/** Pinned prefixes: the list, and pinning the system prompt with the tools. */

import { call } from "./api.js";
import { $, make, makeButton, showError } from "./dom.js";
import { Failure } from "./failure.js";
import { tokensOf } from "./format.js";
import { prefixesPath, requestTools } from "./settings.js";

let look; // looks at the cache again

/** @param {() => Promise<void>} lookAgain shows what has changed */
export function connectPins(lookAgain) {
  look = lookAgain;
  $("pinning").addEventListener("submit", (event) => {
    event.preventDefault();
    pinSystemPrompt();
  });
}

export function showPins(pins) {
  $("no-pins").hidden = pins.length > 0;
  const ids = pins.map(({ id }) => id).join();
  if ($("pins").dataset.ids === ids) return; // the focus may be on one of the buttons
  $("pins").dataset.ids = ids;
  $("pins").replaceChildren(...pins.map(({ id, name, tokens }) => make("li", {},
    make("span", { className: "name", textContent: name ?? "Without a name" }),
    make("span", { className: "note", textContent: tokensOf(tokens) }),
    makeButton("Unpin", (button) => change(button, prefixesPath(id), { method: "DELETE" }),
      { className: "quiet", ariaLabel: `Unpin ${name ?? "prefix"}` }))));
}

async function change(button, path, options) {
  if (button.ariaDisabled === "true") return;
  showError($("pin-error"), null);
  button.ariaDisabled = "true"; // unlike disabled, this keeps the focus
  try {
    await call(path, options);
  } catch (error) {
    showError($("pin-error"), error);
  }
  button.ariaDisabled = "false";
  await look();
  if (document.activeElement === document.body) $("pin").focus(); // the button that was used has gone with its prefix
}

function pinSystemPrompt() {
  const content = $("system").value;
  if (!content.trim()) return showError($("pin-error"), new Failure("write a system prompt in Settings first"));
  let tools;
  try {
    tools = requestTools();
  } catch (error) {
    return showError($("pin-error"), error);
  }
  const body = { messages: [{ role: "system", content }], name: $("pin-name").value.trim() || null };
  if (tools.length) body.tools = tools; // a template writes them beside the system prompt
  return change($("pin"), prefixesPath(), { method: "POST", body });
}
