// A scripted session with the OpenAI SDK for Node: list, completion, chat, stream, error, abort.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });

const model = (await client.models.list()).data[0].id;
const whole = await client.completions.create({ model, prompt: "The server", max_tokens: 8, temperature: 0 });
assert.equal(whole.usage.completion_tokens, 8);
let text = "";
for await (const chunk of await client.completions.create({
  model, prompt: "The server", max_tokens: 8, temperature: 0, stream: true,
})) text += chunk.choices[0].text;
assert.equal(text, whole.choices[0].text);

const messages = [{ role: "user", content: "What is a type?" }];
const chat = await client.chat.completions.create({ model, messages, max_tokens: 8, temperature: 0 });
assert.equal(chat.choices[0].message.role, "assistant");
let said = "";
for await (const chunk of await client.chat.completions.create({
  model, messages, max_tokens: 8, temperature: 0, stream: true,
})) said += chunk.choices[0].delta.content ?? "";
assert.equal(said, chat.choices[0].message.content);

await assert.rejects(client.completions.create({ model: "absent", prompt: "x" }), OpenAI.NotFoundError);
await assert.rejects(
  client.completions.create({ model, prompt: "x", temperature: 9 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);

const stream = await client.completions.create({
  model, prompt: "The", max_tokens: 1000, ignore_eos: true, stream: true,
});
for await (const chunk of stream) { assert.ok(chunk); break; }
stream.controller.abort();
assert.equal((await client.models.list()).data[0].id, model);
console.log("node session ok");
