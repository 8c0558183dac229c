"""The app end to end: viz.py app in Debian's Chromium, driven by Playwright. Each page, each control, the
keyboard, the camera, and what is sent.

Skipped where either is absent: apt-get install chromium; pip install playwright. CHROMIUM may say where
it is.
"""

import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chromium import playwright
from conftest import TINY
from PIL import Image
from test_app import make_output
from test_train import LEARN

import train
from config import CLASSES, load_config
from utils.palette import PALETTE
from viewer.uploads import MAX_MEGABYTES

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (1440, 1024, 390)


@pytest.fixture(scope='module')
def app(shapes, shared_cache, tmp_path_factory):
    """The app's address and token: two runs of made predictions, and a small model that knows the shapes."""
    folder = tmp_path_factory.mktemp('browser')
    output = make_output(shapes, folder / 'output')
    values = {**TINY, **LEARN, 'epochs': 8, 'data_root': str(shapes), 'output_dir': str(output)}
    values['cache_dir'] = str(shared_cache)
    path = folder / 'learnt.yaml'
    path.write_text('\n'.join(f'{key}: {value}' for key, value in values.items()))
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    words = ['viz.py', 'app', '--port', str(port), '--data', str(shapes), '--output', str(output)]
    log = folder / 'log.txt'
    with log.open('w') as file:
        server = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file)
    try:
        train.main(load_config(path), 0)  # while the server starts
        until = time.monotonic() + 60
        while not (token := re.search(r'token=(\S+)', log.read_text())):
            assert time.monotonic() < until and server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}', token[1]
    finally:
        server.terminate()
        server.wait(20)
    assert 'Traceback' not in log.read_text()


@pytest.fixture(scope='module')
def server(app):
    """The app's address, for a page that has the cookie."""
    return app[0]


def cookie_of(address: str, token: str) -> dict[str, str]:
    return {'name': f'viewer-token-{address.rpartition(":")[2]}', 'value': token, 'url': address}


@pytest.fixture(scope='module')
def context(browser, app):
    """A browser context with the cookie; a page of the app stays open in it, so that each further page finds
    Streamlit's scripts compiled.
    """
    with browser.new_context(viewport={'width': 1400, 'height': 900}) as context:
        context.set_default_timeout(20_000)
        context.add_cookies([cookie_of(*app)])
        context.new_page().goto(f'{app[0]}/photos')
        yield context


@contextmanager
def opened(context):
    """Open a page; at the end it shows no traceback, and none of its scripts has failed."""
    page, faults = context.new_page(), []
    page.on('pageerror', lambda error: faults.append(str(error)))
    page.on('dialog', lambda dialog: faults.append(dialog.message))
    yield page
    assert page.get_by_test_id('stException').count() == 0 and not faults, faults
    page.close()


@pytest.fixture
def page(context):
    with opened(context) as page:
        yield page


def expect(found):
    return playwright.expect(found)


def pick(page, label: str, option: str) -> None:
    """Chooses in a box with a list; what scrolls or is drawn anew meanwhile closes the list, so that it is
    opened again.
    """
    box = page.get_by_role('combobox', name=label, exact=True)
    found = page.get_by_role('option', name=option, exact=True)
    box.scroll_into_view_if_needed()
    for _ in range(5):
        box.press('ArrowDown')
        with suppress(playwright.TimeoutError):
            found.click(timeout=2000)
            return
    found.click()


def shows(page, name: str, *views: str) -> None:
    """Waits until these views of a photo, and no others, are there, each drawn."""
    for view in views:
        expect(page.get_by_alt_text(f'{name}: {view}')).to_be_visible()
    images = page.get_by_alt_text(re.compile(r'\.jpg: '))
    expect(images).to_have_count(len(views))
    page.wait_for_function('() => [...document.images].every(one => one.complete && one.naturalWidth > 99)')


# --- the first page -----------------------------------------------------------------------------------------


def test_first_page(server, page):
    page.goto(f'{server}/runs')
    expect(page.get_by_role('heading', name='Runs')).to_be_visible()
    expect(page).to_have_url(f'{server}/')
    rows = page.get_by_role('row')
    expect(rows.filter(has_text='0 1 of 2')).to_have_count(2)
    expect(rows.filter(has_text='test_resnet')).to_contain_text('0 of 2')
    expect(page.get_by_text('learnt: fold 0 has no out-of-fold predictions yet')).to_be_visible()
    curves = page.get_by_test_id('stVegaLiteChart')
    expect(curves).to_have_count(2)
    expect(curves.first).to_contain_text('learnt')
    page.get_by_text('One line per fold').click()
    expect(curves.first).to_contain_text('second fold 1')
    expect(page.locator('.confusion [title^="Metal predicted as Background"]')).to_have_text('100.0')
    head = page.get_by_role('button', name='out-of-fold mIoU')
    head.click()
    expect(head.locator('..')).to_have_attribute('aria-sort', 'descending')
    pick(page, 'Run', 'run')
    expect(head.locator('..')).to_have_attribute('aria-sort', 'descending')
    cell = page.locator('.confusion [title^="Metal predicted as Glass"]')
    page.evaluate('navigator.clipboard.writeText = async (text) => { window.copied = text }')
    page.locator('.copies button').first.click()
    expect(page.locator('.copies button').first).to_have_text('copied')
    assert page.evaluate('window.copied').startswith('python')  # of learnt, which pytest trained
    cell.click()
    expect(page.locator('.grid img').first).to_be_visible()
    assert 'runs=run&class=Metal&predicted=Glass' in page.url
    expect(page.get_by_text('such pixels').first).to_be_visible()
    page.reload()  # as a shared link
    expect(page.get_by_text('such pixels').first).to_be_visible()
    expect(page.get_by_role('combobox', name='Predicted as')).to_have_value('Glass')
    expect(page.get_by_role('combobox', name='Thumbnails show')).to_have_value('run')


def test_the_address_with_the_token(app, browser):
    """A link to it may be followed; it becomes a cookie, and bookmarks of inner pages work."""
    address, token = app
    with browser.new_context() as context, opened(context) as page:
        assert page.goto(f'{address}/photos').status == 403
        expect(page.get_by_text('at the address that viz.py app printed')).to_be_visible()
        page.goto(f'data:text/html,<a href="{address}/photos?token={token}">a link on another site</a>')
        page.get_by_role('link').click()
        expect(page).to_have_url(f'{address}/photos')
        expect(page.locator('.grid img')).to_have_count(24, timeout=60_000)  # the first page of the server
        (cookie,) = (one for one in page.context.cookies() if one['value'] == token)
        assert cookie['httpOnly'] and cookie['sameSite'] == 'Strict'
        assert page.goto(f'{address}/sort').status == 200
        expect(page.get_by_role('heading', name='Sort it for me')).to_be_visible()


def test_a_page_on_another_port_reads_nothing(app, browser, tmp_path):
    """The browser sends it the cookie of the host; the guard refuses it all the same."""
    address, statuses = app[0], []
    page = browser.new_page()
    page.context.add_cookies([cookie_of(*app)])
    page.on(
        'response', lambda answer: statuses.append(answer.status) if answer.url.startswith(address) else 0
    )
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page.goto(f'http://127.0.0.1:{other.server_port}')
        opened = page.evaluate(
            """async address => {
                const frame = document.body.appendChild(document.createElement('iframe'))
                frame.src = address
                await new Promise(done => { frame.onload = done })
                for (const mode of ['cors', 'no-cors'])
                    await fetch(address + '/favicon.png', {mode, credentials: 'include'}).catch(() => 0)
                const stream = new WebSocket(address.replace('http', 'ws') + '/_stcore/stream', ['streamlit'])
                return await new Promise(done => {
                    stream.onopen = () => done(true)
                    stream.onerror = () => done(false)
                })
            }""",
            address,
        )
        other.shutdown()
    page.close()
    assert not opened and len(statuses) >= 2 and set(statuses) == {403}, statuses


# --- photos -------------------------------------------------------------------------------------------------


VIEWS = ('photo', 'truth', 'run', 'second', 'where they differ')


def test_photos_by_buttons_and_keys(server, page):
    page.goto(server)
    page.get_by_role('link', name='Photos').click()
    expect(page.locator('.grid img')).to_have_count(24)
    page.locator('.grid a').first.click()
    shows(page, '0000.jpg', *VIEWS)
    assert 'photo=batch_01' in page.url
    number = page.get_by_label('Go to (1 to 24)')
    expect(number).to_have_value('1')
    expect(page.get_by_role('button', name='Previous')).to_be_disabled()
    page.get_by_role('button', name='Next').click()
    expect(number).to_have_value('2')
    page.keyboard.press('ArrowRight')
    expect(number).to_have_value('3')
    page.keyboard.press('ArrowLeft')
    expect(number).to_have_value('2')
    shows(page, '0001.jpg', *VIEWS)
    page.reload()  # as a shared link
    shows(page, '0001.jpg', *VIEWS)
    number.fill('24')
    number.press('Enter')
    expect(page.get_by_role('button', name='Next')).to_be_disabled()
    shows(page, '0023.jpg', *VIEWS)
    number.press('ArrowLeft')  # in the number itself the keys move the cursor
    expect(number).to_have_value('24')
    page.locator('.keys').click()
    page.keyboard.press('g')
    expect(page.locator('.grid img')).to_have_count(24)


def opaque(page, view: int) -> int:
    """How many pixels of the masks of a view are drawn."""
    canvas = page.locator('.viewer canvas').nth(view)
    return canvas.evaluate(
        """one => { const { data } = one.getContext('2d').getImageData(0, 0, one.width, one.height);
        return data.filter((value, n) => n % 4 == 3 && value > 0).length }"""
    )


def test_views_name_what_is_hovered_and_the_legend_isolates_a_class(server, page):
    page.goto(f'{server}/photos?photo=batch_01/0003.jpg')
    shows(page, '0003.jpg', *VIEWS)
    legend = page.locator('.legend .swatch')
    expect(legend).to_have_count(len(CLASSES) - 1)
    colours = legend.evaluate_all('all => all.map(one => getComputedStyle(one).backgroundColor)')
    assert colours == ['rgb({}, {}, {})'.format(*PALETTE[k]) for k in range(1, len(CLASSES))]
    name = page.locator('.viewer figure').nth(1).locator('.name').first
    expect(name).to_be_visible()
    category = name.text_content()
    box = name.bounding_box()
    page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)
    expect(page.locator('.viewer .tip:visible')).to_contain_text(f'truth: {category}')
    expect(page.locator('.viewer .tip:visible')).to_contain_text('second: ')
    expect(page.locator('.viewer .here:visible')).to_have_count(len(VIEWS) - 1)
    everything = opaque(page, 1)
    button = page.locator('.legend').get_by_role('button', name=category, exact=True)
    button.click()
    expect(button).to_have_attribute('aria-pressed', 'true')
    assert 0 < opaque(page, 1) < everything
    assert set(page.locator('.viewer .name:visible').all_text_contents()) == {category}
    page.keyboard.press('Escape')
    expect(button).to_have_attribute('aria-pressed', 'false')
    assert opaque(page, 1) == everything
    page.keyboard.press('n')
    expect(page.locator('.viewer .name:visible')).to_have_count(0)
    page.keyboard.press('m')
    expect(page.locator('.viewer canvas:visible')).to_have_count(0)
    page.keyboard.press('m')
    slider = page.locator('.viewer input[type=range]')
    slider.focus()
    page.keyboard.press('End')
    page.wait_for_function("JSON.parse(sessionStorage['photo-views']).opacity == 1")
    page.locator('.viewer .picture').nth(1).click()
    expect(page.locator('.viewer figure.large')).to_have_count(1)
    pick(page, 'Colours', "the contest's")
    expect(legend.nth(3)).to_have_css('background-color', 'rgb(128, 0, 0)')


def transform(page, view: int) -> list[float]:
    """How often the photo of a view is enlarged, and where its corner is then, in pixels of the page."""
    image = page.locator('.frame img').nth(view)
    text = image.evaluate("""async one => { await new Promise(done => requestAnimationFrame(() =>
        requestAnimationFrame(done))); return getComputedStyle(one).transform }""")
    return [float(text[7:-1].split(',')[n]) for n in (0, 4, 5)]


def test_zoom_at_the_pointer_in_all_views(server, page):
    page.goto(f'{server}/photos?photo=batch_01/0003.jpg')
    shows(page, '0003.jpg', *VIEWS)
    fit = [1, 0, 0]
    box = page.locator('.picture').nth(1).bounding_box()
    left, top, side = box['x'], box['y'], box['width']
    page.mouse.move(left + side / 4, top + side / 2)
    page.mouse.wheel(0, -800)
    zoom, x, y = transform(page, 1)
    assert zoom == pytest.approx(2.718**1.6, rel=0.01)
    assert [x, y] == pytest.approx([(1 - zoom) * side / 4, (1 - zoom) * side / 2], abs=4)
    assert transform(page, 3) == pytest.approx(transform(page, 1), abs=0.1)
    expect(page.locator('.frame img').first).to_have_css('image-rendering', 'pixelated')
    page.mouse.down()
    page.mouse.move(left + side / 4 + 30, top + side / 2 + 20)
    page.mouse.up()
    assert transform(page, 0) == pytest.approx([zoom, x + 30, y + 20], abs=1)
    expect(page.locator('figure.large')).to_have_count(0)  # that was no click
    page.mouse.dblclick(left + side / 4, top + side / 4)
    assert transform(page, 1) == fit
    for _ in range(9):
        page.keyboard.press('+')
    zoom, *_ = transform(page, 2)
    assert zoom == pytest.approx(32 * 256 / side, rel=0.01)  # as far as one goes
    page.keyboard.press('0')
    page.mouse.wheel(0, 100)  # scrolls the page
    assert transform(page, 2) == fit


def test_errors_alone(server, page):
    """Metal, which one run took for glass and the other missed; what is missed is striped."""
    page.goto(f'{server}/photos?photo=batch_01/0001.jpg')
    shows(page, '0001.jpg', *VIEWS)
    names = page.locator('.viewer figure').nth(2).locator('.name')
    until = time.monotonic() + 20
    while not (all_classes := [opaque(page, view) for view in (1, 2, 3)])[-1]:
        assert time.monotonic() < until
    differ = opaque(page, 4)
    page.keyboard.press('e')
    expect(page.get_by_label('Errors alone')).to_be_checked()
    expect(names.first).to_be_hidden()
    truth, taken, missed = (opaque(page, view) for view in (1, 2, 3))
    assert opaque(page, 4) == differ
    assert truth == all_classes[0] and 0 < missed < taken < all_classes[1]
    page.locator('.legend').get_by_role('button', name='Metal', exact=True).click()
    assert opaque(page, 2) == opaque(page, 3) == missed
    page.keyboard.press('Escape')
    page.keyboard.press('e')
    assert [opaque(page, view) for view in (1, 2, 3)] == all_classes


def widths(page):
    """Make a page narrower; nothing on it may be wider than the screen."""
    for width in WIDTHS:
        page.set_viewport_size({'width': width, 'height': 844})
        page.wait_for_function('document.documentElement.scrollWidth <= innerWidth')
        yield width


def is_dark_where_the_browser_is(page) -> None:
    """Check both themes of a page, as a system that changes its own does."""
    for theme, dark in (('light', False), ('dark', True)):
        page.emulate_media(color_scheme=theme)
        page.wait_for_function(
            """dark => { const style = getComputedStyle(document.querySelector('.stApp'));
            const red = (colour) => Number(colour.match(/\\d+/)[0]);
            return (red(style.backgroundColor) < red(style.color)) == dark }""",
            arg=dark,
        )


def test_first_page_fits_any_screen(server, page):
    page.goto(server)
    expect(page.locator('.confusion')).to_be_visible()
    is_dark_where_the_browser_is(page)
    assert [*widths(page)]


def test_photos_fit_any_screen(server, page):
    page.goto(f'{server}/photos')
    expect(page.locator('.grid img')).to_have_count(24)
    is_dark_where_the_browser_is(page)
    for _ in widths(page):
        boxes = [page.locator('.grid a').nth(n).bounding_box() for n in range(6)]
        columns = sum(box['y'] == boxes[0]['y'] for box in boxes)
        assert columns >= 3 and min(box['width'] for box in boxes) > 100


def test_a_photo_fits_any_screen(server, page):
    page.goto(f'{server}/photos?photo=batch_01/0003.jpg')
    shows(page, '0003.jpg', *VIEWS)
    is_dark_where_the_browser_is(page)
    tabs = page.locator('.tabs button')
    for width in widths(page):
        expect(tabs.first).to_be_visible(visible=width == 390)
        first, second = (page.locator('.viewer figure').nth(n).bounding_box() for n in (0, 1))
        assert second['x'] > first['x'] and second['y'] == first['y']
    page.reload()  # as a phone opens it: one view fills the screen, a swipe leads to the next
    shows(page, '0003.jpg', *VIEWS)
    expect(tabs.first).to_be_visible()
    first = page.locator('.viewer figure').first.bounding_box()
    assert first['width'] > 300 and not page.evaluate('document.documentElement.scrollWidth > innerWidth')
    page.locator('.views').evaluate('one => one.scrollTo({ left: 2 * one.clientWidth })')
    expect(tabs.nth(2)).to_have_attribute('aria-pressed', 'true')
    page.get_by_role('button', name='Next').click()  # the same view of the next photo
    shows(page, '0004.jpg', *VIEWS)
    expect(tabs.nth(2)).to_have_attribute('aria-pressed', 'true')
    assert abs(page.get_by_alt_text('0004.jpg: run').bounding_box()['x'] - first['x']) < 2
    box = page.locator('.picture').nth(2).bounding_box()
    middle, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    touch = page.context.new_cdp_session(page)
    touch.send('Emulation.setTouchEmulationEnabled', {'enabled': True})
    for kind, apart in (('Start', 40), ('Move', 80), ('Move', 120), ('End', None)):
        points = [{'x': middle + side * apart, 'y': y, 'id': side} for side in (-1, 1)] if apart else []
        touch.send('Input.dispatchTouchEvent', {'type': f'touch{kind}', 'touchPoints': points})
    assert transform(page, 2) == pytest.approx([3, -box['width'], -box['height']], abs=3)
    expect(tabs.nth(2)).to_have_attribute('aria-pressed', 'true')


def test_photos_controls(server, page):
    page.goto(f'{server}/photos?photo=batch_01/0000.jpg')
    shows(page, '0000.jpg', *VIEWS)
    predictions = page.get_by_role('combobox', name='Predictions out of fold')
    predictions.press('Backspace')  # without the last of them
    shows(page, '0000.jpg', 'photo', 'truth', 'run')
    expect(page.get_by_role('row').filter(has_text='IoU in this photo')).to_have_count(1)
    expect(page.get_by_role('columnheader', name='second')).to_have_count(0)
    page.get_by_label('Name contains').fill('/001')
    page.get_by_label('Name contains').press('Enter')
    expect(page.locator('.grid a')).to_have_count(10)
    page.get_by_label('Name contains').fill('')
    page.get_by_label('Name contains').press('Enter')
    expect(page.locator('.grid a')).to_have_count(24)
    pick(page, 'Fold', '1')
    expect(page.locator('.grid a')).to_have_count(12)
    page.get_by_label('Name contains').fill('nowhere')
    page.get_by_label('Name contains').press('Enter')
    page.get_by_role('button', name='Clear the filters').click()
    expect(page.locator('.grid a')).to_have_count(24)
    assert 'fold' not in page.url and 'name' not in page.url
    pick(page, 'Class', 'Metal')
    pick(page, 'Order', 'lowest score')
    expect(page.get_by_text('IoU of Metal 0.0000').first).to_be_visible()
    pick(page, 'Class', 'any')
    pick(page, 'Order', 'highest score')
    expect(page.get_by_text('mIoU 1.0000').first).to_be_visible()
    page.get_by_text('test', exact=True).click()
    expect(page.locator('.grid a')).to_have_count(6)
    pick(page, 'Order', 'disagreement')
    expect(page.get_by_text('differ on 100.00%').first).to_be_visible()
    page.locator('.grid a').first.click()
    expect(page.get_by_alt_text('where they differ: 100.00%', exact=False)).to_be_visible()


# --- sorting ------------------------------------------------------------------------------------------------


def send(page, name: str, content: bytes, kind: str = 'image/jpeg') -> None:
    file = {'name': name, 'mimeType': kind, 'buffer': content}
    page.locator('input[type=file]').set_input_files(file)


def test_sorting_a_photo_of_ones_own(server, page, shapes):
    page.goto(f'{server}/sort')
    expect(page.get_by_role('heading', name='Sort it for me')).to_be_visible()
    name = '<b>x</b>&*a*.jpg'
    send(page, name, (shapes / 'batch_01/0000.jpg').read_bytes())
    result = page.get_by_alt_text(name, exact=False)
    expect(result).to_be_visible(timeout=60_000)
    cards = page.locator('.bin')
    expect(cards.first).to_contain_text(re.compile(r'1 [A-Z][A-Za-z ]+, \d+% sure'))
    pieces = int(re.search(r'with (\d+) pieces', result.get_attribute('alt'))[1])
    assert pieces == page.locator('.bin li').count()
    expect(page.get_by_text(f'{name}, 256 × 256: learnt, fold0')).to_be_visible()  # as it is, not as HTML
    before = result.get_attribute('src')
    page.get_by_test_id('stSlider').filter(has_text='Opacity').get_by_role('slider').focus()
    page.keyboard.press('ArrowLeft')
    expect(result).not_to_have_attribute('src', before)


def test_sorting_in_the_language_of_the_browser_on_any_screen(app, browser, shapes):
    size = {'width': 390, 'height': 900}
    with (
        browser.new_context(viewport=size, color_scheme='dark', locale='ko-KR') as context,
        opened(context) as page,
    ):
        context.add_cookies([cookie_of(*app)])
        page.goto(f'{app[0]}/sort')
        expect(page.get_by_role('heading', name='어디에 버릴까요?')).to_be_visible()
        send(page, 'mine.jpg', (shapes / 'batch_01/0000.jpg').read_bytes())
        cards = page.locator('.bin')
        expect(cards.first).to_contain_text(re.compile(r'1 [가-힣 ]+, 확신도 \d+%'), timeout=60_000)
        expect(cards.first.locator('p')).to_contain_text(re.compile('[가-힣]'))
        assert page.evaluate('document.documentElement.scrollWidth') <= size['width']
        page.get_by_test_id('stExpandSidebarButton').click()
        threshold = page.get_by_test_id('stSlider').filter(has_text='기준').get_by_role('slider')
        threshold.press('End')
        expect(threshold).to_have_value('1')
        expect(cards).to_have_count(1)
        expect(cards).to_contain_text('확실하지 않음 (확신도 100% 미만)')
        threshold.press('Home')
        expect(page.get_by_text('확실하지 않음 (')).to_have_count(0)
        page.get_by_text('English', exact=True).click()
        expect(page.get_by_role('heading', name='Sort it for me')).to_be_attached()
        expect(cards.first).to_contain_text(re.compile(r'1 [A-Z][A-Za-z ]+, \d+% sure'))
        expect(page.get_by_test_id('stFileUploader')).to_contain_text('mine.jpg')  # the photo stays
        is_dark_where_the_browser_is(page)
        assert [*widths(page)]


def test_sorting_a_photo_of_the_camera_and_of_the_data_set(server, page):
    page.goto(f'{server}/sort')
    page.get_by_text('Use a test photo').click()
    expect(page.get_by_alt_text(re.compile('0024.jpg, with'))).to_be_visible(timeout=60_000)
    pick(page, 'Test photo', 'batch_01/0025.jpg')
    expect(page.get_by_alt_text(re.compile('0025.jpg, with'))).to_be_visible()
    page.get_by_text('Take a photo', exact=True).click()
    page.wait_for_function('() => document.querySelector("video")?.readyState >= 2')
    for _ in range(5):  # while the page finds its width, Streamlit opens the camera anew, and a click is lost
        page.get_by_role('button', name='Take Photo').click()
        with suppress(playwright.TimeoutError):
            page.get_by_role('button', name='Clear photo').wait_for(timeout=3000)
            break
    expect(page.get_by_alt_text(re.compile('with .* pieces'))).to_be_visible()


def test_sorting_refuses_bad_uploads_in_one_line(server, page, tmp_path):
    page.goto(f'{server}/sort')
    alert = page.get_by_test_id('stAlert')
    send(page, 'no<i>te</i>.jpg', b'this is no photo')
    expect(alert).to_have_text('no<i>te</i>.jpg: cannot be decoded, expected an image: JPEG, PNG, WEBP, BMP')
    Image.new('1', (12_000, 8_000)).save(tmp_path / 'bomb.png')
    send(page, 'bomb.png', (tmp_path / 'bomb.png').read_bytes(), 'image/png')
    expect(alert).to_have_text(
        'bomb.png: found 8000x12000 pixels, expected at most 20,000 a side and 64 million in all'
    )
    (tmp_path / 'large.jpg').write_bytes(bytes(MAX_MEGABYTES * 2**20 + 1))
    page.locator('input[type=file]').set_input_files(tmp_path / 'large.jpg')
    uploader = page.get_by_test_id('stFileUploader')
    expect(uploader).to_contain_text(f'File must be {MAX_MEGABYTES}.0MB or smaller.')
    send(page, 'page.html', b'<script>alert(1)</script>', 'text/html')
    expect(uploader).to_contain_text('files are not allowed')
    assert page.locator('.bin').count() == 0
