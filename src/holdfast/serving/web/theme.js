// Runs before anything is painted, so that the wrong theme does not flash: the chosen one, else the
// system's. It stands in an attribute, so that the style sheet has each colour once. The rest is in
// app.js.
{
  let theme = null;
  try {
    theme = localStorage.getItem("holdfast.theme");
  } catch {
    // a browser that keeps nothing: the system's theme
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  const chosen = theme === "dark" || theme === "light";
  document.documentElement.dataset.theme = chosen ? theme : dark ? "dark" : "light";
}
