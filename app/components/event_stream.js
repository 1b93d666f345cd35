// No answer of the server is left lying. Gradio's server closes a page's stream of answers once it owes none. An event
// that it takes right after that may be confirmed before the page has heard of the close: Gradio's client (6.31,
// client/js/src/utils/stream.ts) then waits on a stream that is over, and the tab stands still until the next click, if
// that click is not held back itself by the event before it. Here the page reads on for as long as it is owed an answer;
// Gradio's client sees one stream. In the page's head, before Gradio's first event.
(() => {
  const fetched = window.fetch;
  const unconfirmed = new Set();  // events sent, as promises of what the server says to them
  const owed = new Set();         // the ids of those that it took and has not answered
  const early = new Set();        // ids that were answered before they were confirmed

  function join(...request) {
    const confirmed = fetched(...request).then(async (response) => {
      const id = response.ok && (await response.clone().json()).event_id;
      if (id && !early.delete(id)) owed.add(id);
      return response;
    });
    unconfirmed.add(confirmed);
    const done = () => unconfirmed.delete(confirmed);
    confirmed.then(done, done);
    return confirmed;
  }

  // Whether an answer is owed, once it is known of every event whether the server took it, to Gradio's client as well.
  async function owes() {
    while (unconfirmed.size) {
      await Promise.allSettled(unconfirmed);
      await new Promise((done) => setTimeout(done, 50));
    }
    return owed.size > 0;
  }

  async function* messages(request, response) {
    const encoder = new TextEncoder();
    for (let open = true; open; response = open && (await fetched(request))) {
      if (!response.ok) throw new TypeError(`the stream of answers broke off: ${response.status}`);
      open = false;
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = '';
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        const whole = (text + part.value).split('\n\n');
        text = whole.pop();
        for (const message of whole) {
          const { msg, event_id: id } = JSON.parse(message.slice('data:'.length));
          if (msg === 'process_completed' && !owed.delete(id)) early.add(id);
          open = msg === 'close_stream' && (await owes());
          if (!open) yield encoder.encode(`${message}\n\n`);
        }
      }
    }
  }

  async function stream(request) {
    const response = await fetched(request);
    if (!response.ok) return response;
    const answers = messages(request, response);
    const body = new ReadableStream({
      async pull(controller) {
        const { done, value } = await answers.next();
        if (done) controller.close();
        else controller.enqueue(value);
      },
      cancel: () => answers.return(),
    });
    return new Response(body, response);
  }

  window.fetch = (request, ...options) => {
    const { pathname } = new URL(request.url ?? request, location.href);
    if (pathname.endsWith('/queue/join')) return join(request, ...options);
    if (pathname.endsWith('/queue/data') && request instanceof Request) return stream(request);
    return fetched(request, ...options);
  };
})();
