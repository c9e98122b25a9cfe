// Typesets the mathematics of HTML files by KaTeX, so that reading them needs no script.
//
//     node render.mjs KATEX_FOLDER FILE...
//
// An expression that KaTeX does not understand is an error.

import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, ...files] = process.argv.slice(2);
const katex = (await import(pathToFileURL(`${folder}/dist/katex.mjs`))).default;
const EXPRESSION = /\\\(([^]*?)\\\)|\\\[([^]*?)\\\]/;
const ELEMENT = /<(span|div) class="arithmatex">([^]*?)<\/\1>/g;
const ENTITIES = { "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&amp;": "&" };

for (const file of files) {
  const html = readFileSync(file, "utf-8");
  const typeset = html.replace(ELEMENT, (element, tag, content) => {
    const [, inline, display] = content.match(EXPRESSION);
    const tex = (inline ?? display).replace(/&(lt|gt|quot|#39|amp);/g, (name) => ENTITIES[name]);
    const options = { displayMode: display !== undefined, throwOnError: true, strict: "error" };
    try {
      return `<${tag} class="mathematics">${katex.renderToString(tex, options)}</${tag}>`;
    } catch (error) {
      throw new Error(`${file}: ${tex}: ${error.message}`);
    }
  });
  if (typeset !== html) writeFileSync(file, typeset);
}
