// The page as a whole: what is shown, what was chosen, and what is new. In a report the data
// stands in the page itself.
"use strict";
(function () {
  const { t, el } = HF;
  const inlined = document.getElementById("data");
  const report = inlined ? JSON.parse(inlined.textContent) : null;
  const SILENCE = 15000; // milliseconds after which an answer is not waited for any more
  const KEPT = 4000; // points of a curve after which it is asked for anew, thinned

  const state = {
    rows: [], problems: {}, runs: {}, selected: null, compared: new Set(), comparison: null, log: null,
    live: report ? "report" : "wait", axis: HF.remembered("axis", "step"), scale: HF.remembered("scale", "linear"),
  };

  // ---------------------------------------------------------------------------------- the frame
  const slots = {};
  const slot = (name, tag, attributes) => (slots[name] = el(tag, attributes || {}));
  const charts = { loss: el("div", { class: "plot tall" }), lr: el("div", { class: "plot" }), speed: el("div", { class: "plot" }) };

  function frame() {
    const curves = el("section", { class: "card" }, slot("curvesHead", "div", { class: "head" }), slot("nan", "div"), slot("lossHead", "h3"), charts.loss,
      el("div", { class: "pair" }, el("div", {}, slot("lrHead", "h3"), charts.lr), el("div", {}, slot("speedHead", "h3"), charts.speed)));
    const single = slot("single", "div", { class: "stack" });
    single.append(slot("safety", "section"), slot("numbers", "section", { class: "card" }));
    const rest = slot("rest", "div", { class: "stack" });
    rest.append(slot("points", "section", { class: "card" }),
      el("div", { class: "pair" }, slot("marks", "section", { class: "card" }), slot("disk", "section", { class: "card" })),
      slot("samples", "section", { class: "card" }), slot("commands", "section", { class: "card" }),
      el("details", { class: "card", id: "log", ontoggle: (event) => { if (event.target.open) fetchLog(); } },
        slot("logHead", "summary"), slot("log", "div")));
    const content = slot("content", "div", { class: "stack" });
    content.append(single, curves, rest, slot("comparison", "div", { class: "stack" }));
    document.getElementById("page").append(
      slot("skip", "a", { class: "skip", href: "#main" }),
      slot("top", "header"),
      el("div", { class: report ? "columns alone" : "columns" }, report ? null : slot("list", "nav", { class: "list" }),
        el("main", { id: "main", tabindex: -1 }, slot("title", "div", { class: "heading" }), slot("note", "div"), content)));
  }

  function top() {
    const live = report ? t("live.report", { time: HF.moment(report.made) }) : t("live." + state.live);
    HF.mount(slots.skip, 0, () => [document.createTextNode(t("run.skip"))]);
    HF.mount(slots.top, [state.live], () => [
      el("span", { class: "brand" }, "Holdfast"),
      el("span", { class: "live " + state.live, role: "status" }, live),
      el("span", { class: "switches" },
        el("button", { type: "button", id: "lang", "aria-label": t("lang.label"), lang: HF.lang() === "zh" ? "en" : "zh-CN",
          onclick: () => { HF.setLang(HF.lang() === "zh" ? "en" : "zh"); render(); } }, t("lang.other")),
        el("button", { type: "button", id: "theme", "aria-label": t("theme.label"),
          onclick: () => { HF.setTheme(HF.theme() === "dark" ? "light" : "dark"); render(); } }, t(HF.theme() === "dark" ? "theme.light" : "theme.dark"))),
    ]);
  }

  // ---------------------------------------------------------------------------------- rendering
  const comparing = () => state.compared.size > 1;
  const wanted = () => (comparing() ? [...state.compared] : state.selected ? [state.selected] : []);
  const present = () => wanted().map((id) => state.runs[id]).filter(Boolean);

  function curvesHead() {
    const set = (name) => (value) => { state[name] = value; HF.remember(name, value); render(); };
    HF.mount(slots.curvesHead, [state.axis, state.scale, comparing()], () => [el("h2", {}, t("chart.title")), el("div", { class: "choices" },
      HF.choice("axis", t("chart.axis"), [["step", t("chart.axis.step")], ["time", t("chart.axis.time")]], state.axis, set("axis")),
      HF.choice("scale", t("chart.scale"), [["linear", t("chart.scale.linear")], ["log", t("chart.scale.log")]], state.scale, set("scale")))]);
    HF.mount(slots.lossHead, 0, () => [document.createTextNode(t("chart.loss"))]);
    HF.mount(slots.lrHead, 0, () => [document.createTextNode(t("chart.lr"))]);
    HF.mount(slots.speedHead, 0, () => [document.createTextNode(t("chart.speed"))]);
  }

  // A curve that only ends, or has a hole, says nothing of a loss that is no number.
  function noNumbers(runs) {
    const told = comparing() ? [] : runs.map((run) => [run.nan_since, run.nan]);
    HF.mount(slots.nan, told, () => told.map(([since, range]) => (HF.isNumber(since)
      ? el("p", { class: "warning" }, t("chart.nan", { since: HF.count(since) }))
      : range ? el("p", { class: "quiet" }, t("chart.nan.once", { first: HF.count(range[0]), last: HF.count(range[1]) })) : null)));
  }

  let drawn = "";
  function drawCurves(runs) {
    const key = JSON.stringify([HF.lang(), HF.theme(), state.axis, state.scale, window.innerWidth < 640, !!window.Plotly,
      runs.map((run) => [run.id, run.curves.step.length, run.curves.step[run.curves.step.length - 1], run.evaluations.length, run.marks.length, run.received])]);
    if (key === drawn) return;
    drawn = key;
    if (comparing()) HF.charts.drawSeveral(charts, runs, state);
    else HF.charts.drawOne(charts, runs[0], state);
  }

  function render() {
    top();
    if (slots.list) HF.overview.list(slots.list, state, { select, tick });
    const runs = present();
    slots.content.hidden = !runs.length;
    HF.mount(slots.note, [runs.length, wanted().length, state.rows.length], () =>
      (runs.length ? [] : el("p", { class: "quiet" }, t(wanted().length ? "run.loading" : state.rows.length ? "run.choose" : "run.none"))));
    slots.title.hidden = !runs.length;
    document.title = comparing() ? t("compare.title") + " · Holdfast" : runs.length ? runs[0].name + " · Holdfast" : "Holdfast";
    if (!runs.length) return;
    curvesHead();
    noNumbers(runs);
    for (const name of ["single", "rest"]) slots[name].hidden = comparing();
    slots.comparison.hidden = !comparing();
    if (comparing()) {
      HF.mount(slots.title, [[...state.compared], runs.map((run) => run.name)], () => [
        el("div", { class: "title" }, el("h1", {}, t("compare.title")),
          el("button", { type: "button", class: "link", onclick: () => { state.compared.clear(); chosen(); } }, t("compare.close"))),
        el("ul", { class: "series" }, runs.map((run, i) => el("li", {}, HF.charts.swatch(i), run.name))),
        el("p", { class: "quiet" }, t("compare.lines"))]);
      HF.sections.comparison(slots.comparison, state.comparison, state.rows);
    } else {
      renderOne(runs[0]);
    }
    drawCurves(runs);
  }

  function renderOne(run) {
    HF.overview.title(slots.title, run);
    HF.overview.safety(slots.safety, run);
    HF.overview.numbers(slots.numbers, run);
    HF.sections.checkpoints(slots.points, run, render);
    HF.sections.marks(slots.marks, run);
    HF.sections.disk(slots.disk, run);
    HF.sections.samples(slots.samples, run);
    HF.sections.commands(slots.commands, run);
    HF.mount(slots.logHead, 0, () => [el("h2", {}, t("log.title"))]);
    HF.sections.log(slots.log, state.log);
  }

  // ----------------------------------------------------------------------------------- choosing
  function select(id) {
    state.selected = id;
    state.compared.clear();
    chosen();
    if (window.innerWidth < 900) slots.title.scrollIntoView({ behavior: "auto", block: "start" });
  }
  function tick(id, on) {
    if (on) state.compared.add(id);
    else state.compared.delete(id);
    if (on && state.compared.size === 1 && state.selected && state.selected !== id) state.compared = new Set([state.selected, id]);
    chosen();
  }
  function chosen() {
    state.log = null;
    state.comparison = null;
    const ids = wanted();
    try { history.replaceState(null, "", location.pathname + (ids.length ? "#" + ids.join(",") : "")); } catch (_e) { /* file:// */ }
    drawn = "";
    render();
    follow();
    if (comparing()) fetchComparison();
    if (document.getElementById("log").open) fetchLog();
  }

  // ------------------------------------------------------------------------------------ fetching
  async function fetchJson(address) {
    const answer = await fetch(address, { cache: "no-store", signal: AbortSignal.timeout(SILENCE) });
    if (!answer.ok) throw new Error(String(answer.status));
    return answer.json();
  }
  async function fetchLog() {
    if (report || !state.selected || comparing()) return;
    const id = state.selected;
    try {
      const tail = await fetchJson("api/runs/" + id + "/log");
      if (id === state.selected) { state.log = tail; render(); }
    } catch (_error) { /* the page says that it is disconnected */ }
  }
  async function fetchComparison() {
    const asked = wanted().join("&run=");
    try {
      const found = await fetchJson("api/compare?run=" + asked);
      if (asked === wanted().join("&run=")) { state.comparison = found; render(); }
    } catch (_error) { /* the page says that it is disconnected */ }
  }

  // --------------------------------------------------------------------------------- following
  // Ask for what is new, now and then once a second; an answer that comes late is not shown.
  let asking = 0, next = null;

  async function follow() {
    clearTimeout(next);
    const mine = ++asking;
    if (report || document.hidden) return; // the server rests while the page is out of sight
    let pause = 1000;
    try {
      const found = await fetchJson("api/runs");
      const ids = wanted().length ? wanted() : found.runs.slice(0, 1).map((row) => row.id);
      const runs = await Promise.all(ids.map(fetchRun));
      if (mine !== asking) return;
      HF.setClock(found.now);
      state.live = "on";
      const news = runs.filter(Boolean);
      news.forEach(takeRun);
      if (news.length) refetch();
      takeRows(found);
      if (mine !== asking) return; // another run was chosen
    } catch (error) {
      if (mine !== asking) return;
      state.live = error.message === "401" ? "refused" : "off";
      if (state.live === "refused") pause = 5000;
      render();
    }
    next = setTimeout(follow, pause);
  }
  async function fetchRun(id) {
    const old = state.runs[id];
    const have = old && old.curves.step.length < KEPT ? "?have=" + old.version : "";
    try {
      const run = await fetchJson("api/runs/" + id + have);
      return run.same ? null : run;
    } catch (error) {
      if (["404", "503"].includes(error.message)) return null; // deleted, or not read yet
      throw error;
    }
  }
  document.addEventListener("visibilitychange", follow);

  function takeRows(found) {
    state.rows = found.runs;
    state.problems = found.problems;
    for (const row of state.rows) if (state.runs[row.id]) Object.assign(state.runs[row.id], row); // what is in memory moves without a line
    const ids = new Set(state.rows.map((row) => row.id));
    const before = wanted().join();
    for (const id of [...state.compared]) if (!ids.has(id)) state.compared.delete(id);
    if (!ids.has(state.selected)) state.selected = state.rows.length ? state.rows[0].id : null;
    if (wanted().join() !== before && wanted().length) chosen();
    else render();
  }
  function takeRun(run) {
    const old = state.runs[run.id], curves = run.curves;
    if (run.more) for (const name of Object.keys(curves)) curves[name] = old.curves[name].concat(curves[name]);
    state.runs[run.id] = { ...run, received: Date.now() };
  }
  let fetched = 0;
  function refetch() {
    if (Date.now() - fetched < 2000) return;
    fetched = Date.now();
    if (comparing()) fetchComparison();
    else if (document.getElementById("log").open) fetchLog();
  }

  // -------------------------------------------------------------------------------------- begin
  frame();
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", (event) => {
    if (HF.remembered("theme", "")) return;
    document.documentElement.dataset.theme = event.matches ? "dark" : "light";
    render();
  });
  let resizing = null;
  window.addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(render, 150); });
  if (report) {
    state.rows = [report.run];
    state.runs[report.run.id] = report.run;
    state.selected = report.run.id;
    state.log = report.log;
    render();
  } else {
    const asked = decodeURIComponent(location.hash.slice(1)).split(",").filter((id) => /^[0-9a-f]{16}$/.test(id));
    history.replaceState(null, "", location.pathname + location.hash); // the token leaves the address
    if (asked.length > 1) state.compared = new Set(asked);
    state.selected = asked[0] || null;
    render();
    follow();
    if (comparing()) fetchComparison();
  }
})();
