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
const remember = ({ id }) => ofTab((session) => session.setItem(OPEN, id));

function keep(conversation) {
  const current = conversation === thread.conversation;
  if (!current && !storage.has(conversation.id)) return; // it was deleted while its answer came
  const { dropped, kept } = storage.save(conversation);
  if (current) remember(conversation);
  if (!kept) say($("progress"), "This browser has no room for the conversation; export it to keep it.");
  else if (dropped.length) say($("progress"), `“${dropped[0]}” was deleted to make room.`);
  showList();
}

function open(conversation, { imported = false } = {}) {
  thread.open(conversation);
  showConversationSettings(conversation);
  if (imported) keep(conversation);
  else remember(conversation);
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
const first = storage.load(ofTab((session) => session.getItem(OPEN)) ?? "") ?? newConversation(stored);
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
if (matchMedia("(pointer: fine)").matches) $("message").focus({ preventScroll: true }); // elsewhere a keyboard would open
