// The console: asks the dispatcher every few seconds, and shows what it says.
import { Charts } from "/console/charts.js";
import { byId, clock, duration, element, list, moment, note, say } from "/console/dom.js";
import { TraceDialog } from "/console/trace.js";

const EVERY_MS = 5000;
const MOST_MS = 60000; // between tries while there is no answer
const TIMEOUT_MS = 20000;

const BAD = new Set(["not running", "not answering"]);
const charts = new Charts(byId("charts"));
new TraceDialog();

let period = null; // null: the dispatcher's default
let etag = null;
let failures = 0;
let timer = null;
let running = null; // the request that is under way
let updated = null; // when the page last agreed with the dispatcher
let paused = false;

// --- asking ---------------------------------------------------------------------------------

async function ask() {
  clearTimeout(timer);
  running?.abort();
  const mine = (running = new AbortController());
  const limit = setTimeout(() => mine.abort(), TIMEOUT_MS);
  let trouble = null;
  try {
    trouble = await load(mine.signal);
  } catch {
    trouble = "The dispatcher does not answer.";
  } finally {
    clearTimeout(limit);
  }
  if (running !== mine) return; // another one took over
  running = null;
  failures = trouble === null ? 0 : failures + 1;
  if (trouble === null) updated = Date.now();
  const wait = Math.min(EVERY_MS * 2 ** failures, MOST_MS);
  tell(trouble, wait);
  if (!paused && !document.hidden) timer = setTimeout(ask, failures ? wait : EVERY_MS);
}

/** Ask once, and show the answer; what is wrong, or null. */
async function load(signal) {
  const query = period === null ? "" : `?period=${period}`;
  const headers = etag === null ? {} : { "If-None-Match": etag };
  const answer = await fetch(`/console/status${query}`, { headers, signal });
  if (answer.status === 304) return null;
  if (answer.status === 401) return "You are not signed in any more: reload the page.";
  if (answer.status === 502 || answer.status === 504) return "The dispatcher is down or just starting.";
  if (!answer.ok) return `The dispatcher answered ${answer.status}.`;
  const found = await answer.json();
  etag = answer.headers.get("ETag");
  show(found);
  return null;
}

function tell(trouble, wait) {
  document.body.classList.toggle("stale", trouble !== null);
  const since = updated === null ? "" : ` What you see is of ${clock(updated, true)}.`;
  note(byId("trouble"), trouble === null ? null : `${trouble}${since} Next try in ${duration(wait / 1000)}.`);
  const text = paused ? "Paused" : trouble === null ? "Live" : "Not live";
  say(byId("freshness"), updated === null ? text : `${text}, ${clock(updated, true)}`);
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden && !paused) ask();
});

byId("pause").addEventListener("click", (event) => {
  paused = !paused;
  event.target.setAttribute("aria-pressed", String(paused));
  clearTimeout(timer);
  if (paused) tell(null, 0);
  else ask();
});

// --- showing --------------------------------------------------------------------------------

function show(found) {
  const { about, dispatcher, prometheus } = found;
  say(byId("machine"), about.machine);
  verdict(found);
  list(byId("links"), about.links, (l) => l.href, (l) =>
    element("li", {}, element("a", { href: l.href, title: l.about || null }, l.title)));
  periods(about.periods, found.charts.period);
  units(prometheus.units);
  alerts(prometheus.alerts);
  charts.show(found.charts);
  tasks(dispatcher);
  events(dispatcher);
}

function verdict({ about, dispatcher, prometheus }) {
  const down = prometheus.units.rows.filter((u) => BAD.has(u.state)).length;
  const firing = prometheus.alerts.rows.filter((a) => a.state === "firing").length;
  const unknown = prometheus.units.rows.filter((u) => u.state === "no data").length;
  const other = prometheus.units.rows.filter((u) => u.state !== "active").length - down - unknown;
  const bad = [
    down ? `${down} ${down === 1 ? "unit" : "units"} down` : null,
    firing ? `${firing} ${firing === 1 ? "alert" : "alerts"} firing` : null,
    ...dispatcher.faults,
    dispatcher.error,
  ].filter((text) => text);
  const unsure = [
    prometheus.units.error ?? (unknown ? `${unknown} ${unknown === 1 ? "unit" : "units"} without data` : null),
    other ? `${other} not running` : null,
  ].filter((text) => text);
  const node = byId("verdict");
  const kind = bad.length ? "bad" : unsure.length ? "unsure" : "good";
  node.className = `badge ${kind}`;
  const text = [...bad, ...unsure].join(", ") || `All ${prometheus.units.rows.length} units run`;
  say(node, text);
  document.title = `${kind === "good" ? "" : kind === "bad" ? "(!) " : "(?) "}${about.machine} console`;
}

function periods(names, current) {
  list(byId("periods"), names, (n) => n, (name) => {
    const input = element("input", { type: "radio", name: "period", value: name });
    input.addEventListener("change", () => {
      period = name;
      etag = null;
      ask();
    });
    return element("label", {}, input, element("span", {}, name));
  });
  // what was just chosen is on its way
  for (const input of document.querySelectorAll("input[name=period]")) {
    input.checked = input.value === (period ?? current);
  }
}

const UNIT_KINDS = { active: "good", "no data": "none" };

function units({ rows, error }) {
  note(byId("units-note"), error);
  byId("units-note").classList.toggle("failed", error !== null);
  list(byId("units"), rows, (u) => u.name, (u) =>
    element(
      "li", { title: u.unit },
      element("span", { class: "what" }, u.title, element("code", {}, u.unit)),
      element("span", { class: `badge ${UNIT_KINDS[u.state] ?? "bad"}` }, u.state),
    ));
}

function alerts({ rows, error }) {
  note(byId("alerts-note"), error ?? (rows.length ? null : "No alert is firing"));
  byId("alerts-note").classList.toggle("failed", error !== null);
  list(byId("alerts"), rows, (a) => JSON.stringify([a.name, a.labels]), (a) =>
    element(
      "li", { class: a.state },
      element(
        "div", { class: "line" },
        element("span", { class: `badge ${a.state === "pending" ? "none" : a.severity === "critical" ? "bad" : "unsure"}` },
          a.state === "pending" ? `pending, ${a.severity}` : a.severity),
        element("strong", {}, a.name),
        element("span", { class: "muted" }, "since ", moment(Date.parse(a.since))),
      ),
      a.summary ? element("p", {}, a.summary) : null,
      element("p", { class: "muted labels" }, Object.entries(a.labels).map(([k, v]) => `${k}=${v}`).join("  ")),
    ));
}

// what belongs to no project is filed under a dash
const named = (project) => (project === "-" ? null : project);

const TASK_KINDS = { completed: "good", failed: "bad", running: "busy", pending: "none" };

const traceLink = (trace, what) =>
  element("a", { href: `#trace=${trace}`, class: "button", "aria-label": `Trace of ${what}` }, "Trace");

function tasks({ tasks: rows, error }) {
  byId("tasks-note").classList.toggle("failed", error !== null);
  note(byId("tasks-note"), error ?? (rows.length ? null : "No task yet. Submit one: ravectl task submit \"say hello\""));
  list(byId("tasks"), rows, (t) => t.task_id, (t) => {
    const why = t.status === "failed" || t.outcome ? [t.outcome !== "succeeded" ? t.outcome : null, t.detail].filter(Boolean).join(": ") : "";
    return element(
      "tr", { id: `task-${t.task_id}`, role: "row" },
      element("td", { role: "cell" }, element("span", { class: `badge ${TASK_KINDS[t.status]}` }, t.status)),
      element(
        "td", { role: "cell", class: "wide" },
        element("div", { class: "clip" }, t.prompt.trim() || "(no prompt)"),
        element("div", { class: "muted" }, [t.agent_type, named(t.project), t.attempt > 1 ? `attempt ${t.attempt} of ${t.max_attempts}` : null].filter(Boolean).join(" · ")),
        why ? element("div", { class: "why" }, why) : null,
        element("code", { class: "hint" }, `ravectl task logs ${t.task_id}`),
      ),
      element("td", { role: "cell" }, moment(t.created_ms)),
      element("td", { role: "cell", class: "number" }, t.duration_ms === null || t.status === "pending" ? "–" : duration(t.duration_ms / 1000)),
      element("td", { role: "cell" }, traceLink(t.trace_id, `task ${t.task_id}`)),
    );
  });
}

function events({ events: rows, error }) {
  byId("events-note").classList.toggle("failed", error !== null);
  note(byId("events-note"), error ?? (rows.length ? null : "No webhook came yet"));
  list(byId("events"), rows, (e) => e.event_uuid, (e) =>
    element(
      "tr", { role: "row" },
      element("td", { role: "cell" }, moment(e.received_ms)),
      element(
        "td", { role: "cell", class: "wide" },
        element("div", { class: "clip" }, e.event_type),
        element("div", { class: "muted" }, [e.source, named(e.project)].filter(Boolean).join(" · ")),
      ),
      element("td", { role: "cell", class: "short" }, became(e)),
      element("td", { role: "cell" }, traceLink(e.trace_id, `event ${e.event_uuid}`)),
    ));
}

function became(event) {
  if (event.task_id) return element("a", { href: `#task-${event.task_id}` }, `task …${event.task_id.slice(-6)}`);
  return event.processed ? element("span", { class: "muted" }, "no rule") : "waits for the rules";
}

ask();
