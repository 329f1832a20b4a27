/** The list of conversations, and conversations as files. */

import { read, write } from "./conversation_file.js";
import { $, make, makeButton, showError } from "./dom.js";
import { Failure } from "./failure.js";
import * as storage from "./storage.js";

const day = new Intl.DateTimeFormat("en", { day: "numeric", month: "short" });
const time = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const when = (updated) => (Date.now() - updated < 864e5 ? time : day).format(updated);

/**
 * @param {object} page `current()` is the conversation that is shown, `open(conversation)` shows one, and
 *   `begin()` a new one
 * @returns {() => void} shows the list anew
 */
export function connectSidebar(page) {
  function show() {
    const entries = storage.list();
    const focused = document.activeElement?.closest("#conversation-list li")?.dataset.id;
    $("conversation-list").replaceChildren(...entries.map((entry) => makeEntry(entry, page, show)));
    if (focused) $("conversation-list").querySelector(`[data-id="${CSS.escape(focused)}"] button`)?.focus();
    $("no-conversations").hidden = entries.length > 0;
    $("delete-all").disabled = entries.length === 0;
    $("export").disabled = page.current().messages.length === 0;
  }

  $("new").addEventListener("click", () => page.begin());
  $("export").addEventListener("click", () => download(page.current()));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    const [file] = $("import-file").files;
    $("import-file").value = ""; // the same file may be chosen again
    if (file) await open(file, page);
  });
  $("delete-all").addEventListener("click", () => {
    if (!confirm("Delete all conversations of this browser?")) return;
    for (const { id } of storage.list()) storage.forget(id);
    page.begin();
  });
  return show;
}

function makeEntry({ id, title, updated }, page, show) {
  const current = page.current().id === id;
  const name = make("button", { type: "button", className: "name", title, ariaCurrent: String(current) },
    make("span", { textContent: title }), make("small", { textContent: when(updated) }));
  name.addEventListener("click", () => {
    const conversation = storage.load(id);
    if (conversation) page.open(conversation);
    else showError($("file-error"), new Failure("this conversation cannot be read"));
  });
  const forget = makeButton("×", () => {
    if (!confirm(`Delete “${title}”?`)) return;
    storage.forget(id);
    if (current) page.begin();
    else show();
    $("new").focus();
  }, { className: "quiet", ariaLabel: `Delete ${title}` });
  const entry = make("li", {}, name, forget);
  entry.dataset.id = id;
  return entry;
}

function download(conversation) {
  const address = URL.createObjectURL(new Blob([write(conversation)], { type: "application/json" }));
  const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "") || "conversation";
  make("a", { href: address, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

async function open(file, page) {
  showError($("file-error"), null);
  try {
    page.open(read(await file.text()), { imported: true });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    showError($("file-error"), error);
  }
}
