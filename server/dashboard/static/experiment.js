// The experiment between arms: where it is, what every metric says by now, and an operator's buttons.

import { act, get } from "./api.js";
import { TimeChart } from "./chart.js";

const $ = (id) => document.getElementById(id);
const chart = new TimeChart("chart-experiment", 3, true);
const WORDS = { worse: "worse", better: "better", undecided: "not decided" };

function percent(value, metric) {
  if (value === null) return "–";
  return `${value > 0 ? "+" : ""}${(100 * value).toFixed(1)} %`;
}

function line(kind, texts) {
  const row = document.createElement("tr");
  for (const text of texts) row.appendChild(document.createElement(kind)).textContent = text;
  return row;
}

function draw(told) {
  $("experiment-title").textContent = `Experiment ${told.name}: ${told.status.replace("_", " ")}`;
  const shares = Object.entries(told.weights).map(([name, share]) => `${name} ${share} %`);
  const stage = told.stage === null ? "" : `Stage ${told.stage + 1} of ${told.stages.length}: `;
  $("experiment-state").textContent = `${stage}${shares.join(", ")}. ${told.reason}`;
  const rows = told.findings.map((f) => {
    const row = line("td", [
      f.metric,
      percent(f.estimate, f.metric),
      `${percent(f.lower, f.metric)} … ${percent(f.upper, f.metric)}`,
      WORDS[f.claim],
      `${f.num_candidate} / ${f.num_baseline}`,
    ]);
    row.dataset.claim = f.claim;
    return row;
  });
  const head = line("th", ["Candidate against baseline", "Estimate", "Holds at every moment", "", "Requests"]);
  $("experiment-table").replaceChildren(head, ...rows);
  const primary = told.findings.find((f) => f.metric === told.primary);
  $("experiment-caption").textContent = `${told.primary}, %: estimate and confidence sequence`;
  if (primary) {
    const scaled = (value) => (value === null ? null : 100 * value);
    const { lower, estimate, upper } = primary;
    chart.add(Date.now() / 1000, { lower: scaled(lower), estimate: scaled(estimate), upper: scaled(upper) });
  }
  const over = ["promoted", "rolled_back"].includes(told.status);
  $("promote").disabled = over || told.status === "waiting";
  $("pause").disabled = told.status !== "running";
  $("resume").disabled = told.status !== "paused";
  $("roll_back").disabled = told.status === "rolled_back" || told.status === "waiting";
}

export async function show() {
  const [told] = (await get("v1/experiments")).data;
  $("experiment").hidden = !told;
  if (told) draw(told);
}

export function redraw() {
  chart.draw(true);
}

export function start() {
  for (const action of ["promote", "roll_back", "pause", "resume"]) {
    $(action).addEventListener("click", async () => {
      const answer = $("experiment-answer");
      try {
        await act(action, $("admin-key").value);
        answer.textContent = "Done.";
        await show();
      } catch (error) {
        answer.textContent = error.message;
      }
    });
  }
}
