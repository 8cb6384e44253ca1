import { setKey } from "./api.js";
import { start as startExperiment } from "./experiment.js";
import { redraw, watch } from "./monitor.js";
import { start } from "./playground.js";

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  root.dataset.theme = theme;
  redraw();
}

setTheme(localStorage.getItem("outpace-theme") ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => localStorage.getItem("outpace-theme") ?? setTheme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => {
  const theme = root.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("outpace-theme", theme);
  setTheme(theme);
});
document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(document.getElementById("key").value);
});
startExperiment();
start();
watch();
