// Talks to the page's own server. What comes back is data, and is only ever shown as text.

/** The state of both servers. */
export async function serverStates() {
  const response = await fetch("/api/state");
  if (!response.ok) throw new Error(response.statusText);
  return response.json();
}

/** The events of one server's answer, as they come. The signal ends the request. */
export async function* answerEvents(side, question, signal) {
  try {
    const response = await fetch(`/api/answer/${side}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
      signal,
    });
    if (response.ok) yield* lines(response.body.pipeThrough(new TextDecoderStream()));
    else yield failure(await refusal(response), response.status === 400 ? "prompt" : null);
  } catch (error) {
    if (signal.aborted) throw error;
    yield failure(`This page's own server does not answer; start it again. (${error.message})`);
  }
}

function failure(message, field = null) {
  return { event: "error", message, field };
}

async function refusal(response) {
  if (response.status === 413) return "This request is too large for the page.";
  try {
    return (await response.json()).message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function* lines(chunks) {
  let rest = "";
  for await (const chunk of chunks) {
    const parts = (rest + chunk).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
