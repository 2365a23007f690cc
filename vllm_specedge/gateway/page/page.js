"use strict";
const at = id => document.getElementById(id);
const say = (id, text) => { at(id).textContent = text; };
const number = (value, digits = 0) => value == null ? "–" : value.toFixed(digits);
const times = value => value == null ? "–" : `${value.toFixed(2)}×`;
const part = value => value == null ? "–" : `${Math.round(100 * value)} %`;
const SHAPES = "http://www.w3.org/2000/svg";
const RUNGS = [["edge_share", "edge", "an edge's draft"], ["ngram_share", "ngram", "lookup in the prompt"],
  ["prediction_share", "prediction", "predicted output"], ["plain_share", "plain", "no draft"]];
const WINDOW_MS = 8000, WIDTH = 1000, HEIGHT = 112, FLOOR = 96;

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function showRungs(now) {
  at("rungs").replaceChildren(...RUNGS.map(([share, kind, name]) => {
    const bar = element("div");
    bar.className = kind;
    bar.style.flex = `${now[share] ?? 0} 1 0`;
    bar.title = `${name}: ${part(now[share])}`;
    return bar;
  }));
  at("rung-legend").replaceChildren(...RUNGS.map(([share, kind, name]) => {
    const mark = element("i");
    mark.className = kind;
    return element("li", undefined, mark, `${name} ${part(now[share])}`);
  }));
}

function rectangle(x, y, width, height, kind) {
  const shape = document.createElementNS(SHAPES, "rect");
  for (const [name, value] of Object.entries({x, y, width: Math.max(width, 1), height})) shape.setAttribute(name, value);
  shape.setAttribute("class", kind);
  return shape;
}

function showTimeline(groups) {
  const most = Math.max(1, ...groups.map(([, , requests, verified]) => requests + verified));
  const shapes = [];
  for (const [ago, took, requests, verified, accepted] of groups) {
    const x = WIDTH * (1 - (ago + took) / WINDOW_MS), width = WIDTH * took / WINDOW_MS - 1;
    let y = FLOOR;
    for (const [count, kind] of [[requests, "plain"], [accepted, "edge"], [verified - accepted, "wrong"]]) {
      const height = FLOOR * 0.95 * count / most;
      if (count > 0) shapes.push(rectangle(x, y -= height, width, height, kind));
    }
  }
  const svg = at("timeline");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren(...shapes, rectangle(0, FLOOR, WIDTH, 1, "line"));
  const sum = index => groups.reduce((total, group) => total + group[index], 0);
  svg.setAttribute("aria-label", groups.length === 0 ? "No steps"
    : `${groups.length} groups; of ${sum(3)} draft tokens ${sum(4)} were accepted`);
}

function row(name, detail, cells) {
  const first = element("th", name);
  first.setAttribute("scope", "row");
  first.setAttribute("role", "rowheader");
  if (detail) first.append(element("small", detail));
  const made = element("tr", undefined, first, ...cells.map(([label, value]) => {
    const cell = element("td", value);
    cell.dataset.label = label;
    cell.setAttribute("role", "cell");
    return cell;
  }));
  made.setAttribute("role", "row");
  return made;
}

function edgeRow(edge) {
  return row(edge.name || `edge ${edge.number}`, edge.client ? `${edge.client} · ${edge.role}` : edge.role, [
    ["round trip", edge.rtt_ms == null ? "–" : `${edge.rtt_ms} ms`], ["requests", edge.requests],
    ["tokens/s of these", number(edge.tokens_per_s, 1)], ["accepted tokens", edge.accepted],
    ["acceptance", part(edge.acceptance)]]);
}

function engineRow(engine) {
  return row(`engine ${engine.number}`, "",
    [["tokens/s at most", number(engine.with_edges)], ["without edges", number(engine.without_edges)]]);
}

function showCapacity(capacity) {
  at("servers").hidden = capacity.engines.length === 0;
  say("demand", number(capacity.demand));
  say("foreseen", number(capacity.foreseen));
  say("needed", capacity.engines_needed || "–");
  at("engines").replaceChildren(...capacity.engines.map(engineRow));
}

/** What to do next where there is nothing to see; [text, command, text]. */
function hintOf(view) {
  if (view.engines === 0) return ["No vLLM server is connected. One that starts comes as soon as its model is loaded; else see what ",
    "vllm serve MODEL --speculative-config edge", " has printed."];
  if (!view.now.tokens_per_s) return ["Nothing is being generated. Ask the model something: the figures are those of the last 10 seconds."];
  if (view.edges.length > 0 && !view.now.edge_share) return ["No edge's draft was verified in the last 10 seconds. On the edge, ",
    `edge-client doctor ${location.origin} --draft MODEL`, " says whether it can help."];
  return null;
}

function showHint(hint) {
  at("hint").hidden = hint === null;
  const said = (hint ?? []).map((text, index) => index === 1 ? element("code", text) : text);
  if (at("hint").textContent !== (hint ?? []).join("")) at("hint").replaceChildren(...said);
}

function show(view) {
  say("model", view.models.join(", ") || "no model yet");
  for (const [prefix, figures] of [["", view.now], ["-hour", view.hour]]) {
    say(`speedup${prefix}`, times(figures.speedup));
    say(`from-edges${prefix}`, part(figures.from_edges));
    say(`acceptance${prefix}`, part(figures.acceptance));
  }
  say("tokens", number(view.now.tokens_per_s));
  say("requests", view.requests);
  say("step", view.now.step_ms == null ? "–" : `${number(view.now.step_ms, 1)} ms`);
  say("per-step", number(view.now.tokens_per_step, 2));
  showHint(hintOf(view));
  showRungs(view.now);
  showTimeline(view.groups);
  showCapacity(view.capacity);
  say("num-edges", view.edges.length);
  at("edges").replaceChildren(...view.edges.map(edgeRow));
  at("edge-table").hidden = view.edges.length === 0;
  at("no-edges").hidden = view.edges.length > 0;
}

function state(text, isAway) {
  say("state", text);
  at("state").classList.toggle("away", isAway);
}

say("here", location.origin);
const events = new EventSource("status/events");
events.onmessage = event => { state("live", false); show(JSON.parse(event.data)); };
events.onerror = () => state("the gateway does not answer; trying again", true);
