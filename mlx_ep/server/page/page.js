// Chat, and what the engine says of itself, twice a second. No other file is loaded.
"use strict";

const $ = (id) => document.getElementById(id);
const POLL_MS = 500;
let key = "";
let messages = [];
let running = null; // AbortController of the answer that comes
let last = null; // the state before: {time, tokens}
let isRecording = false;

const headers = () => {
  const found = { "content-type": "application/json" };
  if (key) found.authorization = `Bearer ${key}`;
  return found;
};

const bytes = (n) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) { n /= 1000; unit += 1; }
  return `${n.toFixed(unit && n < 100 ? 1 : 0)} ${units[unit]}`;
};

function say(kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  $("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      yield JSON.parse(part.slice(6));
    }
  }
}

async function answer() {
  running = new AbortController();
  const body = {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    max_tokens: Number($("most").value),
  };
  const start = performance.now();
  let item = null, thought = null, text = "", first = 0;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      if (delta.reasoning) {
        thought ??= say("thought", "");
        thought.textContent += delta.reasoning;
      }
      if (delta.content) {
        item ??= say("assistant", "");
        first ||= performance.now();
        text += delta.content;
        item.textContent = text;
        item.scrollIntoView({ block: "end" });
      }
      if (event.usage) {
        const seconds = (performance.now() - (first || start)) / 1000;
        const count = event.usage.completion_tokens;
        const rate = count > 1 && seconds > 0 ? (count - 1) / seconds : 0;
        $("speed").textContent =
          `${count} tokens, ${rate.toFixed(1)} tokens/s, first after ` +
          `${((first || performance.now()) - start).toFixed(0)} ms`;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") say("failed", error.message);
  }
  if (text) messages.push({ role: "assistant", content: text });
  running = null;
  $("stop").hidden = true;
  $("send").disabled = false;
}

function number(name, value) {
  const box = document.createElement("div");
  const [term, what] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = name;
  what.textContent = value;
  box.append(term, what);
  return box;
}

function show(state) {
  const now = performance.now() / 1000;
  let rates = [0, 0];
  if (last && now > last.time)
    rates = state.tokens.map((n, i) => (n - last.tokens[i]) / (now - last.time));
  last = { time: now, tokens: state.tokens };
  const reason = state.failed || (state.draining ? "draining" : "");
  $("model").textContent = state.model;
  $("health").textContent = reason || "serving";
  $("health").className = reason ? "bad" : "good";
  $("numbers").replaceChildren(
    number("generated tokens/s", rates[1].toFixed(1)),
    number("prompt tokens/s", rates[0].toFixed(0)),
    number("steps", state.steps),
    number("running", state.running),
    number("waiting", state.waiting),
    number("attention", state.attention),
    number("context", state.context),
    number("prefix cache", bytes(state.cache_bytes)),
    number("its hits, tokens", state.cache_hits),
  );
  $("memory").replaceChildren(...state.ranks.map((rank) => {
    const box = document.createElement("div");
    const bar = document.createElement("progress");
    bar.max = rank.kv_limit || 1;
    bar.value = rank.kv_used;
    box.append(
      `rank ${rank.rank}: ${bytes(rank.memory)}; KV ${bytes(rank.kv_used)} of ` +
      `${bytes(rank.kv_limit)}, ${rank.active} active`, bar);
    return box;
  }));
  draw(state.experts);
}

// Each layer's load of each rank over the layer's mean: 1 is even.
function draw(layers) {
  const canvas = $("load");
  canvas.hidden = !layers.length;
  if (!layers.length) {
    $("load-text").textContent = "Nothing is recorded.";
    return;
  }
  const ranks = layers[0].length;
  const [width, height] = [Math.max(440 / ranks, 4), Math.max(Math.min(24, 480 / layers.length), 4)];
  canvas.width = width * ranks;
  canvas.height = height * layers.length;
  const context = canvas.getContext("2d");
  let worst = 1;
  layers.forEach((row, layer) => {
    const mean = row.reduce((a, b) => a + b, 0) / ranks || 1;
    row.forEach((rows, rank) => {
      const share = rows / mean;
      worst = Math.max(worst, share);
      const heat = Math.min(share / 2, 1); // even is half way
      context.fillStyle = `hsl(${(1 - heat) * 220} 70% 50%)`;
      context.fillRect(rank * width, layer * height, width - 1, height - 1);
      if (width > 40 && height > 14) {
        context.fillStyle = "#fff";
        context.font = "11px system-ui";
        context.fillText(share.toFixed(2), rank * width + 6, layer * height + height / 2 + 4);
      }
    });
  });
  $("load-text").textContent =
    `${layers.length} layers, ${ranks} ranks; the busiest has ${worst.toFixed(2)} x the mean`;
}

async function poll() {
  try {
    const response = await fetch("/v1/state", { headers: headers() });
    $("access").hidden = response.status !== 401;
    if (response.ok) show(await response.json());
    else {
      $("health").textContent = response.status === 401 ? "needs an API key" : `error ${response.status}`;
      $("health").className = "bad";
    }
  } catch {
    $("health").textContent = "not reachable";
    $("health").className = "bad";
  }
  setTimeout(poll, POLL_MS);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  messages.push({ role: "user", content: text });
  say("user", text);
  $("text").value = "";
  $("stop").hidden = false;
  $("send").disabled = true;
  answer();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("forget").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("messages").replaceChildren();
});
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value; // in this page only: it is kept nowhere
});
$("record").addEventListener("click", async () => {
  const action = isRecording ? "stop" : "start";
  const response = await fetch(`/v1/expert_distribution/${action}`, { method: "POST", headers: headers() });
  if (!response.ok) return;
  isRecording = !isRecording;
  $("record").textContent = isRecording ? "Stop" : "Record";
});
poll();
