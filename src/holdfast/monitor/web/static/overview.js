// The upper part of the page: the list of runs, what is safe now, and the numbers of a run.
"use strict";
HF.overview = (function () {
  const { t, el, svg, isNumber } = HF;

  const badge = (state) => el("span", { class: "badge " + state }, t("state." + state));

  function secondsAtRisk(row) {
    const { seconds, ticking } = row.risk;
    if (!isNumber(seconds)) return null;
    return seconds + (ticking ? Math.max(0, HF.serverNow() - row.risk.as_of) / 1000 : 0);
  }

  function progress(row, label) {
    if (!isNumber(row.total_steps) || row.total_steps <= 0) return null;
    const share = Math.min(1, row.step / row.total_steps);
    return el("div", { class: "bar", role: "progressbar", "aria-label": label, "aria-valuemin": 0,
      "aria-valuemax": row.total_steps, "aria-valuenow": row.step },
      svg("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("rect", { class: "done " + row.state, width: (share * 100).toFixed(2), height: 1 })));
  }

  function progressWords(row) {
    const words = [];
    if (isNumber(row.epoch)) words.push(t(row.epochs ? "stat.epoch" : "stat.epoch.only", row));
    words.push(t(row.total_steps ? "stat.step" : "stat.step.only", { step: HF.count(row.step), total: HF.count(row.total_steps) }));
    return words.join(" · ");
  }

  // ------------------------------------------------------------------------------ list of runs
  // The elements of a run stay the same while its words change: a click or the keyboard that is
  // about to reach one must not find it gone.
  function listItem(row, act) {
    return el("li", { class: "run" },
      el("input", { type: "checkbox", onchange: (event) => act.tick(row.id, event.target.checked) }),
      el("button", { type: "button", onclick: () => act.select(row.id) }));
  }
  function updateItem(item, row, state) {
    const chosen = state.compared.size < 2 && state.selected === row.id;
    const [box, button] = item.children, seconds = secondsAtRisk(row);
    const risk = row.state === "training" ? t("row.risk", { time: HF.duration(seconds) })
      : row.risk.disk_steps > 0 ? t("row.lost", { steps: HF.count(row.risk.disk_steps) }) : row.checkpoint_count ? t("row.safe") : "";
    item.classList.toggle("chosen", chosen);
    box.checked = state.compared.has(row.id);
    box.setAttribute("aria-label", t("run.compare", { name: row.name }));
    if (chosen) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    HF.mount(button, [row.name, row.state, row.step, row.total_steps, row.best, row.epoch, risk], () => [
      el("span", { class: "line" }, el("span", { class: "name" }, row.name), badge(row.state)),
      progress(row, row.name),
      el("span", { class: "line quiet" },
        el("span", {}, row.best ? t("row.best", { value: HF.loss(row.best.val_loss) }) : progressWords(row)),
        el("span", { class: "risk" }, risk))]);
  }

  const items = new Map();
  function list(node, state, act) {
    if (!node.firstChild) node.append(el("h2"), el("div"), el("ul"), el("p", { class: "quiet hint" }));
    const [title, problems, rows, hint] = node.children;
    title.textContent = t("runs");
    HF.mount(problems, state.problems, () => Object.entries(state.problems).map(([directory, problem]) =>
      el("p", { class: "warning" }, t("directory.problem", { directory, problem }))));
    const ids = state.rows.map((row) => row.id);
    for (const id of [...items.keys()]) if (!ids.includes(id)) { items.get(id).remove(); items.delete(id); }
    state.rows.forEach((row, i) => {
      if (!items.has(row.id)) items.set(row.id, listItem(row, act));
      const item = items.get(row.id);
      if (rows.children[i] !== item) rows.insertBefore(item, rows.children[i] || null);
      updateItem(item, row, state);
    });
    hint.textContent = !ids.length ? t("run.none") : ids.length > 1 && state.compared.size < 2 ? t("compare.hint") : "";
  }

  // ------------------------------------------------------------------------------ what is safe
  const SHIELD = "M16 2 5 6v9c0 7.200 4.600 12.600 11 15 6.400-2.400 11-7.800 11-15V6z";
  function shield(level) {
    const sign = level === "good" ? "m10.500 15.500 4 4 7.500-8" : level === "none" ? "M11 15.500h10" : "M16 9v8m0 4v1";
    return svg("svg", { class: "shield", viewBox: "0 0 32 32", width: 44, height: 44, "aria-hidden": "true" },
      svg("path", { d: SHIELD, class: "body" }), svg("path", { d: sign, class: "sign" }));
  }

  function verdict(run) {
    const { risk } = run, training = run.state === "training", seconds = secondsAtRisk(run);
    if (run.damaged) return ["bad", t("safe.damaged", { count: run.damaged })];
    if (risk.disk_step === null) {
      if (!run.step && risk.disk_steps !== null) return ["none", t("safe.empty")];
      if (training) return [seconds < 1800 ? "none" : "bad", t("safe.nothing") + " " + (isNumber(seconds) ? t("safe.risk", { time: HF.duration(seconds) }) : "")];
      if (risk.memory_step !== null) return ["fair", t("safe.memory.only", { step: HF.count(risk.memory_step) })];
      return ["bad", isNumber(seconds) ? t("safe.gone", { time: HF.duration(seconds) }) : t("safe.gone.all")];
    }
    if (training) return [seconds > 3600 ? "bad" : seconds > 1800 ? "fair" : "good", t("safe.risk", { time: HF.duration(seconds) })];
    if (risk.memory_step !== null && risk.memory_step > risk.disk_step) return ["fair", t("safe.memory", { step: HF.count(risk.memory_step) })];
    if (risk.disk_steps > 0) return ["fair", t("safe.lost", { steps: HF.count(risk.disk_steps), step: HF.count(risk.disk_step) })];
    const told = isNumber(run.updated); // else a stranger's loop: it may have come further
    return ["good", t(told ? "safe.all" : "safe.disk", { step: HF.count(risk.disk_step) })];
  }

  function tier(title, main, note) {
    return el("div", { class: "tier" }, el("dt", {}, title), el("dd", {}, el("strong", {}, main), el("span", { class: "quiet" }, note)));
  }
  function lose(run, steps, nothing) {
    if (nothing) return t("tier.lose.all");
    if (steps > 0) return t("tier.lose", { steps: HF.count(steps) });
    if (steps === null) return t("tier.lose.time", { time: HF.duration(secondsAtRisk(run)) }); // a stranger's loop
    return t(run.state === "training" ? "tier.lose.now" : "tier.lose.none");
  }

  function safety(node, run) {
    const [level, words] = verdict(run), { risk } = run;
    const memory = risk.memory_step === null ? t(risk.disk_step === null ? "tier.memory.none" : "tier.disk.step", { step: HF.count(risk.disk_step) })
      : t("tier.memory.step", { step: HF.count(risk.memory_step) });
    const saved = risk.disk_step !== null, held = saved || risk.memory_step !== null;
    HF.mount(node, [level, words, risk.disk_step, risk.memory_step, risk.verified_step, risk.disk_steps, risk.memory_steps, run.step, run.state], () =>
      el("div", { class: "safety " + level },
        el("div", { class: "verdict" }, shield(level), el("div", {}, el("h2", {}, t("safe.title")), el("p", {}, words))),
        el("dl", { class: "tiers" },
          tier(t("tier.process"), lose(run, risk.memory_steps, !held && run.step > 0), memory),
          tier(t("tier.power"), lose(run, risk.disk_steps, !saved && run.step > 0), saved ? t("tier.disk.step", { step: HF.count(risk.disk_step) }) : t("tier.disk.none")),
          tier(t("tier.verified"), risk.verified_step === null ? t("tier.verified.none") : t("tier.verified.step", { step: HF.count(risk.verified_step) }), risk.verified_step === null ? "" : t("tier.verified.note")))));
  }

  // ------------------------------------------------------------------------------- the numbers
  function stat(title, value, note) {
    return el("div", { class: "stat" }, el("dt", {}, title), el("dd", {}, el("strong", {}, value), el("span", { class: "quiet" }, note || "")));
  }
  // The date and the zone of a moment, without its clock.
  const day = (time) => (isNumber(time) ? HF.moment(time).replace(/ \S+ /, " ") : "");
  function numbers(node, run) {
    const { best } = run;
    const bestNote = best ? (isNumber(best.perplexity)
      ? t("stat.best.perplexity", { step: HF.count(best.step), value: best.perplexity.toFixed(best.perplexity < 100 ? 2 : 0) })
      : t("stat.best.note", { step: HF.count(best.step) })) : "";
    const share = run.total_steps ? Math.floor((100 * run.step) / run.total_steps) + " %" : HF.count(run.step);
    HF.mount(node, [run.step, run.total_steps, run.epoch, run.loss, run.nan_since, best, run.tokens_per_second, run.eta, run.state, run.updated], () =>
      el("dl", { class: "stats" },
        el("div", { class: "stat wide" }, el("dt", {}, t("stat.progress")),
          el("dd", {}, el("strong", {}, share), progress(run, t("stat.progress")), el("span", { class: "quiet" }, progressWords(run)))),
        stat(t("stat.loss"), isNumber(run.nan_since) ? "NaN" : HF.loss(run.loss), t("stat.loss.note")),
        stat(t("stat.best"), best ? HF.loss(best.val_loss) : HF.NOTHING, bestNote),
        stat(t("stat.speed"), HF.count(run.tokens_per_second), t("stat.speed.unit")),
        run.state === "training" ? stat(t("stat.left"), HF.duration(run.eta), t("stat.left.note"))
          : stat(t("stat.updated"), HF.isNumber(run.updated) ? HF.moment(run.updated, true).slice(6) : HF.NOTHING, day(run.updated))));
  }

  function title(node, run) {
    const { started } = run, facts = [];
    if (started.model) facts.push(started.model);
    if (isNumber(started.parameters)) facts.push(t("meta.parameters", { count: HF.count(started.parameters) }));
    if (isNumber(started.context_length)) facts.push(t("meta.context", { count: HF.count(started.context_length) }));
    for (const name of ["device", "precision"]) if (started[name]) facts.push(started[name]);
    HF.mount(node, [run.name, run.state, started, run.path], () => [
      el("div", { class: "title" }, el("h1", {}, run.name), badge(run.state)),
      el("p", { class: "quiet facts" }, facts.join(" · ")),
      run.path ? el("p", { class: "quiet path" }, run.path) : null,
    ]);
  }

  return { list, safety, numbers, title };
})();
