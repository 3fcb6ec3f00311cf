// One server's answer: figures, chart, text in shades, and what became of its drafts.

import { Chart } from "./chart.js";
import { draftSentences } from "./drafts.js";
import { count, seconds } from "./words.js";

const SHADES = { orthrus: ["r1", "r2", "r3", "r4", "r5"], plain: ["s0", "s1"] };

export class Column {
  constructor(side, title, scale) {
    this.side = side;
    this.title = title;
    const article = document.getElementById("column").content.firstElementChild.cloneNode(true);
    article.id = side;
    article.setAttribute("aria-labelledby", `${side}-title`);
    this.heading = article.querySelector("h2");
    this.heading.id = `${side}-title`;
    this.heading.textContent = title;
    this.answer = article.querySelector(".answer");
    this.answer.setAttribute("aria-label", `Answer of ${title}`);
    this.notice = article.querySelector(".notice");
    this.drafts = article.querySelector(".drafts");
    this.chart = new Chart(article.querySelector(".chart"), scale);
    this.element = article;
    this.begin();
  }

  /** Empty it for a new answer. marks: which text of each round is the AR view's own, where known from before. */
  begin(marks = null) {
    this.answer.replaceChildren();
    this.chart.clear();
    this.events = [];
    this.ids = [];
    this.marks = marks;
    this.end = null;
    this.error = null;
    this.drafts.hidden = true;
    for (const name of ["speed", "cycle", "first"]) this.figure(name, "–");
    this.say("");
  }

  set busy(value) {
    this.answer.setAttribute("aria-busy", String(value));
  }

  /** Show one event, and keep it for a replay. */
  take(event) {
    this.events.push(event);
    this[`on_${event.event}`]?.(event);
  }

  on_round({ ids, text, ms }) {
    const index = this.answer.childElementCount;
    const shades = SHADES[this.side];
    // Prefill's token belongs to no round.
    const shade = index === 0 ? "r0" : shades[(index - 1) % shades.length];
    const span = document.createElement("span");
    span.className = shade;
    span.textContent = text;
    span.title = index === 0 ? "From prefill" : `${this.unit} ${index}`;
    span.title += `: ${count(ids.length, "token")}`;
    this.answer.append(span);
    this.mark(index);
    this.ids.push(...ids);
    this.chart.add(ms, ids.length, shade);
    if (index === 0) this.figure("first", Math.round(ms), "ms");
    this.figure("speed", Math.round((1000 * this.ids.length) / ms));
    if (index > 0 && this.side === "orthrus") this.figure("cycle", ((this.ids.length - 1) / index).toFixed(1));
    this.milliseconds = ms;
  }

  on_end(event) {
    this.end = event;
    // A server that does not speculate takes a step for each token, however its chunks come.
    const rounds = event.rounds ?? event.tokens - 1;
    if (rounds > 0) this.figure("cycle", ((event.tokens - 1) / rounds).toFixed(1));
    this.chart.describe(
      `${count(event.tokens, "token")} in ${count(rounds, this.unit.toLowerCase())}, ${seconds(this.milliseconds)}`,
    );
    if (event.reason === "length") this.say("The answer was cut at the number of tokens that you allow.");
    this.showDrafts(null);
  }

  on_marks({ own, grammar }) {
    this.marks = own;
    for (let index = 0; index < this.answer.childElementCount; index += 1) this.mark(index);
    this.showDrafts(grammar);
  }

  on_error({ message }) {
    this.error = message;
    this.say(message, "error");
  }

  /** Underline what the AR view wrote itself at the end of a round. */
  mark(index) {
    const span = this.answer.children[index];
    const own = index > 0 ? this.marks?.[index] : "";
    if (!span || !own || span.childElementCount || !span.textContent.endsWith(own)) return;
    const end = document.createElement("span");
    end.className = "own";
    end.textContent = own;
    span.textContent = span.textContent.slice(0, -own.length);
    span.append(end);
  }

  showDrafts(grammar) {
    const { proposed, accepted } = this.end;
    if (!proposed) return;
    this.drafts.hidden = false;
    this.drafts.querySelector("i").style.width = `${(100 * accepted) / proposed}%`;
    const chunks = this.answer.childElementCount - 1;
    const sentences = draftSentences(this.end, chunks, grammar, this.withSchema, this.hasMetrics);
    for (const old of this.drafts.querySelectorAll("p")) old.remove();
    for (const sentence of sentences) {
      const paragraph = document.createElement("p");
      paragraph.textContent = sentence;
      this.drafts.append(paragraph);
    }
  }

  /** A message in the column, with the log that explains it where there is one. */
  say(words, kind = "", { log = "", isWaiting = false } = {}) {
    this.notice.hidden = !words;
    this.notice.dataset.kind = kind;
    this.notice.querySelector("p").textContent = words;
    const pre = this.notice.querySelector("pre");
    pre.hidden = !log;
    pre.textContent = log;
    // The reason stands at the end.
    pre.scrollTop = pre.scrollHeight;
    const progress = this.notice.querySelector("progress");
    progress.hidden = !isWaiting;
    progress.setAttribute("aria-label", `${this.title} is starting`);
  }

  figure(name, value, unit = "") {
    const cell = this.element.querySelector(`[data-figure="${name}"]`);
    cell.textContent = value;
    cell.classList.toggle("unknown", value === "–");
    if (unit) {
      const small = document.createElement("small");
      small.textContent = ` ${unit}`;
      cell.append(small);
    }
  }

  get unit() {
    return this.side === "orthrus" ? "Round" : "Step";
  }
}
