/** Elements. Strings become text nodes everywhere: what a model, a file or a server says is never read as HTML. */

export const $ = (id) => document.getElementById(id);

/** An element with properties and children: nodes, texts, lists of them, or null, which is left out. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  for (const child of children.flat()) if (child !== null) element.append(child); // one by one: there may be many
  return element;
}

export function makeButton(textContent, action, properties = {}) {
  const button = make("button", { type: "button", textContent, ...properties });
  button.addEventListener("click", () => action(button));
  return button;
}

export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

export const makeSvg = (name, attributes = {}) =>
  set(document.createElementNS("http://www.w3.org/2000/svg", name), attributes);

/** Live regions speak whenever they are written to, so they are written to only when there is something to say. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function showError(element, error) {
  element.textContent = error ? error.message : "";
  element.hidden = !error;
}

/** A button that copies a text, and says so. */
export function makeCopyButton(text, label = "Copy") {
  return makeButton("Copy", async (button) => {
    const copied = await copy(text());
    button.textContent = copied ? "Copied" : "Select and copy by hand";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }, { className: "quiet", ariaLabel: label, ariaLive: "polite" });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text); // there is no clipboard on plain HTTP from another machine
    return true;
  } catch {
    const area = make("textarea", { value: text, className: "visually-hidden" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}
