// Vega, Vega-Lite and vega-embed as one script of package data, for `distilldsm plots`: npm ci && npm run build here.
import { readFileSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";

const parts = ["vega", "vega-lite", "vega-embed"].map((name) => {
  const folder = new URL(`node_modules/${name}/`, import.meta.url);
  const { version } = JSON.parse(readFileSync(new URL("package.json", folder), "utf8"));
  // The package vega has no licence file of its own; it comes from the same repository as vega-view.
  const licensed = name === "vega" ? new URL("node_modules/vega-view/", import.meta.url) : folder;
  const notice = readFileSync(new URL("LICENSE", licensed), "utf8").trim();
  const script = readFileSync(new URL(`build/${name}.min.js`, folder), "utf8").replace(/^\/\/# sourceMappingURL.*$/m, "");
  return `/*!\n${name} ${version}\n\n${notice}\n*/\n${script.trim()}`;
});
// Within a page a script ends at the first "</script".
const script = `${parts.join("\n")}\n`.replaceAll("</script", "<\\/script");
writeFileSync(new URL("../distilldsm/report/vega.js.gz", import.meta.url), gzipSync(script, { level: 9 }));
