// The rater's page. Gradio draws the views (rater.py); this file shows one of them and talks to the server.
// Text from the server enters the page through textContent only.

const LINK = /^#([0-9a-f]{32})$/;
const PLATFORM = ["PROLIFIC_PID", "STUDY_ID", "SESSION_ID", "workerId", "assignmentId", "hitId", "participantId", "projectId"];
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" };
const DOUBLE_CLICK_MS = 250; // the second click of a double click must not answer the pair that came after the first

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

let state = null; // what /api/state said last
let trial = null; // the displayed trial
let began = 0; // performance.now() when its images were asked for
let shownAt = null; // performance.now() of the frame in which both images appeared
let open = false; // whether a choice is taken now
const images = new Map(); // address -> promise of a decoded image

// ---- server

async function call(method, path, body) {
  const options = { method, headers: { "X-Study": "1" }, credentials: "same-origin", cache: "no-store" };
  if (body) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  // A vote is safe to send again: the server answers the same choice on the same pair like the first time.
  for (let wait = 300; ; wait = Math.min(wait * 2, 5000)) {
    try {
      const response = await fetch(new URL(path, document.baseURI), options);
      if (response.status < 500 && response.status !== 429) {
        notice("");
        return { status: response.status, body: await response.json() };
      }
      wait = Math.max(wait, 1000 * Number(response.headers.get("Retry-After") || 0));
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // TypeError is fetch's word for no connection
    }
    notice("The connection is lost. Trying again…");
    await sleep(wait);
  }
}

// ---- views

function view(name, focus) {
  document.body.dataset.view = name;
  for (const number of document.querySelectorAll(".rater-id")) number.textContent = state?.rater ?? "";
  window.scrollTo(0, 0);
  focus?.focus({ preventScroll: true });
}

function message(title, text, again = true) {
  $("message-title").textContent = title;
  $("message-text").textContent = text;
  $("again").style.display = again ? "" : "none";
  view("message", again ? $("again") : null);
}

function notice(text) {
  if ($("notice").textContent !== text) $("notice").textContent = text;
  // The notice of the trial view is not seen on the others.
  if (document.body.dataset.view !== "trial") $("agree-error").textContent = text;
}

function refused({ status, body }) {
  if (status === 423) message("The study is paused", body.message);
  else message("This page cannot be opened", body.message ?? "Please open the link you were given again.");
}

// ---- the way through

async function start() {
  const link = LINK.exec(location.hash);
  const query = new URLSearchParams(location.search);
  const fields = Object.fromEntries(PLATFORM.filter((name) => query.get(name)).map((name) => [name, query.get(name)]));
  let answer;
  if (link) answer = await call("POST", "api/enter", { invite: link[1] });
  else if (Object.keys(fields).length) {
    answer = await call("POST", "api/enter", fields);
    // The platform's ids do not stay in the address bar and the history; from here the cookie knows the rater.
    if (answer.status === 200) history.replaceState(null, "", location.pathname);
  } else answer = await call("GET", "api/state");
  if (answer.status !== 200) return refused(answer);
  state = answer.body;
  if (state.finished) return finish(state.code);
  if (state.paused) return message("The study is paused", "Your answers are saved. Please come back later with the same link.");
  if (!state.consented) return view("consent");
  if (state.answered === 0) return view("instructions", $("begin"));
  return fetchTrial();
}

async function accept() {
  if (!document.querySelector("#agree input").checked) {
    $("agree-error").textContent = "Please tick the box if you agree. Otherwise you may close this page.";
    return;
  }
  $("agree-error").textContent = "";
  const answer = await call("POST", "api/consent", { version: state.consent_version });
  if (answer.status !== 200) return refused(answer);
  state = answer.body;
  view("instructions", $("begin"));
}

async function fetchTrial(text = "") {
  const answer = await call("GET", "api/trial");
  if (answer.status !== 200) return refused(answer);
  await next(answer.body);
  notice(text);
}

async function next(body) {
  if (body.finished) return finish(body.code);
  if (body.break) {
    trial = body;
    const done = body.index - body.practice;
    $("break-text").textContent = `You have answered ${done} of ${body.of - body.practice} pairs. Take a breath and go on when you like.`;
    preload(body);
    return view("break", $("go-on"));
  }
  return show(body);
}

function finish(code) {
  trial = null;
  $("code").textContent = code;
  view("finish", $("copy"));
}

// ---- one pair

function load(address) {
  if (!images.has(address)) {
    const image = new Image();
    image.draggable = false;
    image.src = new URL(address.slice(1), document.baseURI);
    images.set(address, image.decode().then(() => image));
    images.get(address).catch(() => images.delete(address)); // the next call tries again
  }
  return images.get(address);
}

function preload(pair) {
  for (const side of ["left", "right"]) load(pair[side]).catch(() => {});
}

async function both(pair) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 5000)) {
    try {
      return await Promise.all([load(pair.left), load(pair.right)]);
    } catch {
      if (trial !== pair) return null;
      $("waiting").textContent = "The images cannot be loaded. Trying again…";
      await sleep(wait);
    }
  }
}

function take(on) {
  open = on;
  for (const button of document.querySelectorAll("#view-trial .choice[aria-disabled]")) button.setAttribute("aria-disabled", String(!on));
}

function place(pair) {
  const main = pair.index >= pair.practice;
  const [done, of] = main ? [pair.index - pair.practice, pair.of - pair.practice] : [pair.index, pair.practice];
  $("where").textContent = `${main ? "Pair" : "Practice"} ${done + 1} of ${of}`;
  $("progress").max = of;
  $("progress").value = done;
}

async function show(pair) {
  trial = pair;
  shownAt = null;
  take(false);
  place(pair);
  $("prompt").textContent = pair.prompt;
  for (const side of ["left", "right"]) $(`frame-${side}`).replaceChildren();
  $("stage").setAttribute("aria-busy", "true");
  $("waiting").textContent = "Loading the images…";
  if (document.body.dataset.view !== "trial") view("trial", $("prompt"));
  began = performance.now();
  const decoded = await both(pair);
  if (trial !== pair || !decoded) return; // another pair took its place meanwhile
  ["left", "right"].forEach((side, at) => {
    decoded[at].alt = `${side === "left" ? "Left" : "Right"} image`;
    // Small pictures are shown as they are, pixel by pixel, not as a blur that the browser makes up.
    decoded[at].classList.toggle("small", decoded[at].naturalWidth < 128);
    $(`frame-${side}`).replaceChildren(decoded[at]);
  });
  $("stage").setAttribute("aria-busy", "false");
  $("announce").textContent = `${$("where").textContent}. ${pair.prompt}`;
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  if (trial !== pair) return;
  shownAt = performance.now();
  if (pair.next) preload(pair.next);
  for (const address of images.keys()) {
    const used = [pair.left, pair.right, pair.next?.left, pair.next?.right];
    if (!used.includes(address)) images.delete(address);
  }
  await sleep(Math.max(state.min_view_ms, DOUBLE_CLICK_MS));
  if (trial === pair) take(true);
}

async function choose(choice, text) {
  const missing = choice === "problem" && shownAt === null; // images that never came can be reported
  if (!trial || (!open && !missing)) return;
  const pair = trial;
  const response = Math.round(performance.now() - (shownAt ?? began));
  take(false);
  const vote = { trial: pair.trial, choice, response_ms: response };
  if (text) vote.text = text;
  const answer = await call("POST", "api/vote", vote);
  if (answer.status === 200) return next(answer.body);
  // Answered in another tab, or this tab is behind: go to where the rater is.
  if (answer.status === 409 || answer.status === 404) return fetchTrial(answer.body.message);
  return refused(answer);
}

// ---- enlarge, report

function enlarge(side) {
  const image = $(`frame-${side}`).querySelector("img");
  if (!image) return;
  const copy = image.cloneNode();
  copy.alt = `${image.alt}, enlarged`;
  $("large-frame").replaceChildren(copy);
  $("large").showModal();
}

function report() {
  if (!trial || (!open && shownAt !== null)) return;
  $("problem-text").value = "";
  $("problem").showModal();
}

function sendReport() {
  $("problem").close();
  choose("problem", $("problem-text").value.trim());
}

// ---- events

function key(event) {
  if (document.body.dataset.view !== "trial" || $("large").open || $("problem").open) return;
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const choice = KEYS[event.key];
  if (choice) event.preventDefault(); // the page must not scroll away under a choice
  if (event.repeat) return;
  if (choice) choose(choice);
  else if (event.key === "p" || event.key === "P") {
    event.preventDefault();
    report();
  }
}

async function come() {
  // Another tab may have gone on meanwhile.
  if (document.visibilityState !== "visible" || document.body.dataset.view !== "trial" || !open) return;
  const before = trial;
  const answer = await call("GET", "api/trial");
  if (trial !== before || !open) return;
  if (answer.status !== 200) return refused(answer);
  if (answer.body.trial !== before.trial) next(answer.body);
}

function wire() {
  $("accept").addEventListener("click", accept);
  $("begin").addEventListener("click", () => fetchTrial());
  $("go-on").addEventListener("click", () => show(trial));
  $("again").addEventListener("click", start);
  for (const side of ["left", "right"]) $(`frame-${side}`).addEventListener("click", () => enlarge(side));
  for (const choice of ["left", "right", "tie"]) {
    // detail counts the clicks of a double click; keys give 0
    $(`choose-${choice}`).addEventListener("click", (event) => event.detail < 2 && choose(choice));
  }
  $("report").addEventListener("click", report);
  $("problem-send").addEventListener("click", sendReport);
  $("problem-cancel").addEventListener("click", () => $("problem").close());
  $("large").addEventListener("click", () => $("large").close());
  $("copy").addEventListener("click", async () => {
    getSelection().selectAllChildren($("code")); // where the clipboard is closed to the page, it is at least selected
    await navigator.clipboard.writeText($("code").textContent);
    $("copied").textContent = "Copied.";
  });
  document.addEventListener("keydown", key);
  document.addEventListener("visibilitychange", come);
  window.addEventListener("hashchange", () => location.reload());
  window.addEventListener("pageshow", (event) => event.persisted && start()); // back to a page the browser had kept
}

// Gradio draws its components after this file has run; the footer is the last of them.
const drawn = setInterval(() => {
  if (!$("footer-number") || !$("again") || !document.querySelector("#agree input")) return;
  clearInterval(drawn);
  wire();
  start();
}, 20);
