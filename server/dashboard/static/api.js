// Asks the server. A key is sent where the person gave one; it lives in this tab's session storage.

const KEY = "outpace-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function refusal(response) {
  const answer = await response.json().catch(() => null);
  return new Refused(response.status, answer?.error?.message ?? `${response.status} ${response.statusText}`);
}

// The answer as JSON; null for 404, which says that this server has no such thing.
export async function get(path) {
  const response = await fetch(path, { headers: headers(), cache: "no-store" });
  if (response.status === 404) return null;
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// Asks for an operator's action on the experiment; the admin key is kept nowhere.
export async function act(action, key) {
  const options = { method: "POST", headers: key ? { Authorization: `Bearer ${key}` } : {} };
  const response = await fetch(`admin/experiment/${action}`, options);
  if (!response.ok) throw await refusal(response);
}

// Every event of a streamed answer, parsed; returns at its end. An event with an error is thrown.
export async function* stream(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Refused(200, parsed.error.message);
      yield parsed;
    }
  }
}
