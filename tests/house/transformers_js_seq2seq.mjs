// Greedy tokens of an encoder-decoder in transformers.js: node transformers_js_seq2seq.mjs PACKAGE FOLDER '{"dtypes": ["fp32"], …}'
// PACKAGE: the folder of @huggingface/transformers. Prints JSON: dtype → the token ids that follow each of the texts.
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , place, folder, request] = process.argv;
const { dtypes, texts, tokens } = JSON.parse(request);
const entry = path.join(path.resolve(place), 'dist', 'transformers.node.mjs');
const { AutoModelForSeq2SeqLM, AutoTokenizer, env } = await import(pathToFileURL(entry));

env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + '/';
const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const written = {};
for (const dtype of dtypes) {
    const model = await AutoModelForSeq2SeqLM.from_pretrained(name, { dtype });
    written[dtype] = [];
    for (const text of texts) {
        const ids = await model.generate({ ...tokenizer(text), max_new_tokens: tokens, do_sample: false, no_repeat_ngram_size: 1 });
        written[dtype].push(ids.tolist()[0].map(Number));
    }
    await model.dispose();
}
console.log(JSON.stringify(written));
