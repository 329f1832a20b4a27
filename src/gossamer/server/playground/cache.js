/** What the cache holds and saves, looked at once a second while the page is seen. */

import { call } from "./api.js";
import { $, make, say, set } from "./dom.js";
import { bytes, count, decimals, percent, tokensOf } from "./format.js";
import { showPins } from "./pins.js";
import { prefixesPath } from "./settings.js";
import { drawTree } from "./tree.js";

const PERIOD = 1000; // milliseconds between two looks
const SECONDS = 60; // of the curve
const rates = [];
let previous = null; // {generated, time} of the last look
let picture = null; // what was seen
let lookNumber = 0;
let timer = 0;
let wantedModel;
let askForKey;

/**
 * @param {string} model the one that is to be chosen if the server has it
 * @param {(wanted: boolean) => void} whenKeyIsWanted called when the server refuses, or no longer refuses, to answer
 */
export function watchCache(model, whenKeyIsWanted) {
  wantedModel = model;
  askForKey = whenKeyIsWanted;
  const redraw = () => picture && drawTree(picture);
  $("table-details").addEventListener("toggle", redraw);
  new ResizeObserver(redraw).observe($("tree"));
  document.addEventListener("visibilitychange", () => {
    previous = null; // a rate over the time in the background would be no rate
    look();
  });
  look();
}

export async function look() {
  const mine = ++lookNumber; // a look that begins while another waits takes its place
  clearTimeout(timer);
  if (document.hidden) return;
  let again = PERIOD;
  try {
    if (!$("status").classList.contains("ready")) await loadModels();
    const answer = await (await call(prefixesPath())).json();
    if (mine !== lookNumber) return;
    picture = answer;
    showNumbers();
    showPins(picture.data);
    drawTree(picture);
    say($("status"), "Ready");
    $("status").classList.add("ready");
    askForKey(false);
  } catch (error) {
    if (mine !== lookNumber) return;
    say($("status"), error.message);
    $("status").classList.remove("ready");
    previous = null;
    again = error.status === 401 ? 0 : 3 * PERIOD; // another key starts it again
    askForKey(error.status === 401);
  }
  if (again) timer = setTimeout(look, again);
}

async function loadModels() {
  const { data } = await (await call("v1/models")).json();
  const chosen = $("model").value || wantedModel;
  $("model").replaceChildren(...data.map(({ id, max_model_len: length }) =>
    make("option", { value: id, textContent: id, title: length ? `Context of ${tokensOf(length)}` : "" })));
  if (data.some(({ id }) => id === chosen)) $("model").value = chosen;
}

function showNumbers() {
  const now = performance.now();
  const generated = picture.generated_tokens;
  if (previous && generated >= previous.generated) {
    rates.push((1000 * (generated - previous.generated)) / (now - previous.time));
    rates.splice(0, rates.length - SECONDS);
    drawRates();
  }
  previous = { generated, time: now };
  const show = (id, value, rest) => $(id).replaceChildren(value, make("small", { textContent: ` ${rest}` }));
  show("sequences", count(picture.running), `running, ${count(picture.waiting)} waiting`);
  show("memory", bytes(picture.kv_bytes), `of ${bytes(picture.kv_bytes_total)}`);
  $("memory-bar").value = picture.kv_bytes / picture.kv_bytes_total;
  show("saved", count(picture.saved_tokens), `(${percent(picture.saved_tokens, picture.prompt_tokens)})`);
}

function drawRates() {
  const highest = Math.max(...rates, 1);
  const start = SECONDS - rates.length;
  const points = rates.map((rate, index) => `${start + index},${(20 - (19 * rate) / highest).toFixed(2)}`);
  set($("sparkline").firstElementChild, { d: `M${start},20 L${points.join(" ")} L${SECONDS - 1},20 Z` });
  $("sparkline").ariaLabel = `The last ${rates.length} seconds; ${decimals(highest, 0)} at most`;
  $("rate").textContent = decimals(rates.at(-1), rates.at(-1) < 10 ? 1 : 0);
}
