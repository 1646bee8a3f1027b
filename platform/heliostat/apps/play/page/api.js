// Sends requests to the endpoint, with the key that this browser tab stores.

const KEPT = "heliostat-key";

export function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem(KEPT, given);
    history.replaceState(null, "", location.pathname); // so that no bookmark contains the key
  }
}

export const keepKey = (key) => sessionStorage.setItem(KEPT, key);

async function fetched(path, body, signal) {
  const key = sessionStorage.getItem(KEPT);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("heliostat model play does not answer; is it still running?");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw Object.assign(new Error(told?.error?.message ?? `the answer has status ${response.status}`), { status: response.status });
  }
  return response;
}

export const get = async (path) => (await fetched(path)).json();
export const post = async (path, body, signal) => (await fetched(path, body, signal)).json();

// Yields the objects of an event stream. Throws an error if the stream contains an error, or ends before [DONE].
export async function* stream(path, body, signal) {
  const response = await fetched(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer ended too early");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const item = JSON.parse(data);
      if (item.error) throw new Error(item.error.message);
      yield item;
    }
  }
}
