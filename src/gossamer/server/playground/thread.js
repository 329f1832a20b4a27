/** The conversation on the page: what is asked, answered, stopped, edited and generated again. */

import { isEmpty, newAnswer, streamAnswers } from "./answer.js";
import { add, choose, companions, find, newId, path, remove, requestMessages } from "./conversation.js";
import { $, makeButton, say, showError } from "./dom.js";
import { makeResultsForm, makeView } from "./message_views.js";

const NOBODY = new Set();

export class Thread {
  #views = new Map(); // key of a place in the tree -> its view, which stays while the place is shown
  #running = null; // {controller, answers, conversation} of the request that is being answered

  /**
   * @param {object} conversation what is shown at first
   * @param {() => object} fields the fields of a request from the settings; throws a Failure
   * @param {(conversation: object) => void} changed called when there is something to keep
   */
  constructor(conversation, fields, changed) {
    this.fields = fields;
    this.changed = changed;
    this.open(conversation);
  }

  get running() {
    return this.#running !== null;
  }

  /** Show another conversation; an answer that is still coming ends where it is. */
  open(conversation) {
    this.stop();
    this.#running = null;
    this.conversation = conversation;
    this.#views.clear();
    $("messages").replaceChildren();
    showError($("chat-error"), null);
    this.#render();
    $("end").scrollIntoView({ block: "nearest" });
  }

  stop() {
    this.#running?.controller.abort();
  }

  send(text) {
    const ask = () => add(this.conversation, path(this.conversation).at(-1) ?? null, { role: "user", content: text });
    const back = () => { $("message").value ||= text; };
    if (this.#attempt(ask, back)) $("message").value = "";
  }

  #actions = {
    edit: (message, text) => {
      const ask = () => add(this.conversation, find(this.conversation, message.parent), { role: "user", content: text });
      this.#attempt(ask, () => this.#viewOf(message)?.edit(text));
    },
    answerCalls: (id, results) => {
      const answer = find(this.conversation, id);
      const before = path(this.conversation).find(({ parent }) => parent === id);
      const back = () => (before ? this.#viewOf(before)?.edit(results) : this.#showTail(results));
      this.#attempt(() => add(this.conversation, answer, { role: "tool", results }), back);
    },
    regenerate: (message) => this.#attempt(() => null, () => {}, { last: find(this.conversation, message.parent) }),
    proceed: (message) => this.#attempt(() => null, () => {}, { last: message, proceeds: true }),
    choose: (message, label) => {
      choose(this.conversation, message);
      this.changed(this.conversation);
      this.#render();
      const buttons = [...(this.#viewOf(message)?.element.querySelectorAll(".pager button") ?? [])];
      if (label) (buttons.find((each) => each.ariaLabel === label && !each.disabled) ?? buttons.find((each) => !each.disabled))?.focus();
    },
  };

  /**
   * Ask the server for answers.
   *
   * @param {() => object | null} prepare adds the message that is to be answered, if there is a new one
   * @param {() => void} back gives what was typed back, if nothing came of it
   * @returns {boolean} whether it was asked
   */
  #attempt(prepare, back, { last = null, proceeds = false } = {}) {
    if (this.running) return false;
    showError($("chat-error"), null);
    let fields;
    try {
      fields = this.fields();
    } catch (error) {
      showError($("chat-error"), error);
      return false;
    }
    const { conversation } = this;
    const added = prepare();
    const asked = added ?? last;
    const request = newId();
    const body = { ...fields, messages: requestMessages(conversation, asked), stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    if (proceeds) Object.assign(body, { n: 1, continue_final_message: true, add_generation_prompt: false });
    const answers = proceeds ? [last] : Array.from({ length: fields.n }, () => add(conversation, asked, newAnswer(request, fields.model ?? "")));
    if (proceeds) delete last.finish;
    else choose(conversation, answers[0]);
    conversation.updated = Date.now();
    this.#answer({ controller: new AbortController(), answers, conversation }, body, proceeds ? [] : [...answers, added].filter(Boolean), back);
    return true;
  }

  async #answer(mine, body, added, back) {
    const { conversation, answers, controller } = mine;
    this.#running = mine;
    this.changed(conversation);
    this.#setRunning();
    $("end").scrollIntoView({ block: "nearest" });
    let failure = null;
    let waiting = false;
    let pause = 0;
    const draw = () => {
      waiting = false;
      const start = performance.now();
      this.#draw(mine);
      pause = 3 * (performance.now() - start); // however long the text, three quarters of the time are for other things
    };
    const changed = () => {
      if (waiting) return;
      waiting = true;
      setTimeout(requestAnimationFrame, pause, draw);
    };
    try {
      await streamAnswers(answers, body, controller.signal, changed);
    } catch (error) {
      failure = error;
    }
    const stopped = failure?.name === "AbortError";
    for (const answer of answers) {
      if (failure && !stopped && !answer.finish) answer.note = failure.message;
      answer.finish ??= stopped ? "stopped" : "failed";
    }
    const nothing = failure && added.length && answers.every(isEmpty);
    if (nothing) {
      remove(conversation, added.slice(0, answers.length));
      remove(conversation, added.slice(answers.length));
    }
    this.changed(conversation);
    if (this.#running !== mine) return; // another conversation is shown
    this.#running = null;
    this.#setRunning();
    say($("progress"), stopped ? "Stopped." : failure ? "Failed." : "Answered.");
    if (failure && !stopped) showError($("chat-error"), failure);
    if (nothing) back();
  }

  /** The view follows the answer unless the reader has scrolled away. */
  #draw(mine) {
    if (this.#running !== mine) return;
    const follows = $("end").getBoundingClientRect().top < $("composer").getBoundingClientRect().top + 80;
    this.#viewOf(mine.answers[0]).show(new Set(mine.answers));
    if (follows) $("end").scrollIntoView({ block: "nearest" });
  }

  #setRunning() {
    const focused = [$("send"), $("stop"), document.body].includes(document.activeElement) || $("messages").contains(document.activeElement);
    $("send").hidden = this.running;
    $("stop").hidden = !this.running;
    $("log").ariaBusy = String(this.running); // screen readers wait for the whole answer instead of reading bits of it
    if (this.running) say($("progress"), "Answering…");
    this.#render();
    if (focused) $("message").focus({ preventScroll: true }); // what was under the focus has just gone
  }

  #viewOf(message) {
    return this.#views.get(message.request ?? message.id);
  }

  #render() {
    const running = this.#running ? new Set(this.#running.answers) : NOBODY;
    const focused = document.activeElement;
    $("messages").querySelector(":scope > .tail")?.remove();
    const shown = path(this.conversation);
    const views = new Map(shown.map((message) => {
      const key = message.request ?? message.id;
      const known = this.#views.get(key);
      const size = companions(this.conversation, message).length;
      return [key, known?.size === size ? known : { size, ...makeView(this.conversation, message, this.#actions) }];
    }));
    const elements = [...views.values()].map(({ element }) => element);
    if (elements.some((element, place) => $("messages").children[place] !== element) || $("messages").children.length !== elements.length) {
      $("messages").replaceChildren(...elements);
    }
    this.#views = views;
    for (const view of views.values()) view.update(running);
    $("empty").hidden = shown.length > 0;
    if (!this.running) this.#showTail();
    if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
  }

  /** What the conversation waits for: results of calls, or an answer. */
  #showTail(results = []) {
    const last = path(this.conversation).at(-1);
    $("messages").querySelector(":scope > .tail")?.remove();
    if (!last) return;
    let tail = null;
    if (last.role !== "assistant") tail = makeButton("Generate an answer", () => this.#attempt(() => null, () => {}, { last }));
    else if (last.calls.length && last.finish !== "length") tail = makeResultsForm(last.calls, results, (given) => this.#actions.answerCalls(last.id, given));
    if (!tail) return;
    tail.classList.add("tail");
    $("messages").append(tail);
  }
}
