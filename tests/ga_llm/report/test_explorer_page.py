"""The explorer in headless Chromium, without network: clicks, keys, a phone, greyscale, a screen reader's words.

Skipped where there is no Chromium or no playwright.
"""
import io
import itertools
import os
import shutil

import numpy as np
import pytest
from matplotlib.image import imread
from report_folder import RANKS, rewritten, write

from ga_llm.report import contents, explorer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = ('<img src="https://evil.example/{}.png" onerror="window.harmed = 1"></script>'
           '<script>window.harmed = 1</script>')


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: explorer.html}: of one run, of two, of a town with hostile names, of one without its questions."""
    root = tmp_path_factory.mktemp("pages")

    def page_of(name, *others, known=True, **options):
        checkpoint = write(root / name, **options)
        run = contents.read_evaluation(checkpoint)
        folder = contents.data_folder(run)
        mapping = contents.read_mapping(run, folder, None, False)
        runs = [run, *(contents.read_evaluation(rewritten(checkpoint, root / name / "b", ranks)) for ranks in others)]
        baseline = contents.read_baseline(run, folder, mapping, False) if known else None
        path = root / f"{name}.html"
        path.write_text(explorer.page(explorer.gather(runs, mapping, baseline, folder,
                                                      absent=[] if known else ["Without history"])), encoding="utf-8")
        return path

    return {"one": page_of("one"), "two": page_of("two", {0: 2, 3: 1}), "hostile": page_of("hostile", category=HOSTILE),
            "bare": page_of("bare", known=False)}


@pytest.fixture(scope="module")
def chromium():
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] * (os.geteuid() == 0))
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, files):
    """opened(name, viewport): the page; at the end it must have asked for nothing, and have said nothing is wrong."""
    contexts, troubles = [], []

    def open_page(name, viewport=DESKTOP, **options):
        context = chromium.new_context(viewport=viewport, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: request.url == files[name].as_uri() or troubles.append(request.url))
        page.goto(files[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def said(page):
    return page.locator("#said").inner_text()


def centre(page, i=0):
    return page.evaluate(f"maps[{i}].getCenter()")


def until(page, holds):
    """Wait for something in the page; its policy forbids what playwright would wait with."""
    for _ in range(100):
        if page.evaluate(holds):
            return
        page.wait_for_timeout(50)
    raise AssertionError(holds)


def on_map(page, place_id, i=0):
    """Where a place stands on the screen."""
    return page.evaluate(f"""() => {{ const at = maps[{i}].latLngToContainerPoint(point(places.id.indexOf({place_id}))),
        box = document.getElementById("map{i}").getBoundingClientRect(); return [box.x + at.x, box.y + at.y]; }}""")


def test_what_is_shown_of_a_pair(opened):
    """Pair 0: the target is 1, the first guess, .9; user 0 at 2012-05-01 15:00, after 10:00 and 12:00."""
    page = opened("one")
    assert page.title() == "Explorer: town, 12 test pairs"
    assert said(page).startswith("Pair 0, user 0, Tue 2012-05-01 15:00. The truth: Café 1, POI 1. Model: truth has "
                                 "rank 1 (right). First 5: 1. Café 1, POI 1, 90.0 %; 2. ")
    assert page.locator("#about0").inner_text() == "Model: right, rank 1"
    guesses = page.get_by_role("region", name="First 12 guesses").locator("tbody tr")
    assert guesses.count() == 12 and guesses.first.locator("td").all_inner_texts() == [
        "1", "★ Café 1, POI 1", "90.0 %", "0.00 km"]
    history = page.get_by_role("region", name="First guesses of the baselines").locator("tbody tr").first
    assert history.locator("td").all_inner_texts() == ["□ user-history frequency", "★ Café 1, POI 1", "0.00 km",
                                                       "rank 1"]
    steps = page.get_by_role("region", name="Current trajectory").locator("tbody tr").all_inner_texts()
    assert steps == ["Tue 2012-05-01 12:00\tCafé 6, POI 6", "Tue 2012-05-01 10:00\tCafé 5, POI 5"]
    # On the map: each guess, the truth, three baselines; heat at six places; the line with its times.
    assert page.locator("#map0 .guess").all_inner_texts() == [str(n) for n in range(1, 13)]
    assert page.locator("#map0 .truth").count() == 1 and page.locator("#map0 .baseline").count() == 3
    assert page.locator("#map0 path.heat").count() == 5     # user 0: 1, 2, 3, 4, 7
    assert page.locator("#map0 path.trajectory").count() == 1
    assert sorted(page.locator("#map0 .when").all_text_contents()) == ["10:00", "12:00"]
    sizes = page.locator("#map0 .guess").evaluate_all("all => all.map(one => one.offsetWidth)")
    assert sizes[0] > sizes[1] and sizes[0] == pytest.approx(42 * 0.9 ** 0.5, abs=1)


def test_what_stands_on_top(opened):
    """A label that would cover a later check-in's is hidden while it would; the star lies above all guesses, with the
    number of the one that it covers."""
    page = opened("one")
    page.evaluate("maps[0].setView(point(places.id.indexOf(5)), 16, { animate: false })")
    assert sorted(page.locator("#map0 .when:visible").all_inner_texts()) == ["10:00", "12:00"]
    page.get_by_role("button", name="All places").click()
    assert page.locator("#map0 .when:visible").all_inner_texts() == ["12:00"]
    heights = page.locator("#map0 .sign").evaluate_all(
        "all => all.map(one => [Number(one.style.zIndex), one.className])")
    assert "truth" in max(heights)[1] and page.locator("#map0 .truth").inner_text().split() == ["★", "1"]
    page.locator("#map0 .guess.hit").hover()        # through the star
    assert page.locator(".leaflet-tooltip:not(.when)").inner_text() == "1. Café 1, POI 1: 90.0 %, the truth"
    page.locator("#list").select_option("4")        # not ranked
    assert page.locator("#map0 .truth").inner_text() == "★"


def test_clicks_choose(opened):
    page = opened("one")
    page.get_by_role("button", name="Next").click()
    assert said(page).startswith("Pair 1, user 1")
    page.locator("#list").select_option("7")
    assert said(page).startswith("Pair 7, user 1")
    page.locator("#outcome").select_option(label="◐ near miss: 3")
    assert said(page).startswith("Pair 1, ") and page.locator("#count").inner_text() == "3 of 12 pairs"
    page.get_by_role("button", name="Show all pairs").click()
    assert page.locator("#count").inner_text() == "12 of 12 pairs"
    page.locator("#user").select_option(label="user 2: 4 pairs, 3 right")
    assert page.locator("#list option").count() == 4 and said(page).startswith("Pair 2, user 2")
    page.locator("#group").select_option(label="unseen: 3")
    assert page.locator("#count").inner_text() == f"{page.locator('#list option').count()} of 12 pairs"
    page.locator("#place").fill("99")
    page.locator("#place").press("Enter")
    assert said(page) == "No pair is like that: change the user, outcome, group or place."
    assert page.get_by_role("button", name="Next").is_disabled()


def test_a_click_on_a_place_chooses_its_pairs(opened):
    """Nobody has been at 11 in train, so nothing tells what it is."""
    page = opened("one")
    page.locator("#user").select_option(label="user 2: 4 pairs, 3 right")
    page.get_by_role("button", name="All places").click()
    page.evaluate("maps.forEach(map => map.shown.clearLayers())")       # the dot, not a sign above it
    page.mouse.click(*on_map(page, 11))
    assert said(page).startswith("Pair 10, user 1") and "The truth: unknown, POI 11." in said(page)
    assert page.locator("#count").inner_text() == "1 of 12 pairs" and page.locator("#user").input_value() == ""
    assert page.locator("#place").input_value() == "11"
    page.locator("#map0 .guess").first.click()      # a guess is a place, too: 3 is asked for in pair 2
    chosen = page.locator("#place").input_value()
    assert f"POI {chosen}." in said(page)


def test_keys_alone_are_enough(opened):
    """Every control is reached by Tab, and works by keys; the map moves and zooms."""
    page = opened("one")
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"user", "outcome", "group", "place", "all", "list", "next", "time", "map0", "near", "whole"} <= {
        name.split(" ")[0] for name in reached}
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    assert said(page).startswith("Pair 1, ")
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    assert said(page).startswith("Pair 2, ")
    before, zoom = centre(page), page.evaluate("maps[0].getZoom()")
    page.locator("#map0").focus()
    page.keyboard.press("ArrowRight")
    until(page, f"maps[0].getCenter().lng > {before['lng']}")
    page.keyboard.press("+")
    until(page, f"maps[0].getZoom() > {zoom}")


def test_the_slider_goes_through_the_users_pairs_in_time(opened):
    page = opened("one")
    slider = page.get_by_role("slider")
    for pair in (0, 3, 6, 9):       # user 0's, a day each
        assert said(page).startswith(f"Pair {pair}, user 0, ")
        assert slider.get_attribute("aria-valuetext").startswith(f"pair {pair // 3 + 1} of 4, ")
        assert page.locator("#list").input_value() == str(pair)
        slider.press("ArrowRight")
    assert said(page).startswith("Pair 9, ")
    slider.press("Home")
    assert said(page).startswith("Pair 0, ")


def test_two_runs_side_by_side(opened):
    """B has other ranks of pairs 3 (9 and 1) and 0 (1 and 2): these come first. The maps move together."""
    page = opened("two")
    assert said(page).startswith("Pair 3, user 0")
    assert "A: truth has rank 9" in said(page) and "B: truth has rank 1 (right)" in said(page)
    assert page.locator("#list option").nth(1).inner_text().startswith("A ● 1 B ◐ 2 · user 0")
    boxes = [page.locator(f"#map{i}").bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert page.locator("#map0 .guess.hit").inner_text() == "9" and page.locator("#map1 .guess.hit").inner_text() == "1"
    page.locator("#map1").focus()
    before = centre(page, 0)
    page.keyboard.press("ArrowUp")
    until(page, f"maps[0].getCenter().lat > {before['lat']}")
    until(page, "maps[0].getCenter().equals(maps[1].getCenter(), 1e-4) && maps[0].getZoom() === maps[1].getZoom()")
    page.locator("#compared").select_option(label="only B is right: 1")
    assert page.locator("#count").inner_text() == "1 of 12 pairs"
    page.locator("#compared").select_option(label="only A is right: 1")
    assert said(page).startswith("Pair 0, ")


@pytest.mark.parametrize("name", ["one", "two"])
def test_on_a_phone(opened, name):
    """Nothing is wider than the screen, the map is on the first, and a tap chooses."""
    page = opened(name, PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    box = page.locator("#map0").bounding_box()
    assert box["y"] + box["height"] / 2 < PHONE["height"] and box["width"] > 0.9 * PHONE["width"]
    assert not page.locator("#user").is_visible()
    page.get_by_role("button", name="Next").tap()
    page.get_by_text("Choose pairs").tap()
    page.locator("#user").select_option(label=f"user 1: 4 pairs, {sum(rank == 1 for rank in RANKS[1::3])} right")
    assert ", user 1, " in said(page)
    assert all(box["height"] >= 28 for box in (page.locator(f"#{i}").bounding_box() for i in (
        "user", "outcome", "next", "previous", "near")))
    page.get_by_role("button", name="All places").tap()
    page.evaluate("maps.forEach(map => map.shown.clearLayers())")
    page.locator("#map0").scroll_into_view_if_needed()
    page.touchscreen.tap(*on_map(page, 11))
    until(page, "document.getElementById('place').value === '11'")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_signs_differ_in_greyscale(opened):
    """Any two of the legend, as grey pictures of the same size."""
    page = opened("two")
    page.add_style_tag(content="html { filter: grayscale(1); }")
    signs = {}
    for row in page.locator("#legend li").all():
        picture = imread(io.BytesIO(row.locator(".box").screenshot()))
        signs[row.inner_text().strip()] = picture[:26, :26, :3].mean(axis=2)
    assert len(signs) == 10
    for (one, a), (other, b) in itertools.combinations(signs.items(), 2):
        assert np.abs(a - b).mean() > 0.005, (one, other)


def test_what_a_screen_reader_is_told(opened):
    """Each control has a name; what the map shows is said in words, politely, as it changes."""
    page = opened("one")
    for control in page.locator("select, input, button:visible, [tabindex='0']").all():
        name = control.evaluate("one => one.getAttribute('aria-label') || [...one.labels ?? []].map(label => "
                                "label.textContent).join('') || one.title || one.textContent")
        assert name.strip(), control.evaluate("one => one.outerHTML.slice(0, 200)")
    status = page.get_by_role("status")
    assert status.get_attribute("aria-live") == "polite" and status.inner_text() == said(page)
    assert "in the text above and the tables below" in page.locator("#map0").get_attribute("aria-label")
    assert page.locator("html").get_attribute("lang") == "en" and page.locator("h1").count() == 1
    snapshot = page.locator("body").aria_snapshot()
    for told in ('combobox "User"', 'combobox "Outcome"', 'combobox "Group"', "slider", 'listbox "Pairs"', "status"):
        assert told in snapshot
    assert 'combobox "Two runs"' not in snapshot


def test_hostile_names_are_text(opened):
    page = opened("hostile")
    page.locator("#map0 .guess").first.hover()
    page.wait_for_timeout(100)
    assert page.evaluate("window.harmed") is None and "evil.example/1.png" in said(page)
    assert page.locator("img").count() == 0


def test_what_is_lacking_is_said(opened):
    page = opened("bare")
    assert page.locator("#absent li").all_inner_texts() == ["Without history"]
    assert not page.locator("#group").is_visible() and page.locator("#map0 path.heat").count() == 0
    assert page.locator("#map0 path.trajectory").count() == 1       # test_sample.csv tells it
    assert said(page).startswith("Pair 0, user 0")
