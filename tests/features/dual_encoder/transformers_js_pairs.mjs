// Which texts go with an image, in transformers.js: node transformers_js_pairs.mjs PACKAGE FOLDER IMAGE TEXT TEXT …
// Prints the texts' shares as its zero-shot image classifier gives them, in the order of the texts.
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , place, folder, image, ...texts] = process.argv;
const entry = path.join(path.resolve(place), 'dist', 'transformers.node.mjs');
const { pipeline, env } = await import(pathToFileURL(entry));

env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + '/';
const classify = await pipeline('zero-shot-image-classification', path.basename(folder));
const found = await classify(image, texts, { hypothesis_template: '{}' });
const shares = Object.fromEntries(found.map(({ label, score }) => [label, score]));
console.log(JSON.stringify(texts.map((text) => shares[text])));
