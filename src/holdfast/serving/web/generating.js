// Asking for texts: a request for each checkpoint, its pieces as they come, stopping, trying again;
// and the texts on the screen, whose buttons do that.

import { problemOf, stream } from "./api.js";
import { look } from "./lanes.js";
import { $, askKey, say, setEditing, setPrompt, showSend, whisper } from "./page.js";
import * as parameters from "./parameters.js";
import { lanes, save, state, text } from "./state.js";
import { t, tokens } from "./store.js";
import { append, el, refresh, turnElement } from "./turns.js";

const NEAR_END = 80; // pixels: a reader who has scrolled further up is left there
const TITLE = 80; // characters of a prompt that stand in the list

function newAnswer(model, seed) {
  const { id, step, epoch, val_loss } = model;
  return { model: id, facts: { step, epoch, val_loss }, text: "", base: 0, seed, tokens: 0,
    first: null, rate: 0, finish: "", error: null, active: false };
}

export function send(prompt) {
  if (state.running.size || !lanes().length) return;
  const { turns } = text();
  const turn = { prompt, mode: state.mode, answers: [] };
  const { editing } = state;
  if (turns.includes(editing)) turns.splice(turns.indexOf(editing));
  setEditing(null);
  turns.push(turn);
  generate(turn);
}

// A new answer of every checkpoint that is chosen now, all with the same parameters and seed.
function generate(turn) {
  const seed = parameters.nextSeed();
  turn.answers = lanes().map((model) => newAnswer(model, seed));
  save();
  showTurns();
  whisper(t("announceStart"));
  turn.answers.forEach((answer, lane) => run(turn, answer, lane));
}

async function run(turn, answer, lane) {
  const controller = new AbortController();
  const began = performance.now();
  state.running.set(answer, controller);
  Object.assign(answer, { base: answer.text.length, active: true, error: null, finish: "",
    tokens: 0, first: null, rate: 0, shortened: false });
  show(turn, answer);
  showSend();
  try {
    for await (const event of fitting(turn, answer, lane, controller.signal)) {
      if (event.step && event.step !== answer.facts.step) answer.facts = { step: event.step };
      if (event.finish) answer.finish = event.finish;
      if (event.tokens) answer.tokens = event.tokens;
      if (!event.text) continue;
      const now = performance.now();
      const follow = atEnd();
      answer.first ??= (now - began) / 1000;
      answer.tokens += 1; // pieces, until the server tells the tokens
      answer.text += event.text;
      answer.last = now;
      append(answer, event.text);
      measure(answer, began);
      refresh(answer);
      if (follow) $("turns").scrollTop = $("turns").scrollHeight;
    }
    measure(answer, began);
  } catch (error) {
    if (controller.signal.aborted) answer.finish = "stopped";
    else answer.error = problemOf(error);
  } finally {
    state.running.delete(answer);
    answer.active = false;
    delete answer.last;
    finished(turn, answer);
  }
}

const atEnd = () => {
  const { scrollHeight, scrollTop, clientHeight } = $("turns");
  return scrollHeight - scrollTop - clientHeight < NEAR_END;
};

// Tokens a second from sending to the last of them, the wait for the first included: pieces may
// arrive several at once, and what is measured between them would flatter.
function measure(answer, began) {
  const seconds = (answer.last - began) / 1000;
  answer.rate = seconds > 0 ? answer.tokens / seconds : 0;
}

function finished(turn, answer) {
  const follow = atEnd(); // an error and its button must not lie below the edge
  show(turn, answer);
  if (follow) $("turns").scrollTop = $("turns").scrollHeight;
  showSend();
  save();
  if (answer.error?.kind === "key") askKey();
  if (answer.error?.kind === "busy") countDown(turn, answer);
  const listed = state.models.find((model) => model.id === answer.model);
  const replaced = listed?.step !== answer.facts.step; // by a better one that training has made
  if (answer.error?.kind === "gone" || replaced) look({ quietly: true });
  if (answer.error) return; // its element is an alert and speaks for itself
  const done = t("announceDone", { tokens: tokens(answer.tokens) });
  whisper(answer.finish === "stopped" ? t("announceStopped") : done);
}

// The stream of an answer. What lies further back than the model can see is left out where the
// server finds it too much; what a person has just written never is.
async function* fitting(turn, answer, lane, signal) {
  const path = turn.mode === "chat" ? "v1/chat/completions" : "v1/completions";
  for (let cuts = 0; ; cuts += 1) {
    const request = { model: answer.model, ...parameters.forRequest(answer.seed),
      ...(turn.mode === "chat" ? messagesOf(turn, lane, cuts) : promptOf(turn, answer, cuts)) };
    try {
      yield* stream(path, request, { key: state.key, signal });
      return;
    } catch (error) {
      const more = turn.mode === "chat" ? request.messages.length > 1 : request.prompt.length > 1;
      const own = turn.mode !== "chat" && !answer.text; // nothing but what was written
      if (error.code !== "context_length_exceeded" || own || !more) throw error;
      answer.shortened = true;
    }
  }
}

// The text so far; of one that goes on, the last half, quarter, ...
function promptOf(turn, answer, cuts) {
  const whole = turn.prompt + answer.text;
  const end = whole.slice(-Math.ceil(whole.length / 2 ** cuts));
  return { prompt: end.replace(/^[\udc00-\udfff]/, "") }; // half of a character beyond U+FFFF
}

// The conversation of one lane, without its first `cuts` pairs.
function messagesOf(turn, lane, cuts) {
  const { turns } = text();
  const pairs = turns.slice(0, turns.indexOf(turn))
    .map((before) => [before.prompt, (before.answers[lane] ?? before.answers[0])?.text])
    .filter(([_asked, said]) => said) // not a question that got no answer
    .slice(cuts);
  const messages = pairs.flatMap(([asked, said]) =>
    [{ role: "user", content: asked }, { role: "assistant", content: said }]);
  return { messages: [...messages, { role: "user", content: turn.prompt }] };
}

function countDown(turn, answer) {
  show(turn, answer);
  if (answer.error?.kind === "busy" && answer.error.until > Date.now()) {
    setTimeout(() => countDown(turn, answer), 1000);
  }
}

function show(turn, answer) {
  refresh(answer, () => actions.retry(turn, answer), askKey);
}

export function stopAll() {
  for (const controller of state.running.values()) controller.abort();
}

export const actions = {
  askKey,
  regenerate(turn) {
    if (state.running.size) return;
    if (parameters.seedIsFixed()) say(t("sameSeed"));
    generate(turn);
  },
  goOn(turn) {
    if (state.running.size) return;
    const seed = parameters.nextSeed();
    turn.answers.forEach((answer, lane) => {
      answer.seed = seed;
      run(turn, answer, lane);
    });
  },
  retry(turn, answer) {
    if (state.running.has(answer)) return;
    answer.text = answer.text.slice(0, answer.base);
    run(turn, answer, turn.answers.indexOf(answer));
  },
  edit(turn) {
    if (state.running.size) return;
    setEditing(turn);
    setPrompt(turn.prompt);
  },
  async copy(words) {
    say(t((await copied(words)) ? "copied" : "copyFailed"));
  },
};

async function copied(words) {
  try {
    await navigator.clipboard.writeText(words);
    return true;
  } catch {
    // not a secure context (plain http to another host): the old way
    const box = el("textarea", { class: "hidden" });
    box.value = words;
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    return done;
  }
}

// ---------------------------------------------------------------------------- texts on the screen

export function showTurns() {
  const { turns } = text();
  $("turns").replaceChildren(...turns.map((turn, i) =>
    turnElement(turn, actions, i === turns.length - 1)));
  $("turns").hidden = turns.length === 0;
  $("empty").hidden = turns.length > 0;
  $("turns").scrollTop = $("turns").scrollHeight;
  showHistory();
}

function showHistory() {
  const open = (one) => $("history-list").dispatchEvent(new CustomEvent("choose", { detail: one }));
  const entries = state.texts.toReversed().map((one) => el("li", {},
    el("button", { type: "button", "aria-current": one === text() ? "true" : null,
      onclick: () => open(one) },
    el("span", { class: "facts" }, t(one.mode)),
    one.turns[0]?.prompt.slice(0, TITLE) || t("untitled"))));
  $("history-list").replaceChildren(...entries);
  $("clear-button").disabled = state.texts.length === 0;
}
