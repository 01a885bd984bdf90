// The lower part of the page: checkpoints, what happened, the disk, samples, commands, the log, and
// the tables of a comparison.
"use strict";
HF.sections = (function () {
  const { t, el, svg, isNumber } = HF;
  let showGone = false;

  const word = (prefix, value) => (HF.known(prefix + value) ? t(prefix + value) : value || HF.NOTHING);

  // --------------------------------------------------------------------------------- checkpoints
  function stateOf(point) {
    if (point.fate !== "kept") return point.fate;
    return point.damaged ? "damaged" : point.verified ? "verified" : "durable";
  }
  const isBad = (state) => state === "damaged" || state === "quarantined";

  function dot(point, x) {
    const state = stateOf(point), gone = point.fate !== "kept" && !isBad(state);
    const title = svg("title", {}, t("tier.verified.step", { step: point.step }) + " · " + t("points." + state) +
      " · " + word("reason.", point.reason) + " · " + HF.bytes(point.size));
    if (isBad(state)) {
      const d = `M${x - 5} 17l10 10m0-10l-10 10`;
      return svg("g", {}, svg("path", { class: "halo", d }), svg("path", { class: "dot bad", d }), title);
    }
    if (gone) return svg("line", { class: "dot gone", x1: x, x2: x, y1: 17, y2: 27 }, title);
    return svg("g", {}, svg("circle", { class: "dot " + state, cx: x, cy: 22, r: point.kind === "temp" ? 5 : 7 }), title,
      point.best ? svg("text", { class: "star", x, y: 10, "text-anchor": "middle" }, "★") : null);
  }
  function timeline(run, width) {
    const last = Math.max(run.step, run.total_steps || 0, 1), left = 10, right = width - 10;
    const at = (step) => left + (step / last) * (right - left);
    const ticks = isNumber(run.started.steps_per_epoch) && run.started.steps_per_epoch > 0 && last / run.started.steps_per_epoch <= 40
      ? Array.from({ length: Math.floor(last / run.started.steps_per_epoch) }, (_x, i) => (i + 1) * run.started.steps_per_epoch) : [];
    // A damaged one lies over the one that was made again at its step, not under it.
    const rank = (point) => (isBad(stateOf(point)) ? 2 : point.fate === "kept" ? 1 : 0);
    const ordered = [...run.checkpoints].sort((a, b) => rank(a) - rank(b));
    return svg("svg", { class: "timeline", viewBox: `0 0 ${width} 48`, width, height: 48, role: "img", "aria-label": t("points.timeline", { last }) },
      svg("line", { class: "rail", x1: left, x2: right, y1: 22, y2: 22 }),
      svg("line", { class: "rail done", x1: left, x2: at(run.step), y1: 22, y2: 22 }),
      ticks.map((step) => svg("line", { class: "tick", x1: at(step), x2: at(step), y1: 30, y2: 34 })),
      ordered.map((point) => dot(point, at(point.step))),
      svg("text", { class: "label", x: left, y: 46 }, "0"),
      svg("text", { class: "label", x: right, y: 46, "text-anchor": "end" }, HF.count(last)));
  }
  function legend() {
    const item = (key, shape) => el("span", {}, svg("svg", { width: 16, height: 16, viewBox: "0 14 16 16", "aria-hidden": "true" }, shape), t(key));
    return el("p", { class: "legend quiet" },
      item("points.legend.verified", svg("circle", { class: "dot verified", cx: 8, cy: 22, r: 5 })),
      item("points.legend.unverified", svg("circle", { class: "dot durable", cx: 8, cy: 22, r: 5 })),
      item("points.legend.gone", svg("line", { class: "dot gone", x1: 8, x2: 8, y1: 17, y2: 27 })),
      item("points.legend.bad", svg("path", { class: "dot bad", d: "M4 18l8 8m0-8l-8 8" })));
  }

  function pointRow(point) {
    const state = stateOf(point), roles = ["best", "newest", "pinned"].filter((role) => point[role]);
    const why = point.fate !== "kept" && HF.known("why." + point.why) ? " · " + t("why." + point.why) : "";
    return {
      class: point.fate === "kept" ? "" : "gone",
      cells: [HF.count(point.step), el("span", { class: "file" }, point.names[0] || HF.NOTHING, " ", roles.map((role) => el("span", { class: "tag " + role }, t("points." + role)))),
        word("reason.", point.reason), isNumber(point.epoch) ? String(point.epoch) : HF.NOTHING, HF.loss(point.val_loss), HF.bytes(point.size),
        el("time", { title: HF.moment(point.time) }, HF.moment(point.time, true)),
        el("span", { class: "state " + state }, t("points." + state), why)],
    };
  }
  function checkpoints(node, run, again) {
    const width = Math.max(280, node.clientWidth - 2);
    HF.mount(node, [run.checkpoints, run.step, run.total_steps, showGone, width], () => {
      const kept = run.checkpoints.filter((point) => point.fate === "kept" || isBad(stateOf(point)));
      const gone = run.checkpoints.length - kept.length, shown = showGone ? run.checkpoints : kept;
      const zone = HF.zone(shown.length && isNumber(shown[0].time) ? new Date(shown[0].time) : undefined);
      const columns = [["step", true], ["name"], ["why"], ["epoch", true], ["val", true], ["size", true], ["saved"], ["state"]]
        .map(([name, number]) => ({ title: t("points.col." + name, { zone }), number }));
      return [
        el("h2", {}, t("points.title")),
        run.checkpoints.length ? [timeline(run, width), legend(), HF.table(t("points.title"), columns, shown.map(pointRow), "cards points")]
          : el("p", { class: "quiet" }, t("points.none")),
        gone ? el("button", { type: "button", class: "link", "aria-expanded": String(showGone), onclick: () => { showGone = !showGone; again(); } },
          showGone ? t("points.less") : t("points.more", { count: gone })) : null,
        showGone && run.checkpoints_left_out ? el("p", { class: "quiet" }, t("points.left_out", { count: run.checkpoints_left_out })) : null,
      ];
    });
  }

  // ----------------------------------------------------------------------------------- the rest
  function marks(node, run) {
    HF.mount(node, run.marks, () => [el("h2", {}, t("marks.title")),
      run.marks.length ? el("ol", { class: "marks" }, [...run.marks].reverse().map((mark) =>
        el("li", { class: mark.kind }, el("time", { class: "quiet", title: HF.moment(mark.time) }, HF.moment(mark.time, true)),
          el("span", {}, HF.charts.sentence(mark), mark.fields.reason && !["signal", "error"].includes(mark.fields.reason)
            ? el("span", { class: "quiet" }, " ", String(mark.fields.reason)) : null))))
        : el("p", { class: "quiet" }, t("marks.none"))]);
  }

  function disk(node, run) {
    const d = run.disk, row = (name, value) => el("div", {}, el("dt", {}, t(name)), el("dd", {}, value));
    const files = (count) => t("disk.files", { count });
    const growing = run.state === "training"; // a run that has ended fills nothing any more
    HF.mount(node, [d, growing], () => [el("h2", {}, t("disk.title")),
      d.next_size && d.free < d.next_size ? el("p", { class: "warning" }, t("disk.tight")) : null,
      el("dl", { class: "pairs" },
        row("disk.used", HF.bytes(d.used)), row("disk.next", d.next_size ? HF.bytes(d.next_size) : HF.NOTHING), row("disk.free", HF.bytes(d.free)),
        growing && d.next_size ? row("disk.growth", d.growth > 0 ? t("disk.growth.value", { size: HF.bytes(Math.round(d.growth)) }) : t("disk.steady")) : null,
        growing && d.next_size ? row("disk.full", d.hours_left === null ? t("disk.never") : HF.duration(d.hours_left * 3600)) : null,
        d.quarantine ? row("disk.quarantine", files(d.quarantine)) : null, d.archive ? row("disk.archive", files(d.archive)) : null)]);
  }

  function samples(node, run) {
    HF.mount(node, run.samples, () => [el("h2", {}, t("samples.title")),
      run.samples.length ? el("ol", { class: "samples" }, [...run.samples].reverse().map((sample) =>
        el("li", {}, el("span", { class: "quiet" }, t("samples.epoch", { epoch: sample.epoch }), " · ", t("tier.verified.step", { step: HF.count(sample.step) })),
          el("blockquote", {}, sample.text)))) : el("p", { class: "quiet" }, t("samples.none"))]);
  }

  function commands(node, run) {
    if (!run.commands) { node.hidden = true; return; }
    HF.mount(node, run.commands, () => [el("h2", {}, t("commands.title")), el("p", { class: "quiet" }, t("commands.note")),
      el("ul", { class: "commands" }, run.commands.map(({ key, command }) =>
        el("li", {}, el("span", {}, word("command.", key)), el("code", { tabindex: 0 }, command), HF.copyButton(command, word("command.", key)))))]);
  }

  function log(node, tail) {
    const old = node.querySelector("pre"), end = !old || old.scrollTop + old.clientHeight >= old.scrollHeight - 8;
    const changed = HF.mount(node, tail, () => (!tail || !tail.name ? el("p", { class: "quiet" }, t("log.none")) : [
      el("p", { class: "quiet" }, tail.cut ? t("log.cut", { size: HF.bytes(65536), name: tail.name }) : tail.name),
      el("pre", { tabindex: 0, "aria-label": t("log.title") }, tail.text)]));
    const pre = node.querySelector("pre");
    if (changed && pre) pre.scrollTop = end ? pre.scrollHeight : old.scrollTop;
  }

  // ---------------------------------------------------------------------------------- comparison
  const shown = (value) => (value === undefined ? HF.NOTHING : value === null ? "null" : typeof value === "object" ? JSON.stringify(value) : String(value));

  function differences(title, found, runs) {
    const columns = [{ title: t("compare.name") }, ...runs.map((run) => ({ title: run.name }))];
    const rows = Object.entries(found).map(([key, values]) => ({ cells: [key, ...runs.map((run) => shown(values[run.label]))] }));
    return el("section", { class: "card" }, el("h2", {}, title),
      rows.length ? HF.table(title, columns, rows, "cards") : el("p", { class: "quiet" }, t("compare.same")));
  }
  function comparison(node, found, rows) {
    const unsaved = new Set(rows.filter((row) => !row.checkpoint_count).map((row) => row.id));
    HF.mount(node, [found, [...unsaved]], () => {
      if (!found) return el("p", { class: "quiet" }, t("run.loading"));
      const columns = [{ title: t("compare.name") }, ...found.runs.map((run) => ({ title: run.name, number: true }))];
      const rows = Object.entries(found.metrics).map(([name, metric]) => ({ cells: [name, ...found.runs.map((run) => [
        el("span", {}, HF.loss(metric.values[run.label]), metric.better === run.label ? el("span", { class: "tag best" }, t("compare.better")) : null)])] }));
      return [
        found.problems.map((each) => (unsaved.has(each.id) ? el("p", { class: "quiet" }, t("compare.unsaved", each))
          : el("p", { class: "warning" }, t("compare.problem", each)))),
        el("section", { class: "card" }, el("h2", {}, t("compare.metrics")),
          rows.length ? HF.table(t("compare.metrics"), columns, rows, "cards") : el("p", { class: "quiet" }, t("compare.none"))),
        found.runs.length > 1 ? [differences(t("compare.config"), found.config, found.runs), differences(t("compare.environment"), found.environment, found.runs)] : null,
      ];
    });
  }

  return { checkpoints, marks, disk, samples, commands, log, comparison };
})();
