"use strict";
// Sends forms, shows what the server says, and puts new parts of a page in place.
const token = document.querySelector("meta[name=wan-token]").content;
const one = (query, from = document) => from.querySelector(query);
const all = (query, from = document) => [...from.querySelectorAll(query)];
const stages = { caption: "describing the video", prompt: "writing the prompt", text: "reading the prompt", prepare: "preparing", encode: "reading the video", load: "loading the model", sample: "sampling", keep: "saving", decode: "decoding", correct: "correcting drift", write: "writing" };
let quiet;

function say(words) {
  const box = one("#said");
  box.textContent = words;
  clearTimeout(quiet);
  quiet = setTimeout(() => { box.textContent = ""; }, 8000);
}

async function ask(url, method = "GET", body = undefined) {
  const headers = { "X-Wan-Token": token };
  if (body && !(body instanceof FormData)) { headers["Content-Type"] = "application/json"; body = JSON.stringify(body); }
  let answer;
  try {
    answer = await fetch(url, { method, headers, body });
  } catch {
    throw new Error("the server cannot be reached");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ? found.error.message : `the server says ${answer.status}`);
  return found;
}

// --- parts of the page that the server makes

async function renew(part) {
  const answer = await fetch(part.dataset.part, { headers: { "X-Wan-Token": token } }).catch(() => null);
  if (!answer || !answer.ok) return;
  const text = await answer.text();
  if (part.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) {
    part.dataset.late = "yes"; // somebody is writing there
    return;
  }
  if (text.trim() === (part.renewed || "")) return;
  part.renewed = text.trim();
  const open = all("details[open][data-keep]", part).map((found) => found.dataset.keep);
  const video = one("#joined", part);
  const at = video ? [video.currentTime, video.paused, video.getAttribute("src")] : null;
  const made = new DOMParser().parseFromString(text, "text/html");
  part.replaceChildren(...made.body.childNodes);
  for (const name of open) { const found = one(`details[data-keep="${name}"]`, part); if (found) found.open = true; }
  const now = one("#joined", part);
  if (at && now) {
    if (video.getAttribute("src") === at[2] && now.getAttribute("src") === at[2]) now.replaceWith(video);
    else { now.currentTime = at[0]; if (!at[1]) now.play().catch(() => {}); }
  }
}

document.addEventListener("focusout", () => setTimeout(() => {
  for (const part of all("[data-late]")) { delete part.dataset.late; renew(part); }
}, 200));

for (const part of all("[data-every]")) {
  setInterval(() => { if (!document.hidden) renew(part); }, Number(part.dataset.every));
}

// --- forms and buttons

function bodyOf(form) {
  const data = new FormData();
  for (const [name, value] of new FormData(form)) {
    if (value instanceof File ? value.size : value !== "" || form.dataset.method === "PATCH" && !form.dataset.wrap) data.append(name, value);
  }
  for (const input of all("[data-picture]", form)) {
    if (input.files.length) { data.append("pictures", input.files[0]); data.append(input.dataset.picture, input.files[0].name); }
  }
  if (!form.dataset.wrap) return data;
  const settings = Object.fromEntries(data);
  const count = settings.num_videos;
  delete settings.num_videos;
  return { [form.dataset.wrap]: settings, ...(count ? { num_videos: Number(count) } : {}) };
}

let draft = null;

async function drop() {
  if (draft) { const old = draft; draft = null; await ask(`/v1/chains/${old}`, "DELETE").catch(() => {}); }
}

async function showPlan(chain) {
  draft = chain.id;
  const box = one("#plan");
  one("#plan-lines").textContent = "Looking at it …";
  one("#start").disabled = true;
  box.hidden = false;
  box.scrollIntoView({ block: "nearest" });
  try {
    one("#plan-lines").textContent = (await ask(`/v1/chains/${chain.id}/plan`)).lines.join("\n");
    one("#start").disabled = false;
    one("#start").focus();
  } catch (error) {
    one("#plan-lines").textContent = error.message;
  }
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.dataset.api) return;
  event.preventDefault();
  const button = one("button[type=submit], button:not([type])", form);
  const plan = form.dataset.then === "plan";
  if (button) button.disabled = true;
  try {
    if (plan) await drop();
    const found = await ask(form.dataset.api, form.dataset.method, bodyOf(form));
    if (plan) await showPlan(found);
    else {
      say("Done.");
      const edit = form.closest(".edit");
      if (edit) edit.open = false;
      if (document.activeElement && form.contains(document.activeElement)) document.activeElement.blur();
      for (const part of all("[data-part]")) renew(part);
      if (found.status) showState(found);
    }
  } catch (error) {
    say(error.message);
  }
  if (button) button.disabled = false;
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.matches(".seek")) {
    const video = one("#joined");
    video.currentTime = Number(button.dataset.time);
    video.play().catch(() => {});
  } else if (button.id === "start" && draft) {
    try {
      const id = draft;
      await ask(`/v1/chains/${id}/start`, "POST");
      draft = null;
      location.href = `/chains/${id}`;
    } catch (error) { say(error.message); }
  } else if (button.id === "discard") {
    await drop();
    one("#plan").hidden = true;
  } else if (button.dataset.do) {
    if (button.dataset.ask && !confirm(button.dataset.ask)) return;
    try {
      const found = await ask(button.dataset.do, button.dataset.method || "POST");
      if (button.dataset.to) location.href = button.dataset.to;
      else showState(found);
    } catch (error) { say(error.message); }
  }
});

const dropping = one("#drop");
if (dropping) {
  const input = one("#video");
  for (const kind of ["dragenter", "dragover"]) dropping.addEventListener(kind, (event) => { event.preventDefault(); dropping.classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) dropping.addEventListener(kind, () => dropping.classList.remove("over"));
  dropping.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) { input.files = event.dataTransfer.files; input.dispatchEvent(new Event("change")); }
  });
  input.addEventListener("change", () => {
    one("#drop-words").hidden = input.files.length > 0;
  });
}

// --- what happens to a chain

const now = one("#now");
const names = { draft: "Not started", in_progress: "Making", queued: "Waiting for its turn", completed: "Finished", paused: "Paused", failed: "Failed" };
let count = 0, finished = 0, began = 0, before = 0, done = 0;

function span(seconds) {
  return seconds < 120 ? `${Math.round(seconds)} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function showState(chain) {
  if (!now) return;
  const words = one("#now-words");
  words.dataset.status = chain.status;
  words.textContent = names[chain.status] || chain.status;
  if (chain.clips_asked !== undefined) {
    count = chain.clips_asked;
    finished = chain.clips_finished;
    one("#bar").value = chain.progress;
    one("#now-more").textContent = `${finished} of ${count} clips`;
  }
  if (chain.status !== "in_progress") one("#preview").hidden = true;
  for (const button of all("[data-when]", now)) button.hidden = !button.dataset.when.split(" ").includes(chain.status);
}

if (now) {
  showState({ status: one("#now-words").dataset.status });
  const part = one("#clips");
  const events = new EventSource(now.dataset.events);
  const on = (name, then) => events.addEventListener(name, (event) => then(JSON.parse(event.data)));
  on("state", (said) => {
    if (said.object) showState(said);
    else ask(now.dataset.events.replace("/events", "")).then(showState).catch(() => {});
    renew(part);
  });
  on("there", (said) => { finished = said.done; count = said.count; });
  on("clip_started", (said) => { before = done = 0; count = said.count; one("#now-words").textContent = `Clip ${said.clip} of ${said.count}`; renew(part); });
  on("stage", (said) => { began = performance.now(); before = said.step; one("#now-words").textContent = `Clip ${said.clip}${count ? ` of ${count}` : ""}: ${stages[said.stage] || said.stage}`; });
  on("step", (said) => {
    const share = said.steps ? said.step / said.steps : 0;
    done = said.step;
    const taken = (performance.now() - began) / 1000;
    if (count) one("#bar").value = Math.max(Math.min(100 * (said.clip - 1 + share) / count, 99), one("#bar").value);
    // models load in the middle of the steps, so only those of this stage tell how long one takes
    const left = said.stage === "sample" && done > before && share < 1 ? `, ${span(taken / (done - before) * (said.steps - done))} left for this clip` : "";
    one("#now-more").textContent = `${said.stage === "sample" ? `step ${said.step} of ${said.steps}` : stages[said.stage] || said.stage}${left}`;
  });
  on("preview", (said) => { const picture = one("#preview"); picture.src = `${now.dataset.preview}?v=${said.version}`; picture.hidden = false; });
  on("clip_finished", (said) => { finished = said.clip; renew(part); });
  on("warning", (said) => say(said.message));
}

// --- keys

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const video = one("#joined");
  if (video && (event.key === "j" || event.key === "k")) { // from seam to seam
    const seams = all(".seek").map((button) => Number(button.dataset.time));
    const next = event.key === "j" ? seams.find((time) => time > video.currentTime + 0.05) : seams.reverse().find((time) => time < video.currentTime - 0.3);
    if (next !== undefined) video.currentTime = next;
  } else if (video && event.key === " " && event.target === document.body) {
    event.preventDefault();
    if (video.paused) video.play().catch(() => {}); else video.pause();
  } else if (event.key === "n" && one("#prompt")) { event.preventDefault(); one("#prompt").focus(); }
});
