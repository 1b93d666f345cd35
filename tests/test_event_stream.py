"""app/components/event_stream.js: no answer of the server is left lying when its stream is closed under an event."""

import pytest
from conftest import unfold
from playwright.sync_api import expect

import storage
from app.lab import CURRENT_STUDY
from storage import checkpoints, studies

# The page hears of a close a second after it was sent: time enough for the next event to be taken before that.
LATE_CLOSE = """
  const fetched = window.fetch;
  window.fetch = async (...request) => {
    const response = await fetched(...request);
    if (!(request[0].url ?? request[0]).includes('/queue/data')) return response;
    const late = new TransformStream({
      async transform(part, controller) {
        if (new TextDecoder().decode(part).includes('close_stream')) {
          window.closes = (window.closes ?? 0) + 1;
          await new Promise((done) => setTimeout(done, 1000));
        }
        controller.enqueue(part);
      },
    });
    return new Response(response.body.pipeThrough(late), response);
  };
"""


@pytest.fixture
def curves(start_server, page):
    """Curves of a study on an SDXL, and a function that chooses, as another page would, a study on Scenes."""
    server = start_server("--no-workers")
    store = storage.open(server.data_dir)
    scenes = studies.list_studies(store)[0]
    large = studies.create_study(store, "Large", base="nobody/an-sdxl")

    def choose(study):
        checkpoints.set_setting(store, CURRENT_STUDY, study.id)

    choose(large)
    page.add_init_script(LATE_CLOSE)
    page.goto(server.url)
    page.click("#tab-curves-button")
    expect(page.locator("#curves-prompt textarea, #curves-prompt input")).not_to_have_value("")
    page.wait_for_timeout(1000)  # the tab has its answer, and its settings
    unfold(page.locator("button:visible", has_text="All other settings"))
    yield page.get_by_role("textbox", name="threshold min "), lambda: choose(scenes)
    store.close()


def test_an_event_under_a_close_has_its_answer(curves, page):
    least, choose_scenes = curves
    expect(least).to_have_value("0.45")
    page.wait_for_timeout(2500)  # the streams of these answers are closed
    before = page.evaluate("window.closes")
    page.click("#tab-label-button")
    page.wait_for_function("closes => window.closes > closes", arg=before)
    choose_scenes()
    page.click("#tab-curves-button")  # the server has closed its stream, and the page does not know
    expect(least).to_have_value("0.08")


def test_a_stream_that_owes_nothing_ends(curves, page):
    """A browser has six connections to a server, for all of its pages."""
    least, choose_scenes = curves
    expect(least).to_have_value("0.45")
    streams, ended = [], []
    for event, seen in (("request", streams), ("requestfinished", ended), ("requestfailed", ended)):
        page.on(event, lambda request, seen=seen: seen.append(request) if "/queue/data" in request.url else None)
    page.click("#tab-label-button")
    page.click("#tab-train-button")  # its answer is among those that the stream of the first is read on for
    choose_scenes()
    page.click("#tab-curves-button")
    expect(least).to_have_value("0.08")
    for tab in ("label", "train") * 5:  # a stream that Gradio's client opened after its answer is ended by the next
        page.wait_for_timeout(4000)
        if len(ended) == len(streams):
            break
        page.click(f"#tab-{tab}-button")
        page.wait_for_timeout(4000)
    assert streams and len(ended) == len(streams)
