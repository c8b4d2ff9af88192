// Greedy tokens of a folder in transformers.js: node transformers_js.mjs PACKAGE FOLDER '{"dtypes": [null, "q8"], …}'
// PACKAGE: the folder of @huggingface/transformers. dtype null: what the folder's config.json says. Prints JSON:
// dtype → a list of token ids for each prompt; chat → the text of the chat. With "pipeline": only what a pipeline writes.
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , place, folder, request] = process.argv;
const { dtypes, prompts, tokens, chat, pipeline: piped } = JSON.parse(request);
const entry = path.join(path.resolve(place), 'dist', 'transformers.node.mjs');
const { AutoModelForCausalLM, AutoTokenizer, ModelRegistry, env, pipeline } = await import(pathToFileURL(entry));

env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + '/';
const name = path.basename(folder);
if (piped) {
    const generate = await pipeline('text-generation', name, { dtype: 'fp32' });
    const [{ generated_text }] = await generate(piped, { max_new_tokens: tokens, do_sample: false });
    console.log(JSON.stringify(generated_text));
    process.exit(0);
}
const tokenizer = await AutoTokenizer.from_pretrained(name);
const written = { chat: tokenizer.apply_chat_template(chat, { tokenize: false, add_generation_prompt: true }) };
for (const dtype of dtypes) {
    const model = await AutoModelForCausalLM.from_pretrained(name, dtype ? { dtype } : {});
    const files = await ModelRegistry.get_model_files(name, dtype ? { dtype } : {});
    const texts = [];
    for (const prompt of prompts) {
        const inputs = tokenizer(prompt);
        const ids = await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
        texts.push(ids.tolist()[0].map(Number));
    }
    written[dtype ?? 'default'] = { files, texts };
    await model.dispose();
}
console.log(JSON.stringify(written));
