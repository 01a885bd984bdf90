// The page of `holdfast serve`: what happens on a click, a key, or after a while.

import { actions, send, showTurns, stopAll } from "./generating.js";
import { compare, look, showLanes } from "./lanes.js";
import { $, fit, setEditing, setPrompt, showNotice, showSend } from "./page.js";
import * as parameters from "./parameters.js";
import { begin, forget, lanes, state, text } from "./state.js";
import {
  currentLanguage, remember, rememberTheme, setLanguage, t, themeIsChosen,
} from "./store.js";
import { CHAT_EXAMPLES, EXAMPLES } from "./strings.js";
import { el } from "./turns.js";

const LOOK_EVERY = 15_000; // milliseconds between two looks at the checkpoints

function showMode() {
  remember("mode", state.mode);
  const chat = state.mode === "chat";
  $("mode-completion").setAttribute("aria-pressed", String(!chat));
  $("mode-chat").setAttribute("aria-pressed", String(chat));
  $("prompt").placeholder = $("prompt-label").textContent = t(chat ? "promptChat" : "promptCompletion");
  $("empty-title").textContent = t(chat ? "emptyChat" : "emptyCompletion");
  $("empty-text").textContent = t(chat ? "emptyChatText" : "emptyCompletionText");
  const examples = (chat ? CHAT_EXAMPLES : EXAMPLES)[currentLanguage()];
  $("examples").replaceChildren(...examples.map((words) =>
    el("button", { type: "button", onclick: () => setPrompt(words) }, words)));
  showTurns();
}

function setMode(to) {
  if (to === state.mode) return;
  stopAll();
  setEditing(null);
  state.mode = to;
  showMode();
}

function open(one) {
  stopAll();
  setEditing(null);
  state.mode = one.mode;
  state.current[one.mode] = one;
  showMode();
  if (narrow()) showPanel("history", false);
}

const narrow = () => window.matchMedia("(max-width: 1099px)").matches;

function showPanel(name, visible) {
  $(name).hidden = !visible;
  $(`${name}-button`).setAttribute("aria-expanded", String(visible));
  if (visible && narrow()) {
    showPanel(name === "history" ? "settings" : "history", false);
    $(name).querySelector(".close").focus();
  }
}

function closePanel(name) {
  showPanel(name, false);
  $(`${name}-button`).focus();
}

async function useKey() {
  state.key = $("key-input").value.trim();
  remember("key", state.key, { ofTab: true });
  await look();
  if (state.problem) return;
  for (const turn of text().turns) {
    for (const answer of turn.answers) {
      if (answer.error?.kind === "key") actions.retry(turn, answer);
    }
  }
}

// ------------------------------------------------------------------------- language and theme

function speak() {
  const language = currentLanguage();
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const one of document.querySelectorAll("[data-text]")) one.textContent = t(one.dataset.text);
  for (const one of document.querySelectorAll("[data-title]")) one.title = t(one.dataset.title);
  for (const one of document.querySelectorAll("[data-label]")) {
    one.setAttribute("aria-label", t(one.dataset.label));
    if (one.matches("button")) one.title = t(one.dataset.label);
  }
  $("language-button").textContent = t("languageWord");
  label($("language-button"), t("toLanguage"));
  parameters.render($("parameters"));
  showLanes();
  showNotice(() => look());
  showTheme();
  showMode();
  showSend();
}

function label(button, words) {
  button.title = words;
  button.setAttribute("aria-label", words);
}

const isDark = () => document.documentElement.dataset.theme === "dark";

function showTheme() {
  label($("theme-button"), t(isDark() ? "themeToLight" : "themeToDark"));
  $("theme-button").classList.toggle("dark", isDark());
}

// -------------------------------------------------------------------------------------- events

function onKeydown(event) {
  if (event.key !== "Escape" || event.isComposing || $("key-dialog").open) return;
  if (narrow() && !$("settings").hidden) closePanel("settings");
  else if (narrow() && !$("history").hidden) closePanel("history");
  else if (state.running.size) stopAll();
  else if (state.editing) setEditing(null);
}

// Enter that ends a composition (Chinese input) belongs to the input method: Chrome and Firefox say
// isComposing, Safari sends it after the composition has ended, with the code 229.
function onPromptKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!state.running.size) submit();
}

function submit() {
  const prompt = $("prompt").value;
  if (!prompt.trim() || !lanes().length) return;
  setPrompt("");
  send(prompt);
}

function connect() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.running.size) stopAll();
    else submit();
  });
  $("prompt").addEventListener("keydown", onPromptKey);
  $("prompt").addEventListener("input", fit);
  document.addEventListener("keydown", onKeydown);
  $("mode-completion").addEventListener("click", () => setMode("completion"));
  $("mode-chat").addEventListener("click", () => setMode("chat"));
  $("compare-button").addEventListener("click", () => compare(!state.comparing));
  $("cancel-edit").addEventListener("click", () => setEditing(null));
  $("new-button").addEventListener("click", () => {
    stopAll();
    setEditing(null);
    begin();
    showMode();
    $("prompt").focus();
  });
  $("clear-button").addEventListener("click", () => {
    stopAll();
    forget();
    showMode();
  });
  $("history-list").addEventListener("choose", (event) => open(event.detail));
  for (const name of ["history", "settings"]) {
    $(`${name}-button`).addEventListener("click", () => showPanel(name, $(name).hidden));
    $(name).querySelector(".close").addEventListener("click", () => closePanel(name));
  }
  $("reset-button").addEventListener("click", () => {
    parameters.reset();
    parameters.render($("parameters"));
  });
  $("key-form").addEventListener("submit", useKey);
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("language-button").addEventListener("click", () => {
    setLanguage(currentLanguage() === "zh" ? "en" : "zh");
    speak();
  });
  $("theme-button").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    rememberTheme(theme);
    showTheme();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (system) => {
    if (themeIsChosen()) return;
    document.documentElement.dataset.theme = system.matches ? "dark" : "light";
    showTheme();
  });
}

connect();
speak();
showPanel("settings", !narrow());
fit();
$("prompt").focus({ preventScroll: true });
await look();
setInterval(() => {
  if (!document.hidden && !state.running.size) look({ quietly: true });
}, LOOK_EVERY);
