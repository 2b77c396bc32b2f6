// The explorer: rows as text, a colour for every token, and the candidates at one of them. Texts of a corpus go into
// textContent only.

const STEPS = 9;
const SHOWN = 12; // candidates in the panel
const PRESETS = [0.7, 1, 2, 3, 6];

const nats = (x) => (Number.isNaN(x) ? "unknown" : `${x < 10 ? x.toFixed(2) : x.toFixed(1)} nats`);
const percent = (p) => {
  if (Number.isNaN(p)) return "?";
  if (p >= 0.0995) return `${(100 * p).toFixed(1)} %`;
  return p >= 1e-5 ? `${(100 * p).toPrecision(p >= 1e-4 ? 2 : 1)} %` : "< 0.001 %";
};

/** An element with properties and children; strings among them become text. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** A token with its spaces as signs. */
function tokenText(text) {
  const parts = text.replaceAll("\t", "").split(/( +)/).filter((part) => part !== "");
  return element("bdi", {}, ...parts.map((part) =>
    part.startsWith(" ") ? element("span", {className: "x-space"}, "␣".repeat(part.length)) : part));
}

/** What tokens can be coloured by: a name, the value at a target, its place on the scale from 0 to 1, and as text. */
function measures(numbers) {
  const {arrays, facts} = numbers;
  const largest = (values) => {
    const known = Array.from(values).filter((x) => !Number.isNaN(x)).sort((a, b) => a - b);
    return Math.max(known[Math.floor(0.98 * (known.length - 1))] || 0, 0.1);
  };
  const inNats = (id, name, value) => {
    const top = largest(Array.from({length: numbers.count}, (_, i) => value(i)));
    return {id, name, value, place: (x) => x / top, show: nats, ends: ["0", `${top.toFixed(1)} nats and more`]};
  };
  const deepest = Math.max(2, ...(arrays.heads || []));
  const found = [];
  if (facts.labels_known) found.push(inNats("loss", "teacher's loss on the token", (i) => numbers.loss(i)));
  found.push(inNats("entropy", "teacher's entropy, T = 1", (i) => arrays.entropy[i]));
  found.push({
    id: "rank", name: "rank of the token", value: (i) => numbers.rank(i),
    place: (x) => (x === 0 ? 1 : (0.9 * Math.log(x)) / Math.log(deepest)),
    show: (x) => (Number.isNaN(x) ? "no true token" : x ? `${x}` : `behind the head`), ends: ["1", "behind the head"],
  });
  found.push({
    id: "tail", name: "tail mass at T", value: (i) => numbers.tailMass(i), place: (x) => x, show: percent, ends: ["0 %", "100 %"],
  });
  facts.students.forEach(({name}, number) => {
    found.push(inNats(`kl${number}`, `KL of ${name} to the teacher`, (i) => arrays[`${number}.kl`][i]));
    found.push(inNats(`loss${number}`, `loss of ${name} on the token`, (i) => numbers.loss(i, number)));
  });
  if (arrays.difference) {
    found.push({
      id: "difference", name: facts.students.length > 2 ? "most that two students differ" : "how far the students differ",
      value: (i) => arrays.difference[i], place: (x) => x, show: percent, ends: ["0 %", "100 % (total variation)"],
    });
  }
  return found;
}

class Explorer {
  constructor(root, numbers) {
    this.root = root;
    this.numbers = numbers;
    this.facts = numbers.facts;
    this.measures = measures(numbers);
    this.parts = Object.fromEntries(
      ["measure", "slider", "temperature", "presets", "theme", "limit", "legend", "list", "sort", "heading", "text", "panel", "spoken"]
        .map((name) => [name, root.querySelector(`.x-${name}`)]));
    this.row = 0;
    this.position = 0;
    this.setUpTemperature();
    this.setUpMeasures();
    this.setUpKeys();
    this.parts.theme.addEventListener("change", () => (root.dataset.theme = this.parts.theme.value));
    this.setTemperature(1);
    this.readLink();
    window.addEventListener("hashchange", () => this.readLink());
    root.dataset.ready = "yes";
  }

  // Temperature: the slider is the base-2 logarithm.

  setUpTemperature() {
    const {slider, presets, limit} = this.parts, [low, high] = this.facts.temperatures;
    slider.min = Math.log2(low);
    slider.max = Math.log2(high);
    slider.disabled = low === high;
    slider.addEventListener("input", () => this.setTemperature(2 ** Number(slider.value)));
    for (const temperature of PRESETS.filter((t) => t >= low - 1e-9 && t <= high)) {
      const button = element("button", {type: "button", "aria-label": `T = ${temperature}`}, `${temperature}`);
      button.addEventListener("click", () => this.setTemperature(temperature));
      presets.append(button);
    }
    if (low === high) limit.textContent = "The cache knows the tail's mass at T = 1 only.";
    else if (low > 0.5) limit.textContent = `Below T = ${+low.toFixed(3)} the cache does not know the tail's mass (cache.knots).`;
  }

  setTemperature(temperature) {
    const [low, high] = this.facts.temperatures;
    const chosen = Math.min(Math.max(temperature, low), high);
    this.numbers.setTemperature(chosen);
    this.parts.slider.value = Math.log2(chosen);
    const text = `${+chosen.toFixed(2)}`;
    this.parts.temperature.textContent = text;
    this.parts.slider.setAttribute("aria-valuetext", `T = ${text}`);
    for (const button of this.parts.presets.children) {
      button.setAttribute("aria-pressed", Math.abs(Number(button.textContent) - chosen) < 1e-9);
    }
    if (this.tokens) {
      if (this.measure.id === "tail") this.paint();
      this.showPanel(this.position);
    }
  }

  // Measures and the list of rows.

  setUpMeasures() {
    const {measure, sort, list} = this.parts;
    for (const {id, name} of this.measures) measure.append(element("option", {value: id}, name));
    measure.addEventListener("change", () => this.paint());
    const sortable = this.measures.filter(({id}) => id !== "tail" && id !== "rank");
    sort.append(element("option", {value: ""}, "number"));
    for (const {id, name} of sortable) sort.append(element("option", {value: id}, `mean ${name}`));
    sort.value = sortable.length ? sortable[0].id : "";
    sort.addEventListener("change", () => this.showList());
    list.open = this.root.clientWidth >= 62 * 16; // where the style puts it beside the text
    this.showList();
  }

  get measure() {
    return this.measures.find(({id}) => id === this.parts.measure.value);
  }

  targetsOf(row) {
    const first = row * this.numbers.rowLength;
    return this.numbers.targets.subarray(first, first + this.numbers.rowLength);
  }

  meanOf(row, measure) {
    const values = Array.from(this.targetsOf(row)).filter((i) => i >= 0).map(measure.value).filter((x) => !Number.isNaN(x));
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN;
  }

  showList() {
    const measure = this.measures.find(({id}) => id === this.parts.sort.value);
    const lines = this.facts.rows.map(({row, tokens}, place) => ({row, tokens, place, mean: measure ? this.meanOf(place, measure) : -row}));
    lines.sort((a, b) => (Number.isNaN(a.mean) ? 1 : Number.isNaN(b.mean) ? -1 : b.mean - a.mean));
    this.order = lines.map(({place}) => place);
    this.buttons = [];
    this.parts.list.querySelector("ol").replaceChildren(...lines.map(({row, tokens, place, mean}) => {
      const shown = measure ? measure.show(mean) : "";
      const begin = tokens.slice(0, 24).join("").replace(/\s+/g, " ");
      const button = element("button", {type: "button"},
        element("b", {}, `row ${row}`, element("span", {}, shown)), element("bdi", {}, begin));
      button.addEventListener("click", () => this.go(place, 0, true));
      this.buttons[place] = button;
      return element("li", {}, button);
    }));
    this.markRow();
  }

  markRow() {
    this.buttons.forEach((button, place) => button.setAttribute("aria-current", place === this.row));
  }

  // The row's text.

  go(row, position, link) {
    this.row = row;
    this.showRow();
    this.select(position || 0, link);
    this.markRow();
  }

  showRow() {
    const {row, tokens, notes, documents} = this.facts.rows[this.row], starts = new Set(documents.length > 1 ? documents : []);
    this.parts.heading.textContent = `Row ${row}: ${tokens.length} tokens, ${documents.length === 1 ? "one document" : `${documents.length} documents`}`;
    let document = 0;
    this.tokens = tokens.map((text, position) => {
      const token = element("span", {className: "x-token", role: "option", tabIndex: -1, "aria-selected": "false"}, text);
      token.dataset.position = position;
      if (notes[position]) token.classList.add("x-part");
      if (/^[②③④]+$/.test(text)) token.classList.add("x-later");
      return token;
    });
    const children = this.tokens.flatMap((token, position) =>
      starts.has(position) ? [element("span", {className: "x-document", role: "presentation"}, `document ${++document}`), token] : [token]);
    this.parts.text.replaceChildren(...children);
    this.paint();
  }

  paint() {
    const measure = this.measure, targets = this.targetsOf(this.row);
    this.tokens.forEach((token, position) => {
      const target = targets[position], value = target < 0 ? NaN : measure.value(target);
      token.className = token.className.replace(/ (s\d|x-none)/g, "");
      token.classList.add(Number.isNaN(value) ? "x-none" : `s${this.step(measure, value)}`);
      const what = target < 0 ? "not predicted" : `${measure.name} ${measure.show(value)}`;
      token.setAttribute("aria-label", `${token.textContent.trim() || "space"}, ${what}`);
    });
    this.showLegend();
  }

  step(measure, value) {
    return Math.min(STEPS - 1, Math.max(0, Math.round(measure.place(value) * (STEPS - 1))));
  }

  showLegend() {
    const [low, high] = this.measure.ends;
    const steps = Array.from({length: STEPS}, (_, step) => element("i", {className: `x-token s${step}`}));
    this.parts.legend.replaceChildren(
      element("span", {}, `${this.measure.name}:`), element("span", {}, low),
      element("span", {className: "x-steps", "aria-hidden": "true"}, ...steps), element("span", {}, high),
      element("span", {className: "x-token x-none"}, "not predicted or unknown"));
  }

  // Choice of a token, by pointer, keys and link.

  select(position, link) {
    const last = this.tokens.length - 1;
    if (last < 0) return;
    const before = this.tokens[this.position];
    if (before) {
      before.setAttribute("aria-selected", "false");
      before.tabIndex = -1;
    }
    this.position = Math.min(Math.max(position, 0), last);
    const token = this.tokens[this.position];
    token.setAttribute("aria-selected", "true");
    token.tabIndex = 0;
    this.showPanel(this.position);
    this.speak(this.targetsOf(this.row)[this.position]);
    if (link) history.replaceState(null, "", `#row=${this.facts.rows[this.row].row}&pos=${this.position}`);
  }

  focus(position) {
    this.select(position, true);
    this.tokens[this.position].focus({preventScroll: true});
    this.reveal();
  }

  /** Scroll so that neither the window's edge nor a panel at its bottom covers the token. */
  reveal() {
    const token = this.tokens[this.position].getBoundingClientRect(), panel = this.parts.panel.getBoundingClientRect();
    const bottom = panel.left < token.right && panel.right > token.left && panel.top < window.innerHeight ? Math.min(panel.top, window.innerHeight) : window.innerHeight;
    if (token.top < 8) window.scrollBy(0, token.top - 40);
    else if (token.bottom > bottom - 8) window.scrollBy(0, token.bottom - bottom + 40);
  }

  setUpKeys() {
    const {text} = this.parts;
    const at = (event) => {
      const token = event.target.closest(".x-token");
      return token ? Number(token.dataset.position) : -1;
    };
    text.addEventListener("pointerover", (event) => event.pointerType !== "touch" && at(event) >= 0 && this.showPanel(at(event)));
    text.addEventListener("pointerleave", () => this.showPanel(this.position));
    text.addEventListener("click", (event) => at(event) >= 0 && this.focus(at(event)));
    text.addEventListener("focusin", (event) => at(event) >= 0 && at(event) !== this.position && this.select(at(event), true));
    text.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const moves = {
        ArrowRight: () => this.focus(this.position + 1), ArrowLeft: () => this.focus(this.position - 1),
        ArrowDown: () => this.focus(this.line(1)), ArrowUp: () => this.focus(this.line(-1)),
        Home: () => this.focus(0), End: () => this.focus(this.tokens.length - 1),
        PageDown: () => this.nextRow(1), PageUp: () => this.nextRow(-1),
        "+": () => this.setTemperature(this.numbers.temperature * 2 ** 0.25), "-": () => this.setTemperature(this.numbers.temperature / 2 ** 0.25),
      };
      if (!moves[event.key]) return;
      event.preventDefault();
      moves[event.key]();
    });
  }

  /** The token nearest above (-1) or below (1) the chosen one. */
  line(direction) {
    const boxes = this.tokens.map((token) => token.getClientRects()[0]);
    const own = boxes[this.position];
    let best = this.position, least = Infinity;
    boxes.forEach((box, position) => {
      const away = box ? direction * (box.top - own.top) : 0;
      if (away < own.height / 2) return;
      const distance = 1000 * away + Math.abs(box.left - own.left);
      if (distance < least) [best, least] = [position, distance];
    });
    return best;
  }

  nextRow(direction) {
    const place = this.order.indexOf(this.row) + direction;
    if (place < 0 || place >= this.order.length) return;
    this.go(this.order[place], 0, true);
    this.tokens[0].focus();
  }

  readLink() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const place = this.facts.rows.findIndex(({row}) => `${row}` === wanted.get("row"));
    if (place >= 0) {
      this.go(place, Number(wanted.get("pos")) || 0, false);
      this.reveal();
    } else if (!this.tokens) {
      const row = this.order.length ? this.order[0] : -1;
      if (row >= 0) this.go(row, Math.max(0, this.targetsOf(row).findIndex((target) => target >= 0)), false);
    }
  }

  // The candidates at a token.

  /** The teacher's best candidates in words, for a screen reader. */
  speak(target) {
    const {numbers} = this, p = target < 0 ? [] : numbers.teacherProbabilities(target), entries = target < 0 ? [] : numbers.entries(target);
    const best = p.map((_, place) => place).filter((place) => !Number.isNaN(p[place])).sort((a, b) => p[b] - p[a]).slice(0, 3);
    this.parts.spoken.textContent = best.length
      ? `The teacher's best: ${best.map((place) => `${numbers.text(entries[place])} ${percent(p[place])}`).join(", ")}` : "";
  }

  showPanel(position) {
    const target = this.targetsOf(this.row)[position], note = this.facts.rows[this.row].notes[position];
    const {tokens, documents} = this.facts.rows[this.row], begin = documents.findLast((first) => first <= position) || 0;
    const before = tokens.slice(Math.max(begin, position - 8), position).join("").replaceAll("\n", "");
    const title = element("h3", {}, element("bdi", {className: "x-before"}, before), tokenText(this.tokens[position].textContent.replaceAll("\n", "")));
    const place = element("p", {className: "x-note"}, `token ${position} of row ${this.facts.rows[this.row].row}${note ? ` · ${note}` : ""}`);
    if (target < 0) {
      this.parts.panel.replaceChildren(title, place, "Not predicted: nothing is cached for this token (the first of a document or a row, or one that is not learned).");
      return;
    }
    this.parts.panel.replaceChildren(title, place, this.candidates(target), this.values(target));
  }

  /** What tokens can be coloured by, at one target. */
  values(target) {
    const list = element("dl");
    for (const measure of this.measures) {
      if (/^loss\d/.test(measure.id)) continue;
      const name = measure.id === "tail" ? `tail mass at T = ${+this.numbers.temperature.toFixed(2)}` : measure.name;
      list.append(element("dt", {}, name), element("dd", {}, measure.show(measure.value(target))));
    }
    return list;
  }

  candidates(target) {
    const {numbers} = this, label = numbers.label(target), entries = numbers.entries(target), models = numbers.probabilities(target);
    const known = (p) => (Number.isNaN(p) ? 0 : p);
    const best = entries.map((_, place) => Math.max(...models.map((p) => known(p[place]))));
    const order = entries.map((_, place) => place).sort((a, b) => known(models[0][b]) - known(models[0][a]) || best[b] - best[a]);
    const shown = new Set([...order].sort((a, b) => best[b] - best[a]).slice(0, SHOWN));
    if (label >= 0) shown.add(label);
    const rest = models.map((p) => Math.max(0, 1 - [...shown].reduce((sum, place) => sum + known(p[place]), 0)));
    const top = Math.max(...[...shown].map((place) => best[place]), 1e-12);
    const names = ["teacher", ...this.facts.students.map(({name}) => name)];
    const head = element("tr", {}, element("th", {scope: "col"}, "candidate"), ...names.map((name) => element("th", {scope: "col"}, name)));
    const lines = order.filter((place) => shown.has(place)).map((place) => {
      const text = tokenText(numbers.text(entries[place]));
      const first = place === label ? element("td", {}, "▶ ", text, element("span", {className: "x-note"}, " true")) : element("td", {}, text);
      const kind = numbers.kind(entries[place]);
      const cells = models.map((p, model) => this.bar(p[place], top, model, model === 0 && (kind === SHAPE || kind === SAMPLE)));
      return element("tr", {className: place === label ? "x-true" : ""}, first, ...cells);
    });
    const others = element("tr", {}, element("td", {}, "all others"), ...rest.map((p) => element("td", {}, percent(p))));
    const marks = [];
    if (entries.some((e, place) => shown.has(place) && numbers.kind(e) === SHAPE)) marks.push("≈ and hatched: of the tail, estimated from its shape.");
    if (entries.some((e, place) => shown.has(place) && numbers.kind(e) === SAMPLE)) marks.push("≈ and hatched: drawn from the tail, a share of its mass at T = 1; at another T unknown.");
    if (entries.some((e, place) => shown.has(place) && numbers.kind(e) === UNKNOWN)) marks.push("?: in the tail, of which the cache knows the mass only.");
    return element("div", {}, element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines, others)),
      element("p", {className: "x-note"}, `The longest bar is ${percent(top)}. ${marks.join(" ")}`));
  }

  bar(p, top, model, estimate) {
    const bar = element("span", {className: `x-bar-of x-model${model % 4}${estimate ? " x-estimate" : ""}`});
    bar.style.setProperty("width", `${Number.isNaN(p) ? 0 : (100 * p) / top}%`);
    const cell = element("td", {}, `${estimate ? "≈ " : ""}${percent(p)}`, ...(Number.isNaN(p) ? [] : [bar]));
    cell.dataset.p = p;
    return cell;
  }
}

document.querySelectorAll(".explorer").forEach(async (root) => {
  const read = (name) => root.querySelector(`script.x-${name}`).textContent;
  const facts = JSON.parse(read("facts"));
  root.explorer = new Explorer(root, new Numbers(facts, await unpack(facts, read("data"))));
});
