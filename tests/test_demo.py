"""The page in a real browser; where gradio, playwright or a browser is missing, it is skipped."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from convmixer_hub import ConvMixerHubError
from convmixer_hub.release import demo

from .conftest import IMAGES, convmixer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(params=["served", "Space"])
def page(request, port, tmp_path, monkeypatch):
    """Open the page of `convmixer demo` in a browser; fail if it asks another machine."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no chromium")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.delenv("NO_PROXY")
    command, folder = [sys.executable, "-m", "convmixer_hub", "demo", "--port", str(port)], None
    if request.param == "Space":
        folder = tmp_path / "space"
        result = convmixer("demo", "convmixer_cifar", "--write", folder)
        assert f"hf upload OWNER/NAME {folder} --repo-type space" in result.output
        monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
        command = [sys.executable, "app.py"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        with socket.socket() as client:
            while client.connect_ex(("127.0.0.1", port)):
                running = process.poll() is None and time.monotonic() < deadline
                assert running, (tmp_path / "log").read_text()
                time.sleep(0.1)
        with sync_api.sync_playwright() as playwright:
            options = ["--no-sandbox", "--no-proxy-server"]
            browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
            page = browser.new_page()
            asked = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"http://127.0.0.1:{port}")
            yield page
            browser.close()
        others = [url for url in asked if not re.match(r"http://127\.0\.0\.1:|data:|blob:", url)]
        assert not others
    finally:
        process.send_signal(signal.SIGINT)  # Ctrl-C
        process.wait()
    assert not list(tmp_path.rglob("broken.png"))  # nor any other picture
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines.pop(0) == f"http://{'0.0.0.0' if folder else '127.0.0.1'}:{port}"
    assert all("closing server" in line for line in lines)  # on Ctrl-C


@pytest.mark.slow
def test_a_visitor_clicks_an_example_and_drops_a_broken_file(page, tmp_path_factory):
    page.wait_for_selector("text=Drop, paste or choose a picture")
    assert page.get_by_text(re.compile("Top-1 .* on the test images of CIFAR-10")).is_visible()
    page.locator(".gallery-item").nth(3).click()  # the cat
    page.get_by_test_id("label-output-value").get_by_text("cat").wait_for()
    assert page.get_by_test_id(re.compile(".*-confidence-set$")).count() == 5
    page.get_by_text("Model card").click()
    page.get_by_role("heading", name="How it was trained").wait_for()

    broken = tmp_path_factory.mktemp("pictures") / "broken.png"
    broken.write_bytes((IMAGES / "dog.png").read_bytes()[:900])
    page.get_by_label("Remove Image").first.click()
    page.locator("input[type=file]").first.set_input_files(broken)
    page.get_by_text(re.compile(r"^broken.png: damaged image \(.*\); replace the file$")).wait_for()


def test_what_cannot_be_served_is_one_line(port, monkeypatch):
    monkeypatch.setattr(demo, "version", lambda name: "6.0")
    in_use = f"^port {port} of 127.0.0.1 cannot be used .*; give another port$"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConvMixerHubError, match=in_use):
        demo.run_demo(["convmixer_cifar"], port)
    monkeypatch.setattr(demo, "version", lambda name: "5.9")
    with pytest.raises(ConvMixerHubError, match=r"^the demo needs gradio 6: pip install 'gradio>"):
        demo.run_demo(["convmixer_cifar"], port)
