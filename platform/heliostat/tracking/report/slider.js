for (const series of document.querySelectorAll("figure.series")) {
  const shots = [...series.querySelectorAll(".shot")];
  if (shots.length < 2) continue;
  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: shots.length - 1, step: 1 });
  slider.setAttribute("aria-label", "step");
  const show = () => {
    shots.forEach((shot, i) => (shot.hidden = i !== Number(slider.value)));
    slider.setAttribute("aria-valuetext", shots[slider.value].querySelector("p").textContent);
  };
  slider.value = shots.length - 1;
  slider.addEventListener("input", show);
  series.querySelector("figcaption").after(slider);
  show();
}
