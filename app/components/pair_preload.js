// Asks the server, and has pictures decoded before they are shown: the next pair must cost no more than a frame.
// Runs in the same function as the other pair_*.js files; pair_picker.js uses them.

const LAST_RETRY_MS = 15000;
let failures = 0;                // requests in a row without an answer

const retryDelay = () => Math.min(500 * 2 ** failures, LAST_RETRY_MS);

// The answer with its `status`, also where the server refuses with a sentence; null where there is no server.
async function ask(url, body) {
  try {
    const response = await fetch(url, body && {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
    });
    const answer = await response.json();
    if (response.ok || (response.status >= 400 && response.status < 500)) {
      failures = 0;
      return { ...answer, status: response.status };
    }
  } catch { /* no server: the caller tries again */ }
  failures += 1;
  return null;
}

// A pair with its two images on their way; `ready` ends when both are decoded, or fail(pair) was called.
function prepare(item, fail) {
  const load = (side) => {
    const image = new Image();
    image.decoding = 'sync';
    image.draggable = false;
    image.alt = side === 'left' ? 'Left picture' : 'Right picture';
    image.width = item[`${side}_picture`].width;
    image.height = item[`${side}_picture`].height;
    image.src = item[`${side}_picture`].url;
    return image;
  };
  const made = { ...item, images: { left: load('left'), right: load('right') }, decoded: false };
  made.ready = Promise.all([made.images.left.decode(), made.images.right.decode()])
    .then(() => { made.decoded = true; })
    .catch(() => fail(made));
  return made;
}
