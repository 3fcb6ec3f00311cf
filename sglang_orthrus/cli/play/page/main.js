// Wires the page: servers' states, asking, stopping, replaying.

import { Scale } from "./chart.js";
import { Column } from "./column.js";
import { clearErrors, readQuestion, showError, showExamples, showFilled } from "./form.js";
import { answerEvents } from "./stream.js";
import { watchServers } from "./servers.js";
import { verdict, welcome } from "./verdict.js";

const SLOWER = 10;
const byId = (id) => document.getElementById(id);
const scale = new Scale();
const columns = {
  orthrus: new Column("orthrus", "ORTHRUS", scale),
  plain: new Column("plain", "Plain SGLang", scale),
};
let running = null;
let states = {};
let wasAsked = false;

function setVerdict([kind, sentence, remark]) {
  const element = byId("verdict");
  element.dataset.kind = kind;
  element.textContent = sentence;
  if (!remark) return;
  const small = document.createElement("small");
  small.textContent = remark;
  element.append(small);
}

function updateButtons() {
  byId("ask").disabled = running !== null || states.orthrus?.stage !== "ready";
  const isAlone = states.orthrus?.stage === "ready" ? states.plain?.stage !== "ready" : states.plain?.stage === "absent";
  byId("ask").textContent = isAlone ? "Ask ORTHRUS" : "Ask both";
  byId("stop").disabled = running === null;
  byId("replay").disabled = running !== null || !columns.orthrus.end;
}

async function follow(column, question, signal) {
  column.busy = true;
  try {
    for await (const event of answerEvents(column.side, question, signal)) {
      column.take(event);
      if (event.event === "error" && event.field) showError(event.field, event.message);
    }
  } finally {
    column.busy = false;
  }
}

/** Run a job that Stop can end; everything else waits. stopped: what to do where it was ended. */
async function run(job, stopped) {
  const button = document.activeElement;
  running = new AbortController();
  const { signal } = running;
  updateButtons();
  // A button that is switched off would lose the keyboard's place.
  if (button.disabled) byId("stop").focus();
  try {
    await job(signal);
  } catch (error) {
    if (!signal.aborted) throw error;
    stopped();
  } finally {
    running = null;
    const isAtStop = document.activeElement === byId("stop");
    updateButtons();
    if (isAtStop) button.focus();
  }
}

async function ask() {
  const question = readQuestion();
  if (question === null) return;
  const plainReady = states.plain?.stage === "ready";
  const inTurn = byId("in-turn").checked;
  const asked = plainReady ? [columns.orthrus, columns.plain] : [columns.orthrus];
  scale.reset(states.orthrus.width ?? 32);
  for (const column of asked) {
    column.begin();
    column.withSchema = Boolean(question.schema.trim());
    column.hasMetrics = states[column.side].metrics;
  }
  wasAsked = true;
  setVerdict(["", "Asking …", ""]);
  await run(async (signal) => {
    if (inTurn) for (const column of asked) await follow(column, question, signal);
    else await Promise.all(asked.map((column) => follow(column, question, signal)));
    setVerdict(verdict(columns.orthrus, columns.plain, plainReady, inTurn));
  }, () => setVerdict(["", "Stopped.", "What still ran on the servers was ended, too."]));
}

function wait(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

async function replayColumn(column, signal) {
  const events = column.events;
  column.begin(events.find(({ event }) => event === "marks")?.own);
  const started = performance.now();
  for (const event of events) {
    if (event.ms) await wait(Math.max(0, SLOWER * event.ms - (performance.now() - started)), signal);
    column.take(event);
  }
}

async function replay() {
  const { kind } = byId("verdict").dataset;
  const sentence = [...byId("verdict").childNodes];
  const shown = Object.values(columns).filter((column) => column.end);
  const recorded = shown.map((column) => column.events);
  setVerdict(["", "The same answers, ten times as slow.", ""]);
  await run(
    (signal) => Promise.all(shown.map((column) => replayColumn(column, signal))),
    () => shown.forEach((column, index) => showAtOnce(column, recorded[index])),
  );
  byId("verdict").replaceChildren(...sentence);
  byId("verdict").dataset.kind = kind;
}

function showAtOnce(column, events) {
  column.begin();
  for (const event of events) column.take(event);
}

byId("columns").append(columns.orthrus.element, columns.plain.element);
byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!byId("ask").disabled) ask();
});
byId("request").addEventListener("input", () => (clearErrors(), showFilled()));
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("request").requestSubmit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("replay").addEventListener("click", replay);
watchServers(columns, (changed) => {
  states = changed;
  updateButtons();
  // Until the first answer, the verdict's place says what to do.
  if (!wasAsked && byId("verdict").textContent !== welcome(states)) setVerdict(["", welcome(states), ""]);
});
showExamples();
