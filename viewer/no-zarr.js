// In place of zarrita: the viewer opens no zarr store, and its codecs are half of the bundle.
export {};
