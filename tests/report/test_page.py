"""The report as a browser shows it. Fails, rather than skips, where there is no Chromium."""

import pytest
import yaml
from browser import Browser
from made_records import METHODS, classes_folder, record, write

from peft_engine.bench.report import write_report

NASTY = "<script>nothing()</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = classes_folder(tmp_path_factory.mktemp("made"), methods={**METHODS, NASTY: (0.8, 0.09, 500, 7)})
    (folder / "failed").mkdir()
    (folder / "failed" / "dora-final-0-0.001-abcdef01.json").write_text('{"reason": "out of <b>memory</b>"}')
    return folder, write_report(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(browser, made):
    browser.look(1280)
    browser.open(made[0] / "report.html")
    return browser


def column(page, name):
    """Texts of a column of the main table, from top to bottom, of the rows that show."""
    return page.run(f"""(() => {{
        const table = document.getElementById("methods");
        const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.trim() === {name!r});
        return [...table.tBodies[0].rows].filter(row => row.offsetParent).map(row => row.cells[at].textContent);
    }})()""")


def click(page, name):
    page.run(f'[...document.querySelectorAll("#methods th button")].find(b => b.textContent === {name!r}).click()')


def test_it_shows_the_numbers(page, made):
    found = made[1]
    assert column(page, "method") == [row["name"] for row in found["results"]]
    for row, shown in zip(found["results"], column(page, "accuracy"), strict=True):
        one = row["train_info"]["metrics"]["accuracy"]
        assert shown == f"{one['mean']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
    claims = page.run('[...document.querySelectorAll("#claims li")].map(li => li.textContent)')
    assert [claim[1:] for claim in claims] == found["summary"]
    assert len(claims) == 3
    assert page.run('document.querySelectorAll("figure svg").length') == 6


def test_what_failed_is_named_as_text(page):
    assert "dora-final-0" in page.run('document.getElementById("faults").textContent')
    assert "out of <b>memory</b>" in page.run('document.getElementById("faults").textContent')


def test_a_method_named_script_is_text(page):
    assert page.run("document.title") == "Made-up results"
    assert NASTY in column(page, "method")
    assert page.run("document.scripts.length") == 1
    assert NASTY in page.run('[...document.querySelectorAll("svg text")].map(t => t.textContent).join(" ")')


def test_it_asks_for_nothing_and_complains_of_nothing(page, made):
    for name in ("method", "accuracy"):
        click(page, name)
    page.run("new Promise(done => setTimeout(done, 200))")
    assert page.requests() == [(made[0] / "report.html").resolve().as_uri()]
    assert page.complaints() == []


def test_complaints_and_requests_are_seen(browser, tmp_path):
    (tmp_path / "bad.html").write_text("<script>console.error('x'); nothing()</script><img src='there.png'>")
    browser.open(tmp_path / "bad.html")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert len(browser.requests()) == 2
    assert len(browser.complaints()) >= 2


@pytest.mark.parametrize(("name", "key"), [("step, ms", "step_seconds"), ("peak, MiB", "peak_bytes")])
def test_numbers_sort_as_numbers(page, made, name, key):
    by_size = [r["name"] for r in sorted(made[1]["results"], key=lambda r: r["train_info"][key]["median"])]
    click(page, name)
    assert column(page, "method") == by_size
    click(page, name)
    assert column(page, "method") == by_size[::-1]
    assert page.run('document.querySelectorAll("th[aria-sort=descending]").length') == 1


def test_names_sort_as_words_and_blanks_stay_last(page, made):
    click(page, "method")
    shown = column(page, "method")
    assert shown == page.run(f"{[row['name'] for row in made[1]['results']]!r}.sort((a, b) => a.localeCompare(b))")
    for _ in range(2):  # the reference has no difference from itself
        click(page, "minus full")
        assert column(page, "method")[-1] == "full"


def test_the_filter_hides_rows(page):
    def type_in(text):
        page.run(
            f'(() => {{ const f = document.getElementById("filter"); f.value = {text!r};'
            ' f.dispatchEvent(new Event("input")); })()'
        )

    type_in("LoRA")
    assert column(page, "method") == ["lora"]
    assert page.run('document.getElementById("count").textContent') == "1 of 5"
    type_in("")
    assert len(column(page, "method")) == 5


@pytest.mark.parametrize("dark", [False, True])
def test_text_of_plots_is_legible_in_both_themes(page, dark):
    """WCAG contrast of ink, labels, accents and memory parts on the page's ground: ≥ 4.5."""
    page.look(1280, dark)
    contrasts = page.run("""(() => {
        const bright = colour => {
            const [r, g, b] = colour.match(/\\d+/g).slice(0, 3).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const probe = document.body.appendChild(document.createElement("i"));
        const of = name => { probe.style.color = `var(--${name})`; return bright(getComputedStyle(probe).color); };
        const ground = bright(getComputedStyle(document.body).backgroundColor);
        const names = ["ink", "soft", "accent", "bad", "good", "part0", "part1", "part2", "part3"];
        return Object.fromEntries(names.map(name => {
            const it = of(name);
            return [name, (Math.max(it, ground) + 0.05) / (Math.min(it, ground) + 0.05)];
        }));
    })()""")
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}
    # the theme reaches the SVG
    drawn = page.run('getComputedStyle(document.querySelector("svg text")).fill')
    assert drawn == page.run("getComputedStyle(document.querySelector('figcaption')).color")


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_does_not_scroll_sideways(page, width):
    page.look(width)
    assert page.run("document.documentElement.scrollWidth") <= width


def test_it_prints(page, tmp_path):
    page.look(1280, dark=True)
    page.paper(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    page.ask("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run('document.getElementById("filter").offsetParent') is None
    page.ask("Emulation.setEmulatedMedia", media="")


def test_a_claim_that_misses_is_named_at_the_top(browser, tmp_path):
    slow = {**METHODS, "lora": (0.70, 0.099, 700, 600_000)}
    found = write_report(classes_folder(tmp_path, methods=slow))
    browser.open(tmp_path / "report.html")
    top = browser.run('document.querySelector("header").textContent')
    assert browser.run('document.querySelectorAll("#claims .missed").length') == 3
    for line in found["claims"]:
        assert [one["cell"] for one in line["cells"]] == ["lora/seed-0", "lora/seed-1", "lora/seed-2"]
        assert f"{line['value']:.3f}×" in top
        assert all(f"{one['cell']} {one['value']:.3f}×" in top for one in line["cells"])


def test_a_suite_of_one_method_is_a_page_too(browser, tmp_path):
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "one"}))
    write(tmp_path, record("lora", 0, {}, metrics_after={"accuracy": 0.5}))
    write_report(tmp_path)
    browser.open(tmp_path / "report.html")
    assert column(browser, "method") == ["lora"]
    assert browser.complaints() == []
