// Rounds over time: a bar as wide as its round took, as high as it has tokens.

const SVG = "http://www.w3.org/2000/svg";

/** One scale for all charts, so that they can be compared. */
export class Scale {
  constructor() {
    this.charts = [];
    this.reset();
  }

  reset(width = 32) {
    this.milliseconds = 1;
    this.tokens = width;
    this.apply();
  }

  include(milliseconds, tokens) {
    if (milliseconds <= this.milliseconds && tokens <= this.tokens) return;
    this.milliseconds = Math.max(this.milliseconds, milliseconds);
    this.tokens = Math.max(this.tokens, tokens);
    this.apply();
  }

  apply() {
    for (const chart of this.charts) chart.fit();
  }
}

export class Chart {
  constructor(element, scale) {
    this.element = element;
    this.scale = scale;
    scale.charts.push(this);
    this.clear();
  }

  clear() {
    this.element.replaceChildren();
    this.element.setAttribute("aria-label", "No rounds yet");
    this.end = 0;
    this.fit();
  }

  add(milliseconds, tokens, shade) {
    const bar = document.createElementNS(SVG, "rect");
    bar.setAttribute("x", this.end);
    bar.setAttribute("width", Math.max(0, milliseconds - this.end));
    bar.setAttribute("y", -tokens);
    bar.setAttribute("height", tokens);
    bar.setAttribute("class", shade);
    this.element.append(bar);
    this.end = milliseconds;
    this.scale.include(milliseconds, tokens);
  }

  describe(words) {
    this.element.setAttribute("aria-label", words);
  }

  // Bars hang above zero, so that a change of scale is one attribute.
  fit() {
    const { milliseconds, tokens } = this.scale;
    this.element.setAttribute("viewBox", `0 ${-tokens} ${milliseconds} ${tokens}`);
  }
}
