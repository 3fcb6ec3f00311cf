// How far both servers are: beside the title, and in a column that has no answer yet.

import { serverStates } from "./stream.js";

const OFTEN = 1000;
const SELDOM = 5000;
const STAGES = { starting: "starting", ready: "ready", failed: "failed", unreachable: "not found", absent: "missing" };

/** Ask again and again; `changed` gets the states. */
export async function watchServers(columns, changed) {
  let known = {};
  for (;;) {
    try {
      const states = await serverStates();
      for (const [side, state] of Object.entries(states)) show(columns[side], state, known[side]?.stage);
      known = states;
      changed(states);
    } catch {
      known = {};
      for (const column of Object.values(columns)) showPill(column.side, { stage: "failed", text: "page has ended" });
      changed({});
    }
    const isSettled = Object.values(known).every(({ stage }) => stage === "ready" || stage === "absent");
    await new Promise((resolve) => setTimeout(resolve, isSettled && known.orthrus ? SELDOM : OFTEN));
  }
}

function show(column, state, before) {
  const text = state.stage === "starting" ? `starting, ${state.seconds} s` : STAGES[state.stage];
  showPill(column.side, { stage: state.stage, text: state.model ? `${text}, ${state.model}` : text });
  if (state.stage === "starting") {
    column.say(`Starting, usually for less than a minute: ${state.seconds} s so far.`, "", { log: state.words, isWaiting: true });
  } else if (state.stage !== before) {
    if (state.stage === "failed") column.say("This server did not start, or ended.", "error", { log: state.words });
    else column.say(state.words, state.stage === "unreachable" ? "error" : "");
  }
}

function showPill(side, { stage, text }) {
  const pill = document.getElementById(`${side}-server`);
  pill.dataset.stage = stage;
  pill.querySelector(".stage").textContent = text;
}
