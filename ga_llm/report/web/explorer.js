// explorer.html: choose a test pair, and see it. `data` is what ga_llm/report/explorer.py gathers; its units are told
// there. Text from data only ever becomes text (textContent), never HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { places, pairs, users, runs, current } = data;
const n = pairs.pair.length, all = Array.from({ length: n }, (_, pair) => pair);
const LETTERS = runs.length > 1 ? ["A", "B"] : ["Model"];
const ROWS = 200;           // of the list at a time
const LABELLED = 12;        // check-ins of a trajectory, the last ones
const CLOSEST = 16;         // zoom that a pair is shown at
const FIRST = 5;            // guesses that the text tells, and that the map is fitted to
const DAYS = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
const OUTCOME_SIGNS = ["●", "◐", "○"];
const $ = id => document.getElementById(id);

// Elements and words.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const point = place => places.y[place] === null ? null : L.latLng(places.y[place] / 1e5, places.x[place] / 1e5);
const nameOf = place => `${places.categories[places.category[place]]}, POI ${places.id[place]}`;
const nameOfUser = user => users[user].id === null ? "user not named" : `user ${users[user].id}`;
const number = value => value.toLocaleString("en");
const inKm = metres => metres === null ? "–"
  : `${metres < 99995 ? (metres / 1000).toFixed(2) : number(Math.round(metres / 1000))} km`;
const rankOf = rank => rank ? `rank ${number(rank)}` : "not ranked";

function percent(share) {
  return share === null ? "–" : share === 0 ? "< 0.01 %" : `${(share / 100).toFixed(share < 100 ? 2 : 1)} %`;
}

function away(place, target) {
  const [from, to] = [point(place), point(target)];
  return from && to ? L.CRS.Earth.distance(from, to) : null;
}

function timeOf(second) {
  if (second === null) return "time not told";
  const date = new Date(second * 1000);
  return `${DAYS[date.getUTCDay()]} ${date.toISOString().slice(0, 16).replace("T", " ")}`;
}

function shortTime(second, target) {      // the day only where it is another than the target's
  const text = timeOf(second);
  if (second === null) return "";
  const sameDay = Math.floor(second / 86400) === Math.floor(target / 86400);
  return sameDay ? text.slice(15) : `${text.slice(0, 3)} ${text.slice(15)}`;
}

// The map of a run: places, the user's history, the current trajectory, guesses, the truth.

let moving = false;         // one map follows the other
const truths = new Set(pairs.target);
const maps = runs.map((run, i) => makeMap(i));
if (maps.length > 1) maps.forEach((map, i) => map.on("move", () => follow(map, maps[1 - i])));
const everywhere = L.latLngBounds(places.id.map((_, place) => point(place)).filter(at => at));

function follow(map, other) {
  if (moving) return;
  moving = true;
  other.setView(map.getCenter(), map.getZoom(), { animate: false });
  moving = false;
}

function makeMap(i) {
  const box = element("div", { class: "map", id: `map${i}`, role: "application" });
  $("maps").append(element("figure", {}, element("figcaption", { id: `about${i}` }), box));
  box.setAttribute("aria-label", `Map${runs.length > 1 ? " of run " + LETTERS[i] : ""}. Arrow keys move it, plus and ` +
    "minus zoom. What it shows stands in the text above and the tables below.");
  const map = L.map(box, { attributionControl: false, zoomAnimation: false, fadeAnimation: false,
                           markerZoomAnimation: false, zoomSnap: 0.25, maxZoom: 18, minZoom: 1 });
  for (const [name, z] of [["shapes", 350], ["places", 360], ["heat", 370], ["trajectory", 380]]) {
    map.createPane(name).style.zIndex = z;
  }
  L.control.scale({ imperial: false }).addTo(map);
  L.polyline(data.shapes.map(line => line.map(([y, x]) => [y / 1e5, x / 1e5])), {
    pane: "shapes", renderer: L.svg({ pane: "shapes" }), className: "shape", interactive: false }).addTo(map);
  // On a canvas, which takes thousands; those that are asked for come last, on top. `nearest` finds what is clicked.
  const renderer = L.canvas({ pane: "places", padding: 0 });
  const dots = places.id.map((_, place) => place).filter(point).sort((a, b) => truths.has(a) - truths.has(b));
  for (const place of dots) {
    const [radius, fillColor] = truths.has(place) ? [2.6, "#7d868f"] : [1.8, "#cfd4d9"];
    L.circleMarker(point(place), { renderer, pane: "places", radius, fillColor, stroke: false, fillOpacity: 1,
                                   interactive: false }).addTo(map);
  }
  map.on("click", event => choosePlace(nearest(map, event.containerPoint)));
  map.trajectory = L.svg({ pane: "trajectory", padding: 1 });
  map.heat = L.svg({ pane: "heat", padding: 1 });
  map.shown = L.layerGroup().addTo(map);
  map.labels = [];
  map.on("zoomend", () => thin(map));
  return map;
}

function nearest(map, at) {     // of the places that are asked for, if it is near enough to be meant
  let best = [12, -1];      // pixels
  for (const place of truths) {
    const away = point(place) ? map.latLngToContainerPoint(point(place)).distanceTo(at) : Infinity;
    if (away < best[0]) best = [away, place];
  }
  return best[1];
}

function sign(place, kind, text, size, title, z) {
  const html = element("span", {}, ...[text].flat());
  const icon = L.divIcon({ className: `sign ${kind}`, html, iconSize: [size, size] });
  return L.marker(point(place), { icon, keyboard: false, zIndexOffset: z })
    .on("click", () => choosePlace(place)).bindTooltip(element("span", {}, title));
}

function draw(map, run, pair) {
  const layers = [], target = pairs.target[pair], { places: been, visits } = users[pairs.user[pair]];
  const most = Math.max(...visits);
  been.forEach((place, i) => point(place) && layers.push(L.circleMarker(point(place), {
    pane: "heat", renderer: map.heat, className: "heat", interactive: false, stroke: false, fillColor: "url(#warm)",
    fillOpacity: 1, radius: 11 + 18 * Math.sqrt(visits[i] / most) })));
  drawTrajectory(map, pair, layers);
  data.baselines.forEach(({ name, sign: text, top }) => top[pair] >= 0 && point(top[pair]) && layers.push(
    sign(top[pair], "baseline", text, 34, `${name}: ${nameOf(top[pair])}`, 100)));
  run.top[pair].forEach((place, i) => {
    if (!point(place)) return;
    const share = run.share[pair][i], size = Math.max(i < FIRST ? 20 : 17, 42 * Math.sqrt(share / 1e4));
    const kind = `guess${i < FIRST ? "" : " late"}${place === target ? " hit" : ""}`;
    const told = `${i + 1}. ${nameOf(place)}: ${percent(share)}${place === target ? ", the truth" : ""}`;
    layers.push(sign(place, kind, String(i + 1), size, told, 1000 - 10 * i));
  });
  if (point(target)) {      // on top, with the number of the guess that it covers
    const guess = run.top[pair].indexOf(target) + 1;
    layers.push(sign(target, guess ? "truth hit" : "truth", ["★", ...guess ? [element("b", {}, String(guess))] : []], 54,
                     `The truth: ${nameOf(target)}`, 2000));
  }
  layers.forEach(layer => layer.addTo(map.shown));
  thin(map);
}

function thin(map) {        // of the labels those that would cover a later check-in's are not shown; the table has all
  const kept = [];
  for (const label of map.labels) {
    const box = label.getElement().getBoundingClientRect();
    const covers = kept.some(other => box.left < other.right && other.left < box.right &&
                                      box.top < other.bottom && other.top < box.bottom);
    label.getElement().style.visibility = covers ? "hidden" : "";
    if (!covers) kept.push(box);
  }
}

function drawTrajectory(map, pair, layers) {
  map.labels = [];      // the latest check-in's first
  const steps = current.place[pair].map((place, i) => ({ place, at: point(place), second: current.second[pair][i] }))
    .filter(step => step.at);
  if (!steps.length) return;
  const style = { pane: "trajectory", renderer: map.trajectory, interactive: false };
  const latest = steps.slice(-LABELLED);
  for (const [className, shown] of [["earlier", steps], ["casing", latest], ["trajectory", latest]]) {
    layers.push(L.polyline(shown.map(step => step.at), { ...style, className }));
  }
  const times = new Map();      // of each place, in order
  for (const { place, second } of latest) {
    times.set(place, [...times.get(place) ?? [], shortTime(second, pairs.second[pair])]);
  }
  const last = steps.at(-1).place, stops = new Map();      // each place, by its last check-in
  for (const { place, at } of steps) {
    stops.delete(place);
    stops.set(place, at);
  }
  for (const [place, at] of stops) {
    const [className, radius] = place === last ? ["stop last", 7] : ["stop", 4];
    const dot = L.circleMarker(at, { ...style, className, radius });
    const text = (times.get(place) ?? []).filter(time => time).join(", ");
    if (text) {
      dot.bindTooltip(text, { permanent: true, direction: "auto", offset: [6, 0], className: "when" });
      map.labels.unshift(dot.getTooltip());
    }
    layers.push(dot);
  }
}

function around(pair) {
  const shown = [pairs.target[pair], ...current.place[pair].slice(-LABELLED),
                 ...runs.flatMap(run => run.top[pair].slice(0, FIRST))];
  const bounds = L.latLngBounds(shown.map(point).filter(at => at));
  return bounds.isValid() ? bounds : everywhere;
}

function show(bounds) {
  maps[0].fitBounds(bounds, { paddingTopLeft: [40, 30], paddingBottomRight: [70, 30], maxZoom: CLOSEST,
                              animate: false });
}

function showIfNeeded(bounds) {     // a map that stays is easier to follow, and sooner drawn
  const map = maps[0], closer = Math.min(CLOSEST, map.getBoundsZoom(bounds)) - map.getZoom();
  if (closer > 1.5 || !map.getBounds().pad(-0.05).contains(bounds)) show(bounds);
}

// The chosen pair in words and tables.

function say(pair) {
  const target = pairs.target[pair];
  const about = runs.map((run, i) => {
    const top = run.top[pair].slice(0, FIRST).map(
      (place, k) => `${k + 1}. ${nameOf(place)}, ${percent(run.share[pair][k])}`);
    const told = top.length ? `First ${top.length}: ${top.join("; ")}.` : "No guess.";
    return `${LETTERS[i]}: ${outcomeOf(run, pair)}. ${told}`;
  });
  $("said").textContent =
    `Pair ${pairs.pair[pair]}, ${nameOfUser(pairs.user[pair])}, ${timeOf(pairs.second[pair])}. ` +
    `The truth: ${nameOf(target)}. ${about.join(" ")}`;
  runs.forEach((run, i) => $(`about${i}`).textContent =
    `${LETTERS[i]}: ${data.outcomes[run.outcome[pair]]}, ${rankOf(run.rank[pair])}`);
}

function outcomeOf(run, pair) {
  const km = run.outcome[pair] && run.km[pair] !== null ? `, first guess ${inKm(run.km[pair])} away` : "";
  const rank = run.rank[pair] ? `has ${rankOf(run.rank[pair])}` : "is not ranked";
  return `truth ${rank} (${data.outcomes[run.outcome[pair]]}${km})`;
}

function table(caption, heads, rows) {
  const head = element("tr", {}, ...heads.map(text => element("th", { scope: "col" }, text)));
  const body = rows.map(({ cells, strong, share }) => {
    const row = element("tr", strong ? { class: "strong" } : {}, ...cells.map(cell => element("td", {}, cell)));
    if (share !== undefined) row.style.setProperty("--share", `${share / 100}%`);
    return row;
  });
  const made = element("table", {}, element("caption", {}, caption), element("thead", {}, head),
                       element("tbody", {}, ...body));
  return element("div", { class: "wide", role: "region", tabindex: "0", "aria-label": caption }, made);
}

function tabulate(pair) {
  const target = pairs.target[pair], { places: been, visits } = users[pairs.user[pair]], steps = current.place[pair];
  const mark = place => place === target ? `★ ${nameOf(place)}` : nameOf(place);
  const off = place => inKm(away(place, target));
  const guesses = runs.map(({ top, share }, i) => table(
    `${runs.length > 1 ? LETTERS[i] + ": first" : "First"} ${top[pair].length} guesses`,
    ["", "guess (★ the truth)", "probability", "km off"],
    top[pair].map((place, k) => ({ cells: [String(k + 1), mark(place), percent(share[pair][k]), off(place)],
                                   strong: place === target, share: share[pair][k] }))));
  const rest = [];
  if (data.baselines.length) {
    rest.push(table("First guesses of the baselines", ["", "first guess", "km off", "rank of the truth"],
      data.baselines.map(({ name, sign, top, rank }) => ({
        cells: [`${sign} ${name}`, ...top[pair] < 0 ? ["–", "–"] : [mark(top[pair]), off(top[pair])],
                rankOf(rank[pair])], strong: top[pair] === target }))));
  }
  if (steps.length) {
    rest.push(table("Current trajectory, the latest first", ["time", "check-in"], steps.map((place, i) => (
      { cells: [timeOf(current.second[pair][i]), mark(place)], strong: place === target })).reverse()));
  }
  if (been.length) {
    rest.push(table(`Most visited by the user in train (${number(been.length)} places)`, ["place", "visits"],
      been.slice(0, 10).map((place, i) => ({ cells: [mark(place), number(visits[i])], strong: place === target }))));
  }
  $("tables").replaceChildren(...guesses,
                              element("div", { class: runs.length > 1 ? "rest wider" : "rest" }, ...rest));
}

// Choosing.

let found = [], chosen = -1, ofUser = [];
const inTime = (a, b) => (pairs.second[a] ?? 0) - (pairs.second[b] ?? 0) || a - b;

function choose(pair, { listed = true } = {}) {
  if (pair === undefined) return;
  chosen = pair;
  maps.forEach(map => map.shown.clearLayers());
  showIfNeeded(around(pair));       // before anything is drawn, which then is placed once
  maps.forEach((map, i) => draw(map, runs[i], pair));
  say(pair);
  tabulate(pair);
  ofUser = all.filter(other => pairs.user[other] === pairs.user[pair]).sort(inTime);
  const at = ofUser.indexOf(pair);
  const text = `pair ${at + 1} of ${ofUser.length}, ${timeOf(pairs.second[pair])}`;
  Object.assign($("time"), { max: ofUser.length - 1, value: at, disabled: ofUser.length < 2 });
  $("time").setAttribute("aria-valuetext", text);
  $("time-label").textContent = `${nameOfUser(pairs.user[pair])} in time: ${text}`.replace(/^u/, "U");
  if (listed) list();
}

function list() {
  const at = found.indexOf(chosen), from = Math.max(0, Math.floor(at / ROWS) * ROWS);
  const part = found.slice(from, from + ROWS), { options } = $("list");
  if (part.length !== options.length || part.some((pair, i) => options[i].value !== String(pair))) {
    $("list").replaceChildren(...part.map(pair => new Option(line(pair), pair)));
  }
  $("list").value = String(at < 0 ? "" : chosen);
  const window = found.length > ROWS ? `, here ${number(from + 1)} to ${number(from + part.length)}` : "";
  $("count").textContent = `${number(found.length)} of ${number(n)} pairs${window}`;
  $("previous").disabled = at <= 0;
  $("next").disabled = at === found.length - 1;
}

function line(pair) {
  const outcome = runs.map(({ outcome, rank }, i) => runs.length > 1
    ? `${LETTERS[i]} ${OUTCOME_SIGNS[outcome[pair]]} ${rank[pair] ? number(rank[pair]) : "–"}`
    : `${OUTCOME_SIGNS[outcome[pair]]} ${data.outcomes[outcome[pair]]}, ${rankOf(rank[pair])}`).join("  ");
  return `${outcome} · ${nameOfUser(pairs.user[pair])} · ${timeOf(pairs.second[pair]).slice(4)}`;
}

const COMPARED = {       // what two runs say of a pair
  "first guesses differ": pair => runs[0].top[pair][0] !== runs[1].top[pair][0],
  "only A is right": pair => !runs[0].outcome[pair] && runs[1].outcome[pair],
  "only B is right": pair => runs[0].outcome[pair] && !runs[1].outcome[pair],
  "both are right": pair => !runs[0].outcome[pair] && !runs[1].outcome[pair],
  "both are wrong": pair => runs[0].outcome[pair] && runs[1].outcome[pair],
};

function filter() {
  const [user, outcome, compared, group] = ["user", "outcome", "compared", "group"].map(id => $(id).value);
  const [grouping, member] = group.split(" ").map(Number), place = typedPlace();
  found = data.order.filter(pair =>
    (user === "" || pairs.user[pair] === Number(user)) &&
    (outcome === "" || runs[0].outcome[pair] === Number(outcome)) &&
    (compared === "" || COMPARED[compared](pair)) &&
    (group === "" || data.groups[grouping].of[pair] === member) &&
    (place === null || pairs.target[pair] === place));
  if (user !== "" && runs.length === 1) found.sort(inTime);
  if (found.length && !found.includes(chosen)) choose(found[0]);
  else list();
  if (!found.length) $("said").textContent = "No pair is like that: change the user, outcome, group or place.";
  else if (chosen >= 0) say(chosen);
}

function typedPlace() {      // null: any; -1: none of the places
  const text = $("place").value.trim(), id = text.match(/\d+/);
  return text === "" ? null : id ? places.id.indexOf(Number(id[0])) : -1;
}

function choosePlace(place) {
  if (!truths.has(place)) return;
  $("choose").reset();
  $("place").value = String(places.id[place]);
  filter();
}

function options(id, any, named) {
  $(id).append(new Option(any, ""), ...named.map(([text, value]) => new Option(text, value)));
}

function count(of) {      // {value: how many pairs}
  const counts = new Map();
  for (const value of of) counts.set(value, (counts.get(value) ?? 0) + 1);
  return value => counts.get(value) ?? 0;
}

function begin() {
  const ofUsers = count(pairs.user), right = count(pairs.user.filter((_, pair) => !runs[0].outcome[pair]));
  options("user", `any of ${number(users.length)}`,
          users.map((_, user) => [`${nameOfUser(user)}: ${ofUsers(user)} pairs, ${right(user)} right`, user]));
  const outcomes = count(runs[0].outcome), of = runs.length > 1 ? " (A)" : "";
  options("outcome", `any${of}`,
          data.outcomes.map((name, i) => [`${OUTCOME_SIGNS[i]} ${name}${of}: ${number(outcomes(i))}`, i]));
  options("compared", "any", runs.length < 2 ? [] :
    Object.entries(COMPARED).map(([name, holds]) => [`${name}: ${number(all.filter(holds).length)}`, name]));
  options("group", "any", []);
  data.groups.forEach(({ name, groups, of }, i) => {
    const counts = count(of);
    const named = groups.map((group, k) => new Option(`${group}: ${number(counts(k))}`, `${i} ${k}`));
    $("group").append(element("optgroup", { label: name }, ...named));
  });
  $("compared-label").hidden = runs.length < 2;
  $("group-label").hidden = !data.groups.length;
  const asked = count(pairs.target), often = [...truths].sort((a, b) => asked(b) - asked(a));
  $("places").append(...often.map(place => new Option(`${nameOf(place)}: ${asked(place)} pairs`, places.id[place])));
  $("runs").textContent = runs.map((run, i) => `${LETTERS[i]}: ${run.name}`).join(" · ");
  const told = data.outcomes.map((name, i) => `${OUTCOME_SIGNS[i]} ${name}: ${number(outcomes(i))}`).join(", ");
  $("about").append("A test pair is a question: where is this user at that time? The map shows what the user did " +
    "before, the model's first guesses and the truth. The first guess is right, a near miss (at most " +
    `${data.near_km} km off) or a far one${of}: ${told}. Arrow keys go from pair to pair, in the list and on the ` +
    "slider. All figures: ", element("a", { href: "report.html" }, "report.html"), ".");
  $("absent").replaceChildren(...data.absent.map(text => element("li", {}, text)));
  legend();
  $("filters").open = !matchMedia("(max-width: 760px)").matches;        // a phone shows the map first
  $("choose").addEventListener("change", event => {
    if (event.target.id === "list") choose(Number($("list").value));
    else filter();
  });
  $("choose").addEventListener("submit", event => event.preventDefault());
  $("all").addEventListener("click", () => { $("choose").reset(); filter(); });
  $("previous").addEventListener("click", () => choose(found[found.indexOf(chosen) - 1]));
  $("next").addEventListener("click", () => choose(found[found.indexOf(chosen) + 1]));
  $("time").addEventListener("input", () => choose(ofUser[$("time").value]));
  $("near").addEventListener("click", () => show(around(chosen)));
  $("whole").addEventListener("click", () => show(everywhere));
  show(everywhere);
  filter();
}

function legend() {
  const rows = [
    ["guess", "1", `first ${FIRST} guesses; more area, more probability`], ["guess late", "9", "further guesses"],
    ["truth", "★", "the true place"],
    ...data.baselines.map(({ name, sign }) => ["baseline", sign, `first guess of ${name}`]),
    ["line", "", "current trajectory, with times; ring: its last check-in"],
    ["warm", "", "the user's train check-ins"],
    ["dark", "", "place that is asked for: click it"], ["light", "", "other place"]];
  $("legend").append(...rows.map(([kind, text, meaning]) => {
    const shown = element("span", { class: `sign ${kind}` }, element("span", {}, text));
    return element("li", {}, element("span", { class: "box", "aria-hidden": "true" }, shown), meaning);
  }));
}

begin();
