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
    this.#update();
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
      const usable = buttons.filter(({ disabled }) => !disabled);
      if (label) (usable.find(({ ariaLabel }) => ariaLabel === label) ?? usable[0])?.focus();
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
    const body = {
      ...fields,
      messages: requestMessages(conversation, asked),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true }, // an answer that is stopped has figures, too
    };
    if (proceeds) Object.assign(body, { n: 1, continue_final_message: true, add_generation_prompt: false });
    const begin = () => add(conversation, asked, newAnswer(request, fields.model ?? ""));
    const answers = proceeds ? [last] : Array.from({ length: fields.n }, begin);
    if (proceeds) Object.assign(last, { finish: undefined, note: undefined });
    else choose(conversation, answers[0]);
    conversation.updated = Date.now();
    const mine = { controller: new AbortController(), answers, conversation };
    this.#answer(mine, body, added, proceeds, back);
    return true;
  }

  async #answer(mine, body, added, proceeds, back) {
    const { conversation, answers, controller } = mine;
    this.#running = mine;
    this.changed(conversation);
    this.#updateAndFocus();
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
    const shown = this.#running === mine; // and no other conversation
    const nothing = failure && !proceeds && answers.every(isEmpty);
    if (nothing) remove(conversation, answers);
    if (nothing && shown && added) remove(conversation, [added]); // it goes back to where it was typed
    this.changed(conversation);
    if (!shown) return;
    this.#running = null;
    this.#follow(() => this.#updateAndFocus());
    say($("progress"), stopped ? "Stopped." : failure ? "Failed." : "Answered.");
    if (failure && !stopped) showError($("chat-error"), failure);
    if (nothing) back();
  }

  /** The view follows the answer unless the reader has scrolled away. */
  #follow(change) {
    const follows = $("end").getBoundingClientRect().top < $("composer").getBoundingClientRect().top + 80;
    change();
    if (follows) $("end").scrollIntoView({ block: "nearest" });
  }

  #draw(mine) {
    if (this.#running === mine) this.#follow(() => this.#viewOf(mine.answers[0]).show(new Set(mine.answers)));
  }

  #update() {
    $("send").hidden = this.running;
    $("stop").hidden = !this.running;
    $("log").ariaBusy = String(this.running); // screen readers wait for the whole answer instead of reading bits of it
    if (this.running) say($("progress"), "Answering…");
    this.#render();
  }

  /** As `update`, and the focus does not get lost with a button. */
  #updateAndFocus() {
    this.#update();
    const gone = [document.body, $("send"), $("stop")].includes(document.activeElement); // what had the focus
    if (gone) $("message").focus({ preventScroll: true });
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
    const before = [...$("messages").children];
    const same = before.length === elements.length && elements.every((element, place) => element === before[place]);
    if (!same) $("messages").replaceChildren(...elements);
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
    if (last.role !== "assistant") {
      tail = makeButton("Generate an answer", () => this.#attempt(() => null, () => {}, { last }));
    } else if (last.calls.length && last.finish !== "length") {
      tail = makeResultsForm(last.calls, results, (given) => this.#actions.answerCalls(last.id, given));
    }
    if (!tail) return;
    tail.classList.add("tail");
    $("messages").append(tail);
  }
}
