// Code that the tabs share: a form that starts work and can stop it, and sampling settings.

import { stream } from "./api.js";

export const find = (root, selector) => root.querySelector(selector);

export function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Calls `work(values, signal)` when the form is submitted. Shows an error of `work`. The Stop button stops `work`.
// `enter`: whether Enter alone submits the form. Ctrl + Enter always submits it.
export function form(section, work, { enter = false } = {}) {
  const its = find(section, "form");
  const go = find(its, ".go");
  const stop = find(its, ".stop");
  const error = find(its, ".error");
  let control = null;
  const say = (text) => {
    error.textContent = text;
    error.hidden = !text;
  };
  its.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (control) return;
    control = new AbortController();
    say("");
    go.disabled = true;
    stop.hidden = false;
    section.classList.add("busy");
    try {
      await work(Object.fromEntries(new FormData(its)), control.signal);
    } catch (problem) {
      if (problem.name !== "AbortError") say(problem.message);
    } finally {
      control = null;
      go.disabled = false;
      stop.hidden = true;
      section.classList.remove("busy");
    }
  });
  stop.addEventListener("click", () => control?.abort());
  its.addEventListener("keydown", (event) => {
    const wanted = event.target.tagName === "TEXTAREA" && event.key === "Enter" && !event.isComposing && event.target.name !== "system";
    if (wanted && (event.ctrlKey || event.metaKey || (enter && !event.shiftKey))) {
      event.preventDefault();
      its.requestSubmit();
    }
  });
}

function slider(name, label, note, bounds, value) {
  const shown = make("output", { value });
  const input = make("input", { type: "range", name, ...bounds });
  input.value = value;
  input.addEventListener("input", () => (shown.value = input.value));
  const head = make("span", { className: "with" }, label, shown);
  return make("label", { className: "field" }, head, make("span", { className: "note" }, note), input);
}

export function number(name, label, bounds, value) {
  const input = make("input", { type: "number", name, required: true, ...bounds });
  input.value = value;
  return make("label", { className: "field" }, label, input);
}

// The fields for the seed and for a new seed per answer. `next` returns the seed of the next answer.
export function seeds() {
  const field = number("seed", "Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 }, 0);
  const each = make("input", { type: "checkbox", checked: true });
  const check = make("label", { className: "check" }, each, "a new seed each time");
  const input = find(field, "input");
  input.addEventListener("input", () => (each.checked = false));
  const next = () => {
    if (each.checked) input.value = Math.floor(Math.random() * 1e6);
    return Number(input.value);
  };
  return { element: make("div", { className: "field wide" }, field, check), next };
}

export function sampling(aside, text) {
  const seed = seeds();
  const most = Math.min(200, Math.ceil((text.longest ?? Infinity) / 2), text.max_tokens);
  aside.prepend(
    slider("temperature", "Temperature", "0 always picks the most likely token", { min: 0, max: 2, step: 0.05 }, 0.8),
    slider("top_p", "Top-p", "samples only from the most likely tokens, whose probabilities add up to this value", { min: 0.05, max: 1, step: 0.05 }, 0.95),
    number("max_tokens", "Maximum tokens", { min: 1, max: text.max_tokens, step: 1 }, most),
    seed.element,
  );
  for (const element of aside.querySelectorAll(":scope > label:has(textarea)")) element.classList.add("wide");
  return (values) => ({
    temperature: Number(values.temperature),
    top_p: Number(values.top_p),
    max_tokens: Number(values.max_tokens),
    seed: seed.next(),
  });
}

// Shows an answer's facts, such as tokens and seconds, during generation and at its end.
export class Facts {
  constructor(element, told) {
    this.element = element;
    this.told = told;
    this.began = performance.now();
    this.ends = "";
    element.textContent = "";
  }

  take(item) {
    const finish = item.choices[0]?.finish_reason;
    if (finish) this.ends = finish === "stop" ? "ended by the model" : "ended at the maximum number of tokens";
    if (!item.usage) return;
    const seconds = (performance.now() - this.began) / 1000;
    const tokens = item.usage.completion_tokens;
    const pace = `${(tokens / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} a second`;
    this.show([`${tokens} token${tokens === 1 ? "" : "s"} in ${seconds.toFixed(1)} s, ${pace}`, this.ends, ...this.told]);
  }

  stopped() {
    this.show(["stopped", ...this.told]);
  }

  show(parts) {
    this.element.textContent = parts.filter(Boolean).join(" · ");
  }
}

// Passes an answer's pieces to `say` as they arrive, and the answer's sources to `cite`. Shows the answer's facts.
export async function answered(path, body, signal, facts, say, cite) {
  try {
    for await (const item of stream(path, body, signal)) {
      if (item.sources) cite(item.sources);
      const choice = item.choices[0];
      if (choice) say(choice.text ?? choice.delta.content);
      facts.take(item);
    }
  } catch (error) {
    if (error.name === "AbortError") facts.stopped();
    throw error;
  }
}

export async function copy(button, text) {
  const name = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser blocks copying";
  }
  setTimeout(() => (button.textContent = name), 1500);
}
