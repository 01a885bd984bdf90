// The texts on the screen and the list of those before them.

import { actions } from "./generating.js";
import { $ } from "./page.js";
import { state, text } from "./state.js";
import { t } from "./store.js";
import { el, turnElement } from "./turns.js";

const TITLE = 80; // characters of a prompt that stand in the list

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
