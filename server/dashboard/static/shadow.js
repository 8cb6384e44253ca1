// Answers beside their copies: how many were compared, differed, must not have differed, and found no room.

const $ = (id) => document.getElementById(id);
const COUNTS = ["compared", "diverged", "alarms", "dropped"];

function line(kind, texts) {
  const row = document.createElement("tr");
  for (const text of texts) row.appendChild(document.createElement(kind)).textContent = text;
  return row;
}

const sum = (values) => Object.values(values).reduce((a, b) => a + b, 0);

// Of one pair of arms; a shadow's counters are told by the arm that it stands beside.
function shadowOf(values, of) {
  const counts = COUNTS.slice(0, 3).map((name) => values[`shadow_${name}_total`]?.[of] ?? 0);
  const dropped = Object.entries(values.shadow_dropped_total ?? {}).filter(([key]) => key.startsWith(`${of}/`));
  return [...counts, sum(Object.fromEntries(dropped))];
}

function auditOf(values) {
  return [...COUNTS.slice(0, 3).map((name) => values[`audit_${name}_total`]), sum(values.audit_dropped_total ?? {})];
}

// `stats` is what /v1/stats answers.
export function show(stats) {
  const found = [];
  for (const [arm, { values }] of Object.entries(stats.arms)) {
    if ("audit_compared_total" in values) found.push([`${arm} again without drafts`, auditOf(values)]);
    for (const of of Object.keys(values.shadow_compared_total ?? {})) found.push([`${of} beside ${arm}`, shadowOf(values, of)]);
  }
  $("shadow").hidden = !found.length;
  const rows = found.map(([what, counts]) => {
    const row = line("td", [what, ...counts.map(String)]);
    row.dataset.alarm = String(counts[2] > 0);
    return row;
  });
  $("shadow-table").replaceChildren(line("th", ["Answers of", "Compared", "Differed", "Alarms", "Dropped"]), ...rows);
}
