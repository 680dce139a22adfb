// Three functions that V8 compiles, under names of the caller's choice: `hot.js NAME SECONDS`. Prints a line when they have
// been compiled.
const [name, seconds] = process.argv.slice(2);
const source = `
  function ${name}Inner(n) { let sum = 0; for (let i = 0; i < n; i++) sum = (sum * 31 + i) | 0; return sum; }
  function ${name}Down(n, depth) { return depth === 0 ? ${name}Inner(n) : ${name}Down(n, depth - 1) ^ depth; }
  function ${name}Outer(n) { let sum = 0; for (let i = 0; i < 100; i++) sum ^= ${name}Down(n + i, 20); return sum; }
  ${name}Outer`;
const outer = (0, eval)(source);

const start = Date.now();
let result = 0;
let isWarm = false;
while (Date.now() - start < seconds * 1000) {
  result ^= outer(10000);
  if (!isWarm && Date.now() - start > 1500) {
    isWarm = true;
    require("fs").writeSync(1, "warm\n");
  }
}
require("fs").writeSync(1, `${result}\n`);
