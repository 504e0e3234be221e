"use strict";
(async () => {
  const CLASSES = ["left", "skipped", "fp8", "full"];
  const WORDS = ["had left before", "FFN skipped", "FFN in fp8", "FFN in full"];
  const SHADES = 7; // beside none
  const FADES = 3; // beside none
  const BLOCK = 400; // tokens, after which a line's end closes a block that is laid out on its own
  const at = (id) => document.getElementById(id);
  const count = (number) => number.toLocaleString("en");

  async function inflated(id) {
    const bytes = Uint8Array.from(atob(at(id).textContent), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  const about = JSON.parse(at("about").textContent);
  let pieces, packed;
  try {
    pieces = JSON.parse(new TextDecoder().decode(await inflated("pieces")));
    packed = await inflated("states");
  } catch (error) {
    at("told").textContent = `This browser cannot unpack the tokens (${error}).`;
    return;
  }
  const layers = about.names.length;
  const width = Math.ceil(about.tokens / 4);
  const state = (layer, token) => (packed[layer * width + (token >> 2)] >> ((token & 3) * 2)) & 3;

  function role(token) {
    if (token >= about.question[0] && token < about.question[1]) return "asked";
    return token >= about.document[0] && token < about.document[1] ? "" : "instruction";
  }

  // over all layers: a shade for those in which the FFN was passed, a fade for those before which it left
  const passed = new Uint16Array(pieces.length);
  const lived = new Uint16Array(pieces.length);
  for (let layer = 0; layer < layers; layer++) {
    for (let token = 0; token < pieces.length; token++) {
      const now = state(layer, token);
      passed[token] += now > 1;
      lived[token] += now > 0;
    }
  }
  const most = passed.reduce((a, b) => Math.max(a, b), 0);
  const fewest = passed.reduce((a, b) => Math.min(a, b), most);
  const overview = pieces.map((_, token) => {
    const shade = most === fewest ? SHADES : Math.round(((passed[token] - fewest) / (most - fewest)) * SHADES);
    const fade = Math.min(FADES, Math.ceil((1 - lived[token] / layers) * (FADES + 1)));
    return `d${shade} e${fade}`;
  });
  at("most").textContent = `FFN in ${most} layers`;
  at("fewest").textContent = `in ${fewest}`;
  at("fewest-item").hidden = most === fewest;

  const prompt = at("prompt");
  const spans = [];
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
  const roles = pieces.map((_, token) => role(token));

  const slider = at("layer");
  let chosen = -1;

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
      at("told").textContent = `all ${layers} layers: the stronger, the more of them passed the FFN`;
    } else {
      const [full, fp8, skipped, left] = about.counts[layer].map(count);
      const parts = [`${full} in full`, `${fp8} in fp8`, `${skipped} skipped`, `${left} had left`];
      const known = parts.filter((part) => !part.startsWith("0 "));
      slider.setAttribute("aria-valuetext", about.names[layer]);
      at("told").textContent = `${about.names[layer]}: ${known.join(", ")}`;
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
    at("token").textContent = `Token ${count(token)}, ${JSON.stringify(pieces[token])}: ${parts.join(", ")} of ${layers} layers`;
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
  paint();
  document.documentElement.dataset.ready = "yes";
})();
