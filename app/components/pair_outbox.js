// Votes that the server has not acknowledged yet. They lie in localStorage, one item a vote, so that neither a reload,
// a closed window, a restarted server nor a second window loses one; the server recognises a repeated client_key, so
// sending twice does no harm. Runs in the same function as the other pair_*.js files; pair_picker.js uses it.

// crypto.randomUUID exists on https and localhost only; a phone in the local network has plain http.
function uniqueKey() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}

class Outbox {
  static PREFIX = 'preference-lab.vote.';
  static ORPHAN_MS = 15000;      // another window's vote is taken over when it is this old
  static FIRST_RETRY_MS = 500;
  static LAST_RETRY_MS = 30000;

  // listener: {changed(), saved(entry, answer), refused(entry, sentence), held(entry, status)}
  constructor(listener) {
    this.listener = listener;
    this.window = uniqueKey();
    this.memory = new Map();     // what localStorage would not take
    this.held = new Map();       // key -> HTTP status: waits for a name or another lab, not for time
    this.who = null;             // only this annotator's votes are sent; the others wait for theirs
    this.delay = Outbox.FIRST_RETRY_MS;
    this.retryAt = 0;
    this.busy = false;
    this.closed = false;
    this.last = 0;
    this.timer = 0;
  }

  entries() {
    const found = new Map(this.memory);
    for (let i = 0; i < localStorage.length; i += 1) {
      const name = localStorage.key(i);
      if (!name.startsWith(Outbox.PREFIX)) continue;
      const raw = localStorage.getItem(name);
      if (raw) found.set(name.slice(Outbox.PREFIX.length), JSON.parse(raw));
    }
    return [...found.values()].sort((a, b) => a.at - b.at);
  }

  get volatile() { return this.memory.size > 0; }

  add(route, body, shown) {
    this.last = Math.max(Date.now(), this.last + 0.01);
    const entry = { route, body, shown, at: this.last, window: this.window };
    try {
      localStorage.setItem(Outbox.PREFIX + body.client_key, JSON.stringify(entry));
    } catch {
      this.memory.set(body.client_key, entry);   // full or forbidden; the page says so (`volatile`)
    }
    this.listener.changed();
    this.flush();
    return entry;
  }

  remove(entry) {
    this.memory.delete(entry.body.client_key);
    localStorage.removeItem(Outbox.PREFIX + entry.body.client_key);
  }

  // Somebody chose a name, or asks to try again now.
  release(who) {
    this.who = who;
    this.held.clear();
    this.delay = Outbox.FIRST_RETRY_MS;
    this.flush();
  }

  // Everything that can still arrive in this lab.
  waiting() { return this.entries().filter((entry) => this.held.get(entry.body.client_key) !== 410); }

  sendable() {
    return this.entries().filter((entry) => entry.body.annotator === this.who && !this.held.has(entry.body.client_key));
  }

  due() {
    return this.sendable().find((entry) => entry.window === this.window || entry.at < Date.now() - Outbox.ORPHAN_MS);
  }

  // One after the other, oldest first: an undo must come after the vote that it takes back.
  async flush() {
    if (this.busy || this.closed) return;
    this.busy = true;
    clearTimeout(this.timer);
    this.retryAt = 0;
    let entry;
    try {
      while ((entry = this.due())) {
        if (!(await this.send(entry))) break;
      }
    } finally {
      this.busy = false;
    }
    if (entry) {
      this.retryAt = Date.now() + this.delay;
      this.timer = setTimeout(() => this.flush(), this.delay);
      this.delay = Math.min(this.delay * 2, Outbox.LAST_RETRY_MS);
    } else if (this.sendable().length) {
      this.timer = setTimeout(() => this.flush(), Outbox.ORPHAN_MS);
    }
    this.listener.changed();
  }

  // Whether to go on with the next entry now.
  async send(entry) {
    let response;
    let answer;
    try {
      response = await fetch(`api/pairs/${entry.route}`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify(entry.body),
        keepalive: true,
        signal: AbortSignal.timeout(10000),
      });
      answer = await response.json();
    } catch {
      return false;              // no server, or not ours: try again later
    }
    if (response.ok && answer.saved === entry.body.client_key) {
      this.delay = Outbox.FIRST_RETRY_MS;
      this.remove(entry);
      this.listener.saved(entry, answer);
    } else if (response.status === 401 || response.status === 409 || response.status === 410) {
      this.held.set(entry.body.client_key, response.status);
      this.listener.held(entry, response.status);
    } else if (response.status === 400 || response.status === 403) {
      this.remove(entry);
      this.listener.refused(entry, answer.error || 'The server refused this vote.');
    } else {
      return false;
    }
    this.listener.changed();
    return true;
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
  }
}
