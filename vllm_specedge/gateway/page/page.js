"use strict";
const at = id => document.getElementById(id);
const say = (id, text) => { at(id).textContent = text; };
const number = (value, digits = 0) => value == null ? "–" : value.toFixed(digits);
const times = value => value == null ? "–" : `${value.toFixed(2)}×`;
const part = value => value == null ? "–" : `${Math.round(100 * value)} %`;
const SHAPES = "http://www.w3.org/2000/svg";
const RUNGS = [["edge_share", "edge", "an edge's draft"], ["ngram_share", "ngram", "lookup in the prompt"],
  ["prediction_share", "prediction", "predicted outputs"], ["plain_share", "plain", "plain decoding"]];
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
}

function edgeRow(edge) {
  const name = element("td", edge.name || `edge ${edge.number}`, element("small", edge.client ? `${edge.client} · ${edge.role}` : edge.role));
  const cells = [["away", edge.rtt_ms == null ? "–" : `${edge.rtt_ms} ms`], ["requests", edge.requests],
    ["tokens/s", number(edge.tokens_per_s, 1)], ["accepted", part(edge.acceptance)], ["proposed", edge.proposed]];
  return element("tr", undefined, name, ...cells.map(([label, value]) => {
    const cell = element("td", value);
    cell.dataset.label = label;
    return cell;
  }));
}

function engineRow(engine) {
  const cells = [["it could make", number(engine.with_edges)], ["without edges", number(engine.without_edges)]];
  return element("tr", undefined, element("td", `engine ${engine.number}`), ...cells.map(([label, value]) => {
    const cell = element("td", value);
    cell.dataset.label = label;
    return cell;
  }));
}

function showCapacity(capacity) {
  at("servers").hidden = capacity.engines.length === 0;
  say("demand", number(capacity.demand));
  say("foreseen", number(capacity.foreseen));
  say("needed", capacity.engines_needed || "–");
  at("engines").replaceChildren(...capacity.engines.map(engineRow));
}

function show(view) {
  say("model", view.models.join(", ") || "no vLLM engine is connected");
  say("speedup", times(view.now.speedup));
  say("speedup-hour", times(view.hour.speedup));
  say("tokens", number(view.now.tokens_per_s));
  say("requests", view.requests);
  say("step", view.now.step_ms == null ? "–" : `${number(view.now.step_ms, 1)} ms`);
  say("per-step", number(view.now.tokens_per_step, 2));
  say("acceptance", part(view.now.acceptance));
  say("acceptance-hour", part(view.hour.acceptance));
  showRungs(view.now);
  showTimeline(view.groups);
  showCapacity(view.capacity);
  say("num-edges", view.edges.length);
  at("edges").replaceChildren(...view.edges.map(edgeRow));
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
