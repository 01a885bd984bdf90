// Before anything is drawn: light or dark, as chosen here, else as the system says.
"use strict";
(function () {
  let chosen = null;
  try { chosen = localStorage.getItem("holdfast.theme"); } catch (_error) { /* private window */ }
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  const known = chosen === "light" || chosen === "dark";
  document.documentElement.dataset.theme = known ? chosen : dark ? "dark" : "light";
})();
