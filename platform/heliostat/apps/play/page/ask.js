// The tab of an index: shows passages with their sources, and the model's answer from them.

import { post } from "./api.js";
import { Facts, answered, find, form, make } from "./work.js";

const MODES = { bm25: "by words (BM25)", dense: "by meaning", hybrid: "both" };
const USED = { whole: "the model has read it", part: "the model has read its beginning", no: "the model has no room for it, and hasn't read it" };

function source(passage, number) {
  const title = make("h3", {}, make("b", {}, `[${number}]`), ` ${passage.document}`);
  const url = passage.columns.url;
  if (/^https?:\/\//.test(url ?? "")) title.append(" ", make("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, url));
  const scores = [`${passage.scored_by} score ${passage.score.toPrecision(4)}`];
  if ("rerank_score" in passage)
    scores.unshift(`rerank score${passage.rerank_cut ? " of its beginning" : ""} ${passage.rerank_score.toPrecision(4)}`);
  const place = `${scores.join(" · ")} · passage ${passage.number}, characters ${passage.begin} to ${passage.end} · ` +
    `${passage.shard}, row group ${passage.row_group}`;
  const made = make("article", { className: `card source ${passage.used ?? ""}` }, title);
  if (passage.used) made.append(make("p", {}, make("span", { className: `badge ${passage.used}` }, USED[passage.used])));
  const text = make("p", { className: "text" }, passage.text.trim());
  const more = make("button", { type: "button", className: "small", hidden: true }, "All of it");
  more.addEventListener("click", () => (more.textContent = made.classList.toggle("open") ? "Less" : "All of it"));
  made.append(text, more, make("p", { className: "facts" }, place));
  return made;
}

export function ask(section, here) {
  const told = here.passages;
  find(section, "[name=mode]").append(...told.modes.map((mode) => make("option", { value: mode }, MODES[mode])));
  find(section, "[name=top]").max = told.most;
  find(section, ".only-answers").hidden = !told.answers;
  if (told.answers) find(section, "[name=max_tokens]").max = here.text.max_tokens;
  const result = find(section, ".result");
  const answer = find(result, ".made");
  const list = find(section, ".sources");
  const show = (found) => {
    list.replaceChildren(...found.map((passage, i) => source(passage, i + 1)));
    for (const one of list.children) find(one, "button").hidden = find(one, ".text").scrollHeight <= find(one, ".text").clientHeight;
  };
  form(section, async (values, signal) => {
    if (!values.question.trim()) throw new Error("The question is empty.");
    const asked = { mode: values.mode, top: Number(values.top) };
    result.hidden = true;
    list.replaceChildren();
    if (!told.answers) {
      const { data } = await post("/v1/search", { query: values.question, ...asked }, signal);
      if (!data.length) throw new Error("No passage has a word of the question.");
      show(data);
      return;
    }
    answer.textContent = "";
    const facts = new Facts(find(result, ".facts"), []);
    const messages = [{ role: "user", content: values.question }];
    const body = { model: here.index, messages, max_tokens: Number(values.max_tokens), ...asked };
    const cite = (sources) => {
      result.hidden = false;
      show(sources);
    };
    let text = "";
    const say = (piece) => (answer.textContent = (text += piece).trimStart());
    await answered("/v1/chat/completions", body, signal, facts, say, cite);
  }, { enter: true });
}
