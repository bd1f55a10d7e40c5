"use strict";
// Filters, sorting, curves and the image browser of the report. Text from the data reaches the page as text nodes only.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const $ = (id) => document.getElementById(id);
// What a cell without a number says: see Evidence.absent.
const missing = (text) => /^(|–|not run|no [^\d]*|.*seeds? [\d, ]+ missing)$/.test(text);

function element(tag, attributes = {}, ...children) {
  const node = tag in { svg: 1, g: 1, line: 1, path: 1, circle: 1, rect: 1, text: 1, title: 1 }
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(node.style, value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function format(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

const signed = (value) => `${value > 0 ? "+" : ""}${format(value, 3)}`;

function options(select, values, titles, chosen) {
  select.replaceChildren(...values.map((value) => element("option", { value }, titles[value] ?? value)));
  select.value = chosen;
}

// --- Verdicts: one kind or all of them.
function verdicts() {
  const buttons = [...document.querySelectorAll("[data-filter]")];
  const readings = [...document.querySelectorAll(".reading")];
  const show = (wanted) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.filter === wanted));
    for (const reading of readings) reading.hidden = wanted !== "" && reading.dataset.verdict !== wanted;
    for (const part of document.querySelectorAll(".claim, .group, .part"))
      part.hidden = !part.querySelector(".reading:not([hidden])");
    const shown = readings.filter((reading) => !reading.hidden).length;
    $("verdicts-shown").textContent = `${shown} of ${readings.length} shown.`;
  };
  for (const button of buttons)
    button.addEventListener("click", () => show(button.getAttribute("aria-pressed") === "true" ? "" : button.dataset.filter));
  if (buttons.length) show("");
  // A link of the page may point at what a filter hides, or into what is closed.
  const reveal = () => {
    const target = location.hash.length > 1 && $(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    if (target.hidden || target.closest("[hidden]")) show("");
    const closed = target.closest("details");
    if (closed) closed.open = true;
    (closed ?? target).scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();
}

// --- Print: tables are opened and closed again; what readers opened stays open.
function printing() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.block:not([open])")];
    for (const node of opened) node.open = true;
  });
  addEventListener("afterprint", () => { for (const node of opened) node.open = false; });
}

// --- Tables: a click on a head sorts; numbers as numbers (the value before its interval), what is missing last.
function sortValue(text) {
  const found = /^[+\-−]?(\d[\d,]*\.?\d*|\.\d+)(e[+-]?\d+)?/i.exec(text);
  return found ? Number(found[0].replaceAll(",", "").replace("−", "-")) : null;
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], original = [...body.rows];
  heads.forEach((head, column) => {
    const texts = original.map((row) => row.cells[column].textContent.trim());
    const present = texts.filter((text) => !missing(text));
    const numeric = present.length > 0 && present.every((text) => sortValue(text) !== null);
    if (!numeric) [head, ...original.map((row) => row.cells[column])].forEach((cell) => cell.classList.add("text"));
    const key = new Map(original.map((row, k) => [row, missing(texts[k]) ? null : numeric ? sortValue(texts[k]) : texts[k]]));
    const button = element("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const next = now === null ? "ascending" : now === "ascending" ? "descending" : null;
      for (const other of heads) other.removeAttribute("aria-sort");
      if (next) head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const compare = (a, b) => {
        const [x, y] = [key.get(a), key.get(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
      };
      body.append(...(next ? [...original].sort(compare) : original));
    });
  });
}

// --- Charts.
const DASHES = ["", "8 3", "2 3", "10 3 2 3"];
const AXES = { step: "optimizer steps", unet_evals: "UNet evaluations (log scale)", seconds: "training seconds" };

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((unit) => unit * power >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const unit of [1, 2, 5]) if (unit * 10 ** power >= low && unit * 10 ** power <= high) found.push(unit * 10 ** power);
  return found;
}

function tip(plot, x, y, text) {
  plot.querySelector(".tip")?.remove();
  if (text === null) return;
  const box = element("div", { class: "tip", style: { left: `${x}px`, top: `${y}px` } }, text);
  plot.append(box);
  const half = box.offsetWidth / 2;
  box.style.left = `${Math.min(Math.max(x, half), Math.max(half, plot.clientWidth - half))}px`;
}

function marker(plot, x, y, colour, text) {
  const point = element("circle", { class: "point", cx: x, cy: y, r: 4, style: { fill: colour } });
  const target = element("circle", { cx: x, cy: y, r: 11, fill: "transparent" });
  target.addEventListener("pointerenter", () => tip(plot, x, y, text));
  target.addEventListener("pointerleave", () => tip(plot, 0, 0, null));
  return [point, target];
}

const interval = ([value, low, high]) => `${format(value)} [${format(low)}, ${format(high)}]`;

function curves(data) {
  const chart = data.chart, plot = $("plot"), drawn = new Set(chart.first);
  const words = (axis) => (axis === "seconds" ? `${AXES[axis]} (${chart.machine})` : AXES[axis]);
  const scores = chart.scorers.filter((scorer) => scorer in chart.curves);
  options($("curve-score"), scores, data.names, scores.includes(chart.primary) ? chart.primary : scores[0]);

  const pointsOf = (arm, scorer, axis) => {
    const costs = chart.costs[arm], start = chart.start[scorer];
    const points = chart.curves[scorer][arm].map((row, k) => ({ x: costs[axis][k], row, step: costs.step[k] })).filter((p) => p.x !== null);
    // The run's beginning is the base model; a log scale has no zero to put it at.
    if (start !== undefined && axis !== "unet_evals" && points.length && costs.step[0] > 0)
      points.unshift({ x: 0, row: [start, start, start], step: 0 });
    return points;
  };

  function draw() {
    const axis = document.querySelector("input[name=axis]:checked").value, scorer = $("curve-score").value;
    const width = Math.max(300, plot.clientWidth), height = Math.round(Math.min(460, Math.max(280, width * 0.56)));
    const start = chart.start[scorer];
    const box = { left: 58, right: width - (start === undefined ? 14 : 42), top: 26, bottom: height - 42 };
    const arms = chart.arms.filter((arm) => drawn.has(arm) && arm in chart.curves[scorer]);
    const lines = arms.map((arm) => ({ arm, points: pointsOf(arm, scorer, axis) })).filter((line) => line.points.length);
    const every = lines.flatMap((line) => line.points);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label":
      `${data.names[scorer]} against ${words(axis)}, ${lines.length} arms; the table below holds the same numbers` });
    plot.replaceChildren(svg);
    table(scorer);
    if (!every.length) {
      svg.append(element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "Choose an arm in the legend"));
      return;
    }
    const bands = $("bands").checked;
    const values = every.flatMap((p) => (bands ? p.row : [p.row[0]])).concat(start ?? []);
    const spread = Math.max(...values) - Math.min(...values) || Math.abs(values[0]) || 1;
    const [low, high] = [Math.min(...values) - 0.06 * spread, Math.max(...values) + 0.06 * spread];
    const xs = every.map((p) => p.x), log = axis === "unet_evals" && Math.min(...xs) > 0;
    const scale = log ? Math.log : (x) => x;
    let [from, to] = [log ? Math.min(...xs) / 1.08 : 0, log ? Math.max(...xs) * 1.08 : Math.max(...xs)];
    if (scale(from) === scale(to)) to = from + 1;
    const x = (value) => box.left + ((scale(value) - scale(from)) / (scale(to) - scale(from))) * (box.right - box.left);
    const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
    for (const value of ticks(low, high, 6)) {
      svg.append(element("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
      svg.append(element("text", { x: box.left - 7, y: y(value) + 4, "text-anchor": "end" }, format(value)));
    }
    let marks = log ? logTicks(from, to) : ticks(from, to, width / 90);
    if (marks.length < 2) marks = [from, to];
    for (const value of marks)
      svg.append(element("text", { x: x(value), y: box.bottom + 18, "text-anchor": "middle" }, format(value)));
    svg.append(element("line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    svg.append(element("text", { class: "title", x: box.left - 50, y: 14 }, data.names[scorer]));
    svg.append(element("text", { class: "title", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, words(axis)));
    if (start !== undefined) {
      svg.append(element("line", { class: "zero", x1: box.left, x2: box.right, y1: y(start), y2: y(start) }));
      svg.append(element("text", { x: box.right + 7, y: y(start) + 4 }, "base"));
    }
    const at = (points, k) => points.map((p) => `${x(p.x).toFixed(1)},${y(p.row[k]).toFixed(1)}`);
    const tops = [];
    for (const { arm, points } of lines) {
      const { title, colour, dash } = data.arms[arm];
      const group = element("g", { "data-arm": arm });
      if (bands) group.append(element("path", { class: "band", d: `M${at(points, 1).join("L")}L${at(points, 2).reverse().join("L")}Z`, style: { fill: colour } }));
      group.append(element("path", { class: "line", d: `M${at(points, 0).join("L")}`, "stroke-dasharray": DASHES[dash], style: { stroke: colour } }));
      svg.append(group);
      const top = element("g", { "data-arm": arm });
      for (const p of points) if (p.step > 0)
        top.append(...marker(plot, x(p.x), y(p.row[0]), colour, `${title}\nstep ${p.step}${axis === "step" ? "" : `, ${format(p.x)} ${axis === "seconds" ? "s" : "UNet evaluations"}`}\n${interval(p.row)}`));
      tops.push(top);
    }
    svg.append(...tops);
  }

  function table(scorer) {
    const arms = chart.arms.filter((arm) => drawn.has(arm) && arm in chart.curves[scorer]);
    const head = ["Arm", "Step", "UNet evaluations", "Seconds", `${data.names[scorer]} [95 %]`].map((text) => element("th", { scope: "col" }, text));
    const rows = arms.flatMap((arm) => chart.curves[scorer][arm].map((row, k) => element("tr", {},
      element("th", { scope: "row" }, data.arms[arm].title),
      ...["step", "unet_evals", "seconds"].map((axis) => element("td", {}, format(chart.costs[arm][axis][k]))),
      element("td", {}, interval(row)))));
    $("curve-table").replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  }

  const boxes = new Map();
  const entry = (arm) => {
    const { title, colour, dash } = data.arms[arm];
    const box = element("input", { type: "checkbox", value: arm });
    box.checked = drawn.has(arm);
    boxes.set(arm, box);
    const swatch = element("svg", { width: 26, height: 12, "aria-hidden": "true" },
      element("line", { x1: 1, x2: 25, y1: 6, y2: 6, "stroke-width": 2.5, "stroke-dasharray": DASHES[dash], style: { stroke: colour } }));
    const label = element("label", {}, box, swatch, title);
    box.addEventListener("change", () => { box.checked ? drawn.add(arm) : drawn.delete(arm); draw(); });
    const fade = (on) => { for (const group of plot.querySelectorAll("[data-arm]")) group.classList.toggle("faint", on && group.dataset.arm !== arm); };
    label.addEventListener("pointerenter", () => fade(drawn.has(arm)));
    label.addEventListener("pointerleave", () => fade(false));
    return label;
  };
  const quick = (text, wanted) => {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      for (const [arm, box] of boxes) { box.checked = wanted.includes(arm); box.checked ? drawn.add(arm) : drawn.delete(arm); }
      draw();
    });
    return button;
  };
  const rest = chart.arms.filter((arm) => !chart.compared.includes(arm));
  $("legend").append(element("div", { class: "quick" }, quick("the usual", chart.first), quick("all", chart.arms), quick("none", [])));
  if (chart.compared.length) $("legend").append(element("p", {}, "Compared methods"), ...chart.compared.map(entry));
  if (rest.length) $("legend").append(element("p", {}, chart.compared.length ? "Controls and other settings" : "Arms"), ...rest.map(entry));
  for (const node of [$("axis"), $("curve-score"), $("bands")]) node.addEventListener("change", draw);
  redrawn(plot, draw);
}

// Draws now and again whenever the width changes.
function redrawn(plot, draw) {
  let width = 0;
  new ResizeObserver(() => { if (plot.clientWidth !== width) { width = plot.clientWidth; draw(); } }).observe(plot);
}

function controls(data) {
  const plot = $("controls-plot"), rows = data.controls;
  if (!plot || !rows.length) return;
  const scores = [...new Set(rows.map((row) => row.scorer))], methods = [...new Set(rows.map((row) => row.method))];
  const kinds = ["true", "shuffled", "swapped"];
  options($("controls-score"), scores, data.names, scores.includes(data.chart?.primary) ? data.chart.primary : scores[0]);
  $("controls-tools").hidden = false;

  function draw() {
    const shown = rows.filter((row) => row.scorer === $("controls-score").value);
    const width = Math.max(300, plot.clientWidth), narrow = width < 640, label = narrow ? 0 : 270;
    const line = 19, gap = narrow ? 34 : 16, box = { left: label + (narrow ? 76 : 84), right: width - 16, top: 8 };
    const height = box.top + methods.length * (kinds.length * line + gap) + 44;
    const values = shown.flatMap((row) => row.gain).concat(0);
    const margin = 0.04 * (Math.max(...values) - Math.min(...values)) || 1;
    const [low, high] = [Math.min(...values) - margin, Math.max(...values) + margin];
    const x = (value) => box.left + ((value - low) / (high - low)) * (box.right - box.left);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label":
      `${data.names[shown[0].scorer]}: gain over the base model with true, shuffled and swapped labels; the table below holds the same numbers` });
    plot.replaceChildren(svg);
    for (const value of ticks(low, high, (box.right - box.left) / 80)) {
      svg.append(element("line", { class: "grid", x1: x(value), x2: x(value), y1: box.top, y2: height - 40 }));
      svg.append(element("text", { x: x(value), y: height - 24, "text-anchor": "middle" }, format(value)));
    }
    svg.append(element("line", { class: "zero", x1: x(0), x2: x(0), y1: box.top, y2: height - 40 }));
    svg.append(element("text", { class: "title", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, `${data.names[shown[0].scorer]}, minus base`));
    methods.forEach((method, m) => {
      const top = box.top + m * (kinds.length * line + gap) + (narrow ? 26 : 8), { title, colour } = data.arms[method];
      svg.append(element("text", { class: "title", x: 0, y: narrow ? top - 6 : top + line * 1.5 + 4 }, title));
      kinds.forEach((labels, k) => {
        const row = shown.find((entry) => entry.method === method && entry.labels === labels);
        if (!row) return;
        const y = top + k * line + line / 2;
        svg.append(element("text", { x: box.left - 10, y: y + 4, "text-anchor": "end" }, labels));
        svg.append(element("line", { class: "whisker", x1: x(row.gain[1]), x2: x(row.gain[2]), y1: y, y2: y, style: { stroke: colour } }));
        const [point, target] = marker(plot, x(row.gain[0]), y, labels === "true" ? colour : "var(--card)", `${title}\n${labels} labels\n${interval(row.gain)}`);
        if (labels !== "true") Object.assign(point.style, { stroke: colour, strokeWidth: "2" });
        svg.append(point, target);
      });
    });
  }
  $("controls-score").addEventListener("change", draw);
  redrawn(plot, draw);
}

// --- Pictures: prompts as rows, arms side by side; the sheets become images when their first tile is shown.
function pictures(data) {
  const browser = read("picture-data"), sheets = new Map(), PAGE = 8;
  const titles = Object.fromEntries(browser.arms.map((arm) => [arm, data.arms[arm].title]));
  const seeds = [...new Set(browser.arms.flatMap((arm) => browser.seeds[arm]))].sort((a, b) => a - b);
  const others = new Set(browser.others);
  let limit = PAGE;

  // The base model has one set of pictures, which stands beside every training seed.
  const seedIndex = (arm, seed) => {
    const index = browser.seeds[arm].indexOf(seed);
    return index < 0 && arm === browser.base ? 0 : index;
  };
  const scoreOf = (arm, scorer, seed, prompt) => browser.scores[arm][scorer][seedIndex(arm, seed)]?.[prompt] ?? null;

  function sheet(arm, seed) {
    const key = `${arm}/${seed}`;
    if (!sheets.has(key)) {
      const bytes = Uint8Array.from(atob(browser.sheets[arm][seedIndex(arm, seed)]), (c) => c.charCodeAt(0));
      sheets.set(key, URL.createObjectURL(new Blob([bytes], { type: "image/webp" })));
    }
    return sheets.get(key);
  }

  function tile(arm, seed, prompt, scorer, main) {
    if (seedIndex(arm, seed) < 0) return [];
    const column = prompt % browser.columns, row = Math.floor(prompt / browser.columns);
    const share = (k, n) => (n > 1 ? (100 * k) / (n - 1) : 0);
    const image = element("div", { class: browser.side <= 128 ? "image small" : "image", role: "img",
      "aria-label": `${titles[arm]}, seed ${seed}: ${browser.prompts[prompt]}`,
      style: { backgroundImage: `url(${sheet(arm, seed)})`, backgroundSize: `${100 * browser.columns}% ${100 * browser.rows}%`,
        backgroundPosition: `${share(column, browser.columns)}% ${share(row, browser.rows)}%` } });
    const box = element("div", { class: main ? "tile main" : "tile", "data-arm": arm }, image,
      element("div", { class: "who" }, titles[arm]), element("div", { class: "score" }, format(scoreOf(arm, scorer, seed, prompt))));
    box.style.setProperty("--arm", data.arms[arm].colour);
    if ($("all-scores").checked) box.append(element("dl", {}, ...browser.scorers.filter((name) => name !== scorer).map((name) =>
      element("div", {}, element("dt", {}, data.names[name]), element("dd", {}, format(scoreOf(arm, name, seed, prompt)))))));
    return [box];
  }

  function draw() {
    const [first, second, scorer, order, only] = ["first", "second", "picture-score", "order", "only"].map((id) => $(id).value);
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = $("seed").value === "" ? seeds : [Number($("seed").value)];
    let rows = [];
    browser.prompts.forEach((text, prompt) => {
      if (!words.every((word) => text.toLowerCase().includes(word))) return;
      for (const seed of chosen) {
        if (seedIndex(first, seed) < 0 || seedIndex(second, seed) < 0) continue;
        const [a, b] = [first, second].map((arm) => scoreOf(arm, scorer, seed, prompt));
        rows.push({ prompt, seed, text, gain: a === null || b === null ? null : b - a });
      }
    });
    if (only) rows = rows.filter((row) => row.gain !== null && (only === "win" ? row.gain > 0 : row.gain < 0));
    const sign = order === "loss" ? 1 : -1;
    if (order !== "prompt") rows.sort((p, q) => (p.gain === null) - (q.gain === null) || sign * (p.gain - q.gain) || 0);
    const beside = browser.arms.filter((arm) => others.has(arm) && arm !== first && arm !== second);
    const wins = rows.filter((row) => row.gain > 0).length, losses = rows.filter((row) => row.gain < 0).length;
    const known = rows.filter((row) => row.gain !== null), mean = known.reduce((sum, row) => sum + row.gain, 0) / known.length;
    $("pictures-shown").textContent = `${rows.length} pairs: ${titles[second]} wins ${wins} and loses ${losses} against ${titles[first]}`
      + (known.length ? `, ${signed(mean)} on average. ` : ". ") + `Under each picture: ${data.names[scorer]}.`;
    $("rows").replaceChildren(...rows.slice(0, limit).map(({ prompt, seed, text, gain }) => {
      const words = gain === null ? "no such score" : `${gain > 0 ? "▲ win" : gain < 0 ? "▼ loss" : "tie"} ${signed(gain)}`;
      const head = element("h3", {}, element("span", {}, text), element("small", {}, `seed ${seed}`),
        element("span", { class: gain > 0 ? "gain up" : gain < 0 ? "gain down" : "gain" }, words));
      const tiles = [first, second].flatMap((arm) => tile(arm, seed, prompt, scorer, true)).concat(beside.flatMap((arm) => tile(arm, seed, prompt, scorer, false)));
      return element("div", { class: "row", "data-prompt": prompt, "data-gain": gain ?? "" }, head, element("div", { class: "tiles" }, ...tiles));
    }));
    $("more").hidden = rows.length <= limit;
  }

  options($("first"), browser.arms, titles, browser.first);
  options($("second"), browser.arms, titles, browser.second);
  options($("picture-score"), browser.scorers, data.names, browser.primary);
  options($("seed"), ["", ...seeds.map(String)], { "": "all" }, "");
  $("others").append(...browser.arms.map((arm) => {
    const box = element("input", { type: "checkbox", value: arm });
    box.checked = others.has(arm);
    box.addEventListener("change", () => { box.checked ? others.add(arm) : others.delete(arm); draw(); });
    return element("label", { class: "tick" }, box, titles[arm]);
  }));
  const again = () => { limit = PAGE; draw(); };
  for (const id of ["first", "second", "picture-score", "order", "only", "seed", "all-scores"]) $(id).addEventListener("change", again);
  $("search").addEventListener("input", again);
  $("more").addEventListener("click", () => { limit += 3 * PAGE; draw(); });
  draw();
}

const data = read("data");
verdicts();
printing();
for (const table of document.querySelectorAll("table.sortable")) sortable(table);
if (data.chart) curves(data);
controls(data);
// Megabytes of pictures are unpacked when the reader comes near them.
if ($("pictures")) new IntersectionObserver((entries, observer) => {
  if (!entries.some((entry) => entry.isIntersecting)) return;
  observer.disconnect();
  pictures(data);
}, { rootMargin: "800px" }).observe($("pictures"));
