// The tabs of a language model: write, complete, chat.

import { Facts, answered, copy, find, form, make, sampling } from "./work.js";

function continuation(section, here, read) {
  const options = sampling(find(section, "aside"), here.text);
  const result = find(section, ".result");
  const [given, made, behind] = ["given", "made", "behind"].map((name) => find(result, `.${name}`));
  form(section, async (values, signal) => {
    const { prompt, suffix } = read(values);
    const sampled = options(values);
    given.textContent = prompt;
    made.textContent = "";
    if (behind) behind.textContent = suffix;
    result.hidden = false;
    const facts = new Facts(find(result, ".facts"), [`seed ${sampled.seed}`]);
    const body = { model: here.model, prompt, ...(suffix ? { suffix } : {}), ...sampled };
    await answered("/v1/completions", body, signal, facts, (piece) => made.append(piece));
  });
  const whole = () => given.textContent + made.textContent + (behind?.textContent ?? "");
  find(result, ".copy").addEventListener("click", (event) => copy(event.target, whole()));
  return whole;
}

export function write(section, here) {
  const whole = continuation(section, here, (values) => ({ prompt: values.prompt, suffix: "" }));
  find(section, ".on").addEventListener("click", () => {
    find(section, "[name=prompt]").value = whole();
    find(section, "form").requestSubmit();
  });
}

export function complete(section, here) {
  continuation(section, here, (values) => {
    if (!values.suffix) throw new Error("The text after the gap is empty. Add this text, or use the tab Write.");
    return { prompt: values.prefix, suffix: values.suffix };
  });
}

export function chat(section, here) {
  const options = sampling(find(section, "aside"), here.text);
  const talk = find(section, ".talk");
  const box = find(section, "[name=message]");
  let turns = [];
  const shown = (role, text) => {
    const turn = make("div", { className: `turn ${role}` }, make("span", { className: "made" }, text));
    talk.append(turn);
    find(section, ".empty").hidden = true;
    turn.scrollIntoView({ block: "nearest" });
    return turn;
  };
  form(section, async (values, signal) => {
    if (!values.message.trim()) throw new Error("The message is empty.");
    const sampled = options(values);
    const asked = [...turns, { role: "user", content: values.message }];
    const system = values.system.trim() ? [{ role: "system", content: values.system }] : [];
    const mine = shown("user", values.message);
    box.value = "";
    const turn = shown("assistant", "");
    const told = make("p", { className: "facts" });
    turn.append(told);
    let text = "";
    try {
      const body = { model: here.model, messages: [...system, ...asked], ...sampled };
      await answered("/v1/chat/completions", body, signal, new Facts(told, [`seed ${sampled.seed}`]), (piece) => {
        text += piece;
        find(turn, ".made").append(piece);
        turn.scrollIntoView({ block: "nearest" });
      });
    } catch (error) {
      if (error.name !== "AbortError") {
        mine.remove();
        turn.remove();
        box.value = values.message;
        throw error;
      }
    }
    turns = [...asked, { role: "assistant", content: text }];
  }, { enter: true });
  find(section, ".clear").addEventListener("click", () => {
    find(section, ".stop").click();
    turns = [];
    talk.replaceChildren();
    find(section, ".empty").hidden = false;
  });
}
