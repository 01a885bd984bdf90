// Curves, drawn by plotly: one run with its training, smoothed and validation loss, or several
// beside each other. Colours of Okabe and Ito, and a dash of its own for each, in both themes.
"use strict";
HF.charts = (function () {
  const { t, el, svg, isNumber } = HF;
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon"];
  const MARK_SYMBOLS = {
    interrupted: "square", resumed: "triangle-right", rolled_back: "triangle-left", quarantined: "x",
    damaged: "x", broke_off: "x", failed: "x", diverged: "x", rescued: "triangle-right", finished: "star",
  };
  const paint = (i) => HF.colour("series-" + (i % 8));

  // Plotly reads a little markup in names and texts: a name is a name.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // ------------------------------------------------------------------------------ the x of things
  function axisOf(runs, axis) {
    if (axis !== "time") return { title: t("chart.step"), of: (_run, step) => step };
    let longest = 0;
    for (const run of runs) {
      const known = run.curves.time.filter(isNumber);
      if (known.length) longest = Math.max(longest, known[known.length - 1] - known[0]);
    }
    const hours = longest > 3 * 3600e3;
    const unit = hours ? 3600e3 : 60e3;
    const start = (run) => (run.curves.time.length ? run.curves.time[0] : 0);
    return {
      title: t(hours ? "chart.time.h" : "chart.time.min"),
      of: (run, _step, time) => (isNumber(time) ? (time - start(run)) / unit : null),
    };
  }

  // ------------------------------------------------------------------------------------- layouts
  function layout(xTitle, yTitle, options) {
    const muted = HF.colour("muted"), line = HF.colour("line"), narrow = window.innerWidth < 640;
    const axis = {
      gridcolor: line, linecolor: line, zeroline: false, ticks: "", automargin: true,
      tickfont: { color: muted, size: 12 }, title: { font: { color: muted, size: 12 }, standoff: 8 },
    };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: HF.colour("text"), size: 12 },
      margin: { l: narrow ? 44 : 56, r: 12, t: 8, b: 40 }, height: options.height,
      hovermode: "x unified", hoverlabel: { bgcolor: HF.colour("surface"), bordercolor: line, font: { color: HF.colour("text"), size: 12 } },
      showlegend: !!options.legend,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      xaxis: { ...axis, title: { ...axis.title, text: xTitle }, hoverformat: options.time ? ".1f" : ",d" },
      yaxis: { ...axis, title: { ...axis.title, text: narrow ? "" : yTitle }, type: options.type || "linear",
        exponentformat: "e", minexponent: 4, tickformat: options.tickformat || "", rangemode: options.zero ? "tozero" : "normal" },
      uirevision: options.revision, shapes: options.shapes || [], dragmode: narrow ? false : "zoom",
    };
  }
  const config = { displaylogo: false, displayModeBar: false, responsive: true, doubleClick: "reset" };

  function curve(run, x, field, style) {
    const xs = [], ys = [];
    run.curves[field].forEach((value, i) => {
      if (value === null) return;
      xs.push(x.of(run, run.curves.step[i], run.curves.time[i]));
      ys.push(value);
    });
    return { x: xs, y: ys, type: "scatter", mode: "lines", hoverinfo: "x+y+name", ...style };
  }

  function validation(run, x, style) {
    const known = run.evaluations.filter((each) => isNumber(each.val_loss));
    return {
      x: known.map((each) => x.of(run, each.step, each.time)), y: known.map((each) => each.val_loss),
      type: "scatter", mode: "lines+markers", ...style,
    };
  }

  // --------------------------------------------------------------------------------------- marks
  function sentence(mark) {
    const fields = mark.fields || {};
    let key = "mark." + mark.kind;
    if (mark.kind === "resumed" && fields.steps_lost) key += fields.minutes_lost ? ".lost.time" : ".lost";
    if (!HF.known(key)) return mark.kind + (isNumber(mark.step) ? " " + mark.step : "");
    const names = Array.isArray(fields.names) ? fields.names.join(", ") : "";
    return t(key, { ...fields, names, step: isNumber(mark.step) ? HF.count(mark.step) : HF.NOTHING, time: HF.duration(60 * fields.minutes_lost) });
  }
  function heightAt(run, step) {
    const { smoothed, loss } = run.curves, steps = run.curves.step;
    let found = null;
    for (let i = 0; i < steps.length && (steps[i] <= step || found === null); i++) {
      found = smoothed[i] !== null ? smoothed[i] : loss[i] !== null ? loss[i] : found;
    }
    return found;
  }
  // One sign a step, whatever happened there: an interruption and the resumption lie on each other.
  function marksOf(run, x) {
    const steps = new Map();
    for (const mark of run.marks) {
      if (!isNumber(mark.step) || heightAt(run, mark.step) === null) continue;
      steps.set(mark.step, [...(steps.get(mark.step) || []), mark]);
    }
    const placed = [...steps.values()], at = ([mark]) => x.of(run, mark.step, mark.time);
    return {
      trace: {
        x: placed.map(at), y: placed.map(([mark]) => heightAt(run, mark.step)),
        text: placed.map((marks) => marks.map((mark) => plain(sentence(mark))).join("<br>")), hovertemplate: "%{text}<extra></extra>",
        type: "scatter", mode: "markers", name: plain(t("chart.events")), cliponaxis: false,
        marker: { symbol: placed.map(([mark]) => MARK_SYMBOLS[mark.kind] || "circle"), size: 11, color: HF.colour("surface"), line: { width: 2, color: HF.colour("text") } },
      },
      shapes: placed.map((marks) => ({
        type: "line", xref: "x", yref: "paper", x0: at(marks), x1: at(marks), y0: 0, y1: 1, layer: "below",
        line: { color: HF.colour("muted"), width: 1, dash: "dot" },
      })),
    };
  }

  // -------------------------------------------------------------------------------------- drawing
  function draw(node, traces, how, name) {
    if (!window.Plotly) {
      HF.mount(node, "missing", () => el("p", { class: "quiet" }, t("chart.missing")));
      return;
    }
    const all = traces.filter((trace) => trace.x.length);
    if (!all.length) {
      if (node.drawn) window.Plotly.purge(node);
      node.drawn = false;
      HF.mount(node, "none", () => el("p", { class: "quiet" }, t("chart.none")));
      return;
    }
    if (!node.drawn) { node.replaceChildren(); node.hfKey = null; }
    node.drawn = true;
    window.Plotly.react(node, all, how, config);
    const first = all.find((trace) => trace.mode !== "markers") || all[0];
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", t("chart.describe", {
      title: name, first: HF.loss(first.y[0]), last: HF.loss(first.y[first.y.length - 1]), count: first.y.length,
    }));
  }

  function drawOne(nodes, run, view) {
    const x = axisOf([run], view.axis), time = view.axis === "time";
    const marks = marksOf(run, x);
    const revision = run.id + view.axis + view.scale;
    const noise = curve(run, x, "loss", { name: t("chart.training"), line: { color: HF.colour("faint"), width: 1 } });
    const smooth = curve(run, x, "smoothed", { name: t("chart.smoothed"), line: { color: paint(0), width: 2.25 } });
    const valid = validation(run, x, { name: t("chart.validation"), line: { color: paint(1), width: 1.75, dash: "dash" }, marker: { size: 8, symbol: "diamond", color: paint(1) } });
    const of = (height, more) => ({ height, time, revision, ...more });
    draw(nodes.loss, [noise, smooth, valid, marks.trace],
      layout(x.title, t("chart.loss"), of(360, { legend: true, type: view.scale, shapes: marks.shapes })), t("chart.loss"));
    draw(nodes.lr, [curve(run, x, "learning_rate", { name: t("chart.lr"), line: { color: paint(2), width: 2 } })],
      layout(x.title, t("chart.lr"), of(210, { zero: true })), t("chart.lr"));
    draw(nodes.speed, [curve(run, x, "tokens_per_second", { name: t("chart.speed"), line: { color: paint(3), width: 1.5 } })],
      layout(x.title, t("chart.speed"), of(210, { zero: true, tickformat: "~s" })), t("chart.speed"));
  }

  function drawSeveral(nodes, runs, view) {
    const x = axisOf(runs, view.axis), time = view.axis === "time";
    const revision = runs.map((run) => run.id).join() + view.axis + view.scale;
    const line = (i, width) => ({ color: paint(i), width, dash: DASHES[i % 8] });
    const each = (field, more) => runs.map((run, i) =>
      curve(run, x, field, { name: plain(run.name), line: line(i, 2), ...more }));
    const valid = runs.map((run, i) => validation(run, x, {
      name: plain(run.name) + " · " + t("chart.validation"), mode: "markers", marker: { size: 9, symbol: SYMBOLS[i % 8], color: HF.colour("surface"), line: { width: 2, color: paint(i) } },
    }));
    const of = (height, more) => ({ height, time, revision, ...more });
    draw(nodes.loss, [...each("smoothed"), ...valid],
      layout(x.title, t("chart.loss"), of(380, { type: view.scale })), t("chart.loss"));
    draw(nodes.lr, each("learning_rate"), layout(x.title, t("chart.lr"), of(210, { zero: true })), t("chart.lr"));
    draw(nodes.speed, each("tokens_per_second", { line: undefined }).map((trace, i) => ({ ...trace, line: line(i, 1.5) })),
      layout(x.title, t("chart.speed"), of(210, { zero: true, tickformat: "~s" })), t("chart.speed"));
  }

  // A sample of the line and the marker of a run, for lists beside the plot.
  const swatch = (i) => svg("svg", { class: "swatch", width: 28, height: 10, viewBox: "0 0 28 10", "aria-hidden": "true" },
    svg("line", { x1: 0, y1: 5, x2: 28, y2: 5, class: "series-" + (i % 8), "stroke-width": 3,
      "stroke-dasharray": ["", "7 4", "2 3", "7 3 2 3", "11 4", "11 3 2 3", "", "7 4"][i % 8] }));

  return { drawOne, drawSeveral, sentence, swatch };
})();
