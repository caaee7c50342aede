// What distilldsm/report/viewer/viewer.js uses of NiiVue; esbuild makes it the global `niivue`.
export { DRAG_MODE, MULTIPLANAR_TYPE, Niivue, NVImage, SHOW_RENDER, SLICE_TYPE } from "@niivue/niivue";
