// The tab of an image model: shows a grid of images, each with its seed.

import { post } from "./api.js";
import { find, form, make, seeds } from "./work.js";

const ROW = 4; // images per request, so that each row appears as soon as it is generated
const COARSE = 160; // pixels: smaller images are enlarged without smoothing

function picture(drawn, prompt) {
  const name = `${prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "picture"}-${drawn.seed}.png`;
  const image = make("img", { alt: `${prompt}, seed ${drawn.seed}`, src: `data:image/png;base64,${drawn.b64_json}` });
  image.addEventListener("load", () => image.classList.toggle("coarse", image.naturalWidth < COARSE));
  const save = make("a", { href: image.src, download: name }, "save");
  return make("figure", {}, image, make("figcaption", {}, make("span", {}, `seed ${drawn.seed}`), save));
}

export function draw(section, here) {
  const { size, steps, guidance, guidance_interval: interval, guidance_rescale: rescale, most_steps: most } = here.images;
  const aside = find(section, "aside");
  const seed = seeds();
  find(aside, ".seed").replaceWith(seed.element);
  const set = (name, value) => (find(aside, `[name=${name}]`).value = value);
  set("steps", steps);
  set("guidance", guidance);
  set("low", interval[0]);
  set("high", interval[1]);
  set("rescale", rescale);
  set("width", size[0]);
  set("height", size[1]);
  find(aside, "[name=steps]").max = most;
  const grid = find(section, ".pictures");
  const facts = find(section, ".facts");
  form(section, async (values, signal) => {
    const count = Number(values.count);
    const first = seed.next();
    const began = performance.now();
    const options = { steps: Number(values.steps), guidance: Number(values.guidance), size: `${values.width}x${values.height}` };
    options.guidance_interval = [Number(values.low), Number(values.high)];
    options.guidance_rescale = Number(values.rescale);
    if (values.sampler) options.sampler = values.sampler;
    const frames = Array.from({ length: count }, () => make("figure", {}, make("div", { className: "waiting" })));
    grid.replaceChildren(...frames);
    grid.classList.toggle("one", count === 1);
    facts.textContent = "";
    let done = 0;
    try {
      while (done < count) {
        const body = { model: here.model, prompt: values.prompt, n: Math.min(ROW, count - done), seed: first + done, ...options };
        const { data } = await post("/v1/images/generations", body, signal);
        for (const drawn of data) frames[done++].replaceWith(picture(drawn, values.prompt));
      }
    } finally {
      for (const frame of frames.slice(done)) frame.remove();
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    facts.textContent = `${count} picture${count === 1 ? "" : "s"} in ${seconds} s · ${options.steps} steps · ${values.width} × ${values.height} pixels`;
  });
}
