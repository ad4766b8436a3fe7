"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PASS_COLOURS = { split_streams: "#4a8f7b", inject: "#e8833a", prune: "#c2476b", exit_vision: "#8a63c4", positions: "#a08a2c", attention: "#3d8fc4", kv_cache: "#6673d6", head: "#63924a" };
const SPARE = ["#b0683e", "#2f9a9a", "#b353a6", "#7b8794"];
const colour = (pass) => PASS_COLOURS[pass] || SPARE[[...pass].reduce((s, c) => s + c.charCodeAt(0), 0) % SPARE.length];
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k === "class" ? (node.className = v) : k === "style" ? (node.style.cssText = v) : node.setAttribute(k, v);
  node.append(...children);
  return node;
};
const amount = (n, unit) => {
  for (const prefix of ["", "k", "M", "G", "T"]) {
    if (Math.abs(n) < 1000 || prefix === "T") return `${prefix === "" ? Math.round(n) : Math.abs(n) < 10 ? n.toFixed(2) : Math.abs(n) < 100 ? n.toFixed(1) : n.toFixed(0)} ${prefix}${unit}`;
    n /= 1000;
  }
};
const bytes = (n) => {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(n) < 1024 || unit === "GiB") return `${unit === "B" ? n : n.toFixed(1)} ${unit}`;
    n /= 1024;
  }
};
const times = (a, b) => (b ? `${(a / b).toFixed(2)}×` : "–");

// Header.
const depth = DATA.depth, layers = depth.vision.length;
$("model").textContent = DATA.about.model;
$("schedule").textContent = `${DATA.about.schedule}  ·  backend ${DATA.about.backend}${DATA.about.passes.length ? `  ·  passes ${DATA.about.passes.join(", ")}` : ""}`;
$("sample").textContent = `${DATA.about.sample}: ${depth.text} text + ${depth.identity_tokens - depth.text} vision tokens, ${DATA.about.images} image${DATA.about.images === 1 ? "" : "s"}, ${layers} layers. Point at a layer, or click it to go to its code.`;
for (const [name, key, show, word] of [["tokens, summed over layers", "tokens", (n) => n.toLocaleString("en"), "fewer"], ["prefill FLOPs", "flops", (n) => amount(n, "FLOP"), "fewer"], ["KV cache of the prompt", "kv", bytes, "smaller"]]) {
  const [ours, theirs] = depth.totals[key];
  $("totals").append(make("div", {}, make("dt", {}, name), make("dd", {}, `${times(theirs, ours)} ${word}`, make("small", {}, `${show(ours)} of ${show(theirs)}`))));
}

// The two streams over depth: the height of a band is its number of tokens.
const NS = "http://www.w3.org/2000/svg";
const svg = (tag, attributes = {}, text) => {
  const node = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  return node;
};
const readout = (k) => {
  const event = depth.events.filter((e) => e.layer === k).map((e) => e.reason).join(" + ");
  $("readout").innerHTML = `<b>Layer ${k}</b> sees <b>${depth.vision[k]}</b> vision and <b>${depth.text}</b> text tokens${event ? ` (${event} at its input)` : ""}: ${amount(depth.flops[k], "FLOP")} of ${amount(depth.identity_flops[k], "FLOP")}, KV ${bytes(depth.kv[k])} of ${bytes(depth.identity_kv[k])}`;
};
function drawChart() {
  const W = 1200, left = 116, right = 8, step = (W - left - right) / layers, top = 40, H = 210;
  const root = svg("svg", { viewBox: `0 0 ${W} 400`, role: "img", "aria-label": "Tokens, FLOPs and KV bytes of each layer" });
  const x = (k) => left + k * step;
  const most = Math.max(depth.identity_tokens, ...depth.vision.map((v) => v + depth.text));
  const tall = (n) => (n ? Math.max(1.5, (n / most) * H) : 0);
  const base = top + H;
  const steps = (bottoms, tops) => {
    // A slope of a third of a layer makes widening and narrowing visible as such.
    const slope = step / 3, upper = [], lower = [];
    for (let k = 0; k < layers; k++) {
      const a = x(k) + (k ? slope : 0), b = x(k + 1);
      upper.push([a, tops[k]], [b, tops[k]]);
      lower.push([a, bottoms[k]], [b, bottoms[k]]);
    }
    return "M" + [...upper, ...lower.reverse()].map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L") + "Z";
  };
  root.append(svg("rect", { x: left, y: base - tall(depth.identity_tokens), width: W - left - right, height: tall(depth.identity_tokens), class: "band-ghost" }));
  const textTop = Array.from({ length: layers }, () => base - tall(depth.text));
  root.append(svg("path", { d: steps(textTop, textTop.map((y, k) => y - tall(depth.vision[k]))), class: "band-vision" }));
  root.append(svg("path", { d: steps(textTop.map(() => base), textTop), class: "band-text" }));
  root.append(svg("text", { x: left - 10, y: top + 12, "text-anchor": "end", class: "name" }, "tokens"));
  root.append(svg("text", { x: left - 10, y: base - tall(depth.identity_tokens) + 28, "text-anchor": "end" }, `${depth.identity_tokens} untouched`));
  root.append(svg("text", { x: left - 10, y: base - 3, "text-anchor": "end" }, `${depth.text} text`));
  let last = -1e9, level = 0;
  for (const e of depth.events) {
    const label = e.reason === "inject" ? `+${e.after}` : `${e.before} → ${e.after}`;
    level = x(e.layer) - last < 74 ? 1 - level : 0;
    last = x(e.layer);
    root.append(svg("line", { x1: last, x2: last, y1: level ? 10 : 26, y2: base, class: "mark" }));
    root.append(svg("text", { x: last + 4, y: level ? 16 : 32, class: "event", fill: colour(e.reason) }, `${e.reason} ${label}`));
  }
  const row = (name, values, others, y, kind, total) => {
    const high = 34, peak = Math.max(...others, ...values);
    root.append(svg("text", { x: left - 10, y: y + 12, "text-anchor": "end", class: "name" }, name), svg("text", { x: left - 10, y: y + 27, "text-anchor": "end" }, total));
    values.forEach((v, k) => {
      for (const [n, cls] of [[others[k], "bar-ghost"], [v, `bar ${kind}`]]) root.append(svg("rect", { x: x(k) + 1, width: Math.max(1, step - 2), y: y + high * (1 - n / peak), height: high * (n / peak), class: cls, rx: 1 }));
    });
  };
  row("FLOPs", depth.flops, depth.identity_flops, base + 34, "", amount(depth.totals.flops[0], "FLOP"));
  row("KV cache", depth.kv, depth.identity_kv, base + 84, "kv", bytes(depth.totals.kv[0]));
  const every = layers > 48 ? 4 : layers > 20 ? 2 : 1;
  for (let k = 0; k < layers; k++) if (k % every === 0) root.append(svg("text", { x: x(k) + step / 2, y: base + 18, "text-anchor": "middle" }, k));
  root.append(svg("text", { x: left - 10, y: base + 18, "text-anchor": "end" }, "layer"));
  for (let k = 0; k < layers; k++) {
    const hit = svg("rect", { x: x(k), y: top - 14, width: step, height: base + 120 - top + 14, class: "hit", "data-layer": k });
    hit.addEventListener("mouseenter", () => readout(k));
    hit.addEventListener("click", () => { readout(k); openLayer(k); });
    root.append(hit);
  }
  root.setAttribute("viewBox", `0 0 ${W} ${base + 122}`);
  $("chart").append(root);
  readout(0);
  for (const e of depth.events)
    $("events").tBodies[0].append(make("tr", {}, make("td", {}, `${e.reason} at layer ${e.layer}`), make("td", {}, `${e.before} → ${e.after}`), make("td", {}, e.cost ? amount(e.cost, "FLOP") : "–"), make("td", {}, amount(e.saved_flops, "FLOP")), make("td", {}, bytes(e.saved_kv))));
  $("events").hidden = !depth.events.length;
}

// Programs: two stages side by side, each a list of foldable sections.
let program = null;
const sides = {};
const words = (index) => program.lines[index].map((t) => program.texts[t]);
function dots(members) {
  const passes = new Set(members.map((i) => words(i)[2]).filter((p) => p !== "captured"));
  return make("span", { class: "dots" }, ...[...passes].map((p) => make("i", { style: `background:${colour(p)}`, title: p })));
}
function fill(details, members, query) {
  if (details.dataset.filled === query) return;
  details.dataset.filled = query;
  details.querySelector(":scope > .body")?.remove();
  const body = make("div", { class: "body" });
  for (const index of members) {
    const [text, shape, pass] = words(index);
    const fresh = pass !== "captured";
    const line = make("span", { class: fresh ? "line new" : "line", "data-line": index, ...(fresh ? { style: `--pass:${colour(pass)};border-left-color:${colour(pass)}` } : {}) });
    const at = query ? text.toLowerCase().indexOf(query) : -1;
    if (at >= 0) line.append(text.slice(0, at), make("mark", {}, text.slice(at, at + query.length)), text.slice(at + query.length));
    else line.append(text);
    if (shape) line.append(make("span", { class: "sh" }, shape));
    body.append(line);
  }
  details.append(body);
}
function section([title, layer, , members], query) {
  const shown = query ? members.filter((i) => words(i).some((w) => w.toLowerCase().includes(query))) : members;
  if (query && !shown.length) return null;
  const details = make("details", { "data-layer": layer === null ? "" : layer });
  details.append(make("summary", {}, make("span", { class: "what" }, title), dots(shown), make("span", { class: "n" }, query ? `${shown.length} of ${members.length}` : `${members.length} nodes`)));
  details.addEventListener("toggle", () => details.open && fill(details, shown, query));
  details.count = shown.length;
  if (query) { details.open = true; fill(details, shown, query); }
  return details;
}
// Neighbouring layers that are equal but for their weights fold into one entry.
function groups(sections) {
  const found = [];
  sections.forEach((s) => {
    const last = found[found.length - 1];
    if (last && s[1] !== null && s[2] >= 0 && last[0][2] === s[2] && last[0][1] !== null) last.push(s);
    else if (s[0].startsWith("after layer") && last) (last.tail ||= []).push(s);
    else found.push([s]);
  });
  return found;
}
function render(side, query = "") {
  const stage = program.stages[sides[side].value], box = $(`${side}-code`);
  box.textContent = "";
  let count = 0;
  if (!query) {
    const inputs = make("details", {}, make("summary", {}, "inputs", make("span", { class: "n" }, `${stage.inputs.length}`)));
    inputs.append(make("div", { class: "body" }, ...stage.inputs.map(([n, s]) => make("span", { class: "line" }, n, make("span", { class: "sh" }, s)))));
    box.append(inputs);
  }
  for (const group of groups(stage.sections)) {
    const members = [...group, ...(group.tail || [])].map((s) => [s, section(s, query)]).filter(([, d]) => d);
    members.forEach(([, d]) => (count += d.count));
    members.sort((a, b) => stage.sections.indexOf(a[0]) - stage.sections.indexOf(b[0]));
    if (query) { box.append(...members.map(([, d]) => d)); continue; }
    const first = group[0][1], last = group[group.length - 1][1];
    if (group.length === 1) { box.append(...members.map(([, d]) => d)); continue; }
    const stream = group[0][0].split(": tokens of ")[1];
    const all = members.flatMap(([s]) => s[3]);
    const outer = make("details", { class: "group" }, make("summary", {}, make("span", {}, `layers ${first} to ${last}`), make("span", { class: "tag" }, `${group.length} equal layers${stream ? ` · ${stream}` : ""}`), dots(all), make("span", { class: "n" }, `${all.length} nodes`)));
    outer.append(...members.map(([, d]) => d));
    box.append(outer);
  }
  if (query && !count) box.append(make("p", { class: "empty" }, `nothing in ${stage.name} matches`));
  return count;
}
function search() {
  const query = $("search").value.trim().toLowerCase();
  render("left", query);
  const count = render("right", query);
  $("found").textContent = query ? `${count} node${count === 1 ? "" : "s"}` : "";
}
function select(left, right) {
  sides.left.value = left;
  sides.right.value = right;
  [...$("stages").querySelectorAll("button")].forEach((b, i) => b.classList.toggle("on", i === +right));
  search();
}
function show(index) {
  program = DATA.programs[index];
  [...$("programs").children].forEach((b, i) => b.setAttribute("aria-selected", i === index));
  $("stages").textContent = "";
  for (const side of ["left", "right"]) {
    sides[side] = $(side);
    sides[side].textContent = "";
    program.stages.forEach((s, i) => sides[side].append(make("option", { value: i }, `${i} ${s.name}`)));
  }
  program.stages.forEach((s, i) => {
    const button = make("button", { type: "button", style: i ? `--pass:${colour(s.name)}` : "", title: `${s.options} ${s.note}`.trim() }, `${s.name} `, make("small", {}, `${s.matched} · ${s.ms < 1000 ? `${s.ms.toFixed(0)} ms` : `${(s.ms / 1000).toFixed(1)} s`}`));
    button.addEventListener("click", () => select(Math.max(0, i - 1), i));
    $("stages").append(make("li", {}, button));
  });
  $("colours").textContent = "";
  program.stages.slice(1).forEach((s) => $("colours").append(make("span", { class: "item" }, make("span", { class: "key", style: `background:${colour(s.name)}` }), s.name)));
  select(0, program.stages.length - 1);
}
function openLayer(k) {
  for (const side of ["left", "right"]) {
    const box = $(`${side}-code`), target = box.querySelector(`details[data-layer="${k}"]`);
    if (!target) continue;
    for (let d = target; d && d !== box; d = d.parentElement) if (d.tagName === "DETAILS") d.open = true;
    if (side === "right") target.scrollIntoView({ block: "center" });
  }
}
drawChart();
DATA.programs.forEach((p, i) => {
  const button = make("button", { type: "button", role: "tab" }, p.name);
  button.addEventListener("click", () => show(i));
  $("programs").append(button);
});
if (DATA.programs.length) show(0);
for (const side of ["left", "right"]) $(side).addEventListener("change", () => select($("left").value, $("right").value));
let waiting = 0;
$("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
$("unfold").addEventListener("click", () => document.querySelectorAll("#panes details").forEach((d) => (d.open = true)));
$("fold").addEventListener("click", () => document.querySelectorAll("#panes details").forEach((d) => (d.open = false)));
if (DATA.pictures.length) {
  $("pictures").hidden = false;
  DATA.pictures.forEach((src, i) => $("gallery").append(make("img", { src, alt: `Scores and survivors of image ${i}` })));
}
if (DATA.calibration) {
  $("calibration").hidden = false;
  $("measured").innerHTML = DATA.calibration; // tables of this package, escaped there
}
$("inspection").textContent = DATA.about.inspection;
$("versions").textContent = Object.entries(DATA.about.versions).map(([k, v]) => `${k} ${v}`).join("  ·  ");

// What a line says when pointed at.
document.addEventListener("mousemove", (event) => {
  const line = event.target.closest?.("[data-line]"), tip = $("tip");
  if (!line) { tip.hidden = true; return; }
  const [text, shape, pass, module, source] = words(+line.dataset.line);
  tip.textContent = [text.split(" = ")[0] + (shape ? `  ${shape}` : ""), pass === "captured" ? "the model's own node" : `put here by ${pass}`, module && `module ${module}`, source].filter(Boolean).join("\n");
  tip.hidden = false;
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 12)}px`;
  tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 12)}px`;
});
