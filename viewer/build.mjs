// NiiVue as one script of package data: `make viewer` at the root of the repository, or npm ci && npm run build here.
//
// Writes distilldsm/report/viewer/niivue.js.gz, its licences and niivue.json, which tells version, packages and hashes.
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const OUTPUT = new URL("../distilldsm/report/viewer/", import.meta.url);
const here = (path) => new URL(path, import.meta.url);

const bundled = await build({
  absWorkingDir: here(".").pathname,
  alias: { zarrita: "./no-zarr.js" },
  bundle: true,
  charset: "ascii",
  entryPoints: ["entry.js"],
  format: "iife",
  globalName: "niivue",
  legalComments: "none",
  logOverride: { "import-is-undefined": "silent" },
  metafile: true,
  minify: true,
  target: "es2022",
  write: false,
});

// Only what is in the bundle: a package whose code was left out needs no notice.
const inside = Object.values(bundled.metafile.outputs)[0].inputs;
const folders = Object.entries(inside)
  .filter(([, input]) => input.bytesInOutput > 0)
  .map(([path]) => path.match(/^node_modules\/(@[^/]+\/[^/]+|[^/]+)\//)?.[1])
  .filter(Boolean);
const packages = [...new Set(folders)].sort();

const notices = [];
const versions = {};
for (const name of packages) {
  const { version, license } = JSON.parse(readFileSync(here(`node_modules/${name}/package.json`), "utf8"));
  versions[name] = version;
  const text = licence(name).trim().replaceAll("*/", "* /").replace(/[^\x00-\x7f]/g, "");
  notices.push(`${name} ${version} (${license})\n\n${text}`);
}
notices.push(readFileSync(here("licences/roboto.txt"), "utf8").trim());
const text = `${notices.join(`\n\n${"-".repeat(72)}\n\n`)}\n`;

// A page that holds the script is a copy of it: the notices go along, as its first comment.
const script = `/*!\n${text}*/\n${bundled.outputFiles[0].text}`;
const packed = gzipSync(script, { level: 9 });
const sha256 = (data) => createHash("sha256").update(data).digest("hex");
const about = {
  name: "NiiVue",
  version: versions["@niivue/niivue"],
  packages: versions,
  sha256: { "niivue.js.gz": sha256(packed), "niivue.LICENSE.txt": sha256(text) },
};
writeFileSync(new URL("niivue.js.gz", OUTPUT), packed);
writeFileSync(new URL("niivue.LICENSE.txt", OUTPUT), text);
writeFileSync(new URL("niivue.json", OUTPUT), `${JSON.stringify(about, null, 2)}\n`);
console.log(`${packages.join(", ")}: ${script.length} bytes, ${packed.length} compressed`);

function licence(name) {
  const folder = here(`node_modules/${name}/`);
  const file = readdirSync(folder).find((entry) => /^licen[cs]e(\.md|\.txt)?$/i.test(entry));
  if (file) return readFileSync(new URL(file, folder), "utf8");
  // Published without a licence file: its repository's, kept here.
  const kept = here(`licences/${name.replace("/", "-")}.txt`);
  if (!existsSync(kept)) throw new Error(`${name} has no licence file: put it into ${kept.pathname}`);
  return readFileSync(kept, "utf8");
}
