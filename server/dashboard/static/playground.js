// A chat that shows which text was drafted, and how fast it is with and without drafts.

import { stream } from "./api.js";

const $ = (id) => document.getElementById(id);
let running = null;

function show(box, pieces) {
  for (const { text, accepted } of pieces) {
    const last = box.lastChild;
    const same = last && (last.nodeName === "MARK") === accepted;
    if (same) {
      last.textContent += text;
    } else if (accepted) {
      const mark = document.createElement("mark");
      mark.className = "accepted";
      mark.textContent = text;
      box.append(mark);
    } else {
      box.append(text);
    }
  }
}

// One answer into `name`'s box: its text, tokens and tokens a second after the first chunk.
async function answer(name, speculate, body, signal) {
  const box = $(name);
  const rate = $(`${name}-rate`);
  box.replaceChildren();
  rate.textContent = "…";
  const asked = performance.now();
  let first = null;
  let usage = null;
  let metrics = null;
  const speculative = speculate ? { annotate: true, metrics: "summary" } : { enabled: false, annotate: true };
  for await (const chunk of stream("v1/chat/completions", { ...body, speculative }, signal)) {
    const choice = chunk.choices[0];
    const pieces = choice?.draft_annotations ?? [];
    if (pieces.length) {
      first ??= performance.now();
      show(box, pieces);
    }
    usage = chunk.usage ?? usage;
    metrics = chunk.metrics ?? metrics;
  }
  const seconds = (performance.now() - first) / 1000;
  const tokens = usage?.completion_tokens ?? 0;
  const speed = first && tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
  const perStep = metrics?.speculative_decoding?.mean_acceptance_length;
  const parts = [`${tokens} tokens`];
  if (first) parts.push(`first after ${Math.round(first - asked)} ms`);
  if (speed) parts.push(`${speed.toFixed(1)} tokens a second`);
  if (perStep) parts.push(`${perStep.toFixed(2)} per step with drafts`);
  rate.textContent = parts.join(", ");
  return { text: box.textContent, speed };
}

async function play(event) {
  event.preventDefault();
  running = new AbortController();
  const compare = $("compare").checked;
  $("send").disabled = true;
  $("stop").disabled = false;
  $("without-box").hidden = !compare;
  $("verdict").textContent = "";
  $("verdict").classList.remove("error");
  for (const name of ["with", "without"]) {
    $(name).replaceChildren();
    $(`${name}-rate`).textContent = "";
  }
  const body = {
    model: $("model").value || undefined,
    messages: [{ role: "user", content: $("prompt").value }],
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    seed: Math.floor(Math.random() * 2 ** 31),
    stream: true,
    stream_options: { include_usage: true },
  };
  try {
    const fast = await answer("with", true, body, running.signal);
    if (compare) {
      // One after the other: side by side they would slow each other down.
      const plain = await answer("without", false, body, running.signal);
      const ratio = fast.speed && plain.speed ? `${(fast.speed / plain.speed).toFixed(2)} × the speed, ` : "";
      $("verdict").textContent = ratio + (fast.text === plain.text ? "the same text." : "another text: rounding differs here (see the documentation on ties).");
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    $("verdict").textContent = stopped ? "Stopped." : error.message;
    $("verdict").classList.toggle("error", !stopped);
  } finally {
    $("send").disabled = false;
    $("stop").disabled = true;
    running = null;
  }
}

export function start() {
  $("play").addEventListener("submit", play);
  $("stop").addEventListener("click", () => running?.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) $("play").requestSubmit();
  });
}
