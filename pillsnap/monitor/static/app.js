// Shows the messages of the monitor's WebSocket. Texts of a run are only assigned to textContent.

import { Chart } from "./chart.js";
import { WORDS, clock, duration, gib, nameOf, number, percent } from "./words.js";

const query = new URLSearchParams(location.search);
const token = query.get("token");
const find = (selector, parent = document) => parent.querySelector(selector);
const make = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
};

const SILENT_AFTER_S = 300; // longer than a validation: the run was probably killed
const NODE_MAX_AGE_S = 90; // nodes are sampled every 15 s
const span = (seconds) => duration(seconds, words);

let language = query.get("lang") || localStorage.getItem("language") || (navigator.language.startsWith("ko") ? "ko" : "en");
if (!WORDS[language]) language = "en";
let words = WORDS[language];
let run = query.get("run");
let socket = null;
let connection = "connecting";
let retryMs = 500;
let clockSkew = 0; // server time minus browser time, in seconds
let view = null;
let context = { runs: [], machine: {} };
let curves = {};
let cards = {};

// --- the connection -------------------------------------------------------------------------------------------------

function connect() {
  const address = new URL("ws", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.search = new URLSearchParams({ ...(run && { run }), ...(token && { token }) });
  const opened = (socket = new WebSocket(address));
  opened.onmessage = (event) => {
    if (opened !== socket) return;
    retryMs = 500;
    receive(JSON.parse(event.data));
  };
  opened.onclose = () => {
    if (opened !== socket) return; // another run was selected
    connection = "lost";
    show();
    setTimeout(() => opened === socket && connect(), retryMs);
    retryMs = Math.min(10000, retryMs * 2);
  };
}

function receive(message) {
  connection = "live";
  if (message.type === "hello" || message.type === "context") {
    context = message;
    clockSkew = message.now - Date.now() / 1000;
    run = message.run ?? run;
  } else {
    if (message.type === "snapshot") curves = {};
    view = message.view;
    for (const [name, change] of Object.entries(message.curves)) {
      const kept = (curves[name] ?? []).filter((point) => point[0] < change.from);
      curves[name] = kept.concat(change.points);
    }
  }
  show();
}

function selectRun(name) {
  run = name;
  view = null;
  curves = {};
  cards = {};
  find("#tasks").replaceChildren();
  connection = "connecting";
  const address = new URL(location.href);
  address.searchParams.set("run", name);
  history.replaceState(null, "", address);
  socket.close();
  connect();
  show();
}

// --- the page -------------------------------------------------------------------------------------------------------

let frame = 0;
function show() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(render);
}

function render() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = words[element.dataset.word];
  find("#language").textContent = words.other;
  find("#connection").className = connection;
  find("#connection span").textContent = words[connection];
  showRuns();
  showMachines();
  if (!view) return;
  const status = find("#status");
  status.textContent = words[view.status];
  status.className = `badge ${view.status}`;
  document.title = `${view.run.name ?? run} · ${words[view.status]}`;
  showSummary();
  showFailure(view.failure);
  showVerdict(view.verdict);
  for (const [name, task] of Object.entries(view.tasks)) showTask(name, task);
  find("[data-field='num_warnings']").textContent = view.num_warnings;
  find("[data-field='num_quarantined']").textContent = view.num_quarantined;
  showMessages("#warnings", view.warnings, (event) => event.message);
  showMessages("#quarantine", view.quarantine, (event) => `${words[event.task]} · ${event.sample_id}: ${event.reason}`);
}

function showRuns() {
  const select = find("#runs");
  const names = context.runs.map((each) => each.name);
  if (run && !names.includes(run)) names.unshift(run);
  if (names.join("\n") !== Array.from(select.options, (option) => option.value).join("\n")) {
    select.replaceChildren(...names.map((name) => new Option(name, name)));
  }
  if (run) select.value = run;
}

function showSummary() {
  const { run: details, first_time: first, last_time: last, evaluation } = view;
  const parts = [];
  const age = Date.now() / 1000 + clockSkew - last;
  if (typeof details.stage === "number") parts.push(words.stage(details.stage));
  if (Number.isInteger(details.num_workers)) parts.push(words.workers(details.num_workers));
  if (evaluation) parts.push(words.evaluated(...[evaluation.done, evaluation.total].map((n) => n.toLocaleString("en"))));
  if (first) {
    parts.push(words.elapsed(span(last - first)));
    parts.push(age < 86400 ? words.lastEvent(span(age)) : words.lastEventAt(clock(last)));
  }
  for (const name of ["torch", "ray", "ultralytics", "timm"]) {
    if (view.versions[name]) parts.push(`${name} ${view.versions[name]}`);
  }
  const summary = find("#summary");
  summary.textContent = parts.join(" · ");
  summary.className = ["running", "evaluating"].includes(view.status) && age > SILENT_AFTER_S ? "lost" : "dim";
}

function showFailure(failure) {
  find("#failure").hidden = !failure;
  for (const name of ["message", "cause", "advice"]) find(`[data-field='failure.${name}']`).textContent = failure?.[name] ?? "";
}

function showVerdict(verdict) {
  const card = find("#verdict");
  card.hidden = !verdict;
  if (!verdict) return;
  card.className = `card ${verdict.met ? "good" : "bad"}`;
  find("#verdict-title").textContent = verdict.met ? words.met : words.missed;
  find("#targets").replaceChildren(
    ...Object.entries(verdict.targets).map(([name, target]) => {
      const write = name.endsWith("_s") ? span : number;
      const row = make("tr");
      row.append(make("td", "", nameOf(name, words)), make("td", "", write(target.value)), make("td", "", write(target.target)));
      row.append(make("td", target.met ? "good" : "bad", target.met ? words.reached : words.notReached));
      return row;
    }),
  );
}

function showMessages(selector, events, write) {
  const items = events.slice(-6).reverse().map((event) => {
    const item = make("li");
    item.append(make("time", "", clock(event.time)), write(event));
    return item;
  });
  find(selector).replaceChildren(...(items.length ? items : [make("li", "dim", words.none)]));
}

// The machine of the monitor, then the run's other nodes with recent samples.
function showMachines() {
  const now = Date.now() / 1000 + clockSkew;
  const own = context.machine;
  const others = (view?.machines ?? []).filter((node) => node.node !== own.node && now - node.time < NODE_MAX_AGE_S);
  others.sort((a, b) => a.node.localeCompare(b.node));
  const rows = machineRows(own);
  for (const node of others) rows.push(make("h3", "", `${words.node} ${node.node}`), ...machineRows(node));
  find("#machine").replaceChildren(...rows);
}

function machineRows(machine) {
  const rows = [];
  for (const gpu of machine.gpus ?? []) {
    const details = [percent(gpu.utilization), `${number(gpu.temperature_c)} °C`, `${number(gpu.power_w, 3)} W`];
    const used = `${gib(gpu.memory_used_bytes)} / ${gib(gpu.memory_total_bytes)}`;
    rows.push(meter(`GPU ${gpu.index} ${gpu.name} · ${details.join(" · ")}`, used, gpu.memory_used_bytes / gpu.memory_total_bytes));
  }
  if (machine.host_memory_total_bytes) {
    const { host_memory_used_bytes: used, host_memory_total_bytes: total, disk_free_bytes: free, disk_total_bytes: disk } = machine;
    rows.push(meter(words.memory, `${gib(used)} / ${gib(total)}`, used / total));
    rows.push(meter(words.cpu, `${percent(machine.cpu_fraction)} ${words.busy}`, machine.cpu_fraction, false));
    rows.push(meter(words.disk, `${gib(free)} ${words.free}`, 1 - free / disk));
  }
  return rows;
}

function meter(title, text, share, warns = true) {
  const box = make("div", "meter");
  const row = make("div", "row");
  row.append(make("span", "", title), make("span", "dim", text));
  const bar = make("div", warns && share > 0.9 ? "bar high" : "bar");
  bar.append(make("span"));
  bar.firstChild.style.width = `${100 * Math.min(1, share || 0)}%`;
  box.append(row, bar);
  return box;
}

// --- a task ---------------------------------------------------------------------------------------------------------

function cardOf(name) {
  if (!cards[name]) {
    const card = find("#task").content.firstElementChild.cloneNode(true);
    card.id = name;
    find("#tasks").append(card);
    cards[name] = { card, charts: {} };
  }
  return cards[name];
}

function showTask(name, task) {
  const { card, charts } = cardOf(name);
  card.className = `card task ${task.status}`;
  find(".name", card).textContent = words[name];
  const badge = find(".badge", card);
  badge.textContent = words[task.status];
  badge.className = `badge ${task.status}`;
  find(".left", card).textContent = timeOf(task);
  const bar = find(".bar", card);
  bar.className = `bar ${task.status}`;
  bar.firstElementChild.style.width = `${100 * task.progress}%`;
  bar.setAttribute("aria-valuenow", Math.round(100 * task.progress));
  find(".position", card).textContent = positionOf(task);
  find(".figures", card).replaceChildren(...metricsOf(task).map((metric) => metricElement(name, ...metric)));
  showCharts(find(".charts", card), charts, name, task);
  showExamples(find("figure", card), name, task.examples);
}

function timeOf(task) {
  if (task.status === "finished" && task.duration_s) return words.took(span(task.duration_s));
  return task.status === "started" && task.eta_s !== null ? words.left(span(task.eta_s)) : "";
}

function positionOf(task) {
  if (!task.step && task.status !== "started") return "";
  const parts = [`${words.epoch} ${task.epoch}/${task.epochs ?? "?"}`, `${words.step} ${task.step}/${task.total_steps ?? "?"}`];
  if (task.num_train) parts.push(`${words.train} ${task.num_train.toLocaleString("en")}`);
  if (task.num_val) parts.push(`${words.val} ${task.num_val.toLocaleString("en")}`);
  if (task.restarts) parts.push(words.restarts(task.restarts));
  return parts.join(" · ");
}

// [field, label, text, unit, note]
function metricsOf(task) {
  if (!task.step) return [];
  const losses = Object.entries(task.losses).map(([name, value]) => `${name} ${number(value, 3)}`);
  const metrics = [
    ["loss", words.loss, number(task.loss), "", losses.join(", ")],
    ["images_per_s", words.images_per_s, number(task.images_per_s, 3), "img/s", ""],
    ["data_wait_fraction", words.data_wait_fraction, percent(task.data_wait_fraction), "", ""],
    ["lr", words.lr, number(task.lr, 3), "", ""],
  ];
  if (task.gpu_memory_bytes !== null) {
    metrics.push(["gpu_memory_bytes", words.gpu_memory_bytes, gib(task.gpu_memory_bytes), "", ""]);
  }
  const [last, best] = [task.last_validation, task.best_validation];
  for (const [name, value] of Object.entries(last?.metrics ?? {})) {
    const better = best && best.epoch !== last.epoch ? `, ${words.best} ${number(best.metrics[name], 3)}` : "";
    metrics.push([name === "loss" ? "val_loss" : name, name === "loss" ? words.val_loss : nameOf(name, words), number(value), "", `${words.epoch} ${last.epoch}${better}`]);
  }
  if (task.checkpoint) {
    const { epoch, time } = task.checkpoint;
    metrics.push(["checkpoint", words.checkpoint, `${words.epoch} ${epoch}`, "", clock(time)]);
  }
  return metrics;
}

function metricElement(task, field, label, text, unit, note) {
  const box = make("div");
  const value = make("dd");
  const shown = make("span", "", text);
  shown.dataset.field = `${task}.${field}`;
  value.append(shown, make("small", "", ` ${unit}`), make("small", "note", note));
  box.append(make("dt", "", label), value);
  return box;
}

function showCharts(parent, charts, name, task) {
  const found = Object.keys(task.last_validation?.metrics ?? {});
  const metrics = found.filter((metric) => metric !== "loss").slice(0, 4); // losses have another scale
  const wanted = [
    ["loss", found.includes("loss") ? ["loss", "val/loss"] : ["loss"], {}],
    ["validation", metrics.map((metric) => `val/${metric}`), { low: 0 }],
    ["images_per_s", ["images_per_s"], { low: 0 }],
    ["data_wait_fraction", ["data_wait_fraction"], { low: 0, write: (value) => percent(value, value < 0.1 ? 1 : 0) }],
  ];
  for (const [kind, series, options] of wanted) {
    const key = `${language} ${series}`;
    if (charts[kind]?.key !== key) {
      const titles = series.map((each) => (each === "val/loss" ? words.val_loss : nameOf(each.replace("val/", ""), words)));
      const unit = task.steps_per_epoch ? words.epoch : words.step;
      const chart = series.length ? new Chart(parent, titles, unit, options) : null;
      if (charts[kind]?.chart && chart) charts[kind].chart.box.replaceWith(chart.box);
      charts[kind] = { key, chart };
    }
    charts[kind].chart?.update(series.map((each) => curves[`${name}/${each}`] ?? []), task.steps_per_epoch);
  }
}

function showExamples(figure, name, path) {
  figure.hidden = !path;
  if (!path || figure.dataset.path === path) return;
  figure.dataset.path = path;
  find("img", figure).src = `picture?${new URLSearchParams({ run, task: name, v: path, ...(token && { token }) })}`;
}

// --- start ----------------------------------------------------------------------------------------------------------

find("#runs").addEventListener("change", (event) => selectRun(event.target.value));
find("#language").addEventListener("click", () => {
  language = language === "en" ? "ko" : "en";
  words = WORDS[language];
  localStorage.setItem("language", language);
  show();
});
const root = document.documentElement;
const theme = query.get("theme") || localStorage.getItem("theme");
if (theme) root.dataset.theme = theme;
find("#theme").addEventListener("click", () => {
  const isDark = getComputedStyle(root).colorScheme.trim() === "dark";
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  show();
});
setInterval(show, 1000); // updates the age of the last event
show();
connect();
