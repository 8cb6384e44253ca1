// A line chart over the last minutes: uPlot with this page's colours, as wide as its box.

const KEPT_S = 300;

function colour(index) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--series-${(index % 6) + 1}`).trim();
}

// Unix seconds as 23:59:59.
function clock(time) {
  return new Date(time * 1000).toLocaleTimeString([], { hourCycle: "h23" });
}

export class TimeChart {
  // `digits` after the point in the legend; `signed`: values may be below zero.
  constructor(id, digits = 0, signed = false) {
    this.signed = signed;
    this.box = document.getElementById(id);
    this.digits = digits;
    this.times = [];
    this.lines = new Map(); // name -> values, one a time, null where there is none
    this.plot = null;
    new ResizeObserver(() => this.draw(true)).observe(this.box);
  }

  // `values`: name -> number or null, at `time` (Unix seconds).
  add(time, values) {
    this.times.push(time);
    let changed = false;
    for (const name of Object.keys(values)) {
      if (!this.lines.has(name)) {
        this.lines.set(name, new Array(this.times.length - 1).fill(null));
        changed = true;
      }
    }
    for (const [name, line] of this.lines) line.push(values[name] ?? null);
    while (this.times.length > 2 && this.times[0] < time - KEPT_S) {
      this.times.shift();
      for (const line of this.lines.values()) line.shift();
    }
    this.draw(changed);
  }

  draw(anew = false) {
    if (!this.lines.size || !this.box.clientWidth) return;
    const data = [this.times, ...this.lines.values()];
    if (this.plot && !anew) {
      this.plot.setData(data);
    } else {
      this.plot?.destroy();
      this.plot = new uPlot(this.options(), data, this.box);
    }
    const last = [...this.lines].map(([name, line]) => `${name} ${this.text(line.at(-1))}`);
    this.box.setAttribute("role", "img");
    this.box.setAttribute("aria-label", `Line chart, now: ${last.join(", ")}`);
  }

  text(value) {
    return value === null || value === undefined ? "–" : value.toFixed(this.digits);
  }

  options() {
    const style = getComputedStyle(document.documentElement);
    const soft = style.getPropertyValue("--soft").trim();
    const line = { stroke: style.getPropertyValue("--line").trim(), width: 1 };
    const axis = { stroke: soft, grid: line, ticks: line, font: "12px system-ui" };
    const series = [...this.lines.keys()].map((name, index) => ({
      label: name,
      stroke: colour(index),
      width: 2,
      spanGaps: false,
      value: (_, value) => this.text(value),
    }));
    return {
      width: this.box.clientWidth,
      height: 150,
      cursor: { points: { size: 6 } },
      scales: { y: this.signed ? {} : { range: (_, low, high) => [0, Math.max(high ?? 0, 1e-9) * 1.1] } },
      axes: [{ ...axis, space: 70, values: (_, times) => times.map(clock) }, { ...axis, size: 56 }],
      series: [{ value: (_, time) => (time ? clock(time) : "–") }, ...series],
    };
  }
}
