// Shows what `status` says, every two seconds. Text is only ever set as text: a warning may quote anybody.
"use strict";
const INTERVAL_MS = 2000;
const PATIENCE_MS = 5000;
const MARGIN = { left: 62, right: 10, top: 8, bottom: 20 };

const $ = id => document.getElementById(id);
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
// Replaces what is in an element only when it changed, so that a selection stays.
const shown = {};
function show(id, data, children) {
  const text = JSON.stringify(data);
  if (shown[id] === text) return;
  shown[id] = text;
  $(id).replaceChildren(...children(data));
}

// ---- numbers and times, as a person reads them --------------------------------------------------

const short = n => n >= 100 ? n.toFixed(0) : n >= 10 ? String(+n.toFixed(1)) : String(+n.toFixed(2));
function scaled(n, base, units) {
  let power = 0;
  while (Math.abs(n) >= base && power < units.length - 1) { n /= base; power++; }
  return short(n) + "\u00a0" + units[power]; // not to be broken
}
const FORMATS = {
  count: n => scaled(n, 1000, ["", "k", "M", "G"]).trimEnd(),
  bytes: n => scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]),
  seconds: s => s === 0 ? "0\u00a0s" : s < 0.001 ? short(s * 1e6) + "\u00a0µs" : s < 1 ? short(s * 1000) + "\u00a0ms" : duration(s),
};
FORMATS.rate = n => FORMATS.count(n) + "\u00a0/s";
function duration(s) {
  if (s < 120 && s !== 60) return short(s) + "\u00a0s";
  if (s < 7200) return short(s / 60) + "\u00a0min";
  if (s < 172800) return short(s / 3600) + "\u00a0h";
  return short(s / 86400) + "\u00a0days";
}
const exact = n => Number(n).toLocaleString("en", { maximumFractionDigits: 3 });
const two = n => String(n).padStart(2, "0");
function clock(ms, withSeconds = true) {
  const at = new Date(ms);
  return two(at.getHours()) + ":" + two(at.getMinutes()) + (withSeconds ? ":" + two(at.getSeconds()) : "");
}
function moment(ms, now) {
  const at = new Date(ms);
  const isToday = at.toDateString() === new Date(now).toDateString();
  return (isToday ? "" : `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} `) + clock(ms);
}

// ---- plots --------------------------------------------------------------------------------------

const PLOTS = { events_per_second: "rate", lag_bytes: "bytes", commit_to_ack_seconds: "seconds", slot_wal_bytes: "bytes" };
let past = null, cursor = null;

// The end of the axis and the distance of its ticks: round numbers in the unit's own base.
function axis(most, unit) {
  const minutes = [60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400];
  const base = unit === "bytes" ? 1024 : 1000;
  most = Math.max(most, { rate: 4, bytes: 1024, seconds: 0.001 }[unit]); // no fractions of an event or a byte
  const scale = base ** Math.floor(Math.log(most) / Math.log(base) + 1e-9);
  const steps = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500];
  const step = unit === "seconds" && most > 120
    ? minutes.find(it => it * 4 >= most) || 7 * 86400
    : (steps.find(it => it * scale * 4 >= most) || 500) * scale;
  return { step, end: Math.ceil(most / step - 1e-9) * step };
}

// Runs of neighbours that have a value, and between which no sample is missing.
function runs(times, values) {
  const found = [];
  let last = null;
  values.forEach((value, i) => {
    const isNext = last === i - 1 && times[i] - times[i - 1] < 3 * past.interval_ms;
    if (value === null) return;
    if (!isNext) found.push([]);
    found[found.length - 1].push(i);
    last = i;
  });
  return found;
}

function plot(id, unit) {
  const figure = $(id), svg = figure.querySelector("svg");
  const width = svg.clientWidth, height = svg.clientHeight;
  if (!width) return;
  const { at: times, ready } = past, values = past[id], format = FORMATS[unit];
  const end = past.now, begin = end - past.span_ms;
  const { step, end: most } = axis(Math.max(...values.map(v => v || 0), 0), unit);
  const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
  const x = time => MARGIN.left + (right - MARGIN.left) * Math.max(0, (time - begin) / past.span_ms);
  const y = value => bottom - (bottom - MARGIN.top) * value / most;
  const parts = [];
  for (const run of runs(times, ready.map(is => is ? null : 1))) {
    const from = x(times[run[0]] - past.interval_ms), to = x(times[run[run.length - 1]]);
    parts.push(draw("rect", { class: "outage", x: from, y: MARGIN.top, width: Math.max(1, to - from), height: bottom - MARGIN.top }));
  }
  for (let value = 0; value <= most * 1.001; value += step) {
    parts.push(draw("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }));
    parts.push(draw("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  const minutes = width < 420 ? 5 : 2;
  for (let minute = 0; minute <= 10; minute += minutes) {
    const time = end - minute * 60000, anchor = minute === 0 ? "end" : minute === 10 ? "start" : "middle";
    parts.push(draw("text", { x: x(time), y: height - 5, "text-anchor": anchor }, clock(time, false)));
  }
  for (const run of runs(times, values)) {
    const points = run.map(i => `${x(times[i]).toFixed(1)},${y(values[i]).toFixed(1)}`);
    if (points.length === 1) {
      parts.push(draw("circle", { class: "dot", cx: x(times[run[0]]), cy: y(values[run[0]]), r: 2 }));
      continue;
    }
    const [first, final] = [x(times[run[0]]), x(times[run[run.length - 1]])];
    parts.push(draw("polygon", { class: "area", points: `${first},${bottom} ${points.join(" ")} ${final},${bottom}` }));
    parts.push(draw("polyline", { class: "curve", points: points.join(" ") }));
  }
  let value = values[values.length - 1], when = "";
  if (cursor !== null) {
    const i = times.findIndex(time => time >= cursor);
    if (i >= 0) {
      value = values[i];
      when = "at " + clock(times[i]) + ": ";
      parts.push(draw("line", { class: "cursor", x1: x(times[i]), x2: x(times[i]), y1: MARGIN.top, y2: bottom }));
    }
  }
  svg.replaceChildren(...parts);
  figure.querySelector("b").textContent = when + (value === null || value === undefined ? "–" : format(value));
  const caption = figure.querySelector("span").textContent;
  svg.setAttribute("aria-label", `${caption}, the last ten minutes, 0 to ${format(most)}`);
}
function plots() {
  if (past) for (const [id, unit] of Object.entries(PLOTS)) plot(id, unit);
}
for (const id of Object.keys(PLOTS)) {
  const svg = $(id).querySelector("svg");
  svg.addEventListener("pointermove", event => {
    if (!past) return;
    const { left, width } = svg.getBoundingClientRect();
    const share = (event.clientX - left - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
    cursor = past.now - past.span_ms * (1 - Math.min(1, Math.max(0, share)));
    plots();
  });
  svg.addEventListener("pointerleave", () => { cursor = null; plots(); });
}
addEventListener("resize", plots);

// ---- the rest -----------------------------------------------------------------------------------

const row = (name, ...cells) => make("tr", null, make("th", { scope: "row" }, ...[name].flat()), ...cells);
const cell = (text, isNumber) => make("td", isNumber ? { class: "number" } : null, text);

function serves({ settings: s, connected }) {
  const server = (configured, peer, kind) => peer === null ? `${configured} (no connection yet)`
    : `${peer.address === configured ? "" : configured + "; last connection to "}${peer.address}, ${kind} ${peer.version}`;
  return [
    ["slot", s.slot], ["publication", s.publication], ["database", s.database],
    ["Postgres", server(s.postgres, connected.postgres, "PostgreSQL")], ["NATS", server(s.nats, connected.nats, "nats-server")],
    ["subjects", s.prefix + ".>"],
    ["delivery", s.delivery],
    ["hold-back", s.hold_back_seconds === 0 ? "none" : exact(s.hold_back_seconds) + "\u00a0s"],
    ["checkpoint", s.checkpoint === "" ? "none" : "bucket " + s.checkpoint],
  ].map(([name, text]) => row(name, cell(text)));
}
function kept(wal, settings, now) {
  if (!wal) return "not known yet";
  const parts = [];
  if (wal.limit_bytes === null) parts.push("nothing bounds it but the disk: max_slot_wal_keep_size is not set");
  else parts.push(`of ${FORMATS.bytes(wal.limit_bytes)}, by max_slot_wal_keep_size`);
  if (wal.safe_bytes !== null) parts.push(`${FORMATS.bytes(wal.safe_bytes)} more until the slot may be lost`);
  if (wal.status && !["reserved", "extended"].includes(wal.status)) parts.push("wal_status: " + wal.status);
  if (settings.hold_back_seconds > 0) parts.push(`the hold-back keeps the last ${exact(settings.hold_back_seconds)} s`);
  if (now - wal.at > 30000) parts.push("as of " + moment(wal.at, now));
  return parts.join("; ");
}
function warning(line, now) {
  const times = line.times > 1 ? ` (${exact(line.times)} times since ${moment(line.first, now)})` : "";
  const values = line.values ? [make("code", null, line.values)] : [];
  const time = make("time", { datetime: new Date(line.at).toISOString(), title: new Date(line.at).toISOString() }, moment(line.at, now));
  return make("li", { class: line.level }, time, make("b", null, line.level), ` ${line.message}${times}`, ...values);
}
function counter({ name, help, value }) {
  const unit = name.replace(/_total$/, "").endsWith("_bytes") ? FORMATS.bytes : name.endsWith("_seconds") ? FORMATS.seconds : exact;
  let text = value === null ? "–" : typeof value === "object" ? "" : unit(value);
  if (value && typeof value === "object" && "count" in value) {
    text = value.count ? `${FORMATS.seconds(value.sum / value.count)} mean of ${exact(value.count)}` : "–";
  } else if (value && typeof value === "object") {
    const causes = Object.entries(value).filter(([, n]) => n > 0);
    const total = exact(causes.reduce((sum, [, n]) => sum + n, 0));
    text = causes.length ? `${total} (${causes.map(([cause, n]) => `${cause} ${exact(n)}`).join(", ")})` : total;
  }
  return row([help, " ", make("code", null, name)], cell(text, text.length < 30));
}
function state({ ready, doing, since, stuck }, now) {
  const text = stuck ? `stuck: ${stuck}; start it again` : doing;
  $("state").className = ready && !stuck ? "good" : "bad";
  const [head, ...more] = text.split(": ");
  const span = `since ${moment(since, now)} (${duration(Math.max(0, Math.round((now - since) / 1000)))})`;
  $("state").replaceChildren(make("b", null, head), more.length ? ": " + more.join(": ") : "", " ", make("small", null, span));
}

function take(status) {
  const { now, settings: s } = status;
  past = { ...status.history, now };
  document.body.className = "";
  document.title = (status.state.ready ? "" : "⚠ ") + s.slot + " – jetstream-outbox";
  $("who").textContent = `${s.slot} · ${s.database} at ${s.postgres} → ${s.nats}`;
  state(status.state, now);
  plots();
  const lag = status.metrics.find(it => it.name === "lag_seconds").value;
  const value = name => status.metrics.find(it => it.name === name).value;
  $("events_per_second").querySelector("p").textContent = `${exact(value("events_published_total"))} since the start, ${exact(value("events_in_flight"))} in flight`;
  $("lag_bytes").querySelector("p").textContent = lag > 0 ? `the oldest event that waits was committed ${FORMATS.seconds(lag)} ago` : "nothing that has arrived waits";
  const { count, sum } = value("commit_to_ack_seconds");
  $("commit_to_ack_seconds").querySelector("p").textContent = count ? `${FORMATS.seconds(sum / count)} since the start, from a sample` : "no event yet";
  $("slot_wal_bytes").querySelector("p").textContent = kept(status.slot_wal, s, now);
  $("warnings-total").textContent = `${exact(status.warnings.total)} since the start`;
  show("warnings", status.warnings.lines, lines => lines.length ? lines.map(line => warning(line, now)) : ["none"]);
  show("serves", { settings: s, connected: status.connected }, serves);
  show("streams", [status.streams, status.more_streams], ([streams, more]) => [
    ...streams.map(it => row(it.name, cell(exact(it.last_seq), true))),
    ...(streams.length ? [] : [row("none read yet")]),
    ...(more ? [row(`and ${more} more`)] : []),
  ]);
  const isPosition = it => /(_lsn|wal_end)_bytes$/.test(it.name);
  show("positions", status.metrics.filter(isPosition), list => list.map(({ name, help, value }) =>
    row([make("code", null, name.replace(/_bytes$/, "")), " ", make("small", null, help)], cell(value, true))));
  const isCounter = it => !isPosition(it) && !["build_info", "ready"].includes(it.name);
  show("counters", status.metrics.filter(isCounter), list => list.map(counter));
  $("since").textContent = `since ${moment(status.started, now)}`;
  $("footer").textContent = `Version ${status.version}, started ${moment(status.started, now)}. Times are this browser's ` +
    `(${Intl.DateTimeFormat().resolvedOptions().timeZone}); the log's are UTC. Shaded: not ready.`;
}

let answered = null;
async function look() {
  try {
    const response = await fetch("status", { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    if (!response.ok) throw new Error(await response.text());
    take(await response.json());
    answered = Date.now();
  } catch (error) {
    document.body.className = "stale";
    $("state").className = "bad";
    const until = answered === null ? "" : `; what is shown below is from ${clock(answered)}`;
    $("state").replaceChildren(make("b", null, "the relay does not answer"), `: ${error.message}${until}`);
    document.title = "⚠ jetstream-outbox";
  }
  setTimeout(look, INTERVAL_MS);
}
look();
