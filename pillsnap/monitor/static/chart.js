// A line chart on a canvas: a few curves over the same steps, with the values at the pointer.

import { number } from "./words.js";

const PAD = { left: 46, right: 10, top: 8, bottom: 20 };

export class Chart {
  // `titles`: of the lines; `unit`: label of the x axis; `write`: formats a value; `low`: start of the y axis.
  constructor(parent, titles, unit, { write = number, low = null } = {}) {
    this.unit = unit;
    this.write = write;
    this.low = low;
    this.points = titles.map(() => []);
    this.stepsPerEpoch = null;
    this.pointer = null;
    this.box = document.createElement("div");
    this.box.className = "chart";
    this.legend = document.createElement("div");
    this.legend.className = "legend";
    this.values = titles.map((title, i) => {
      const item = document.createElement("span");
      const mark = document.createElement("i");
      mark.className = `c${i % 4}`;
      const value = document.createElement("b");
      item.append(mark, `${title} `, value);
      this.legend.append(item);
      return value;
    });
    this.where = document.createElement("span");
    this.where.className = "where";
    this.legend.append(this.where);
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.box.append(this.legend, this.canvas);
    parent.append(this.box);
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  point(x) {
    this.pointer = x;
    this.draw();
  }

  update(points, stepsPerEpoch) {
    this.points = points;
    this.stepsPerEpoch = stepsPerEpoch;
    this.box.hidden = points.every((line) => line.length === 0);
    this.draw();
  }

  draw() {
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const all = this.points.flat();
    if (all.length === 0) return;

    const right = Math.max(1, ...all.map((p) => p[0]));
    let low = Math.min(...all.map((p) => p[1]));
    let high = Math.max(...all.map((p) => p[1]));
    if (this.low !== null) low = Math.min(this.low, low);
    if (high === low) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
    const ticks = ticksOf(low, high);
    [low, high] = [Math.min(low, ticks[0]), Math.max(high, ticks[ticks.length - 1])];
    const x = (step) => PAD.left + (step / right) * (width - PAD.left - PAD.right);
    const y = (value) => PAD.top + (1 - (value - low) / (high - low)) * (height - PAD.top - PAD.bottom);

    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = color("--dim");
    pen.strokeStyle = color("--line");
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const tick of ticks) {
      const at = Math.round(y(tick)) + 0.5;
      stroke(pen, [[PAD.left, at], [width - PAD.right, at]]);
      pen.fillText(this.write(tick), PAD.left - 6, at);
    }
    pen.textBaseline = "alphabetic";
    for (const [step, label] of this.stepTicks(right, width)) {
      pen.textAlign = step === 0 ? "left" : x(step) > width - 30 ? "right" : "center";
      pen.fillText(label, x(step), height - 5);
    }
    this.points.forEach((line, i) => {
      pen.strokeStyle = pen.fillStyle = color(`--c${i % 4}`);
      pen.lineWidth = 1.75;
      pen.lineJoin = "round";
      stroke(pen, line.map(([step, value]) => [x(step), y(value)]));
      if (line.length > 0 && line.length <= 40) line.forEach(([step, value]) => dot(pen, x(step), y(value), 2));
    });
    this.showValues(pen, x, y, color, height);
  }

  // Shows the values at the pointer in the legend; the aria-label has the latest values.
  showValues(pen, x, y, color, height) {
    let near = null;
    const newest = [];
    if (this.pointer !== null) {
      for (const [step] of this.points.flat()) {
        if (near === null || Math.abs(x(step) - this.pointer) < Math.abs(x(near) - this.pointer)) near = step;
      }
      pen.strokeStyle = color("--dim");
      pen.lineWidth = 1;
      stroke(pen, [[x(near), PAD.top], [x(near), height - PAD.bottom]]);
    }
    this.points.forEach((line, i) => {
      let shown = line[line.length - 1];
      if (near !== null) shown = line.filter((p) => p[0] <= near).pop() ?? shown;
      this.values[i].textContent = near !== null && shown ? this.write(shown[1]) : "";
      newest.push(shown ? this.write(shown[1]) : "–");
      if (near !== null && shown) {
        pen.fillStyle = color(`--c${i % 4}`);
        dot(pen, x(shown[0]), y(shown[1]), 3.5);
      }
    });
    const at = near === null ? "" : ` ${Number((near / (this.stepsPerEpoch || 1)).toFixed(2))}`;
    this.where.textContent = `${this.unit}${at}`;
    this.canvas.setAttribute("aria-label", `${this.legend.textContent}: ${newest.join(", ")}`);
  }

  // In epochs where steps per epoch are known, else in steps.
  stepTicks(right, width) {
    const unit = this.stepsPerEpoch || 1;
    const wanted = Math.max(2, Math.floor(width / 90));
    const count = right / unit;
    const gap = niceGap(count / wanted, Boolean(this.stepsPerEpoch));
    const ticks = [];
    for (let at = 0; at <= count + 1e-9; at += gap) ticks.push([at * unit, String(Number(at.toPrecision(6)))]);
    return ticks;
  }
}

function stroke(pen, points) {
  pen.beginPath();
  points.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.stroke();
}

function dot(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}

// The smallest of 1, 2 or 5 times a power of ten that is at least `wanted`.
function niceGap(wanted, whole) {
  if (whole && wanted <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(wanted));
  return [1, 2, 5, 10].map((f) => f * power).find((gap) => gap >= wanted * 0.999);
}

function ticksOf(low, high) {
  const gap = niceGap((high - low) / 4, false);
  const first = Math.floor(low / gap);
  const last = Math.ceil(high / gap);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * gap).toPrecision(10)));
}
