// Zooms and moves the picture on the stage: what is seen alone, never what is asked about.

const $ = (id) => document.getElementById(id);
const MOST = 16;
const STEP = 1.25;
const ARROWS = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

let [scale, x, y] = [1, 0, 0]; // of the layers, from the middle of the stage
let window = () => null; // begins to change the window, where there is one
const pointers = new Map(); // that are down: their last place

/** Have `begin()` called where the window is dragged: it gives a function of the way, or null. */
export function onWindow(begin) {
  window = begin;
}

/** Show all of the picture. */
export function fit() {
  [scale, x, y] = [1, 0, 0];
  apply();
}

function zoom(factor, at = [0, 0]) {
  const next = Math.min(Math.max(scale * factor, 1), MOST);
  x = at[0] - ((at[0] - x) * next) / scale; // what lies there stays there
  y = at[1] - ((at[1] - y) * next) / scale;
  scale = next;
  apply();
}

function move(right, down) {
  [x, y] = [x + right, y + down];
  apply();
}

function apply() {
  const { clientWidth, clientHeight } = $("stage");
  const within = (value, size) => Math.min(Math.max(value, (-size * (scale - 1)) / 2), (size * (scale - 1)) / 2);
  [x, y] = [within(x, clientWidth), within(y, clientHeight)];
  $("layers").style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
  $("fit").textContent = `${Math.round(scale * 100)}%`;
  $("zoom-out").disabled = scale === 1;
  $("zoom-in").disabled = scale === MOST;
}

/** A place on the screen, from the middle of the stage. */
function place(event) {
  const { left, top, width, height } = $("stage").getBoundingClientRect();
  return [event.clientX - left - width / 2, event.clientY - top - height / 2];
}

$("zoom-in").addEventListener("click", () => zoom(STEP));
$("zoom-out").addEventListener("click", () => zoom(1 / STEP));
$("fit").addEventListener("click", fit);
$("zoom").addEventListener("keydown", (event) => {
  if (event.key in ARROWS) move(...ARROWS[event.key].map((way) => way * 40));
  else if (event.key === "+") zoom(STEP);
  else if (event.key === "-") zoom(1 / STEP);
  else if (event.key === "0") fit();
  else return;
  event.preventDefault();
});

$("move").addEventListener("click", () => {
  const pressed = $("move").getAttribute("aria-pressed") === "true";
  $("move").setAttribute("aria-pressed", String(!pressed));
});

$("stage").addEventListener(
  "wheel",
  (event) => {
    if (!event.ctrlKey || $("layers").hidden) return; // so do two fingers on a touchpad
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 200), place(event));
  },
  { passive: false },
);

// One finger, or the mouse, changes the window or moves the picture; two fingers zoom it.
$("layers").addEventListener("pointerdown", (start) => {
  if (start.button > 1) return;
  start.preventDefault();
  pointers.set(start.pointerId, place(start));
  $("layers").setPointerCapture(start.pointerId);
  const moving = start.button === 1 || start.shiftKey || $("move").getAttribute("aria-pressed") === "true";
  const change = moving ? null : window();
  const from = place(start);
  const drag = (event) => {
    const [before, now] = [pointers.get(event.pointerId), place(event)];
    const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    pointers.set(event.pointerId, now);
    if (others.length) pinch(others[0], before, now);
    else if (change) change(now[0] - from[0], now[1] - from[1]);
    else move(now[0] - before[0], now[1] - before[1]);
  };
  const moved = (event) => event.pointerId === start.pointerId && drag(event);
  const end = (event) => {
    if (event.pointerId !== start.pointerId) return;
    pointers.delete(start.pointerId);
    $("layers").removeEventListener("pointermove", moved);
    $("layers").removeEventListener("lostpointercapture", end);
  };
  $("layers").addEventListener("pointermove", moved);
  $("layers").addEventListener("lostpointercapture", end);
});

function pinch(still, before, now) {
  const apart = ([a, b]) => Math.hypot(a - still[0], b - still[1]);
  const middle = [0, 1].map((axis) => (still[axis] + now[axis]) / 2);
  zoom(apart(now) / (apart(before) || 1), middle);
  move((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
}

new ResizeObserver(apply).observe($("stage"));
