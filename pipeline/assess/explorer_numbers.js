// The numbers of an explorer: what explore.py packed, and the probabilities of a position at a temperature.

const UNKNOWN = 0, HEAD = 1, LABEL = 2, SHAPE = 3, SAMPLE = 4; // Kind of explore.py
const NONE = 0xffff;

/** The arrays of an explorer by name; sizes as Float64Array, NaN where there is none. */
async function unpack(facts, encoded) {
  const packed = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const arrays = {};
  for (const [name, [first, count, width, step]] of Object.entries(facts.arrays)) {
    const whole = new Uint32Array(count);
    for (let plane = 0; plane < width; plane++) {
      for (let i = 0; i < count; i++) whole[i] += bytes[first + plane * count + i] * 2 ** (8 * plane);
    }
    arrays[name] = step ? Float64Array.from(whole, (code) => (code === NONE ? NaN : (code * step) ** 2)) : whole;
  }
  return arrays;
}

const logAdd = (a, b) => {
  const high = Math.max(a, b);
  return high === -Infinity ? high : high + Math.log1p(Math.exp(Math.min(a, b) - high));
};

/** Weights of the polynomial through some points, at x. */
const lagrange = (points, x) =>
  points.map((own) => points.reduce((product, other) => (other === own ? product : (product * (x - other)) / (own - other)), 1));

class Numbers {
  constructor(facts, arrays) {
    this.facts = facts;
    this.arrays = arrays;
    const sums = (counts) => {
      const first = new Uint32Array(counts.length + 1);
      for (let i = 0; i < counts.length; i++) first[i + 1] = first[i] + counts[i];
      return first;
    };
    this.firstEntry = sums(arrays.entries || []);
    this.count = this.firstEntry.length - 1;
    const described = arrays.described || [];
    this.rowLength = facts.rows.length ? described.length / facts.rows.length : 0;
    // Of every token of every row: the number of its target, -1 without one.
    this.targets = new Int32Array(described.length);
    let next = 0;
    for (let i = 0; i < described.length; i++) this.targets[i] = described[i] ? next++ : -1;
    this.setTemperature(1);
  }

  setTemperature(temperature) {
    this.temperature = temperature;
    this.beta = 1 / temperature;
    this.weights = Object.fromEntries(
      Object.entries(this.facts.points).map(([name, points]) => [name, lagrange(points, this.beta)]));
  }

  /** log sum exp(beta l) over the `count` tokens of a curve, at target i. */
  curve(name, i, count) {
    const values = this.arrays[name], weights = this.weights[name] || this.weights.student;
    if (!(count > 0) || Number.isNaN(values[i * weights.length])) return -Infinity;
    let height = 0;
    for (let j = 0; j < weights.length; j++) height -= weights[j] * values[i * weights.length + j];
    return Math.log(count) + this.beta * height;
  }

  /** The teacher at target i: log normaliser, log mass of the tail, and the number of tokens in it. */
  teacher(i) {
    const {arrays, facts, beta} = this;
    let known = -Infinity, listed = 0;
    for (let e = this.firstEntry[i]; e < this.firstEntry[i + 1]; e++) {
      if (arrays["entry.kind"][e] !== HEAD) continue;
      known = logAdd(known, -beta * arrays["entry.teacher"][e]);
      listed++;
    }
    const inTail = facts.vocab_size - arrays.heads[i];
    const tail = this.curve("teacher.tail", i, inTail);
    const rest = arrays["teacher.rest"] ? this.curve("teacher.rest", i, facts.vocab_size - listed) : tail;
    const normaliser = logAdd(known, rest);
    return {normaliser, logTail: tail - normaliser, inTail};
  }

  tailMass(i) {
    return Math.exp(this.teacher(i).logTail);
  }

  /** The teacher's probabilities of the entries of target i, NaN where unknown. */
  teacherProbabilities(i) {
    const {arrays, beta} = this, {normaliser, logTail, inTail} = this.teacher(i);
    const shape = arrays["teacher.shape"] ? this.curve("teacher.shape", i, inTail) : NaN;
    return this.entries(i).map((e) => {
      const kind = arrays["entry.kind"][e], scaled = -beta * arrays["entry.teacher"][e];
      if (kind === UNKNOWN || (kind === SAMPLE && beta !== 1)) return NaN;
      if (kind === SAMPLE) return Math.exp(scaled);
      return Math.exp(kind === SHAPE ? logTail + scaled - shape : scaled - normaliser);
    });
  }

  studentProbabilities(i, number) {
    const values = this.arrays[`entry.${number}`], entries = this.entries(i);
    const scaled = entries.map((e) => -this.beta * values[e]);
    const listed = scaled.filter((x) => !Number.isNaN(x));
    const others = this.facts.students[number].vocab_size - listed.length;
    const normaliser = listed.reduce(logAdd, this.curve(`${number}.rest`, i, others));
    return scaled.map((x) => Math.exp(x - normaliser));
  }

  /** Teacher first, then the students: probabilities of each of the entries of target i. */
  probabilities(i) {
    return [this.teacherProbabilities(i), ...this.facts.students.map((_, number) => this.studentProbabilities(i, number))];
  }

  entries(i) {
    return Array.from({length: this.firstEntry[i + 1] - this.firstEntry[i]}, (_, place) => this.firstEntry[i] + place);
  }

  text(e) {
    return this.facts.texts[this.arrays["entry.id"][e]];
  }

  kind(e) {
    return this.arrays["entry.kind"][e];
  }

  /** The place of the true token among the entries of target i, -1 without one. */
  label(i) {
    const place = this.arrays.label[i];
    return place === 0xff ? -1 : place;
  }

  /** A model's loss on the true token at T = 1, nats; NaN where it is unknown. `number` of the student, -1: teacher. */
  loss(i, number = -1) {
    const place = this.label(i);
    if (place < 0) return NaN;
    const e = this.firstEntry[i] + place;
    if (number < 0 && ![HEAD, LABEL].includes(this.kind(e))) return NaN;
    return this.arrays[number < 0 ? "entry.teacher" : `entry.${number}`][e];
  }

  /** 1 for the teacher's first choice; 0 where the true token is outside the head, NaN where there is none. */
  rank(i) {
    return this.label(i) < 0 ? NaN : this.arrays.rank[i];
  }
}
