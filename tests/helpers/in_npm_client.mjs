// What npm's openai makes of a server: node in_npm_client.mjs URL TOKEN MODEL prints it as JSON.
import OpenAI from "openai";

const [url, token, model] = process.argv.slice(2);
const server = { baseURL: `${url}/v1`, apiKey: token, maxRetries: 0 };
const client = new OpenAI(server);
const long = "To be ".repeat(10_000);

async function raised(calls) {
  const found = {};
  for (const [name, call] of Object.entries(calls)) {
    try {
      found[name] = `answered ${JSON.stringify(await call())}`.slice(0, 200);
    } catch (error) {
      found[name] = error.constructor.name;
    }
  }
  return found;
}

const stream = await client.completions.create({ model, prompt: "To be", max_tokens: 90_000, stream: true });
for await (const _ of stream) break; // which closes it
const texts = Array.from({ length: 1200 }, (_, number) => `To be ${number}`);
const several = Array.from({ length: 20 }, (_, seed) =>
  client.completions.create({ model, prompt: "To be", max_tokens: 8, seed }),
);
console.log(
  JSON.stringify({
    together: (await Promise.all(several)).map((told) => told.choices[0].text),
    embeddings: (await client.embeddings.create({ model, input: texts })).data.map((entry) => entry.embedding),
    models: (await client.models.list()).data.map((entry) => entry.id),
    raised: await raised({
      model: () => client.completions.create({ model: "other", prompt: "a" }),
      chat: () => client.chat.completions.create({ model, messages: [{ role: "user", content: "Hello" }] }),
      token: () => new OpenAI({ ...server, apiKey: "x" }).completions.create({ model, prompt: "a" }),
      long: () => client.completions.create({ model, prompt: long }),
      large: () => client.completions.create({ model, prompt: long.repeat(20) }),
      slow: () => new OpenAI({ ...server, timeout: 200 }).completions.create({ model, prompt: "a", max_tokens: 90_000 }),
      gone: () =>
        client.completions.create({ model, prompt: "a", max_tokens: 90_000 }, { signal: AbortSignal.timeout(200) }),
    }),
  }),
);
