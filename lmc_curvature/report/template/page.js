"use strict";
// Puts the page together: the charts of the pair that is shown, its picker, and what is there of an experiment.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const config = (isDeep) => ({ responsive: true, displaylogo: false, modeBarButtons: [["toImage", isDeep ? "resetCameraDefault3d" : "resetScale2d"]] });
  const font = { family: "system-ui, DejaVu Sans, sans-serif", size: 13, color: "#6b747d" };

  function look() {
    const axis = () => ({ automargin: true, zeroline: true, exponentformat: "e", title: { standoff: 8 } });
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font, height: 400, margin: { l: 60, r: 15, t: 30, b: 50 },
      hovermode: "x unified", modebar: { bgcolor: "rgba(0,0,0,0)", color: "#808890", activecolor: "#0072B2" }, hoverlabel: { bgcolor: "#1b1f24", bordercolor: "#1b1f24", font: { color: "#ffffff" } },
      legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom" }, xaxis: axis(), yaxis: axis(), title: { font: { size: 15 }, x: 0, xref: "paper" },
    };
  }

  function merged(base, more) {
    for (const [key, value] of Object.entries(more)) base[key] = isObject(value) && isObject(base[key]) ? merged(base[key], value) : value;
    return base;
  }

  function draw(name, chart, label) {
    const place = find(name) && find(name).classList.contains("plot") ? find(name) : document.querySelector(`[data-chart="${name}"]`);
    place.setAttribute("aria-label", label || chart.label);
    const layout = merged(look(), chart.layout);
    if (chart.data.some((trace) => trace.type === "heatmap" || trace.type === "surface")) layout.hovermode = "closest";
    narrow(layout, chart.data);
    const isDeep = chart.data.some((trace) => trace.type === "surface" || trace.type === "scatter3d");
    // A chart of few layers is lower than others.
    place.style.minHeight = `${layout.height}px`;
    return Plotly.react(place, chart.data, layout, config(isDeep)).then(() => keepForPrint(place, isDeep));
  }

  // On a narrow page names of layers, legends and charts side by side would leave no room for what they are of.
  function narrow(layout, data) {
    if (innerWidth > 600) return;
    layout.title.text = "";
    for (const key of ["xaxis", "yaxis"]) {
      const axis = layout[key], names = data[0][key[0]];
      if (!axis || axis.type !== "category" || data[0].type === "heatmap" && !names.some(isNaN)) continue;
      const shown = (name) => (key === "xaxis" ? "" : name.length > 15 ? `…${name.slice(-14)}` : name);
      Object.assign(axis, { tickvals: names, ticktext: names.map(shown), tickfont: { size: 10 } });
    }
    for (const trace of data) if (trace.colorbar) Object.assign(trace.colorbar, { thickness: 10, x: 1.01 });
    if (layout.grid) Object.assign(layout, { grid: { ...layout.grid, rows: 4, columns: 1 }, height: 900, xaxis3: {} });
    if (layout.scene) Object.assign(layout, { height: 400, scene: { ...layout.scene, camera: { eye: { x: 1.7, y: -1.9, z: 0.9 } } } });
    if (data.length > 8 && !layout.grid) layout.height = 600;
  }

  // A canvas of WebGL prints as nothing: an image of it is kept for that, once the chart has stopped changing.
  const timers = new Map();
  function keepForPrint(place, isDeep) {
    clearTimeout(timers.get(place));
    place.classList.remove("has-print");
    const old = place.parentElement.querySelector(".printed");
    if (old) old.remove();
    if (isDeep) timers.set(place, setTimeout(() => keepImage(place), 800));
  }

  async function keepImage(place) {
    const image = document.createElement("img");
    image.className = "printed";
    image.alt = place.getAttribute("aria-label");
    image.src = await Plotly.toImage(place, { format: "png", width: 900, height: 560, scale: 1.5 });
    place.after(image);
    place.classList.add("has-print");
  }

  function showCharts(charts) {
    for (const name of ["curves", "errors", "layers", "agreement"]) {
      const figure = document.querySelector(`[data-figure="${name}"]`);
      if (!figure) continue;
      const section = figure.closest(`[data-needs="${name}"]`);
      figure.hidden = !charts[name];
      if (section) section.hidden = !charts[name];
      if (charts[name]) draw(name, charts[name]);
    }
  }

  function drawInteractions(record) {
    const number = Number(find("anchor").value), matrix = record.cube.curvatures[number];
    const z = matrix.map((row) => row.map((value) => value / 8)), most = Math.max(...z.flat().map(Math.abs), 1e-300);
    const names = record.layers.map((name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;"));
    const chart = {
      data: [{ type: "heatmap", x: names, y: names, z, zmin: -most, zmax: most, colorscale: [[0, "#0072B2"], [0.5, "#f4f4f4"], [1, "#D55E00"]], xgap: 1, ygap: 1,
        hovertemplate: "%{y}, %{x}: %{z:.4g}<extra></extra>", colorbar: { exponentformat: "e" } }],
      layout: { height: 220 + 22 * names.length, xaxis: { type: "category", tickangle: -60, dtick: 1 },
        yaxis: { type: "category", autorange: "reversed", dtick: 1 } },
    };
    const total = z.flat().reduce((a, b) => a + b, 0);
    draw("interactions", chart, `Interactions between ${names.length} layers, which sum to ${picker.number(total)}`);
  }

  function showPicker(record) {
    for (const section of document.querySelectorAll('[data-needs="picker"]')) section.hidden = !record;
    if (!record) return;
    picker.show(record);
    const positions = record.cube.positions;
    find("anchor").replaceChildren(...positions.map((position, number) => {
      const option = document.createElement("option");
      option.value = number;
      option.textContent = number === 0 ? "A" : number === positions.length - 1 ? "B" : `α = ${picker.number(position)}`;
      return option;
    }));
    drawInteractions(record);
  }

  function show(number) {
    for (const part of document.querySelectorAll("[data-pair]")) part.hidden = Number(part.dataset.pair) !== number;
    for (const row of document.querySelectorAll("[data-row]")) row.classList.toggle("current", Number(row.dataset.row) === number);
    if (find("pair")) find("pair").value = String(number);
    showPicker(data.pairs[number].picker);
    showCharts(data.pairs[number].charts);
    current = number;
  }

  let current = 0;
  if (data.pairs.some((pair) => pair.picker)) {
    picker.start(draw);
    find("anchor").addEventListener("change", () => drawInteractions(data.pairs[current].picker));
  }
  if (data.pairs.length) show(0);
  if (find("pair")) find("pair").addEventListener("change", (event) => show(Number(event.target.value)));
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => { show(Number(button.dataset.show)); find("answer").focus(); });
  }
  data.spectra.forEach((chart, number) => draw(`spectrum-${number}`, chart));
  if (data.experiment) {
    experiment.start(data.experiment, draw);
    for (const [name, chart] of Object.entries(data.experiment.charts)) draw(name, chart);
  }
  // Paper is narrower than most windows, and charts do not follow by themselves.
  const drawn = () => [...document.querySelectorAll(".js-plotly-plot")].filter((place) => place.offsetParent);
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    for (const place of drawn()) Plotly.relayout(place, { width: place.clientWidth });
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    for (const place of drawn()) Plotly.relayout(place, { width: null, autosize: true });
  });
  document.documentElement.dataset.ready = "yes";
})();
