// How texts look: a turn is one prompt and an answer for each checkpoint that was asked.
// Whatever a person or a model wrote becomes a text node, never HTML.

import { number, t, tokens } from "./store.js";

export const LANES = ["A", "B"];

const parts = new WeakMap(); // answer -> its elements, while it is on the page

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

// What is known of a checkpoint, in a few words: step, epoch, validation loss.
export function factsOf(model) {
  const facts = [];
  if (model.step != null) facts.push(t("step", { step: number(model.step) }));
  if (model.epoch != null) facts.push(t("epoch", { epoch: number(model.epoch) }));
  const loss = Number(model.val_loss ?? NaN);
  if (Number.isFinite(loss)) facts.push(t("valLoss", { loss: number(loss, 4) }));
  return facts;
}

// Short facts beside each other; a line ends between two of them.
export const spaced = (facts) => facts.flatMap((fact, i) =>
  [i ? " · " : "", el("span", { class: "fact" }, fact)]);

// One turn. `actions` are what a person can do with it; `last` whether it is the newest.
export function turnElement(turn, actions, last) {
  const several = turn.answers.length > 1;
  const inline = turn.mode === "completion" && !several; // prompt and continuation read as one text
  const box = el("article", { class: `turn ${turn.mode}${several ? " several" : ""}` });
  if (!inline) {
    const who = turn.mode === "chat" ? t("you") : t("given");
    box.append(el("p", { class: "given" }, el("span", { class: "hidden" }, `${who}: `), turn.prompt));
  }
  const row = el("div", { class: "answers" });
  turn.answers.forEach((answer, lane) => {
    const given = inline ? turn.prompt : "";
    row.append(answerElement(answer, several ? LANES[lane] : "", given, actions, last, turn));
  });
  box.append(row);
  if (last) box.append(turnButtons(turn, actions));
  return box;
}

function answerElement(answer, lane, given, actions, last, turn) {
  const label = [lane, answer.model].filter(Boolean).join(" ");
  const made = document.createTextNode(answer.text);
  const error = el("div", { class: "error", role: "alert", hidden: true });
  const facts = el("span", { class: "facts" });
  const of = el("span", { class: "facts" });
  const head = el("div", { class: "answer-head" },
    lane ? el("span", { class: `badge ${lane}`, "aria-hidden": "true" }, lane) : null,
    el("strong", {}, answer.model), of);
  const text = el("p", { class: "text" },
    given ? el("span", { class: "before" }, given) : null, el("span", { class: "made" }, made),
    el("span", { class: "caret", "aria-hidden": "true" }));
  const copy = el("button", { type: "button", class: "quiet copy",
    onclick: () => actions.copy(given + answer.text) }, t("copy"));
  const box = el("section", { class: `answer ${lane}`, "aria-label": label }, head, text, error,
    el("div", { class: "answer-foot" }, facts, copy));
  parts.set(answer, { box, made, error, facts, of, copy });
  refresh(answer, () => actions.retry(turn, answer), actions.askKey);
  return box;
}

function turnButtons(turn, actions) {
  const button = (name, action) =>
    el("button", { type: "button", class: `quiet ${name}`, onclick: action }, t(name));
  const row = el("div", { class: "turn-buttons" },
    button("regenerate", () => actions.regenerate(turn)));
  if (turn.mode === "completion") row.append(button("continue", () => actions.goOn(turn)));
  row.append(button("edit", () => actions.edit(turn)));
  return row;
}

export function append(answer, text) {
  parts.get(answer)?.made.appendData(text);
}

// Show how the answer stands: running or not, figures, what went wrong.
export function refresh(answer, retry, askKey) {
  const shown = parts.get(answer);
  if (!shown) return;
  if (shown.made.data !== answer.text) shown.made.data = answer.text;
  shown.box.setAttribute("aria-busy", String(answer.active));
  shown.box.classList.toggle("active", answer.active);
  shown.of.replaceChildren(...spaced(factsOf(answer.facts)));
  shown.facts.replaceChildren(...spaced(figuresOf(answer)));
  shown.copy.hidden = !answer.text;
  const failed = answer.error && !answer.active;
  shown.error.hidden = !failed;
  shown.error.replaceChildren();
  if (!failed) return;
  const needsKey = answer.error.kind === "key";
  const act = needsKey ? askKey : retry;
  const words = el("span", {}, errorWords(answer.error, answer.model));
  const button = el("button", { type: "button", onclick: act }, t(needsKey ? "enterKey" : "retry"));
  shown.error.append(words, button);
}

// Speed, first token, count, seed and why it ended.
function figuresOf(answer) {
  if (answer.active && answer.first == null) return [t("waiting")];
  const figures = [];
  if (answer.rate) figures.push(t("rate", { rate: number(answer.rate, answer.rate < 100 ? 1 : 0) }));
  if (answer.first != null) figures.push(t("first", { seconds: number(answer.first, 2) }));
  if (answer.tokens) figures.push(tokens(answer.tokens));
  if (answer.seed != null) figures.push(t("seedWas", { seed: answer.seed }));
  if (answer.shortened && !answer.error) figures.push(t("shortened"));
  const ends = { stop: "endedStop", length: "endedLength", stopped: "endedStopped" };
  if (!answer.active && answer.finish in ends) figures.push(t(ends[answer.finish]));
  const nothing = !answer.active && !answer.error && !answer.text && answer.finish === "stop";
  if (nothing) figures.unshift(t("nothingCame"));
  return figures;
}

// What went wrong, in words; {kind, message, status, until}.
export function errorWords(error, model = "") {
  if (error.kind === "busy") {
    const seconds = Math.ceil((error.until - Date.now()) / 1000);
    return seconds > 0 ? t("errorBusy", { seconds }) : t("errorBusyNow");
  }
  const plain = { lost: "errorLost", unreachable: "errorUnreachable", key: "keyTitle" }[error.kind];
  if (plain) return t(plain);
  if (error.message) return t("errorServer", { message: error.message });
  return error.kind === "gone" ? t("errorGone", { model }) : t("errorStatus", error);
}
