// One trace as a waterfall: a table whose last column draws when each span was.
import { byId, duration, element, note, say } from "/console/dom.js";

const TRACE = /^#trace=([0-9a-f]{32})$/;

/** A trace that the address names (#trace=ID) is open: links lead to it, and Back closes it. */
export class TraceDialog {
  constructor() {
    this.dialog = byId("trace");
    this.asked = 0;
    byId("trace-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside it
    });
    this.dialog.addEventListener("close", () => {
      this.asked += 1;
      if (TRACE.test(location.hash)) history.replaceState(null, "", location.pathname);
      this.opener()?.focus();
    });
    addEventListener("hashchange", () => this.follow());
    this.follow();
  }

  follow() {
    const found = TRACE.exec(location.hash);
    if (found) this.open(found[1]);
    else if (this.dialog.open) this.dialog.close();
  }

  /** Where focus goes back to: an update may have put another row in the place of the one that was used. */
  opener() {
    return document.querySelector(`a[href="#trace=${this.trace}"]`);
  }

  async open(trace) {
    this.trace = trace;
    this.asked += 1;
    const mine = this.asked;
    say(byId("trace-id"), trace);
    byId("spans").replaceChildren();
    say(byId("trace-sum"), "");
    note(byId("trace-note"), "Loading");
    if (!this.dialog.open) this.dialog.showModal();
    const [text, spans] = await load(trace);
    if (mine !== this.asked) return;
    note(byId("trace-note"), text);
    byId("spans").replaceChildren(...rows(spans));
    say(byId("trace-sum"), spans.length ? total(spans) : "");
  }
}

async function load(trace) {
  try {
    const answer = await fetch(`/console/traces/${trace}`, { signal: AbortSignal.timeout(15000) });
    if (answer.status === 404) return ["Of this trace no span is kept: not yet, or not any more.", []];
    if (!answer.ok) return [`The dispatcher answered ${answer.status}.`, []];
    const found = await answer.json();
    return [found.more ? `${found.more} more spans are not shown.` : null, found.spans];
  } catch {
    return ["The dispatcher does not answer. Close this and try again.", []];
  }
}

const bounds = (spans) => [
  Math.min(...spans.map((s) => s.start_us)),
  Math.max(...spans.map((s) => s.start_us + s.duration_us)),
];

function total(spans) {
  const [start, end] = bounds(spans);
  return `${spans.length} ${spans.length === 1 ? "span" : "spans"} in ${duration((end - start) / 1e6)}`;
}

function rows(spans) {
  if (!spans.length) return [];
  const [start, last] = bounds(spans);
  const end = Math.max(last, start + 1);
  return inOrder(spans).map(([span, depth]) => {
    const from = (span.start_us - start) / (end - start);
    const width = span.duration_us / (end - start);
    const bar = element("div", { class: span.ok ? "bar-of" : "bar-of failed", "aria-hidden": "true" });
    bar.style.marginInlineStart = `${Math.min(from * 100, 99)}%`;
    bar.style.width = `${width * 100}%`;
    const name = element("div", { class: "span-name" }, span.name, span.ok ? null : element("span", { class: "badge bad" }, "failed"));
    const cell = element("th", { role: "rowheader", scope: "row" }, name, attributes(span));
    cell.style.paddingInlineStart = `${0.5 + depth}rem`;
    return element(
      "tr", { role: "row" }, cell,
      element("td", { role: "cell", class: "number" }, `+${duration((span.start_us - start) / 1e6)}`),
      element("td", { role: "cell", class: "number" }, duration(span.duration_us / 1e6)),
      element("td", { role: "cell", class: "lane" }, bar),
    );
  });
}

/** Spans with their depth, children below their parents; what lost its parent stands at the top. */
function inOrder(spans) {
  const ids = new Set(spans.map((s) => s.span_id));
  const children = new Map();
  for (const span of spans) {
    const parent = ids.has(span.parent_id) ? span.parent_id : null;
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(span);
  }
  const found = [];
  const seen = new Set();
  const add = (span, depth) => {
    if (seen.has(span.span_id)) return;
    seen.add(span.span_id);
    found.push([span, depth]);
    for (const child of children.get(span.span_id) ?? []) add(child, Math.min(depth + 1, 8));
  };
  for (const span of children.get(null) ?? []) add(span, 0);
  for (const span of spans) add(span, 0); // a circle has no top
  return found;
}

function attributes(span) {
  const entries = Object.entries(span.attributes);
  if (!entries.length) return null;
  const pairs = entries.flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, String(value))]);
  return element("details", {}, element("summary", {}, "Attributes"), element("dl", {}, ...pairs));
}
