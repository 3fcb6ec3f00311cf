// What the server says of an answer's drafts, and what it leaves open, in sentences.

import { count } from "./words.js";

export function draftSentences(end, chunks, grammar, withSchema, hasMetrics) {
  const sentences = [
    `${count(end.proposed, "draft")} in ${count(end.rounds, "round")}: ${end.accepted} accepted, ` +
      `${end.proposed - end.accepted} not.`,
  ];
  if (chunks !== end.rounds) {
    sentences.push(
      `Some of these rounds came together, so a shade may be several of them (${count(chunks + 1, "chunk")}). ` +
        "Which tokens are the autoregressive view's own is unknown then.",
    );
  }
  if (grammar) {
    sentences.push(grammarSentence(end, grammar));
  } else if (withSchema) {
    sentences.push(
      hasMetrics
        ? "Asking the server which drafts the schema changed."
        : "How many drafts the schema repaired or forced is unknown: the server runs without --enable-metrics.",
    );
  }
  return sentences;
}

function grammarSentence(end, { none, repaired, forced }) {
  const total = none + repaired + forced;
  const others =
    total === end.proposed ? "" : ` It counted ${total} drafts meanwhile, so rounds beyond this answer are among them.`;
  return (
    `Before they were verified, the schema repaired ${repaired} drafts and forced ${forced}. ` +
    `The server counts them, but does not say which they are.${others}`
  );
}
