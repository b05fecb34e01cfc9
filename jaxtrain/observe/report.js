const runs = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const GROUPS = [
  ["Data", /^data\/|epoch|num_tokens/],
  ["Where the time goes", /^time|host_time/],
  ["Loss", /(^|[_/])(loss|perplexity|mean_token_accuracy)$/],
  ["Evaluation", /^eval_/],
  ["Sampler against trainer", /sampling\/|mismatch|staleness|support|off_policy/],
  ["Rewards", /reward|accurac|advantage|margin|chosen|rejected/],
  ["Lengths", /length|truncated|clipped_ratio|terminated|turns/],
  ["Entropy, KL and clipping", /entropy|kl|ratio|clip/],
  ["Optimization", /grad_norm|learning_rate|skipped|rounding|coefficient/],
  ["Throughput", /per_second|mfu|goodput|step_time|packing/],
  ["Memory", /memory|slots/],
  ["Other", /./],
];
const CLOSED = ["Other", "Where the time goes", "Data"]; // at the end, to be opened
const hidden = new Set();
let smoothing = 0;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const color = (index) => `var(--r${index % 6})`;

function format(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en");
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + " B";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

// Round numbers that divide [low, high] into about `count` parts.
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw) || 10 * power;
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step)
    found.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  return found;
}

// An exponential mean whose beginning is not biased towards 0.
function smoothed(values) {
  if (!smoothing) return values;
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = smoothing * sum + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return sum / weight;
  });
}

function chart(name) {
  const now = make("div", { class: "now" });
  const holder = make("div", {});
  const card = make("div", { class: "card chart" }, make("h3", {}, name), now, holder);
  card.draw = () => draw(name, holder, now);
  return card;
}

function draw(name, holder, now) {
  const width = 400, height = 190, left = 52, right = 8, top = 8, bottom = 22;
  const lines = runs
    .map((run, index) => ({ run, index, series: run.series[name] }))
    .filter((line) => line.series && !hidden.has(line.index))
    .map((line) => ({ ...line, steps: line.series[0], values: smoothed(line.series[1]), raw: line.series[1] }));
  holder.replaceChildren();
  now.textContent = "";
  if (!lines.length) return;
  const all = lines.flatMap((line) => line.values), steps = lines.flatMap((line) => line.steps);
  let low = Math.min(...all), high = Math.max(...all);
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const first = Math.min(...steps), last = Math.max(...steps, first + 1);
  const x = (step) => left + ((step - first) / (last - first)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const figure = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  for (const tick of ticks(low, high, 4)) {
    figure.append(svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid-line" }));
    figure.append(svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  for (const tick of ticks(first, last, 4).filter(Number.isInteger))
    figure.append(svg("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, format(tick)));
  figure.append(svg("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" }));
  for (const line of lines) {
    const stroke = { fill: "none", stroke: color(line.index), "stroke-width": 1.7, "stroke-linejoin": "round" };
    const path = (values) => values.map((value, at) => `${at ? "L" : "M"}${x(line.steps[at])} ${y(value)}`).join("");
    if (smoothing) figure.append(svg("path", { ...stroke, "stroke-opacity": 0.25, d: path(line.raw.map((value) => Math.min(Math.max(value, low), high))) }));
    figure.append(svg("path", { ...stroke, d: path(line.values) }));
    if (line.steps.length <= 12)
      line.steps.forEach((step, at) => figure.append(svg("circle", { cx: x(step), cy: y(line.values[at]), r: 2.6, fill: color(line.index) })));
  }
  const cursor = svg("line", { y1: top, y2: height - bottom, class: "axis", visibility: "hidden" });
  figure.append(cursor);
  const say = (step) => {
    now.replaceChildren();
    for (const line of lines) {
      let at = line.steps.length - 1;
      if (step !== null)
        for (let each = 0; each < line.steps.length; each++)
          if (Math.abs(line.steps[each] - step) < Math.abs(line.steps[at] - step)) at = each;
      if (runs.length > 1) now.append(make("span", { class: "swatch", style: `background:${color(line.index)}` }));
      now.append(`${format(line.raw[at])} at step ${format(line.steps[at])}  `);
    }
  };
  figure.addEventListener("pointermove", (event) => {
    const box = figure.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const step = first + ((at - left) / (width - left - right)) * (last - first);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", at >= left && at <= width - right ? "visible" : "hidden");
    say(step);
  });
  figure.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); say(null); });
  say(null);
  holder.append(figure);
}

function table(head, rows, kind) {
  const cell = (tag, value) => {
    const number = typeof value === "number";
    return make(tag, number ? { class: "number" } : {}, number ? format(value) : value instanceof Node ? value : String(value ?? ""));
  };
  return make("div", { class: "scroll card" },
    make("table", { class: kind || "" },
      make("thead", {}, make("tr", {}, ...head.map((name) => make("th", {}, name)))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value) => cell("td", value)))))));
}

function named(run, index) {
  return make("span", {}, make("span", { class: "swatch", style: `background:${color(index)}` }), run.name);
}

const charts = [];
const redraw = () => charts.forEach((card) => card.draw());

page.append(make("h1", {}, runs.length === 1 ? runs[0].name : `${runs.length} runs`));
page.append(make("p", { class: "soft" }, `written ${runs[0].written}`));
page.append(make("div", { class: "runs" }, ...runs.map((run, index) =>
  make("div", { class: "card" }, runs.length > 1 ? named(run, index) : null,
    make("dl", {}, ...run.facts.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]))))));

const range = make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0 });
range.addEventListener("input", () => { smoothing = Number(range.value); redraw(); });
const bar = make("div", { class: "bar" }, make("label", {}, "smoothing", range));
if (runs.length > 1)
  runs.forEach((run, index) => {
    const box = make("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => { box.checked ? hidden.delete(index) : hidden.add(index); redraw(); });
    bar.append(make("label", {}, box, named(run, index)));
  });
page.append(bar);

const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))];
// Curves that are one flat line are a table at the end.
const constant = names.filter((name) => new Set(runs.flatMap((run) => run.series[name]?.[1] ?? [])).size === 1);
const groups = new Map(GROUPS.map(([title]) => [title, []]));
for (const name of names) groups.get(GROUPS.find(([, pattern]) => pattern.test(name))[0]).push(name);
for (const title of [...groups.keys()].filter((each) => !CLOSED.includes(each)).concat(CLOSED)) {
  const members = groups.get(title).filter((name) => !constant.includes(name));
  if (!members.length) continue;
  const cards = members.map(chart);
  charts.push(...cards);
  const body = make("div", { class: "grid" }, ...cards);
  if (!CLOSED.includes(title)) page.append(make("h2", {}, title), body);
  else page.append(make("details", {}, make("summary", {}, `${title} (${members.length})`), body));
}
if (constant.length)
  page.append(make("details", {}, make("summary", {}, `Constant (${constant.length})`),
    table(["metric", "value"], constant.map((name) => [name, runs.find((run) => run.series[name]).series[name][1][0]]))));

page.append(make("h2", {}, "Last and best values"));
const shown = names.filter((name) => runs.some((run) => run.best[name] !== undefined));
const columns = runs.length === 1 ? ["metric", "last", "best", "at step"] : ["metric", ...runs.flatMap((run, index) => [named(run, index), "best"])];
page.append(table(columns, shown.map((name) => [name, ...runs.flatMap((run) => {
  const series = run.series[name], best = run.best[name];
  if (!series) return runs.length === 1 ? ["", "", ""] : ["", ""];
  const values = [series[1][series[1].length - 1], best ? best[1] : ""];
  return runs.length === 1 ? [...values, best ? best[0] : ""] : values;
})])));

runs.forEach((run, index) => {
  if (run.rows.length)
    page.append(make("details", { open: "" }, make("summary", {}, "First rows", runs.length > 1 ? ` of ${run.name}` : ""),
      make("p", { class: "soft" }, "what the first batch trains on; tokens with a loss weight are coloured"),
      ...run.rows.map((row) => make("p", { class: "row" }, ...row.map(([text, weight]) =>
        weight ? make("mark", { title: `loss weight ${format(weight)}` }, text) : text)))));
  for (const group of run.samples) {
    page.append(make("h2", {}, `Samples of step ${group.step}`, runs.length > 1 ? ` of ${run.name}` : ""));
    page.append(table(["prompt", "completion", "reward", "advantage", "parts", "tokens"], group.rows.map((row) => [
      row.prompt, row.text, make("span", { class: row.advantage > 0 ? "good" : row.advantage < 0 ? "bad" : "" }, format(row.reward)),
      row.advantage ?? "", row.parts, row.tokens]), "samples"));
  }
});

if (runs.length > 1) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.keys)))];
  const differ = keys.filter((key) => new Set(runs.map((run) => run.keys[key])).size > 1);
  if (differ.length)
    page.append(make("h2", {}, "Keys of the config that differ"),
      table(["key", ...runs.map(named)], differ.map((key) => [key, ...runs.map((run) => run.keys[key] ?? "")])));
}
for (const run of runs)
  page.append(make("details", { class: "card" }, make("summary", {}, `Config of ${run.name}`), make("pre", {}, run.config)));
redraw();
