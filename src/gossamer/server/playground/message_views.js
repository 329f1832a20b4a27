/** Messages as they are shown: questions, answers beside each other, results of calls. */

import { makeAnswer, makeFigures } from "./answer_view.js";
import { alternatives, companions } from "./conversation.js";
import { make, makeButton, makeCopyButton } from "./dom.js";

const hiddenHeading = (textContent) => make("h3", { className: "visually-hidden", textContent });

/**
 * The view of a message. `update(running)` brings it up to date; `running` are the answers that are still coming.
 *
 * @param {object} actions what the buttons do: choose, edit, regenerate, proceed, answerCalls
 */
export function makeView(conversation, message, actions) {
  const makeForRole = { user: makeQuestion, tool: makeResults, assistant: makeAnswers }[message.role];
  return makeForRole(conversation, message, actions);
}

/** Which of several attempts is shown, and buttons for the others. Empty if there is only one. */
function makePager(conversation, message, choose) {
  const all = alternatives(conversation, message);
  const at = all.findIndex((each) => each === message || (each.request && each.request === message.request));
  const step = (by, textContent, ariaLabel) =>
    makeButton(textContent, () => choose(all[at + by], ariaLabel), { className: "quiet", ariaLabel, disabled: !all[at + by] });
  return all.length < 2 ? [] : [make("span", { className: "pager" },
    step(-1, "‹", "Previous version"), make("span", { textContent: `${at + 1} / ${all.length}` }), step(1, "›", "Next version"))];
}

function makeQuestion(conversation, message, actions) {
  const text = make("p", { className: "text", textContent: message.content });
  const bar = make("div", { className: "actions" });
  const element = make("article", { className: "message question" }, hiddenHeading("You"), make("div", { className: "bubble" }, text), bar);
  const stopEditing = () => {
    element.querySelector("form")?.remove();
    element.classList.remove("editing");
  };

  function edit(content = message.content) {
    if (element.querySelector("form")) return;
    const area = make("textarea", { value: content, rows: 2, ariaLabel: "Edited message" });
    const form = make("form", { className: "editor" }, area, make("div", { className: "row" },
      make("button", { type: "submit", className: "main", textContent: "Send" }),
      makeButton("Cancel", () => { stopEditing(); editButton().focus(); }, { className: "cancel" })));
    onSubmit(form, area, () => area.value.trim() && actions.edit(message, area.value));
    element.append(form);
    element.classList.add("editing");
    area.focus();
  }

  const editButton = () => bar.querySelector(".edit");
  function update(running) {
    stopEditing();
    bar.replaceChildren(...makePager(conversation, message, actions.choose),
      makeButton("Edit", () => edit(), { className: "quiet edit", ariaLabel: "Edit message", disabled: running.size > 0 }),
      makeCopyButton(() => message.content, "Copy message"));
  }
  return { element, update, edit };
}

/** Enter submits, Shift+Enter starts a line, Escape presses the button that cancels. */
export function onSubmit(form, area, submit) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // while composing, Enter chooses characters
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      submit();
    } else if (event.key === "Escape") {
      form.querySelector(".cancel")?.click();
    }
  });
}

function makeAnswers(conversation, message, actions) {
  const group = companions(conversation, message);
  const answers = group.map((each) => ({ message: each, ...makeAnswer(each) }));
  const columns = make("div", { className: "columns" }, ...answers.map(({ element }) => element));
  columns.style.setProperty("--columns", group.length);
  const legend = make("legend", { className: "note", textContent: "Go on with" });
  const choice = group.length > 1 ? make("fieldset", { className: "several" }, legend, columns) : columns;
  if (group.length > 1) {
    answers.forEach(({ element, message: each }, place) => {
      const radio = make("input", { type: "radio", name: `choice-${message.id}`, checked: each === message });
      radio.addEventListener("change", () => actions.choose(each));
      element.prepend(make("label", {}, radio, `Answer ${place + 1}`));
    });
  }
  const figures = makeFigures();
  const bar = make("div", { className: "actions" });
  const element = make("article", { className: "message" }, hiddenHeading("Answer"), choice, figures.element, bar);

  function show(running) {
    for (const answer of answers) answer.show(running.has(answer.message) && !answer.message.finish);
    figures.show(message, group.length);
  }

  function update(running) {
    show(running);
    const busy = running.size > 0;
    const chosen = group.find((each) => conversation.chosen[each.parent] === each.id) ?? message;
    const cut = ["length", "stopped", "failed"].includes(chosen.finish) && chosen.content && !chosen.calls.length;
    if (group.length > 1) choice.disabled = busy;
    bar.hidden = running.has(message);
    bar.replaceChildren(...makePager(conversation, message, actions.choose),
      makeButton("Regenerate", () => actions.regenerate(message), { className: "quiet", disabled: busy }),
      ...(cut ? [makeButton("Continue", () => actions.proceed(chosen), { className: "quiet", disabled: busy })] : []),
      ...(chosen.content ? [makeCopyButton(() => chosen.content, "Copy answer")] : []));
  }
  return { element, update, show };
}

function makeResults(conversation, message, actions) {
  const bar = make("div", { className: "actions" });
  const calls = conversation.messages.find(({ id }) => id === message.parent)?.calls ?? [];
  const nameOf = (id) => calls.find((each) => each.id === id)?.name ?? "a call";
  const element = make("article", { className: "message results" }, hiddenHeading("Results"),
    ...message.results.map(({ id, content }) => make("figure", { className: "call result" },
      make("figcaption", { textContent: `Result of ${nameOf(id)}` }), make("pre", { tabIndex: 0, ariaLabel: "Result", textContent: content }))), bar);

  function edit(results = message.results) {
    if (element.querySelector("form")) return;
    const form = makeResultsForm(calls, results, (given) => actions.answerCalls(message.parent, given));
    form.querySelector(".row").append(makeButton("Cancel", () => { form.remove(); bar.querySelector(".edit").focus(); }, { className: "cancel" }));
    element.append(form);
    form.querySelector("textarea").focus();
  }

  function update(running) {
    element.querySelector("form")?.remove();
    bar.replaceChildren(...makePager(conversation, message, actions.choose),
      makeButton("Edit", () => edit(), { className: "quiet edit", ariaLabel: "Edit results", disabled: running.size > 0 }));
  }
  return { element, update, edit };
}

/** Fields for the results of calls, which a person fills in. */
export function makeResultsForm(calls, results, submit) {
  const fields = calls.map(({ id, name }) => {
    const value = results.find((result) => result.id === id)?.content ?? "";
    return { id, area: make("textarea", { value, rows: 2, className: "code", spellcheck: false, ariaLabel: `Result of ${name}` }), name };
  });
  const form = make("form", { className: "editor card" },
    ...fields.map(({ area, name }) => make("label", {}, `Result of ${name}`, area)),
    make("div", { className: "row" },
      make("button", { type: "submit", className: "main", textContent: calls.length > 1 ? "Send results" : "Send result" })));
  const send = () => submit(fields.map(({ id, area }) => ({ id, content: area.value })));
  for (const { area } of fields) {
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") form.querySelector(".cancel")?.click();
    });
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  return form;
}
