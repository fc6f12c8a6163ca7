"""Pages in a real browser; where gradio, playwright or a browser is missing, they are skipped."""

import functools
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from convmixer_hub import ConvMixerHubError
from convmixer_hub.load import load_trained
from convmixer_hub.predict import predict
from convmixer_hub.release import demo

from .conftest import CHECKOUT, IMAGES, NAME, convmixer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no chromium")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--no-proxy-server"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(params=["served", "Space"])
def page(request, port, tmp_path, monkeypatch, browser):
    """Open the page of `convmixer demo` in a browser; fail if it asks another machine."""
    pytest.importorskip("gradio")
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
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{port}")
        yield page
        page.close()
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


@pytest.fixture
def exported(tmp_path, browser):
    """Open docs/browser.html beside an exported model; "--with-preprocessing" may be left out."""
    if not (runtime := os.environ.get("ONNXRUNTIME_WEB")):
        pytest.skip("ONNXRUNTIME_WEB does not name a folder with onnxruntime-web")
    shutil.copy(CHECKOUT / "docs" / "browser.html", tmp_path)
    shutil.copy(CHECKOUT / "weights" / NAME / "config.json", tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()

        def give_file(route):
            route.fulfill(path=Path(runtime, "dist", Path(route.request.url).name))

        page.route("https://cdn.jsdelivr.net/npm/onnxruntime-web@*/dist/*", give_file)

        def open_page(*options):
            convmixer("export", NAME, "--output", tmp_path, *options)
            page.goto(f"http://127.0.0.1:{server.server_port}/browser.html")
            return page

        yield open_page
        page.close()
        server.shutdown()


@pytest.mark.slow
def test_an_exported_model_runs_in_the_browser(exported, tmp_path):
    page = exported("--with-preprocessing")
    with Image.open(IMAGES / "cat.png") as cat:
        wide = Image.new("RGB", (900, 640), "gray")
        wide.paste(cat.resize((640, 640), Image.Resampling.BICUBIC), (130, 0))
        clear = cat.convert("RGBA")
        clear.putalpha(Image.linear_gradient("L").resize(cat.size))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    wide.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    clear.save(tmp_path / "clear.png")
    files = [*sorted(IMAGES.glob("*.png")), tmp_path / "turned.jpg", tmp_path / "clear.png"]
    model = load_trained(NAME)
    for file in files:
        page.locator("input:enabled").set_input_files(file)
        page.locator("output").nth(4).wait_for()
        rows = [row.split("\n") for row in page.locator("label").all_inner_texts()]
        found = {label: float(percent.rstrip(" %")) for label, percent in rows}
        with Image.open(file) as image:
            [predictions] = predict(model, [image], top_k=5)
        assert rows[0][0] == predictions[0].label
        for expected in predictions:
            if expected.probability > 0.01:  # a photograph is not scaled in the same way
                assert found[expected.label] == pytest.approx(100 * expected.probability, abs=0.3)

    broken = tmp_path / "broken.png"
    broken.write_bytes((IMAGES / "dog.png").read_bytes()[:900])
    page.locator("input").set_input_files(broken)
    page.get_by_text(re.compile("^broken.png: .*; choose another picture$")).wait_for()
    assert not page.locator("label").count()  # nothing of the picture before
    assert not page.locator("canvas").is_visible()


@pytest.mark.slow
def test_without_preprocessing_or_the_runtime_the_page_says_so(exported, browser):
    page = exported()
    page.get_by_text("(model.onnx is not for RGB, or was exported without --with-pr").wait_for()
    offline = browser.new_page()  # which has nothing in its cache
    offline.route("https://**", lambda route: route.abort())
    offline.goto(page.url)
    offline.get_by_text(re.compile(r"^The model cannot be loaded \(.*onnxruntime-web")).wait_for()


def test_what_cannot_be_served_is_one_line(port, monkeypatch):
    monkeypatch.setattr(demo, "version", lambda name: "6.0")
    in_use = f"^port {port} of 127.0.0.1 cannot be used .*; give another port$"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConvMixerHubError, match=in_use):
        demo.run_demo(["convmixer_cifar"], port)
    monkeypatch.setattr(demo, "version", lambda name: "5.9")
    with pytest.raises(ConvMixerHubError, match=r"^the demo needs gradio 6: pip install 'gradio>"):
        demo.run_demo(["convmixer_cifar"], port)
