// Charts: uPlot for the eye, a sentence, a table and the arrow keys for everybody else.
/* global uPlot */
import { clock, element, measure, say } from "/console/dom.js";

const HEIGHT = 150;
// Colour is never alone in telling series apart: each also has a dash of its own, in the legend too.
const STYLES = {
  used: ["blue", "solid"],
  "2xx": ["green", "solid"],
  "3xx": ["blue", "dotted"],
  "4xx": ["orange", "dashed"],
  "5xx": ["red", "solid"],
  p99: ["orange", "dashed"],
  p50: ["blue", "solid"],
  pending: ["blue", "solid"],
  running: ["green", "dashed"],
  unprocessed: ["orange", "dotted"],
  succeeded: ["green", "solid"],
  failed: ["red", "dashed"],
  cancelled: ["grey", "dotted"],
};
const DASHES = { solid: [], dashed: [7, 4], dotted: [2, 3] };

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const spanText = (seconds) => (seconds % 3600 === 0 ? `${seconds / 3600} h` : `${seconds / 60} min`);

/** The charts of the page; `show` brings them up to date. */
export class Charts {
  constructor(parent) {
    this.parent = parent;
    this.charts = new Map();
    // colours are in the canvas: they are drawn anew when the scheme changes
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const chart of this.charts.values()) chart.rebuild();
    });
  }

  show(data) {
    const times = Array.from({ length: data.count }, (_, i) => data.start + i * data.step);
    for (const row of data.charts) {
      if (!this.charts.has(row.key)) {
        const chart = new Chart(row.key);
        this.charts.set(row.key, chart);
        this.parent.append(chart.figure);
      }
      const per = row.key === "outcomes" ? `, per ${spanText(data.outcome_seconds)}` : "";
      this.charts.get(row.key).show({ ...row, title: row.title + per }, times, data.period);
    }
  }
}

class Chart {
  constructor(key) {
    this.key = key;
    this.plot = null;
    this.shape = "";
    this.title = element("span", { class: "title" });
    this.legend = element("ul", { class: "legend" });
    this.area = element("div", { class: "plot", tabindex: "0", role: "img" });
    this.spoken = element("p", { class: "unseen", "aria-live": "polite" });
    this.empty = element("p", { class: "empty", hidden: true });
    this.details = element("details", {}, element("summary", {}, "Values as a table"));
    this.details.addEventListener("toggle", () => this.tabulate());
    this.figure = element(
      "figure", { id: `chart-${key}` },
      element("figcaption", {}, this.title, this.legend),
      this.area, this.spoken, this.empty, this.details,
    );
    this.area.addEventListener("keydown", (event) => this.move(event));
    this.area.addEventListener("blur", () => this.plot?.setCursor({ left: -10, top: -10 }));
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.area);
  }

  size() {
    return { width: Math.max(this.area.clientWidth, 100), height: HEIGHT };
  }

  show(row, times, period) {
    const content = JSON.stringify([row, times[0], period]);
    if (content === this.content) return;
    this.content = content;
    Object.assign(this, { row, times, period });
    say(this.title, row.title);
    this.summary().querySelector(".unseen")?.remove();
    this.summary().append(element("span", { class: "unseen" }, `: ${row.title}`));
    const known = row.series.length > 0;
    this.area.hidden = this.details.hidden = !known;
    this.empty.hidden = known;
    this.empty.classList.toggle("failed", row.error !== null);
    say(this.empty, row.error ?? "No data for this period");
    if (known) {
      // the same series as before only get their new values: the cursor stays where it was
      const shape = JSON.stringify(row.series.map((s) => s.key));
      if (this.plot && shape === this.shape) this.plot.setData(this.data());
      else this.rebuild();
      this.shape = shape;
    }
    this.tell();
    this.tabulate();
  }

  summary() {
    return this.details.querySelector("summary");
  }

  data() {
    return [this.times, ...this.row.series.map((s) => s.values)];
  }

  rebuild() {
    if (!this.row?.series.length) return;
    this.plot?.destroy();
    const series = this.row.series;
    this.legend.replaceChildren(
      ...series.map((s) =>
        element(
          "li", {},
          element("span", { class: `swatch ${STYLES[s.key][0]} ${STYLES[s.key][1]}`, "aria-hidden": "true" }),
          `${s.name} `, element("output", {}),
        ),
      ),
    );
    this.plot = new uPlot(this.options(series), this.data(), this.area);
  }

  options(series) {
    const { unit } = this.row;
    const axis = { stroke: colour("muted"), font: "11px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: colour("grid"), width: 1 };
    return {
      ...this.size(),
      legend: { show: false },
      cursor: { sync: { key: "console" }, drag: { x: false, y: false }, y: false, points: { size: 7 } },
      hooks: { setCursor: [(plot) => this.tell(plot.cursor.idx)] },
      scales: { y: { range: (_, __, most) => (unit === "percent" ? [0, 100] : [0, roof(most, unit)]) } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, space: 60, values: (_, at) => at.map((t) => clock(t * 1000)) },
        {
          ...axis, grid, size: 56, space: 30, values: (_, at) => at.map((v) => measure(v, unit)),
          // there are no half tasks
          ...(unit === "count" ? { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 1e4, 1e5] } : {}),
        },
      ],
      series: [
        {},
        ...series.map((s) => {
          const [name, dash] = STYLES[s.key];
          return {
            stroke: colour(name), width: 1.75, dash: DASHES[dash], points: { show: false, filter: (plot, i) => alone(plot.data[i]), size: 4 },
            fill: series.length === 1 ? colour(`${name}-fill`) : undefined, spanGaps: false,
          };
        }),
      ],
    };
  }

  /** The legend's values: at the cursor, or the last ones; and what a screen reader says of the whole. */
  tell(index = null) {
    if (!this.row?.series.length) {
      this.legend.replaceChildren();
      return;
    }
    const { series, unit, title } = this.row;
    const at = index ?? this.times.length - 1;
    this.figure.classList.toggle("pointed", index !== null && index !== undefined);
    [...this.legend.querySelectorAll("output")].forEach((node, i) =>
      say(node, measure(series[i].values[at], unit)),
    );
    const sentences = series.map((s) => {
      const values = s.values.filter((v) => v !== null);
      const [least, most] = [Math.min(...values), Math.max(...values)];
      const last = measure(s.values.at(-1), unit);
      return `${s.name} ${last === "–" ? "unknown now" : `now ${last}`}, ` +
        `lowest ${measure(least, unit)}, highest ${measure(most, unit)}`;
    });
    this.area.setAttribute("aria-label", `${title}, last ${this.period}: ${sentences.join("; ")}`);
  }

  /** Arrow keys move the cursor, as a mouse does, and say what is there. */
  move(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -12, PageDown: 12, Home: -1e6, End: 1e6 };
    if (!(event.key in steps) || !this.plot) return;
    event.preventDefault();
    const last = this.times.length - 1;
    const from = this.plot.cursor.idx ?? (steps[event.key] < 0 ? last + 1 : -1);
    const at = Math.min(Math.max(from + steps[event.key], 0), last);
    const left = this.plot.valToPos(this.times[at], "x");
    this.plot.setCursor({ left, top: this.plot.bbox.height / 2 / devicePixelRatio });
    const values = this.row.series.map((s) => `${s.name} ${measure(s.values[at], this.row.unit)}`);
    say(this.spoken, `${clock(this.times[at] * 1000)}: ${values.join(", ")}`);
  }

  tabulate() {
    this.details.querySelector(".scroll")?.remove();
    if (!this.details.open || !this.row?.series.length) return;
    const { series, unit, title } = this.row;
    const rows = this.times.map((t, i) =>
      element(
        "tr", {}, element("th", { scope: "row" }, clock(t * 1000)),
        ...series.map((s) => element("td", { class: "number" }, measure(s.values[i], unit))),
      ),
    );
    const names = series.map((s) => element("th", { scope: "col", class: "number" }, s.name));
    const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Time"), ...names));
    const body = element("tbody", {}, ...rows.reverse());
    this.details.append(
      element(
        "div", { class: "scroll", role: "group", tabindex: "0", "aria-label": `${title}, values` },
        element("table", {}, head, body),
      ),
    );
  }
}

/** Where a value has none beside it: there is no line to draw, so it gets a point. */
const alone = (values) =>
  values.flatMap((v, i) => (v !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null ? [i] : []));

/** The upper end of a scale: room above the highest value, and no scale that is all noise. */
function roof(most, unit) {
  const least = { seconds: 0.01, "per-second": 0.1, count: 1 }[unit];
  return Math.max(most ?? 0, least) * 1.15;
}
