// Greedy tokens of a vision-language model's folder in transformers.js: node transformers_js_images.mjs PACKAGE FOLDER FILE
// FILE: JSON with the rows of ids, the pixels, flat, and their dims, how many tokens to write, and the graphs' dtype. Prints rows of token ids.
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , place, folder, file] = process.argv;
const { ids, pixels, dims, tokens, dtype } = JSON.parse(readFileSync(file));
const entry = path.join(path.resolve(place), 'dist', 'transformers.node.mjs');
const { AutoModelForImageTextToText, Tensor, env } = await import(pathToFileURL(entry));

env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + '/';
const model = await AutoModelForImageTextToText.from_pretrained(path.basename(folder), { dtype });
const rows = (numbers) => new Tensor('int64', BigInt64Array.from(numbers.flat().map(BigInt)), [ids.length, ids[0].length]);
const written = await model.generate({
    input_ids: rows(ids),
    attention_mask: rows(ids.map((row) => row.map(() => 1))),
    pixel_values: new Tensor('float32', Float32Array.from(pixels), dims),
    max_new_tokens: tokens,
    do_sample: false,
});
console.log(JSON.stringify(written.tolist().map((row) => row.map(Number))));
