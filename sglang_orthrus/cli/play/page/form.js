// The request: examples, boxes, and errors beside the box that they are about.

const box = (id) => document.getElementById(id);
const FIELDS = ["prompt", "schema", "tools"];

/** What a box of tools holds. Throws a sentence if it is no JSON array. */
export function parseTools(text) {
  if (!text.trim()) return [];
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is no JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("Tools are a JSON array: put [ ] around them.");
  return tools;
}

/** The request as the page's server takes it; null if a box must be changed first. */
export function readQuestion() {
  clearErrors();
  let tools;
  try {
    tools = parseTools(box("tools").value);
  } catch (error) {
    showError("tools", error.message);
    return null;
  }
  return {
    prompt: box("prompt").value,
    system: box("system").value,
    schema: box("schema").value,
    tools,
    max_tokens: box("max-tokens").valueAsNumber || 0,
    thinking: box("thinking").checked,
  };
}

export function clearErrors() {
  for (const field of FIELDS) {
    box(`${field}-error`).textContent = "";
    box(field).removeAttribute("aria-invalid");
  }
}

/** Say what is wrong beside its box, and open the box. */
export function showError(field, message) {
  box(`${field}-error`).textContent = message;
  box(field).setAttribute("aria-invalid", "true");
  const part = box(`${field}-part`);
  if (part) part.open = true;
}

/** Buttons that fill the boxes; another click on one takes its next example. */
export async function showExamples() {
  const families = await (await fetch("/prompts.json")).json();
  const buttons = families.map(({ label, examples }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.setAttribute("aria-pressed", "false");
    let next = 0;
    button.addEventListener("click", () => {
      fill(examples[next]);
      next = (next + 1) % examples.length;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    });
    return button;
  });
  box("examples").append(...buttons);
  buttons[0].click();
}

function fill({ prompt, system = "", schema = null, tools = null, thinking = false }) {
  clearErrors();
  box("prompt").value = prompt;
  box("system").value = system;
  box("schema").value = schema ? JSON.stringify(schema, null, 2) : "";
  box("tools").value = tools ? JSON.stringify(tools, null, 2) : "";
  box("thinking").checked = thinking;
  showFilled();
}

/** Say at closed boxes that they hold something. */
export function showFilled() {
  for (const field of ["schema", "tools"]) {
    box(`${field}-part`).querySelector(".filled").hidden = !box(field).value.trim();
  }
}
