// Building blocks. Texts get into the page as text nodes only, so that whatever a webhook, an agent or an alert
// says is shown and never read as HTML.

/** An element with attributes (a value of null or false leaves one out) and children: elements or texts. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Sets a text, but touches the page only when it differs: screen readers announce changes. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Shows a note, or hides it when there is none. */
export function note(node, text) {
  node.hidden = !text;
  say(node, text ?? "");
}

/**
 * Makes the children of a list those of `items`. What did not change stays the same element, so that focus and a
 * reader's place in it survive an update.
 */
export function list(parent, items, key, make) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map((item) => {
    const content = JSON.stringify(item);
    const old = known.get(key(item));
    if (old?.dataset.content === content) return old;
    const made = make(item);
    made.dataset.key = key(item);
    made.dataset.content = content;
    if (old?.contains(document.activeElement)) {
      // the same control of the new row: focus must not fall back to the top of the page
      const controls = [...old.querySelectorAll("a, button")];
      const at = controls.indexOf(document.activeElement);
      queueMicrotask(() => made.querySelectorAll("a, button")[at]?.focus());
    }
    return made;
  });
  if (wanted.length !== parent.children.length || wanted.some((w, i) => w !== parent.children[i])) {
    const keep = new Set(wanted);
    for (const child of [...parent.children]) if (!keep.has(child)) child.remove();
    wanted.forEach((child, at) => {
      if (parent.children[at] !== child) parent.insertBefore(child, parent.children[at] ?? null);
    });
  }
}

// --- how values are written -----------------------------------------------------------------

const pad = (n) => String(n).padStart(2, "0");

/** HH:MM of a time in ms, by the reader's clock; with seconds if asked for. */
export function clock(ms, seconds = false) {
  const t = new Date(ms);
  const text = `${pad(t.getHours())}:${pad(t.getMinutes())}`;
  return seconds ? `${text}:${pad(t.getSeconds())}` : text;
}

/** A <time>: of today the time, of another day the date as well. */
export function moment(ms) {
  const t = new Date(ms);
  const today = t.toDateString() === new Date().toDateString();
  const day = `${t.getFullYear()}-${pad(t.getMonth() + 1)}-${pad(t.getDate())}`;
  const text = today ? clock(ms, true) : `${day} ${clock(ms)}`;
  return element("time", { datetime: t.toISOString(), title: t.toISOString() }, text);
}

/** Three digits that count. */
function digits(value) {
  if (value === 0) return "0";
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** A duration of so many seconds. */
export function duration(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return `${digits(seconds * 1e6)} µs`;
  if (seconds < 1) return `${digits(seconds * 1e3)} ms`;
  if (seconds < 60) return `${digits(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

const UNITS = {
  percent: (v) => `${digits(v)} %`,
  seconds: duration,
  "per-second": (v) => `${digits(v)}/s`,
  count: (v) => digits(Math.round(v)), // an increase between two scrapes is an estimate
};

/** A value of a chart in its unit; what is not known is a dash. */
export const measure = (value, unit) => (value === null || value === undefined ? "–" : UNITS[unit](value));
