"""The page in a real browser; where gradio, playwright or a browser is missing, this is skipped."""

import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from convmixer_hub import DataError
from convmixer_hub.release import demo

from .conftest import IMAGES

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_gradio = pytest.mark.skipif(demo.find_spec("gradio") is None, reason="gradio is missing")


def wait_for(port, process):
    for _ in range(600):
        assert process.poll() is None, process.stderr.read()
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the page does not come up")


@pytest.fixture
def port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def page(port):
    """Open the page of `convmixer demo` in a browser; fail if it asks another machine."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no chromium")
    command = [sys.executable, "-m", "convmixer_hub", "demo", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(port, process)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            asked = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"http://127.0.0.1:{port}")
            yield page
            browser.close()
        others = [url for url in asked if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url)]
        assert not others
    finally:
        process.terminate()
        process.wait()


@needs_gradio
@pytest.mark.slow
def test_a_visitor_clicks_an_example_and_drops_a_broken_file(page, tmp_path):
    page.wait_for_selector("text=Drop, paste or choose a picture")
    assert page.get_by_text("Top-1 95.14 %").is_visible()
    page.locator(".gallery-item").nth(3).click()  # cat
    label = page.get_by_test_id("label-output-value")
    label.get_by_text("cat").wait_for(timeout=30_000)
    bars = page.get_by_test_id(re.compile(".*-confidence-set$"))
    assert bars.count() == 5

    (tmp_path / "broken.png").write_bytes((IMAGES / "dog.png").read_bytes()[:900])
    page.get_by_label("Remove Image").first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    page.get_by_text(re.compile(r"^broken.png: damaged image \(.*\); replace the file$")).wait_for()


@needs_gradio
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of gradio
def test_a_port_in_use_is_one_line(port):
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        with pytest.raises(DataError, match=f"^port {port} is in use; give another --port$"):
            demo.run_demo(["convmixer_cifar"], port)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="^the demo needs gradio: pip install gradio$"):
        demo.build_demo(["convmixer_cifar"])
