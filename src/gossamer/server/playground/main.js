/** Connects the parts of the page: the thread, the list of conversations, the settings, and the cache. */

import { apiKey, setApiKey } from "./api.js";
import { look, watchCache } from "./cache.js";
import { newConversation } from "./conversation.js";
import { $, say } from "./dom.js";
import { connectPins } from "./pins.js";
import { onConversationSettings, requestFields, restoreSettings, showConversationSettings } from "./settings.js";
import { connectSidebar } from "./sidebar.js";
import * as storage from "./storage.js";
import { Thread } from "./thread.js";

const OPEN = "gossamer-open"; // which conversation this tab shows, for when it is loaded again
const ofTab = (use) => { try { return use(sessionStorage); } catch { return null; } };

function keep(conversation) {
  const { dropped, kept } = storage.save(conversation);
  ofTab((session) => session.setItem(OPEN, conversation.id));
  if (!kept) say($("progress"), "This browser has no room for the conversation; export it to keep it.");
  else if (dropped.length) say($("progress"), `“${dropped[0]}” was deleted to make room.`);
  showList?.();
}

function open(conversation, { imported = false } = {}) {
  thread.open(conversation);
  showConversationSettings(conversation);
  if (imported) keep(conversation);
  else ofTab((session) => session.setItem(OPEN, conversation.id));
  showList();
  $("conversations").hidePopover();
}

/** A new conversation goes on with the system prompt and the tools of the last one, and so shares their prefix. */
function begin() {
  open(newConversation(thread.conversation));
  say($("progress"), "New conversation.");
  $("message").focus();
}

let showList;
const stored = restoreSettings();
const first = storage.load(ofTab((session) => session.getItem(OPEN)) ?? "") ?? newConversation();
const thread = new Thread(first, requestFields, keep);
showConversationSettings(first);
showList = connectSidebar({ current: () => thread.conversation, open, begin });
showList();
storage.onChange(showList);

onConversationSettings((change) => {
  Object.assign(thread.conversation, change);
  if (thread.conversation.messages.length) keep(thread.conversation);
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("message").value.trim()) thread.send($("message").value);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // while composing, Enter chooses characters
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => thread.stop());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !document.querySelector(":popover-open")) thread.stop();
});
addEventListener("pagehide", () => {
  if (thread.running) keep(thread.conversation);
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey($("api-key").value.trim());
  look();
});
$("api-key").value = apiKey();
connectPins(look);
watchCache(stored.model, (wanted) => { $("key-form").hidden = !wanted; });
$("message").focus({ preventScroll: true });
