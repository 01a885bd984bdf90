// The bar at the top: which checkpoints there are, which are asked, and what is known of them.

import { listModels, problemOf } from "./api.js";
import { $, askKey, say, showNotice, showSend } from "./page.js";
import * as parameters from "./parameters.js";
import { lanes, state } from "./state.js";
import { remember, t } from "./store.js";
import { LANES, el, factsOf, spaced } from "./turns.js";

// Ask the server. `quietly`: what was known stays where it does not answer.
export async function look({ quietly = false } = {}) {
  try {
    const found = await listModels(state.key);
    const same = JSON.stringify(found) === JSON.stringify(state.models);
    if (quietly && same && !state.problem) return; // a list that was opened stays open
    tellChange(found);
    state.models = found;
    state.problem = found.length ? null : { words: "errorNoModels" };
    settle();
  } catch (error) {
    const problem = problemOf(error);
    if (quietly && state.models.length) return;
    state.problem = problem;
    if (problem.kind === "key") askKey();
  }
  showLanes();
  showNotice(() => look());
  showSend();
}

// A training that goes on makes a better checkpoint, and the server takes it: that is news.
function tellChange(found) {
  const shown = lanes()[0];
  const now = found.find((model) => model.id === shown?.id);
  if (now?.step != null && now.step !== shown.step) {
    say(t("changed", { model: now.id, step: now.step }));
  }
}

// Choose what is not chosen, or no longer there: the best, beside it the newest, or where these are
// one checkpoint under two names the next one that is another.
function settle() {
  const { models, chosen } = state;
  const named = (id) => models.find((model) => model.id === id);
  const same = (one, other) => (one.checkpoint ?? one.id) === (other.checkpoint ?? other.id);
  chosen[0] = (named(chosen[0]) ?? named("best") ?? models[0])?.id;
  const others = [named("latest"), ...models].filter((model) => model && model.id !== chosen[0]);
  const distinct = others.find((model) => !same(model, named(chosen[0])));
  chosen[1] = (named(chosen[1]) ?? distinct ?? others[0] ?? models[0])?.id;
  const contexts = lanes().map((model) => model.context_length ?? model.max_model_len ?? Infinity);
  if (parameters.limitTokens(Math.min(...contexts))) parameters.render($("parameters"));
}

export function compare(on) {
  state.comparing = on;
  remember("comparing", on);
  settle();
  showLanes();
}

export function showLanes() {
  const focus = [...$("lanes").querySelectorAll("select")].indexOf(document.activeElement);
  const several = lanes().length > 1;
  const shown = lanes().map((model, lane) => laneElement(model, lane, several));
  const waiting = el("span", { class: "facts" }, state.problem ? "" : t("loading"));
  $("lanes").replaceChildren(...(shown.length ? shown : [waiting]));
  $("lanes").querySelectorAll("select")[focus]?.focus();
  $("lanes").classList.toggle("several", several);
  $("compare-button").hidden = state.models.length < 2;
  $("compare-button").setAttribute("aria-pressed", String(several));
}

function laneElement(model, lane, several) {
  const name = several ? LANES[lane] : "";
  const options = state.models.map((one) => el("option", { value: one.id, selected: one === model },
    [one.id, ...factsOf(one)].join(" · ")));
  const choose = (event) => {
    state.chosen[lane] = event.target.value;
    remember("chosen", state.chosen);
    settle();
    showLanes();
  };
  const title = several ? t("modelOf", { lane: name }) : t("model");
  const facts = factsOf(model);
  return el("div", { class: `lane ${name}` },
    several ? el("span", { class: `badge ${name}`, "aria-hidden": "true" }, name) : null,
    el("div", { class: "lane-choice" },
      el("span", { class: "lane-name", "aria-hidden": "true" }, model.id),
      el("select", { "aria-label": title, onchange: choose }, ...options)),
    el("span", { class: "facts" }, ...spaced(facts.length ? facts : [t("noFacts")])));
}
