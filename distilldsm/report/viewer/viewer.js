// The volume viewer: reads what fragment.py put into the page, draws it with NiiVue, and wires the controls.
// It may run in a sandbox of an origin of its own: no storage, no request, no worker.
(async () => {
  "use strict";
  const root = document.getElementById("dsm-viewer");
  const part = (name) => root.querySelector(`[data-is="${name}"]`);
  const { cases, labels } = JSON.parse(document.getElementById("dsm-viewer-cases").textContent);
  const controls = {};
  for (const element of root.querySelectorAll("[data-is]")) controls[element.dataset.is] = element;
  const { stage, canvas } = controls;

  const say = (text) => { part("message").textContent = text; };
  const disable = (isOff, names) => { for (const name of names) controls[name].disabled = isOff; };
  const ALL = ["case", "planes", "truth", "prediction", "style", "opacity", "low", "high", "reset", "smooth", "radiological"];

  disable(true, ALL);
  const test = document.createElement("canvas").getContext("webgl2");
  if (!test) {
    say("The volumes cannot be shown here: this browser offers no WebGL 2. Another browser, or graphics acceleration "
      + "switched on in its settings, may help.");
    return;
  }
  test.getExtension("WEBGL_lose_context")?.loseContext();
  if (typeof DecompressionStream === "undefined") {
    say("The volumes cannot be shown here: this browser cannot unpack gzip. Browsers since 2023 can.");
    return;
  }

  // base64 in the page to an ArrayBuffer, decompressed.
  async function unpack(key) {
    const packed = Uint8Array.from(atob(document.getElementById(`dsm-viewer-${key}`).textContent), (c) => c.charCodeAt(0));
    try {
      return await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
    } catch {
      throw new Error("its data are damaged");
    }
  }

  const nameOf = (value) => labels.find((label) => label.value === value)?.name ?? (value ? `value ${value}` : "background");

  // Values without a name are grey.
  function palette() {
    const table = { R: Array(256).fill(160), G: Array(256).fill(160), B: Array(256).fill(160), A: Array(256).fill(255) };
    table.A[0] = 0;
    table.labels = Array.from({ length: 256 }, (_, value) => nameOf(value));
    for (const { value, colour } of labels) {
      ["R", "G", "B"].forEach((channel, k) => {
        table[channel][value] = parseInt(colour.slice(1 + 2 * k, 3 + 2 * k), 16);
      });
    }
    return table;
  }

  let nv;
  let niivue;
  let shown = {};  // image, truth, prediction as NVImage, the last two or null
  let start = [0, 0];  // the window the case came with

  async function prepare() {
    const script = document.createElement("script");
    script.textContent = `${new TextDecoder().decode(await unpack("script"))};globalThis.niivue=niivue`;
    document.head.append(script);
    script.remove();
    niivue = globalThis.niivue;
    nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 1, 1, 0.75],
      crosshairGap: 3,
      crosshairWidth: 0.4,
      crosshairWidthUnit: "percent",
      dragAndDropEnabled: false,
      dragMode: niivue.DRAG_MODE.none,
      fontColor: [0.8, 0.8, 0.8, 1],
      fontMinPx: 14,
      isCornerOrientationText: false,
      isNearestInterpolation: true,
      loadingText: "",
      logLevel: "error",
      multiplanarPadPixels: 4,
      multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
      showLegend: false,
    });
    nv.onLocationChange = ({ mm }) => read(mm);
    await nv.attachToCanvas(canvas, false);
  }

  // NiiVue's rim is one pixel wide: hard to see, above all on a fine screen. Its shader finds it at the pixels beside.
  function thicken() {
    const { gl } = nv;
    const sources = gl.getAttachedShaders(nv.sliceMMShader.program).map((shader) => gl.getShaderSource(shader));
    const source = sources.find((text) => text.includes("drawRimOpacity"));
    const width = Math.max(2, Math.round(1.5 * devicePixelRatio)).toFixed(1);
    if (source) nv.setCustomSliceShader(source.replaceAll(/dFd[xy]\(texPos\)/g, (step) => `${width} * ${step}`));
  }

  const volume = async (key) => (key ? niivue.NVImage.new(await unpack(key), "volume.nii", "gray") : null);

  // --- what is drawn ---------------------------------------------------------------------------------------------

  // The truth is NiiVue's overlay. The prediction is its drawing, as only that can be outlined within a slice: the
  // overlay's outline is one of voxels in space, which fills whole slices where a structure ends.
  function draw() {
    const opacity = controls.opacity.value / 100;
    const isOutline = controls.style.value === "outline";
    if (shown.truth) nv.setOpacity(1, controls.truth.checked ? opacity : 0);
    nv.drawRimOpacity = isOutline && controls.prediction.checked ? 1 : -1;
    // Where the drawing is fully transparent NiiVue looks for no rim.
    nv.setDrawOpacity(!controls.prediction.checked ? 0 : isOutline ? 1 / 512 : opacity);
  }

  function showWindow() {
    const digits = (value) => Number(value.toPrecision(4));
    controls.low.value = digits(nv.volumes[0].cal_min);
    controls.high.value = digits(nv.volumes[0].cal_max);
  }

  function setWindow(low, high) {
    if (!(Number.isFinite(low) && Number.isFinite(high) && low < high)) return;
    Object.assign(nv.volumes[0], { cal_min: low, cal_max: high });
    nv.refreshLayers(nv.volumes[0], 0);
    nv.drawScene();
  }

  // --- where the crosshair is -------------------------------------------------------------------------------------

  function valueAt(image, mm) {
    const [x, y, z] = image.mm2vox(mm);
    return image.getValue(x, y, z);
  }

  function read(mm) {
    if (!shown.image) return;
    const position = ["x", "y", "z"].map((axis, k) => `${axis} ${mm[k].toFixed(1)}`).join(" ");
    const found = [`${position} mm (RAS)`, `intensity ${Number(valueAt(shown.image, mm).toPrecision(4))}`];
    const names = ["truth", "prediction"].filter((kind) => shown[kind]).map((kind) => {
      const name = nameOf(valueAt(shown[kind], mm));
      found.push(`${kind}: ${name}`);
      return name;
    });
    if (names.length === 2 && names[0] !== names[1]) found.push("they differ");
    controls.readout.textContent = found.join(" · ");
  }

  // mm of the voxel of a label (null: of any) that lies nearest to the label's centre; null where there is none.
  function centre(image, label) {
    const [, nx, ny, nz] = image.hdr.dims;
    const isIn = label === null ? (value) => value > 0 : (value) => value === label;
    const each = (visit) => {
      for (let z = 0, k = 0; z < nz; z++) {
        for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++, k++) if (isIn(image.img[k])) visit(x, y, z);
      }
    };
    const sum = [0, 0, 0, 0];
    each((x, y, z) => { sum[0] += x; sum[1] += y; sum[2] += z; sum[3] += 1; });
    if (!sum[3]) return null;
    const [cx, cy, cz] = sum.map((total) => total / sum[3]);
    const [, dx, dy, dz] = image.hdr.pixDims;
    let best = Infinity;
    let nearest = [0, 0, 0];
    each((x, y, z) => {
      const far = ((x - cx) * dx) ** 2 + ((y - cy) * dy) ** 2 + ((z - cz) * dz) ** 2;
      if (far < best) { best = far; nearest = [x, y, z]; }
    });
    return image.hdr.affine.slice(0, 3).map((row) => row[0] * nearest[0] + row[1] * nearest[1] + row[2] * nearest[2] + row[3]);
  }

  function goTo(label) {
    const masks = [shown.truth, shown.prediction].filter(Boolean);
    const mm = masks.map((mask) => centre(mask, label)).find(Boolean);
    if (mm) nv.scene.crosshairPos = nv.mm2frac(mm, 0, true);
    nv.createOnLocationChange();
    nv.drawScene();
    return Boolean(mm);
  }

  // --- cases -------------------------------------------------------------------------------------------------------

  let last = 0;

  async function choose(index) {
    const wanted = ++last;
    say("Unpacking ...");
    disable(true, ALL.slice(1));
    for (const button of controls.legend.children) button.disabled = true;
    try {
      if (!nv) await (prepare.started ??= prepare());
      const { image, truth, prediction, caption } = cases[index];
      const next = { image: await volume(image), truth: await volume(truth), prediction: await volume(prediction) };
      if (wanted !== last) return;  // another case was chosen meanwhile
      shown = {};
      nv.closeDrawing();
      nv.volumes = [];
      nv.addVolume(next.image);
      if (!nv.customSliceShader) thicken();
      if (next.truth) {
        next.truth.setColormapLabel(palette());
        nv.addVolume(next.truth);
      }
      if (next.prediction) {
        nv.setDrawColormap(palette());
        if (!nv.loadDrawing(next.prediction)) throw new Error("the prediction does not lie on the image's grid");
      }
      shown = next;
      start = [next.image.cal_min, next.image.cal_max];
      showWindow();
      controls.caption.textContent = caption;
      disable(false, ALL);
      disable(!next.truth, ["truth"]);
      disable(!next.prediction, ["prediction", "style"]);
      for (const button of controls.legend.children) button.disabled = !(next.truth || next.prediction);
      draw();
      nv.scene.crosshairPos = [0.5, 0.5, 0.5];
      goTo(null);
      say("");
      root.dataset.shown = index;
    } catch (error) {
      disable(false, ["case"]);
      say(`This case cannot be shown: ${error.message ?? error}`);
      console.error(error);
    }
  }

  // --- controls ----------------------------------------------------------------------------------------------------

  cases.forEach(({ name }, index) => controls.case.append(new Option(name, index)));
  for (const { name, value, colour } of labels) {
    const button = document.createElement("button");
    button.type = "button";
    button.disabled = true;
    const swatch = document.createElement("i");
    swatch.style.background = colour;
    button.append(swatch, name);
    button.addEventListener("click", () => {
      if (!goTo(value)) controls.readout.textContent = `${name}: in neither mask`;
    });
    controls.legend.append(button);
  }
  controls.case.addEventListener("change", () => choose(Number(controls.case.value)));
  controls.planes.addEventListener("change", () => {
    stage.classList.toggle("dsm-single", controls.planes.value !== "MULTIPLANAR");
    nv.setSliceType(niivue.SLICE_TYPE[controls.planes.value]);
  });
  for (const name of ["truth", "prediction", "style"]) controls[name].addEventListener("change", draw);
  controls.opacity.addEventListener("input", draw);
  for (const name of ["low", "high"]) {
    controls[name].addEventListener("change", () => setWindow(controls.low.valueAsNumber, controls.high.valueAsNumber));
  }
  const reset = () => { setWindow(...start); showWindow(); };
  controls.reset.addEventListener("click", reset);
  controls.smooth.addEventListener("change", () => nv.setInterpolation(!controls.smooth.checked));
  controls.radiological.addEventListener("change", () => nv.setRadiologicalConvention(controls.radiological.checked));

  // Windowing by the right button: NiiVue's own counts in whole intensities, of which some scans have only one.
  let dragged = null;
  stage.addEventListener("mousedown", (event) => {
    if (event.button !== 2 || !shown.image) return;
    event.stopPropagation();
    const { cal_min: low, cal_max: high } = nv.volumes[0];
    dragged = { x: event.clientX, y: event.clientY, middle: (low + high) / 2, width: high - low };
  }, { capture: true });
  addEventListener("mousemove", (event) => {
    if (!dragged) return;
    const { x, y, middle, width } = dragged;
    const wide = width * 2 ** ((event.clientX - x) / 100);
    const level = middle + (width * (event.clientY - y)) / 300;
    setWindow(level - wide / 2, level + wide / 2);
    showWindow();
  });
  addEventListener("mouseup", (event) => { if (event.button === 2) dragged = null; });
  stage.addEventListener("dblclick", (event) => {
    event.stopPropagation();
    if (shown.image) reset();
  }, { capture: true });

  const STEPS = {
    ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowDown: [0, -1, 0], ArrowUp: [0, 1, 0], PageDown: [0, 0, -1], PageUp: [0, 0, 1],
  };
  for (const kind of ["keydown", "keyup"]) {
    stage.addEventListener(kind, (event) => {
      event.stopPropagation();  // NiiVue's own keys do what nobody here expects
      if (!(event.key in STEPS)) return;
      event.preventDefault();
      if (kind === "keydown" && shown.image) nv.moveCrosshairInVox(...STEPS[event.key]);
    }, { capture: true });
  }
  // NiiVue takes every turn of the wheel: the page could not be scrolled past it.
  stage.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas) event.stopPropagation();
  }, { capture: true });

  // Only a viewer that is looked at unpacks anything.
  disable(false, ["case"]);
  say("");
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    if (!last) choose(Number(controls.case.value));
  }).observe(stage);
})();
