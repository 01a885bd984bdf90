// What the page remembers (preferences for good, texts and the key in this tab only) and the words
// in the language that was chosen.

import { STRINGS } from "./strings.js";

const PREFIX = "holdfast.";
const MOST = 50; // texts that a tab remembers

function area(ofTab) {
  try {
    return ofTab ? window.sessionStorage : window.localStorage;
  } catch {
    return null; // storage is switched off: the page works, it only forgets
  }
}

export function recall(name, otherwise, { ofTab = false } = {}) {
  try {
    const text = area(ofTab)?.getItem(PREFIX + name);
    return text == null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

export function remember(name, value, { ofTab = false } = {}) {
  try {
    if (value == null) area(ofTab)?.removeItem(PREFIX + name);
    else area(ofTab)?.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or switched off
  }
}

// Plain text, not JSON: theme.js reads it before any module is there.
export function rememberTheme(theme) {
  try {
    window.localStorage.setItem(PREFIX + "theme", theme);
  } catch {
    // it holds until the page is left
  }
}

export function themeIsChosen() {
  try {
    return window.localStorage.getItem(PREFIX + "theme") !== null;
  } catch {
    return false;
  }
}

export function saveTexts(texts) {
  let kept = texts.slice(-MOST);
  while (!remember("texts", kept, { ofTab: true }) && kept.length > 1) {
    kept = kept.slice(Math.ceil(kept.length / 2)); // no room: the oldest go
  }
}

// ------------------------------------------------------------------------------------ language

let language = recall("language", null) ?? (navigator.language.startsWith("zh") ? "zh" : "en");
if (!(language in STRINGS)) language = "en";

export const currentLanguage = () => language;

export function setLanguage(to) {
  language = to;
  remember("language", to);
}

// The words under `name`, with {values} filled in.
export function t(name, values = {}) {
  const text = STRINGS[language][name];
  return text.replace(/\{(\w+)\}/g, (whole, key) => (key in values ? String(values[key]) : whole));
}

// A number as the language writes it; a loss and a rate have few digits.
export const number = (value, digits = 0) =>
  Number(value).toLocaleString(language === "zh" ? "zh-CN" : "en", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });

export const tokens = (count) => t(count === 1 ? "oneToken" : "tokens", { tokens: number(count) });
