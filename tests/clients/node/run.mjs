// One scenario with OpenAI's client for Node: `node run.mjs SCENARIO URL KEY` prints what it saw as one line of JSON.
import OpenAI from "openai";

const [scenario, url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const said = (content) => ({ model: "fake", messages: [{ role: "user", content }] });

async function failure(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    return {
      kind: error.constructor.name,
      status: error.status ?? null,
      code: error.code ?? null,
      param: error.param ?? null,
      hasRequestId: Boolean(error.requestID),
    };
  }
}

async function streamed(content, options = {}) {
  const texts = [];
  let usage = null;
  const stream = await client.chat.completions.create({ ...said(content), stream: true, ...options });
  for await (const chunk of stream) {
    for (const choice of chunk.choices) {
      texts[choice.index] = (texts[choice.index] ?? "") + (choice.delta.content ?? "");
    }
    usage = chunk.usage ?? usage;
  }
  return { texts, usage };
}

const scenarios = {
  async answers() {
    const chat = await client.chat.completions.create({ ...said("Hi"), n: 2 });
    const completion = await client.completions.create({ model: "fake", prompt: ["a", "b"], max_tokens: 30 });
    const pieces = [];
    for await (const chunk of await client.completions.create({
      model: "fake",
      prompt: "Hi",
      max_tokens: 30,
      stream: true,
    })) {
      pieces.push(chunk.choices[0].text);
    }
    const models = [];
    for await (const model of client.models.list()) models.push(model.id);
    return {
      chat: chat.choices.map((choice) => [choice.index, choice.message.content, choice.finish_reason]),
      usage: chat.usage,
      completion: completion.choices.map((choice) => choice.text),
      completionStream: pieces.join(""),
      stream: await streamed("Hi", { n: 2, stream_options: { include_usage: true } }),
      helper: await client.chat.completions.stream(said("Hi")).finalContent(),
      models,
    };
  },

  async logprobs() {
    const chat = await client.chat.completions.create({ ...said("Hi"), logprobs: true, top_logprobs: 2 });
    const completion = await client.completions.create({ model: "fake", prompt: "Hi", max_tokens: 30, logprobs: 1 });
    return { chat: chat.choices[0].logprobs.content, completion: completion.choices[0].logprobs };
  },

  async errors() {
    const ask = (fields) => failure(client.chat.completions.create({ ...said("Hi"), ...fields }));
    return {
      value: await ask({ temperature: 3 }),
      unknown: await ask({ temperatur: 1 }),
      model: await ask({ model: "other" }),
      priority: await ask({ priority: -1 }),
      engine: await ask(said("fails")),
      deadline: await ask({ ...said("forever"), timeout: 0.1 }),
      key: await failure(client.withOptions({ apiKey: "sk-wrong" }).models.list()),
      within: await failure(streamed("breaks")),
      before: await failure(streamed("fails")),
      timeout: await failure(client.chat.completions.create(said("forever"), { timeout: 300 })),
    };
  },

  async refused() {
    return failure(client.chat.completions.create(said("Hi")));
  },

  async retries() {
    const start = Date.now();
    const answer = await client.chat.completions.create(said("Hi"), { maxRetries: 3 });
    return { text: answer.choices[0].message.content, seconds: (Date.now() - start) / 1000 };
  },

  async cancels() {
    const stream = await client.chat.completions.create({ ...said("forever"), stream: true, n: 2 });
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) break; // which aborts the connection
    }
    return { aborted: stream.controller.signal.aborted };
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
