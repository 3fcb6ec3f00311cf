// Both answers compared, in a sentence or two.

import { count, seconds } from "./words.js";

/** What to say before anything was asked. */
export function welcome({ orthrus, plain }) {
  if (!orthrus) return "This page's own server does not answer. Start it again.";
  if (orthrus.stage === "starting") return "The servers are starting. Choose an example, or type a message.";
  if (orthrus.stage !== "ready") return "There is no ORTHRUS server. Its column says why.";
  if (plain.stage === "starting") return "Plain SGLang is still starting. ORTHRUS can be asked.";
  return "Choose an example, or type a message, and ask.";
}

/** What to say when both have ended: [kind, sentence, remark]. */
export function verdict(orthrus, plain, plainReady, inTurn) {
  const failed = [orthrus, plain].filter((column) => column.error);
  if (failed.length === 2 && orthrus.error === plain.error) return ["failed", "Both servers refused the request.", ""];
  if (failed.length) return ["failed", `No comparison: ${failed[0].title} gave no answer.`, ""];
  if (!plainReady) {
    const end = orthrus.end;
    return ["", `${count(end.tokens, "token")} in ${count(end.rounds ?? 0, "round")}, ${seconds(orthrus.milliseconds)}.`,
      "Plain SGLang is missing, so nothing is compared."];
  }
  const at = firstDifference(orthrus.ids, plain.ids);
  if (at !== null) {
    return ["different", `The answers differ from token ${at + 1} on.`,
      "In fp32 this is a bug; please report it. In bf16 it happens at near ties, where plain SGLang's output changes with batch size, too."];
  }
  const ratio = plain.milliseconds / orthrus.milliseconds;
  const speed = ratio >= 1 ? `${ratio.toFixed(1)} times as fast` : `slower, at ${ratio.toFixed(2)} of plain SGLang's speed`;
  return [
    "equal",
    `Both answers are the same ${count(orthrus.ids.length, "token")}. ORTHRUS was ${speed}.`,
    `${seconds(orthrus.milliseconds)} and ${seconds(plain.milliseconds)}` +
      (inTurn ? ", one after the other." : ", at once. Servers on one machine slow each other down."),
  ];
}

export function firstDifference(left, right) {
  const length = Math.max(left.length, right.length);
  for (let index = 0; index < length; index += 1) if (left[index] !== right[index]) return index;
  return null;
}
