// Asking for texts: a request for each checkpoint, its pieces as they come, stopping, trying again.

import { problemOf, stream } from "./api.js";
import { look } from "./lanes.js";
import { $, askKey, say, setEditing, setPrompt, showSend, whisper } from "./page.js";
import * as parameters from "./parameters.js";
import { lanes, save, state, text } from "./state.js";
import { t } from "./store.js";
import { showTurns } from "./texts.js";
import { append, el, refresh } from "./turns.js";

const NEAR_END = 80; // pixels: whoever has scrolled further up is reading, and is left there

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
  let first = 0;
  state.running.set(answer, controller);
  Object.assign(answer, { base: answer.text.length, active: true, error: null, finish: "",
    tokens: 0, first: null, rate: 0 });
  show(turn, answer);
  showSend();
  try {
    const path = turn.mode === "chat" ? "v1/chat/completions" : "v1/completions";
    const request = requestFor(turn, answer, lane);
    const { signal } = controller;
    for await (const event of stream(path, request, { key: state.key, signal })) {
      if (event.finish) answer.finish = event.finish;
      if (event.tokens) answer.tokens = event.tokens;
      if (!event.text) continue;
      const now = performance.now();
      first ||= now;
      const follow = atEnd();
      answer.first = (first - began) / 1000;
      answer.tokens += 1; // pieces, until the server tells the tokens
      answer.text += event.text;
      answer.last = now;
      append(answer, event.text);
      measure(answer, first);
      refresh(answer);
      if (follow) $("turns").scrollTop = $("turns").scrollHeight;
    }
    measure(answer, first);
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

// Tokens a second after the first one, which waits for the prompt to be read.
function measure(answer, first) {
  const seconds = (answer.last - first) / 1000;
  answer.rate = seconds > 0 && answer.tokens > 1 ? (answer.tokens - 1) / seconds : 0;
}

function finished(turn, answer) {
  show(turn, answer);
  showSend();
  save();
  if (answer.error?.kind === "key") askKey();
  if (answer.error?.kind === "busy") countDown(turn, answer);
  if (answer.error?.kind === "gone") look({ quietly: true });
  if (answer.error) return; // its element is an alert and speaks for itself
  const { tokens } = answer;
  whisper(answer.finish === "stopped" ? t("announceStopped") : t("announceDone", { tokens }));
}

function requestFor(turn, answer, lane) {
  const request = { model: answer.model, ...parameters.forRequest(answer.seed) };
  if (turn.mode !== "chat") return { ...request, prompt: turn.prompt + answer.text };
  const messages = [];
  const { turns } = text();
  for (const before of turns.slice(0, turns.indexOf(turn))) {
    const said = before.answers[lane] ?? before.answers[0];
    if (!said?.text) continue; // a question that got no answer
    messages.push({ role: "user", content: before.prompt });
    messages.push({ role: "assistant", content: said.text });
  }
  return { ...request, messages: [...messages, { role: "user", content: turn.prompt }] };
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
