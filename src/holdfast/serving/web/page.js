// Pieces of the page that every part of it uses: what it says, asks for, and offers to press.

import { state, lanes } from "./state.js";
import { t } from "./store.js";
import { errorWords } from "./turns.js";

export const $ = (id) => document.getElementById(id);
const SAID_FOR = 3000; // milliseconds that a short message stays

let timer = 0;

// Told to a screen reader: that a text begins, ends, was stopped.
export function whisper(words) {
  $("status").textContent = words;
}

// Told to everybody, for a moment.
export function say(words) {
  $("toast").textContent = words;
  $("toast").classList.remove("hidden");
  clearTimeout(timer);
  timer = setTimeout(() => $("toast").classList.add("hidden"), SAID_FOR);
}

export function askKey() {
  if ($("key-dialog").open) return;
  $("key-title").textContent = t(state.key ? "keyWrong" : "keyTitle");
  $("key-input").value = "";
  $("key-dialog").showModal();
}

// Why there are no checkpoints, and what can be done; `again` asks for them once more.
export function showNotice(again) {
  const { problem } = state;
  $("notice").hidden = problem === null;
  if (problem === null) return;
  const needsKey = problem.kind === "key";
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = t(needsKey ? "enterKey" : "retry");
  button.addEventListener("click", needsKey ? askKey : again);
  const words = document.createElement("span");
  words.textContent = problem.words ? t(problem.words) : errorWords(problem);
  $("notice").replaceChildren(words, button);
}

export function showSend() {
  const busy = state.running.size > 0;
  $("send-button").classList.toggle("busy", busy);
  $("send-word").textContent = t(busy ? "stop" : "send");
  document.body.classList.toggle("busy", busy);
  $("send-button").disabled = !busy && (!$("prompt").value.trim() || !lanes().length);
}

export function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
  showSend();
}

export function setPrompt(words) {
  $("prompt").value = words;
  fit();
  $("prompt").focus();
}

export function setEditing(turn) {
  state.editing = turn;
  $("editing").hidden = turn === null;
}
