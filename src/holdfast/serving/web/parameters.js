// The parameters of sampling: their ranges, their panel, and what of them goes into a request.

import { number, recall, remember, t } from "./store.js";

const MOST_TOKENS = 1024; // where the server does not tell what the model can see
const SPECS = {
  temperature: { min: 0, max: 2, step: 0.05, otherwise: 0.8 },
  top_p: { min: 0.01, max: 1, step: 0.01, otherwise: 1 },
  top_k: { min: 0, max: 200, step: 1, otherwise: 50, whole: true },
  max_tokens: { min: 1, max: MOST_TOKENS, step: 1, otherwise: 100, whole: true },
  presence_penalty: { min: -2, max: 2, step: 0.1, otherwise: 0 },
  frequency_penalty: { min: -2, max: 2, step: 0.1, otherwise: 0 },
};
const LARGEST_SEED = 2 ** 31 - 1;
const SEEDS = 1_000_000; // short enough to be written down
const MOST_STOPS = 4;

// The value of a parameter that was not chosen: not more than the model can see.
const usual = (spec) => Math.min(spec.otherwise, spec.max);

const defaults = () => ({
  ...Object.fromEntries(Object.entries(SPECS).map(([name, spec]) => [name, usual(spec)])),
  seed: null,
  stop: "",
});

const values = { ...defaults(), ...recall("parameters", {}) };

export const seedIsFixed = () => values.seed !== null;

// A seed of its own for every text where none was chosen: what is shown can be made again.
export const nextSeed = () => values.seed ?? Math.floor(Math.random() * SEEDS);

export function forRequest(seed) {
  const { stop, seed: _chosen, ...rest } = values;
  const words = stop.split("\n").filter((word) => word !== "").slice(0, MOST_STOPS);
  const stops = words.map((word) => word.replaceAll("\\n", "\n"));
  return { ...rest, seed, ...(stops.length ? { stop: stops } : {}) };
}

// The model sees so many tokens (Infinity: not known): more than these cannot be asked for. Says
// whether that is news.
export function limitTokens(context) {
  const limit = Number.isFinite(context) && context > 1 ? context : MOST_TOKENS;
  if (SPECS.max_tokens.max === limit) return false;
  SPECS.max_tokens.max = limit;
  values.max_tokens = Math.min(values.max_tokens, limit);
  return true;
}

export function reset() {
  Object.assign(values, defaults());
  remember("parameters", null);
}

// Fill `panel` anew, in the language in force.
export function render(panel) {
  const rows = [];
  for (const name of ["temperature", "top_p", "top_k", "max_tokens"]) rows.push(slider(name));
  rows.push(seedRow());
  for (const name of ["presence_penalty", "frequency_penalty"]) rows.push(slider(name));
  rows.push(stopRow());
  panel.replaceChildren(...rows);
}

function set(name, value) {
  values[name] = value;
  remember("parameters", values);
}

function row(id, title, help, ...controls) {
  const box = document.createElement("div");
  box.className = "parameter";
  const label = document.createElement("label");
  label.htmlFor = id;
  label.textContent = title;
  const note = document.createElement("p");
  note.className = "note";
  note.id = `${id}-help`;
  note.textContent = help;
  controls[0].id = id;
  controls[0].setAttribute("aria-describedby", note.id);
  box.append(label, ...controls, note);
  return box;
}

function slider(name) {
  const spec = SPECS[name];
  const box = document.createElement("input");
  const bar = document.createElement("input");
  box.type = "number";
  bar.type = "range";
  bar.tabIndex = -1; // the number beside it has the keys; two stops for one value are one too many
  bar.setAttribute("aria-hidden", "true");
  for (const input of [box, bar]) {
    Object.assign(input, { min: spec.min, max: spec.max, step: spec.step, value: values[name] });
  }
  box.step = spec.whole ? 1 : "any";
  const range = t("outOfRange", { name: t(name), min: number(spec.min, digits(spec.min)), max: spec.max });
  box.title = range;
  bar.addEventListener("input", () => {
    box.value = bar.value;
    set(name, Number(bar.value));
  });
  box.addEventListener("change", () => {
    let value = box.value.trim() === "" ? usual(spec) : Number(box.value);
    if (!Number.isFinite(value)) value = usual(spec);
    value = Math.min(spec.max, Math.max(spec.min, spec.whole ? Math.round(value) : value));
    box.value = bar.value = value;
    set(name, value);
  });
  const note = t(`${name}Help`) + t("default", { value: usual(spec) });
  return row(`param-${name}`, t(name), note, box, bar);
}

const digits = (value) => (Number.isInteger(value) ? 0 : 2);

function seedRow() {
  const box = document.createElement("input");
  Object.assign(box, { type: "number", min: 0, max: LARGEST_SEED, step: 1 });
  box.value = values.seed ?? "";
  box.placeholder = t("seedEmpty");
  box.addEventListener("change", () => {
    const value = Math.round(Number(box.value));
    const good = box.value.trim() !== "" && Number.isFinite(value);
    set("seed", good ? Math.min(LARGEST_SEED, Math.max(0, value)) : null);
    box.value = values.seed ?? "";
  });
  return row("param-seed", t("seed"), t("seedHelp"), box);
}

function stopRow() {
  const box = document.createElement("textarea");
  box.rows = 2;
  box.spellcheck = false;
  box.value = values.stop;
  box.addEventListener("input", () => set("stop", box.value));
  return row("param-stop", t("stopWords"), t("stopWordsHelp"), box);
}
