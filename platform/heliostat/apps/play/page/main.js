// Opens the page: reads the key, requests the abilities, and shows the tabs that they support.

import { get, keepKey, takeKey } from "./api.js";
import { ask } from "./ask.js";
import { draw } from "./draw.js";
import { chat, complete, write } from "./text.js";
import { find, make } from "./work.js";

const TABS = {
  write: ["Write", write, "continues a text"],
  complete: ["Complete", complete, "completes code"],
  chat: ["Chat", chat, "chats"],
  draw: ["Draw", draw, "draws pictures"],
  ask: ["Ask", ask, "answers from documents"],
};
const GIVEN = ["write", "complete", "draw"]; // tabs whose fields begin with a prompt

function about(here) {
  const can = here.tabs.map((name) => TABS[name][2]).join(", ");
  const told = [can[0].toUpperCase() + can.slice(1)];
  if (here.version !== here.model && here.model) told.push(here.version);
  if (here.text) told.push(here.text.longest ? `up to ${here.text.longest.toLocaleString("en")} tokens` : "any number of tokens");
  if (here.images) told.push(`draws images of ${here.images.size.join(" × ")} pixels`);
  if (here.index) {
    const { documents, passages } = here.passages;
    told.push(`index ${here.index}: ${documents.toLocaleString("en")} documents in ${passages.toLocaleString("en")} passages`);
  }
  return told.join(" · ");
}

function select(names, chosen) {
  for (const name of names) {
    const tab = document.getElementById(`tab-${name}`);
    tab.setAttribute("aria-selected", name === chosen);
    tab.tabIndex = name === chosen ? 0 : -1;
    document.getElementById(name).hidden = name !== chosen;
  }
  history.replaceState(null, "", `#${chosen}`);
}

// Fills a tab's fields. `prompt` gets the model's own prompt, if the model has one. All other fields get the page's example.
function fill(section, prompt) {
  for (const field of section.querySelectorAll(".work textarea")) {
    field.value = (field.name === "prompt" && prompt) || field.placeholder;
  }
}

function tabs(here) {
  const names = here.tabs;
  const list = document.getElementById("tabs");
  for (const name of names) {
    const [label, start] = TABS[name];
    const section = document.getElementById(name);
    const tab = make("button", { type: "button", id: `tab-${name}`, role: "tab" }, label);
    tab.setAttribute("aria-controls", name);
    tab.addEventListener("click", () => select(names, name));
    section.setAttribute("aria-labelledby", tab.id);
    list.append(tab);
    start(section, here);
    if (GIVEN.includes(name)) fill(section, here.prompt);
  }
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = names.findIndex((name) => !document.getElementById(name).hidden);
    const next = names[(at + step + names.length) % names.length];
    select(names, next);
    document.getElementById(`tab-${next}`).focus();
  });
  const wanted = location.hash.slice(1);
  select(names, names.includes(wanted) ? wanted : names[0]);
}

async function open() {
  const door = document.getElementById("door");
  try {
    const here = await get("/abilities");
    door.hidden = true;
    document.getElementById("name").textContent = here.model ?? here.index;
    document.title = `${here.model ?? here.index} · heliostat model play`;
    document.getElementById("about").textContent = about(here);
    tabs(here);
  } catch (error) {
    const again = !door.hidden || error.status !== 401;
    door.hidden = false;
    const place = find(door, ".error");
    place.textContent = error.message;
    place.hidden = !again;
    find(door, "input").focus();
  }
}

document.getElementById("door").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(find(event.target, "input").value.trim());
  open();
});
takeKey();
open();
