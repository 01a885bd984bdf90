// What the page is showing and doing at the moment, for all of its modules. Nothing on the screen
// is changed in here.

import { recall, remember, saveTexts } from "./store.js";

export const state = {
  models: [], // as the server lists them
  chosen: recall("chosen", []), // ids of the models in lanes A and B
  comparing: recall("comparing", false),
  mode: recall("mode", "completion"), // or "chat"
  key: recall("key", "", { ofTab: true }),
  texts: recall("texts", [], { ofTab: true }), // {id, mode, turns}, oldest first
  current: {}, // mode -> the text that it shows
  editing: null, // the turn that the next prompt replaces
  problem: null, // why the checkpoints are not known
  running: new Map(), // answer -> AbortController
};

// The models that are asked: one, or two side by side.
export function lanes() {
  const { comparing, models, chosen } = state;
  const ids = comparing && models.length > 1 ? chosen : chosen.slice(0, 1);
  return ids.map((id) => models.find((model) => model.id === id)).filter(Boolean);
}

// The text on the screen.
export function text() {
  const { current, mode, texts } = state;
  if (!current[mode]) {
    current[mode] = texts.findLast((one) => one.mode === mode);
    if (!current[mode]) begin();
  }
  return current[mode];
}

export function begin() {
  state.current[state.mode] = { id: Date.now(), mode: state.mode, turns: [] };
}

export function save() {
  const one = text();
  if (one.turns.length && !state.texts.includes(one)) state.texts.push(one);
  saveTexts(state.texts);
}

export function forget() {
  Object.assign(state, { texts: [], current: {} });
  remember("texts", null, { ofTab: true });
}

// An answer that was running when the page was left has no end of its own.
for (const one of state.texts) {
  for (const answer of one.turns.flatMap((turn) => turn.answers)) {
    if (answer.active) Object.assign(answer, { active: false, error: { kind: "lost" } });
  }
}
