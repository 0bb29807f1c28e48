"use strict";
// Draws the page's data with Plotly. Text from runs goes into the page as text, and into figures escaped.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const runs = data.runs, many = runs.length > 1;
const FEW = 12;  // panels that are open from the start
const hues = ["#4c78a8", "#f58518", "#3f9b4f", "#d64b4f", "#4fa7a0", "#a66a9b", "#c9a21f", "#e0788b", "#8a6a52", "#7a7f87"];
const buckets = { step: "#3f9b4f", compile: "#f58518", eval: "#4c78a8", checkpoint: "#a66a9b", input: "#d64b4f", start: "#c9a21f",
  restore: "#4fa7a0", wasted: "#8b1a1a", waiting: "#e0788b", check: "#8a6a52", callbacks: "#5b6ee1", other: "#9aa0a8" };
const hidden = new Set();
const drawers = [];  // of every figure: called again when the theme changes

const safe = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = text => safe(text.length > 42 ? `…${text.slice(-40)}` : text);

function element(tag, into, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  into.append(made);
  return made;
}

// ------------------------------------------------------------------------------------------------- colors

function rank() {  // the runs by the metric, the best first
  const value = n => data.table.rows[n].values.metric ?? (data.maximize ? -Infinity : Infinity);
  return runs.map((_, n) => n).sort((a, b) => (data.maximize ? value(b) - value(a) : value(a) - value(b)) || a - b);
}

function color(n) {  // ten runs by hue, more from dark (the best) to light by rank
  if (runs.length <= hues.length) return hues[n];
  const share = order.indexOf(n) / (runs.length - 1);
  return `hsl(${Math.round(210 + 190 * share)}, 65%, ${dark() ? 64 : 46}%)`;
}

const order = rank();
const dark = () => !printing() && matchMedia("(prefers-color-scheme: dark)").matches;
const printing = () => document.body.classList.contains("printing");
function theme() {
  const style = getComputedStyle(document.documentElement), get = name => style.getPropertyValue(name).trim();
  return printing() ? { ink: "#000", faint: "#555", line: "#ccc", paper: "#fff" }
    : { ink: get("--ink"), faint: get("--faint"), line: get("--line"), paper: get("--paper") };
}

function layout(given) {
  const { ink, faint, line, paper } = theme(), axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, exponentformat: "SI", minexponent: 4 };
  const out = { margin: { l: 48, r: 12, t: 8, b: 40 }, font: { color: ink, size: 11, family: "system-ui, sans-serif" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: { bgcolor: paper, bordercolor: line, font: { color: ink } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: faint, activecolor: ink }, dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", ...given };
  out.xaxis = { ...axis, ...given.xaxis };
  out.yaxis = { ...axis, ...given.yaxis };
  return out;
}

const options = { responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
function draw(place, traces, given) {
  return Plotly.react(place, traces, { ...layout(given), width: place.clientWidth || undefined, height: place.clientHeight || undefined }, options);
}

// ------------------------------------------------------------------------------------------------- curves

const scales = {
  step: { label: "step", of: (run, row) => run.steps[row] },
  tokens: { label: runs.find(run => run.axes.tokens)?.axes.tokens.label, needs: run => run.axes.tokens,
    of: (run, row) => run.steps[row] * run.axes.tokens.per_step },
  time: { label: "time", needs: run => run.seconds.some(s => s !== null), of: (run, row) => run.seconds[row] },
  flops: { label: "FLOPs", needs: run => run.axes.flops, of: (run, row) => run.steps[row] * run.axes.flops.per_step },
  dollars: { label: "dollars", needs: run => run.dollars_per_s !== null && run.seconds.some(s => s !== null),
    of: (run, row) => run.seconds[row] === null ? null : run.seconds[row] * run.dollars_per_s },
};

function timeUnit() {
  const longest = Math.max(0, ...runs.flatMap(run => run.seconds.slice(-1)));
  return longest > 7200 ? [3600, "hours"] : longest > 180 ? [60, "minutes"] : [1, "seconds"];
}

function smooth(values, weight) {  // exponential mean, corrected for its start, over the points drawn
  let mean = 0, part = 0;
  return values.map(y => {
    if (y === null) return null;
    mean = weight * mean + (1 - weight) * y;
    part = weight * part + (1 - weight);
    return mean / part;
  });
}

const leaf = name => name.slice(name.lastIndexOf("/") + 1);
function panelNames() {  // title -> the metrics that share a panel: of one run train and eval, of several one each
  const names = [...new Set(runs.flatMap(run => Object.keys(run.curves)))];
  const weight = name => (name === data.metric ? 0 : leaf(name) === "loss" ? 1 : name.startsWith("eval/") ? 2 : name.startsWith("train/") ? 3 : 4);
  names.sort((a, b) => weight(a) - weight(b) || names.indexOf(a) - names.indexOf(b));
  const panels = new Map();
  for (const name of names) {
    const alone = names.filter(other => leaf(other) === leaf(name)).length === 1;
    const title = many || alone || !/^(train|eval)\//.test(name) ? name : leaf(name);
    panels.set(title, [...(panels.get(title) ?? []), name]);
  }
  return panels;
}

function curveTraces(run, n, name, place, choice) {
  const curve = run.curves[name], scale = scales[choice.axis];
  const unit = choice.axis === "time" ? timeUnit()[0] : 1;
  const x = curve.at.map(row => { const value = scale.of(run, row); return value === null ? null : value / unit; });
  const stroke = many ? color(n) : hues[place % hues.length];
  const title = many ? short(run.name) : safe(name.slice(0, name.lastIndexOf("/")));
  const base = { x, type: "scatter", showlegend: false, connectgaps: false };
  const marks = curve.at.length < 40 ? "lines+markers" : "lines";
  const traces = [];
  if (curve.low && choice.band) {
    traces.push({ ...base, y: curve.low, mode: "lines", line: { width: 0 }, hoverinfo: "skip" });
    traces.push({ ...base, y: curve.high, mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: fade(stroke), hoverinfo: "skip" });
  }
  const main = { ...base, name: title, line: { color: stroke, width: 1.6 }, marker: { size: 5, color: stroke }, mode: marks, showlegend: !many };
  if (choice.smoothing > 0 && curve.at.length > 2) {
    traces.push({ ...main, y: curve.y, opacity: 0.25, showlegend: false, hoverinfo: "skip" });
    traces.push({ ...main, y: smooth(curve.y, choice.smoothing), mode: "lines" });
  } else traces.push({ ...main, y: curve.y });
  return traces;
}

function fade(stroke) {
  const [r, g, b] = [1, 3, 5].map(i => parseInt(stroke.slice(i, i + 2), 16));
  return `rgba(${r}, ${g}, ${b}, 0.18)`;
}

function count(n, one, several = `${one}s`) { return `${n.toLocaleString("en")} ${n === 1 ? one : several}`; }

function panelNote(names, choice) {
  const said = [], scale = scales[choice.axis];
  const parts = names.flatMap(name => runs.map(run => [run, run.curves[name], name]).filter(([, curve]) => curve));
  const thinned = Math.max(0, ...parts.map(([, curve]) => curve.lines_per_point ?? 0));
  if (thinned && !choice.band) said.push(`A point is the mean of up to ${thinned} lines.`);
  else if (thinned) said.push(`A point is the mean of up to ${thinned} lines, the band their lowest and highest.`);
  for (const [run, curve, name] of parts.filter(([, curve]) => curve.not_finite).slice(0, 3))
    said.push(`${many ? run.name : name}: ${count(curve.not_finite, "value")} of ${curve.lines.toLocaleString("en")} not finite (step ${curve.not_finite_at.slice(0, 5).join(", ")}${curve.not_finite > 5 ? " …" : ""}).`);
  if (scale.needs && parts.some(([run]) => !scale.needs(run))) said.push("Runs without this axis are left out.");
  if (choice.logy) {
    const lost = parts.flatMap(([, curve]) => curve.y).filter(y => y !== null && y <= 0).length;
    if (lost) said.push(`${count(lost, "point")} at 0 or below cannot be drawn on a log axis.`);
  }
  return said.join(" ");
}

function choice() {
  return { axis: at("axis").value, smoothing: Number(at("smoothing").value), logx: at("logx").checked, logy: at("logy").checked, band: runs.length <= hues.length };
}

function drawPanel(panel, names) {
  const chosen = choice(), scale = scales[chosen.axis];
  const traces = [];
  runs.forEach((run, n) => {
    if (hidden.has(n) || (scale.needs && !scale.needs(run))) return;
    names.forEach((name, place) => { if (run.curves[name]) traces.push(...curveTraces(run, n, name, place, chosen)); });
  });
  panel.note.textContent = panelNote(names, chosen);
  const title = chosen.axis === "time" ? timeUnit()[1] : scale.label;
  return draw(panel.plot, traces, {
    hovermode: traces.length > 12 ? "closest" : "x unified", showlegend: !many && names.length > 1,
    legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 },
    xaxis: { title: { text: title }, type: chosen.logx ? "log" : "linear" }, yaxis: { type: chosen.logy ? "log" : "linear" },
    margin: { l: 48, r: 12, t: !many && names.length > 1 ? 26 : 8, b: 40 },
  });
}

function makePanels() {
  const names = [...panelNames()], panels = [];
  names.forEach(([title, members], n) => {
    const further = n >= FEW, into = further ? at("further").querySelector(".panels") : at("curves");
    const figure = element("figure", into, "", "panel");
    element("figcaption", figure, title);
    const panel = { plot: element("div", figure, "", "plot"), note: element("p", figure, "", "faint"), members, further };
    panels.push(panel);
  });
  const open = () => at("further").open;
  const redraw = () => panels.filter(panel => !panel.further || open()).map(panel => drawPanel(panel, panel.members));
  if (names.length > FEW) {
    at("further").hidden = false;
    at("further").querySelector("summary").textContent = `${names.length - FEW} more`;
    at("further").addEventListener("toggle", redraw);
  }
  if (!names.length) element("p", at("curves"), "No metric is logged yet.", "faint");
  drawers.push(redraw);
}

function makeControls() {
  for (const [name, scale] of Object.entries(scales)) {
    if (!scale.needs || runs.some(scale.needs)) {
      const option = element("option", at("axis"), scale.label);
      option.value = name;
    }
  }
  let waiting = false;
  const changed = () => {
    at("smoothed").textContent = at("smoothing").value;
    at("how").textContent = [at("axis").value === "time" || at("axis").value === "dollars" ? `Time: ${[...new Set(runs.map(run => run.since))].join("; ")}.` : "",
      Number(at("smoothing").value) ? "Smoothing: exponential mean over the points drawn; the faint lines are as logged." : ""].join(" ");
    if (!waiting) requestAnimationFrame(() => { waiting = false; drawers[0](); });
    waiting = true;
  };
  for (const id of ["axis", "smoothing", "logx", "logy"]) at(id).addEventListener("input", changed);
}

// ------------------------------------------------------------------------------------- time and memory

// A y axis with a name at each whole number; names may be alike once they are short.
const names = labels => ({ autorange: "reversed", tickvals: labels.map((_, n) => n), ticktext: labels.map(short), zeroline: false, showgrid: false });

function bars(place, labels, parts, unit, hues_) {
  const traces = Object.entries(parts).map(([name, values], n) => ({ type: "bar", orientation: "h", name: safe(name), y: labels.map((_, k) => k), x: values, customdata: labels.map(short),
    marker: { color: hues_[name] ?? hues[n % hues.length] }, hovertemplate: `%{customdata}: ${safe(name)} %{x:.4s}${unit}<extra></extra>` }));
  return draw(place, traces, { barmode: "stack", xaxis: { ticksuffix: unit }, yaxis: names(labels),
    margin: { l: 48, r: 16, t: 8, b: 84 },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", traceorder: "normal" }, showlegend: true, bargap: 0.35 });
}

function drawTime() {
  const place = at("time");
  if (!place) return;
  const rows = many ? runs.slice(0, 60).map(run => [run.name, run.spent_s]) : runs[0].sessions.map((seconds, n) => [`session ${n + 1}`, seconds]);
  const used = rows.filter(([, seconds]) => Object.keys(seconds).length);
  if (!used.length) { place.hidden = true; return; }
  place.style.height = `${130 + 26 * used.length}px`;
  const kinds = [...new Set(used.flatMap(([, seconds]) => Object.keys(seconds)))];
  kinds.sort((a, b) => (b === "step") - (a === "step"));
  const parts = Object.fromEntries(kinds.map(name => [name, used.map(([, seconds]) => (typeof seconds[name] === "number" ? seconds[name] : 0))]));
  return bars(place, used.map(([name]) => name), parts, "s", buckets);
}

function drawMemory() {
  const place = at("memory");
  if (!place) return;
  const { memory, peak_bytes } = runs[0], planned = ["params", "optimizer", "batch", "temporary"].filter(key => memory[key] !== null);
  if (!planned.length) { place.hidden = true; return; }
  const labels = ["planned"], mib = 1 / 2 ** 20;
  const parts = Object.fromEntries(planned.map(key => [key, [memory[key] * mib]]));
  if (peak_bytes) { labels.push("measured"); for (const key of planned) parts[key].push(0); parts["peak, measured"] = [0, peak_bytes * mib]; }
  if (memory.capacity) { labels.push("a device has"); for (const key in parts) parts[key].push(0); parts["capacity"] = labels.map((_, n) => n === labels.length - 1 ? memory.capacity * mib : 0); }
  return bars(place, labels, parts, " MiB", { "peak, measured": "#5b6ee1", capacity: "#9aa0a8" });
}

// -------------------------------------------------------------------------------------------- several runs

function front(points) {  // those that none beats at the same cost or less
  const better = (a, b) => (data.maximize ? a > b : a < b), out = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || (better(a.y, b.y) ? -1 : 1)))
    if (!out.length || better(point.y, out.at(-1).y)) out.push(point);
  return out;
}

function makePareto() {
  const kinds = data.table.columns.filter(column => ["total_s", "total_flops", "kwh", "dollars"].includes(column.key));
  const usable = kinds.filter(({ key }) => data.table.rows.filter(row => row.values[key] !== null && row.values.metric !== null).length > 1);
  if (!many || !usable.length) return;
  at("costs").hidden = false;
  for (const { key, label } of usable) element("option", at("cost"), label).value = key;
  const redraw = () => {
    const key = at("cost").value, titles = { total_s: "seconds", total_flops: "FLOPs", kwh: "kWh", dollars: "dollars" };
    const points = data.table.rows.map((row, n) => ({ x: row.values[key], y: row.values.metric, n, name: short(row.name) }))
      .filter(point => typeof point.x === "number" && typeof point.y === "number" && !hidden.has(point.n));
    const best = front(points);
    return draw(at("pareto"), [
      { x: best.map(p => p.x), y: best.map(p => p.y), mode: "lines", line: { shape: "hv", dash: "dot", color: theme().faint }, hoverinfo: "skip" },
      { x: points.map(p => p.x), y: points.map(p => p.y), text: points.map(p => p.name), mode: "markers", marker: { size: 10, color: points.map(p => color(p.n)), line: { width: points.map(p => (best.includes(p) ? 2 : 0)), color: theme().ink } },
        hovertemplate: "%{text}<br>%{x:.4s}, %{y:.5g}<extra></extra>" },
    ], { showlegend: false, xaxis: { title: { text: titles[key] } }, yaxis: { title: { text: safe(data.metric) } } });
  };
  at("cost").addEventListener("input", redraw);
  drawers.push(redraw);
}

function dimension(column) {
  const values = data.table.rows.map(row => row.values[column.key] ?? ""), numbers = values.map(Number);
  if (new Set(values).size < 2) return null;
  if (values.every(value => value !== "" && Number.isFinite(Number(value)))) {
    const positive = Math.min(...numbers) > 0 && Math.max(...numbers) / Math.min(...numbers) >= 30;
    const place = positive ? Math.log10 : value => value, ticks = [...new Set(numbers)].sort((a, b) => a - b);
    const some = ticks.filter((_, n) => n % Math.ceil(ticks.length / 8) === 0);
    return { label: short(column.label), values: numbers.map(place), tickvals: some.map(place), ticktext: some.map(v => String(Number(v.toPrecision(3)))) };
  }
  const kinds = [...new Set(values)].sort();
  return { label: short(column.label), values: values.map(value => kinds.indexOf(value)), tickvals: kinds.map((_, n) => n), ticktext: kinds.map(kind => short(String(kind))) };
}

function makeParallel() {
  const rows = data.table.rows, values = rows.map(row => row.values.metric);
  const columns = data.table.columns.filter(column => data.table.settings.includes(column.key)).slice(0, 10);
  const dims = columns.map(dimension).filter(Boolean);
  const known = rows.map((_, n) => n).filter(n => typeof values[n] === "number");
  if (!many || !dims.length || known.length < 2 || !document.createElement("canvas").getContext("webgl")) return;
  at("parallel").hidden = false;
  const last = { label: short(data.metric), values };
  drawers.push(() => {
    const { ink } = theme(), drawn = [...dims, last].map(each => ({ ...each, values: known.map(n => each.values[n]) }));
    const line = { color: known.map(n => values[n]), colorscale: [[0, "#2f7ed8"], [0.5, "#c9a21f"], [1, "#d64b4f"]], showscale: false, reversescale: data.maximize };
    return draw(at("parcoords"), [{ type: "parcoords", dimensions: drawn, line, labelfont: { color: ink }, tickfont: { color: ink }, rangefont: { color: theme().faint } }],
      { margin: { l: 60, r: 60, t: 50, b: 24 } });
  });
}

function makeSeeds() {
  const place = at("seeds"), groups = data.groups.slice(0, 60);
  if (!place) return;
  place.style.height = `${Math.max(200, 90 + 26 * groups.length)}px`;
  drawers.push(() => {
    const { ink, faint } = theme();
    const half = groups.map(group => (group.interval ? group.interval[1] - group.mean : 0));
    const single = groups.flatMap((group, n) => group.values.map(value => [value, n]));
    return draw(place, [
      { x: single.map(p => p[0]), y: single.map(p => p[1]), mode: "markers", marker: { color: faint, size: 6, opacity: 0.6 }, name: "a run" },
      { x: groups.map(group => group.mean), y: groups.map((_, n) => n), error_x: { type: "data", array: half, color: ink }, mode: "markers", marker: { size: 9, color: ink },
        name: "mean, 95 % interval" },
    ], { xaxis: { title: { text: safe(data.metric) } }, yaxis: names(groups.map(group => group.name)), legend: { orientation: "h", y: 1, yanchor: "bottom" } });
  });
}

function makeTable() {
  const table = at("runs");
  if (!table) return;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, n) => row.cells[n].dataset.v;
  const sort = (n, down) => {
    const sign = down ? -1 : 1, rows = [...body.rows];
    const compare = (a, b) => {
      const [x, y] = [value(a, n), value(b, n)];
      if (x === "" || y === "") return (x === "") - (y === "");  // nothing comes last
      const [p, q] = [Number(x), Number(y)];
      return sign * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y, "en", { numeric: true }) : p - q);
    };
    body.append(...rows.sort(compare));
    heads.forEach((head, k) => (k === n ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
  };
  heads.forEach((head, n) => head.querySelector("button").addEventListener("click", () => sort(n, head.getAttribute("aria-sort") === "ascending")));
  for (const row of body.rows) {
    const n = Number(row.dataset.run), box = row.querySelector("input");
    row.style.setProperty("--run", color(n));
    row.classList.toggle("best", n === order[0] && typeof data.table.rows[n].values.metric === "number");
    box.addEventListener("input", () => { box.checked ? hidden.delete(n) : hidden.add(n); redraw(); });
  }
  const metric = 2 + data.table.columns.findIndex(column => column.key === "metric");
  if (metric > 1) sort(metric, data.maximize);
}

// --------------------------------------------------------------------------------------------------- start

function redraw() { return Promise.all(drawers.map(drawer => drawer()).flat()); }

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function start() {
  makeTable();
  makeControls();
  const script = document.createElement("script");
  script.textContent = await unpack(at("library").textContent);
  document.head.append(script);
  makePanels();
  drawers.push(drawTime, drawMemory);
  makePareto();
  makeParallel();
  makeSeeds();
  await redraw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (const [event, on] of [["beforeprint", true], ["afterprint", false]])
    addEventListener(event, () => { document.body.classList.toggle("printing", on); redraw(); });
  document.documentElement.dataset.drawn = document.querySelectorAll(".js-plotly-plot").length;
}

start().catch(error => {
  at("failed").hidden = false;
  at("failed").textContent = `The curves cannot be drawn in this browser (${error}); the tables are complete.`;
  document.documentElement.dataset.failed = String(error);
});
