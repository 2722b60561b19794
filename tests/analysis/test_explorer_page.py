"""The explorer page as a person uses it, in headless Chromium, from disk: what it shows equals what Python computes."""

from __future__ import annotations

import re

import pytest
import torch

from dgnet.analysis._explorer_page import collect, describe_exploration, render_explorer, shorten_names
from dgnet.analysis._sweep import OFFSETS
from tests.helpers.browser import open_browser, watch
from tests.helpers.data import CLASSES, Pictures
from tests.helpers.networks import spread_routers

pytestmark = pytest.mark.slow  # a browser starts

LABELS = [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 1, 0, 2]
TRAINED = OFFSETS.index(0.0)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


def make_network():
    from dgnet.graph import find_stages
    from dgnet.models.cifar_resnet import DynamicCifarResNet

    torch.manual_seed(0)
    network = DynamicCifarResNet(layers=(3, 3, 3), channels=(4, 6, 8), num_classes=5, node_gate="hard", node_gate_bias=0.3)
    for stage in find_stages(network):
        spread_routers(stage)
    return network


@pytest.fixture(scope="module")
def found():
    return collect(make_network(), Pictures(LABELS))


@pytest.fixture(scope="module")
def unlabelled():
    return collect(make_network(), Pictures([None] * 6))


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of an exploration; nothing may have gone wrong on it when the test ends."""
    opened = []

    def open_page(found, width=1280, height=900, scheme="light"):
        path = tmp_path / "explorer.html"
        page_text = render_explorer(describe_exploration(found, "dg_tiny", "pictures"))
        path.write_text(page_text, encoding="utf-8", errors="replace")
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        opened.append((page, watch(page)))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        page.wait_for_selector(".stage .edge", state="attached")
        return page

    yield open_page
    for page, wrong in opened:
        assert wrong == []
        assert page.evaluate("typeof owned") == "undefined"
        page.close()


def read_side(page, slot):
    """The fields of a side, by name."""
    script = "fields => fields.map(field => [field.dataset.field, field.innerText])"
    return dict(page.eval_on_selector_all(f"#side-{slot} [data-field]", script))


def read_edges(page, slot):
    """Of every edge of all stages what a screen reader says, in the order of the edges."""
    script = """edges => edges.map(edge =>
        [Number(edge.closest(".stage").dataset.stage), Number(edge.dataset.edge), edge.getAttribute("aria-label")])"""
    return [label for *_, label in sorted(page.eval_on_selector_all(f".stage svg[data-slot={slot}] .edge", script))]


def grid(page):
    """The images in the grid, in order."""
    return page.eval_on_selector_all("#grid .item", "items => items.map(item => Number(item.dataset.image))")


def move_slider(page, number):
    page.focus("#slider")
    page.keyboard.press("Home")
    for _ in range(number):
        page.keyboard.press("ArrowRight")


def expected_side(found, image, number):
    label, predicted = found.labels[image], int(found.predictions[image, number])
    executed = float(found.executed[image, number])
    weights = found.weights[image, number]
    masks = [topology.mask for topology in found.topologies]
    skipped, start = 0, 0
    for mask in masks:
        matrix = torch.zeros(mask.shape)
        count = int(mask.sum())
        matrix[mask] = weights[start : start + count]
        start += count
        skipped += int((~(matrix != 0).any(1))[1:-1].sum())
    return {
        "name": shorten_names(found.names)[image],
        "label": CLASSES[label],
        "prediction": f"{CLASSES[predicted]} {'✓ correct' if predicted == label else '✗ wrong'}",
        "confidence": f"{100 * float(found.confidences[image, number]):.1f} %",
        "loss": f"{float(found.losses[image, number]):.3f}",
        "cost": f"{executed / 1e6:.2f} M ({100 * executed / found.dense_multiply_adds:.1f} %)",
        "open": f"{int((weights != 0).sum())} of {weights.numel()}",
        "skipped": f"{skipped} of 9",
    }


def normalised(fields):
    """A figure whose last digit may differ by rounding is compared by `near`."""
    return {name: text for name, text in fields.items() if name not in ("confidence", "loss")}


def near(one, other):
    numbers = [float(re.match(r"[\d.]+", text)[0]) for text in (one, other)]
    return numbers[0] == pytest.approx(numbers[1], abs=0.11 if "%" in one else 0.0011)


def number_of(text):
    """The weight that an edge's label speaks of, 0 where it is closed."""
    match = re.search(r"weight (−?)([\d.]+)", text)
    return 0.0 if match is None else float(match[2]) * (-1 if match[1] else 1)


def test_the_slider_shows_what_was_run_at_each_offset(found, open_page):
    page = open_page(found)
    assert read_side(page, "a")["name"] == "0/plain.jpg"
    seen = []
    for number, offset in enumerate(OFFSETS):
        move_slider(page, number)
        shown, expected = read_side(page, "a"), expected_side(found, 0, number)
        assert normalised(shown) == normalised(expected)
        assert near(shown["confidence"], expected["confidence"])
        assert near(shown["loss"], expected["loss"])
        text = page.inner_text("#offset").replace("−", "-")
        assert float(text.split(",")[0]) == offset
        assert ("as trained" in text) == (offset == 0)
        edges = read_edges(page, "a")
        weights = found.weights[0, number].tolist()
        for spoken, weight in zip(edges, weights, strict=True):
            assert ("closed" in spoken.split(";")[0]) == (weight == 0)
            assert number_of(spoken.split(";")[0]) == pytest.approx(weight, abs=0.0081)
        right = [int(found.predictions[image, number]) == label for image, label in enumerate(LABELS)]
        overall = page.inner_text("#overall")
        assert f"top-1 {100 * sum(right) / len(right):.1f} %" in overall
        assert f"mean {float(found.executed[:, number].mean()) / 1e6:.2f} M" in overall
        seen.append(shown["cost"])
    assert len(set(seen)) > 3  # the network does differ from offset to offset


def test_the_status_and_the_slider_speak(found, open_page):
    page = open_page(found)
    move_slider(page, 8)
    assert page.get_attribute("#slider", "aria-valuetext") == "+0.3"
    page.locator("#status", has_text="Offset +0.3").wait_for(state="attached")
    status = page.text_content("#status")
    assert f"{int((found.weights[0, 8] != 0).sum())} of 30 edges open" in status


def test_search_and_filter(found, open_page):
    page = open_page(found)
    for query, expected in (
        ("cat", [i for i, label in enumerate(LABELS) if label == 0]),  # a class's full name: not the catfish
        ("catf", [i for i, label in enumerate(LABELS) if label == 1]),
        ("🦊 &amp;", [i for i, name in enumerate(found.names) if "🦊 &amp;" in name]),
        ("</SCRIPT>", [i for i, label in enumerate(LABELS) if label == 3 or "</script>" in found.names[i]]),
        ("nothing is called so", []),
        ("", list(range(len(LABELS)))),
    ):
        page.fill("#search", query)
        assert grid(page) == expected
        count = f"{len(expected)} of 14 images" if query else "14 images"
        assert page.inner_text("#found") == count
    wrong = [i for i, label in enumerate(LABELS) if int(found.predictions[i, TRAINED]) != label]
    page.select_option("#show", "wrong")
    assert grid(page) == wrong
    assert page.locator("#grid .wrong").count() == len(wrong) > 0
    page.select_option("#show", "right")
    assert grid(page) == [i for i in range(len(LABELS)) if i not in wrong]


@pytest.mark.parametrize(("key", "figure"), [("cost", "executed"), ("confidence", "confidences"), ("loss", "losses")])
def test_sorting(found, open_page, key, figure):
    page = open_page(found)
    for number in (TRAINED, 8):
        values = [round(value, 4) for value in getattr(found, figure)[:, number].tolist()]
        move_slider(page, number)
        page.select_option("#sort", f"{key}Up")
        assert grid(page) == sorted(range(len(LABELS)), key=lambda i: (values[i], i))
        page.select_option("#sort", f"{key}Down")
        assert grid(page) == sorted(range(len(LABELS)), key=lambda i: (-values[i], i))
    caption = page.locator("#grid .item .caption").first.inner_text()
    most = max(values)
    assert caption == {"cost": f"{most / 1e6:.2f} M", "confidence": f"{100 * most:.1f} %", "loss": f"{most:.3f}"}[key]


def test_two_images_side_by_side_with_what_differs_marked(found, open_page):
    page = open_page(found)
    page.locator("#grid .item").nth(3).click()
    page.locator("#grid .item").nth(7).click(modifiers=["Shift"])
    assert normalised(read_side(page, "a")) == normalised(expected_side(found, 3, TRAINED))
    assert normalised(read_side(page, "b")) == normalised(expected_side(found, 7, TRAINED))
    one, other = found.weights[3, TRAINED].tolist(), found.weights[7, TRAINED].tolist()
    signs = [
        "+" if p and not q else "−" if q and not p else "Δ" if abs(p - q) >= 0.1 else ""
        for p, q in zip(one, other, strict=True)
    ]
    assert {"+", "−"} <= set(signs)  # not a trivial case
    words = {
        "+": "; open here, closed on the other side",
        "−": "; closed here, open on the other side",
        "Δ": "; different weight on the other side",
    }
    close = [abs(abs(p - q) - 0.1) < 0.02 for p, q in zip(one, other, strict=True)]  # a weight is shown to within a step
    for spoken, sign, is_close in zip(read_edges(page, "a"), signs, close, strict=True):
        if not is_close:
            assert spoken.endswith(words.get(sign, spoken[-1:])), spoken
            assert (";" in spoken) == bool(sign), spoken
    drawn = page.eval_on_selector_all("svg[data-slot=a] .sign", "signs => signs.map(sign => sign.textContent)")
    assert drawn.count("+") == signs.count("+")
    assert drawn.count("−") == signs.count("−")
    back = page.eval_on_selector_all("svg[data-slot=b] .sign", "signs => signs.map(sign => sign.textContent)")
    assert back.count("+") == signs.count("−")  # seen from the other side
    counted = sum(int(text.split()[0]) for text in page.locator(".stage .head p").all_inner_texts())
    assert counted == len(drawn)
    page.locator("label:has(#mark)").click()
    assert page.locator("svg .sign").count() == 0
    for view in ("matrix", "graph"):  # both say the same
        page.locator(f"label:has([name=view][value={view}])").click()
        assert [number_of(text) for text in read_edges(page, "b")] == pytest.approx(other, abs=0.0081)


@pytest.mark.parametrize("beside", ["class", "all"])
def test_means_beside_an_image(found, open_page, beside):
    page = open_page(found)
    page.locator(f"label:has([name=beside][value={beside}])").click()
    move_slider(page, 6)
    members = [i for i, label in enumerate(LABELS) if beside == "all" or label == LABELS[0]]
    weights = found.weights[members, 6]
    for spoken, mean, share in zip(
        read_edges(page, "b"), weights.mean(0).tolist(), (weights != 0).double().mean(0).tolist(), strict=True
    ):
        assert number_of(spoken) == pytest.approx(mean, abs=0.0081)
        assert f"open in {100 * share:.1f} %" in spoken
    side = read_side(page, "b")
    assert f"{len(members)} images" in side["name"]
    assert side["cost"].startswith(f"{float(found.executed[members, 6].mean()) / 1e6:.2f} M")


def test_the_keyboard_alone(found, open_page):
    page = open_page(found)
    page.focus("#search")
    page.locator("#target input").first.focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.dataset.image"
    assert page.evaluate(focused) == "0"  # the images are one stop
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "2"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert read_side(page, "a")["name"] == shorten_names(found.names)[2]
    page.keyboard.press("ArrowDown")
    columns = int(page.evaluate(focused)) - 2
    assert columns > 1
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    assert page.evaluate(focused) == "13"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "13"  # no further
    page.keyboard.press("b")
    assert read_side(page, "b")["name"] == shorten_names(found.names)[13]
    page.keyboard.press("Home")
    page.keyboard.press("Shift+Enter")
    assert read_side(page, "b")["name"] == shorten_names(found.names)[0]
    assert page.get_attribute("#grid .item >> nth=0", "aria-selected") == "true"
    assert page.get_attribute("#grid .item >> nth=0", "aria-label").startswith("image B: ")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "slider"
    # Each graph is one stop, and its edges are read one by one.
    page.focus(".stage[data-stage='2'] svg[data-slot=a] .edge[tabindex='0']")
    edge = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(edge).startswith("input node to node 1: ")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(edge).startswith("input node to node 2: ")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(edge).startswith("input node to node 3: ")
    readout = page.inner_text(".stage[data-stage='2'] .readout")
    assert readout.startswith("input node to node 3 · A: ")
    page.keyboard.press("End")
    assert page.evaluate(edge).startswith("node 3 to output node: ")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('svg').dataset.slot") == "b"


def test_pointing_at_an_edge_reads_it_out(found, open_page):
    page = open_page(found)
    page.locator(".stage[data-stage='1'] svg[data-slot=a] .edge[data-edge='0'] .reach").hover(force=True)
    assert page.inner_text(".stage[data-stage='1'] .readout").startswith("input node to node 1 · A: ")
    assert page.locator(".stage[data-stage='1'] .edge.lit").count() == 2  # here and beside it


def test_weights_as_a_table(found, open_page):
    page = open_page(found)
    page.locator(".stage details summary").nth(1).click()
    page.wait_for_selector(".stage[data-stage='2'] tbody tr")
    rows = page.eval_on_selector_all(
        ".stage[data-stage='2'] tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.innerText))"
    )
    edges = found.edges[1]
    first = len(found.edges[0])
    assert len(rows) == len(edges)
    names = ["in", "1", "2", "3", "out"]
    for row, (i, j), weight in zip(rows, edges, found.weights[0, TRAINED, first:].tolist(), strict=False):
        assert row[:2] == [names[i], names[j]]
        assert (row[2] == "closed") == (weight == 0)
        if weight:
            assert float(row[2]) == pytest.approx(weight, abs=0.004)
    page.locator("#runs summary").click()
    page.wait_for_selector("#runs tbody tr")
    costs = page.eval_on_selector_all("#runs tbody tr", "rows => rows.map(row => row.cells[3].innerText)")
    assert costs == [f"{value / 1e6:.2f} M" for value in found.executed[0].tolist()]


def test_trouble_in_names_is_shown_as_text(found, open_page):
    page = open_page(found)
    for image, name in enumerate(shorten_names(found.names)[:6]):
        page.locator("#grid .item").nth(image).click()
        assert read_side(page, "a")["name"] == name
    assert page.locator("#detail b b, img[src=x]").count() == 0
    assert page.locator("script").count() == 2


def test_images_without_labels(unlabelled, open_page):
    page = open_page(unlabelled)
    assert not page.is_visible("#show")
    options = page.eval_on_selector_all("#sort option", "options => options.map(option => option.value)")
    assert options == ["data", "costUp", "costDown", "confidenceUp", "confidenceDown"]
    side = read_side(page, "a")
    assert not {"label", "loss"} & set(side)
    predicted = int(unlabelled.predictions[0, TRAINED])
    assert side["prediction"].strip() == CLASSES[predicted]
    members = [i for i in range(6) if int(unlabelled.predictions[i, TRAINED]) == predicted]
    assert f"of images predicted as {CLASSES[predicted]}, {len(members)} image" in read_side(page, "b")["name"]
    page.fill("#search", CLASSES[predicted])
    assert grid(page) == members
    page.fill("#search", "")
    move_slider(page, 10)
    page.select_option("#sort", "costDown")
    assert len(grid(page)) == 6
    assert "top-1" not in page.inner_text("#overall")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1440])
def test_no_width_scrolls_sideways(found, open_page, width, scheme):
    page = open_page(found, width, 800, scheme)
    page.locator("#grid .item").nth(2).click(modifiers=["Shift"])
    for summary in page.locator("details summary").all():
        summary.click()
    for view in ("matrix", "graph"):
        page.locator(f"label:has([name=view][value={view}])").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        overflowing = page.evaluate(
            "width => [...document.querySelectorAll('main *')].filter(e => !e.closest('svg, .unseen, .tables')"
            " && e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 80))",
            width,
        )
        assert overflowing == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
