"""The app end to end: viz.py app in Debian's Chromium, driven by Playwright. Each page, each control, the
keyboard, the camera, and what is sent.

Skipped where either is absent: apt-get install chromium; pip install playwright. CHROMIUM may say where
it is.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image
from test_app import make_output
from test_train import LEARN

import train
from config import CLASSES, load_config
from utils.plotting import PALETTE
from viewer.uploads import MAX_MEGABYTES

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = Path(os.environ.get('CHROMIUM', '/usr/bin/chromium'))
if not CHROMIUM.exists():
    pytest.skip(f'{CHROMIUM} is not here: apt-get install chromium', allow_module_level=True)
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not here: pip install it')
playwright.expect.set_options(timeout=20_000)
ARGS = (
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync',
    '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream',
)  # fmt: skip


@pytest.fixture(scope='module')
def server(shapes, shared_cache, tmp_path_factory):
    """The app's address: two runs of made predictions, and a small model that knows the shapes."""
    folder = tmp_path_factory.mktemp('browser')
    output = make_output(shapes, folder / 'output')
    values = {**TINY, **LEARN, 'epochs': 8, 'data_root': str(shapes), 'output_dir': str(output)}
    values['cache_dir'] = str(shared_cache)
    path = folder / 'learnt.yaml'
    path.write_text('\n'.join(f'{key}: {value}' for key, value in values.items()))
    train.main(load_config(path), 0)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    words = ['viz.py', 'app', '--port', str(port), '--data', str(shapes), '--output', str(output)]
    log = folder / 'log.txt'
    with log.open('w') as file:
        server = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/_stcore/health', timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        server.wait(20)
    assert 'Traceback' not in log.read_text()


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as drivers:
        browser = drivers.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={'width': 1400, 'height': 900})
    page.set_default_timeout(20_000)
    faults = []
    page.on('pageerror', lambda error: faults.append(str(error)))
    page.on('dialog', lambda dialog: faults.append(dialog.message))
    yield page
    assert page.get_by_test_id('stException').count() == 0 and not faults, faults
    page.close()


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
    page.goto(server)
    expect(page.get_by_role('heading', name='Runs')).to_be_visible()
    rows = page.get_by_role('row')
    expect(rows.filter(has_text='0 1 of 2')).to_have_count(2)
    expect(rows.filter(has_text='test_resnet')).to_contain_text('0 of 2')
    expect(page.get_by_text('learnt: fold 0 has no out-of-fold predictions yet')).to_be_visible()
    curves = page.get_by_test_id('stVegaLiteChart')
    expect(curves).to_have_count(2)
    expect(curves.first).to_contain_text('learnt')
    page.get_by_text('One line per fold').click()
    expect(curves.first).to_contain_text('second fold 1')
    expect(page.get_by_alt_text('confusion matrix of second', exact=False)).to_be_visible()
    pick(page, 'Run', 'run')
    expect(page.get_by_alt_text('confusion matrix of run', exact=False)).to_be_visible()


# --- photos -------------------------------------------------------------------------------------------------


def test_photos_by_buttons_and_keys(server, page):
    page.goto(server)
    page.get_by_role('link', name='Photos').click()
    shows(page, '0000.jpg', 'photo', 'truth', 'run', 'second', 'where they differ')
    number = page.get_by_label('Go to (1 to 24)')
    expect(number).to_have_value('1')
    expect(page.get_by_role('button', name='Previous')).to_be_disabled()
    page.get_by_role('button', name='Next').click()
    expect(number).to_have_value('2')
    page.keyboard.press('ArrowRight')
    expect(number).to_have_value('3')
    page.keyboard.press('ArrowRight')
    expect(number).to_have_value('4')
    page.keyboard.press('ArrowLeft')
    expect(number).to_have_value('3')
    page.get_by_role('button', name='Previous').click()
    expect(number).to_have_value('2')
    shows(page, '0001.jpg', 'photo', 'truth', 'run', 'second', 'where they differ')
    number.fill('24')
    number.press('Enter')
    expect(page.get_by_role('button', name='Next')).to_be_disabled()
    shows(page, '0023.jpg', 'photo', 'truth', 'run', 'second', 'where they differ')
    number.press('ArrowLeft')  # in the number itself the keys move the cursor
    pick(page, 'File name', 'batch_01/0009.jpg')
    expect(number).to_have_value('10')
    page.get_by_role('link', name='Runs').click()
    expect(page.get_by_role('heading', name='Runs')).to_be_visible()
    page.get_by_role('link', name='Photos').click()
    expect(number).to_have_value('10')  # where it was left


def test_photos_controls(server, page):
    page.goto(f'{server}/photos')
    shows(page, '0000.jpg', 'photo', 'truth', 'run', 'second', 'where they differ')
    legend = page.locator('.legend .swatch')
    expect(legend).to_have_count(len(CLASSES) - 1)
    colours = legend.evaluate_all('all => all.map(one => getComputedStyle(one).backgroundColor)')
    assert colours == ['rgb({}, {}, {})'.format(*PALETTE[k]) for k in range(1, len(CLASSES))]
    view = page.get_by_alt_text(re.compile('0000.jpg: run'))
    before = view.get_attribute('src')
    slider = page.get_by_test_id('stSlider').get_by_role('slider')
    slider.focus()
    page.keyboard.press('ArrowRight')
    expect(page.get_by_test_id('stSlider')).to_contain_text('0.65')
    expect(view).not_to_have_attribute('src', before)
    expect(page.get_by_label('Go to (1 to 24)')).to_have_value('1')  # the slider's key is not the photo's
    predictions = page.get_by_role('combobox', name='Predictions out of fold')
    predictions.press('Backspace')  # without the last of them
    shows(page, '0000.jpg', 'photo', 'truth', 'run')
    expect(page.get_by_role('row').filter(has_text='IoU in this photo')).to_have_count(1)
    expect(page.get_by_role('columnheader', name='second')).to_have_count(0)
    page.get_by_label('Name contains').fill('/001')
    page.get_by_label('Name contains').press('Enter')
    expect(page.get_by_label('Go to (1 to 10)')).to_have_value('1')
    page.get_by_label('Name contains').fill('')
    page.get_by_label('Name contains').press('Enter')
    pick(page, 'Fold', '1')
    shows(page, '0001.jpg', 'photo', 'truth', 'run')
    pick(page, 'Class', 'Metal')
    pick(page, 'Order', 'lowest score')
    expect(page.get_by_text('IoU of Metal of run 0.0000')).to_be_visible()
    pick(page, 'Class', 'any')
    pick(page, 'Order', 'highest score')
    expect(page.get_by_text('mIoU of run 1.0000')).to_be_visible()
    page.get_by_text('test', exact=True).click()
    shows(page, '0024.jpg', 'photo', 'run/fold0', 'submission.csv', 'where they differ')
    pick(page, 'Order', 'disagreement')
    expect(page.get_by_text('the runs differ on 100.00%')).to_be_visible()


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
    expect(cards.first).to_contain_text(re.compile(r'1 [A-Z][a-z ]+, \d+% sure'))
    pieces = int(re.search(r'with (\d+) pieces', result.get_attribute('alt'))[1])
    assert pieces == page.locator('.bin li').count()
    expect(page.get_by_text(f'{name}, 256 × 256: learnt, fold0')).to_be_visible()  # as it is, not as HTML
    before = result.get_attribute('src')
    page.get_by_test_id('stSlider').get_by_role('slider').focus()
    page.keyboard.press('ArrowLeft')
    expect(result).not_to_have_attribute('src', before)


def test_sorting_a_photo_of_the_camera_and_of_the_data_set(server, page):
    page.goto(f'{server}/sort')
    page.get_by_text('Use a test photo').click()
    expect(page.get_by_alt_text(re.compile('0024.jpg, with'))).to_be_visible(timeout=60_000)
    pick(page, 'Test photo', 'batch_01/0025.jpg')
    expect(page.get_by_alt_text(re.compile('0025.jpg, with'))).to_be_visible()
    page.get_by_text('Take a photo', exact=True).click()
    page.wait_for_function('() => document.querySelector("video")?.readyState >= 2')
    page.get_by_role('button', name='Take Photo').click()
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
    send(page, 'large.jpg', bytes(MAX_MEGABYTES * 2**20 + 1))
    uploader = page.get_by_test_id('stFileUploader')
    expect(uploader).to_contain_text(f'File must be {MAX_MEGABYTES}.0MB or smaller.')
    send(page, 'page.html', b'<script>alert(1)</script>', 'text/html')
    expect(uploader).to_contain_text('files are not allowed')
    assert page.locator('.bin').count() == 0
