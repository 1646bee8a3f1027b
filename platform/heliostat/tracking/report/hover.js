for (const chart of document.querySelectorAll("figure.chart[data-curves]")) {
  const plot = chart.querySelector(".plot");
  const curves = JSON.parse(chart.dataset.curves);
  const [first, last] = chart.dataset.range.split(" ").map(Number);
  const line = document.createElement("div"), tip = document.createElement("div");
  line.className = "at";
  tip.className = "tip";
  plot.append(line, tip);

  const nearest = (points, x) => {
    let a = 0, b = points.length - 1;
    while (b - a > 1) {
      const middle = (a + b) >> 1;
      if (points[middle][0] < x) a = middle;
      else b = middle;
    }
    return Math.abs(points[a][0] - x) <= Math.abs(points[b][0] - x) ? points[a] : points[b];
  };

  const row = (text, ink) => {
    const made = document.createElement("div");
    if (ink !== undefined) made.append(Object.assign(document.createElement("i"), { className: "ink" + (ink % 6) }));
    made.append(text);
    return made;
  };

  const show = (event) => {
    const place = plot.getBoundingClientRect();
    const x = first + ((event.clientX - place.left) / place.width) * (last - first);
    const found = curves.map((curve) => nearest(curve.points, x));
    const step = found.map((point) => point[0]).reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    const share = (step - first) / (last - first);
    line.style.left = 100 * share + "%";
    const rows = curves.map((curve, i) => {
      const at = found[i][0] === step ? "" : " (step " + found[i][0].toLocaleString("en") + ")";
      return row(curve.name + " " + Number(found[i][1].toPrecision(6)) + at, i);
    });
    tip.replaceChildren(row("step " + step.toLocaleString("en")), ...rows);
    tip.style.left = share < 0.5 ? "calc(" + 100 * share + "% + 10px)" : "";
    tip.style.right = share < 0.5 ? "" : "calc(" + 100 * (1 - share) + "% + 10px)";
    plot.classList.add("shown");
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => plot.classList.remove("shown"));
}
