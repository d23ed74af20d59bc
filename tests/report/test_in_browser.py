"""Claim: the page opens from the file system with the network off, without errors, and computes as the library does."""

import dataclasses
import itertools
import json
import shlex

import numpy as np
import pytest
import torch

from lmc_curvature import select_layers, spectral_density, write_report
from lmc_curvature.cli import main
from lmc_curvature.report import read_contents, write_page
from lmc_curvature.report.contents import gather
from tests.report.test_page import EVIL
from tests.report.test_picking import predicted, small
from tests.support.browser import needs_browser
from tests.support.predictions import random_prediction

pytestmark = [pytest.mark.check, needs_browser]

PICK = """
const boxes = document.querySelectorAll(".chips input"), alpha = document.getElementById("alpha");
arguments[0].forEach((inside, index) => { if (boxes[index].checked !== inside) boxes[index].click(); });
alpha.value = arguments[1];
alpha.dispatchEvent(new Event("input", { bubbles: true }));
return Number(document.getElementById("predicted").dataset.value);
"""

# What a screen reader would pass by: without a label, a name or a text.
UNNAMED = """
const all = [...document.querySelectorAll("input, select, button, output, [role=img], table, section")];
const named = (each) => (each.labels && each.labels.length) || each.getAttribute("aria-label")
  || each.getAttribute("aria-labelledby") || each.textContent.trim() || each.closest(".modebar");
return all.filter((each) => !named(each)).map((each) => each.outerHTML.slice(0, 80));
"""


def _clean(page):
    assert page.complaints() == []
    assert page.requests() == []


def _picks_as_predicted(page, prediction, count=50):
    rng, layers = np.random.default_rng(0), len(prediction.layers)
    members = rng.random((count, layers)) < rng.random((count, 1))
    alphas = rng.integers(0, 101, count) / 100
    found = [page.run(PICK, row.tolist(), alpha) for row, alpha in zip(members, alphas.tolist(), strict=True)]
    expected = [prediction.set_barriers(row[None], alpha)[0] for row, alpha in zip(members, alphas, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("positions", [(0.0, 0.5, 1.0), (0.0, 0.2, 0.5, 0.9, 1.0), (0.0, 1.0)])
def test_the_picker_computes_what_the_library_does(open_page, tmp_path, positions):
    prediction = random_prediction(12, 1, positions=positions)
    write_report(prediction, tmp_path / "report.html", budget=0.5, raw=True)
    page = open_page(tmp_path / "report.html")
    _picks_as_predicted(page, prediction)
    rng = np.random.default_rng(1)
    cube = "JSON.parse(document.getElementById('data').textContent).pairs[0].picker.cube"
    for _ in range(10):
        inside, alpha, point = rng.random(12) < 0.6, float(rng.random()), rng.random(12)
        names = [name for name, chosen in zip(prediction.layers, inside, strict=True) if chosen]
        x = inside.astype(float).tolist()
        both = [
            (f"formula.loss(cube, {point.tolist()})", prediction.loss_at(point[None])[0]),
            (f"formula.lossError(cube, {point.tolist()})", prediction.loss_errors(point[None])[0]),
            (f"formula.expansionError(cube, {x}, {alpha})", prediction.expansion_error(names, alpha=alpha)),
            (f"formula.barrier(cube, {x}, {alpha})", prediction.set_barriers([names], alpha)[0]),
        ]
        for script, expected in both:
            assert page.run(f"const cube = {cube}; return {script}") == pytest.approx(expected, rel=1e-9, abs=1e-9)
        sampling = page.run(f"const cube = {cube}; return formula.samplingError(cube, {x}, {alpha})")
        assert sampling == pytest.approx(prediction.standard_error(names, alpha=alpha), rel=1e-4)
    _clean(page)


def test_a_pair_of_checkpoints(open_page, tmp_path, capsys):
    import torch

    from lmc_curvature import BarrierPrediction
    from lmc_curvature.sources import digits_resnet

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert not stop.value.code
        return capsys.readouterr().out

    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        torch.save(digits_resnet(width=2).state_dict(), tmp_path / name)
    files = [tmp_path / "a.pt", tmp_path / "b.pt", "--model", "digits-resnet", "--model-option", "width=2"]
    options = ["--data", "digits", "--limit", "64", "--batch-size", "32", "--no-progress"]
    record = run("predict", *files, *options, "--save", tmp_path / "p.safetensors", "--json")
    (tmp_path / "p.json").write_text(record)
    run("measure", *files, *options, "--alphas", 3, "--each", "--save", tmp_path / "m.safetensors", "--json")
    results = [tmp_path / name for name in ("p.safetensors", "m.safetensors", "p.json")]
    run("report", *results, "--out", tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    prediction = BarrierPrediction.load(tmp_path / "p.safetensors")
    _picks_as_predicted(page, prediction, 10)
    first = [index == 0 for index in range(len(prediction.layers))]
    page.run(PICK, first, 0.5)
    assert page.text("#measured").startswith("measured: ")
    assert page.text("#command").endswith(
        f"merge {tmp_path}/a.pt {tmp_path}/b.pt --model digits-resnet --model-option width=2 --layers conv "
        f"--base {page.run('return document.querySelector(`input[name=base]:checked`).value')} --out merged.safetensors"
    )
    words = page.text("#command").split()[1:-1]
    run(*words, tmp_path / "merged.safetensors")
    page.run(PICK, [False] * len(first), 0.5)
    assert page.run("return document.querySelector('[data-copy=command]').disabled")
    _clean(page)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": "module"},
        {"layers": {"first": ["^0", "^1"], "last": [".*"]}},
        {"frozen": "0.bias"},
        {"frozen": "3", "layers": "module"},
        {"frozen": "1", "base": "b"},
    ],
)
def test_what_the_page_says_makes_the_network_that_was_predicted(open_page, tmp_path, options):
    from safetensors.torch import load_file, save_file

    from lmc_curvature.merging import merge_predicted

    networks = small(1), small(2)
    prediction = predicted(**options)
    write_report(prediction, tmp_path / "report.html")
    for name, network in zip("AB", networks, strict=True):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    page = open_page(tmp_path / "report.html")
    a, b = (network.state_dict() for network in networks)
    known = {"merge_predicted": merge_predicted, "prediction": prediction, "model_a": networks[0]}
    frozen = (a, b)[prediction.base == "b"]
    commands = 0
    for number, picks in enumerate(itertools.product([False, True], repeat=len(prediction.layers))):
        if not any(picks):
            continue
        base, alpha = "ab"[number % 2], (0.25, 0.5)[number // 2 % 2]
        page.run(f"document.querySelector('input[name=base][value={base}]').click()")
        page.run(PICK, list(picks), alpha)
        expected = dict(frozen)
        for layer, inside in zip(prediction.layers, picks, strict=True):
            for entry in prediction.groups[layer]:
                at = alpha if inside else float(base == "b")
                expected[entry] = (1 - at) * a[entry] + at * b[entry]
        text = "return document.getElementById('{}').textContent"
        merged = eval(page.run(text.format("python")), known | {"model_b": networks[1]}).state_dict()
        found = [merged]
        command = page.run(text.format("command"))
        if command.startswith("lmc-curvature"):
            words = [f"{tmp_path}/{word}" if word.endswith("safetensors") else word for word in shlex.split(command)]
            words[words.index("MODEL")] = "tests.report.test_picking:small"
            with pytest.raises(SystemExit) as stop:
                main([*words[1:], "--force"])
            assert not stop.value.code
            found.append(load_file(tmp_path / "merged.safetensors"))
            commands += 1
        for state in found:
            torch.testing.assert_close(*({n: of[n] for n in of if "tracked" not in n} for of in (state, expected)))
    assert commands == (0 if "frozen" in options else 2 ** len(picks) - 1 if options.get("layers") == "module" else 1)
    _clean(page)


def test_a_fork_run(open_page, traced, tmp_path):
    contents = read_contents([traced[0]])
    write_page(contents, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 7e6
    page = open_page(tmp_path / "report.html")
    assert page.run("return document.querySelectorAll('.pairs tbody tr').length") == 2
    page.run("document.querySelector('[data-show=\"1\"]').click()")
    assert page.text("#answer article:not([hidden]) .which") == "fork at epoch 1"
    _picks_as_predicted(page, contents.pairs[1].prediction, 10)
    for name in ("ridges", "growth", "maps", "geometry", "curves", "interactions"):
        page.wait(f"document.querySelector('[data-chart=\"{name}\"] .main-svg') !== null")
    for control in ("ridge-quantity", "ridge-rows", "map-quantity", "map-fork", "ridge-flat", "ridge-log"):
        script = f"const it = document.getElementById('{control}'); it.checked = true;"
        page.run(
            script + "if (it.options) it.selectedIndex = it.options.length - 1; it.dispatchEvent(new Event('change'))"
        )
    page.wait("document.querySelector('[data-chart=\"ridges\"] .heatmaplayer') !== null")
    _clean(page)


def test_traces_alone_and_a_measurement_alone(open_page, traced, pair, tmp_path):
    for name, result, shown in (("traces", traced[1], "ridges"), ("measured", pair[1], "curves")):
        write_report(result, tmp_path / f"{name}.html")
        page = open_page(tmp_path / f"{name}.html")
        page.wait(f"document.querySelector('[data-chart=\"{shown}\"] .main-svg') !== null")
        assert page.run("return document.getElementById('picker')") is None
        _clean(page)


def test_spectra_and_selections(open_page, pair, tmp_path):
    import torch

    selection = select_layers(pair[0], 1.0)
    density = spectral_density(torch.diag(torch.tensor([1.0, 2.0, 5.0])), progress=False)
    write_report([selection, density], tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    page.wait("document.querySelector('[data-chart=\"spectrum-0\"] .main-svg') !== null")
    picked = "return [...document.querySelectorAll('.chips input')].filter((b) => b.checked).length"
    assert page.run(picked) == len(selection.members)
    _clean(page)


def test_names_do_nothing(open_page, pair, named, tmp_path):
    prediction = named(pair[0], EVIL)
    write_report({EVIL[0]: prediction, "other": pair[0]}, tmp_path / "report.html", title=EVIL[0])
    page = open_page(tmp_path / "report.html")
    assert page.run("return document.images.length") == 0
    assert page.run("return document.querySelectorAll('main b').length") == 0
    assert page.text("h1") == EVIL[0]
    labels = page.run("return [...document.querySelectorAll('.chips label span')].map((each) => each.textContent)")
    assert labels == list(EVIL)
    page.run(PICK, [True, False, False], 0.5)
    assert json.dumps(EVIL[0]) in page.text("#python")
    # How layers of such names were cut is not known, and is where the files are.
    assert page.text("#command").startswith("The command merge cannot be told")
    words = ("lmc-curvature", "merge", "a", "b")
    contents = gather(prediction)
    pairs = (dataclasses.replace(contents.pairs[0], merge=words),)
    write_page(dataclasses.replace(contents, pairs=pairs), tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    page.run(PICK, [True, False, False], 0.5)
    words = shlex.split(page.run("return document.getElementById('command').textContent"))
    assert words[words.index("--layers") + 1] == EVIL[0]
    ticks = page.run(
        "return [...document.querySelectorAll('[data-chart=layers] .ytick text')].map((e) => e.textContent)"
    )
    assert EVIL[1] in ticks
    _clean(page)


def test_it_is_for_keyboards_screen_readers_and_both_themes(open_page, pair, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    write_report(list(pair), tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    # Of three layers the chart is low, and nothing is empty below it.
    gaps = "return [...document.querySelectorAll('.js-plotly-plot')].filter((each) => each.offsetParent).map((each) => "
    gaps += "each.clientHeight - each.querySelector('.svg-container').clientHeight)"
    page.wait("document.querySelector('[data-chart=\"layers\"] .main-svg') !== null")
    assert max(map(abs, page.run(gaps))) <= 1
    unnamed = page.run(UNNAMED)
    assert unnamed == []
    assert page.run("return document.getElementById('picked').getAttribute('aria-live')") == "polite"
    slider = page.driver.find_element(By.ID, "alpha")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert page.text("#alpha-value") == "0.51"
    box = page.driver.find_element(By.CSS_SELECTOR, ".chips input")
    before = page.run("return document.getElementById('predicted').dataset.value")
    box.send_keys(Keys.SPACE)
    assert page.run("return document.getElementById('predicted').dataset.value") != before
    color = "return getComputedStyle(document.querySelector('.xtick text')).fill"
    fills = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        fills[scheme] = page.run(color)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert fills == {"light": "rgb(27, 31, 36)", "dark": "rgb(230, 233, 236)"}
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    page.wait("document.documentElement.scrollWidth <= 390")
    line = "return parseFloat(getComputedStyle(document.querySelector('.bases legend')).lineHeight)"
    assert page.run("return document.querySelector('.bases legend').clientHeight") < 1.5 * page.run(line)
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.run("dispatchEvent(new Event('beforeprint'))")
    wide = "[...document.querySelectorAll('.main-svg')].some((each) => each.clientWidth > 961)"
    page.wait(f"!{wide}")
    page.run("dispatchEvent(new Event('afterprint'))")
    page.wait(wide)
    _clean(page)
