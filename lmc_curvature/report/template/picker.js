"use strict";
// The layer picker: layers in and out, α, and what is predicted of them.
const picker = (() => {
  const find = (id) => document.getElementById(id);
  const number = (value, digits = 3) => {
    if (value === null || !Number.isFinite(value)) return "–";
    return value === 0 ? "0" : String(Number(value.toPrecision(digits)));
  };
  const withError = (error) => ` ± ${error === null ? "unknown (one batch)" : number(error, 2)}`;
  const BLUE = "#1A86C7", VERMILION = "#D55E00", GREEN = "#009E73";
  let shown = null, boxes = [], draw = null, waiting = false;

  const chosen = () => boxes.map((box) => (box.checked ? 1 : 0));
  const alphaNow = () => Number(find("alpha").value);
  const baseNow = () => document.querySelector('input[name="base"]:checked').value;
  const same = (members, x) => members.length === x.filter(Boolean).length && members.every((index) => x[index]);

  function makeBoxes(record) {
    const alone = record.layers.map((_, index) =>
      formula.barrier(record.cube, record.layers.map((_, other) => (other === index ? 1 : 0)), 0.5));
    const most = Math.max(...alone, 1e-300), total = record.parameters && record.parameters.reduce((a, b) => a + b, 0);
    const chips = document.querySelector(".chips");
    boxes = record.layers.map((name, index) => {
      const label = document.createElement("label"), box = document.createElement("input");
      const text = document.createElement("span"), small = document.createElement("small");
      box.type = "checkbox";
      text.textContent = name;
      small.textContent = total ? `${number(100 * record.parameters[index] / total, 2)} %` : "";
      small.title = "of the parameters";
      label.style.setProperty("--share", `${100 * Math.max(alone[index], 0) / most}%`);
      label.append(box, text, small);
      return box;
    });
    chips.replaceChildren(...boxes.map((box) => box.parentElement));
    choose(record.largest && record.largest.length ? record.largest : record.layers.map((_, index) => index));
    document.querySelector('[data-pick="largest"]').disabled = record.largest === null;
    const base = record.largestBase || "a";
    document.querySelector(`input[name="base"][value="${base}"]`).checked = true;
  }

  function choose(members) {
    boxes.forEach((box, index) => { box.checked = members.includes(index); });
  }

  function measuredText(x, alpha) {
    const found = shown.measured.filter((curve) => same(curve.members, x)).map((curve) => {
      const gaps = curve.alphas.map((each) => Math.abs(each - alpha)), place = gaps.indexOf(Math.min(...gaps));
      const error = withError(curve.errors[place]);
      const where = gaps[place] > 1e-9 ? ` at α = ${number(curve.alphas[place])}` : "";
      return `${curve.name}${where}: ${number(curve.curve[place])}${error}`;
    });
    return found.length ? found.join("; ") : "not measured for this set";
  }

  function movedText(x) {
    const count = x.filter(Boolean).length, layers = `${count} of ${x.length} layers move`;
    const total = (shown.parameters || []).reduce((a, b) => a + b, 0);
    if (!total) return layers;
    const moved = shown.parameters.reduce((sum, each, index) => sum + each * x[index], 0);
    return `${layers}: ${moved.toLocaleString("en")} of ${total.toLocaleString("en")} parameters (${number(100 * moved / total)} %)`;
  }

  function mergeText(x, alpha, base) {
    const cube = shown.cube, point = x.map((inside) => (base === "a" ? alpha * inside : 1 - (1 - alpha) * inside));
    const mean = (cube.losses[0] + cube.losses[cube.losses.length - 1]) / 2, loss = formula.loss(cube, point);
    const error = formula.lossError(cube, point);
    const rise = `${loss >= mean ? "+" : "−"}${number(Math.abs(loss - mean))}`;
    const known = alpha === 0.5 && shown.merges.find((each) => each.base === base && same(each.members, x));
    const measured = known ? `; measured rise ${number(known.rise)}${withError(known.error)}` : "";
    return `predicted loss ${number(loss)}, rise ${rise}, expansion error ${number(error, 2)}${measured}`;
  }

  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

  function commandText(x, alpha, base) {
    const names = shown.layers.filter((_, index) => x[index]);
    const some = names.length < x.length;
    if (!names.length || !shown.words || (some && !shown.partition)) return "";
    const words = [...shown.words];
    if (some) words.push(...shown.partition, "--layers", names.join(","), "--base", base);
    if (alpha !== 0.5) words.push("--alpha", String(alpha));
    return [...words, "--out", "merged.safetensors"].map(quoted).join(" ");
  }

  function pythonText(x, alpha, base) {
    const names = shown.layers.filter((_, index) => x[index]);
    if (!names.length || shown.python === null) return "";
    const alphas = names.map((name) => `${JSON.stringify(name)}: ${alpha}`).join(", ");
    return `merge_predicted(prediction, {${alphas}}, model_a, model_b, base="${base}"${shown.python})`;
  }

  function curveChart(x, alpha, barrier) {
    const alphas = Array.from({ length: 41 }, (_, k) => k / 40), known = formula.features(shown.cube, x);
    const curve = alphas.map((each) => formula.barrier(shown.cube, x, each, known));
    const errors = alphas.map((each) => (shown.cube.expansion === "anchored" ? formula.expansionError(shown.cube, x, each, known) : 0));
    const upper = curve.map((value, k) => value + errors[k]), lower = curve.map((value, k) => value - errors[k]);
    const data = [
      { type: "scatter", mode: "lines", x: [...alphas, ...alphas.slice().reverse()], y: [...upper, ...lower.reverse()], fill: "toself",
        fillcolor: "rgba(0,114,178,0.18)", line: { width: 0 }, hoverinfo: "skip", name: "± expansion error" },
      { type: "scatter", mode: "lines", x: alphas, y: curve, line: { color: BLUE, width: 2 }, name: "predicted" },
      { type: "scatter", mode: "markers", x: [alpha], y: [barrier], name: "at this α", marker: { color: VERMILION, size: 12, symbol: "diamond" } },
    ];
    for (const each of shown.measured.filter((one) => same(one.members, x))) {
      data.push({ type: "scatter", mode: "markers", x: each.alphas, y: each.curve, name: each.name,
        error_y: { type: "data", array: each.errors.map((error) => error || 0), color: GREEN, thickness: 1.2 }, marker: { color: GREEN, size: 8 } });
    }
    return { data, layout: { height: 250, showlegend: false, xaxis: { title: { text: "α" }, range: [-0.02, 1.02] }, yaxis: { title: { text: "barrier" } } } };
  }

  function update() {
    const x = chosen(), alpha = alphaNow(), base = baseNow(), cube = shown.cube;
    const barrier = formula.barrier(cube, x, alpha);
    const errors = [];
    if (cube.expansion === "anchored") errors.push(`expansion error about ${number(formula.expansionError(cube, x, alpha), 2)}`);
    const sampling = formula.samplingError(cube, x, alpha);
    if (sampling !== null) errors.push(`sampling ± ${number(sampling, 2)}`);
    find("alpha-value").textContent = String(alpha);
    find("predicted").textContent = number(barrier, 4);
    find("predicted").dataset.value = String(barrier);
    find("predicted-errors").textContent = errors.join("; ");
    find("measured").textContent = measuredText(x, alpha);
    find("moved").textContent = movedText(x);
    for (const each of ["a", "b"]) document.querySelector(`[data-merge="${each}"]`).textContent = mergeText(x, alpha, each);
    const command = commandText(x, alpha, base), python = pythonText(x, alpha, base);
    const none = x.some(Boolean) ? shown.missing : "Pick a layer: without one there is nothing to merge.";
    find("command").textContent = command || none;
    find("python").textContent = python;
    find("python").parentElement.hidden = !python;
    document.querySelector('[data-copy="command"]').disabled = !command;
    find("command-hint").textContent = [
      command && shown.generic ? "Put your files and your network for the words in capitals." : "",
      python ? "In Python: from lmc_curvature.merging import merge_predicted, and prediction is the one of this page." : "",
    ].join(" ").trim();
    find("copied").textContent = "";
    drawSoon();
  }

  // A curve a frame at most: α is dragged faster than charts are drawn.
  function drawSoon() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const x = chosen(), alpha = alphaNow(), barrier = formula.barrier(shown.cube, x, alpha);
      draw("set-curve", curveChart(x, alpha, barrier), `Barrier curve of the picked layers: ${number(barrier)} at α = ${alpha}`);
    });
  }

  async function copy(id) {
    const text = find(id).textContent;
    try {
      await navigator.clipboard.writeText(text);
      find("copied").textContent = "Copied.";
    } catch {
      const range = document.createRange();
      range.selectNodeContents(find(id));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      find("copied").textContent = document.execCommand("copy") ? "Copied." : "Selected: copy it with the keyboard.";
    }
  }

  function pick(which) {
    const all = boxes.map((_, index) => index);
    if (which === "all") choose(all);
    if (which === "none") choose([]);
    if (which === "invert") choose(all.filter((index) => !boxes[index].checked));
    if (which === "largest") { choose(shown.largest); find("alpha").value = "0.5"; }
    update();
  }

  return {
    number,
    start(drawing) {
      draw = drawing;
      document.querySelector(".picker").addEventListener("input", update);
      for (const button of document.querySelectorAll("[data-pick]")) button.addEventListener("click", () => pick(button.dataset.pick));
      for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
    },
    show(record) {
      shown = record;
      makeBoxes(record);
      update();
    },
  };
})();
