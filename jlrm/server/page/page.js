// The page of a judge. What people and models write is text, and is never made into HTML.
"use strict";

const KEPT = 50; // earlier judgements in this browser
const OTHERS = { 0: "A tie", null: "No verdict" };
const of = (id) => document.getElementById(id);
let running = null; // what ends the request under way

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

// The answers, without empty ones at their end.
function answers() {
  const texts = [...document.querySelectorAll("#answers textarea")].map((each) => each.value);
  return texts.slice(0, 1 + texts.findLastIndex((each) => each.trim()));
}

function addAnswer(text = "") {
  const number = document.querySelectorAll("#answers textarea").length + 1;
  const box = element("div");
  const label = element("label", `Answer ${number}`);
  const area = element("textarea");
  area.id = `answer-${number}`;
  area.rows = 6;
  area.required = number === 1;
  if (number === 2) area.placeholder = "Left empty, answer 1 is scored by itself.";
  area.value = text;
  label.htmlFor = area.id;
  box.append(label, area);
  of("answers").append(box);
  return area;
}

function show(asked) {
  of("question").value = asked.question ?? "";
  of("answers").replaceChildren();
  const texts = asked.answers ?? [];
  for (let i = 0; i < Math.max(2, texts.length); i++) addAnswer(texts[i] ?? "");
  for (const name of ["orders", "votes", "temperature", "seed", "rubric", "reference", "expected_scores", "at_once"])
    of(name).value = asked[name] ?? (name === "orders" ? "both" : "");
}

function asked() {
  return {
    question: of("question").value,
    answers: answers(),
    orders: of("orders").value,
    ...Object.fromEntries(
      // What is left empty is the server's own.
      ["votes", "temperature", "seed"]
        .filter((name) => of(name).value !== "")
        .map((name) => [name, Number(of(name).value)]),
    ),
    ...Object.fromEntries(
      ["rubric", "reference"].filter((name) => of(name).value.trim()).map((name) => [name, of(name).value]),
    ),
    ...(of("expected_scores").value && { expected_scores: true }),
    ...(of("at_once").value && { at_once: of("at_once").value === "true" }),
  };
}

// --- asking ---------------------------------------------------------------------------------------

function body(wanted) {
  const { question, answers, ...settings } = wanted;
  if (settings.rubric) settings.rubric = criteria(settings.rubric);
  const [answer, answer_2] = answers;
  const forms = { 1: { answer }, 2: { answer_1: answer, answer_2 } };
  const texts = forms[answers.length] ?? { answers };
  if (answers.length === 1) delete settings.orders;
  if (answers.length <= 2) delete settings.at_once;
  return JSON.stringify({ question, ...texts, ...settings, stream: true });
}

// Criteria where the text is an object of JSON; every other text is a rubric as it stands.
function criteria(text) {
  try {
    const read = JSON.parse(text);
    return typeof read === "object" && read !== null ? read : text;
  } catch {
    return text;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function judge(wanted) {
  const control = new AbortController();
  running = control;
  of("go").disabled = true;
  of("stop").hidden = false;
  of("verdict").hidden = true;
  of("games").replaceChildren();
  tell("Judging …");
  try {
    const headers = { "Content-Type": "application/json" };
    if (of("key").value) headers.Authorization = `Bearer ${of("key").value}`;
    const response = await fetch("/v1/judge", {
      method: "POST", headers, body: body(wanted), signal: control.signal,
    });
    if (!response.ok) throw new Error(await complaint(response));
    let isDone = false;
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.result) isDone = true;
      if (event.result) finish(wanted, event.result);
      else grow(event, wanted.answers.length);
    }
    if (!isDone) throw new Error("The server has gone away.");
  } catch (error) {
    tell(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    of("go").disabled = false;
    of("stop").hidden = true;
  }
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function tell(text, isWrong = false) {
  of("told").textContent = text;
  of("told").className = isWrong ? "wrong" : "";
}

// --- what comes back ------------------------------------------------------------------------------

function grow(event, numAnswers) {
  const id = `game-${event.pair}-${event.order.join("-")}-${event.vote}`;
  let card = of(id);
  if (!card) {
    card = element("article", "", "card");
    card.id = id;
    const heading = element("h2", title(event, numAnswers));
    card.append(heading, element("div", "", "text"), element("div", "", "text written"));
    card.dataset.text = "";
    of("games").append(card);
  }
  card.dataset.text += event.text;
  // What the judge thinks, and below it what it says.
  const [thought, ...said] = card.dataset.text.replace(/^\s*<think>/, "").split("</think>");
  card.children[1].textContent = thought.trim();
  card.children[2].textContent = said.join("</think>").trim();
}

function title(event, numAnswers) {
  let [first, second, ...rest] = event.order;
  const vote = event.vote > 0 || of("votes").value > 1 ? `, vote ${event.vote + 1}` : "";
  if (first === second) return `Answer ${first} by itself${vote}`;
  if (rest.length) return `Answers shown in the order ${event.order.join(", ")}${vote}`;
  if (numAnswers > 2) [first, second] = places(numAnswers)[event.pair][first === 1 ? "slice" : "toReversed"]();
  return `Answer ${first} shown first, then ${second}${vote}`;
}

function places(num) {
  const found = [];
  for (let i = 1; i <= num; i++) for (let j = i + 1; j <= num; j++) found.push([i, j]);
  return found;
}

function finish(wanted, result) {
  const card = of("verdict");
  card.replaceChildren();
  card.className = "card";
  card.hidden = false;
  const shown = { 1: scored, 2: verdict };
  card.append(...(shown[wanted.answers.length] ?? ranking)(result));
  const line = card.firstChild.textContent;
  tell(`Done: ${line}.`);
  keep({ ...wanted, line });
}

function verdict(result) {
  const made = [element("p", winner(result.winner), "winner")];
  if (result.scores) made.push(element("p", `Scores: ${result.scores.map(short).join(" and ")}`));
  made.push(...criteriaLines(result.criteria));
  if (result.expected_scores)
    made.push(element("p", `Expected scores: ${result.expected_scores.map(short).join(" and ")}`));
  if (result.confidence !== null) {
    const kind = result.is_calibrated ? "how often such verdicts were right" : "by the scores, not calibrated";
    made.push(element("p", `Confidence ${Math.round(100 * result.confidence)} % (${kind})`));
  }
  if (result.is_consistent !== null)
    made.push(
      result.is_consistent
        ? element("p", "Both orders agree.", "agree")
        : element("p", "The orders disagree: the verdict leans on the place of an answer.", "differ"),
    );
  if (result.status !== "ok") made.push(element("p", `Not all games have a verdict: ${result.error ?? result.status}`, "wrong"));
  return made;
}

function scored(result) {
  const line = result.score === null ? OTHERS[null] : `Score ${short(result.score)}`;
  const made = [element("p", line, "winner"), ...criteriaLines(result.criteria)];
  if (result.expected_score !== undefined)
    made.push(element("p", `Expected score: ${short(result.expected_score)}`));
  if (result.status !== "ok")
    made.push(element("p", `Not all texts have a score: ${result.error ?? result.status}`, "wrong"));
  return made;
}

function criteriaLines(criteria) {
  return Object.entries(criteria ?? {}).map(([name, scores]) =>
    element("p", `${name}: ${[scores].flat().map(short).join(" and ")}`, "soft"),
  );
}

function winner(number) {
  return OTHERS[number] ?? `Answer ${number} is better`;
}

function ranking(result) {
  const table = element("table");
  const head = element("tr");
  // Judged at once, or each by itself, answers have scores in place of strengths.
  const scores = result.expected_scores ? ["Score", "Expected"] : ["Score"];
  const told = result.scores ? scores : ["Strength", "95 % interval"];
  for (const name of ["Place", "Answer", ...told, "Games won"]) {
    const cell = element("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  table.append(head);
  result.order.forEach((number, place) => {
    const row = element("tr");
    const cells = [place + 1, number, ...standing(result, number - 1), result.wins[number - 1]];
    row.append(...cells.map((each) => element("td", String(each))));
    table.append(row);
  });
  const unjudged = result.pairs.filter((each) => each.winner === null).length;
  if (unjudged === result.pairs.length) return [element("p", OTHERS[null], "winner")];
  const made = [element("p", `Answer ${result.order[0]} is best`, "winner"), table];
  if (unjudged) made.push(element("p", `${unjudged} of ${result.pairs.length} pairs have no verdict.`, "wrong"));
  return made;
}

function standing(result, i) {
  const scores = [result.scores, result.expected_scores].filter(Boolean);
  if (result.scores) return scores.map((each) => (each[i] === null ? "" : short(each[i])));
  return [short(result.strengths[i]), result.intervals[i].map(short).join(" to ")];
}

function short(number) {
  return String(Number(number.toFixed(2))); // "0" of what rounds to -0, too
}

// --- history and links ----------------------------------------------------------------------------

function earlier() {
  try {
    return JSON.parse(localStorage.getItem("jlrm.history") ?? "[]");
  } catch {
    return [];
  }
}

function keep(entry) {
  const list = [entry, ...earlier()].slice(0, KEPT);
  try {
    localStorage.setItem("jlrm.history", JSON.stringify(list));
  } catch {
    // a browser that keeps nothing
  }
  listHistory();
}

function listHistory() {
  const list = earlier();
  of("nothing").hidden = of("forget").hidden = false;
  of("nothing").hidden = list.length > 0;
  of("forget").hidden = list.length === 0;
  of("history").replaceChildren(
    ...list.map((entry) => {
      const item = element("li");
      const button = element("button", `${entry.question.slice(0, 80)}: ${entry.line}`);
      button.type = "button";
      button.addEventListener("click", () => {
        show(entry);
        of("question").focus();
        scrollTo(0, 0);
      });
      item.append(button);
      return item;
    }),
  );
}

function encoded(value) {
  const bytes = new TextEncoder().encode(JSON.stringify(value));
  return btoa(Array.from(bytes, (each) => String.fromCharCode(each)).join(""));
}

function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  return JSON.parse(new TextDecoder().decode(bytes));
}

async function copyLink() {
  const link = `${location.origin}/#${encoded(asked())}`;
  window.history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    tell("The link is copied. It holds the question, the answers and the settings.");
  } catch {
    tell("The link stands in the address bar.");
  }
}

// --- the page -------------------------------------------------------------------------------------

function begin() {
  let first = {};
  try {
    if (location.hash.length > 1) first = decoded(location.hash.slice(1));
  } catch {
    tell("The link can't be read.", true);
  }
  show(first);
  listHistory();
  of("asked").addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = asked();
    const gap = wanted.answers.findIndex((each) => !each.trim());
    if (gap >= 0) tell(`Answer ${gap + 1} is empty.`, true);
    else if (!running) judge(wanted);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) of("asked").requestSubmit();
    if (event.key === "Escape" && running) running.abort();
  });
  of("more").addEventListener("click", () => addAnswer().focus());
  of("stop").addEventListener("click", () => running?.abort());
  of("link").addEventListener("click", copyLink);
  of("forget").addEventListener("click", () => {
    localStorage.removeItem("jlrm.history");
    listHistory();
    of("question").focus();
  });
  try {
    of("key").value = sessionStorage.getItem("jlrm.key") ?? "";
    of("key").addEventListener("change", () => sessionStorage.setItem("jlrm.key", of("key").value));
  } catch {
    // a browser that keeps nothing
  }
  fetch("/healthz")
    .then((reply) => (reply.ok ? reply.json() : Promise.reject(reply)))
    .then(({ model }) => (of("model").textContent = model))
    .catch(() => tell("The judge is not ready.", true));
}

begin();
