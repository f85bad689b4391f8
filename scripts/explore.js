// A board of explore.py: cells on a canvas, each a hexadecimal digit of its brightness in props.value, painted with a
// pointer or switched one by one. Gradio gives element, props and watch.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d", {willReadFrequently: true});
const W = canvas.width, H = canvas.height;
let last;
const fill = (i, colour) => { pen.fillStyle = colour; pen.fillRect(i % W, Math.floor(i / W), 1, 1); };
const show = () => [...props.value].forEach((cell, i) => fill(i, "#" + cell.repeat(3)));
canvas.onpointerdown = canvas.onpointermove = e => {
  const down = e.type == "pointerdown", box = canvas.getBoundingClientRect();
  const x = (e.clientX - box.x) / box.width * W, y = (e.clientY - box.y) / box.height * H;
  if (!down && !(e.buttons && props.brush)) return;
  if (down) { last = [x - .01, y]; canvas.setPointerCapture(e.pointerId); }
  const i = Math.floor(y) * W + Math.floor(x);
  if (!props.brush) fill(i, props.value[i] == "0" ? "#fff" : "#000"); else {
    Object.assign(pen, {strokeStyle: "#fff", lineWidth: 2.6, lineCap: "round"});
    pen.beginPath(); pen.moveTo(...last); pen.lineTo(x, y); pen.stroke(); last = [x, y];
  }
  const pixels = pen.getImageData(0, 0, W, H).data;
  props.value = [...props.value].map((_, i) => (pixels[4 * i] >> 4).toString(16)).join("");
};
element.querySelector("button")?.addEventListener("click", () => { props.value = "0".repeat(W * H); show(); });
watch("value", show);
show();
