"use strict";
// Draws a row's map into the page's one panel; each call of `showMap` replaces the map before.
const showMap = (() => {
  const CLASSES = ["left", "skipped", "fp8", "full"];
  const WORDS = ["had left before", "FFN skipped", "FFN in fp8", "FFN in full"];
  const SHADES = 7; // beside none
  const FADES = 3; // beside none
  const BLOCK = 400; // tokens, after which a line's end closes a block that is laid out on its own
  const at = (id) => document.getElementById(id);
  const count = (number) => number.toLocaleString("en");
  const slider = at("layer");
  const prompt = at("prompt");
  let data, layers, packed, pieces, overview, roles, spans, chosen;

  async function inflated(text) {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  const state = (layer, token) =>
    (packed[layer * Math.ceil(pieces.length / 4) + (token >> 2)] >> ((token & 3) * 2)) & 3;
  const within = (token, [start, stop]) => token >= start && token < stop;

  function role(token) {
    const always = data.always.some((range) => within(token, range)) ? "always " : "";
    if (within(token, data.question)) return always + "asked";
    return within(token, data.document) ? always : always + "instruction";
  }

  // a shade for the layers, but the last, in which the FFN was passed; a fade for those behind an early end
  function summarise() {
    const counting = Math.max(layers - 1, 1);
    const passed = new Uint16Array(pieces.length);
    const lived = new Uint16Array(pieces.length);
    for (let layer = 0; layer < layers; layer++) {
      for (let token = 0; token < pieces.length; token++) {
        const now = state(layer, token);
        passed[token] += now > 1 && layer < counting;
        lived[token] += now > 0;
      }
    }
    const most = passed.reduce((a, b) => Math.max(a, b), 0);
    const fewest = passed.reduce((a, b) => Math.min(a, b), most);
    const left = lived.some((number) => number < layers);
    overview = pieces.map((_, token) => {
      const shade = most === fewest ? SHADES : Math.round(((passed[token] - fewest) / (most - fewest)) * SHADES);
      const fade = Math.min(FADES, Math.ceil((1 - lived[token] / layers) * (FADES + 1)));
      return `d${shade} e${fade}`;
    });
    at("most").textContent = `FFN in ${most === counting ? "all" : most + " of"} ${counting} layers before the last`;
    at("fewest").textContent = `in ${fewest} of them, the fewest`;
    at("fewest-item").hidden = most === fewest;
    at("between-item").hidden = most - fewest < 2;
    at("early-item").hidden = !left;
    for (const item of document.querySelectorAll(".if-left")) item.hidden = !left;
    for (const item of document.querySelectorAll(".if-fp8")) item.hidden = !data.fp8;
    at("always-item").hidden = !data.always.length;
    at("asked-item").hidden = data.question[0] >= data.question[1];
    at("unpruned").hidden = data.pruned;
  }

  function build() {
    prompt.replaceChildren();
    spans = [];
    let block = null;
    for (let token = 0; token < pieces.length; token++) {
      if (!block || (block.childElementCount >= BLOCK && pieces[token - 1].endsWith("\n"))) {
        block = document.createElement("div");
        block.className = "block";
        prompt.append(block);
      }
      const span = document.createElement("b");
      span.textContent = pieces[token];
      span.dataset.token = token;
      spans.push(span);
      block.append(span);
    }
  }

  function paint() {
    const layer = slider.valueAsNumber - 1;
    for (let token = 0; token < spans.length; token++) {
      const shade = layer < 0 ? overview[token] : CLASSES[state(layer, token)];
      const marks = token === chosen ? " chosen" : "";
      const wanted = `${shade} ${roles[token]}${marks}`;
      if (spans[token].className !== wanted) spans[token].className = wanted;
    }
    at("legend-all").hidden = layer >= 0;
    at("legend-one").hidden = layer < 0;
    if (layer < 0) {
      slider.setAttribute("aria-valuetext", "all layers");
      at("told").textContent = `all ${layers} layers together`;
    } else {
      const [full, fp8, skipped, left] = data.counts[layer].map(count);
      const parts = [`${full} in full`, `${fp8} in fp8`, `${skipped} skipped`, `${left} had left`];
      const known = parts.filter((part) => !part.startsWith("0 "));
      slider.setAttribute("aria-valuetext", data.names[layer]);
      at("told").textContent = `${data.names[layer]}: ${known.join(", ")}`;
    }
    for (const [number, cell] of [...at("strip").children].entries()) {
      cell.classList.toggle("now", number === layer);
    }
  }

  function choose(token, scroll) {
    if (token < 0 || token >= spans.length) return;
    spans[chosen]?.classList.remove("chosen");
    chosen = token;
    spans[token].classList.add("chosen");
    const totals = [0, 0, 0, 0];
    const cells = [];
    for (let layer = 0; layer < layers; layer++) {
      const now = state(layer, token);
      totals[now]++;
      const cell = document.createElement("i");
      cell.className = CLASSES[now];
      cells.push(cell);
    }
    at("strip").replaceChildren(...cells);
    const parts = [3, 2, 1, 0].filter((now) => totals[now]).map((now) => `${WORDS[now]} in ${totals[now]}`);
    const always = data.always.some((range) => within(token, range)) ? "; always kept" : "";
    at("token").textContent =
      `Token ${count(token)}, ${JSON.stringify(pieces[token])}: ${parts.join(", ")} of ${layers} layers${always}`;
    cells[slider.valueAsNumber - 1]?.classList.add("now");
    if (scroll) spans[token].scrollIntoView({ block: "center" });
  }

  slider.addEventListener("input", paint);
  prompt.addEventListener("click", (event) => {
    const token = event.target.dataset.token;
    if (token !== undefined) choose(Number(token), false);
  });
  prompt.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    choose(chosen < 0 ? 0 : chosen + step, true);
  });

  return async (map) => {
    data = map;
    try {
      pieces = JSON.parse(new TextDecoder().decode(await inflated(map.pieces)));
      packed = await inflated(map.states);
    } catch (error) {
      at("told").textContent = `This browser cannot unpack the tokens (${error}).`;
      return;
    }
    layers = map.names.length;
    chosen = -1;
    slider.max = layers;
    slider.value = 0;
    at("strip").replaceChildren();
    roles = pieces.map((_, token) => role(token));
    summarise();
    build();
    paint();
    document.documentElement.dataset.ready = "yes";
  };
})();

const onlyMap = document.getElementById("only-map");
if (onlyMap) showMap(JSON.parse(onlyMap.textContent));
