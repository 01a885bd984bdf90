// Runs before anything is painted, so that a chosen theme does not flash. The rest is in app.js.
try {
  const theme = localStorage.getItem("holdfast.theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // a browser that keeps nothing: the system's theme stays
}
