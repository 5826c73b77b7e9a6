// The page: asks the service that it comes from, and shows hits, the router's probabilities and times.

const at = (id) => document.getElementById(id);
const copy = (id) => at(`${id}-template`).content.firstElementChild.cloneNode(true);
const STAGES = { wait: "wait", embed: "embed and route", search: "search", fetch: "fetch texts" };
const MOST_BARS = 8;
let asked = 0;

async function ask(path, body) {
  const headers = { "content-type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  at("locked").hidden = response.status !== 401;
  const answer = await response.json().catch(() => ({ detail: `status ${response.status}` }));
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

// Text with words marked. Places count characters, of which JavaScript stores some as two.
function marked(element, text, words) {
  const letters = Array.from(text);
  let done = 0;
  for (const [start, end] of words) {
    element.append(letters.slice(done, start).join(""));
    const mark = document.createElement("mark");
    mark.textContent = letters.slice(start, end).join("");
    element.append(mark);
    done = end;
  }
  element.append(letters.slice(done).join(""));
}

function bar(name, share, value, chosen) {
  const item = copy("bar");
  item.classList.toggle("chosen", chosen);
  item.querySelector(".name").textContent = name;
  item.querySelector(".name").title = name;
  item.querySelector(".bar").style.width = `${100 * share}%`;
  item.querySelector(".value").textContent = value;
  return item;
}

function hitItem(hit) {
  const item = copy("hit");
  item.dataset.id = hit.id;
  const title = item.querySelector("h4");
  title.append(`${hit.rank}. `);
  if (hit.title) marked(title, hit.title, hit.snippet.title_words);
  else title.append(hit.id);
  const text = item.querySelector(".text");
  if (hit.snippet.before) text.append("… ");
  marked(text, hit.snippet.text, hit.snippet.words);
  if (hit.snippet.after) text.append(" …");
  const badge = document.createElement("span");
  badge.className = "badge";
  badge.textContent = hit.expert;
  const facts = Object.entries(hit.metadata).map(([name, value]) => `${name}: ${JSON.stringify(value)}`);
  item.querySelector(".facts").append(badge, " ", [hit.id, `score ${hit.score.toFixed(3)}`, ...facts].join(" · "));
  return item;
}

function column(route, answer) {
  const section = copy("column");
  section.dataset.route = route;
  const heading = section.querySelector("h2");
  heading.textContent = route === "auto" ? "routed" : route;
  const router = section.querySelector(".router");
  if (answer.route) {
    const { probabilities, experts, abstained } = answer.route;
    const likely = Object.entries(probabilities).sort((a, b) => b[1] - a[1]).slice(0, MOST_BARS);
    for (const [name, share] of likely) {
      router.querySelector("ul").append(bar(name, share, `${(100 * share).toFixed(1)}%`, name in experts));
    }
    if (abstained) router.querySelector("h3").textContent = "Router: abstains, the base answers";
  } else router.remove();
  const times = Object.entries(answer.milliseconds);
  const longest = Math.max(...times.map(([, own]) => own), 1e-9);
  for (const [stage, own] of times) {
    section.querySelector(".times ul").append(bar(STAGES[stage] ?? stage, own / longest, `${own.toFixed(1)} ms`, false));
  }
  section.querySelector(".hits").append(...answer.hits.map(hitItem));
  if (!answer.hits.length) section.querySelector(".hits").append("Nothing found.");
  return section;
}

async function search() {
  const query = at("query").value.trim();
  if (!query) return;
  const mine = ++asked;
  let where = null;
  try {
    where = at("where").value.trim() ? JSON.parse(at("where").value) : null;
  } catch {
    return say('The filter must be JSON, such as {"year": {"gte": 2020}}.', true);
  }
  if (at("key").value) sessionStorage.setItem("key", at("key").value);
  const place = new URLSearchParams({ q: query });
  if (at("other").value) place.set("with", at("other").value);
  history.replaceState(null, "", `?${place}`);
  say("Searching …");
  const routes = ["auto", ...(at("other").value ? [at("other").value] : [])];
  const request = { query, k: Number(at("k").value) || 10, where, texts: false, snippets: true };
  try {
    const answers = await Promise.all(routes.map((route) => ask("search", { ...request, route })));
    if (mine !== asked) return;
    at("results").replaceChildren(...answers.map((answer, number) => column(routes[number], answer)));
    say(`${answers[0].hits.length} hits from ${answers[0].indexes.join(", ") || "no index"}`);
  } catch (error) {
    if (mine === asked) say(error.message, true);
  }
}

async function begin() {
  const place = new URLSearchParams(location.search);
  try {
    const about = await ask("experts");
    at("about").textContent = `${about.documents.toLocaleString("en")} documents, ${about.experts.length - 1} experts on ${about.base}`;
    const routes = [...(about.tower === "query" ? ["base"] : []), ...(about.shared ? ["shared"] : []),
      ...about.experts.filter((own) => own.name !== "base" && own.documents).map((own) => own.name)];
    for (const name of routes) at("other").add(new Option(name, name));
    at("other").value = routes.includes(place.get("with")) ? place.get("with") : "";
  } catch (error) {
    say(error.message, true);
  }
  if (place.get("q")) {
    at("query").value = place.get("q");
    search();
  }
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (at("key").value && at("other").length < 2) {
    sessionStorage.setItem("key", at("key").value);
    await begin();
  }
  search();
});
at("other").addEventListener("change", search);
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !typing) {
    event.preventDefault();
    at("query").select();
  }
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  const hits = [...document.querySelectorAll("article")];
  const now = hits.indexOf(document.activeElement);
  if (!hits.length || (typing && document.activeElement !== at("query"))) return;
  event.preventDefault();
  (hits[now + (event.key === "ArrowDown" ? 1 : -1)] ?? (now > 0 ? hits[now] : at("query"))).focus();
});
begin();
