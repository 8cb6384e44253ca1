// What the server does: its counters every second, and what they say about the second between.

import { get, Refused } from "./api.js";
import { TimeChart } from "./chart.js";
import * as experiment from "./experiment.js";
import * as shadow from "./shadow.js";

const EVERY_MS = 1000;
const LATENCY_EVERY = 3; // percentiles of a minute move slowly, and merging them costs the server milliseconds
const $ = (id) => document.getElementById(id);

const charts = {
  throughput: new TimeChart("chart-throughput"),
  emitted: new TimeChart("chart-emitted", 2),
  k: new TimeChart("chart-k", 2),
  kv: new TimeChart("chart-kv", 1),
};
const latencies = { ttft: new TimeChart("chart-ttft", 1), itl: new TimeChart("chart-itl", 2) };
const METRICS = { ttft: "Time to first token", itl: "Inter-token", step_gap: "Step gap", tpot: "Per output token", e2e: "End to end", queue: "In the queue" };
let turn = 0;
let before = null; // { time, stats by arm }

const sum = (list) => list.reduce((a, b) => a + b, 0);

// Of every arm: name -> engine's counters. The control's are the server's own.
function statsOf(info) {
  const arms = { control: info.stats };
  for (const [name, arm] of Object.entries(info.arms ?? {})) arms[name] = arm.stats;
  return arms;
}

// Counters of a second: what happened between two readings. An engine that began anew has no before.
function rates(now, then, seconds) {
  if (!then || now.num_steps < then.num_steps) return null;
  const drafted = now.drafted_per_position.map((count, i) => count - (then.drafted_per_position[i] ?? 0));
  const accepted = now.accepted_per_position.map((count, i) => count - (then.accepted_per_position[i] ?? 0));
  const rows = drafted[0] ?? 0; // verify steps of sequences that drafted at all
  return {
    tokens: (now.num_emitted - then.num_emitted) / seconds,
    k: rows ? sum(drafted) / rows : null,
    emitted: rows ? 1 + sum(accepted) / rows : null,
  };
}

function tile(name, value, title = "") {
  const box = document.createElement("div");
  box.title = title;
  const term = box.appendChild(document.createElement("dt"));
  const text = box.appendChild(document.createElement("dd"));
  term.textContent = name;
  text.textContent = value;
  return box;
}

function shown(value, digits = 0, unit = "") {
  return value === null || value === undefined ? "–" : value.toFixed(digits) + unit;
}

function drawTiles(info, all) {
  const stats = Object.values(statsOf(info));
  const total = (field) => sum(stats.map((s) => s[field]));
  const live = Object.values(all).filter((rate) => rate !== null);
  const own = all.control;
  const s = info.stats;
  const kv = s.kv_blocks_total ? (100 * s.kv_blocks_used) / s.kv_blocks_total : 0;
  const realised = info.speculation.paused ? null : info.speculation.realised_speedup;
  $("tiles").replaceChildren(
    tile("Tokens a second", live.length ? shown(sum(live.map((rate) => rate.tokens))) : "–", "over all arms, in the last second"),
    tile("Running", String(total("num_running")), "sequences that are being generated"),
    tile("Waiting", String(total("num_waiting")), "sequences in the queue"),
    tile("Emitted per step", shown(own?.emitted, 2), "tokens that a sequence gained by a verify step with drafts, in the last second"),
    tile("Speed-up by drafts", shown(realised, 2, " ×"), "of the last verify steps over plain decoding, by the cost table"),
    tile("KV cache", shown(kv, 1, " %"), `${s.kv_blocks_used} of ${s.kv_blocks_total} blocks`),
    tile("Engine restarts", String(info.num_engine_restarts)),
  );
}

function drawSpeculation(info) {
  const engine = info.engine;
  if (!engine) return;
  const { paused, reason, since } = info.speculation;
  const what = engine.drafter === "none" ? "No speculation" : `Drafter ${engine.drafter}, up to ${engine.max_draft_tokens} draft tokens`;
  const state = paused ? `; drafting is paused since ${new Date(since * 1000).toLocaleTimeString()}: ${reason}` : "";
  $("speculation").textContent = `${what}${state}. ${engine.architecture} in ${engine.dtype} on ${engine.device}, linear layers: ${engine.linear_path}.`;
}

function drawPositions(stats) {
  const rows = stats.drafted_per_position.map((count, i) => ({ count, share: count ? stats.accepted_per_position[i] / count : 0 }));
  const box = $("positions");
  if (!sum(stats.drafted_per_position)) {
    const none = document.createElement("p");
    none.textContent = "Nothing has been drafted yet.";
    box.replaceChildren(none);
    return;
  }
  box.replaceChildren(
    ...rows.map(({ count, share }, i) => {
      const bar = document.createElement("div");
      bar.className = "bar";
      bar.title = `${count} drafts at position ${i + 1}`;
      const space = bar.appendChild(document.createElement("div"));
      space.className = "bar-box";
      space.append(`${Math.round(100 * share)} %`);
      space.appendChild(document.createElement("i")).style.height = `${share * 4.5}rem`;
      bar.append(String(i + 1));
      return bar;
    }),
  );
}

function drawStatus(state, text) {
  $("status").dataset.state = state;
  $("status-text").textContent = text;
}

function drawModels(info) {
  const names = Object.keys(info.arms ?? {}).length ? [info.model, "control", ...Object.keys(info.arms)] : [info.model];
  const select = $("model");
  if (select.options.length === names.length) return;
  select.replaceChildren(...names.map((name) => new Option(name)));
}

function take(info) {
  const time = Date.now() / 1000;
  const stats = statsOf(info);
  const all = {};
  for (const [name, now] of Object.entries(stats)) {
    all[name] = before ? rates(now, before.stats[name], time - before.time) : null;
  }
  const pick = (field) => Object.fromEntries(Object.entries(all).map(([name, rate]) => [name, rate?.[field] ?? null]));
  charts.throughput.add(time, pick("tokens"));
  charts.emitted.add(time, pick("emitted"));
  charts.k.add(time, pick("k"));
  charts.kv.add(
    time,
    Object.fromEntries(Object.entries(stats).map(([name, s]) => [name, s.kv_blocks_total ? (100 * s.kv_blocks_used) / s.kv_blocks_total : null])),
  );
  before = { time, stats };
  drawTiles(info, all);
  drawSpeculation(info);
  drawPositions(info.stats);
  drawModels(info);
  drawStatus(info.ready ? "ready" : "starting", `${info.model}, ${info.ready ? "ready" : "not ready"}, Outpace ${info.version}`);
}

function milliseconds(seconds) {
  return seconds === null ? null : seconds * 1000;
}

function row(kind, texts) {
  const line = document.createElement("tr");
  for (const text of texts) line.appendChild(document.createElement(kind)).textContent = text;
  return line;
}

// Percentiles of every arm: the last minute as lines, every window that has something as a table.
function takeLatency(stats) {
  const arms = Object.entries(stats.arms);
  for (const [name, chart] of Object.entries(latencies)) {
    const values = {};
    for (const [arm, { latency }] of arms) {
      const found = latency["1m"][name];
      for (const part of ["p50", "p95", "p99"]) {
        values[arms.length > 1 ? `${arm} ${part}` : part] = milliseconds(found[`${part}_s`]);
      }
    }
    chart.add(Date.now() / 1000, values);
  }
  const rows = [];
  for (const [name, title] of Object.entries(METRICS)) {
    for (const [arm, { latency }] of arms) {
      const found = latency[$("window").value][name];
      if (!found?.count) continue;
      const numbers = ["p50_s", "p95_s", "p99_s", "mean_s"].map((part) => shown(milliseconds(found[part]), 2));
      rows.push(row("td", [title, arm, ...numbers, String(found.count)]));
    }
  }
  $("latency-table").replaceChildren(row("th", ["", "Arm", "P50", "P95", "P99", "Mean", "Count"]), ...rows);
  if (rows.length) for (const id of ["latency", "ttft-figure", "itl-figure"]) $(id).hidden = false;
}

export function redraw() {
  for (const chart of [...Object.values(charts), ...Object.values(latencies)]) chart.draw(true);
  experiment.redraw();
}

// Reads once, says what is wrong, and comes again.
export async function watch() {
  try {
    const info = await get("server_info");
    $("key-form").hidden = true;
    take(info);
    if (turn++ % LATENCY_EVERY === 0) {
      const stats = await get("v1/stats");
      takeLatency(stats);
      shadow.show(stats);
      await experiment.show();
    }
  } catch (error) {
    before = null;
    if (error instanceof Refused && error.status === 401) $("key-form").hidden = false;
    drawStatus("failed", error instanceof Refused ? error.message : "the server does not answer");
  }
  setTimeout(watch, EVERY_MS);
}
