"use strict";
// Ridges in three dimensions, and maps of layers over epochs, with forks and epochs to choose.
const experiment = (() => {
  const find = (id) => document.getElementById(id);
  const VERMILION = "#D55E00", GREY = "#808890", DECADES = 4;
  let known = null, draw = null;

  function fill(select, entries, chosen) {
    select.replaceChildren(...entries.map(([value, text]) => {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = text;
      return option;
    }));
    const values = entries.map(([value]) => String(value));
    select.value = values.includes(String(chosen)) ? String(chosen) : values[0];
  }

  const quantity = () => known.ridges[Number(find("ridge-quantity").value)];

  function fillRows() {
    const forks = quantity().forks, epochs = [...new Set(forks.flatMap((each) => each.epochs))].sort((a, b) => a - b);
    const shared = epochs.filter((epoch) => forks.filter((each) => each.epochs.includes(epoch)).length > 1);
    const entries = forks.map((each) => [`fork ${each.fork}`, `epochs of fork ${each.fork}`]);
    if (forks.length > 1) entries.push(...shared.reverse().map((epoch) => [`epoch ${epoch}`, `forks, at epoch ${epoch}`]));
    fill(find("ridge-rows"), entries, find("ridge-rows").value);
    fillRange();
  }

  // The rows to choose from: [what it is, its curve].
  function allRows() {
    const [kind, value] = find("ridge-rows").value.split(" "), forks = quantity().forks;
    if (kind === "fork") {
      const fork = forks.find((each) => String(each.fork) === value);
      return { what: "epoch", alphas: fork.alphas, rows: fork.epochs.map((epoch, k) => [epoch, fork.heights[k]]) };
    }
    const some = forks.filter((each) => each.epochs.includes(Number(value)));
    return { what: "fork", alphas: some[0].alphas, rows: some.map((each) => [each.fork, each.heights[each.epochs.indexOf(Number(value))]]) };
  }

  function fillRange() {
    const { what, rows } = allRows(), entries = rows.map(([row]) => [row, `${what} ${row}`]);
    fill(find("ridge-from"), entries, rows[0][0]);
    fill(find("ridge-to"), entries, rows[rows.length - 1][0]);
  }

  function drawRidges() {
    const { what, alphas, rows } = allRows(), from = Number(find("ridge-from").value), to = Number(find("ridge-to").value);
    const some = rows.filter(([row]) => row >= Math.min(from, to) && row <= Math.max(from, to));
    const log = find("ridge-log").checked, title = quantity().title;
    const heights = some.map(([, curve]) => curve.map((value) => (log && !(value > 0) ? null : value)));
    const places = some.map(([row], k) => (what === "fork" ? k : row)), names = some.map(([row]) => String(row));
    const tops = some.map(([row, curve]) => `${what} ${row}: ${picker.number(Math.max(...curve))}`);
    const label = `${title}; highest along α at ${tops[0]}, at ${tops[tops.length - 1]}`;
    const ticks = what === "fork" ? { tickvals: places, ticktext: names } : {};
    const left = log ? " (log scale; what is not above zero is left out)" : "";
    if (find("ridge-flat").checked) {
      const z = log ? heights.map((row) => row.map((value) => (value === null ? null : Math.log10(value)))) : heights;
      const data = [{ type: "heatmap", x: alphas, y: places, z, customdata: heights, colorscale: "Viridis", hovertemplate: `α %{x:.3g}, ${what} %{y}: %{customdata:.4g}<extra></extra>`, colorbar: { title: { text: log ? "log₁₀" : "" } } }];
      draw("ridges", { data, layout: { height: 480, title: { text: title + left }, xaxis: { title: { text: "α" } }, yaxis: { title: { text: what }, ...ticks } } }, label);
      return;
    }
    const data = some.length > 1 ? [{ type: "surface", x: alphas, y: places, z: heights, opacity: 0.75, colorscale: "Viridis", showscale: false, hoverinfo: "skip", connectgaps: false }] : [];
    some.forEach(([row], k) => data.push({
      type: "scatter3d", mode: "lines", x: alphas, y: alphas.map(() => places[k]), z: heights[k], showlegend: false, name: `${what} ${row}`,
      line: { color: k === some.length - 1 ? VERMILION : GREY, width: k === some.length - 1 ? 7 : 3 },
      hovertemplate: `α %{x:.3g}, ${what} ${row}: %{z:.4g}<extra></extra>`,
    }));
    const axis = { color: GREY, gridcolor: "rgba(128,136,144,0.35)", backgroundcolor: "rgba(0,0,0,0)", zerolinecolor: GREY };
    const scene = {
      xaxis: { ...axis, title: { text: "α" } }, yaxis: { ...axis, title: { text: what }, ...ticks },
      zaxis: { ...axis, title: { text: quantity().value ? title.split(",")[0] : "barrier" }, type: log ? "log" : "linear" },
      camera: { eye: { x: 1.15, y: -1.3, z: 0.55 }, center: { x: 0, y: 0, z: -0.12 } }, aspectratio: { x: 1, y: 1.2, z: 0.75 },
    };
    draw("ridges", { data, layout: { height: 560, title: { text: title + left }, margin: { l: 0, r: 0, t: 40, b: 0 }, scene } }, label);
  }

  function drawMap() {
    const { title, forks } = known.maps[Number(find("map-quantity").value)];
    fill(find("map-fork"), forks.map((each) => [each.fork, each.fork]), find("map-fork").value);
    const map = forks.find((each) => String(each.fork) === find("map-fork").value);
    const most = Math.max(...map.values.flat().filter((value) => value !== null), 1e-300), low = Math.log10(most) - DECADES;
    const z = map.values.map((row) => row.map((value) => (value === null ? null : value > 0 ? Math.max(Math.log10(value), low) : low)));
    const tickvals = Array.from({ length: DECADES + 1 }, (_, k) => low + k);
    const ticktext = tickvals.map((each, k) => `${k ? "" : "≤ "}${picker.number(10 ** each, 2)}`);
    const data = [{
      type: "heatmap", x: map.epochs.map(String), y: map.layers, z, customdata: map.values, zmin: low, zmax: low + DECADES, colorscale: "Viridis", xgap: 1, ygap: 1,
      hovertemplate: "%{y}, epoch %{x}: %{customdata:.4g}<extra></extra>", colorbar: { tickvals, ticktext },
    }];
    const layout = {
      height: 150 + 22 * map.layers.length, title: { text: `${title}, fork at epoch ${map.fork}` }, plot_bgcolor: "rgba(128,136,144,0.25)",
      xaxis: { title: { text: "epoch" }, type: "category" }, yaxis: { autorange: "reversed", type: "category", automargin: true, dtick: 1 },
    };
    let top = [-Infinity, "", 0];
    map.values.forEach((row, i) => row.forEach((value, j) => { if (value !== null && value > top[0]) top = [value, map.layers[i], map.epochs[j]]; }));
    draw("maps", { data, layout }, `${title} of every layer, fork ${map.fork}; highest ${picker.number(top[0])}, of ${top[1]} at epoch ${top[2]}`);
  }

  return {
    start(record, drawing) {
      known = record;
      draw = drawing;
      fill(find("ridge-quantity"), known.ridges.map((each, k) => [k, each.title]), 0);
      fillRows();
      const preferLog = () => { find("ridge-log").checked = quantity().value && quantity().title.startsWith("loss"); };
      preferLog();
      find("ridge-quantity").addEventListener("change", () => { fillRows(); preferLog(); drawRidges(); });
      find("ridge-rows").addEventListener("change", () => { fillRange(); drawRidges(); });
      for (const id of ["ridge-from", "ridge-to", "ridge-log", "ridge-flat"]) find(id).addEventListener("change", drawRidges);
      drawRidges();
      if (!known.maps.length) { find("maps").hidden = true; return; }
      fill(find("map-quantity"), known.maps.map((each, k) => [k, each.title]), 0);
      for (const id of ["map-quantity", "map-fork"]) find(id).addEventListener("change", drawMap);
      drawMap();
    },
  };
})();
