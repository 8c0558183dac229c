"""The report and the suspects in Debian's Chromium, at three widths, light and dark: nothing scrolls sideways
but tables and photos inside their boxes, contents lead to their sections, and a click on a heading sorts.

Skipped where the browser or Playwright is absent, as test_app_browser.py is.
"""

import pytest
from chromium import playwright
from test_app import make_output

from viewer import label_errors, report


@pytest.fixture(scope='module')
def pages(shapes, tmp_path_factory):
    """The addresses of both pages of a run."""
    output = make_output(shapes, tmp_path_factory.mktemp('report') / 'output')
    return [main('run', output).resolve().as_uri() for main in (report.main, label_errors.main)]


@pytest.fixture
def open_page(browser):
    """Open a page; at the end no script of it may have failed, and nothing been fetched."""
    contexts, faults = [], []

    def opened(address: str, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on('pageerror', lambda error: faults.append(str(error)))
        page.on('request', lambda request: faults.append(request.url) if request.url[:4] == 'http' else None)
        page.goto(address)
        return page

    yield opened
    assert not faults
    for context in contexts:
        context.close()


def fits(page, width: int) -> None:
    """Nothing is wider than the screen, but in a box that scrolls."""
    assert page.evaluate('document.documentElement.scrollWidth') == width
    wide = page.evaluate("""() => [...document.querySelectorAll('main *')].filter(one =>
        !one.closest('.scroll *, .views *, pre *') && one.getBoundingClientRect().right > innerWidth)
        .map(one => one.outerHTML.slice(0, 80))""")
    assert not wide


def leads_to_the_sections(page) -> None:
    links = page.locator('nav a')
    assert links.count() == page.locator('h2').count() > 1
    for number in (1, links.count() - 1):
        links.nth(number).click()
        title = page.get_by_role('heading', name=links.nth(number).inner_text(), exact=True)
        playwright.expect(title).to_be_in_viewport()


def test_pages_fit_lead_to_their_sections_and_are_dark_where_the_browser_is(pages, open_page):
    for address in pages:
        page = open_page(address)
        for width in (1440, 1024):
            page.set_viewport_size({'width': width, 'height': 844})
            fits(page, width)
        leads_to_the_sections(page)
        for scheme, light in (('light', True), ('dark', False)):
            page.emulate_media(color_scheme=scheme)
            paper, ink = (
                page.evaluate(f'getComputedStyle(document.body).{name}.match(/\\d+/)[0]')
                for name in ('backgroundColor', 'color')
            )
            assert (int(paper) > 200) == light and (int(ink) < 60) == light


def test_pages_fit_a_phone(pages, open_page):
    """A phone lays out a page without a viewport for 980 pixels; there a prediction is a swipe away."""
    size = {'width': 390, 'height': 844}
    for address in pages:
        page = open_page(address, viewport=size, is_mobile=True, has_touch=True)
        fits(page, 390)
        leads_to_the_sections(page)
        views = page.locator('.views').first
        assert views.evaluate('one => one.scrollWidth > one.clientWidth')
        page.get_by_role('link', name='Contents', exact=True).click()
        playwright.expect(page.locator('nav')).to_be_in_viewport()


def test_a_click_on_a_heading_sorts_its_column(pages, open_page):
    page = open_page(pages[0])
    table = page.locator('table.sortable').first

    def column(number: int, part: str = 'tbody') -> list[str]:
        return table.locator(f'{part} td:nth-child({number})').all_inner_texts()

    classes, foot = column(1), column(1, 'tfoot')
    assert foot == ['mIoU', 'pixel accuracy']
    head = table.get_by_role('button', name='fold 1')
    head.click()
    scores = [float(score) for score in column(5) if score != '-']
    assert scores == sorted(scores, reverse=True) != sorted(scores) and column(1) != classes
    head.press('Enter')
    assert [float(score) for score in column(5) if score != '-'] == sorted(scores)
    assert head.locator('..').get_attribute('aria-sort') == 'ascending'
    assert column(1, 'tfoot') == foot
    head.click()
    assert column(1) == classes and head.locator('..').get_attribute('aria-sort') is None
    table.get_by_role('button', name='class').click()
    assert column(1) == sorted(classes)
    page = open_page(pages[1])
    table = page.locator('table.sortable')
    pixels = column(4)
    table.get_by_role('button', name='pixels').click()
    table.get_by_role('button', name='pixels').click()
    numbers = [int(text.replace(',', '')) for text in column(4)]
    assert numbers == sorted(numbers) and sorted(column(4)) == sorted(pixels)
    name = table.get_by_role('link').last.inner_text()
    table.get_by_role('link').last.click()
    playwright.expect(page.locator('figure').filter(has_text=name).first).to_be_in_viewport()


def test_a_missing_value_is_last_in_either_order(open_page, tmp_path):
    from viewer.html_page import Section, html_table, write_page

    lines = [['a', 'b'], ['x', '-'], ['y', '2.50%'], ['z', '10.00%'], ['w', '']]
    write_page(tmp_path / 'p.html', 'p', '', [Section('s', html_table(lines))])
    page = open_page((tmp_path / 'p.html').as_uri())
    for expected in ('zyxw', 'yzxw', 'xyzw'):
        page.get_by_role('button', name='b').click()
        assert ''.join(page.locator('tbody td:first-child').all_inner_texts()) == expected


def test_without_scripts_a_page_lacks_only_the_sorting(pages, open_page):
    page = open_page(pages[0], java_script_enabled=False)
    assert page.get_by_role('button').count() == 0
    assert page.locator('th').first.inner_text() == 'class' and page.locator('figure').count() > 4
