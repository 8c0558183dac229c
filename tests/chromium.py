"""Debian's Chromium and Playwright, for tests in a browser, which are skipped where either is absent."""

import os
from pathlib import Path

import pytest

CHROMIUM = Path(os.environ.get('CHROMIUM', '/usr/bin/chromium'))
if not CHROMIUM.exists():
    pytest.skip(f'{CHROMIUM} is not here: apt-get install chromium', allow_module_level=True)
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not here: pip install it')
playwright.expect.set_options(timeout=20_000)
ARGS = (
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync', '--process-per-site',
    '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream',
)  # fmt: skip
