// What every part of the page stands on: elements, words, numbers, themes. Text is only ever set as
// text, never as markup: a run may be called anything.
"use strict";
window.HF = (function () {
  const root = document.documentElement;
  const SVG = "http://www.w3.org/2000/svg";

  // ---------------------------------------------------------------------------------- remembered
  function remembered(name, fallback) {
    try { return localStorage.getItem("holdfast." + name) || fallback; } catch (_e) { return fallback; }
  }
  function remember(name, value) {
    try { localStorage.setItem("holdfast." + name, value); } catch (_e) { /* private window */ }
  }

  // ----------------------------------------------------------------------------------- languages
  const asked = root.dataset.lang || ((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");
  let lang = remembered("lang", asked) === "zh" ? "zh" : "en";
  root.lang = lang === "zh" ? "zh-CN" : "en";

  function t(key, values) {
    const one = values && values.steps === "1" ? window.HOLDFAST_STRINGS[key + ".one"] : null;
    const pair = one || window.HOLDFAST_STRINGS[key];
    if (!pair) return key;
    return pair[lang === "zh" ? 1 : 0].replace(/\{(\w+)\}/g, (all, name) =>
      values && values[name] !== undefined && values[name] !== null ? String(values[name]) : all);
  }
  const known = (key) => key in window.HOLDFAST_STRINGS;
  function setLang(value) {
    lang = value;
    root.lang = lang === "zh" ? "zh-CN" : "en";
    remember("lang", lang);
  }
  function setTheme(value) {
    root.dataset.theme = value;
    remember("theme", value);
  }
  const theme = () => root.dataset.theme;
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();

  // ------------------------------------------------------------------------------------ elements
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return node;
  }
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS(SVG, tag), attributes, children);

  // Put `build()` into `node` where `key` says that it is another thing than what stands there. The
  // keyboard stays where it was: at the element in the same place among those that it can reach.
  const reachable = (node) => [...node.querySelectorAll("a[href], button, input, summary, [tabindex]")];
  function mount(node, key, build) {
    const text = lang + theme() + JSON.stringify(key === undefined ? null : key);
    if (node.hfKey === text) return false;
    node.hfKey = text;
    const held = reachable(node).indexOf(document.activeElement);
    node.replaceChildren(...[build()].flat(Infinity).filter(Boolean));
    const again = held < 0 ? null : reachable(node)[held];
    if (again) again.focus({ preventScroll: true });
    return true;
  }

  function copyButton(text, what) {
    const button = el("button", { type: "button", class: "copy", "aria-label": t("copy") + ": " + what }, t("copy"));
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
      } catch (_error) { // no clipboard outside a secure context: the old way
        const area = el("textarea", { class: "offscreen", readonly: true }, text);
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      button.textContent = t("copied");
      setTimeout(() => { button.textContent = t("copy"); }, 1500);
    });
    return button;
  }

  // A choice of a few: radio buttons that look like one control.
  function choice(name, legend, options, chosen, act) {
    return el("fieldset", { class: "choice" }, el("legend", { class: "offscreen" }, legend),
      options.map(([value, text]) => el("label", {},
        el("input", { type: "radio", name, value, checked: value === chosen, onchange: () => act(value) }),
        el("span", {}, text))));
  }

  // A table that becomes a list of cards on a phone: each cell knows its title.
  function table(caption, columns, rows, className) {
    return el("table", { class: className || "" },
      el("caption", { class: "offscreen" }, caption),
      el("thead", {}, el("tr", {}, columns.map((c) => el("th", { scope: "col", class: c.number ? "number" : "" }, c.title)))),
      el("tbody", {}, rows.map((row) => el("tr", { class: row.class || "" }, row.cells.map((cell, i) =>
        el(i ? "td" : "th", { scope: i ? null : "row", "data-title": columns[i].title, class: columns[i].number ? "number" : "" }, cell))))));
  }

  // ------------------------------------------------------------------------------------- numbers
  const NOTHING = "–";
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

  function bytes(count) {
    if (!isNumber(count)) return NOTHING;
    if (Math.abs(count) < 1024) return count + " B";
    let value = count, unit = "";
    for (unit of ["KiB", "MiB", "GiB", "TiB", "PiB"]) {
      value /= 1024;
      if (Math.abs(value) < 1023.5) break;
    }
    return value.toFixed(Math.abs(value) < 9.995 ? 2 : Math.abs(value) < 99.95 ? 1 : 0) + " " + unit;
  }
  // The clock of the server, which is the one that the times of a run are in.
  let ahead = 0;
  const setClock = (milliseconds) => { ahead = milliseconds - Date.now(); };
  const serverNow = () => Date.now() + ahead;
  const two = (value) => String(value).padStart(2, "0");
  function duration(seconds) {
    if (!isNumber(seconds)) return NOTHING;
    const s = Math.max(0, Math.round(seconds));
    if (s < 60) return t("unit.s", { value: s });
    if (s < 3600) return t("unit.min.s", { minutes: Math.floor(s / 60), seconds: two(s % 60) });
    const minutes = Math.round(s / 60);
    if (minutes < 1440) return t("unit.h.min", { hours: Math.floor(minutes / 60), minutes: two(minutes % 60) });
    const hours = Math.round(s / 3600);
    return t("unit.d.h", { days: Math.floor(hours / 24), hours: two(hours % 24) });
  }
  function loss(value) {
    if (value === "nan" || value === "inf" || value === "-inf") return value;
    if (!isNumber(value)) return NOTHING;
    if (value !== 0 && (Math.abs(value) < 1e-2 || Math.abs(value) >= 1e6)) return value.toExponential(3);
    return Math.abs(value) < 100 ? value.toFixed(4) : value.toFixed(1);
  }
  const count = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en-US") : NOTHING);
  function zone(time) {
    const minutes = -(time || new Date()).getTimezoneOffset();
    const rest = Math.abs(minutes) % 60;
    return "UTC" + (minutes < 0 ? "−" : "+") + Math.floor(Math.abs(minutes) / 60) + (rest ? ":" + two(rest) : "");
  }
  function moment(milliseconds, short) {
    if (!isNumber(milliseconds)) return NOTHING;
    const d = new Date(milliseconds);
    const day = two(d.getMonth() + 1) + "-" + two(d.getDate());
    const clock = two(d.getHours()) + ":" + two(d.getMinutes()) + ":" + two(d.getSeconds());
    return short ? day + " " + clock : d.getFullYear() + "-" + day + " " + clock + " " + zone(d);
  }

  return {
    remembered, remember, t, known, setLang, setTheme, theme, colour, el, svg, mount, copyButton, choice,
    table, bytes, duration, loss, count, zone, moment, isNumber, NOTHING, setClock, serverNow, lang: () => lang,
  };
})();
